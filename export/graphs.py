"""The graphs of each network: which method, which inputs and outputs. A network is a row of `NETWORKS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engines.spec import TensorSpec
from .modules.clip import CLIPConfig, ImageEncoder, TextEncoder
from .modules.conditioning import LATENT_CHANNELS, TEXT_TOKENS
from .modules.layers import Network
from .modules.movq import MoVQ, MoVQConfig
from .modules.multilingual_clip import MultilingualCLIP, MultilingualCLIPConfig
from .modules.prior import STEP_TOKENS, Prior, PriorConfig
from .modules.t5 import TEXT_TOKENS as T5_TOKENS
from .modules.t5 import T5Config, T5Encoder
from .modules.unet import UNet
from .modules.unet3 import UNet3, UNet3Config
from .modules.unet_config import UNetConfig

# Pixels a latent cell of the ControlNet hint: three convolutions of stride 2.
HINT_SCALE = 8


@dataclass(frozen=True)
class Graph:
    """A method of a network as a graph, whose inputs have the names of the method's parameters.

    `multiples` are the axes that must be divisible by a number.
    """

    method: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    multiples: Mapping[str, int] = field(default_factory=dict)

    def call(self, network: Any, inputs: Sequence[Any]) -> Any:
        """Call the method of `network` with its inputs in the order of the graph."""
        named = {spec.name: value for spec, value in zip(self.inputs, inputs, strict=True)}
        return getattr(network, self.method)(**named)


@dataclass(frozen=True)
class NetworkKind:
    """How a checkpoint's submodel becomes graphs.

    prefix is what stands before a checkpoint's tensor names in the module, unused the tensors that checkpoints store
    and nothing reads. tied maps the name of a tensor to a second one under which checkpoints store the same, beside
    the first or in its place.
    """

    config: Callable[[Mapping[str, Any]], Any]
    build: Callable[[Any], Network]
    graphs: Callable[[Any], Mapping[str, Graph]]
    prefix: str = ""
    unused: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)


def f32(name: str, *shape: int | str) -> TensorSpec:
    """A float32 tensor: what goes in and out of a graph, whatever it computes in."""
    return TensorSpec(name, "float32", shape)


def unet_graphs(config: UNetConfig) -> dict[str, Graph]:
    """Context and step of a UNet, and the two that stand in for the step where features are used again."""
    attention = [
        channels * (layers * down + (layers + 1) * up)
        for channels, layers, down, up in zip(
            config.channels, config.layers, config.down_attention, reversed(config.up_attention), strict=True
        )
    ]
    image_embeds = f32("image_embeds", "batch", config.image_embed_dim)
    added_kv = f32("added_kv", "batch", config.tokens, 2 * (sum(attention) + config.channels[-1]))
    extra = config.concat_channels
    concat = [f32("concat_latents", "batch", extra, "height", "width")] if extra else []
    hint = [f32("hint", "batch", 3, "image_height", "image_width")] if config.hint else []
    text = [] if config.text_dim is None else [
        f32("text_embeds", "batch", config.image_embed_dim),
        f32("text_states", "batch", TEXT_TOKENS, config.text_dim),
    ]  # fmt: skip
    size = {"height": config.size_multiple, "width": config.size_multiple}
    sample = f32("sample", "batch", LATENT_CHANNELS, "height", "width")
    embedding = f32("embedding", "batch", config.embedding_dim)
    prediction = f32("prediction", "batch", config.out_channels, "height", "width")
    features = f32("features", "batch", config.feature_channels, "height", "width")
    outer = [added_kv] if config.outer_attention else []
    return {
        "context": Graph(
            "context",
            (image_embeds, f32("timesteps", "timesteps"), *text, *hint),
            (f32("embedding", "timesteps", "batch", config.embedding_dim), added_kv, *(concat if config.hint else ())),
            {"image_height": HINT_SCALE, "image_width": HINT_SCALE} if config.hint else {},
        ),
        "step": Graph("step", (sample, embedding, added_kv, *concat), (prediction,), size),
        "refresh": Graph("refresh", (sample, embedding, added_kv, *concat), (prediction, features), size),
        # Of any size: the level that it runs neither halves nor doubles.
        "shallow": Graph("shallow", (sample, embedding, features, *outer, *concat), (prediction,)),
    }


def unet3_graphs(config: UNet3Config) -> dict[str, Graph]:
    """Context and step of a UNet of Kandinsky 3."""
    text_kv = f32("text_kv", "batch", "tokens", config.text_kv_dim)
    bias = f32("attention_bias", "batch", 1, 1, "tokens")
    size = {"height": config.size_multiple, "width": config.size_multiple}
    return {
        "context": Graph(
            "context",
            (f32("text_states", "batch", "tokens", config.text_dim), f32("text_mask", "batch", "tokens"),
             f32("timesteps", "timesteps")),
            (f32("embedding", "timesteps", "batch", config.embedding_dim), text_kv, bias),
        ),
        "step": Graph(
            "step",
            (f32("sample", "batch", config.in_channels, "height", "width"),
             f32("embedding", "batch", config.embedding_dim), text_kv, bias),
            (f32("prediction", "batch", config.out_channels, "height", "width"),),
            size,
        ),
    }  # fmt: skip


def prior_graphs(config: PriorConfig) -> dict[str, Graph]:
    """Context and step of a prior."""
    dim, tokens = config.embedding_dim, config.prefix_tokens
    prefix_kv = f32("prefix_kv", "batch", 2 * config.layers, tokens, config.width)
    bias = f32("attention_bias", "batch", 1, STEP_TOKENS, tokens + STEP_TOKENS)
    return {
        "context": Graph(
            "context",
            (f32("text_embeds", "batch", dim), f32("text_states", "batch", config.text_tokens, dim),
             f32("text_mask", "batch", config.text_tokens), f32("timesteps", "timesteps")),
            (f32("embedding", "timesteps", config.width), prefix_kv, bias),
        ),
        "step": Graph(
            "step",
            (f32("sample", "batch", dim), f32("embedding", "batch", config.width), prefix_kv, bias),
            (f32("prediction", "batch", dim),),
        ),
    }  # fmt: skip


def movq_graphs(config: MoVQConfig) -> dict[str, Graph]:
    """Encoder and decoder of a MoVQ."""
    latents = f32("latents", "batch", config.latent_channels, "height", "width")
    shape = ("image_height", "image_width")
    multiples: dict[str, int] = dict.fromkeys(shape, config.scale)
    return {
        "encoder": Graph("encode", (f32("pixels", "batch", config.in_channels, *shape),), (latents,), multiples),
        "decoder": Graph("decode", (latents,), (f32("pixels", "batch", config.out_channels, *shape),)),
    }


def text_graphs(config: CLIPConfig) -> dict[str, Graph]:
    """A text encoder."""
    values: Mapping[str, Any] = config.values
    tokens, dim, width = values["max_position_embeddings"], values["projection_dim"], values["hidden_size"]
    return {
        "": Graph(
            "encode",
            (TensorSpec("input_ids", "int64", ("batch", tokens)),),
            (f32("text_embeds", "batch", dim), f32("text_states", "batch", tokens, width)),
        )
    }


def image_graphs(config: CLIPConfig) -> dict[str, Graph]:
    """An image encoder."""
    size, dim = config.values["image_size"], config.values["projection_dim"]
    return {"": Graph("encode", (f32("pixel_values", "batch", 3, size, size),), (f32("image_embeds", "batch", dim),))}


def masked_text_graph(tokens: int, *outputs: TensorSpec) -> dict[str, Graph]:
    """A text encoder that is told which tokens are padding."""
    inputs = (TensorSpec("input_ids", "int64", ("batch", tokens)), f32("text_mask", "batch", tokens))
    return {"": Graph("encode", inputs, outputs)}


def multilingual_clip_graphs(config: MultilingualCLIPConfig) -> dict[str, Graph]:
    """Kandinsky 2.1's text encoder."""
    states = f32("text_states", "batch", TEXT_TOKENS, config.hidden_size)
    return masked_text_graph(TEXT_TOKENS, f32("text_embeds", "batch", config.embedding_dim), states)


