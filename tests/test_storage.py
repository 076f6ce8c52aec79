"""Weights stored in 16 bits under graphs that compute in fp32: half the size, and rounding is the only difference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import safetensors.torch
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor, nn
from typer.testing import CliRunner

from kandrt.engines.backends import open_component
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import CheckpointError, InputError
from kandrt.engines.manifest import Manifest, Precision, decode_manifest, encode_manifest
from kandrt.engines.spec import TensorSpec
from kandrt.export.check import TOLERANCES, difference, random_inputs
from kandrt.export.checkpoint import open_checkpoint
from kandrt.export.exporter import export_bundle
from kandrt.export.graphs import Graph
from kandrt.export.network import TORCH_DTYPES, Job, SourceNetwork, Writer
from kandrt.export.trace import MAX_INLINE, cast_weights, clean, link_weights, trace
from kandrt.export.weight_files import TensorToWrite, write_safetensors
from kandrt.runtime import load
from kandrt.scripts.cli import app
from kandrt.scripts.reference import make_reference, requests

from .test_export import CONTEXT, NORM, STORED, TWO_LEVELS, remake, weights_of

# Component -> role of its checkpoint, submodel, graph
COMPONENTS = {
    "text_encoder": ("prior", "text_encoder", ""),
    "image_encoder": ("prior", "image_encoder", ""),
    "prior_context": ("prior", "prior", "context"),
    "prior_step": ("prior", "prior", "step"),
    "movq_encoder": ("decoder", "movq", "encoder"),
    "movq_decoder": ("decoder", "movq", "decoder"),
    "decoder_context": ("decoder", "unet", "context"),
    "decoder_step": ("decoder", "unet", "step"),
}
# Relative L2 distance of ONNX Runtime to PyTorch in fp32: some hundred operations that sum in another order.
SAME = 1e-5
# Rounding weights to 11 bits moves an output by about 2^-12 a layer: ten times more than SAME, so it cannot hide there.
ROUNDED = 1e-4
# The same operations on the same numbers, since ONNX Runtime folds the casts: only a library's choice of kernels by the
# alignment of memory can differ.
EQUAL = 1e-6


def wide(submodel: str, name: str) -> bool:
    """Does a weight stay in fp32: in UNet, prior and MoVQ, norms and what `context` computes once a request."""
    kept = NORM.fullmatch(name) or CONTEXT.fullmatch(name)
    return submodel in ("unet", "prior", "movq") and kept is not None


def rounded(submodel: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A submodel's weights as fp32 graphs should find them."""
    return {name: tensor if wide(submodel, name) else tensor.half().float() for name, tensor in tensors.items()}


def weights_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.fixture(scope="session")
def sources(shared: Path, checkpoints: dict[str, Path]) -> dict[str, Path]:
    """A prior, and a decoder of two levels."""
    folder = shared / "storage-decoder"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            shutil.copytree(checkpoints["decoder"], folder)
            for name, changes in TWO_LEVELS.items():
                remake(folder / name, **changes)
    return {"prior": checkpoints["prior"], "decoder": folder}


@pytest.fixture(scope="session")
def half(shared: Path, sources: dict[str, Path]) -> Path:
    """Their bundle in fp32 with weights stored in fp16, checked and with reference pictures."""
    folder = shared / "bundle-storage"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            export_bundle(list(sources.values()), folder, storage="fp16", make_reference=make_reference)
    return folder


@pytest.fixture
def opened(half: Path) -> Bundle:
    return open_bundle(half)


@pytest.fixture
def source(sources: dict[str, Path]) -> Callable[..., SourceNetwork]:
    """The network of a component."""

    def make(component: str, storage: Precision | None = None) -> SourceNetwork:
        role, submodel, graph = COMPONENTS[component]
        return SourceNetwork(
            Job(submodel, open_checkpoint(sources[role]).submodels[submodel], None, {graph: component}), storage
        )

    return make


# What is stored


