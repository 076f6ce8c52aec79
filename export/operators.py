"""Whether ONNX Runtime has a kernel for CUDA for every node of an exported graph.

Where it has none, the node runs on the CPU and its tensors go there and back; opening such a component on a GPU is
refused (engines/placement.py), and the tests see to it that no graph is exported that would be.

ONNX Runtime takes a kernel for a node only where the kernel is registered for the very version of the operator that the
node has, or with a last version that is not exceeded: a kernel of Pad "18+" is not one for Pad of opset 23, which has
changed since. Source: `VerifyVersion` of onnxruntime/core/framework/kernel_registry.cc.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

FLOAT, FLOAT16, BFLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
FLOATS = frozenset({FLOAT, FLOAT16, BFLOAT16})
BUT_BFLOAT16 = frozenset({FLOAT, FLOAT16})
DEFAULT = ("", "ai.onnx")

# Operator -> versions with a kernel (first and last; None: the first alone), and the floating-point types it takes.
# Source: docs/OperatorKernels.md of microsoft/onnxruntime at commit 001d12d2623f, the section of CUDAExecutionProvider,
# cut down to what networks like these use; for Cos and Sin, which came after that,
# onnxruntime/core/providers/cuda/math/unary_elementwise_ops.cc at commit 081aa2fa7849.
KERNELS: Mapping[str, tuple[tuple[int, int | None], frozenset[int]]] = {
    "Add": ((14, None), FLOATS),
    "Attention": ((23, 24), FLOATS),
    "AveragePool": ((22, None), FLOATS),
    "BatchNormalization": ((15, None), BUT_BFLOAT16),
    "Cast": ((23, None), FLOATS),
    "Clip": ((13, None), BUT_BFLOAT16),
    "Concat": ((13, None), FLOATS),
    "ConstantOfShape": ((9, None), FLOATS),
    "Conv": ((22, None), FLOATS),
    "ConvTranspose": ((11, None), BUT_BFLOAT16),
    "Cos": ((22, None), FLOATS),
    "Div": ((14, None), FLOATS),
    "Erf": ((13, None), FLOATS),
    "Exp": ((13, None), FLOATS),
    "Expand": ((13, None), FLOATS),
    "Flatten": ((13, None), FLOATS),
    "Gather": ((13, None), FLOATS),
    "GatherND": ((13, None), FLOATS),
    "Gelu": ((20, None), FLOATS),
    "Gemm": ((13, None), FLOATS),
    "Identity": ((19, None), FLOATS),
    "InstanceNormalization": ((6, None), BUT_BFLOAT16),
    "LayerNormalization": ((17, None), FLOATS),
    "MatMul": ((13, None), FLOATS),
    "Mul": ((14, None), FLOATS),
    "Neg": ((13, None), FLOATS),
    "Pad": ((18, None), BUT_BFLOAT16),
    "Pow": ((15, None), FLOATS),
    "RMSNormalization": ((23, None), FLOATS),
    "Reciprocal": ((13, None), BUT_BFLOAT16),
    "ReduceMean": ((18, None), BUT_BFLOAT16),
    "ReduceSum": ((13, None), FLOATS),
    "Reshape": ((23, None), FLOATS),
    "Resize": ((19, None), BUT_BFLOAT16),
    "Sigmoid": ((13, None), FLOATS),
    "Sin": ((22, None), FLOATS),
    "Slice": ((13, None), FLOATS),
    "Softmax": ((13, None), FLOATS),
    "Split": ((18, None), FLOATS),
    "Sqrt": ((13, None), FLOATS),
    "Squeeze": ((23, None), FLOATS),
    "Sub": ((14, None), FLOATS),
    "Tanh": ((13, None), FLOATS),
    "Tile": ((13, None), FLOATS),
    "Transpose": ((23, None), FLOATS),
    "Unsqueeze": ((23, None), FLOATS),
    "Where": ((16, None), FLOATS),
}


def unsupported(graph: Path) -> list[str]:
    """What of a graph ONNX Runtime has no CUDA kernel for: "operator-version (types): node, ..." each, sorted.

    Nodes that give only integers and booleans do not count: they may run on the CPU. An operator without a kernel that
    ONNX defines by others counts as those, as ONNX Runtime computes it.
    """
    model = onnx.load(graph, load_external_data=False)
    opset = next(each.version for each in model.opset_import if each.domain in DEFAULT)
    types = tensor_types(model.graph)
    problems: dict[str, list[str]] = {}
    for node in model.graph.node:
        found = [types.get(name, 0) for name in (*node.input, *node.output) if name]
        if not any(types.get(name) in FLOATS for name in node.output) or has_kernel(node, opset, found):
            continue
        if without := body_without_kernels(node, opset, types):
            names = ", ".join(sorted({onnx.TensorProto.DataType.Name(each).lower() for each in found}))
            reason = "" if without == [node.op_type] else f", by way of {', '.join(without)}"
            problems.setdefault(f"{node.op_type}-{since(node, opset)} ({names}){reason}", []).append(node.name)
    return [f"{problem}: {', '.join(nodes)}" for problem, nodes in sorted(problems.items())]


def tensor_types(graph: onnx.GraphProto) -> dict[str, int]:
    """The element types of a graph's tensors by name, as the file tells them."""
    values: Iterable[onnx.ValueInfoProto] = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def has_kernel(node: onnx.NodeProto, opset: int, types: Sequence[int]) -> bool:
    """Whether there is a kernel for a node whose tensors have these types."""
    if node.domain not in DEFAULT or node.op_type not in KERNELS:
        return False
    (first, last), floats = KERNELS[node.op_type]
    version = since(node, opset)
    return (version == first or (last is not None and first <= version <= last)) and set(types) & FLOATS <= floats


def since(node: onnx.NodeProto, opset: int) -> int:
    """The version of a node's operator; 0 for one that ONNX does not define."""
    if node.domain not in DEFAULT or not onnx.defs.has(node.op_type):
        return 0
    return onnx.defs.get_schema(node.op_type, opset).since_version


def body_without_kernels(node: onnx.NodeProto, opset: int, types: Mapping[str, int]) -> list[str]:
    """The operators without a kernel that a node comes down to: none, where ONNX defines it by such that have one."""
    schema: Any = onnx.defs.get_schema(node.op_type, opset) if since(node, opset) else None  # its stubs lack some
    if schema is None or not schema.has_context_dependent_function:
        return [node.op_type]
    inputs = [onnx.helper.make_tensor_type_proto(types.get(name, 0), None) for name in node.input]
    definition = schema.get_context_dependent_function(
        node.SerializeToString(), [each.SerializeToString() for each in inputs]
    )
    body = onnx.FunctionProto.FromString(definition).node
    computed = {types.get(name, 0) for name in (*node.input, *node.output)}
    # its constants become part of the graph; types inside are those outside, or fp32, in which it is computed
    return sorted(
        {each.op_type for each in body if each.op_type not in ("Constant", "Shape")}
        - {each.op_type for each in body if has_kernel(each, opset, sorted(computed | {FLOAT}))}
    )
