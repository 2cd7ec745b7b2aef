"""What at least two phases need, in the order of the data.

Running a phase · Files · DICOM · The picture · The server · The decision · The page.
Silent and stateless: nothing here prints, exits or remembers.
"""

import asyncio
import base64
import codecs
import csv
import errno
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import random
import re
import signal
import stat
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeVar, cast
from urllib.parse import urlsplit

import filelock
import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filereader import data_element_generator, read_dataset
from pydicom.multival import MultiValue
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    convert_color_space,
)
from pydicom.pixels.utils import expand_ybr422
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pydicom.valuerep import VR

import config


def _imported_later(name: str) -> Any:
    """A module that is loaded at its first use: phases 1 and 3 ask no server."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    import httpx
    import ollama
else:
    httpx, ollama = _imported_later("httpx"), _imported_later("ollama")

Result = TypeVar("Result")
Item = TypeVar("Item")
Job = TypeVar("Job")

# --- Running a phase ----------------------------------------------------------------
# Owns errors, exit codes and the start of the log. Never decides what a phase does.


class PipelineError(Exception):
    """Something a user can mend; one line: what is wrong, where, what to do."""


class RejectedError(PipelineError):
    """One item can't be used; the message is its reason. The run goes on without it."""


class ModelChangedError(PipelineError):
    """A model was replaced on the server while a run was using it."""


EXIT_DONE, EXIT_SOME_FAILED, EXIT_COULD_NOT_RUN, EXIT_INTERRUPTED = 0, 1, 2, 130

_USUAL_REMEDY = "reconnect the drive or make room, then run the same command again"
_REMEDIES = {
    errno.EACCES: "give yourself permission to it or choose another folder",
    errno.EPERM: "give yourself permission to it or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOTDIR: "a file stands where a folder should be; move it away",
    errno.EEXIST: "a file stands where a folder should be; move it away",
    errno.EISDIR: "a folder stands where a file should be; move it away",
    errno.ENAMETOOLONG: "choose a shorter name or a folder nearer to the root",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or do less at a time",
}
_OPEN_ELSEWHERE = (5, 32, 33)
"""Windows: access denied, sharing violation, lock violation."""


def exit_code(run: Callable[[], int], complain: Callable[[str], object]) -> int:
    """Run a phase and turn what a user can cause into one line and an exit code.

    Parameters
    ----------
    run : callable
        The phase; returns its own exit code. A KeyboardInterrupt that it raises with a
        text has that text said: what is true of the phase then.
    complain : callable
        Takes the line that says what is wrong.

    Returns
    -------
    int
        What `run` returned; 2 when it could not run; 130 on Ctrl-C. Anything else is
        a bug and keeps its traceback.
    """
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # see the scripts' end
        code = run()
        if sys.stdout:  # None where the caller has closed it
            sys.stdout.flush()
        return code
    except PipelineError as error:
        complain(f"error: {error}")
    except KeyboardInterrupt as stopped:
        complain(f"interrupted{f': {stopped}' if str(stopped) else ''}")
        return EXIT_INTERRUPTED
    except OSError as error:
        if _reader_left(error):
            return EXIT_INTERRUPTED
        if error.errno is None:
            raise
        complain(f"error: {disk_problem(error)}")
    return EXIT_COULD_NOT_RUN


def _reader_left(error: OSError) -> bool:
    """Whether who read the output has left (`| head`); Python must not mind then."""
    left = isinstance(error, BrokenPipeError)
    if sys.platform == "win32":  # a closed pipe is EINVAL there
        left = left or (error.errno == errno.EINVAL and not error.filename)
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def disk_problem(error: OSError) -> str:
    """One line about a file or folder that failed: which, why, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    remedy = _REMEDIES.get(error.errno or 0, _USUAL_REMEDY)
    if getattr(error, "winerror", None) in _OPEN_ELSEWHERE:
        remedy = (
            "close it in the program that has it open, such as Excel, then run the "
            "same command again"
        )
    elif sys.platform == "win32" and len(str(error.filename)) > 259:
        remedy = "a path of over 259 characters: choose a folder nearer to the root"
    return f"{where}{error.strerror or error}: {remedy}"


def start_logging(logger: logging.Logger, cfg: config.Config) -> None:
    """Let a phase's own log speak on stderr, and keep those of the libraries silent.

    What the terminal's encoding lacks, such as a Cyrillic name, is shown escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.captureWarnings(True)
    for name in ("pydicom", "py.warnings", "asyncio"):  # not the user's business
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logger.setLevel(cfg.log_level)


# --- Files --------------------------------------------------------------------------
# Owns finding, writing, locking and the journal. Never changes a file of the user's.

_SYSTEM_FILES = ("thumbs.db", "desktop.ini")
_OWN_LISTS = re.compile(
    r"manifiesto\.csv|rechazados\.csv|etiquetas.*\.csv|vista_previa.*\.html"
)


def find_files(
    root: Path, skipped: Callable[[Path, str], object] | None = None
) -> Iterator[Path]:
    """Regular files below `root` at any depth, in order of their names.

    Passed over in silence: names that begin with a dot, what Windows leaves in folders,
    and the program's own lists and pages. Anything that is not a regular file is passed
    over, too (a FIFO would hang its reader). Links to files are followed; links to
    folders and junctions are not, so that no loop can catch the walk.

    Parameters
    ----------
    root : Path
        Where to start.
    skipped : callable, optional
        Told of every path that a user may miss, and why it was passed over.
    """
    tell = skipped or (lambda *_: None)

    def unreadable(error: OSError) -> None:
        tell(Path(error.filename), f"the folder can't be read: {error.strerror}")

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in list(subfolders):
            if _is_link(f"{folder}/{name}"):
                subfolders.remove(name)
                tell(Path(folder, name), "a link to a folder: links are not followed")
        for name in sorted(names):
            path = Path(folder, name)
            if _is_of_no_interest(path):
                continue
            if problem := _why_no_file(path):
                tell(path, problem)
            else:
                yield path


def _is_link(path: str) -> bool:
    """A symbolic link, or a junction of Windows, which os.walk would follow."""
    return os.path.islink(path) or (  # noqa: PTH114 - 10 times as fast
        sys.platform == "win32" and os.path.realpath(path) != os.path.abspath(path)  # noqa: PTH100
    )


def _is_of_no_interest(path: Path) -> bool:
    name = path.name
    if name.startswith(".") or name.lower() in _SYSTEM_FILES:
        return True
    if sys.platform == "win32":
        both = stat.FILE_ATTRIBUTE_HIDDEN | stat.FILE_ATTRIBUTE_SYSTEM
        if path.lstat().st_file_attributes & both == both:
            return True
    return _OWN_LISTS.fullmatch(name) is not None


def _why_no_file(path: Path) -> str:
    try:
        is_file = path.is_file()
    except OSError as error:
        return f"can't be read: {error.strerror}"
    return "" if is_file else "not a regular file, or a link that leads nowhere"


def _while_open_elsewhere(action: Callable[[], object]) -> None:
    """Do it; on Windows again for two seconds, as virus scanners hold files briefly."""
    deadline = time.monotonic() + 2.0
    while True:
        try:
            action()
            return
        except OSError as error:
            in_use = getattr(error, "winerror", None) in _OPEN_ELSEWHERE
            if not in_use or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def replace_file(temporary: Path, path: Path) -> None:
    """Rename a file, over another if need be."""
    _while_open_elsewhere(lambda: os.replace(temporary, path))  # noqa: PTH105


def remove_file(path: Path) -> None:
    """Remove a file, if it is there."""
    _while_open_elsewhere(lambda: path.unlink(missing_ok=True))


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when all is on disk.

    A name of its own in the same folder, flush, fsync, rename: a reader sees the old
    file or the whole new one, never a part, whoever else is writing it. On any
    exception the temporary file goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=".", suffix=".tmp", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
            file.close()
            temporary.chmod(0o666 & ~_umask())
            replace_file(temporary, path)
        except BaseException:
            file.close()
            remove_file(temporary)
            raise


def _umask() -> int:
    """What new files are denied; tempfile makes its own for one user alone."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as indented UTF-8 JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object; `remedy` says what to do where there is none.

    Raises
    ------
    PipelineError
        The file is missing, unreadable or not a JSON object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing: {remedy}") from None
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path} can't be read ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise PipelineError(f"{path} is not a JSON object: {remedy}")
    return content


def write_csv(
    path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]
) -> None:
    """Write rows as UTF-8 CSV with BOM and a header line, atomically.

    A name that is not UTF-8 keeps its bytes: `read_csv` gives it back as it was.
    """
    with atomic_write(path) as file:
        text = csv_text(file)
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text.detach()


def csv_text(file: BinaryIO) -> io.TextIOWrapper:
    """The text side of a CSV file: a BOM, for a Spanish Excel, then UTF-8."""
    file.write(codecs.BOM_UTF8)
    return io.TextIOWrapper(
        file, "utf-8", errors="surrogateescape", newline="", write_through=True
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a CSV file of UTF-8 with or without BOM."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: Path, expected: str | None, remedy: str) -> None:
    """Refuse a file that is not the one whose SHA-256 a manifest records.

    Raises
    ------
    PipelineError
        The file is missing, or its bytes are others.
    """
    if not path.is_file():
        raise PipelineError(f"{path} is missing: {remedy}")
    if sha256_of(path) != expected:
        raise PipelineError(
            f"{path} is not the file that was written (changed, damaged or from "
            f"another run): {remedy}"
        )


@contextmanager
def lock(path: Path, held: str) -> Iterator[None]:
    """Hold a lock file; PipelineError with the line `held` where another has it.

    The operating system drops the lock of a process that dies, so none can go stale.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path, timeout=0):
            yield
    except filelock.Timeout:
        raise PipelineError(held) from None


