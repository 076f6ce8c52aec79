"""The parts of quantization: rounding, weights files, which layers, what is measured; NumPy is the oracle."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file

from kandrt.engines.errors import BundleError
from kandrt.engines.manifest import Component, FileRecord
from kandrt.engines.spec import TensorSpec
from kandrt.export.quantize.bundle import fits, relative_error, spread
from kandrt.export.quantize.grids import Grid, grid, round_weight, weight_scales
from kandrt.export.quantize.layers import Layer, find_layers
from kandrt.export.quantize.measure import Measured, find_grids, noise_of_layers
from kandrt.export.quantize.rewrite import INT8, SCALE, Rewriter, Weights
from kandrt.export.quantize.storage import Place, copy_of, part_of, read_array, read_places, write_parts

WEIGHTS = "weights.safetensors"
# Names that a linear layer's weight has where it is stored [out, in], and [in, out] as bundles once had it
LINEAR = ("mid.to_q.weight", "mid.to_q.weight.transposed")


def array(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape, np.float32)


# Rounding


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0), (-1e-20, 1e-20)])
def test_grid_covers_its_range_and_has_zero(low: float, high: float) -> None:
    found = grid(low, high)
    assert 0 <= found.zero <= 255
    assert found.scale > 0
    # half a step: the zero point is a whole number
    assert (0 - found.zero) * found.scale <= min(low, 0) + found.scale / 2
    assert (255 - found.zero) * found.scale >= max(high, 0) - found.scale / 2


def test_weights_are_within_half_a_step_of_their_own_channels_scale() -> None:
    weight = array(np.random.default_rng(0), 5, 3, 2, 2) * np.array([1, 10, 0.1, 0, 1e3], np.float32).reshape(
        -1, 1, 1, 1
    )
    scales = weight_scales(weight, 0)
    rounded = round_weight(weight, scales, 0)
    error = np.abs(rounded * scales.reshape(-1, 1, 1, 1) - weight).reshape(5, -1).max(axis=1)
    assert rounded.dtype == np.int8
    assert (error <= scales / 2 * (1 + 1e-5)).all()  # and the last bits of fp32
    assert (np.abs(rounded).reshape(5, -1).max(axis=1) == [127, 127, 127, 0, 127]).all()


def test_weights_of_matrices_have_their_channels_last() -> None:
    weight = array(np.random.default_rng(0), 4, 6)
    assert weight_scales(weight, 1).shape == (6,)
    np.testing.assert_array_equal(
        round_weight(weight, weight_scales(weight, 1), 1).T, round_weight(weight.T, weight_scales(weight.T, 0), 0)
    )


# Weights files


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = {"a": array(rng, 3, 5), "b": rng.integers(-128, 128, (7,)).astype(np.int8), "c": array(rng, 16, 4)}
    kinds = {"float32": "F32", "int8": "I8", "float16": "F16"}
    parts = [part_of(n, kinds[str(a.dtype)], a.shape, lambda a=a: a) for n, a in first.items()]  # type: ignore[misc]
    written = write_parts(tmp_path / "first", parts)
    data = (tmp_path / "first").read_bytes()
    assert (written.size, written.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert read_places(tmp_path / "first") == written.places
    assert all(place.offset % place.dtype.itemsize == 0 for place in written.places.values())
    copies = [copy_of(tmp_path / "first", name, place) for name, place in written.places.items() if name != "a"]
    half = array(rng, 2, 2).astype(np.float16)
    write_parts(tmp_path / "second", [*copies, part_of("d", "F16", (2, 2), lambda: half)])
    found = load_file(tmp_path / "second")
    assert found.keys() == {"b", "c", "d"}
    for name, expected in {"b": first["b"], "c": first["c"], "d": half}.items():
        np.testing.assert_array_equal(found[name], expected)
        np.testing.assert_array_equal(read_array(tmp_path / "second", read_places(tmp_path / "second")[name]), expected)


@pytest.mark.parametrize("content", [b"", b"short", b"\x08" + bytes(7) + b"no json!", b"\xff" * 16])
def test_a_damaged_weights_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "damaged").write_bytes(content)
    with pytest.raises(BundleError, match=r"damaged is damaged.*export the bundle again"):
        read_places(tmp_path / "damaged")


# Which layers


class Toy:
    """A graph in a folder: conv_in, a convolution, one of groups, a linear layer, a product of activations, a Gemm."""

    def __init__(self, folder: Path, linear: str) -> None:
        rng = np.random.default_rng(0)
        self.folder, self.linear, self.flipped = folder, linear, linear == LINEAR[0]
        self.arrays: dict[str, NDArray[Any]] = {
            "conv_in.weight": array(rng, 4, 4, 1, 1), "mid.conv.weight": array(rng, 6, 4, 3, 3),
            "mid.conv.bias": array(rng, 6), "mid.grouped.weight": array(rng, 6, 1, 3, 3),
            linear: array(rng, 6, 5).astype(np.float16), "time.weight": array(rng, 6, 6),
        }  # fmt: skip
        self.matrix = self.arrays[linear].astype(np.float32)  # [in, out]
        if self.flipped:
            self.arrays[linear] = np.ascontiguousarray(self.arrays[linear].T)
        kinds = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
        parts = [
            part_of(name, kinds[each.dtype], each.shape, lambda each=each: each)  # type: ignore[misc]
            for name, each in self.arrays.items()
        ]
        self.places = dict(write_parts(folder / WEIGHTS, parts).places)
        self.model = self._model()
        ir.save(self.model, folder / "toy.onnx")
        inputs = (TensorSpec("x", "float32", ("batch", 4, "height", "width")),)
        outputs = (TensorSpec("y", "float32", ("batch", "tokens", "tokens")),)
        self.component = Component(FileRecord("toy.onnx", 0, ""), ("toy",), inputs, outputs, "fp32", 1)

    def _model(self) -> ir.Model:
        weights, fp32 = Weights(self.folder, WEIGHTS, self.places), ir.TensorType(ir.DataType.FLOAT)
        values = {"x": ir.Value(name="x", type=fp32, shape=ir.Shape(["batch", 4, "height", "width"]))}
        for name in self.arrays:
            tensor = weights.tensor(name)
            values[name] = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        shape = ir.tensor(np.array([0, 6, -1], np.int64), name="shape")
        values["shape"] = ir.Value(name="shape", type=ir.TensorType(shape.dtype), shape=shape.shape, const_value=shape)
        nodes: list[ir.Node] = []

        def add(operator: str, inputs: str, result: str, **attributes: Any) -> None:
            node = ir.node(operator, [values[name] for name in inputs.split()], attributes)
            node.outputs[0].name, node.outputs[0].type = result, fp32
            values[result] = node.outputs[0]
            nodes.append(node)

        add("Conv", "x conv_in.weight", "in")
        add("Conv", "in mid.conv.weight mid.conv.bias", "conv", pads=[1, 1, 1, 1])
        add("Conv", "conv mid.grouped.weight", "grouped", pads=[1, 1, 1, 1], group=6)
        add("Reshape", "grouped shape", "flat")
        add("Transpose", "flat", "tokens", perm=[0, 2, 1])
        add("Cast", self.linear, "wide", to=1)
        if self.flipped:
            add("Transpose", "wide", "turned", perm=[1, 0])
        add("MatMul", "tokens turned" if self.flipped else "tokens wide", "q")
        add("Transpose", "q", "k", perm=[0, 2, 1])
        add("MatMul", "q k", "y")
        weighted = [value for name, value in values.items() if name in self.arrays or name == "shape"]
        graph = ir.Graph(
            [values["x"]], [values["y"]], nodes=nodes, initializers=weighted, opset_imports={"": 23}, name="toy"
        )
        return ir.Model(graph, ir_version=11)

    def rounded(self, layers: list[Layer]) -> Weights:
        """A file with the weights of layers in 8 bits."""
        parts = []
        for layer in layers:
            weight = self.matrix if layer.weight == self.linear else self.arrays[layer.weight]
            scales = weight_scales(weight, layer.axis)
            numbers = round_weight(weight, scales, layer.axis)
            parts.append(part_of(layer.weight + INT8, "I8", numbers.shape, lambda numbers=numbers: numbers))  # type: ignore[misc]
            parts.append(part_of(layer.weight + SCALE, "F32", scales.shape, lambda scales=scales: scales))  # type: ignore[misc]
        return Weights(self.folder, "int8", write_parts(self.folder / "int8", parts).places)

    def measured(self) -> Measured:
        return Measured("toy", self.component, self.folder / "toy.onnx", self.folder, 1, lambda _: None)

    def exact(self, x: NDArray[np.float32], *names: str) -> list[NDArray[np.float32]]:
        """Tensors of the graph by ONNX's reference implementation."""
        model = ir.load(self.folder / "toy.onnx")
        values = {value.name: value for node in model.graph for value in node.outputs}
        model.graph.outputs[:] = [values[name] for name in names]
        ir.external_data.load_to_model(model)
        found: list[NDArray[np.float32]] = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, {"x": x})
        return found


