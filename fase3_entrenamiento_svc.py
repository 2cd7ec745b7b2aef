"""Phase 3: train the two readers, and say honestly how good they are.

Reads   dataset_final_vlm/         what phase 2 wrote; no DICOM file and no server
Writes  modelo_final_vlm/
          clasificador_svc.joblib  scaled vectors -> class probabilities
          escalador.joblib         StandardScaler of the vectors
          segundo_lector.joblib    statistics of the picture -> class
          vecinos.npz              training images, for novelty; arrays only
          matriz_de_confusion.png  counts and shares of held-out images
          informe.html             all that the console says, with the images
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
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import betaincinv, log_softmax, softmax, stdtrit
from sklearn import config_context
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import linear_kernel, rbf_kernel
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
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
"""What the readers said of images that they were not trained on, by name.

Scores (…, n_images, n_classes): "picture", and of the descriptions' reader by what it
was asked, "3", "10" … rows or "class-specific"; "10 after generic" if it was trained on
generic rows alone. Distances to training: "far" (…, n_images, k) and "picture_far"
(…, n_images). Of `cross_fit`: "probabilities" (…, n_images, n_classes) and
(…, n_images) "label" and "one_reader", -1 for INCONCLUSIVE, and "questions".
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
DESCRIPTION_COUNTS = (1, FIRST_STAGE, 10)
"""Numbers of generic descriptions for which the accuracy is shown."""
SHORT = (("linear", 0.001), ("linear", 0.1), ("rbf", 1.0), ("rbf", 10.0))
FULL = (*SHORT, ("linear", 0.0001), ("linear", 1.0), ("rbf", 0.1), ("rbf", 100.0))
SEARCH: dict[str, tuple[Candidate, ...]] = {"none": (), "short": SHORT, "full": FULL}
"""--search: the candidates beside the default."""
KERNELS = {"linear": linear_kernel, "rbf": rbf_kernel}
"""BLAS computes them, in a thirtieth of the time of libsvm's own loops."""
PairwiseSVC = partial(SVC, decision_function_shape="ovo")
"""Its decisions are those of each pair of classes, which `utils.class_scores` sums."""
JUDGEMENTS = 300
"""Folds are repeated, up to five times, until so many images have been judged."""
CLASSES_LEFT_OUT = 5
"""Of many classes, left out in turn to see whether unknown images are refused."""

PROMPT_GAP = 0.15
"""Points lost between class-specific prompts and generic ones that give a warning."""
HEADER_GAP = 0.05
"""A header field this close to the model's accuracy gives a warning."""
HEADER_FIELDS = ("modality", "manufacturer", "detector", "rows", "day", "kvp", "mas")
PROMISED_WITH = 0.9
"""Confidence with which a share of errors is promised."""
Z = 1.959964
"""97.5 % quantile of the normal distribution: the limits of 95 % intervals."""
PLAIN_LINE_S = 15.0
"""Where there is no terminal for a bar, a line comes at most so often."""
SHOWN_CLASSES, SHOWN_LETTERS = 12, 20
"""What tables on the terminal show of many classes, and of long names."""

# --- The dataset --------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """What phase 2 wrote, in the averages that train and the rows that judge."""

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
    specific: Rows
    """(n_images, n_features), means of the others; (n_images, 0) without both sets."""
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

    def means(self) -> dict[str, Rows]:
        """(n_images, n_features) by what the reader of descriptions is asked."""
        k = self.described.shape[1]
        counts = sorted({*DESCRIPTION_COUNTS, k} & {*range(1, k + 1)})
        found = {str(n): self.described[:, :n].mean(axis=1) for n in counts}
        return found | ({"class-specific": self.specific} if self.specific.size else {})

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
            specific=self.specific[images],
        )


def load_dataset(folder: Path, cfg: Config) -> Dataset:
    """Read phase 2's folder, and average its rows.

    Raises
    ------
    PipelineError
        Not finished, changed since, of an older phase 2, or at odds with itself.
    """
    manifest = utils.read_json(folder / config.MANIFEST, PHASE_2)
    if not {"sha256", "conditions", "probe_vector"} <= set(manifest):
        raise PipelineError(f"{folder / config.MANIFEST} is not complete: {PHASE_2}")
    names = (
        *(config.DATASET_X, config.DATASET_Y, config.DATASET_PIXELS),
        *(config.DATASET_ROWS, config.DATASET_IMAGES),
    )
    if not {*names} <= set(manifest["sha256"]):
        raise PipelineError(
            f"{folder} was written by an older phase 2: {PHASE_2} (it keeps its "
            "answers and asks only what is new)"
        )
    for name in names:
        utils.check_digest(folder / name, manifest["sha256"][name], PHASE_2)
    pixels = np.array(load_array(folder / config.DATASET_PIXELS))
    table, lines = (utils.read_csv(folder / name) for name in names[3:])
    if problem := find_problem(load_array(folder / names[0]), pixels, table, lines):
        raise PipelineError(f"{folder}: {problem}: {PHASE_2}")
    return average_rows(folder, pixels, table, lines, manifest, cfg)


def find_problem(
    rows: NDArray[Any], pixels: Rows, table: list[dict[str, str]], lines: Any
) -> str:
    """Why arrays and tables can't be used; that they are phase 2's is known by now."""
    ids = list(dict.fromkeys(row["image_id"] for row in table))
    sets = {(row["image_id"], row["prompt_set"] == "generic") for row in table}
    if len(rows) != len(table):
        return f"{config.DATASET_X} and {config.DATASET_ROWS} differ in length"
    if [line["image_id"] for line in lines] != ids or len(pixels) != len(ids):
        return f"{config.DATASET_ROWS} names other images than the other files"
    if len({row["class"] for row in table}) < 2:
        return f"one class only ({table[0]['class']}); label images of another"
    if len(sets) != len(ids) * len({generic for _, generic in sets}):
        return "some images have rows of one prompt set only"
    return ""


