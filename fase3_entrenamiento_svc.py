"""Phase 3: train the SVC on the vectors, and say honestly how good it is.

Reads   dataset_final_vlm/         what phase 2 wrote
        datos_etiquetados/         for the pixel baseline and --group-by (if there)
        f1_descomprimidos/         manifiesto.csv, for the header check (if there)
Writes  modelo_final_vlm/
          clasificador_svc.joblib  scaled vectors -> class probabilities
          escalador.joblib         StandardScaler of the vectors
          vecinos.npz              generic rows of the training images, for novelty
          matriz_de_confusion.png  of images held out, asked as phase 4 asks
          metricas.json            every figure, the thresholds, with what it was made

The accuracy that it prints is phase 4's own: images that the model has not seen,
generic descriptions only, averaged into one decision per image.

    python fase3_entrenamiento_svc.py
    python fase3_entrenamiento_svc.py --search short --group-by day
"""

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pydicom
import seaborn
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC

import config
import utils
from config import Config
from utils import Neighbours, PipelineError

log = logging.getLogger("fase3")

Floats = NDArray[np.float64]
Integers = NDArray[np.intp]
Booleans = NDArray[np.bool_]

PHASE_2 = "run `python fase2_generar_vectores_vlm.py`"
LIBRARIES = ("scikit-learn", "numpy", "scipy", "joblib")
CHUNK_ROWS = 512
INNER_FOLDS = 3
PERMUTATION_TRIES = 200
PROMPT_GAP = 0.15
"""Points lost between the prompts of the class and generic ones that give a warning."""
HEADER_GAP = 0.05
"""A header field this close to the model's accuracy gives a warning."""
Z = 1.959964
"""97.5 % quantile of the normal distribution: the limits of 95 % intervals."""
GROUP_KEYWORDS = {
    "detector": ("DetectorID", "DeviceSerialNumber"),
    "station": ("StationName", "DeviceSerialNumber"),
    "day": ("AcquisitionDate", "AcquisitionDateTime", "ContentDate", "StudyDate"),
    "study": ("StudyInstanceUID",),
}
HEADER_FIELDS = ("modality", "manufacturer", "detector", "size", "day", "kvp", "mas")

# --- The dataset --------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """What phase 2 wrote: rows (descriptions) of images, images of classes."""

    rows: NDArray[np.float32]
    """(n_rows, n_features), memory-mapped."""
    image: Integers
    """(n_rows,), the image that each row describes."""
    generic: Booleans
    """(n_rows,), whether a generic prompt was asked, as phase 4 will."""
    labels: Integers
    """(n_images,), index in `classes`."""
    classes: list[str]
    files: list[str]
    """(n_images,), relative to the labelled folder."""
    manifest: dict[str, Any]

    @property
    def deciding(self) -> Booleans:
        """(n_rows,), the rows that held-out images are judged by: the generic ones."""
        return self.generic if self.generic.any() else ~self.generic

    @property
    def deciding_per_image(self) -> int:
        """Descriptions that every image can be judged by."""
        return int(
            np.bincount(self.image[self.deciding], minlength=len(self.files)).min()
        )


def load_dataset(folder: Path) -> Dataset:
    """Read and check phase 2's folder.

    Raises
    ------
    PipelineError
        Not finished, changed since, or files that don't match each other.
    """
    manifest = utils.read_json(folder / config.MANIFEST, PHASE_2)
    for name in (config.DATASET_X, config.DATASET_Y, config.DATASET_ROWS):
        check_digest(folder / name, manifest.get("sha256", {}).get(name))
    rows, y = (
        load_array(folder / config.DATASET_X),
        load_array(folder / config.DATASET_Y),
    )
    table = utils.read_csv(folder / config.DATASET_ROWS)
    check_arrays(folder, rows, y, table)
    images = list(dict.fromkeys(line["image_id"] for line in table))
    index = {image: number for number, image in enumerate(images)}
    of_image = {line["image_id"]: line for line in table}
    classes = sorted(set(y.tolist()))
    if len(classes) < 2:
        raise PipelineError(
            f"{folder} holds one class only ({classes[0]}): label images of at least "
            f"one more class and {PHASE_2}"
        )
    return Dataset(
        rows=rows,
        image=np.array([index[line["image_id"]] for line in table], np.intp),
        generic=np.array([line["prompt_set"] == "generic" for line in table]),
        labels=np.array([classes.index(of_image[i]["class"]) for i in images], np.intp),
        classes=classes,
        files=[of_image[image]["file"] for image in images],
        manifest=manifest,
    )


def check_digest(path: Path, expected: str | None) -> None:
    if not path.is_file():
        raise PipelineError(f"{path} is missing: {PHASE_2}")
    if utils.sha256_of(path) != expected:
        raise PipelineError(
            f"{path} is not the file that {config.MANIFEST} describes (changed, "
            f"damaged or from another run): {PHASE_2}"
        )


def load_array(path: Path) -> NDArray[Any]:
    """Map a .npy file into memory; pickled objects are refused, not loaded."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise PipelineError(f"{path} can't be read ({error}): {PHASE_2}") from None
    return array


def check_arrays(
    folder: Path, rows: NDArray[Any], y: NDArray[Any], table: list[dict[str, str]]
) -> None:
    """Refuse arrays that don't match each other or the contract."""
    problem = ""
    if rows.dtype != np.float32 or rows.ndim != 2:
        problem = f"{config.DATASET_X} is {rows.dtype} {rows.shape}, not float32 (n, d)"
    elif y.dtype.kind != "U" or y.ndim != 1:
        problem = f"{config.DATASET_Y} is {y.dtype} {y.shape}, not text (n,)"
    elif not len(rows) == len(y) == len(table) > 0:
        problem = (
            f"{config.DATASET_X} has {len(rows)} rows, {config.DATASET_Y} {len(y)}, "
            f"{config.DATASET_ROWS} {len(table)}"
        )
    elif not {"image_id", "file", "class", "prompt_set"} <= set(table[0]):
        problem = f"{config.DATASET_ROWS} lacks columns"
    elif [line["class"] for line in table] != y.tolist():
        problem = f"{config.DATASET_Y} and {config.DATASET_ROWS} name other classes"
    elif not all(np.isfinite(chunk).all() for chunk in chunks(rows)):
        problem = f"{config.DATASET_X} holds values that are not finite"
    if problem:
        raise PipelineError(f"{folder}: {problem}: {PHASE_2}")


def chunks(rows: NDArray[np.float32]) -> Iterable[NDArray[np.float32]]:
    """The rows, a few at a time, so that they never all lie in memory."""
    return (rows[i : i + CHUNK_ROWS] for i in range(0, len(rows), CHUNK_ROWS))


