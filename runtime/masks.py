"""What a picture is conditioned on besides a text: the region that inpainting keeps, and a ControlNet's hint."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..engines.errors import InputError
from .images import Float32, ImageLike, channels_first, check_size, decode, open_image, size_text, unit_range


def latent_mask(
    mask: ImageLike, height: int, width: int, scale: int = 8, expected_size: tuple[int, int] | None = None
) -> Float32:
    """What inpainting keeps: float32 [1, 1, height // scale, width // scale], 1 = keep and 0 = repaint.

    `mask`: white (0.5 and more) is repainted, black is kept. A path or a PIL image of any mode (alpha is ignored) is
    resized to the picture with a Lanczos filter; an array [H, W] or [H, W, 1] of any size is sampled to the latent
    directly: bool, floating in [0, 1], or integers of 0 to 255, or of 0 and 1 where nothing exceeds 1.
    The kept region then gives up one latent cell around each repainted one, but not the up-right and down-left
    neighbours. As diffusers' `prepare_mask_and_masked_image` and `prepare_mask` (kandinsky2_2 inpainting, 0.42.1).

    Raises InputError where the mask cannot be read, or its own (height, width) is not `expected_size`.
    """
    if isinstance(mask, np.ndarray):
        levels = _mask_levels(mask)
        _check_expected("mask", levels.shape, expected_size)
    else:
        opened = decode(mask, "mask")
        _check_expected("mask", (opened.height, opened.width), expected_size)
        resized = opened.resize((width, height), Image.Resampling.LANCZOS).convert("L")
        levels = np.asarray(resized, np.float32) / np.float32(255)
    repaint = levels >= 0.5
    rows, columns = height // scale, width // scale
    repaint = repaint[np.arange(rows) * repaint.shape[0] // rows][:, np.arange(columns) * repaint.shape[1] // columns]
    return 1 - _spread(repaint).astype(np.float32)[None, None]


def hint_pixels(hint: ImageLike, height: int, width: int) -> Float32:
    """A ControlNet hint, a depth map as a rule: float32 [1, 3, height, width] in [0, 1].

    A path or PIL image may have another size of the same aspect ratio (to one of its pixels) and is resized,
    bicubic. An array must have the size already: [H, W], [H, W, 3], [3, H, W] or [1, 3, H, W], uint8, bool or floating
    in [0, 1]. Greyscale is repeated in the three channels. Raises InputError otherwise, naming both sizes.
    """
    if isinstance(hint, np.ndarray):
        array = unit_range(hint[0] if hint.ndim == 4 and len(hint) == 1 else hint, "hint")
        if array.shape == (3, height, width):
            return np.ascontiguousarray(array[None])
        if array.shape == (height, width):
            array = np.repeat(array[..., None], 3, axis=-1)
        if array.shape != (height, width, 3):
            raise InputError(
                f"hint: expected an array [{height}, {width}], [{height}, {width}, 3] or [3, {height}, {width}] "
                f"for a picture {width} x {height}, found {list(hint.shape)}"
            )
        return channels_first(array)
    opened = open_image(hint, "hint")
    if abs(opened.height * width - opened.width * height) > max(height, width):
        raise InputError(
            f"hint: its size {size_text(opened.width, opened.height)} has not the aspect ratio of the picture, "
            f"{size_text(width, height)}: crop the hint, or ask for a picture of its shape"
        )
    resized = opened.resize((width, height), Image.Resampling.BICUBIC)
    return channels_first(np.asarray(resized, np.float32) / np.float32(255))


# Details


def _mask_levels(mask: NDArray[Any]) -> Float32:
    """A mask array [H, W] or [H, W, 1] as float32 [H, W] in [0, 1]."""
    levels = mask[..., 0] if mask.ndim == 3 and mask.shape[2] == 1 else mask
    if levels.ndim != 2:
        raise InputError(f"mask: expected an array [H, W], found {list(mask.shape)}")
    check_size("mask", levels.shape[1], levels.shape[0])
    if levels.dtype.kind in "iu":
        low, high = int(levels.min()), int(levels.max())
        if low < 0 or high > 255:
            raise InputError(f"mask: integers must lie within 0 to 255, found {low} to {high}")
        levels = levels.astype(np.uint8) if high > 1 else levels.astype(bool)
    return unit_range(levels, "mask")


def _check_expected(name: str, found: tuple[int, ...], expected: tuple[int, int] | None) -> None:
    if expected is not None and found != expected:
        sizes = size_text(found[1], found[0]), size_text(expected[1], expected[0])
        raise InputError(f"{name}: its size {sizes[0]} must be that of the image, {sizes[1]}")


def _spread(repaint: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Each true cell of [h, w] also sets its neighbours up, left, up-left, down, right and down-right."""
    rows, columns = repaint.shape
    padded = np.pad(repaint, 1)
    moves = ((0, 0), (1, 0), (0, 1), (1, 1), (-1, 0), (0, -1), (-1, -1))
    spread: NDArray[np.bool_] = np.any(
        [padded[1 + i : 1 + i + rows, 1 + j : 1 + j + columns] for i, j in moves], axis=0
    )
    return spread
