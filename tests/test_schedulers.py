"""Which configurations and names make a sampler, and which are refused."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import msgspec
import pytest

from kandrt.engines.errors import BundleError, InputError
from kandrt.runtime.schedulers import SCHEDULERS, SchedulerKind, scheduler_from_config

Config = dict[str, Any]

DDPM: Config = {"_class_name": "DDPMScheduler"}
PRIOR: Config = {"_class_name": "UnCLIPScheduler"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "EulerDiscreteScheduler"},
            "_class_name is 'EulerDiscreteScheduler'; supported: DDPMScheduler",
        ),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid' .supported: 'linear', 'scaled_linear'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction' .supported: 'epsilon'"),
        ({"variance_type": "big"}, "variance_type is 'big' .supported: 'fixed_small'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing is 'karras' .supported: 'leading'"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True .supported: False"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0 .supported: an integer of 1 or more"),
        ({"num_train_timesteps": True}, "num_train_timesteps is True"),
        ({"sample_max_value": 0}, "sample_max_value is 0 .supported: a number above 0 or None"),
        ({"beta_start": "0.1"}, "beta_start is '0.1' .supported: a number above 0 and up to 1"),
        ({"clip_sample_range": math.nan}, "clip_sample_range is nan"),
        ({"clip_sample": 1, "steps_offset": -1}, "steps_offset is -1 .*clip_sample is 1 "),
    ],
)
def test_unsupported_configurations(change: Config, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        scheduler_from_config({**DDPM, **change})


@pytest.mark.parametrize(
    ("config", "name", "names"),
    [
        (DDPM, "plms", "ddpm, ddim, dpmpp-2m"),
        (DDPM, "unclip", "ddpm, ddim, dpmpp-2m"),
        (PRIOR, "ddim", "unclip"),
    ],
)
def test_names_that_a_configuration_cannot_make(config: Config, name: str, names: str) -> None:
    with pytest.raises(InputError, match=rf"expected one of {names} for a {config['_class_name']}, found '{name}'"):
        scheduler_from_config(config, name)


def test_a_class_without_a_name_is_refused() -> None:
    with pytest.raises(BundleError, match="_class_name is None"):
        scheduler_from_config({})


@pytest.mark.parametrize("kind", SCHEDULERS.values(), ids=SCHEDULERS)
def test_absent_keys_have_the_defaults_of_the_class(kind: SchedulerKind) -> None:
    defaults = dict(getattr(diffusers, kind.diffusers)().config)
    bare = {"_class_name": kind.diffusers}
    assert kind.fields.keys() <= defaults.keys()
    assert scheduler_from_config(bare) == scheduler_from_config({**defaults, **bare})


def test_a_configuration_survives_strict_json() -> None:
    """A manifest is strict JSON, which turns the infinity in DPM-Solver's defaults into null."""
    config = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -math.inf}
    assert scheduler_from_config(msgspec.json.decode(msgspec.json.encode(config))) == scheduler_from_config(config)


def test_keys_of_other_classes_are_ignored() -> None:
    assert scheduler_from_config({**DDPM, "set_alpha_to_one": "?", "who": 1}) == scheduler_from_config(DDPM)


def test_samplers_are_values() -> None:
    assert scheduler_from_config(DDPM, "ddpm") == scheduler_from_config(DDPM)
    assert hash(scheduler_from_config(DDPM)) != hash(scheduler_from_config({**DDPM, "steps_offset": 1}))
