"""The UNet of Kandinsky 2.x: residual blocks, and attention to the image beside self-attention ("added KV").

Source: diffusers 0.42.1 `UNet2DConditionModel`; attribute names are its state dict's.
What does not change from step to step is computed once a request (`context`), the rest once a step (`step`): all of it,
or the outermost level alone, with what an earlier step found below it (`refresh`, `shallow`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conditioning import ImageEmbedding, ImageProjection, TextImageEmbedding, TextImageProjection
from .layers import GroupNorm, Network, TimestepEmbedding, attention, upsampled
from .unet_config import UNetConfig


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


# Keys and values of the conditioning tokens by layer, [B, N, C] each
AddedKeysValues: TypeAlias = Mapping[AddedKVAttention, tuple[Tensor, Tensor]]


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

    def down(self, x: Tensor, embedding: Tensor, added: AddedKeysValues) -> list[Tensor]:
        """What each pair of its layers gives, the level's own output last."""
        outputs = []
        for resnet, attend in self.layers():
            x = resnet(x, embedding)
            x = x if attend is None else attend(x, *added[attend])
            outputs.append(x)
        return outputs

    def up(self, x: Tensor, skips: list[Tensor], embedding: Tensor, added: AddedKeysValues) -> Tensor:
        """Its output; each pair of layers takes the last of `skips` away."""
        for resnet, attend in self.layers():
            x = resnet(torch.cat([x, skips.pop()], dim=1), embedding)
            x = x if attend is None else attend(x, *added[attend])
        return x


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
        return self.divided(sample, embedding, added_kv, concat_latents)[0]

    def refresh(
        self, sample: Tensor, embedding: Tensor, added_kv: Tensor, concat_latents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`step`, and beside its prediction the features that `shallow` takes: [B, feature_channels, H, W], fp32.

        Source: Ma, Fang, Wang 2023, "DeepCache: Accelerating Diffusion Models for Free": what a UNet computes at its
        lower resolutions changes little from step to step. The cut is at the outermost skip connections.
        """
        prediction, features = self.divided(sample, embedding, added_kv, concat_latents)
        return prediction, features.float()

    def shallow(
        self,
        sample: Tensor,
        embedding: Tensor,
        features: Tensor,
        added_kv: Tensor | None = None,
        concat_latents: Tensor | None = None,
    ) -> Tensor:
        """The prediction of a step by the outermost level alone, with the features of an earlier `refresh`.

        `added_kv` is needed where that level has attention.
        """
        return self.divided(sample, embedding, added_kv, concat_latents, features)[0]

    def divided(
        self,
        sample: Tensor,
        embedding: Tensor,
        added_kv: Tensor | None,
        concat_latents: Tensor | None,
        features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Prediction, and what the last level got from the one below: computed here, or else `features`."""
        dtype = self.conv_in.weight.dtype
        x = sample if concat_latents is None else torch.cat([sample, concat_latents], dim=1)
        x, embedding = x.to(dtype), embedding.to(dtype)
        added = {} if added_kv is None else self.added(added_kv.to(dtype))
        outermost, last = cast("Level", self.down_blocks[0]), cast("Level", self.up_blocks[-1])

        x = self.conv_in(x)
        skips = [x, *outermost.down(x, embedding, added)]
        features = self.deep(skips[-1], embedding, added) if features is None else features.to(dtype)
        x = last.up(features, skips, embedding, added)
        return self.conv_out(F.silu(self.conv_norm_out(x))).float(), features

    def added(self, added_kv: Tensor) -> AddedKeysValues:
        """Each layer's share of what `context` gives."""
        layers = self.attentions()
        parts = torch.split(added_kv, [layer.to_q.out_features for layer in layers for _ in ("key", "value")], dim=2)
        return dict(zip(layers, zip(parts[::2], parts[1::2], strict=True), strict=True))

    def deep(self, x: Tensor, embedding: Tensor, added: AddedKeysValues) -> Tensor:
        """All that lies below the outermost level: [B, C, H, W] -> [B, feature_channels, H, W]."""
        levels: list[Any] = [*self.down_blocks]
        skips: list[Tensor] = []
        for above, level in pairwise(levels):
            x = above.downsamplers[0](x, embedding)
            skips += [x, *level.down(x, embedding, added)]
            x = skips[-1]

        attend = cast("AddedKVAttention", self.mid_block.attentions[0])
        x = self.mid_block.resnets[0](x, embedding)
        x = attend(x, *added[attend])
        x = self.mid_block.resnets[1](x, embedding)

        upwards: list[Any] = [*self.up_blocks]
        for level in upwards[:-1]:
            x = level.upsamplers[0](level.up(x, skips, embedding, added), embedding)
        return x

    def forward(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """The undivided network, as diffusers runs it: one timestep [1] for the whole batch."""
        embedding, added_kv, *concat_latents = self.context(timesteps=timestep, **conditions)
        return self.step(sample, embedding[0], added_kv, *concat_latents)
