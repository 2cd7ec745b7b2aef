"""Phase 3: its figures are phase 4's, its checks can fail, its refusals are clear."""

import base64
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import phantoms
import pytest
from hypothesis import given
from hypothesis import strategies as st

import config
import fase3_entrenamiento_svc as fase3
import utils
from config import Config
from fase3_entrenamiento_svc import Booleans, Dataset, Experiment, Model

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
    names = (config.DATASET_X, config.DATASET_Y, config.DATASET_ROWS)
    names += (config.DATASET_IMAGES, config.DATASET_PIXELS)
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


def study_of(base: Path, **knobs: Any) -> tuple[Dataset, Experiment]:
    cfg = Config(base=base, **knobs)
    dataset = fase3.load_dataset(cfg.folder("dataset_dir"))
    scaler = fase3.fit_scaler(dataset.rows)
    return dataset, fase3.design_experiment(dataset, scaler, cfg)


def run(base: Path, *flags: str) -> dict[str, Any]:
    """The metrics of a whole run."""
    assert fase3.main(["--base", str(base), "--quiet", *flags]) == utils.EXIT_DONE
    metrics: dict[str, Any] = json.loads(
        (base / "modelo_final_vlm" / config.METRICS).read_text("utf-8")
    )
    return metrics


@pytest.fixture(scope="module")
def separable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished model of 20 clearly different images a class."""
    base = write_dataset(tmp_path_factory.mktemp("separable"), per_class=20)
    run(base, "--descriptions", "4")
    return base


def metrics_of(base: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads(
        (base / "modelo_final_vlm" / config.METRICS).read_text("utf-8")
    )
    return metrics


# --- The figure is phase 4's ---------------------------------------------------------


def test_clear_classes_are_told_apart_without_a_warning(separable: Path) -> None:
    metrics = metrics_of(separable)
    assert metrics["evaluation"]["accuracy"]["value"] == 1
    assert metrics["warnings"] == []


def test_the_report_says_what_the_metrics_say(
    separable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run(separable, "--descriptions", "4")
    text = capsys.readouterr().out
    assert "accuracy           1.00 (0.94-1.00)   60 of 60 images" in text
    assert "optimistic, rows of one image on both sides" in text
    for name in metrics["class_names"]:
        assert f"  {name} " in text


@pytest.mark.parametrize("classes", [("FDT", "MTF"), ("FDT", "MTF", "TOR", "WAX")])
def test_a_held_out_image_is_scored_as_phase_4_decides(
    tmp_path: Path, classes: tuple[str, ...]
) -> None:
    base = write_dataset(tmp_path, classes=classes, of_class=0.7)
    dataset, study = study_of(base, inference_descriptions=3, repeats=1)
    scores = fase3.held_out_scores(study, ["protocol"])["protocol"][0]
    scaler = fase3.fit_scaler(dataset.rows)
    neighbours = fase3.make_neighbours(dataset, scaler, 0)
    names = np.array(dataset.classes)[dataset.labels]
    for _, training, held_out in study.splits():
        use = training[study.space.image]
        side = replace(
            study.space,
            vectors=study.space.vectors[use],
            image=study.space.image[use],
            generic=study.space.generic[use],
        )
        classifier = fase3.fit_classifier(side, study.models[0], names, 0.8)
        for image in np.flatnonzero(held_out):
            rows = dataset.rows[dataset.deciding[image][:3]]
            limits = {"confidence": 0.0, "novelty": np.inf}
            decision = utils.decide(rows, scaler, classifier, neighbours, limits)
            expected = fase3.softmax(0.8 * scores[image])
            assert list(decision.confidences.values()) == pytest.approx(
                list(expected), abs=1e-3
            )


def test_no_image_is_on_both_sides_of_a_split(tmp_path: Path) -> None:
    _, study = study_of(write_dataset(tmp_path))
    for _, training, held_out in study.splits():
        assert not np.any(training & held_out)


def test_every_image_is_held_out_once_per_repeat(tmp_path: Path) -> None:
    _, study = study_of(write_dataset(tmp_path), repeats=3)
    held_out = np.zeros(study.folds.shape)
    for repeat, _, images in study.splits():
        held_out[repeat] += images
    assert np.all(held_out == 1)


def test_a_fold_that_large_groups_leave_empty_is_passed_over(tmp_path: Path) -> None:
    _, study = study_of(write_dataset(tmp_path), repeats=1)
    uneven = replace(study, folds=np.where(study.folds == 1, 0, study.folds))
    assert len(list(uneven.splits())) == 4
    fase3.held_out_scores(uneven, ["protocol"])


def test_own_and_generic_rows_weigh_alike(tmp_path: Path) -> None:
    _, study = study_of(write_dataset(tmp_path, own=8, generic=2), pool=2)
    weight, generic = study.space.weight, study.space.generic
    assert weight[generic].sum() == pytest.approx(weight[~generic].sum())


def test_training_vectors_are_scaled_means_of_the_rows_of_one_image(
    tmp_path: Path,
) -> None:
    dataset, study = study_of(write_dataset(tmp_path), pool=50)
    scaler = fase3.fit_scaler(dataset.rows)
    rows = dataset.rows[(dataset.image == 5) & dataset.generic]
    vector = study.space.vectors[(study.space.image == 5) & study.space.generic]
    assert vector == pytest.approx(scaler.transform(rows).mean(axis=0)[None], abs=1e-4)


def test_a_precomputed_rbf_kernel_is_that_of_scikit_learn(tmp_path: Path) -> None:
    base = write_dataset(tmp_path, of_class=0.7)
    dataset, study = study_of(base, kernel="rbf", c=2.0, gamma=0.5)
    model, space = study.models[0], study.space
    names = np.array(dataset.classes)[dataset.labels]
    direct = fase3.fit_classifier(space, model, names, 1.0)
    use = np.arange(len(space.vectors))
    svc = fase3.train(space, model, dataset.labels, use)
    scores = fase3.class_scores(svc, space.kernel(model, use, use), 3)
    assert direct.predict_proba(space.vectors) == pytest.approx(
        fase3.softmax(scores), abs=1e-3
    )


@pytest.mark.parametrize("search", ["short", "full"])
def test_a_search_chooses_inside_the_folds_and_is_no_worse(
    tmp_path: Path, search: str
) -> None:
    base = write_dataset(tmp_path, per_class=8, own=4)
    metrics = run(base, "--search", search, "--repeats", "1", "--descriptions", "4")
    assert metrics["evaluation"]["accuracy"]["value"] >= 0.9
    assert metrics["model"]["kernel"] in ("linear", "rbf")


def test_images_that_look_wrongly_labelled_are_listed(
    tmp_path: Path,
) -> None:
    dataset, _ = study_of(write_dataset(tmp_path))
    scores = np.tile(np.eye(3)[dataset.labels], (2, 1, 1))
    scores[0, 5] = scores[:, 7] = [0, 0, 2]
    found = fase3.misjudged(scores, dataset)
    assert [(each["file"], each["wrong"]) for each in found] == [
        ("FDT/007.dcm", 1.0),
        ("FDT/005.dcm", 0.5),
    ]
    assert found[0]["decided"] == "TOR"
    lines = list(fase3.misjudged_lines({"misjudged": found}, verbose=True))
    assert lines[0].endswith("100 % of the repeats: FDT/007.dcm (on average TOR)")
    assert not list(fase3.misjudged_lines({"misjudged": found}, verbose=False))


# --- Checks that can fail -----------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_labels_are_at_chance_everywhere(tmp_path: Path, seed: int) -> None:
    base = write_dataset(tmp_path, of_class=0, of_prompts=0, per_class=20, seed=seed)
    metrics = run(base, "--descriptions", "4")
    low, high = metrics["evaluation"]["accuracy"]["interval"]
    assert low <= 1 / 3 <= high
    assert (
        metrics["checks"][0]["figures"]["mean"]
        <= metrics["checks"][0]["figures"]["limit"]
    )
    assert any("not shown to be better" in line for line in metrics["warnings"])


def test_a_row_split_on_random_labels_is_far_above_chance(tmp_path: Path) -> None:
    base = write_dataset(tmp_path, of_class=0, of_prompts=0, own=20, generic=10)
    dataset, study = study_of(base)
    honest = fase3.held_out_scores(study, ["protocol"])["protocol"]
    right = fase3.correct(honest, dataset.labels).mean()
    assert fase3.row_split_accuracy(study) > right + 0.3


@pytest.mark.parametrize("seed", [1, 2, 3])
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
    generic = fase3.load_dataset(base / "dataset_final_vlm").generic
    noise = np.random.default_rng(0).normal(size=(len(generic), N_FEATURES))

    def without_class(rows: Any) -> Any:
        return np.where(generic[:, None], rows, noise / 5).astype(np.float32)

    rewrite(base, config.DATASET_X, without_class)
    dataset, study = study_of(base)
    scores = fase3.held_out_scores(study, ["protocol"])["protocol"]
    assert fase3.correct(scores, dataset.labels).mean() == 1
    figures = fase3.check_prompts(study).figures
    assert figures is not None
    assert figures["generic"] < 0.7


class Leaky(Experiment):
    """Held-out images are trained on, too."""

    def splits(self) -> Iterable[tuple[int, Booleans, Booleans]]:
        for repeat, _, held_out in super().splits():
            yield repeat, np.ones_like(held_out), held_out


def test_the_permutation_check_notices_images_on_both_sides(tmp_path: Path) -> None:
    _, study = study_of(write_dataset(tmp_path, of_class=0))
    leaky = Leaky(**{name: getattr(study, name) for name in study.__dataclass_fields__})
    assert "both sides" in fase3.check_permuted(leaky, 3).warning
    assert not fase3.check_permuted(study, 3).warning


def test_the_header_check_names_a_field_that_betrays_the_class(tmp_path: Path) -> None:
    dataset, study = study_of(write_dataset(tmp_path))
    right = np.ones(study.folds.shape, bool)
    by_class = [dataset.classes[label] for label in dataset.labels]
    telling = fase3.check_headers(study, {"detector": by_class}, right)
    assert "detector alone" in telling.warning
    mixed = fase3.check_headers(study, {"detector": ["A", "B"] * 18}, right)
    assert not mixed.warning


def test_the_pixel_check_says_when_the_descriptions_add_nothing(tmp_path: Path) -> None:
    dataset, study = study_of(write_dataset(tmp_path))
    telling = np.eye(3)[dataset.labels]
    useless = np.random.default_rng(0).normal(size=(36, 3))
    right = np.ones(study.folds.shape, bool)
    assert "not shown that" in fase3.check_pixels(study, telling, right).warning
    assert not fase3.check_pixels(study, useless, right).warning


def test_image_statistics_tell_edges_from_noise_and_survive_a_flat_field() -> None:
    edge = np.zeros((64, 64), np.uint8)
    edge[:, 20:] = 200
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    flat = np.full((64, 64), 116, np.uint8)
    of_edge, of_noise, of_flat = map(fase3.image_statistics, (edge, noise, flat))
    straightness = -7
    assert of_edge[straightness] > 0.9
    assert of_noise[straightness] < 0.2
    assert np.all(np.isfinite(of_flat))


def test_headers_and_pixels_are_read_where_they_are(tmp_path: Path) -> None:
    base = write_dataset(tmp_path, per_class=2)
    lines = []
    for name in ("FDT", "MTF", "TOR"):
        for i in range(2):
            path = base / "datos_etiquetados" / name / f"{i:03d}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            phantoms.write(phantoms.exposure(name, i, side=64), path)
            lines.append({"output": f"{name}{i}.dcm", "detector": name})
    dataset, _ = study_of(base, group_by="study")
    statistics = fase3.read_statistics(dataset, Config(base=base))
    assert np.shape(statistics) == (6, 23)


def test_the_header_list_of_phase_1_is_joined_by_file_name(tmp_path: Path) -> None:
    base = write_dataset(tmp_path, per_class=2, classes=("FDT", "MTF"))
    dataset = fase3.load_dataset(base / "dataset_final_vlm")
    dataset = replace(dataset, files=["FDT/a.dcm", "FDT/x/b.dcm", "MTF/c.dcm", "d.dcm"])
    lines = [
        {"output": f"{stem}.dcm", "detector": stem.upper(), "timestamp": "20240131T1"}
        for stem in "dcba"
    ]
    path = base / "f1_descomprimidos" / config.FILE_LIST
    utils.write_csv(path, ("output", "detector", "timestamp"), lines)
    columns = fase3.read_header_columns(dataset, Config(base=base))
    assert columns["detector"] == ["A", "B", "C", "D"]
    assert columns["day"] == ["20240131"] * 4


# --- Figures --------------------------------------------------------------------------


def test_twenty_of_twenty_prove_between_84_and_100_percent() -> None:
    assert fase3.wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


@given(st.integers(0, 200), st.integers(1, 200))
def test_a_wilson_interval_holds_its_share(right: int, wrong: int) -> None:
    share = right / (right + wrong)
    low, high = fase3.wilson(share, right + wrong)
    assert 0 <= low <= share <= high <= 1


def test_the_confusion_matrix_counts_images_once_whatever_the_repeats(
    separable: Path,
) -> None:
    counts = metrics_of(separable)["evaluation"]["confusion_matrix"]
    assert np.sum(counts) == pytest.approx(60)


def test_calibration_finds_the_factor_that_made_the_labels() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(1, 4000, 3))
    shares = fase3.softmax(2.5 * scores[0])
    labels = np.array([rng.choice(3, p=each) for each in shares])
    assert fase3.fit_factor(scores, labels) == pytest.approx(2.5, rel=0.08)


def test_a_perfect_score_does_not_make_the_confidence_1() -> None:
    labels = np.repeat([0, 1], 20)
    factor = fase3.fit_factor(np.eye(2)[labels][None], labels)
    confidence = fase3.softmax(factor * np.array([[1.0, 0.0]]))[0, 0]
    assert 0.95 < confidence < 0.99


def test_the_confidence_threshold_keeps_errors_within_the_share() -> None:
    confidence = np.linspace(1, 0.5, 50)[None]
    right = np.arange(50)[None] < 30
    limit = fase3.choose_confidence(confidence, right, 0.05)
    answered = confidence >= limit
    assert answered.sum() == 31
    assert np.mean(~right[answered]) <= 0.05


def test_equal_confidences_are_answered_alike() -> None:
    confidence = np.array([[0.9] * 10 + [0.6] * 10])
    right = np.array([[True] * 15 + [False] * 5])
    assert fase3.choose_confidence(confidence, right, 0.05) == 0.9


def test_no_threshold_is_chosen_where_nothing_is_safe() -> None:
    limit = fase3.choose_confidence(
        np.full((1, 20), 0.9), np.arange(20)[None] < 10, 0.05
    )
    assert limit == config.NEVER


def test_held_out_images_that_are_strange_or_unsure_count_as_not_answered(
    tmp_path: Path,
) -> None:
    dataset, study = study_of(write_dataset(tmp_path), repeats=2)
    scores = np.tile(10 * np.eye(3)[dataset.labels], (2, 1, 1))
    scores[:, 3] = 0.1 * scores[:, 3]
    novelty = np.ones(36)
    novelty[20] = 9
    _, answered = fase3.cross_fit(study, scores, novelty, 0.05)
    assert set(np.flatnonzero(~answered[0])) == {3, 20}


def test_the_report_says_how_many_known_images_would_be_answered(
    separable: Path,
) -> None:
    found = metrics_of(separable)["confidence"]
    assert found["answered"]["value"] > 0.8
    assert found["wrong_among_answered"]["value"] == 0
    assert found["brier"] < 0.05


# --- Decisions that phases 3 and 4 share ----------------------------------------------


def load_model(base: Path) -> tuple[Any, ...]:
    folder = base / "modelo_final_vlm"
    return (
        joblib.load(folder / config.SCALER),
        joblib.load(folder / config.CLASSIFIER),
        utils.load_neighbours(folder / config.NEIGHBOURS),
        metrics_of(base)["thresholds"],
    )


def rows_of(base: Path, image: int) -> Any:
    dataset = fase3.load_dataset(base / "dataset_final_vlm")
    return np.array(dataset.rows[dataset.deciding[image]])


def test_a_known_image_gets_its_class_and_its_nearest_images(separable: Path) -> None:
    decision = utils.decide(rows_of(separable, 25), *load_model(separable))
    assert decision.label == decision.best_class == "MTF"
    assert decision.reason == ""
    assert decision.nearest[0].startswith("MTF/")


def test_decide_agrees_with_predict_proba_of_the_mean(separable: Path) -> None:
    scaler, classifier, neighbours, limits = load_model(separable)
    for image in (0, 30, 59):
        rows = rows_of(separable, image)
        decision = utils.decide(rows, scaler, classifier, neighbours, limits)
        shares = classifier.predict_proba(scaler.transform(rows.mean(axis=0)[None]))[0]
        assert list(decision.confidences.values()) == pytest.approx(shares, abs=1e-5)
        assert decision.best_class == classifier.classes_[shares.argmax()]


def test_an_image_of_no_known_kind_is_not_given_a_class(separable: Path) -> None:
    strange = np.random.default_rng(9).normal(size=(4, N_FEATURES)).astype(np.float32)
    strange /= np.linalg.norm(strange, axis=1, keepdims=True)
    decision = utils.decide(strange, *load_model(separable))
    assert decision.label == config.INCONCLUSIVE
    assert "unlike every training image" in decision.reason


def test_low_confidence_is_not_given_a_class() -> None:
    limits = {"confidence": 0.7, "novelty": 10.0}
    assert utils.refusal(0.69, 5.0, limits) == "confidence 0.69 is below 0.70"
    assert utils.refusal(0.7, 10.0, limits) == ""


def test_a_model_that_is_never_safe_says_so() -> None:
    limits = {"confidence": config.NEVER, "novelty": 10.0}
    assert "accepted share" in utils.refusal(1.0, 5.0, limits)


def test_novelty_of_known_images_leaves_their_own_rows_out(separable: Path) -> None:
    _, _, neighbours, limits = load_model(separable)
    apart = fase3.leave_out_novelty(neighbours, np.arange(60), 4)
    own = neighbours.owner == 7
    with_own = utils.novelty(neighbours.distances(neighbours.rows[own]))
    assert apart[7] > with_own
    assert 0 < np.mean(apart > limits["novelty"]) <= config.KNOWN_REFUSED_SHARE


def test_few_images_can_not_show_that_one_of_them_is_a_stranger() -> None:
    scores = np.eye(2)[[0, 1] * 4][None]
    novelty = np.arange(8.0)
    _, limits = fase3.thresholds(scores, np.array([0, 1] * 4), novelty, 0.05)
    assert limits["novelty"] == novelty.max()


def test_long_rows_are_projected_and_keep_their_distances() -> None:
    rng = np.random.default_rng(0)
    long = rng.normal(size=(40, 2000)).astype(np.float32)
    projection = (rng.normal(size=(2000, 256)) / 16).astype(np.float32)
    owner, names = np.arange(40, dtype=np.int32), np.array([str(i) for i in range(40)])
    none = np.zeros((0, 0), np.float32)
    exact = utils.Neighbours(long, owner, names, none)
    short = utils.Neighbours(long @ projection, owner, names, projection)
    probe = rng.normal(size=(5, 2000)).astype(np.float32)
    far = utils.novelty(exact.distances(exact.project(probe)))
    assert utils.novelty(short.distances(short.project(probe))) == pytest.approx(
        far, rel=0.1
    )


# --- Artefacts ------------------------------------------------------------------------


def test_the_model_loads_with_scikit_learn_alone(
    separable: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, joblib, numpy as np\n"
        "folder = sys.argv[1]\n"
        "scaler = joblib.load(folder + '/escalador.joblib')\n"
        "classifier = joblib.load(folder + '/clasificador_svc.joblib')\n"
        f"rows = np.ones((2, {N_FEATURES}), np.float32)\n"
        "print(classifier.predict_proba(scaler.transform(rows)).shape)\n"
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
    assert answer.stdout == "(2, 3)\n"


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
    assert set(metrics["thresholds"]) == {"confidence", "novelty"}
    assert "scikit-learn" in metrics["libraries"]
    for name, digest in metrics["sha256"].items():
        assert utils.sha256_of(folder / name) == digest


def test_a_run_that_fails_leaves_no_metrics_behind(
    separable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    flags = ["--base", str(separable), "--quiet", "--descriptions", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(fase3, "draw_confusion", fail)
        assert fase3.main(flags) == utils.EXIT_INTERRUPTED
    folder = separable / "modelo_final_vlm"
    assert not (folder / config.METRICS).exists()
    assert not list(folder.glob(".*"))
    assert fase3.main(flags) == utils.EXIT_DONE


# --- Odd datasets that are no error -------------------------------------------------


def test_a_dataset_without_generic_rows_is_evaluated_with_a_loud_warning(
    tmp_path: Path,
) -> None:
    metrics = run(write_dataset(tmp_path, generic=0))
    assert any("NO ROW WAS ASKED" in line for line in metrics["warnings"])
    assert metrics["asked"] == "own-prompt"


def test_a_dataset_of_generic_rows_alone_needs_no_prompt_check(tmp_path: Path) -> None:
    metrics = run(write_dataset(tmp_path, own=0), "--descriptions", "4")
    assert metrics["checks"][1]["finding"].startswith("not measured")
    assert metrics["evaluation"]["accuracy"]["value"] == 1


def test_two_images_a_class_are_enough_to_run_and_prove_little(tmp_path: Path) -> None:
    metrics = run(write_dataset(tmp_path, per_class=2), "--descriptions", "4")
    assert metrics["splits"]["folds"] == 2
    assert any("2 folds only" in line for line in metrics["warnings"])
    assert any("fewer than 20" in line for line in metrics["warnings"])


def test_fewer_descriptions_than_phase_4_asks_are_mentioned(tmp_path: Path) -> None:
    metrics = run(write_dataset(tmp_path), "--descriptions", "10")
    assert (metrics["k"], metrics["k_measured"]) == (10, 4)
    assert any("phase 4 asks 10" in line for line in metrics["warnings"])


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


X, Y = config.DATASET_X, config.DATASET_Y
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (
        lambda base: (base / "dataset_final_vlm" / config.MANIFEST).unlink(),
        r"manifiesto\.json is missing: run `python fase2",
    ),
    "no vectors": (
        lambda base: (base / "dataset_final_vlm" / X).unlink(),
        r"dataset_X\.npy is missing: run `python fase2",
    ),
    "changed later": (change_later, "is not the file that was written"),
    "truncated": (truncate, "can't be read"),
    "pickled": (
        lambda base: rewrite(base, Y, lambda y: y.astype(object)),
        "can't be read .*Python objects",
    ),
    "a row missing": (
        lambda base: rewrite(base, X, lambda rows: rows[:-1]),
        "have 431, 432 and 432 rows",
    ),
    "not a number": (lambda base: rewrite(base, X, with_nan), "are not finite"),
    "another dtype": (
        lambda base: rewrite(base, X, lambda rows: rows.astype(np.float64)),
        r"is float64 \(432, 24\), not float32",
    ),
    "other classes": (
        lambda base: rewrite(base, Y, lambda y: y[::-1]),
        "name other classes",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dataset_is_refused_in_one_line(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_dataset(tmp_path)
    spoil, message = DAMAGES[damage]
    spoil(base)
    with pytest.raises(utils.PipelineError, match=message):
        fase3.load_dataset(base / "dataset_final_vlm")
    assert fase3.main(["--base", str(base)]) == utils.EXIT_COULD_NOT_RUN
    assert not (base / "modelo_final_vlm").exists()
    assert capsys.readouterr().out == ""


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, classes=("TOR",))
    with pytest.raises(utils.PipelineError, match=r"one class only \(TOR\)"):
        fase3.load_dataset(tmp_path / "dataset_final_vlm")


def test_a_class_of_one_image_is_refused_saying_how_many_are_missing(
    tmp_path: Path,
) -> None:
    with pytest.raises(utils.PipelineError, match=r"FDT has 1 image .* label 1 more"):
        study_of(write_dataset(tmp_path, per_class=1))


def test_grouping_by_headers_of_files_that_are_gone_is_refused(tmp_path: Path) -> None:
    base = write_dataset(tmp_path)
    with pytest.raises(utils.PipelineError, match=r"FDT/000\.dcm can't be read"):
        study_of(base, group_by="day")


def test_a_class_from_one_detector_can_not_be_held_out_by_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_dataset(tmp_path)
    monkeypatch.setattr(fase3, "header_value", lambda path, _: path.parent.name)
    with pytest.raises(utils.PipelineError, match="has the same detector"):
        study_of(base, group_by="detector")


def test_images_of_one_day_stay_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_dataset(tmp_path)
    monkeypatch.setattr(fase3, "header_value", lambda path, _: path.stem[-1])
    _, study = study_of(base, group_by="day")
    for _, training, held_out in study.splits():
        assert not set(study.groups[training]) & set(study.groups[held_out])


def test_the_default_model_is_the_first_candidate() -> None:
    models = fase3.candidates(Config(search="full"), 5)
    assert models[0] == Model("linear", 0.01, 1.0, 5)
    assert {model.pool for model in models} == {5, 20}


def test_ctrl_c_ends_with_130_and_one_line(tmp_path: Path) -> None:
    base = write_dataset(tmp_path)
    command = [sys.executable, fase3.__file__, "--base", str(base)]
    with subprocess.Popen(
        [*command, "--permutations", "1000000"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while "checking" not in process.stderr.readline():
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
    write_dataset(tmp_path)
    if (tmp_path / name).exists():
        (tmp_path / name).rename(tmp_path / "away")
    (tmp_path / name).touch()
    assert fase3.main(["--base", str(tmp_path)]) == utils.EXIT_COULD_NOT_RUN
    assert name in caplog.records[-1].getMessage()


def test_a_full_disk_is_one_line_and_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_dataset(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    assert fase3.main(["--base", str(tmp_path)]) == utils.EXIT_COULD_NOT_RUN
    assert "free some space" in caplog.records[-1].getMessage()
    assert list((tmp_path / "modelo_final_vlm").iterdir()) == []