class Journal:
    """Append-only JSON Lines: key -> newest record.

    `add` returns when the record is on disk. A damaged, torn or foreign line is skipped
    and costs one question. Several processes may add to one file, under its lock.

    Parameters
    ----------
    path : Path
        The file; made by the first `add`.
    sync_every_s : float
        Records may wait so long for the disk; a kill of the machine then loses them.
    lock_file : Path, optional
        Held by every `add`, where more than one process may write.
    """

    def __init__(
        self, path: Path, sync_every_s: float = 0.0, lock_file: Path | None = None
    ) -> None:
        self.path, self._every, self._synced = path, sync_every_s, 0.0
        self._lock = filelock.FileLock(lock_file) if lock_file else nullcontext()
        self._records: dict[str, dict[str, Any]] = {}
        self._read_to = 0
        self.refresh()

    def refresh(self) -> None:
        """Read what was added since, by whomever."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if line.endswith(b"\n"):  # else torn
                    self._read_to += len(line)
                    self._take(line)

    def get(self, key: str) -> dict[str, Any] | None:
        """The newest record under a key."""
        return self._records.get(key)

    def items(self) -> list[tuple[str, dict[str, Any]]]:
        """All keys with their newest records, in the order of their first lines."""
        return list(self._records.items())

    def add(self, *records: Mapping[str, Any]) -> None:
        """Keep records, each with its "key"; {"taken_back": keys} forgets those."""
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in records]
        with self._lock:
            self.refresh()
            with self.path.open("ab") as file:
                if file.tell() > self._read_to:  # a torn line must not swallow this
                    file.write(b"\n")
                file.write("".join(lines).encode("utf-8", "backslashreplace"))
                file.flush()
                if time.monotonic() - self._synced >= self._every:
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()
            self.refresh()

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not isinstance(record, dict):
            return
        for name in ("key", "answer", "embedding"):  # the last two: version 1.0
            if isinstance(record.get(name), str):
                self._records[record.pop(name)] = record
                return
        if isinstance(bad := record.get("quarantined"), str):  # version 1.0
            self._records[bad] = {**self._records.get(bad, {}), "quarantined": True}
        for key in record.get("taken_back") or ():
            self._records.pop(key, None)


# --- DICOM --------------------------------------------------------------------------
# Owns the way from a file to its stored values: the same for phase 1, which writes
# them, and for phases 2 and 4, which look at them. Never changes a file, and believes
# no decoder that it has not checked.
#
# pydicom reads the elements. Not by `dcmread`, which inflates without bound, believes
# in the byte order that the file names and returns nothing where a delimiter is
# missing. Frames go to imagecodecs directly: pydicom's decoders take the word of the
# transfer syntax for that of the codestream and fall back on GDCM, which aborts the
# process on damaged streams, or makes images of them that nobody took.

PIXEL_DATA, ITEM_GROUP, UNDEFINED_LENGTH = 0x7FE00010, 0xFFFE, 0xFFFFFFFF
KNOWN_VRS = frozenset(vr.value for vr in VR if len(vr) == 2)
BLANK_VRS = (b"  ", b"--", b"??")
"""What some writers put where a VR should stand; a 16-bit length follows."""

HEADER_MB = 64
"""Room for the header beside --max-image-mb."""

Elements = dict[BaseTag, RawDataElement | DataElement]

_OTHER_KINDS = {
    **{b"%PDF": "a PDF document", b"PK": "a ZIP archive or an office document"},
    **{b"\xff\xd8\xff": "a JPEG picture", b"\x89PNG": "a PNG picture"},
    **{
        b"II*\0": "a TIFF picture",
        b"MM\0*": "a TIFF picture",
        b"GIF8": "a GIF picture",
    },
    **{b"\x1f\x8b": "a gzip archive", b"<": "an XML or HTML document"},
}


def read_dicom(path: Path, limit_mb: int = config.Config.max_image_mb) -> FileDataset:
    """Read a DICOM file, whatever its preamble and file meta group say (PS3.10 7.1).

    The dataset holds raw elements; ``file_meta.TransferSyntaxUID`` says how the bytes
    are encoded, and the attribute ``notes`` (list of str) what had to be mended.

    Parameters
    ----------
    path : Path
        A regular file; anything else is refused without being opened for long.
    limit_mb : int
        Refuse files that are, or inflate to, more than this and HEADER_MB.

    Raises
    ------
    RejectedError
        Not a DICOM file, damaged or too large.
    OSError
        The file can't be read, or changed meanwhile.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(path, flags), "rb") as file, _silence():  # noqa: PTH123
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise RejectedError("is not a regular file")
        begin = _first_element(file.read(512))
        if before.st_size > limit_mb + HEADER_MB << 20:
            raise RejectedError(f"is larger than {limit_mb + HEADER_MB} MB")
        file.seek(begin)
        try:
            dataset = _read_dataset(file, before.st_size, limit_mb + HEADER_MB)
        except (RejectedError, MemoryError):
            raise
        except Exception as error:  # pydicom raises whatever a broken header provokes
            if isinstance(error, OSError) and error.errno:
                raise
            raise RejectedError(f"can't be read as DICOM: {error}") from None
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError(errno.EAGAIN, "changed while it was read", str(path))
    return dataset


@contextmanager
def _silence() -> Iterator[None]:
    """Keep to ourselves what pydicom remarks on headers that it reads all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_element(head: bytes) -> int:
    """Its offset; RejectedError where there can't be one."""
    if head[128:132] == b"DICM":
        return 132
    group, element = struct.unpack_from("<HH", head) if len(head) >= 8 else (0, 0)
    if group in (2, 4, 8, 0x0200, 0x0400, 0x0800):
        (length,) = struct.unpack_from("<L" if group < 9 else ">L", head, 4)
        if _names_vr(head) or (element < 0x2000 and length <= 1024):
            return 0
    kinds = (kind for magic, kind in _OTHER_KINDS.items() if head.startswith(magic))
    kind = next((f" but {kind}" for kind in kinds), "")
    raise RejectedError(f"is not a DICOM file{kind}" if head else "is empty")


def _names_vr(element: bytes) -> bool:
    return element[4:6].decode("latin-1") in KNOWN_VRS


def _read_dataset(file: BinaryIO, size: int, limit_mb: int) -> FileDataset:
    begin = file.tell()
    meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    start, notes = file.tell(), list(_meta_faults(meta, begin, file.tell()))
    named = text(meta, "TransferSyntaxUID")
    first = file.read(8)
    if len(first) < 8:
        raise RejectedError("is truncated: there is nothing after the file meta group")
    file.seek(start)
    deflated = named == DeflatedExplicitVRLittleEndian
    if deflated and (data := _inflate(file.read(), limit_mb, not _names_vr(first))):
        file, size, start, first = io.BytesIO(data), len(data), 0, data[:8]
    file.seek(start)
    little, big = struct.unpack("<H", first[:2])[0], struct.unpack(">H", first[:2])[0]
    implicit, is_little = not _names_vr(first), not (big < little and big <= 0x20)
    native = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
    native = ImplicitVRLittleEndian if implicit else native
    uid = UID(named or native)
    if uid.is_transfer_syntax and (
        (uid.is_implicit_VR, uid.is_little_endian) != (implicit, is_little)
        or (deflated and not isinstance(file, io.BytesIO))
    ):
        notes.append(f"said {uid.name}, is {native.name}")
        uid = native
    elements = _read_elements(file, size, implicit, is_little, notes)
    dataset = FileDataset(
        file, elements, None, FileMetaDataset(meta), implicit, is_little
    )
    dataset.file_meta.add_new("TransferSyntaxUID", "UI", uid)
    dataset.notes = notes
    return dataset


def _meta_faults(meta: Dataset, begin: int, end: int) -> Iterator[str]:
    """What is wrong with the file meta group between two offsets (PS3.10 7.1)."""
    if not meta:
        yield "had no file meta group"
        return
    if not begin:
        yield "had no preamble"
    if getattr(next(iter(meta.elements())), "is_implicit_VR", False):
        yield "its file meta group was in implicit VR"
    if text(meta, "FileMetaInformationGroupLength") != str(end - begin - 12):
        yield "its file meta group had a wrong length"
    if not text(meta, "TransferSyntaxUID"):
        yield "had no transfer syntax"


def _inflate(data: bytes, limit_mb: int, surely: bool) -> bytes:
    """Inflate a dataset (PS3.5 A.5) of bounded size; b"" where it isn't deflated."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(data, limit_mb + 1 << 20)
        if inflater.eof and len(inflated) <= limit_mb << 20:
            return inflated
    except zlib.error as error:
        problem = f"the deflated dataset is damaged: {error}"
    else:
        problem = "is truncated: the deflated dataset does not end"
        if len(inflated) > limit_mb << 20:
            problem, surely = f"inflates to more than {limit_mb} MB", True
    if surely:
        raise RejectedError(problem)
    return b""


class _MendableError(Exception):
    """Bytes that pydicom can't read past: `length` of them, at `at`, become `mended`."""

    def __init__(self, at: int, length: int, mended: bytes, note: str) -> None:
        super().__init__(note)
        self.at, self.length, self.mended, self.note = at, length, mended, note


def _read_elements(
    file: BinaryIO, size: int, implicit: bool, little: bool, notes: list[str]
) -> Elements:
    """The elements of a dataset, raw; what follows the image is left out."""
    start = file.tell()
    while True:
        elements: Elements = {}
        try:
            end = _walk(elements, file, size, implicit, little)
            break
        except _MendableError as fault:
            notes.append(str(fault))
            file.seek(0)
            data = bytearray(file.read())
            data[fault.at : fault.at + fault.length] = fault.mended
            file, size = io.BytesIO(data), len(data)
            file.seek(start)
    if size - end > 1:
        notes.append(f"{size - end} bytes after the dataset left out")
    for tag in [one for one in elements if one.group in (0, 2, ITEM_GROUP)]:
        value = elements.pop(tag).value or b""
        notes.append(f"{tag} of {len(value)} bytes left out: it has no place there")
    return elements


