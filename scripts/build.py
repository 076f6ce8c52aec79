"""`kandrt build`: the engines of a bundle."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..engines.errors import InputError
from .console import Json, pieces, print_json, size_text, stderr, stdout, table, warn
from .engines import batch_text, size_range

if TYPE_CHECKING:
    from rich.table import Table

    from ..engines.builder import Task
    from ..engines.bundle import Bundle
    from ..engines.manifest import Manifest
    from ..engines.plans import Flag, PlanRecord, PlanSettings
    from ..engines.profiles import Coverage

USAGE = "BUNDLE --backend tensorrt|tensorrt-rtx"
EXAMPLE = "kandrt build my-bundle --backend tensorrt-rtx --gpu sm89 --size 512:768:1024 --batch 1:1:4"

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def command(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="Folder that `kandrt export` made.", show_default=False)
    ],
    backend: Annotated[
        Literal["tensorrt", "tensorrt-rtx"], typer.Option(help="What builds the engines.", show_default=False)
    ],
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help="GPUs to build for, such as sm89,sm120; tensorrt-rtx only, by default the GPU present.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIN:OPT:MAX",
            help="Sides of pictures in pixels; several make several profiles. By default 512:768:1024.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIN:OPT:MAX",
            help="Pictures a request, one for all sizes or one for each. By default 1:1:4.",
            show_default=False,
        ),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Fix size and batch at their OPT, for CUDA graphs.")] = False,
    component: Annotated[
        list[str] | None, typer.Option(help="Build only these; by default all.", show_default=False)
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option(help="Fail unless the engines compute in it.", show_default=False),
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(metavar="SIZE", help='Bound of scratch memory, such as "4GiB".', show_default=False)
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="0 builds fastest, 5 tries most.", show_default=False)
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="File of tactics' timings; tensorrt keeps one in the bundle.", show_default=False),
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Let weights stay in host memory when the engine runs.")
    ] = False,
    strip: Annotated[bool, typer.Option("--strip", help="Leave the weights out of the plans; needs a GPU.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built, and build nothing.")] = False,
    json: Json = False,
) -> None:
    """Build TensorRT engines, and keep them in the bundle.

    An engine is built once for everything it depends on: graph, weights, builder, GPUs, sizes and options. What is up
    to date is left alone; what is not is built beside it, a process at a time.
    """
    from ..engines.builder import plan_work
    from ..engines.bundle import open_bundle
    from ..engines.profiles import default_size

    opened = open_bundle(bundle)
    check_precision(opened.manifest, precision)
    coverage = read_coverage(size, batch, static, default_size(opened.manifest))
    settings = read_settings(workspace, optimization_level, weight_streaming, strip)
    tasks = plan_work(
        opened, backend, gpus=split(gpu, "--gpu"), coverage=coverage, settings=settings,
        components=split(component, "--component"),
    )  # fmt: skip
    started = time.monotonic()
    records = [] if dry_run else build(opened, tasks, timing_cache)
    if json:
        names = built(tasks)
        print_json({"bundle": str(bundle), "dry_run": dry_run, "built": names, "tasks": tasks, "records": records})
    else:
        show(opened, tasks, records, time.monotonic() - started)


def check_precision(manifest: Manifest, precision: str | None) -> None:
    """Raise InputError where the graphs compute in another precision than was asked for; warn of fp32 engines."""
    exported = manifest.precision
    if precision is not None and precision != exported:
        raise InputError(
            f"--precision {precision}: the bundle was exported in {exported}, and engines compute in what their "
            f"graphs do; make a bundle with: kandrt export ... --precision {precision}"
        )
    if precision is None and exported == "fp32":
        warn("the bundle was exported in fp32, so its engines compute in fp32; --precision fp16 at export halves them")


def split(names: Sequence[str] | None, option: str) -> list[str]:
    """Names given one by one or separated by commas; InputError for an option that was given and names nothing."""
    found = [part.strip() for name in names or () for part in name.split(",") if part.strip()]
    if names and not found:
        raise InputError(f"{option}: expected a name, found {', '.join(map(repr, names))}")
    return found


def read_coverage(
    sizes: Sequence[str] | None, batches: Sequence[str] | None, static: bool, usual: tuple[int, int, int]
) -> list[Coverage]:
    """The profiles asked for; InputError for what cannot be read."""
    from ..engines.profiles import USUAL_BATCH, Coverage, parse_extent

    sides = [parse_extent(text, "--size") for text in sizes or ()] or [usual]
    rows = [parse_extent(text, "--batch") for text in batches or ()] or [USUAL_BATCH]
    if len(rows) not in (1, len(sides)):
        raise InputError(f"--batch: expected one, or one for each of {len(sides)} sizes, found {len(rows)}")
    rows = rows * len(sides) if len(rows) == 1 else rows
    return [Coverage(side, row, static) for side, row in zip(sides, rows, strict=True)]


def read_settings(workspace: str | None, level: int | None, weight_streaming: bool, strip: bool) -> PlanSettings:
    """Options of the builder; InputError for a size that cannot be read."""
    from ..engines.plans import PlanSettings

    streaming: tuple[Flag, ...] = ("WEIGHT_STREAMING",) if weight_streaming else ()
    stripped: tuple[Flag, ...] = ("REFIT_IDENTICAL", "STRIP_PLAN") if strip else ()
    return PlanSettings(streaming + stripped, None if workspace is None else read_size(workspace, "--workspace"), level)


def read_size(text: str, what: str) -> int:
    """Bytes of "4GiB", "500 MB" or "1000000"; InputError that begins with `what` for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([a-z]*)", text.strip().lower(), re.ASCII)
    size = 0 if match is None or match[2] not in UNITS else int(float(match[1]) * UNITS[match[2]])
    if not 1 <= size < 2**63:
        raise InputError(f'{what}: expected a size such as "4GiB" or "500MB", found {text!r}')
    return size


