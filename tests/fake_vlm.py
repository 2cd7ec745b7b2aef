"""What the stand-in for a VLM sees in a picture, says of it, and makes of a text.

No neural network: the eyes measure a picture (brightness, straight edges, circles,
bars, spots, grain), the voice phrases some of what was measured, with omissions and
mistakes, and the embedder hashes words. Pure functions; fake_ollama.py serves them.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]

# -------------------------------------------------------------------- eyes ---

SIDE = 336
"""Longer side of every picture, in pixels, before the eyes look at it."""


class Line(NamedTuple):
    """A straight edge, or a thin line (two edges back to back)."""

    length: float  # as a share of SIDE
    tilt: float  # degrees away from the nearest axis, 0 to 45
    axis: str
    thin: bool

    @property
    def parallel(self) -> bool:
        """Parallel to the frame, as collimators and dead lines are."""
        return self.tilt < 0.4


@dataclass(frozen=True)
class Sight:
    """What was measured in one picture; grey levels 0 to 255, sizes as shares."""

    mean: float
    noise: float
    unevenness: float
    edges: float
    lines: tuple[Line, ...]
    circles: tuple[float, ...]
    bars: float
    drawn: bool  # of two tones, as no X-ray image is: plain to see

    @property
    def longest(self) -> Line:
        """The longest edge that does not look like a margin or a dead line."""
        none = Line(0, 0, "vertical", thin=False)
        return next((line for line in self.lines if not line.parallel), none)


def blank() -> bytes:
    """A picture of nothing but grey: what somebody describes who is shown none."""
    data = io.BytesIO()
    Image.new("L", (SIDE, SIDE), 118).save(data, "PNG")
    return data.getvalue()


def decode(data: bytes) -> Floats:
    """Grey levels of a picture, its longer side brought to SIDE."""
    with Image.open(io.BytesIO(data)) as image:
        grey = image.convert("L")
    scale = SIDE / max(grey.size)
    size = (max(24, round(grey.width * scale)), max(24, round(grey.height * scale)))
    return np.asarray(grey.resize(size, Image.Resampling.BOX), np.float32)


def without_padding(image: Floats) -> Floats:
    """The picture inside its border of constant mid-grey."""

    def span(lines: Floats) -> slice:
        plain = (np.ptp(lines, axis=1) < 2) & (np.abs(lines.mean(axis=1) - 118) < 9)
        inside = np.flatnonzero(~plain)
        wide = inside.size and np.ptp(inside) > 24
        return slice(inside[0], inside[-1] + 1) if wide else slice(None)

    rows = span(image)
    return image[rows, span(image[rows].T)]


def blur(image: Floats, radius: int) -> Floats:
    """Mean over a square window, edges repeated."""
    size = 2 * radius + 1
    for _ in range(2):
        padded = np.pad(image, ((radius + 1, radius), (0, 0)), "edge")
        sums = np.cumsum(padded, axis=0, dtype=np.float64)
        image = ((sums[size:] - sums[:-size]) / size).astype(np.float32).T
    return image


def find_edges(image: Floats) -> Floats:
    """Thin edge points: rows x and y about the centre, and direction of the slope.

    Their slope stands out of the noise and of both neighbours along it.
    """
    gy, gx = (np.asarray(g) for g in np.gradient(blur(blur(image, 1), 1)))
    size = np.hypot(gx, gy)
    middle = size[1:-1, 1:-1]
    across = (middle >= size[1:-1, :-2]) & (middle > size[1:-1, 2:])
    along = (middle >= size[:-2, 1:-1]) & (middle > size[2:, 1:-1])
    steep = np.abs(gx) > np.abs(gy)
    thin = middle > max(5.5 * float(np.median(size)), 2.5)
    thin &= np.where(steep[1:-1, 1:-1], across, along)
    y, x = (at + 1 for at in np.nonzero(thin))
    high, wide = image.shape
    slope = np.arctan2(gy[y, x], gx[y, x])
    return np.array([x - wide / 2, y - high / 2, slope], np.float32)


FAN = np.arange(-7, 8)
"""A point votes for lines within these many steps of 2 degrees of its slope."""


def find_lines(edges: Floats, at_most: int = 6) -> tuple[Line, ...]:
    """Straight edges, longest first (Hough transform over slope directions)."""
    x, y, slope = edges[:, :, None]
    steps = np.round(slope / np.radians(2)).astype(int) + FAN
    rho = x * np.cos(np.radians(2 * steps)) + y * np.sin(np.radians(2 * steps))
    # Half a turn on, the same line has the opposite distance from the centre.
    rho = np.where(steps % 180 < 90, rho, -rho)
    bins = steps % 90 * SIDE + (rho / 3 + SIDE / 2).astype(int)
    lines: list[Line] = []
    while len(lines) < at_most and len(bins) > 20:
        votes = np.bincount(bins.ravel(), minlength=90 * SIDE)
        best = int((votes[1:] + votes[:-1]).argmax())
        line = as_line(edges[:, ((bins == best) | (bins == best + 1)).any(axis=1)])
        if line.length < 0.12:
            break
        lines.append(line)
        kept = ~((bins >= best - 1) & (bins <= best + 2)).any(axis=1)
        bins, edges = bins[kept], edges[:, kept]
    return tuple(lines)


def as_line(edges: Floats) -> Line:
    """The line through the points: its direction is that of their largest spread."""
    points = edges[:2] - edges[:2].mean(axis=1, keepdims=True)
    _, ((normal_x, along_x), (normal_y, along_y)) = np.linalg.eigh(points @ points.T)
    turn = math.degrees(math.atan2(along_y, along_x)) % 180
    tilt = abs((turn + 45) % 90 - 45)
    axis = "vertical" if 45 < turn < 135 else "horizontal"
    facing = np.cos(edges[2]) * normal_x + np.sin(edges[2]) * normal_y > 0
    thin = bool(0.3 < facing.mean() < 0.7)
    length = min(1.0, facing.size / SIDE / (2 if thin else 1))
    return Line(length, tilt, "diagonal" if tilt > 20 else axis, thin)


def find_circles(edges: Floats) -> tuple[float, ...]:
    """Radii of circles about their commonest centre, clearest first."""
    x, y, slope = edges
    reach = np.arange(6, SIDE * 0.6, 4, dtype=np.float32)
    reach = np.concatenate([-reach, reach])[:, None]
    cells = SIDE // 3
    col = ((x + np.cos(slope) * reach) / 3 + cells / 2).astype(int)
    row = ((y + np.sin(slope) * reach) / 3 + cells / 2).astype(int)
    inside = (row >= 0) & (row < cells) & (col >= 0) & (col < cells)
    votes = np.bincount((row * cells + col)[inside], minlength=cells * cells)
    smooth = blur(votes.reshape(cells, cells).astype(np.float32), 1)
    centre = np.array(divmod(int(smooth.argmax()), cells)) + 0.5 - cells / 2
    return rings_about(x - centre[1] * 3, y - centre[0] * 3, slope)


SECTORS = 32


def rings_about(x: Floats, y: Floats, slope: Floats) -> tuple[float, ...]:
    """Radii at which edges face the centre from more than half of all directions."""
    far = np.hypot(x, y) + 1e-6
    facing = np.abs(x * np.cos(slope) + y * np.sin(slope)) / far > 0.95
    sector = ((np.arctan2(y, x) / (2 * np.pi) + 0.5) * SECTORS).astype(int) % SECTORS
    seen = np.zeros((SIDE, SECTORS), bool)
    seen[(far / 3).astype(int)[facing], sector[facing]] = True
    seen[1:] |= seen[:-1]
    cover = seen.mean(axis=1)
    radii: list[float] = []
    for index in np.argsort(-cover)[: int((cover > 0.55).sum())]:
        radius = float(index - 0.5) * 3 / SIDE
        if radius > 0.06 and all(abs(radius - other) > 0.025 for other in radii):
            radii.append(radius)
    return tuple(radii[:4])


def find_bars(image: Floats, noise: float) -> float:
    """Share of the picture where grey levels swing to and fro, as between bars."""
    tiles = np.lib.stride_tricks.sliding_window_view(image, (24, 24))[::12, ::12]
    tiles = tiles.reshape(-1, 24, 24)
    swing = np.ptp(tiles, axis=(1, 2))
    # One edge travels its swing once, a spot twice, bars several times.
    ways = (np.abs(np.diff(tiles, axis=axis)).sum(axis) for axis in (1, 2))
    travel = np.maximum(*(way.mean(axis=1) for way in ways))
    return float(((swing > max(20 * noise, 30)) & (travel > 2.8 * swing)).mean())


def look(data: bytes) -> Sight:
    """Measure one picture; everything the stand-in will ever know about it."""
    image = without_padding(decode(data))
    coarse, edges = blur(image, 4), find_edges(image)
    noise = 1.4826 * float(np.median(np.abs(image - blur(image, 1))))
    tones = np.sort(np.bincount(image.astype(int).ravel()))
    return Sight(
        mean=float(image.mean()),
        noise=noise,
        unevenness=float(np.ptp(np.percentile(coarse, [5, 95]))),
        edges=edges.shape[1] / image.size,
        lines=find_lines(edges),
        circles=find_circles(edges),
        bars=find_bars(image, noise),
        drawn=bool(tones[-2:].sum() > 0.9 * image.size),
    )


def ramp(value: float, low: float, high: float) -> float:
    """0 at `low` and beyond, 1 at `high` and beyond, linear in between."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