# --- Vectors: averages of scaled rows, and their inner products -----------------------


@dataclass(frozen=True)
class Model:
    """The hyper-parameters."""

    kernel: str
    c: float
    gamma: float
    """Times 1/n_features, which is what scikit-learn's "scale" is for scaled rows."""
    pool: int
    """Rows of one image and kind that are averaged into one training vector."""


@dataclass(frozen=True)
class Space:
    """Training vectors and probes (vectors that images are judged by), as one matrix.

    Every fold is a sub-matrix of `gram`. The scaler behind it has seen the held-out
    images, without their labels: means and standard deviations of single features.
    Refitting it in every fold would take a matrix per fold and changes no figure (see
    tests/benchmarks/bench_fase3.py).
    """

    vectors: NDArray[np.float32]
    """(n_vectors, n_features), the training vectors, scaled."""
    image: Integers
    generic: Booleans
    weight: Floats
    """(n_vectors,) each: image, kind and sample weight of the training vectors."""
    gram: NDArray[np.float32]
    """(n_vectors + n_probes * n_images, n_vectors), inner products."""
    squares: NDArray[np.float32]
    """Squared norms of the rows of `gram`."""
    probes: tuple[str, ...]

    @property
    def n_images(self) -> int:
        return int(self.image.max()) + 1

    def probe_rows(self, probe: str, images: Booleans) -> Integers:
        """Rows of `gram` that hold this probe of these images."""
        start = len(self.image) + self.probes.index(probe) * self.n_images
        return start + np.flatnonzero(images)

    def kernel(self, model: Model, rows: Integers, columns: Integers) -> NDArray[Any]:
        """Sub-matrix of the kernel matrix."""
        products = self.gram[np.ix_(rows, columns)]
        if model.kernel == "linear":
            return products
        distances = self.squares[rows, None] + self.squares[columns] - 2 * products
        gamma = model.gamma / self.vectors.shape[1]
        return np.exp(-gamma * np.maximum(distances, 0))


def fit_scaler(rows: NDArray[np.float32]) -> StandardScaler:
    """Mean and standard deviation of every feature over all rows."""
    scaler = StandardScaler()
    for chunk in chunks(rows):
        scaler.partial_fit(chunk)
    return scaler


def make_space(dataset: Dataset, scaler: StandardScaler, pool: int, k: int) -> Space:
    """Average rows into training vectors and probes, scale them, multiply them.

    An average of scaled rows is the scaled average of the rows, so that one pass over
    the rows in the file gives every vector.
    """
    groups, image, generic = pool_rows(dataset, pool)
    probes = probe_groups(dataset, k)
    averages = averaging_matrix(
        [*groups, *sum(probes.values(), [])], len(dataset.image)
    )
    scaled = scaler.transform(np.asarray(averages @ dataset.rows, np.float32))
    vectors = scaled[: len(groups)]
    return Space(
        vectors=vectors,
        image=image,
        generic=generic,
        weight=vector_weights(generic),
        gram=scaled @ vectors.T,
        squares=np.einsum("ij,ij->i", scaled, scaled),
        probes=tuple(probes),
    )


