"""Phase 1: decompress every DICOM image and put the images in the order of exposure.

Reads   input_dicom/          any files, any depth, any name; never changed
Writes  f1_descomprimidos/
          *.dcm               one Explicit VR Little Endian file per image
          manifiesto.csv      one line per image, in chronological order
          rechazados.csv      what was left out, and why
        datos_etiquetados/    an empty folder per class, if it is not there

Files are named after the acquisition: a file browser shows them in order. The pixels
are exactly those of the compressed file, and so is all of the header that
decompression need not change. A second run does only what is missing, and knows the
files that were moved to datos_etiquetados/ in the meantime.

    python fase1_descompresion.py
    python fase1_descompresion.py --base /data/qc --jobs 8
"""

import faulthandler
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
import sqlite3
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, ExplicitVRLittleEndian

import config
import utils
from config import Config
from utils import Buffer, Encoding, PipelineError, PixelLayout, RejectedError

log = logging.getLogger("fase1")

COLUMNS = (
    *("order", "source", "output", "timestamp", "time_source", "sop_instance_uid"),
    *("transfer_syntax", "modality", "manufacturer", "detector", "kvp", "mas"),
    *("exposure_index", "rows", "columns", "bits", "frames", "decoder", "notes"),
)
NO_DATE = "sin_fecha"
"""Stands for the timestamp of an image without any date; sorts after every date."""

STATE = ".fase1.sqlite"
"""What was done, so that the next run need not open a file to know it."""

TEMPORARY = ".fase1-*.tmp"
SAVE_SECONDS, TELL_SECONDS = 1.0, 5.0
MAX_WARNINGS = 10
MEGABYTE = 1 << 20
PATIENCE_MB = 16
"""So many megabytes in one part of the work earn it once more the time-out."""

Alive = Callable[[float], None]

QUEUE_PER_WORKER = 32
"""Results may wait for an earlier file that takes long, but not without end."""

HEAVY_IMPORTS = ["numpy", "pydicom", "imagecodecs", "httpx", "ollama", "PIL.Image"]
"""Loaded once for all worker processes, where the system can fork."""

IMPLEMENTATION_UID = "2.25.302418470214713250418632510948250124117"
IMPLEMENTATION_NAME = "DICOM_QC_FASE1"
SHARED_UID = "several images have one SOPInstanceUID"
UTC_NOTE = "time is UTC"

# --- The header: PS3.5 section 7 ----------------------------------------------------

PIXEL_DATA = 0x7FE00010
PIXEL_DATA_BYTES = b"\xe0\x7f\x10\x00"
OFFSET_TABLES = (0x7FE00001, 0x7FE00002, 0x7FE00003)
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
UNDEFINED = 0xFFFFFFFF
MAX_DEPTH = 50
SWAP_BYTES = (
    dict.fromkeys(("AT", "OW", "SS", "US"), 2)
    | dict.fromkeys(("FL", "OF", "OL", "SL", "UL"), 4)
    | dict.fromkeys(("FD", "OD", "OV", "SV", "UV"), 8)
)
NUMBER_CODES = {"US": "H", "SS": "h", "UL": "L", "SL": "l", "FL": "f", "FD": "d"}


FLOAT_PIXELS = {0x7FE00008, 0x7FE00009}
CHUNK = 8 << 20
Changes = dict[int, bytes]

NOT_STILL_IMAGES = re.compile(
    r"1\.2\.840\.10008\.1\.2\.(4\.(9[2-9]|1\d\d|20[4-9])|6\.\d+|[78]\..*)"
)
"""Video, JPIP, JPEG XL, JPEG 2000 part 2, XML and so on (PS3.6 table A-1)."""

CODECS = {
    **{f"1.2.840.10008.1.2.4.{number}": "JPEG" for number in range(50, 57)},
    **{f"1.2.840.10008.1.2.4.{number}": "JPEG Lossless" for number in (57, 58, 70)},
    **{f"1.2.840.10008.1.2.4.{number}": "JPEG-LS" for number in (80, 81)},
    **{f"1.2.840.10008.1.2.4.{number}": "JPEG 2000" for number in (90, 91)},
    **{f"1.2.840.10008.1.2.4.{number}": "HTJ2K" for number in (201, 202, 203)},
    "1.2.840.10008.1.2.5": "RLE",
}
"""The codec that each transfer syntax promises; the codestream has the last word."""


class Syntax(NamedTuple):
    """How elements are encoded."""

    implicit: bool
    big_endian: bool


EXPLICIT_LITTLE, IMPLICIT_LITTLE = Syntax(False, False), Syntax(True, False)


class Element(NamedTuple):
    """Where one element stands in the file."""

    tag: int
    vr: str
    implicit: bool
    undefined: bool
    start: int
    value: int
    end: int
    """End of the value; a sequence of undefined length has its delimiter after it."""
    next: int


def read_elements(
    data: Buffer, at: int, stop: int, syntax: Syntax, depth: int = 0
) -> tuple[list[Element], int]:
    """The elements of one dataset or item, and where it ends."""
    elements: list[Element] = []
    while at < stop:
        element = _read_element(data, at, stop, syntax, depth)
        at = element.next
        if element.tag == ITEM_END:
            break
        elements.append(element)
    return elements, at


def read_image(data: Buffer, encoding: Encoding) -> tuple[list[Element], int]:
    """The elements of a file; what can't be read after the pixel data is left out."""
    syntax, at = Syntax(encoding.implicit, encoding.big_endian), encoding.start
    elements: list[Element] = []
    pixels_seen = False
    while at < len(data):
        try:
            element = _read_element(data, at, len(data), syntax, 0)
        except RejectedError:
            if pixels_seen:
                break
            raise
        if pixels_seen and element.tag <= elements[-1].tag:
            break
        elements.append(element)
        pixels_seen = pixels_seen or element.tag == PIXEL_DATA
        at = element.next
    return elements, at


def _read_element(
    data: Buffer, at: int, stop: int, syntax: Syntax, depth: int
) -> Element:
    if at + 8 > stop:
        raise RejectedError("is truncated in the header")
    order = ">" if syntax.big_endian else "<"
    group, number = struct.unpack_from(order + "HH", data, at)
    tag = group << 16 | number
    vr, length, value = _vr_and_length(data, at, stop, syntax, tag)
    implicit = value == at + 8 and (syntax.implicit or not vr or tag >> 16 == 0xFFFE)
    if implicit:
        vr = implicit_vr(tag)
    if length == UNDEFINED and tag != ITEM_END:
        inner = IMPLICIT_LITTLE if vr == "UN" or implicit else syntax
        _, end, following = read_items(data, value, stop, inner, depth + 1)
        return Element(tag, vr, implicit, True, at, value, end, following)
    end = value + length
    if end > stop:
        raise RejectedError(
            f"is truncated: ({group:04X},{number:04X}) says {length} bytes, "
            f"{stop - value} are there"
        )
    return Element(tag, vr, implicit, False, at, value, end, end)


