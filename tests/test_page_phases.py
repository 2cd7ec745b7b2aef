"""The pages of phases 2 to 4: what they show of what was learnt and decided."""

import io
import json
import logging
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import phantoms
import pytest
from conftest import ASKED, PER_CLASS, PLANTED, TRAINED, server_flags
from fake_ollama import FakeOllama
from test_fase3 import write_dataset
from test_page import Parsed

import config
import fase1_descompresion as fase1
import fase2_generar_vectores_vlm as fase2
import fase3_entrenamiento_svc as fase3
import fase4_inferencia_vlm as fase4
import utils


@pytest.fixture(autouse=True)
def _folds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fase3, "JUDGEMENTS", 1)


STRICT = '"confidence": {"FDT": 2, "MTF": 2, "TOR": 2}'


def with_new_images(trained: Path, base: Path) -> Path:
    """A copy that a test may change, with new images in `new`."""
    shutil.copytree(trained, base, dirs_exist_ok=True)
    for label in phantoms.LABELS:
        image = phantoms.exposure(label, 90, side=160)
        phantoms.write(image, base / "new" / f"&lt;{label}.dcm")
    phantoms.write(phantoms.unrelated(1001, side=160), base / "new" / "chest")
    (base / "new" / "text").write_text("not an image " * 50)
    return base


@pytest.fixture
def base(trained: Path, tmp_path: Path) -> Path:
    return with_new_images(trained, tmp_path)


@pytest.fixture(scope="module")
def classified(
    trained: Path, server: FakeOllama, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A base folder with out/results.html, and what --json said in out/results.json."""
    base = with_new_images(trained, tmp_path_factory.mktemp("classified"))
    with redirect_stdout(io.StringIO()) as said:
        assert phase4(base, server, "--html", base / "out/results.html", "--json") == 1
    (base / "out" / "results.json").write_text(said.getvalue())
    return base


def phase2(base: Path, server: FakeOllama, *more: str) -> int:
    flags = ["--base", str(base), *server_flags(server.url), *ASKED, *more]
    return fase2.main(flags)


def phase4(base: Path, server: FakeOllama, *more: object) -> int:
    flags = ["--base", str(base), *server_flags(server.url), "--descriptions", "5"]
    return fase4.main([*flags, *map(str, more), str(base / "new")])


def words(page: Parsed) -> str:
    return " ".join(page.text.split())


def parse(path: Path) -> Parsed:
    return Parsed(path.read_text("utf-8"))


def metrics_of(base: Path) -> dict[str, Any]:
    return utils.read_json(base / "modelo_final_vlm" / config.METRICS, "")


# --- Phase 3 ------------------------------------------------------------------------


def test_phase_2_keeps_a_thumbnail_of_every_image(trained: Path) -> None:
    folder = trained / "dataset_final_vlm"
    images = utils.read_csv(folder / config.DATASET_IMAGES)
    names = sorted(path.stem for path in (folder / config.THUMBNAIL_DIR).iterdir())
    assert names == sorted(row["image_id"] for row in images)
    assert len(names) == 3 * PER_CLASS


def test_the_report_shows_all_that_the_console_says(trained: Path) -> None:
    page = parse(trained / "modelo_final_vlm" / config.REPORT)
    metrics, shown = metrics_of(trained), words(page)
    for line in fase3.report_lines(metrics, verbose=False):
        if not line.startswith(("is the label", "(")):
            assert " ".join(line.removeprefix("WARNING: ").split()) in shown
    assert metrics["warnings"]
    assert page.all("section", "class") == ["warning"]


def test_the_report_shows_every_image_the_least_probable_label_first(
    trained: Path,
) -> None:
    page = parse(trained / "modelo_final_vlm" / config.REPORT)
    listed = metrics_of(trained)["held_out"]
    assert page.all("article", "data-label") == [each["class"] for each in listed]
    shown = words(page)
    for each in listed:
        assert each["file"] in shown
        assert f"{each['own_probability'] * 100:.1f}% for {each['class']}" in shown
    assert page.all("article", "data-file") == [""] * len(listed)
    sources = page.all("img", "src")
    assert len(sources) == len(listed)  # each is embedded once


def test_behind_every_cell_of_the_matrix_stand_its_images(trained: Path) -> None:
    page = parse(trained / "modelo_final_vlm" / config.REPORT)
    states = page.all("article", "data-state")
    assert page.all("button", "data-show") == sorted({*states})  # none shows nothing
    said = {
        f"{each['class']} → {each['descriptions_say']}"
        for each in metrics_of(trained)["held_out"]
    }
    assert set(states) == said


def test_the_first_tenth_has_descriptions_and_the_nearest_images(
    trained: Path,
) -> None:
    html = (trained / "modelo_final_vlm" / config.REPORT).read_text("utf-8")
    first, *_, last = html.split("<article")[1:]
    rows = utils.read_csv(trained / "dataset_final_vlm" / config.DATASET_ROWS)
    listed = metrics_of(trained)["held_out"]
    texts = [
        row["description"]
        for row in rows
        if row["image_id"] == listed[0]["image_id"] and row["prompt_set"] == "generic"
    ]
    assert len(texts) == 5
    assert all(text in Parsed(first).text for text in texts)
    assert len(Parsed(first).all("img", "alt")) == 4
    assert len(Parsed(last).all("img", "alt")) == 1


def test_also_where_all_labels_seem_right_the_first_tenth_has_them(
    tmp_path: Path,
) -> None:
    base = write_dataset(tmp_path)
    assert fase3.main(["--base", str(base), "--quiet"]) == 0
    listed = metrics_of(base)["held_out"]
    assert all(each["class"] == each["descriptions_say"] for each in listed)
    html = (base / "modelo_final_vlm" / config.REPORT).read_text("utf-8")
    pictures = [len(Parsed(one).all("img", "alt")) for one in html.split("<article")]
    assert pictures[1:] == [4] * 4 + [1] * 32


def test_planted_label_errors_stand_in_the_first_tenth(trained: Path) -> None:
    listed = metrics_of(trained)["held_out"]
    first = {each["file"] for each in listed[: len(listed) // 10]}
    found = len(first & set(PLANTED))
    assert found >= 0.8 * len(PLANTED)


def test_the_charts_show_the_metrics(trained: Path) -> None:
    page = parse(trained / "modelo_final_vlm" / config.REPORT)
    metrics, shown = metrics_of(trained), words(page)
    confidence = metrics["confidence"]
    errors = [y for x, y in confidence["errors_by_answered"] if x > 0.1]
    points = len(confidence["bins"]) + len(errors)
    counts = [n for n in metrics["comparison"] if n.startswith("descriptions: ")]
    assert len(page.all("circle", "cx")) == points + len(counts)
    for said, right, _ in confidence["bins"]:
        assert f"{said * 100:.3g} %: {right * 100:.3g} % (" in shown


def test_a_report_without_thumbnails_names_the_images(base: Path) -> None:
    shutil.rmtree(base / "dataset_final_vlm" / config.THUMBNAIL_DIR)
    assert fase3.main(["--base", str(base), *TRAINED]) == 0
    page = parse(base / "modelo_final_vlm" / config.REPORT)
    assert page.all("img", "src") == []
    assert "FDT/FDT1.dcm" in page.all("img", "alt")


# --- Phase 4 ------------------------------------------------------------------------


def test_phase_4s_page_shows_what_its_json_says(classified: Path) -> None:
    said = (classified / "out" / "results.json").read_text()
    found = [json.loads(line) for line in said.splitlines()]
    page = parse(classified / "out" / "results.html")
    shown = words(page)
    assert len(found) == 5
    for one in found:
        assert one["file"] in shown
        if "error" in one:
            assert one["error"] in shown
            continue
        assert one["reason"] in shown
        assert one["picture_says"]["label"] in shown
        for name, share in one["confidences"].items():
            assert f"{share * 100:.1f}% {name}" in shown
        for text in one["descriptions"]:
            assert " ".join(text.split()) in shown
    last = found[0]
    for key in ("program_version", "vlm_digest", "embedder_digest", "model"):
        assert str(last[key]) in shown
    metrics = classified / "modelo_final_vlm" / config.METRICS
    assert last["model"] == utils.sha256_of(metrics)[:12]
    assert len(page.all("img", "src")) > 4  # those of training, too


def test_the_doubtful_images_stand_first_and_can_be_given_a_class(
    classified: Path,
) -> None:
    page = parse(classified / "out" / "results.html")
    states = page.all("article", "data-state")
    assert states == sorted(states, key=fase4.STATES.index)
    assert set(states) == {*fase4.STATES}
    files = page.all("article", "data-file")
    assert sorted(filter(None, files)) == sorted(
        str(one.resolve())
        for one in (classified / "new").iterdir()
        if one.name != "text"
    )


def test_what_phase_4s_page_saves_is_copied_by_labels(classified: Path) -> None:
    (classified / "f1_descomprimidos").mkdir()
    files = parse(classified / "out" / "results.html").all("article", "data-file")
    chest = next(file for file in files if "chest" in file)
    saved = classified / "etiquetas.csv"
    saved.write_text(f'\ufefffile,class\r\n"{chest}","Chest"\r\n', "utf-8")
    assert fase1.main(["--base", str(classified), "--labels", str(saved)]) == 0
    assert (classified / "datos_etiquetados" / "Chest" / "chest").exists()
    assert Path(chest).exists()


def test_a_page_that_can_not_be_written_is_said_before_the_first_question(
    base: Path, server: FakeOllama, caplog: pytest.LogCaptureFixture
) -> None:
    (base / "file").write_text("")
    assert phase4(base, server, "--html", base / "file" / "x.html") == 2
    assert "file" in caplog.text


# --- Phase 2, of phase 4's answers --------------------------------------------------


def test_labels_that_are_the_programs_own_answers_are_counted(
    base: Path, server: FakeOllama, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    labelled = base / "datos_etiquetados"
    assert phase4(base, server, "--copy-to", labelled) == 1
    copied = [p for p in labelled.rglob("*") if p.name.startswith("&lt;")]
    known = [p for p in copied if p.parent.name in phantoms.LABELS]
    assert known
    metrics = base / "modelo_final_vlm" / config.METRICS
    strict = re.sub('"confidence": {[^}]*}', STRICT, metrics.read_text("utf-8"))
    metrics.write_text(strict, encoding="utf-8")
    phase4(base, server, "--copy-to", base / "later")  # changes its mind about all
    assert {one.name for one in (base / "later").iterdir()} == {"no_concluyente"}
    shutil.rmtree(labelled / "no_concluyente", ignore_errors=True)
    assert phase2(base, server, "--finished-only") == 0
    said = f"{len(known)} labels are the program's own answers, unseen by you"
    assert said in caplog.text
    caplog.clear()
    saved = base / "etiquetas.csv"
    original = base / "new" / known[0].name
    label = known[0].parent.name
    saved.write_text(f'file,class\n"{original}","{label}"\n', "utf-8")
    (base / "f1_descomprimidos").mkdir()
    assert fase1.main(["--base", str(base), "--labels", str(saved)]) == 1
    assert "holds the same pixels" in caplog.text
    assert phase2(base, server, "--finished-only") == 0
    fewer = f"{len(known) - 1} labels are the program's own answers"
    assert (fewer in caplog.text) == (len(known) > 1)
    assert said not in caplog.text
