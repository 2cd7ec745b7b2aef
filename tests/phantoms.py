"""Synthetic quality-control exposures, written as real DICOM files.

Three classes are drawn, each in many variants: FDT (a uniform field), MTF (an edge,
slit or bar pattern, as IEC 62220-1 asks for) and TOR (test objects laid out like Leeds
TOR 18FG, after its manual, and roughly like TOR CDR and TOR MAM). `unrelated` draws
images of none of them. Everything is simulated: no pixel comes from a detector, and
manufacturers, patients and detectors are made up.

A scene is the transmission of what lies in the beam, 1.0 where nothing does, drawn in
mm. The same beam, detector and header are then applied to every class, so that only
the picture tells the classes apart. The same arguments always give the same file.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from pydicom import uid
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint16]
Point = tuple[float, float]
Rng = np.random.Generator

LABELS = ("FDT", "MTF", "TOR")
UNRELATED = "unrelated"
"""Key of `write_collection` for images of none of the classes."""

TRANSFER_SYNTAXES = {
    "explicit": uid.ExplicitVRLittleEndian,
    "implicit": uid.ImplicitVRLittleEndian,
    "big_endian": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
    "rle": uid.RLELossless,
    "jpeg_lossless_sv1": uid.JPEGLosslessSV1,
    "jpeg_lossless": uid.JPEGLossless,
    "jpeg_ls": uid.JPEGLSLossless,
    "jpeg_2000": uid.JPEG2000Lossless,
}
STORAGE_CLASSES = {
    "DX": uid.DigitalXRayImageStorageForProcessing,
    "CR": uid.ComputedRadiographyImageStorage,
    "RTIMAGE": uid.RTImageStorage,
    "IO": uid.DigitalIntraOralXRayImageStorageForProcessing,
}
MAKERS = ("Example Imaging", "Acme X-Ray", "Muster Medical", "Ejemplo Rayos X")
PLACES = (".", "DISC1", "DISC1/DIR000", "export/old")
SUFFIXES = ("", "", ".dcm", ".DCM", ".ima")


# --- Drawing: shapes in mm ------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """The axes (mm) of an object lying on the scene that it is drawn into."""

    scene: Floats
    mm_per_pixel: float
    centre_mm: Point = (0.0, 0.0)
    turn_rad: float = 0.0
    mirror: int = 1

    @property
    def width_mm(self) -> float:
        """Shorter side of the field of view."""
        return float(min(self.scene.shape) * self.mm_per_pixel)

    def near(self, u: float, v: float, reach: float) -> tuple[Floats, Floats, Floats]:
        """View of the scene within `reach` mm of (u, v), and its u and v from there."""
        cos, sin = np.cos(self.turn_rad), np.sin(self.turn_rad)
        x = self.centre_mm[0] + cos * u * self.mirror - sin * v
        y = self.centre_mm[1] + sin * u * self.mirror + cos * v
        pixels = reach / self.mm_per_pixel + 1
        spans = []
        for size, position in zip(self.scene.shape, (y, x), strict=True):
            middle = position / self.mm_per_pixel + (size - 1) / 2
            low, high = np.clip((middle - pixels, middle + pixels + 1), 0, size)
            index = np.arange(int(low), int(high), dtype=np.float32)
            spans.append((slice(int(low), int(high)), index - np.float32(middle)))
        (rows, dy), (columns, dx) = spans
        dx, dy = dx * self.mm_per_pixel, dy[:, None] * self.mm_per_pixel
        across = (cos * dx + sin * dy) * self.mirror
        return self.scene[rows, columns], across, cos * dy - sin * dx


def paint(view: Floats, cover: Floats, transmission: float) -> None:
    """Lay material over the view; a transmission above 1 bores a hole instead."""
    view *= 1 - cover * np.float32(1 - transmission)


def overlap(at: Floats, low: float, high: float, pixel: float) -> Floats:
    """Share of a pixel of width `pixel` centred on `at` that lies in [low, high]."""
    inside = np.minimum(at + pixel / 2, high) - np.maximum(at - pixel / 2, low)
    cover: Floats = np.clip(inside / pixel, 0, 1)
    return cover


def disc(frame: Frame, at: Point, diameter: float, transmission: float) -> None:
    view, u, v = frame.near(*at, diameter / 2)
    radius = np.hypot(u, v)
    paint(view, overlap(radius, -1e9, diameter / 2, frame.mm_per_pixel), transmission)


def box(
    frame: Frame, at: Point, size: Point, transmission: float, turn_rad: float = 0.0
) -> None:
    view, u, v = frame.near(*at, float(np.hypot(*size)) / 2)
    if turn_rad:
        cos, sin = np.float32(np.cos(turn_rad)), np.float32(np.sin(turn_rad))
        u, v = cos * u + sin * v, cos * v - sin * u
    cover = overlap(u, -size[0] / 2, size[0] / 2, frame.mm_per_pixel)
    cover *= overlap(v, -size[1] / 2, size[1] / 2, frame.mm_per_pixel)
    paint(view, cover, transmission)


def ellipse(
    frame: Frame, at: Point, axes: Point, transmission: float, soft: float = 0.1
) -> None:
    """Ellipse with semi-axes in mm whose border fades over the share `soft` of them."""
    view, u, v = frame.near(*at, max(axes) * (1 + soft))
    radius = np.hypot(u / axes[0], v / axes[1])
    paint(view, np.clip((1 - radius) / soft + 0.5, 0, 1), transmission)


def bars(frame: Frame, at: Point, lp_per_mm: float, length: float, gain: float) -> None:
    """Cut the five slits of one line pair group, across u, through a plate."""
    width = 0.5 / lp_per_mm
    view, u, v = frame.near(*at, float(np.hypot(9 * width, length)) / 2)
    cover = np.zeros_like(u)
    for low in np.arange(-4.5, 4.5, 2) * width:
        cover += overlap(u, low, low + width, frame.mm_per_pixel)
    cover = cover * overlap(v, -length / 2, length / 2, frame.mm_per_pixel)
    paint(view, cover, gain)


def grating(frame: Frame, at: Point, lp_per_mm: Floats, transmission: float) -> None:
    """Draw a 47 x 57 mm plate with line pair groups in three columns and two squares.

    The columns run along u, each finer towards negative u, as on TOR 18FG.
    """
    box(frame, at, (47, 57), transmission)
    for column, v in enumerate((-5.0, 7.5, 20.0)):
        u = 20.0
        for frequency in lp_per_mm[column::3]:
            length = float(4.5 / frequency)
            middle = (at[0] + u - length / 2, at[1] + v)
            bars(frame, middle, float(frequency), 10.5, 1 / transmission)
            u -= length + 1.2
    box(frame, (at[0] + 3, at[1] - 19), (10, 10), 0.8 / transmission)
    box(frame, (at[0] - 13, at[1] - 19), (10, 10), 0.2)


def pair(values: npt.NDArray[np.floating]) -> Point:
    return float(values[0]), float(values[1])


def letters(text: str, height_px: int) -> Floats:
    """Mask of printed text, shape (about height_px * lines, width), 0 to 1."""
    font = ImageFont.load_default(height_px)
    ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
    _, _, right, bottom = ruler.multiline_textbbox((0, 0), text, font)
    page = Image.new("L", (int(right) + 1, int(bottom) + 1))
    ImageDraw.Draw(page).multiline_text((0, 0), text, 255, font)
    return np.asarray(page, np.float32) / np.float32(255)


# --- What lies in the beam ------------------------------------------------------------


def field(frame: Frame, rng: Rng) -> None:
    """FDT: nothing, at times with the ghost of the exposure before."""
    if rng.random() < 0.25:
        shape = box if rng.random() < 0.5 else ellipse
        at = pair(rng.uniform(-0.3, 0.3, 2) * frame.width_mm)
        size = pair(rng.uniform(0.15, 0.4, 2) * frame.width_mm)
        shape(frame, at, size, float(rng.uniform(0.97, 0.995)))


def edge(frame: Frame, rng: Rng) -> None:
    """MTF: a plate, slit or bar pattern, slightly off the rows or columns."""
    turn = rng.integers(4) * 90 + rng.choice((-1, 1)) * rng.uniform(0.5, 10)
    if rng.random() < 0.08:
        turn += 45
    centre = pair(rng.normal(0, 0.04, 2) * frame.width_mm)
    tilted = replace(frame, centre_mm=centre, turn_rad=float(np.radians(turn)))
    # Tungsten mostly, else copper or steel.
    darkest, brightest = (0.015, 0.04) if rng.random() < 0.65 else (0.05, 0.6)
    devices = half_plane, inset_plate, slit, line_pairs
    device = devices[rng.choice(4, p=(0.5, 0.25, 0.1, 0.15))]
    device(tilted, float(rng.uniform(darkest, brightest)), rng)


def half_plane(frame: Frame, transmission: float, rng: Rng) -> None:
    """Plate over about half the field; its far edge may show in a corner."""
    depth = float(rng.uniform(0.55, 0.9)) * frame.width_mm
    box(frame, (depth / 2, 0), (depth, 4 * frame.width_mm), transmission)


def inset_plate(frame: Frame, transmission: float, rng: Rng) -> None:
    """Square or rectangular plate wholly inside the field."""
    size = pair(rng.uniform(0.25, 0.55, 2) * frame.width_mm)
    box(frame, (0, 0), size, transmission)


def slit(frame: Frame, transmission: float, rng: Rng) -> None:
    """Thin bright line in a dark plate."""
    opaque = min(transmission, 0.1)
    width = frame.width_mm
    plate = float(rng.uniform(0.7, 2.5)) * width
    box(frame, (0, 0), (plate, plate), opaque)
    gap = max(float(rng.uniform(0.3, 1.2)), 1.5 * frame.mm_per_pixel)
    box(frame, (0, 0), (gap, 0.6 * min(plate, width)), 1 / opaque)


def line_pairs(frame: Frame, transmission: float, rng: Rng) -> None:
    """Bar pattern alone: a lead foil with groups of line pairs, 0.5 to 14 lp/mm."""
    finest = float(rng.choice((5.0, 10.0, 14.0)))
    groups = np.geomspace(0.5, finest, 21, dtype=np.float32)
    enlarged = replace(frame, mm_per_pixel=frame.mm_per_pixel * rng.uniform(0.4, 1))
    grating(enlarged, (0, 0), groups, min(transmission, 0.3))


def leeds(frame: Frame, rng: Rng) -> None:
    """TOR: one of three disc or slab test objects, turned by any angle."""
    spread = 0.06 if rng.random() < 0.8 else 0.2
    centre = pair(np.clip(rng.normal(0, spread, 2), -0.35, 0.35) * frame.width_mm)
    turn, mirror = float(rng.uniform(0, 2 * np.pi)), int(rng.choice((-1, 1)))
    turned = replace(frame, centre_mm=centre, turn_rad=turn, mirror=mirror)
    model = (tor_18fg, tor_cdr, tor_mam)[rng.choice(3, p=(0.6, 0.25, 0.15))]
    if rng.random() < 0.25:
        box(turned, (0, 0), (150, 150), float(rng.uniform(0.4, 0.9)))
    # Contrast without a copper filter is up to 3.5 times that with 1 mm of it.
    model(turned, float(rng.uniform(1, 3.5)))


def body(frame: Frame, outer: float, inner: float) -> None:
    """Acrylic disc with a thinner middle and a thin metal ring around that."""
    disc(frame, (0, 0), outer, 0.72)
    disc(frame, (0, 0), inner + 1.2, 0.9)
    disc(frame, (0, 0), inner - 1.2, 0.81 / (0.72 * 0.9))


def ring(radius: float, degrees: npt.ArrayLike) -> list[Point]:
    turns = np.radians(np.asarray(degrees))
    return [pair(radius * np.array((np.cos(a), np.sin(a)))) for a in turns]


def tor_18fg(frame: Frame, gain: float) -> None:
    """Draw 18 discs of falling contrast from a lead square round to it, grating."""
    body(frame, 180, 148)
    degrees = np.concatenate((np.arange(30, 151, 15), np.arange(210, 331, 15)))
    contrasts = gain * np.geomspace(0.17, 0.009, 18)
    for at, contrast in zip(ring(60, degrees), contrasts, strict=True):
        disc(frame, at, 8, 1 - float(contrast))
    box(frame, (49, 0), (25, 25), 0.03)
    faint = 1 - 0.08 * gain
    box(frame, (-49, 0), (25, 25), faint)
    disc(frame, (-49, 0), 11, 1 / faint)
    grating(frame, (0, 0), np.geomspace(0.5, 5, 21, dtype=np.float32), 0.15)


def tor_cdr(frame: Frame, gain: float) -> None:
    """Draw rings of 17 large and 17 small details, ten steps in a row, grating."""
    body(frame, 170, 160)
    degrees = np.arange(17, dtype=np.float32) * np.float32(360 / 17)
    large, small = gain * np.geomspace(((0.15,), (0.25,)), ((0.005,), (0.02,)), 17).T[0]
    for at, contrast in zip(ring(67, degrees), large, strict=True):
        disc(frame, at, 11, 1 - float(contrast))
    for at, contrast in zip(ring(54, degrees), small, strict=True):
        disc(frame, at, 0.5, 1 - float(contrast))
    for step, transmission in enumerate(np.geomspace(0.95, 0.05, 10)):
        disc(frame, (-38, 7.5 * step - 33.75), 5.6, float(transmission))
    grating(frame, (0, 0), np.geomspace(0.5, 14.3, 21, dtype=np.float32), 0.15)


def tor_mam(frame: Frame, gain: float) -> None:
    """Draw a D-shaped slab with rows of 6 mm discs, filaments and speck clusters."""
    view, u, v = frame.near(0, 0, 75)
    cover = overlap(np.hypot(u, v), -1e9, 72, frame.mm_per_pixel)
    paint(view, cover * overlap(u, -28, 1e9, frame.mm_per_pixel), 0.65)
    for step, strength in enumerate(np.geomspace(0.12, 0.02, 6)):
        contrast, v_mm = float(strength * gain), 17.0 * step - 42.5
        disc(frame, (-16, v_mm), 6, 1 - contrast)
        for side in (-1, 1):
            slant = (8 + 4 * side, v_mm)
            box(frame, slant, (0.8, 11), 1 - min(2 * contrast, 0.8), side * 0.8)
        for speck in ring(3, np.arange(0, 360, 72)):
            at = (33 + speck[0], 0.7 * v_mm + speck[1])
            disc(frame, at, 1.0 - 0.1 * step, 1 - min(2.2 * contrast, 0.9))


def chest(frame: Frame, rng: Rng) -> None:
    """Clinical-looking chest: trunk, lungs, ribs, spine, heart, diaphragm."""
    unit = frame.width_mm / 400
    lung = float(rng.uniform(3, 5))
    ellipse(frame, (0, 120 * unit), (190 * unit, 290 * unit), 0.14, 0.06)
    for side in (-1, 1):
        ellipse(frame, (side * 78 * unit, 0), (58 * unit, 125 * unit), lung, 0.25)
    for rib in range(9):
        view, u, v = frame.near(0, (28 * rib - 90) * unit, 150 * unit)
        radius = np.hypot(u / (140 * unit), (v - 20 * unit) / (60 * unit))
        arch = np.clip(1 - abs(radius - 1) / 0.09, 0, 1) * (v < 15 * unit)
        paint(view, arch, 0.75)
    for side in (-1, 1):
        at = (side * 70 * unit, -115 * unit)
        box(frame, at, (120 * unit, 10 * unit), 0.7, -side * 0.25)
        ellipse(frame, (side * 85 * unit, 150 * unit), (85 * unit, 65 * unit), 0.3, 0.1)
    ellipse(frame, (25 * unit, 55 * unit), (60 * unit, 70 * unit), 0.4, 0.3)
    ellipse(frame, (0, -190 * unit), (45 * unit, 75 * unit), 0.3)
    box(frame, (0, 90 * unit), (34 * unit, 540 * unit), 0.5)


def text_screen(frame: Frame, rng: Rng) -> None:
    """Page of a dose report."""
    values = zip(
        range(1, 14), rng.uniform(1, 99, 13), rng.integers(40, 125, 13), strict=True
    )
    lines = [f"Series {k:02d}   DAP {dap:6.2f}   {kvp} kV" for k, dap, kvp in values]
    rows, columns = frame.scene.shape
    page = letters("DOSE REPORT\n\n" + "\n".join(lines), max(rows // 24, 6))
    page = page[: rows - rows // 20, : columns - columns // 20]
    frame.scene[:] = 0.03
    frame.scene[rows // 20 :, columns // 20 :][: page.shape[0], : page.shape[1]] += page


def las_vegas(frame: Frame, rng: Rng) -> None:
    """Aluminium plate with a grid of holes, ever smaller and shallower."""
    slant = float(np.radians(rng.uniform(-8, 8)))
    plate = replace(frame, turn_rad=slant)
    unit = frame.width_mm / 200
    box(plate, (0, 0), (140 * unit, 140 * unit), 0.6)
    for column, diameter in enumerate((15, 10, 7, 4, 2, 0.5)):
        for row, depth in enumerate((0.45, 0.3, 0.18, 0.1, 0.05)):
            at = ((22 * column - 55) * unit, (24 * row - 48) * unit)
            disc(plate, at, diameter * unit, 1 + depth)


def star(frame: Frame, rng: Rng) -> None:
    """Siemens star: lead spokes inside a disc."""
    spokes, radius = int(rng.integers(24, 61)), float(rng.uniform(0.2, 0.45))
    view, u, v = frame.near(0, 0, radius * frame.width_mm)
    inside = overlap(np.hypot(u, v), -1e9, radius * frame.width_mm, frame.mm_per_pixel)
    wave = np.sin(spokes * np.arctan2(v, u)) * np.hypot(u, v) / spokes
    paint(view, inside * np.clip(0.5 + wave / frame.mm_per_pixel, 0, 1), 0.1)


Drawing = Callable[[Frame, Rng], None]
DRAWINGS: dict[str, Drawing] = {"FDT": field, "MTF": edge, "TOR": leeds}
UNRELATED_DRAWINGS: tuple[Drawing, ...] = (chest, text_screen, las_vegas, star)


# --- Beam and detector, the same for every class --------------------------------------


def add_clutter(frame: Frame, rng: Rng) -> None:
    """Now and then a side marker, a dosimeter with its cable, dust."""
    rows, columns = frame.scene.shape
    if rng.random() < 0.2:
        mark = letters(str(rng.choice(("L", "R"))), max(rows // 14, 8))
        top, left = rows // 12, int(rng.choice((columns // 12, columns * 5 // 6)))
        spot = frame.scene[top:, left:][: mark.shape[0], : mark.shape[1]]
        spot *= 1 - 0.9 * mark[: spot.shape[0], : spot.shape[1]]
    if rng.random() < 0.06:
        reach = frame.width_mm / 2
        at = (float(rng.choice((-0.8, 0.8))) * reach, float(rng.uniform(-1, 1)) * reach)
        disc(frame, at, 0.12 * reach, 0.5)
        box(frame, (at[0], at[1] + reach), (0.015 * reach, 2 * reach), 0.7)
    for _ in range(rng.poisson(0.7)):
        at = pair(rng.uniform(-0.5, 0.5, 2) * frame.width_mm)
        disc(frame, at, 0.01 * frame.width_mm, 0.93)


def profile(size: int, slope: float, rng: Rng) -> Floats:
    """Relative kerma and gain along one axis: heel, dome, tiles, lines, collimation."""
    at = np.linspace(-1, 1, size, dtype=np.float32)
    dome, ripple = rng.uniform(0, 0.03), rng.uniform(0, 0.003)
    gain = (1 - slope * (at + 1) / 2) * (1 - dome * at**2)
    if rng.random() < 0.2:
        tiles = int(rng.integers(2, 5))
        steps = 1 + rng.uniform(-0.008, 0.008, tiles)
        gain *= steps[np.arange(size) * tiles // size]
    gain *= 1 + rng.normal(0, ripple, size)
    for side in (at, -at):
        if rng.random() < 0.2:
            border, penumbra = rng.uniform(0.7, 0.97), rng.uniform(0.01, 0.08)
            open_share = np.clip((border - side) / penumbra + 0.5, 0, 1)
            gain *= 0.015 + 0.985 * open_share
    return np.asarray(gain, np.float32)


def irradiate(scene: Floats, rng: Rng) -> None:
    """Turn transmission into relative kerma, blurred by the detector."""
    heel = float(rng.uniform(0, 0.3)) if rng.random() < 0.7 else 0.0
    slopes = rng.permutation((heel, 0.0))
    vertical, horizontal = (
        profile(size, float(slope), rng)
        for size, slope in zip(scene.shape, slopes, strict=True)
    )
    if rng.random() < 0.7:
        scene[1:-1] = (scene[:-2] + 2 * scene[1:-1] + scene[2:]) / 4
        scene[:, 1:-1] = (scene[:, :-2] + 2 * scene[:, 1:-1] + scene[:, 2:]) / 4
    scene *= vertical[:, None] * horizontal


def detect(quanta: Floats, rng: Rng) -> Floats:
    """Add quantum (~K), structure (~K squared) and electronic (constant) variance.

    Parameters
    ----------
    quanta : float32, shape (rows, columns)
        Quanta expected in each pixel.

    Returns
    -------
    float32, same shape
        Signal read out, in quanta; may be slightly negative.
    """
    spread = np.sqrt(quanta + (0.004 * quanta) ** 2 + 5**2)
    signal: Floats = quanta + spread * rng.standard_normal(quanta.shape, np.float32)
    signal += rng.normal(0, 1.5, quanta.shape[1:]).astype(np.float32)
    return signal


def read_out(kerma: Floats, dose: float, bits: int, rng: Rng) -> Floats:
    """Signal as a share of full scale, 0 to 1, in either polarity."""
    capacity = float(rng.uniform(2e4, 1e5))
    share = detect(kerma * np.float32(capacity * dose), rng) / np.float32(capacity)
    # Few bits can't hold two decades of dose: such detectors scale before they store.
    if bits < 12 or rng.random() < 0.3:
        share *= rng.uniform(0.4, 0.9) / dose
    share = np.clip(share + np.float32(rng.uniform(0.002, 0.02)), 0, 1)
    if rng.random() < 0.2:
        share = np.log1p(100 * share) / np.float32(np.log(101))
    return np.asarray(1 - share if rng.random() < 0.5 else share)


def add_defects(pixels: Pixels, white: int, rng: Rng) -> None:
    """Dead pixels and lines, dead corners, orientation square."""
    rows, columns = pixels.shape
    dead = int(rng.poisson(rng.uniform(0, 5e-5) * pixels.size))
    spots = rng.integers(rows, size=dead), rng.integers(columns, size=dead)
    pixels[spots] = rng.choice((0, white))
    if rng.random() < 0.12:
        pixels[:, rng.integers(columns)] = rng.choice((0, white))
    if rng.random() < 0.08:
        radius = rng.uniform(0.05, 0.3) * min(rows, columns)
        down, across = (
            np.maximum(abs(np.arange(size) - (size - 1) / 2) - size / 2 + radius, 0)
            for size in pixels.shape
        )
        pixels[np.hypot(down[:, None], across) > radius] = rng.choice((0, white))
    if rng.random() < 0.25:
        size, gap = max(rows // 70, 4), max(rows // 170, 2)
        corner = pixels[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
        corner[gap : gap + size, gap : gap + size] = rng.choice((0, white))


def expose(scene: Floats, dose: float, bits: int, rng: Rng) -> Pixels:
    """Transmission (rows, columns) to stored values of `bits` bits, same shape."""
    white = 2**bits - 1
    irradiate(scene, rng)
    share = read_out(scene, dose, bits, rng)
    if bits == 16 and rng.random() < 0.2:
        share = 1 - 0.046 * (1 - share)
    pixels: Pixels = np.rint(share * np.float32(white)).astype(np.uint16)
    add_defects(pixels, white, rng)
    return pixels


# --- DICOM ----------------------------------------------------------------------------


def make_uid(*parts: object) -> uid.UID:
    """UUID-derived UID (PS3.5 B.2) that depends on nothing but the parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return uid.UID(f"2.25.{int.from_bytes(digest[:16])}")


