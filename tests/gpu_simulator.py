"""A simulator of a GPU, as much of one as `kandrt.engines.cuda.Device` shows: for tests on machines without one.

It computes with NumPy, at once, and keeps the books that a GPU keeps: addresses, a memory pool that gives blocks back
to the stream they came from, streams and events with the order that they promise, and captures. Whatever would be
undefined behaviour there is an error here: work that touches a block in no promised order after other work on it,
memory that was given back, waiting or allocating while a graph is captured. `counts` says how often the host waited
("waits"), memory was allocated, graphs were captured and replayed, and more.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from array_api_compat import numpy as xnp

from kandrt.engines.cuda import Activations

ALIGNMENT = 256
DEFAULT, SHARED, CAPTURING = 0, 7, 8  # handles of streams
CUDA = 2  # DLPack's number


class GpuError(AssertionError):
    """What a GPU would not have survived, or not have said."""


class Block:
    """Memory at an address, with the moments at which streams last read and wrote it."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size, self.live = address, size, True
        self.data = np.zeros(size, np.uint8)
        self.reads: dict[int, int] = {}
        self.writes: dict[int, int] = {}


class Lease:
    """A block of the pool, for as long as an array or a view of it lives."""

    def __init__(self, gpu: Gpu, block: Block, stream: int) -> None:
        self.gpu, self.block, self.stream = gpu, block, stream

    def __del__(self) -> None:
        self.block.live = False
        self.gpu.pool.setdefault((self.stream, self.block.size), []).append(self.block)


class Borrowed:
    """Memory that a library lent, with what keeps it from giving it to others."""

    def __init__(self, block: Block, owner: object) -> None:
        self.block, self.owner = block, owner


