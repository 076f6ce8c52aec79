"""`kandrt quantize` on the miniature: what it makes runs in 8 bits, paints the same pictures, and shares the rest."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from kandrt.engines.backends import open_component
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.hashing import sha256_file
from kandrt.engines.manifest import MANIFEST, FileRecord, encode_manifest
from kandrt.engines.memory import weights_memory
from kandrt.export.quantize.layers import TRANSPOSED, find_layers
from kandrt.export.quantize.rewrite import Weights
from kandrt.export.quantize.storage import read_places
from kandrt.runtime import load
from kandrt.runtime.miniature import MINIATURE
from kandrt.scripts.cli import app

PROMPTS = (
    "two small green squares",
    "a yellow triangle on a black background",
    "a large red circle on a blue background",
)
OPTIONS = ("--component", "decoder_step", "--steps", "4", "--threads", "1")
KEPT = "up_blocks.1.resnets.0"


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"}, prog_name="kandrt")


def asked(*prompts: str) -> list[str]:
    return [part for prompt in prompts for part in ("--prompt", prompt)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The miniature, in a folder whose files may be linked."""
    return open_bundle(shutil.copytree(MINIATURE, tmp_path_factory.mktemp("source") / "miniature"))


@pytest.fixture(scope="module")
def made(source: Bundle) -> tuple[Bundle, dict[str, Any]]:
    """Its decoder in 8 bits, and what the command said."""
    output = source.folder.with_name("int8")
    result = run("quantize", source.folder, "-o", output, *OPTIONS, *asked(*PROMPTS), "--keep", KEPT, "--json")
    assert result.exit_code == 0, result.stderr
    return open_bundle(output), json.loads(result.stdout)


@pytest.fixture(scope="module")
def quantized(made: tuple[Bundle, dict[str, Any]]) -> Bundle:
    return made[0]


# What is in it


def test_the_rest_is_the_sources_own_which_stays_as_it_was(source: Bundle, quantized: Bundle) -> None:
    source.check_hashes()
    quantized.check_hashes()
    before, after = source.manifest.files(), quantized.manifest.files()
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert changed == {"decoder_step.onnx", "decoder_context.onnx", "weights/decoder.safetensors"}
    assert not [
        path
        for path in quantized.folder.rglob("*")
        if path.is_file() and str(path.relative_to(quantized.folder)) not in {*after, "manifest.json"}
    ]
    assert not list(quantized.folder.parent.glob(".*"))  # nothing unfinished is left beside it


def test_the_manifest_says_what_was_done(made: tuple[Bundle, dict[str, Any]]) -> None:
    manifest = made[0].manifest
    record = manifest.components["decoder_step"].quantization
    assert record is not None
    assert manifest.components["decoder_step"].error is None
    assert {c for c, each in manifest.components.items() if each.quantization is not None} == {"decoder_step"}
    assert record.samples == 8  # two prompts of three, in four steps
    assert all(weight.startswith(f"{KEPT}.") for weight in record.kept)
    assert {f"{KEPT}.conv1.weight", f"{KEPT}.conv2.weight"} <= set(record.kept)
    assert 0 < record.error < 0.1
    said = made[1]["components"]["decoder_step"]
    assert said["quantization"]["error"] == record.error
    assert said["noise"].keys() == {*record.layers, *record.kept}


def test_weights_are_those_of_the_source_rounded(source: Bundle, quantized: Bundle) -> None:
    record = quantized.manifest.components["decoder_step"].quantization
    assert record is not None
    before = load_file(source.path(source.manifest.weights["decoder"]))
    after = load_file(quantized.path(quantized.manifest.weights["decoder"]))
    for name in record.layers:
        weight, numbers, scales = before[name].astype(np.float32), after[f"{name}.int8"], after[f"{name}.scale"]
        steps = scales if name.endswith(".transposed") else scales.reshape(-1, 1, 1, 1)
        assert numbers.dtype == np.int8
        assert (np.abs(numbers * steps - weight) <= steps / 2 * (1 + 1e-5)).all(), name
        assert name not in after  # not stored twice
    for name in after.keys() & before.keys():
        np.testing.assert_array_equal(after[name], before[name])


def test_another_graph_of_the_network_computes_as_before(source: Bundle, quantized: Bundle) -> None:
    rng = np.random.default_rng(0)
    inputs = {"image_embeds": rng.standard_normal((2, 160), np.float32), "timesteps": np.array([10, 900], np.float32)}
    answers = []
    for bundle in (source, quantized):
        session = open_component(bundle, "decoder_context", backend="onnxruntime", device="cpu", threads=1)
        answers.append(session(**inputs))
        session.close()
    for name, expected in answers[0].items():
        np.testing.assert_array_equal(answers[1][name], expected)


