"""utils.py: errors, files and the image preparation."""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import phantoms
import pydicom
import pytest
from dicom_samples import posix
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileDataset
from pydicom.tag import Tag

import config
import utils
from utils import PipelineError, RejectedError, prepare_image

# --- Errors -------------------------------------------------------------------------


def failing(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PipelineError("x is missing: do y"), 2, "x is missing: do y"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left", "f"), 2, "make room"),
        (PermissionError(errno.EACCES, "denied", "f"), 2, "permission"),
        (OSError(errno.EROFS, "Read-only", "f"), 2, "can be written"),
    ],
)
def test_what_a_user_causes_is_one_line_and_a_code(
    error: BaseException, code: int, words: str
) -> None:
    lines: list[str] = []
    assert utils.exit_code(lambda: failing(error), lines.append) == code
    assert len(lines) == 1
    assert words in lines[0]


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        utils.exit_code(lambda: failing(ZeroDivisionError()), print)


@posix  # a shell
def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "import utils; utils.exit_code(lambda: print('x' * 10**6) or 0, print)"
    done = subprocess.run(
        f"{sys.executable} -c {shlex.quote(code)} | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(utils.__file__).parent,
    )
    assert (done.stdout, done.stderr) == ("x", "")


# --- Files --------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def write_half() -> None:
        with utils.atomic_write(path) as file:
            file.write(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_succeeds_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "f"
    with utils.atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_the_final_name_appears_only_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with utils.atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert not path.exists()


@given(st.lists(st.dictionaries(st.sampled_from("ab"), st.text(), min_size=2)))
@settings(max_examples=30, deadline=None)
def test_csv_rows_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    kept = [{k: v for k, v in row.items() if v.isprintable() and v} for row in rows]
    full = [row for row in kept if len(row) == 2]
    utils.write_csv(path, ("a", "b"), full)
    assert utils.read_csv(path) == full


def test_a_name_that_is_not_utf_8_comes_back_from_a_csv(tmp_path: Path) -> None:
    name = b"\xff.dcm".decode("utf-8", "surrogateescape")
    utils.write_csv(tmp_path / "t.csv", ("a",), [{"a": name}])
    assert utils.read_csv(tmp_path / "t.csv") == [{"a": name}]


def test_a_csv_begins_with_a_bom_and_is_read_with_and_without(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    utils.write_csv(path, ("a",), [{"a": "ñ"}])
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    path.write_bytes(path.read_bytes()[3:])
    assert utils.read_csv(path) == [{"a": "ñ"}]


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_bad_manifest_is_named_with_its_remedy(
    tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "m.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PipelineError, match=r"m\.json.*do that"):
        utils.read_json(path, "do that")


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FINITE, min_size=1))
def test_a_vector_survives_packing(values: list[float]) -> None:
    vector = np.array(values, np.float32)
    assert np.array_equal(utils.unpack_vector(utils.pack_vector(vector)), vector)


@pytest.mark.parametrize("packed", [None, 5, "AAA~AAAA", "AAAAA", "AACAfw=="])
def test_a_damaged_vector_is_none(packed: object) -> None:
    assert utils.unpack_vector(packed).shape == (0,)


# --- Image preparation --------------------------------------------------------------


def saved(folder: Path, pixels: NDArray[np.uint16], **attributes: object) -> Path:
    """A DICOM file with these pixels and attributes."""
    dataset: FileDataset = phantoms.exposure("FDT", 0, side=32)
    for name in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        if name in dataset:
            delattr(dataset, name)
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelData = pixels.astype("<u2").tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return phantoms.write(dataset, folder / f"{len(list(folder.iterdir()))}.dcm")


def noise(
    mean: float, sd: float, shape: tuple[int, int] = (700, 700)
) -> NDArray[np.uint16]:
    values = np.random.default_rng(0).normal(mean, sd, shape)
    return np.clip(np.rint(values), 0, 65535).astype(np.uint16)


def half_plane(low: int, high: int) -> NDArray[np.uint16]:
    pixels = np.full((400, 400), low, np.uint16)
    pixels[:, 200:] = high
    return pixels


def test_the_vlm_gets_a_square_8_bit_picture_of_its_input_size(tmp_path: Path) -> None:
    grey = prepare_image(saved(tmp_path, noise(1000, 10))).grey
    assert grey.shape == (config.IMAGE_SIDE_PX, config.IMAGE_SIDE_PX)
    assert grey.dtype == np.uint8


@pytest.mark.parametrize("sd", [1, 10, 200])
def test_the_noise_of_a_flat_field_does_not_fill_the_grey_range(
    tmp_path: Path, sd: float
) -> None:
    grey = prepare_image(saved(tmp_path, noise(5000, sd))).grey
    assert grey.std() < 255 / config.WINDOW_MIN_NOISE_SDS * 1.3


def test_an_image_in_a_sliver_of_its_range_still_shows_its_edge(tmp_path: Path) -> None:
    grey = prepare_image(saved(tmp_path, half_plane(63000, 65000))).grey
    assert grey[100, 50] == 0
    assert grey[100, 300] == 255


def test_monochrome1_is_shown_inverted(tmp_path: Path) -> None:
    pixels = half_plane(100, 4000)
    bright_right = prepare_image(saved(tmp_path, pixels)).grey
    inverted = saved(tmp_path, pixels, PhotometricInterpretation="MONOCHROME1")
    assert (
        np.abs(255 - bright_right.astype(int) - prepare_image(inverted).grey).max() <= 1
    )


def test_a_falling_rescale_slope_inverts(tmp_path: Path) -> None:
    path = saved(
        tmp_path, half_plane(100, 4000), RescaleSlope="-1", RescaleIntercept="4095"
    )
    grey = prepare_image(path).grey
    assert grey[100, 50] > grey[100, 300]


def test_proportions_are_kept_and_the_rest_is_padding(tmp_path: Path) -> None:
    grey = prepare_image(saved(tmp_path, half_plane(0, 9)[:200])).grey
    assert set(grey[:80].ravel()) == {config.PADDING_GREY}
    assert config.PADDING_GREY not in grey[100:230, 20:150]


def test_pixels_that_are_not_square_are_shown_in_true_proportions(
    tmp_path: Path,
) -> None:
    path = saved(tmp_path, half_plane(0, 9)[:200], PixelSpacing=["0.4", "0.2"])
    grey = prepare_image(path).grey
    assert config.PADDING_GREY not in np.unique(grey[:5])


def test_a_few_dead_pixels_do_not_set_the_window(tmp_path: Path) -> None:
    pixels = half_plane(1000, 2000)
    pixels[::97, ::89] = 65535
    grey = prepare_image(saved(tmp_path, pixels)).grey
    assert np.median(grey[:, 200:]) > 200


def test_an_image_without_contrast_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="every pixel is 7"):
        prepare_image(saved(tmp_path, np.full((50, 50), 7, np.uint16)))


