"""Kandinsky 3 in all its modes against diffusers, on the same weights and the same noise."""

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
from kandrt.engines.errors import BundleError, InputError, NumericalError
from kandrt.runtime import Embeds, Kandinsky, load
from kandrt.runtime.plan import Request, make_plan
from kandrt.runtime.tokenizer import PromptTruncatedWarning

from .oracle import (
    STATES,
    Broken,
    Oracle,
    SeededNoise,
    compare_pictures,
    component,
    picture,
    row_of,
    spied,
    without_networks,
)

TEXT, IMAGE = "Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline"
Arguments = dict[str, Any]
SIZE: Arguments = {"height": 64, "width": 128}
A, B = "a red cat", "a dog on a mat, photographed from above in the evening"
LATENTS = np.random.default_rng(3).standard_normal((2, 4, 8, 16), np.float32)

# Relative L2, of float32 sums in another order in a text encoder of two layers.
STATES_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def k(bundle_3: Path) -> Iterator[Kandinsky]:
    with load(bundle_3, threads=1) as k:
        yield k


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle(checkpoints)


# Text to image

FROM_TEXT: dict[str, Arguments] = {
    "one": {"prompt": A},
    "several of several lengths": {"prompt": [A, B, ""]},
    "empty": {"prompt": ""},
    "count": {"prompt": B, "count": 3},
    "shorter negative": {"prompt": B, "negative_prompt": "x", "count": 2},
    "longer negative": {"prompt": A, "negative_prompt": B},
    "empty negative": {"prompt": A, "negative_prompt": ""},
    "negatives": {"prompt": [A, B], "negative_prompt": ["a blurry thing", "x"]},
    "no guidance": {"prompt": [A, B], "guidance_scale": 1.0},
    "no guidance, count": {"prompt": A, "negative_prompt": "x", "guidance_scale": 0.5, "count": 2},
    "weak guidance": {"prompt": A, "guidance_scale": 1.5},
    "high": {"prompt": A, "height": 128, "width": 64},
    "rounded up": {"prompt": A, "height": 65, "width": 100},
    "one step": {"prompt": A, "steps": 1},
    "many steps": {"prompt": A, "steps": 6},
    "latents": {"prompt": [A, B], "latents": LATENTS},
}


@pytest.mark.parametrize("case", FROM_TEXT)
def test_text_to_image_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    arguments = {"steps": 3, **SIZE, **FROM_TEXT[case]}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(TEXT, theirs, **arguments)
    compare_pictures(k(**arguments, noise=ours).array, expected)
    assert ours.shapes == theirs.shapes


def test_a_prompt_of_too_many_tokens(k: Kandinsky, oracle: Oracle) -> None:
    """Both read its first 128, which leaves no token of padding."""
    prompt = " ".join(f"a cat and {i} dogs" for i in range(60))
    expected = oracle(TEXT, SeededNoise(), prompt=prompt, steps=2, **SIZE)
    with pytest.warns(PromptTruncatedWarning, match="longer than 128 tokens"):
        found = k(prompt, steps=2, noise=SeededNoise(), **SIZE)
    compare_pictures(found.array, expected)
    with pytest.warns(PromptTruncatedWarning):
        assert k.encode_prompt([prompt, A]).prompt_embeds.shape[:2] == (2, 128)


def test_the_prompt_matters(k: Kandinsky) -> None:
    arguments: Arguments = {"steps": 2, "latents": LATENTS[:1], "seed": 1, **SIZE}
    first = k(A, **arguments).array
    for other in (k(B, **arguments), k(A, negative_prompt=B, **arguments)):
        assert np.abs(other.array - first).max() > 0.05


def test_the_decoder_is_all_there_is(k: Kandinsky) -> None:
    arguments: Arguments = {"prompt": A, "negative_prompt": "x", "steps": 2, "seed": 1, **SIZE}
    np.testing.assert_array_equal(k.decoder(**arguments).array, k(**arguments).array)


# Image to image

