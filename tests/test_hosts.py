"""Several servers, or Dask workers: the same arrays, and the loss of one is none."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import phantoms
import psutil
import pytest
from conftest import LabelFolder, server_flags
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
PER_IMAGE = 5


@pytest.fixture
def three() -> Iterator[list[FakeOllama]]:
    """Stand-ins that take some 20 ms an answer, so that each gets an image."""
    with ExitStack() as opened:
        yield [opened.enter_context(FakeOllama(**SLOW)) for _ in range(3)]


def flags(*servers: FakeOllama) -> list[str]:
    return server_flags(",".join(server.url for server in servers))


def sighted(*servers: FakeOllama) -> list[str]:
    return [flag for flag in flags(*servers) if flag != "--no-sight-test"]


def phase2(base: Path, asked: Sequence[str], *more: str) -> int:
    descriptions = ["--descriptions", str(PER_IMAGE)]
    return fase2.main(["--base", str(base), *asked, *descriptions, *more])


def arrays(base: Path) -> list[bytes]:
    return [(base / "dataset_final_vlm" / name).read_bytes() for name in ARRAYS]


def asked_of(server: FakeOllama) -> list[tuple[str, int]]:
    """Every question that came, with its seed; the sight test's are random."""
    return [
        (one["image"], one["seed"])
        for one in server.stats()["asked"]
        if one["prompt"]
        for _ in range(one["asked"])
    ]


@pytest.fixture
def expected(fake: FakeOllama, labelled: LabelFolder, tmp_path: Path) -> list[bytes]:
    """The arrays of one server."""
    base = labelled(tmp_path / "one", per_class=3)
    assert phase2(base, flags(fake)) == 0
    return arrays(base)


# --- Several servers ----------------------------------------------------------------


