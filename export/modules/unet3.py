"""The UNet of Kandinsky 3: residual blocks of four convolutions, norms that time and text condition, and attention.

Source: diffusers 0.42.1 `Kandinsky3UNet`; attribute names are its state dict's.
What does not change from step to step is computed once a request (`context`), the rest once a step (`step`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engines.errors import CheckpointError
from .conditioning import LATENT_CHANNELS
from .config import check_config, check_divisible, check_sizes
from .layers import GroupNorm, LayerNorm, Network, TimestepEmbedding, attention

# Whether a level attends, to itself and to the text. The way up has the same from its other end: with fewer than four
# levels diffusers cuts both lists, and the last level of the way up attends too.
ATTENDS = (False, True, True, True)
KERNEL_SIZES = (1, 3, 3, 1)  # of the blocks of a residual block
UP, DOWN = 1, 2  # which of them resamples
MASKED = -10000.0  # added to the scores of padding

DEFAULTS: Mapping[str, Any] = {
    "attention_head_dim": 64,
    "block_out_channels": (384, 768, 1536, 3072),
    "cross_attention_dim": 4096,
    "encoder_hid_dim": 4096,
    "groups": 32,
    "in_channels": 4,
    "layers_per_block": 3,
    "time_embedding_dim": 1536,
}


@dataclass(frozen=True)
class UNet3Config:
    """What of a `Kandinsky3UNet` config decides this network; channels has one entry a level.

    text_dim is the width of the text's states, cross_attention_dim that to which they are projected.
    """

    in_channels: int
    channels: tuple[int, ...]
    layers: int
    head_dim: int
    cross_attention_dim: int
    text_dim: int
    embedding_dim: int
    norm_groups: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNet3Config:
        """Read config.json, where an absent field has the default of diffusers' class.

        Raises CheckpointError that names each field that cannot be honoured.
        """
        what, lists = "Kandinsky3UNet", ("block_out_channels",)
        check_config(what, config, read=DEFAULTS, fixed={})
        check_sizes(what, config, DEFAULTS.keys() - {*lists}, lists)
        values = {**DEFAULTS, **config}
        self = cls(
            in_channels=values["in_channels"],
            channels=tuple(values["block_out_channels"]),
            layers=values["layers_per_block"],
            head_dim=values["attention_head_dim"],
            cross_attention_dim=values["cross_attention_dim"],
            text_dim=values["encoder_hid_dim"],
            embedding_dim=values["time_embedding_dim"],
            norm_groups=values["groups"],
        )
        self.check(what)
        return self

    def check(self, what: str) -> None:
        """Raise CheckpointError where sizes contradict each other, or diffusers' class could not run with them."""
        problems = []
        if self.in_channels != LATENT_CHANNELS:
            problems.append(f"in_channels: expected {LATENT_CHANNELS}, found {self.in_channels}")
        if not 2 <= len(self.channels) <= len(ATTENDS):
            problems.append(f"block_out_channels: expected 2 to {len(ATTENDS)} levels, found {len(self.channels)}")
        if self.layers < 2:
            problems.append(f"layers_per_block: expected at least 2, found {self.layers}")
        if self.channels[0] % 8:  # half of it is a sinusoid's width, whose frequencies are defined by two of each kind
            problems.append(f"block_out_channels[0]: expected a multiple of 8, found {self.channels[0]}")
        if problems:
            raise CheckpointError(f"{what}: {'; '.join(problems)}")
        names = {f"block_out_channels[{level}]": width for level, width in enumerate(self.channels)}
        first = {"block_out_channels[0]": self.channels[0]}
        # Residual blocks have half of a level's width inside, and half of the first's comes before the levels.
        check_divisible(what, "2 x groups", 2 * self.norm_groups, **names)
        check_divisible(what, "attention_head_dim", self.head_dim, time_embedding_dim=self.embedding_dim, **names)
        if self.up_attends(0):
            check_divisible(what, "2 x attention_head_dim", 2 * self.head_dim, **first)

    @property
    def stem_channels(self) -> int:
        """Channels before the first level and behind the last, and features of a timestep's sinusoid."""
        return self.channels[0] // 2

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: there is no learned variance."""
        return self.in_channels

    @property
    def size_multiple(self) -> int:
        """Latent height and width must be divisible by this."""
        return int(2 ** (len(self.channels) - 1))

    @property
    def text_kv_dim(self) -> int:
        """Width of the text's keys and values in all attention layers."""
        levels = range(len(self.channels))
        down = [width for level in levels if ATTENDS[level] for _, width, _ in self.down_widths(level)]
        up = [width for level in levels if self.up_attends(level) for _, width, _ in self.up_widths(level)]
        return 2 * (sum(down) + sum(up))

    def up_attends(self, level: int) -> bool:
        """Whether a level attends on the way up."""
        return ATTENDS[level - len(self.channels)]

    def down_widths(self, level: int) -> list[tuple[int, int, int]]:
        """Channels before, between and behind each pair of residual blocks of a level, on the way down."""
        width = self.channels[level]
        previous = self.channels[level - 1] if level else self.stem_channels
        return [(previous, width, width), *[(width, width, width)] * (self.layers - 1)]

    def up_widths(self, level: int) -> list[tuple[int, int, int]]:
        """The same on the way up, where the first pair of all levels but the deepest gets the skip connection too."""
        width = self.channels[level]
        following = self.channels[level - 1] if level else self.stem_channels
        first = width if level == len(self.channels) - 1 else 2 * width
        inner = [(width, width, width)] * (self.layers - 2)
        return [(first, first, width), *inner, (width, width, following)]


