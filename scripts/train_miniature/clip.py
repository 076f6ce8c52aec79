"""CLIP's two encoders: contrastive, with a linear reading of what the picture shows.

The reading (colour, shape and size at each place, background) asks of the image embedding what the decoders need to
find in it, and the patches are asked which shape they are part of: contrast alone would take many more pictures to
tell a heart from a diamond.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...export.modules.clip import CLIPConfig, ImageEncoder, TextEncoder
from ..miniature.world import COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Scene
from .batches import LOOSE, Words, captions, clip_input, pictures, scenes
from .configs import EMBEDDING, config

TEMPERATURE, MAX_SCALE = 0.07, 100.0
READING, PATCHES = 1.0, 2.0  # weights of the losses beside contrast
TABLES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES)}


class Encoders(nn.Module):
    """Both encoders, the temperature, and the reading of image embeddings, which is thrown away after training."""

    def __init__(self, tokenizer: Path) -> None:
        super().__init__()
        self.text = TextEncoder(CLIPConfig.from_dict(config("text_encoder", tokenizer)))
        self.image = ImageEncoder(CLIPConfig.from_dict(config("image_encoder")))
        self.scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))
        objects = {name: len(PLACES) * (len(table) + 1) for name, table in TABLES.items()}
        grounds = {"background": len(COLOURS), "texture": len(TEXTURES)}
        self.heads = nn.ModuleDict({name: nn.Linear(EMBEDDING, size) for name, size in (objects | grounds).items()})
        self.patches = nn.Linear(self.image.config.hidden_size, len(SHAPES) + 1)

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Image embeddings [B, D], and the shape at each patch [B, patches, shapes + 1], 0 for the background.

        Patches are read a layer before the last, so that the embedding can gather what they know.
        """
        out = self.image.network(pixel_values=clip_input(pixels), output_hidden_states=True)
        return out.image_embeds.float(), self.patches(out.hidden_states[-2][:, 1:])


class ContrastiveTask:
    """A caption should be nearer to its own picture than to any other of the batch, and the reverse."""

    def __init__(self, tokenizer: Path) -> None:
        torch.manual_seed(0)
        self.network = Encoders(tokenizer)
        self._words = Words(tokenizer)

    def losses(self, rng: np.random.Generator, batch: int, _progress: float) -> dict[str, Tensor]:
        """Contrast both ways, the reading, and how often the right caption is nearest."""
        drawn = scenes(rng, batch, float(rng.uniform(0, LOOSE)))
        image, patches = self.network.see(pictures(drawn))
        ids, mask = self._words(captions(drawn, rng))
        # Attention is causal and the embedding is the first end token's: padding after it changes nothing
        text, _ = self.network.text.encode(ids[:, : int(mask.sum(1).max())])
        with torch.autocast("cpu", enabled=False):  # near 1, bfloat16 tells too few cosines apart
            scores = F.normalize(image) @ F.normalize(text).T * self.network.scale.exp().clamp(max=MAX_SCALE)
        own = torch.arange(batch)
        contrast = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        reading = self._reading(image, drawn)
        shapes = self.network.heads["shape"](image).unflatten(1, (len(PLACES), -1))[..., 1:].argmax(-1) + 1
        wanted = labels(drawn, "shape")
        parts = F.cross_entropy(patches.flatten(0, 1).float(), patch_labels(drawn).flatten())
        return {
            "loss": contrast + READING * reading + PATCHES * parts,
            "contrast": contrast,
            "reading": reading,
            "patches": parts,
            "nearest": (scores.argmax(1) == own).float().mean(),
            "shapes": (shapes == wanted)[wanted > 0].float().mean(),
        }

    def _reading(self, image: Tensor, drawn: Sequence[Scene]) -> Tensor:
        heads = self.network.heads
        total = F.cross_entropy(heads["background"](image), indices(COLOURS, [s.background for s in drawn]))
        total = total + F.cross_entropy(heads["texture"](image), indices(TEXTURES, [s.texture for s in drawn]))
        for name, table in TABLES.items():
            scores = heads[name](image).reshape(-1, len(table) + 1)
            # a sum over places: seven of nine are empty, and soon known to be
            total = total + F.cross_entropy(scores, labels(drawn, name).flatten()) * len(PLACES) / 2
        return total


def indices(table: Iterable[str], words: Sequence[str]) -> Tensor:
    """Where words stand in a table."""
    order = list(table)
    return torch.tensor([order.index(word) for word in words])


def labels(drawn: Sequence[Scene], attribute: str) -> Tensor:
    """[B, places]: what stands at each place, 0 for nothing."""
    found = torch.zeros(len(drawn), len(PLACES), dtype=torch.long)
    for row, scene in enumerate(drawn):
        for figure in scene.objects:
            place = list(PLACES).index(figure.place)
            found[row, place] = 1 + TABLES[attribute].index(getattr(figure, attribute))
    return found


def patch_labels(drawn: Sequence[Scene]) -> Tensor:
    """[B, patches]: 1 + the shape whose square a patch's middle lies in, 0 for none."""
    cells = config("image_encoder")["image_size"] // config("image_encoder")["patch_size"]
    middles = (torch.arange(cells) + 0.5) / cells
    found = torch.zeros(len(drawn), cells, cells, dtype=torch.long)
    for row, scene in enumerate(drawn):
        for figure in scene.objects:
            across, down = ((middles - middle).abs() < figure.extent / 2 for middle in figure.centre)
            found[row, down[:, None] & across[None]] = 1 + SHAPES.index(figure.shape)
    return found.flatten(1)
