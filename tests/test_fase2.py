"""Phase 2: the journal, the dataset, and what happens when things go wrong."""

import base64
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import phantoms
import pytest
from conftest import LabelFolder, server_flags
from dicom_samples import posix
from fake_ollama import FakeOllama

import config
import fase2_generar_vectores_vlm as fase2
import utils

SCRIPT = Path(fase2.__file__)
FEW = ("--descriptions", "5")
DATASET = (config.DATASET_X, config.DATASET_Y, config.DATASET_ROWS)


def phase2(base: Path, fake: FakeOllama, *more: str) -> int:
    return fase2.main(["--base", str(base), *server_flags(fake.url), *FEW, *more])


def folder_of(base: Path) -> Path:
    return base / "dataset_final_vlm"


def dataset_bytes(base: Path) -> list[bytes]:
    return [(folder_of(base) / name).read_bytes() for name in DATASET]


def rows_of(base: Path) -> list[dict[str, str]]:
    return utils.read_csv(folder_of(base) / config.DATASET_ROWS)


def rejected(base: Path) -> dict[str, str]:
    rows = utils.read_csv(folder_of(base) / config.REJECTED_LIST)
    return {Path(row["file"]).name: row["reason"] for row in rows}


def manifest_of(base: Path) -> dict[str, Any]:
    return utils.read_json(folder_of(base) / config.MANIFEST, "")


def chats(fake: FakeOllama) -> int:
    """Questions asked about an image; a load is asked without one."""
    return sum(asked["asked"] for asked in questions(fake))


def questions(fake: FakeOllama) -> list[dict[str, Any]]:
    return [asked for asked in fake.stats()["asked"] if asked["prompt"]]


# --- The dataset --------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, FakeOllama]]:
    """A dataset of six images and ten descriptions, and the server that said them."""
    base = tmp_path_factory.mktemp("made")
    for label, seed in itertools.product(phantoms.LABELS, range(2)):
        path = base / "datos_etiquetados" / label / f"{label}{seed}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        phantoms.write(phantoms.exposure(label, seed, side=64), path)
    before = files_of(base / "datos_etiquetados")
    with FakeOllama() as fake:
        assert phase2(base, fake, "--descriptions", "10") == 0
        assert files_of(base / "datos_etiquetados") == before
        yield base, fake