FROM_IMAGE: dict[str, Arguments] = {
    "default strength": {"prompt": A, "image": picture(64, 128), "steps": 7},
    "strong": {"prompt": A, "image": picture(64, 128), "strength": 0.8},
    "all steps": {"prompt": A, "image": picture(64, 128), "strength": 1.0},
    "truncated": {"prompt": A, "image": picture(64, 64), "strength": 0.29, "steps": 100},  # 28 steps, not 29
    "negative, count": {"prompt": A, "image": picture(128, 64), "negative_prompt": "x", "strength": 0.5, "count": 2},
    "several": {"prompt": [A, B], "image": [picture(64, 128), picture(64, 128, 1)], "strength": 0.7},
    "no guidance": {"prompt": A, "image": picture(64, 128), "strength": 0.7, "guidance_scale": 1.0},
}


@pytest.mark.parametrize("case", FROM_IMAGE)
def test_image_to_image_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    arguments = {"steps": 4, **FROM_IMAGE[case]}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(IMAGE, theirs, **arguments)
    compare_pictures(k(**arguments, noise=ours).array, expected)
    assert ours.shapes == theirs.shapes


def test_any_size_from_an_image(k: Kandinsky, oracle: Oracle) -> None:
    """diffusers has no height and width here, rounds down to multiples of 8, and fails on those that are not of 64."""
    image, arguments = picture(50, 100), {"prompt": A, "strength": 0.5, "steps": 2}
    with pytest.raises(RuntimeError):
        oracle(IMAGE, SeededNoise(), image=image, **arguments)
    resized = image.resize((128, 64), Image.Resampling.BICUBIC, reducing_gap=1)
    expected = oracle(IMAGE, SeededNoise(), image=resized, **arguments)
    sizes: list[Arguments] = [{}, SIZE, {"height": 64}]
    for size in sizes:
        compare_pictures(k(image=image, noise=SeededNoise(), **arguments, **size).array, expected)


def test_one_image_for_several_prompts(k: Kandinsky, oracle: Oracle) -> None:
    """diffusers then starts all pictures from the same noise; here each has its own, as from a list of one image."""
    arguments: Arguments = {"prompt": [A, B], "strength": 0.5, "steps": 4}
    image, theirs, ours = picture(64, 128), SeededNoise(), SeededNoise()
    oracle(IMAGE, theirs, image=image, **arguments)
    found = k(image=image, noise=ours, **arguments)
    assert (theirs.shapes[0][0], ours.shapes[0][0]) == (1, 2)
    compare_pictures(found.array, oracle(IMAGE, SeededNoise(), image=[image] * 2, **arguments))


# Schedulers and seeds

SCHEDULERS = {"ddpm": None, "ddim": "DDIMScheduler", "dpmpp-2m": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_as_diffusers(k: Kandinsky, oracle: Oracle, name: str) -> None:
    for pipeline, given in ((TEXT, SIZE), (IMAGE, {"image": picture(64, 128), "strength": 0.7})):
        arguments: Arguments = {"prompt": B, "steps": 6, **given}
        theirs, ours = SeededNoise(), SeededNoise()
        expected = oracle(pipeline, theirs, scheduler=SCHEDULERS[name], **arguments)
        compare_pictures(k(scheduler=name, noise=ours, **arguments).array, expected)
        assert ours.shapes == theirs.shapes


@pytest.mark.parametrize("given", [SIZE, {"image": [picture(64, 128)] * 2, "strength": 0.7}], ids=["text", "image"])
def test_seeds_as_diffusers(k: Kandinsky, oracle: Oracle, given: Arguments) -> None:
    name, arguments = IMAGE if "image" in given else TEXT, {"prompt": [A, B], "steps": 3, **given}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)]
    compare_pictures(k(seed=5, **arguments).array, oracle(name, generator=generators[0], **arguments))
    generators[0].manual_seed(5)
    result = k(seed=[5, 6], **arguments)
    compare_pictures(result.array, oracle(name, generator=generators, **arguments))
    assert result.seed == (5, 6)


