"""Phase 3: train the two readers, and say honestly how good they are.

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

import signal

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while libraries load

import io
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain
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
from sklearn.metrics.pairwise import linear_kernel, rbf_kernel
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits
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
"""Repeat, training images, held-out images."""
Candidate = tuple[str, float]
"""Kernel and C."""
Judged = dict[str, Floats]
"""What the readers said of images that they were not trained on.

Scores (…, n_images, n_classes) by the name of the mean that was judged, and of
"picture"; distances to training: "far" (…, n_images, k), "picture_far" (…, n_images).
The first axis, if any, is that of the repeats.
"""

PHASE_2 = "run `python fase2_generar_vectores_vlm.py`"
LIBRARIES = ("scikit-learn", "numpy", "scipy", "joblib")

FIRST_STAGE = 3
"""Phase 4 tries to decide after this many descriptions, then after all of them."""
NEIGHBOUR_DIMENSIONS = 256
"""Longer rows are kept as a random projection onto this many dimensions.

Distances survive it within a few percent, 1,000 images take 10 MB instead of 120, and,
unlike principal components, it keeps the directions in which unknown images differ.
"""
DESCRIPTION_COUNTS = (1, 3, 10, 20)
"""Numbers of generic descriptions for which the accuracy is shown."""
SHORT: tuple[Candidate, ...] = (
    *(("linear", 0.001), ("linear", 0.1), ("rbf", 1.0), ("rbf", 10.0)),
)
FULL = (*SHORT, ("linear", 0.0001), ("linear", 1.0), ("rbf", 0.1), ("rbf", 100.0))
SEARCH: dict[str, tuple[Candidate, ...]] = {"none": (), "short": SHORT, "full": FULL}
"""--search: the candidates beside the default."""
KERNELS = {"linear": linear_kernel, "rbf": rbf_kernel}
"""BLAS computes them, in a thirtieth of the time of libsvm's own loops."""
JUDGEMENTS = 300
"""Folds are repeated, up to five times, until so many images have been judged."""
CLASSES_LEFT_OUT = 5
"""Of many classes, left out in turn to see whether unknown images are refused."""

PROMPT_GAP = 0.15
"""Points lost between class-specific prompts and generic ones that give a warning."""
HEADER_GAP = 0.05
"""A header field this close to the model's accuracy gives a warning."""
HEADER_FIELDS = ("modality", "manufacturer", "detector", "size", "day", "kvp", "mas")
PROMISED_WITH = 0.9
"""Confidence with which a share of errors is promised."""
Z = 1.959964
"""97.5 % quantile of the normal distribution: the limits of 95 % intervals."""
SHOWN_CLASSES, SHOWN_LETTERS = 12, 20
"""What tables on the terminal show of many classes, and of long names."""

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
    """(n_images, k, n_features), the rows that phase 4 would have."""
    means: dict[str, Rows]
    """(n_images, n_features), of the first "3", "10" … rows, of "class-specific"."""
    projection: Rows
    """(n_features, NEIGHBOUR_DIMENSIONS), or (0, 0): rows that short are kept."""
    n_rows: int
    manifest: dict[str, Any]
    cfg: Config

    @property
    def k(self) -> str:
        """Name of the mean of all rows that phase 4 would have."""
        return str(self.described.shape[1])

    @property
    def stages(self) -> list[int]:
        """Numbers of descriptions after which phase 4 tries to decide."""
        last = self.cfg.inference_descriptions
        return [FIRST_STAGE, last] if int(self.k) > FIRST_STAGE else [last]

    @property
    def all(self) -> Booleans:
        """(n_images,), every image."""
        return np.ones(len(self.labels), bool)

    def only(self, images: Booleans) -> "Dataset":
        """These images alone; a class that none of them has is gone."""
        present, labels = np.unique(self.labels[images], return_inverse=True)
        use = images[self.image]
        return replace(
            self,
            classes=[self.classes[label] for label in present],
            labels=labels,
            groups=self.groups[images],
            lines=[self.lines[image] for image in np.flatnonzero(images)],
            pixels=self.pixels[images],
            vectors=self.vectors[use],
            image=(np.cumsum(images) - 1)[self.image[use]],
            generic=self.generic[use],
            described=self.described[images],
            means={name: mean[images] for name, mean in self.means.items()},
        )


def load_dataset(folder: Path, cfg: Config) -> Dataset:
    """Read and check phase 2's folder, and average its rows.

    Raises
    ------
    PipelineError
        Not finished, changed since, of an older phase 2, or at odds with itself.
    """
    manifest = utils.read_json(folder / config.MANIFEST, PHASE_2)
    if not {"sha256", "conditions", "probe_vector"} <= set(manifest):
        raise PipelineError(f"{folder / config.MANIFEST} is not complete: {PHASE_2}")
    arrays = (config.DATASET_X, config.DATASET_Y, config.DATASET_PIXELS)
    tables = (config.DATASET_ROWS, config.DATASET_IMAGES)
    if not {config.DATASET_PIXELS, config.DATASET_IMAGES} <= set(manifest["sha256"]):
        raise PipelineError(
            f"{folder} was written by an older phase 2: {PHASE_2} (it asks nothing)"
        )
    for name in (*arrays, *tables):
        utils.check_digest(folder / name, manifest["sha256"].get(name), PHASE_2)
    rows, y, pixels = (load_array(folder / name) for name in arrays)
    table, lines = (utils.read_csv(folder / name) for name in tables)
    ids = list(dict.fromkeys(row["image_id"] for row in table))
    problems = chain(
        array_problems(rows, y, pixels, len(table), len(ids)),
        table_problems(y.tolist(), table, [line["image_id"] for line in lines], ids),
    )
    if problem := next(problems, ""):
        raise PipelineError(f"{folder}: {problem}: {PHASE_2}")
    return average_rows(rows, np.array(pixels), table, lines, cfg, manifest)


