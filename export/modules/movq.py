"""MoVQ, the autoencoder of Kandinsky: pictures to latents and back, eight times smaller in height and width.

Source: diffusers 0.42.1 `VQModel` with norm_type "spatial" (MoVQ: https://arxiv.org/abs/2209.09002); attribute names
are its state dict's. Kandinsky never quantises: the codebook is stored in checkpoints and not part of this network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ...engines.errors import CheckpointError
from .config import check_config, check_divisible, check_lengths, check_sizes
from .layers import GroupNorm, Network, attention, upsampled, widened
from .unet_config import block_types

EPS = 1e-6
SPATIAL_NORM_GROUPS = 32

DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}

FIXED: dict[str, tuple[Any, ...]] = {
    "norm_type": ("spatial",),
    "act_fn": ("silu", "swish"),
    "mid_block_add_attention": (True,),
    "lookup_from_codebook": (False,),
}


@dataclass(frozen=True)
class MoVQConfig:
    """What of a `VQModel` config decides this network; lists have one entry a level, highest resolution first."""

    in_channels: int
    out_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    layers: int
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    norm_groups: int
    codebook: tuple[int, int]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MoVQConfig:
        """Read config.json; raises CheckpointError that names each field that cannot be honoured."""
        what = "VQModel"
        read = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block",
                "down_block_types", "up_block_types", "norm_num_groups", "num_vq_embeddings", "vq_embed_dim",
                "scaling_factor")  # fmt: skip
        required = ("block_out_channels", "down_block_types", "up_block_types", "norm_type", "latent_channels")
        check_config(what, config, read, FIXED, required)
        sizes = (
            "in_channels",
            "out_channels",
            "latent_channels",
            "layers_per_block",
            "norm_num_groups",
            "num_vq_embeddings",
        )
        check_sizes(what, config, sizes, lists=("block_out_channels",))
        latent_channels, codes = config["latent_channels"], config.get("vq_embed_dim")
        # The spatial norms see the latents before `post_quant_conv`: both must have the same number of channels.
        if codes not in (latent_channels, None):
            raise CheckpointError(f"{what}: vq_embed_dim: expected latent_channels, {latent_channels}, found {codes!r}")
        self = cls(
            in_channels=config.get("in_channels", 3),
            out_channels=config.get("out_channels", 3),
            latent_channels=config["latent_channels"],
            channels=tuple(config["block_out_channels"]),
            layers=config.get("layers_per_block", 1),
            down_attention=block_types(what, "down_block_types", config["down_block_types"], DOWN_BLOCKS),
            up_attention=block_types(what, "up_block_types", config["up_block_types"], UP_BLOCKS),
            norm_groups=config.get("norm_num_groups", 32),
            codebook=(config.get("num_vq_embeddings", 256), config["latent_channels"]),
        )
        check_lengths(
            what,
            block_out_channels=self.channels,
            down_block_types=self.down_attention,
            up_block_types=self.up_attention,
        )
        for level, channels in enumerate(self.channels):
            name = f"block_out_channels[{level}]"
            check_divisible(what, "norm_num_groups", self.norm_groups, **{name: channels})
            check_divisible(what, "the 32 groups of spatial norms", SPATIAL_NORM_GROUPS, **{name: channels})
        return self

    @property
    def scale(self) -> int:
        """Pixels a latent cell, in height and in width."""
        return int(2 ** (len(self.channels) - 1))


class SpatialNorm(nn.Module):
    """Group norm, scaled and shifted by 1x1 convolutions of the latents.

    The original upsamples the latents to the size of x and convolves there. A 1x1 convolution and a nearest-neighbour
    upsampling commute, so this convolves at latent size. What comes out is repeated along rows alone: each row of it
    then serves `scale` rows of x by broadcasting, where whole planes would be two more tensors of the size of x.
    """

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(SPATIAL_NORM_GROUPS, channels, EPS)
        self.conv_y = nn.Conv2d(latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(latent_channels, channels, 1)

    def forward(self, x: Tensor, latents: Tensor, scale: int) -> Tensor:
        gain, bias = self.conv_y(latents), self.conv_b(latents)
        if scale == 1:
            return cast("Tensor", self.norm_layer(x) * gain + bias)
        gain, bias = (widened(each, scale).unsqueeze(3) for each in (gain, bias))  # [B, C, H/s, 1, W]
        rows = self.norm_layer(x).unflatten(2, (gain.shape[2], scale))
        return cast("Tensor", (rows * gain + bias).reshape(x.shape))


class PlainNorm(GroupNorm):
    """The encoder's norm, under the calling convention of SpatialNorm."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, EPS)

    def forward(self, input: Tensor, latents: Tensor | None = None, scale: int = 1) -> Tensor:  # noqa: A002, ARG002
        return super().forward(input)