def add_times(dataset: FileDataset, rng: Rng) -> None:
    """Acquisition time in one of the places where devices put it."""
    seconds = float(rng.uniform(0, 5 * 365 * 86400))
    moment = datetime(2019, 1, 1) + timedelta(seconds=seconds)
    date, time = moment.strftime("%Y%m%d"), moment.strftime("%H%M%S")
    if rng.random() < 0.6:
        time += moment.strftime(".%f")
    dataset.StudyDate, dataset.StudyTime = date, time[:6]
    dataset.ContentDate, dataset.ContentTime = date, time
    place = rng.random()
    if place < 0.6:
        dataset.AcquisitionDate, dataset.AcquisitionTime = date, time
    elif place < 0.75:
        dataset.AcquisitionDateTime = date + time


def add_technique(dataset: FileDataset, dose: float, rng: Rng) -> None:
    """Tube settings that would give `dose`, 1.0 being a full detector."""
    kvp = int(rng.integers(40, 126))
    uas = max(int(20000 * dose * (70 / kvp) ** 2), 1)
    dataset.KVP = kvp
    dataset.ExposureInuAs = uas
    dataset.Exposure = uas // 1000
    dataset.ExposureIndex = round(2500 * dose, 2)


def add_device(dataset: FileDataset, mm_per_pixel: float, rng: Rng) -> None:
    modality = str(rng.choice(list(STORAGE_CLASSES), p=(0.5, 0.2, 0.2, 0.1)))
    dataset.SOPClassUID = STORAGE_CLASSES[modality]
    dataset.Modality = modality
    dataset.Manufacturer = str(rng.choice(MAKERS))
    dataset.DetectorID = f"SN{rng.integers(8):04d}"
    dataset.ProtocolName = str(rng.choice(("OTHER", "CHEST PA", "QC")))
    spacing = [round(mm_per_pixel, 5)] * 2
    if modality == "RTIMAGE":
        dataset.ImagePlanePixelSpacing = spacing
    else:
        dataset.ImagerPixelSpacing = spacing
        if rng.random() < 0.5:
            dataset.PixelSpacing = spacing