def test_weights_take_half_the_space(opened: Bundle, sources: dict[str, Path]) -> None:
    for name, record in opened.manifest.weights.items():
        submodel = {"decoder": "unet"}.get(name, name)
        original = weights_file(sources["decoder" if submodel in ("unet", "movq") else "prior"] / submodel)
        tensors = rounded(submodel, safetensors.torch.load_file(original))
        for key, tensor in weights_of(opened.folder, name).items():
            assert tensor.dtype == (torch.float32 if wide(submodel, key) else torch.float16), key
            assert torch.equal(tensor.float(), tensors[key]), key
        # fp32 is a few percent of a network, and more of one as small as this
        assert record.size < 0.65 * original.stat().st_size


def test_weights_are_those_of_a_bundle_in_fp16(source: Callable[..., SourceNetwork], tmp_path: Path) -> None:
    """Byte for byte: norms, and what is computed once a request, stay in fp32 here too."""
    for component in ("prior_step", "text_encoder"):
        with closing(Writer("fp32")) as writer:
            stored = writer.start(source(component, "fp16"), tmp_path / "a").result()
        with closing(Writer("fp16")) as writer:
            assert writer.start(source(component), tmp_path / "b").result().sha256 == stored.sha256


def test_numbers_too_large_for_the_storage_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["decoder"], tmp_path / "decoder"))
    file = folder / "unet" / STORED
    tensors = safetensors.torch.load_file(file)
    tensors["conv_in.weight"].view(-1)[3:4].fill_(1e5)
    safetensors.torch.save_file(tensors, file)
    network = SourceNetwork(Job("unet", open_checkpoint(folder).submodels["unet"], None, {}), "fp16")
    with (
        closing(Writer("fp32")) as writer,
        pytest.raises(CheckpointError, match=r"'conv_in.weight' holds 100000, .* choose another precision"),
    ):
        writer.start(network, tmp_path / "weights").result()
    assert not (tmp_path / "weights").exists()


# Graphs


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_narrow_weight_is_read_through_one_cast(component: str, opened: Bundle) -> None:
    record = opened.manifest.components[component]
    path = opened.path(record.graph)
    onnx.checker.check_model(str(path))
    model = ir.load(path)
    names = safetensors.torch.load_file(opened.path(opened.manifest.weights[record.weights[0]])).keys()
    narrow = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if not isinstance(tensor, ir.ExternalTensor):
            assert tensor.nbytes <= MAX_INLINE
            continue
        assert name in names
        users = [node for node, _ in value.uses()]
        if tensor.dtype == ir.DataType.FLOAT16:
            (cast,) = users
            assert (cast.op_type, cast.attributes["to"].as_int()) == ("Cast", onnx.TensorProto.FLOAT)
            narrow += 1
        else:
            assert tensor.dtype == ir.DataType.FLOAT
            assert not any(node.op_type == "Cast" for node in users)
    assert (narrow == 0) == (component == "decoder_context")  # it is kept in fp32 at any precision
    assert not any(value.dtype == ir.DataType.FLOAT16 for node in model.graph for value in node.outputs)