@pytest.mark.parametrize("syntax", [*phantoms.TRANSFER_SYNTAXES])
def test_an_image_keeps_its_id_in_every_lossless_syntax(
    tmp_path: Path, syntax: str
) -> None:
    plain = phantoms.exposure("TOR", 1, side=96)
    same = phantoms.compress(plain, syntax)
    first = prepare_image(phantoms.write(plain, tmp_path / "a"))
    second = prepare_image(phantoms.write(same, tmp_path / "b"))
    assert first == second


def test_a_changed_pixel_changes_the_image_id(tmp_path: Path) -> None:
    pixels = half_plane(1, 2)
    first = prepare_image(saved(tmp_path, pixels)).image_id
    pixels[0, 0] = 3
    assert prepare_image(saved(tmp_path, pixels)).image_id != first


def test_only_the_header_differs_only_the_view_differs(tmp_path: Path) -> None:
    pixels = half_plane(1, 2)
    first = prepare_image(saved(tmp_path, pixels))
    other = saved(tmp_path, pixels, PhotometricInterpretation="MONOCHROME1")
    second = prepare_image(other)
    assert first.image_id == second.image_id
    assert first.view_id != second.view_id


@pytest.mark.parametrize("shape", [(32, 900), (5000, 40)])
def test_long_shapes_are_prepared_all_the_same(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    pixels = np.arange(shape[0] * shape[1], dtype=np.uint16).reshape(shape)
    assert prepare_image(saved(tmp_path, pixels)).grey.shape == (336, 336)


@pytest.mark.parametrize("shape", [(1, 2), (16, 16), (31, 900), (5000, 31)])
def test_an_image_of_too_few_pixels_is_refused(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    pixels = np.arange(shape[0] * shape[1], dtype=np.uint16).reshape(shape)
    path = saved(tmp_path, pixels)
    with pytest.raises(RejectedError, match=r"too small: .* 32 a side are needed"):
        prepare_image(path)


def bordered(value: int, **attributes: object) -> tuple[NDArray[Any], dict[str, Any]]:
    """An edge of 1000 and 1300 with a border of padding, and what its header says."""
    rng = np.random.default_rng(0)
    edge = half_plane(1000, 1300) + rng.normal(0, 10, (400, 400))
    framed = np.full((500, 500), value, np.int32)
    framed[50:-50, 50:-50] = np.rint(edge)
    return framed.astype(np.uint16), {"PixelPaddingValue": value, **attributes}


@pytest.mark.parametrize("value", [0, 65535, -32768])
def test_padding_has_no_part_in_the_picture(tmp_path: Path, value: int) -> None:
    pixels, attributes = bordered(value, PixelRepresentation=int(value < 0))
    plain = prepare_image(saved(tmp_path, pixels[50:-50, 50:-50])).grey
    path = saved(tmp_path, pixels, **attributes)
    grey = prepare_image(path).grey.astype(int)
    assert (grey[:30] == config.PADDING_GREY).all()
    assert (grey[:, -30:] == config.PADDING_GREY).all()
    for part, whole in ((slice(60, 150), 84), (slice(186, 276), 252)):
        assert abs(np.median(grey[100:236, part]) - np.median(plain[:, whole])) <= 4


def test_padding_may_be_a_range(tmp_path: Path) -> None:
    pixels, _ = bordered(65535)
    pixels[:50] = 65530
    limits = {"PixelPaddingValue": 65535, "PixelPaddingRangeLimit": 65530}
    grey = prepare_image(saved(tmp_path, pixels, **limits)).grey
    assert (grey[:30] == config.PADDING_GREY).all()
    assert (grey[-30:] == config.PADDING_GREY).all()
    assert np.ptp(grey[100:236, 60:276].astype(int)) > 100


@pytest.mark.parametrize("value", [None, 7, 60000])
def test_a_padding_value_that_no_pixel_has_changes_nothing(
    tmp_path: Path, value: int | None
) -> None:
    plain = prepare_image(saved(tmp_path, half_plane(1000, 1300)))
    path = saved(tmp_path, half_plane(1000, 1300), PixelPaddingValue=value)
    assert prepare_image(path).view_id == plain.view_id


def test_nothing_but_padding_is_no_image(tmp_path: Path) -> None:
    pixels = np.full((50, 50), 9, np.uint16)
    with pytest.raises(RejectedError, match="every pixel is padding"):
        prepare_image(saved(tmp_path, pixels, PixelPaddingValue=9))


HEADER_NUMBERS = [
    ("PixelSpacing", b"0,143\\0,143"),
    ("PixelSpacing", b"0.1mm\\0.1mm"),
    ("ImagerPixelSpacing", b"  inf\\0.143"),
    ("ImagerPixelSpacing", b"1e300\\1e-30"),
    ("PixelSpacing", b"10.0\\0.1"),
    ("PixelAspectRatio", b"1:1  \\1:1  "),
    ("RescaleSlope", b"1,25       "),
    ("RescaleSlope", b"N/A        "),
    ("RescaleSlope", b"1\\1        "),
    ("ExposureInuAs", b"1,7        "),
]


@pytest.mark.parametrize(("keyword", "bad"), HEADER_NUMBERS)
def test_a_header_number_that_is_none_is_as_if_it_were_not_there(
    tmp_path: Path, keyword: str, bad: bytes
) -> None:
    good = prepare_image(saved(tmp_path, half_plane(0, 900)))
    path = saved(tmp_path, half_plane(0, 900))
    dataset = pydicom.dcmread(path)
    bad += b" " * (len(bad) % 2)
    tag = Tag(tag_for_keyword(keyword) or 0)
    dataset[tag] = RawDataElement(tag, "DS", len(bad), bad, 0, False, True)
    dataset.save_as(path)
    assert bad in path.read_bytes()
    assert prepare_image(path).view_id == good.view_id


def test_a_spacing_of_a_text_vr_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path, half_plane(0, 900))
    dataset = pydicom.dcmread(path)
    dataset.add_new(0x00280030, "UT", "2.0\\1.0")
    dataset.save_as(path)
    tall = prepare_image(path).grey
    assert (tall[:, 0] == config.PADDING_GREY).all()
    assert (tall[0] != config.PADDING_GREY).any()


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"LUTDescriptor": [4096, 2**15, 16]},
        {"LUTDescriptor": [2, 0, 16], "LUTData": b""},
    ],
)
def test_a_modality_table_that_cant_be_read_is_none(
    tmp_path: Path, table: dict[str, Any]
) -> None:
    path = saved(tmp_path, half_plane(0, 900))
    good = prepare_image(path)
    dataset, item = pydicom.dcmread(path), pydicom.Dataset()
    for keyword, value in table.items():
        vr = "US" if keyword == "LUTDescriptor" else "OW"
        item.add_new(keyword, vr, value)
    dataset.ModalityLUTSequence = [item]
    dataset.save_as(path)
    assert prepare_image(path).view_id == good.view_id


