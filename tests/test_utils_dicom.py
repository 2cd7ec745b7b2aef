"""Reading and decoding: every syntax, repaired file meta, refused streams."""

import os
import re
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import phantoms
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
    posix,
    reference_arrays,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.encaps import encapsulate, generate_frames

import config
import fase1_descompresion as fase1
import utils
from utils import RejectedError, find_files, read_dicom

CODECS = [name for name in SYNTAXES if SYNTAXES[name].is_encapsulated]

# --- Finding ------------------------------------------------------------------------


def found(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_files(root)]


def decode_frame(dataset: Any) -> Any:
    return utils.frame_of(utils.decode(dataset))


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


@posix
def test_a_loop_of_links_is_reported_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    told: dict[str, str] = {}
    found_files = list(find_files(tmp_path, lambda p, why: told.update({p.name: why})))
    assert not found_files
    assert "link" in told["up"]


@posix
def test_a_fifo_is_reported_and_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    told: dict[str, str] = {}
    assert not list(find_files(tmp_path, lambda p, why: told.update({p.name: why})))
    assert "regular" in told["pipe"]


@posix
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
    assert decoded(stream, pixels, bits).shape == pixels.shape
    begin = stream.index(b"\xff\xda")
    cut = stream[: begin + int(share * (len(stream) - begin))] + b"\xff\xd9"
    with pytest.raises(RejectedError, match="ends before the image"):
        decoded(cut, pixels, bits)


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
    assert decoded(stream, pixels, bits).shape == pixels.shape


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


def test_a_fragment_that_says_more_than_is_there_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x", exposure(), uid.RLELossless)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"\xfe\xff\x00\xe0") + 4] += 2
    path.write_bytes(data)
    with pytest.raises(RejectedError, match="a fragment reaches beyond the pixels"):
        decode_frame(read_dicom(path))


def test_an_rle_header_that_ends_early_is_refused_in_words(tmp_path: Path) -> None:
    dataset = make(exposure(), uid.RLELossless)
    dataset.PixelData = encapsulate([b"\2\0\0\0\x40\0"])
    dataset.save_as(tmp_path / "x", enforce_file_format=True)
    with pytest.raises(RejectedError, match="an RLE segment is too short"):
        decode_frame(read_dicom(tmp_path / "x"))


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


def decoded(
    stream: bytes, like: Pixels, bits: int = 12, notes: list[str] | None = None
) -> Pixels:
    """A codestream, decoded under the header that an image like `like` would have."""
    dataset = make(like, bits=bits)
    dataset.notes = [] if notes is None else notes
    return utils.decode_stream(stream, utils.pixel_layout(dataset))[0]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_a_truncated_stream_is_refused(name: str, share: float) -> None:
    pixels = exposure(64, 64)
    stream = encode_frame(pixels, SYNTAXES[name], 12)
    with pytest.raises((RejectedError, ValueError, RuntimeError)):
        decoded(stream[: int(len(stream) * share)], pixels)


@pytest.mark.parametrize("name", [name for name in CODECS if name != "RLE"])
def test_a_stream_of_another_size_is_refused_before_it_is_decoded(name: str) -> None:
    stream = encode_frame(exposure(64, 64), SYNTAXES[name], 12)
    with pytest.raises(RejectedError, match="64×64×1, the header says 48×32×1"):
        decoded(stream, exposure())


def test_padding_after_the_end_marker_is_harmless() -> None:
    pixels = exposure()
    stream = encode_frame(pixels, uid.JPEGLosslessSV1, 12) + b"\0" * 7
    assert np.array_equal(decoded(stream, pixels), pixels)


def test_bits_beyond_the_precision_are_masked() -> None:
    signed = exposure(bits=12).astype(np.int16) - 2048
    stream = imagecodecs.jpeg2k_encode(
        signed, codecformat="J2K", reversible=True, level=0, bitspersample=12
    )
    found = decoded(bytes(stream), exposure())
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
    assert np.array_equal(decoded(stream, pixels, bits), pixels)


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
    bomb = deflater.compress(b"\0" * (70 << 20)) + deflater.flush()
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


# --- Stored values ------------------------------------------------------------------

ONE_RULE = ["explicit", "RLE", "JPEG Lossless SV1", "JPEG-LS", "JPEG 2000"]


