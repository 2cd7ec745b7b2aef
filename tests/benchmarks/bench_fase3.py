"""What phase 3 costs beside the obvious script.

    python tests/benchmarks/bench_fase3.py
    python tests/benchmarks/bench_fase3.py --images 1000 --features 768

The obvious script is SVC(kernel="linear", probability=True) on all rows and one 80/20
split of rows. Vectors are simulated: class, image, prompt and noise in 60 correlated
directions, and white noise. Accuracy is that of new images, 10 generic rows each.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import joblib
from numpy.typing import NDArray

import config
import utils

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("FDT", "MTF", "TOR")
N_DIRECTIONS = 60
NEW_PER_CLASS = 60
OBVIOUS_UP_TO = 100
HEADERS = (
    "modality,manufacturer,detector,day,rows,columns,kvp,mas,first_answer,"
    "last_answer,server_versions"
)

OBVIOUS = """
import sys, warnings, joblib, numpy as np
from sklearn.metrics import classification_report
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
warnings.simplefilter("ignore")
folder, target = sys.argv[1:]
X, y = np.load(folder + "/dataset_X.npy"), np.load(folder + "/dataset_y.npy")
train, test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=0)
scaler = StandardScaler().fit(train)
svc = SVC(kernel="linear", probability=True, random_state=0)
svc.fit(scaler.transform(train), y_train)
print(classification_report(y_test, svc.predict(scaler.transform(test))))
joblib.dump(svc, target + "/clasificador_svc.joblib")
joblib.dump(scaler, target + "/escalador.joblib")
"""


@dataclass
class World:
    """Directions, classes and prompts that all images of one simulation share."""

    rng: np.random.Generator
    n_features: int
    of_class: float = 0.8

    def __post_init__(self) -> None:
        draw = self.rng.normal
        self.spectrum = 1 / np.sqrt(1 + np.arange(N_DIRECTIONS))
        self.directions = draw(size=(N_DIRECTIONS, self.n_features))
        self.directions /= np.sqrt(self.n_features)
        self.base = draw(size=N_DIRECTIONS)
        self.classes = self.of_class * draw(size=(len(CLASSES), N_DIRECTIONS))
        self.pictures = 0.8 * np.random.default_rng(0).normal(size=(len(CLASSES), 40))
        self.prompts = 1.5 * draw(size=(60, N_DIRECTIONS)) * self.spectrum

    def image(self, label: int, prompts: NDArray[np.intp]) -> NDArray[np.float32]:
        """Unit rows of one new image, one per prompt."""
        draw = self.rng.normal
        own = (self.classes[label] + 1.3 * draw(size=N_DIRECTIONS)) * self.spectrum
        noise = 2.6 * draw(size=(len(prompts), N_DIRECTIONS)) * self.spectrum
        latent = self.base + own + self.prompts[prompts] + noise
        white = draw(size=(len(prompts), self.n_features), scale=1.8)
        rows = latent @ self.directions + white / np.sqrt(self.n_features)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(rows, np.float32)


GENERIC = 40 + np.arange(10)


def own_prompts(label: int) -> NDArray[np.intp]:
    """Forty differentiated descriptions: twenty prompts, twice."""
    return np.asarray(np.tile(np.arange(20), 2) + (20 if label == 0 else 0))


def write(world: World, base: Path, n_images: int) -> None:
    """A dataset as phase 2 would write it; the pictures tell the classes apart, too."""
    lines: list[dict[str, Any]] = []
    parts = []
    for label, name in enumerate(CLASSES):
        for i in range(len(range(label, n_images, len(CLASSES)))):
            prompts = np.concatenate([own_prompts(label), GENERIC])
            parts.append(world.image(label, prompts))
            sets = ["object" if label else "background"] * 40 + ["generic"] * 10
            image = {"image_id": f"{name}{i}", "file": f"{name}/{i}.dcm", "class": name}
            lines += [image | {"prompt_set": each, "description": ""} for each in sets]
    images = [lines[row] for row in range(0, len(lines), 50)]
    labels = np.array([CLASSES.index(line["class"]) for line in images])
    noise = np.random.default_rng(n_images).normal(size=(n_images, 40))
    pixels = noise + world.pictures[labels]
    folder = base / "dataset_final_vlm"
    folder.mkdir(parents=True)
    np.save(folder / config.DATASET_X, np.concatenate(parts))
    np.save(folder / config.DATASET_Y, np.array([line["class"] for line in lines]))
    np.save(folder / config.DATASET_PIXELS, pixels.astype(np.float32))
    columns = ("image_id", "file", "class", "prompt_set", "description")
    utils.write_csv(folder / config.DATASET_ROWS, columns, lines)
    empty = dict.fromkeys(HEADERS.split(","), "")
    table = [empty | {name: line[name] for name in columns[:3]} for line in images]
    utils.write_csv(folder / config.DATASET_IMAGES, list(table[0]), table)
    manifest = {
        "conditions": {},
        "probe_vector": "AAAAAA==",
        "sha256": {path.name: utils.sha256_of(path) for path in folder.iterdir()},
    }
    utils.write_json(folder / config.MANIFEST, manifest)


def new_images(world: World) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """Mean generic vectors of images that no model has seen, and their classes."""
    labels = np.repeat(np.arange(len(CLASSES)), NEW_PER_CLASS)
    means = [world.image(int(label), GENERIC).mean(axis=0) for label in labels]
    return np.array(means), np.array(CLASSES)[labels]


def cost(command: Sequence[str]) -> tuple[float, float]:
    """CPU seconds and peak megabytes of one command (Linux).

    Not ru_maxrss, which starts at the size of the process that forks.
    """
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    peak_kib = 0
    while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
        status = Path(f"/proc/{child.pid}/status").read_text("ascii")
        peak_kib = int((re.findall(r"VmHWM:\s+(\d+)", status) or [peak_kib])[0])
        time.sleep(0.02)
    child.returncode = os.waitstatus_to_exitcode(ended[1])
    assert child.returncode == 0, command
    return ended[2].ru_utime + ended[2].ru_stime, peak_kib * 1024 / 1e6


def accuracy(folder: Path, new: tuple[NDArray[Any], NDArray[Any]]) -> float:
    scaler = joblib.load(folder / config.SCALER)
    classifier = joblib.load(folder / config.CLASSIFIER)
    return float(np.mean(classifier.predict(scaler.transform(new[0])) == new[1]))


def compare(n_images: int, n_features: int) -> None:
    """CPU seconds, accuracy and memory of phase 3, and of the obvious script."""
    world = World(np.random.default_rng(n_images), n_features)
    with tempfile.TemporaryDirectory() as place:
        base, plain = Path(place), Path(place) / "obvious"
        plain.mkdir()
        write(world, base, n_images)
        new = new_images(world)
        dataset = base / "dataset_final_vlm"
        megabytes = (dataset / config.DATASET_X).stat().st_size / 1e6
        phase = [sys.executable, "fase3_entrenamiento_svc.py", "--quiet", "--base"]
        ours, peak = cost([*phase, str(base)])
        found = utils.read_json(base / "modelo_final_vlm" / config.METRICS, "")
        sure = found["confidence"]
        line = (
            f"{n_images:>5} images, {n_features} features: {ours:.1f} CPU s, accuracy "
            f"{accuracy(base / 'modelo_final_vlm', new):.3f} (estimated "
            f"{found['evaluation']['accuracy']['value']:.3f}), Brier score "
            f"{sure['brier']:.3f}, calibration error {sure['calibration_error']:.3f}, "
            f"questions {found['decision']['questions']['value']:.1f}, peak {peak:.0f} "
            f"MB = {peak / megabytes:.2f} x dataset_X.npy"
        )
        if n_images <= OBVIOUS_UP_TO and n_features == 3072:
            command = [sys.executable, "-c", OBVIOUS, str(dataset), str(plain)]
            obvious, _ = cost(command)
            line += f"; obvious script {obvious:.1f} CPU s, {accuracy(plain, new):.3f}"
        print(line, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[50, 100, 300, 1000])
    parser.add_argument("--features", type=int, nargs="+", default=[3072, 768])
    arguments = parser.parse_args()
    for n_features in arguments.features:
        for n_images in arguments.images:
            compare(n_images, n_features)
    print(
        f"The obvious script is not run beyond {OBVIOUS_UP_TO} images: its time grows "
        "with the square of the rows and more."
    )


if __name__ == "__main__":
    main()
