"""Checkpoints to a bundle: what is stored, what is refused before any work, and what a failure leaves: nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor

from kandrt.engines.backends import open_component
from kandrt.engines.bundle import open_bundle
from kandrt.engines.errors import BackendError, CheckpointError, InputError, NumericalError, OutputError
from kandrt.engines.manifest import GraphError, Manifest
from kandrt.export import draft, exporter, network
from kandrt.export.check import TOLERANCES, difference, random_inputs
from kandrt.export.checkpoint import Checkpoint, open_checkpoint
from kandrt.export.exporter import check_together, export_bundle
from kandrt.export.graphs import Graph
from kandrt.export.network import Job, SourceNetwork
from kandrt.export.random_weights import random_tensors
from kandrt.export.weight_files import write_safetensors

STORED = "diffusion_pytorch_model.safetensors"
# Networks of two levels: they take a third of the time of the small checkpoints' four.
TWO_LEVELS: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": [32, 64],
        "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    },
    "movq": {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    },
}


def edit(file: Path, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(config))
    return config


def remake(submodel: Path, seed: str = "1", **changes: Any) -> None:
    """Change a network's config.json and draw weights that fit."""
    config = edit(submodel / "config.json", **changes)
    write_safetensors(submodel / STORED, random_tensors(config["_class_name"], config, seed, "float32"))


@pytest.fixture(scope="session")
def tiny(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of two levels; not to be changed."""
    folder = Path(shutil.copytree(checkpoints["decoder"], tmp_path_factory.mktemp("tiny") / "decoder"))
    for name, changes in TWO_LEVELS.items():
        remake(folder / name, **changes)
    return folder


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of one's own to change."""

    def make(role: str, name: str | None = None) -> Path:
        return Path(shutil.copytree(checkpoints[role], tmp_path / (name or role)))

    return make


def graph_of(network: torch.nn.Module, graph: Graph) -> ir.Model:
    """The inputs, outputs and names of a traced graph; an output is the first input's sum plus a parameter."""
    types = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "int64": ir.DataType.INT64}

    def value(name: str, dtype: str, shape: Any) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(types[dtype]))

    inputs = [value(spec.name, spec.dtype, spec.shape) for spec in graph.inputs]
    outputs = [value(spec.name, spec.dtype, spec.shape) for spec in graph.outputs]
    weights = [
        value(name, str(parameter.dtype).removeprefix("torch."), parameter.shape)
        for name, parameter in list(network.named_parameters())[: len(outputs)]
    ]

    def cast(value: ir.Value, dtype: ir.DataType | None, *outputs: ir.Value) -> ir.Node:
        to = ir.AttrInt64("to", ir.DataType(dtype or 0))
        return ir.Node("", "Cast", [value], attributes=[to], outputs=outputs or None)

    nodes = [cast(inputs[0], ir.DataType.FLOAT)]
    nodes.append(ir.Node("", "ReduceSum", nodes[0].outputs, attributes=[ir.AttrInt64("keepdims", 0)]))
    for output, weight in zip(outputs, weights, strict=True):
        total = cast(nodes[1].outputs[0], weight.dtype)
        added = ir.Node("", "Add", [total.outputs[0], weight])
        nodes += [total, added, cast(added.outputs[0], ir.DataType.FLOAT, output)]
    made = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 23}, name="g")
    return ir.Model(made, ir_version=10)


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Exports without tracing and checking, which take most of the time; gives the methods that were to be traced."""
    asked: list[str] = []

    def trace(module: torch.nn.Module, graph: Graph) -> ir.Model:
        asked.append(f"{type(module).__name__}.{graph.method}")
        return graph_of(module, graph)

    monkeypatch.setattr(network, "trace", trace)
    monkeypatch.setattr(network, "check_graph", lambda *_: GraphError(1e-7, 1e-6, 1e-4))
    return asked


def manifest_of(folder: Path) -> Manifest:
    opened = open_bundle(folder)
    opened.check_hashes()
    return opened.manifest


def weights_of(folder: Path, name: str) -> dict[str, Tensor]:
    """Weights of a bundle under their checkpoint's names."""
    stored = safetensors.torch.load_file(folder / "weights" / f"{name}.safetensors")
    return {key.removeprefix("network."): tensor for key, tensor in stored.items()}


