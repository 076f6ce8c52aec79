"""The decoders: image embeddings, prompts or both to pictures, from noise or a picture, around a mask, along a hint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray
from PIL import Image

from ..engines.errors import InputError
from ..engines.manifest import DecoderRecord
from ..engines.session import Array
from .components import Components
from .embeds import Embeds
from .families import family_of
from .images import ImageLike, to_array, to_pil
from .noise import Noise, NoiseSource
from .plan import Plan, Request, make_plan, record_scheduler
from .prior import noise_source, row_noise
from .prompts import PromptEmbeds, PromptReader, Texts, request_texts
from .reuse import ReusedFeatures
from .sampling import Callback, Denoising, Inpaint, StepInputs, check_finite, denoising, driven
from .transfer import to_device, to_host

MASKED = -10000.0  # what the graphs add to the scores of padding


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
class Work:
    """A request to a decoder that was checked and not begun.

    embed: what runs the prior, whose embeddings take the place of the plan's; None where the plan's are those.
    """

    plan: Plan
    source: NoiseSource
    callback: Callback | None = None
    embed: Callable[[], Embeds] | None = None

    @property
    def draw(self) -> Noise:
        """What draws for its rows."""
        return row_noise(self.source, len(self.plan.conditions))

    def embedded(self) -> Work:
        """The same after the prior, which is run where it has not been."""
        if self.embed is None:
            return self
        conditions = replace(self.plan.conditions, embeds=self.embed())
        return replace(self, plan=replace(self.plan, conditions=conditions), embed=None)


class Decoder:
    """Image embeddings, prompts or both to pictures; the mode follows from what is given.

    Source: diffusers 0.42.1 `KandinskyV22Pipeline`, `...Img2ImgPipeline`, `...InpaintPipeline`, `...ControlnetPipeline`
    and `...ControlnetImg2ImgPipeline`; `KandinskyPipeline`, `...Img2ImgPipeline` and `...InpaintPipeline`;
    `Kandinsky3Pipeline` and `...Img2ImgPipeline`. What differs between them is in `runtime.families`.
    """

    def __init__(self, components: Components) -> None:
        self._components, manifest = components, components.bundle.manifest
        self._family = family_of(manifest)
        self._readers = {role: PromptReader(components, record) for role, record in manifest.prompts().items()}
        for record in manifest.decoders.values():  # a scheduler that cannot be used is refused when it is loaded
            record_scheduler(components.bundle, record, None)

    def __call__(
        self,
        embeds: Embeds | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: NDArray[Any] | None = None,
        attention_mask: NDArray[Any] | None = None,
        negative_prompt_embeds: NDArray[Any] | None = None,
        negative_attention_mask: NDArray[Any] | None = None,
        image: ImageLike | Sequence[ImageLike] | None = None,
        mask: ImageLike | Sequence[ImageLike] | None = None,
        hint: ImageLike | Sequence[ImageLike] | None = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        reuse_interval: int = 1,
        count: int = 1,
        scheduler: str | None = None,
        seed: int | Sequence[int] | None = None,
        noise: Noise | None = None,
        latents: NDArray[Any] | None = None,
        callback: Callback | None = None,
    ) -> Result:
        """Pictures, `count` for each of the embeddings, or for each prompt where only that is taken.

        embeds: of Kandinsky 2.x, what `k.prior` gives. prompt: of 2.1 beside them, each serving an equal share; of 3
        alone, or as states (`PromptEmbeds`) with their mask. image alone: image-to-image, going `strength` (0 to 1,
        default 0.3) of the way. image and mask: inpainting, white is painted. hint: ControlNet, with image too for
        image-to-image. One picture serves the whole batch, of several each an equal share of it. height, width:
        pixels, rounded up to a multiple of 64; by default those of the hint, else of the image, else what the
        checkpoint was trained for. steps, guidance_scale: by default the family's. guidance_interval: shares of the
        steps that are taken; guidance is applied at step i of n, from 0, where start <= i / n < end, and the others
        cost half (Kynkäänniemi et al. 2024, arXiv:2404.07724, in noise levels). reuse_interval: only every so many
        steps run the whole network, those between its outermost level (Ma et al. 2023, arXiv:2312.00858); it needs a
        bundle that was exported with feature_reuse. scheduler: "ddpm", "ddim", "dpmpp-2m", by default the checkpoint's
        own. latents: the starting noise [B, 4, H/8, W/8]. seed: an int, or one a picture; noise: called as
        noise(shape) instead, once with the shape of the latents and then as the scheduler asks.

        Raises InputError for arguments that cannot be used, before any network runs; NumericalError for NaN.
        """
        work = self.prepare(
            embeds, prompt=prompt, negative_prompt=negative_prompt, prompt_embeds=prompt_embeds,
            attention_mask=attention_mask, negative_prompt_embeds=negative_prompt_embeds,
            negative_attention_mask=negative_attention_mask, image=image, mask=mask, hint=hint, strength=strength,
            height=height, width=width, steps=steps, guidance_scale=guidance_scale,
            guidance_interval=guidance_interval, reuse_interval=reuse_interval, count=count, scheduler=scheduler,
            seed=seed, noise=noise, latents=latents, callback=callback,
        )  # fmt: skip
        return self.run(work)

    def prepare(
        self,
        embeds: Embeds | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        noise: Noise | None = None,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Work:
        """What `self(...)` is to do, by the same arguments, checked: for `run`, or for whoever drives several at once.

        Raises InputError for arguments that cannot be used; no network runs.
        """
        plan = make_plan(self._components.bundle, Request(embeds, **settings))
        self._components.check_memory(*plan.components)
        work = Work(plan, noise_source(seed, noise), callback)
        row_noise(work.source, len(plan.conditions))  # the number of seeds is checked too
        return work

    def run(self, work: Work) -> Result:
        """The pictures."""
        work = work.embedded()
        return self.finish(work, self._denoise(work.plan, work.draw, work.callback))

    def begin(self, plan: Plan, draw: Noise) -> Denoising:
        """The loop of a plan: what is run once a request has been run, the step graph is first opened by the loop."""
        record, components = plan.record, self._components
        told = self._texts(plan)
        clean = None if plan.pixels is None else self._encode(record, plan.pixels, len(plan.conditions))
        start: Array = np.asarray(draw(plan.latents_shape)) if plan.latents is None else plan.latents
        with components.stage(plan.role, record.context):
            context = components.run(record.context, **told, **self._context_inputs(plan))
        if record.prompt is not None and "text_kv" in context:
            context = padded(context, record.prompt.tokenizer.max_length)
        return self._loop(plan, draw, clean, start, context)

    def answers(self, plan: Plan) -> Callable[[StepInputs], Array]:
        """What answers the loop of a plan: where features are reused that loop alone, else any of the same decoder."""
        if plan.reuse is not None:
            return ReusedFeatures(self._components, plan.reuse, plan.reuse_interval).predict
        return lambda inputs: inputs.predicted(self._components[plan.record.step])

    def finish(self, work: Work, latents: Array) -> Result:
        """The pictures of final latents [B, 4, H/8, W/8]."""
        final = to_host(latents)
        return Result(self._decode(work.plan.record, final), final, work.source.seed)

    def encode_prompt(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None
    ) -> PromptEmbeds:
        """States of prompts [B, N, W] for `k(**vars(states))`, cut to the longest; only of Kandinsky 3.

        Raises InputError for a family whose decoder does not take them.
        """
        record = self._components.bundle.manifest.decoders.get("decoder")
        if record is None or record.prompt is None or record.embedding_dim is not None:
            raise InputError(f"encode_prompt: {self._family.title}'s decoder does not take prompt_embeds")
        texts = request_texts(prompt, negative_prompt, None, None)
        self._components.check_memory(record.prompt.encoder)
        return self._readers["decoder"].embeds(texts)

    def _denoise(self, plan: Plan, draw: Noise, callback: Callback | None) -> Array:
        """The final latents [B, 4, H/8, W/8]."""
        loop, x = self.begin(plan, draw), None
        with self._components.stage(plan.role, *plan.step_components):
            for done, x in enumerate(driven(loop, self.answers(plan)), 1):
                if callback is not None:
                    callback("decoder", done, len(plan.timesteps), x)
        return x

    def _loop(
        self, plan: Plan, draw: Noise, clean: Array | None, start: Array, context: Mapping[str, Array]
    ) -> Denoising:
        """The steps: from noise `start`, or from clean latents of a picture, both [B, 4, H/8, W/8]."""
        _, context = self._components.placed(plan.step_components[0], context)
        embedding, inpaint, x = context.pop("embedding"), None, start
        if clean is not None and plan.mask is not None:
            latents, mask, start = (to_device(array, embedding) for array in (clean, plan.mask, start))
            inpaint = Inpaint(latents, mask, start, self._family.pastes)
        elif clean is not None:
            x = self._family.start(plan.scheduler, clean, start, int(plan.timesteps[0]), plan.strength)
        loop = denoising(
            plan.scheduler, x, plan.timesteps, embedding, context,
            scale=plan.scale, noise=draw, interval=plan.interval, inpaint=inpaint,
        )  # fmt: skip
        return (yield from loop)

    def _texts(self, plan: Plan) -> dict[str, NDArray[np.float32]]:
        """What the context graph takes of texts, [negative; positive] with guidance; nothing where it reads none."""
        embeds, text = plan.conditions.embeds, plan.conditions.text
        if text is None:
            return {}
        reader = self._readers[plan.role]
        if isinstance(text, Texts) and embeds is not None:
            encoded = reader.encoded([*(text.negative or ()), *text.positive])
            return {name: encoded[name] for name in ("text_embeds", "text_states")}
        found = reader.embeds(text) if isinstance(text, Texts) else text
        states, mask = found.prompt_embeds, found.attention_mask
        if plan.scale is not None:
            negative = found.negatives()
            states, mask = np.concatenate([negative[0], states]), np.concatenate([negative[1], mask])
        return {"text_states": states, "text_mask": mask}

    def _context_inputs(self, plan: Plan) -> dict[str, NDArray[np.float32]]:
        """What the context graph takes beside texts, [negative; positive] with guidance."""
        inputs, embeds = {"timesteps": plan.timesteps.astype(np.float32)}, plan.conditions.embeds
        if embeds is not None:
            rows = [embeds.image_embeds]
            if plan.scale is not None and embeds.negative_image_embeds is not None:
                rows.insert(0, embeds.negative_image_embeds)
            inputs["image_embeds"] = np.concatenate(rows)
        if plan.hint is not None:
            inputs["hint"] = np.concatenate([plan.hint] * (1 if plan.scale is None else 2))
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


def padded(context: Mapping[str, Array], tokens: int) -> dict[str, Array]:
    """The context with keys and values of at least `tokens` tokens, those that are added masked.

    A softmax gives them exactly nothing. So the step graph sees one shape whatever the prompt's length: that of the
    context graph counts, whose pooling takes the mean of all tokens.
    """
    key_value, bias = context["text_kv"], context["attention_bias"]
    xp, place = array_namespace(key_value), device(key_value)
    rows, length, width = key_value.shape
    more = max(tokens - length, 0)
    zeros = xp.zeros((rows, more, width), dtype=key_value.dtype, device=place)
    masked = xp.full((rows, 1, 1, more), MASKED, dtype=bias.dtype, device=place)
    added = {"text_kv": xp.concat([key_value, zeros], axis=1), "attention_bias": xp.concat([bias, masked], axis=3)}
    return {**context, **added}
