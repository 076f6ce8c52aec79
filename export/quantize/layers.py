"""Which layers of a graph can compute in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

# Along which axis of its weight an operator's output channels lie: Conv [out, in, ...], MatMul [in, out].
CHANNEL_AXES = {"Conv": 0, "MatMul": 1}
# The first and the last layer: few operations, and every error of theirs is one of the picture.
ENDS = ("conv_in.", "conv_out.")
# Name of a node's attribute in ONNX, and its value in a convolution that is not split into groups
GROUP, UNDIVIDED = "group", 1
TRANSPOSED = ".transposed"  # of weights stored [in, out]; export/trace.py gives them that name


@dataclass(frozen=True)
class Layer:
    """A convolution, or the matrix product of a linear layer, by the names of the tensors around it.

    weight is an initializer, data the tensor that the layer is applied to, result what it gives.
    """

    weight: str
    operator: str
    data: str
    result: str

    @property
    def axis(self) -> int:
        """Of the weight: along it lie the output channels."""
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
        Layer(weight.name or "", node.op_type, node.inputs[0].name or "", node.outputs[0].name or "")
        for node, weight in weighted(model)
        if not (weight.name or "").startswith(ENDS) and not node.outputs[0].is_graph_output() and node.inputs[0]
    ]


def weighted(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Nodes of the operators above whose second input is a weight, with that weight."""
    for node in model.graph:
        if node.op_type not in CHANNEL_AXES or node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "Conv" and node.attributes.get_int(GROUP, UNDIVIDED) != UNDIVIDED:
            continue
        weight = stored(node.inputs[1])
        if (
            weight is not None
            and weight.shape is not None
            and len(weight.shape) == (4 if node.op_type == "Conv" else 2)
        ):
            yield node, weight


def stored(value: ir.Value | None) -> ir.Value | None:
    """The weight in a file that a value is, or is the cast of; None for everything else."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    if value is None or not isinstance(value.const_value, ir.ExternalTensor):
        return None
    return value