def load_array(path: Path) -> NDArray[Any]:
    """Map a .npy file into memory; pickled objects are refused, not loaded."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise PipelineError(f"{path} can't be read ({error}): {PHASE_2}") from None
    return array


def average_rows(
    folder: Path,
    pixels: Rows,
    table: list[dict[str, str]],
    lines: list[dict[str, str]],
    manifest: dict[str, Any],
    cfg: Config,
) -> Dataset:
    """Means of rows that train, and the rows that judge as phase 4 asks.

    The rows of one image and prompt set are averaged in a few groups; every n-th row
    goes to the same, so that each mixes early and late prompts. Single rows are no
    better, and fits cost the square of their number.
    """
    number = {line["image_id"]: i for i, line in enumerate(lines)}
    owner = np.array([number[row["image_id"]] for row in table])
    is_generic = np.array([row["prompt_set"] == "generic" for row in table])
    asked = is_generic == is_generic.any()  # as phase 4 asks, if any row was
    k = min(cfg.inference_descriptions, int(np.bincount(owner[asked]).min()))
    n_groups = int(np.clip(600 // len(lines), 1, 10))
    vectors, images, generics, described, specific = [], [], [], [], []
    for image in range(len(lines)):
        chosen = np.flatnonzero(owner == image)
        # Mapped for this image alone: the pages of a whole map would stay in memory.
        rows = load_array(folder / config.DATASET_X)[chosen]
        for generic in (False, True):
            part = rows[is_generic[chosen] == generic]
            n = min(n_groups, len(part))
            vectors += [part[start::n].mean(axis=0) for start in range(n)]
            images += [image] * n
            generics += [generic] * n
        described.append(rows[asked[chosen]][:k])
        others = rows[~asked[chosen]]
        specific.append(rows[0, :0] if asked.all() else others.mean(axis=0))
    # A mean is finite where all its rows are.
    if not (np.isfinite(vectors).all() and np.isfinite(pixels).all()):
        raise PipelineError(f"{folder} holds values that are not finite: {PHASE_2}")
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
        described=np.array(described),
        specific=np.array(specific),
        projection=make_projection(len(vectors[0]), cfg.seed),
        n_rows=len(table),
        manifest=manifest,
        cfg=cfg,
    )


def make_projection(n_features: int, seed: int) -> Rows:
    """Random normal numbers, (n_features, NEIGHBOUR_DIMENSIONS)."""
    if n_features <= NEIGHBOUR_DIMENSIONS:
        return np.zeros((0, 0), np.float32)
    shape = n_features, NEIGHBOUR_DIMENSIONS
    normal = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return np.asarray(normal / np.float32(np.sqrt(NEIGHBOUR_DIMENSIONS)))


def header_values(lines: Sequence[Mapping[str, str]], field: str) -> NDArray[np.str_]:
    """One value per image; those without it are alike."""
    return np.array([line["image_id" if field == "image" else field] for line in lines])


def merge_equal(values: NDArray[np.str_], pixels: Rows) -> Integers:
    """Group numbers, (n_images,); images with an equal picture share their groups."""
    groups = np.unique(values, return_inverse=True)[1]
    _, pictures, counts = np.unique(
        pixels, axis=0, return_inverse=True, return_counts=True
    )
    for picture in np.flatnonzero(counts > 1):
        shared = groups[pictures == picture]
        groups[np.isin(groups, shared)] = shared[0]
    return np.asarray(np.unique(groups, return_inverse=True)[1])


def count_folds(data: Dataset, groups: Integers, most: int) -> int:
    """Folds, at most so many, that every class has enough groups for."""
    per_class = (groups[data.labels == label] for label in range(len(data.classes)))
    return min(most, *(len({*each}) for each in per_class))


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


def track(splits: Sequence[Split]) -> Iterator[Split]:
    """The splits behind a bar; off a terminal behind a line every 15 s, and a last."""
    hidden = not log.isEnabledFor(logging.INFO) or None  # None: off a terminal
    told = start = time.monotonic()
    with tqdm(splits, "folds", disable=hidden, leave=False) as bar:
        for number, split in enumerate(splits, 1):
            yield split
            bar.update()
            late = time.monotonic() - told > PLAIN_LINE_S
            if bar.disable and (late or (number == len(splits) and told > start)):
                log.info("folds: %d of %d", number, len(splits))
                told = time.monotonic()


def hold_out(
    data: Dataset,
    splits: Sequence[Split],
    judge_new: Callable[[Dataset, Dataset], Judged],
) -> Judged:
    """What is said of the images of every fold, with an axis of repeats.

    `judge_new` trains with its first dataset, and judges the second.
    """
    found: Judged = {}
    for repeat, training, images in track(splits):
        part = judge_new(data.only(training), data.only(images))
        for name, values in part.items():
            shape = splits[-1][0] + 1, len(data.labels), *values.shape[1:]
            found.setdefault(name, np.zeros(shape))[repeat, images] = values
    return found


def judge(
    known: Dataset, new: Dataset, candidate: Candidate, prompt_sets: bool = False
) -> Judged:
    """Train both readers, and let them judge images that they don't know."""
    judged, scaler = read_descriptions(known, new, candidate, prompt_sets)
    far = distances(
        points_of(known, scaler), points_of(new, scaler), utils.NEIGHBOUR_COUNT
    )
    judged["far"] = far.reshape(len(new.labels), -1)
    picture = fit_picture(known.pixels, known.labels)
    judged["picture"] = utils.class_scores(
        picture.decision_function(new.pixels), len(picture.classes_)
    )
    seen, unseen = (picture[0].transform(side.pixels) for side in (known, new))
    judged["picture_far"] = distances(seen, unseen, utils.PIXEL_NEIGHBOUR_COUNT)
    return judged


