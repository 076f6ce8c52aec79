"""Checkpoints to a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from ..engines.errors import CheckpointError, InputError
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
from .checkpoint import Checkpoint, open_checkpoint, roles
from .network import STORAGES, Exported, Job, Report, SourceNetwork, Writer, export_network, weights_path
from .output import check_output, new_folder
from .tokenizer import export_tokenizer
from .weight_files import TensorToWrite, WeightsFile, write_safetensors

# Packages whose versions a manifest records, as far as they are installed.
TOOLS = ("kandrt", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu")

TOKENIZER = "tokenizer.json"
DEFAULT_SAMPLE_SIZE = 64  # latent side that all published checkpoints name

# Makes reference pictures from a finished folder and PyTorch sessions: name -> array, or nothing.
MakeReference = Callable[[Path, Mapping[str, Session]], Mapping[str, NDArray[Any]]]


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
    image_processor: dict[str, Any] | None = None
    networks: list[SourceNetwork] = field(default_factory=list)
    movqs: dict[str, dict[str, str]] = field(default_factory=dict)  # hash of config and weights -> components

    def start(self, networks: Mapping[str, SourceNetwork], role: str) -> None:
        """Begin to write the weights of networks that are added later."""
        # In the order in which they are added.
        for key, source in sorted(networks.items(), key=lambda item: item[0] != "movq"):
            # A MoVQ's name is known when its content is: see add_movq.
            file = f"weights/{role}.movq.tmp" if key == "movq" else weights_path(source.job.name)
            self.writing[source] = self.writer.start(source, self.folder / file)

    def add(self, source: SourceNetwork) -> Exported:
        """Export a network into the bundle."""
        exported = export_network(source, self.folder, self.precision, self.check, self.report, self.writing[source])
        self.components.update(exported.components)
        self.weights[source.job.name] = exported.weights
        self.networks.append(source)
        return exported

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
            family=checkpoints[0].family,  # type: ignore[arg-type]  # open_checkpoint gives supported families only
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


def export_bundle(
    checkpoints: Sequence[str | Path],
    output: str | Path,
    *,
    precision: Precision = "fp32",
    storage: Precision | None = None,
    check: bool | None = None,
    revision: str | None = None,
    variant: str | None = None,
    overwrite: bool = False,
    report: Report = lambda _: None,
    make_reference: MakeReference | None = None,
) -> Path:
    """Make one bundle of one or more checkpoints and give its folder.

    Graphs compute in `precision`. `storage` is what weights are stored in (None: in `precision`): fp32 graphs may read
    weights of 16 bits, and all that they are compared with then has its weights rounded like theirs.

    `check` compares every graph with its module (None: those of networks under 200 M parameters). `report` is told
    each piece of work as it starts. `make_reference` is called where every graph was checked. `output` must not exist
    unless `overwrite` is set and it is a bundle; it appears when it is complete, and after an error or an interruption
    nothing is left of it.

    Raises CheckpointError, InputError, OutputError or NumericalError.
    """
    storage = check_storage(precision, storage)
    output = Path(output).expanduser()
    check_output(output, overwrite)
    opened = [open_checkpoint(checkpoint, revision, variant) for checkpoint in checkpoints]
    check_together(opened)
    sources = [network_sources(checkpoint, storage) for checkpoint in opened]
    check_widths({c.name: networks for c, networks in zip(opened, sources, strict=True)})
    with new_folder(output, overwrite) as folder, closing(Writer(precision)) as writer:
        (folder / "weights").mkdir()
        draft = Draft(folder, precision, storage, check, report, writer)
        for checkpoint, networks in zip(opened, sources, strict=True):
            draft.start(networks, roles(checkpoint)[-1])
        for checkpoint, networks in zip(opened, sources, strict=True):
            for role in roles(checkpoint):
                if role == "prior":
                    add_prior(draft, checkpoint, networks)
                else:
                    add_decoder(draft, checkpoint, networks, cast("Role", role))
        manifest = draft.manifest(opened)
        save_manifest(folder, manifest)
        if make_reference is not None and draft.checked():
            report("making reference pictures")
            record = save_arrays(folder, "reference.safetensors", make_reference(folder, draft.sessions()))
            save_manifest(folder, replace(manifest, reference=record))
    return output


def check_storage(precision: Precision, storage: Precision | None) -> Precision | None:
    """What weights are stored in where that is not `precision`, else None; InputError for what there is not."""
    if precision not in STORAGES:
        raise InputError(f"precision: expected {' or '.join(map(repr, STORAGES))}, found {precision!r}")
    if storage is not None and storage not in STORAGES[precision]:
        raise InputError(
            f"storage: expected {' or '.join(map(repr, STORAGES[precision]))} for graphs in {precision}, "
            f"found {storage!r}; graphs in fp32 can read weights in fp16 or bf16"
        )
    return None if storage == precision else storage


def check_together(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise CheckpointError where checkpoints cannot share a bundle: two for one role, or of different families."""
    if not checkpoints:
        raise CheckpointError("no checkpoint given; expected at least one folder or hub id")
    taken: dict[str, str] = {}
    first = checkpoints[0]
    for checkpoint in checkpoints:
        if checkpoint.family != first.family:
            raise CheckpointError(
                f"one bundle holds one family: {first.name} is {first.family}, "
                f"{checkpoint.name} is {checkpoint.family}; export them to a bundle each"
            )
        for role in roles(checkpoint):
            if role in taken:
                raise CheckpointError(
                    f"two checkpoints for the role {role!r}: {taken[role]} and {checkpoint.name}; give one of them"
                )
            taken[role] = checkpoint.name


