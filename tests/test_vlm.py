"""utils.py: the vision language model, the real client against the stand-in."""

import asyncio
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import httpx
import numpy as np
import phantoms
import pytest
from conftest import server_flags
from fake_ollama import FakeOllama
from numpy.typing import NDArray

import utils
from config import Config, parse_config
from utils import (
    Answer,
    ModelChangedError,
    PipelineError,
    PreparedImage,
    RejectedError,
    ServerFacts,
    VlmServer,
)

T = TypeVar("T")
QUESTION = utils.questions("generic", 1)[0]


def knobs(fake: FakeOllama, *more: str) -> Config:
    return parse_config(2, "", [*server_flags(fake.url), *more])[0]


def ask(
    cfg: Config,
    work: Callable[[VlmServer], Awaitable[T]],
    tell: Callable[[str], object] = lambda _: None,
) -> T:
    """Run one coroutine with a server client."""

    async def main() -> T:
        async with utils.open_servers(cfg, tell) as [server]:
            return await work(server)

    return utils.run_async(main())


def preflight(cfg: Config) -> ServerFacts:
    return ask(cfg, VlmServer.preflight)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> PreparedImage:
    path = tmp_path_factory.mktemp("image") / "a.dcm"
    return utils.prepare_image(phantoms.write(phantoms.exposure("TOR", 1), path))


def describe(
    cfg: Config, picture: PreparedImage, told: Callable[[Answer], object] = print
) -> Answer:
    """Ask the question as a phase does, keeping nothing."""

    async def work(server: VlmServer) -> Answer:
        answers = await asked_of(server, cfg, picture, told)
        chosen = answers.chosen(QUESTION)
        assert chosen is not None
        return chosen

    return ask(cfg, work)


async def asked_of(
    server: VlmServer,
    cfg: Config,
    picture: PreparedImage,
    told: Callable[[Answer], object],
    kept: Sequence[str] = (),
) -> utils.ImageAnswers:
    """The answers after QUESTION was asked, where those kept were there before."""
    book = utils.AnswerBook(None, cfg, await server.preflight())
    answers = book.of(picture)
    for attempt, text in enumerate(kept):
        answers.keep(QUESTION, attempt, {"text": text, "done": True})

    async def one(_: int, __: int, turn: utils.Turn) -> None:
        await utils.ask(picture, [QUESTION], answers, turn, embed=False, told=told)

    await utils.image_by_image([0], int, one, utils.slots_of(cfg, [server]))
    return answers


# --- Preflight ----------------------------------------------------------------------


def test_the_preflight_finds_both_models_and_probes_the_embedder(
    fake: FakeOllama,
) -> None:
    facts = preflight(knobs(fake))
    assert len(facts.vlm_digest) == len(facts.embedder_digest) == 64
    assert facts.probe.shape == (256,)
    assert facts.both_loaded
    assert facts.version.startswith("0.33")


def test_no_server_is_one_line_with_the_host_and_the_remedy() -> None:
    cfg = Config(host="http://127.0.0.1:9")
    with pytest.raises(PipelineError, match=r"127\.0\.0\.1:9.*ollama serve.*--host"):
        preflight(cfg)


@pytest.mark.parametrize("flag", ["--vlm", "--embed-model"])
def test_a_missing_model_comes_with_its_pull_command(
    fake: FakeOllama, flag: str
) -> None:
    with pytest.raises(PipelineError, match=r"`ollama pull nowhere` or add --pull"):
        preflight(knobs(fake, flag, "nowhere"))


def test_pull_fetches_a_missing_model_and_says_how_far_it_is() -> None:
    lines: list[str] = []
    with FakeOllama(models=("demo-embed",), pullable=("demo-vlm",)) as fake:
        cfg = knobs(fake, "--pull")
        facts = ask(cfg, VlmServer.preflight, lines.append)
    assert facts.vlm_digest
    assert any("demo-vlm" in line and "%" in line for line in lines)


def test_a_model_that_cannot_be_pulled_is_named(fake: FakeOllama) -> None:
    with pytest.raises(PipelineError, match="nowhere can't be downloaded"):
        preflight(knobs(fake, "--pull", "--vlm", "nowhere"))


