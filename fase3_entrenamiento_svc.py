"""Phase 3: train the two readers on what phase 2 wrote, and say honestly how good
they are.

Reads   dataset_final_vlm/         what phase 2 wrote; no DICOM file and no server
Writes  modelo_final_vlm/
          clasificador_svc.joblib  scaled vectors -> class probabilities
          escalador.joblib         StandardScaler of the vectors
          segundo_lector.joblib    statistics of the picture -> class
          vecinos.npz              training images, for novelty; arrays only
          matriz_de_confusion.png  counts and shares of held-out images
          metricas.json            every estimate and threshold; written last

What it prints holds for phase 4: images that the model has not seen, generic prompts
only, one decision per image, by the very rule that phase 4 applies.

    python fase3_entrenamiento_svc.py
    python fase3_entrenamiento_svc.py --search short --group-by day
"""

import io
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import betaincinv, stdtrit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import classification_report, confusion_matrix
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC
from tqdm import tqdm

import config
import utils
from config import Config
from utils import NEVER, Opinion, PipelineError

log = logging.getLogger("fase3")

Floats = NDArray[np.float64]
Rows = NDArray[np.float32]
Integers = NDArray[np.intp]
Booleans = NDArray[np.bool_]
Split = tuple[int, Booleans, Booleans]
"""Repeat, training images and held-out images."""
Candidate = tuple[str, float]
"""Hyper-parameters: kernel and C."""

PHASE_2 = "run `python fase2_generar_vectores_vlm.py`"
LIBRARIES = ("scikit-learn", "numpy", "scipy", "joblib")
CHUNK_ROWS = 512

FIRST_STAGE = 3
"""Phase 4 tries to decide after this many descriptions, then after all of them."""
NEIGHBOUR_DIMENSIONS = 256
"""Longer rows are kept as a random projection onto this many dimensions.

Distances survive it within a few percent, 1,000 images take 10 MB instead of 120, and,
unlike principal components, it keeps the directions in which unknown images differ.
"""
DESCRIPTION_COUNTS = (1, 3, 10, 20)
"""Numbers of generic descriptions for which the accuracy is shown."""
SEARCH: dict[str, tuple[Candidate, ...]] = {
    "none": (),
    "short": (("linear", 0.001), ("linear", 0.1), ("rbf", 1.0), ("rbf", 10.0)),
}
SEARCH["full"] = (
    *SEARCH["short"],
    *(("linear", 0.0001), ("linear", 1.0), ("rbf", 0.1), ("rbf", 100.0)),
)
"""--search: kernel and C of the candidates beside the default."""
INNER_FOLDS = 3
CLASSES_LEFT_OUT = 5
"""Classes that are left out in turn, at most."""

PROMPT_GAP = 0.15
"""Points lost between class-specific prompts and generic ones that give a warning."""
HEADER_GAP = 0.05
"""A header field this close to the model's accuracy gives a warning."""
HEADER_FIELDS = ("modality", "manufacturer", "detector", "size", "day", "kvp", "mas")
PROMISED_WITH = 0.9
"""Confidence with which a share of errors is promised."""
Z = 1.959964
"""97.5 % quantile of the normal distribution: the limits of 95 % intervals."""

SHOWN_ROWS, SHOWN_COLUMNS, SHOWN_LETTERS = 12, 8, 20
"""What a table on the terminal may have of classes, and of letters in their names."""

# --- The dataset --------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """What phase 2 wrote, in the averages that train and judge."""

    classes: list[str]
    labels: Integers
    """(n_images,), index in `classes`."""
    groups: Integers
    """(n_images,), what must not be on both sides of a split."""
    lines: list[dict[str, str]]
    """(n_images,), file, headers, times and server versions."""
    pixels: Rows
    """(n_images, 40), `utils.picture_statistics`."""
    vectors: Rows
    """(n_vectors, n_features), means of rows of one image and prompt set: training."""
    image: Integers
    """(n_vectors,), the image that each describes."""
    generic: Booleans
    """(n_vectors,), whether it was asked with generic prompts."""
    described: Rows
    """(n_images, k, n_features), the first k rows of the prompts that phase 4 asks."""
    means: dict[str, Rows]
    """(n_images, n_features) by name: of the first "3", "10" … of these rows, and of
    the "class-specific" ones."""
    projection: Rows
    """(n_features, NEIGHBOUR_DIMENSIONS), or (0, 0) for short rows."""
    n_rows: int
    n_generic: int
    manifest: dict[str, Any]

    def only(self, images: Booleans) -> "Dataset":
        """These images alone; a class that none of them has is gone."""
        present, labels = np.unique(self.labels[images], return_inverse=True)
        number = np.cumsum(images) - 1
        use = images[self.image]
        return replace(
            self,
            classes=[self.classes[label] for label in present],
            labels=labels,
            groups=self.groups[images],
            lines=[self.lines[image] for image in np.flatnonzero(images)],
            pixels=self.pixels[images],
            vectors=self.vectors[use],
            image=number[self.image[use]],
            generic=self.generic[use],
            described=self.described[images],
            means={name: mean[images] for name, mean in self.means.items()},
        )

    @property
    def files(self) -> list[str]:
        """(n_images,), relative to the labelled folder."""
        return [line["file"] for line in self.lines]


def load_dataset(folder: Path, cfg: Config) -> Dataset:
    """Read and check phase 2's folder, and average its rows.

    Raises
    ------
    PipelineError
        Not finished, changed since, made by an older phase 2, or files that don't match
        each other.
    """
    manifest = utils.read_json(folder / config.MANIFEST, PHASE_2)
    if not {"sha256", "conditions", "probe_vector"} <= set(manifest):
        raise PipelineError(f"{folder / config.MANIFEST} is not complete: {PHASE_2}")
    names = (config.DATASET_X, config.DATASET_Y, config.DATASET_PIXELS)
    tables = (config.DATASET_ROWS, config.DATASET_IMAGES)
    if not {*names, *tables} <= set(manifest["sha256"]):
        raise PipelineError(
            f"{folder} was written by an older phase 2: {PHASE_2} (it asks nothing)"
        )
    for name in (*names, *tables):
        utils.check_digest(folder / name, manifest["sha256"][name], PHASE_2)
    rows, y, pixels = (load_array(folder / name) for name in names)
    table, lines = (utils.read_csv(folder / name) for name in tables)
    if problem := find_problem(rows, y, table) or find_image_problem(
        pixels, table, lines
    ):
        raise PipelineError(f"{folder}: {problem}: {PHASE_2}")
    return average_rows(rows, np.array(pixels), (table, lines), manifest, cfg)