def _vr_and_length(
    data: Buffer, at: int, stop: int, syntax: Syntax, tag: int
) -> tuple[str, int, int]:
    """VR (empty where none is written), length and offset of the value."""
    order = ">" if syntax.big_endian else "<"
    (long_length,) = struct.unpack_from(order + "L", data, at + 4)
    vr = bytes(data[at + 4 : at + 6]).decode("latin-1")
    written = len(vr) == 2 and vr.isascii() and vr.isalpha() and vr.isupper()
    if syntax.implicit or tag >> 16 == 0xFFFE or not written:
        return "", long_length, at + 8
    (short_length,) = struct.unpack_from(order + "H", data, at + 6)
    if vr in utils.SHORT_VRS or (vr not in utils.LONG_VRS and short_length):
        return vr, short_length, at + 8
    if at + 12 > stop:
        raise RejectedError("is truncated in the header")
    # A VR of a later edition of the standard has the long form: PS3.5 6.2.
    (long_length,) = struct.unpack_from(order + "L", data, at + 8)
    return vr, long_length, at + 12


def read_items(
    data: Buffer, at: int, stop: int, syntax: Syntax, depth: int = 0
) -> tuple[list[tuple[int, int]], int, int]:
    """(start, end) of each item's content, the end of the last, and what comes next."""
    if depth > MAX_DEPTH:
        raise RejectedError(f"has sequences nested more than {MAX_DEPTH} deep")
    items: list[tuple[int, int]] = []
    order = ">" if syntax.big_endian else "<"
    while at < stop:
        if at + 8 > stop:
            raise RejectedError("is truncated in a sequence")
        group, number, length = struct.unpack_from(order + "HHL", data, at)
        tag = group << 16 | number
        if tag == SEQUENCE_END:
            return items, at, at + 8
        if tag != ITEM:
            raise RejectedError(
                f"has ({group:04X},{number:04X}) where an item should be"
            )
        end = at + 8 + length
        if length == UNDEFINED:
            _, end = read_elements(data, at + 8, stop, syntax, depth)
        if end > stop:
            raise RejectedError("is truncated: an item reaches beyond the end")
        items.append((at + 8, end - 8 if length == UNDEFINED else end))
        at = end
    return items, at, at


def implicit_vr(tag: int) -> str:
    """VR of an element that has none written; UN is always right for private ones."""
    if tag >> 16 & 1:
        return "LO" if 0x10 <= tag & 0xFFFF <= 0xFF else "UN"
    if not tag & 0xFFFF:
        return "UL"
    try:
        vr = dictionary_VR(tag)
    except KeyError:
        return "UN"
    return vr if len(vr) == 2 else vr.rsplit(" ", 1)[-1]


@dataclass(frozen=True)
class Header:
    """One dataset or item: its elements and their values."""

    data: Buffer
    syntax: Syntax
    elements: Mapping[int, Element]
    signed: bool = False
    """PixelRepresentation: decides what "US or SS" means (PS3.5 A.1)."""
    notes: list[str] = field(default_factory=list)
    """What had to be repaired or left out, for the manifest."""

    @classmethod
    def of(
        cls,
        data: Buffer,
        syntax: Syntax,
        elements: Iterable[Element],
        signed: bool = False,
    ) -> Self:
        """Index the elements of one dataset by tag; an item inherits `signed`."""
        header = cls(data, syntax, {element.tag: element for element in elements})
        own = header.get("PixelRepresentation")
        return replace(header, signed=signed if own is None else own == 1)

    def get(self, keyword: str) -> Any:
        """First value: a number for binary VRs, else text; None where there is none."""
        element = self.elements.get(tag_for_keyword(keyword) or 0)
        if element is None or element.undefined:
            return None
        raw = bytes(self.data[element.value : min(element.end, element.value + 1024)])
        code = NUMBER_CODES.get(element.vr)
        if code is None:
            return self._text(raw).split("\\")[0].strip("\0 ") or None
        code = (">" if self.syntax.big_endian else "<") + code
        return (
            struct.unpack_from(code, raw)[0]
            if len(raw) >= struct.calcsize(code)
            else None
        )

    def number(self, keyword: str) -> float | None:
        """A finite number, or None."""
        try:
            value = float(self.get(keyword))
        except (TypeError, ValueError):
            return None
        return value if np.isfinite(value) else None

    def _text(self, raw: bytes) -> str:
        if raw.isascii():
            return raw.decode("ascii")
        try:
            charset = self.elements[0x00080005]
            names = bytes(self.data[charset.value : charset.end]).decode("ascii")
            encodings = convert_encodings([name.strip() for name in names.split("\\")])
            return decode_bytes(raw, encodings, set())
        except Exception:  # an unknown character set: pydicom raises several kinds
            return raw.decode("latin-1")


def encode_element(tag: int, vr: str, value: Buffer) -> bytes:
    """An element in Explicit VR Little Endian, padded to an even length (PS3.5 7.1)."""
    if len(value) % 2:
        value = bytes(value) + (b" " if vr in {"CS", "LO", "SH"} else b"\0")
    return _element_header(tag, vr, len(value)) + bytes(value)


def _element_header(tag: int, vr: str, length: int) -> bytes:
    start = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr.encode("latin-1"))
    if vr in utils.SHORT_VRS:
        return start + struct.pack("<H", length)
    return start + struct.pack("<HL", 0, length)


def rewrite(header: Header, changes: Changes) -> Iterator[Buffer]:
    """The elements in Explicit VR Little Endian; values keep their bytes.

    Group lengths (PS3.5 7.2, retired) are left out, because they would be wrong.
    `changes` has whole encoded elements that replace or join those of the file.
    """
    pending = deque(sorted(changes))
    for element in header.elements.values():
        while pending and pending[0] <= element.tag:
            yield changes[pending.popleft()]
        if element.tag in changes or not element.tag & 0xFFFF:
            continue
        yield from _rewrite_element(header, element)
    yield from (changes[tag] for tag in pending)


def _rewrite_element(header: Header, element: Element) -> Iterator[Buffer]:
    data, syntax = header.data, header.syntax
    value = data[element.value : element.end]
    is_plain = syntax == EXPLICIT_LITTLE and not element.implicit
    if is_plain and not (element.vr == "SQ" and PIXEL_DATA_BYTES in bytes(value)):
        yield data[element.start : element.next]
    elif element.vr == "SQ" or (
        element.undefined and element.implicit and not is_private(element)
    ):
        content = b"".join(_rewrite_items(header, element))
        yield _element_header(element.tag, "SQ", len(content)) + content
    elif element.undefined:
        # An unknown sequence stays as it is: UN, implicit VR inside (PS3.5 6.2.2).
        yield _element_header(element.tag, "UN", UNDEFINED)
        yield data[element.value : element.next]
    else:
        vr = _short_enough(_decided_vr(header, element), len(value))
        if syntax.big_endian and vr in SWAP_BYTES:
            value = swapped(value, SWAP_BYTES[vr])
        yield encode_element(element.tag, vr, value)


def is_private(element: Element) -> bool:
    """Odd groups belong to vendors (PS3.5 7.8)."""
    return bool(element.tag >> 16 & 1)


def _decided_vr(header: Header, element: Element) -> str:
    if (
        element.implicit
        and element.vr in ("SS", "US")
        and element.end - element.value == 2
    ):
        with suppress(KeyError):
            if "US or SS" in dictionary_VR(element.tag):
                return "SS" if header.signed else "US"
    return element.vr


