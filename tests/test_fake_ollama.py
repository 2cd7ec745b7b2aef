"""The stand-in for Ollama, driven by the real client: protocol, time, faults, eyes."""

import asyncio
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_vlm
import httpx
import numpy as np
import ollama
import pytest
from fake_ollama import EYES, TEXTS, VECTORS, FakeOllama
from numpy.typing import NDArray
from PIL import Image

import config

OPTIONS = {"seed": 1, "temperature": 0.7, "num_ctx": 2048, "num_predict": 120}
PROMPT = "Describe the shapes and edges in this image."
HERE = Path(__file__).parent
OPEN: list[ollama.Client] = []
Y, X = np.mgrid[:336, :336]


def png(pixels: NDArray[Any]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def edge(degrees: float = 5.0) -> bytes:
    bright = X - 168 > np.tan(np.radians(degrees)) * (Y - 168)
    noise = np.random.default_rng(0).normal(0, 3, bright.shape)
    return png(np.where(bright, 220, 30) + noise)


DISC = png(np.where(np.hypot(X - 168, Y - 168) < 84, 220, 30))
BARS = png(np.where(X // 24 % 2, 60, 230))


def client_of(server: FakeOllama, **settings: Any) -> ollama.Client:
    OPEN.append(ollama.Client(server.url, trust_env=False, **settings))
    return OPEN[-1]


@pytest.fixture(autouse=True)
def closed_clients() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop()._client.close()


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama() as running:
        yield running


def ask(
    client: ollama.Client, image: bytes, prompt: str = PROMPT, **options: Any
) -> ollama.ChatResponse:
    message = {"role": "user", "content": prompt, "images": [image]}
    return client.chat("demo-vlm", messages=[message], options=OPTIONS | options)


def ask_all(server: FakeOllama, images: list[bytes], prompts: int = 3) -> None:
    """One worker per image, each asking its prompts in sequence."""

    async def worker(client: ollama.AsyncClient, number: int) -> None:
        for prompt in range(prompts):
            text = f"{PROMPT} {number} {prompt}"
            message = {"role": "user", "content": text, "images": [images[number]]}
            await client.chat("demo-vlm", [message], options=OPTIONS)

    async def main() -> None:
        client = ollama.AsyncClient(server.url, trust_env=False)
        await asyncio.gather(*(worker(client, n) for n in range(len(images))))
        await client._client.aclose()

    asyncio.run(main())


# --- Protocol ---------------------------------------------------------------------------


def test_it_answers_what_a_preflight_asks(server: FakeOllama) -> None:
    client = client_of(server)
    shown = client.show("demo-vlm:latest")
    assert {m.model for m in client.list().models} == {
        "demo-vlm:latest",
        "demo-embed:latest",
    }
    assert shown.capabilities == ["completion", "vision"]
    assert shown.details is not None
    assert shown.details.families == ["llama"]
    assert client.ps().models == []
    assert httpx.get(f"{server.url}/api/version").json() == {"version": "0.33.0-fake"}


def test_a_chat_reply_has_all_the_fields(server: FakeOllama) -> None:
    reply = ask(client_of(server), edge())
    assert (reply.done, reply.done_reason) == (True, "stop")
    assert reply.message.content
    assert (reply.prompt_eval_count or 0) > 576
    assert all((reply.eval_count, reply.eval_duration, reply.total_duration))


def test_num_predict_cuts_the_text(server: FakeOllama) -> None:
    reply = ask(client_of(server), edge(), num_predict=5)
    assert (reply.done_reason, reply.eval_count) == ("length", 5)


def test_an_empty_chat_loads_and_unloads(server: FakeOllama) -> None:
    client = client_of(server)
    assert client.chat("demo-vlm", [], keep_alive="30m").done_reason == "load"
    assert [model.context_length for model in client.ps().models] == [4096]
    assert client.chat("demo-vlm", [], keep_alive=0).done_reason == "unload"
    assert client.ps().models == []


@pytest.mark.parametrize(
    ("call", "status", "text"),
    [
        (lambda c: c.chat("no"), 404, "model 'no' not found"),
        (lambda c: c.show("no"), 404, "model 'no:latest' not found"),
        (lambda c: c.embed("no", "x"), 404, 'model "no" not found, try pulling'),
        (lambda c: list(c.pull("no", stream=True)), -1, "file does not exist"),
        (lambda c: c.chat("demo-embed"), 400, '"demo-embed" does not support chat'),
        (lambda c: c.chat("demo-vlm", think=True), 400, "not support thinking"),
        (lambda c: c.chat("demo-vlm", keep_alive="300"), 400, "time: missing unit in"),
        (lambda c: c.embed("demo-embed", "x", keep_alive="-1"), 400, "missing unit"),
        (lambda c: c.embed("demo-vlm", "x"), 501, "does not support embeddings"),
        (lambda c: ask(c, b"no picture"), 400, '{"error": {"code": 400, "message"'),
        (
            lambda c: c.embed("demo-embed", "x", options={"num_ctx": 1}),
            400,
            "input after truncation exceeds maximum context length",
        ),
    ],
)
def test_errors_read_as_in_ollama(
    server: FakeOllama, call: Any, status: int, text: str
) -> None:
    with pytest.raises(ollama.ResponseError) as caught:
        call(client_of(server))
    assert caught.value.status_code == status
    assert text in caught.value.error


def test_a_missing_header_is_401() -> None:
    with FakeOllama(authorization="Bearer secret") as server:
        with pytest.raises(ollama.ResponseError, match="unauthorized"):
            client_of(server).list()
        headers = {"Authorization": "Bearer secret"}
        assert client_of(server, headers=headers).list().models


def test_pull_adds_a_model_with_progress_unless_offline() -> None:
    with FakeOllama(models=["demo-embed"]) as server:
        client = client_of(server)
        server.control(script=[("/api/pull", 1, "pull_offline")])
        with pytest.raises(ollama.ResponseError, match="no such host"):
            list(client.pull("demo-vlm", stream=True))
        states = [state.status for state in client.pull("demo-vlm", stream=True)]
        assert states[0] == "pulling manifest"
        assert states[-1] == "success"
        assert ask(client, edge()).done


def test_a_model_that_can_think_does_so_unless_told_not_to() -> None:
    able = ["completion", "vision", "thinking"]
    with FakeOllama(capabilities={"demo-vlm": able}) as server:
        client = client_of(server)
        silent = ask(client, edge())
        message = {"role": "user", "content": PROMPT, "images": [edge()]}
        spoken = client.chat("demo-vlm", [message], think=False, options=OPTIONS)
    assert (silent.message.content, silent.done_reason) == ("", "length")
    assert silent.message.thinking
    assert spoken.message.content


# --- Slots, caches, time ----------------------------------------------------------------


@pytest.mark.parametrize(("ram", "encodes"), [(8192, 3), (300, 9), (0, 9)])
def test_round_robin_needs_the_ram_cache(ram: float, encodes: int) -> None:
    images = [edge(degrees) for degrees in (2, 4, 6)]
    with FakeOllama(cache_ram_mib=ram) as server:
        for prompt in "abc":
            for image in images:
                ask(client_of(server), image, prompt)
        assert server.stats()["encodes"] == encodes


def test_old_servers_remember_four_encodings_and_embed_with_the_vlm() -> None:
    images = [edge(degrees) for degrees in range(5)]
    with FakeOllama(era="llamarunner") as server:
        client = client_of(server)
        for image in [*images[:4], *images[:4], images[4], images[0]]:
            ask(client, image)
        assert server.stats()["encodes"] == 6
        assert len(client.embed("demo-vlm", ["a", "b"]).embeddings) == 2
        with pytest.raises(ollama.ResponseError, match="input length exceeds"):
            client.embed("demo-embed", "a b c", options={"num_ctx": 4})


@pytest.mark.parametrize(("era", "counted"), [("llamaserver", 1), ("llamarunner", 0)])
def test_old_servers_report_no_time_for_the_encoding(era: str, counted: int) -> None:
    with FakeOllama(era=era, time_model="cpu", time_scale=0.001, load_s=0) as server:
        cold, warm = (ask(client_of(server), edge(), p) for p in ("abc", "abc"))
    more_s = ((cold.prompt_eval_duration or 0) - (warm.prompt_eval_duration or 0)) / 1e9
    assert more_s == pytest.approx(576 / 60 + 3 * counted, abs=0.01)


def test_a_slot_per_image_encodes_each_once_and_one_image_in_all_slots_in_each() -> (
    None
):
    for images in ([edge(a) for a in range(4)], [edge()] * 4):
        with FakeOllama(num_parallel=4, time_model="gpu", time_scale=0.02) as server:
            ask_all(server, images)
            stats = server.stats()
        assert (stats["encodes"], stats["max_slots_busy"]) == (4, 4)
        assert stats["max_in_flight"] == 4
        first, last = stats["questions_s"]
        assert stats["busy_s"] <= last - first + 0.1


def test_parallel_slots_share_the_machine() -> None:
    spent = {}
    for parallel in (1, 4):
        settings: dict[str, Any] = {"time_model": "gpu", "load_s": 0}
        with FakeOllama(num_parallel=parallel, time_scale=0.1, **settings) as server:
            ask_all(server, [edge(a) for a in range(4)])
            first, last = server.stats()["questions_s"]
            spent[parallel] = last - first
    assert 1.5 < spent[1] / spent[4] < 3.5


def test_other_runner_options_reload(server: FakeOllama) -> None:
    client = client_of(server)
    for temperature, num_ctx in ((0.1, 2048), (0.9, 2048), (0.9, 3000)):
        ask(client, edge(), temperature=temperature, num_ctx=num_ctx)
    assert (server.stats()["loads"], server.stats()["reloads"]) == (2, 1)


def test_models_of_other_programs_take_room() -> None:
    with FakeOllama(resident=("bge", "other"), max_loaded=2) as server:
        client = client_of(server)
        ask(client, edge())
        assert len(client.ps().models) == 2
        server.control(vram=0.0)
        assert [model.size_vram for model in client.ps().models] == [0, 0]


@pytest.mark.parametrize(
    "settings", [{"load_s": 0.4}, {"time_model": "cpu", "load_s": 0}]
)
def test_a_client_that_leaves_frees_what_it_waited_for(
    settings: dict[str, Any],
) -> None:
    with FakeOllama(**settings) as server:
        with pytest.raises(httpx.ReadTimeout):
            ask(client_of(server, timeout=0.15), edge())
        time.sleep(0.1)
        stats = server.stats()
        assert (stats["slots_busy"], stats["in_flight"]) == (0, 0)
        assert stats["loads"] == (settings["load_s"] == 0)


# --- Faults -----------------------------------------------------------------------------

CAUGHT: dict[str, type[Exception]] = {
    "html_200": json.JSONDecodeError,
    "json_list": AttributeError,
    "cut": httpx.RemoteProtocolError,
    "drop": httpx.RemoteProtocolError,
    "refuse": httpx.RemoteProtocolError,
    "reset": httpx.ReadError,
    "hang": httpx.ReadTimeout,
    "slow": httpx.ReadTimeout,
    "redirect": ConnectionError,
}
NAMES = ("busy", "crash", "oom", "load_fail", "eof", "nested", "nested_500", "html_502")
NAMES += ("html_403", "unauthorized", "plain_404")
CAUGHT |= dict.fromkeys(NAMES, ollama.ResponseError)


@pytest.mark.parametrize("fault", CAUGHT)
def test_a_fault_raises_what_it_should_and_passes(fault: str) -> None:
    with FakeOllama(script=[("/api/chat", 1, fault)], fault_s=0.3) as server:
        client = client_of(server, timeout=0.25)
        with pytest.raises(CAUGHT[fault]):
            ask(client, edge())
        if fault == "refuse":
            with pytest.raises(ConnectionError):
                ask(client, edge())
            time.sleep(0.4)
        assert ask(client, edge()).done
        assert server.stats()["faults"] == {fault: 1}


@pytest.mark.parametrize("fault", TEXTS)
def test_a_bad_text_is_a_200_and_counts_as_no_answer(fault: str) -> None:
    with FakeOllama(script=[("/api/chat", 1, fault)]) as server:
        bad, good = (ask(client_of(server), edge()) for _ in range(2))
        (row,) = server.stats()["asked"]
    text = bad.message.content or ""
    assert bad.done is TEXTS[fault][1]
    assert (bad.eval_count is None) == (not bad.done)
    assert text != good.message.content
    assert bool(text.strip()) == (
        fault not in ("zero", "empty", "whitespace", "thinks")
    )
    cut = fault in ("loop", "length", "letters", "thinks")
    assert (bad.done_reason == "length") == cut
    assert (row["asked"], row["answered"]) == (2, 1)


@pytest.mark.parametrize("fault", VECTORS)
def test_a_broken_list_of_vectors_differs_from_a_good_one(fault: str) -> None:
    texts = {"input": ["one", "two"], "model": "demo-embed"}
    with FakeOllama(script=[("/api/embed", 1, fault)]) as server:
        url = f"{server.url}/api/embed"
        bad, good = (httpx.post(url, json=texts).json()["embeddings"] for _ in "ab")
    assert np.shape(good) == (2, 256)
    assert np.linalg.norm(good, axis=1) == pytest.approx(1)
    assert json.dumps(bad) != json.dumps(good)


def test_other_engines_embed_capitals_otherwise(server: FakeOllama) -> None:
    def embedded() -> NDArray[Any]:
        texts = [config.PROBE_SENTENCE, "a round disc"]
        return np.array(client_of(server).embed("demo-embed", texts).embeddings)

    before = embedded()
    server.control(script=[("/api/version", 1, "update")])
    assert httpx.get(f"{server.url}/api/version").json() == {"version": "0.99.0-fake"}
    probe, small = (before * embedded()).sum(axis=1)
    assert 0.8 < probe < 0.99
    assert small == pytest.approx(1)


def test_a_changed_digest_shows_in_the_list(server: FakeOllama) -> None:
    client = client_of(server)
    server.control(script=[("/api/chat", 1, "digest")])
    before = {m.model: m.digest for m in client.list().models}
    assert ask(client, edge()).done
    after = {m.model: m.digest for m in client.list().models}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"demo-vlm:latest"}


def test_rules_match_texts_and_predicates(server: FakeOllama) -> None:
    rules: list[tuple[str, str | Callable[[Any], bool], str]] = [
        ("/api/chat", "second", "busy"),
        ("*", lambda body: body["options"]["seed"] == 9, "crash"),
    ]
    server.control(script=rules)
    client = client_of(server)
    assert ask(client, edge(), "first").done
    with pytest.raises(ollama.ResponseError, match="busy"):
        ask(client, edge(), "second")
    with pytest.raises(ollama.ResponseError, match="stopped"):
        ask(client, edge(), "first", seed=9)
    assert [b["messages"] for b in server.bodies("/api/chat")] == [
        ["first"],
        ["second"],
        ["first"],
    ]


def test_faults_by_chance_are_seeded_and_misspelt_ones_refused() -> None:
    def outcomes(seed: int) -> list[str]:
        with FakeOllama(faults={"empty": 0.5}, fault_seed=seed) as server:
            client = client_of(server)
            return [ask(client, edge()).message.content or "" for _ in range(9)]

    assert outcomes(1) == outcomes(1)
    assert 0 < outcomes(1).count("") < 9
    with pytest.raises(ValueError, match="unknown fault"):
        FakeOllama(faults={"bussy": 1})
    with pytest.raises(ValueError, match="unknown settings"):
        FakeOllama(parallel=2)


# --- Eyes, voice, embedder ------------------------------------------------------------


def test_measurements_tell_pictures_apart() -> None:
    split, round_ = fake_vlm.look(edge(5)), fake_vlm.look(DISC)
    assert split.lines[0].length > 0.8
    assert split.lines[0].tilt == pytest.approx(5, abs=0.7)
    assert (split.circles, split.drawn) == ((), False)
    assert round_.circles[0] == pytest.approx(84 / 336, abs=0.02)
    assert round_.drawn


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (30, 30), (900, 700)])
def test_any_size_can_be_looked_at(shape: tuple[int, int]) -> None:
    assert fake_vlm.look(png(np.zeros(shape))).mean == 0


