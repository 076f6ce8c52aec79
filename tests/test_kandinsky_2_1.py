"""Kandinsky 2.1 in all its modes against diffusers, on the same weights and the same noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from kandrt.engines.errors import BundleError, InputError, NumericalError
from kandrt.runtime import Embeds, Kandinsky, load
from kandrt.runtime.families import start_by_strength
from kandrt.runtime.schedulers import scheduler_from_config

from .oracle import (
    Broken,
    Oracle,
    SeededNoise,
    as_diffusers,
    box,
    compare_embeds,
    compare_pictures,
    component,
    injected,
    picture,
    without_networks,
)

PRIOR, TEXT, IMAGE, INPAINT = (
    "KandinskyPriorPipeline", "KandinskyPipeline", "KandinskyImg2ImgPipeline", "KandinskyInpaintPipeline",
)  # fmt: skip
Arguments = dict[str, Any]
DIM = 48  # of image embeddings
SIZE: Arguments = {"height": 64, "width": 128}
SQUARE: Arguments = {"height": 64, "width": 64}
A, B = "a red cat", "a dog, photographed from above"
LATENTS = np.random.default_rng(3).standard_normal((2, 4, 8, 16), np.float32)
PICTURES = [picture(64, 128), picture(90, 100, 1)]
MASK = box(64, 128, 0.2, 0.4, 0.7, 0.9)
PIL_MASK = Image.fromarray((255 * MASK).astype(np.uint8))


@pytest.fixture(scope="module")
def k(bundle_2_1: Path) -> Iterator[Kandinsky]:
    with load(bundle_2_1, threads=1) as k:
        yield k


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle(checkpoints, DIM)


@contextmanager
def unswapped(oracle: Oracle) -> Iterator[None]:
    """Let diffusers' image-to-image take the height for the height, where it fails on all but squares."""
    processor = oracle.pipeline(IMAGE).image_processor
    preprocess = processor.preprocess
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "preprocess", lambda image, width, height: preprocess(image, height, width))
        yield


# The prior

PRIORS: dict[str, Arguments] = {
    "one": {"prompt": A},
    "several": {"prompt": [A, B, ""]},
    "count": {"prompt": [A, B], "count": 3},
    "no guidance": {"prompt": [A, B], "count": 2, "guidance_scale": 1.0},
    "negative": {"prompt": A, "negative_prompt": "blurry, ugly"},
    "negatives, count": {"prompt": [A, B], "negative_prompt": ["x", "ugly"], "count": 2},
    "latents": {"prompt": A, "negative_prompt": "x", "latents": LATENTS.reshape(-1)[: 2 * DIM].reshape(2, DIM)},
}


@pytest.mark.parametrize("case", PRIORS)
def test_prior_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    arguments = {"steps": 5, **PRIORS[case]}
    theirs, ours = SeededNoise(), SeededNoise()
    expected, found = oracle(PRIOR, theirs, **arguments), k.prior(**arguments, noise=ours)
    compare_embeds(found, expected)
    assert ours.shapes == theirs.shapes
    assert found.family == "kandinsky-2-1"


INTERPOLATE: dict[str, Arguments] = {
    "texts": {"images_and_prompts": [A, B], "weights": [0.3, 0.7]},
    "text and image": {"images_and_prompts": [A, picture(80, 120)], "weights": [0.4, 0.6]},
    "negative": {"images_and_prompts": [A, picture(80, 120)], "weights": [0.4, 0.6], "negative_prompt": "ugly"},
    "prior negative": {"images_and_prompts": [A, B], "weights": [0.3, 0.7], "negative_prior_prompt": "ugly"},
}


@pytest.mark.parametrize("case", INTERPOLATE)
def test_interpolate_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    arguments = {"steps": 4, **INTERPOLATE[case]}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(PRIOR, theirs, method="interpolate", **arguments)
    compare_embeds(k.prior.interpolate(**arguments, noise=ours), expected)
    assert ours.shapes == theirs.shapes