def load_array(path: Path) -> NDArray[Any]:
    """Map a .npy file into memory; pickled objects are refused, not loaded."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise PipelineError(f"{path} can't be read ({error}): {PHASE_2}") from None
    return array


def array_problems(
    rows: NDArray[Any],
    y: NDArray[Any],
    pixels: NDArray[Any],
    n_rows: int,
    n_images: int,
) -> Iterator[str]:
    """How the arrays break the contract."""
    if rows.dtype != np.float32 or rows.ndim != 2:
        yield f"{config.DATASET_X} is {rows.dtype} {rows.shape}, not float32 (n, d)"
    if pixels.dtype != np.float32 or pixels.shape != (n_images, 40):
        found = f"{config.DATASET_PIXELS} is {pixels.dtype} {pixels.shape}"
        yield f"{found}, not float32 ({n_images}, 40)"
    if not len(rows) == len(y) == n_rows > 0:
        lengths = f"{len(rows)}, {len(y)} and {n_rows}"
        yield f"the dataset files have {lengths} rows, which should be equal"
    steps = range(0, len(rows), 512)  # never all of them in memory
    if not all(np.isfinite(rows[i : i + 512]).all() for i in steps):
        yield f"{config.DATASET_X} holds values that are not finite"
    if not np.isfinite(pixels).all():
        yield f"{config.DATASET_PIXELS} holds values that are not finite"


def table_problems(
    y: list[str], table: list[dict[str, str]], listed: list[str], ids: list[str]
) -> Iterator[str]:
    """How the tables contradict the arrays and each other."""
    if [row["class"] for row in table] != y:
        yield f"{config.DATASET_Y} and {config.DATASET_ROWS} name other classes"
    if listed != ids:
        yield f"{config.DATASET_IMAGES} and {config.DATASET_ROWS} name other images"
    if len(set(y)) < 2:
        yield f"one class only ({y[0]}); label images of at least one more"
    generic = {row["image_id"] for row in table if row["prompt_set"] == "generic"}
    if generic not in (set(), set(ids)):
        yield "some images have no generic rows"


def average_rows(
    rows: Rows,
    pixels: Rows,
    table: list[dict[str, str]],
    lines: list[dict[str, str]],
    cfg: Config,
    manifest: dict[str, Any],
) -> Dataset:
    """Means of rows that train, and those that judge as phase 4 asks.

    The rows of one image and prompt set are averaged in a few groups; every n-th row
    goes to the same, so that each mixes early and late prompts. Single rows are no
    better, and fits cost the square of their number.
    """
    number = {line["image_id"]: i for i, line in enumerate(lines)}
    owner = np.array([number[row["image_id"]] for row in table])
    is_generic = np.array([row["prompt_set"] == "generic" for row in table])
    n_groups = int(np.clip(600 // len(lines), 1, 10))
    of_set: dict[bool, list[Integers]] = {True: [], False: []}
    vectors, images, generics = [], [], []
    for image in range(len(lines)):
        for generic in (False, True):
            chosen = np.flatnonzero((owner == image) & (is_generic == generic))
            of_set[generic].append(chosen)
            parts = min(n_groups, len(chosen))
            vectors += [rows[chosen[part::parts]].mean(axis=0) for part in range(parts)]
            images += [image] * parts
            generics += [generic] * parts
    asked = of_set[bool(is_generic.any())]
    available = min(map(len, asked))
    k = min(cfg.inference_descriptions, available)
    means = {
        str(n): np.array([rows[chosen[:n]].mean(axis=0) for chosen in asked])
        for n in sorted({*DESCRIPTION_COUNTS, k})
        if n <= available
    }
    if is_generic.any() and not is_generic.all():
        specific = [rows[chosen].mean(axis=0) for chosen in of_set[False]]
        means["class-specific"] = np.array(specific)
    classes, labels = np.unique([line["class"] for line in lines], return_inverse=True)
    return Dataset(
        classes=[str(name) for name in classes],
        labels=labels,
        groups=merge_equal(header_values(lines, cfg.group_by), pixels),
        lines=lines,
        pixels=pixels,
        vectors=np.array(vectors),
        image=np.array(images),
        generic=np.array(generics),
        described=np.array([rows[chosen[:k]] for chosen in asked]),
        means=means,
        projection=make_projection(rows.shape[1], cfg.seed),
        n_rows=len(rows),
        manifest=manifest,
        cfg=cfg,
    )


def header_values(lines: Sequence[Mapping[str, str]], field: str) -> NDArray[np.str_]:
    """One value per image; those without it are alike."""
    if field == "size":
        return np.array([f"{line['rows']} x {line['columns']}" for line in lines])
    return np.array([line["image_id" if field == "image" else field] for line in lines])


def merge_equal(values: NDArray[np.str_], pixels: Rows) -> Integers:
    """Group numbers, (n_images,); images with an equal picture share their groups."""
    groups = np.unique(values, return_inverse=True)[1]
    pictures = np.unique(pixels, axis=0, return_inverse=True)[1] + groups.max() + 1
    n = int(pictures.max()) + 1
    links = coo_array((np.ones(len(groups)), (groups, pictures)), shape=(n, n))
    return np.asarray(connected_components(links)[1][groups], np.intp)


def groups_per_class(labels: Integers, groups: Integers) -> list[int]:
    return [len(np.unique(groups[labels == label])) for label in np.unique(labels)]


def count_folds(data: Dataset) -> int:
    """Folds that every class has enough groups for; fewer than 2 is an error."""
    cfg = data.cfg
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


# --- Images held out, and judged as phase 4 judges ------------------------------------


def make_splits(
    data: Dataset, groups: Integers, n_folds: int, repeats: int = 1
) -> list[Split]:
    """Stratified folds that keep groups together; none if a class can't be trained."""
    splits = []
    for repeat in range(repeats):
        folds = StratifiedGroupKFold(
            n_folds, shuffle=True, random_state=data.cfg.seed + repeat
        )
        for _, test in folds.split(groups, data.labels, groups):
            held_out = np.isin(np.arange(len(groups)), test)
            if held_out.any():  # large groups may leave a fold empty
                splits.append((repeat, ~held_out, held_out))
    return splits if trainable(data, splits) else []


def trainable(data: Dataset, splits: Sequence[Split]) -> bool:
    """Whether every training side holds every class."""
    sides = [np.unique(data.labels[training]) for _, training, _ in splits]
    return all(len(side) == len(data.classes) for side in sides)


def track(splits: Sequence[Split], what: str) -> Iterator[Split]:
    """The splits behind a bar; off a terminal behind a line every 15 s, and a last."""
    quiet = not log.isEnabledFor(logging.INFO)
    told = start = time.monotonic()
    with tqdm(splits, what, disable=quiet or None, leave=False) as bar:
        for number, split in enumerate(splits, 1):
            yield split
            bar.update()
            late = time.monotonic() - told > 15
            if bar.disable and (late or (number == len(splits) and told > start)):
                log.info("%s: %d of %d", what, number, len(splits))
                told = time.monotonic()


def fit_words(
    data: Dataset, training: Booleans, candidate: Candidate, use: Booleans | None = None
) -> Pipeline:
    """The descriptions' reader, on the vectors of these images (of those in `use`)."""
    chosen = training[data.image] if use is None else training[data.image] & use
    kernel, c = candidate
    svc = SVC(kernel=KERNELS[kernel], C=c, decision_function_shape="ovo")
    return make_pipeline(StandardScaler(), svc).fit(
        data.vectors[chosen],
        data.labels[data.image[chosen]],
        svc__sample_weight=weights(data.generic[chosen]),
    )


def weights(generic: Booleans) -> Floats:
    """Of training vectors: both prompt sets weigh alike in all."""
    ratio = float(np.sum(~generic)) / max(float(np.sum(generic)), 1.0)
    return np.where(generic, ratio or 1.0, 1.0)


def fit_picture(pixels: Rows, labels: NDArray[Any]) -> Pipeline:
    """The second reader; not tuned, since linear and LDA are as good."""
    svc = SVC(C=10, decision_function_shape="ovo")
    return make_pipeline(StandardScaler(), svc).fit(pixels, labels)


def points_of(data: Dataset, images: Booleans, scaler: Any) -> Rows:
    """Scaled, projected descriptions of these images, (n_images * k, n_dimensions)."""
    rows = data.described[images].reshape(-1, data.described.shape[-1])
    scaled = np.asarray(scaler.transform(rows), np.float32)
    return utils.project(scaled, data.projection)


def make_projection(n_features: int, seed: int) -> Rows:
    if n_features <= NEIGHBOUR_DIMENSIONS:
        return np.zeros((0, 0), np.float32)
    shape = n_features, NEIGHBOUR_DIMENSIONS
    normal = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return np.asarray(normal / np.float32(np.sqrt(NEIGHBOUR_DIMENSIONS)))