def check_widths(checkpoints: Mapping[str, Mapping[str, SourceNetwork]]) -> None:
    """Raise CheckpointError unless all networks, by checkpoint and submodel, agree on the width of image embeddings."""
    found: dict[str, int] = {}
    for name, networks in checkpoints.items():
        if "prior" in networks:
            text, image = (networks[key].config.values for key in ("text_encoder", "image_encoder"))
            found[f"prior of {name}"] = networks["prior"].config.embedding_dim
            found[f"text_encoder of {name}"] = text["projection_dim"]
            found[f"text_encoder's hidden states of {name}"] = text["hidden_size"]
            found[f"image_encoder of {name}"] = image["projection_dim"]
        if "unet" in networks:
            found[f"unet of {name}"] = networks["unet"].config.image_embed_dim
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{network}: {width}" for network, width in found.items())
        raise CheckpointError(f"embeddings of different widths: {listed}; these networks do not belong together")


def tool_version(tool: str) -> str | None:
    """Version of an installed package; None where it is not installed, such as onnxruntime under another name."""
    try:
        return version(tool)
    except PackageNotFoundError:
        return None


def network_sources(checkpoint: Checkpoint, storage: Precision | None = None) -> dict[str, SourceNetwork]:
    """Every network of a checkpoint by submodel, configs and tensor names checked before any work begins.

    `storage` is what weights are stored in where that is not what graphs compute in.
    """
    components: dict[str, tuple[str, dict[str, str]]] = {}
    for role in roles(checkpoint):
        if role == "prior":
            components["prior"] = "prior", {"context": "prior_context", "step": "prior_step"}
            components["text_encoder"] = "text_encoder", {"": "text_encoder"}
            components["image_encoder"] = "image_encoder", {"": "image_encoder"}
        else:
            components["unet"] = role, {"context": f"{role}_context", "step": f"{role}_step"}
            components["movq"] = "movq", {"encoder": "movq_encoder", "decoder": "movq_decoder"}
    return {
        key: SourceNetwork(Job(name, checkpoint.submodels[key], checkpoint.variant, graphs), storage)
        for key, (name, graphs) in components.items()
    }


