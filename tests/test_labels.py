"""Phase 1's contact sheet, and what --labels does with the lists that a page saves."""

import csv
import io
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import phantoms
import pytest
from dicom_samples import posix
from PIL import Image
from test_fase1 import convert_here
from test_page import Parsed

import config
import fase1_descompresion as fase1
import utils


@pytest.fixture(autouse=True)
def _no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    convert_here(monkeypatch)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder in which phase 1 has written two images of each class."""
    base = tmp_path_factory.mktemp("written")
    for label in phantoms.LABELS:
        for seed in range(2):
            path = base / "input_dicom" / f"{label}{seed}.dcm"
            phantoms.write(phantoms.exposure(label, seed, side=256), path)
    assert phase1(base) == 0
    return base


@pytest.fixture
def base(tmp_path: Path, written: Path) -> Path:
    """The same, to do with it what one likes."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path


def phase1(base: Path, *flags: object) -> int:
    return fase1.main(["--base", str(base), *map(str, flags)])


def names(base: Path) -> list[str]:
    return [row["output"] for row in manifest(base)]


def manifest(base: Path) -> list[dict[str, str]]:
    return utils.read_csv(base / "f1_descomprimidos" / config.FILE_LIST)


def list_of(base: Path, *rows: Sequence[str]) -> Path:
    """A list as a page saves it."""
    path = base / f"etiquetas_{len(list(base.glob('etiq*')))}.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("file", "class"), *rows])
    return path


def labelled(base: Path) -> list[str]:
    folder = base / "datos_etiquetados"
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    )


def sheet(base: Path) -> Parsed:
    path = base / "f1_descomprimidos" / config.SHEET
    return Parsed(path.read_text("utf-8"))


# --- The contact sheet --------------------------------------------------------------


def test_the_sheet_shows_every_image_in_the_order_of_the_list(base: Path) -> None:
    page = sheet(base)
    assert page.all("article", "data-file") == names(base)
    assert len(page.all("img", "src")) == 6
    for row in manifest(base):
        for value in (
            *(row["output"], f"{row['kvp']} kVp", f"{row['mas']} mAs"),
            *(f"index {row['exposure_index']}", f"{row['rows']} × {row['columns']}"),
            *(row["detector"], row["timestamp"][9:11] + ":" + row["timestamp"][11:13]),
        ):
            assert value in page.text


def test_a_labelled_image_stays_on_the_sheet_with_its_class(base: Path) -> None:
    first, second, *others = names(base)
    source = base / "f1_descomprimidos"
    (source / first).rename(base / "datos_etiquetados" / "MTF" / first)
    (source / second).rename(base / "datos_etiquetados" / "TOR" / "renamed.dcm")
    assert phase1(base) == 0
    page = sheet(base)
    assert page.all("article", "data-label") == ["MTF", "TOR", "", "", "", ""]
    assert page.all("article", "data-file") == ["", "", *others]
    assert len(page.all("img", "src")) == 6


def test_a_lost_thumbnail_is_made_again_from_the_output(base: Path) -> None:
    second = names(base)[1]
    folder = base / "f1_descomprimidos"
    before = sheet(base).all("img", "src")
    shutil.rmtree(folder / config.SHEET_THUMBNAILS)
    (folder / second).rename(base / "datos_etiquetados" / "FDT" / second)
    shutil.rmtree(base / "input_dicom")
    (base / "input_dicom").mkdir()
    phantoms.write(phantoms.exposure("FDT", 900), base / "input_dicom" / "new.dcm")
    assert phase1(base) == 0
    after = sheet(base).all("img", "src")
    assert set(before) <= set(after)
    assert len(after) == 7


def test_a_lost_page_of_several_is_made_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "PAGE_TILES", 4)
    (base / "f1_descomprimidos" / config.SHEET).unlink()
    assert phase1(base) == 0
    second = base / "f1_descomprimidos" / "vista_previa_2.html"
    content = second.read_bytes()
    second.unlink()
    assert phase1(base) == 0
    assert second.read_bytes() == content