def cells(kind: str) -> tuple[Pixels, Pixels, dict[str, Any]]:
    """Samples as they lie in 16 bits, the stored values, and what the header says."""
    clean = exposure(40, 48, 12)
    header = {"BitsStored": 12, "HighBit": 11}
    if kind == "overlay":
        overlay = clean.copy()
        overlay[10:30, 5:20] |= 0x8000
        return overlay, clean, header
    if kind == "marker bits":
        return clean | 0xC000, clean, header
    if kind == "left-justified":
        return clean << 4, clean, header | {"HighBit": 15}
    signed = clean.astype(np.int16) - 2048
    if kind == "no sign extension":
        header["PixelRepresentation"] = 1
        return signed.view(np.uint16) & 0x0FFF, signed, header
    if kind == "sign extension":
        header["PixelRepresentation"] = 1
        return signed.view(np.uint16), signed, header
    assert kind == "nine bits said"
    return clean, clean, {"BitsStored": 9, "HighBit": 8}


KINDS = ["overlay", "marker bits", "left-justified", "no sign extension"]
KINDS += ["sign extension", "nine bits said"]


def write_cells(path: Path, kind: str, name: str) -> tuple[Path, Pixels]:
    pixels, stored, header = cells(kind)
    dataset = make(pixels, SYNTAXES[name], 16, **header)
    if kind == "overlay":
        for tag, vr, value in (
            *((0x60000010, "US", 40), (0x60000011, "US", 48), (0x60000040, "CS", "G")),
            *((0x60000050, "SS", [1, 1]), (0x60000100, "US", 16)),
            (0x60000102, "US", 15),
        ):
            dataset.add_new(tag, vr, value)
    dataset.save_as(path, enforce_file_format=True)
    return path, stored


@pytest.mark.parametrize("name", ONE_RULE)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_outside_bits_stored_are_no_pixels_in_any_syntax(
    tmp_path: Path, kind: str, name: str
) -> None:
    path, stored = write_cells(tmp_path / "x", kind, name)
    found = decode_frame(read_dicom(path))
    assert found.dtype == stored.dtype
    assert np.array_equal(found, stored)