def add_prior(draft: Draft, checkpoint: Checkpoint, networks: Mapping[str, SourceNetwork]) -> None:
    """Add prior, text and image encoder, tokenizer, scheduler, image preprocessing and statistics."""
    submodels = checkpoint.submodels
    draft.tokenizer = add_tokenizer(draft.folder, submodels["tokenizer"].folder, networks)
    for key in ("text_encoder", "prior", "image_encoder"):
        draft.add(networks[key])
    draft.report("embedding the zero image")
    draft.schedulers["prior"] = dict(submodels["prior_scheduler"].config)
    draft.image_processor = dict(submodels["image_processor"].config)
    draft.prior = PriorRecord(
        text_encoder="text_encoder",
        image_encoder="image_encoder",
        context="prior_context",
        step="prior_step",
        scheduler="prior",
        statistics=save_arrays(draft.folder, "weights/statistics.safetensors", statistics(networks)),
        embedding_dim=networks["prior"].config.embedding_dim,
    )


def add_tokenizer(folder: Path, source: Path, networks: Mapping[str, SourceNetwork]) -> TokenizerRecord:
    """Write tokenizer.json; CheckpointError where it, the text encoder and the prior differ in the number of tokens."""
    text = networks["text_encoder"].config.values
    positions, expected = text["max_position_embeddings"], networks["prior"].config.text_tokens
    info = export_tokenizer(source, folder / TOKENIZER, vocab_size=text["vocab_size"], max_length=positions)
    if {info.max_length, positions} != {expected}:
        raise CheckpointError(
            f"{source}: model_max_length is {info.max_length}, the text encoder has {positions} positions, "
            f"and the prior takes {expected} tokens; these must be equal"
        )
    return TokenizerRecord(file_record(folder, TOKENIZER), info.max_length, info.pad_token_id)


def statistics(networks: Mapping[str, SourceNetwork]) -> dict[str, NDArray[Any]]:
    """Mean and deviation of image embeddings, and the embedding of a zero pixel tensor.

    diffusers 0.42.1, `KandinskyV22PriorPipeline.get_zero_embed`: zeros stand for the normalised pixels, so this is not
    the embedding of a black picture.
    """
    encoder = networks["image_encoder"]
    (session,) = encoder.sessions().values()
    (spec,) = session.inputs
    zeros = np.zeros([1, *(axis for axis in spec.shape if isinstance(axis, int))], np.float32)
    prior = networks["prior"]
    return {
        "clip_mean": prior.read("clip_mean").float().numpy(),
        "clip_std": prior.read("clip_std").float().numpy(),
        "zero_image_embeds": session(**{spec.name: zeros})["image_embeds"],
    }


def add_decoder(draft: Draft, checkpoint: Checkpoint, networks: Mapping[str, SourceNetwork], role: Role) -> None:
    """Add UNet, MoVQ and scheduler; a MoVQ that the bundle has already is not stored again."""
    unet, movq = networks["unet"], add_movq(draft, networks["movq"], role)
    draft.add(unet)
    draft.schedulers[role] = dict(checkpoint.submodels["scheduler"].config)
    scale, size = networks["movq"].config.scale, checkpoint.submodels["unet"].config.get("sample_size")
    draft.decoders[role] = DecoderRecord(
        context=unet.job.components["context"],
        step=unet.job.components["step"],
        movq_encoder=movq["encoder"],
        movq_decoder=movq["decoder"],
        scheduler=role,
        embedding_dim=unet.config.image_embed_dim,
        scale=scale,
        # diffusers rounds sizes to scale² (64 pixels); a UNet with more levels than that allows needs its own multiple
        size_multiple=scale * max(unet.config.size_multiple, scale),
        # diffusers allows a pair as well, which no checkpoint has: it is only a default
        default_size=scale * (size if type(size) is int and size > 0 else DEFAULT_SAMPLE_SIZE),
    )


def add_movq(draft: Draft, source: SourceNetwork, role: str) -> dict[str, str]:
    """Components of a MoVQ: those of an equal one that the bundle has, or new ones."""
    draft.report("writing weights of movq")
    written = draft.writing[source].result()
    key = f"{source.config} {written.sha256}"
    if key in draft.movqs:
        written.path.unlink()
        return draft.movqs[key]
    if draft.movqs:
        components = {graph: f"{role}_{component}" for graph, component in source.job.components.items()}
        source.job = replace(source.job, name=f"{role}_movq", components=components)
    written.path.rename(draft.folder / weights_path(source.job.name))
    draft.add(source)
    draft.movqs[key] = dict(source.job.components)
    return draft.movqs[key]


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
