"""Phase 1 against thousands of damaged files: no traceback, no hang, no crash.

Mutates pydicom's bundled images and our own samples (headers, pixel streams, lengths,
truncation), seeded, and sends them through phase 1 as a user would. Ends with an error
where the run does not finish, prints a traceback, leaves a file unaccounted for, or
takes longer than 10 s over a file.

    python tests/fuzz_fase1.py --count 20000
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from dicom_samples import LOSSY, SYNTAXES, bundled, exposure, write

SCRIPT = Path(__file__).parents[1] / "fase1_descompresion.py"
MAX_SEED_BYTES = 150_000
SECONDS_PER_FILE = 10
EDGES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\0\0\0\0")
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


def write_damaged(base: Path, count: int, seed: int) -> None:
    """Fill the input folder of `base` with damaged files."""
    good = seeds(base / "seeds")
    chance = random.Random(seed)
    for number in range(count):
        folder = base / "input_dicom" / f"{number // 500:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05d}").write_bytes(mutate(chance.choice(good), chance))


def check(base: Path, count: int) -> Counter[str]:
    """Run phase 1 on the damaged files; what became of them.

    Raises
    ------
    AssertionError
        The run crashed, printed a traceback or lost a file.
    """
    command = [sys.executable, str(SCRIPT), "--base", str(base), "--jobs", "2"]
    command += ["--max-image-mb", "256", "--item-timeout-s", str(SECONDS_PER_FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr + done.stdout, done.stderr[-2000:]
    folder = base / "f1_descomprimidos"
    with (folder / "rechazados.csv").open(newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    with (folder / "manifiesto.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    copies = sum(row["notes"].count("the same image as") for row in rows)
    assert len(reasons) + len(rows) + copies == count, (len(reasons), len(rows), copies)
    assert len(list(folder.glob("*.dcm"))) == len(rows)
    kinds = Counter(kind(reason) for reason in reasons)
    return kinds + Counter({"written": len(rows), "the same as another": copies})


def kind(reason: str) -> str:
    """A reason without its numbers."""
    return "".join("#" if one.isdigit() else one for one in reason)[:60]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_damaged(Path(folder), args.count, args.seed)
        started = time.monotonic()
        kinds = check(Path(folder), args.count)
    seconds = time.monotonic() - started
    for reason, count in kinds.most_common(40):
        print(f"{count:6d}  {reason}")
    given_up = sum(count for reason, count in kinds.items() if "given up" in reason)
    crashed = sum(count for reason, count in kinds.items() if "crashed" in reason)
    print(f"{args.count} files in {seconds:.0f} s: {given_up} hung, {crashed} crashed")
    print("each of those cost one worker process, which was replaced; the run went on")
    return 1 if given_up else 0


if __name__ == "__main__":
    raise SystemExit(main())
