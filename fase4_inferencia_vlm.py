"""Phase 4: the class of new images, with the confidence of every class.

Reads   DICOM files, or folders of them, and modelo_final_vlm/ of phase 3
Writes  one line per image on the terminal; with --csv a table, with --json JSON Lines;
        with --copy-to DIR a copy of every image in DIR/<CLASS>/ or DIR/no_concluyente/;
        with --html a page with the pictures, on which the doubtful ones can be labelled

    python fase4_inferencia_vlm.py new_image.dcm folder_of_images/
    new_image.dcm: MTF · MTF 96.4 %, TOR 2.5 %, FDT 1.1 %

Two readers look at each image. One has only the picture; what is new to it is asked
nothing. The other has the VLM's answers to the generic prompts, first to three, then,
where these don't decide, to all. Where the readers disagree, the confidence is too low
or the image is unlike everything in training, it says "no concluyente" and why.

Every answer is kept in dataset_final_vlm/descripciones/, the journal of phase 2: the
same images with a new model ask nothing.
"""

import signal

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while libraries load

import asyncio
import csv
import glob
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import config
import utils
from config import Config
from utils import (
    AnswerBook,
    BlindError,
    Decision,
    Model,
    PipelineError,
    PreparedImage,
    RejectedError,
    ServerFacts,
    SightTest,
    Turn,
    VlmServer,
)

log = logging.getLogger("fase4")

TEST_EVERY, TEST_AT_END = 50, 10
"""Images asked between two sight tests; more than so many ask for one at the end."""
TRAIN_AGAIN = "run `python fase3_entrenamiento_svc.py` again"