def test_a_run_without_news_makes_no_page(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert phase1(base) == 0
    pages: list[Path] = []
    monkeypatch.setattr(utils, "page", lambda path, _: pages.append(path))
    assert phase1(base) == 0
    assert not pages


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("inverted", [False, True])
def test_a_thumbnail_is_nearly_what_the_vlm_sees(
    tmp_path: Path, frames: int, inverted: bool
) -> None:
    dataset = phantoms.exposure("MTF", 3, side=700)
    if inverted:
        dataset.PhotometricInterpretation = "MONOCHROME1"
    if frames > 1:
        empty = bytes(len(dataset.PixelData))
        dataset.NumberOfFrames = frames
        dataset.PixelData = empty + dataset.PixelData + empty
    path = phantoms.write(dataset, tmp_path / "image.dcm")
    read = utils.read_dicom(path)
    jpeg = utils.preview(utils.decode(read), read)
    seen = utils.thumbnail(utils.prepare_image(path).grey)
    quick, exact = (
        np.asarray(Image.open(io.BytesIO(one)), np.float64) for one in (jpeg, seen)
    )
    assert np.abs(np.subtract(quick.shape, exact.shape)).max() <= 1
    rows, columns = np.minimum(quick.shape, exact.shape)
    near = np.corrcoef(quick[:rows, :columns].ravel(), exact[:rows, :columns].ravel())
    assert near[0, 1] > 0.95


def test_various_first_begins_with_images_of_different_looks() -> None:
    """Three kinds in runs of ten: the first three are one of each."""
    kinds = [np.zeros((8, 8)), np.eye(8) * 255, np.full((8, 8), 255)]
    jpegs = [utils.thumbnail(kinds[at // 10].astype(np.uint8)) for at in range(30)]
    places = utils.various(jpegs)
    assert sorted(places.index(place) // 10 for place in range(3)) == [0, 1, 2]
    assert sorted(places) == list(range(30))


def test_an_image_that_can_not_be_shown_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(utils, "preview", fails)
    path = phantoms.write(
        phantoms.exposure("FDT", 1), tmp_path / "input_dicom" / "in.dcm"
    )
    outcome = fase1.convert(fase1.Task(path, tmp_path / "out.tmp", 100))
    assert (outcome.reason, outcome.thumbnail) == ("", b"")
    assert phase1(tmp_path) == 0
    assert names(tmp_path) == sheet(tmp_path).all("article", "data-file")
    assert sheet(tmp_path).all("img", "src") == []


# --- --labels -----------------------------------------------------------------------


def test_marked_files_are_moved_into_their_classes(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third, *others = names(base)
    lists = (
        list_of(base, (first, "MTF"), (second, "FDT")),
        list_of(base, (third, "Las Vegas 2")),
    )
    content = (base / "f1_descomprimidos" / first).read_bytes()
    assert phase1(base, "--labels", *lists) == 0
    assert labelled(base) == [f"FDT/{second}", f"Las Vegas 2/{third}", f"MTF/{first}"]
    assert (base / "datos_etiquetados" / "MTF" / first).read_bytes() == content
    assert sorted(p.name for p in (base / "f1_descomprimidos").glob("*.dcm")) == sorted(
        others
    )
    out = capsys.readouterr().out
    assert f"moved {first} to MTF" in out
    assert out.splitlines()[-1] == "labelled: MTF 1, FDT 1, Las Vegas 2 1"


def test_a_second_run_with_the_same_list_moves_nothing(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = names(base)[0]
    path = list_of(base, (first, "MTF"))
    assert phase1(base, "--labels", path) == 0
    assert phase1(base, "--labels", path) == 1
    assert labelled(base) == [f"MTF/{first}"]
    assert re.search(f"left: {first}, MTF: is in .*MTF already", caplog.text)


def test_a_dry_run_says_the_same_and_does_nothing(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = names(base)[0]
    path = list_of(base, (first, "MTF"), ("strange.dcm", "MTF"))
    assert phase1(base, "--labels", path, "--dry-run") == 1
    assert labelled(base) == []
    out = capsys.readouterr().out
    assert f"would move {first} to MTF" in out
    assert out.splitlines()[-1] == "would be labelled: MTF 1"


def test_labels_do_only_this(base: Path) -> None:
    phantoms.write(phantoms.exposure("FDT", 900), base / "input_dicom" / "new.dcm")
    before = names(base)
    assert phase1(base, "--labels", list_of(base, (before[0], "MTF"))) == 0
    assert names(base) == before


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([("{0}", "MTF"), ("{0}", "MTF")], "stands in 2 lines"),
        ([("{0}", "MTF"), ("{0}", "FDT")], "stands in 2 lines"),
        ([("{0}", "")], "can't be the name of a class folder"),
        ([("{0}", "..")], "can't be the name of a class folder"),
        ([("{0}", "a/b")], "can't be the name of a class folder"),
        ([("{0}", ".hidden")], "can't be the name of a class folder"),
        ([("{0}", "mtf")], "differ only in case"),
        ([("{0}", "No Concluyente")], "is what phase 4 says"),
        ([("sub/{0}", "MTF")], "neither a file of phase 1's nor an absolute path"),
        ([("../f1_descomprimidos/{0}", "MTF")], "neither a file of phase 1's"),
        ([("manifiesto.csv", "MTF")], "neither a file of phase 1's"),
        ([("{base}/nowhere/x.dcm", "MTF")], "is not there"),
        ([("{base}/other.txt", "MTF")], "DICOM"),
        ([("{base}/input_dicom", "MTF")], "is not there"),
    ],
)
def test_what_is_not_clear_stays_where_it_is(
    base: Path,
    caplog: pytest.LogCaptureFixture,
    rows: list[tuple[str, str]],
    reason: str,
) -> None:
    (base / "other.txt").write_text("not an image " * 50)
    first = names(base)[0]
    filled = [(file.format(first, base=base), label) for file, label in rows]
    assert phase1(base, "--labels", list_of(base, *filled)) == 1
    assert labelled(base) == []
    assert (base / "f1_descomprimidos" / first).exists()
    assert reason in caplog.text


def test_a_bad_line_keeps_no_other_from_its_class(base: Path) -> None:
    first, second, *_ = names(base)
    assert phase1(base, "--labels", list_of(base, (first, "mtf"), (second, "MTF"))) == 1
    assert labelled(base) == [f"MTF/{second}"]


def test_of_two_new_names_that_look_alike_the_first_counts(base: Path) -> None:
    first, second, *_ = names(base)
    path = list_of(base, (first, "Vegas"), (second, "vegas"))
    assert phase1(base, "--labels", path, "--dry-run") == 1
    assert phase1(base, "--labels", path) == 1
    assert labelled(base) == [f"Vegas/{first}"]


def test_a_target_that_is_there_is_not_replaced(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, *_ = names(base)
    target = base / "datos_etiquetados" / "MTF" / first
    shutil.copy(base / "f1_descomprimidos" / second, target)
    before = target.read_bytes()
    assert phase1(base, "--labels", list_of(base, (first, "MTF"))) == 1
    assert target.read_bytes() == before
    assert (base / "f1_descomprimidos" / first).exists()
    assert "is there already" in caplog.text


def test_an_absolute_path_is_copied_and_the_answer_confirmed(base: Path) -> None:
    image = phantoms.write(phantoms.exposure("TOR", 77), base / "new" / "IM1")
    assert phase1(base, "--labels", list_of(base, (str(image), "TOR"))) == 0
    assert labelled(base) == ["TOR/IM1"]
    assert (base / "datos_etiquetados/TOR/IM1").read_bytes() == image.read_bytes()
    image_id = utils.prepare_image(image).image_id
    folder = base / "dataset_final_vlm" / config.JOURNAL_DIR
    journal = utils.Journal(folder / f"{image_id}.jsonl")
    assert journal.get("confirmed") == {"class": "TOR"}


def test_one_file_under_two_names_is_left(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = names(base)[0]
    path = (base / "f1_descomprimidos" / first).resolve()
    lists = [list_of(base, (first, "TOR")), list_of(base, (str(path), "FDT"))]
    assert phase1(base, "--labels", *lists) == 1
    assert labelled(base) == []
    assert "stands in 2 lines" in caplog.text


def test_a_moved_file_that_phase_4_copied_is_confirmed(base: Path) -> None:
    first, second = names(base)[:2]
    folder = base / "dataset_final_vlm" / config.JOURNAL_DIR
    folder.mkdir(parents=True)
    copied = utils.prepare_image(base / "f1_descomprimidos" / first).image_id
    journal = utils.Journal(folder / f"{copied}.jsonl")
    journal.add({"key": "copied", "class": "MTF", "to": "x", "time": "2026-01-01"})
    path = list_of(base, (first, "MTF"), (second, "MTF"))
    assert phase1(base, "--labels", path) == 0
    journal.refresh()
    assert journal.get("confirmed") == {"class": "MTF"}
    assert len(list(folder.glob("*.jsonl"))) == 1  # of no other image one is made


@pytest.mark.parametrize("name", ["\ufeffFDT", "F\u200bDT", "a\u202eb"])
def test_a_class_name_with_invisible_letters_is_refused(base: Path, name: str) -> None:
    assert phase1(base, "--labels", list_of(base, (names(base)[0], name))) == 1
    assert labelled(base) == []


def test_an_absolute_path_to_an_output_moves_it(base: Path) -> None:
    first = names(base)[0]
    path = (base / "f1_descomprimidos" / first).resolve()
    assert phase1(base, "--labels", list_of(base, (str(path), "MTF"))) == 0
    assert labelled(base) == [f"MTF/{first}"]
    assert not path.exists()


@posix
def test_no_file_goes_into_a_class_folder_that_is_a_link(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (base / "elsewhere").mkdir()
    (base / "datos_etiquetados" / "NEW").symlink_to(base / "elsewhere")
    assert phase1(base, "--labels", list_of(base, (names(base)[0], "NEW"))) == 1
    assert "is a link: no phase reads it" in caplog.text
    assert list((base / "elsewhere").iterdir()) == []


def test_pixels_that_are_labelled_already_are_not_copied(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = phantoms.write(phantoms.exposure("TOR", 77), base / "new" / "IM1")
    other = phantoms.compress(phantoms.exposure("TOR", 77), "jpeg_lossless_sv1")
    twin = phantoms.write(other, base / "new" / "IM2")
    path = list_of(base, (str(image), "TOR"), (str(twin), "MTF"))
    assert phase1(base, "--labels", path) == 1
    assert labelled(base) == ["TOR/IM1"]
    assert "holds the same pixels" in caplog.text


def test_a_spreadsheets_guard_before_a_formula_is_taken_off(base: Path) -> None:
    first = names(base)[0]
    assert phase1(base, "--labels", list_of(base, (first, "'-40 dB"))) == 0
    assert labelled(base) == [f"-40 dB/{first}"]


def test_a_file_that_is_not_a_list_is_refused(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = base / "other.csv"
    path.write_text("name;label\nx;y\n")
    assert phase1(base, "--labels", path) == 2
    assert "its first line must be file,class" in caplog.text
    path.write_text("")
    assert phase1(base, "--labels", path) == 2
    assert phase1(base, "--labels", base / "missing.csv") == 2
    assert "missing.csv can't be read" in caplog.text


def test_a_dry_run_needs_a_list(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert phase1(base, "--dry-run") == 2
    assert "name the lists" in caplog.text


def test_labels_wait_for_no_other_phase_1(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    path = list_of(base, (names(base)[0], "MTF"))
    with utils.lock(base / "f1_descomprimidos" / fase1.LOCK, "held"):
        assert phase1(base, "--labels", path) == 2
    assert labelled(base) == []
    assert "another phase 1 is at work" in caplog.text


def test_one_file_under_two_spellings_with_two_classes_stays(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = phantoms.exposure("TOR", 5, side=64)
    path = phantoms.write(image, tmp_path / "n" / "x.dcm")
    odd = f"{path.parent}/../n/{path.name}"
    assert (
        phase1(base, "--labels", list_of(base, (str(path), "MTF"), (odd, "TOR"))) == 1
    )
    assert labelled(base) == []
    assert "stands in 2 lines" in caplog.text


def test_a_dry_run_refuses_equal_pixels_as_the_run_does(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = phantoms.write(phantoms.exposure("TOR", 5, side=64), tmp_path / "n" / "x")
    again = shutil.copyfile(path, tmp_path / "n" / "y")
    both = list_of(base, (str(path), "TOR"), (str(again), "MTF"))
    assert phase1(base, "--labels", both, "--dry-run") == 1
    assert "holds the same pixels" in caplog.text
    assert labelled(base) == []


def test_a_damaged_thumbnail_is_made_again(base: Path) -> None:
    thumbnails = base / "f1_descomprimidos" / config.SHEET_THUMBNAILS
    one = next(thumbnails.iterdir())
    before = one.read_bytes()
    one.write_bytes(b"garbage")
    (base / "f1_descomprimidos" / config.SHEET).unlink()
    assert phase1(base) == 0
    assert one.read_bytes() == before
