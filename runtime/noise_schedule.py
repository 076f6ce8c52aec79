"""The forward process: how much of the signal is left, and how much noise has been added, at each timestep.

Reference: the tables of diffusers 0.42.1's schedulers, worked out in float32 in the same order of operations. Precision
shows: at t = 999 of the cosine schedule 1 - beta is 0 in float32 and 1.7e-8 in double, which moves a sample by 3.5e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .noise import Array

_ONE = np.float32(1.0)  # NumPy 1 makes a double of a float32 scalar and a Python number


def _linear(start: float, end: float, length: int) -> NDArray[np.float32]:
    # torch.linspace: a float32 increment, counted from the nearer end, product and sum fused (here in double)
    first, last = np.float32(start), np.float32(end)
    increment = float((last - first) / np.float32(max(length - 1, 1)))
    index = np.arange(length)
    up, down = float(first) + increment * index, float(last) - increment * (length - 1 - index)
    return np.where(index < max(length // 2, 1), up, down).astype(np.float32)


def _scaled_linear(start: float, end: float, length: int) -> NDArray[np.float32]:
    return np.square(_linear(math.sqrt(start), math.sqrt(end), length))


def _cosine(_start: float, _end: float, length: int) -> NDArray[np.float32]:
    # Nichol and Dhariwal 2021 (arXiv:2102.09672), equation 17; the two ends of the configuration play no part.
    def bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - bar((i + 1) / length) / bar(i / length), 0.999) for i in range(length)]
    return np.array(betas, np.float32)


BETA_SCHEDULES: Mapping[str, Callable[[float, float, int], NDArray[np.float32]]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
}
"""(beta_start, beta_end, length) -> betas, float32 [length], by diffusers' beta_schedule."""


@dataclass(frozen=True)
class NoiseSchedule:
    """How much signal is left at each of `length` timesteps; `kind` is a key of BETA_SCHEDULES."""

    kind: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    length: int = 1000

    @cached_property
    def betas(self) -> NDArray[np.float32]:
        """Variance of the noise that each timestep adds, float32 [length]."""
        return BETA_SCHEDULES[self.kind](self.beta_start, self.beta_end, self.length)

    @cached_property
    def alphas_cumprod(self) -> NDArray[np.float32]:
        """Share of the signal's variance left after each timestep, float32 [length]."""
        # torch.cumprod keeps its running product in double.
        return np.cumprod((_ONE - self.betas).astype(np.float64)).astype(np.float32)

    def signal(self, t: int) -> np.float32:
        """`alphas_cumprod[t]`; 1 at t = -1, the clean sample."""
        return _ONE if t < 0 else np.float32(self.alphas_cumprod[t])

    def alpha_sigma(self, t: int) -> tuple[float, float]:
        """Weights of the clean sample and of the noise at `t`: the float32 roots of signal and 1 - signal."""
        signal = self.signal(t)
        return float(np.sqrt(signal)), float(np.sqrt(_ONE - signal))

    def add_noise(self, x0: Array, noise: Array, t: int) -> Array:
        """sqrt(ac_t) x0 + sqrt(1 - ac_t) noise (arXiv:2006.11239, equation 4), ac being `alphas_cumprod`."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * noise
