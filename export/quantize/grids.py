"""Numbers in 8 bits: what activations and weights are rounded to.

Activations are unsigned with a zero point, one scale a tensor; weights are signed without one, a scale an output
channel. That pair is what the int8 kernels of CPUs multiply (vpdpbusd: unsigned by signed). Source of the arithmetic:
ONNX operators QuantizeLinear and DequantizeLinear; Jacob et al. 2018, "Quantization and Training of Neural Networks
for Efficient Integer-Arithmetic-Only Inference".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVELS = 255  # steps between the least and the largest unsigned number of 8 bits
WEIGHT_LEVELS = 127  # -128 is left out, so that a weight and its negative round alike
TINY = 1e-12  # in place of a scale of zero, of what is zero everywhere


@dataclass(frozen=True)
class Grid:
    """What an activation is rounded to: (n - zero) * scale for n in 0..255."""

    scale: float
    zero: int


def grid(low: float, high: float) -> Grid:
    """The grid over [low, high], widened to hold zero, which it has exactly: convolutions pad with it."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32(max((high - low) / LEVELS, TINY)))
    return Grid(scale, int(np.clip(np.rint(-low / scale), 0, LEVELS)))


def weight_scales(weight: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """The scale of each of a weight's channels along `axis`: its largest magnitude becomes WEIGHT_LEVELS."""
    others = tuple(each for each in range(weight.ndim) if each != axis)
    largest: NDArray[Any] = np.maximum(weight.max(axis=others), -weight.min(axis=others))
    return np.maximum(largest / WEIGHT_LEVELS, TINY).astype(np.float32)


def round_weight(weight: NDArray[np.float32], scales: NDArray[np.float32], axis: int) -> NDArray[np.int8]:
    """A weight in 8 bits, by the scales of its channels along `axis`."""
    rounded = weight / scales.reshape([-1 if each == axis else 1 for each in range(weight.ndim)])
    np.rint(rounded, out=rounded)
    np.clip(rounded, -WEIGHT_LEVELS, WEIGHT_LEVELS, out=rounded)
    return rounded.astype(np.int8)
