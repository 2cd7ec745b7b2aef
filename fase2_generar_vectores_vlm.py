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

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
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
EMBED_EVERY = 20
"""Images embedded together by a server that holds one model at a time."""
PLAIN_LINE_S = 15.0
"""Where there is no terminal for a bar, a line comes at most so often."""

# --- What is labelled ---------------------------------------------------------------


@dataclass(frozen=True)
class LabelledImage:
    """One image that a person put into a class folder."""

    label: str
    path: Path
    picture: PreparedImage
    """Without its PNG: that is made again when the image is asked about."""
    statistics: NDArray[np.float32]
    """(40,), of the picture: see `utils.picture_statistics`."""

    @property
    def image_id(self) -> str:
        """SHA-256 of the decoded pixels."""
        return self.picture.image_id


@dataclass
class Rejections:
    """What is not in the dataset; `failed` counts what a person should look at."""

    rows: list[dict[str, str]] = field(default_factory=list)
    failed: int = 0

    def add(self, path: Path, reason: str, failed: bool = True) -> None:
        """Record one file."""
        self.rows.append({"file": str(path), "reason": reason})
        self.failed += failed
        log.log(logging.WARNING if failed else logging.DEBUG, "%s: %s", path, reason)


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
    folders = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    names = [name for name in folders if not name.startswith(".")]
    if problem := utils.class_name_problem(names):
        raise PipelineError(f"{folder}: {problem}")
    if not paths:
        raise PipelineError(f"{folder} holds no image in a class folder: {remedy}")
    filled = {path.relative_to(folder).parts[0] for path in paths}
    if empty := [repr(name) for name in names if name not in filled]:
        log.warning("warning: %s: no image in it", ", ".join(empty))
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
    log.info("reading %d files in %s", len(paths), folder)
    unique: dict[str, LabelledImage] = {}
    conflicts = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        read = pool.map(partial(_identified, cfg), paths)
        for path, found in zip(paths, read, strict=True):
            if isinstance(found, str):
                rejections.add(path, found)
                continue
            first = unique.setdefault(found.image_id, found)
            if first.label != found.label:
                conflicts.append(f"{first.path} and {path}")
            elif first is not found:
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


def _identified(cfg: Config, path: Path) -> LabelledImage | str:
    """One labelled image, or why it can't be used; the pictures are not kept."""
    label, *deeper = path.relative_to(cfg.folder("labelled_dir")).parts
    if not deeper:
        return "lies in no class folder"
    try:
        picture = utils.prepare_image(path)
    except RejectedError as error:
        return str(error)
    grey, folder = picture.grey, cfg.folder("dataset_dir") / config.THUMBNAIL_DIR
    thumbnail = folder / f"{picture.image_id}.jpg"
    if not thumbnail.exists():
        with utils.atomic_write(thumbnail) as file:
            file.write(utils.thumbnail(grey))
    statistics = utils.picture_statistics(grey)
    return LabelledImage(label, path, replace(picture, png=b""), statistics)


def warn(images: Sequence[LabelledImage], book: AnswerBook) -> None:
    """Say before the hours what a person should know.

    Phase 3 refuses a class of one image. A model must not learn from its own answers
    unnoticed: phase 4 records what it copies, phase 1 the labels of a saved sheet.
    """
    counts = Counter(image.label for image in images)
    if len(counts) == 1:
        log.warning("warning: one class only (%s): phase 3 needs two", *counts)
    for label, count in counts.items():
        if count == 1:
            log.warning("warning: class %s has 1 image: phase 3 needs two", label)
    unseen = 0
    for image in images:
        journal = book.of(image.picture).journal
        confirmed = (journal.get("confirmed") or {}).get("class") == image.label
        before = (journal.get("copied") or {}).get("class") == image.label  # to 1.9
        copied = before or journal.get(f"copied to {image.label}") is not None
        unseen += copied and not confirmed
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