class Parts:
    """Makes the norms of a half of the autoencoder: spatial in the decoder, plain in the encoder."""

    def __init__(self, config: MoVQConfig, spatial: bool) -> None:
        self.config, self.spatial = config, spatial

    def norm(self, channels: int) -> nn.Module:
        if self.spatial:
            return SpatialNorm(channels, self.config.latent_channels)
        return PlainNorm(self.config.norm_groups, channels)


class ResnetBlock(nn.Module):
    """Residual block without a timestep."""

    def __init__(self, parts: Parts, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = parts.norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = parts.norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, latents: Tensor | None, scale: int) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, latents, scale)))
        h = self.conv2(F.silu(self.norm2(h, latents, scale)))
        return cast("Tensor", h + (x if self.conv_shortcut is None else self.conv_shortcut(x)))


class Attention(nn.Module):
    """Self-attention of all pixels with one head."""

    def __init__(self, parts: Parts, channels: int) -> None:
        super().__init__()
        # diffusers' names for one and the same place
        self.norm_name = "spatial_norm" if parts.spatial else "group_norm"
        self.add_module(self.norm_name, parts.norm(channels))
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, latents: Tensor | None, scale: int) -> Tensor:
        h = self.get_submodule(self.norm_name)(x, latents, scale).flatten(2).transpose(1, 2)  # [B, H·W, C]
        h = self.to_out[0](attention(self.to_q(h), self.to_k(h), self.to_v(h), heads=1))
        return cast("Tensor", x + h.transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, parts: Parts, layers: int, in_channels: int, channels: int, attend: bool) -> None:
        super().__init__()
        widths = [in_channels, *[channels] * layers]
        self.resnets = nn.ModuleList([ResnetBlock(parts, a, b) for a, b in pairwise(widths)])
        self.attentions = nn.ModuleList([Attention(parts, channels) for _ in range(layers * attend)])

    def forward(self, x: Tensor, latents: Tensor | None = None, scale: int = 1) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, latents, scale)
            if len(self.attentions) > 0:
                x = self.attentions[i](x, latents, scale)
        return x


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at latent size."""

    def __init__(self, parts: Parts, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(parts, channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(parts, channels)])

    def forward(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        x = self.resnets[0](x, latents, 1)
        x = self.attentions[0](x, latents, 1)
        return cast("Tensor", self.resnets[1](x, latents, 1))


class Resample(nn.Module):
    """A 3x3 convolution that halves, or follows a doubling of, height and width."""

    def __init__(self, channels: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else upsampled(x, 2)))


class Encoder(nn.Module):
    """Pixels [B, 3, 8H, 8W] to latents [B, 4, H, W]."""

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__()
        parts, channels = Parts(config, spatial=False), config.channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            block = Level(parts, config.layers, channels[max(i - 1, 0)], width, config.down_attention[i])
            if i < len(channels) - 1:
                block.downsamplers = nn.ModuleList([Resample(width, down=True)])
            self.down_blocks.append(block)
        self.mid_block = MidBlock(parts, channels[-1])
        self.conv_norm_out = PlainNorm(config.norm_groups, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
            for resample in getattr(block, "downsamplers", ()):
                x = resample(x)
        return cast("Tensor", self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x)))))


class Decoder(nn.Module):
    """Latents [B, 4, H, W] to pixels [B, 3, 8H, 8W]."""

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__()
        parts, channels = Parts(config, spatial=True), config.channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(parts, channels[0])
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            block = Level(parts, config.layers + 1, channels[max(i - 1, 0)], width, config.up_attention[i])
            if i < len(channels) - 1:
                block.upsamplers = nn.ModuleList([Resample(width, down=False)])
            self.up_blocks.append(block)
        self.conv_norm_out = parts.norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x), latents)
        scale = 1
        for block in self.up_blocks:
            x = block(x, latents, scale)
            for resample in getattr(block, "upsamplers", ()):
                x = resample(x)
                scale *= 2
        return cast("Tensor", self.conv_out(F.silu(self.conv_norm_out(x, latents, scale))))


class MoVQ(Network):
    """Encoder and decoder with the 1x1 convolutions between them; latents are not scaled."""

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, 8H, 8W] in [-1, 1] -> latents [B, 4, H, W], fp32."""
        return cast("Tensor", self.quant_conv(self.encoder(pixels.to(self.quant_conv.weight.dtype))).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, H, W] -> pixels [B, 3, 8H, 8W] around [-1, 1], fp32."""
        latents = latents.to(self.post_quant_conv.weight.dtype)
        return cast("Tensor", self.decoder(self.post_quant_conv(latents), latents).float())