def read_descriptions(
    known: Dataset, new: Dataset, candidate: Candidate, prompt_sets: bool = False
) -> tuple[Judged, StandardScaler]:
    """Train the descriptions' reader, and let it judge images that it doesn't know.

    With `prompt_sets` it is also trained on the rows of one set alone: "… after
    generic" as if the others had never been asked, "… after class-specific" with the
    scaler of all, since not the distance between the sets is in question there.
    """
    means, kernel, judged = new.means(), KERNELS[candidate[0]], Judged()
    labels, asked = known.labels[known.image], np.concatenate(list(means.values()))

    def read(use: Booleans, scaled_by: Booleans, after: str = "") -> StandardScaler:
        scaler = StandardScaler().fit(known.vectors[scaled_by])
        rows = scaler.transform(known.vectors[use])
        svc = PairwiseSVC(kernel="precomputed", C=candidate[1])
        svc.fit(kernel(rows), labels[use], weights(known.generic[use]))
        decisions = svc.decision_function(kernel(scaler.transform(asked), rows))
        scores = np.split(utils.class_scores(decisions, len(svc.classes_)), len(means))
        for name, part in zip(means, scores, strict=True):
            judged[name + after] = part
        return scaler

    every, generic = np.ones(len(labels), bool), known.generic
    if prompt_sets and known.specific.size:
        read(generic, generic, " after generic")
        read(~generic, every, " after class-specific")
    return judged, read(every, every)


def weights(generic: Booleans) -> Floats:
    """Of training vectors: both prompt sets weigh alike in all."""
    ratio = float(np.sum(~generic)) / max(float(np.sum(generic)), 1.0)
    return np.where(generic, ratio or 1.0, 1.0)


def fit_picture(pixels: Rows, labels: NDArray[Any]) -> Pipeline:
    """The second reader; not tuned, since linear and LDA are as good."""
    return make_pipeline(StandardScaler(), PairwiseSVC(C=10)).fit(pixels, labels)