def _short_enough(vr: str, length: int) -> str:
    return "UN" if vr in utils.SHORT_VRS and length > 0xFFFE else vr


def _rewrite_items(header: Header, sequence: Element) -> Iterator[bytes]:
    syntax = IMPLICIT_LITTLE if sequence.implicit else header.syntax
    items, _, _ = read_items(header.data, sequence.value, sequence.end, syntax)
    for start, end in items:
        elements, _ = read_elements(header.data, start, end, syntax, 1)
        item = Header.of(header.data, syntax, elements, header.signed)
        try:
            changes = _decoded_icon(item)
        except Exception:  # each decoder raises errors of its own
            changes = {PIXEL_DATA: b""}
            header.notes.append("an icon that can't be decoded was left out")
        content = b"".join(rewrite(item, changes))
        yield struct.pack("<HHL", 0xFFFE, 0xE000, len(content)) + content


def _decoded_icon(item: Header) -> dict[int, bytes]:
    """Changes that decode an item's compressed pixels, such as an icon image's."""
    pixels = item.elements.get(PIXEL_DATA)
    if pixels is None or not pixels.undefined:
        return {}
    layout = PixelLayout.of(item.get)
    value = memoryview(item.data)[pixels.value : pixels.end]
    parts = utils.compressed_frames(value, layout.frames)
    streams = [utils.joined(one) for one in parts]
    decoded = layout.decoded(utils.stream_facts(streams[0], layout))
    frames = b"".join(utils.decode_stream(one, layout).tobytes() for one in streams)
    vr = "OB" if decoded.bits_allocated <= 8 else "OW"
    changes = layout_changes(layout, decoded)
    return changes | {PIXEL_DATA: encode_element(PIXEL_DATA, vr, frames)}


def swapped(value: Buffer, size: int) -> bytes:
    """Big endian values of `size` bytes as little endian; a torn last one as it is."""
    whole = len(value) // size * size
    array = np.frombuffer(value[:whole], f">u{size}")
    return array.astype(f"<u{size}").tobytes() + bytes(value[whole:])


def layout_changes(before: PixelLayout, after: PixelLayout) -> dict[int, bytes]:
    """The attributes that decompression changes, encoded."""
    changes: Changes = {}
    if after.photometric != before.photometric:
        changes[0x00280004] = encode_element(
            0x00280004, "CS", after.photometric.encode()
        )
    numbers = {
        0x00280100: (before.bits_allocated, after.bits_allocated),
        0x00280101: (before.bits_stored, after.bits_stored),
        0x00280102: (before.bits_stored - 1, after.bits_stored - 1),
    }
    if after.samples > 1:
        numbers[0x00280006] = (-1, 0)
    for tag, (old, new) in numbers.items():
        if old != new:
            changes[tag] = encode_element(tag, "US", struct.pack("<H", new))
    return changes | dict.fromkeys(OFFSET_TABLES, b"")


# --- The order of exposure: PS3.5 6.2, DA, TM and DT --------------------------------

TIME_SOURCES = ("Acquisition", "Content", "Series", "Study", "InstanceCreation")
DATE_FORM = re.compile(r"(\d{4})([.]?)(\d\d)\2(\d\d)")
TIME_FORM = re.compile(r"(\d\d)(?::?(\d\d)(?::?(\d\d)(?:\.(\d*))?)?)?")
DATETIME_FORM = re.compile(r"(\d{4}(?:\d\d){0,2})((?:\d\d){0,3}(?:\.\d*)?)([+-]\d{4})?")
OFFSET_FORM = re.compile(r"([+-])(\d\d)(\d\d)")


class Moment(NamedTuple):
    """When an image was taken, and how that is known."""

    text: str
    """YYYYMMDDTHHMMSS.ffffff, or NO_DATE."""
    source: str
    note: str = ""


def moment_of(get: Callable[[str], Any]) -> Moment:
    """The moment of exposure by the best attributes that a header has.

    The first attribute with a valid date decides. Where its time is missing or broken,
    another attribute of the same day lends its own; without one the day begins.
    Moments with a known offset from UTC are given in UTC.
    """
    dates = [moment for moment in _candidates(get) if moment[0] is not None]
    if not dates:
        return Moment(NO_DATE, "")
    day, _, _, source = dates[0]
    for date, of_day, offset, name in dates:
        if of_day is not None and date == day:
            assert date is not None
            used = source if name == source else f"{source} + time of {name}"
            return _moment(date + of_day, offset, used)
    assert day is not None
    return Moment(
        _shown(day), source, "has no valid time: placed at the start of its day"
    )


Candidate = tuple[datetime | None, timedelta | None, timedelta | None, str]


def _candidates(get: Callable[[str], Any]) -> Iterator[Candidate]:
    offset = parse_offset(str(get("TimezoneOffsetFromUTC") or ""))
    whole = str(get("AcquisitionDateTime") or "")
    if match := DATETIME_FORM.fullmatch(whole):
        date = parse_date(match[1] + "0101"[len(match[1]) - 4 :])
        clock = parse_time(match[2]) if match[2] else timedelta(0)
        own = parse_offset(match[3] or "")
        yield date, clock, offset if own is None else own, "AcquisitionDateTime"
    else:
        yield parse_date(whole[:8]), None, None, "AcquisitionDateTime"
    for name in TIME_SOURCES:
        date = parse_date(str(get(f"{name}Date") or ""))
        clock = parse_time(str(get(f"{name}Time") or ""))
        yield date, clock, offset, f"{name}Date/Time"


def _moment(local: datetime, offset: timedelta | None, source: str) -> Moment:
    if offset is None:
        return Moment(_shown(local), source)
    try:
        return Moment(_shown(local - offset), source, UTC_NOTE)
    except OverflowError:
        return Moment(_shown(local), source)


def _shown(moment: datetime) -> str:
    return f"{moment.year:04d}{moment:%m%dT%H%M%S.%f}"


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
    match = OFFSET_FORM.fullmatch(text.strip())
    if not match:
        return None
    offset = timedelta(hours=int(match[2]), minutes=int(match[3]))
    return offset if match[1] == "+" else -offset


# --- One file: read, decode, write --------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One file to convert."""

    source: Path
    temporary: Path
    limit_mb: int
    facts: tuple[int, int] = (-1, -1)
    """Size and time of change before it is read: a later change is seen next time."""


@dataclass(frozen=True)
class Outcome:
    """What became of a file; what a worker process sends back."""

    reason: str = ""
    """Why it was left out; empty when its output stands under the temporary name."""
    may_pass: bool = False
    """The reason may be gone the next time: the file is tried again."""
    disk_error: str = ""
    """The output can't be written: no reason to go on."""
    identity: str = ""
    """SOPInstanceUID, or the digest of the output where there is none."""
    name: str = ""
    number: int = 0
    record: Mapping[str, str] = field(default_factory=dict)