# States in place of prompts


def states_of(oracle: Oracle, prompt: Any, negative_prompt: Any = None) -> dict[str, Any]:
    """What diffusers' `encode_prompt` gives, by kandrt's names."""
    found = oracle.pipeline(TEXT).encode_prompt(
        prompt, True, device="cpu", negative_prompt=negative_prompt, _cut_context=True
    )
    embeds, negative, mask, negative_mask = (array.numpy() for array in found)
    return dict(zip(STATES, (embeds, mask, negative, negative_mask), strict=True))


ENCODED: dict[str, tuple[Any, Any]] = {
    "one": (A, "x"),
    "longer negative": (A, B),
    "several": ([A, B, ""], ["x", A, B]),
}


@pytest.mark.parametrize("case", ENCODED)
def test_states_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    expected, found = states_of(oracle, *ENCODED[case]), vars(k.encode_prompt(*ENCODED[case]))
    for name in STATES:
        assert found[name].shape == expected[name].shape, name
        assert found[name].dtype == np.float32
        distance = np.linalg.norm(found[name] - expected[name])
        assert distance <= STATES_TOLERANCE * np.linalg.norm(expected[name]), name
    without = k.encode_prompt(ENCODED[case][0])
    np.testing.assert_array_equal(without.prompt_embeds, found["prompt_embeds"])
    assert without.negative_prompt_embeds is without.negative_attention_mask is None


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("image", [None, picture(64, 128)], ids=["text", "image"])
def test_states_for_prompts(k: Kandinsky, oracle: Oracle, image: Image.Image | None, negative: bool) -> None:
    """Padding counts in the mean that the network pools, masked or not, so it is random here."""
    states = states_of(oracle, [A, B], ["x", "a blurry thing"])
    generator = np.random.default_rng(5)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        states[name] = states[name] + 0.1 * generator.standard_normal(states[name].shape, np.float32)
    given = {name: value for name, value in states.items() if negative or not name.startswith("negative")}
    arguments: Arguments = {"steps": 3, **(SIZE if image is None else {"image": [image] * 2, "strength": 0.7})}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(TEXT if image is None else IMAGE, theirs, **given, **arguments)
    compare_pictures(k(noise=ours, **given, **arguments).array, expected)
    assert ours.shapes == theirs.shapes


def test_states_of_prompts_are_the_prompts(k: Kandinsky) -> None:
    arguments: Arguments = {"steps": 2, "seed": 1, "count": 2, **SIZE}
    for texts in (([A, B],), ([A, B], "x")):
        expected = k(*texts[:1], negative_prompt=texts[1] if len(texts) > 1 else None, **arguments)
        found = k(**vars(k.encode_prompt(*texts)), **arguments)
        np.testing.assert_array_equal(found.array, expected.array)
    one = k.encode_prompt(A)
    k(**vars(one), guidance_scale=1.0, **arguments)


# Where diffusers fails or does not do what it promises


