"""How long a GPU works on a run, and how much of its memory is taken: CUDA events, by torch or CuPy."""

from __future__ import annotations

from typing import Any, Protocol

# The stream is kept busy for so long before a run that is timed on the GPU, so that the run's work waits in the queue
# and follows without gaps: what is timed is the GPU's work, not the host's. A queue holds some 1000 launches: of a
# program that makes many more, part of the host's time is in it, and its host-bound share is a lower bound.
HOLD_SECONDS = 0.5
CYCLES_A_SECOND = 1.5e9

HOLD = """extern "C" __global__ void hold(long long cycles) {
  long long start = clock64();
  while (clock64() - start < cycles) {}
}"""


class Events(Protocol):
    """What is needed of a CUDA library, on the current stream."""

    def hold(self) -> None:
        """Keep the stream busy for HOLD_SECONDS; the host does not wait."""
        ...

    def mark(self) -> Any:
        """An event behind all that was queued."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """Between two events, waiting for the last."""
        ...

    def wait(self) -> None:
        """Until all that was queued is done."""
        ...

    def free(self) -> int:
        """Bytes of the GPU's memory that nobody has taken."""
        ...


class DeviceClock:
    """Times the GPU's part of a run: `begin`, the run, `end`."""

    def __init__(self, events: Events) -> None:
        """What is taken of the memory counts from here on."""
        self._events, self._first = events, events.mark()
        self._free, self._taken = events.free(), 0

    def wait(self) -> None:
        """Until all that was queued is done."""
        self._events.wait()

    def begin(self) -> None:
        """The run starts: what it queues waits until all of it is queued."""
        self._events.wait()
        self._events.hold()
        self._first = self._events.mark()

    def end(self) -> float:
        """The run is over: seconds in which the GPU worked on it."""
        return self._events.seconds(self._first, self._events.mark())

    def resume(self) -> None:
        """This process works again: what others took of the memory while it rested is not its own."""
        self._free = self._events.free()

    def memory(self) -> int:
        """Bytes of the GPU's memory that this process took since this was made, while it worked.

        Others are to rest meanwhile; CUDA tells of all processes together alone.
        """
        before, self._free = self._free, self._events.free()
        self._taken += before - self._free
        return max(0, self._taken)


class TorchEvents:
    """By torch."""

    def __init__(self, torch: Any) -> None:
        self._cuda = torch.cuda

    def hold(self) -> None:
        """See Events."""
        self._cuda._sleep(int(HOLD_SECONDS * CYCLES_A_SECOND))

    def mark(self) -> Any:
        """See Events."""
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        """See Events."""
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def wait(self) -> None:
        """See Events."""
        self._cuda.synchronize()

    def free(self) -> int:
        """See Events."""
        return int(self._cuda.mem_get_info()[0])


class CupyEvents:
    """By CuPy."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._hold = cupy.RawKernel(HOLD, "hold")

    def hold(self) -> None:
        """See Events."""
        self._hold((1,), (1,), (self._cupy.int64(HOLD_SECONDS * CYCLES_A_SECOND),))

    def mark(self) -> Any:
        """See Events."""
        event = self._cupy.cuda.Event()
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        """See Events."""
        last.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(first, last)) / 1e3

    def wait(self) -> None:
        """See Events."""
        self._cupy.cuda.runtime.deviceSynchronize()

    def free(self) -> int:
        """See Events."""
        return int(self._cupy.cuda.runtime.memGetInfo()[0])
