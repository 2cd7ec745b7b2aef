"""How much faster phase 2 is with more servers, or with more Dask workers.

    python tests/benchmarks/bench_hosts.py
    python tests/benchmarks/bench_hosts.py --counts 1 4

Every stand-in, the scheduler and every worker is a process of its own. The stand-ins
sleep the time of a GPU (some 0.35 s an answer, one slot); all processes together work
some 20 ms an answer, so that two cores can serve four of them. "asking" is from the
first answer in the journal to the last, without tests of sight; the total has start,
reading and writing as well. "ms over" is what asking takes beside the time that the
servers were busy, by answer.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import phantoms

import config
import utils

ROOT = Path(__file__).resolve().parents[2]
LINE = "{:<22}{:>10}{:>10}{:>10}{:>10}{:>12}{:>10}"


@contextmanager
def process(*words: object, **environment: str) -> Iterator[None]:
    """A Python program that runs meanwhile."""
    with subprocess.Popen(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as started:
        try:
            yield
        finally:
            started.kill()


def read(file: Path) -> str:
    """The content of a file that a program writes when it is ready."""
    while not (file.exists() and file.read_text()):
        time.sleep(0.05)
    return file.read_text()


def measure(
    folder: Path, count: int, dask: bool, args: argparse.Namespace
) -> tuple[float, float, float]:
    """Seconds of asking, seconds in all, and seconds the servers were busy."""
    models = ["--vlm", "demo-vlm", "--embed-model", "demo-embed"]
    words = ["--base", folder, "--dataset-dir", f"out{count}{dask}", *models]
    words += ["--descriptions", args.descriptions, "--no-sight-test"]
    with ExitStack() as running:
        urls = []
        for n in range(count):
            ready = folder / f"ready{count}{dask}{n}"
            stand_in = ROOT / "tests/fake_ollama.py"
            settings = ['time_model="gpu"', f"time_scale={args.scale}", "load_s=0"]
            running.enter_context(
                process(stand_in, "--port", 0, "--ready-file", ready, *settings)
            )
            urls.append(read(ready).strip())
        if dask:
            ready = folder / f"scheduler{count}"
            cli = "distributed.cli.dask_"
            options = ["--port", 0, "--no-dashboard", "--scheduler-file", ready]
            running.enter_context(process("-m", f"{cli}scheduler", *options))
            scheduler = json.loads(read(ready))["address"]
            for url in urls:
                options = [scheduler, "--no-nanny", "--no-dashboard"]
                running.enter_context(
                    process("-m", f"{cli}worker", *options, OLLAMA_HOST=url)
                )
            wait_for_workers(scheduler, count)
            words += ["--dask", scheduler]
        else:
            words += ["--host", ",".join(urls)]
        started = time.monotonic()
        script = [sys.executable, ROOT / "fase2_generar_vectores_vlm.py", *words]
        subprocess.run([*map(str, script)], check=True, capture_output=True)
        total = time.monotonic() - started
        busy = sum(json.load(urlopen(f"{url}/__stats"))["slot_busy_s"] for url in urls)
    times = sorted(answer_times(folder / f"out{count}{dask}"))
    return times[-1] - times[0], total, busy


def wait_for_workers(scheduler: str, count: int) -> None:
    """Return when the scheduler has so many workers."""
    connect: Any = import_module("distributed").Client
    with connect(scheduler) as client:
        client.wait_for_workers(count)


def answer_times(dataset: Path) -> Iterator[float]:
    """When each answer came, seconds."""
    for path in (dataset / config.JOURNAL_DIR).glob("?" * 64 + ".jsonl"):
        kept = dict(utils.Journal(path).items())
        answers = (one for one in kept.values() if "prompt" in one)
        yield from (datetime.fromisoformat(one["time"]).timestamp() for one in answers)


def main() -> None:
    """Print one line a number of servers, and of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--descriptions", type=int, default=20)
    parser.add_argument("--counts", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--no-servers", action="store_true", help="Dask alone")
    parser.add_argument("--scale", type=float, default=1.0, help="of the GPU's time")
    args = parser.parse_args()
    answers: Any = args.images * args.descriptions
    columns = ("asking s", "speed-up", "of n", "total s", "speed-up", "ms over")
    print(f"{answers} answers; load of the machine {os.getloadavg()[0]:.1f}")
    print(LINE.format("", *columns), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n in range(args.images):
            label = phantoms.LABELS[n % len(phantoms.LABELS)]
            path = folder / "datos_etiquetados" / label / f"{n}.dcm"
            phantoms.write(phantoms.exposure(label, n, side=64), path)
        for dask in (False, True)[args.no_servers :]:
            first: tuple[float, float] | None = None
            for count in args.counts:
                asking, total, busy = measure(folder, count, dask, args)
                first = first or (asking, total)
                each = busy / answers
                over = 1000 * (asking * count / (answers - count) - each)
                shown = (
                    *(f"{asking:.1f}", f"{first[0] / asking:.2f}"),
                    *(f"{first[0] / asking / count:.3f}", f"{total:.1f}"),
                    *(f"{first[1] / total:.2f}", f"{over:.1f}"),
                )
                kind = "Dask workers" if dask else "servers"
                print(LINE.format(f"{count} {kind}", *shown), flush=True)
    print(f"load of the machine {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