@pytest.mark.parametrize("name", ONE_RULE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_phase_1_looks_like_its_original(
    tmp_path: Path, kind: str, name: str
) -> None:
    path, stored = write_cells(tmp_path / "x", kind, name)
    outcome = fase1.convert(fase1.Task(path, tmp_path / "out.dcm", 64))
    assert not outcome.reason
    copy = pydicom.dcmread(tmp_path / "out.dcm")
    assert np.array_equal(np.frombuffer(copy.PixelData, stored.dtype), stored.ravel())
    assert (copy.BitsStored, copy.HighBit) == (12, 11)
    assert ("bits stored 9" in outcome.record["notes"]) == (kind == "nine bits said")
    original = utils.prepare_image(path)
    assert utils.prepare_image(tmp_path / "out.dcm") == original


@pytest.mark.parametrize("overlays", [[12], [13], [15], [12, 13], [14, 15], [13, 15]])
@pytest.mark.parametrize("above", ["zeros", "ones", "sign"])
def test_an_overlay_in_the_bits_above_signed_samples_leaves_their_sign(
    tmp_path: Path, above: str, overlays: list[int]
) -> None:
    stored = exposure(40, 48, 12).astype(np.int16) - 2048
    cells = stored.view(np.uint16) if above == "sign" else stored.view("u2") & 0x0FFF
    cells = cells | 0xF000 if above == "ones" else cells.copy()
    dataset = make(stored, bits=12)
    for number, bit in enumerate(overlays):
        drawn = exposure(40, 48, 1, seed=bit).astype(np.uint16) << bit
        cells = cells & ~np.uint16(1 << bit) | drawn
        dataset.add_new(0x60000102 + number * 0x20000, "US", bit)
    dataset.PixelData = cells.astype("<u2").tobytes()
    dataset.save_as(tmp_path / "x", enforce_file_format=True)
    found = utils.decode(read_dicom(tmp_path / "x"))
    assert found.layout.BitsStored == 12
    assert np.array_equal(utils.frame_of(found), stored)


@pytest.mark.parametrize("name", ["implicit", "explicit"])
def test_padding_has_the_sign_of_the_pixels_where_the_header_says_none(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "x"
    pixels = exposure(40, 48)
    pixels[:, :10] = 7
    write(path, pixels, SYNTAXES[name], PixelPaddingValue=7)
    element = b"\x28\0\x03\x01" + (b"US" if name == "explicit" else b"")
    element += b"\2\0\0\0" + (b"" if name == "explicit" else b"\0\0")
    assert element in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(element, b""))
    fase1.convert(fase1.Task(path, tmp_path / "out.dcm", 64))
    original, copy = (utils.prepare_image(tmp_path / one) for one in ("x", "out.dcm"))
    assert original.view_id == copy.view_id
    assert (original.grey[:, :30] == config.PADDING_GREY).all()


def test_a_lossless_stream_has_no_subsampled_colours(tmp_path: Path) -> None:
    pixels = np.dstack([exposure(40, 48, 8, seed=seed) for seed in range(3)])
    photometric = {"PhotometricInterpretation": "YBR_PARTIAL_422"}
    write(tmp_path / "x", pixels, SYNTAXES["RLE"], bits=8, **photometric)
    assert not fase1.convert(fase1.Task(tmp_path / "x", tmp_path / "out", 64)).reason
    assert pydicom.dcmread(tmp_path / "out").PhotometricInterpretation == "YBR_FULL"
    original, copy = (utils.prepare_image(tmp_path / one) for one in ("x", "out"))
    assert original == copy


def test_bits_named_as_an_overlay_are_no_pixels_beside_its_data(tmp_path: Path) -> None:
    path, stored = write_cells(tmp_path / "x", "overlay", "explicit")
    dataset = pydicom.dcmread(path)
    dataset.add_new(0x60003000, "OW", b"ab")
    dataset.save_as(path)
    notes, pixels = notes_of(path)
    assert notes == ""
    assert np.array_equal(pixels, stored)
    assert pydicom.dcmread(tmp_path / "out.dcm")[0x60003000].value == b"ab"


@pytest.mark.parametrize("name", ["explicit", "RLE"])
def test_an_overlay_in_unused_bits_is_left_out_with_a_note(
    tmp_path: Path, name: str
) -> None:
    path, stored = write_cells(tmp_path / "x", "overlay", name)
    notes, pixels = notes_of(path)
    assert notes == "an overlay in unused bits was left out"
    assert np.array_equal(pixels, stored)
    copy = pydicom.dcmread(tmp_path / "out.dcm")
    assert not [tag for tag in copy.keys() if tag.group == 0x6000]  # noqa: SIM118


def test_a_frame_is_judged_with_the_others_of_its_image(tmp_path: Path) -> None:
    frames = [exposure(40, 48, 12, seed) for seed in range(3)]
    frames[1][:] = frames[1] & 0x0FF | 0x800  # bit 11 varies only between frames
    path = write(tmp_path / "x", frames, uid.RLELossless, 16, BitsStored=9, HighBit=8)
    fase1.convert(fase1.Task(path, tmp_path / "out.dcm", 64))
    original = utils.prepare_image(path)
    assert utils.prepare_image(tmp_path / "out.dcm") == original


@pytest.mark.parametrize("bits", [1, 12])
@pytest.mark.parametrize("frames", [1, 3])
def test_packed_native_samples_are_unpacked(
    tmp_path: Path, bits: int, frames: int
) -> None:
    pixels = [exposure(33, 34, bits, seed) for seed in range(frames)]
    dataset = make(pixels, bits=bits, BitsAllocated=bits)
    flat = np.stack(pixels).ravel().astype(np.int64)
    stream = (flat[:, None] >> np.arange(bits) & 1).astype(np.uint8).ravel()
    dataset.PixelData = np.packbits(stream, bitorder="little").tobytes()
    dataset.save_as(tmp_path / "x", enforce_file_format=True)
    assert not fase1.convert(fase1.Task(tmp_path / "x", tmp_path / "out", 64)).reason
    copy = pydicom.dcmread(tmp_path / "out")
    assert copy.BitsAllocated == (8 if bits == 1 else 16)
    assert np.array_equal(copy.pixel_array, np.squeeze(np.stack(pixels)))
    found = decode_frame(read_dicom(tmp_path / "x"))
    assert np.array_equal(found, pixels[frames // 2])


@pytest.mark.parametrize("name", ["explicit", "JPEG Lossless SV1"])
@pytest.mark.parametrize(
    ("keyword", "value", "note"),
    [
        ("PixelRepresentation", None, "PixelRepresentation was missing: taken as 0"),
        ("BitsStored", None, "BitsStored was missing: taken as 16"),
        ("BitsStored", 0, "BitsStored 0: taken as 16"),
        ("BitsStored", 99, "BitsStored 99: taken as 16"),
        ("HighBit", 3, "HighBit 3: taken as 11"),
        ("SamplesPerPixel", 0, "SamplesPerPixel 0: taken as 1"),
        ("SamplesPerPixel", None, "SamplesPerPixel was missing: taken as 1"),
        ("PhotometricInterpretation", "MONOCHROME", "taken as MONOCHROME2"),
        ("PhotometricInterpretation", "RGB", "RGB: taken as MONOCHROME2"),
        ("PhotometricInterpretation", None, "taken as MONOCHROME2"),
    ],
)
def test_what_a_header_lacks_is_completed_once_for_all_phases(
    tmp_path: Path, name: str, keyword: str, value: object, note: str
) -> None:
    pixels = exposure(40, 48, 12)
    path = write(tmp_path / "x", pixels, SYNTAXES[name], 12, **{keyword: value})
    outcome = fase1.convert(fase1.Task(path, tmp_path / "out.dcm", 64))
    assert note in outcome.record["notes"]
    assert np.array_equal(pydicom.dcmread(tmp_path / "out.dcm").pixel_array, pixels)
    original = utils.prepare_image(path)
    assert utils.prepare_image(tmp_path / "out.dcm") == original


def rle(pixels: Pixels, excess: int) -> bytes:
    """RLE segments that decode to `excess` bytes too many (or, negative, too few)."""
    big = pixels.astype(">u2").tobytes()
    segments = []
    for part in (0, 1):
        plane = big[part::2][: min(excess, 0) or None] + bytes(max(excess, 0))
        rows = [plane[at : at + 128] for at in range(0, len(plane), 128)]
        segments.append(b"".join(bytes([len(row) - 1]) + row for row in rows))
    starts = struct.pack("<16L", 2, 64, 64 + len(segments[0]), *[0] * 13)
    return starts + b"".join(segments)


@pytest.mark.parametrize("excess", [0, 1, 2, 16])
def test_rle_segments_that_are_too_long_are_cut_with_a_note(excess: int) -> None:
    pixels, notes = exposure(), list[str]()
    stream = rle(pixels, excess)
    found = decoded(stream, pixels, notes=notes)
    assert np.array_equal(found, pixels)
    assert notes == (
        [f"{2 * excess} bytes after its RLE segments left out"] * bool(excess)
    )


def test_rle_segments_of_a_larger_image_are_refused() -> None:
    with pytest.raises(RejectedError, match="RLE segments of a larger image"):
        decoded(rle(exposure(), 48), exposure())


def test_rle_segments_that_are_too_short_are_refused() -> None:
    with pytest.raises(RejectedError, match="an RLE segment is too short"):
        decoded(rle(exposure(), -1), exposure())


@pytest.mark.parametrize("name", JPEG)
def test_fill_bytes_before_the_end_marker_are_harmless(name: str) -> None:
    bits = 12 if name == "JPEG Extended" else 8
    pixels = exposure(64, 80, bits)
    pixels[40:] = 0  # a black border: the last samples look as if filled up
    stream = encode_frame(pixels, JPEG[name], bits)
    assert stream.endswith(b"\xff\xd9")
    filled = stream[:-2] + b"\xff\xff\xff\xd9"
    expected = decoded(stream, pixels, bits)
    assert np.array_equal(decoded(filled, pixels, bits), expected)


IDS = {
    row["name"]: row
    for row in utils.read_csv(Path(__file__).with_name("image_ids.csv"))
}
"""What version 1.0 made of pydicom's files and of the generators' images."""


OTHER_VIEWS = ("bundled/examples_palette.dcm", "bundled/693_J2KI.dcm")
"""The colours of the one are looked up now, the other has padding."""


def generated(folder: Path, name: str) -> Path:
    """The file that stands under a name in image_ids.csv."""
    kind, *parts = name.split("/")
    if kind == "bundled":
        return BUNDLED.joinpath(*parts)
    if kind == "phantom64":
        label, seed = parts[0].removesuffix(".dcm")[:-1], int(parts[0][-5])
        return phantoms.write(phantoms.exposure(label, seed, side=64), folder / "x")
    syntax = (SYNTAXES | LOSSY)[parts[0]]
    if parts[1] == "signed":
        pixels = exposure(40, 48, 12).astype(np.int16) - 2048
        return write(folder / "x", pixels, syntax, 12)
    if parts[1] == "colour":
        pixels = np.stack([exposure(40, 48, 8, seed) for seed in range(3)], axis=-1)
        return write(folder / "x", pixels, syntax, 8)
    bits, frames = map(int, parts[1:])
    several = [exposure(40, 48, bits, seed) for seed in range(frames)]
    return write(folder / "x", several, syntax, bits)


@pytest.mark.parametrize("name", IDS)
def test_images_keep_their_ids(tmp_path: Path, name: str) -> None:
    """Hours of answers are kept under them: another dtype would lose them all."""
    path = generated(tmp_path, name)
    found = utils.digest_of(decode_frame(read_dicom(path)))[:16]
    assert found == IDS[name]["image_id"]
    with suppress(RejectedError):  # too small
        picture = utils.prepare_image(path)
        assert picture.image_id[:16] == found
        if name not in OTHER_VIEWS:
            assert picture.view_id[:16] == IDS[name]["view_id"]


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    path = BUNDLED / "examples_palette.dcm"
    grey = utils.prepare_image(path).grey
    fase1.convert(fase1.Task(path, tmp_path / "out.dcm", 64))
    copy = pydicom.dcmread(tmp_path / "out.dcm")
    assert copy.PhotometricInterpretation == "PALETTE COLOR"
    assert np.array_equal(utils.prepare_image(tmp_path / "out.dcm").grey, grey)
    assert (
        utils.prepare_image(path).view_id[:16] != IDS[f"bundled/{path.name}"]["view_id"]
    )


# --- Nothing lost in silence --------------------------------------------------------


def notes_of(path: Path) -> tuple[str, Pixels]:
    """What phase 1 notes of a file, and the pixels that it writes."""
    target = path.with_name("out.dcm")
    outcome = fase1.convert(fase1.Task(path, target, 64))
    assert not outcome.reason
    return outcome.record["notes"], pydicom.dcmread(target).pixel_array


@pytest.mark.parametrize("name", [*CODECS, "explicit"])
def test_a_second_frame_that_the_header_does_not_know_is_noted(
    tmp_path: Path, name: str
) -> None:
    frames = [exposure(seed=seed) for seed in range(2)]
    path = write(tmp_path / "x", frames, SYNTAXES[name], NumberOfFrames=None)
    notes, pixels = notes_of(path)
    assert "left out" in notes
    assert np.array_equal(pixels, frames[0])
    assert np.array_equal(decode_frame(read_dicom(path)), frames[0])


@pytest.mark.parametrize("name", ["explicit", "implicit", "big endian", "RLE"])
@pytest.mark.parametrize("rest", [b"\0" * 20, b"ABCDE", b"ABCDEFGHIJKLMNOP"])
def test_data_after_the_dataset_are_noted(
    tmp_path: Path, name: str, rest: bytes
) -> None:
    path = write(tmp_path / "x", exposure(), SYNTAXES[name])
    path.write_bytes(path.read_bytes() + rest)
    notes, pixels = notes_of(path)
    assert notes == f"{len(rest)} bytes after the dataset left out"
    assert np.array_equal(pixels, exposure())


def splice(path: Path, element: bytes) -> Path:
    """Put raw bytes before the first element of group 0028."""
    data = path.read_bytes()
    at = data.index(b"\x28\0\x02\0US")
    path.write_bytes(data[:at] + element + data[at:])
    return path


@pytest.mark.parametrize("vr", [b"  ", b"--", b"??", b"ZZ"])
def test_a_first_element_without_a_known_vr_is_read(tmp_path: Path, vr: bytes) -> None:
    path = write(tmp_path / "x", exposure(), SpecificCharacterSet="ISO_IR 100")
    data = path.read_bytes()
    at = data.index(b"\x08\0\x05\0CS")
    path.write_bytes(data[: at + 4] + vr + data[at + 6 :])
    notes, pixels = notes_of(path)
    assert notes == f"the unknown VR {vr.decode()!r} became UN"
    assert np.array_equal(pixels, exposure())


def test_compressed_pixels_of_the_vr_un_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x", exposure(), uid.JPEGLSLossless)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\xe0\x7f\x10\0OB", b"\xe0\x7f\x10\0UN"))
    notes, pixels = notes_of(path)
    assert notes == "its compressed pixels had the VR UN"
    assert np.array_equal(pixels, exposure())


def test_an_element_that_stands_twice_is_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "x", exposure(), KVP="60")
    kvp = b"\x18\0\x60\0DS\2\0"
    data = path.read_bytes().replace(kvp + b"60", kvp + b"60" + kvp + b"80")
    path.write_bytes(data)
    notes, _ = notes_of(path)
    assert notes == "(0018,0060) stands there again: the last is kept"


