"""Phase 1: decompress every DICOM image and put the images in the order of exposure.

Reads   input_dicom/          any files, any depth, any name; never changed
Writes  f1_descomprimidos/
          *.dcm               one Explicit VR Little Endian file per image
          manifiesto.csv      one line per image, in chronological order
          rechazados.csv      what was left out, and why
          vista_previa.html   the images, to look at, to mark and to give classes to
        datos_etiquetados/    an empty folder per class, if it is not there

Files and folders whose name begins with a dot are passed over in silence: systems and
editors leave them behind, such as the ._ files of macOS.

Files are named after the acquisition: a file browser shows them in order. The pixels
are exactly those of the compressed file, and so is all of the header that
decompression need not change. A second run does only what is missing, and knows the
files that were moved to datos_etiquetados/ in the meantime.

    python fase1_descompresion.py
    python fase1_descompresion.py --base /data/qc --jobs 8
    python fase1_descompresion.py --labels etiquetas.csv    moves what was marked
"""

import os
import signal

if __name__ == "__main__":
    # Nothing here multiplies matrices: threads for that cost a tenth of a second.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # No traceback while libraries load.
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import csv
import faulthandler
import gc
import hashlib
import io
import itertools
import logging
import math
import multiprocessing
import re
import shutil
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property, partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pebble import ProcessExpired, ProcessFuture, ProcessPool
from pydicom.charset import default_encoding
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomIO
from pydicom.filereader import read_sequence_item
from pydicom.filewriter import dcmwrite, write_dataset
from pydicom.tag import BaseTag
from pydicom.uid import UID, ExplicitVRLittleEndian
from tqdm import tqdm

import config
import utils
from config import Config
from utils import PIXEL_DATA, PipelineError, RejectedError

log = logging.getLogger("fase1")

COLUMNS = (
    *("order", "source", "output", "timestamp", "time_source", "sop_instance_uid"),
    *("transfer_syntax", "modality", "manufacturer", "detector", "kvp", "mas"),
    *("exposure_index", "rows", "columns", "bits", "frames", "decoder"),
    *("presentation_intent", "notes"),
)
REJECTED_COLUMNS = ("source", "reason", "modality", "sop_class", "series_description")

NO_DATE = "sin_fecha"
"""Stands for the timestamp of an image without any date; sorts after every date."""

STATE, LOCK = ".fase1.jsonl", ".fase1.lock"
"""What was done, so that the next run need not open a file to know it; who does it."""

TEMPORARY = ".fase1-*.tmp"
SAVE_SECONDS = 1.0
PLAIN_LINE_S = 15.0
"""Where there is no terminal for a bar, a line comes at most so often."""
MAX_WARNINGS = 10
PATIENCE_MB = 16
"""So many decoded megabytes earn a file once more the time-out."""

PENDING = 32
"""Files per worker that may wait for an earlier one that takes long."""

IMPLEMENTATION_UID = "2.25.302418470214713250418632510948250124117"
IMPLEMENTATION_NAME = "DICOM_QC_FASE1"
SHARED_UID = "several images have one SOPInstanceUID"

# --- The order of exposure: PS3.5 6.2, DA, TM and DT --------------------------------

SOURCES = ("Acquisition", "Content", "Series", "Study", "InstanceCreation")
BEGINNINGS = ("SeriesDate/Time", "StudyDate/Time")
"""A series or study has one time for all its images: any other tells more."""

DATE_FORM = re.compile(r"(\d{4})([.]?)(\d\d)\2(\d\d)")
TIME_FORM = re.compile(r"(\d\d)(?::?(\d\d)(?::?(\d\d)(?:\.(\d*))?)?)?")
DATETIME_FORM = re.compile(r"(\d{4}(?:\d\d){0,2})([\d.]*)([+-]\d{4})?")
IN_UTC = ", in UTC"


class Stamp(NamedTuple):
    """What one attribute, or a pair of them, says of the moment of exposure."""

    name: str
    day: datetime | None
    clock: timedelta | None
    offset: timedelta | None
    """From UTC."""


def moment_of(get: Callable[[str], Any]) -> tuple[str, str]:
    """The moment of exposure by the best attributes of a header, and which they are.

    The first attribute with a valid date gives the day, and the time as well if it is
    the exposure's. Else the first time of that day, or without a date, decides; without
    one the day begins. Moments with a known offset from UTC are given in UTC. The text
    is YYYYMMDDTHHMMSS.ffffff, or NO_DATE.
    """
    stamps = list(stamps_of(lambda keyword: str(get(keyword) or "")))
    first = next((one for one in stamps if one.day), None)
    if first is None or first.day is None:
        return NO_DATE, ""
    stamps.sort(key=lambda one: (one.name in BEGINNINGS, one is not first))
    moment, used = first.day, f"{first.name}, no valid time"
    for one in stamps:
        day = first.day if one.day is None and one.name not in BEGINNINGS else one.day
        if one.clock is None or day != first.day:
            continue
        with suppress(OverflowError):  # out of the calendar
            moment = first.day + one.clock - (one.offset or timedelta(0))
            used = first.name if one is first else f"{first.name} + time of {one.name}"
            used += "" if one.offset is None else IN_UTC
            break
    return f"{moment.year:04d}{moment:%m%dT%H%M%S.%f}", used


def stamps_of(get: Callable[[str], str]) -> Iterator[Stamp]:
    """The attributes that tell of the moment, the best first.

    AcquisitionDateTime may be anything from YYYY to YYYYMMDDHHMMSS.FFFFFF&ZZXX.
    """
    zone, whole = get("TimezoneOffsetFromUTC"), get("AcquisitionDateTime")
    match = DATETIME_FORM.fullmatch(whole)
    day, clock, own = match.groups("") if match else (whole[:8], "", "")
    # Of a shorter one, the year or month began.
    stamp = stamp_of("AcquisitionDateTime", f"{day}0101"[:8], clock, own or zone)
    if len(day) == 8:
        yield stamp
    for name in SOURCES:
        pair = get(f"{name}Date"), get(f"{name}Time")
        yield stamp_of(f"{name}Date/Time", *pair, zone)
    if len(day) < 8:
        yield stamp  # any whole date tells more than a year or a month


def stamp_of(name: str, day: str, clock: str, offset: str) -> Stamp:
    """One attribute, or a pair; 00010101 means no date, and its midnight no time."""
    date, time = parse_date(day), parse_time(clock)
    if date == datetime.min:
        date, time = None, time or None
    return Stamp(name, date, time, parse_offset(offset))


