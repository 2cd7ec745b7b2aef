"""Phase 1 against thousands of damaged files: no traceback, no hang, no crash.

Mutates pydicom's bundled images and our own samples (headers, pixel streams, lengths,
truncation), seeded, and sends them through phase 1 as a user would. Ends with an error
where the run does not finish, prints a traceback, leaves a file unaccounted for, takes
longer than 10 s over a file, or ends with fewer workers than it began with (Linux).

It also counts the images whose written pixels are not those of the undamaged file and
that no note tells of: a flipped bit of a native sample can't be seen by anybody, but
the count must not grow. --program compares with another version on the same files.

    python tests/fuzz_fase1.py --count 20000
    python tests/fuzz_fase1.py --count 20000 --program ../old/fase1_descompresion.py
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pydicom
from dicom_samples import LOSSY, SYNTAXES, bundled, exposure, write

SCRIPT = Path(__file__).parents[1] / "fase1_descompresion.py"
MAX_SEED_BYTES = 150_000
SECONDS_PER_FILE = 10
EDGES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\0\0\0\0")
JOBS = 2
LIST = "manifiesto.csv"
SHARED = "several images have one SOPInstanceUID"
DELIMITERS = (b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0")


def seeds(folder: Path) -> list[bytes]:
    """Good files to damage: small ones, in every transfer syntax."""
    several = [exposure(seed=seed) for seed in range(3)]
    for number, (name, syntax) in enumerate((SYNTAXES | LOSSY).items(), 1):
        bits = 8 if name == "JPEG Baseline" else 12
        frames = [one >> 4 for one in several] if bits == 8 else several
        frames = [one.astype("u1") for one in frames] if bits == 8 else frames
        write(folder / f"{name}.one", frames[0], syntax, bits, number=number)
        write(folder / f"{name}.many", frames, syntax, bits, number=100 + number)
    paths = [*sorted(folder.iterdir()), *bundled()]
    return [
        path.read_bytes() for path in paths if 0 < path.stat().st_size < MAX_SEED_BYTES
    ]


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Damage a file in one to eight places."""
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        chance.choice((flip, flip, overwrite, overwrite, cut, splice, drop))(
            damaged, chance
        )
        if len(damaged) < 2:
            break
    return bytes(damaged)


def place(data: bytearray, chance: random.Random) -> int:
    """Anywhere, but as often in the header as in the pixels."""
    end = min(len(data), 1500) if chance.random() < 0.5 else len(data)
    return chance.randrange(end)


def flip(data: bytearray, chance: random.Random) -> None:
    data[place(data, chance)] ^= 1 << chance.randrange(8)


def overwrite(data: bytearray, chance: random.Random) -> None:
    at = place(data, chance)
    value = chance.choice((*EDGES, *DELIMITERS, chance.randbytes(chance.randint(1, 4))))
    data[at : at + len(value)] = value


def cut(data: bytearray, chance: random.Random) -> None:
    if chance.random() < 0.3:
        del data[place(data, chance) :]


def splice(data: bytearray, chance: random.Random) -> None:
    at, start = place(data, chance), place(data, chance)
    data[at:at] = data[start : start + chance.randint(1, 64)]


def drop(data: bytearray, chance: random.Random) -> None:
    at = place(data, chance)
    del data[at : at + chance.randint(1, 16)]


def write_damaged(base: Path, count: int, seed: int) -> list[int]:
    """Fill the input folder of `base`; the number of the seed behind each file."""
    good = seeds(base / "seeds")
    chance, origins = random.Random(seed), []
    for number, data in enumerate(good):
        (base / "whole" / "input_dicom").mkdir(parents=True, exist_ok=True)
        (base / "whole" / "input_dicom" / f"{number:05d}").write_bytes(data)
    for number in range(count):
        folder = base / "input_dicom" / f"{number // 500:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        origins.append(chance.randrange(len(good)))
        damaged = mutate(good[origins[-1]], chance)
        (folder / f"{number:05d}").write_bytes(damaged)
    return origins


