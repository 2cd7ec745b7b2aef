"""How much processor time phase 1 takes, against other ways to decompress.

Makes its own images (noise and a gradient, as detectors give them), lets each way
decompress the same folder, and prints CPU and wall time and the ratio to the obvious
script. CPU time is that of the process and all its descendants. `dcmdjpeg`, `dcmdrle`
and `gdcmconv` are measured where they are installed.

Memory is the largest sum of the proportional set sizes of phase 1 and its processes;
what it takes with images of 8 × 8 pixels is the base (Linux).

Each way is measured on one image as well. What that takes is mostly start-up, which
a run pays once; the rest, shared out among the other images, is what each further image
costs. The last column compares that part alone.

    python tests/benchmarks/bench_fase1.py --rounds 3
    python tests/benchmarks/bench_fase1.py --program ../old/fase1_descompresion.py

The table can only be read from one run: times of two runs can't be compared.
"""

import argparse
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from dicom_samples import make  # noqa: E402

PROGRAM = ROOT / "fase1_descompresion.py"
OBVIOUS = """
import sys, pathlib, pydicom
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    dataset = pydicom.dcmread(path)
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        dataset.decompress(generate_instance_uid=False)
    dataset.save_as(pathlib.Path(sys.argv[2]) / path.name)
"""
SYNTAXES = {
    "JPEG Lossless": uid.JPEGLosslessSV1,
    "JPEG-LS": uid.JPEGLSLossless,
    "RLE": uid.RLELossless,
    "JPEG 2000": uid.JPEG2000Lossless,
    "JPEG 2000 lossy": uid.JPEG2000,
    "uncompressed": uid.ExplicitVRLittleEndian,
}
PEERS = {
    "JPEG Lossless": ("dcmdjpeg", "gdcmconv"),
    "JPEG-LS": ("dcmdjpls", "gdcmconv"),
    "RLE": ("dcmdrle", "gdcmconv"),
    "JPEG 2000": ("gdcmconv",),
    "JPEG 2000 lossy": ("gdcmconv",),
    "uncompressed": ("dcmconv", "gdcmconv"),
}
TARGETS = {
    "JPEG Lossless": 0.36,
    "JPEG-LS": 0.70,
    "RLE": 0.50,
    "JPEG 2000": 0.85,
    "JPEG 2000 lossy": 0.85,
    "uncompressed": 0.85,
}
LOSSY_PSNR_DB = 70


def detector_image(side: int, seed: int) -> NDArray[np.uint16]:
    """A noisy gradient, uint16 (side, side), of which 14 bits are used."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(3000, 9000, side)[:, None]
    return (ramp + rng.normal(0, 60, (side, side))).astype(np.uint16)


def sample(syntax: str, pixels: NDArray[np.uint16]) -> Dataset:
    """An image in a transfer syntax; lossy, it is compressed to a seventh or so."""
    if syntax != "JPEG 2000 lossy":
        return make(pixels, SYNTAXES[syntax], bits=16)
    dataset = make(pixels, SYNTAXES["JPEG 2000"], bits=16)
    dataset.file_meta.TransferSyntaxUID = SYNTAXES[syntax]
    frame = imagecodecs.jpeg2k_encode(
        pixels, codecformat="J2K", reversible=False, level=LOSSY_PSNR_DB
    )
    dataset.PixelData = encapsulate([bytes(frame)])
    return dataset


def write_samples(folder: Path, syntax: str, count: int, side: int) -> None:
    """`count` files in one transfer syntax; four different images, repeated."""
    folder.mkdir(parents=True)
    made = [sample(syntax, detector_image(side, seed)) for seed in range(min(count, 4))]
    for number in range(count):
        dataset = made[number % len(made)]
        dataset.SOPInstanceUID = uid.UID(f"2.25.{number + 1}")
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.AcquisitionTime = f"{100000 + number}"
        dataset.save_as(folder / f"{number:04d}.dcm", enforce_file_format=True)


def measure(command: Callable[[], None]) -> tuple[float, float]:
    """(CPU, wall) seconds of a call, with those of all its descendants."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    command()
    wall = time.perf_counter() - started
    _reap_orphans()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, wall


def adopt_orphans() -> None:
    """Linux: become the parent of descendants whose parent ends, to count them too."""
    import ctypes  # noqa: PLC0415 - nothing else needs it

    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def _reap_orphans() -> None:
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def peak_memory(command: Callable[[], None]) -> float:
    """Largest sum of the proportional set sizes of all descendants, in bytes."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, sum(map(_set_size, descendants(os.getpid()))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        command()
    finally:
        done.set()
        watcher.join()
    _reap_orphans()  # else their time would be counted with what comes next
    return peak


def descendants(process: int) -> Iterator[int]:
    """The processes that a process has started, and theirs."""
    children = []
    with suppress(OSError):  # it may end at any moment
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            children += [int(child) for child in path.read_text("ascii").split()]
    for child in children:
        yield child
        yield from descendants(child)


def _set_size(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text("ascii")
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def ways(
    samples: Path, work: Path, jobs: int
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every way to decompress `samples`, the obvious script first."""
    output = work / "output"
    yield "obvious script", partial(obvious, samples, output)
    yield "fase1, 1 job", partial(fase1, samples, work, 1)
    if jobs > 1:
        yield f"fase1, {jobs} jobs", partial(fase1, samples, work, jobs)
    for name in PEERS[samples.name]:
        if shutil.which(name):
            yield name, partial(peer, name, samples, output)


