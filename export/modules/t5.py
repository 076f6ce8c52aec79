"""T5's encoder, the text encoder of Kandinsky 3 (FLAN-UL2).

Source: transformers 5.23 `T5EncoderModel`; attribute names are its state dict's. T5 was trained in bfloat16, and its
numbers go beyond fp16's 65504 in two places: in what the layers add up, which is fp32 here at any precision, and in
the feed-forward, which is scaled (see `FeedForward`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engines.errors import CheckpointError
from .config import TRANSFORMERS_BOOKKEEPING, check_config, check_sizes
from .layers import Network, attention

TEXT_TOKENS = 128  # that diffusers' Kandinsky3Pipeline pads and cuts a prompt to
WHAT = "T5EncoderModel"

# feed_forward_proj -> has a gate, activation, its name in the config. transformers 5.23, T5Config.__post_init__: the
# gated GELU is the approximate one.
FEED_FORWARDS: Mapping[str, tuple[bool, Callable[[Tensor], Tensor], str]] = {
    "relu": (False, F.relu, "relu"),
    "gated-gelu": (True, partial(F.gelu, approximate="tanh"), "gelu_new"),
    "gated-silu": (True, F.silu, "silu"),
}
SMALLEST = 1e-12  # added to a mean square: what is below the root of it is as good as zero
FIXED: dict[str, tuple[Any, ...]] = {"model_type": ("t5",)}
# What the decoder reads, or nothing does: positions are relative, and every prompt has TEXT_TOKENS tokens.
OF_THE_DECODER = ("decoder_start_token_id", "num_decoder_layers", "n_positions", "scale_decoder_outputs")


@dataclass(frozen=True)
class T5Config:
    """What of a T5 config decides the encoder."""

    width: int
    head_dim: int
    heads: int
    inner: int
    layers: int
    vocab_size: int
    buckets: int
    max_distance: int
    norm_eps: float
    feed_forward: str

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> T5Config:
        """Read config.json; raises CheckpointError that names each field that cannot be honoured."""
        required = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "vocab_size")
        sizes = (*required, "relative_attention_num_buckets", "relative_attention_max_distance")
        read = (*sizes, "layer_norm_epsilon", "feed_forward_proj", "dense_act_fn", "is_gated_act",
                "is_encoder_decoder", *OF_THE_DECODER, *TRANSFORMERS_BOOKKEEPING)  # fmt: skip
        check_config(WHAT, config, read, FIXED, required)
        check_sizes(WHAT, config, sizes)
        self = cls(
            width=config["d_model"],
            head_dim=config["d_kv"],
            heads=config["num_heads"],
            inner=config["d_ff"],
            layers=config["num_layers"],
            vocab_size=config["vocab_size"],
            buckets=config.get("relative_attention_num_buckets", 32),
            max_distance=config.get("relative_attention_max_distance", 128),
            norm_eps=config.get("layer_norm_epsilon", 1e-6),
            feed_forward=config.get("feed_forward_proj", "relu"),
        )
        self.check(config)
        return self

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise CheckpointError for numbers and names that do not fit each other."""
        kinds = list(FEED_FORWARDS)  # a list: a value that cannot be hashed is wrong, too
        if self.feed_forward not in kinds:
            raise CheckpointError(
                f"{WHAT}: feed_forward_proj: expected {' or '.join(map(repr, kinds))}, found {self.feed_forward!r}"
            )
        gated, _, activation = FEED_FORWARDS[self.feed_forward]
        # Older releases wrote neither; they may not say more than feed_forward_proj does.
        for field, expected in (("is_gated_act", gated), ("dense_act_fn", activation)):
            if config.get(field) not in (None, expected):
                raise CheckpointError(
                    f"{WHAT}: {field}: expected {expected!r} for the feed_forward_proj {self.feed_forward!r}, "
                    f"found {config[field]!r}"
                )
        if self.buckets < 4 or self.buckets % 2 or self.max_distance <= self.buckets // 4:
            raise CheckpointError(
                f"{WHAT}: relative_attention_num_buckets: expected an even number of at least 4 and below 4 times "
                f"relative_attention_max_distance = {self.max_distance}, found {self.buckets}"
            )
        if type(self.norm_eps) not in (int, float) or self.norm_eps <= 0:
            raise CheckpointError(f"{WHAT}: layer_norm_epsilon: expected a number above 0, found {self.norm_eps!r}")


