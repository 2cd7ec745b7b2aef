"""Phase 4 against the stand-in's clock: how soon it asks, and how much.

Trains a small model with the stand-in, then classifies new exposures while the stand-in
takes the time of a GPU, and prints:

- start: seconds from the start of the process to its first request to the VLM;
- added: with all ten questions an image, the time from the first to the last
  description over the server's busy time;
- questions per image, and the wall time of the whole run against that with all ten,
  of images of the classes and of others.

    python tests/benchmarks/bench_fase4.py
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import phantoms
from fake_ollama import FakeOllama, phase_flags

import fase2_generar_vectores_vlm as fase2
import fase3_entrenamiento_svc as fase3

ROOT = Path(__file__).resolve().parents[2]
RUNS = 3
TRAINED_SIDE = 512


def train(base: Path) -> None:
    """A model of twenty images a class."""
    for label in phantoms.LABELS:
        for seed in range(20):
            path = base / "datos_etiquetados" / label / f"{seed}.dcm"
            phantoms.write(phantoms.exposure(label, seed, side=TRAINED_SIDE), path)
    with FakeOllama() as fake:
        asked = ["--descriptions", "20", "--generic-share", "0.5", "--quiet"]
        flags = ["--base", str(base), *phase_flags(fake.url), *asked]
        assert fase2.main(flags) == 0
    assert fase3.main(["--base", str(base), "--quiet"]) == 0


def draw(folder: Path, kind: str, count: int, side: int) -> list[str]:
    """New exposures of the classes in turn, or of none of them."""
    paths = []
    for seed in range(900, 900 + count):
        if kind == "known":
            image = phantoms.exposure(phantoms.LABELS[seed % 3], seed, side=side)
        else:
            image = phantoms.unrelated(seed, side=side)
        paths.append(str(phantoms.write(image, folder / f"{kind}_{side}_{seed}.dcm")))
    return paths


@dataclass
class Run:
    """What the stand-in saw of one run of phase 4; seconds from its start."""

    first_s: float
    asking_s: float
    busy_s: float
    wall_s: float
    questions: int


def measure(base: Path, images: list[str], slots: int, *flags: str) -> Run:
    """One run of phase 4 that knows no answer yet."""
    shutil.rmtree(base / "dataset_final_vlm" / "descripciones", ignore_errors=True)
    with FakeOllama(time_model="gpu", load_s=0.0, num_parallel=slots) as fake:
        command = [sys.executable, str(ROOT / "fase4_inferencia_vlm.py"), *flags]
        command += [*phase_flags(fake.url), "--server-parallel", str(slots)]
        command += ["--base", str(base), "--no-sight-test", *images]
        fake.control(reset_stats=True)
        started = time.monotonic()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        wall_s = time.monotonic() - started
        seen = fake.stats()
    questions = sum(one["asked"] for one in seen["asked"] if one["prompt"])
    first_question = seen["questions_s"][0] if questions else 0.0
    asking_s = max(seen["last_s"].values()) - first_question
    first_s = seen["first_s"]["/api/chat"]
    return Run(first_s, asking_s, seen["busy_s"], wall_s, questions)


def median(values: Iterable[float]) -> float:
    return sorted(values)[RUNS // 2]


def main() -> None:
    """Print the medians of several runs."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        train(base)
        large = draw(base / "new", "known", 6, 2500)
        for slots in (1, 4):
            runs = [measure(base, large, slots, "--ask-all") for _ in range(RUNS)]
            start = median(run.first_s for run in runs)
            added = median(run.asking_s / run.busy_s for run in runs)
            print(
                f"{len(large)} images of 2500 pixels, k = 10, {slots} slot(s): first "
                f"VLM request after {start:.2f} s, asking takes {added:.3f} times the "
                f"server's busy time (medians of {RUNS})",
                flush=True,
            )
        for kind in ("known", "unknown"):
            small = draw(base / "new", kind, 12, TRAINED_SIDE)
            few, ten = measure(base, small, 1), measure(base, small, 1, "--ask-all")
            print(
                f"{len(small)} {kind} images: {few.questions / len(small):.1f} "
                f"questions an image, {few.wall_s:.1f} s against {ten.wall_s:.1f} s "
                f"with {ten.questions / len(small):.0f} (one run each)",
                flush=True,
            )


if __name__ == "__main__":
    main()
