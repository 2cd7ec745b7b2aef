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

import signal

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while libraries load

import csv
import errno
import faulthandler
import filecmp
import hashlib
import io
import itertools
import logging
import math
import multiprocessing
import os
import re
import shutil
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property, partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
from pebble import ProcessExpired, ProcessFuture, ProcessPool
from PIL import Image
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomIO
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
SAVE_SECONDS, TELL_SECONDS = 1.0, 15.0
MAX_WARNINGS = 10
PATIENCE_MB = 16
"""So many decoded megabytes earn a file once more the time-out."""

PENDING = 32
"""Files per worker that may wait for an earlier one that takes long."""

HEAVY_IMPORTS = ["numpy", "pydicom", "imagecodecs", "PIL.Image", "pebble"]
"""Loaded once for all worker processes, where the system can fork."""

IMPLEMENTATION_UID = "2.25.302418470214713250418632510948250124117"
IMPLEMENTATION_NAME = "DICOM_QC_FASE1"
SHARED_UID = "several images have one SOPInstanceUID"

# --- The order of exposure: PS3.5 6.2, DA, TM and DT --------------------------------

DATE_SOURCES = ("Acquisition", "Content", "Series", "Study", "InstanceCreation")
TIME_SOURCES = ("Acquisition", "Content", "InstanceCreation", "Series", "Study")
"""A series or study has one time for all its images: any other tells more."""

DATE_FORM = re.compile(r"(\d{4})([.]?)(\d\d)\2(\d\d)")
TIME_FORM = re.compile(r"(\d\d)(?::?(\d\d)(?::?(\d\d)(?:\.(\d*))?)?)?")
DATETIME_FORM = re.compile(r"(\d{4}(?:\d\d){0,2})((?:\d\d){0,3}(?:\.\d*)?)([+-]\d{4})?")
OFFSET_FORM = re.compile(r"([+-])(\d\d)(\d\d)")
IN_UTC = ", in UTC"


def moment_of(get: Callable[[str], Any]) -> tuple[str, str]:
    """The moment of exposure by the best attributes of a header, and which they are.

    The first attribute with a valid date gives the day, and the time as well if it is
    the exposure's. Else the first time of that day, or without a date, decides; without
    one the day begins. Moments with a known offset from UTC are given in UTC. The text
    is YYYYMMDDTHHMMSS.ffffff, or NO_DATE.
    """
    moments = {one.source: one for one in _moments(get)}
    dated = [moments[name] for name in ("", *DATE_SOURCES) if moments[name].date]
    if not dated:
        return NO_DATE, ""
    first = dated[0]
    times = [moments[name] for name in ("", *TIME_SOURCES)]
    if first.source not in ("Series", "Study"):
        times.insert(0, first)
    for one in times:
        undated = one.date is None and one.source not in ("Series", "Study")
        if one.clock is None or not (undated or one.date == first.date):
            continue
        used = first.name if one is first else f"{first.name} + time of {one.name}"
        with suppress(OverflowError):  # out of the calendar
            if one.offset is None:
                return _shown(first.date + one.clock), used
            return _shown(first.date + one.clock - one.offset), used + IN_UTC
    return _shown(first.date), f"{first.name}, no valid time"


@dataclass(frozen=True)
class Moment:
    """What one attribute, or a pair of them, says."""

    source: str
    date: Any
    """datetime of the day, or None."""
    clock: timedelta | None
    offset: timedelta | None
    """From UTC."""

    @property
    def name(self) -> str:
        """For the manifest."""
        return f"{self.source}Date/Time" if self.source else "AcquisitionDateTime"


def _moments(get: Callable[[str], Any]) -> Iterator[Moment]:
    offset = parse_offset(str(get("TimezoneOffsetFromUTC") or ""))
    whole = str(get("AcquisitionDateTime") or "")
    if match := DATETIME_FORM.fullmatch(whole):
        day = match[1] + "0101"[len(match[1]) - 4 :]
        clock = parse_time(match[2]) if match[2] else None
        if not match[2] and len(match[1]) < 8:  # the year or month began
            clock = timedelta(0)
        own = parse_offset(match[3] or "")
        yield Moment("", parse_date(day), clock, offset if own is None else own)
    else:
        yield Moment("", parse_date(whole[:8]), None, None)
    for name in DATE_SOURCES:
        date = parse_date(str(get(f"{name}Date") or ""))
        clock = parse_time(str(get(f"{name}Time") or ""))
        yield Moment(name, date, clock, offset)


def _shown(moment: datetime) -> str:
    return f"{moment.year:04d}{moment:%m%dT%H%M%S.%f}"