@pytest.mark.parametrize("error", [MemoryError, TypeError, OverflowError, OSError])
def test_whatever_a_file_provokes_is_its_own_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def provoke(*_: object) -> None:
        raise error("by this file")

    path = saved(tmp_path, half_plane(0, 900))
    monkeypatch.setattr(utils, "decode", provoke)
    with pytest.raises(RejectedError, match="can't be"):
        prepare_image(path)


def test_the_preparation_constants_are_in_the_manifest() -> None:
    assert utils.preparation()["window_min_noise_sds"] == config.WINDOW_MIN_NOISE_SDS


# --- Files on Windows, and several writers ------------------------------------------


def test_a_file_that_is_open_elsewhere_is_tried_again_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, rename = [1, 2, 3], os.replace

    def replace(*paths: Path) -> None:
        if held:
            held.pop()
            error = PermissionError(13, "in use")
            error.winerror = 32  # type: ignore[attr-defined]
            raise error
        rename(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with utils.atomic_write(tmp_path / "f") as file:
        file.write(b"new")
    assert (tmp_path / "f").read_bytes() == b"new"


def test_a_file_that_stays_open_elsewhere_says_what_to_close() -> None:
    error = PermissionError(13, "in use", "r.csv")
    error.winerror = 32  # type: ignore[attr-defined]
    lines: list[str] = []
    assert utils.exit_code(lambda: failing(error), lines.append) == 2
    assert "close it in the program that has it open, such as Excel" in lines[0]


def test_two_writers_of_one_file_have_temporary_files_of_their_own(
    tmp_path: Path,
) -> None:
    path = tmp_path / "f"
    with utils.atomic_write(path) as one, utils.atomic_write(path) as other:
        one.write(b"one")
        other.write(b"other")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "number", [errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.EINVAL]
)
def test_a_drive_that_goes_away_is_one_line_with_a_remedy(number: int) -> None:
    lines: list[str] = []
    gone = OSError(number, "gone", "f")
    assert utils.exit_code(lambda: failing(gone), lines.append) == 2
    assert "reconnect the drive" in lines[0]


