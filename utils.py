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
import importlib
import io
import json
import logging
import math
import os
import random
import re
import secrets
import signal
import stat
import struct
import sys
import time
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import (
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from itertools import product, zip_longest
from multiprocessing import resource_tracker
from pathlib import Path
from socket import gethostname
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import unquote, urlsplit

import filelock
import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import parse_fragments
from pydicom.filereader import read_dataset
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
    MPEGTransferSyntaxes,
)
from pydicom.valuerep import VR

import config

Result = TypeVar("Result")
Item = TypeVar("Item")
Prepared = TypeVar("Prepared")

# --- Running a phase ----------------------------------------------------------------
# Owns errors, exit codes and the start of the log. Never decides what a phase does.


class PipelineError(Exception):
    """Something a user can mend; one line: what is wrong, where, what to do."""


class RejectedError(PipelineError):
    """One item can't be used; the message is its reason. The run goes on without it."""

    dataset: Dataset | None = None
    """What could be read of a damaged file."""


class ModelChangedError(PipelineError):
    """A model was replaced on the server while a run was using it."""


class BlindError(PipelineError):
    """The server does not look at the pictures that it is sent."""


class ServerAwayError(PipelineError):
    """One of several servers does not answer; the others can take its images."""


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


def exit_code(
    run: Callable[[], int], complain: Callable[[str], object], kept: str = ""
) -> int:
    """Run a phase and turn what a user can cause into one line and an exit code.

    Parameters
    ----------
    run : callable
        The phase; returns its own exit code.
    complain : callable
        Takes the line that says what is wrong.
    kept : str
        What is true of the phase after Ctrl-C.

    Returns
    -------
    int
        What `run` returned; 2 when it could not run; 130 on Ctrl-C. Anything else is
        a bug and keeps its traceback.
    """
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set while they loaded
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run()
        if sys.stdout:  # None where the caller has closed it
            sys.stdout.flush()
        return code
    except PipelineError as error:
        complain(f"error: {error}")
    except KeyboardInterrupt:
        complain(f"interrupted: {kept}" if kept else "interrupted")
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


@contextmanager
def interrupts_later() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; processes made in it never hear it."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # started in the block, it would end it
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


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

_OF_NO_INTEREST = re.compile(
    r"\..*|(manifiesto|rechazados|etiquetas.*)\.csv|(vista_previa|informe).*\.html"
    r"|(?i:thumbs\.db|desktop\.ini)",
    re.DOTALL,
)
"""Hidden files, the program's own lists and pages, and what Windows leaves behind."""


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
            if _OF_NO_INTEREST.fullmatch(name) or _is_of_windows(path):
                continue
            if problem := _why_no_file(path):
                tell(path, problem)
            else:
                yield path


def _is_of_windows(path: Path) -> bool:
    """Hidden and of the system, as Windows marks what it leaves in folders."""
    if sys.platform != "win32":
        return False
    both = stat.FILE_ATTRIBUTE_HIDDEN | stat.FILE_ATTRIBUTE_SYSTEM
    return path.lstat().st_file_attributes & both == both


