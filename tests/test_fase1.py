"""Phase 1: exact, in order, safe in any folder, contained, resumable."""

import csv
import faulthandler
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import bad_workers
import dicom_samples as samples
import fuzz_fase1
import imagecodecs
import numpy as np
import pydicom
import pytest
from dicom_samples import (
    BUNDLED,
    LOSSY,
    SYNTAXES,
    bundled,
    exposure,
    make,
    posix,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import pixel_array
from pydicom.sequence import Sequence as DicomSequence

import config
import fase1_descompresion as fase1
import utils
from fase1_descompresion import Outcome, Task, main, moment_of

SCRIPT = Path(fase1.__file__)
CHANGED = {
    *(0x00280004, 0x00280006, 0x00280100, 0x00280101, 0x00280102),
    *(0x7FE00001, 0x7FE00002, 0x7FE00010, 0x00880200),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An empty base directory with an input folder."""
    (tmp_path / "input_dicom").mkdir()
    return tmp_path


def convert_here(patch: pytest.MonkeyPatch) -> None:
    """Convert files in this process: starting workers takes far longer."""

    def converted(tasks: Iterable[Task], _: int) -> Iterator[tuple[Task, Outcome]]:
        for task in tasks:
            yield task, fase1.convert(task)

    patch.setattr(fase1, "convert_all", converted)
    patch.setattr(fase1, "give_up_after", lambda *_: None)


@pytest.fixture(autouse=True)
def _here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "workers" not in request.fixturenames:
        convert_here(monkeypatch)


@pytest.fixture
def workers() -> None:
    """For the tests that are about workers."""


def run(base: Path, *flags: str) -> int:
    return main(["--base", str(base), "--quiet", "--jobs", "2", *flags])


def manifest(base: Path) -> list[dict[str, str]]:
    with (base / "f1_descomprimidos" / config.FILE_LIST).open(
        newline="", encoding="utf-8-sig"
    ) as file:
        return list(csv.DictReader(file))


def rejected(base: Path) -> dict[str, str]:
    with (base / "f1_descomprimidos" / config.REJECTED_LIST).open(
        newline="", encoding="utf-8-sig"
    ) as file:
        return {row["source"]: row["reason"] for row in csv.DictReader(file)}


def outputs(base: Path) -> list[Path]:
    return sorted((base / "f1_descomprimidos").glob("*.dcm"))


def read(path: Path) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pydicom.dcmread(path, force=True)


def pixels_of(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pixel_array(read(path))


def convert(source: Path, folder: Path) -> fase1.Outcome:
    """Convert one file in this process."""
    task = fase1.Task(source, folder / "out.dcm", 64)
    return fase1.convert(task)


# --- Exact --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYNTAXES)
@pytest.mark.parametrize("frames", [1, 3])
def test_every_lossless_syntax_comes_out_as_it_went_in(
    tmp_path: Path, name: str, frames: int
) -> None:
    pixels = [exposure(seed=seed) for seed in range(frames)]
    source = write(tmp_path / "x", pixels, SYNTAXES[name])
    assert not convert(source, tmp_path).reason
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), np.squeeze(pixels))


@pytest.mark.parametrize("path", bundled(), ids=lambda path: path.stem)
def test_a_bundled_sample_keeps_its_pixels(tmp_path: Path, path: Path) -> None:
    references = samples.reference_arrays(path)
    outcome = convert(path, tmp_path)
    if not references:
        pytest.skip(f"no reference decodes it; phase 1 says: {outcome.reason or 'yes'}")
    got = pixels_of(tmp_path / "out.dcm").astype(float)
    errors = [np.abs(got - one).max() for one in references.values()]
    only_reference_is_pylibjpeg = list(references) == ["pylibjpeg"]
    assert min(errors) <= (1 if only_reference_is_pylibjpeg else 0)


def flat(dataset: Dataset) -> dict[str, tuple[str, Any]]:
    """Every element but those that decompression changes, with its place."""
    found: dict[str, tuple[str, Any]] = {}
    for element in dataset.iterall():
        if element.tag in CHANGED or not element.tag.element:
            continue
        value = len(element.value) if element.VR == "SQ" else element.value
        found[f"{len(found)} {element.tag}"] = (element.VR, value)
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in bundled() if samples.reference_arrays(path)],
    ids=lambda path: path.stem,
)
def test_a_bundled_sample_keeps_its_header(tmp_path: Path, path: Path) -> None:
    assert not convert(path, tmp_path).reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert flat(read(tmp_path / "out.dcm")) == flat(read(path))


@pytest.mark.skipif(not shutil.which("dcmdjpeg"), reason="DCMTK is not installed")
@pytest.mark.parametrize(
    "name",
    ["JPEG-lossy", "SC_rgb_jpeg_gdcm", "examples_ybr_color", "SC_rgb_jpeg_dcmtk"],
)
def test_jpeg_pixels_equal_those_of_dcmtk(tmp_path: Path, name: str) -> None:
    source = BUNDLED / f"{name}.dcm"
    assert not convert(source, tmp_path).reason
    subprocess.run(
        ["dcmdjpeg", source, tmp_path / "peer.dcm"], check=True, capture_output=True
    )
    assert read(tmp_path / "out.dcm").PixelData == read(tmp_path / "peer.dcm").PixelData


PEERS = {
    "RLE": ("dcmdrle", "gdcmconv"),
    "JPEG Lossless": ("dcmdjpeg", "gdcmconv"),
    "JPEG Lossless SV1": ("dcmdjpeg", "gdcmconv"),
    "JPEG-LS": ("dcmdjpls", "gdcmconv"),
    "JPEG 2000": ("gdcmconv",),
    "JPEG Baseline": ("dcmdjpeg", "gdcmconv"),
    "JPEG Extended": ("dcmdjpeg", "gdcmconv"),
    "JPEG-LS near-lossless": ("dcmdjpls", "gdcmconv"),
    "JPEG 2000 lossy": ("gdcmconv",),
}
"""Converters of DCMTK and GDCM that can read each syntax; none reads HTJ2K."""


@pytest.mark.parametrize(
    ("name", "peer"), [(name, peer) for name, peers in PEERS.items() for peer in peers]
)
@pytest.mark.parametrize("frames", [1, 3])
def test_pixels_equal_those_of_other_programs(
    tmp_path: Path, name: str, peer: str, frames: int
) -> None:
    if not shutil.which(peer):
        pytest.skip(f"{peer} is not installed")
    bits = 8 if name == "JPEG Baseline" else 12
    pixels = [exposure(bits=bits, seed=seed) for seed in range(frames)]
    source = write(tmp_path / "x", pixels, (SYNTAXES | LOSSY)[name], bits)
    assert not convert(source, tmp_path).reason
    command = [peer, str(source), str(tmp_path / "peer.dcm")]
    command[1:1] = ["--raw"] if peer == "gdcmconv" else []
    subprocess.run(command, check=True, capture_output=True)
    assert read(tmp_path / "out.dcm").PixelData == read(tmp_path / "peer.dcm").PixelData


@pytest.mark.parametrize("name", [*SYNTAXES, *LOSSY])
def test_the_output_says_explicit_little_endian_and_keeps_its_uid(
    tmp_path: Path, name: str
) -> None:
    bits = 8 if name == "JPEG Baseline" else 12
    syntax = (SYNTAXES | LOSSY)[name]
    source = write(tmp_path / "x", exposure(bits=bits), syntax, bits)
    convert(source, tmp_path)
    output = pydicom.dcmread(tmp_path / "out.dcm")
    assert output.file_meta.TransferSyntaxUID == uid.ExplicitVRLittleEndian
    assert output.SOPInstanceUID == read(source).SOPInstanceUID
    assert output.file_meta.MediaStorageSOPInstanceUID == output.SOPInstanceUID


def test_the_lossy_history_is_kept(tmp_path: Path) -> None:
    source = write(
        tmp_path / "x",
        exposure(bits=8),
        uid.JPEGBaseline8Bit,
        8,
        LossyImageCompression="01",
        LossyImageCompressionRatio="12.5",
    )
    convert(source, tmp_path)
    output = read(tmp_path / "out.dcm")
    assert (output.LossyImageCompression, output.LossyImageCompressionRatio) == (
        "01",
        12.5,
    )


@pytest.mark.parametrize("name", ["implicit", "explicit", "big endian", "JPEG-LS"])
def test_private_elements_and_sequences_are_kept(tmp_path: Path, name: str) -> None:
    dataset = make(exposure(), SYNTAXES[name])
    block = dataset.private_block(0x0011, "Example 1", create=True)
    block.add_new(0x01, "OB", b"\1\2\3\4")
    block.add_new(0x02, "LO", "text")
    dataset.add_new(0x60020010, "US", 64)
    inner = Dataset()
    inner.CodeValue, inner.CodeMeaning = "1", "nested"
    outer = Dataset()
    outer.ViewCodeSequence = DicomSequence([inner])
    dataset.AnatomicRegionSequence = DicomSequence([outer, inner])
    dataset.save_as(tmp_path / "x", enforce_file_format=True)
    convert(tmp_path / "x", tmp_path)
    output = read(tmp_path / "out.dcm")
    assert bytes(output[0x00111001].value) == b"\1\2\3\4"
    assert (output[0x60020010].VR, output[0x60020010].value) == ("US", 64)
    nested = output.AnatomicRegionSequence[0].ViewCodeSequence[0]
    assert (nested.CodeMeaning, len(output.AnatomicRegionSequence)) == ("nested", 2)


def splice(path: Path, element: bytes) -> None:
    """Put raw bytes before the first element of group 0028."""
    data = path.read_bytes()
    at = data.index(b"\x28\0\x02\0US")
    path.write_bytes(data[:at] + element + data[at:])


def test_bytes_that_are_no_text_are_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "x", exposure(), uid.JPEGLSLossless)
    element = struct.pack("<HH2sH", 0x0019, 0x0010, b"LO", 4) + b"\xff\xfe\x80\x01"
    splice(source, element)
    convert(source, tmp_path)
    assert element in (tmp_path / "out.dcm").read_bytes()


@pytest.mark.parametrize(
    ("vr", "form"),
    [
        *((b"ZZ", "<HH2sHL"), (b"ZZ", "<HH2sH")),
        *((b"--", "<HH2sH"), (b"  ", "<HH2sH")),
    ],
)
def test_the_value_of_an_unknown_vr_is_kept_with_a_note(
    tmp_path: Path, vr: bytes, form: str
) -> None:
    source = write(tmp_path / "x", exposure(), uid.RLELossless)
    lengths = (0, 4) if form.endswith("HL") else (4,)
    splice(source, struct.pack(form, 0x0019, 0x1001, vr, *lengths) + b"\1\2\3\4")
    outcome = convert(source, tmp_path)
    kept = struct.pack("<HH2sHL", 0x0019, 0x1001, b"UN", 0, 4) + b"\1\2\3\4"
    assert kept in (tmp_path / "out.dcm").read_bytes()
    assert f"the unknown VR {vr.decode()!r} became UN" in outcome.record["notes"]
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), exposure())


def test_an_unknown_sequence_of_undefined_length_is_kept(tmp_path: Path) -> None:
    item = struct.pack("<HHL", 0x0008, 0x0060, 2) + b"DX"
    element = (
        struct.pack("<HH2sHL", 0x0019, 0x1001, b"UN", 0, 0xFFFFFFFF)
        + struct.pack("<HHL", 0xFFFE, 0xE000, len(item))
        + item
        + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    )
    source = write(tmp_path / "x", exposure(), uid.RLELossless)
    splice(source, element)
    assert not convert(source, tmp_path).reason
    (kept,) = read(tmp_path / "out.dcm")[0x00191001].value
    assert kept.Modality == "DX"


def test_group_lengths_that_would_be_wrong_are_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "x", exposure(), uid.RLELossless)
    splice(source, struct.pack("<HH2sHL", 0x0028, 0, b"UL", 4, 999))
    convert(source, tmp_path)
    assert 0x00280000 not in read(tmp_path / "out.dcm")


def test_elements_after_the_pixels_are_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "x", exposure(), uid.RLELossless)
    with source.open("ab") as file:
        file.write(struct.pack("<HH2sHL", 0xFFFC, 0xFFFC, b"OB", 0, 4) + b"\0" * 4)
    convert(source, tmp_path)
    assert 0xFFFCFFFC in read(tmp_path / "out.dcm")


def with_icon(icon_stream: bytes) -> Dataset:
    """A compressed image with a compressed icon."""
    dataset = make(exposure(), uid.JPEGLSLossless)
    icon = Dataset()
    icon.Rows = icon.Columns = 8
    icon.SamplesPerPixel, icon.PixelRepresentation = 1, 0
    icon.BitsAllocated = icon.BitsStored = 8
    icon.HighBit, icon.PhotometricInterpretation = 7, "MONOCHROME2"
    icon.PixelData = pydicom.encaps.encapsulate([icon_stream])
    icon["PixelData"].VR, icon["PixelData"].is_undefined_length = "OB", True
    dataset.IconImageSequence = DicomSequence([icon])
    return dataset


def test_a_compressed_icon_is_left_out_with_a_note(tmp_path: Path) -> None:
    stream = samples.encode_frame(exposure(8, 8, 8), uid.JPEGLSLossless, 8)
    outcome = convert(saved(with_icon(stream), tmp_path), tmp_path)
    assert outcome.record["notes"] == "a compressed icon was left out"
    icon = read(tmp_path / "out.dcm").IconImageSequence[0]
    assert (icon.Rows, "PixelData" in icon) == (8, False)


def test_bits_stored_grows_where_more_are_used(tmp_path: Path) -> None:
    pixels = exposure(bits=14)
    source = write(tmp_path / "x", pixels, uid.JPEG2000Lossless, 14, BitsStored=12)
    convert(source, tmp_path)
    assert read(tmp_path / "out.dcm").BitsStored == 14
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), pixels)


def test_bits_stored_stays_where_the_codestream_only_could_hold_more(
    tmp_path: Path,
) -> None:
    source = write(tmp_path / "x", exposure(bits=12), uid.JPEGLSLossless, 12)
    convert(source, tmp_path)
    assert read(tmp_path / "out.dcm").BitsStored == 12


def test_native_pixels_that_look_like_an_item_are_pixels(tmp_path: Path) -> None:
    pixels = exposure(bits=16)
    pixels[0, :2] = 0xFFFE, 0xE000
    source = write(tmp_path / "x", pixels, bits=16)
    assert not convert(source, tmp_path).reason
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), pixels)


def test_fragments_of_a_defined_length_are_decoded(tmp_path: Path) -> None:
    dataset = make(exposure(), uid.JPEGLSLossless)
    dataset["PixelData"].is_undefined_length = False
    source = tmp_path / "x"
    dataset.save_as(source, enforce_file_format=True)
    data = source.read_bytes()
    at = data.index(fase1.PIXELS + b"OB")
    value = data[at + 12 : data.rindex(b"\xfe\xff\xdd\xe0")]
    source.write_bytes(data[: at + 8] + struct.pack("<L", len(value)) + value)
    assert not convert(source, tmp_path).reason
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), exposure())


def with_unknown_syntax(source: Path, syntax: str) -> Path:
    known, unknown = syntax.encode(), syntax.replace("10008", "99999").encode()
    source.write_bytes(source.read_bytes().replace(known, unknown, 1))
    return source


def test_native_pixels_in_an_unknown_syntax_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "x", exposure())
    with_unknown_syntax(source, uid.ExplicitVRLittleEndian)
    assert "unknown transfer syntax" in convert(source, tmp_path).reason


def test_a_codestream_in_an_unknown_syntax_is_decoded(tmp_path: Path) -> None:
    source = write(tmp_path / "x", exposure(), uid.JPEGLSLossless)
    assert not convert(with_unknown_syntax(source, uid.JPEGLSLossless), tmp_path).reason
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), exposure())


def test_an_eight_bit_big_endian_word_image_is_swapped(tmp_path: Path) -> None:
    pixels = exposure(bits=8)
    dataset = make(pixels, uid.ExplicitVRBigEndian, 8)
    dataset.PixelData = pixels.view(np.uint16).byteswap().tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.save_as(tmp_path / "x", enforce_file_format=True)
    convert(tmp_path / "x", tmp_path)
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), pixels)


@pytest.mark.parametrize("name", ["implicit", "explicit", "big endian"])
def test_a_missing_file_meta_group_is_made_and_noted(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "x", exposure(), SYNTAXES[name])
    data = source.read_bytes()
    (length,) = struct.unpack_from("<L", data, 140)
    source.write_bytes(data[144 + length :])
    outcome = convert(source, tmp_path)
    assert "no file meta group" in outcome.record["notes"]
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), exposure())


@pytest.mark.parametrize("name", ["JPEG Lossless SV1", "JPEG-LS", "JPEG 2000"])
def test_no_decoder_guesses_at_what_imagecodecs_refuses(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("not for me")

    monkeypatch.setattr(utils, "decode_stream", refuse)
    source = write(tmp_path / "x", exposure(), SYNTAXES[name])
    assert convert(source, tmp_path).reason == (
        "can't be decoded: ValueError: not for me"
    )
    assert not (tmp_path / "out.dcm").exists()


def saved(dataset: Dataset, folder: Path) -> Path:
    dataset.save_as(folder / "x", enforce_file_format=True)
    return folder / "x"


@pytest.mark.parametrize("name", ["JPEG-LS", "JPEG Lossless SV1", "RLE"])
def test_signed_pixels_in_cells_with_unused_bits_stay_signed(
    tmp_path: Path, name: str
) -> None:
    pixels = (exposure(bits=12).astype(int) - 2048).astype(np.int16)
    cells = (pixels & 0x0FFF).view(np.uint16)
    source = write(tmp_path / "x", cells, SYNTAXES[name], 16, BitsStored=12, HighBit=11)
    dataset = read(source)
    dataset.PixelRepresentation = 1
    assert not convert(saved(dataset, tmp_path), tmp_path).reason
    assert read(tmp_path / "out.dcm").BitsStored == 12
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), pixels)


@pytest.mark.parametrize("offset", ["without the item headers", "into nothing", "torn"])
def test_a_wrong_offset_table_costs_nothing(tmp_path: Path, offset: str) -> None:
    frames = [exposure(seed=seed) for seed in range(2)]
    streams = [samples.encode_frame(one, uid.JPEGLSLossless, 12) for one in frames]
    streams = [one + bytes(len(one) % 2) for one in streams]
    parts = [part for one in streams for part in (one[:200], one[200:])]
    second = sum(map(len, parts[:2])) + 16
    wrong = {"without the item headers": second - 16, "into nothing": 10**6, "torn": 0}
    table = struct.pack("<LL", 0, wrong[offset])[: 6 if offset == "torn" else 8]
    dataset = make(frames, uid.JPEGLSLossless)
    items = [struct.pack("<HHL", 0xFFFE, 0xE000, len(one)) + one for one in parts]
    dataset.PixelData = (
        struct.pack("<HHL", 0xFFFE, 0xE000, len(table)) + table + b"".join(items)
    )
    assert not convert(saved(dataset, tmp_path), tmp_path).reason
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), frames)


@pytest.mark.parametrize("photometric", ["YBR_FULL", "YBR_FULL_422"])
def test_a_jpeg_whose_components_are_called_rgb_is_rgb(
    tmp_path: Path, photometric: str
) -> None:
    colours = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    dataset = make(colours, uid.JPEGBaseline8Bit, 8)
    stream = imagecodecs.jpeg8_encode(
        colours, level=95, colorspace="RGB", outcolorspace="RGB"
    )
    dataset.PixelData = encapsulate([bytes(stream)])
    dataset.PhotometricInterpretation = photometric
    assert not convert(saved(dataset, tmp_path), tmp_path).reason
    output = read(tmp_path / "out.dcm")
    assert output.PhotometricInterpretation == "RGB"
    assert np.abs(output.pixel_array.astype(int) - colours).max() <= 2


@pytest.mark.parametrize("name", ["JPEG-LS", "JPEG Lossless SV1", "JPEG 2000"])
def test_a_stream_with_all_samples_is_not_taken_for_4_2_2(
    tmp_path: Path, name: str
) -> None:
    pixels = np.stack([exposure(bits=8, seed=seed) for seed in range(3)], axis=-1)
    dataset = make(pixels, SYNTAXES[name], 8, PhotometricInterpretation="YBR_FULL_422")
    assert not convert(saved(dataset, tmp_path), tmp_path).reason
    output = read(tmp_path / "out.dcm")
    assert output.PhotometricInterpretation == "YBR_FULL"
    assert output.PixelData == pixels.tobytes()


def test_native_4_2_2_has_two_samples_a_pixel(tmp_path: Path) -> None:
    pixels = np.zeros((8, 10, 3), np.uint8)
    dataset = make(pixels, bits=8, PhotometricInterpretation="YBR_PARTIAL_422")
    dataset.PixelData = bytes(range(160))
    assert not convert(saved(dataset, tmp_path), tmp_path).reason
    assert read(tmp_path / "out.dcm").PixelData == bytes(range(160))


@pytest.mark.parametrize(("kind", "vr"), [(np.uint16, "US"), (np.int16, "SS")])
def test_us_or_ss_with_several_values_follows_the_sign_of_the_pixels(
    tmp_path: Path, kind: type[np.integer[Any]], vr: str
) -> None:
    dataset = make(exposure().astype(kind), uid.ImplicitVRLittleEndian)
    dataset.add_new(0x00281101, vr, [256, 0, 16])
    convert(saved(dataset, tmp_path), tmp_path)
    found = read(tmp_path / "out.dcm")[0x00281101]
    assert str(found.VR) == vr


def test_a_mask_of_one_bit_in_jpeg_2000_is_decoded(tmp_path: Path) -> None:
    mask = (exposure(bits=8) > 128).astype(np.uint8)
    dataset = make(mask, uid.JPEG2000Lossless, 1, BitsAllocated=1)
    stream = imagecodecs.jpeg2k_encode(
        mask, codecformat="J2K", reversible=True, level=0, bitspersample=1
    )
    dataset.PixelData = encapsulate([bytes(stream)])
    assert not convert(saved(dataset, tmp_path), tmp_path).reason
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), mask)


@pytest.mark.parametrize("name", ["JPEG Lossless SV1", "JPEG-LS", "JPEG 2000"])
def test_padding_after_the_codestream_is_harmless(tmp_path: Path, name: str) -> None:
    dataset = make(exposure(), SYNTAXES[name])
    stream = samples.encode_frame(exposure(), SYNTAXES[name], 12)
    dataset.PixelData = encapsulate([stream + bytes(4000)])
    assert not convert(saved(dataset, tmp_path), tmp_path).reason
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), exposure())


@pytest.mark.parametrize("name", ["JPEG Lossless SV1", "JPEG Baseline"])
def test_a_codestream_too_short_for_its_image_is_refused(
    tmp_path: Path, name: str
) -> None:
    syntax = (SYNTAXES | LOSSY)[name]
    stream = bytearray(samples.encode_frame(exposure(bits=8), syntax, 8))
    at = stream.index(b"\xff\xc3" if name == "JPEG Lossless SV1" else b"\xff\xc0")
    stream[at + 5 : at + 9] = struct.pack(">HH", 8000, 8000)
    dataset = make(exposure(bits=8), syntax, 8, Rows=8000, Columns=8000)
    dataset.PixelData = encapsulate([bytes(stream)])
    assert "so short a codestream" in convert(saved(dataset, tmp_path), tmp_path).reason


def test_image_attributes_of_an_unknown_vr_are_understood(tmp_path: Path) -> None:
    source = write(tmp_path / "x", exposure(), uid.JPEGLSLossless)
    rows = struct.pack("<HH2sHH", 0x0028, 0x0010, b"US", 2, 32)
    unknown = struct.pack("<HH2sHLH", 0x0028, 0x0010, b"UN", 0, 2, 32)
    source.write_bytes(source.read_bytes().replace(rows, unknown))
    assert not convert(source, tmp_path).reason
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), exposure())


def test_no_number_of_frames_means_one(tmp_path: Path) -> None:
    source = write(tmp_path / "x", exposure(), NumberOfFrames=0)
    assert not convert(source, tmp_path).reason


def test_a_deflated_file_that_looks_like_another_is_inflated(tmp_path: Path) -> None:
    vrs = {vr.encode() for vr in utils.KNOWN_VRS}
    deflated = write(tmp_path / "x", exposure(8, 8), SYNTAXES["deflated"]).read_bytes()
    (length,) = struct.unpack_from("<L", deflated, 140)
    head, plain = (
        deflated[: 144 + length],
        zlib.decompress(deflated[144 + length :], -15),
    )
    rng = np.random.default_rng(0)
    data = b""
    while data[4:6] not in vrs:
        pixels = rng.integers(0, 4096, (8, 8), np.uint16)
        compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
        data = compressor.compress(plain[:-128] + pixels.tobytes()) + compressor.flush()
    data = head + data
    (tmp_path / "x").write_bytes(data)
    assert not convert(tmp_path / "x", tmp_path).reason
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), pixels)


def test_another_uid_in_the_file_meta_group_is_put_right_and_noted(
    tmp_path: Path,
) -> None:
    source = write(tmp_path / "x", exposure())
    data = bytearray(source.read_bytes())
    data[data.index(b"UI", data.index(b"\2\0\3\0")) + 4] = ord("9")
    source.write_bytes(data)
    outcome = convert(source, tmp_path)
    assert outcome.record["notes"] == "its file meta group had another SOPInstanceUID"
    output = pydicom.dcmread(tmp_path / "out.dcm")
    assert np.array_equal(output.pixel_array, exposure())
    assert output.file_meta.MediaStorageSOPInstanceUID == output.SOPInstanceUID


def with_sequence(folder: Path, value: bytes, syntax: str = "implicit") -> Path:
    """An image whose ReferencedImageSequence has known length and these bytes."""
    dataset = make(exposure(), SYNTAXES[syntax])
    dataset.ReferencedImageSequence = DicomSequence([])
    path = saved(dataset, folder)
    tag = b"\x08\0\x40\x11" + (b"" if syntax == "implicit" else b"SQ\0\0")
    length = struct.pack("<L", len(value))
    data = path.read_bytes()
    path.write_bytes(data.replace(tag + b"\0" * 4, tag + length + value))
    return path


def item(*elements: bytes, spare: int = 0) -> bytes:
    value = b"".join(elements)
    return b"\xfe\xff\0\xe0" + struct.pack("<L", len(value) + spare) + value


CLASS_UID = b"\x08\0\x50\x11\6\0\0\0" + b"1.2.3\0"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"not a sequence at all!", "(0008,1140) holds what is no item"),
        (item(CLASS_UID) + b"junk", "(0008,1140) holds what is no item"),
        (item(CLASS_UID, spare=5000), "(0008,1140) holds what is no item"),
        (
            item(CLASS_UID.replace(b"\6\0\0\0", b"\xc8\0\0\0")),
            "in a sequence (0008,1150) says 200 bytes, 6 are there",
        ),
    ],
)
def test_a_damaged_sequence_is_not_written_as_something_else(
    tmp_path: Path, value: bytes, reason: str
) -> None:
    outcome = convert(with_sequence(tmp_path, value), tmp_path)
    assert reason in outcome.reason
    assert not outcome.may_pass
    assert outcome.record["modality"] == "DX"


@pytest.mark.parametrize("value", [b"", item(CLASS_UID), item() + item(CLASS_UID)])
def test_a_whole_sequence_of_known_length_is_kept(tmp_path: Path, value: bytes) -> None:
    outcome = convert(with_sequence(tmp_path, value), tmp_path)
    assert (outcome.reason, outcome.record["notes"]) == ("", "")
    items = read(tmp_path / "out.dcm").ReferencedImageSequence
    assert len(items) == value.count(b"\xfe\xff\0\xe0")
    uids = [str(one.get("ReferencedSOPClassUID", "")) for one in items]
    assert uids == ["", "1.2.3"][-len(items) :] or not items


def test_an_odd_length_is_padded_and_noted(tmp_path: Path) -> None:
    source = write(tmp_path / "x", exposure(), PatientComments="even")
    data = source.read_bytes()
    source.write_bytes(data.replace(b"LT\4\0even", b"LT\3\0odd"))
    outcome = convert(source, tmp_path)
    assert outcome.record["notes"] == "(0010,4000) had an odd length"
    assert b"LT\4\0odd " in (tmp_path / "out.dcm").read_bytes()


def without_preamble(data: bytes) -> bytes:
    return data[132:]


def with_another_length(data: bytes) -> bytes:
    return data[:140] + struct.pack("<L", 7) + data[144:]


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (without_preamble, "had no preamble"),
        (with_another_length, "its file meta group had another length than it said"),
    ],
)
def test_a_file_meta_group_of_an_odd_form_is_read(
    tmp_path: Path, damage: Callable[[bytes], bytes], note: str
) -> None:
    source = write(tmp_path / "x", exposure())
    source.write_bytes(damage(source.read_bytes()))
    assert convert(source, tmp_path).record["notes"] == note
    output = pydicom.dcmread(tmp_path / "out.dcm")
    assert np.array_equal(output.pixel_array, exposure())


def test_a_whole_file_has_no_notes(tmp_path: Path) -> None:
    for name in SYNTAXES:
        source = write(tmp_path / "x", exposure(), SYNTAXES[name])
        assert convert(source, tmp_path).record["notes"] == ""


def test_what_had_to_be_mended_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "x", exposure(), BitsStored=0)
    assert not convert(source, tmp_path).reason

    def write_wrongly(file: Any, header: Dataset) -> None:
        header.Rows = 1
        pydicom.dcmwrite(file, header)

    monkeypatch.setattr(fase1, "dcmwrite", write_wrongly)
    assert "what is written of it can't be read" in convert(source, tmp_path).reason


def test_how_a_big_endian_word_was_read_is_noted_where_programs_differ(
    tmp_path: Path,
) -> None:
    pixels = exposure().astype(np.uint32)
    source = write(tmp_path / "x", pixels, uid.ExplicitVRBigEndian, 32)
    outcome = convert(source, tmp_path)
    assert "swapped in words of 32 bits" in outcome.record["notes"]
    assert np.array_equal(pixels_of(tmp_path / "out.dcm"), pixels)


def test_a_multi_frame_image_is_written_whole(base: Path) -> None:
    frames = [exposure(seed=seed) for seed in range(4)]
    write(base / "input_dicom" / "x", frames, uid.JPEG2000Lossless)
    assert run(base) == 0
    assert manifest(base)[0]["frames"] == "4"
    assert np.array_equal(pixels_of(outputs(base)[0]), frames)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(SYNTAXES)),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    frames=st.integers(1, 3),
)
def test_any_small_image_survives(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    rows: int,
    columns: int,
    frames: int,
) -> None:
    folder = tmp_path_factory.mktemp("x")
    pixels = [exposure(rows, columns, seed=seed) for seed in range(frames)]
    source = write(folder / "x", pixels, SYNTAXES[name])
    assert not convert(source, folder).reason
    found = np.frombuffer(read(folder / "out.dcm").PixelData, np.uint16)
    assert np.array_equal(found, np.ravel(pixels))


# --- In order -----------------------------------------------------------------------


def moment(**attributes: str) -> str:
    return moment_of(attributes.get)[0]


def source(**attributes: str) -> str:
    return moment_of(attributes.get)[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10", "100000.000000"),
        ("1030", "103000.000000"),
        ("103015", "103015.000000"),
        ("103015.5", "103015.500000"),
        ("103015.123456", "103015.123456"),
        ("10:30:15", "103015.000000"),
        ("10:30:15.25", "103015.250000"),
        ("235960", "20240106T000000.000000"),
        (" 103015 ", "103015.000000"),
    ],
)
def test_every_form_of_a_time_is_understood(text: str, expected: str) -> None:
    found = moment(AcquisitionDate="20240105", AcquisitionTime=text)
    assert found == (expected if "T" in expected else f"20240105T{expected}")


@pytest.mark.parametrize("text", ["", "25", "1060", "10306", "noon", "99:99", "-1"])
def test_a_date_with_a_broken_time_sorts_by_its_date(text: str) -> None:
    assert moment_of({"AcquisitionDate": "20240105", "AcquisitionTime": text}.get) == (
        "20240105T000000.000000",
        "AcquisitionDate/Time, no valid time",
    )


def test_a_broken_time_is_lent_by_an_attribute_of_the_same_day() -> None:
    attributes = {
        "AcquisitionDate": "20240105",
        "AcquisitionTime": "?",
        "ContentDate": "20240105",
        "ContentTime": "11",
    }
    assert moment(**attributes) == "20240105T110000.000000"
    assert "ContentDate" in source(**attributes)


@pytest.mark.parametrize("text", ["20040119", "2004.01.19"])
def test_both_forms_of_a_date_are_understood(text: str) -> None:
    assert moment(StudyDate=text, StudyTime="1")[:8] == "20040119"


@pytest.mark.parametrize(
    "text", ["", "00000000", "00010101", "20241301", "20240230", "garbage"]
)
def test_an_impossible_date_is_none(text: str) -> None:
    assert moment(AcquisitionDate=text) == fase1.NO_DATE


@pytest.mark.parametrize("clock", ["", "000000.000000"])
def test_no_date_has_no_midnight(clock: str) -> None:
    none = {"AcquisitionDateTime": f"00010101{clock}"}
    study = {"StudyDate": "20240305", "StudyTime": "093000"}
    assert moment(**none, **study) == "20240305T093000.000000"
    made = {"InstanceCreationDate": "20240305", "InstanceCreationTime": "101500"}
    assert moment(**none, **study, **made) == "20240305T101500.000000"
    undated = {"AcquisitionDate": "00010101", "AcquisitionTime": "094000"}
    assert moment(**undated, **study) == "20240305T094000.000000"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024", "20240101T000000.000000"),
        ("202403", "20240301T000000.000000"),
        ("20240305", "20240305T000000.000000"),
        ("2024030510", "20240305T100000.000000"),
        ("202403051030", "20240305T103000.000000"),
        ("20240305103015", "20240305T103015.000000"),
        ("20240305103015.25", "20240305T103015.250000"),
        ("20240305103015+0200", "20240305T083015.000000"),
        ("20240305003015+0200", "20240304T223015.000000"),
        ("20240305103015-0530", "20240305T160015.000000"),
        ("20240305996060", "20240305T000000.000000"),
        ("20240305 garbage", "20240305T000000.000000"),
    ],
)
def test_every_form_of_a_datetime_is_understood(text: str, expected: str) -> None:
    assert moment(AcquisitionDateTime=text) == expected


def test_an_offset_of_the_dataset_applies_to_dates_and_times() -> None:
    attributes = {
        "AcquisitionDate": "20240105",
        "AcquisitionTime": "10",
        "TimezoneOffsetFromUTC": "+0100",
    }
    assert moment(**attributes) == "20240105T090000.000000"
    assert source(**attributes) == "AcquisitionDate/Time, in UTC"


@pytest.mark.parametrize("offset", ["+9999", "+1401", "-1201", "0100"])
def test_an_impossible_offset_moves_nothing(offset: str) -> None:
    found = moment(
        AcquisitionDate="20240105",
        AcquisitionTime="10",
        TimezoneOffsetFromUTC=offset,
    )
    assert found == "20240105T100000.000000"


def test_a_moment_beyond_the_calendar_sorts_by_its_date() -> None:
    assert moment(AcquisitionDateTime="99991231235960") == "99991231T000000.000000"


def test_the_first_source_with_a_date_wins() -> None:
    names = ("Acquisition", "Content", "Series", "Study", "InstanceCreation")
    attributes = {f"{name}Date": f"2024010{at}" for at, name in enumerate(names, 1)}
    attributes |= {f"{name}Time": "10" for name in names}
    for at, name in enumerate(names, 1):
        assert moment(**attributes)[:8] == f"2024010{at}"
        del attributes[f"{name}Date"]


def test_a_whole_date_comes_before_a_month() -> None:
    coarse = {"AcquisitionDateTime": "202401"}
    assert moment(**coarse)[:8] == "20240101"
    assert moment(**coarse, AcquisitionDate="20240117")[:8] == "20240117"


def test_a_datetime_comes_before_date_and_time() -> None:
    found = moment(
        AcquisitionDateTime="20240101", AcquisitionDate="20240102", AcquisitionTime="10"
    )
    assert found[:8] == "20240101"


@settings(max_examples=200)
@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_no_text_breaks_the_order(date: str, clock: str, whole: str) -> None:
    found = moment(
        AcquisitionDate=date,
        AcquisitionTime=clock,
        AcquisitionDateTime=whole,
        TimezoneOffsetFromUTC=clock,
    )
    assert found == fase1.NO_DATE or len(found) == 22


@settings(max_examples=100)
@given(st.datetimes(min_value=datetime(1, 1, 2)))
def test_any_moment_is_read_back(when: Any) -> None:
    text = f"{when.year:04d}{when:%m%d%H%M%S.%f}"
    expected = f"{text[:8]}T{text[8:]}"
    assert moment(AcquisitionDateTime=text) == expected


def test_a_day_takes_its_time_from_the_acquisition_time() -> None:
    attributes = {"AcquisitionDateTime": "20240105", "AcquisitionTime": "1030"}
    assert moment(**attributes) == "20240105T103000.000000"
    assert "AcquisitionDateTime + time of Acquisition" in source(**attributes)


@pytest.mark.parametrize("name", ["Acquisition", "Content", "InstanceCreation"])
def test_an_undated_time_is_worth_more_than_when_the_study_began(name: str) -> None:
    attributes = {"StudyDate": "20240105", "StudyTime": "0930", f"{name}Time": "1030"}
    assert moment(**attributes) == "20240105T103000.000000"
    assert f"StudyDate/Time + time of {name}" in source(**attributes)


def test_a_time_of_another_day_is_worth_nothing() -> None:
    attributes = {"StudyDate": "20240105", "StudyTime": "0930"}
    attributes |= {"InstanceCreationDate": "20240106", "InstanceCreationTime": "1030"}
    assert moment(**attributes) == "20240105T093000.000000"


def test_a_dated_exposure_keeps_its_own_time() -> None:
    attributes = {"ContentDate": "20240105", "ContentTime": "1030"}
    assert moment(**attributes, AcquisitionTime="11") == "20240105T103000.000000"


def test_names_sort_as_the_exposures_were_made(base: Path) -> None:
    order = random.Random(1).sample(range(8), 8)
    for at, number in enumerate(order):
        write(
            base / "input_dicom" / f"{at}.dcm",
            exposure(),
            number=number,
            AcquisitionTime=f"1{number}0000",
        )
    run(base)
    times = [read(path).AcquisitionTime for path in outputs(base)]
    assert times == sorted(times)
    assert [row["output"] for row in manifest(base)] == [
        one.name for one in outputs(base)
    ]


def test_names_sort_as_the_list_where_a_number_is_missing(base: Path) -> None:
    for number in (2, 7, 100001, None):
        write(
            base / "input_dicom" / str(number),
            exposure(),
            AcquisitionTime="120000",
            InstanceNumber=number,
            SOPInstanceUID=f"2.25.{number or 9}",
            DetectorID="000012A",
        )
    run(base)
    names = [row["output"] for row in manifest(base)]
    assert names == sorted(names)
    assert manifest(base)[-1]["source"] == "None"


@pytest.mark.parametrize("tenth", [10, 100000, 12345679])
def test_ties_are_broken_by_instance_number_then_name(base: Path, tenth: int) -> None:
    for number, instance in ((3, tenth - 1), (1, tenth), (2, tenth - 1)):
        write(
            base / "input_dicom" / f"{number}",
            exposure(seed=number),
            number=number,
            AcquisitionTime="101010",
            InstanceNumber=instance,
        )
    run(base)
    rows = manifest(base)
    assert rows[2]["source"] == "1"
    assert [row["output"] for row in rows] == [one.name for one in outputs(base)]


def test_the_name_carries_the_exposure(base: Path) -> None:
    write(
        base / "input_dicom" / "x",
        exposure(),
        DetectorID="DET/1:é",
        KVP="70",
        ExposureInuAs="1700",
        Exposure="1",
        ExposureIndex="412",
    )
    run(base)
    name = outputs(base)[0].name
    assert name.startswith("20240105T100001.000000_00001_DET-1_KVP70_mAs1.7_IE412_")
    assert manifest(base)[0]["mas"] == "1.7"


def test_an_image_without_a_date_sorts_last(base: Path) -> None:
    write(
        base / "input_dicom" / "a",
        exposure(),
        AcquisitionDate=None,
        AcquisitionTime=None,
    )
    write(base / "input_dicom" / "b", exposure(seed=2), number=2)
    run(base)
    assert [row["source"] for row in manifest(base)] == ["b", "a"]
    assert outputs(base)[-1].name.startswith("sin_fecha_")


def test_different_sources_are_warned_of_once_for_the_whole_list(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = {"AcquisitionDate": None, "StudyDate": "20240105", "StudyTime": "10"}
    for number in range(1, 6):
        path = base / "input_dicom" / f"d{number // 3}" / str(number)
        attributes = {} if number % 2 else study
        write(path, exposure(seed=number), number=number, **attributes)
    warned = warnings_of(base, caplog)
    assert warned.count("ordered by different attributes") == 1
    assert "3 AcquisitionDate/Time, 2 StudyDate/Time + time of Acqui" in warned


def warnings_of(base: Path, caplog: pytest.LogCaptureFixture) -> str:
    assert main(["--base", str(base), "--jobs", "1"]) == 0
    return caplog.text


def test_exposures_of_one_second_are_named_in_the_order_of_their_numbers(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, kv in enumerate(("60", "100", "80"), 1):
        write(
            base / "input_dicom" / kv,
            exposure(seed=number),
            number=number,
            KVP=kv,
            AcquisitionTime="101010",
        )
    assert "nothing orders them" not in warnings_of(base, caplog)
    assert [row["source"] for row in manifest(base)] == ["60", "100", "80"]
    assert [row["output"] for row in manifest(base)] == [p.name for p in outputs(base)]


def test_images_that_nothing_orders_are_counted(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2, 3):
        write(
            base / "input_dicom" / str(number),
            exposure(seed=number),
            number=number,
            AcquisitionTime="101010",
            InstanceNumber=None,
        )
    warned = warnings_of(base, caplog)
    assert "3 images share their moment with others: nothing orders them" in warned


def test_local_times_and_utc_are_warned_of_once(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(1, 5):
        offset = {"TimezoneOffsetFromUTC": "+0100"} if number % 2 else {}
        path = base / "input_dicom" / f"d{number // 3}" / str(number)
        write(path, exposure(seed=number), number=number, **offset)
    warned = warnings_of(base, caplog)
    assert warned.count("UTC") == 1
    assert "2 times are in UTC and 2 local" in warned


def test_raw_and_processed_twins_are_warned_of_once_with_counts(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(1, 7):
        intent = "FOR PRESENTATION" if number in (2, 4) else "FOR PROCESSING"
        write(
            base / "input_dicom" / str(number),
            exposure(seed=number),
            number=number,
            AcquisitionTime=f"1010{(number + 1) // 2:02d}",
            PresentationIntentType=intent,
        )
    warned = warnings_of(base, caplog)
    assert warned.count("FOR PRESENTATION") == 1
    assert "2 exposures are there twice: 2 images FOR PROCESSING and 2 FOR" in warned
    found = [row["presentation_intent"] for row in manifest(base)]
    assert found.count("FOR PRESENTATION") == 2


def test_the_list_of_what_was_left_out_says_what_it_is(base: Path) -> None:
    shutil.copyfile(BUNDLED / "rtplan.dcm", base / "input_dicom" / "plan")
    write(
        base / "input_dicom" / "cut",
        exposure(),
        uid.RLELossless,
        SeriesDescription="=field",
    )
    data = (base / "input_dicom" / "cut").read_bytes()
    (base / "input_dicom" / "cut").write_bytes(data.replace(b"\2\0\0\0@", b"\3\0\0\0@"))
    put(base, "text", b"hello")
    for name, syntax in (
        ("short", uid.ExplicitVRLittleEndian),
        ("torn", uid.JPEGLSLossless),
    ):
        path = base / "input_dicom" / name
        write(path, exposure(), syntax, SeriesDescription=name)
        path.write_bytes(path.read_bytes()[:-500])
    assert run(base) == 1
    folder = base / "f1_descomprimidos"
    rows = {one["source"]: one for one in utils.read_csv(folder / config.REJECTED_LIST)}
    assert list(rows["plan"]) == [
        *("source", "reason", "modality", "sop_class", "series_description")
    ]
    assert rows["plan"]["modality"] == "RTPLAN"
    assert rows["cut"]["series_description"] == "=field"
    assert ",'=field" in (folder / config.REJECTED_LIST).read_text("utf-8")
    assert "Digital X-Ray" in rows["cut"]["sop_class"]
    assert rows["text"]["modality"] == ""
    for name in ("short", "torn"):
        assert "is truncated" in rows[name]["reason"]
        assert (rows[name]["modality"], rows[name]["series_description"]) == (
            "DX",
            name,
        )
        assert "Digital X-Ray" in rows[name]["sop_class"]


@pytest.mark.parametrize("name", [config.FILE_LIST, config.REJECTED_LIST])
def test_lists_begin_as_a_spanish_excel_needs_it(base: Path, name: str) -> None:
    collection(base, 1)
    run(base)
    data = (base / "f1_descomprimidos" / name).read_bytes()
    assert data.startswith(b"\xef\xbb\xbf")


def test_more_warnings_than_fit_are_counted(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(fase1.MAX_WARNINGS + 4):
        put(base, f"bad{number}", b"")
    main(["--base", str(base), "--jobs", "1"])
    assert "left out: 4 more" in caplog.text


# --- Safe in any folder -------------------------------------------------------------


def put(base: Path, name: str, content: bytes) -> None:
    path = base / "input_dicom" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        + str(path.stat().st_mtime)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.usefixtures("workers")
def test_each_bad_file_is_listed_with_its_reason_and_the_rest_goes_on(
    base: Path,
) -> None:
    put(base, "empty", b"")
    put(base, "report.pdf", b"%PDF-1.4 text")
    put(base, "text.txt", b"hello\n" * 50)
    put(base, "picture.jpg", b"\xff\xd8\xff\xe0" + b"\0" * 300)
    for name in ("test-SR.dcm", "rtplan.dcm", "dicomdirtests/DICOMDIR"):
        put(base, Path(name).name, (BUNDLED / name).read_bytes())
    put(base, "cut.dcm", (BUNDLED / "CT_small.dcm").read_bytes()[:-5000])
    write(base / "input_dicom" / "good", exposure())
    assert run(base) == 1
    reasons = rejected(base)
    assert len(outputs(base)) == 1
    assert len(reasons) == 8
    assert "is empty" in reasons["empty"]
    for name in ("report.pdf", "text.txt", "picture.jpg"):
        assert reasons[name] == "is not a DICOM file"
    assert "SR" in reasons["test-SR.dcm"]
    assert "Media Storage Directory" in reasons["DICOMDIR"]
    assert "truncated" in reasons["cut.dcm"]


def test_video_is_refused_by_its_name(base: Path) -> None:
    dataset = make(exposure(), uid.JPEGLSLossless)
    dataset.file_meta.TransferSyntaxUID = uid.MPEG4HP41
    dataset.save_as(base / "input_dicom" / "video", enforce_file_format=True)
    assert run(base) == 1
    assert "MPEG-4" in rejected(base)["video"]


def test_a_bomb_is_refused_by_its_header(base: Path) -> None:
    dataset = make(exposure(), uid.RLELossless)
    dataset.Rows = dataset.Columns = 46341
    dataset.save_as(base / "input_dicom" / "bomb", enforce_file_format=True)
    assert run(base) == 1
    assert "--max-image-mb" in rejected(base)["bomb"]


def test_the_limit_of_an_image_is_a_flag(base: Path) -> None:
    write(base / "input_dicom" / "x", exposure(1024, 1024))
    assert run(base, "--max-image-mb", "1") == 1
    assert run(base, "--max-image-mb", "2") == 0


@posix
def test_a_fifo_and_a_loop_of_links_are_listed(base: Path) -> None:
    os.mkfifo(base / "input_dicom" / "pipe")
    (base / "input_dicom" / "loop").symlink_to(base / "input_dicom")
    write(base / "input_dicom" / "good", exposure())
    assert run(base) == 1
    assert set(rejected(base)) == {"pipe", "loop"}


@posix
def test_names_of_any_bytes_and_lengths_are_fine(base: Path) -> None:
    folder = os.fsencode(base / "input_dicom")
    good = write(base / "good", exposure())
    for name in (b"\xff\xfe.dcm", b"n" * 250, b"line\nbreak", b"=formula"):
        shutil.copyfile(good, folder + b"/" + name)
    assert run(base) == 0
    row = manifest(base)[0]
    assert len(outputs(base)) == 1
    everything = row["source"] + row["notes"]
    assert "\\xff\\xfe.dcm" in everything
    assert "\n" not in everything
    assert "'=formula" in everything


def test_header_text_cant_reach_the_terminal_or_a_formula(base: Path) -> None:
    write(base / "input_dicom" / "x", exposure(), Manufacturer="=1+1\x1b[31m")
    run(base)
    assert manifest(base)[0]["manufacturer"].startswith("'=1+1 [31m")


def test_an_identical_duplicate_is_written_once_with_a_note(base: Path) -> None:
    first = write(base / "input_dicom" / "a", exposure())
    shutil.copyfile(first, base / "input_dicom" / "b")
    assert run(base) == 0
    assert len(outputs(base)) == 1
    assert manifest(base)[0]["notes"] == "the same image as b"


def test_a_duplicate_in_another_syntax_is_the_same_image(base: Path) -> None:
    write(base / "input_dicom" / "a", exposure(), uid.ExplicitVRLittleEndian)
    write(base / "input_dicom" / "b", exposure(), uid.JPEGLosslessSV1)
    assert run(base) == 0
    assert len(outputs(base)) == 1


@pytest.mark.parametrize(("seed", "comment"), [(1, "another header"), (2, "")])
def test_one_uid_with_two_contents_is_kept_twice_and_warned_of(
    base: Path, caplog: pytest.LogCaptureFixture, seed: int, comment: str
) -> None:
    write(base / "input_dicom" / "a", exposure(seed=1), ImageComments="")
    write(base / "input_dicom" / "b", exposure(seed=seed), ImageComments=comment)
    assert main(["--base", str(base), "--jobs", "2"]) == 0
    assert len(outputs(base)) == 2
    assert manifest(base)[1]["output"].endswith("_2.dcm")
    assert "SOPInstanceUID" in caplog.text


@pytest.mark.usefixtures("workers")
def test_which_duplicate_gets_which_name_does_not_depend_on_speed(base: Path) -> None:
    big = write(base / "input_dicom" / "a", exposure(900, 900), uid.JPEG2000Lossless)
    write(base / "input_dicom" / "b", exposure())
    run(base)
    rows = {row["source"]: row["output"] for row in manifest(base)}
    assert big.name == "a"
    assert not rows["a"].endswith("_2.dcm")
    assert rows["b"].endswith("_2.dcm")


def test_the_input_is_never_touched(base: Path) -> None:
    for number, name in enumerate(SYNTAXES, 1):
        write(base / "input_dicom" / name, exposure(), SYNTAXES[name], number=number)
    put(base, "bad", b"\0" * 128 + b"DICM" + b"\2\0" * 40)
    before = digests(base / "input_dicom")
    run(base)
    assert digests(base / "input_dicom") == before


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="root may write everywhere, and Windows has other rights",
)
def test_an_output_that_cant_be_written_is_one_line(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(base / "input_dicom" / "x", exposure())
    (base / "f1_descomprimidos").mkdir()
    (base / "f1_descomprimidos").chmod(0o500)
    assert run(base) == 2
    assert "f1_descomprimidos" in caplog.text


def test_a_file_in_the_place_of_the_output_folder_is_one_line(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(base / "input_dicom" / "x", exposure())
    (base / "f1_descomprimidos").write_text("")
    assert run(base) == 2
    assert "move it away" in caplog.text


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_stops_the_run_with_one_line(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(base / "input_dicom" / "x", exposure())
    (base / "link").symlink_to("/dev/full")
    outcome = fase1.convert(Task(source, base / "link", 64))
    cfg, _ = config.parse_config(1, "", ["--base", str(base)])
    fase1.check_folders(cfg)

    def settle() -> int:
        fase1.settle(fase1.Known(cfg), Task(source, base / "link", 64), outcome)
        return 0

    assert utils.exit_code(settle, fase1.log.error) == 2
    assert "free some space" in caplog.text


@posix
def test_a_run_that_fills_the_disk_keeps_its_state_and_the_next_one_completes(
    base: Path,
) -> None:
    collection(base, 4)
    write(base / "input_dicom" / "z" / "big", exposure(512, 512), number=9)
    resource = pytest.importorskip("resource")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
    done = subprocess.run(
        [sys.executable, SCRIPT, "--base", base, "--jobs", "1"],
        preexec_fn=limit,  # no file may grow beyond this: as on a full disk
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "free some space" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert len(outputs(base)) == 4
    written = {path: path.stat().st_mtime_ns for path in outputs(base)}
    assert run(base) == 0
    assert len(outputs(base)) == len(manifest(base)) == 5
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())


def test_missing_and_empty_inputs_are_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(tmp_path) == 2
    assert "input_dicom is missing" in caplog.text
    (tmp_path / "input_dicom").mkdir()
    assert run(tmp_path) == 2
    assert "input_dicom is empty" in caplog.text


def test_an_output_inside_the_input_is_refused(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(base, "--input-dir", ".") == 2
    assert "choose another folder" in caplog.text


@pytest.mark.parametrize("number", [10**30, -(10**30)])
def test_numbers_beyond_any_machine_stop_nothing(base: Path, number: int) -> None:
    source = write(base / "input_dicom" / "x", exposure(), number=1)
    old = struct.pack("<HH2sH", 0x0020, 0x0013, b"IS", 2) + b"1 "
    text = str(number).encode() + b" " * (len(str(number)) % 2)
    new = struct.pack("<HH2sH", 0x0020, 0x0013, b"IS", len(text)) + text
    assert old in source.read_bytes()
    source.write_bytes(source.read_bytes().replace(old, new))
    with suppress(OSError):  # not every file system knows such a year
        os.utime(source, (0, 10**11))
    assert run(base) == 0
    assert len(manifest(base)) == 1


def test_a_path_that_may_not_be_looked_at_is_listed(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(base / "input_dicom" / "x", exposure())
    put(base, "forbidden", b"")
    look = Path.is_file

    def is_file(path: Path) -> bool:
        if path.name == "forbidden":
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert run(base) == 1
    assert rejected(base) == {"forbidden": "can't be read: Permission denied"}
    assert len(manifest(base)) == 1


def test_labelled_files_that_cant_be_read_stop_the_run(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    collection(base)
    run(base)
    label(base, outputs(base)[0])

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(fase1, "identity_of", refuse)
    assert run(base) == 2
    assert "must see what is labelled" in caplog.text
    assert len(outputs(base)) == 5


@posix
def test_a_labelled_link_to_what_cant_be_read_is_warned_of(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    collection(base)
    (base / "elsewhere.dcm").write_bytes(b"")
    (base / "datos_etiquetados").mkdir()
    (base / "datos_etiquetados" / "link.dcm").symlink_to(base / "elsewhere.dcm")

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(fase1, "identity_of", refuse)
    assert run(base) == 0
    assert "doesn't count as labelled" in caplog.text


@posix
def test_a_class_folder_that_is_a_link_is_warned_of(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collection(base)
    (base / "elsewhere").mkdir()
    (base / "datos_etiquetados").mkdir()
    (base / "datos_etiquetados" / "FDT").symlink_to(base / "elsewhere")
    assert run(base) == 0
    assert "doesn't count as labelled" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        *("datos_etiquetados", "f1_descomprimidos/manifiesto.csv/x"),
        *("f1_descomprimidos/rechazados.csv/x", "f1_descomprimidos/.fase1.jsonl/x"),
    ],
)
def test_what_stands_in_the_way_is_one_line(
    base: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(base / "input_dicom" / "x", exposure())
    (base / name).parent.mkdir(parents=True, exist_ok=True)
    (base / name).write_text("")
    assert run(base) == 2
    assert len(caplog.text.splitlines()) == 1


@posix
def test_a_loop_of_links_as_output_is_one_line(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(base / "input_dicom" / "x", exposure())
    (base / "f1_descomprimidos").symlink_to(base / "f1_descomprimidos")
    assert run(base) == 2
    assert len(caplog.text.splitlines()) == 1


@posix
def test_a_closed_or_narrow_output_harms_nothing(base: Path) -> None:
    base = base / "\u0414"
    write(base / "input_dicom" / "x", exposure())
    command = f'"{sys.executable}" "{SCRIPT}" --base "{base}"'
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    for ending in ("", " >&-"):
        done = subprocess.run(
            command + ending, shell=True, env=narrow, capture_output=True, check=False
        )
        assert (done.returncode, done.stderr.count(b"Traceback")) == (0, 0)


def test_a_file_that_vanishes_is_tried_again_next_time(base: Path) -> None:
    outcome = convert(base / "input_dicom" / "gone", base)
    assert outcome.may_pass
    assert "No such file" in outcome.reason


def test_a_file_that_grows_while_it_is_read_is_tried_again_next_time(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(base / "input_dicom" / "x", exposure())
    look = os.fstat

    def grow_and_look(handle: int) -> os.stat_result:
        with source.open("ab") as file:
            file.write(b"\0\0")
        return look(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", grow_and_look)
        outcome = convert(source, base)
    assert outcome.may_pass
    assert "changed while it was read" in outcome.reason
    assert run(base) == 0


def test_a_file_that_is_still_being_copied_is_taken_when_it_is_whole(
    base: Path,
) -> None:
    good = write(base / "good", exposure(), uid.JPEGLSLossless).read_bytes()
    put(base, "x", good[:-100])
    assert run(base) == 1
    assert "truncated" in rejected(base)["x"]
    put(base, "x", good)
    assert run(base) == 0
    assert np.array_equal(pixels_of(outputs(base)[0]), exposure())


# --- Contained ----------------------------------------------------------------------


def employ(names: Iterable[str], jobs: int, timeout_s: float) -> dict[str, Outcome]:
    """What workers make of files of these names, in the order of their answers."""
    tasks = [Task(Path(name), Path("unused"), 1, timeout_s) for name in names]
    results = fase1.convert_all(tasks, jobs, bad_workers.convert)
    return {task.source.name: outcome for task, outcome in results}


@pytest.mark.usefixtures("workers")
def test_a_crash_takes_only_its_own_file() -> None:
    results = employ(["a", "crash", "b", "c"], 2, 30)
    assert "crashed" in results["crash"].reason
    assert results["crash"].may_pass
    assert [results[name].name for name in "abc"] == ["a", "b", "c"]


@pytest.mark.usefixtures("workers")
def test_a_hang_is_ended_and_the_run_goes_on() -> None:
    started = time.monotonic()
    results = employ(["hang", "a"], 1, 1)
    assert "given up" in results["hang"].reason
    assert results["hang"].may_pass
    assert results["a"].name == "a"
    assert time.monotonic() - started < 30


@pytest.mark.usefixtures("workers")
def test_a_large_image_has_more_time(tmp_path: Path) -> None:
    waited: list[float] = []

    def note(seconds: float, **_: Any) -> None:
        waited.append(seconds)

    source = write(tmp_path / "x", exposure(2048, 2048), uid.RLELossless)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faulthandler, "dump_traceback_later", note)
        fase1.convert(Task(source, tmp_path / "out.dcm", 64, timeout_s=10))
    assert waited[-1] == 10 * (1 + 8 / 16)


@pytest.mark.usefixtures("workers")
def test_results_come_in_the_order_of_the_work() -> None:
    names = ["slow", *"abcdefgh"]
    assert list(employ(names, 2, 5)) == names


@pytest.mark.usefixtures("workers")
def test_no_more_workers_are_started_than_there_are_files() -> None:
    tasks = [Task(Path("a"), Path("unused"), 1)]
    for _ in fase1.convert_all(tasks, 8, bad_workers.convert):
        assert len(multiprocessing.active_children()) == 1
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.usefixtures("workers")
def test_workers_that_died_are_replaced_and_leave_nothing_open() -> None:
    tasks = [Task(Path("crash"), Path("unused"), 1)] * 30
    handles = [
        len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for _ in fase1.convert_all(tasks, 1, bad_workers.convert)
    ]
    assert len(handles) == 30
    assert handles[-1] - handles[0] < 15  # one each would be 29


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_workers_end_with_their_parent() -> None:
    code = "import test_fase1 as t; t.employ(['hang'], 1, 60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
        start_new_session=True,
    )
    assert wait_until(lambda: count_of(process.pid) >= 4, 30)
    time.sleep(1)  # the worker takes up its task
    process.kill()
    process.wait()
    assert wait_until(partial(is_gone, process.pid), 10)


@pytest.mark.usefixtures("workers")
def test_a_crash_is_listed_and_tried_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(base / "input_dicom" / "crash", exposure())
    with monkeypatch.context() as patch:
        patch.setattr(fase1.convert_all, "__defaults__", (bad_workers.convert,))
        assert run(base) == 1
    assert "crashed" in rejected(base)["crash"]
    assert run(base) == 0


# --- Again --------------------------------------------------------------------------


def collection(base: Path, count: int = 6) -> None:
    """Images in different syntaxes and sizes."""
    names = list(SYNTAXES)
    for number in range(1, count + 1):
        write(
            base / "input_dicom" / f"d{number % 3}" / f"{number}.dcm",
            exposure(64 + number, 80, seed=number),
            SYNTAXES[names[number % len(names)]],
            number=number,
        )


def state(base: Path) -> dict[str, str]:
    return {
        name: digest
        for name, digest in digests(base).items()
        if not name.endswith(fase1.STATE)
    }


def test_a_second_run_changes_nothing(base: Path) -> None:
    collection(base)
    put(base, "bad", b"no")
    assert run(base) == 1
    before = state(base)
    assert run(base) == 1
    assert state(base) == before


@posix
def test_a_second_run_leaves_the_lists_alone_whatever_lies_about(base: Path) -> None:
    collection(base, 2)
    os.mkfifo(base / "input_dicom" / "pipe")
    (base / "input_dicom" / "loop").symlink_to(base / "input_dicom")
    run(base)
    before = (base / "f1_descomprimidos" / config.REJECTED_LIST).stat().st_mtime_ns
    assert run(base) == 1
    after = (base / "f1_descomprimidos" / config.REJECTED_LIST).stat().st_mtime_ns
    assert after == before


def test_a_bad_file_that_was_removed_leaves_the_list(base: Path) -> None:
    collection(base, 1)
    put(base, "bad", b"no")
    assert run(base) == 1
    (base / "input_dicom" / "bad").unlink()
    assert run(base) == 0
    assert rejected(base) == {}


@pytest.mark.usefixtures("workers")
def test_a_second_run_opens_no_file(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection(base)
    run(base)
    label(base, outputs(base)[1], "my favourite.dcm")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(fase1, "ProcessPool", refuse)
    assert run(base) == 0


def test_new_files_are_added_without_renaming_others(base: Path) -> None:
    collection(base, 3)
    run(base)
    before = {path.name for path in outputs(base)}
    write(base / "input_dicom" / "0", exposure(), number=9, AcquisitionTime="01")
    run(base)
    after = [path.name for path in outputs(base)]
    assert before < set(after)
    assert manifest(base)[0]["source"] == "0"
    assert [row["output"] for row in manifest(base)] == after


def label(base: Path, path: Path, name: str | None = None) -> Path:
    target = base / "datos_etiquetados" / "TOR" / "deeper" / (name or path.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    return path.rename(target)


@pytest.mark.parametrize("name", [None, "my favourite.dcm"])
def test_a_labelled_file_is_not_written_again(base: Path, name: str | None) -> None:
    collection(base)
    run(base)
    label(base, outputs(base)[2], name)
    assert run(base) == 0
    assert len(outputs(base)) == 5
    assert len(manifest(base)) == 6


def test_a_labelled_file_that_was_edited_is_known_by_its_name(base: Path) -> None:
    collection(base)
    run(base)
    edited = read(outputs(base)[2])
    edited.SOPInstanceUID = edited.file_meta.MediaStorageSOPInstanceUID = uid.UID(
        "2.25.9"
    )
    edited.save_as(outputs(base)[2])
    label(base, outputs(base)[2])
    assert run(base) == 0
    assert len(outputs(base)) == 5


@pytest.mark.parametrize("name", [None, "my favourite.dcm"])
def test_a_labelled_file_is_known_without_the_state(
    base: Path, name: str | None
) -> None:
    collection(base)
    run(base)
    label(base, outputs(base)[2], name)
    (base / "f1_descomprimidos" / fase1.STATE).unlink()
    assert run(base) == 0
    assert len(outputs(base)) == 5


def twins(base: Path) -> tuple[Path, Path]:
    """Two outputs of one SOPInstanceUID: of A, and the second one of B."""
    write(base / "input_dicom" / "A", exposure(seed=1))
    write(base / "input_dicom" / "B", exposure(seed=2))
    run(base)
    named = {row["source"]: row["output"] for row in manifest(base)}
    folder = base / "f1_descomprimidos"
    return folder / named["A"], folder / named["B"]


def images(base: Path) -> set[str]:
    """Digests of all pixels that are there, labelled or not."""
    found = [*outputs(base), *(base / "datos_etiquetados").rglob("*.dcm")]
    return {hashlib.sha256(read(path).PixelData).hexdigest() for path in found}


@pytest.mark.parametrize("moved", ["A", "B", "AB"])
def test_a_renamed_twin_is_told_from_the_other(base: Path, moved: str) -> None:
    paths = dict(zip("AB", twins(base), strict=True))
    names = {name: path.name for name, path in paths.items()}
    for name in moved:
        label(base, paths[name], f"renamed {name}.dcm")
    for _ in range(3):
        assert run(base) == 0
        assert {row["source"]: row["output"] for row in manifest(base)} == names
        assert all(fase1.SHARED_UID in row["notes"] for row in manifest(base))
        assert len(outputs(base)) == 2 - len(moved)


def test_a_twin_that_was_lost_is_written_again(base: Path) -> None:
    first, second = twins(base)
    before = images(base)
    third = base / "input_dicom" / "C"
    label(base, first)
    label(base, second)
    write(third, exposure(seed=3))
    run(base)
    assert outputs(base)[0].name not in (first.name, second.name)
    third.unlink()
    for path in outputs(base):
        path.unlink()
    for path in (base / "datos_etiquetados").rglob("*.dcm"):
        path.rename(first.parent / path.name)
    label(base, second, "renamed.dcm")
    run(base)
    first.unlink()
    run(base)
    assert images(base) == before
    assert len(outputs(base)) == 1


@pytest.mark.parametrize("lost", ["state", "folder"])
def test_a_twin_is_not_lost_with_the_state(base: Path, lost: str) -> None:
    _, second = twins(base)
    before = images(base)
    label(base, second, "renamed.dcm")
    run(base)
    folder = base / "f1_descomprimidos"
    (folder / fase1.STATE).unlink() if lost == "state" else shutil.rmtree(folder)
    for _ in range(2):
        assert run(base) == 0
        assert images(base) == before
        assert len(outputs(base)) == 1


@pytest.mark.parametrize("moved", ["A", "B"])
def test_twins_with_equal_pixels_stay_listed_without_the_state(
    base: Path, moved: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "AB":
        source = base / "input_dicom" / name
        write(source, exposure(seed=1), SeriesDescription=name)
    run(base)
    named = {row["source"]: row["output"] for row in manifest(base)}
    label(base, base / "f1_descomprimidos" / named[moved])
    (base / "f1_descomprimidos" / fase1.STATE).unlink()
    for _ in range(3):
        assert run(base) == 0
        assert {row["output"] for row in manifest(base)} == {*named.values()}
        assert len(outputs(base)) == 1
    assert "without their originals" not in capsys.readouterr().out


def test_a_labelled_file_with_another_header_is_known_without_the_state(
    base: Path,
) -> None:
    collection(base)
    run(base)
    edited = read(outputs(base)[2])
    edited.PatientID = "of a person's own"
    edited.save_as(outputs(base)[2])
    label(base, outputs(base)[2], "renamed.dcm")
    (base / "f1_descomprimidos" / fase1.STATE).unlink()
    for _ in range(2):
        assert run(base) == 0
        assert len(outputs(base)) == 5


def test_a_uid_that_only_the_file_meta_group_has_identifies_as_well(
    base: Path,
) -> None:
    write(base / "input_dicom" / "x", exposure(), SOPInstanceUID=None)
    source = base / "input_dicom" / "x"
    assert b"\x08\0\x18\0" not in source.read_bytes()
    run(base)
    label(base, outputs(base)[0], "renamed.dcm")
    assert run(base) == 0
    assert outputs(base) == []


def written_by_version_1_0(base: Path) -> None:
    """Turn outputs into what version 1.0 left: names without number, its own state."""
    folder = base / "f1_descomprimidos"
    for path in outputs(base):
        dataset = read(path)  # its headers were written otherwise
        dataset.ImageComments = "of version 1.0"
        dataset.save_as(path)
        stem = path.name.replace(f"_{int(dataset.InstanceNumber):05d}_", "_")
        if not dataset.SOPInstanceUID:
            stem = stem[:-16] + "0123456789ab.dcm"
        path.rename(folder / stem)
    (folder / fase1.STATE).unlink()
    (folder / ".fase1.sqlite").write_bytes(b"SQLite format 3")


def test_outputs_of_an_older_version_are_known_and_renamed(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collection(base, 8)
    for number in (11, 12):
        path = base / "input_dicom" / f"no uid {number}"
        write(path, exposure(seed=number), number=number, SOPInstanceUID="")
    run(base)
    names, before = {path.name for path in outputs(base)}, images(base)
    written_by_version_1_0(base)
    for path in outputs(base)[::2]:
        label(base, path)
    labelled = digests(base / "datos_etiquetados")
    old = {path.name for path in outputs(base)}
    capsys.readouterr()
    assert run(base) == 0
    assert "5 images that were there without a record, kept under today's names" in (
        capsys.readouterr().out
    )
    now = {path.name for path in outputs(base)}
    assert len(now) == 5
    assert now < names
    assert not now & old
    assert images(base) == before
    assert digests(base / "datos_etiquetados") == labelled
    assert len(manifest(base)) == 10
    assert all(read(path).ImageComments == "of version 1.0" for path in outputs(base))
    assert run(base) == 0
    assert {path.name for path in outputs(base)} == now


@pytest.mark.parametrize("left", ["older version", "no journal"])
def test_an_output_without_its_original_stays_and_is_listed(
    base: Path, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    collection(base, 5)
    run(base)
    before = images(base)
    if left == "older version":
        written_by_version_1_0(base)
    else:
        (base / "f1_descomprimidos" / fase1.STATE).unlink()
    originals = (p for p in (base / "input_dicom").rglob("*") if p.is_file())
    for path in sorted(originals)[:3]:
        path.unlink()
    capsys.readouterr()
    for _ in range(2):
        assert run(base) == 0
        assert images(base) == before
        assert [row["output"] for row in manifest(base)] == sorted(
            path.name for path in outputs(base)
        )
    assert "2 files in" in capsys.readouterr().out


def test_a_labelled_file_with_other_stored_values_is_named(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As an older version left, which took unused bits for pixels."""
    collection(base, 2)
    run(base)
    path = label(base, outputs(base)[0])
    dataset = read(path)
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(path)
    (base / "f1_descomprimidos" / fase1.STATE).unlink()
    assert run(base) == 0
    assert f"differs in its stored values from {path}" in caplog.text
    assert len(outputs(base)) == 2


def touch(base: Path) -> None:
    """Files of the input that another program has looked at."""
    found = [path for path in (base / "input_dicom").rglob("*") if path.is_file()]
    assert found
    for path in found:
        os.utime(path, (1, 1))


def test_an_output_of_an_older_version_with_other_stored_values_is_named(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    collection(base, 2)
    with monkeypatch.context() as older:
        older.setattr(config, "PROGRAM_VERSION", "1.1.0")
        run(base)
    path = outputs(base)[0]
    dataset = read(path)
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(path)
    touch(base)
    assert run(base) == 0
    assert f"differs in its stored values from {path}" in caplog.text
    assert len(outputs(base)) == 3


def test_a_touched_input_of_an_older_version_is_not_written_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The headers of that version may differ: the stored values tell."""
    collection(base, 2)
    with monkeypatch.context() as older:
        older.setattr(config, "PROGRAM_VERSION", "1.1.0")
        run(base)
    for path in outputs(base):
        dataset = read(path)
        dataset.ImageComments = "of version 1.1"
        dataset.save_as(path)
    before = {path.name for path in outputs(base)}
    touch(base)
    assert run(base) == 0
    assert {path.name for path in outputs(base)} == before


def test_a_lost_output_is_written_again(base: Path) -> None:
    collection(base)
    run(base)
    before = digests(base / "f1_descomprimidos").keys()
    outputs(base)[1].unlink()
    run(base)
    assert digests(base / "f1_descomprimidos").keys() == before


def test_a_source_replaced_by_another_image_adds_it(base: Path) -> None:
    write(base / "input_dicom" / "x", exposure(seed=1), number=1)
    run(base)
    write(base / "input_dicom" / "x", exposure(seed=2), number=2)
    run(base)
    assert len(outputs(base)) == len(manifest(base)) == 2


@posix  # Windows keeps no time that nobody can set
def test_another_image_of_the_same_size_and_time_is_seen(base: Path) -> None:
    for seed in (1, 2):
        write(base / "input_dicom" / "x", exposure(seed=seed), number=seed)
        os.utime(base / "input_dicom" / "x", (0, 0))
        run(base)
    assert len(outputs(base)) == 2


def test_outputs_outlive_their_sources(base: Path) -> None:
    collection(base)
    run(base)
    (base / "input_dicom" / "d1" / "1.dcm").unlink()
    run(base)
    assert len(outputs(base)) == len(manifest(base)) == 6
    outputs(base)[0].unlink()
    run(base)
    assert len(outputs(base)) == len(manifest(base)) == 5


def test_a_damaged_state_is_made_anew(base: Path) -> None:
    collection(base)
    run(base)
    before = {path.name for path in outputs(base)}
    (base / "f1_descomprimidos" / fase1.STATE).write_bytes(b"damaged" * 1000)
    assert run(base) == 0
    assert {path.name for path in outputs(base)} == before


@pytest.mark.parametrize(
    "line", [b'{"key": "output/x"}\n', b"[1, 2]\n", b'{"torn', b"\xff\xfe\n"]
)
def test_lines_of_the_state_that_say_nothing_are_passed_over(
    base: Path, line: bytes
) -> None:
    collection(base)
    run(base)
    before = state(base)
    path = base / "f1_descomprimidos" / fase1.STATE
    path.write_bytes(line + path.read_bytes()[:-30])
    assert run(base) == 0
    assert state(base).keys() == before.keys()
    assert len(manifest(base)) == 6


def test_a_second_program_on_the_same_folder_is_refused(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collection(base)
    run(base)
    unfinished = base / "f1_descomprimidos" / fase1.TEMPORARY.replace("*", "1-1")
    with utils.lock(base / "f1_descomprimidos" / fase1.LOCK, "held"):
        unfinished.write_bytes(b"the first program's")
        assert run(base) == 2
    assert "another phase 1" in caplog.text
    assert unfinished.exists()


def test_class_folders_are_made_once(base: Path) -> None:
    collection(base, 1)
    run(base)
    labelled = base / "datos_etiquetados"
    assert {path.name for path in labelled.iterdir()} == set(config.CLASS_NAMES)
    shutil.rmtree(labelled / "FDT")
    run(base)
    assert not (labelled / "FDT").exists()


def start(base: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, SCRIPT, "--base", base, "--jobs", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def count_of(session: int) -> int:
    """How many processes of a session are left (Linux)."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            count += int(fields[3]) == session and fields[0] != "Z"
    return count


def is_gone(session: int) -> bool:
    return count_of(session) == 0


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_killed_at_any_moment_it_leaves_no_part_and_the_next_run_completes(
    base: Path,
) -> None:
    collection(base, 40)
    chance = random.Random(7)
    for _ in range(3):
        process = start(base)
        time.sleep(chance.uniform(0.5, 1.6))
        process.kill()
        process.communicate()
        assert wait_until(partial(is_gone, process.pid))
        for path in outputs(base):
            assert pixels_of(path).shape[1] == 80
    assert run(base) == 0
    assert len(outputs(base)) == len(manifest(base)) == 40
    assert not list((base / "f1_descomprimidos").glob("*.tmp"))


@posix
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_ctrl_c_ends_with_130_and_no_children(base: Path) -> None:
    collection(base, 200)
    process = start(base)
    assert wait_until(lambda: bool(outputs(base)))
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=10)
    assert process.returncode == 130
    assert b"Traceback" not in error
    assert wait_until(partial(is_gone, process.pid))


@pytest.mark.usefixtures("workers")
def test_the_same_input_gives_the_same_files_with_any_number_of_jobs(
    base: Path,
) -> None:
    collection(base)
    found = []
    for jobs in ("1", "3"):
        main(["--base", str(base), "--quiet", "--jobs", jobs])
        found.append(
            [(path.name, path.read_bytes()) for path in outputs(base)]
            + [(base / "f1_descomprimidos" / config.FILE_LIST).read_bytes()]
        )
        shutil.rmtree(base / "f1_descomprimidos")
    assert found[0] == found[1]


def test_a_deflate_bomb_is_listed(base: Path) -> None:
    path = write(
        base / "input_dicom" / "x", exposure(), uid.DeflatedExplicitVRLittleEndian
    )
    data = path.read_bytes()
    (length,) = struct.unpack_from("<L", data, 140)
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = deflater.compress(b"\0" * (70 << 20)) + deflater.flush()
    path.write_bytes(data[: 144 + length] + bomb)
    assert run(base, "--max-image-mb", "1") == 1
    assert "inflates" in rejected(base)["x"]


def test_damaged_files_are_all_accounted_for(tmp_path: Path) -> None:
    origins = fuzz_fase1.write_damaged(tmp_path, 300, seed=5)
    kinds, _ = fuzz_fase1.check(tmp_path, origins)
    assert kinds["written"] > 10