def header(identity: str, dose: float, mm: float, rng: Rng) -> FileDataset:
    """Everything but the image, from distributions that know no class."""
    dataset = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=bytes(128))
    dataset.SOPInstanceUID = make_uid(identity, "instance")
    dataset.StudyInstanceUID = make_uid(identity, "study")
    dataset.SeriesInstanceUID = make_uid(identity, "series")
    dataset.set_original_encoding(is_implicit_vr=False, is_little_endian=True)
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.PatientName, dataset.PatientID = "TEST^QC", "QC-TEST"
    dataset.PatientBirthDate = dataset.PatientSex = dataset.AccessionNumber = ""
    dataset.StudyID, dataset.SeriesNumber, dataset.InstanceNumber = "1", 1, 1
    add_times(dataset, rng)
    add_technique(dataset, dose, rng)
    add_device(dataset, mm, rng)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = make_uid("implementation")
    return dataset


def add_pixels(dataset: FileDataset, pixels: Pixels, bits: int, rng: Rng) -> None:
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.PhotometricInterpretation = str(rng.choice(("MONOCHROME1", "MONOCHROME2")))
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, bits, bits - 1
    if rng.random() < 0.6:
        dataset.WindowCenter, dataset.WindowWidth = 2 ** (bits - 1), 2**bits
        dataset.RescaleIntercept, dataset.RescaleSlope = 0, 1
        dataset.RescaleType = "US"
    set_native_pixels(dataset, pixels)


