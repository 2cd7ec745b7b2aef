"""Phase 1: decompress every DICOM image and put the images in the order of exposure.

Reads   input_dicom/          any files, any depth, any name; never changed
Writes  f1_descomprimidos/
          *.dcm               one Explicit VR Little Endian file per image
          manifiesto.csv      one line per image, in chronological order
          rechazados.csv      what was left out, and why
        datos_etiquetados/    an empty folder per class, if it is not there

Files and folders whose name begins with a dot are passed over in silence: systems and
editors leave them behind, such as the ._ files of macOS.

Files are named after the acquisition: a file browser shows them in order. The pixels
are exactly those of the compressed file, and so is all of the header that
decompression need not change. A second run does only what is missing, and knows the
files that were moved to datos_etiquetados/ in the meantime.

    python fase1_descompresion.py
    python fase1_descompresion.py --base /data/qc --jobs 8
"""

import faulthandler
import filecmp
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
import threading
import time
from collections import Counter, deque
from collections.abc import (
    Callable,
    Container,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_VR, tag_for_keyword
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

PENDING = 32
"""Files per worker that may wait for an earlier one that takes long."""

HEAVY_IMPORTS = ["numpy", "pydicom", "imagecodecs", "PIL.Image"]
"""Loaded once for all worker processes, where the system can fork."""

IMPLEMENTATION_UID = "2.25.302418470214713250418632510948250124117"
IMPLEMENTATION_NAME = "DICOM_QC_FASE1"
SHARED_UID = "several images have one SOPInstanceUID"

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
        unknown = element.vr == "UN"  # little endian in every syntax: PS3.5 6.2.2
        code = NUMBER_CODES.get(implicit_vr(element.tag) if unknown else element.vr)
        if code is None:
            return self._text(raw).split("\\")[0].strip("\0 ") or None
        code = (">" if self.syntax.big_endian and not unknown else "<") + code
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


def rewrite(
    header: Header, changes: Changes, pixels: Iterable[Buffer] = ()
) -> Iterator[Buffer]:
    """The elements in Explicit VR Little Endian; values keep their bytes.

    Group lengths (PS3.5 7.2, retired) are left out, because they would be wrong.
    `changes` has whole encoded elements that replace or join those of the file, and
    `pixels` the pieces of a new pixel data element.
    """
    pending = deque(sorted(changes))
    for element in header.elements.values():
        while pending and pending[0] <= element.tag:
            yield changes[pending.popleft()]
        if pixels and element.tag == PIXEL_DATA:
            yield from pixels
        elif element.tag not in changes and element.tag & 0xFFFF:
            yield from _rewrite_element(header, element)
    yield from (changes[tag] for tag in pending)


def _rewrite_element(header: Header, element: Element) -> Iterator[Buffer]:
    data, syntax = header.data, header.syntax
    value = data[element.value : element.end]
    is_plain = syntax == EXPLICIT_LITTLE and not element.implicit
    if is_plain and not (element.vr == "SQ" and PIXEL_DATA_BYTES in bytes(value)):
        yield data[element.start : element.next]
    elif element.vr == "SQ" or (
        element.undefined and element.implicit and not element.tag >> 16 & 1
    ):
        content = b"".join(_rewrite_items(header, element))
        yield _element_header(element.tag, "SQ", len(content)) + content
    elif element.undefined:
        # An unknown sequence stays as it is: UN, implicit VR inside (PS3.5 6.2.2).
        yield _element_header(element.tag, "UN", UNDEFINED)
        yield data[element.value : element.next]
    else:
        vr = _decided_vr(header, element)
        if syntax.big_endian and vr in SWAP_BYTES:
            value = swapped(value, SWAP_BYTES[vr])
        yield encode_element(element.tag, vr, value)


def _decided_vr(header: Header, element: Element) -> str:
    """The VR to write, where the one that was read leaves a choice or can't be."""
    size = element.end - element.value
    if element.vr in utils.SHORT_VRS and size > 0xFFFE:
        return "UN"
    if element.implicit and element.vr in ("SS", "US"):
        with suppress(KeyError):
            if "US or SS" in dictionary_VR(element.tag):
                return "SS" if header.signed else "US"
    return element.vr


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


def moment_of(get: Callable[[str], Any]) -> tuple[str, str]:
    """The moment of exposure by the best attributes of a header, and which they are.

    The first attribute with a valid date decides. Where its time is missing or broken,
    another attribute of the same day lends its own; without one the day begins.
    Moments with a known offset from UTC are given in UTC. The text is
    YYYYMMDDTHHMMSS.ffffff, or NO_DATE.
    """
    dates = [one for one in _candidates(get) if one[0] is not None]
    if not dates:
        return NO_DATE, ""
    day, _, _, source = dates[0]
    for date, of_day, offset, name in dates:
        if date is None or of_day is None or date != day:
            continue
        used = source if name == source else f"{source} + time of {name}"
        with suppress(OverflowError):  # out of the calendar
            if offset is None:
                return _shown(date + of_day), used
            return _shown(date + of_day - offset), f"{used}, in UTC"
    assert day is not None
    return _shown(day), f"{source}, no valid time"


Candidate = tuple[datetime | None, timedelta | None, timedelta | None, str]


def _candidates(get: Callable[[str], Any]) -> Iterator[Candidate]:
    """(date, time of day, offset from UTC, attribute) in order of preference."""
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
    offset = offset if match[1] == "+" else -offset
    return offset if timedelta(hours=-12) <= offset <= timedelta(hours=14) else None


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
    facts: Facts = (-1, -1, -1)
    """Before it is read: a later change is seen next time."""


@dataclass(frozen=True)
class Outcome:
    """What became of a file; what a worker process sends back."""

    reason: str = ""
    """Why it was left out; empty when its output stands under the temporary name."""
    may_pass: bool = False
    """The reason may be gone the next time: the file is tried again."""
    disk_failed: bool = False
    """The output can't be written: no reason to go on."""
    identity: str = ""
    """SOPInstanceUID, or the digest of the output where there is none."""
    name: str = ""
    number: int = 0
    record: Mapping[str, str] = field(default_factory=dict)


class _DiskError(Exception):
    """The output can't be written."""


def convert(task: Task, alive: Alive) -> Outcome:
    """Decode one file into a temporary file beside its destination.

    `alive` is called before every part of the work with the megabytes it has.
    """
    try:
        return _convert(task, alive)
    except RejectedError as error:
        return Outcome(str(error))
    except MemoryError:
        return Outcome("needs more memory than there is", may_pass=True)
    except _DiskError as error:
        return Outcome(str(error), disk_failed=True)
    except OSError as error:
        return Outcome(f"can't be read: {error.strerror}", may_pass=True)
    except Exception as error:  # each decoder raises errors of its own
        return Outcome(f"can't be decoded: {type(error).__name__}: {error}")


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
        header.notes.extend(_meta_differences(header, encoding))
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
        first = next(frames)  # it may change the layout, or be refused

        def pixel_element() -> Iterator[Buffer]:
            vr = "OB" if self.layout.bits_allocated <= 8 else "OW"
            yield _element_header(PIXEL_DATA, vr, size + size % 2)
            for frame in itertools.chain([first], frames):
                alive(len(frame) / MEGABYTE)
                yield frame
            yield b"\0" * (size % 2)

        yield file_meta(self.header, self.encoding)
        yield from rewrite(self.header, changes, pixel_element())

    def _is_wrapped(self, value: memoryview) -> bool:
        """Some writers give fragments a length, which PS3.5 A.4 leaves undefined."""
        syntax = UID(self.encoding.transfer_syntax)
        says_so = syntax.is_transfer_syntax and syntax.is_encapsulated
        return says_so and bytes(value[:4]) == b"\xfe\xff\x00\xe0"

    def _native(self, value: memoryview) -> tuple[Iterator[Buffer], Changes, int]:
        syntax = UID(self.encoding.transfer_syntax)
        if not syntax.is_transfer_syntax:  # some have another byte order
            raise RejectedError(f"has an unknown transfer syntax: {clean(syntax)}")
        if len(value) < self.layout.size:
            raise RejectedError(
                f"is truncated: {len(value)} of {self.layout.size} bytes of pixels"
            )
        if self.encoding.big_endian:
            bits = self.layout.bits_allocated
            words = 2 if bits <= 8 and self.pixels.vr == "OW" else max(1, bits // 8)
            if words > 2 and self.pixels.vr == "OW":
                self.header.notes.append(f"bytes were swapped in words of {bits} bits")
            value = memoryview(swapped(value, words))
        if syntax.is_compressed:
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
        """One frame. No other decoder is asked for what imagecodecs refuses.

        Of damaged streams, GDCM and pylibjpeg make images that nobody took.
        """
        pixels = utils.decode_stream(stream, layout)
        if pixels.nbytes * self.layout.frames != self.layout.size:
            raise RejectedError("has frames of different sizes")
        return np.ascontiguousarray(pixels).data.cast("B")

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
        header = self.header
        in_meta = utils.meta_uid(self.encoding.meta, 0x00020003)
        uid = clean(header.get("SOPInstanceUID") or in_meta)
        identity = uid or f"sha256:{content_digest(temporary)}"
        timestamp, time_source = moment_of(header.get)
        mas, micro = header.number("Exposure"), header.number("ExposureInuAs")
        if micro is not None:  # Exposure holds whole mAs only: 1.7 stands as 1
            mas = micro / 1000
        record = {
            "timestamp": timestamp,
            "time_source": time_source,
            "sop_instance_uid": uid,
            "transfer_syntax": UID(self.encoding.transfer_syntax).name,
            "modality": clean(header.get("Modality") or ""),
            "manufacturer": clean(header.get("Manufacturer") or ""),
            "detector": clean(header.get("DetectorID") or ""),
            "kvp": shown_number(header.number("KVP")),
            "mas": shown_number(mas),
            "exposure_index": shown_number(header.number("ExposureIndex")),
            "rows": str(self.layout.rows),
            "columns": str(self.layout.columns),
            "bits": str(self.layout.bits_stored),
            "frames": str(self.layout.frames),
            "decoder": self.decoder,
            "notes": "; ".join(dict.fromkeys(header.notes)),
        }
        instance = header.number("InstanceNumber")
        return Outcome(
            identity=identity,
            name=output_name(record, identity),
            number=sys.maxsize if instance is None else int(instance),
            record=record,
        )


def shown_number(value: float | None) -> str:
    """A number without needless digits; nothing for None."""
    return "" if value is None else f"{value:.6g}"


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


META_UIDS = {0x00020002: "SOPClassUID", 0x00020003: "SOPInstanceUID"}


def _meta_differences(header: Header, encoding: Encoding) -> Iterator[str]:
    """Where the file meta group and the dataset don't say the same."""
    for tag, keyword in META_UIDS.items() if encoding.meta else ():
        ours = str(header.get(keyword) or "")
        theirs = utils.meta_uid(encoding.meta, tag)
        if ours and ours != theirs:
            yield f"its file meta group had {'another' if theirs else 'no'} {keyword}"


def file_meta(header: Header, encoding: Encoding) -> bytes:
    """Preamble and file meta group (PS3.10 7.1); who sent the file is kept."""
    elements = {
        0x00020001: ("OB", b"\0\1"),
        0x00020010: ("UI", ExplicitVRLittleEndian.encode()),
        0x00020012: ("UI", IMPLEMENTATION_UID.encode()),
        0x00020013: ("SH", IMPLEMENTATION_NAME.encode()),
    }
    for tag, keyword in META_UIDS.items():
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


class _Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    connection: Connection


class Crew:
    """Processes that convert files, each with a thread that waits for it.

    Each has a watchdog that ends it when it shows no sign of life for `timeout_s`,
    whatever its decoder is doing, and whether or not its parent is still there.
    A large frame is given more time: see PATIENCE_MB.
    """

    def __init__(
        self, do: Callable[[Task, Alive], Outcome], size: int, timeout_s: float
    ) -> None:
        methods = multiprocessing.get_all_start_methods()
        kind = "forkserver" if "forkserver" in methods else "spawn"
        self._context: Any = multiprocessing.get_context(kind)
        if kind == "forkserver":
            self._context.set_forkserver_preload(HEAVY_IMPORTS)
        self._do, self._size, self._timeout_s = do, size, timeout_s
        self._hired: list[_Worker] = []
        self._idle: list[_Worker] = []

    def do_all(
        self, tasks: Iterable[Task]
    ) -> Generator[tuple[Task, Outcome], None, None]:
        """Convert every file; the outcomes come in the order of the tasks."""
        pending: deque[tuple[Task, Future[Outcome]]] = deque()
        threads = ThreadPoolExecutor(self._size)
        try:
            for task in tasks:
                pending.append((task, threads.submit(self._do_one, task)))
                while pending and (
                    pending[0][1].done() or len(pending) >= PENDING * self._size
                ):
                    done, outcome = pending.popleft()
                    yield done, outcome.result()
            while pending:
                done, outcome = pending.popleft()
                yield done, outcome.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            self._end()
            threads.shutdown()
            self._end()  # whoever was hired in between

    def _do_one(self, task: Task) -> Outcome:
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = self._hire()
        try:
            worker.connection.send(task)
            outcome: Outcome = worker.connection.recv()
        except (EOFError, OSError):
            return Outcome(self._cause_of_death(worker), may_pass=True)
        self._idle.append(worker)
        return outcome

    def _hire(self) -> _Worker:
        here, there = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(self._do, self._timeout_s, there), daemon=True
        )
        with _no_interrupts():
            process.start()
        there.close()
        self._hired.append(_Worker(process, here))
        return self._hired[-1]

    def _cause_of_death(self, worker: _Worker) -> str:
        self._hired.remove(worker)
        worker.connection.close()
        worker.process.join(5)
        if worker.process.exitcode == 1:
            return f"given up after {self._timeout_s:g} s without a sign of life"
        return f"the decoder crashed on it (exit code {worker.process.exitcode})"

    def _end(self) -> None:
        for worker in list(self._hired):
            worker.process.kill()
            worker.process.join()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Children born in here ignore Ctrl-C: ending them is their parent's business."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Started by the first process, it would let interrupts through to its children.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    do: Callable[[Task, Alive], Outcome], timeout_s: float, connection: Connection
) -> None:
    """What a worker process runs. Its decoders may shout: nobody listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(os.devnull, "w") as silence:  # noqa: PTH123
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)

        def alive(megabytes: float) -> None:
            seconds = timeout_s * (1 + megabytes / PATIENCE_MB)
            faulthandler.dump_traceback_later(seconds, exit=True, file=silence)

        while True:
            try:
                task = connection.recv()
                alive(0)
                connection.send(do(task, alive))
            except (EOFError, OSError):  # the parent is gone
                return
            faulthandler.cancel_dump_traceback_later()


def _end_with_parent() -> None:
    """End this process when its parent is gone, whatever its decoder is doing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


