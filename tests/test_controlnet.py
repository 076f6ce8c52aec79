"""ControlNet from noise and from a picture, against diffusers."""

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

from .oracle import F32, Oracle, SeededNoise, compare_pictures, picture, without_networks

CONTROLNET, IMAGE = "KandinskyV22ControlnetPipeline", "KandinskyV22ControlnetImg2ImgPipeline"
Arguments = dict[str, Any]
SIZE: Arguments = {"height": 64, "width": 128}


def hint(seed: int = 0, height: int = 64, width: int = 128) -> F32:
    """[1, 3, height, width] in [0, 1]."""
    values = np.asarray(picture(height, width, seed), np.float32) / np.float32(255)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


@pytest.fixture(scope="module")
def k(bundle: Path) -> Iterator[Kandinsky]:
    with load(bundle, threads=1) as k:
        yield k


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle(checkpoints)


def told(arguments: Arguments, hints: list[np.ndarray[Any, Any]]) -> tuple[str, Arguments]:
    """The pipeline, and the arguments in the form that it takes them: image-to-image swaps height and width."""
    theirs = {**arguments, "hint": np.concatenate(hints)}
    if "image" not in arguments:
        return CONTROLNET, theirs
    return IMAGE, {**theirs, "height": arguments["width"], "width": arguments["height"]}


