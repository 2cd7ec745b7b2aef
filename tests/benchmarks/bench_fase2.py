"""How much of the server's time phase 2 uses, and what it costs itself.

Runs the real script against the Ollama stand-in, each in a process of its own, and
prints ratios with their targets:

  a  wall time over the time in which the server works, with 1 and 4 slots
  b  how often an image is encoded, with 1 and 4 slots, in both eras of the server
  c  how many times longer the obvious script takes
  d  CPU time of phase 2 itself per description, full-size images
  e  peak memory of phase 2 with 100 and with 10,000 labelled images

    python tests/benchmarks/bench_fase2.py            about 15 minutes on 2 cores
    python tests/benchmarks/bench_fase2.py --quick    about 4

The stand-in's time model (estimates; see PACES in fake_ollama.py) runs on a clock that
is 1 / scale times faster: what client and stand-in really compute weighs that many
times as much as in life, and the ratios of (a) are too high rather than too low. Only
numbers of one run can be compared.
"""

import argparse
import asyncio
import io
import json
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
from fake_ollama import phase_flags  # noqa: E402

import config  # noqa: E402

OBVIOUS_FILES_AT_ONCE = 5
MEASURED = """
import sys, time
import fase2_generar_vectores_vlm as fase2

started, imports_cpu_s = time.monotonic(), time.process_time()
code = fase2.main(sys.argv[1:])
wall_s, cpu_s = time.monotonic() - started, time.process_time() - imports_cpu_s
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, wall_s, cpu_s, int(peak.split()[1]) / 1024)
"""
"""Phase 2 that says what it used; ru_maxrss would count its parent's memory as well."""


@dataclass(frozen=True)
class Usage:
    """What one run of phase 2 took after its imports."""

    wall_s: float
    cpu_s: float
    peak_mb: float


