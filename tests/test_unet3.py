"""The UNet of Kandinsky 3 against diffusers, and its graphs against the module, from weights with no silent branch."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from kandrt import scripts
from kandrt.engines.errors import CheckpointError
from kandrt.engines.ort import OrtSession
from kandrt.export import check
from kandrt.export.check import TOLERANCES
from kandrt.export.checkpoint import SubModel
from kandrt.export.graphs import NETWORKS
from kandrt.export.modules.unet3 import AttentionBlock, ConditionalNorm, UNet3, UNet3Config, Upsample
from kandrt.export.network import Exported, Job, SourceNetwork, Writer, export_network
from kandrt.export.operators import unsupported
from kandrt.export.probes import widen
from kandrt.export.trace import MAX_INLINE

# Relative L2 distance in fp32. Both sides do some hundred operations whose relative error is about 6e-8 (measured:
# 2e-6 and less), and a branch that is missing or misplaced costs 1e-2 and more.
SAME = 1e-5
# Relative L2 distance of the reduced precisions to fp32: their rounding, 2**-11 and 2**-8, over the same operations.
NEAR = {torch.float16: 2e-2, torch.bfloat16: 8e-2}

CLASS = "Kandinsky3UNet"
PUBLISHED: dict[str, Any] = json.loads(
    (Path(scripts.__file__).parent / "checkpoint-configs" / "kandinsky-3" / "unet" / "config.json").read_text()
)
# Several channels a group: a bias before a norm of single channels would be silent.
NARROW: dict[str, Any] = {
    "block_out_channels": [32, 48, 64, 96],
    "groups": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 40,
    "encoder_hid_dim": 24,
    "time_embedding_dim": 48,
}
TWO_LEVELS: dict[str, Any] = {**NARROW, "block_out_channels": [32, 48], "layers_per_block": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "published": NARROW,
    "2 layers": {**NARROW, "layers_per_block": 2, "groups": 8},
    "3 levels, 4 layers": {**NARROW, "block_out_channels": [48, 32, 64], "layers_per_block": 4},
    "2 levels": TWO_LEVELS,
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def config_of(name: str) -> dict[str, Any]:
    return {**PUBLISHED, **CONFIGS[name]}


def randomise(network: nn.Module) -> nn.Module:
    """Weights that keep a signal's variance, scales about 1, and nothing at zero, the conditioned norms neither."""
    for name, parameter in network.named_parameters():
        values = torch.randn_like(parameter)
        if parameter.ndim == 1:
            parameter.copy_(1 + 0.2 * values if re.search(r"norm\w*\.weight", name) else 0.2 * values)
        else:
            inputs = parameter.shape[0] if name.endswith("up_sample.weight") else parameter[0].numel()
            parameter.copy_(values / math.sqrt(inputs))
    return network.eval()


def pair(config: dict[str, Any]) -> tuple[UNet3, nn.Module]:
    from diffusers import Kandinsky3UNet

    oracle, network = randomise(Kandinsky3UNet.from_config(config)), UNet3(UNet3Config.from_dict(config))
    network.load_state_dict(oracle.state_dict())
    return network, oracle


def inputs_of(network: UNet3, lengths: list[int], height: int, width: int) -> dict[str, Tensor]:
    """A text of each length, padded to the longest; its padding is zero, as the text encoder's pipeline leaves it."""
    mask = (torch.arange(max(lengths) + 1) < torch.tensor(lengths)[:, None]).float()
    return {
        "sample": torch.randn(len(lengths), 4, height, width),
        "text_states": torch.randn(*mask.shape, network.config.text_dim) * mask[..., None],
        "text_mask": mask,
    }


def reference(oracle: nn.Module, timestep: int, inputs: dict[str, Tensor]) -> Tensor:
    result: Tensor = oracle(inputs["sample"], torch.tensor(timestep), inputs["text_states"], inputs["text_mask"]).sample
    return result