def announce(
    cfg: Config,
    servers: Sequence[VlmServer],
    images: Sequence[LabelledImage],
    book: AnswerBook,
) -> None:
    """Say what will be done, with what, and what would make it better."""
    per_class = Counter(image.label for image in images)
    classes = ", ".join(f"{label} {count}" for label, count in per_class.items())
    log.info("images: %d (%s)", len(images), classes)
    facts = book.facts
    for server in servers:
        log.info("Ollama %s at %s", server.version, server.url)
    on_gpu = (
        "" if cfg.keep_alive == "0" else f", {100 * facts.gpu_share:.0f} % on the GPU"
    )
    log.info(
        "describes: %s (%.12s)%s · embeds: %s (%.12s), %d numbers",
        *(cfg.vlm, facts.vlm_digest, on_gpu),
        *(cfg.embed_model, facts.embedder_digest, facts.probe.size),
    )
    for note in book.notes:
        log.warning("note: %s", note)
    hints = {
        "the server doesn't keep both models in memory, so all embeddings come last; "
        "OLLAMA_MAX_LOADED_MODELS=2 on the server lets them overlap": (
            not facts.both_loaded and cfg.vlm != cfg.embed_model
        ),
        "a GPU can describe several images at once: start the server with "
        "OLLAMA_NUM_PARALLEL=4 and add --server-parallel 4": (
            facts.gpu_share == 1 and cfg.server_parallel == 1
        ),
    }
    for hint in (text for text, is_so in hints.items() if is_so):
        log.info("hint: %s", hint)


def open_images(
    images: Sequence[LabelledImage], book: AnswerBook, cfg: Config
) -> list[tuple[LabelledImage, int]]:
    """Those without all answers and vectors, and how many questions are unasked.

    First of each class, second of each …: no change in time looks like a class.
    """
    classes: dict[str, list[LabelledImage]] = {}
    for image in images:
        classes.setdefault(image.label, []).append(image)
    found = []
    for image in filter(None, chain.from_iterable(zip_longest(*classes.values()))):
        answers = book.of(image.picture)
        chosen = [answers.chosen(q) for q in questions_for(image.label, cfg)]
        if not all(
            answer and answers.vector(answer.text) is not None for answer in chosen
        ):
            found.append((image, chosen.count(None)))
    return found


class Progress:
    """A bar on a terminal, else a plain line now and then and a last one."""

    def __init__(self, images: int, done: int, to_ask: int, quiet: bool) -> None:
        self._images, self._done, self._failed = images, done, 0
        self._started = self._shown = time.monotonic()
        self._described, self._to_ask = 0, to_ask
        self._bar = tqdm(
            total=to_ask,
            unit="answer",
            disable=True if quiet else None,
            dynamic_ncols=True,
        )

    def answered(self, answer: Answer) -> None:
        """One answer came back, usable or not."""
        self._described += answer.usable
        self._bar.update(answer.usable)
        if time.monotonic() - self._shown >= PLAIN_LINE_S:
            self._say()

    def image_done(self, failed: bool) -> None:
        """One image is complete, or given up for this run."""
        self._done += not failed
        self._failed += failed
        self._bar.set_postfix_str(
            f"images {self._done}/{self._images}, {self._failed} failed"
        )

    def _say(self) -> None:
        if not self._bar.disable:
            return
        self._shown = time.monotonic()
        each = (self._shown - self._started) / max(self._described, 1)
        left = timedelta(seconds=round((self._to_ask - self._described) * each))
        log.info(
            "images %d/%d · descriptions %d/%d · failed %d · %.2f s each · %s left",
            *(self._done, self._images, self._described, self._to_ask, self._failed),
            *(each, left),
        )

    def close(self) -> None:
        """End the bar, or say the last line."""
        self._bar.close()
        self._say()


async def describe(
    images: Sequence[LabelledImage],
    servers: Sequence[VlmServer],
    book: AnswerBook,
    cfg: Config,
) -> dict[str, str]:
    """Ask and embed all that is open.

    Where the server can't hold both models at once, EMBED_EVERY images are embedded
    together: else each would have one model loaded and the other dropped, twice.

    Returns
    -------
    dict of str
        By image id, why an image could not be described.
    """
    slots, failures = utils.slots_of(cfg, servers), dict[str, str]()
    sight = None if cfg.no_sight_test else utils.SightTest(slots, book)
    todo = open_images(images, book, cfg)
    if sight and (todo or book.unconfirmed()):
        await sight.run(cfg.any_host)
        todo = open_images(images, book, cfg)
    # The dataset will change: until it is whole again it has no manifest.
    (cfg.folder("dataset_dir") / config.MANIFEST).unlink(missing_ok=True)
    to_ask = sum(unasked for _, unasked in todo)
    in_all = sum(len(questions_for(image.label, cfg)) for image in images)
    log.info("answers: %d in the journal, %d to ask", in_all - to_ask, to_ask)
    progress = Progress(len(images), len(images) - len(todo), to_ask, cfg.quiet)

    async def work(
        image: LabelledImage, seen: PreparedImage | str, turn: Turn, embed: bool
    ) -> None:
        answers, asked = book.of(image.picture), questions_for(image.label, cfg)
        told = progress.answered
        try:
            if isinstance(seen, str):
                raise RejectedError(seen)
            await utils.ask(seen, asked, answers, turn, embed=embed, told=told)
        except RejectedError as error:
            failures[image.image_id] = str(error)
        failed = image.image_id in failures
        log.debug("%s: %s", image.path, failures.get(image.image_id, "described"))
        if embed or failed:
            progress.image_done(failed)

    between = sight.when_due if sight else None
    try:
        with logging_redirect_tqdm():
            for some, embed in turns(todo, book.facts.both_loaded):
                good = [one for one in some if one.image_id not in failures]
                step = partial(work, embed=embed)
                await utils.image_by_image(good, as_labelled, step, slots, between)
    finally:
        progress.close()
    if sight:
        await sight.when_due(answers=1)
        log.info("sight tests: %.0f s", sight.seconds)
    return failures


