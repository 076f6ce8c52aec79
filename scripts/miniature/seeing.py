"""What a picture shows, found by image analysis: the background, and each object's colour, shape, size and place.

The picture is compared with what the world can draw: pixels that no background of the found colour explains are
objects, and each of those takes the name of the shape whose outline, blurred or sharp, fits it best. So blur, noise,
compression and a slight shift of all colours change little, while a wrong colour or shape is a wrong answer.
Colours are compared in OKLab (B. Ottosson 2020, "A perceptual color space for image processing").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .drawing import texture_field
from .regions import regions, widen
from .shapes import DISTANCES, Float32, signed_distance
from .world import COLOURS, PLACES, SIZES

GRID = 96  # pixels of the side that every picture is resized to
SMOOTHING = 0.7  # pixels, against noise
FRAME = 5  # pixels: an object hardly comes closer to the edge of the picture

SHADOWS = (1.0, 0.9, 0.8, 0.7)  # how much light is left where an object's shadow falls
FOREGROUND = 0.075  # OKLab distance from all that a background may be
SMALLEST = 60  # pixels of an object; the world's smallest has 190
LONGEST = 0.6  # of the side; what reaches further may be two objects that touch
SIZE_BORDER = float(np.sqrt(SIZES["small"] * SIZES["large"]))

UNLIKE_ANY_COLOUR = 0.1  # OKLab; the world's colours are at least 0.17 apart
UNLIKE_ANY_SHAPE = 0.62  # overlap with the best outline; of random blobs 85 % have less, of warped shapes 1 %

TEXTURE_SIGNAL = 0.16  # standard deviation of a texture, of the step between base and accent; half a ramp's

Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Spotted:
    """An object that was found; lengths are fractions of the side, and None is a colour or shape unlike any."""

    colour: str | None
    shape: str | None
    x: float
    y: float
    extent: float
    mask: Bool  # [96, 96]

    @property
    def size(self) -> str:
        """The word for its extent."""
        return "small" if self.extent < SIZE_BORDER else "large"

    @property
    def place(self) -> str:
        """The word for where it is: the nearest of the nine places."""
        return min(PLACES, key=lambda place: (PLACES[place][0] - self.x) ** 2 + (PLACES[place][1] - self.y) ** 2)


@dataclass(frozen=True)
class Sight:
    """What was found in a picture; objects from the largest to the smallest, None for a colour unlike any."""

    background: str | None
    texture: str
    objects: tuple[Spotted, ...]


def look(picture: Image.Image) -> Sight:
    """Find out what a picture of any size shows."""
    pixels = small_copy(picture)
    lab = oklab(np.asarray(pixels.filter(ImageFilter.GaussianBlur(SMOOTHING)), np.float32))  # [96, 96, 3]
    background = ground_colour(lab)
    shades = ground_shades(background) + colour_shift(lab, background)
    distance = nearest(lab, shades)
    masks = [part for mask in regions(distance > FOREGROUND, SMALLEST) for part in parted(lab, mask)]
    found = sorted((spot(lab, distance, mask) for mask in masks), key=lambda spotted: -spotted.extent)
    texture = ground_texture(lab, background, distance)
    clear = float(np.median(nearest(frame(lab), ground_shades(background, (1.0,))))) < UNLIKE_ANY_COLOUR
    return Sight(background if clear else None, texture, tuple(found))


def small_copy(picture: Image.Image) -> Image.Image:
    """The picture as RGB at the size of the analysis."""
    return picture.convert("RGB").resize((GRID, GRID), Image.Resampling.BICUBIC)


# Colours


def oklab(levels: Float32) -> Float32:
    """sRGB levels of 0 to 255 [..., 3] as OKLab: float32 [..., 3], lightness 0 to 1."""
    s = levels / np.float32(255)
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4).astype(np.float32)
    lab: Float32 = np.cbrt(linear @ TO_CONES) @ TO_LAB
    return lab


TO_CONES = np.array(
    [
        [0.4122214708, 0.2119034982, 0.0883024619],
        [0.5363325363, 0.6806995451, 0.2817188376],
        [0.0514459929, 0.1073969566, 0.6299787005],
    ],
    np.float32,
)
TO_LAB = np.array(
    [
        [0.2104542553, 1.9779984951, 0.0259040371],
        [0.7936177850, -2.4285922050, 0.7827717662],
        [-0.0040720468, 0.4505937099, -0.8086757660],
    ],
    np.float32,
)


def nearest(lab: Float32, shades: Float32) -> Float32:
    """Distance of colours [..., 3] to the nearest of `shades` [N, 3]."""
    flat = lab.reshape(-1, 3)
    squares = (flat**2).sum(axis=1)[:, None] - 2 * flat @ shades.T + (shades**2).sum(axis=1)
    result: Float32 = np.sqrt(np.maximum(squares.min(axis=1), 0)).reshape(lab.shape[:-1])
    return result


@lru_cache
def ground_shades(colour: str, shadows: tuple[float, ...] = SHADOWS) -> Float32:
    """What pixels of a background may be, base to accent, in light and in shadow: OKLab [N, 3]."""
    base, accent = (np.array(level, np.float32) for level in COLOURS[colour])
    mixes = np.linspace(0, 1, 6, dtype=np.float32)[:, None]
    lit: Float32 = np.asarray(base + mixes * (accent - base), np.float32)
    return oklab(np.concatenate([lit * np.float32(shadow) for shadow in shadows]))


@lru_cache
def object_shades(colour: str) -> Float32:
    """What pixels of an object may be, lit and shaded: OKLab [N, 3]."""
    base = np.array(COLOURS[colour][0], np.float32)
    return oklab(np.stack([base + 0.14 * (255 - base), base + 0.07 * (255 - base), base, base * 0.94, base * 0.88]))


def frame(lab: Float32) -> Float32:
    """The pixels along the picture's edges: [N, 3]."""
    edge = np.ones((GRID, GRID), np.bool_)
    edge[FRAME:-FRAME, FRAME:-FRAME] = False
    return lab[edge]


