"""Samplers against diffusers' classes over whole trajectories, with the same injected noise and predictions."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import array_api_strict
import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kandrt.engines.errors import InputError
from kandrt.runtime.noise_schedule import NoiseSchedule
from kandrt.runtime.schedulers import SCHEDULERS, Scheduler, scheduler_from_config

F32 = NDArray[np.float32]
Config = dict[str, Any]

# The scheduler_config.json of the published checkpoints.
K22_DECODER: Config = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.17.0.dev0",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "thresholding": False,
}
K22_INPAINT: Config = {**K22_DECODER, "clip_sample": False}
K21: Config = {**K22_DECODER, "_class_name": "DDIMScheduler", "clip_sample": False}
K21_DDPM: Config = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.18.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 2.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 2.0,
    "thresholding": True,
    "trained_betas": None,
    "variance_type": "learned_range",
}
PRIOR: Config = {
    "_class_name": "UnCLIPScheduler",
    "_diffusers_version": "0.17.0.dev0",
    "clip_sample": True,
    "clip_sample_range": 10.0,
    "num_train_timesteps": 1000,
    "prediction_type": "sample",
    "variance_type": "fixed_small_log",
}
K3: Config = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.24.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.00085,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
CHECKPOINTS = {
    "2.2 decoder": K22_DECODER,
    "2.2 inpaint": K22_INPAINT,
    "2.1": K21,
    "2.1 ddpm": K21_DDPM,
    "prior": PRIOR,
    "3": K3,
}
DDIM_DEFAULTS: Config = {"_class_name": "DDIMScheduler"}
DPM_DEFAULTS: Config = {"_class_name": "DPMSolverMultistepScheduler"}

# Largest difference over the largest value. Equal tables, float32 on both sides: one step differs by the last bits of a
# few roots, logarithms and products (6e-8 each).
STEP_TOLERANCE = 1e-6
# Over a whole trajectory the stand-in network feeds those differences back and multiplies them.
WALK_TOLERANCE = 5e-5


class Draws:
    """Standard-normal draws, the same for each instance, that remembers the shapes."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(11)
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, shape: tuple[int, ...]) -> F32:
        self.shapes.append(tuple(shape))
        return self.rng.standard_normal(tuple(shape), dtype=np.float32)


def predict(x: F32, t: int, learned: bool) -> F32:
    """A stand-in for the network: a bounded function of sample and timestep; the variance half spans [-1, 1]."""
    mean = (np.sin(np.float32(1.5) * x + np.float32(t / 500)) + np.float32(0.5) * x).astype(np.float32)
    return np.concatenate([mean, np.cos(np.float32(3.0) * x)], axis=1) if learned else mean


def pairs(timesteps: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    return itertools.pairwise([*timesteps.tolist(), -1])


def walk(
    scheduler: Scheduler,
    timesteps: NDArray[np.int64],
    x: F32,
    noise: Callable[..., F32],
    xp: Any = np,
    inputs: list[F32] | None = None,
) -> list[F32]:
    """The sample after each step; `inputs` replaces what each step starts from."""
    sample, history, out = xp.asarray(x), None, []
    for index, (t, t_prev) in enumerate(pairs(timesteps)):
        sample = sample if inputs is None else xp.asarray(inputs[index])
        pred = xp.asarray(predict(np.asarray(sample), t, scheduler.learned_variance))
        sample, history = scheduler.step(pred, sample, t, t_prev, noise, history)
        out.append(np.asarray(sample))
    return out


def oracle_walk(
    oracle: Any, timesteps: list[int], x: F32, draws: Draws, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> list[F32]:
    def randn_tensor(shape: torch.Size, **_: Any) -> torch.Tensor:
        return torch.from_numpy(draws(tuple(shape)))

    monkeypatch.setattr(importlib.import_module(type(oracle).__module__), "randn_tensor", randn_tensor)
    sample, out = torch.from_numpy(x), []
    for index, t in enumerate(timesteps):
        extra: dict[str, Any] = {}
        if isinstance(oracle, diffusers.UnCLIPScheduler):
            extra["prev_timestep"] = timesteps[index + 1] if index + 1 < len(timesteps) else None
        sample = oracle.step(torch.from_numpy(predict(sample.numpy(), t, learned)), t, sample, **extra).prev_sample
        out.append(sample.numpy())
    return out


def start(config: Config) -> F32:
    shape = (3, 40) if config["_class_name"] == "UnCLIPScheduler" else (2, 4, 9, 7)
    return np.random.default_rng(3).standard_normal(shape, dtype=np.float32)


def difference(found: list[F32], expected: list[F32]) -> float:
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in found)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))


