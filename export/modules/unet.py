"""The UNet of Kandinsky 2.x: residual blocks, and attention to the image beside self-attention ("added KV").

Source: diffusers 0.42.1 `UNet2DConditionModel` with the block types of `BLOCKS`; attribute names are its state dict's.
What does not change from step to step is computed once a request (`context`), the rest once a step (`step`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engines.errors import CheckpointError
from .conditioning import (
    IMAGE_TOKENS,
    IMAGE_TOKENS_BESIDE_TEXT,
    LATENT_CHANNELS,
    TEXT_TOKENS,
    ImageEmbedding,
    ImageProjection,
    TextImageEmbedding,
    TextImageProjection,
)
from .config import check_config, check_divisible, check_lengths, check_sizes
from .layers import GroupNorm, Network, TimestepEmbedding, attention, upsampled

# Block type -> does the level have attention.
DOWN_BLOCKS = {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True}
UP_BLOCKS = {"ResnetUpsampleBlock2D": False, "SimpleCrossAttnUpBlock2D": True}

# addition_embed_type -> the encoder_hid_dim_type that goes with it
CONDITIONING = {"image": "image_proj", "image_hint": "image_proj", "text_image": "text_image_proj"}

FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "addition_embed_type_num_heads": (64,),  # of another conditioning by text, which these checkpoints do not have
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),  # of strided convolutions, which these block types do not have
    "encoder_hid_dim_type": tuple(dict.fromkeys(CONDITIONING.values())),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("scale_shift",),
    "time_embedding_type": ("positional",),
    "transformer_layers_per_block": (1,),  # of block types with transformers, which these are not
}


@dataclass(frozen=True)
class UNetConfig:
    """What of a `UNet2DConditionModel` config decides this network; lists have one entry a level.

    text_dim is the width of the text's states, None where the image alone conditions the network; the text's pooled
    embedding is as wide as the image's.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    head_dims: tuple[int, ...]
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    cross_attention_dim: int
    image_embed_dim: int
    text_dim: int | None
    hint: bool
    norm_groups: int
    norm_eps: float

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read config.json; raises CheckpointError that names each field that cannot be honoured."""
        what = "UNet2DConditionModel"
        read = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "attention_head_dim",
                "norm_eps", "down_block_types", "up_block_types", "cross_attention_dim", "encoder_hid_dim",
                "addition_embed_type", "norm_num_groups")  # fmt: skip
        required = ("in_channels", "block_out_channels", "cross_attention_dim", "encoder_hid_dim",
                    "addition_embed_type", "encoder_hid_dim_type", "resnet_time_scale_shift", "mid_block_type",
                    "down_block_types", "up_block_types")  # fmt: skip
        check_config(what, config, read, FIXED, required)
        sizes = ("in_channels", "out_channels", "cross_attention_dim", "encoder_hid_dim", "norm_num_groups",
                 "layers_per_block", "attention_head_dim")  # fmt: skip
        check_sizes(what, config, sizes, lists=("block_out_channels", "layers_per_block", "attention_head_dim"))
        channels = tuple(config["block_out_channels"])
        conditioning = config["addition_embed_type"]
        # a list: an entry that cannot be hashed is wrong, too
        if (conditioning, config["encoder_hid_dim_type"]) not in list(CONDITIONING.items()):
            raise CheckpointError(
                f"{what}: addition_embed_type: expected {' or '.join(map(repr, CONDITIONING))} with the "
                f"encoder_hid_dim_type that goes with it, found {conditioning!r} with "
                f"{config['encoder_hid_dim_type']!r}"
            )
        text = conditioning == "text_image"

        def levels(value: Any) -> tuple[int, ...]:
            return tuple(value) if isinstance(value, list | tuple) else (value,) * len(channels)

        self = cls(
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels", 4),
            channels=channels,
            layers=levels(config.get("layers_per_block", 2)),
            head_dims=levels(config.get("attention_head_dim", 8)),
            down_attention=block_types(what, "down_block_types", config["down_block_types"], DOWN_BLOCKS),
            up_attention=block_types(what, "up_block_types", config["up_block_types"], UP_BLOCKS),
            cross_attention_dim=config["cross_attention_dim"],
            # With text, encoder_hid_dim is the width of its states.
            image_embed_dim=config["cross_attention_dim"] if text else config["encoder_hid_dim"],
            text_dim=config["encoder_hid_dim"] if text else None,
            hint=conditioning == "image_hint",
            norm_groups=config.get("norm_num_groups", 32),
            norm_eps=config.get("norm_eps", 1e-5),
        )
        self.check(what)
        return self

    def check(self, what: str) -> None:
        """Raise CheckpointError where sizes contradict each other."""
        check_lengths(what, block_out_channels=self.channels, layers_per_block=self.layers,
                      attention_head_dim=self.head_dims, down_block_types=self.down_attention,
                      up_block_types=self.up_attention)  # fmt: skip
        for level, (channels, head_dim) in enumerate(zip(self.channels, self.head_dims, strict=True)):
            name = f"block_out_channels[{level}]"
            check_divisible(what, "norm_num_groups", self.norm_groups, **{name: channels})
            if self.down_attention[level] or level == len(self.channels) - 1:
                check_divisible(what, "attention_head_dim", head_dim, **{name: channels})
            if self.up_attention[-1 - level]:
                check_divisible(what, "attention_head_dim", self.head_dims[-1 - level], **{name: channels})
        if not isinstance(self.norm_eps, float | int) or self.norm_eps <= 0:
            raise CheckpointError(f"{what}: norm_eps: expected a number above 0, found {self.norm_eps!r}")
        if self.hint and self.in_channels != 2 * LATENT_CHANNELS:
            raise CheckpointError(
                f"{what}: in_channels: expected 8 with addition_embed_type 'image_hint', found {self.in_channels}"
            )
        if self.in_channels < LATENT_CHANNELS or self.out_channels not in (LATENT_CHANNELS, 2 * LATENT_CHANNELS):
            raise CheckpointError(
                f"{what}: expected at least 4 in_channels and 4 or 8 out_channels, "
                f"found {self.in_channels} and {self.out_channels}"
            )

    @property
    def embedding_dim(self) -> int:
        """Width of the timestep embedding."""
        return 4 * self.channels[0]

    @property
    def tokens(self) -> int:
        """Tokens that condition every attention layer."""
        return IMAGE_TOKENS if self.text_dim is None else IMAGE_TOKENS_BESIDE_TEXT + TEXT_TOKENS

    @property
    def concat_channels(self) -> int:
        """Input channels beside the latents: 4 of a ControlNet hint, 5 of inpainting, or none."""
        return self.in_channels - LATENT_CHANNELS

    @property
    def size_multiple(self) -> int:
        """Latent height and width must be divisible by this."""
        return int(2 ** (len(self.channels) - 1))


def block_types(what: str, field: str, names: Any, known: Mapping[str, bool]) -> tuple[bool, ...]:
    """Which levels have attention; CheckpointError for a block type that is not in `known`."""
    unknown = [name for name in names if name not in list(known)] if isinstance(names, list | tuple) else [names]
    if unknown:
        raise CheckpointError(f"{what}: {field}: expected {' or '.join(known)}, found {', '.join(map(repr, unknown))}")
    return tuple(known[name] for name in names)


class ResnetBlock(nn.Module):
    """Residual block conditioned by scale and shift; `resample` 2 doubles height and width, 0.5 halves them."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, resample: float = 1) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = GroupNorm(config.norm_groups, in_channels, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.embedding_dim, 2 * out_channels)
        self.norm2 = GroupNorm(config.norm_groups, out_channels, config.norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == 2:
            return upsampled(x, 2)
        return F.avg_pool2d(x, 2) if self.resample == 0.5 else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.resampled(F.silu(self.norm1(x))))
        modulation, width = self.time_emb_proj(embedding)[:, :, None, None], self.conv1.out_channels
        h = self.conv2(F.silu(self.norm2(h) * (1 + modulation[:, :width]) + modulation[:, width:]))
        x = self.resampled(x)
        return cast("Tensor", h + (x if self.conv_shortcut is None else self.conv_shortcut(x)))