def t5_graphs(config: T5Config) -> dict[str, Graph]:
    """Kandinsky 3's text encoder."""
    return masked_text_graph(T5_TOKENS, f32("text_states", "batch", T5_TOKENS, config.width))


NETWORKS: Mapping[str, NetworkKind] = {
    "UNet2DConditionModel": NetworkKind(UNetConfig.from_dict, UNet, unet_graphs),
    "Kandinsky3UNet": NetworkKind(UNet3Config.from_dict, UNet3, unet3_graphs),
    "PriorTransformer": NetworkKind(PriorConfig.from_dict, Prior, prior_graphs),
    "VQModel": NetworkKind(MoVQConfig.from_dict, MoVQ, movq_graphs, unused=("quantize.embedding.weight",)),
    "CLIPTextModelWithProjection": NetworkKind(CLIPConfig.from_dict, TextEncoder, text_graphs, prefix="network."),
    "CLIPVisionModelWithProjection": NetworkKind(CLIPConfig.from_dict, ImageEncoder, image_graphs, prefix="network."),
    "MultilingualCLIP": NetworkKind(
        MultilingualCLIPConfig.from_dict, MultilingualCLIP, multilingual_clip_graphs,
        unused=("transformer.pooler.dense.bias", "transformer.pooler.dense.weight"),
    ),
    "T5EncoderModel": NetworkKind(
        T5Config.from_dict, T5Encoder, t5_graphs, tied={"shared.weight": "encoder.embed_tokens.weight"}
    ),
}  # fmt: skip
