"""`python -m kandrt.scripts.planned_kernels`: which kernels TensorRT-RTX would launch for a graph; needs no GPU.

A process of its own, as for `kandrt build`: a job on stdin as JSON, what was found into the job's output file. The plan
itself is thrown away.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from ..engines.errors import BackendError
from ..engines.plan_worker import (
    PlanJob,
    allow_decomposition,
    configured,
    failure,
    half_share,
    memory_figures,
    parser_problem,
    peak_bytes,
    plan_writer,
)
from ..engines.trt import Messages, library

# Of the builder's list of an engine's layers: "Name: node_conv2d_3_myl0_7, LayerType: correlation, Inputs: [...".
LAYER = re.compile(r"^\s*Name: .+?, LayerType: (\w+),", re.MULTILINE)
# Layers that order streams or compute shapes, and launch nothing.
NO_KERNEL = frozenset({"signal", "wait", "shape_call", "no_op"})
STDERR_TAIL = 1000  # characters


@dataclass(frozen=True)
class Planned:
    """What an engine would run: layers of the parsed network, and kernels by kind as the library names them.

    "correlation" is a convolution, "gemm" a matrix product, "kgen" a kernel that was made for a chain of operators. One
    kernel of this list may be several on the device, where a convolution splits its sum; signals between streams are
    left out. activation_bytes and weights_bytes are of the device.
    """

    layers: int
    kernels: dict[str, int]
    seconds: float
    activation_bytes: int | None = None
    weights_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def launches(self) -> int:
        """Kernels of all kinds."""
        return sum(self.kernels.values())


def plan_kernels(job: PlanJob) -> Planned:
    """Plan an engine in another process; `job.output` is not used. BackendError where it cannot be built."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "planned.json")
        told = msgspec.json.encode(replace(job, output=str(found)))
        done = subprocess.run(
            [sys.executable, "-m", "kandrt.scripts.planned_kernels"], input=told, capture_output=True, check=False
        )
        if done.returncode or not found.is_file():
            why = done.stderr.decode(errors="replace").strip()[-STDERR_TAIL:]
            raise BackendError(f"{job.component}: it could not be planned: {why or f'exit code {done.returncode}'}")
        return msgspec.json.decode(found.read_bytes(), type=Planned)


def build(job: PlanJob) -> Planned:
    """Build an engine and forget it; what the library says of its layers is kept.

    Raises BackendError where the library cannot, or computes in another precision than `job.precision`.
    """
    started = time.perf_counter()
    trt, messages, told = library(job.builder), Messages(), list[str]()
    listening = listener(trt, messages, told)
    builder = trt.Builder(listening)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, listening)
    if not parser.parse_from_file(job.graph):
        problems = dict.fromkeys(parser_problem(parser.get_error(i)) for i in range(parser.num_errors))
        raise BackendError(f"{job.component}: {job.builder} cannot read the graph: {'; '.join(problems)}")
    half_share(network, job)
    allow_decomposition(trt, network)
    config = configured(trt, builder, job)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    with Path(os.devnull).open("wb") as nowhere:
        if not builder.build_serialized_network_to_stream(network, config, plan_writer(trt, nowhere)):
            raise BackendError(failure(job, messages))
    figures = memory_figures(messages.lines())
    return Planned(
        network.num_layers,
        kernels_of(told),
        time.perf_counter() - started,
        figures["activation_bytes"],
        figures["weights_bytes"],
        peak_bytes(),
    )


def kernels_of(log: Iterable[str]) -> dict[str, int]:
    """Kernels by kind, the most frequent first, out of what the builder said; BackendError where it listed none."""
    kinds = Counter(kind for text in log for kind in LAYER.findall(text) if kind not in NO_KERNEL)
    if not kinds:
        raise BackendError("the builder listed no layers: this version says it otherwise")
    return dict(kinds.most_common())


def listener(trt: Any, messages: Messages, told: list[str]) -> Any:
    """A logger that keeps the list of layers, which the library gives as detail, apart from everything else."""

    class Listener(trt.ILogger):  # type: ignore[misc]  # the library's own base class, known when it is loaded
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            name = str(severity).rpartition(".")[2]
            if name != "VERBOSE":
                messages.add(name, msg)
            elif "LayerType: " in msg:
                told.append(msg)

    return Listener()


def main() -> None:
    """Read a job from stdin and do it."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=PlanJob)
    try:
        found = build(job)
    except BackendError as error:
        sys.exit(str(error))
    Path(job.output).write_bytes(msgspec.json.encode(found))


if __name__ == "__main__":
    main()
