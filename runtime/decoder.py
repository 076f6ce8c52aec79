"""The decoders: image embeddings to pictures, from noise, from a picture, around a mask, or along a hint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..engines.errors import BundleError, InputError
from ..engines.manifest import DecoderRecord, Role
from ..engines.session import Array
from .components import Components
from .embeds import Embeds
from .images import ImageLike, image_pixels, open_image, picture_size, to_array, to_pil
from .masks import hint_pixels, latent_mask
from .noise import Noise
from .prior import check_count, check_latents, check_scale, noise_source, row_noise
from .sampling import Callback, Inpaint, check_finite, denoise
from .schedulers import Scheduler, scheduler_from_config
from .transfer import to_device, to_host

DEFAULT_STRENGTH = 0.3
LATENT_CHANNELS = 4

# Mode -> what its UNet was trained for, and the checkpoint that has one.
ROLES: Mapping[Role, tuple[str, str]] = {
    "decoder": ("text-to-image and image-to-image", "kandinsky-2-2-decoder"),
    "inpaint": ("inpainting", "kandinsky-2-2-decoder-inpaint"),
    "controlnet": ("ControlNet", "kandinsky-2-2-controlnet-depth"),
}


@dataclass(frozen=True, eq=False)
class Result:
    """Pictures, and what made them.

    array: float32 [B, H, W, 3] in [0, 1]. latents: float32 [B, 4, H/8, W/8], final. seed: the one, or one a picture,
    that repeats them; None where the caller brought the noise.
    """

    array: NDArray[np.float32]
    latents: NDArray[np.float32] = field(repr=False)
    seed: int | tuple[int, ...] | None

    @cached_property
    def images(self) -> list[Image.Image]:
        """The pictures as PIL images."""
        return to_pil(self.array)


@dataclass(frozen=True, eq=False)
class Plan:
    """A request to a decoder, checked; height and width in pixels.

    pixels [N, 3, H, W] in [-1, 1] each serve an equal share of the batch; of mask [B, 1, H/8, W/8] (1 = keep) and hint
    [B, 3, H, W] each picture has its own row.
    """

    role: Role
    record: DecoderRecord
    scheduler: Scheduler
    embeds: Embeds
    height: int
    width: int
    timesteps: NDArray[np.int64]
    scale: float | None
    pixels: NDArray[np.float32] | None
    mask: NDArray[np.float32] | None
    hint: NDArray[np.float32] | None
    latents: NDArray[np.float32] | None

    @property
    def latents_shape(self) -> tuple[int, int, int, int]:
        """[B, 4, H/8, W/8]."""
        return len(self.embeds), LATENT_CHANNELS, self.height // self.record.scale, self.width // self.record.scale


class Decoder:
    """Image embeddings to pictures; the mode follows from what is given.

    Source: diffusers 0.42.1 `KandinskyV22Pipeline`, `...Img2ImgPipeline`, `...InpaintPipeline`, `...ControlnetPipeline`
    and `...ControlnetImg2ImgPipeline`.
    """

    def __init__(self, components: Components, records: Mapping[Role, DecoderRecord]) -> None:
        self._components, self._records = components, records
        configs = components.bundle.manifest.schedulers
        for record in records.values():  # a bundle with a scheduler that cannot be used is refused when it is loaded
            scheduler_from_config(configs[record.scheduler])

    def __call__(
        self,
        embeds: Embeds,
        *,
        image: ImageLike | Sequence[ImageLike] | None = None,
        mask: ImageLike | Sequence[ImageLike] | None = None,
        hint: ImageLike | Sequence[ImageLike] | None = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 100,
        guidance_scale: float = 4.0,
        count: int = 1,
        scheduler: str | None = None,
        seed: int | Sequence[int] | None = None,
        noise: Noise | None = None,
        latents: NDArray[Any] | None = None,
        callback: Callback | None = None,
    ) -> Result:
        """Pictures, `count` for each of the embeddings.

        image alone: image-to-image, going `strength` (0 to 1, default 0.3) of the way. image and mask: inpainting,
        white is painted. hint: ControlNet, with image too for image-to-image. One picture serves the whole batch, of
        several each an equal share of it. height, width: pixels, rounded up to a multiple of 64; by default those of
        the hint, else of the image, else what the checkpoint was trained for. scheduler: "ddpm", "ddim", "dpmpp-2m",
        by default the checkpoint's own. latents: the starting noise [B, 4, H/8, W/8]. seed: an int, or one a picture;
        noise: called as noise(shape) instead, once with the shape of the latents and then as the scheduler asks.

        Raises InputError for arguments that cannot be used, before any network runs; NumericalError for NaN.
        """
        plan = self.plan(
            embeds, image=image, mask=mask, hint=hint, strength=strength, height=height, width=width, steps=steps,
            guidance_scale=guidance_scale, count=count, scheduler=scheduler, latents=latents,
        )  # fmt: skip
        source = noise_source(seed, noise)
        final = self._denoise(plan, row_noise(source, len(plan.embeds)), callback)
        return Result(self._decode(plan.record, final), final, source.seed)

    def plan(
        self,
        embeds: Embeds,
        *,
        image: Any = None,
        mask: Any = None,
        hint: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 100,
        guidance_scale: float = 4.0,
        count: int = 1,
        scheduler: str | None = None,
        latents: NDArray[Any] | None = None,
    ) -> Plan:
        """Check a request; runs no network."""
        role, record = self._role(image, mask, hint)
        sampler = scheduler_from_config(self._components.bundle.manifest.schedulers[record.scheduler], scheduler)
        check_scale(guidance_scale)
        check_count(count)
        check_embeds(embeds, record.embedding_dim, negative=guidance_scale > 1)
        from_image = image is not None and mask is None
        if strength is not None and not from_image:
            raise InputError("strength: only with image= and without mask=, where there is a picture to start from")
        if latents is not None and from_image:
            raise InputError("latents and image were both given; an image replaces the starting noise")
        share = DEFAULT_STRENGTH if strength is None else strength
        images, masks, hints = (
            listed(name, given, len(embeds)) for name, given in (("image", image), ("mask", mask), ("hint", hint))
        )
        height, width = self._size(record, height, width, images, hints)
        kept = [
            latent_mask(each, height, width, record.scale, expected_size=own_size(of))
            for each, of in zip(masks, cycled(images, masks), strict=True)
        ]
        rows = len(embeds) * count
        plan = Plan(
            role=role,
            record=record,
            scheduler=sampler,
            embeds=embeds.repeated(count),
            height=height,
            width=width,
            timesteps=sampler.timesteps(steps, share if from_image else 1.0),
            scale=float(guidance_scale) if guidance_scale > 1 else None,
            pixels=stacked([image_pixels(each, height, width) for each in images], len(images)),
            mask=stacked(kept, rows),
            hint=stacked([hint_pixels(each, height, width) for each in hints], rows),
            latents=None,
        )
        return plan if latents is None else replace(plan, latents=check_latents(latents, plan.latents_shape))

    def _role(self, image: Any, mask: Any, hint: Any) -> tuple[Role, DecoderRecord]:
        """Which decoder the inputs ask for."""
        if mask is not None and image is None:
            raise InputError("mask: inpainting needs image= too, the picture to keep the rest of")
        if mask is not None and hint is not None:
            raise InputError("mask and hint were both given; no Kandinsky checkpoint takes both")
        role: Role = "inpaint" if mask is not None else "controlnet" if hint is not None else "decoder"
        if role not in self._records:
            purpose, checkpoint = ROLES[role]
            has = ", ".join(ROLES[known][0] for known in self._records) or "no decoder"
            raise BundleError(
                f"{self._components.bundle.folder} cannot do {purpose}: it has {has}; "
                f"export it with a checkpoint like {checkpoint} as well"
            )
        return role, self._records[role]

    def _size(
        self, record: DecoderRecord, height: int | None, width: int | None, images: Sequence[Any], hints: Sequence[Any]
    ) -> tuple[int, int]:
        """Height and width in pixels: those asked for, else of the hint, the picture, or the training."""
        default = (record.default_size, record.default_size)
        for picture in [*hints, *images][:1]:
            default = own_size(picture)
        return picture_size(
            default[0] if height is None else height, default[1] if width is None else width, record.size_multiple
        )

    def _denoise(self, plan: Plan, draw: Noise, callback: Callback | None) -> NDArray[np.float32]:
        """The final latents [B, 4, H/8, W/8]."""
        record, components = plan.record, self._components
        clean = None if plan.pixels is None else self._encode(record, plan.pixels, len(plan.embeds))
        start: Array = np.asarray(draw(plan.latents_shape)) if plan.latents is None else plan.latents
        with components.stage(plan.role, record.context):
            context = components.run(record.context, **self._context_inputs(plan))
        with components.stage(plan.role, record.step):
            step, context = components.placed(record.step, context)
            embedding, inpaint, x = context.pop("embedding"), None, start
            if clean is not None and plan.mask is not None:
                inpaint = Inpaint(*(to_device(array, embedding) for array in (clean, plan.mask, start)))
            elif clean is not None:
                x = plan.scheduler.add_noise(clean, start, int(plan.timesteps[0]))
            loop = denoise(
                step, plan.scheduler, x, plan.timesteps, embedding, context,
                scale=plan.scale, noise=draw, inpaint=inpaint,
            )  # fmt: skip
            for done, x in enumerate(loop, 1):
                if callback is not None:
                    callback("decoder", done, len(plan.timesteps), x)
        return to_host(x)

    def _context_inputs(self, plan: Plan) -> dict[str, NDArray[np.float32]]:
        """Inputs of the context graph, [negative; positive] with guidance."""
        embeds = plan.embeds
        rows = [embeds.image_embeds]
        if plan.scale is not None and embeds.negative_image_embeds is not None:
            rows.insert(0, embeds.negative_image_embeds)
        inputs = {"image_embeds": np.concatenate(rows), "timesteps": plan.timesteps.astype(np.float32)}
        if plan.hint is not None:
            inputs["hint"] = np.concatenate([plan.hint] * len(rows))
        return inputs

    def _encode(self, record: DecoderRecord, pixels: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
        """Pictures [N, 3, H, W] in [-1, 1] to latents [rows, 4, H/8, W/8], one at a time to bound memory."""
        with self._components.stage("movq encoder", record.movq_encoder):
            latents = np.concatenate([self._run(record.movq_encoder, pixels=each[None]) for each in pixels])
            check_finite(latents)
        return np.repeat(latents, rows // len(pixels), axis=0)

    def _decode(self, record: DecoderRecord, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Latents to pictures [B, H, W, 3] in [0, 1], one at a time to bound memory."""
        with self._components.stage("movq decoder", record.movq_decoder):
            return np.concatenate([to_array(self._run(record.movq_decoder, latents=row[None])) for row in latents])

    def _run(self, name: str, **inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """The one output of a component, on the host."""
        (output,) = self._components.run(name, **inputs).values()
        return to_host(output)


def listed(name: str, given: Any, batch: int) -> list[Any]:
    """Pictures as a list, each for an equal share of the batch; InputError where their number does not divide it."""
    if given is None:
        return []
    pictures = list(given) if isinstance(given, list | tuple) else [given]
    if not pictures or batch % len(pictures):
        raise InputError(
            f"{name}: expected one picture, or as many as share {batch} embeddings equally, found {len(pictures)}"
        )
    # A mask's own mode decides what is white, and an array's own size whether it is resized.
    return [each if name == "mask" or isinstance(each, np.ndarray) else open_image(each, name) for each in pictures]


def stacked(arrays: Sequence[NDArray[np.float32]], rows: int) -> NDArray[np.float32] | None:
    """Arrays [1, ...] as one with `rows` rows, each repeated in succession; None where there is none."""
    if not arrays:
        return None
    return np.repeat(np.concatenate(arrays), rows // len(arrays), axis=0)


def cycled(pictures: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """For each of `others` the one of `pictures` that it shares rows with (its first, where there are several)."""
    return [pictures[i * len(pictures) // len(others)] for i in range(len(others))] if pictures else []


def own_size(picture: Image.Image | NDArray[Any]) -> tuple[int, int]:
    """Height and width of a picture, or of an array [H, W], [H, W, C], [3, H, W] or [B, C, H, W]."""
    if not isinstance(picture, np.ndarray):
        return picture.height, picture.width
    if picture.ndim not in (2, 3, 4):
        raise InputError(f"image or hint: expected an array [H, W] or [H, W, 3], found {list(picture.shape)}")
    channels_first = picture.ndim == 4 or (picture.ndim == 3 and picture.shape[0] == 3)
    height, width = picture.shape[-2:] if channels_first else picture.shape[:2]
    return int(height), int(width)


def check_embeds(embeds: Any, dim: int, negative: bool) -> None:
    """Raise InputError unless they are Embeds of `dim` values a row, with negative ones where those are needed."""
    if not isinstance(embeds, Embeds):
        found = type(embeds).__name__
        raise InputError(f"embeds: expected what k.prior gives, or Embeds(image_embeds, ...), found {found}")
    if embeds.image_embeds.shape[1] != dim:
        found = embeds.image_embeds.shape[1]
        raise InputError(f"image_embeds: this decoder takes {dim} values a picture, found {found}")
    if negative and embeds.negative_image_embeds is None:
        raise InputError("negative_image_embeds: needed with a guidance_scale above 1; give them, or guidance_scale=1")
