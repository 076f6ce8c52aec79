"""Guidance in a part of the steps: diffusers told so step by step, and what the network is asked with a fake one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kandrt.engines.errors import InputError
from kandrt.runtime import Embeds, Kandinsky, load
from kandrt.runtime.sampling import denoise, guided_steps
from kandrt.runtime.schedulers import scheduler_from_config
from kandrt.scripts.cli import app

from .oracle import Oracle, SeededNoise, Spy, box, compare_pictures, component, picture, spied, without_networks
from .test_sampling import CONFIGS, B, C, H, Network, W, arrays, inpaint

Arguments = dict[str, Any]
SIZE: Arguments = {"height": 64, "width": 128}
INTERVALS = [(0.0, 0.5), (0.0, 0.01), (0.25, 0.75), (0.5, 1.0), (0.8, 1.0), (1 / 3, 2 / 3)]


@pytest.fixture(scope="module")
def k(bundle: Path) -> Iterator[Kandinsky]:
    with load(bundle, threads=1) as k:
        yield k


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle(checkpoints)


# Against diffusers, whose pipelines let a callback change the scale and the tensors between two steps


class Switched:
    """A `callback_on_step_end` that turns guidance on and off; its first step has the scale of the call."""

    def __init__(self, guided: list[bool], scale: float, negative: dict[str, torch.Tensor], rows: int) -> None:
        self.guided, self.scale, self.negative, self.rows = guided, scale, negative, rows

    def __call__(self, pipe: Any, step: int, _: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.guided[step] == self.guided[min(step + 1, len(self.guided) - 1)]:
            return {}
        guided = self.guided[step + 1]
        pipe._guidance_scale = self.scale if guided else 1.0
        # positive rows are the last; of what has no negative form, such as a mask, both halves are the same
        positive = {name: tensor[-self.rows :] for name, tensor in tensors.items()}
        if not guided:
            return positive
        return {name: torch.cat([self.negative.get(name, tensor), tensor]) for name, tensor in positive.items()}


MODES: dict[str, tuple[str, tuple[str, ...], Arguments]] = {
    "text": ("KandinskyV22Pipeline", ("image_embeds",), {}),
    "image": ("KandinskyV22Img2ImgPipeline", ("image_embeds",), {"image": [picture(64, 64)] * 2, "strength": 0.7}),
    "inpaint": (
        "KandinskyV22InpaintPipeline",
        ("image_embeds", "masked_image", "mask_image"),
        {"image": [picture(64, 64)] * 2, "mask": [box(64, 64, 0.2, 0.4, 0.7, 0.9)] * 2},
    ),
}
SCHEDULERS = {"ddpm": None, "ddim": "DDIMScheduler", "dpmpp-2m": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize("interval", INTERVALS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_pictures_as_diffusers(k: Kandinsky, oracle: Oracle, scheduler: str, mode: str, interval: Any) -> None:
    pipeline, names, given = MODES[mode]
    embeds, steps = oracle.embeds("a", "b"), 8
    taken = int(steps * given.get("strength", 1.0))
    guided = [interval[0] <= step / taken < interval[1] for step in range(taken)]
    arguments: Arguments = {"embeds": embeds, "steps": steps, "height": 64, "width": 64, **given}
    negative = {"image_embeds": torch.from_numpy(embeds.negative_image_embeds)}
    expected = oracle(
        pipeline, SeededNoise(), scheduler=SCHEDULERS[scheduler], guidance_scale=4.0 if guided[0] else 1.0,
        callback_on_step_end=Switched(guided, 4.0, negative, 2), callback_on_step_end_tensor_inputs=list(names),
        **arguments,
    )  # fmt: skip
    found = k.decoder(guidance_interval=interval, scheduler=scheduler, noise=SeededNoise(), **arguments)
    compare_pictures(found.array, expected)


@pytest.mark.parametrize("end", [0.4, 0.8])
def test_kandinsky_3_as_diffusers(bundle_3: Path, oracle: Oracle, end: float) -> None:
    """Its prompts have keys, values and a mask of their own, and its scale is one less than ours."""
    arguments: Arguments = {"prompt": ["a red cat", "a dog on a mat"], "steps": 5, "height": 64, "width": 64}
    guided = [step / 5 < end for step in range(5)]
    expected = oracle(
        "Kandinsky3Pipeline", SeededNoise(), guidance_scale=3.0,
        callback_on_step_end=Switched(guided, 3.0, {}, 2),
        callback_on_step_end_tensor_inputs=["prompt_embeds", "attention_mask"],
        **arguments,
    )  # fmt: skip
    with load(bundle_3, threads=1) as k:
        found = k(guidance_interval=(0, end), guidance_scale=3.0, noise=SeededNoise(), **arguments)
    compare_pictures(found.array, expected)


# What is asked of the network


class Rows(Network):
    """A fake network that notes the rows of its calls."""

    def __init__(self, xp: Any, channels: int = 2 * C) -> None:
        super().__init__(xp, channels)
        self.rows: list[int] = []

    def __call__(self, **given: Any) -> dict[str, Any]:
        (rows,) = {array.shape[0] for array in given.values()}
        self.rows.append(rows)
        return super().__call__(**given)


def run(
    xp: Any, config: str, steps: int, interval: Any, *, scale: float | None = 4.0, keep: bool = False,
    per_sample: bool = True,
) -> tuple[list[Any], list[int]]:  # fmt: skip
    """Samples after each step, and the rows of each call."""
    scheduler = scheduler_from_config(CONFIGS[config])
    embedding, context = arrays(xp, B if scale is None else 2 * B, steps, per_sample)
    x = np.random.default_rng(8).standard_normal((B, C, H, W), np.float32)
    network = Rows(xp)
    loop = denoise(
        network, scheduler, x, scheduler.timesteps(steps), embedding, context,
        scale=scale, noise=SeededNoise(), interval=interval, inpaint=inpaint(xp) if keep else None,
    )  # fmt: skip
    return list(loop), network.rows


def restated(config: str, steps: int, interval: Any, keep: bool, per_sample: bool) -> list[Any]:
    """Every step with guidance, of which the positive half is taken where it is off: twice the work, no interval."""
    scheduler: Any = scheduler_from_config(CONFIGS[config])
    timesteps: list[int] = scheduler.timesteps(steps).tolist()
    embedding, context = arrays(np, 2 * B, steps, per_sample)
    x: Any = np.random.default_rng(8).standard_normal((B, C, H, W), np.float32)
    network, kept, noise, history, result = Network(np), inpaint(np), SeededNoise(), None, []
    more = {"concat_latents": np.concatenate([np.concatenate([kept.latents * kept.mask, kept.mask], axis=1)] * 2)}
    for i, (t, t_prev) in enumerate(zip(timesteps, [*timesteps[1:], -1], strict=True)):
        row = embedding[i] if per_sample else np.stack([embedding[i]] * 2 * B)
        out = network(sample=np.concatenate([x, x]), embedding=row, **context, **(more if keep else {}))["prediction"]
        negative, eps, variance = out[:B, :C], out[B:, :C], out[B:, C:]
        if interval[0] <= i / steps < interval[1]:
            eps = negative + np.float32(4) * (eps - negative)
        both = np.concatenate([eps, variance], axis=1) if config == "learned" else eps
        x, history = scheduler.step(both, x, t, t_prev, noise, history)
        if keep:
            known = kept.latents if t_prev < 0 else scheduler.add_noise(kept.latents, kept.noise, t_prev)
            x = kept.mask * known + (1 - kept.mask) * x
        result.append(x)
    return result


@pytest.mark.parametrize("keep", [False, True], ids=["", "inpaint"])
@pytest.mark.parametrize("config", ["ddpm", "learned", "ddim", "dpmpp-2m"])
def test_any_interval(config: str, keep: bool) -> None:
    """Rows are halved outside of it, and the rest is as if they were not; with arrays of a strict library too."""
    generator = np.random.default_rng([len(config), keep])
    for _ in range(20):
        steps = int(generator.integers(1, 9))
        start, end = np.sort(generator.choice(np.linspace(0, 1, 13), 2, replace=False)).tolist()
        per_sample = bool(generator.integers(2))
        expected = restated(config, steps, (start, end), keep, per_sample)
        for xp in (np, array_api_strict):
            found, rows = run(xp, config, steps, (start, end), keep=keep, per_sample=per_sample)
            assert rows == [2 * B if start <= step / steps < end else B for step in range(steps)]
            for ours, theirs in zip(found, expected, strict=True):
                # sums of the same float32 numbers in another order
                np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=1e-5)


def test_which_steps() -> None:
    """A share that is a whole number of steps is that step: no rounding moves it."""
    assert guided_steps(4, None) == [True] * 4
    for steps in range(1, 101):
        for first in range(steps):
            assert guided_steps(steps, (first / steps, 1.0)) == [step >= first for step in range(steps)]
            assert guided_steps(steps, (0.0, (first + 1) / steps)) == [step <= first for step in range(steps)]


@pytest.mark.parametrize("config", ["ddpm", "learned"])
def test_all_of_the_steps_are_no_interval(config: str) -> None:
    for found, expected in zip(run(np, config, 5, (0, 1))[0], run(np, config, 5, None)[0], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_start_of_the_prior_is_not_touched(bundle: Path) -> None:
    """Pictures to the last bit with all of the steps, and the prior guided at each of its own in any case."""
    k, spies = spied(bundle, "prior_step", "decoder_step")
    arguments: Arguments = {"steps": 4, "prior_steps": 3, "seed": 3, "count": 2, **SIZE}
    expected = k("a cat", **arguments).array
    np.testing.assert_array_equal(k("a cat", guidance_interval=(0, 1), **arguments).array, expected)
    for spy in spies.values():
        spy.calls.clear()
    k("a cat", guidance_interval=(0.25, 0.5), **arguments)
    rows = {name: [len(call["sample"]) for call in spy.calls] for name, spy in spies.items()}
    assert rows == {"prior_step": [4, 4, 4], "decoder_step": [2, 4, 2, 2]}


def test_a_hint_is_halved_too(bundle: Path) -> None:
    """ControlNet's hint is context; diffusers' pipeline of it has no callback to compare with."""
    step = Spy(component(bundle, "controlnet_step"))
    k = load(bundle, sessions={"controlnet_step": step}, threads=1)
    generator = np.random.default_rng(1)
    embeds = Embeds(*generator.standard_normal((2, 2, 32), np.float32))
    hints = [generator.random((3, 64, 128), np.float32) for _ in range(2)]
    k.decoder(embeds, hint=hints, steps=2, guidance_interval=(0, 0.5), seed=1)
    both, positive = step.calls
    assert both["sample"].shape[0] == 4
    assert positive.keys() == both.keys()
    for name in positive.keys() - {"sample", "embedding"}:
        np.testing.assert_array_equal(positive[name], both[name][2:])


# Errors, and the command line

BAD: dict[str, tuple[Arguments, str]] = {
    "one number": ({"guidance_interval": 0.5}, r"guidance_interval: expected two numbers, .* found 0\.5"),
    "three numbers": ({"guidance_interval": (0, 0.5, 1)}, "guidance_interval: expected two numbers"),
    "texts": ({"guidance_interval": ("0", "1")}, "guidance_interval: expected two numbers"),
    "truth": ({"guidance_interval": (False, True)}, "guidance_interval: expected two numbers"),
    "nan": ({"guidance_interval": (0.0, float("nan"))}, "guidance_interval: expected two numbers"),
    "below 0": ({"guidance_interval": (-0.1, 1)}, "guidance_interval: expected two numbers"),
    "above 1": ({"guidance_interval": (0, 1.1)}, "guidance_interval: expected two numbers"),
    "empty": ({"guidance_interval": (0.5, 0.5)}, "guidance_interval: expected two numbers"),
    "backwards": ({"guidance_interval": (0.7, 0.2)}, "guidance_interval: expected two numbers"),
    "no step": ({"guidance_interval": (0.3, 0.45), "steps": 4}, r"none of 4 steps begins in \[0\.3, 0\.45\)"),
    "no guidance": ({"guidance_interval": (0, 0.5), "guidance_scale": 1.0}, "guidance_interval: guidance is off"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_intervals_run_no_network(bundle: Path, oracle: Oracle, case: str) -> None:
    arguments, message = BAD[case]
    nothing = without_networks(bundle)
    for call, given in ((nothing, "a cat"), (nothing.decoder, oracle.embeds("a"))):
        with pytest.raises(InputError, match=message):
            call(given, **arguments)


def test_on_the_command_line(tmp_path: Path) -> None:
    """The miniature's picture is that of the Python surface, and says how it was made."""
    from PIL import Image

    file, prompt = tmp_path / "a.png", "a large red circle on a blue background"
    words = ["generate", prompt, "-o", file, "--guidance-interval", 0.2, 0.6, "--steps", 5, "--prior-steps", 2]
    result = CliRunner().invoke(app, [str(word) for word in [*words, "--seed", 1, "--threads", 1]])
    assert result.exit_code == 0, result.output
    with Image.open(file) as found, load(threads=1) as k:
        expected = k(prompt, guidance_interval=(0.2, 0.6), steps=5, prior_steps=2, seed=1)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected.images[0]))
        assert found.info["guidance_interval"] == "(0.2, 0.6)"