def run(base: Path, program: Path) -> tuple[int, str, int]:
    """Exit code, what was printed, and how many processes there were near the end."""
    command = [sys.executable, str(program), "--base", str(base), "--jobs", str(JOBS)]
    command += ["--max-image-mb", "256", "--item-timeout-s", str(SECONDS_PER_FILE)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        counts = deque([0], maxlen=20)
        while process.poll() is None:
            counts.append(sum(1 for _ in descendants(process.pid)))
            time.sleep(0.1)
        output.seek(0)
        return process.returncode, output.read(), max(counts)


def descendants(process: int) -> Iterator[int]:
    """The processes that a process has started, and theirs (Linux)."""
    children: list[int] = []
    with suppress(OSError):  # it may end at any moment
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            children += map(int, path.read_text("ascii").split())
    for child in children:
        yield child
        yield from descendants(child)


def listed(base: Path, name: str) -> list[dict[str, str]]:
    with (base / "f1_descomprimidos" / name).open(
        newline="", encoding="utf-8-sig"
    ) as file:
        return list(csv.DictReader(file))


def pixels(base: Path, row: dict[str, str]) -> tuple[str, str, bytes]:
    dataset = pydicom.dcmread(base / "f1_descomprimidos" / row["output"])
    return row["rows"], row["columns"], bytes(dataset.PixelData)


def changed_unnoticed(base: Path, origins: list[int]) -> int:
    """How many images are not those of their seeds, and no note says anything."""
    whole = base / "whole"
    right = {int(one["source"]): pixels(whole, one) for one in listed(whole, LIST)}
    return sum(
        pixels(base, row) != right.get(origins[int(row["source"][-5:])])
        for row in listed(base, LIST)
        if not row["notes"].replace(SHARED, "").strip("; ")
    )


def check(
    base: Path, origins: list[int], program: Path = SCRIPT
) -> tuple[Counter[str], int]:
    """Run phase 1 on the damaged files; what became of them, and `changed_unnoticed`.

    Raises
    ------
    AssertionError
        The run crashed, printed a traceback, or lost a file or a worker.
    """
    code, said, processes = run(base, program)
    assert code == 1, (code, said[-2000:])
    assert "Traceback" not in said, said[-2000:]
    assert processes >= JOBS or not Path("/proc/self/task").exists(), processes
    reasons = [row["reason"] for row in listed(base, "rechazados.csv")]
    rows = listed(base, LIST)
    copies = sum(row["notes"].count("the same image as") for row in rows)
    lost = len(origins) - len(reasons) - len(rows) - copies
    assert lost == 0, (len(reasons), len(rows), copies)
    assert len(list((base / "f1_descomprimidos").glob("*.dcm"))) == len(rows)
    kinds = Counter(kind(reason) for reason in reasons)
    kinds += Counter({"written": len(rows), "the same as another": copies})
    run(base / "whole", program)
    return kinds, changed_unnoticed(base, origins)


def kind(reason: str) -> str:
    """A reason without its numbers."""
    return "".join("#" if one.isdigit() else one for one in reason)[:60]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--program", type=Path, default=SCRIPT, help="another phase 1")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        origins = write_damaged(Path(folder), args.count, args.seed)
        started = time.monotonic()
        kinds, changed = check(Path(folder), origins, args.program)
    seconds = time.monotonic() - started
    for reason, count in kinds.most_common(40):
        print(f"{count:6d}  {reason}")
    given_up = sum(count for reason, count in kinds.items() if "given up" in reason)
    crashed = sum(count for reason, count in kinds.items() if "crashed" in reason)
    print(f"{args.count} files in {seconds:.0f} s: {given_up} hung, {crashed} crashed")
    print(f"{changed} images were written with other pixels and no note")
    return 1 if given_up else 0


if __name__ == "__main__":
    raise SystemExit(main())
