"""The networks against diffusers and transformers, from random weights in which no branch is silent."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kandrt import scripts
from kandrt.export.modules.clip import CLIPConfig, ImageEncoder, TextEncoder
from kandrt.export.modules.conditioning import TEXT_TOKENS
from kandrt.export.modules.layers import Network
from kandrt.export.modules.movq import MoVQ, MoVQConfig
from kandrt.export.modules.prior import Prior, PriorConfig
from kandrt.export.modules.unet import UNet
from kandrt.export.modules.unet_config import UNetConfig

# Relative L2 distance in fp32. Both sides do some hundred operations whose relative error is about 6e-8 (measured:
# 2e-6 and less), and a branch that is missing or misplaced costs 1e-2 and more.
SAME = 1e-5
# Relative L2 distance of the reduced precisions to fp32: their rounding, 2**-11 and 2**-8, over the same operations.
NEAR = {torch.float16: 2e-2, torch.bfloat16: 5e-2}

CONFIGS = Path(scripts.__file__).parent / "checkpoint-configs"
UNET_SMALL: dict[str, Any] = {
    "block_out_channels": [32, 48, 64, 96],
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "cross_attention_dim": 24,
    "encoder_hid_dim": 40,
    "norm_num_groups": 8,  # several channels a group: a bias before a norm of single channels would be silent
}
TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": [32, 64],
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
}
TEXT_AND_IMAGE = {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj"}  # Kandinsky 2.1
UNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "text-to-image": ("decoder", {}),
    "ControlNet": ("controlnet-depth", {}),
    "inpainting": ("decoder-inpaint", {}),
    "text and image": ("decoder", TEXT_AND_IMAGE),
    "inpainting by text and image": ("decoder-inpaint", TEXT_AND_IMAGE),
    "layers, head sizes and norms": (
        "decoder",
        {
            "layers_per_block": [1, 3, 2, 1],
            "attention_head_dim": [48, 8, 16, 32],
            "norm_num_groups": 16,
            "norm_eps": 1e-2,
        },
    ),
    "2 levels, 4 output channels": ("decoder", {**TWO_LEVELS, "out_channels": 4, "layers_per_block": 2}),
    "3 levels, attention elsewhere": (
        "decoder",
        {
            "block_out_channels": [48, 32, 64],
            "down_block_types": [
                "SimpleCrossAttnDownBlock2D",
                "ResnetDownsampleBlock2D",
                "SimpleCrossAttnDownBlock2D",
            ],
            "up_block_types": ["ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"],
        },
    ),
}

MOVQS: dict[str, dict[str, Any]] = {
    "published": {"layers_per_block": 1},
    "2 layers, other groups": {"layers_per_block": 2, "norm_num_groups": 8, "latent_channels": 6, "vq_embed_dim": 6},
    "2 levels": {
        "block_out_channels": [32, 96],
        "down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
    },
    "3 levels, attention in all": {
        "block_out_channels": [64, 32, 64],
        "layers_per_block": 1,
        "down_block_types": ["AttnDownEncoderBlock2D"] * 3,
        "up_block_types": ["AttnUpDecoderBlock2D"] * 3,
    },
}
# The 32 groups of spatial norms hold several channels each: a bias before a norm of single channels is silent.
MOVQS["wide"] = {"block_out_channels": [64, 64, 96, 64], "layers_per_block": 1, "norm_num_groups": 16}
MOVQ_SMALL = {"block_out_channels": [32, 32, 64, 64], "num_vq_embeddings": 8}

PRIORS: dict[str, dict[str, Any]] = {
    "published": {},
    "other sizes": {"num_attention_heads": 3, "attention_head_dim": 8, "num_embeddings": 9, "num_layers": 4},
    "defaults written out": {"embedding_proj_dim": 40, "clip_embed_dim": 40, "time_embed_dim": 32},
}
PRIOR_SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 40}

CLIP_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 24,
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def published(checkpoint: str, network: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"kandinsky-2-2-{checkpoint}" / network / "config.json").read_text())
    return {**config, **changes}


def randomise(network: nn.Module) -> nn.Module:
    """Weights that keep a signal's variance, scales about 1, and nothing at zero."""
    for name, parameter in network.named_parameters():
        values = torch.randn_like(parameter)
        if parameter.ndim == 1:
            scale = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * values if scale else 0.2 * values)
        else:
            table = re.search(r"(positional|position|token|prd)_embedding", name)
            parameter.copy_(values / (2 if table else math.sqrt(parameter[0].numel())))
    return network.eval()


