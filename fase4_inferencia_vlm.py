"""Phase 4: the class of new images, with the confidence of every class.

Reads   DICOM files, or folders of them, and modelo_final_vlm/ of phase 3
Writes  one line per image on the terminal; with --csv a table, with --json JSON Lines;
        with --copy-to DIR a copy of every image in DIR/<CLASS>/ or DIR/no_concluyente/

    python fase4_inferencia_vlm.py new_image.dcm folder_of_images/
    new_image.dcm: MTF · MTF 96.4 %, TOR 2.5 %, FDT 1.1 %

The image is described with the generic prompts, the descriptions are embedded and
scaled, the classifier decides on their mean. Where the confidence is too low, or the
image is unlike everything in training, it says "no concluyente" and why.
"""

import asyncio
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import config
import utils
from config import Config
from utils import (
    Answer,
    Decision,
    Neighbours,
    PipelineError,
    PreparedImage,
    Question,
    RejectedError,
    ServerFacts,
    VlmServer,
)

log = logging.getLogger("fase4")

TRAIN_AGAIN = "run `python fase3_entrenamiento_svc.py` again"
PROBE_MIN_COSINE = 0.9999
"""Below it the probe sentence has another embedding than when the model was trained."""

# --- The model ----------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What phase 3 left: estimators, neighbours and the thresholds of an answer."""

    scaler: Any
    classifier: Any
    neighbours: Neighbours
    thresholds: Mapping[str, float]


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read what phase 3 says of its model, and check that its files are the same.

    Nothing is unpickled before that: a joblib file can run code.

    Raises
    ------
    PipelineError
        No model, a changed file, or a model of another scikit-learn version.
    """
    metrics = utils.read_json(
        folder / config.METRICS, "run `python fase3_entrenamiento_svc.py` first"
    )
    try:
        for name, expected in metrics["sha256"].items():
            utils.check_digest(folder / name, expected, TRAIN_AGAIN)
        trained_with = metrics["libraries"]["scikit-learn"]
    except (KeyError, AttributeError):
        raise PipelineError(
            f"{folder / config.METRICS} does not describe a model: {TRAIN_AGAIN}"
        ) from None
    if trained_with != version("scikit-learn"):
        raise PipelineError(
            f"the model in {folder} was made with scikit-learn {trained_with}, here is "
            f"{version('scikit-learn')}: {TRAIN_AGAIN}, or "
            f"`pip install scikit-learn=={trained_with}`"
        )
    return metrics


def load_model(folder: Path, metrics: Mapping[str, Any]) -> Model:
    """Load the estimators; takes a second or two, most of it scikit-learn's import."""
    import joblib  # noqa: PLC0415 - loaded while the VLM is asked, not before

    return Model(
        scaler=joblib.load(folder / config.SCALER),
        classifier=joblib.load(folder / config.CLASSIFIER),
        neighbours=utils.load_neighbours(folder / config.NEIGHBOURS),
        thresholds=metrics["thresholds"],
    )