# --- The journal --------------------------------------------------------------------


def test_damaged_torn_and_foreign_lines_cost_only_themselves(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = utils.Journal(path)
    journal.add({"key": "a", "n": 1}, {"key": "b", "n": 2})
    with path.open("ab") as file:
        file.write(b'\x00\xff\n[1]\n{"no": "key"}\n{"key": "torn", "n')
    journal.add({"key": "c", "n": 3})
    found = dict(utils.Journal(path).items())
    assert found == {"a": {"n": 1}, "b": {"n": 2}, "c": {"n": 3}}


def test_the_newest_record_of_a_key_counts_whoever_wrote_it(tmp_path: Path) -> None:
    one, other = (
        utils.Journal(tmp_path / "j.jsonl", lock_file=tmp_path / ".lock")
        for _ in range(2)
    )
    one.add({"key": "a", "by": "one"})
    other.add({"key": "a", "by": "other"})
    one.refresh()
    assert one.get("a") == {"by": "other"}


def test_a_journal_whose_folder_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    folder = tmp_path / "drive"
    folder.mkdir()
    journal = utils.Journal(folder / "j.jsonl", lock_file=folder / ".lock")
    journal.add({"key": "a"})
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="drive"):
        journal.add({"key": "b"})


# --- The second reader's view of the picture ------------------------------------------


