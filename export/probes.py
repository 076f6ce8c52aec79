"""Graphs that show more than their outputs: the results of their layers, and the same computed in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..engines.spec import TensorSpec

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
HALVES = FLOATS[1:]
# The outputs that are added. All results are one vector, so that its type and shape are the same in every library,
# whatever each of them infers of the tensors in it.
SIZES, RESULTS = "probe.sizes", "probe.results"


@dataclass(frozen=True)
class Layer:
    """A node that computes floating-point numbers from the graph's inputs.

    inputs and outputs name those of its tensors that are such numbers too: no weights, no shapes.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def layers(graph: Path) -> list[Layer]:
    """The layers of a graph, each after those it reads from.

    What depends on weights alone, such as their cast, is no layer: its results are weights.
    """
    model = ir.load(graph)
    moving = set(model.graph.inputs)
    found = []
    for i, node in enumerate(model.graph):
        inputs = [value for value in node.inputs if value is not None and value in moving]
        if not inputs:
            continue
        moving.update(node.outputs)
        outputs = names_of_floats(node.outputs)
        if outputs:
            name = node.name or f"node {i + 1}"
            found.append(Layer(name, node.op_type, tuple(names_of_floats(inputs)), tuple(outputs)))
    return found


def names_of_floats(values: Sequence[ir.Value]) -> list[str]:
    """Names of the floating-point tensors among `values`."""
    return [value.name for value in values if value.dtype in FLOATS and value.name]


def add_sizes(source: Path, target: Path, tensors: Sequence[str]) -> TensorSpec:
    """Write a copy of a graph that also gives how many elements each of `tensors` has: int64 [len(tensors)].

    `target` refers to weights as `source` does, relative to its own folder.
    """
    model = ir.load(source)
    whole = constant(model, -1)
    sizes = [
        append(model, "Reshape", [append(model, "Size", [v], ir.DataType.INT64), whole]) for v in named(model, tensors)
    ]
    return finish(model, target, SIZES, sizes, ir.DataType.INT64, len(tensors))


def add_results(source: Path, target: Path, tensors: Sequence[str]) -> TensorSpec:
    """Write a copy of a graph that also gives `tensors`: float32 [all their elements], one after the other.

    `target` refers to weights as `source` does, relative to its own folder.
    """
    model = ir.load(source)
    whole, wanted = constant(model, -1), []
    for value in named(model, tensors):
        wide = value if value.dtype == ir.DataType.FLOAT else append(model, "Cast", [value], ir.DataType.FLOAT)
        wanted.append(append(model, "Reshape", [wide, whole]))
    return finish(model, target, RESULTS, wanted, ir.DataType.FLOAT, "elements")


def named(model: ir.Model, tensors: Sequence[str]) -> list[ir.Value]:
    """The values of those names."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    return [values[name] for name in tensors]


def constant(model: ir.Model, value: int) -> ir.Value:
    """A new constant int64 [1]."""
    tensor = ir.tensor(np.array([value], np.int64), name=f"probe.{value}")
    made = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]))
    model.graph.register_initializer(made)
    return made


def append(model: ir.Model, operator: str, inputs: Sequence[ir.Value], dtype: ir.DataType | None = None) -> ir.Value:
    """The result of a node added to the graph's end, which is of `dtype`, or of its first input's."""
    kind = dtype or inputs[0].dtype
    attributes = {"to": kind.value} if operator == "Cast" and kind is not None else {}
    attributes |= {"axis": 0} if operator == "Concat" else {}
    node = ir.node(operator, list(inputs), attributes)
    (made,) = node.outputs
    made.name, made.type = f"probe.{len(model.graph)}", None if kind is None else ir.TensorType(kind)
    model.graph.append(node)
    return made


def finish(
    model: ir.Model, target: Path, name: str, parts: Sequence[ir.Value], dtype: ir.DataType, length: int | str
) -> TensorSpec:
    """Add the output `name`, all `parts` as one vector, and write the graph."""
    made = append(model, "Concat", parts, dtype)
    made.name, made.shape = name, ir.Shape([length])
    model.graph.outputs.append(made)
    ir.save(model, target)
    return TensorSpec(name, "int64" if dtype == ir.DataType.INT64 else "float32", (length,))


def widen(source: Path, target: Path) -> None:
    """Write a copy of a graph with every fp16 and bf16 tensor and cast in fp32, weights included, beside it as a file.

    Weights keep the values that they have.
    """
    model, fp32 = ir.load(source), ir.DataType.FLOAT
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.dtype in HALVES:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = fp32
    for node in model.graph:
        for value in node.outputs:
            if value.dtype in HALVES:
                value.dtype = fp32
        for attribute in list(node.attributes.values()):
            if attribute.name == "to" and attribute.as_int() in [half.value for half in HALVES]:
                node.attributes["to"] = ir.AttrInt64("to", fp32.value)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALVES:
                wide = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, wide)
    ir.save(model, target, external_data=f"{target.name}.data")
