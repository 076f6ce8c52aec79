"""What inpainting repaints: float32 [side, side], 1 = repaint and 0 = keep."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .drawing import coordinates
from .shapes import Float32, signed_distance
from .world import Scene, pick

MARGIN = 0.05  # of the side
WHOLE_SHARE = 0.05


def object_mask(scene: Scene, index: int, side: int = 96, rng: np.random.Generator | None = None) -> Float32:
    """A region around one object of a scene: a square, or with `rng` a box, a disc or the widened outline."""
    figure = scene.objects[index]
    kinds = ("box", "disc", "disc" if figure.shape == "ring" else "outline")  # a ring's would leave a dot in it
    kind = kinds[0] if rng is None else pick(rng, kinds)
    margins = np.full(4, MARGIN) if rng is None else rng.uniform(0.4, 2.2, 4) * MARGIN
    if kind == "outline":
        whole = slice(0, side)
        distance = signed_distance(figure.shape, *coordinates(figure, (whole, whole), side)) * figure.extent
        return numbers(distance < margins[0])
    (x, y), reach = figure.centre, figure.extent * 0.52
    if kind == "disc":
        return disc(x, y, reach * 1.1 + float(margins[0]), side)
    left, right, top, bottom = (margins + reach).tolist()
    return box(x - left, y - top, x + right, y + bottom, side)


def random_mask(rng: np.random.Generator, side: int = 96) -> Float32:
    """A region wherever it falls: a box, a disc, all to one side of a line, a broad stroke, or seldom everything."""
    if rng.random() < WHOLE_SHARE:
        return np.ones((side, side), np.float32)
    kind = int(rng.integers(4))
    x, y, size, angle = (rng.uniform(0, 1, 4) * (1, 1, 1, 2 * math.pi)).tolist()
    if kind == 0:
        width, height = rng.uniform(0.15, 0.45, 2).tolist()
        return box(x - width, y - height, x + width, y + height, side)
    if kind == 1:
        return disc(x, y, 0.15 + 0.3 * size, side)
    columns, rows = grid(side)
    across = (columns - x) * math.cos(angle) + (rows - y) * math.sin(angle)
    return numbers(across < 0 if kind == 2 else np.abs(across) < 0.08 + 0.12 * size)


def box(left: float, top: float, right: float, bottom: float, side: int) -> Float32:
    """An upright rectangle."""
    x, y = grid(side)
    return numbers((x > left) & (x < right) & (y > top) & (y < bottom))


def disc(x: float, y: float, radius: float, side: int) -> Float32:
    """A disc."""
    columns, rows = grid(side)
    return numbers((columns - x) ** 2 + (rows - y) ** 2 < radius**2)


def numbers(region: NDArray[np.bool_]) -> Float32:
    """1 where it is true."""
    return region.astype(np.float32)


def grid(side: int) -> tuple[Float32, Float32]:
    """The pixels' centres as fractions of the side: float32 [1, side] and [side, 1]."""
    axis = ((np.arange(side) + 0.5) / side).astype(np.float32)
    return axis[None, :], axis[:, None]
