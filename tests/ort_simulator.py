"""A simulator of ONNX Runtime's CUDA provider: real sessions on the CPU over a simulated GPU, for tests without one.

It has what `kandrt.engines.ort_cuda` uses, and what was read in ONNX Runtime's sources or seen of it: runs on a stream
of its own and waits for it; outputs in memory of its arena, which later runs are given; CUDA graphs by number, captured
after a run, which read and write what was bound when they were captured, use arena memory that was free then, and
belong to the thread that ran.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime

from .gpu_simulator import Block, Gpu

STREAM = 9
PROVIDER = "CUDAExecutionProvider"
GRAPH = "gpu_graph_id"


@dataclass(frozen=True)
class Bound:
    """An input or output at an address."""

    dtype: Any
    shape: tuple[int, ...]
    address: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass
class Value:
    """An output in the arena's memory, an `OrtValue`."""

    session: CudaSession
    block: Block
    dims: tuple[int, ...]

    def data_ptr(self) -> int:
        return self.block.address

    def shape(self) -> list[int]:
        return list(self.dims)

    def __del__(self) -> None:
        self.session.arena.append(self.block)


@dataclass
class Binding:
    """An `IOBinding`."""

    inputs: dict[str, Bound] = field(default_factory=dict)
    outputs: dict[str, Bound | None] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)

    def bind_input(self, name: str, device: str, index: int, dtype: Any, shape: Sequence[int], address: int) -> None:
        assert (device, index) == ("cuda", 0)
        self.inputs[name] = Bound(dtype, tuple(shape), address)

    def bind_output(
        self, name: str, device: str, index: int = 0, dtype: Any = None, shape: Sequence[int] = (), address: int = 0
    ) -> None:
        assert (device, index) == ("cuda", 0)
        self.outputs[name] = Bound(dtype, tuple(shape), address) if address else None

    def get_outputs(self) -> list[Value]:
        return self.values


@dataclass
class CudaSession:
    """An `InferenceSession`; captures where it was opened with enable_cuda_graph, and fails to if not `capturable`."""

    gpu: Gpu
    session: onnxruntime.InferenceSession
    settings: Mapping[str, str] = field(default_factory=dict)
    capturable: bool = True
    arena: list[Block] = field(default_factory=list)
    graphs: dict[str, tuple[Binding, Block]] = field(default_factory=dict)
    threads: set[int] = field(default_factory=set)
    runs: list[str] = field(default_factory=list)

    def get_providers(self) -> list[str]:
        return [PROVIDER, "CPUExecutionProvider"]

    def get_inputs(self) -> Any:
        return self.session.get_inputs()

    def get_outputs(self) -> Any:
        return self.session.get_outputs()

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, options: Any = None) -> None:
        graphs = self.settings.get("enable_cuda_graph") == "1"
        number = "0" if options is None else options.get_run_config_entry(GRAPH)
        if graphs:
            self.threads.add(threading.get_ident())
            assert len(self.threads) == 1, "each thread keeps graphs and handles of its own"
        if not graphs or number == "-1":
            self.runs.append("eager")
            self._compute(binding)
            return
        if number not in self.graphs:
            self.runs.append("captured")
            self._compute(binding)
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.graphs[number] = (binding, self._take(4096))
            self.arena.append(self.graphs[number][1])  # free again, and in the graph all the same
        else:
            self.runs.append("replayed")
        captured, scratch = self.graphs[number]
        scratch.data[:] = 0xFF
        self._compute(captured)

    def _take(self, size: int) -> Block:
        for block in self.arena:
            if block.size >= size:
                self.arena.remove(block)
                return block
        return self.gpu.blocks[self.gpu.allocate(max(size, 4096))]

    def _compute(self, binding: Binding) -> None:
        inputs, read = {}, []
        for name, bound in binding.inputs.items():
            block, data = self.gpu.at(bound.address, bound.nbytes)
            read.append(block)
            inputs[name] = data.view(bound.dtype).reshape(bound.shape).copy()
        self.gpu.work(STREAM, read, [])
        binding.values = []
        for (name, bound), result in zip(
            binding.outputs.items(), self.session.run(list(binding.outputs), inputs), strict=True
        ):
            if bound is None:
                block = self._take(result.nbytes)
                binding.values.append(Value(self, block, result.shape))
                data = block.data[: result.nbytes]
            else:
                assert (bound.shape, np.dtype(bound.dtype)) == (result.shape, result.dtype), name
                block, data = self.gpu.at(bound.address, bound.nbytes)
            self.gpu.work(STREAM, [], [block])
            data.view(result.dtype).reshape(result.shape)[...] = result
        self.gpu.wait(STREAM)
