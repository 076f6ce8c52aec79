"""A bundle loaded: prior, decoder, and both in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from ..engines.auto import Choice
from ..engines.bundle import open_bundle
from ..engines.errors import BundleError
from ..engines.manifest import Manifest, Precision
from ..engines.session import Session
from .components import Components, Memory
from .decoder import Decoder, Result
from .images import ImageLike
from .miniature import MINIATURE
from .noise import Noise
from .prior import Prior, check_scale, noise_source, row_noise
from .sampling import Callback


class Kandinsky:
    """A loaded bundle: `prior`, `decoder`, and `k(prompt, ...)` for both; use it as a context manager, or close it."""

    def __init__(self, components: Components) -> None:
        self._components = components
        manifest = components.bundle.manifest
        self._prior = None if manifest.prior is None else Prior(components, manifest.prior)
        self._decoder = Decoder(components, manifest.decoders)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._components.bundle.manifest

    @property
    def precision(self) -> Precision:
        """What the networks compute in."""
        return self._components.precision

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
                "checkpoint like kandinsky-2-2-prior as well, or pass image embeddings to the decoder"
            )
        return self._prior

    @property
    def decoder(self) -> Decoder:
        """Embeddings to pictures; raises BundleError where the bundle has no decoder."""
        if not self.manifest.decoders:
            raise BundleError(
                f"{self._components.bundle.folder} has no decoder, so it cannot make pictures; export it with a "
                "checkpoint like kandinsky-2-2-decoder as well"
            )
        return self._decoder

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: ImageLike | Sequence[ImageLike] | None = None,
        mask: ImageLike | Sequence[ImageLike] | None = None,
        hint: ImageLike | Sequence[ImageLike] | None = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 100,
        guidance_scale: float = 4.0,
        prior_steps: int = 25,
        prior_guidance_scale: float = 4.0,
        count: int = 1,
        scheduler: str | None = None,
        seed: int | Sequence[int] | None = None,
        noise: Noise | None = None,
        prior_latents: NDArray[Any] | None = None,
        latents: NDArray[Any] | None = None,
        callback: Callback | None = None,
    ) -> Result:
        """Pictures for one prompt or several: the decoder's result on the prior's, with noise drawn in that order.

        Arguments are those of `Prior.__call__` (prompt, negative_prompt, and the prior_ ones) and `Decoder.__call__`.
        Source: diffusers 0.42.1 `KandinskyV22CombinedPipeline` and its image-to-image and inpainting forms; there,
        `latents` go to the prior, which is `prior_latents` here.

        Raises InputError for arguments that cannot be used, before any network runs; NumericalError for NaN.
        """
        source = noise_source(seed, noise)
        settings: dict[str, Any] = {
            "image": image, "mask": mask, "hint": hint, "strength": strength, "height": height, "width": width,
            "steps": steps, "guidance_scale": guidance_scale, "scheduler": scheduler, "latents": latents,
        }  # fmt: skip
        prior, decoder = self.prior, self.decoder
        check_scale(prior_guidance_scale, "prior_guidance_scale")
        plan = decoder.plan(prior.placeholder(prompt, count), **settings)
        row_noise(source, len(plan.embeds))  # the number of seeds too is checked before the prior runs
        embeds = prior(
            prompt, negative_prompt=negative_prompt, steps=prior_steps, guidance_scale=prior_guidance_scale,
            count=count, noise=source, latents=prior_latents, callback=callback,
        )  # fmt: skip
        return decoder(embeds, **settings, noise=source, callback=callback)

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
