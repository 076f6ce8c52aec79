"""Configs that a network cannot honour are refused by the name of the field."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from kandrt import scripts
from kandrt.engines.errors import CheckpointError
from kandrt.export.modules.clip import CLIPConfig
from kandrt.export.modules.movq import MoVQConfig
from kandrt.export.modules.prior import PriorConfig
from kandrt.export.modules.unet_config import UNetConfig

CONFIGS = Path(scripts.__file__).parent / "checkpoint-configs"
KINDS: dict[str, tuple[Any, str]] = {
    "UNet": (UNetConfig, "kandinsky-2-2-decoder/unet"),
    "ControlNet": (UNetConfig, "kandinsky-2-2-controlnet-depth/unet"),
    "inpainting": (UNetConfig, "kandinsky-2-2-decoder-inpaint/unet"),
    "prior": (PriorConfig, "kandinsky-2-2-prior/prior"),
    "MoVQ": (MoVQConfig, "kandinsky-2-2-decoder/movq"),
    "text encoder": (CLIPConfig, "kandinsky-2-2-prior/text_encoder"),
    "image encoder": (CLIPConfig, "kandinsky-2-2-prior/image_encoder"),
}
NETWORK = {"UNet": "UNet2DConditionModel", "prior": "PriorTransformer", "MoVQ": "VQModel"}
NETWORK |= dict.fromkeys(["ControlNet", "inpainting"], NETWORK["UNet"])


def published(kind: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / KINDS[kind][1] / "config.json").read_text())
    return config


def read(kind: str, config: dict[str, Any]) -> Any:
    before = copy.deepcopy(config)
    try:
        return KINDS[kind][0].from_dict(config)
    finally:
        assert config == before  # left as it was


@pytest.mark.parametrize("kind", KINDS)
def test_published_configs_are_read(kind: str) -> None:
    read(kind, published(kind))


def test_what_is_read() -> None:
    unet, control, inpaint = (read(kind, published(kind)) for kind in ("UNet", "ControlNet", "inpainting"))
    assert (unet.channels, unet.layers, unet.head_dims) == ((384, 768, 1152, 1536), (3,) * 4, (64,) * 4)
    assert [c.concat_channels for c in (unet, control, inpaint)] == [0, 4, 5]
    assert [c.hint for c in (unet, control, inpaint)] == [False, True, False]
    assert (unet.embedding_dim, unet.size_multiple, read("MoVQ", published("MoVQ")).scale) == (1536, 8, 8)
    prior = read("prior", published("prior"))
    assert (prior.width, prior.prefix_tokens, prior.embedding_dim) == (2048, 78, 1280)


SIZES: list[Any] = [0, -1, 2.5, "4", True, None]
LISTS: list[Any] = [32, "32", [], [32, 0, 64, 64], [32, 64.0, 64, 64], [True] * 4, None]
DEAD_LEVEL = ["ResnetDownsampleBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"]
BAD: dict[str, dict[str, list[Any]]] = {
    "UNet": {
        **dict.fromkeys(["in_channels", "out_channels", "cross_attention_dim", "encoder_hid_dim"], SIZES),
        "norm_num_groups": [*SIZES, 7],
        "block_out_channels": [*LISTS, [384, 768, 1152], [384, 768, 1152, 1540]],
        "layers_per_block": [*SIZES, [3, 3, 3], [3, 3, 3, 0], []],
        "attention_head_dim": [*SIZES, [64] * 5, 63, [64, 64, 64, 100], [100, 64, 64, 64]],
        "norm_eps": [0, -1e-5, "1e-5", None, [1e-5]],
        "down_block_types": [DEAD_LEVEL, DEAD_LEVEL[:1] * 3, DEAD_LEVEL[0], 4, None, [["ResnetDownsampleBlock2D"]] * 4],
        "up_block_types": [["ResnetUpsampleBlock2D"] * 3, ["UpBlock2D"] * 4, DEAD_LEVEL[:1] * 4],
        "mid_block_type": ["UNetMidBlock2DCrossAttn", None],
        "addition_embed_type": ["text", "text_image", None, ["image"]],
        "encoder_hid_dim_type": ["text_proj", None],
        "resnet_time_scale_shift": ["default", "ada_group"],
        "act_fn": ["gelu", "mish", None],
        "flip_sin_to_cos": [False],
        "freq_shift": [1],
        "mid_block_scale_factor": [2],
        "resnet_out_scale_factor": [1.4142],
        "time_embedding_type": ["fourier"],
        "conv_in_kernel": [1],
        "conv_out_kernel": [5],
        "center_input_sample": [True],
        "class_embed_type": ["timestep"],
        "class_embeddings_concat": [True],
        "cross_attention_norm": ["layer_norm"],
        "dual_cross_attention": [True],
        "mid_block_only_cross_attention": [True],
        "only_cross_attention": [True, [True, False, False, False]],
        "resnet_skip_time_act": [True],
        "time_cond_proj_dim": [256],
        "time_embedding_act_fn": ["silu"],
        "time_embedding_dim": [512],
        "timestep_post_act": ["silu"],
        "upcast_attention": [True],
        "attention_type": ["gated"],
        "a_field_of_the_future": [1, "on"],
    },
    "ControlNet": {"in_channels": [4, 9], "addition_embed_type": ["hint"]},
    "prior": {
        **dict.fromkeys(["num_attention_heads", "attention_head_dim", "num_layers", "num_embeddings"], SIZES),
        "embedding_dim": [*SIZES],
        "embedding_proj_dim": [768, "1280"],
        "clip_embed_dim": [768],
        "time_embed_dim": [512],
        "additional_embeddings": [3, None],
        "time_embed_act_fn": ["gelu"],
        "norm_in_type": ["layer"],
        "embedding_proj_norm_type": ["layer"],
        "encoder_hid_proj_type": [None, "conv"],
        "added_emb_type": [None],
        "a_field_of_the_future": [1, "on"],
    },
    "MoVQ": {
        **dict.fromkeys(["in_channels", "out_channels", "layers_per_block", "num_vq_embeddings"], SIZES),
        "latent_channels": [*SIZES, 5],  # of which vq_embed_dim is another
        "vq_embed_dim": [3, "4"],
        "norm_num_groups": [*SIZES, 48],
        "block_out_channels": [*LISTS, [128, 256, 256], [128, 256, 256, 520], [48, 64, 64, 64]],
        "down_block_types": [["DownEncoderBlock2D"] * 3, ["DownBlock2D"] * 4, None],
        "up_block_types": [["UpDecoderBlock2D"] * 5, ["UpBlock2D"] * 4, "UpDecoderBlock2D"],
        "norm_type": ["group", None],
        "act_fn": ["gelu"],
        "mid_block_add_attention": [False],
        "lookup_from_codebook": [True],
        "force_upcast": [True],
        "a_field_of_the_future": [1, "on"],
    },
    "text encoder": {
        **dict.fromkeys(["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"], SIZES),
        **dict.fromkeys(["projection_dim", "max_position_embeddings"], SIZES),
        "num_attention_heads": [*SIZES, 19],
        "hidden_act": ["relu", None, ["gelu"]],
        "model_type": ["clip", "clip_vision", "t5", None, ["clip_text_model"]],
    },
    "image encoder": {
        **dict.fromkeys(["hidden_size", "image_size", "patch_size", "projection_dim"], SIZES),
        "model_type": ["siglip_vision_model"],
    },
}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(kind, field, value) for kind, fields in BAD.items() for field, values in fields.items() for value in values],
)
def test_values_that_cannot_be_honoured_are_refused(kind: str, field: str, value: Any) -> None:
    network = NETWORK.get(kind, "CLIP encoder")
    with pytest.raises(CheckpointError, match=rf"^{network}\b.*\b{field}\b"):
        read(kind, {**published(kind), field: value})


REQUIRED: dict[str, set[str]] = {
    "UNet": {
        *("in_channels", "block_out_channels", "cross_attention_dim", "encoder_hid_dim", "addition_embed_type"),
        *("encoder_hid_dim_type", "resnet_time_scale_shift", "mid_block_type", "down_block_types", "up_block_types"),
    },
    "prior": set(),
    "MoVQ": {"block_out_channels", "down_block_types", "up_block_types", "norm_type", "latent_channels"},
    "text encoder": {"model_type", "hidden_size", "projection_dim", "max_position_embeddings"},
    "image encoder": {"model_type", "hidden_size", "projection_dim", "image_size"},
}


@pytest.mark.parametrize(("kind", "field"), [(kind, f) for kind, fields in REQUIRED.items() for f in sorted(fields)])
def test_fields_without_a_default_must_be_there(kind: str, field: str) -> None:
    config = published(kind)
    del config[field]
    with pytest.raises(CheckpointError, match=rf"\b{field}\b"):
        read(kind, config)


def defaults(oracle: str, config: dict[str, Any]) -> dict[str, Any]:
    """The fields that diffusers fills in where a config does not name them."""
    import diffusers
    import torch

    with torch.device("meta"):
        return {
            name: value
            for name, value in getattr(diffusers, oracle).from_config(config).config.items()
            if name[0] != "_"
        }


@pytest.mark.parametrize("kind", ["UNet", "ControlNet", "inpainting", "prior", "MoVQ"])
def test_a_config_with_every_default_written_out_is_the_same(kind: str) -> None:
    config = published(kind)
    written = defaults(NETWORK[kind], config)
    assert read(kind, {**written, "_class_name": "x"}) == read(kind, config)


@pytest.mark.parametrize("kind", ["UNet", "prior", "MoVQ"])
def test_absent_fields_mean_what_they_mean_to_diffusers(kind: str) -> None:
    """Every field that may be left out is, one at a time."""
    config = published(kind)
    for field in config:
        shorter = {name: value for name, value in config.items() if name != field}
        if field in REQUIRED[kind]:
            continue
        assert read(kind, shorter) == read(kind, defaults(NETWORK[kind], shorter)), field


def test_all_problems_of_a_kind_are_listed_at_once() -> None:
    config = {**published("UNet"), "act_fn": "gelu", "freq_shift": 1, "new_field": "on"}
    del config["mid_block_type"]
    with pytest.raises(CheckpointError) as error:
        read("UNet", config)
    for field in ("act_fn", "freq_shift", "new_field", "mid_block_type"):
        assert re.search(rf"\b{field}\b", str(error.value))


def test_bookkeeping_and_empty_fields_are_accepted() -> None:
    extra = {"_diffusers_version": "9", "sample_size": 96, "dropout": 0.1, "new_field": None, "other_field": False}
    assert read("UNet", {**published("UNet"), **extra}) == read("UNet", published("UNet"))