def turns(
    todo: Sequence[tuple[LabelledImage, int]], both_loaded: bool
) -> Iterator[tuple[list[LabelledImage], bool]]:
    """Which images are asked about next, and whether they are embedded."""
    size = max(1, len(todo) if both_loaded else EMBED_EVERY)
    for start in range(0, len(todo), size):
        some = [image for image, _ in todo[start : start + size]]
        yield from ((some, embed) for embed in sorted({both_loaded, True}))


def as_labelled(image: LabelledImage) -> PreparedImage | str:
    """The picture that was identified, or why it is not there any more."""
    try:
        picture = utils.prepare_image(image.path)
    except RejectedError as error:
        return str(error)
    if picture.view_id != image.picture.view_id:
        return "changed while the run went on: run again"
    return picture


async def estimate(
    images: Sequence[LabelledImage],
    servers: Sequence[VlmServer],
    book: AnswerBook,
    cfg: Config,
) -> str:
    """Ask a few open questions as ever; how long will all that are open take?

    By the wall clock: the first answer about an image waits for its encoding, the
    others do not. Embeddings, a small part, are left out.
    """
    todo = [(image, n) for image, n in open_images(images, book, cfg) if n]
    if not todo:
        return "estimate: nothing is left to ask"
    slots, clocks = utils.slots_of(cfg, servers), list[list[float]]()

    async def work(image: LabelledImage, seen: PreparedImage | str, turn: Turn) -> None:
        answers, clock = book.of(image.picture), [time.monotonic()]
        asked = [q for q in questions_for(image.label, cfg) if not answers.chosen(q)]
        clocks.append(clock)
        with suppress(RejectedError):  # the run will list it
            if not isinstance(seen, str):
                await utils.ask(
                    *(seen, asked[:ESTIMATE_QUESTIONS], answers, turn),
                    told=lambda _: clock.append(time.monotonic()),
                )

    some = [image for image, _ in todo[: len(slots)]]
    await utils.image_by_image(some, as_labelled, work, slots)
    gaps = [np.diff(clock) for clock in clocks if len(clock) > 1]
    if not gaps:
        raise PipelineError(
            "no open image could be asked about: see its reason in a run"
        )
    first = float(np.mean([gap[0] for gap in gaps]))
    others = np.concatenate([gap[1:] for gap in gaps])
    each = float(np.mean(others)) if others.size else first
    extra, to_ask = max(0.0, first - each), sum(n for _, n in todo)
    took = timedelta(seconds=round((to_ask * each + len(todo) * extra) / len(slots)))
    return (
        f"estimate: {to_ask} descriptions of {len(todo)} images take about {took}, "
        f"until {datetime.now().astimezone() + took:%Y-%m-%d %H:%M} if started now "
        f"(measured on {sum(map(len, gaps))}; {each / len(slots):.2f} s each, "
        f"{extra / len(slots):.2f} s more per image)"
    )


# --- The dataset --------------------------------------------------------------------


