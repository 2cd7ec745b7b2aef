"""Phase 3: its figures are phase 4's, its checks can fail, its refusals are clear."""

import base64
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from dicom_samples import posix
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.special import softmax

import config
import fase3_entrenamiento_svc as fase3
import utils
from config import Config

ROW_COLUMNS = "row,image_id,file,class,prompt_set,prompt_index,prompt,seed,description"
IMAGE_COLUMNS = (
    "image_id,file,class,sop_instance_uid,modality,manufacturer,detector,station,day,"
    "study,rows,columns,kvp,mas,first_answer,last_answer,server_versions"
)
N_FEATURES = 24

# --- Small datasets -----------------------------------------------------------------


def write_dataset(  # noqa: PLR0913  (each argument is one property of the dataset)
    base: Path,
    *,
    per_class: int = 12,
    classes: tuple[str, ...] = ("FDT", "MTF", "TOR"),
    own: int = 8,
    generic: int = 4,
    of_class: float = 3.0,
    of_prompts: float = 0.3,
    of_picture: float = 3.0,
    seed: int = 0,
) -> Path:
    """What phase 2 would write: class, image, prompt set and noise, added up."""
    rng = np.random.default_rng(seed)
    class_part = rng.normal(size=(len(classes), N_FEATURES)) * of_class
    set_part = dict(
        zip(config.PROMPT_SETS, rng.normal(size=(3, N_FEATURES)), strict=True)
    )
    lines: list[dict[str, Any]] = []
    vectors = []
    for number, name in enumerate(classes):
        own_set = "background" if name in config.BACKGROUND_CLASSES else "object"
        for i in range(per_class):
            image = class_part[number] + rng.normal(size=N_FEATURES)
            for prompt_set in [own_set] * own + ["generic"] * generic:
                noise = rng.normal(size=N_FEATURES)
                vectors.append(image + set_part[prompt_set] * of_prompts * 10 + noise)
                lines.append(
                    {
                        "row": len(lines),
                        "image_id": f"{name}-{i:03d}",
                        "file": f"{name}/{i:03d}.dcm",
                        "class": name,
                        "prompt_set": prompt_set,
                    }
                )
    rows = np.array(vectors, np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    of_classes = rng.normal(size=(len(classes), 40)) * of_picture
    pixels = np.repeat(of_classes, per_class, axis=0)
    pixels += rng.normal(size=pixels.shape)
    return save_dataset(base, rows, lines, pixels)


def save_dataset(
    base: Path, rows: Any, lines: Sequence[dict[str, Any]], pixels: Any
) -> Path:
    """Write the arrays and tables, with one line per image and the manifest."""
    folder = base / "dataset_final_vlm"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / config.DATASET_X, rows)
    np.save(folder / config.DATASET_Y, np.array([line["class"] for line in lines]))
    np.save(folder / config.DATASET_PIXELS, pixels.astype(np.float32))
    images = {line["image_id"]: line for line in lines}.values()
    utils.write_csv(folder / config.DATASET_ROWS, ROW_COLUMNS.split(","), lines)
    utils.write_csv(
        folder / config.DATASET_IMAGES,
        IMAGE_COLUMNS.split(","),
        [
            {name: each[name] for name in ("image_id", "file", "class")}
            for each in images
        ],
    )
    return seal(base)


def with_headers(base: Path, column: str, values: Sequence[str]) -> Path:
    """Fill one column of the list of images."""
    path = base / "dataset_final_vlm" / config.DATASET_IMAGES
    lines = utils.read_csv(path)
    for line, value in zip(lines, values, strict=True):
        line[column] = value
    utils.write_csv(path, IMAGE_COLUMNS.split(","), lines)
    return seal(base)


def seal(base: Path, **more: Any) -> Path:
    """Write the manifest for the files as they are."""
    folder = base / "dataset_final_vlm"
    names = (
        *(config.DATASET_X, config.DATASET_Y, config.DATASET_ROWS),
        *(config.DATASET_IMAGES, config.DATASET_PIXELS),
    )
    digests = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}
    probe = base64.b64encode(np.ones(N_FEATURES, "<f4").tobytes()).decode()
    manifest = {
        "conditions": {"vlm": "test-vlm", "embedder": "test-embedder"},
        "probe_vector": probe,
        "sha256": digests,
        **more,
    }
    (folder / config.MANIFEST).write_text(json.dumps(manifest))
    return base


def dataset_of(base: Path, **knobs: Any) -> fase3.Dataset:
    cfg = Config(base=base, **knobs)
    return fase3.load_dataset(cfg.folder("dataset_dir"), cfg)


def run(base: Path, *flags: str) -> dict[str, Any]:
    """The metrics of a whole run."""
    command = ["--base", str(base), "--quiet", "--folds", "3", *flags]
    assert fase3.main(command) == utils.EXIT_DONE
    return metrics_of(base)


