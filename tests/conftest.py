"""Fixtures that several test files use."""

from collections.abc import Callable, Iterator
from pathlib import Path

import phantoms
import pytest
from fake_ollama import FakeOllama

import fase2_generar_vectores_vlm as fase2
import fase3_entrenamiento_svc as fase3
import utils

LabelFolder = Callable[..., Path]

TEST = sum(map(len, utils.SIGHT_ORDER))
"""Questions of one sight test, to each slot."""


def server_flags(url: str) -> list[str]:
    """Flags that point a phase at the stand-in, without questions of the sight test."""
    models = ["--vlm", "demo-vlm", "--embed-model", "demo-embed"]
    return ["--host", url, *models, "--wait", "5", "--no-sight-test"]


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for the first pause of a retry."""
    monkeypatch.setattr(utils, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def fake() -> Iterator[FakeOllama]:
    """The stand-in with its defaults: nothing fails, nothing takes time."""
    with FakeOllama() as server:
        yield server


@pytest.fixture(scope="session")
def server() -> Iterator[FakeOllama]:
    """One stand-in for tests that change nothing of it and count nothing."""
    with FakeOllama() as shared:
        yield shared


PER_CLASS = 14
PLANTED = {"FDT/MTF3.dcm": "MTF", "MTF/TOR5.dcm": "TOR"}
"""Files that a person put into the folder of another class, and what they show."""
ASKED = ("--descriptions", "10", "--generic-share", "0.5")
TRAINED = ("--descriptions", "5", "--max-error", "0.4", "--quiet")
"""So few images can't answer with fewer errors."""


@pytest.fixture(scope="session")
def trained(server: FakeOllama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder through phases 2 and 3, with 2 labels wrong; to be copied."""
    base = tmp_path_factory.mktemp("trained")
    for label in phantoms.LABELS:
        for seed in range(PER_CLASS):
            path = base / "datos_etiquetados" / label / f"{label}{seed}.dcm"
            phantoms.write(phantoms.exposure(label, seed, side=160), path)
    for wrong, label in PLANTED.items():
        folder = base / "datos_etiquetados"
        (folder / label / Path(wrong).name).rename(folder / wrong)
    flags = ["--base", str(base)]
    assert fase2.main([*flags, *server_flags(server.url), *ASKED, "--quiet"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fase3, "JUDGEMENTS", 1)  # the folds once
        assert fase3.main([*flags, *TRAINED]) == 0
    return base


@pytest.fixture
def labelled(tmp_path: Path) -> LabelFolder:
    """Make a base folder whose class folders hold small synthetic exposures."""

    def make(base: Path = tmp_path, per_class: int = 2, side: int = 64) -> Path:
        for label in phantoms.LABELS:
            for seed in range(per_class):
                name = f"{label}{seed}.dcm"
                target = base / "datos_etiquetados" / label / name
                target.parent.mkdir(parents=True, exist_ok=True)
                phantoms.write(phantoms.exposure(label, seed, side=side), target)
        return base

    return make
