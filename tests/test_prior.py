"""The prior in all its modes against diffusers, on the same weights and the same noise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kandrt.engines.errors import InputError, NumericalError
from kandrt.runtime import Embeds, Kandinsky, load, prior
from kandrt.runtime.tokenizer import PromptTruncatedWarning

from .oracle import Broken, Oracle, SeededNoise, compare_embeds, component, picture, spied, without_networks

PRIOR, EMB2EMB = "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"
Arguments = dict[str, Any]


@pytest.fixture(scope="module")
def k(bundle: Path) -> Iterator[Kandinsky]:
    with load(bundle, threads=1) as k:
        yield k


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle(checkpoints)


LATENTS = np.random.default_rng(3).standard_normal((4, 32), np.float32)

TEXT: dict[str, Arguments] = {
    "one": {"prompt": "a red cat"},
    "several": {"prompt": ["a red cat", "a dog on a mat", ""]},
    "count": {"prompt": ["a red cat", "a dog"], "count": 3},
    "no guidance": {"prompt": ["a red cat", "a dog"], "count": 2, "guidance_scale": 1.0},
    "scale 0": {"prompt": "a red cat", "guidance_scale": 0.0},
    "weak guidance": {"prompt": "a red cat", "guidance_scale": 1.5},
    "negative": {"prompt": "a red cat", "negative_prompt": "blurry, ugly"},
    "negative empty": {"prompt": "a red cat", "negative_prompt": ""},
    "negatives": {"prompt": ["a red cat", "a dog"], "negative_prompt": ["x", "ugly thing"]},
    "negatives, count": {"prompt": ["a red cat", "a dog"], "negative_prompt": ["x", "ugly"], "count": 2},
    "negative, no guidance": {"prompt": "a red cat", "negative_prompt": "ugly", "guidance_scale": 1.0},
    "two steps": {"prompt": "a red cat", "steps": 2},
    "latents": {"prompt": ["a red cat", "a dog"], "count": 2, "latents": LATENTS},
    "latents, negative": {"prompt": "a", "negative_prompt": "b", "count": 2, "latents": LATENTS},
}


@pytest.mark.parametrize("case", TEXT)
def test_texts_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    arguments = {"steps": 5, **TEXT[case]}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(PRIOR, theirs, **arguments)
    compare_embeds(k.prior(**arguments, noise=ours), expected)
    assert ours.shapes == theirs.shapes


FROM_IMAGE: dict[str, Arguments] = {
    "default strength": {"prompt": "a red cat", "image": picture(80, 120)},
    "strong": {"prompt": "a red cat", "image": picture(300, 200), "strength": 0.85},
    "all steps": {"prompt": "a red cat", "image": picture(80, 120), "strength": 1.0},
    "count": {"prompt": "a red cat", "image": picture(80, 120), "strength": 0.5, "count": 2},
    "an image a prompt": {"prompt": ["a", "b"], "image": [picture(80, 120), picture(90, 60, 1)], "count": 2},
    "one image": {"prompt": ["a", "b"], "image": picture(80, 120), "strength": 0.7},
    "negative": {"prompt": "a", "negative_prompt": "ugly", "image": picture(80, 120), "strength": 0.6, "count": 2},
    "negatives": {
        "prompt": ["a", "b"], "negative_prompt": ["ugly", "x"], "image": [picture(80, 120), picture(90, 60, 1)],
    },
    "no guidance": {"prompt": "a", "image": picture(80, 120), "strength": 0.6, "guidance_scale": 1.0},
    "embedding": {"prompt": ["a", "b"], "image": LATENTS[:2], "strength": 0.5, "count": 2},
}  # fmt: skip


@pytest.mark.parametrize("case", FROM_IMAGE)
def test_from_an_image_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    arguments = {"steps": 6, **FROM_IMAGE[case]}
    theirs, ours = SeededNoise(), SeededNoise()
    image = arguments["image"]
    as_tensor = torch.from_numpy(image) if isinstance(image, np.ndarray) else image
    expected = oracle(EMB2EMB, theirs, **{**arguments, "image": as_tensor})
    compare_embeds(k.prior(**arguments, noise=ours), expected)
    assert ours.shapes == theirs.shapes


INTERPOLATE: dict[str, Arguments] = {
    "texts": {"images_and_prompts": ["a red cat", "a dog"], "weights": [0.3, 0.7]},
    "one text": {"images_and_prompts": ["a red cat"], "weights": [1.0]},
    "text and image": {"images_and_prompts": ["a red cat", picture(80, 120)], "weights": [0.4, 0.6]},
    "image and text": {"images_and_prompts": [picture(80, 120), "a red cat"], "weights": [0.4, 0.6]},
    "images": {"images_and_prompts": [picture(80, 120), picture(90, 60, 1)], "weights": [0.5, 0.5]},
    "not a sum of 1": {"images_and_prompts": ["a red cat", picture(80, 120), "a dog"], "weights": [0.4, 2, -0.5]},
    "count": {"images_and_prompts": ["a red cat", picture(80, 120)], "weights": [0.4, 0.6], "count": 3},
    "no guidance": {"images_and_prompts": ["a red cat", "a dog"], "weights": [0.3, 0.7], "guidance_scale": 1.0},
    "negative": {"images_and_prompts": ["a", "b"], "weights": [0.3, 0.7], "negative_prompt": "ugly", "count": 2},
    "prior negative": {"images_and_prompts": ["a", "b"], "weights": [0.3, 0.7], "negative_prior_prompt": "ugly"},
    "prior negative, images": {
        "images_and_prompts": [picture(80, 120)], "weights": [1.0], "negative_prior_prompt": "ugly", "count": 2,
    },
    "both negatives": {
        "images_and_prompts": ["a", picture(80, 120)], "weights": [0.3, 0.7], "negative_prompt": "x",
        "negative_prior_prompt": "ugly",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", INTERPOLATE)
def test_interpolate_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    arguments = {"steps": 4, **INTERPOLATE[case]}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(PRIOR, theirs, method="interpolate", **arguments)
    compare_embeds(k.prior.interpolate(**arguments, noise=ours), expected)
    assert ours.shapes == theirs.shapes


def test_interpolate_takes_embeddings(k: Kandinsky) -> None:
    image = picture(80, 120)
    embedding = k.prior.embed(image)
    by_image = k.prior.interpolate(["a", image], [0.5, 0.5], steps=2, seed=1)
    by_embedding = k.prior.interpolate(["a", embedding], [0.5, 0.5], steps=2, seed=1)
    np.testing.assert_array_equal(by_image.image_embeds, by_embedding.image_embeds)
    rows = k.prior.interpolate([np.concatenate([embedding, 2 * embedding])], [0.5], steps=2, count=2, seed=1)
    np.testing.assert_array_equal(rows.image_embeds, np.concatenate([0.5 * embedding, embedding]))


def test_embed_as_diffusers(k: Kandinsky, oracle: Oracle) -> None:
    images = [picture(80, 120), picture(301, 203, 1)]
    expected = oracle.pipeline(EMB2EMB)._encode_image(images, "cpu", 1).detach().numpy()
    np.testing.assert_allclose(k.prior.embed(images), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Seeds


def generators(*seeds: int) -> Any:
    made = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


SEEDED: dict[str, tuple[tuple[int, ...], Arguments]] = {
    "one": ((5,), {"prompt": "a red cat", "count": 2}),
    "negative": ((5,), {"prompt": ["a", "b"], "negative_prompt": ["c", "d"]}),
    "a seed an embedding": ((5, 6, 0, 2**40 + 1), {"prompt": ["a red cat", "a dog"], "count": 2}),
    "a seed a row": ((5, 6, 7, 8), {"prompt": ["a", "b"], "negative_prompt": ["c", "d"]}),
}


@pytest.mark.parametrize("case", SEEDED)
def test_seeds_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    seeds, arguments = SEEDED[case]
    expected = oracle(PRIOR, **arguments, steps=4, generator=generators(*seeds))
    # 1e-5 relative holds although the streams agree to the last bit of log, sin and cos only
    compare_embeds(k.prior(**arguments, steps=4, seed=list(seeds)), expected)
    if len(seeds) == 1:
        compare_embeds(k.prior(**arguments, steps=4, seed=seeds[0]), expected)


def row_of_embeds(embeds: Embeds, row: int) -> Embeds:
    assert embeds.negative_image_embeds is not None
    return Embeds(embeds.image_embeds[row : row + 1], embeds.negative_image_embeds[row : row + 1])


def test_a_seed_gives_the_same_beside_others(k: Kandinsky) -> None:
    """With a negative prompt too, where diffusers asks for a generator a row."""
    settings: Arguments = {"negative_prompt": "ugly", "steps": 3}
    both = k.prior(["a red cat", "a dog"], seed=[5, 6], **settings)
    for row, (prompt, seed) in enumerate((("a red cat", 5), ("a dog", 6))):
        compare_embeds(row_of_embeds(both, row), k.prior(prompt, seed=seed, **settings))


def test_interpolate_with_a_seed_a_row(k: Kandinsky) -> None:
    settings: Arguments = {"weights": [0.3, 0.7], "negative_prior_prompt": "ugly", "steps": 2}
    both = k.prior.interpolate(["a", "b"], seed=[5, 6], count=2, **settings)
    alone = k.prior.interpolate(["a", "b"], seed=6, **settings)
    compare_embeds(row_of_embeds(both, 1), alone)


# Where diffusers fails or does not do what it promises


def test_one_step(k: Kandinsky, oracle: Oracle) -> None:
    """diffusers divides by zero. One step goes to the network's clean sample at the last trained timestep."""
    with pytest.raises(ZeroDivisionError):
        oracle(PRIOR, SeededNoise(), prompt="a red cat", steps=1)
    pipe, seen = oracle.pipeline(PRIOR), []
    hook = pipe.prior.register_forward_hook(lambda _module, _inputs, out: seen.append(out.predicted_image_embedding))
    try:
        oracle(PRIOR, SeededNoise(), prompt="a red cat", steps=2)  # timesteps 999 and 0
    finally:
        hook.remove()
    negative, positive = seen[0]
    clean = (negative + 4.0 * (positive - negative)).clamp(-10, 10)
    expected = pipe.prior.post_process_latents(clean[None]).detach().numpy()
    found = k.prior("a red cat", steps=1, noise=SeededNoise()).image_embeds
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_strength_that_leaves_no_step(bundle: Path, oracle: Oracle) -> None:
    pipe = oracle.pipeline(EMB2EMB)
    assert pipe("a", picture(64, 64), strength=0.3, num_inference_steps=2).image_embeds.shape == (0, 32)
    with pytest.raises(InputError, match=r"strength 0\.3 of 2 steps leaves no step"):
        without_networks(bundle).prior("a", image=picture(64, 64), strength=0.3, steps=2)


