"""Phase 2: every labelled image becomes 50 descriptions, every description a vector.

Reads   datos_etiquetados/<CLASS>/   DICOM files, any depth below the class folder
Writes  dataset_final_vlm/
          dataset_X.npy         float32 (n_rows, n_features), one embedding per row
          dataset_y.npy         str (n_rows,), the class of each row
          dataset_filas.csv     one line per row: image, prompt, seed, description
          dataset_imagenes.csv  one line per image: file, class, header, times
          dataset_pixeles.npy   float32 (n_images, 40), statistics of each picture
          miniaturas/           a thumbnail of each image, for the pages
          descripciones/        the journal: every answer, on disk at once
          rechazados.csv        what is not in the dataset, and why
          manifiesto.json       with what all this was made; written last

A run that is killed, or a second run, asks only what has no answer yet. The images of
the classes take turns, so that an unfinished run is balanced: --finished-only writes
the dataset of the images that are complete.

    python fase2_generar_vectores_vlm.py --estimate
    python fase2_generar_vectores_vlm.py
"""

import signal

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while libraries load

import csv
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import version
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import config
import utils
from config import Config
from utils import (
    Answer,
    AnswerBook,
    PipelineError,
    PreparedImage,
    Question,
    RejectedError,
    ServerFacts,
    Turn,
    VlmServer,
)

log = logging.getLogger("fase2")

ROW_COLUMNS = (
    *("row", "image_id", "file", "class", "prompt_set", "prompt_index", "prompt"),
    *("seed", "description"),
)
IMAGE_COLUMNS = (
    *("image_id", "file", "class", *utils.HEADER_FACTS),
    *("first_answer", "last_answer", "server_versions"),
)
LIBRARIES = ("numpy", "ollama", "pillow", "pydicom", "imagecodecs")
ESTIMATE_QUESTIONS = 6
"""Asked of one image per server slot by --estimate."""
PLAIN_LINE_S = 15.0
"""Where there is no terminal for a bar, a line comes at most so often."""

# --- What is labelled ---------------------------------------------------------------


@dataclass(frozen=True)
class LabelledImage:
    """One image that a person put into a class folder."""

    label: str
    path: Path
    image_id: str
    view_id: str
    header: Mapping[str, str]
    statistics: NDArray[np.float32]
    """(40,), of the picture: see `utils.picture_statistics`."""


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


def labelled_files(folder: Path, rejections: Rejections) -> list[Path]:
    """All files below the class folders and beside them; what is unseen is rejected.

    Raises
    ------
    PipelineError
        No folder, none with a file, or class names that can't stand side by side.
    """
    remedy = f"move the files of phase 1 into {folder / '<CLASS>'}"
    if not folder.is_dir():
        raise PipelineError(
            f"{folder} is missing: run `python fase1_descompresion.py`, then {remedy}"
        )
    paths = list(utils.find_files(folder, rejections.add))
    names = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    if problem := utils.class_name_problem(n for n in names if not n.startswith(".")):
        raise PipelineError(f"{folder}: {problem}")
    filled = Counter(path.relative_to(folder).parts[0] for path in paths)
    empty = [name for name in names if not filled[name] and not name.startswith(".")]
    if not paths:
        raise PipelineError(f"{folder} holds no image in a class folder: {remedy}")
    if empty:
        log.warning("warning: %s: no image in it", ", ".join(map(repr, empty)))
    return paths


