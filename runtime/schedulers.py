"""The samplers by name, and the one that a diffusers scheduler_config.json describes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..engines.errors import BundleError, InputError
from .noise import Array, Noise
from .noise_schedule import BETA_SCHEDULES, NoiseSchedule
from .predictions import PREDICTIONS, Prediction, Thresholding
from .samplers import DDIM, DDPM, STANDARD_DEVIATIONS, DPMSolverPP2M, History, Stepped, UnCLIP
from .timesteps import Spacing


class Scheduler(Protocol):
    """What the denoising loop needs of a sampler; arrays are float32 [B, ...], channels on axis 1."""

    @property
    def learned_variance(self) -> bool:
        """Whether `step` expects [mean prediction, variance] stacked on axis 1."""
        ...

    def timesteps(self, steps: int, strength: float = 1.0) -> NDArray[np.int64]:
        """Descending timesteps; strength < 1 keeps the last int(steps * strength) of `steps`.

        As in diffusers the product is a truncated float: 100 steps at 0.29 keep 28. Raises InputError where steps is
        not an int of 1 to num_train_timesteps, strength is not in (0, 1], or no step is left.
        """
        ...

    def add_noise(self, x0: Array, noise: Array, t: int) -> Array:
        """`x0` as it looks at timestep `t`, given standard-normal `noise` of its shape."""
        ...

    def draws(self, t: int) -> bool:
        """Whether a step from `t` calls its noise, which is then once."""
        ...

    def step(self, pred: Array, x: Array, t: int, t_prev: int, noise: Noise, history: History = None) -> Stepped:
        """From `x` at `t` to the sample at `t_prev`, the next timestep of the list (-1 after the last).

        `noise` is called once where `draws(t)`, with the shape of `x`, and not at all elsewhere. Give the returned
        history to the next step, None to the first. Raises InputError where `pred` does not have the shape of `x`
        (twice its channels with learned variance).
        """
        ...


@dataclass(frozen=True)
class _Field:
    """A key of scheduler_config.json: diffusers' default, what is supported, and how to tell."""

    default: Any
    supported: str
    accepts: Callable[[Any], bool]


def _one_of(*values: Any) -> _Field:
    """One of `values`, of which the first is the default."""

    def accepts(value: Any) -> bool:
        # the type counts, because 1 == True
        return any(type(value) is type(known) and value == known for known in values)

    return _Field(values[0], ", ".join(map(repr, values)), accepts)


def _whole(default: int, low: int) -> _Field:
    return _Field(default, f"an integer of {low} or more", lambda value: type(value) is int and value >= low)


def _real(default: float, high: float = math.inf, null: bool = False) -> _Field:
    def accepts(value: Any) -> bool:
        if value is None:
            return null
        return type(value) in (int, float) and 0 < value <= high and math.isfinite(value)

    limit = f" and up to {high:g}" if math.isfinite(high) else ""
    return _Field(default, f"a number above 0{limit}{' or None' if null else ''}", accepts)


_COMMON = {
    "num_train_timesteps": _whole(1000, 1),
    "beta_start": _real(0.0001, 1.0),
    "beta_end": _real(0.02, 1.0),
    "beta_schedule": _one_of(*BETA_SCHEDULES),
    "trained_betas": _one_of(None),
    "rescale_betas_zero_snr": _one_of(False),
    "prediction_type": _one_of(*PREDICTIONS),
    "thresholding": _one_of(False, True),
    "dynamic_thresholding_ratio": _real(0.995, 1.0),
    "sample_max_value": _real(1.0, null=True),
    "timestep_spacing": _one_of("leading", "linspace", "trailing"),
    "steps_offset": _whole(0, 0),
}
_CLIP = {"clip_sample": _one_of(True, False), "clip_sample_range": _real(1.0)}
_UNCLIP = {
    "num_train_timesteps": _whole(1000, 1),
    "beta_schedule": _one_of("squaredcos_cap_v2"),
    "prediction_type": _one_of("epsilon", "sample"),
    "variance_type": _one_of("fixed_small_log", "learned_range"),
}
_DPM = {
    "timestep_spacing": _one_of("linspace", "leading", "trailing"),
    "algorithm_type": _one_of("dpmsolver++"),
    "solver_order": _one_of(2),
    "solver_type": _one_of("midpoint"),
    "final_sigmas_type": _one_of("zero"),
    "lambda_min_clipped": _one_of(-math.inf, None),  # null in a manifest: JSON has no infinity
    "use_karras_sigmas": _one_of(False),
    "use_exponential_sigmas": _one_of(False),
    "use_beta_sigmas": _one_of(False),
    "use_lu_lambdas": _one_of(False),
    "use_flow_sigmas": _one_of(False),
}