def convert(task: Task, alive: Alive) -> Outcome:
    """Decode one file into a temporary file beside its destination.

    `alive` is called before every part of the work with the megabytes it has.
    """
    try:
        outcome = _convert(task, alive)
    except RejectedError as error:
        outcome = Outcome(str(error))
    except MemoryError:
        outcome = Outcome("needs more memory than there is", may_pass=True)
    except _DiskError as error:
        outcome = Outcome("not written", disk_error=str(error))
    except OSError as error:
        outcome = Outcome(f"can't be read: {error.strerror}", may_pass=True)
    except Exception as error:  # each decoder raises errors of its own
        outcome = Outcome(f"can't be decoded: {type(error).__name__}: {error}")
    if outcome.reason:
        with suppress(OSError):
            task.temporary.unlink(missing_ok=True)
    return outcome


class _DiskError(Exception):
    """The output can't be written."""


def _convert(task: Task, alive: Alive) -> Outcome:
    alive(task.source.stat().st_size / MEGABYTE)
    data, encoding = utils.open_dicom(task.source, task.limit_mb)
    image = Image.read(data, encoding, task.limit_mb)
    chunks = image.chunks(alive)
    first = next(chunks)  # decodes a frame before the disk is touched
    try:
        with task.temporary.open("wb") as file:
            for chunk in itertools.chain([first], chunks):
                file.write(chunk)
            file.flush()
            alive(image.layout.size / MEGABYTE)
            os.fsync(file.fileno())
        return image.outcome(task.temporary)
    except OSError as error:
        raise _DiskError(error.strerror or error) from None


