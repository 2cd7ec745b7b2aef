"""All four scripts, run as a person runs them, on a small collection."""

import ast
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import demo
import phantoms
import pytest
from dicom_samples import posix
from fake_ollama import FakeOllama

import config
import utils

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("fase*.py"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base folder of a small demo that has run to its end."""
    base = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch, FakeOllama() as fake:
        patch.setattr(demo, "PER_CLASS", 10)
        patch.setattr(demo, "ASIDE_PER_CLASS", 1)
        before = dict[str, str]()

        def remember(where: Path) -> tuple[dict[str, str], dict[Path, str]]:
            drawn = draw(where)
            before.update(digests(where / "input_dicom"))
            return drawn

        draw = demo.draw
        patch.setattr(demo, "draw", remember)
        demo.run(base, ("--host", fake.url, *demo.DEMO_MODELS))
    assert digests(base / "input_dicom") == before
    return base


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): utils.sha256_of(path) for path in files}


def test_every_file_of_the_contract_is_there(finished: Path) -> None:
    knobs = config.Config(base=finished)
    expected = {
        "decompressed_dir": (config.FILE_LIST, config.REJECTED_LIST),
        "dataset_dir": (
            config.DATASET_X,
            config.DATASET_Y,
            config.DATASET_ROWS,
            config.MANIFEST,
            config.REJECTED_LIST,
            config.JOURNAL_DIR,
        ),
        "model_dir": (
            config.CLASSIFIER,
            config.SCALER,
            config.CONFUSION_MATRIX,
            config.METRICS,
        ),
    }
    for folder, names in expected.items():
        missing = [n for n in names if not (knobs.folder(folder) / n).exists()]
        assert missing == []


def test_no_temporary_file_is_left(finished: Path) -> None:
    assert list(finished.rglob("*.tmp")) == []


def test_every_exposure_kept_aside_has_a_result_with_confidences(
    finished: Path,
) -> None:
    rows = utils.read_csv(finished / "results.csv")
    assert len(rows) == len(phantoms.LABELS) + 1
    for row in rows:
        assert row["class"] in (*phantoms.LABELS, config.INCONCLUSIVE)
        if row["questions"] == "0":  # refused by its picture
            assert row["reason"]
            continue
        shares = [float(row[f"confidence_{label}"]) for label in phantoms.LABELS]
        assert sum(shares) == pytest.approx(1)


def test_phase_1_puts_the_files_in_the_order_of_exposure(finished: Path) -> None:
    rows = utils.read_csv(finished / "f1_descomprimidos" / config.FILE_LIST)
    stamps = [row["timestamp"] for row in rows]
    assert len(rows) == 30
    assert stamps == sorted(stamps)
    assert [row["output"] for row in rows] == sorted(row["output"] for row in rows)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_script_shows_its_help(script: Path) -> None:
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert f"python {script.name}" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_phase_imports_another(script: Path) -> None:
    tree = ast.parse(script.read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    named = {alias.name for node in imports for alias in node.names}
    froms = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name for name in named | froms if name and name.startswith("fase")} == set()


def test_installing_puts_none_of_our_modules_into_site_packages() -> None:
    try:
        files = metadata.distribution("dicom-image-classifier").files or []
    except metadata.PackageNotFoundError:
        pytest.skip("the project is not installed here")
    names = {Path(str(file)).name for file in files}
    assert names.isdisjoint({"config.py", "utils.py"})


@posix
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_ctrl_c_while_the_libraries_load_shows_no_traceback(
    script: Path, tmp_path: Path
) -> None:
    slow = "import time\nprint('loading', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "numpy.py").write_text(slow)
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert errors == ""
    assert process.returncode == -signal.SIGINT
