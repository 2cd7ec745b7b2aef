"""What phase 3 costs beside the obvious script, and what its shortcuts change.

    python tests/benchmarks/bench_fase3.py                 200 images, and the law
    python tests/benchmarks/bench_fase3.py --images 1000   measured there (an hour)
    python tests/benchmarks/bench_fase3.py --shortcuts     pooling, one scaler

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
from dataclasses import dataclass, replace
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
            lines += [image | {"prompt_set": prompt_set} for prompt_set in sets]
    images = [lines[row] for row in range(0, len(lines), 50)]
    labels = np.array([CLASSES.index(line["class"]) for line in images])
    noise = np.random.default_rng(n_images).normal(size=(n_images, 40))
    pixels = noise + world.pictures[labels]
    folder = base / "dataset_final_vlm"
    folder.mkdir(parents=True)
    np.save(folder / config.DATASET_X, np.concatenate(parts))
    np.save(folder / config.DATASET_Y, np.array([line["class"] for line in lines]))
    np.save(folder / config.DATASET_PIXELS, pixels.astype(np.float32))
    columns = ("image_id", "file", "class", "prompt_set")
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


def compare(n_images: int, with_obvious: bool = True) -> tuple[float, float]:
    """CPU seconds of the obvious script (NaN if left out) and of phase 3."""
    world = World(np.random.default_rng(n_images), 3072)
    with tempfile.TemporaryDirectory() as place:
        base, plain = Path(place), Path(place) / "obvious"
        plain.mkdir()
        write(world, base, n_images)
        new = new_images(world)
        dataset = base / "dataset_final_vlm"
        megabytes = (dataset / config.DATASET_X).stat().st_size / 1e6
        phase = [sys.executable, "fase3_entrenamiento_svc.py", "--quiet", "--base"]
        ours, peak = cost([*phase, str(base)])
        line = f"{n_images:>5} images: phase 3 {ours:.1f} CPU s, accuracy "
        line += f"{accuracy(base / 'modelo_final_vlm', new):.3f}, peak {peak:.0f} MB "
        line += f"= {peak / megabytes:.2f} x dataset_X.npy"
        obvious = float("nan")
        if with_obvious:
            command = [sys.executable, "-c", OBVIOUS, str(dataset), str(plain)]
            obvious, peak = cost(command)
            line += (
                f"; obvious {obvious:.1f} CPU s, accuracy {accuracy(plain, new):.3f}"
            )
            line += f", peak {peak:.0f} MB; ratio 1/{obvious / ours:.1f}"
        print(line, flush=True)
    return obvious, ours


def speed(n_images: int) -> None:
    """The comparison at one size, or at three and a law for 1,000 images."""
    if n_images != 200:
        compare(n_images)
        return
    sizes = np.array([50, 100, 200])
    seconds = np.array([compare(int(size))[0] for size in sizes])
    power, start = np.polyfit(np.log(sizes), np.log(seconds), 1)
    law = np.exp(start) * 1000**power
    _, ours = compare(1000, with_obvious=False)
    print(f"obvious script: {np.exp(start):.2g} s x images^{power:.2f}")
    print(f" 1000 images, extrapolated: {law:.0f} CPU s; ratio 1/{law / ours:.0f}")


def shortcuts() -> None:
    """What averaging rows and sharing one scaler between the folds change."""
    pools: dict[int, list[float]] = {1: [], 2: [], 5: [], 10: []}
    changed = total = 0
    for seed in range(8):
        world = World(np.random.default_rng(seed), 768)
        with tempfile.TemporaryDirectory() as place:
            write(world, Path(place), 60)
            dataset = fase3.load_dataset(Path(place) / "dataset_final_vlm")
            new = new_images(world)
            for pool, found in pools.items():
                found.append(accuracy_of(dataset, pool, new))
            weak = World(np.random.default_rng(100 + seed), 768, of_class=0.5)
            write(weak, Path(place), 45)
            changes, images = refitted(Path(place))
            changed, total = changed + changes, total + images
    for pool, found in pools.items():
        print(f"means of {pool:>2} rows: accuracy {np.mean(found):.3f} on new images")
    print(
        f"a scaler per fold changes {changed} of {total} decisions on held-out images"
    )


def accuracy_of(dataset: Dataset, pool: int, new: tuple[Any, Any]) -> float:
    scaler = fase3.fit_scaler(dataset.rows)
    space = fase3.make_space(dataset, scaler, pool, 10)
    names = np.array(dataset.classes)[dataset.labels]
    model = Model("linear", 0.01, 1.0, pool)
    classifier = fase3.fit_classifier(space, model, names, 1.0)
    return float(np.mean(classifier.predict(scaler.transform(new[0])) == new[1]))


def refitted(base: Path) -> tuple[int, int]:
    """Held-out decisions that differ when each fold has a scaler of its own."""
    cfg = config.Config(base=base, repeats=1)
    dataset = fase3.load_dataset(cfg.folder("dataset_dir"))
    study = fase3.design_experiment(dataset, fase3.fit_scaler(dataset.rows), cfg)
    shared = fase3.held_out_scores(study, ["protocol"])["protocol"][0].argmax(axis=1)
    own = np.zeros_like(shared)
    for _, training, held_out in study.splits():
        scaler = fase3.fit_scaler(dataset.rows[training[dataset.image]])
        space = fase3.make_space(dataset, scaler, study.models[0].pool, 10)
        only = np.where(held_out, 0, 1)[None]
        fold: Experiment = replace(
            study, spaces={study.models[0].pool: space}, folds=only
        )
        scores = fase3.held_out_scores(fold, ["protocol"])["protocol"][0]
        own[held_out] = scores[held_out].argmax(axis=1)
    return int(np.sum(own != shared)), len(own)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--shortcuts", action="store_true")
    arguments = parser.parse_args()
    if arguments.shortcuts:
        shortcuts()
    else:
        speed(arguments.images)


if __name__ == "__main__":
    main()
