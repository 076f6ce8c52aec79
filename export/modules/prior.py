"""The prior of Kandinsky 2.x: a causal transformer that predicts an image embedding from a text.

Source: diffusers 0.42.1 `PriorTransformer`; attribute names are its state dict's. A sequence is [text states (77),
text embedding, time, noisy image embedding, query]. Attention is causal, and the first 78 tokens see neither time nor
noise: their keys and values in every layer are the same at each step, so `context` computes them once, and `step`
runs three tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engines.errors import CheckpointError
from .config import check_config, check_sizes
from .layers import LayerNorm, Network, TimestepEmbedding, attention

MASKED = -10000.0  # diffusers' additive mask; exp(-10000) is 0 in every precision
STEP_TOKENS = 3

FIXED: dict[str, tuple[Any, ...]] = {
    "additional_embeddings": (4,),
    "time_embed_act_fn": ("silu",),
    "added_emb_type": ("prd",),
    "encoder_hid_proj_type": ("linear",),
}


@dataclass(frozen=True)
class PriorConfig:
    """What of a `PriorTransformer` config decides this network."""

    heads: int
    head_dim: int
    layers: int
    embedding_dim: int
    text_tokens: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> PriorConfig:
        """Read config.json; raises CheckpointError that names each field that cannot be honoured."""
        read = ("num_attention_heads", "attention_head_dim", "num_layers", "embedding_dim", "num_embeddings",
                "embedding_proj_dim", "clip_embed_dim", "time_embed_dim")  # fmt: skip
        check_config("PriorTransformer", config, read, FIXED)
        check_sizes("PriorTransformer", config, read[:5])
        self = cls(
            heads=config.get("num_attention_heads", 32),
            head_dim=config.get("attention_head_dim", 64),
            layers=config.get("num_layers", 20),
            embedding_dim=config.get("embedding_dim", 768),
            text_tokens=config.get("num_embeddings", 77),
        )
        same = {
            "embedding_proj_dim": self.embedding_dim,
            "clip_embed_dim": self.embedding_dim,
            "time_embed_dim": self.width,
        }
        for field, expected in same.items():
            if config.get(field) not in (None, expected):
                raise CheckpointError(f"PriorTransformer: {field}: expected {expected}, found {config[field]!r}")
        return self

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    @property
    def prefix_tokens(self) -> int:
        """Tokens that do not change from step to step: the text states and the text embedding."""
        return self.text_tokens + 1


class Attention(nn.Module):
    """Multi-head attention over cached keys and values followed by the tokens' own."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_q = nn.Linear(config.width, config.width)
        self.to_k = nn.Linear(config.width, config.width)
        self.to_v = nn.Linear(config.width, config.width)
        self.to_out = nn.ModuleList([nn.Linear(config.width, config.width)])

    def forward(self, x: Tensor, bias: Tensor, prefix: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and the keys and values of x; `prefix` holds keys and values [B, M, C] of earlier tokens."""
        own_key, own_value = self.to_k(x), self.to_v(x)
        key, value = own_key, own_value
        if prefix is not None:
            key, value = torch.cat([prefix[0], key], dim=1), torch.cat([prefix[1], value], dim=1)
        return self.to_out[0](attention(self.to_q(x), key, value, self.heads, bias)), own_key, own_value


class Projection(nn.Module):
    """The linear layer of diffusers' `GELU`, under its name `proj`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """Linear, exact GELU, linear; four times the width between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Projection(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.net[2](self.net[0](x)))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width)
        self.attn1 = Attention(config)
        self.norm3 = LayerNorm(config.width)
        self.ff = FeedForward(config.width)

    def forward(
        self, x: Tensor, bias: Tensor, prefix: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, key, value = self.attn1(self.norm1(x), bias, prefix)
        x = x + h
        return x + self.ff(self.norm3(x)), key, value


class Prior(Network):
    """Predicts the clean image embedding from a noisy one, a timestep and the text."""

    KEEP_FP32 = (".time_embedding.", ".clip_mean", ".clip_std")  # time_embedding is only used by `context`

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width, dim = config.width, config.embedding_dim
        self.time_embedding = TimestepEmbedding(width, width)
        self.proj_in = nn.Linear(dim, width)
        self.embedding_proj = nn.Linear(dim, width)
        self.encoder_hidden_states_proj = nn.Linear(dim, width)
        self.positional_embedding = nn.Parameter(torch.zeros(1, config.text_tokens + 4, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer_blocks = nn.ModuleList([TransformerBlock(config) for _ in range(config.layers)])
        self.norm_out = LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, dim)
        # Mean and deviation of the embeddings the prior was trained on; the runtime applies them after the last step.
        self.clip_mean = nn.Parameter(torch.zeros(1, dim))
        self.clip_std = nn.Parameter(torch.zeros(1, dim))

    def context(
        self, text_embeds: Tensor, text_states: Tensor, text_mask: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a whole request shares.

        text_embeds [B, D], text_states [B, 77, D], text_mask [B, 77] (1 for a token, 0 for padding), timesteps [T] ->
        embedding [T, C] of each timestep, prefix_kv [B, 2·layers, 78, C] (keys and values of each layer in turn), and
        attention_bias [B, 1, 3, 81] of the three tokens of a step; all fp32.
        """
        dtype = self.proj_in.weight.dtype
        prefix = torch.cat(
            [
                self.encoder_hidden_states_proj(text_states.to(dtype)),
                self.embedding_proj(text_embeds.to(dtype))[:, None],
            ],
            dim=1,
        )
        x = prefix + self.positional_embedding[:, : self.config.prefix_tokens]
        # Not F.pad: ONNX Runtime has no CUDA kernel for Pad of this opset.
        rest = torch.zeros(1, 1 + STEP_TOKENS, device=text_mask.device).expand(text_mask.shape[0], -1)
        padding = torch.cat([(1 - text_mask.float()) * MASKED, rest], dim=1)[:, None, None]  # [B, 1, 1, 81]
        length = self.config.text_tokens + 4
        bias = padding + torch.full((length, length), MASKED, device=padding.device).triu(1)
        cut = self.config.prefix_tokens
        kvs = []
        for block in self.transformer_blocks:
            x, key, value = block(x, bias[:, :, :cut, :cut])
            kvs += [key, value]
        return self.time_embedding(timesteps), torch.stack(kvs, dim=1).float(), bias[:, :, cut:]

    def step(self, sample: Tensor, embedding: Tensor, prefix_kv: Tensor, attention_bias: Tensor) -> Tensor:
        """One denoising step: sample [B, D], embedding [B, C] -> predicted clean embedding [B, D], fp32."""
        dtype = self.proj_in.weight.dtype
        query = self.prd_embedding.expand(sample.shape[0], -1, -1)
        x = torch.cat([embedding.to(dtype)[:, None], self.proj_in(sample.to(dtype))[:, None], query], dim=1)
        x = x + self.positional_embedding[:, self.config.prefix_tokens :]
        prefix_kv = prefix_kv.to(dtype)
        for i, block in enumerate(self.transformer_blocks):
            x, _, _ = block(x, attention_bias, (prefix_kv[:, 2 * i], prefix_kv[:, 2 * i + 1]))
        return cast("Tensor", self.proj_to_clip_embeddings(self.norm_out(x[:, -1])).float())

    def forward(
        self, sample: Tensor, timestep: Tensor, text_embeds: Tensor, text_states: Tensor, text_mask: Tensor
    ) -> Tensor:
        """The undivided network, as diffusers runs it: one timestep [1] for the whole batch."""
        embedding, prefix_kv, bias = self.context(text_embeds, text_states, text_mask, timestep)
        return self.step(sample, embedding.expand(sample.shape[0], -1), prefix_kv, bias)
