"""A bundle in the making: what has been written of it so far, and what it will say of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..engines.files import atomic_write
from ..engines.hashing import sha256_file
from ..engines.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Component,
    DecoderRecord,
    FileRecord,
    Manifest,
    Precision,
    PriorRecord,
    Role,
    Source,
    TokenizerRecord,
    encode_manifest,
)
from ..engines.session import Session
from .checkpoint import Checkpoint
from .network import Exported, Report, SourceNetwork, Writer, export_network, weights_path
from .weight_files import TensorToWrite, WeightsFile, write_safetensors

# Packages whose versions a manifest records, as far as they are installed.
TOOLS = ("kandrt", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu")

# Submodels that checkpoints of one family have in common: stored once where they are equal.
COMMON = ("movq", "prompt_encoder")


@dataclass
class Draft:
    """A bundle in the making."""

    folder: Path
    precision: Precision
    storage: Precision | None
    check: bool | None
    report: Report
    writer: Writer
    writing: dict[SourceNetwork, Future[WeightsFile]] = field(default_factory=dict)
    components: dict[str, Component] = field(default_factory=dict)
    weights: dict[str, FileRecord] = field(default_factory=dict)
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)
    decoders: dict[Role, DecoderRecord] = field(default_factory=dict)
    prior: PriorRecord | None = None
    tokenizer: TokenizerRecord | None = None
    prompt_tokenizers: dict[Role, TokenizerRecord] = field(default_factory=dict)
    image_processor: dict[str, Any] | None = None
    networks: list[SourceNetwork] = field(default_factory=list)
    # submodel, and hash of config and weights -> components
    common: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)

    def start(self, networks: Mapping[str, SourceNetwork], role: str) -> None:
        """Begin to write the weights of networks that are added later."""
        # In the order in which they are added.
        for key, source in sorted(networks.items(), key=lambda item: item[0] not in COMMON):
            # The name of one that others may have too is known when its content is: see add_common.
            file = f"weights/{role}.{key}.tmp" if key in COMMON else weights_path(source.job.name)
            self.writing[source] = self.writer.start(source, self.folder / file)

    def add(self, source: SourceNetwork) -> Exported:
        """Export a network into the bundle."""
        exported = export_network(source, self.folder, self.precision, self.check, self.report, self.writing[source])
        self.components.update(exported.components)
        self.weights[source.job.name] = exported.weights
        self.networks.append(source)
        return exported

    def add_common(self, key: str, source: SourceNetwork, role: str) -> dict[str, str]:
        """Components of a network that several decoders have: those of an equal one in the bundle, or new ones."""
        self.report(f"writing weights of {key}")
        written = self.writing[source].result()
        content = key, f"{source.config} {written.sha256}"
        if content in self.common:
            written.path.unlink()
            return self.common[content]
        if any(known == key for known, _ in self.common):
            components = {graph: f"{role}_{component}" for graph, component in source.job.components.items()}
            source.job = replace(source.job, name=f"{role}_{key}", components=components)
        written.path.rename(self.folder / weights_path(source.job.name))
        self.add(source)
        self.common[content] = dict(source.job.components)
        return self.common[content]

    def checked(self) -> bool:
        """Was every graph compared with its module."""
        return all(component.error is not None for component in self.components.values())

    def sessions(self) -> dict[str, Session]:
        """Every component under PyTorch."""
        return {name: session for source in self.networks for name, session in source.sessions().items()}

    def manifest(self, checkpoints: Sequence[Checkpoint]) -> Manifest:
        """What the finished bundle says of itself."""
        return Manifest(
            schema_version=SCHEMA_VERSION,
            family=checkpoints[0].family,
            precision=self.precision,
            components=self.components,
            weights=self.weights,
            schedulers=self.schedulers,
            sources=tuple(Source(c.name, c.class_name, c.revision, c.variant) for c in checkpoints),
            tools={tool: found for tool in TOOLS if (found := tool_version(tool)) is not None},
            prior=self.prior,
            decoders=self.decoders,
            tokenizer=self.tokenizer,
            image_processor=self.image_processor,
            storage=self.storage,
        )


def tool_version(tool: str) -> str | None:
    """Version of an installed package; None where it is not installed, such as onnxruntime under another name."""
    try:
        return version(tool)
    except PackageNotFoundError:
        return None


def save_arrays(folder: Path, file: str, arrays: Mapping[str, NDArray[Any]]) -> FileRecord:
    """Write float32 arrays as safetensors."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array, np.float32)) for name, array in arrays.items()}
    entries = [TensorToWrite(name, "float32", tuple(t.shape), t.detach) for name, t in tensors.items()]
    written = write_safetensors(folder / file, entries)
    return FileRecord(file, written.size, written.sha256)


def file_record(folder: Path, file: str) -> FileRecord:
    """Size and hash of a file of the bundle."""
    return FileRecord(file, (folder / file).stat().st_size, sha256_file(folder / file))


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json."""
    with atomic_write(folder / MANIFEST) as file:
        file.write(encode_manifest(manifest))