class AddedKVAttention(nn.Module):
    """Attention of pixels to the tokens that condition the network and to each other, in that order."""

    def __init__(self, config: UNetConfig, channels: int, head_dim: int) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.group_norm = GroupNorm(config.norm_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.add_k_proj = nn.Linear(config.cross_attention_dim, channels)
        self.add_v_proj = nn.Linear(config.cross_attention_dim, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def added(self, tokens: Tensor) -> Tensor:
        """Keys and values of the conditioning tokens: [B, N, cross_attention_dim] -> [B, N, 2C]."""
        return torch.cat([self.add_k_proj(tokens), self.add_v_proj(tokens)], dim=-1)

    def forward(self, x: Tensor, added_key: Tensor, added_value: Tensor) -> Tensor:
        h = self.group_norm(x.flatten(2)).transpose(1, 2)  # [B, H·W, C]
        key = torch.cat([added_key, self.to_k(h)], dim=1)
        value = torch.cat([added_value, self.to_v(h)], dim=1)
        h = self.to_out[0](attention(self.to_q(h), key, value, self.heads))
        return cast("Tensor", x + h.transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    """One resolution of the UNet: residual blocks, each followed by attention where the level has it."""

    def __init__(self, config: UNetConfig, in_channels: list[int], channels: int, head_dim: int | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(config, c, channels) for c in in_channels])
        if head_dim is not None:
            self.attentions = nn.ModuleList([AddedKVAttention(config, channels, head_dim) for _ in in_channels])

    def layers(self) -> Iterator[tuple[ResnetBlock, AddedKVAttention | None]]:
        attentions = getattr(self, "attentions", [None] * len(self.resnets))
        yield from cast("Iterator[Any]", zip(self.resnets, attentions, strict=True))


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.channels[-1]
        self.resnets = nn.ModuleList([ResnetBlock(config, channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([AddedKVAttention(config, channels, config.head_dims[-1])])


class UNet(Network):
    """Predicts noise (and, with 8 output channels, a variance) from noisy latents, timestep and image embedding."""

    # Only `context` uses these; it is cheap, and runs in fp32 whatever the precision of `step`.
    KEEP_FP32 = (".time_embedding.", ".encoder_hid_proj.", ".add_embedding.", ".add_k_proj.", ".add_v_proj.")

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, heads = config.channels, config.head_dims
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], config.embedding_dim)
        image, text, width = config.image_embed_dim, config.text_dim, config.embedding_dim
        if text is None:
            self.encoder_hid_proj: nn.Module = ImageProjection(image, config.cross_attention_dim)
            self.add_embedding: nn.Module = ImageEmbedding(image, width, config.hint)
        else:
            self.encoder_hid_proj = TextImageProjection(image, text, config.cross_attention_dim)
            self.add_embedding = TextImageEmbedding(image, image, width)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [channels[0]]
        for i, width in enumerate(channels):
            previous = channels[max(i - 1, 0)]
            inputs = [previous, *[width] * (config.layers[i] - 1)]
            block = Level(config, inputs, width, heads[i] if config.down_attention[i] else None)
            skips += [width] * config.layers[i]
            if i < len(channels) - 1:
                block.downsamplers = nn.ModuleList([ResnetBlock(config, width, width, resample=0.5)])
                skips.append(width)
            self.down_blocks.append(block)
        self.mid_block = MidBlock(config)
        previous = channels[-1]
        for i, width in reversed(list(enumerate(channels))):
            inputs = [(previous if n == 0 else width) + skips.pop() for n in range(config.layers[i] + 1)]
            j = len(self.up_blocks)  # diffusers counts a list of head sizes from the bottom on the way up
            block = Level(config, inputs, width, heads[j] if config.up_attention[j] else None)
            if i > 0:
                block.upsamplers = nn.ModuleList([ResnetBlock(config, width, width, resample=2)])
            self.up_blocks.append(block)
            previous = width
        self.conv_norm_out = GroupNorm(config.norm_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def attentions(self) -> list[AddedKVAttention]:
        """Every attention layer, in the order in which `step` meets them."""
        return [
            m
            for part in (self.down_blocks, self.mid_block, self.up_blocks)
            for m in part.modules()
            if isinstance(m, AddedKVAttention)
        ]

    def context(
        self,
        image_embeds: Tensor,
        timesteps: Tensor,
        hint: Tensor | None = None,
        text_embeds: Tensor | None = None,
        text_states: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What a whole request shares.

        image_embeds [B, E], timesteps [T], hint [B, 3, 8H, 8W] in [0, 1]; text_embeds [B, E] and
        text_states [B, 77, W] where the network is conditioned by text ->
        embedding [T, B, 4C] (activated), added_kv [B, tokens, 2·sum of the attention layers' channels], and with a hint
        concat_latents [B, 4, H, W]; all fp32.
        """
        pooled = [image_embeds] if text_embeds is None else [image_embeds, text_embeds]
        embedding = F.silu(self.time_embedding(timesteps)[:, None] + self.add_embedding(*pooled)[None])
        tokens = self.encoder_hid_proj(*([image_embeds] if text_states is None else [image_embeds, text_states]))
        added_kv = torch.cat([layer.added(tokens) for layer in self.attentions()], dim=-1)
        if hint is None:
            return embedding, added_kv
        return embedding, added_kv, cast("ImageEmbedding", self.add_embedding).input_hint_block(hint)

    def step(self, sample: Tensor, embedding: Tensor, added_kv: Tensor, concat_latents: Tensor | None = None) -> Tensor:
        """One denoising step: sample [B, 4, H, W], embedding [B, 4C] -> prediction [B, out_channels, H, W], fp32."""
        x = sample if concat_latents is None else torch.cat([sample, concat_latents], dim=1)
        x, embedding, added_kv = (tensor.to(self.conv_in.weight.dtype) for tensor in (x, embedding, added_kv))
        widths = [layer.to_q.out_features for layer in self.attentions() for _ in ("key", "value")]
        parts = iter(torch.split(added_kv, widths, dim=2))

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for resnet, attend in cast("Level", block).layers():
                x = resnet(x, embedding)
                x = x if attend is None else attend(x, next(parts), next(parts))
                skips.append(x)
            for resample in getattr(block, "downsamplers", ()):
                x = resample(x, embedding)
                skips.append(x)

        x = self.mid_block.resnets[0](x, embedding)
        x = self.mid_block.attentions[0](x, next(parts), next(parts))
        x = self.mid_block.resnets[1](x, embedding)

        for block in self.up_blocks:
            for resnet, attend in cast("Level", block).layers():
                x = resnet(torch.cat([x, skips.pop()], dim=1), embedding)
                x = x if attend is None else attend(x, next(parts), next(parts))
            for resample in getattr(block, "upsamplers", ()):
                x = resample(x, embedding)
        return cast("Tensor", self.conv_out(F.silu(self.conv_norm_out(x))).float())

    def forward(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """The undivided network, as diffusers runs it: one timestep [1] for the whole batch."""
        embedding, added_kv, *concat_latents = self.context(timesteps=timestep, **conditions)
        return self.step(sample, embedding[0], added_kv, *concat_latents)