@dataclass
class Image:
    """One image file on its way."""

    encoding: Encoding
    header: Header
    pixels: Element
    layout: PixelLayout
    decoder: str = "none needed"

    @classmethod
    def read(cls, data: Buffer, encoding: Encoding, limit_mb: int) -> Self:
        """Find the pixels, and refuse what can't or mustn't be decoded."""
        elements, end = read_image(data, encoding)
        syntax = Syntax(encoding.implicit, encoding.big_endian)
        header = Header.of(data, syntax, elements)
        header.notes.extend(encoding.notes)
        pixels = header.elements.get(PIXEL_DATA)
        uid = UID(encoding.transfer_syntax)
        if pixels is None:
            raise RejectedError(f"holds no image{_kind(header)}")
        if NOT_STILL_IMAGES.fullmatch(uid):
            raise RejectedError(f"{uid.name} is not for this program")
        layout = PixelLayout.of(header.get)
        if layout.size > min(limit_mb << 20, UNDEFINED - 1):
            size_mb = layout.size >> 20
            raise RejectedError(f"would decode to {size_mb} MB: see --max-image-mb")
        if len(data) - end > 1:
            header.notes.append(f"{len(data) - end} bytes after the dataset left out")
        return cls(encoding, header, pixels, layout)

    def chunks(self, alive: Alive) -> Iterator[Buffer]:
        """The output file, piece by piece."""
        alive(self.layout.size / MEGABYTE)
        value = memoryview(self.header.data)[self.pixels.value : self.pixels.end]
        if self.pixels.undefined or self._is_wrapped(value):
            frames, changes, size = self._decoded(value)
        else:
            frames, changes, size = self._native(value)
        first = next(frames)
        vr = "OB" if self.layout.bits_allocated <= 8 else "OW"
        yield file_meta(self.header, self.encoding)
        before, after = self._split()
        yield from rewrite(before, changes)
        yield _element_header(PIXEL_DATA, vr, size + size % 2)
        for frame in itertools.chain([first], frames):
            alive(len(frame) / MEGABYTE)
            yield frame
        yield b"\0" * (size % 2)
        yield from rewrite(after, {})

    def _is_wrapped(self, value: memoryview) -> bool:
        """Some writers give fragments a length, which PS3.5 A.4 leaves undefined."""
        is_item = bytes(value[:4]) == b"\xfe\xff\x00\xe0"
        return is_item and UID(self.encoding.transfer_syntax).is_encapsulated

    def _split(self) -> tuple[Header, Header]:
        """What stands before the pixel data, and what after."""
        header, at = self.header, self.pixels.start
        before = {tag: one for tag, one in header.elements.items() if one.start < at}
        after = {tag: one for tag, one in header.elements.items() if one.start > at}
        return replace(header, elements=before), replace(header, elements=after)

    def _native(self, value: memoryview) -> tuple[Iterator[Buffer], Changes, int]:
        if len(value) < self.layout.size:
            raise RejectedError(
                f"is truncated: {len(value)} of {self.layout.size} bytes of pixels"
            )
        if self.encoding.big_endian:
            bits = self.layout.bits_allocated
            words = 2 if bits <= 8 and self.pixels.vr == "OW" else max(1, bits // 8)
            value = memoryview(swapped(value, words))
        if UID(self.encoding.transfer_syntax).is_compressed:
            self.header.notes.append("said compressed, is not")
        chunks = (value[at : at + CHUNK] for at in range(0, len(value), CHUNK))
        return chunks, self._missing(), len(value)

    def _decoded(self, value: memoryview) -> tuple[Iterator[Buffer], Changes, int]:
        parts = utils.compressed_frames(value, self.layout.frames)
        streams = map(utils.joined, parts)
        first = next(streams)
        facts = utils.stream_facts(first, self.layout)
        codec = facts.codec
        syntax = UID(self.encoding.transfer_syntax)
        if codec not in CODECS.get(syntax, codec):
            self.header.notes.append(f"said {syntax.name}, is {codec}")
        before, self.layout = self.layout, self.layout.decoded(facts)
        self.decoder = f"imagecodecs, {codec}"
        frames: Iterable[Buffer] = (
            self._decode(one, before) for one in itertools.chain([first], streams)
        )
        if self.layout.bits_stored > before.bits_stored:
            # Many writers say 16 bits for 12; the header is wrong if they are used.
            frames = list(frames)
            if all(fits(one, before) for one in frames):
                self.layout = replace(self.layout, bits_stored=before.bits_stored)
        changes = layout_changes(before, self.layout)
        if before.bits_stored != self.layout.bits_stored:
            stored = f"{before.bits_stored} -> {self.layout.bits_stored}"
            self.header.notes.append(f"bits stored {stored}, as in the codestream")
        return iter(frames), self._missing() | changes, self.layout.size

    def _decode(self, stream: Buffer, layout: PixelLayout) -> Buffer:
        try:
            pixels = utils.decode_stream(stream, layout)
        except RejectedError:
            raise
        except Exception as error:  # each decoder raises errors of its own
            pixels = self._decode_by_plugins(bytes(stream), error)
            self.decoder = "pydicom's plugins"
        if pixels.nbytes * self.layout.frames != self.layout.size:
            raise RejectedError("has frames of different sizes")
        return np.ascontiguousarray(pixels).data.cast("B")

    def _decode_by_plugins(self, stream: bytes, cause: Exception) -> NDArray[Any]:
        """Let GDCM and pylibjpeg try what imagecodecs refuses.

        GDCM can abort the process on a damaged stream: only for worker processes.
        """
        layout = self.layout
        options: Any = {
            "rows": layout.rows,
            "columns": layout.columns,
            "number_of_frames": 1,
            "samples_per_pixel": layout.samples,
            "bits_allocated": layout.bits_allocated,
            "bits_stored": layout.bits_stored,
            "pixel_representation": int(layout.signed),
            "photometric_interpretation": layout.photometric,
            "planar_configuration": 0,
            "pixel_keyword": "PixelData",
        }
        try:
            pixels, _ = get_decoder(self.encoding.transfer_syntax).as_array(
                encapsulate([stream]), raw=layout.photometric != "RGB", **options
            )
        except Exception:
            text = f"can't be decoded: {type(cause).__name__}: {cause}"
            raise RejectedError(text) from None
        return pixels.astype(f"<{pixels.dtype.kind}{layout.bits_allocated // 8}")

    def _missing(self) -> Changes:
        """Attributes that a reader needs and the file lacks."""
        changes: Changes = {}
        if self.header.get("PhotometricInterpretation") is None:
            text = "RGB" if self.layout.samples == 3 else "MONOCHROME2"
            changes[0x00280004] = encode_element(0x00280004, "CS", text.encode())
            self.header.notes.append(f"had no photometric interpretation: {text}")
        if self.header.get("SamplesPerPixel") is None:
            value = struct.pack("<H", self.layout.samples)
            changes[0x00280002] = encode_element(0x00280002, "US", value)
        return changes

    def outcome(self, temporary: Path) -> Outcome:
        """What the parent process must know, when the output is written."""
        get = self.header.get
        moment = moment_of(get)
        uid = clean(get("SOPInstanceUID") or "")
        identity = uid or f"sha256:{content_digest(temporary)}"
        if moment.note:
            self.header.notes.append(moment.note)
        number = self.header.number("InstanceNumber")
        record = self._exposure() | {
            "timestamp": moment.text,
            "time_source": moment.source,
            "sop_instance_uid": uid,
            "transfer_syntax": UID(self.encoding.transfer_syntax).name,
            "rows": str(self.layout.rows),
            "columns": str(self.layout.columns),
            "bits": str(self.layout.bits_stored),
            "frames": str(self.layout.frames),
            "decoder": self.decoder,
            "notes": "; ".join(dict.fromkeys(self.header.notes)),
        }
        return Outcome(
            identity=identity,
            name=output_name(record, identity),
            number=int(number) if number is not None else sys.maxsize,
            record=record,
        )

    def _exposure(self) -> dict[str, str]:
        """How the image was made. Exposure holds whole mAs only: 1.7 stands as 1."""
        header = self.header
        mas, micro = header.number("Exposure"), header.number("ExposureInuAs")
        if micro is not None:
            mas = micro / 1000
        texts = {
            "modality": "Modality",
            "manufacturer": "Manufacturer",
            "detector": "DetectorID",
        }
        numbers = {
            "kvp": header.number("KVP"),
            "mas": mas,
            "exposure_index": header.number("ExposureIndex"),
        }
        record = {key: clean(header.get(word) or "") for key, word in texts.items()}
        return record | {
            key: "" if value is None else f"{value:.6g}"
            for key, value in numbers.items()
        }


def fits(frame: Buffer, layout: PixelLayout) -> bool:
    """Whether no sample of a frame needs more than bits_stored."""
    size = layout.bits_allocated // 8
    samples = np.frombuffer(frame, f"<{'i' if layout.signed else 'u'}{size}")
    low = -(1 << layout.bits_stored - 1) if layout.signed else 0
    high = low + (1 << layout.bits_stored)
    return bool(low <= samples.min() and samples.max() < high)


def _kind(header: Header) -> str:
    """What a DICOM file without pixels is, as far as it says."""
    names = {
        clean(header.get("Modality") or ""),
        UID(str(header.get("SOPClassUID") or "")).name,
    }
    if 0x00041220 in header.elements:
        names = {"a DICOMDIR"}
    if FLOAT_PIXELS & header.elements.keys():
        names = {"floating point pixels"}
    named = ", ".join(sorted(filter(None, names)))
    return f" ({named})" if named else ""


def clean(text: object) -> str:
    """DICOM text fit for a terminal and a spreadsheet: one line, no formula."""
    line = "".join(one if one.isprintable() else " " for one in str(text)).strip()[:200]
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


def output_name(record: Mapping[str, str], identity: str) -> str:
    """Name that sorts by time, is safe on every system, and is never another's."""
    parts = [record["detector"]]
    labels = {"KVP": "kvp", "mAs": "mas", "IE": "exposure_index"}
    parts += [label + record[key] for label, key in labels.items() if record[key]]
    safe = [re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-.")[:40] for part in parts]
    digest = hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:12]
    return "_".join([record["timestamp"], *filter(None, safe), digest]) + ".dcm"


def file_meta(header: Header, encoding: Encoding) -> bytes:
    """Preamble and file meta group (PS3.10 7.1); who sent the file is kept."""
    elements = {
        0x00020001: ("OB", b"\0\1"),
        0x00020010: ("UI", ExplicitVRLittleEndian.encode()),
        0x00020012: ("UI", IMPLEMENTATION_UID.encode()),
        0x00020013: ("SH", IMPLEMENTATION_NAME.encode()),
    }
    for tag, keyword in ((0x00020002, "SOPClassUID"), (0x00020003, "SOPInstanceUID")):
        uid = str(header.get(keyword) or "").encode() or encoding.meta.get(tag, b"")
        elements[tag] = ("UI", uid)
    for tag in (0x00020016, 0x00020017, 0x00020018):
        if encoding.meta.get(tag):
            elements[tag] = ("AE", encoding.meta[tag])
    group = b"".join(encode_element(tag, *elements[tag]) for tag in sorted(elements))
    length = encode_element(0x00020000, "UL", struct.pack("<L", len(group)))
    return b"\0" * 128 + b"DICM" + length + group


def content_digest(path: Path) -> str:
    """SHA-256 of a file of ours from the end of its file meta group on."""
    with path.open("rb") as file:
        start = file.read(144)
        (length,) = struct.unpack("<L", start[140:144]) if len(start) == 144 else (0,)
        file.seek(144 + length)
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Workers: decoders may crash or hang, and take only their process with them -----

Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass
class _Worker(Generic[Work, Result]):
    process: multiprocessing.process.BaseProcess
    connection: Connection
    job: "_Job[Work, Result] | None" = None


@dataclass
class _Job(Generic[Work, Result]):
    work: Work
    result: Result | str | None = None


class Crew(Generic[Work, Result]):
    """Processes that do one kind of work.

    Each has a watchdog that ends it when it shows no sign of life for `timeout_s`,
    whatever its decoder is doing, and whether or not its parent is still there.
    A large frame is given more time: see PATIENCE_MB.
    """

    def __init__(
        self,
        do: Callable[[Work, Alive], Result],
        size: int,
        timeout_s: float,
    ) -> None:
        methods = multiprocessing.get_all_start_methods()
        kind = "forkserver" if "forkserver" in methods else "spawn"
        self._context: Any = multiprocessing.get_context(kind)
        if kind == "forkserver":
            self._context.set_forkserver_preload(HEAVY_IMPORTS)
        self._do, self._size, self._timeout_s = do, size, timeout_s
        self._workers: list[_Worker[Work, Result]] = []

    def do_all(
        self, works: Iterable[Work]
    ) -> Generator[tuple[Work, Result | str], None, None]:
        """Do every piece of work; answers come in its order.

        A text in place of a result says how the worker died.
        """
        todo = iter(works)
        queue: deque[_Job[Work, Result]] = deque()
        try:
            while True:
                self._hand_out(todo, queue)
                if not queue:
                    return
                while queue and queue[0].result is not None:
                    job = queue.popleft()
                    assert job.result is not None
                    yield job.work, job.result
                self._collect()
        finally:
            self._end()

    def _hand_out(self, todo: Iterator[Work], queue: deque[_Job[Work, Result]]) -> None:
        while len(queue) < QUEUE_PER_WORKER * self._size:
            idle = next((one for one in self._workers if one.job is None), None)
            if idle is None and len(self._workers) >= self._size:
                return
            work = next(todo, None)
            if work is None:
                return
            job: _Job[Work, Result] = _Job(work)
            queue.append(job)
            self._give(idle or self._hire(), job)

    def _give(self, worker: _Worker[Work, Result], job: _Job[Work, Result]) -> None:
        try:
            worker.connection.send(job.work)
        except OSError:  # it died while idle
            self._dismiss(worker)
            worker = self._hire()
            worker.connection.send(job.work)
        worker.job = job

    def _hire(self) -> _Worker[Work, Result]:
        here, there = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(self._do, self._timeout_s, there), daemon=True
        )
        with _no_interrupts():
            process.start()
        there.close()
        worker: _Worker[Work, Result] = _Worker(process, here)
        self._workers.append(worker)
        return worker

    def _collect(self) -> None:
        """Take what the workers have done; replace those that died of it."""
        busy = {one.connection: one for one in self._workers if one.job}
        if not busy:
            return
        for connection in wait(list(busy), timeout=1.0):
            worker = busy[connection]  # type: ignore[index]
            assert worker.job is not None
            try:
                worker.job.result = worker.connection.recv()
            except (EOFError, OSError):
                self._dismiss(worker)
                worker.job.result = self._cause(worker.process.exitcode)
            worker.job = None

    def _cause(self, exit_code: int | None) -> str:
        if exit_code == 1:
            return f"given up after {self._timeout_s:g} s without a sign of life"
        return f"the decoder crashed on it (exit code {exit_code})"

    def _dismiss(self, worker: _Worker[Work, Result]) -> None:
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.join(5)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()

    def _end(self) -> None:
        for worker in self._workers:
            if worker.job:
                worker.process.kill()
        for worker in list(self._workers):
            self._dismiss(worker)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Children born in here ignore Ctrl-C: ending them is their parent's business."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    do: Callable[[Any, Alive], Any],
    timeout_s: float,
    connection: Connection,
) -> None:
    """What a worker process runs. Its decoders may shout: nobody listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(os.devnull, "w") as silence:  # noqa: PTH123
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)

        def alive(megabytes: float) -> None:
            seconds = timeout_s * (1 + megabytes / PATIENCE_MB)
            faulthandler.dump_traceback_later(seconds, exit=True, file=silence)

        while True:
            try:
                work = connection.recv()
                alive(0)
                connection.send(do(work, alive))
            except (EOFError, OSError):  # the parent is gone
                return
            faulthandler.cancel_dump_traceback_later()


# --- What was done before -----------------------------------------------------------

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (id INTEGER PRIMARY KEY, knobs TEXT);
CREATE TABLE IF NOT EXISTS sources (
    path BLOB PRIMARY KEY, size INT, mtime INT, run INT,
    output TEXT, reason TEXT, may_pass INT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outputs (
    name TEXT PRIMARY KEY, identity TEXT, source BLOB,
    moment TEXT, number INT, record TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS labelled (
    path BLOB PRIMARY KEY, size INT, mtime INT, run INT,
    identity TEXT, name TEXT) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS outputs_identity ON outputs (identity);
CREATE INDEX IF NOT EXISTS sources_output ON sources (output);
CREATE INDEX IF NOT EXISTS labelled_identity ON labelled (identity);
CREATE INDEX IF NOT EXISTS labelled_name ON labelled (name);
"""


