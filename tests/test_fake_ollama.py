"""The stand-in for Ollama, driven by the real client: protocol, time, faults, eyes."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_ollama
import fake_vlm
import httpx
import numpy as np
import ollama
import pytest
from fake_ollama import PACES, TEXTS, VECTORS, FakeOllama
from numpy.typing import NDArray
from PIL import Image

import config

PROMPT = "Describe the shapes and edges in this image."
Y, X = np.mgrid[:336, :336] - 168


def png(pixels: NDArray[Any]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def edge(degrees: float = 5.0) -> bytes:
    noise = np.random.default_rng(0).normal(0, 3, X.shape)
    return png(np.where(np.tan(np.radians(degrees)) * Y < X, 220, 30) + noise)


DISC = png(np.where(np.hypot(X, Y) < 84, 220, 30))
OPEN: dict[str, ollama.Client] = {}


def client_of(fake: FakeOllama, **settings: Any) -> ollama.Client:
    key = f"{fake.url} {settings}"  # a client is dear: it reads all certificates
    OPEN[key] = OPEN.get(key) or ollama.Client(fake.url, trust_env=False, **settings)
    return OPEN[key]


@pytest.fixture(autouse=True)
def closed_clients() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.popitem()[1]._client.close()


def ask(
    client: ollama.Client, image: bytes = edge(), prompt: str = PROMPT, **options: Any
) -> ollama.ChatResponse:
    message = {"role": "user", "content": prompt, "images": [image]}
    options = {"seed": 1, "temperature": 0.7, "num_ctx": 2048} | options
    return client.chat("demo-vlm", messages=[message], options=options)


# --- Protocol -------------------------------------------------------------------------


def test_a_preflight_and_a_question_have_all_the_fields(fake: FakeOllama) -> None:
    client = client_of(fake)
    shown, reply = client.show("demo-vlm:latest"), ask(client, num_predict=5)
    assert {m.model for m in client.list().models} >= {"demo-vlm:latest"}
    assert shown.capabilities == ["completion", "vision"]
    assert shown.details
    assert shown.details.families == ["llama"]
    assert httpx.get(f"{fake.url}/api/version").json() == {"version": "0.33.0-fake"}
    assert (reply.done, reply.done_reason, reply.eval_count) == (True, "length", 5)
    assert (reply.prompt_eval_count or 0) > 576
    assert all((reply.eval_duration, reply.prompt_eval_duration))


def test_an_empty_chat_loads_and_unloads(fake: FakeOllama) -> None:
    client = client_of(fake)
    for keep, reason, loaded in (("30m", "load", 1), (0, "unload", 0)):
        assert client.chat("demo-vlm", [], keep_alive=keep).done_reason == reason
        assert len(client.ps().models) == loaded


REFUSED: list[tuple[Callable[[ollama.Client], Any], int, str]] = [
    (lambda c: c.chat("no"), 404, "model 'no' not found"),
    (lambda c: c.show("no"), 404, "model 'no:latest' not found"),
    (lambda c: c.embed("no", "x"), 404, 'model "no" not found, try pulling'),
    (lambda c: list(c.pull("no", stream=True)), -1, "file does not exist"),
    (lambda c: c.chat("demo-embed"), 400, '"demo-embed" does not support chat'),
    (lambda c: c.chat("demo-vlm", keep_alive="300"), 400, "time: missing unit in"),
    (lambda c: c.embed("demo-embed", "x", keep_alive="-1"), 400, "missing unit"),
    (lambda c: c.embed("demo-vlm", "x"), 501, "does not support embeddings"),
    (lambda c: ask(c, b"no picture"), 400, '{"error": {"code": 400, "message"'),
]


@pytest.mark.parametrize(("call", "status", "text"), REFUSED)
def test_errors_read_as_in_ollama(
    fake: FakeOllama, call: Any, status: int, text: str
) -> None:
    with pytest.raises(ollama.ResponseError) as caught:
        call(client_of(fake))
    assert caught.value.status_code == status
    assert text in caught.value.error


def test_a_missing_key_and_a_pull_without_internet_are_refused() -> None:
    script = [("/api/pull", 1, "pull_offline")]
    with FakeOllama(authorization="Bearer key", script=script) as fake:
        with pytest.raises(ollama.ResponseError, match="unauthorized"):
            client_of(fake).list()
        client = client_of(fake, headers={"Authorization": "Bearer key"})
        with pytest.raises(ollama.ResponseError, match="no such host"):
            list(client.pull("demo-vlm", stream=True))


def test_a_model_that_can_think_does_so_unless_told_not_to() -> None:
    able = ["completion", "vision", "thinking"]
    with FakeOllama(capabilities={"demo-vlm": able}) as fake:
        silent = ask(client_of(fake))
        message = [{"role": "user", "content": PROMPT}]
        spoken = client_of(fake).chat("demo-vlm", message, think=False)
        sent = fake.bodies("/api/chat")[1]
    assert (silent.message.content, silent.done_reason) == ("", "length")
    assert spoken.message.content
    assert (sent["messages"], sent["think"]) == ([PROMPT], False)


# --- Slots, caches, time --------------------------------------------------------------


@pytest.mark.parametrize(("ram", "encodes"), [(8192, 3), (0, 9)])
def test_round_robin_needs_the_ram_cache(ram: float, encodes: int) -> None:
    with FakeOllama(cache_ram_mib=ram) as fake:
        for image in [edge(2), edge(4), edge(6)] * 3:
            ask(client_of(fake), image)
        assert fake.stats()["encodes"] == encodes


def test_old_servers_embed_with_the_vlm() -> None:
    with FakeOllama(era="llamarunner") as fake:
        assert client_of(fake).embed("demo-vlm", "a").embeddings


def test_an_image_that_is_known_takes_less_time() -> None:
    with FakeOllama(time_model="cpu", time_scale=0.01, load_s=0) as fake:
        cold, warm = (ask(client_of(fake), num_predict=15) for _ in "ab")
    read_s = ((cold.prompt_eval_duration or 0) - (warm.prompt_eval_duration or 0)) / 1e9
    assert read_s == pytest.approx(576 / 60 + 3, abs=0.01)


def test_slots_share_the_machine_and_encode_an_image_each() -> None:
    pace = FakeOllama(num_parallel=4, time_model="gpu", time_scale=0.2, load_s=0)
    with pace as fake, ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, [client_of(fake)] * 4))
        stats = fake.stats()
    assert stats["encodes"] == stats["max_slots_busy"] == stats["max_in_flight"] == 4
    assert 0 < stats["busy_s"] < stats["slot_busy_s"]
    assert 4 * PACES["gpu"].rate(4) == pytest.approx(400, rel=0.01)


def test_other_runner_options_reload(fake: FakeOllama) -> None:
    for temperature, num_ctx in ((0.1, 2048), (0.9, 2048), (0.9, 3000)):
        ask(client_of(fake), temperature=temperature, num_ctx=num_ctx)
    assert (fake.stats()["loads"], fake.stats()["reloads"]) == (2, 1)


@pytest.mark.parametrize(("pace", "loads"), [("instant", 0), ("cpu", 1)])
def test_a_client_that_leaves_ends_load_and_answer(pace: str, loads: int) -> None:
    with FakeOllama(time_model=pace, load_s=0 if loads else 60) as fake:
        with pytest.raises(httpx.ReadTimeout):
            ask(client_of(fake, timeout=0.5))
        time.sleep(0.3)
        stats = fake.stats()
        assert [stats[n] for n in ("in_flight", "slots_busy", "loads")] == [0, 0, loads]


# --- Faults ---------------------------------------------------------------------------

NAMES = ["busy", "crash", "oom", "load_fail", "eof", "nested", "nested_500"]
NAMES += ["html_403", "html_502", "unauthorized", "plain_404"]
RAISED: dict[str, type[Exception]] = dict.fromkeys(NAMES, ollama.ResponseError)
RAISED |= {"html_200": json.JSONDecodeError, "json_list": AttributeError}
RAISED |= dict.fromkeys(("cut", "drop", "refuse"), httpx.RemoteProtocolError)
RAISED |= dict.fromkeys(("hang", "slow"), httpx.ReadTimeout)
RAISED |= {"reset": httpx.TransportError, "redirect": ConnectionError}


@pytest.mark.parametrize("fault", RAISED)
def test_a_fault_raises_what_it_should_and_passes(fault: str) -> None:
    with FakeOllama(script=[("/api/chat", 1, fault)], fault_s=1.0) as fake:
        with pytest.raises(RAISED[fault]):
            ask(client_of(fake, timeout=0.5))
        if fault == "refuse":
            with pytest.raises(ConnectionError):
                ask(client_of(fake))
            time.sleep(1.0)
        assert ask(client_of(fake)).done
        assert fake.stats()["faults"] == {fault: 1}


@pytest.mark.parametrize("fault", TEXTS)
def test_a_bad_text_is_a_200_and_counts_as_no_answer(fault: str) -> None:
    with FakeOllama(script=[("/api/chat", 1, fault)]) as fake:
        bad, good = (ask(client_of(fake), num_predict=120) for _ in range(2))
        (row,) = fake.stats()["asked"]
    text = bad.message.content or ""
    assert bad.done is TEXTS[fault][1]
    assert (bad.eval_count is None) == (not bad.done)
    assert text != good.message.content
    assert (text.strip() == "") == (fault in ("zero", "empty", "whitespace", "thinks"))
    cut = fault in ("loop", "length", "letters", "thinks")
    assert (bad.done_reason == "length") == cut
    assert (row["asked"], row["answered"]) == (2, 1)


@pytest.mark.parametrize("fault", VECTORS)
def test_a_broken_list_of_vectors_differs_from_a_good_one(fault: str) -> None:
    asked = {"input": ["one", "two"], "model": "demo-embed"}
    with FakeOllama(script=[("/api/embed", 1, fault)]) as fake:
        url = f"{fake.url}/api/embed"
        bad, good = (httpx.post(url, json=asked).json()["embeddings"] for _ in "ab")
    assert np.linalg.norm(good, axis=1) == pytest.approx([1, 1])
    assert json.dumps(bad) != json.dumps(good)


def test_another_engine_moves_vectors_and_a_new_digest_moves_none(
    fake: FakeOllama,
) -> None:
    def now() -> tuple[NDArray[Any], list[str]]:
        texts = [config.PROBE_SENTENCE, "a round disc"]
        vectors = client_of(fake).embed("demo-embed", texts).embeddings
        digests = [str(model.digest) for model in client_of(fake).list().models]
        return np.array(vectors), digests

    fake.control(script=[("/api/chat", 1, "digest")])
    before = now()
    ask(client_of(fake))
    fake.control(other_engine=True)
    after = now()
    probe, small = (before[0] * after[0]).sum(axis=1)
    assert 0.8 < probe < 0.99
    assert small == pytest.approx(1)
    assert [a == b for a, b in zip(before[1], after[1], strict=True)] == [False, True]


def test_faults_by_chance_are_seeded_and_misspelt_ones_refused() -> None:
    def texts(seed: int) -> list[str | None]:
        with FakeOllama(faults={"empty": 0.5}, fault_seed=seed) as fake:
            return [ask(client_of(fake)).message.content for _ in range(6)]

    assert texts(1) == texts(1)
    assert 0 < texts(1).count("") < 6
    for wrong in ({"faults": {"bussy": 1}}, {"parallel": 2}):
        with pytest.raises(ValueError, match="unknown"):
            FakeOllama(**wrong)


# --- Eyes, voice ----------------------------------------------------------------------


def test_measurements_tell_pictures_apart() -> None:
    split, disc = fake_vlm.look(edge(5)), fake_vlm.look(DISC)
    assert split.lines[0].length > 0.8
    assert split.lines[0].tilt == pytest.approx(5, abs=0.7)
    assert disc.circles == pytest.approx([0.25], abs=0.02)
    assert (split.circles, split.drawn, disc.drawn) == ((), False, True)


def test_texts_depend_on_the_question_alone(fake: FakeOllama) -> None:
    def text(prompt: str = PROMPT, **options: Any) -> str:
        return ask(client_of(fake), prompt=prompt, **options).message.content or ""

    assert text() == text() != text("How many objects are there?")
    assert text(temperature=0, seed=1) == text(temperature=0, seed=2)
    texts = {text(seed=seed) for seed in range(8)}
    assert len(texts) > 6
    words = " ".join(texts).lower()
    assert not any(name in words for name in ("fdt", "mtf", "tor ", "leeds"))


def test_the_command_serves_another_process(tmp_path: Path) -> None:
    ready = tmp_path / "url"
    command = [sys.executable, fake_ollama.__file__, "--port=0"]
    command += ["--ready-file", str(ready)]
    settings = ["num_parallel=2", 'digests={"demo-vlm": "abc"}']
    with subprocess.Popen([*command, *settings], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert b"not a VLM" in process.stdout.readline()
        while not ready.exists() or not ready.read_text():
            time.sleep(0.02)
        url = ready.read_text()
        tags, stats = httpx.get(f"{url}/api/tags"), httpx.get(f"{url}/__stats").json()
        process.terminate()
    assert "abc" in tags.text
    assert stats["requests"]["/api/tags"] == 1