def judge(
    data: Dataset, training: Booleans, images: Booleans, candidate: Candidate
) -> Judged:
    """Train both readers on one side, and let them judge the other."""
    words = fit_words(data, training, candidate)
    judged = score_means(data, words, images)
    near = utils.fit_neighbours(
        points_of(data, training, words[0]), utils.NEIGHBOUR_COUNT
    )
    far = near.kneighbors(points_of(data, images, words[0]))[0].mean(axis=1)
    judged["far"] = far.reshape(int(images.sum()), -1)
    picture = fit_picture(data.pixels[training], data.labels[training])
    judged["picture"] = score(picture, data.pixels[images])
    known, new = (
        picture[0].transform(data.pixels[each]) for each in (training, images)
    )
    near = utils.fit_neighbours(known, utils.PIXEL_NEIGHBOUR_COUNT)
    judged["picture_far"] = near.kneighbors(new)[0].mean(axis=1)
    return judged


def score_means(data: Dataset, words: Pipeline, images: Booleans) -> Judged:
    return {name: score(words, mean[images]) for name, mean in data.means.items()}


def score(reader: Pipeline, points: Rows) -> Floats:
    """Sums of pairwise decisions, (n_points, n_classes)."""
    return utils.class_scores(reader.decision_function(points), len(reader.classes_))


def hold_out(
    data: Dataset, splits: Sequence[Split], candidates: Sequence[Candidate]
) -> Judged:
    """What both readers say of the images of every fold, with an axis of repeats."""
    found: Judged = {}
    for repeat, training, images in track(splits, "held-out images"):
        candidate = choose_candidate(data, training, candidates)
        part = judge(data, training, images, candidate)
        collect(found, part, (splits[-1][0] + 1, len(data.labels)), repeat, images)
    return found


def collect(
    found: Judged, part: Judged, shape: tuple[int, int], repeat: int, images: Booleans
) -> None:
    for name, values in part.items():
        whole = found.setdefault(name, np.zeros((*shape, *values.shape[1:])))
        whole[repeat, images] = values


def hold_out_words(
    data: Dataset,
    splits: Sequence[Split],
    candidate: Candidate,
    use: Booleans | None = None,
) -> dict[str, Booleans]:
    """Whether the descriptions' reader alone is right, (n_repeats, n_images) by mean.

    `use` chooses the training vectors.
    """
    found: Judged = {}
    for repeat, training, images in track(splits, "checks"):
        part = score_means(data, fit_words(data, training, candidate, use), images)
        collect(found, part, (splits[-1][0] + 1, len(data.labels)), repeat, images)
    return {name: each.argmax(axis=-1) == data.labels for name, each in found.items()}


def choose_candidate(
    data: Dataset, training: Booleans, candidates: Sequence[Candidate]
) -> Candidate:
    """The best in folds among these images; the first of equals."""
    if len(candidates) == 1:
        return candidates[0]
    inner = data.only(training)
    n_folds = min(3, *groups_per_class(inner.labels, inner.groups))
    splits = n_folds > 1 and make_splits(inner, inner.groups, n_folds)
    if not splits:
        return candidates[0]
    rights = [hold_out_words(inner, splits, each)[data.k].mean() for each in candidates]
    return candidates[int(np.argmax(rights))]


# --- Calibration, thresholds, and the decisions that they give ------------------------


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

    That is, errors + extra <= max_error * (answers + extra), also if it fails at a
    higher confidence; equal ones are answered together. NEVER where none will do.
    """
    order = np.argsort(-confidence, kind="stable")
    ranked, answers = confidence[order], np.arange(1, len(order) + 1)
    errors = np.cumsum(~right[order])
    allowed = errors + extra <= max_error * (answers + extra) + 1e-9
    allowed[:-1] &= ranked[1:] < ranked[:-1]
    last = np.flatnonzero(allowed)
    return float(ranked[last[-1]]) if last.size else NEVER


def find_thresholds(data: Dataset, judged: Judged, images: Booleans) -> dict[str, Any]:
    """Limits of novelty, calibration and thresholds from these held-out images.

    A class needs the higher of two confidences: one for all classes, which counts one
    error more than there was, and one of its own answers; both from the images that
    nothing else refuses. `utils.Model.thresholds` describes the result.
    """
    labels, cfg = data.labels[images], data.cfg
    picture = judged["picture"][:, images].argmax(axis=-1)

    def quantile(far: Floats) -> float:
        return float(np.quantile(far, 1 - cfg.known_refused, method="higher"))

    def needed(right: Booleans, said: Integers, passes: Booleans) -> dict[str, float]:
        extra = len(said)  # one error more in every repeat
        common = lowest_confidence(
            confidence[passes], right[passes], cfg.max_error, extra
        )
        limits = {}
        for label, name in enumerate(data.classes):
            use = passes & (said == label)
            alone = lowest_confidence(confidence[use], right[use], cfg.max_error)
            limits[name] = max(common, alone)
        return limits

    picture_far = judged["picture_far"][:, images].mean(axis=0)
    pixels = quantile(picture_far)
    found: dict[str, Any] = {"pixels": pixels, "stages": {}}
    for stage in data.stages:
        count = min(stage, judged["far"].shape[-1])
        scores = judged[str(count)][:, images]
        far = judged["far"][:, images, :count].mean(axis=(0, 2))
        factor, limit, said = (
            fit_factor(scores, labels),
            quantile(far),
            scores.argmax(-1),
        )
        confidence = softmax(factor * scores).max(axis=-1)
        alone = np.broadcast_to(far <= limit, said.shape)
        both = alone & (picture_far <= pixels) & (picture == said)
        found["stages"][str(stage)] = {
            "descriptions": limit,
            "factor": factor,
            "confidence": needed(said == labels, said, both),
            "one_reader": needed(said == labels, said, alone),
        }
    return found


def answer(
    classes: Sequence[str],
    judged: Judged,
    at: tuple[int, int],
    limits: Mapping[str, Any],
    one_reader: bool = False,
) -> tuple[int, int, str]:
    """What phase 4 would say: the class (-1 for none), the questions, and why not.

    Parameters
    ----------
    at : (repeat, image)
    limits : mapping
        As `find_thresholds` gives it; its stages are tried in their order.
    """
    picture, image = None, at[1]
    if not one_reader:
        novelty = utils.times_limit(
            judged["picture_far"][:, image].mean(), limits["pixels"]
        )
        picture = Opinion(classes[int(judged["picture"][at].argmax())], 1.0, novelty)
        if reason := utils.refusal(None, picture, {}):
            return -1, 0, reason
    for stage, each in limits["stages"].items():
        count = min(int(stage), judged["far"].shape[-1])
        shares = softmax(each["factor"] * judged[str(count)][at])
        best, far = int(shares.argmax()), judged["far"][:, image, :count].mean()
        novelty = utils.times_limit(far, each["descriptions"])
        words = Opinion(classes[best], float(shares[best]), novelty)
        needed = each["one_reader" if one_reader else "confidence"]
        if not (reason := utils.refusal(words, picture, needed)):
            return best, int(stage), ""
        if utils.beyond_doubt(words, picture):
            break
    return -1, int(stage), reason


@dataclass(frozen=True)
class Decided:
    """Held-out images under phase 4's rule, with limits found on the other folds."""

    probabilities: Floats
    """(n_repeats, n_images, n_classes), of all descriptions."""
    label: Integers
    """(n_repeats, n_images); -1 is INCONCLUSIVE. So are the next three."""
    questions: Integers
    all_asked: Integers
    """The label if every question were asked at once."""
    one_reader: Integers
    """The label without the second reader."""
    reasons: list[str]
    """(n_images,), in the first repeat."""


