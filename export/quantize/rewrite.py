"""Layers in 8 bits, as nodes of a graph.

A layer in 8 bits is the layer as it was between QuantizeLinear and DequantizeLinear, of standard ONNX: what runs the
graph puts its own int8 kernel in their place. Of ONNX Runtime 1.31's CPU provider that is QLinearConv, which needs the
convolution's result rounded as well, and MatMulIntegerToFloat, which does not; OpenVINO 2026.4 takes the same nodes,
and both round a bias in 32 bits themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from .grids import Grid
from .layers import Layer
from .storage import Place

INT8, SCALE = ".int8", ".scale"  # what a weight's name ends in, in 8 bits, and its scales'


@dataclass(frozen=True)
class Weights:
    """Where the weights in 8 bits lie: file `location`, relative to `folder`, in which the graph will be."""

    folder: Path
    location: str
    places: Mapping[str, Place]

    def tensor(self, name: str) -> ir.ExternalTensor:
        """A tensor of the file."""
        place = self.places[name]
        return ir.ExternalTensor(
            self.location, place.offset, place.length, place.dtype,
            shape=ir.Shape(place.shape), name=name, base_dir=self.folder,
        )  # fmt: skip


class Rewriter:
    """Adds layers in 8 bits to a graph, beside those that they are of or in their place."""

    def __init__(self, model: ir.Model, grids: Mapping[str, Grid], weights: Weights) -> None:
        self.model, self._grids, self._weights = model, grids, weights
        self._values = {value.name: value for node in model.graph for value in node.outputs}
        self._values |= {value.name: value for value in model.graph.inputs}
        self._rounded: dict[str, ir.Value] = {}

    def value(self, name: str) -> ir.Value:
        """A tensor of the graph as it was, weights apart."""
        return self._values[name]

    def add(self, layer: Layer) -> ir.Value:
        """The result of a layer in 8 bits, of what the layer itself is applied to."""
        node = self.value(layer.result).producer()
        if node is None:
            raise RuntimeError(f"{layer.result} is not the result of a node")
        data = self._round(self.value(layer.data), layer.data, before=node)
        inputs = [data, self._weight(layer, node), *node.inputs[2:]]
        name = f"{layer.name}{INT8}"
        result = self._made(f"{layer.result}.exact", ir.DataType.FLOAT, self.value(layer.result).shape)
        made = ir.Node("", node.op_type, inputs, list(node.attributes.values()), outputs=[result], name=name)
        self.model.graph.insert_after(node, made)
        return self._pair(result, layer.result, after=made) if layer.rounds_result else result

    def replace(self, layers: Iterable[Layer]) -> None:
        """Let the graph compute layers in 8 bits; they come in the graph's order."""
        for layer in layers:
            exact, result = self.value(layer.result), self.add(layer)
            ir.convenience.replace_all_uses_with(exact, result)
            if layer.rounds_result:  # a layer that reads it need not round it again
                self._rounded[layer.result] = result
            self._values[layer.result] = result
        passes.RemoveUnusedNodesPass()(self.model)

    def _round(self, value: ir.Value, name: str, before: ir.Node) -> ir.Value:
        """The tensor `name` rounded to its grid, once for all layers that read it."""
        if name not in self._rounded:
            quantize, dequantize = self._nodes(value, self._grids[name], f"{name}.data")
            self.model.graph.insert_before(before, [quantize, dequantize])
            self._rounded[name] = dequantize.outputs[0]
        return self._rounded[name]

    def _pair(self, value: ir.Value, name: str, after: ir.Node) -> ir.Value:
        """A layer's result rounded to its grid."""
        quantize, dequantize = self._nodes(value, self._grids[name], f"{name}.result")
        self.model.graph.insert_after(after, [quantize, dequantize])
        return dequantize.outputs[0]

    def _nodes(self, value: ir.Value, grid: Grid, name: str) -> tuple[ir.Node, ir.Node]:
        scale = self._constant(f"{name}.scale", np.array(grid.scale, np.float32))
        zero = self._constant(f"{name}.zero", np.array(grid.zero, np.uint8))
        levels = self._made(f"{name}.uint8", ir.DataType.UINT8, value.shape)
        rounded = self._made(f"{name}.rounded", ir.DataType.FLOAT, value.shape)
        quantize = ir.Node("", "QuantizeLinear", [value, scale, zero], outputs=[levels], name=f"{name}.quantize")
        dequantize = ir.Node(
            "", "DequantizeLinear", [levels, scale, zero], outputs=[rounded], name=f"{name}.dequantize"
        )
        return quantize, dequantize

    def _weight(self, layer: Layer, before: ir.Node) -> ir.Value:
        """The layer's weight as its numbers in 8 bits say it."""
        stored = self._stored(layer.weight + INT8)
        scales = self._stored(layer.weight + SCALE)
        channels = self._weights.places[layer.weight + SCALE].shape[0]
        zeros = self._constant(f"zeros.{channels}", np.zeros(channels, np.int8))
        result = self._made(
            f"{layer.result}.weight", ir.DataType.FLOAT, ir.Shape(self._weights.places[layer.weight + INT8].shape)
        )
        axis = ir.AttrInt64("axis", layer.axis)
        node = ir.Node("", "DequantizeLinear", [stored, scales, zeros], [axis], outputs=[result], name=result.name)
        self.model.graph.insert_before(before, node)
        return result

    def _stored(self, name: str) -> ir.Value:
        if name not in self.model.graph.initializers:
            tensor = self._weights.tensor(name)
            value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.model.graph.register_initializer(value)
        return self.model.graph.initializers[name]

    def _constant(self, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
        """A constant inside the graph file."""
        if name not in self.model.graph.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.model.graph.register_initializer(value)
        return self.model.graph.initializers[name]

    def _made(self, name: str, dtype: ir.DataType, shape: Any) -> ir.Value:
        return ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