def write_dataset(
    images: Sequence[LabelledImage], book: AnswerBook, cfg: Config
) -> dict[str, Any]:
    """Write all but the manifest in one pass; memory holds one image's rows at a time.

    Returns
    -------
    dict
        The manifest.
    """
    folder, quality = cfg.folder("dataset_dir"), dict[str, Counter[str]]()
    same_words: Counter[tuple[str, int]] = Counter()
    labels = [i.label for i in images for _ in questions_for(i.label, cfg)]
    shape = (len(labels), book.facts.probe.size)
    image_lines, row = list[dict[str, object]](), 0
    with ExitStack() as files:
        x = files.enter_context(utils.atomic_write(folder / config.DATASET_X))
        table = files.enter_context(utils.atomic_write(folder / config.DATASET_ROWS))
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(x, header)
        write_row = utils.csv_writer(table, ROW_COLUMNS)
        for image in images:
            answers, asked = book.of(image.picture), questions_for(image.label, cfg)
            file = image.path.relative_to(cfg.folder("labelled_dir")).as_posix()
            x.write(answers.rows(asked).astype("<f4").tobytes())
            used = []
            for question in asked:
                attempts = answers.attempts(question)
                chosen = utils.chosen_answer(attempts)
                assert chosen is not None  # the images are complete
                seed = question.seed(image.image_id, attempts.index(chosen))
                cells = (
                    *(row, image.image_id, file, image.label),
                    *(question.prompt_set, question.index, question.prompt),
                    *(seed, chosen.text),
                )
                write_row(dict(zip(ROW_COLUMNS, cells, strict=True)))
                tally = quality.setdefault(question.prompt, Counter())
                tally["answers"] += 1
                tally[chosen.problem or "whole"] += 1
                tally["asked_anew"] += len(attempts) - 1
                words = frozenset(chosen.text.lower().split())
                same_words[question.prompt, hash(words)] += 1
                used.append(chosen)
                row += 1
            image_lines.append(image_line(image, file, used))
    with utils.atomic_write(folder / config.DATASET_Y) as y:
        np.save(y, np.array(labels))
    with utils.atomic_write(folder / config.DATASET_PIXELS) as pixels:
        np.save(pixels, np.array([image.statistics for image in images]))
    utils.write_csv(folder / config.DATASET_IMAGES, IMAGE_COLUMNS, image_lines)
    for (prompt, _), times in same_words.items():
        # In the same words, in whatever order, about several images: without looking.
        quality[prompt]["repeated"] += times if times > 1 else 0
    tested = book.last_pass
    late = [one for one in image_lines if str(one["last_answer"]) > tested]
    return manifest(images, shape, quality, book, cfg) | {"unconfirmed": len(late)}


def image_line(
    image: LabelledImage, file: str, used: Sequence[Answer]
) -> dict[str, object]:
    """The line of one image in dataset_imagenes.csv."""
    times = sorted(filter(None, (str(a.record.get("time") or "") for a in used)))
    versions = {str(a.record.get("server_version") or "") for a in used} - {""}
    return {
        **{"image_id": image.image_id, "file": file, "class": image.label},
        **image.picture.header,
        "first_answer": times[0] if times else "",
        "last_answer": times[-1] if times else "",
        "server_versions": " ".join(sorted(versions)),
    }


def manifest(
    images: Sequence[LabelledImage],
    shape: tuple[int, int],
    quality: Mapping[str, Mapping[str, int]],
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
        "quality_per_prompt": {
            prompt: dict(tally) for prompt, tally in quality.items()
        },
        "probe_vector": utils.pack_vector(book.facts.probe),
        "sha256": {name: utils.sha256_of(folder / name) for name in (*files, *lists)},
    }


def summary(folder: Path, made: Mapping[str, Any], left_out: int) -> Iterator[str]:
    """The last lines of a run: what was written, what is missing, what comes next."""
    counts, quality = made["counts"], made["quality_per_prompt"]
    classes = ", ".join(f"{k} {v}" for k, v in counts["images_per_class"].items())
    yield (
        f"dataset: {counts['images']} images ({classes}), {counts['rows']} rows of "
        f"{counts['features']} numbers in {folder}"
    )
    in_all = sum(map(Counter, quality.values()), Counter[str]())
    yield (
        f"answers: {in_all['whole']} whole, {in_all['cut']} cut, "
        f"{in_all['repeated']} repeated, {in_all['asked_anew']} asked anew"
    )
    for prompt, tally in quality.items():  # with some the VLM can do little
        bad = max(tally.get("cut", 0), tally.get("repeated", 0))
        if bad > tally["answers"] / 2:
            yield f"{bad} of {tally['answers']} cut or repeated: {prompt}"
    if left_out:
        listed = folder / config.REJECTED_LIST
        yield f"left out: {left_out} files, listed in {listed}"
    yield "next: python fase3_entrenamiento_svc.py"


# --- The phase ----------------------------------------------------------------------


