"""`kandrt export`: checkpoints to a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .console import Json, count_text, pieces, print_json, size_text, stdout
from .doctor import need
from .inspect import component_table, total_size

if TYPE_CHECKING:
    from ..engines.manifest import Manifest

USAGE = "CHECKPOINT... -o BUNDLE"
EXAMPLE = "kandrt export kandinsky-community/kandinsky-2-2-prior kandinsky-community/kandinsky-2-2-decoder -o my-bundle"


def command(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT",
            help="Folders in diffusers' layout, or hub ids; all go into one bundle.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to make.", show_default=False)
    ],
    precision: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="What the graphs compute in.")] = "fp32",
    storage: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option(
            help="What weights are stored in, if not in --precision; fp16 halves an fp32 bundle.", show_default=False
        ),
    ] = None,
    feature_reuse: Annotated[
        bool,
        typer.Option("--feature-reuse", help="Add the graphs for generate's --reuse-interval; not with Kandinsky 3."),
    ] = False,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Compare every graph with PyTorch; by default only small networks.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the hub ids.", show_default=False)
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help='Weight files to prefer, such as "fp16".', show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace BUNDLE if it is a bundle.")] = False,
    json: Json = False,
) -> None:
    """Make a bundle from checkpoints.

    A bundle holds the networks as graphs beside their weights; making pictures with it needs no PyTorch. It appears
    when it is complete: after an error or Ctrl-C nothing is left of it.

    Published checkpoints, of which a bundle takes any of one family, are, each after kandinsky-community/:

    Kandinsky 2.1: kandinsky-2-1-prior, kandinsky-2-1, kandinsky-2-1-inpaint

    Kandinsky 2.2: kandinsky-2-2-prior, kandinsky-2-2-decoder, kandinsky-2-2-decoder-inpaint,
    kandinsky-2-2-controlnet-depth

    Kandinsky 3: kandinsky-3
    """
    need("export", "kandrt export")
    from ..export.output import check_output

    check_output(output.expanduser(), overwrite)  # before PyTorch, which takes seconds to load
    started = time.monotonic()
    with pieces() as report:
        report("loading PyTorch")
        from ..export.exporter import export_bundle
        from .reference import make_reference

        report("reading checkpoints")
        folder = export_bundle(
            list(checkpoints), output, precision=precision, storage=storage, feature_reuse=feature_reuse, check=check,
            revision=revision, variant=variant, overwrite=overwrite, report=report, make_reference=make_reference,
        )  # fmt: skip
    from ..engines.bundle import open_bundle

    manifest, seconds = open_bundle(folder).manifest, time.monotonic() - started
    if json:
        print_json(
            {"bundle": str(folder), "seconds": round(seconds, 1), "size": total_size(manifest), "manifest": manifest}
        )
    else:
        show(folder, manifest, seconds)


def show(folder: Path, manifest: Manifest, seconds: float) -> None:
    """Print the components and a summary."""
    out = stdout()
    out.print(component_table(manifest))
    parameters = count_text(sum(component.parameters for component in manifest.components.values()))
    checked = sum(component.error is not None for component in manifest.components.values())
    out.print()
    out.print(
        f"{folder}: {len(manifest.components)} graphs ({checked} checked), {parameters} parameters, "
        f"{size_text(total_size(manifest))}, {seconds:.0f} s",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if not manifest.reference:
        out.print("no reference pictures, because not every graph was checked; --check makes them", style="dim")