def parse_date(text: str) -> datetime | None:
    """DA: YYYYMMDD, or YYYY.MM.DD of the ACR-NEMA days; 00010101 means none."""
    match = DATE_FORM.fullmatch(text.strip())
    try:
        date = datetime(int(match[1]), int(match[3]), int(match[4])) if match else None
    except ValueError:
        return None
    return None if date == datetime.min else date


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
    match = OFFSET_FORM.fullmatch(text.strip())
    if not match:
        return None
    offset = timedelta(hours=int(match[2]), minutes=int(match[3]))
    offset = offset if match[1] == "+" else -offset
    return offset if timedelta(hours=-12) <= offset <= timedelta(hours=14) else None


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
        is_plain = is_raw and one.VR and not one.is_implicit_VR and one.is_little_endian
        if vr == "SQ" and not (is_plain and PIXELS not in value):
            items: Any = convert_raw_data_element(one).value if is_raw else value
            inner = []
            for item in items or ():
                parts, said = (
                    raw_elements(item),
                    utils.text(item, "PixelRepresentation"),
                )
                inner.append(explicit(parts, said == "1" if said else signed, notes))
            made[tag] = DataElement(tag, "SQ", inner)
        elif tag == PIXEL_DATA and one.length == utils.UNDEFINED_LENGTH:
            notes.append("a compressed icon was left out")
        else:
            if not one.is_little_endian and (size := WORDS.get(vr)):
                whole = len(value) // size * size  # a torn last one stays as it is
                words = np.frombuffer(value[:whole], f"u{size}").byteswap()
                value = words.tobytes() + value[whole:]
            made[tag] = RawDataElement(tag, vr, one.length, value, 0, False, True)
    dataset = Dataset(made)
    # As if read in this encoding: else pydicom would parse what it writes.
    dataset.set_original_encoding(False, True, dataset._character_set)
    return dataset


def implicit_vr(tag: int, signed: bool) -> str:
    """VR of an element that has none written; UN is always right for private ones."""
    if tag >> 16 & 1:
        return "LO" if 0x10 <= tag & 0xFFFF <= 0xFF else "UN"
    vr = dictionary_VR(tag) if dictionary_has_tag(tag) else "UN"
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
        outcome.reason, outcome.may_pass = f"can't be read: {error.strerror}", True
        if sys.platform == "win32" and len(str(task.source)) > 259:
            outcome.reason += " (its path is longer than 259 characters)"
    except Exception as error:  # each decoder raises errors of its own
        outcome.reason = f"can't be decoded: {type(error).__name__}: {error}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    return outcome


def _convert(task: Task, outcome: Outcome) -> None:
    give_up_after(task.timeout_s, task.source.stat().st_size)
    dataset = utils.read_dicom(task.source, task.limit_mb)
    elements, notes = raw_elements(dataset), dataset.notes
    meta = file_meta(dataset, notes)
    kind = outcome.record = {
        "modality": clean(utils.text(dataset, "Modality")),
        "sop_class": clean(meta.MediaStorageSOPClassUID.name),
        "series_description": clean(utils.text(dataset, "SeriesDescription")),
    }
    if PIXEL_DATA not in dataset:
        raise RejectedError(
            f"holds no image ({kind['modality'] or kind['sop_class'] or 'no modality'})"
        )
    give_up_after(task.timeout_s, utils.native_size(utils.pixel_layout(dataset)))
    pixels = utils.decode(dataset, task.limit_mb)
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
    with suppress(Exception):  # what can't be shown is an image all the same
        outcome.thumbnail = utils.preview(pixels, dataset)


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

    def number(keyword: str, per: float = 1) -> str:
        value = utils.number(get(keyword))
        return "" if value is None else f"{value / per:.6g}"

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
        "instance": number("InstanceNumber"),
    }
    return {key: clean(value) for key, value in record.items()}


def clean(text: object) -> str:
    """DICOM text fit for a terminal and a spreadsheet: one line, no formula."""
    line = "".join(one if one.isprintable() else " " for one in str(text)).strip()
    return f"'{line[:500]}" if line.startswith(("=", "+", "-", "@")) else line[:500]


def output_name(record: Mapping[str, str], identity: str) -> str:
    """Name that sorts as the list does, is safe everywhere, and is never another's."""
    labels = {"detector": "", "kvp": "KVP", "mas": "mAs", "exposure_index": "IE"}
    parts = [label + record[key] for key, label in labels.items() if record[key]]
    if record["instance"].isdecimal():
        parts.insert(0, f"{int(record['instance']):05d}")
    safe = [re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-.")[:40] for part in parts]
    digest = hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:12]
    return "_".join([record["timestamp"], *filter(None, safe), digest]) + ".dcm"


def content_digest(path: Path) -> str:
    """SHA-256 of a file of ours from the end of its file meta group on."""
    with path.open("rb") as file:
        start = file.read(144)
        (length,) = struct.unpack("<L", start[140:144]) if len(start) == 144 else (0,)
        file.seek(144 + length)
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Workers: decoders may crash or hang, and take only their process with them -----


