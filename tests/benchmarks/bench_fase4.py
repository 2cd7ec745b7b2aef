"""Phase 4 against the stand-in's clock: how soon it asks, how little it adds.

Trains a small model with the stand-in, then classifies new exposures with k = 10 while
the stand-in takes the time of a GPU, and prints:

- start: seconds from the start of the process to its first request to the VLM;
- added: time from the first to the last description, over the server's busy time.

    python tests/benchmarks/bench_fase4.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import phantoms
from fake_ollama import FakeOllama, phase_flags

import fase2_generar_vectores_vlm as fase2
import fase3_entrenamiento_svc as fase3

ROOT = Path(__file__).resolve().parents[2]
RUNS = 5
NEW_IMAGES = 6


def train(base: Path) -> None:
    """A model of ten small images a class."""
    for label in phantoms.LABELS:
        for seed in range(10):
            path = base / "datos_etiquetados" / label / f"{seed}.dcm"
            phantoms.write(phantoms.exposure(label, seed, side=160), path)
    with FakeOllama() as fake:
        asked = ["--descriptions", "20", "--generic-share", "0.5", "--quiet"]
        flags = ["--base", str(base), *phase_flags(fake.url), *asked]
        assert fase2.main(flags) == 0
    assert fase3.main(["--base", str(base), "--quiet"]) == 0


def new_images(folder: Path) -> list[str]:
    """Full-size exposures, as a detector gives them."""
    images = []
    for seed in range(NEW_IMAGES):
        image = phantoms.exposure(phantoms.LABELS[seed % 3], 900 + seed, side=2500)
        images.append(str(phantoms.write(image, folder / f"{seed}.dcm")))
    return images


def measure(base: Path, images: list[str], slots: int) -> tuple[float, float, float]:
    """Seconds to the first VLM request, of asking, and of the server being busy."""
    with FakeOllama(time_model="gpu", load_s=0.0, num_parallel=slots) as fake:
        command = [sys.executable, str(ROOT / "fase4_inferencia_vlm.py")]
        flags = [*phase_flags(fake.url), "--server-parallel", str(slots)]
        fake.control(reset_stats=True)
        subprocess.run(
            [*command, "--base", str(base), *flags, *images],
            stdout=subprocess.DEVNULL,
            check=False,
        )
        seen = fake.stats()
    first_question, _ = seen["questions_s"]
    asking_s = max(seen["last_s"].values()) - first_question
    return seen["first_s"]["/api/chat"], asking_s, seen["busy_s"]


def main() -> None:
    """Print the medians of several runs."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        train(base)
        images = new_images(base / "new")
        for slots in (1, 4):
            runs = [measure(base, images, slots) for _ in range(RUNS)]
            start = sorted(first for first, _, _ in runs)[RUNS // 2]
            added = sorted(asking / busy for _, asking, busy in runs)[RUNS // 2]
            print(
                f"{len(images)} images of 2500 pixels, k = 10, {slots} slot(s): first "
                f"VLM request after {start:.2f} s, asking takes {added:.3f} times the "
                f"server's busy time (medians of {RUNS})"
            )


if __name__ == "__main__":
    main()