def set_native_pixels(dataset: FileDataset, pixels: Pixels, order: str = "<") -> None:
    dataset.add_new("PixelData", "OW", pixels.astype(f"{order}u2").tobytes())


def draw_exposure(drawing: Drawing, identity: str, side: int) -> FileDataset:
    """One exposure; all chance in it comes from `identity`."""
    rng = np.random.default_rng(list(hashlib.sha256(identity.encode()).digest()))
    aspect = float(rng.choice((1.0, 0.71, 0.75, 0.82, 1.22, 1.33, 1.41)))
    shape = round(side * aspect**0.5), round(side / aspect**0.5)
    mm_per_pixel = float(np.exp(rng.uniform(*np.log((170, 400))))) / min(shape)
    dose = float(np.exp(rng.uniform(*np.log((0.01, 1.2)))))
    bits = int(rng.choice((10, 12, 13, 14, 15, 16), p=(0.1, 0.2, 0.1, 0.3, 0.1, 0.2)))
    dataset = header(identity, dose, mm_per_pixel, rng)
    frame = Frame(np.ones(shape, np.float32), mm_per_pixel)
    drawing(frame, rng)
    add_clutter(frame, rng)
    add_pixels(dataset, expose(frame.scene, dose, bits, rng), bits, rng)
    return dataset