class Condition(NamedTuple):
    """What conditioned norms get: the activated embedding [B, D], and ones and zeros by number of channels."""

    embedding: Tensor
    plain: Mapping[int, tuple[Tensor, Tensor]]


class ConditionalNorm(nn.Module):
    """Group normalisation, statistics in fp32, whose scale and shift come from the embedding of time and text."""

    def __init__(self, config: UNet3Config, channels: int) -> None:
        super().__init__()
        self.groups, self.channels = config.norm_groups, channels
        # The activation that stands first in diffusers is applied once, to the embedding.
        self.context_mlp = nn.Sequential(nn.Identity(), nn.Linear(config.embedding_dim, 2 * channels))

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        modulation = self.context_mlp(condition.embedding).reshape(-1, 2 * self.channels, 1, 1)
        scale, shift = modulation.chunk(2, dim=1)
        h = F.group_norm(x.float(), self.groups, *condition.plain[self.channels])
        return cast("Tensor", h.to(x.dtype) * (1 + scale) + shift)


class Upsample(nn.Module):
    """Transposed convolution 2x2 of stride 2, whose windows do not overlap: a matrix product for each pixel.

    ONNX Runtime has no CUDA kernel for the operator in this opset.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 2, 2))  # [in, out, 2, 2]
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.flatten(2).transpose(1, 2) @ self.weight.flatten(1)  # [B, H·W, C·2·2]
        x = x.reshape(batch, height, width, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(batch, channels, 2 * height, 2 * width) + self.bias[:, None, None]


class Block(nn.Module):
    """Conditioned norm, activation and convolution, with the resampling of its residual block."""

    def __init__(self, config: UNet3Config, widths: tuple[int, int], kernel_size: int, up: bool, down: bool) -> None:
        super().__init__()
        before, behind = widths
        self.group_norm = ConditionalNorm(config, before)
        self.up_sample = Upsample(before) if up else nn.Identity()
        self.projection = nn.Conv2d(before, behind, kernel_size, padding=kernel_size // 2)
        self.down_sample = nn.Conv2d(behind, behind, 2, stride=2) if down else nn.Identity()

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        x = self.up_sample(F.silu(self.group_norm(x, condition)))
        return cast("Tensor", self.down_sample(self.projection(x)))


class ResnetBlock(nn.Module):
    """Residual block, narrow inside; `up` doubles height and width, `down` halves them."""

    def __init__(self, config: UNet3Config, before: int, behind: int, up: bool = False, down: bool = False) -> None:
        super().__init__()
        hidden = max(before, behind) // 2
        widths = ((before, hidden), (hidden, hidden), (hidden, hidden), (hidden, behind))
        self.resnet_blocks = nn.ModuleList(
            Block(config, pair, size, up and i == UP, down and i == DOWN)
            for i, (pair, size) in enumerate(zip(widths, KERNEL_SIZES, strict=True))
        )
        self.shortcut_up_sample = Upsample(before) if up else nn.Identity()
        self.shortcut_projection = nn.Conv2d(before, behind, 1) if before != behind else nn.Identity()
        self.shortcut_down_sample = nn.Conv2d(behind, behind, 2, stride=2) if down else nn.Identity()

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        h = x
        for block in self.resnet_blocks:
            h = block(h, condition)
        return cast("Tensor", self.shortcut_down_sample(self.shortcut_projection(self.shortcut_up_sample(x))) + h)


class Attention(nn.Module):
    """Attention of `queries`-wide tokens to others, `width` wide inside and behind; no biases."""

    def __init__(self, config: UNet3Config, queries: int, tokens: int, width: int) -> None:
        super().__init__()
        self.heads = width // config.head_dim
        self.to_q = nn.Linear(queries, width, bias=False)
        self.to_k = nn.Linear(tokens, width, bias=False)
        self.to_v = nn.Linear(tokens, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(self, x: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return cast("Tensor", self.to_out[0](attention(self.to_q(x), key, value, self.heads, bias)))


class AttentionBlock(nn.Module):
    """Attention of pixels to the text, or to each other, and two convolutions of one pixel."""

    def __init__(self, config: UNet3Config, channels: int, cross: bool) -> None:
        super().__init__()
        self.in_norm = ConditionalNorm(config, channels)
        self.attention = Attention(config, channels, config.cross_attention_dim if cross else channels, channels)
        self.out_norm = ConditionalNorm(config, channels)
        self.feed_forward = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1, bias=False),
            nn.SiLU(),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )

    def text(self, states: Tensor) -> Tensor:
        """Keys and values of the text: [B, N, cross_attention_dim] -> [B, N, 2C]."""
        return torch.cat([self.attention.to_k(states), self.attention.to_v(states)], dim=-1)

    def forward(self, x: Tensor, condition: Condition, text: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """`text`: its keys and values [B, N, 2C], and what is added to the scores; None for self-attention."""
        h = self.in_norm(x, condition).flatten(2).transpose(1, 2)  # [B, H·W, C]
        if text is None:
            h = self.attention(h, self.attention.to_k(h), self.attention.to_v(h))
        else:
            key_value, bias = text
            # One row for all queries is not enough for ONNX Runtime's operator.
            h = self.attention(h, *key_value.chunk(2, dim=-1), bias=bias.expand(-1, -1, h.shape[1], -1))
        x = x + h.transpose(1, 2).reshape(x.shape)
        return cast("Tensor", x + self.feed_forward(self.out_norm(x, condition)))


class Level(nn.Module):
    """One resolution: pairs of residual blocks with attention to the text between, self-attention at its outer end."""

    def __init__(self, config: UNet3Config, level: int, up: bool) -> None:
        super().__init__()
        self.up = up
        widths = config.up_widths(level) if up else config.down_widths(level)
        attends = config.up_attends(level) if up else ATTENDS[level]
        resamples = level < len(config.channels) - 1
        layers, last = config.layers, config.layers - 1
        outer = widths[-1][2] if up else widths[0][0]
        attentions = [AttentionBlock(config, outer, False), *(AttentionBlock(config, w, True) for _, w, _ in widths)]
        self.attentions = nn.ModuleList(attentions if attends else [nn.Identity()] * (layers + 1))
        self.resnets_in = nn.ModuleList(
            ResnetBlock(config, a, b, up=up and resamples and i == 0) for i, (a, b, _) in enumerate(widths)
        )
        self.resnets_out = nn.ModuleList(
            ResnetBlock(config, b, c, down=not up and resamples and i == last) for i, (_, b, c) in enumerate(widths)
        )

    def cross_attentions(self) -> list[AttentionBlock]:
        """The layers that attend to the text, in the order in which `forward` meets them; none, or one a pair."""
        return [layer for layer in self.attentions[1:] if isinstance(layer, AttentionBlock)]

    def forward(self, x: Tensor, condition: Condition, parts: Iterator[Tensor], bias: Tensor) -> Tensor:
        """`parts`: the text's keys and values, for one layer after the other."""
        attend = self.attentions[0]
        if not self.up and isinstance(attend, AttentionBlock):
            x = attend(x, condition)
        for resnet_in, cross, resnet_out in zip(self.resnets_in, self.attentions[1:], self.resnets_out, strict=True):
            x = resnet_in(x, condition)
            if isinstance(cross, AttentionBlock):
                x = cross(x, condition, (next(parts), bias))
            x = resnet_out(x, condition)
        if self.up and isinstance(attend, AttentionBlock):
            x = attend(x, condition)
        return x


