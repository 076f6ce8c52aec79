"""MoVQ: pictures to latents within about -1 and 1, and back.

Nothing is quantised, as Kandinsky never does; the codebook that the layout asks for is filled with latents of pictures.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...export.modules.movq import MoVQ, MoVQConfig, SpatialNorm
from ..miniature.trials import SIDE
from .batches import LOOSE, pictures, scenes
from .configs import config

CROP, CROPS_UNTIL, WHOLE_SHARE = 64, 0.75, 4  # small pieces first: four times as many fit a step
NOISE = 0.05  # on the latents, so that the small errors of denoising do not show
EDGES, BOUND = 1.0, 1.0  # weights of the losses beside the difference of pixels
CODES = 256


class AutoencoderTask:
    """Pictures should come back."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = MoVQ(MoVQConfig.from_dict(config("movq"))).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for norm in (module for module in self.network.modules() if isinstance(module, SpatialNorm)):
            norm.conv_y.bias = nn.Parameter(torch.ones(norm.conv_y.out_channels))

    def losses(self, rng: np.random.Generator, batch: int, progress: float) -> dict[str, Tensor]:
        """L1 and square of pixels' errors, L1 of their differences', and what keeps latents within -1 and 1."""
        if progress < CROPS_UNTIL:
            pixels = crops(pictures(scenes(rng, batch, LOOSE)), rng)
        else:
            pixels = pictures(scenes(rng, max(batch // WHOLE_SHARE, 1), LOOSE))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        latents = self.network.encode(pixels)
        decoded = self.network.decode(latents + NOISE * torch.randn_like(latents))
        error = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels)
        edges = sum(F.l1_loss(decoded.diff(dim=axis), pixels.diff(dim=axis)) for axis in (2, 3))
        bound = F.relu(latents.abs() - 0.9).square().mean()
        loss = error + EDGES * edges + BOUND * 10 * bound
        return {"loss": loss, "error": error, "edges": torch.as_tensor(edges), "spread": latents.std()}


def crops(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """A piece of CROP x CROP pixels of each picture, anywhere."""
    corners = rng.integers(0, SIDE - CROP + 1, (len(pixels), 2)).tolist()
    return torch.stack(
        [picture[:, y : y + CROP, x : x + CROP] for picture, (y, x) in zip(pixels, corners, strict=True)]
    )


def codebook(network: MoVQ) -> Tensor:
    """[CODES, 4]: latents of some pictures."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        cells = network.encode(pictures(scenes(rng, 16))).permute(0, 2, 3, 1).reshape(-1, 4)
    return cells[torch.from_numpy(rng.permutation(len(cells))[:CODES])]