def textured(shape: tuple[int, int] = (336, 336)) -> NDArray[np.uint8]:
    """An edge, a disc and grain, without any symmetry."""
    down, across = np.indices(shape)
    grey = 90.0 + 60 * (across + down / 9 > 150) - 40 * (np.hypot(down, across) < 99)
    grey += np.random.default_rng(0).normal(0, 6, shape)
    return np.clip(grey, 0, 255).astype(np.uint8)


def statistics(view: NDArray[np.uint8]) -> NDArray[np.float32]:
    found = utils.picture_statistics(np.ascontiguousarray(view))
    assert found.shape == (40,)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    return found


def test_mirror_images_and_quarter_turns_have_the_same_statistics() -> None:
    view = textured()
    for other in (view[::-1], view[:, ::-1], view.T, np.rot90(view)):
        assert statistics(other) == pytest.approx(statistics(view), abs=1e-5)


@pytest.mark.parametrize(
    "shape", [(1, 336), (2, 336), (3, 336), (336, 1), (336, 336), (90, 335)]
)
@pytest.mark.parametrize("grey", [0, 255, config.PADDING_GREY])
def test_strips_and_empty_pictures_have_finite_statistics(
    shape: tuple[int, int], grey: int
) -> None:
    statistics(np.full(shape, grey, np.uint8))


def test_a_black_picture_shares_its_power_evenly() -> None:
    found = statistics(np.zeros((336, 336), np.uint8))
    assert found[:10] == pytest.approx(np.log(0.1 + 1e-6), abs=1e-6)
    assert not found[10:28].any()


def test_padding_counts_for_nothing() -> None:
    """The same picture alone and between two bars of padding."""
    content = textured((200, 336))
    view = np.full((336, 336), config.PADDING_GREY, np.uint8)
    view[68:268] = content
    assert statistics(view) == pytest.approx(statistics(content), abs=1e-6)


def test_an_odd_number_of_padding_lines_leaves_one() -> None:
    content = textured((201, 336))
    view = np.full((336, 336), config.PADDING_GREY, np.uint8)
    view[67:268] = content
    assert statistics(view) == pytest.approx(statistics(view[67:269]), abs=1e-6)


def bars_at(frequency: float, angle: float) -> NDArray[np.uint8]:
    down, across = np.indices((336, 336))
    along = across * np.cos(angle) + down * np.sin(angle)
    grey = np.rint(120 + 80 * np.sin(2 * np.pi * frequency * along))
    return np.asarray(grey, np.uint8)


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.2])
def test_bars_stand_in_the_ring_of_their_frequency_and_keep_one_direction(
    angle: float,
) -> None:
    edges = [0, *np.geomspace(0.012, 0.5, 10)]
    for ring in (4, 6, 8):
        frequency = np.sqrt(edges[ring] * edges[ring + 1]) / 2  # of the full picture
        found = statistics(bars_at(frequency, angle))
        assert found[:10].argmax() == ring
        assert found[10 + ring - 1] > 0.95


def test_crossed_bars_have_two_directions_and_not_one() -> None:
    crossed = bars_at(0.05, 0.3) / 2 + bars_at(0.05, 0.3 + np.pi / 2) / 2
    found = statistics(np.rint(crossed).astype(np.uint8))
    ring = int(found[:10].argmax())
    assert found[10 + ring - 1] < 0.1
    assert found[19 + ring - 1] > 0.9


def test_grain_shares_are_of_one_whole_and_know_noise_from_calm() -> None:
    calm = statistics(np.full((336, 336), 99, np.uint8))[30:]
    rough = statistics(textured())[30:]
    assert np.sum(calm**2) == pytest.approx(1)
    assert np.sum(rough**2) == pytest.approx(1)
    assert calm[0] == 1
    assert rough[9] > 0.3
