"""Fixtures that several test files use."""

from collections.abc import Callable, Iterator
from pathlib import Path

import phantoms
import pytest
from fake_ollama import FakeOllama

import utils

LabelFolder = Callable[..., Path]


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