def test_one_negative_prompt_for_several(k: Kandinsky, oracle: Oracle) -> None:
    with pytest.raises(ValueError, match="has batch size 2, but `prompt`"):
        oracle(PRIOR, SeededNoise(), prompt=["a", "b"], negative_prompt="ugly", steps=2)
    expected = oracle(PRIOR, SeededNoise(), prompt=["a", "b"], negative_prompt=["ugly"] * 2, steps=2)
    compare_embeds(k.prior(["a", "b"], negative_prompt="ugly", steps=2, noise=SeededNoise()), expected)


def test_interpolate_of_the_image_prior(oracle: Oracle) -> None:
    """Why `interpolate` follows KandinskyV22PriorPipeline: the other class's fails for texts and is not seeded."""
    pipe = oracle.pipeline(EMB2EMB)
    with pytest.raises(TypeError, match="latents"):
        pipe.interpolate(["a"], [1.0], num_inference_steps=2)
    first, second = (pipe.interpolate([picture(64, 64)], [1.0], generator=generators(3)) for _ in range(2))
    assert not torch.equal(first.negative_image_embeds, second.negative_image_embeds)


# Warnings, caching, errors


def test_a_long_prompt_is_cut_with_a_warning(k: Kandinsky, oracle: Oracle) -> None:
    prompt = "a red cat " * 25 + "and the end"
    with pytest.warns(PromptTruncatedWarning, match="and the end") as caught:
        found = k.prior(prompt, steps=2, count=2, noise=SeededNoise())
    assert len(caught) == 1
    compare_embeds(found, oracle(PRIOR, SeededNoise(), prompt=prompt, steps=2, count=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        k.prior("a red cat", steps=2)


def test_the_empty_prompt_is_encoded_once(bundle: Path) -> None:
    k, spies = spied(bundle, "text_encoder", "prior_context")
    with k:
        first = k.prior("a red cat", steps=2, seed=1)
        k.prior(["a dog", "a mat"], steps=3, count=2, seed=1)
        k.prior("a red cat", negative_prompt="ugly", steps=2, seed=1)
        again = k.prior("a red cat", steps=2, seed=1)
    rows = [len(call["input_ids"]) for call in spies["text_encoder"].calls]
    # the empty prompt and one; two different ones; one and a negative one; one
    assert rows == [2, 2, 2, 1]
    assert [len(call["text_embeds"]) for call in spies["prior_context"].calls] == rows
    compare_embeds(again, first)


def test_a_prompt_that_is_empty(k: Kandinsky, oracle: Oracle) -> None:
    for prompt in ("", ["", "a"]):
        expected = oracle(PRIOR, SeededNoise(), prompt=prompt, steps=3)
        compare_embeds(k.prior(prompt, steps=3, noise=SeededNoise()), expected)


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("prior_step", 1, r"prior: step 2 of 3 \(timestep 500\): the network's output holds NaN"),
        ("prior_context", 0, r"prior: step 1 of 3 \(timestep 999\)"),
        ("text_encoder", 0, "text encoder: the network's output holds NaN"),
        ("image_encoder", 0, "image encoder: the network's output holds NaN"),
    ],
)
def test_nan_names_the_network(bundle: Path, name: str, call: int, message: str) -> None:
    broken = Broken(component(bundle, name), call)
    with load(bundle, sessions={name: broken}) as k, pytest.raises(NumericalError, match=message):
        k.prior("a", image=picture(64, 64), strength=1.0, steps=3)