def points_of(data: Dataset, scaler: StandardScaler) -> Rows:
    """Scaled, projected descriptions, (n_images * k, n_dimensions).

    A few images at a time: all of them scaled would be copies of 100 MB.
    """
    parts = np.array_split(data.described, -(-len(data.described) // 64))
    scaled = (scaler.transform(np.concatenate(part)) for part in parts)
    return np.concatenate([utils.project(each, data.projection) for each in scaled])


def distances(known: Rows, new: Rows, count: int) -> Floats:
    """Mean distance of each new point to the nearest known ones, (n_new,)."""
    found = utils.fit_neighbours(known, count).kneighbors(new)[0]
    return np.asarray(found.mean(axis=1))


def choose_candidate(data: Dataset, candidates: Sequence[Candidate]) -> Candidate:
    """The best in folds among these images; the first of equals."""
    n_folds = count_folds(data, data.groups, 3) if len(candidates) > 1 else 1
    splits = make_splits(data, data.groups, n_folds) if n_folds > 1 else []
    if not splits:
        return candidates[0]
    rights = [right_by(data, splits, each).mean() for each in candidates]
    return candidates[int(np.argmax(rights))]


def right_by(data: Dataset, splits: Sequence[Split], candidate: Candidate) -> Booleans:
    """Whether the descriptions' reader alone is right, (n_repeats, n_images)."""

    def read(known: Dataset, new: Dataset) -> Judged:
        return read_descriptions(known, new, candidate)[0]

    return is_right(data, hold_out(data, splits, read)[data.k])


def is_right(data: Dataset, scores: Floats) -> Booleans:
    return np.asarray(scores.argmax(axis=-1) == data.labels)


# --- Calibration, thresholds, and the decisions that they give ------------------------


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
    targets = np.full((n, n_classes), doubt / (n_classes - 1))
    targets[np.arange(n), labels] = 1 - doubt

    def loss(log_factor: float) -> float:
        likelihoods = log_softmax(np.exp(log_factor) * scores, axis=-1)
        return -float(np.sum(targets * likelihoods))

    found = minimize_scalar(loss, bounds=np.log([1e-3, 1e3]), method="bounded")
    return float(np.exp(found.x))


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


def find_thresholds(
    data: Dataset, judged: Judged, use: Booleans | None = None
) -> dict[str, Any]:
    """Limits of novelty, calibration and thresholds from (these) held-out images.

    A class needs the higher of two confidences: one for all classes, which counts one
    error more than there was, and one of its own answers; both from the images that
    nothing else refuses. `utils.Model.thresholds` describes the result.
    """
    images = np.flatnonzero(np.ones(len(data.labels)) if use is None else use)
    labels, max_error = data.labels[images], data.cfg.max_error
    part = {name: values[:, images] for name, values in judged.items()}

    def quantile(far: Floats) -> float:
        return float(np.quantile(far, 1 - data.cfg.known_refused, method="higher"))

    def needed(passes: Booleans) -> dict[str, float]:
        def lowest(use: Booleans, extra: int = 0) -> float:
            return lowest_confidence(confidence[use], right[use], max_error, extra)

        common = lowest(passes, len(said))  # one error more in every repeat
        return {
            name: max(common, lowest(passes & (said == label)))
            for label, name in enumerate(data.classes)
        }

    picture_far = part["picture_far"].mean(axis=0)
    found: dict[str, Any] = {"pixels": quantile(picture_far), "stages": {}}
    for stage in data.stages:
        count = min(stage, int(data.k))
        scores, far = part[str(count)], part["far"][..., :count].mean(axis=(0, 2))
        factor, limit = fit_factor(scores, labels), quantile(far)
        confidence, said = softmax(factor * scores, axis=-1).max(-1), scores.argmax(-1)
        right = said == labels
        alone = np.broadcast_to(far <= limit, said.shape)
        agreed = said == part["picture"].argmax(axis=-1)
        found["stages"][str(stage)] = {
            "descriptions": limit,
            "factor": factor,
            "confidence": needed(alone & agreed & (picture_far <= found["pixels"])),
            "one_reader": needed(alone),
        }
    return found


def decide(
    data: Dataset,
    judged: Judged,
    at: tuple[int, int],
    limits: Mapping[str, Any],
    foreign: str,
    one_reader: bool = False,
) -> utils.Decision:
    """What phase 4 says of a held-out image, by the function that it calls.

    Parameters
    ----------
    at : (repeat, image)
    limits : mapping
        As `find_thresholds` gives it; its stages are tried in their order.
    foreign : str
        Why the header refuses the image, if it does.
    """
    picture, image = None, at[1]
    if not one_reader:
        far = judged["picture_far"][:, image].mean()
        novelty = utils.times_limit(far, limits["pixels"])
        picture = Opinion(data.classes[judged["picture"][at].argmax()], 1.0, novelty)
    decision = utils.decide(limits, picture, foreign=foreign)
    for stage, each in limits["stages"].items() if not decision.reason else ():
        count = min(int(stage), int(data.k))
        shares = softmax(each["factor"] * judged[str(count)][at])
        best, far = int(shares.argmax()), judged["far"][:, image, :count].mean()
        novelty = utils.times_limit(far, each["descriptions"])
        words = Opinion(data.classes[best], float(shares[best]), novelty)
        decision = utils.decide(limits, picture, words, int(stage), foreign)
        if decision.final:
            break
    return decision


def cross_fit(
    data: Dataset, judged: Judged, splits: Sequence[Split]
) -> tuple[Judged, list[str]]:
    """Decide on the images of each fold by what was found on the others.

    Returns the decisions, and the reasons of the first repeat, (n_images,).
    """
    scores, reasons = judged[data.k], [""] * len(data.labels)
    found = {"probabilities": np.zeros_like(scores)}
    number = {name: label for label, name in enumerate(data.classes)}
    for name in ("label", "one_reader", "questions"):
        found[name] = np.zeros(scores.shape[:2])
    for repeat, others, images in splits:
        limits = find_thresholds(data, judged, others)
        trained = modalities(compress(data.lines, others))
        *_, last = limits["stages"].values()
        logits = last["factor"] * scores[repeat, images]
        found["probabilities"][repeat, images] = softmax(logits, axis=-1)
        for image in np.flatnonzero(images).tolist():
            foreign = utils.foreign_modality(data.lines[image]["modality"], trained)
            given = data, judged, (repeat, image), limits, foreign
            decision, alone = decide(*given), decide(*given, one_reader=True)
            found["label"][repeat, image] = number.get(decision.label, -1)
            found["one_reader"][repeat, image] = number.get(alone.label, -1)
            found["questions"][repeat, image] = decision.stage
            reasons[image] = reasons[image] if repeat else decision.reason
    return found, reasons


# --- Estimates. Repeats are averaged: they are the same images, so n stays ------------


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n (Wilson, JASA 22 (1927) 209); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    centre = share + Z**2 / (2 * n)
    half = Z * float(np.sqrt(max(0, share * (1 - share)) / n + Z**2 / (4 * n**2)))
    low, high = ((centre + side) / (1 + Z**2 / n) for side in (-half, half))
    return max(0.0, min(share, low)), min(1.0, max(share, high))


def estimate(share: float, n: float, words: str = "") -> dict[str, Any]:
    """A share, its 95 % interval, and how many images it is a share of."""
    interval = list(wilson(share, n))
    return {"value": float(share), "interval": interval, "n": float(n), "words": words}


def share_of(
    part: Booleans, whole: Booleans | None = None, words: str = ""
) -> dict[str, Any]:
    """The share of the images of `whole` that are in `part`, both (n_repeats, …)."""
    whole = np.ones(part.shape, bool) if whole is None else whole
    n = float(whole.sum()) / len(whole)
    share = float((part & whole).sum()) / max(float(whole.sum()), 1.0)
    return estimate(share, n, words)


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


def mean_estimate(values: Floats, words: str = "") -> dict[str, Any]:
    value, error = float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5
    half = Z * error
    interval = [max(0.0, value - half), value + half]
    return {"value": value, "interval": interval, "words": words}


def promise(wrong: Mapping[str, Any], aim: float) -> dict[str, Any]:
    """The share of errors that these answers can promise (Clopper and Pearson 1934)."""
    n, errors, needed = wrong["n"], wrong["value"] * wrong["n"], 0
    share = float(betaincinv(errors + 1, max(n - errors, 1e-9), PROMISED_WITH))
    words = f"wrong at most, with {PROMISED_WITH:.0%} confidence"
    if 0 < aim < 1:
        needed = int(np.ceil(np.log(1 - PROMISED_WITH) / np.log(1 - aim)))
    if share > aim and needed:
        words += f"; {needed} answers without an error would promise {aim:.0%}"
    return {"value": share, "answers_needed": needed, "words": words}


def majority_rate(data: Dataset) -> float:
    return float(np.bincount(data.labels).max() / len(data.labels))


def shown(figure: Mapping[str, Any]) -> str:
    """An estimate, with its interval if it has one."""
    numbers = [figure["value"], *figure.get("interval", ())]
    value, *limits = (f"{round(one, 2) + 0.0:.2f}" for one in numbers)  # not -0.00
    return f"{value} ({' to '.join(limits)})" if limits else value


def shortened(name: str) -> str:
    cut = len(name) > SHOWN_LETTERS
    return name[: SHOWN_LETTERS - 1] + "…" if cut else name


# --- Figures. Those with words are lines of the report, those with a warning warn -----


def describe_training(data: Dataset, splits: Sequence[Split]) -> dict[str, Any]:
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
        "unconfirmed": manifest.get("unconfirmed", 0),
        "modalities": modalities(data.lines),
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


def modalities(lines: Iterable[Mapping[str, str]]) -> list[str]:
    return sorted({line["modality"] for line in lines} - {""})


def rate_decisions(
    data: Dataset, decided: Judged, thresholds: Mapping[str, Any]
) -> dict[str, Any]:
    """What a user of phase 4 will see."""
    label, alone, names = decided["label"], decided["one_reader"], data.classes
    others = f'of known images; the others get "{config.INCONCLUSIVE}"'
    answered = share_of(label >= 0, words=others)
    wrong = share_of(label != data.labels, label >= 0, "of the answers")
    classes = [share_of(label != data.labels, label == i) for i in range(len(names))]
    worst = max(range(len(names)), key=lambda i: classes[i]["value"])
    words = f"of the {classes[worst]['n']:.3g} answers {shortened(names[worst])}"
    stages, aim = thresholds["stages"].values(), data.cfg.max_error
    silent = [n for n in names if min(s["confidence"][n] for s in stages) >= NEVER]
    if silent:
        never = ", ".join(map(shortened, silent[:5]))
        answered["warning"] = f"no confidence is safe for {never}: never answered"
    if len(silent) == len(names):
        answered["warning"] = (
            f'no confidence is safe: phase 4 will only say "{config.INCONCLUSIVE}"'
        )
    alone_words = "answered with --one-reader"
    if all(min(each["one_reader"].values()) >= NEVER for each in stages):
        alone_words += ", of which this model will answer none"
    upper = wrong["interval"][1]
    if wrong["n"] and upper > aim:
        wrong["warning"] = (
            f"{wrong['value']:.1%} of the answers were wrong, and it may be up to "
            f"{upper:.1%}: the thresholds aim at {aim:.0%} and don't promise it"
        )
    return {
        "answered": answered,
        "wrong": wrong,
        "promised": promise(wrong, aim),
        "worst class": classes[worst] | {"words": words},
        "questions": mean_estimate(
            decided["questions"].mean(axis=0), "per known image"
        ),
        "one reader": share_of(alone >= 0, words=alone_words),
        "one reader wrong": share_of(alone != data.labels, alone >= 0, "of those"),
    }


def rate_readers(data: Dataset, judged: Judged) -> dict[str, Any]:
    """What each reader gets alone, and what the descriptions add to the picture."""
    words, picture = (judged[name].argmax(axis=-1) for name in (data.k, "picture"))
    right, n, commonest = words == data.labels, len(data.labels), majority_rate(data)
    count = f"by the descriptions, {np.sum(right) / len(right):.3g} of {n}"
    accuracy, seen = share_of(right, words=count), picture == data.labels
    if accuracy["interval"][0] <= commonest:
        better = "not shown to be better than always answering the commonest class"
        accuracy["warning"] = better
    gain = difference(right, seen)
    gain["words"] = "(if nothing, and unknown images are rare, spare the VLM)"
    if gain["interval"][0] <= 0:
        better = "not shown that the descriptions are better than the picture alone"
        gain["warning"] = better
    recalls = [right[:, data.labels == i].mean() for i in range(len(data.classes))]
    return {
        "accuracy": accuracy,
        "picture": share_of(seen, words="by the picture alone, without any question"),
        "both agree": share_of(words == picture, words="of images"),
        "right where agreed": share_of(right, words == picture, "by both"),
        "descriptions add": gain,
        "balanced accuracy": {"value": float(np.mean(recalls)), "words": ""},
        "commonest class": {"value": commonest, "words": "of images"},
    }


def rate_classes(data: Dataset, judged: Judged, decided: Judged) -> dict[str, Any]:
    """Of each class how many the descriptions recognise, and what they call so."""
    said, found = judged[data.k].argmax(axis=-1), {}
    repeats, n_classes = len(said), len(data.classes)
    for label, name in enumerate(data.classes):
        true, called = np.broadcast_to(data.labels == label, said.shape), said == label
        recall, precision = share_of(called, true), share_of(true, called)
        f1 = 2 * np.sum(true & called) / (true.sum() + called.sum())
        answers = np.sum(decided["label"] == label) / repeats
        found[name] = recall | {
            "precision": precision,
            "f1": float(f1),
            "said": (np.bincount(said[true], None, n_classes) / repeats).tolist(),
            "words": f"of {recall['n']:.0f}, precision {shown(precision)}, F1 "
            f"{f1:.2f}, {answers:.3g} answers",
        }
    return found


def rate_confidence(data: Dataset, shares: Floats) -> dict[str, Any]:
    """Brier score (0 to 2), calibration error and reliability in ten bins, and the
    share of errors by the share of answers."""
    truth, highest = np.eye(len(data.classes))[data.labels], shares.max(axis=-1).ravel()
    right = is_right(data, shares).ravel()
    bins = np.minimum((highest * 10).astype(int), 9)
    n, said, true = (np.bincount(bins, each, 10) for each in (None, highest, right))
    order = np.argsort(-highest, kind="stable")
    errors = np.cumsum(~right[order]) / np.arange(1, len(order) + 1)
    steps = np.unique(np.linspace(0, len(order) - 1, 50).astype(int))
    means = np.stack([said, true, n * n], axis=1)[n > 0] / n[n > 0, None]
    return {
        "brier": float(np.mean(np.sum((shares - truth) ** 2, axis=-1))),
        "calibration_error": float(np.abs(true - said).sum() / len(highest)),
        "bins": means.tolist(),
        "errors_by_answered": [[(i + 1) / len(order), float(errors[i])] for i in steps],
    }


def list_images(
    data: Dataset, judged: Judged, decided: Judged, reasons: Sequence[str]
) -> list[dict[str, Any]]:
    """What was said of every held-out image, the likeliest wrong labels first."""
    shares = decided["probabilities"].mean(axis=0)
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
            "reason": reasons[image],
        }
        for image in np.argsort(own, kind="stable")
    ]