def files_of(folder: Path) -> list[tuple[Path, str, int]]:
    """Every file below a folder, with its digest and time."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path, utils.sha256_of(path), path.stat().st_mtime_ns) for path in paths]


def test_the_dataset_has_the_documented_shapes_dtypes_and_rows(
    made: tuple[Path, FakeOllama],
) -> None:
    base, _ = made
    x = np.load(folder_of(base) / config.DATASET_X)
    y = np.load(folder_of(base) / config.DATASET_Y)
    rows = rows_of(base)
    assert x.shape == (6 * 10, 256)
    assert x.dtype == np.float32
    assert y.shape == (60,)
    assert y.dtype.kind == "U"
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    assert tuple(rows[0]) == fase2.ROW_COLUMNS
    assert [row["class"] for row in rows] == list(y)
    assert [int(row["row"]) for row in rows] == list(range(60))


def test_rows_are_ordered_by_class_image_set_and_index(
    made: tuple[Path, FakeOllama],
) -> None:
    keys = [
        (row["class"], row["image_id"], row["prompt_set"], int(row["prompt_index"]))
        for row in rows_of(made[0])
    ]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)


def test_each_vector_is_the_embedding_of_its_rows_description(
    made: tuple[Path, FakeOllama],
) -> None:
    base, fake = made
    x = np.load(folder_of(base) / config.DATASET_X)
    for row in rows_of(base)[::7]:
        asked = {"model": "demo-embed", "input": row["description"]}
        reply = httpx.post(f"{fake.url}/api/embed", json=asked).json()
        assert np.allclose(x[int(row["row"])], reply["embeddings"][0], atol=1e-6)


def test_background_and_objects_are_asked_differently_and_all_generically(
    made: tuple[Path, FakeOllama],
) -> None:
    sets = Counter((row["class"], row["prompt_set"]) for row in rows_of(made[0]))
    assert sets == {
        ("FDT", "background"): 16,
        ("MTF", "object"): 16,
        ("TOR", "object"): 16,
        ("FDT", "generic"): 4,
        ("MTF", "generic"): 4,
        ("TOR", "generic"): 4,
    }


def test_the_manifest_says_with_what_the_dataset_was_made(
    made: tuple[Path, FakeOllama],
) -> None:
    manifest = manifest_of(made[0])
    assert manifest["conditions"]["vlm"] == "demo-vlm"
    assert len(manifest["conditions"]["vlm_digest"]) == 64
    assert manifest["counts"]["images_per_class"] == {"FDT": 2, "MTF": 2, "TOR": 2}
    assert manifest["prompts"]["generic"] == list(config.GENERIC_PROMPTS)
    for name, digest in manifest["sha256"].items():
        assert utils.sha256_of(folder_of(made[0]) / name) == digest


@pytest.mark.parametrize(("share", "sets"), [("0", {"object"}), ("1", {"generic"})])
def test_the_generic_share_can_be_nothing_or_all(
    fake: FakeOllama, labelled: LabelFolder, share: str, sets: set[str]
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake, "--generic-share", share)
    asked = {row["prompt_set"] for row in rows_of(base) if row["class"] == "MTF"}
    assert asked == sets


def test_a_class_of_any_name_is_described_as_an_object(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    (base / "datos_etiquetados" / "TOR").rename(base / "datos_etiquetados" / "Ñandú 7")
    assert phase2(base, fake) == 0
    sets = {r["prompt_set"] for r in rows_of(base) if r["class"] == "Ñandú 7"}
    assert sets == {"object", "generic"}


def test_images_may_lie_at_any_depth_below_their_class(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    deep = base / "datos_etiquetados" / "MTF" / "room 1" / "monday"
    deep.mkdir(parents=True)
    (base / "datos_etiquetados" / "MTF" / "MTF0.dcm").rename(deep / "MTF0.dcm")
    assert phase2(base, fake) == 0
    assert "MTF/room 1/monday/MTF0.dcm" in {row["file"] for row in rows_of(base)}


def test_slots_of_the_server_change_the_order_of_work_but_not_a_byte(
    labelled: LabelFolder, tmp_path: Path
) -> None:
    one, four = labelled(tmp_path / "one"), labelled(tmp_path / "four")
    with FakeOllama() as fake:
        phase2(one, fake)
    with FakeOllama(num_parallel=4) as fake:
        phase2(four, fake, "--server-parallel", "4")
    assert dataset_bytes(one) == dataset_bytes(four)


def test_both_ways_of_embedding_give_the_same_dataset(
    labelled: LabelFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    beside, after = (labelled(tmp_path / name, per_class=1) for name in "ab")
    with FakeOllama() as fake:
        phase2(beside, fake)
    with FakeOllama(max_loaded=1) as fake:
        phase2(after, fake)
        # Both, both once more to be sure, and the embedder at the end.
        assert fake.stats()["loads"] <= 5
    assert "is on the GPU, it was" not in caplog.text
    assert dataset_bytes(beside) == dataset_bytes(after)


@pytest.mark.parametrize(
    ("flags", "most"),
    [((), 2), (("--concurrency", "1"), 1), (("--concurrency", "3"), 3)],
)
def test_requests_in_flight_keep_to_their_bound_and_reach_it(
    labelled: LabelFolder, flags: Sequence[str], most: int
) -> None:
    with FakeOllama(time_model="gpu", time_scale=0.02, load_s=0.0) as fake:
        assert phase2(labelled(per_class=1), fake, *flags) == 0
        assert fake.stats()["max_in_flight"] == most


# --- Nothing asked twice ------------------------------------------------------------


def test_a_second_run_asks_nothing_and_changes_nothing(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    before, asked = dataset_bytes(base), chats(fake)
    embedded = fake.stats()["requests"]["/api/embed"]
    assert phase2(base, fake) == 0
    assert dataset_bytes(base) == before
    assert chats(fake) == asked
    # The probe and two more sentences, each alone and all together.
    assert fake.stats()["requests"]["/api/embed"] == embedded + 4


def test_renaming_or_moving_within_a_prompt_set_costs_no_call(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    asked = chats(fake)
    folder = base / "datos_etiquetados"
    (folder / "MTF" / "MTF0.dcm").rename(folder / "TOR" / "other.dcm")
    assert phase2(base, fake) == 0
    assert chats(fake) == asked
    assert manifest_of(base)["counts"]["images_per_class"] == {
        "FDT": 1,
        "TOR": 2,
    }


def test_moving_to_the_background_asks_only_the_other_prompts(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    asked = chats(fake)
    folder = base / "datos_etiquetados"
    (folder / "MTF" / "MTF0.dcm").rename(folder / "FDT" / "MTF0.dcm")
    phase2(base, fake)
    assert chats(fake) == asked + 4


def test_more_descriptions_ask_only_what_is_new(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    phase2(base, fake, "--descriptions", "10")
    assert chats(fake) == 30
    assert all(asked["asked"] == 1 for asked in questions(fake))


def test_a_changed_prompt_is_asked_again_alone(
    fake: FakeOllama, labelled: LabelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    asked = chats(fake)
    changed = {**config.PROMPT_SETS, "generic": ("What is this?",)}
    monkeypatch.setattr(config, "PROMPT_SETS", changed)
    phase2(base, fake)
    assert chats(fake) == asked + 3
    generic = [r for r in rows_of(base) if r["prompt_set"] == "generic"]
    assert {row["prompt"].split("?")[0] for row in generic} == {"What is this"}


@pytest.mark.parametrize(
    "change", [("--temperature", "0.5"), ("--num-predict", "99"), ("--num-ctx", "4096")]
)
def test_a_changed_option_asks_everything_again(
    fake: FakeOllama, labelled: LabelFolder, change: Sequence[str]
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    asked = chats(fake)
    phase2(base, fake, *change)
    assert chats(fake) == 2 * asked


def test_pictures_prepared_otherwise_are_asked_about_again(
    fake: FakeOllama, labelled: LabelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    asked = chats(fake)
    monkeypatch.setattr(config, "WINDOW_PERCENTILES", (5, 95))
    phase2(base, fake)
    assert chats(fake) == 2 * asked


def test_another_vlm_behind_the_same_name_asks_everything_again(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    asked = chats(fake)
    fake.control(digests={"demo-vlm": "e" * 64})
    assert phase2(base, fake) == 0
    assert chats(fake) == 2 * asked


def test_another_embedder_only_embeds_again(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    asked, embeds = chats(fake), fake.stats()["requests"]["/api/embed"]
    fake.control(digests={"demo-embed": "e" * 64})
    phase2(base, fake)
    assert chats(fake) == asked
    assert fake.stats()["requests"]["/api/embed"] > embeds + 1


def test_a_torn_last_line_of_the_journal_costs_one_answer(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    before, asked = dataset_bytes(base), chats(fake)
    for journal in (folder_of(base) / config.JOURNAL_DIR).glob("?*.jsonl"):
        lines = journal.read_bytes().splitlines(keepends=True)
        answers = [line for line in lines if b'"prompt"' in line]
        if not answers:
            continue
        journal.write_bytes(b"".join(answers[:-1]) + answers[-1][:40])
    assert phase2(base, fake) == 0
    assert dataset_bytes(base) == before
    assert chats(fake) == asked + 3


def spoil(base: Path, name: str, old: str, new: str) -> None:
    """Change a text in the lines of journals."""
    for path in (folder_of(base) / config.JOURNAL_DIR).glob(name):
        text = path.read_text(encoding="utf-8")
        assert re.search(old, text)
        path.write_text(re.sub(old, new, text), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("?" * 64 + ".jsonl", r'"vector": "..', '"vector": "~'),
        ("?" * 64 + ".jsonl", r'"vector": "....', '"vector": "'),
        ("?" * 64 + ".jsonl", r"\Z", '{"taken_back": 5}\n{"taken_back": [["x"]]}\n'),
        ("?" * 64 + ".jsonl", r"\Z", "[" * 100_000 + "\n"),
        ("servidores.jsonl", r'"probe": "..', '"probe": "~'),
        ("servidores.jsonl", r'"probe"', '"prob"'),
        ("servidores.jsonl", r"\Z", '{"key": "sight", "time": "2026-13-99"}\n'),
    ],
    ids=range(7),
)
def test_a_line_that_is_json_and_damaged_costs_no_question(
    fake: FakeOllama, labelled: LabelFolder, name: str, old: str, new: str
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    before, asked = dataset_bytes(base), chats(fake)
    spoil(base, name, old, new)
    assert phase2(base, fake) == 0
    assert dataset_bytes(base) == before
    assert chats(fake) == asked


def kill_after(base: Path, url: str, answers: int, fake: FakeOllama) -> None:
    """Start phase 2 and kill it once the server has given so many more answers."""
    target = chats(fake) + answers
    command = [sys.executable, str(SCRIPT), "--base", str(base), *server_flags(url)]
    with subprocess.Popen([*command, *FEW], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and chats(fake) < target:
            time.sleep(0.002)
        process.kill()


def journal_keys(base: Path) -> list[tuple[str, int]]:
    """Prompt and seed of every answer in the journals."""
    folder = folder_of(base) / config.JOURNAL_DIR
    paths = [path for path in folder.glob("*.jsonl") if len(path.stem) == 64]
    records = [record for path in paths for _, record in utils.Journal(path).items()]
    return [(r["prompt"], r["seed"]) for r in records if "prompt" in r]


def test_kills_at_random_moments_lose_and_repeat_nothing(
    labelled: LabelFolder, tmp_path: Path
) -> None:
    dice = random.Random(0)
    whole, killed = labelled(tmp_path / "whole"), labelled(tmp_path / "killed")
    with FakeOllama() as fake:
        phase2(whole, fake)
    with FakeOllama(time_model="gpu", time_scale=0.03, load_s=0.0) as fake:
        for _ in range(3):
            kept = journal_keys(killed) if folder_of(killed).exists() else []
            kill_after(killed, fake.url, dice.randrange(1, 8), fake)
            assert set(kept) <= set(journal_keys(killed))
            assert not (folder_of(killed) / config.MANIFEST).exists()
        kept, before = journal_keys(killed), chats(fake)
        assert phase2(killed, fake) == 0
        assert chats(fake) - before == 30 - len(kept)
        # What was in flight at a kill, two at the most, may be asked a second time.
        assert sum(asked["asked"] - 1 for asked in questions(fake)) <= 3 * 2
        assert {(a["prompt"], a["seed"]) for a in questions(fake) if a["answered"]} == {
            *journal_keys(killed)
        }
    assert len(journal_keys(killed)) == len(set(journal_keys(killed))) == 30
    assert dataset_bytes(whole) == dataset_bytes(killed)


@posix  # elsewhere only a console sends it
def test_ctrl_c_ends_with_130_and_one_line(
    labelled: LabelFolder,
) -> None:
    base = labelled()
    with FakeOllama(time_model="gpu", load_s=0.0) as fake:
        command = [sys.executable, str(SCRIPT), "--base", str(base)]
        with subprocess.Popen(
            [*command, *server_flags(fake.url)], stderr=subprocess.PIPE, text=True
        ) as process:
            while process.poll() is None and chats(fake) < 3:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert errors.splitlines()[-1].startswith("interrupted")


def test_a_second_process_on_the_same_folder_is_refused(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    with utils.lock(folder_of(base) / ".fase2.lock", "held"):
        assert phase2(base, fake) == 2
    assert phase2(base, fake) == 0


# --- Faults -------------------------------------------------------------------------

PASSING: tuple[str, ...] = (
    "busy",
    "crash",
    "oom",
    "load_fail",
    "nested_500",
    "eof",
    "html_200",
)
PASSING += ("html_502", "json_list", "cut", "reset", "drop", "refuse", "hang", "slow")
EMBEDDING: tuple[str, ...] = (
    "embed_eof",
    "embed_nan",
    "embed_nan_raw",
    "embed_null",
    "embed_zero",
)
EMBEDDING += ("embed_short", "embed_count", "embed_refused")
BAD_TEXTS = ("zero", "truncated", "empty", "whitespace", "loop", "length")


@pytest.fixture
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that hangs is given up after a second."""
    monkeypatch.setattr(utils, "ANSWER_S", 1.0)