def load_array(path: Path) -> NDArray[Any]:
    """Map a .npy file into memory; pickled objects are refused, not loaded."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise PipelineError(f"{path} can't be read ({error}): {PHASE_2}") from None
    return array


def find_problem(
    rows: NDArray[Any], y: NDArray[Any], table: list[dict[str, str]]
) -> str:
    """How the files break the contract or contradict each other; empty if fine."""
    if rows.dtype != np.float32 or rows.ndim != 2:
        return f"{config.DATASET_X} is {rows.dtype} {rows.shape}, not float32 (n, d)"
    if y.dtype.kind != "U" or y.ndim != 1:
        return f"{config.DATASET_Y} is {y.dtype} {y.shape}, not text (n,)"
    if not len(rows) == len(y) == len(table) > 0:
        lengths = f"{len(rows)}, {len(y)} and {len(table)}"
        return f"the dataset files have {lengths} rows, which should be equal"
    starts = range(0, len(rows), CHUNK_ROWS)  # never all of them in memory
    if not all(np.isfinite(rows[i : i + CHUNK_ROWS]).all() for i in starts):
        return f"{config.DATASET_X} holds values that are not finite"
    return find_table_problem(y.tolist(), table)


def find_table_problem(y: list[str], table: list[dict[str, str]]) -> str:
    if not {"image_id", "file", "class", "prompt_set"} <= set(table[0]):
        return f"{config.DATASET_ROWS} lacks columns"
    if [line["class"] for line in table] != y:
        return f"{config.DATASET_Y} and {config.DATASET_ROWS} name other classes"
    if len(set(y)) < 2:
        return f"one class only ({y[0]}); label images of at least one more"
    images = {line["image_id"] for line in table}
    generic = {line["image_id"] for line in table if line["prompt_set"] == "generic"}
    return "" if generic in (set(), images) else "some images have no generic rows"


def find_image_problem(
    pixels: NDArray[Any], table: list[dict[str, str]], lines: list[dict[str, str]]
) -> str:
    """The same for the files with one line or row per image."""
    images = list(dict.fromkeys(line["image_id"] for line in table))
    if [line.get("image_id") for line in lines] != images:
        return f"{config.DATASET_IMAGES} and {config.DATASET_ROWS} name other images"
    if pixels.dtype != np.float32 or pixels.shape != (len(images), 40):
        shape = f"{pixels.dtype} {pixels.shape}"
        return f"{config.DATASET_PIXELS} is {shape}, not float32 ({len(images)}, 40)"
    if not np.isfinite(pixels).all():
        return f"{config.DATASET_PIXELS} holds values that are not finite"
    return ""


def average_rows(
    rows: Rows,
    pixels: Rows,
    tables: tuple[list[dict[str, str]], list[dict[str, str]]],
    manifest: dict[str, Any],
    cfg: Config,
) -> Dataset:
    """Means of rows that train, and those that judge as phase 4 asks.

    The rows of one image and prompt set are averaged in up to `groups` means; every
    n-th row goes to the same, so that each mixes early and late prompts. Single rows
    are no better, and fits cost the square of their number.
    """
    table, lines = tables
    number = {line["image_id"]: i for i, line in enumerate(lines)}
    of_row = np.array([number[line["image_id"]] for line in table])
    is_generic = np.array([line["prompt_set"] == "generic" for line in table])
    groups = int(np.clip(600 // len(lines), 1, 10))
    found: list[tuple[Rows, int, bool]] = []
    by_set: dict[bool, list[Integers]] = {True: [], False: []}
    for image in range(len(lines)):
        of_image = np.flatnonzero(of_row == image)
        for generic in (False, True):
            chosen = of_image[is_generic[of_image] == generic]
            by_set[generic].append(chosen)
            parts = min(groups, len(chosen))
            for part in range(parts):
                found.append((rows[chosen[part::parts]].mean(0), image, generic))
    asked = by_set[True] if is_generic.any() else by_set[False]
    available = min(len(chosen) for chosen in asked)
    k = min(cfg.inference_descriptions, available)
    counts = {n for n in (*DESCRIPTION_COUNTS, k) if n <= available}
    means = {
        str(n): np.array([rows[chosen[:n]].mean(axis=0) for chosen in asked])
        for n in sorted(counts)
    }
    if is_generic.any() and not is_generic.all():
        specific = [rows[chosen].mean(axis=0) for chosen in by_set[False]]
        means["class-specific"] = np.array(specific)
    classes = sorted({line["class"] for line in table})
    of_image_class = {line["image_id"]: line["class"] for line in table}
    labels = [classes.index(of_image_class[line["image_id"]]) for line in lines]
    vectors, image_of, generic_of = zip(*found, strict=True)
    return Dataset(
        classes=classes,
        labels=np.array(labels),
        groups=merge_equal(group_values(lines, cfg.group_by), pixels),
        lines=lines,
        pixels=pixels,
        vectors=np.array(vectors),
        image=np.array(image_of),
        generic=np.array(generic_of),
        described=np.array([rows[chosen[:k]] for chosen in asked]),
        means=means,
        projection=make_projection(rows.shape[1], cfg.seed),
        n_rows=len(rows),
        n_generic=available if is_generic.any() else 0,
        manifest=manifest,
    )


def make_projection(n_features: int, seed: int) -> Rows:
    if n_features <= NEIGHBOUR_DIMENSIONS:
        return np.zeros((0, 0), np.float32)
    normal = np.random.default_rng(seed).standard_normal(
        (n_features, NEIGHBOUR_DIMENSIONS)
    )
    return np.asarray(normal / np.sqrt(NEIGHBOUR_DIMENSIONS), np.float32)


def group_values(lines: Sequence[Mapping[str, str]], group_by: str) -> list[str]:
    """Images without the header attribute form one group."""
    column = "image_id" if group_by == "image" else group_by
    return [line.get(column) or "" for line in lines]


def merge_equal(values: Sequence[str], pixels: Rows) -> Integers:
    """Group numbers, (n_images,); images with an equal picture share their groups."""
    groups = np.unique(values, return_inverse=True)[1]
    pictures = np.unique(pixels, axis=0, return_inverse=True)[1] + groups.max() + 1
    n = int(pictures.max()) + 1
    links = coo_array((np.ones(len(groups)), (groups, pictures)), shape=(n, n))
    return np.asarray(connected_components(links)[1][groups], np.intp)


# --- Images held out, and judged as phase 4 judges ------------------------------------


class Progress:
    """A bar over all trainings; off a terminal a line every 15 s, and a last one."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._bar = tqdm(total=total, disable=True if quiet else None, leave=False)
        self._told, self._quiet = time.monotonic(), quiet
        self._total, self._done = total, 0

    def step(self) -> None:
        """One more training is done."""
        self._done += 1
        self._bar.update()
        late = time.monotonic() - self._told > 15 or self._done == self._total
        if self._bar.disable and not self._quiet and late:
            self._told = time.monotonic()
            log.info("trained %d of %d times", self._done, self._total)

    def close(self) -> None:
        self._bar.close()


@dataclass(frozen=True)
class Readers:
    """Both readers and the images that they were trained on."""

    words: Pipeline
    picture: Pipeline
    descriptions: Any
    """NearestNeighbors of scaled, projected rows."""
    pictures: Any
    """NearestNeighbors of scaled statistics."""


@dataclass(frozen=True)
class Judged:
    """What both readers said of every image that they were not trained on."""

    scores: dict[str, Floats]
    """(n_repeats, n_images, n_classes), by name of the mean that was judged."""
    far: Floats
    """(n_repeats, n_images, k), the distance of each description to training's."""
    picture_scores: Floats
    """(n_repeats, n_images, n_classes)."""
    picture_far: Floats
    """(n_repeats, n_images)."""

    def description_far(self, count: int) -> Floats:
        """Novelty of the first descriptions, (n_images,)."""
        return np.asarray(self.far[:, :, :count].mean(axis=(0, 2)))


def groups_per_class(labels: Integers, groups: Integers) -> list[int]:
    return [len(np.unique(groups[labels == label])) for label in np.unique(labels)]


def count_folds(data: Dataset, cfg: Config) -> int:
    """Folds that every class has enough groups for; fewer than 2 is an error."""
    n_groups = groups_per_class(data.labels, data.groups)
    fewest = min(n_groups)
    name = data.classes[n_groups.index(fewest)]
    if fewest < 2 and cfg.group_by == "image":
        raise PipelineError(
            f"class {name} has 1 image and needs at least 2 (20 or more for figures "
            f"that mean something; equal pictures count once): label 1 more and "
            f"{PHASE_2}"
        )
    if fewest < 2:
        raise PipelineError(
            f"every image of class {name} has the same {cfg.group_by}, so that none "
            f"can be held out by it: add images of another {cfg.group_by} or use "
            "--group-by image"
        )
    return min(cfg.folds, fewest)


def make_splits(
    labels: Integers, groups: Integers, n_folds: int, repeats: int, seed: int
) -> list[Split]:
    """Stratified folds that keep groups together, each with all classes to train on."""
    splits = []
    for repeat in range(repeats):
        splitter = StratifiedGroupKFold(
            n_folds, shuffle=True, random_state=seed + repeat
        )
        for _, test in splitter.split(labels, labels, groups):
            held_out = np.isin(np.arange(len(labels)), test)
            if held_out.any():  # large groups may leave a fold empty
                splits.append((repeat, ~held_out, held_out))
    return splits


def trainable(labels: Integers, splits: Sequence[Split]) -> bool:
    """Whether every training side holds every class."""
    n_classes = len(np.unique(labels))
    return all(len(np.unique(labels[side])) == n_classes for _, side, _ in splits)


def fit_words(
    data: Dataset, training: Booleans, candidate: Candidate, use: Booleans | None = None
) -> Pipeline:
    """The descriptions' reader, on the vectors of these images (of those in `use`).

    Both prompt sets weigh alike in all.
    """
    chosen = training[data.image] if use is None else training[data.image] & use
    generic = data.generic[chosen]
    ratio = np.sum(~generic) / max(np.sum(generic), 1) or 1.0
    kernel, c = candidate
    svc = SVC(kernel=kernel, C=c, decision_function_shape="ovo")
    return make_pipeline(StandardScaler(), svc).fit(
        data.vectors[chosen],
        data.labels[data.image[chosen]],
        svc__sample_weight=np.where(generic, ratio, 1.0),
    )


def fit_picture(pixels: Rows, labels: NDArray[Any]) -> Pipeline:
    """The second reader; C is not tuned: linear and LDA are as good."""
    svc = SVC(C=10, decision_function_shape="ovo")
    return make_pipeline(StandardScaler(), svc).fit(pixels, labels)


