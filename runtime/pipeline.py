"""A bundle loaded: prior, decoder, and both in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from ..engines.auto import Choice
from ..engines.bundle import open_bundle
from ..engines.errors import BundleError, InputError
from ..engines.manifest import Manifest, Precision
from ..engines.session import Session
from .components import Components, Memory
from .decoder import Decoder, Result, Work
from .families import family_of
from .images import ImageLike
from .miniature import MINIATURE
from .noise import Noise, NoiseSource
from .plan import STATES
from .prior import Prior, check_scale, noise_source
from .prompts import PromptEmbeds
from .sampling import Callback
from .tokenizer import check_prompts


class Kandinsky:
    """A loaded bundle: `prior`, `decoder`, and `k(prompt, ...)` for both; use it as a context manager, or close it."""

    def __init__(self, components: Components) -> None:
        self._components = components
        manifest = components.bundle.manifest
        self._prior = None if manifest.prior is None else Prior(components, manifest.prior)
        self._decoder = Decoder(components)
        self._family = family_of(manifest)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._components.bundle.manifest

    @property
    def precision(self) -> Precision:
        """What the networks compute in."""
        return self._components.precision

    @property
    def memory(self) -> Memory:
        """Whether components are kept open between calls, or closed after their stage."""
        return self._components.memory

    @property
    def choices(self) -> Mapping[str, Choice]:
        """By component, the backend and device that run it, why, and what "auto" passed over."""
        return self._components.choices

    @property
    def opened(self) -> tuple[str, ...]:
        """Names of the components that are open."""
        return self._components.opened

    @property
    def prior(self) -> Prior:
        """Texts and pictures to embeddings; raises BundleError where the bundle has no prior."""
        if self._prior is None:
            raise BundleError(
                f"{self._components.bundle.folder} has no prior, so it cannot read prompts; export it with a "
                f"checkpoint like {self._family.checkpoint('prior')} as well, or pass image embeddings to the decoder"
            )
        return self._prior

    @property
    def decoder(self) -> Decoder:
        """Embeddings to pictures; raises BundleError where the bundle has no decoder."""
        if not self.manifest.decoders:
            raise BundleError(
                f"{self._components.bundle.folder} has no decoder, so it cannot make pictures; export it with a "
                f"checkpoint like {self._family.checkpoint('decoder')} as well"
            )
        return self._decoder

    def encode_prompt(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None
    ) -> PromptEmbeds:
        """`Decoder.encode_prompt`: states that `k(**vars(states))` takes in place of the prompt; Kandinsky 3 alone."""
        return self.decoder.encode_prompt(prompt, negative_prompt)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
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
        prior_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        count: int = 1,
        scheduler: str | None = None,
        seed: int | Sequence[int] | None = None,
        noise: Noise | None = None,
        prior_latents: NDArray[Any] | None = None,
        latents: NDArray[Any] | None = None,
        callback: Callback | None = None,
    ) -> Result:
        """Pictures for one prompt or several, `count` of each.

        Of Kandinsky 2.x the decoder's result on the prior's, with noise drawn in that order; of 3 the decoder's alone.
        Arguments are those of `Prior.__call__` (prompt, negative_prompt, and the prior_ ones: by default 25 steps and a
        scale of 4) and `Decoder.__call__`; 2.1's decoder reads the prompt too, and no negative one.
        Source: diffusers 0.42.1 `KandinskyV22CombinedPipeline`, `KandinskyCombinedPipeline`, their image-to-image and
        inpainting forms, and `Kandinsky3Pipeline`; in the former, `latents` go to the prior: `prior_latents` here.

        Raises InputError for arguments that cannot be used, before any network runs; NumericalError for NaN.
        """
        work = self.prepare(
            prompt, negative_prompt=negative_prompt, prompt_embeds=prompt_embeds, attention_mask=attention_mask,
            negative_prompt_embeds=negative_prompt_embeds, negative_attention_mask=negative_attention_mask, image=image,
            mask=mask, hint=hint, strength=strength, height=height, width=width, steps=steps,
            guidance_scale=guidance_scale, guidance_interval=guidance_interval, reuse_interval=reuse_interval,
            prior_steps=prior_steps, prior_guidance_scale=prior_guidance_scale, count=count, scheduler=scheduler,
            seed=seed, noise=noise, prior_latents=prior_latents, latents=latents, callback=callback,
        )  # fmt: skip
        return self.decoder.run(work)

    def prepare(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        prior_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        prior_latents: NDArray[Any] | None = None,
        count: int = 1,
        seed: int | Sequence[int] | None = None,
        noise: Noise | None = None,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Work:
        """What `self(...)` is to do, by the same arguments, checked as a whole: for `decoder.run`, or for a `Batch`.

        Raises InputError for arguments that cannot be used; no network runs.
        """
        of_prior = {"steps": prior_steps, "guidance_scale": prior_guidance_scale, "latents": prior_latents}
        of_prior = {name: value for name, value in of_prior.items() if value is not None}
        source = noise_source(seed, noise)
        if "prior" in self._family.checkpoints:
            given = [name for name in STATES if settings.get(name) is not None]
            if given:
                raise InputError(f"{' and '.join(given)}: {self._family.title} does not take them; Kandinsky 3 does")
            return self._with_prior(check_prompts(prompt), negative_prompt, count, of_prior, settings, source, callback)
        if of_prior:
            named = " and ".join(f"prior_{name}" for name in of_prior)
            raise InputError(f"{named}: {self._family.title} has no prior")
        return self.decoder.prepare(
            prompt=prompt, negative_prompt=negative_prompt, **settings, count=count, noise=source, callback=callback
        )

    def _with_prior(
        self,
        prompt: list[str],
        negative_prompt: str | Sequence[str] | None,
        count: int,
        of_prior: Mapping[str, Any],
        settings: dict[str, Any],
        source: NoiseSource,
        callback: Callback | None,
    ) -> Work:
        """The decoder's work on what the prior is to make of the prompts; checked as a whole before the prior runs."""
        prior, decoder = self.prior, self.decoder
        check_scale(of_prior.get("guidance_scale", 1.0), "prior_guidance_scale")
        if settings.get("guidance_scale") is None:  # diffusers' combined pipelines have one default for every mode
            settings["guidance_scale"] = self._family.guidance_scale
        if any(record.prompt is not None for record in self.manifest.decoders.values()):
            settings["prompt"] = prompt
        work = decoder.prepare(prior.placeholder(prompt, count), **settings, noise=source, callback=callback)
        self._components.check_memory(*prior.components[:-1], *work.plan.components)
        of_prior = {
            **of_prior, "negative_prompt": negative_prompt, "count": count, "noise": source, "callback": callback,
        }  # fmt: skip
        return replace(work, embed=lambda: prior(prompt, **of_prior))

    def close(self) -> None:
        """Close every open component; calling it again does nothing."""
        self._components.close()

    def __enter__(self) -> Kandinsky:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    bundle: str | Path | None = None,
    *,
    backend: str | Mapping[str, str] = "onnxruntime",
    device: str | Mapping[str, str] | None = None,
    precision: Precision | None = None,
    memory: Memory = "keep",
    threads: int | None = None,
    options: Mapping[str, str] | Mapping[str, Mapping[str, str]] | None = None,
    sessions: Mapping[str, Session] | None = None,
) -> Kandinsky:
    """Open a bundle, by default the miniature that comes with kandrt; components are opened when they are first used.

    backend: what runs the networks, a key of `engines.backends.BACKENDS` such as "onnxruntime" or "openvino"; "auto"
    for the best that can run here (`engines.auto` has its order, and `choices` of the result what it chose and why).
    device: where, such as "cpu" or "cuda"; by default the backend's first. Both may be mappings from component to name,
    in which "*" stands for the components not named: {"movq_decoder": "openvino"} leaves the others to the default.
    precision: what to compute in, by default what the bundle was exported in; "openvino" computes fp32 bundles in
    "bf16" too, their timestep embeddings apart. memory: "keep" leaves components open between calls, "stage" closes
    each after its stage, so that no two large ones are in memory together. threads: of the CPU, by default all.
    options: texts that are passed on to the engine library by its own names, or by backend such texts. sessions: run
    these in place of the bundle's components, by name; they take arrays as the others give them, unless they have a
    method `to_device(array)` that brings an array to where they compute.

    Nothing that is named here is replaced by anything else: what cannot run is an error. Raises BundleError for a
    damaged bundle, InputError and BackendError where backend, device, precision or options cannot be used.
    """
    components = Components(
        open_bundle(MINIATURE if bundle is None else bundle),
        backend,
        device,
        precision=precision,
        memory=memory,
        threads=threads,
        options=options,
        sessions=sessions,
    )
    return Kandinsky(components)