CASES: dict[str, tuple[int, list[int], Arguments]] = {
    "one": (1, [0], {}),
    "batch": (2, [0, 1], {}),
    "count": (2, [0, 1], {"count": 2}),
    "no guidance": (2, [0, 1], {"guidance_scale": 1.0}),
    "latents": (1, [0], {"latents": np.random.default_rng(3).standard_normal((1, 4, 8, 16), np.float32)}),
    "from an image": (1, [0], {"image": picture(64, 128, 3), "strength": 0.7}),
    "from an image, default": (1, [0], {"image": picture(64, 128, 3), "steps": 7}),
    "from an image, resized": (1, [0], {"image": picture(90, 200, 3), "strength": 1.0}),
    "from images, count": (2, [0, 1], {"image": [picture(64, 128, 3), picture(64, 128, 4)], "count": 2, "steps": 7}),
    "from an image, no guidance": (1, [0], {"image": picture(64, 128, 3), "strength": 0.7, "guidance_scale": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    batch, seeds, given = CASES[case]
    arguments = {"steps": 4, **SIZE, **given}
    embeds, hints = oracle.embeds(*"ab"[:batch]), [hint(seed) for seed in seeds]
    theirs, ours = SeededNoise(), SeededNoise()
    name, theirs_arguments = told(arguments, hints)
    expected = oracle(name, theirs, embeds=embeds, **theirs_arguments)
    compare_pictures(k.decoder(embeds, hint=hints, **arguments, noise=ours).array, expected)
    assert ours.shapes == theirs.shapes


@pytest.mark.parametrize(("ours", "theirs"), [("ddim", "DDIMScheduler"), ("dpmpp-2m", "DPMSolverMultistepScheduler")])
def test_schedulers_as_diffusers(k: Kandinsky, oracle: Oracle, ours: str, theirs: str) -> None:
    arguments: Arguments = {"steps": 5, "hint": hint(), **SIZE}
    embeds = oracle.embeds("a")
    expected = oracle(CONTROLNET, SeededNoise(), embeds=embeds, scheduler=theirs, **arguments)
    compare_pictures(k.decoder(embeds, scheduler=ours, noise=SeededNoise(), **arguments).array, expected)


def test_seeds_as_diffusers(k: Kandinsky, oracle: Oracle) -> None:
    arguments: Arguments = {"steps": 3, "hint": hint(), "count": 2, **SIZE}
    embeds = oracle.embeds("a")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)]
    expected = oracle(CONTROLNET, embeds=embeds, generator=generators, **arguments)
    compare_pictures(k.decoder(embeds, seed=[5, 6], **arguments).array, expected)


def test_size_of_the_hint(k: Kandinsky, oracle: Oracle) -> None:
    """Without height and width diffusers makes 512 x 512, which fits no other hint."""
    embeds = oracle.embeds("a")
    with pytest.raises(RuntimeError):
        oracle(CONTROLNET, SeededNoise(), embeds=embeds, hint=hint(), steps=2)
    expected = oracle(CONTROLNET, SeededNoise(), embeds=embeds, hint=hint(), steps=2, **SIZE)
    compare_pictures(k.decoder(embeds, hint=hint(), steps=2, noise=SeededNoise()).array, expected)
    image = picture(100, 90, 3)
    name, arguments = told({"image": image, "strength": 1.0, "steps": 2, **SIZE}, [hint()])
    expected = oracle(name, SeededNoise(), embeds=embeds, **arguments)
    found = k.decoder(embeds, hint=hint(), image=image, strength=1.0, steps=2, noise=SeededNoise())
    compare_pictures(found.array, expected)


def test_count_without_guidance(k: Kandinsky, oracle: Oracle) -> None:
    arguments: Arguments = {"hint": hint(), "steps": 2, "guidance_scale": 1.0, **SIZE}
    with pytest.raises(RuntimeError):
        oracle(CONTROLNET, SeededNoise(), embeds=oracle.embeds("a"), count=2, **arguments)
    twice = {**arguments, "hint": np.concatenate([hint()] * 2)}
    expected = oracle(CONTROLNET, SeededNoise(), embeds=oracle.embeds("a", "a"), **twice)
    found = k.decoder(oracle.embeds("a", negative=False), count=2, noise=SeededNoise(), **arguments)
    compare_pictures(found.array, expected)


def test_one_hint_for_several(k: Kandinsky, oracle: Oracle) -> None:
    """diffusers wants as many hints as embeddings."""
    embeds, arguments = oracle.embeds("a", "b"), {"steps": 2, **SIZE}
    with pytest.raises(RuntimeError):
        oracle(CONTROLNET, SeededNoise(), embeds=embeds, hint=hint(), **arguments)
    expected = oracle(CONTROLNET, SeededNoise(), embeds=embeds, hint=np.concatenate([hint()] * 2), **arguments)
    compare_pictures(k.decoder(embeds, hint=hint(), noise=SeededNoise(), **arguments).array, expected)


def test_hints_of_all_kinds(k: Kandinsky, oracle: Oracle, tmp_path: Path) -> None:
    embeds, image = oracle.embeds("a"), picture(64, 128)
    expected = oracle(CONTROLNET, SeededNoise(), embeds=embeds, hint=hint(), steps=2, **SIZE)
    image.save(tmp_path / "hint.png")
    for same in (image, str(tmp_path / "hint.png"), np.asarray(image), hint()[0], hint()[0].transpose(1, 2, 0)):
        compare_pictures(k.decoder(embeds, hint=same, steps=2, noise=SeededNoise()).array, expected)
    grey = np.asarray(image.convert("L"), np.float32) / 255
    expected = oracle(
        CONTROLNET, SeededNoise(), embeds=embeds, hint=np.repeat(grey[None, None], 3, axis=1), steps=2, **SIZE
    )
    for same in (grey, Image.fromarray((255 * grey + 0.5).astype(np.uint8))):
        compare_pictures(k.decoder(embeds, hint=same, steps=2, noise=SeededNoise()).array, expected)


BAD: dict[str, tuple[Arguments, str]] = {
    "array": ({"hint": hint()[..., :64], **SIZE}, r"hint: expected an array \[64, 128\].* found \[1, 3, 64, 64\]"),
    "no multiple of 64": ({"hint": hint(0, 60, 128)}, r"hint: expected an array \[64, 128\].* found \[1, 3, 60, 128\]"),
    "aspect ratio": ({"hint": picture(64, 64), **SIZE}, "hint: its size 64 x 64 .* has not the aspect ratio"),
    "range": ({"hint": 255 * hint()}, "hint: floating values must lie within 0 to 1"),
    "channels": ({"hint": hint()[:, :2]}, "hint: expected an array"),
    "axes": ({"hint": np.zeros(3, np.float32)}, r"expected an array \[H, W\]"),
    "type": ({"hint": object()}, "hint: expected a path, a PIL image or an array, found object"),
    "missing file": ({"hint": "no.png"}, "hint 'no.png': no such file"),
    "mask": ({"mask": np.zeros((64, 128)), "image": picture(64, 128)}, "mask and hint were both given"),
    "mask alone": ({"mask": np.zeros((64, 128))}, "mask: inpainting needs image= too"),
    "strength": ({"strength": 0.5}, "strength: only with image="),
    "hints": ({"hint": [hint()] * 3}, "hint: expected one picture, or as many as share 2 embeddings equally, found 3"),
    "latents, image": (
        {"image": picture(64, 128), "latents": np.zeros((2, 4, 8, 16), np.float32)}, "latents and image were both",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_run_no_network(bundle: Path, oracle: Oracle, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        without_networks(bundle).decoder(oracle.embeds("a", "b"), **{"hint": hint(), **arguments})
