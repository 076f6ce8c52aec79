"""A graph against its module: what is measured, what is refused, and bfloat16 graphs in fp32 arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import NumericalError
from kandrt.engines.manifest import GraphError
from kandrt.engines.session import Session
from kandrt.engines.spec import TensorSpec
from kandrt.export import check
from kandrt.export.check import TOLERANCES, check_graph, compare, difference, random_inputs
from kandrt.export.checkpoint import open_checkpoint
from kandrt.export.network import Job, SourceNetwork
from kandrt.export.probes import widen

Float = NDArray[Any]


@dataclass(frozen=True)
class Constant:
    """A session that gives the same arrays whatever it is called with."""

    arrays: Mapping[str, Float]
    inputs: tuple[TensorSpec, ...] = ()

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, "float32", array.shape) for name, array in self.arrays.items())

    def __call__(self, **arrays: Any) -> dict[str, Float]:
        return dict(self.arrays)

    def close(self) -> None:
        pass


def f32(*values: float) -> Float:
    return np.array(values, np.float32)


def test_difference_is_relative_and_absolute() -> None:
    assert difference(f32(3, 4), f32(3, 4)) == (0.0, 0.0)
    assert difference(f32(3, 4), f32(3, 9)) == (1.0, 5.0)
    assert difference(f32(30, 40), f32(30, 45)) == pytest.approx((0.1, 5.0))
    assert difference(f32(3, 4).astype(np.float16), f32(3, 9)) == (1.0, 5.0)


def test_difference_of_odd_arrays() -> None:
    assert difference(f32(), f32()) == (0.0, 0.0)
    assert difference(f32(0, 0), f32(0, 0)) == (0.0, 0.0)
    assert difference(f32(0, 0), f32(0, 1e-3))[0] > 1e20  # nothing to be relative to: any difference is too large
    infinite = (float("inf"), float("inf"))
    assert difference(f32(1, 2), f32(1)) == infinite
    assert difference(f32(1, 2), f32(1, 2)[None]) == infinite  # NumPy would broadcast
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert difference(f32(1, 2), f32(1, bad)) == infinite
        assert difference(f32(1, bad), f32(1, 2)) == infinite
        assert difference(f32(1, bad), f32(1, bad)) == infinite


def test_large_and_small_numbers_neither_overflow_nor_vanish() -> None:
    assert difference(f32(3e38, 3e38), f32(3e38, -3e38)) == pytest.approx((np.sqrt(2), 6e38))
    assert difference(f32(1e-30, 0), f32(2e-30, 0)) == pytest.approx((1.0, 1e-30))
    assert difference(np.zeros(10, np.float16) + 60000, np.zeros(10, np.float16) + 30000) == (0.5, 30000.0)


def test_the_worst_output_counts() -> None:
    module = Constant({"a": f32(1, 1), "b": f32(10, 10)})
    graph = Constant({"b": f32(10, 15), "a": f32(1, 1.125)})  # in another order
    error = compare(module, graph, {}, 0.25)
    assert error.relative == pytest.approx(5 / np.hypot(10, 10))
    assert (error.max_abs, error.tolerance) == (5.0, 0.25)
    assert compare(module, Constant({"a": f32(1, 1), "b": f32(10)}), {}, 0.25).relative == float("inf")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_nan_is_an_error_whichever_output_holds_it(order: tuple[str, str], bad: float) -> None:
    good = Constant({name: f32(1, 2) for name in order})
    broken = Constant({name: f32(1, bad) if name == "b" else f32(1, 2.5) for name in order})
    with pytest.raises(NumericalError, match="the graph gives NaN or infinity in b"):
        compare(good, broken, {}, 1.0)
    with pytest.raises(NumericalError, match="the module gives NaN or infinity in b"):
        compare(broken, good, {}, 1.0)


SPECS = (
    TensorSpec("sample", "float32", ("batch", 4, "height", "width")),
    TensorSpec("timesteps", "float32", ("timesteps",)),
    TensorSpec("text_mask", "float32", ("batch", 77)),
    TensorSpec("input_ids", "int64", ("batch", 77)),
    TensorSpec("hint", "float32", ("batch", 3, "image_height", "image_width")),
)


def test_inputs_are_random_and_of_the_kind_that_networks_see() -> None:
    inputs = random_inputs(SPECS, {"height": 16, "width": 16, "image_height": 48})
    assert {name: array.dtype.name for name, array in inputs.items()} == {spec.name: spec.dtype for spec in SPECS}
    batch, _, height, width = inputs["sample"].shape
    assert inputs["hint"].shape[2] % 48 == 0
    assert height % 16 == width % 16 == 0
    assert inputs["sample"].std() == pytest.approx(1, abs=0.1)
    assert inputs["text_mask"].shape == inputs["input_ids"].shape == (batch, 77)
    assert set(np.unique(inputs["text_mask"])) == {0, 1}
    assert (np.diff(inputs["text_mask"], axis=1) <= 0).all()  # tokens, then padding
    for name, highest in (("timesteps", 1000), ("input_ids", 512)):
        assert 0 <= inputs[name].min() <= inputs[name].max() < highest
        assert (inputs[name] == np.floor(inputs[name])).all()
    assert inputs.keys() == random_inputs(SPECS, {}).keys()
    again, other = random_inputs(SPECS, {"height": 16}, seed=0), random_inputs(SPECS, {"height": 16}, seed=1)
    np.testing.assert_array_equal(again["timesteps"], inputs["timesteps"])
    assert not np.array_equal(other["sample"], again["sample"])


@pytest.fixture
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


@pytest.fixture
def step(checkpoints: dict[str, Path]) -> Session:
    """The prior's step under PyTorch."""
    checkpoint = open_checkpoint(checkpoints["prior"])
    source = SourceNetwork(Job("prior", checkpoint.submodels["prior"], None, {"step": "prior_step"}))
    return source.sessions()["prior_step"]


