"""What a graph costs: against PyTorch's own counter, and against sums done by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kandrt.engines.bundle import open_bundle
from kandrt.engines.errors import BundleError, InputError
from kandrt.export.costs import Costs, graph_costs

AXES = {"batch": 2, "height": 8, "width": 16, "timesteps": 5, "image_height": 64, "image_width": 128, "tokens": 11}
FLOAT_BYTES = 4


# Against PyTorch


def torch_flops(session: Any, inputs: Mapping[str, np.ndarray]) -> int:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # the counter does not know the fused kernel for CPUs; as matrix products, it counts attention like any other
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        session(**inputs)
    return int(counter.get_total_flops())


def unused_flops(context: Any) -> int:
    """Of a prior's context: all of its last layer but keys and values, which PyTorch computes and the graph does not.

    These are the query's and the output's projection, attention, and a perceptron four times as wide.
    """
    prefix = next(spec for spec in context.outputs if spec.name == "prefix_kv")
    _, _, tokens, width = prefix.shape
    rows = AXES["batch"] * tokens
    return 2 * rows * (2 * width**2 + 2 * 4 * width**2) + 2 * 2 * rows * tokens * width


@pytest.mark.parametrize("family", ["bundle", "bundle_2_1", "bundle_3"])
def test_every_graph_costs_what_pytorch_counts(family: str, request: pytest.FixtureRequest) -> None:
    """Exactly: neither of the two counts softmax, norms and elementwise operators."""
    from kandrt.scripts.checkpoint_networks import find_references

    opened = open_bundle(request.getfixturevalue(family))
    references = find_references(opened, [], (None, None), [])
    assert references.keys() == opened.manifest.components.keys()
    for name, component in opened.manifest.components.items():
        shapes = {spec: [AXES.get(str(axis), axis) for axis in spec.shape] for spec in component.inputs}
        inputs = {spec.name: np.zeros(shape, spec.dtype) for spec, shape in shapes.items()}
        expected = torch_flops(references[name].session, inputs)
        if name == "prior_context":
            expected -= unused_flops(component)
        found = graph_costs(opened.path(component.graph), AXES)
        assert found.flops == sum(found.by_operator.values()) == expected, name
        # a graph reads its weights once each, and buffers that are not parameters
        assert found.weight_bytes >= FLOAT_BYTES * component.parameters, name
        assert found.activation_bytes > 0, name


# Against sums by hand


def graph_file(
    folder: Path, node: onnx.NodeProto, inputs: Mapping[str, Sequence[int | str]], **weights: Sequence[int]
) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    tensors = [helper.make_tensor(name, TensorProto.FLOAT, s, np.zeros(s).ravel()) for name, s in weights.items()]
    graph = helper.make_graph([node], "graph", values, [result], tensors)
    path = folder / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


BY_HAND: dict[str, tuple[dict[str, Any], dict[str, Sequence[int | str]], dict[str, Sequence[int]], int]] = {
    # 5x5 results of 6 channels, each over 3x3 of 4 channels, of 2 groups
    "Conv": ({"group": 2}, {"x": ["batch", 8, 7, 7]}, {"w": [6, 4, 3, 3], "b": [6]}, 2 * 3 * 6 * 25 * 36),
    # each of 7x7x8 inputs spread over 2x2 of 3 channels
    "ConvTranspose": ({"strides": [2, 2]}, {"x": ["batch", 8, 7, 7]}, {"w": [8, 3, 2, 2]}, 2 * 3 * 8 * 49 * 12),
    "MatMul": ({}, {"x": ["batch", 5, 7]}, {"w": [7, 4]}, 2 * 3 * 5 * 7 * 4),
    "Gemm": ({"transA": 1}, {"x": [7, "batch"]}, {"w": [7, 4], "b": [4]}, 2 * 3 * 7 * 4),
    # 4 heads of 6 for queries, 2 for keys and values of 6 and 5; 9 keys
    "Attention": (
        {"q_num_heads": 4, "kv_num_heads": 2},
        {"x": ["batch", 7, 24], "k": ["batch", 9, 12], "v": ["batch", 9, 10]},
        {},
        2 * 3 * 4 * 7 * 9 * (6 + 5),
    ),
}


@pytest.mark.parametrize("operator", BY_HAND)
def test_an_operator_by_hand(operator: str, tmp_path: Path) -> None:
    attributes, inputs, weights, expected = BY_HAND[operator]
    node = helper.make_node(operator, [*inputs, *weights], ["out"], **attributes)
    found = graph_costs(graph_file(tmp_path, node, inputs, **weights), {"batch": 3})
    assert found.by_operator == {operator: expected}
    assert found.weight_bytes == FLOAT_BYTES * sum(np.prod(shape) for shape in weights.values())


def test_the_keys_kept_from_before_count(tmp_path: Path) -> None:
    inputs: dict[str, Sequence[int | str]] = {
        "q": ["batch", 4, 7, 6], "k": ["batch", 4, 1, 6], "v": ["batch", 4, 1, 5],
        "past_k": ["batch", 4, 8, 6], "past_v": ["batch", 4, 8, 5],
    }  # fmt: skip
    names = ["q", "k", "v", "", "past_k", "past_v"]
    node = helper.make_node("Attention", names, ["out", "present_k", "present_v"])
    assert graph_costs(graph_file(tmp_path, node, inputs), {"batch": 3}).flops == 2 * 3 * 4 * 7 * 9 * (6 + 5)


@pytest.mark.parametrize(("operator", "shape"), [("Neg", [7, 4]), ("Transpose", [4, 7])])
def test_bytes_of_activations_leave_out_what_is_made_of_weights_alone(
    operator: str, shape: list[int], tmp_path: Path
) -> None:
    nodes = [helper.make_node(operator, ["w"], ["made"]), helper.make_node("MatMul", ["x", "made"], ["out"])]
    path = graph_file(tmp_path, nodes[1], {"x": [5, 7]}, w=shape)
    model = onnx.load(path)
    model.graph.node.insert(0, nodes[0])
    onnx.save(model, path)
    found = graph_costs(path, {})
    assert (found.weight_bytes, found.activation_bytes) == (FLOAT_BYTES * 28, FLOAT_BYTES * (35 + 20))


def test_costs_add_up() -> None:
    one, other = Costs(5, 7, 11, {"Conv": 3, "Gemm": 2}), Costs(1, 2, 3, {"Conv": 1})
    assert one * 3 + other == Costs(16, 23, 36, {"Conv": 10, "Gemm": 6})


def test_flops_grow_with_the_axes() -> None:
    """Convolutions grow as the area; only attention grows faster."""
    from kandrt.runtime.miniature import MINIATURE

    graph = Path(MINIATURE, "decoder_step.onnx")
    small, large = (graph_costs(graph, AXES | {"height": 8 * k, "width": 8 * k}) for k in (1, 2))
    assert large.by_operator["Conv"] == 4 * small.by_operator["Conv"]
    assert large.by_operator["Attention"] > 4 * small.by_operator["Attention"]
    assert large.weight_bytes == small.weight_bytes


# What cannot be counted


@pytest.mark.parametrize(
    ("axes", "told"),
    [({}, r"batch \(missing\)"), ({"batch": 0}, r"batch \(0\)"), ({"batch": -2}, r"batch \(-2\)")],
)
def test_an_axis_without_length_is_named(tmp_path: Path, axes: dict[str, int], told: str) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["out"])
    with pytest.raises(InputError, match=told):
        graph_costs(graph_file(tmp_path, node, {"x": ["batch", 7]}, w=[7, 4]), axes)


def test_lengths_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "y"], ["out"])
    path = graph_file(tmp_path, node, {"x": ["batch", "a"], "y": ["b", 3]})
    with pytest.raises(InputError, match="MatMul"):
        graph_costs(path, {"batch": 1, "a": 4, "b": 5})


@pytest.mark.parametrize("content", [b"", b"no graph"])
def test_a_file_that_is_no_graph(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"graph\.onnx"):
        graph_costs(path, {})


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"absent\.onnx"):
        graph_costs(tmp_path / "absent.onnx", {})


def test_a_graph_with_graphs_inside_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    branch = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "branch", [], [value])
    node = helper.make_node("If", ["x"], ["out"], then_branch=branch, else_branch=branch)
    with pytest.raises(BundleError, match="inside of If"):
        graph_costs(graph_file(tmp_path, node, {"x": [1]}), {})
