"""The text encoder of Kandinsky 2.1's decoder: XLM-R, whose states are averaged and projected.

Source: diffusers 0.42.1 `MultilingualCLIP` over transformers 5.23 `XLMRobertaModel`; attribute names are its state
dict's. The pooling layer that checkpoints store is not here: nothing reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engines.errors import CheckpointError
from .conditioning import TEXT_TOKENS
from .config import TRANSFORMERS_BOOKKEEPING, check_config, check_divisible, check_sizes
from .layers import LayerNorm, Network, attention

WHAT = "MultilingualCLIP"
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("xlm-roberta", "M-CLIP"),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
}


@dataclass(frozen=True)
class MultilingualCLIPConfig:
    """What of a `MultilingualCLIP` config decides this network."""

    hidden_size: int
    intermediate_size: int
    heads: int
    layers: int
    positions: int
    vocab_size: int
    token_types: int
    pad_token_id: int
    norm_eps: float
    embedding_dim: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MultilingualCLIPConfig:
        """Read config.json; raises CheckpointError that names each field that cannot be honoured."""
        required = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
                    "max_position_embeddings")  # fmt: skip
        sizes = (*required, "type_vocab_size", "numDims", "transformerDimensions")
        read = (*sizes, "layer_norm_eps", *TRANSFORMERS_BOOKKEEPING)
        check_config(WHAT, config, read, FIXED, required)
        check_sizes(WHAT, config, sizes)
        self = cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            heads=config["num_attention_heads"],
            layers=config["num_hidden_layers"],
            positions=config["max_position_embeddings"],
            vocab_size=config["vocab_size"],
            token_types=config.get("type_vocab_size", 2),
            pad_token_id=config.get("pad_token_id", 1),
            norm_eps=config.get("layer_norm_eps", 1e-12),
            embedding_dim=config.get("numDims", 768),
        )
        check_divisible(WHAT, "num_attention_heads", self.heads, hidden_size=self.hidden_size)
        self.check(config.get("transformerDimensions", 1024))
        return self

    def check(self, projected: int) -> None:
        """Raise CheckpointError for numbers that do not fit each other; `projected` is the projection's input width."""
        if projected != self.hidden_size:
            raise CheckpointError(
                f"{WHAT}: transformerDimensions: expected {self.hidden_size}, the hidden_size, found {projected}"
            )
        if type(self.pad_token_id) is not int or not 0 <= self.pad_token_id < self.vocab_size:
            raise CheckpointError(
                f"{WHAT}: pad_token_id: expected a token below vocab_size = {self.vocab_size}, "
                f"found {self.pad_token_id!r}"
            )
        # Positions are counted from the one after that of padding, which is the padding token's number.
        if self.positions <= self.pad_token_id + TEXT_TOKENS:
            raise CheckpointError(
                f"{WHAT}: max_position_embeddings: expected {self.pad_token_id + TEXT_TOKENS + 1} or more, for a "
                f"pad_token_id of {self.pad_token_id} and {TEXT_TOKENS} tokens, found {self.positions}"
            )
        if type(self.norm_eps) not in (int, float) or self.norm_eps <= 0:
            raise CheckpointError(f"{WHAT}: layer_norm_eps: expected a number above 0, found {self.norm_eps!r}")


class Embeddings(nn.Module):
    """Tokens [B, N] to the normalised sum of their embeddings, of their positions' and of the first token type's."""

    def __init__(self, config: MultilingualCLIPConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.pad_token_id = config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.positions, width)
        self.token_type_embeddings = nn.Embedding(config.token_types, width)
        self.LayerNorm = LayerNorm(width, eps=config.norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        tokens = (input_ids != self.pad_token_id).to(input_ids.dtype)
        positions = tokens.cumsum(dim=1) * tokens + self.pad_token_id
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(torch.zeros_like(input_ids[:1, :1]))
        return cast("Tensor", self.LayerNorm(x + self.position_embeddings(positions)))


class SelfAttention(nn.Module):
    """Multi-head attention, without the projection of its output."""

    def __init__(self, config: MultilingualCLIPConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return attention(self.query(x), self.key(x), self.value(x), self.heads, bias)


class Output(nn.Module):
    """The end of a branch: linear, sum with what went into the branch, norm."""

    def __init__(self, in_features: int, config: MultilingualCLIPConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, branch: Tensor, x: Tensor) -> Tensor:
        return cast("Tensor", self.LayerNorm(x + self.dense(branch)))


class Layer(nn.Module):
    """Post-norm transformer layer with exact GELU."""

    def __init__(self, config: MultilingualCLIPConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": Output(width, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = Output(inner, config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, bias), x)
        return cast("Tensor", self.output(F.gelu(self.intermediate["dense"](x)), x))


class MultilingualCLIP(Network):
    """Tokens to the projected mean of their states, and the states."""

    def __init__(self, config: MultilingualCLIPConfig) -> None:
        super().__init__()
        self.config = config
        layers = nn.ModuleList([Layer(config) for _ in range(config.layers)])
        self.transformer = nn.ModuleDict(
            {"embeddings": Embeddings(config), "encoder": nn.ModuleDict({"layer": layers})}
        )
        self.LinearTransformation = nn.Linear(config.hidden_size, config.embedding_dim)

    def encode(self, input_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids [B, N] int64, text_mask [B, N] fp32, 1 for a token (one at least) and 0 for padding ->
        text_embeds [B, D], text_states [B, N, C]; fp32.
        """
        dtype = self.LinearTransformation.weight.dtype
        bias = ((1 - text_mask) * torch.finfo(dtype).min)[:, None, None].expand(-1, 1, text_mask.shape[1], -1)
        x = self.transformer["embeddings"](input_ids)
        for layer in cast("nn.ModuleList", cast("nn.ModuleDict", self.transformer["encoder"])["layer"]):
            x = layer(x, bias)
        states, mask = x.float(), text_mask[..., None]
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return self.LinearTransformation(mean.to(dtype)).float(), states