@pytest.fixture(params=LINEAR)
def toy(tmp_path: Path, request: pytest.FixtureRequest) -> Toy:
    return Toy(tmp_path, request.param)


def calls(count: int) -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(1)
    return [{"x": array(rng, 2, 4, 5, 3) * (i + 1)} for i in range(count)]


def test_layers_are_convolutions_and_linear_ones_without_the_ends(toy: Toy) -> None:
    conv, linear = find_layers(ir.load(toy.folder / "toy.onnx"))
    assert conv == Layer("mid.conv.weight", "Conv", "in", "conv")
    assert linear == Layer(toy.linear, "MatMul", "tokens", "q", flipped=toy.flipped)
    assert (conv.axis, linear.axis) == (0, 1)
    assert (conv.name, linear.name) == ("mid.conv", "mid.to_q")


def test_patterns_name_layers_and_what_is_below() -> None:
    layer = Layer("up_blocks.3.resnets.0.conv1.weight", "Conv", "a", "b")
    for pattern in ("up_blocks.3", "up_blocks.3.*", "*.conv1", "up_blocks.3.resnets.0.conv1"):
        assert fits(layer, (pattern,)), pattern
    for pattern in ("up_blocks.30", "up_block", "conv1"):
        assert not fits(layer, (pattern,)), pattern


