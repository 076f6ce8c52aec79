"""The prior: text (and images) to CLIP image embeddings."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..engines.errors import BundleError, InputError
from ..engines.manifest import FamilyName, PriorRecord
from ..engines.session import Array
from .clip_image import ImagePreprocess, clip_pixels
from .components import Components
from .embeds import Embeds, checked
from .images import ImageLike
from .noise import Noise, NoiseSource, make_noise
from .sampling import Callback, check_finite, denoise
from .schedulers import Scheduler, scheduler_from_config
from .texts import TextCache
from .tokenizer import Tokenizer, check_prompts
from .transfer import to_host

DEFAULT_STEPS, DEFAULT_GUIDANCE_SCALE, DEFAULT_STRENGTH = 25, 4.0, 0.3


class Prior:
    """Text to image embeddings: `k.prior(prompt)`; from an image, `image=`; between several, `interpolate`.

    Source: diffusers 0.42.1 `KandinskyV22PriorPipeline` and `KandinskyV22PriorEmb2EmbPipeline`.
    """

    def __init__(self, components: Components, record: PriorRecord) -> None:
        self._components, self._record = components, record
        manifest = components.bundle.manifest
        self._family: FamilyName = manifest.family
        if manifest.tokenizer is None or manifest.image_processor is None:
            raise BundleError(f"{components.bundle.folder}: the prior has no tokenizer or image_processor")
        self._preprocess = ImagePreprocess.from_config(manifest.image_processor)
        self._tokenizer_record = manifest.tokenizer
        self._scheduler: Scheduler = scheduler_from_config(manifest.schedulers[record.scheduler])
        self._cache = TextCache()

    @property
    def components(self) -> tuple[str, ...]:
        """Those that it runs, the image encoder, which only pictures need, last."""
        record = self._record
        return record.text_encoder, record.context, record.step, record.image_encoder

    def forget(self) -> None:
        """Let go of what was kept of the empty prompt: the next request encodes it again."""
        self._cache = TextCache()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        record = self._tokenizer_record
        return Tokenizer(self._components.bundle.path(record.file), record.max_length)

    @cached_property
    def _statistics(self) -> dict[str, NDArray[np.float32]]:
        path = self._components.bundle.path(self._record.statistics)
        self._components.bundle.check_hashes([self._record.statistics])
        try:
            arrays: dict[str, NDArray[np.float32]] = load_file(path)
        except SafetensorError as error:
            raise BundleError(f"{path} is damaged: {error}; export the bundle again") from error
        return arrays

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: ImageLike | Sequence[ImageLike] | None = None,
        strength: float | None = None,
        steps: int = DEFAULT_STEPS,
        guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
        count: int = 1,
        seed: int | Sequence[int] | None = None,
        noise: Noise | None = None,
        latents: NDArray[Any] | None = None,
        callback: Callback | None = None,
    ) -> Embeds:
        """Image embeddings [prompts · count, D] for one prompt or several.

        image: start from this picture's embedding (an array [B, D] is one already) instead of noise, and go
        `strength` (0 to 1, default 0.3) of the way to the text. guidance_scale: above 1 for classifier-free guidance.
        latents: the starting noise [rows, D], rows doubled by a negative prompt. seed: an int, or one a picture;
        noise: called as noise(shape) instead, once with [rows, D], then once a step but the last.

        Raises InputError for arguments that cannot be used, before any network runs.
        """
        prompts = check_prompts(prompt)
        negatives = None if negative_prompt is None else self._negatives(negative_prompt, len(prompts))
        timesteps = self._scheduler.timesteps(steps, self._strength(image, strength))
        check_scale(guidance_scale)
        check_count(count)
        texts = [text for text in prompts + (negatives or []) for _ in range(count)]
        draw = row_noise(noise_source(seed, noise), len(texts), paired=negatives is not None)
        shape = (len(texts), self._record.embedding_dim)
        if latents is not None and image is not None:
            raise InputError("latents and image were both given; an image replaces the starting noise")
        start = None if latents is None else check_latents(latents, shape)
        pictures = [] if image is None else self._pictures(image, len(texts) // count)
        self._components.check_memory(*(self.components if pictures else self.components[:-1]))
        clean = self._image_embeds(pictures)
        x = np.asarray(draw(shape)) if start is None else start
        if clean:
            first = np.repeat(np.concatenate(clean), count, axis=0)
            x = self._scheduler.add_noise(np.tile(first, (len(x) // len(first), 1)), x, int(timesteps[0]))
        uncond = [text for text in (negatives or [""] * len(prompts)) for _ in range(count)]
        uncond = uncond * (len(texts) // len(uncond))
        x = self._sample(texts, uncond, x, timesteps, guidance_scale, draw, callback)
        if negatives is None:
            return Embeds(x, np.repeat(self._statistics["zero_image_embeds"], len(x), axis=0), self._family)
        return Embeds(x[: len(x) // 2], x[len(x) // 2 :], self._family)

    def placeholder(self, prompt: str | Sequence[str], count: int) -> Embeds:
        """Zeros of the shape that `self(prompt, count=count)` gives, to check what is to follow before it runs."""
        check_count(count)
        zeros = np.zeros((len(check_prompts(prompt)) * count, self._record.embedding_dim), np.float32)
        return Embeds(zeros, zeros, self._family)

    def _sample(
        self,
        texts: list[str],
        uncond: list[str],
        x: Array,
        timesteps: NDArray[np.int64],
        guidance_scale: float,
        draw: Noise,
        callback: Callback | None,
    ) -> NDArray[np.float32]:
        """Denoise the embeddings `x` [len(texts), D] and undo their normalisation."""
        scale = float(guidance_scale) if guidance_scale > 1 else None
        context, embedding = self._context(texts if scale is None else uncond + texts, timesteps)
        with self._components.stage("prior", self._record.step):
            step, context = self._components.placed(self._record.step, {"embedding": embedding, **context})
            embedding = context.pop("embedding")
            loop = denoise(step, self._scheduler, x, timesteps, embedding, context, scale=scale, noise=draw)
            for done, x in enumerate(loop, 1):
                if callback is not None:
                    callback("prior", done, len(timesteps), x)
            embeds = to_host(x) * self._statistics["clip_std"] + self._statistics["clip_mean"]
            check_finite(embeds)
        return embeds

    def _context(self, texts: list[str], timesteps: NDArray[np.int64]) -> tuple[dict[str, Array], Array]:
        """The step's inputs: a row for each of `texts`, and an embedding for each timestep."""
        shared: dict[str, Array] = {}

        def encode(run: list[str]) -> dict[str, Array]:
            tokens = self._tokenizer(run)
            with self._components.stage("text encoder", self._record.text_encoder):
                encoded = self._components.run(self._record.text_encoder, input_ids=tokens.input_ids)
                for array in encoded.values():
                    check_finite(array)
            with self._components.stage("prior", self._record.context):
                outputs = self._components.run(
                    self._record.context,
                    **encoded,
                    text_mask=tokens.attention_mask.astype(np.float32),
                    timesteps=timesteps.astype(np.float32),
                )
            shared["embedding"] = outputs.pop("embedding")
            return outputs

        return self._cache(texts, encode), shared["embedding"]

    def interpolate(
        self,
        images_and_prompts: Sequence[str | ImageLike],
        weights: Sequence[float],
        *,
        negative_prompt: str = "",
        negative_prior_prompt: str | None = None,
        steps: int = DEFAULT_STEPS,
        guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
        count: int = 1,
        seed: int | Sequence[int] | None = None,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Embeds:
        """The weighted sum of the embeddings of texts and pictures, [count, D].

        A str is a text; pictures are PIL images, arrays [H, W, 3], or paths as pathlib.Path; an array [1, D] is an
        embedding. Weights are used as they are: they should sum to 1. The noise is drawn for each text in turn and
        then for the negative prompt, as diffusers draws it.

        Raises InputError for what cannot be used, before any network runs.
        """
        texts, pictures = self._items(images_and_prompts, weights, count)
        check_scale(guidance_scale)
        check_prompts([negative_prompt], "negative_prompt")
        self._scheduler.timesteps(steps)
        rows, paired = count, negative_prior_prompt is not None
        if paired:
            check_prompts([negative_prior_prompt], "negative_prior_prompt")
        source = noise_source(seed, noise)
        row_noise(source, 2 * rows if paired else rows, paired=paired)
        settings: dict[str, Any] = {
            "negative_prompt": negative_prior_prompt, "steps": steps, "guidance_scale": guidance_scale, "count": count,
            "noise": source, "callback": callback,
        }  # fmt: skip
        embeds = dict(zip(pictures, self._image_embeds(list(pictures.values())), strict=True))
        total: NDArray[np.float32] = np.zeros((count, self._record.embedding_dim), np.float32)
        for i, weight in enumerate(weights):
            each = embeds[i] if i in embeds else self(texts[i], **settings).image_embeds
            total += each * np.float32(weight)
        if negative_prompt or paired:
            last = self(negative_prompt, **settings)
            return Embeds(total, last.image_embeds if negative_prompt else last.negative_image_embeds, self._family)
        # diffusers runs the prior for the empty prompt too and throws the result away: only its draws matter.
        for _ in range(1 + sum(map(self._scheduler.draws, self._scheduler.timesteps(steps).tolist()))):
            source((count, self._record.embedding_dim))
        return Embeds(total, np.repeat(self._statistics["zero_image_embeds"], count, axis=0), self._family)

    def embed(self, image: ImageLike | Sequence[ImageLike]) -> NDArray[np.float32]:
        """CLIP embeddings [B, D] of one picture or several."""
        return np.concatenate(self._image_embeds(self._pictures(image)))

    def _items(
        self, images_and_prompts: Any, weights: Any, count: int
    ) -> tuple[dict[int, str], dict[int, NDArray[np.float32]]]:
        """What `interpolate` mixes, checked: texts, and pictures as `_picture` gives them, by position."""
        check_count(count)
        if isinstance(images_and_prompts, str) or not isinstance(images_and_prompts, Sequence):
            found = type(images_and_prompts).__name__
            raise InputError(f"interpolate: expected a list of texts and pictures, found {found}")
        if not isinstance(weights, Sequence | np.ndarray):
            raise InputError(f"interpolate: expected a list of weights, found {type(weights).__name__}")
        if len(images_and_prompts) != len(weights) or not len(weights):
            raise InputError(
                "interpolate: expected one weight an item and one item or more, "
                f"found {len(images_and_prompts)} items and {len(weights)} weights"
            )
        if not all(is_number(weight) and math.isfinite(weight) for weight in weights):
            raise InputError(f"interpolate: expected finite weights, found {list(weights)}")
        texts = {i: item for i, item in enumerate(images_and_prompts) if isinstance(item, str)}
        if texts:
            check_prompts(list(texts.values()))
        pictures = {i: self._picture(item) for i, item in enumerate(images_and_prompts) if i not in texts}
        for picture in pictures.values():
            if len(picture) not in (1, count):
                raise InputError(f"interpolate: expected embeddings of 1 or {count} rows, found {len(picture)}")
        return texts, pictures

    def _pictures(self, image: Any, prompts: int | None = None) -> list[NDArray[np.float32]]:
        """Pictures as `_picture` gives them; InputError where they cannot be spread over `prompts` evenly."""
        pictures = [self._picture(each) for each in (image if isinstance(image, list | tuple) else [image])]
        if not pictures:
            raise InputError("image: expected a picture or a list of them, found an empty list")
        rows = sum(map(len, pictures))
        if prompts is not None and prompts % rows:
            raise InputError(
                f"image: cannot spread {rows} images over {prompts} prompts, the negative ones included; "
                "give one image, or one a prompt"
            )
        return pictures

    def _picture(self, image: Any) -> NDArray[np.float32]:
        """What `_image_embeds` takes: embeddings [B, D], or pixels for the image encoder [1, 3, H, W]."""
        dim = self._record.embedding_dim
        if isinstance(image, np.ndarray) and image.ndim == 2 and image.shape[1] == dim and image.dtype.kind == "f":
            return checked("image", image)
        if not isinstance(image, str | os.PathLike | Image.Image | np.ndarray):
            raise InputError(f"image: expected a picture, a path or an embedding, found {type(image).__name__}")
        return clip_pixels(image, self._preprocess)

    def _image_embeds(self, pictures: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Embeddings [B, D] of what `_picture` gave; encoded one at a time to bound memory."""
        if all(picture.ndim == 2 for picture in pictures):
            return list(pictures)
        with self._components.stage("image encoder", self._record.image_encoder):
            embeds = [p if p.ndim == 2 else self._encoded(p) for p in pictures]
            for each in embeds:
                check_finite(each)
        return embeds

    def _encoded(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """The embedding [1, D] of one picture."""
        return to_host(self._components.run(self._record.image_encoder, pixel_values=pixels)["image_embeds"])

    @staticmethod
    def _negatives(negative_prompt: str | Sequence[str], prompts: int) -> list[str]:
        negatives = check_prompts(negative_prompt, "negative_prompt")
        if len(negatives) == 1:
            return negatives * prompts
        if len(negatives) != prompts:
            raise InputError(
                f"negative_prompt: expected one, or one for each of {prompts} prompts, found {len(negatives)}"
            )
        return negatives

    @staticmethod
    def _strength(image: Any, strength: float | None) -> float:
        if image is None and strength is not None:
            raise InputError(f"strength: only with image=, found {strength} without one")
        if image is None:
            return 1.0
        return DEFAULT_STRENGTH if strength is None else strength


def noise_source(seed: int | Sequence[int] | None, noise: Noise | None) -> NoiseSource:
    """`make_noise`, except that a NoiseSource stays itself: several stages draw from one, and it knows its seeds."""
    return noise if isinstance(noise, NoiseSource) and seed is None else make_noise(seed, noise)


def row_noise(source: NoiseSource, rows: int, paired: bool = False) -> NoiseSource:
    """`source` for draws of `rows` rows; InputError where it has several seeds, and another number of them.

    paired: one seed may also serve the rows i and rows / 2 + i, an embedding and its negative one, and then gives
    them what it gives to these two alone.
    """
    if not isinstance(source.seed, tuple) or len(source.seed) == rows:
        return source
    if paired and len(source.seed) == rows // 2:
        return replace(
            source, draw=lambda shape: np.swapaxes(source((shape[0] // 2, 2, *shape[1:])), 0, 1).reshape(shape)
        )
    expected = rows // 2 if paired else rows
    raise InputError(f"seed: expected one, or one for each of {expected} pictures, found {len(source.seed)}")


def is_number(value: object) -> bool:
    """Whether it is a real number, Python's or NumPy's."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def check_scale(guidance_scale: float, name: str = "guidance_scale") -> None:
    """Raise InputError unless the scale is a finite number of 0 or more."""
    if not is_number(guidance_scale) or not 0 <= guidance_scale < math.inf:
        raise InputError(f"{name}: expected a number of 0 or more (1 and less: no guidance), found {guidance_scale!r}")


def check_count(count: int) -> None:
    """Raise InputError unless count is a whole number of 1 or more."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise InputError(f"count: expected a whole number of 1 or more, found {count!r}")


def check_latents(latents: Any, expected: tuple[int, ...]) -> NDArray[np.float32]:
    """`latents` as float32; InputError unless they are finite floats of the expected shape."""
    array = np.asarray(latents)
    if array.shape != expected or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise InputError(f"latents: expected finite floats {list(expected)}, found {array.dtype}{list(array.shape)}")
    return array.astype(np.float32)