def every(step: int, holds: str = "") -> Callable[[dict[str, Any]], bool]:
    """A rule of the stand-in: the calls `step`, 2 `step`, … whose body holds a text."""
    calls = itertools.count(1)

    def hit(body: dict[str, Any]) -> bool:
        return holds in json.dumps(body) and next(calls) % step == 0

    return hit


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The dataset of one image per class and a server that never fails."""
    base = tmp_path_factory.mktemp("plain")
    for label in phantoms.LABELS:
        path = base / "datos_etiquetados" / label / f"{label}0.dcm"
        path.parent.mkdir(parents=True)
        phantoms.write(phantoms.exposure(label, 0, side=64), path)
    with FakeOllama() as fake:
        assert phase2(base, fake) == 0
    return dataset_bytes(base)


@pytest.mark.usefixtures("_short_answers")
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_does_not_change_a_byte(
    fake: FakeOllama, labelled: LabelFolder, plain: list[bytes], fault: str
) -> None:
    base = labelled(per_class=1)
    rule = {"when": every(4, config.BREVITY), "times": 99, "seconds": 0.2}
    if fault == "hang":
        rule["seconds"] = 0
    fake.control(script=[{"endpoint": "/api/chat", "fault": fault, **rule}])
    assert phase2(base, fake) == 0
    assert fake.stats()["faults"][fault] >= 3
    assert dataset_bytes(base) == plain


@pytest.mark.usefixtures("_short_answers")
@pytest.mark.parametrize("fault", EMBEDDING)
def test_a_list_of_embeddings_that_fails_does_not_change_a_byte(
    fake: FakeOllama, labelled: LabelFolder, plain: list[bytes], fault: str
) -> None:
    base = labelled(per_class=1)
    rule = {"endpoint": "/api/embed", "when": lambda body: len(body["input"]) > 1}
    fake.control(script=[{"fault": fault, **rule}])
    assert phase2(base, fake) == 0
    assert fake.stats()["faults"][fault] == 1
    assert dataset_bytes(base) == plain


@pytest.mark.usefixtures("_short_answers")
@pytest.mark.parametrize("fault", BAD_TEXTS)
def test_a_bad_text_is_replaced_by_another_answer(
    fake: FakeOllama, labelled: LabelFolder, fault: str
) -> None:
    base = labelled(per_class=1)
    rule = {"endpoint": "/api/chat", "when": every(4, config.BREVITY), "times": 99}
    fake.control(script=[{"fault": fault, **rule}])
    assert phase2(base, fake) == 0
    hits = fake.stats()["faults"][fault]
    quality = manifest_of(base)["quality_per_prompt"].values()
    assert hits >= 3
    assert sum(count["asked_anew"] for count in quality) == hits
    assert sum(count.get("whole", 0) for count in quality) == 15


@pytest.mark.usefixtures("_short_answers")
def test_a_tenth_of_all_calls_failing_still_gives_a_complete_dataset(
    labelled: LabelFolder,
) -> None:
    base = labelled()
    names = (*PASSING, *EMBEDDING, *BAD_TEXTS)
    few = dict.fromkeys(names, 0.006)
    with FakeOllama(faults=few, fault_seed=3, fault_s=0.2) as fake:
        assert phase2(base, fake, "--descriptions", "20") == 0
        assert sum(fake.stats()["faults"].values()) > 10
    assert np.isfinite(np.load(folder_of(base) / config.DATASET_X)).all()
    assert manifest_of(base)["counts"]["rows"] == 6 * 20


def test_a_server_that_no_longer_embeds_stops_the_run_and_loses_no_answer(
    fake: FakeOllama, labelled: LabelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    base = labelled(per_class=1)
    rule = {"endpoint": "/api/embed", "when": 5, "times": 99}  # after the preflight
    fake.control(script=[{"fault": "embed_refused", **rule}])
    assert phase2(base, fake) == 2
    assert "does not support embeddings" in caplog.text
    fake.control(script=[])
    assert phase2(base, fake) == 0
    # What was in flight when the run stopped, two at the most, is asked a second time.
    assert sum(asked["answered"] - 1 for asked in questions(fake)) <= 2


def test_a_server_that_dies_for_good_stops_the_run_and_loses_no_answer(
    labelled: LabelFolder, plain: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    base = labelled(per_class=1)
    rule = {"endpoint": "/api/chat", "when": 9, "fault": "refuse", "seconds": 60}
    with FakeOllama(script=[rule]) as fake:
        assert phase2(base, fake, "--wait", "0.3") == 2
        answered = sum(asked["answered"] for asked in questions(fake))
    assert "has not answered" in caplog.records[-1].message
    with FakeOllama() as fake:
        assert phase2(base, fake) == 0
        assert chats(fake) == 15 - answered
    assert dataset_bytes(base) == plain


def test_a_model_that_does_not_load_in_time_is_one_line(
    fake: FakeOllama,
    labelled: LabelFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake.control(script=[("/api/chat", 1, "hang")])
    monkeypatch.setattr(utils, "LOAD_S", 0.3)
    assert phase2(labelled(per_class=1), fake) == 2
    assert "can't load demo-vlm (no answer in time)" in caplog.records[-1].message


def test_a_load_may_take_longer_than_an_answer(
    labelled: LabelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "ANSWER_S", 0.3)
    slow: dict[str, Any] = {"load_s": 0.6, "time_model": "gpu", "time_scale": 1.0}
    crash = {"endpoint": "/api/chat", "when": 5, "fault": "crash"}
    with FakeOllama(**slow, script=[crash]) as fake:
        fake.control(time_model="instant")
        base = labelled(per_class=1)
        assert phase2(base, fake) == 0
        assert fake.stats()["loads"] == 3


def test_an_image_that_the_server_refuses_is_listed_and_the_rest_goes_on(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    path = base / "datos_etiquetados" / "MTF" / "MTF0.dcm"
    image = utils.prepare_image(path)
    bad = base64.b64encode(image.png).decode()[200:300]
    fake.control(
        script=[{"endpoint": "/api/chat", "when": bad, "fault": "nested", "times": 99}]
    )
    assert phase2(base, fake) == 1
    assert list(rejected(base)) == ["MTF0.dcm"]
    assert "can't describe an image" in rejected(base)["MTF0.dcm"]
    assert manifest_of(base)["counts"]["images"] == 2
    fake.control(script=[])
    assert phase2(base, fake) == 0
    assert rejected(base) == {}


def test_a_text_that_cannot_be_embedded_is_replaced_by_another_answer(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    bad = rows_of(base)[2]
    shutil.rmtree(folder_of(base))
    script = {"endpoint": "/api/embed", "when": bad["description"], "times": 99}
    fake.control(script=[{**script, "fault": "embed_nan"}])
    assert phase2(base, fake) == 0
    now = rows_of(base)[2]
    assert now["description"] != bad["description"]
    assert now["seed"] != bad["seed"]
    assert phase2(base, fake) == 0


def test_a_model_replaced_during_the_run_stops_it_and_taints_nothing(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    fake.control(script=[("/api/chat", 4, "digest")])
    assert phase2(base, fake) == 2
    assert not (folder_of(base) / config.MANIFEST).exists()
    fake.control(script=[], digests={})
    before = chats(fake)
    assert phase2(base, fake) == 0
    # Nobody knows which model gave the answers: with the old one all are asked again.
    assert chats(fake) - before == 15


def test_an_embedder_replaced_during_the_run_leaves_no_vector(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    fake.control(script=[("/api/embed", 5, "digest")])  # after the preflight
    assert phase2(base, fake) == 2
    journals = [*(folder_of(base) / config.JOURNAL_DIR).glob("?" * 64 + ".jsonl")]
    assert journals
    assert not any(b'"vector"' in path.read_bytes() for path in journals)
    fake.control(script=[])
    assert phase2(base, fake) == 0
    assert chats(fake) <= 15 + 1  # the answers are the VLM's; one was in flight


def test_an_update_that_embeds_otherwise_stops_the_run_before_it_mixes(
    fake: FakeOllama,
    labelled: LabelFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base, answer, count, lost = labelled(per_class=1), utils.VlmServer.answer, 0, 0

    async def update(server: utils.VlmServer, *asked: Any) -> dict[str, Any]:
        nonlocal count, lost
        count += 1
        lost += 1
        if count == 8:
            fake.control(version="0.99.0", other_engine=True)
        reply = await answer(server, *asked)
        lost -= 1
        return reply

    monkeypatch.setattr(utils.VlmServer, "answer", update)
    assert phase2(base, fake) == 2
    assert "demo-embed" in caplog.text
    assert "gives other numbers than when the run began" in caplog.text
    assert phase2(base, fake) == 0
    made = dataset_bytes(base)
    assert phase2(base, fake) == 0
    assert dataset_bytes(base) == made
    assert 15 <= chats(fake) <= 15 + lost  # those in flight when the run ended


def test_an_embedder_that_falls_ill_costs_no_answer(
    fake: FakeOllama, labelled: LabelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    base = labelled(per_class=1)
    ill = {"endpoint": "/api/embed", "when": 6, "times": 999, "fault": "embed_nan"}
    fake.control(script=[ill])
    assert phase2(base, fake) == 2
    assert "contains NaN or Inf values): see its log" in caplog.text
    fake.control(script=[])
    assert phase2(base, fake) == 0
    assert chats(fake) in (15, 16)  # what was in flight when the run ended


# --- Bad input ----------------------------------------------------------------------


@pytest.mark.parametrize("made", ["nothing", "folder", "classes"])
def test_without_labelled_images_it_says_what_to_do(
    fake: FakeOllama, tmp_path: Path, made: str, caplog: pytest.LogCaptureFixture
) -> None:
    if made != "nothing":
        (tmp_path / "datos_etiquetados").mkdir()
    if made == "classes":
        (tmp_path / "datos_etiquetados" / "MTF").mkdir()
    assert phase2(tmp_path, fake) == 2
    assert "datos_etiquetados" in caplog.text
    assert "<CLASS>" in caplog.text


def test_an_image_in_two_classes_is_a_conflict_that_names_both(
    fake: FakeOllama, labelled: LabelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    base = labelled(per_class=1)
    folder = base / "datos_etiquetados"
    shutil.copy(folder / "MTF" / "MTF0.dcm", folder / "TOR" / "copy.dcm")
    assert phase2(base, fake) == 2
    assert "MTF0.dcm" in caplog.text
    assert "copy.dcm" in caplog.text
    assert chats(fake) == 0


def test_a_copy_within_a_class_is_used_once_and_is_no_failure(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    folder = base / "datos_etiquetados" / "MTF"
    shutil.copy(folder / "MTF0.dcm", folder / "copy.dcm")
    assert phase2(base, fake) == 0
    assert manifest_of(base)["counts"]["images"] == 3
    assert "same image as" in next(iter(rejected(base).values()))


def test_bad_files_are_listed_with_their_reasons_and_the_rest_goes_on(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    folder = base / "datos_etiquetados"
    (folder / "MTF" / "notes.txt").write_text("not a DICOM file")
    (folder / "MTF" / "empty.dcm").touch()
    whole = (folder / "TOR" / "TOR0.dcm").read_bytes()
    (folder / "TOR" / "torn.dcm").write_bytes(whole[: len(whole) // 2])
    flat = phantoms.exposure("FDT", 5, side=64)
    flat.PixelData = bytes(len(flat.PixelData))
    phantoms.write(flat, folder / "FDT" / "flat.dcm")
    shutil.copy(folder / "TOR" / "TOR0.dcm", folder / "loose.dcm")
    assert phase2(base, fake) == 1
    reasons = rejected(base)
    assert set(reasons) == {
        "notes.txt",
        "empty.dcm",
        "torn.dcm",
        "flat.dcm",
        "loose.dcm",
    }
    assert "no contrast" in reasons["flat.dcm"]
    assert "no class folder" in reasons["loose.dcm"]
    assert manifest_of(base)["counts"]["images"] == 3


@posix
@pytest.mark.skipif(os.access("/", os.W_OK), reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_line(
    fake: FakeOllama, labelled: LabelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    base = labelled()
    folder_of(base).mkdir()
    folder_of(base).chmod(0o500)
    assert phase2(base, fake) == 2
    assert "permission" in caplog.text


def test_a_file_in_place_of_the_output_folder_is_one_line(
    fake: FakeOllama, labelled: LabelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    base = labelled()
    folder_of(base).touch()
    assert phase2(base, fake) == 2
    assert "dataset_final_vlm" in caplog.text


def test_a_full_disk_is_one_line_and_keeps_the_answers(
    fake: FakeOllama,
    labelled: LabelFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = labelled()
    room = 20  # eight are of thumbnails and of the server
    sync = os.fsync

    def fsync(number: int) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(28, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    assert phase2(base, fake) == 2
    assert "make room" in caplog.text
    monkeypatch.undo()
    asked = chats(fake)
    assert phase2(base, fake) == 0
    assert chats(fake) - asked <= 30 - 9


# --- What the person sees -----------------------------------------------------------


def test_a_server_that_is_away_is_noticed_before_the_files_are_read(
    labelled: LabelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    base = labelled(per_class=1)
    assert fase2.main(["--base", str(base), *server_flags("http://127.0.0.1:9")]) == 2
    assert [record.message[:22] for record in caplog.records] == [
        "error: no Ollama answe"
    ]


def test_waiting_for_a_server_is_announced(
    fake: FakeOllama, labelled: LabelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    rule = {"endpoint": "/api/chat", "when": 5, "fault": "refuse", "seconds": 0.3}
    fake.control(script=[rule])
    assert phase2(labelled(per_class=1), fake) == 0
    assert sum("waiting up to 5 s" in r.message for r in caplog.records) == 1


def test_a_file_that_changes_during_the_run_is_left_out(
    fake: FakeOllama, labelled: LabelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = labelled(per_class=1)
    path = base / "datos_etiquetados" / "TOR" / "TOR0.dcm"

    def changed(*_: Any) -> None:
        phantoms.write(phantoms.exposure("TOR", 9, side=64), path)

    monkeypatch.setattr(fase2, "announce", changed)
    assert phase2(base, fake) == 1
    assert "changed while the run went on" in rejected(base)["TOR0.dcm"]


def test_the_estimate_asks_a_little_keeps_it_and_stops(
    fake: FakeOllama, labelled: LabelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    base = labelled(per_class=1)
    assert phase2(base, fake, "--descriptions", "20", "--estimate") == 0
    assert "60 descriptions of 3 images take about" in capsys.readouterr().out
    assert chats(fake) == fase2.ESTIMATE_QUESTIONS
    assert not (folder_of(base) / config.DATASET_X).exists()
    phase2(base, fake, "--descriptions", "20")
    assert all(asked["asked"] == 1 for asked in questions(fake))


def test_a_run_says_what_it_will_do_and_what_it_did(
    fake: FakeOllama,
    labelled: LabelFolder,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    phase2(labelled(per_class=1), fake)
    assert "images: 3 (FDT 1, MTF 1, TOR 1)" in caplog.text
    assert "answers: 0 in the journal, 15 to ask" in caplog.text
    assert "demo-vlm" in caplog.text
    out = capsys.readouterr().out
    assert "3 images (FDT 1, MTF 1, TOR 1), 15 rows of 256 numbers" in out
    assert "python fase3_entrenamiento_svc.py" in out


def test_a_distant_server_is_named_before_images_go_there(
    fake: FakeOllama,
    labelled: LabelFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(utils, "is_loopback", lambda _: False)
    assert phase2(labelled(per_class=1), fake) == 0
    assert "the images leave this machine" in caplog.records[0].getMessage()


def test_answers_repeated_for_every_image_are_counted_and_their_prompt_named(
    fake: FakeOllama, labelled: LabelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    for path in (folder_of(base) / config.JOURNAL_DIR).iterdir():
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for record in records:
            if record.get("prompt_set") == "generic":
                record["text"] = "The same for all."
        lines = [json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n", "utf-8")
    phase2(base, fake)
    quality = manifest_of(base)["quality_per_prompt"]
    generic = [q for p, q in quality.items() if p.startswith(config.GENERIC_PROMPTS[0])]
    assert generic[0]["repeated"] == generic[0]["answers"] == 3
    assert "3 of 3 cut or repeated: " in capsys.readouterr().out


# --- Journals of version 1.0 --------------------------------------------------------

JOURNAL_1_0 = Path(__file__).with_name("journal_1_0")
"""Three images described by version 1.0, two of the answers at the second attempt."""


def test_a_journal_of_version_1_0_is_read_and_nothing_is_asked(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    folder = folder_of(base) / config.JOURNAL_DIR
    folder.mkdir(parents=True)
    for path in JOURNAL_1_0.glob("*.jsonl"):
        shutil.copy(path, folder)
    assert phase2(base, fake) == 0
    assert chats(fake) == 0
    columns = ("image_id", "prompt", "seed", "description")
    then = utils.read_csv(JOURNAL_1_0 / config.DATASET_ROWS)
    now = rows_of(base)
    assert [[r[c] for c in columns] for r in now] == [
        [r[c] for c in columns] for r in then
    ]


def test_what_version_1_0_took_back_or_quarantined_holds(tmp_path: Path) -> None:
    lines = [
        {"answer": "a", "text": "kept", "problem": ""},
        {"answer": "b", "text": "of another model", "problem": ""},
        {"answer": "c", "text": "refused by the embedder", "problem": ""},
        {"quarantined": "c"},
        {"quarantined": "of a damaged line"},
        {"taken_back": ["b"]},
    ]
    path = tmp_path / "j.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    journal = utils.Journal(path)
    assert journal.get("b") is None
    found = {key: utils.judged(one).problem for key, one in journal.items()}
    assert found == {"a": "", "c": "unembeddable", "of a damaged line": "broken"}


# --- Answers that can't be used -----------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("G" * 160, "looping"),
        ("!" * 40, "looping"),
        ("<unk>" * 60, "empty"),
        ("@ @ @ @ @ @ @ @ @ @ @ @", "looping"),
        ("I don't see an image. Please upload one.", "declined"),
        ("As an AI, I cannot view pictures.", "declined"),
        ("I\u2019m sorry, I can't help with that.", "declined"),
        ("[img-0] Describe the picture.", "declined"),
        ("A grey field.<|end|><|user|>What is the capital?", ""),
        ("I don't see any image artefacts, just an even grey.", ""),
        ("No edge is visible; the field is even and slightly grainy.", ""),
    ],
)
def test_a_fluent_reply_is_judged_by_what_it_says(text: str, problem: str) -> None:
    answer = utils.judged({"text": text, "done": True, "done_reason": "stop"})
    assert answer.problem == problem
    assert "<|" not in answer.text


@pytest.mark.parametrize(
    "fault", ["letters", "bangs", "unknown", "no_image", "declines"]
)
def test_a_server_whose_answers_are_of_no_use_is_named_and_left(
    fake: FakeOllama,
    labelled: LabelFolder,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    base = labelled()
    fake.control(faults={fault: 0.8})
    assert phase2(base, fake) == 2
    assert "gives no usable answer" in caplog.text
    assert "Ollama 0.33" in caplog.text
    assert chats(fake) <= utils.BAD_ANSWERS + 1
    fake.control(faults={})
    assert phase2(base, fake) == 0


def test_garbage_that_an_older_version_took_is_asked_again(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    before = chats(fake)
    for path in (folder_of(base) / config.JOURNAL_DIR).glob("*.jsonl"):
        lines = path.read_text("utf-8").splitlines()
        for number, line in enumerate(lines):
            record = json.loads(line)
            if record.get("prompt_index") == 0:
                lines[number] = json.dumps(record | {"text": "G" * 99})
        path.write_text("\n".join(lines) + "\n", "utf-8")
    assert phase2(base, fake) == 0
    assert chats(fake) == before + 6
    assert not any("GGG" in row["description"] for row in rows_of(base))


def test_a_model_that_thinks_is_asked_not_to(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    can = ["completion", "vision", "thinking"]
    fake.control(capabilities={"demo-vlm": can})
    assert phase2(labelled(per_class=1), fake) == 0
    assert [body["think"] for body in fake.bodies("/api/chat")[1:]] == [False] * 15


def test_the_embedder_gets_its_prefix_and_no_num_ctx(
    fake: FakeOllama, labelled: LabelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(config.EMBED_PREFIXES, "demo-embed", "classification: ")
    base = labelled(per_class=1)
    assert phase2(base, fake) == 0
    bodies = fake.bodies("/api/embed")
    texts = [
        t
        for b in bodies
        for t in (b["input"] if type(b["input"]) is list else [b["input"]])
    ]
    assert all(text.startswith("classification: ") for text in texts)
    assert not any("num_ctx" in str(body) for body in bodies)
    assert manifest_of(base)["conditions"]["embed_prefix"] == "classification: "


@pytest.mark.parametrize("value", ["-1", "300", "30m", "0"])
def test_every_documented_keep_alive_works(
    fake: FakeOllama, labelled: LabelFolder, value: str
) -> None:
    assert phase2(labelled(per_class=1), fake, "--keep-alive", value) == 0


def test_a_new_engine_embeds_anew_and_says_so(
    fake: FakeOllama, labelled: LabelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    asked = chats(fake)
    fake.control(other_engine=True, version="0.99.0")
    assert phase2(base, fake) == 0
    assert chats(fake) == asked
    assert "texts are embedded anew" in caplog.text
    assert "Ollama is 0.99.0, was 0.33" in caplog.text


@pytest.mark.parametrize("fault", ["embed_shuffled", "embed_drift"])
def test_a_server_that_embeds_lists_otherwise_gets_one_text_a_request(
    fake: FakeOllama, labelled: LabelFolder, plain: list[bytes], fault: str
) -> None:
    base = labelled(per_class=1)
    rule = {"endpoint": "/api/embed", "fault": fault, "times": 10**6}
    several = {"when": lambda body: len(body["input"]) > 1}
    fake.control(script=[{**rule, **several}])
    assert phase2(base, fake) == 0
    assert dataset_bytes(base) == plain


# --- Class folders ------------------------------------------------------------------


@posix  # a disk that tells them apart
@pytest.mark.parametrize(
    ("first", "second"),
    [("MTF", "mtf"), ("MTF", "MTF "), ("Se\u00f1al", "Sen\u0303al")],
)
def test_class_names_that_look_alike_are_refused_before_any_question(
    fake: FakeOllama,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    first: str,
    second: str,
) -> None:
    for number, name in enumerate((first, second)):
        path = tmp_path / "datos_etiquetados" / name / "a.dcm"
        path.parent.mkdir(parents=True)
        phantoms.write(phantoms.exposure("MTF", number, side=64), path)
    assert phase2(tmp_path, fake) == 2
    assert "differ only in case, spaces or Unicode form" in caplog.text
    assert chats(fake) == 0


@pytest.mark.parametrize("name", ["no concluyente", "no_concluyente", "a\u200eb"])
def test_a_name_that_no_class_can_have_is_refused(
    fake: FakeOllama, labelled: LabelFolder, name: str
) -> None:
    base = labelled(per_class=1)
    (base / "datos_etiquetados" / "TOR").rename(base / "datos_etiquetados" / name)
    assert phase2(base, fake) == 2
    assert chats(fake) == 0


@posix  # a disk that tells them apart
def test_small_letters_make_no_other_background_class(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    (base / "datos_etiquetados" / "FDT").rename(base / "datos_etiquetados" / "fdt")
    assert phase2(base, fake) == 0
    sets = {row["prompt_set"] for row in rows_of(base) if row["class"] == "fdt"}
    assert sets == {"background", "generic"}


def test_counts_that_phase_3_would_refuse_are_said_before_the_hours(
    fake: FakeOllama, labelled: LabelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    base = labelled(per_class=1)
    (base / "datos_etiquetados" / "RX").mkdir()
    assert phase2(base, fake) == 0
    assert "class FDT has 1 image" in caplog.text
    assert "'RX': no image in it" in caplog.text


# --- A first model after an hour ----------------------------------------------------


def test_the_images_of_the_classes_take_turns(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=2)
    phase2(base, fake)
    rows = {row["image_id"]: row["class"] for row in rows_of(base)}
    folder = folder_of(base) / config.JOURNAL_DIR
    times = {
        p.stem: p.stat().st_ctime_ns for p in folder.glob("*.jsonl") if p.stem in rows
    }
    order = [rows[image] for image in sorted(times, key=lambda i: times[i])]
    assert [set(order[at : at + 3]) for at in (0, 3)] == [{"FDT", "MTF", "TOR"}] * 2


def test_the_finished_images_alone_make_a_dataset_without_a_server(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    asked = fake.stats()["requests"]
    phantoms.write(
        phantoms.exposure("TOR", 9, side=64),
        base / "datos_etiquetados" / "TOR" / "new.dcm",
    )
    flags = ["--base", str(base), *server_flags("http://127.0.0.1:9"), *FEW]
    assert fase2.main([*flags, "--finished-only"]) == 0
    assert fake.stats()["requests"] == asked
    made = manifest_of(base)
    for wrong in (["--vlm", "other"], ["--descriptions", "9"], ["--estimate"]):
        assert fase2.main([*flags, "--finished-only", *wrong]) == 2
        assert manifest_of(base) == made
    journal = base / "dataset_final_vlm" / config.JOURNAL_DIR
    servers = utils.Journal(journal / utils.AnswerBook.SERVERS)
    for other in ("another", "demo-vlm:latest"):  # up to 1.9.1 the tag was kept
        servers.add({"key": "last", **(servers.get("last") or {}), "vlm": other})
        assert fase2.main([*flags, "--finished-only"]) == 0
    assert made["finished_only"] == {"images": 3, "labelled": 4}
    assert made["counts"]["images"] == 3


@posix
def test_a_folder_that_cannot_be_read_is_listed_and_no_success(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    (base / "datos_etiquetados" / "TOR" / "gone.dcm").symlink_to(base / "nowhere")
    assert phase2(base, fake) == 1
    assert "leads nowhere" in rejected(base)["gone.dcm"]


def test_the_estimate_of_a_partly_done_run_samples_what_is_open(
    fake: FakeOllama, labelled: LabelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    phantoms.write(
        phantoms.exposure("TOR", 9, side=64),
        base / "datos_etiquetados" / "TOR" / "new.dcm",
    )
    assert phase2(base, fake, "--estimate") == 0
    assert "5 descriptions of 1 images take about" in capsys.readouterr().out


def test_answers_that_no_sight_test_confirmed_are_told_by_finished_only(
    fake: FakeOllama, labelled: LabelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    flags = ["--base", str(base), *server_flags(fake.url), *FEW, "--finished-only"]
    flags.remove("--no-sight-test")
    assert fase2.main(flags) == 0
    assert "no sight test has confirmed 15 answers" in caplog.text
    assert manifest_of(base)["unconfirmed"] == 3
    flags.remove("--finished-only")
    assert fase2.main(flags) == 0
    assert manifest_of(base)["unconfirmed"] == 0