def _walk(
    elements: Elements, file: BinaryIO, size: int, implicit: bool, little: bool
) -> int:
    """Read the elements, and where they end.

    pydicom reads a value that is longer than the file, and one after a VR that it
    doesn't know, without a word: so each element is looked at before its value is read.
    """
    last, end = 0, file.tell()

    def is_no_part(tag: BaseTag, vr: str | None, length: int) -> bool:
        nonlocal last
        at = file.tell()
        if not implicit and vr not in KNOWN_VRS and tag.group != ITEM_GROUP:
            _check_vr(file, at - 8)
        too_long = length != UNDEFINED_LENGTH and at + length > size
        if last >= PIXEL_DATA and (too_long or tag <= last):
            return True
        if too_long:
            raise RejectedError(
                f"is truncated: {tag} says {length} bytes, {size - at} are there"
            )
        last = last if tag.group == ITEM_GROUP else tag
        return False

    try:
        for element in data_element_generator(file, implicit, little, is_no_part):
            elements[element.tag], end = element, file.tell()
    except EOFError:  # no delimiter before the end of the file
        if PIXEL_DATA not in elements and last == PIXEL_DATA:
            note = "its compressed pixels had no delimiter at their end"
            raise _MendableError(size, 0, b"\xfe\xff\xdd\xe0\0\0\0\0", note) from None
        if PIXEL_DATA not in elements:
            raise
    return end


def _check_vr(file: BinaryIO, at: int) -> None:
    """Make UN of a VR that pydicom reads with the wrong kind of length (PS3.5 6.2.2).

    A VR of a later edition has 32 bits of length, a blank one has 16. Where neither
    stands, the element is in implicit VR, which pydicom sees.
    """
    here = file.tell()
    file.seek(at + 4)
    vr, length = struct.unpack("<2sH", file.read(4))
    file.seek(here)
    note = f"the unknown VR {vr.decode('latin-1')!r} became UN"
    if vr in BLANK_VRS:
        raise _MendableError(at + 4, 4, struct.pack("<2sHL", b"UN", 0, length), note)
    if vr.isalpha() and vr.isupper() and not length:
        raise _MendableError(at + 4, 2, b"UN", note)


def texts(dataset: Dataset, keyword: str) -> list[str]:
    """The values of an element as text; what can't be parsed comes as it stands."""
    try:
        with _silence():
            value = dataset.get(keyword)
    except Exception:  # pydicom raises whatever a broken value provokes
        raw: Any = dataset.get_item(keyword)
        value = bytes(raw.value or b"")[:1024].decode("latin-1")
    several = value if isinstance(value, MultiValue) else str(value).split("\\")
    clean = [str(one).strip("\0 ") for one in several]
    return [] if value is None else clean


def text(dataset: Dataset, keyword: str) -> str:
    """The first value of an element as text; empty where there is none."""
    return next(iter(texts(dataset, keyword)), "")


def number(value: str) -> float | None:
    """A finite number, or None: a header may hold anything."""
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


# Decoding: PS3.5 8.1.1 (stored values), 8.2 and A.4 (codestreams).


@dataclass(frozen=True)
class PixelLayout:
    """The image pixel attributes that say how samples lie in the pixel data."""

    rows: int
    columns: int
    samples: int
    frames: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    photometric: str
    high_bit: int
    planar: int = 0

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        """Read the attributes; one that is missing or impossible has its usual value.

        Raises
        ------
        RejectedError
            There are no pixels by these attributes, or they can't be meant.
        """

        def whole(keyword: str) -> int:
            return int(number(text(dataset, keyword)) or 0)

        allocated, samples = whole("BitsAllocated"), whole("SamplesPerPixel")
        photometric = text(dataset, "PhotometricInterpretation").upper()
        fits = samples == 0 or (samples == 3) == (photometric in _COLOUR)
        if photometric not in _GREY | _COLOUR or not fits:
            photometric = "RGB" if samples == 3 else "MONOCHROME2"
        samples = samples or (1 if photometric in _GREY else 3)
        stored, high = whole("BitsStored"), whole("HighBit")
        stored = stored if 0 < stored <= allocated else allocated
        layout = cls(
            rows=whole("Rows"),
            columns=whole("Columns"),
            samples=samples,
            frames=whole("NumberOfFrames") or 1,
            bits_allocated=allocated,
            bits_stored=stored,
            signed=whole("PixelRepresentation") == 1,
            photometric=photometric,
            high_bit=high if stored <= high + 1 <= allocated else stored - 1,
            planar=int(samples > 1 and whole("PlanarConfiguration") == 1),
        )
        if min(layout.rows, layout.columns, layout.frames) < 1:
            raise RejectedError("holds no image: rows, columns or frames are missing")
        if samples not in (1, 3) or not 1 <= allocated <= 64:
            raise RejectedError(
                f"says {samples} samples of {allocated} bits: no pixel is like that"
            )
        return layout

    @property
    def frame_samples(self) -> int:
        """Samples of a frame; native 4:2:2 has two a pixel (PS3.3 C.7.6.3.1.2)."""
        of_pixel = 2 if self.photometric.endswith("_422") else self.samples
        return self.rows * self.columns * of_pixel

    @property
    def size(self) -> int:
        """Bytes of all frames, as they lie in native pixel data."""
        return (self.frames * self.frame_samples * self.bits_allocated + 7) // 8

    def attributes(self) -> dict[str, int | str]:
        """Keyword -> value of the attributes that a header must have."""
        grey: dict[str, int | str] = {
            "SamplesPerPixel": self.samples,
            "PhotometricInterpretation": self.photometric,
            "BitsAllocated": self.bits_allocated,
            "BitsStored": self.bits_stored,
            "HighBit": self.high_bit,
            "PixelRepresentation": int(self.signed),
        }
        return grey | ({"PlanarConfiguration": self.planar} if self.samples > 1 else {})

    def differences(self, dataset: Dataset) -> Iterator[str]:
        """What a header lacks or can't mean, and how it was taken."""
        for keyword, value in self.attributes().items():
            if (said := text(dataset, keyword)) != str(value):
                yield f"{keyword} {said or 'was missing'}: taken as {value}"

    def decoded(self, facts: "StreamFacts") -> Self:
        """The layout of the decoded pixels, by what their codestream says."""
        allocated, photometric = self.bits_allocated, self.photometric
        if facts.precision > allocated or allocated % 8:
            allocated = 8 << max(0, (facts.precision - 1).bit_length() - 3)
        photometric = "RGB" if facts.comes_out_rgb else photometric.removesuffix("_422")
        return replace(
            self, bits_allocated=allocated, photometric=photometric, planar=0
        )


