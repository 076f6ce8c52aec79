"""The outlines of the shapes as signed distances: one function gives edges, shading, shadows, relief and masks.

Distances are negative inside. Coordinates are those of a unit shape, which fits into [-0.5, 0.5] squared, y down.
The shapes are drawn to look equally large rather than to fill that square, and all are their own mirror image.
Formulas: Inigo Quilez, "2D distance functions" (iquilezles.org/articles/distfunctions2d).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Float32: TypeAlias = "NDArray[np.float32]"
Distance: TypeAlias = Callable[[Float32, Float32], Float32]


def circle(radius: float) -> Distance:
    """A disc."""
    return lambda x, y: np.sqrt(x * x + y * y) - np.float32(radius)


def ring(radius: float, half_width: float) -> Distance:
    """A circle's line of some width."""
    return lambda x, y: np.abs(np.sqrt(x * x + y * y) - np.float32(radius)) - np.float32(half_width)


def polygon(*vertices: tuple[float, float], rounding: float) -> Distance:
    """A polygon with corners rounded by growing, given by the vertices of its right half from top to bottom."""
    points = np.array(vertices, np.float32)
    starts, edges = points[:-1], np.diff(points, axis=0)
    lengths = (edges**2).sum(axis=1)

    def distance(x: Float32, y: Float32) -> Float32:
        x, y = np.broadcast_arrays(np.abs(x), y)
        nearest = np.full(x.shape, np.inf, np.float32)
        inside = np.zeros(x.shape, np.bool_)
        for (x0, y0), (ex, ey), length in zip(starts, edges, lengths, strict=True):
            dx, dy = x - x0, y - y0
            along = np.clip((dx * ex + dy * ey) / length, 0, 1)
            np.minimum(nearest, (dx - along * ex) ** 2 + (dy - along * ey) ** 2, out=nearest)
            if ey:  # a ray to the right crosses this edge
                inside ^= ((dy >= 0) != (dy >= ey)) & (dx < dy * (ex / ey))
        result: Float32 = np.where(inside, -np.sqrt(nearest), np.sqrt(nearest)) - np.float32(rounding)
        return result

    return distance


def star(outer: float, inner: float, rounding: float, down: float) -> Distance:
    """A star of five points, one up."""
    corners = ((math.pi * i / 5, inner if i % 2 else outer) for i in range(6))
    return polygon(*((r * math.sin(a), down - r * math.cos(a)) for a, r in corners), rounding=rounding)


def heart(scale: float, down: float) -> Distance:
    """A heart: two half discs on a square that stands on its corner."""
    size, drop = np.float32(scale), np.float32(down)

    def distance(x: Float32, y: Float32) -> Float32:
        right, up = np.abs(x) / size, (drop - y) / size
        total = right + up
        disc = np.sqrt((right - 0.25) ** 2 + (up - 0.75) ** 2) - np.float32(math.sqrt(2) / 4)
        half = np.maximum(total, 0) / 2
        edges = np.minimum(right**2 + (up - 1) ** 2, (right - half) ** 2 + (up - half) ** 2)
        result: Float32 = np.where(total > 1, disc, np.sqrt(edges) * np.sign(right - up)) * size
        return result

    return distance


ROUND = 0.025

DISTANCES: Mapping[str, Distance] = {
    "circle": circle(0.46),
    "square": polygon((0, -0.38), (0.38, -0.38), (0.38, 0.38), (0, 0.38), rounding=ROUND),
    "triangle": polygon((0, -0.45), (0.46, 0.37), (0, 0.37), rounding=ROUND),
    "star": star(0.5, 0.22, ROUND, 0.03),
    "cross": polygon(
        (0, -0.44), (0.13, -0.44), (0.13, -0.13), (0.44, -0.13), (0.44, 0.13), (0.13, 0.13), (0.13, 0.44), (0, 0.44),
        rounding=ROUND,
    ),
    "ring": ring(0.345, 0.115),
    "heart": heart(0.82, 0.45),
    "diamond": polygon((0, -0.48), (0.38, 0), (0, 0.48), rounding=ROUND),
}  # fmt: skip


def signed_distance(shape: str, x: Float32, y: Float32) -> Float32:
    """Distance of points to a unit shape's outline: float32 of the broadcast shape of `x` and `y`."""
    return DISTANCES[shape](x, y)
