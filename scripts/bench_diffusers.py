"""diffusers as a painter of the miniature, to judge its pictures beside kandrt's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..engines.errors import InputError, MissingExtraError
from .miniature.shapes import Float32
from .miniature.trials import SIDE
from .train_miniature.configs import CHECKPOINTS

SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpmpp-2m": "DPMSolverMultistepScheduler"}


class DiffusersPainter:
    """Checkpoints under diffusers in fp32; `settings` are kandrt's (steps, scheduler, guidance_scale)."""

    def __init__(self, checkpoints: Path, settings: dict[str, Any], threads: int | None = None) -> None:
        """Raises MissingExtraError without diffusers, InputError for a scheduler that has no counterpart there."""
        try:
            import diffusers
            import torch
        except ImportError as error:
            raise MissingExtraError("diffusers as a painter", "diffusers", "test") from error
        if settings["scheduler"] not in (None, *SCHEDULERS):
            raise InputError(f"scheduler: expected {', '.join(SCHEDULERS)}, found {settings['scheduler']!r}")
        if threads is not None:
            torch.set_num_threads(threads)
        diffusers.utils.logging.disable_progress_bar()
        self._diffusers: Any = diffusers
        self._torch: Any = torch
        self._folder, self._scheduler = checkpoints, settings["scheduler"]
        self._settings = {
            "num_inference_steps": settings["steps"], "guidance_scale": settings["guidance_scale"],
            "height": SIDE, "width": SIDE,
        }  # fmt: skip

    def _pipeline(self, class_name: str, role: str) -> Any:
        name = next(name for name in CHECKPOINTS if name.endswith(f"mini-{role}"))
        made = getattr(self._diffusers, class_name).from_pretrained(self._folder / name)
        if self._scheduler is not None and role != "prior":
            kind = getattr(self._diffusers, SCHEDULERS[self._scheduler])
            made.scheduler = kind.from_config(made.scheduler.config)
        made.set_progress_bar_config(disable=True)
        return made

    @cached_property
    def _prior(self) -> Any:
        return self._pipeline("KandinskyV22PriorPipeline", "prior")

    @cached_property
    def _decoder(self) -> Any:
        return self._pipeline("KandinskyV22Pipeline", "decoder")

    @cached_property
    def _controlnet(self) -> Any:
        return self._pipeline("KandinskyV22ControlnetPipeline", "controlnet-depth")

    @cached_property
    def _inpaint(self) -> Any:
        return self._pipeline("KandinskyV22InpaintPipeline", "decoder-inpaint")

    def _generators(self, seeds: Sequence[int]) -> list[Any]:
        return [self._torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def _embeds(self, prompts: Sequence[str], generators: list[Any]) -> dict[str, Any]:
        found = self._prior(list(prompts), generator=generators)
        return {"image_embeds": found.image_embeds, "negative_image_embeds": found.negative_image_embeds}

    def paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """A picture for each prompt."""
        generators = self._generators(seeds)
        pictures: list[Image.Image] = self._decoder(
            **self._embeds(prompts, generators), generator=generators, **self._settings
        ).images
        return pictures

    def follow(self, prompts: Sequence[str], hints: Sequence[Float32], seeds: Sequence[int]) -> list[Image.Image]:
        """A picture for each prompt along its hint."""
        generators = self._generators(seeds)
        hint = self._torch.from_numpy(np.stack(hints))[:, None].repeat(1, 3, 1, 1)
        pictures: list[Image.Image] = self._controlnet(
            **self._embeds(prompts, generators), hint=hint, generator=generators, **self._settings
        ).images
        return pictures

    def repaint(self, prompt: str, image: Image.Image, mask: Float32, seed: int) -> tuple[Image.Image, Image.Image]:
        """The image repainted, and as the autoencoder gives it back."""
        (generator,) = self._generators([seed])
        embeds = self._embeds([prompt], [generator])
        painted = self._inpaint(**embeds, image=image, mask_image=mask, generator=generator, **self._settings).images[0]
        movq = self._inpaint.movq
        pixels = self._torch.from_numpy(np.asarray(image.convert("RGB"), np.float32)).permute(2, 0, 1)[None]
        with self._torch.no_grad():
            decoded = movq.decode(movq.encode(pixels / 127.5 - 1).latents, force_not_quantize=True).sample
        array = ((decoded[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).round().byte().numpy()
        return painted, Image.fromarray(array)

    def between(self, first: str, second: str, shares: Sequence[float], seed: int) -> list[Image.Image]:
        """Pictures on the way from one prompt to another."""
        pictures = []
        for share in shares:
            (generator,) = self._generators([seed])
            found = self._prior.interpolate([first, second], [1 - share, share], generator=generator)
            (generator,) = self._generators([seed])
            pictures += self._decoder(
                image_embeds=found.image_embeds, negative_image_embeds=found.negative_image_embeds,
                generator=generator, **self._settings,
            ).images  # fmt: skip
        return pictures