def assert_weights(folder: Path, name: str, expected: Mapping[str, Tensor], unused: str = "") -> None:
    found = weights_of(folder, name)
    wanted = {key: tensor for key, tensor in expected.items() if key != unused}
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor.to(found[key].dtype)), key


def read_only(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its content, to compare with later."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What a bundle says and holds


def test_the_manifest_says_what_was_exported(bundle: Path, checkpoints: dict[str, Path]) -> None:
    manifest = manifest_of(bundle)
    assert (manifest.family, manifest.precision, manifest.schema_version) == ("kandinsky-2-2", "fp32", 1)
    assert [Path(source.checkpoint).name for source in manifest.sources] == [
        checkpoints[role].name for role in ("prior", "decoder", "inpaint", "controlnet")
    ]
    assert [source.kind for source in manifest.sources][:2] == ["KandinskyV22PriorPipeline", "KandinskyV22Pipeline"]
    assert manifest.tools["torch"] == version("torch")
    assert {"kandrt", "onnx", "onnxscript", "onnxruntime"} <= manifest.tools.keys()
    assert manifest.prior is not None
    assert (manifest.prior.embedding_dim, manifest.prior.step) == (32, "prior_step")
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.max_length == 77
    config = json.loads((checkpoints["prior"] / "image_processor" / "preprocessor_config.json").read_text())
    assert manifest.image_processor == config
    config = json.loads((checkpoints["decoder"] / "scheduler" / "scheduler_config.json").read_text())
    assert manifest.schedulers["decoder"] == config
    assert manifest.schedulers["prior"]["_class_name"] == "UnCLIPScheduler"
    assert manifest.decoders.keys() == {"decoder", "inpaint", "controlnet"}
    for role, decoder in manifest.decoders.items():
        assert (decoder.scale, decoder.size_multiple, decoder.embedding_dim, decoder.default_size) == (8, 64, 32, 512)
        assert (decoder.context, decoder.step, decoder.scheduler) == (f"{role}_context", f"{role}_step", role)
        assert (decoder.movq_encoder, decoder.movq_decoder) == ("movq_encoder", "movq_decoder")  # stored once for all
    assert manifest.weights.keys() == {
        "prior", "text_encoder", "image_encoder", "movq", "decoder", "inpaint", "controlnet"
    }  # fmt: skip
    assert manifest.reference is None


def test_every_graph_was_compared_with_its_module(bundle: Path) -> None:
    for component in manifest_of(bundle).components.values():
        assert component.error is not None
        # another order of summation in some hundred operations, whose relative error is 6e-8
        assert component.error.relative < 1e-5
        assert component.error.tolerance == TOLERANCES["fp32"]


def test_weights_are_those_of_the_checkpoints(bundle: Path, checkpoints: dict[str, Path]) -> None:
    for role, submodel, name, unused in (
        ("prior", "prior", "prior", ""),
        ("prior", "text_encoder", "text_encoder", "text_model.embeddings.position_ids"),
        ("prior", "image_encoder", "image_encoder", "vision_model.embeddings.position_ids"),
        ("decoder", "movq", "movq", "quantize.embedding.weight"),
        ("decoder", "unet", "decoder", ""),
        ("inpaint", "unet", "inpaint", ""),
        ("controlnet", "unet", "controlnet", ""),
    ):
        (file,) = (checkpoints[role] / submodel).glob("*.safetensors")
        expected = safetensors.torch.load_file(file)
        assert_weights(bundle, name, expected, unused)
        assert {tensor.dtype for tensor in weights_of(bundle, name).values()} == {torch.float32}


def test_statistics_are_those_of_the_prior_and_of_a_zero_image(bundle: Path, checkpoints: dict[str, Path]) -> None:
    from transformers import CLIPVisionModelWithProjection

    stored = safetensors.torch.load_file(bundle / "weights" / "statistics.safetensors")
    prior = safetensors.torch.load_file(checkpoints["prior"] / "prior" / STORED)
    encoder = CLIPVisionModelWithProjection.from_pretrained(checkpoints["prior"] / "image_encoder").eval()
    with torch.no_grad():
        zero = encoder(pixel_values=torch.zeros(1, 3, 224, 224)).image_embeds
    assert stored.keys() == {"clip_mean", "clip_std", "zero_image_embeds"}
    assert torch.equal(stored["clip_mean"], prior["clip_mean"])
    assert torch.equal(stored["clip_std"], prior["clip_std"])
    torch.testing.assert_close(stored["zero_image_embeds"], zero)


@pytest.mark.parametrize(("given", "expected"), [(96, 96), (None, 64), ([96, 96], 64), (0, 64), (True, 64), ("96", 64)])
def test_the_default_size_is_the_checkpoints_or_that_of_all(
    given: Any, expected: int, copy: Callable[..., Path], untraced: list[str], tmp_path: Path
) -> None:
    edit(copy("decoder") / "unet" / "config.json", sample_size=given)
    manifest = manifest_of(export_bundle([tmp_path / "decoder"], tmp_path / "bundle"))
    assert manifest.decoders["decoder"].default_size == 8 * expected
    assert untraced == ["MoVQ.encode", "MoVQ.decode", "UNet.context", "UNet.step"]


def test_a_combined_checkpoint_is_both_its_halves(
    checkpoints: dict[str, Path], bundle: Path, untraced: list[str], tmp_path: Path
) -> None:
    combined = manifest_of(export_bundle([checkpoints["combined"]], tmp_path / "bundle"))
    apart = manifest_of(bundle)
    assert combined.prior == apart.prior
    assert combined.decoders == {"decoder": apart.decoders["decoder"]}
    assert combined.weights == {name: apart.weights[name] for name in combined.weights}
    assert combined.tokenizer == apart.tokenizer
    assert combined.schedulers["prior"] == apart.schedulers["prior"]


@pytest.fixture
def decoders_2_1(checkpoints: dict[str, Path], tmp_path: Path) -> list[Path]:
    """2.1's decoder and inpainting decoder, to be changed."""
    return [Path(shutil.copytree(checkpoints[name], tmp_path / name)) for name in ("decoder-2-1", "inpaint-2-1")]


def change_tokenizer(checkpoint: Path, change: Callable[[Any], None]) -> None:
    file = checkpoint / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


def test_decoders_keep_their_own_tokenizers(decoders_2_1: list[Path], untraced: list[str], tmp_path: Path) -> None:
    """Equal text encoders are stored once, and so are equal tokenizers; others each have their file."""
    alike = open_bundle(export_bundle(decoders_2_1, tmp_path / "alike", check=False)).manifest.prompts()
    assert alike["decoder"] == alike["inpaint"]
    change_tokenizer(decoders_2_1[1], lambda content: content["model"]["vocab"][50].__setitem__(1, -3.5))
    bundle = open_bundle(export_bundle(decoders_2_1, tmp_path / "apart", check=False))
    prompts = bundle.manifest.prompts()
    assert prompts["decoder"].encoder == prompts["inpaint"].encoder
    assert prompts["decoder"].tokenizer == alike["decoder"].tokenizer
    assert prompts["inpaint"].tokenizer.file.file != prompts["decoder"].tokenizer.file.file
    bundle.check_hashes()


def test_tokenizers_are_read_before_any_network(
    decoders_2_1: list[Path], untraced: list[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (decoders_2_1[0] / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks sentencepiece\.bpe\.model, and has no tokenizer\.json"):
        export_bundle([checkpoints["prior-2-1"], decoders_2_1[0]], tmp_path / "bundle", check=False)
    assert untraced == []


def test_the_tokenizer_of_another_family_is_refused(
    decoders_2_1: list[Path], untraced: list[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Both are Unigram models of about as many ids; the padding token's id tells them apart."""
    shutil.copy(checkpoints["decoder-3"] / "tokenizer" / "tokenizer.json", decoders_2_1[0] / "tokenizer")
    with pytest.raises(CheckpointError, match=r"padding token has the id 0, and the text encoder's pad_token_id is 1"):
        export_bundle(decoders_2_1[:1], tmp_path / "bundle", check=False)
    assert untraced == []


def test_packages_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "TOOLS", ("kandrt", "no-such-package-of-this-name"))
    assert [draft.tool_version(tool) is None for tool in draft.TOOLS] == [False, True]


def test_reports_say_what_is_done(tiny: Path, untraced: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    export_bundle([tiny], tmp_path / "bundle", report=said.append, check=True)
    for part in ("tracing movq_encoder", "checking movq_decoder", "writing weights of decoder", "tracing decoder_step"):
        assert part in said


def test_references_are_made_where_all_was_checked(tiny: Path, untraced: list[str], tmp_path: Path) -> None:
    seen: list[tuple[Manifest, list[str]]] = []

    def make(folder: Path, sessions: Mapping[str, Any]) -> dict[str, Any]:
        seen.append((manifest_of(folder), sorted(sessions)))
        return {"picture": np.arange(6.0).reshape(2, 3).T}

    folder = export_bundle([tiny], tmp_path / "bundle", make_reference=make)
    manifest = manifest_of(folder)
    assert seen == [
        (replace(manifest, reference=None), ["decoder_context", "decoder_step", "movq_decoder", "movq_encoder"])
    ]
    assert manifest.reference is not None
    (array,) = safetensors.torch.load_file(folder / manifest.reference.file).values()
    assert torch.equal(array, torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))
    assert manifest_of(export_bundle([tiny], tmp_path / "second", check=False, make_reference=make)).reference is None
    assert len(seen) == 1


# Which MoVQ


def test_a_movq_of_its_own_is_kept_and_used(
    checkpoints: dict[str, Path], copy: Callable[..., Path], untraced: list[str], tmp_path: Path
) -> None:
    remake(copy("inpaint") / "movq", seed="2")
    sources = [checkpoints["decoder"], tmp_path / "inpaint", checkpoints["controlnet"]]
    folder = export_bundle(sources, tmp_path / "bundle")
    manifest = manifest_of(folder)
    assert manifest.weights.keys() == {"movq", "inpaint_movq", "decoder", "inpaint", "controlnet"}
    assert sorted(path.stem for path in (folder / "weights").iterdir()) == sorted(manifest.weights)
    for role, name in (("decoder", "movq"), ("inpaint", "inpaint_movq"), ("controlnet", "movq")):
        decoder = manifest.decoders[role]  # type: ignore[index]
        assert (decoder.movq_encoder, decoder.movq_decoder) == (f"{name}_encoder", f"{name}_decoder")
        stored = safetensors.torch.load_file(sources[role == "inpaint"] / "movq" / STORED)
        assert_weights(folder, name, stored, "quantize.embedding.weight")
        for component in (decoder.movq_encoder, decoder.movq_decoder):
            assert manifest.components[component].weights == (name,)
            graph = ir.load(folder / manifest.components[component].graph.file)
            (weight,) = (value.const_value for value in graph.graph.initializers.values())
            assert isinstance(weight, ir.ExternalTensor)
            assert weight.location == f"weights/{name}.safetensors"


def test_equal_weights_under_another_config_are_another_movq(
    checkpoints: dict[str, Path], copy: Callable[..., Path], untraced: list[str], tmp_path: Path
) -> None:
    edit(copy("inpaint") / "movq" / "config.json", norm_num_groups=16)
    manifest = manifest_of(export_bundle([checkpoints["decoder"], tmp_path / "inpaint"], tmp_path / "bundle"))
    assert manifest.decoders["inpaint"].movq_decoder == "inpaint_movq_decoder"
    assert manifest.weights["movq"].sha256 == manifest.weights["inpaint_movq"].sha256


# Every form of weights


def half_beside(folder: Path, tensors: dict[str, Tensor]) -> None:
    """An fp16 variant beside full weights, which hold something else."""
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    safetensors.torch.save_file(halves, folder / "diffusion_pytorch_model.fp16.safetensors")
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / STORED)


def sharded(folder: Path, tensors: dict[str, Tensor]) -> None:
    from huggingface_hub import save_torch_state_dict

    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size="500KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


FORMS: dict[str, Callable[[Path, dict[str, Tensor]], object]] = {
    "bin": lambda folder, tensors: torch.save(tensors, folder / "diffusion_pytorch_model.bin"),
    "shards": sharded,
    "fp16 variant": half_beside,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_bundle_does_not_depend_on_the_form_of_the_weights(
    form: str, copy: Callable[..., Path], untraced: list[str], tmp_path: Path
) -> None:
    checkpoint = copy("controlnet")
    remake(checkpoint / "unet", **TWO_LEVELS["unet"])
    expected = manifest_of(export_bundle([checkpoint], tmp_path / "expected"))
    tensors = safetensors.torch.load_file(checkpoint / "unet" / STORED)
    (checkpoint / "unet" / STORED).unlink()
    FORMS[form](checkpoint / "unet", tensors)
    variant = "fp16" if form == "fp16 variant" else None
    folder = export_bundle([checkpoint], tmp_path / "bundle", variant=variant)
    manifest = manifest_of(folder)
    if variant is None:
        assert manifest == expected
    else:
        assert_weights(folder, "controlnet", {name: tensor.half() for name, tensor in tensors.items()})
        assert manifest.weights["movq"] == expected.weights["movq"]


def test_old_names_of_attention_layers_are_understood(
    bundle: Path, copy: Callable[..., Path], untraced: list[str], tmp_path: Path
) -> None:
    file = copy("decoder") / "movq" / STORED
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def renamed(name: str) -> str:
        return next((name.replace(new, before) for new, before in old.items() if new in name), name)

    tensors = {renamed(name): tensor for name, tensor in safetensors.torch.load_file(file).items()}
    assert any(".proj_attn." in name for name in tensors)
    safetensors.torch.save_file(tensors, file)
    manifest = manifest_of(export_bundle([tmp_path / "decoder"], tmp_path / "bundle"))
    assert manifest.weights["movq"] == manifest_of(bundle).weights["movq"]


# What is refused before any work


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tracing, no writing: whatever is refused here is refused before."""

    def work(*args: Any, **named: Any) -> None:
        raise AssertionError("work was done")

    for name in ("trace", "write_safetensors"):
        monkeypatch.setattr(network, name, work)
    monkeypatch.setattr(exporter, "new_folder", work)


def damaged_weights(change: Callable[[dict[str, Tensor]], object], file: Path) -> None:
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


def spoil(tensors: dict[str, Tensor]) -> None:
    del tensors["conv_in.weight"], tensors["mid_block.attentions.0.to_q.bias"]
    tensors["lora.down"] = torch.zeros(1)
    tensors["conv_out.bias"] = torch.zeros(4)
    tensors["conv_norm_out.weight"] = torch.zeros(32, 1)


@pytest.mark.usefixtures("idle")
def test_weights_that_do_not_fit_are_refused_and_all_named(copy: Callable[..., Path], tmp_path: Path) -> None:
    damaged_weights(spoil, copy("decoder") / "unet" / STORED)
    with pytest.raises(CheckpointError) as caught:
        export_bundle([tmp_path / "decoder"], tmp_path / "bundle")
    message = str(caught.value)
    for part in (
        str(tmp_path / "decoder" / "unet"),
        "2 missing: conv_in.weight, mid_block.attentions.0.to_q.bias",
        "1 unexpected: lora.down",
        "conv_norm_out.weight (expected [32], found [32, 1])",
        "conv_out.bias (expected [8], found [4])",
    ):
        assert part in message
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("role", "submodel", "changes", "message"),
    [
        ("decoder", "unet", {"dual_cross_attention": True}, "dual_cross_attention: unknown field"),
        ("decoder", "unet", {"resnet_time_scale_shift": "default"}, "resnet_time_scale_shift: expected 'scale_shift'"),
        ("decoder", "unet", {"block_out_channels": "many"}, "block_out_channels"),
        ("decoder", "unet", {"block_out_channels": [2**62] * 4}, "block_out_channels|cannot build|of another shape"),
        ("decoder", "movq", {"norm_type": "group"}, "norm_type: expected 'spatial'"),
        ("prior", "prior", {"added_emb_type": None}, "added_emb_type: expected 'prd'"),
        ("prior", "text_encoder", {"num_attention_heads": 3}, "num_attention_heads = 3 does not divide"),
    ],
)
def test_configs_that_are_not_supported_are_refused_by_file_and_field(
    role: str, submodel: str, changes: dict[str, Any], message: str, copy: Callable[..., Path], tmp_path: Path
) -> None:
    edit(copy(role) / submodel / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        export_bundle([tmp_path / role], tmp_path / "bundle")
    assert str(tmp_path / role / submodel) in str(caught.value)


@pytest.mark.usefixtures("idle")
def test_checkpoints_that_do_not_go_together_are_refused(
    checkpoints: dict[str, Path], copy: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(CheckpointError, match="no checkpoint given"):
        export_bundle([], out)
    again = copy("decoder", "again")
    with pytest.raises(CheckpointError, match=f"two checkpoints for the role 'decoder': .* and {again}; give one"):
        export_bundle([checkpoints["decoder"], again], out)
    with pytest.raises(CheckpointError, match="two checkpoints for the role 'prior'"):
        export_bundle([checkpoints["combined"], checkpoints["prior"]], out)
    remake(copy("inpaint") / "unet", encoder_hid_dim=48)
    with pytest.raises(CheckpointError, match="embeddings of different widths") as caught:
        export_bundle([checkpoints["prior"], checkpoints["decoder"], tmp_path / "inpaint"], out)
    for role, width in (("prior", 32), ("unet", 48)):
        assert re.search(rf"{role} of [^,]+: {width}", str(caught.value))
    remake(copy("combined") / "unet", encoder_hid_dim=48)  # both in one folder
    with pytest.raises(CheckpointError, match=r"prior of .*combined: 32, .*unet of .*combined: 48; these networks"):
        export_bundle([tmp_path / "combined"], out)


def test_one_bundle_holds_one_family(checkpoints: dict[str, Path]) -> None:
    first = open_checkpoint(checkpoints["prior"])
    other: Checkpoint = replace(open_checkpoint(checkpoints["decoder"]), family="kandinsky-9")
    with pytest.raises(CheckpointError, match=r"one family: .*prior is kandinsky-2-2, .*decoder is kandinsky-9"):
        check_together([first, other])
    check_together([first, open_checkpoint(checkpoints["decoder"])])


def test_a_tokenizer_of_another_length_is_refused(
    copy: Callable[..., Path], untraced: list[str], tmp_path: Path
) -> None:
    edit(copy("prior") / "tokenizer" / "tokenizer_config.json", model_max_length=40)
    with pytest.raises(
        CheckpointError, match="model_max_length is 40, the text encoder has 77 positions, and the prior"
    ):
        export_bundle([tmp_path / "prior"], tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]


@pytest.mark.usefixtures("idle")
def test_a_network_of_an_unknown_class_is_refused(checkpoints: dict[str, Path]) -> None:
    submodel = replace(open_checkpoint(checkpoints["decoder"]).submodels["unet"], class_name="UNet3D")
    with pytest.raises(CheckpointError, match=r"expected a UNet2DConditionModel or .*, found UNet3D"):
        SourceNetwork(Job("unet", submodel, None, {}))


@pytest.mark.usefixtures("idle")
def test_an_unknown_precision_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision: expected 'fp32' or 'fp16' or 'bf16', found 'int8'"):
        export_bundle([checkpoints["decoder"]], tmp_path / "bundle", precision="int8")  # type: ignore[arg-type]


# What a failure leaves; more of the folder in test_output.py


@pytest.mark.usefixtures("idle")
def test_an_output_that_cannot_be_used_is_refused_before_the_checkpoint_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    for overwrite, message in ((False, "exists already"), (True, "is not a bundle")):
        with pytest.raises(OutputError, match=message):
            export_bundle([tmp_path / "nothing here"], tmp_path / "bundle", overwrite=overwrite)


def test_a_bundle_is_replaced_when_asked_for(
    tiny: Path, copy: Callable[..., Path], untraced: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    assert export_bundle([str(tiny)], str(out)) == out
    first = manifest_of(out)
    remake(copy("decoder") / "unet", seed="2")
    export_bundle([tmp_path / "decoder"], out, overwrite=True)
    assert manifest_of(out).weights != first.weights
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "decoder"]


ERRORS: dict[str, tuple[BaseException, type[BaseException]]] = {
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), OutputError),
    "interruption": (KeyboardInterrupt(), KeyboardInterrupt),
    "over its tolerance": (NumericalError("over"), NumericalError),
    "bug": (LookupError("bug"), LookupError),
}
PLACES = {
    "tracing": (network, "trace"),
    "saving a graph": (network, "save_graph"),
    "checking": (network, "check_graph"),
    "writing weights": (network, "write_safetensors"),
    "saving the manifest": (exporter, "save_manifest"),
    "a reference": (exporter, "save_arrays"),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_things_as_they_were(
    overwrite: bool,
    place: str,
    error: str,
    tiny: Path,
    untraced: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "new" / "bundle"
    if overwrite:
        out.mkdir(parents=True)
        (out / "manifest.json").write_text('{"schema_version": 0, "family": "any", "components": {}}')
        (out / "old.onnx").write_text("old")
    before = {str(path): path.stat().st_ino for path in tmp_path.rglob("*")}
    raised, expected = ERRORS[error]

    def fail(*args: Any, **named: Any) -> None:
        raise raised

    monkeypatch.setattr(*PLACES[place], fail)
    with pytest.raises(expected) as caught:
        export_bundle([tiny], out, overwrite=overwrite, make_reference=lambda *_: {"a": np.zeros(1)})
    if expected is OutputError:
        assert str(caught.value) == f"cannot write {out}: No space left on device"
    assert {str(path): path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_a_disk_that_fills_up_while_weights_are_written(tiny: Path, untraced: list[str], tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits on file size are of POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # Python ignores the signal: writes fail
    try:
        with pytest.raises(OutputError, match=r"cannot write .*movq.* \([\d,]+ bytes\)"):
            export_bundle([tiny], tmp_path / "bundle")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


# Reduced precision


@pytest.fixture(scope="session", params=["fp16", "bf16"])
def reduced(request: pytest.FixtureRequest, shared: Path, tiny: Path, checkpoints: dict[str, Path]) -> Path:
    """A bundle of a prior and a decoder of two levels in fp16 and in bf16, exported with checks."""
    folder = shared / f"bundle-{request.param}"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            export_bundle([checkpoints["prior"], tiny], folder, precision=request.param)
    return folder


LOW = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Rounding of one number: half of the distance to the next
UNIT = {"fp16": 2**-11, "bf16": 2**-8}
NORM = re.compile(
    r"(.*\.)?(norm\d?|norm_out|image_norm|group_norm|spatial_norm|conv_norm_out)(\.norm_layer)?\.(weight|bias)"
)
# What `context` computes once a request, in fp32: see KEEP_FP32 of the networks
CONTEXT = re.compile(
    r"(.*\.)?(time_embedding|add_embedding|encoder_hid_proj|add_k_proj|add_v_proj)\..*|clip_mean|clip_std"
)


def test_reduced_graphs_are_within_the_tolerance_of_their_precision(reduced: Path) -> None:
    manifest = manifest_of(reduced)
    assert manifest.precision == reduced.name.removeprefix("bundle-")
    for name, component in manifest.components.items():
        assert component.precision == manifest.precision
        assert component.error is not None
        assert component.error.tolerance == TOLERANCES[manifest.precision]
        assert component.error.relative <= component.error.tolerance
        # a graph that computed in fp32 would be closer than one rounding
        exact = name == "decoder_context"
        assert (component.error.relative < UNIT[manifest.precision] / 16) == exact
        assert {spec.dtype for spec in (*component.inputs, *component.outputs)} <= {"float32", "int64"}


@pytest.mark.parametrize("name", ["prior", "decoder", "movq", "text_encoder", "image_encoder"])
def test_norms_and_what_is_computed_once_stay_in_fp32(
    name: str, reduced: Path, tiny: Path, checkpoints: dict[str, Path]
) -> None:
    precision = reduced.name.removeprefix("bundle-")
    folder = tiny / {"decoder": "unet"}.get(name, name) if name in ("decoder", "movq") else checkpoints["prior"] / name
    (file,) = folder.glob("*.safetensors")
    original, stored = safetensors.torch.load_file(file), weights_of(reduced, name)
    wide = {key for key, tensor in stored.items() if tensor.dtype == torch.float32}
    if name in ("text_encoder", "image_encoder"):  # as transformers has them
        assert not wide
    else:
        assert wide == {key for key in stored if NORM.fullmatch(key) or CONTEXT.fullmatch(key)}
        assert any(NORM.fullmatch(key) for key in wide)
    for key, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if key in wide else LOW[precision])
        assert torch.equal(tensor, original[key].to(tensor.dtype)), key
    statistics = safetensors.torch.load_file(reduced / "weights" / "statistics.safetensors")
    assert {tensor.dtype for tensor in statistics.values()} == {torch.float32}


def test_reduced_graphs_run_where_there_are_kernels(reduced: Path, tiny: Path) -> None:
    opened = open_bundle(reduced)
    precision = opened.manifest.precision
    if precision == "bf16":
        with pytest.raises(BackendError, match="no bf16 kernels on device 'cpu'"):
            open_component(opened, "decoder_step", backend="onnxruntime", device="cpu")
        return
    submodel = open_checkpoint(tiny).submodels["unet"]
    source = SourceNetwork(Job("unet", submodel, None, {"step": "decoder_step"}))
    session = open_component(opened, "decoder_step", backend="onnxruntime", device="cpu", threads=1)
    inputs = random_inputs(session.inputs, source.graphs["step"].multiples, seed=5)
    expected = source.sessions()["decoder_step"](**inputs)["prediction"]
    assert difference(expected, session(**inputs)["prediction"])[0] < TOLERANCES[precision]
    session.close()


def test_numbers_too_large_for_half_precision_are_refused(
    copy: Callable[..., Path], untraced: list[str], tmp_path: Path
) -> None:
    damaged_weights(
        lambda tensors: tensors["conv_in.weight"].view(-1)[3:4].fill_(1e5), copy("decoder") / "unet" / STORED
    )
    with pytest.raises(CheckpointError, match=r"'conv_in.weight' holds 100000, .* choose another precision"):
        export_bundle([tmp_path / "decoder"], tmp_path / "bundle", precision="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["decoder"]


# Graphs that are not right, and graphs that are the same


def test_a_network_that_gives_nan_is_not_exported(copy: Callable[..., Path], tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["text_projection.weight"][0, 0] = float("nan")

    damaged_weights(spoil, copy("prior") / "text_encoder" / "model.safetensors")
    with pytest.raises(NumericalError, match="text_encoder: the module gives NaN or infinity in text_embeds"):
        export_bundle([tmp_path / "prior"], tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]


def test_a_graph_over_its_tolerance_is_not_exported(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kandrt.export import check

    monkeypatch.setattr(check, "TOLERANCES", {"fp32": 1e-12})
    with pytest.raises(NumericalError, match="text_encoder: expected a graph within 1e-12 of its module at fp32"):
        export_bundle([checkpoints["prior"]], tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


AGAIN = """
import sys
from kandrt.export.exporter import export_bundle
export_bundle([sys.argv[1]], sys.argv[2], check=False)
"""


def test_exporting_again_gives_the_same_bytes(bundle: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """In another process, with another order of sets, and alone where the first had company."""
    command = [sys.executable, "-c", AGAIN, str(checkpoints["prior"]), str(tmp_path / "again")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "7"}, timeout=600)
    first, again = manifest_of(bundle), manifest_of(tmp_path / "again")
    assert again.components == {name: replace(first.components[name], error=None) for name in again.components}
    assert again.weights == {name: first.weights[name] for name in again.weights}
    assert (again.prior, again.tokenizer, again.tools) == (first.prior, first.tokenizer, first.tools)