def parse_date(text: str) -> datetime | None:
    """DA: YYYYMMDD, or YYYY.MM.DD of the ACR-NEMA days."""
    match = DATE_FORM.fullmatch(text.strip())
    try:
        return datetime(int(match[1]), int(match[3]), int(match[4])) if match else None
    except ValueError:
        return None


def parse_time(text: str) -> timedelta | None:
    """TM: HH, HHMM, HHMMSS, HHMMSS.F to .FFFFFF, or HH:MM:SS; 60 is a leap second."""
    match = TIME_FORM.fullmatch(text.strip())
    if not match:
        return None
    hours, minutes, seconds = (int(match[part] or 0) for part in (1, 2, 3))
    if hours > 23 or minutes > 59 or seconds > 60:
        return None
    micros = int(f"{match[4] or '':0<6}"[:6])
    return timedelta(hours=hours, minutes=minutes, seconds=seconds, microseconds=micros)


def parse_offset(text: str) -> timedelta | None:
    """&ZZXX, from -1200 to +1400."""
    match = re.fullmatch(r"([+-])(\d\d)(\d\d)", text.strip())
    if not match or not -1200 <= int(match[0]) <= 1400:
        return None
    offset = timedelta(hours=int(match[2]), minutes=int(match[3]))
    return -offset if match[1] == "-" else offset


# --- The header in Explicit VR Little Endian: PS3.5 section 7 -----------------------
# Elements are written as they were read, without being parsed: a value that pydicom
# has looked at is written as pydicom understands it.

OFFSET_TABLES = (0x7FE00001, 0x7FE00002, 0x7FE00003)
PIXELS = b"\xe0\x7f\x10\0"
WORDS = {
    **dict.fromkeys(("AT", "OW", "SS", "US"), 2),
    **dict.fromkeys(("FL", "OF", "OL", "SL", "UL"), 4),
    **dict.fromkeys(("FD", "OD", "OV", "SV", "UV"), 8),
}
"""Bytes that big endian values have in another order."""
BINARY = (*WORDS, "OB", "UI", "UN")
"""What is padded with a zero, not a space."""


def raw_elements(dataset: Dataset) -> list[Any]:
    """Its elements before anything is parsed of them; without group lengths (7.2).

    RawDataElement, or DataElement where a sequence has no length.
    """
    tags = [tag for tag in dataset.keys() if tag.element]  # noqa: SIM118 - would parse
    return [dataset.get_item(tag, keep_deferred=True) for tag in tags]


def explicit(elements: Iterable[Any], signed: bool, notes: list[str]) -> Dataset:
    """A dataset for `dcmwrite`, in Explicit VR Little Endian; values keep their bytes.

    `signed`, the PixelRepresentation, decides what "US or SS" means (PS3.5 A.1).
    Compressed icons are left out: an uncompressed file can't hold them.
    """
    made: dict[BaseTag, Any] = {}
    for one in elements:
        tag, value, is_raw = one.tag, one.value or b"", isinstance(one, RawDataElement)
        vr = one.VR or implicit_vr(tag, signed)
        if is_raw and one.length not in (len(value), utils.UNDEFINED_LENGTH):
            there = f"{one.length} bytes, {len(value)} are there"
            raise RejectedError(f"is truncated: in a sequence {tag} says {there}")
        is_plain = is_raw and one.VR and not one.is_implicit_VR and one.is_little_endian
        if vr == "SQ" and not (is_plain and PIXELS not in value):
            inner = []
            items: Any = items_of(one) if is_raw else value or ()
            for item in items:
                raw = raw_elements(item)  # before one of them is parsed
                said = utils.text(item, "PixelRepresentation")
                inner.append(explicit(raw, said == "1" if said else signed, notes))
            made[tag] = DataElement(tag, "SQ", inner)
        elif tag == PIXEL_DATA and one.length == utils.UNDEFINED_LENGTH:
            notes.append("a compressed icon was left out")
        else:
            if not one.is_little_endian and (size := WORDS.get(vr)):
                whole = len(value) // size * size  # a torn last one stays as it is
                words = np.frombuffer(value[:whole], f"u{size}").byteswap()
                value = words.tobytes() + value[whole:]
            if len(value) % 2:  # PS3.5 7.1.1
                notes.append(f"{tag} had an odd length")
                value += b"\0" if vr in BINARY else b" "
            made[tag] = RawDataElement(tag, vr, one.length, value, 0, False, True)
    dataset = Dataset(made)
    # As if read in this encoding: else pydicom would parse what it writes.
    dataset.set_original_encoding(False, True, dataset._character_set)
    return dataset


def items_of(one: RawDataElement) -> Iterator[Dataset]:
    """The items of a sequence of known length, which must fill it (PS3.5 7.5).

    pydicom takes anything for an item, and one that is longer than the sequence.
    """
    value, order = one.value or b"", "<" if one.is_little_endian else ">"
    file = io.BytesIO(value)
    while head := file.read(8):
        group, element, length = struct.unpack(f"{order}HHL", head.ljust(8, b"\0"))
        is_item = (group, element) == (utils.ITEM_GROUP, 0xE000)
        is_open, end = length == utils.UNDEFINED_LENGTH, file.tell() + length
        if not is_item or not (is_open or end <= len(value)):
            raise RejectedError(f"is damaged: {one.tag} holds what is no item")
        file.seek(-8, os.SEEK_CUR)
        item = read_sequence_item(
            *(file, one.is_implicit_VR, one.is_little_endian, default_encoding)
        )
        assert item is not None  # it began as one
        yield item


def implicit_vr(tag: int, signed: bool) -> str:
    """VR of an element that has none written; UN is always right for private ones."""
    if tag >> 16 & 1:
        return "LO" if 0x10 <= tag & 0xFFFF <= 0xFF else "UN"
    try:
        vr = dictionary_VR(tag)  # it knows repeating groups, too
    except KeyError:
        return "UN"
    if vr == "US or SS":
        return "SS" if signed else "US"
    return vr.rsplit(" ", 1)[-1]


def file_meta(dataset: Dataset, notes: list[str]) -> FileMetaDataset:
    """The file meta group (PS3.10 7.1), by the dataset; who sent the file is kept."""
    old, meta = dataset.file_meta, FileMetaDataset()
    meta.FileMetaInformationGroupLength = 0  # pydicom counts
    meta.FileMetaInformationVersion = b"\0\1"
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        ours = utils.text(dataset, keyword)
        theirs = utils.text(old, f"MediaStorage{keyword}")
        if ours and ours != theirs and "had no file meta group" not in notes:
            what = "another" if theirs else "no"
            notes.append(f"its file meta group had {what} {keyword}")
        setattr(meta, f"MediaStorage{keyword}", UID(ours or theirs))
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_NAME
    for tag in (0x00020016, 0x00020017, 0x00020018):
        if tag in old:
            meta[tag] = old[tag]
    return meta


