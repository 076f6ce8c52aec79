"""Kandinsky 2.1's texts to pictures in one call against diffusers' combined pipelines, and its defaults."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from kandrt.engines.bundle import open_bundle
from kandrt.engines.errors import BundleError, InputError
from kandrt.runtime import Kandinsky, Prior, load
from kandrt.runtime.plan import Plan, Request, make_plan

from .oracle import Oracle, SeededNoise, box, compare_pictures, picture, without_networks

TEXT, IMAGE, INPAINT = (
    "KandinskyCombinedPipeline", "KandinskyImg2ImgCombinedPipeline", "KandinskyInpaintCombinedPipeline",
)  # fmt: skip
Arguments = dict[str, Any]
SIZE: Arguments = {"height": 64, "width": 128}
SQUARE: Arguments = {"height": 64, "width": 64}
STEPS: Arguments = {"prior_steps": 3, "steps": 3}
SMALL: Arguments = {**SIZE, **STEPS}
A, B = "a red cat", "a dog, photographed from above"
PICTURES = [picture(64, 128), picture(90, 100, 1)]
MASK = box(64, 128, 0.2, 0.4, 0.7, 0.9)
PIL_MASK = Image.fromarray((255 * MASK).astype(np.uint8))

# The prior's differences, up to 1e-5 relative, pass through the whole decoder, guided 4-fold.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def k(bundle_2_1: Path) -> Iterator[Kandinsky]:
    with load(bundle_2_1, threads=1) as k:
        yield k


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle(checkpoints, 48)


CASES: dict[str, tuple[str, Arguments]] = {
    "one": (TEXT, {"prompt": A}),
    "several": (TEXT, {"prompt": [A, B]}),
    "count": (TEXT, {"prompt": A, "count": 2}),
    "negative": (TEXT, {"prompt": A, "negative_prompt": "ugly"}),
    "negatives": (TEXT, {"prompt": [A, B], "negative_prompt": ["x", "ugly"]}),
    "no prior guidance": (TEXT, {"prompt": A, "prior_guidance_scale": 1.0}),
    "no guidance": (TEXT, {"prompt": A, "guidance_scale": 1.0, "count": 2}),
    "scales": (TEXT, {"prompt": A, "guidance_scale": 2.5, "prior_guidance_scale": 6.0}),
    "rounded up": (TEXT, {"prompt": A, "height": 120, "width": 60}),
    "prior latents": (
        TEXT, {"prompt": A, "prior_latents": np.random.default_rng(3).standard_normal((1, 48), np.float32)},
    ),
    "image": (IMAGE, {"prompt": A, "image": PICTURES[0], "strength": 0.7, **SQUARE}),
    "image, default strength": (IMAGE, {"prompt": A, "image": PICTURES[0], "steps": 7, **SQUARE}),
    "images": (
        IMAGE, {"prompt": [A, B], "image": PICTURES, "negative_prompt": ["x", "y"], "strength": 0.7, **SQUARE},
    ),
    "mask": (INPAINT, {"prompt": A, "image": PICTURES[0], "mask": MASK, "negative_prompt": "ugly"}),
    "masks": (INPAINT, {"prompt": [A, B], "image": [PICTURES[0], picture(64, 128, 1)], "mask": [PIL_MASK] * 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    name, given = CASES[case]
    arguments = {**SMALL, **given}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(name, theirs, **arguments)
    compare_pictures(k(**arguments, noise=ours).array, expected, TOLERANCE)
    assert ours.shapes == theirs.shapes


def test_seeds_as_diffusers(k: Kandinsky, oracle: Oracle) -> None:
    """One generator serves both, prior first."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (43, 6)]
    expected = oracle(TEXT, prompt=A, negative_prompt="x", generator=generators[0], **SMALL)
    compare_pictures(k(A, negative_prompt="x", seed=43, **SMALL).array, expected, TOLERANCE)
    generators[0].manual_seed(43)
    expected = oracle(TEXT, prompt=[A, B], generator=generators, **SMALL)
    compare_pictures(k([A, B], seed=[43, 6], **SMALL).array, expected, TOLERANCE)


def test_the_negative_prompt_is_the_priors(k: Kandinsky) -> None:
    noise = SeededNoise()
    embeds = k.prior(A, negative_prompt="ugly", steps=3, noise=noise)
    expected = k.decoder(embeds, prompt=A, steps=3, noise=noise, **SIZE)
    found = k(A, negative_prompt="ugly", noise=SeededNoise(), **SMALL)
    np.testing.assert_array_equal(found.array, expected.array)


# Where diffusers fails or does not do what it promises


def test_prompts_belong_to_their_embeddings(k: Kandinsky, oracle: Oracle) -> None:
    """With several prompts and count, diffusers gives the decoder prompts in turn beside embeddings in succession."""
    theirs, ours = SeededNoise(), SeededNoise()
    embeds = oracle("KandinskyPriorPipeline", theirs, prompt=[A, B], steps=3, count=2)
    expected = oracle("KandinskyPipeline", theirs, prompt=[A, A, B, B], embeds=embeds, steps=3, **SIZE)
    found = k([A, B], count=2, noise=ours, **SMALL).array
    compare_pictures(found, expected, TOLERANCE)
    assert ours.shapes == theirs.shapes
    turns = oracle(TEXT, SeededNoise(), prompt=[A, B], count=2, **SMALL)
    compare_pictures(found[::3], turns[::3], TOLERANCE)
    assert np.abs(found[1:3] - turns[1:3]).max() > 0.1