class Changed:
    """A session whose first output is changed."""

    def __init__(self, session: Session, change: Callable[[Float], Float]) -> None:
        self.session, self.change = session, change
        self.inputs, self.outputs = session.inputs, session.outputs

    def __call__(self, **arrays: Any) -> dict[str, Float]:
        return {name: self.change(array) for name, array in self.session(**arrays).items()}

    def close(self) -> None:
        self.session.close()


def check_step(opened: Bundle, reference: Session, **changes: Any) -> GraphError:
    component = replace(opened.manifest.components["prior_step"], **changes)
    return check_graph("prior_step", opened.path(component.graph), component, reference, {})


def test_a_graph_within_its_tolerance_gives_its_error(opened: Bundle, step: Session) -> None:
    error = check_step(opened, step)
    assert 0 < error.relative < TOLERANCES["fp32"]
    assert 0 < error.max_abs < 1e-4
    assert error.tolerance == TOLERANCES["fp32"]
    assert check_step(opened, step, precision="fp16").tolerance == TOLERANCES["fp16"]


@pytest.mark.parametrize("factor", [1 + 2e-4, 1 - 2e-4])
def test_a_graph_over_its_tolerance_is_an_error_with_both_numbers(factor: float, opened: Bundle, step: Session) -> None:
    off = Changed(step, lambda array: array * np.float32(factor))
    with pytest.raises(NumericalError) as caught:
        check_step(opened, off)
    message = str(caught.value)
    assert message.startswith("prior_step: expected a graph within 1e-04 of its module at fp32, found 2.0")
    assert "largest absolute difference" in message
    assert "report this" in message
    check_step(opened, off, precision="fp16")  # whose tolerance is wider


def test_nan_of_the_module_is_an_error_with_advice_for_the_precision(opened: Bundle, step: Session) -> None:
    bad = Changed(step, lambda array: array * np.float32("nan"))
    with pytest.raises(NumericalError, match="prior_step: the module gives NaN or infinity in prediction; the weights"):
        check_step(opened, bad)
    with pytest.raises(NumericalError, match="try --precision bf16 or fp32"):
        check_step(opened, bad, precision="fp16")