def ground_colour(lab: Float32) -> str:
    """The colour that most pixels along the edges are nearest to."""
    pixels = frame(lab)
    distances = np.stack([nearest(pixels, ground_shades(colour, (1.0,))) for colour in COLOURS])
    votes = np.bincount(distances.argmin(axis=0), minlength=len(COLOURS))
    return tuple(COLOURS)[int(votes.argmax())]


def colour_shift(lab: Float32, background: str) -> Float32:
    """By how much the picture's colours are shifted: median over the edges, OKLab [3]."""
    pixels, shades = frame(lab), ground_shades(background, (1.0,))
    differences = pixels[:, None] - shades[None]
    index = (differences**2).sum(axis=2).argmin(axis=1)
    shift: Float32 = np.median(differences[np.arange(len(pixels)), index], axis=0).astype(np.float32)
    return shift


# Objects


def parted(lab: Float32, mask: Bool) -> list[Bool]:
    """A region, or its two parts where it is too long for one object and has two colours."""
    if max(np.ptp(indices) for indices in np.nonzero(mask)) < LONGEST * GRID:
        return [mask]
    distances = np.stack([nearest(lab[mask], object_shades(name)) for name in COLOURS])  # [colours, pixels]
    second, first = np.bincount(distances.argmin(axis=0), minlength=len(COLOURS)).argsort()[-2:]
    parts = [mask.copy(), mask.copy()]
    parts[0][mask] = distances[first] <= distances[second]
    parts[1][mask] = ~parts[0][mask]
    whole = [region for part in parts for region in regions(part, SMALLEST)]
    return whole if len(whole) == 2 else [mask]


def spot(lab: Float32, distance: Float32, mask: Bool) -> Spotted:
    """Name an object."""
    strength = np.percentile(distance[mask], 75)
    inner = lab[mask & (distance >= np.percentile(distance[mask], 50))]
    unlike, colour = min((float(np.median(nearest(inner, object_shades(name)))), name) for name in COLOURS)
    alpha = np.clip(np.where(widen(mask, 2), distance, 0) / strength, 0, 1).astype(np.float32)
    shape, x, y, extent = fit(alpha)
    return Spotted(colour if unlike < UNLIKE_ANY_COLOUR else None, shape, x, y, extent, mask & (alpha >= 0.5))


SAMPLES, REACH = 28, 1.05  # of the grid that outlines are compared on, in units of the square root of the area
SCALES, SHIFTS, BLURS = (0.82, 0.9, 1.0, 1.1, 1.22), (-0.06, 0.0, 0.06), (0.05, 0.12, 0.22)


@dataclass(frozen=True)
class Outlines:
    """All shapes at several sizes, positions and blurs, each row one of them."""

    pixels: Float32  # [N, SAMPLES**2]
    shapes: tuple[str, ...]
    origins: NDArray[np.float64]  # [N, 2], the unit shape's origin in units of the square root of the area
    extents: NDArray[np.float64]  # [N], likewise


def sample_axis() -> Float32:
    """Where outlines are sampled, along each axis."""
    return np.linspace(-REACH, REACH, SAMPLES, dtype=np.float32)


