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
import glob
import json
import logging
import shutil
import sys
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import config
import utils
from config import Config
from utils import AnswerBook, Decision, PipelineError, RejectedError, ServerFacts

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
    digests, limits = (metrics.get(name) or {} for name in ("sha256", "thresholds"))
    if config.SECOND_READER not in digests or "stages" not in limits:
        raise PipelineError(
            f"{folder / config.METRICS} describes no model, or one of an older "
            "version: run phases 2 and 3 again (phase 2 asks only what is new)"
        )
    for name, expected in digests.items():
        utils.check_digest(folder / name, expected, TRAIN_AGAIN)
    here, trained_with = version("scikit-learn"), metrics["libraries"]["scikit-learn"]
    if trained_with != here:
        raise PipelineError(
            f"the model in {folder} was made with scikit-learn {trained_with}, here is "
            f"{here}: {TRAIN_AGAIN}, or `pip install scikit-learn=={trained_with}`"
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

    Without facts of the server: what the command line alone decides. Returns the
    differences that ``--force`` passes over.
    """
    now = utils.conditions(cfg, facts)
    trained = {name: metrics["conditions"].get(name) for name in now}
    for name in ("vlm", "embedder"):  # up to version 1.9.1 the flags kept it
        trained[name] = utils.plain_name(trained[name])
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


def doubts(metrics: Mapping[str, Any], cfg: Config) -> Iterator[str]:
    """What a person should know of the model before it answers."""
    asked, stages = cfg.inference_descriptions, metrics["thresholds"]["stages"]
    trained, measured = metrics["k"], metrics.get("k_measured", metrics["k"])
    if str(asked) not in stages:
        yield (
            f"thresholds were chosen for {trained} descriptions an image, now {asked}"
        )
    if measured < trained:
        yield (
            f"the thresholds were measured with {measured} descriptions an image, all "
            "that training had"
        )
    if len(stages) == 1:
        yield f"the model has one stage: what is asked anything is asked all {asked}"
    kind = "one_reader" if cfg.one_reader else "confidence"
    if all(min(one[kind].values()) >= utils.NEVER for one in stages.values()):
        yield (
            f'no confidence is safe in this model: every image is "'
            f'{config.INCONCLUSIVE}" (see phase 3)'
        )


# --- One image after another --------------------------------------------------------


@dataclass(eq=False)
class Result:
    """One file, and what came of it: a decision or an error."""

    path: Path
    picture: utils.PreparedImage | None = None
    pixels: NDArray[np.float32] | None = None
    """(40,), `utils.picture_statistics`."""
    texts: list[str] = field(default_factory=list)
    error: str = ""
    decision: Decision | None = None


def look_at(result: Result) -> None:
    """Read one file and measure its picture; asks nothing."""
    try:
        result.picture = utils.prepare_image(result.path)
        result.pixels = utils.picture_statistics(result.picture.grey)
    except RejectedError as error:
        result.error = str(error)


@dataclass
class Inference:
    """Decides on one file after another, and shows every result as it comes.

    Results come in the order of the files. Their rows, tiles and copies wait until a
    sight test shows that the server looked; with --no-sight-test nothing waits.
    """

    slots: Sequence[utils.Slot]
    sight: utils.SightTest | None
    model: asyncio.Task[utils.Model]
    book: AnswerBook
    sinks: "Sequence[Sink]"
    made_with: Mapping[str, Any]
    bar: Any
    cfg: Config
    asked: int = 0
    """Images that were asked something since the last sight test."""
    begun: deque[Result] = field(default_factory=deque)
    """Not shown yet: they, or files before them, are not finished."""
    shown: "list[tuple[Result, Record]]" = field(default_factory=list)
    """Waiting for a sight test."""
    twins: dict[str, asyncio.Lock] = field(
        default_factory=lambda: defaultdict(asyncio.Lock)
    )
    settled: Counter[int] = field(default_factory=Counter)
    """Images by the number of their questions; -1 for those that failed."""

    async def run(self, paths: Sequence[Path]) -> None:
        """Classify every file; a file that fails is shown with its reason."""

        def begin() -> Iterator[Result]:
            for path in paths:
                self.begun.append(Result(path))
                yield self.begun[-1]

        await utils.image_by_image(
            begin(), look_at, self.finish, self.slots, lambda: self.test(TEST_EVERY)
        )
        # Also those that a killed run had asked.
        if self.sight and len(self.book.unconfirmed()) > TEST_AT_END:
            await self.test()
        self.settle()

    async def test(self, at_least: int = 0) -> None:
        """See whether the server looks, after so many images that were asked."""
        if self.sight and self.asked >= at_least:
            self.asked = 0
            try:
                await self.sight.run()
            except utils.BlindError:
                self.withdraw()
                raise
            self.settle()

    async def finish(self, result: Result, _: None, turn: utils.Turn) -> None:
        """Decide, and show what no earlier file keeps waiting."""
        if result.picture:
            twin = self.twins[result.picture.image_id]
            if twin.locked():  # equal pixels are asked once: those answers will do
                turn.end()
            async with twin:
                try:
                    result.decision = await self.decide(result, result.picture, turn)
                except RejectedError as error:
                    result.error = str(error)
        while self.begun and (self.begun[0].decision or self.begun[0].error):
            self.show(self.begun.popleft())
            self.bar.update()

    async def decide(
        self, result: Result, picture: utils.PreparedImage, turn: utils.Turn
    ) -> Decision:
        """The picture first, then the descriptions, stage by stage."""
        cfg, model, seen = self.cfg, await self.model, None
        if result.pixels is not None and not cfg.one_reader:
            seen = utils.read_picture(model, result.pixels)
        modality = "" if cfg.any_modality else picture.header.get("modality", "")
        foreign = utils.foreign_modality(modality, model.modalities)
        decided = partial(utils.decide, model.thresholds, seen, foreign=foreign)
        decision = decided()
        if decision.reason and not cfg.ask_all:
            return decision
        asked = utils.questions("generic", cfg.inference_descriptions)
        answers, final, was_asked = self.book.of(picture), None, False
        for stage in [s for s in model.stages[:-1] if s < len(asked)] + [len(asked)]:
            some, turn.stays = asked[:stage], stage < len(asked)
            is_open = any(answers.chosen(question) is None for question in some)
            self.asked += is_open and not was_asked
            was_asked |= is_open
            await utils.ask(picture, some, answers, turn)
            result.texts = answers.texts(some)
            limits = [s for s in model.stages if s >= stage] or model.stages[-1:]
            words = utils.read_words(model, answers.rows(some), limits[0])
            decision = decided(words, limits[0])
            # Whatever is asked further: phase 3's figures are those of this rule.
            final = final or (decision if decision.final else None)
            if final and not cfg.ask_all:
                break
        return final or decision

    def show(self, result: Result) -> None:
        """Print one result, for a person or as a line of JSON."""
        found = record(result, {"time": now(), **self.made_with})
        lines = [json.dumps(found)] if self.cfg.json else [line(found)]
        if self.cfg.verbose and not self.cfg.json:
            lines += details(found)
        with tqdm.external_write_mode(sys.stdout):
            print(*lines, sep="\n", flush=True)
        self.shown.append((result, found))
        if self.cfg.no_sight_test:
            self.settle()

    def settle(self) -> None:
        """The server is shown to see: what waits is written."""
        for result, found in self.shown:
            for write in self.sinks:
                write(result, found)
            self.settled[len(result.texts) if result.decision else -1] += 1
        self.shown.clear()

    def withdraw(self) -> None:
        """The server does not see: what hangs on answers that were set aside goes."""
        waiting, self.shown = self.shown, []
        for result, found in waiting:
            if result.texts and found["image_id"] in self.book.doubted:
                result.decision, result.error = None, "withdrawn: the sight test failed"
                self.show(result)
            else:
                self.shown.append((result, found))
        self.settle()


# --- What comes out -----------------------------------------------------------------

Record = dict[str, Any]
"""One result with the keys of --json, which README lists."""
Sink = Callable[[Result, Record], object]
"""Writes a result where it was asked for."""
READERS = {"descriptions": "descriptions_say", "picture": "picture_says"}


def record(result: Result, made_with: Mapping[str, Any]) -> Record:
    """One result, and with what it was made."""
    decision, picture = result.decision, result.picture
    image_id = picture.image_id if picture else ""
    found: Record = {"file": str(result.path), "image_id": image_id}
    if decision is None:
        return {**found, "error": result.error, **made_with}
    names = {"label": "class", "words": "descriptions_say", "picture": "picture_says"}
    said = {names.get(key, key): value for key, value in asdict(decision).items()}
    for reader in filter(None, (said["descriptions_say"], said["picture_says"])):
        del reader["confidences"]  # they stand beside it
    if seen := said["picture_says"]:
        del seen["confidence"]  # this reader has none
    confidences = decision.words.confidences if decision.words else {}
    ranked = sorted(confidences.items(), key=lambda pair: -pair[1])
    said |= {"confidences": dict(ranked), "questions": len(result.texts)}
    return {**found, **said, "descriptions": result.texts, **made_with}


def line(found: Record) -> str:
    """One result for a person: file, class, confidences, and why if inconclusive."""
    file = utils.shown_path(found["file"])  # of several lines it would seem two results
    if "error" in found:
        return f"{file}: failed: {found['error']}"
    shares = ", ".join(f"{name} {p:.1%}" for name, p in found["confidences"].items())
    seen = found["picture_says"]
    picture = f"picture {seen['label']}" if seen else ""
    parts = filter(None, (found["class"], shares, picture, found["reason"]))
    return f"{file}: {' · '.join(parts)}"


def opinions(found: Record) -> Iterator[tuple[str, Sequence[str]]]:
    """What each reader that was heard saw, and the nearest images of training."""
    for name, says in READERS.items():
        if one := found.get(says):
            novelty = f"novelty {one['novelty']:.2f} of its limit"
            yield f"{name}: {one['label']}, {novelty}", one["nearest"]


def details(found: Record) -> Iterator[str]:
    """What --verbose adds: what each reader saw, and the descriptions."""
    for said, nearest in opinions(found):
        yield f"    {said}, nearest in training: {', '.join(nearest)}"
    if "error" not in found:
        limits = f"decided by the limits of {found['stage']}"
        yield f"    questions: {found['questions']}, {limits}"
        for text in found["descriptions"]:
            yield f"    - {' '.join(text.split())}"


TABLE_COLUMNS = (
    *("file", "image_id", "class", "best_class", "reason", "stage", "questions"),
    *("descriptions_say", "descriptions_novelty", "descriptions_nearest"),
    *("picture_says", "picture_novelty", "picture_nearest", "error", "warnings"),
    *("time", "program_version", "vlm_digest", "embedder_digest", "model"),
)


def table(path: Path, classes: Sequence[str], opened: AsyncExitStack) -> Sink:
    """Open the CSV file of --csv; each record is on its way to the disk at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = opened.enter_context(path.open("wb"))
    columns = [*TABLE_COLUMNS, *(f"confidence_{name}" for name in classes)]
    write_row = utils.csv_writer(file, columns)

    def add(_: Result, found: Record) -> None:
        row = found | {"warnings": "; ".join(found["warnings"])}
        for name, says in READERS.items():
            if one := found.get(says):
                nearest = "; ".join(one["nearest"])
                row |= {says: one["label"], f"{name}_nearest": nearest}
                row[f"{name}_novelty"] = one["novelty"]
        for name, share in found.get("confidences", {}).items():
            row[f"confidence_{name}"] = share
        write_row(row)
        file.flush()

    return add


STATES = (config.INCONCLUSIVE, "answered", "failed")
"""In their order on the page: what to label next comes first."""


def page(
    path: Path, classes: Sequence[str], dataset: Path, opened: AsyncExitStack
) -> Sink:
    """The page of --html: written empty now, and whole at the end, also by Ctrl-C."""
    images = dataset / config.DATASET_IMAGES
    rows = utils.read_csv(images) if images.is_file() else []
    trained = {row["file"]: row["image_id"] for row in rows}
    tiles: list[utils.Tile] = []
    pictures: dict[str, bytes] = {}
    foot: list[str] = []

    def neighbour(file: str) -> tuple[str, str]:
        key = trained.get(file, "")
        thumbnail = dataset / config.THUMBNAIL_DIR / f"{key}.jpg"
        if key not in pictures and thumbnail.is_file():
            pictures[key] = thumbnail.read_bytes()
        return key, file

    def add(result: Result, found: Record) -> None:
        tile = utils.Tile(found["file"], state="failed", lines=[result.error])
        if result.decision and result.picture:
            key, saw = found["image_id"], dict(opinions(found))
            near = dict.fromkeys(file for nearest in saw.values() for file in nearest)
            doubtful = found["class"] == config.INCONCLUSIVE
            said = found["descriptions"]
            more = f"and {len(said) - 3} more: --json has all"
            tile = tile._replace(
                picture=key,
                file=str(result.path.resolve()),
                label="" if doubtful else found["class"],
                state=STATES[0] if doubtful else "answered",
                lines=[*filter(None, [found["reason"]]), *saw],
                shares=found["confidences"],
                near=[neighbour(file) for file in list(near)[:4]],
                details=[*said[:3], more] if len(said) > 3 else said,
            )
            pictures[key] = utils.thumbnail(result.picture.grey)
        tiles.append(tile)
        keys = ("program_version", "vlm_digest", "embedder_digest", "model", "warnings")
        foot[:] = [f"{key}: {found[key]}" for key in keys if found[key]]

    def surest_last(tile: utils.Tile) -> tuple[int, float]:
        return STATES.index(tile.state), max(tile.shares.values(), default=0)

    def write() -> None:
        doubtful = sum(tile.state == STATES[0] for tile in tiles)
        title = f"{doubtful} of {len(tiles)} images are {config.INCONCLUSIVE}"
        first = "They stand first: label those that should be known, and train again."
        sheet = utils.Sheet(
            title=f"Phase 4: {len(tiles)} images, {now()}",
            folder=str(path.resolve().parent),
            tiles=sorted(tiles, key=surest_last),
            pictures=pictures,
            classes=classes,
            order="doubtful first",
            sections=[utils.Section(title, [first, utils.HOW_TO_MARK])],
            foot=foot,
        )
        utils.page(path, sheet)

    write()
    opened.callback(write)
    return add


def copy_into(folder: Path, book: AnswerBook, result: Result, _: Record) -> None:
    """Copy an image into the folder of its class; the original stays where it is.

    A file that is already there is never replaced: the same content needs no copy,
    other content gets another name. The image's journal keeps that and where.
    """
    if result.decision is None or result.picture is None:
        return
    label, original = result.decision.label, result.path
    name = "no_concluyente" if label == config.INCONCLUSIVE else label
    digest = utils.sha256_of(original)
    for suffix in ("", f"_{result.picture.image_id[:12]}", f"_{digest}"):
        target = folder / name / f"{original.stem}{suffix}{original.suffix}"
        if not target.exists():
            break
        if utils.sha256_of(target) == digest:
            return
    else:  # somebody's own file has even that name
        return
    with utils.atomic_write(target) as copy, original.open("rb") as file:
        shutil.copyfileobj(file, copy)
    copied = {"to": str(target.resolve()), "class": label, "time": now()}
    book.of(result.picture).journal.add({"key": f"copied to {label}", **copied})


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- The phase ----------------------------------------------------------------------


def find_images(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files named, and all files below the folders named, in that order.

    And what could not be seen there, of which a line tells.
    """
    found: list[Path] = []
    unseen: list[Path] = []

    def tell(path: Path, why: str) -> None:
        unseen.append(path)
        log.warning("%s: %s", path, why)

    for path in paths:
        # The shells of Windows leave wildcards to the program.
        matching = [] if path.exists() else sorted(glob.glob(str(path)))  # noqa: PTH207
        for one in [Path(name) for name in matching] or [path]:
            inside = utils.find_files(one, tell) if one.is_dir() else [one]
            # Tables and pages of earlier runs may have any name.
            found += [
                file
                for file in inside
                if file == one or file.suffix.lower() not in (".csv", ".html")
            ]
    if not found:
        raise PipelineError(f"{paths[0]} holds no file: name a DICOM file or a folder")
    return found, unseen


def check_outputs(cfg: Config) -> None:
    """Refuse before anything else what would replace an image or can't be written.

    `--csv new/*.dcm` is a slip of the hand that a shell makes dangerous.
    """
    if cfg.csv and cfg.html and cfg.csv.resolve() == cfg.html.resolve():
        raise PipelineError(f"--csv and --html both name {cfg.csv}: name two files")
    for path, suffix in ((cfg.csv, ".csv"), (cfg.html, ".html")):
        if path and not path.name:
            raise PipelineError(f"--{suffix[1:]} {path}: that is a folder, name a file")
        if path and path.is_file() and path.suffix.lower() != suffix:
            raise PipelineError(
                f"--{suffix[1:]} would replace {path}: name a file that ends in "
                f"{suffix}"
            )
        if path and path.is_dir():
            raise PipelineError(f"--{suffix[1:]} {path}: that is a folder, name a file")
    for folder in filter(
        None, (cfg.csv and cfg.csv.parent, cfg.html and cfg.html.parent, cfg.copy_to)
    ):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def open_outputs(
    cfg: Config, classes: Sequence[str], opened: AsyncExitStack
) -> Iterator[Sink]:
    """Only when a question can be asked: earlier results stand until then."""
    if cfg.csv:
        yield table(cfg.csv, classes, opened)
    if cfg.html:
        yield page(cfg.html, classes, cfg.folder("dataset_dir"), opened)


def run(cfg: Config, paths: Sequence[Path]) -> int:
    """Classify the files; 0 when every one has a result, 1 when some failed."""
    if cfg.sight_test_only:
        utils.run_async(utils.only_sight(cfg, log.info, print))
        return utils.EXIT_DONE
    if not paths:
        raise PipelineError("no image is named: name DICOM files or folders")
    check_outputs(cfg)
    files, unseen = find_images(paths)
    metrics = read_metrics(cfg.folder("model_dir"))
    check_conditions(metrics, None, cfg)
    if warning := utils.distance_warning(cfg):
        log.warning("warning: %s", warning)
    code = utils.run_async(classify(files, metrics, cfg))
    return max(code, utils.EXIT_SOME_FAILED) if unseen else code


async def classify(
    files: Sequence[Path], metrics: Mapping[str, Any], cfg: Config
) -> int:
    """Check that model and server fit, then work through the files."""
    folder, classes = cfg.folder("model_dir"), metrics["class_names"]
    async with AsyncExitStack() as opened:
        named = await opened.enter_async_context(utils.open_servers(cfg, log.info))
        model = asyncio.create_task(
            asyncio.to_thread(utils.load_model, folder, metrics)
        )
        servers, facts = await utils.preflight(named, cfg)
        warnings = [*check_conditions(metrics, facts, cfg), *doubts(metrics, cfg)]
        for warning in warnings if not cfg.json else ():
            print(f"warning: {warning}", flush=True)
        book = open_book(cfg, facts, opened)
        slots = utils.slots_of(cfg, servers)
        sight = None if cfg.no_sight_test else utils.SightTest(slots, book)
        if sight and not sight.is_recent(answers=500, minutes=30):
            await sight.run(cfg.any_host)  # earlier results stand until then
        sinks = list(open_outputs(cfg, classes, opened))
        if cfg.copy_to:
            sinks.append(partial(copy_into, cfg.copy_to, book))
        made_with = {
            "program_version": config.PROGRAM_VERSION,
            "vlm_digest": facts.vlm_digest,
            "embedder_digest": facts.embedder_digest,
            "model": utils.sha256_of(folder / config.METRICS)[:12],
            "warnings": warnings,
        }
        opened.enter_context(logging_redirect_tqdm())
        hidden = cfg.quiet or None  # None: off a terminal
        bar = tqdm(total=len(files), unit="image", disable=hidden, smoothing=0)
        opened.enter_context(bar)
        images = Inference(slots, sight, model, book, sinks, made_with, bar, cfg)
        await images.run(files)
        bar.close()
        for said in (summary(images.settled), *utils.work_done(servers)):
            log.info("%s", said)
    failed = images.settled[-1]
    return utils.EXIT_SOME_FAILED if failed else utils.EXIT_DONE


def summary(settled: Mapping[int, int]) -> str:
    """After how many questions the images were decided."""
    counts = {asked: n for asked, n in sorted(settled.items()) if asked >= 0}
    after = ", ".join(f"{n} after {asked}" for asked, n in counts.items())
    mean = sum(asked * n for asked, n in counts.items()) / max(sum(counts.values()), 1)
    failed = f", {settled[-1]} failed" if settled.get(-1) else ""
    return f"images by questions: {after or 'none'} (mean {mean:.1f}){failed}"


def open_book(cfg: Config, facts: ServerFacts, opened: AsyncExitStack) -> AnswerBook:
    """The journal; where nothing can be written, one that lasts as long as the run."""
    folder = cfg.folder("dataset_dir") / config.JOURNAL_DIR
    try:
        folder.mkdir(parents=True, exist_ok=True)
        book = AnswerBook(folder, cfg, facts)
        book.touch()
    except OSError as error:
        log.warning(
            "warning: %s can't be written (%s): new answers are not kept",
            *(folder, error.strerror),
        )
        aside = opened.enter_context(tempfile.TemporaryDirectory())
        for path in folder.glob("*.jsonl"):  # what was kept is not asked again
            shutil.copyfile(path, Path(aside, path.name))
        book = AnswerBook(Path(aside), cfg, facts)
    for note in book.notes:
        log.warning("note: %s", note)
    return book


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: flags, logging, one line for what a user can mend."""
    cfg, paths = config.parse_config(
        4, __doc__ or "", argv, ("PATH", "files or folders")
    )
    utils.start_logging(log, cfg)
    kept = (
        "answers that came are kept, and the same command asks only the rest; rows, "
        "tiles and copies that waited for a sight test are written then"
    )
    return utils.exit_code(lambda: run(cfg, paths), log.error, kept)


if __name__ == "__main__":
    raise SystemExit(main())