def identify(
    paths: Sequence[Path], cfg: Config, rejections: Rejections
) -> list[LabelledImage]:
    """Decode and identify the labelled files, ordered by (class, image id).

    Each gets its thumbnail, where there is none yet.

    Raises
    ------
    PipelineError
        No class with an image, or one image labelled as two classes.
    """
    folder = cfg.folder("labelled_dir")
    identified = partial(_identified, cfg.folder("dataset_dir") / config.THUMBNAIL_DIR)
    log.info("reading %d files in %s", len(paths), folder)
    unique: dict[str, LabelledImage] = {}
    conflicts = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for path, found in zip(paths, pool.map(identified, paths), strict=True):
            parts = path.relative_to(folder).parts
            if len(parts) == 1:
                rejections.add(path, "lies in no class folder")
                continue
            if isinstance(found, str):
                rejections.add(path, found)
                continue
            image = LabelledImage(parts[0], path, *found)
            first = unique.setdefault(image.image_id, image)
            if first.label != image.label:
                conflicts.append(f"{first.path} and {image.path}")
            elif first is not image:
                rejections.add(path, f"same image as {first.path}", failed=False)
    if conflicts:
        raise PipelineError(
            f"{len(conflicts)} image(s) labelled as two classes: "
            f"{'; '.join(conflicts[:5])}: keep each in one class folder only"
        )
    if not unique:
        raise PipelineError(
            f"{folder} holds no image that can be read: see the lines above"
        )
    return sorted(unique.values(), key=lambda image: (image.label, image.image_id))


def _identified(thumbnails: Path, path: Path) -> tuple[Any, ...] | str:
    """What LabelledImage holds, or why there is nothing; the pictures are not kept."""
    try:
        image = utils.prepare_image(path)
    except RejectedError as error:
        return str(error)
    statistics = utils.picture_statistics(image.grey)
    thumbnail = thumbnails / f"{image.image_id}.jpg"
    if not thumbnail.exists():
        with utils.atomic_write(thumbnail) as file:
            file.write(utils.thumbnail(image.grey))
    return image.image_id, image.view_id, image.header, statistics


def warn_of_counts(images: Sequence[LabelledImage]) -> None:
    """What phase 3 would refuse is said before the hours."""
    counts = Counter(image.label for image in images)
    if len(counts) == 1:
        log.warning("warning: one class only (%s): phase 3 needs two", *counts)
    for label, count in counts.items():
        if count == 1:
            log.warning("warning: class %s has 1 image: phase 3 needs two", label)


def warn_of_own_answers(images: Sequence[LabelledImage], book: AnswerBook) -> None:
    """A model must not learn from its own answers unnoticed.

    Phase 4 records what it copies, phase 1 the labels of a saved sheet.
    """
    unseen = 0
    for image in images:
        journal = book.of(image).journal
        given, seen = (
            (journal.get(key) or {}).get("class") for key in ("copied", "confirmed")
        )
        unseen += given == image.label != seen
    if unseen:
        log.warning(
            "warning: %d labels are the program's own answers, unseen by you", unseen
        )


def questions_for(label: str, cfg: Config) -> list[Question]:
    """The questions that an image of this class is asked, in row order."""
    generic = round(cfg.descriptions * cfg.generic_share)
    background = {name.casefold() for name in config.BACKGROUND_CLASSES}
    own = "background" if label.strip().casefold() in background else "object"
    asked = utils.questions(own, cfg.descriptions - generic)
    asked += utils.questions("generic", generic)
    return sorted(asked, key=lambda q: (q.prompt_set, q.index))


# --- Asking -------------------------------------------------------------------------