def run(cfg: Config) -> int:
    """Scan, ask, embed, write; 0 when every image is in the dataset, else 1."""
    folder, rejections = cfg.folder("dataset_dir"), Rejections()
    if warning := utils.distance_warning(cfg):
        log.warning("warning: %s", warning)
    paths = labelled_files(cfg.folder("labelled_dir"), rejections)
    held = f"another run of phase 2 works on {folder}: wait for it to end"
    with utils.lock(folder / ".fase2.lock", held):
        (folder / config.JOURNAL_DIR).mkdir(exist_ok=True)
        if cfg.finished_only:
            images, book = finished(paths, cfg, rejections)
            failures, said = dict[str, str](), list[str]()
        else:
            ask = interview(paths, cfg, rejections)
            images, book, failures, said = utils.run_async(ask)
        if cfg.estimate:
            print(*said)
            return utils.EXIT_DONE
        left = {image.image_id for image, _ in open_images(images, book, cfg)}
        complete = [image for image in images if image.image_id not in left]
        if cfg.finished_only and not complete:
            raise PipelineError(
                f"no image has all its {cfg.descriptions} descriptions, embedded as by "
                "the last server: nothing is changed; see --descriptions, or run "
                "without --finished-only, which asks only what is open"
            )
        for image in (image for image in images if image.image_id in left):
            why = failures.get(image.image_id, "has not all its descriptions")
            rejections.add(image.path, why, failed=not cfg.finished_only)
        (folder / config.MANIFEST).unlink(missing_ok=True)
        listed = folder / config.REJECTED_LIST
        utils.write_csv(listed, ("file", "reason"), rejections.rows)
        if not complete:
            raise PipelineError(f"no image has all its descriptions: see {listed}")
        made = write_dataset(complete, book, cfg)
        if cfg.finished_only:
            made["finished_only"] = {"images": len(complete), "labelled": len(images)}
            said.append(
                f"{len(complete)} of {len(images)} labelled images are complete"
            )
        utils.write_json(folder / config.MANIFEST, made)
    print(*said, *summary(folder, made, len(rejections.rows)), sep="\n")
    return utils.EXIT_SOME_FAILED if rejections.failed else utils.EXIT_DONE


def finished(
    paths: Sequence[Path], cfg: Config, rejections: Rejections
) -> tuple[list[LabelledImage], AnswerBook]:
    """What --finished-only goes by: the journal alone, and the server it saw last."""
    journal = cfg.folder("dataset_dir") / config.JOURNAL_DIR
    servers = utils.Journal(journal / AnswerBook.SERVERS)
    asked = {"vlm": cfg.vlm, "embedder": cfg.embed_model}
    last = servers.get(utils.last_of(asked)) or servers.get("last") or {}
    names = ("version", "vlm_digest", "embedder_digest")
    if not {*names, "probe"} <= set(last):
        raise PipelineError(
            f"{journal / AnswerBook.SERVERS} names no server yet: run without "
            "--finished-only, which asks only what is open"
        )
    if cfg.estimate:
        raise PipelineError("--finished-only asks nothing: leave out --estimate")
    named = {k: utils.plain_name(last.get(k, name)) for k, name in asked.items()}
    if named != asked:
        raise PipelineError(
            f"the journal's last answers are by {' and '.join(named.values())}: name "
            "these with --vlm and --embed-model"
        )
    images, probe = identify(paths, cfg, rejections), utils.unpack_vector(last["probe"])
    facts = ServerFacts(**{name: last[name] for name in names}, probe=probe)
    book = AnswerBook(journal, cfg, facts)
    warn(images, book)
    if not cfg.no_sight_test and (unconfirmed := sum(book.unconfirmed())):
        log.warning("warning: no sight test has confirmed %d answers", unconfirmed)
    return images, book


async def interview(
    paths: Sequence[Path], cfg: Config, rejections: Rejections
) -> tuple[list[LabelledImage], AnswerBook, dict[str, str], list[str]]:
    """See to the servers, read the files, ask all that is open.

    Returns
    -------
    The images, the answers, why an image has not all of them (by its id), and what is
    to be said: the estimate, or what each of several servers did.
    """
    folder = cfg.folder("dataset_dir")
    async with utils.open_servers(cfg, log.info) as named:
        servers, facts = await utils.preflight(named, cfg)
        images = identify(paths, cfg, rejections)
        book = AnswerBook(folder / config.JOURNAL_DIR, cfg, facts)
        announce(cfg, servers, images, book)
        warn(images, book)
        if cfg.estimate:
            return images, book, {}, [await estimate(images, servers, book, cfg)]
        failures = await describe(images, servers, book, cfg)
        return images, book, failures, [*utils.work_done(servers)]


def show_sight(cfg: Config) -> int:
    """Run the sight test alone and print every distance."""
    utils.run_async(utils.only_sight(cfg, log.info, print))
    return utils.EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: flags, logging, one line for what a user can mend."""
    cfg, _ = config.parse_config(2, __doc__ or "", argv)
    utils.start_logging(log, cfg)
    kept = "answers that came are kept; the same command asks only the rest"
    phase = show_sight if cfg.sight_test_only else run
    return utils.exit_code(lambda: phase(cfg), log.error, kept)


if __name__ == "__main__":
    raise SystemExit(main())