def differences(trained: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between the conditions of the training and those of today."""
    for name in sorted({*trained, *now}):
        before, today = trained.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(today, Mapping):
            yield from (f"{name} {line}" for line in differences(before, today))
        elif before != today and isinstance(before, list):
            yield f"{name}: other texts"
        elif before != today:
            yield f"{name}: trained with {before}, now {today}"


def check_conditions(
    metrics: Mapping[str, Any], now: Mapping[str, Any], cfg: Config
) -> list[str]:
    """Refuse a model that was made under other conditions; with --force only say so.

    Returns
    -------
    list of str
        The differences that ``--force`` passes over; empty when all is the same.
    """
    trained = {name: metrics["conditions"].get(name) for name in now}
    found = list(differences(trained, now))
    if found and not cfg.force:
        raise PipelineError(
            f"the model in {cfg.folder('model_dir')} does not fit: {'; '.join(found)}: "
            "use the flags and models of the training, train again, or answer all the "
            "same with --force"
        )
    return found


def check_probe(
    metrics: Mapping[str, Any], facts: ServerFacts, cfg: Config
) -> list[str]:
    """Refuse an embedder that no longer gives what it gave in training."""
    trained = utils.unpack_vector(metrics["probe_vector"])
    if trained.size != facts.probe.size:
        raise PipelineError(
            f"{cfg.embed_model} gives {facts.probe.size} numbers, the model was "
            f"trained on {trained.size}: choose its embedder with --embed-model"
        )
    norms = float(np.linalg.norm(trained) * np.linalg.norm(facts.probe))
    cosine = float(trained @ facts.probe) / norms
    if cosine >= PROBE_MIN_COSINE:
        return []
    problem = f"the probe sentence has another embedding (cosine {cosine:.4f})"
    if not cfg.force:
        raise PipelineError(
            f"{problem} than in training: make the dataset and the model again, or "
            "answer all the same with --force"
        )
    return [problem]


def check_count(metrics: Mapping[str, Any], cfg: Config) -> list[str]:
    """Say when the thresholds were chosen for another number of descriptions."""
    k, asked = metrics["k"], cfg.inference_descriptions
    if asked == k:
        return []
    return [f"thresholds were chosen for {k} descriptions an image, now {asked}"]


# --- One image after another --------------------------------------------------------


@dataclass
class Task:
    """One file while it is worked on, and what came of it."""

    path: Path
    picture: PreparedImage | None = None
    image_id: str = ""
    answers: dict[int, Answer] = field(default_factory=dict)
    pending: int = 0
    error: str = ""
    decision: Decision | None = None

    @property
    def texts(self) -> list[str]:
        """The descriptions, in the order of their prompts."""
        return [self.answers[index].text for index in sorted(self.answers)]


class Inference:
    """Describes, embeds and decides; hands every finished file on, in input order."""

    def __init__(
        self,
        server: VlmServer,
        model: "asyncio.Task[Model]",
        cfg: Config,
        deliver: Callable[[Task], object],
    ) -> None:
        self._server = server
        self._model = model
        self._cfg = cfg
        self._deliver = deliver
        self._order: list[Task] = []
        self._finished: set[int] = set()

    async def run(self, paths: Sequence[Path]) -> None:
        """Classify every file; a file that fails is delivered with its reason."""
        await utils.in_lanes(paths, self._open, self._ask, self._cfg)

    async def _open(self, path: Path) -> list[tuple[Task, Question]]:
        task = Task(path)
        self._order.append(task)
        try:
            task.picture = await asyncio.to_thread(utils.prepare_image, path)
        except RejectedError as error:
            task.error = str(error)
            self._finish(task)
            return []
        task.image_id = task.picture.image_id
        task.pending = self._cfg.inference_descriptions
        return [(task, q) for q in utils.questions("generic", task.pending)]

    async def _ask(self, job: tuple[Task, Question]) -> None:
        task, question = job
        try:
            if task.picture and not task.error:
                task.answers[question.index] = await self._server.describe(
                    task.picture, question, (), lambda *_: None
                )
        except RejectedError as error:
            task.error = str(error)
        task.pending -= 1
        if not task.pending:
            await self._decide(task)

    async def _decide(self, task: Task) -> None:
        task.picture = None
        rows = [] if task.error else await self._server.embed(task.texts)
        usable = [row for row in rows if row is not None]
        if not task.error and len(usable) < len(rows):
            task.error = "a description can't be embedded: try again"
        if not task.error:
            model = await self._model
            task.decision = utils.decide(
                np.stack(usable),
                model.scaler,
                model.classifier,
                model.neighbours,
                model.thresholds,
            )
        self._finish(task)

    def _finish(self, task: Task) -> None:
        """Deliver what is ready, as far as no earlier file is still open."""
        self._finished.add(id(task))
        while self._order and id(self._order[0]) in self._finished:
            ready = self._order.pop(0)
            self._finished.discard(id(ready))
            self._deliver(ready)


# --- What comes out -----------------------------------------------------------------


def record(task: Task, warnings: Sequence[str]) -> dict[str, Any]:
    """One result with stable keys, for --json; README lists them."""
    result: dict[str, Any] = {"file": str(task.path), "image_id": task.image_id}
    if task.decision is None:
        return {**result, "error": task.error}
    return {
        **result,
        "class": task.decision.label,
        "best_class": task.decision.best_class,
        "confidences": task.decision.confidences,
        "novelty": task.decision.novelty,
        "reason": task.decision.reason,
        "nearest": task.decision.nearest,
        "descriptions": task.texts,
        "warnings": list(warnings),
    }


def line(task: Task) -> str:
    """One result for a person: file, class, confidences, and why if inconclusive."""
    if task.decision is None:
        return f"{task.path}: failed: {task.error}"
    ranked = sorted(task.decision.confidences.items(), key=lambda pair: -pair[1])
    shares = ", ".join(f"{label} {share:.1%}" for label, share in ranked)
    reason = f" · {task.decision.reason}" if task.decision.reason else ""
    return f"{task.path}: {task.decision.label} · {shares}{reason}"


def details(task: Task) -> Iterator[str]:
    """What --verbose adds: the nearest training images and the descriptions."""
    if task.decision is not None:
        yield f"    novelty {task.decision.novelty:.2f}"
        yield f"    nearest in training: {', '.join(task.decision.nearest)}"
    for text in task.texts:
        yield f"    - {' '.join(text.split())}"


def csv_row(result: Mapping[str, Any]) -> dict[str, object]:
    """The flat row of a record: confidences in a column per class."""
    shares = result.get("confidences", {})
    flat = {k: v for k, v in result.items() if not isinstance(v, list | dict)}
    flat["warnings"] = "; ".join(result.get("warnings", ()))
    return {**flat, **{f"confidence_{name}": share for name, share in shares.items()}}


def write_table(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write all results as one CSV table."""
    fixed = ["file", "image_id", "class", "best_class", "novelty", "reason"]
    rows = [csv_row(result) for result in results]
    shares = sorted({key for row in rows for key in row if key.startswith("confid")})
    utils.write_csv(path, [*fixed, *shares, "error", "warnings"], rows)


def copy_into(folder: Path, task: Task) -> Path | None:
    """Copy an image into the folder of its class; the original stays where it is.

    A file of that name that is already there is left alone: the same content needs no
    copy, other content gets a name with the image's id.
    """
    if task.decision is None:
        return None
    target = folder / task.decision.label.replace(" ", "_") / task.path.name
    if target.exists():
        if utils.sha256_of(target) == utils.sha256_of(task.path):
            return target
        target = target.with_name(f"{target.stem}_{task.image_id[:12]}{target.suffix}")
    with utils.atomic_write(target) as copy, task.path.open("rb") as original:
        shutil.copyfileobj(original, copy)
    return target


# --- The phase ----------------------------------------------------------------------


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files named, and all files below the folders named, in that order."""
    found: list[Path] = []
    for path in paths:
        found += utils.find_files(path) if path.is_dir() else [path]
    if not found:
        raise PipelineError(f"{paths[0]} holds no file: name a DICOM file or a folder")
    return found


def run(cfg: Config, paths: Sequence[Path]) -> int:
    """Classify the files; 0 when every one has a result, 1 when some failed."""
    files = find_images(paths)
    metrics = read_metrics(cfg.folder("model_dir"))
    if warning := utils.distance_warning(cfg):
        log.warning("warning: %s", warning)
    results: list[dict[str, Any]] = []
    failed = 0

    def deliver(task: Task, warnings: Sequence[str]) -> None:
        nonlocal failed
        failed += task.decision is None
        results.append(record(task, warnings))
        show(task, results[-1], cfg)
        if cfg.copy_to:
            copy_into(cfg.copy_to, task)

    try:
        utils.run_async(classify(files, metrics, cfg, deliver))
    finally:
        # Also after Ctrl-C or a lost server: what is known is not asked again.
        if cfg.csv and results:
            write_table(cfg.csv, results)
    return utils.EXIT_SOME_FAILED if failed else utils.EXIT_DONE


def show(task: Task, result: Mapping[str, Any], cfg: Config) -> None:
    """Print one result at once, for a person or as a line of JSON."""
    if cfg.json:
        print(json.dumps(result, ensure_ascii=True), flush=True)
        return
    print(line(task), flush=True)
    if cfg.verbose:
        print(*details(task), sep="\n", flush=True)


async def classify(
    files: Sequence[Path],
    metrics: Mapping[str, Any],
    cfg: Config,
    deliver: Callable[[Task, Sequence[str]], object],
) -> None:
    """Check that model and server fit, then work through the files."""
    check_conditions(metrics, utils.conditions(cfg, None), cfg)
    folder = cfg.folder("model_dir")
    model = asyncio.create_task(asyncio.to_thread(load_model, folder, metrics))
    try:
        async with VlmServer(cfg, log.info) as server:
            facts = await server.preflight()
            warnings = check_conditions(metrics, utils.conditions(cfg, facts), cfg)
            warnings += check_probe(metrics, facts, cfg)
            warnings += check_count(metrics, cfg)
            for warning in warnings if not cfg.json else ():
                print(f"warning: {warning}", flush=True)
            inference = Inference(
                server, model, cfg, lambda task: deliver(task, warnings)
            )
            await inference.run(files)
    finally:
        with suppress(Exception):
            await model


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: flags, logging, one line for what a user can mend."""
    cfg, paths = config.parse_config(
        4, __doc__ or "", argv, ("PATH", "DICOM file, or folder of DICOM files")
    )
    utils.start_logging(log, cfg)
    return utils.exit_code(lambda: run(cfg, paths), log.error)


if __name__ == "__main__":
    raise SystemExit(main())
