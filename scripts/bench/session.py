"""A worker's process from outside: started, asked, ended."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import msgspec

from ...engines.errors import BackendError
from .results import Residence
from .worker import Job, Reply, Request

END_SECONDS = 5.0
TAIL = 600  # characters of what a worker complained of that an error repeats
NO_KANDRT = "No module named 'kandrt'"  # as Python says it


class Worker:
    """A contender's process, used as a context manager: however that is left, the process has ended.

    started is `time.perf_counter()` as the process was started.
    """

    def __init__(self, name: str, kind: str, python: str, threads: int, timeout: float) -> None:
        """Start it; raises BackendError where the interpreter cannot be started."""
        self.name, self._python, self._timeout = name, python, timeout
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.started = time.perf_counter()
        try:
            self._process = subprocess.Popen(  # noqa: S603  # an interpreter that the user named, or this one
                [python, "-m", f"{__package__}.worker", kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env={**os.environ, **environment(threads)},
                start_new_session=True,  # Ctrl-C is for this process, which then ends the other, and what it started
            )
        except OSError as error:
            self._complaints.close()
            raise BackendError(f"{name}: cannot start {python}: {error.strerror or error}") from error
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def peak_memory(self) -> int | None:
        """The most bytes that the process has had resident, files mapped into it included; None where nobody counts."""
        return status_bytes(self.pid, "VmHWM")

    @property
    def residence(self) -> Residence | None:
        """What the process has in memory now; None where nobody counts."""
        own = [status_bytes(self.pid, name) for name in ("RssAnon", "RssFile", "RssShmem")]
        anonymous, file, shared = own
        if anonymous is None or file is None:
            return None
        return Residence(anonymous, file + (shared or 0), status_bytes(self.pid, "Pss", "smaps_rollup"))

    def open(self, job: Job) -> Reply:
        """Open a case; raises BackendError with the worker's own words where it cannot."""
        return self._ask(Request("open", job=job))

    def run(self, steps: int | None = None, prior_steps: int | None = None) -> Reply:
        """A run, of other numbers of steps than the case's where they are given; raises BackendError."""
        return self._ask(Request("run", steps=steps, prior_steps=prior_steps))

    def run_on_device(self) -> Reply:
        """A run that the GPU times, where there is one; raises BackendError."""
        return self._ask(Request("device"))

    def result(self, path: Path) -> None:
        """Let it write what the last run gave to an .npz file; raises BackendError."""
        self._ask(Request("result", to=str(path)))

    def _ask(self, request: Request) -> Reply:
        try:
            if self._process.stdin is not None:
                self._process.stdin.write(msgspec.json.encode(request) + b"\n")
                self._process.stdin.flush()
        except OSError:
            raise BackendError(self._death()) from None
        try:
            line = self._lines.get(timeout=self._timeout)
        except queue.Empty:
            self.close()
            raise BackendError(f"{self.name}: no answer in {self._timeout:g} seconds to {request.do!r}") from None
        if not line:
            raise BackendError(self._death())
        try:
            reply = msgspec.json.decode(line, type=Reply)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BackendError(f"{self.name}: its process gave no reply but {line[:80]!r}") from error
        if not reply.ok:
            raise BackendError(f"{self.name}: {reply.error}")
        return reply

    def _listen(self) -> None:
        """Pass lines on, and an empty one at the end."""
        with suppress(OSError, ValueError):  # closed meanwhile
            if self._process.stdout is not None:
                with self._process.stdout as replies:
                    for line in replies:
                        self._lines.put(line)
        self._lines.put(b"")

    def _death(self) -> str:
        """Why the process is gone."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=END_SECONDS)
        code = self._process.poll()
        if code == -signal.SIGKILL:
            return f"{self.name}: the system killed its process, most likely for want of memory"
        if code is None:
            return f"{self.name}: its process stopped answering"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        tail = self._tail()
        if NO_KANDRT in tail:
            return (
                f"{self.name}: {self._python} has no kandrt, which runs its side: {self._python} -m pip install kandrt"
            )
        return f"{self.name}: its process ended with {how}{f': {tail}' if tail else ''}"

    def _tail(self) -> str:
        """The end of what it wrote to stderr, as one line."""
        if self._complaints.closed:
            return ""
        size = self._complaints.seek(0, os.SEEK_END)
        self._complaints.seek(max(size - TAIL, 0))
        return " ".join(self._complaints.read().decode(errors="replace").split())

    def close(self) -> None:
        """End the process and all that it started; calling it again does nothing."""
        if self._complaints.closed:
            return
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()  # its end is the worker's
        signal_all(self._process, signal.SIGTERM)
        try:
            self._process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            signal_all(self._process, getattr(signal, "SIGKILL", signal.SIGTERM))
            self._process.wait()
            self._listener.join(END_SECONDS)
            self._complaints.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def signal_all(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal a process that leads a session, and all others in it, which may outlive it."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        elif process.poll() is None:
            process.send_signal(number)


def environment(threads: int) -> Mapping[str, str]:
    """Variables of a worker: its number of threads for libraries that read it early, no network, safe imports."""
    names = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"
    return {
        **dict.fromkeys(names, str(threads)),
        "HF_HUB_OFFLINE": "1",  # nothing is downloaded while it is timed
        "PYTHONSAFEPATH": "1",  # modules are not looked for in the current folder
    }


def status_bytes(pid: int, name: str, file: str = "status") -> int | None:
    """A number of kB in /proc/PID/status or another such file, in bytes; None where there is none."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