@dataclass(frozen=True)
class SchedulerKind:
    """A sampler: diffusers' class, the configuration keys that it reads, and how to make it from their values."""

    diffusers: str
    fields: Mapping[str, _Field]
    build: Callable[[Mapping[str, Any]], Scheduler]


def _parts(
    values: Mapping[str, Any], spacing: str | None = None, spare: int = 0
) -> tuple[NoiseSchedule, Spacing, Prediction]:
    schedule = NoiseSchedule(
        values["beta_schedule"], values["beta_start"], values["beta_end"], values["num_train_timesteps"]
    )
    thresholding = Thresholding(values["dynamic_thresholding_ratio"], values["sample_max_value"])
    prediction = Prediction(
        values["prediction_type"],
        clip=values["clip_sample_range"] if values["clip_sample"] else None,
        thresholding=thresholding if values["thresholding"] else None,
    )
    return schedule, Spacing(spacing or values["timestep_spacing"], values["steps_offset"], spare), prediction


def _dpm(values: Mapping[str, Any]) -> Scheduler:
    # diffusers' class divides into steps + 1 and leaves the lowest timestep out, except in "trailing"
    return DPMSolverPP2M(*_parts(values, spare=0 if values["timestep_spacing"] == "trailing" else 1))


SCHEDULERS: Mapping[str, SchedulerKind] = {
    "ddpm": SchedulerKind(
        "DDPMScheduler",
        {**_COMMON, **_CLIP, "variance_type": _one_of(*STANDARD_DEVIATIONS)},
        lambda values: DDPM(*_parts(values), values["variance_type"]),
    ),
    "ddim": SchedulerKind(
        "DDIMScheduler",
        {**_COMMON, **_CLIP, "set_alpha_to_one": _one_of(True, False)},
        lambda values: DDIM(*_parts(values), values["set_alpha_to_one"]),
    ),
    "dpmpp-2m": SchedulerKind("DPMSolverMultistepScheduler", {**_COMMON, **_DPM}, _dpm),
    "unclip": SchedulerKind(
        "UnCLIPScheduler",
        {**_CLIP, **_UNCLIP},
        lambda values: UnCLIP(*_parts(values, spacing="unclip"), values["variance_type"]),
    ),
}


def scheduler_of(config: Mapping[str, Any]) -> str | None:
    """The name of the sampler that a scheduler_config.json is for; None for one that is not known."""
    return next((key for key, kind in SCHEDULERS.items() if kind.diffusers == config.get("_class_name")), None)


def scheduler_from_config(config: Mapping[str, Any], name: str | None = None) -> Scheduler:
    """The sampler that a diffusers scheduler_config.json describes, or another one on the same noise schedule.

    `name` is a key of SCHEDULERS; None stands for the configuration's own class. As with diffusers' `from_config` the
    sampler reads its own keys of the configuration, takes its own defaults for absent ones and ignores the rest. A
    prior's configuration (UnCLIPScheduler) makes only "unclip", which no other makes.
    Raises InputError for a name that the configuration cannot make, BundleError for what it holds and is not supported.
    """
    own = scheduler_of(config)
    if own is None:
        known = ", ".join(kind.diffusers for kind in SCHEDULERS.values())
        raise BundleError(f"scheduler config: _class_name is {config.get('_class_name')!r}; supported: {known}")
    names = [own] if own == "unclip" else [key for key in SCHEDULERS if key != "unclip"]
    if name is not None and name not in names:
        raise InputError(f"scheduler: expected one of {', '.join(names)} for a {config['_class_name']}, found {name!r}")
    kind = SCHEDULERS[name or own]
    # What a class does not read stays off, whatever the configuration says.
    values = {key: field.default for key, field in _COMMON.items()} | {"clip_sample": False, "clip_sample_range": 1.0}
    values |= {key: config.get(key, field.default) for key, field in kind.fields.items()}
    problems = [
        f"{key} is {values[key]!r} (supported: {field.supported})"
        for key, field in kind.fields.items()
        if not field.accepts(values[key])
    ]
    if problems:
        raise BundleError(f"scheduler config ({kind.diffusers}): {'; '.join(problems)}")
    return kind.build(values)