# --- The model and its conditions ---------------------------------------------------


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read what phase 3 says of its model, and check that its files are the same.

    Nothing is unpickled before that: a joblib file can run code.

    Raises
    ------
    PipelineError
        No model, a changed file, or a model of another version.
    """
    metrics = utils.read_json(
        folder / config.METRICS, "run `python fase3_entrenamiento_svc.py` first"
    )
    try:
        digests, trained_with = metrics["sha256"], metrics["libraries"]["scikit-learn"]
    except (KeyError, TypeError):
        raise PipelineError(
            f"{folder / config.METRICS} does not describe a model: {TRAIN_AGAIN}"
        ) from None
    if config.SECOND_READER not in digests:
        raise PipelineError(
            f"the model in {folder} is of an older version, without a second reader: "
            "run phases 2 and 3 again (phase 2 asks only what is new)"
        )
    for name, expected in digests.items():
        utils.check_digest(folder / name, expected, TRAIN_AGAIN)
    if trained_with != version("scikit-learn"):
        raise PipelineError(
            f"the model in {folder} was made with scikit-learn {trained_with}, here is "
            f"{version('scikit-learn')}: {TRAIN_AGAIN}, or "
            f"`pip install scikit-learn=={trained_with}`"
        )
    return metrics


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
    metrics: Mapping[str, Any], facts: ServerFacts | None, cfg: Config
) -> list[str]:
    """Refuse a model that was made under other conditions; with --force only say so.

    Parameters
    ----------
    facts : ServerFacts or None
        None compares what the command line alone decides.

    Returns
    -------
    list of str
        The differences that ``--force`` passes over; empty when all is the same.
    """
    now = utils.conditions(cfg, facts)
    trained = {name: metrics["conditions"].get(name) for name in now}
    found = list(differences(trained, now))
    if facts is not None:
        probe = utils.unpack_vector(metrics["probe_vector"])
        if probe.size != facts.probe.size:
            raise PipelineError(
                f"{cfg.embed_model} gives {facts.probe.size} numbers, the model was "
                f"trained on {probe.size}: choose its embedder with --embed-model"
            )
        near = utils.cosine(probe, facts.probe)
        if near < utils.SAME_EMBEDDING:
            found.append(
                f"the probe sentence has another embedding (cosine {near:.4f})"
            )
    if found and not cfg.force:
        raise PipelineError(
            f"the model in {cfg.folder('model_dir')} does not fit: {'; '.join(found)}: "
            "use the flags and models of the training, run phases 2 and 3 again, or "
            "answer all the same with --force"
        )
    return found


def stages(model: Model, asked: int) -> list[int]:
    """Numbers of descriptions after which it is decided; the last is `asked`."""
    return [stage for stage in model.stages if stage < asked] + [asked]


# --- One image after another --------------------------------------------------------


@dataclass(eq=False)
class Result:
    """One file, and what came of it."""

    path: Path
    picture: PreparedImage | None = None
    texts: list[str] = field(default_factory=list)
    error: str = ""
    decision: Decision | None = None


class Inference:
    """Describes, embeds and decides; hands every finished file on, in input order."""

    def __init__(
        self,
        servers: Sequence[VlmServer],
        model: "asyncio.Task[Model]",
        book: AnswerBook,
        cfg: Config,
        delivery: "Delivery",
    ) -> None:
        self._servers, self._model, self._book = servers, model, book
        self._cfg, self._delivery, self._asked = cfg, delivery, 0
        self._waiting: list[Result] = []
        self._finished: list[Result] = []
        self._first: dict[str, tuple[Result, asyncio.Event]] = {}

    async def run(self, paths: Sequence[Path]) -> None:
        """Classify every file; a file that fails is delivered with its reason."""
        results = [Result(path) for path in paths]
        self._waiting = list(results)
        slots = utils.slots_of(self._cfg, self._servers)
        if self._cfg.no_sight_test:
            await utils.image_by_image(results, _prepared, self._work, slots)
            return
        sight = utils.SightTest(slots, self._book)

        async def between() -> None:
            if self._asked >= TEST_EVERY:
                self._asked = 0
                await self._test(sight)

        if not sight.is_recent(answers=500, minutes=30):
            await self._test(sight, self._cfg.any_host)
        await utils.image_by_image(results, _prepared, self._work, slots, between)
        if self._asked > TEST_AT_END:
            await self._test(sight)

    async def _test(self, sight: SightTest, may_drop: bool = False) -> None:
        try:
            await sight.run(may_drop)
        except BlindError:
            self._delivery.withdraw()
            raise
        self._delivery.settle()

    async def _work(self, result: Result, _: None, turn: Turn) -> None:
        picture = result.picture
        if picture is not None:
            first, done = self._first.setdefault(
                picture.image_id, (result, asyncio.Event())
            )
            if first is result:
                await self._classify(result, picture, turn)
                done.set()
            else:  # equal pixels are asked once
                turn.end()
                await done.wait()
                result.decision, result.error = first.decision, first.error
                result.texts = first.texts
        self._finished.append(result)
        while self._waiting and self._waiting[0] in self._finished:
            self._finished.remove(self._waiting[0])
            self._delivery.add(self._waiting.pop(0))

    async def _classify(
        self, result: Result, picture: PreparedImage, turn: Turn
    ) -> None:
        """The picture first, then the descriptions, stage by stage."""
        model = await self._model
        how = {
            "one_reader": self._cfg.one_reader,
            "any_modality": self._cfg.any_modality,
        }
        pixels = await asyncio.to_thread(utils.picture_statistics, picture.grey)
        modality = picture.header.get("modality", "")
        decision = utils.decide(model, None, pixels, modality, 0, **how)
        if decision.reason and not self._cfg.ask_all:
            result.decision = decision
            return
        answers = self._book.of(picture)
        asked = utils.questions("generic", self._cfg.inference_descriptions)
        try:
            self._asked += any(answers.chosen(question) is None for question in asked)
            for stage in stages(model, len(asked)):
                some, turn.stays = asked[:stage], stage < len(asked)
                await utils.ask(picture, some, answers, turn)
                result.texts = answers.texts(some)
                rows = answers.rows(some)
                limits = stage if stage in model.stages else model.stages[-1]
                decision = utils.decide(model, rows, pixels, modality, limits, **how)
                if not decision.reason and not self._cfg.ask_all:
                    break
        except RejectedError as error:
            result.error = str(error)
            return
        result.decision = decision


def _prepared(result: Result) -> None:
    try:
        result.picture = utils.prepare_image(result.path)
    except RejectedError as error:
        result.error = str(error)


# --- What comes out -----------------------------------------------------------------


def record(result: Result, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """One result with stable keys, for --json; README lists them."""
    decision, picture = result.decision, result.picture
    image_id = picture.image_id if picture else ""
    found: dict[str, Any] = {"file": str(result.path), "image_id": image_id}
    if decision is None:
        return {**found, "error": result.error, **made_with}
    return {
        **found,
        "class": decision.label,
        "best_class": decision.best_class,
        "confidences": decision.confidences,
        "reason": decision.reason,
        "stage": decision.stage,
        "questions": len(result.texts),
        "descriptions_say": asdict(decision.words) if decision.words else None,
        "picture_says": asdict(decision.picture) if decision.picture else None,
        "descriptions": result.texts,
        **made_with,
    }


def line(result: Result) -> str:
    """One result for a person: file, class, confidences, and why if inconclusive."""
    decision = result.decision
    if decision is None:
        return f"{result.path}: failed: {result.error}"
    ranked = sorted(decision.confidences.items(), key=lambda pair: -pair[1])
    parts = [", ".join(f"{label} {share:.1%}" for label, share in ranked)]
    if decision.picture:
        parts.append(f"picture {decision.picture.label}")
    parts.append(decision.reason)
    return f"{result.path}: " + " · ".join([decision.label, *filter(None, parts)])


def details(result: Result) -> Iterator[str]:
    """What --verbose adds: what each reader saw, and the descriptions."""
    decision = result.decision
    if decision is not None:
        for name, opinion in (
            ("descriptions", decision.words),
            ("picture", decision.picture),
        ):
            if opinion is not None:
                yield (
                    f"    {name}: {opinion.label}, novelty {opinion.novelty:.2f} of "
                    f"its limit, nearest in training: {', '.join(opinion.nearest)}"
                )
        yield f"    {len(result.texts)} questions, decided at {decision.stage}"
    for text in result.texts:
        yield f"    - {' '.join(text.split())}"


TABLE_COLUMNS = (
    *("file", "image_id", "class", "best_class", "reason", "stage", "questions"),
    *("descriptions_say", "descriptions_novelty", "descriptions_nearest"),
    *("picture_says", "picture_novelty", "picture_nearest", "error", "warnings"),
    *("time", "program_version", "vlm_digest", "embedder_digest", "model"),
)


def table_row(found: Mapping[str, Any]) -> dict[str, object]:
    """The flat row of a record: a column per class, reader and part of an opinion."""
    flat = {k: v for k, v in found.items() if not isinstance(v, list | dict)}
    for say in ("descriptions_say", "picture_says"):
        if opinion := found.get(say):
            name = say.split("_", maxsplit=1)[0]
            flat[say], flat[f"{name}_novelty"] = opinion["label"], opinion["novelty"]
            flat[f"{name}_nearest"] = "; ".join(opinion["nearest"])
    flat["warnings"] = "; ".join(found.get("warnings", ()))
    shares = found.get("confidences", {})
    return flat | {f"confidence_{name}": share for name, share in shares.items()}


class Table:
    """The CSV file of --csv: opened before the first question, a row as it comes."""

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        shares = [f"confidence_{name}" for name in classes]
        self._writer = csv.DictWriter(
            utils.csv_text(self._file),
            [*TABLE_COLUMNS, *shares],
            extrasaction="ignore",
            lineterminator="\n",
        )
        self._writer.writeheader()

    def add(self, found: Mapping[str, Any]) -> None:
        """Write one row; it is in the file when this returns."""
        self._writer.writerow(table_row(found))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Gallery:
    """The page of --html: written empty before the first question, whole at the end."""

    def __init__(
        self, path: Path, metrics: Mapping[str, Any], made_with: Any, cfg: Config
    ) -> None:
        self._path, self._made_with = path, made_with
        self._classes = metrics["class_names"]
        self._tiles: list[tuple[float, utils.Tile]] = []
        self._pictures: dict[str, bytes] = {}
        dataset = cfg.folder("dataset_dir")
        self._thumbnails = dataset / config.THUMBNAIL_DIR
        images = dataset / config.DATASET_IMAGES
        rows = utils.read_csv(images) if images.is_file() else []
        self._ids = {row["file"]: row["image_id"] for row in rows}
        self.write()

    def add(self, result: Result) -> None:
        """Take one image: what to label next comes first."""
        decision, file = result.decision, str(result.path.resolve())
        tile = utils.Tile(name=str(result.path), state="failed", lines=[result.error])
        doubt = -1.0
        if decision and result.picture:
            readers = {"descriptions": decision.words, "picture": decision.picture}
            lines = [
                f"{name}: {one.label}, novelty {one.novelty:.2f} of its limit"
                for name, one in readers.items()
                if one
            ]
            near = [file for one in readers.values() if one for file in one.nearest]
            doubtful = decision.label == config.INCONCLUSIVE
            shares = sorted(decision.confidences.items(), key=lambda pair: -pair[1])
            doubt = 2 * doubtful - max(decision.confidences.values(), default=0)
            key = result.picture.image_id
            tile = tile._replace(
                picture=key,
                file=file,
                label="" if doubtful else decision.label,
                state=config.INCONCLUSIVE if doubtful else "answered",
                lines=[*filter(None, [decision.reason]), *lines],
                shares=dict(shares),
                near=[self._known(one) for one in dict.fromkeys(near)][:4],
                details=result.texts,
            )
            self._pictures[key] = utils.thumbnail(result.picture.grey)
        self._tiles.append((-doubt, tile))

    def _known(self, file: str) -> tuple[str, str]:
        """Key and name of a training image; its thumbnail is read if it is there."""
        key = self._ids.get(file, "")
        thumbnail = self._thumbnails / f"{key}.jpg"
        if key not in self._pictures and key and thumbnail.is_file():
            self._pictures[key] = thumbnail.read_bytes()
        return key, file

    def write(self) -> None:
        """Write the page, also after Ctrl-C, with the images that are there."""
        tiles = [tile for _, tile in sorted(self._tiles, key=lambda pair: pair[0])]
        doubtful = sum(tile.state == config.INCONCLUSIVE for tile in tiles)
        title = f"{doubtful} of {len(tiles)} images are {config.INCONCLUSIVE}"
        first = "They stand first: label those that should be known, and train again."
        sheet = utils.Sheet(
            title=f"Phase 4: {len(tiles)} images, {now()}",
            folder=str(self._path.resolve().parent),
            tiles=tiles,
            pictures=self._pictures,
            classes=self._classes,
            sections=[utils.Section(title, [first, utils.HOW_TO_MARK])],
            foot=[f"{k}: {v}" for k, v in self._made_with.items() if v],
        )
        utils.page(self._path, sheet)


def copy_into(folder: Path, result: Result, book: AnswerBook) -> None:
    """Copy an image into the folder of its class; the original stays where it is.

    A file that is already there is never replaced: the same content needs no copy,
    other content gets another name. The image's journal keeps that and where.
    """
    if result.decision is None or result.picture is None:
        return
    label = result.decision.label
    name = "no_concluyente" if label == config.INCONCLUSIVE else label
    original, image_id = result.path, result.picture.image_id
    digest = utils.sha256_of(original)
    suffixes = ["", f"_{image_id[:12]}", *(f"_{digest[:n]}" for n in (12, 24, 64))]
    for suffix in suffixes:
        target = folder / name / f"{original.stem}{suffix}{original.suffix}"
        if not target.exists():
            with utils.atomic_write(target) as copy, original.open("rb") as file:
                shutil.copyfileobj(file, copy)
            break
        if utils.sha256_of(target) == digest:
            return
    copied = {"to": str(target.resolve()), "class": label, "time": now()}
    book.of(result.picture).journal.add({"key": "copied", **copied})


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Delivery:
    """Shows every result as it comes; its row, tile and copy wait for a sight test.

    With --no-sight-test nothing waits.
    """

    def __init__(
        self,
        images: int,
        metrics: Mapping[str, Any],
        made_with: Mapping[str, Any],
        book: AnswerBook,
        table: Table | None,
        cfg: Config,
    ) -> None:
        self._made_with, self._book, self._cfg = made_with, book, cfg
        self._table, self._waiting = table, list[tuple[Result, dict[str, Any]]]()
        self._gallery = Gallery(cfg.html, metrics, made_with, cfg) if cfg.html else None
        self._bar = tqdm(total=images, unit="image", disable=cfg.quiet or None)
        self.failed = 0

    def add(self, result: Result) -> None:
        """Show one result."""
        self.failed += result.decision is None
        found = record(result, {"time": now(), **self._made_with})
        with tqdm.external_write_mode(sys.stdout):
            show(result, found, self._cfg)
        self._bar.update()
        self._waiting.append((result, found))
        if self._cfg.no_sight_test:
            self.settle()

    def settle(self) -> None:
        """The server is shown to see: what waits is written."""
        for result, found in self._waiting:
            if self._table:
                self._table.add(found)
            if self._gallery:
                self._gallery.add(result)
            if self._cfg.copy_to:
                copy_into(self._cfg.copy_to, result, self._book)
        self._waiting.clear()

    def withdraw(self) -> None:
        """The server does not see: what waits is no result."""
        waiting, self._waiting = self._waiting, []
        for result, found in waiting:
            if result.texts:  # it was asked
                result.decision, result.error = None, "withdrawn: the sight test failed"
                self.add(result)
            else:
                self._waiting.append((result, found))
        self.settle()

    def close(self) -> None:
        """End the bar and write the page."""
        self._bar.close()
        if self._gallery:
            self._gallery.write()


# --- The phase ----------------------------------------------------------------------


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files named, and all files below the folders named, in that order."""

    def tell(path: Path, why: str) -> None:
        log.warning("%s: %s", path, why)

    found: list[Path] = []
    for path in paths:
        # The shells of Windows leave wildcards to the program.
        matching = [] if path.exists() else sorted(glob.glob(str(path)))  # noqa: PTH207
        for one in [Path(name) for name in matching] or [path]:
            found += utils.find_files(one, tell) if one.is_dir() else [one]
    if not found:
        raise PipelineError(f"{paths[0]} holds no file: name a DICOM file or a folder")
    return found


