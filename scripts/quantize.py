"""`kandrt quantize`: a bundle whose decoders compute in 8 bits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..engines.errors import InputError
from .console import Json, pieces, print_json, size_text, stdout, table
from .doctor import need
from .inspect import total_size
from .recording import PROMPTS, Requests, read_prompts, record_calls

if TYPE_CHECKING:
    from ..engines.bundle import Bundle
    from ..export.quantize.bundle import Call, Calls, Finding

USAGE = "BUNDLE -o QUANTIZED"
EXAMPLE = "kandrt quantize my-bundle -o my-bundle-int8"
WORST_SHOWN = 5


def command(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="Folder that `kandrt export` made, in fp32.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="QUANTIZED", help="Folder to make.", show_default=False)
    ],
    component: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Quantize this; may be repeated. [default: what decoders run at every step]",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Make a picture of this to see what layers are given; at least two, of which the last is for "
            "measuring the error. [default: three of many kinds]",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="As --prompt, one a line.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each of these pictures.")] = 8,
    scheduler: Annotated[
        str | None, typer.Option(help="Of these pictures; by default the checkpoint's own.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first of these pictures.")] = 0,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of these pictures; by default the checkpoint's own.", show_default=False),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER", help='Leave this as it is, such as "up_blocks.3.*"; may be repeated.', show_default=False
        ),
    ] = None,
    keep_above: Annotated[
        float, typer.Option(min=0, help="Leave layers as they are whose own relative error in 8 bits is larger.")
    ] = 0.1,
    refuse_above: Annotated[
        float, typer.Option(min=0, help="Make nothing where the error of a whole graph is larger.")
    ] = 0.15,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU; by default all.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace QUANTIZED if it is a bundle.")] = False,
    json: Json = False,
) -> None:
    """Make a bundle whose decoders compute in 8 bits, for CPUs.

    Convolutions and linear layers of what runs at every step are rounded to 8 bits, with scales set by what a few
    pictures bring to each layer. Layers that lose too much stay as they are, and the error of the whole is measured on
    a picture that set no scale. BUNDLE stays as it is; files that do not change are shared with it where the file
    system can.
    """
    need("export", "kandrt quantize")
    from ..engines.bundle import open_bundle
    from ..export.output import check_output
    from ..export.quantize.bundle import Settings, check_keep, check_quantizable, quantize_bundle

    opened = open_bundle(bundle)
    names = check_quantizable(opened, component or ())
    settings = Settings(tuple(keep or ()), keep_above, refuse_above, threads)
    check_keep(opened, names, settings.keep)
    if output.expanduser().resolve() == opened.folder.resolve():
        raise InputError(f"--output {output}: expected another folder than the bundle's own, which stays as it is")
    check_output(output.expanduser(), overwrite)
    asked = Requests(chosen_prompts(prompt, prompts), steps, scheduler, seed, size, threads)
    started = time.monotonic()
    with pieces() as report:
        recorded = {name: split(calls) for name, calls in record_calls(opened, names, asked, report).items()}
        findings = quantize_bundle(opened, output, recorded, settings, overwrite=overwrite, report=report)
    made, seconds = open_bundle(output), time.monotonic() - started
    if json:
        print_json({"bundle": str(made.folder), "seconds": round(seconds, 1), "components": findings})
    else:
        show(opened, made, findings, seconds)


def chosen_prompts(prompt: Sequence[str] | None, file: Path | None) -> tuple[str, ...]:
    """The prompts to use; InputError for fewer than two."""
    if prompt and file is not None:
        raise InputError("--prompt and --prompts: give one of them")
    chosen = tuple(prompt or (read_prompts(file) if file is not None else PROMPTS))
    if len(chosen) < 2:
        raise InputError(
            f"prompts: expected two or more, since the last is for measuring the error, found {len(chosen)}"
        )
    return chosen


def split(calls: Sequence[Sequence[Call]]) -> Calls:
    """Calls of requests: those of the last measure the error, those of all others set scales."""
    from ..export.quantize.bundle import Calls

    return Calls([call for request in calls[:-1] for call in request], calls[-1])


def show(source: Bundle, made: Bundle, findings: Mapping[str, Finding], seconds: float) -> None:
    """Print what became of each component."""
    out = stdout()
    rows = table("component", ">layers in 8 bits", ">kept", ">error", "largest errors of layers alone")
    for name, finding in findings.items():
        record, noise = finding.quantization, finding.noise
        worst = sorted(noise, key=lambda weight: -noise[weight])[:WORST_SHOWN]
        listed = ", ".join(f"{noise[w]:.1%}" + (" (kept)" if w in record.kept else "") for w in worst)
        rows.add_row(name, str(len(record.layers)), str(len(record.kept)), f"{record.error:.1%}", listed)
    out.print(rows)
    for name, finding in findings.items():
        if finding.quantization.kept:
            out.print(f"{name} keeps {', '.join(finding.quantization.kept)}", style="dim", markup=False, soft_wrap=True)
    out.print()
    sizes = f"{size_text(total_size(made.manifest))} (was {size_text(total_size(source.manifest))})"
    out.print(f"{made.folder}: {sizes}, {seconds:.0f} s", markup=False, soft_wrap=True)