class Progress:
    """A bar on a terminal, else a plain line now and then and a last one."""

    def __init__(self, images: int, done: int, to_ask: int, quiet: bool) -> None:
        self._images, self._done, self._to_ask = images, done, to_ask
        self._described = self._failed = 0
        self.stamps = [time.monotonic()]
        """Of the start and of every answer."""
        self._shown = self.stamps[0]
        self._bar = tqdm(
            total=to_ask,
            unit="answer",
            disable=True if quiet else None,
            dynamic_ncols=True,
        )

    def answered(self, answer: Answer) -> None:
        """One answer came back, usable or not."""
        self.stamps.append(time.monotonic())
        if answer.usable:
            self._described += 1
            self._bar.update()
        self._show()

    def image_done(self, failed: bool) -> None:
        """One image is complete, or given up for this run."""
        self._done += not failed
        self._failed += failed
        self._bar.set_postfix_str(
            f"images {self._done}/{self._images}, {self._failed} failed"
        )

    def line(self) -> str:
        """Where the run stands, in one line."""
        each = (time.monotonic() - self.stamps[0]) / max(self._described, 1)
        left = timedelta(seconds=round((self._to_ask - self._described) * each))
        return (
            f"images {self._done}/{self._images} · descriptions "
            f"{self._described}/{self._to_ask} · failed {self._failed} · {each:.2f} s "
            f"each · {left} left"
        )

    def _show(self) -> None:
        if self._bar.disable and time.monotonic() - self._shown >= PLAIN_LINE_S:
            self._shown = time.monotonic()
            log.info("%s", self.line())

    def close(self) -> None:
        """End the bar, or say the last line."""
        self._bar.close()
        if self._bar.disable:
            log.info("%s", self.line())


def alternating(images: Sequence[LabelledImage]) -> list[LabelledImage]:
    """First of each class, second of each …: no change in time looks like a class."""
    classes: dict[str, list[LabelledImage]] = {}
    for image in images:
        classes.setdefault(image.label, []).append(image)
    rounds = chain.from_iterable(zip_longest(*classes.values()))
    return [image for image in rounds if image is not None]


def open_work(image: LabelledImage, book: AnswerBook, cfg: Config) -> tuple[int, int]:
    """Questions without an answer, and answers without a vector."""
    answers = book.of(image)
    chosen = [answers.chosen(q) for q in questions_for(image.label, cfg)]
    texts = [answer.text for answer in chosen if answer is not None]
    return chosen.count(None), sum(answers.vector(text) is None for text in texts)


class Describing:
    """Asks and embeds all that is open; failures are kept by image id."""

    def __init__(
        self,
        images: Sequence[LabelledImage],
        servers: Sequence[VlmServer],
        book: AnswerBook,
        cfg: Config,
    ) -> None:
        self._servers, self._book, self._cfg = servers, book, cfg
        work = [(image, open_work(image, book, cfg)) for image in alternating(images)]
        todo = [(image, unasked) for image, (unasked, bare) in work if unasked or bare]
        self._todo = [image for image, unasked in todo if unasked or not cfg.estimate]
        self._open_images = len(todo)
        self._to_ask = sum(unasked for _, unasked in todo)
        self._slots = utils.slots_of(cfg, servers)
        self._sight = utils.SightTest(self._slots, book)
        self._tests_sight = not (cfg.no_sight_test or cfg.estimate)
        self.failures: dict[str, str] = {}
        total = sum(len(questions_for(image.label, cfg)) for image in images)
        done = total - self._to_ask
        log.info("answers: %d in the journal, %d to ask", done, self._to_ask)
        finished = len(images) - len(todo)
        self._progress = Progress(len(images), finished, self._to_ask, cfg.quiet)

    async def run(self) -> None:
        """Go through the images, once or twice.

        Where the server can't hold both models at once, all embeddings come at the end:
        else each image would have one model loaded and the other dropped, twice.
        """
        try:
            with logging_redirect_tqdm():
                if self._cfg.estimate:
                    self._todo = self._todo[: len(self._slots)]
                elif self._tests_sight and self._is_anything_open():
                    await self._sight.run(self._cfg.any_host)
                if not (self._cfg.estimate or self._book.facts.both_loaded):
                    await self._go_through(embed=False)
                await self._go_through(embed=True)
                if self._tests_sight and self._sight.is_open:
                    await self._sight.run()
        finally:
            self._progress.close()
        if self._sight.seconds:
            log.info("sight tests: %.0f s", self._sight.seconds)
        if self._cfg.estimate:
            slots = len(self._slots)
            open_ = self._open_images, self._to_ask
            print(estimate(self._progress.stamps, self._servers, *open_, slots))

    def _is_anything_open(self) -> bool:
        """Questions of this run, or answers of a killed one that no test confirmed."""
        book = self._book
        return bool(self._todo or book.answers_since(book.last_pass()))

    async def _go_through(self, embed: bool) -> None:
        good = [image for image in self._todo if image.image_id not in self.failures]
        work = partial(self._work, embed)
        between = self._sight.when_due if self._tests_sight else None
        await utils.image_by_image(good, as_labelled, work, self._slots, between)

    async def _work(
        self, embed: bool, image: LabelledImage, seen: PreparedImage | str, turn: Turn
    ) -> None:
        answers, told = self._book.of(image), self._progress.answered
        asked = questions_for(image.label, self._cfg)
        if self._cfg.estimate:
            asked = [q for q in asked if not answers.chosen(q)][:ESTIMATE_QUESTIONS]
        try:
            if isinstance(seen, str):
                raise RejectedError(seen)
            await utils.ask(seen, asked, answers, turn, embed=embed, told=told)
        except RejectedError as error:
            self.failures[image.image_id] = str(error)
        failed = image.image_id in self.failures
        log.debug("%s: %s", image.path, self.failures.get(image.image_id, "described"))
        if embed or failed:
            self._progress.image_done(failed)


