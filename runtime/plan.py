"""A request to a decoder, and the same request checked: what is to be done, before any network runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..engines.bundle import Bundle
from ..engines.errors import BundleError, InputError
from ..engines.manifest import DecoderRecord, FeatureReuse, PromptRecord, Role
from .embeds import Embeds
from .families import FAMILIES, PURPOSES, Family, family_of
from .images import image_pixels, open_image, picture_size
from .masks import hint_pixels, latent_mask
from .prior import check_count, check_latents, check_scale, is_number
from .prompts import PromptEmbeds, Texts, request_texts
from .sampling import Interval, guided_steps
from .schedulers import Scheduler, scheduler_from_config, scheduler_of

DEFAULT_STRENGTH = 0.3
LATENT_CHANNELS = 4
TEXTS = ("prompt", "negative_prompt")
STATES = ("prompt_embeds", "attention_mask", "negative_prompt_embeds", "negative_attention_mask")


@dataclass(frozen=True, eq=False)
class Request:
    """What `Decoder.__call__` was asked, as it was given; it says what each means."""

    embeds: Any = None
    prompt: Any = None
    negative_prompt: Any = None
    prompt_embeds: Any = None
    attention_mask: Any = None
    negative_prompt_embeds: Any = None
    negative_attention_mask: Any = None
    image: Any = None
    mask: Any = None
    hint: Any = None
    strength: float | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    reuse_interval: int = 1
    count: int = 1
    scheduler: str | None = None
    latents: NDArray[Any] | None = None

    @property
    def from_image(self) -> bool:
        """Whether it is image-to-image."""
        return self.image is not None and self.mask is None


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the network is to be told, a row for each picture; the part that the decoder does not take is None."""

    embeds: Embeds | None
    text: Texts | PromptEmbeds | None

    def __len__(self) -> int:
        return len(self.embeds if self.embeds is not None else self.text or ())


@dataclass(frozen=True, eq=False)
class Plan:
    """A request to a decoder, checked; height and width in pixels.

    pixels [N, 3, H, W] in [-1, 1] each serve an equal share of the batch; of mask [B, 1, H/8, W/8] (1 = keep) and hint
    [B, 3, H, W] each picture has its own row. scale is None without guidance; interval, None for all steps, where it is
    applied. reuse, None where every step is a whole one, names what runs in place of the step graph.
    """

    role: Role
    record: DecoderRecord
    scheduler: Scheduler
    conditions: Conditions
    height: int
    width: int
    timesteps: NDArray[np.int64]
    strength: float
    scale: float | None
    interval: Interval | None
    reuse: FeatureReuse | None
    reuse_interval: int
    pixels: NDArray[np.float32] | None
    mask: NDArray[np.float32] | None
    hint: NDArray[np.float32] | None
    latents: NDArray[np.float32] | None

    @property
    def components(self) -> tuple[str, ...]:
        """The components that it runs, in order."""
        record, texts = self.record, isinstance(self.conditions.text, Texts)
        prompt = (record.prompt.encoder,) if record.prompt is not None and texts else ()
        encoder = () if self.pixels is None else (record.movq_encoder,)
        return (*prompt, *encoder, record.context, *self.step_components, record.movq_decoder)

    @property
    def step_components(self) -> tuple[str, ...]:
        """Those that it runs once a step, the whole network first."""
        return (self.record.step,) if self.reuse is None else (self.reuse.refresh, self.reuse.shallow)

    @property
    def latents_shape(self) -> tuple[int, int, int, int]:
        """[B, 4, H/8, W/8]."""
        scale = self.record.scale
        return len(self.conditions), LATENT_CHANNELS, self.height // scale, self.width // scale