@pytest.mark.parametrize(
    ("name", "repeated", "given"),
    [
        (IMAGE, {"image": [picture(64, 128)]}, {"image": picture(64, 128), "strength": 0.7}),
        (INPAINT, {"mask": PIL_MASK}, {"image": PICTURES[0], "mask": MASK}),
    ],
)
def test_one_image_for_several_pictures(
    k: Kandinsky, oracle: Oracle, name: str, repeated: Arguments, given: Arguments
) -> None:
    """diffusers repeats a list of one image, and an image not; masks that are pictures, and arrays not."""
    arguments: Arguments = {"prompt": A, "count": 2, **STEPS, **(SQUARE if name == IMAGE else SIZE), **given}
    with pytest.raises((ValueError, RuntimeError)):
        oracle(name, SeededNoise(), **arguments)
    expected = oracle(name, SeededNoise(), **{**arguments, **repeated})
    compare_pictures(k(noise=SeededNoise(), **arguments).array, expected, TOLERANCE)


# Defaults, and what stays open


def defaults(function: Any) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


FROM: dict[str, Arguments] = {
    "Pipeline": {}, "Img2ImgPipeline": {"image": picture(512, 512)},
    "InpaintPipeline": {"image": picture(512, 512), "mask": np.ones((512, 512), np.float32)},
}  # fmt: skip


def check_defaults(plan: Plan, theirs: dict[str, Any]) -> None:
    assert len(plan.timesteps) == int(theirs["num_inference_steps"] * theirs.get("strength", 1.0))
    assert plan.scale == theirs["guidance_scale"]
    assert (plan.height, plan.width) == (theirs["height"], theirs["width"])
    assert len(plan.conditions) == theirs["num_images_per_prompt"]


@pytest.mark.parametrize("kind", FROM)
def test_defaults_of_the_decoder(bundle_2_1: Path, oracle: Oracle, kind: str) -> None:
    plan = make_plan(open_bundle(bundle_2_1), Request(oracle.embeds("a"), A, **FROM[kind]))
    check_defaults(plan, defaults(getattr(diffusers, f"Kandinsky{kind}").__call__))


def test_defaults_of_the_prior() -> None:
    ours, theirs = defaults(Prior.__call__), defaults(diffusers.KandinskyPriorPipeline.__call__)
    assert (ours["steps"], ours["guidance_scale"]) == (theirs["num_inference_steps"], theirs["guidance_scale"])
    assert ours["count"] == theirs["num_images_per_prompt"]


@pytest.mark.parametrize("kind", FROM)
def test_defaults_in_one_call(bundle_2_1: Path, kind: str) -> None:
    """Image-to-image has another default guidance than by itself; the prior's are its own."""
    theirs = defaults(getattr(diffusers, f"Kandinsky{kind.replace('Pipeline', 'CombinedPipeline')}").__call__)
    check_defaults(without_networks(bundle_2_1).prepare(A, **FROM[kind]).plan, theirs)
    prior = defaults(Prior.__call__)
    assert prior["steps"] == theirs["prior_num_inference_steps"]
    assert prior["guidance_scale"] == theirs["prior_guidance_scale"]


def test_memory_stage(bundle_2_1: Path) -> None:
    arguments: Arguments = {"negative_prompt": "ugly", "image": PICTURES[0], "strength": 1.0, "seed": 4, **SMALL}
    open_during: list[tuple[str, ...]] = []
    with load(bundle_2_1, threads=1, memory="stage") as staged:
        found = staged(A, callback=lambda *_: open_during.append(staged.opened), **arguments)
        assert staged.opened == ()
    assert open_during == [("prior_step",)] * 3 + [("decoder_step",)] * 3
    with load(bundle_2_1, threads=1) as kept:
        np.testing.assert_array_equal(found.array, kept(A, **arguments).array)


def test_only_what_is_needed_is_opened(bundle_2_1: Path) -> None:
    with load(bundle_2_1, threads=1) as k:
        k(A, **SMALL)
        assert set(k.opened) == {
            "text_encoder", "prior_context", "prior_step",
            "prompt_encoder", "decoder_context", "decoder_step", "movq_decoder",
        }  # fmt: skip


def test_callback(k: Kandinsky) -> None:
    seen: list[tuple[Any, ...]] = []
    k(A, prior_steps=2, steps=3, callback=lambda *args: seen.append((*args[:3], args[3].shape)), **SIZE)
    assert seen == [("prior", done, 2, (1, 48)) for done in (1, 2)] + [
        ("decoder", done, 3, (1, 4, 8, 16)) for done in (1, 2, 3)
    ]


BAD: dict[str, tuple[Arguments, str]] = {
    "no prompt": ({"prompt": None}, "prompt: expected text or a list of texts, found NoneType"),
    "no prompts": ({"prompt": []}, "prompt: expected at least one text"),
    "negatives": ({"negative_prompt": ["a", "b"]}, "negative_prompt: expected one, or one for each of 1 "),
    "states": ({"prompt_embeds": np.zeros((1, 2, 80))}, r"prompt_embeds: Kandinsky 2\.1 does not take them; K"),
    "mask of states": ({"attention_mask": np.ones((1, 2))}, r"attention_mask: Kandinsky 2\.1 does not take them"),
    "hint": ({"hint": PICTURES[0]}, r"Kandinsky 2\.1 has no ControlNet; Kandinsky 2\.2 does"),
    "prior steps": ({"prior_steps": 0}, "steps: expected an int of 1 to 1000"),
    "prior scale": ({"prior_guidance_scale": -1}, "prior_guidance_scale: expected a number of 0 or more"),
    "seeds": ({"seed": [1, 2], "count": 3}, "seed: expected one, or one for each of 3 pictures, found 2"),
    "seed and noise": ({"seed": 1, "noise": SeededNoise()}, "seed and noise were both given"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_run_no_network(bundle_2_1: Path, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises((InputError, BundleError), match=message):
        without_networks(bundle_2_1)(**{"prompt": A, **arguments})
