"""Texts to pictures in one call against diffusers' combined pipelines, and what needs prior and decoder together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import BackendError, BundleError, InputError
from kandrt.runtime import Embeds, Kandinsky, load
from kandrt.runtime.components import Components

from .oracle import Oracle, SeededNoise, Spy, box, compare_pictures, picture, without_networks

TEXT = "KandinskyV22CombinedPipeline"
IMAGE = "KandinskyV22Img2ImgCombinedPipeline"
INPAINT = "KandinskyV22InpaintCombinedPipeline"
Arguments = dict[str, Any]
SIZE: Arguments = {"height": 64, "width": 128}
STEPS: Arguments = {"prior_steps": 3, "steps": 3}
SMALL: Arguments = {**SIZE, **STEPS}

# 3e-5 was seen; the prior's differences (up to 1e-5 relative) pass through the whole decoder, guided 4-fold.
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def k(bundle: Path) -> Iterator[Kandinsky]:
    with load(bundle, threads=1) as k:
        yield k


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle(checkpoints)


def swapped(arguments: Arguments) -> Arguments:
    """diffusers' image-to-image takes the height for the width and the width for the height."""
    return {**arguments, "height": arguments["width"], "width": arguments["height"]}


def test_the_combined_checkpoint_has_the_weights_of_the_bundle(checkpoints: dict[str, Path]) -> None:
    """Submodels of one seed are equal in all checkpoints, so that one bundle serves for comparison with all of them."""
    compared = 0
    for role, prefix in (("prior", "prior_"), ("decoder", "")):
        for file in checkpoints[role].rglob("*/*"):
            part, name = file.parent.name, file.name
            other = checkpoints["combined"] / f"{prefix}{part}" / name
            same = json.loads(file.read_text()) == json.loads(other.read_text()) if file.suffix == ".json" else None
            assert same or file.read_bytes() == other.read_bytes(), file
            compared += file.suffix == ".safetensors"
    assert compared == 5


LATENTS = np.random.default_rng(3).standard_normal((2, 32), np.float32)

FROM_TEXT: dict[str, Arguments] = {
    "one": {"prompt": "a red cat"},
    "several": {"prompt": ["a red cat", "a dog"]},
    "count": {"prompt": ["a red cat", "a dog"], "count": 2},
    "negative": {"prompt": "a red cat", "negative_prompt": "ugly"},
    "negatives, count": {"prompt": ["a red cat", "a dog"], "negative_prompt": ["x", "ugly"], "count": 2},
    "no prior guidance": {"prompt": "a red cat", "prior_guidance_scale": 1.0},
    "no guidance": {"prompt": "a red cat", "guidance_scale": 1.0, "count": 2},
    "scales": {"prompt": "a red cat", "guidance_scale": 2.5, "prior_guidance_scale": 6.0},
    "steps": {"prompt": "a red cat", "prior_steps": 2, "steps": 5},
    "rounded up": {"prompt": "a red cat", "height": 120, "width": 60},
    "prior latents": {"prompt": ["a red cat", "a dog"], "prior_latents": LATENTS},
}


@pytest.mark.parametrize("case", FROM_TEXT)
def test_from_text_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    arguments = {**SMALL, **FROM_TEXT[case]}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(TEXT, theirs, **arguments)
    compare_pictures(k(**arguments, noise=ours).array, expected, TOLERANCE)
    assert ours.shapes == theirs.shapes


PICTURES = [picture(64, 128), picture(90, 100, 1)]
FROM_IMAGE: dict[str, Arguments] = {
    "one": {"prompt": "a red cat", "image": PICTURES[0], "strength": 0.7},
    "default strength": {"prompt": "a red cat", "image": PICTURES[1], "steps": 7},
    "count": {"prompt": "a red cat", "image": PICTURES[1], "count": 2, "strength": 1.0},
    "several": {"prompt": ["a red cat", "a dog"], "image": PICTURES, "negative_prompt": ["x", "y"], "strength": 0.7},
}


@pytest.mark.parametrize("case", FROM_IMAGE)
def test_from_an_image_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    arguments = {**SMALL, **FROM_IMAGE[case]}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(IMAGE, theirs, **swapped(arguments))
    compare_pictures(k(**arguments, noise=ours).array, expected, TOLERANCE)
    assert ours.shapes == theirs.shapes