# --- One file: read, decode, write --------------------------------------------------

Facts = tuple[int, int, int]
"""Size, and times of the last change of content and of the directory entry, in ns.

An archive may give all its files one time and exposures have one size; the last time
can't be given by anybody.
"""


@dataclass(frozen=True)
class Task:
    """One file to convert."""

    source: Path
    temporary: Path
    limit_mb: int
    timeout_s: float = 60.0
    facts: Facts = (-1, -1, -1)
    """Before it is read: a later change is seen next time."""


@dataclass
class Outcome:
    """What became of a file; what a worker process sends back."""

    reason: str = ""
    """Why it was left out; empty when its output stands under the temporary name."""
    may_pass: bool = False
    """The reason may be gone the next time: the file is tried again."""
    disk_failed: bool = False
    """The output can't be written: no reason to go on."""
    identity: str = ""
    """SOPInstanceUID, or the digest of the stored values where there is none."""
    name: str = ""
    record: dict[str, str] = field(default_factory=dict)
    """For the lists: of a file that was left out, what it is."""
    thumbnail: bytes = b""


class _DiskError(Exception):
    """The output can't be written."""


def convert(task: Task) -> Outcome:
    """Decode one file into a temporary file beside its destination."""
    outcome = Outcome()
    try:
        _convert(task, outcome)
    except RejectedError as error:
        outcome.reason = str(error)
    except MemoryError:
        outcome.reason, outcome.may_pass = "needs more memory than there is", True
    except _DiskError as error:
        outcome.reason, outcome.disk_failed = str(error), True
    except OSError as error:
        why = error.strerror or str(error)  # pydicom's have no number
        outcome.reason, outcome.may_pass = f"can't be read: {why}", bool(error.errno)
        if sys.platform == "win32" and len(str(task.source)) > 259:
            outcome.reason += " (its path is longer than 259 characters)"
    except Exception as error:  # each decoder raises errors of its own
        outcome.reason = f"can't be decoded: {type(error).__name__}: {error}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    return outcome


def _convert(task: Task, outcome: Outcome) -> None:
    give_up_after(task.timeout_s, task.facts[0])
    try:
        dataset = utils.read_dicom(task.source, task.limit_mb)
    except RejectedError as error:
        if read := error.dataset:
            outcome.record = kind_of(read, utils.text(read, "SOPClassUID"))
        raise
    elements, notes = raw_elements(dataset), dataset.notes
    meta = file_meta(dataset, notes)
    kind = outcome.record = kind_of(dataset, meta.MediaStorageSOPClassUID)
    if PIXEL_DATA not in dataset:
        raise RejectedError(
            f"holds no image ({kind['modality'] or kind['sop_class'] or 'no modality'})"
            + "".join(f"; {note}" for note in notes)
        )
    give_up_after(task.timeout_s, utils.native_size(utils.pixel_layout(dataset)))
    pixels = utils.decode(dataset, task.limit_mb)
    with suppress(Exception):  # what can't be shown is an image all the same
        outcome.thumbnail = utils.preview(pixels, dataset)
    gone = (PIXEL_DATA, *OFFSET_TABLES)
    kept = [one for one in elements if one.tag not in gone]
    kept = [one for one in kept if one.tag.group not in pixels.overlays]
    header = explicit(kept, pixels.layout.PixelRepresentation == 1, notes)
    for element in utils.corrections(pixels.layout, dataset):
        header[element.tag] = element
    header.file_meta, header.preamble = meta, b"\0" * 128
    try:
        write(task.temporary, header, pixels.values)
    except OSError as error:
        raise _DiskError(error.strerror or error) from None
    if notes:
        read_back(task.temporary, pixels)
    uid = clean(meta.MediaStorageSOPInstanceUID)
    outcome.identity = uid or f"values:{utils.digest_of(pixels.values)}"
    outcome.record = record_of(dataset, pixels, uid)
    outcome.name = output_name(outcome.record, outcome.identity)


def kind_of(dataset: Dataset, sop_class: str) -> dict[str, str]:
    """What the list of the files that were left out says of one."""
    return {
        "modality": clean(utils.text(dataset, "Modality")),
        "sop_class": clean(UID(sop_class).name),
        "series_description": clean(utils.text(dataset, "SeriesDescription")),
    }


def write(path: Path, header: Dataset, values: Any) -> None:
    """Write the file; the pixels go to the disk from where they are."""
    after = header[PIXEL_DATA:]
    del header[PIXEL_DATA:]
    size = values.nbytes + values.nbytes % 2
    vr = b"OB" if values.itemsize == 1 else b"OW"
    with path.open("wb") as file:
        dcmwrite(file, header)
        file.write(struct.pack("<HH2sHL", 0x7FE0, 0x0010, vr, 0, size))
        file.write(np.ascontiguousarray(values).data.cast("B"))
        file.write(b"\0" * (values.nbytes % 2))
        write_dataset(DicomIO(file), after)
        file.flush()
        os.fsync(file.fileno())


def read_back(path: Path, pixels: utils.Pixels) -> None:
    """See that a header that had to be mended can be read, and says the same."""
    dataset = utils.read_dicom(path)
    layout, size = utils.pixel_layout(dataset), len(dataset[PIXEL_DATA].value)
    if dataset.notes or layout != pixels.layout or size - pixels.values.nbytes > 1:
        raise RejectedError("is so damaged that what is written of it can't be read")


def record_of(dataset: Dataset, pixels: utils.Pixels, uid: str) -> dict[str, str]:
    """What the manifest says of an image."""
    get, layout = partial(utils.text, dataset), pixels.layout

    def number(keyword: str, per: float = 1, digits: int = 6) -> str:
        value = utils.number(get(keyword))
        return "" if value is None else f"{value / per:.{digits}g}"

    timestamp, time_source = moment_of(get)
    record = {
        "timestamp": timestamp,
        "time_source": time_source,
        "sop_instance_uid": uid,
        "transfer_syntax": dataset.file_meta.TransferSyntaxUID.name,
        "modality": get("Modality"),
        "manufacturer": get("Manufacturer"),
        "detector": get("DetectorID"),
        "kvp": number("KVP"),
        # Exposure holds whole mAs only: 1.7 stands as 1.
        "mas": number("ExposureInuAs", 1000) or number("Exposure"),
        "exposure_index": number("ExposureIndex"),
        "rows": layout.Rows,
        "columns": layout.Columns,
        "bits": layout.BitsStored,
        "frames": layout.NumberOfFrames,
        "decoder": f"imagecodecs, {pixels.codec}" if pixels.codec else "none needed",
        "presentation_intent": get("PresentationIntentType"),
        "notes": "; ".join(dict.fromkeys(dataset.notes)),
        "instance": number("InstanceNumber", digits=12),
    }
    return {key: clean(value) for key, value in record.items()}