class Ledger:
    """What phase 1 knows of sources, outputs and labelled files, kept in STATE.

    Used as a context manager; only one process can have it open.
    """

    def __init__(self, cfg: Config) -> None:
        self.source_dir = cfg.folder("input_dir")
        self.folder = cfg.folder("decompressed_dir")
        self.labelled_dir = cfg.folder("labelled_dir")
        self.counts: Counter[str] = Counter()
        self._knobs = (
            f"{config.PROGRAM_VERSION} {cfg.max_image_mb} {cfg.item_timeout_s}"
        )
        self._sealed = True

    def __enter__(self) -> Self:
        try:
            self._open()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:  # damaged: all is found out again
            self._database.close()
            (self.folder / STATE).unlink()
            self._open()
        return self

    def __exit__(self, *_: object) -> None:
        with closing(self._database):
            if self._database.in_transaction:
                self._database.execute("COMMIT")

    def _open(self) -> None:
        self._database = sqlite3.connect(
            self.folder / STATE, timeout=1, isolation_level=None
        )
        self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._database.execute("BEGIN EXCLUSIVE")
        for statement in SCHEMA.split(";"):
            self._database.execute(statement)
        if self._one("SELECT knobs FROM runs ORDER BY id DESC") != self._knobs:
            self._do("DELETE FROM sources WHERE reason != ''")
        self._do("INSERT INTO runs (knobs) VALUES (?)", self._knobs)
        self._run = self._one("SELECT max(id) FROM runs")
        self._committed = time.monotonic()

    def _do(self, statement: str, *values: object) -> sqlite3.Cursor:
        return self._database.execute(statement, values)

    def _one(self, statement: str, *values: object) -> Any:
        row = self._do(statement, *values).fetchone()
        return row[0] if row else None

    def _save_sometimes(self) -> None:
        if time.monotonic() - self._committed > SAVE_SECONDS:
            self._do("COMMIT")
            self._do("BEGIN EXCLUSIVE")
            self._committed = time.monotonic()

    # What is there

    def read_labelled(self) -> None:
        """Learn which images stand in the class folders; each is opened once ever."""
        for path in utils.find_files(self.labelled_dir):
            with suppress(OSError):
                self._read_labelled_file(path)
        self._do("DELETE FROM labelled WHERE run != ?", self._run)

    def _read_labelled_file(self, path: Path) -> None:
        key, facts = os.fsencode(path), path.stat()
        known = self._do(
            "UPDATE labelled SET run = ? WHERE path = ? AND size = ? AND mtime = ?",
            *(self._run, key, facts.st_size, facts.st_mtime_ns),
        )
        if known.rowcount == 0:
            self._do(
                "REPLACE INTO labelled VALUES (?, ?, ?, ?, ?, ?)",
                *(key, facts.st_size, facts.st_mtime_ns, self._run),
                *(identity_of(path), os.fsencode(path.name).decode("latin-1")),
            )

    def is_done(self, source: Path, facts: tuple[int, int]) -> bool:
        """Whether an unchanged file was settled before, and its output is there."""
        row = self._do(
            "UPDATE sources SET run = ? WHERE path = ? AND size = ? AND mtime = ?"
            " RETURNING output, reason, may_pass",
            *(self._run, self._key(source), *facts),
        ).fetchone()
        self._save_sometimes()
        if row is None:
            return False
        output, reason, may_pass = row
        if reason:
            self.counts["rejected"] += not may_pass
            return not may_pass
        if not self._is_there(output):
            return False
        self.counts["known"] += 1
        return True

    def _is_there(self, output: str) -> bool:
        """In f1_descomprimidos, or labelled: under its name, or alone with its UID."""
        if os.path.exists(f"{self.folder}/{output}"):  # noqa: PTH110 - 5 times as fast
            return True
        if self._one("SELECT 1 FROM labelled WHERE name = ?", output):
            return True
        return bool(
            self._one(
                "SELECT 1 FROM labelled JOIN outputs USING (identity)"
                " WHERE outputs.name = ? AND 1 = (SELECT count(*) FROM outputs AS twin"
                " WHERE twin.identity = labelled.identity)",
                output,
            )
        )

    def _key(self, source: Path) -> bytes:
        return os.fsencode(source.relative_to(self.source_dir).as_posix())

    # What happens

    def reject(
        self,
        source: Path,
        reason: str,
        may_pass: bool = False,
        facts: tuple[int, int] = (-1, -1),
    ) -> None:
        """Record why a file has no output."""
        log.debug("%s: %s", clean(source), reason)
        self.counts["rejected"] += 1
        self._record(source, facts, "", clean(reason), may_pass)

    def _record(
        self,
        source: Path,
        facts: tuple[int, int],
        output: str,
        reason: str = "",
        may_pass: bool = False,
    ) -> None:
        key = self._key(source)
        if not self._one(
            "SELECT 1 FROM sources WHERE path = ? AND output = ? AND reason = ?",
            *(key, output, reason),
        ):
            self._unseal()
        self._do(
            "REPLACE INTO sources VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(key, *facts, self._run, output, reason, may_pass),
        )
        self._save_sometimes()

    def _unseal(self) -> None:
        """The lists say "complete": they go before the first change."""
        if self._sealed:
            for name in (config.FILE_LIST, config.REJECTED_LIST):
                (self.folder / name).unlink(missing_ok=True)
        self._sealed = False

    def settle(self, task: Task, outcome: Outcome) -> None:
        """Give a converted file its final name, unless its image is there already."""
        if outcome.disk_error:
            raise PipelineError(
                f"{self.folder} can't be written: {outcome.disk_error}: free some space"
                " or choose another folder, then run the same command again"
            )
        if outcome.reason:
            self.reject(task.source, outcome.reason, outcome.may_pass, task.facts)
            return
        recorded, places = self._copies(outcome.identity)
        name = self._same(task, recorded, places)
        if name:
            task.temporary.unlink()
            self.counts["duplicate" if name in recorded else "labelled"] += 1
        else:
            name = self._free_name(task, outcome, recorded, places)
            self._unseal()
            task.temporary.replace(self.folder / name)
            self.counts["written"] += 1
        if name not in recorded or not places:
            self._record_output(task, outcome, name)
        self._record(task.source, task.facts, name)

    def _copies(self, identity: str) -> tuple[list[str], dict[Path, str]]:
        """Names given to this identity, and the files that hold it."""
        recorded = [
            name
            for (name,) in self._do(
                "SELECT name FROM outputs WHERE identity = ? ORDER BY name", identity
            )
        ]
        places = {self.folder / name: name for name in recorded}
        places = {path: name for path, name in places.items() if path.exists()}
        for path, name in self._do(
            "SELECT path, name FROM labelled WHERE identity = ? ORDER BY path", identity
        ):
            places[Path(os.fsdecode(path))] = name
        return recorded, places

    def _same(self, task: Task, recorded: list[str], places: dict[Path, str]) -> str:
        """Name of the output that has the same content, if there is one."""
        digest = content_digest(task.temporary) if places else ""
        for path, name in places.items():
            if content_digest(path) == digest:
                return name if name in recorded or len(recorded) != 1 else recorded[0]
        if places and not recorded:  # labelled in a run whose state is lost
            return next(iter(places.values()))
        return ""

    def _free_name(
        self, task: Task, outcome: Outcome, recorded: list[str], places: dict[Path, str]
    ) -> str:
        own = [name for name in recorded if name not in places.values()]
        if own and not places:
            return own[0]
        for name in own:
            source = self._one("SELECT source FROM outputs WHERE name = ?", name)
            if source == self._key(task.source):
                return name
        names = (f"{outcome.name[:-4]}_{count}.dcm" for count in itertools.count(2))
        for name in itertools.chain([outcome.name], names):
            if not self._one("SELECT 1 FROM outputs WHERE name = ?", name):
                return name
        raise AssertionError("unreachable: names never end")

    def _record_output(self, task: Task, outcome: Outcome, name: str) -> None:
        self._do(
            "REPLACE INTO outputs VALUES (?, ?, ?, ?, ?, ?)",
            *(name, outcome.identity, self._key(task.source)),
            *(outcome.record["timestamp"], min(outcome.number, 2**62)),
            json.dumps(dict(outcome.record)),
        )

    # The lists

    def write_lists(self) -> None:
        """Write manifiesto.csv and rechazados.csv, unless nothing has changed."""
        if self._one(
            "SELECT 1 FROM sources WHERE reason != '' AND run = ?", self._run - 1
        ):  # gone since the last run, and so should be its line
            self._unseal()
        if self._sealed and (self.folder / config.FILE_LIST).exists():
            return
        self._forget_lost_outputs()
        utils.write_csv(
            self.folder / config.REJECTED_LIST, ("source", "reason"), self.rejected()
        )
        utils.write_csv(self.folder / config.FILE_LIST, COLUMNS, self._manifest())

    def _forget_lost_outputs(self) -> None:
        names = self._do("SELECT name FROM outputs").fetchall()
        for (name,) in names:
            if not self._is_there(name):
                self._do("DELETE FROM outputs WHERE name = ?", name)

    def rejected(self) -> Iterator[dict[str, str]]:
        """Files of this run that have no output, and why."""
        for path, reason in self._do(
            "SELECT path, reason FROM sources WHERE reason != '' AND run = ?"
            " ORDER BY path",
            self._run,
        ):
            yield {"source": shown_path(path), "reason": reason}

    def _manifest(self) -> Iterator[dict[str, object]]:
        rows = self._do(
            "SELECT name, identity, source, record FROM outputs"
            " ORDER BY moment, number, identity, name"
        )
        for order, (name, identity, source, record) in enumerate(rows, 1):
            fields = json.loads(record)
            notes = [fields["notes"], *self._notes(name, identity, source)]
            yield {
                **fields,
                "order": order,
                "source": shown_path(source),
                "output": name,
                "notes": "; ".join(filter(None, notes)),
            }

    def _notes(self, name: str, identity: str, source: bytes) -> Iterator[str]:
        for (path,) in self._do(
            "SELECT path FROM sources WHERE output = ? AND path != ? ORDER BY path",
            *(name, source),
        ):
            yield f"the same image as {shown_path(path)}"
        if self._one("SELECT count(*) FROM outputs WHERE identity = ?", identity) > 1:
            yield SHARED_UID

    # The summary

    def totals(self) -> dict[str, int]:
        """Images per modality."""
        return dict(
            self._do(
                "SELECT json_extract(record, '$.modality'), count(*) FROM outputs"
                " GROUP BY 1 ORDER BY 2 DESC"
            )
        )

    def warnings(self) -> Iterator[str]:
        """What a person should know about the order and the images."""
        shared = self._one(
            "SELECT count(*) FROM (SELECT 1 FROM outputs GROUP BY identity"
            " HAVING count(*) > 1)"
        )
        if shared:
            yield f"{SHARED_UID}, with another content: {shared} times, all were kept"
        undated = self._one("SELECT count(*) FROM outputs WHERE moment = ?", NO_DATE)
        if undated:
            yield f"{undated} images have no date: they stand last"
        mixed = self._mixed_folders()
        for folder, sources in list(mixed.items())[:MAX_WARNINGS]:
            yield f"{folder} was ordered by different attributes: {', '.join(sources)}"
        if len(mixed) > MAX_WARNINGS:
            yield f"… and so were {len(mixed) - MAX_WARNINGS} more folders"

    def _mixed_folders(self) -> dict[str, list[str]]:
        """Folders whose images were ordered by different attributes, or zones."""
        found: dict[str, set[str]] = {}
        for source, used, notes in self._do(
            "SELECT source, json_extract(record, '$.time_source'),"
            " json_extract(record, '$.notes') FROM outputs"
        ):
            folder = shown_path(source.rpartition(b"/")[0]) or "the input folder"
            zone = " in UTC" if UTC_NOTE in notes else ""
            found.setdefault(folder, set()).add((used or "no date") + zone)
        return {
            name: sorted(used) for name, used in sorted(found.items()) if len(used) > 1
        }


