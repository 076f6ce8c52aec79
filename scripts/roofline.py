"""What the work of a graph takes on a GPU at least, from published figures: nothing here is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..engines.errors import BundleError

WIDTH = 2  # bytes of a number in 16 bits
FLOATS = (1, 10, 16)  # ONNX's numbers for FLOAT, FLOAT16 and BFLOAT16, all of which are counted with that width
# Operators that only name, cut or widen tensors, or tell their lengths.
VIEWS = frozenset(
    {"Cast", "Constant", "ConstantOfShape", "Expand", "Flatten", "Identity", "Range", "Reshape", "Shape", "Size",
     "Slice", "Split", "Squeeze", "Unsqueeze"}
)  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """Published figures: dense FLOP/s of the tensor cores in fp16, bytes a second of memory, and where they stand."""

    name: str
    flops: float
    bandwidth: float
    capability: str
    source: str


GPUS = (
    Gpu("A100", 312e12, 2.039e12, "sm80", "NVIDIA A100 datasheet, SXM with 80 GB"),
    Gpu("H100", 989.4e12, 3.35e12, "sm90", "NVIDIA H100 datasheet, SXM, without sparsity"),
    Gpu("RTX 4090", 165.2e12, 1.008e12, "sm89", "NVIDIA Ada whitepaper, appendix A: fp16 summed up in fp32"),
    Gpu("RTX 4090, fp16 sums", 330.3e12, 1.008e12, "sm89", "NVIDIA Ada whitepaper, appendix A: fp16 summed up in fp16"),
)


@dataclass(frozen=True)
class Operation:
    """A convolution, matrix product or attention: FLOPs, bytes of weights, and of what else it reads and writes."""

    flops: int
    weights: int
    activations: int


@dataclass(frozen=True)
class Work:
    """One run of a graph in 16 bits.

    nodes are its operators, those of VIEWS and what depends on weights alone apart.
    """

    operations: tuple[Operation, ...]
    nodes: int

    @property
    def flops(self) -> int:
        """Of all convolutions, matrix products and attention, two a multiplication and addition."""
        return sum(each.flops for each in self.operations)

    @property
    def weights(self) -> int:
        """Bytes of the weights that those read."""
        return sum(each.weights for each in self.operations)

    @property
    def activations(self) -> int:
        """Bytes that those read and write besides."""
        return sum(each.activations for each in self.operations)


@dataclass(frozen=True)
class Floor:
    """Seconds that a run takes at least.

    limit: all arithmetic at the peak, or all weights read once, whichever takes longer; no program is faster.
    operators: one operation after the other, each at the peak or as fast as memory has its tensors; no program is
    faster that keeps nothing of an operation's result in caches for the next. Norms, activations and the like are for
    nothing in both.
    """

    limit: float
    operators: float

    def __add__(self, other: Floor) -> Floor:
        """Of one after the other."""
        return Floor(self.limit + other.limit, self.operators + other.operators)

    def __mul__(self, runs: int) -> Floor:
        """Of several runs."""
        return Floor(runs * self.limit, runs * self.operators)


def floor(work: Work, gpu: Gpu) -> Floor:
    """The roofline of a run (Williams, Waterman and Patterson 2009), of the whole and operation by operation."""

    def seconds(flops: float, moved: float) -> float:
        return max(flops / gpu.flops, moved / gpu.bandwidth)

    single = (seconds(each.flops, each.weights + each.activations) for each in work.operations)
    return Floor(seconds(work.flops, work.weights), sum(single))


def graph_work(path: Path, axes: Mapping[str, int]) -> Work:
    """The work of the graph at `path`, every floating-point number in 16 bits whatever it is in there.

    Counts as `export.costs.graph_costs` does, and raises what that raises.
    """
    from ..export.costs import OPERATORS, Tensors, fix_axes, infer, read_graph

    model = read_graph(path)
    fix_axes(model.graph, axes, path)
    tensors: Tensors = infer(model, path)

    def size(names: Iterable[str]) -> int:
        return sum(
            prod(tensors.shapes[name]) * WIDTH if tensors.types[name] in FLOATS else tensors.bytes(name)
            for name in names
        )

    operations, nodes = [], 0
    for node in model.graph.node:
        names = [name for name in (*node.input, *node.output) if name]
        if node.op_type in VIEWS or all(name in tensors.constant for name in names):
            continue
        nodes += 1
        count = OPERATORS.get(node.op_type)
        if count is None:
            continue
        if unknown := [name for name in names if name not in tensors.shapes]:
            raise BundleError(f"{path}: {node.op_type} {node.name!r}: the shape of {', '.join(unknown)} is not known")
        weights = size(name for name in names if name in tensors.constant)
        activations = size(name for name in names if name not in tensors.constant)
        operations.append(Operation(count(node, tensors.shapes), weights, activations))
    return Work(tuple(operations), nodes)
