"""From what the network predicts to the clean sample and the noise that it stands for.

Reference: the `step` methods of diffusers 0.42.1's schedulers. All of it uses the array API of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from array_api_compat import array_namespace

from .noise import Array

_Read: TypeAlias = Callable[[Array, Array, float, float], Array]

PREDICTIONS: Mapping[str, tuple[_Read, _Read]] = {
    "epsilon": (lambda pred, x, alpha, sigma: (x - sigma * pred) / alpha, lambda pred, _x, _alpha, _sigma: pred),
    "sample": (lambda pred, _x, _alpha, _sigma: pred, lambda pred, x, alpha, sigma: (x - alpha * pred) / sigma),
    "v_prediction": (
        lambda pred, x, alpha, sigma: alpha * x - sigma * pred,
        lambda pred, x, alpha, sigma: alpha * pred + sigma * x,
    ),
}
"""(pred, x, alpha, sigma) -> x0 and -> eps, by diffusers' prediction_type.

x = alpha x0 + sigma eps; v = alpha eps - sigma x0 (arXiv:2202.00512).
"""


@dataclass(frozen=True)
class Thresholding:
    """Dynamic thresholding (arXiv:2205.11487, section 2.3): divide by the `ratio` quantile of |x0| in [1, maximum].

    `ratio` is in (0, 1]; a `maximum` of None sets no upper end, one below 1 is itself the bound.
    """

    ratio: float
    maximum: float | None

    def __call__(self, x0: Array) -> Array:
        """`x0`, float32 [B, ...], with each sample of axis 0 clipped to its own bound and divided by it."""
        xp = array_namespace(x0)
        flat = xp.reshape(x0, (x0.shape[0], -1))
        ordered = xp.sort(xp.abs(flat), axis=1)
        # torch.quantile: a float32 rank, and a lerp that starts from the nearer neighbour
        rank = np.float32(self.ratio) * np.float32(ordered.shape[1] - 1)
        below, above, weight = math.floor(rank), math.ceil(rank), float(rank - np.floor(rank))
        low, high = ordered[:, below : below + 1], ordered[:, above : above + 1]
        bound = low + weight * (high - low) if weight < 0.5 else high - (1.0 - weight) * (high - low)
        bound = xp.maximum(bound, 1.0)
        if self.maximum is not None:
            bound = xp.minimum(bound, self.maximum)
        return xp.reshape(clipped(flat, -bound, bound) / bound, x0.shape)


def clipped(x: Array, low: Array | float, high: Array | float) -> Array:
    """`x` in [low, high], NaN kept.

    Not by array_api_compat's `clip`: for CuPy that selects by a mask, and so waits for the device to count.
    """
    xp = array_namespace(x)
    return xp.minimum(xp.maximum(x, low), high)


@dataclass(frozen=True)
class Prediction:
    """What the network predicts (`kind` is a key of PREDICTIONS), and how its clean sample is kept in range."""

    kind: str
    clip: float | None = None
    thresholding: Thresholding | None = None

    def clean(self, pred: Array, x: Array, alpha: float, sigma: float) -> Array:
        """The clean sample that `pred` stands for, thresholded, or else clipped; shape and dtype of `x`."""
        x0 = PREDICTIONS[self.kind][0](pred, x, alpha, sigma)
        if self.thresholding is not None:
            return self.thresholding(x0)
        return x0 if self.clip is None else clipped(x0, -self.clip, self.clip)

    def noise(self, pred: Array, x: Array, alpha: float, sigma: float) -> Array:
        """The noise that `pred` stands for, before any clipping; shape and dtype of `x`."""
        return PREDICTIONS[self.kind][1](pred, x, alpha, sigma)
