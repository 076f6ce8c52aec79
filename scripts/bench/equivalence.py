"""Whether contenders give the same result, which is asked before who is faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..reference import peak_signal_to_noise
from .cases import Inputs
from .results import Equivalence

Exactness: TypeAlias = Literal["fp32", "16 bits", "int8"]


@dataclass(frozen=True)
class Bounds:
    """How far results may be apart: least PSNR in dB of pictures in [0, 1], most relative L2 error of others."""

    psnr: float
    relative: float


# By what the less exact of the two computes in; those of fp32 and of 16 bits are of scripts/reference.py, those of
# int8 keep a picture what it is.
BOUNDS: Mapping[Exactness, Bounds] = {
    "fp32": Bounds(60.0, 1e-3),
    "16 bits": Bounds(25.0, 8e-2),
    "int8": Bounds(30.0, 1.5e-1),
}


def exactness(*arithmetics: str) -> Exactness:
    """Of the least exact of what results are computed in."""
    if "int8" in arithmetics:
        return "int8"
    return "fp32" if set(arithmetics) == {"fp32"} else "16 bits"


def compare(expected: Inputs, found: Inputs, bounds: Bounds, to: str) -> Equivalence:
    """How near a result is to the one of contender `to`; the worst of the arrays."""
    if {name: array.shape for name, array in expected.items()} != {name: array.shape for name, array in found.items()}:
        return Equivalence("relative error", 1.0, bounds.relative, passed=False, to=to)
    if "picture" in expected:
        delta = found["picture"].astype(np.float64) - expected["picture"]
        psnr = peak_signal_to_noise(float(np.mean(delta**2)))
        return Equivalence("PSNR", psnr, bounds.psnr, psnr is None or psnr >= bounds.psnr, to)
    relative = max(relative_error(expected[name], found[name]) for name in expected)
    return Equivalence("relative error", relative or None, bounds.relative, relative <= bounds.relative, to)


def relative_error(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """L2 norm of the difference over that of `expected`."""
    delta = np.linalg.norm(found.astype(np.float64) - expected)
    return float(delta) / max(float(np.linalg.norm(expected)), 1e-30)
