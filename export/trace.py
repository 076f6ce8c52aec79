"""From a network on the meta device to an ONNX graph whose initializers point into a weights file.

Nothing here holds a weight: the network has shapes only, and the graph refers to bytes that another part writes.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..engines.spec import TensorSpec
from .graphs import Graph
from .weight_files import TensorLocation

OPSET = 23  # the first with Attention; GroupNormalization and LayerNormalization are older
EXAMPLE_LENGTHS = (2, 3, 5, 7, 11, 13)  # of dynamic axes: all different, so that none is taken for another
ONNX_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
# Largest constant, in bytes, that may lie inside the graph file; anything larger is a weight that was folded.
MAX_INLINE = 64 * 1024


class Widened(ir.LazyTensor):
    """A tensor of the weights file in the type that the graph computes in, wider than that of the file."""

    def __init__(self, stored: ir.ExternalTensor, dtype: ir.DataType) -> None:
        def widen() -> ir.TensorProtocol:
            return ir.tensor(stored.numpy().astype(dtype.numpy()), name=stored.name)

        super().__init__(widen, dtype, ir.Shape(stored.shape), name=stored.name)
        self.stored = stored


class Method(nn.Module):
    """One method of a network as a module, as torch.export wants it: its inputs in the order of the graph."""

    def __init__(self, network: nn.Module, graph: Graph) -> None:
        super().__init__()
        self.network = network
        self.graph = graph

    def forward(self, *inputs: Tensor) -> Any:
        """What the method gives."""
        return self.graph.call(self.network, inputs)


def trace(network: nn.Module, graph: Graph) -> ir.Model:
    """Trace a method of a network that lies on the meta device.

    Initializers have the network's parameter names and no data; inputs, outputs and axes have the names of `graph`.
    """
    args, axes = example_inputs(graph)
    names = [spec.name for spec in graph.outputs]
    with torch.no_grad(), quiet(), without_collection():
        # What is true of every size, and releases of torch before 2.13 cannot show to be, is no reason to refuse.
        program = torch.export.export(
            Method(network, graph), args, dynamic_shapes=(axes,), prefer_deferred_runtime_asserts_over_guards=True
        )
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=[spec.name for spec in graph.inputs],
            output_names=names,
        )
    if onnx_program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    model: ir.Model = onnx_program.model
    for value in list(model.graph.initializers.values()):
        rename_initializer(model, value, (value.name or "").removeprefix("network."))
    for value, spec in zip([*model.graph.inputs, *model.graph.outputs], [*graph.inputs, *graph.outputs], strict=True):
        value.shape = ir.Shape(spec.shape)
    return model


def example_inputs(graph: Graph) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Meta tensors for the inputs, and torch.export's description of their dynamic axes."""
    names = list(dict.fromkeys(axis for spec in graph.inputs for axis in spec.shape if isinstance(axis, str)))
    dims: dict[str, Any] = {name: torch.export.Dim(name) * graph.multiples.get(name, 1) for name in names}
    lengths = {name: n * graph.multiples.get(name, 1) for name, n in zip(names, EXAMPLE_LENGTHS, strict=False)}

    def example(spec: TensorSpec) -> Tensor:
        shape = [lengths[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        return torch.zeros(shape, dtype=getattr(torch, spec.dtype), device="meta")

    args = tuple(example(spec) for spec in graph.inputs)
    dynamic = ({i: dims[axis] for i, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in graph.inputs)
    return args, tuple(dynamic)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Hold back the garbage collector: tracing makes millions of objects that live on, and it looks at all of them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's notes about itself: nothing in them is the user's to mend."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def rename_initializer(model: ir.Model, value: ir.Value, name: str) -> None:
    """Give an initializer another name, in the graph's table too."""
    if value.name != name:
        del model.graph.initializers[value.name or ""]
        value.name = name
        model.graph.initializers[name] = value


def link_weights(
    model: ir.Model,
    location: str,
    folder: Path,
    tensors: Mapping[str, TensorLocation],
    constants: Mapping[str, Tensor],
) -> None:
    """Point every initializer at its bytes: `location` is relative to `folder`, where the graph file will lie.

    `constants` are buffers that no checkpoint stores, by name; they lie inside the graph file. Weights that are stored
    in another type than the graph computes in are `Widened`, for `cast_weights`.
    """
    for name, value in model.graph.initializers.items():
        if name in constants:
            value.const_value = ir.tensor(constants[name].numpy(), name=name)
        elif name in tensors:
            place = tensors[name]
            dtype, shape = ONNX_DTYPES[place.dtype], ir.Shape(place.shape)
            stored = ir.ExternalTensor(
                location, place.offset, place.length, dtype, shape=shape, name=name, base_dir=folder
            )
            # What folds constants has to see the type that the rest of the graph has.
            value.const_value = stored if value.dtype in (None, dtype) else Widened(stored, value.dtype)
            value.shape, value.dtype = shape, value.const_value.dtype
        else:
            raise RuntimeError(f"the graph reads {name!r}, which is neither a weight nor a constant of the network")


def clean(model: ir.Model) -> None:
    """Fold what is constant, drop what does nothing, and see that no weight came to lie inside the graph file."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    with quiet(), without_collection():
        # Its limit is in elements, of 8 bytes at most.
        optimizer.optimize_ir(model, num_iterations=1, output_size_limit=MAX_INLINE // 8, should_fold=unless_linear)
        passes.IdentityEliminationPass()(model)
        passes.ClearMetadataAndDocStringPass()(model)
        passes.RemoveUnusedOpsetsPass()(model)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor | Widened) and tensor.nbytes > MAX_INLINE:
            raise RuntimeError(f"{name}: {tensor.nbytes} bytes would lie inside the graph")


def unless_linear(node: ir.Node) -> bool | None:
    """Whether a node may be folded; None leaves it to the optimizer.

    Not the Transpose of a linear layer's weight, which is stored [out, in] as checkpoints have it: OpenVINO computes
    with that, and would make a copy of what is stored [in, out].
    """
    (weight, *_) = node.inputs or (None,)
    is_weight = weight is not None and isinstance(weight.const_value, ir.ExternalTensor | Widened)
    return False if node.op_type == "Transpose" and is_weight else None


def cast_weights(model: ir.Model) -> None:
    """Read every `Widened` weight as it is stored, through one Cast before the first node that uses it.

    After `clean`, which would fold the casts of small weights into the graph file.
    """
    for node in list(model.graph):
        for value in node.inputs:
            if value is None or not isinstance(value.const_value, Widened):
                continue
            wide = value.const_value
            result = ir.Value(name=f"{value.name}.cast", shape=value.shape, type=ir.TensorType(wide.dtype))
            ir.convenience.replace_all_uses_with(value, result)
            to = ir.AttrInt64("to", wide.dtype.value)
            cast = ir.Node("", "Cast", [value], [to], outputs=[result], name=f"{value.name}.cast")
            model.graph.insert_before(node, cast)
            value.const_value, value.dtype = wide.stored, wide.stored.dtype