# --- Checks: each can fail, and says so in words --------------------------------------


def check_prompts(data: Dataset, judged: Judged) -> dict[str, Any]:
    """Is it the image or the prompt that decides?"""
    on_specific = is_right(data, judged["class-specific after class-specific"])
    on_generic = is_right(data, judged[data.k + " after class-specific"])
    specific, generic = float(on_specific.mean()), float(on_generic.mean())
    gap = difference(on_specific, on_generic)
    lost = gap["value"] >= PROMPT_GAP and gap["interval"][0] > 0
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
    return {
        "class_specific": specific,
        "generic": generic,
        "gap": gap,
        "words": f"trained on class-specific ones: {specific:.2f} on such, "
        f"{generic:.2f} on generic",
        "warning": warning if lost else "",
    }


def check_specific(data: Dataset, judged: Judged) -> dict[str, Any]:
    """What do the class-specific prompts add, four fifths of the hours?"""
    plain = is_right(data, judged[data.k + " after generic"])
    gain = difference(is_right(data, judged[data.k]), plain)
    words = f"they add {shown(gain)} to training on the generic ones alone"
    return {"generic_only": float(plain.mean()), "gain": gain, "words": words}


def check_headers(
    data: Dataset, splits: Sequence[Split], accuracy: float
) -> dict[str, Any]:
    """Each header field alone, by majority vote: do acquisitions betray the class?"""
    shares, folds = {}, [split[1:] for split in splits if split[0] == 0]
    seen = OneHotEncoder(handle_unknown="ignore")
    vote = make_pipeline(seen, MultinomialNB(alpha=1e-3))
    for name in HEADER_FIELDS:
        values = header_values(data.lines, name)
        if len(set(values)) > 1:
            rights = cross_val_score(vote, values[:, None], data.labels, cv=folds)
            shares[name] = float(rights.mean())
    if not shares:
        return {"words": "not measured: no headers, or all alike"}
    best = max(shares, key=lambda name: shares[name])
    known = np.sum(header_values(data.lines, best) != "")
    telling = shares[best] >= accuracy - HEADER_GAP and (
        wilson(shares[best], len(data.labels))[0] > majority_rate(data)
    )
    warning = (
        f"{best} alone, which is no part of the image, gives {shares[best]:.2f}: the "
        "model may have learnt how the images were taken. Try --group-by, and add "
        "images of every class from each device and day"
    )
    return shares | {
        "words": f"the most telling of {len(shares)}, {best} ({known} of "
        f"{len(data.labels)} images have it), gives {shares[best]:.2f}",
        "warning": warning if telling else "",
    }