def metrics_of(base: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads(
        (base / "modelo_final_vlm" / config.METRICS).read_text("utf-8")
    )
    return metrics


def held_out(data: fase3.Dataset, splits: Sequence[fase3.Split]) -> fase3.Judged:
    """What two readers of the default kind say of the images of every fold."""
    return fase3.hold_out(
        data, splits, lambda known, new: fase3.judge(known, new, ("linear", 0.01))
    )


def check(metrics: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = metrics["checks"][name]
    return found


@pytest.fixture(autouse=True, scope="module")
def one_repeat() -> Iterator[None]:
    """Fewer trainings than a user's run has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fase3, "JUDGEMENTS", 1)
        yield


@pytest.fixture(scope="module")
def separable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished model of 30 clearly different images a class."""
    base = write_dataset(tmp_path_factory.mktemp("separable"), per_class=30)
    run(base, "--descriptions", "4")
    return base


@pytest.fixture(scope="module")
def of_ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished model of two stages: ten generic descriptions an image."""
    base = tmp_path_factory.mktemp("of_ten")
    run(write_dataset(base, per_class=20, generic=10))
    return base


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Metrics of 36 of 60 images, with four of ten descriptions and few headers."""
    base = write_dataset(tmp_path_factory.mktemp("unfinished"))
    with_headers(base, "kvp", ["70", "", ""] * 12)
    with_headers(base, "modality", ["DX", "", "", "CR", "", ""] * 6)
    seal(base, finished_only={"images": 36, "labelled": 60}, unconfirmed=5)
    return run(base)


# --- The estimates are phase 4's ------------------------------------------------------


def test_clear_classes_are_told_apart_and_nothing_is_wrong(separable: Path) -> None:
    metrics = metrics_of(separable)
    assert metrics["evaluation"]["accuracy"]["value"] == 1
    assert metrics["decision"]["wrong"]["value"] == 0
    assert metrics["decision"]["answered"]["value"] > 0.8
    assert metrics["warnings"] == [
        "not shown that the descriptions are better than the picture alone"
    ]


def test_the_report_says_what_the_metrics_say(
    separable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run(separable, "--descriptions", "4")
    text = capsys.readouterr().out
    assert "1.00 (0.96 to 1.00) by the descriptions, 90 of 90" in text
    for name in metrics["class_names"]:
        assert f"  {name} " in text
    for section in fase3.SECTIONS:
        for figure in metrics[section].values():
            assert fase3.shown(figure) in text if "value" in figure else True
            assert figure["words"] in text


@pytest.mark.parametrize("classes", [("FDT", "MTF"), ("FDT", "MTF", "TOR", "WAX")])
def test_a_held_out_image_is_decided_as_phase_4_decides(
    tmp_path: Path, classes: tuple[str, ...]
) -> None:
    """The rule of phase 3 on one side of a split, and `decide` on a model of it."""
    base = write_dataset(tmp_path, classes=classes, of_class=0.7, of_picture=0.7)
    data = dataset_of(base, inference_descriptions=4)
    splits = fase3.make_splits(data, data.groups, 3)
    candidate = ("linear", 0.01)
    limits = fase3.find_thresholds(data, held_out(data, splits))
    for each in limits["stages"].values():  # an image that made a limit ties with it
        each["descriptions"] *= 1.0001
        each["confidence"] = {k: p - 1e-4 for k, p in each["confidence"].items()}
    limits["pixels"] *= 1.0001
    _, training, images = splits[0]
    judged = fase3.judge(data.only(training), data.only(images), candidate)
    judged = {name: values[None] for name, values in judged.items()}
    folder = tmp_path / "model"
    metrics = {"thresholds": deepcopy(limits), "modalities": []}
    fase3.write_model(folder, data.only(training), candidate, metrics, b"")
    model = utils.load_model(folder, metrics)
    every_row = np.load(base / "dataset_final_vlm" / config.DATASET_X)
    for number, image in enumerate(np.flatnonzero(images)):
        rows = every_row[12 * image + 8 : 12 * image + 12]
        measured = fase3.decide(data, judged, (0, number), limits, "")
        decision = of_model(model, None, data.pixels[image])
        for stage in model.stages if not decision.reason else ():
            decision = of_model(model, rows[:stage], data.pixels[image], stage)
            if decision.final:
                break
        for stage in model.stages:
            shares = utils.read_words(model, rows[:stage], stage).confidences
            factor = limits["stages"][str(stage)]["factor"]
            scores = factor * judged[str(stage)][0, number]
            assert list(shares.values()) == pytest.approx(
                list(softmax(scores)), abs=1e-3
            )
        assert (decision.label, decision.stage) == (measured.label, measured.stage)
        plain = measured.reason.partition(")")[0]
        assert decision.reason.partition(";")[0] == plain


def test_the_figures_are_of_the_function_that_phase_4_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide = utils.decide

    def refuse_mtf(*given: Any, **more: Any) -> utils.Decision:
        decision = decide(*given, **more)
        if decision.best_class != "MTF":
            return decision
        return replace(decision, label=config.INCONCLUSIVE, reason="none of those")

    monkeypatch.setattr(utils, "decide", refuse_mtf)
    metrics = run(write_dataset(tmp_path, per_class=20), "--descriptions", "4")
    assert metrics["classes"]["MTF"]["words"].endswith(", 0 answers")
    reasons = {one["class"]: one["reason"] for one in metrics["held_out"]}
    assert reasons["MTF"] == "none of those"


def test_a_modality_that_only_one_image_has_is_refused_when_held_out(
    tmp_path: Path,
) -> None:
    base = write_dataset(tmp_path, per_class=20)
    modalities = ["MG", *["DX"] * 59]
    metrics = run(with_headers(base, "modality", modalities), "--descriptions", "4")
    refused = [one for one in metrics["held_out"] if "Modality" in one["reason"]]
    assert [one["reason"] for one in refused] == [
        "Modality MG is not among those of training (DX)"
    ]
    assert metrics["decision"]["answered"]["value"] <= 59 / 60
    assert metrics["modalities"] == ["DX", "MG"]


def test_confidences_are_those_that_anyone_computes_from_the_files(
    separable: Path,
) -> None:
    folder = separable / "modelo_final_vlm"
    scaler = joblib.load(folder / config.SCALER)
    classifier = joblib.load(folder / config.CLASSIFIER)
    for image in (0, 30, 89):
        decision = decide(separable, image)
        assert decision.words is not None
        mean = rows_of(separable, image).mean(axis=0)[None]
        shares = classifier.predict_proba(scaler.transform(mean))[0]
        found = decision.words.confidences
        assert list(found.values()) == pytest.approx(shares, abs=1e-5)
        assert decision.best_class == classifier.classes_[shares.argmax()]


def test_no_image_and_no_group_is_on_both_sides_of_a_split(tmp_path: Path) -> None:
    base = with_headers(write_dataset(tmp_path), "day", list("abcabcabcabc") * 3)
    data = dataset_of(base, group_by="day")
    splits = fase3.make_splits(data, data.groups, 3, 2)
    held_out = np.zeros((2, 36))
    for repeat, training, images in splits:
        assert not set(data.groups[training]) & set(data.groups[images])
        held_out[repeat] += images
    assert np.all(held_out == 1)


def test_images_with_an_equal_picture_are_held_out_together(tmp_path: Path) -> None:
    base = write_dataset(tmp_path)

    def twice(pixels: Any) -> Any:
        pixels[5] = pixels[20]
        return pixels

    rewrite(base, config.DATASET_PIXELS, twice)
    groups = dataset_of(base).groups
    assert groups[5] == groups[20]
    assert len(np.unique(groups)) == 35


def test_the_labels_of_the_held_out_side_are_never_seen(tmp_path: Path) -> None:
    """Permuted labels: whatever is still right would come from a leak."""
    data = dataset_of(write_dataset(tmp_path))
    rng, rights = np.random.default_rng(0), []
    for _ in range(10):
        shuffled = replace(data, labels=rng.permutation(data.labels))
        splits = fase3.make_splits(shuffled, data.groups, 3)
        rights.append(fase3.right_by(shuffled, splits, ("linear", 0.01)).mean())
    assert np.mean(rights) <= fase3.wilson(1 / 3, 36)[1]


def test_a_search_chooses_inside_the_folds_and_is_no_worse(tmp_path: Path) -> None:
    base = write_dataset(tmp_path, per_class=8, own=4)
    metrics = run(base, "--search", "full", "--descriptions", "4")
    assert metrics["evaluation"]["accuracy"]["value"] >= 0.9
    candidates = [("linear", 0.01), *fase3.SEARCH["full"]]
    assert (metrics["model"]["kernel"], metrics["model"]["c"]) in candidates


def test_images_that_look_mislabelled_are_shown_the_likeliest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_dataset(tmp_path, of_picture=0)
    wrong = {f"FDT-{i:03d}": rows for i, rows in enumerate(range(15 * 12, 22 * 12, 12))}

    def swap(rows: Any) -> Any:
        for number, start in enumerate(wrong.values()):
            rows[12 * number : 12 * number + 12] = rows[start : start + 12]
        return rows

    rewrite(base, config.DATASET_X, swap)
    metrics = run(base, "--descriptions", "4")
    text = capsys.readouterr().out
    shown = [line for line in text.splitlines() if line.startswith("is the label")]
    assert len(shown) == 5
    assert all("FDT/" in line and "descriptions say MTF" in line for line in shown)
    shares = [each["own_probability"] for each in metrics["held_out"]]
    assert shares == sorted(shares)
    assert "more with --verbose" in text
    run(base, "--descriptions", "4", "--verbose")
    assert capsys.readouterr().out.count("is the label right?") >= 7


# --- Checks that can fail -----------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_random_labels_are_not_better_than_the_commonest_class(
    tmp_path: Path, seed: int
) -> None:
    base = write_dataset(
        tmp_path, of_class=0, of_prompts=0, of_picture=0, per_class=20, seed=seed
    )
    metrics = run(base, "--descriptions", "4")
    low, high = metrics["evaluation"]["accuracy"]["interval"]
    assert low <= 1 / 3 <= high
    assert any("not shown to be better" in line for line in metrics["warnings"])
    assert metrics["decision"]["answered"]["value"] < 0.2


@pytest.mark.parametrize("seed", [1, 2])
def test_vectors_of_the_prompt_set_alone_make_the_prompt_check_shout(
    tmp_path: Path, seed: int
) -> None:
    base = write_dataset(
        tmp_path, classes=("FDT", "MTF"), of_class=0, per_class=20, seed=seed
    )
    metrics = run(base, "--descriptions", "4")
    low, high = metrics["evaluation"]["accuracy"]["interval"]
    assert low <= 0.5 <= high
    assert any("FOLLOWS THE PROMPT" in line for line in metrics["warnings"])


def test_the_prompt_check_trains_on_the_prompts_of_the_class_alone(
    tmp_path: Path,
) -> None:
    base = write_dataset(tmp_path)
    table = utils.read_csv(base / "dataset_final_vlm" / config.DATASET_ROWS)
    generic = np.array([line["prompt_set"] == "generic" for line in table])
    noise = np.random.default_rng(0).normal(size=(len(generic), N_FEATURES))

    def without_class(rows: Any) -> Any:
        return np.where(generic[:, None], rows, noise / 5).astype(np.float32)

    rewrite(base, config.DATASET_X, without_class)
    metrics = run(base, "--descriptions", "4")
    assert metrics["evaluation"]["accuracy"]["value"] == 1
    assert check(metrics, "prompts")["generic"] < 0.7
    assert check(metrics, "class-specific")["generic_only"] == 1


def test_what_class_specific_prompts_add_is_measured(tmp_path: Path) -> None:
    base = write_dataset(tmp_path, of_class=0.5, generic=1, own=20, of_prompts=0)
    gain = check(run(base, "--descriptions", "1"), "class-specific")["gain"]
    assert gain["value"] > 0
    low, high = gain["interval"]
    assert low < gain["value"] < high


def test_rows_of_generic_prompts_alone_are_scaled_by_themselves(tmp_path: Path) -> None:
    base = write_dataset(tmp_path, of_class=1.0)
    data = dataset_of(base, inference_descriptions=4)
    shifted = data.vectors + np.float32(9) * ~data.generic[:, None]
    far = replace(data, vectors=shifted.astype(np.float32))
    one, other = (
        fase3.read_descriptions(each, each, ("linear", 0.01), prompt_sets=True)[0]
        for each in (data, far)
    )
    name = f"{data.k} after generic"
    assert np.array_equal(one[name], other[name])


def test_the_header_check_names_a_field_that_betrays_the_class(tmp_path: Path) -> None:
    base = write_dataset(tmp_path)
    by_class = [name for name in ("FDT", "MTF", "TOR") for _ in range(12)]
    metrics = run(with_headers(base, "manufacturer", by_class), "--descriptions", "4")
    assert (
        "manufacturer (36 of 36 images have it)"
        in check(metrics, "header fields")["words"]
    )
    assert any("manufacturer alone" in line for line in metrics["warnings"])
    mixed = run(with_headers(base, "manufacturer", ["A", "B"] * 18))
    assert not any("alone, which" in line for line in mixed["warnings"])


def test_images_without_headers_count_as_such(unfinished: dict[str, Any]) -> None:
    words = check(unfinished, "header fields")["words"]
    assert "the most telling of 2, " in words
    assert "(12 of 36 images have it)" in words


def test_a_detector_that_was_not_trained_on_is_held_out_without_a_flag(
    tmp_path: Path,
) -> None:
    """The second detector shows FDT as MTF: its images are judged wrong."""
    base = with_headers(write_dataset(tmp_path), "detector", ["A", "B"] * 18)

    def differ(rows: Any) -> Any:
        images = rows.reshape(36, 12, N_FEATURES)
        images[1::2] = np.roll(images[1::2], 12, axis=0)
        return rows

    rewrite(base, config.DATASET_X, differ)
    found = check(run(base, "--descriptions", "4"), "unseen")
    assert found["words"].startswith("right on a detector not trained on")
    assert found["groups"] == 2
    assert found["value"] < 0.5


def test_days_are_held_out_where_one_detector_made_all_images(tmp_path: Path) -> None:
    base = with_headers(write_dataset(tmp_path), "day", ["20240101", "20240102"] * 18)
    metrics = run(with_headers(base, "detector", ["A"] * 36), "--descriptions", "4")
    assert check(metrics, "unseen")["held_out"] == "day"
    assert check(metrics, "unseen")["value"] == 1


def test_answers_that_change_during_the_run_are_told_with_the_hour(
    tmp_path: Path,
) -> None:
    base = write_dataset(tmp_path, per_class=20)
    hours = [f"2026-11-26T{i:02d}:00:00+00:00" for i in range(20)] * 3
    base = with_headers(base, "first_answer", hours)
    metrics = run(base, "--descriptions", "4")
    assert not check(metrics, "time")["warning"]
    versions = ["0.24.0"] * 10 + ["0.32.15"] * 10
    with_headers(base, "server_versions", versions * 3)
    late = np.arange(60) % 20 >= 10

    def turn(rows: Any) -> Any:
        images = rows.reshape(60, 12, N_FEATURES)
        images[late] = np.roll(images[late], 10, axis=0)
        return rows

    rewrite(base, config.DATASET_X, turn)
    warning = check(run(base, "--descriptions", "4"), "time")["warning"]
    assert "begins at 2026-11-26T10:00:00" in warning
    assert "0.24.0, then 0.32.15" in warning


# --- Intervals, calibration and thresholds ------------------------------------------


def test_twenty_of_twenty_prove_between_84_and_100_percent() -> None:
    assert fase3.wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


@given(st.integers(0, 200), st.integers(1, 200))
def test_a_wilson_interval_holds_its_share(right: int, wrong: int) -> None:
    share = right / (right + wrong)
    low, high = fase3.wilson(share, right + wrong)
    assert 0 <= low <= share <= high <= 1


@pytest.mark.parametrize(("errors", "answers"), [(0, 45), (1, 77), (2, 105)])
def test_answers_that_promise_five_percent(errors: int, answers: int) -> None:
    enough = fase3.promise(fase3.estimate(errors / answers, answers), 0.05)
    short = fase3.promise(fase3.estimate(errors / (answers - 1), answers - 1), 0.05)
    assert enough["value"] <= 0.05 < short["value"]
    assert enough["answers_needed"] == 45


def test_groups_that_differ_make_the_interval_wider() -> None:
    right = np.repeat([[True, False, True, True]], 25, axis=1)
    groups = np.repeat(np.arange(4), 25)
    found = fase3.grouped_estimate(right, groups)
    assert found["value"] == 0.75
    assert found["interval"][0] < fase3.wilson(0.75, 100)[0] - 0.2


def test_images_are_counted_once_whatever_the_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fase3, "JUDGEMENTS", 100)
    metrics = run(write_dataset(tmp_path), "--descriptions", "4")
    assert metrics["splits"]["repeats"] == 2
    said = [each["said"] for each in metrics["classes"].values()]
    assert np.sum(said) == pytest.approx(36)
    assert metrics["decision"]["answered"]["n"] == 36
    assert len(metrics["held_out"]) == 36


def test_calibration_finds_the_factor_that_made_the_labels() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(1, 4000, 3))
    shares = softmax(2.5 * scores[0], axis=-1)
    labels = np.array([rng.choice(3, p=each) for each in shares])
    assert fase3.fit_factor(scores, labels) == pytest.approx(2.5, rel=0.08)