class Gpu:
    """The device, a `kandrt.engines.cuda.Device`."""

    index = 0

    def __init__(self, total: int = 2**30) -> None:
        self.lock, self._books = threading.RLock(), threading.RLock()
        self.activations = Activations(self)
        self.counts: Counter[str] = Counter()
        self.total, self.used = total, 0
        self.blocks: dict[int, Block] = {}
        self.pool: dict[tuple[int, int], list[Block]] = {}
        self.freed: list[str] = []
        self.nodes: list[Callable[[int], None]] | None = None
        self._capturer: int | None = None
        self._next = 0x7F0000000000
        self._clocks: dict[int, dict[int, int]] = {}
        self._host: dict[int, int] = {}
        self._thread = threading.local()

    # The order of work: each stream has a clock, and knows the times of other streams that it has waited for

    @property
    def current(self) -> int:
        """The calling thread's current stream, as CuPy has it."""
        return getattr(self._thread, "stream", DEFAULT)

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before, self._thread.stream = self.current, stream
        try:
            yield
        finally:
            self._thread.stream = before

    def work(self, stream: int, reads: Sequence[Block], writes: Sequence[Block]) -> None:
        """Note work on a stream; GpuError unless all earlier work on what it touches is promised to be done."""
        with self._books:
            clock = self._clocks.setdefault(stream, {})
            merge(clock, self._host)
            for blocks, earlier in ((reads, ("writes",)), (writes, ("writes", "reads"))):
                for block in blocks:
                    if not block.live:
                        raise GpuError(f"work on memory at {block.address:#x}, which was given back")
                    for kind in earlier:
                        late = {s: t for s, t in getattr(block, kind).items() if s != stream and clock.get(s, 0) < t}
                        if late:
                            raise GpuError(f"stream {stream} does not wait for the {kind} of {late} at {block.address}")
            clock[stream] = clock.get(stream, 0) + 1
            for block in reads:
                block.reads[stream] = clock[stream]
            for block in writes:
                block.writes[stream] = clock[stream]

    def join(self, later: int, earlier: int) -> None:
        """Work on one stream comes after what was queued on another so far: an event recorded and waited for."""
        with self._books:
            merge(self._clocks.setdefault(later, {}), self._clocks.setdefault(earlier, {}))

    @contextmanager
    def ordered(self) -> Iterator[None]:
        self.join(SHARED, self.current)
        try:
            yield
        finally:
            self.join(self.current, SHARED)

    def wait(self, stream: int) -> None:
        """The host waits for a stream."""
        self._forbid("waiting")
        self.counts["waits"] += 1
        with self._books:
            merge(self._host, self._clocks.setdefault(stream, {}))

    def synchronize(self) -> None:
        self.wait(SHARED)

    @property
    def stream(self) -> int:
        return SHARED

    # Memory

    def allocate(self, size: int) -> int:
        self.counts["allocations"] += 1
        return self._new(size).address

    def idle(self, block: Block | None = None) -> bool:
        """Whether the host has waited for all work of sessions, or all that touched a block."""
        if block is None:
            return self._host.get(SHARED, 0) >= self._clocks.get(SHARED, {}).get(SHARED, 0)
        return all(self._host.get(s, 0) >= time for times in (block.reads, block.writes) for s, time in times.items())

    def free(self, address: int) -> None:
        self._forbid("cudaFree")
        block = self.blocks.pop(address)
        if not self.idle(block):
            raise GpuError("memory is given back that queued work uses")
        block.live = False
        self.used -= block.size
        self.freed.append("memory")

    def trim(self) -> None:
        for blocks in self.pool.values():
            for block in blocks:
                self.used -= block.size
                del self.blocks[block.address]
            blocks.clear()

    def memory(self) -> tuple[int, int]:
        return self.total - self.used, self.total

    def lease(self, size: int) -> Lease:
        """Memory for an array: a block that was given back on the same stream, or a new one."""
        rounded = -(-max(size, 1) // 512) * 512
        with self._books:
            kept = self.pool.get((self.current, rounded))
            block = kept.pop() if kept else self._new(rounded)
            block.live = True
            return Lease(self, block, self.current)

    def at(self, address: int, size: int) -> tuple[Block, Any]:
        """The block and the bytes at an address; GpuError where they are not all there."""
        for block in self.blocks.values():
            offset = address - block.address
            if 0 <= offset < block.size and offset + size <= block.size and block.live:
                return block, block.data[offset : offset + size]
        raise GpuError(f"illegal address {address:#x} with {size} bytes")

    def _new(self, size: int) -> Block:
        self._forbid("allocating")
        if self.used + size > self.total:
            raise MemoryError(f"{size} bytes")
        self.used += size
        block = Block(self._next, size)
        self._next += (-(-size // ALIGNMENT) + 1) * ALIGNMENT
        self.blocks[block.address] = block
        return block

    # Arrays

    def empty(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        view = np.empty(tuple(shape), dtype)
        lease = self.lease(view.nbytes)
        lease.block.data[:] = 0xFF  # NaN, for whoever reads what was never written
        return DeviceArray(self, lease, lease.block.data[: view.nbytes].view(view.dtype).reshape(view.shape))

    def upload(self, array: Any, dtype: Any = None) -> DeviceArray:
        """An array of the host copied, without waiting."""
        self.counts["uploads"] += 1
        source = np.asarray(array, dtype)
        target = self.empty(source.shape, source.dtype)
        self.work(self.current, [], [target.block])
        target.view[...] = source
        return target

    def to_device(self, array: Any) -> DeviceArray:
        if not isinstance(array, DeviceArray):
            return self.upload(array)
        return array if array.view.flags.c_contiguous else array.copy()

    def view(self, address: int, shape: Sequence[int], dtype: Any, owner: object) -> DeviceArray:
        block, data = self.at(address, math.prod(shape) * np.dtype(dtype).itemsize)
        return DeviceArray(self, Borrowed(block, owner), data.view(dtype).reshape(tuple(shape)))

    def address(self, array: DeviceArray) -> int:
        return array.address

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        if source.shape != target.shape or source.dtype != target.dtype:
            raise GpuError(f"copy of {source.dtype}{source.shape} to {target.dtype}{target.shape}")
        self.counts["copies"] += 1
        self.work(SHARED, [source.block], [target.block])
        target.view[...] = source.view

    # Graphs

    def capturing(self, stream: int) -> bool:
        return stream == CAPTURING and self.nodes is not None

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        self.counts["captures"] += 1
        self.nodes, self._capturer = [], threading.get_ident()
        try:
            work(CAPTURING)
            nodes = self.nodes
        finally:
            self.nodes = self._capturer = None
        return functools.partial(self._replay, nodes)

    def _replay(self, nodes: list[Callable[[int], None]]) -> None:
        self.counts["replays"] += 1
        for node in nodes:
            node(SHARED)

    def _forbid(self, what: str) -> None:
        if self.nodes is not None and self._capturer == threading.get_ident():
            raise GpuError(f"{what} while a graph is captured")


def merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)


class DeviceArray:
    """An array of the device: it computes there, and is of the host only by `get()`, which waits."""

    def __init__(self, gpu: Gpu, lease: Lease | Borrowed, view: Any) -> None:
        self.gpu, self.lease, self.view = gpu, lease, view

    block = property(lambda self: self.lease.block)
    shape = property(lambda self: self.view.shape)
    dtype = property(lambda self: self.view.dtype)
    ndim = property(lambda self: self.view.ndim)
    size = property(lambda self: self.view.size)
    nbytes = property(lambda self: self.view.nbytes)
    device = property(lambda self: "simulated")

    @property
    def address(self) -> int:
        start = self.view.__array_interface__["data"][0] - self.block.data.__array_interface__["data"][0]
        return int(self.block.address + start)

    def get(self) -> Any:
        self.gpu.work(self.gpu.current, [self.block], [])
        self.gpu.wait(self.gpu.current)
        return self.view.copy()

    def copy(self) -> DeviceArray:
        target = self.gpu.empty(self.shape, self.dtype)
        self.gpu.work(self.gpu.current, [self.block], [target.block])
        target.view[...] = self.view
        return target

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __bool__(self) -> bool:
        return bool(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return Namespace(self.gpu)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __getitem__(self, index: Any) -> DeviceArray:
        return DeviceArray(self.gpu, self.lease, self.view[index])


def compute(gpu: Gpu, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Queue a kernel: a view of an argument, or a new array."""
    found: list[DeviceArray] = []

    def plain(value: Any) -> Any:
        if isinstance(value, DeviceArray):
            found.append(value)
            return value.view
        if isinstance(value, np.ndarray):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value

    kwargs.pop("device", None)
    result = np.asarray(function(*plain(args), **{key: plain(value) for key, value in kwargs.items()}))
    for array in found:
        if result.base is not None and np.shares_memory(result, array.view):
            return DeviceArray(gpu, array.lease, result)
    target = gpu.empty(result.shape, result.dtype)
    gpu.work(gpu.current, [array.block for array in found], [target.block])
    target.view[...] = result
    return target


class Namespace:
    """The array API on the device."""

    __name__ = "simulated_gpu"

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def asarray(self, obj: Any, dtype: Any = None, device: Any = None, copy: bool | None = None) -> DeviceArray:
        if not isinstance(obj, DeviceArray):
            return self._gpu.upload(obj, dtype)
        return obj.copy() if copy else obj

    def __getattr__(self, name: str) -> Any:
        found = getattr(xnp, name)
        return (
            functools.partial(compute, self._gpu, found) if callable(found) and not isinstance(found, type) else found
        )


def operator_of(name: str) -> Callable[..., Any]:
    def operate(self: DeviceArray, *others: Any) -> Any:
        return compute(self.gpu, lambda *values: getattr(np.ndarray, name)(*values), self, *others)

    return operate


for _name in ("add", "sub", "mul", "truediv", "pow", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(DeviceArray, f"__{_name}__", operator_of(f"__{_name}__"))
for _name in ("radd", "rsub", "rmul", "rtruediv", "neg", "abs"):
    setattr(DeviceArray, f"__{_name}__", operator_of(f"__{_name}__"))