MASK = box(64, 128, 0.2, 0.4, 0.7, 0.9)
PIL_MASK = Image.fromarray((255 * MASK).astype(np.uint8))
AROUND_A_MASK: dict[str, Arguments] = {
    "one": {"prompt": "a red cat", "mask": MASK},
    "count": {"prompt": "a red cat", "mask": PIL_MASK, "count": 2},
    "several": {"prompt": ["a red cat", "a dog"], "mask": PIL_MASK, "negative_prompt": ["x", "y"]},
}


@pytest.mark.parametrize("case", AROUND_A_MASK)
def test_around_a_mask_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    arguments = {**SMALL, "image": PICTURES[0], **AROUND_A_MASK[case]}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(INPAINT, theirs, **arguments)
    compare_pictures(k(**arguments, noise=ours).array, expected, TOLERANCE)
    assert ours.shapes == theirs.shapes


@pytest.mark.parametrize("image", [None, PICTURES[1]], ids=["noise", "image"])
def test_along_a_hint(k: Kandinsky, oracle: Oracle, image: Image.Image | None) -> None:
    """diffusers has no combined pipeline with ControlNet; its two pipelines, one after the other, are one."""
    name = "KandinskyV22ControlnetPipeline" if image is None else "KandinskyV22ControlnetImg2ImgPipeline"
    hint = (np.asarray(PICTURES[0], np.float32) / 255).transpose(2, 0, 1)[None].copy()
    given: Arguments = {} if image is None else {"image": image, "strength": 0.7}
    theirs, ours = SeededNoise(), SeededNoise()
    embeds = oracle("KandinskyV22PriorPipeline", theirs, prompt="a red cat", negative_prompt="ugly", steps=3)
    told = {**SIZE, **given} if image is None else swapped({**SIZE, **given})
    expected = oracle(name, theirs, embeds=embeds, hint=hint, steps=3, **told)
    found = k("a red cat", negative_prompt="ugly", hint=hint, noise=ours, **STEPS, **given)
    compare_pictures(found.array, expected, TOLERANCE)
    assert ours.shapes == theirs.shapes


# Seeds


@pytest.mark.parametrize("given", [{"count": 2}, {"negative_prompt": "ugly"}], ids=["count", "negative"])
def test_seed_as_diffusers(k: Kandinsky, oracle: Oracle, given: Arguments) -> None:
    """One generator serves both, prior first."""
    generator = torch.Generator("cpu").manual_seed(43)
    expected = oracle(TEXT, prompt="a red cat", generator=generator, **SMALL, **given)
    result = k("a red cat", seed=43, **SMALL, **given)
    compare_pictures(result.array, expected, TOLERANCE)
    assert result.seed == 43


def test_a_seed_a_picture_as_diffusers(k: Kandinsky, oracle: Oracle) -> None:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)]
    expected = oracle(TEXT, prompt=["a red cat", "a dog"], generator=generators, **SMALL)
    result = k(["a red cat", "a dog"], seed=[5, 6], **SMALL)
    compare_pictures(result.array, expected, TOLERANCE)
    assert result.seed == (5, 6)


def test_a_seed_a_picture_with_a_negative_prompt(k: Kandinsky, oracle: Oracle) -> None:
    """diffusers' prior wants two generators a picture then, and its decoder one; here a picture is as it is alone."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)]
    prompts, negatives = ["a red cat", "a dog"], ["ugly", "ugly"]
    with pytest.raises(IndexError):
        oracle(TEXT, prompt=prompts, negative_prompt=negatives, generator=generators, **SMALL)
    result = k(prompts, negative_prompt="ugly", seed=[5, 6], **SMALL)
    for row, (prompt, seed) in enumerate(zip(prompts, (5, 6), strict=True)):
        alone = k(prompt, negative_prompt="ugly", seed=seed, **SMALL)
        compare_pictures(result.array[row : row + 1], alone.array, TOLERANCE)


@pytest.mark.parametrize("count", [1, 2])
def test_the_seed_repeats_the_pictures(k: Kandinsky, count: int) -> None:
    first = k("a red cat", count=count, **SMALL)
    again = k("a red cat", count=count, seed=first.seed, **SMALL)
    np.testing.assert_array_equal(first.array, again.array)


# Where diffusers fails or does not do what it promises


def test_latents_are_the_decoders(k: Kandinsky, oracle: Oracle) -> None:
    """In diffusers `latents` go to the prior, and the decoder's starting noise cannot be given."""
    latents = np.random.default_rng(3).standard_normal((1, 4, 8, 16), np.float32)
    with pytest.raises(ValueError, match="Unexpected latents shape"):
        oracle(TEXT, SeededNoise(), prompt="a red cat", latents=latents, **SMALL)
    theirs, ours = SeededNoise(), SeededNoise()
    embeds = oracle("KandinskyV22PriorPipeline", theirs, prompt="a red cat", steps=3)
    expected = oracle("KandinskyV22Pipeline", theirs, embeds=embeds, steps=3, latents=latents, **SIZE)
    compare_pictures(k("a red cat", latents=latents, noise=ours, **SMALL).array, expected, TOLERANCE)
    assert ours.shapes == theirs.shapes