def convert_all(
    tasks: Iterator[Task], jobs: int, do: Callable[[Task], Outcome] = convert
) -> Generator[tuple[Task, Outcome], None, None]:
    """Convert every file in worker processes; the outcomes come in the tasks' order."""
    first = list(itertools.islice(tasks, jobs))
    if not first:
        return
    pending: deque[tuple[Task, ProcessFuture[Outcome]]] = deque()
    with children_without_interrupts():
        pool = ProcessPool(len(first), initializer=start_worker, context=_context())
        pool.schedule(os.getpid)  # starts the processes and their threads
    try:
        for task in itertools.chain(first, tasks):
            pending.append((task, pool.schedule(do, (task,))))
            while pending[0][1].done() or len(pending) >= PENDING * len(first):
                done, future = pending.popleft()
                yield done, outcome_of(future, done.timeout_s)
                if not pending:
                    break
        while pending:
            done, future = pending.popleft()
            yield done, outcome_of(future, done.timeout_s)
    finally:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


def outcome_of(future: "ProcessFuture[Outcome]", timeout_s: float) -> Outcome:
    """Wait for a file; a worker that died on it has been replaced."""
    while True:
        try:
            return future.result(timeout=0.5)  # else Windows would not hear Ctrl-C
        except ProcessExpired as end:
            reason = f"the decoder crashed on it (exit code {end.exitcode})"
            if end.exitcode == 1:  # of faulthandler
                reason = f"given up: it took more than {timeout_s:g} s and its share"
            return Outcome(reason, may_pass=True)
        except TimeoutError:
            continue


def give_up_after(timeout_s: float, size: float) -> None:
    """End this process if it is not told otherwise in time, whatever a decoder does."""
    seconds = timeout_s * (1 + size / (PATIENCE_MB << 20))
    faulthandler.dump_traceback_later(seconds, exit=True)


