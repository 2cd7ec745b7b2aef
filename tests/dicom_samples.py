"""Small DICOM files for the tests of phase 1: pydicom's bundled ones, and our own.

The bundled files come with the pydicom wheel; nothing is ever downloaded. Our own are
encoded with imagecodecs (JPEG, JPEG-LS, JPEG 2000, HTJ2K) and pydicom (RLE), which is
why what they decode to is known without a decoder.
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.encoders.base import get_encoder
from pydicom.pixels.utils import pixel_array

Pixels = NDArray[Any]

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
"""Of tests with FIFOs, links, signals or limits of a process."""

BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"

SYNTAXES = {
    "implicit": uid.ImplicitVRLittleEndian,
    "explicit": uid.ExplicitVRLittleEndian,
    "big endian": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
    "RLE": uid.RLELossless,
    "JPEG Lossless": uid.JPEGLossless,
    "JPEG Lossless SV1": uid.JPEGLosslessSV1,
    "JPEG-LS": uid.JPEGLSLossless,
    "JPEG 2000": uid.JPEG2000Lossless,
    "HTJ2K": uid.HTJ2KLossless,
}
"""Lossless ones: what comes out is what went in."""

LOSSY = {
    "JPEG Baseline": uid.JPEGBaseline8Bit,
    "JPEG Extended": uid.JPEGExtended12Bit,
    "JPEG-LS near-lossless": uid.JPEGLSNearLossless,
    "JPEG 2000 lossy": uid.JPEG2000,
    "HTJ2K lossy": uid.HTJ2K,
}


def bundled() -> list[Path]:
    """Every file that pydicom carries, broken ones included, by name."""
    names = sorted(BUNDLED.glob("*.dcm")) + sorted(BUNDLED.glob("dicomdirtests/*/*/*"))
    return [path for path in names if path.is_file()]


def reference_arrays(path: Path) -> dict[str, Pixels]:
    """What pydicom's own decoders make of a file: plugin name -> pixels."""
    found: dict[str, Pixels] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path, force=True)
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        if "PixelData" not in dataset or syntax is None:
            return found
        plugins = (
            get_decoder(syntax).available_plugins if syntax.is_compressed else ("",)
        )
        for plugin in plugins:
            try:
                found[plugin or "pydicom"] = pixel_array(
                    dataset, decoding_plugin=plugin
                )
            except Exception:  # it can't decode this one
                continue
    return found


def exposure(
    rows: int = 32, columns: int = 48, bits: int = 12, seed: int = 0
) -> Pixels:
    """A noisy ramp, uint8 or uint16 (rows, columns), that uses all of its bits."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 2**bits - 1, rows * columns).reshape(rows, columns)
    noisy = np.clip(ramp + rng.normal(0, 2**bits / 50, ramp.shape), 0, 2**bits - 1)
    return noisy.astype(np.uint8 if bits <= 8 else np.uint16)


def encode_frame(pixels: Pixels, syntax: str, bits: int) -> bytes:
    """One frame as the codec of a transfer syntax stores it."""
    unsigned = pixels.view(f"u{pixels.itemsize}") & ((1 << bits) - 1)
    if syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1):
        predictor = 1 if syntax == uid.JPEGLosslessSV1 else 6
        return bytes(
            imagecodecs.jpeg8_encode(
                unsigned, lossless=True, predictor=predictor, bitspersample=bits
            )
        )
    if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        return bytes(imagecodecs.jpeg8_encode(unsigned, level=95, bitspersample=bits))
    if syntax in (uid.JPEGLSLossless, uid.JPEGLSNearLossless):
        near = 0 if syntax == uid.JPEGLSLossless else 2
        return bytes(imagecodecs.jpegls_encode(pixels.view(unsigned.dtype), level=near))
    if syntax in (uid.JPEG2000Lossless, uid.JPEG2000):
        level = 0 if syntax == uid.JPEG2000Lossless else 90
        return bytes(
            imagecodecs.jpeg2k_encode(
                pixels, codecformat="J2K", reversible=not level, level=level, mct=False
            )
        )
    if syntax in (uid.HTJ2KLossless, uid.HTJ2K):
        step = 0.001 if syntax == uid.HTJ2K else None
        return bytes(
            imagecodecs.htj2k_encode(pixels, reversible=step is None, level=step)
        )
    return _rle(pixels)


def _rle(pixels: Pixels) -> bytes:
    samples = 3 if pixels.ndim == 3 else 1
    options: dict[str, Any] = {
        "rows": pixels.shape[0],
        "columns": pixels.shape[1],
        "samples_per_pixel": samples,
        "bits_allocated": 8 * pixels.itemsize,
        "bits_stored": 8 * pixels.itemsize,
        "pixel_representation": int(pixels.dtype.kind == "i"),
        "number_of_frames": 1,
        "photometric_interpretation": "RGB" if samples == 3 else "MONOCHROME2",
        "planar_configuration": 0,
    }
    return bytes(
        get_encoder(uid.RLELossless).encode(pixels.tobytes(), index=0, **options)
    )


def make(
    frames: Pixels | Sequence[Pixels],
    syntax: str = uid.ExplicitVRLittleEndian,
    bits: int = 12,
    **attributes: Any,
) -> Dataset:
    """An image dataset; several frames of one shape make a multi-frame image."""
    several = [frames] if isinstance(frames, np.ndarray) else list(frames)
    first = several[0]
    number = attributes.pop("number", 1)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.UID(syntax)
    meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForProcessing
    meta.MediaStorageSOPInstanceUID = uid.UID(f"2.25.{1000 + number}")
    dataset = Dataset()
    dataset.file_meta, dataset.preamble = meta, b"\0" * 128
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.InstanceNumber = "DX", number
    dataset.AcquisitionDate = "20240105"
    dataset.AcquisitionTime = f"{100000 + number % 60}"
    dataset.Rows, dataset.Columns = first.shape[:2]
    dataset.SamplesPerPixel = 3 if first.ndim == 3 else 1
    colour = first.ndim == 3
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    if len(several) > 1:
        dataset.NumberOfFrames = len(several)
    dataset.BitsAllocated = 8 * first.itemsize
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(first.dtype.kind == "i")
    _store(dataset, several, uid.UID(syntax), bits)
    for keyword, value in attributes.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    return dataset


def _store(dataset: Dataset, frames: list[Pixels], syntax: uid.UID, bits: int) -> None:
    if syntax.is_compressed and syntax != uid.DeflatedExplicitVRLittleEndian:
        encoded = [encode_frame(frame, syntax, bits) for frame in frames]
        dataset.PixelData = encapsulate(encoded)
        dataset["PixelData"].VR = "OB"
        return
    stored = np.stack(frames)
    swap = syntax == uid.ExplicitVRBigEndian
    dataset.PixelData = (stored.byteswap() if swap else stored).tobytes()
    dataset["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"


def write(path: Path, *args: Any, **kwargs: Any) -> Path:
    """`make` a dataset and save it; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make(*args, **kwargs).save_as(path, enforce_file_format=True)
    return path