# What is measured


def test_grids_cover_all_that_calls_bring(toy: Toy) -> None:
    given = calls(3)
    found = find_grids(toy.measured(), ["in", "conv", "tokens"], given)
    for name in ("in", "conv", "tokens"):
        values = [toy.exact(call["x"], name)[0] for call in given]
        expected = grid(min(map(np.min, values)), max(map(np.max, values)))
        # two libraries add in another order
        assert found[name].scale == pytest.approx(expected.scale, rel=1e-5)
        assert abs(found[name].zero - expected.zero) <= 1


def fake(values: NDArray[np.float32], to: Grid) -> NDArray[np.float32]:
    levels = np.clip(np.rint(values / np.float32(to.scale)) + to.zero, 0, 255)
    return (levels - to.zero).astype(np.float32) * np.float32(to.scale)


def test_noise_is_that_of_a_layer_alone(toy: Toy) -> None:
    layers, given = find_layers(ir.load(toy.folder / "toy.onnx")), calls(2)
    grids = find_grids(toy.measured(), ["in", "conv", "tokens"], given)
    found = noise_of_layers(toy.measured(), layers, grids, given, toy.rounded(layers))
    weight, scales = toy.matrix, weight_scales(toy.matrix, 1)
    shares = []
    for call in given:
        tokens, exact = toy.exact(call["x"], "tokens", "q")
        rounded = fake(tokens, grids["tokens"]) @ (round_weight(weight, scales, 1) * scales)
        shares.append(np.square(rounded - exact).sum() / np.square(exact).sum())
    # a value that lies between two levels may round to either: that moves a sum of some thousand squares a little
    assert found[toy.linear] == pytest.approx(np.sqrt(np.mean(shares)), rel=0.05)
    assert 0.003 < found["mid.conv.weight"] < 0.05  # of three roundings to 8 bits of what is spread like a bell


def test_a_layer_of_several_is_replaced_and_the_others_stay(toy: Toy) -> None:
    model = ir.load(toy.folder / "toy.onnx")
    layers = find_layers(model)
    grids = {name: Grid(0.1, 128) for name in ("in", "conv", "tokens")}
    Rewriter(model, grids, toy.rounded(layers)).replace(layers[:1])
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("QuantizeLinear") == 2  # what goes in and what comes out
    assert kinds.count("DequantizeLinear") == 3
    assert kinds.count("Conv") == 3
    assert "mid.conv.weight" not in model.graph.initializers  # nothing reads it any more
    assert toy.linear in model.graph.initializers
    assert model.graph.initializers["mid.conv.weight" + INT8].dtype == ir.DataType.INT8


def test_a_weight_is_stored_in_8_bits_as_the_product_takes_it(toy: Toy) -> None:
    """With a Transpose between, ONNX Runtime would have no kernel of 8 bits for it."""
    model = ir.load(toy.folder / "toy.onnx")
    layers = find_layers(model)
    Rewriter(model, {name: Grid(0.1, 128) for name in ("in", "conv", "tokens")}, toy.rounded(layers)).replace(layers)
    (product,) = (node for node in model.graph if node.op_type == "MatMul" and (node.name or "").endswith(INT8))
    assert product.inputs[1] is not None
    dequantize = product.inputs[1].producer()
    assert dequantize is not None
    assert (dequantize.op_type, dequantize.attributes.get_int("axis")) == ("DequantizeLinear", 1)
    numbers = model.graph.initializers[toy.linear + INT8]
    assert dequantize.inputs[0] is numbers
    assert numbers.shape == ir.Shape([6, 5])
    assert toy.linear not in model.graph.initializers


def test_relative_error_is_the_worst_outputs_over_all_calls() -> None:
    expected = [{"a": np.array([3.0, 4.0]), "b": np.ones(4)}, {"a": np.zeros(2), "b": np.ones(4)}]
    found = [{"a": np.array([3.0, 4.5]), "b": np.ones(4)}, {"a": np.zeros(2), "b": np.ones(4)}]
    assert relative_error(expected, found) == pytest.approx(0.1)


def test_some_calls_are_spread_over_all() -> None:
    assert spread([{"i": np.array(i)} for i in range(10)], 3) == [{"i": 0}, {"i": 4}, {"i": 9}]
    assert len(spread([{}, {}], 6)) == 2


def test_places_know_their_type() -> None:
    assert Place("BF16", (1,), 0, 2).dtype == ir.DataType.BFLOAT16