def start_worker() -> None:
    """What a worker does first. Its decoders may shout: nobody listens."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


def _context() -> Any:
    methods = multiprocessing.get_all_start_methods()
    kind = "forkserver" if "forkserver" in methods else "spawn"
    context: Any = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(HEAVY_IMPORTS)
    return context


@contextmanager
def children_without_interrupts() -> Iterator[None]:
    """Children born in here never hear Ctrl-C: ending them is their parent's business.

    Also while they start, when Python would answer with a traceback.
    """
    if sys.platform == "win32":
        import ctypes  # noqa: PLC0415 - nothing else needs it

        ignore = ctypes.windll.kernel32.SetConsoleCtrlHandler  # is inherited
        ignore(None, True)
        try:
            yield
        finally:
            ignore(None, False)
        return
    # Started by the first process, it would let interrupts through to its children.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- What was done before -----------------------------------------------------------


class State:
    """What phase 1 knows of sources, outputs and labelled files, kept in STATE.

    The journal has a record "source/PATH" per file of the input (its facts, and the
    name of its output, or the reason why there is none and the `knobs` under which that
    reason holds) and "output/NAME" per output (identity, source, manifest record).
    """

    def __init__(self, cfg: Config) -> None:
        self.source_dir = cfg.folder("input_dir")
        self.folder = cfg.folder("decompressed_dir")
        self.labelled_dir = cfg.folder("labelled_dir")
        self.counts: Counter[str] = Counter()
        self._knobs = f"{config.PROGRAM_VERSION} {cfg.max_image_mb}"
        self._journal = utils.Journal(self.folder / STATE, SAVE_SECONDS)
        self.outputs: dict[str, dict[str, Any]] = {}
        for key, one in self._journal.items():
            if key.startswith("output/") and {"identity", "source", "record"} <= {*one}:
                self.outputs[key.removeprefix("output/")] = one
        self._labelled: dict[str, list[Path]] = {}
        self._labelled_names: set[str] = set()
        self._rejected: set[str] = set()
        self._settled: set[str] = set()
        for path in self.folder.glob(TEMPORARY):  # what a killed run left unfinished
            utils.remove_file(path)
        self._read_labelled()

    # What is there

    def _read_labelled(self) -> None:
        for path in utils.find_files(self.labelled_dir, self._not_labelled):
            try:
                identity = identity_of(path)
            except FileNotFoundError:  # somebody is labelling
                continue
            except OSError as error:
                self._not_labelled(path, f"can't be read: {error.strerror}")
                continue
            self._labelled.setdefault(identity, []).append(path)
            self._labelled_names.add(path.name)

    def _not_labelled(self, path: Path, reason: str) -> None:
        """Images that are there unseen would be written a second time."""
        if not os.path.islink(path):  # noqa: PTH114 - has no error of its own
            raise PipelineError(f"{path}: {reason}: phase 1 must see what is labelled")
        log.warning("warning: %s: %s; it doesn't count as labelled", path, reason)

    @cached_property
    def _strangers(self) -> dict[str, list[Path]]:
        """Outputs without a record, by identity: of an older version, or state lost."""
        found: dict[str, list[Path]] = {}
        for path in sorted(self.folder.glob("*.dcm")):
            if path.name not in self.outputs:
                found.setdefault(identity_of(path), []).append(path)
        return found

    @cached_property
    def _of_identity(self) -> Counter[str]:
        return Counter(one["identity"] for one in self.outputs.values())

    def is_done(self, source: Path, facts: Facts) -> bool:
        """Whether an unchanged file was settled before, and its output is there."""
        key = self._key(source)
        known = self._journal.get(f"source/{key}") or {}
        if tuple(known.get("facts", ())) != facts:
            return False
        if known.get("reason"):
            if known["knobs"] != self._knobs:
                return False
            self._rejected.add(key)
        elif not self._is_there(known.get("output", "")):
            return False
        self.counts["rejected" if known.get("reason") else "known"] += 1
        return True

    def _is_there(self, name: str) -> bool:
        """In f1_descomprimidos, or labelled: by name, or as the only one of its UID."""
        if name not in self.outputs:
            return False
        identity = self.outputs[name]["identity"]
        return (
            os.path.exists(f"{self.folder}/{name}")  # noqa: PTH110 - 5 times as fast
            or name in self._labelled_names
            or name in self._settled
            or (identity in self._labelled and self._of_identity[identity] == 1)
        )

    def _key(self, source: Path) -> str:
        return source.relative_to(self.source_dir).as_posix()

    # What happens

    def reject(
        self, source: Path, reason: str, facts: Facts = (-1, -1, -1), **more: Any
    ) -> None:
        """Record why a file has no output; without `knobs` it is tried again."""
        log.debug("%s: %s", clean(source), reason)
        self.counts["rejected"] += 1
        key = self._key(source)
        self._rejected.add(key)
        more = {"knobs": "", "record": {}} | more
        self._add(f"source/{key}", facts=[*facts], reason=clean(reason), **more)

    def _add(self, key: str, **record: Any) -> None:
        if self._journal.get(key) != record:
            self._journal.add({"key": key, **record})

    def settle(self, task: Task, outcome: Outcome) -> None:
        """Give a converted file its final name, unless its image is there already."""
        if outcome.reason:
            utils.remove_file(task.temporary)
        if outcome.disk_failed:
            raise PipelineError(
                f"{self.folder} can't be written: {outcome.reason}: free some space"
                " or choose another folder, then run the same command again"
            )
        if outcome.reason:
            knobs = "" if outcome.may_pass else self._knobs
            self.reject(
                *(task.source, outcome.reason, task.facts),
                knobs=knobs,
                record=outcome.record,
            )
            return
        name, kind, old = self._place(task, outcome)
        # The list says "complete": it goes before the first change.
        utils.remove_file(self.folder / config.FILE_LIST)
        if kind in ("written", "renamed"):
            utils.replace_file(old, self.folder / name)
        if old != task.temporary:
            utils.remove_file(task.temporary)
        self.counts[kind] += 1
        self._settled.add(name)
        if outcome.thumbnail:
            self.thumbnail(name, outcome.thumbnail)
        key = self._key(task.source)
        if kind == "written" or name not in self.outputs:
            self._of_identity[outcome.identity] += name not in self.outputs
            self.outputs[name] = {
                **{"identity": outcome.identity, "source": key},
                **{"record": outcome.record, "adopted": kind == "renamed"},
            }
            self._add(f"output/{name}", **self.outputs[name])
        self._add(f"source/{key}", facts=[*task.facts], output=name)

    def _place(self, task: Task, outcome: Outcome) -> tuple[str, str, Path]:
        """Name of the image, what becomes of it, and the file that holds it now.

        Of a labelled file, and of one that an older version wrote, stored values are
        enough: a person may have edited its header, and headers were written otherwise.
        """
        new = task.temporary
        for path in self._labelled.get(outcome.identity, ()):
            if same_values(path, new):
                return self._name_of_labelled(path, task, outcome), "labelled", path
        taken, free = self._namesakes(outcome.name)
        for path in taken:
            if same_content(path, new):
                return path.name, "duplicate", path
        for path in self._strangers.get(outcome.identity, ()):
            is_free = path.name not in self.outputs and path.exists()
            if is_free and same_values(path, new):
                return path.name if path in taken else free, "renamed", path
        old = [one for one in taken if self.outputs.get(one.name, {}).get("adopted")]
        known = next((one for one in old if same_values(one, new)), new)
        if known != new:
            return known.name, "duplicate", known
        return free, "written", new

    def _namesakes(self, name: str) -> tuple[list[Path], str]:
        """Outputs that have this name, or it with a number; and one that is free."""
        taken = []
        stem = name.removesuffix(".dcm")
        others = (f"{stem}_{count}.dcm" for count in itertools.count(2))
        for one in itertools.chain([name], others):
            path = self.folder / one
            if path.exists():
                taken.append(path)
            elif one not in self._labelled_names:
                return taken, one
        raise AssertionError("unreachable: names never end")

    def _name_of_labelled(self, path: Path, task: Task, outcome: Outcome) -> str:
        """The output that was moved to `path`, and perhaps renamed."""
        own = self._journal.get(f"source/{self._key(task.source)}") or {}
        lost = [
            name
            for name, one in self.outputs.items()
            if one["identity"] == outcome.identity and not (self.folder / name).exists()
        ]
        candidates = [path.name, own.get("output", ""), *lost]
        return next((one for one in candidates if one in lost), path.name)

    # The lists

    def write_lists(self) -> None:
        """Write manifiesto.csv and rechazados.csv, unless nothing has changed."""
        gone = [name for name in self.outputs if not self._is_there(name)]
        for name in gone:
            del self.outputs[name]
        if gone:
            self._journal.add({"taken_back": [f"output/{name}" for name in gone]})
        path = self.folder / config.REJECTED_LIST
        write_if_changed(path, REJECTED_COLUMNS, self.rejected())
        path = self.folder / config.FILE_LIST
        if gone or self._settled or not path.exists():
            write_if_changed(path, COLUMNS, self._manifest())

    def rejected(self) -> Iterator[dict[str, str]]:
        """Files of this run that have no output, and why."""
        for key in sorted(self._rejected, key=os.fsencode):
            known = self._journal.get(f"source/{key}") or {}
            record = known.get("record", {})
            yield {"source": shown_path(key), "reason": known["reason"], **record}

    def _manifest(self) -> Iterator[dict[str, object]]:
        copies: dict[str, list[str]] = {}
        for key, one in sorted(self._journal.items()):
            if key.startswith("source/") and one.get("output"):
                copies.setdefault(one["output"], []).append(key.removeprefix("source/"))
        shared = Counter(one["identity"] for one in self.outputs.values())
        for order, (name, one) in enumerate(sorted(self.outputs.items(), key=rank), 1):
            notes = [one["record"]["notes"]] if one["record"]["notes"] else []
            notes += [
                f"the same image as {shown_path(source)}"
                for source in copies.get(name, ())
                if source != one["source"]
            ]
            if shared[one["identity"]] > 1 and one["record"]["sop_instance_uid"]:
                notes.append(SHARED_UID)
            yield {
                **{key: one["record"].get(key, "") for key in COLUMNS},
                "order": order,
                "source": shown_path(one["source"]),
                "output": name,
                "notes": "; ".join(notes),
            }

    # The page

    def thumbnail(self, name: str, jpeg: bytes = b"") -> bytes:
        """Keep the thumbnail of an output, or read it; made anew where it is gone."""
        path = self.folder / config.SHEET_THUMBNAILS / f"{name}.jpg"
        if jpeg or not path.exists():
            if not jpeg:
                dataset = utils.read_dicom(
                    self._labelled_as(name) or self.folder / name
                )
                jpeg = utils.preview(utils.decode(dataset), dataset)
            path.parent.mkdir(exist_ok=True)
            fresh = self.folder / TEMPORARY.replace("*", "jpg")
            fresh.write_bytes(jpeg)
            utils.replace_file(fresh, path)
        return path.read_bytes()

    def _labelled_as(self, name: str) -> Path | None:
        if (self.folder / name).exists():
            return None
        found = self._labelled.get(self.outputs[name]["identity"], [])
        return min(found, key=lambda path: path.name != name, default=None)

    def write_sheet(self) -> None:
        """Write the page of all images, unless they and their classes are the same."""
        path, tiles = self.folder / config.SHEET, list(self._tiles())
        about = hashlib.sha256(repr((self._knobs, tiles)).encode()).hexdigest()
        if path.exists() and self._journal.get("sheet") == {"about": about}:
            return
        pictures = dict[str, bytes]()
        for tile in tiles:
            with suppress(Exception):  # of an output that somebody has damaged
                pictures[tile.name] = self.thumbnail(tile.name)
        for start in range(0, len(tiles), utils.PAGE_TILES):
            part = slice(start, start + utils.PAGE_TILES)
            places = various([pictures.get(one.name) for one in tiles[part]])
            both = zip(tiles[part], places, strict=True)
            tiles[part] = [tile._replace(rank=place) for tile, place in both]
        sheet = utils.Sheet(
            title=str(self.folder),
            folder=str(self.folder.resolve()),
            tiles=tiles,
            pictures=pictures,
            classes=config.CLASS_NAMES,
            sections=[utils.Section("", [utils.HOW_TO_MARK])],
            orders=("in order of exposure", "various first"),
        )
        utils.page(path, sheet)
        self._add("sheet", about=about)

    def _tiles(self) -> Iterator[utils.Tile]:
        """The images in the order of exposure, by day and detector."""
        for row in self._manifest():
            one = {key: str(value) for key, value in row.items()}
            name, stamp = one["output"], one["timestamp"]
            there = self._labelled_as(name)
            day, time = "no date", ""
            if stamp != NO_DATE:
                day = f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]}"
                time = f"{stamp[9:11]}:{stamp[11:13]}:{stamp[13:15]}"
            size = f"{one['rows']} × {one['columns']}"
            units = {"kvp": "{} kVp", "mas": "{} mAs", "exposure_index": "index {}"}
            shown = [form.format(one[key]) for key, form in units.items() if one[key]]
            yield utils.Tile(
                name=name,
                picture=name,
                file="" if there else name,
                group=f"{day} · {one['detector'] or 'no detector named'}",
                label=class_of(there, self.labelled_dir) if there else "",
                lines=[
                    " · ".join(filter(None, [time, *shown])),
                    " · ".join(filter(None, [one["detector"], size])),
                    "labelled" if there else "",
                    one["notes"],
                ],
            )

    # The summary

    def warnings(self) -> Iterator[str]:
        """What a person should know about the order and the images."""
        records = [one["record"] for one in self.outputs.values()]
        uids = Counter(filter(None, (one["sop_instance_uid"] for one in records)))
        if shared := sum(count > 1 for count in uids.values()):
            yield f"{SHARED_UID}, with another content: {shared} times, all were kept"
        if undated := sum(one["timestamp"] == NO_DATE for one in records):
            yield f"{undated} images have no date: they stand last"
        moments = Counter(
            (one["timestamp"], one["instance"], one["detector"])
            for one in records
            if one["timestamp"] != NO_DATE
        )
        if ties := sum(count for count in moments.values() if count > 1):
            yield f"{ties} images share their moment with others: nothing orders them"
        in_utc = sum(one["time_source"].endswith(IN_UTC) for one in records)
        if 0 < in_utc < len(records) - undated:
            local = len(records) - undated - in_utc
            yield f"{in_utc} times are in UTC and {local} local: they can't be compared"
        yield from intents(records)
        yield from self._mixed_sources()

    def _mixed_sources(self) -> Iterator[str]:
        found: dict[str, set[str]] = {}
        for one in sorted(self.outputs.values(), key=lambda one: one["source"]):
            folder = shown_path(one["source"].rpartition("/")[0]) or "the input folder"
            used = one["record"]["time_source"].removesuffix(IN_UTC) or "no date"
            found.setdefault(folder, set()).add(used)
        for folder, sources in found.items():
            if len(sources) > 1:
                names = " / ".join(sorted(sources))
                yield f"{folder} was ordered by different attributes: {names}"


def rank(output: tuple[str, Mapping[str, Any]]) -> tuple[str, float, str]:
    """Place of an output in the list: timestamp, InstanceNumber, name."""
    name, one = output
    number = utils.number(one["record"]["instance"])
    return one["record"]["timestamp"], math.inf if number is None else number, name


def intents(records: Iterable[Mapping[str, str]]) -> Iterator[str]:
    """Say where an exposure is there both raw and processed for a viewer."""
    kinds: dict[tuple[str, str], Counter[str]] = {}
    for one in records:
        moment = kinds.setdefault((one["timestamp"], one["detector"]), Counter())
        moment[one["presentation_intent"]] += 1
    raw, shown = "FOR PROCESSING", "FOR PRESENTATION"
    both = [one for one in kinds.values() if one[raw] and one[shown]]
    if both:
        counts = [sum(one[kind] for one in both) for kind in (raw, shown)]
        yield (
            f"{len(both)} exposures are there twice: {counts[0]} images {raw} and "
            f"{counts[1]} {shown}: quality control needs {raw}"
        )


def class_of(path: Path, labelled_dir: Path) -> str:
    """The class folder that a labelled file lies in, at any depth."""
    return "".join(path.relative_to(labelled_dir).parts[:-1][:1])


def various(thumbnails: Sequence[bytes | None]) -> list[int]:
    """Places in an order in which the first images differ most, in looks and in time.

    Each next one is the farthest from those before it, by 8 x 8 grey levels.
    """
    looks = np.zeros((len(thumbnails), 65))
    for at, jpeg in enumerate(thumbnails):
        if jpeg:
            small = Image.open(io.BytesIO(jpeg)).resize((8, 8), Image.Resampling.BOX)
            looks[at, :64] = np.asarray(small).ravel()
    looks /= np.linalg.norm(looks.std(axis=0)) or 1
    looks[:, 64] = np.linspace(0, 2, len(looks))
    far, places, at = np.full(len(looks), np.inf), [0] * len(looks), 0
    for place in range(len(looks)):
        places[at] = place
        far = np.minimum(far, np.linalg.norm(looks - looks[at], axis=1))
        far[at] = -1
        at = int(far.argmax())
    return places


def write_if_changed(
    path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]
) -> None:
    """Write a CSV file, or leave the one that is there as it is."""
    fresh = path.with_name(TEMPORARY.replace("*", path.name))
    utils.write_csv(fresh, columns, rows)
    if path.exists() and filecmp.cmp(path, fresh, shallow=False):
        utils.remove_file(fresh)
    else:
        utils.replace_file(fresh, path)


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


def shown_path(path: str) -> str:
    """A relative path for a spreadsheet: printable, and never a formula."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    text = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return f"./{text}" if text.startswith(("=", "+", "-", "@")) else text