def test_masks_follow_their_prompts(k: Kandinsky, oracle: Oracle) -> None:
    """With several prompts and count, diffusers repeats states in succession and masks in turn."""
    prompts, negatives, rows = [A, B], ["x", "a blurry thing"], 4
    arguments: Arguments = {"steps": 3, **SIZE}
    found = k(prompts, negative_prompt=negatives, count=2, noise=SeededNoise(), **arguments).array
    for row in range(rows):
        # with both prompts, since states are cut to the longest
        texts = {"prompt": [prompts[row // 2], B], "negative_prompt": [negatives[row // 2], "x"]}
        noise = row_of(SeededNoise(), row, rows)
        alone = oracle(
            TEXT, lambda shape, noise=noise: np.repeat(noise((1, *shape[1:])), 2, axis=0), **texts, **arguments
        )
        compare_pictures(found[row : row + 1], alone[:1])
    theirs = oracle(TEXT, SeededNoise(), prompt=prompts, negative_prompt=negatives, count=2, **arguments)
    compare_pictures(found[::3], theirs[::3])
    assert np.abs(found[1:3] - theirs[1:3]).max() > 0.01


def test_texts_and_states_do_not_mix(bundle_3: Path, oracle: Oracle) -> None:
    """diffusers reads the negative prompt and cuts it to the length of the states."""
    states = {name: value for name, value in states_of(oracle, A).items() if not name.startswith("negative")}
    arguments: Arguments = {**states, "negative_prompt": B, "steps": 1, **SIZE}
    assert oracle(TEXT, SeededNoise(), **arguments).shape == (1, 64, 128, 3)
    with pytest.raises(InputError, match="negative_prompt: with prompt_embeds, give negative_prompt_embeds"):
        without_networks(bundle_3)(**arguments)


def test_a_longer_prompt_beside_it(k: Kandinsky, oracle: Oracle) -> None:
    """Kept from diffusers: the padding that a longer prompt makes of a shorter one counts in its pooled mean."""
    arguments: Arguments = {"latents": LATENTS[:1], "steps": 4, **SIZE}
    both: Arguments = {**arguments, "prompt": [A, B], "latents": np.repeat(LATENTS[:1], 2, axis=0)}
    for make in (lambda **given: oracle(TEXT, SeededNoise(), **given), lambda **given: k(seed=1, **given).array):
        assert np.abs(make(**both)[0] - make(prompt=A, **arguments)[0]).max() > 0.05


def test_one_negative_prompt_for_several(k: Kandinsky, oracle: Oracle) -> None:
    arguments: Arguments = {"prompt": [A, B], "steps": 2, **SIZE}
    with pytest.raises(TypeError, match="should be the same type"):
        oracle(TEXT, SeededNoise(), negative_prompt="x", **arguments)
    expected = oracle(TEXT, SeededNoise(), negative_prompt=["x", "x"], **arguments)
    compare_pictures(k(negative_prompt="x", noise=SeededNoise(), **arguments).array, expected)


# Defaults, what stays open, errors


@pytest.mark.parametrize(("name", "given"), [(TEXT, {}), (IMAGE, {"image": picture(64, 64)})])
def test_defaults_are_diffusers(bundle_3: Path, name: str, given: Arguments) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
    default = {key: parameter.default for key, parameter in parameters.items()}
    plan = make_plan(open_bundle(bundle_3), Request(prompt=A, **given))
    # diffusers' loop: (w + 1) positive - w negative
    assert plan.scale == default["guidance_scale"] + 1
    steps, strength = default["num_inference_steps"], default.get("strength", 1.0)
    assert len(plan.timesteps) == int(steps * strength)
    assert len(plan.conditions) == default["num_images_per_prompt"]
    if not given:
        assert (plan.height, plan.width) == (default["height"], default["width"])


def test_memory_stage(bundle_3: Path, k: Kandinsky) -> None:
    arguments: Arguments = {"negative_prompt": "x", "image": picture(64, 128), "strength": 1.0, "steps": 2, "seed": 4}
    open_during: list[tuple[str, ...]] = []
    with load(bundle_3, threads=1, memory="stage") as staged:
        found = staged(A, callback=lambda *_: open_during.append(staged.opened), **arguments)
        assert staged.opened == ()
        staged.encode_prompt(A)
        assert staged.opened == ()
    assert open_during == [("decoder_step",)] * 2
    np.testing.assert_array_equal(found.array, k(A, **arguments).array)


def test_callback(k: Kandinsky) -> None:
    seen: list[tuple[Any, ...]] = []
    k([A, B], steps=3, callback=lambda *args: seen.append((*args[:3], args[3].shape)), **SIZE)
    assert seen == [("decoder", done, 3, (2, 4, 8, 16)) for done in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "message"),
    [("prompt_encoder", "prompt encoder: the network's output holds NaN"), ("decoder_step", "decoder: step 1 of 3")],
)
def test_nan_names_the_network(bundle_3: Path, name: str, message: str) -> None:
    broken = Broken(component(bundle_3, name))
    with load(bundle_3, sessions={name: broken}, threads=1) as k, pytest.raises(NumericalError, match=message):
        k(A, steps=3, **SIZE)


ONE = picture(64, 64)
STATE, ONES = np.zeros((1, 5, 72), np.float32), np.ones((1, 5), np.float32)
BAD: dict[str, tuple[Arguments, str]] = {
    "nothing": ({"prompt": None}, "prompt: Kandinsky 3's decoder needs one, or prompt_embeds with their attention_m"),
    "no prompts": ({"prompt": []}, "prompt: expected at least one text"),
    "prompt": ({"prompt": 3}, "prompt: expected text or a list of texts, found int"),
    "negatives": ({"negative_prompt": ["x", "y"]}, "negative_prompt: expected one, or one for each of 1 "),
    "mask": ({"mask": ONE, "image": ONE}, r"Kandinsky 3 has no inpainting; .* 2\.2 does \(kandinsky-2-2-decoder-i"),
    "hint": ({"hint": ONE}, r"Kandinsky 3 has no ControlNet; Kandinsky 2\.2 does \(kandinsky-2-2-controlnet-depth\)"),
    "prior": ({"prior_steps": 5, "prior_guidance_scale": 2.0}, "prior_steps and prior_guidance_scale: .* no prior"),
    "both": (
        {"prompt_embeds": STATE, "attention_mask": ONES}, "prompt and prompt_embeds were both given; give one of them",
    ),
    "both negatives": (
        {"negative_prompt": "x", "negative_prompt_embeds": STATE, "negative_attention_mask": ONES},
        "negative_prompt and negative_prompt_embeds were both given",
    ),
    "negative states of a prompt": (
        {"negative_prompt_embeds": STATE, "negative_attention_mask": ONES},
        "negative_prompt_embeds and negative_attention_mask: only with prompt_embeds in place of the prompt",
    ),
    "mask of a prompt": ({"attention_mask": ONES}, "attention_mask: only with prompt_embeds in place of the prompt"),
    "scale": ({"guidance_scale": -1}, "guidance_scale: expected a number of 0 or more"),
    "steps": ({"steps": 0}, "steps: expected an int of 1 to 1000"),
    "images": ({"image": [ONE] * 3}, "image: expected one picture, or as many as share 1 prompts equally, found 3"),
    "strength": ({"strength": 0.5}, "strength: only with image="),
    "latents": ({"latents": LATENTS, **SIZE}, r"latents: expected finite floats \[1, 4, 8, 16\]"),
    "seeds": ({"seed": [1, 2]}, "seed: expected one, or one for each of 1 pictures, found 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_run_no_network(bundle_3: Path, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises((InputError, BundleError), match=message):
        without_networks(bundle_3)(**{"prompt": A, **arguments})


def test_steps_see_one_number_of_tokens(bundle_3: Path) -> None:
    """Whatever a prompt's length, so that an engine has one shape of them; the context sees the prompt's own."""
    k, spies = spied(bundle_3, "decoder_context", "decoder_step")
    with k:
        for prompt in ("a fox", "a red fox in the snow, soft morning light"):
            k(prompt, steps=1, height=64, width=64, seed=0)
    seen = [call["text_states"].shape[1] for call in spies["decoder_context"].calls]
    assert 2 < seen[0] < seen[1] < 128
    assert [call["text_kv"].shape[1] for call in spies["decoder_step"].calls] == [128, 128]
    assert [call["attention_bias"].shape[3] for call in spies["decoder_step"].calls] == [128, 128]


def test_there_is_no_prior(bundle_3: Path) -> None:
    k = without_networks(bundle_3)
    with pytest.raises(BundleError, match=r"Kandinsky 3 has no prior; Kandinsky 2\.1 does \(kandinsky-2-1-prior\)"):
        _ = k.prior
    with pytest.raises(InputError, match="embeds: Kandinsky 3's decoder takes a prompt and no image embeddings"):
        k.decoder(Embeds(np.zeros((1, 72), np.float32)), prompt=A)
