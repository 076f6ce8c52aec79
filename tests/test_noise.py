"""The noise against torch's CPU generator, draw after draw, and the rules about seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kandrt.engines.errors import InputError
from kandrt.runtime.noise import TorchNoise, make_noise

# log, sin and cos of torch and of NumPy differ in the last bit; of values up to 6 that is 5e-7.
TOLERANCE = 1e-6
SEEDS = [0, 1, 43, 2**32 - 1, 2**32, 2**32 + 43, 2**63, 2**64 - 1]
SHAPES: list[tuple[int, ...]] = [
    *((size,) for size in (0, 1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 47, 48, 100, 623, 624, 625, 1000)),
    (),
    (2, 0, 3),
    (2, 3),
    (1, 1280),
    (2, 4, 3, 5),
    (1, 4, 96, 96),
    (3, 4, 9, 7),
]


def torch_draws(seed: int, shapes: list[tuple[int, ...]]) -> list[NDArray[np.float32]]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for shape in shapes]


def assert_equal_draws(seed: int, shapes: list[tuple[int, ...]]) -> None:
    noise = TorchNoise(seed)
    for index, (shape, expected) in enumerate(zip(shapes, torch_draws(seed, shapes), strict=True)):
        found = noise(shape)
        assert found.dtype == np.float32
        assert found.shape == shape
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=TOLERANCE, err_msg=f"seed {seed}, draw {index} {shape}"
        )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_first_draw_equals_torch(seed: int, shape: tuple[int, ...]) -> None:
    assert_equal_draws(seed, [shape])


@pytest.mark.parametrize("seed", SEEDS)
def test_sequences_of_draws_equal_torch(seed: int) -> None:
    assert_equal_draws(seed, SHAPES)
    assert_equal_draws(seed, [(1, 1280)] * 3 + [(1, 4, 8, 8)] * 4)
    # A small odd draw leaves half a pair; it waits through large draws of both kinds for the next small one.
    assert_equal_draws(seed, [(3,), (64,), (5,), (37,), (1,), (2,), (0,), (1,), (16,), (15,), (17,), (4,)])


@pytest.mark.parametrize("seed", range(5))
def test_random_sequences_equal_torch(seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(0, 40, 60).tolist()
    assert_equal_draws(seed, [(size,) for size in sizes])


def test_a_picture_sized_draw_equals_torch() -> None:
    """2**20 + 5 values pass the tails: the smallest uniforms, where the logarithm is largest."""
    assert_equal_draws(7, [(2**20 + 5,), (3,)])


def test_only_the_low_32_bits_of_a_seed_count() -> None:
    np.testing.assert_array_equal(TorchNoise(2**32 + 43)((20,)), TorchNoise(43)((20,)))
    assert not np.array_equal(TorchNoise(44)((20,)), TorchNoise(43)((20,)))


def test_numpy_global_state_is_not_touched() -> None:
    before = np.random.get_state(legacy=False)  # noqa: NPY002, the state in question
    TorchNoise(3)((100,))
    after = np.random.get_state(legacy=False)  # noqa: NPY002, the state in question
    np.testing.assert_array_equal(before["state"]["key"], after["state"]["key"])
    assert before["state"]["pos"] == after["state"]["pos"]


@pytest.mark.parametrize(
    "seed", [-1, 2**64, True, False, 1.0, "1", b"1", math.nan, np.bool_(True), [1, -1], [1, True], [None]]
)
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(InputError, match="seed: expected an int of 0 to"):
        make_noise(seed)


def test_torch_noise_checks_its_seed_and_shape() -> None:
    with pytest.raises(InputError, match="found -1"):
        TorchNoise(-1)
    for shape in [(2, -1), (2.0,), (True,)]:
        with pytest.raises(InputError, match="noise shape"):
            TorchNoise(0)(shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [43, np.int64(43), [43], (43,)])
def test_one_seed(seed: Any) -> None:
    noise = make_noise(seed)
    assert noise.seed == 43
    assert type(noise.seed) is int
    shapes = [(2, 4, 8, 8), (2, 3), (2, 4, 8, 8)]
    for shape, expected in zip(shapes, torch_draws(43, shapes), strict=True):
        np.testing.assert_allclose(noise(shape), expected, rtol=0, atol=TOLERANCE)


def test_a_seed_a_picture_draws_each_row_as_if_alone() -> None:
    seeds, shapes = [5, 0, 5], [(3, 4, 5, 7), (3, 2), (3, 4, 5, 7)]
    noise = make_noise(seeds)
    assert noise.seed == (5, 0, 5)
    rows = [torch_draws(seed, [(1, *shape[1:]) for shape in shapes]) for seed in seeds]
    for index, shape in enumerate(shapes):
        expected = np.concatenate([row[index] for row in rows])
        found = noise(shape)
        assert found.shape == shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), ()])
def test_as_many_seeds_as_pictures(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="2 seeds for a draw of shape"):
        make_noise([1, 2])(shape)


def test_empty_list_of_seeds() -> None:
    with pytest.raises(InputError, match="empty list"):
        make_noise([])


def test_no_seed_is_a_random_one_that_can_be_read_and_used_again() -> None:
    first, second = make_noise(None), make_noise()
    assert isinstance(first.seed, int)
    assert first.seed != second.seed  # equal once in 4 billion runs
    np.testing.assert_array_equal(first((2, 20)), make_noise(first.seed)((2, 20)))


def test_seed_zero_is_a_seed() -> None:
    assert make_noise(0).seed == 0
    np.testing.assert_array_equal(make_noise(0)((20,)), TorchNoise(0)((20,)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_own_noise_is_converted(dtype: Any) -> None:
    values = np.arange(6).reshape(2, 3)
    noise = make_noise(noise=lambda shape: values.astype(dtype).reshape(shape))
    assert noise.seed is None
    assert noise((2, 3)).dtype == np.float32
    np.testing.assert_array_equal(noise((2, 3)), values)


def test_own_noise_may_be_a_torch_tensor() -> None:
    noise = make_noise(noise=torch.ones)
    np.testing.assert_array_equal(noise((2, 3)), np.ones((2, 3), np.float32))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (np.zeros((3, 2), np.float32), r"noise\(2, 3\): expected floats of that shape, found float32\[3, 2\]"),
        (np.zeros((2, 3), np.int64), "found int64"),
        (np.zeros((2, 3), np.complex64), "found complex64"),
        (np.full((2, 3), np.nan), "6 of 6 values are not finite"),
        (
            np.array([[1e300, 0, 0], [0, 0, math.inf]]),
            "2 of 6 values are not finite",
        ),  # one of them too large for float32
        (None, "found object"),
        ([[1.0], [1.0, 2.0]], "expected a NumPy float array, found list"),
    ],
)
def test_own_noise_is_checked(result: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_noise(noise=lambda _: result)((2, 3))


def test_seed_and_noise_exclude_each_other() -> None:
    for seed in (0, 43, [1, 2]):
        with pytest.raises(InputError, match="seed and noise were both given"):
            make_noise(seed, np.zeros)


def test_noise_must_be_callable() -> None:
    with pytest.raises(InputError, match=r"noise: expected a callable.*found ndarray"):
        make_noise(noise=np.zeros((2, 3)))  # type: ignore[arg-type]
