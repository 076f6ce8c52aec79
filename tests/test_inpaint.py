"""Inpainting against diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kandrt.engines.errors import InputError
from kandrt.runtime import Kandinsky, load

from .oracle import Oracle, SeededNoise, box, compare_pictures, picture, row_of, without_networks

INPAINT = "KandinskyV22InpaintPipeline"
Arguments = dict[str, Any]
SIZE: Arguments = {"height": 64, "width": 128}
IMAGE, MASK = picture(64, 128), box(64, 128, 0.2, 0.4, 0.7, 0.9)


@pytest.fixture(scope="module")
def k(bundle: Path) -> Iterator[Kandinsky]:
    with load(bundle, threads=1) as k:
        yield k


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle(checkpoints)


def as_pil(mask: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray((255 * mask).astype(np.uint8))


CASES: dict[str, tuple[int, Arguments]] = {
    "array mask": (1, {}),
    "picture mask": (1, {"mask": as_pil(MASK)}),
    "one step": (1, {"steps": 1}),
    "many steps": (1, {"steps": 6}),
    "count": (1, {"count": 3}),
    "batch": (2, {"image": [IMAGE] * 2, "mask": [MASK] * 2}),
    "no guidance": (1, {"guidance_scale": 1.0}),
    "resized": (1, {"image": picture(150, 131), "mask": box(150, 131, 0.2, 0.4, 0.7, 0.9)}),
    "resized picture": (1, {"image": picture(150, 131), "mask": as_pil(box(150, 131, 0.2, 0.4, 0.7, 0.9))}),
    "array image": (1, {"image": np.asarray(IMAGE)}),
    "soft mask": (1, {"mask": 0.49 + 0.02 * MASK}),
    "grey image": (1, {"image": IMAGE.convert("L")}),
    "nothing kept": (1, {"mask": np.ones((64, 128), np.float32)}),
    "all kept": (1, {"mask": np.zeros((64, 128), np.float32)}),
    "one pixel": (1, {"mask": box(64, 128, 32 / 64, 64 / 128, 33 / 64, 65 / 128)}),
    "latents": (1, {"latents": np.random.default_rng(3).standard_normal((1, 4, 8, 16), np.float32)}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    batch, given = CASES[case]
    arguments = {"image": IMAGE, "mask": MASK, "steps": 3, **SIZE, **given}
    embeds = oracle.embeds(*"ab"[:batch])
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(INPAINT, theirs, embeds=embeds, **arguments)
    compare_pictures(k.decoder(embeds, **arguments, noise=ours).array, expected)
    assert ours.shapes == theirs.shapes


SCHEDULERS = {"ddim": "DDIMScheduler", "dpmpp-2m": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_as_diffusers(k: Kandinsky, oracle: Oracle, name: str) -> None:
    arguments: Arguments = {"image": IMAGE, "mask": MASK, "steps": 6, **SIZE}
    embeds = oracle.embeds("a")
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(INPAINT, theirs, embeds=embeds, scheduler=SCHEDULERS[name], **arguments)
    compare_pictures(k.decoder(embeds, scheduler=name, noise=ours, **arguments).array, expected)
    assert ours.shapes == theirs.shapes


def test_seeds_as_diffusers(k: Kandinsky, oracle: Oracle) -> None:
    arguments: Arguments = {"image": IMAGE, "mask": MASK, "steps": 3, "count": 2, **SIZE}
    embeds = oracle.embeds("a")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)]
    expected = oracle(INPAINT, embeds=embeds, generator=generators, **arguments)
    result = k.decoder(embeds, seed=[5, 6], **arguments)
    compare_pictures(result.array, expected)
    assert result.seed == (5, 6)
    expected = oracle(INPAINT, embeds=embeds, generator=torch.Generator("cpu").manual_seed(8), **arguments)
    compare_pictures(k.decoder(embeds, seed=8, **arguments).array, expected)


# Where diffusers fails or does not do what it promises


@pytest.mark.parametrize("scheduler", ["ddpm", "dpmpp-2m"])
def test_each_picture_keeps_its_own(k: Kandinsky, oracle: Oracle, scheduler: str) -> None:
    """diffusers shows the network each image and mask, but pastes the first ones back into all of the batch."""
    names, count = ("a", "b"), 2
    images, masks = [IMAGE, picture(64, 128, 5)], [MASK, box(64, 128, 0, 0, 0.6, 0.4)]
    own = None if scheduler == "ddpm" else SCHEDULERS[scheduler]
    arguments: Arguments = {"steps": 4, **SIZE}
    found = k.decoder(
        oracle.embeds(*names), image=images, mask=masks, count=count, noise=SeededNoise(), scheduler=scheduler,
        **arguments,
    ).array  # fmt: skip
    for row in range(len(names) * count):
        of = row // count
        noise = row_of(SeededNoise(), row, len(names) * count)
        alone = oracle(
            INPAINT,
            noise,
            embeds=oracle.embeds(names[of]),
            image=images[of],
            mask=masks[of],
            scheduler=own,
            **arguments,
        )
        compare_pictures(found[row : row + 1], alone)
    theirs = oracle(
        INPAINT, SeededNoise(), embeds=oracle.embeds(*names), image=images, mask=masks, count=count, scheduler=own,
        **arguments,
    )  # fmt: skip
    compare_pictures(found[:count], theirs[:count])
    assert np.abs(found[count:] - theirs[count:]).max() > 0.1


def test_one_image_and_mask_for_several(k: Kandinsky, oracle: Oracle) -> None:
    """diffusers wants as many images and masks as embeddings."""
    embeds = oracle.embeds("a", "b")
    arguments: Arguments = {"steps": 2, **SIZE}
    with pytest.raises(RuntimeError):
        oracle(INPAINT, SeededNoise(), embeds=embeds, image=IMAGE, mask=MASK, **arguments)
    expected = oracle(INPAINT, SeededNoise(), embeds=embeds, image=[IMAGE] * 2, mask=[MASK] * 2, **arguments)
    compare_pictures(k.decoder(embeds, image=IMAGE, mask=MASK, noise=SeededNoise(), **arguments).array, expected)
    several = k.decoder(embeds, image=[IMAGE] * 2, mask=MASK, noise=SeededNoise(), **arguments)
    compare_pictures(several.array, expected)


def test_count_without_guidance(k: Kandinsky, oracle: Oracle) -> None:
    arguments: Arguments = {"image": IMAGE, "mask": MASK, "steps": 2, "guidance_scale": 1.0, **SIZE}
    with pytest.raises(RuntimeError):
        oracle(INPAINT, SeededNoise(), embeds=oracle.embeds("a"), count=2, **arguments)
    twice = {**arguments, "image": [IMAGE] * 2, "mask": [MASK] * 2}
    expected = oracle(INPAINT, SeededNoise(), embeds=oracle.embeds("a", "a"), **twice)
    found = k.decoder(oracle.embeds("a", negative=False), count=2, noise=SeededNoise(), **arguments)
    compare_pictures(found.array, expected)


@pytest.mark.parametrize("pil", [False, True], ids=["array", "picture"])
def test_any_size(k: Kandinsky, oracle: Oracle, pil: bool) -> None:
    """diffusers encodes the image at the size asked for and rounds only the noise up; here both are rounded up."""
    image, mask = picture(60, 100), box(60, 100, 0.2, 0.4, 0.7, 0.9)
    arguments: Arguments = {"image": image, "mask": as_pil(mask) if pil else mask, "steps": 2}
    embeds = oracle.embeds("a")
    with pytest.raises(RuntimeError):
        oracle(INPAINT, SeededNoise(), embeds=embeds, **arguments, height=60, width=100)
    expected = oracle(INPAINT, SeededNoise(), embeds=embeds, **arguments, **SIZE)
    sizes: list[Arguments] = [{}, {"height": 60, "width": 100}]
    for size in sizes:
        compare_pictures(k.decoder(embeds, **arguments, **size, noise=SeededNoise()).array, expected)


def test_arrays_are_resized(k: Kandinsky, oracle: Oracle) -> None:
    """As pictures are; diffusers takes arrays at the size that they have."""
    image, mask = picture(100, 150), box(100, 150, 0.2, 0.4, 0.7, 0.9)
    embeds = oracle.embeds("a")
    with pytest.raises(RuntimeError):
        oracle(INPAINT, SeededNoise(), embeds=embeds, image=np.asarray(image), mask=mask, steps=2, **SIZE)
    expected = oracle(INPAINT, SeededNoise(), embeds=embeds, image=image, mask=mask, steps=2, **SIZE)
    found = k.decoder(embeds, image=np.asarray(image), mask=mask, steps=2, noise=SeededNoise(), **SIZE)
    compare_pictures(found.array, expected)


def test_masks_of_all_kinds(k: Kandinsky, oracle: Oracle, tmp_path: Path) -> None:
    embeds = oracle.embeds("a")
    expected = oracle(INPAINT, SeededNoise(), embeds=embeds, image=IMAGE, mask=MASK, steps=2, **SIZE)
    as_pil(MASK).save(tmp_path / "mask.png")
    masks: list[Any] = [MASK[..., None], MASK.astype(bool), MASK.astype(np.uint8), (255 * MASK).astype(np.uint8)]
    masks += [tmp_path / "mask.png", as_pil(MASK).convert("1")]
    for mask in masks:
        found = k.decoder(embeds, image=IMAGE, mask=mask, steps=2, noise=SeededNoise(), **SIZE)
        compare_pictures(found.array, expected)


def test_the_kept_region_is_kept(k: Kandinsky, oracle: Oracle) -> None:
    """Its latents are the image's own in the end, and the painted ones are not."""
    embeds = oracle.embeds("a")
    mask = box(64, 128, 0, 0, 1, 0.5)
    found = k.decoder(embeds, image=IMAGE, mask=mask, steps=3, seed=1, **SIZE).latents
    movq = oracle.pipeline(INPAINT).movq
    pixels = torch.from_numpy(np.asarray(IMAGE, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        clean = movq.encode(pixels).latents.numpy()
    # the painted region takes one latent column more at its edge
    np.testing.assert_allclose(found[..., 9:], clean[..., 9:], rtol=0, atol=1e-5 * np.abs(clean).max())
    assert np.abs(found[..., :9] - clean[..., :9]).min(axis=(0, 1)).max() > 0.1


def test_the_mask_is_left_alone(k: Kandinsky, oracle: Oracle) -> None:
    mask = 0.6 * MASK
    before = mask.copy()
    k.decoder(oracle.embeds("a"), image=IMAGE, mask=mask, steps=1, **SIZE)
    np.testing.assert_array_equal(mask, before)


BAD: dict[str, tuple[Arguments, str]] = {
    "no image": ({"image": None}, "mask: inpainting needs image= too"),
    "hint": ({"hint": IMAGE}, "mask and hint were both given"),
    "strength": ({"strength": 0.5}, "strength: only with image= and without mask="),
    "size of the mask": ({"mask": MASK[:, :64]}, r"mask: its size 64 x 64 .* must be that of the image, 128 x 64"),
    "size of a picture": (
        {"mask": as_pil(MASK[:32])},
        r"mask: its size 128 x 32 .* must be that of the image, 128 x 64",
    ),
    "size of the image": (
        {"image": picture(100, 100)},
        r"mask: its size 128 x 64 .* must be that of the image, 100 x 100",
    ),
    "size of the second": (
        {"image": [IMAGE, picture(64, 64)], "mask": [MASK, MASK]},
        "must be that of the image, 64 x 64",
    ),
    "colours": ({"mask": np.zeros((64, 128, 3), np.float32)}, r"mask: expected an array \[H, W\]"),
    "range": ({"mask": 2 * MASK}, "mask: floating values must lie within 0 to 1"),
    "nan": ({"mask": MASK * np.float32("nan")}, "mask: floating values must lie within 0 to 1"),
    "type": ({"mask": 3}, "mask: expected a path, a PIL image or an array, found int"),
    "missing file": ({"mask": Path("no.png")}, "mask .*no such file"),
    "no masks": ({"mask": []}, "mask: expected one picture"),
    "masks": ({"mask": [MASK] * 3}, "mask: expected one picture, or as many as share 2 embeddings equally, found 3"),
    "images": ({"image": [IMAGE] * 3}, "image: expected one picture, or as many as share 2 embeddings"),
    "latents": ({"latents": np.zeros((1, 4, 8, 16), np.float32)}, r"latents: expected finite floats \[2, 4, 8, 16\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_run_no_network(bundle: Path, oracle: Oracle, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        without_networks(bundle).decoder(oracle.embeds("a", "b"), **{"image": IMAGE, "mask": MASK, **arguments})