# --- What was done before -----------------------------------------------------------

SCHEMA = """
CREATE TABLE IF NOT EXISTS sources (
    path BLOB PRIMARY KEY, size INT, mtime INT, ctime INT, run INT,
    output TEXT, reason TEXT, knobs TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outputs (
    name TEXT PRIMARY KEY, identity TEXT, source BLOB,
    moment TEXT, number INT, record TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS labelled (path BLOB, name TEXT, identity TEXT);
CREATE TABLE IF NOT EXISTS renamed (path BLOB PRIMARY KEY, output TEXT) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS outputs_identity ON outputs (identity);
CREATE INDEX IF NOT EXISTS sources_output ON sources (output);
CREATE INDEX IF NOT EXISTS labelled_identity ON labelled (identity);
CREATE INDEX IF NOT EXISTS labelled_name ON labelled (name);
CREATE INDEX IF NOT EXISTS renamed_output ON renamed (output);
DELETE FROM labelled
"""
"""`knobs` of a rejection: while they are the same, so is the reason; may be empty.

`renamed` says which output a labelled file was, where neither name nor UID tell.
"""

SCHEMA_VERSION = 3


class Ledger:
    """What phase 1 knows of sources, outputs and labelled files, kept in STATE.

    Used as a context manager; only one process can have it open.
    """

    def __init__(self, cfg: Config) -> None:
        self.source_dir = cfg.folder("input_dir")
        self.folder = cfg.folder("decompressed_dir")
        self.labelled_dir = cfg.folder("labelled_dir")
        self.counts: Counter[str] = Counter()
        self._knobs = f"{config.PROGRAM_VERSION} {cfg.max_image_mb}"

    def __enter__(self) -> Self:
        try:
            self._open()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:  # damaged, or another's: all is found out again
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
        is_new = not self._one("SELECT count(*) FROM sqlite_master")
        if not is_new and self._one("PRAGMA user_version") != SCHEMA_VERSION:
            raise sqlite3.DatabaseError("of another version")
        for statement in SCHEMA.split(";"):
            self._database.execute(statement)
        self._database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        if self._one("PRAGMA quick_check(1)") != "ok" or self._one(
            "SELECT count(*) FROM outputs WHERE NOT json_valid(record)"
        ):
            raise sqlite3.DatabaseError("damaged")
        self._run = self._one("SELECT 1 + coalesce(max(run), 0) FROM sources")
        self._saved = time.monotonic()

    def _do(self, statement: str, *values: object) -> sqlite3.Cursor:
        return self._database.execute(statement, values)

    def _one(self, statement: str, *values: object) -> Any:
        row = self._do(statement, *values).fetchone()
        return row[0] if row else None

    def _save_sometimes(self) -> None:
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._do("COMMIT")
            self._do("BEGIN EXCLUSIVE")
            self._saved = time.monotonic()

    # What is there

    def sweep(self) -> None:
        """Remove what a killed run left unfinished."""
        for path in self.folder.glob(TEMPORARY):
            path.unlink(missing_ok=True)

    def read_labelled(self) -> None:
        """Learn which images stand in the class folders."""
        for path in utils.find_files(self.labelled_dir, self._not_labelled):
            try:
                identity = identity_of(path)
            except FileNotFoundError:  # somebody is labelling
                continue
            except OSError as error:
                self._not_labelled(path, f"can't be read: {error.strerror}")
                continue
            name = os.fsencode(path.name).decode("latin-1")
            values = os.fsencode(path), name, identity
            self._do("INSERT INTO labelled VALUES (?, ?, ?)", *values)

    def _not_labelled(self, path: Path, reason: str) -> None:
        """Images that are there unseen would be written a second time."""
        if not os.path.islink(path):  # noqa: PTH114 - has no error of its own
            raise PipelineError(f"{path}: {reason}: phase 1 must see what is labelled")
        log.warning("warning: %s: %s; it doesn't count as labelled", path, reason)

    def is_done(self, source: Path, facts: Facts) -> bool:
        """Whether an unchanged file was settled before, and its output is there."""
        row = self._do(
            "UPDATE sources SET run = ? WHERE path = ? AND size = ? AND mtime = ?"
            " AND ctime = ? AND (reason = '' OR knobs = ?) RETURNING output, reason",
            *(self._run, self._key(source), *facts, self._knobs),
        ).fetchone()
        self._save_sometimes()
        if row is None or not (row[1] or self._is_there(row[0])):
            return False
        self.counts["rejected" if row[1] else "known"] += 1
        return True

    def _is_there(self, output: str) -> bool:
        """In f1_descomprimidos, or labelled: by name, as the only one with its UID,
        or renamed after its content had been compared.
        """
        if os.path.exists(f"{self.folder}/{output}"):  # noqa: PTH110 - 5 times as fast
            return True
        return bool(
            self._one(
                "SELECT 1 FROM labelled WHERE name = ?1 OR identity = ("
                " SELECT max(identity) FROM outputs WHERE identity = ("
                "  SELECT identity FROM outputs WHERE name = ?1) HAVING count(*) = 1)"
                " UNION SELECT 1 FROM labelled JOIN renamed USING (path)"
                "  WHERE output = ?1 AND identity = ("
                "   SELECT identity FROM outputs WHERE name = ?1)",
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
        facts: Facts = (-1, -1, -1),
        knobs: str = "",
    ) -> None:
        """Record why a file has no output; without `knobs` it is tried again."""
        log.debug("%s: %s", clean(source), reason)
        self.counts["rejected"] += 1
        self._record(source, facts, "", clean(reason), knobs)

    def _record(self, source: Path, facts: Facts, *what: str) -> None:
        self._do(
            "REPLACE INTO sources VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *(self._key(source), *facts, self._run, *what),
        )
        self._save_sometimes()

    def settle(self, task: Task, outcome: Outcome) -> None:
        """Give a converted file its final name, unless its image is there already."""
        if outcome.reason:
            task.temporary.unlink(missing_ok=True)
        if outcome.disk_failed:
            raise PipelineError(
                f"{self.folder} can't be written: {outcome.reason}: free some space"
                " or choose another folder, then run the same command again"
            )
        if outcome.reason:
            knobs = "" if outcome.may_pass else self._knobs
            self.reject(task.source, outcome.reason, task.facts, knobs)
            return
        name, kind = self._place(task, outcome)
        if kind == "written":
            # The list says "complete": it goes before the first change.
            (self.folder / config.FILE_LIST).unlink(missing_ok=True)
            task.temporary.replace(self.folder / name)
        else:
            task.temporary.unlink()
        self.counts[kind] += 1
        self._do(
            f"INSERT OR {'REPLACE' if kind == 'written' else 'IGNORE'} INTO outputs"
            " VALUES (?, ?, ?, ?, ?, ?)",
            *(name, outcome.identity, self._key(task.source)),
            *(outcome.record["timestamp"], max(-(2**62), min(outcome.number, 2**62))),
            json.dumps(dict(outcome.record)),
        )
        self._record(task.source, task.facts, name, "", "")

    def _place(self, task: Task, outcome: Outcome) -> tuple[str, str]:
        """Name of the image, and whether it is written, labelled or a duplicate.

        Files of one SOPInstanceUID are one image only if their content is the same. Of
        a labelled file the pixels will do: a person may have edited its header.
        """
        labelled = self._do(
            "SELECT path, name FROM labelled WHERE identity = ? ORDER BY path",
            outcome.identity,
        ).fetchall()
        for path, name in labelled:
            if same_content(Path(os.fsdecode(path)), task.temporary):
                return self._labelled_as(path, name, task, outcome), "labelled"
        name, kind = self._named(task, outcome, {name for _, name in labelled})
        for path, given in labelled if kind == "written" else ():
            if same_pixels(Path(os.fsdecode(path)), task):
                return self._labelled_as(path, given, task, outcome), "labelled"
        return name, kind

    def _named(
        self, task: Task, outcome: Outcome, taken: Container[str]
    ) -> tuple[str, str]:
        others = (f"{outcome.name[:-4]}_{count}.dcm" for count in itertools.count(2))
        for name in itertools.chain([outcome.name], others):
            path = self.folder / name
            if path.exists() and same_content(path, task.temporary):
                return name, "duplicate"
            if not path.exists() and name not in taken:
                return name, "written"
        raise AssertionError("unreachable: names never end")

    def _labelled_as(self, path: bytes, name: str, task: Task, outcome: Outcome) -> str:
        """The output that was moved to `path`, and perhaps renamed; remembered."""
        known = {
            output: (self.folder / output).exists()
            for (output,) in self._do(
                "SELECT name FROM outputs WHERE identity = ? ORDER BY name",
                outcome.identity,
            )
        }
        source = self._key(task.source)
        former = self._one("SELECT output FROM renamed WHERE path = ?", path)
        own = self._one("SELECT output FROM sources WHERE path = ?", source)
        moved = [output for output, is_there in known.items() if not is_there]
        candidates = [name, former, own, *moved]
        output = next((one for one in candidates if one in known), name)
        if output != name:
            self._do("REPLACE INTO renamed VALUES (?, ?)", path, output)
        return output

    # The lists

    def write_lists(self) -> None:
        """Write manifiesto.csv and rechazados.csv, unless nothing has changed."""
        for (name,) in self._do("SELECT name FROM outputs").fetchall():
            if not self._is_there(name):
                self._do("DELETE FROM outputs WHERE name = ?", name)
        path = self.folder / config.REJECTED_LIST
        write_if_changed(path, ("source", "reason"), self.rejected())
        write_if_changed(self.folder / config.FILE_LIST, COLUMNS, self._manifest())

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

    def modalities(self) -> dict[str, int]:
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
        found: dict[str, set[str]] = {}
        for source, used in self._do(
            "SELECT source, json_extract(record, '$.time_source') FROM outputs"
            " ORDER BY source"
        ):
            folder = shown_path(source.rpartition(b"/")[0]) or "the input folder"
            found.setdefault(folder, set()).add(used or "no date")
        for folder, sources in found.items():
            if len(sources) > 1:
                names = " / ".join(sorted(sources))
                yield f"{folder} was ordered by different attributes: {names}"


def write_if_changed(
    path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]
) -> None:
    """Write a CSV file, or leave the one that is there as it is."""
    fresh = path.with_name(TEMPORARY.replace("*", path.name))
    utils.write_csv(fresh, columns, rows)
    if path.exists() and filecmp.cmp(path, fresh, shallow=False):
        fresh.unlink()
    else:
        fresh.replace(path)