def check_outputs(cfg: Config) -> None:
    """Refuse before the first question what would replace an image or can't be written.

    `--csv new/*.dcm` is a slip of the hand that a shell makes dangerous.
    """
    for flag, path, suffix in (
        ("--csv", cfg.csv, ".csv"),
        ("--html", cfg.html, ".html"),
    ):
        if path and path.is_file() and path.suffix.lower() != suffix:
            raise PipelineError(
                f"{flag} would replace {path}: name a file that ends in {suffix}"
            )
    if cfg.copy_to:
        cfg.copy_to.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cfg.copy_to):
            pass


def run(cfg: Config, paths: Sequence[Path]) -> int:
    """Classify the files; 0 when every one has a result, 1 when some failed."""
    if cfg.sight_test_only:
        utils.run_async(utils.only_sight(cfg, log.info, print))
        return utils.EXIT_DONE
    if not paths:
        raise PipelineError("no image is named: name DICOM files or folders")
    check_outputs(cfg)
    files = find_images(paths)
    metrics = read_metrics(cfg.folder("model_dir"))
    check_conditions(metrics, None, cfg)
    if warning := utils.distance_warning(cfg):
        log.warning("warning: %s", warning)
    with ExitStack() as opened:
        table = Table(cfg.csv, metrics["class_names"]) if cfg.csv else None
        if table:
            opened.callback(table.close)
        return utils.run_async(classify(files, metrics, table, cfg))