# ------------------------------------------------------------------- voice ---

ASPECTS = {
    "shape": "shape circ round ring disc geometr object form outline",
    "edge": "edge line straight boundar angle orient sharp tilt transition slope",
    "brightness": "bright dark grey gray intens contrast tone uniform homogen level",
    "texture": "textur noise nois grain smooth mottl detail fine surface",
    "layout": "layout where centre center corner position arrang symmetr region part",
    "pattern": "bar stripe grid period repeat pattern regular",
}
"""Beginnings of the words by which a prompt asks for an aspect."""

WORDINGS = """
brightness even: an almost uniform field of grey | an even tone across the whole frame
brightness slope: a soft gradient from side to side | a gradual shading
brightness level: a {level} overall impression | grey levels that are mostly {level}
edge long: a long straight edge, roughly {axis} | a sharp {axis} boundary
edge tilted: an edge a few degrees off the {axis} | a slightly slanted boundary
edge margin: a straight band along one side, parallel to the frame | a plain margin
edge thin: a single thin line | a fine straight scratch, one line and no more
edge none: no distinct edges or lines | nothing with a clear outline
shape plate: a rectangular plate | a flat block with several straight sides
shape round: a large circular object | a round disc seen from above
shape rings: concentric rings | a thin ring inside a circular body
layout empty: an empty field with nothing in it | only background and no object
layout object: an object placed in the field | a body that stands out of its background
pattern bars: a pattern of parallel bars | a block of closely spaced lines
pattern none: no repeating pattern | nothing periodic or striped
texture grain: a fine grainy texture all over | visible noise like film grain
texture smooth: a smooth surface with little noise | clean and smooth areas
texture detail: many small structures close together | a wealth of fine detail
"""
FRAMES = (
    "The image shows {}.",
    "The picture contains {}.",
    "I can see {}.",
    "One notices {}.",
    "Clearly visible: {}.",
    "What stands out: {}.",
)
SAYINGS = {
    key: said.split(" | ")
    for key, said in (row.split(": ", 1) for row in WORDINGS.strip().splitlines())
}
"""What can be said, by `aspect kind`."""


