"""The tables of the forward process against diffusers'."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

from kandrt.runtime.noise_schedule import NoiseSchedule


@pytest.mark.parametrize(
    ("kind", "start", "end"),
    [
        ("linear", 0.00085, 0.012),
        ("linear", 1e-4, 0.02),
        ("scaled_linear", 0.00085, 0.012),
        ("squaredcos_cap_v2", 0, 0),
    ],
)
@pytest.mark.parametrize("length", [1, 2, 3, 77, 1000])
def test_tables_equal_the_oracle(kind: str, start: float, end: float, length: int) -> None:
    schedule = NoiseSchedule(kind, start, end, length)
    oracle = diffusers.DDPMScheduler(length, beta_schedule=kind, beta_start=start, beta_end=end)
    # An equal last bit needs torch's fused multiply-add, which not every processor has.
    np.testing.assert_allclose(schedule.betas, oracle.betas.numpy(), rtol=2.5e-7, atol=0)
    np.testing.assert_allclose(schedule.alphas_cumprod, oracle.alphas_cumprod.numpy(), rtol=1e-6, atol=0)
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == np.float32


def test_weights_of_signal_and_noise() -> None:
    schedule = NoiseSchedule("squaredcos_cap_v2")
    assert schedule.alpha_sigma(-1) == (1.0, 0.0)  # the clean sample
    for t in (0, 500, 999):
        alpha, sigma = schedule.alpha_sigma(t)
        # each square is a float32 root's, so off by two of its roundings (6e-8 each) at most
        assert alpha**2 == pytest.approx(float(schedule.alphas_cumprod[t]), rel=2.5e-7)
        assert alpha**2 + sigma**2 == pytest.approx(1, abs=2.5e-7)
