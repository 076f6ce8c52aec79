"""What differs between the families: everything else of `kandrt.runtime` is the same for all of them.

What a decoder is conditioned by (image embeddings, a prompt, both) its manifest says; docs/families.md has all of it on
one page, what export does differently too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..engines.errors import BundleError
from ..engines.manifest import FamilyName, Manifest, Role
from .noise import Array
from .noise_schedule import NoiseSchedule
from .schedulers import Scheduler

Stage: TypeAlias = Literal["prior"] | Role

PURPOSES: Mapping[Stage, str] = {
    "prior": "prompts and pictures to embeddings",
    "decoder": "text-to-image and image-to-image",
    "inpaint": "inpainting",
    "controlnet": "ControlNet",
}
"""What each stage is for."""

# (scheduler, clean latents, noise, first timestep, strength) -> where image-to-image starts
Start: TypeAlias = Callable[[Scheduler, Array, Array, int, float], Array]


def start_at_first_timestep(scheduler: Scheduler, clean: Array, noise: Array, t: int, _strength: float) -> Array:
    """As noisy as the first timestep says."""
    return scheduler.add_noise(clean, noise, t)


def start_by_strength(_scheduler: Scheduler, clean: Array, noise: Array, _t: int, strength: float) -> Array:
    """As noisy as a table of its own says, betas from 1e-4 to 0.02, two timesteps below the strength.

    Source: diffusers 0.42.1 `KandinskyImg2ImgPipeline.add_noise`. Of strengths under 0.002, where that index would be
    negative, kandrt takes the first entry.
    """
    table = NoiseSchedule("linear", 1e-4, 0.02, 1000)
    return table.add_noise(clean, noise, max(int(table.length * strength) - 2, 0))


@dataclass(frozen=True)
class Family:
    """One generation of Kandinsky.

    checkpoints: by stage, the published checkpoint that has it; a stage that is absent the family does not have.
    steps, guidance_scale: defaults of the decoder; image_guidance_scale that of image-to-image.
    guidance_offset: what the scale is raised by in negative + scale · (positive - negative).
    start: where image-to-image starts. pastes: whether inpainting pastes the kept region back after every step.
    empty_text: what stands for a negative prompt where there is none; None for zeros in place of its states.

    Source: diffusers 0.42.1, `pipelines/kandinsky`, `kandinsky2_2` and `kandinsky3`.
    """

    title: str
    checkpoints: Mapping[Stage, str]
    steps: int = 100
    guidance_scale: float = 4.0
    image_guidance_scale: float = 4.0
    guidance_offset: float = 0.0
    start: Start = start_at_first_timestep
    pastes: bool = False
    empty_text: str | None = None

    def checkpoint(self, stage: Stage) -> str:
        """The published checkpoint of a stage; BundleError where the family has none, which says which others do."""
        if stage in self.checkpoints:
            return self.checkpoints[stage]
        others = (f"{family.title} does ({family.checkpoints[stage]})" for family in FAMILIES.values()
                  if stage in family.checkpoints)  # fmt: skip
        what = "prior" if stage == "prior" else PURPOSES[stage]
        raise BundleError(f"{self.title} has no {what}; {' and '.join(others)}")


FAMILIES: Mapping[FamilyName, Family] = {
    "kandinsky-2-1": Family(
        "Kandinsky 2.1",
        {"prior": "kandinsky-2-1-prior", "decoder": "kandinsky-2-1", "inpaint": "kandinsky-2-1-inpaint"},
        image_guidance_scale=7.0,
        start=start_by_strength,
        empty_text="",
    ),
    "kandinsky-2-2": Family(
        "Kandinsky 2.2",
        {
            "prior": "kandinsky-2-2-prior",
            "decoder": "kandinsky-2-2-decoder",
            "inpaint": "kandinsky-2-2-decoder-inpaint",
            "controlnet": "kandinsky-2-2-controlnet-depth",
        },
        pastes=True,
    ),
    "kandinsky-3": Family(
        "Kandinsky 3",
        {"decoder": "kandinsky-3"},
        steps=25,
        guidance_scale=3.0,
        image_guidance_scale=3.0,
        guidance_offset=1.0,
    ),
}


def family_of(manifest: Manifest) -> Family:
    """The family of a bundle."""
    return FAMILIES[manifest.family]
