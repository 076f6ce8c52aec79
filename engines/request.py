"""What is asked of a backend: to open one component of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .bundle import Bundle
from .manifest import Component, Manifest, Precision


@dataclass(frozen=True)
class Request:
    """A component to open: by which backend, where, and how.

    precision is what is asked for of the bundle as a whole, threads those of the CPU (None: as many as it has cores),
    options what is passed on to the engine library by its own names.
    """

    bundle: Bundle
    name: str
    backend: str
    device: str
    precision: Precision
    threads: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def component(self) -> Component:
        """What the manifest says of the component."""
        return self.bundle.manifest.components[self.name]

    @property
    def graph(self) -> Path:
        """Where the component's graph lies."""
        return self.bundle.path(self.component.graph)

    @property
    def weights(self) -> tuple[Path, ...]:
        """Where the weights lie that the component's graph reads."""
        manifest = self.bundle.manifest
        return tuple(self.bundle.path(manifest.weights[name]) for name in self.component.weights)

    @property
    def computes(self) -> Precision:
        """What the component's fp32 layers are to compute in, those apart that `divided` says."""
        return "fp32" if self.name in contexts(self.bundle.manifest) and not self.divided else self.precision

    @property
    def divided(self) -> bool:
        """Whether what depends on timesteps is in fp32 and the rest in the precision asked for.

        Of the prior's context the rest is a whole transformer; only OpenVINO's backend can divide it.
        """
        prior = self.bundle.manifest.prior
        return self.backend == "openvino" and prior is not None and self.name == prior.context


def contexts(manifest: Manifest) -> frozenset[str]:
    """The components that run once a request and embed timesteps, which takes fp32: see docs/bundle.md.

    Whatever precision is asked for, their fp32 layers stay in fp32, or those that depend on timesteps do.
    """
    names = {record.context for record in manifest.decoders.values()}
    return frozenset(names if manifest.prior is None else names | {manifest.prior.context})


def autoencoders(manifest: Manifest) -> frozenset[str]:
    """The components between pictures and latents: they run once a request, and need more memory for what they compute
    than for their weights.
    """
    records = manifest.decoders.values()
    return frozenset(name for record in records for name in (record.movq_encoder, record.movq_decoder))


def text_encoders(manifest: Manifest) -> frozenset[str]:
    """The components that read prompts; they run once a request."""
    names = {record.prompt.encoder for record in manifest.decoders.values() if record.prompt is not None}
    return frozenset(names if manifest.prior is None else names | {manifest.prior.text_encoder})