def test_texts_depend_on_the_question_alone(server: FakeOllama) -> None:
    def text(prompt: str = PROMPT, **options: Any) -> str:
        return ask(client_of(server), edge(), prompt, **options).message.content or ""

    assert text() == text()
    assert len({text(seed=seed) for seed in range(8)}) > 6
    assert text() != text("How many objects are there?")
    assert text(temperature=0, seed=1) == text(temperature=0, seed=2)
    words = " ".join(text(seed=seed) for seed in range(30)).lower()
    assert not any(name in words for name in ("fdt", "mtf", "tor ", "leeds"))


def right_answers(client: ollama.Client, seed: int) -> int:
    """Of six answers about two drawings, those nearer to the others about their own."""
    texts: dict[bytes, list[str]] = {DISC: [], BARS: []}
    for number, prompt in enumerate(config.GENERIC_PROMPTS[:3]):
        for at, image in enumerate(texts):
            reply = ask(client, image, prompt, seed=10 * seed + 2 * number + at)
            texts[image].append(reply.message.content or "")
    vectors = {i: np.array([fake_vlm.embed(t, 256) for t in texts[i]]) for i in texts}
    right = 0
    for mine, other in ((DISC, BARS), (BARS, DISC)):
        far = vectors[other].mean(axis=0)
        for at, vector in enumerate(vectors[mine]):
            near = np.delete(vectors[mine], at, axis=0).mean(axis=0)
            right += vector @ near * np.linalg.norm(
                far
            ) > vector @ far * np.linalg.norm(near)
    return right