def strengths(s: Sight) -> dict[str, float]:
    """How much each thing that can be said strikes the eye, 0 to 1."""
    quiet = ramp(s.edges, 0.006, 0.0005)
    return {
        "brightness even": ramp(s.unevenness, 60, 15) * quiet,
        "brightness slope": ramp(s.unevenness, 8, 30) * quiet * 0.8,
        "brightness level": 0.3,
        "texture grain": ramp(s.noise, 3, 8),
        "texture smooth": ramp(s.noise, 3, 0.5) * 0.4,
        "texture detail": ramp(s.edges, 0.01, 0.03) * 0.7,
        **shape_strengths(s),
    }


def shape_strengths(s: Sight) -> dict[str, float]:
    longest = s.longest
    strong = ramp(longest.length, 0.15, 0.4)
    sides = sum(not line.parallel and line.length > 0.18 for line in s.lines)
    margin = sum(line.length for line in s.lines if line.parallel and not line.thin)
    thin = max((line.length for line in s.lines if line.thin), default=0)
    rounded = ramp(max(s.circles, default=0), 0.05, 0.12)
    thing = max(strong, rounded, ramp(s.bars, 0, 0.005))
    return {
        "edge long": strong,
        "edge tilted": strong * ramp(longest.tilt, 20, 10) * (1 - rounded),
        "edge margin": ramp(margin, 0.2, 0.7),
        "edge thin": ramp(thin, 0.2, 0.5) * 0.7,
        "edge none": ramp(s.edges, 0.004, 0.0003),
        "shape plate": ramp(sides, 1, 4) * (1 - rounded),
        "shape round": rounded,
        "shape rings": rounded * ramp(len(s.circles), 1, 3),
        "layout empty": 1 - thing,
        "layout object": thing * ramp(longest.length, 0.8, 0.5),
        "pattern bars": max(ramp(s.bars, 0, 0.01), s.drawn * ramp(margin, 1, 2)),
        "pattern none": (s.bars == 0) * 0.4,
    }