# --- Labels from a saved page -------------------------------------------------------


def place_labels(cfg: Config) -> int:
    """Do what the saved lists say, and say what was done; returns the exit code.

    A file of phase 1's is moved, one with an absolute path copied. What is not clear
    stays where it is, and is listed.
    """
    folder = cfg.folder("decompressed_dir")
    held = f"another phase 1 is at work in {folder}: wait for it to end"
    if not folder.is_dir():
        raise PipelineError(f"{folder} is missing: run phase 1 without --labels first")
    rows = [row for path in cfg.labels for row in read_labels(path)]
    lines = Counter(file for file, _ in rows)
    done: Counter[str] = Counter()
    with utils.lock(folder / LOCK, held):
        labels = Labels(cfg)
        for file, label in dict.fromkeys(rows):
            try:
                if lines[file] > 1:
                    raise RejectedError(f"stands in {lines[file]} lines")
                print(labels.place(file, label))
                done[label] += 1
            except RejectedError as error:
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
        raise PipelineError(f"{path} can't be read: {error}") from None
    if not all({"file", "class"} <= {*row} for row in rows):
        raise PipelineError(
            f"{path} is not a list that a page saved: its first line must be file,class"
        )
    # The page keeps a spreadsheet from taking a text for a formula.
    texts = [
        [re.sub("^'(?=[=+@'-])", "", row[k] or "") for k in ("file", "class")]
        for row in rows
    ]
    return [(file, label) for file, label in texts]