def test_a_perfect_score_does_not_make_the_confidence_1() -> None:
    labels = np.repeat([0, 1], 20)
    factor = fase3.fit_factor(np.eye(2)[labels][None], labels)
    confidence = softmax(factor * np.array([1.0, 0.0]))[0]
    assert 0.95 < confidence < 0.99


def test_the_confidence_threshold_counts_one_error_more_than_there_was() -> None:
    confidence = np.linspace(1, 0.5, 50)
    for first_wrong, expected in ((19, 19), (39, 40), (18, 0)):
        right = np.arange(50) < first_wrong
        limit = fase3.lowest_confidence(confidence, right, 0.05, extra=1)
        assert np.sum(confidence >= limit) == expected


def test_without_the_extra_error_the_share_itself_is_kept() -> None:
    right = np.arange(50) < 30
    limit = fase3.lowest_confidence(np.linspace(1, 0.5, 50), right, 0.05)
    assert np.sum(np.linspace(1, 0.5, 50) >= limit) == 31


def test_a_threshold_may_lie_below_a_confidence_at_which_it_fails() -> None:
    right = np.arange(40) != 0
    assert fase3.lowest_confidence(np.linspace(1, 0.5, 40), right, 0.05) == 0.5


def test_equal_confidences_are_answered_together() -> None:
    confidence = np.array([0.9] * 10 + [0.6] * 10)
    right = np.array([True] * 15 + [False] * 5)
    assert fase3.lowest_confidence(confidence, right, 0.05) == 0.9