def exposure(label: str, seed: int, *, side: int = 512) -> FileDataset:
    """Draw one synthetic exposure of a class.

    Parameters
    ----------
    label : one of LABELS
    seed : int
        Picks the variant; the same (label, seed, side) gives the same dataset.
    side : int
        Rows and columns are about this many pixels (aspect 0.71 to 1.41).

    Returns
    -------
    FileDataset
        Uncompressed Explicit VR Little Endian, uint16, 10 to 16 bits stored.
    """
    if label not in DRAWINGS:
        raise ValueError(f"no drawing for {label!r}: expected one of {LABELS}")
    return draw_exposure(DRAWINGS[label], f"{label}/{seed}/{side}", side)


def unrelated(seed: int, *, side: int = 512) -> FileDataset:
    """Draw an image of none of the classes; four successive seeds give four kinds."""
    drawing = UNRELATED_DRAWINGS[seed % len(UNRELATED_DRAWINGS)]
    return draw_exposure(drawing, f"{UNRELATED}/{seed}/{side}", side)


def encode(pixels: Pixels, bits: int, name: str) -> bytes:
    """One losslessly compressed codestream of pixels (rows, columns)."""
    if name == "jpeg_ls":
        return bytes(imagecodecs.jpegls_encode(pixels))
    if name == "jpeg_2000":
        stream = imagecodecs.jpeg2k_encode(
            pixels, 0, codecformat="j2k", reversible=True, bitspersample=bits
        )
        return bytes(stream)
    # SV1 means selection value (predictor) 1; the general process allows 1 to 7.
    predictor = 1 if name == "jpeg_lossless_sv1" else 6
    stream = imagecodecs.jpeg8_encode(
        pixels, lossless=True, predictor=predictor, bitspersample=bits
    )
    return bytes(stream)


