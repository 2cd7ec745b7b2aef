"""What at least two phases need: errors, files, DICOM, the vision language model.

Silent and stateless: nothing here prints, exits or remembers.
"""

import base64
import csv
import errno
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import pixel_array

import config

# --- Errors -------------------------------------------------------------------------


class PipelineError(Exception):
    """Something a user can mend; one line: what is wrong, where, what to do."""


class RejectedError(PipelineError):
    """One item can't be used; the message is its reason. The run goes on without it."""


EXIT_DONE, EXIT_SOME_FAILED, EXIT_COULD_NOT_RUN, EXIT_INTERRUPTED = 0, 1, 2, 130

_DISK_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "give yourself permission to it or choose another folder",
    errno.EPERM: "give yourself permission to it or choose another folder",
    errno.ENOTDIR: "a file stands where a folder should be; move it away",
    errno.EEXIST: "a file stands where a folder should be; move it away",
}


def exit_code(run: Callable[[], int], complain: Callable[[str], object]) -> int:
    """Run a phase and turn what a user can cause into one line and an exit code.

    Parameters
    ----------
    run : callable
        The phase; returns its own exit code.
    complain : callable
        Takes the line that says what is wrong.

    Returns
    -------
    int
        What `run` returned; 2 when it could not run; 130 on Ctrl-C. Anything else is
        a bug and keeps its traceback.
    """
    try:
        return run()
    except PipelineError as error:
        complain(f"error: {error}")
    except KeyboardInterrupt:
        complain("interrupted: what was done is kept; the same command goes on with it")
        return EXIT_INTERRUPTED
    except OSError as error:
        remedy = _DISK_REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        complain(f"error: {where}{error.strerror}: {remedy}")
    return EXIT_COULD_NOT_RUN


# --- Files --------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when all is on disk.

    Temporary name in the same folder, flush, fsync, rename: a reader sees the old file
    or the whole new one, never a part. On any exception the temporary file goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as indented UTF-8 JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object; `remedy` says what to do where there is none.

    Raises
    ------
    PipelineError
        The file is missing, unreadable or no JSON object.
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
    """Write rows as UTF-8 CSV with a header line, atomically."""
    with atomic_write(path) as file:
        text = io.TextIOWrapper(
            file, "utf-8", errors="backslashreplace", newline="", write_through=True
        )
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text.detach()


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a CSV file written by `write_csv`."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- DICOM --------------------------------------------------------------------------


def find_files(root: Path) -> Iterator[Path]:
    """Regular files below `root` at any depth, in order of their names.

    Folders and files whose name starts with a dot are passed over, and so is anything
    that is no regular file (a FIFO would hang its reader). Links to files are followed,
    links to folders are not, so that no loop can catch the walk.
    """
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def read_dicom(path: Path) -> pydicom.Dataset:
    """Read a DICOM file with its pixel data.

    Raises
    ------
    RejectedError
        The file is no DICOM file, can't be read or holds no image.
    """
    try:
        dataset = pydicom.dcmread(path, force=True)
    except Exception as error:  # pydicom raises whatever a broken header provokes
        raise RejectedError(f"can't be read as DICOM: {error}") from None
    if "PixelData" not in dataset:
        raise RejectedError("holds no image")
    return dataset


def decode_frame(dataset: pydicom.Dataset) -> NDArray[Any]:
    """Decode the frame that stands for the image: the middle one of a multi-frame.

    Returns
    -------
    ndarray, (rows, columns) or (rows, columns, 3)
        Stored values, dtype as pydicom gives it; colour as RGB.

    Raises
    ------
    RejectedError
        No decoder could read the pixel data.
    """
    try:
        frames = int(dataset.get("NumberOfFrames") or 1)
        return pixel_array(dataset, index=frames // 2)
    except Exception as error:  # each decoder raises errors of its own
        raise RejectedError(f"the pixel data can't be decoded: {error}") from None


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
        Not an image, not decodable, or every pixel has the same value.
    """
    dataset = read_dicom(path)
    pixels = decode_frame(dataset)
    if pixels.min() == pixels.max():
        raise RejectedError(f"has no contrast: every pixel is {pixels.flat[0]}")
    small = _reduce(_display_values(pixels, dataset), _pixel_aspect(dataset))
    view = _pad(_window(small))
    png = io.BytesIO()
    Image.fromarray(view).save(png, "PNG", compress_level=1)
    return PreparedImage(
        image_id=_digest(pixels), view_id=_digest(view), png=png.getvalue()
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


def _digest(array: NDArray[Any]) -> str:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    digest = hashlib.sha256(f"{little.dtype.str}{little.shape}".encode())
    digest.update(little.data)
    return digest.hexdigest()


def _display_values(
    pixels: NDArray[Any], dataset: pydicom.Dataset
) -> NDArray[np.float32]:
    """Grey values that rise with displayed brightness, float32 (rows, columns).

    PS3.3 C.11.1 (modality LUT) and C.7.6.3.1.2 (MONOCHROME1: the lowest value is
    white). A VOI window is left out: the window below is taken from the image, because
    headers carry clinical windows that hide a test object.
    """
    if pixels.ndim == 3:
        return np.asarray(pixels @ np.array([0.299, 0.587, 0.114]), np.float32)
    if dataset.get("ModalityLUTSequence"):
        pixels = apply_modality_lut(pixels, dataset)
    falling = float(dataset.get("RescaleSlope") or 1) < 0
    inverted = dataset.get("PhotometricInterpretation") == "MONOCHROME1"
    values = pixels.astype(np.float32)
    return -values if inverted != falling else values


def _pixel_aspect(dataset: pydicom.Dataset) -> float:
    """Height of a pixel over its width (PS3.3 10.7.1.3, C.7.6.3.1.7); 1 if unknown."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        value = dataset.get(keyword)
        if isinstance(value, Sequence) or hasattr(value, "__len__"):
            sizes = [float(size) for size in value or ()]
            if len(sizes) == 2 and min(sizes) > 0:
                return sizes[0] / sizes[1]
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


def pack_vector(vector: NDArray[np.float32]) -> str:
    """A float32 vector as base64 text, little endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def unpack_vector(text: str) -> NDArray[np.float32]:
    """The float32 vector of `pack_vector`."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
