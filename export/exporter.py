"""Checkpoints to a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..engines.errors import CheckpointError, InputError
from ..engines.manifest import Precision
from ..engines.session import Session
from .checkpoint import Checkpoint, open_checkpoint, roles
from .draft import Draft, save_arrays, save_manifest
from .network import STORAGES, Report, SourceNetwork, Writer
from .output import check_output, new_folder
from .stages import add_decoder, add_prior, add_tokenizers, network_sources, width

# Makes reference pictures from a finished folder and PyTorch sessions: name -> array, or nothing.
MakeReference = Callable[[Path, Mapping[str, Session]], Mapping[str, NDArray[Any]]]


def export_bundle(
    checkpoints: Sequence[str | Path],
    output: str | Path,
    *,
    precision: Precision = "fp32",
    storage: Precision | None = None,
    feature_reuse: bool = False,
    check: bool | None = None,
    revision: str | None = None,
    variant: str | None = None,
    overwrite: bool = False,
    report: Report = lambda _: None,
    make_reference: MakeReference | None = None,
) -> Path:
    """Make one bundle of one or more checkpoints and give its folder.

    Graphs compute in `precision`. `storage` is what weights are stored in (None: in `precision`): fp32 graphs may read
    weights of 16 bits, and all that they are compared with then has its weights rounded like theirs. `feature_reuse`
    gives every decoder the two graphs that a request with `reuse_interval` runs in place of its step.

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
    if feature_reuse:
        check_reuse(opened)
    sources = [network_sources(checkpoint, storage, feature_reuse) for checkpoint in opened]
    check_widths({c.name: networks for c, networks in zip(opened, sources, strict=True)})
    with new_folder(output, overwrite) as folder, closing(Writer(precision)) as writer:
        (folder / "weights").mkdir()
        draft = Draft(folder, precision, storage, check, report, writer)
        for checkpoint, networks in zip(opened, sources, strict=True):
            add_tokenizers(draft, checkpoint, networks)
        for checkpoint, networks in zip(opened, sources, strict=True):
            draft.start(networks, roles(checkpoint)[-1])
        for checkpoint, networks in zip(opened, sources, strict=True):
            for role in roles(checkpoint):
                if role == "prior":
                    add_prior(draft, checkpoint, networks)
                else:
                    add_decoder(draft, checkpoint, networks, role)
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


def check_reuse(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise InputError where none of the checkpoints has a network whose features can be used for several steps."""
    decoders = [checkpoint for checkpoint in checkpoints if "unet" in checkpoint.submodels]
    if not decoders:
        names = ", ".join(checkpoint.name for checkpoint in checkpoints)
        raise InputError(f"feature_reuse: it is for decoders, and there is none in {names}; leave it out")
    for checkpoint in decoders:
        network = checkpoint.submodels["unet"].class_name
        if network != "UNet2DConditionModel":
            raise InputError(
                f"feature_reuse: it is there for Kandinsky 2.1 and 2.2, and {checkpoint.name} has a {network}; "
                f"leave it out"
            )


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
    """Raise CheckpointError unless all networks, by checkpoint and submodel, agree on the widths of embeddings.

    Image embeddings are of one width in the whole bundle, the states and the embedding of a prompt in each decoder.
    """
    image: dict[str, int | None] = {}
    for name, networks in checkpoints.items():
        if "prior" in networks:
            text = networks["text_encoder"].config.values
            image[f"prior of {name}"] = networks["prior"].config.embedding_dim
            image[f"text_encoder of {name}"] = text["projection_dim"]
            image[f"text_encoder's hidden states of {name}"] = text["hidden_size"]
            image[f"image_encoder of {name}"] = networks["image_encoder"].config.values["projection_dim"]
        if "unet" in networks:
            image[f"unet of {name}"] = width(networks["unet"], "image_embeds")
        if "prompt_encoder" in networks:
            unet, encoder = networks["unet"], networks["prompt_encoder"]
            for tensor in ("text_states", "text_embeds"):
                check_equal({f"unet's {tensor} of {name}": width(unet, tensor),
                             f"prompt's text_encoder of {name}": width(encoder, tensor)})  # fmt: skip
    check_equal(image)


def check_equal(widths: Mapping[str, int | None]) -> None:
    """Raise CheckpointError unless all networks that have a width have the same."""
    found = {network: width for network, width in widths.items() if width is not None}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{network}: {width}" for network, width in found.items())
        raise CheckpointError(f"embeddings of different widths: {listed}; these networks do not belong together")
