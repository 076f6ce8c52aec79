"""Which provider has which node: nothing that computes moves to another provider without a word."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kandrt.engines.backends import open_component
from kandrt.engines.bundle import open_bundle
from kandrt.engines.errors import BackendError, BundleError, InputError
from kandrt.engines.graph_types import whole_number_nodes
from kandrt.engines.manifest import Component, FileRecord
from kandrt.engines.ort import OrtSession
from kandrt.engines.placement import Placed, check_placement, left_out, placed
from kandrt.engines.providers import HINTS
from kandrt.engines.spec import TensorSpec

from .openvino_plugin import BACKEND, require_plugin

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
IN_FP32 = {"load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "%s"}}' % HINTS["fp32"]}  # noqa: UP031  # braces


# What a graph file tells


def test_nodes_of_whole_numbers_are_those_that_onnx_tells(bundle: Path) -> None:
    for path in sorted(bundle.glob("*.onnx")):
        graph = onnx.load(path, load_external_data=False).graph
        types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
        floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
        expected = {node.name for node in graph.node if not any(types[name] in floats for name in node.output)}
        assert whole_number_nodes(path) == expected
        assert len({node.name for node in graph.node if node.name}) == len(graph.node)  # names tell nodes apart
    assert expected


@pytest.mark.parametrize(
    "content", [b"", b"not a graph at all", b"\x3a\x7f", b"\x3b", b"\x3a\x02\x0a\xff", b"\xff" * 9]
)
def test_a_file_that_is_no_graph_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"graph\.onnx is damaged: not an ONNX graph; export the bundle again"):
        whole_number_nodes(path)


def test_cut_short_anywhere_a_graph_is_read_or_refused(bundle: Path, tmp_path: Path) -> None:
    content, path = (bundle / "prior_step.onnx").read_bytes(), tmp_path / "graph.onnx"
    for size in range(0, len(content), 997):
        path.write_bytes(content[:size])
        with pytest.raises(BundleError):
            whole_number_nodes(path)


# What may be left out


def test_what_computes_may_not_be_left_out() -> None:
    nodes = [
        Placed(CUDA, "Conv", "conv"),
        Placed(CPU, "Conv", "other_conv"),
        Placed(CPU, "Add", "add_of_shapes"),
        Placed(CPU, "Add", "add_of_floats"),
        Placed(CPU, "com.microsoft.FusedConv", "fused"),
        Placed(CPU, "Div", ""),
        Placed(CPU, "Sqrt", ""),
        Placed("TensorrtExecutionProvider", "Softmax", "softmax"),
    ]
    left = left_out(nodes, CUDA, frozenset({"add_of_shapes"}))
    assert [node.name or node.operator for node in left] == ["other_conv", "add_of_floats", "fused", "Sqrt", "softmax"]


class Node:
    def __init__(self, operator: str, name: str, domain: str = "") -> None:
        self.op_type, self.name, self.domain = operator, name, domain


class Part:
    def __init__(self, provider: str, nodes: Sequence[Node]) -> None:
        self.ep_name, self._nodes = provider, nodes

    def get_nodes(self) -> Sequence[Node]:
        return self._nodes


class Session:
    """ONNX Runtime's answer for CUDA, which no machine of the tests need have."""

    def __init__(self, *parts: Part) -> None:
        self._parts = parts

    def get_provider_graph_assignment_info(self) -> Sequence[Part]:
        return self._parts


