"""The graphs of a bundle: what they are made of, and that they compute at sizes at which they were not traced."""

from __future__ import annotations

import io
import itertools
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kandrt.engines.backends import open_component
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.spec import TensorSpec
from kandrt.export import trace as tracing
from kandrt.export.check import difference
from kandrt.export.checkpoint import open_checkpoint
from kandrt.export.graphs import Graph
from kandrt.export.network import Job, SourceNetwork
from kandrt.export.trace import clean, link_weights, trace
from kandrt.export.weight_files import TensorLocation

COMPONENTS = (
    "text_encoder", "image_encoder", "prior_context", "prior_step", "movq_encoder", "movq_decoder", "decoder_context",
    "decoder_step", "inpaint_context", "inpaint_step", "controlnet_context", "controlnet_step",
)  # fmt: skip

# Relative L2 distance of ONNX Runtime to PyTorch in fp32: some hundred operations that sum in another order.
SAME = 1e-5


@pytest.fixture
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


def graph_of(opened: Bundle, component: str) -> ir.Model:
    return ir.load(opened.path(opened.manifest.components[component].graph))


def test_the_bundle_has_the_components_that_are_tested_here(opened: Bundle) -> None:
    assert set(opened.manifest.components) == set(COMPONENTS)


@pytest.mark.parametrize("component", COMPONENTS)
def test_graphs_are_standard_and_whole(component: str, opened: Bundle) -> None:
    path = opened.path(opened.manifest.components[component].graph)
    onnx.checker.check_model(str(path))
    model = ir.load(path)
    assert model.opset_imports == {"": tracing.OPSET}
    assert tracing.OPSET >= 23
    assert {node.domain for node in model.graph} == {""}
    assert not model.functions
    kinds = {node.op_type for node in model.graph}
    assert not kinds & {"Identity", "Dropout", "If", "Loop", "Scan"}


@pytest.mark.parametrize("component", COMPONENTS)
def test_attention_and_norms_are_single_operators(component: str, opened: Bundle) -> None:
    nodes = list(graph_of(opened, component).graph)
    kinds = {node.op_type for node in nodes}
    assert not kinds & {"Softmax", "Erf", "ReduceMean", "InstanceNormalization"}
    for node in nodes:
        if node.op_type == "Attention":
            assert "softmax_precision" not in node.attributes  # TensorRT's parser refuses a graph that has it
    attends = {"text_encoder", "image_encoder", "prior_context", "prior_step", "movq_encoder", "movq_decoder"}
    assert ("Attention" in kinds) == (component in attends or component.endswith("_step"))


@pytest.mark.parametrize("component", COMPONENTS)
def test_inputs_outputs_and_axes_have_the_names_of_the_manifest(component: str, opened: Bundle) -> None:
    record, model = opened.manifest.components[component], graph_of(opened, component)
    for values, specs in ((model.graph.inputs, record.inputs), (model.graph.outputs, record.outputs)):
        found = []
        for value in values:
            assert value.shape is not None
            assert value.dtype is not None
            shape = tuple(axis if isinstance(axis, int) else axis.value for axis in value.shape)
            found.append((value.name, value.dtype.numpy().name, shape))
        assert found == [(spec.name, spec.dtype, spec.shape) for spec in specs]
    dynamic = {axis for spec in record.inputs for axis in spec.shape if isinstance(axis, str)}
    known = {"batch", "timesteps", "height", "width", "image_height", "image_width"}
    assert "batch" in dynamic
    assert dynamic <= known
    assert {axis for spec in record.outputs for axis in spec.shape if isinstance(axis, str)} <= known


@pytest.mark.parametrize("component", COMPONENTS)
def test_weights_lie_outside_and_are_read_as_they_are_stored(component: str, opened: Bundle) -> None:
    record, model = opened.manifest.components[component], graph_of(opened, component)
    stored = opened.manifest.weights[record.weights[0]]
    external = {}
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            assert value.const_value.location == stored.file
            external[name] = value.const_value
        else:
            assert value.const_value is not None
            # of the largest, the positions' part of an embedding: not with the size of the network, but of its input
            assert value.const_value.nbytes <= 32 * 1024
    assert external
    assert record.parameters == sum(tensor.size for tensor in external.values())
    assert record.graph.size < 300_000
    for node in model.graph:
        if node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            assert node.inputs[0].name in external  # of no constant: that would have been folded
            assert {user.op_type for user, _ in node.outputs[0].uses()} == {"MatMul"}