def build(bundle: Bundle, tasks: Sequence[Task], timing_cache: Path | None) -> list[PlanRecord]:
    """Build what is not there yet, in order; gives the records of all."""
    from ..engines.builder import build_plan

    records = []
    waiting = sum(task.existing is None for task in tasks)
    with bars(waiting) as begin:
        for task in tasks:
            if task.existing is not None:
                records.append(task.existing)
                continue
            records.append(build_plan(bundle, task, begin(task.key.component), timing_cache))
    return records


@contextmanager
def bars(count: int) -> Iterator[Callable[[str], Callable[[float, str], None]]]:
    """A function that begins the next of `count` builds by its name, and gives what is told how far it is.

    Bars on a terminal, else a line a build.
    """
    if not stderr().is_terminal:
        with pieces() as report:

            def begin_line(name: str) -> Callable[[float, str], None]:
                report(f"building {name}")
                return lambda _share, _phase: None

            yield begin_line
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[phase]}", markup=False),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr(), transient=True) as progress:
        whole = progress.add_task("all", total=count, phase=f"0 of {count}")
        current = None

        def begin_bar(name: str) -> Callable[[float, str], None]:
            nonlocal current
            done = 0 if current is None else int(progress.tasks[whole].completed) + 1
            progress.update(whole, completed=done, phase=f"{done} of {count}")
            if current is not None:
                progress.remove_task(current)
            task = current = progress.add_task(name, total=1.0, phase="")
            return lambda share, phase: progress.update(task, completed=share, phase=phase.lower())

        yield begin_bar


def built(tasks: Sequence[Task]) -> list[str]:
    """Names of the components that were not up to date."""
    return [task.key.component for task in tasks if task.existing is None]


def show(bundle: Bundle, tasks: Sequence[Task], records: Sequence[PlanRecord], seconds: float) -> None:
    """Print what was built, or would be."""
    from ..engines.profiles import latent_scale

    out, new = stdout(), built(tasks)
    if not new:
        all_of_them = "the engine is" if len(tasks) == 1 else f"all {len(tasks)} engines are"
        out.print(f"{all_of_them} up to date in {bundle.folder}", markup=False, soft_wrap=True)
        return
    out.print(record_table(records, new) if records else task_table(tasks, latent_scale(bundle.manifest)))
    out.print()
    if records:
        size = size_text(sum(record.plan.size for record in records if record.key.component in new))
        kept = f", {len(tasks) - len(new)} were up to date" if len(new) < len(tasks) else ""
        out.print(f"built {engine_count(new, tasks)} in {seconds:.0f} s, {size}{kept}", markup=False, soft_wrap=True)
        return
    for task in tasks:
        if task.existing is None and task.changed:
            out.print(f"{task.key.component}: {'; '.join(task.changed)}", style="dim", markup=False, soft_wrap=True)
    size = size_text(sum(task.estimated_bytes for task in tasks if task.existing is None))
    peak = size_text(max(task.estimated_peak for task in tasks if task.existing is None))
    out.print(
        f"would build {engine_count(new, tasks)}: about {size} of disk, {peak} of memory at a time", soft_wrap=True
    )


def engine_count(new: Sequence[str], tasks: Sequence[Task]) -> str:
    """How many of how many."""
    return f"{len(new)} of {len(tasks)} engine{'s' * (len(tasks) > 1)}"


def task_table(tasks: Sequence[Task], scale: int) -> Table:
    """What is to be done, with estimates."""
    made = table("component", "type", ">plan, about", ">memory, about", "batch", "size", "state")
    made.columns[0].no_wrap = True  # on a narrow terminal, decoder_context and decoder_step still differ
    for task in tasks:
        key = task.key
        state = "to build" if task.existing is None else "[green]up to date[/]"
        made.add_row(
            key.component, key.precision, size_text(task.estimated_bytes), size_text(task.estimated_peak),
            batch_text(key.profiles), size_range(key.profiles, scale), state,
        )  # fmt: skip
    return made


def record_table(records: Sequence[PlanRecord], new: Sequence[str]) -> Table:
    """What building showed, a plan a row; those that were up to date are dim."""
    made = table(
        "component", ">layers", ">seconds", ">peak memory", ">plan", ">weights", ">activations", ">scratch",
        ">16 bits",
    )  # fmt: skip
    made.columns[0].no_wrap = True
    for record in records:
        figures = record.figures
        made.add_row(
            record.key.component,
            f"{figures.layers:,}",
            f"{figures.seconds:.1f}",
            *(
                "" if size is None else size_text(size)
                for size in (
                    figures.peak_bytes, record.plan.size, figures.weights_bytes, figures.activation_bytes,
                    figures.scratch_bytes,
                )
            ),
            f"{figures.half_share:.0%}",
            style=None if record.key.component in new else "dim",
        )  # fmt: skip
    return made