def test_interpolate_gives_as_many_as_asked_for(k: Kandinsky, oracle: Oracle) -> None:
    """diffusers sums over the items and over their rows: with a count of 2 a text weighs twice."""
    arguments: Arguments = {"images_and_prompts": [A, B], "weights": [0.3, 0.7], "steps": 3, "count": 2}
    with injected(SeededNoise()):
        summed = oracle.pipeline(PRIOR).interpolate(**as_diffusers(arguments))
    found = k.prior.interpolate(**arguments, noise=SeededNoise())
    assert (summed.image_embeds.shape, found.image_embeds.shape) == ((1, DIM), (2, DIM))
    total = np.repeat(found.image_embeds.sum(axis=0, keepdims=True), 2, axis=0)
    theirs = Embeds(np.repeat(summed.image_embeds.numpy(), 2, axis=0), summed.negative_image_embeds.numpy())
    compare_embeds(Embeds(total, found.negative_image_embeds), theirs)


# Text to image

FROM_TEXT: dict[str, tuple[int, Arguments]] = {
    "one": (1, {"prompt": A}),
    "several": (3, {"prompt": [A, B, ""]}),
    "count": (2, {"prompt": [A, B], "count": 2}),
    "negative": (1, {"prompt": A, "negative_prompt": "blurry, ugly", "count": 2}),
    "negatives": (2, {"prompt": [A, B], "negative_prompt": ["x", "ugly thing"]}),
    "negatives, count": (2, {"prompt": [A, B], "negative_prompt": ["x", "ugly thing"], "count": 2}),
    "no guidance": (2, {"prompt": [A, B], "guidance_scale": 1.0}),
    "weak guidance": (1, {"prompt": A, "guidance_scale": 1.5}),
    "high": (1, {"prompt": A, "height": 128, "width": 64}),
    "rounded up": (1, {"prompt": A, "height": 60, "width": 100}),
    "one step": (1, {"prompt": A, "steps": 1}),
    "many steps": (1, {"prompt": A, "steps": 6}),
    "latents": (2, {"prompt": [A, B], "latents": LATENTS}),
}


@pytest.mark.parametrize("case", FROM_TEXT)
def test_text_to_image_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    batch, given = FROM_TEXT[case]
    embeds, arguments = oracle.embeds(*"abc"[:batch]), {"steps": 3, **SIZE, **given}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(TEXT, theirs, embeds=embeds, **arguments)
    compare_pictures(k.decoder(embeds, **arguments, noise=ours).array, expected)
    assert ours.shapes == theirs.shapes


def test_the_prompt_and_the_embeddings_matter(k: Kandinsky, oracle: Oracle) -> None:
    arguments: Arguments = {"steps": 2, "latents": LATENTS[:1], **SIZE}
    first = k.decoder(oracle.embeds("a"), prompt=A, **arguments).array
    for other in (
        k.decoder(oracle.embeds("a"), prompt=B, **arguments),
        k.decoder(oracle.embeds("b"), prompt=A, **arguments),
        k.decoder(oracle.embeds("a"), prompt=A, negative_prompt=B, **arguments),
    ):
        assert np.abs(other.array - first).max() > 0.05


# Image to image

