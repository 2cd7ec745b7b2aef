"""Phase 3: train the SVC on the vectors, and say honestly how good it is.

Reads   dataset_final_vlm/         what phase 2 wrote
        datos_etiquetados/         for the pixel baseline and --group-by, if it is there
        f1_descomprimidos/         manifiesto.csv, for the header check, if it is there
Writes  modelo_final_vlm/
          clasificador_svc.joblib  scaled vectors -> class probabilities
          escalador.joblib         StandardScaler of the vectors
          vecinos.npz              generic rows of the training images, for novelty
          matriz_de_confusion.png  counts and shares of images held out
          metricas.json            every figure and threshold; written last

The accuracy that it prints is that of phase 4: images that the model has not seen,
generic prompts only, all descriptions averaged into one decision per image.

    python fase3_entrenamiento_svc.py
    python fase3_entrenamiento_svc.py --search short --group-by day
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pydicom
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC

import config
import utils
from config import Config
from utils import Neighbours, PipelineError

log = logging.getLogger("fase3")

Floats = NDArray[np.float64]
Rows = NDArray[np.float32]
Integers = NDArray[np.intp]
Booleans = NDArray[np.bool_]

PHASE_2 = "run `python fase2_generar_vectores_vlm.py`"
LIBRARIES = ("scikit-learn", "numpy", "joblib")
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

    path: Path
    image: Integers
    """(n_rows,), the image that each row describes."""
    generic: Booleans
    """(n_rows,), whether a generic prompt was asked."""
    labels: Integers
    """(n_images,), index in `classes`."""
    classes: list[str]
    files: list[str]
    """(n_images,), relative to the labelled folder."""
    manifest: dict[str, Any]

    @property
    def rows(self) -> Rows:
        """(n_rows, n_features), mapped on every use: no page stays in memory."""
        return load_array(self.path)

    @property
    def deciding(self) -> list[Integers]:
        """Of each image, the rows that judge it when held out: the generic ones."""
        kind = self.generic if self.generic.any() else ~self.generic
        return [
            np.flatnonzero(kind & (self.image == i)) for i in range(len(self.files))
        ]

    @property
    def descriptions(self) -> int:
        """Deciding rows that every image has."""
        return min(len(rows) for rows in self.deciding)


def load_dataset(folder: Path) -> Dataset:
    """Read and check phase 2's folder.

    Raises
    ------
    PipelineError
        Not finished, changed since, or files that don't match each other.
    """
    manifest = utils.read_json(folder / config.MANIFEST, PHASE_2)
    if not {"sha256", "conditions", "probe_vector"} <= set(manifest):
        raise PipelineError(f"{folder / config.MANIFEST} is not complete: {PHASE_2}")
    for name in (config.DATASET_X, config.DATASET_Y, config.DATASET_ROWS):
        utils.check_digest(folder / name, manifest["sha256"].get(name), PHASE_2)
    table = utils.read_csv(folder / config.DATASET_ROWS)
    rows, y = (load_array(folder / n) for n in (config.DATASET_X, config.DATASET_Y))
    if problem := find_problem(rows, y, table):
        raise PipelineError(f"{folder}: {problem}: {PHASE_2}")
    images = {line["image_id"]: line for line in table}
    index = {image: number for number, image in enumerate(images)}
    classes = sorted(set(y.tolist()))
    return Dataset(
        path=folder / config.DATASET_X,
        image=np.array([index[line["image_id"]] for line in table], np.intp),
        generic=np.array([line["prompt_set"] == "generic" for line in table]),
        labels=np.array([classes.index(line["class"]) for line in images.values()]),
        classes=classes,
        files=[line["file"] for line in images.values()],
        manifest=manifest,
    )


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
    if not all(np.isfinite(chunk).all() for chunk in chunks(rows)):
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


def chunks(rows: Rows) -> Iterable[Rows]:
    """The rows, a few at a time, so that they never all lie in memory."""
    return (rows[i : i + CHUNK_ROWS] for i in range(0, len(rows), CHUNK_ROWS))


def read_groups(dataset: Dataset, cfg: Config) -> Integers:
    """Group number of every image, from the headers of the labelled files."""
    if cfg.group_by == "image":
        return np.arange(len(dataset.files))
    paths = [cfg.folder("labelled_dir") / file for file in dataset.files]
    values = [header_value(path, cfg.group_by) for path in paths]
    return np.unique(values, return_inverse=True)[1]


def header_value(path: Path, group_by: str) -> str:
    """The first attribute that is there; images without any form one group."""
    keywords = list(GROUP_KEYWORDS[group_by])
    try:
        header = pydicom.dcmread(
            path, stop_before_pixels=True, force=True, specific_tags=keywords
        )
    except OSError as error:
        raise PipelineError(
            f"--group-by {group_by} reads the headers of the labelled files, but "
            f"{path} can't be read ({error.strerror}): put it back or use "
            "--group-by image"
        ) from None
    found = next((str(header.get(word)) for word in keywords if header.get(word)), "")
    return found[:8] if group_by == "day" else found


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
    """Training vectors and probes (vectors that judge an image), with inner products.

    Every fold is a sub-matrix of `gram`. The scaler behind it has seen the held-out
    images too, though not their labels; refitting it in every fold would take a matrix
    per fold and changed none of 360 decisions (tests/benchmarks/bench_fase3.py).
    """

    vectors: Rows
    """(n_vectors, n_features), the training vectors, scaled."""
    image: Integers
    """(n_vectors,), the image that each describes."""
    generic: Booleans
    """(n_vectors,), whether it was asked with generic prompts."""
    gram: NDArray[np.float32]
    """(n_vectors + n_probes * n_images, n_vectors), inner products."""
    squares: NDArray[np.float32]
    """Squared norms of the vectors behind the rows of `gram`."""
    probes: tuple[str, ...]
    """Names: "protocol", "k=1" ..., "own" (the prompts of the class)."""

    @property
    def weight(self) -> Floats:
        """Sample weights: both kinds of vectors weigh alike in all."""
        n_generic = int(self.generic.sum())
        ratio = (len(self.generic) - n_generic) / max(n_generic, 1)
        return np.where(self.generic, ratio or 1.0, 1.0)

    def probe_rows(self, probe: str, images: Booleans) -> Integers:
        """Rows of `gram` that hold this probe of these images."""
        start = len(self.image) + self.probes.index(probe) * len(images)
        return start + np.flatnonzero(images)

    def kernel(self, model: Model, rows: Integers, columns: Integers) -> Rows:
        """Sub-matrix of the kernel matrix."""
        products = self.gram[np.ix_(rows, columns)]
        if model.kernel == "linear":
            return products
        distances = self.squares[rows, None] + self.squares[columns] - 2 * products
        gamma = np.float32(model.gamma / self.vectors.shape[1])
        return np.asarray(np.exp(-gamma * np.maximum(distances, 0)))


def fit_scaler(rows: Rows) -> StandardScaler:
    """Mean and standard deviation of every feature over all rows."""
    scaler = StandardScaler()
    for chunk in chunks(rows):
        scaler.partial_fit(chunk)
    return scaler


def make_space(dataset: Dataset, scaler: StandardScaler, pool: int, k: int) -> Space:
    """Average rows into training vectors and probes, scale them, multiply them.

    Averages are scaled instead of rows averaged: the same vectors, fewer operations.
    """
    groups, image, generic = pool_rows(dataset, pool)
    probes = probe_groups(dataset, k)
    n_vectors = len(groups) + len(probes) * len(dataset.files)
    averages = np.empty((n_vectors, dataset.rows.shape[1]), np.float32)
    for number, group in enumerate(chain(groups, *probes.values())):
        averages[number] = dataset.rows[group].mean(axis=0)
    scaled = scaler.transform(averages, copy=False)
    vectors = scaled[: len(groups)].copy()  # a view would keep the probes in memory
    return Space(
        vectors=vectors,
        image=image,
        generic=generic,
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
    return groups, np.array(images), np.array(kinds)


def probe_groups(dataset: Dataset, k: int) -> dict[str, list[Integers]]:
    """Rows of every probe of every image; the first k prompts, as phase 4 asks them."""
    deciding = dataset.deciding
    counts = [n for n in config.PROTOCOL_TABLE if n <= dataset.descriptions]
    probes = {"protocol": [rows[:k] for rows in deciding]}
    probes |= {f"k={n}": [rows[:n] for rows in deciding] for n in counts}
    if dataset.generic.any() and not dataset.generic.all():
        images = range(len(dataset.files))
        own = [np.flatnonzero(~dataset.generic & (dataset.image == i)) for i in images]
        probes["own"] = own
    return probes


def choose_pool(dataset: Dataset) -> int:
    """The smallest pool that keeps the number of training vectors affordable."""
    kinds = Counter(zip(dataset.image.tolist(), dataset.generic.tolist(), strict=True))
    for pool in config.POOL_SIZES:
        if sum(-(-n // pool) for n in kinds.values()) <= config.TRAINING_VECTORS_MAX:
            break
    return pool


# --- 1. Evaluation: images held out, judged as phase 4 judges -------------------------


@dataclass(frozen=True)
class Experiment:
    """Who is trained on what: all that a figure depends on."""

    spaces: Mapping[int, Space]
    """By pool size."""
    models: Sequence[Model]
    """Candidates, the default first; each training side chooses among them."""
    labels: Integers
    """(n_images,)."""
    groups: Integers
    """(n_images,), what must not be on both sides of a split."""
    folds: Integers
    """(n_repeats, n_images), the fold that holds an image out; -1: in no fold."""
    seed: int

    @property
    def space(self) -> Space:
        """That of the default model."""
        return self.spaces[self.models[0].pool]

    @property
    def n_classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def n_folds(self) -> int:
        return int(self.folds.max()) + 1

    def splits(self) -> Iterable[tuple[int, Booleans, Booleans]]:
        """Repeat, training images and held-out images of every fold."""
        for repeat, folds in enumerate(self.folds):
            for fold in range(self.n_folds):
                if np.any(folds == fold):
                    yield repeat, (folds >= 0) & (folds != fold), folds == fold

    def trainable(self) -> bool:
        """Whether every training side holds every class."""
        sides = (self.labels[training] for _, training, _ in self.splits())
        return all(len(np.unique(side)) == self.n_classes for side in sides)


def groups_per_class(labels: Integers, groups: Integers) -> list[int]:
    return [len(np.unique(groups[labels == label])) for label in np.unique(labels)]


def count_folds(dataset: Dataset, groups: Integers, cfg: Config) -> int:
    """Folds that every class has enough groups for; fewer than 2 is an error."""
    n_groups = groups_per_class(dataset.labels, groups)
    fewest = min(n_groups)
    name = dataset.classes[n_groups.index(fewest)]
    if fewest < 2 and cfg.group_by == "image":
        raise PipelineError(
            f"class {name} has 1 image and needs at least 2 (20 or more for figures "
            f"that mean something): label 1 more and {PHASE_2}"
        )
    if fewest < 2:
        raise PipelineError(
            f"every image of class {name} has the same {cfg.group_by}, so that none "
            f"can be held out by it: add images of another {cfg.group_by} or use "
            "--group-by image"
        )
    return min(cfg.folds, fewest)


def make_folds(labels: Integers, groups: Integers, n_folds: int, seed: int) -> Integers:
    """Fold number of every image, (n_images,): stratified, groups kept together."""
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    folds = np.zeros(len(labels), np.intp)
    for fold, (_, held_out) in enumerate(splitter.split(labels, labels, groups)):
        folds[held_out] = fold
    return folds


def train(space: Space, model: Model, labels: Integers, use: Integers) -> SVC:
    """The SVC on training vectors `use`, by their kernel matrix."""
    svc = SVC(kernel="precomputed", C=model.c, decision_function_shape="ovo")
    kernel = space.kernel(model, use, use)
    return svc.fit(kernel, labels[space.image[use]], space.weight[use])


def class_scores(svc: SVC, kernel: Rows, n_classes: int) -> Floats:
    """Sums of the one-against-one decisions, (n_samples, n_classes).

    Not scikit-learn's "ovr" form, whose votes make steps that can't be calibrated.
    """
    decisions = svc.decision_function(kernel).reshape(len(kernel), -1)
    return np.asarray(decisions @ sums_of_pairs(n_classes).T)


def sums_of_pairs(n_classes: int) -> Floats:
    """(n_classes, n_pairs): +1 where a decision speaks for a class, -1 against it.

    In scikit-learn's order of pairs; of two classes, positive means the second.
    """
    if n_classes == 2:
        return np.array([[-1.0], [1.0]])
    first, second = np.triu_indices(n_classes, 1)
    return np.asarray(np.eye(n_classes)[first] - np.eye(n_classes)[second]).T


def held_out_scores(
    study: Experiment, probes: Sequence[str], own_prompts_only: bool = False
) -> dict[str, Floats]:
    """Train without each fold, score its images: (n_repeats, n_images, n_classes)."""
    shape = (*study.folds.shape, study.n_classes)
    scores = {probe: np.zeros(shape) for probe in probes}
    for repeat, training, held_out in study.splits():
        model = choose_model(study, training)
        space = study.spaces[model.pool]
        use = np.flatnonzero(
            training[space.image] & ~(own_prompts_only & space.generic)
        )
        svc = train(space, model, study.labels, use)
        for probe in probes:
            kernel = space.kernel(model, space.probe_rows(probe, held_out), use)
            scores[probe][repeat, held_out] = class_scores(svc, kernel, study.n_classes)
    return scores


def choose_model(study: Experiment, images: Booleans) -> Model:
    """The candidate that is best in folds among these images; the first of equals."""
    labels, groups = study.labels[images], study.groups[images]
    n_folds = min(INNER_FOLDS, *groups_per_class(labels, groups))
    if len(study.models) == 1 or n_folds < 2:
        return study.models[0]
    folds = np.full((1, len(images)), -1)
    folds[0, images] = make_folds(labels, groups, n_folds, study.seed)
    inner = replace(study, folds=folds)
    if not inner.trainable():
        return study.models[0]
    rights = []
    for model in study.models:
        scores = held_out_scores(replace(inner, models=[model]), ["protocol"])
        rights.append(correct(scores["protocol"], study.labels)[:, images].mean())
    return study.models[int(np.argmax(rights))]


def correct(scores: Floats, labels: Integers) -> Booleans:
    """Whether the highest score is the image's class, (n_repeats, n_images)."""
    return np.asarray(scores.argmax(axis=-1) == labels)


