"""What running a graph costs: floating-point operations and bytes, from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from ..engines.errors import BundleError, InputError

Shape = tuple[int, ...]
Types = Mapping[str, onnx.TypeProto]
# What lengths and factors of lengths are stored as.
NUMBERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT)
GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
# Bits of an element by type; strings have no size of their own.
BITS = {
    bits: names.split()
    for bits, names in {
        4: "UINT4 INT4 FLOAT4E2M1",
        8: "UINT8 INT8 BOOL FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ FLOAT8E8M0",
        16: "UINT16 INT16 FLOAT16 BFLOAT16",
        32: "UINT32 INT32 FLOAT",
        64: "UINT64 INT64 DOUBLE COMPLEX64",
        128: "COMPLEX128",
    }.items()
}
ELEMENT_BITS = {
    onnx.TensorProto.DataType.Value(name): bits
    for bits, names in BITS.items()
    for name in names
    if name in onnx.TensorProto.DataType.keys()  # noqa: SIM118  # protobuf's own: not a mapping
}
# Their result has the shape of their first input, which ONNX's shape inference does not know.
KEEP_SHAPE = ("GroupNormalization",)


@dataclass(frozen=True)
class Costs:
    """Of one run of a graph.

    flops are those of convolutions, matrix products and attention, two a multiplication and addition; softmax, norms
    and elementwise operators, a few percent of the networks here, are not among them. weight_bytes is the size of all
    weights as they are stored, each once. activation_bytes is what the counted operators read and write besides
    weights: the traffic of a program that computes everything else on the way in or out of them.
    by_operator holds the FLOPs of each type of operator, such as "Conv".
    """

    flops: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    by_operator: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Costs) -> Costs:
        """Of a run of each, where their weights are not the same."""
        names = dict.fromkeys((*self.by_operator, *other.by_operator))
        return Costs(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
            {name: self.by_operator.get(name, 0) + other.by_operator.get(name, 0) for name in names},
        )

    def __mul__(self, runs: int) -> Costs:
        """Of several runs, each of which reads the weights again."""
        by_operator = {name: runs * flops for name, flops in self.by_operator.items()}
        return Costs(runs * self.flops, runs * self.weight_bytes, runs * self.activation_bytes, by_operator)


@dataclass(frozen=True)
class Tensors:
    """Shapes and element types of a graph's tensors by name, and the names of those that depend on weights alone."""

    shapes: Mapping[str, Shape]
    types: Mapping[str, int]
    constant: frozenset[str]

    def bytes(self, name: str) -> int:
        """Size of a tensor."""
        return ceil(prod(self.shapes[name]) * element_size(self.types[name]))


def graph_costs(path: Path, axes: Mapping[str, int]) -> Costs:
    """Count the operations and bytes of one run of the graph at `path`, whose weights are not read.

    axes gives the length of each dynamic axis by name; others than the graph has are ignored. Raises InputError where
    one is missing or no positive number, or the lengths do not fit the graph; BundleError for a file that is not a
    graph, or one whose operators cannot be counted.
    """
    model = read_graph(path)
    fix_axes(model.graph, axes, path)
    tensors = infer(model, path)
    by_operator: dict[str, int] = {}
    moved = 0
    for node in model.graph.node:
        count = OPERATORS.get(node.op_type)
        if count is None or node.domain not in ("", "ai.onnx"):
            continue
        names = [name for name in (*node.input, *node.output) if name]
        unknown = [name for name in names if name not in tensors.shapes]
        if unknown:
            raise BundleError(f"{path}: {node.op_type} {node.name!r}: the shape of {', '.join(unknown)} is not known")
        by_operator[node.op_type] = by_operator.get(node.op_type, 0) + count(node, tensors.shapes)
        moved += sum(tensors.bytes(name) for name in names if name not in tensors.constant)
    weights = sum(tensors.bytes(each.name) for each in model.graph.initializer)
    ordered = dict(sorted(by_operator.items(), key=lambda item: -item[1]))
    return Costs(sum(ordered.values()), weights, moved, ordered)


# Shapes


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph in a file, without weights; BundleError where there is none, or it has graphs inside."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # those of a damaged graph have no base class in common
        raise BundleError(f"{path} cannot be read as a graph: {' '.join(str(error).split())}") from error
    if not model.graph.node:
        raise BundleError(f"{path} is not a graph: it has no nodes")
    nested = [node.op_type for node in model.graph.node if any(each.type in GRAPHS for each in node.attribute)]
    if nested:
        raise BundleError(f"{path}: how often the graphs inside of {', '.join(nested)} run is not known before they do")
    return model


def fix_axes(graph: onnx.GraphProto, axes: Mapping[str, int], path: Path) -> None:
    """Give the inputs their lengths."""
    weights = {tensor.name for tensor in graph.initializer}
    missing = set()
    for value in graph.input:
        for axis in value.type.tensor_type.shape.dim if value.name not in weights else ():
            if not axis.HasField("dim_param"):
                continue
            length = axes.get(axis.dim_param)
            if length is None or length < 1:
                missing.add(f"{axis.dim_param} ({'missing' if length is None else length})")
            else:
                axis.dim_value = length
    if missing:
        raise InputError(f"{path.name}: expected a positive length of each axis, found {', '.join(sorted(missing))}")