def as_labelled(image: LabelledImage) -> PreparedImage | str:
    """The picture that was identified, or why it is not there any more."""
    try:
        picture = utils.prepare_image(image.path)
    except RejectedError as error:
        return str(error)
    if picture.view_id != image.view_id:
        return "changed while the run went on: run again"
    return picture


def estimate(
    stamps: Sequence[float],
    servers: Sequence[VlmServer],
    open_images: int,
    to_ask: int,
    slots: int,
) -> str:
    """The expected duration by the wall clock of the few answers just measured.

    The first answers about an image wait for its encoding; the others do not.
    """
    measured = len(stamps) - 1
    if not measured:
        return "estimate: nothing is left to ask"
    gaps = np.sort(np.diff(stamps))[::-1] * slots
    first, others = gaps[:slots], gaps[slots:]
    each = float(np.mean(others if others.size else first))
    extra = max(0.0, float(np.mean(first)) - each)
    vlm_s = (to_ask * each + open_images * extra) / slots
    embed_s = sum(s.embedding_s for s in servers) / len(servers) / measured * to_ask
    overlap = all(server.facts.both_loaded for server in servers)
    both = max(vlm_s, embed_s) if overlap else vlm_s + embed_s
    end = datetime.now().astimezone() + timedelta(seconds=both)
    return (
        f"estimate: {to_ask} descriptions of {open_images} images take about "
        f"{timedelta(seconds=round(both))}, until {end:%Y-%m-%d %H:%M} if started now "
        f"(measured on {measured}; {each / slots:.2f} s each, "
        f"{extra / slots:.2f} s more per image)"
    )


def announce(
    cfg: Config,
    servers: Sequence[VlmServer],
    images: Sequence[LabelledImage],
    book: AnswerBook,
) -> None:
    """Say what will be done, with what, and what would make it faster."""
    per_class = Counter(image.label for image in images)
    classes = ", ".join(f"{label} {count}" for label, count in per_class.items())
    log.info("images: %d (%s)", len(images), classes)
    facts = book.facts
    for server in servers:
        log.info("Ollama %s at %s", server.version, server.url)
    log.info(
        "describes: %s (%.12s), %.0f %% on the GPU · embeds: %s (%.12s), %d numbers",
        *(cfg.vlm, facts.vlm_digest, 100 * facts.gpu_share),
        *(cfg.embed_model, facts.embedder_digest, facts.probe.size),
    )
    for note in book.notes:
        log.warning("note: %s", note)
    for hint in _hints(cfg, facts):
        log.info("hint: %s", hint)


