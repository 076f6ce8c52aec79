"""The process that builds one plan: `python -m kandrt.engines.plan_worker`, a job on stdin, events on stdout.

A process of its own for each plan keeps memory at that of the largest, shows how much each takes, can be ended at any
moment, and takes nothing with it when the system kills it for want of memory. Jobs and events are JSON, one a line.
It ends when its stdin does: then the process that asked for the plan is gone, and nobody would take it.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from .errors import BackendError, KandrtError, OutputError
from .files import atomic_write
from .manifest import Precision
from .plans import Builder, PlanFigures, PlanSettings
from .profiles import Profile
from .spec import TensorSpec
from .trt import Messages, library, logger

LOG_TAIL = 60  # lines of the build log that a record keeps
EVENT_SECONDS = 0.1  # the least time between two reports of progress
# Layers that do the arithmetic, by TensorRT's names: what they compute in is what an engine computes in.
COMPUTE_LAYERS = {"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM", "ATTENTION_INPUT"}
TYPES: dict[Precision, str] = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
MEMORY = {
    "weights_bytes": re.compile(r"Total Weights Memory: (\d+) bytes"),
    "activation_bytes": re.compile(r"Total Activation Memory: (\d+) bytes"),
    "scratch_bytes": re.compile(r"(?:Max|Total) Scratch Memory: (\d+) bytes"),
}


@dataclass(frozen=True)
class PlanJob:
    """What to build, and where to write it; compute_capabilities is empty for the GPU present.

    precision is what every layer that computes has to be in, None where a graph keeps some in fp32 on purpose.
    timing_cache is a file that is read if it is there, and written.
    """

    component: str
    builder: Builder
    graph: str
    inputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    compute_capabilities: tuple[str, ...]
    settings: PlanSettings
    precision: Precision | None
    output: str
    timing_cache: str | None = None


@dataclass(frozen=True)
class Event:
    """A line of a worker: progress alone, or with figures and log the end, or with an error the end.

    progress is the share of the build that is done, phase what the library is doing.
    """

    progress: float = 0.0
    phase: str = ""
    figures: PlanFigures | None = None
    log: tuple[str, ...] = ()
    error: str | None = None
    error_type: str = ""


def build(job: PlanJob, report: Callable[[Event], None]) -> Event:
    """Build a plan into `job.output`.

    Raises BackendError where the library cannot, or gives layers in another precision than was asked for.
    """
    started = time.perf_counter()
    trt = library(job.builder)
    trt_logger, messages = logger(job.builder)
    builder = trt.Builder(trt_logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # all networks are, from 11 on
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, trt_logger)
    report(Event(phase="reading the graph"))
    if not parser.parse_from_file(job.graph):
        problems = dict.fromkeys(parser_problem(parser.get_error(i)) for i in range(parser.num_errors))
        raise BackendError(f"{job.component}: {job.builder} cannot read the graph: {'; '.join(problems)}")
    share = half_share(network, job)
    allow_decomposition(trt, network)
    config = configured(trt, builder, job)
    monitor = progress_monitor(trt, report)
    config.progress_monitor = monitor
    cache = timing_cache(config, job)
    with Path(job.output).open("wb") as file:
        writer = plan_writer(trt, file)
        done = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.problem is not None:
            raise OutputError(f"cannot write {job.output}: {writer.problem}")
        if not done or not file.tell():
            raise BackendError(failure(job, messages))
        file.flush()
        os.fsync(file.fileno())
    if cache is not None and job.timing_cache is not None:
        with atomic_write(Path(job.timing_cache)) as stored:
            stored.write(memoryview(cache.serialize()))
    log = messages.lines()
    figures = PlanFigures(
        layers=network.num_layers,
        seconds=time.perf_counter() - started,
        half_share=share,
        peak_bytes=peak_bytes(),
        **memory_figures(log),
    )
    return Event(progress=1.0, figures=figures, log=tuple(log[-LOG_TAIL:]))


def parser_problem(error: Any) -> str:
    """What the parser stumbled on: the operator and the node's name, where it was one, and why."""
    where = " ".join(filter(None, (error.node_operator(), error.node_name())))
    why = f"{error.code().name.lower().replace('_', ' ')}: {error.desc()}"  # the latter may be no more than "false"
    return f"{where}: {why}" if where else why


