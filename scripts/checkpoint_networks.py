"""The networks of a bundle's checkpoints under PyTorch, by the names that their graphs have in the bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.errors import CheckpointError
from .doctor import missing, pip_line
from .reference import Skipped

if TYPE_CHECKING:
    from ..engines.bundle import Bundle
    from ..engines.manifest import DecoderRecord, PriorRecord, Source
    from ..export.checkpoint import Checkpoint
    from ..export.torch_session import TorchSession


@dataclass(frozen=True)
class Reference:
    """A graph under PyTorch, and the axes whose lengths must be divisible by a number."""

    session: TorchSession
    multiples: Mapping[str, int]


def find_references(
    bundle: Bundle, checkpoints: Sequence[str], versions: tuple[str | None, str | None], skipped: list[Skipped]
) -> dict[str, Reference]:
    """PyTorch sessions by component, of the checkpoints given or else of those that the manifest names.

    Raises CheckpointError for a checkpoint given that cannot be used; one that only the manifest names is skipped.
    """
    lacking = missing("export")
    if lacking:
        skipped.append(Skipped("graphs against PyTorch", f"not installed: {', '.join(lacking)}; {pip_line('export')}"))
        return {}
    from ..export.checkpoint import open_checkpoint

    revision, variant = versions
    found: dict[str, Reference] = {}
    for name in checkpoints:
        found = references_of(bundle, open_checkpoint(name, revision, variant)) | found
    for source in bundle.manifest.sources if not checkpoints else ():
        with skip(f"graphs of {source.checkpoint}", skipped):
            found = (
                references_of(bundle, open_checkpoint(local_folder(source), None, variant or source.variant)) | found
            )
    return found


@contextmanager
def skip(what: str, skipped: list[Skipped]) -> Iterator[None]:
    """Note a checkpoint that cannot be used instead of failing."""
    try:
        yield
    except CheckpointError as error:
        skipped.append(Skipped(what, f"{error}; give it with --checkpoint"))


def local_folder(source: Source) -> Path:
    """Where a checkpoint lies; CheckpointError where it is not on this machine: verifying is no reason to download."""
    if source.revision is None:
        return Path(source.checkpoint)
    from ..export.checkpoint import cached

    return cached(source.checkpoint, source.revision)


def references_of(bundle: Bundle, checkpoint: Checkpoint) -> dict[str, Reference]:
    """PyTorch sessions of a checkpoint by the bundle's names; CheckpointError where the bundle has no use for it."""
    from ..export.checkpoint import roles
    from ..export.stages import network_sources

    if checkpoint.family != bundle.manifest.family:
        raise CheckpointError(
            f"{checkpoint.name} is a checkpoint of {checkpoint.family}; {bundle.folder} is of {bundle.manifest.family}"
        )
    records: dict[str, Any] = {"prior": bundle.manifest.prior} | {
        str(k): v for k, v in bundle.manifest.decoders.items()
    }
    unused = [role for role in roles(checkpoint) if records.get(role) is None]
    if unused:
        has = ", ".join(role for role, record in records.items() if record is not None)
        raise CheckpointError(f"{checkpoint.name} is a checkpoint for {', '.join(unused)}; {bundle.folder} has {has}")
    names = {key: each for role in roles(checkpoint) for key, each in components_of(records[role]).items()}
    found = {}
    for submodel, network in network_sources(checkpoint, bundle.manifest.storage).items():
        network.job = replace(network.job, components=names[submodel])
        sessions = network.sessions()
        for key, component in network.job.components.items():
            found[component] = Reference(sessions[component], network.graphs[key].multiples)
    return found


def components_of(record: PriorRecord | DecoderRecord) -> dict[str, dict[str, str]]:
    """The components of a stage, by the submodel that they are of and by what each does of it."""
    from ..engines.manifest import PriorRecord

    steps = {"context": record.context, "step": record.step}
    if isinstance(record, PriorRecord):
        encoders = {"text_encoder": {"": record.text_encoder}, "image_encoder": {"": record.image_encoder}}
        return {"prior": steps, **encoders}
    prompt = {} if record.prompt is None else {"prompt_encoder": {"": record.prompt.encoder}}
    steps |= asdict(record.reuse) if record.reuse else {}
    return {"unet": steps, "movq": {"encoder": record.movq_encoder, "decoder": record.movq_decoder}, **prompt}
