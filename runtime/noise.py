"""Noise that depends on the seed alone: torch's CPU generator without torch, and checks for a caller's own noise.

The stream is PyTorch's (ATen `mt19937`, `normal_fill` and `normal_distribution<double>`, torch 2.x on a CPU), because a
seed then gives the picture that it gives in diffusers.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..engines.errors import InputError

Array: TypeAlias = Any
Noise: TypeAlias = Callable[[tuple[int, ...]], Array]
"""Draws a standard-normal float32 array of the shape that it is called with; one call a tensor."""

_BLOCK = 16  # values that one vectorised Box-Muller step makes: 8 radii, 8 angles
_MAX_SEED = 2**64 - 1


class TorchNoise:
    """`torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` as NumPy arrays, draw after draw.

    Agrees with torch to 1e-6 absolute (the last bit of log, sin and cos differs between libraries). As in torch the
    seed is an int in [0, 2**64) of which the low 32 bits count. Calls advance the generator: the object has state.
    Raises InputError for any other seed, and for a shape that is not a tuple of lengths.
    """

    def __init__(self, seed: int) -> None:
        _check_seed(seed)
        self._bits = np.random.MT19937()
        # RandomState seeds as torch does (Knuth's init_genrand); MT19937(seed) would hash the seed first.
        state: Any = np.random.RandomState(int(seed) & 0xFFFFFFFF).get_state(legacy=False)
        self._bits.state = state
        self._spare: float | None = None

    def __call__(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Draw a standard-normal array, float32 of `shape`."""
        if not all(_is_int(length) and length >= 0 for length in shape):
            raise InputError(f"noise shape: expected lengths of 0 or more, found {shape!r}")
        size = math.prod(shape)
        values = self._blocks(size) if size >= _BLOCK else self._scalars(size)
        return values.reshape(shape)

    def _blocks(self, size: int) -> NDArray[np.float32]:
        """ATen normal_fill: whole blocks; a last part block is redrawn as a whole one that overlaps its neighbour."""
        uniforms = self._uniforms(size)
        whole = size - size % _BLOCK
        out = np.empty(size, np.float32)
        out[:whole] = _box_muller(uniforms[:whole])
        if whole < size:
            out[-_BLOCK:] = _box_muller(self._uniforms(_BLOCK))
        return out

    def _uniforms(self, size: int) -> NDArray[np.float32]:
        bits = self._bits.random_raw(size) & np.uint64(2**24 - 1)
        return bits.astype(np.float32) * np.float32(2.0**-24)

    def _scalars(self, size: int) -> NDArray[np.float32]:
        """ATen normal_distribution<double>: makes pairs; the second of a pair waits for the next small draw.

        Large draws between two small ones leave the waiting value alone.
        """
        out = np.empty(size, np.float32)
        for index in range(size):
            if self._spare is not None:
                out[index], self._spare = self._spare, None
                continue
            angle, radius = (
                2.0 * math.pi * self._uniform_double(),
                math.sqrt(-2.0 * math.log1p(-self._uniform_double())),
            )
            out[index], self._spare = radius * math.cos(angle), radius * math.sin(angle)
        return out

    def _uniform_double(self) -> float:
        high, low = (int(word) for word in self._bits.random_raw(2))
        return float((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def _box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    """ATen normal_fill_16 on [N * 16] uniforms of [0, 1): float32 throughout, because the rounded angle shows."""
    blocks = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - blocks[:, 0]))
    angle = np.float32(2.0 * math.pi) * blocks[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


@dataclass(frozen=True)
class NoiseSource:
    """A Noise together with the seed or seeds that repeat it (None where the caller brought the noise)."""

    draw: Noise
    seed: int | tuple[int, ...] | None

    def __call__(self, shape: tuple[int, ...]) -> Array:
        """Draw a standard-normal float32 array of `shape`."""
        return self.draw(shape)


def make_noise(seed: int | Sequence[int] | None = None, noise: Noise | None = None) -> NoiseSource:
    """Noise for one request: from a seed, from one seed a picture, from a random seed (None), or the caller's own.

    A list of seeds gives each row of a draw its own generator, so a picture does not depend on its neighbours; it must
    be as long as the draws' first axis. A list of one acts as its element, for any number of rows (as in diffusers).
    `noise` is called with each shape and must give finite floats of it.
    Raises InputError for a seed that is not an int in [0, 2**64), for an empty list, and for `seed` together with
    `noise`; a draw raises it where the list has another length, or the result of `noise` cannot be used.
    """
    if noise is not None:
        if seed is not None:
            raise InputError(f"seed and noise were both given (seed={seed!r}); give one, noise replaces the seed")
        if not callable(noise):
            raise InputError(f"noise: expected a callable noise(shape) -> float32 array, found {type(noise).__name__}")
        return NoiseSource(_Checked(noise), None)
    if seed is None:
        seed = secrets.randbits(32)
    if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)):
        if not seed:
            raise InputError("seed: expected an int or one int a picture, found an empty list")
        if len(seed) > 1:
            return NoiseSource(_Rows(tuple(TorchNoise(each) for each in seed)), tuple(int(each) for each in seed))
        seed = seed[0]
    _check_seed(seed)
    return NoiseSource(TorchNoise(int(seed)), int(seed))


@dataclass(frozen=True)
class _Rows:
    """One generator a row."""

    generators: tuple[TorchNoise, ...]

    def __call__(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if not shape or shape[0] != len(self.generators):
            raise InputError(
                f"{len(self.generators)} seeds for a draw of shape {tuple(shape)}: "
                "give one seed, or as many seeds as there are pictures"
            )
        return np.concatenate([draw((1, *shape[1:])) for draw in self.generators])


@dataclass(frozen=True)
class _Checked:
    """A caller's noise, its results checked."""

    noise: Noise

    def __call__(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        result = self.noise(shape)
        try:
            array = np.asarray(result)
        except (TypeError, ValueError) as error:
            raise InputError(f"noise{shape}: expected a NumPy float array, found {type(result).__name__}") from error
        if array.shape != tuple(shape) or array.dtype.kind != "f":
            raise InputError(f"noise{shape}: expected floats of that shape, found {array.dtype}{list(array.shape)}")
        with np.errstate(over="ignore"):  # becomes infinite, which the next check reports
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise InputError(f"noise{shape}: {int((~np.isfinite(array)).sum())} of {array.size} values are not finite")
        return array


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_seed(seed: object) -> None:
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed <= _MAX_SEED:
        raise InputError(f"seed: expected an int of 0 to 2**64 - 1, found {seed!r}")