def cross_fit(data: Dataset, judged: Judged, splits: Sequence[Split]) -> Decided:
    """Decide on the images of each fold by what was found on the others."""
    scores, last = judged[data.k], str(data.stages[-1])
    label, questions, at_once, alone = np.zeros((4, *scores.shape[:2]), np.intp)
    reasons = [""] * len(data.labels)
    probabilities = np.zeros_like(scores)
    for repeat, others, images in splits:
        limits = find_thresholds(data, judged, others)
        one_stage = limits | {"stages": {last: limits["stages"][last]}}
        factor = limits["stages"][last]["factor"]
        probabilities[repeat, images] = softmax(factor * scores[repeat, images])
        for image in np.flatnonzero(images):
            at = repeat, int(image)
            label[at], questions[at], reason = answer(data.classes, judged, at, limits)
            at_once[at] = answer(data.classes, judged, at, one_stage)[0]
            alone[at] = answer(data.classes, judged, at, limits, one_reader=True)[0]
            if repeat == 0:
                reasons[image] = reason
    return Decided(probabilities, label, questions, at_once, alone, reasons)


# --- Estimates. Repeats are averaged: they are the same images, so n stays ------------


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


def share_of(part: Booleans, whole: Booleans) -> dict[str, Any]:
    """The share of the images of `whole` that are in `part`, both (n_repeats, …)."""
    n = float(whole.sum()) / len(whole)
    return estimate(float((part & whole).sum()) / max(float(whole.sum()), 1.0), n)


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
    per_image, n_groups = right.mean(axis=0), len(np.unique(groups))
    found = estimate(per_image.mean(), len(per_image))
    sums = np.bincount(groups, per_image - found["value"])
    spread = np.sqrt(n_groups / (n_groups - 1) * np.sum(sums**2)) / len(per_image)
    half, (low, high) = stdtrit(n_groups - 1, 0.975) * spread, found["interval"]
    low, high = min(low, found["value"] - half), max(high, found["value"] + half)
    return found | {"interval": [max(0.0, low), min(1.0, high)], "groups": n_groups}


def mean_estimate(values: Floats) -> dict[str, Any]:
    half = Z * float(values.std(ddof=1)) / np.sqrt(len(values))
    value = float(values.mean())
    return {"value": value, "interval": [value - half, value + half]}


def promise(wrong: Mapping[str, Any], max_error: float) -> dict[str, Any]:
    """The share of errors that these answers can promise (Clopper and Pearson 1934)."""
    answers, errors = wrong["n"], wrong["value"] * wrong["n"]
    share = float(betaincinv(errors + 1, max(answers - errors, 1e-9), PROMISED_WITH))
    doubt = np.log(1 - PROMISED_WITH)
    needed = int(np.ceil(doubt / np.log(1 - max_error))) if 0 < max_error < 1 else 0
    return {"share": share, "with": PROMISED_WITH, "answers_needed": needed}


def evaluate(data: Dataset, scores: Floats) -> dict[str, Any]:
    """The descriptions' reader on every held-out image, and by class."""
    repeats, said = len(scores), scores.argmax(axis=-1).ravel()
    truth, numbers = np.tile(data.labels, repeats), range(len(data.classes))
    counts = confusion_matrix(truth, said, labels=numbers) / repeats
    report = classification_report(
        truth, said, labels=numbers, output_dict=True, zero_division=0
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
        "accuracy": estimate(np.trace(counts) / counts.sum(), len(data.labels)),
        "balanced_accuracy": {"value": report["macro avg"]["recall"]},
        "majority_rate": majority_rate(data),
        "classes": by_class,
        "confusion_matrix": np.round(counts, 6).tolist(),
    }


def compare_readers(data: Dataset, judged: Judged) -> dict[str, Any]:
    """What each reader gets alone, and what the descriptions add to the picture."""
    words, picture = (judged[name].argmax(axis=-1) for name in (data.k, "picture"))
    right, everything = words == data.labels, np.ones(words.shape, bool)
    return {
        "descriptions": share_of(right, everything),
        "picture": share_of(picture == data.labels, everything),
        "agree": share_of(words == picture, everything),
        "right_where_they_agree": share_of(right, words == picture),
        "gain": difference(right, picture == data.labels),
    }


def rate_decisions(data: Dataset, decided: Decided) -> dict[str, Any]:
    """Answered images, errors among them, and what they can promise."""
    ways = {
        "": decided.label,
        "all_questions": decided.all_asked,
        "one_reader": decided.one_reader,
    }
    found: dict[str, Any] = {}
    for name, said in ways.items():
        rates = {
            "answered": share_of(said >= 0, np.ones(said.shape, bool)),
            "wrong": share_of(said != data.labels, said >= 0),
        }
        found |= {name: rates} if name else rates
    found["classes"] = {
        name: share_of(decided.label != data.labels, decided.label == label)
        for label, name in enumerate(data.classes)
    }
    found["worst"] = max(data.classes, key=lambda n: found["classes"][n]["value"])
    found["questions"] = mean_estimate(decided.questions.mean(axis=0))
    found["promise"] = promise(found["wrong"], data.cfg.max_error)
    return found


def rate_confidence(data: Dataset, decided: Decided) -> dict[str, Any]:
    """Brier score (0 to 2), calibration error and reliability in ten bins, and the
    share of errors by the share of answers."""
    shares = decided.probabilities
    truth, highest = np.eye(len(data.classes))[data.labels], shares.max(axis=-1).ravel()
    right = (shares.argmax(axis=-1) == data.labels).ravel()
    bins = np.minimum((highest * 10).astype(int), 9)
    n, said, true = (np.bincount(bins, each, 10) for each in (None, highest, right))
    order = np.argsort(-highest, kind="stable")
    errors = np.cumsum(~right[order]) / np.arange(1, len(order) + 1)
    steps = np.unique(np.linspace(0, len(order) - 1, 50).astype(int))
    used = np.flatnonzero(n)
    return {
        "brier": float(np.mean(np.sum((shares - truth) ** 2, axis=-1))),
        "calibration_error": float(np.abs(true - said).sum() / len(highest)),
        "bins": np.stack([said / np.maximum(n, 1), true / np.maximum(n, 1), n])[
            :, used
        ].T.tolist(),
        "errors_by_answered": [[(i + 1) / len(order), float(errors[i])] for i in steps],
    }


