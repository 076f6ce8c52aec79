"""The arithmetic between networks in the library and on the device of their arrays, in every mode.

array_api_strict's second device stands for a GPU: its arrays refuse to become NumPy arrays except by DLPack, to be
mixed with NumPy's or with those of another device, and everything that the array API does not promise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import array_api_strict as xp
import numpy as np
import pytest

from kandrt.engines.bundle import open_bundle
from kandrt.engines.errors import InputError
from kandrt.engines.session import Session
from kandrt.runtime import Embeds, Kandinsky, load, sampling, transfer
from kandrt.runtime.noise import NoiseSource, make_noise
from kandrt.runtime.sampling import denoise
from kandrt.runtime.schedulers import SCHEDULERS, scheduler_from_config
from kandrt.runtime.transfer import ahead, mover, to_device, to_host

from .oracle import SeededNoise, box, component, picture

DEVICE = xp.Device("device1")
StrictArray = type(xp.asarray(0.0))
SIZE: dict[str, Any] = {"height": 64, "width": 64}


class Strict:
    """A session on the strict device: takes and gives arrays that lie there, and counts what is brought there."""

    inputs = outputs = ()

    def __init__(self, session: Session) -> None:
        self.session, self.uploads, self.calls = session, 0, 0

    def to_device(self, array: Any) -> Any:
        if isinstance(array, StrictArray):
            return array
        self.uploads += 1
        return xp.asarray(array, device=DEVICE)

    def __call__(self, **arrays: Any) -> dict[str, Any]:
        wrong = [name for name, array in arrays.items() if not isinstance(array, StrictArray) or array.device != DEVICE]
        assert not wrong, f"not on the device: {', '.join(wrong)}"
        self.calls += 1
        found = self.session(**{name: np.array(array._array) for name, array in arrays.items()})
        return {name: xp.asarray(array, device=DEVICE) for name, array in found.items()}

    def close(self) -> None:
        raise AssertionError("a caller's session was closed")


@pytest.fixture(scope="module")
def sessions(bundle: Path) -> dict[str, Session]:
    return {name: component(bundle, name) for name in open_bundle(bundle).manifest.components}


@pytest.fixture(scope="module")
def k(bundle: Path, sessions: dict[str, Session]) -> Kandinsky:
    return load(bundle, sessions=sessions)


@pytest.fixture(scope="module")
def strict(bundle: Path, sessions: dict[str, Session]) -> Kandinsky:
    return load(bundle, sessions={name: Strict(session) for name, session in sessions.items()})


EMBEDS = Embeds(*np.random.default_rng(1).standard_normal((2, 2, 32), np.float32))
HINT = np.asarray(picture(64, 64, 4), np.float32) / 255

PRIORS: dict[str, Callable[[Kandinsky, dict[str, Any]], Embeds]] = {
    "text": lambda k, noise: k.prior(["a cat", "a dog"], steps=3, count=2, **noise),
    "negative": lambda k, noise: k.prior("a cat", negative_prompt="ugly", steps=3, **noise),
    "no guidance": lambda k, noise: k.prior("a cat", guidance_scale=1.0, steps=2, **noise),
    "picture": lambda k, noise: k.prior("a cat", image=picture(70, 50), strength=0.7, steps=3, **noise),
    "interpolation": lambda k, noise: k.prior.interpolate(["a cat", picture(64, 64)], [0.4, 0.6], steps=2, **noise),
}
DECODERS: dict[str, dict[str, Any]] = {
    **{f"text, {name}": {"scheduler": name, "steps": 4} for name in SCHEDULERS if name != "unclip"},
    "no guidance": {"guidance_scale": 1.0, "count": 2},
    "image": {"image": picture(64, 64), "strength": 0.7},
    "inpaint": {"image": picture(64, 64), "mask": box(64, 64, 0.2, 0.3, 0.8, 0.9)},
    "inpaint, dpmpp-2m": {"image": picture(64, 64), "mask": box(64, 64, 0, 0, 0.5, 1), "scheduler": "dpmpp-2m"},
    "hint": {"hint": HINT},
    "hint and image": {"hint": HINT, "image": picture(64, 64), "strength": 0.7},
    "latents": {"latents": np.random.default_rng(2).standard_normal((2, 4, 8, 8), np.float32)},
}
# A seed is drawn from ahead, a caller's noise when it is needed; the two are to be the same.
NOISE: dict[str, Callable[[], dict[str, Any]]] = {
    "seed": lambda: {"seed": 7},
    "noise": lambda: {"noise": SeededNoise()},
}


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("mode", PRIORS)
def test_embeddings_are_those_of_numpy(k: Kandinsky, strict: Kandinsky, mode: str, noise: str) -> None:
    """Bit for bit: the strict library computes with NumPy, so every operation is the same, and in the same order."""
    expected, found = (PRIORS[mode](each, NOISE[noise]()) for each in (k, strict))
    np.testing.assert_array_equal(found.image_embeds, expected.image_embeds)
    np.testing.assert_array_equal(found.negative_image_embeds, expected.negative_image_embeds)


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("mode", DECODERS)
def test_pictures_are_those_of_numpy(k: Kandinsky, strict: Kandinsky, mode: str, noise: str) -> None:
    """Bit for bit, and so are the latents, which come back as NumPy arrays."""
    arguments = {**SIZE, "steps": 3, **DECODERS[mode]}
    expected, found = (each.decoder(EMBEDS, **arguments, **NOISE[noise]()) for each in (k, strict))
    assert type(found.latents) is np.ndarray
    np.testing.assert_array_equal(found.latents, expected.latents)
    np.testing.assert_array_equal(found.array, expected.array)


@pytest.mark.parametrize("seed", [7, [3, 4]], ids=["one", "several"])
def test_a_request_from_end_to_end(k: Kandinsky, strict: Kandinsky, seed: Any) -> None:
    """Prior and decoder draw from one source, one after the other; a negative prompt doubles the prior's draws."""
    arguments: dict[str, Any] = {"negative_prompt": "ugly", "count": 2, "steps": 3, "prior_steps": 3, "seed": seed}
    expected, found = (each("a cat", **SIZE, **arguments) for each in (k, strict))
    np.testing.assert_array_equal(found.array, expected.array)


