"""Scenes as tensors: pictures, captions and hints, each decided by a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...runtime.clip_image import ImagePreprocess
from ...runtime.tokenizer import Tokenizer
from ..miniature.captions import caption, everything, phrase
from ..miniature.drawing import depth, draw_array
from ..miniature.trials import SIDE
from ..miniature.world import Scene, random_scene
from .configs import TOKENS

EVERYTHING_SHARE = 0.5
NEAT, LOOSE = 0.012, 0.04  # how far objects stray from their places


def scenes(rng: np.random.Generator, count: int, jitter: float = NEAT) -> list[Scene]:
    """Scenes of the training split."""
    return [random_scene(rng, "train", jitter=jitter) for _ in range(count)]


def pictures(drawn: Sequence[Scene]) -> Tensor:
    """Scenes as pixels [B, 3, SIDE, SIDE] in [-1, 1]."""
    array = np.stack([draw_array(scene, SIDE) for scene in drawn])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def hints(drawn: Sequence[Scene]) -> Tensor:
    """Depth of scenes [B, 3, SIDE, SIDE] in [0, 1]."""
    return torch.from_numpy(np.stack([depth(scene, SIDE) for scene in drawn]))[:, None].repeat(1, 3, 1, 1)


def clip_input(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as the image encoder takes them."""
    settings = ImagePreprocess()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    return ((pixels + 1) / 2 - mean) / std


def captions(drawn: Sequence[Scene], rng: np.random.Generator) -> list[str]:
    """A caption for each scene: half of them tell everything, the others what people tell."""
    return [
        phrase(everything(scene), rng) if rng.random() < EVERYTHING_SHARE else caption(scene, rng).text
        for scene in drawn
    ]


class Words:
    """Captions to token ids, as the runtime makes them."""

    def __init__(self, folder: Path) -> None:
        from ...export.tokenizer import export_tokenizer

        file = folder / "tokenizer.json"
        export_tokenizer(folder, file, max_length=TOKENS)
        self._tokenizer = Tokenizer(file, TOKENS)

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [B, TOKENS]; the mask is 1 for the caption's tokens."""
        tokens = self._tokenizer(list(prompts))
        return torch.from_numpy(tokens.input_ids), torch.from_numpy(tokens.attention_mask)