def test_a_model_without_vision_is_refused(fake: FakeOllama) -> None:
    with pytest.raises(PipelineError, match="demo-embed can't see images"):
        preflight(knobs(fake, "--vlm", "demo-embed"))


def test_a_chat_model_that_no_longer_embeds_comes_with_the_remedy(
    fake: FakeOllama,
) -> None:
    with pytest.raises(PipelineError, match="--embed-model nomic-embed-text"):
        preflight(knobs(fake, "--embed-model", "demo-vlm"))


def test_older_servers_embed_with_the_vlm_itself() -> None:
    with FakeOllama(era="llamarunner") as fake:
        facts = preflight(knobs(fake, "--embed-model", "demo-vlm"))
    assert facts.probe.size > 0
    assert not facts.both_loaded


def test_models_that_do_not_fit_together_are_noticed() -> None:
    with FakeOllama(max_loaded=1) as fake:
        assert not preflight(knobs(fake)).both_loaded


def test_the_first_load_is_the_last(fake: FakeOllama, picture: PreparedImage) -> None:
    async def work(server: VlmServer) -> None:
        await server.preflight()
        await server.answer(picture.png, QUESTION.prompt, 1)
        await server.embed(["a text"])

    ask(knobs(fake), work)
    assert (fake.stats()["loads"], fake.stats()["reloads"]) == (2, 0)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("localhost", "http://localhost:11434"),
        ("0.0.0.0:99", "http://127.0.0.1:99"),
        ("https://there", "https://there:443"),
        ("http://there/path/", "http://there:80/path"),
        ("[::1]:5", "http://[::1]:5"),
        ("[::]:5", "http://[::1]:5"),
        ("::", "http://[::1]:11434"),
        ("10.0.0.0", "http://10.0.0.0:11434"),
        ('"127.0.0.1:99"', "http://127.0.0.1:99"),
        ("https://me:secret@there", "https://there:443"),
        ("me:secret@10.0.0.1:99", "http://10.0.0.1:99"),
    ],
)
def test_an_address_is_completed_as_ollama_does(host: str, url: str) -> None:
    assert utils.server_url(Config(host=host)) == url


@pytest.mark.parametrize(
    "host",
    [
        "ftp://there",
        "http://there:port",
        "http://[::1",
        "two words",
        "a:99999",
        "http://",
    ],
)
def test_what_is_no_address_is_one_line(host: str) -> None:
    with pytest.raises(PipelineError, match="is not an address of a server"):
        utils.server_url(Config(host=host))


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("http://localhost:1", True),
        ("http://127.0.0.2:1", True),
        ("http://[::1]:1", True),
        ("http://10.0.0.1:1", False),
        ("https://ollama.example", False),
    ],
)
def test_only_this_machine_is_loopback(url: str, own: bool) -> None:
    assert utils.is_loopback(url) is own


def test_a_server_elsewhere_is_named_and_an_unencrypted_one_said_to_be() -> None:
    assert utils.distance_warning(Config(host="localhost:1")) == ""
    plain = utils.distance_warning(Config(host="http://192.0.2.1:9"))
    assert plain.endswith("for http://192.0.2.1:9, unencrypted")
    assert "unencrypted" not in utils.distance_warning(Config(host="https://there"))


