"""What conditions the UNet of Kandinsky 2.x: tokens to attend to, and a share of the timestep embedding.

Source: diffusers 0.42.1 `ImageProjection`, `TextImageProjection`, `ImageTimeEmbedding`, `ImageHintTimeEmbedding` and
`TextImageTimeEmbedding`; attribute names are their state dict's. Kandinsky 2.2 is conditioned by an image embedding,
2.1 by the text beside it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .layers import LayerNorm

LATENT_CHANNELS = 4
# Tokens that an image embedding becomes, without and with text beside it; and those of a text.
IMAGE_TOKENS, IMAGE_TOKENS_BESIDE_TEXT = 32, 10
TEXT_TOKENS = 77


class ImageProjection(nn.Module):
    """Image embedding [B, E] to tokens [B, IMAGE_TOKENS, C]."""

    def __init__(self, image_dim: int, channels: int) -> None:
        super().__init__()
        self.image_embeds = nn.Linear(image_dim, IMAGE_TOKENS * channels)
        self.norm = LayerNorm(channels)

    def forward(self, image_embeds: Tensor) -> Tensor:
        return cast("Tensor", self.norm(self.image_embeds(image_embeds).unflatten(-1, (IMAGE_TOKENS, -1))))


class TextImageProjection(nn.Module):
    """Image embedding [B, E] and text states [B, N, W] to tokens [B, IMAGE_TOKENS_BESIDE_TEXT + N, C], image first."""

    def __init__(self, image_dim: int, text_dim: int, channels: int) -> None:
        super().__init__()
        self.image_embeds = nn.Linear(image_dim, IMAGE_TOKENS_BESIDE_TEXT * channels)
        self.text_proj = nn.Linear(text_dim, channels)

    def forward(self, image_embeds: Tensor, text_states: Tensor) -> Tensor:
        image = self.image_embeds(image_embeds).unflatten(-1, (IMAGE_TOKENS_BESIDE_TEXT, -1))
        return torch.cat([image, self.text_proj(text_states)], dim=1)


class ImageEmbedding(nn.Module):
    """The image embedding's share of the timestep embedding, and a ControlNet's network for the hint."""

    HINT_CHANNELS = (3, 16, 16, 32, 32, 96, 96, 256, LATENT_CHANNELS)
    HINT_STRIDES = (1, 1, 2, 1, 2, 1, 2, 1)

    def __init__(self, image_dim: int, channels: int, hint: bool) -> None:
        super().__init__()
        self.image_proj = nn.Linear(image_dim, channels)
        self.image_norm = LayerNorm(channels)
        if hint:
            convolutions = [
                nn.Conv2d(a, b, 3, padding=1, stride=stride)
                for a, b, stride in zip(self.HINT_CHANNELS, self.HINT_CHANNELS[1:], self.HINT_STRIDES, strict=False)
            ]
            with_activations = [layer for convolution in convolutions for layer in (convolution, nn.SiLU())][:-1]
            self.input_hint_block = nn.Sequential(*with_activations)

    def forward(self, image_embeds: Tensor) -> Tensor:
        return cast("Tensor", self.image_norm(self.image_proj(image_embeds)))


class TextImageEmbedding(nn.Module):
    """Image embedding and pooled text embedding [B, E] each, as their share of the timestep embedding."""

    def __init__(self, image_dim: int, text_dim: int, channels: int) -> None:
        super().__init__()
        self.image_proj = nn.Linear(image_dim, channels)
        self.text_proj = nn.Linear(text_dim, channels)
        self.text_norm = LayerNorm(channels)

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        return cast("Tensor", self.image_proj(image_embeds) + self.text_norm(self.text_proj(text_embeds)))