def distance_buckets(config: T5Config) -> Tensor:
    """The bucket of every distance, from 1 - TEXT_TOKENS to TEXT_TOKENS - 1: [2·TEXT_TOKENS - 1] int64 on the CPU.

    Half of the buckets are for keys behind the query. Of a half, the first half is one a distance, and the rest grow
    logarithmically up to max_distance. Source: transformers 5.23 `T5Attention._relative_position_bucket`.
    """
    distance = torch.arange(1 - TEXT_TOKENS, TEXT_TOKENS, device="cpu")
    half = config.buckets // 2
    exact = half // 2
    far = torch.log(distance.abs().float().clamp(min=exact) / exact) / math.log(config.max_distance / exact)
    bucket = torch.minimum(exact + (far * (half - exact)).long(), torch.tensor(half - 1, device="cpu"))
    return torch.where(distance.abs() < exact, distance.abs(), bucket) + half * (distance > 0)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in fp32: [..., C] fp32 -> the same."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head attention without bias terms or a scale; the first layer holds the table of the position bias."""

    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_dim
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)
        if first:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return cast("Tensor", self.o(attention(self.q(x), self.k(x), self.v(x), self.heads, bias, scale=1.0)))


class FeedForward(nn.Module):
    """Linear layers around an activation, with a gate or without; [B, N, C] -> the same in fp32.

    In fp16 the last layer's input goes beyond 65504 where the gate multiplies, and its output wherever the input is
    large. So the product is computed in fp32, and each token's row divided by its root mean square before the last
    layer and multiplied by it afterwards, which is the same: that layer is linear. Of n inputs none is then above √n,
    and no output above √n times the length of its row of weights (Cauchy and Schwarz); in FLAN-UL2, √n is 128.
    """

    wi: nn.Linear  # without a gate
    wi_0: nn.Linear  # with one: what goes through the activation, and what that multiplies
    wi_1: nn.Linear

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated, self.activation, _ = FEED_FORWARDS[config.feed_forward]
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            self.add_module(name, nn.Linear(config.width, config.inner, bias=False))
        self.wo = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.wo.weight.dtype
        if self.gated:
            inner = self.activation(self.wi_0(x)).float() * self.wi_1(x).float()
        else:
            inner = self.activation(self.wi(x)).float()
        if dtype != torch.float16:
            return cast("Tensor", self.wo(inner.to(dtype)).float())
        scale = (inner.square().mean(dim=-1, keepdim=True) + SMALLEST).sqrt()
        return cast("Tensor", self.wo((inner / scale).to(dtype)).float() * scale)


class AttentionLayer(nn.Module):
    """The first half of a block: x [B, N, C] fp32 + attention of its norm."""

    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        self.SelfAttention = Attention(config, first)
        self.layer_norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + cast("Tensor", self.SelfAttention(self.layer_norm(x).to(bias.dtype), bias).float())


class FeedForwardLayer(nn.Module):
    """The second half of a block: x [B, N, C] fp32 + feed-forward of its norm in `dtype`."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x + cast("Tensor", self.DenseReluDense(self.layer_norm(x).to(dtype)))


class Block(nn.Module):
    """Pre-norm transformer block; x [B, N, C] is fp32, and the bias has the type of what is computed between."""

    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, first), FeedForwardLayer(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return cast("Tensor", self.layer[1](self.layer[0](x, bias), bias.dtype))


class T5Encoder(Network):
    """Tokens to their states."""

    KEEP_FP32 = ("layer_norm.",)

    buckets: Tensor

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.width)
        blocks = nn.ModuleList([Block(config, first=i == 0) for i in range(config.layers)])
        self.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": RMSNorm(config.width, config.norm_eps)})
        # Created first and filled then, for the device to be the default one: meta, where nothing is filled.
        self.register_buffer("buckets", torch.empty(2 * TEXT_TOKENS - 1, dtype=torch.int64), persistent=False)
        self.buckets.copy_(distance_buckets(config))

    def constants(self) -> dict[str, Tensor]:
        """The buckets of the distances between tokens."""
        return {"buckets": distance_buckets(self.config)}

    def encode(self, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """input_ids [B, 128] int64, text_mask [B, 128] fp32, 1 for a token and 0 for padding -> text_states
        [B, 128, C] fp32, zero at padding.
        """
        blocks = cast("nn.ModuleList", self.encoder["block"])
        x = self.shared(input_ids).float()
        bias = self.attention_bias(text_mask)
        for block in blocks:
            x = block(x, bias)
        return cast("Tensor", self.encoder["final_layer_norm"](x) * text_mask[..., None])

    def attention_bias(self, text_mask: Tensor) -> Tensor:
        """What every layer adds to its scores: [B, heads, 128, 128] in the type of its weights."""
        first = cast("AttentionLayer", cast("Any", self.encoder["block"])[0].layer[0]).SelfAttention
        dtype = first.q.weight.dtype
        position = torch.arange(TEXT_TOKENS, device=text_mask.device)
        of_distance = first.relative_attention_bias(self.buckets).to(dtype)  # [255, heads]
        pairs = position - position[:, None] + TEXT_TOKENS - 1
        of_pair = F.embedding(pairs, of_distance).permute(2, 0, 1)[None]
        return torch.where(text_mask[:, None, None] > 0, of_pair, torch.finfo(dtype).min)
