"""Memory, streams and CUDA graphs of a GPU: what sessions need of a CUDA library, and CuPy's.

Which work comes after which: TensorRT asks for a stream other than the default one, and activation memory is shared,
so all sessions of a process run on one stream. What happens to arrays between two calls runs on CuPy's current stream
of the calling thread, by default the default stream. `Device.ordered` joins the two by events, on the GPU, where no
host waits: what is queued inside comes after all that the thread has queued on its current stream, and before all that
it queues there next. So a caller need not know of the sessions' stream, `array.get()` waits for the right work, and a
program that makes another stream current (`with stream:`) is served as well.

Arrays are allocated on the caller's current stream before `ordered` is entered. CuPy's memory pool gives a freed block
to the same stream only, so a block's next user is queued after its last one, whichever threads they belong to.

Graphs are captured on a stream of their own: on the shared one, work of other threads would be captured with them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from threading import RLock
from typing import Any, Protocol

import numpy as np

from .session import Array
from .spec import DType

# DLPack's numbers of devices whose memory is the host's: CPU, and pinned for CUDA or ROCm
HOST_MEMORY = (1, 3, 11)
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class Device(Protocol):
    """A GPU; methods are called under `lock`, `to_device` and `synchronize` apart."""

    lock: RLock
    activations: Activations

    @property
    def stream(self) -> int:
        """Handle of the stream that all sessions of the process run on."""
        ...

    @property
    def index(self) -> int:
        """Number of the GPU, 0 for the first."""
        ...

    def to_device(self, array: Array) -> Array:
        """An array of the device, contiguous in C order: `array` itself, or a copy that the host does not wait for.

        Host memory is copied by way of pinned memory, so `array` may change as soon as this returns.
        """
        ...

    def empty(self, shape: Sequence[int], dtype: DType) -> Array:
        """A new array, its values undefined; MemoryError where there is no room."""
        ...

    def view(self, address: int, shape: Sequence[int], dtype: DType, owner: object) -> Array:
        """An array of memory that another library allocated on the device; it keeps `owner` for as long as it lives."""
        ...

    def address(self, array: Array) -> int:
        """Where an array of the device begins."""
        ...

    def copy(self, source: Array, target: Array) -> None:
        """Queue a copy between contiguous arrays of one size on `stream`."""
        ...

    def ordered(self) -> AbstractContextManager[None]:
        """Work queued on `stream` inside comes after the caller's so far, and before the caller's from then on."""
        ...

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        """A CUDA graph of what `work` queues on the stream whose handle it is given; calling it queues the graph."""
        ...

    def allocate(self, size: int) -> int:
        """Memory outside of any pool, aligned to 256 bytes; MemoryError where there is no room."""
        ...

    def free(self, address: int) -> None:
        """Give memory of `allocate` back."""
        ...

    def trim(self) -> None:
        """Give memory that is kept for later arrays back, so that others can have it."""
        ...

    def synchronize(self) -> None:
        """Wait until everything queued on `stream` is done."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes of the device that are free, and that it has."""
        ...


