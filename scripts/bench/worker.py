"""The process that runs one contender: `python -m kandrt.scripts.bench.worker KIND`, requests on stdin.

One JSON object a line: first a `Job` to open, then words: "run" a run, "result" and a path to write what it gave,
"close". Each is answered by a `Reply` on stdout, which libraries cannot write to. It ends when its stdin does: then the
process that asked is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
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
from .contenders import Source

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
    """A line on stdin: open takes a job, result the path of an .npz file."""

    do: str
    job: Job | None = None
    to: str = ""


@dataclass(frozen=True)
class Reply:
    """A line on stdout: seconds that opening or a run took, and of parts of a run; error where it failed."""

    ok: bool
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    error: str = ""


class Subject(Protocol):
    """What a contender does in a case; `stages` are seconds of the last run's parts."""

    stages: dict[str, float]

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

    def answer(self, request: Request) -> Reply:
        """Do what a request says; errors become replies."""
        try:
            if request.do == "open" and request.job is not None and self._subject is None:
                return self._open(request.job)
            if request.do == "run" and self._subject is not None:
                return self._run(self._subject)
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
        self._subject = subject
        return Reply(ok=True, seconds=time.perf_counter() - start)

    @staticmethod
    def _run(subject: Subject) -> Reply:
        subject.prepare()
        start = time.perf_counter()
        subject.run()
        return Reply(ok=True, seconds=time.perf_counter() - start, stages=subject.stages)


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