def test_the_message_names_operators_counts_and_nodes(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    sines = [Node("Sin", f"sin_{i}") for i in range(5)]
    session = Session(
        Part(CUDA, [Node("Conv", "c"), *[Node("Add", "a")] * 3]), Part(CPU, [*sines, Node("Gelu", "g", "other")])
    )
    listing = (
        f"x: {CUDA} has no kernels for 6 of 10 nodes, {CPU} has them: 5 Sin (sin_0, sin_1, sin_2, …); 1 other.Gelu (g)"
    )
    with pytest.raises(BackendError) as caught:
        check_placement("x", session, bundle / "prior_step.onnx", CUDA, "fail")
    assert str(caught.value) == f"{listing}; use another backend, or accept this with option placement=warn"
    with caplog.at_level(logging.WARNING, "kandrt"):
        check_placement("x", session, bundle / "prior_step.onnx", CUDA, "warn")
    assert caplog.messages == [listing]


def test_shapes_of_our_graphs_may_stay_on_the_cpu(bundle: Path) -> None:
    """Whatever a graph computes on integers, and what the definition of GroupNormalization does."""
    path = bundle / "decoder_step.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    whole = whole_number_nodes(path)
    own = [Node(node.op_type, node.name) for node in graph.node if node.name in whole]
    assert {node.op_type for node in own} >= {"Shape", "Concat"}
    rest = [Node(node.op_type, node.name) for node in graph.node if node.name not in whole]
    body = [Node(operator, "") for operator in ("Shape", "Div", "Concat")]
    check_placement("x", Session(Part(CUDA, rest), Part(CPU, [*own, *body])), path, CUDA, "fail")


def test_an_onnxruntime_that_cannot_tell_is_refused(bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"cannot tell which provider has which node, 1\.31 can; run: pip install"):
        check_placement("x", object(), bundle / "prior_step.onnx", CUDA, "fail")


# A second provider that is real


def graph_with(operator: str, folder: Path) -> tuple[Path, Component]:
    """Exp(operator(Relu(x))) of float32 [batch, 4, 4], and the component that it is."""
    steps = [("Relu", "x", "a", "first"), (operator, "a", "b", "middle"), ("Exp", "b", "y", "last")]
    nodes = [helper.make_node(kind, [given], [made], name=name) for kind, given, made, name in steps]
    shape: list[int | str] = ["batch"] if operator == "Det" else ["batch", 4, 4]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 23)], ir_version=10
    )
    path = folder / f"{operator}.onnx"
    onnx.save(model, path)
    inputs, outputs = TensorSpec("x", "float32", ("batch", 4, 4)), TensorSpec("y", "float32", tuple(shape))
    return path, Component(FileRecord(path.name, 0, "0" * 64), (), (inputs,), (outputs,), "fp32", 0)


def test_an_operator_without_a_kernel_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """OpenVINO's provider has none for determinants."""
    require_plugin()
    path, component = graph_with("Det", tmp_path)
    given: dict[str, Any] = {"backend": BACKEND, "settings": IN_FP32}
    listing = (
        r"g: OpenVINOExecutionProvider has no kernels for 1 of 3 nodes, CPUExecutionProvider has them: 1 Det \(middle\)"
    )
    with pytest.raises(BackendError, match=listing):
        OrtSession("g", path, component, "cpu", 1, **given)
    with (
        caplog.at_level(logging.WARNING, "kandrt"),
        closing(OrtSession("g", path, component, "cpu", 1, mode="warn", **given)) as session,
    ):
        x = np.random.default_rng(0).standard_normal((2, 4, 4), np.float32)
        np.testing.assert_allclose(session(x=x)["y"], np.exp(np.linalg.det(np.maximum(x, 0))), rtol=1e-4)
        nodes = {(node.operator, node.provider) for node in placed(session._session)}
    provider = "OpenVINOExecutionProvider"
    assert nodes == {("Relu", provider), ("Det", CPU), ("Exp", provider)}
    assert len(caplog.messages) == 1


def test_a_graph_that_it_has_kernels_for_opens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    require_plugin()
    path, component = graph_with("Neg", tmp_path)
    with closing(OrtSession("g", path, component, "cpu", 1, backend=BACKEND, settings=IN_FP32)) as session:
        x = np.ones((1, 4, 4), np.float32)
        np.testing.assert_allclose(session(x=x)["y"], np.exp(-x), rtol=1e-6)
    assert not caplog.messages


@pytest.mark.parametrize(("component", "count"), [("prior_step", 2), ("movq_encoder", 2)])
def test_attention_is_refused_where_openvinos_provider_has_none(component: str, count: int, bundle: Path) -> None:
    """Of 1.8.1 its own list of operators lacks Attention, which OpenVINO itself computes."""
    require_plugin()
    with pytest.raises(BackendError, match=r"has them: \d+ Attention .*; use another backend") as caught:
        open_component(open_bundle(bundle), component, backend=BACKEND, device="cpu", threads=1)
    assert f"{component}: OpenVINOExecutionProvider has no kernels for {count} of " in str(caught.value)


def test_unknown_placements_are_refused(bundle: Path) -> None:
    for backend in ("onnxruntime", BACKEND):
        with pytest.raises(InputError, match="option 'placement': expected 'fail' or 'warn', found 'ignore'"):
            open_component(
                open_bundle(bundle), "prior_step", backend=backend, device="cpu", options={"placement": "ignore"}
            )
