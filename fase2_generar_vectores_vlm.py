"""Phase 2: every labelled image becomes 50 descriptions, every description a vector.

Reads   datos_etiquetados/<CLASS>/   DICOM files, any depth below the class folder
Writes  dataset_final_vlm/
          dataset_X.npy      float32 (n_rows, n_features), one embedding per row
          dataset_y.npy      str (n_rows,), the class of each row
          dataset_filas.csv  one line per row: image, file, prompt, seed, description
          descripciones/     the journal: every answer, on disk as soon as it is given
          rechazados.csv     what is not in the dataset, and why
          manifiesto.json    with what all this was made; written last

A run that is killed, or a second run, asks only what has no answer yet.

    python fase2_generar_vectores_vlm.py --estimate
    python fase2_generar_vectores_vlm.py
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

import config
import utils
from config import Config
from utils import (
    Answer,
    ModelChangedError,
    PipelineError,
    PreparedImage,
    Question,
    RejectedError,
    ServerFacts,
    VlmServer,
)

log = logging.getLogger("fase2")

ROW_COLUMNS = (
    "row",
    "image_id",
    "file",
    "class",
    "prompt_set",
    "prompt_index",
    "prompt",
    "seed",
    "description",
)
LIBRARIES = ("numpy", "ollama", "pillow", "pydicom", "imagecodecs")
ESTIMATE_QUESTIONS = 6
"""Asked of one image per server slot by --estimate."""

# --- What is labelled ---------------------------------------------------------------


@dataclass(frozen=True)
class LabelledImage:
    """One image that a person put into a class folder."""

    label: str
    path: Path
    image_id: str
    view_id: str


@dataclass
class Rejections:
    """What is not in the dataset; `failed` counts what a person should look at."""

    rows: list[dict[str, str]] = field(default_factory=list)
    failed: int = 0

    def add(self, path: Path, reason: str, failed: bool = True) -> None:
        """Record one file."""
        self.rows.append({"file": str(path), "reason": reason})
        self.failed += failed
        log.log(logging.WARNING if failed else logging.INFO, "%s: %s", path, reason)


def labelled_files(folder: Path) -> list[Path]:
    """All files below the class folders and beside them.

    Raises
    ------
    PipelineError
        No folder, or none with a file.
    """
    if not folder.is_dir():
        raise PipelineError(
            f"{folder} is missing: run `python fase1_descompresion.py`, then move its "
            f"files into {folder / '<CLASS>'}"
        )
    paths = list(utils.find_files(folder))
    if not paths:
        raise _nothing_labelled(folder)
    return paths


def _nothing_labelled(folder: Path) -> PipelineError:
    return PipelineError(
        f"{folder} holds no image in a class folder: move the files of phase 1 into "
        f"{folder / '<CLASS>'}"
    )


def identify(
    paths: Sequence[Path], folder: Path, rejections: Rejections
) -> list[LabelledImage]:
    """Decode and identify the labelled files, ordered by (class, image id).

    Raises
    ------
    PipelineError
        No class with an image, or one image labelled as two classes.
    """
    log.info("reading %d files in %s", len(paths), folder)
    labelled: list[LabelledImage] = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for path, result in zip(paths, pool.map(_ids, paths), strict=True):
            parts = path.relative_to(folder).parts
            if len(parts) == 1:
                rejections.add(path, "lies in no class folder")
            elif isinstance(result, str):
                rejections.add(path, result)
            else:
                labelled.append(LabelledImage(parts[0], path, *result))
    images = _without_copies(labelled, rejections)
    if not images:
        raise _nothing_labelled(folder)
    return images


def _ids(path: Path) -> tuple[str, str] | str:
    """Image and view id, or why there is none; thousands of pictures are not kept."""
    try:
        image = utils.prepare_image(path)
    except RejectedError as error:
        return str(error)
    return image.image_id, image.view_id


def _without_copies(
    labelled: Sequence[LabelledImage], rejections: Rejections
) -> list[LabelledImage]:
    unique: dict[str, LabelledImage] = {}
    conflicts = []
    for image in labelled:
        first = unique.setdefault(image.image_id, image)
        if first.label != image.label:
            conflicts.append(f"{first.path} and {image.path}")
        elif first is not image:
            rejections.add(image.path, f"same image as {first.path}", failed=False)
    if conflicts:
        raise PipelineError(
            f"{len(conflicts)} image(s) labelled as two classes: "
            f"{'; '.join(conflicts[:5])}: keep each in one class folder only"
        )
    return sorted(unique.values(), key=lambda image: (image.label, image.image_id))


def questions_for(label: str, cfg: Config) -> list[Question]:
    """The questions that an image of this class is asked, in row order."""
    generic = round(cfg.descriptions * cfg.generic_share)
    own = "background" if label in config.BACKGROUND_CLASSES else "object"
    asked = utils.questions(own, cfg.descriptions - generic)
    asked += utils.questions("generic", generic)
    return sorted(asked, key=lambda q: (q.prompt_set, q.index))


# --- The journal --------------------------------------------------------------------


class Journal:
    """All answers about one image and their vectors: append-only JSON Lines.

    Every line is on disk when its method returns. Answers are found again by the digest
    of all that was asked, vectors by text and embedder: what was asked otherwise is not
    found, so nothing old is mixed in. A torn last line, left by a kill, is passed over.
    """

    def __init__(
        self, folder: Path, image: LabelledImage, conditions: Mapping[str, Any]
    ) -> None:
        self._path = folder / f"{image.image_id}.jsonl"
        self._image = image
        self._conditions = conditions
        self._answers: dict[str, Answer] = {}
        self._vectors: dict[str, str] = {}
        self._unconfirmed: list[str] = []
        for record in _read_lines(self._path):
            self._take(record)

    def attempts(self, question: Question) -> list[Answer]:
        """The answers to a question so far, in the order of their attempts."""
        found: list[Answer] = []
        while answer := self._answers.get(self._answer_key(question, len(found))):
            found.append(answer)
        return found

    def chosen(self, question: Question) -> Answer | None:
        """The answer that stands in the dataset, if there is one yet."""
        return utils.chosen_answer(self.attempts(question))

    def vector(self, text: str) -> NDArray[np.float32] | None:
        """The embedding of a text, float32 (n_features,), if there is one yet."""
        packed = self._vectors.get(self._vector_key(text))
        return None if packed is None else utils.unpack_vector(packed)

    def add_answer(self, question: Question, attempt: int, answer: Answer) -> None:
        """Keep an answer, usable or not."""
        key = self._answer_key(question, attempt)
        self._unconfirmed.append(key)
        asked = {
            "prompt_set": question.prompt_set,
            "prompt_index": question.index,
            "prompt": question.prompt,
            "seed": question.seed(self._image.image_id, attempt),
        }
        self._append({"answer": key, **asked, **asdict(answer)})

    def add_vectors(self, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        """Keep the embeddings of texts, float32 (n_features,) each."""
        self._append(
            *(
                {"embedding": self._vector_key(text), "vector": utils.pack_vector(v)}
                for text, v in vectors.items()
            )
        )

    def quarantine(self, question: Question) -> None:
        """The embedder can't take the chosen answer: another attempt must stand in."""
        attempts = self.attempts(question)
        bad = attempts.index(cast(Answer, utils.chosen_answer(attempts)))
        self._append({"quarantined": self._answer_key(question, bad)})

    @property
    def unconfirmed(self) -> bool:
        """Whether answers came since the models were last known to be unchanged."""
        return bool(self._unconfirmed)

    def confirm(self) -> None:
        """The models are known to be unchanged: the answers since last time hold."""
        self._unconfirmed.clear()

    def take_back(self) -> None:
        """Another model may have given the answers since the last `confirm`."""
        self._append({"taken_back": self._unconfirmed})

    def _answer_key(self, question: Question, attempt: int) -> str:
        seed = question.seed(self._image.image_id, attempt)
        return _key(
            self._image.view_id,
            question.prompt,
            seed,
            self._conditions["options"],
            self._conditions["vlm_digest"],
        )

    def _vector_key(self, text: str) -> str:
        return _key(text, self._conditions["embedder_digest"])

    def _append(self, *records: dict[str, Any]) -> None:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        with self._path.open("ab") as file:
            # A line torn by a kill must not swallow the first of these.
            start = b"\n" if _is_torn(self._path) else b""
            file.write(start + "".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
        for record in records:
            self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        if "answer" in record:
            values = {name: record[name] for name in Answer.__dataclass_fields__}
            self._answers[record["answer"]] = Answer(**values)
        elif "embedding" in record:
            self._vectors[record["embedding"]] = record["vector"]
        elif "quarantined" in record:
            bad = self._answers[record["quarantined"]]
            self._answers[record["quarantined"]] = replace(bad, problem="unembeddable")
        for key in record.get("taken_back", ()):
            self._answers.pop(key, None)


def open_journal(
    image: LabelledImage, conditions: Mapping[str, Any], cfg: Config
) -> Journal:
    """Read what is known about an image under these conditions."""
    folder = cfg.folder("dataset_dir") / config.JOURNAL_DIR
    return Journal(folder, image, conditions)


def _key(*asked: object) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: a second run would ask everything twice.

    The operating system drops the lock of a process that dies, so none can go stale.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".fase2.lock").open("a+b") as file:
        try:
            _lock(file)
        except OSError:
            raise PipelineError(
                f"another run of phase 2 works on {folder}: wait for it to end"
            ) from None
        yield


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes]) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- Asking -------------------------------------------------------------------------