def test_nan_that_no_step_reports(k: Kandinsky, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the steps are not checked, the result is."""
    monkeypatch.setattr(prior, "denoise", lambda _step, _scheduler, x, *_, **__: iter([x * np.float32("nan")]))
    with pytest.raises(NumericalError, match="prior: the network's output holds NaN"):
        k.prior("a", steps=2)


def test_callback(k: Kandinsky) -> None:
    seen: list[tuple[Any, ...]] = []
    k.prior("a", count=2, steps=3, callback=lambda *args: seen.append((*args[:3], args[3].shape)))
    assert seen == [("prior", done, 3, (2, 32)) for done in (1, 2, 3)]
    seen.clear()
    k.prior("a", image=picture(64, 64), strength=0.5, steps=4, callback=lambda *args: seen.append(args[:3]))
    assert seen == [("prior", 1, 2), ("prior", 2, 2)]


def test_arguments_are_left_alone(k: Kandinsky) -> None:
    latents, image = LATENTS[:1].copy(), LATENTS[1:2].copy()
    k.prior("a", latents=latents, steps=2)
    k.prior("a", image=image, strength=1.0, steps=2)
    np.testing.assert_array_equal(np.concatenate([latents, image]), LATENTS[:2])


IMAGE = picture(64, 64)
BAD: dict[str, tuple[Arguments, str]] = {
    "no text": ({"prompt": 3}, "prompt: expected text or a list of texts, found int"),
    "no texts": ({"prompt": []}, "prompt: expected at least one text, found an empty list"),
    "not all texts": ({"prompt": ["a", None]}, "item 1 is NoneType"),
    "surrogate": ({"prompt": "\ud800"}, "surrogate"),
    "negative": ({"negative_prompt": 1.5}, "negative_prompt: expected text"),
    "negatives": ({"prompt": ["a", "b"], "negative_prompt": ["x"] * 3}, "negative_prompt: expected one.* 2 prompts.*3"),
    "steps 0": ({"steps": 0}, "steps: expected an int of 1 to 1000"),
    "steps": ({"steps": 2.5}, "steps: expected an int"),
    "too many steps": ({"steps": 1001}, "steps: expected an int of 1 to 1000"),
    "scale": ({"guidance_scale": -1}, "guidance_scale: expected a number of 0 or more"),
    "scale nan": ({"guidance_scale": float("nan")}, "guidance_scale"),
    "scale inf": ({"guidance_scale": float("inf")}, "guidance_scale"),
    "scale text": ({"guidance_scale": "4"}, "guidance_scale"),
    "scale bool": ({"guidance_scale": True}, "guidance_scale"),
    "count 0": ({"count": 0}, "count: expected a whole number of 1 or more, found 0"),
    "count": ({"count": 1.0}, r"count: .* found 1\.0"),
    "strength": ({"strength": 0.5}, "strength: only with image="),
    "strength 0": ({"image": IMAGE, "strength": 0}, "strength: expected a number above 0"),
    "strength 2": ({"image": IMAGE, "strength": 2}, "strength: expected a number above 0 and up to 1"),
    "strength text": ({"image": IMAGE, "strength": "0.5"}, "strength: expected a number"),
    "no images": ({"image": []}, "image: expected a picture or a list of them, found an empty list"),
    "no image": ({"image": 3}, "image: expected a picture, a path or an embedding, found int"),
    "missing file": ({"image": "/no/such/file.png"}, "no such file"),
    "images": ({"prompt": ["a", "b", "c"], "image": [IMAGE] * 2}, "cannot spread 2 images over 3 prompts"),
    "nan image": ({"image": np.full((1, 32), np.nan, np.float32)}, "image: expected finite values"),
    "latents shape": ({"latents": LATENTS}, r"latents: expected finite floats \[1, 32\], found float32\[4, 32\]"),
    "latents type": ({"latents": np.zeros((1, 32), np.int64)}, "latents: expected finite floats"),
    "latents nan": ({"latents": np.full((1, 32), np.nan)}, "latents: expected finite floats"),
    "latents, image": ({"latents": LATENTS[:1], "image": IMAGE}, "latents and image were both given"),
    "seed": ({"seed": -1}, r"seed: expected an int of 0 to 2\*\*64 - 1"),
    "seeds": ({"seed": [1, 2, 3]}, "seed: expected one, or one for each of 1 pictures, found 3"),
    "seeds, negative": ({"prompt": ["a", "b"], "negative_prompt": "x", "seed": [1, 2, 3]}, "each of 2 pictures"),
    "no seeds": ({"seed": []}, "seed: .*empty list"),
    "seeds, image": ({"image": IMAGE, "seed": [1, 2, 3]}, "seed: expected one"),
    "seed and noise": ({"seed": 1, "noise": SeededNoise()}, "seed and noise were both given"),
    "noise": ({"noise": 3}, "noise: expected a callable"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_run_no_network(bundle: Path, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        without_networks(bundle).prior(**{"prompt": "a", **arguments})


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (lambda shape: np.zeros((1, 3), np.float32), r"noise\(1, 32\): expected floats of that shape"),
        (lambda shape: np.full(shape, np.inf), r"noise\(1, 32\): 32 of 32 values are not finite"),
        (lambda shape: "text", "noise"),
    ],
)
def test_noise_that_cannot_be_used(bundle: Path, noise: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        without_networks(bundle).prior("a", noise=noise)


BAD_INTERPOLATION: dict[str, tuple[Arguments, str]] = {
    "lengths": ({"weights": [1.0]}, "expected one weight an item and one item or more, found 2 items and 1 weights"),
    "nothing": ({"images_and_prompts": [], "weights": []}, "found 0 items and 0 weights"),
    "text": ({"images_and_prompts": "ab"}, "expected a list of texts and pictures, found str"),
    "no list": ({"images_and_prompts": 3}, "expected a list of texts and pictures, found int"),
    "item": ({"images_and_prompts": ["a", 3]}, "image: expected a picture, a path or an embedding, found int"),
    "missing file": ({"images_and_prompts": ["a", Path("no.png")]}, "no such file"),
    "weight": ({"weights": [1.0, "2"]}, "interpolate: expected finite weights"),
    "nan": ({"weights": [1.0, float("nan")]}, "interpolate: expected finite weights"),
    "no weights": ({"weights": None}, "interpolate: expected a list of weights, found NoneType"),
    "rows": ({"images_and_prompts": ["a", LATENTS], "count": 2}, "expected embeddings of 1 or 2 rows, found 4"),
    "negative": ({"negative_prompt": ["x"]}, "negative_prompt: .*item 0 is list"),
    "prior negative": ({"negative_prior_prompt": 3}, "negative_prior_prompt: .*item 0 is int"),
    "steps": ({"steps": 0}, "steps: expected an int"),
    "count": ({"count": "2"}, "count: expected a whole number"),
    "scale": ({"guidance_scale": -2}, "guidance_scale: expected"),
    "seeds": ({"seed": [1, 2]}, "seed: expected one, or one for each of 1 pictures, found 2"),
    "seed and noise": ({"seed": 1, "noise": SeededNoise()}, "seed and noise were both given"),
}


@pytest.mark.parametrize("case", BAD_INTERPOLATION)
def test_bad_interpolation_runs_no_network(bundle: Path, case: str) -> None:
    arguments, message = BAD_INTERPOLATION[case]
    with pytest.raises(InputError, match=message):
        without_networks(bundle).prior.interpolate(
            **{"images_and_prompts": ["a", IMAGE], "weights": [0.5, 0.5], **arguments}
        )