def _hints(cfg: Config, facts: ServerFacts) -> Iterator[str]:
    if not facts.both_loaded and cfg.vlm != cfg.embed_model:
        yield (
            "the server doesn't keep both models in memory, so all embeddings come "
            "last; OLLAMA_MAX_LOADED_MODELS=2 on the server lets them overlap"
        )
    if 0 < facts.gpu_share < 1:
        yield "the VLM lies partly on the CPU: free memory of the GPU for it"
    if facts.gpu_share == 1 and cfg.server_parallel == 1:
        yield (
            "a GPU can describe several images at once: start the server with "
            "OLLAMA_NUM_PARALLEL=4 and add --server-parallel 4"
        )


# --- The dataset --------------------------------------------------------------------


@dataclass
class Quality:
    """Per prompt: answers, and how many were cut, repeated or asked anew.

    "repeated" counts answers that another image got in the same words, in whatever
    order: a prompt that the VLM answers without looking.
    """

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    _texts: dict[str, Counter[int]] = field(default_factory=dict)

    def add(
        self, question: Question, attempts: Sequence[Answer], chosen: Answer
    ) -> None:
        """Count one row."""
        count = self.counts.setdefault(question.prompt, Counter())
        count["answers"] += 1
        count[chosen.problem or "whole"] += 1
        count["asked_anew"] += len(attempts) - 1
        words = hash(frozenset(chosen.text.lower().split()))
        self._texts.setdefault(question.prompt, Counter())[words] += 1

    def as_dict(self) -> dict[str, dict[str, int]]:
        """For the manifest."""
        for prompt, same in self._texts.items():
            repeated = sum(n for n in same.values() if n > 1)
            self.counts[prompt]["repeated"] = repeated
        return {prompt: dict(count) for prompt, count in self.counts.items()}


def write_dataset(
    images: Sequence[LabelledImage], book: AnswerBook, cfg: Config
) -> dict[str, Any]:
    """Write all but the manifest in one pass; memory holds one image's rows at a time.

    Returns
    -------
    dict
        The manifest.
    """
    folder, quality = cfg.folder("dataset_dir"), Quality()
    labels = [i.label for i in images for _ in questions_for(i.label, cfg)]
    shape = (len(labels), book.facts.probe.size)
    image_lines = []
    with ExitStack() as files:
        x = files.enter_context(utils.atomic_write(folder / config.DATASET_X))
        table = files.enter_context(utils.atomic_write(folder / config.DATASET_ROWS))
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(x, header)
        text = utils.csv_text(table)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(ROW_COLUMNS)
        row = 0
        for image in images:
            answers = book.of(image)
            file = image.path.relative_to(cfg.folder("labelled_dir")).as_posix()
            used = []
            for question in questions_for(image.label, cfg):
                attempts = answers.attempts(question)
                chosen = utils.chosen_answer(attempts)
                assert chosen is not None  # the images are complete
                vector = answers.vector(chosen.text)
                assert vector is not None
                x.write(vector.astype("<f4").tobytes())
                seed = question.seed(image.image_id, attempts.index(chosen))
                writer.writerow(
                    (
                        *(row, image.image_id, file, image.label),
                        *(question.prompt_set, question.index, question.prompt),
                        *(seed, chosen.text),
                    )
                )
                quality.add(question, attempts, chosen)
                used.append(chosen)
                row += 1
            image_lines.append(image_line(image, file, used))
        text.detach()
    with utils.atomic_write(folder / config.DATASET_Y) as y:
        np.save(y, np.array(labels))
    with utils.atomic_write(folder / config.DATASET_PIXELS) as pixels:
        np.save(pixels, np.array([image.statistics for image in images]))
    utils.write_csv(folder / config.DATASET_IMAGES, IMAGE_COLUMNS, image_lines)
    return manifest(images, shape, quality, book, cfg)


