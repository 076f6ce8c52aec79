"""Where the timesteps of a sampler lie among the trained ones, and which of them a strength keeps.

Reference: `set_timesteps` of diffusers 0.42.1's schedulers. Kept apart from it on purpose:
* "unclip" takes 1 step, at the last trained timestep; diffusers divides by zero.
* "trailing" gives as many steps as were asked for; diffusers' rounding adds one at -1 for 61, 103 and some others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.errors import InputError

_GRIDS: Mapping[str, Callable[[int, int], NDArray[Any]]] = {
    # Table 2 of arXiv:2305.08891
    "leading": lambda steps, length: np.arange(steps - 1, -1, -1) * (length // steps),
    "linspace": lambda steps, length: np.linspace(0, length - 1, steps).round()[::-1],
    "trailing": lambda steps, length: np.arange(length, 0, -length / steps).round() - 1,
    # "linspace", but a single step starts from noise
    "unclip": lambda steps, length: np.linspace(0 if steps > 1 else length - 1, length - 1, steps).round()[::-1],
}


@dataclass(frozen=True)
class Spacing:
    """Where the timesteps lie; `kind` is diffusers' timestep_spacing, or "unclip" for UnCLIPScheduler's."""

    kind: str
    offset: int = 0  # steps_offset, which only "leading" heeds
    spare: int = 0  # lowest points of the grid that are not stepped on

    def __call__(self, steps: int, length: int, strength: float = 1.0) -> NDArray[np.int64]:
        """The last int(steps * strength) of `steps` descending timesteps of 0 to length - 1, int64.

        As in diffusers the product is a truncated float: 100 steps at 0.29 keep 28. Raises InputError where steps is
        not an int of 1 to length or that many do not fit in, strength is not in (0, 1], or no step is left.
        """
        grid = self._grid(steps, length)
        return grid[-_kept(len(grid), strength) :]

    def _grid(self, steps: int, length: int) -> NDArray[np.int64]:
        if not isinstance(steps, (int, np.integer)) or isinstance(steps, bool) or not 1 <= steps <= length:
            raise InputError(
                f"steps: expected an int of 1 to {length} (the timesteps that were trained), found {steps!r}"
            )
        grid = _GRIDS[self.kind](int(steps) + self.spare, length)[:steps].astype(np.int64)
        if self.kind == "leading":
            grid += self.offset
        if grid[0] >= length or np.any(np.diff(grid) >= 0):
            raise InputError(
                f"steps: {steps} steps do not fit into the {length} trained timesteps, with timestep_spacing "
                f"{self.kind!r} and steps_offset {self.offset} (first {grid[0]}, last {grid[-1]}); ask for fewer steps"
            )
        return grid


def _kept(steps: int, strength: float) -> int:
    number = isinstance(strength, (int, float, np.integer, np.floating)) and not isinstance(strength, bool)
    if not number or not 0 < strength <= 1:
        raise InputError(f"strength: expected a number above 0 and up to 1, found {strength!r}")
    kept = min(int(steps * strength), steps)
    if kept == 0:
        raise InputError(
            f"strength {strength} of {steps} steps leaves no step to take; "
            f"raise strength to {math.ceil(1000 / steps) / 1000} or more, or take more steps"
        )
    return kept
