"""How much of the server's time phase 2 uses, and what it costs itself.

Runs the real script against the Ollama stand-in, each in a process of its own, and
prints ratios with their targets:

  a  wall time over the time in which the server works, with 1 and 4 slots
  b  how often an image is encoded, with 1 and 4 slots, in both eras of the server
  c  how many times longer the obvious script takes
  d  CPU time of phase 2 itself per description, full-size images
  e  peak memory of phase 2 with 100 and with 10,000 labelled images

    python tests/benchmarks/bench_fase2.py            about 8 minutes on 2 idle cores
    python tests/benchmarks/bench_fase2.py --quick    about 2

The stand-in's time model (estimates; see PACES in fake_ollama.py) runs on a clock that
is `scale` times faster: what client and stand-in really compute weighs 1 / scale times
as much as in life, so that the ratios of (a) are too high rather than too low. Only
numbers of one run can be compared.
"""

import argparse
import asyncio
import io
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ollama
import pydicom
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import phantoms  # noqa: E402 - the modules of the project lie beside this folder
from conftest import server_flags  # noqa: E402

import config  # noqa: E402

OBVIOUS_FILES_AT_ONCE = 5


@dataclass(frozen=True)
class Usage:
    """What one run of phase 2 took."""

    wall_s: float
    cpu_s: float
    peak_mb: float


@contextmanager
def stand_in(**settings: object) -> Iterator[str]:
    """The stand-in in a process of its own, with both models loaded in no time."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "url"
        flags = [f"--{name.replace('_', '-')}={v}" for name, v in settings.items()]
        command = [sys.executable, str(ROOT / "tests/fake_ollama.py"), "--port=0"]
        command += ["--load-s=0", f"--ready-file={ready}", *flags]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while not (ready.exists() and ready.read_text()):
                time.sleep(0.02)
            try:
                yield ready.read_text()
            finally:
                process.terminate()


def stats(url: str) -> dict[str, Any]:
    """The stand-in's counters."""
    counters: dict[str, Any] = httpx.get(f"{url}/__stats", timeout=60).json()
    return counters


def phase2(base: Path, url: str, *flags: object) -> Usage:
    """Run phase 2 to a complete dataset."""
    command = [sys.executable, str(ROOT / "fase2_generar_vectores_vlm.py"), "--quiet"]
    command += ["--base", str(base), *server_flags(url), *map(str, flags)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"phase 2 ended with {process.returncode}")
    cpu_s = used.ru_utime + used.ru_stime
    return Usage(time.monotonic() - started, cpu_s, used.ru_maxrss / 1024)


def label(base: Path, count: int, rows: int = 64, columns: int = 64) -> Path:
    """Make `count` different exposures, all classes in turn, 16 bits a pixel."""
    for number in range(count):
        name = phantoms.LABELS[number % len(phantoms.LABELS)]
        exposure = phantoms.exposure(name, number, side=max(rows, columns))
        if rows != columns:
            pixels = np.ascontiguousarray(exposure.pixel_array[:rows, :columns])
            exposure.Rows, exposure.Columns = pixels.shape
            exposure.PixelData = pixels.tobytes()
        folder = base / "datos_etiquetados" / name
        folder.mkdir(parents=True, exist_ok=True)
        phantoms.write(exposure, folder / f"{number}.dcm")
    return base


def report(text: str, value: str, target: str) -> None:
    """One line of the table."""
    print(f"  {text:58s} {value:>9s}   target {target}", flush=True)


# --- The obvious script -------------------------------------------------------------


def obvious(base: Path, url: str, prompts: int) -> float:
    """Seconds that the obvious script takes for the same descriptions and vectors."""
    started = time.monotonic()
    files = sorted((base / "datos_etiquetados").rglob("*.dcm"))
    asyncio.run(obvious_script(files, url, config.GENERIC_PROMPTS[:prompts]))
    return time.monotonic() - started


async def obvious_script(files: list[Path], url: str, prompts: tuple[str, ...]) -> None:
    """Five files at once, each file's prompts in sequence, everything made anew."""
    semaphore = asyncio.Semaphore(OBVIOUS_FILES_AT_ONCE)

    async def one_file(path: Path) -> None:
        async with semaphore:
            for prompt in prompts:
                text = await obvious_description(path, url, prompt)
                client = ollama.AsyncClient(url)
                await client.embed("demo-embed", text)

    await asyncio.gather(*map(one_file, files))


async def obvious_description(path: Path, url: str, prompt: str) -> str:
    pixels = pydicom.dcmread(path).pixel_array.astype(np.float32)
    grey = (pixels - pixels.min()) / (np.ptp(pixels) or 1) * 255
    png = io.BytesIO()
    Image.fromarray(grey.astype(np.uint8)).save(png, "PNG")
    message = {"role": "user", "content": prompt, "images": [png.getvalue()]}
    options = {"temperature": 0.7, "num_predict": 160, "num_ctx": 2048}
    reply = await ollama.AsyncClient(url).chat(
        "demo-vlm", messages=[message], options=options
    )
    return reply.message.content or ""


# --- The measurements ---------------------------------------------------------------


def busy_server(folder: Path, quick: bool) -> None:
    """Point a, and b with the stand-in's default cache."""
    images, scale = (12, 0.05) if quick else (40, 0.1)
    base = label(folder / "a", images)
    print(f"a  {images} images x 50 descriptions, gpu-like, clock {1 / scale:.0f} times")
    for slots in (1, 4):
        settings = {"time_model": "gpu", "time_scale": scale, "num_parallel": slots}
        with stand_in(**settings) as url:
            phase2(base, url, "--server-parallel", slots, "--estimate")
            before = stats(url)
            used = phase2(base, url, "--server-parallel", slots)
            after = stats(url)
        (base / "dataset_final_vlm").rename(folder / f"done_{slots}")
        busy_s = after["busy_s"] - before["busy_s"]
        slot_s = after["slot_busy_s"] - before["slot_busy_s"]
        report(f"{slots} slots: wall / busy", f"{used.wall_s / busy_s:.3f}", "<= 1.03")
        share = slot_s / (slots * used.wall_s)
        report(f"{slots} slots: share of the slots in use", f"{share:.3f}", "-")