def call(*command: object) -> None:
    """Run a program in silence."""
    words = [str(part) for part in command]
    subprocess.run(words, check=True, capture_output=True)


def obvious(samples: Path, output: Path) -> None:
    """Read, decompress and save with pydicom, one file after the other."""
    output.mkdir()
    call(sys.executable, "-c", OBVIOUS, samples, output)


def fase1(samples: Path, work: Path, jobs: int) -> None:
    """Phase 1 as a user runs it."""
    call(
        *(sys.executable, PROGRAM, "--base", work),
        *("--input-dir", samples, "--jobs", jobs),
    )


def peer(name: str, samples: Path, output: Path) -> None:
    """A converter of DCMTK or GDCM, file by file."""
    output.mkdir()
    raw = ("--raw",) if name == "gdcmconv" else ()
    for path in sorted(samples.iterdir()):
        call(name, *raw, path, output / path.name)


Times = dict[str, tuple[float, float]]


def measure_ways(samples: Path, folder: Path, args: argparse.Namespace) -> Times:
    """Median (CPU, wall) seconds of each way over the rounds."""
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for name, command in ways(samples, folder / "work", args.jobs):
            shutil.rmtree(folder / "work", ignore_errors=True)
            (folder / "work").mkdir()
            found.setdefault(name, []).append(measure(command))
    return {
        name: (
            statistics.median(cpu for cpu, _ in times),
            statistics.median(wall for _, wall in times),
        )
        for name, times in found.items()
    }


def print_memory(syntax: str, side: int, jobs: int, folder: Path) -> None:
    """What phase 1 takes with one and with all workers, in images above the base."""
    peaks = {}
    for pixels in (8, side):
        samples = folder / f"memory{pixels}" / syntax
        write_samples(samples, syntax, 4 * jobs, pixels)
        for count in sorted({1, jobs}):
            work = folder / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            peaks[pixels, count] = peak_memory(partial(fase1, samples, work, count))
        shutil.rmtree(samples)
    for count in sorted({1, jobs}):
        base, image = peaks[8, count], 2 * side**2
        images = (peaks[side, count] - base) / image / count
        print(
            f"  memory, {count} job(s): {base / 1e6:.0f} MB and {images:.1f} images of "
            f"{image / 1e6:.0f} MB a worker"
        )


def bench(syntax: str, args: argparse.Namespace, folder: Path) -> None:
    """Measure one transfer syntax and print its rows."""
    slow = syntax.startswith("JPEG 2000")
    count = max(2, args.count // 4) if slow else args.count
    found = {}
    for number in (1, count):
        samples = folder / str(number) / syntax
        write_samples(samples, syntax, number, args.side)
        found[number] = measure_ways(samples, folder, args)
        shutil.rmtree(samples)
    print(f"\n{syntax}: {count} images of {args.side}x{args.side}, 16 bit")
    print_rows(syntax, found[1], found[count], count)
    print_memory(syntax, args.side, args.jobs, folder)


def print_rows(syntax: str, one: Times, all_: Times, count: int) -> None:
    """Times of all images; what the first and each further one takes; ratios."""
    each = {name: (all_[name][0] - one[name][0]) / (count - 1) for name in all_}
    obvious = "obvious script"
    for name, (cpu, wall) in all_.items():
        print(
            f"  {name:16s} CPU {cpu:7.2f} s  wall {wall:7.2f} s  "
            f"{cpu / all_[obvious][0]:5.2f}  first image {one[name][0]:5.2f} s, "
            f"each further {each[name]:6.3f} s  {each[name] / each[obvious]:5.2f}"
        )
    ours = [name for name in all_ if name.startswith("fase1")]
    share = all_[ours[0]][0] / all_[obvious][0]
    goal = f"(target {TARGETS[syntax]:.2f}), start-up included"
    print(f"  CPU of phase 1 against the obvious script: {share:.2f} {goal}")
    if len(ours) > 1:
        walls = [all_[name][1] for name in ours]
        print(f"  wall time, {' against '.join(ours)}: {walls[0] / walls[1]:.2f} times")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--count", type=int, default=60, help="images a syntax; a quarter of JPEG 2000"
    )
    parser.add_argument("--side", type=int, default=3000, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=SYNTAXES, help="one transfer syntax")
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("--program", type=Path, help="another version of phase 1")
    args = parser.parse_args()
    if args.program:
        globals()["PROGRAM"] = args.program.resolve()
    adopt_orphans()
    print(f"Python {sys.version.split()[0]}, pydicom {pydicom.__version__},", end=" ")
    print(f"imagecodecs {imagecodecs.__version__}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for syntax in [args.only] if args.only else SYNTAXES:
            bench(syntax, args, Path(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