@pytest.mark.parametrize("length", [0, 8])
def test_a_stray_item_is_left_out_with_a_note(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x", exposure(), uid.RLELossless)
    item = struct.pack("<HHL", 0xFFFE, 0xE000, length) + b"x" * length
    notes, pixels = notes_of(splice(path, item))
    assert f"(FFFE,E000) of {length} bytes left out" in notes
    assert np.array_equal(pixels, exposure())


def test_elements_of_the_file_meta_group_have_no_place_in_the_dataset(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "x", exposure())
    element = struct.pack("<HH2sH", 0x0002, 0x0010, b"UI", 2) + b"1\0"
    notes, pixels = notes_of(splice(path, element))
    assert "(0002,0010) of 2 bytes left out" in notes
    assert np.array_equal(pixels, exposure())


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
def test_elements_of_a_command_have_no_place_in_the_dataset(
    tmp_path: Path, syntax: uid.UID
) -> None:
    path = write(tmp_path / "x", exposure(), syntax)
    data = path.read_bytes()
    at = 144 + struct.unpack_from("<L", data, 140)[0]
    element = struct.pack("<HH2sHH", 0, 0x0100, b"US", 2, 1)
    path.write_bytes(data[:at] + element + data[at:])
    notes, pixels = notes_of(path)
    assert notes == "(0000,0100) of 2 bytes left out: it has no place there"
    assert np.array_equal(pixels, exposure())


@pytest.mark.parametrize("name", ["JPEG Lossless SV1", "JPEG-LS", "JPEG 2000", "HTJ2K"])
@pytest.mark.parametrize("twice", [False, True])
def test_what_is_behind_a_codestream_is_noted(
    tmp_path: Path, name: str, twice: bool
) -> None:
    path = write(tmp_path / "x", exposure(), SYNTAXES[name])
    dataset = pydicom.dcmread(path)
    [stream] = generate_frames(dataset.PixelData, number_of_frames=1)
    rest = stream if twice else bytes(300)
    dataset.PixelData = encapsulate([stream + rest])
    dataset.save_as(path)
    notes, pixels = notes_of(path)
    assert notes.endswith("bytes after its codestream left out")
    assert abs(int(notes.split()[0]) - len(rest)) <= 1  # a stream may end in padding
    assert np.array_equal(pixels, exposure())


def test_data_after_a_deflated_dataset_are_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "x", exposure(), uid.DeflatedExplicitVRLittleEndian)
    path.write_bytes(path.read_bytes() + b"rest")
    notes, pixels = notes_of(path)
    assert re.fullmatch("[45] bytes after the deflated dataset left out", notes)
    assert np.array_equal(pixels, exposure())


