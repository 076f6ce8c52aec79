"""`kandrt engines`: the engines that a bundle has, and removing those of no use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import Json, print_json, size_text, stdout, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..engines.bundle import Bundle
    from ..engines.caches import Cache
    from ..engines.plans import PlanRecord
    from ..engines.profiles import Profile
    from ..engines.store import Damaged

BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder that `kandrt export` made.", show_default=False)
]


@dataclass(frozen=True)
class Engine:
    """An engine in a bundle's store.

    problems say why it cannot be used with what is installed here; stale, that nobody can use it with this bundle.
    """

    record: PlanRecord
    stale: bool
    problems: list[str]


@dataclass(frozen=True)
class Engines:
    """All of a bundle's store; gpu is the GPU of this machine ("sm89"), None where there is none, with the reason.

    scale is the pixels a latent cell.
    """

    found: list[Engine]
    damaged: list[Damaged]
    gpu: str | None
    no_gpu: str
    scale: int


def list_engines(bundle: BundleArgument, json: Json = False) -> None:
    """Show the engines of a bundle, whether each can be used on this machine, and what backends keep of it."""
    from ..engines.bundle import open_bundle
    from ..engines.caches import caches

    opened = open_bundle(bundle)
    engines = engines_of(opened)
    kept = caches(opened)
    if json:
        print_json({"bundle": str(bundle), **asdict(engines), "caches": [as_row(each) for each in kept]})
    else:
        show(engines, bundle)
        show_caches(kept)


def prune(
    bundle: BundleArgument,
    everything: Annotated[bool, typer.Option("--all", help="Remove engines and caches that can be used, too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    json: Json = False,
) -> None:
    """Remove engines and caches that no longer fit the bundle or the installed builder, and what broken builds left.

    An engine for a GPU that this machine does not have is kept. So are caches of other versions of a library.
    """
    from ..engines.bundle import open_bundle
    from ..engines.caches import caches, remove
    from ..engines.store import EngineStore, stem_of

    opened = open_bundle(bundle)
    store = EngineStore(opened)
    engines = engines_of(opened)
    chosen = [each for each in engines.found if everything or each.stale]
    removed = {stem_of(each.file): [each.problem] for each in engines.damaged}
    removed |= {each.record.key.stem: each.problems or ["--all"] for each in chosen}
    kept = {each.record.key.stem for each in engines.found if each not in chosen}
    certain = {each.record.key.stem for each in chosen}
    freed = sum(
        store.size(stem, finished=stem not in kept)
        if dry_run
        else store.remove(stem, finished=stem not in kept, sound=stem in certain)
        for stem in removed
    )
    for cache in caches(opened):
        if everything or cache.problem:
            removed[str(cache.folder.relative_to(opened.folder))] = [cache.problem or "--all"]
            freed += cache.size
            if not dry_run:
                remove(cache)
    if json:
        print_json({"bundle": str(bundle), "removed": removed, "bytes": freed, "dry_run": dry_run})
        return
    out = stdout()
    for stem, problems in removed.items():
        out.print(f"{stem}: {'; '.join(problems)}", markup=False, soft_wrap=True)
    verb = "would remove" if dry_run else "removed"
    out.print(f"{verb} {len(removed)}, {size_text(freed)}; engines left: {len(kept)}")


# What `kandrt engines` has: command -> function, usage line, example.
COMMANDS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "list": (list_engines, "BUNDLE", "kandrt engines list my-bundle"),
    "prune": (prune, "BUNDLE", "kandrt engines prune my-bundle --dry-run"),
}


def engines_of(bundle: Bundle) -> Engines:
    """Every engine of a bundle, and the files of its store that are of no use."""
    from ..engines.errors import BackendError
    from ..engines.profiles import latent_scale
    from ..engines.store import EngineStore
    from ..engines.trt import capability, library_version

    store = EngineStore(bundle)
    records, damaged = store.records()
    gpu, no_gpu = None, ""
    if records:
        try:
            gpu = capability(records[0].key.builder)
        except BackendError as error:
            no_gpu = str(error)
    found = []
    for record in records:
        version = library_version(record.key.builder)
        stale = bool(store.stale(record)) or version not in (record.key.library, "none")
        found.append(Engine(record, stale, store.problems(record, version=version, capability=gpu)))
    return Engines(found, damaged, gpu, no_gpu, latent_scale(bundle.manifest))


def show(engines: Engines, bundle: Path) -> None:
    """Print them for people."""
    from ..engines.store import command_line

    out, folder = stdout(), str(bundle)
    if not engines.found and not engines.damaged:
        make = command_line("kandrt", "build", folder, "--backend", "tensorrt-rtx", "--gpu", "sm89")
        out.print(f"no engines; make some, for a GPU such as sm89, with: {make}", markup=False, soft_wrap=True)
        return
    out.print(engine_table(engines))
    for each in engines.damaged:
        out.print(f"of no use: {each.problem}", style="red", markup=False, soft_wrap=True)
    if engines.no_gpu:
        out.print(f"none can run here: {engines.no_gpu}", style="yellow", markup=False, soft_wrap=True)
    if engines.damaged or any(each.stale for each in engines.found):
        prune_it = command_line("kandrt", "engines", "prune", folder)
        out.print(f"remove what is of no use with: {prune_it}", markup=False, soft_wrap=True)


def show_caches(kept: Sequence[Cache]) -> None:
    """Print what backends keep, where there is any."""
    if not kept:
        return
    made = table("kept", "by", ">size", "state")
    for each in kept:
        made.add_row(each.component, each.backend, size_text(each.size), f"[red]{each.problem}[/]")
    stdout().print(made)


def as_row(cache: Cache) -> dict[str, str | int]:
    """What is kept of a component, for programs."""
    return {**asdict(cache), "folder": str(cache.folder)}


def engine_table(engines: Engines) -> Table:
    """A row an engine."""
    from ..engines.plans import PlanSettings, shown

    made = table("engine", "builder", "GPUs", ">plan", ">16 bits", "batch", "size", "state")
    made.columns[0].no_wrap = True  # on a narrow terminal, decoder_context and decoder_step still differ
    for engine in engines.found:
        record, key = engine.record, engine.record.key
        state = "; ".join(engine.problems).replace("[", r"\[") or ("sound" if engines.gpu is None else "usable")
        state += f", {shown(key.settings)}" if key.settings != PlanSettings() else ""
        made.add_row(
            key.component, key.builder, " ".join(key.compute_capabilities), size_text(record.plan.size),
            f"{record.figures.half_share:.0%}", batch_text(key.profiles), size_range(key.profiles, engines.scale),
            f"[red]stale:[/] {state}" if engine.stale else f"[green]{state}[/]" if not engine.problems else state,
        )  # fmt: skip
    return made


def batch_text(profiles: Sequence[Profile]) -> str:
    """The rows that an engine takes, a profile a line."""
    from ..engines.profiles import extent_text

    return "\n".join(extent_text(each.axes["batch"]) for each in profiles if "batch" in each.axes) or "fixed"


def size_range(profiles: Sequence[Profile], scale: int) -> str:
    """The sides of pictures that an engine takes, in pixels, a profile a line; "" where none matters to it."""
    from ..engines.profiles import extent_text

    lines = []
    for each in profiles:
        cells, pixels = each.axes.get("height"), each.axes.get("image_height")
        if pixels is not None:
            lines.append(extent_text(pixels))
        elif cells is not None:
            lines.append(extent_text((cells[0] * scale, cells[1] * scale, cells[2] * scale)))
    return "\n".join(lines)