def test_two_drawings_are_told_apart_always(server: FakeOllama) -> None:
    client = client_of(server)
    assert {right_answers(client, seed) for seed in range(20)} == {6}


@pytest.mark.parametrize("fault", EYES)
def test_who_does_not_see_cannot_tell_two_drawings_apart(fault: str) -> None:
    for seed in range(3):
        with FakeOllama(faults={fault: 1.0}) as server:
            assert right_answers(client_of(server), seed) < 5


def test_the_command_serves_until_it_is_stopped(tmp_path: Path) -> None:
    ready = tmp_path / "url"
    command = [sys.executable, str(HERE / "fake_ollama.py"), "--port", "0"]
    settings = ["num_parallel=2", "other_engine=true", 'digests={"demo-vlm": "abc"}']
    process = subprocess.Popen(
        [*command, "--ready-file", str(ready), *settings],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        banner = process.stdout.readline()
        assert "not a VLM" in banner
        while not ready.exists():
            time.sleep(0.02)
        url = ready.read_text()
        listed = httpx.get(f"{url}/api/tags").json()["models"]
        assert "abc" in {model["digest"] for model in listed}
        change = {"faults": {"busy": 1.0}, "reset_stats": True}
        assert httpx.post(f"{url}/__control", json=change).json() == {"ok": True}
        assert httpx.post(f"{url}/__control", json={"no": 1}).status_code == 400
        assert httpx.get(f"{url}/__stats").json()["requests"] == {
            "/__control": 1,
            "/__stats": 1,
        }
    finally:
        process.terminate()
        process.communicate(timeout=5)
    assert process.returncode == 0