def image_line(
    image: LabelledImage, file: str, used: Sequence[Answer]
) -> dict[str, object]:
    """The line of one image in dataset_imagenes.csv."""
    times = sorted(filter(None, (str(a.record.get("time") or "") for a in used)))
    versions = {str(a.record.get("server_version") or "") for a in used} - {""}
    return {
        **{"image_id": image.image_id, "file": file, "class": image.label},
        **image.header,
        "first_answer": times[0] if times else "",
        "last_answer": times[-1] if times else "",
        "server_versions": " ".join(sorted(versions)),
    }


def manifest(
    images: Sequence[LabelledImage],
    shape: tuple[int, int],
    quality: Quality,
    book: AnswerBook,
    cfg: Config,
) -> dict[str, Any]:
    """With what the folder was made, for phase 3 and for the record."""
    folder = cfg.folder("dataset_dir")
    files = (config.DATASET_X, config.DATASET_Y, config.DATASET_PIXELS)
    lists = (config.DATASET_ROWS, config.DATASET_IMAGES)
    return {
        "program_version": config.PROGRAM_VERSION,
        "libraries": {name: version(name) for name in LIBRARIES},
        "ollama_version": book.facts.version,
        "conditions": utils.conditions(cfg, book.facts),
        "prompts": {name: list(p) for name, p in config.PROMPT_SETS.items()},
        "descriptions": cfg.descriptions,
        "generic_share": cfg.generic_share,
        "counts": {
            "images": len(images),
            "rows": shape[0],
            "features": shape[1],
            "images_per_class": dict(Counter(i.label for i in images)),
        },
        "quality_per_prompt": quality.as_dict(),
        "probe_vector": utils.pack_vector(book.facts.probe),
        "sha256": {name: utils.sha256_of(folder / name) for name in (*files, *lists)},
    }


def summary(folder: Path, made: Mapping[str, Any], rejections: Rejections) -> str:
    """The last lines of a run: what was written, what is missing, what comes next."""
    counts = made["counts"]
    classes = ", ".join(f"{k} {v}" for k, v in counts["images_per_class"].items())
    lines = [
        f"dataset: {counts['images']} images ({classes}), {counts['rows']} rows of "
        f"{counts['features']} numbers in {folder}"
    ]
    problems: Counter[str] = Counter()
    for prompt_counts in made["quality_per_prompt"].values():
        problems.update(prompt_counts)
    lines.append(
        "answers: "
        + ", ".join(
            f"{problems[name]} {name.replace('_', ' ')}"
            for name in ("whole", "cut", "repeated", "asked_anew")
        )
    )
    lines += weak_prompts(made["quality_per_prompt"])
    if rejections.rows:
        listed = folder / config.REJECTED_LIST
        lines.append(f"left out: {len(rejections.rows)} files, listed in {listed}")
    lines.append("next: python fase3_entrenamiento_svc.py")
    return "\n".join(lines)