def make_plan(bundle: Bundle, request: Request) -> Plan:
    """Check a request; raises InputError or BundleError."""
    family = family_of(bundle.manifest)
    role, record = decoder_for(bundle, request)
    sampler = record_scheduler(bundle, record, request.scheduler)
    default = family.image_guidance_scale if request.from_image else family.guidance_scale
    guidance_scale = default if request.guidance_scale is None else request.guidance_scale
    check_scale(guidance_scale)
    check_count(request.count)
    guided = guidance_scale > 1
    conditions = checked_conditions(family, record, request, guided)
    batch, what = len(conditions) // request.count, "prompts" if conditions.embeds is None else "embeddings"
    if request.strength is not None and not request.from_image:
        raise InputError("strength: only with image= and without mask=, where there is a picture to start from")
    if request.latents is not None and request.from_image:
        raise InputError("latents and image were both given; an image replaces the starting noise")
    strength = DEFAULT_STRENGTH if request.strength is None else request.strength
    images, masks, hints = (listed(name, getattr(request, name), batch, what) for name in ("image", "mask", "hint"))
    height, width = size(record, request, [*hints, *images])
    kept = [
        latent_mask(each, height, width, record.scale, expected_size=own_size(of))
        for each, of in zip(masks, cycled(images, masks), strict=True)
    ]
    rows, steps = len(conditions), family.steps if request.steps is None else request.steps
    timesteps = sampler.timesteps(steps, strength if request.from_image else 1.0)
    plan = Plan(
        role=role,
        record=record,
        scheduler=sampler,
        conditions=conditions,
        height=height,
        width=width,
        timesteps=timesteps,
        strength=strength,
        scale=float(guidance_scale) + family.guidance_offset if guided else None,
        interval=checked_interval(request.guidance_interval, len(timesteps), guided),
        reuse=checked_reuse(request.reuse_interval, bundle, role, record),
        reuse_interval=request.reuse_interval,
        pixels=stacked([image_pixels(each, height, width) for each in images], len(images)),
        mask=stacked(kept, rows),
        hint=stacked([hint_pixels(each, height, width) for each in hints], rows),
        latents=None,
    )
    latents = request.latents
    return plan if latents is None else replace(plan, latents=check_latents(latents, plan.latents_shape))


def checked_interval(interval: Any, steps: int, guided: bool) -> Interval | None:
    """Where guidance is applied, as two floats; InputError where it is none, where it is off, or at no step."""
    if interval is None:
        return None
    pair = isinstance(interval, list | tuple) and len(interval) == 2 and all(map(is_number, interval))
    if not pair or not 0 <= interval[0] < interval[1] <= 1:
        raise InputError(
            "guidance_interval: expected two numbers, start and end, with 0 <= start < end <= 1, shares of the steps; "
            f"found {interval!r}"
        )
    if not guided:
        raise InputError("guidance_interval: guidance is off; raise guidance_scale above 1, or leave it out")
    start, end = float(interval[0]), float(interval[1])
    if not any(guided_steps(steps, (start, end))):
        raise InputError(
            f"guidance_interval: none of {steps} steps begins in [{start:g}, {end:g}); widen it, take more steps, or "
            "turn guidance off with guidance_scale=1"
        )
    return start, end


def checked_reuse(interval: Any, bundle: Bundle, role: Role, record: DecoderRecord) -> FeatureReuse | None:
    """What runs in place of the step graph, None for an interval of 1; InputError where the bundle has no such."""
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise InputError(f"reuse_interval: expected a whole number of 1 or more, found {interval!r}")
    if interval == 1:
        return None
    if record.reuse is None:
        family, sources = family_of(bundle.manifest), bundle.manifest.sources
        if "prior" not in family.checkpoints:
            raise InputError(f"reuse_interval: {family.title} has no graphs for it; leave it out")
        checkpoints = " ".join(source.checkpoint for source in sources)
        raise InputError(
            f"reuse_interval: {bundle.folder} has no graphs for it in its {role}; export them as well: "
            f"kandrt export {checkpoints} --feature-reuse -o BUNDLE"
        )
    return record.reuse


def decoder_for(bundle: Bundle, request: Request) -> tuple[Role, DecoderRecord]:
    """Which decoder the inputs ask for."""
    family, records = family_of(bundle.manifest), bundle.manifest.decoders
    if request.mask is not None and request.image is None:
        raise InputError("mask: inpainting needs image= too, the picture to keep the rest of")
    if request.mask is not None and request.hint is not None:
        raise InputError("mask and hint were both given; no Kandinsky checkpoint takes both")
    role: Role = "inpaint" if request.mask is not None else "controlnet" if request.hint is not None else "decoder"
    checkpoint = family.checkpoint(role)
    if role not in records:
        has = ", ".join(PURPOSES[known] for known in records) or "no decoder"
        raise BundleError(
            f"{bundle.folder} cannot do {PURPOSES[role]}: it has {has}; "
            f"export it with a checkpoint like {checkpoint} as well"
        )
    return role, records[role]


def record_scheduler(bundle: Bundle, record: DecoderRecord, name: str | None) -> Scheduler:
    """The sampler of this name, by the configuration that the checkpoint has for it, else by its own scheduler's."""
    configs = [bundle.manifest.schedulers[each] for each in (record.scheduler, *record.schedulers)]
    own = next((config for config in configs if name is not None and scheduler_of(config) == name), configs[0])
    return scheduler_from_config(own, name)


