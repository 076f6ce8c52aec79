"""The denoising loop alone: a fake network, arrays of a strict library, and a literal restatement to compare with."""

from __future__ import annotations

import json
from typing import Any

import array_api_strict
import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from kandrt.engines.errors import InputError, NumericalError
from kandrt.runtime.sampling import Inpaint, denoise, guided
from kandrt.runtime.schedulers import Scheduler, scheduler_from_config
from kandrt.scripts import overhead

from .oracle import SeededNoise, row_of

F32 = NDArray[np.float32]
B, C, H, W, D = 3, 4, 2, 5, 6

COMMON = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "clip_sample": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "ddpm": {"_class_name": "DDPMScheduler", **COMMON},
    "learned": {"_class_name": "DDPMScheduler", **COMMON, "variance_type": "learned_range"},
    "ddim": {"_class_name": "DDIMScheduler", **COMMON},
    "dpmpp-2m": {"_class_name": "DPMSolverMultistepScheduler", **COMMON},
    "unclip": {"_class_name": "UnCLIPScheduler", "prediction_type": "sample"},
}


class Network:
    """A session whose prediction depends on every input and every row by itself."""

    inputs = outputs = ()

    def __init__(self, xp: Any, channels: int = 2 * C) -> None:
        self.xp, self.channels, self.calls = xp, channels, 0

    def __call__(self, **arrays: Any) -> dict[str, Any]:
        xp, sample = self.xp, arrays["sample"]
        assert all(type(array).__module__ == type(xp.zeros(1)).__module__ for array in arrays.values())
        self.calls += 1
        axes = tuple(range(1, sample.ndim))
        total = sum(xp.sum(arrays[name], axis=tuple(range(1, arrays[name].ndim))) for name in sorted(arrays))
        total = xp.reshape(total, (-1, *(1 for _ in axes)))
        out = xp.sin(0.1 * total + 0.3 * sample)
        return {"prediction": xp.concat([out] * (self.channels // sample.shape[1]), axis=1)}

    def close(self) -> None:
        raise AssertionError("the loop closes nothing")


def arrays(xp: Any, rows: int, steps: int, per_sample: bool) -> tuple[Any, dict[str, Any]]:
    """An embedding a timestep, for each sample or for all, and one row of context a sample."""
    generator = np.random.default_rng(5)
    embedding = generator.standard_normal((steps, rows, D), np.float32)
    context = generator.standard_normal((rows, 2, D), np.float32)
    return xp.asarray(embedding if per_sample else embedding[:, 0]), {"context": xp.asarray(context)}


def inpaint(xp: Any) -> Inpaint:
    generator = np.random.default_rng(6)
    latents, noise = (generator.standard_normal((B, C, H, W), np.float32) for _ in range(2))
    mask = (generator.random((B, 1, H, W)) < 0.5).astype(np.float32)
    return Inpaint(xp.asarray(latents), xp.asarray(mask), xp.asarray(noise))


def run(xp: Any, config: str, scale: float | None, per_sample: bool = True, keep: bool = False) -> list[Any]:
    scheduler = scheduler_from_config(CONFIGS[config])
    rows = B if scale is None else 2 * B
    timesteps = scheduler.timesteps(4)
    embedding, context = arrays(xp, rows, 4, per_sample)
    x = np.random.default_rng(8).standard_normal((B, C, H, W), np.float32)
    network = Network(xp)
    loop = denoise(
        network, scheduler, x, timesteps, embedding, context,
        scale=scale, noise=SeededNoise(), inpaint=inpaint(xp) if keep else None,
    )  # fmt: skip
    result = list(loop)
    assert network.calls == len(result) == 4
    return result


def restated(config: str, scale: float | None, per_sample: bool = True, keep: bool = False) -> list[F32]:
    """The same in NumPy, as the pipelines of diffusers spell it out."""
    scheduler: Scheduler = scheduler_from_config(CONFIGS[config])
    timesteps = scheduler.timesteps(4)
    embedding, context = arrays(np, B if scale is None else 2 * B, 4, per_sample)
    x: Any = np.random.default_rng(8).standard_normal((B, C, H, W), np.float32)
    network, kept, noise = Network(np), inpaint(np), SeededNoise()
    history, result = None, []
    for i, t in enumerate(timesteps):
        t_prev = -1 if i + 1 == len(timesteps) else int(timesteps[i + 1])
        sample = x if scale is None else np.concatenate([x, x])
        row = embedding[i] if per_sample else np.stack([embedding[i]] * len(sample))
        more = {}
        if keep:
            channels = np.concatenate([kept.latents * kept.mask, kept.mask], axis=1)
            more = {"concat_latents": np.concatenate([channels] * (len(sample) // B))}
        out = network(sample=sample, embedding=row, **context, **more)["prediction"]
        eps, variance = out[:, :C], out[:, C:]
        if scale is not None:
            eps = eps[:B] + np.float32(scale) * (eps[B:] - eps[:B])
            variance = variance[B:]
        both = np.concatenate([eps, variance], axis=1) if config == "learned" else eps
        x, history = scheduler.step(both, x, int(t), t_prev, noise, history)
        if keep:
            known = kept.latents if t_prev < 0 else scheduler.add_noise(kept.latents, kept.noise, t_prev)
            x = kept.mask * known + (1 - kept.mask) * x
        result.append(x)
    return result


@pytest.mark.parametrize("keep", [False, True], ids=["", "inpaint"])
@pytest.mark.parametrize("scale", [None, 4.0], ids=["plain", "guided"])
@pytest.mark.parametrize("config", ["ddpm", "learned", "ddim", "dpmpp-2m"])
def test_loop_with_strict_arrays(config: str, scale: float | None, keep: bool) -> None:
    """array_api_strict refuses every hidden conversion, so the loop would run on a GPU's arrays too."""
    expected = restated(config, scale, keep=keep)
    for found, wanted in zip(run(array_api_strict, config, scale, keep=keep), expected, strict=True):
        assert isinstance(found, array_api_strict.asarray(0.0).__class__)
        assert found.dtype == array_api_strict.float32
        # the strict library computes with NumPy; only the order of operations may differ
        np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=1e-5)
    for found, wanted in zip(run(np, config, scale, keep=keep), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("xp", [np, array_api_strict])
@pytest.mark.parametrize("scale", [None, 4.0])
def test_an_embedding_for_all_samples(xp: Any, scale: float | None) -> None:
    """The prior's is [T, C], a UNet's [T, N, C]."""
    found = run(xp, "ddpm", scale, per_sample=False)
    for ours, wanted in zip(found, restated("ddpm", scale, per_sample=False), strict=True):
        np.testing.assert_allclose(np.asarray(ours), wanted, rtol=0, atol=1e-5)


def test_two_axes() -> None:
    """The prior's samples are [B, D]."""
    scheduler = scheduler_from_config(CONFIGS["unclip"])
    for xp in (np, array_api_strict):
        embedding, context = arrays(xp, 2 * B, 3, per_sample=False)
        x = np.random.default_rng(8).standard_normal((B, D), np.float32)
        loop = denoise(
            Network(xp, channels=D),
            scheduler,
            x,
            scheduler.timesteps(3),
            embedding,
            context,
            scale=2,
            noise=SeededNoise(),
        )
        assert [each.shape for each in loop] == [(B, D)] * 3


@pytest.mark.parametrize("config", ["ddpm", "learned", "dpmpp-2m"])
def test_rows_do_not_know_each_other(config: str) -> None:
    scheduler = scheduler_from_config(CONFIGS[config])
    timesteps = scheduler.timesteps(4)
    embedding, context = arrays(np, 2 * B, 4, per_sample=True)
    x = np.random.default_rng(8).standard_normal((B, C, H, W), np.float32)
    kept = inpaint(np)
    together = list(
        denoise(Network(np), scheduler, x, timesteps, embedding, context, scale=3.0, noise=SeededNoise(), inpaint=kept)
    )[-1]
    for row in range(B):
        both = [row, B + row]
        both_context = {"context": context["context"][both]}
        alone = Inpaint(kept.latents[row : row + 1], kept.mask[row : row + 1], kept.noise[row : row + 1])
        loop = denoise(
            Network(np), scheduler, x[row : row + 1], timesteps, embedding[:, both], both_context,
            scale=3.0, noise=row_of(SeededNoise(), row, B), inpaint=alone,
        )  # fmt: skip
        np.testing.assert_allclose(list(loop)[-1], together[row : row + 1], rtol=0, atol=1e-5)


def test_inpainting_ends_with_the_clean_region() -> None:
    kept = inpaint(np)
    final = run(np, "ddpm", 4.0, keep=True)[-1]
    mask = np.broadcast_to(kept.mask, final.shape) == 1
    np.testing.assert_array_equal(final[mask], kept.latents[mask])


def test_guidance() -> None:
    """u + w (c - u), negative rows first; the variance is the positive rows', where the sampler takes one."""
    generator = np.random.default_rng(0)
    out = generator.standard_normal((2 * B, 2 * C, H, W), np.float32)
    x = np.zeros((B, C, H, W), np.float32)
    expected = out[:B, :C] + 4 * (out[B:, :C] - out[:B, :C])
    np.testing.assert_allclose(guided(out, x, 4.0, learned_variance=False), expected, rtol=0, atol=1e-5)
    with_variance = guided(out, x, 4.0, learned_variance=True)
    np.testing.assert_array_equal(with_variance[:, C:], out[B:, C:])
    np.testing.assert_array_equal(guided(out[:B], x, None, learned_variance=True), out[:B])
    np.testing.assert_array_equal(guided(out[:B], x, None, learned_variance=False), out[:B, :C])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("xp", [np, array_api_strict])
def test_nan_names_the_step(xp: Any, bad: float) -> None:
    scheduler = scheduler_from_config(CONFIGS["ddpm"])
    embedding, context = arrays(xp, B, 4, per_sample=True)

    class Breaks(Network):
        def __call__(self, **given: Any) -> dict[str, Any]:
            out = super().__call__(**given)["prediction"]
            if self.calls == 3:
                out[B - 1, 2 * C - 1, 0, 0] = (
                    bad  # in the variance, which nobody uses: the network is broken all the same
                )
            return {"prediction": out}

    loop = denoise(
        Breaks(xp), scheduler, np.zeros((B, C, H, W), np.float32), scheduler.timesteps(4), embedding, context,
        scale=None, noise=SeededNoise(),
    )  # fmt: skip
    next(loop)
    next(loop)
    with pytest.raises(
        NumericalError, match=r"step 3 of 4 \(timestep 251\): the network's output holds NaN or infinity"
    ):
        next(loop)


def test_nothing_runs_before_it_is_asked_for() -> None:
    """A generator: what is not taken from it is not computed, so a caller cancels by leaving."""
    scheduler = scheduler_from_config(CONFIGS["ddpm"])
    embedding, context = arrays(np, B, 4, per_sample=True)
    network, noise = Network(np), SeededNoise()
    x = np.zeros((B, C, H, W), np.float32)
    loop = denoise(network, scheduler, x, scheduler.timesteps(4), embedding, context, scale=None, noise=noise)
    assert (network.calls, noise.shapes) == (0, [])
    next(loop)
    assert (network.calls, noise.shapes) == (1, [(B, C, H, W)])


def test_the_start_is_left_alone() -> None:
    scheduler = scheduler_from_config(CONFIGS["ddpm"])
    embedding, context = arrays(np, B, 4, per_sample=True)
    x = np.ones((B, C, H, W), np.float32)
    given = dict(context)
    list(
        denoise(
            Network(np), scheduler, x, scheduler.timesteps(4), embedding, context,
            scale=None, noise=SeededNoise(), inpaint=inpaint(np),
        )
    )  # fmt: skip
    np.testing.assert_array_equal(x, np.ones_like(x))
    assert context.keys() == given.keys()


def test_a_prediction_of_another_shape() -> None:
    scheduler = scheduler_from_config(CONFIGS["learned"])
    embedding, context = arrays(np, B, 4, per_sample=True)
    x = np.zeros((B, C, H, W), np.float32)
    loop = denoise(
        Network(np, channels=C),
        scheduler,
        x,
        scheduler.timesteps(4),
        embedding,
        context,
        scale=None,
        noise=SeededNoise(),
    )
    with pytest.raises(InputError, match="expected a prediction of shape"):
        next(loop)


# What the host does in a step


def test_overhead_is_that_of_the_loop_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage is measured, and a step's parts are its whole; how long they take is not a matter of a test."""
    overhead.command(steps=20, json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in rows] == list(overhead.SIZES)
    for row in rows:
        assert all(value >= 0 for name, value in row.items() if name != "stage")
        assert row["noise"] > 0
        assert row["inputs"] <= row["overhead"] <= row["total"]  # step by step one is a part of the next
    wide = Console(width=200)  # on a narrow one words are broken
    monkeypatch.setattr(overhead, "stdout", lambda: wide)
    overhead.show([overhead.Row(**row) for row in rows])
    shown = capsys.readouterr().out
    assert all(text in shown for text in (*overhead.SIZES, *overhead.TEXTS.values()))
