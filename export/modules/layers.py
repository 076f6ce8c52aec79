"""Layers that several networks share. Norms keep their parameters and statistics in fp32 at any precision."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Network(nn.Module):
    """A network as the exporter wants it: built on any device, with methods that become graphs."""

    # Parts of parameter names (with a dot before) that stay in fp32 at any precision.
    KEEP_FP32: tuple[str, ...] = ()

    def constants(self) -> dict[str, Tensor]:
        """Buffers that no checkpoint stores, by name; on the meta device they have no values of their own."""
        return {}

    def set_precision(self, dtype: torch.dtype) -> None:
        """Convert parameters to `dtype`, except those of norms and of `KEEP_FP32`."""
        norms = [module for module in self.modules() if isinstance(module, GroupNorm | LayerNorm)]
        keep = {id(parameter) for norm in norms for parameter in norm.parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) not in keep and not any(part in f".{name}" for part in self.KEEP_FP32):
                parameter.data = parameter.data.to(dtype)


class GroupNorm(nn.GroupNorm):
    """Group normalisation whose statistics are computed in fp32; output in the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        return F.group_norm(input.float(), self.num_groups, self.weight, self.bias, self.eps).to(input.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation whose statistics are computed in fp32; output in the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        return F.layer_norm(input.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(input.dtype)


def upsampled(x: Tensor, scale: int) -> Tensor:
    """Nearest-neighbour upsampling of height and width."""
    return repeated(x, scale, scale)


def widened(x: Tensor, scale: int) -> Tensor:
    """Nearest-neighbour upsampling of width alone."""
    return repeated(x, 1, scale)


def repeated(x: Tensor, *scales: int) -> Tensor:
    """Nearest-neighbour upsampling by factors of height and width.

    In bf16 by way of fp32, which gives the same: ONNX Runtime has no CUDA kernel for Resize in bf16.
    """
    if set(scales) == {1}:
        return x
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return F.interpolate(wide, scale_factor=tuple(map(float, scales)), mode="nearest").to(x.dtype)


def sinusoid(timesteps: Tensor, dim: int, sine_first: bool = False, shift: int = 0) -> Tensor:
    """[cos, sin] features of `timesteps` [N] as fp32 [N, dim], frequencies from 1 down to 1/10000.

    With `shift` 1 the last frequency is 1/10000, with 0 the one that would follow it.
    Source: diffusers 0.42.1 `get_timestep_embedding`, whose downscale_freq_shift is `shift` and whose flip_sin_to_cos
    is the opposite of `sine_first`.
    """
    half = dim // 2
    # Multiplied and divided in diffusers' order: in another, frequencies are off by up to 1e-6, and the error of an
    # angle grows with the timestep.
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - shift)
    angles = timesteps.float()[:, None] * torch.exp(exponent)[None, :]
    features = (torch.cos(angles), torch.sin(angles))
    return torch.cat(features[::-1] if sine_first else features, dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers over the sinusoid of a timestep: [N] -> [N, out_features]."""

    def __init__(self, in_features: int, out_features: int, sine_first: bool = False, shift: int = 0) -> None:
        super().__init__()
        self.sine_first, self.shift = sine_first, shift
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, timesteps: Tensor) -> Tensor:
        features = sinusoid(timesteps, self.linear_1.in_features, self.sine_first, self.shift)
        features = features.to(self.linear_1.weight.dtype)
        return cast("Tensor", self.linear_2(F.silu(self.linear_1(features))))


def attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention of tokens [B, N, C] over keys and values [B, M, C].

    `bias` [B or 1, heads or 1, N, M] is added to the scores; `scale` None is 1/sqrt(C / heads).
    """
    width = query.shape[-1] // heads
    q, k, v = (tokens.reshape(*tokens.shape[:2], heads, width).transpose(1, 2) for tokens in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype), scale=scale)
    return out.transpose(1, 2).flatten(2)