@contextmanager
def stand_in(**settings: object) -> Iterator[str]:
    """The stand-in in a process of its own, with both models loaded in no time."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "url"
        values = [f"{k}={json.dumps(v)}" for k, v in {"load_s": 0, **settings}.items()]
        command = [sys.executable, str(ROOT / "tests/fake_ollama.py"), "--port=0"]
        command += [f"--ready-file={ready}", *values]
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


def asking_s(seen: dict[str, Any]) -> float:
    """Seconds from the first question about an image to the last answer or vector.

    Without the preflight, the scan and the writing of the dataset.
    """
    ends = (seen["last_s"][path] for path in ("/api/chat", "/api/embed"))
    return float(max(ends) - seen["questions_s"][0])


def phase2(base: Path, url: str, *flags: object) -> Usage:
    """Run phase 2 to a complete dataset."""
    command = [sys.executable, "-c", MEASURED, "--quiet", "--base", str(base)]
    command += [*phase_flags(url), *map(str, flags)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True
    )
    code, *used = done.stdout.splitlines()[-1].split()
    if code != "0":
        raise SystemExit(f"phase 2 ended with {code}")
    return Usage(*map(float, used))


def label(base: Path, count: int, side: int = 64) -> Path:
    """Make `count` different exposures of all classes, 16 bits a pixel."""
    for number in range(count):
        name = phantoms.LABELS[number % len(phantoms.LABELS)]
        path = base / "datos_etiquetados" / name / f"{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        phantoms.write(phantoms.exposure(name, number, side=side), path)
    return base


def label_large(base: Path, count: int) -> Path:
    """Make `count` images of 2500 x 3056 pixels, 16 bits each: an edge in noise."""
    dice = np.random.default_rng(0)
    across = np.linspace(4000, 40000, 2500) + 9000 * (np.arange(2500) > 1300)
    for number in range(count):
        exposure = phantoms.exposure("MTF", number, side=64)
        noise = dice.normal(0, 300, (3056, 2500)).astype(np.float32)
        exposure.Rows, exposure.Columns = noise.shape
        exposure.PixelData = (across + noise).astype(np.uint16).tobytes()
        path = base / "datos_etiquetados" / "MTF" / f"{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        phantoms.write(exposure, path)
    return base


def label_many(base: Path, count: int) -> Path:
    """Make `count` tiny images that differ in their first pixels only."""
    folder = base / "datos_etiquetados" / "MTF"
    folder.mkdir(parents=True)
    exposure = phantoms.exposure("MTF", 0, side=64)
    pixels = bytearray(exposure.PixelData)
    for number in range(count):
        struct.pack_into("<HH", pixels, 0, number // 100, number % 100)
        exposure.PixelData = bytes(pixels)
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
    """Point (a), and (b) for the server of today."""
    images, scale = (12, 0.1) if quick else (40, 0.2)
    print(f"a  {images} images x 50 descriptions, gpu-like, scale {scale}")
    for slots in (1, 4):
        base = label(folder / f"a{slots}", images)
        flags = ("--server-parallel", slots, "--no-sight-test")
        settings = {"time_model": "gpu", "time_scale": scale, "num_parallel": slots}
        with stand_in(**settings, cache_ram_mib=0) as url:
            used = phase2(base, url, *flags)
            seen = stats(url)
        took_s = asking_s(seen)
        in_use = seen["slot_busy_s"] / (slots * took_s)
        ratio = took_s / seen["busy_s"]
        target = "<= 1.03" if slots == 1 else "<= 1.05"
        report(f"{slots} slot(s): wall / server busy", f"{ratio:.3f}", target)
        report(f"{slots} slot(s): slots in use, share of wall", f"{in_use:.3f}", "none")
        around_s = used.wall_s - took_s
        report(f"{slots} slot(s): start and end, seconds", f"{around_s:.1f}", "none")
        encodes = seen["encodes"] / images
        report(f"b  {slots} slot(s): encodes per image", f"{encodes:.2f}", "<= 1.1")


def encodes_of_old_servers(folder: Path) -> None:
    """Point (b) for servers up to 0.24, which know the last four images."""
    for slots in (1, 4):
        base = label(folder / f"b{slots}", 16)
        settings = {"era": "llamarunner", "time_model": "gpu", "time_scale": 0.02}
        flags = ("--server-parallel", slots, "--no-sight-test")
        with stand_in(**settings, num_parallel=slots) as url:
            phase2(base, url, *flags, "--descriptions", 8)
            encodes = stats(url)["encodes"] / 16
        report(f"b  0.24, {slots} slot(s): encodes per image", f"{encodes:.2f}", "1.00")


def against_the_obvious_script(folder: Path, quick: bool) -> None:
    """Point (c). With a quick clock the images shrink, so that PNGs keep their cost.

    Preflight, scan and writing, which the obvious script lacks, are left out as in (a):
    on this clock their second would count for twenty.
    """
    prompts = 4 if quick else 10
    small = label(folder / "c_small", 5, side=618)
    large = label_large(folder / "c_large", 5)
    cases: list[tuple[str, Path, dict[str, object], str]] = [
        ("cpu, RAM cache off", small, {"cache_ram_mib": 0}, ">= 2.0"),
        ("cpu, RAM cache on", small, {}, ">= 1.0"),
        ("gpu, RAM cache on", large, {}, ">= 1.3"),
    ]
    print(f"c  5 images x {prompts} descriptions; the obvious script takes longer by")
    for name, base, settings, target in cases:
        settings |= {"time_model": name[:3], "time_scale": 1 if base == large else 0.05}
        with stand_in(**settings) as url:
            theirs = obvious(base, url, prompts)
        ours = folder / f"c_{target}"
        ours.mkdir()
        (ours / "datos_etiquetados").symlink_to(base / "datos_etiquetados")
        with stand_in(**settings) as url:
            phase2(ours, url, "--descriptions", prompts)
            mine = asking_s(stats(url))
        report(
            f"{name}, scale {settings['time_scale']}", f"{theirs / mine:.2f}", target
        )


def own_time(folder: Path, quick: bool) -> None:
    """Point (d): the server answers at once, so that phase 2 works without a pause."""
    images = 8 if quick else 20
    base = label_large(folder / "d", images)
    with stand_in() as url:
        used = phase2(base, url)
    print(f"d  {images} images of 2500 x 3056, 16 bits, 50 descriptions each")
    each = 1000 * used.cpu_s / images / 50
    report("CPU per description without imports, ms", f"{each:.2f}", "< 5")


def memory(folder: Path, quick: bool) -> None:
    """Point (e)."""
    peaks = []
    many = 1000 if quick else 10_000
    for count in (100, many):
        base = label_many(folder / f"e{count}", count)
        with stand_in() as url:
            peaks.append(phase2(base, url, "--descriptions", 1).peak_mb)
    print(
        f"e  peak memory {peaks[0]:.0f} MB with 100 images, {peaks[1]:.0f} with {many}"
    )
    # Names and digests of the files are all that grows; a picture takes 20 to 100 kB.
    each = 1024 * (peaks[1] - peaks[0]) / (many - 100)
    report("kB for every further image", f"{each:.1f}", "< 5")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer images")
    parser.add_argument("--only", default="abcde", help="points to measure, e.g. ac")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "a" in args.only:
            busy_server(folder, args.quick)
        if "b" in args.only:
            encodes_of_old_servers(folder)
        if "c" in args.only:
            against_the_obvious_script(folder, args.quick)
        if "d" in args.only:
            own_time(folder, args.quick)
        if "e" in args.only:
            memory(folder, args.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