@pytest.mark.parametrize("component", COMPONENTS)
def test_graphs_compute_in_fp32_with_rounded_weights(
    component: str, opened: Bundle, source: Callable[..., SourceNetwork]
) -> None:
    network = source(component)
    _, submodel, key = COMPONENTS[component]
    graph = network.graphs[key]
    inputs = random_inputs(graph.inputs, graph.multiples, seed=3)
    session = open_component(opened, component, backend="onnxruntime", device="cpu", threads=1)
    found = session(**inputs)
    session.close()
    original = safetensors.torch.load_file(weights_file(network.weights.folder))
    errors = {}
    for what, tensors in (("rounded", rounded(submodel, original)), ("original", original)):
        module = network.kind.build(network.config).eval()
        module.load_state_dict({name: tensors[network.stored_name(name)] for name in module.state_dict()})
        with torch.no_grad():
            outputs = getattr(module, graph.method)(*(torch.from_numpy(inputs[spec.name]) for spec in graph.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = zip(graph.outputs, outputs, strict=True)
        errors[what] = max(difference(output.numpy(), found[spec.name])[0] for spec, output in pairs)
    assert errors["rounded"] < SAME
    assert (errors["original"] > ROUNDED) == (component != "decoder_context")


def test_the_reference_computes_with_rounded_weights(
    source: Callable[..., SourceNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, plain = source("prior_step", "fp16"), source("prior_step")
    inputs = random_inputs(network.graphs["step"].inputs, {})
    found = network.sessions()["prior_step"](**inputs)["prediction"]
    original = safetensors.torch.load_file(weights_file(plain.weights.folder))
    tensors = rounded("prior", original)
    monkeypatch.setattr(plain, "read", tensors.__getitem__)
    assert difference(plain.sessions()["prior_step"](**inputs)["prediction"], found)[0] <= EQUAL
    monkeypatch.setattr(plain, "read", original.__getitem__)
    assert difference(plain.sessions()["prior_step"](**inputs)["prediction"], found)[0] > ROUNDED


class Small(nn.Module):
    """A weight that is used twice, one of each kind of layer, and one small enough to be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 4, 1)
        self.scale = nn.Parameter(torch.ones(8))

    def run(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.linear(x)) * (self.scale * 2)
        return self.conv(y.transpose(1, 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_casts_of_either_type_run_and_are_shared(dtype: str, tmp_path: Path) -> None:
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    reference = Small().eval()
    values = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in reference.state_dict().items()}
    with torch.device("meta"):
        network = Small().eval()
    entries = [TensorToWrite(n, dtype, tuple(t.shape), values[n].clone) for n, t in values.items()]
    written = write_safetensors(tmp_path / "w.safetensors", entries)
    x = TensorSpec("x", "float32", ("batch", 3, 8))
    model = trace(network, Graph("run", (x,), (TensorSpec("y", "float32", ("batch", 4, 3)),)))
    link_weights(model, "w.safetensors", tmp_path, written.tensors, {})
    clean(model)
    cast_weights(model)
    external = {n for n, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}
    assert external == written.tensors.keys() - {"scale"}  # folded: what lies in the graph instead is in fp32
    casts = [str(node.inputs[0].name) for node in model.graph if node.op_type == "Cast" and node.inputs[0]]
    assert sorted(casts) == sorted(external)
    ((cast, _),) = model.graph.initializers["linear.weight"].uses()
    assert [node.op_type for node, _ in cast.outputs[0].uses()] == ["Transpose"]  # one, and after the cast
    ir.save(model, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    low = getattr(torch, dtype)
    reference.load_state_dict({name: tensor.to(low).float() for name, tensor in values.items()})
    given = torch.randn(2, 3, 8, generator=generator)
    with torch.no_grad():
        expected = reference.run(given)
    (found,) = session.run(None, {"x": given.numpy()})
    assert difference(expected.numpy(), found)[0] < SAME


# The bundle as a whole


def test_every_graph_was_checked_at_the_tolerance_of_fp32(opened: Bundle) -> None:
    manifest = opened.manifest
    assert (manifest.precision, manifest.storage) == ("fp32", "fp16")
    assert manifest.components.keys() == COMPONENTS.keys()
    for component in manifest.components.values():
        assert component.precision == "fp32"
        assert component.error is not None
        assert component.error.tolerance == TOLERANCES["fp32"]
        assert component.error.relative < SAME
    assert manifest.reference is not None


def verify(folder: Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["verify", str(folder), "--json"], prog_name="kandrt")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_verify_rounds_as_the_manifest_says(half: Path, tmp_path: Path) -> None:
    found = verify(half)
    assert (found["passed"], found["not_verified"], len(found["rows"])) == (True, [], 1 + len(COMPONENTS) + 4)
    folder = Path(shutil.copytree(half, tmp_path / "copy"))
    content = encode_manifest(replace(open_bundle(folder).manifest, storage=None))
    (folder / "manifest.json").write_bytes(content)
    failed = {row["what"] for row in verify(folder)["rows"] if not row["passed"]}
    assert failed == COMPONENTS.keys() - {"decoder_context"}


def test_pictures_are_those_of_a_checkpoint_with_rounded_weights(
    half: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    copies = {role: Path(shutil.copytree(folder, tmp_path / role)) for role, folder in sources.items()}
    for role, submodel in {(role, submodel) for role, submodel, _ in COMPONENTS.values()}:
        file = weights_file(copies[role] / submodel)
        safetensors.torch.save_file(rounded(submodel, safetensors.torch.load_file(file)), file, {"format": "pt"})
    other = export_bundle(list(copies.values()), tmp_path / "other", check=False)

    def answers(folder: Path) -> dict[str, NDArray[np.float32]]:
        with load(folder, threads=1) as k:
            return {name: run() for name, run in requests(k).items()}

    expected, found = answers(other), answers(half)
    assert len(found) == 4
    for name, array in found.items():
        assert difference(expected[name], array)[0] <= EQUAL, name
        assert array.std() > 0.01
    statistics = [safetensors.torch.load_file(folder / "weights/statistics.safetensors") for folder in (other, half)]
    for name, tensor in statistics[0].items():
        assert difference(tensor.numpy(), statistics[1][name].numpy())[0] <= EQUAL, name


# What is asked for, and what is shown


@pytest.mark.parametrize(
    ("precision", "storage", "expected"),
    [
        ("fp16", "fp32", "'fp16' for graphs in fp16"),
        ("fp16", "bf16", "'fp16' for graphs in fp16"),
        ("bf16", "fp32", "'bf16' for graphs in bf16"),
        ("bf16", "fp16", "'bf16' for graphs in bf16"),
        ("fp32", "int8", "'fp32' or 'fp16' or 'bf16' for graphs in fp32"),
    ],
)
def test_other_combinations_are_refused_before_the_checkpoint_is_looked_for(
    precision: Precision, storage: Precision, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"storage: expected {expected}, found {storage!r}"):
        export_bundle([tmp_path / "nothing here"], tmp_path / "bundle", precision=precision, storage=storage)
    if storage in TORCH_DTYPES:
        args = ["export", str(tmp_path), "-o", str(tmp_path / "bundle"), "--precision", precision, "--storage", storage]
        result = CliRunner().invoke(app, args, prog_name="kandrt")
        assert result.exit_code == 1
        assert f"error: storage: expected {expected}" in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_storage_in_the_precision_of_the_graphs_is_the_same_as_none(tmp_path: Path) -> None:
    from kandrt.export.exporter import check_storage

    for precision in TORCH_DTYPES:
        assert check_storage(precision, precision) is None
        assert check_storage(precision, None) is None
    assert check_storage("fp32", "bf16") == "bf16"


def test_inspect_shows_the_storage(half: Path, bundle: Path) -> None:
    def inspect(folder: Path, *options: str) -> str:
        return CliRunner().invoke(app, ["inspect", str(folder), *options], env={"COLUMNS": "100"}).stdout

    assert json.loads(inspect(half, "--json"))["manifest"]["storage"] == "fp16"
    assert "kandinsky-2-2 fp32, weights stored in fp16, " in inspect(half)
    assert json.loads(inspect(bundle, "--json"))["manifest"]["storage"] is None
    assert "stored in" not in inspect(bundle)


def test_manifests_that_do_not_name_it_still_load(opened: Bundle) -> None:
    content = json.loads(encode_manifest(opened.manifest))
    del content["storage"]
    manifest: Manifest = decode_manifest(json.dumps(content).encode(), "manifest.json")
    assert manifest == replace(opened.manifest, storage=None)
