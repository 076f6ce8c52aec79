"""The prior: from a caption to the image embedding of a picture that fits it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...export.modules.clip import TextEncoder
from ...export.modules.prior import Prior, PriorConfig
from ...runtime.noise_schedule import NoiseSchedule
from .batches import Words, captions
from .configs import config
from .encoded import Encoded

NO_CAPTION_SHARE = 0.1  # for guidance
SCHEDULE = NoiseSchedule("squaredcos_cap_v2")  # of diffusers' UnCLIPScheduler


class PriorTask:
    """The clean embedding, normalised, is predicted from a noisy one and the caption."""

    def __init__(self, encoded: Encoded, text: TextEncoder, tokenizer: Path) -> None:
        torch.manual_seed(0)
        self.network = Prior(PriorConfig.from_dict(config("prior")))
        with torch.no_grad():
            self.network.clip_mean.copy_(encoded.image_embeds.mean(0, keepdim=True))
            self.network.clip_std.copy_(encoded.image_embeds.std(0, keepdim=True))
            for embedding in (self.network.positional_embedding, self.network.prd_embedding):
                embedding.normal_(std=0.02)
        self.network.clip_mean.requires_grad_(False)
        self.network.clip_std.requires_grad_(False)
        self._encoded, self._text, self._words = encoded, text.requires_grad_(False), Words(tokenizer)
        self._signal = torch.from_numpy(SCHEDULE.alphas_cumprod)

    def losses(self, rng: np.random.Generator, batch: int, _progress: float) -> dict[str, Tensor]:
        """Mean square error of the embedding."""
        rows = self._encoded.draw(rng, batch)
        clean = (self._encoded.image_embeds[rows] - self.network.clip_mean) / self.network.clip_std
        texts = captions(self._encoded.scenes(rows), rng)
        texts = ["" if rng.random() < NO_CAPTION_SHARE else text for text in texts]
        ids, mask = self._words(texts)
        with torch.no_grad():
            embeds, states = self._text.encode(ids)
        timesteps = torch.from_numpy(rng.integers(0, SCHEDULE.length, batch))
        signal = self._signal[timesteps, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * torch.randn_like(clean)
        embedding, prefix, bias = self.network.context(embeds, states, mask, timesteps)
        predicted = self.network.step(noisy, embedding, prefix, bias)
        error = (predicted - clean).square().mean(1)
        return {
            "loss": error.mean(),
            "from_noise": error[timesteps > 900].mean() if (timesteps > 900).any() else error.mean(),
        }
