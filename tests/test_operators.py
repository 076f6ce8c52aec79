"""CUDA kernels for every node of every exported graph, and the check that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from kandrt.engines.placement import RECORD, placed
from kandrt.export.exporter import export_bundle
from kandrt.export.operators import KERNELS, unsupported
from kandrt.export.trace import OPSET

from .conftest import once

DTYPES = {"float": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_cuda_has_a_kernel_for_every_node(
    precision: Any, bundle: Path, checkpoints: dict[str, Path], shared: Path
) -> None:
    """Of every kind of component: the ControlNet decoder's step has all that the plain decoder's has."""
    folder = bundle
    if precision != "fp32":
        sources = [checkpoints["prior"], checkpoints["controlnet"]]
        folder = once(
            shared / f"bundle-{precision}", lambda path: export_bundle(sources, path, precision=precision, check=False)
        )
    graphs = sorted(folder.glob("*.onnx"))
    assert len(graphs) >= 8
    assert {graph.stem: problems for graph in graphs if (problems := unsupported(graph))} == {}


def graph(folder: Path, node: onnx.NodeProto, dtype: int, *, opset: int = OPSET, given: int | None = None) -> Path:
    """A graph of one node: x [2, 4, 8, 8] of `dtype`, further inputs of its type or `given`, output y of `dtype`."""
    inputs = [helper.make_tensor_value_info("x", dtype, [2, 4, 8, 8])]
    inputs += [helper.make_tensor_value_info(name, given or dtype, ["n"]) for name in node.input[1:] if name]
    output = helper.make_tensor_value_info("y", dtype, None)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("other", 1)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, [output]), opset_imports=imports, ir_version=10)
    path = folder / "graph.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("operator", "inputs", "dtype", "opset", "expected"),
    [
        ("Sigmoid", "x", "bfloat16", 23, []),
        ("Resize", "x", "float16", 23, []),
        ("Resize", "x", "bfloat16", 23, ["Resize-19 (bfloat16): node"]),  # a kernel, but not of this type
        ("Pad", "x", "float", 18, []),
        ("Pad", "x", "float", 23, ["Pad-23 (float): node"]),  # a kernel, but of an older version
        ("InstanceNormalization", "x x x", "float", 21, []),
        ("InstanceNormalization", "x x x", "float", 23, ["InstanceNormalization-22 (float): node"]),
        ("Cos", "x", "float", 23, []),
        ("Cos", "x", "float", 21, ["Cos-7 (float): node"]),
        ("Attention", "x x x", "bfloat16", 24, []),
        ("Det", "x", "float", 23, ["Det-22 (float): node"]),
        ("Nothing", "x", "float", 23, ["Nothing-0 (float): node"]),
    ],
)
def test_kernels_are_found_by_version_and_type(
    operator: str, inputs: str, dtype: str, opset: int, expected: list[str], tmp_path: Path
) -> None:
    node = helper.make_node(operator, inputs.split(), ["y"], name="node")
    assert unsupported(graph(tmp_path, node, DTYPES[dtype], opset=opset)) == expected


def test_another_domain_is_not_that_of_the_kernels(tmp_path: Path) -> None:
    node = helper.make_node("Sigmoid", ["x"], ["y"], name="node", domain="other")
    assert unsupported(graph(tmp_path, node, TensorProto.FLOAT)) == ["Sigmoid-0 (float): node"]


def test_arithmetic_of_integers_may_run_anywhere(tmp_path: Path) -> None:
    node = helper.make_node("ArgMax", ["x"], ["y"], name="node", axis=1)
    assert unsupported(graph(tmp_path, node, TensorProto.INT64)) == []


def group_norm(folder: Path, dtype: int) -> Path:
    node = helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], name="node", num_groups=2)
    return graph(folder, node, dtype)


def test_an_operator_without_a_kernel_counts_as_what_it_is_defined_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "GroupNormalization" not in KERNELS
    assert unsupported(group_norm(tmp_path, TensorProto.FLOAT)) == []
    monkeypatch.setattr(
        "kandrt.export.operators.KERNELS", {name: kernel for name, kernel in KERNELS.items() if name != "ReduceMean"}
    )
    assert unsupported(group_norm(tmp_path, TensorProto.FLOAT)) == [
        "GroupNormalization-21 (float), by way of ReduceMean: node"
    ]


def test_onnxruntime_computes_it_by_that_definition(tmp_path: Path) -> None:
    """It has no kernel for it on the CPU either, where it can be asked what it runs instead."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(RECORD, "1")
    path = str(group_norm(tmp_path, TensorProto.FLOAT))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = {node.operator for node in placed(session)}
    assert "GroupNormalization" not in found
    assert "ReduceMean" in found
    assert found <= KERNELS.keys() | {"Shape"}