@lru_cache(maxsize=4096)
def asked_aspects(prompt: str) -> frozenset[str]:
    def asks(stems: str) -> bool:
        pattern = rf"\b({stems.replace(' ', '|')})"
        return re.search(pattern, prompt, re.IGNORECASE) is not None

    return frozenset(name for name, stems in ASPECTS.items() if asks(stems))


def describe(sight: Sight, prompt: str, dice: random.Random) -> str:
    """A few sentences about the picture: partial, varied and sometimes wrong.

    A drawing is plain to see: the same is said of it whatever the seed, in words that
    depend on the question and in an order that depends on chance.
    """
    aspects = asked_aspects(prompt)

    def lot(strength: float, key: str) -> float:
        # Weighted draw: weak remarks win now and then, strong ones get lost.
        weight = strength * (2.5 if key.partition(" ")[0] in aspects else 1)
        return float(dice.random() ** (1 / (weight**1.5 + 1e-4)))

    lots, order = strengths(sight), dice
    level = ("dark", "medium grey", "bright")[(sight.mean > 85) + (sight.mean > 170)]
    words = {"level": level, "axis": sight.longest.axis}
    mistakes = 0.08  # share of remarks that are made up
    if sight.drawn:
        dice, mistakes = random.Random(prompt), 0
    else:
        lots = {key: lot(strength, key) for key, strength in lots.items()}
    ranked = sorted(lots, key=lambda key: -lots[key])
    chosen = ranked[: 3 if sight.drawn else dice.randint(3, 5)]
    chosen = [dice.choice(ranked) if dice.random() < mistakes else k for k in chosen]
    said = (dice.choice(SAYINGS[key]) for key in dict.fromkeys(chosen))
    remarks = [dice.choice(FRAMES).format(x.format(**words)) for x in said]
    if sight.drawn:
        order.shuffle(remarks)
    return " ".join(remarks)


# ---------------------------------------------------------------- embedder ---

DULL_WORDS = (
    "a an the is are of and or in on at to with it that this there what i can see out"
    " one image picture shows contains stands clearly visible notices"
)
DULL = set(re.findall(r"\w+", DULL_WORDS))
"""Words that carry little; they weigh a fifth."""


@lru_cache(maxsize=65536)
def term_place(term: str) -> tuple[int, float]:
    digest = hashlib.blake2b(term.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:6], "big"), 1.0 if digest[7] & 1 else -1.0


def embed(text: str, dims: int, cased: bool = False) -> list[float]:
    """Unit vector of hashed words and word pairs, the same in every process.

    Case counts on another engine: most texts move, those without capitals don't.
    """
    words = re.findall(r"\w+", text if cased else text.lower())
    terms = [(word, 0.2 if word in DULL else 1.0) for word in words]
    terms += [(" ".join(pair), 0.5) for pair in pairwise(words)]
    vector = np.zeros(dims)
    vector[0] = 0.1  # the vector of an empty text is not zero
    for term, weight in terms:
        place, sign = term_place(term)
        vector[place % dims] += sign * weight
    return [float(x) for x in (vector / np.linalg.norm(vector)).astype(np.float32)]
