"""The mask of inpainting and the hint of a ControlNet against diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kandrt.engines.errors import InputError
from kandrt.runtime.masks import hint_pixels, latent_mask

# float32 in another order of operations, on values of about 1 to 2
ROUNDING = 1e-6


# latent_mask


def oracle_mask(mask: Any, height: int, width: int) -> Any:
    import torch
    from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_inpainting import (
        prepare_mask,
        prepare_mask_and_masked_image,
    )

    prepared, _ = prepare_mask_and_masked_image(Image.new("RGB", (width, height)), mask, height, width)
    prepared = torch.nn.functional.interpolate(prepared.float(), (height // 8, width // 8), mode="nearest")
    return prepare_mask(prepared).numpy()


def blobs(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft blobs, about a tenth of them over one half, with edges at every level."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 190, (height // 9 + 2, width // 9 + 2), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(128, 192), (97, 61), (400, 600)])
@pytest.mark.parametrize(("height", "width"), [(192, 128), (64, 128)])
@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P", "LA", "RGBA"])
def test_latent_mask_is_that_of_diffusers(size: tuple[int, int], height: int, width: int, mode: str) -> None:
    source = blobs(*size).convert(mode)
    if mode == "RGBA":
        source.putalpha(blobs(*size, seed=1))
    found = latent_mask(source, height, width)
    wanted = oracle_mask(source, height, width)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)
    assert 0 < found.mean() < 1


@pytest.mark.parametrize("shape", [(64, 128), (200, 333), (17, 9)])
def test_latent_mask_of_arrays(shape: tuple[int, int]) -> None:
    levels = np.asarray(blobs(shape[1], shape[0]))
    unit = levels.astype(np.float32) / 255
    wanted = oracle_mask(unit.copy(), 64, 128)
    given = [unit, unit.astype(np.float64), levels, levels[..., None], levels >= 128, (levels >= 128).astype(np.int64)]
    for array in given:
        before = array.copy()
        np.testing.assert_array_equal(latent_mask(array, 64, 128), wanted)
        np.testing.assert_array_equal(array, before)  # the oracle overwrites its caller's


def test_latent_mask_white_is_repainted_and_black_kept() -> None:
    assert latent_mask(Image.new("L", (64, 64), 255), 64, 64).max() == 0
    assert latent_mask(Image.new("L", (64, 64), 128), 64, 64).max() == 0
    assert latent_mask(Image.new("L", (64, 64), 127), 64, 64).min() == 1
    cell = np.zeros((64, 64), bool)
    cell[24:32, 24:32] = True
    kept = latent_mask(cell, 64, 64)[0, 0]
    zeros = {(int(i), int(j)) for i, j in zip(*np.nonzero(kept == 0), strict=True)}
    assert zeros == {(3, 3), (2, 3), (3, 2), (2, 2), (4, 3), (3, 4), (4, 4)}


def test_latent_mask_from_a_deep_file(tmp_path: Path) -> None:
    source = blobs(64, 64)
    Image.fromarray(np.asarray(source).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(latent_mask(tmp_path / "deep.png", 64, 64), latent_mask(source, 64, 64))


def test_latent_mask_of_another_scale() -> None:
    assert latent_mask(np.zeros((64, 64)), 64, 128, scale=4).shape == (1, 1, 16, 32)


@pytest.mark.parametrize("mask", [Image.new("L", (64, 48)), np.zeros((48, 64))], ids=["PIL", "array"])
def test_latent_mask_must_have_the_size_of_the_image(mask: Any) -> None:
    assert latent_mask(mask, 64, 64, expected_size=(48, 64)).shape == (1, 1, 8, 8)
    with pytest.raises(InputError, match=r"^mask: its size 64 x 48 .* that of the image, 48 x 64"):
        latent_mask(mask, 64, 64, expected_size=(64, 48))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((8, 8, 3)), r"\[8, 8, 3\]"),
        (np.zeros((0, 8)), "empty"),
        (np.full((8, 8), 2.0), "0 to 1, found"),
        (np.full((8, 8), np.nan), "0 to 1, found"),
        (np.full((8, 8), -1), "-1 to -1"),
        (np.full((8, 8), 256), "256 to 256"),
        (np.zeros((8, 8), complex), "found complex128"),
        ("nowhere.png", "no such file"),
    ],
)
def test_unsuitable_masks(mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^mask.*{message}"):
        latent_mask(mask, 64, 64)


# hint_pixels


def test_hint_of_the_right_size_as_in_diffusers_example(tmp_path: Path) -> None:
    """`make_hint` in the docstring of diffusers' KandinskyV22ControlnetPipeline."""
    depth = blobs(128, 64)
    wanted = np.repeat(np.asarray(depth)[None, None].astype(np.float32) / 255, 3, axis=1)
    depth.save(tmp_path / "depth.png")
    for hint in (depth, tmp_path / "depth.png", wanted, wanted[0], wanted[0, 0], wanted[0].transpose(1, 2, 0)):
        found = hint_pixels(hint, 64, 128)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(hint_pixels(np.asarray(depth), 64, 128), wanted)


def test_hint_is_resized_where_the_aspect_ratio_agrees() -> None:
    hint = blobs(1024, 683).convert("RGB")  # 512 x 341.5
    wanted = np.asarray(hint.resize((192, 128), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1)[None] / 255
    np.testing.assert_allclose(hint_pixels(hint, 128, 192), wanted, rtol=0, atol=ROUNDING)
    with pytest.raises(InputError, match=r"hint: its size 1024 x 683 .* of the picture, 128 x 192"):
        hint_pixels(hint, 192, 128)


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        (np.zeros((128, 64)), r"for a picture 128 x 64, found \[128, 64\]"),
        (np.zeros((2, 3, 64, 128)), r"found \[2, 3, 64, 128\]"),
        (np.zeros((4, 64, 128)), r"found \[4, 64, 128\]"),
        (np.zeros(0), r"found \[0\]"),
        (np.full((64, 128), 255.0), "0 to 1, found"),
        (np.zeros((64, 128), np.int32), "found int32"),
        ("nowhere.png", "no such file"),
    ],
)
def test_unsuitable_hints(hint: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^hint.*{message}"):
        hint_pixels(hint, 64, 128)