def test_a_proxy_is_not_used_for_loopback(
    fake: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert preflight(knobs(fake)).vlm_digest


# --- Descriptions -------------------------------------------------------------------


def test_an_answer_has_text_and_times(fake: FakeOllama, picture: PreparedImage) -> None:
    answer = describe(knobs(fake), picture)
    assert answer.problem == ""
    assert answer.text
    assert answer.record["prompt_eval_duration"] > 0
    assert answer.record["eval_duration"] > 0
    assert answer.record["time"].endswith("+00:00")
    assert answer.record["server_version"].startswith("0.33")


def test_the_same_question_with_the_same_seed_has_the_same_answer(
    fake: FakeOllama, picture: PreparedImage
) -> None:
    cfg = knobs(fake)
    assert describe(cfg, picture).text == describe(cfg, picture).text


def test_every_image_question_and_attempt_has_a_seed_of_its_own() -> None:
    asked = [*utils.questions("generic", 20), *utils.questions("object", 20)]
    images = ("a" * 64, "b" * 64)
    seeds = [q.seed(i, a) for q in asked for i in images for a in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("fault", ["zero", "truncated", "empty", "whitespace", "loop"])
def test_a_200_without_a_usable_text_is_asked_again_with_another_seed(
    fake: FakeOllama, picture: PreparedImage, fault: str
) -> None:
    fake.control(script=[("/api/chat", QUESTION.prompt, fault)])
    attempts: list[Answer] = []
    answer = describe(knobs(fake), picture, attempts.append)
    assert answer.problem == ""
    assert [attempt.usable for attempt in attempts] == [False, True]
    seeds = {asked["seed"] for asked in fake.stats()["asked"] if asked["prompt"]}
    assert len(seeds) == 2


def test_a_cut_answer_is_asked_again_once_and_then_kept(
    fake: FakeOllama, picture: PreparedImage
) -> None:
    script = [
        {
            "endpoint": "/api/chat",
            "when": QUESTION.prompt,
            "fault": "length",
            "times": 9,
        }
    ]
    fake.control(script=script)
    attempts: list[Answer] = []
    answer = describe(knobs(fake), picture, attempts.append)
    assert answer.problem == "cut"
    assert len(attempts) == 2


def test_a_question_without_any_usable_answer_is_rejected(
    fake: FakeOllama, picture: PreparedImage
) -> None:
    fake.control(faults={"empty": 1.0})
    with pytest.raises(RejectedError, match=r"generic prompt 0.*empty"):
        describe(knobs(fake), picture)


def test_attempts_of_an_earlier_run_are_not_repeated(
    fake: FakeOllama, picture: PreparedImage
) -> None:
    cfg = knobs(fake)
    ask(cfg, lambda server: asked_of(server, cfg, picture, print, kept=["", ""]))
    seeds = [asked["seed"] for asked in fake.stats()["asked"] if asked["prompt"]]
    assert seeds == [QUESTION.seed(picture.image_id, 2)]


PASSING = [
    "busy",
    "crash",
    "eof",
    "oom",
    "html_502",
    "html_200",
    "cut",
    "reset",
    "drop",
]


@pytest.mark.parametrize("fault", PASSING)
def test_a_failure_that_passes_costs_nothing_but_a_retry(
    fake: FakeOllama, picture: PreparedImage, fault: str
) -> None:
    cfg = knobs(fake)
    expected = describe(cfg, picture)
    fake.control(script=[("/api/chat", QUESTION.prompt, fault)])
    assert describe(cfg, picture).text == expected.text
    assert fake.stats()["faults"][fault] == 1


def test_a_request_that_hangs_is_given_up_and_asked_again(
    fake: FakeOllama, picture: PreparedImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "ANSWER_S", 0.5)
    fake.control(script=[("/api/chat", QUESTION.prompt, "hang")])
    assert describe(knobs(fake), picture).usable


def test_a_request_that_the_server_refuses_is_not_repeated(
    fake: FakeOllama, picture: PreparedImage
) -> None:
    fake.control(script=[("/api/chat", QUESTION.prompt, "nested")])
    with pytest.raises(RejectedError, match="can't describe an image") as caught:
        describe(knobs(fake), picture)
    assert "{" not in str(caught.value)
    assert fake.stats()["requests"]["/api/chat"] == 1 + 1  # the load


def test_a_model_that_vanished_stops_the_run(
    fake: FakeOllama, picture: PreparedImage
) -> None:
    with pytest.raises(PipelineError, match="run `ollama pull gone`") as caught:
        ask(
            knobs(fake, "--vlm", "gone"),
            lambda s: s.answer(picture.png, QUESTION.prompt, 1),
        )
    assert not isinstance(caught.value, RejectedError)


def test_a_server_that_fails_everything_stops_the_run(
    fake: FakeOllama, picture: PreparedImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "TRIES", 1)
    fake.control(faults={"oom": 1.0})

    async def work(server: VlmServer) -> None:
        for _ in range(utils.BAD_ANSWERS + 1):
            try:
                await server.answer(picture.png, QUESTION.prompt, 1)
            except RejectedError:
                continue

    with pytest.raises(PipelineError, match=r"12 of 12 .*can't describe an image"):
        ask(knobs(fake), work)


def test_a_server_that_goes_away_is_waited_for(
    fake: FakeOllama, picture: PreparedImage
) -> None:
    script = [
        {
            "endpoint": "/api/chat",
            "when": QUESTION.prompt,
            "fault": "refuse",
            "seconds": 1.0,
        }
    ]
    fake.control(script=script)
    assert describe(knobs(fake), picture).usable


def test_a_server_behind_a_gateway_that_does_not_reach_it_is_waited_for(
    fake: FakeOllama, picture: PreparedImage
) -> None:
    """It says so for longer than a request is tried again."""
    gone = {"fault": "html_502", "times": 2 * utils.TRIES}
    chat = {"endpoint": "/api/chat", "when": QUESTION.prompt, **gone}
    fake.control(script=[chat, {"endpoint": "/api/ps", "when": 2, **gone}])
    with pytest.raises(PipelineError, match=r"has not answered.*HTTP 502"):
        describe(knobs(fake, "--wait", "0.1"), picture)


def test_a_login_goes_to_the_server_as_it_was_meant() -> None:
    for host in ("me:a%40b@localhost", '"http://me:a%40b@localhost:99"'):
        server = VlmServer(Config(host=host), print)
        assert "a@b" not in server.url
        assert isinstance(server.http.auth, httpx.BasicAuth)
        request = next(server.http.auth.auth_flow(httpx.Request("GET", server.url)))
        assert request.headers["authorization"] == "Basic bWU6YUBi"


def test_a_server_that_stays_away_stops_the_run(
    fake: FakeOllama, picture: PreparedImage
) -> None:
    fake.control(script=[("/api/chat", QUESTION.prompt, "refuse", 60.0)])
    with pytest.raises(PipelineError, match=r"has not answered.*ollama serve"):
        describe(knobs(fake, "--wait", "0.1"), picture)


def test_a_workstation_that_slept_has_not_waited(
    fake: FakeOllama, picture: PreparedImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def much_longer(_: float) -> None:
        await asyncio.sleep(0.4)

    longer = SimpleNamespace(**{**vars(asyncio), "sleep": much_longer})
    monkeypatch.setattr(utils, "asyncio", longer)
    fake.control(script=[("/api/chat", QUESTION.prompt, "refuse", 1.0)])
    assert describe(knobs(fake, "--wait", "0.3"), picture).usable


def test_a_replaced_model_is_noticed(fake: FakeOllama) -> None:
    async def work(server: VlmServer) -> None:
        await server.preflight()
        await server.check_unchanged()
        fake.control(digests={"demo-vlm": "f" * 64})
        await server.check_unchanged()

    with pytest.raises(ModelChangedError, match="demo-vlm was replaced"):
        ask(knobs(fake), work)


# --- Embeddings ---------------------------------------------------------------------

TEXTS = [f"text number {number}" for number in range(70)]


def embedded(cfg: Config, texts: list[str]) -> list[NDArray[np.float32] | None]:
    async def work(server: VlmServer) -> list[NDArray[np.float32] | None]:
        await server.preflight()
        return await server.embed(texts)

    return ask(cfg, work)


def assert_equal(
    first: list[NDArray[np.float32] | None], second: list[NDArray[np.float32] | None]
) -> None:
    for one, other in zip(first, second, strict=True):
        assert one is not None
        assert other is not None
        assert np.array_equal(one, other)


def test_texts_are_embedded_in_lists_and_in_order(fake: FakeOllama) -> None:
    vectors = embedded(knobs(fake), TEXTS)
    before = fake.stats()["requests"]["/api/embed"]
    assert before == 4 + 1  # the preflight, and the list
    alone = embedded(knobs(fake), TEXTS[50:51])[0]
    assert_equal([vectors[50]], [alone])


@pytest.mark.parametrize(
    "fault",
    [
        "embed_eof",
        "embed_nan",
        "embed_nan_raw",
        "embed_null",
        "embed_zero",
        "embed_short",
        "embed_count",
        "html_200",
        "busy",
        "drop",
    ],
)
def test_a_list_that_fails_once_is_complete_in_the_end(
    fake: FakeOllama, fault: str
) -> None:
    expected = embedded(knobs(fake), TEXTS[:5])
    fake.control(script=[("/api/embed", TEXTS[2], fault)])
    again = embedded(knobs(fake), TEXTS[:5])
    assert_equal(expected, again)
    assert fake.stats()["faults"][fault] == 1


@pytest.mark.parametrize("fault", ["embed_nan", "embed_nan_raw", "embed_zero"])
def test_a_text_that_cannot_be_embedded_costs_only_itself(
    fake: FakeOllama, fault: str
) -> None:
    script = [{"endpoint": "/api/embed", "when": TEXTS[2], "fault": fault, "times": 99}]
    fake.control(script=script)
    vectors = embedded(knobs(fake), TEXTS[:5])
    assert [vector is None for vector in vectors] == [False, False, True, False, False]


# --- Order --------------------------------------------------------------------------


@pytest.mark.parametrize(("slots", "images"), [(1, 3), (4, 8)])
def test_the_server_encodes_every_image_once(
    slots: int, images: int, tmp_path: Path
) -> None:
    paths = [
        phantoms.write(phantoms.exposure("MTF", n, side=64), tmp_path / f"{n}")
        for n in range(images)
    ]

    async def run(server: VlmServer, cfg: Config) -> None:
        book = utils.AnswerBook(None, cfg, await server.preflight())
        asked = utils.questions("generic", 6)

        async def work(_: Path, picture: PreparedImage, turn: utils.Turn) -> None:
            await utils.ask(picture, asked, book.of(picture), turn)

        slots = utils.slots_of(cfg, [server])
        await utils.image_by_image(paths, utils.prepare_image, work, slots)

    with FakeOllama(
        num_parallel=slots,
        cache_ram_mib=0,
        time_model="gpu",
        time_scale=0.01,
        load_s=0.0,
    ) as fake:
        cfg = knobs(fake, "--server-parallel", str(slots))
        ask(cfg, lambda server: run(server, cfg))
        stats = fake.stats()
    assert stats["encodes"] == images
    assert sum(bool(asked["prompt"]) for asked in stats["asked"]) == images * 6
    assert stats["max_in_flight"] <= cfg.in_flight


def test_memory_holds_only_what_is_in_flight() -> None:
    taken = done = most = 0

    def source() -> Iterator[int]:
        nonlocal taken
        for number in range(300):
            taken += 1
            yield number

    async def work(_: int, __: int, turn: utils.Turn) -> None:
        nonlocal done, most
        most = max(most, taken - done)
        await asyncio.sleep(0)
        turn.end()
        await asyncio.sleep(0)
        done += 1

    slots = utils.slots_of(Config(), [VlmServer(Config(), print)])
    asyncio.run(utils.image_by_image(source(), int, work, slots))
    assert done == 300
    assert most < 6


def test_the_first_error_ends_all_slots() -> None:
    async def work(item: int, _: int, __: utils.Turn) -> None:
        if item == 3:
            raise PipelineError("three")
        await asyncio.sleep(0)

    cfg = Config(server_parallel=2)
    slots = utils.slots_of(cfg, [VlmServer(cfg, print)])
    with pytest.raises(PipelineError, match="three"):
        utils.run_async(utils.image_by_image(range(10**9), int, work, slots))


def test_an_idle_slot_takes_questions_of_an_image_that_has_many_left(
    picture: PreparedImage,
) -> None:
    with FakeOllama(
        num_parallel=2, time_model="gpu", time_scale=0.01, load_s=0
    ) as fake:
        cfg = knobs(fake, "--server-parallel", "2")

        async def work(server: VlmServer) -> list[Answer | None]:
            book = utils.AnswerBook(None, cfg, await server.preflight())
            asked, answers = utils.questions("object", 30), book.of(picture)

            async def one(_: int, __: int, turn: utils.Turn) -> None:
                await utils.ask(picture, asked, answers, turn)

            slots = utils.slots_of(cfg, [server])
            await utils.image_by_image([0], int, one, slots)
            return [answers.chosen(question) for question in asked]

        assert all(ask(cfg, work))
        stats = fake.stats()
    assert stats["max_slots_busy"] == 2
    assert stats["encodes"] == 2
    assert all(asked["asked"] == 1 for asked in stats["asked"] if asked["prompt"])


# --- Something else answers ---------------------------------------------------------


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes no certificate")
def test_a_certificate_that_nobody_has_signed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = str(tmp_path / "both.pem")
    made = ["-newkey", "rsa:2048", "-subj", "/CN=localhost", "-keyout", pem]
    made += ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", *made, "-out", f"{pem}.crt"],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{pem}.crt", pem)

    async def main() -> None:
        def hang_up(_: object, writer: asyncio.StreamWriter) -> None:
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=context)
        async with server:
            port = server.sockets[0].getsockname()[1]
            cfg = parse_config(2, "", server_flags(f"https://localhost:{port}"))[0]
            async with utils.open_servers(cfg, print) as [one]:
                await one.preflight()

    with pytest.raises(PipelineError, match=r"certificate is not trusted.*SSL_CERT"):
        utils.run_async(main())
    monkeypatch.setenv("SSL_CERT_FILE", f"{pem}.crt")
    with pytest.raises(PipelineError, match="no Ollama answers") as caught:
        utils.run_async(main())
    assert "certificate" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("html_403", r"HTTP 403.*NO_PROXY"),
        ("unauthorized", r"HTTP 401.*OLLAMA_API_KEY"),
        ("redirect", r"HTTP 301: http://127\.0\.0\.1:9/ollama.*--host"),
        ("html_502", r"HTTP 502.*ollama serve"),
    ],
)
def test_what_is_not_ollama_is_named_by_its_status_and_remedy(
    fake: FakeOllama, fault: str, words: str
) -> None:
    rule = {"endpoint": "/api/version", "when": 1, "times": 9}
    fake.control(script=[{**rule, "fault": fault}])
    with pytest.raises(PipelineError, match=words):
        preflight(knobs(fake))