def identity_of(path: Path) -> str:
    """What `Outcome.identity` was for a labelled file, from its file meta group."""
    with path.open("rb") as file:
        head = file.read(1 << 14)
    if head[128:132] != b"DICM":
        return ""
    _, meta = utils.read_file_meta(head, 132)
    uid = clean(utils.meta_uid(meta, 0x00020003))
    return uid or f"sha256:{content_digest(path)}"


def same_content(path: Path, other: Path) -> bool:
    """Whether two files of ours hold the same dataset."""
    return content_digest(path) == content_digest(other)


def same_pixels(path: Path, task: Task) -> bool:
    """Whether a file holds the pixels just decoded, whatever their headers say."""
    digests = [pixel_digest(one, task.limit_mb) for one in (path, task.temporary)]
    return digests[0] == digests[1] != ""


def pixel_digest(path: Path, limit_mb: int) -> str:
    """SHA-256 of the value of the pixel data; empty where there is none."""
    try:
        data, encoding = utils.open_dicom(path, limit_mb)
        elements, _ = read_image(data, encoding)
    except RejectedError:
        return ""
    for one in elements:
        if one.tag == PIXEL_DATA:
            return hashlib.sha256(data[one.value : one.end]).hexdigest()
    return ""


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
            ledger.sweep()
            ledger.read_labelled()
            crew = Crew(convert, cfg.jobs or os.cpu_count() or 1, cfg.item_timeout_s)
            tasks = new_tasks(ledger, cfg.max_image_mb)
            with closing(crew.do_all(tasks)) as results:
                for task, outcome in results:
                    ledger.settle(task, outcome)
            if not ledger.counts:
                raise PipelineError(f"{source_dir} is empty: put DICOM files into it")
            ledger.write_lists()
            report(ledger)
            return utils.EXIT_SOME_FAILED if ledger.counts["rejected"] else 0
    except sqlite3.OperationalError as error:
        remedy = "make sure that the folder can be written and the disk has space"
        if "locked" in str(error):
            remedy = "another phase 1 is at work here; wait for it to end"
        raise PipelineError(f"{folder / STATE}: {error}: {remedy}") from None


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