def compress(dataset: FileDataset, transfer_syntax_name: str) -> FileDataset:
    """Copy of a dataset, losslessly re-encoded as a key of TRANSFER_SYNTAXES.

    SOPInstanceUID and pixel values stay. JPEG-LS copies have BitsStored 16, because
    that is what the encoder writes into the codestream.
    """
    name, syntax = transfer_syntax_name, TRANSFER_SYNTAXES[transfer_syntax_name]
    pixels = dataset.pixel_array
    copied = copy.deepcopy(dataset)
    copied.file_meta.TransferSyntaxUID = syntax
    if name == "rle":
        copied.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        set_native_pixels(copied, pixels)
        copied.compress(syntax, generate_instance_uid=False)
    elif syntax.is_encapsulated:
        if name == "jpeg_ls":
            copied.BitsStored, copied.HighBit = 16, 15
        stream = encode(pixels, copied.BitsStored, name)
        copied.add_new("PixelData", "OB", encapsulate([stream]))
        copied["PixelData"].is_undefined_length = True
    else:
        set_native_pixels(copied, pixels, "<" if syntax.is_little_endian else ">")
    copied.set_original_encoding(syntax.is_implicit_VR, syntax.is_little_endian)
    return copied


def write(dataset: FileDataset, path: Path) -> Path:
    """Write a DICOM file, making its folder if needed; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_collection(
    folder: Path, counts: Mapping[str, int], seed: int, *, side: int = 512
) -> dict[str, str]:
    """Write exposures as an archive exports them: mixed up, under meaningless names.

    Parameters
    ----------
    folder : Path
        Made if needed; files go there and into subfolders.
    counts : Mapping[str, int]
        How many images of each of LABELS, and of UNRELATED.
    seed : int
        Decides images, names and order. The transfer syntaxes take turns.
    side : int
        As for `exposure`.

    Returns
    -------
    dict[str, str]
        Label of every SOPInstanceUID written.
    """
    rng = np.random.default_rng(seed)
    wanted = [label for label, count in counts.items() for _ in range(count)]
    syntaxes = ("jpeg_lossless_sv1", *TRANSFER_SYNTAXES)
    numbers = rng.choice(10**6, len(wanted), replace=False)
    labels = {}
    for turn, pick in enumerate(rng.permutation(len(wanted))):
        label, number = wanted[pick], seed * 100_000 + turn
        if label == UNRELATED:
            image = unrelated(number, side=side)
        else:
            image = exposure(label, number, side=side)
        name = f"{rng.choice(('IM', 'a', '7.'))}{numbers[turn]:06d}"
        path = folder / str(rng.choice(PLACES)) / (name + str(rng.choice(SUFFIXES)))
        write(compress(image, syntaxes[turn % len(syntaxes)]), path)
        labels[str(image.SOPInstanceUID)] = label
    return labels