async def classify(
    files: Sequence[Path], metrics: Mapping[str, Any], table: Table | None, cfg: Config
) -> int:
    """Check that model and server fit, then work through the files."""
    folder = cfg.folder("model_dir")
    model = asyncio.create_task(asyncio.to_thread(utils.load_model, folder, metrics))
    with ExitStack() as shown:
        async with utils.open_servers(cfg, log.info) as named:
            servers, facts = await utils.preflight(named, cfg)
            warnings = check_conditions(metrics, facts, cfg)
            if cfg.inference_descriptions != metrics["k"]:
                warnings.append(
                    f"thresholds were chosen for {metrics['k']} descriptions an "
                    f"image, now {cfg.inference_descriptions}"
                )
            for warning in warnings if not cfg.json else ():
                print(f"warning: {warning}", flush=True)
            book = open_book(cfg, facts)
            shown.enter_context(logging_redirect_tqdm())
            made_with = {
                "program_version": config.PROGRAM_VERSION,
                "vlm_digest": facts.vlm_digest,
                "embedder_digest": facts.embedder_digest,
                "model": utils.sha256_of(folder / config.METRICS)[:12],
                "warnings": warnings,
            }
            delivery = Delivery(len(files), metrics, made_with, book, table, cfg)
            try:
                await Inference(servers, model, book, cfg, delivery).run(files)
                delivery.settle()
            finally:
                delivery.close()
            for said in utils.work_done(servers):
                log.info("%s", said)
    return utils.EXIT_SOME_FAILED if delivery.failed else utils.EXIT_DONE


