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
    def computes(self) -> Precision:
        """What the component's fp32 layers are to compute in."""
        return "fp32" if self.name in contexts(self.bundle.manifest) else self.precision


def contexts(manifest: Manifest) -> frozenset[str]:
    """The components that run once a request and embed timesteps, which takes fp32: see docs/bundle.md.

    Whatever precision is asked for, their fp32 layers stay in fp32.
    """
    names = {record.context for record in manifest.decoders.values()}
    return frozenset(names if manifest.prior is None else names | {manifest.prior.context})