@pytest.mark.parametrize("max_error", [0.0, 0.05])
def test_no_threshold_is_chosen_where_nothing_is_safe(max_error: float) -> None:
    right = np.arange(20) < 10
    limit = fase3.lowest_confidence(np.full(20, 0.9), right, max_error, extra=1)
    assert limit == utils.NEVER


def test_a_limit_of_no_errors_answers_nothing_and_says_so(tmp_path: Path) -> None:
    metrics = run(write_dataset(tmp_path), "--descriptions", "4", "--max-error", "0")
    assert metrics["decision"]["answered"]["value"] == 0
    assert any("no confidence is safe" in line for line in metrics["warnings"])


def test_a_class_with_errors_needs_more_than_the_others(tmp_path: Path) -> None:
    """A tenth of MTF looks like TOR, to both readers: TOR's own errors count."""
    base = write_dataset(tmp_path, per_class=40)
    swapped = 40 + np.arange(0, 40, 10)

    def like_tor(values: Any) -> Any:
        images = values.reshape(120, -1, values.shape[-1])
        images[swapped] = images[swapped + 40]
        return values

    rewrite(base, config.DATASET_X, like_tor)
    rewrite(base, config.DATASET_PIXELS, like_tor)
    needed = run(base, "--descriptions", "4")["thresholds"]["stages"]["4"]["confidence"]
    assert needed["TOR"] > needed["FDT"]