def weak_prompts(quality: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """The prompts with which the VLM can do little: most answers cut or repeated."""
    for prompt, count in quality.items():
        bad = max(count.get("cut", 0), count.get("repeated", 0))
        if bad > count["answers"] / 2:
            yield f"{bad} of {count['answers']} cut or repeated: {prompt}"


# --- The phase ----------------------------------------------------------------------


def run(cfg: Config) -> int:
    """Scan, ask, embed, write; 0 when every image is in the dataset, else 1."""
    folder, journal = (
        cfg.folder("dataset_dir"),
        cfg.folder("dataset_dir") / config.JOURNAL_DIR,
    )
    if warning := utils.distance_warning(cfg):
        log.warning("warning: %s", warning)
    rejections, failures = Rejections(), dict[str, str]()
    paths = labelled_files(cfg.folder("labelled_dir"), rejections)
    servers: list[VlmServer] = []
    held = f"another run of phase 2 works on {folder}: wait for it to end"
    with utils.lock(folder / ".fase2.lock", held):
        journal.mkdir(exist_ok=True)
        if cfg.finished_only:
            images, book = finished(paths, cfg, rejections)
        else:
            images, book, failures, servers = utils.run_async(
                interview(paths, cfg, rejections)
            )
        if cfg.estimate:
            return utils.EXIT_DONE
        complete = [image for image in images if not any(open_work(image, book, cfg))]
        done = {image.image_id for image in complete}
        for image in images:
            if image.image_id not in done:
                reason = failures.get(image.image_id, "has not all its descriptions")
                rejections.add(image.path, reason, failed=not cfg.finished_only)
        (folder / config.MANIFEST).unlink(missing_ok=True)
        utils.write_csv(
            folder / config.REJECTED_LIST, ("file", "reason"), rejections.rows
        )
        if not complete:
            raise PipelineError(
                "no image has all its descriptions: see "
                f"{folder / config.REJECTED_LIST}"
            )
        made = write_dataset(complete, book, cfg)
        if cfg.finished_only:
            made["finished_only"] = {"images": len(complete), "labelled": len(images)}
        utils.write_json(folder / config.MANIFEST, made)
    print(*utils.work_done(servers), summary(folder, made, rejections), sep="\n")
    return utils.EXIT_SOME_FAILED if rejections.failed else utils.EXIT_DONE


def finished(
    paths: Sequence[Path], cfg: Config, rejections: Rejections
) -> tuple[list[LabelledImage], AnswerBook]:
    """What --finished-only goes by: the journal alone."""
    journal = cfg.folder("dataset_dir") / config.JOURNAL_DIR
    images = identify(paths, cfg, rejections)
    book = AnswerBook(journal, cfg, last_server(journal))
    warn_of_own_answers(images, book)
    unconfirmed = len(book.answers_since(book.last_pass()))
    if unconfirmed and not cfg.no_sight_test:
        log.warning("warning: no sight test has confirmed %d answers", unconfirmed)
    return images, book


def last_server(journal: Path) -> ServerFacts:
    """The server that the journal saw last, for --finished-only."""
    last = utils.Journal(journal / AnswerBook.SERVERS).get("last") or {}
    names = ("version", "vlm_digest", "embedder_digest")
    if not {*names, "probe"} <= set(last):
        raise PipelineError(
            f"{journal} holds no answer yet: run without --finished-only"
        )
    probe = utils.unpack_vector(last["probe"])
    version, vlm_digest, embedder_digest = (last[name] for name in names)
    return ServerFacts(version, vlm_digest, embedder_digest, probe)


async def interview(
    paths: Sequence[Path], cfg: Config, rejections: Rejections
) -> tuple[list[LabelledImage], AnswerBook, dict[str, str], list[VlmServer]]:
    """See to the servers, read the files, ask all that is open."""
    folder = cfg.folder("dataset_dir")
    async with utils.open_servers(cfg, log.info) as named:
        # One that isn't there shows before files are read.
        found = await utils.passing(named, lambda server: server.check_models(), cfg)
        images = identify(paths, cfg, rejections)
        warn_of_counts(images)
        servers, facts = await utils.preflight(found, cfg)
        book = AnswerBook(folder / config.JOURNAL_DIR, cfg, facts)
        announce(cfg, servers, images, book)
        warn_of_own_answers(images, book)
        if not cfg.estimate:
            # The dataset will change: until it is whole again it has no manifest.
            (folder / config.MANIFEST).unlink(missing_ok=True)
        describing = Describing(images, servers, book, cfg)
        await describing.run()
        return images, book, describing.failures, servers


def show_sight(cfg: Config) -> int:
    """Run the sight test alone and print every distance."""
    utils.run_async(utils.only_sight(cfg, log.info, print))
    return utils.EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: flags, logging, one line for what a user can mend."""
    cfg, _ = config.parse_config(2, __doc__ or "", argv)
    utils.start_logging(log, cfg)
    kept = "every answer so far is kept; the same command goes on with it"
    phase = show_sight if cfg.sight_test_only else run
    return utils.exit_code(lambda: phase(cfg), log.error, kept)


if __name__ == "__main__":
    raise SystemExit(main())