def fit_readers(data: Dataset, training: Booleans, candidate: Candidate) -> Readers:
    """Both readers, and where their training images lie."""
    words = fit_words(data, training, candidate)
    picture = fit_picture(data.pixels[training], data.labels[training])
    points, pixels = project_rows(data, training, words), data.pixels[training]
    return Readers(
        words=words,
        picture=picture,
        descriptions=utils.fit_neighbours(points, utils.NEIGHBOUR_COUNT),
        pictures=utils.fit_neighbours(
            picture[0].transform(pixels), utils.PIXEL_NEIGHBOUR_COUNT
        ),
    )


def project_rows(data: Dataset, images: Booleans, words: Pipeline) -> Rows:
    """Their single descriptions as the neighbours have them, (n_images * k, …)."""
    rows = data.described[images].reshape(-1, data.described.shape[-1])
    scaled = np.asarray(words[0].transform(rows), np.float32)
    return utils.project(scaled, data.projection)


def judge(data: Dataset, readers: Readers, images: Booleans) -> Judged:
    """What the readers say of these images, with an axis of one repeat."""
    far = readers.descriptions.kneighbors(project_rows(data, images, readers.words))[0]
    pixels = readers.picture[0].transform(data.pixels[images])
    return Judged(
        scores={
            name: score(readers.words, mean[images])[None]
            for name, mean in data.means.items()
        },
        far=far.mean(axis=1).reshape(1, int(images.sum()), -1),
        picture_scores=score(readers.picture, data.pixels[images])[None],
        picture_far=readers.pictures.kneighbors(pixels)[0].mean(axis=1)[None],
    )


def score(reader: Pipeline, points: Rows) -> Floats:
    return utils.class_scores(reader.decision_function(points), len(reader.classes_))


def hold_out(
    data: Dataset,
    splits: Sequence[Split],
    candidates: Sequence[Candidate],
    seed: int,
    progress: Progress,
) -> Judged:
    """Train without each fold, judge its images."""
    shape = (splits[-1][0] + 1, len(data.labels))
    n_classes = len(data.classes)
    judged = Judged(
        scores={name: np.zeros((*shape, n_classes)) for name in data.means},
        far=np.zeros((*shape, data.described.shape[1])),
        picture_scores=np.zeros((*shape, n_classes)),
        picture_far=np.zeros(shape),
    )
    for repeat, training, held_out in splits:
        candidate = choose_candidate(data, training, candidates, seed)
        readers = fit_readers(data, training, candidate)
        part = judge(data, readers, held_out)
        for name, scores in part.scores.items():
            judged.scores[name][repeat, held_out] = scores[0]
        judged.far[repeat, held_out] = part.far[0]
        judged.picture_scores[repeat, held_out] = part.picture_scores[0]
        judged.picture_far[repeat, held_out] = part.picture_far[0]
        progress.step()
    return judged


def hold_out_words(
    data: Dataset,
    splits: Sequence[Split],
    candidate: Candidate,
    progress: Progress,
    names: Sequence[str],
    use: Booleans | None = None,
) -> list[Booleans]:
    """Whether the descriptions' reader alone is right, by the mean that it judges.

    One array (n_repeats, n_images) per name; `use` chooses training vectors.
    """
    right = [np.zeros((splits[-1][0] + 1, len(data.labels)), bool) for _ in names]
    for repeat, training, held_out in splits:
        words = fit_words(data, training, candidate, use)
        for name, array in zip(names, right, strict=True):
            scores = score(words, data.means[name][held_out])
            array[repeat, held_out] = scores.argmax(axis=1) == data.labels[held_out]
        progress.step()
    return right


def choose_candidate(
    data: Dataset, training: Booleans, candidates: Sequence[Candidate], seed: int
) -> Candidate:
    """The best in folds among these images; the first of equals."""
    if len(candidates) == 1:
        return candidates[0]
    inner = data.only(training)
    n_folds = min(INNER_FOLDS, *groups_per_class(inner.labels, inner.groups))
    if n_folds < 2:
        return candidates[0]
    splits = make_splits(inner.labels, inner.groups, n_folds, 1, seed)
    if not trainable(inner.labels, splits):
        return candidates[0]
    silent, name = Progress(0, True), str(data.described.shape[1])
    rights = [
        hold_out_words(inner, splits, each, silent, [name])[0].mean()
        for each in candidates
    ]
    return candidates[int(np.argmax(rights))]


# Intervals. Repeats are averaged: they are the same images, so n stays their number.


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n (Wilson, JASA 22 (1927) 209); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    centre = share + Z**2 / (2 * n)
    half = Z * float(np.sqrt(max(0, share * (1 - share)) / n + Z**2 / (4 * n**2)))
    low, high = ((centre + side) / (1 + Z**2 / n) for side in (-half, half))
    return max(0.0, min(share, low)), min(1.0, max(share, high))


def estimate(share: float, n: float) -> dict[str, Any]:
    """A share, its 95 % interval, and how many images it is a share of."""
    return {"value": float(share), "interval": list(wilson(share, n)), "n": float(n)}


def ratio(part: float, whole: float) -> dict[str, Any]:
    return estimate(part / whole if whole else 0.0, whole)


def difference(first: Booleans, second: Booleans) -> dict[str, Any]:
    """Difference of two accuracies on the same images, with its 95 % interval.

    Agresti and Min, Statistics in Medicine 24 (2005) 729: half an image is added to
    each cell of the paired table, so that no difference at all still has an interval.
    """
    n = first.shape[1] + 2.0
    gained = float(np.mean(first & ~second, axis=0).sum()) + 0.5
    lost = float(np.mean(~first & second, axis=0).sum()) + 0.5
    centre = (gained - lost) / n
    half = Z * float(np.sqrt(((gained + lost) / n - centre**2) / n))
    value = float(np.mean(first) - np.mean(second))
    return {"value": value, "interval": [centre - half, centre + half]}


def grouped_estimate(right: Booleans, groups: Integers) -> dict[str, Any]:
    """Accuracy with an interval over groups: images of one group are alike.

    Ratio estimator of cluster samples (Cochran, Sampling Techniques, 1977, 6.5) with
    the t distribution; never narrower than if the images were independent.
    """
    per_image, n = right.mean(axis=0), right.shape[1]
    value, n_groups = float(per_image.mean()), len(np.unique(groups))
    residuals = np.bincount(groups, per_image - value)
    spread = n_groups / (n_groups - 1) * float(np.sum(residuals**2))
    half = float(stdtrit(n_groups - 1, 0.975)) * np.sqrt(spread) / n
    low, high = wilson(value, n)
    interval = [max(0.0, min(low, value - half)), min(1.0, max(high, value + half))]
    return {"value": value, "interval": interval, "n": float(n), "groups": n_groups}


def mean_estimate(values: Floats) -> dict[str, Any]:
    """Mean over images and its 95 % interval by the normal distribution."""
    half = Z * float(values.std(ddof=1)) / np.sqrt(len(values))
    value = float(values.mean())
    return {"value": value, "interval": [value - half, value + half]}


# --- Calibration and thresholds -------------------------------------------------------


def softmax(logits: Floats) -> Floats:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def fit_factor(scores: Floats, labels: Integers) -> float:
    """The factor with which softmax(factor * scores) is most likely: a temperature.

    The target of the true class is 1 - 1 / (n + 2) after n images: even when all are
    right the data don't prove a confidence of 1 (rule of succession).

    Parameters
    ----------
    scores : ndarray, (n_repeats, n_images, n_classes)
        Of held-out images.
    labels : ndarray, (n_images,)
    """
    n, n_classes = scores.shape[1:]
    doubt = 1 / (n + 2)
    truth = np.eye(n_classes)[labels]
    targets = truth * (1 - doubt) + (1 - truth) * doubt / (n_classes - 1)
    factors = np.geomspace(1e-3, 1e3, 241)
    logits = factors[:, None, None] * (
        scores - scores.max(axis=-1, keepdims=True)
    ).reshape(1, -1, n_classes)
    likelihoods = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    repeated = np.tile(targets, (len(scores), 1))
    return float(factors[np.argmax((repeated * likelihoods).sum(axis=(1, 2)))])


def lowest_confidence(
    confidence: Floats, right: Booleans, max_error: float, extra: int = 0
) -> float:
    """The lowest confidence down to which errors are within their share of answers.

    That is, errors + extra <= max_error * (answers + extra); equal confidences are
    answered together. NEVER where no confidence will do.
    """
    order = np.argsort(-confidence, kind="stable")
    ranked, answers = confidence[order], np.arange(1, len(order) + 1)
    errors = np.cumsum(~right[order])
    allowed = errors + extra <= max_error * (answers + extra) + 1e-9
    allowed &= np.append(ranked[1:] < ranked[:-1], True)[: len(ranked)]
    last = np.flatnonzero(allowed)
    return float(ranked[last[-1]]) if last.size else NEVER