def _is_link(path: str) -> bool:
    """A symbolic link, or a junction of Windows, which os.walk would follow."""
    return os.path.islink(path) or (  # noqa: PTH114 - 10 times as fast
        sys.platform == "win32" and os.path.realpath(path) != os.path.abspath(path)  # noqa: PTH100
    )


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
def _naming(path: Path) -> Iterator[None]:
    """Let an error of the disk name its file: a write that fails does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when all is on disk.

    A name of its own in the same folder, flush, fsync, rename: a reader sees the old
    file or the whole new one, never a part, whoever else is writing it. On any
    exception the temporary file goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with _naming(path), temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    except BaseException as error:
        remove_file(temporary)
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename, error.filename2 = str(path), None
        raise


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically; one that holds this already is left as it is."""
    if not path.is_file() or path.read_bytes() != content:
        with atomic_write(path) as file:
            file.write(content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as indented UTF-8 JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_file(path, text.encode("utf-8", "backslashreplace"))


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
    except ValueError as error:
        raise PipelineError(f"{path} can't be read ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise PipelineError(f"{path} is not a JSON object: {remedy}")
    return content


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
_NO_FORMULA = tuple(f"'{start}" for start in _FORMULA)
"""An apostrophe stands before a text that a spreadsheet would calculate."""


def csv_writer(
    file: BinaryIO, columns: Sequence[str]
) -> Callable[[Mapping[str, object]], object]:
    """Begin a CSV file of UTF-8 with BOM, for a Spanish Excel; what writes a row.

    No text is a formula, and a name that is not UTF-8 keeps its bytes: `read_csv` gives
    all back as it was.
    """
    file.write(codecs.BOM_UTF8)
    text = codecs.getwriter("utf-8")(file, "surrogateescape")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()

    def write(row: Mapping[str, object]) -> None:
        texts = {k: v for k, v in row.items() if isinstance(v, str)}
        guarded = {k: f"'{v}" for k, v in texts.items() if v.startswith(_FORMULA)}
        writer.writerow({**row, **guarded})

    return write


def write_csv(
    path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]
) -> None:
    """Write rows as `csv_writer` does, to a file as `write_file` does."""
    content = io.BytesIO()
    write = csv_writer(content, columns)
    for row in rows:
        write(row)
    write_file(path, content.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a CSV file of UTF-8 with or without BOM, as `csv_writer` writes them."""

    def plain(value: Any) -> Any:
        guarded = isinstance(value, str) and value.startswith(_NO_FORMULA)
        return value[1:] if guarded else value

    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return [{k: plain(v) for k, v in row.items()} for row in csv.DictReader(file)]


def class_name_problem(names: Iterable[str]) -> str:
    """Why these can't be the names of classes side by side; empty where they can."""
    seen: dict[str, str] = {}
    for name in names:
        plain = unicodedata.normalize("NFC", name).strip().casefold()
        if plain.replace("_", " ") == config.INCONCLUSIVE:
            return f"{name!r} is what phase 4 says of doubtful images: rename it"
        if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs") for letter in name):
            return f"{name!r} has characters that are not text: rename it"
        if (other := seen.setdefault(plain, name)) != name:
            return (
                f"{other!r} and {name!r} differ only in case, spaces or Unicode form: "
                "rename or merge them"
            )
    return ""


def shown_path(path: str) -> str:
    """A path for a terminal or a table: printable, in one line."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


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
    path : Path or None
        The file; made by the first `add`. None keeps the records in memory.
    sync_every_s : float
        Records may wait so long for the disk; a kill of the machine then loses them.
    lock_file : Path, optional
        Held by every `add`, where more than one process may write.
    """

    def __init__(
        self,
        path: Path | None,
        sync_every_s: float = 0.0,
        lock_file: Path | None = None,
    ) -> None:
        self.path, self._every, self._synced = path, sync_every_s, 0.0
        self._lock = filelock.FileLock(lock_file) if lock_file else nullcontext()
        self._records: dict[str, dict[str, Any]] = {}
        self._read_to = 0
        self.refresh()

    def refresh(self) -> None:
        """Read what was added since, by whomever."""
        if self.path is None or not self.path.exists():
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
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
        data = lines.encode("utf-8", "backslashreplace")
        if self.path is None:
            for line in data.splitlines():
                self._take(line)
            return
        if not self.path.parent.is_dir():  # unmounted: the lock would make it anew
            raise FileNotFoundError(
                errno.ENOENT, os.strerror(errno.ENOENT), str(self.path.parent)
            )
        with _naming(self.path), self._lock:
            self.refresh()
            with self.path.open("ab") as file:
                if file.tell() > self._read_to:  # a torn line must not swallow this
                    file.write(b"\n")
                file.write(data)
                file.flush()
                if time.monotonic() - self._synced >= self._every:
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()
            self.refresh()

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(record, dict):
            return
        for name in ("key", "answer", "embedding"):  # the last two: version 1.0
            if isinstance(record.get(name), str):
                self._records[record.pop(name)] = record
                return
        if isinstance(bad := record.get("quarantined"), str):  # version 1.0
            self._records[bad] = {**self._records.get(bad, {}), "quarantined": True}
        taken_back = record.get("taken_back")
        for key in taken_back if isinstance(taken_back, list) else ():
            self._records.pop(str(key), None)


# --- DICOM --------------------------------------------------------------------------
# Owns the way from a file to its stored values: the same for phase 1, which writes
# them, and for phases 2 and 4, which look at them. Never changes a file, and believes
# no decoder that it has not checked.
#
# pydicom reads the elements and splits the pixels into fragments. Not by `dcmread`: it
# inflates without bound and can't be told where an image ends. Nor by its decoders:
# they take the word of the transfer syntax for that of the codestream. imagecodecs
# decodes.

PIXEL_DATA, ITEM_GROUP, UNDEFINED_LENGTH = 0x7FE00010, 0xFFFE, 0xFFFFFFFF
KNOWN_VRS = frozenset(vr.value for vr in VR if len(vr) == 2)
BLANK_VRS = (b"  ", b"--", b"??")
"""What some writers put where a VR should stand; a 16-bit length follows."""

HEADER_MB = 64
"""Room for the header beside --max-image-mb."""

_ITEM, _END_OF_ITEMS = b"\xfe\xff\0\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"


def read_dicom(path: Path, limit_mb: int = config.Config.max_image_mb) -> Dataset:
    """Read a DICOM file, whatever its preamble and file meta group say (PS3.10 7.1).

    The dataset holds raw elements; ``file_meta.TransferSyntaxUID`` says how the bytes
    are encoded, and the attribute ``notes`` (list of str) what had to be mended.

    Raises
    ------
    RejectedError
        Not a DICOM file, damaged, or it is, or inflates to, more than `limit_mb` and
        HEADER_MB megabytes.
    OSError
        The file can't be read, or changed meanwhile.
    """
    if path.exists() and not path.is_file():
        raise RejectedError("is not a regular file")
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        if before.st_size > limit_mb + HEADER_MB << 20:
            raise RejectedError(f"is larger than {limit_mb + HEADER_MB} MB")
        try:
            dataset = _read_dataset(file, limit_mb + HEADER_MB)
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


def _read_meta(file: BinaryIO, notes: list[str]) -> Dataset:
    """The file meta group (PS3.10 7.1), where there is one: by tags, not its length."""
    head = file.read(132)
    if head[128:] != b"DICM":
        file.seek(0)
        if not head.startswith((b"\2\0", b"\x08\0", b"\0\x08")):
            raise RejectedError("is not a DICOM file" if head else "is empty")
    start = file.tell()
    meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    length = number(text(meta, "FileMetaInformationGroupLength"))
    if length not in (None, file.tell() - start - 12):
        notes.append("its file meta group had another length than it said")
    if meta and not start:
        notes.append("had no preamble")
    return meta


def _read_dataset(file: BinaryIO, limit_mb: int) -> Dataset:
    notes = list[str]()
    meta = _read_meta(file, notes)
    uid = UID(text(meta, "TransferSyntaxUID"))
    if not uid:
        notes.append("had no transfer syntax" if meta else "had no file meta group")
    if uid == DeflatedExplicitVRLittleEndian:
        file = _inflated(file.read(), limit_mb, notes)
    first = file.read(8)
    if len(first) < 8:
        raise RejectedError("is truncated: there is nothing after the file meta group")
    file.seek(-8, os.SEEK_CUR)
    little = first[0] > 0 or first[1] == 0  # no group is 0000 but one left out below
    vr, said_explicit = first[4:6], uid.is_transfer_syntax and not uid.is_implicit_VR
    implicit = vr.decode("latin-1") not in KNOWN_VRS
    implicit &= not (said_explicit and _is_unknown_vr(vr))
    native = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    native = ImplicitVRLittleEndian if implicit else native
    if uid.is_transfer_syntax and (
        (uid.is_implicit_VR, uid.is_little_endian) != (implicit, little)
    ):
        notes.append(f"said {uid.name}, is {native.name}")
        uid = native
    dataset = _read_elements(file, implicit, little, notes)
    dataset.file_meta, dataset.notes = FileMetaDataset(meta), notes
    dataset.file_meta.TransferSyntaxUID = uid or native
    return dataset


def _inflated(data: bytes, limit_mb: int, notes: list[str]) -> BinaryIO:
    """A deflated dataset (PS3.5 A.5), inflated within bounds."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(data, limit_mb + 1 << 20)
    except zlib.error as error:
        raise RejectedError(f"the deflated dataset is damaged: {error}") from None
    if len(inflated) > limit_mb << 20:
        raise RejectedError(f"inflates to more than {limit_mb} MB")
    if not inflater.eof:
        raise RejectedError("is truncated: the deflated dataset does not end")
    if (rest := len(inflater.unused_data)) > 1:
        notes.append(f"{rest} bytes after the deflated dataset left out")
    return io.BytesIO(inflated)


def _read_elements(
    file: BinaryIO, implicit: bool, little: bool, notes: list[str]
) -> Dataset:
    """The elements of a dataset, raw; what has no place there is left out.

    What pydicom can't read past is mended in a copy, which is read from the beginning.
    """
    start = file.tell()
    while (read := _walk(file, implicit, little, notes))[1]:
        at, mended, note = read[1]
        notes.append(note)
        file.seek(0)
        data = bytearray(file.read())
        data[at : at + 4] = mended
        file = io.BytesIO(data)
        file.seek(start)
    dataset = read[0]
    if (rest := len(file.read())) > 1:
        notes.append(f"{rest} bytes after the dataset left out")
    for tag in tuple(dataset.keys()):
        if tag.group in (0, 2, ITEM_GROUP):
            size = len(dataset.get_item(tag, keep_deferred=True).value or b"")
            notes.append(f"{tag} of {size} bytes left out: it has no place there")
            del dataset[tag]
    return dataset


def _walk(
    file: BinaryIO, implicit: bool, little: bool, notes: list[str]
) -> tuple[Dataset, tuple[int, bytes, str] | None]:
    """Read elements up to the end of the image, or what has to be mended before.

    pydicom takes a value that is longer than the file, and one after a VR that it
    doesn't know, without a word: each element is looked at before its value is read.
    """
    start, last, end, fault, damage = file.tell(), 0, 0, None, ""
    size, seen = file.seek(0, os.SEEK_END), Counter[BaseTag]()
    file.seek(start)

    def stop(tag: BaseTag, vr: str | None, length: int) -> bool:
        nonlocal last, end, fault, damage
        at = file.tell()
        if last >= PIXEL_DATA and (tag <= last or tag.group == 0xFFFF):
            return True  # what follows the image is no element
        if fault := None if implicit else _to_mend(file, at, tag, vr, length):
            return True
        if length != UNDEFINED_LENGTH and at + length > size:
            said = f"{tag} says {length} bytes, {size - at} are there"
            damage = said if last < PIXEL_DATA else ""
            return True
        seen[tag] += 1
        last = last if tag.group == ITEM_GROUP else tag
        end = at + length
        return False

    dataset = read_dataset(file, implicit, little, stop_when=stop)
    if not dataset and last and not (fault or damage):  # pydicom found no delimiter
        note = "its compressed pixels had no delimiter at their end"
        fault = size, _END_OF_ITEMS, note
        damage = "" if last == PIXEL_DATA else f"{BaseTag(last)} does not end"
    if damage:
        error = RejectedError(f"is truncated: {damage}")
        error.dataset = dataset
        raise error
    if not fault:
        twice = (tag for tag, times in seen.items() if times > 1)
        notes += [f"{tag} stands there again: the last is kept" for tag in twice]
    _unread(file, size, end)
    return dataset, fault


def _unread(file: BinaryIO, size: int, end: int) -> None:
    """Go back to the end of the last element, where pydicom has swallowed a rest.

    `end` lies beyond the file where the element has no length: then its delimiter ends
    it. A rest is swallowed if it is shorter than the beginning of an element.
    """
    if file.tell() == size:
        file.seek(max(0, size - 16))
        _, delimiter, rest = file.read().rpartition(_END_OF_ITEMS)
        file.seek(end if end <= size else size - len(rest) * bool(delimiter))


def _to_mend(
    file: BinaryIO, at: int, tag: BaseTag, vr: str | None, length: int
) -> tuple[int, bytes, str] | None:
    """Place and bytes that make something of a VR with which pydicom does nothing.

    One that it does not know becomes UN (PS3.5 6.2.2): one of a later edition has 32
    bits of length behind two zero bytes, a blank one 16.
    """
    if (tag, vr, length) == (PIXEL_DATA, "UN", UNDEFINED_LENGTH):
        return at - 8, b"OB\0\0", "its compressed pixels had the VR UN"
    if vr in KNOWN_VRS or tag.group == ITEM_GROUP:
        return None
    file.seek(at - 4)
    named, short = struct.unpack("<2sH", file.read(4))
    if not _is_unknown_vr(named):
        return None
    is_later = named not in BLANK_VRS and not short
    mended = b"UN\0\0" + (b"" if is_later else struct.pack("<L", short))
    return at - 4, mended, f"the unknown VR {named.decode()!r} became UN"


def _is_unknown_vr(named: bytes) -> bool:
    return named in BLANK_VRS or (named.isalpha() and named.isupper())


def texts(dataset: Dataset, keyword: str) -> list[str]:
    """The values of an element as text; what can't be parsed comes as it stands."""
    try:
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


# Stored values: PS3.5 8.1.1.

_GREY = frozenset(("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"))
_COLOUR = frozenset(("RGB", "HSV", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422"))
_COLOUR |= {"YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT"}


def pixel_layout(dataset: Dataset) -> Dataset:
    """The attributes that say how samples lie in the pixel data (PS3.3 C.7.6.3).

    One that is missing or impossible has its usual value. PlanarConfiguration is there
    where there are colours; NumberOfFrames always. The `notes` are those of `dataset`.

    Raises
    ------
    RejectedError
        There are no pixels by these attributes, or they can't be meant.
    """

    def whole(keyword: str) -> int:
        return int(number(text(dataset, keyword)) or 0)

    rows, columns, frames = whole("Rows"), whole("Columns"), whole("NumberOfFrames")
    if min(rows, columns) < 1 or frames < 0:
        raise RejectedError("holds no image: rows, columns or frames are missing")
    allocated, samples = whole("BitsAllocated"), whole("SamplesPerPixel")
    photometric = text(dataset, "PhotometricInterpretation").upper()
    fits = samples == 0 or (samples == 3) == (photometric in _COLOUR)
    if photometric not in _GREY | _COLOUR or not fits:
        photometric = "RGB" if samples == 3 else "MONOCHROME2"
    samples = samples or (1 if photometric in _GREY else 3)
    if samples not in (1, 3) or not 1 <= allocated <= 64:
        raise RejectedError(
            f"says {samples} samples of {allocated} bits: no pixel is like that"
        )
    stored, high = whole("BitsStored"), whole("HighBit")
    stored = stored if 0 < stored <= allocated else allocated
    layout = Dataset()
    layout.notes = dataset.notes
    layout.Rows, layout.Columns, layout.NumberOfFrames = rows, columns, frames or 1
    layout.SamplesPerPixel, layout.PhotometricInterpretation = samples, photometric
    layout.BitsAllocated, layout.BitsStored = allocated, stored
    layout.HighBit = high if stored <= high + 1 <= allocated else stored - 1
    layout.PixelRepresentation = int(whole("PixelRepresentation") == 1)
    if samples > 1:
        layout.PlanarConfiguration = int(whole("PlanarConfiguration") == 1)
    return layout


def corrections(layout: Dataset, dataset: Dataset) -> Iterator[DataElement]:
    """The attributes of a layout that a dataset lacks, or says otherwise."""
    for element in layout:
        said = text(dataset, element.keyword)
        is_usual = element.keyword == "NumberOfFrames" and not said
        if said != str(element.value) and not is_usual:
            yield element


def frame_samples(layout: Dataset) -> int:
    """Samples of a native frame; 4:2:2 has two a pixel (PS3.3 C.7.6.3.1.2)."""
    is_422 = layout.PhotometricInterpretation.endswith("_422")
    of_pixel = 2 if is_422 else layout.SamplesPerPixel
    return int(layout.Rows * layout.Columns * of_pixel)


def native_size(layout: Dataset) -> int:
    """Bytes of all frames, as they lie in native pixel data."""
    bits = layout.NumberOfFrames * frame_samples(layout) * layout.BitsAllocated
    return int(bits + 7) // 8


class Pixels(NamedTuple):
    """What decoding makes of an image."""

    values: NDArray[Any]
    """Stored values, little endian, (frames, …) in the order of native pixel data."""
    layout: Dataset
    """How they lie there, as the header must say: see `pixel_layout`."""
    codec: str
    """Of the codestream; empty where the pixels were native."""
    overlays: Collection[int]
    """Groups of overlays that stood in unused bits, and are left out."""


def decode(dataset: Dataset, limit_mb: int = config.Config.max_image_mb) -> Pixels:
    """Stored values of an image, by one rule for every transfer syntax.

    `dataset` is as `read_dicom` returns it; its `notes` get what had to be mended.

    Raises
    ------
    RejectedError
        No image, or one that is damaged, contradicts its header or would take more than
        `limit_mb` megabytes.
    Exception
        Whatever imagecodecs raises on a damaged stream.
    """
    element: Any = dataset.get_item(PIXEL_DATA)
    if element is None or not element.value:
        raise RejectedError("holds no image")
    layout, notes = pixel_layout(dataset), dataset.notes
    for right in corrections(layout, dataset):
        said = text(dataset, right.keyword) or "was missing"
        notes.append(f"{right.keyword} {said}: taken as {right.value}")
    if (size := native_size(layout)) > min(limit_mb << 20, UNDEFINED_LENGTH - 1):
        raise RejectedError(f"would decode to {size >> 20} MB: see --max-image-mb")
    uid = dataset.file_meta.TransferSyntaxUID
    is_known, codec = uid.is_transfer_syntax, ""
    is_compressed = is_known and uid.is_encapsulated
    if uid in MPEGTransferSyntaxes:
        raise RejectedError(f"{uid.name} is video, which is not for this program")
    if getattr(element, "length", 0) == UNDEFINED_LENGTH or (
        is_compressed and element.value[:4] == _ITEM
    ):
        values, codec = _compressed(element.value, layout)
    elif not is_known:  # some have another byte order
        raise RejectedError(f"has an unknown transfer syntax: {uid}")
    else:
        notes += ["said compressed, is not"] if is_compressed else []
        values = _native(element, layout)
    layout.BitsAllocated = 8 * values.itemsize
    named = _embedded_overlays(dataset, layout)
    lost = [group for group in named if (group, 0x3000) not in dataset]
    notes += ["an overlay in unused bits was left out"] if lost else []
    return Pixels(_stored(values, layout, named.values()), layout, codec, lost)


def _compressed(value: bytes, layout: Dataset) -> tuple[NDArray[Any], str]:
    """Samples of all frames, interleaved, and their codec."""
    frames = [decode_stream(one, layout) for one in _streams(value, layout)]
    samples, codec = frames[0]
    photometric = layout.PhotometricInterpretation
    is_rgb = codec == "JPEG" or photometric in ("YBR_RCT", "YBR_ICT")
    if layout.SamplesPerPixel > 1:
        whole = "YBR_FULL" if photometric.startswith("YBR") else photometric
        layout.PhotometricInterpretation = "RGB" if is_rgb else whole
        layout.PlanarConfiguration = 0
    if len(frames) == 1:
        return samples[None], codec
    return np.stack([samples for samples, _ in frames]), codec


def _native(element: Any, layout: Dataset) -> NDArray[Any]:
    """Samples of native pixel data, (frames, samples) in the order of storage."""
    value, bits, little = element.value, layout.BitsAllocated, element.is_little_endian
    if (excess := len(value) - native_size(layout)) < 0:
        needed = native_size(layout)
        raise RejectedError(f"is truncated: {len(value)} of {needed} bytes of pixels")
    if excess > 1:
        layout.notes.append(f"{excess} bytes after the last frame left out")
    if not little and element.VR == "OW" and bits < 16:  # PS3.5 A.3: words are swapped
        value = np.frombuffer(value, "u2", len(value) // 2).byteswap().tobytes()
    elif not little and element.VR == "OW" and bits > 16:  # programs differ
        layout.notes.append(f"bytes were swapped in words of {bits} bits")
    count = layout.NumberOfFrames * frame_samples(layout)
    if bits in (1, 12):
        packed = np.frombuffer(value, np.uint8)
        flat = np.unpackbits(packed, count=count * bits, bitorder="little")
        places = (1 << np.arange(bits)).astype("<u2")
        samples = flat if bits == 1 else flat.reshape(count, bits) @ places
    elif bits in (8, 16, 32, 64):
        kind = "i" if layout.PixelRepresentation else "u"
        samples = np.frombuffer(value, f"<{kind}{bits // 8}", count)
        samples = samples if little else samples.byteswap()
    else:
        raise RejectedError(f"has native pixels of {bits} bits")
    return samples.reshape(layout.NumberOfFrames, -1)


def _bits(samples: NDArray[Any]) -> NDArray[Any]:
    return samples.view(f"u{samples.itemsize}")


def _stored(
    samples: NDArray[Any], layout: Dataset, named: Iterable[int]
) -> NDArray[Any]:
    """The stored values of decoded samples: what is outside BitsStored is no pixel.

    Bits outside that vary from sample to sample and are not `named` as an overlay tell
    that the header is wrong, not the image: then BitsStored grows. Those that only
    repeat the sign are its extension, and those that never change mean nothing.
    """
    top, stored, width = layout.HighBit + 1, layout.BitsStored, 8 * samples.itemsize
    low, signed = top - stored, layout.PixelRepresentation
    most = 1 << top - 1 if signed else 1 << top
    fits = top == width or samples.max() < most
    if low or not fits or (signed and samples.min() < -most):
        bits = _bits(samples).copy()
        for bit in sorted(named):  # above signed samples the sign goes on
            filled = bits << 1 if signed and bit >= top else bits & 0
            bits ^= (bits ^ filled) & bits.dtype.type(1 << bit)
        flat = bits.ravel()
        varying = int(np.bitwise_or.reduce(flat)) & ~int(np.bitwise_and.reduce(flat))
        used = varying.bit_length()
        if signed:
            changes = int(np.bitwise_or.reduce(flat ^ flat >> 1))
            while used > top and not changes >> used - 2 & 1:
                used -= 1
        low, top = 0 if varying & (1 << low) - 1 else low, max(used, top)
        samples = (bits << width - top).view(samples.dtype) >> width - top + low
        if top - low != stored:
            layout.BitsStored = top - low
            layout.notes.append(f"bits stored {stored} -> {top - low}: more are used")
    layout.HighBit = layout.BitsStored - 1
    return samples


def _embedded_overlays(dataset: Dataset, layout: Dataset) -> dict[int, int]:
    """Group -> bit of the overlays that stand in unused bits (PS3.3 C.9.2, retired)."""
    found, low = {}, layout.HighBit + 1 - layout.BitsStored
    for group in range(0x6000, 0x6020, 2):
        if (group, 0x0102) in dataset:
            bit = int(number(str(dataset[group, 0x0102].value)) or 0)
            used = low <= bit <= layout.HighBit
            if not used and 0 <= bit < layout.BitsAllocated:
                found[group] = bit
    return found


def frame_of(pixels: Pixels) -> NDArray[Any]:
    """The frame that stands for an image: the middle one of a multi-frame.

    (rows, columns) or (rows, columns, 3); stored values; of YBR_FULL, RGB. The same for
    a file and phase 1's copy of it.
    """
    layout = pixels.layout
    flat: NDArray[Any] = pixels.values[len(pixels.values) // 2].ravel()
    photometric, samples = layout.PhotometricInterpretation, layout.SamplesPerPixel
    if photometric.endswith("_422"):
        data = expand_ybr422(flat.tobytes(), layout.BitsAllocated)
        flat = np.frombuffer(data, flat.dtype)
    if layout.get("PlanarConfiguration"):
        flat = flat.reshape(samples, -1).T
    shape = (layout.Rows, layout.Columns, samples)
    frame = flat.reshape(shape if samples > 1 else shape[:2])
    if photometric.startswith(("YBR_FULL", "YBR_PARTIAL")):
        return convert_color_space(frame, "YBR_FULL", "RGB")
    return frame


# Codestreams: PS3.5 8.2 and A.4. imagecodecs says nothing of a stream that ends early,
# so that is checked here. Its special codec for HTJ2K is left aside: where a lossy
# stream overshoots 16 bits, OpenJPH turns white into black (imagecodecs 2026.3.6);
# OpenJPEG, which reads HTJ2K too, clips.


Stream = Any
"""A codestream: a view of bytes, or bytes where it comes in several fragments."""

Decoded = tuple[NDArray[Any], str, int]
"""Samples, codec, and the bits that the stream says its samples have."""


def _streams(value: bytes, layout: Dataset) -> list[Stream]:
    """The codestream of each frame (PS3.5 A.4).

    A frame begins with a fragment that opens like the first. The offset table, which
    may be missing or wrong, is not needed: pydicom's `generate_frames` believes in it.
    """
    count, view = layout.NumberOfFrames, memoryview(value)
    starts = parse_fragments(value)[1]
    ends = [*starts[1:], len(value)]
    fragments = [view[at + 8 : end] for at, end in zip(starts, ends, strict=True)]
    if len(fragments) < 2 or not fragments[1]:  # the first is the offset table
        raise RejectedError("the compressed pixel data is empty")
    del fragments[0]
    if value[ends[-2] + 4 : ends[-2] + 8] != struct.pack("<L", len(fragments[-1])):
        raise RejectedError("is truncated: a fragment reaches beyond the pixels")
    opening = fragments[0][: 3 if fragments[0][0] == 0xFF else 8]
    frames: list[list[memoryview]] = []
    for one in fragments:
        if one[: len(opening)] == opening or len(fragments) == count:
            frames.append([])
        frames[-1].append(one)
    if len(frames) < count:
        raise RejectedError(f"has {len(frames)} codestreams for {count} frames")
    if spare := sum(len(one) for parts in frames[count:] for one in parts):
        layout.notes.append(f"{spare} bytes of more frames than it says left out")
    return [one[0] if len(one) == 1 else b"".join(one) for one in frames[:count]]


def decode_stream(stream: Stream, layout: Dataset) -> tuple[NDArray[Any], str]:
    """Decode one compressed frame; (rows, columns) or (rows, columns, 3), and codec.

    The codestream's markers, not the transfer syntax, say which codec it needs. Samples
    are little endian, and masked or sign-extended from the stream's own precision.
    """
    start = bytes(stream[:12])
    is_rle = 1 <= start[0] <= 15 and not any(start[1:4])
    if start.startswith(b"\xff\xd8"):
        decode = _decode_jpeg
    elif start.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP")):
        decode = _decode_j2k
    elif is_rle and not layout.BitsAllocated % 8:
        decode = _decode_rle
    else:
        raise RejectedError(f"no codestream of a known kind: starts {start.hex(' ')}")
    end = b"\xff\xd9"  # some writers pad their streams
    if not (is_rle or end in bytes(stream[-256:]) or end in bytes(stream)):
        raise RejectedError("is truncated: the codestream has no end marker")
    samples, codec, precision = decode(stream, layout)
    colours, allocated = layout.SamplesPerPixel, layout.BitsAllocated
    if samples.ndim == 3 and samples.shape[-1] != colours:
        samples = np.moveaxis(samples, 0, -1)
    shape = (layout.Rows, layout.Columns, colours)[: 3 if colours > 1 else 2]
    bits = _bits(np.ascontiguousarray(samples.reshape(shape)))
    kind = "i" if layout.PixelRepresentation else "u"
    samples = bits.view(f"{kind}{bits.itemsize}")
    if (spare := 8 * bits.itemsize - precision) > 0:
        samples = (bits << spare).view(samples.dtype) >> spare
    if precision > allocated or allocated % 8:
        allocated = 8 << max(0, (precision - 1).bit_length() - 3)
    return samples.astype(f"<{kind}{allocated // 8}", copy=False), codec


def _check_shape(codec: str, layout: Dataset, *shape: int) -> None:
    """Before a decoder takes memory for what a stream says of its size."""
    said = layout.Rows, layout.Columns, layout.SamplesPerPixel
    if shape != said:
        raise RejectedError(
            f"the {codec} stream is {shape[1]}×{shape[0]}×{shape[2]},"
            f" the header says {said[1]}×{said[0]}×{said[2]}"
        )


def _note_rest(stream: Stream, at: int, layout: Dataset) -> None:
    """What is behind the first end marker after the frame header is no image of it."""
    end = re.compile(b"\xff\xd9").search(stream, at)
    if end and (rest := len(stream) - end.end()) > 1:
        layout.notes.append(f"{rest} bytes after its codestream left out")


_FRAME_MARKERS = {0xFFF7, *range(0xFFC0, 0xFFD0)} - {0xFFC4, 0xFFC8, 0xFFCC}


def _decode_jpeg(stream: Stream, layout: Dataset) -> Decoded:
    """By the frame header (ISO 10918-1 B.2.2, ISO 14495-1 C.2.2); colours as RGB."""
    at, jfif, marker = 2, False, 0
    while at + 10 <= len(stream):
        marker, length = struct.unpack_from(">HH", stream, at)
        if marker in _FRAME_MARKERS or marker == 0xFFDA or marker < 0xFFC0:
            break
        jfif |= marker == 0xFFE0 and stream[at + 4 : at + 8] == b"JFIF"
        at += 1 if marker == 0xFFFF else 2 + length
    if marker not in _FRAME_MARKERS or at + 10 > len(stream):
        raise RejectedError("the JPEG stream has no frame header")
    precision, rows, columns, colours = struct.unpack_from(">BHHB", stream, at + 4)
    codec = {0xFFC3: "JPEG Lossless", 0xFFF7: "JPEG-LS"}.get(marker, "JPEG")
    _check_shape(codec, layout, rows, columns, colours)
    _note_rest(stream, at, layout)
    if codec == "JPEG-LS":
        return imagecodecs.jpegls_decode(stream), codec, precision
    # A sample takes one bit at least, or an 8 × 8 block does (ISO 10918-1 F.2, H.2).
    if 8 * len(stream) < rows * columns // (64 if codec == "JPEG" else 1):
        raise RejectedError("is truncated: so short a codestream has no such image")
    is_ycbcr = codec == "JPEG" and (
        ("YBR" in layout.PhotometricInterpretation or jfif)
        and stream[at + 10 : at + 19 : 3] not in (b"RGB", b"rgb")
    )
    options: dict[str, Any] = {}
    if colours == 3:
        options = {"colorspace": "YCBCR" if is_ycbcr else "RGB", "outcolorspace": "RGB"}
    samples: NDArray[Any] = imagecodecs.jpeg8_decode(stream, **options)
    _check_end(stream, samples, options)
    return samples, codec, precision


def _check_end(stream: Stream, samples: NDArray[Any], options: dict[str, Any]) -> None:
    """Refuse a JPEG stream whose data end before its image.

    libjpeg fills up such an image without a word. Where the last samples look like
    that, the stream is decoded again with more data before its end marker, and before
    the fill bytes there (ISO 10918-1 B.1.1.2): a whole one never reads them.
    """
    corner = np.atleast_3d(samples)[-2:, -5:, 0].astype(np.int64)
    steps = np.diff(corner[-1]), corner[-1] - corner[0]
    if any(np.all(step == step[:1]) for step in steps):
        data = bytes(stream)
        end = len(data[: data.rindex(b"\xff\xd9")].rstrip(b"\xff"))
        longer = data[:end] + b"\x55" * 64 + data[end:]
        if not np.array_equal(samples, imagecodecs.jpeg8_decode(longer, **options)):
            raise RejectedError("is truncated: the codestream ends before the image")


def _decode_j2k(stream: Stream, layout: Dataset) -> Decoded:
    """By the SIZ segment (ISO 15444-1 A.5.1); bit 14 of Rsiz says HTJ2K (15444-15)."""
    at = bytes(stream[:4096]).find(b"\xff\x4f\xff\x51")
    if at < 0 or at + 44 > len(stream):
        raise RejectedError("the JPEG 2000 stream has no SIZ segment")
    able, right, bottom, left, top = struct.unpack_from(">HLLLL", stream, at + 6)
    colours, depth = struct.unpack_from(">HB", stream, at + 40)
    codec = "HTJ2K" if able & 0x4000 else "JPEG 2000"
    _check_shape(codec, layout, bottom - top, right - left, colours)
    _note_rest(stream, at, layout)
    return imagecodecs.jpeg2k_decode(stream), codec, (depth & 0x7F) + 1


def _decode_rle(stream: Stream, layout: Dataset) -> Decoded:
    """PS3.5 annex G: a segment per byte of a sample, the most significant first."""
    size, plane = layout.BitsAllocated // 8, layout.Rows * layout.Columns
    needed = size * layout.SamplesPerPixel
    count, *starts = struct.unpack("<16L", bytes(stream[:64]).ljust(64, b"\0"))
    if count != needed:
        raise RejectedError(f"has {count} RLE segments, not {needed}")
    decoded, excess = np.empty((plane, needed // size, size), np.uint8), 0
    for index, end in enumerate([*starts[1:count], len(stream)]):
        segment = imagecodecs.packbits_decode(stream[starts[index] : end])
        if len(segment) < plane:
            raise RejectedError("is truncated: an RLE segment is too short")
        if len(segment) >= plane + layout.Columns:
            raise RejectedError("has RLE segments of a larger image than it says")
        sample, byte = divmod(index, size)
        decoded[:, sample, -1 - byte] = np.frombuffer(segment, np.uint8, plane)
        excess += len(segment) - plane
        del segment  # it is half an image, and the next one is made beside it
    if excess:
        layout.notes.append(f"{excess} bytes after its RLE segments left out")
    samples = decoded.view(f"<u{size}").reshape(layout.Rows, layout.Columns, -1)
    return samples, "RLE", 8 * size


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
    header: Mapping[str, str] = field(default_factory=dict, compare=False)
    """HEADER_FACTS, texts; empty where the file has none."""

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
        pixels = decode(dataset)
        # As phase 1 writes it: a padding value without a VR has the sign of the pixels.
        dataset.PixelRepresentation = pixels.layout.PixelRepresentation
        return _prepared(frame_of(pixels), dataset)
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
    padding = _padding(pixels, dataset)
    is_padded = bool(padding.any())
    content = pixels[~padding] if is_padded else pixels
    if not content.size or content.min() == content.max():
        value = content.flat[0] if content.size else "padding"
        raise RejectedError(f"has no contrast: every pixel is {value}")
    values, aspect = _display_values(pixels, dataset), _pixel_aspect(dataset)
    share: NDArray[Any] = np.ones(0)
    if is_padded:
        values[padding] = np.median(values[~padding])  # else it bleeds inwards
        share = _reduce((~padding).astype(np.float32), aspect)
    view = _pad(_window(_reduce(values, aspect), share))
    return PreparedImage(
        image_id=digest_of(pixels),
        view_id=digest_of(view),
        png=_png(view),
        header=header_facts(dataset),
    )


def _png(grey: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG", compress_level=1)
    return file.getvalue()


HEADER_FACTS = {
    "sop_instance_uid": ("SOPInstanceUID",),
    "modality": ("Modality",),
    "manufacturer": ("Manufacturer",),
    "detector": ("DetectorID", "DeviceSerialNumber"),
    "station": ("StationName", "DeviceSerialNumber"),
    "day": ("AcquisitionDate", "AcquisitionDateTime", "ContentDate", "StudyDate"),
    "study": ("StudyInstanceUID",),
    "rows": ("Rows",),
    "columns": ("Columns",),
    "kvp": ("KVP",),
    "mas": ("ExposureInuAs", "Exposure"),
}
"""What phase 3 needs of a header: the first attribute that has a value."""


def header_facts(dataset: Dataset) -> dict[str, str]:
    """The header facts of an image, as texts of one line."""
    facts = {}
    for name, keywords in HEADER_FACTS.items():
        values = (_header_text(dataset, keyword) for keyword in keywords)
        facts[name] = next(filter(None, values), "")
    facts["day"] = facts["day"][:8]
    return facts


def _header_text(dataset: Dataset, keyword: str) -> str:
    value = text(dataset, keyword)
    if keyword == "ExposureInuAs":
        micro = number(value)
        value = "" if micro is None else f"{micro / 1000:g}"
    return " ".join(value.split())[:200]


# The second reader's view of the picture.

CONTRAST_SIGMA, CONTRAST_FLOOR = 6.0, 0.02
"""Local contrast: pixels of the halved picture, and the grey that counts as none."""


def picture_statistics(view: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Describe the prepared picture in 40 numbers that need no vision model.

    Twenty-eight tell its structure: the power spectrum of the picture, its local
    contrast normalised, in ten rings of frequency; in nine of them how far it keeps to
    one direction (an edge, bars) and to two crossed ones (a plate, a block). Two tell
    how much contrast there is, and on what share. Ten tell its grain: the shares of
    rotation-invariant uniform local binary patterns (Ojala et al., PAMI 24 (2002) 971).
    A Hann window makes margins, collimation and padding count for little.

    Parameters
    ----------
    view : ndarray, uint8 (rows, columns)
        As `prepare_image` makes it, with its padding.

    Returns
    -------
    ndarray, float32 (40,)
        Finite also for a black picture, or a strip of one row. Mirrored or turned by
        90 degrees the picture has the same numbers.
    """
    content = _without_padding(view)
    return np.concatenate([_structure(content), _grain(content)]).astype(np.float32)


def _without_padding(view: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cut the same number of padding lines from both sides of one axis."""
    cuts = []
    for axis in (0, 1):
        lines = np.flatnonzero((view != config.PADDING_GREY).any(axis=1 - axis))
        last = view.shape[axis] - 1
        cuts.append(min(lines[0], last - lines[-1]) if lines.size else 0)
    down, across = cuts
    if down > across:
        return view[down : len(view) - down]
    return view[:, across : view.shape[1] - across] if across > down else view


def _hann(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """A window of sum 1 without the zeros at its ends; in float32 it is too coarse."""
    down, across = (np.hanning(side + 2)[1:-1] for side in shape)
    window = np.outer(down, across)
    return np.asarray(window / window.sum())


def _structure(content: NDArray[np.uint8]) -> NDArray[np.float64]:
    from scipy.ndimage import gaussian_filter  # noqa: PLC0415

    height, width = (max(8, side // 2) for side in content.shape)
    picture = Image.fromarray(content.astype(np.float32) / np.float32(255))
    halved = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    blur = partial(gaussian_filter, sigma=CONTRAST_SIGMA, truncate=2.5)
    detail = halved - blur(halved)
    contrast = np.sqrt(np.maximum(blur(detail**2), 0))
    normal = detail / (contrast + CONTRAST_FLOOR)
    window = _hann(normal.shape)
    windowed = normal.size * window * (normal - np.sum(window * normal))
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    power = np.abs(np.fft.rfft2(windowed)) ** 2
    # Half of the frequencies are left out by rfft2: their mirror images count for them.
    power[:, 1 : (width + 1) // 2] *= 2
    edges = [0, *np.geomspace(0.012, 0.5, 10)]
    ring = np.searchsorted(edges, np.hypot(down, across), side="right") - 1

    def by_ring(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(ring.ravel(), values.ravel(), 11)[:10].astype(np.float64)

    angle = np.arctan2(down, across)
    total = by_ring(power) + 1e-9
    parts = [np.log(total / total.sum() + 1e-6)]
    for fold in (2, 4):
        real, imaginary = np.cos(fold * angle), np.sin(fold * angle)
        along = np.hypot(by_ring(power * real), by_ring(power * imaginary))
        parts.append((along / total)[1:])
    mean_contrast = np.log(np.sum(window * contrast) + 0.001)
    covered = np.sum(window * (contrast > CONTRAST_FLOOR))
    return np.concatenate([*parts, [mean_contrast, covered]])


def _grain(content: NDArray[np.uint8]) -> NDArray[np.float64]:
    height, width = content.shape
    padded = np.pad(content.astype(np.int16), 1, mode="edge")
    around = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
    centre = content.astype(np.int16) + 2
    bits = [padded[y : y + height, x : x + width] >= centre for y, x in around]
    ones = np.sum(bits, axis=0)
    changes = np.sum([bits[i] != bits[i - 1] for i in range(8)], axis=0)
    codes = np.where(changes <= 2, ones, 9)
    shares = np.bincount(codes.ravel(), _hann(content.shape).ravel(), 10)
    return np.sqrt(shares)


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
    if text(dataset, "PhotometricInterpretation").upper() == "PALETTE COLOR":
        try:
            pixels = apply_color_lut(pixels, dataset)
        except Exception as error:  # whatever a broken table provokes
            raise RejectedError(f"its palette can't be used: {error}") from None
    with suppress(Exception):  # a table that can't be read is none
        if pixels.ndim == 2 and dataset.get("ModalityLUTSequence"):
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
        aspect = sizes[0] / sizes[1] if len(sizes) == 2 and min(sizes) > 0 else 0.0
        if 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
            return aspect
    return 1.0


def _reduce(values: NDArray[np.float32], aspect: float) -> NDArray[np.float32]:
    """Antialiased resize to IMAGE_SIDE_PX on the longer side, keeping proportions."""
    height, width = values.shape[0] * aspect, float(values.shape[1])
    scale = config.IMAGE_SIDE_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.fromarray(values)
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0))


def _padding(pixels: NDArray[Any], dataset: Dataset) -> NDArray[np.bool_]:
    """Which pixels are no image, bool (rows, columns) (PS3.3 C.7.5.1.1.2).

    Their stored values are PixelPaddingValue, or reach from it to the range limit. A
    value that its VR gives another sign is brought into the range of the pixels.
    """
    ends = [
        number(text(dataset, keyword))
        for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")
    ]
    if pixels.ndim == 3 or ends[0] is None:
        return np.zeros(pixels.shape[:2], bool)
    known = np.array([int(one) for one in ends if one is not None])
    low, high = np.sort(known.astype(pixels.dtype))[[0, -1]]
    return np.asarray((low <= pixels) & (pixels <= high))


def _window(
    small: NDArray[np.float32], share: NDArray[np.floating[Any]], step: int = 1
) -> NDArray[np.uint8]:
    """Grey levels 0 to 255: robust percentiles, never narrower than the noise asks.

    `share` tells how much of a pixel is image, 0 to 1; it is empty where there is no
    padding. Padding has no part in the window, and is drawn as what stands beside the
    image. The window is that of every `step`-th pixel of a row and a column.
    """
    inside = share > 0.99 if share.size else np.ones(small.shape, bool)
    inside = inside if inside.any() else share >= share.max()
    seen, inside = small[::step, ::step], inside[::step, ::step]
    content = seen[inside]
    low, high = np.percentile(content, config.WINDOW_PERCENTILES)
    if low == high:
        low, high = content.min(), content.max()
    noise = _noise_sd(seen, inside)
    width = max(high - low, config.WINDOW_MIN_NOISE_SDS * noise, 1e-6)
    scaled = (small - (low + high) / 2) / width + 0.5
    grey = np.asarray(np.rint(np.clip(scaled, 0, 1) * 255), np.uint8)
    if share.size:
        grey[share < 0.5] = config.PADDING_GREY
    return grey


def _noise_sd(values: NDArray[np.float32], inside: NDArray[np.bool_]) -> float:
    """Noise SD from the median of a second difference that slopes and edges cancel in.

    Immerkær, Computer Vision and Image Understanding 64 (1996) 300, with the median in
    place of the mean, so that the details of a phantom don't count as noise.
    """
    if min(values.shape) < 3:
        return 0.0
    rows = values[:-2] - 2 * values[1:-1] + values[2:]
    both = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]
    rows_inside = inside[:-2] & inside[1:-1] & inside[2:]
    whole = rows_inside[:, :-2] & rows_inside[:, 1:-1] & rows_inside[:, 2:]
    if not whole.any():
        return 0.0
    return float(np.median(np.abs(both[whole])) / 0.6745 / 6)


def _pad(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    side = config.IMAGE_SIDE_PX
    square = np.full((side, side), config.PADDING_GREY, np.uint8)
    top, left = (side - grey.shape[0]) // 2, (side - grey.shape[1]) // 2
    square[top : top + grey.shape[0], left : left + grey.shape[1]] = grey
    return square


# --- The server ---------------------------------------------------------------------
# Owns what is asked of Ollama, in which order, how often, and which answers can be
# used. Never sees a class or a decision.

TEXT_ATTEMPTS = 3
"""Seeds tried for one question before its image is given up for this run."""

CONNECT_S, WORKER_S, ANSWER_S, LOAD_S = 5.0, 60.0, 600.0, 900.0
"""Seconds to reach the server, for a Dask worker to load the program, to wait for one
answer, and for a model to load.

On two cores a model of llava-phi3's size takes some 100 s to read a new image and
prompt, and the request behind it waits for its turn.
"""

TRIES, FIRST_PAUSE_S = 5, 0.5
"""A failed request is tried so often; the pause before it doubles with each one."""

BAD_ANSWERS = 12
"""So many unusable answers, or requests given up, in a row, or more than half of as
many first ones, stop the run."""

WORTH_AN_ENCODE = 6
"""Open questions of an image for which an idle slot takes it in."""

SAME_EMBEDDING = 0.9999
"""Cosine below which two embeddings of one text are not of the same engine."""

HARD_PROBLEMS = ("broken", "empty", "looping", "declined", "unembeddable")
"""Answers that can't stand in the dataset; "cut" is only counted."""

_CONTROL_TOKEN = re.compile(r"<\|[^<>|]{1,30}\|>|</?s>|<unk>|<(end|start)_of_turn>")
_DECLINED = re.compile(
    r"\W*(i'm sorry|i am sorry|sorry|unfortunately,? i\b|as an ai|as a language model"
    r"|i can't|i cannot|i can not|i'm unable|i am unable|i'm not able|i am not able"
    r"|please (upload|provide|attach)|there is no (image|picture)\b|no image)"
    r"|.*(\[img-?\d*\]|please (upload|attach|provide|share) (an?|the|your|it)\b"
    r"|no (image|picture)( file)? (was|is|has been) (attached|provided|uploaded|shared)"
    r"|(no way|unable|not able) to (see|view|open|access) (an? |the )?(image|picture)"
    r"|(don't|do not|can't|cannot) (see|view) (an|any|the|your) (image|picture)\b"
    r"(?! (artefact|artifact|noise)))",
    re.DOTALL,
)


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
    """What the VLM said, up to the first control token, and whether it can be used."""

    text: str
    problem: str
    """One of HARD_PROBLEMS, "cut", or "" when all is well."""
    record: Mapping[str, Any]
    """The journal's: seed, counters, time (UTC), server_version …"""

    @property
    def usable(self) -> bool:
        """Whether the text may stand in the dataset."""
        return self.problem not in HARD_PROBLEMS


def judged(record: Mapping[str, Any]) -> Answer:
    """An HTTP 200 is no description yet: the answer, with what is wrong with it.

    Judged when it is read, so that a better rule heals the journals that are there. Of
    a record of version 1.0 its `problem` stands for done and done_reason.
    """
    said, old = record.get("text", ""), record.get("problem")
    text = _CONTROL_TOKEN.split(str(said), maxsplit=1)[0].strip()
    done = record.get("done", "text" in record and old != "broken")
    done = done and isinstance(said, str)
    cut = record.get("done_reason") == "length" or old == "cut"
    problems = {
        "broken": not done,
        "empty": not text,
        "looping": _loops(text),
        "declined": _DECLINED.match(text.lower().replace("\u2019", "'")) is not None,
        "unembeddable": bool(record.get("quarantined")),  # version 1.0
        "cut": cut,
    }
    return Answer(
        text, next((name for name, is_so in problems.items() if is_so), ""), record
    )


def _loops(text: str) -> bool:
    """Few characters, a tenth when compressed, or four words again and again."""
    few = len(text) >= 12 and len(set(text) - {" "}) < 6
    packed = zlib.compress(text.encode("utf-8", "replace"))
    words = text.lower().split()
    runs = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    return few or len(packed) * 10 <= len(text) or max(runs.values(), default=0) > 5


def chosen_answer(answers: Sequence[Answer]) -> Answer | None:
    """The answer that stands in the dataset, given all attempts so far in order.

    The first whole one; a cut one only where a second attempt was no better.
    """
    whole = [a for a in answers if not a.problem]
    cut = [a for a in answers if a.problem == "cut" and len(answers) > 1]
    return next(iter(whole + cut), None)


@dataclass(frozen=True)
class ServerFacts:
    """What the preflight found on the server."""

    version: str
    vlm_digest: str
    embedder_digest: str
    probe: NDArray[np.float32]
    """Today's embedding of PROBE_SENTENCE, (n_features,)."""
    both_loaded: bool = True
    """Whether VLM and embedder stay in memory together."""
    gpu_share: float = 0.0
    """Share of the loaded VLM that lies in GPU memory, 0 to 1."""


def conditions(cfg: config.Config, facts: ServerFacts | None) -> dict[str, Any]:
    """All that makes one run's vectors comparable with another's, for the manifests.

    Without facts of the server: what the command line alone decides.
    """
    generic = len(config.GENERIC_PROMPTS)
    chosen = {
        "vlm": cfg.vlm,
        "embedder": cfg.embed_model,
        "embed_prefix": embed_prefix(cfg),
        "options": vlm_options(cfg),
        "preparation": preparation(),
        "generic_prompts": [q.prompt for q in questions("generic", generic)],
    }
    if facts is None:
        return chosen
    digests = {name: getattr(facts, name) for name in ("vlm_digest", "embedder_digest")}
    return chosen | digests


def vlm_options(cfg: config.Config) -> dict[str, Any]:
    """Sampling and runner options of every description, without its seed."""
    return {n: getattr(cfg, n) for n in ("temperature", "num_predict", "num_ctx")}


def embed_prefix(cfg: config.Config) -> str:
    """What stands before every text that is embedded."""
    name = cfg.embed_model.rsplit("/", 1)[-1].split(":", 1)[0]
    return config.EMBED_PREFIXES.get(name, "")


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Cosine of two vectors, (n_features,) each; 0 where their lengths differ."""
    if one.shape != other.shape:
        return 0.0
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def pack_vector(vector: NDArray[np.float32]) -> str:
    """A float32 vector as base64 text, little endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def unpack_vector(packed: object) -> NDArray[np.float32]:
    """The float32 vector of `pack_vector`; empty where it is damaged."""
    try:
        data = base64.b64decode(str(packed), validate=True)
        vector = np.frombuffer(data, "<f4").astype(np.float32)
    except ValueError:
        vector = np.empty(0, np.float32)
    return vector if np.isfinite(vector).all() else vector[:0]


# What was answered: the journal folder, shared by phases 2 and 4.


class AnswerBook:
    """The folder of answers: one journal per image, and one of the servers seen.

    Answers are found by the digest of all that was asked, vectors by text, embedder and
    engine (the first server whose probe sentence had today's embedding): what was asked
    otherwise is not found, so nothing old is mixed in.

    Parameters
    ----------
    folder : Path or None
        Where the journals lie; None keeps nothing.
    """

    SERVERS = "servidores.jsonl"

    def __init__(
        self, folder: Path | None, cfg: config.Config, facts: ServerFacts
    ) -> None:
        self.folder, self.facts = folder, facts
        self.prefix, self.options = embed_prefix(cfg), vlm_options(cfg)
        self._names = {"vlm": cfg.vlm, "embedder": cfg.embed_model}
        self.kept = 0
        """Answers of this run."""
        self.distrusted: PipelineError | None = None
        """Why no further answer of this run is kept."""
        self.doubted: set[str] = set()
        """Ids of the images of which answers were set aside in this run."""
        self.servers = self._open(self.SERVERS)
        self.notes: list[str] = []
        """What a person should know of the server against the last one."""
        self.engine = self._recognise()

    def _open(self, name: str) -> Journal:
        if self.folder is None:
            return Journal(None)
        return Journal(self.folder / name, lock_file=self.folder / ".lock")

    def _recognise(self) -> str:
        """The engine whose probe has today's embedding; a new one is recorded."""
        facts, last = self.facts, self.servers.get("last") or {}
        mine = {"embedder_digest": facts.embedder_digest, "prefix": self.prefix}
        kin = {
            key: cosine(unpack_vector(one.get("probe")), facts.probe)
            for key, one in self.servers.items()
            if not key.startswith(("last", "sight")) and mine.items() <= one.items()
        }
        now = {**mine, "probe": pack_vector(facts.probe), "version": facts.version}
        engine = next((k for k, near in kin.items() if near >= SAME_EMBEDDING), "")
        if kin and not engine:
            self.notes.append(
                "the embedder gives other numbers than before (cosine of the probe "
                f"sentence {max(kin.values()):.4f}): texts are embedded anew"
            )
        if last.get("version") not in (None, facts.version):
            self.notes.append(f"Ollama is {facts.version}, was {last['version']}")
        if not engine:
            engine = _key(now)
            self.servers.add({"key": engine, **now})
        now |= {"vlm_digest": facts.vlm_digest, "engine": engine, **self._names}
        for key in ("last", last_of(self._names)):
            if self.servers.get(key) != now:
                self.servers.add({"key": key, **now})
        return engine

    def of(self, image: PreparedImage) -> "ImageAnswers":
        """What is known about one image."""
        return ImageAnswers(self, self._open(f"{image.image_id}.jsonl"), image)

    def touch(self) -> None:
        """Raise OSError where nothing can be written, or the disk is full."""
        self.servers.add({"key": "last", **(self.servers.get("last") or {})})

    @property
    def last_pass(self) -> str:
        """When a sight test was last passed, UTC in ISO 8601; "" for never."""
        moment = str((self.servers.get("sight") or {}).get("time") or "")
        with suppress(ValueError, TypeError):
            if datetime.fromisoformat(moment) <= datetime.now(UTC):
                return moment
        return ""  # also where a clock was wrong

    def unconfirmed(self) -> list[int]:
        """How many answers each image has, of whatever run, since the last pass."""
        return [len(keys) for _, keys in self._since(self.last_pass)]

    def set_aside(
        self, moment: str, by: Collection[str], why: PipelineError | None = None
    ) -> int:
        """Forget what this VLM answered after the last moment at which all was well.

        On the servers `by`. `why` ends the run: what is still in flight is not kept,
        either. Returns how many answers will be asked anew.
        """
        self.distrusted, count = why, 0
        for journal, keys in self._since(moment, by):
            journal.add({"taken_back": keys})
            count += len(keys)
            if journal.path:
                self.doubted.add(journal.path.stem)
        return count

    def _since(
        self, moment: str, by: Collection[str] = ()
    ) -> Iterator[tuple[Journal, list[str]]]:
        """The journals with this VLM's answers after a moment, and the keys of those.

        Of all servers, or some. Up to version 1.9 answers don't say of which VLM.
        """
        known = None, self.facts.vlm_digest
        start = datetime.fromisoformat(moment).timestamp() if moment else 0.0
        for path in self.folder.glob("?*.jsonl") if self.folder else ():
            # Only what was written since is read; FAT counts in steps of two seconds.
            if path.name != self.SERVERS and path.stat().st_mtime >= start - 2:
                journal = self._open(path.name)
                keys = [
                    key
                    for key, one in journal.items()
                    if "prompt" in one
                    and str(one.get("time") or "") > moment
                    and one.get("vlm_digest") in known
                    and (not by or one.get("server") in by)
                ]
                if keys:
                    yield journal, keys

    async def confirm(self, server: "VlmServer") -> None:
        """See that a server's models are still the same, so that its answers hold.

        Raises
        ------
        ModelChangedError
            Another model may have answered since the last time: that is set aside.
        """
        moment = server.unchanged_at
        try:
            await server.check_unchanged()
        except ModelChangedError as error:
            self.set_aside(moment, [server.url], error)
            raise


def last_of(names: Mapping[str, str]) -> str:
    """Key of the record of the last server with these models, vlm and embedder."""
    return f"last of {names['vlm']} and {names['embedder']}"


class ImageAnswers:
    """All answers about one image and their vectors, under the book's conditions."""

    def __init__(
        self, book: AnswerBook, journal: Journal, image: PreparedImage
    ) -> None:
        self.book, self.journal, self._image = book, journal, image

    def attempts(self, question: Question) -> list[Answer]:
        """The answers to a question so far, in the order of their attempts."""
        found: list[Answer] = []
        while record := self.journal.get(self._key_of(question, len(found))):
            found.append(self._judged(record))
        return found

    def _judged(self, record: Mapping[str, Any]) -> Answer:
        answer = judged(record)
        vector = self.journal.get(self._vector_key(answer.text))
        if answer.usable and vector and not vector.get("vector"):
            answer = replace(answer, problem="unembeddable")
        return answer

    def chosen(self, question: Question) -> Answer | None:
        """The answer that stands in the dataset, if there is one yet."""
        return chosen_answer(self.attempts(question))

    def vector(self, text: str) -> NDArray[np.float32] | None:
        """The embedding of a text, float32 (n_features,), if there is one yet."""
        record = self.journal.get(self._vector_key(text)) or {}
        vector = unpack_vector(record.get("vector"))
        return vector if vector.shape == self.book.facts.probe.shape else None

    def texts(self, asked: Sequence[Question]) -> list[str]:
        """The chosen answers to questions that all have one."""
        return [answer.text for q in asked if (answer := self.chosen(q))]

    def rows(self, asked: Sequence[Question]) -> NDArray[np.float32]:
        """Their embeddings, float32 (n_questions, n_features)."""
        vectors = [self.vector(text) for text in self.texts(asked)]
        return np.stack([vector for vector in vectors if vector is not None])

    def keep(
        self, question: Question, attempt: int, reply: Mapping[str, Any]
    ) -> Answer:
        """Keep what came back, usable or not, and judge it."""
        if self.book.distrusted:  # in flight when that was found out
            raise self.book.distrusted
        asked = {
            "prompt_set": question.prompt_set,
            "prompt_index": question.index,
            "prompt": question.prompt,
            "seed": question.seed(self._image.image_id, attempt),
        }
        self.journal.add({"key": self._key_of(question, attempt), **asked, **reply})
        self.book.kept += 1
        return self._judged(reply)

    def keep_vectors(self, vectors: Mapping[str, NDArray[np.float32] | None]) -> None:
        """Keep the embeddings of texts; None where the embedder refuses one."""
        packed = {t: None if v is None else pack_vector(v) for t, v in vectors.items()}
        self.journal.add(
            *({"key": self._vector_key(t), "vector": v} for t, v in packed.items())
        )

    def _key_of(self, question: Question, attempt: int) -> str:
        """The digest of all that was asked."""
        book, seed = self.book, question.seed(self._image.image_id, attempt)
        asked = self._image.view_id, question.prompt, seed, book.options
        return _key(*asked, book.facts.vlm_digest)

    def _vector_key(self, text: str) -> str:
        """The digest of what was embedded, and by what."""
        book = self.book
        return _key(book.prefix + text, book.facts.embedder_digest, book.engine)


def _key(*asked: object) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _now() -> str:
    """UTC in ISO 8601 with milliseconds: as text, later moments are larger."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# Who is asked, and in which order.


@dataclass(eq=False)
class Slot:
    """What answers one image's questions at a time: a slot of an Ollama server.

    The server finds an image that it has just seen in the slot's cache, so that an
    image's questions come one after the other on one slot.
    """

    server: "VlmServer"
    lanes: int
    """Requests at once: to a single slot a second stands in the server's queue."""
    interviews: list["Interview"]
    """Of all images that are being asked; the same list for all slots."""
    free: asyncio.Lock = field(default_factory=asyncio.Lock)


def slots_of(cfg: config.Config, servers: Sequence["VlmServer"]) -> list[Slot]:
    """The slots of the servers.

    With several slots a second request of an image would go to another slot, and have
    the image encoded again.
    """
    lanes = cfg.in_flight if cfg.server_parallel == 1 else 1
    interviews: list[Interview] = []
    return [
        Slot(server, lanes, interviews)
        for server in servers
        for _ in range(cfg.server_parallel)
    ]


class Turn:
    """An image's time on a slot; `end` lets the next image begin."""

    def __init__(self, slot: Slot) -> None:
        self.slot, self._over = slot, False
        self.stays = False
        """More questions may follow: `ask` doesn't end the turn."""

    def end(self) -> None:
        """Give the slot to the next image; does nothing the second time."""
        if not self._over:
            self._over = True
            self.slot.free.release()


async def image_by_image(
    items: Iterable[Item],
    prepare: Callable[[Item], Prepared],
    work: Callable[[Item, Prepared, Turn], Awaitable[None]],
    slots: Sequence[Slot],
    between: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Each slot takes one image at a time; the next is prepared meanwhile.

    An image ends its turn when its last question is asked (see `ask`), so that its
    embeddings are made while the next one is asked. Where no image is left, idle slots
    take questions of those still open, at one more encode each. An image whose server
    goes away is the next to be taken, by whichever slot.

    Parameters
    ----------
    items : iterable
        Taken one ahead of the slots: memory holds what is in flight.
    prepare : callable
        Runs in a thread; what it returns goes to `work`.
    between : async callable, optional
        Called before each image begins; it may take the slots for itself.
    """
    order = _Order(iter(items), prepare, work, slots, between)
    async with asyncio.TaskGroup() as group:
        for slot in slots:
            group.create_task(order.serve(slot))


@dataclass
class _Order:
    """The state of one `image_by_image`."""

    source: Iterator[Any]
    prepare: Callable[[Any], Any]
    work: Callable[[Any, Any, Turn], Awaitable[None]]
    slots: Sequence[Slot]
    between: Callable[[], Awaitable[None]] | None
    exhausted: bool = False
    unfinished: int = 0
    """Images of the source that are taken and not done."""
    returned: deque[Any] = field(default_factory=deque)
    """Those of them whose server went away."""

    async def serve(self, slot: Slot) -> None:
        room = asyncio.Semaphore(3)  # with the images that are only being embedded
        async with asyncio.TaskGroup() as group:
            while self.unfinished or not self.exhausted:
                if slot.server.away:
                    others_work = not all(one.server.away for one in self.slots)
                    await slot.server.come_back(others_work)
                elif (item := self._take()) is not None:
                    prepared = await asyncio.to_thread(self.prepare, item)
                    await room.acquire()
                    async with slot.free:  # the image before has asked all
                        pass
                    if self.between:
                        await self.between()
                    await slot.free.acquire()
                    group.create_task(self._do(item, prepared, slot, room))
                elif not await Interview.help_out(slot):
                    await asyncio.sleep(0.02)

    def _take(self) -> Any:
        if self.returned:
            return self.returned.popleft()
        item = next(self.source, None)
        self.exhausted = item is None
        self.unfinished += not self.exhausted
        return item

    async def _do(
        self, item: Any, prepared: Any, slot: Slot, room: asyncio.Semaphore
    ) -> None:
        turn = Turn(slot)
        try:
            await self.work(item, prepared, turn)
            self.unfinished -= 1
        except ServerAwayError:
            self.returned.append(item)
        finally:
            turn.end()
            room.release()


async def ask(
    picture: PreparedImage,
    asked: Sequence[Question],
    answers: ImageAnswers,
    turn: Turn,
    *,
    embed: bool = True,
    told: Callable[[Answer], object] = lambda _: None,
) -> None:
    """All that is open of one image's questions: asked, judged, kept, embedded.

    Parameters
    ----------
    turn : Turn
        Ends when the last question is under way, unless the image stays.
    embed : bool
        False leaves the vectors to a later call.
    told : callable
        Takes every answer as it comes.

    Raises
    ------
    RejectedError
        The server refuses the image, or no attempt gave a text that can be used.
    ServerAwayError
        A server left; what it had answered is kept.
    PipelineError
        The run can't go on: the server stays away, or a model was replaced.
    """
    server, book = turn.slot.server, answers.book
    for _ in range(2):  # a text that the embedder refuses is asked anew, once
        missing = [q for q in asked if answers.chosen(q) is None]
        interview = Interview(picture, missing, answers, told)
        await interview.run(turn)
        wanted = dict.fromkeys(answers.texts(asked) if embed else ())
        texts = [text for text in wanted if answers.vector(text) is None]
        vectors = await server.embed([book.prefix + text for text in texts])
        for one in {*interview.servers, *([server] if texts else [])}:
            await book.confirm(one)
        if texts:
            answers.keep_vectors(dict(zip(texts, vectors, strict=True)))
        if all(vector is not None for vector in vectors):
            return
    raise RejectedError("a description can't be embedded: run again to ask anew")


class Interview:
    """The open questions of one image, taken one by one by its slot or idle ones."""

    def __init__(
        self,
        picture: PreparedImage,
        missing: Sequence[Question],
        answers: ImageAnswers,
        told: Callable[[Answer], object],
    ) -> None:
        self._picture, self._answers, self._told = picture, answers, told
        self._open = deque(missing)
        self._lanes = asyncio.TaskGroup()
        self._failure: PipelineError | None = None
        self.servers: set[VlmServer] = set()
        """Those that were asked."""

    async def run(self, turn: Turn) -> None:
        """Ask all; ends the turn when the last question is under way."""

        async def lane() -> None:
            await self._ask_on(turn.slot)
            if not turn.stays:
                turn.end()

        async with self._lanes:
            for _ in range(turn.slot.lanes):
                self._lanes.create_task(lane())
            await asyncio.sleep(0)  # each has its question: idle slots may join
            turn.slot.interviews.append(self)
        turn.slot.interviews.remove(self)
        if self._failure:
            raise self._failure

    @staticmethod
    async def help_out(slot: Slot) -> bool:
        """Let an idle slot take questions of the image that has most, if many."""
        longest = max(slot.interviews, key=lambda one: len(one._open), default=None)
        if longest is None or len(longest._open) < WORTH_AN_ENCODE:
            return False
        async with slot.free:
            if longest._open:  # else its lanes may be over
                lane = longest._lanes.create_task(longest._ask_on(slot))
                await asyncio.wait([lane])
        return True

    async def _ask_on(self, slot: Slot) -> None:
        """Ask one after the other; a failure drops those that nobody has begun."""
        while self._open:
            question = self._open.popleft()
            self.servers.add(slot.server)
            try:
                await self._until_usable(question, slot.server)
            except PipelineError as error:
                self._open.clear()
                if not isinstance(error, (RejectedError, ServerAwayError)):
                    raise
                self._failure = error

    async def _until_usable(self, question: Question, server: "VlmServer") -> None:
        """Ask with one seed after another, and keep every answer."""
        picture = self._picture
        for _ in range(TEXT_ATTEMPTS):
            self._answers.journal.refresh()  # another process may have asked it
            said = self._answers.attempts(question)
            if chosen_answer(said):
                return
            attempt = len(said)
            seed = question.seed(picture.image_id, attempt)
            started = time.monotonic()
            reply = await server.answer(picture.png, question.prompt, seed)
            server.has_answered(started)
            answer = self._answers.keep(question, attempt, reply)
            server.note(answer.usable, picture.image_id, answer.text)
            self._told(answer)
            if chosen_answer([*said, answer]):
                return
        raise RejectedError(
            f"no usable answer to {question.prompt_set} prompt {question.index} "
            f"(the last one is {answer.problem}): run again to try other seeds"
        )


# Does every slot look at the picture that it is sent?

SIGHT_ORDER = ((0, 1), (2, 1, 2, 0), (2, 0, 2, 1))
"""For each question, the pictures in turn. The third stands between the two: a server
that answers about the picture before else swaps them, as good as seeing."""

SIGHT_QUESTIONS, SIGHT_EVERY = len(SIGHT_ORDER), 1000
"""Questions asked of each of two pictures; answers between two tests."""

Looks = NDArray[np.float32]
"""Embedded answers about disc and bars, (n_slots, 2, n_questions, n_features)."""


def sight_pictures() -> list[bytes]:
    """A bright disc on dark, dark bars on bright, and checks, as PNG."""
    side = config.IMAGE_SIDE_PX
    down, across = np.indices((side, side)) - side // 2
    disc = np.where(np.hypot(down, across) < side / 4, 230, 25)
    bars = np.where(across // 24 % 2, 30, 225)
    checks = np.where((across // 40 + down // 40) % 2, 60, 200)
    return [_png(one.astype(np.uint8)) for one in (disc, bars, checks)]


def sight_distances(looks: Looks) -> NDArray[np.float64]:
    """How far each answer is from the others about its own picture, and the other's.

    Returns
    -------
    ndarray, float64 (n_slots, 2, n_questions, 2)
        Cosine distances to its own picture's mean, without the answer in question, and
        to the other's; NaN where a text has no embedding.
    """
    about = np.asarray(looks.sum(axis=(0, 2)), np.float64)
    own, other = about[None, :, None] - looks, about[None, ::-1, None]
    with np.errstate(invalid="ignore"):
        cosines = [
            np.sum(looks * mean, axis=-1)
            / (np.linalg.norm(looks, axis=-1) * np.linalg.norm(mean, axis=-1))
            for mean in (own, other)
        ]
    return 1 - np.stack(cosines, axis=-1)


class SightTest:
    """Shows that no slot is blind, answers of the former picture or mixes pictures.

    Every slot at once is asked the same questions about two pictures, alternately. It
    sees when all its answers but at most one are nearer to the mean of the others about
    the same picture than to the mean of those about the other one. The questions must
    be the same: a blind answer then lies nearest to the other picture's answer to its
    own question.
    """

    def __init__(self, slots: list[Slot], book: AnswerBook) -> None:
        self._slots, self._book, self._one_at_a_time = slots, book, asyncio.Lock()
        self._counted, self.seconds = 0, 0.0
        self.found: list[tuple[str, NDArray[np.float64]]] = []
        """Of the last test each slot's name, and its answers' distances to their own
        picture's, to the other's, float64 (n_answers, 2)."""

    @property
    def _tested(self) -> dict[str, Any]:
        servers = {slot.server.url: slot.server for slot in self._slots}
        facts = [one.facts for one in servers.values()]
        return {
            "servers": [f"{url} {one.version}" for url, one in servers.items()],
            "digests": sorted({f.vlm_digest + f.embedder_digest for f in facts}),
            "slots": len(self._slots),
            "engine": self._book.engine,
        }

    def is_recent(self, answers: int, minutes: float) -> bool:
        """Whether these very slots passed so short a time, and so few answers, ago."""
        last, book = self._book.servers.get("sight") or {}, self._book
        if not (book.last_pass and self._tested.items() <= last.items()):
            return False
        age = datetime.now(UTC) - datetime.fromisoformat(book.last_pass)
        return age < timedelta(minutes=minutes) and sum(book.unconfirmed()) < answers

    async def when_due(self, answers: int = 0) -> None:
        """Test again after a reconnect, a change of version or so many answers.

        By default after SIGHT_EVERY of them.
        """
        async with self._one_at_a_time:
            changed = any(slot.server.changed for slot in self._slots)
            if changed or self._book.kept - self._counted >= (answers or SIGHT_EVERY):
                await self.run()

    def _name(self, slot: Slot) -> str:
        own = [one for one in self._slots if one.server is slot.server]
        return f"slot {own.index(slot) + 1} of the server at {slot.server.url}"

    async def run(self, may_drop: bool = False) -> None:
        """Test all slots; if one fails its answers since the last pass are set aside.

        With `may_drop` the run goes on without its server, where there is another.

        Raises
        ------
        BlindError
            A slot does not see.
        PipelineError
            All servers went away, and stay so.
        """
        started, self._counted, book = time.monotonic(), self._book.kept, self._book
        for server in {slot.server for slot in self._slots if slot.server.changed}:
            with suppress(ServerAwayError):
                await book.confirm(server)
        while not (seen := await self._look()):
            for slot in self._slots:
                await slot.server.come_back(others_work=False)
        self.seconds += time.monotonic() - started
        slots, looks = [slot for slot, _ in seen], np.array([rows for _, rows in seen])
        self.found = [
            (self._name(slot), sight_distances(one[None]).reshape(-1, 2))
            for slot, one in zip(slots, looks, strict=True)
        ]
        while wrong := self._doubtful(looks):
            worst = wrong.index(max(wrong))
            server = slots[worst].server
            own = [slot for slot in slots if slot.server is server]
            pairs = zip(slots, wrong, strict=True)
            doubted = {slot.server.url for slot, count in pairs if count}
            aside = book.set_aside(book.last_pass, doubted)
            since = f"{aside} answers since the last passed test are set aside: "
            error = BlindError(
                f"{self._name(slots[worst])} (Ollama {server.version}) does not see "
                "the pictures it is sent "
                f"({wrong[worst]} of {2 * SIGHT_QUESTIONS} answers fit another): "
                f"{since if aside else ''}restart the server or try another version "
                "of Ollama, then run the same command again"
                f"{', or go on without it: --any-host' if own != slots else ''}"
            )
            if not may_drop or len(own) == len(slots):
                book.distrusted = error
                raise error
            server.tell(f"warning: goes on without {server.url}: {error}")
            server.away = True
            self._slots[:] = [slot for slot in self._slots if slot.server != server]
            looks = looks[[slot.server is not server for slot in slots]]
            slots = [slot for slot in slots if slot.server is not server]
        book.servers.add({"key": "sight", "time": _now(), **self._tested})

    def _doubtful(self, looks: Looks) -> list[int]:
        """Of each slot, how many answers fit another picture; empty where all see.

        A slot alone may have one such answer. A server picks its slots itself, so that
        a blind one may have answered in several: all together may have one, too.
        """
        alone = np.concatenate([sight_distances(one[None]) for one in looks])
        doubts = alone, sight_distances(looks)
        wrong = np.array(
            [np.sum(~(one[..., 0] < one[..., 1]), axis=(1, 2)) for one in doubts]
        )
        sees = wrong.max() <= 1 and wrong[1].sum() <= 1
        return [] if sees else [int(count) for count in wrong.max(axis=0)]

    async def _look(self) -> list[tuple[Slot, NDArray[np.float32]]]:
        """The slots that answered, each with (2, SIGHT_QUESTIONS, n_features).

        In step, so that a server needs all its slots for each question.
        """
        looks, said = [], dict[tuple[int, int], list[str]]()
        async with AsyncExitStack() as held:
            for slot in self._slots:
                await held.enter_async_context(slot.free)
                slot.server.changed = False
            pictures = sight_pictures()
            asked = questions("generic", SIGHT_QUESTIONS)
            for number, order in enumerate(SIGHT_ORDER):
                prompt = asked[number].prompt
                for at in order:
                    each = (self._say(s, pictures[at], prompt) for s in self._slots)
                    said[at, number] = await asyncio.gather(*each)
            judged = product(range(2), range(SIGHT_QUESTIONS))
            by_slot = zip(*(said[both] for both in judged), strict=True)
            for slot, texts in zip(self._slots, by_slot, strict=True):
                if not all(texts):
                    continue
                with suppress(ServerAwayError):
                    rows = await slot.server.embed(texts)
                    none = np.zeros_like(self._book.facts.probe)
                    full = np.array([none if row is None else row for row in rows])
                    looks.append((slot, full.reshape(2, SIGHT_QUESTIONS, -1)))
        return looks

    async def _say(self, slot: Slot, png: bytes, prompt: str) -> str:
        """The answer as it is embedded; "" of a server that went away."""
        with suppress(ServerAwayError):
            reply = await slot.server.answer(png, prompt, random.getrandbits(31))
            return self._book.prefix + (judged(reply).text or "nothing")
        return ""


async def only_sight(
    cfg: config.Config, tell: Callable[[str], object], show: Callable[[str], object]
) -> None:
    """One sight test of the servers as they are; shows every distance, then the end."""
    async with open_servers(cfg, tell) as named:
        servers, facts = await preflight(named, cfg)
        test = SightTest(slots_of(cfg, servers), AnswerBook(None, cfg, facts))
        try:
            await test.run()
        finally:
            show("distance of each answer to those about its own / the other picture")
            for name, pairs in test.found:
                shown = [f"{own:.3f} / {other:.3f}" for own, other in pairs]
                show(f"  {name}, disc: {', '.join(shown[:SIGHT_QUESTIONS])}")
                show(f"  {name}, bars: {', '.join(shown[SIGHT_QUESTIONS:])}")
        show("passed: every slot sees the pictures that it is sent")


def run_async(main: Coroutine[Any, Any, Result]) -> Result:
    """Run to the end; of several errors at once the first that stops the run shows."""
    try:
        return asyncio.run(main)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


# All servers: who they are, and whether they answer alike.


@asynccontextmanager
async def open_servers(
    cfg: config.Config, tell: Callable[[str], object]
) -> AsyncIterator[list["VlmServer"]]:
    """The servers of --host or of the workers of --dask, none twice."""
    async with AsyncExitStack() as opened:
        if cfg.dask:
            ways = await _dask_ways(cfg, tell, opened)
            servers = [VlmServer(cfg, tell, way) for way in ways]
        else:
            named = {server_url(one): one for one in cfg.one_per_host()}
            servers = [VlmServer(one, tell) for one in named.values()]
        for server in servers:
            opened.push_async_callback(server.http.aclose)
        yield servers


async def preflight(
    servers: Sequence["VlmServer"], cfg: config.Config
) -> tuple[list["VlmServer"], ServerFacts]:
    """Those that do their work and answer alike; what is true of all.

    Which of two kinds: what the journals are of, else of which there are more.

    Raises
    ------
    PipelineError
        Why one does not pass; with --any-host only where none does.
    """
    checks = [server.preflight() for server in servers]
    outcomes = await asyncio.gather(*checks, return_exceptions=True)
    pairs = list(zip(servers, outcomes, strict=True))
    able = [one for one, outcome in pairs if isinstance(outcome, ServerFacts)]
    journals = cfg.folder("dataset_dir") / config.JOURNAL_DIR
    before = Journal(journals / AnswerBook.SERVERS).get("last") or {}

    def fits(server: VlmServer) -> tuple[int, int]:
        digests = "vlm_digest", "embedder_digest"
        known = sum(before.get(n) == getattr(server.facts, n) for n in digests)
        return known, sum(not _difference(server, other, cfg) for other in able)

    good: list[VlmServer] = []
    for server, outcome in pairs:
        try:
            if isinstance(outcome, BaseException):
                raise outcome
            _check_alike(server, max(able, key=fits), cfg)  # the first of equals
            good.append(server)
        except PipelineError as error:
            if len(servers) == 1:
                raise
            _without(cfg, server.tell, server.url, error)
    if not good:
        raise PipelineError("none of the servers can be used: see the lines above")
    both = all(server.facts.both_loaded for server in good)
    return good, replace(good[0].facts, both_loaded=both)


def _without(
    cfg: config.Config, tell: Callable[[str], object], name: str, problem: object
) -> None:
    """Go on without a server or worker, if the user says so; else raise."""
    if not cfg.any_host:
        raise PipelineError(f"{problem}; or go on without it: --any-host")
    tell(f"warning: goes on without {name}: {problem}")


def _difference(server: "VlmServer", other: "VlmServer", cfg: config.Config) -> str:
    """Why a server can't work beside another one; "" where it can."""
    mine, theirs = server.facts, other.facts
    if mine.vlm_digest != theirs.vlm_digest:
        return f"has another {cfg.vlm}"
    if mine.embedder_digest != theirs.embedder_digest:
        return f"has another {cfg.embed_model}"
    near = cosine(mine.probe, theirs.probe)
    return "" if near >= SAME_EMBEDDING else f"embeds otherwise (cosine {near:.4f})"


def _check_alike(server: "VlmServer", first: "VlmServer", cfg: config.Config) -> None:
    """Raise PipelineError where a server can't work beside the first one."""
    if reason := _difference(server, first, cfg):
        raise PipelineError(
            f"the server at {server.url} (Ollama {server.version}) {reason} than "
            f"{first.url} (Ollama {first.version}): give both the same Ollama and the "
            "same models with `ollama pull`"
        )


def work_done(servers: Sequence["VlmServer"]) -> Iterator[str]:
    """Which of several servers answered how many questions, and how fast."""
    for server in servers if len(servers) > 1 else ():
        each = server.busy_s / max(server.answered, 1)
        yield f"{server.url}: {server.answered} answers, {each:.2f} s each"


# Dask: its workers are ways to other Ollama servers, by an actor on each of them.


class OwnServer:
    """On a Dask worker, as an actor: the Ollama at the worker's own OLLAMA_HOST."""

    def __init__(self) -> None:
        self._http = VlmServer(config.Config(), lambda _: None).http

    async def who(self) -> tuple[str, str]:
        """The version of the program, and the server that the worker leads to."""
        url = server_url(config.Config())
        return config.PROGRAM_VERSION, f"{url} on {gethostname()}"

    async def says(self, method: str, path: str, body: bytes) -> tuple[int, str, bytes]:
        """Status, new location and content of the server's reply; OSError for none."""
        kind = {"content-type": "application/json"}
        try:
            reply = await self._http.request(method, path, content=body, headers=kind)
        except _server_away() as error:
            raise OSError(_short(error)) from None
        return reply.status_code, reply.headers.get("location", ""), reply.content


own_server = cache(OwnServer)
"""One for each worker: its connections stay open."""


class DaskWay:
    """Transport of an httpx client: a Dask worker sends the requests to its own server.

    Only method, path, body and reply travel. Where the worker dies, another one that
    asks the same server takes its place, or itself when it is started again.
    """

    def __init__(self, client: Any, name: str, actor: Any) -> None:
        self._client, self.name, self._actor = client, name, actor

    async def handle_async_request(self, request: Any) -> Any:
        """As httpx wants it; ConnectError where the worker is lost, or its server."""
        import httpx  # noqa: PLC0415

        asked = request.method, request.url.raw_path.decode(), await request.aread()
        try:
            status, location, content = await self._actor.says(*asked)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError):  # the actor was lost with its worker
                await self._find_another()
            raise httpx.ConnectError(str(error)) from None
        return httpx.Response(status, headers={"location": location}, content=content)

    async def _find_another(self) -> None:
        if self._client.status == "closed":
            raise PipelineError(
                "the Dask scheduler left: start it, then run the same command again; "
                "every answer so far is kept"
            )
        with suppress(OSError):  # the scheduler is away, for a while
            actors = await _own_servers(self._client, lambda *_: None)
            self._actor = actors.get(self.name, self._actor)

    async def aclose(self) -> None:
        """As httpx wants it; other ways share the client."""


async def _own_servers(
    client: Any, refuse: Callable[[str, str], object]
) -> dict[str, Any]:
    """By their names the servers of all workers, an actor each; says who is unfit."""

    def here() -> Any:
        # It travels as code, since the scheduler does not have this module.
        return importlib.import_module("utils").own_server()

    actors, mine = {}, config.PROGRAM_VERSION

    async def meet(worker: str) -> None:
        on_it: Any = {"workers": [worker], "actor": True, "pure": False}
        remedy = "set its PYTHONPATH to the program's folder, and use the same Python"
        try:
            async with asyncio.timeout(WORKER_S):
                actor = await client.submit(here, **on_it)
                program, name = await actor.who()
            if program != mine:
                raise ValueError(f"it has version {program}, not {mine}")
            actors[name] = actor
        except Exception as error:
            if isinstance(error, TimeoutError):
                remedy = f"nothing in {WORKER_S:.0f} s; is it busy with other work?"
            why = f"{type(error).__name__}: {error}".removesuffix(": ")
            why = f"the Dask worker at {worker} can't run the program ({why})"
            refuse(worker, f"{why}: {remedy}")

    await asyncio.gather(*map(meet, await client.nthreads()))
    return dict(sorted(actors.items()))


async def _dask_ways(
    cfg: config.Config, tell: Callable[[str], object], opened: AsyncExitStack
) -> list[DaskWay]:
    """The ways that the workers of --dask lead."""
    client = await _dask_client(cfg, opened)
    actors = await _own_servers(client, partial(_without, cfg, tell))
    if not actors:
        raise PipelineError(
            f"no Dask worker to use: `dask worker {cfg.dask}` makes one"
        )
    return [DaskWay(client, name, actor) for name, actor in actors.items()]


async def _dask_client(cfg: config.Config, opened: AsyncExitStack) -> Any:
    """A client of the scheduler at --dask, or of local:N workers in its stead."""
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError:
        raise PipelineError("--dask needs Dask: pip install '.[cluster]'") from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    is_local = cfg.dask.startswith("local:")
    if cfg.host and not is_local:
        raise PipelineError("a Dask worker asks its own OLLAMA_HOST: leave --host out")
    try:
        async with asyncio.timeout(WORKER_S if is_local else CONNECT_S + 5):
            scheduler: Any = cfg.dask
            if is_local:
                scheduler = _local_workers(cfg, distributed)
                with interrupts_later():
                    await opened.enter_async_context(scheduler)
            client = distributed.Client(scheduler, asynchronous=True, timeout=CONNECT_S)
            opened.push_async_callback(client.close)
            return await client
    # TypeError: no TLS here; RuntimeError: TLS is required, or a worker did not start.
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise PipelineError(
            f"no Dask scheduler answers at {cfg.dask} ({_short(error)}): see that "
            "`dask scheduler` runs there, and that both use TLS or neither"
        ) from None


def _local_workers(cfg: config.Config, distributed: Any) -> Any:
    """A scheduler and workers of this machine, which ask the servers of --host."""
    hosts = [one.host_url for one in cfg.one_per_host()]
    count = int(cfg.dask.removeprefix("local:"))
    if count < len(hosts):
        raise PipelineError(f"{len(hosts)} servers need --dask local:{len(hosts)}")
    nanny = partial(distributed.Nanny, silence_logs=logging.ERROR)
    each = [{"env": {"OLLAMA_HOST": hosts[n % len(hosts)]}} for n in range(count)]
    workers = {n: {"cls": nanny, "options": one} for n, one in enumerate(each)}
    here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    own = {"cls": distributed.Scheduler, "options": here}
    return distributed.SpecCluster(workers, own, asynchronous=True)


# One server: what it has, one call, and what can go wrong with it.


def server_url(cfg: config.Config) -> str:
    """The server's address with scheme and port, as Ollama completes OLLAMA_HOST.

    A server bound to every interface (0.0.0.0, [::]) is reached at the loopback
    address. A user and password go to the server but never into a message.
    """
    return _address(cfg)[0]


def _address(cfg: config.Config) -> tuple[str, tuple[str, str] | None]:
    """Address of a server, and user and password if there are any."""
    host = cfg.host_url.strip().strip("\"'")
    if host.count(":") > 1 and not {"[", "/", "@"} & {*host}:
        host = f"[{host}]"  # a bare IPv6 address
    try:
        address = urlsplit(host if "://" in host else f"http://{host}")
        implied = {"http": 80, "https": 443}[address.scheme]
        port = address.port or (implied if "://" in host else 11434)
        name = address.hostname or "127.0.0.1"
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)
        if len(host.split()) > 1 or (host and not address.netloc):
            raise ValueError("white space, or nothing behind the scheme")
    except (KeyError, ValueError):
        shown = "" if {"@", "/"} & {*host} else f" ({host!r})"  # no password
        raise PipelineError(
            f"this is not an address of a server{shown}: write --host (or "
            "OLLAMA_HOST) like http://127.0.0.1:11434"
        ) from None
    name = f"[{name}]" if ":" in name else name
    login = unquote(address.username or ""), unquote(address.password or "")
    path = address.path.rstrip("/")
    return f"{address.scheme}://{name}:{port}{path}", login if login[0] else None


def is_loopback(url: str) -> bool:
    """Whether the address is this machine's own."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def distance_warning(cfg: config.Config) -> str:
    """Names the servers that are not this machine, before images go there; or empty."""
    urls = [
        url for one in cfg.one_per_host() if not is_loopback(url := server_url(one))
    ]
    if cfg.dask and not cfg.dask.startswith("local:"):
        urls = [cfg.dask]
    plain = {True: "", False: ", unencrypted"}
    far = [f"{url}{plain[url.startswith(('https', 'tls'))]}" for url in urls]
    return f"the images leave this machine for {' and '.join(far)}" if far else ""


@cache
def _ollama() -> Any:
    """The client library; phases 1 and 3 need none.

    It makes a client of its own when it is imported, which fails on settings meant for
    other programs: they are out of its sight for that moment. Nor need that client,
    which nobody uses, read all certificates, a tenth of a second.
    """
    foreign = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.upper().endswith("_PROXY")
        or name in ("OLLAMA_HOST", "SSL_CERT_FILE", "SSL_CERT_DIR")
    }
    os.environ["SSL_CERT_DIR"] = os.curdir
    try:
        return importlib.import_module("ollama")
    finally:
        del os.environ["SSL_CERT_DIR"]
        os.environ.update(foreign)


Vectors = list[NDArray[np.float32] | None]
"""Embeddings, float32 (n_features,) each; None where there is none to use."""


class VlmServer:
    """One Ollama server: one client, one semaphore, one place where calls are retried.

    Made and closed by `open_servers`. After `preflight`, `answer` and `embed` raise
    RejectedError for what fails alone, ServerAwayError for a server that does not
    answer, and PipelineError for what stops a run, such as a model that is gone.

    Parameters
    ----------
    tell : callable
        Takes a line about what takes a while or has changed.
    way : DaskWay, optional
        Leads to the server; without it that of --host is asked.
    """

    facts: ServerFacts
    """What the preflight has found."""

    def __init__(
        self,
        cfg: config.Config,
        tell: Callable[[str], object],
        way: DaskWay | None = None,
    ) -> None:
        self._cfg, self.tell = cfg, tell
        self.url = way.name if way else server_url(cfg)
        self.version = self.unchanged_at = ""
        """`unchanged_at`: when the models were last seen to be the same, UTC."""
        self.away = self.changed = self.interrupted = False
        """`changed`: it was away, or is another version, since the last sight test;
        `interrupted`: may have been started anew since the probe was last embedded."""
        self.answered, self.busy_s, self._last = 0, 0.0, 0.0
        """Answers about images, and the seconds in which one was under way."""
        self._semaphore = asyncio.Semaphore(cfg.in_flight)
        self._recovery, self._waited = asyncio.Lock(), cast(float | None, None)
        self._think, self._embeds_lists = cast(bool | None, None), True
        own = "start it with `ollama serve`", "--host"
        dask = "see to its Dask worker and the Ollama there", "OLLAMA_HOST"
        self._start, self._named = dask if way else own
        self._n_features = 0
        self._noted: list[tuple[bool, str]] = []
        self._client = self._connect(way)
        self.http = self._client._client
        """Of httpx, for what the client has no call for."""

    def _connect(self, way: DaskWay | None) -> Any:
        import httpx  # noqa: PLC0415

        if way:
            return _ollama().AsyncClient("http://dask", transport=way)
        login, near = _address(self._cfg)[1], is_loopback(self.url)
        encrypted = self.url.startswith("https")
        try:
            return _ollama().AsyncClient(
                self.url,
                timeout=httpx.Timeout(None, connect=CONNECT_S, write=60.0),
                trust_env=not near,
                # Certificates take 20 ms to read; SSL_CERT_FILE may name them.
                verify=httpx.create_ssl_context() if encrypted else False,
                follow_redirects=False,
                event_hooks={"response": [_refuse_redirect]},
                auth=login,
            )
        except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
            raise PipelineError(
                f"the way to {self.url} is not clear ({_short(error)}): look at the "
                "environment's *_PROXY, NO_PROXY, SSL_CERT_FILE and SSLKEYLOGFILE"
            ) from None

    # -- what it has --

    async def preflight(self) -> ServerFacts:
        """Load both models and see that they do their work.

        Raises
        ------
        PipelineError
            Naming what is missing, and the command that mends it.
        """
        vlm, embedder = self._cfg.vlm, self._cfg.embed_model
        try:
            async with asyncio.timeout(CONNECT_S + 5):
                self.version = await self._ask_version()
        except _failures() as error:
            usual = f"{self._start} or name its address with {self._named}"
            raise PipelineError(
                f"no Ollama answers at {self.url} ({_short(error)}): "
                f"{_remedy(error) or usual}"
            ) from None
        self.unchanged_at, digests = _now(), await self._digests()
        for model in (vlm, embedder):
            if plain_name(model) not in digests:
                await self._pull(model)
                digests = await self._digests()
        shown = await self._call(f"show {vlm}", lambda: self._client.show(vlm))
        families = (shown.details.families if shown.details else None) or ()
        capabilities = shown.capabilities or ()
        if "vision" not in capabilities and "clip" not in families:
            raise PipelineError(
                f"model {vlm} can't see images: choose a vision model with --vlm, for "
                "example llava-phi3"
            )
        self._think = False if "thinking" in capabilities else None
        self.tell(f"loading {embedder} and {vlm} on the server at {self.url}")
        _, probe = await asyncio.gather(self._load(), self._probe_embedder())
        both, kept = (
            {plain_name(vlm), plain_name(embedder)},
            self._cfg.keep_alive != "0",
        )
        loaded = await self._call("list what is loaded", self._loaded)
        if kept and not both <= {*loaded}:
            # Once more: another model was in the way, or the VLM had to go.
            await self._embed([config.PROBE_SENTENCE], LOAD_S)
            await self._load()
            loaded = await self._call("list what is loaded", self._loaded)
        self.facts = ServerFacts(
            version=self.version,
            vlm_digest=digests.get(plain_name(vlm), ""),
            embedder_digest=digests.get(plain_name(embedder), ""),
            probe=probe,
            both_loaded=not kept or (len(both) == 2 and both <= {*loaded}),
            gpu_share=loaded.get(plain_name(vlm), 0.0),
        )
        return self.facts

    async def check_unchanged(self) -> None:
        """Raise ModelChangedError when a model was replaced since the preflight.

        Says so when the server is another version, or the VLM has left the GPU.
        """
        facts, now = self.facts, _now()
        digests = await self._digests()
        for model, then in (
            (self._cfg.vlm, facts.vlm_digest),
            (self._cfg.embed_model, facts.embedder_digest),
        ):
            if not (digest := digests.get(plain_name(model))):
                raise PipelineError(
                    f"model {model} was removed from the server at {self.url}: run "
                    f"`ollama pull {model}`, then the same command again"
                )
            if digest != then and model == self._cfg.vlm:
                raise ModelChangedError(
                    f"model {model} was replaced on the server at {self.url} during "
                    "the run; start again: what the former model answered is kept apart"
                )
            if digest != then:
                raise PipelineError(
                    f"model {model} was replaced on the server at {self.url} during "
                    "the run: run the same command again; it embeds every text anew "
                    "and asks nothing"
                )
        self.unchanged_at = now
        version = await self._call("say its version", self._ask_version)
        if version != self.version:
            self.tell(f"Ollama at {self.url} is {version} now, was {self.version}")
            self.version, self.changed = version, True
            self.interrupted = True
        if self.interrupted:
            await self._check_embedder()
            self.interrupted = False
        with suppress(*_failures()):
            loaded = await self._loaded() if facts.gpu_share else {}
            share = loaded.get(plain_name(self._cfg.vlm), facts.gpu_share)
            if share < facts.gpu_share / 2:
                self.tell(
                    f"warning: {share:.0%} of {self._cfg.vlm} is on the GPU, it was "
                    f"{facts.gpu_share:.0%}: answers are slow; see the server's log"
                )
                self.facts = replace(facts, gpu_share=share)

    async def _check_embedder(self) -> None:
        """Raise PipelineError where the probe's embedding is not what it was."""
        text = embed_prefix(self._cfg) + config.PROBE_SENTENCE
        try:
            [probe] = await self._embed([text])
        except RejectedError as error:
            raise PipelineError(
                f"{error}, then run the same command again; every answer is kept"
            ) from None
        if probe is None or cosine(probe, self.facts.probe) < SAME_EMBEDDING:
            raise PipelineError(
                f"{self._cfg.embed_model} on the server at {self.url} (Ollama "
                f"{self.version}) gives other numbers than when the run began, or "
                "none: see its log, then run the same command again; every answer is "
                "kept"
            )

    async def _ask_version(self) -> str:
        reply = await self.http.get("/api/version")
        if reply.status_code != 200:
            raise _ollama().ResponseError(reply.reason_phrase, reply.status_code)
        found = reply.json()
        if not isinstance(found, dict) or "version" not in found:
            raise ValueError("the answer has no version")
        return str(found["version"])

    async def _digests(self) -> dict[str, str]:
        models = (await self._call("list its models", self._client.list)).models
        return {plain_name(one.model): str(one.digest) for one in models}

    async def _loaded(self) -> dict[str, float]:
        """The models in memory, and the share of each that is on the GPU."""
        async with asyncio.timeout(CONNECT_S):  # it may hang with a frozen runner
            models = (await self._client.ps()).models
        return {
            plain_name(one.model): (one.size_vram or 0) / (one.size or 1)
            for one in models
        }

    async def _pull(self, model: str) -> None:
        if not self._cfg.pull:
            raise PipelineError(
                f"model {model} is not on the server at {self.url}: run "
                f"`ollama pull {model}` or add --pull"
            )
        told = ""
        try:
            async for step in await self._client.pull(model, stream=True):
                line = f"pull {model}: {step.status or ''}"
                if step.total:
                    line += f" {5 * int(20 * (step.completed or 0) / step.total)} %"
                if line != told:  # the server reports every few milliseconds
                    self.tell(line)
                told = line
        except _failures() as error:
            raise PipelineError(
                f"model {model} can't be downloaded ({_short(error)}): check its name "
                "and the server's internet connection"
            ) from None

    async def _load(self) -> None:
        await self._call(f"load {self._cfg.vlm}", lambda: self._chat([]), LOAD_S)

    async def _chat(self, messages: list[dict[str, Any]], **options: object) -> Any:
        """Without messages the VLM is loaded; the same options: no call reloads it."""
        return await self._client.chat(
            self._cfg.vlm,
            messages=messages,
            options={**vlm_options(self._cfg), **options},
            keep_alive=self._keep_alive,
            think=self._think if messages else None,
        )

    @property
    def _keep_alive(self) -> float | str:
        """A number is sent as a number: as text Ollama wants a unit."""
        text = self._cfg.keep_alive
        return text if text[-1].isalpha() else float(text)

    async def _probe_embedder(self) -> NDArray[np.float32]:
        """The probe's embedding; and whether a list gives what single texts give."""
        model, prefix = self._cfg.embed_model, embed_prefix(self._cfg)
        texts = [prefix + text for text in (config.PROBE_SENTENCE, *_PROBE_LIST)]
        alone = [(await self._embed([text], LOAD_S))[0] for text in texts]
        if (probe := alone[0]) is None:
            raise PipelineError(
                f"model {model} gives embeddings that are not numbers: choose another "
                "--embed-model, for example nomic-embed-text"
            )
        self._n_features = probe.size
        together: Vectors = []
        with suppress(PipelineError):
            together = await self._embed(texts, LOAD_S)
        self._embeds_lists = all(
            one is not None
            and other is not None
            and cosine(one, other) > SAME_EMBEDDING
            for one, other in zip_longest(alone, together)
        )
        if not self._embeds_lists:
            self.tell(f"{model} embeds lists otherwise: one text a request")
        return probe

    # -- its work --

    async def answer(self, png: bytes, prompt: str, seed: int) -> dict[str, Any]:
        """Ask one question about one picture.

        Returns
        -------
        dict
            What the journal keeps of the reply: text, done, done_reason, counters
            (durations in ns), time (UTC), server and server_version.
        """
        # The client puts the image before the text, and only the text varies: the
        # server then finds the image in its prefix cache. The same bytes every time.
        message = {"role": "user", "content": prompt, "images": [png]}
        reply = await self._call(
            "describe an image", lambda: self._chat([message], seed=seed)
        )
        counters = ("prompt_eval_count", "prompt_eval_duration", "eval_count")
        return {
            "text": reply.message.content or "",
            "done": bool(reply.done),
            "done_reason": reply.done_reason,
            **{n: getattr(reply, n) for n in (*counters, "eval_duration")},
            "time": _now(),
            "server": self.url,
            "server_version": self.version,
            "vlm_digest": self.facts.vlm_digest,
        }

    def has_answered(self, started: float) -> None:
        """Count an answer about an image, and the time since it was asked."""
        now = time.monotonic()
        self.busy_s += now - max(started, self._last)
        self.answered, self._last = self.answered + 1, now

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Embed texts; None for a text that can't be embedded.

        A list saves round trips but fails as a whole: then text by text.

        Returns
        -------
        list of float32 (n_features,) or None
            In the order of `texts`.
        """
        vectors: Vectors = [None] * len(texts)
        if len(texts) == 1 or (texts and self._embeds_lists):
            with suppress(RejectedError):
                vectors = await self._embed(texts)
        for at, text in enumerate(texts) if len(texts) > 1 else ():
            if vectors[at] is None:
                [vectors[at]] = await self.embed([text])
        if len(texts) == 1 and vectors[0] is None:  # the text's fault, or its own?
            await self._check_embedder()
        return vectors

    async def _embed(self, texts: Sequence[str], seconds: float = 0) -> Vectors:
        """One request; None for what is no vector like the probe's."""
        model = self._cfg.embed_model

        async def request() -> list[NDArray[np.float32]]:
            reply = await self._client.embed(model, texts, keep_alive=self._keep_alive)
            if (count := len(reply.embeddings)) != len(texts):
                raise ValueError(f"{count} embeddings for {len(texts)} texts")
            return [np.asarray(values, np.float32) for values in reply.embeddings]

        return [
            vector
            if np.isfinite(vector).all()
            and vector.any()
            and self._n_features in (0, vector.size)
            else None
            for vector in await self._call(f"embed with {model}", request, seconds)
        ]

    # -- one call, and what can go wrong --

    async def _call(
        self, what: str, request: Callable[[], Awaitable[Result]], seconds: float = 0
    ) -> Result:
        """One request under the semaphore, tried again while its failure may pass.

        Where `seconds` are given (a model loads), running out of them is final: a
        client that leaves aborts the load.

        Raises
        ------
        RejectedError
            It fails alone.
        ServerAwayError
            The server does not answer at all: see `come_back`.
        PipelineError
            The run ends with it.
        """
        import tenacity  # noqa: PLC0415 - phases 1 and 3 call nobody

        async def once() -> Result:
            if self.away:
                raise ServerAwayError(
                    f"the server at {self.url} went away: {self._start}, then run the "
                    "same command again"
                )
            async with self._semaphore, asyncio.timeout(seconds or ANSWER_S):
                return await request()

        async def look(state: tenacity.RetryCallState) -> None:
            failure = state.outcome and state.outcome.exception()
            status = getattr(failure, "status_code", 0)
            is_away = isinstance(failure, _server_away()) or status in _GATEWAY
            self.interrupted |= is_away
            if is_away and not self.away:
                self.away = bool(await self._missing())

        def may_pass(error: BaseException) -> bool:
            too_long = bool(seconds) and isinstance(error, TimeoutError)
            return _may_pass(error) and not too_long

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(TRIES),
            wait=tenacity.wait_exponential(FIRST_PAUSE_S)
            + tenacity.wait_random(0, FIRST_PAUSE_S),
            retry=tenacity.retry_if_exception(may_pass),
            before_sleep=look,
            reraise=True,
        )
        try:
            return cast(Result, await retrying(once))
        except _failures() as error:
            why = f"can't {what} ({_short(error)})"
            if remedy := _remedy(error):
                message = f"the server at {self.url} {why}: {remedy}"
                raise PipelineError(message) from None
            self.note(False, "", why)
            raise RejectedError(
                f"the server at {self.url} {why}: see its log"
            ) from None

    def note(self, usable: bool, about: str, said: str) -> None:
        """Stop a run whose server is ill: it is not the images.

        Takes every answer, and the image that it is about; "" and why, where a request
        was given up.
        """
        self._noted.append((usable, about or str(len(self._noted))))
        last = self._noted[-BAD_ANSWERS:]
        bad = [one for one_usable, one in last if not one_usable]
        start = len(self._noted) == BAD_ANSWERS and len(bad) > BAD_ANSWERS / 2
        if start or (len(bad) == BAD_ANSWERS and len(set(bad)) > 1):
            other = (
                ", try another version of Ollama or another --vlm (one that thinks "
                "needs a larger --num-predict)"
            )
            raise PipelineError(
                f"the server at {self.url} (Ollama {self.version}) gives no usable "
                f"answer to {len(bad)} of {BAD_ANSWERS} questions (the last: "
                f"{' '.join(said.split())[:100]!r}): see its log, restart it"
                f"{other if about else ''}; then the same command asks these again"
            )

    async def _missing(self) -> str:
        """Why the server does not answer; "" when it does, with the VLM loaded."""
        try:
            if plain_name(self._cfg.vlm) not in await self._loaded():
                async with asyncio.timeout(LOAD_S):
                    await self._chat([])
        except _failures() as error:
            if remedy := _remedy(error):
                raise PipelineError(
                    f"the server at {self.url} can't load {self._cfg.vlm} "
                    f"({_short(error)}): {remedy}"
                ) from None
            return _short(error)
        return ""

    async def come_back(self, others_work: bool) -> None:
        """See whether a server that went away answers again; else pause.

        Raises
        ------
        PipelineError
            Its pauses without another server at work are --wait seconds by now: a
            workstation that slept has not waited.
        """
        async with self._recovery:
            if not self.away:
                return
            if not (why := await self._missing()):
                self.away, self.changed, self._waited = False, True, None
                self.tell(f"the server at {self.url} answers again")
                return
            if self._waited is None:
                wait = "its images go to the others, " if others_work else ""
                wait += f"waiting up to {self._cfg.wait:.0f} s"
                self.tell(f"the server at {self.url} is away ({why}): {wait}")
                self._waited = 0.0
            if self._waited >= self._cfg.wait and not others_work:
                raise PipelineError(
                    f"the server at {self.url} has not answered for "
                    f"{self._waited:.0f} s ({why}): {self._start}, then run the same "
                    "command again; every answer so far is kept"
                )
            pause = min(2.0, FIRST_PAUSE_S * 4)
            await asyncio.sleep(pause)
            self._waited = 0.0 if others_work else self._waited + pause


async def _refuse_redirect(reply: Any) -> None:
    """The client says of it only that it came."""
    if reply.has_redirect_location:
        await reply.aread()  # or the connection is lost
        where = reply.headers["location"]
        raise _ollama().ResponseError(where, reply.status_code)


_PROBE_LIST = (
    "A straight edge divides the image into a dark and a bright half.",
    "Circles of different contrast are arranged in a ring.",
)


@cache
def _server_away() -> tuple[type[Exception], ...]:
    import httpx  # noqa: PLC0415

    return ConnectionError, httpx.TransportError, TimeoutError


@cache
def _failures() -> tuple[type[Exception], ...]:
    # ValueError: the body was no JSON, or not what was asked for. AttributeError: what
    # the client makes of an error whose JSON is a list.
    return _ollama().ResponseError, *_server_away(), ValueError, AttributeError


def _may_pass(error: BaseException) -> bool:
    """Whether a failed request is worth another try; a bug is not."""
    if _remedy(error) or not isinstance(error, _failures()):
        return False
    status = getattr(error, "status_code", 0)
    # /api/embed reports a crashed runner as 400 "do embedding request … EOF".
    return status != 413 and (status != 400 or "EOF" in str(error))


_GATEWAY = (502, 503, 504)
"""What stands before the server does not reach it, or the server has too much to do."""

_STATUS_REMEDIES = {
    401: "set OLLAMA_API_KEY, or a user and password in --host",
    403: "something between refuses: add the server to NO_PROXY, or set OLLAMA_ORIGINS",
    407: "a proxy stands between: add the server to NO_PROXY",
    404: "see that --host names an Ollama",
    501: "run `ollama pull nomic-embed-text`, use --embed-model nomic-embed-text",
    **dict.fromkeys((301, 302, 303, 307, 308), "name the new address with --host"),
}


def _remedy(error: BaseException) -> str:
    """What mends a failure for which no second try is worth while; else empty."""
    if _is_untrusted(error):
        return "let SSL_CERT_FILE name the certificate of its authority"
    if missing := re.search("model ['\"](.+?)['\"] not found", str(error)):
        return f"run `ollama pull {missing[1]}`, then the same command again"
    return _STATUS_REMEDIES.get(getattr(error, "status_code", 0), "")


def plain_name(model: str | None) -> str:
    """The name of a model without the tag that Ollama adds where none is named."""
    return str(model).removesuffix(":latest")


def _is_untrusted(error: BaseException) -> bool:
    """Whether nobody that is trusted has signed the server's certificate."""
    return "CERTIFICATE_VERIFY_FAILED" in f"{error} {error.__context__ or ''}"


def _short(error: BaseException) -> str:
    """An error in at most 200 characters of one line; the server nests JSON in JSON."""
    text = str(getattr(error, "error", error)) or type(error).__name__
    if isinstance(error, TimeoutError) or type(error).__name__.endswith("Timeout"):
        text = "no answer in time"
    elif _is_untrusted(error):
        text = "its certificate is not trusted"
    elif isinstance(error, ConnectionError):
        text = "no connection"
    elif type(error).__name__ in ("ValidationError", "JSONDecodeError"):
        text = "the answer is not of Ollama's form"
    with suppress(ValueError, KeyError, TypeError):
        nested = json.loads(text)["error"]
        text = nested["message"] if isinstance(nested, dict) else str(nested)
    if (status := getattr(error, "status_code", 0)) > 0:
        text = f"HTTP {status}: {re.sub('<[^>]*>', ' ', text)}"
    return " ".join(text.split())[:200]


# --- The decision -------------------------------------------------------------------
# From what was seen of an image to a class or INCONCLUSIVE. Two readers: one reads the
# descriptions of the VLM, the other, which never saw a word, 40 numbers of the picture.
# Phase 3 measures with these functions, phase 4 answers with them. Nothing here asks,
# decodes or writes; scikit-learn is imported at its first use, since phase 4 asks its
# first question without it.

NEIGHBOUR_COUNT, PIXEL_NEIGHBOUR_COUNT = 10, 5
"""Novelty: mean distance to this many nearest training descriptions, or pictures."""

NEVER = 1.01
"""A confidence threshold that no image reaches: such a class is never answered."""

SURE = 0.9
"""Readers that disagree are not asked further above this confidence of the first."""


@dataclass(frozen=True)
class Model:
    """What phase 3 left, as `load_model` reads it."""

    scaler: Any
    classifier: Any
    """Scaled mean vector -> probabilities, as calibrated for the last stage."""
    second: Any
    """The second reader: a pipeline on `picture_statistics`."""
    descriptions: Any
    """NearestNeighbors of scaled, projected training descriptions."""
    pictures: Any
    """NearestNeighbors of scaled statistics of the training pictures."""
    projection: NDArray[np.float32]
    owner: NDArray[np.int32]
    """(n_descriptions,), the index in `names` of the image that each describes."""
    names: NDArray[np.str_]
    """(n_images,), the labelled files."""
    thresholds: Mapping[str, Any]
    """``metricas.json["thresholds"]``: "pixels", and "stages" by number of questions.

    A stage has the limit of novelty ("descriptions"), the "factor" that calibrates its
    confidences, and the "confidence" that each class needs (with the descriptions'
    reader alone: "one_reader").
    """
    modalities: Sequence[str]
    """Modalities of the training images."""

    @property
    def stages(self) -> list[int]:
        """Numbers of descriptions after which a decision is tried, in order."""
        return sorted(int(stage) for stage in self.thresholds["stages"])


@dataclass(frozen=True)
class Opinion:
    """What one reader says of one image."""

    label: str
    confidence: float
    """1 of the second reader, which has none."""
    novelty: float
    """As a multiple of its limit: above 1 the image is unlike the training's."""
    nearest: Sequence[str] = ()
    """Training images that are most alike, the closest first."""
    confidences: Mapping[str, float] = field(default_factory=dict)
    """Of every class; empty of the second reader."""

    @property
    def unlike(self) -> str:
        """How far it is from training, in words."""
        nearest = f"; nearest {self.nearest[0]}" if self.nearest else ""
        return f"unlike all in training ({self.novelty:.1f} times the limit{nearest})"


@dataclass(frozen=True)
class Decision:
    """What phase 4 says of one image."""

    label: str
    """The class, or INCONCLUSIVE."""
    best_class: str
    """The class of the largest confidence; the second reader's before any question."""
    reason: str
    """Why the label is INCONCLUSIVE; "" also where only the questions are missing."""
    words: Opinion | None
    """None before any question."""
    picture: Opinion | None
    """None where the second reader is not heard."""
    stage: int
    """The number of descriptions whose limits were applied; 0 before any question."""

    @property
    def final(self) -> bool:
        """Whether further questions would hardly change it."""
        return not self.reason or bool(
            self.words and beyond_doubt(self.words, self.picture)
        )


def load_model(folder: Path, metrics: Mapping[str, Any]) -> Model:
    """Load the readers; takes a second or two, most of it scikit-learn's import.

    Their digests must have been checked: a joblib file can run code. NEIGHBOURS holds
    arrays only, nothing of it is unpickled.
    """
    import joblib  # noqa: PLC0415

    second = joblib.load(folder / config.SECOND_READER)
    with np.load(folder / config.NEIGHBOURS, allow_pickle=False) as arrays:
        return Model(
            scaler=joblib.load(folder / config.SCALER),
            classifier=joblib.load(folder / config.CLASSIFIER),
            second=second,
            descriptions=fit_neighbours(arrays["rows"], NEIGHBOUR_COUNT),
            pictures=fit_neighbours(
                second[0].transform(arrays["pixels"]), PIXEL_NEIGHBOUR_COUNT
            ),
            projection=arrays["projection"],
            owner=arrays["owner"],
            names=arrays["names"],
            thresholds=metrics["thresholds"],
            modalities=metrics.get("modalities", ()),
        )


def fit_neighbours(points: NDArray[Any], count: int) -> Any:
    """A NearestNeighbors that finds `count` points, or as many as there are."""
    from sklearn.neighbors import NearestNeighbors  # noqa: PLC0415

    count = min(count, len(points))
    return NearestNeighbors(n_neighbors=count, algorithm="brute").fit(points)


def project(
    scaled: NDArray[np.float32], projection: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Scaled rows in the space of the neighbours; an empty projection changes none."""
    return scaled @ projection if projection.size else scaled


def class_scores(decisions: NDArray[Any], n_classes: int) -> NDArray[np.float64]:
    """Sums of the one-against-one decisions of an SVC, (n_samples, n_classes).

    Its class is their argmax. Not scikit-learn's "ovr" form, nor `predict`: their votes
    tie and make steps that can't be calibrated.
    """
    pairs = np.reshape(decisions, (len(decisions), -1))
    return np.asarray(pairs @ sums_of_pairs(n_classes).T, np.float64)


def sums_of_pairs(n_classes: int) -> NDArray[np.float64]:
    """(n_classes, n_pairs): +1 where a decision speaks for a class, -1 against it.

    In scikit-learn's order of pairs; of two classes, positive means the second.
    """
    first, second = np.triu_indices(n_classes, 1)
    signs = np.eye(n_classes)[:, first] - np.eye(n_classes)[:, second]
    return -signs if n_classes == 2 else signs


def times_limit(distance: float, limit: float) -> float:
    """Novelty as a multiple of its limit; finite where the limit is 0."""
    return float(distance / max(limit, 1e-9))


def beyond_doubt(words: Opinion, picture: Opinion | None) -> bool:
    """Whether an image that is refused need not be asked further questions.

    The readers disagree, and the descriptions are sure of their class: of 480 known
    drawn images in eight draws one would have been answered after all ten, and
    unknown images take 1.3 questions instead of 2.8.
    """
    disagree = picture is not None and picture.label != words.label
    return disagree and words.confidence > SURE


def foreign_modality(modality: str, trained: Sequence[str]) -> str:
    """Why the header refuses an image; empty where it, or the model, names none."""
    if not modality or not trained or modality in trained:
        return ""
    return f"Modality {modality} is not among those of training ({', '.join(trained)})"


def decide(
    thresholds: Mapping[str, Any],
    picture: Opinion | None,
    words: Opinion | None = None,
    stage: int = 0,
    foreign: str = "",
) -> Decision:
    """From what the readers say of an image to its class, or why it gets none.

    Parameters
    ----------
    thresholds : mapping
        As in `Model`.
    picture : Opinion or None
        None: the second reader is not heard, and the first needs more confidence.
    words : Opinion or None
        None: nothing was asked yet, and an empty reason means that asking may help.
    stage : int
        Of ``thresholds["stages"]``, the one whose limits hold for `words`.
    foreign : str
        What `foreign_modality` says of the header.
    """
    needed: Mapping[str, float] = {}
    if words:
        limits = thresholds["stages"][str(stage)]
        needed = limits["confidence" if picture else "one_reader"]
    reason = foreign or next(_doubts(words, picture, needed), "")
    heard = words or picture
    best = heard.label if heard else ""
    label = config.INCONCLUSIVE if reason or not words else best
    return Decision(label, best, reason, words, picture, stage if words else 0)


def _doubts(
    words: Opinion | None, picture: Opinion | None, needed: Mapping[str, float]
) -> Iterator[str]:
    """What speaks against a class, the strongest first."""
    if picture and picture.novelty > 1:
        yield f"the picture is {picture.unlike}"
    if words is None:
        return
    if words.novelty > 1:
        yield f"the descriptions are {words.unlike}"
    label, least = words.label, needed[words.label]
    if picture and picture.label != label:
        yield f"descriptions say {label}, picture says {picture.label}"
    if least >= NEVER:
        yield f"no confidence in {label} kept the errors within the accepted share"
    if words.confidence < least:
        yield f"confidence {words.confidence:.2f} in {label} is below {least:.2f}"


def read_words(model: Model, rows: NDArray[np.float32], stage: int) -> Opinion:
    """The first reader's opinion: the mean of the descriptions decides.

    Novelty is the mean over the descriptions: their mean vector would hide an unknown
    image, since it lies near the centre of everything.

    Parameters
    ----------
    rows : ndarray, float32 (k, n_features)
        One embedding per generic description, not scaled.
    stage : int
        One of ``model.stages``: whose limits hold.
    """
    limits = model.thresholds["stages"][str(stage)]
    scaled = np.asarray(model.scaler.transform(rows), np.float32)
    shares = model.classifier.predict_proba(scaled.mean(axis=0, keepdims=True))[0]
    shares = shares ** limits["factor"]
    names = [str(name) for name in model.classifier.classes_]
    confidences = dict(zip(names, map(float, shares / shares.sum()), strict=True))
    best = max(confidences, key=lambda name: confidences[name])  # the first of equals
    distances, found = model.descriptions.kneighbors(project(scaled, model.projection))
    owners = Counter(model.owner[found].T.ravel().tolist()).most_common(3)
    novelty = times_limit(distances.mean(), limits["descriptions"])
    nearest = [str(model.names[owner]) for owner, _ in owners]
    return Opinion(best, confidences[best], novelty, nearest, confidences)


def read_picture(model: Model, pixels: NDArray[np.float32]) -> Opinion:
    """The second reader's opinion of `picture_statistics`, float32 (40,)."""
    classes = model.second.classes_
    scores = class_scores(model.second.decision_function(pixels[None]), len(classes))
    scaled = model.second[0].transform(pixels[None])
    distances, found = model.pictures.kneighbors(scaled)
    novelty = times_limit(distances.mean(), model.thresholds["pixels"])
    nearest = [str(model.names[image]) for image in found[0, :3]]
    return Opinion(str(classes[scores[0].argmax()]), 1.0, novelty, nearest)


# --- The page -----------------------------------------------------------------------
# Owns how pictures look on screen and paper and how a person marks them. Never decides
# what stands on a page, never asks the network, never needs a file beside the page.

PAGE_TILES = 500
"""Images a page: more are slow to open, and go to further pages."""


HOW_TO_MARK = (
    "To mark images: click, Shift+click or drag over a run, Ctrl+click, or arrow keys "
    "and Space. To give them a class: its key (1 to 9) or n and a name; u takes it "
    "back. Save, then run: python fase1_descompresion.py --labels FILE, with the list "
    "where your browser saved it (it numbers a second one)"
)


class Tile(NamedTuple):
    """One image on a page."""

    name: str
    picture: str = ""  # key of its thumbnail in Sheet.pictures
    file: str = ""  # what a saved list calls it; empty: gets no class here
    group: str = ""
    label: str = ""
    state: str = ""
    lines: Sequence[str] = ()
    shares: Mapping[str, float] = MappingProxyType({})  # drawn as bars
    near: Sequence[tuple[str, str]] = ()  # (key, name) of images like it
    details: Sequence[str] = ()


class Chart(NamedTuple):
    """A curve: y is a share, and so is x where `x_max` is 1."""

    title: str
    x_title: str
    points: Sequence[tuple[float, float, float, float]]  # x, y, interval of y
    x_max: float = 1.0
    y_max: float = 1.0
    diagonal: bool = False


class Section(NamedTuple):
    """Lines, a table (header first) and charts above the images."""

    title: str
    lines: Sequence[str] = ()
    rows: Sequence[Sequence[str | tuple[str, str]]] = ()  # (cell, state that it shows)
    charts: Sequence[Chart] = ()
    warning: bool = False


class Sheet(NamedTuple):
    """What a page shows. Its texts may hold anything: they are escaped."""

    title: str
    folder: str  # the classes given in the browser are remembered for it
    tiles: Sequence[Tile]
    pictures: Mapping[str, bytes]  # JPEG
    classes: Sequence[str]
    sections: Sequence[Section] = ()
    order: str = ""  # of the tiles; if it has a name, "various first" is offered too
    foot: Sequence[str] = ()


def thumbnail(grey: NDArray[np.uint8]) -> bytes:
    """JPEG of at most 160 pixels a side and about 2 to 4 kB.

    Parameters
    ----------
    grey : ndarray, uint8 (rows, columns)
        With or without the padding of `prepare_image`.
    """
    image = Image.fromarray(_without_padding(grey))
    image.thumbnail((160, 160), Image.Resampling.BOX)
    for quality in (75, 55, 35, 20, 10):
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=quality)
        if jpeg.tell() <= 4000:
            break
    return jpeg.getvalue()


def preview(pixels: Pixels, dataset: Dataset) -> bytes:
    """Thumbnail of the middle frame of a decoded image, cheaply: of every n-th pixel.

    In the grey window of `prepare_image`, found on these pixels: nearly its picture.
    """
    frame = frame_of(pixels)
    step = math.ceil(max(frame.shape[:2]) / 320)
    frame = frame[::step, ::step]
    values, padding = _display_values(frame, dataset), _padding(frame, dataset)
    parts = [values, (~padding).astype(np.float32)] if padding.any() else [values]
    height, width = values.shape[0] * _pixel_aspect(dataset), float(values.shape[1])
    scale = 160 / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    images = (Image.fromarray(part) for part in parts)
    box = Image.Resampling.BOX
    small, *share = (np.asarray(image.resize(size, box)) for image in images)
    return thumbnail(_window(small, share[0] if share else np.ones(0), step=2))


def page_paths(path: Path, count: int) -> list[Path]:
    """The files of a page of so many images."""
    pages = range(2, math.ceil(count / PAGE_TILES) + 1)
    return [path, *(path.with_stem(f"{path.stem}_{number}") for number in pages)]


def page(path: Path, sheet: Sheet) -> None:
    """Write `path`, and `path`_2 … for every further 500 images, where it changed.

    A page needs nothing but a browser: thumbnails, styles and script are inside it.
    """
    import jinja2  # noqa: PLC0415 - loaded only where a page is made

    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    paths = page_paths(path, len(sheet.tiles))
    for number, target in enumerate(paths):
        tiles = sheet.tiles[number * PAGE_TILES :][:PAGE_TILES]
        keys = {key for t in tiles for key in (t.picture, *(k for k, _ in t.near))}
        pictures = {
            key: base64.b64encode(sheet.pictures[key]).decode()
            for key in keys
            if key in sheet.pictures
        }
        looks = [sheet.pictures.get(t.picture) for t in tiles]
        ranks = various(looks) if sheet.order and looks else [0] * len(looks)
        about = {"sheet": sheet, "paths": paths, "number": number, "ranks": ranks}
        html = template.render(about, tiles=tiles, pictures=pictures)
        write_file(target, html.encode("utf-8", "backslashreplace"))
    last = len(paths)
    while (stale := path.with_stem(f"{path.stem}_{last + 1}")).is_file():
        last += 1
        if b'data-save="etiquetas_' in stale.read_bytes():
            remove_file(stale)  # of more images than there are now


def various(thumbnails: Sequence[bytes | None]) -> list[int]:
    """Places in an order in which the first images differ most, in looks and in place.

    Each next one is the farthest from those before it, by 8 x 8 grey levels.
    """
    looks = np.zeros((len(thumbnails), 65))
    for at, jpeg in enumerate(thumbnails):
        with suppress(OSError):  # there is none, or a damaged one
            image = Image.open(io.BytesIO(jpeg or b""))
            small = image.resize((8, 8), Image.Resampling.BOX)
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


_PAGE = r"""<!doctype html>
{% macro picture(key, name) %}
<img data-key="{{ key }}" alt="{{ name }}" title="{{ name }}" draggable="false"
{%- if key in pictures %} src="data:image/jpeg;base64,{{ pictures.pop(key) }}"
{%- endif %}>{% endmacro %}
{% macro shown(v, top=1) %}
{{ "%.3g %%"|format(v * 100) if top <= 1 else "%.3g"|format(v) }}{% endmacro %}
{% macro chart(c) %}
{% macro x(v) %}{{ (50 + 250 * v / c.x_max)|round(1) }}{% endmacro %}
{% macro y(v) %}{{ (190 - 176 * [v / c.y_max, 1]|min)|round(1) }}{% endmacro %}
<figure><h3>{{ c.title }}</h3><svg viewBox="0 0 320 230" role="img">
{% for v in (0, 0.25, 0.5, 0.75, 1) %}
<path class="axis" d="M50 {{ y(v * c.y_max) }}H300"/>
<text x="44" y="{{ y(v * c.y_max) }}" class="left">{{ shown(v * c.y_max) }}</text>
<text x="{{ x(v * c.x_max) }}" y="206">{{ shown(v * c.x_max, c.x_max) }}</text>
{% endfor %}
<text x="175" y="224">{{ c.x_title }}</text>
{% if c.diagonal %}<path class="axis" d="M50 190L300 14"/>{% endif %}
<polyline points="{% for p in c.points %}{{ x(p[0]) }},{{ y(p[1]) }} {% endfor %}"/>
{% for p in c.points %}
<path class="span" d="M{{ x(p[0]) }} {{ y(p[2]) }}V{{ y(p[3]) }}"/>
<circle cx="{{ x(p[0]) }}" cy="{{ y(p[1]) }}" r="3"><title>{{ shown(p[0], c.x_max)
 }}: {{ shown(p[1]) }} ({{ shown(p[2]) }} to {{ shown(p[3]) }})</title></circle>
{% endfor %}</svg></figure>{% endmacro %}<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src data: 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>{{ sheet.title }}</title>
<style>
:root { color-scheme: light dark; --back: #f3f5f8; --card: #fff; --ink: #1a1f26;
  --dim: #58626f; --line: #d3d9e1; --blue: #0b5fd0; --warn: #fff1cc }
@media (prefers-color-scheme: dark) { :root { --back: #12161b; --card: #1d232b;
  --ink: #e5e9ee; --dim: #9aa5b2; --line: #36404b; --blue: #72adff; --warn: #3b3010 } }
* { box-sizing: border-box } [hidden], .chip:empty { display: none !important }
html { background: var(--back); color: var(--ink); overflow-wrap: anywhere }
body { margin: auto; padding: 0 16px 32px; max-width: 1700px; font: 14px/1.4 system-ui }
h1 { font-size: 21px; margin: 14px 0 4px } h2 { font-size: 16px; margin: 12px 0 4px }
h3 { font-size: 13px; margin: 0 } p { margin: 2px 0 } .dim { color: var(--dim) }
#sections, main { display: grid; gap: 10px; margin-bottom: 16px;
  grid-template-columns: repeat(auto-fill, minmax(178px, 1fr)) }
#sections { grid-template-columns: repeat(auto-fit, minmax(min(540px, 100%), 1fr)) }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(370px, 100%), 1fr)) }
.warning, section:has(svg), main h2 { grid-column: 1 / -1 }
.warning { background: var(--warn); padding: 0 14px 10px } section { overflow-x: auto }
button, select, #find, #name { font: inherit; color: inherit; padding: 4px 9px;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px }
#classes button { border-left: 6px solid var(--c) } button, .mark { cursor: pointer }
#save { background: var(--blue); color: var(--back) } .mark { user-select: none }
:focus-visible { outline: 3px solid var(--blue); outline-offset: 1px }
.row { display: flex; flex-wrap: wrap; gap: 6px } .tile.on { border-color: var(--blue) }
#bar { position: sticky; top: 0; z-index: 2; background: var(--back); padding: 8px 0;
  margin: 10px 0; border-bottom: 1px solid var(--line); align-items: center }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; border-bottom: 1px solid var(--line); text-align: right }
tr > :first-child { text-align: left } figure, .tile, .warning { border-radius: 8px }
figure { margin: 0; flex: 0 1 340px; padding: 8px 10px; background: var(--card) }
svg { width: 100%; font-size: 11px; fill: var(--blue) } .span { opacity: .5 }
text { fill: var(--dim); text-anchor: middle; dominant-baseline: middle }
path, polyline { stroke: var(--blue); stroke-width: 2; fill: none }
.axis { stroke: var(--line); stroke-width: 1 } .left { text-anchor: end }
.tile { background: var(--card); border: 2px solid transparent; padding: 7px;
  border-left: 6px solid var(--c, transparent); position: relative; font-size: 13px }
.many .tile { content-visibility: auto; contain-intrinsic-size: auto 290px }
.tile input { position: absolute; margin: 5px; scale: 1.4; scroll-margin: 90px 0 280px }
.tile img { object-fit: contain; background: #000; border-radius: 4px; display: block }
.tile > img { width: 100%; height: 160px; margin-bottom: 4px; color: #999 }
.mono, .tile h3 { font: 12px/1.4 ui-monospace, monospace; overflow: hidden }
.mono { white-space: pre-wrap; padding-left: 21ch; text-indent: -21ch }
.wide .tile > img { width: 160px; float: left; margin-right: 10px }
.rest { clear: left; user-select: text; padding-top: 4px } .rest img { height: 84px }
.rest small, .rest img { width: 84px; color: var(--dim) } .tile p { overflow: hidden }
.chip { font-weight: 650; border: 1px solid var(--line); padding: 0 7px;
  border-radius: 9px; margin-right: 4px } .mine { background: var(--c); color: #000 }
.share::before { content: ""; display: inline-block; width: 78px; height: 9px;
  background: linear-gradient(var(--blue) 0 0) 0 / var(--share) no-repeat var(--line) }
@media print { #bar, input { display: none } body { print-color-adjust: exact }
  .tile { break-inside: avoid; border-color: #999; content-visibility: visible } }
</style>
<body data-folder="{{ sheet.folder }}" data-classes='{{ sheet.classes|tojson }}'
 data-save="etiquetas{{ "_%d"|format(number + 1) if paths|length > 1 }}.csv">
<h1><bdi>{{ sheet.title }}</bdi></h1><div id="sections">{% for s in sheet.sections %}
<section{% if s.warning %} class="warning"{% endif %}><h2>{{ s.title }}</h2>
{% for line in s.lines %}<p{% if line[:2] == "  " %} class="mono"{% endif %}
><bdi>{{ line }}</bdi></p>{% endfor %}
<table>{% for row in s.rows %}{% set tag = "th" if loop.first else "td" %}<tr>
{% for cell in row %}<{{ tag }}>{% if cell is string %}<bdi>{{ cell }}</bdi>{% else %}
<button data-show="{{ cell[1] }}" title="{{ cell[1] }}">{{ cell[0] }}</button>
{% endif %}</{{ tag }}>{% endfor %}</tr>{% endfor %}</table>
<div class="row">{% for c in s.charts %}{{ chart(c) }}{% endfor %}</div></section>
{% endfor %}</div><div id="bar" class="row">
<input id="find" type="search" placeholder="find text ( / )" aria-label="find text">
<select id="only" aria-label="class or state"><option value="">all<option>no class
{% for name in sheet.tiles|map(attribute="state")|unique if name %}
<option value="{{ name }}">{{ name }}{% endfor %}</select>
<select id="order" aria-label="order"{% if not sheet.order %} hidden{% endif %}>
<option>{{ sheet.order }}<option>various first</select>
{% if paths|length > 1 %}{% for p in paths %}<a href="{{ p.name|urlencode }}"
{%- if loop.index0 == number %} aria-current="page"{% endif %}>page {{ loop.index }}</a>
{% endfor %}{% endif %}
<span id="give" class="row"><span id="classes" class="row"></span>
<input id="name" placeholder="other class ( n )" aria-label="other class" size="14">
<button id="none">take back ( u )</button><button id="save"></button></span>
<output id="said" class="dim"></output></div>
<main class="{{ "wide" if tiles|selectattr("shares")|list }}
 {{ "many" if tiles|length > 100 }}">{% for t in tiles %}
{% if t.group and loop.changed(t.group) %}<h2><bdi>{{ t.group }}</bdi></h2>{% endif %}
<article class="tile{{ " mark" if t.file }}" data-file="{{ t.file }}"
 data-label="{{ t.label }}" data-state="{{ t.state }}" data-rank="{{ ranks.pop(0) }}">
{% if t.file %}<input type="checkbox" aria-label="{{ t.name }}">{% endif %}
{{ picture(t.picture, t.name) }}
<bdi class="mine chip"></bdi><bdi class="chip">{{ t.label }}</bdi>
<bdi class="dim">{{ t.state }}</bdi>
{% for name, share in t.shares.items() %}{% set part = "%.1f%%"|format(share * 100) %}
<div class="share" style="--share: {{ part }}"> {{ part }} <bdi>{{ name }}</bdi></div>
{% endfor %}{% for line in t.lines %}<p><bdi>{{ line }}</bdi></p>{% endfor %}
<h3><bdi>{{ t.name }}</bdi></h3><div class="rest row">{% for key, name in t.near %}
<small>{{ picture(key, name) }}<bdi>{{ name.split("/")[0] }}</bdi></small>
{% endfor %}</div>
{% if t.details %}<details class="rest"><summary>descriptions</summary>
{% for line in t.details %}<p><bdi>{{ line }}</bdi></p>{% endfor %}</details>{% endif %}
</article>{% endfor %}</main>
<footer class="dim">{% for line in sheet.foot %}<p>{{ line }}</p>{% endfor %}</footer>
<script>
const $ = (id) => document.getElementById(id), data = document.body.dataset;
const all = (css) => [...document.querySelectorAll(css)], main = all("main")[0];
const tiles = all(".tile"), nodes = [...main.children];
const colours = ["#56b4e9", "#e69f00", "#2fb58a", "#f0e442", "#cc79a7", "#d5733c"];
let marks = new Map(), names = [], given = [], anchor = null, here = null, drag = false;
const box = (tile) => tile.querySelector("input");
const seen = () => all(".mark:not([hidden])");
const chosen = () => seen().filter((tile) => box(tile).checked);
const saved = () => tiles.filter((tile) => marks.get(tile.dataset.file));
const say = (text) => { $("said").textContent = text; };
const kept = (key) => JSON.parse(localStorage.getItem(key + data.folder) || "[]");
const keep = (k, v) => localStorage.setItem(k + data.folder, JSON.stringify([...v]));
function load() { // another window may have changed them
  try { marks = new Map(kept("marks ")); names = kept("names "); } catch {}
}
function chose() {
  if (chosen().length) given = [];
  for (const tile of all(".mark")) tile.classList.toggle("on", box(tile).checked);
  const shown = `${all(".tile:not([hidden])").length} shown`;
  const last = given.length ? `; next class: for the last ${given.length} again` : "";
  say($("give").hidden ? shown : `${chosen().length} marked, ${shown}${last}`);
}
function choose(from, to) { // marks the images from one to another, and no others
  const list = seen(), pair = [from?.hidden ? to : from, to];
  const [low, high] = pair.map((t) => list.indexOf(t)).sort((a, b) => a - b);
  list.forEach((tile, at) => { box(tile).checked = at >= low && at <= high; });
  chose();
}
function show() {
  const count = new Map([...JSON.parse(data.classes), ...names].map((n) => [n, 0]));
  const text = $("find").value.toLowerCase(), only = $("only").value;
  for (const tile of tiles) {
    const mine = marks.get(tile.dataset.file) || "", name = mine || tile.dataset.label;
    if (name) count.set(name, (count.get(name) || 0) + 1);
    names = [...count.keys()];
    tile.style.setProperty("--c", colours[names.indexOf(name) % 6] || "transparent");
    tile.querySelector(".mine").textContent = mine;
    tile.hidden = !tile.textContent.toLowerCase().includes(text)
      || (only && only !== (name || "no class") && only !== tile.dataset.state);
    if (tile.hidden && box(tile)) box(tile).checked = false;
  }
  $("classes").replaceChildren(...names.map((name, at) => {
    const button = document.createElement("button"), digit = at < 9 ? at + 1 : "";
    button.textContent = `${digit} ${name}: ${count.get(name)}`;
    button.style.setProperty("--c", colours[at % 6]);
    button.onclick = () => give(name); return button;
  }));
  for (const name of names) if (![...$("only").options].some((o) => o.value === name))
    $("only").add(new Option(name, name));
  $("save").textContent = `Save ${data.save} (${saved().length})`;
  for (const h of all("main h2")) h.hidden = text || only || $("order").selectedIndex;
  chose();
}
function give(name, here) { // to what is marked, was just given one, or is in focus
  const some = [chosen(), given].find((list) => list.length)
    || seen().filter((tile) => tile === here);
  name = names.find((one) => one.toLowerCase() === name.toLowerCase()) ?? name;
  if (!some[0]) return say("Mark images first: click, drag, or arrow keys and Space.");
  if (/^[.\s]|[\\/:*?"<>|\p{C}]|[.\s]$|^no[ _]concluyente$/iu.test(name))
    return say("No folder can have that name.");
  load(); some.forEach((tile) => marks.set(tile.dataset.file, name));
  choose(); show(); given = some.filter((tile) => !tile.hidden); chose();
  try { keep("marks ", marks); keep("names ", names); }
  catch { say("This browser forgets the classes with the page: save before."); }
  return some[0];
}
function move(step, extend) {
  const from = here || anchor, list = seen();
  const before = list.filter((tile) => from?.compareDocumentPosition(tile) & 2).length;
  const to = list[from ? before + step - (from.hidden && step > 0) : 0];
  if (!to) return;
  if (extend) choose(anchor ||= from, to); else anchor = to;
  given = []; box(to).focus();
}
$("save").onclick = () => {
  const cell = (text) => '"' + text.replace(/^[=+\-@\t\r']/, "'$&") // no formula
    .replaceAll('"', '""') + '"';
  const lines = saved().map(({ dataset: { file } }) => [file, marks.get(file)]);
  const csv = [["file", "class"], ...lines].map((line) => line.map(cell) + "\r\n");
  const blob = new Blob(["\ufeff", ...csv], { type: "text/csv" });
  const link = { href: URL.createObjectURL(blob), download: data.save };
  Object.assign(document.createElement("a"), link).click();
  say(`Next: python fase1_descompresion.py --labels PATH/TO/${data.save}`);
};
main.onmousedown = (event) => {
  const tile = event.target.closest(".mark");
  if (!tile || event.button || event.target.closest("input, .rest")) return;
  event.preventDefault(); box(tile).focus({ preventScroll: true });
  if (event.ctrlKey || event.metaKey) return box(tile).click();
  if (!event.shiftKey || !anchor) anchor = tile;
  drag = true; choose(anchor, tile);
};
main.onmouseover = (event) => {
  const tile = event.target.closest(".mark");
  if (drag && event.buttons & 1 && tile) choose(anchor, tile);
};
document.onmouseup = () => { drag = false; }; $("none").onclick = () => give("");
main.onchange = (event) => { anchor = event.target.closest(".mark"); chose(); };
document.onkeydown = ({ key, target, shiftKey, altKey, ctrlKey, metaKey }) => {
  here = target.closest(".mark") || (target === $("name") ? here : null);
  if (key === "Escape") { target.blur(); anchor = null; given = []; choose(); }
  const typed = key === "Enter" && target === $("name") && target.value.trim();
  const tile = typed && give(typed, here);
  if (tile) { target.value = ""; target.blur(); box(tile).focus(); }
  if (target.matches("select, #find, #name") || altKey || ctrlKey || metaKey) return;
  const across = getComputedStyle(main).gridTemplateColumns.split(" ").length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across };
  const name = key.toLowerCase() === "u" ? "" : names[key - 1];
  if (step[key]) move(step[key], shiftKey);
  else if (name !== undefined) give(name, here);
  else if (key === "n" || key === "/") $(key === "n" ? "name" : "find").focus();
  else return true;
  return false;
};
$("find").oninput = $("only").oninput = () => { given = []; show(); };
document.onmousedown = ({ target }) => target.closest("#bar") || (given = [], chose());
$("order").oninput = () => {
  const byRank = [...tiles].sort((a, b) => a.dataset.rank - b.dataset.rank);
  main.append(...($("order").selectedIndex ? byRank : nodes)); show();
};
for (const button of all("[data-show]")) button.onclick = () => {
  $("only").value = button.dataset.show; show(); $("bar").scrollIntoView();
  if (!$("only").value) say("Its images are on another page.");
};
const first = new Map(all("img[src]").map((img) => [img.dataset.key, img.src]));
for (const img of all("img:not([src])")) img.src = first.get(img.dataset.key) || "";
$("give").hidden = !all(".mark").length; (onstorage = () => { load(); show(); })();
</script>
"""
