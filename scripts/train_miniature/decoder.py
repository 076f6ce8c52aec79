"""The UNets: latents from noise under an image embedding, around a mask, or along a depth hint.

The decoder is trained from nothing, the other two start from its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...export.modules.conditioning import LATENT_CHANNELS
from ...export.modules.unet import AddedKVAttention, ResnetBlock, UNet
from ...export.modules.unet_config import UNetConfig
from ...runtime.masks import latent_mask
from ...runtime.noise_schedule import NoiseSchedule
from ..miniature.masks import object_mask, random_mask
from ..miniature.trials import SIDE
from ..miniature.world import pick
from .batches import hints
from .configs import config
from .encoded import Encoded

Role = Literal["decoder", "inpaint", "controlnet"]

NO_EMBEDDING_SHARE = 0.1  # for guidance
EMBEDDING_NOISE = 0.1  # of each value's deviation: a prior's embeddings are not quite those of pictures
MAX_SNR = 5.0  # arXiv:2303.09556
SCHEDULE = NoiseSchedule("linear", 0.00085, 0.012)  # of the published decoders
OBJECT_MASK_SHARE = 0.5
BOUND = 1e-3  # weight of the bound, per step: less than the paper's, since no published sampler reads the variance


class DecoderTask:
    """The noise in noisy latents is predicted, and how much of it the reverse step should add."""

    def __init__(
        self, role: Role, encoded: Encoded, zero_embed: Tensor, start: Mapping[str, Tensor] | None = None
    ) -> None:
        torch.manual_seed(0)
        self.network = UNet(UNetConfig.from_dict(config(role)))
        quiet_start(self.network)
        if start is not None:
            self.network.load_state_dict(widened(start, self.network))
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._role, self._encoded, self._zero = role, encoded, zero_embed
        self._scatter = encoded.image_embeds.std(0)
        self._variance = encoded.latents.var()
        self._process = Process(SCHEDULE)

    def losses(self, rng: np.random.Generator, batch: int, _progress: float) -> dict[str, Tensor]:
        """Weighted mean square error of the noise, and the variational bound for the variance alone."""
        rows = self._encoded.draw(rng, batch)
        clean, embeds = self._encoded.latents[rows], self._encoded.image_embeds[rows]
        embeds = embeds + EMBEDDING_NOISE * self._scatter * torch.randn_like(embeds)
        dropped = torch.from_numpy(rng.random(batch) < NO_EMBEDDING_SHARE)
        embeds = torch.where(dropped[:, None], self._zero, embeds)
        timesteps = torch.from_numpy(rng.integers(0, SCHEDULE.length, batch))
        noise = torch.randn_like(clean)
        noisy = self._process.noisy(clean, noise, timesteps)
        hint = hints(self._encoded.scenes(rows)) if self._role == "controlnet" else None
        embedding, added_kv, *concat = self.network.context(embeds, timesteps, hint)
        if self._role == "inpaint":
            keep = self._masks(rng, rows)
            concat = [torch.cat([clean * keep, keep], dim=1)]
        embedding = embedding.diagonal(dim1=0, dim2=1).T  # the timestep of each row
        predicted, variance = self.network.step(noisy, embedding, added_kv, *concat).chunk(2, dim=1)
        error = (predicted - noise).square().mean((1, 2, 3))
        signal = self._process.signal[timesteps]
        weight = (MAX_SNR / (signal / (1 - signal) * self._variance)).clamp(max=1)
        bound = self._process.bound(clean, noisy, predicted.detach(), variance, timesteps)
        return {"loss": (weight * error).mean() + BOUND * bound, "error": error.mean(), "bound": bound}

    def _masks(self, rng: np.random.Generator, rows: Tensor) -> Tensor:
        """[B, 1, H, W]: 1 where the picture is kept; around objects or wherever they fall."""
        found = []
        for scene in self._encoded.scenes(rows):
            if rng.random() < OBJECT_MASK_SHARE:
                mask = object_mask(scene, pick(rng, tuple(range(len(scene.objects)))), SIDE, rng)
            else:
                mask = random_mask(rng, SIDE)
            found.append(torch.from_numpy(latent_mask(mask, SIDE, SIDE)))
        return torch.cat(found)


class Process:
    """Noising, and the variational bound of learned variances.

    Source: Improved DDPM (arXiv:2102.09672), equations 14 to 16; diffusers' "learned_range" reads the result. The last
    step too is judged by its divergence, with the variance of the step before, where the paper has a likelihood.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        signal = np.cumprod(1 - schedule.betas.astype(np.float64))
        before = np.append(1.0, signal[:-1])
        betas = schedule.betas.astype(np.float64)
        posterior = betas * (1 - before) / (1 - signal)

        def table(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values.astype(np.float32)).view(-1, 1, 1, 1)

        self.signal = torch.from_numpy(signal.astype(np.float32))
        self._alpha, self._sigma = table(np.sqrt(signal)), table(np.sqrt(1 - signal))
        self._clean_share = table(betas * np.sqrt(before) / (1 - signal))
        self._noisy_share = table((1 - before) * np.sqrt(1 - betas) / (1 - signal))
        self._least = table(np.log(np.append(posterior[1], posterior[1:])))
        self._most = table(np.log(betas))

    def noisy(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents at timesteps [B]."""
        return self._alpha[timesteps] * clean + self._sigma[timesteps] * noise

    def bound(self, clean: Tensor, noisy: Tensor, noise: Tensor, variance: Tensor, timesteps: Tensor) -> Tensor:
        """Divergence of the reverse step from the posterior, in nats a value; `variance` in [-1, 1] interpolates."""
        least, most = self._least[timesteps], self._most[timesteps]
        log_variance = least + (variance + 1) / 2 * (most - least)
        predicted = ((noisy - self._sigma[timesteps] * noise) / self._alpha[timesteps]).clamp(-1, 1)
        apart = self._clean_share[timesteps] * (clean - predicted)
        gap = least - log_variance
        return 0.5 * (-1 - gap + gap.exp() + apart.square() * (-log_variance).exp()).mean()


def quiet_start(network: UNet) -> None:
    """Start every residual branch and the output at zero."""
    for module in network.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, AddedKVAttention):
            nn.init.zeros_(module.to_out[0].weight)  # type: ignore[arg-type]
    nn.init.zeros_(network.conv_out.weight)
    network.conv_out.bias = nn.Parameter(torch.zeros(network.config.out_channels))


def widened(start: Mapping[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """Weights of the decoder for a UNet with more input channels, which say nothing at first, or a hint."""
    weights = network.state_dict() | dict(start)
    conv_in = torch.zeros_like(network.conv_in.weight)
    conv_in[:, :LATENT_CHANNELS] = start["conv_in.weight"]
    return weights | {"conv_in.weight": conv_in}