def class_thresholds(
    confidence: Floats, said: Integers, right: Booleans, passes: Booleans, cfg: Config
) -> Callable[[int], float]:
    """The confidence that an answer needs, by class; all arrays (n_repeats, n_images).

    The higher of one for all classes, which counts an error more than there was, and of
    the class's own; from the images that the other rules let pass.
    """
    common = lowest_confidence(
        confidence[passes], right[passes], cfg.max_error, extra=len(confidence)
    )

    def needed(label: int) -> float:
        of_class = passes & (said == label)
        alone = lowest_confidence(confidence[of_class], right[of_class], cfg.max_error)
        return max(common, alone)

    return needed


def find_thresholds(
    data: Dataset, judged: Judged, images: Booleans, stages: Sequence[int], cfg: Config
) -> dict[str, Any]:
    """Limits of novelty, calibration and thresholds from these held-out images."""

    def quantile(far: Floats) -> float:
        share = 1 - cfg.known_refused
        return float(np.quantile(far[images], share, method="higher"))

    labels = data.labels[images]
    picture_far = judged.picture_far.mean(axis=0)
    limits: dict[str, Any] = {"pixels": quantile(picture_far), "stages": {}}
    picture = judged.picture_scores[:, images].argmax(axis=-1)
    for stage in stages:
        count = min(stage, judged.far.shape[-1])
        scores = judged.scores[str(count)][:, images]
        far = judged.description_far(count)
        limit, factor = quantile(far), fit_factor(scores, labels)
        confidence, said = softmax(factor * scores).max(axis=-1), scores.argmax(axis=-1)
        alone = np.broadcast_to(far[images] <= limit, said.shape)
        both = alone & (picture_far[images] <= limits["pixels"]) & (picture == said)
        each: dict[str, Any] = {"descriptions": limit, "factor": factor}
        for name, passes in (("confidence", both), ("one_reader", alone)):
            needed = class_thresholds(confidence, said, said == labels, passes, cfg)
            each[name] = {
                name_of_class: needed(label)
                for label, name_of_class in enumerate(data.classes)
            }
        limits["stages"][str(stage)] = each
    return limits


def answer(
    judged: Judged,
    at: tuple[int, int],
    limits: Mapping[str, Any],
    classes: Sequence[str],
    one_reader: bool = False,
) -> tuple[int, int, str]:
    """What phase 4 would say: the class (-1 for none), the questions, and the reason.

    `at` is repeat and image; the stages are those of `limits`, in order.
    """
    repeat, image = at
    picture = None
    if not one_reader:
        far = judged.picture_far[:, image].mean()
        seen = int(judged.picture_scores[repeat, image].argmax())
        novelty = utils.times_limit(far, limits["pixels"])
        picture = Opinion(classes[seen], 1.0, novelty)
        if reason := utils.refusal(None, picture, {}):
            return -1, 0, reason
    for stage, each in limits["stages"].items():
        count = min(int(stage), judged.far.shape[-1])
        shares = softmax(each["factor"] * judged.scores[str(count)][repeat, image])
        best = int(shares.argmax())
        far = judged.far[:, image, :count].mean()
        novelty = utils.times_limit(far, each["descriptions"])
        words = Opinion(classes[best], float(shares[best]), novelty)
        needed = each["one_reader" if one_reader else "confidence"]
        reason = utils.refusal(words, picture, needed)
        if not reason:
            return best, int(stage), ""
    return -1, int(stage), reason


@dataclass(frozen=True)
class Decided:
    """Held-out images under phase 4's rule, with limits found on the other folds."""

    probabilities: Floats
    """(n_repeats, n_images, n_classes), of all descriptions."""
    label: Integers
    """(n_repeats, n_images); -1: INCONCLUSIVE."""
    questions: Integers
    """(n_repeats, n_images)."""
    all_asked: Integers
    """`label` if every image were asked all questions at once."""
    one_reader: Integers
    """`label` without the second reader."""
    reasons: list[str]
    """(n_images,), in the first repeat."""


def cross_fit(
    data: Dataset,
    judged: Judged,
    splits: Sequence[Split],
    stages: Sequence[int],
    cfg: Config,
) -> Decided:
    """Decide on the images of each fold by what was found on the others."""
    shape = judged.picture_far.shape
    last = str(stages[-1])
    scores = judged.scores[str(judged.far.shape[-1])]
    probabilities = np.zeros_like(scores)
    label, questions, whole, alone = (np.zeros(shape, np.intp) for _ in range(4))
    reasons = [""] * shape[1]
    for repeat, others, held_out in splits:
        limits = find_thresholds(data, judged, others, stages, cfg)
        at_once = limits | {"stages": {last: limits["stages"][last]}}
        factor = limits["stages"][last]["factor"]
        probabilities[repeat, held_out] = softmax(factor * scores[repeat, held_out])
        for image in np.flatnonzero(held_out):
            at = repeat, int(image)
            label[at], questions[at], reason = answer(judged, at, limits, data.classes)
            whole[at] = answer(judged, at, at_once, data.classes)[0]
            alone[at] = answer(judged, at, limits, data.classes, one_reader=True)[0]
            if repeat == 0:
                reasons[image] = reason
    return Decided(probabilities, label, questions, whole, alone, reasons)


# --- Estimates ------------------------------------------------------------------------


def evaluate(data: Dataset, scores: Floats) -> dict[str, Any]:
    """The descriptions' reader: accuracies, confusion matrix, and each class."""
    n, repeats = len(data.labels), len(scores)
    said, numbers = scores.argmax(axis=-1), range(len(data.classes))
    truth = np.tile(data.labels, repeats)
    counts = confusion_matrix(truth, said.ravel(), labels=numbers) / repeats
    report = classification_report(
        truth, said.ravel(), labels=numbers, output_dict=True, zero_division=0
    )
    by_class = {}
    for label, name in enumerate(data.classes):
        each, actual = report[str(label)], counts[label].sum()
        by_class[name] = {
            "images": round(actual),
            "precision": estimate(each["precision"], counts[:, label].sum()),
            "recall": estimate(each["recall"], actual),
            "f1": {"value": each["f1-score"]},
        }
    return {
        "accuracy": estimate(np.trace(counts) / n, n),
        "balanced_accuracy": {"value": report["macro avg"]["recall"]},
        "majority_rate": majority_rate(data.labels),
        "classes": by_class,
        "confusion_matrix": np.round(counts, 6).tolist(),
    }


def compare_readers(words: Booleans, picture: Booleans, agree: Booleans) -> Any:
    """What each reader gets alone, and what the descriptions add to the picture."""
    n = words.shape[1]
    return {
        "descriptions": estimate(words.mean(), n),
        "picture": estimate(picture.mean(), n),
        "agree": estimate(agree.mean(), n),
        "right_where_they_agree": ratio(
            (words & agree).mean() * n, float(agree.mean() * n)
        ),
        "gain": difference(words, picture),
    }


def rate_decisions(data: Dataset, decided: Decided, cfg: Config) -> dict[str, Any]:
    """Answered images, errors among them, and what they can promise."""
    n, labels = len(data.labels), data.labels

    def rates(said: Integers) -> dict[str, Any]:
        given, wrong = said >= 0, (said >= 0) & (said != labels)
        return {
            "answered": estimate(given.mean(), n),
            "wrong": ratio(wrong.mean() * n, given.mean() * n),
        }

    by_class = {}
    for label, name in enumerate(data.classes):
        given = decided.label == label
        by_class[name] = {
            "answered": float(given.mean() * n),
            "wrong": ratio((given & (labels != label)).mean() * n, given.mean() * n),
        }
    found = rates(decided.label)
    found["classes"] = by_class
    found["worst"] = max(
        data.classes, key=lambda name: by_class[name]["wrong"]["value"]
    )
    found["questions"] = mean_estimate(decided.questions.mean(axis=0))
    found["all_questions"] = rates(decided.all_asked)
    found["one_reader"] = rates(decided.one_reader)
    found["promise"] = promise(found["wrong"], cfg.max_error)
    return found