FROM_IMAGE: dict[str, tuple[int, Arguments]] = {
    "default strength": (1, {"prompt": A, "image": picture(64, 64), "steps": 7}),
    "default guidance": (1, {"prompt": A, "image": picture(64, 64), "strength": 0.5, "negative_prompt": "x"}),
    "guidance": (1, {"prompt": A, "image": picture(64, 64), "strength": 0.5, "guidance_scale": 2.5}),
    "resized": (1, {"prompt": A, "image": picture(150, 131), "strength": 0.8}),
    "all steps": (1, {"prompt": A, "image": picture(64, 64), "strength": 1.0}),
    "truncated": (1, {"prompt": A, "image": picture(64, 64), "strength": 0.29, "steps": 100}),  # 28 steps, not 29
    "count": (1, {"prompt": A, "image": picture(64, 64), "strength": 0.5, "count": 2}),
    "several": (
        2, {"prompt": [A, B], "image": [picture(64, 64), picture(90, 80, 1)], "strength": 0.7, "count": 2},
    ),
    "no guidance": (1, {"prompt": A, "image": picture(64, 64), "strength": 0.7, "guidance_scale": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("case", FROM_IMAGE)
def test_image_to_image_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    batch, given = FROM_IMAGE[case]
    embeds, arguments = oracle.embeds(*"ab"[:batch]), {"steps": 4, **SQUARE, **given}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(IMAGE, theirs, embeds=embeds, **arguments)
    compare_pictures(k.decoder(embeds, **arguments, noise=ours).array, expected)
    assert ours.shapes == theirs.shapes


@pytest.mark.parametrize("size", [(64, 128), (60, 100)])
def test_image_to_image_of_any_size(k: Kandinsky, oracle: Oracle, size: tuple[int, int]) -> None:
    """diffusers exchanges height and width, and rounds the picture down and its noise up: only multiples of 64 work."""
    embeds, height_width = oracle.embeds("a"), dict(zip(("height", "width"), size, strict=True))
    arguments: Arguments = {"prompt": A, "image": picture(*size), "strength": 0.7, "steps": 4}
    with pytest.raises(ValueError, match="Unexpected latents shape"):
        oracle(IMAGE, SeededNoise(), embeds=embeds, **arguments, **height_width)
    with unswapped(oracle):
        expected = oracle(IMAGE, SeededNoise(), embeds=embeds, **arguments, **SIZE)
    compare_pictures(k.decoder(embeds, **arguments, **height_width, noise=SeededNoise()).array, expected)
    compare_pictures(k.decoder(embeds, **arguments, noise=SeededNoise()).array, expected)


@pytest.mark.parametrize("strength", [0.003, 0.5, 1.0])
def test_start_from_an_image_as_diffusers(oracle: Oracle, strength: float) -> None:
    """With the noise of a table of its own, two timesteps below the strength."""
    clean, noise = LATENTS[:1], LATENTS[1:]
    timestep = torch.tensor([int(1000 * strength) - 2])
    expected = oracle.pipeline(IMAGE).add_noise(torch.from_numpy(clean), torch.from_numpy(noise), timestep).numpy()
    scheduler = scheduler_from_config({"_class_name": "DDIMScheduler"})
    found = start_by_strength(scheduler, clean, noise, 500, strength)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # float32 of values around 1


def test_a_strength_that_is_hardly_any(k: Kandinsky, oracle: Oracle) -> None:
    """diffusers counts from the table's other end, so that next to no strength gives nothing but noise."""
    arguments: Arguments = {"prompt": A, "image": picture(64, 64), "strength": 0.0015, "steps": 900, **SQUARE}
    expected = oracle(IMAGE, SeededNoise(), embeds=oracle.embeds("a"), **arguments)
    found = k.decoder(oracle.embeds("a"), **arguments, noise=SeededNoise())
    assert np.abs(found.array - expected).max() > 0.5
    more = k.decoder(oracle.embeds("a"), **{**arguments, "strength": 0.003}, noise=SeededNoise())
    compare_pictures(found.array, more.array, 0.15)  # noise of 1 % or 2 %, as one of 64 x 64 x 3 values shows it


# Schedulers


def schedulers(checkpoint: Path) -> dict[str, Any]:
    """What each name stands for: the checkpoint's scheduler is DDIM, and a sub-folder holds one of DDPM."""
    ddpm = diffusers.DDPMScheduler.from_pretrained(checkpoint, subfolder="ddpm_scheduler")
    assert (ddpm.config.thresholding, ddpm.config.variance_type) == (True, "learned_range")
    return {"ddim": None, "ddpm": ddpm, "dpmpp-2m": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp-2m"])
def test_schedulers_as_diffusers(k: Kandinsky, oracle: Oracle, checkpoints: dict[str, Path], name: str) -> None:
    embeds, images = oracle.embeds("a", "b"), [picture(64, 64), picture(64, 64, 1)]
    for pipeline, given in ((TEXT, {}), (IMAGE, {"image": images, "strength": 0.7})):
        arguments: Arguments = {"prompt": [A, B], "steps": 6, **SQUARE, **given}
        theirs, ours = SeededNoise(), SeededNoise()
        scheduler = schedulers(checkpoints["decoder-2-1"])[name]
        expected = oracle(pipeline, theirs, embeds=embeds, scheduler=scheduler, **arguments)
        compare_pictures(k.decoder(embeds, scheduler=name, noise=ours, **arguments).array, expected)
        assert ours.shapes == theirs.shapes


@pytest.mark.parametrize(("name", "kind"), [("ddim", None), ("ddpm", "DDPMScheduler")])
def test_schedulers_of_inpainting(k: Kandinsky, oracle: Oracle, name: str, kind: str | None) -> None:
    """Its checkpoint has no sub-folder for DDPM, which then follows the schedule of DDIM."""
    arguments: Arguments = {"prompt": A, "image": PICTURES[0], "mask": MASK, "steps": 6, **SIZE}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(INPAINT, theirs, embeds=oracle.embeds("a"), scheduler=kind, **arguments)
    compare_pictures(k.decoder(oracle.embeds("a"), scheduler=name, noise=ours, **arguments).array, expected)
    assert ours.shapes == theirs.shapes


# Inpainting, of which nothing is pasted

AROUND_A_MASK: dict[str, tuple[int, Arguments]] = {
    "array mask": (1, {}),
    "picture mask": (1, {"mask": PIL_MASK}),
    "negative": (1, {"negative_prompt": "ugly"}),
    "one step": (1, {"steps": 1}),
    "many steps": (1, {"steps": 6}),
    "count": (1, {"count": 3}),
    "each its own": (
        2,
        {"prompt": [A, B], "image": [PICTURES[0], picture(64, 128, 5)],
         "mask": [MASK, box(64, 128, 0, 0, 0.6, 0.4)], "count": 2},
    ),
    "no guidance": (1, {"guidance_scale": 1.0}),
    "resized": (1, {"image": picture(150, 131), "mask": box(150, 131, 0.2, 0.4, 0.7, 0.9)}),
    "nothing kept": (1, {"mask": np.ones((64, 128), np.float32)}),
    "all kept": (1, {"mask": np.zeros((64, 128), np.float32)}),
    "latents": (1, {"latents": LATENTS[:1]}),
}  # fmt: skip


@pytest.mark.parametrize("case", AROUND_A_MASK)
def test_inpainting_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    batch, given = AROUND_A_MASK[case]
    embeds = oracle.embeds(*"ab"[:batch])
    arguments = {"prompt": A, "image": PICTURES[0], "mask": MASK, "steps": 3, **SIZE, **given}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(INPAINT, theirs, embeds=embeds, **arguments)
    compare_pictures(k.decoder(embeds, **arguments, noise=ours).array, expected)
    assert ours.shapes == theirs.shapes


# Seeds


@pytest.mark.parametrize(
    ("name", "given"),
    [
        (TEXT, SIZE),
        (IMAGE, {"image": [picture(64, 64)] * 2, "strength": 0.7, "scheduler": "ddpm", **SQUARE}),
        (INPAINT, {"image": [PICTURES[0]] * 2, "mask": [MASK] * 2, **SIZE}),
    ],
)
def test_seeds_as_diffusers(
    k: Kandinsky, oracle: Oracle, checkpoints: dict[str, Path], name: str, given: Arguments
) -> None:
    embeds, arguments = oracle.embeds("a", "b"), {"prompt": [A, B], "steps": 4, **given}
    told = {**arguments, "scheduler": schedulers(checkpoints["decoder-2-1"])[given.get("scheduler", "ddim")]}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)]
    expected = oracle(name, embeds=embeds, generator=generators[0], **told)
    compare_pictures(k.decoder(embeds, seed=5, **arguments).array, expected)
    generators[0].manual_seed(5)
    result = k.decoder(embeds, seed=[5, 6], **arguments)
    compare_pictures(result.array, oracle(name, embeds=embeds, generator=generators, **told))
    assert result.seed == (5, 6)


# Where diffusers fails or does not do what it promises


def test_a_prompt_serves_several_embeddings(k: Kandinsky, oracle: Oracle) -> None:
    """diffusers counts the prompts, and fails where the embeddings are not as many."""
    embeds, arguments = oracle.embeds("a", "b"), {"steps": 2, **SIZE}
    with pytest.raises(RuntimeError):
        oracle(TEXT, SeededNoise(), embeds=embeds, prompt=A, negative_prompt="x", **arguments)
    expected = oracle(
        TEXT, SeededNoise(), embeds=embeds, prompt=[A, A], negative_prompt=["x", "x"], count=2, **arguments
    )
    found = k.decoder(embeds, prompt=A, negative_prompt="x", count=2, noise=SeededNoise(), **arguments)
    compare_pictures(found.array, expected)


def test_count_without_guidance(k: Kandinsky, oracle: Oracle) -> None:
    """diffusers repeats the embeddings only with guidance. Negative embeddings are not needed."""
    arguments: Arguments = {"steps": 2, "guidance_scale": 1.0, **SIZE}
    with pytest.raises(RuntimeError):
        oracle(TEXT, SeededNoise(), embeds=oracle.embeds("a"), prompt=A, count=2, **arguments)
    expected = oracle(TEXT, SeededNoise(), embeds=oracle.embeds("a", "a"), prompt=[A, A], **arguments)
    embeds = oracle.embeds("a", negative=False)
    compare_pictures(k.decoder(embeds, prompt=A, count=2, noise=SeededNoise(), **arguments).array, expected)


# Errors


@pytest.mark.parametrize(
    ("name", "message"),
    [("prompt_encoder", "prompt encoder: the network's output holds NaN"), ("decoder_step", "decoder: step 1 of 3")],
)
def test_nan_names_the_network(bundle_2_1: Path, oracle: Oracle, name: str, message: str) -> None:
    broken = Broken(component(bundle_2_1, name))
    with load(bundle_2_1, sessions={name: broken}, threads=1) as k, pytest.raises(NumericalError, match=message):
        k.decoder(oracle.embeds("a"), prompt=A, steps=3, **SIZE)


STATES: Arguments = {"prompt_embeds": np.zeros((1, 5, 80), np.float32), "attention_mask": np.ones((1, 5), np.float32)}
BAD: dict[str, tuple[Arguments, str]] = {
    "prompt": ({"prompt": None}, r"prompt: Kandinsky 2\.1's decoder needs one beside the embeddings"),
    "type of the prompt": ({"prompt": 3}, "prompt: expected text or a list of texts, found int"),
    "prompts": ({"prompt": [A] * 3}, "prompt: expected one, or as many as share 2 embeddings equally, found 3"),
    "prompts, count": (
        {"prompt": [A] * 4, "count": 2}, "prompt: expected one, or as many as share 2 embeddings equally, found 4",
    ),
    "negatives": ({"negative_prompt": ["x"] * 3}, "negative_prompt: expected one, or one for each of 2 embeddings"),
    "embeds": ({"embeds": None}, r"embeds: Kandinsky 2\.1's decoder takes what k\.prior gives, .* found none"),
    "text": ({"embeds": A}, r"embeds: .* found a prompt; .* or k\.decoder\(k\.prior\(prompt\), prompt=prompt\)"),
    "width": ({"embeds": Embeds(np.zeros((1, 32)))}, "image_embeds: this decoder takes 48 values a picture, found 32"),
    "family": (
        {"embeds": Embeds(np.zeros((1, 48)), None, "kandinsky-2-2")},
        r"embeds: they are from a prior of Kandinsky 2\.2, and this is a decoder of Kandinsky 2\.1",
    ),
    "no negatives": ({"embeds": Embeds(np.zeros((1, 48)))}, "negative_image_embeds: needed with"),
    "states": (STATES, r"prompt_embeds and attention_mask: Kandinsky 2\.1's decoder does not take them"),
    "hint": ({"hint": PICTURES[0]}, r"Kandinsky 2\.1 has no ControlNet; Kandinsky 2\.2 does \(kandinsky-2-2-contr"),
    "mask alone": ({"mask": MASK}, "mask: inpainting needs image= too"),
    "scheduler": ({"scheduler": "euler"}, "scheduler: expected one of ddpm, ddim, dpmpp-2m .* found 'euler'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_run_no_network(bundle_2_1: Path, oracle: Oracle, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises((InputError, BundleError), match=message):
        without_networks(bundle_2_1).decoder(**{"embeds": oracle.embeds("a", "b"), "prompt": A, **arguments})


def test_no_encode_prompt(bundle_2_1: Path) -> None:
    with pytest.raises(InputError, match=r"encode_prompt: Kandinsky 2\.1's decoder does not take prompt_embeds"):
        without_networks(bundle_2_1).encode_prompt(A)