class Activations:
    """Memory for what networks compute on the way: one block for all, since on one stream no two run at a time.

    `generation` counts its moves: who holds an older one has an address that is no longer valid.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._users: set[int] = set()
        self.address = self.size = self.generation = 0

    def join(self, user: object) -> None:
        """Count a user, for whom the memory is kept from one call to the next."""
        self._users.add(id(user))

    def leave(self, user: object) -> None:
        """Count a user no longer; the last one frees the memory. Nothing that was queued may still use it."""
        self._users.discard(id(user))
        if not self._users:
            self._release()

    def reserve(self, size: int) -> None:
        """Grow to `size` bytes or more, which waits for queued work; MemoryError where there is no room."""
        if size <= self.size:
            return
        self._device.synchronize()
        self._release()  # first: both at a time would be the peak of all
        self._device.trim()
        self.address = self._device.allocate(size)
        self.size = size
        self.generation += 1

    def _release(self) -> None:
        if self.size:
            self._device.free(self.address)
            self.address = self.size = 0
            self.generation += 1


class CupyDevice:
    """The GPU that is CuPy's current one when this is made."""

    def __init__(self) -> None:
        import cupy  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self._cupy: Any = cupy
        self._index = int(cupy.cuda.Device().id)
        # non_blocking: the default stream's implicit waiting would end in errors while another thread captures
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._capturing = cupy.cuda.Stream(non_blocking=True)
        self._before = cupy.cuda.Event(disable_timing=True)
        self._after = cupy.cuda.Event(disable_timing=True)
        self.lock = RLock()
        self.activations = Activations(self)

    @property
    def stream(self) -> int:
        """See Device."""
        return int(self._stream.ptr)

    @property
    def index(self) -> int:
        """See Device."""
        return self._index

    def to_device(self, array: Array) -> Array:
        """See Device."""
        cupy = self._cupy
        if isinstance(array, cupy.ndarray):
            return cupy.ascontiguousarray(array)
        if not isinstance(array, np.ndarray) and hasattr(array, "__dlpack_device__"):
            host = array.__dlpack_device__()[0] in HOST_MEMORY
            array = np.from_dlpack(array) if host else cupy.from_dlpack(array)
        # asarray stages NumPy's arrays in pinned memory and copies on the current stream, without waiting
        return cupy.ascontiguousarray(cupy.asarray(array))

    def empty(self, shape: Sequence[int], dtype: DType) -> Array:
        """See Device."""
        return self._cupy.empty(tuple(shape), dtype)

    def view(self, address: int, shape: Sequence[int], dtype: DType, owner: object) -> Array:
        """See Device."""
        cupy = self._cupy
        memory = cupy.cuda.UnownedMemory(address, math.prod(shape) * cupy.dtype(dtype).itemsize, owner)
        return cupy.ndarray(tuple(shape), dtype, cupy.cuda.MemoryPointer(memory, 0))

    def address(self, array: Array) -> int:
        """See Device."""
        return int(array.data.ptr)

    def copy(self, source: Array, target: Array) -> None:
        """See Device."""
        target.data.copy_from_device_async(source.data, source.nbytes, self._stream)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """See Device."""
        current = self._cupy.cuda.get_current_stream()
        if current.ptr == self._stream.ptr:
            yield
            return
        self._stream.wait_event(current.record(self._before))
        try:
            yield
        finally:
            current.wait_event(self._stream.record(self._after))

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        """See Device."""
        stream = self._capturing
        stream.begin_capture(self._cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            work(int(stream.ptr))
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                stream.end_capture()
            raise
        graph = stream.end_capture()
        return functools.partial(graph.launch, self._stream)

    def allocate(self, size: int) -> int:
        """See Device."""
        runtime = self._cupy.cuda.runtime
        try:
            return int(runtime.malloc(size))
        except runtime.CUDARuntimeError as error:
            if error.status == OUT_OF_MEMORY:
                raise MemoryError(f"{size} bytes of GPU memory") from error
            raise

    def free(self, address: int) -> None:
        """See Device."""
        self._cupy.cuda.runtime.free(address)

    def trim(self) -> None:
        """See Device."""
        self._cupy.get_default_memory_pool().free_all_blocks()

    def synchronize(self) -> None:
        """See Device."""
        self._stream.synchronize()

    def memory(self) -> tuple[int, int]:
        """See Device."""
        free, total = self._cupy.cuda.runtime.memGetInfo()
        return int(free), int(total)


def library() -> Any:
    """CuPy, for what watches the GPU from outside the sessions."""
    import cupy  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return cupy


@functools.cache
def cupy_device() -> CupyDevice:
    """The device of this process: one, so that all sessions share its stream and activation memory."""
    return CupyDevice()
