"""Timesteps against diffusers' classes, and which numbers of steps and strengths are refused."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest

from kandrt.engines.errors import InputError
from kandrt.runtime.schedulers import scheduler_from_config
from kandrt.runtime.timesteps import Spacing

Config = dict[str, Any]

DECODER: Config = {"_class_name": "DDPMScheduler", "steps_offset": 1}
PRIOR: Config = {"_class_name": "UnCLIPScheduler"}
DPM: Config = {"_class_name": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize("kind", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("class_name", ["DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_every_number_of_steps(kind: str, class_name: str) -> None:
    config = {"_class_name": class_name, "timestep_spacing": kind, "steps_offset": 0}
    scheduler, oracle = scheduler_from_config(config), getattr(diffusers, class_name).from_config(config)
    for steps in [*range(1, 130), 333, 500, 617, 998]:
        oracle.set_timesteps(steps)
        # diffusers' "trailing" gives a timestep too many, -1, for some numbers
        expected = [t for t in oracle.timesteps.tolist() if t >= 0]
        assert scheduler.timesteps(steps).tolist() == expected, steps
        assert len(expected) == steps


def test_every_number_of_prior_steps() -> None:
    scheduler, oracle = scheduler_from_config(PRIOR), diffusers.UnCLIPScheduler.from_config(PRIOR)
    for steps in [*range(2, 200), 500, 999, 1000]:
        oracle.set_timesteps(steps)
        assert scheduler.timesteps(steps).tolist() == oracle.timesteps.tolist()


@pytest.mark.parametrize(("steps", "strength", "kept"), [(100, 0.29, 28), (50, 1, 50), (25, 0.99, 24), (100, 0.3, 30)])
def test_strength_keeps_the_last_steps(steps: int, strength: float, kept: int) -> None:
    scheduler = scheduler_from_config(DECODER)
    assert scheduler.timesteps(steps, strength).tolist() == scheduler.timesteps(steps)[-kept:].tolist()


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, None, "10"])
def test_bad_steps(steps: Any) -> None:
    with pytest.raises(InputError, match=rf"steps.*1 to 1000.*{steps!r}"):
        scheduler_from_config(DECODER).timesteps(steps)


@pytest.mark.parametrize("strength", [0, 0.0, -0.1, 1.01, math.nan, math.inf, True, None, "0.5"])
def test_bad_strength(strength: Any) -> None:
    with pytest.raises(InputError, match="strength: expected a number above 0 and up to 1"):
        scheduler_from_config(DECODER).timesteps(10, strength)


def test_strength_that_leaves_no_step() -> None:
    with pytest.raises(InputError, match=r"strength 0.05 of 10 steps leaves no step.*0.1 or more"):
        scheduler_from_config(DECODER).timesteps(10, 0.05)


@pytest.mark.parametrize(
    ("config", "name", "steps"),
    [(DECODER, None, 1000), (DECODER, "dpmpp-2m", 1000), (DPM, None, 1000)],
)
def test_steps_that_do_not_fit(config: Config, name: str | None, steps: int) -> None:
    """With an offset the first timestep is one that was never trained (diffusers: IndexError), or timesteps repeat."""
    scheduler = scheduler_from_config(config, name)
    with pytest.raises(InputError, match="steps: 1000 steps do not fit"):
        scheduler.timesteps(steps)


def test_spacing_alone() -> None:
    assert Spacing("leading", offset=1)(100, 1000).tolist() == list(range(991, 0, -10))
    assert Spacing("leading", offset=1)(100, 1000, 0.03).tolist() == [21, 11, 1]
