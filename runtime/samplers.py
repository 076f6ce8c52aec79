"""Samplers: how one prediction of the network takes a sample one step further.

A sampler is a frozen value and a step is a function of its arguments; multistep samplers take their history and give it
back. Steps use the array API of the arrays they are given, so they run where the arrays live. Coefficients are worked
out in float32 in diffusers' order of operations.

Reference for each sampler: the class of diffusers 0.42.1 that its docstring names. Kept apart from it on purpose:
* `fixed_large_log` adds noise of deviation exp(log(beta) / 2); diffusers takes the root of log(beta), which is NaN.
* DDIM's previous timestep is the next one of the list; diffusers takes t - 1000 // steps, another one in "linspace"
  and in "trailing" where the steps do not divide 1000.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from ..engines.errors import InputError
from .noise import Array, Noise
from .noise_schedule import NoiseSchedule
from .predictions import Prediction
from .timesteps import Spacing
from .transfer import to_device

History: TypeAlias = tuple[Array, int] | None
"""What a multistep sampler remembers: the last predicted clean sample and its timestep."""
Stepped: TypeAlias = tuple[Array, History]
"""The next sample, and the history for the step after it."""

_ONE, _HALF, _TINY = np.float32(1.0), np.float32(0.5), np.float32(1e-20)


@dataclass(frozen=True)
class Sampler:
    """What all samplers share; each adds the `step` of runtime.schedulers.Scheduler, which describes every method."""

    schedule: NoiseSchedule
    spacing: Spacing
    prediction: Prediction

    @property
    def learned_variance(self) -> bool:
        """See Scheduler."""
        return False

    def timesteps(self, steps: int, strength: float = 1.0) -> NDArray[np.int64]:
        """See Scheduler."""
        return self.spacing(steps, self.schedule.length, strength)

    def add_noise(self, x0: Array, noise: Array, t: int) -> Array:
        """See Scheduler."""
        return self.schedule.add_noise(x0, noise, t)

    def draws(self, t: int) -> bool:  # noqa: ARG002
        """See Scheduler."""
        return False

    def _split(self, pred: Array, x: Array) -> tuple[Array, Array | None]:
        """The prediction and, with learned variance, its second half."""
        channels = x.shape[1]
        expected = (x.shape[0], channels * (2 if self.learned_variance else 1), *x.shape[2:])
        if tuple(pred.shape) != expected:
            raise InputError(
                f"{type(self).__name__}: expected a prediction of shape {expected}, found {tuple(pred.shape)}"
            )
        return (pred[:, :channels, ...], pred[:, channels:, ...]) if self.learned_variance else (pred, None)


def _learned_range(v: Array, small: np.float32, large: np.float32) -> Array:
    # arXiv:2102.09672, equation 15, with v of [-1, 1] instead of [0, 1]
    share = (v + 1.0) / 2.0
    return array_namespace(v).exp(0.5 * (share * float(np.log(large)) + (1.0 - share) * float(np.log(small))))


STANDARD_DEVIATIONS: Mapping[str, Callable[[Array | None, np.float32, np.float32], float | Array]] = {
    "fixed_small": lambda _v, small, _large: float(np.sqrt(small)),
    "fixed_small_log": lambda _v, small, _large: float(np.exp(_HALF * np.log(small))),
    "fixed_large": lambda _v, _small, large: float(np.sqrt(large)),
    "fixed_large_log": lambda _v, _small, large: float(np.exp(_HALF * np.log(large))),
    "learned": lambda v, _small, _large: array_namespace(v).sqrt(v),
    "learned_range": _learned_range,
}
"""(variance that the network predicts, smallest variance, largest) -> deviation, by diffusers' variance_type."""


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling (arXiv:2006.11239, equations 6 and 7): diffusers' DDPMScheduler.

    `variance_type` is a key of STANDARD_DEVIATIONS. Draws once a step wherever t > 0: with steps_offset 1 the last
    timestep is 1 and draws too (of deviation 1e-10 with a small fixed variance).
    """

    variance_type: str

    @property
    def learned_variance(self) -> bool:
        """See Scheduler."""
        return self.variance_type in ("learned", "learned_range")

    def draws(self, t: int) -> bool:
        """See Scheduler."""
        return t > 0

    def step(self, pred: Array, x: Array, t: int, t_prev: int, noise: Noise, history: History = None) -> Stepped:  # noqa: ARG002
        """See Scheduler; the history stays None."""
        pred, v = self._split(pred, x)
        signal_prev = self.schedule.signal(t_prev)
        rest, rest_prev = _ONE - self.schedule.signal(t), _ONE - signal_prev
        alpha, beta = self._alpha_beta(t, t_prev)
        x0 = self.prediction.clean(pred, x, *self.schedule.alpha_sigma(t))
        mean = float(np.sqrt(signal_prev) * beta / rest) * x0 + float(np.sqrt(alpha) * rest_prev / rest) * x
        if not self.draws(t):
            return mean, None
        small = np.maximum(rest_prev / rest * beta, _TINY)
        deviation = STANDARD_DEVIATIONS[self.variance_type](v, small, beta)
        return mean + deviation * to_device(noise(tuple(x.shape)), x), None

    def _alpha_beta(self, t: int, t_prev: int) -> tuple[np.float32, np.float32]:
        """Signal kept and noise added between `t_prev` and `t`."""
        alpha = self.schedule.signal(t) / self.schedule.signal(t_prev)
        return alpha, _ONE - alpha


@dataclass(frozen=True)
class UnCLIP(DDPM):
    """The prior's ancestral sampling: diffusers' UnCLIPScheduler; samples are [B, D].

    Draws wherever t > 0, so one time less than it steps; a single step (999 to clean) draws once (of deviation 1e-10
    with a small fixed variance).
    """

    def _alpha_beta(self, t: int, t_prev: int) -> tuple[np.float32, np.float32]:
        # alpha is worked out from beta here, not beta from alpha: noise_schedule says why the order shows
        beta = self.schedule.betas[t] if t_prev == t - 1 else super()._alpha_beta(t, t_prev)[1]
        return _ONE - beta, beta


@dataclass(frozen=True)
class DDIM(Sampler):
    """Implicit sampling (arXiv:2010.02502, equation 12, eta 0): diffusers' DDIMScheduler. Draws nothing.

    The last step goes to the clean sample, without `set_alpha_to_one` only to the level of noise at timestep 0.
    """

    set_alpha_to_one: bool

    def step(self, pred: Array, x: Array, t: int, t_prev: int, noise: Noise, history: History = None) -> Stepped:  # noqa: ARG002
        """See Scheduler; the history stays None."""
        pred, _ = self._split(pred, x)
        alpha, sigma = self.schedule.alpha_sigma(t)
        alpha_prev, sigma_prev = self.schedule.alpha_sigma(t_prev if self.set_alpha_to_one else max(t_prev, 0))
        x0 = self.prediction.clean(pred, x, alpha, sigma)
        eps = self.prediction.noise(pred, x, alpha, sigma)
        return alpha_prev * x0 + sigma_prev * eps, None


@dataclass(frozen=True)
class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2, midpoint): diffusers' DPMSolverMultistepScheduler.

    The first and the last step are of first order; the last gives the predicted clean sample. Draws nothing. Like
    diffusers' class it heeds thresholding but not clip_sample.
    """

    def step(self, pred: Array, x: Array, t: int, t_prev: int, noise: Noise, history: History = None) -> Stepped:  # noqa: ARG002
        """See Scheduler; the history is this step's clean sample and `t`."""
        pred, _ = self._split(pred, x)
        alpha_s, sigma_s, lambda_s = self._level(t)
        x0 = self.prediction.clean(pred, x, float(alpha_s), float(sigma_s))
        if t_prev < 0:
            return x0, (x0, t)
        alpha, sigma, lambda_ = self._level(t_prev)
        h = lambda_ - lambda_s
        weight = float(alpha * (np.exp(-h) - _ONE))
        out = float(sigma / sigma_s) * x - weight * x0
        if history is not None:
            x0_before, t_before = history
            ratio = (lambda_s - self._level(t_before)[2]) / h
            out = out - 0.5 * weight * (float(_ONE / ratio) * (x0 - x0_before))
        return out, (x0, t)

    def _level(self, t: int) -> tuple[np.float32, np.float32, np.float32]:
        """Alpha, sigma and log(alpha / sigma) at `t`, by way of sigma / alpha as in diffusers."""
        signal = self.schedule.signal(t)
        ratio = np.sqrt((_ONE - signal) / signal)
        alpha = _ONE / np.sqrt(np.square(ratio) + _ONE)
        sigma = ratio * alpha
        return alpha, sigma, np.log(alpha) - np.log(sigma)