def list_images(
    data: Dataset, judged: Judged, decided: Decided
) -> list[dict[str, Any]]:
    """What was said of every held-out image, the likeliest wrong labels first."""
    shares = decided.probabilities.mean(axis=0)
    own = shares[np.arange(len(shares)), data.labels]
    words, picture = shares.argmax(-1), judged["picture"].mean(axis=0).argmax(-1)
    return [
        {
            "file": data.lines[image]["file"],
            "image_id": data.lines[image]["image_id"],
            "class": data.classes[data.labels[image]],
            "own_probability": float(own[image]),
            "descriptions_say": data.classes[words[image]],
            "picture_says": data.classes[picture[image]],
            "answered": float((decided.label[:, image] >= 0).mean()),
            "questions": float(decided.questions[:, image].mean()),
            "reason": decided.reasons[image],
        }
        for image in np.argsort(own, kind="stable")
    ]


def count_accuracies(data: Dataset, judged: Judged, candidate: Candidate) -> Any:
    """Accuracies by number of descriptions, and two that flatter, by their names.

    A random split of rows has every image on both sides: what the obvious script does.
    """
    labels = data.labels[data.image]
    x, x_test, y, y_test = train_test_split(
        data.vectors, labels, test_size=0.2, random_state=0, stratify=labels
    )
    svc = SVC(kernel=KERNELS[candidate[0]], C=candidate[1])
    mixed = make_pipeline(StandardScaler(), svc).fit(x, y).score(x_test, y_test)
    found: dict[str, Any] = {"optimistic, rows of one image on both sides": mixed}
    for name in data.means:
        right = float((judged[name].argmax(axis=-1) == data.labels).mean())
        if name == "class-specific":
            found["optimistic, asked with the prompts of their class"] = right
        else:
            found[f"descriptions: {name}"] = estimate(right, len(data.labels))
    return found


def majority_rate(data: Dataset) -> float:
    return float(np.bincount(data.labels).max() / len(data.labels))


def modalities(data: Dataset) -> list[str]:
    return sorted({line["modality"] for line in data.lines} - {""})


# --- Checks: each can fail, and says so in words --------------------------------------


@dataclass(frozen=True)
class Check:
    """What a check found; `warning` is empty where all is well."""

    name: str
    finding: str
    warning: str = ""
    values: Mapping[str, Any] | None = None


def check_prompts(
    data: Dataset, splits: Sequence[Split], candidate: Candidate, right: Booleans
) -> Iterator[Check]:
    """Is it the image or the prompt that decides, and what do the prompts add?"""
    if "class-specific" not in data.means:
        yield Check("prompts", "not measured: needs class-specific and generic ones")
        return
    found = hold_out_words(data, splits, candidate, ~data.generic)
    specific, generic = (
        float(found["class-specific"].mean()),
        float(found[data.k].mean()),
    )
    gap = difference(found["class-specific"], found[data.k])
    warning = (
        f"{100 * gap['value']:.0f} points of what the class-specific prompts teach are "
        "lost on the generic prompts that phase 4 asks: they come from the prompt, not "
        "from the image"
    )
    if wilson(generic, len(data.labels))[0] <= majority_rate(data):
        warning = (
            "THE CLASS FOLLOWS THE PROMPT, NOT THE IMAGE: trained on class-specific "
            f"prompts the model is right in {specific:.2f} of such rows and in "
            f"{generic:.2f} of generic ones, which is chance"
        )
    yield Check(
        "prompts",
        f"trained on class-specific ones: {specific:.2f} on such, {generic:.2f} on "
        "generic",
        warning if gap["value"] >= PROMPT_GAP and gap["interval"][0] > 0 else "",
        {"class_specific": specific, "generic": generic, "gap": gap},
    )
    plain = hold_out_words(data, splits, candidate, data.generic)[data.k]
    gain = difference(right, plain)
    share = np.mean(~data.generic)
    yield Check(
        "class-specific",
        f"they add {in_points(gain)} to training on the generic ones alone",
        "",
        {"generic_only": float(plain.mean()), "gain": gain, "share": float(share)},
    )


def check_headers(data: Dataset, splits: Sequence[Split], accuracy: float) -> Check:
    """Each header field alone, by majority vote: do acquisitions betray the class?"""
    columns = {name: header_values(data.lines, name) for name in HEADER_FIELDS}
    shares = {
        name: majority_by_value(data, splits, np.unique(values, return_inverse=True)[1])
        for name, values in columns.items()
        if len(set(values)) > 1
    }
    if not shares:
        return Check("header fields", "not measured: no headers, or all alike")
    best = max(shares, key=lambda name: shares[name])
    known = np.sum(columns[best] != "")
    warning = (
        f"{best} alone, which is no part of the image, gives {shares[best]:.2f}: the "
        "model may have learnt how the images were taken. Try --group-by, and add "
        "images of every class from each device and day"
    )
    telling = wilson(shares[best], len(data.labels))[0] > majority_rate(data)
    return Check(
        "header fields",
        f"the most telling of {len(shares)}, {best} ({known} of {len(data.labels)} "
        f"images have it), gives {shares[best]:.2f}",
        warning if telling and shares[best] >= accuracy - HEADER_GAP else "",
        shares,
    )


def majority_by_value(
    data: Dataset, splits: Sequence[Split], values: Integers
) -> float:
    """Accuracy of the commonest class among the training images of the same value."""
    rights = []
    for _, training, images in splits:
        counts = np.zeros((int(values.max()) + 1, len(data.classes)))
        np.add.at(counts, (values[training], data.labels[training]), 1)
        counts += counts.sum(axis=0) / (2 * len(values))  # decides for unseen values
        rights.append(counts.argmax(axis=1)[values[images]] == data.labels[images])
    return float(np.concatenate(rights).mean())


def check_unseen(data: Dataset, candidate: Candidate, accuracy: float) -> Check:
    """Accuracy on images of a detector, else a day, that was not trained on."""
    for name in ("detector", "day"):
        values = header_values(data.lines, name)
        groups = np.unique(values, return_inverse=True)[1]
        per_group = [len(set(data.labels[groups == g])) for g in np.unique(groups)]
        if np.sum(np.array(per_group) == len(data.classes)) < 2:
            continue
        folds = min(data.cfg.folds, *groups_per_class(data.labels, groups))
        if splits := make_splits(data, groups, folds):
            right = hold_out_words(data, splits, candidate)[data.k]
            found = grouped_estimate(right, groups)
            text = f"{shown(found)} right, each of {found['groups']} held out"
            return Check(f"unseen {name}", f"{text}; mixed: {accuracy:.2f}", "", found)
    return Check("unseen detector", "not measured: needs two with every class, or days")