def clean(text: object) -> str:
    """DICOM text fit for a terminal and a table: one line of 500 characters."""
    line = "".join(one if one.isprintable() else " " for one in str(text)).strip()
    return line[:500]


def output_name(record: Mapping[str, str], identity: str) -> str:
    """Name that sorts as the list does, is safe everywhere, and is never another's."""
    labels = {"detector": "", "kvp": "KVP", "mas": "mAs", "exposure_index": "IE"}
    parts = [label + record[key] for key, label in labels.items() if record[key]]
    if record["instance"].isdecimal():
        digits = f"{int(record['instance']):05d}"
        parts.insert(0, "z" * (len(digits) - 5) + digits)  # 100000 after 99999
    digest = hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:12]
    safe = [re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-.")[:40] for part in parts]
    safe = [*filter(None, safe), digest]
    if not record["instance"].isdecimal() and safe[0].startswith("0"):
        safe[0] = f"zzz{safe[0]}"  # it would stand among the numbers
    return "_".join([record["timestamp"], *safe]) + ".dcm"


def content_digest(path: Path) -> str:
    """SHA-256 of a file of ours from the end of its file meta group on."""
    with path.open("rb") as file:
        start = file.read(144)
        (length,) = struct.unpack("<L", start[140:144]) if len(start) == 144 else (0,)
        file.seek(144 + length)
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Workers: decoders may crash or hang, and take only their process with them -----


def convert_all(
    tasks: Sequence[Task], jobs: int, do: Callable[[Task], Outcome] = convert
) -> Generator[tuple[Task, Outcome], None, None]:
    """Convert every file in worker processes; the outcomes come in the tasks' order.

    A worker that crashes or hangs costs the file that it had, and is replaced.
    """
    if not tasks:
        return
    count, rest = min(jobs, len(tasks)), iter(tasks)
    waiting: deque[tuple[Task, ProcessFuture[Outcome]]] = deque()
    pool = start_pool(count)
    try:
        while True:
            for task in itertools.islice(rest, PENDING * count - len(waiting)):
                waiting.append((task, pool.schedule(do, (task,))))
            if not waiting:
                return
            task, future = waiting.popleft()
            try:
                while wait({future}, timeout=0.5).not_done:
                    pass  # in one long wait Windows does not hear Ctrl-C
                outcome = future.result()
            except ProcessExpired as end:
                reason = f"the decoder crashed on it (exit code {end.exitcode})"
                if end.exitcode == 1:  # of faulthandler
                    reason = f"it took more than {task.timeout_s:g} s and its share"
                    reason = f"given up: {reason}"
                outcome = Outcome(reason, may_pass=True)
            yield task, outcome
    finally:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


def start_pool(count: int) -> ProcessPool:
    """Workers that never hear Ctrl-C: ending them is their parent's business.

    Where the system can fork, one process loads this program for all of them.
    """
    if sys.platform == "win32":
        import ctypes  # noqa: PLC0415 - nothing else needs it

        ignore = ctypes.windll.kernel32.SetConsoleCtrlHandler  # children inherit it
        ignore(None, True)
        try:
            pool = ProcessPool(count, initializer=start_worker)
            pool.schedule(os.getpid)  # starts the processes
        finally:
            ignore(None, False)
        return pool
    environment, heard = dict(os.environ), os.dup(2)
    # It would look in the current folder first, whose files may have any name.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        silence(2)  # a worker that is ended while it starts says so
        with utils.interrupts_later():
            forkserver.set_forkserver_preload([Path(__file__).stem])
            forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.dup2(heard, 2)
        os.close(heard)
    context: Any = multiprocessing.get_context("forkserver")
    return ProcessPool(count, initializer=start_worker, context=context)


def start_worker() -> None:
    """What a worker does first. Its decoders may shout: nobody listens."""
    silence(1, 2)

    def end_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()


def silence(*streams: int) -> None:
    """Let nobody hear what this process says there, or one that it starts."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)


def give_up_after(timeout_s: float, size: float) -> None:
    """End this process if it is not told otherwise in time, whatever a decoder does."""
    seconds = timeout_s * (1 + size / (PATIENCE_MB << 20))
    faulthandler.dump_traceback_later(seconds, exit=True)


# --- What was done before -----------------------------------------------------------


class Known:
    """What the journal and the folders say of sources, outputs and labelled files.

    The journal has a record "source/PATH" per file of the input (its facts, and the
    name of its output, or the reason why there is none and the `knobs` under which that
    reason holds) and "output/NAME" per output (identity, source, manifest record, and
    whether an older version wrote it).
    """

    def __init__(self, cfg: Config) -> None:
        self.source_dir = cfg.folder("input_dir")
        self.folder = cfg.folder("decompressed_dir")
        self.labelled_dir = cfg.folder("labelled_dir")
        self.counts: Counter[str] = Counter()
        self.knobs = f"{config.PROGRAM_VERSION} {cfg.max_image_mb}"
        self.journal = utils.Journal(self.folder / STATE, SAVE_SECONDS)
        self.outputs: dict[str, dict[str, Any]] = {}
        self.rejected: dict[str, dict[str, Any]] = {}
        """Of this run, by source."""
        self.places: dict[str, Path] = {}
        """The file that holds the image of an output now; none where it is lost."""
        self.files: dict[str, list[Path]] = {}
        """Files that are there, labelled ones first, by their identity."""
        self.differing: list[str] = []
        """Of this run: images that a labelled file holds with other stored values."""
        for path in self.folder.glob(TEMPORARY):  # what a killed run left unfinished
            utils.remove_file(path)
        for key, one in self.journal.items():
            if key.startswith("output/") and {"identity", "source", "record"} <= {*one}:
                self.outputs[key.removeprefix("output/")] = one
        self._read_folders()

    def _read_folders(self) -> None:
        """Find the outputs: by name, or labelled as the only one of their identity."""
        for path in utils.find_files(self.labelled_dir, self._not_labelled):
            try:
                self.files.setdefault(identity_of(path), []).append(path)
            except OSError as error:
                self._not_labelled(path, f"can't be read: {error.strerror}")
        labelled = [path for paths in self.files.values() for path in paths]
        self.labelled = {path.name: path for path in reversed(labelled)}
        here = {path.name: path for path in self.folder.glob("*.dcm")}
        count = Counter(one["identity"] for one in self.outputs.values())
        for name, one in self.outputs.items():
            found = [here.get(name), self.labelled.get(name)]
            if count[one["identity"]] == 1:
                found += self.files.get(one["identity"], ())
            if place := next(filter(None, found), None):
                self.places[name] = place
        for name in sorted(here):  # also of an older version, or without a record
            known = self.outputs.get(name)
            identity = known["identity"] if known else identity_of(here[name])
            self.files.setdefault(identity, []).append(here[name])

    def _not_labelled(self, path: Path, reason: str) -> None:
        """Images that are there unseen would be written a second time."""
        if path.exists() and not path.is_symlink():  # else somebody is labelling
            raise PipelineError(f"{path}: {reason}: phase 1 must see what is labelled")
        log.warning("warning: %s: %s; it doesn't count as labelled", path, reason)

    def key(self, source: Path) -> str:
        """What a file of the input is called in the journal and the lists."""
        if source.parent == self.folder:  # an output whose original is gone
            return f"{self.folder.name}/{source.name}"
        return source.as_posix().removeprefix(f"{self.source_dir.as_posix()}/")

    def is_done(self, source: Path, facts: Facts) -> bool:
        """Whether an unchanged file was settled before, and its output is there."""
        key = self.key(source)
        known = self.journal.get(f"source/{key}") or {}
        if known.get("facts") != [*facts]:
            return False
        if known.get("reason") and known.get("knobs") == self.knobs:
            self.rejected[key] = known
        elif known.get("output") not in self.places:
            return False
        self.counts["rejected" if key in self.rejected else "known"] += 1
        return True

    def reject(self, source: Path, reason: str, **more: Any) -> None:
        """Record why a file has no output; without `knobs` it is tried again."""
        log.debug("%s: %s", clean(source), reason)
        self.counts["rejected"] += 1
        key, default = self.key(source), {"facts": [-1] * 3, "knobs": "", "record": {}}
        self.rejected[key] = default | {"reason": clean(reason)} | more
        self.add(f"source/{key}", **self.rejected[key])

    def add(self, key: str, **record: Any) -> None:
        """Keep a record, if it is news."""
        if self.journal.get(key) != record:
            self.journal.add({"key": key, **record})


def identity_of(path: Path) -> str:
    """What `Outcome.identity` was for a file that phase 1 wrote."""
    with path.open("rb") as file:
        head = file.read(1 << 12)
    if head[128:132] != b"DICM":
        return ""
    at = head.find(b"\2\0\3\0UI", 132)
    (length,) = struct.unpack_from("<H", head, at + 6) if at > 0 else (0,)
    uid = clean(head[at + 8 : at + 8 + length].decode("latin-1").strip("\0 "))
    return uid if at > 0 and uid else f"values:{values_digest(path)}"


# --- The place of an image ----------------------------------------------------------


def settle(known: Known, task: Task, outcome: Outcome) -> None:
    """Give a converted file its final name, unless its image is there already."""
    if outcome.reason:
        utils.remove_file(task.temporary)
        if outcome.disk_failed:
            raise PipelineError(
                f"{known.folder} can't be written: {outcome.reason}: free some space"
                " or choose another folder, then run the same command again"
            )
        knobs = "" if outcome.may_pass else known.knobs
        more = {"facts": [*task.facts], "knobs": knobs, "record": outcome.record}
        known.reject(task.source, outcome.reason, **more)
        return
    kind, name, held = place(known, task, outcome)
    # The list says "complete": it goes before the first change.
    utils.remove_file(known.folder / config.FILE_LIST)
    files = known.files.setdefault(outcome.identity, [])
    if kind == "written":
        known.differing += [
            f"{name} differs in its stored values from {path} of the same "
            "SOPInstanceUID, which an older version wrote or somebody has changed: "
            "perhaps it should stand in that file's place"
            for path in files
            if not is_of_now(known, path)
        ][:1]
    known.places[name] = held
    if kind in ("written", "renamed"):
        known.places[name] = known.folder / name
        utils.replace_file(held, known.places[name])
        files[:] = [*(path for path in files if path != held), known.places[name]]
    utils.remove_file(task.temporary)
    known.counts["kept" if task.source.parent == known.folder else kind] += 1
    if outcome.thumbnail:
        thumbnail(known, name, outcome.thumbnail)
    key = known.key(task.source)
    if kind == "written" or name not in known.outputs:
        known.outputs[name] = {
            **{"identity": outcome.identity, "source": key},
            **{"record": outcome.record, "adopted": kind == "renamed"},
            "program": config.PROGRAM_VERSION,
        }
        known.add(f"output/{name}", **known.outputs[name])
    known.add(f"source/{key}", facts=[*task.facts], output=name)


def place(known: Known, task: Task, outcome: Outcome) -> tuple[str, str, Path]:
    """What becomes of an image, its name, and the file that holds it now.

    Of a labelled file, and of one that an older version wrote, stored values are
    enough: a person may have edited its header, and headers were written otherwise.
    """
    stem = outcome.name.removesuffix(".dcm")
    others = (f"{stem}_{count}.dcm" for count in itertools.count(2))
    free = next(
        name
        for name in itertools.chain([outcome.name], others)
        if name not in known.labelled and not (known.folder / name).exists()
    )

    # First those that no other file of the input has been found to be.
    files = known.files.get(outcome.identity, ())
    for path in sorted(files, key=lambda path: path.name in known.outputs):
        is_same = same_content if is_of_now(known, path) else same_values
        if not path.exists() or not is_same(path, task.temporary):
            continue
        if path.parent != known.folder:
            return "labelled", name_of_labelled(known, path, task, outcome), path
        if path.name in known.outputs:
            return "duplicate", path.name, path
        return "renamed", path.name if path.name.startswith(stem) else free, path
    return "written", free, task.temporary


def is_of_now(known: Known, path: Path) -> bool:
    """Whether this version wrote a file, so that all of it can be compared."""
    record = known.outputs.get(path.name) or {}
    is_own = record.get("program") == config.PROGRAM_VERSION
    return is_own and path.parent == known.folder and not record.get("adopted")


def name_of_labelled(known: Known, path: Path, task: Task, outcome: Outcome) -> str:
    """The output that was moved to `path`, and perhaps renamed."""
    own = known.journal.get(f"source/{known.key(task.source)}") or {}
    lost = [
        name
        for name, one in known.outputs.items()
        if one["identity"] == outcome.identity and known.places.get(name, path) == path
    ]
    candidates = [path.name, own.get("output"), *lost]
    return next((name for name in candidates if name in lost), path.name)


def same_content(path: Path, other: Path) -> bool:
    """Whether two files of ours hold the same dataset."""
    sizes = path.stat().st_size, other.stat().st_size
    return sizes[0] == sizes[1] and content_digest(path) == content_digest(other)


def values_digest(path: Path) -> str:
    """SHA-256 of the stored values of all frames; empty where there are none."""
    try:
        return utils.digest_of(utils.decode(utils.read_dicom(path)).values)
    except Exception:  # each decoder raises errors of its own
        return ""


def same_values(path: Path, other: Path) -> bool:
    """Whether two files hold the same stored values, whatever their headers say."""
    return values_digest(path) == values_digest(other) != ""


# --- The lists ----------------------------------------------------------------------


def write_lists(known: Known) -> None:
    """Write rechazados.csv and manifiesto.csv, unless nothing has changed."""
    lost = [name for name in known.outputs if name not in known.places]
    if lost:
        utils.remove_file(known.folder / config.FILE_LIST)
        known.journal.add({"taken_back": [f"output/{name}" for name in lost]})
    for name in lost:
        del known.outputs[name]
    path = known.folder / config.REJECTED_LIST
    utils.write_csv(path, REJECTED_COLUMNS, rejected(known))
    path = known.folder / config.FILE_LIST
    if not path.exists():
        utils.write_csv(path, COLUMNS, manifest(known))


def rejected(known: Known) -> Iterator[dict[str, str]]:
    """Files of this run that have no output, and why."""
    for key in sorted(known.rejected, key=os.fsencode):
        one = known.rejected[key]
        record = one.get("record") or {}
        yield {"source": utils.shown_path(key), "reason": one["reason"], **record}


def manifest(known: Known) -> Iterator[dict[str, str]]:
    """The images in the order of exposure: timestamp, InstanceNumber, name."""

    def rank(name: str) -> tuple[str, float, str]:
        record = known.outputs[name]["record"]
        number = record["instance"]
        rank = int(number) if number.isdecimal() else math.inf
        return record["timestamp"], rank, name

    copies: dict[str, list[str]] = {}
    for key, one in sorted(known.journal.items()):
        if key.startswith("source/") and one.get("output"):
            copies.setdefault(one["output"], []).append(key.removeprefix("source/"))
    shared = Counter(one["identity"] for one in known.outputs.values())
    for order, name in enumerate(sorted(known.outputs, key=rank), 1):
        one = known.outputs[name]
        record = one["record"]
        others = (path for path in copies.get(name, ()) if path != one["source"])
        notes = [f"the same image as {utils.shown_path(path)}" for path in others]
        if shared[one["identity"]] > 1 and record["sop_instance_uid"]:
            notes.append(SHARED_UID)
        yield {
            **{key: record.get(key, "") for key in COLUMNS},
            "order": str(order),
            "source": utils.shown_path(one["source"]),
            "output": name,
            "notes": "; ".join(filter(None, [record["notes"], *notes])),
        }


def warnings(known: Known) -> Iterator[str]:
    """What a person should know about the order and the images."""
    records = [one["record"] for one in known.outputs.values()]
    uids = Counter(filter(None, (one["sop_instance_uid"] for one in records)))
    if shared := sum(count > 1 for count in uids.values()):
        yield f"{SHARED_UID}, with another content: {shared} times, all were kept"
    dated = [one for one in records if one["timestamp"] != NO_DATE]
    if undated := len(records) - len(dated):
        yield f"{undated} images have no date: they stand last"
    moments = Counter(
        (one["timestamp"], one["instance"], one["detector"]) for one in dated
    )
    if ties := sum(count for count in moments.values() if count > 1):
        yield f"{ties} images share their moment with others: nothing orders them"
    local = sum(not one["time_source"].endswith(IN_UTC) for one in dated)
    if 0 < local < len(dated):
        in_utc = len(dated) - local
        yield f"{in_utc} times are in UTC and {local} local: they can't be compared"
    sources = Counter(one["time_source"].removesuffix(IN_UTC) for one in dated)
    if len(sources) > 1:
        shown = ", ".join(f"{count} {name}" for name, count in sources.most_common())
        yield f"the images were ordered by different attributes: {shown}"
    kinds: dict[tuple[str, str], Counter[str]] = {}
    for one in records:
        moment = kinds.setdefault((one["timestamp"], one["detector"]), Counter())
        moment[one["presentation_intent"]] += 1
    raw, shown = "FOR PROCESSING", "FOR PRESENTATION"
    if both := [one for one in kinds.values() if one[raw] and one[shown]]:
        counts = [sum(one[kind] for one in both) for kind in (raw, shown)]
        yield (
            f"{len(both)} exposures are there twice: {counts[0]} images {raw} and "
            f"{counts[1]} {shown}: quality control needs {raw}"
        )


# --- The contact sheet --------------------------------------------------------------


def write_sheet(known: Known) -> None:
    """Write the page of all images, unless they and their classes are the same."""
    path, digest = known.folder / config.SHEET, hashlib.sha256(known.knobs.encode())
    digest.update((known.folder / config.FILE_LIST).read_bytes())
    digest.update(repr([class_of(known, name) for name in known.outputs]).encode())
    about = {"about": digest.hexdigest()}
    pages = utils.page_paths(path, len(known.outputs))
    if known.journal.get("sheet") == about and all(page.exists() for page in pages):
        return
    tiles = [tile(row, class_of(known, row["output"])) for row in manifest(known)]
    pictures: dict[str, bytes] = {}
    for one in tiles:
        with suppress(Exception):  # of an output that somebody has damaged
            pictures[one.name] = thumbnail(known, one.name)
    sheet = utils.Sheet(
        title=str(known.folder),
        folder=str(known.folder.resolve()),
        tiles=tiles,
        pictures=pictures,
        classes=config.CLASS_NAMES,
        sections=[utils.Section("", [utils.HOW_TO_MARK])],
        order="in order of exposure",
    )
    utils.page(path, sheet)
    known.add("sheet", **about)


def class_of(known: Known, name: str) -> str | None:
    """The class folder in which an output lies, at any depth; None: in no folder."""
    path = known.places[name]
    if path.parent == known.folder:
        return None
    label, *file = path.parts[len(known.labelled_dir.parts) :]
    return label if file else ""


def tile(row: Mapping[str, str], label: str | None) -> utils.Tile:
    """One line of the manifest as an image of the sheet, under its day and detector."""
    day, time = "no date", ""
    if row["timestamp"] != NO_DATE:
        moment = datetime.strptime(row["timestamp"], "%Y%m%dT%H%M%S.%f")
        day, time = f"{moment:%Y-%m-%d}", f"{moment:%H:%M:%S}"
    units = {"kvp": "{} kVp", "mas": "{} mAs", "exposure_index": "index {}"}
    shown = [form.format(row[key]) for key, form in units.items() if row[key]]
    return utils.Tile(
        name=row["output"],
        picture=row["output"],
        file=row["output"] if label is None else "",
        group=f"{day} · {row['detector'] or 'no detector named'}",
        label=label or "",
        lines=[
            " · ".join(filter(None, [time, *shown])),
            f"{row['detector']} {row['rows']} × {row['columns']}".strip(),
            "" if label is None else "labelled",
            row["notes"],
        ],
    )


def thumbnail(known: Known, name: str, jpeg: bytes = b"") -> bytes:
    """Keep the thumbnail of an output, or read it; made anew if gone or damaged."""
    path = known.folder / config.SHEET_THUMBNAILS / f"{name}.jpg"
    jpeg = jpeg or (path.read_bytes() if path.is_file() else b"")
    if not jpeg.startswith(b"\xff\xd8"):
        dataset = utils.read_dicom(known.places[name])
        jpeg = utils.preview(utils.decode(dataset), dataset)
    utils.write_file(path, jpeg)
    return jpeg


# --- Labels from a saved page -------------------------------------------------------


def place_labels(cfg: Config) -> int:
    """Do what the saved lists say, and say what was done; returns the exit code.

    A file of phase 1's is moved, one with an absolute path copied. What is not clear
    stays where it is, and is listed.
    """
    labels, done = Labels(cfg), Counter[str]()
    listed = (row for path in cfg.labels for row in read_labels(path))
    rows = [(labels.own_name(file), label) for file, label in listed]
    lines = Counter(file for file, _ in rows)
    for file, label in dict.fromkeys(rows):
        try:
            if lines[file] > 1:
                raise RejectedError(f"stands in {lines[file]} lines")
            print(labels.place(file, label))
            done[label] += 1
        except (RejectedError, OSError) as error:  # a name may be too long
            done[""] += 1
            log.warning("left: %s, %s: %s", clean(file), clean(label), error)
    placed = ", ".join(f"{name} {count}" for name, count in done.items() if name)
    print(f"{'would be ' * cfg.dry_run}labelled: {placed or 'nothing'}")
    if done[""]:
        log.warning("%d lines were left, see above", done[""])
    return utils.EXIT_SOME_FAILED if done[""] else utils.EXIT_DONE


def read_labels(path: Path) -> list[tuple[str, str]]:
    """File and class of every line of a list that a page saved."""
    try:
        rows = utils.read_csv(path)
    except (OSError, ValueError, csv.Error) as error:
        raise PipelineError(
            f"{path} can't be read: {error}: name the list where your browser saved it"
        ) from None
    if not rows or not all({"file", "class"} <= {*row} for row in rows):
        raise PipelineError(
            f"{path} is not a list that a page saved, or an empty one: its first line "
            "must be file,class, with a comma (a Spanish Excel saves a semicolon)"
        )
    return [(row["file"] or "", row["class"] or "") for row in rows]


class Labels:
    """Moves and copies into the class folders."""

    def __init__(self, cfg: Config) -> None:
        self._cfg, self._folder = cfg, cfg.folder("labelled_dir")
        self._journal = utils.Journal(cfg.folder("decompressed_dir") / STATE)
        self._answers = cfg.folder("dataset_dir") / config.JOURNAL_DIR
        there = self._folder.iterdir() if self._folder.is_dir() else ()
        names = {path.name for path in there if path.is_dir()}
        self._classes = {name for name in names if not name.startswith(".")}
        self._targets: set[Path] = set()

    @cached_property
    def _ids(self) -> dict[str, Path]:
        """The labelled images by what tells equal pixels."""
        found = {}
        for path in utils.find_files(self._folder):
            with suppress(RejectedError):
                found[utils.prepare_image(path).image_id] = path
        return found

    def place(self, file: str, label: str) -> str:
        """Move or copy one file; what was done, or RejectedError why nothing was."""
        self._check_class(label)
        source, ours = self._source(file)
        target = self._folder / label / source.name
        if not source.is_file():
            phase = "1" if ours else "4 with --html"
            missing = (
                f"is not there as a file: run phase {phase}, for a page of what is"
            )
            done = f"is in {target.parent} already"
            raise RejectedError(done if target.is_file() else missing)
        image_id = "" if ours else self._new_image(source, label)
        if target.exists() or target in self._targets:
            raise RejectedError(f"{target} is there already")
        self._targets.add(target)
        self._classes.add(label)
        if image_id:
            self._ids[image_id] = target
        if self._cfg.dry_run:
            return f"would {'move' if ours else 'copy'} {clean(file)} to {label}"
        bring(source, target, move=ours)
        if image_id:
            self._confirm(image_id, label)
        elif self._answers.is_dir():  # phase 4 may have copied it into this class
            with suppress(RejectedError):
                image_id = utils.prepare_image(target).image_id
                if (self._answers / f"{image_id}.jsonl").exists():
                    self._confirm(image_id, label)
        return f"{'moved' if ours else 'copied'} {clean(file)} to {label}"

    def _check_class(self, label: str) -> None:
        if not label.strip() or re.search(r'^[.\s]|[\\/:*?"<>|]|[.\s]$', label):
            raise RejectedError(f"{label!r} can't be the name of a class folder")
        if problem := utils.class_name_problem([*self._classes, label]):
            raise RejectedError(problem)
        if (self._folder / label).is_symlink():
            raise RejectedError(f"{self._folder / label} is a link: no phase reads it")

    def own_name(self, file: str) -> str:
        """The name of a file of phase 1's, also where a page of phase 4 showed it."""
        path, own = Path(os.path.normpath(file)), self._cfg.folder("decompressed_dir")
        if not path.is_absolute():
            return file
        return path.name if path.parent == own.resolve() else str(path)

    def _source(self, file: str) -> tuple[Path, bool]:
        """The file that a line means, and whether it is phase 1's."""
        own, path = self._cfg.folder("decompressed_dir"), Path(file)
        if self._journal.get(f"output/{file}") is not None:
            return own / file, True
        if not path.is_absolute():
            raise RejectedError("is neither a file of phase 1's nor an absolute path")
        return path, False

    def _new_image(self, source: Path, label: str) -> str:
        """Id of an image that phase 4 showed, if it is not labelled yet."""
        image_id = utils.prepare_image(source).image_id
        if there := self._ids.get(image_id):
            if there.relative_to(self._folder).parts[0] == label:
                self._confirm(image_id, label)
            raise RejectedError(f"{there} holds the same pixels")
        return image_id

    def _confirm(self, image_id: str, label: str) -> None:
        """Keep for phase 2 that a person gave this class, whatever phase 4 said."""
        if self._cfg.dry_run:
            return
        self._answers.mkdir(parents=True, exist_ok=True)
        path = self._answers / f"{image_id}.jsonl"
        journal = utils.Journal(path, lock_file=self._answers / ".lock")
        journal.add({"key": "confirmed", "class": label})


def bring(source: Path, target: Path, move: bool) -> None:
    """Copy a file to a new place, or move it there, also to another disk."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if move and source.stat().st_dev == target.parent.stat().st_dev:
            source.rename(target)
            return
        with utils.atomic_write(target) as copy, source.open("rb") as original:
            shutil.copyfileobj(original, copy)
        if move:
            utils.remove_file(source)
    except OSError as error:
        raise RejectedError(f"{target} can't be written: {error.strerror}") from None


# --- The phase ----------------------------------------------------------------------


def run(cfg: Config) -> int:
    """Decompress, or place what is labelled, as the only one; returns the exit code."""
    folder = cfg.folder("decompressed_dir")
    if not cfg.labels:
        check_folders(cfg)
    elif not folder.is_dir():
        raise PipelineError(f"{folder} is missing: run phase 1 without --labels first")
    held = f"another phase 1 is at work in {folder}: wait for it to end"
    with utils.lock(folder / LOCK, held):
        return place_labels(cfg) if cfg.labels else decompress(cfg)


def decompress(cfg: Config) -> int:
    """Decompress what is new below the input folder; returns the exit code."""
    gc.disable()  # it would walk the records of 100,000 files again and again
    known = Known(cfg)
    gc.freeze()
    gc.enable()
    work_off(known, new_tasks(known, cfg), cfg)
    if not known.counts:
        raise PipelineError(f"{known.source_dir} is empty: put DICOM files into it")
    work_off(known, own_tasks(known, cfg), cfg)
    write_lists(known)
    write_sheet(known)
    report(known)
    return utils.EXIT_SOME_FAILED if known.counts["rejected"] else utils.EXIT_DONE


def work_off(known: Known, tasks: Sequence[Task], cfg: Config) -> None:
    """Convert files, and give each its place; a bar, or a line now and then, tells."""
    outcomes = convert_all(tasks, cfg.jobs or os.cpu_count() or 1)
    hidden, told = cfg.quiet or None, time.monotonic()  # None: off a terminal
    bar = tqdm(total=len(tasks), unit=" files", leave=False, disable=hidden)
    with closing(outcomes), bar:
        for done, (task, outcome) in enumerate(outcomes, 1):
            settle(known, task, outcome)
            bar.update()
            if bar.disable and (
                done == len(tasks) or time.monotonic() - told > PLAIN_LINE_S
            ):
                told = time.monotonic()
                log.info("%d of %d files", done, len(tasks))


def check_folders(cfg: Config) -> None:
    """Make what is missing; refuse a missing input, and an output inside it."""
    if cfg.dry_run:
        raise PipelineError("--dry-run shows what --labels would do: name the lists")
    source_dir, folder = cfg.folder("input_dir"), cfg.folder("decompressed_dir")
    if not source_dir.is_dir():
        raise PipelineError(f"{source_dir} is missing: put the DICOM files into it")
    real = os.path.realpath(folder)  # Path.resolve gives up on a loop of links
    if Path(real).is_relative_to(os.path.realpath(source_dir)):
        raise PipelineError(f"{folder} lies in {source_dir}: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    labelled = cfg.folder("labelled_dir")
    if not labelled.exists():
        for name in config.CLASS_NAMES:
            (labelled / name).mkdir(parents=True)


def new_tasks(known: Known, cfg: Config) -> list[Task]:
    """A task for every file that is not settled yet, in order of their names."""
    paths = utils.find_files(known.source_dir, known.reject)
    tasks = (task_for(path, known, cfg) for path in paths)
    return [task for task in tasks if not known.is_done(task.source, task.facts)]


def own_tasks(known: Known, cfg: Config) -> list[Task]:
    """A task for every output without a record, whose original is gone.

    An older version wrote it, or the journal was deleted: it stays, and is listed.
    """
    there = (path for paths in known.files.values() for path in paths)
    new = (path for path in there if path.name not in known.outputs)
    own = [path for path in new if path.parent == known.folder]
    return [task_for(path, known, cfg) for path in own]


def task_for(path: Path, known: Known, cfg: Config) -> Task:
    """What a worker must know of one file."""
    facts = -1, -1, -1
    with suppress(OSError):  # it has just gone
        found = path.stat()
        facts = found.st_size, found.st_mtime_ns, found.st_ctime_ns
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    temporary = known.folder / TEMPORARY.replace("*", name)
    return Task(path, temporary, cfg.max_image_mb, cfg.item_timeout_s, facts)


def report(known: Known) -> None:
    """Print what was done and what to do next."""
    counts, folder = known.counts, known.folder
    print(f"{counts.total() - counts['kept']} files in {known.source_dir}:")
    lines = {
        "written": f"images written to {folder} now",
        "known": "images were there before, here or labelled",
        "labelled": f"images found in {known.labelled_dir}, not written again",
        "renamed": "images that were there without a record, kept under today's names",
        "kept": f"images were in {folder} without their originals",
        "duplicate": "files hold an image that is there already",
        "rejected": f"files left out: see {folder / config.REJECTED_LIST}",
    }
    for key, text in lines.items():
        if counts[key]:
            print(f"  {counts[key]:6d} {text}")
    left_out = [f"{one['source']}: {one['reason']}" for one in rejected(known)]
    for what, told in (
        ("left out", left_out),
        ("warning", [*known.differing, *warnings(known)]),
    ):
        for line in told[:MAX_WARNINGS]:
            log.warning("%s: %s", what, line)
        if more := len(told[MAX_WARNINGS:]):
            log.warning("%s: %d more", what, more)
    kinds = Counter(one["record"]["modality"] for one in known.outputs.values())
    shown = ", ".join(f"{count} {name or '?'}" for name, count in kinds.most_common())
    file_list = folder / config.FILE_LIST
    print(f"In order of exposure: {file_list} ({shown or 'none'})")
    print(
        f"Next: open {folder / config.SHEET} in a browser and give classes, or"
        f" move the files into {known.labelled_dir}/<CLASS>/, and run"
        " python fase2_generar_vectores_vlm.py"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: flags, logging, one line for what a user can mend."""
    cfg, _ = config.parse_config(1, __doc__ or "", argv)
    utils.start_logging(log, cfg)
    return utils.exit_code(lambda: run(cfg), log.error)


if __name__ == "__main__":
    raise SystemExit(main())
