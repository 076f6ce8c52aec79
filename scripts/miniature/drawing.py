"""Scenes as pictures, depth hints and inpainting masks.

Edges are anti-aliased by their distance to the pixel's centre, so there is no supersampling and any side works.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .shapes import Float32, signed_distance
from .world import COLOURS, Figure, Scene

# Textures: repeats along the side, and what they are made of
STRIPES, CHECKS, DOTS, DOT_RADIUS = 4, 4, 3, 0.27
# Light from the top left
LIGHT, SHADE, RIM = 0.2, 0.12, 0.1
RIM_WIDTH = 0.05  # of the object's extent
SHADOW, SHADOW_SOFTNESS, SHADOW_SHIFT = 0.3, 0.03, (0.012, 0.02)
# Relief: 0 is far, 1 is near
FLOOR, TABLE, SUMMIT = 0.12, 0.62, 1.0
EDGE_SOFTNESS, DOME_WIDTH = 0.012, 0.2

Uint8 = NDArray[np.uint8]
Window = tuple[slice, slice]


def draw(scene: Scene, side: int = 96) -> Image.Image:
    """The scene as an RGB picture of `side` x `side` pixels."""
    return Image.fromarray(draw_array(scene, side))


def draw_array(scene: Scene, side: int = 96) -> Uint8:
    """The scene as uint8 [side, side, 3]."""
    canvas = background(scene.background, scene.texture, side).copy()  # [side, side, 3]
    for figure in scene.objects:
        paint(canvas, figure, side)
    return (canvas + np.float32(0.5)).astype(np.uint8)


def depth(scene: Scene, side: int = 96) -> Float32:
    """The scene as a ControlNet's hint: float32 [side, side] in [0, 1], 1 nearest, with objects as domes on a floor."""
    relief = np.full((side, side), FLOOR, np.float32)
    for figure in scene.objects:
        window, distance = field(figure, side, EDGE_SOFTNESS)
        foot = smooth_step(0.5 - distance / np.float32(2 * EDGE_SOFTNESS))
        dome = smooth_step(-distance / np.float32(DOME_WIDTH * figure.extent))
        height = FLOOR + foot * ((TABLE - FLOOR) + dome * np.float32(SUMMIT - TABLE))
        np.maximum(relief[window], height, out=relief[window])
    return relief


def coverage(figure: Figure, side: int = 96) -> Float32:
    """How much of each pixel an object covers: float32 [side, side] in [0, 1]."""
    full = np.zeros((side, side), np.float32)
    window, distance = field(figure, side, 1 / side)
    full[window] = covered(distance, side)
    return full


# Backgrounds


@lru_cache(maxsize=256)
def background(colour: str, texture: str, side: int) -> Float32:
    """A background alone: float32 [side, side, 3] in levels of 0 to 255, not to be written to."""
    base, accent = (np.array(level, np.float32) for level in COLOURS[colour])
    pixels: Float32 = np.asarray(base + texture_field(texture, side)[..., None] * (accent - base), np.float32)
    pixels.setflags(write=False)
    return pixels


def texture_field(texture: str, side: int, phase: tuple[float, float] = (0.0, 0.0)) -> Float32:
    """How much accent a texture lays on the base: float32 [side, side] in [0, 1].

    `phase` shifts it, in periods; the world's own textures are not shifted.
    """
    axis = ((np.arange(side) + 0.5) / side).astype(np.float32)
    x, y = axis[None, :], axis[:, None]
    if texture == "striped":
        return covered(wave((x + y) * STRIPES + phase[0]) / (STRIPES * 2**0.5), side)
    if texture == "checked":
        columns = covered(wave(x * CHECKS + phase[0]) / np.float32(CHECKS), side)
        rows = covered(wave(y * CHECKS + phase[1]) / np.float32(CHECKS), side)
        return np.asarray(columns * rows + (1 - columns) * (1 - rows), np.float32)
    if texture == "dotted":
        u, v = wave((x + y) * DOTS + phase[0]) + 0.25, wave((x - y) * DOTS + phase[1]) + 0.25
        distance: Float32 = np.sqrt(u * u + v * v) - np.float32(DOT_RADIUS)
        return covered(distance / np.float32(DOTS * 2**0.5), side)
    rows = 1 - y if texture == "gradient" else np.zeros_like(y)
    return np.broadcast_to(rows, (side, side))


def wave(x: Float32) -> Float32:
    """A triangle wave of period 1 and slope 1 between -0.25 and 0.25."""
    triangle: Float32 = np.abs(x - np.floor(x) - np.float32(0.5)) - np.float32(0.25)
    return triangle


# Objects


def paint(canvas: Float32, figure: Figure, side: int) -> None:
    """Draw an object and its shadow over `canvas` [side, side, 3]."""
    window, distance = field(figure, side, SHADOW_SOFTNESS + max(SHADOW_SHIFT))
    ground = canvas[window]

    dx, dy = (max(1, round(shift * side)) for shift in SHADOW_SHIFT)
    shadow = np.zeros_like(distance)
    shadow[dy:, dx:] = smooth_step(0.5 - distance[:-dy, :-dx] / np.float32(2 * SHADOW_SOFTNESS))
    ground *= 1 - np.float32(SHADOW) * shadow[..., None]

    alpha = covered(distance, side)[..., None]
    ground += alpha * (shaded(figure, window, distance, side) - ground)


def shaded(figure: Figure, window: Window, distance: Float32, side: int) -> Float32:
    """An object's colours, lighter to the top left and darker at the rim: float32 [h, w, 3]."""
    x, y = coordinates(figure, window, side)
    slope = np.clip(-(x + y), -1, 1)
    rim = RIM * smooth_step(1 + distance / np.float32(RIM_WIDTH * figure.extent))
    light = (LIGHT * np.maximum(slope, 0))[..., None]
    dark = 1 - (SHADE * np.maximum(-slope, 0) + rim)[..., None]
    base = np.array(COLOURS[figure.colour][0], np.float32)
    lit: Float32 = np.asarray((base + light * (255 - base)) * dark, np.float32)
    return lit


def field(figure: Figure, side: int, margin: float) -> tuple[Window, Float32]:
    """An object's window, `margin` larger than it, and in it the distance to its outline, as a fraction of the side."""
    reach = figure.extent * 0.55 + margin
    x, y = (
        slice(max(0, int((centre - reach) * side)), max(0, min(side, int((centre + reach) * side) + 2)))
        for centre in figure.centre
    )
    window = (y, x)
    return window, signed_distance(figure.shape, *coordinates(figure, window, side)) * np.float32(figure.extent)


def coordinates(figure: Figure, window: Window, side: int) -> tuple[Float32, Float32]:
    """The window's pixel centres in the coordinates of the unit shape: float32 [1, w] and [h, 1]."""
    rows, columns = window
    x, y = (
        (((np.arange(part.start, part.stop) + 0.5) / side - centre) / figure.extent).astype(np.float32)
        for part, centre in zip((columns, rows), figure.centre, strict=True)
    )
    return x[None, :], y[:, None]


def covered(distance: Float32, side: int) -> Float32:
    """How much of a pixel lies inside an edge that passes its centre at this distance (a fraction of the side)."""
    share: Float32 = np.clip(np.float32(0.5) - distance * np.float32(side), 0, 1)
    return share


def smooth_step(x: Float32) -> Float32:
    """0 below 0, 1 above 1, and a cubic between."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)