def new_tasks(ledger: Ledger, limit_mb: int) -> Iterator[Task]:
    """A task for every file that is not settled yet, in order of their names."""
    started = told = time.monotonic()
    files = utils.find_files(ledger.source_dir, ledger.reject)
    for count, path in enumerate(files, 1):
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            log.info("%d files after %.0f s", count, told - started)
        facts = facts_of(path)
        if not ledger.is_done(path, facts):
            name = TEMPORARY.replace("*", f"{os.getpid()}-{count}")
            yield Task(path, ledger.folder / name, limit_mb, facts)


def facts_of(path: Path) -> Facts:
    """By what a changed file is known, where it has not gone."""
    try:
        facts = path.stat()
    except OSError:
        return -1, -1, -1
    latest = 2**63 - 1  # the year 2262, and the end of what SQLite can hold
    times = min(facts.st_mtime_ns, latest), min(facts.st_ctime_ns, latest)
    return facts.st_size, *times


def report(ledger: Ledger) -> None:
    """Print what was done and what to do next."""
    counts, file_list = ledger.counts, ledger.folder / config.FILE_LIST
    print(f"{counts.total()} files in {ledger.source_dir}:")
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
    rejected = (f"{line['source']}: {line['reason']}" for line in ledger.rejected())
    warn_of("left out", rejected)
    warn_of("warning", ledger.warnings())
    kinds = ledger.modalities().items()
    shown = ", ".join(f"{count} {name or '?'}" for name, count in kinds)
    print(f"In order of exposure: {file_list} ({shown or 'none'})")
    print(
        f"Next: move the files into {ledger.labelled_dir}/<CLASS>/ and run"
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