def unet_pair(name: str) -> tuple[UNet, nn.Module]:
    from diffusers import UNet2DConditionModel

    checkpoint, changes = UNETS[name]
    config = published(checkpoint, "unet", **{**UNET_SMALL, **changes})
    oracle, network = randomise(UNet2DConditionModel.from_config(config)), UNet(UNetConfig.from_dict(config))
    network.load_state_dict(oracle.state_dict())
    return network, oracle


def prior_pair(name: str) -> tuple[Prior, nn.Module]:
    from diffusers import PriorTransformer

    config = published("prior", "prior", **{**PRIOR_SMALL, **PRIORS[name]})
    oracle, network = randomise(PriorTransformer.from_config(config)), Prior(PriorConfig.from_dict(config))
    network.load_state_dict(oracle.state_dict())
    return network, oracle


def movq_pair(name: str) -> tuple[MoVQ, Any]:
    from diffusers import VQModel

    config = published("decoder", "movq", **{**MOVQ_SMALL, **MOVQS[name]})
    oracle, network = randomise(VQModel.from_config(config)), MoVQ(MoVQConfig.from_dict(config))
    weights = oracle.state_dict()
    del weights["quantize.embedding.weight"]  # the codebook: Kandinsky does not quantise
    network.load_state_dict(weights)
    return network, oracle


def distance(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("oracle", "checkpoint", "folder", "config", "build", "unused"),
    [
        ("UNet2DConditionModel", "decoder", "unet", UNetConfig, UNet, set()),
        ("UNet2DConditionModel", "controlnet-depth", "unet", UNetConfig, UNet, set()),
        ("UNet2DConditionModel", "decoder-inpaint", "unet", UNetConfig, UNet, set()),
        ("PriorTransformer", "prior", "prior", PriorConfig, Prior, set()),
        ("VQModel", "decoder", "movq", MoVQConfig, MoVQ, {"quantize.embedding.weight"}),
    ],
)
def test_parameters_of_the_published_sizes_are_those_of_diffusers(
    oracle: str, checkpoint: str, folder: str, config: Any, build: Any, unused: set[str]
) -> None:
    import diffusers

    values = published(checkpoint, folder)
    with torch.device("meta"):
        wanted = getattr(diffusers, oracle).from_config(values).state_dict()
        found = build(config.from_dict(values)).state_dict()
    assert {name: t.shape for name, t in found.items()} == {
        name: t.shape for name, t in wanted.items() if name not in unused
    }
    assert unused <= wanted.keys()


# UNet


def unet_inputs(network: UNet, batch: int, height: int, width: int) -> dict[str, Tensor]:
    """`hint` for a ControlNet, `concat_latents` for inpainting."""
    config = network.config
    inputs = {
        "sample": torch.randn(batch, 4, height, width),
        "image_embeds": torch.randn(batch, config.image_embed_dim),
    }
    if config.text_dim is not None:
        inputs["text_embeds"] = torch.randn(batch, config.image_embed_dim)
        inputs["text_states"] = torch.randn(batch, TEXT_TOKENS, config.text_dim)
    if config.hint:
        inputs["hint"] = torch.rand(batch, 3, 8 * height, 8 * width)
    elif config.concat_channels:
        inputs["concat_latents"] = torch.randn(batch, config.concat_channels, height, width)
    return inputs


def unet_reference(oracle: nn.Module, timestep: int, inputs: dict[str, Tensor]) -> Tensor:
    sample = torch.cat([inputs["sample"], *([inputs["concat_latents"]] if "concat_latents" in inputs else [])], dim=1)
    added = {name: inputs[name] for name in ("image_embeds", "text_embeds", "hint") if name in inputs}
    states = inputs.get("text_states")
    result: Tensor = oracle(sample, torch.tensor(timestep), states, added_cond_kwargs=added).sample
    return result


