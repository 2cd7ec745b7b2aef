"""The stand-in for Ollama, driven by the real client: protocol, cache, faults, eyes."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ollama
import pytest
from fake_ollama import EMBED_FAULTS, PACES, FakeOllama
from fake_vlm import embed, look
from numpy.typing import NDArray
from PIL import Image, ImageDraw

OPTIONS = {"seed": 1, "temperature": 0.7, "num_ctx": 2048, "num_predict": 120}
PROMPT = "Describe the shapes and edges in this image."
HERE = Path(__file__).parent
BROKEN_VECTORS = sorted(set(EMBED_FAULTS) - {"embed_eof", "embed_nan", "embed_refused"})


def png(pixels: NDArray[Any] | Image.Image) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def flat(seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).normal(128, 8, (336, 336))
    return png(noise.clip(0, 255).astype(np.uint8))


def edge(degrees: float = 5.0) -> bytes:
    y, x = np.mgrid[:336, :336]
    bright = x - 168 > np.tan(np.radians(degrees)) * (y - 168)
    return png(np.where(bright, 240, 15).astype(np.uint8))


def disc() -> bytes:
    image = Image.new("L", (336, 336), 20)
    draw = ImageDraw.Draw(image)
    draw.ellipse((48, 48, 288, 288), fill=120)
    draw.ellipse((70, 70, 266, 266), outline=220, width=3)
    for turn in range(18):
        x, y = 168 + 75 * np.cos(turn / 2.86), 168 + 75 * np.sin(turn / 2.86)
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=170)
    for stripe in range(140, 196, 6):
        draw.rectangle((stripe, 145, stripe + 2, 190), fill=230)
    return png(image)


def ask(
    client: ollama.Client, image: bytes, prompt: str = PROMPT, **options: Any
) -> ollama.ChatResponse:
    message = {"role": "user", "content": prompt, "images": [image]}
    return client.chat("demo-vlm", messages=[message], options=OPTIONS | options)


OPEN: list[ollama.Client] = []


def client_of(server: FakeOllama, **settings: Any) -> ollama.Client:
    return client_at(server.url, **settings)


def client_at(url: str, **settings: Any) -> ollama.Client:
    OPEN.append(ollama.Client(url, trust_env=False, **settings))
    return OPEN[-1]


@pytest.fixture(autouse=True)
def closed_clients() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop()._client.close()


@asynccontextmanager
async def async_client(server: FakeOllama) -> AsyncIterator[ollama.AsyncClient]:
    client = ollama.AsyncClient(server.url, trust_env=False)
    try:
        yield client
    finally:
        await client._client.aclose()


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama() as running:
        yield running


@pytest.fixture
def client(server: FakeOllama) -> ollama.Client:
    return client_of(server)


class TestProtocol:
    def test_answers_what_a_preflight_asks(self, client: ollama.Client) -> None:
        listed = {model.model for model in client.list().models}
        shown = client.show("demo-vlm:latest")
        assert listed == {"demo-vlm:latest", "demo-embed:latest"}
        assert shown.capabilities == ["completion", "vision"]
        assert shown.modelinfo is not None
        assert client.ps().models == []

    def test_version_parses_and_says_fake(self, server: FakeOllama) -> None:
        version = httpx.get(f"{server.url}/api/version").json()["version"]
        assert version == "0.33.0-fake"
        assert httpx.get(server.url).text == "Ollama is running"
        assert httpx.head(f"{server.url}/api/tags").status_code == 200

    def test_a_chat_reply_has_all_the_fields(self, client: ollama.Client) -> None:
        reply = ask(client, edge())
        assert reply.done is True
        assert reply.done_reason == "stop"
        assert reply.message.content
        assert (reply.prompt_eval_count or 0) > 576
        assert all((reply.eval_count, reply.eval_duration, reply.total_duration))

    def test_streamed_text_equals_the_whole(self, client: ollama.Client) -> None:
        message = {"role": "user", "content": PROMPT, "images": [edge()]}
        parts = list(client.chat("demo-vlm", [message], options=OPTIONS, stream=True))
        text = "".join(part.message.content or "" for part in parts)
        assert len(parts) > 5
        assert parts[-1].done_reason == "stop"
        assert text == ask(client, edge()).message.content

    def test_generate_gives_response_and_context(self, client: ollama.Client) -> None:
        reply = client.generate("demo-vlm", PROMPT, images=[edge()], options=OPTIONS)
        assert reply.response == ask(client, edge()).message.content
        assert reply.context

    def test_the_async_client_works(self, server: FakeOllama) -> None:
        async def many() -> list[ollama.ChatResponse]:
            message = {"role": "user", "content": PROMPT, "images": [edge()]}
            async with async_client(server) as client:
                calls = [
                    client.chat("demo-vlm", [message], options={"seed": seed})
                    for seed in range(6)
                ]
                return await asyncio.gather(*calls)

        assert all(reply.done for reply in asyncio.run(many()))
        assert server.stats()["encodes"] == 1

    def test_an_empty_chat_loads_and_unloads(self, client: ollama.Client) -> None:
        assert client.chat("demo-vlm", [], keep_alive="30m").done_reason == "load"
        (running,) = client.ps().models
        assert running.context_length == 4096
        assert client.chat("demo-vlm", [], keep_alive=0).done_reason == "unload"
        assert client.ps().models == []

    def test_pull_adds_a_model_with_progress(self) -> None:
        with FakeOllama(models=["demo-embed"]) as server:
            client = client_of(server)
            states = [state.status for state in client.pull("demo-vlm", stream=True)]
            assert states[0] == "pulling manifest"
            assert states[-1] == "success"
            assert client.pull("demo-vlm").status == "success"
            assert ask(client, edge()).done

    @pytest.mark.parametrize(
        ("call", "status", "text"),
        [
            (lambda c: c.chat("no"), 404, "model 'no' not found"),
            (lambda c: c.show("no"), 404, "model 'no' not found"),
            (lambda c: c.embed("no", "x"), 404, 'model "no" not found, try pulling'),
            (lambda c: c.pull("no"), 500, "pull model manifest: file does not exist"),
            (lambda c: c.chat("demo-embed"), 400, '"demo-embed" does not support chat'),
            (lambda c: c.chat("demo-vlm", think=True), 400, "not support thinking"),
            (lambda c: c.embed("demo-vlm", "x"), 501, "does not support embeddings"),
            (lambda c: c.embeddings("demo-vlm", "x"), 500, "not support embeddings"),
            (lambda c: ask(c, b"no picture"), 400, '{"error": {"code": 400, "message"'),
            (lambda c: ask(c, edge(), "word " * 2000), 400, "exceed_context_size"),
            (lambda c: ask(c, edge(), seed="x"), 500, 'option "seed" must be of type'),
        ],
    )
    def test_errors_read_as_in_ollama(
        self, client: ollama.Client, call: Any, status: int, text: str
    ) -> None:
        with pytest.raises(ollama.ResponseError) as caught:
            call(client)
        assert caught.value.status_code == status
        assert text in caught.value.error

    def test_unknown_paths_and_methods_are_refused(self, server: FakeOllama) -> None:
        assert httpx.get(f"{server.url}/api/nothing").text == "404 page not found"
        assert httpx.get(f"{server.url}/api/chat").status_code == 405
        assert httpx.post(f"{server.url}/api/chat").status_code == 400

    def test_an_image_to_a_text_model_is_refused(self) -> None:
        with FakeOllama(models=["demo-text"]) as server:
            message = {"role": "user", "content": PROMPT, "images": [edge()]}
            with pytest.raises(ollama.ResponseError, match="multimodal"):
                client_of(server).chat("demo-text", [message])

    def test_num_predict_cuts_the_text(self, client: ollama.Client) -> None:
        reply = ask(client, edge(), num_predict=5)
        assert reply.done_reason == "length"
        assert reply.eval_count == 5


class TestEras:
    @pytest.mark.parametrize("era", ["llamarunner", "ext"])
    def test_old_servers_embed_with_the_vlm(self, era: str) -> None:
        with FakeOllama(era=era) as server:
            reply = client_of(server).embed("demo-vlm", ["a", "b"])
            assert len(reply.embeddings) == 2

    def test_an_embedding_in_the_shared_runner_evicts_the_image(self) -> None:
        with FakeOllama(era="llamarunner") as server:
            client = client_of(server)
            for prompt in "ab":
                ask(client, edge(), prompt)
                client.embed("demo-vlm", "text", options=OPTIONS)
            assert server.stats()["full_prefills"] == 2
            assert server.stats()["reloads"] == 0

    def test_the_oldest_era_encodes_every_time(self) -> None:
        with FakeOllama(era="ext", num_parallel=4) as server:
            for prompt in "abc":
                ask(client_of(server), edge(), prompt)
            assert server.stats()["encodes"] == 3

    def test_the_middle_era_remembers_four_encodings(self) -> None:
        images = [edge(degrees) for degrees in range(5)]
        with FakeOllama(era="llamarunner") as server:
            for image in [*images[:4], *images[:4]]:
                ask(client_of(server), image)
            assert server.stats()["encodes"] == 4
            assert server.stats()["full_prefills"] == 8
            ask(client_of(server), images[4])
            ask(client_of(server), images[0])
            assert server.stats()["encodes"] == 6


class TestCache:
    def test_one_image_is_encoded_once(self, server: FakeOllama) -> None:
        for prompt in "abcde":
            ask(client_of(server), edge(), prompt)
        stats = server.stats()
        assert (stats["encodes"], stats["full_prefills"]) == (1, 1)
        assert stats["cached_tokens"] == 4 * 581

    def test_other_bytes_of_the_same_pixels_miss(self, server: FakeOllama) -> None:
        again = io.BytesIO()
        Image.open(io.BytesIO(edge())).save(again, "PNG", compress_level=1)
        ask(client_of(server), edge())
        ask(client_of(server), again.getvalue())
        assert server.stats()["encodes"] == 2

    def test_text_before_the_image_is_never_reused(self, server: FakeOllama) -> None:
        for prompt in "abcde":
            ask(client_of(server), edge(), f"{prompt} [img]")
        assert server.stats()["encodes"] == 5

    @pytest.mark.parametrize(("ram", "encodes"), [(8192, 3), (300, 9), (0, 9)])
    def test_round_robin_needs_the_ram_cache(self, ram: float, encodes: int) -> None:
        images = [edge(degrees) for degrees in (2, 4, 6)]
        with FakeOllama(cache_ram_mib=ram) as server:
            for prompt in "abc":
                for image in images:
                    ask(client_of(server), image, prompt)
            assert server.stats()["encodes"] == encodes
            assert server.stats()["ram_restores"] == 9 - encodes

    def test_a_slot_per_image_encodes_each_once(self) -> None:
        with FakeOllama(num_parallel=4, time_model="gpu", time_scale=0.02) as server:
            asyncio.run(describe_all(server, [edge(a) for a in range(4)], 6))
            stats = server.stats()
        assert stats["encodes"] == 4
        assert stats["max_slots_busy"] == 4

    def test_a_new_image_takes_the_slot_that_rested_longest(self) -> None:
        first, second, third = (edge(degrees) for degrees in (2, 4, 6))
        with FakeOllama(num_parallel=2, cache_ram_mib=0) as server:
            for image in (first, second, first, third, first):
                ask(client_of(server), image)
            assert server.stats()["encodes"] == 3

    def test_one_image_in_all_slots_is_encoded_in_each(self) -> None:
        with FakeOllama(num_parallel=4, time_model="gpu", time_scale=0.05) as server:
            asyncio.run(describe_all(server, [edge()] * 4, 3))
            assert server.stats()["encodes"] == 4


async def describe_all(server: FakeOllama, images: list[bytes], prompts: int) -> None:
    """One worker per image, each asking its prompts in sequence."""

    async def worker(client: ollama.AsyncClient, image: bytes, number: int) -> None:
        for prompt in range(prompts):
            text = f"{PROMPT} {number} {prompt}"
            message = {"role": "user", "content": text, "images": [image]}
            await client.chat("demo-vlm", [message], options=OPTIONS)

    async with async_client(server) as client:
        await asyncio.gather(
            *(worker(client, *pair[::-1]) for pair in enumerate(images))
        )


class TestTime:
    def test_parallel_slots_share_the_machine(self) -> None:
        spent = {}
        for parallel in (1, 4):
            settings: dict[str, Any] = {"time_model": "gpu", "load_s": 0}
            with FakeOllama(num_parallel=parallel, time_scale=0.2, **settings) as s:
                began = time.monotonic()
                asyncio.run(describe_all(s, [edge(a) for a in range(4)], 3))
                spent[parallel] = time.monotonic() - began
                assert s.stats()["busy_s"] <= spent[parallel]
        assert 1.5 < spent[1] / spent[4] < 3.5

    def test_four_slots_give_400_tokens_a_second(self) -> None:
        rate = PACES["gpu"].rate
        assert rate(1) == 150
        assert 4 * rate(4) == pytest.approx(400, rel=0.01)

    def test_max_in_flight_counts_waiting_requests(self) -> None:
        with FakeOllama(time_model="gpu", time_scale=0.02) as server:
            asyncio.run(describe_all(server, [edge(a) for a in range(5)], 2))
            stats = server.stats()
        assert (stats["max_in_flight"], stats["max_slots_busy"]) == (5, 1)


class TestLoading:
    def test_other_runner_options_reload(self, server: FakeOllama) -> None:
        client = client_of(server)
        ask(client, edge(), temperature=0.1)
        ask(client, edge(), temperature=0.9)
        assert server.stats()["loads"] == 1
        ask(client, edge(), num_ctx=3000)
        assert server.stats()["reloads"] == 1

    def test_leaving_during_the_load_aborts_it(self) -> None:
        with FakeOllama(load_s=0.4) as server:
            with pytest.raises(httpx.ReadTimeout):
                ask(client_of(server, timeout=0.1), edge())
            assert ask(client_of(server, timeout=5), edge()).done
            stats = server.stats()
        assert (stats["loads_aborted"], stats["loads"]) == (1, 1)

    def test_leaving_during_the_answer_frees_the_slot(self) -> None:
        with FakeOllama(time_model="cpu", load_s=0) as server:
            with pytest.raises(httpx.ReadTimeout):
                ask(client_of(server, timeout=0.2), edge())
            time.sleep(0.1)
            stats = server.stats()
        assert (stats["slots_busy"], stats["in_flight"]) == (0, 0)

    def test_a_stream_that_is_left_frees_the_slot(self) -> None:
        message = {"role": "user", "content": PROMPT, "images": [edge()]}
        with FakeOllama(time_model="gpu", load_s=0) as server:
            client = client_of(server)
            stream: Any = client.chat("demo-vlm", [message], stream=True)
            next(stream)
            stream.close()
            assert ask(client_of(server, timeout=5), edge()).done
            assert server.stats()["disconnects"] == 1

    def test_a_full_queue_gives_503(self) -> None:
        with FakeOllama(load_s=0.3, max_queue=2) as server:
            with pytest.raises(ollama.ResponseError, match="maximum pending") as caught:
                asyncio.run(describe_all(server, [edge()] * 4, 1))
            assert caught.value.status_code == 503
            assert server.stats()["busy_503"] == 2


def scripted(fault: str, endpoint: str = "/api/chat", seconds: float = 0) -> FakeOllama:
    return FakeOllama(script=[[endpoint, 1, fault, seconds]])


class TestFaults:
    @pytest.mark.parametrize(
        ("fault", "status", "text"),
        [
            ("busy", 503, "server busy, please try again.  maximum"),
            ("crash", 500, "model runner has unexpectedly stopped"),
            ("oom", 500, "out-of-memory"),
            ("load_fail", 500, "timed out waiting for llama-server"),
            ("eof", 500, "unexpected EOF"),
            ("nested", 400, '{"error": {"code": 400'),
            ("nested_500", 500, '{"error": {"code": 500'),
            ("html_502", 502, "<html>"),
            ("plain_404", 404, "404 page not found"),
        ],
    )
    def test_error_replies(self, fault: str, status: int, text: str) -> None:
        with scripted(fault) as server:
            with pytest.raises(ollama.ResponseError) as caught:
                ask(client_of(server), edge())
            assert caught.value.status_code == status
            assert text in caught.value.error
            assert server.stats()["faults"] == {fault: 1}
            assert ask(client_of(server), edge()).done

    @pytest.mark.parametrize(
        ("fault", "error"),
        [
            ("html_200", json.JSONDecodeError),
            ("json_list", AttributeError),
            ("cut", httpx.RemoteProtocolError),
            ("drop", httpx.RemoteProtocolError),
            ("reset", httpx.ReadError),
            ("hang", httpx.ReadTimeout),
            ("slow", httpx.ReadTimeout),
        ],
    )
    def test_what_the_client_raises(self, fault: str, error: type[Exception]) -> None:
        with scripted(fault) as server:
            client = client_of(server, timeout=0.3)
            with pytest.raises(error):
                ask(client, edge())
            assert ask(client, edge()).done

    @pytest.mark.parametrize(
        ("fault", "done", "reason"),
        [
            ("zero", False, None),
            ("truncated", False, None),
            ("empty", True, "stop"),
            ("whitespace", True, "stop"),
            ("loop", True, "length"),
            ("length", True, "length"),
        ],
    )
    def test_broken_successes(self, fault: str, done: bool, reason: str | None) -> None:
        with scripted(fault) as server:
            reply = ask(client_of(server), edge())
            sound = ask(client_of(server), edge())
        text = reply.message.content or ""
        assert (reply.done, reply.done_reason) == (done, reason)
        assert text != sound.message.content
        assert bool(text.strip()) == (fault in ("truncated", "loop", "length"))

    def test_a_stream_can_die_in_the_middle(self) -> None:
        message = {"role": "user", "content": PROMPT, "images": [edge()]}
        with scripted("eof") as server:
            stream = client_of(server).chat("demo-vlm", [message], stream=True)
            with pytest.raises(ollama.ResponseError, match="unexpected EOF") as caught:
                list(stream)
        assert caught.value.status_code == -1

    def test_refused_connections_come_back(self) -> None:
        with scripted("refuse", seconds=0.4) as server:
            client = client_of(server)
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                ask(client, edge())
            with pytest.raises(ConnectionError):
                ask(client, edge())
            time.sleep(0.5)
            assert ask(client, edge()).done

    @pytest.mark.parametrize("fault", ["embed_eof", "embed_nan", "embed_refused"])
    def test_embedding_errors(self, fault: str) -> None:
        wanted = {"embed_refused": 501}.get(fault, 400)
        with (
            scripted(fault, "/api/embed") as server,
            pytest.raises(ollama.ResponseError) as caught,
        ):
            client_of(server).embed("demo-embed", ["a", "b"])
        assert caught.value.status_code == wanted

    @pytest.mark.parametrize("fault", BROKEN_VECTORS)
    def test_broken_vectors(self, fault: str) -> None:
        with scripted(fault, "/api/embed") as server:
            client = client_of(server)
            if fault == "embed_null":
                with pytest.raises(ValueError, match="valid"):
                    client.embed("demo-embed", ["a", "b"])
                return
            vectors = client.embed("demo-embed", ["a", "b"]).embeddings
        shape = (len(vectors), len(vectors[0]))
        norm = float(np.linalg.norm(vectors[0]))
        sound = shape == (2, 256) and abs(norm - 1) < 1e-5
        assert not sound

    def test_a_changed_digest_shows_in_the_list(self) -> None:
        with scripted("digest") as server:
            client = client_of(server)
            before = {m.model: m.digest for m in client.list().models}
            assert ask(client, edge()).done
            after = {m.model: m.digest for m in client.list().models}
        assert before["demo-vlm:latest"] != after["demo-vlm:latest"]
        assert before["demo-embed:latest"] == after["demo-embed:latest"]

    def test_chance_faults_are_seeded(self) -> None:
        def outcomes(seed: int) -> list[bool]:
            with FakeOllama(faults={"busy": 0.5}, fault_seed=seed) as server:
                return [succeeds(client_of(server)) for _ in range(12)]

        assert outcomes(1) == outcomes(1)
        assert 0 < sum(outcomes(1)) < 12

    def test_rules_match_text_and_predicates(self, server: FakeOllama) -> None:
        server.control(
            script=[
                ("/api/chat", "second", "busy"),
                ("/api/chat", lambda body: body["options"]["seed"] == 9, "crash"),
            ]
        )
        client = client_of(server)
        assert ask(client, edge(), "first").done
        with pytest.raises(ollama.ResponseError, match="busy"):
            ask(client, edge(), "second")
        with pytest.raises(ollama.ResponseError, match="stopped"):
            ask(client, edge(), "first", seed=9)

    def test_a_misspelt_fault_or_setting_is_refused(self) -> None:
        with pytest.raises(ValueError, match="unknown fault"):
            FakeOllama(faults={"bussy": 1})
        with pytest.raises(ValueError, match="unknown settings"):
            FakeOllama(parallel=2)


def succeeds(client: ollama.Client) -> bool:
    try:
        return bool(ask(client, edge()).done)
    except ollama.ResponseError:
        return False


class TestCounters:
    def test_answered_counts_only_sound_answers(self, server: FakeOllama) -> None:
        server.control(script=[("/api/chat", 1, "empty"), ("/api/chat", 1, "busy")])
        client = client_of(server)
        results = [succeeds(client) for _ in range(3)]
        (entry,) = server.stats()["asked"]
        assert results == [True, False, True]
        assert entry["prompt"] == PROMPT
        assert (entry["asked"], entry["answered"]) == (2, 1)

    def test_stats_and_control_over_http(self, server: FakeOllama) -> None:
        ask(client_of(server), edge())
        client_of(server).embed("demo-embed", ["a", "b"])
        stats = httpx.get(f"{server.url}/__stats").json()
        assert [entry["answered"] for entry in stats["embedded"]] == [1, 1]
        change = {"reset_stats": True, "digests": {"demo-vlm": "f" * 64}}
        assert httpx.post(f"{server.url}/__control", json=change).json()["ok"]
        assert server.stats()["requests"] == {}
        digests = {model.digest for model in client_of(server).list().models}
        assert "f" * 64 in digests
        bad = httpx.post(f"{server.url}/__control", json={"nonsense": 1})
        assert bad.status_code == 400


class TestEyesAndVoice:
    def test_measurements_tell_the_pictures_apart(self) -> None:
        plain, split, round_ = look(flat()), look(edge(5)), look(disc())
        assert (plain.lines, plain.circles, plain.bars) == ((), (), 0)
        assert split.lines[0].length > 0.8
        assert split.lines[0].tilt == pytest.approx(5, abs=0.7)
        assert not split.circles
        assert len(round_.circles) >= 2
        assert round_.spots > 12
        assert round_.bars > 0

    def test_a_margin_or_a_dead_line_is_no_edge_of_an_object(self) -> None:
        field = np.array(Image.open(io.BytesIO(flat())))
        margin, dead = field.copy(), field.copy()
        margin[:, 290:] = 0
        dead[:, 100] = 255
        for image, thin in ((margin, False), (dead, True)):
            seen = look(png(image))
            assert seen.lines[0].thin == thin
            assert seen.longest.length == 0

    def test_padding_is_recognised(self) -> None:
        padded = np.full((336, 336), 117, np.uint8)
        padded[60:276] = np.asarray(Image.open(io.BytesIO(flat())))[60:276]
        assert look(png(padded)).padding == pytest.approx(120 / 336, abs=0.01)
        assert not look(png(padded)).lines

    def test_a_look_is_quick(self) -> None:
        look(disc())
        began = time.process_time()
        look(disc())
        assert time.process_time() - began < 0.2

    @pytest.mark.parametrize("shape", [(1, 1), (2, 300), (30, 30), (900, 700)])
    def test_any_size_can_be_looked_at(self, shape: tuple[int, int]) -> None:
        assert look(png(np.zeros(shape, np.uint8))).mean == 0

    def test_texts_depend_on_the_question_alone(self, client: ollama.Client) -> None:
        def text(prompt: str = PROMPT, **options: Any) -> str:
            return ask(client, disc(), prompt, **options).message.content or ""

        assert text() == text()
        assert len({text(seed=seed) for seed in range(8)}) > 6
        assert text() != text("How many objects are there?")
        assert text(temperature=0, seed=1) == text(temperature=0, seed=2)

    def test_several_descriptions_tell_the_pictures_apart(
        self, client: ollama.Client
    ) -> None:
        def mean(image: bytes, seeds: range) -> NDArray[np.float64]:
            texts = [ask(client, image, seed=s).message.content or "" for s in seeds]
            vectors = np.array([embed(text, 256) for text in texts])
            return np.asarray(vectors.mean(axis=0), np.float64)

        images = {"flat": flat(1), "edge": edge(3), "disc": disc()}
        known = {name: mean(image, range(10)) for name, image in images.items()}
        for name, image in {"flat": flat(2), "edge": edge(8), "disc": disc()}.items():
            seen = mean(image, range(20, 30))
            near = max(known, key=lambda other: float(known[other] @ seen))
            assert near == name

    def test_it_never_names_a_class(self, client: ollama.Client) -> None:
        texts = [ask(client, disc(), seed=s).message.content or "" for s in range(40)]
        words = " ".join(texts).lower()
        assert not any(name in words for name in ("fdt", "mtf", "tor ", "leeds"))


class TestEmbedder:
    def test_vectors_are_unit_and_keep_order(self, client: ollama.Client) -> None:
        texts = ["a round disc", "a straight edge", "a round disc"]
        vectors = np.array(client.embed("demo-embed", texts).embeddings)
        assert vectors.shape == (3, 256)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
        assert np.array_equal(vectors[0], vectors[2])
        assert vectors[0] @ vectors[1] < 0.5

    def test_empty_input_and_dimensions(self, client: ollama.Client) -> None:
        assert client.embed("demo-embed", "").embeddings == []
        (short,) = client.embed("demo-embed", "a round disc", dimensions=64).embeddings
        assert len(short) == 64
        legacy = client.embeddings("demo-embed", "a round disc").embedding
        assert np.linalg.norm(legacy) > 1.5

    def test_every_process_gives_the_same_vectors(self) -> None:
        code = "from fake_vlm import embed; print(embed('one two', 16))"
        command = [sys.executable, "-c", code]
        env = {"PYTHONPATH": str(HERE), "PYTHONHASHSEED": "7"}
        ran = subprocess.run(command, capture_output=True, env=env, check=True)
        assert json.loads(ran.stdout) == embed("one two", 16)


def test_the_command_serves_until_it_is_stopped(tmp_path: Path) -> None:
    ready = tmp_path / "url"
    command = [sys.executable, str(HERE / "fake_ollama.py"), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--ready-file", str(ready)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        banner = process.stdout.readline()
        assert "not a VLM" in banner
        deadline = time.monotonic() + 5
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        url = ready.read_text()
        assert url in banner
        assert ask(client_at(url), edge()).done
    finally:
        process.terminate()
        process.communicate(timeout=5)
    assert process.returncode == 0