def test_memory_counts_8_bits_as_such(source: Bundle, quantized: Bundle) -> None:
    before, after = (weights_memory(bundle.manifest, ["decoder_step"]) for bundle in (source, quantized))
    assert after < before / 2
    assert weights_memory(source.manifest, ["movq_decoder"]) == weights_memory(quantized.manifest, ["movq_decoder"])


# Linear weights as they are stored now: the miniature has them [in, out], as bundles once had


def turned(bundle: Bundle, folder: Path) -> Bundle:
    """A copy of the bundle whose decoder reads linear weights [out, in]."""
    shutil.copytree(bundle.folder, folder)
    components, record = dict(bundle.manifest.components), bundle.manifest.weights["decoder"]
    arrays = {
        name.removesuffix(TRANSPOSED): np.ascontiguousarray(array.T) if name.endswith(TRANSPOSED) else array
        for name, array in load_file(bundle.path(record)).items()
    }
    save_file(arrays, folder / record.file)
    weights = Weights(folder, record.file, read_places(folder / record.file))
    for component in ("decoder_step", "decoder_context"):
        path = folder / components[component].graph.file
        model = ir.load(path)
        for value in list(model.graph.initializers.values()):
            if isinstance(value.const_value, ir.ExternalTensor):
                turn(model, value, weights)
        ir.save(model, path)
        graph = FileRecord(path.name, path.stat().st_size, sha256_file(path))
        components[component] = replace(components[component], graph=graph)
    file = FileRecord(record.file, (folder / record.file).stat().st_size, sha256_file(folder / record.file))
    files = {**bundle.manifest.weights, "decoder": file}
    manifest = replace(bundle.manifest, components=components, weights=files)
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))
    return open_bundle(folder)


def turn(model: ir.Model, value: ir.Value, weights: Weights) -> None:
    """Let a graph read one weight of another file, through a Transpose where that has it [out, in]."""
    old = value.name or ""
    name = old.removesuffix(TRANSPOSED)
    if name != old:
        ((user, _),) = value.uses()
        wide = user.outputs[0] if user.op_type == "Cast" else value
        ((reader, _),) = wide.uses()
        node = ir.node("Transpose", [wide], {"perm": [1, 0]})
        node.outputs[0].name, node.outputs[0].type = f"{name}.turned", wide.type
        ir.convenience.replace_all_uses_with(wide, node.outputs[0])
        node.replace_input_with(0, wide)
        model.graph.insert_before(reader, node)
        del model.graph.initializers[old]
        value.name = name
        model.graph.initializers[name] = value
    value.const_value = weights.tensor(name)
    value.shape = value.const_value.shape


def test_both_forms_of_linear_weights_give_the_same_numbers(
    made: tuple[Bundle, dict[str, Any]], source: Bundle, tmp_path: Path
) -> None:
    other = turned(source, tmp_path / "turned")
    assert any(layer.flipped for layer in find_layers(ir.load(other.folder / "decoder_step.onnx")))
    result = run(
        "quantize", other.folder, "-o", tmp_path / "int8", *OPTIONS, *asked(*PROMPTS), "--keep", KEPT, "--json"
    )
    assert result.exit_code == 0, result.stderr
    quantized, said = open_bundle(tmp_path / "int8"), json.loads(result.stdout)
    files = [load_file(bundle.path(bundle.manifest.weights["decoder"])) for bundle in (made[0], quantized)]
    named = [{name.replace(TRANSPOSED, ""): array for name, array in arrays.items()} for arrays in files]
    assert named[0].keys() == named[1].keys()
    for name, array in named[0].items():
        stored_turned = f"{name}{TRANSPOSED}" in files[0]  # a weight that is not in 8 bits
        np.testing.assert_array_equal(named[1][name].T if stored_turned else named[1][name], array)
    noise = [each["components"]["decoder_step"]["noise"] for each in (made[1], said)]
    assert {name.removesuffix(TRANSPOSED): error for name, error in noise[0].items()} == noise[1]
    records = [bundle.manifest.components["decoder_step"].quantization for bundle in (made[0], quantized)]
    assert records[0] is not None
    assert records[1] is not None
    assert (records[0].error, records[0].samples) == (records[1].error, records[1].samples)


# What runs it


def kinds(bundle: Bundle) -> Counter[str]:
    """How many layers the decoder's step has in 8 bits, by operator."""
    record = bundle.manifest.components["decoder_step"].quantization
    assert record is not None
    original = find_layers(ir.load(MINIATURE / "decoder_step.onnx"))
    return Counter(layer.operator for layer in original if layer.weight in record.layers)