def context(network: UNet3, timesteps: list[int], inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return network.context(inputs["text_states"], inputs["text_mask"], torch.tensor(timesteps, dtype=torch.float32))


def distance(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    return float((found - wanted).norm() / wanted.norm())


def test_tensors_of_the_published_size_are_those_of_diffusers() -> None:
    from diffusers import Kandinsky3UNet

    with torch.device("meta"):
        wanted = Kandinsky3UNet.from_config(PUBLISHED).state_dict()
        found = UNet3(UNet3Config.from_dict(PUBLISHED)).state_dict()
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in wanted.items()}
    # those of the published checkpoint
    assert (len(found), sum(tensor.numel() for tensor in found.values())) == (1071, 3_055_348_228)


# 0: the unconditional text, which the pipeline makes of zeros with a mask of zeros
LENGTHS = [[7], [0, 9, 3]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=["one", "unconditional, full, short"])
@pytest.mark.parametrize("name", CONFIGS)
def test_unet_is_that_of_diffusers(name: str, lengths: list[int]) -> None:
    network, oracle = pair(config_of(name))
    inputs = inputs_of(network, lengths, 8, 24)
    timesteps = [999, 0, 421]
    embedding, text_kv, bias = context(network, timesteps, inputs)
    for row, timestep in zip(embedding, timesteps, strict=True):
        wanted = reference(oracle, timestep, inputs)
        assert distance(network.step(inputs["sample"], row, text_kv, bias), wanted) < SAME
        whole = network(timestep=torch.tensor([float(timestep)]), **inputs)
        assert distance(whole, wanted) < SAME


def test_samples_at_different_timesteps_share_a_batch() -> None:
    network, oracle = pair(config_of("2 levels"))
    inputs, timesteps = inputs_of(network, [5, 0, 9], 8, 4), [7, 980, 421]
    embedding, text_kv, bias = context(network, timesteps, inputs)
    mixed = network.step(inputs["sample"], torch.stack([embedding[i, i] for i in range(3)]), text_kv, bias)
    for i, timestep in enumerate(timesteps):
        alone = {key: value[i : i + 1] for key, value in inputs.items()}
        assert distance(mixed[i : i + 1], reference(oracle, timestep, alone)) < SAME


def test_scores_of_a_text_without_tokens_are_left_alone() -> None:
    """diffusers adds -10000 to each, where fp32 has three digits behind the point; a softmax does not see it."""
    network, _ = pair(config_of("2 levels"))
    bias = context(network, [1], inputs_of(network, [0, 2], 2, 2))[2]
    assert bias.squeeze().tolist() == [[0, 0, 0], [0, 0, -10000]]


def test_transposed_convolution_is_that_of_torch() -> None:
    layer, x = randomise(Upsample(6)), torch.randn(2, 6, 3, 5)
    wanted = nn.functional.conv_transpose2d(x, layer.get_parameter("weight"), layer.get_parameter("bias"), stride=2)
    assert distance(layer(x), wanted) < SAME


# Every parameter has its place: in one of the two halves, and in what comes out


def test_a_parameter_is_used_by_one_of_the_two_halves_and_reaches_the_output() -> None:
    network = pair(config_of("published"))[0]
    inputs = inputs_of(network, [5, 9], 16, 16)  # of a single cell at the deepest level, attention would be silent
    names, parameters = zip(*network.named_parameters(), strict=True)
    with torch.enable_grad():
        outputs = context(network, [3], inputs)
        embedding, text_kv, bias = (tensor.detach() for tensor in outputs)
        prediction = network.step(inputs["sample"], embedding[0], text_kv, bias)
        probes = [sum((x * torch.randn_like(x)).sum() / x.norm() for x in outputs[:2]),
                  (prediction * torch.randn_like(prediction)).sum() / prediction.norm()]  # fmt: skip
        halves = [torch.autograd.grad(probe, parameters, allow_unused=True) for probe in probes]
    for name, parameter, *gradients in zip(names, parameters, *halves, strict=True):
        assert sum(gradient is not None for gradient in gradients) == 1, name
        assert (gradients[0] is not None) == any(part in f".{name}" for part in network.KEEP_FP32), name
        (gradient,) = (each for each in gradients if each is not None)
        # Measured: 7e-2 and more.
        assert gradient.norm() * parameter.norm() > 1e-3, name


def test_context_has_a_tenth_of_the_published_parameters() -> None:
    with torch.device("meta"):
        network = UNet3(UNet3Config.from_dict(PUBLISHED))
    early = {
        name: parameter.numel()
        for name, parameter in network.named_parameters()
        if any(part in f".{name}" for part in network.KEEP_FP32)
    }
    # Embedding 4, projection 3, pooling 4, and the keys' and values' weights of 18 layers that attend to the text
    assert (len(early), sum(early.values())) == (4 + 3 + 4 + 2 * 18, 323_791_872)


# Reduced precision


@pytest.mark.parametrize("dtype", NEAR)
def test_reduced_precision_stays_near_fp32(dtype: torch.dtype) -> None:
    network = pair(config_of("published"))[0]
    inputs = inputs_of(network, [0, 9], 8, 8)
    wanted, exact = network(timestep=torch.tensor([30.0]), **inputs), context(network, [30], inputs)
    network.set_precision(dtype)
    assert 0 < distance(network(timestep=torch.tensor([30.0]), **inputs), wanted) < NEAR[dtype]
    assert all(torch.equal(a, b) for a, b in zip(context(network, [30], inputs), exact, strict=True))
    kept = r"conv_norm_out|time_embedding|encoder_hid_proj|add_time_condition|attentions\.[1-3]\.attention\.to_[kv]"
    for key, parameter in network.named_parameters():
        assert parameter.dtype == (torch.float32 if re.search(kept, key) else dtype), key


# Graphs


def exported(folder: Path, precision: Any) -> tuple[SourceNetwork, Exported]:
    """Graphs of the small network, by the exporter's own functions, in `folder`."""
    config = config_of("2 levels")
    checkpoint = folder / "unet"
    checkpoint.mkdir()
    (folder / "weights").mkdir()
    weights = {name: tensor.contiguous() for name, tensor in pair(config)[1].state_dict().items()}
    safetensors.torch.save_file(weights, checkpoint / "diffusion_pytorch_model.safetensors")
    submodel = SubModel("unet", checkpoint, "diffusers", CLASS, config)
    source, writer = (
        SourceNetwork(Job("unet", submodel, None, {"context": "context", "step": "step"})),
        Writer(precision),
    )
    try:
        writing = writer.start(source, folder / "weights" / "unet.safetensors")
        return source, export_network(source, folder, precision, False, lambda _: None, writing)
    finally:
        writer.close()


def check_operators(graph: str, model: ir.Model, network: UNet3) -> None:
    """Attention and norms are single operators, and nothing of the size of a large weight lies inside the graph."""
    kinds = Counter(node.op_type for node in model.graph)
    conditioned = sum(isinstance(module, ConditionalNorm) for module in network.modules())
    attends = sum(isinstance(module, AttentionBlock) for module in network.modules())
    wanted = {
        "context": {"Attention": 1, "LayerNormalization": 1},
        "step": {"Attention": attends, "GroupNormalization": conditioned + 1},
    }
    assert {kind: kinds[kind] for kind in wanted[graph]} == wanted[graph]
    assert not kinds.keys() & {"Softmax", "InstanceNormalization", "ConvTranspose", "ConstantOfShape", "Identity"}
    inside = [value.const_value for value in model.graph.initializers.values()]
    inside = [tensor for tensor in inside if not isinstance(tensor, ir.ExternalTensor)]
    assert max(tensor.nbytes for tensor in inside if tensor is not None) <= MAX_INLINE


# Batch, tokens, timesteps, height and width: those of the exporter's check, and the smallest with the longest text
SIZES: list[dict[str, int]] = [{}, {"batch": 1, "tokens": 128, "timesteps": 1, "height": 2, "width": 10}]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_graphs_are_whole_and_compute_what_the_module_does(
    precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = exported(tmp_path, precision)
    for key, component in made.components.items():
        path, graph, module = tmp_path / component.graph.file, source.graphs[key], source.sessions()[key]
        assert unsupported(path) == []
        check_operators(key, ir.load(path), source.network)
        if precision == "bf16":  # ONNX Runtime's CPU provider has none
            widen(path, tmp_path / f"wide-{path.name}")
            path, component = tmp_path / f"wide-{path.name}", replace(component, precision="fp32")
        session = OrtSession(key, path, component, "cpu", threads=1)
        # What `context` computes is fp32 at any precision.
        tolerance = SAME if key == "context" or precision == "fp32" else TOLERANCES[precision]
        for lengths in SIZES:
            with monkeypatch.context() as patch:
                patch.setattr(check, "AXIS_LENGTHS", {**check.AXIS_LENGTHS, **lengths})
                inputs = check.random_inputs(graph.inputs, graph.multiples)
            assert check.compare(module, session, inputs, tolerance).relative < tolerance
        session.close()


# Configs


SIZES_THAT_ARE_NONE: list[Any] = [0, -1, 2.5, "4", True, None, [64]]
BAD: dict[str, list[Any]] = {
    **dict.fromkeys(["cross_attention_dim", "encoder_hid_dim"], SIZES_THAT_ARE_NONE),
    "in_channels": [*SIZES_THAT_ARE_NONE, 9],
    "groups": [*SIZES_THAT_ARE_NONE, 7, 384],
    "layers_per_block": [*SIZES_THAT_ARE_NONE, 1, [3, 3, 3, 3]],  # diffusers fails with 1
    "attention_head_dim": [*SIZES_THAT_ARE_NONE, 63],
    "time_embedding_dim": [*SIZES_THAT_ARE_NONE, 100],
    "block_out_channels": [384, None, [], [384], [384, 768, 0], [384, 768.0], [384, 384, 384, 384, 384], [384, 100],
                           [64, 128, 192]],  # the last two levels of three attend on the way up
    "act_fn": ["gelu"],
    "add_cross_attention": [[True, True, True, True]],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_configs_that_cannot_be_honoured_are_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=re.escape(field)):
        UNet3Config.from_dict({**PUBLISHED, field: value})


def test_fields_that_a_config_lacks_have_the_defaults_of_diffusers() -> None:
    assert UNet3Config.from_dict({}) == UNet3Config.from_dict(PUBLISHED)
    assert UNet3Config.from_dict({"sample_size": 96, "_name_or_path": "somewhere"}) == UNet3Config.from_dict({})


def test_what_is_read() -> None:
    config = UNet3Config.from_dict(PUBLISHED)
    assert (config.channels, config.layers, config.head_dim) == ((384, 768, 1536, 3072), 3, 64)
    assert (config.in_channels, config.out_channels, config.text_dim, config.embedding_dim) == (4, 4, 4096, 1536)
    assert (config.size_multiple, UNet3Config.from_dict(config_of("2 levels")).size_multiple) == (8, 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_are_as_wide_as_what_the_network_gives(name: str) -> None:
    kind = NETWORKS[CLASS]
    config = kind.config(config_of(name))
    with torch.device("meta"):
        network = kind.build(config)
        outputs = context(network, [1, 2, 3], inputs_of(network, [4, 5], 8, 8))  # type: ignore[arg-type]
    axes = {"batch": 2, "timesteps": 3, "tokens": 6}
    for spec, output in zip(kind.graphs(config)["context"].outputs, outputs, strict=True):
        assert tuple(output.shape) == tuple(axes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