def peak_bytes() -> int | None:
    """The most resident memory that this process has had, files mapped into it included; None where nobody counts."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def failure(job: PlanJob, messages: Messages) -> str:
    """Why a build failed, and what would lower its need where it was memory."""
    # Ahead of time there need be no GPU, of which the library complains once a build has failed for another reason
    problem = messages.problem("catchCudaError" if job.compute_capabilities else None)
    if "memory" in problem.lower():
        problem += "; a smaller --size, --batch or --workspace lowers the need, and so does --weight-streaming"
    return f"{job.component}: {job.builder} could not build it: {problem}"


def half_share(network: Any, job: PlanJob) -> float:
    """The share of computing layers in 16 bits; BackendError where one is not in the precision asked for."""
    found: dict[str, int] = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type.name in COMPUTE_LAYERS:
            dtype = layer.get_output(0).dtype.name
            found[dtype] = found.get(dtype, 0) + 1
    if job.precision is not None and set(found) - {TYPES[job.precision]}:
        counts = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(found.items()))
        raise BackendError(
            f"{job.component}: expected every convolution, matrix product and attention in {TYPES[job.precision]}, "
            f"found {counts}; export the bundle again with --precision {job.precision}"
        )
    return sum(found.get(dtype, 0) for dtype in ("HALF", "BF16")) / max(sum(found.values()), 1)


def allow_decomposition(trt: Any, network: Any) -> None:
    """Let attention without a fused kernel run as its parts: MoVQ's heads of 512 values have none.

    Not allowed unless asked for, and then a build fails; attention that has a fused kernel is not changed by it.
    """
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' way to say what kind of layer it is
            layer.attention.decomposable = True


def configured(trt: Any, builder: Any, job: PlanJob) -> Any:
    """The builder's configuration: GPUs, profiles, limits and flags."""
    config = builder.create_builder_config()
    # On by default: the fp32 layers of a 16-bit graph are those that need all of their digits.
    config.clear_flag(trt.BuilderFlag.TF32)
    for name in job.settings.flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if job.settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.settings.workspace_bytes)
    if job.settings.optimization_level is not None:
        config.builder_optimization_level = job.settings.optimization_level
    if job.compute_capabilities:
        config.num_compute_capabilities = len(job.compute_capabilities)
        for i, capability in enumerate(job.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability.upper()), i)
    for wanted in job.profiles:
        profile = builder.create_optimization_profile()
        for spec in job.inputs:
            if any(isinstance(axis, str) for axis in spec.shape):
                profile.set_shape(spec.name, *wanted.shapes(spec))
        if config.add_optimization_profile(profile) < 0:
            raise BackendError(f"{job.component}: the graph cannot take the profile {wanted}")
    return config


def timing_cache(config: Any, job: PlanJob) -> Any:
    """The timing cache, filled from its file where there is one that this library and GPU can use; None without one."""
    if job.timing_cache is None:
        return None
    path = Path(job.timing_cache)
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")  # it is of another version or GPU
        config.set_timing_cache(cache, False)
    return cache


def memory_figures(log: list[str]) -> dict[str, int | None]:
    """Bytes of device memory as the library's log names them; the last line of a kind counts."""
    found: dict[str, int | None] = dict.fromkeys(MEMORY)
    for line in log:
        for name, pattern in MEMORY.items():
            if match := pattern.search(line):
                found[name] = int(match[1])
    return found


def progress_monitor(trt: Any, report: Callable[[Event], None]) -> Any:
    """A progress monitor that reports."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the library's own base class, known when it is loaded
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, list[float]] = {}  # open phases, outer ones first: steps done, steps in all
            self._last = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self._phases[phase_name] = [0.0, float(max(num_steps, 1))]

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases = list(self._phases.items())
            if phase_name in self._phases:
                self._phases[phase_name][0] = step + 1.0
            now = time.monotonic()
            if phases and now - self._last > EVENT_SECONDS:
                self._last, share = now, 0.0
                for _, (done, total) in reversed(phases):
                    share = min((done + share) / total, 1.0)
                report(Event(progress=share, phase=phases[-1][0]))
            return True

    return Monitor()


def plan_writer(trt: Any, file: BinaryIO) -> Any:
    """A writer that puts the plan into a file as it comes, so that it is never whole in memory a second time."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.problem: str | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.problem = error.strerror or str(error)
                return 0

    return Writer()


def end_with_stdin() -> None:
    """Wait for the end of stdin, then end this process at once: TensorRT lets other threads run while it builds."""
    with suppress(OSError):
        while os.read(0, 1):  # not through sys.stdin, whose lock would be held when the interpreter ends
            pass
    os._exit(1)


def main() -> None:
    """Read a job from stdin, build, and say how it goes on stdout, which native libraries then cannot write to."""
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    job = sys.stdin.buffer.readline()
    threading.Thread(target=end_with_stdin, daemon=True).start()

    def send(event: Event) -> None:
        events.write(msgspec.json.encode(event) + b"\n")

    try:
        send(build(msgspec.json.decode(job, type=PlanJob), send))
    except KandrtError as error:
        send(Event(error=str(error), error_type=type(error).__name__))
    except OSError as error:
        what = f"cannot read or write {error.filename or 'the plan'}: {error.strerror or error}"
        send(Event(error=what, error_type="OutputError"))
    except Exception as error:  # the library's own
        send(Event(error=f"{type(error).__name__}: {error}", error_type="BackendError"))


if __name__ == "__main__":
    main()