def identity_of(path: Path) -> str:
    """What `Outcome.identity` was for a labelled file, from its file meta group."""
    with path.open("rb") as file:
        head = file.read(1 << 14)
    if head[128:132] != b"DICM":
        return ""
    _, meta = utils.read_file_meta(head, 132)
    uid = clean(meta.get(0x00020003, b"").decode("latin-1").strip("\0 "))
    return uid or f"sha256:{content_digest(path)}"


def shown_path(path: bytes) -> str:
    """A relative path for a spreadsheet: printable, and never a formula."""
    text = path.decode("utf-8", "backslashreplace")
    text = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return f"./{text}" if text.startswith(("=", "+", "-", "@")) else text


# --- The phase ----------------------------------------------------------------------


def run(cfg: Config) -> int:
    """Decompress what is new below the input folder; returns the exit code."""
    source_dir, folder = cfg.folder("input_dir"), cfg.folder("decompressed_dir")
    check_folders(source_dir, folder)
    make_folders(cfg)
    try:
        with Ledger(cfg) as ledger:
            ledger.read_labelled()
            crew = Crew(convert, cfg.jobs or os.cpu_count() or 1, cfg.item_timeout_s)
            tasks = new_tasks(ledger, source_dir, cfg.max_image_mb)
            with closing(crew.do_all(tasks)) as results:
                for task, result in results:
                    settle(ledger, task, result)
            if not ledger.counts:
                raise PipelineError(f"{source_dir} is empty: put DICOM files into it")
            ledger.write_lists()
            report(ledger)
            return utils.EXIT_SOME_FAILED if ledger.counts["rejected"] else 0
    except sqlite3.OperationalError as error:
        raise PipelineError(
            f"{folder / STATE}: {error}: {_state_remedy(error)}"
        ) from None