@lru_cache(maxsize=1)
def outlines() -> Outlines:
    """Draw them all, placed by their centre of area and sized by their area."""
    axis = sample_axis()
    pixels, shapes, origins, extents = [], [], [], []
    for shape in DISTANCES:
        area, centre = unit_area(shape)
        for scale in SCALES:
            extent = scale / area**0.5
            for down in SHIFTS:
                origin = (-centre[0] * extent, -centre[1] * extent + down)
                x, y = ((axis - o) / extent for o in origin)
                distance = signed_distance(shape, x[None, :], y[:, None]) * extent
                for blur in BLURS:
                    pixels.append(1 / (1 + np.exp(np.clip(distance * (2.5 / blur), -30, 30))).ravel())
                    shapes.append(shape)
                    origins.append(origin)
                    extents.append(extent)
    stack = np.stack(pixels).astype(np.float32)
    return Outlines(stack, tuple(shapes), np.array(origins), np.array(extents))


def unit_area(shape: str) -> tuple[float, tuple[float, float]]:
    """Area and centre of area of a unit shape."""
    axis = ((np.arange(256) + 0.5) / 256 * 1.2 - 0.6).astype(np.float32)
    x, y = np.broadcast_arrays(axis[None, :], axis[:, None])
    inside = signed_distance(shape, x, y) < 0
    return float(inside.mean()) * 1.2**2, (float(x[inside].mean()), float(y[inside].mean()))


def fit(alpha: Float32) -> tuple[str | None, float, float, float]:
    """The shape that a soft mask [96, 96] overlaps with most, its centre's x and y, and its extent."""
    area = float(alpha.sum())
    rows, columns = np.arange(GRID) + 0.5, np.arange(GRID) + 0.5
    x, y = float(alpha.sum(axis=0) @ columns) / area, float(alpha.sum(axis=1) @ rows) / area
    unit = area**0.5
    seen = sampled(alpha, x + sample_axis() * unit - 0.5, y + sample_axis() * unit - 0.5).ravel()
    known = outlines()
    overlaps = np.minimum(known.pixels, seen).sum(axis=1) / np.maximum(known.pixels, seen).sum(axis=1)
    best = int(overlaps.argmax())
    x, y = (known.origins[best] * unit + (x, y)) / GRID
    shape = known.shapes[best] if overlaps[best] >= UNLIKE_ANY_SHAPE else None
    return shape, float(x), float(y), float(known.extents[best] * unit / GRID)


def sampled(alpha: Float32, columns: Float32, rows: Float32) -> Float32:
    """A grid of points of an array, bilinear, 0 outside it: [len(rows), len(columns)]."""

    def weights(positions: Float32) -> Float32:  # [positions, GRID]
        return np.asarray(np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(GRID))), np.float32)

    return np.asarray(weights(rows) @ alpha @ weights(columns).T, np.float32)


# Textures


COARSER = (slice(None, None, 2),) * 2  # textures are large


@lru_cache(maxsize=1)
def texture_bank() -> tuple[tuple[str, ...], Float32]:
    """Every texture at every shift by an eighth of a period: names, and float32 [N, 48 * 48]."""
    shifts = [i / 8 for i in range(8)]
    phases = {
        "striped": [(shift, 0.0) for shift in shifts],
        "dotted": [(u, v) for u in shifts for v in shifts],
        "checked": [(u, v) for u in shifts for v in shifts],
        "gradient": [(0.0, 0.0)],
    }
    rows = [(name, texture_field(name, GRID, phase)[COARSER].ravel()) for name in phases for phase in phases[name]]
    return tuple(name for name, _ in rows), np.stack([row for _, row in rows]).astype(np.float32)


def ground_texture(lab: Float32, background: str, distance: Float32) -> str:
    """The texture whose pattern the background follows, plain where it hardly varies."""
    base, accent = (oklab(np.array(level, np.float32)) for level in COLOURS[background])
    step = accent - base
    amount = np.asarray((lab[COARSER] - base) @ step / (step @ step), np.float32)  # 0 base, 1 accent
    free = ~widen(distance > FOREGROUND, 5)[COARSER]
    if free.mean() < 0.1:
        return "plain"
    values = amount[free]
    values = values - values.mean()
    names, bank = texture_bank()
    patterns = bank[:, free.ravel()]
    patterns = patterns - patterns.mean(axis=1, keepdims=True)
    scores = (patterns @ values) / np.maximum(np.sqrt((patterns**2).sum(axis=1)), 1e-6)
    best = int(scores.argmax())
    return names[best] if scores[best] / np.sqrt(values.size) > TEXTURE_SIGNAL else "plain"