# Intervals. Repeats are averaged: they are the same images, so n stays their number.


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n (Wilson, JASA 22 (1927) 209); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    centre = share + Z**2 / (2 * n)
    half = Z * float(np.sqrt(max(0, share * (1 - share)) / n + Z**2 / (4 * n**2)))
    low, high = ((centre + side) / (1 + Z**2 / n) for side in (-half, half))
    return max(0.0, min(share, low)), min(1.0, max(share, high))


def figure(share: float, n: float) -> dict[str, Any]:
    """A share, its 95 % interval, and how many images it is a share of."""
    return {"value": float(share), "interval": list(wilson(share, n)), "n": float(n)}


def mean_figure(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of independent shares with the MOVER interval.

    Zou and Donner, Statistics in Medicine 27 (2008) 1693: the distances of the limits
    from the estimates add in squares.
    """
    values = np.array([part["value"] for part in parts])
    distances = np.array([part["interval"] for part in parts]) - values[:, None]
    low, high = np.sqrt(np.sum(distances**2, axis=0)) / len(parts)
    value = float(values.mean())
    return {"value": value, "interval": [max(0.0, value - low), min(1.0, value + high)]}


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


def evaluation_figures(scores: Floats, dataset: Dataset) -> dict[str, Any]:
    """Accuracies, confusion matrix (averaged over repeats) and figures per class.

    F1 = TP / (TP + (FP + FN) / 2) is given the interval of a share of its denominator.
    """
    n, n_classes = len(dataset.labels), len(dataset.classes)
    counts = np.zeros((n_classes, n_classes))
    for judged in scores.argmax(axis=-1):
        np.add.at(counts, (dataset.labels, judged), 1)
    counts /= len(scores)
    actual, judged_as, right = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    by_class = {
        name: {
            "images": round(actual[i]),
            "precision": figure(right[i] / (judged_as[i] or 1), judged_as[i]),
            "recall": figure(right[i] / actual[i], actual[i]),
            "f1": figure(
                2 * right[i] / (actual[i] + judged_as[i]),
                (actual[i] + judged_as[i]) / 2,
            ),
        }
        for i, name in enumerate(dataset.classes)
    }
    return {
        "accuracy": figure(right.sum() / n, n),
        "balanced_accuracy": mean_figure(
            [each["recall"] for each in by_class.values()]
        ),
        "majority_rate": majority_rate(dataset.labels),
        "classes": by_class,
        "confusion_matrix": np.round(counts, 6).tolist(),
    }


def misjudged(scores: Floats, dataset: Dataset) -> list[dict[str, Any]]:
    """Images judged wrong when held out, most often first: wrong labels, perhaps."""
    wrong = 1 - correct(scores, dataset.labels).mean(axis=0)
    decided = scores.mean(axis=0).argmax(axis=-1)
    return [
        {
            "file": dataset.files[image],
            "wrong": float(wrong[image]),
            "decided": dataset.classes[decided[image]],
        }
        for image in np.argsort(-wrong, kind="stable")
        if wrong[image] > 0
    ]


def majority_rate(labels: Integers) -> float:
    return float(np.bincount(labels).max() / len(labels))


# Confidence: one factor turns summed decisions into probabilities.


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
        Of images held out.
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


def choose_confidence(confidence: Floats, right: Booleans, max_error: float) -> float:
    """The lowest confidence down to which at most `max_error` of answers are wrong.

    Both arrays are (n_repeats, n_images). The result is above 1 (nothing is answered)
    where too few images would be left to show it.
    """
    order = np.argsort(-confidence, axis=None, kind="stable")
    ranked, answers = confidence.ravel()[order], np.arange(1, len(order) + 1)
    images, share = config.ANSWERED_AT_LEAST
    allowed = np.cumsum(~right.ravel()[order]) <= max_error * answers
    allowed &= answers >= max(images * len(confidence), share * len(order))
    allowed &= np.append(ranked[1:] < ranked[:-1], True)  # equals are answered alike
    last = np.flatnonzero(allowed)
    return float(ranked[last[-1]]) if last.size else config.NEVER


def thresholds(
    scores: Floats, labels: Integers, novelty: Floats, max_error: float
) -> tuple[float, dict[str, float]]:
    """Calibration factor and thresholds from held-out scores and novelties."""
    refused = config.KNOWN_REFUSED_SHARE
    limit = float(np.quantile(novelty, 1 - refused, method="higher"))
    factor = fit_factor(scores, labels)
    known = novelty <= limit
    confidence = softmax(factor * scores[:, known]).max(axis=-1)
    right = correct(scores[:, known], labels[known])
    lowest = choose_confidence(confidence, right, max_error)
    return factor, {"confidence": lowest, "novelty": limit}


def cross_fit(
    study: Experiment, scores: Floats, novelty: Floats, max_error: float
) -> tuple[Floats, Booleans]:
    """Probabilities and answers of each fold, by factor and thresholds of the others.

    Returns
    -------
    (probabilities, answered)
        (n_repeats, n_images, n_classes) and (n_repeats, n_images).
    """
    probabilities, answered = np.zeros_like(scores), np.zeros(scores.shape[:2], bool)
    for repeat, others, held_out in study.splits():
        seen = scores[:, others]
        factor, limits = thresholds(
            seen, study.labels[others], novelty[others], max_error
        )
        shares = softmax(factor * scores[repeat, held_out])
        probabilities[repeat, held_out] = shares
        answered[repeat, held_out] = [
            not utils.refusal(float(confidence), float(far), limits)
            for confidence, far in zip(
                shares.max(axis=1), novelty[held_out], strict=True
            )
        ]
    return probabilities, answered


def calibrate(
    study: Experiment, scores: Floats, novelty: Floats, max_error: float
) -> tuple[float, dict[str, Any]]:
    """The factor; thresholds for phase 4; and what such thresholds would answer."""
    factor, limits = thresholds(scores, study.labels, novelty, max_error)
    probabilities, answered = cross_fit(study, scores, novelty, max_error)
    figures = confidence_figures(probabilities, answered, study.labels)
    return factor, {"thresholds": limits, "confidence": figures}


def confidence_figures(
    probabilities: Floats, answered: Booleans, labels: Integers
) -> dict[str, Any]:
    """Brier score (0 to 2), expected calibration error in ten bins, answers."""
    n, right = len(labels), correct(probabilities, labels)
    truth = np.eye(probabilities.shape[-1])[labels]
    highest = probabilities.max(axis=-1).ravel()
    bins = np.minimum((highest * 10).astype(int), 9)
    gaps = np.bincount(bins, right.ravel(), 10) - np.bincount(bins, highest, 10)
    n_answered = float(answered.mean() * n)
    wrong = float((answered & ~right).mean() * n)
    return {
        "brier": float(np.mean(np.sum((probabilities - truth) ** 2, axis=-1))),
        "calibration_error": float(np.abs(gaps).sum() / len(highest)),
        "answered": figure(n_answered / n, n),
        "wrong_among_answered": figure(wrong / (n_answered or 1), n_answered),
        "wrong": wrong,
    }


# --- 2. Checks: each can fail, and says so in words -----------------------------------


@dataclass(frozen=True)
class Check:
    """What a check found; `warning` is empty where all is well."""

    name: str
    finding: str
    warning: str = ""
    figures: Mapping[str, Any] | None = None


def check_permuted(study: Experiment, n_permutations: int) -> Check:
    """Labels shuffled among the images: whatever is still right comes from a leak."""
    rng = np.random.default_rng(study.seed)
    rights: list[float] = []
    for _ in range(PERMUTATION_TRIES):
        labels = rng.permutation(study.labels)
        shuffled = replace(study, labels=labels, folds=study.folds[:1])
        if len(rights) < n_permutations and shuffled.trainable():
            scores = held_out_scores(shuffled, ["protocol"])["protocol"]
            rights.append(float(correct(scores, labels).mean()))
    if not rights:
        return Check("permuted labels", "not measured: too few images")
    mean, chance = float(np.mean(rights)), majority_rate(study.labels)
    limit = chance + Z * float(np.sqrt(chance * (1 - chance) / len(study.labels)))
    warning = (
        f"with shuffled labels {mean:.2f} is still right: something of an image is on "
        "both sides of the splits, and no figure here can be believed"
    )
    return Check(
        "permuted labels",
        f"{mean:.2f} right (mean of {len(rights)}); chance is {chance:.2f} or less",
        warning if mean > limit else "",
        {"mean": mean, "values": rights, "limit": limit},
    )


def check_prompts(study: Experiment) -> Check:
    """Trained on own-prompt rows alone: is it the image or the prompt that decides?"""
    if "own" not in study.space.probes:
        return Check("prompts", "not measured: needs own and generic prompts")
    scores = held_out_scores(study, ["own", "protocol"], own_prompts_only=True)
    rights = {probe: correct(each, study.labels) for probe, each in scores.items()}
    own, generic = float(rights["own"].mean()), float(rights["protocol"].mean())
    gap = difference(rights["own"], rights["protocol"])
    chance = majority_rate(study.labels)
    warning = (
        f"{100 * gap['value']:.0f} points of what the prompts of the class teach are "
        "lost on the generic prompts that phase 4 asks: they come from the prompt, not "
        "from the image"
    )
    if wilson(generic, len(study.labels))[0] <= chance:
        warning = (
            "THE CLASS FOLLOWS THE PROMPT, NOT THE IMAGE: trained on the prompts "
            f"of its class the model is right in {own:.2f} of such rows and in "
            f"{generic:.2f} of generic ones, which is chance"
        )
    return Check(
        "prompts",
        f"trained on those of the class: {own:.2f} on such, {generic:.2f} on generic",
        warning if gap["value"] >= PROMPT_GAP and gap["interval"][0] > 0 else "",
        {"own": own, "generic": generic, "gap": gap},
    )


def check_pixels(study: Experiment, statistics: Floats, right: Booleans) -> Check:
    """The same folds on a few image statistics: what do the descriptions add?

    rbf with C = 10, which suits a few features better than the model's own setting: a
    baseline must not be weak.
    """
    plain = np.zeros(study.folds.shape, bool)
    for repeat, training, held_out in study.splits():
        svc = make_pipeline(StandardScaler(), SVC(C=10))
        svc.fit(statistics[training], study.labels[training])
        judged = svc.predict(statistics[held_out])
        plain[repeat, held_out] = judged == study.labels[held_out]
    gain = difference(right, plain)
    low, high = (100 * limit for limit in gain["interval"])
    warning = "not shown that the vision model adds anything to plain image statistics"
    return Check(
        "pixels alone",
        f"{plain.mean():.2f}; the descriptions add {100 * gain['value']:+.0f} points "
        f"({low:+.0f} to {high:+.0f})",
        warning if low <= 0 else "",
        {"accuracy": figure(float(plain.mean()), len(study.labels)), "gain": gain},
    )


def image_statistics(grey: NDArray[np.uint8]) -> list[float]:
    """Numbers that need no vision model, from the picture that it is shown.

    Levels, gradient, straightness (share of the gradient in its strongest direction),
    radial profile, spectrum by frequency, periodicity (its strongest frequency).
    """
    values = grey.astype(np.float64) / 255
    down, right = np.gradient(values)
    slope, angle = np.hypot(down, right), np.arctan2(down, right) % np.pi
    directions = np.histogram(angle, 18, (0, np.pi), weights=slope**2)[0]
    offsets = np.linspace(-1, 1, len(values))
    rings = np.minimum(np.hypot(offsets[:, None], offsets) * 6, 7).astype(int).ravel()
    profile = np.bincount(rings, values.ravel(), 8) / np.bincount(rings, minlength=8)
    spectrum = np.abs(np.fft.rfft2(values - values.mean()))[: len(values) // 2] ** 2
    down_frequency, right_frequency = np.indices(spectrum.shape)
    frequency = np.hypot(down_frequency, right_frequency)
    bands = np.histogram(frequency, [0, 3, 8, 20, 50, 500], weights=spectrum)[0]
    fine = np.where(frequency > 8, spectrum, 0)
    shares = [
        directions.max() / max(directions.sum(), 1e-9),
        fine.max() / max(fine.sum(), 1e-9),
        *bands / max(spectrum.sum(), 1e-9),
    ]
    levels = [values.std(), *np.percentile(values, [5, 50, 95]), *profile]
    return [
        *levels,
        slope.mean(),
        slope.std(),
        *np.percentile(slope, [50, 99]),
        *shares,
    ]


def read_statistics(dataset: Dataset, cfg: Config) -> Floats | str:
    """Statistics of every labelled file, or why there are none."""
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
            log.info("pixels: %d of %d images", number, len(dataset.files))
    return np.array(statistics)


def check_headers(
    study: Experiment, columns: Mapping[str, Sequence[str]], right: Booleans
) -> Check:
    """Each header field alone, by majority vote: do acquisitions betray the class?"""
    shares = {
        field: majority_by_value(study, np.unique(values, return_inverse=True)[1])
        for field, values in columns.items()
        if len(set(values)) > 1
    }
    if not shares:
        return Check("header fields", "not measured: no list of phase 1, or all alike")
    best = max(shares, key=lambda field: shares[field])
    above_chance = wilson(shares[best], len(study.labels))[0] > majority_rate(
        study.labels
    )
    warning = (
        f"{best} alone, which is no part of the image, gives {shares[best]:.2f}: the "
        "model may have learnt how the images were taken. Try --group-by, and add "
        "images of every class from each device and day"
    )
    return Check(
        "header fields",
        f"the most telling of {len(shares)}, {best}, gives {shares[best]:.2f}",
        warning if above_chance and shares[best] >= right.mean() - HEADER_GAP else "",
        shares,
    )


def majority_by_value(study: Experiment, values: Integers) -> float:
    """Accuracy of the commonest class among the training images of the same value."""
    right = np.zeros(study.folds.shape, bool)
    for repeat, training, held_out in study.splits():
        counts = np.zeros((int(values.max()) + 1, study.n_classes))
        np.add.at(counts, (values[training], study.labels[training]), 1)
        counts += counts.sum(axis=0) / (2 * len(values))  # decides for unseen values
        judged = counts.argmax(axis=1)[values[held_out]]
        right[repeat, held_out] = judged == study.labels[held_out]
    return float(right.mean())


def read_header_columns(dataset: Dataset, cfg: Config) -> dict[str, list[str]]:
    """Header fields of every image from phase 1's list; empty if one is not in it."""
    path = cfg.folder("decompressed_dir") / config.FILE_LIST
    lines = utils.read_csv(path) if path.is_file() else []
    by_name = {Path(line.get("output") or "").name: line for line in lines}
    found = [by_name.get(Path(file).name) for file in dataset.files]
    if not all(found):
        return {}
    full = [
        line
        | {
            "size": f"{line.get('rows')} x {line.get('columns')}",
            "day": (line.get("timestamp") or "")[:8],
        }
        for line in found
        if line
    ]
    return {name: [line.get(name) or "" for line in full] for name in HEADER_FIELDS}


def run_checks(
    study: Experiment, dataset: Dataset, right: Booleans, cfg: Config
) -> list[Check]:
    """All checks, with the default hyper-parameters."""
    plain = replace(study, models=study.models[:1])
    n_permutations = cfg.permutations or int(np.clip(600 // len(study.labels), 3, 20))
    statistics = read_statistics(dataset, cfg)
    columns = read_header_columns(dataset, cfg)
    return [
        check_permuted(plain, n_permutations),
        check_prompts(plain),
        Check("pixels alone", statistics)
        if isinstance(statistics, str)
        else check_pixels(plain, statistics, right),
        check_headers(plain, columns, right),
    ]


def row_split_accuracy(study: Experiment) -> float:
    """What a random split of rows prints: every image is on both sides."""
    space, model = study.space, study.models[0]
    labels = study.labels[space.image]
    splitter = StratifiedKFold(study.n_folds, shuffle=True, random_state=study.seed)
    right = np.zeros(len(labels), bool)
    for use, test in splitter.split(labels, labels):
        svc = train(space, model, study.labels, use)
        scores = class_scores(svc, space.kernel(model, test, use), study.n_classes)
        right[test] = scores.argmax(axis=1) == labels[test]
    return float(right.mean())


def compare(
    study: Experiment, scores: Mapping[str, Floats], dataset: Dataset
) -> dict[str, dict[str, Any] | str]:
    """Figures easily taken for the accuracy, under names that say otherwise."""
    rights = {probe: correct(each, dataset.labels) for probe, each in scores.items()}
    unmeasured = f"not measured, the dataset has {dataset.descriptions}"
    table: dict[str, dict[str, Any] | str] = {
        "optimistic, rows of one image on both sides": {
            "value": row_split_accuracy(study)
        }
    }
    if "own" in rights:
        own = {"value": float(rights["own"].mean())}
        table["images held out, but asked with the prompts of their class"] = own
    for k in config.PROTOCOL_TABLE:
        name = f"phase 4 with {k} description{'s' if k > 1 else ''}"
        measured = rights.get(f"k={k}")
        table[name] = unmeasured
        if measured is not None:
            table[name] = figure(measured.mean(), len(dataset.labels))
    return table


# --- 3. Fit: the model that phase 4 loads ---------------------------------------------


def make_neighbours(dataset: Dataset, scaler: StandardScaler, seed: int) -> Neighbours:
    """The scaled rows of the kind that phase 4 asks for, projected if they are long."""
    n_features, kept = dataset.rows.shape[1], config.NEIGHBOUR_DIMENSIONS
    projection = np.zeros((0, 0), np.float32)
    if n_features > kept:
        normal = np.random.default_rng(seed).standard_normal((n_features, kept))
        projection = (normal / np.sqrt(kept)).astype(np.float32)
    neighbours = Neighbours(
        rows=np.zeros((0, 0), np.float32),
        owner=dataset.image[np.concatenate(dataset.deciding)].astype(np.int32),
        names=np.array(dataset.files),
        projection=projection,
    )
    parts = [
        neighbours.project(scaler.transform(dataset.rows[each]))
        for each in dataset.deciding
    ]
    return replace(neighbours, rows=np.concatenate(parts))


def leave_out_novelty(neighbours: Neighbours, groups: Integers, k: int) -> Floats:
    """Novelty of every training image among those of other groups, (n_images,)."""
    group_of_row = groups[neighbours.owner]
    scores = np.zeros(len(groups))
    for image, group in enumerate(groups):
        own = np.flatnonzero(neighbours.owner == image)[:k]
        distances = neighbours.distances(neighbours.rows[own])
        scores[image] = utils.novelty(distances[:, group_of_row != group])
    return scores


def fit_classifier(
    space: Space, model: Model, names: NDArray[np.str_], factor: float
) -> Pipeline:
    """SVC on all images, and its decisions as probabilities, in scikit-learn's terms.

    The last step is a LogisticRegression whose coefficients are written, not fitted:
    softmax(factor * sums of the one-against-one decisions), the calibration found on
    images held out. Fitted here, it would learn from decisions on training images.

    Parameters
    ----------
    names : ndarray of str, (n_images,)
        Their classes.
    """
    svc = SVC(
        kernel=model.kernel,
        C=model.c,
        gamma=model.gamma / space.vectors.shape[1],
        decision_function_shape="ovo",
    )
    svc.fit(space.vectors, names[space.image], space.weight)
    sums = factor * sums_of_pairs(len(svc.classes_))
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
    names = (config.CLASSIFIER, config.SCALER, config.NEIGHBOURS)
    digests = {name: utils.sha256_of(folder / name) for name in names}
    utils.write_json(folder / config.METRICS, metrics | {"sha256": digests})


# --- 4. Report ------------------------------------------------------------------------


def shown(figures: Mapping[str, Any] | str) -> str:
    if isinstance(figures, str):
        return figures
    interval = "-".join(f"{limit:.2f}" for limit in figures.get("interval", ()))
    return f"{figures['value']:.2f}" + (f" ({interval})" if interval else "")


def report_lines(metrics: Mapping[str, Any]) -> Iterable[str]:
    """The figures in the order in which they should be read."""
    conditions = metrics["conditions"]
    yield (
        f"{metrics['images']} images, {metrics['rows']} rows, described by "
        f"{conditions.get('vlm')}, embedded by {conditions.get('embedder')}"
    )
    yield ""
    yield from evaluation_lines(metrics)
    yield "\nThese are not the accuracy, and show why"
    for name, found in metrics["comparison"].items():
        yield f"  {name:<58} {shown(found)}"
    yield "\nChecks"
    for check in metrics["checks"]:
        yield f"  {check['name']:<16} {check['finding']}"
    yield ""
    yield from confidence_lines(metrics)
    yield from (f"WARNING: {warning}" for warning in metrics["warnings"])


def evaluation_lines(metrics: Mapping[str, Any]) -> Iterable[str]:
    found, splits, names = (
        metrics["evaluation"],
        metrics["splits"],
        metrics["class_names"],
    )
    accuracy = found["accuracy"]
    yield (
        f"What phase 4 will do: new images, {metrics['k_measured']} {metrics['asked']} "
        "descriptions each, one decision per image"
    )
    yield (
        f"(held out by {splits['group_by']}, {splits['groups']} groups in "
        f"{splits['folds']} folds, {splits['repeats']} times; brackets: 95 % intervals)"
    )
    yield (
        f"  accuracy           {shown(accuracy)}   "
        f"{accuracy['value'] * accuracy['n']:.3g} of {metrics['images']} images"
    )
    yield f"  balanced accuracy  {shown(found['balanced_accuracy'])}"
    yield f"  commonest class    {found['majority_rate']:.2f}"
    width = max(8, *(len(name) for name in names))
    heads = "".join(f"{head:<18}" for head in ("precision", "recall", "F1"))
    yield f"\n  {'':<{width}} images  {heads}".rstrip()
    for name, each in found["classes"].items():
        parts = "  ".join(shown(each[key]) for key in ("precision", "recall", "f1"))
        yield f"  {name:<{width}} {each['images']:>6}  {parts}"
    yield f"\n  Images, mean of {splits['repeats']} repeats"
    yield f"  {'is':<{width}}" + "".join(f"  {'-> ' + n:>{width}}" for n in names)
    for name, row in zip(names, found["confusion_matrix"], strict=True):
        cells = "".join(f"  {round(count, 1):>{width}g}" for count in row)
        yield f"  {name:<{width}}{cells}"


def confidence_lines(metrics: Mapping[str, Any]) -> Iterable[str]:
    found, limits = metrics["confidence"], metrics["thresholds"]
    wrong = found["wrong_among_answered"]
    yield (
        f"Confidence: Brier score {found['brier']:.2f} (0 is best), calibration error "
        f"{found['calibration_error']:.2f}"
    )
    yield (
        f"Answered: {shown(found['answered'])} of known images; wrong: {shown(wrong)} "
        f'of those; the others get "{config.INCONCLUSIVE}"'
    )
    yield (
        f"  (confidence of {limits['confidence']:.2f} or more, novelty of "
        f"{limits['novelty']:.1f} or less)"
    )


def misjudged_lines(metrics: Mapping[str, Any], verbose: bool) -> Iterable[str]:
    """With --verbose, every image that was judged wrong when held out."""
    for each in metrics["misjudged"] if verbose else ():
        share = f"{100 * each['wrong']:.0f} % of the repeats"
        yield f"judged wrong in {share}: {each['file']} (on average {each['decided']})"


def find_warnings(dataset: Dataset, metrics: Mapping[str, Any]) -> Iterable[str]:
    """What a reader of the figures must not miss."""
    found, splits = metrics["evaluation"], metrics["splits"]
    if not dataset.generic.any():
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
    if splits["folds"] < splits["folds_asked"]:
        yield f"{splits['folds']} folds only: the smallest class has no more"
    if min(np.bincount(dataset.labels)) < 20:
        yield "fewer than 20 images in a class: see how wide the intervals are"
    if found["accuracy"]["interval"][0] <= found["majority_rate"]:
        yield "not shown to be better than always answering the commonest class"
    if metrics["thresholds"]["confidence"] >= config.NEVER:
        yield f'no confidence is safe: phase 4 will only say "{config.INCONCLUSIVE}"'
    yield from (check["warning"] for check in metrics["checks"] if check["warning"])


def draw_confusion(path: Path, metrics: Mapping[str, Any]) -> None:
    """Counts and shares of every true class, as a heat map."""
    import seaborn  # noqa: PLC0415  (with pandas: a second that --help need not wait)
    from matplotlib.figure import Figure  # noqa: PLC0415

    counts, names = (
        np.array(metrics["evaluation"]["confusion_matrix"]),
        metrics["class_names"],
    )
    shares = counts / counts.sum(axis=1, keepdims=True)
    texts = [
        f"{round(n, 1):g}\n{100 * p:.0f} %"
        for n, p in zip(counts.flat, shares.flat, strict=True)
    ]
    drawing = Figure(figsize=(3 + 1.2 * len(names), 2.5 + len(names)))
    axes = drawing.subplots()
    seaborn.heatmap(
        shares,
        annot=np.reshape(texts, counts.shape),
        fmt="",
        vmin=0,
        vmax=1,
        cmap="Blues",
        xticklabels=names,
        yticklabels=names,
        ax=axes,
    )
    axes.set(xlabel="decided class", ylabel="true class")
    axes.set_title(
        f"Images held out, {metrics['k_measured']} {metrics['asked']} descriptions\n"
        f"accuracy {shown(metrics['evaluation']['accuracy'])} of {metrics['images']}"
    )
    drawing.tight_layout()
    with utils.atomic_write(path) as file:
        drawing.savefig(file, format="png", dpi=150)


# --- The phase ------------------------------------------------------------------------


def design_experiment(
    dataset: Dataset, scaler: StandardScaler, cfg: Config
) -> Experiment:
    """Groups, folds, candidates and their vectors."""
    groups = read_groups(dataset, cfg)
    n_folds = count_folds(dataset, groups, cfg)
    repeats = cfg.repeats or int(np.clip(300 // len(dataset.files), 1, 5))
    folds = [
        make_folds(dataset.labels, groups, n_folds, cfg.seed + repeat)
        for repeat in range(repeats)
    ]
    models = candidates(cfg, cfg.pool or choose_pool(dataset))
    k = min(cfg.inference_descriptions, dataset.descriptions)
    pools = {model.pool for model in models}
    spaces = {pool: make_space(dataset, scaler, pool, k) for pool in pools}
    study = Experiment(
        spaces, models, dataset.labels, groups, np.array(folds), cfg.seed
    )
    if not study.trainable():
        raise PipelineError(
            f"held out by {cfg.group_by}, a class has no image left to train on: use "
            "fewer --folds or --group-by image"
        )
    return study


def candidates(cfg: Config, pool: int) -> list[Model]:
    """The hyper-parameters to choose among, the default first."""
    models = [Model(cfg.kernel, cfg.c, cfg.gamma, pool)]
    if cfg.search == "short":
        models += [Model(*each, pool) for each in config.SEARCH_SHORT]
    if cfg.search == "full":
        pools = (pool, 4 * pool)
        models += [Model(*each, size) for size in pools for each in config.SEARCH_FULL]
    return models


def provenance(dataset: Dataset, study: Experiment, cfg: Config) -> dict[str, Any]:
    """With what the model was made: phase 4 compares it with what it finds."""
    return {
        "program_version": config.PROGRAM_VERSION,
        "libraries": {name: version(name) for name in LIBRARIES},
        "class_names": dataset.classes,
        "conditions": dataset.manifest["conditions"],
        "probe_vector": dataset.manifest["probe_vector"],
        "dataset": dataset.manifest["sha256"],
        "images": len(dataset.files),
        "rows": len(dataset.image),
        "features": study.space.vectors.shape[1],
        "k": cfg.inference_descriptions,
        "k_measured": min(cfg.inference_descriptions, dataset.descriptions),
        "asked": "generic" if dataset.generic.any() else "own-prompt",
        "splits": {
            "group_by": cfg.group_by,
            "groups": len(np.unique(study.groups)),
            "folds": study.n_folds,
            "folds_asked": cfg.folds,
            "repeats": len(study.folds),
        },
        "seed": cfg.seed,
        "max_error": cfg.max_error,
    }


def run(cfg: Config) -> int:
    """Evaluate, check, fit and report; returns the exit code."""
    dataset = load_dataset(cfg.folder("dataset_dir"))
    scaler = fit_scaler(dataset.rows)
    neighbours = make_neighbours(dataset, scaler, cfg.seed)
    study = design_experiment(dataset, scaler, cfg)
    metrics = provenance(dataset, study, cfg)

    log.info("evaluating on images held out")
    scores = held_out_scores(study, study.space.probes)
    metrics["evaluation"] = evaluation_figures(scores["protocol"], dataset)
    metrics["misjudged"] = misjudged(scores["protocol"], dataset)
    metrics["comparison"] = compare(study, scores, dataset)

    log.info("checking for leaks")
    right = correct(scores["protocol"], dataset.labels)
    metrics["checks"] = [
        asdict(each) for each in run_checks(study, dataset, right, cfg)
    ]

    log.info("fitting on all images")
    model = choose_model(study, np.ones(len(dataset.labels), bool))
    chosen = replace(study, models=[model])
    if len(study.models) > 1:  # those scores are of several models, each on its scale
        scores = held_out_scores(chosen, ["protocol"])
    far = leave_out_novelty(neighbours, study.groups, metrics["k_measured"])
    factor, calibration = calibrate(chosen, scores["protocol"], far, cfg.max_error)
    names = np.array(dataset.classes)[dataset.labels]
    classifier = fit_classifier(chosen.space, model, names, factor)
    metrics |= {"model": asdict(model) | {"factor": factor}} | calibration

    metrics["warnings"] = list(find_warnings(dataset, metrics))
    write_model(cfg.folder("model_dir"), metrics, (classifier, scaler, neighbours))
    print(*report_lines(metrics), *misjudged_lines(metrics, cfg.verbose), sep="\n")
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