# --- What phase 4 would do ------------------------------------------------------------


def test_images_of_a_class_that_was_left_out_are_refused(separable: Path) -> None:
    unknown = metrics_of(separable)["decision"]["unknown images"]
    assert unknown["value"] > 0.95
    assert unknown["n"] == 90


def test_two_classes_are_too_few_to_leave_one_out(tmp_path: Path) -> None:
    metrics = run(write_dataset(tmp_path, classes=("FDT", "MTF")), "--verbose")
    assert metrics["decision"]["unknown images"]["words"].startswith("not measured")


def test_of_many_classes_only_some_are_left_out(tmp_path: Path) -> None:
    classes = tuple(f"C{number:02d}" for number in range(11))
    base = write_dataset(tmp_path, classes=classes, per_class=4)
    assert run(base)["decision"]["unknown images"]["n"] == 4 * 4


def test_known_images_need_fewer_questions_than_all(of_ten: Path) -> None:
    metrics = metrics_of(of_ten)
    questions = metrics["decision"]["questions"]
    assert list(metrics["thresholds"]["stages"]) == ["3", "10"]
    assert 2 <= questions["value"] <= 5
    assert questions["interval"][0] < questions["value"] < questions["interval"][1]


def test_three_descriptions_or_fewer_are_one_stage(tmp_path: Path) -> None:
    metrics = run(write_dataset(tmp_path), "--descriptions", "3")
    assert list(metrics["thresholds"]["stages"]) == ["3"]


def test_a_stage_has_limits_of_its_own(of_ten: Path) -> None:
    """One description lies farther away than the mean of ten: so do three."""
    stages = metrics_of(of_ten)["thresholds"]["stages"]
    assert stages["3"]["descriptions"] != stages["10"]["descriptions"]
    assert stages["3"]["confidence"] != stages["10"]["confidence"]
    assert stages["10"]["factor"] == 1


def test_known_refused_is_the_share_that_seems_new(tmp_path: Path) -> None:
    base = write_dataset(tmp_path, per_class=20)
    strict = run(base, "--known-refused", "0.5", "--descriptions", "4")["thresholds"]
    wide = run(base, "--known-refused", "0", "--descriptions", "4")["thresholds"]
    assert strict["pixels"] < wide["pixels"]
    assert strict["stages"]["4"]["descriptions"] < wide["stages"]["4"]["descriptions"]


def test_disagreement_costs_answers_and_saves_errors(tmp_path: Path) -> None:
    base = write_dataset(tmp_path, per_class=20, of_class=0.5, of_picture=0.6)
    decision = run(base, "--descriptions", "4")["decision"]
    assert decision["wrong"]["value"] <= decision["one reader wrong"]["value"]


# --- Decisions that phases 3 and 4 share ----------------------------------------------


def load(base: Path) -> utils.Model:
    return utils.load_model(base / "modelo_final_vlm", metrics_of(base))


def rows_of(base: Path, image: int) -> Any:
    """The generic rows of one image of a dataset of the default sizes."""
    rows = np.load(base / "dataset_final_vlm" / config.DATASET_X)
    return rows[12 * image + 8 : 12 * image + 12]


def pixels_of(base: Path, image: int) -> Any:
    return np.load(base / "dataset_final_vlm" / config.DATASET_PIXELS)[image]


def of_model(
    model: utils.Model, rows: Any, pixels: Any, stage: int = 4, modality: str = ""
) -> utils.Decision:
    """What phase 4 does with one image; None stands for what it has not."""
    picture = None if pixels is None else utils.read_picture(model, pixels)
    words = None if rows is None else utils.read_words(model, rows, stage)
    foreign = utils.foreign_modality(modality, model.modalities)
    return utils.decide(model.thresholds, picture, words, stage, foreign)


def decide(base: Path, image: int) -> utils.Decision:
    return of_model(load(base), rows_of(base, image), pixels_of(base, image))


def test_a_known_image_gets_its_class_and_its_nearest_images(separable: Path) -> None:
    decision = decide(separable, 35)
    assert decision.label == decision.best_class == "MTF"
    assert decision.reason == ""
    assert decision.words is not None
    assert decision.picture is not None
    assert decision.words.nearest[0].startswith("MTF/")
    assert decision.picture.nearest[0] == "MTF/005.dcm"
    assert decision.picture.novelty <= 1