def infer(model: onnx.ModelProto, path: Path) -> Tensors:
    """The shapes of all tensors, a node at a time; raises InputError where lengths contradict each other.

    Shapes are told by ONNX's own inference of a node's results; the arithmetic on lengths, which that follows only in
    part, is done with the numbers.
    """
    graph = model.graph
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer if is_length(each)}
    types = {value.name: value.type for value in graph.input}
    types |= {each.name: helper.make_tensor_type_proto(each.data_type, each.dims) for each in graph.initializer}
    constant = {each.name for each in graph.initializer}
    for node in graph.node:
        if all(not name or name in constant for name in node.input):
            constant.update(node.output)
        values |= computed(node, types, values, model)
        known = {name: values[name] for name in node.output if name in values}
        if len(known) == len(node.output):
            types |= {name: type_of(array) for name, array in known.items()}
            continue
        try:
            types |= inferred(node, types, values, model)
        except Exception as error:  # of a wrong shape, or of an operator that nothing defines
            reason = " ".join(str(error).split())
            raise InputError(
                f"{path.name}: {node.op_type} {node.name!r} cannot take these lengths: {reason}"
            ) from error
    tensors = {name: each.tensor_type for name, each in types.items()}
    shapes = {
        name: tuple(axis.dim_value for axis in tensor.shape.dim)
        for name, tensor in tensors.items()
        if tensor.HasField("shape") and all(axis.HasField("dim_value") for axis in tensor.shape.dim)
    }
    return Tensors(shapes, {name: tensor.elem_type for name, tensor in tensors.items()}, frozenset(constant))


def is_length(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor can be lengths, or factors of such, and its numbers are in the graph itself."""
    return tensor.data_type in NUMBERS and len(tensor.dims) < 2 and tensor.data_location != onnx.TensorProto.EXTERNAL


def type_of(array: NDArray[Any]) -> onnx.TypeProto:
    """The type of a tensor whose numbers are known."""
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def computed(
    node: onnx.NodeProto, types: Types, values: Mapping[str, NDArray[Any]], model: onnx.ModelProto
) -> dict[str, NDArray[Any]]:
    """A node's results where they follow from lengths alone, else none."""
    if node.op_type == "Shape":
        axes = types[node.input[0]].tensor_type.shape.dim
        chosen = {each.name: each.i for each in node.attribute}
        lengths = [axis.dim_value for axis in axes][chosen.get("start", 0) : chosen.get("end", len(axes))]
        return {node.output[0]: np.array(lengths, np.int64)}
    if not node.input or not all(not name or name in values for name in node.input):
        return {}
    inputs = {name: values[name] for name in node.input if name}
    taken = [helper.make_value_info(name, type_of(array)) for name, array in inputs.items()]
    given = [helper.make_empty_tensor_value_info(name) for name in node.output]
    alone = helper.make_model(helper.make_graph([node], "node", taken, given), opset_imports=model.opset_import)
    found = dict(zip(node.output, ReferenceEvaluator(alone).run(None, inputs), strict=True))
    return {name: np.asarray(array) for name, array in found.items()}


def inferred(
    node: onnx.NodeProto, types: Types, values: Mapping[str, NDArray[Any]], model: onnx.ModelProto
) -> dict[str, onnx.TypeProto]:
    """The types of a node's results."""
    if node.op_type in KEEP_SHAPE:
        return {node.output[0]: types[node.input[0]]}
    opset = next(each.version for each in model.opset_import if each.domain == node.domain)
    return shape_inference.infer_node_outputs(
        defs.get_schema(node.op_type, opset, node.domain),
        node,
        {name: types[name] for name in node.input if name},
        {name: numpy_helper.from_array(values[name]) for name in node.input if name in values},
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
    )


def element_size(kind: int) -> float:
    """Bytes of an element of a type of ONNX, a fraction for types of less than eight bits."""
    return ELEMENT_BITS.get(kind, 0) / 8


# Operations


def convolution(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Every element of the result is a product over the kernel and the input channels of its group."""
    return 2 * prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])


def transposed_convolution(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Every element of the input is spread over the kernel and the output channels of its group."""
    return 2 * prod(shapes[node.input[0]]) * prod(shapes[node.input[1]][1:])


def matrix_product(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Every element of the result is a product over the last axis of the first factor."""
    return 2 * prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def general_product(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """As a matrix product; what is added to it does not count, no more than a convolution's bias."""
    transposed = any(each.name == "transA" and each.i for each in node.attribute)
    return 2 * prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]


def attention(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Scores of every query and key, and their product with the values; those that a mask hides count too."""
    query, key, value = (shapes[name] for name in node.input[:3])
    heads = {each.name: each.i for each in node.attribute}
    past = shapes[node.input[4]][-2] if len(node.input) > 4 and node.input[4] else 0
    if len(query) == 4:  # [batch, heads, tokens, width of a head]
        pairs = prod(query[:3]) * (key[2] + past)
        return 2 * pairs * (query[3] + value[3])
    value_width: int = value[2] // heads["kv_num_heads"]  # [batch, tokens, width of all heads]
    widths: int = query[2] + heads["q_num_heads"] * value_width
    return 2 * query[0] * query[1] * (key[1] + past) * widths


OPERATORS: Mapping[str, Callable[[onnx.NodeProto, Mapping[str, Shape]], int]] = {
    "Attention": attention,
    "Conv": convolution,
    "ConvTranspose": transposed_convolution,
    "Gemm": general_product,
    "MatMul": matrix_product,
}