def test_three_servers_make_the_bytes_of_one(
    three: list[FakeOllama],
    labelled: LabelFolder,
    tmp_path: Path,
    expected: list[bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = labelled(tmp_path / "three", per_class=3)
    assert phase2(base, flags(*three)) == 0
    assert arrays(base) == expected
    counts = [len(asked_of(server)) for server in three]
    assert all(counts)
    assert sum(counts) == 9 * PER_IMAGE
    said = capsys.readouterr().out
    for server, count in zip(three, counts, strict=True):
        assert f"{server.url}: {count} answers, 0." in said


def test_a_server_named_twice_is_one(
    fake: FakeOllama, labelled: LabelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phase2(labelled(per_class=1), flags(fake, fake)) == 0
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
    three: list[FakeOllama],
    labelled: LabelFolder,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    reason: str,
) -> None:
    base = labelled(per_class=1)
    with FakeOllama(**settings) as other:
        assert phase2(base, flags(*three[:2], other)) == 2
        assert other.url in caplog.records[-1].getMessage()
        assert not any(asked_of(server) for server in (*three, other))
    error = caplog.records[-1].getMessage()
    assert re.search(reason, error)
    assert "--any-host" in error


def test_with_any_host_the_others_do_the_work(
    three: list[FakeOllama],
    labelled: LabelFolder,
    tmp_path: Path,
    expected: list[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = labelled(tmp_path / "three", per_class=3)
    with FakeOllama(other_engine=True) as other:
        assert phase2(base, flags(three[0], other, three[1]), "--any-host") == 0
        assert not asked_of(other)
        assert f"goes on without {other.url}" in caplog.text
    assert arrays(base) == expected


def test_a_blind_server_stops_the_run_by_its_name(
    three: list[FakeOllama], labelled: LabelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    three[1].control(faults={"blind": 1.0})
    assert phase2(labelled(per_class=1), sighted(*three)) == 2
    assert f"slot 1 of the server at {three[1].url}" in caplog.text
    assert sum(len(asked_of(server)) for server in three) == 3 * 6


def test_with_any_host_a_blind_server_gets_no_image(
    three: list[FakeOllama],
    labelled: LabelFolder,
    tmp_path: Path,
    expected: list[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = labelled(tmp_path / "three", per_class=3)
    three[1].control(faults={"blind": 1.0})
    assert phase2(base, sighted(*three), "--any-host") == 0
    assert f"goes on without {three[1].url}: slot 1" in caplog.text
    assert len(asked_of(three[1])) == 6
    assert arrays(base) == expected


def test_a_server_that_dies_leaves_its_images_to_the_others(
    three: list[FakeOllama],
    labelled: LabelFolder,
    tmp_path: Path,
    expected: list[bytes],
) -> None:
    base = labelled(tmp_path / "three", per_class=3)
    three[1].control(script=[("/api/chat", 5, "refuse", 600.0)])
    assert phase2(base, flags(*three)) == 0
    assert arrays(base) == expected
    asked = [one for server in three for one in asked_of(server)]
    assert 9 * PER_IMAGE <= len(asked) <= 9 * PER_IMAGE + 2  # what was in flight


def test_a_server_that_returns_takes_images_again(
    three: list[FakeOllama],
    labelled: LabelFolder,
    tmp_path: Path,
    expected: list[bytes],
) -> None:
    base = labelled(tmp_path / "three", per_class=3)
    three[1].control(script=[("/api/chat", 3, "refuse", 0.2)])
    assert phase2(base, flags(*three[:2])) == 0
    assert arrays(base) == expected
    assert len(asked_of(three[1])) > 4


def test_all_servers_away_are_waited_for(
    three: list[FakeOllama],
    labelled: LabelFolder,
    tmp_path: Path,
    expected: list[bytes],
) -> None:
    base = labelled(tmp_path / "three", per_class=3)
    for server in three:
        server.control(script=[("/api/chat", 5, "refuse", 0.5)])
    assert phase2(base, flags(*three)) == 0
    assert arrays(base) == expected


def test_all_servers_away_for_longer_than_wait_stop_the_run(
    three: list[FakeOllama], labelled: LabelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    base = labelled(per_class=3)
    for server in three:
        server.control(script=[("/api/chat", 5, "refuse", 600.0)])
    assert phase2(base, flags(*three), "--wait", "0.1") == 2
    assert "has not answered for" in caplog.text
    assert "every answer so far is kept" in caplog.text


def test_a_model_replaced_on_one_server_takes_back_only_its_own_answers(
    three: list[FakeOllama], labelled: LabelFolder, tmp_path: Path
) -> None:
    base = labelled(tmp_path, per_class=3)
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


@pytest.fixture
def trained(fake: FakeOllama, labelled: LabelFolder, tmp_path: Path) -> Path:
    """A base folder with a model; and three new images, two of the same pixels."""
    base = labelled(tmp_path / "one", per_class=3)
    assert phase2(base, flags(fake)) == 0
    for name in ("a.dcm", "b.dcm", "c.dcm"):
        new = phantoms.exposure("TOR", 77 + (name == "c.dcm"), side=64)
        phantoms.write(new, tmp_path / "new" / name)
    assert fase3.main(["--base", str(base), "--quiet"]) == 0
    return base


def test_phase_4_finishes_an_image_whose_server_died(
    three: list[FakeOllama],
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    three[1].control(script=[("/api/chat", 3, "refuse", 600.0)])
    where = ["--base", str(trained), *flags(*three[:2])]
    assert fase4.main([*where, "--ask-all", "--json", str(tmp_path / "new")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(one["descriptions"]) for one in lines] == [10, 10, 10]
    assert lines[0]["descriptions"] == lines[1]["descriptions"]
    asked = [one for server in three for one in asked_of(server)]
    assert 20 <= len(asked) <= 22
    assert f"{three[1].url}: " in caplog.text


# --- Dask ---------------------------------------------------------------------------


@pytest.fixture
def in_a_process(
    tmp_path: Path,
) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start programs that end with the test."""
    with ExitStack() as started:

        def start(*words: object, **environment: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                env={**os.environ, **environment},
                cwd=tmp_path,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            started.callback(process.wait)
            started.callback(process.kill)
            return process

        yield start


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_dask_workers_make_the_bytes_of_one_server(
    three: list[FakeOllama],
    labelled: LabelFolder,
    tmp_path: Path,
    expected: list[bytes],
) -> None:
    base = labelled(tmp_path / "dask", per_class=3)
    assert phase2(base, [*flags(*three[:2]), "--dask", "local:2"]) == 0
    assert arrays(base) == expected
    assert all(asked_of(server) for server in three[:2])


def test_a_worker_with_nanny_that_is_killed_costs_what_was_in_flight(
    three: list[FakeOllama],
    labelled: LabelFolder,
    tmp_path: Path,
    expected: list[bytes],
) -> None:
    base = labelled(tmp_path / "dask", per_class=3)

    def kill() -> None:
        wait_for(lambda: all(len(asked_of(server)) >= 3 for server in three[:2]))
        local_workers()[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    assert phase2(base, [*flags(*three[:2]), "--dask", "local:2"]) == 0
    killer.join()
    assert arrays(base) == expected
    asked = [one for server in three for one in asked_of(server)]
    # Three were in flight; Dask may begin them once more on the new worker.
    assert len(asked) <= 9 * PER_IMAGE + 2 * 3


def local_workers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if any("spawn_main" in word for word in child.cmdline())
    ]


def test_a_worker_without_nanny_that_is_killed_leaves_its_images_to_the_others(
    three: list[FakeOllama],
    labelled: LabelFolder,
    tmp_path: Path,
    expected: list[bytes],
    in_a_process: Callable[..., subprocess.Popen[bytes]],
    scheduler: str,
) -> None:
    base = labelled(tmp_path / "dask", per_class=3)
    workers = [start_worker(in_a_process, scheduler, one.url) for one in three[:2]]

    def kill() -> None:
        wait_for(lambda: len(asked_of(three[1])) >= 3)
        workers[1].kill()

    killer = threading.Thread(target=kill)
    wait_for_workers(scheduler, 2)
    killer.start()
    assert phase2(base, [*no_host(), "--dask", scheduler]) == 0
    killer.join()
    assert arrays(base) == expected
    assert len(asked_of(three[0])) > len(asked_of(three[1]))
    asked = [one for server in three for one in asked_of(server)]
    assert len(asked) <= 9 * PER_IMAGE + 3  # what was in flight


def start_worker(
    start: Callable[..., subprocess.Popen[bytes]],
    scheduler: str,
    url: str,
    folder: str = str(ROOT),
) -> subprocess.Popen[bytes]:
    words = ["-m", "distributed.cli.dask_worker", scheduler, "--no-nanny"]
    words += ["--nthreads", "4", "--no-dashboard"]
    return start(*words, OLLAMA_HOST=url, PYTHONPATH=folder)


def no_host() -> list[str]:
    return server_flags("x")[2:]


@pytest.fixture
def scheduler(
    in_a_process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> str:
    """The address of a scheduler that does not have the program."""
    file = tmp_path / "scheduler.json"
    words = ["--port", "0", "--no-dashboard", "--scheduler-file", file]
    in_a_process("-m", "distributed.cli.dask_scheduler", *words)
    wait_for(file.exists)
    address: str = json.loads(file.read_text())["address"]
    return address


def wait_for_workers(scheduler: str, count: int) -> None:
    connect: Any = distributed.Client
    with connect(scheduler) as client:
        client.wait_for_workers(count, timeout=60)


def test_a_worker_without_the_program_is_told_how_to_get_it(
    fake: FakeOllama,
    labelled: LabelFolder,
    tmp_path: Path,
    in_a_process: Callable[..., subprocess.Popen[bytes]],
    scheduler: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    start_worker(in_a_process, scheduler, fake.url, folder=str(tmp_path))
    wait_for_workers(scheduler, 1)
    base = labelled(tmp_path / "dask", per_class=1)
    assert phase2(base, [*no_host(), "--dask", scheduler]) == 2
    assert "No module named 'utils'" in caplog.text
    assert "set its PYTHONPATH to the program's folder" in caplog.text
    assert not asked_of(fake)


def test_a_worker_with_another_version_of_the_program_is_refused(
    fake: FakeOllama,
    labelled: LabelFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(config, "PROGRAM_VERSION", "0.1")
    assert phase2(labelled(per_class=1), [*flags(fake), "--dask", "local:1"]) == 2
    assert re.search(r"has program \d.*, not 0\.1", caplog.text)


def test_no_scheduler_is_one_line(
    labelled: LabelFolder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = [*no_host(), "--dask", "tcp://127.0.0.1:9"]
    assert phase2(labelled(per_class=1), asked) == 2
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in caplog.text


def test_without_dask_the_line_says_how_to_install_it(
    fake: FakeOllama,
    labelled: LabelFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    base = labelled(per_class=1)
    assert phase2(base, [*flags(fake), "--dask", "local:2"]) == 2
    assert "pip install '.[cluster]'" in caplog.text
    assert phase2(base, flags(fake)) == 0


def test_a_killed_client_goes_on_where_it_was(
    three: list[FakeOllama],
    labelled: LabelFolder,
    tmp_path: Path,
    expected: list[bytes],
    in_a_process: Callable[..., subprocess.Popen[bytes]],
) -> None:
    base = labelled(tmp_path / "three", per_class=3)
    asked = [*flags(*three), "--descriptions", str(PER_IMAGE)]
    client = in_a_process(
        ROOT / "fase2_generar_vectores_vlm.py", "--base", base, *asked
    )
    wait_for(lambda: sum(len(asked_of(server)) for server in three) > 12)
    client.kill()
    client.wait()
    assert phase2(base, flags(*three)) == 0
    assert arrays(base) == expected
    in_flight = 3 * 2
    asked_in_all = sum(len(asked_of(server)) for server in three)
    assert 9 * PER_IMAGE <= asked_in_all <= 9 * PER_IMAGE + in_flight


def test_a_killed_client_of_dask_goes_on_where_it_was(
    three: list[FakeOllama],
    labelled: LabelFolder,
    tmp_path: Path,
    expected: list[bytes],
    in_a_process: Callable[..., subprocess.Popen[bytes]],
    scheduler: str,
) -> None:
    for one in three[:2]:
        start_worker(in_a_process, scheduler, one.url)
    wait_for_workers(scheduler, 2)
    base = labelled(tmp_path / "dask", per_class=3)
    asked = [*no_host(), "--dask", scheduler, "--descriptions", str(PER_IMAGE)]
    client = in_a_process(
        ROOT / "fase2_generar_vectores_vlm.py", "--base", base, *asked
    )
    wait_for(lambda: sum(len(asked_of(server)) for server in three) > 12)
    client.kill()
    client.wait()
    assert phase2(base, [*no_host(), "--dask", scheduler]) == 0
    assert arrays(base) == expected
    asked_in_all = sum(len(asked_of(server)) for server in three)
    assert 9 * PER_IMAGE <= asked_in_all <= 9 * PER_IMAGE + 2 * 3


def test_dask_is_not_imported_unless_it_is_asked_for() -> None:
    words = "import sys, fase2_generar_vectores_vlm, fase4_inferencia_vlm; "
    words += "sys.exit('distributed' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", words], cwd=ROOT, check=False).returncode
        == 0
    )


def test_a_scheduler_that_left_ends_the_run() -> None:
    way = utils.DaskWay(SimpleNamespace(status="closed"), "a server", ["a worker"])
    with pytest.raises(utils.PipelineError, match=r"scheduler left.*same command"):
        asyncio.run(way.run("own_server"))
