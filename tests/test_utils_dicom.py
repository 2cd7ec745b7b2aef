"""Reading and decoding: every syntax, repaired file meta, refused streams."""

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from dicom_samples import (
    BUNDLED,
    LOSSY,
    SYNTAXES,
    Pixels,
    encode_frame,
    exposure,
    make,
    reference_arrays,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.encaps import encapsulate

import utils
from utils import PixelLayout, RejectedError, decode_frame, find_files, read_dicom

CODECS = [name for name in SYNTAXES if SYNTAXES[name].is_encapsulated]

# --- Finding ------------------------------------------------------------------------


def found(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_files(root)]


def test_files_are_found_at_any_depth_in_order(tmp_path: Path) -> None:
    for name in ("b/c/2", "b/1.dcm", "a", "z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert found(tmp_path) == ["a", "z", "b/1.dcm", "b/c/2"]


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_bytes(b"x")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert found(tmp_path) == []


def test_a_loop_of_links_is_reported_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    told: dict[str, str] = {}
    found_files = list(find_files(tmp_path, lambda p, why: told.update({p.name: why})))
    assert not found_files
    assert "link" in told["up"]


def test_a_fifo_is_reported_and_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    told: dict[str, str] = {}
    assert not list(find_files(tmp_path, lambda p, why: told.update({p.name: why})))
    assert "regular" in told["pipe"]


def test_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert found(tmp_path) == ["a", "b"]


# --- Decoding -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SYNTAXES)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_lossless_syntax_gives_back_the_pixels(
    tmp_path: Path, name: str, bits: int
) -> None:
    pixels = exposure(bits=bits)
    path = write(tmp_path / "x", pixels, SYNTAXES[name], bits)
    assert np.array_equal(decode_frame(read_dicom(path)), pixels)


@pytest.mark.parametrize("name", SYNTAXES)
def test_signed_pixels_keep_their_sign(tmp_path: Path, name: str) -> None:
    pixels = (exposure(bits=12).astype(np.int16)) - 2048
    path = write(tmp_path / "x", pixels, SYNTAXES[name], 12)
    assert np.array_equal(decode_frame(read_dicom(path)), pixels)


@pytest.mark.parametrize("name", SYNTAXES)
def test_colour_comes_out_interleaved(tmp_path: Path, name: str) -> None:
    pixels = np.stack([exposure(bits=8, seed=seed) for seed in range(3)], axis=-1)
    path = write(tmp_path / "x", pixels, SYNTAXES[name], 8)
    assert np.array_equal(decode_frame(read_dicom(path)), pixels)


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_syntax_comes_close(tmp_path: Path, name: str) -> None:
    bits = 8 if name == "JPEG Baseline" else 12
    pixels = exposure(bits=bits)
    path = write(tmp_path / "x", pixels, LOSSY[name], bits)
    error = decode_frame(read_dicom(path)).astype(float) - pixels
    assert np.sqrt(np.mean(error**2)) < 2**bits / 100


@pytest.mark.parametrize("name", ["JPEG 2000 lossy", "HTJ2K lossy"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_black_and_white_stay_what_they_are_in_a_lossy_stream(
    tmp_path: Path, name: str, dtype: type[np.integer[Any]]
) -> None:
    extremes = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
    pixels = np.kron(np.tile(extremes, (8, 6)), np.ones((7, 5), dtype))
    path = write(tmp_path / "x", pixels, LOSSY[name], 16)
    error = decode_frame(read_dicom(path)).astype(float) - pixels
    assert np.abs(error).max() < 1000


@pytest.mark.parametrize(
    "name", ["JPEG 2000", "JPEG 2000 lossy", "HTJ2K", "HTJ2K lossy"]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_jpeg_2000_decodes_as_with_every_plugin_of_pydicom(
    tmp_path: Path, name: str, dtype: type[np.integer[Any]]
) -> None:
    rng = np.random.default_rng(0)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    pixels = rng.integers(low, high, (60, 70), dtype, endpoint=True)
    bits = 8 * pixels.itemsize
    path = write(tmp_path / "x", pixels, (SYNTAXES | LOSSY)[name], bits)
    references = reference_arrays(path)
    assert "pylibjpeg" in references
    for reference in references.values():
        assert np.array_equal(decode_frame(read_dicom(path)), reference)


JPEG = {
    **{name: SYNTAXES[name] for name in ("JPEG Lossless", "JPEG Lossless SV1")},
    **{name: LOSSY[name] for name in ("JPEG Baseline", "JPEG Extended")},
}


@pytest.mark.parametrize("name", JPEG)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("colour", [False, True])
def test_a_jpeg_whose_data_end_before_its_image_is_refused(
    name: str, share: float, colour: bool
) -> None:
    bits = 12 if name == "JPEG Extended" else 8
    if colour and bits == 12:
        pytest.skip("no such images")
    pixels = exposure(64, 80, bits)
    pixels = np.stack([pixels] * 3, axis=-1) if colour else pixels
    stream = encode_frame(pixels, JPEG[name], bits)
    layout = layout_of(pixels, bits)
    assert utils.decode_stream(stream, layout).shape == pixels.shape
    begin = stream.index(b"\xff\xda")
    cut = stream[: begin + int(share * (len(stream) - begin))] + b"\xff\xd9"
    with pytest.raises(RejectedError, match="ends before the image"):
        utils.decode_stream(cut, layout)


@given(
    name=st.sampled_from(list(JPEG)),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    value=st.integers(0, 255),
    noise=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_no_flat_jpeg_is_taken_for_a_cut_one(
    name: str, rows: int, columns: int, value: int, noise: int
) -> None:
    bits = 12 if name == "JPEG Extended" else 8
    rng = np.random.default_rng(value)
    pixels = np.full((rows, columns), value, np.uint16 if bits == 12 else np.uint8)
    pixels[: rows // 2] ^= rng.integers(
        0, noise, pixels[: rows // 2].shape, endpoint=True
    ).astype(pixels.dtype)
    stream = encode_frame(pixels, JPEG[name], bits)
    layout = layout_of(pixels, bits)
    assert utils.decode_stream(stream, layout).shape == pixels.shape


@pytest.mark.parametrize("name", CODECS)
def test_the_middle_frame_stands_for_a_multi_frame_image(
    tmp_path: Path, name: str
) -> None:
    frames = [exposure(seed=seed) for seed in range(5)]
    path = write(tmp_path / "x", frames, SYNTAXES[name])
    assert np.array_equal(decode_frame(read_dicom(path)), frames[2])


@pytest.mark.parametrize(
    "name",
    [
        *("693_J2KI", "GDCMJ2K_TextGBR", "J2K_pixelrep_mismatch", "JPEG2000"),
        *("JPEGLSNearLossless_08", "JPEGLSNearLossless_16", "MR_small_RLE"),
        *("MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "SC_rgb_rle_32bit"),
        *("SC_rgb_jls_lossy_line", "SC_rgb_jls_lossy_sample", "SC_rgb_jpeg_gdcm"),
        *("SC_jpeg_no_color_transform", "SC_rgb_dcmtk_+eb+cr", "SC_rgb_jpeg_dcmtk"),
        *("SC_rgb_jpeg_lossy_gdcm", "SC_rgb_small_odd_jpeg", "examples_ybr_color"),
        *("MR_small_bigendian", "image_dfl", "MR_small_padded", "rtdose_rle_1frame"),
    ],
)
def test_a_bundled_sample_decodes_as_with_pydicoms_plugins(name: str) -> None:
    path = BUNDLED / f"{name}.dcm"
    references = reference_arrays(path)
    pixels = decode_frame(read_dicom(path))
    references = {
        key: one[len(one) // 2] if one.ndim > pixels.ndim else one
        for key, one in references.items()
    }
    assert any(np.array_equal(pixels, one) for one in references.values())


def test_twelve_bit_jpeg_extended_is_within_one_level_of_pylibjpeg() -> None:
    path = BUNDLED / "JPGExtended.dcm"
    reference = reference_arrays(path)["pylibjpeg"].astype(int)
    assert np.abs(decode_frame(read_dicom(path)) - reference).max() <= 1


def test_the_codestream_decides_and_not_the_transfer_syntax(tmp_path: Path) -> None:
    pixels = exposure()
    dataset = make(pixels, uid.JPEGLSLossless)
    dataset.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless
    dataset.save_as(tmp_path / "x", enforce_file_format=True)
    assert np.array_equal(decode_frame(read_dicom(tmp_path / "x")), pixels)


def test_fragments_of_one_frame_are_joined(tmp_path: Path) -> None:
    pixels = exposure()
    dataset = make(pixels, uid.JPEGLSLossless)
    stream = encode_frame(pixels, uid.JPEGLSLossless, 12)
    dataset.PixelData = encapsulate([stream], fragments_per_frame=3)
    dataset.save_as(tmp_path / "x", enforce_file_format=True)
    assert np.array_equal(decode_frame(read_dicom(tmp_path / "x")), pixels)


@pytest.mark.parametrize("has_bot", [True, False])
def test_fragments_are_shared_out_to_their_frames(
    tmp_path: Path, has_bot: bool
) -> None:
    frames = [exposure(seed=seed) for seed in range(3)]
    dataset = make(frames, uid.JPEGLSLossless)
    streams = [encode_frame(one, uid.JPEGLSLossless, 12) for one in frames]
    dataset.PixelData = encapsulate(streams, fragments_per_frame=2, has_bot=has_bot)
    dataset.save_as(tmp_path / "x", enforce_file_format=True)
    assert np.array_equal(decode_frame(read_dicom(tmp_path / "x")), frames[1])


def layout_of(pixels: Pixels, bits: int = 12) -> PixelLayout:
    return PixelLayout.of(make(pixels, bits=bits))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_a_truncated_stream_is_refused(name: str, share: float) -> None:
    pixels = exposure(64, 64)
    stream = encode_frame(pixels, SYNTAXES[name], 12)
    with pytest.raises((RejectedError, ValueError, RuntimeError)):
        utils.decode_stream(stream[: int(len(stream) * share)], layout_of(pixels))


@pytest.mark.parametrize("name", [name for name in CODECS if name != "RLE"])
def test_a_stream_of_another_size_is_refused_before_it_is_decoded(name: str) -> None:
    stream = encode_frame(exposure(64, 64), SYNTAXES[name], 12)
    with pytest.raises(RejectedError, match="64×64×1, the header says 48×32×1"):
        utils.decode_stream(stream, layout_of(exposure()))


def test_padding_after_the_end_marker_is_harmless() -> None:
    pixels = exposure()
    stream = encode_frame(pixels, uid.JPEGLosslessSV1, 12) + b"\0" * 7
    assert np.array_equal(utils.decode_stream(stream, layout_of(pixels)), pixels)


def test_bits_beyond_the_precision_are_masked() -> None:
    signed = exposure(bits=12).astype(np.int16) - 2048
    stream = imagecodecs.jpeg2k_encode(
        signed, codecformat="J2K", reversible=True, level=0, bitspersample=12
    )
    found = utils.decode_stream(bytes(stream), layout_of(exposure()))
    assert np.array_equal(found, signed.view(np.uint16) & 4095)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    bits=st.integers(9, 16),
    name=st.sampled_from(["RLE", "JPEG Lossless SV1", "JPEG-LS", "JPEG 2000"]),
    seed=st.integers(0, 99),
)
def test_any_size_and_depth_comes_back(
    rows: int, columns: int, bits: int, name: str, seed: int
) -> None:
    pixels = exposure(rows, columns, bits, seed)
    stream = encode_frame(pixels, SYNTAXES[name], bits)
    assert np.array_equal(utils.decode_stream(stream, layout_of(pixels, bits)), pixels)


# --- Reading ------------------------------------------------------------------------


def without_meta(path: Path) -> bytes:
    """The dataset of a file, without preamble and file meta group."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<L", data, 140)
    return data[144 + length :]


@pytest.mark.parametrize("name", ["implicit", "explicit", "big endian"])
def test_a_file_without_preamble_and_meta_is_read(tmp_path: Path, name: str) -> None:
    pixels = exposure()
    path = write(tmp_path / "x", pixels, SYNTAXES[name])
    path.write_bytes(without_meta(path))
    assert np.array_equal(decode_frame(read_dicom(path)), pixels)


@pytest.mark.parametrize("name", ["implicit", "explicit", "JPEG-LS"])
def test_a_wrong_transfer_syntax_is_seen_through(tmp_path: Path, name: str) -> None:
    pixels = exposure()
    path = write(tmp_path / "x", pixels, SYNTAXES[name])
    right = str(SYNTAXES[name]).encode()
    wrong = b"1.2.840.10008.1.2.2"
    data = path.read_bytes()
    at = data.index(right, 132) - 2
    size = len(right) + len(right) % 2
    value = wrong.ljust(len(wrong) + len(wrong) % 2, b"\0")
    data = data[:at] + struct.pack("<H", len(value)) + value + data[at + 2 + size :]
    path.write_bytes(data)
    assert np.array_equal(decode_frame(read_dicom(path)), pixels)


def test_what_was_wrong_with_the_meta_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "x", exposure(), uid.ImplicitVRLittleEndian)
    path.write_bytes(without_meta(path))
    assert read_dicom(path).notes == ["had no file meta group"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"PK\3\4" + b"\0" * 200, "a ZIP archive"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 200, "a JPEG picture"),
        (b"just text\n" * 40, "is not a DICOM file"),
        (b"\0" * 128 + b"DICM", "truncated"),
    ],
)
def test_what_is_no_image_is_refused_with_a_reason(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(RejectedError, match=reason):
        read_dicom(tmp_path / "x")


@pytest.mark.parametrize("name", ["test-SR", "rtplan", "waveform_ecg"])
def test_a_dicom_file_without_pixels_holds_no_image(name: str) -> None:
    with pytest.raises(RejectedError, match="holds no image"):
        decode_frame(read_dicom(BUNDLED / f"{name}.dcm"))


def test_a_deflate_bomb_is_refused_within_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "x", exposure(), uid.DeflatedExplicitVRLittleEndian)
    data = path.read_bytes()
    (length,) = struct.unpack_from("<L", data, 140)
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = deflater.compress(b"\0" * (200 << 20)) + deflater.flush()
    path.write_bytes(data[: 144 + length] + bomb)
    with pytest.raises(RejectedError, match="inflates to more than 65 MB"):
        read_dicom(path, 1)


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    path = write(tmp_path / "x", exposure())
    with path.open("r+b") as file:
        file.truncate(100 << 20)
    with pytest.raises(RejectedError, match="larger than 65 MB"):
        read_dicom(path, 1)


def test_pixels_cut_off_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x", exposure())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RejectedError):
        decode_frame(read_dicom(path))


def test_imagecodecs_still_needs_our_truncation_check() -> None:
    stream = encode_frame(exposure(64, 64), uid.JPEGLosslessSV1, 12)
    half = imagecodecs.jpeg8_decode(stream[: len(stream) // 2])
    assert half.shape == (64, 64)


def test_nothing_is_written_to_what_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x", exposure(), uid.RLELossless)
    before = path.read_bytes(), path.stat().st_mtime_ns
    decode_frame(read_dicom(path))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_the_dataset_keeps_its_attributes(tmp_path: Path) -> None:
    path = write(tmp_path / "x", exposure(), PatientName="Jörg^Test")
    assert read_dicom(path).Modality == pydicom.dcmread(path).Modality