def test_images_belong_to_prompts(k: Kandinsky, oracle: Oracle) -> None:
    """With several images and count, diffusers gives the first prompt's pictures the images of all prompts in turn."""
    prompts = ["a red cat", "a dog"]
    arguments: Arguments = {"strength": 0.7, "steps": 3}
    theirs, ours = SeededNoise(), SeededNoise()
    embeds = oracle("KandinskyV22PriorPipeline", theirs, prompt=prompts, steps=3, count=2)
    each = [PICTURES[0], PICTURES[0], PICTURES[1], PICTURES[1]]
    expected = oracle(
        "KandinskyV22Img2ImgPipeline", theirs, embeds=embeds, image=each, **swapped({**arguments, **SIZE})
    )
    found = k(prompts, image=PICTURES, count=2, noise=ours, prior_steps=3, **arguments, **SIZE).array
    compare_pictures(found, expected, TOLERANCE)
    turns = oracle(IMAGE, SeededNoise(), prompt=prompts, image=PICTURES, count=2, **swapped({**SMALL, "strength": 0.7}))
    compare_pictures(found[:1], turns[:1], TOLERANCE)
    assert np.abs(found[1] - turns[1]).max() > 0.1


def test_an_array_mask_for_several(k: Kandinsky, oracle: Oracle) -> None:
    """diffusers repeats masks that are pictures, and arrays not."""
    arguments: Arguments = {"prompt": "a red cat", "image": PICTURES[0], "count": 2, **SMALL}
    with pytest.raises(RuntimeError):
        oracle(INPAINT, SeededNoise(), mask=MASK, **arguments)
    expected = oracle(INPAINT, SeededNoise(), mask=PIL_MASK, **arguments)
    compare_pictures(k(mask=MASK, noise=SeededNoise(), **arguments).array, expected, TOLERANCE)


# What stays open, callbacks, errors


def test_text_to_image_opens_no_encoder_of_pictures(bundle: Path) -> None:
    with load(bundle, threads=1) as k:
        k("a red cat", **SMALL)
        assert set(k.opened) == {
            "text_encoder", "prior_context", "prior_step", "decoder_context", "decoder_step", "movq_decoder",
        }  # fmt: skip


def test_memory_stage(bundle: Path, k: Kandinsky) -> None:
    arguments: Arguments = {"negative_prompt": "ugly", "image": PICTURES[0], "strength": 1.0, "seed": 4, **SMALL}
    open_during: list[tuple[str, ...]] = []
    with load(bundle, threads=1, memory="stage") as staged:
        found = staged("a red cat", callback=lambda *_: open_during.append(staged.opened), **arguments)
        assert staged.opened == ()
    assert open_during == [("prior_step",)] * 3 + [("decoder_step",)] * 3
    np.testing.assert_array_equal(found.array, k("a red cat", **arguments).array)


def test_callback(k: Kandinsky) -> None:
    seen: list[tuple[Any, ...]] = []
    k("a red cat", prior_steps=2, steps=3, callback=lambda *args: seen.append((*args[:3], args[3].shape)), **SIZE)
    assert seen == [("prior", done, 2, (1, 32)) for done in (1, 2)] + [
        ("decoder", done, 3, (1, 4, 8, 16)) for done in (1, 2, 3)
    ]


def test_cancelled_by_the_callback(k: Kandinsky) -> None:
    def stop(stage: str, done: int, steps: int, latents: Any) -> None:
        if (stage, done) == ("decoder", 2):
            raise InterruptedError

    before = k("a red cat", seed=1, **SMALL)
    with pytest.raises(InterruptedError):
        k("a red cat", callback=stop, seed=1, **SMALL)
    np.testing.assert_array_equal(k("a red cat", seed=1, **SMALL).array, before.array)


def test_closed(bundle: Path) -> None:
    with load(bundle, threads=1) as k:
        pass
    with pytest.raises(BackendError, match="was closed; load it again"):
        k("a red cat", **SMALL)