def pool_rows(dataset: Dataset, pool: int) -> tuple[list[Integers], Integers, Booleans]:
    """Rows of every training vector, its image and its kind.

    Every n-th row of one image and kind goes to the same vector, so that each mixes
    early and late prompts.
    """
    groups: list[Integers] = []
    owners: list[tuple[int, bool]] = []
    for image, kind in product(range(len(dataset.files)), (False, True)):
        rows = np.flatnonzero((dataset.image == image) & (dataset.generic == kind))
        n_vectors = -(-len(rows) // pool)
        groups += [rows[first::n_vectors] for first in range(n_vectors)]
        owners += [(image, kind)] * n_vectors
    images, kinds = zip(*owners, strict=True)
    return groups, np.array(images, np.intp), np.array(kinds, bool)


def probe_groups(dataset: Dataset, k: int) -> dict[str, list[Integers]]:
    """Rows that every image is judged by: "protocol", "own", and "k=..." for the table.

    As in phase 4, k descriptions are those of the first k generic prompts.
    """
    rows_of = [np.flatnonzero(dataset.image == i) for i in range(len(dataset.files))]
    deciding = [rows[dataset.deciding[rows]] for rows in rows_of]
    probes = {"protocol": [rows[:k] for rows in deciding]}
    for count in config.PROTOCOL_TABLE:
        if count <= dataset.deciding_per_image:
            probes[f"k={count}"] = [rows[:count] for rows in deciding]
    if dataset.generic.any() and not dataset.generic.all():
        probes["own"] = [rows[~dataset.generic[rows]] for rows in rows_of]
    return probes


def averaging_matrix(groups: Sequence[Integers], n_rows: int) -> Any:
    """Sparse float32 (n_groups, n_rows): each row of the product is a group's mean."""
    sizes = np.array([len(group) for group in groups])
    weights = np.repeat(1 / sizes, sizes).astype(np.float32)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    columns = np.concatenate(groups)
    return csr_array((weights, columns, starts), shape=(len(groups), n_rows))


def vector_weights(generic: Booleans) -> Floats:
    """Sample weights, (n_vectors,): both kinds of rows weigh alike in all."""
    own, asked = np.count_nonzero(~generic), np.count_nonzero(generic)
    return np.where(generic & (own > 0), own / max(asked, 1), 1.0)


def choose_pool(dataset: Dataset) -> int:
    """The smallest pool that keeps the fits affordable."""
    kinds = Counter(zip(dataset.image.tolist(), dataset.generic.tolist(), strict=True))
    for pool in config.POOL_SIZES:
        if sum(-(-n // pool) for n in kinds.values()) <= config.TRAINING_VECTORS_MAX:
            break
    return pool


# --- 1. Evaluation: images held out, judged as phase 4 judges -------------------------


@dataclass(frozen=True)
class Experiment:
    """Who is trained on whom: everything that a figure depends on."""

    spaces: Mapping[int, Space]
    """By pool size."""
    models: Sequence[Model]
    """Candidates; where there are several, each training side chooses among them."""
    labels: Integers
    groups: Integers
    """(n_images,), what must not be on both sides of a split."""
    folds: Integers
    """(n_repeats, n_images), the fold that holds an image out; -1 keeps it out of all."""
    seed: int

    @cached_property
    def n_classes(self) -> int:
        return int(self.labels.max()) + 1

    def splits(self) -> Iterable[tuple[int, Booleans, Booleans]]:
        """Repeat, training images and held-out images of every fold."""
        for repeat, folds in enumerate(self.folds):
            for fold in range(int(folds.max()) + 1):
                yield repeat, (folds >= 0) & (folds != fold), folds == fold


def read_groups(dataset: Dataset, cfg: Config) -> Integers:
    """Group number of every image, from the headers of the labelled files."""
    if cfg.group_by == "image":
        return np.arange(len(dataset.files))
    values = [
        header_value(cfg.folder("labelled_dir") / file, cfg.group_by)
        for file in dataset.files
    ]
    return np.unique(values, return_inverse=True)[1]


def header_value(path: Path, group_by: str) -> str:
    """The first attribute that is there; images without any form one group."""
    keywords = GROUP_KEYWORDS[group_by]
    try:
        header = pydicom.dcmread(
            path, stop_before_pixels=True, force=True, specific_tags=list(keywords)
        )
    except OSError as error:
        raise PipelineError(
            f"--group-by {group_by} reads the headers of the labelled files, but "
            f"{path} can't be read ({error.strerror}): put it back or use "
            "--group-by image"
        ) from None
    found = next((str(header[word].value) for word in keywords if word in header), "")
    return found[:8] if group_by == "day" else found


def count_folds(dataset: Dataset, groups: Integers, cfg: Config) -> int:
    """Folds that every class has enough groups for; fewer than 2 is an error."""
    n_groups = groups_per_class(dataset.labels, groups)
    fewest, name = min(zip(n_groups, dataset.classes, strict=True))
    if fewest < 2 and cfg.group_by == "image":
        raise PipelineError(
            f"class {name} has 1 image and needs at least 2 (20 or more for figures "
            f"that mean something): label 1 more and {PHASE_2}"
        )
    if fewest < 2:
        raise PipelineError(
            f"every image of class {name} has the same {cfg.group_by}, so it can't be "
            f"held out by {cfg.group_by}: add images of another {cfg.group_by} or use "
            "--group-by image"
        )
    return min(cfg.folds, fewest)


def groups_per_class(labels: Integers, groups: Integers) -> list[int]:
    return [len(np.unique(groups[labels == label])) for label in np.unique(labels)]


def make_folds(labels: Integers, groups: Integers, n_folds: int, seed: int) -> Integers:
    """Fold number of every image, (n_images,): stratified, groups kept together."""
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    folds = np.zeros(len(labels), np.intp)
    for fold, (_, held_out) in enumerate(splitter.split(labels, labels, groups)):
        folds[held_out] = fold
    return folds


def trainable(labels: Integers, folds: Integers) -> bool:
    """Whether every training side of every repeat holds every class."""
    n_classes = len(np.unique(labels))
    return all(
        len(np.unique(labels[row != fold])) == n_classes
        for row in np.atleast_2d(folds)
        for fold in range(int(row.max()) + 1)
    )


def class_scores(svc: SVC, kernel: NDArray[Any], n_classes: int) -> NDArray[np.float64]:
    """Sums of the one-against-one decisions, (n_samples, n_classes).

    Not scikit-learn's "ovr" form, whose votes make steps that can't be calibrated.
    """
    return np.asarray(svc.decision_function(kernel).reshape(len(kernel), -1)) @ (
        sums_of_pairs(n_classes).T
    )


def sums_of_pairs(n_classes: int) -> Floats:
    """(n_classes, n_pairs): +1 where a decision speaks for a class, -1 against it.

    scikit-learn's order of pairs; of two classes a positive decision means the second.
    """
    if n_classes == 2:
        return np.array([[-1.0], [1.0]])
    pairs = [(i, j) for i in range(n_classes) for j in range(i + 1, n_classes)]
    matrix = np.zeros((n_classes, len(pairs)))
    for column, (first, second) in enumerate(pairs):
        matrix[first, column], matrix[second, column] = 1, -1
    return matrix


def train(space: Space, model: Model, labels: Integers, use: Integers) -> SVC:
    """The SVC on training vectors `use`, by their kernel matrix."""
    svc = SVC(kernel="precomputed", C=model.c, decision_function_shape="ovo")
    kernel = space.kernel(model, use, use)
    return svc.fit(kernel, labels[space.image[use]], space.weight[use])


def held_out_scores(
    study: Experiment, probes: Sequence[str], kind: bool | None = None
) -> dict[str, Floats]:
    """Train without each fold, score its images: (n_repeats, n_images, n_classes).

    `kind` restricts the training to generic (True) or own-prompt (False) vectors.
    """
    shape = (*study.folds.shape, study.n_classes)
    scores = {probe: np.zeros(shape) for probe in probes}
    for repeat, training, held_out in study.splits():
        model = choose_model(study, training)
        space = study.spaces[model.pool]
        chosen = training[space.image]
        if kind is not None:
            chosen &= space.generic == kind
        use = np.flatnonzero(chosen)
        svc = train(space, model, study.labels, use)
        for probe in probes:
            kernel = space.kernel(model, space.probe_rows(probe, held_out), use)
            scores[probe][repeat, held_out] = class_scores(svc, kernel, study.n_classes)
    return scores


def choose_model(study: Experiment, images: Booleans) -> Model:
    """The candidate that is best in folds among these images; the first of equals."""
    if len(study.models) == 1:
        return study.models[0]
    labels, groups = study.labels[images], study.groups[images]
    n_folds = min(INNER_FOLDS, min(groups_per_class(labels, groups)))
    if n_folds < 2:
        return study.models[0]
    folds = np.full((1, len(images)), -1)
    folds[0, images] = make_folds(labels, groups, n_folds, study.seed)
    right = []
    for model in study.models:
        inner = replace(study, models=[model], folds=folds)
        scores = held_out_scores(inner, ["protocol"])["protocol"]
        right.append(correct(scores, study.labels)[:, images].mean())
    return study.models[int(np.argmax(right))]


def correct(scores: Floats, labels: Integers) -> Booleans:
    """Whether the highest score is the image's class, (n_repeats, n_images)."""
    return np.asarray(scores.argmax(axis=-1) == labels)


# Intervals. Repeats are averaged: they are the same images, so n stays their number.


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n (Wilson, JASA 22 (1927) 209); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    centre = share + Z * Z / (2 * n)
    half = Z * np.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def figure(share: float, n: float) -> dict[str, Any]:
    """A share, its 95 % interval and how many images it is a share of."""
    return {"value": float(share), "interval": list(wilson(share, n)), "n": float(n)}


def mean_figure(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of independent shares with the MOVER interval.

    Zou and Donner, Statistics in Medicine 27 (2008) 1693: the distances of the limits
    from their estimates add in squares.
    """
    value = float(np.mean([part["value"] for part in parts]))
    limits = np.array([part["interval"] for part in parts])
    distances = limits - np.array([[part["value"]] for part in parts])
    low, high = np.sqrt(np.sum(distances**2, axis=0)) / len(parts)
    interval = [max(0.0, value - float(low)), min(1.0, value + float(high))]
    return {"value": value, "interval": interval, "n": sum(part["n"] for part in parts)}


def difference(first: Booleans, second: Booleans) -> dict[str, Any]:
    """Difference of two accuracies on the same images, with its 95 % interval.

    Agresti and Min, Statistics in Medicine 24 (2005) 729: half an image is added to
    each cell of the paired table, so that no difference at all still has an interval.
    """
    n = first.shape[-1] + 2.0
    gained = float(np.mean(first & ~second, axis=0).sum()) + 0.5
    lost = float(np.mean(~first & second, axis=0).sum()) + 0.5
    value = (gained - lost) / n
    half = Z * np.sqrt((gained + lost) / n - value**2) / np.sqrt(n)
    exact = float(np.mean(first) - np.mean(second))
    return {"value": exact, "interval": [float(value - half), float(value + half)]}


def confusion(scores: Floats, labels: Integers) -> Floats:
    """Images of each true class (rows) judged as each class, averaged over repeats."""
    n_classes = scores.shape[-1]
    counts = np.zeros((n_classes, n_classes))
    for judged in scores.argmax(axis=-1):
        np.add.at(counts, (labels, judged), 1 / len(scores))
    return counts


def class_figures(counts: Floats, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Precision, recall and F1 of every class.

    F1 = TP / (TP + (FP + FN) / 2) is given the interval of a share of its denominator.
    """
    figures = {}
    for number, name in enumerate(classes):
        right = counts[number, number]
        actual, judged = counts[number].sum(), counts[:, number].sum()
        both = (actual + judged) / 2
        figures[name] = {
            "images": round(float(actual)),
            "precision": figure(right / judged if judged else 0.0, judged),
            "recall": figure(right / actual, actual),
            "f1": figure(right / both, both),
        }
    return figures


# Confidence: one temperature turns summed decisions into probabilities.


def softmax(logits: Floats) -> Floats:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def fit_temperature(scores: Floats, labels: Integers) -> float:
    """The factor that makes softmax(factor * scores) most likely, from held-out scores.

    The target of the true class is (n + 1) / (n + 2) for n images of a class (Platt
    1999): 20 of 20 right don't prove a confidence of 1.

    Parameters
    ----------
    scores : ndarray, (n_repeats, n_images, n_classes)
    labels : ndarray, (n_images,)
    """
    n_classes = scores.shape[-1]
    n = np.bincount(labels, minlength=n_classes)[labels][:, None]
    targets = np.full((len(labels), n_classes), 1 / (n_classes - 1)) / (n + 2)
    targets[np.arange(len(labels)), labels] = (n[:, 0] + 1) / (n[:, 0] + 2)
    factors = np.geomspace(1e-3, 1e3, 601)
    losses = [
        -np.mean(targets * np.log(np.maximum(softmax(factor * scores), 1e-300)))
        for factor in factors
    ]
    return float(factors[int(np.argmin(losses))])


def choose_confidence(confidence: Floats, right: Booleans, max_error: float) -> float:
    """The lowest confidence down to which at most `max_error` of answers are wrong.

    Above 1 (nothing is answered) where too few images would be left to show it.
    """
    order = np.argsort(-confidence, kind="stable")
    ranked, answers = confidence[order], np.arange(1, len(order) + 1)
    errors = np.cumsum(~right[order]) / answers
    images, share = config.ANSWERED_AT_LEAST
    enough = answers >= max(images, share * len(order))
    last_of_ties = np.append(ranked[1:] < ranked[:-1], True)
    good = np.flatnonzero((errors <= max_error) & enough & last_of_ties)
    return float(ranked[good[-1]]) if good.size else 1.01


@dataclass(frozen=True)
class Confidence:
    """Calibrated answers to held-out images; factor and threshold not fitted on them."""

    probabilities: Floats
    """(n_repeats, n_images, n_classes)."""
    answered: Booleans
    """(n_repeats, n_images)."""


def cross_fit(
    study: Experiment, scores: Floats, strange: Booleans, max_error: float
) -> Confidence:
    """Fit factor and threshold on the other folds, apply them to each fold.

    `strange`, (n_images,), says which images novelty refuses anyway.
    """
    probabilities = np.zeros_like(scores)
    answered = np.zeros(scores.shape[:2], bool)
    for repeat, others, held_out in study.splits():
        factor = fit_temperature(
            scores[repeat : repeat + 1, others], study.labels[others]
        )
        shares = softmax(factor * scores[repeat])
        right = shares.argmax(axis=1) == study.labels
        known = others & ~strange
        limit = choose_confidence(shares[known].max(axis=1), right[known], max_error)
        probabilities[repeat, held_out] = shares[held_out]
        answered[repeat, held_out] = shares[held_out].max(axis=1) >= limit
    return Confidence(probabilities, answered & ~strange)


def calibration_error(probabilities: Floats, labels: Integers) -> float:
    """Expected calibration error in ten bins of the highest confidence."""
    highest = probabilities.max(axis=-1).ravel()
    right = correct(probabilities, labels).ravel()
    bins = np.minimum((highest * 10).astype(int), 9)
    gaps = np.bincount(bins, right, 10) - np.bincount(bins, highest, 10)
    return float(np.abs(gaps).sum() / len(highest))


def brier_score(probabilities: Floats, labels: Integers) -> float:
    """Mean squared distance of the confidences from the truth, 0 to 2."""
    truth = np.eye(probabilities.shape[-1])[labels]
    return float(np.mean(np.sum((probabilities - truth) ** 2, axis=-1)))


# --- 2. Checks: each can fail, and says so in words -----------------------------------


@dataclass(frozen=True)
class Check:
    """What a check found."""

    name: str
    finding: str
    warning: str
    figures: dict[str, Any]


def check_permuted(study: Experiment, n_permutations: int) -> Check:
    """Labels shuffled among the images: whatever is still right comes from a leak."""
    rng = np.random.default_rng(study.seed)
    rights: list[float] = []
    for _ in range(PERMUTATION_TRIES):
        if len(rights) == n_permutations:
            break
        labels = rng.permutation(study.labels)
        if trainable(labels, study.folds[:1]):
            shuffled = replace(study, labels=labels, folds=study.folds[:1])
            scores = held_out_scores(shuffled, ["protocol"])["protocol"]
            rights.append(float(correct(scores, labels).mean()))
    if not rights:
        return Check("permuted labels", "not measured: too few images", "", {})
    mean, majority = float(np.mean(rights)), majority_rate(study.labels)
    limit = majority + Z * np.sqrt(majority * (1 - majority) / len(study.labels))
    warning = (
        f"with shuffled labels {mean:.2f} is still right: something of an image is on "
        "both sides of the splits (copies or near-copies?), and no figure here holds"
    )
    return Check(
        "permuted labels",
        f"{mean:.2f} right (mean of {len(rights)}); chance is at most {majority:.2f}",
        warning if mean > limit else "",
        {"mean": mean, "values": rights, "limit": float(limit)},
    )


def check_prompts(study: Experiment) -> Check:
    """Trained on own-prompt rows alone: is it the image or the prompt that decides?"""
    name = "prompt dependence"
    space = study.spaces[study.models[0].pool]
    if "own" not in space.probes:
        return Check(name, "not measured: needs both kinds of prompts", "", {})
    scores = held_out_scores(
        replace(study, models=study.models[:1]), ["own", "protocol"], kind=False
    )
    own = correct(scores["own"], study.labels)
    generic = correct(scores["protocol"], study.labels)
    gap = difference(own, generic)
    warning = (
        "the class follows the prompt rather than the image: what the model learns "
        f"from the prompts of the class is worth {100 * gap['value']:.0f} points less "
        "on the generic prompts that phase 4 asks. Use a larger --generic-share"
    )
    return Check(
        name,
        f"trained on the prompts of the class: {own.mean():.2f} on such prompts, "
        f"{generic.mean():.2f} on generic ones",
        warning if gap["value"] >= PROMPT_GAP and gap["interval"][0] > 0 else "",
        {"own": float(own.mean()), "generic": float(generic.mean()), "gap": gap},
    )


def check_pixels(study: Experiment, statistics: Floats, right: Booleans) -> Check:
    """The same folds on a few image statistics: what do the descriptions add?"""
    plain = np.zeros(study.folds.shape, bool)
    for repeat, training, held_out in study.splits():
        svc = make_pipeline(StandardScaler(), SVC(C=10))
        svc.fit(statistics[training], study.labels[training])
        judged = svc.predict(statistics[held_out])
        plain[repeat, held_out] = judged == study.labels[held_out]
    gain = difference(right, plain)
    low, high = (100 * limit for limit in gain["interval"])
    finding = (
        f"{plain.mean():.2f} from {statistics.shape[1]} image statistics; the "
        f"descriptions add {100 * gain['value']:+.0f} points ({low:+.0f} to {high:+.0f})"
    )
    warning = "image statistics alone do as well: the vision model adds nothing proven"
    return Check(
        "pixel baseline",
        finding,
        warning if low <= 0 else "",
        {"accuracy": figure(float(plain.mean()), plain.shape[1]), "gain": gain},
    )


def image_statistics(grey: NDArray[np.uint8]) -> Floats:
    """Numbers that need no vision model, from the picture that it is shown.

    Levels, gradient, straightness of edges (share of the gradient in its strongest
    direction), radial profile and periodicity (share of the spectrum by frequency,
    and the strongest single frequency).
    """
    values = grey.astype(np.float64) / 255
    down, right = np.gradient(values)
    slope = np.hypot(down, right)
    directions = np.histogram(
        np.arctan2(down, right) % np.pi, 18, (0, np.pi), weights=slope**2
    )[0]
    offsets = np.arange(len(values)) - (len(values) - 1) / 2
    radius = np.hypot(offsets[:, None], offsets)
    rings = np.minimum(radius / radius.max() * 8, 7).astype(int).ravel()
    profile = np.bincount(rings, values.ravel(), 8) / np.bincount(rings, minlength=8)
    spectrum = np.abs(np.fft.rfft2(values - values.mean()))[: len(values) // 2] ** 2
    wave = np.hypot(*np.indices(spectrum.shape))
    bands = np.histogram(wave, [0, 3, 8, 20, 50, 500], weights=spectrum)[0]
    fine = np.where(wave > 8, spectrum, 0)
    return np.array(
        [
            values.mean(),
            values.std(),
            *np.percentile(values, [5, 50, 95]),
            slope.mean(),
            slope.std(),
            np.percentile(slope, 99),
            directions.max() / max(directions.sum(), 1e-9),
            *(profile - values.mean()),
            *bands / max(spectrum.sum(), 1e-9),
            fine.max() / max(fine.sum(), 1e-9),
        ]
    )


def check_headers(
    study: Experiment, columns: Mapping[str, Sequence[str]], right: Booleans
) -> Check:
    """Each header field alone, by majority vote: do acquisitions betray the class?"""
    name = "header fields"
    rights = {
        field: majority_by_value(study, np.unique(values, return_inverse=True)[1])
        for field, values in columns.items()
        if len(set(values)) > 1
    }
    if not rights:
        return Check(name, "not measured: no field differs between images", "", {})
    best = max(rights, key=lambda field: float(rights[field].mean()))
    share, n = float(rights[best].mean()), len(study.labels)
    chance = majority_rate(study.labels)
    suspicious = wilson(share, n)[0] > chance and share >= right.mean() - HEADER_GAP
    warning = (
        f"{best} alone, which is no part of the image, gives {share:.2f}: the model may "
        "have learnt how these images were taken. Try --group-by, and add images of "
        "every class from each device and day"
    )
    return Check(
        name,
        f"best of {len(rights)}: {best} alone gives {share:.2f}",
        warning if suspicious else "",
        {field: float(values.mean()) for field, values in rights.items()},
    )


def majority_by_value(study: Experiment, values: Integers) -> Booleans:
    """Held-out images judged by the commonest class among those of the same value."""
    right = np.zeros(study.folds.shape, bool)
    for repeat, training, held_out in study.splits():
        counts = np.zeros((int(values.max()) + 1, study.n_classes))
        np.add.at(counts, (values[training], study.labels[training]), 1)
        counts += counts.sum(axis=0) / (2 * len(values))  # decides for unseen values
        judged = counts.argmax(axis=1)[values[held_out]]
        right[repeat, held_out] = judged == study.labels[held_out]
    return right


def row_split_accuracy(study: Experiment, n_folds: int) -> float:
    """The figure that a random split of rows prints: each image is on both sides."""
    model = study.models[0]
    space = study.spaces[model.pool]
    labels = study.labels[space.image]
    splitter = KFold(n_folds, shuffle=True, random_state=study.seed)
    right = np.zeros(len(labels), bool)
    for use, test in splitter.split(labels):
        svc = train(space, model, study.labels, use)
        scores = class_scores(svc, space.kernel(model, test, use), study.n_classes)
        right[test] = scores.argmax(axis=1) == labels[test]
    return float(right.mean())


def majority_rate(labels: Integers) -> float:
    return float(np.bincount(labels).max() / len(labels))


def read_header_columns(dataset: Dataset, cfg: Config) -> dict[str, list[str]]:
    """Header fields of every image from phase 1's list; empty where there is none."""
    path = cfg.folder("decompressed_dir") / config.FILE_LIST
    if not path.is_file():
        return {}
    by_name = {
        Path(line.get("output") or "").name: line for line in utils.read_csv(path)
    }
    lines = [by_name.get(Path(file).name) for file in dataset.files]
    found = [with_derived(line) for line in lines if line is not None]
    if len(found) < len(lines):
        return {}
    return {name: [line.get(name) or "" for line in found] for name in HEADER_FIELDS}


def with_derived(line: Mapping[str, str]) -> dict[str, str]:
    """A line of phase 1's list with the fields "size" and "day"."""
    size = f"{line.get('rows')}x{line.get('columns')}"
    return {**line, "size": size, "day": (line.get("timestamp") or "")[:8]}


def read_statistics(dataset: Dataset, cfg: Config) -> Floats | str:
    """Image statistics of every labelled file, or why there are none."""
    if cfg.skip_pixels:
        return "left out (--skip-pixels)"
    statistics = []
    for number, file in enumerate(dataset.files, 1):
        path = cfg.folder("labelled_dir") / file
        if not path.is_file():
            return f"not measured: {path} is gone"
        try:
            statistics.append(image_statistics(utils.prepare_image(path).grey))
        except utils.RejectedError as error:
            return f"not measured: {path} {error}"
        if number % 50 == 0:
            log.info("pixel baseline: %d of %d images", number, len(dataset.files))
    return np.array(statistics)


# --- 3. Fit: the model that phase 4 loads ---------------------------------------------


def make_neighbours(dataset: Dataset, scaler: StandardScaler, seed: int) -> Neighbours:
    """The scaled rows of the kind that phase 4 asks for, projected if they are long."""
    n_features = dataset.rows.shape[1]
    n_kept = config.NEIGHBOUR_DIMENSIONS
    projection = np.zeros((0, 0), np.float32)
    if n_features > n_kept:
        normal = np.random.default_rng(seed).standard_normal((n_features, n_kept))
        projection = (normal / np.sqrt(n_kept)).astype(np.float32)
    empty = Neighbours(
        rows=np.zeros((0, 0), np.float32),
        owner=dataset.image[dataset.deciding].astype(np.int32),
        names=np.array(dataset.files, np.str_),
        projection=projection,
    )
    chosen = np.flatnonzero(dataset.deciding)
    parts = [
        empty.project(scaler.transform(dataset.rows[chosen[i : i + CHUNK_ROWS]]))
        for i in range(0, len(chosen), CHUNK_ROWS)
    ]
    return replace(empty, rows=np.concatenate(parts))


def leave_out_novelty(neighbours: Neighbours, groups: Integers, k: int) -> Floats:
    """Novelty of every training image beside the images of other groups, (n_images,)."""
    group_of_row = groups[neighbours.owner]
    scores = np.zeros(len(groups))
    for image, group in enumerate(groups):
        own = np.flatnonzero(neighbours.owner == image)[:k]
        distances = neighbours.distances(neighbours.rows[own])
        scores[image] = utils.novelty(distances[:, group_of_row != group])
    return scores


def fit_classifier(
    space: Space, model: Model, labels: Integers, factor: float, classes: Sequence[str]
) -> Pipeline:
    """SVC on all images, and its decisions as probabilities, in scikit-learn's terms.

    The last step is a LogisticRegression whose coefficients are written, not fitted:
    softmax(factor * sums of the one-against-one decisions), the calibration found on
    held-out images. Fitting it here would take decisions on the training images.
    """
    svc = SVC(
        kernel=model.kernel,
        C=model.c,
        gamma=model.gamma / space.vectors.shape[1],
        decision_function_shape="ovo",
    )
    names = np.array(classes)
    svc.fit(space.vectors, names[labels[space.image]], space.weight)
    confidence = LogisticRegression()
    sums = factor * sums_of_pairs(len(classes))
    confidence.classes_ = names
    # Of two classes it wants one row: sigmoid(x) is softmax(-x / 2, x / 2).
    confidence.coef_ = sums if len(classes) > 2 else 2 * sums[1:]
    confidence.intercept_ = np.zeros(len(confidence.coef_))
    confidence.n_features_in_ = sums.shape[1]
    steps: list[tuple[str, Any]] = [("svc", FunctionTransformer(svc.decision_function))]
    if len(classes) == 2:  # whose decisions come without a second axis
        column = FunctionTransformer(np.expand_dims, kw_args={"axis": 1})
        steps.append(("column", column))
    return Pipeline([*steps, ("confidence", confidence)])


# --- 4. Report ------------------------------------------------------------------------


def evaluation_figures(scores: Floats, dataset: Dataset) -> dict[str, Any]:
    """Accuracy, balanced accuracy and class figures of held-out images."""
    n = len(dataset.labels)
    counts = confusion(scores, dataset.labels)
    by_class = class_figures(counts, dataset.classes)
    recalls = [figures["recall"] for figures in by_class.values()]
    return {
        "accuracy": figure(float(np.trace(counts)) / n, n),
        "balanced_accuracy": mean_figure(recalls),
        "majority_rate": majority_rate(dataset.labels),
        "classes": by_class,
        "confusion_matrix": np.round(counts, 6).tolist(),
    }


def confidence_figures(
    study: Experiment, confidence: Confidence, right: Booleans
) -> dict[str, Any]:
    """Calibration, and what the thresholds would have answered."""
    n = len(study.labels)
    answered = float(confidence.answered.mean() * n)
    wrong = float((confidence.answered & ~right).mean() * n)
    return {
        "brier": brier_score(confidence.probabilities, study.labels),
        "calibration_error": calibration_error(confidence.probabilities, study.labels),
        "answered": figure(answered / n, n),
        "wrong_among_answered": figure(wrong / answered if answered else 0.0, answered),
        "wrong": wrong,
    }


def print_report(metrics: Mapping[str, Any]) -> None:
    """The figures as sentences, in the order in which they should be read."""
    for line in report_lines(metrics):
        print(line)


def report_lines(metrics: Mapping[str, Any]) -> Iterable[str]:
    """Every line of the console report."""
    images = [f"{name} {each['images']}" for name, each in by_class(metrics).items()]
    yield f"{metrics['images']} images ({', '.join(images)}), {metrics['rows']} rows"
    yield ""
    yield from evaluation_lines(metrics)
    yield ""
    yield from table_lines(metrics)
    yield ""
    yield "Checks"
    for check in metrics["checks"]:
        yield f"  {check['name']:<18} {check['finding']}"
    yield ""
    yield from confidence_lines(metrics)
    for warning in metrics["warnings"]:
        yield f"WARNING: {warning}"


def by_class(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = metrics["evaluation"]["classes"]
    return figures


def evaluation_lines(metrics: Mapping[str, Any]) -> Iterable[str]:
    found, splits = metrics["evaluation"], metrics["splits"]
    right = found["accuracy"]["value"] * metrics["images"]
    yield (
        f"What phase 4 will do: images it has not seen, {metrics['k_measured']} "
        f"{metrics['asked']} descriptions each, one decision per image"
    )
    yield (
        f"({splits['folds']} folds by {splits['group_by']}, {splits['repeats']} times; "
        "in brackets: 95 % intervals)"
    )
    yield (
        f"  accuracy           {shown(found['accuracy'])}   "
        f"{right:.3g} of {metrics['images']} images"
    )
    yield f"  balanced accuracy  {shown(found['balanced_accuracy'])}"
    yield f"  always answering the commonest class: {found['majority_rate']:.2f}"
    yield ""
    width = max(len(name) for name in metrics["class_names"])
    yield f"  {'class':<{width}}  precision         recall            F1"
    for name, each in by_class(metrics).items():
        parts = "  ".join(shown(each[key]) for key in ("precision", "recall", "f1"))
        yield f"  {name:<{width}}  {parts}"
    yield ""
    yield "  Confusion matrix (rows: true class; columns: decided class)"
    yield from matrix_lines(found["confusion_matrix"], metrics["class_names"])


def matrix_lines(counts: Sequence[Sequence[float]], names: Sequence[str]) -> list[str]:
    width = max(7, *(len(name) for name in names))
    lines = ["  " + " " * width + "".join(f"{name:>{width + 2}}" for name in names)]
    for name, row in zip(names, counts, strict=True):
        cells = "".join(f"{round(count, 1):>{width + 2}g}" for count in row)
        lines.append(f"  {name:<{width}}{cells}")
    return lines


def table_lines(metrics: Mapping[str, Any]) -> Iterable[str]:
    yield "Not the accuracy, to show the difference"
    for name, found in metrics["comparison"].items():
        value = found if isinstance(found, str) else shown(found)
        yield f"  {name:<52} {value}"


def confidence_lines(metrics: Mapping[str, Any]) -> Iterable[str]:
    found, limits = metrics["confidence"], metrics["thresholds"]
    answered, wrong = found["answered"], found["wrong_among_answered"]
    yield (
        f"Confidence: Brier score {found['brier']:.2f} (0 is best), calibration error "
        f"{found['calibration_error']:.2f}"
    )
    yield (
        f"Answers: of known images {100 * answered['value']:.0f} % would be answered, "
        f"{found['wrong']:.3g} of {wrong['n']:.3g} wrong {shown(wrong)}; the others "
        f'get "{config.INCONCLUSIVE}"'
    )
    yield (
        f"  thresholds: confidence {limits['confidence']:.2f}, "
        f"novelty {limits['novelty']:.1f}"
    )


def shown(figures: Mapping[str, Any]) -> str:
    low, high = figures["interval"]
    return f"{figures['value']:.2f} ({low:.2f}-{high:.2f})"


def draw_confusion(path: Path, metrics: Mapping[str, Any]) -> None:
    """Counts and shares of every true class, as a heat map."""
    counts = np.array(metrics["evaluation"]["confusion_matrix"])
    shares = counts / counts.sum(axis=1, keepdims=True)
    texts = [
        [f"{round(n, 1):g}\n{100 * p:.0f} %" for n, p in zip(*row, strict=True)]
        for row in zip(counts, shares, strict=True)
    ]
    names = metrics["class_names"]
    figure_ = Figure(figsize=(1.2 * len(names) + 3, 1.0 * len(names) + 2.5))
    axes = figure_.subplots()
    seaborn.heatmap(
        shares,
        annot=np.array(texts),
        fmt="",
        vmin=0,
        vmax=1,
        cmap="Blues",
        xticklabels=names,
        yticklabels=names,
        ax=axes,
    )
    accuracy = metrics["evaluation"]["accuracy"]
    axes.set(xlabel="decided class", ylabel="true class")
    axes.set_title(
        f"Held-out images, {metrics['k_measured']} {metrics['asked']} descriptions\n"
        f"accuracy {shown(accuracy)}, {metrics['images']} images"
    )
    figure_.tight_layout()
    with utils.atomic_write(path) as file:
        figure_.savefig(file, format="png", dpi=150)


# --- The phase ------------------------------------------------------------------------


def make_experiment(
    dataset: Dataset, scaler: StandardScaler, cfg: Config
) -> tuple[Experiment, list[str]]:
    """Folds, candidates and their vectors; warnings in words."""
    groups = read_groups(dataset, cfg)
    n_folds = count_folds(dataset, groups, cfg)
    repeats = cfg.repeats or int(np.clip(300 // len(dataset.files), 1, 5))
    folds = np.array(
        [
            make_folds(dataset.labels, groups, n_folds, cfg.seed + repeat)
            for repeat in range(repeats)
        ]
    )
    if not trainable(dataset.labels, folds):
        raise PipelineError(
            f"with --group-by {cfg.group_by} a class lies on one side of a split: use "
            "fewer --folds or --group-by image"
        )
    models = candidates(cfg, cfg.pool or choose_pool(dataset))
    k = min(cfg.inference_descriptions, dataset.deciding_per_image)
    pools = dict.fromkeys(model.pool for model in models)
    spaces = {pool: make_space(dataset, scaler, pool, k) for pool in pools}
    study = Experiment(spaces, models, dataset.labels, groups, folds, cfg.seed)
    warning = f"{n_folds} folds instead of {cfg.folds}: the smallest class has no more"
    return study, [warning] if n_folds < cfg.folds else []


def candidates(cfg: Config, pool: int) -> list[Model]:
    """The hyper-parameters to choose among, the default first."""
    models = [Model(cfg.kernel, cfg.c, cfg.gamma, pool)]
    if cfg.search == "short":
        models += [Model(*each, pool) for each in config.SEARCH_SHORT]
    if cfg.search == "full":
        pools = (pool, 4 * pool)
        models += [Model(*each, size) for size in pools for each in config.SEARCH_FULL]
    return models


def run_checks(
    study: Experiment, dataset: Dataset, right: Booleans, cfg: Config
) -> list[Check]:
    """All checks, with the default hyper-parameters."""
    plain = replace(study, models=study.models[:1])
    n_permutations = cfg.permutations or int(np.clip(1000 // len(right[0]), 3, 20))
    checks = [check_permuted(plain, n_permutations), check_prompts(plain)]
    statistics = read_statistics(dataset, cfg)
    if isinstance(statistics, str):
        checks.append(Check("pixel baseline", statistics, "", {}))
    else:
        checks.append(check_pixels(plain, statistics, right))
    columns = read_header_columns(dataset, cfg)
    return [*checks, check_headers(plain, columns, right)]


def comparison(
    study: Experiment, scores: Mapping[str, Floats], dataset: Dataset
) -> dict[str, Any]:
    """Figures that are easily taken for the accuracy, under names that say otherwise."""
    n = len(dataset.labels)
    n_folds = int(study.folds.max()) + 1
    table: dict[str, Any] = {
        "optimistic, rows of one image on both sides": figure(
            row_split_accuracy(study, n_folds), n
        ),
        "prompts of the class, which a new image can't be asked": "not measured",
    }
    if "own" in scores:
        own = float(correct(scores["own"], dataset.labels).mean())
        table["prompts of the class, which a new image can't be asked"] = figure(own, n)
    for k in config.PROTOCOL_TABLE:
        found: Any = f"not measured: {dataset.deciding_per_image} per image"
        if f"k={k}" in scores:
            right = correct(scores[f"k={k}"], dataset.labels)
            found = figure(float(right.mean()), n)
        table[f"phase 4 with {k} description{'s' if k > 1 else ''}"] = found
    return table


def judgement_warnings(dataset: Dataset, metrics: Mapping[str, Any]) -> Iterable[str]:
    """What a reader of the figures must not miss."""
    if not dataset.generic.any():
        yield (
            "no row was asked with the generic prompts: what phase 4 does can't be "
            "measured, and the figures are of prompts that give the class away. Run "
            "phase 2 with --generic-share above 0"
        )
    if metrics["k_measured"] < metrics["k"]:
        yield (
            f"measured with {metrics['k_measured']} descriptions per image, as many as "
            f"the dataset has; phase 4 asks {metrics['k']}"
        )
    if min(np.bincount(dataset.labels)) < 20:
        yield "fewer than 20 images in a class: the intervals say how little that proves"
    found = metrics["evaluation"]
    if found["accuracy"]["interval"][0] <= found["majority_rate"]:
        yield "not shown to be better than always answering the commonest class"
    if metrics["thresholds"]["confidence"] > 1:
        yield f'no confidence is safe enough: phase 4 will answer "{config.INCONCLUSIVE}"'
    yield from (check["warning"] for check in metrics["checks"] if check["warning"])


def run(cfg: Config) -> int:
    """Evaluate, check, fit and report; returns the exit code."""
    dataset = load_dataset(cfg.folder("dataset_dir"))
    scaler = fit_scaler(dataset.rows)
    study, warnings = make_experiment(dataset, scaler, cfg)
    metrics = provenance(dataset, study, cfg)

    log.info("evaluating on images held out")
    scores = held_out_scores(study, study.spaces[study.models[0].pool].probes)
    right = correct(scores["protocol"], dataset.labels)
    metrics["evaluation"] = evaluation_figures(scores["protocol"], dataset)
    metrics["comparison"] = comparison(study, scores, dataset)

    log.info("checking for leaks")
    metrics["checks"] = [
        asdict(check) for check in run_checks(study, dataset, right, cfg)
    ]

    log.info("fitting on all images")
    neighbours = make_neighbours(dataset, scaler, cfg.seed)
    far = leave_out_novelty(neighbours, study.groups, metrics["k_measured"])
    limit = float(np.quantile(far, 1 - config.KNOWN_REFUSED_SHARE, method="higher"))
    confidence = cross_fit(study, scores["protocol"], far > limit, cfg.max_error)
    metrics["confidence"] = confidence_figures(study, confidence, right)
    factor = fit_temperature(scores["protocol"], dataset.labels)
    shares = softmax(factor * scores["protocol"])[:, far <= limit].max(axis=-1)
    lowest = choose_confidence(
        shares.ravel(), right[:, far <= limit].ravel(), cfg.max_error
    )
    metrics["thresholds"] = {"confidence": lowest, "novelty": limit}
    model = choose_model(study, np.ones(len(dataset.labels), bool))
    metrics["model"] = {**asdict(model), "calibration_factor": factor}
    classifier = fit_classifier(
        study.spaces[model.pool], model, dataset.labels, factor, dataset.classes
    )
    metrics["warnings"] = [*warnings, *judgement_warnings(dataset, metrics)]
    write_model(cfg.folder("model_dir"), metrics, (classifier, scaler, neighbours))
    print_report(metrics)
    return utils.EXIT_DONE


def provenance(dataset: Dataset, study: Experiment, cfg: Config) -> dict[str, Any]:
    """With what the model was made: phase 4 compares it with what it finds."""
    folds = int(study.folds.max()) + 1
    return {
        "program_version": config.PROGRAM_VERSION,
        "libraries": {name: version(name) for name in LIBRARIES},
        "class_names": dataset.classes,
        "conditions": dataset.manifest["conditions"],
        "probe_vector": dataset.manifest["probe_vector"],
        "dataset": dataset.manifest["sha256"],
        "images": len(dataset.files),
        "rows": len(dataset.rows),
        "features": dataset.rows.shape[1],
        "k": cfg.inference_descriptions,
        "k_measured": min(cfg.inference_descriptions, dataset.deciding_per_image),
        "asked": "generic" if dataset.generic.any() else "own-prompt",
        "splits": {
            "folds": folds,
            "repeats": len(study.folds),
            "group_by": cfg.group_by,
        },
        "seed": cfg.seed,
        "max_error": cfg.max_error,
    }


def write_model(
    folder: Path,
    metrics: dict[str, Any],
    parts: tuple[Pipeline, StandardScaler, Neighbours],
) -> None:
    """Write every file; METRICS, which says that the folder is complete, last."""
    classifier, scaler, neighbours = parts
    (folder / config.METRICS).unlink(missing_ok=True)
    with utils.atomic_write(folder / config.CLASSIFIER) as file:
        joblib.dump(classifier, file)
    with utils.atomic_write(folder / config.SCALER) as file:
        joblib.dump(scaler, file)
    with utils.atomic_write(folder / config.NEIGHBOURS) as file:
        np.savez(file, **asdict(neighbours))
    draw_confusion(folder / config.CONFUSION_MATRIX, metrics)
    metrics["sha256"] = {
        name: utils.sha256_of(folder / name)
        for name in (config.CLASSIFIER, config.SCALER, config.NEIGHBOURS)
    }
    utils.write_json(folder / config.METRICS, metrics)


def main(argv: Sequence[str] | None = None) -> int:
    """Run phase 3 from the command line; returns its exit code."""
    cfg, _ = config.parse_config(3, __doc__ or "", argv)
    logging.basicConfig(
        level=logging.WARNING if cfg.quiet else logging.INFO,
        format="%(message)s",
        stream=sys.stderr,
    )
    return utils.exit_code(lambda: run(cfg), lambda line: print(line, file=sys.stderr))


if __name__ == "__main__":
    raise SystemExit(main())