def promise(wrong: Mapping[str, Any], max_error: float) -> dict[str, Any]:
    """The share of errors that these answers can promise (Clopper and Pearson 1934)."""
    answers, errors = wrong["n"], wrong["value"] * wrong["n"]
    share = float(betaincinv(errors + 1, answers - errors, PROMISED_WITH))
    doubt = np.log(1 - PROMISED_WITH)
    needed = int(np.ceil(doubt / np.log(1 - max_error))) if 0 < max_error < 1 else 0
    return {
        "share": share if answers > errors else 1.0,
        "with": PROMISED_WITH,
        "answers_needed": needed,
    }


def rate_confidence(data: Dataset, decided: Decided) -> dict[str, Any]:
    """Brier score (0 to 2), calibration error and reliability in ten bins, and the
    share of errors by the share of answers."""
    probabilities, n_classes = decided.probabilities, len(data.classes)
    right = (probabilities.argmax(axis=-1) == data.labels).ravel()
    truth = np.eye(n_classes)[data.labels]
    highest = probabilities.max(axis=-1).ravel()
    bins = np.minimum((highest * 10).astype(int), 9)
    sums = [np.bincount(bins, each, 10) for each in (highest, right)]
    order = np.argsort(-highest, kind="stable")
    errors = np.cumsum(~right[order]) / np.arange(1, len(order) + 1)
    steps = np.linspace(0, len(order) - 1, min(50, len(order))).astype(int)
    return {
        "brier": float(np.mean(np.sum((probabilities - truth) ** 2, axis=-1))),
        "calibration_error": float(np.abs(sums[1] - sums[0]).sum() / len(highest)),
        "bins": [
            {"confidence": sums[0][i] / n, "right": sums[1][i] / n, "images": n}
            for i, n in enumerate((np.bincount(bins, minlength=10)).tolist())
            if n
        ],
        "curve": [[(i + 1) / len(order), float(errors[i])] for i in steps],
    }


def list_images(
    data: Dataset, judged: Judged, decided: Decided
) -> list[dict[str, Any]]:
    """What was said of every held-out image, the likeliest wrong labels first."""
    n, classes = len(data.labels), data.classes
    own = decided.probabilities[:, np.arange(n), data.labels].mean(axis=0)
    words = decided.probabilities.mean(axis=0).argmax(axis=-1)
    picture = judged.picture_scores.mean(axis=0).argmax(axis=-1)
    return [
        {
            "file": data.files[image],
            "image_id": data.lines[image]["image_id"],
            "class": classes[data.labels[image]],
            "own_probability": float(own[image]),
            "descriptions_say": classes[words[image]],
            "picture_says": classes[picture[image]],
            "answered": float((decided.label[:, image] >= 0).mean()),
            "questions": float(decided.questions[:, image].mean()),
            "reason": decided.reasons[image],
        }
        for image in np.argsort(own, kind="stable")
    ]


def majority_rate(labels: Integers) -> float:
    return float(np.bincount(labels).max() / len(labels))


# --- Checks: each can fail, and says so in words --------------------------------------


@dataclass(frozen=True)
class Plan:
    """The trainings of the checks, known before the first one."""

    splits: list[Split]
    candidate: Candidate
    field: str
    """The header field whose values are held out; empty where none will do."""
    field_groups: Integers
    field_splits: list[Split]
    halves: list[Split]
    """Trained on the images described first, asked with the others, and back."""
    random_halves: list[Split]

    def trainings(self, data: Dataset) -> int:
        """How many there will be."""
        with_both = 2 * len(self.splits) * ("class-specific" in data.means)
        others = (self.field_splits, self.halves, self.random_halves)
        left_out = len(classes_to_leave_out(data)) * (self.splits_per_repeat + 1)
        return with_both + sum(map(len, others)) + left_out

    @property
    def splits_per_repeat(self) -> int:
        return sum(repeat == 0 for repeat, _, _ in self.splits)


def make_plan(
    data: Dataset, splits: list[Split], candidate: Candidate, cfg: Config
) -> Plan:
    field, groups, field_splits = split_by_header(data, cfg)
    halves, random_halves = split_by_time(data), []
    if halves:
        repeats = max(repeat for repeat, _, _ in splits) + 1
        random_halves = make_splits(data.labels, data.groups, 2, repeats, cfg.seed)
    return Plan(splits, candidate, field, groups, field_splits, halves, random_halves)


def split_by_header(data: Dataset, cfg: Config) -> tuple[str, Integers, list[Split]]:
    """Folds by detector, else by day, if two or more of them have every class."""
    for field in ("detector", "day"):
        values = np.array(group_values(data.lines, field))
        names, groups = np.unique(values, return_inverse=True)
        complete = [
            name
            for name in names
            if len(np.unique(data.labels[values == name])) == len(data.classes)
        ]
        if len(complete) < 2:
            continue
        n_folds = min(cfg.folds, *groups_per_class(data.labels, groups))
        splits = make_splits(data.labels, groups, n_folds, 1, cfg.seed)
        if trainable(data.labels, splits):
            return field, groups, splits
    return "", np.zeros(0, np.intp), []