_GREY = frozenset(("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"))
_COLOUR = frozenset(
    (
        *("RGB", "HSV", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422"),
        *("YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT"),
    )
)


@dataclass(frozen=True)
class Pixels:
    """What decoding makes of an image."""

    values: NDArray[Any]
    """Stored values, little endian, (frames, …) in the order of native pixel data."""
    layout: PixelLayout
    """How they lie there, as the header must say."""
    codec: str
    """Of the codestream; empty where the pixels were native."""
    overlays: Mapping[int, bytes]
    """Group -> overlay data that stood in unused bits."""
    notes: list[str]
    """What had to be mended or left out."""


def decode(
    dataset: Dataset,
    limit_mb: int = config.Config.max_image_mb,
    middle_only: bool = False,
) -> Pixels:
    """Stored values of an image, by one rule for every transfer syntax.

    Parameters
    ----------
    dataset : Dataset
        As `read_dicom` returns it, or an item of it such as an icon.
    limit_mb : int
        Refuse images that would take more megabytes.
    middle_only : bool
        Decode the one frame that stands for a multi-frame image.

    Raises
    ------
    RejectedError
        No image, or one that is damaged, too large or contradicts its header.
    Exception
        Whatever imagecodecs raises on a damaged stream.
    """
    element: Any = dataset.get_item(PIXEL_DATA)
    if element is None or not element.value:
        raise RejectedError("holds no image")
    layout, value = PixelLayout.of(dataset), element.value
    notes = list(layout.differences(dataset))
    uid = UID(text(getattr(dataset, "file_meta", Dataset()), "TransferSyntaxUID"))
    is_known = uid.is_transfer_syntax or not uid
    if _NOT_STILL_IMAGES.fullmatch(uid):
        raise RejectedError(f"{uid.name} is not for this program")
    if layout.size > min(limit_mb << 20, UNDEFINED_LENGTH - 1):
        size_mb = layout.size >> 20
        raise RejectedError(f"would decode to {size_mb} MB: see --max-image-mb")
    wrapped = value[:4] == _ITEM and is_known and uid and uid.is_encapsulated
    middle = layout.frames // 2
    wanted = slice(middle, middle + 1) if middle_only else slice(None)
    precision, codec = 0, ""
    if wrapped or getattr(element, "length", 0) == UNDEFINED_LENGTH:
        streams = _streams(value, layout.frames, notes)
        facts = stream_facts(streams[0], layout)
        precision, codec = facts.precision, facts.codec
        if codec not in _CODECS.get(uid, codec):
            notes.append(f"said {uid.name}, is {codec}")
        frames = [decode_stream(one, layout, notes) for one in streams[wanted]]
        values = frames[0][None] if len(frames) == 1 else np.stack(frames)
        layout = layout.decoded(facts)
    elif not is_known:  # some have another byte order
        raise RejectedError(f"has an unknown transfer syntax: {uid}")
    else:
        if uid and uid.is_compressed and not uid.is_deflated:
            notes.append("said compressed, is not")
        values = _native(value, element, layout, not uid or uid.is_little_endian, notes)
        values = values[wanted]
        layout = replace(layout, bits_allocated=8 * values.itemsize)
    planes = _embedded_overlays(dataset, layout)
    if middle_only and layout.frames > 1 and not _fits(values, layout):
        # Whether more bits are used than the header says, all frames decide.
        whole = decode(dataset, limit_mb)
        return replace(whole, values=whole.values[wanted])
    overlays = {
        group: np.packbits(_bits(values) >> bit & 1, bitorder="little").tobytes()
        for group, bit in planes.items()
    }
    values, layout = _stored(values, layout, planes.values(), precision, notes)
    return Pixels(values, layout, codec, overlays, notes)


def _native(
    value: bytes, element: Any, layout: PixelLayout, little: bool, notes: list[str]
) -> NDArray[Any]:
    """Samples of native pixel data, (frames, samples) in the order of storage."""
    bits, count = layout.bits_allocated, layout.frames * layout.frame_samples
    if len(value) < layout.size:
        raise RejectedError(
            f"is truncated: {len(value)} of {layout.size} bytes of pixels"
        )
    if (excess := len(value) - layout.size) > 1:
        notes.append(f"{excess} bytes after the last frame left out")
    if not little and bits < 16 and element.VR == "OW":  # PS3.5 A.3: words are swapped
        value = np.frombuffer(value, "u2", len(value) // 2).byteswap().tobytes()
    if not little and bits > 16 and element.VR == "OW":
        notes.append(f"bytes were swapped in words of {bits} bits")
    if bits == 1:
        packed = np.frombuffer(value, np.uint8)
        samples = np.unpackbits(packed, count=count, bitorder="little")
    elif bits == 12:  # three bytes hold two samples
        nibbles = np.frombuffer(value, np.uint8)[:, None] >> (0, 4) & 15
        parts = nibbles.ravel()[: 3 * count].reshape(-1, 3).astype("<u2")
        samples = parts[:, 0] | parts[:, 1] << 4 | parts[:, 2] << 8
    elif bits in (8, 16, 32, 64):
        kind = f"{'<' if little else '>'}{'i' if layout.signed else 'u'}{bits // 8}"
        samples = np.frombuffer(value, kind, count)
    else:
        raise RejectedError(f"has native pixels of {bits} bits")
    return samples.astype(samples.dtype.newbyteorder("<"), copy=False).reshape(
        layout.frames, -1
    )


def _bits(samples: NDArray[Any]) -> NDArray[Any]:
    return samples.view(f"u{samples.itemsize}")


def _fits(samples: NDArray[Any], layout: PixelLayout) -> bool:
    """Whether nothing stands outside the stored bits: then nothing is to be done."""
    low, size = layout.high_bit + 1 - layout.bits_stored, 1 << layout.bits_stored
    if layout.bits_stored == 8 * samples.itemsize:
        return True
    if samples.dtype.kind == "u":
        return low == 0 and bool(samples.max() < size)
    return low == 0 and bool(-size // 2 <= samples.min() and samples.max() < size // 2)


def _stored(
    samples: NDArray[Any],
    layout: PixelLayout,
    named: Iterable[int],
    precision: int,
    notes: list[str],
) -> tuple[NDArray[Any], PixelLayout]:
    """The stored values of decoded samples: what is outside BitsStored is no pixel.

    Bits outside that vary from sample to sample and are not `named` as an overlay tell
    that the header is wrong, not the image: then BitsStored grows. Those that only
    repeat the sign are its extension, and those that never change mean nothing.
    """
    if not _fits(samples, layout):
        bits, top = _bits(samples), layout.high_bit + 1
        low, width = top - layout.bits_stored, 8 * samples.itemsize
        if mask := sum(1 << bit for bit in named):
            bits = bits & ~bits.dtype.type(mask)
        flat = bits.ravel()
        varying = int(np.bitwise_or.reduce(flat)) & ~int(np.bitwise_and.reduce(flat))
        used = varying.bit_length()
        if layout.signed:
            changes = int(np.bitwise_or.reduce(flat ^ flat >> 1))
            while used > top and not changes >> used - 2 & 1:
                used -= 1
        low, top = 0 if varying & (1 << low) - 1 else low, max(used, top)
        samples = (bits << width - top).view(samples.dtype) >> width - top + low
        if top - low != (stored := layout.bits_stored):
            layout = replace(layout, bits_stored=max(top, precision) - low)
            notes.append(f"bits stored {stored} -> {layout.bits_stored}: more are used")
    return samples, replace(layout, high_bit=layout.bits_stored - 1)


def _embedded_overlays(dataset: Dataset, layout: PixelLayout) -> dict[int, int]:
    """Group -> bit of the overlays that stand in unused bits (PS3.3 C.9.2, retired)."""
    found = {}
    for group in range(0x6000, 0x6020, 2):
        position = dataset.get((group, 0x0102))
        if position is not None and (group, 0x3000) not in dataset:
            bit = int(number(str(position.value)) or 0)
            unused = (
                bit > layout.high_bit or bit <= layout.high_bit - layout.bits_stored
            )
            if unused and 0 <= bit < layout.bits_allocated:
                found[group] = bit
    return found


def decode_frame(dataset: Dataset) -> NDArray[Any]:
    """The frame that stands for the image: the middle one of a multi-frame.

    Returns
    -------
    ndarray, (rows, columns) or (rows, columns, 3)
        Stored values; of YBR_FULL, RGB. The same for a file and phase 1's copy of it.

    Raises
    ------
    RejectedError, Exception
        As `decode`.
    """
    pixels = decode(dataset, middle_only=True)
    layout, flat = pixels.layout, pixels.values.ravel()
    if layout.photometric.endswith("_422"):
        data = expand_ybr422(flat.tobytes(), layout.bits_allocated)
        flat = np.frombuffer(data, flat.dtype)
    if layout.planar:
        flat = flat.reshape(layout.samples, -1).T
    shape = (layout.rows, layout.columns, layout.samples)
    frame = flat.reshape(shape if layout.samples > 1 else shape[:2])
    if layout.photometric.startswith(("YBR_FULL", "YBR_PARTIAL")):
        return convert_color_space(frame, "YBR_FULL", "RGB")
    return frame


# Codestreams: PS3.5 8.2 and A.4. imagecodecs says nothing of a stream that ends early,
# so that is checked here. Its special codec for HTJ2K is left aside: where a lossy
# stream overshoots 16 bits, OpenJPH turns white into black (imagecodecs 2026.3.6);
# OpenJPEG, which reads HTJ2K too, clips.

_ITEM = b"\xfe\xff\0\xe0"
_CODECS = {
    **{f"1.2.840.10008.1.2.4.{number}": "JPEG" for number in range(50, 57)},
    **{f"1.2.840.10008.1.2.4.{number}": "JPEG Lossless" for number in (57, 58, 70)},
    **{f"1.2.840.10008.1.2.4.{number}": "JPEG-LS" for number in (80, 81)},
    **{f"1.2.840.10008.1.2.4.{number}": "JPEG 2000" for number in (90, 91)},
    **{f"1.2.840.10008.1.2.4.{number}": "HTJ2K" for number in (201, 202, 203)},
    "1.2.840.10008.1.2.5": "RLE",
}
"""The codec that each transfer syntax promises; the codestream has the last word."""

_NOT_STILL_IMAGES = re.compile(
    r"1\.2\.840\.10008\.1\.2\.(4\.(9[2-9]|1\d\d|20[4-9])|6\.\d+|[78]\..*)"
)
"""Video, JPIP, JPEG XL, JPEG 2000 part 2, XML and so on (PS3.6 table A-1)."""


@dataclass(frozen=True)
class StreamFacts:
    """What a codestream's own header says."""

    codec: str
    rows: int
    columns: int
    samples: int
    precision: int
    comes_out_rgb: bool = False
    """The decoded pixels are RGB, whatever the header says."""
    is_ycbcr: bool = False
    """The decoder must be told to convert to RGB."""


def _streams(value: bytes, count: int, notes: list[str]) -> list[Any]:
    """The codestream of each frame (PS3.5 A.4).

    A frame begins with a fragment that opens like the first. The offset table, which
    may be missing or wrong, is not needed.
    """
    fragments, at, view = [], 0, memoryview(value)
    while value[at : at + 4] == _ITEM:
        end = at + 8 + int.from_bytes(value[at + 4 : at + 8], "little")
        if end > len(value):
            raise RejectedError("is truncated: a fragment reaches beyond the pixels")
        fragments.append(view[at + 8 : end])
        at = end
    fragments = fragments[1:]  # the first is the offset table
    if not fragments or not len(fragments[0]):
        raise RejectedError("the compressed pixel data is empty")
    opening = bytes(fragments[0][: 3 if fragments[0][0] == 0xFF else 8])
    frames: list[list[Any]] = []
    for one in fragments:
        if one[: len(opening)] == opening or len(fragments) == count:
            frames.append([])
        frames[-1].append(one)
    if len(frames) < count:
        raise RejectedError(f"has {len(frames)} codestreams for {count} frames")
    if spare := sum(len(one) for parts in frames[count:] for one in parts):
        notes.append(f"{spare} bytes of more frames than it says left out")
    return [
        parts[0] if len(parts) == 1 else b"".join(parts) for parts in frames[:count]
    ]


def decode_stream(
    stream: Any, layout: PixelLayout, notes: list[str] | None = None
) -> NDArray[Any]:
    """Decode one compressed frame.

    Parameters
    ----------
    stream : bytes-like
        The codestream; its markers, not the transfer syntax, say which codec it needs.
    layout : PixelLayout
        What the header says.

    Returns
    -------
    ndarray, (rows, columns) or (rows, columns, samples)
        Little endian, laid out as `PixelLayout.decoded` says; masked or sign-extended
        from the stream's own precision.
    """
    facts = stream_facts(stream, layout)
    shape = (layout.rows, layout.columns, layout.samples)
    if (facts.rows, facts.columns, facts.samples) != shape:
        raise RejectedError(
            f"the {facts.codec} stream is {facts.columns}×{facts.rows}×{facts.samples},"
            f" the header says {layout.columns}×{layout.rows}×{layout.samples}"
        )
    if facts.codec == "RLE":
        pixels = _decode_rle(stream, layout, notes if notes is not None else [])
    elif facts.codec == "JPEG-LS":
        pixels = np.asarray(imagecodecs.jpegls_decode(stream))
    elif facts.codec in ("JPEG 2000", "HTJ2K"):
        pixels = np.asarray(imagecodecs.jpeg2k_decode(stream))
    else:
        pixels = _decode_jpeg(stream, facts)
    if pixels.ndim == 3 and pixels.shape[-1] != layout.samples:
        pixels = np.moveaxis(pixels, 0, -1)
    pixels = _bits(
        np.ascontiguousarray(pixels.reshape(shape if layout.samples > 1 else shape[:2]))
    )
    spare, kind = 8 * pixels.itemsize - facts.precision, "i" if layout.signed else "u"
    if spare > 0:
        pixels = (pixels << spare).view(f"{kind}{pixels.itemsize}") >> spare
    size = layout.decoded(facts).bits_allocated // 8
    return pixels.view(f"{kind}{pixels.itemsize}").astype(f"<{kind}{size}", copy=False)


def _decode_jpeg(stream: Any, facts: StreamFacts) -> NDArray[Any]:
    """Decode, and refuse a stream whose data end before its image.

    libjpeg fills up such an image without a word. Where the last samples look like
    that, the stream is decoded again with more data before its end marker, and before
    the fill bytes there (ISO 10918-1 B.1.1.2): a whole one never reads them.
    """
    space: dict[str, Any] = {
        "colorspace": "YCBCR" if facts.is_ycbcr else "RGB",
        "outcolorspace": "RGB",
    }
    options = space if facts.samples == 3 else {}
    pixels = np.asarray(imagecodecs.jpeg8_decode(stream, **options))
    corner = (pixels if pixels.ndim == 2 else pixels[..., 0])[-2:, -5:].astype(np.int64)
    steps = np.diff(corner[-1]), corner[-1] - corner[0]
    if any(np.all(step == step[:1]) for step in steps):
        data = bytes(stream)
        end = len(data[: data.rindex(b"\xff\xd9")].rstrip(b"\xff"))
        longer = data[:end] + b"\x55" * 64 + data[end:]
        if not np.array_equal(pixels, imagecodecs.jpeg8_decode(longer, **options)):
            raise RejectedError("is truncated: the codestream ends before the image")
    return pixels


def _decode_rle(stream: Any, layout: PixelLayout, notes: list[str]) -> NDArray[Any]:
    """PS3.5 annex G: a segment per byte of a sample, the most significant first."""
    size, plane = layout.bits_allocated // 8, layout.rows * layout.columns
    count, *starts = struct.unpack_from("<16L", stream)
    if count != size * layout.samples:
        raise RejectedError(f"has {count} RLE segments, not {size * layout.samples}")
    decoded, excess = np.empty((plane, layout.samples, size), np.uint8), 0
    for index, end in enumerate([*starts[1:count], len(stream)]):
        segment = imagecodecs.packbits_decode(stream[starts[index] : end])
        if len(segment) < plane:
            raise RejectedError("is truncated: an RLE segment is too short")
        sample, byte = divmod(index, size)
        decoded[:, sample, -1 - byte] = np.frombuffer(segment, np.uint8, plane)
        excess += len(segment) - plane
    if excess:
        notes.append(f"{excess} bytes after its RLE segments left out")
    return decoded.view(f"<u{size}").reshape(layout.rows, layout.columns, -1)


def stream_facts(stream: Any, layout: PixelLayout) -> StreamFacts:
    """Read a codestream's header; RLE (PS3.5 annex G) has none of these facts.

    JPEG, JPEG-LS and JPEG 2000 streams end with FFD9; some writers pad them.
    """
    start = bytes(stream[:12])
    is_jpeg = start.startswith(b"\xff\xd8")
    if is_jpeg or start.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP")):
        if not any(b"\xff\xd9" in bytes(p) for p in (stream[-256:], stream[256:])):
            raise RejectedError("is truncated: the codestream has no end marker")
        return (_jpeg_facts if is_jpeg else _j2k_facts)(stream, layout)
    if not 1 <= start[0] <= 15 or start[1:4] != b"\0\0\0" or layout.bits_allocated % 8:
        raise RejectedError(f"no codestream of a known kind: starts with {start.hex()}")
    shape = layout.rows, layout.columns, layout.samples
    return StreamFacts("RLE", *shape, layout.bits_allocated)


def _jpeg_facts(stream: Any, layout: PixelLayout) -> StreamFacts:
    """The frame header (ISO 10918-1 B.2.2, ISO 14495-1 C.2.2)."""
    at, jfif, marker = 2, False, 0
    while at + 10 <= len(stream):
        marker, length = struct.unpack_from(">HH", stream, at)
        if marker in _FRAME_MARKERS or marker == 0xFFDA or marker < 0xFFC0:
            break
        jfif |= marker == 0xFFE0 and bytes(stream[at + 4 : at + 8]) == b"JFIF"
        at += 1 if marker == 0xFFFF else 2 + length
    if marker not in _FRAME_MARKERS or at + 10 > len(stream):
        raise RejectedError("the JPEG stream has no frame header")
    precision, rows, columns, samples = struct.unpack_from(">BHHB", stream, at + 4)
    ids = bytes(stream[at + 10 : at + 10 + 3 * samples : 3])
    codec = {0xFFC3: "JPEG Lossless", 0xFFF7: "JPEG-LS"}.get(marker, "JPEG")
    rgb = codec == "JPEG" and samples == 3 and ("YBR" in layout.photometric or jfif)
    # A sample takes one bit at least, or an 8 × 8 block does (ISO 10918-1 F.2, H.2).
    share = 64 if codec == "JPEG" else 1
    if codec != "JPEG-LS" and 8 * len(stream) < rows * columns // share:
        raise RejectedError("is truncated: so short a codestream has no such image")
    is_ycbcr = rgb and ids not in (b"RGB", b"rgb")
    return StreamFacts(codec, rows, columns, samples, precision, rgb, is_ycbcr)


_FRAME_MARKERS = {0xFFF7, *range(0xFFC0, 0xFFD0)} - {0xFFC4, 0xFFC8, 0xFFCC}


def _j2k_facts(stream: Any, layout: PixelLayout) -> StreamFacts:
    """The SIZ segment (ISO 15444-1 A.5.1); bit 14 of Rsiz says HTJ2K (15444-15)."""
    at = bytes(stream[:4096]).find(b"\xff\x4f\xff\x51")
    if at < 0 or at + 44 > len(stream):
        raise RejectedError("the JPEG 2000 stream has no SIZ segment")
    able, right, bottom, left, top = struct.unpack_from(">HLLLL", stream, at + 6)
    samples, depth = struct.unpack_from(">HB", stream, at + 40)
    codec, precision = "HTJ2K" if able & 0x4000 else "JPEG 2000", (depth & 0x7F) + 1
    rgb = layout.photometric in ("YBR_RCT", "YBR_ICT")
    shape = bottom - top, right - left, samples
    return StreamFacts(codec, *shape, precision, rgb)


# --- The picture --------------------------------------------------------------------
# Owns what the VLM sees of an image. Never asks what the image is.

MIN_SIDE_PX = 32
"""Smaller images show nothing; a thumbnail was taken for a flat field."""

MAX_ASPECT = 16.0
"""Height of a pixel over its width, or the inverse; beyond it the header errs."""

LUMINANCE = np.array([0.299, 0.587, 0.114])
"""Grey of RGB (ITU-R BT.601)."""


@dataclass(frozen=True)
class PreparedImage:
    """An image as the VLM will see it."""

    image_id: str
    """SHA-256 of the decoded pixels: the same image under any name or syntax."""
    view_id: str
    """SHA-256 of the grey levels as sent."""
    png: bytes
    """IMAGE_SIDE_PX squared, 8-bit grey; the same bytes object in every call."""

    @property
    def grey(self) -> NDArray[np.uint8]:
        """The grey levels as sent, uint8 (IMAGE_SIDE_PX, IMAGE_SIDE_PX)."""
        return np.asarray(Image.open(io.BytesIO(self.png)), np.uint8)


def prepare_image(path: Path) -> PreparedImage:
    """Turn a DICOM file into what the VLM sees (see README, "What the VLM sees").

    Raises
    ------
    RejectedError
        Not an image, not decodable, too small, or every pixel has the same value;
        whatever else one file provokes is its own failure, too.
    """
    try:
        dataset = read_dicom(path)
        return _prepared(decode_frame(dataset), dataset)
    except RejectedError:
        raise
    except OSError as error:
        raise RejectedError(f"can't be read: {error.strerror}") from None
    except Exception as error:  # decoders and broken headers raise all kinds
        name = type(error).__name__
        raise RejectedError(f"can't be decoded: {name}: {error}") from None


def _prepared(pixels: NDArray[Any], dataset: Dataset) -> PreparedImage:
    if min(pixels.shape[:2]) < MIN_SIDE_PX:
        rows, columns = pixels.shape[:2]
        raise RejectedError(
            f"is too small: {columns}×{rows} pixels, {MIN_SIDE_PX} a side are needed"
        )
    if pixels.min() == pixels.max():
        raise RejectedError(f"has no contrast: every pixel is {pixels.flat[0]}")
    small = _reduce(_display_values(pixels, dataset), _pixel_aspect(dataset))
    view = _pad(_window(small))
    png = io.BytesIO()
    Image.fromarray(view).save(png, "PNG", compress_level=1)
    return PreparedImage(
        image_id=digest_of(pixels), view_id=digest_of(view), png=png.getvalue()
    )


def preparation() -> dict[str, Any]:
    """The constants of the image preparation: what the manifests record and compare."""
    return {
        "version": config.PREPARATION_VERSION,
        "side_px": config.IMAGE_SIDE_PX,
        "window_percentiles": list(config.WINDOW_PERCENTILES),
        "window_min_noise_sds": config.WINDOW_MIN_NOISE_SDS,
        "padding_grey": config.PADDING_GREY,
    }


def digest_of(array: NDArray[Any]) -> str:
    """SHA-256 of an array: its dtype, its shape and its values."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    digest = hashlib.sha256(f"{little.dtype.str}{little.shape}".encode())
    digest.update(little.data)
    return digest.hexdigest()


def _display_values(pixels: NDArray[Any], dataset: Dataset) -> NDArray[np.float32]:
    """Grey values that rise with displayed brightness, float32 (rows, columns).

    PS3.3 C.11.1 (modality LUT) and C.7.6.3.1.2 (MONOCHROME1: the lowest value is
    white). A VOI window is left out: the window below is taken from the image, because
    headers carry clinical windows that hide a test object.
    """
    with suppress(Exception), _silence():  # a table that can't be read is none
        if text(dataset, "PhotometricInterpretation").upper() == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, dataset)
        elif pixels.ndim == 2 and dataset.get("ModalityLUTSequence"):
            pixels = apply_modality_lut(pixels, dataset)
    if pixels.ndim == 3:
        return np.asarray(pixels[..., :3] @ LUMINANCE, np.float32)
    falling = (number(text(dataset, "RescaleSlope")) or 1) < 0
    inverted = text(dataset, "PhotometricInterpretation").upper() == "MONOCHROME1"
    values = pixels.astype(np.float32)
    return -values if inverted != falling else values


def _pixel_aspect(dataset: Dataset) -> float:
    """Height of a pixel over its width (PS3.3 10.7.1.3, C.7.6.3.1.7); 1 if unknown."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        sizes = [number(one) or 0.0 for one in texts(dataset, keyword)]
        if len(sizes) == 2 and min(sizes) > 0:
            if 1 / MAX_ASPECT <= (aspect := sizes[0] / sizes[1]) <= MAX_ASPECT:
                return aspect
    return 1.0


def _reduce(values: NDArray[np.float32], aspect: float) -> NDArray[np.float32]:
    """Antialiased resize to IMAGE_SIDE_PX on the longer side, keeping proportions."""
    height, width = values.shape[0] * aspect, float(values.shape[1])
    scale = config.IMAGE_SIDE_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.fromarray(values)
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0))


def _window(small: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Grey levels 0 to 255: robust percentiles, never narrower than the noise asks."""
    low, high = np.percentile(small, config.WINDOW_PERCENTILES)
    if low == high:
        low, high = small.min(), small.max()
    width = max(high - low, config.WINDOW_MIN_NOISE_SDS * _noise_sd(small), 1e-6)
    scaled = (small - (low + high) / 2) / width + 0.5
    return np.asarray(np.rint(np.clip(scaled, 0, 1) * 255), np.uint8)


def _noise_sd(values: NDArray[np.float32]) -> float:
    """Noise SD from the median of a second difference that slopes and edges cancel in.

    Immerkær, Computer Vision and Image Understanding 64 (1996) 300, with the median in
    place of the mean, so that the details of a phantom don't count as noise.
    """
    if min(values.shape) < 3:
        return 0.0
    rows = values[:-2] - 2 * values[1:-1] + values[2:]
    both = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]
    return float(np.median(np.abs(both)) / 0.6745 / 6)


def _pad(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    side = config.IMAGE_SIDE_PX
    square = np.full((side, side), config.PADDING_GREY, np.uint8)
    top, left = (side - grey.shape[0]) // 2, (side - grey.shape[1]) // 2
    square[top : top + grey.shape[0], left : left + grey.shape[1]] = grey
    return square


# --- The vision language model ------------------------------------------------------

REFUSAL_OPENINGS = (
    "i'm sorry",
    "i am sorry",
    "sorry,",
    "i cannot",
    "i can't",
    "as an ai",
)
"""Openings of an answer that declines to describe; counted, not asked again."""

HARD_PROBLEMS = ("broken", "empty", "looping", "unembeddable")
"""Answers that can't stand in the dataset; "cut" and "refusal" are only counted."""

GIVE_UP_AFTER = 8
"""Requests given up in a row, none answered between, that stop the run."""


@dataclass(frozen=True)
class Question:
    """One prompt of a set, by its place in the image's list."""

    prompt_set: str
    index: int
    prompt: str

    def seed(self, image_id: str, attempt: int) -> int:
        """A seed of its own for every image, question and attempt, 31 bits."""
        name = f"{image_id}:{self.prompt_set}:{self.index}:{attempt}"
        return zlib.crc32(name.encode()) & 0x7FFFFFFF


def questions(prompt_set: str, count: int) -> list[Question]:
    """The first `count` questions of a set; beyond its end the prompts come again."""
    prompts = config.PROMPT_SETS[prompt_set]
    return [
        Question(prompt_set, index, f"{prompts[index % len(prompts)]} {config.BREVITY}")
        for index in range(count)
    ]


@dataclass(frozen=True)
class Answer:
    """What the VLM said, whether it can be used, and how long it took."""

    text: str
    problem: str = ""
    """One of HARD_PROBLEMS, "cut", "refusal", or "" when all is well."""
    vision_s: float = 0.0
    """Seconds of prompt evaluation: image encoding and prefill."""
    text_s: float = 0.0
    """Seconds of generation."""

    @property
    def usable(self) -> bool:
        """Whether the text may stand in the dataset."""
        return self.problem not in HARD_PROBLEMS


@dataclass(frozen=True)
class ServerFacts:
    """What the preflight found on the server."""

    version: str
    vlm_digest: str
    embedder_digest: str
    both_loaded: bool
    """Whether VLM and embedder stay in memory together."""
    gpu_share: float
    """Share of the loaded VLM that lies in GPU memory, 0 to 1."""
    probe: NDArray[np.float32]
    """Today's embedding of PROBE_SENTENCE, (n_features,)."""


def conditions(cfg: config.Config, facts: ServerFacts | None) -> dict[str, Any]:
    """All that makes one run's vectors comparable with another's, for the manifests.

    Without facts of the server: what the command line alone decides.
    """
    generic = len(config.GENERIC_PROMPTS)
    chosen = {
        "vlm": cfg.vlm,
        "embedder": cfg.embed_model,
        "options": vlm_options(cfg),
        "preparation": preparation(),
        "generic_prompts": [q.prompt for q in questions("generic", generic)],
    }
    if facts is None:
        return chosen
    return {
        **chosen,
        "vlm_digest": facts.vlm_digest,
        "embedder_digest": facts.embedder_digest,
    }


def vlm_options(cfg: config.Config) -> dict[str, Any]:
    """Sampling and runner options of every description, without its seed."""
    return {
        "temperature": cfg.temperature,
        "num_predict": cfg.num_predict,
        "num_ctx": cfg.num_ctx,
    }


def server_url(cfg: config.Config) -> str:
    """The server's address with scheme and port, as Ollama completes OLLAMA_HOST.

    A server bound to every interface (0.0.0.0) is reached at the loopback address.
    """
    host = cfg.host_url.strip().rstrip("/")
    try:
        address = urlsplit(host if "://" in host else f"http://{host}")
        implied = {"http": 80, "https": 443}[address.scheme]
        port = address.port or (implied if "://" in host else 11434)
        name = (address.hostname or "127.0.0.1").replace("0.0.0.0", "127.0.0.1")
        name = f"[{name}]" if ":" in name else name
        if len(host.split()) > 1:
            raise ValueError("white space")
    except (KeyError, ValueError):
        raise PipelineError(
            f"{cfg.host_url!r} is no address of a server: write --host (or "
            "OLLAMA_HOST) like http://127.0.0.1:11434"
        ) from None
    return f"{address.scheme}://{name}:{port}{address.path}"


def is_loopback(url: str) -> bool:
    """Whether the address is this machine's own."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def distance_warning(cfg: config.Config) -> str:
    """Names a server that is not this machine, before images go there; else empty."""
    url = server_url(cfg)
    if is_loopback(url):
        return ""
    plain = "" if url.startswith("https") else ", unencrypted"
    return f"the images leave this machine for {url}{plain}"


class VlmServer:
    """The Ollama server: one client, one semaphore, one place where calls are retried.

    Use as an async context manager. `preflight` comes first; `describe` and `embed`
    then raise RejectedError for what fails alone and PipelineError for what stops a
    run: a server that stays away, or a model that is gone.

    Parameters
    ----------
    tell : callable
        Takes a line about what takes a while: a download (``--pull``), the loading of
        the models, the wait for a server that went away.
    """

    def __init__(self, cfg: config.Config, tell: Callable[[str], object]) -> None:
        self._cfg, self._tell = cfg, tell
        self._url = server_url(cfg)
        self._client = ollama.AsyncClient(
            self._url,
            timeout=httpx.Timeout(None, connect=cfg.connect_timeout, write=60.0),
            trust_env=not is_loopback(self._url),
        )
        self._semaphore = asyncio.Semaphore(cfg.in_flight)
        self._recovery = asyncio.Lock()
        self._given_up_in_a_row = 0
        self._n_features = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        # The client learned to close itself in version 0.6.2.
        close = getattr(self._client, "close", None)
        if close is not None:
            await close()

    # -- before any work --

    async def preflight(self) -> ServerFacts:
        """Check in seconds that both models are there and do their work.

        Raises
        ------
        PipelineError
            Naming what is missing, and the command that mends it.
        """
        version = await self.check_models()
        self._tell(f"loading {self._cfg.embed_model} and {self._cfg.vlm} on the server")
        try:
            return await self._tried_models(version)
        except _failures() as error:
            raise self._failed_test(version, error) from None

    async def check_models(self) -> str:
        """The quick part of the preflight: the version, once both models are there."""
        version = await self._version()
        try:
            for model in (self._cfg.vlm, self._cfg.embed_model):
                if not _find(await self._digests(), model):
                    await self._pull_or_explain(model)
            await self._check_vision()
        except _failures() as error:
            raise self._failed_test(version, error) from None
        return version

    def _failed_test(self, version: str, error: Exception) -> PipelineError:
        return PipelineError(
            f"the server at {self._url} (Ollama {version}) failed its first test: "
            f"{_short(error)}: see its log"
        )

    async def _tried_models(self, version: str) -> ServerFacts:
        digests = await self._digests()
        # The VLM last: where both don't fit, it is the one that stays.
        probe = await self._probe_embedder()
        try:
            await self._twice(self._load_vlm)
        except (ollama.ResponseError, TimeoutError) as error:
            raise PipelineError(
                f"model {self._cfg.vlm} can't be loaded ({_short(error)}): see the "
                "server's log; a smaller --num-ctx needs less memory"
            ) from None
        loaded = (await self._client.ps()).models
        vlm = [m for m in loaded if _same_model(m.model or "", self._cfg.vlm)]
        size = sum(m.size or 0 for m in vlm)
        return ServerFacts(
            version=version,
            vlm_digest=_find(digests, self._cfg.vlm),
            embedder_digest=_find(digests, self._cfg.embed_model),
            both_loaded=bool(vlm)
            and any(_same_model(m.model or "", self._cfg.embed_model) for m in loaded)
            and not _same_model(self._cfg.vlm, self._cfg.embed_model),
            gpu_share=sum(m.size_vram or 0 for m in vlm) / size if size else 0.0,
            probe=probe,
        )

    async def check_unchanged(self, facts: ServerFacts) -> None:
        """Raise PipelineError when a model was replaced since the preflight."""
        digests = await self._call(self._digests)
        for model, then in (
            (self._cfg.vlm, facts.vlm_digest),
            (self._cfg.embed_model, facts.embedder_digest),
        ):
            if _find(digests, model) != then:
                raise ModelChangedError(
                    f"model {model} was replaced on the server during the run; start "
                    "again: what the former model answered is kept apart"
                )

    async def _version(self) -> str:
        """The server's version: also the cheapest proof that an Ollama answers."""
        trust_proxy = not is_loopback(self._url)
        try:
            async with httpx.AsyncClient(trust_env=trust_proxy) as web:
                reply = await web.get(f"{self._url}/api/version", timeout=5.0)
            return str(reply.json()["version"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise PipelineError(
                f"no Ollama answers at {self._url} ({_short(error)}): start it with "
                "`ollama serve` or name its address with --host"
            ) from None

    async def _digests(self) -> dict[str, str]:
        models = (await self._client.list()).models
        return {str(m.model): str(m.digest) for m in models}

    async def _pull_or_explain(self, model: str) -> None:
        if not self._cfg.pull:
            raise PipelineError(
                f"model {model} is not on the server at {self._url}: run "
                f"`ollama pull {model}` or add --pull"
            )
        try:
            told = ""
            async for step in await self._client.pull(model, stream=True):
                line = f"pull {model}: {step.status or ''}"
                if step.total:
                    line += _bar((step.completed or 0) / step.total)
                if line != told:  # the server reports every few milliseconds
                    self._tell(line)
                told = line
        except ollama.ResponseError as error:
            raise PipelineError(
                f"model {model} can't be downloaded ({_short(error)}): check its name "
                "and the server's internet connection"
            ) from None

    async def _check_vision(self) -> None:
        shown = await self._client.show(self._cfg.vlm)
        families = (shown.details.families if shown.details else None) or ()
        if "vision" not in (shown.capabilities or ()) and "clip" not in families:
            raise PipelineError(
                f"model {self._cfg.vlm} can't see images: choose a vision model with "
                "--vlm, for example llava-phi3"
            )

    async def _load_vlm(self) -> None:
        """Load the VLM with the options of every later call, so that none reloads it.

        With an own, long time-out: a client that leaves early aborts the load.
        """
        async with asyncio.timeout(self._cfg.load_timeout):
            await self._client.chat(
                self._cfg.vlm,
                messages=[],
                options=vlm_options(self._cfg),
                keep_alive=self._cfg.keep_alive,
            )

    async def _probe_embedder(self) -> NDArray[np.float32]:
        model = self._cfg.embed_model
        try:
            async with asyncio.timeout(self._cfg.load_timeout):
                vectors = await self._twice(
                    partial(self._embed_once, [config.PROBE_SENTENCE])
                )
        except ollama.ResponseError as error:
            if "support embeddings" in str(error):
                raise PipelineError(
                    f"this server (Ollama 0.30 or later) can't embed with {model}: run "
                    "`ollama pull nomic-embed-text` and use --embed-model "
                    "nomic-embed-text"
                ) from None
            raise PipelineError(
                f"model {model} can't embed ({_short(error)}): choose another "
                "--embed-model"
            ) from None
        except TimeoutError:
            raise PipelineError(
                f"model {model} did not load within {self._cfg.load_timeout:.0f} s: "
                "see the server's log"
            ) from None
        if vectors[0] is None:
            raise PipelineError(
                f"model {model} gives embeddings that are no numbers: choose another "
                "--embed-model"
            )
        self._n_features = vectors[0].size
        return vectors[0]

    async def _twice(self, request: Callable[[], Awaitable[Result]]) -> Result:
        """Try once more what may only have failed by chance, but not a time-out."""
        try:
            return await request()
        except TimeoutError:
            raise
        except _failures() as error:
            if not _may_pass(error):
                raise
        await asyncio.sleep(self._cfg.retry_pause)
        return await request()

    # -- the work --

    async def describe(
        self,
        image: PreparedImage,
        question: Question,
        earlier: Sequence[Answer],
        record: Callable[[int, Answer], object],
    ) -> Answer:
        """Ask one question about one image until the answer can be used.

        Parameters
        ----------
        earlier : sequence of Answer
            Attempts of earlier runs, none of them usable; each has its own seed.
        record : callable
            Takes every attempt's number and answer as soon as it is there.

        Raises
        ------
        RejectedError
            The server refused the request, or no attempt gave a usable text.
        """
        answers = list(earlier)
        for _ in range(config.TEXT_ATTEMPTS):
            seed = question.seed(image.image_id, len(answers))
            answer = await self._call(partial(self._ask, image.png, question, seed))
            record(len(answers), answer)
            answers.append(answer)
            if chosen := chosen_answer(answers):
                return chosen
        raise RejectedError(
            f"no usable answer to {question.prompt_set} prompt {question.index} "
            f"(the last one is {answers[-1].problem}): run again to try other seeds"
        )

    async def _ask(self, png: bytes, question: Question, seed: int) -> Answer:
        # The client puts the image before the text, and only the text varies: the
        # server then finds the image in its prefix cache. The same bytes every time.
        response = await self._client.chat(
            self._cfg.vlm,
            messages=[{"role": "user", "content": question.prompt, "images": [png]}],
            options={**vlm_options(self._cfg), "seed": seed},
            keep_alive=self._cfg.keep_alive,
        )
        return _judged(response)

    async def embed(self, texts: Sequence[str]) -> list[NDArray[np.float32] | None]:
        """Embed texts in lists of EMBED_CHUNK; None for a text that can't be embedded.

        A list fails as a whole, so that a failing one is asked again text by text.

        Returns
        -------
        list of float32 (n_features,) or None
            In the order of `texts`.
        """
        vectors: list[NDArray[np.float32] | None] = []
        for start in range(0, len(texts), config.EMBED_CHUNK):
            chunk = texts[start : start + config.EMBED_CHUNK]
            try:
                found = await self._call(partial(self._embed_once, chunk))
            except RejectedError:
                found = [None] * len(chunk)
            for text, vector in zip(chunk, found, strict=True):
                again = vector is None
                vectors.append(await self._embed_alone(text) if again else vector)
        return vectors

    async def _embed_alone(self, text: str) -> NDArray[np.float32] | None:
        try:
            return (await self._call(partial(self._embed_once, [text])))[0]
        except RejectedError:
            return None

    async def _embed_once(
        self, texts: Sequence[str]
    ) -> list[NDArray[np.float32] | None]:
        response = await self._client.embed(
            self._cfg.embed_model,
            texts,
            options={"num_ctx": self._cfg.num_ctx},
            keep_alive=self._cfg.keep_alive,
        )
        if len(response.embeddings) != len(texts):
            raise ValueError(
                f"{len(response.embeddings)} embeddings for {len(texts)} texts"
            )
        vectors = [_checked_vector(vector) for vector in response.embeddings]
        expected = self._n_features  # 0 until the preflight has probed the embedder
        return [
            v if v is not None and expected in (0, v.size) else None for v in vectors
        ]

    # -- one call, and what can go wrong --

    async def _call(self, request: Callable[[], Awaitable[Result]]) -> Result:
        """One request under the semaphore, tried again while its failure may pass."""
        for attempt in range(self._cfg.retries):
            try:
                async with self._semaphore, asyncio.timeout(self._cfg.read_timeout):
                    result = await request()
            except Exception as error:
                reason = error
            else:
                self._given_up_in_a_row = 0
                return result
            if not _may_pass(reason) or attempt + 1 == self._cfg.retries:
                break
            await self._pause(reason, attempt)
        raise self._given_up(reason)

    def _given_up(self, reason: Exception) -> PipelineError:
        """The error for this request: does it end alone, or the run with it?"""
        self._given_up_in_a_row += 1
        if getattr(reason, "status_code", 0) in (401, 403, 404, 501):
            return PipelineError(f"the server at {self._url} says: {_short(reason)}")
        if self._given_up_in_a_row >= GIVE_UP_AFTER:
            return PipelineError(
                f"the server at {self._url} failed {GIVE_UP_AFTER} requests in a row "
                f"(last: {_short(reason)}): see its log, then run the same command "
                "again"
            )
        return RejectedError(f"the server failed: {_short(reason)}")

    async def _pause(self, reason: Exception, attempt: int) -> None:
        """Wait before the next try: longer each time, or until the server is back."""
        jitter = 0.5 + random.random()
        await asyncio.sleep(min(30.0, self._cfg.retry_pause * 2**attempt) * jitter)
        if isinstance(reason, _server_away()):
            async with self._recovery:
                await self._wait_for_server()

    async def _wait_for_server(self) -> None:
        """Return when the server answers, with the VLM loaded again if need be."""
        deadline, told = time.monotonic() + self._cfg.wait, ""
        while True:
            try:
                async with asyncio.timeout(self._cfg.connect_timeout):
                    loaded = (await self._client.ps()).models
                if not any(_same_model(m.model or "", self._cfg.vlm) for m in loaded):
                    await self._load_vlm()
                return
            except _failures() as error:
                if not _may_pass(error):
                    raise self._given_up(error) from None
                if not told:
                    told = f"the server at {self._url} is away ({_short(error)})"
                    self._tell(f"{told}: waiting up to {self._cfg.wait:.0f} s")
                if time.monotonic() >= deadline:
                    raise PipelineError(
                        f"the server at {self._url} has not answered for "
                        f"{self._cfg.wait:.0f} s ({_short(error)}): start it with "
                        "`ollama serve` and run the same command again; every answer "
                        "so far is kept"
                    ) from None
            await asyncio.sleep(min(2.0, self._cfg.retry_pause * 4))


async def in_lanes(
    items: Iterable[Item],
    jobs_of: Callable[[Item], Awaitable[Iterable[Job]]],
    do: Callable[[Job], Awaitable[None]],
    cfg: config.Config,
) -> None:
    """Work image by image: the server encodes each one once, and never waits.

    As many lanes as the server has slots, each with one image at a time and its jobs in
    sequence. With one slot a second request stands in the server's queue, also across
    the border of two images; with more slots a second request of an image would take
    another image's slot and have its own image encoded again.

    Parameters
    ----------
    items : iterable
        Taken from when a lane is about to run dry: memory holds what is in flight.
    jobs_of : async callable
        Prepares an image and gives its jobs.
    do : async callable
        One job; bounded by the semaphore of the server that it calls.
    """
    source = iter(items)
    workers = cfg.in_flight if cfg.server_parallel == 1 else 1
    async with asyncio.TaskGroup() as group:
        for _ in range(cfg.server_parallel):
            # The next image is prepared while the last jobs of this one still wait.
            lane: asyncio.Queue[Job | None] = asyncio.Queue(maxsize=4)
            group.create_task(_feed(lane, source, jobs_of, workers))
            for _ in range(workers):
                group.create_task(_work(lane, do))


async def _feed(
    lane: asyncio.Queue[Job | None],
    source: Iterator[Item],
    jobs_of: Callable[[Item], Awaitable[Iterable[Job]]],
    workers: int,
) -> None:
    for item in source:
        for job in await jobs_of(item):
            await lane.put(job)
    for _ in range(workers):
        await lane.put(None)


async def _work(
    lane: asyncio.Queue[Job | None], do: Callable[[Job], Awaitable[None]]
) -> None:
    while (job := await lane.get()) is not None:
        await do(job)


def run_async(main: Coroutine[Any, Any, Result]) -> Result:
    """Run to the end; of several errors at once the first that stops the run shows."""
    try:
        return asyncio.run(main)
    except BaseExceptionGroup as group:
        raise _first_leaf(group) from None


def _first_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def chosen_answer(answers: Sequence[Answer]) -> Answer | None:
    """The answer that stands in the dataset, given all attempts so far in order.

    The first whole one; a cut one only where a second attempt was no better.
    """
    whole = [a for a in answers if a.usable and a.problem != "cut"]
    cut = [a for a in answers if a.problem == "cut"]
    if whole:
        return whole[0]
    return cut[0] if cut and len(answers) > 1 else None


@cache
def _server_away() -> tuple[type[Exception], ...]:
    return ConnectionError, httpx.TransportError, TimeoutError


@cache
def _failures() -> tuple[type[Exception], ...]:
    # ValueError: the body was no JSON, or not what was asked for. AttributeError: what
    # the client makes of an error whose JSON is a list.
    return ollama.ResponseError, *_server_away(), ValueError, AttributeError


def _may_pass(error: Exception) -> bool:
    """Whether a failed request is worth another try; what is a bug is raised again."""
    if isinstance(error, ollama.ResponseError):
        if error.status_code == 400:
            # /api/embed reports a crashed runner as 400 "do embedding request … EOF".
            return "EOF" in str(error)
        return error.status_code not in (401, 403, 404, 413)
    if isinstance(error, _failures()):
        return True
    raise error


def _judged(response: Any) -> Answer:
    """An HTTP 200 is no success yet: the answer, with what is wrong with it."""
    text = (response.message.content or "").strip()
    if not response.done:
        problem = "broken"
    elif not text:
        problem = "empty"
    elif _loops(text):
        problem = "looping"
    elif response.done_reason == "length":
        problem = "cut"
    else:
        refused = text.lower().startswith(REFUSAL_OPENINGS)
        problem = "refusal" if refused else ""
    return Answer(
        text,
        problem,
        vision_s=(response.prompt_eval_duration or 0) / 1e9,
        text_s=(response.eval_duration or 0) / 1e9,
    )


def _loops(text: str) -> bool:
    """Whether a run of four words stands more than five times in the text."""
    words = text.lower().split()
    runs = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    return bool(runs) and max(runs.values()) > 5


def _checked_vector(values: Sequence[float]) -> NDArray[np.float32] | None:
    vector = np.asarray(values, np.float32)
    usable = vector.ndim == 1 and np.isfinite(vector).all() and vector.any()
    return vector if usable else None


def _bar(share: float) -> str:
    """A progress bar of twenty steps."""
    steps = int(20 * share)
    return f" [{'#' * steps:<20}] {5 * steps:3d} %"


def _same_model(name: str, other: str) -> bool:
    return name.removesuffix(":latest") == other.removesuffix(":latest")


def _find(digests: Mapping[str, str], model: str) -> str:
    """The digest of a model on the server, or "" where it is not."""
    for name, digest in digests.items():
        if _same_model(name, model):
            return digest
    return ""


def _short(error: object) -> str:
    """An error in at most 200 characters of one line; the server nests JSON in JSON."""
    late = isinstance(error, (TimeoutError, httpx.TimeoutException))
    name = "no answer in time" if late else type(error).__name__
    text = str(getattr(error, "error", error)) or name
    if isinstance(error, ConnectionError):
        text = "no connection"
    try:
        nested = json.loads(text)["error"]
        text = nested["message"] if isinstance(nested, dict) else str(nested)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:200]


def pack_vector(vector: NDArray[np.float32]) -> str:
    """A float32 vector as base64 text, little endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def unpack_vector(text: str) -> NDArray[np.float32]:
    """The float32 vector of `pack_vector`."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)


# --- Decisions ----------------------------------------------------------------------


@dataclass(frozen=True)
class Neighbours:
    """Generic rows of the training images: what a known image lies close to."""

    rows: NDArray[np.float32]
    """(n_rows, n_dimensions), scaled and projected."""
    owner: NDArray[np.int32]
    """(n_rows,), the index in `names` of the image that a row describes."""
    names: NDArray[np.str_]
    """(n_images,), the labelled files."""
    projection: NDArray[np.float32]
    """(n_features, n_dimensions), or (0, 0) where rows are kept as they are."""

    def project(self, scaled: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scaled rows, (k, n_features), in the space of `rows`."""
        return scaled @ self.projection if self.projection.size else scaled

    def distances(self, projected: NDArray[np.float32]) -> NDArray[np.float64]:
        """Euclidean distances of projected rows to `rows`, float64 (k, n_rows)."""
        squares = np.einsum("ij,ij->i", projected, projected)[:, None] + self._squares
        squares -= 2 * (projected @ self.rows.T)
        return np.asarray(np.sqrt(np.maximum(squares, 0, dtype=np.float64)))

    def nearest(self, distances: NDArray[np.float64], count: int = 3) -> list[str]:
        """Names of the training images whose rows lie closest on average."""
        totals = np.bincount(self.owner, distances.mean(axis=0), len(self.names))
        means = totals / np.maximum(np.bincount(self.owner, minlength=len(totals)), 1)
        return [str(self.names[i]) for i in np.argsort(means, kind="stable")[:count]]

    @cached_property
    def _squares(self) -> NDArray[np.float32]:
        return np.asarray(np.einsum("ij,ij->i", self.rows, self.rows))


def load_neighbours(path: Path) -> Neighbours:
    """Read what phase 3 wrote; arrays only, nothing is unpickled."""
    with np.load(path, allow_pickle=False) as arrays:
        return Neighbours(
            **{part.name: arrays[part.name] for part in fields(Neighbours)}
        )


def novelty(distances: NDArray[np.float64]) -> float:
    """How far an image lies from the training images.

    Parameters
    ----------
    distances : ndarray, (k, n_rows)
        Of the image's k rows to training rows, the image's own rows left out: with
        them, every known image would seem nearer than any new one can be.

    Returns
    -------
    float
        Mean over the k rows of the distance to the NEIGHBOUR_COUNT nearest. The mean
        of the rows would hide a stranger: it lies near the centre of everything.
    """
    count = min(config.NEIGHBOUR_COUNT, distances.shape[1])
    return float(np.partition(distances, count - 1, axis=1)[:, :count].mean())


@dataclass(frozen=True)
class Decision:
    """What phase 4 says of one image."""

    label: str
    """The class, or INCONCLUSIVE."""
    best_class: str
    """The class of the largest confidence, also where the label is INCONCLUSIVE."""
    confidences: dict[str, float]
    novelty: float
    reason: str
    """Why the label is INCONCLUSIVE; empty where it is a class."""
    nearest: list[str]
    """Training images whose descriptions are most alike, the closest first."""


def refusal(confidence: float, novelty: float, thresholds: Mapping[str, float]) -> str:
    """Why an image should not be given a class; empty where it should."""
    if novelty > thresholds["novelty"]:
        limit = thresholds["novelty"]
        return f"unlike every training image (distance {novelty:.1f} > {limit:.1f})"
    if thresholds["confidence"] >= config.NEVER:
        return "no confidence of this model kept the errors within the accepted share"
    if confidence < thresholds["confidence"]:
        return f"confidence {confidence:.2f} is below {thresholds['confidence']:.2f}"
    return ""


def decide(
    rows: NDArray[np.float32],
    scaler: Any,
    classifier: Any,
    neighbours: Neighbours,
    thresholds: Mapping[str, float],
) -> Decision:
    """Classify one image by the embeddings of its generic descriptions.

    Parameters
    ----------
    rows : ndarray, float32 (k, n_features)
        One embedding per description, not scaled.
    scaler, classifier : scikit-learn estimators
        What SCALER and CLASSIFIER hold.
    neighbours : Neighbours
        See `load_neighbours`.
    thresholds : mapping
        ``metricas.json["thresholds"]``: keys ``confidence`` and ``novelty``.
    """
    scaled = np.asarray(scaler.transform(rows), np.float32)
    shares = classifier.predict_proba(scaled.mean(axis=0, keepdims=True))[0]
    distances = neighbours.distances(neighbours.project(scaled))
    classes = [str(name) for name in classifier.classes_]
    best, far = int(np.argmax(shares)), novelty(distances)
    reason = refusal(float(shares[best]), far, thresholds)
    return Decision(
        label=config.INCONCLUSIVE if reason else classes[best],
        best_class=classes[best],
        confidences={name: float(p) for name, p in zip(classes, shares, strict=True)},
        novelty=far,
        reason=reason,
        nearest=neighbours.nearest(distances),
    )