@pytest.mark.parametrize("said", ["1A", "0"])
def test_a_number_of_frames_that_is_none_is_mended(tmp_path: Path, said: str) -> None:
    path = write(tmp_path / "x", exposure(), NumberOfFrames="7")
    data = path.read_bytes()
    path.write_bytes(
        data.replace(b"IS\x02\x007 ", b"IS\x02\x00" + said.ljust(2).encode())
    )
    notes, pixels = notes_of(path)
    assert notes == f"NumberOfFrames {said}: taken as 1"
    assert np.array_equal(pixels, exposure())


def test_a_palette_that_cant_be_used_is_refused(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(BUNDLED / "examples_palette.dcm")
    del dataset.RedPaletteColorLookupTableData
    dataset.save_as(tmp_path / "x")
    with pytest.raises(RejectedError, match="palette can't be used"):
        utils.prepare_image(tmp_path / "x")


@pytest.mark.parametrize("name", ["RLE", "JPEG-LS", "HTJ2K"])
def test_compressed_pixels_without_a_delimiter_are_read_with_a_note(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / "x", exposure(), SYNTAXES[name])
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"\xfe\xff\xdd\xe0")])
    notes, pixels = notes_of(path)
    assert notes == "its compressed pixels had no delimiter at their end"
    assert np.array_equal(pixels, exposure())


def test_nothing_is_written_to_what_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x", exposure(), uid.RLELossless)
    before = path.read_bytes(), path.stat().st_mtime_ns
    decode_frame(read_dicom(path))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_the_dataset_keeps_its_attributes(tmp_path: Path) -> None:
    path = write(tmp_path / "x", exposure(), PatientName="Jörg^Test")
    assert read_dicom(path).Modality == pydicom.dcmread(path).Modality