# What lies on which device


@pytest.mark.parametrize("where", ["context", "step", "movq_decoder", "prior_step", "text_encoder"])
def test_components_on_different_devices(bundle: Path, k: Kandinsky, sessions: dict[str, Session], where: str) -> None:
    """Whichever component is on the device, its neighbours on the CPU, pictures are the same."""
    names = [name for name in sessions if name.endswith(where)]
    with load(bundle, threads=1, sessions={name: Strict(sessions[name]) for name in names}) as mixed:
        arguments: dict[str, Any] = {"steps": 2, "prior_steps": 2, "seed": 3, **SIZE}
        np.testing.assert_array_equal(mixed("a cat", **arguments).array, k("a cat", **arguments).array)


def test_a_context_is_brought_to_the_step_once_a_request(bundle: Path, sessions: dict[str, Session]) -> None:
    """embedding and added_kv, once each, however many steps there are; the sample never leaves the device."""
    for steps in (2, 5):
        step = Strict(sessions["decoder_step"])
        load(bundle, threads=1, sessions={"decoder_step": step}).decoder(EMBEDS, steps=steps, seed=1, **SIZE)
        assert (step.calls, step.uploads) == (steps, 2)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What reads a device's values, by name. Selecting by a mask does so too, and is refused."""
    seen: list[str] = []

    def watch(name: str) -> None:
        original = getattr(StrictArray, name)

        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(StrictArray, name, noted)

    for name in ("__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "__dlpack__"):
        watch(name)
    flags = xp.get_array_api_strict_flags()
    xp.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False)
    monkeypatch.setattr(xp, "clip", None)  # array_api_compat makes CuPy's of a selection by a mask
    monkeypatch.setattr(StrictArray, "__dlpack_device__", lambda array: (2, 0))  # says that it is CUDA's
    yield seen
    xp.set_array_api_strict_flags(**flags)


CONFIG = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "clip_sample": False}
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {"_class_name": kind.diffusers, **CONFIG} for name, kind in SCHEDULERS.items() if name != "unclip"},
    "clipped": {"_class_name": "DDPMScheduler", **CONFIG, "clip_sample": True},
    "thresholded": {"_class_name": "DDIMScheduler", **CONFIG, "thresholding": True},
    "learned": {"_class_name": "DDPMScheduler", **CONFIG, "variance_type": "learned_range"},
    "unclip": {"_class_name": "UnCLIPScheduler", "prediction_type": "sample"},
}


@pytest.mark.parametrize("keep", [False, True], ids=["", "inpaint"])
@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_in_the_loop_waits_for_the_device(config: str, keep: bool, watched: list[str]) -> None:
    """No value of an array is read between the first and the last step, as far as the loop itself is concerned."""
    scheduler, generator = scheduler_from_config(CONFIGS[config]), np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return xp.asarray(generator.standard_normal(shape, np.float32), device=DEVICE)

    def step(**arrays: Any) -> dict[str, Any]:
        return {"prediction": xp.concat([xp.sin(arrays["sample"])] * 2, axis=1)}

    kept = sampling.Inpaint(array(2, 4, 8, 8), xp.abs(array(2, 1, 8, 8)), array(2, 4, 8, 8)) if keep else None
    loop = denoise(
        step, scheduler, generator.standard_normal((2, 4, 8, 8), np.float32), scheduler.timesteps(4),  # type: ignore[arg-type]
        array(4, 4, 6), {}, scale=3.0, noise=make_noise(seed=1), inpaint=kept,
    )  # fmt: skip
    last = list(loop)[-1]
    assert watched == []
    assert last.device == DEVICE
    assert np.isfinite(to_host(last)).all()
    assert watched == ["__dlpack__"]