def compare(
    config: Config, name: str | None, steps: int, strength: float, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, ...]]:
    """Assert equal timesteps, draws, single steps and whole trajectory; give the shapes drawn."""
    scheduler = scheduler_from_config(config, name)
    class_name = SCHEDULERS[name].diffusers if name else config["_class_name"]
    oracle = getattr(diffusers, class_name).from_config(config)
    oracle.set_timesteps(steps)
    timesteps = scheduler.timesteps(steps, strength)
    expected_timesteps = oracle.timesteps.tolist()[steps - min(int(steps * strength), steps) :]
    assert timesteps.dtype == np.int64
    assert timesteps.tolist() == expected_timesteps

    x, ours, theirs = start(config), Draws(), Draws()
    expected = oracle_walk(oracle, expected_timesteps, x, theirs, scheduler.learned_variance, monkeypatch)
    assert difference(walk(scheduler, timesteps, x, ours), expected) < WALK_TOLERANCE
    assert ours.shapes == theirs.shapes
    single = walk(scheduler, timesteps, x, Draws(), inputs=[x, *expected[:-1]])
    assert difference(single, expected) < STEP_TOLERANCE
    return ours.shapes


@pytest.mark.parametrize(("steps", "strength"), [(25, 1.0), (7, 1.0), (100, 0.3), (2, 1.0)])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_checkpoint_trajectories(checkpoint: str, steps: int, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(CHECKPOINTS[checkpoint], None, steps, strength, monkeypatch)


@pytest.mark.parametrize(
    ("config", "name", "draws"),
    [
        (K22_DECODER, None, 10),  # the last timestep is 1: draws
        (K21_DDPM, None, 9),  # the last timestep is 0: does not
        (PRIOR, None, 9),
        (K21, None, 0),
        (K22_DECODER, "ddim", 0),
        (K22_DECODER, "dpmpp-2m", 0),
    ],
)
def test_draw_counts(config: Config, name: str | None, draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(config, name, 10, 1.0, monkeypatch) == [start(config).shape] * draws


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
def test_ddpm_variance_types(variance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**K22_INPAINT, "variance_type": variance}
    if variance == "learned":  # a variance, not an exponent: only positive ones have a root
        monkeypatch.setattr(np, "cos", lambda x: np.exp(-np.abs(x)))
    compare(config, None, 12, 1.0, monkeypatch)


def test_fixed_large_log_is_the_logarithm_of_fixed_large() -> None:
    """diffusers takes the root of the logarithm, which is NaN; both names promise the same variance."""
    walks = []
    for variance in ("fixed_large", "fixed_large_log"):
        scheduler = scheduler_from_config({**K22_INPAINT, "variance_type": variance})
        walks.append(walk(scheduler, scheduler.timesteps(12), start(K22_INPAINT), Draws()))
    assert difference(*walks) < WALK_TOLERANCE


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp-2m"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("thresholding", [False, True])
def test_settings(
    prediction: str, name: str, schedule: str, thresholding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        **K22_DECODER,
        "prediction_type": prediction,
        "beta_schedule": schedule,
        "thresholding": thresholding,
        "sample_max_value": 1.6,
        "dynamic_thresholding_ratio": 0.9,
    }
    compare(config, name, 9, 1.0, monkeypatch)


@pytest.mark.parametrize("ratio", [0.123, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("maximum", [None, 0.5, 1.3])
def test_thresholding_quantile(ratio: float, maximum: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        **K21_DDPM,
        "variance_type": "fixed_small",
        "dynamic_thresholding_ratio": ratio,
        "sample_max_value": maximum,
    }
    compare(config, None, 5, 1.0, monkeypatch)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("variance", ["fixed_small_log", "learned_range"])
@pytest.mark.parametrize("clip", [False, True])
def test_unclip_settings(prediction: str, variance: str, clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**PRIOR, "prediction_type": prediction, "variance_type": variance, "clip_sample": clip}
    compare(config, None, 8, 1.0, monkeypatch)


@pytest.mark.parametrize(("config", "name"), [(K21, None), (K21, "ddpm"), (K3, "ddim"), (DDIM_DEFAULTS, None)])
def test_ddim_and_defaults(config: Config, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(config, name, 20, 1.0, monkeypatch)


@pytest.mark.parametrize(("steps", "strength"), [(25, 1.0), (50, 1.0), (10, 1.0), (2, 1.0), (1, 1.0), (20, 0.3)])
@pytest.mark.parametrize(
    "config", [K22_DECODER, K21, K21_DDPM, K3, DPM_DEFAULTS], ids=["2.2", "2.1", "thr", "3", "dpm"]
)
def test_dpm_solver(config: Config, steps: int, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {key: value for key, value in config.items() if key != "variance_type"}  # see the next test
    compare(config, "dpmpp-2m", steps, strength, monkeypatch)


def test_dpm_solver_takes_no_variance() -> None:
    """diffusers' class cuts to 3 channels where a variance is learned; here the caller drops the variance."""
    assert not scheduler_from_config(K21_DDPM, "dpmpp-2m").learned_variance
    assert not scheduler_from_config(K21_DDPM, "ddim").learned_variance
    assert scheduler_from_config(K21_DDPM).learned_variance


def test_dpm_solver_converges_to_a_known_solution() -> None:
    """For normal data of deviation s the flow's solution is x_T sqrt(s² ac_0 + 1 - ac_0) / sqrt(s² ac_T + 1 - ac_T)."""
    scheduler, schedule, s = scheduler_from_config(DPM_DEFAULTS), NoiseSchedule(), 0.5
    x = np.ones((1, 1, 1, 1), np.float32)

    def error(steps: int) -> float:
        sample, history = x, None
        for t, t_prev in pairs(timesteps := scheduler.timesteps(steps)):
            ac = float(schedule.alphas_cumprod[t])
            eps = math.sqrt(1 - ac) / (s**2 * ac + 1 - ac) * sample
            sample, history = scheduler.step(eps.astype(np.float32), sample, t, t_prev, Draws(), history)
        ac = float(schedule.alphas_cumprod[timesteps[0]])
        return abs(float(sample[0, 0, 0, 0]) - s / math.sqrt(s**2 * ac + 1 - ac))

    # The last first-order step keeps the order below 2; halving the step must still gain more than first order's 2.
    assert error(40) < 0.02
    assert error(40) < error(20) / 2 < error(10) / 4


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (K22_DECODER, None),
        (K21, None),
        (K21_DDPM, None),
        (PRIOR, None),
        (K22_DECODER, "dpmpp-2m"),
        (K21_DDPM, "dpmpp-2m"),
    ],
)
def test_array_api_strict(config: Config, name: str | None) -> None:
    """The same values from arrays that refuse every conversion to NumPy that is not asked for."""
    scheduler = scheduler_from_config(config, name)
    timesteps, x = scheduler.timesteps(6), start(config)
    strict = walk(scheduler, timesteps, x, Draws(), array_api_strict)
    # equal operations on NumPy arrays underneath: nothing may differ
    assert difference(strict, walk(scheduler, timesteps, x, Draws())) == 0
    noisy = scheduler.add_noise(array_api_strict.asarray(x), array_api_strict.asarray(x[::-1]), 500)
    np.testing.assert_array_equal(np.asarray(noisy), scheduler.add_noise(x, x[::-1], 500))


@pytest.mark.parametrize("config", [K22_DECODER, K21, PRIOR, K3], ids=["2.2", "2.1", "prior", "3"])
@pytest.mark.parametrize("t", [0, 1, 291, 999])
def test_add_noise(config: Config, t: int) -> None:
    x0, noise = start(config), Draws()(start(config).shape)
    oracle = getattr(diffusers, config["_class_name"]).from_config(config)
    expected = oracle.add_noise(torch.from_numpy(x0), torch.from_numpy(noise), torch.tensor([t])).numpy()
    found = scheduler_from_config(config).add_noise(x0, noise, t)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7)  # a rounding of values up to 4


def test_add_noise_of_dpm_solver() -> None:
    scheduler = scheduler_from_config(K22_DECODER, "dpmpp-2m")
    oracle = diffusers.DPMSolverMultistepScheduler.from_config(K22_DECODER)
    oracle.set_timesteps(20)
    t = int(scheduler.timesteps(20)[7])
    x0, noise = start(K22_DECODER), Draws()(start(K22_DECODER).shape)
    expected = oracle.add_noise(torch.from_numpy(x0), torch.from_numpy(noise), torch.tensor([t])).numpy()
    np.testing.assert_allclose(scheduler.add_noise(x0, noise, t), expected, rtol=0, atol=1e-6)


def test_one_prior_step_gives_the_prediction() -> None:
    """diffusers divides by zero; one step from noise is the network's own clean embedding."""
    scheduler, draws = scheduler_from_config(PRIOR), Draws()
    assert scheduler.timesteps(1).tolist() == [999]
    x = start(PRIOR)
    (found,) = walk(scheduler, scheduler.timesteps(1), x, draws)
    np.testing.assert_allclose(found, predict(x, 999, False), rtol=1e-6, atol=1e-9)  # noise of deviation 1e-10
    assert len(draws.shapes) == 1


@pytest.mark.parametrize(("config", "channels"), [(K22_DECODER, 8), (K21_DDPM, 4), (K21, 8), (K21, 5)])
def test_prediction_of_another_shape(config: Config, channels: int) -> None:
    x = np.zeros((1, 4, 2, 2), np.float32)
    with pytest.raises(InputError, match="expected a prediction of shape"):
        scheduler_from_config(config).step(np.zeros((1, channels, 2, 2), np.float32), x, 11, 1, Draws())
