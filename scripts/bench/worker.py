"""The process that runs one contender: `python -m kandrt.scripts.bench.worker KIND`, requests on stdin.

One JSON object a line: first a `Job` to open, then words: "run" a run, "device" one that a GPU times, "result" and a
path to write what it gave, "close". Each is answered by a `Reply` on stdout, which libraries cannot write to. It ends
when its stdin does: then the process that asked is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...engines.files import atomic_write
from ...engines.manifest import FamilyName, Precision
from .cases import Case, Inputs
from .device_clock import DeviceClock
from .sources import Source

WORKERS: Mapping[str, str] = {"kandrt": "kandrt_worker", "diffusers": "diffusers_worker", "onnx": "onnx_worker"}


@dataclass(frozen=True)
class Job:
    """What a worker is to run: a case on the arrays of an .npz file, from the bundle or from checkpoints by part.

    scratch is a folder for what is made on the way.
    """

    case: Case
    inputs: str
    bundle: str
    family: FamilyName
    precision: Precision
    threads: int
    scratch: str
    settings: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Request:
    """A line on stdin: open takes a job, result the path of an .npz file, a run other numbers of steps than the case's.

    steps are of the decoder.
    """

    do: str
    job: Job | None = None
    to: str = ""
    steps: int | None = None
    prior_steps: int | None = None


@dataclass(frozen=True)
class Reply:
    """A line on stdout: seconds that opening or a run took, and of parts of a run; error where it failed.

    device_seconds: that a GPU worked, None where that is not known. device_memory: bytes of its memory taken.
    """

    ok: bool
    seconds: float = 0.0
    device_seconds: float | None = None
    device_memory: int | None = None
    stages: dict[str, float] = field(default_factory=dict)
    error: str = ""


class Subject(Protocol):
    """What a contender does in a case; `stages` are seconds of the last run's parts.

    `clock` is of the GPU that it runs on, None on a CPU; times_device says whether its work is all on the clock's
    stream.
    """

    case: Case
    stages: dict[str, float]
    clock: DeviceClock | None
    times_device: bool

    def open(self, inputs: Inputs) -> None:
        """Load what the case needs."""
        ...

    def prepare(self) -> None:
        """Make ready for a run: not timed."""
        ...

    def run(self) -> None:
        """What is timed."""
        ...

    def result(self) -> Mapping[str, NDArray[Any]]:
        """What the last run gave: "picture" [B, H, W, 3] in [0, 1], or arrays by other names."""
        ...


class Server:
    """Answers requests for the one subject of this process."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._subject: Subject | None = None
        self._case: Case | None = None

    def answer(self, request: Request) -> Reply:
        """Do what a request says; errors become replies."""
        try:
            if request.do == "open" and request.job is not None and self._subject is None:
                return self._open(request.job)
            if request.do in ("run", "device") and self._subject is not None and self._case is not None:
                self._subject.case = with_steps(self._case, request)
                if self._subject.clock is not None:
                    self._subject.clock.resume()
                return run_on_device(self._subject) if request.do == "device" else run(self._subject)
            if request.do == "result" and request.to and self._subject is not None:
                with atomic_write(Path(request.to)) as file:
                    np.savez(file, allow_pickle=False, **dict(self._subject.result()))
                return Reply(ok=True)
            return Reply(ok=False, error=f"cannot {request.do!r} now")
        except MemoryError:
            return Reply(ok=False, error="out of memory")
        except Exception as error:  # of any library
            return Reply(ok=False, error=one_line(error))

    def _open(self, job: Job) -> Reply:
        start = time.perf_counter()
        module = import_module(f".{WORKERS[self._kind]}", __package__)
        subject = cast("Subject", module.subject(job))
        with np.load(job.inputs, allow_pickle=False) as arrays:
            inputs = {name: arrays[name] for name in arrays.files}
        subject.open(inputs)
        self._subject, self._case = subject, job.case
        seconds = time.perf_counter() - start
        if subject.clock is not None:
            subject.clock.memory()  # others take some before this one works again
        return Reply(ok=True, seconds=seconds)


def with_steps(case: Case, request: Request) -> Case:
    """The case with as many steps as are asked for."""
    steps = case.steps if request.steps is None else request.steps
    prior_steps = case.prior_steps if request.prior_steps is None else request.prior_steps
    return replace(case, steps=steps, prior_steps=prior_steps)


def run(subject: Subject) -> Reply:
    """A run, until its result is there."""
    subject.prepare()
    start = time.perf_counter()
    subject.run()
    if subject.clock is not None:
        subject.clock.wait()
    seconds = time.perf_counter() - start
    memory = None if subject.clock is None else subject.clock.memory()
    return Reply(ok=True, seconds=seconds, device_memory=memory, stages=subject.stages)


def run_on_device(subject: Subject) -> Reply:
    """A run that the GPU times, where there is one and all of its work is on one stream."""
    if subject.clock is None or not subject.times_device:
        return Reply(ok=True)
    subject.prepare()
    subject.clock.begin()
    subject.run()
    return Reply(ok=True, device_seconds=subject.clock.end(), device_memory=subject.clock.memory())


def one_line(error: BaseException) -> str:
    """An error's class, where it says more than the message, and the message."""
    text = " ".join(str(error).split())
    own = type(error).__module__.startswith("kandrt")
    return text if own and text else f"{type(error).__name__}: {text}"


def read_lines(lines: SimpleQueue[bytes]) -> None:
    """Pass lines of stdin on; at its end, end this process at once, whatever it is running."""
    with suppress(OSError):
        rest = b""
        while data := os.read(0, 2**16):  # not through sys.stdin, whose lock would be held when the interpreter ends
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                lines.put(line)
    os._exit(1)


def main() -> None:
    """Answer requests until one says close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lines: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=read_lines, args=(lines,), daemon=True).start()
    server = Server(sys.argv[1])
    while True:
        try:
            request = msgspec.json.decode(lines.get(), type=Request)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            replies.write(msgspec.json.encode(Reply(ok=False, error=f"not a request: {error}")) + b"\n")
            continue
        if request.do == "close":
            replies.write(msgspec.json.encode(Reply(ok=True)) + b"\n")
            os._exit(0)  # libraries that end slowly have nothing left to do
        replies.write(msgspec.json.encode(server.answer(request)) + b"\n")


if __name__ == "__main__":
    main()
