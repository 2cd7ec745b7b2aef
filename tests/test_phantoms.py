"""The synthetic exposures are valid, varied, repeatable DICOM files."""

import inspect
from collections import Counter
from pathlib import Path

import numpy as np
import phantoms
import pytest
from pydicom import dcmread
from pydicom.dataset import FileDataset

SIDE = 96
SYNTAXES = sorted(phantoms.TRANSFER_SYNTAXES)


def as_bytes(dataset: FileDataset, path: Path) -> bytes:
    return phantoms.write(dataset, path).read_bytes()


def small_exposures(label: str, count: int) -> list[FileDataset]:
    return [phantoms.exposure(label, seed, side=SIDE) for seed in range(count)]


def moment(dataset: FileDataset) -> str:
    return f"{dataset.ContentDate}{dataset.ContentTime}"


@pytest.mark.parametrize("label", phantoms.LABELS)
def test_same_arguments_give_the_same_file(label: str, tmp_path: Path) -> None:
    first, again = (phantoms.exposure(label, 7, side=SIDE) for _ in range(2))
    assert as_bytes(first, tmp_path / "a") == as_bytes(again, tmp_path / "b")


@pytest.mark.parametrize("label", phantoms.LABELS)
def test_another_seed_gives_another_image(label: str) -> None:
    images = small_exposures(label, 12)
    assert len({image.SOPInstanceUID for image in images}) == len(images)
    assert len({image.PixelData for image in images}) == len(images)


def test_unknown_label_is_refused() -> None:
    with pytest.raises(ValueError, match="no drawing for 'CHEST'"):
        phantoms.exposure("CHEST", 0)


@pytest.mark.parametrize("side", [64, 200])
def test_size_is_about_what_was_asked(side: int) -> None:
    image = phantoms.unrelated(1, side=side)
    assert image.Rows * image.Columns == pytest.approx(side**2, rel=0.03)


@pytest.mark.parametrize("label", phantoms.LABELS)
def test_pixels_fit_into_the_bits_stored(label: str) -> None:
    for image in small_exposures(label, 30):
        pixels = image.pixel_array
        assert pixels.dtype == np.uint16
        assert pixels.shape == (image.Rows, image.Columns)
        assert 10 <= image.BitsStored == image.HighBit + 1 <= 16
        assert np.ptp(pixels) > 0
        assert pixels.max() < 2**image.BitsStored


@pytest.mark.parametrize("name", SYNTAXES)
@pytest.mark.parametrize("label", phantoms.LABELS)
def test_files_read_back_with_equal_pixels(
    label: str, name: str, tmp_path: Path
) -> None:
    for image in small_exposures(label, 4):
        path = phantoms.write(phantoms.compress(image, name), tmp_path / "image")
        read = dcmread(path)
        assert read.file_meta.TransferSyntaxUID == phantoms.TRANSFER_SYNTAXES[name]
        assert read.SOPInstanceUID == image.SOPInstanceUID
        np.testing.assert_array_equal(read.pixel_array, image.pixel_array)


def test_every_bit_depth_survives_every_transfer_syntax() -> None:
    images = {image.BitsStored: image for image in small_exposures("FDT", 40)}
    assert set(images) == {10, 12, 13, 14, 15, 16}
    for image in images.values():
        for name in SYNTAXES:
            copied = phantoms.compress(image, name)
            np.testing.assert_array_equal(copied.pixel_array, image.pixel_array)


def test_compressing_leaves_the_original_alone() -> None:
    image = phantoms.exposure("MTF", 3, side=SIDE)
    before = image.PixelData
    phantoms.compress(image, "jpeg_ls")
    assert image.PixelData == before
    assert image.file_meta.TransferSyntaxUID.is_implicit_VR is False


@pytest.mark.parametrize(
    ("name", "predictor"), [("jpeg_lossless_sv1", 1), ("jpeg_lossless", 6)]
)
def test_jpeg_lossless_states_its_predictor(name: str, predictor: int) -> None:
    data = phantoms.compress(phantoms.exposure("TOR", 0, side=SIDE), name).PixelData
    scan = data.index(b"\xff\xda")
    assert b"\xff\xc3" in data[:scan]
    assert data[scan + 7] == predictor


def test_relative_noise_falls_with_the_root_of_dose() -> None:
    rng = np.random.default_rng(0)
    flats = (np.full((200, 200), quanta, np.float32) for quanta in (200, 2000))
    low, high = (phantoms.detect(flat, rng) for flat in flats)
    ratio = (low.std() / low.mean()) / (high.std() / high.mean())
    assert ratio == pytest.approx(10**0.5, rel=0.1)


def test_noise_is_never_below_structure_nor_electronics() -> None:
    rng = np.random.default_rng(0)
    dark, bright = (
        phantoms.detect(np.full((200, 200), quanta, np.float32), rng)
        for quanta in (0, 1e7)
    )
    assert dark.std() > 4
    assert bright.std() / bright.mean() > 0.0039