BAD: dict[str, tuple[Arguments, str]] = {
    "prompt": ({"prompt": None}, "prompt: expected text"),
    "no prompts": ({"prompt": []}, "prompt: expected at least one text"),
    "negatives": (
        {"negative_prompt": ["a", "b"]},
        "negative_prompt: expected one, or one for each of 1 prompts, found 2",
    ),
    "prior steps": ({"prior_steps": 0}, "steps: expected an int of 1 to 1000"),
    "steps": ({"steps": 1001}, "steps: expected an int of 1 to 1000"),
    "prior scale": ({"prior_guidance_scale": -1}, "prior_guidance_scale: expected a number of 0 or more"),
    "scale": ({"guidance_scale": "x"}, "guidance_scale: expected a number of 0 or more"),
    "count": ({"count": 0}, "count: expected a whole number"),
    "height": ({"height": 0}, "height: expected a whole number of pixels"),
    "scheduler": ({"scheduler": "unclip"}, "scheduler: expected one of ddpm"),
    "strength": ({"strength": 0.5}, "strength: only with image="),
    "no step": ({"strength": 0.1, "image": PICTURES[0], "steps": 3}, "leaves no step"),
    "mask": ({"mask": MASK}, "mask: inpainting needs image= too"),
    "size of the mask": ({"mask": MASK[:32], "image": PICTURES[0]}, "mask: its size .* must be that of the image"),
    "mask and hint": ({"mask": MASK, "hint": PICTURES[0], "image": PICTURES[0]}, "mask and hint were both given"),
    "hint": ({"hint": PICTURES[0], "height": 128, "width": 128}, "hint: its size .* aspect ratio"),
    "images": ({"image": PICTURES}, "image: expected one picture, or as many as share 1 embeddings"),
    "prior latents": ({"prior_latents": LATENTS}, r"latents: expected finite floats \[1, 32\]"),
    "latents": ({"latents": LATENTS}, r"latents: expected finite floats \[1, 4, 64, 64\]"),
    "seeds": ({"seed": [1, 2], "count": 3}, "seed: expected one, or one for each of 3 pictures, found 2"),
    "seeds of rows": ({"seed": [1, 2], "negative_prompt": "x"}, "seed: expected one, or one for each of 1 pictures"),
    "seed and noise": ({"seed": 1, "noise": SeededNoise()}, "seed and noise were both given"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_run_no_network(bundle: Path, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        without_networks(bundle)(**{"prompt": "a", **arguments})


def part_of(bundle: Path, *roles: str, prior: bool) -> Kandinsky:
    """The bundle as if it had been made of fewer checkpoints."""
    opened = open_bundle(bundle)
    decoders = {role: record for role, record in opened.manifest.decoders.items() if role in roles}
    manifest = dataclasses.replace(opened.manifest, decoders=decoders, prior=opened.manifest.prior if prior else None)
    sessions: Mapping[str, Any] = {name: Spy() for name in manifest.components}
    return Kandinsky(Components(Bundle(bundle, manifest), "onnxruntime", "cpu", sessions=sessions))


def test_missing_parts_name_the_checkpoint(bundle: Path) -> None:
    embeds = Embeds(np.zeros((1, 32), np.float32), np.zeros((1, 32), np.float32))
    image = PICTURES[0]
    inputs: dict[str, Arguments] = {
        "kandinsky-2-2-decoder": {},
        "kandinsky-2-2-decoder-inpaint": {"image": image, "mask": MASK},
        "kandinsky-2-2-controlnet-depth": {"hint": image},
    }
    for checkpoint, role in zip(inputs, ("decoder", "inpaint", "controlnet"), strict=True):
        others = {"decoder", "inpaint", "controlnet"} - {role}
        k = part_of(bundle, *others, prior=True)
        message = rf"cannot do .*export it with a checkpoint like {checkpoint} as well"
        with pytest.raises(BundleError, match=message):
            k("a", **inputs[checkpoint])
        with pytest.raises(BundleError, match=message):
            k.decoder(embeds, **inputs[checkpoint])
    with pytest.raises(BundleError, match=r"has no prior.*kandinsky-2-2-prior"):
        part_of(bundle, "decoder", prior=False)("a")
    with pytest.raises(BundleError, match=r"has no prior.*kandinsky-2-2-prior"):
        _ = part_of(bundle, "decoder", prior=False).prior
    with pytest.raises(BundleError, match=r"has no decoder.*kandinsky-2-2-decoder"):
        part_of(bundle, prior=True)("a")
    with pytest.raises(BundleError, match=r"has no decoder.*kandinsky-2-2-decoder"):
        _ = part_of(bundle, prior=True).decoder