# Noise ahead of its use


class Drawn:
    """A seed's noise that notes who draws, and in which thread."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.threads: set[int] = set()
        self.fails_at = fails_at

    def __call__(self, shape: tuple[int, ...]) -> Any:
        self.shapes.append(shape)
        self.threads.add(threading.get_ident())
        if len(self.shapes) == self.fails_at:
            raise InputError("2 seeds for a draw of 3")
        return np.full(shape, len(self.shapes), np.float32)


LIKE = xp.zeros(1, device=DEVICE)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_draws_ahead_are_as_many_and_in_the_same_order(count: int) -> None:
    drawn = Drawn()
    with ahead(NoiseSource(drawn, seed=1), (2, 3), count, LIKE) as draw:
        found = [float(draw((2, 3))[0, 0]) for _ in range(count)]
    assert found == [1.0, 2.0, 3.0, 4.0][:count]
    assert drawn.shapes == [(2, 3)] * count
    assert threading.get_ident() not in drawn.threads


def test_a_loop_that_is_left_has_drawn_one_more() -> None:
    drawn = Drawn()
    with ahead(NoiseSource(drawn, seed=1), (2,), 9, LIKE) as draw:
        draw((2,))
        draw((2,))
    assert len(drawn.shapes) == 3


@pytest.mark.parametrize(
    ("noise", "like"),
    [
        pytest.param(lambda drawn: drawn, LIKE, id="a callable"),
        pytest.param(lambda drawn: NoiseSource(drawn, None), LIKE, id="a caller's noise"),
        pytest.param(lambda drawn: NoiseSource(drawn, 1), np.zeros(1), id="on the CPU"),
    ],
)
def test_other_noise_is_drawn_when_it_is_needed(noise: Callable[[Drawn], Any], like: Any) -> None:
    """A caller's function may do anything, so it is called where and when the loop would call it."""
    drawn = Drawn()
    with ahead(noise(drawn), (2,), 3, like) as draw:
        assert drawn.shapes == []
        draw((2,))
        assert drawn.shapes == [(2,)]
    assert drawn.threads == {threading.get_ident()}


def test_an_error_in_a_draw_is_the_loops() -> None:
    with ahead(NoiseSource(Drawn(fails_at=2), 1), (2,), 3, LIKE) as draw:
        draw((2,))
        with pytest.raises(InputError, match="2 seeds for a draw of 3"):
            draw((2,))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_scheduler_says_when_it_draws(config: str, steps: int) -> None:
    scheduler, x = scheduler_from_config(CONFIGS[config]), np.ones((1, 4), np.float32)
    levels = scheduler.timesteps(steps).tolist()
    pred = np.ones((1, 8 if scheduler.learned_variance else 4), np.float32)
    for t, t_prev in zip(levels, [*levels[1:], -1], strict=True):
        noise = SeededNoise()
        scheduler.step(pred, x, t, t_prev, noise)
        assert noise.shapes == [x.shape] * scheduler.draws(t)


# Moving arrays


def test_arrays_are_moved_only_where_they_are_elsewhere() -> None:
    host, strict = np.arange(3.0), xp.asarray(np.arange(3.0), device=DEVICE)
    assert to_device(host, host) is host
    assert to_device(strict, LIKE) is strict
    assert to_device(host, LIKE).device == DEVICE
    assert to_device(xp.asarray(host), LIKE).device == DEVICE
    assert to_host(host) is host
    np.testing.assert_array_equal(to_host(strict), host)
    np.testing.assert_array_equal(to_device(strict, host), host)


def test_a_cupy_array_comes_to_the_host_by_its_own_method() -> None:
    class Cupy:
        def get(self) -> Any:
            return np.ones(2)

        def __array__(self) -> Any:
            raise TypeError("Implicit conversion to a NumPy array is not allowed.")  # as CuPy does

    np.testing.assert_array_equal(to_host(Cupy()), np.ones(2))


def test_where_a_session_takes_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    session: Any = object()
    strict = xp.asarray(np.arange(3.0), device=DEVICE)
    assert mover(session, None)(strict) is strict
    assert isinstance(mover(session, "cpu")(strict), np.ndarray)
    assert mover(Strict(session), "cpu")(strict) is strict
    assert mover(session, "cuda") is transfer.MOVERS["cuda"]