def test_no_tolerance_is_met_by_nan(opened: Bundle, step: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "difference", lambda expected, found: (float("nan"), 0.0))
    with pytest.raises(NumericalError, match="found nan"):
        check_step(opened, step)


def bf16_graph(folder: Path) -> Path:
    """x * inline + external + constant in bfloat16 arithmetic, of which inputs and outputs are fp32."""
    bf16, fp32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    weights = {name: np.arange(1, 7, dtype=np.float32) / 3 * scale for name, scale in (("w", 1), ("v", 10))}
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in weights.items()}
    (folder / "weights").mkdir()
    (folder / "weights" / "v.bin").write_bytes(b"\0" * 16 + rounded["v"].tobytes())
    x = ir.Value(name="x", shape=ir.Shape(["n", 6]), type=ir.TensorType(fp32))
    w = ir.Value(name="w", shape=ir.Shape([6]), type=ir.TensorType(bf16), const_value=ir.tensor(rounded["w"], name="w"))
    place = ir.ExternalTensor("weights/v.bin", 16, 12, bf16, shape=ir.Shape([6]), name="v", base_dir=folder)
    v = ir.Value(name="v", shape=ir.Shape([6]), type=ir.TensorType(bf16), const_value=place)

    def node(op: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes: ir.Attr) -> ir.Value:
        made = ir.Node(
            "", op, inputs, attributes=list(attributes.values()), outputs=[ir.Value(name=f"{op}{len(nodes)}")]
        )
        made.outputs[0].dtype = dtype
        made.outputs[0].shape = inputs[0].shape if inputs else ir.Shape([1])
        nodes.append(made)
        return made.outputs[0]

    nodes: list[ir.Node] = []
    half = ir.AttrTensor("value", ir.tensor(np.array([0.5], ml_dtypes.bfloat16)))
    low = node("Cast", [x], bf16, to=ir.AttrInt64("to", bf16.value))
    low = node("Mul", [low, w], bf16)
    low = node("Add", [low, v], bf16)
    low = node("Add", [low, node("Constant", [], bf16, value=half)], bf16)
    y = node("Cast", [low], fp32, to=ir.AttrInt64("to", fp32.value))
    graph = ir.Graph([x], [y], nodes=nodes, initializers=[w, v], opset_imports={"": 23}, name="g")
    ir.save(ir.Model(graph, ir_version=10), folder / "graph.onnx")
    return folder / "graph.onnx"


def test_a_bf16_graph_is_widened_to_fp32_with_its_rounded_weights(tmp_path: Path) -> None:
    graph, target = bf16_graph(tmp_path), tmp_path / "elsewhere" / "graph.onnx"
    before = graph.read_bytes()
    target.parent.mkdir()
    widen(graph, target)
    assert graph.read_bytes() == before
    model = ir.load(target)
    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    assert {value.dtype for value in values} == {ir.DataType.FLOAT}
    (tmp_path / "weights" / "v.bin").unlink()  # the copy stands alone
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    x = np.array([[1.0, -2.0, 3.0, 4.0, 5.0, 1 + 2**-10]], np.float32)
    w, v = (
        (np.arange(1, 7, dtype=np.float32) / 3 * scale).astype(ml_dtypes.bfloat16).astype(np.float32)
        for scale in (1, 10)
    )
    (found,) = session.run(None, {"x": x})
    np.testing.assert_allclose(found, x * w + v + 0.5, rtol=1e-6)


def test_a_widened_graph_without_bf16_computes_the_same(opened: Bundle, tmp_path: Path, step: Session) -> None:
    component = opened.manifest.components["prior_step"]
    widen(opened.path(component.graph), tmp_path / "graph.onnx")
    error = check_graph("prior_step", tmp_path / "graph.onnx", component, step, {})
    assert error == check_step(opened, step)
