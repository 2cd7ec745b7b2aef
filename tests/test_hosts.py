"""Several servers, or Dask workers: the same arrays, and the loss of one is none."""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import gettempdir
from types import SimpleNamespace
from typing import Any

import dask
import distributed
import httpx
import phantoms
import psutil
import pytest
from conftest import TEST, server_flags
from fake_ollama import FakeOllama

import config
import fase2_generar_vectores_vlm as fase2
import fase3_entrenamiento_svc as fase3
import fase4_inferencia_vlm as fase4
import utils
from config import Config

ROOT = Path(__file__).resolve().parents[1]
ARRAYS = (config.DATASET_X, config.DATASET_Y, config.DATASET_ROWS)
SLOW: dict[str, Any] = {"time_model": "gpu", "time_scale": 0.02, "load_s": 0.0}
PER_IMAGE, PER_CLASS = 5, 3
QUESTIONS = PER_IMAGE * PER_CLASS * len(phantoms.LABELS)


def flags(*servers: FakeOllama) -> list[str]:
    return server_flags(",".join(server.url for server in servers))


def sighted(*servers: FakeOllama) -> list[str]:
    return [flag for flag in flags(*servers) if flag != "--no-sight-test"]


def phase2(base: Path, asked: Sequence[str], *more: str) -> int:
    descriptions = ["--descriptions", str(PER_IMAGE)]
    return fase2.main(["--base", str(base), *asked, *descriptions, *more])


def arrays(base: Path) -> list[bytes]:
    return [(base / "dataset_final_vlm" / name).read_bytes() for name in ARRAYS]


def asked_of(*servers: FakeOllama) -> list[tuple[str, int]]:
    """Every question that came, with its seed; the sight test's are random."""
    return [
        (one["image"], one["seed"])
        for server in servers
        for one in server.stats()["asked"]
        if one["prompt"]
        for _ in range(one["asked"])
    ]