def check_time(data: Dataset, splits: Sequence[Split], candidate: Candidate) -> Check:
    """The first half of the run against the second: did the answers change?

    Compared with halves drawn at random, which have as few images to train on.
    """
    times = header_values(data.lines, "first_answer")
    order = np.argsort(times, kind="stable")
    late = np.isin(np.arange(len(order)), order[len(order) // 2 :])
    halves = [(0, ~late, late), (0, late, ~late)]
    if not min(times.tolist()) or not trainable(data, halves):
        return Check("time", "not measured: no times, or half of the run lacks a class")
    by_time = hold_out_words(data, halves, candidate)[data.k]
    drawn = make_splits(data, data.groups, 2, splits[-1][0] + 1) or halves
    mixed = hold_out_words(data, drawn, candidate)[data.k]
    fall = difference(mixed, by_time)
    around = order[len(order) // 2 - 1 : len(order) // 2 + 1]
    versions = dict.fromkeys(data.lines[image]["server_versions"] for image in around)
    measured = (
        f"trained on one half of the run, {by_time.mean():.2f} right in the other; "
        f"halves drawn at random: {mixed.mean():.2f}"
    )
    warning = (
        f"the answers changed during the run: {measured}. The second half begins at "
        f"{times[around[1]]} (server {', then '.join(versions) or 'unknown'})"
    )
    values = {"by_time": float(by_time.mean()), "random": float(mixed.mean())}
    beyond_chance = fall["interval"][0] > 0
    return Check(
        "time", measured, warning if beyond_chance else "", values | {"fall": fall}
    )


def leave_classes_out(data: Dataset, candidate: Candidate) -> dict[str, Any] | None:
    """Trained without a class and asked with its images: are they refused?"""
    n, refused, questions = len(data.classes), [], []
    for label in range(0, n, -(-n // CLASSES_LEFT_OUT)) if n > 2 else ():
        known = data.labels != label
        rest = data.only(known)
        folds = min(3, *groups_per_class(rest.labels, rest.groups))
        splits = make_splits(rest, rest.groups, folds)
        if not splits:
            continue
        judged = hold_out(rest, splits, [candidate])
        limits = find_thresholds(rest, judged, rest.all)
        unknown = judge(data, known, ~known, candidate)
        unknown = {name: values[None] for name, values in unknown.items()}
        for number, image in enumerate(np.flatnonzero(~known)):
            header = data.lines[image]["modality"]
            foreign = bool(utils.foreign_modality(header, modalities(rest)))
            said, asked, _ = answer(rest.classes, unknown, (0, number), limits)
            refused.append(foreign or said < 0)
            questions.append(0 if foreign else asked)
    if not refused:
        return None
    return {
        "refused": estimate(float(np.mean(refused)), len(refused)),
        "questions": mean_estimate(np.array(questions, float)),
    }


# --- The model that phase 4 loads -----------------------------------------------------


def with_probabilities(svc: SVC, factor: float) -> Pipeline:
    """An SVC on scaled vectors whose decisions become probabilities.

    In scikit-learn's terms: a LogisticRegression whose coefficients are written, not
    fitted: softmax(factor * sums of the one-against-one decisions), the calibration
    found on held-out images. Fitted here, it would learn from training images.
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
    folder: Path,
    data: Dataset,
    candidate: Candidate,
    metrics: dict[str, Any],
    drawing: bytes,
) -> None:
    """Fit on all images and write every file; METRICS last: the folder is complete.

    `drawing` is a PNG, or empty. The classifier has the last stage's factor; the other
    stages' are relative to it.
    """
    labels = np.array(data.classes)[data.labels]
    svc = SVC(
        kernel=candidate[0], C=candidate[1], gamma="auto", decision_function_shape="ovo"
    )
    words = make_pipeline(StandardScaler(), svc).fit(
        data.vectors,
        labels[data.image],
        svc__sample_weight=weights(data.generic),
    )
    *_, last = metrics["thresholds"]["stages"].values()
    factor = last["factor"]
    for each in metrics["thresholds"]["stages"].values():
        each["factor"] /= factor
    metrics["model"] = {"kernel": candidate[0], "c": candidate[1], "factor": factor}
    estimators = {
        config.CLASSIFIER: with_probabilities(words[1], factor),
        config.SCALER: words[0],
        config.SECOND_READER: fit_picture(data.pixels, labels),
    }
    for name in (config.METRICS, config.CONFUSION_MATRIX):
        utils.remove_file(folder / name)
    for name, estimator in estimators.items():
        with utils.atomic_write(folder / name) as file:
            joblib.dump(estimator, file)
    with utils.atomic_write(folder / config.NEIGHBOURS) as file:
        np.savez(
            file,
            rows=points_of(data, data.all, words[0]),
            owner=np.repeat(np.arange(len(data.labels)), int(data.k)).astype(np.int32),
            names=np.array([line["file"] for line in data.lines]),
            projection=data.projection,
            pixels=data.pixels,
        )
    if drawing:
        with utils.atomic_write(folder / config.CONFUSION_MATRIX) as file:
            file.write(drawing)
    names = (*estimators, config.NEIGHBOURS)
    metrics["sha256"] = {name: utils.sha256_of(folder / name) for name in names}
    utils.write_json(folder / config.METRICS, metrics)


def draw_confusion(metrics: Mapping[str, Any]) -> bytes:
    """Counts and shares of every true class as a PNG; empty if it can't be drawn.

    An extra: matplotlib's defaults, no pyplot and no backend, so that what Jupyter or a
    matplotlibrc asks for can't end the phase.
    """
    os.environ.pop("MPLBACKEND", None)  # its import fails on one that is not there
    try:
        from matplotlib import rc_context, rcdefaults  # noqa: PLC0415  (a second)
        from matplotlib.figure import Figure  # noqa: PLC0415

        counts = np.array(metrics["evaluation"]["confusion_matrix"])
        shares, file = counts / counts.sum(axis=1, keepdims=True), io.BytesIO()
        names = [shortened(name) for name in metrics["class_names"]]
        side = min(2.5 + len(names), 16)
        with rc_context():
            rcdefaults()
            drawing = Figure(figsize=(side + 0.5, side), layout="constrained")
            axes = drawing.subplots()
            axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            for place, ticks in (
                (axes.xaxis, axes.set_xticks),
                (axes.yaxis, axes.set_yticks),
            ):
                ticks(range(len(names)), names, parse_math=False)
                place.set_tick_params(rotation=90 if len(names) > 5 else 0)
            axes.set(xlabel="class by the descriptions", ylabel="true class")
            for at, count in np.ndenumerate(counts) if len(names) <= 20 else ():
                colour = "white" if shares[at] > 0.5 else "black"
                text = f"{round(count, 1):g}\n{shares[at]:.0%}"
                axes.text(at[1], at[0], text, ha="center", va="center", color=colour)
            axes.set_title(
                f"Held-out images, {metrics['k_measured']} {metrics['asked']} "
                f"descriptions\naccuracy {shown(metrics['evaluation']['accuracy'])} of "
                f"{metrics['images']}"
            )
            drawing.savefig(file, format="png", dpi=150)
    except Exception as error:
        log.warning("warning: %s is left out: %s", config.CONFUSION_MATRIX, error)
        return b""
    return file.getvalue()


# --- Report ---------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A number, or an estimate with its interval."""
    if not isinstance(value, Mapping):
        return f"{value:.2f}"
    limits = "-".join(f"{limit:.2f}" for limit in value.get("interval", ()))
    return f"{value['value']:.2f}" + (f" ({limits})" if limits else "")


def in_points(gap: Mapping[str, Any]) -> str:
    value, low, high = (round(100 * x) for x in (gap["value"], *gap["interval"]))
    return f"{value:+d} points ({low:+d} to {high:+d})"


def shortened(name: str) -> str:
    cut = len(name) > SHOWN_LETTERS
    return name[: SHOWN_LETTERS - 1] + "…" if cut else name


def report_lines(metrics: Mapping[str, Any], verbose: bool) -> Iterator[str]:
    """The estimates in the order in which they should be read."""
    made, part, splits = (
        metrics["conditions"],
        metrics["finished_only"],
        metrics["splits"],
    )
    images = f"{metrics['images']} images"
    if part:
        images = f"{part['images']} of {part['labelled']} labelled images"
    yield (
        f"{images}, {metrics['rows']} rows, described by {made.get('vlm')}, embedded "
        f"by {made.get('embedder')}\n"
    )
    stages = " or ".join(metrics["thresholds"]["stages"])
    yield (
        f"What phase 4 will do: new images, {stages} {metrics['asked']} descriptions "
        f"each\n(held out by {splits['group_by']}, {splits['groups']} groups in "
        f"{splits['folds']} folds, {splits['repeats']} times; brackets: 95 % intervals)"
    )
    yield from (f"  {name:<18} {text}" for name, text in decision_lines(metrics))
    yield "\nEach reader alone, asked for a class of every image"
    yield from (f"  {name:<18} {text}" for name, text in reader_lines(metrics))
    yield from class_lines(metrics)
    yield "\nAccuracy of the descriptions, counted in other ways"
    yield from (f"  {name:<50} {shown(v)}" for name, v in metrics["comparison"].items())
    yield "\nChecks"
    yield from (f"  {each['name']:<16} {each['finding']}" for each in metrics["checks"])
    yield ""
    held_out = metrics["held_out"]
    wrong = [each for each in held_out if each["descriptions_say"] != each["class"]]
    for each in wrong if verbose else wrong[:5]:
        yield (
            f"is the label right? {each['file']}: {each['own_probability']:.1%} for "
            f"{each['class']}; descriptions say {each['descriptions_say']}, picture "
            f"says {each['picture_says']}"
        )
    if len(wrong) > 5 and not verbose:
        yield f"({len(wrong) - 5} more with --verbose, or in {config.METRICS})"
    yield from (f"WARNING: {warning}" for warning in metrics["warnings"])


def decision_lines(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a user of phase 4 will see."""
    found, unknown = metrics["decision"], metrics["unknown_classes"]
    others = f'of known images; the others get "{config.INCONCLUSIVE}"'
    yield "answered", f"{shown(found['answered'])} {others}"
    yield "wrong", f"{shown(found['wrong'])} of the answers"
    worst = found["classes"][found["worst"]]
    yield (
        "worst class",
        f"{shown(worst)} of the {worst['n']:.3g} answers {shortened(found['worst'])}",
    )
    refused = "not measured: needs three classes"
    if unknown:
        refused = f"{shown(unknown['refused'])} refused, of a class that was left out"
    yield "unknown images", refused
    low, high = found["questions"]["interval"]
    asked = f"{found['questions']['value']:.1f} ({low:.1f}-{high:.1f})"
    yield "questions", f"{asked} per known image"
    alone = found["one_reader"]
    yield (
        "with --one-reader",
        f"{shown(alone['answered'])} answered, {shown(alone['wrong'])} wrong",
    )
    made, aim, n = found["promise"], metrics["max_error"], found["wrong"]["n"]
    text = f"with {made['with']:.0%} confidence at most {made['share']:.1%} of errors"
    if made["share"] > aim and made["answers_needed"]:
        text = (
            f"{n:.3g} answers can't promise {aim:.0%}: {text}; "
            f"{made['answers_needed']} answers without an error would do"
        )
    yield "promised", text if n else "nothing: no image is answered"


def reader_lines(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found, n = metrics["readers"], metrics["images"]
    right = found["descriptions"]["value"] * n
    yield "accuracy", f"{shown(found['descriptions'])} descriptions, {right:.3g} of {n}"
    yield "", f"{shown(found['picture'])} picture, without any question"
    agreed = shown(found["right_where_they_agree"])
    yield "both agree", f"{shown(found['agree'])}, and are then right in {agreed}"
    yield "descriptions add", f"{in_points(found['gain'])} to the picture"
    yield (
        "",
        "(where that is nothing, and unknown images are rare, spare the VLM's hours)",
    )
    evaluation = metrics["evaluation"]
    yield "balanced accuracy", shown(evaluation["balanced_accuracy"])
    yield "commonest class", shown(evaluation["majority_rate"])


def class_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Tables by class, of many classes only the worst."""
    found, answered = metrics["evaluation"]["classes"], metrics["decision"]["classes"]
    ranked = sorted(found, key=lambda name: found[name]["recall"]["value"])
    rows = [name for name in found if name in ranked[:SHOWN_CLASSES]]
    width = max(8, *(len(shortened(name)) for name in rows))
    yield f"\n  {'':<{width}} images  {'precision':<18}{'recall':<18}F1    answers"
    for name in rows:
        each = found[name]
        both = "".join(f"{shown(each[key]):<18}" for key in ("precision", "recall"))
        yield (
            f"  {shortened(name):<{width}} {each['images']:>6}  {both}"
            f"{shown(each['f1'])}  {answered[name]['n']:>7.3g}"
        )
    if len(found) > SHOWN_CLASSES:
        yield f"  (the worst {len(rows)} of {len(found)}: see {config.METRICS})"
        return
    repeats = metrics["splits"]["repeats"]
    yield f"\n  Images by the descriptions, mean of {repeats} repeats"
    yield f"  {'is':<{width}}" + "".join(f" {'-> ' + shortened(n):>11}" for n in rows)
    for name, row in zip(rows, metrics["evaluation"]["confusion_matrix"], strict=True):
        cells = "".join(f" {round(count, 1):>11g}" for count in row)
        yield f"  {shortened(name):<{width}}{cells}"


def find_warnings(metrics: Mapping[str, Any], cfg: Config) -> Iterator[str]:
    """What a reader of the estimates must not miss."""
    found, splits = metrics["evaluation"], metrics["splits"]
    if metrics["asked"] != "generic":
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
    if min(each["images"] for each in found["classes"].values()) < 20:
        yield "fewer than 20 images in a class: see how wide the intervals are"
    if found["accuracy"]["interval"][0] <= found["majority_rate"]:
        yield "not shown to be better than always answering the commonest class"
    if metrics["readers"]["gain"]["interval"][0] <= 0:
        yield "not shown that the descriptions are better than the picture alone"
    yield from threshold_warnings(metrics)
    yield from (check["warning"] for check in metrics["checks"] if check["warning"])


def threshold_warnings(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Classes that are never answered, and errors above what was aimed at."""
    wrong = metrics["decision"]["wrong"]
    stages = metrics["thresholds"]["stages"].values()
    silent = [
        shortened(name)
        for name in metrics["class_names"]
        if all(each["confidence"][name] >= NEVER for each in stages)
    ]
    if len(silent) == len(metrics["class_names"]):
        yield f'no confidence is safe: phase 4 will only say "{config.INCONCLUSIVE}"'
    elif silent:
        yield f"no confidence is safe for {', '.join(silent[:5])}: never answered"
    if wrong["n"] and wrong["interval"][1] > metrics["max_error"]:
        yield (
            f"{wrong['value']:.1%} of the answers were wrong, and it may be up to "
            f"{wrong['interval'][1]:.1%}: the thresholds aim at "
            f"{metrics['max_error']:.0%} "
            "and don't promise it"
        )


# --- The report as a page -------------------------------------------------------------


def report_sheet(data: Dataset, metrics: Mapping[str, Any]) -> utils.Sheet:
    """All that the console says, and the images, the likeliest wrong labels first."""
    folder, listed = data.cfg.folder("dataset_dir"), metrics["held_out"]
    ids = [line["image_id"] for line in data.lines]
    doubtful = {  # these are shown with their descriptions and the nearest images
        each["image_id"]
        for place, each in enumerate(listed)
        if place < len(listed) / 10 or each["class"] != each["descriptions_say"]
    }
    texts: dict[str, list[str]] = {}
    for row in utils.read_csv(folder / config.DATASET_ROWS):
        if row["image_id"] in doubtful and row["prompt_set"] == "generic":
            texts.setdefault(row["image_id"], []).append(row["description"])
    scaled = StandardScaler().fit_transform(data.pixels)
    found = utils.fit_neighbours(scaled, 4).kneighbors(scaled, return_distance=False)
    near = {
        ids[image]: [(ids[at], data.lines[at]["file"]) for at in others if at != image]
        for image, others in enumerate(found.tolist())
        if ids[image] in doubtful
    }
    tiles = [
        utils.Tile(
            name=each["file"],
            picture=each["image_id"],
            label=each["class"],
            state=f"{each['class']} → {each['descriptions_say']}",
            shares={f"for {each['class']}": each["own_probability"]},
            lines=[f"picture says {each['picture_says']}", each["reason"]],
            near=near.get(each["image_id"], ())[:3],
            details=texts.get(each["image_id"], ()),
        )
        for each in listed
    ]
    sections = [utils.Section("Read this first", metrics["warnings"], warning=True)]
    console = "\n".join(report_lines(metrics, verbose=False))
    made, *blocks = re.split(r"\n\n(?=\S)", console)
    for block in blocks[:4]:
        title, *lines = block.splitlines()
        sections.append(utils.Section(title, lines))
    behind, names = Counter(tile.state for tile in tiles), metrics["class_names"]
    matrix: list[list[str | tuple[str, str]]] = [["is", *(f"→ {n}" for n in names)]]
    for name in names:
        states = [f"{name} → {says}" for says in names]
        matrix.append([name, *((str(behind[state]), state) for state in states)])
    thumbnails = (folder / config.THUMBNAIL_DIR / f"{image}.jpg" for image in ids)
    return utils.Sheet(
        title=f"How good the model is: {made}",
        folder="",
        tiles=tiles,
        pictures={p.stem: p.read_bytes() for p in thumbnails if p.is_file()},
        classes=names,
        sections=[
            *sections[not metrics["warnings"] :],
            utils.Section("By the descriptions; a number shows its images", (), matrix),
            utils.Section("Figures", charts=charts(metrics)),
            utils.Section("Is the label right? The least probable ones stand first"),
        ],
        foot=["This page shows training images. The model works without it."],
    )


def charts(metrics: Mapping[str, Any]) -> list[utils.Chart]:
    """Reliability, errors by share answered, accuracy by number of descriptions."""
    found, repeats = metrics["confidence"], metrics["splits"]["repeats"]
    sure = [(x, right, *wilson(right, n / repeats)) for x, right, n in found["bins"]]
    # Below a tenth of the images the share of errors is that of a few.
    errors = [(x, y, y, y) for x, y in found["errors_by_answered"] if x > 0.1]
    top = next(y for y in (0.1, 0.2, 0.4, 1) if y >= max(e[1] for e in errors))
    counted = [
        (float(name.split()[1]), value["value"], *value["interval"])
        for name, value in metrics["comparison"].items()
        if name.startswith("descriptions: ")
    ]
    return [
        utils.Chart("Right, by confidence", "confidence", sure, diagonal=True),
        utils.Chart("Errors, by share answered", "share answered", errors, y_max=top),
        utils.Chart("Accuracy", "descriptions", counted, x_max=counted[-1][0]),
    ]


# --- The phase ------------------------------------------------------------------------


def describe_training(data: Dataset, splits: Sequence[Split]) -> Any:
    """With what the model was made: phase 4 compares it with what it finds."""
    repeats, manifest, cfg = splits[-1][0] + 1, data.manifest, data.cfg
    return {
        "program_version": config.PROGRAM_VERSION,
        "libraries": {name: version(name) for name in LIBRARIES},
        "class_names": data.classes,
        "conditions": manifest["conditions"],
        "probe_vector": manifest["probe_vector"],
        "dataset": manifest["sha256"],
        "finished_only": manifest.get("finished_only"),
        "modalities": modalities(data),
        "images": len(data.labels),
        "rows": data.n_rows,
        "features": data.vectors.shape[1],
        "k": cfg.inference_descriptions,
        "k_measured": int(data.k),
        "asked": "generic" if data.generic.any() else "class-specific",
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


def run(cfg: Config) -> int:
    """Evaluate, check, fit and report; returns the exit code."""
    data = load_dataset(cfg.folder("dataset_dir"), cfg)
    n_folds = count_folds(data)
    repeats = int(np.clip(JUDGEMENTS // len(data.labels), 1, 5))
    splits = make_splits(data, data.groups, n_folds, repeats)
    if not splits:
        raise PipelineError(
            f"held out by {cfg.group_by}, a class has no image left to train on: use "
            "fewer --folds or --group-by image"
        )
    candidates = [(cfg.kernel, cfg.c), *SEARCH[cfg.search]]
    default = candidates[0]
    metrics = describe_training(data, splits)

    log.info("evaluating on held-out images")
    judged = hold_out(data, splits, candidates)
    metrics["evaluation"] = evaluate(data, judged[data.k])
    metrics["readers"] = compare_readers(data, judged)
    metrics["comparison"] = count_accuracies(data, judged, default)

    log.info("checking for leaks")
    right = judged[data.k].argmax(axis=-1) == data.labels
    accuracy = float(right.mean())
    checks = [
        *check_prompts(data, splits, default, right),
        check_headers(data, splits, accuracy),
        check_unseen(data, default, accuracy),
        check_time(data, splits, default),
    ]
    metrics["checks"] = [vars(check) for check in checks]

    log.info("choosing thresholds")
    chosen = choose_candidate(data, data.all, candidates)
    if len(candidates) > 1:  # those scores are of several models, each on its scale
        judged = hold_out(data, splits, [chosen])
    metrics["thresholds"] = find_thresholds(data, judged, data.all)
    decided = cross_fit(data, judged, splits)
    metrics["decision"] = rate_decisions(data, decided)
    metrics["confidence"] = rate_confidence(data, decided)
    metrics["held_out"] = list_images(data, judged, decided)
    metrics["unknown_classes"] = leave_classes_out(data, chosen)

    metrics["warnings"] = list(find_warnings(metrics, cfg))
    write_model(cfg.folder("model_dir"), data, chosen, metrics, draw_confusion(metrics))
    page = cfg.folder("model_dir") / config.REPORT
    utils.page(page, report_sheet(data, metrics))
    print(*report_lines(metrics, cfg.verbose), sep="\n")
    print(f"\nmodel and figures in {cfg.folder('model_dir')}; to look at: {page}")
    print("next: python fase4_inferencia_vlm.py FILE_OR_FOLDER …")
    return utils.EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: flags, logging, one line for what a user can mend."""
    cfg, _ = config.parse_config(3, __doc__ or "", argv)
    utils.start_logging(log, cfg)
    with threadpool_limits(1):  # threads that wait for each other cost twice the time
        return utils.exit_code(lambda: run(cfg), log.error)


if __name__ == "__main__":
    raise SystemExit(main())