def check_unseen(
    data: Dataset, candidate: Candidate, accuracy: float
) -> dict[str, Any]:
    """Accuracy on images of a detector, else a day, that was not trained on."""
    for name in ("detector", "day"):
        values = header_values(data.lines, name)
        groups = np.unique(values, return_inverse=True)[1]
        per_group = [len(set(data.labels[groups == g])) for g in np.unique(groups)]
        if "" in values or per_group.count(len(data.classes)) < 2:
            continue
        folds = count_folds(data, groups, data.cfg.folds)
        if splits := make_splits(data, groups, folds):
            found = grouped_estimate(right_by(data, splits, candidate), groups)
            words = (
                f"right on a {name} not trained on, each of {found['groups']} held "
                f"out; mixed: {accuracy:.2f}"
            )
            return found | {"held_out": name, "words": words}
    needed = "two detectors, or days, with every class, and one for every image"
    return {"words": f"not measured: needs {needed}"}


def check_time(
    data: Dataset, splits: Sequence[Split], candidate: Candidate
) -> dict[str, Any]:
    """The first half of the run against the second: did the answers change?

    Compared with halves drawn at random, which have as few images to train on.
    """
    times = header_values(data.lines, "first_answer")
    order = np.argsort(times, kind="stable")
    late = np.isin(np.arange(len(order)), order[len(order) // 2 :])
    halves = [(0, ~late, late), (0, late, ~late)]
    if "" in times or not trainable(data, halves):
        return {"words": "not measured: no times, or half of the run lacks a class"}
    drawn = make_splits(data, data.groups, 2, splits[-1][0] + 1) or halves
    by_time, mixed = (right_by(data, each, candidate) for each in (halves, drawn))
    fall = difference(mixed, by_time)
    around = order[len(order) // 2 - 1 : len(order) // 2 + 1]
    versions = dict.fromkeys(data.lines[image]["server_versions"] for image in around)
    words = (
        f"trained on one half of the run, {by_time.mean():.2f} right in the other; "
        f"halves drawn at random: {mixed.mean():.2f}"
    )
    warning = (
        f"the answers changed during the run: {words}. The second half begins at "
        f"{times[around[1]]} (server {', then '.join(versions) or 'unknown'})"
    )
    changed = fall["interval"][0] > 0
    return {"fall": fall, "words": words, "warning": warning if changed else ""}


def leave_classes_out(data: Dataset, candidate: Candidate) -> dict[str, Any]:
    """Trained without a class and asked with its images: are they refused?"""
    n, refused, questions = len(data.classes), [], []
    for label in range(0, n, -(-n // CLASSES_LEFT_OUT)) if n > 2 else ():
        rest, unknown = data.only(data.labels != label), data.only(data.labels == label)
        splits = make_splits(rest, rest.groups, count_folds(rest, rest.groups, 3))
        if not splits:
            continue
        held_out = hold_out(rest, splits, partial(judge, candidate=candidate))
        limits = find_thresholds(rest, held_out)
        judged = judge(rest, unknown, candidate)
        judged = {name: values[None] for name, values in judged.items()}
        trained = modalities(rest.lines)
        for image, line in enumerate(unknown.lines):
            foreign = utils.foreign_modality(line["modality"], trained)
            decision = decide(rest, judged, (0, image), limits, foreign)
            refused.append(decision.label == config.INCONCLUSIVE)
            questions.append(decision.stage)
    if not refused:
        return {"words": "not measured: needs three classes"}
    asked = mean_estimate(np.array(questions, float))
    words = f"refused, of a class left out, after {asked['value']:.1f} questions"
    return estimate(float(np.mean(refused)), len(refused), words) | {"questions": asked}


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
    # Its kernel, a function of scikit-learn, is loaded by its name.
    svc = PairwiseSVC(kernel=KERNELS[candidate[0]], C=candidate[1])
    scaler = StandardScaler()
    svc.fit(
        scaler.fit_transform(data.vectors),
        labels[data.image],
        weights(data.generic),
    )
    *_, last = metrics["thresholds"]["stages"].values()
    factor = last["factor"]
    for each in metrics["thresholds"]["stages"].values():
        each["factor"] /= factor
    metrics["model"] = {"kernel": candidate[0], "c": candidate[1], "factor": factor}
    estimators = {
        config.CLASSIFIER: with_probabilities(svc, factor),
        config.SCALER: scaler,
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
            rows=points_of(data, scaler),
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


# --- The report: console, drawing and page --------------------------------------------

SECTIONS = {
    "decision": "What phase 4 will do with new images",
    "evaluation": "Each reader alone, asked for a class of every image",
    "classes": "Of each class, by the descriptions",
    "comparison": "Accuracy by the number of descriptions",
    "checks": "Checks",
}
"""Parts of METRICS of which the figures are shown, and their titles."""


def section_lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """One line for each figure; of very many only the lowest."""
    lowest = sorted(figures, key=lambda name: figures[name].get("value", 0.0))
    chosen = [name for name in figures if name in lowest[:SHOWN_CLASSES]]
    width = max(map(len, map(shortened, chosen)))
    for name in chosen:
        value = f"{shown(figures[name])} " if "value" in figures[name] else ""
        text = f"  {shortened(name):<{width}}  {value}{figures[name]['words']}"
        yield text.rstrip()
    if len(chosen) < len(figures):
        yield f"  (the lowest {len(chosen)} of {len(figures)}: see {config.METRICS})"


def report_lines(metrics: Mapping[str, Any], verbose: bool) -> Iterator[str]:
    """The estimates in the order in which they should be read."""
    made, part = metrics["conditions"], metrics["finished_only"]
    splits, listed = metrics["splits"], metrics["held_out"]
    images = f"{metrics['images']} images"
    if part:
        images = f"{part['images']} of {part['labelled']} labelled images"
    yield (
        f"{images}, {metrics['rows']} rows, described by {made.get('vlm')}, embedded "
        f"by {made.get('embedder')}"
    )
    yield (
        f"Held out by {splits['group_by']}: {splits['groups']} groups in "
        f"{splits['folds']} folds, {splits['repeats']} times; brackets: 95 % intervals"
    )
    for section, title in SECTIONS.items():
        yield from ("", title, *section_lines(metrics[section]))
    yield ""
    wrong = [each for each in listed if each["descriptions_say"] != each["class"]]
    for each in wrong if verbose else wrong[:5]:
        yield (
            f"is the label right? {each['file']}: {each['own_probability']:.1%} for "
            f"{each['class']}; descriptions say {each['descriptions_say']}, picture "
            f"says {each['picture_says']}"
        )
    if len(wrong) > 5 and not verbose:
        yield f"({len(wrong) - 5} more with --verbose, or in {config.METRICS})"
    yield from (f"WARNING: {warning}" for warning in metrics["warnings"])


def find_warnings(metrics: Mapping[str, Any], cfg: Config) -> Iterator[str]:
    """What a reader of the figures must not miss: of the data, then of each figure."""
    splits, asked = metrics["splits"], metrics["k_measured"]
    unconfirmed = metrics["unconfirmed"]
    fewest = min(figure["n"] for figure in metrics["classes"].values())
    of_data = {
        "NO ROW WAS ASKED WITH THE GENERIC PROMPTS: what phase 4 does can't be "
        "measured, and these figures are of prompts that give the class away. Run "
        "phase 2 with a --generic-share above 0": metrics["asked"] != "generic",
        f"no sight test has confirmed the answers about {unconfirmed} images: run "
        "phase 2 again, which tests the server and asks nothing": unconfirmed > 0,
        f"measured with {asked} descriptions, all that the dataset has of an image; "
        f"phase 4 asks {metrics['k']}": asked < metrics["k"],
        f"the intervals count images, but those of one {cfg.group_by} are alike: with "
        f"{splits['groups']} groups the truth may lie outside": cfg.group_by != "image"
        and splits["groups"] < metrics["images"],
        f"{splits['folds']} folds only: the smallest class has no more": splits["folds"]
        < cfg.folds,
        "fewer than 20 images in a class: see how wide the intervals are": fewest < 20,
    }
    yield from (text for text, applies in of_data.items() if applies)
    figures = (each for name in SECTIONS for each in metrics[name].values())
    yield from (each["warning"] for each in figures if each.get("warning"))


def draw_confusion(metrics: Mapping[str, Any]) -> bytes:
    """Counts and shares of every true class as a PNG; empty if it can't be drawn.

    An extra: matplotlib's defaults, no pyplot and no backend, so that what Jupyter or a
    matplotlibrc asks for can't end the phase.
    """
    os.environ.pop("MPLBACKEND", None)  # its import fails on one that is not there
    try:
        from matplotlib import rc_context, rcdefaults  # noqa: PLC0415  (a second)
        from matplotlib.figure import Figure  # noqa: PLC0415

        counts = np.array([each["said"] for each in metrics["classes"].values()])
        shares, file = counts / counts.sum(axis=1, keepdims=True), io.BytesIO()
        names = [shortened(name) for name in metrics["classes"]]
        side = min(2.5 + len(names), 16)
        with rc_context():
            rcdefaults()
            drawing = Figure(figsize=(side + 0.5, side), layout="constrained")
            axes = drawing.subplots()
            axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            places = range(len(names))
            axes.set_xticks(places, names, parse_math=False, rotation=90)
            axes.set_yticks(places, names, parse_math=False)
            axes.set(xlabel="class by the descriptions", ylabel="true class")
            for at, count in np.ndenumerate(counts) if len(names) <= 20 else ():
                colour = "white" if shares[at] > 0.5 else "black"
                text = f"{round(count, 1):g}\n{shares[at]:.0%}"
                axes.text(at[1], at[0], text, ha="center", va="center", color=colour)
            accuracy = shown(metrics["evaluation"]["accuracy"])
            axes.set_title(f"{metrics['images']} held-out images\naccuracy {accuracy}")
            drawing.savefig(file, format="png", dpi=150)
    except Exception as error:
        log.warning("warning: %s is left out: %s", config.CONFUSION_MATRIX, error)
        return b""
    return file.getvalue()


def report_sheet(data: Dataset, metrics: Mapping[str, Any]) -> utils.Sheet:
    """All that the console says, and the images, the likeliest wrong labels first."""
    folder, listed = data.cfg.folder("dataset_dir"), metrics["held_out"]
    known = [(line["image_id"], line["file"]) for line in data.lines]
    names, warned = metrics["class_names"], metrics["warnings"]
    texts: dict[str, list[str]] = {}
    for row in utils.read_csv(folder / config.DATASET_ROWS):
        if row["prompt_set"] == "generic":
            texts.setdefault(row["image_id"], []).append(row["description"])
    scaled = StandardScaler().fit_transform(data.pixels)
    found = utils.fit_neighbours(scaled, 4).kneighbors(scaled, return_distance=False)
    near = {
        own: [known[at] for at in others if known[at][0] != own][:3]
        for (own, _), others in zip(known, found.tolist(), strict=True)
    }
    tiles = []
    for place, each in enumerate(listed):
        tile = utils.Tile(
            name=each["file"],
            picture=each["image_id"],
            label=each["class"],
            state=f"{each['class']} → {each['descriptions_say']}",
            shares={f"for {each['class']}": each["own_probability"]},
            lines=[f"picture says {each['picture_says']}", each["reason"]],
        )
        if place < len(listed) / 10 or each["class"] != each["descriptions_say"]:
            more = texts.get(tile.picture, ())
            tile = tile._replace(near=near[tile.picture], details=more)
        tiles.append(tile)
    behind = Counter(tile.state for tile in tiles)
    matrix: list[list[str | tuple[str, str]]] = [["is", *(f"→ {n}" for n in names)]]
    for name in names:
        states = [f"{name} → {says}" for says in names]
        cells = ((str(behind[s]), s) if behind[s] else "0" for s in states)
        matrix.append([name, *cells])
    thumbnails = (folder / config.THUMBNAIL_DIR / f"{own}.jpg" for own in near)
    made, held_out, *_ = report_lines(metrics, verbose=False)
    return utils.Sheet(
        title=f"How good the model is: {made}",
        folder="",
        tiles=tiles,
        pictures={p.stem: p.read_bytes() for p in thumbnails if p.is_file()},
        classes=names,
        sections=[
            utils.Section("Warnings", warned or ["none"], warning=bool(warned)),
            *(
                utils.Section(title, [*section_lines(metrics[section])])
                for section, title in SECTIONS.items()
            ),
            utils.Section("By the descriptions; a number shows its images", (), matrix),
            utils.Section("Figures", charts=charts(metrics)),
            utils.Section("Is the label right? The least probable ones stand first"),
        ],
        foot=[held_out, "This page shows training images. The model works without it."],
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
    ]
    return [
        utils.Chart("Right, by confidence", "confidence", sure, diagonal=True),
        utils.Chart("Errors, by share answered", "share answered", errors, y_max=top),
        utils.Chart("Accuracy", "descriptions", counted, x_max=counted[-1][0]),
    ]


# --- The phase ------------------------------------------------------------------------


def run(cfg: Config) -> int:
    """Evaluate, check, fit and report; returns the exit code."""
    data, folder = load_dataset(cfg.folder("dataset_dir"), cfg), cfg.folder("model_dir")
    n_folds = count_folds(data, data.groups, cfg.folds)
    repeats = int(np.clip(JUDGEMENTS // len(data.labels), 1, 5))
    splits = make_splits(data, data.groups, n_folds, repeats) if n_folds > 1 else []
    if len(set(data.groups)) == 1:
        raise PipelineError(
            f"by {cfg.group_by} nothing can be held out: all images have the same, or "
            "none; use another --group-by"
        )
    if not splits:
        n = [len({*data.groups[data.labels == i]}) for i in range(len(data.classes))]
        raise PipelineError(
            f"class {data.classes[n.index(min(n))]} can't be held out in part, by "
            f"{cfg.group_by}: it needs at least 2 (20 images or more give figures that "
            f"mean something; equal pictures count once). Label more and {PHASE_2}, or "
            "use fewer --folds or --group-by image"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # else it would be said after the work
        pass
    candidates = [(cfg.kernel, cfg.c), *SEARCH[cfg.search]]

    log.info("evaluating on held-out images")

    def judge_new(known: Dataset, new: Dataset) -> Judged:
        return judge(known, new, choose_candidate(known, candidates), prompt_sets=True)

    judged = hold_out(data, splits, judge_new)
    metrics = describe_training(data, splits)
    metrics["evaluation"] = rate_readers(data, judged)
    metrics["comparison"] = {
        f"descriptions: {name}": share_of(is_right(data, scores))
        for name, scores in judged.items()
        if name.isdecimal()
    }

    log.info("checking for leaks")
    accuracy = metrics["evaluation"]["accuracy"]["value"]
    prompts = {"prompts": {"words": "not measured: needs both sets of them"}}
    if data.specific.size:
        prompts["prompts"] = check_prompts(data, judged)
        prompts["class-specific"] = check_specific(data, judged)
    metrics["checks"] = prompts | {
        "header fields": check_headers(data, splits, accuracy),
        "unseen": check_unseen(data, candidates[0], accuracy),
        "time": check_time(data, splits, candidates[0]),
    }

    log.info("choosing thresholds")
    chosen, scores = choose_candidate(data, candidates), judged
    if len(candidates) > 1:  # those are of several models, each on its own scale
        scores = hold_out(data, splits, partial(judge, candidate=chosen))
    metrics["thresholds"] = find_thresholds(data, scores)
    decided, reasons = cross_fit(data, scores, splits)
    metrics["decision"] = rate_decisions(data, decided, metrics["thresholds"])
    metrics["decision"]["unknown images"] = leave_classes_out(data, chosen)
    metrics["classes"] = rate_classes(data, judged, decided)
    metrics["confidence"] = rate_confidence(data, decided["probabilities"])
    metrics["held_out"] = list_images(data, scores, decided, reasons)
    metrics["warnings"] = list(find_warnings(metrics, cfg))

    write_model(folder, data, chosen, metrics, draw_confusion(metrics))
    page = folder / config.REPORT
    utils.page(page, report_sheet(data, metrics))
    print(*report_lines(metrics, cfg.verbose), sep="\n")
    print(f"\nmodel and figures in {folder}; to look at: {page}")
    print("next: python fase4_inferencia_vlm.py FILE_OR_FOLDER …")
    return utils.EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: flags, logging, one line for what a user can mend."""
    cfg, _ = config.parse_config(3, __doc__ or "", argv)
    utils.start_logging(log, cfg)
    # Threads that wait for each other, and checks of each array, cost a quarter more.
    with threadpool_limits(1), config_context(assume_finite=True):
        return utils.exit_code(lambda: run(cfg), log.error)


if __name__ == "__main__":
    raise SystemExit(main())
