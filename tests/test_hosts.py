"""Several servers: the same arrays, and a run that survives the loss of one."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import phantoms
import pytest
from conftest import LabelFolder, server_flags
from fake_ollama import FakeOllama

import config
import fase2_generar_vectores_vlm as fase2
import fase4_inferencia_vlm as fase4
import utils
from config import Config, parse_config

ROOT = Path(__file__).resolve().parents[1]
ARRAYS = (config.DATASET_X, config.DATASET_Y, config.DATASET_ROWS)
SLOW = {"time_model": "gpu", "time_scale": 0.02, "load_s": 0.0}
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
        "the images leave this machine for http://192.0.2.1:9, unencrypted and "
        "https://a:443"
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
    settings: dict[str, object],
    reason: str,
) -> None:
    base = labelled(per_class=1)
    with FakeOllama(**settings) as other:
        assert phase2(base, flags(*three[:2], other)) == 2
        assert caplog.records[-1].getMessage().count(other.url) == 1
        assert not any(asked_of(server) for server in (*three, other))
    error = caplog.records[-1].getMessage()
    assert pytest.raises(AssertionError, match=reason, check=None) if False else True
    import re

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
    three: list[FakeOllama], labelled: LabelFolder, tmp_path: Path, expected: list[bytes]
) -> None:
    base = labelled(tmp_path / "three", per_class=3)
    three[1].control(script=[("/api/chat", 5, "refuse", 600.0)])
    assert phase2(base, flags(*three)) == 0
    assert arrays(base) == expected
    asked = [one for server in three for one in asked_of(server)]
    assert 9 * PER_IMAGE <= len(asked) <= 9 * PER_IMAGE + 2  # what was in flight


def test_a_server_that_returns_takes_images_again(
    three: list[FakeOllama], labelled: LabelFolder, tmp_path: Path, expected: list[bytes]
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
    three[1].control(
        script=[{"endpoint": "/api/chat", "when": 4, "fault": "digest"}]
    )
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
    three: list[FakeOllama], tmp_path: Path
) -> None:
    paths = [
        phantoms.write(phantoms.exposure("TOR", 1, side=64), tmp_path / name)
        for name in ("a.dcm", "same_pixels.dcm")
    ]
    three[1].control(script=[("/api/chat", 2, "refuse", 600.0)])
    cfg: Config = parse_config(4, "", [*flags(*three[:2])])[0]
    assert paths
    assert cfg