def checked_conditions(family: Family, record: DecoderRecord, request: Request, guided: bool) -> Conditions:
    """What conditions the pictures, `request.count` rows for each; InputError for what this decoder does not take."""
    check_taken(f"{family.title}'s decoder", record, request)
    embeds = None
    if record.embedding_dim is not None:
        check_embeds(request.embeds, family, record, guided)
        embeds = request.embeds.repeated(request.count)
    if record.prompt is None:
        return Conditions(embeds, None)
    if request.prompt is None:
        return Conditions(embeds, checked_states(request, record.prompt))
    shared = None if embeds is None else len(request.embeds)
    found = request_texts(request.prompt, request.negative_prompt, shared, family.empty_text)
    return Conditions(embeds, (found if guided else replace(found, negative=None)).repeated(request.count))


def check_taken(decoder: str, record: DecoderRecord, request: Request) -> None:
    """Raise InputError for embeddings, texts and states that a decoder does not take, or not together."""
    texts, states = ([name for name in names if getattr(request, name) is not None] for names in (TEXTS, STATES))
    takes_embeds, takes_text = record.embedding_dim is not None, record.prompt is not None
    if request.embeds is not None and not takes_embeds:
        raise InputError(f"embeds: {decoder} takes a prompt and no image embeddings; call k(prompt)")
    if texts and not takes_text:
        raise InputError(
            f"{' and '.join(texts)}: {decoder} reads no text, only image embeddings; "
            "call k(prompt), or k.decoder(k.prior(prompt))"
        )
    if states and (takes_embeds or not takes_text):
        raise InputError(f"{' and '.join(states)}: {decoder} does not take them; Kandinsky 3 does")
    if takes_text and request.prompt is None and request.prompt_embeds is None:
        also = " beside the embeddings" if takes_embeds else ", or prompt_embeds with their attention_mask"
        raise InputError(f"prompt: {decoder} needs one{also}")
    for text, state in (("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds")):
        if text in texts and state in states:
            raise InputError(f"{text} and {state} were both given; give one of them")
    if "prompt" in texts and states:
        raise InputError(f"{' and '.join(states)}: only with prompt_embeds in place of the prompt")


def checked_states(request: Request, record: PromptRecord) -> PromptEmbeds:
    """The states that stand for prompts, `request.count` rows for each."""
    if request.negative_prompt is not None:
        raise InputError("negative_prompt: with prompt_embeds, give negative_prompt_embeds and their mask")
    found = PromptEmbeds(
        request.prompt_embeds,
        request.attention_mask,
        request.negative_prompt_embeds,
        request.negative_attention_mask,
    )
    _, tokens, width = found.prompt_embeds.shape
    if width != record.states_dim or tokens > record.tokenizer.max_length:
        raise InputError(
            f"prompt_embeds: this decoder takes up to {record.tokenizer.max_length} tokens of {record.states_dim} "
            f"values, found {tokens} of {width}"
        )
    return found.repeated(request.count)


def check_embeds(embeds: Any, family: Family, record: DecoderRecord, guided: bool) -> None:
    """Raise InputError unless they are Embeds of this family, with negative ones where those are needed."""
    if not isinstance(embeds, Embeds):
        found = "none" if embeds is None else "a prompt" if isinstance(embeds, str) else type(embeds).__name__
        also = "" if record.prompt is None else ", prompt=prompt"
        raise InputError(
            f"embeds: {family.title}'s decoder takes what k.prior gives, or Embeds(image_embeds, ...), found {found}; "
            f"call k(prompt), or k.decoder(k.prior(prompt){also})"
        )
    made = None if embeds.family is None else FAMILIES[embeds.family]
    if made is not None and made is not family:
        raise InputError(
            f"embeds: they are from a prior of {made.title}, and this is a decoder of {family.title}; "
            f"take those of its own prior, {family.checkpoint('prior')}"
        )
    if embeds.image_embeds.shape[1] != record.embedding_dim:
        found_dim = embeds.image_embeds.shape[1]
        raise InputError(f"image_embeds: this decoder takes {record.embedding_dim} values a picture, found {found_dim}")
    if guided and embeds.negative_image_embeds is None:
        raise InputError("negative_image_embeds: needed with a guidance_scale above 1; give them, or guidance_scale=1")


def size(record: DecoderRecord, request: Request, pictures: Sequence[Any]) -> tuple[int, int]:
    """Height and width in pixels: those asked for, else of the first of `pictures`, else of the training."""
    height, width = own_size(pictures[0]) if pictures else (record.default_size, record.default_size)
    return picture_size(
        height if request.height is None else request.height,
        width if request.width is None else request.width,
        record.size_multiple,
    )


def listed(name: str, given: Any, batch: int, what: str) -> list[Any]:
    """Pictures as a list, each for an equal share of a batch of `what`; InputError where they do not divide it."""
    if given is None:
        return []
    pictures = list(given) if isinstance(given, list | tuple) else [given]
    if not pictures or batch % len(pictures):
        raise InputError(
            f"{name}: expected one picture, or as many as share {batch} {what} equally, found {len(pictures)}"
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