@pytest.fixture
def three() -> Iterator[list[FakeOllama]]:
    """Stand-ins that take some 20 ms an answer, so that each gets an image."""
    with ExitStack() as opened:
        yield [opened.enter_context(FakeOllama(**SLOW)) for _ in range(3)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of one server, its model, and three new images, two of them alike."""
    base = tmp_path_factory.mktemp("one")
    for label in phantoms.LABELS:
        for seed in range(PER_CLASS):
            path = base / "datos_etiquetados" / label / f"{label}{seed}.dcm"
            phantoms.write(phantoms.exposure(label, seed, side=64), path)
    for name in ("a.dcm", "b.dcm", "c.dcm"):
        new = phantoms.exposure("TOR", 77 + (name == "c.dcm"), side=64)
        phantoms.write(new, base / "new" / name)
    with FakeOllama() as fake:
        assert phase2(base, flags(fake)) == 0
    assert fase3.main(["--base", str(base), "--quiet"]) == 0
    return base


@pytest.fixture
def expected(trained: Path) -> list[bytes]:
    """The arrays of one server."""
    return arrays(trained)


@pytest.fixture
def base(trained: Path, tmp_path: Path) -> Path:
    """A folder with the same images, and nothing made of them."""
    name = "datos_etiquetados"
    shutil.copytree(trained / name, tmp_path / name)
    return tmp_path


# --- Several servers ----------------------------------------------------------------


def test_three_servers_make_the_bytes_of_one(
    three: list[FakeOllama],
    base: Path,
    expected: list[bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert phase2(base, flags(*three)) == 0
    assert arrays(base) == expected
    counts = [len(asked_of(server)) for server in three]
    assert all(counts)
    assert sum(counts) == QUESTIONS
    said = capsys.readouterr().out
    for server, count in zip(three, counts, strict=True):
        assert f"{server.url}: {count} answers, 0." in said


def test_a_server_named_twice_is_one(
    fake: FakeOllama, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phase2(base, flags(fake, fake)) == 0
    assert "answers, 0." not in capsys.readouterr().out


def test_ollama_host_may_name_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "one, two:99,")
    urls = [utils.server_url(cfg) for cfg in Config().one_per_host()]
    assert urls == ["http://one:11434", "http://two:99"]


def test_every_server_elsewhere_is_named() -> None:
    warning = utils.distance_warning(Config(host="localhost,https://a,192.0.2.1:9"))
    assert warning == (
        "the images leave this machine for https://a:443 and http://192.0.2.1:9, "
        "unencrypted"
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"digests": {"demo-vlm": "f" * 64}}, "has another demo-vlm"),
        ({"digests": {"demo-embed": "f" * 64}}, "has another demo-embed"),
        ({"other_engine": True}, r"embeds otherwise \(cosine 0\.[89]"),
        ({"models": ("demo-vlm",)}, "demo-embed is not on the server"),
    ],
)
def test_a_server_that_differs_stops_the_run_before_the_first_question(
    fake: FakeOllama,
    base: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    reason: str,
) -> None:
    with FakeOllama(**settings) as other:
        assert phase2(base, flags(fake, other)) == 2
        assert not asked_of(fake, other)
    error = caplog.records[-1].getMessage()
    assert re.search(f"{re.escape(other.url)}.* {reason}|{reason}.*{other.url}", error)
    assert "--any-host" in error


def test_with_any_host_the_others_do_the_work(
    three: list[FakeOllama],
    base: Path,
    expected: list[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with FakeOllama(other_engine=True) as other:
        assert phase2(base, flags(three[0], other, three[1]), "--any-host") == 0
        assert not asked_of(other)
        assert f"goes on without {other.url}" in caplog.text
    assert arrays(base) == expected


def test_with_any_host_the_odd_one_out_is_left_out_though_named_first(
    three: list[FakeOllama], base: Path, expected: list[bytes]
) -> None:
    with FakeOllama(digests={"demo-vlm": "f" * 64}) as other:
        assert phase2(base, flags(other, *three[:2]), "--any-host") == 0
        assert not asked_of(other)
    assert arrays(base) == expected


def test_with_any_host_the_one_that_answered_before_goes_on(
    three: list[FakeOllama], base: Path
) -> None:
    assert phase2(base, flags(three[0])) == 0
    before = len(asked_of(three[0]))
    with FakeOllama(digests={"demo-vlm": "f" * 64}) as other:
        assert phase2(base, flags(other, three[0]), "--any-host") == 0
        assert len(asked_of(other, three[0])) == before


def test_a_server_started_anew_that_embeds_otherwise_stops_the_run(
    three: list[FakeOllama], base: Path, expected: list[bytes]
) -> None:
    """Its version and its digests are what they were."""
    restart = {"endpoint": "/api/chat", "when": 4, "fault": "reset"}
    three[1].control(script=[restart], other_engine=False)

    def replace() -> None:
        wait_for(lambda: len(asked_of(three[1])) >= 4)
        three[1].control(other_engine=True)

    with meanwhile(replace):
        assert phase2(base, flags(*three)) == 2
    three[1].control(other_engine=False)
    assert phase2(base, flags(*three)) == 0
    assert arrays(base) == expected


def test_a_blind_server_stops_the_run_by_its_name(
    three: list[FakeOllama], base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    three[1].control(faults={"blind": 1.0})
    assert phase2(base, sighted(*three)) == 2
    assert f"slot 1 of the server at {three[1].url}" in caplog.text
    assert len(asked_of(*three)) == 3 * TEST


def test_with_any_host_a_blind_server_gets_no_image(
    three: list[FakeOllama],
    base: Path,
    expected: list[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    three[1].control(faults={"blind": 1.0})
    assert phase2(base, sighted(*three), "--any-host") == 0
    assert f"goes on without {three[1].url}: slot 1" in caplog.text
    assert len(asked_of(three[1])) == TEST
    assert arrays(base) == expected


def test_a_server_that_dies_leaves_its_images_to_the_others(
    three: list[FakeOllama], base: Path, expected: list[bytes]
) -> None:
    three[1].control(script=[("/api/chat", 5, "refuse", 600.0)])
    assert phase2(base, flags(*three)) == 0
    assert arrays(base) == expected
    assert QUESTIONS <= len(asked_of(*three)) <= QUESTIONS + 2  # what was in flight


@pytest.mark.parametrize("away", [1, 2])
def test_servers_that_return_are_waited_for_and_take_images_again(
    three: list[FakeOllama], base: Path, expected: list[bytes], away: int
) -> None:
    for server in three[2 - away : 2]:
        server.control(script=[("/api/chat", 3, "refuse", 0.2)])
    assert phase2(base, flags(*three[:2])) == 0
    assert arrays(base) == expected
    assert len(asked_of(three[1])) > 4


def test_all_servers_away_for_longer_than_wait_stop_the_run(
    three: list[FakeOllama], base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for server in three:
        server.control(script=[("/api/chat", 5, "refuse", 600.0)])
    assert phase2(base, flags(*three), "--wait", "0.1") == 2
    assert "has not answered for" in caplog.text
    assert "every answer so far is kept" in caplog.text


def test_a_model_replaced_on_one_server_takes_back_only_its_own_answers(
    three: list[FakeOllama], base: Path
) -> None:
    three[1].control(script=[{"endpoint": "/api/chat", "when": 4, "fault": "digest"}])
    assert phase2(base, flags(*three[:2])) == 2
    folder = base / "dataset_final_vlm" / config.JOURNAL_DIR
    kept = [
        one["server"]
        for path in folder.glob("?" * 64 + ".jsonl")
        for _, one in utils.Journal(path).items()
        if "prompt" in one
    ]
    assert set(kept) == {three[0].url}


def test_phase_4_finishes_an_image_whose_server_died(
    three: list[FakeOllama],
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    three[1].control(script=[("/api/chat", 3, "refuse", 600.0)])
    assert phase4(trained, tmp_path, flags(*three[:2])) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(one["descriptions"]) for one in lines] == [10, 10, 10]
    assert lines[0]["descriptions"] == lines[1]["descriptions"]
    assert 20 <= len(asked_of(*three)) <= 22
    assert f"{three[1].url}: " in caplog.text


def phase4(trained: Path, journal: Path, asked: Sequence[str]) -> int:
    """Ask all questions about the new images, with a journal of one's own."""
    where = ["--base", str(trained), "--dataset-dir", str(journal)]
    return fase4.main([*where, *asked, "--ask-all", "--json", str(trained / "new")])


# --- Dask ---------------------------------------------------------------------------


@contextmanager
def program(*words: object, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program that ends with the block."""
    with subprocess.Popen(
        [sys.executable, *map(str, words)],
        env={**os.environ, **environment},
        cwd=gettempdir(),  # not the program's folder
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def client_of(base: Path, *asked: str) -> Any:
    """Phase 2 in a process of its own."""
    script = ROOT / "fase2_generar_vectores_vlm.py"
    return program(script, "--base", base, *asked, "--descriptions", PER_IMAGE)


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def worker(scheduler: str, url: str, folder: Path = ROOT) -> Any:
    """A worker without nanny, that is not started again when it dies."""
    words = ["-m", "distributed.cli.dask_worker", scheduler, "--no-nanny"]
    given = {"OLLAMA_HOST": url, "PYTHONPATH": str(folder)}
    return program(*words, "--no-dashboard", **given)


class Cluster(SimpleNamespace):
    """A scheduler that does not have the program, and two workers that have it."""

    address: str
    servers: list[FakeOllama]
    workers: list[subprocess.Popen[bytes]]

    @property
    def flags(self) -> list[str]:
        return [*server_flags("")[2:], "--dask", self.address]

    def wait_for_workers(self, count: int) -> None:
        connect: Any = distributed.Client
        with connect(self.address) as client:
            wait_for(lambda: len(client.nthreads()) == count)


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    file = tmp_path_factory.mktemp("dask") / "scheduler.json"
    words = ["--port", "0", "--no-dashboard", "--scheduler-file", file]
    with ExitStack() as opened:
        servers = [opened.enter_context(FakeOllama(**SLOW)) for _ in range(2)]
        opened.enter_context(program("-m", "distributed.cli.dask_scheduler", *words))
        wait_for(file.exists)
        address = json.loads(file.read_text())["address"]
        workers = [opened.enter_context(worker(address, one.url)) for one in servers]
        cluster = Cluster(address=address, servers=servers, workers=workers)
        cluster.wait_for_workers(2)
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """The shared one; its servers have forgotten what they were asked."""
    for server in shared_cluster.servers:
        server.control(reset_stats=True)
    return shared_cluster


def test_phase_4_asks_dask_workers(
    cluster: Cluster,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert phase4(trained, tmp_path, cluster.flags) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(one["descriptions"]) for one in lines] == [10, 10, 10]
    assert len(asked_of(*cluster.servers)) == 20


def test_a_killed_client_of_dask_goes_on_where_it_was(
    cluster: Cluster, base: Path, expected: list[bytes]
) -> None:
    with client_of(base, *cluster.flags):
        wait_for(lambda: len(asked_of(*cluster.servers)) > 12)
    assert phase2(base, cluster.flags) == 0
    assert arrays(base) == expected
    in_flight = 2 * 2
    assert QUESTIONS <= len(asked_of(*cluster.servers)) <= QUESTIONS + in_flight


def test_a_worker_with_another_version_of_the_program_is_refused(
    cluster: Cluster,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(config, "PROGRAM_VERSION", "0.1")
    assert phase2(base, cluster.flags) == 2
    assert re.search(r"has version \d.*, not 0\.1\).*--any-host", caplog.text)


def test_a_worker_without_the_program_is_told_how_to_get_it(
    cluster: Cluster,
    base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with worker(cluster.address, "x", folder=tmp_path):
        cluster.wait_for_workers(3)
        assert phase2(base, cluster.flags) == 2
    cluster.wait_for_workers(2)
    assert "No module named 'utils'" in caplog.text
    assert "set its PYTHONPATH to the program's folder" in caplog.text
    assert not asked_of(*cluster.servers)


def test_a_worker_without_nanny_that_is_killed_leaves_its_images_to_the_others(
    cluster: Cluster, base: Path, expected: list[bytes]
) -> None:
    one, other = cluster.servers

    def kill() -> None:
        wait_for(lambda: len(asked_of(other)) >= 3)
        cluster.workers[1].kill()
        cluster.workers[1].wait()

    with meanwhile(kill):
        assert phase2(base, cluster.flags) == 0
    assert arrays(base) == expected
    assert len(asked_of(one)) > len(asked_of(other))
    assert len(asked_of(one, other)) <= QUESTIONS + 2  # what was in flight


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


def test_local_workers_make_the_bytes_of_one_server_though_one_is_killed(
    three: list[FakeOllama], base: Path, expected: list[bytes]
) -> None:
    servers = three[:2]

    def kill() -> None:
        wait_for(lambda: all(len(asked_of(server)) >= 3 for server in servers))
        children = psutil.Process().children(recursive=True)
        next(one for one in children if "spawn_main" in "".join(one.cmdline())).kill()

    with meanwhile(kill):
        assert phase2(base, [*flags(*servers), "--dask", "local:2"]) == 0
    assert arrays(base) == expected
    assert len(asked_of(*servers)) <= QUESTIONS + 2  # what was in flight


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (["tcp://127.0.0.1:9"], "no Dask scheduler answers at tcp://127.0.0.1:9"),
        (["tcp://127.0.0.1:9", "--host", "there"], "leave --host out"),
        (["local:1", "--host", "one,two"], "2 servers need --dask local:2"),
    ],
)
def test_what_stands_in_the_way_of_dask_is_one_line(
    base: Path,
    asked: list[str],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(utils, "CONNECT_S", 0.5)
    assert phase2(base, ["--dask", *asked]) == 2
    assert error in caplog.text


@pytest.mark.parametrize("local", [True, False])
def test_where_dask_requires_tls_the_line_says_so(
    base: Path, local: bool, caplog: pytest.LogCaptureFixture
) -> None:
    address = "local:1" if local else "tcp://127.0.0.1:9"
    required: Any = dask.config.set({"distributed.comm.require-encryption": True})
    with required:
        assert phase2(base, ["--dask", address]) == 2
    assert "both use TLS or neither" in caplog.text


def test_what_listens_but_is_no_scheduler_is_given_up(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(utils, "CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        assert phase2(base, ["--dask", address]) == 2
    assert f"no Dask scheduler answers at {address}" in caplog.text


def test_without_dask_the_line_says_how_to_install_it(
    fake: FakeOllama,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert phase2(base, [*flags(fake), "--dask", "local:2"]) == 2
    assert "pip install '.[cluster]'" in caplog.text


def test_a_killed_client_goes_on_where_it_was(
    three: list[FakeOllama], base: Path, expected: list[bytes]
) -> None:
    with client_of(base, *flags(*three)):
        wait_for(lambda: len(asked_of(*three)) > 12)
    assert phase2(base, flags(*three)) == 0
    assert arrays(base) == expected
    in_flight = 3 * 2
    assert QUESTIONS <= len(asked_of(*three)) <= QUESTIONS + in_flight


def test_dask_is_not_imported_unless_it_is_asked_for() -> None:
    words = "import sys, fase2_generar_vectores_vlm, fase4_inferencia_vlm; "
    words += "sys.exit('distributed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, check=False)
    assert done.returncode == 0


class Actor(SimpleNamespace):
    """What a worker's actor looks like from here."""

    lost = False

    async def who(self) -> tuple[str, str]:
        return config.PROGRAM_VERSION, "a server"

    async def says(self, *_: object) -> tuple[int, str, bytes]:
        if self.lost:
            raise RuntimeError("Worker holding Actor was lost")
        return 200, "", b"{}"


async def other_workers() -> dict[str, int]:
    return {"tcp://another:1": 1}


async def submit(*_: object, **__: object) -> Actor:
    return Actor()


ASKED = httpx.Request("GET", "http://dask/api/ps")


def test_another_worker_of_the_same_server_takes_the_place_of_a_lost_one() -> None:
    async def twice() -> int:
        client = SimpleNamespace(status="running", nthreads=other_workers)
        client.submit = submit
        way = utils.DaskWay(client, "a server", Actor(lost=True))
        with pytest.raises(httpx.ConnectError, match="lost"):
            await way.handle_async_request(ASKED)
        status: int = (await way.handle_async_request(ASKED)).status_code
        return status

    assert asyncio.run(twice()) == 200


def test_a_scheduler_that_left_ends_the_run() -> None:
    gone = SimpleNamespace(status="closed")
    way = utils.DaskWay(gone, "a server", Actor(lost=True))
    with pytest.raises(utils.PipelineError, match=r"scheduler left.*same command"):
        asyncio.run(way.handle_async_request(ASKED))