def split_by_time(data: Dataset) -> list[Split]:
    """The two halves of the run, each held out once; none without times."""
    times = [line.get("first_answer") or "" for line in data.lines]
    if not all(times):
        return []
    late = np.zeros(len(times), bool)
    late[np.argsort(times, kind="stable")[len(times) // 2 :]] = True
    halves = [(0, ~late, late), (0, late, ~late)]
    return halves if trainable(data.labels, halves) else []


def check_prompts(data: Dataset, plan: Plan, progress: Progress) -> dict[str, Any]:
    """Trained on class-specific prompts alone: does image or prompt decide?"""
    if "class-specific" not in data.means:
        return finding("prompts", "not measured: needs both sets of prompts")
    names = ["class-specific", str(data.described.shape[1])]
    rights = hold_out_words(
        data, plan.splits, plan.candidate, progress, names, ~data.generic
    )
    specific, generic = (float(right.mean()) for right in rights)
    gap, chance = difference(*rights), majority_rate(data.labels)
    warning = (
        f"{100 * gap['value']:.0f} points of what the class-specific prompts teach are "
        "lost on the generic prompts that phase 4 asks: they come from the prompt, not "
        "from the image"
    )
    if wilson(generic, len(data.labels))[0] <= chance:
        warning = (
            "THE CLASS FOLLOWS THE PROMPT, NOT THE IMAGE: trained on class-specific "
            f"prompts the model is right in {specific:.2f} of such rows and in "
            f"{generic:.2f} of generic ones, which is chance"
        )
    return finding(
        "prompts",
        f"trained on class-specific ones: {specific:.2f} on such, {generic:.2f} on "
        "generic",
        warning if gap["value"] >= PROMPT_GAP and gap["interval"][0] > 0 else "",
        {"class_specific": specific, "generic": generic, "gap": gap},
    )


def check_specific(
    data: Dataset, plan: Plan, right: Booleans, progress: Progress
) -> dict[str, Any]:
    """What the hours of class-specific prompts add for phase 4."""
    if "class-specific" not in data.means:
        return finding("class-specific", "not measured: needs both sets of prompts")
    k = str(data.described.shape[1])
    plain = hold_out_words(
        data, plan.splits, plan.candidate, progress, [k], data.generic
    )[0]
    gain = difference(right, plain)
    return finding(
        "class-specific",
        f"prompts add {points(gain)}; trained on the generic ones alone: "
        f"{plain.mean():.2f}",
        "",
        {"accuracy_generic_only": float(plain.mean()), "gain": gain},
    )


def check_headers(data: Dataset, plan: Plan, accuracy: float) -> dict[str, Any]:
    """Each header field alone, by majority vote: do acquisitions betray the class?"""
    columns = {
        name: [line.get(name) or "" for line in data.lines] for name in HEADER_FIELDS
    }
    columns["size"] = [
        f"{line.get('rows')} x {line.get('columns')}" for line in data.lines
    ]
    shares = {
        field: majority_by_value(data, plan, np.unique(values, return_inverse=True)[1])
        for field, values in columns.items()
        if len(set(values)) > 1
    }
    if not shares:
        return finding("header fields", "not measured: no headers, or all alike")
    best = max(shares, key=lambda field: shares[field])
    known = sum(value != "" for value in columns[best])
    telling = wilson(shares[best], len(data.labels))[0] > majority_rate(data.labels)
    warning = (
        f"{best} alone, which is no part of the image, gives {shares[best]:.2f}: the "
        "model may have learnt how the images were taken. Try --group-by, and add "
        "images of every class from each device and day"
    )
    return finding(
        "header fields",
        f"the most telling of {len(shares)}, {best}, gives {shares[best]:.2f} "
        f"({known} of {len(data.labels)} images have it)",
        warning if telling and shares[best] >= accuracy - HEADER_GAP else "",
        shares,
    )


def majority_by_value(data: Dataset, plan: Plan, values: Integers) -> float:
    """Accuracy of the commonest class among the training images of the same value."""
    right = np.zeros((plan.splits[-1][0] + 1, len(data.labels)), bool)
    for repeat, training, held_out in plan.splits:
        counts = np.zeros((int(values.max()) + 1, len(data.classes)))
        np.add.at(counts, (values[training], data.labels[training]), 1)
        counts += counts.sum(axis=0) / (2 * len(values))  # decides for unseen values
        said = counts.argmax(axis=1)[values[held_out]]
        right[repeat, held_out] = said == data.labels[held_out]
    return float(right.mean())


def check_unseen(
    data: Dataset, plan: Plan, accuracy: float, progress: Progress
) -> dict[str, Any]:
    """Accuracy on images of a detector, or a day, that was not trained on."""
    if not plan.field:
        return finding(
            "unseen detector",
            "not measured: needs two detectors or days with all classes",
        )
    k = str(data.described.shape[1])
    right = hold_out_words(data, plan.field_splits, plan.candidate, progress, [k])[0]
    found = grouped_estimate(right, plan.field_groups)
    name = f"unseen {plan.field}"
    return finding(
        name,
        f"{shown(found)} right, {found['groups']} of them held out; all mixed: "
        f"{accuracy:.2f}",
        "",
        found,
    )


def check_time(data: Dataset, plan: Plan, progress: Progress) -> dict[str, Any]:
    """The first half of the run against the second: did the answers change?

    Compared with halves drawn at random, which have as few images to train on.
    """
    if not plan.halves:
        return finding("time", "not measured: no times, or a half without a class")
    k, late = [str(data.described.shape[1])], plan.halves[0][2]
    by_time = hold_out_words(data, plan.halves, plan.candidate, progress, k)[0]
    mixed = hold_out_words(data, plan.random_halves, plan.candidate, progress, k)[0]
    fall = difference(mixed, by_time)
    first = min((line for i, line in enumerate(data.lines) if late[i]), key=answer_time)
    last = max(
        (line for i, line in enumerate(data.lines) if not late[i]), key=answer_time
    )
    versions = dict.fromkeys(
        line.get("server_versions") or "unknown" for line in (last, first)
    )
    measured = (
        f"trained on one half of the run, {by_time.mean():.2f} right in the other; "
        f"halves drawn at random: {mixed.mean():.2f}"
    )
    warning = (
        f"the answers changed during the run: {measured}. The second half begins at "
        f"{first['first_answer']} (server {', then '.join(versions)})"
    )
    return finding(
        "time",
        measured,
        warning if fall["interval"][0] > 0 else "",
        {"by_time": float(by_time.mean()), "random": float(mixed.mean()), "fall": fall},
    )


def answer_time(line: Mapping[str, str]) -> str:
    return line["first_answer"]


def classes_to_leave_out(data: Dataset) -> list[int]:
    """Every class in turn, or some of many; none where only one would be left."""
    n = len(data.classes)
    return list(range(0, n, -(-n // CLASSES_LEFT_OUT))) if n > 2 else []


def leave_classes_out(
    data: Dataset, plan: Plan, stages: Sequence[int], cfg: Config, progress: Progress
) -> dict[str, Any] | None:
    """Trained without a class and asked with its images: are they refused?"""
    refused: list[bool] = []
    questions: list[int] = []
    for label in classes_to_leave_out(data):
        unknown, rest = data.labels == label, data.only(data.labels != label)
        everything = np.ones(len(rest.labels), bool)
        folds = min(cfg.folds, *groups_per_class(rest.labels, rest.groups))
        splits = make_splits(rest.labels, rest.groups, folds, 1, cfg.seed)
        if not trainable(rest.labels, splits):
            continue
        judged = hold_out(rest, splits, [plan.candidate], cfg.seed, progress)
        limits = find_thresholds(rest, judged, everything, stages, cfg)
        readers = fit_readers(rest, everything, plan.candidate)
        progress.step()
        asked, trained = judge(data, readers, unknown), modalities(rest)
        for number, image in enumerate(np.flatnonzero(unknown)):
            header = data.lines[image].get("modality") or ""
            said, count, _ = answer(asked, (0, number), limits, rest.classes)
            foreign = bool(utils.foreign_modality(header, trained))
            refused.append(foreign or said < 0)
            questions.append(0 if foreign else count)
    if not refused:
        return None
    return {
        "refused": estimate(float(np.mean(refused)), len(refused)),
        "questions": mean_estimate(np.array(questions, float)),
    }


def modalities(data: Dataset) -> list[str]:
    return sorted({line.get("modality") or "" for line in data.lines} - {""})


def finding(
    name: str, text: str, warning: str = "", values: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a check found; `warning` is empty where all is well."""
    return {"name": name, "finding": text, "warning": warning, "values": values}


def mixed_accuracy(data: Dataset, candidate: Candidate, seed: int) -> float:
    """What a random split of rows prints: every image is on both sides."""
    labels = data.labels[data.image]
    use, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=seed, stratify=labels
    )
    svc = SVC(kernel=candidate[0], C=candidate[1])
    reader = make_pipeline(StandardScaler(), svc).fit(data.vectors[use], labels[use])
    return float(reader.score(data.vectors[test], labels[test]))


# --- The model that phase 4 loads -----------------------------------------------------


def with_probabilities(svc: SVC, factor: float) -> Pipeline:
    """An SVC on scaled vectors, its decisions as probabilities, in scikit-learn's terms.

    The last step is a LogisticRegression whose coefficients are written, not fitted:
    softmax(factor * sums of the one-against-one decisions), the calibration found on
    held-out images. Fitted here, it would learn from decisions on training images.
    """
    sums = factor * utils.sums_of_pairs(len(svc.classes_))
    confidence = LogisticRegression()
    confidence.classes_ = svc.classes_
    # For two classes it takes one row: sigmoid(x) is softmax(-x / 2, x / 2).
    confidence.coef_ = sums if len(sums) > 2 else 2 * sums[1:]
    confidence.intercept_ = np.zeros(len(confidence.coef_))
    confidence.n_features_in_ = sums.shape[1]
    steps: list[tuple[str, Any]] = [("svc", FunctionTransformer(svc.decision_function))]
    if len(sums) == 2:  # their decisions come without a second axis
        column = FunctionTransformer(np.expand_dims, kw_args={"axis": 1})
        steps.append(("column", column))
    return Pipeline([*steps, ("confidence", confidence)])


def write_model(
    folder: Path, data: Dataset, candidate: Candidate, metrics: dict[str, Any]
) -> None:
    """Fit on all images and write every file; METRICS last: the folder is complete.

    Thresholds calibrate relative to the classifier, whose own factor is the last
    stage's.
    """
    named = replace(data, labels=np.array(data.classes)[data.labels])
    everything = np.ones(len(data.labels), bool)
    words = fit_words(named, everything, candidate)
    stages = metrics["thresholds"]["stages"]
    factor = stages[max(stages, key=int)]["factor"]
    for each in stages.values():
        each["factor"] /= factor
    metrics["model"] = {"kernel": candidate[0], "c": candidate[1], "factor": factor}
    n_rows, n_images = data.described.shape[1], len(data.labels)
    arrays = {
        "rows": project_rows(data, everything, words),
        "owner": np.repeat(np.arange(n_images, dtype=np.int32), n_rows),
        "names": np.array(data.files),
        "projection": data.projection,
        "pixels": data.pixels,
    }
    drawing = draw_confusion(metrics)
    utils.remove_file(folder / config.METRICS)
    for name, estimator in (
        (config.CLASSIFIER, with_probabilities(words[1], factor)),
        (config.SCALER, words[0]),
        (config.SECOND_READER, fit_picture(data.pixels, named.labels)),
    ):
        with utils.atomic_write(folder / name) as file:
            joblib.dump(estimator, file)
    with utils.atomic_write(folder / config.NEIGHBOURS) as file:
        np.savez(file, **arrays)
    if drawing:
        with utils.atomic_write(folder / config.CONFUSION_MATRIX) as file:
            file.write(drawing)
    else:
        utils.remove_file(folder / config.CONFUSION_MATRIX)
    names = (
        *(config.CLASSIFIER, config.SCALER),
        *(config.SECOND_READER, config.NEIGHBOURS),
    )
    digests = {name: utils.sha256_of(folder / name) for name in names}
    utils.write_json(folder / config.METRICS, metrics | {"sha256": digests})


def draw_confusion(metrics: Mapping[str, Any]) -> bytes:
    """Counts and shares of every true class as a PNG; empty if it can't be drawn.

    The figure is an extra. matplotlib's defaults, no backend and no pyplot: what Jupyter
    or a matplotlibrc asks for can't end the phase.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415  (a second that --help need not wait)

        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams["text.parse_math"] = False  # a class may be called a$b
            return confusion_png(metrics)
    except Exception as error:
        log.warning("warning: %s is left out: %s", config.CONFUSION_MATRIX, error)
        return b""


def confusion_png(metrics: Mapping[str, Any]) -> bytes:
    from matplotlib.figure import Figure  # noqa: PLC0415

    counts = np.array(metrics["evaluation"]["confusion_matrix"])
    names = [shortened(name) for name in metrics["class_names"]]
    shares = counts / counts.sum(axis=1, keepdims=True)
    side = min(2.5 + len(names), 16)
    drawing = Figure(figsize=(side + 0.5, side))
    axes = drawing.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places = np.arange(len(names))
    axes.set_xticks(places, names, rotation=90 if len(names) > 5 else 0)
    axes.set_yticks(places, names)
    axes.set(xlabel="class by the descriptions", ylabel="true class")
    for (row, column), count in np.ndenumerate(counts if len(names) <= 20 else []):
        share = shares[row, column]
        text, colour = f"{round(count, 1):g}\n{share:.0%}", "w" if share > 0.5 else "k"
        axes.text(column, row, text, ha="center", va="center", color=colour)
    axes.set_title(
        f"Held-out images, {metrics['k_measured']} {metrics['asked']} descriptions\n"
        f"accuracy {shown(metrics['evaluation']['accuracy'])} of {metrics['images']}"
    )
    drawing.tight_layout()
    file = io.BytesIO()
    drawing.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


# --- Report ---------------------------------------------------------------------------


def shown(values: Mapping[str, Any]) -> str:
    """An estimate with its interval."""
    interval = "-".join(f"{limit:.2f}" for limit in values.get("interval", ()))
    return f"{values['value']:.2f}" + (f" ({interval})" if interval else "")


def points(gap: Mapping[str, Any]) -> str:
    low, high = (100 * limit for limit in gap["interval"])
    return f"{100 * gap['value']:+.0f} points ({low:+.0f} to {high:+.0f})"


def shortened(name: str) -> str:
    cut = len(name) > SHOWN_LETTERS
    return name[: SHOWN_LETTERS - 1] + "…" if cut else name


def report_lines(metrics: Mapping[str, Any], verbose: bool) -> Iterable[str]:
    """The estimates in the order in which they should be read."""
    conditions, part = metrics["conditions"], metrics["finished_only"]
    yield (
        (f"{part['images']} of {part['labelled']} labelled images" if part else "")
        or f"{metrics['images']} images"
    ) + (
        f", {metrics['rows']} rows, described by {conditions.get('vlm')}, embedded by "
        f"{conditions.get('embedder')}"
    )
    yield ""
    yield from decision_lines(metrics)
    yield ""
    yield from reader_lines(metrics)
    yield ""
    yield from class_lines(metrics)
    yield ""
    yield from confusion_lines(metrics)
    yield "\nAccuracy of the descriptions, counted in other ways"
    for name, value in metrics["comparison"].items():
        yield f"  {name:<50} {value if isinstance(value, str) else shown(value)}"
    yield "\nChecks"
    for check in metrics["checks"]:
        yield f"  {check['name']:<16} {check['finding']}"
    yield ""
    yield from suspect_lines(metrics, verbose)
    yield from (f"WARNING: {warning}" for warning in metrics["warnings"])


def decision_lines(metrics: Mapping[str, Any]) -> Iterable[str]:
    """What a user of phase 4 will see."""
    found, splits, unknown = (
        metrics["decision"],
        metrics["splits"],
        metrics["unknown_classes"],
    )
    stages = " or ".join(metrics["thresholds"]["stages"])
    yield f"What phase 4 will do: new images, {stages} {metrics['asked']} descriptions each"
    yield (
        f"(held out by {splits['group_by']}, {splits['groups']} groups in "
        f"{splits['folds']} folds, {splits['repeats']} times; brackets: 95 % intervals)"
    )
    worst = found["classes"][found["worst"]]
    yield (
        f"  answered           {shown(found['answered'])} of known images; the others "
        f'get "{config.INCONCLUSIVE}"'
    )
    yield f"  wrong              {shown(found['wrong'])} of the answers"
    yield (
        f"  worst class        {shortened(found['worst'])}: "
        f"{shown(worst['wrong'])} of its {worst['answered']:.3g} answers"
    )
    if unknown:
        yield (
            f"  unknown images     {shown(unknown['refused'])} refused, of a class that "
            "was left out of training"
        )
    else:
        yield "  unknown images     not measured: needs three classes"
    low, high = found["questions"]["interval"]
    yield (
        f"  questions          {found['questions']['value']:.1f} ({low:.1f}-{high:.1f}) "
        "per known image"
    )
    alone = found["one_reader"]
    yield (
        f"  with --one-reader  {shown(alone['answered'])} answered, "
        f"{shown(alone['wrong'])} wrong"
    )
    yield f"  {promise_line(found, metrics)}"


def promise_line(found: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    promised, answers = found["promise"], found["wrong"]["n"]
    if not answers:
        return "nothing is answered, and nothing can be promised"
    line = f"{answers:.3g} answers promise, with {promised['with']:.0%} confidence, "
    line += f"at most {promised['share']:.1%} of errors"
    if promised["share"] > metrics["max_error"] and promised["answers_needed"]:
        line += (
            f", not {metrics['max_error']:.0%}: {promised['answers_needed']} answers "
            "without an error would"
        )
    return line


def reader_lines(metrics: Mapping[str, Any]) -> Iterable[str]:
    found, accuracy = metrics["readers"], metrics["evaluation"]["accuracy"]
    yield "Each reader alone, asked for a class of every image"
    yield (
        f"  descriptions       {shown(found['descriptions'])} right, "
        f"{accuracy['value'] * accuracy['n']:.3g} of {metrics['images']} images"
    )
    yield f"  picture            {shown(found['picture'])} right, without any question"
    yield (
        f"  both agree         {shown(found['agree'])}, and are then right in "
        f"{shown(found['right_where_they_agree'])}"
    )
    yield f"  descriptions add   {points(found['gain'])} to the picture"
    yield (
        "  (Where they add nothing, and unknown images are rare, don't spend hours on a "
        "VLM.)"
    )


def class_lines(metrics: Mapping[str, Any]) -> Iterable[str]:
    found, answered = metrics["evaluation"], metrics["decision"]["classes"]
    yield f"  commonest class    {found['majority_rate']:.2f}"
    yield f"  balanced accuracy  {shown(found['balanced_accuracy'])}"
    rows = sorted(
        found["classes"], key=lambda n: found["classes"][n]["recall"]["value"]
    )
    rows = [n for n in found["classes"] if n in rows[:SHOWN_ROWS]]
    width = max(len(shortened(name)) for name in rows)
    yield f"\n  {'':<{width}} images  {'precision':<18}{'recall':<18}F1    answers"
    for name in rows:
        each = found["classes"][name]
        both = "  ".join(f"{shown(each[key]):<16}" for key in ("precision", "recall"))
        yield (
            f"  {shortened(name):<{width}} {each['images']:>6}  {both}  "
            f"{shown(each['f1'])}  {answered[name]['answered']:>5.3g}"
        )
    if len(found["classes"]) > len(rows):
        yield f"  (the worst {len(rows)}; the others are in {config.METRICS})"


def confusion_lines(metrics: Mapping[str, Any]) -> Iterable[str]:
    """The confusion matrix, or of many classes the commonest confusions."""
    names = [shortened(name) for name in metrics["class_names"]]
    counts = np.array(metrics["evaluation"]["confusion_matrix"])
    yield f"  Images by the descriptions, mean of {metrics['splits']['repeats']} repeats"
    if len(names) > SHOWN_COLUMNS:
        errors = counts - np.diag(np.diag(counts))
        for flat in np.argsort(-errors, axis=None, kind="stable")[:SHOWN_ROWS]:
            row, column = np.unravel_index(flat, counts.shape)
            if errors[row, column]:
                yield f"  {counts[row, column]:>5.1f}  {names[row]} -> {names[column]}"
        return
    width = max(8, *map(len, names))
    yield f"  {'is':<{width}}" + "".join(f"  {'-> ' + n:>{width + 3}}" for n in names)
    for name, row in zip(names, counts, strict=True):
        cells = "".join(f"  {round(count, 1):>{width + 3}g}" for count in row)
        yield f"  {name:<{width}}{cells}"


def suspect_lines(metrics: Mapping[str, Any], verbose: bool) -> Iterable[str]:
    """Images whose label may be wrong: the first five, or with --verbose all."""
    wrong = [
        each
        for each in metrics["held_out"]
        if each["descriptions_say"] != each["class"]
    ]
    for each in wrong if verbose else wrong[:5]:
        yield (
            f"is the label right? {each['file']}: {each['own_probability']:.1%} for "
            f"{each['class']}; descriptions say {each['descriptions_say']}, picture says "
            f"{each['picture_says']}"
        )
    if len(wrong) > 5 and not verbose:
        yield f"({len(wrong) - 5} more with --verbose, or in {config.METRICS})"


def find_warnings(
    data: Dataset, metrics: Mapping[str, Any], cfg: Config
) -> Iterable[str]:
    """What a reader of the estimates must not miss."""
    found, splits, decision = (
        metrics["evaluation"],
        metrics["splits"],
        metrics["decision"],
    )
    if not data.n_generic:
        yield (
            "NO ROW WAS ASKED WITH THE GENERIC PROMPTS: what phase 4 does can't be "
            "measured, and these figures are of prompts that give the class away. Run "
            "phase 2 with a --generic-share above 0"
        )
    if metrics["k_measured"] < metrics["k"]:
        yield (
            f"measured with {metrics['k_measured']} descriptions, all that the "
            f"dataset has of an image; phase 4 asks {metrics['k']}"
        )
    if splits["group_by"] != "image":
        yield (
            f"the intervals count images, but those of one {splits['group_by']} are "
            f"alike: with {splits['groups']} groups the truth may lie outside"
        )
    if splits["folds"] < cfg.folds:
        yield f"{splits['folds']} folds only: the smallest class has no more"
    if min(np.bincount(data.labels)) < 20:
        yield "fewer than 20 images in a class: see how wide the intervals are"
    if found["accuracy"]["interval"][0] <= found["majority_rate"]:
        yield "not shown to be better than always answering the commonest class"
    if metrics["readers"]["gain"]["interval"][0] <= 0:
        yield "not shown that the descriptions are better than the picture alone"
    yield from threshold_warnings(metrics, decision["wrong"], cfg)
    yield from (check["warning"] for check in metrics["checks"] if check["warning"])


def threshold_warnings(
    metrics: Mapping[str, Any], wrong: Mapping[str, Any], cfg: Config
) -> Iterable[str]:
    """Classes without a threshold, and errors above what was aimed at."""
    stages = metrics["thresholds"]["stages"].values()
    silent = [
        shortened(name)
        for name in metrics["class_names"]
        if all(each["confidence"][name] >= NEVER for each in stages)
    ]
    if len(silent) == len(metrics["class_names"]):
        yield f'no confidence is safe: phase 4 will only say "{config.INCONCLUSIVE}"'
    elif silent:
        some = ", ".join(silent[:5]) + (" …" if len(silent) > 5 else "")
        yield f"no confidence is safe for {some}: never answered"
    if wrong["n"] and wrong["value"] > cfg.max_error:
        yield (
            f"{wrong['value']:.1%} of the answers were wrong, though the thresholds aim "
            f"at {cfg.max_error:.0%}"
        )
    elif wrong["n"] and wrong["interval"][1] > cfg.max_error:
        yield (
            f"the share of errors may be up to {wrong['interval'][1]:.1%}: the "
            f"thresholds aim at {cfg.max_error:.0%} and don't promise it"
        )


# --- The phase ------------------------------------------------------------------------


def describe_training(data: Dataset, splits: Sequence[Split], cfg: Config) -> Any:
    """With what the model was made: phase 4 compares it with what it finds."""
    repeats = splits[-1][0] + 1
    return {
        "program_version": config.PROGRAM_VERSION,
        "libraries": {name: version(name) for name in LIBRARIES},
        "class_names": data.classes,
        "conditions": data.manifest["conditions"],
        "probe_vector": data.manifest["probe_vector"],
        "dataset": data.manifest["sha256"],
        "finished_only": data.manifest.get("finished_only"),
        "modalities": modalities(data),
        "images": len(data.labels),
        "rows": data.n_rows,
        "features": data.vectors.shape[1],
        "k": cfg.inference_descriptions,
        "k_measured": data.described.shape[1],
        "asked": "generic" if data.n_generic else "class-specific",
        "splits": {
            "group_by": cfg.group_by,
            "groups": len(np.unique(data.groups)),
            "folds": len(splits) // repeats,
            "repeats": repeats,
        },
        "seed": cfg.seed,
        "max_error": cfg.max_error,
        "known_refused": cfg.known_refused,
    }


def count_accuracies(data: Dataset, judged: Judged, mixed: float) -> dict[str, Any]:
    """Accuracies by number of descriptions, and one that flatters, by their names."""
    table: dict[str, Any] = {
        "optimistic, rows of one image on both sides": {"value": mixed}
    }
    for name, scores in judged.scores.items():
        right = float((scores.argmax(axis=-1) == data.labels).mean())
        if name == "class-specific":
            table["asked with the prompts of their class"] = {"value": right}
        else:
            label = f"{name} description{'s' if name != '1' else ''}"
            table[label] = estimate(right, len(data.labels))
    return table


def run(cfg: Config) -> int:
    """Evaluate, check, fit and report; returns the exit code."""
    data = load_dataset(cfg.folder("dataset_dir"), cfg)
    n_folds, k = count_folds(data, cfg), data.described.shape[1]
    repeats = int(np.clip(300 // len(data.labels), 1, 5))
    splits = make_splits(data.labels, data.groups, n_folds, repeats, cfg.seed)
    if not trainable(data.labels, splits):
        raise PipelineError(
            f"held out by {cfg.group_by}, a class has no image left to train on: use "
            "fewer --folds or --group-by image"
        )
    candidates = [(cfg.kernel, cfg.c), *SEARCH[cfg.search]]
    wanted = cfg.inference_descriptions
    stages = [FIRST_STAGE, wanted] if k > FIRST_STAGE else [wanted]
    plan = make_plan(data, splits, candidates[0], cfg)
    searches = 1 + (len(candidates) > 1)
    progress = Progress(len(splits) * searches + plan.trainings(data), cfg.quiet)
    metrics = describe_training(data, splits, cfg)

    log.info("evaluating on held-out images")
    judged = hold_out(data, splits, candidates, cfg.seed, progress)
    scores = judged.scores[str(k)]
    right = scores.argmax(axis=-1) == data.labels
    metrics["evaluation"] = evaluate(data, scores)
    mixed = mixed_accuracy(data, candidates[0], cfg.seed)
    metrics["comparison"] = count_accuracies(data, judged, mixed)
    said = judged.picture_scores.argmax(axis=-1)
    metrics["readers"] = compare_readers(
        right, said == data.labels, said == scores.argmax(axis=-1)
    )

    log.info("checking for leaks")
    accuracy = float(right.mean())
    metrics["checks"] = [
        check_prompts(data, plan, progress),
        check_specific(data, plan, right, progress),
        check_headers(data, plan, accuracy),
        check_unseen(data, plan, accuracy, progress),
        check_time(data, plan, progress),
    ]

    log.info("choosing thresholds")
    everything = np.ones(len(data.labels), bool)
    chosen = choose_candidate(data, everything, candidates, cfg.seed)
    if len(candidates) > 1:  # those scores are of several models, each on its scale
        judged = hold_out(data, splits, [chosen], cfg.seed, progress)
    metrics["thresholds"] = find_thresholds(data, judged, everything, stages, cfg)
    decided = cross_fit(data, judged, splits, stages, cfg)
    metrics["decision"] = rate_decisions(data, decided, cfg)
    metrics["confidence"] = rate_confidence(data, decided)
    metrics["held_out"] = list_images(data, judged, decided)
    metrics["unknown_classes"] = leave_classes_out(
        data, replace(plan, candidate=chosen), stages, cfg, progress
    )
    progress.close()

    metrics["warnings"] = list(find_warnings(data, metrics, cfg))
    write_model(cfg.folder("model_dir"), data, chosen, metrics)
    print(*report_lines(metrics, cfg.verbose), sep="\n")
    print(f"\nmodel and figures in {cfg.folder('model_dir')}")
    print("next: python fase4_inferencia_vlm.py FILE_OR_FOLDER …")
    return utils.EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: flags, logging, one line for what a user can mend."""
    cfg, _ = config.parse_config(3, __doc__ or "", argv)
    utils.start_logging(log, cfg)
    return utils.exit_code(lambda: run(cfg), log.error)


if __name__ == "__main__":
    raise SystemExit(main())
