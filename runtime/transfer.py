"""Arrays on their way: to a device and back, and noise drawn on the host while a device computes.

Every conversion between array libraries is in this file; all other arithmetic stays in the library of its arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_cupy_array
from numpy.typing import NDArray

from ..engines.session import Array, Session
from .noise import Noise, NoiseSource


def to_host(array: Array) -> NDArray[Any]:
    """An array of any library as a NumPy array; waits until a device has computed it."""
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "get"):  # CuPy, which refuses every conversion that is not by this name
        return np.asarray(array.get())
    return np.from_dlpack(array) if hasattr(array, "__dlpack__") else np.asarray(array)


def to_device(array: Array, like: Array) -> Array:
    """`array` in the library and on the device of `like`; itself where it is there already.

    CuPy copies a host's array into pinned memory and from there on the current stream: nothing waits for the device.
    """
    if isinstance(like, np.ndarray):
        return to_host(array)
    if type(array) is type(like) and device(array) == device(like):
        return array
    return array_namespace(like).asarray(to_host(array), device=device(like))


def mover(session: Session, device: str | None) -> Callable[[Array], Array]:
    """What brings arrays to where a session computes.

    A session may say so itself, by a method `to_device(array)`. Of others the name of their device tells: CuPy arrays
    on "cuda", NumPy arrays elsewhere; None leaves arrays as they are.
    """
    own: Callable[[Array], Array] | None = getattr(session, "to_device", None)
    if own is not None:
        return own
    return MOVERS.get(device, to_host)


def _to_cuda(array: Array) -> Array:
    if is_cupy_array(array):
        return array
    return import_module("array_api_compat.cupy").asarray(to_host(array))


MOVERS: Mapping[str | None, Callable[[Array], Array]] = {None: lambda array: array, "cuda": _to_cuda}


@contextmanager
def ahead(noise: Noise, shape: tuple[int, ...], count: int, like: Array) -> Iterator[Noise]:
    """`noise` for a loop that draws `count` arrays of `shape` and computes where `like` is.

    Draws that a seed determines are made in a thread, one ahead of the one in use, so that a device does not wait for
    the host's generator even where calling the network does. Their order and number stay those of a loop that draws
    when it needs to; one that is left early has drawn one more. A caller's own noise is called when it is needed, in
    the caller's thread, and so is all noise on the CPU, which has nothing to do meanwhile but to compute.
    """
    seeded = isinstance(noise, NoiseSource) and noise.seed is not None
    if isinstance(like, np.ndarray) or not seeded or count == 0:
        yield noise
        return
    with ThreadPoolExecutor(1, "kandrt-noise") as pool:
        pending: list[Future[Array]] = [pool.submit(noise, shape)]
        left = count - 1

        def draw(_: tuple[int, ...]) -> Array:
            nonlocal left
            drawn = pending.pop().result()
            if left > 0:
                left -= 1
                pending.append(pool.submit(noise, shape))
            return drawn

        yield draw