def open_book(cfg: Config, facts: ServerFacts) -> AnswerBook:
    """The journal, or, where nothing can be written, one that keeps nothing."""
    folder = cfg.folder("dataset_dir") / config.JOURNAL_DIR
    try:
        folder.mkdir(parents=True, exist_ok=True)
        book = AnswerBook(folder, cfg, facts)
        book.touch()
    except OSError as error:
        log.warning(
            "warning: %s can't be written (%s): answers are not kept",
            *(folder, error.strerror),
        )
        book = AnswerBook(None, cfg, facts)
    for note in book.notes:
        log.warning("note: %s", note)
    return book


def show(result: Result, found: Mapping[str, Any], cfg: Config) -> None:
    """Print one result at once, for a person or as a line of JSON."""
    if cfg.json:
        print(json.dumps(found, ensure_ascii=True), flush=True)
        return
    print(line(result), flush=True)
    if cfg.verbose:
        print(*details(result), sep="\n", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: flags, logging, one line for what a user can mend."""
    cfg, paths = config.parse_config(
        4, __doc__ or "", argv, ("PATH", "files or folders")
    )
    utils.start_logging(log, cfg)
    kept = "every answer so far is kept; the same command goes on with it"
    return utils.exit_code(lambda: run(cfg, paths), log.error, kept)


if __name__ == "__main__":
    raise SystemExit(main())