@pytest.fixture
def source(checkpoints: dict[str, Path]) -> Any:
    """Networks whose graphs are in the bundle, by component."""
    jobs = {
        "text_encoder": ("prior", "text_encoder", {"": "text_encoder"}),
        "image_encoder": ("prior", "image_encoder", {"": "image_encoder"}),
        "prior": ("prior", "prior", {"context": "prior_context", "step": "prior_step"}),
        "movq": ("decoder", "movq", {"encoder": "movq_encoder", "decoder": "movq_decoder"}),
        "decoder": ("decoder", "unet", {"context": "decoder_context", "step": "decoder_step"}),
        "inpaint": ("inpaint", "unet", {"context": "inpaint_context", "step": "inpaint_step"}),
        "controlnet": ("controlnet", "unet", {"context": "controlnet_context", "step": "controlnet_step"}),
    }

    def make(component: str) -> SourceNetwork:
        role, submodel, graphs = next(job for job in jobs.values() if component in job[2].values())
        return SourceNetwork(Job(submodel, open_checkpoint(checkpoints[role]).submodels[submodel], None, graphs))

    return make


@pytest.mark.parametrize("component", COMPONENTS)
def test_linear_weights_are_read_as_the_checkpoint_has_them(component: str, opened: Bundle, source: Any) -> None:
    modules, values = source(component).network.named_modules(), graph_of(opened, component).graph.initializers
    linear = {f"{name}.weight": module.weight for name, module in modules if isinstance(module, nn.Linear)}
    assert linear.keys() & values.keys()
    for name in linear.keys() & values.keys():
        assert values[name].shape == ir.Shape(linear[name].shape)
        users = [node.op_type for node, _ in values[name].uses()]
        assert set(users) <= {"Transpose", "Gemm"}
        assert users.count("Transpose") <= 1


