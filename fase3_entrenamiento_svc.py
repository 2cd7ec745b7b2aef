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

import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
CHUNK_ROWS = 4096
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
        return int(np.bincount(self.image[self.deciding], minlength=len(self.files)).min())


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
    rows, y = load_array(folder / config.DATASET_X), load_array(folder / config.DATASET_Y)
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
    averages = averaging_matrix([*groups, *sum(probes.values(), [])], len(dataset.image))
    scaled = scaler.transform(np.asarray(averages @ dataset.rows, np.float32))
    vectors = scaled[: len(groups)]
    return Space(
        vectors=vectors,
        image=image,
        generic=generic,
        weight=vector_weights(np.array([len(group) for group in groups]), generic),
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


def vector_weights(sizes: Integers, generic: Booleans) -> Floats:
    """Sample weights: a vector counts as its rows do, and both kinds weigh alike."""
    own, asked = sizes[~generic].sum(), sizes[generic].sum()
    kind = own / asked if own and asked else 1.0
    return np.asarray(sizes * np.where(generic, kind, 1.0), np.float64)


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
    """(n_repeats, n_images), the fold that holds an image out."""
    seed: int

    @cached_property
    def n_classes(self) -> int:
        return int(self.labels.max()) + 1

    def splits(self) -> Iterable[tuple[int, Booleans]]:
        """Repeat and held-out images of every fold."""
        for repeat, folds in enumerate(self.folds):
            for fold in range(int(folds.max()) + 1):
                yield repeat, folds == fold


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
    n_groups = {
        name: len(set(groups[dataset.labels == number].tolist()))
        for number, name in enumerate(dataset.classes)
    }
    name = min(n_groups, key=lambda each: n_groups[each])
    fewest = n_groups[name]
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


def class_scores(
    svc: SVC, kernel: NDArray[Any], n_classes: int
) -> NDArray[np.float64]:
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
    for repeat, held_out in study.splits():
        model = choose_model(study, ~held_out)
        space = study.spaces[model.pool]
        chosen = ~held_out[space.image]
        if kind is not None:
            chosen &= space.generic == kind
        use = np.flatnonzero(chosen)
        svc = train(space, model, study.labels, use)
        for probe in probes:
            kernel = space.kernel(model, space.probe_rows(probe, held_out), use)
            scores[probe][repeat, held_out] = class_scores(svc, kernel, study.n_classes)
    return scores


def choose_model(study: Experiment, images: Booleans) -> Model:
    """The candidate with the best inner cross-validation on these images alone."""
    if len(study.models) == 1:
        return study.models[0]
    inner = restrict(study, images)
    right = [
        correct(
            held_out_scores(replace(inner, models=[model]), ["protocol"])["protocol"],
            inner.labels,
        )[:, images].mean()
        for model in study.models
    ]
    return study.models[int(np.argmax(right))]