class Labels:
    """Moves and copies into the class folders."""

    def __init__(self, cfg: Config) -> None:
        self._cfg, self._state = cfg, State(cfg)
        self._folder = cfg.folder("labelled_dir")
        there = self._folder.iterdir() if self._folder.is_dir() else ()
        self._classes = {path.name for path in there if path.is_dir()}
        self._targets: set[Path] = set()

    def place(self, file: str, label: str) -> str:
        """Move or copy one file; what was done, or RejectedError why nothing was."""
        ours = file in self._state.outputs
        source = self._state.folder / file if ours else Path(file)
        target = self._folder / label / source.name
        self._check(file, source, label)
        image_id = "" if ours else self._new_image(source, label)
        if target.exists() or target in self._targets:
            raise RejectedError(f"{target} is there already")
        self._targets.add(target)
        self._classes.add(label)
        where = f"{clean(file)} to {label}"
        if self._cfg.dry_run:
            return f"would {'move' if ours else 'copy'} {where}"
        try:
            if ours:
                self._move(source, target)
            else:
                self._copy(source, target)
                self._ids[image_id] = target
                self._confirm(image_id, label)
        except OSError as error:
            raise RejectedError(
                f"{target} can't be written: {error.strerror}"
            ) from None
        return f"{'moved' if ours else 'copied'} {where}"

    def _check(self, file: str, source: Path, label: str) -> None:
        others = [one for one in self._classes if not one.startswith(".")]
        problem = self._bad_name(label) or utils.class_name_problem([*others, label])
        if problem:
            raise RejectedError(problem)
        if file not in self._state.outputs and not source.is_absolute():
            raise RejectedError("is neither a file of phase 1's nor an absolute path")
        if not source.is_file():
            raise RejectedError("is not there")

    @staticmethod
    def _bad_name(name: str) -> str:
        bad = not name.strip() or re.search(r'^[.\s]|[\\/:*?"<>|]|[.\s]$', name)
        return f"{name!r} can't be the name of a class folder" if bad else ""

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        with utils.atomic_write(target) as copy, source.open("rb") as original:
            shutil.copyfileobj(original, copy)

    def _move(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            source.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._copy(source, target)  # to another disk
            utils.remove_file(source)

    @cached_property
    def _ids(self) -> dict[str, Path]:
        """The labelled images by what tells equal pixels."""
        found = {}
        for path in utils.find_files(self._folder):
            with suppress(RejectedError):
                found[utils.prepare_image(path).image_id] = path
        return found

    def _new_image(self, source: Path, label: str) -> str:
        """Id of an image that phase 4 showed, if it is not labelled yet."""
        image_id = utils.prepare_image(source).image_id
        there = self._ids.get(image_id)
        if there is None:
            return image_id
        if there.relative_to(self._folder).parts[0] == label and not self._cfg.dry_run:
            self._confirm(image_id, label)
        raise RejectedError(f"{there} holds the same pixels")

    def _confirm(self, image_id: str, label: str) -> None:
        """Keep for phase 2 that a person gave this class, whatever phase 4 said."""
        journals = self._cfg.folder("dataset_dir") / config.JOURNAL_DIR
        journals.mkdir(parents=True, exist_ok=True)
        path = journals / f"{image_id}.jsonl"
        journal = utils.Journal(path, lock_file=journals / ".lock")
        journal.add({"key": "confirmed", "class": label})


# --- The phase ----------------------------------------------------------------------


def run(cfg: Config) -> int:
    """Decompress what is new below the input folder; returns the exit code."""
    if cfg.labels:
        return place_labels(cfg)
    if cfg.dry_run:
        raise PipelineError("--dry-run shows what --labels would do: name the lists")
    source_dir, folder = cfg.folder("input_dir"), cfg.folder("decompressed_dir")
    check_folders(source_dir, folder)
    make_folders(cfg)
    held = f"another phase 1 is at work in {folder}: wait for it to end"
    with utils.lock(folder / LOCK, held):
        state = State(cfg)
        files = list(utils.find_files(source_dir, state.reject))
        jobs = cfg.jobs or os.cpu_count() or 1
        with progress(len(files), cfg.quiet) as tell:
            outcomes = convert_all(new_tasks(files, state, cfg, tell), jobs)
            with closing(outcomes):
                for task, outcome in outcomes:
                    state.settle(task, outcome)
                    tell()
        if not state.counts:
            raise PipelineError(f"{source_dir} is empty: put DICOM files into it")
        state.write_lists()
        state.write_sheet()
        report(state)
    return utils.EXIT_SOME_FAILED if state.counts["rejected"] else utils.EXIT_DONE


def check_folders(source_dir: Path, folder: Path) -> None:
    """Refuse a missing input, and an output that would become input."""
    if not source_dir.is_dir():
        raise PipelineError(f"{source_dir} is missing: put the DICOM files into it")
    real = os.path.realpath(folder)  # Path.resolve gives up on a loop of links
    if Path(real).is_relative_to(os.path.realpath(source_dir)):
        raise PipelineError(f"{folder} lies in {source_dir}: choose another folder")


def make_folders(cfg: Config) -> None:
    """Create what is missing."""
    folder, labelled = cfg.folder("decompressed_dir"), cfg.folder("labelled_dir")
    folder.mkdir(parents=True, exist_ok=True)
    if not labelled.exists():
        for name in config.CLASS_NAMES:
            (labelled / name).mkdir(parents=True)


@contextmanager
def progress(total: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; elsewhere a line now and then. Call it per finished file."""
    done, told = 0, time.monotonic()
    disabled = True if quiet else None  # None: where stderr is no terminal
    with tqdm(total=total, unit=" files", disable=disabled, leave=False) as bar:

        def tell() -> None:
            nonlocal done, told
            done += 1
            bar.update()
            if bar.disable and time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                log.info("%d of %d files", done, total)

        yield tell
        if bar.disable and done:
            log.info("%d of %d files", done, total)


def new_tasks(
    files: Iterable[Path], state: State, cfg: Config, tell: Callable[[], None]
) -> Iterator[Task]:
    """A task for every file that is not settled yet, in order of their names."""
    for count, path in enumerate(files, 1):
        facts = facts_of(path)
        if state.is_done(path, facts):
            tell()
            continue
        temporary = state.folder / TEMPORARY.replace("*", f"{os.getpid()}-{count}")
        yield Task(path, temporary, cfg.max_image_mb, cfg.item_timeout_s, facts)


def facts_of(path: Path) -> Facts:
    """By what a changed file is known, where it has not gone."""
    try:
        facts = path.stat()
    except OSError:
        return -1, -1, -1
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def report(state: State) -> None:
    """Print what was done and what to do next."""
    counts, file_list = state.counts, state.folder / config.FILE_LIST
    print(f"{counts.total()} files in {state.source_dir}:")
    lines = {
        "written": f"images written to {state.folder} now",
        "known": "images were there before, here or labelled",
        "labelled": f"images found in {state.labelled_dir}, not written again",
        "renamed": "images of an older version, kept under today's names",
        "duplicate": "files hold an image that is there already",
        "rejected": f"files left out: see {state.folder / config.REJECTED_LIST}",
    }
    for key, text in lines.items():
        if counts[key]:
            print(f"  {counts[key]:6d} {text}")
    rejected = (f"{line['source']}: {line['reason']}" for line in state.rejected())
    warn_of("left out", rejected)
    warn_of("warning", state.warnings())
    kinds = Counter(one["record"]["modality"] for one in state.outputs.values())
    shown = ", ".join(f"{count} {name or '?'}" for name, count in kinds.most_common())
    print(f"In order of exposure: {file_list} ({shown or 'none'})")
    print(
        f"Next: open {state.folder / config.SHEET} in a browser and give classes, or"
        f" move the files into {state.labelled_dir}/<CLASS>/, and run"
        " python fase2_generar_vectores_vlm.py"
    )


def warn_of(what: str, lines: Iterable[str]) -> None:
    """Log the first lines, and how many more there are."""
    rest = iter(lines)
    for line in itertools.islice(rest, MAX_WARNINGS):
        log.warning("%s: %s", what, line)
    if more := sum(1 for _ in rest):
        log.warning("%s: %d more", what, more)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: flags, logging, one line for what a user can mend."""
    cfg, _ = config.parse_config(1, __doc__ or "", argv)
    utils.start_logging(log, cfg)
    return utils.exit_code(lambda: run(cfg), log.error)


if __name__ == "__main__":
    raise SystemExit(main())