def test_exposures_span_two_decades_of_dose() -> None:
    doses = [float(image.ExposureIndex) for image in small_exposures("FDT", 60)]
    assert max(doses) / min(doses) > 50


@pytest.mark.parametrize("keyword", ["Modality", "Manufacturer", "BitsStored"])
def test_classes_share_the_values_of_their_headers(keyword: str) -> None:
    seen = [
        {image[keyword].value for image in small_exposures(label, 60)}
        for label in phantoms.LABELS
    ]
    assert seen[0] == seen[1] == seen[2]


def test_header_is_made_without_the_label() -> None:
    rngs = (np.random.default_rng(0) for _ in phantoms.LABELS)
    headers = [
        phantoms.header(label, 1.0, 0.2, rng)
        for label, rng in zip(phantoms.LABELS, rngs, strict=True)
    ]
    for dataset in headers:
        del dataset.SOPInstanceUID, dataset.StudyInstanceUID, dataset.SeriesInstanceUID
    assert headers[0] == headers[1] == headers[2]
    assert "label" not in inspect.signature(phantoms.draw_exposure).parameters


@pytest.mark.parametrize("label", phantoms.LABELS)
def test_label_is_nowhere_in_the_header(label: str) -> None:
    for image in small_exposures(label, 10):
        image.PixelData = b""
        assert label not in str(image)
        assert image.PatientName == "TEST^QC"


def test_some_exposures_lack_an_acquisition_date() -> None:
    images = small_exposures("TOR", 40)
    dated = ["AcquisitionDate" in image for image in images]
    assert {True, False} == set(dated)
    assert any("AcquisitionDateTime" in image for image in images)
    assert any("." in image.ContentTime for image in images)


def test_lead_is_bright_as_often_as_dark_whatever_the_tags_say() -> None:
    seen: Counter[tuple[str, bool]] = Counter()
    for image in small_exposures("MTF", 60):
        pixels = image.pixel_array
        bright = np.median(pixels) > pixels.min() / 2 + pixels.max() / 2
        seen[image.PhotometricInterpretation, bool(bright)] += 1
    assert len(seen) == 4


def test_some_images_use_only_the_top_of_their_range() -> None:
    floors = [
        np.percentile(image.pixel_array, 5) / 2**16
        for image in small_exposures("TOR", 60)
        if image.BitsStored == 16
    ]
    assert max(floors) > 0.94


def test_edge_splits_the_field_and_flat_does_not() -> None:
    edge, flat = (np.ones((SIDE, SIDE), np.float32) for _ in range(2))
    phantoms.half_plane(phantoms.Frame(edge, 1.0), 0.02, np.random.default_rng(0))
    phantoms.field(phantoms.Frame(flat, 1.0), np.random.default_rng(1))
    assert edge.min() == pytest.approx(0.02)
    assert 0.3 < (edge > 0.5).mean() < 0.7
    assert flat.min() > 0.96


def test_turning_a_test_object_moves_its_lead_square() -> None:
    def drawn(turn_rad: float, mirror: int = 1) -> phantoms.Floats:
        scene = np.ones((401, 401), np.float32)
        frame = phantoms.Frame(scene, 0.5, turn_rad=turn_rad, mirror=mirror)
        phantoms.tor_18fg(frame, 1.0)
        return scene

    upright, turned, mirrored = drawn(0), drawn(np.pi / 2), drawn(0, mirror=-1)
    assert upright[200, 298] == turned[298, 200] == mirrored[200, 102] < 0.03
    np.testing.assert_allclose(np.rot90(upright, -1), turned, atol=1e-4)
    np.testing.assert_allclose(np.fliplr(upright), mirrored, atol=1e-4)


def test_collection_holds_what_it_says(tmp_path: Path) -> None:
    counts = {"FDT": 4, "MTF": 3, "TOR": 2, phantoms.UNRELATED: 2}
    labels = phantoms.write_collection(tmp_path, counts, seed=5, side=SIDE)
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    images = [dcmread(path) for path in paths]
    assert Counter(labels.values()) == counts
    assert {image.SOPInstanceUID for image in images} == set(labels)
    syntaxes = {image.file_meta.TransferSyntaxUID for image in images}
    assert syntaxes == set(phantoms.TRANSFER_SYNTAXES.values())
    assert all(image.pixel_array.size for image in images)


def test_collection_names_tell_neither_class_nor_time(tmp_path: Path) -> None:
    counts = dict.fromkeys(phantoms.LABELS, 8)
    phantoms.write_collection(tmp_path, counts, seed=1, side=64)
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(label in path.name for path in paths for label in counts)
    assert len({path.parent for path in paths}) > 1
    assert {path.suffix == "" for path in paths} == {True, False}
    times = [moment(dcmread(path)) for path in sorted(paths, key=lambda p: p.name)]
    assert times != sorted(times)


def test_collection_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    def contents(name: str) -> dict[Path, bytes]:
        folder = tmp_path / name
        phantoms.write_collection(folder, {"FDT": 2, "TOR": 2}, seed=3, side=64)
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder): path.read_bytes() for path in files}

    assert contents("first") == contents("second")