def test_a_redirect_of_a_later_request_names_the_new_address(fake: FakeOllama) -> None:
    rule = {"endpoint": "/api/show", "when": 1, "times": 9}
    fake.control(script=[{**rule, "fault": "redirect"}])
    with pytest.raises(
        PipelineError, match=r"301: http://127\.0\.0\.1:9/ollama.*--host"
    ):
        preflight(knobs(fake))


def test_a_key_goes_with_every_request(
    fake: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.control(authorization="Bearer secret")
    monkeypatch.setenv("OLLAMA_API_KEY", "secret")
    assert preflight(knobs(fake)).vlm_digest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1080"),
        ("NO_PROXY", "localhost,[::1]"),
        ("SSL_CERT_FILE", "/nowhere/cacert.pem"),
        ("OLLAMA_HOST", '"127.0.0.1:1"'),
    ],
)
def test_settings_of_other_programs_do_not_stop_the_client_from_loading(
    name: str, value: str
) -> None:
    code = "import sys, utils; utils._ollama(); print('there')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, name: value},
        cwd=Path(utils.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "there\n", done.stderr


# --- What changes during a run ------------------------------------------------------


def told_by_a_check(fake: FakeOllama, **change: object) -> list[str]:
    lines: list[str] = []

    async def work(server: VlmServer) -> None:
        await server.preflight()
        lines.clear()
        fake.control(**change)
        await server.check_unchanged()
        await server.check_unchanged()

    ask(knobs(fake), work, lines.append)
    return lines


def test_a_vlm_that_leaves_the_gpu_is_said_once(fake: FakeOllama) -> None:
    lines = told_by_a_check(fake, vram=0.1)
    assert len(lines) == 1
    assert "10% of demo-vlm is on the GPU, it was 100%" in lines[0]


def test_a_new_version_of_the_server_is_said_once(fake: FakeOllama) -> None:
    lines = told_by_a_check(fake, version="0.99.0")
    assert len(lines) == 1
    assert "is 0.99.0 now, was 0.33" in lines[0]


@pytest.mark.parametrize("gone", ["demo-vlm", "demo-embed"])
def test_a_model_removed_during_a_run_comes_with_its_pull_command(
    fake: FakeOllama, gone: str
) -> None:
    models = tuple(name for name in ("demo-vlm", "demo-embed") if name != gone)
    with pytest.raises(PipelineError, match=rf"removed.*`ollama pull {gone}`"):
        told_by_a_check(fake, models=models)


def test_other_models_in_memory_do_not_make_both_seem_too_large(
    fake: FakeOllama,
) -> None:
    fake.control(resident=("another:7b",), max_loaded=3)
    assert preflight(knobs(fake)).both_loaded