@dataclass(eq=False)
class Task:
    """One image while it is worked on."""

    image: LabelledImage
    journal: Journal
    picture: PreparedImage | None = None
    pending: int = 0
    failure: str = ""


class Interview:
    """Asks the server all that the journals don't know yet about the images."""

    def __init__(
        self, server: VlmServer, facts: ServerFacts, cfg: Config, progress: "Progress"
    ) -> None:
        self._server = server
        self._facts = facts
        self._cfg = cfg
        self._progress = progress
        self._conditions = utils.conditions(cfg, facts)
        self._open_tasks: set[Task] = set()
        self._described: asyncio.Queue[Task | None] = asyncio.Queue(maxsize=4)
        self._limit = ESTIMATE_QUESTIONS if cfg.estimate else None
        self.failures: dict[str, str] = {}

    async def run(self, images: Sequence[LabelledImage]) -> None:
        """Describe and embed every image; what fails is in `failures` by image id.

        Where the server can't hold both models at once, all embeddings come at the
        end: else each image would have one model loaded and the other dropped, twice.
        """
        try:
            async with asyncio.TaskGroup() as group:
                if self._facts.both_loaded:
                    group.create_task(self._embed_beside())
                await utils.in_lanes(images, self._open, self._ask, self._cfg)
                await self._described.put(None)
            if not self._facts.both_loaded:
                for image in images:
                    await self._embed(self._task(image))
        except* ModelChangedError:
            for task in self._open_tasks:
                task.journal.take_back()
            raise

    def _task(self, image: LabelledImage) -> Task:
        return Task(image, open_journal(image, self._conditions, self._cfg))

    async def _open(self, image: LabelledImage) -> list[tuple[Task, Question]]:
        """Prepare an image and give the questions that have no answer yet."""
        task = await asyncio.to_thread(self._task, image)
        asked = questions_for(image.label, self._cfg)
        missing = [q for q in asked if task.journal.chosen(q) is None][: self._limit]
        self._open_tasks.add(task)
        task.pending = len(missing)
        if missing:
            task.picture = await asyncio.to_thread(_picture, task)
        if not missing or task.failure:
            await self._close(task)
            return []
        return [(task, question) for question in missing]

    async def _ask(self, job: tuple[Task, Question]) -> None:
        task, question = job
        if not task.failure:
            await self._describe(task, question)
        task.pending -= 1
        if not task.pending:
            await self._close(task)

    async def _describe(self, task: Task, question: Question) -> None:
        def keep(attempt: int, answer: Answer) -> None:
            task.journal.add_answer(question, attempt, answer)
            self._progress.answered(answer)

        picture, earlier = task.picture, task.journal.attempts(question)
        try:
            if picture is not None:
                await self._server.describe(picture, question, earlier, keep)
                self._progress.described()
        except RejectedError as error:
            task.failure = str(error)

    async def _close(self, task: Task) -> None:
        """All is asked: make sure the models are the same, then embed or leave."""
        await self._confirm(task)
        self._open_tasks.discard(task)
        task.picture = None
        if task.failure:
            self.failures[task.image.image_id] = task.failure
            self._progress.image_done(failed=True)
        elif self._facts.both_loaded:
            await self._described.put(task)

    async def _confirm(self, task: Task) -> None:
        if task.journal.unconfirmed:
            await self._server.check_unchanged(self._facts)
            task.journal.confirm()

    async def _embed_beside(self) -> None:
        while (task := await self._described.get()) is not None:
            await self._embed(task)

    async def _embed(self, task: Task) -> None:
        """Embed what has no vector; a text that can't be is asked again, once."""
        if task.image.image_id in self.failures:
            return
        refused = await self._embed_missing(task)
        if refused:
            self._open_tasks.add(task)
            task.picture = await asyncio.to_thread(_picture, task)
            for question in refused:
                task.journal.quarantine(question)
                await self._describe(task, question)
            await self._confirm(task)
            self._open_tasks.discard(task)
            if await self._embed_missing(task):
                task.failure = "a description can't be embedded: run again to ask anew"
        if task.failure:
            self.failures[task.image.image_id] = task.failure
        self._progress.image_done(failed=bool(task.failure))

    async def _embed_missing(self, task: Task) -> list[Question]:
        """Embed and keep; the questions whose text the embedder can't take remain."""
        texts: dict[str, list[Question]] = {}
        for question in questions_for(task.image.label, self._cfg):
            answer = task.journal.chosen(question)
            if answer and task.journal.vector(answer.text) is None:
                texts.setdefault(answer.text, []).append(question)
        if not texts:
            return []
        started = time.monotonic()
        vectors = await self._server.embed(list(texts))
        await self._server.check_unchanged(self._facts)
        self._progress.embedded(time.monotonic() - started)
        found = zip(texts, vectors, strict=True)
        task.journal.add_vectors({t: v for t, v in found if v is not None})
        pairs = zip(texts.values(), vectors, strict=True)
        return [q for asked, vector in pairs if vector is None for q in asked]


