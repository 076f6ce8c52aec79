"""The decoders' training set: scenes as latents and image embeddings, worked out once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ...export.modules.clip import ImageEncoder
from ...export.modules.movq import MoVQ
from ..miniature.trials import SIDE
from ..miniature.world import Scene
from .batches import clip_input, pictures, scenes
from .loop import write_weights

CHUNK = 64  # scenes drawn from one seed, encoded at a time


@dataclass(frozen=True)
class Encoded:
    """latents [N, 4, 16, 16] fp32, image_embeds [N, D] fp32, of the scenes that `scene` gives."""

    latents: Tensor
    image_embeds: Tensor
    seed: int
    jitter: float

    def draw(self, rng: np.random.Generator, count: int) -> Tensor:
        """Which to train on."""
        return torch.from_numpy(rng.integers(0, len(self.latents), count))

    def scenes(self, rows: Tensor) -> list[Scene]:
        """The scenes of rows."""
        return [chunk_scenes(self.seed, row // CHUNK, self.jitter)[row % CHUNK] for row in rows.tolist()]


@cache
def chunk_scenes(seed: int, chunk: int, jitter: float) -> list[Scene]:
    """Scenes of one chunk."""
    return scenes(np.random.default_rng([seed, chunk]), CHUNK, jitter)


@torch.no_grad()
def encode(
    movq: MoVQ,
    encoder: ImageEncoder,
    path: Path,
    *,
    count: int,
    jitter: float,
    seed: int,
    bfloat16: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Encode `count` scenes into a file."""
    parts = []
    for chunk in range(math.ceil(count / CHUNK)):
        pixels = pictures(chunk_scenes(seed, chunk, jitter))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            parts.append((movq.encode(pixels.contiguous(memory_format=torch.channels_last)).contiguous(),
                          encoder.encode(clip_input(pixels))))  # fmt: skip
        if chunk % 20 == 0:
            report(f"encoded {chunk * CHUNK}/{count} scenes")
    latents, embeds = (torch.cat(part) for part in zip(*parts, strict=True))
    write_weights(path, {"latents": latents, "image_embeds": embeds})


def load(path: Path, *, jitter: float, seed: int) -> Encoded:
    """What `encode` wrote."""
    found = load_file(path)
    return Encoded(found["latents"], found["image_embeds"], seed, jitter)


def zero_embed(encoder: ImageEncoder) -> Tensor:
    """[1, D]: the embedding of zeros, which stands for no picture at all in guidance."""
    with torch.no_grad():
        return encoder.encode(torch.zeros(1, 3, SIDE, SIDE))
