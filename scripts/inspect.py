"""`kandrt inspect`: what a bundle holds and can do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import Json, byte_progress, count_text, print_json, size_text, stdout, table
from .engines import engines_of
from .engines import show as show_engines

if TYPE_CHECKING:
    from rich.table import Table

    from ..engines.bundle import Bundle
    from ..engines.manifest import Component, DecoderRecord, Manifest, PriorRecord
    from ..runtime.families import Stage

USAGE = "BUNDLE"
EXAMPLE = "kandrt inspect my-bundle --check"


def command(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="Folder that `kandrt export` made.", show_default=False)
    ],
    check: Annotated[bool, typer.Option("--check", help="Read every file and compare its hash.")] = False,
    json: Json = False,
) -> None:
    """Show what a bundle holds: what it can do, its graphs and weights, and what it was made from."""
    from ..engines.bundle import open_bundle

    opened = open_bundle(bundle)
    if check:
        check_files(opened)
    if json:
        manifest = opened.manifest
        size, can = total_size(manifest), modes(manifest)
        print_json(
            {"bundle": str(bundle), "size": size, "modes": can, "stages": stages(manifest), "memory": memory(manifest)}
            | {"checked": check, "manifest": manifest, "engines": engines_of(opened)}
        )
    else:
        show(opened, check)


def check_files(bundle: Bundle) -> None:
    """Compare every hash, with a bar; raises BundleError that lists the files that are not what the manifest says."""
    with byte_progress("checking files", total_size(bundle.manifest)) as progress:
        bundle.check_hashes(progress=progress)


def total_size(manifest: Manifest) -> int:
    """Bytes of all files of a bundle, manifest.json apart."""
    return sum(record.size for record in manifest.files().values())


def modes(manifest: Manifest) -> list[str]:
    """What a bundle can do."""
    from ..runtime.families import PURPOSES

    prior = ["text to embeddings", "embeddings from a picture", "interpolation"] if manifest.prior else []
    return prior + [PURPOSES[role] for role in manifest.decoders]


def stages(manifest: Manifest) -> dict[Stage, dict[str, Any]]:
    """Of each stage that a bundle has: what it takes, its schedulers, and of these the checkpoint's own."""
    found: dict[Stage, dict[str, Any]] = {}
    for stage, record in records(manifest).items():
        own, others = schedulers(manifest, record.scheduler)
        further = [schedulers(manifest, name)[0] for name in getattr(record, "schedulers", ())]
        found[stage] = {"takes": takes(record), "schedulers": [own, *others], "own_schedulers": [own, *further]}
    return found


def records(manifest: Manifest) -> dict[Stage, PriorRecord | DecoderRecord]:
    """The stages that a bundle has."""
    found: dict[Stage, PriorRecord | DecoderRecord] = {} if manifest.prior is None else {"prior": manifest.prior}
    found.update(manifest.decoders.items())
    return found


def takes(record: PriorRecord | DecoderRecord) -> list[str]:
    """What a stage is told to make something of."""
    from ..engines.manifest import PriorRecord

    if isinstance(record, PriorRecord):
        return ["prompt", "picture"]
    embeds = [] if record.embedding_dim is None else ["embeddings"]
    return embeds if record.prompt is None else [*embeds, "prompt"]


def schedulers(manifest: Manifest, name: str) -> tuple[str, list[str]]:
    """The scheduler of a configuration in the manifest, and those that can be asked for in its place."""
    from ..runtime.schedulers import SCHEDULERS, scheduler_of

    config = manifest.schedulers[name]
    own = scheduler_of(config) or str(config.get("_class_name"))
    return own, [] if own == "unclip" else [name for name in SCHEDULERS if name not in ("unclip", own)]


def memory(manifest: Manifest) -> dict[str, int]:
    """Bytes of memory that the weights take by the mode of `kandrt generate --memory`, where no features are reused."""
    from ..engines.memory import weights_memory

    pairs = [name for record in manifest.decoders.values() if record.reuse for name in asdict(record.reuse).values()]
    names = [name for name in manifest.components if name not in pairs]
    return {
        "keep": weights_memory(manifest, names),
        "stage": max(weights_memory(manifest, [name]) for name in names),
    }