def test_onnxruntime_runs_its_int8_kernels(quantized: Bundle, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    graph = quantized.path(quantized.manifest.components["decoder_step"].graph)
    onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    found, expected = Counter(node.op_type for node in optimized.graph.node), kinds(quantized)
    assert (found["QLinearConv"], found["MatMulIntegerToFloat"]) == (expected["Conv"], expected["MatMul"])


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_openvino_runs_its_int8_kernels(quantized: Bundle, precision: str) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    graph = quantized.path(quantized.manifest.components["decoder_step"].graph)
    compiled = openvino.Core().compile_model(str(graph), "CPU", {"INFERENCE_PRECISION_HINT": precision})
    found: Counter[tuple[str, str]] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        found[facts["layerType"].astype(str), facts["runtimePrecision"].astype(str)] += 1
    expected = kinds(quantized)
    assert found["Convolution", "u8"] == expected["Conv"]
    assert found["FullyConnected", "u8"] == expected["MatMul"]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_pictures_are_those_of_the_source(source: Bundle, quantized: Bundle, backend: str) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    prompts = ["a large red circle on a blue background", "two small green squares"]
    pictures = []
    for bundle in (source, quantized):
        with load(bundle.folder, backend=backend, threads=1) as k:
            pictures.append(k(prompts, steps=10, seed=[0, 1]).array)
    error = np.square(pictures[1].astype(np.float64) - pictures[0]).mean()
    # 40 dB and more were measured; other pictures have some 9 dB
    assert -10 * np.log10(error) > 30


def test_verify_and_inspect_know_8_bits(quantized: Bundle) -> None:
    result = run("verify", quantized.folder, "--json")
    assert result.exit_code == 0, result.stdout + result.stderr
    bounds = {row["what"]: row["tolerance"] for row in json.loads(result.stdout)["rows"]}
    assert bounds["text-to-image"] == "PSNR 25 dB"
    assert bounds["inpainting"] == "max 1e-03"  # of a decoder that is as it was
    shown = " ".join(run("inspect", quantized.folder).stdout.split())  # in lines as wide as the terminal
    assert "int8, fp32" in shown
    assert f"kept: {KEPT}.conv1.weight" in shown


@pytest.mark.parametrize("family", ["bundle_2_1", "bundle_3"])
def test_decoders_of_every_family_are_quantized(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    original: Path = shutil.copytree(request.getfixturevalue(family), tmp_path / "original")
    result = run("quantize", original, "-o", tmp_path / "int8", "--steps", 2, "--size", 128, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    manifest = open_bundle(tmp_path / "int8").manifest
    for decoder in manifest.decoders.values():
        found = manifest.components[decoder.step].quantization
        assert found is not None
        assert len(found.layers) > len(found.kept)


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--component", "unet"], "component: the bundle has no unet; it has"),
        (["--component", "decoder_step", "--component", "decoder_step"], "expected each once"),
        (["--keep", "up_blocks.99"], "'up_blocks.99' is no layer of"),
        (["--prompt", "one"], "expected two or more"),
        (["--prompts", "absent.txt"], "cannot read prompts of absent.txt"),
        (["--component", "image_encoder", *asked(*PROMPTS)], "image_encoder: pictures of prompts do not run it"),
    ],
)
def test_what_cannot_be_is_refused(source: Bundle, tmp_path: Path, options: list[str], words: str) -> None:
    result = run("quantize", source.folder, "-o", tmp_path / "out", "--steps", 2, *options)
    assert result.exit_code == 1
    assert words in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_bundle_itself_is_not_replaced(source: Bundle) -> None:
    result = run("quantize", source.folder, "-o", source.folder / ".." / source.folder.name, "--overwrite")
    assert result.exit_code == 1
    assert "expected another folder than the bundle's own" in result.stderr


def test_a_quantized_bundle_is_refused(quantized: Bundle, tmp_path: Path) -> None:
    result = run("quantize", quantized.folder, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "is quantized already (decoder_step)" in result.stderr


def test_a_bundle_of_16_bits_is_refused(fp16_bundle: Path, tmp_path: Path) -> None:
    result = run("quantize", fp16_bundle, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "is in fp16, expected fp32" in result.stderr
    assert "--precision fp32" in result.stderr


def test_it_needs_no_pytorch() -> None:
    code = "import sys; sys.modules['torch'] = None; import kandrt.export.quantize.bundle, kandrt.scripts.quantize"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_too_large_an_error_leaves_nothing(source: Bundle, tmp_path: Path) -> None:
    result = run("quantize", source.folder, "-o", tmp_path / "out", *OPTIONS, *asked(*PROMPTS), "--refuse-above", 1e-4)
    assert result.exit_code == 1
    assert "decoder_step: expected a relative error of 0.0001 at most in 8 bits, found" in result.stderr
    assert not list(tmp_path.iterdir())
    source.check_hashes()
