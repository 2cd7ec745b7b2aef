"""The four phases on synthetic exposures, from DICOM folder to a class for new images.

Draws about sixty exposures of the three classes (see phantoms.py), runs the scripts
one after another as a person would, does the labelling by moving the files according to
what was simulated, and lets phase 4 classify a few exposures that were kept aside.

    python tests/demo.py              the embedded stand-in describes the images
    python tests/demo.py --ollama     the Ollama at OLLAMA_HOST does, with llava-phi3

The stand-in is no VLM: with it the demo shows that the program works, and says nothing
about how well a VLM tells the classes apart.
"""

import argparse
import csv
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import phantoms
from fake_ollama import FakeOllama

import config

SCRIPTS = Path(__file__).resolve().parents[1]
PER_CLASS = 20
ASIDE_PER_CLASS = 3
SEED = 1
DEMO_MODELS = ("--vlm", "demo-vlm", "--embed-model", "demo-embed")


def say(text: str) -> None:
    """Print a heading of the demo."""
    print(f"\n=== {text}", flush=True)


def phase(script: str, *arguments: str) -> None:
    """Run one of the four scripts as a person would, and show the command."""
    print(f"$ python {script} {shlex.join(arguments)}", flush=True)
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(f"{script} ended with code {code}")


def draw(base: Path) -> tuple[dict[str, str], dict[Path, str]]:
    """Write the exposures; labels by SOPInstanceUID, and the files kept aside."""
    counts = dict.fromkeys(phantoms.LABELS, PER_CLASS)
    inputs = base / config.Config().input_dir
    labels = phantoms.write_collection(inputs, counts, SEED)
    aside: dict[Path, str] = {}
    for label in phantoms.LABELS:
        for seed in range(1000, 1000 + ASIDE_PER_CLASS):
            image = phantoms.compress(
                phantoms.exposure(label, seed), "jpeg_lossless_sv1"
            )
            aside[phantoms.write(image, base / "new" / f"{seed}_{len(aside)}.dcm")] = (
                label
            )
    stranger = phantoms.unrelated(1000)
    path = phantoms.write(stranger, base / "new" / f"1000_{len(aside)}.dcm")
    aside[path] = config.INCONCLUSIVE
    return labels, aside


def label_by_hand(base: Path, labels: dict[str, str]) -> None:
    """Move every file of phase 1 into the folder of its class, as a person would."""
    knobs = config.Config(base=base)
    written = knobs.folder("decompressed_dir")
    with (written / config.FILE_LIST).open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            label = labels[row["sop_instance_uid"]]
            source = written / row["output"]
            source.rename(knobs.folder("labelled_dir") / label / source.name)
            print(f"moved {source.name} to {label}")


def compare(table: Path, aside: dict[Path, str]) -> None:
    """Print what phase 4 said of the kept exposures beside what they are."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        path = Path(row["file"])
        print(f"{path.name}: is {aside[path]}, phase 4 says {row['class']}")
    right = sum(row["class"] == aside[Path(row["file"])] for row in rows)
    print(f"{right} of {len(rows)} as they should be")


def run(base: Path, server: Sequence[str]) -> None:
    """The whole demo."""
    where = ("--base", str(base))
    say("Drawing synthetic exposures")
    labels, aside = draw(base)
    print(f"{len(labels)} exposures to train on, {len(aside)} kept aside")
    say("Phase 1: decompress, name by acquisition time")
    phase("fase1_descompresion.py", *where)
    say("Phase 1.5: a person moves the files into class folders")
    label_by_hand(base, labels)
    say("Phase 2: describe and embed")
    phase("fase2_generar_vectores_vlm.py", *where, *server)
    say("Phase 3: train and evaluate")
    phase("fase3_entrenamiento_svc.py", *where)
    say("Phase 4: exposures that no phase has seen")
    table = base / "results.csv"
    new = str(base / "new")
    phase("fase4_inferencia_vlm.py", *where, *server, "--csv", str(table), new)
    say("What they really are")
    compare(table, aside)
    say("Where everything lies")
    for path in sorted(base.iterdir()):
        print(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ollama", action="store_true", help="use a real Ollama")
    parser.add_argument("--base", type=Path, help="an empty folder for the data")
    arguments = parser.parse_args()
    now = datetime.now().astimezone()
    base = arguments.base or Path("demo") / f"{now:%Y%m%d_%H%M%S}"
    base.mkdir(parents=True, exist_ok=True)
    stand_in = nullcontext() if arguments.ollama else FakeOllama()
    with stand_in as fake:
        server = () if fake is None else ("--host", fake.url, *DEMO_MODELS)
        run(base, server)


if __name__ == "__main__":
    main()