def show(bundle: Bundle, checked: bool) -> None:
    """Print it for people."""
    manifest, out = bundle.manifest, stdout()
    size = f"{size_text(total_size(manifest))} in {len(manifest.files())} files"
    stored = "" if manifest.storage is None else f", weights stored in {manifest.storage}"
    hashes = ", all hashes right" if checked else ""
    out.print(f"[bold]{manifest.family}[/] {manifest.precision}{stored}, {size}{hashes}")
    out.print(str(bundle.folder), markup=False, soft_wrap=True)
    out.print()
    out.print(role_table(manifest))
    told = {stage: " and ".join(facts["takes"]) for stage, facts in stages(manifest).items() if stage != "prior"}
    for what in dict.fromkeys(told.values()):
        if what != "embeddings":  # as in most families
            by = ", ".join(stage for stage in told if told[stage] == what)
            out.print(f"{by}: conditioned by {what}", style="dim")
    reused = [role for role, record in manifest.decoders.items() if record.reuse]
    if reused:
        out.print(f"{', '.join(reused)}: features can be reused (--reuse-interval)", style="dim")
    out.print()
    out.print(component_table(manifest))
    show_quantized(manifest)
    needed = memory(manifest)
    out.print(
        f"weights in memory: {size_text(needed['keep'])}, "
        f"a network at a time {size_text(needed['stage'])} (--memory stage)",
        style="dim",
    )
    out.print()
    sources = table("made from", "revision", "kind")
    for source in manifest.sources:
        sources.add_row(
            source.checkpoint.replace("[", r"\["), (source.revision or "")[:12] or "local folder", source.kind
        )
    out.print(sources)
    out.print()
    out.print(
        "made with " + ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items()),
        style="dim",
        markup=False,
    )
    kept = "holds reference pictures" if manifest.reference else "holds no reference pictures"
    out.print(f"{kept} for kandrt verify", style="dim")
    engines = engines_of(bundle)
    if engines.found or engines.damaged:
        out.print()
        show_engines(engines, bundle.folder)


def role_table(manifest: Manifest) -> Table:
    """What the bundle can do and cannot, and with which schedulers."""
    from ..runtime.families import PURPOSES, family_of

    made, known = table("role", "can do", "scheduler", "or"), stages(manifest)
    for stage, checkpoint in family_of(manifest).checkpoints.items():
        if stage in known:
            own, *others = known[stage]["schedulers"]
            listed = [f"{name} (own)" if name in known[stage]["own_schedulers"] else name for name in others]
            made.add_row(stage, PURPOSES[stage], own, ", ".join(listed))
        else:
            made.add_row(stage, f"no; needs {checkpoint}", style="dim")
    return made


def component_table(manifest: Manifest) -> Table:
    """Every graph with precision, parameters, sizes and error; a weights file's size stands at its first reader."""
    made = table("component", "type", ">parameters", ">graph", "weights", ">size", ">error")
    shown: set[str] = set()
    for name, component in manifest.components.items():
        new = [weights for weights in component.weights if weights not in shown]
        size = size_text(sum(manifest.weights[weights].size for weights in new)) if new else "shared"
        shown.update(new)
        made.add_row(
            name, type_text(component), count_text(component.parameters), size_text(component.graph.size),
            ", ".join(component.weights), size, error_text(component),
        )  # fmt: skip
    return made


def type_text(component: Component) -> str:
    """What a graph computes in."""
    return component.precision if component.quantization is None else f"int8, {component.precision}"


def error_text(component: Component) -> str:
    """A graph's error as it was measured at export, or when it was quantized."""
    if component.quantization is not None:
        return f"{component.quantization.error:.1e}"
    return "not checked" if component.error is None else f"{component.error.relative:.1e}"


def show_quantized(manifest: Manifest) -> None:
    """Say of each component in 8 bits how many layers are, and which are not."""
    for name, component in manifest.components.items():
        if (record := component.quantization) is not None:
            kept = f"; {len(record.kept)} kept: {', '.join(record.kept)}" if record.kept else ""
            stdout().print(
                f"{name}: {len(record.layers)} layers in 8 bits, scales set by {record.samples} calls{kept}",
                style="dim", markup=False,
            )  # fmt: skip