def conditions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `context` takes of a UNet's inputs."""
    return {name: tensor for name, tensor in inputs.items() if name not in ("sample", "concat_latents")}


def unet_split(network: UNet, timesteps: list[int], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Context once for all timesteps, then a step for each."""
    context = network.context(timesteps=torch.tensor(timesteps, dtype=torch.float32), **conditions(inputs))
    concat = context[2] if "hint" in inputs else inputs.get("concat_latents")
    return [network.step(inputs["sample"], row, context[1], concat) for row in context[0]]


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 24), (3, 16, 8)])
def test_unet_is_that_of_diffusers(name: str, batch: int, height: int, width: int) -> None:
    network, oracle = unet_pair(name)
    inputs = unet_inputs(network, batch, height, width)
    timesteps = [999, 0, 437]
    for timestep, found in zip(timesteps, unet_split(network, timesteps, inputs), strict=True):
        wanted = unet_reference(oracle, timestep, inputs)
        assert distance(found, wanted) < SAME
        if "concat_latents" not in inputs:
            undivided = network(inputs["sample"], torch.tensor([float(timestep)]), **conditions(inputs))
            assert distance(undivided, wanted) < SAME


@pytest.mark.parametrize("name", ["text-to-image", "ControlNet", "inpainting", "text and image"])
def test_unet_samples_at_different_timesteps_share_a_batch(name: str) -> None:
    network, oracle = unet_pair(name)
    inputs, timesteps = unet_inputs(network, 3, 8, 16), [7, 980, 421]
    embedding, added_kv, *hint = network.context(timesteps=torch.tensor(timesteps).float(), **conditions(inputs))
    concat = hint[0] if hint else inputs.get("concat_latents")
    mixed = network.step(inputs["sample"], torch.stack([embedding[i, i] for i in range(3)]), added_kv, concat)
    for i, timestep in enumerate(timesteps):
        alone = {key: value[i : i + 1] for key, value in inputs.items()}
        assert distance(mixed[i : i + 1], unet_reference(oracle, timestep, alone)) < SAME


# Prior


def prior_inputs(network: Prior, batch: int, lengths: list[int]) -> dict[str, Tensor]:
    dim, tokens = network.config.embedding_dim, network.config.text_tokens
    mask = torch.zeros(batch, tokens)
    for row, length in zip(mask, lengths, strict=True):
        row[:length] = 1
    return {
        "sample": torch.randn(batch, dim),
        "text_embeds": torch.randn(batch, dim),
        "text_states": torch.randn(batch, tokens, dim),
        "text_mask": mask,
    }


def prior_reference(oracle: nn.Module, timestep: int, inputs: dict[str, Tensor]) -> Tensor:
    result: Tensor = oracle(
        inputs["sample"],
        torch.tensor(timestep),
        inputs["text_embeds"],
        inputs["text_states"],
        inputs["text_mask"].bool(),
    ).predicted_image_embedding
    return result


def prior_context(network: Prior, inputs: dict[str, Tensor], timesteps: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    text = [inputs[name] for name in ("text_embeds", "text_states", "text_mask")]
    return network.context(*text, torch.tensor(timesteps, dtype=torch.float32))


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("fills", [(1.0,), (0.1, 1.0, 0.5)], ids=["all tokens", "padding"])
def test_prior_is_that_of_diffusers(name: str, fills: tuple[float, ...]) -> None:
    network, oracle = prior_pair(name)
    lengths = [max(1, int(fill * network.config.text_tokens)) for fill in fills]
    inputs, timesteps = prior_inputs(network, len(fills), lengths), [999, 0, 480]
    embedding, prefix_kv, bias = prior_context(network, inputs, timesteps)
    for row, timestep in zip(embedding, timesteps, strict=True):
        wanted = prior_reference(oracle, timestep, inputs)
        assert distance(network.step(inputs["sample"], row.expand(len(fills), -1), prefix_kv, bias), wanted) < SAME
        text = [inputs[key] for key in ("text_embeds", "text_states", "text_mask")]
        assert distance(network(inputs["sample"], torch.tensor([float(timestep)]), *text), wanted) < SAME


def test_prior_samples_at_different_timesteps_share_a_batch() -> None:
    network, oracle = prior_pair("published")
    inputs, timesteps = prior_inputs(network, 3, [5, 77, 1]), [7, 980, 421]
    mixed = network.step(inputs["sample"], *prior_context(network, inputs, timesteps))
    for i, timestep in enumerate(timesteps):
        alone = {key: value[i : i + 1] for key, value in inputs.items()}
        assert distance(mixed[i : i + 1], prior_reference(oracle, timestep, alone)) < SAME


def test_keys_and_values_of_the_priors_text_depend_on_neither_time_nor_noise() -> None:
    """What the cached prefix rests on, observed inside the oracle; and the cache holds just those."""
    network, oracle = prior_pair("published")
    inputs = prior_inputs(network, 2, [77, 6])
    seen: list[Tensor] = []
    for block in oracle.get_submodule("transformer_blocks").children():
        for projection in ("to_k", "to_v"):
            block.get_submodule(f"attn1.{projection}").register_forward_hook(
                lambda *call: seen.append(call[-1][:, :78])
            )
    prior_reference(oracle, 3, inputs)
    early, seen = seen, []
    prior_reference(oracle, 975, {**inputs, "sample": torch.randn_like(inputs["sample"])})
    assert len(early) == 2 * network.config.layers
    assert all(torch.equal(a, b) for a, b in zip(early, seen, strict=True))
    assert distance(prior_context(network, inputs, [500])[1], torch.stack(early, dim=1)) < SAME


# MoVQ


@pytest.mark.parametrize("name", MOVQS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 3, 5), (3, 4, 2)])
def test_movq_is_that_of_diffusers(name: str, batch: int, height: int, width: int) -> None:
    network, oracle = movq_pair(name)
    scale = network.config.scale
    pixels = torch.rand(batch, 3, scale * height, scale * width) * 2 - 1
    latents = torch.randn(batch, network.config.latent_channels, height, width)
    assert distance(network.encode(pixels), oracle.encode(pixels).latents) < SAME
    assert distance(network.decode(latents), oracle.decode(latents, force_not_quantize=True).sample) < SAME


# CLIP


def clip_pair(network: str, hidden_act: str, **changes: Any) -> tuple[TextEncoder | ImageEncoder, Any]:
    import transformers

    config = published("prior", network, **CLIP_SMALL, hidden_act=hidden_act, **changes)
    build = TextEncoder if network == "text_encoder" else ImageEncoder
    found = build(CLIPConfig.from_dict(config))
    name = "CLIPText" if network == "text_encoder" else "CLIPVision"
    settings = getattr(transformers, f"{name}Config")(**config, attn_implementation="eager")
    oracle = randomise(getattr(transformers, f"{name}ModelWithProjection")(settings))
    found.load_state_dict({f"network.{key}": value for key, value in oracle.state_dict().items()})
    return found.eval(), oracle


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
def test_text_encoder_is_that_of_transformers(hidden_act: str) -> None:
    network, oracle = clip_pair("text_encoder", hidden_act, vocab_size=50)
    ids = torch.randint(0, 48, (3, 77))
    ids[:, 0] = 48
    for row, length in zip(ids, (9, 76, 1), strict=True):
        row[length] = 49  # the end token, whose state is projected, then padding
        row[length + 1 :] = 0
    wanted = oracle(input_ids=ids)
    text_embeds, text_states = network.encode(ids)
    assert distance(text_embeds, wanted.text_embeds) < SAME
    assert distance(text_states, wanted.last_hidden_state) < SAME


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
def test_image_encoder_is_that_of_transformers(hidden_act: str) -> None:
    network, oracle = clip_pair("image_encoder", hidden_act, image_size=28, patch_size=7)
    pixels = torch.randn(3, 3, 28, 28)
    assert distance(network.encode(pixels), oracle(pixel_values=pixels).image_embeds) < SAME


# Reduced precision


def run_unet(network: UNet) -> list[Tensor]:
    return unet_split(network, [999, 30], unet_inputs(network, 2, 8, 16))


def run_prior(network: Prior) -> list[Tensor]:
    inputs = prior_inputs(network, 2, [9, 77])
    return [network.step(inputs["sample"], *prior_context(network, inputs, [999, 30]))]


def run_movq(network: MoVQ) -> list[Tensor]:
    return [network.encode(torch.rand(2, 3, 24, 40) * 2 - 1), network.decode(torch.randn(2, 4, 3, 5))]


def run_text(network: TextEncoder) -> list[Tensor]:
    return list(network.encode(torch.randint(0, 50, (2, 77))))


def run_image(network: ImageEncoder) -> list[Tensor]:
    return [network.encode(torch.randn(2, 3, 28, 28))]


NETWORKS: dict[str, tuple[Any, Any]] = {
    "UNet": (lambda: unet_pair("text-to-image")[0], run_unet),
    "ControlNet": (lambda: unet_pair("ControlNet")[0], run_unet),
    "prior": (lambda: prior_pair("published")[0], run_prior),
    "MoVQ": (lambda: movq_pair("published")[0], run_movq),
    "text encoder": (lambda: clip_pair("text_encoder", "gelu", vocab_size=50)[0], run_text),
    "image encoder": (lambda: clip_pair("image_encoder", "gelu", image_size=28, patch_size=7)[0], run_image),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", NEAR)
def test_reduced_precision_stays_near_fp32(name: str, dtype: torch.dtype) -> None:
    build, run = NETWORKS[name]
    network = build()
    torch.manual_seed(1)
    wanted = run(network)
    network.set_precision(dtype)
    torch.manual_seed(1)
    for found, reference in zip(run(network), wanted, strict=True):
        assert 0 < distance(found, reference) < NEAR[dtype]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("ControlNet", r"norm|time_embedding|encoder_hid_proj|add_embedding|add_[kv]_proj"),
        ("prior", r"norm|time_embedding|clip_mean|clip_std"),
        ("MoVQ", r"(encoder\..*norm\w*|norm_layer)\.(weight|bias)$"),
    ],
)
def test_norms_and_what_a_network_names_stay_in_fp32(name: str, kept: str) -> None:
    network: Network = NETWORKS[name][0]()
    network.set_precision(torch.bfloat16)
    for key, parameter in network.named_parameters():
        assert parameter.dtype == (torch.float32 if re.search(kept, key) else torch.bfloat16), key


# No parameter is silent


def influences(network: nn.Module, outputs: list[Tensor]) -> dict[str, float]:
    """How much a random direction of the outputs moves where a parameter moves by its own length."""
    probe = torch.stack([(output * torch.randn_like(output)).sum() / output.norm() for output in outputs]).sum()
    gradients = torch.autograd.grad(probe, list(network.parameters()), allow_unused=True)
    return {
        name: 0.0 if gradient is None else float(gradient.norm() * parameter.detach().norm())
        for (name, parameter), gradient in zip(network.named_parameters(), gradients, strict=True)
    }


# Moves every score of a query by the same amount, which a softmax does not see. In the UNet it moves the scores of the
# pixels and not those of the image's tokens.
SILENT_BIAS = r".*\.to_k\.bias"
# Measured: 4e-7 and less where it should be nothing, 1e-2 and more elsewhere.
AUDIBLE = 1e-4


@pytest.mark.parametrize(
    ("pair", "run", "silent"),
    [
        (lambda: unet_pair("text-to-image"), run_unet, ""),
        (lambda: unet_pair("ControlNet"), run_unet, ""),
        (lambda: unet_pair("3 levels, attention elsewhere"), run_unet, ""),
        # The runtime applies the mean and the deviation, after the last step.
        (lambda: prior_pair("published"), run_prior, rf"clip_(mean|std)|{SILENT_BIAS}"),
        (lambda: movq_pair("wide"), run_movq, SILENT_BIAS),
    ],
    ids=["UNet", "ControlNet", "UNet with attention elsewhere", "prior", "MoVQ"],
)
def test_every_parameter_reaches_the_output(pair: Any, run: Any, silent: str) -> None:
    network = pair()[0]
    with torch.enable_grad():
        found = influences(network, run(network))
    for name, influence in found.items():
        assert (influence > AUDIBLE) != bool(re.fullmatch(silent, name)), (name, influence)