def draw(specs: tuple[TensorSpec, ...], lengths: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {}
    for spec in specs:
        shape = [lengths[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        arrays[spec.name] = (
            rng.integers(0, 512, shape) if spec.dtype == "int64" else rng.standard_normal(shape, np.float32)
        )
    return arrays


# Batch, timesteps, latent height and width: one of each, more than traced, the smallest, not square, odd multiples
SIZES = [(1, 1, 8, 8), (5, 2, 16, 8), (1, 7, 24, 40), (2, 25, 8, 72)]


@pytest.mark.parametrize("component", COMPONENTS)
def test_one_graph_serves_every_batch_and_size(component: str, opened: Bundle, source: Any) -> None:
    network = source(component)
    reference = network.sessions()[component]
    session = open_component(opened, component, backend="onnxruntime", device="cpu", threads=1)
    dynamic = {axis for spec in session.inputs for axis in spec.shape if isinstance(axis, str)}
    seen = set()
    for batch, timesteps, height, width in SIZES:
        lengths = {"batch": batch, "timesteps": timesteps, "height": height, "width": width}
        lengths |= {"image_height": 8 * height, "image_width": 8 * width}
        key = tuple(lengths[axis] for axis in sorted(dynamic))
        if key in seen:
            continue
        seen.add(key)
        inputs = draw(session.inputs, lengths)
        expected, found = reference(**inputs), session(**inputs)
        for spec in session.outputs:
            shape = tuple(lengths[axis] if isinstance(axis, str) else axis for axis in spec.shape)
            assert found[spec.name].shape == shape
            assert difference(expected[spec.name], found[spec.name])[0] < SAME
    session.close()


@pytest.mark.parametrize("component", ["prior_step", "decoder_step", "movq_decoder"])
def test_rows_of_a_batch_do_not_see_each_other(component: str, opened: Bundle) -> None:
    session = open_component(opened, component, backend="onnxruntime", device="cpu", threads=1)
    lengths = {"batch": 3, "height": 8, "width": 16}
    inputs = draw(session.inputs, lengths)
    together = session(**inputs)
    for row in range(3):
        alone = session(**{name: array[row : row + 1] for name, array in inputs.items()})
        for name, array in alone.items():
            assert difference(together[name][row : row + 1], array)[0] < SAME
    session.close()


# A network of our own: every way in which a linear weight is used, a shared one, and a buffer


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 16)
        self.bare = nn.Linear(16, 8, bias=False)
        self.conv = nn.Conv1d(8, 4, 1)
        self.register_buffer("table", torch.arange(8.0))

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = self.plain(x[:, 0])  # two dimensions: Gemm
        wide = self.bare(self.plain(x))  # three: MatMul, and the first weight again
        wide = self.bare(self.plain(wide)) + self.table
        return flat, self.conv(wide.transpose(1, 2))


SMALL_GRAPH = Graph(
    "run",
    (TensorSpec("x", "float32", ("batch", "tokens", 8)),),
    (TensorSpec("flat", "float32", ("batch", 16)), TensorSpec("y", "float32", ("batch", 4, "tokens"))),
)


def stored(network: nn.Module, folder: Path) -> tuple[dict[str, Tensor], dict[str, TensorLocation]]:
    """Random weights in one raw file: their values, and their places by name."""
    generator = torch.Generator().manual_seed(0)
    values, places, data = {}, {}, io.BytesIO()
    for name, parameter in network.named_parameters():
        values[name] = torch.randn(parameter.shape, generator=generator)
        places[name] = TensorLocation("float32", tuple(parameter.shape), data.tell(), values[name].nbytes)
        data.write(values[name].numpy().tobytes())
    (folder / "w.bin").write_bytes(data.getvalue())
    return values, places


def test_linear_weights_stay_in_the_file_and_are_transposed_once(tmp_path: Path) -> None:
    import onnxruntime

    with torch.device("meta"):
        network = Small().eval()
    values, places = stored(network, tmp_path)
    model = trace(network, SMALL_GRAPH)
    link_weights(model, "w.bin", tmp_path, places, {"table": torch.arange(8.0)})
    clean(model)
    for name in ("plain.weight", "bare.weight"):
        weight = model.graph.initializers[name]
        assert isinstance(weight.const_value, ir.ExternalTensor)
        assert [node.op_type for node, _ in weight.uses()].count("Transpose") == 1
    (product,) = (node for node in model.graph if node.op_type == "Gemm")
    assert (product.inputs[1], product.attributes.get_int("transB", 0)) == (model.graph.initializers["plain.weight"], 1)
    ir.save(model, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["flat", "y"]
    reference = Small().eval()
    reference.load_state_dict(values | {"table": torch.arange(8.0)})
    for batch, tokens in itertools.product((1, 4), (1, 6)):
        x = torch.randn(batch, tokens, 8)
        with torch.no_grad():
            expected = reference.run(x)
        for found, tensor in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
            assert difference(tensor.numpy(), found)[0] < SAME


def test_faults_of_the_exporter_itself_are_not_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        network = Small().eval()
    _, places = stored(network, tmp_path)
    table = {"table": torch.arange(8.0)}
    model = trace(network, SMALL_GRAPH)
    with pytest.raises(RuntimeError, match=r"reads 'table', which is neither a weight nor a constant"):
        link_weights(model, "w.bin", tmp_path, places, {})
    link_weights(model, "w.bin", tmp_path, places, table)
    monkeypatch.setattr(tracing, "MAX_INLINE", 31)  # the table has 32 bytes
    with pytest.raises(RuntimeError, match="table: 32 bytes would lie inside the graph"):
        clean(model)


def test_a_size_that_must_be_divisible_is_traced_as_such() -> None:
    halves = Graph(
        "run",
        (TensorSpec("x", "float32", ("batch", 3, "height", 4)),),
        (TensorSpec("y", "float32", ("batch", 3, "half", 4)),),
        {"height": 2},
    )

    class Halve(nn.Module):
        def run(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], 3, -1, 2, 4).sum(3)

    assert [node.op_type for node in trace(Halve(), halves).graph]
    args, axes = tracing.example_inputs(halves)
    assert args[0].shape[2] % 2 == 0
    assert args[0].shape[0] != args[0].shape[2]
    assert set(axes[0]) == {0, 2}
    lengths = [*args[0].shape]
    assert len(set(lengths)) == len(lengths)


def test_tracing_says_nothing_and_leaves_logging_as_it_was(caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    logger = logging.getLogger("torch.onnx")
    before, filters = logger.level, warnings.filters[:]
    with torch.device("meta"):
        network = Small().eval()
    trace(network, SMALL_GRAPH)
    assert logger.level == before
    assert warnings.filters[:] == filters
    assert capsys.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []
