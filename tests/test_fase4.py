"""Phase 4: what it answers, what it refuses, and what it leaves alone."""

import csv
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import phantoms
import pytest
from conftest import server_flags
from dicom_samples import posix
from fake_ollama import FakeOllama

import config
import fase2_generar_vectores_vlm as fase2
import fase4_inferencia_vlm as fase4
import utils

K = ("--descriptions", "5")


@pytest.fixture
def base(trained: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may break."""
    shutil.copytree(trained / "modelo_final_vlm", tmp_path / "modelo_final_vlm")
    return tmp_path


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A folder with one new exposure per class, compressed."""
    for label in phantoms.LABELS:
        image = phantoms.exposure(label, 77, side=160)
        phantoms.write(
            phantoms.compress(image, "jpeg_lossless_sv1"), tmp_path / "new" / label
        )
    return tmp_path / "new"


def phase4(base: Path, fake: FakeOllama, *more: object) -> int:
    flags = ["--base", str(base), *server_flags(fake.url), *K]
    return fase4.main([*flags, *map(str, more)])


def json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The results, without the one thing that no two runs share."""
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for result in results:
        assert result.pop("time").endswith("+00:00")
    return results


# --- Answers ------------------------------------------------------------------------


def test_each_file_has_one_line_with_its_class_and_all_confidences(
    base: Path, server: FakeOllama, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phase4(base, server, "--ask-all", new) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line, label in zip(lines, phantoms.LABELS, strict=True):
        assert line.startswith(f"{new / label}: ")
        assert all(f"{name} " in line for name in phantoms.LABELS)


def test_json_lines_carry_the_documented_keys_and_name_the_surest_class(
    base: Path, server: FakeOllama, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phase4(base, server, "--json", "--ask-all", new) == 0
    for result in json_lines(capsys):
        assert set(result) == {
            "file", "image_id", "class", "best_class", "confidences", "reason",
            "stage", "questions", "descriptions_say", "picture_says", "descriptions",
            "warnings", "program_version", "vlm_digest", "embedder_digest",
            "model",
        }  # fmt: skip
        shares = result["confidences"]
        assert sum(shares.values()) == pytest.approx(1)
        assert len(result["descriptions"]) == 5
        assert result["best_class"] == max(shares, key=shares.get) == next(iter(shares))
        assert result["class"] in (result["best_class"], config.INCONCLUSIVE)
        assert bool(result["reason"]) == (result["class"] == config.INCONCLUSIVE)


def test_only_generic_prompts_are_asked(base: Path, new: Path) -> None:
    with FakeOllama() as fake:
        phase4(base, fake, new)
        asked = {a["prompt"] for a in fake.stats()["asked"] if a["prompt"]}
    assert asked == {q.prompt for q in utils.questions("generic", 5)}


def test_training_images_are_recognised(
    base: Path,
    trained: Path,
    server: FakeOllama,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labelled = trained / "datos_etiquetados"
    phase4(base, server, "--json", *sorted(labelled.glob("*/*[012].dcm")))
    results = json_lines(capsys)
    right = [Path(r["file"]).parent.name == r["best_class"] for r in results]
    assert len(right) > 9
    assert np.mean(right) > 0.8


def test_the_same_image_has_the_same_answer(
    base: Path, server: FakeOllama, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phase4(base, server, "--json", new)
    first = json_lines(capsys)
    phase4(base, server, "--json", new)
    assert json_lines(capsys) == first


def test_a_threshold_that_nothing_reaches_makes_everything_inconclusive(
    base: Path, server: FakeOllama, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(metrics: dict[str, Any]) -> None:
        metrics["thresholds"]["pixels"] = 1e9
        for stage in metrics["thresholds"]["stages"].values():
            stage["descriptions"] = 1e9
            stage["one_reader"] = dict.fromkeys(phantoms.LABELS, 1.0)

    edit(base, never)
    assert phase4(base, server, "--one-reader", new) == 0
    out = capsys.readouterr().out
    assert out.count(f": {config.INCONCLUSIVE} · ") == 3
    assert out.count("is below 1.00") == 3


def test_verbose_shows_descriptions_and_nearest_training_images(
    base: Path, server: FakeOllama, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phase4(base, server, "--verbose", new / "TOR")
    out = capsys.readouterr().out
    assert out.count("    - ") == 5
    assert "nearest in training: " in out


def test_results_come_in_the_order_of_the_files(
    base: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeOllama(
        num_parallel=3, time_model="gpu", time_scale=0.02, load_s=0
    ) as fake:
        phase4(base, fake, "--server-parallel", 3, "--json", new, new)
    files = [Path(result["file"]).name for result in json_lines(capsys)]
    assert files == [*phantoms.LABELS, *phantoms.LABELS]


# --- Files --------------------------------------------------------------------------


def test_the_table_has_a_row_per_file_and_a_column_per_class(
    base: Path, server: FakeOllama, new: Path, tmp_path: Path
) -> None:
    (new / "bad").write_text("no DICOM")
    table = tmp_path / "out" / "r.csv"
    assert phase4(base, server, "--ask-all", "--csv", table, new) == 1
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = {Path(row["file"]).name: row for row in csv.DictReader(file)}
    assert set(rows) == {"bad", *phantoms.LABELS}
    assert rows["bad"]["error"]
    assert rows["bad"]["class"] == ""
    shares = [float(rows["TOR"][f"confidence_{label}"]) for label in phantoms.LABELS]
    assert sum(shares) == pytest.approx(1)


def test_copies_go_into_the_folder_of_their_class_and_originals_stay(
    base: Path,
    server: FakeOllama,
    new: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {p.name: p.read_bytes() for p in new.iterdir()}
    phase4(base, server, "--json", "--copy-to", tmp_path / "sorted", new)
    for result in json_lines(capsys):
        name = Path(result["file"]).name
        folder = result["class"].replace(" ", "_")
        assert (tmp_path / "sorted" / folder / name).read_bytes() == before[name]
    assert {p.name: p.read_bytes() for p in new.iterdir()} == before


def test_a_copy_never_replaces_another_file(
    base: Path, server: FakeOllama, new: Path, tmp_path: Path
) -> None:
    target = tmp_path / "sorted"
    phase4(base, server, "--copy-to", target, new / "TOR")
    phase4(base, server, "--copy-to", target, new / "TOR")
    copies = [p for p in target.rglob("*") if p.is_file()]
    assert len(copies) == 1
    copies[0].write_bytes(b"of a person")
    phase4(base, server, "--copy-to", target, new / "TOR")
    assert copies[0].read_bytes() == b"of a person"
    assert len([p for p in target.rglob("*") if p.is_file()]) == 2


def test_a_file_that_fails_costs_one_line_and_code_1(
    base: Path, server: FakeOllama, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (new / "empty").touch()
    assert phase4(base, server, new, new / "gone.dcm") == 1
    out = capsys.readouterr().out
    assert f"{new / 'empty'}: failed: " in out
    assert f"{new / 'gone.dcm'}: failed: " in out
    assert len(out.splitlines()) == 5


def test_a_server_that_fails_one_image_fails_that_one_only(
    base: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeOllama(script=[("/api/chat", 3, "nested")]) as fake:
        assert phase4(base, fake, "--json", new) == 1
    assert sum("error" in result for result in json_lines(capsys)) == 1


def test_an_empty_folder_is_refused(
    base: Path,
    server: FakeOllama,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "nothing").mkdir()
    assert phase4(base, server, tmp_path / "nothing") == 2
    assert "nothing holds no file" in caplog.text


# --- Models that don't fit ----------------------------------------------------------


def edit(base: Path, change: Any) -> None:
    path = base / "modelo_final_vlm" / config.METRICS
    metrics = json.loads(path.read_text("utf-8"))
    change(metrics)
    path.write_text(json.dumps(metrics), "utf-8")


def refused(base: Path, fake: FakeOllama, new: Path, *more: object) -> bool:
    return phase4(base, fake, *more, new) == 2


def test_without_a_model_it_says_which_phase_to_run(
    server: FakeOllama,
    new: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert refused(tmp_path, server, new)
    assert "python fase3_entrenamiento_svc.py" in caplog.text


@pytest.mark.parametrize("name", [config.CLASSIFIER, config.SCALER])
def test_a_tampered_model_file_is_not_loaded(
    base: Path,
    server: FakeOllama,
    new: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = base / "modelo_final_vlm" / name
    path.write_bytes(path.read_bytes() + b"x")
    assert refused(base, server, new)
    assert f"{name} is not the file that was written" in caplog.text


def test_a_missing_model_file_is_named(
    base: Path, server: FakeOllama, new: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (base / "modelo_final_vlm" / config.SCALER).unlink()
    assert refused(base, server, new)
    assert f"{config.SCALER} is missing" in caplog.text


def test_a_model_of_another_scikit_learn_comes_with_the_exact_remedy(
    base: Path, server: FakeOllama, new: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(base, lambda m: m["libraries"].update({"scikit-learn": "1.2.3"}))
    assert refused(base, server, new)
    assert "pip install scikit-learn==1.2.3" in caplog.text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--temperature", "0.1"), "options temperature: trained with 0.7, now 0.1"),
        (("--num-ctx", "4096"), "options num_ctx: trained with 2048, now 4096"),
        (("--vlm", "other"), "vlm: trained with demo-vlm, now other"),
        (("--embed-model", "other"), "embedder: trained with demo-embed, now other"),
    ],
)
def test_other_flags_than_in_training_are_refused_by_name(
    base: Path,
    server: FakeOllama,
    new: Path,
    flags: tuple[str, str],
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert refused(base, server, new, *flags)
    assert words in caplog.text


def test_a_model_made_with_latest_in_its_names_goes_on(
    base: Path, server: FakeOllama, new: Path
) -> None:
    named = {"vlm": "demo-vlm:latest", "embedder": "demo-embed:latest"}
    edit(base, lambda m: m["conditions"].update(named))
    assert phase4(base, server, new / "TOR") == 0


def test_other_prompts_than_in_training_are_refused(
    base: Path,
    server: FakeOllama,
    new: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changed = {**config.PROMPT_SETS, "generic": ("What?",) * 10}
    monkeypatch.setattr(config, "PROMPT_SETS", changed)
    assert refused(base, server, new)
    assert "generic_prompts: other texts" in caplog.text


def test_another_image_preparation_is_refused(
    base: Path,
    server: FakeOllama,
    new: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(config, "WINDOW_MIN_NOISE_SDS", 7.0)
    assert refused(base, server, new)
    assert "preparation window_min_noise_sds" in caplog.text


@pytest.mark.parametrize(
    ("model", "words"),
    [("demo-vlm", "vlm_digest"), ("demo-embed", "embedder_digest")],
)
def test_a_model_replaced_since_training_is_refused(
    base: Path, new: Path, model: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeOllama(digests={model: "d" * 64}) as fake:
        assert refused(base, fake, new)
    assert words in caplog.text


def test_force_answers_all_the_same_and_says_so_in_the_output(
    base: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeOllama(digests={"demo-vlm": "d" * 64}) as fake:
        assert phase4(base, fake, "--force", "--json", new) == 0
    for result in json_lines(capsys):
        assert "vlm_digest" in result["warnings"][0]


def test_force_warns_in_a_line_before_the_answers(
    base: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeOllama(digests={"demo-vlm": "d" * 64}) as fake:
        assert phase4(base, fake, "--force", new) == 0
    first, *answers = capsys.readouterr().out.splitlines()
    assert first.startswith("warning: vlm_digest: trained with ")
    assert len(answers) == 3


def test_an_embedder_that_drifted_is_refused(
    base: Path, server: FakeOllama, new: Path, caplog: pytest.LogCaptureFixture
) -> None:
    probe = np.zeros(256, np.float32)
    probe[0] = 1
    edit(base, lambda m: m.update(probe_vector=utils.pack_vector(probe)))
    assert refused(base, server, new)
    assert "the probe sentence has another embedding" in caplog.text


def test_an_embedder_of_another_size_is_refused_even_with_force(
    base: Path, server: FakeOllama, new: Path, caplog: pytest.LogCaptureFixture
) -> None:
    probe = utils.pack_vector(np.ones(3, np.float32))
    edit(base, lambda m: m.update(probe_vector=probe))
    assert refused(base, server, new, "--force")
    assert "gives 256 numbers, the model was trained on 3" in caplog.text


def test_another_number_of_descriptions_than_in_training_is_said(
    base: Path, server: FakeOllama, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phase4(base, server, "--json", "--descriptions", 4, new) == 0
    for result in json_lines(capsys):
        assert result["warnings"] == [
            "thresholds were chosen for 5 descriptions an image, now 4"
        ]


def test_what_limits_a_model_is_said_before_the_answers(
    base: Path, server: FakeOllama, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def limit(metrics: dict[str, Any]) -> None:
        stages = metrics["thresholds"]["stages"]
        del stages["3"]
        stages["5"]["confidence"] = dict.fromkeys(phantoms.LABELS, utils.NEVER)
        metrics["k_measured"] = 4

    edit(base, limit)
    phase4(base, server, new)
    first, *rest = capsys.readouterr().out.split(f"\n{new}")
    assert len(rest) == 3
    assert "the model has one stage: what is asked anything is asked all 5" in first
    assert "no confidence is safe in this model" in first
    assert "measured with 4 descriptions" in first


@pytest.mark.parametrize("without", ["thresholds", "sha256"])
def test_a_model_of_an_older_version_is_refused(
    base: Path,
    server: FakeOllama,
    new: Path,
    without: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    edit(base, lambda metrics: metrics.update({without: {}}))
    assert phase4(base, server, new) == 2
    assert "of an older version: run phases 2 and 3 again" in caplog.text


@posix  # such a name
def test_a_name_of_several_lines_is_one_line(
    base: Path, server: FakeOllama, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (new / "MTF").rename(new / "a.dcm: MTF\nb.dcm")
    phase4(base, server, new)
    out = capsys.readouterr().out
    assert out.count("\n") == 3
    assert f"{new}/a.dcm: MTF\\nb.dcm: " in out


@posix  # such a name
def test_no_cell_of_the_table_is_a_formula(
    base: Path, server: FakeOllama, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(new)
    name = '=HYPERLINK("x").dcm'
    (new / "MTF").rename(new / name)
    assert phase4(base, server, "--csv", "r.csv", name, "FDT") == 0
    lines = Path("r.csv").read_text("utf-8-sig").splitlines()
    cells = [row[0] for row in csv.reader(lines)]
    assert cells == ["file", f"'{name}", "FDT"]
    assert utils.read_csv(Path("r.csv"))[0]["file"] == name


def test_a_distant_server_is_named_before_images_go_there(
    base: Path,
    server: FakeOllama,
    new: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(utils, "is_loopback", lambda _: False)
    assert phase4(base, server, new) == 0
    assert "the images leave this machine" in caplog.records[0].getMessage()


@posix  # elsewhere only a console sends it
def test_ctrl_c_ends_with_130_and_keeps_what_is_known(
    base: Path, new: Path, tmp_path: Path
) -> None:
    table = tmp_path / "r.csv"
    with FakeOllama(time_model="gpu", time_scale=0.2, load_s=0.0) as fake:
        command = [sys.executable, fase4.__file__, "--base", str(base), *K]
        command += [*server_flags(fake.url), "--csv", str(table), str(new)]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert 1 <= len(utils.read_csv(table)) < 3


# --- Nothing asked twice, nothing lost ----------------------------------------------


def asked(fake: FakeOllama) -> int:
    return sum(one["asked"] for one in fake.stats()["asked"] if one["prompt"])


def test_a_second_run_asks_nothing_also_with_a_new_model(base: Path, new: Path) -> None:
    with FakeOllama() as fake:
        phase4(base, fake, "--ask-all", new)
        before = asked(fake)
        edit(base, lambda m: m.update(seed=99))
        assert phase4(base, fake, "--ask-all", new) == 0
        assert asked(fake) == before == 15


def test_what_phase_4_asked_costs_phase_2_nothing(base: Path, new: Path) -> None:
    with FakeOllama() as fake:
        phase4(base, fake, "--ask-all", new / "TOR")
        before = asked(fake)
        target = base / "datos_etiquetados" / "TOR" / "a.dcm"
        target.parent.mkdir(parents=True)
        shutil.copy(new / "TOR", target)
        flags = ["--base", str(base), *server_flags(fake.url)]
        assert (
            fase2.main([*flags, "--descriptions", "8", "--generic-share", "0.5"]) == 0
        )
        assert asked(fake) == before + 4


def test_a_run_that_is_killed_asks_only_what_is_open(base: Path, new: Path) -> None:
    with FakeOllama(time_model="gpu", time_scale=0.05, load_s=0.0) as fake:
        command = [sys.executable, fase4.__file__, "--base", str(base), *K]
        command += [*server_flags(fake.url), "--ask-all", str(new)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and asked(fake) < 7:
                pass
            process.kill()
        assert phase4(base, fake, "--ask-all", new) == 0
        assert 15 <= asked(fake) <= 15 + 2


def test_files_with_equal_pixels_are_asked_once(
    base: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(new / "TOR", new / "twin")
    with FakeOllama(num_parallel=2) as fake:
        flags = ("--ask-all", "--json", "--server-parallel", 2)
        assert phase4(base, fake, *flags, new / "TOR", new / "twin") == 0
        assert asked(fake) == 5
    first, second = json_lines(capsys)
    assert {**first, "file": ""} == {**second, "file": ""}


def test_equal_pixels_of_another_modality_are_decided_for_themselves(
    base: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = phantoms.exposure("TOR", 77, side=160)
    image.Modality = "CT"
    phantoms.write(image, new / "TOR_as_CT")
    with FakeOllama() as fake:
        assert phase4(base, fake, "--json", new / "TOR", new / "TOR_as_CT") == 0
    known, foreign = json_lines(capsys)
    assert known["image_id"] == foreign["image_id"]
    assert "Modality CT" not in known["reason"]
    assert "Modality CT is not among those of training" in foreign["reason"]
    assert foreign["questions"] == 0


def test_an_image_new_to_the_second_reader_is_asked_nothing(
    base: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(base, lambda m: m["thresholds"].update(pixels=1e-6))
    with FakeOllama() as fake:
        assert phase4(base, fake, "--json", new) == 0
        assert asked(fake) == 0
    for result in json_lines(capsys):
        assert result["class"] == config.INCONCLUSIVE
        assert "the picture is unlike all in training" in result["reason"]
        assert (result["questions"], result["stage"]) == (0, 0)


def test_a_modality_that_training_lacks_is_refused_by_the_header(
    base: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(base, lambda m: m.update(modalities=["CT"]))
    with FakeOllama() as fake:
        phase4(base, fake, "--json", new)
        assert asked(fake) == 0
        assert all(
            "is not among those of training (CT)" in r["reason"]
            for r in json_lines(capsys)
        )
        phase4(base, fake, "--json", "--any-modality", "--ask-all", new)
        assert asked(fake) == 15
    assert not any("Modality" in r["reason"] for r in json_lines(capsys))


def test_what_was_kept_where_nothing_can_be_written_now_is_not_asked_again(
    base: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with FakeOllama() as fake:
        phase4(base, fake, "--ask-all", new)
        before = asked(fake)
        monkeypatch.setattr(utils.AnswerBook, "touch", full)
        assert phase4(base, fake, "--ask-all", new) == 0
        assert asked(fake) == before


def test_the_copy_of_a_journal_that_cannot_be_written_can_be(
    base: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = []

    class Book(utils.AnswerBook):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            books.append(self)

        def touch(self) -> None:
            raise OSError(errno.EROFS, "read-only")

    with FakeOllama() as fake:
        phase4(base, fake, "--ask-all", new)
        folder = base / "dataset_final_vlm" / config.JOURNAL_DIR
        modes = [one.stat().st_mode & 0o777 for one in (folder, *folder.iterdir())]
        for one in (folder, *folder.glob("*.jsonl")):
            one.chmod(0o555)
        monkeypatch.setattr(fase4, "AnswerBook", Book)
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        assert phase4(base, fake, "--ask-all", new) == 0
    folder.chmod(modes[0])
    aside = books[-1].folder
    assert aside is not None
    assert aside != folder
    assert all(one.stat().st_mode & 0o200 for one in (aside, *aside.glob("*.jsonl")))


def test_what_another_process_asks_meanwhile_is_not_asked_again(
    base: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder = utils.VlmServer.answer, base / "dataset_final_vlm"
    others: list[utils.ImageAnswers] = []

    async def answer(server: Any, *asked: Any) -> dict[str, Any]:
        reply = await real(server, *asked)
        if not others:
            cfg = config.Config(vlm="demo-vlm", embed_model="demo-embed")
            book = utils.AnswerBook(folder / config.JOURNAL_DIR, cfg, server.facts)
            others.append(book.of(utils.prepare_image(new / "TOR")))
            for question in utils.questions("generic", 10):
                others[0].keep(question, 0, reply | {"text": f"A {question.prompt}"})
        return reply

    monkeypatch.setattr(utils.VlmServer, "answer", answer)
    with FakeOllama() as fake:
        assert phase4(base, fake, "--ask-all", "--no-sight-test", new / "TOR") == 0
        assert asked(fake) <= 2  # in flight at once
    others[0].journal.refresh()
    assert all(len(others[0].attempts(q)) == 1 for q in utils.questions("generic", 10))


def test_what_could_not_be_seen_in_a_folder_is_no_success(
    base: Path, server: FakeOllama, new: Path
) -> None:
    (new / "gone").symlink_to(new / "nowhere")
    assert phase4(base, server, new) == 1


@pytest.mark.parametrize("flag", ["--csv", "--html"])
def test_a_folder_in_place_of_a_file_is_refused_before_any_question(
    base: Path, new: Path, flag: str
) -> None:
    with FakeOllama() as fake:
        assert phase4(base, fake, flag, new, new) == 2
        assert fake.stats()["requests"].get("/api/chat", 0) == 0


def test_a_journal_that_cannot_be_written_is_warned_of_and_not_needed(
    base: Path, server: FakeOllama, new: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (base / "dataset_final_vlm").write_text("a file in its place")
    assert phase4(base, server, new) == 0
    assert "answers are not kept" in caplog.text


def test_a_table_that_cannot_be_opened_is_refused_before_the_first_question(
    base: Path, new: Path, tmp_path: Path
) -> None:
    with FakeOllama() as fake:
        assert phase4(base, fake, "--csv", tmp_path, new) == 2
        assert asked(fake) == 0


def test_three_files_of_one_name_become_three_copies(
    base: Path, server: FakeOllama, tmp_path: Path
) -> None:
    for number in range(3):
        folder = tmp_path / "in" / str(number)
        folder.mkdir(parents=True)
        image = phantoms.exposure("TOR", 77 + number // 2, side=160)
        image.InstanceNumber = number
        phantoms.write(image, folder / "a.dcm")
    target = tmp_path / "sorted"
    assert phase4(base, server, "--copy-to", target, tmp_path / "in") == 0
    copies = sorted(p for p in target.rglob("*") if p.is_file())
    originals = sorted((tmp_path / "in").rglob("a.dcm"))
    assert sorted(p.read_bytes() for p in copies) == sorted(
        p.read_bytes() for p in originals
    )


def test_a_blind_server_withdraws_what_was_shown_since_the_last_pass(
    base: Path,
    new: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fase4, "TEST_AT_END", 0)
    table, rule = (
        tmp_path / "r.csv",
        {"endpoint": "/api/chat", "when": 13, "times": 10**6},
    )
    with FakeOllama(script=[{**rule, "fault": "blind"}]) as fake:
        flags = [f for f in server_flags(fake.url) if f != "--no-sight-test"]
        more = ["--ask-all", "--csv", str(table), "--copy-to", str(tmp_path / "to")]
        code = fase4.main(["--base", str(base), *flags, *K, *more, str(new)])
    assert code == 2
    rows = utils.read_csv(table)
    assert [row["error"] for row in rows] == ["withdrawn: the sight test failed"] * 3
    assert capsys.readouterr().out.count("withdrawn") == 3
    assert list((tmp_path / "to").iterdir()) == []


def test_answers_of_a_killed_run_are_tested_before_their_rows_are_written(
    base: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fase4, "TEST_AT_END", 2)
    monkeypatch.setattr(utils.SightTest, "is_recent", lambda *_, **__: True)
    table = tmp_path / "r.csv"
    with FakeOllama() as fake:
        phase4(base, fake, "--ask-all", new)  # without a sight test
        fake.control(faults={"blind": 1.0})
        flags = [f for f in server_flags(fake.url) if f != "--no-sight-test"]
        more = ["--ask-all", "--csv", str(table)]
        code = fase4.main(["--base", str(base), *flags, *K, *more, str(new)])
    assert code == 2
    errors = [row["error"] for row in utils.read_csv(table)]
    assert errors == ["withdrawn: the sight test failed"] * 3


def test_earlier_results_stand_where_the_server_is_blind_at_the_start(
    base: Path, new: Path, tmp_path: Path
) -> None:
    table = tmp_path / "r.csv"
    table.write_text("earlier")
    with FakeOllama(faults={"blind": 1.0}) as fake:
        flags = [f for f in server_flags(fake.url) if f != "--no-sight-test"]
        more = ["--csv", str(table)]
        assert fase4.main(["--base", str(base), *flags, *K, *more, str(new)]) == 2
    assert table.read_text() == "earlier"


def test_what_hangs_on_answers_that_were_set_aside_is_withdrawn(
    base: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a second file of the same pixels, and what an earlier run had asked."""
    monkeypatch.setattr(fase4, "TEST_AT_END", 0)
    table, copies = tmp_path / "r.csv", tmp_path / "to"
    shutil.copyfile(new / "MTF", new / "MTF again")
    with FakeOllama() as fake:
        phase4(base, fake, "--ask-all", new / "FDT")  # without a sight test
        fake.control(faults={"blind": 1.0})
        monkeypatch.setattr(utils.SightTest, "is_recent", lambda *_, **__: True)
        flags = [f for f in server_flags(fake.url) if f != "--no-sight-test"]
        more = ["--ask-all", "--csv", str(table), "--copy-to", str(copies)]
        code = fase4.main(["--base", str(base), *flags, *K, *more, str(new)])
    assert code == 2
    errors = [row["error"] for row in utils.read_csv(table)]
    assert errors == ["withdrawn: the sight test failed"] * 4
    assert list(copies.iterdir()) == []


def answer_only_at(base: Path, stage: int) -> None:
    def change(metrics: dict[str, Any]) -> None:
        for name, limits in metrics["thresholds"]["stages"].items():
            least = 0.0 if name == str(stage) else 1.01
            limits["one_reader"] = dict.fromkeys(phantoms.LABELS, least)
            limits["descriptions"] = 1e9

    edit(base, change)


def test_each_stage_has_thresholds_of_its_own(
    base: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeOllama() as fake:
        for stage in (3, 5):
            answer_only_at(base, stage)
            phase4(base, fake, "--one-reader", "--json", new / "TOR")
            (result,) = json_lines(capsys)
            assert (result["stage"], result["questions"]) == (stage, stage)
            assert asked(fake) == stage
        answer_only_at(base, 3)
        phase4(base, fake, "--one-reader", "--json", "--descriptions", 2, new / "TOR")
    (result,) = json_lines(capsys)
    assert (result["stage"], result["questions"]) == (3, 2)  # the nearest limits


KILLED_BETWEEN_STAGES = """
import os, sys, utils, fase4_inferencia_vlm
decide = utils.decide
def killed(limits, picture, *words, **more):
    return decide(limits, picture, **more) if not words else os._exit(9)
utils.decide = killed
fase4_inferencia_vlm.main()
"""


@pytest.mark.parametrize(("number", "stages"), [(3, {3}), (5, {3, 5}), (7, {3, 7})])
def test_the_number_of_descriptions_is_that_of_the_second_stage(
    base: Path, new: Path, number: int, stages: set[int]
) -> None:
    answer_only_at(base, 99)
    with FakeOllama() as fake:
        seen = set()
        fase4_ask = utils.ask

        async def ask(picture: Any, some: Any, *more: Any) -> None:
            seen.add(len(some))
            await fase4_ask(picture, some, *more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils, "ask", ask)
            flags = ("--one-reader", "--descriptions", number)
            phase4(base, fake, *flags, new)
    assert seen == stages


def test_asking_all_changes_no_decision(
    base: Path, server: FakeOllama, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_only_at(base, 3)
    phase4(base, server, "--json", "--one-reader", new)
    few = json_lines(capsys)
    phase4(base, server, "--json", "--one-reader", "--ask-all", new)
    ten = json_lines(capsys)
    assert {len(one["descriptions"]) for one in few} == {3}
    assert {len(one["descriptions"]) for one in ten} == {5}
    for name in ("class", "confidences", "stage", "reason"):
        assert [one[name] for one in few] == [one[name] for one in ten]


def test_a_run_killed_between_the_stages_asks_only_the_second(
    base: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_only_at(base, 5)
    with FakeOllama() as fake:
        command = [sys.executable, "-c", KILLED_BETWEEN_STAGES, "--base", str(base)]
        command += [*server_flags(fake.url), *K, "--one-reader", str(new / "TOR")]
        done = subprocess.run(command, cwd=Path(fase4.__file__).parent, check=False)
        assert done.returncode == 9
        assert asked(fake) == 3
        assert phase4(base, fake, "--one-reader", "--json", new / "TOR") == 0
        assert asked(fake) == 5
    (result,) = json_lines(capsys)
    assert (result["stage"], result["questions"]) == (5, 5)


def test_readers_that_surely_disagree_end_the_questions(
    base: Path, new: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(metrics: dict[str, Any]) -> None:
        metrics["thresholds"]["pixels"] = 1e9
        for stage in metrics["thresholds"]["stages"].values():
            stage.update(descriptions=1e9, factor=100.0)  # as sure as can be

    caplog.set_level(logging.INFO)
    edit(base, change)
    swap_classes_of_the_picture(base)
    with FakeOllama() as fake:
        assert phase4(base, fake, new) == 0
        assert asked(fake) == 9
    assert "images by questions: 3 after 3 (mean 3.0)" in caplog.text


def swap_classes_of_the_picture(base: Path) -> None:
    """Let the second reader call every class by another's name."""
    path = base / "modelo_final_vlm" / config.SECOND_READER
    reader = joblib.load(path)
    reader[-1].classes_ = np.roll(reader[-1].classes_, 1)
    joblib.dump(reader, path)
    digest = utils.sha256_of(path)
    edit(base, lambda m: m["sha256"].update({config.SECOND_READER: digest}))


def test_a_list_is_never_written_over_an_image(
    base: Path, server: FakeOllama, new: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (new / "TOR").read_bytes()
    for flag in ("--csv", "--html"):
        assert phase4(base, server, flag, new / "TOR", new / "MTF") == 2
    assert (new / "TOR").read_bytes() == before
    assert "--csv would replace" in caplog.text


def test_a_run_that_can_not_start_leaves_earlier_results(
    base: Path, server: FakeOllama, new: Path, tmp_path: Path
) -> None:
    for name in ("a.csv", "a.html"):
        (tmp_path / name).write_text("of the last run")
    outputs = ["--csv", tmp_path / "a.csv", "--html", tmp_path / "a.html"]
    assert phase4(base, server, *outputs, "--host", "http://127.0.0.1:9", new) == 2
    assert (tmp_path / "a.csv").read_text() == "of the last run"
    assert (tmp_path / "a.html").read_text() == "of the last run"


def test_a_table_and_a_page_are_two_files(
    base: Path, server: FakeOllama, new: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both.csv"
    assert phase4(base, server, "--csv", both, "--html", both, new) == 2
    assert not both.exists()


def test_tables_and_pages_of_earlier_runs_are_no_images(tmp_path: Path) -> None:
    for name in ("a.dcm", "first run.csv", "first run.HTML", "no_suffix"):
        (tmp_path / name).write_bytes(b"")
    found, _ = fase4.find_images([tmp_path, tmp_path / "first run.csv"])
    assert [path.name for path in found] == ["a.dcm", "no_suffix", "first run.csv"]


def test_wildcards_that_no_shell_has_expanded_are_expanded(
    base: Path, server: FakeOllama, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = new.parent / "n?w" / "[MT]*"
    assert phase4(base, server, "--json", pattern) == 0
    files = [Path(result["file"]).name for result in json_lines(capsys)]
    assert files == ["MTF", "TOR"]
    assert phase4(base, server, "--json", new / "nothing*") == 1
