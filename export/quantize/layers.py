"""Which layers of a graph can compute in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

# Along which axis of the weight that an operator takes its output channels lie: Conv [out, in, ...], MatMul [in, out].
CHANNEL_AXES = {"Conv": 0, "MatMul": 1}
# Operator, axes of its weight, and whether that is transposed first
FORMS = {("Conv", 4, False), ("MatMul", 2, False), ("MatMul", 2, True)}
# The first and the last layer: few operations, and every error of theirs is one of the picture.
ENDS = ("conv_in.", "conv_out.")
# Name of a node's attribute in ONNX, and its value in a convolution that is not split into groups
GROUP, UNDIVIDED = "group", 1
# What the name of a linear layer's weight ends in where it is stored [in, out], as bundles once had it; without, it is
# stored [out, in], and the graph transposes it.
TRANSPOSED = ".transposed"


@dataclass(frozen=True)
class Layer:
    """A convolution, or the matrix product of a linear layer, by the names of the tensors around it.

    weight is an initializer, data the tensor that the layer is applied to, result what it gives. flipped says that the
    operator takes the weight transposed.
    """

    weight: str
    operator: str
    data: str
    result: str
    flipped: bool = False

    @property
    def axis(self) -> int:
        """Of the weight as the operator takes it: along it lie the output channels."""
        return CHANNEL_AXES[self.operator]

    @property
    def name(self) -> str:
        """The layer's name in its checkpoint."""
        return self.weight.removesuffix(TRANSPOSED).removesuffix(".weight")

    @property
    def rounds_result(self) -> bool:
        """Whether its result is in 8 bits too, which ONNX Runtime's kernel of convolutions asks for."""
        return self.operator == "Conv"


def find_layers(model: ir.Model) -> list[Layer]:
    """The layers that can compute in 8 bits, in the graph's order.

    Not among them: products of two activations (attention), layers on vectors (Gemm: the time projections), the first
    and the last convolution, and what is an output of the graph.
    """
    return [
        Layer(weight.name or "", node.op_type, node.inputs[0].name or "", node.outputs[0].name or "", flipped)
        for node, weight, flipped in weighted(model)
        if not (weight.name or "").startswith(ENDS) and not node.outputs[0].is_graph_output() and node.inputs[0]
    ]


def weighted(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value, bool]]:
    """Nodes of the operators above whose second input is a weight, with that weight and whether it is transposed."""
    for node in model.graph:
        if node.op_type not in CHANNEL_AXES or node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "Conv" and node.attributes.get_int(GROUP, UNDIVIDED) != UNDIVIDED:
            continue
        found = stored(node.inputs[1])
        if found is None or found[0].shape is None:
            continue
        weight, flipped = found
        if (node.op_type, len(found[0].shape), flipped) in FORMS:
            yield node, weight, flipped


def stored(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The weight in a file that a value is, or is the cast or the transpose of, and whether transposed; else None."""
    flipped = False
    while value is not None and (node := value.producer()) is not None and node.op_type in ("Cast", "Transpose"):
        flipped ^= node.op_type == "Transpose"
        value = node.inputs[0]
    return (value, flipped) if value is not None and isinstance(value.const_value, ir.ExternalTensor) else None