def _picture(task: Task) -> PreparedImage | None:
    """The image as the VLM will see it; a failure is noted in the task."""
    try:
        picture = utils.prepare_image(task.image.path)
    except RejectedError as error:
        task.failure = str(error)
        return None
    if picture.view_id != task.image.view_id:
        task.failure = "changed while the run went on: run again"
        return None
    return picture


# --- What the person sees -----------------------------------------------------------


@dataclass
class Progress:
    """Counts what is done and says so: one line that changes, or one now and then."""

    images: int
    to_ask: int
    slots: int
    quiet: bool = False
    images_done: int = 0
    images_failed: int = 0
    descriptions: int = 0
    vision_s: float = 0.0
    text_s: float = 0.0
    embedding_s: float = 0.0
    recent_vision_s: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    _shown_at: float = field(default_factory=time.monotonic)

    def answered(self, answer: Answer) -> None:
        """One answer came back, usable or not."""
        self.vision_s += answer.vision_s
        self.text_s += answer.text_s
        self.recent_vision_s.append(answer.vision_s)

    def described(self) -> None:
        """One description is there."""
        self.descriptions += 1
        self._recent.append(time.monotonic())
        self._show()

    def embedded(self, seconds: float) -> None:
        """One image's texts became vectors."""
        self.embedding_s += seconds

    def image_done(self, failed: bool) -> None:
        """One image is complete, or given up for this run."""
        self.images_done += not failed
        self.images_failed += failed
        self._show()

    def line(self) -> str:
        """Where the run stands, in one line."""
        total = self.vision_s + self.text_s + self.embedding_s or 1.0
        return (
            f"images {self.images_done}/{self.images}"
            f" · descriptions {self.descriptions}/{self.to_ask}"
            f" · failed {self.images_failed}"
            f" · {self._seconds_each():.2f} s each"
            f" · {_duration((self.to_ask - self.descriptions) * self._seconds_each())}"
            f" left · vision {self.vision_s / total:.0%}"
            f" text {self.text_s / total:.0%} embedding {self.embedding_s / total:.0%}"
        )

    def _seconds_each(self) -> float:
        """From a moving window: the pace of the last hundred descriptions."""
        if len(self._recent) < 2:
            return 0.0
        return (self._recent[-1] - self._recent[0]) / (len(self._recent) - 1)

    def _show(self) -> None:
        terminal = sys.stderr.isatty()
        now = time.monotonic()
        if self.quiet or now - self._shown_at < (0.5 if terminal else 15.0):
            return
        self._shown_at = now
        if terminal:
            # A line that wraps could not be written over.
            line = self.line()[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            log.info("%s", self.line())

    def close(self) -> None:
        """End the line that changes."""
        if sys.stderr.isatty() and not self.quiet:
            print(f"\r\033[K{self.line()}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A line of its own, also where the line that changes stands."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    log.info("%s", text)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def announce(cfg: Config, facts: ServerFacts, images: Sequence[LabelledImage]) -> None:
    """Say what will be done, with what, and what would make it faster."""
    per_class = Counter(image.label for image in images)
    classes = ", ".join(f"{label} {count}" for label, count in per_class.items())
    log.info("images: %d (%s)", len(images), classes)
    log.info("Ollama %s at %s", facts.version, utils.server_url(cfg))
    log.info(
        "describes: %s (%.12s), %.0f %% on the GPU · embeds: %s (%.12s), %d numbers",
        cfg.vlm,
        facts.vlm_digest,
        100 * facts.gpu_share,
        cfg.embed_model,
        facts.embedder_digest,
        facts.probe.size,
    )
    for hint in _hints(cfg, facts):
        log.info("hint: %s", hint)


def _hints(cfg: Config, facts: ServerFacts) -> Iterator[str]:
    if not facts.both_loaded and cfg.vlm != cfg.embed_model:
        yield (
            "the server doesn't keep both models in memory, so all embeddings come "
            "last; OLLAMA_MAX_LOADED_MODELS=2 on the server lets them overlap"
        )
    if 0 < facts.gpu_share < 1:
        yield "the VLM lies partly on the CPU; a smaller --num-ctx needs less memory"
    if facts.gpu_share == 1 and cfg.server_parallel == 1:
        yield (
            "a GPU can describe several images at once: start the server with "
            "OLLAMA_NUM_PARALLEL=4 and add --server-parallel 4"
        )


# --- The dataset --------------------------------------------------------------------


def questions_left(
    images: Sequence[LabelledImage], conditions: Mapping[str, Any], cfg: Config
) -> tuple[int, int]:
    """How many images still have open questions, and how many questions these are."""
    open_images = open_questions = 0
    for image in images:
        journal = open_journal(image, conditions, cfg)
        asked = questions_for(image.label, cfg)
        missing = sum(journal.chosen(question) is None for question in asked)
        open_images += missing > 0
        open_questions += missing
    return open_images, open_questions


class Row(NamedTuple):
    """One row of the dataset and where it comes from."""

    image: LabelledImage
    question: Question
    attempts: list[Answer]
    answer: Answer
    journal: Journal


class Dataset:
    """The rows of all complete images, read from their journals one image at a time."""

    def __init__(
        self,
        images: Sequence[LabelledImage],
        conditions: Mapping[str, Any],
        cfg: Config,
    ) -> None:
        self._folder = cfg.folder("dataset_dir")
        self._labelled = cfg.folder("labelled_dir")
        self._conditions = conditions
        self._cfg = cfg
        self.images = [image for image in images if self._missing(image) == 0]

    def _missing(self, image: LabelledImage) -> int:
        journal = open_journal(image, self._conditions, self._cfg)
        chosen = [journal.chosen(q) for q in questions_for(image.label, self._cfg)]
        return sum(a is None or journal.vector(a.text) is None for a in chosen)

    def _rows(self) -> Iterator[Row]:
        for image in self.images:
            journal = open_journal(image, self._conditions, self._cfg)
            for question in questions_for(image.label, self._cfg):
                attempts = journal.attempts(question)
                # The images are complete: each question has its answer.
                answer = cast(Answer, utils.chosen_answer(attempts))
                yield Row(image, question, attempts, answer, journal)

    def write(self, n_features: int) -> None:
        """Write X, y and the row list; memory holds one image's rows at a time."""
        labels = [
            i.label for i in self.images for _ in questions_for(i.label, self._cfg)
        ]
        with utils.atomic_write(self._folder / config.DATASET_X) as file:
            shape = (len(labels), n_features)
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for row in self._rows():
                vector = row.journal.vector(row.answer.text)
                file.write(cast(NDArray[np.float32], vector).tobytes())
        with utils.atomic_write(self._folder / config.DATASET_Y) as file:
            np.save(file, np.array(labels))
        utils.write_csv(
            self._folder / config.DATASET_ROWS, ROW_COLUMNS, self._row_lines()
        )

    def _row_lines(self) -> Iterator[dict[str, object]]:
        for number, (image, question, attempts, answer, _) in enumerate(self._rows()):
            seed = question.seed(image.image_id, attempts.index(answer))
            values = (
                number,
                image.image_id,
                image.path.relative_to(self._labelled).as_posix(),
                image.label,
                question.prompt_set,
                question.index,
                question.prompt,
                seed,
                answer.text,
            )
            yield dict(zip(ROW_COLUMNS, values, strict=True))

    def quality(self) -> dict[str, dict[str, int]]:
        """Per prompt: answers, and how many were cut, refused, repeated or asked anew.

        "repeated" counts answers that another image got in the same words, in whatever
        order: a prompt that the VLM answers without looking.
        """
        counts: dict[str, Counter[str]] = {}
        texts: dict[str, Counter[int]] = {}
        for _, question, attempts, answer, _ in self._rows():
            count = counts.setdefault(question.prompt, Counter())
            count["answers"] += 1
            count[answer.problem or "whole"] += 1
            count["asked_anew"] += len(attempts) - 1
            words = frozenset(answer.text.lower().split())
            texts.setdefault(question.prompt, Counter())[hash(words)] += 1
        for prompt, same in texts.items():
            counts[prompt]["repeated"] = sum(n for n in same.values() if n > 1)
        return {prompt: dict(count) for prompt, count in counts.items()}

    def manifest(self, facts: ServerFacts) -> dict[str, Any]:
        """With what the folder was made, for phase 3 and for the record."""
        folder = self._folder
        files = (config.DATASET_X, config.DATASET_Y, config.DATASET_ROWS)
        rows = sum(len(questions_for(i.label, self._cfg)) for i in self.images)
        return {
            "program_version": config.PROGRAM_VERSION,
            "libraries": {name: version(name) for name in LIBRARIES},
            "ollama_version": facts.version,
            "conditions": dict(self._conditions),
            "prompts": {name: list(p) for name, p in config.PROMPT_SETS.items()},
            "descriptions": self._cfg.descriptions,
            "generic_share": self._cfg.generic_share,
            "counts": {
                "images": len(self.images),
                "rows": rows,
                "features": facts.probe.size,
                "images_per_class": dict(Counter(i.label for i in self.images)),
            },
            "quality_per_prompt": self.quality(),
            "probe_vector": utils.pack_vector(facts.probe),
            "sha256": {name: utils.sha256_of(folder / name) for name in files},
        }


# --- The phase ----------------------------------------------------------------------


def run(cfg: Config) -> int:
    """Scan, ask, embed, write; 0 when every image is in the dataset, else 1."""
    folder = cfg.folder("dataset_dir")
    if warning := utils.distance_warning(cfg):
        log.warning("warning: %s", warning)
    paths = labelled_files(cfg.folder("labelled_dir"))
    rejections = Rejections()
    with only_one(folder):
        (folder / config.JOURNAL_DIR).mkdir(exist_ok=True)
        # Before the files are read: a server that isn't there shows at once.
        utils.run_async(check_server(cfg))
        images = identify(paths, cfg.folder("labelled_dir"), rejections)
        facts, failures = utils.run_async(interview(images, cfg))
        if cfg.estimate:
            return utils.EXIT_DONE
        dataset = Dataset(images, utils.conditions(cfg, facts), cfg)
        complete = {image.image_id for image in dataset.images}
        for image in images:
            if image.image_id not in complete:
                reason = failures.get(image.image_id, "has not all its descriptions")
                rejections.add(image.path, reason)
        utils.write_csv(
            folder / config.REJECTED_LIST, ("file", "reason"), rejections.rows
        )
        if not dataset.images:
            raise PipelineError(
                "no image has all its descriptions: see "
                f"{folder / config.REJECTED_LIST}"
            )
        dataset.write(facts.probe.size)
        manifest = dataset.manifest(facts)
        utils.write_json(folder / config.MANIFEST, manifest)
    print(summary(folder, manifest, rejections))
    return utils.EXIT_SOME_FAILED if rejections.failed else utils.EXIT_DONE


async def check_server(cfg: Config) -> None:
    """Raise PipelineError unless server and models are there, or can be had."""
    async with VlmServer(cfg, say) as server:
        await server.check_models()


async def interview(
    images: Sequence[LabelledImage], cfg: Config
) -> tuple[ServerFacts, dict[str, str]]:
    """Ask the server all that is open; failures come back by image id."""
    async with VlmServer(cfg, say) as server:
        facts = await server.preflight()
        announce(cfg, facts, images)
        conditions = utils.conditions(cfg, facts)
        open_images, to_ask = questions_left(images, conditions, cfg)
        total = sum(len(questions_for(image.label, cfg)) for image in images)
        log.info("answers: %d in the journal, %d to ask", total - to_ask, to_ask)
        progress = Progress(len(images), to_ask, cfg.server_parallel, cfg.quiet)
        asking = Interview(server, facts, cfg, progress)
        if cfg.estimate:
            images = images[: cfg.server_parallel]
        else:
            # The dataset will change: until it is whole again it has no manifest.
            (cfg.folder("dataset_dir") / config.MANIFEST).unlink(missing_ok=True)
        try:
            await asking.run(images)
        finally:
            progress.close()
    if cfg.estimate:
        print(estimate(progress, open_images))
    return facts, asking.failures


def estimate(progress: Progress, open_images: int) -> str:
    """The expected duration from the few answers just measured.

    The first question about an image has it encoded; the others find it in the server's
    cache. The largest vision times are those of the first questions.
    """
    asked = len(progress.recent_vision_s)
    if not asked:
        return "estimate: nothing is left to ask"
    slowest = sorted(progress.recent_vision_s, reverse=True)
    first, others = slowest[: progress.slots], slowest[progress.slots :]
    extra = float(np.mean(first) - np.mean(others)) if others else 0.0
    each = progress.text_s / asked + float(np.mean(others or first))
    vlm_s = (progress.to_ask * each + open_images * extra) / progress.slots
    embed_s = progress.embedding_s / asked * progress.to_ask
    end = datetime.now().astimezone() + timedelta(seconds=vlm_s + embed_s)
    return (
        f"estimate: {progress.to_ask} descriptions of {open_images} images take about "
        f"{_duration(vlm_s + embed_s)}, until {end:%Y-%m-%d %H:%M} if started now "
        f"(measured on {asked}; {each:.2f} s each, {extra:.2f} s more per image)"
    )


def summary(folder: Path, manifest: dict[str, Any], rejections: Rejections) -> str:
    """The last lines of a run: what was written, what is missing, what comes next."""
    counts = manifest["counts"]
    classes = ", ".join(f"{k} {v}" for k, v in counts["images_per_class"].items())
    lines = [
        f"dataset: {counts['images']} images ({classes}), {counts['rows']} rows of "
        f"{counts['features']} numbers in {folder}"
    ]
    problems: Counter[str] = Counter()
    for prompt_counts in manifest["quality_per_prompt"].values():
        problems.update(prompt_counts)
    lines.append(
        "answers: "
        + ", ".join(
            f"{problems[name]} {name.replace('_', ' ')}"
            for name in ("whole", "cut", "refusal", "repeated", "asked_anew")
        )
    )
    lines += _weak_prompts(manifest["quality_per_prompt"])
    if rejections.rows:
        listed = folder / config.REJECTED_LIST
        lines.append(f"left out: {len(rejections.rows)} files, listed in {listed}")
    lines.append("next: python fase3_entrenamiento_svc.py")
    return "\n".join(lines)


def _weak_prompts(quality: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """The prompts with which the VLM can do little: most answers cut or refused."""
    for prompt, count in quality.items():
        bad = sum(count.get(name, 0) for name in ("cut", "refusal", "repeated"))
        if bad > count["answers"] / 2:
            yield f"{bad} of {count['answers']} cut, refused or repeated: {prompt}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: flags, logging, one line for what a user can mend."""
    cfg, _ = config.parse_config(2, __doc__ or "", argv)
    utils.start_logging(log, cfg)
    return utils.exit_code(lambda: run(cfg), log.error)


if __name__ == "__main__":
    raise SystemExit(main())