class TextProjection(nn.Module):
    """States of the text encoder to what the attention layers read: [B, N, text_dim] -> [B, N, C]."""

    def __init__(self, config: UNet3Config) -> None:
        super().__init__()
        self.projection_linear = nn.Linear(config.text_dim, config.cross_attention_dim, bias=False)
        self.projection_norm = LayerNorm(config.cross_attention_dim)

    def forward(self, states: Tensor) -> Tensor:
        return cast("Tensor", self.projection_norm(self.projection_linear(states)))


class AttentionPooling(nn.Module):
    """The text's share of the timestep embedding: attention of its mean, padding included, to its tokens."""

    def __init__(self, config: UNet3Config) -> None:
        super().__init__()
        dim = config.cross_attention_dim
        self.attention = Attention(config, dim, dim, config.embedding_dim)

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        query, layer = states.mean(dim=1, keepdim=True), self.attention
        return cast("Tensor", layer(query, layer.to_k(states), layer.to_v(states), bias)[:, 0])


class UNet3(Network):
    """Predicts noise from noisy latents, timestep and the text's states."""

    def __init__(self, config: UNet3Config) -> None:
        super().__init__()
        self.config = config
        # Only `context` uses these; it is cheap, and runs in fp32 whatever the precision of `step`.
        self.KEEP_FP32 = (
            ".time_embedding.",
            ".encoder_hid_proj.",
            ".add_time_condition.",
            *(f".attentions.{i + 1}.attention.to_{part}." for i in range(config.layers) for part in "kv"),
        )
        stem, levels = config.stem_channels, range(len(config.channels))
        self.conv_in = nn.Conv2d(config.in_channels, stem, 3, padding=1)
        self.time_embedding = TimestepEmbedding(stem, config.embedding_dim, sine_first=True, shift=1)
        self.encoder_hid_proj = TextProjection(config)
        self.add_time_condition = AttentionPooling(config)
        self.down_blocks = nn.ModuleList(Level(config, level, up=False) for level in levels)
        self.up_blocks = nn.ModuleList(Level(config, level, up=True) for level in reversed(levels))
        self.conv_norm_out = GroupNorm(config.norm_groups, stem)
        self.conv_out = nn.Conv2d(stem, config.out_channels, 3, padding=1)

    def cross_attentions(self) -> list[AttentionBlock]:
        """Every layer that attends to the text, in the order in which `step` meets them."""
        blocks = cast("list[Level]", [*self.down_blocks, *self.up_blocks])
        return [layer for block in blocks for layer in block.cross_attentions()]

    def context(self, text_states: Tensor, text_mask: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a whole request shares.

        text_states [B, N, E], text_mask [B, N] (1 for a token, 0 for padding), timesteps [T] ->
        embedding [T, B, D] (activated), text_kv [B, N, 2·sum of the attention layers' channels],
        attention_bias [B, 1, 1, N]; all fp32.
        """
        states = self.encoder_hid_proj(text_states)
        # Relative to the row's best, which no softmax sees: diffusers adds the same to all scores of an empty text.
        best = text_mask.sum(dim=1, keepdim=True).clamp(0, 1)
        bias = ((best - text_mask) * MASKED)[:, None, None, :]
        embedding = F.silu(self.time_embedding(timesteps)[:, None] + self.add_time_condition(states, bias)[None])
        return embedding, torch.cat([layer.text(states) for layer in self.cross_attentions()], dim=-1), bias

    def step(self, sample: Tensor, embedding: Tensor, text_kv: Tensor, attention_bias: Tensor) -> Tensor:
        """One denoising step: sample [B, 4, H, W], embedding [B, D] -> prediction [B, 4, H, W], fp32."""
        inputs = (sample, embedding, text_kv, attention_bias)
        x, embedding, text_kv, attention_bias = (tensor.to(self.conv_in.weight.dtype) for tensor in inputs)
        widths = [2 * layer.attention.to_k.out_features for layer in self.cross_attentions()]
        parts = iter(torch.split(text_kv, widths, dim=2))
        # The operator wants a scale and a shift. The exporter's own come from one that ONNX Runtime has no CUDA kernel
        # for in this opset, and these are in the graph once for all norms of a width.
        norms = {module.channels for module in self.modules() if isinstance(module, ConditionalNorm)}
        plain = {n: (torch.ones(n, device=x.device), torch.zeros(n, device=x.device)) for n in sorted(norms)}
        condition = Condition(embedding, plain)

        x, skips = self.conv_in(x), []
        for block in self.down_blocks:
            x = block(x, condition, parts, attention_bias)
            skips.append(x)
        skips.pop()  # the deepest level's output goes on by itself
        for i, block in enumerate(self.up_blocks):
            x = block(x if i == 0 else torch.cat([x, skips.pop()], dim=1), condition, parts, attention_bias)
        return cast("Tensor", self.conv_out(F.silu(self.conv_norm_out(x))).float())

    def forward(self, sample: Tensor, timestep: Tensor, text_states: Tensor, text_mask: Tensor) -> Tensor:
        """The undivided network, as diffusers runs it: one timestep [1] for the whole batch."""
        embedding, text_kv, attention_bias = self.context(text_states, text_mask, timestep)
        return self.step(sample, embedding[0], text_kv, attention_bias)