def check_folders(source_dir: Path, folder: Path) -> None:
    """Refuse a missing input, and an output that would become input."""
    if not source_dir.is_dir():
        raise PipelineError(f"{source_dir} is missing: put the DICOM files into it")
    if folder.resolve().is_relative_to(source_dir.resolve()):
        raise PipelineError(f"{folder} lies in {source_dir}: choose another folder")


def make_folders(cfg: Config) -> None:
    """Create what is missing and sweep up what a killed run left unfinished."""
    folder, labelled = cfg.folder("decompressed_dir"), cfg.folder("labelled_dir")
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(TEMPORARY):
        path.unlink(missing_ok=True)
    if not labelled.exists():
        for name in config.CLASS_NAMES:
            (labelled / name).mkdir(parents=True)


def new_tasks(ledger: Ledger, source_dir: Path, limit_mb: int) -> Iterator[Task]:
    """A task for every file that is not settled yet, in order of their names."""
    started = told = time.monotonic()
    for count, path in enumerate(utils.find_files(source_dir, ledger.reject), 1):
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            log.info("%d files after %.0f s", count, told - started)
        facts = facts_of(path)
        if not ledger.is_done(path, facts):
            name = TEMPORARY.replace("*", f"{os.getpid()}-{count}")
            yield Task(path, ledger.folder / name, limit_mb, facts)


def facts_of(path: Path) -> tuple[int, int]:
    """Size and time of change of a file that may have gone."""
    try:
        facts = path.stat()
    except OSError:
        return -1, -1
    return facts.st_size, facts.st_mtime_ns


def settle(ledger: Ledger, task: Task, result: Outcome | str) -> None:
    """Record the result, or the death of the worker, which may pass."""
    if isinstance(result, str):
        task.temporary.unlink(missing_ok=True)
        result = Outcome(result, may_pass=True)
    ledger.settle(task, result)


def report(ledger: Ledger) -> None:
    """Print what was done and what to do next."""
    counts = ledger.counts
    kinds = ", ".join(
        f"{count} {name or '?'}" for name, count in ledger.totals().items()
    )
    print(f"{sum(counts.values())} files in {ledger.source_dir}:")
    lines = {
        "written": f"images written to {ledger.folder} now",
        "known": "images were there before, here or labelled",
        "labelled": f"images found in {ledger.labelled_dir}, not written again",
        "duplicate": "files hold an image that is there already",
        "rejected": f"files left out: see {ledger.folder / config.REJECTED_LIST}",
    }
    for key, text in lines.items():
        if counts[key]:
            print(f"  {counts[key]:6d} {text}")
    for line in itertools.islice(ledger.rejected(), MAX_WARNINGS):
        log.warning("left out: %s: %s", line["source"], line["reason"])
    for warning in ledger.warnings():
        log.warning("warning: %s", warning)
    print(
        f"In order of exposure: {ledger.folder / config.FILE_LIST} ({kinds or 'none'})"
    )
    print(
        f"Next: move the files into {ledger.labelled_dir}/<CLASS>/ and run"
        " python fase2_generar_vectores_vlm.py"
    )


def _state_remedy(error: sqlite3.OperationalError) -> str:
    if "locked" in str(error):
        return "another phase 1 is at work here; wait for it to end"
    return "make sure that the folder can be written and the disk has space"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: flags, logging, one line for what a user can mend."""
    cfg, _ = config.parse_config(1, __doc__ or "", argv)
    utils.start_logging(log, cfg)
    return utils.exit_code(lambda: run(cfg), log.error)


if __name__ == "__main__":
    raise SystemExit(main())