def strange(size: int, count: int) -> Any:
    rows = np.random.default_rng(9).normal(size=(count, size)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_descriptions_of_no_known_kind_are_not_given_a_class(separable: Path) -> None:
    pixels = pixels_of(separable, 0)
    decision = of_model(load(separable), strange(N_FEATURES, 4), pixels)
    assert decision.label == config.INCONCLUSIVE
    assert "the descriptions are unlike all in training" in decision.reason
    assert "nearest" in decision.reason


def test_a_picture_of_no_known_kind_is_refused_before_any_question(
    separable: Path,
) -> None:
    decision = of_model(load(separable), None, 99 * strange(40, 1)[0])
    assert decision.label == config.INCONCLUSIVE
    assert "the picture is unlike all in training" in decision.reason
    assert (decision.words, decision.stage) == (None, 0)


def test_a_known_picture_has_nothing_against_asking(separable: Path) -> None:
    decision = of_model(load(separable), None, pixels_of(separable, 0))
    assert (decision.label, decision.reason) == (config.INCONCLUSIVE, "")
    assert decision.best_class == "FDT"


def test_readers_that_disagree_give_no_class(separable: Path) -> None:
    rows, pixels = rows_of(separable, 0), pixels_of(separable, 35)
    decision = of_model(load(separable), rows, pixels)
    assert decision.reason == "descriptions say FDT, picture says MTF"
    alone = of_model(load(separable), rows, None)
    assert (alone.label, alone.picture) == ("FDT", None)


def test_a_foreign_modality_is_refused_by_the_header(separable: Path) -> None:
    model = replace(load(separable), modalities=["DX", "CR"])
    rows, pixels = rows_of(separable, 0), pixels_of(separable, 0)
    assert of_model(model, None, pixels, modality="CT").reason == (
        "Modality CT is not among those of training (DX, CR)"
    )
    for modality in ("", "DX"):
        assert of_model(model, rows, pixels, modality=modality).label == "FDT"


def test_a_model_without_modalities_refuses_none(separable: Path) -> None:
    assert load(separable).modalities == []
    pixels = pixels_of(separable, 0)
    decision = of_model(load(separable), None, pixels, modality="CT")
    assert decision.reason == ""


def test_the_threshold_of_a_stage_changes_that_stage_alone(of_ten: Path) -> None:
    model = load(of_ten)
    model.thresholds["stages"]["3"]["confidence"]["FDT"] = utils.NEVER
    rows = np.load(of_ten / "dataset_final_vlm" / config.DATASET_X)[8:18]
    pixels = pixels_of(of_ten, 0)
    assert model.stages == [3, 10]
    first = of_model(model, rows[:3], pixels, 3)
    assert "no confidence in FDT" in first.reason
    assert of_model(model, rows, pixels, 10).label == "FDT"


def test_reasons_come_in_the_order_of_the_rule() -> None:
    def why(words: utils.Opinion, picture: Any, least: float, header: str = "") -> str:
        needed = {"A": least, "B": 0.7}
        limits = {"stages": {"4": {"confidence": needed, "one_reader": needed}}}
        return utils.decide(limits, picture, words, 4, header).reason

    words, picture = utils.Opinion("A", 0.5, 2.0), utils.Opinion("B", 1.0, 2.0)
    near, agreed = replace(words, novelty=1.0), replace(picture, label="A", novelty=1.0)
    calm = replace(picture, novelty=1.0)
    assert why(words, picture, 0.7, "Modality") == "Modality"
    assert why(words, picture, 0.7).startswith("the picture")
    assert why(words, calm, 0.7).startswith("the descriptions")
    assert why(near, calm, 0.7) == "descriptions say A, picture says B"
    assert why(near, agreed, 0.7) == "confidence 0.50 in A is below 0.70"
    assert "accepted share" in why(near, agreed, utils.NEVER)
    assert why(near, agreed, 0.5) == ""
    assert why(near, None, 0.5) == ""


def test_novelty_of_held_out_images_leaves_their_own_rows_out(separable: Path) -> None:
    data = dataset_of(separable, inference_descriptions=4)
    splits = fase3.make_splits(data, data.groups, 5)
    judged = held_out(data, splits)
    limits = fase3.find_thresholds(data, judged)
    far = judged["picture_far"][0]
    assert 0 < np.mean(far > limits["pixels"]) <= 0.05
    own = decide(separable, 7)
    assert own.picture is not None
    assert own.picture.novelty < far[7] / limits["pixels"]


def test_few_images_can_not_show_that_one_is_unlike_the_others(
    tmp_path: Path,
) -> None:
    data = dataset_of(write_dataset(tmp_path, per_class=3))
    splits = fase3.make_splits(data, data.groups, 3)
    judged = held_out(data, splits)
    limits = fase3.find_thresholds(data, judged)
    assert limits["pixels"] == judged["picture_far"].max()
    factor = fase3.fit_factor(judged[data.k], data.labels)
    assert limits["stages"]["10"]["factor"] == factor


def test_long_rows_are_projected_and_keep_their_distances() -> None:
    rng = np.random.default_rng(0)
    long, new = (rng.normal(size=(n, 2000)).astype(np.float32) for n in (40, 5))
    projection = fase3.make_projection(2000, 0)
    exact = utils.fit_neighbours(long, 10).kneighbors(new)[0].mean()
    short = utils.fit_neighbours(utils.project(long, projection), 10)
    found = short.kneighbors(utils.project(new, projection))[0].mean()
    assert found == pytest.approx(exact, rel=0.1)


# --- Artefacts ------------------------------------------------------------------------


def test_the_model_loads_with_scikit_learn_alone(
    separable: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, joblib, numpy as np\n"
        "folder = sys.argv[1]\n"
        "scaler = joblib.load(folder + '/escalador.joblib')\n"
        "classifier = joblib.load(folder + '/clasificador_svc.joblib')\n"
        "second = joblib.load(folder + '/segundo_lector.joblib')\n"
        f"rows = np.ones((2, {N_FEATURES}), np.float32)\n"
        "print(classifier.predict_proba(scaler.transform(rows)).shape)\n"
        "print(second.predict(np.ones((2, 40))).shape)\n"
        "np.load(folder + '/vecinos.npz', allow_pickle=False)['pixels']\n"
        "assert not {'config', 'utils', 'fase3_entrenamiento_svc'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-I", "-W", "error", "-c", code]
    answer = subprocess.run(
        [*command, str(separable / "modelo_final_vlm")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert answer.stdout == "(2, 3)\n(2,)\n"


def test_the_same_dataset_gives_the_same_files_byte_for_byte(separable: Path) -> None:
    folder = separable / "modelo_final_vlm"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run(separable, "--descriptions", "4")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_metrics_hold_what_phase_4_compares(separable: Path) -> None:
    metrics = metrics_of(separable)
    folder = separable / "modelo_final_vlm"
    assert metrics["conditions"] == {"vlm": "test-vlm", "embedder": "test-embedder"}
    assert utils.unpack_vector(metrics["probe_vector"]).tolist() == [1] * N_FEATURES
    assert "scikit-learn" in metrics["libraries"]
    assert set(metrics["sha256"]) == {
        *(config.CLASSIFIER, config.SCALER, config.SECOND_READER, config.NEIGHBOURS)
    }
    for name, digest in metrics["sha256"].items():
        assert utils.sha256_of(folder / name) == digest


def test_the_modalities_of_training_are_recorded(unfinished: dict[str, Any]) -> None:
    assert unfinished["modalities"] == ["CR", "DX"]


def test_answers_that_no_sight_test_confirmed_are_a_warning(
    unfinished: dict[str, Any], separable: Path
) -> None:
    warning = "no sight test has confirmed the answers about 5 images"
    assert any(warning in line for line in unfinished["warnings"])
    assert not any("sight" in line for line in metrics_of(separable)["warnings"])


def test_an_unfinished_dataset_is_said_first(unfinished: dict[str, Any]) -> None:
    first = next(fase3.report_lines(unfinished, verbose=False))
    assert first.startswith("36 of 60 labelled images, 432 rows")


@pytest.mark.parametrize("surprise", [KeyboardInterrupt, OSError])
def test_a_run_that_fails_while_writing_leaves_no_metrics_behind(
    tmp_path: Path, surprise: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise surprise(errno.ENOSPC, "No space left on device")

    run(write_dataset(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", fail)
        assert fase3.main(["--base", str(tmp_path)]) in (2, 130)
    folder = tmp_path / "modelo_final_vlm"
    assert not (folder / config.METRICS).exists()
    assert not list(folder.glob(".*"))
    run(tmp_path)


# --- The drawing is an extra ----------------------------------------------------------


def test_a_drawing_that_fails_costs_a_warning_and_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import matplotlib.figure  # noqa: PLC0415

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no font")

    run(write_dataset(tmp_path))
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    run(tmp_path)
    assert "matriz_de_confusion.png is left out: no font" in caplog.text
    assert not (tmp_path / "modelo_final_vlm" / config.CONFUSION_MATRIX).exists()


@pytest.mark.parametrize(
    "setting", ["MPLBACKEND=module://matplotlib_inline.backend_inline", "usetex"]
)
def test_what_jupyter_or_a_matplotlibrc_asks_for_is_passed_over(
    tmp_path: Path, setting: str
) -> None:
    base = write_dataset(tmp_path, per_class=3)
    environment = dict(os.environ)
    if setting == "usetex":
        (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    else:
        environment["MPLBACKEND"] = setting.partition("=")[2]
    done = subprocess.run(
        [sys.executable, fase3.__file__, "--base", str(base)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "left out" not in done.stderr
    assert (base / "modelo_final_vlm" / config.CONFUSION_MATRIX).exists()


def test_class_names_with_dollars_and_of_any_length_are_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classes = ("a$\\\\frac$b", "RX_$50$_a", "x" * 200)
    run(write_dataset(tmp_path, classes=classes, per_class=3))
    assert "left out" not in caplog.text


def test_thirty_classes_fit_the_terminal_and_a_small_drawing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = tuple(f"CLASS_NUMBER_{number:02d}_{'x' * 60}" for number in range(30))
    base = write_dataset(tmp_path, classes=classes, per_class=3, own=2)
    run(base)
    text = capsys.readouterr().out
    tables = text[: text.index("Accuracy by the number")]
    assert max(len(line) for line in tables.splitlines()) <= 100
    assert len(text.splitlines()) < 80
    picture = base / "modelo_final_vlm" / config.CONFUSION_MATRIX
    with Image.open(picture) as image:
        assert max(image.size) <= 2600


# --- Odd datasets that are no error -------------------------------------------------


def test_a_dataset_without_generic_rows_is_evaluated_with_a_loud_warning(
    tmp_path: Path,
) -> None:
    metrics = run(write_dataset(tmp_path, generic=0))
    assert any("NO ROW WAS ASKED" in line for line in metrics["warnings"])
    assert metrics["asked"] == "class-specific"


def test_a_dataset_of_generic_rows_alone_needs_no_prompt_check(tmp_path: Path) -> None:
    metrics = run(write_dataset(tmp_path, own=0), "--descriptions", "4")
    assert check(metrics, "prompts")["words"].startswith("not measured")
    assert metrics["evaluation"]["accuracy"]["value"] == 1


def test_two_images_a_class_are_enough_to_run_and_prove_little(tmp_path: Path) -> None:
    metrics = run(write_dataset(tmp_path, per_class=2), "--descriptions", "4")
    assert metrics["splits"]["folds"] == 2
    assert any("2 folds only" in line for line in metrics["warnings"])
    assert any("fewer than 20" in line for line in metrics["warnings"])


def test_fewer_descriptions_than_phase_4_asks_are_mentioned(
    unfinished: dict[str, Any],
) -> None:
    assert (unfinished["k"], unfinished["k_measured"]) == (10, 4)
    assert any("phase 4 asks 10" in line for line in unfinished["warnings"])


def test_errors_above_what_was_aimed_at_are_a_warning(
    unfinished: dict[str, Any],
) -> None:
    upper = unfinished["decision"]["wrong"]["interval"][1]
    assert any(f"up to {upper:.1%}" in line for line in unfinished["warnings"])


# --- Refusals -------------------------------------------------------------------------


def rewrite(base: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change one array and make the manifest agree with it."""
    path = base / "dataset_final_vlm" / name
    np.save(path, change(np.load(path)), allow_pickle=True)
    seal(base)


def with_nan(rows: Any) -> Any:
    rows[3, 2] = np.nan
    return rows


def truncate(base: Path) -> None:
    path = base / "dataset_final_vlm" / config.DATASET_X
    path.write_bytes(path.read_bytes()[:-100])
    seal(base)


def change_later(base: Path) -> None:
    path = base / "dataset_final_vlm" / config.DATASET_X
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")


def age(base: Path) -> None:
    path = base / "dataset_final_vlm" / config.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"][config.DATASET_PIXELS]
    path.write_text(json.dumps(manifest))


def other_images(base: Path) -> None:
    with_headers(base, "image_id", [str(number) for number in range(36)])


X, PIXELS = config.DATASET_X, config.DATASET_PIXELS
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (
        lambda base: (base / "dataset_final_vlm" / config.MANIFEST).unlink(),
        r"manifiesto\.json is missing: run `python fase2",
    ),
    "no vectors": (
        lambda base: (base / "dataset_final_vlm" / X).unlink(),
        r"dataset_X\.npy is missing: run `python fase2",
    ),
    "of an older phase 2": (
        age,
        r"older phase 2: run `python fase2.* only what is new",
    ),
    "changed later": (change_later, "is not the file that was written"),
    "truncated": (truncate, "can't be read"),
    "pickled": (
        lambda base: rewrite(base, X, lambda rows: rows.astype(object)),
        "can't be read .*Python objects",
    ),
    "a row missing": (
        lambda base: rewrite(base, X, lambda rows: rows[:-1]),
        "differ in length",
    ),
    "not a number": (lambda base: rewrite(base, X, with_nan), "are not finite"),
    "a pixel that is not a number": (
        lambda base: rewrite(base, PIXELS, with_nan),
        "are not finite",
    ),
    "a picture missing": (
        lambda base: rewrite(base, PIXELS, lambda rows: rows[:-1]),
        "names other images",
    ),
    "other images": (other_images, "names other images"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dataset_is_refused_in_one_line(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_dataset(tmp_path)
    spoil, message = DAMAGES[damage]
    spoil(base)
    with pytest.raises(utils.PipelineError, match=message):
        dataset_of(base)
    assert fase3.main(["--base", str(base)]) == utils.EXIT_COULD_NOT_RUN
    assert not (base / "modelo_final_vlm").exists()
    assert capsys.readouterr().out == ""


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    base = write_dataset(tmp_path, classes=("TOR",))
    with pytest.raises(utils.PipelineError, match=r"one class only \(TOR\)"):
        dataset_of(base)


@pytest.mark.parametrize("flag", ["image", "detector"])
def test_a_class_that_can_not_be_held_out_is_refused_by_its_name(
    tmp_path: Path, flag: str, caplog: pytest.LogCaptureFixture
) -> None:
    by_class = ["FDT"] * 3 + ["MTF", "TOR"] * 3
    base = with_headers(write_dataset(tmp_path, per_class=3), "detector", by_class)
    if flag == "image":
        write_dataset(tmp_path, per_class=1)
    code = fase3.main(["--base", str(base), "--group-by", flag])
    assert code == utils.EXIT_COULD_NOT_RUN
    line = f"class FDT can't be held out in part, by {flag}: it needs at least 2"
    assert line in caplog.records[-1].getMessage()
    assert not (base / "modelo_final_vlm").exists()


@posix  # elsewhere only a console sends it
def test_a_header_field_that_no_image_has_can_not_be_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_dataset(tmp_path)
    assert fase3.main(["--base", str(base), "--group-by", "station"]) == 2
    assert "by station nothing can be held out" in caplog.text


def test_ctrl_c_ends_with_130_and_no_model(tmp_path: Path) -> None:
    base = write_dataset(tmp_path, per_class=20)
    command = [sys.executable, fase3.__file__, "--base", str(base), "--search", "full"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "evaluating" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(errors.splitlines()) == 1
    assert not (base / "modelo_final_vlm" / config.METRICS).exists()


@pytest.mark.parametrize("name", ["modelo_final_vlm", "dataset_final_vlm"])
def test_a_file_in_place_of_a_folder_is_one_line(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_dataset(tmp_path, per_class=3)
    if (tmp_path / name).exists():
        (tmp_path / name).rename(tmp_path / "away")
    (tmp_path / name).touch()
    assert fase3.main(["--base", str(tmp_path)]) == utils.EXIT_COULD_NOT_RUN
    assert name in caplog.records[-1].getMessage()


def test_a_model_folder_that_can_not_be_written_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(dir: Path) -> None:  # noqa: A002  (its name in tempfile)
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    write_dataset(tmp_path, per_class=3)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(fase3, "hold_out", None)
    assert fase3.main(["--base", str(tmp_path)]) == utils.EXIT_COULD_NOT_RUN
    assert "modelo_final_vlm: Permission denied" in caplog.records[-1].getMessage()


def test_a_full_disk_is_one_line_and_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_dataset(tmp_path, per_class=3)
    monkeypatch.setattr(os, "fsync", full)
    assert fase3.main(["--base", str(tmp_path)]) == utils.EXIT_COULD_NOT_RUN
    assert "No space left" in caplog.records[-1].getMessage()
    assert list((tmp_path / "modelo_final_vlm").iterdir()) == []
