"""`python -m kandrt.scripts.gpu_floor BUNDLE`: how fast a GPU could be at best, on paper, and what it would launch.

Floors are computed from a bundle's graphs and NVIDIA's published figures; kernels are those that TensorRT-RTX plans for
a GPU that need not be there. Nothing is measured but the host's own share of a step, on this machine's CPU.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import numpy as np
import typer

from ..engines.bundle import Bundle, open_bundle
from ..engines.errors import InputError
from ..engines.manifest import DecoderRecord, PriorRecord
from .console import Json, guarded, pieces, print_json, size_text, stdout, table
from .overhead import SCALE, Case, case, measured
from .roofline import GPUS, Floor, Gpu, Work, floor, graph_work

if TYPE_CHECKING:
    from rich.table import Table

    from ..engines.session import Session
    from ..engines.spec import TensorSpec
    from .planned_kernels import Planned

ROWS = 2  # of one picture with guidance
HOST_STEPS = 100  # that the host's share is a median of
# Arrays as small as the miniature's, so that it is calling and not computing that takes the time.
HOST_STAGES = {"prior step": "prior, small", "decoder step": "decoder, small"}
MILLI, MICRO = 1e3, 1e6


@dataclass(frozen=True)
class Row:
    """One graph for pictures of a side in pixels: FLOPs and bytes of a run in 16 bits, and floors by GPU.

    nodes are operators of the graph that compute. graph is a component's name, or what stands in its place.
    """

    graph: str
    size: int
    flops: int
    weights: int
    activations: int
    nodes: int
    floors: dict[str, Floor]


@dataclass(frozen=True)
class Launches:
    """Kernels of one run: those that TensorRT-RTX plans for a compute capability, or those of PyTorch (None)."""

    graph: str
    size: int
    capability: str | None
    kernels: int
    planned: Planned | None = None


@dataclass(frozen=True)
class Host:
    """The loop around a network: microseconds a step, measured on this CPU, and array operations, counted.

    Those would be kernels too on a GPU. The time is that of NumPy on small arrays, drawing of noise apart.
    """

    stage: str
    microseconds: float
    operations: int


@dataclass(frozen=True)
class Paper:
    """All that was found; pictures are the floors of one picture with all its steps, by side and GPU."""

    steps: int
    prior_steps: int
    gpus: tuple[Gpu, ...]
    rows: list[Row]
    pictures: dict[int, dict[str, Floor]]
    launches: list[Launches]
    host: list[Host]


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Kandinsky 2.2, of any precision.")],
    size: Annotated[list[int] | None, typer.Option(help="Sides of pictures. [default: 512, 768, 1024]")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the decoder.")] = 50,
    prior_steps: Annotated[int, typer.Option(min=1, help="Of the prior.")] = 25,
    plan: Annotated[
        list[str] | None,
        typer.Option(help="Plan kernels for this compute capability, such as sm89, with TensorRT-RTX; takes minutes."),
    ] = None,
    undivided: Annotated[
        list[Path] | None,
        typer.Option(help="A checkpoint of prior or decoder, whose network as diffusers has it is counted too."),
    ] = None,
    json: Json = False,
) -> None:
    """Work out what GPUs need at least for the graphs of a bundle in 16 bits, guidance included."""
    opened, sides = open_bundle(bundle), sorted(set(size or (512, 768, 1024)))
    if plan and opened.manifest.precision == "fp32":
        raise InputError(f"--plan: {bundle} is in fp32, and engines compute in what their graphs do; export it in fp16")
    with pieces() as tell:
        rows, launches = rows_of(opened, sides, plan or [], tell)
        for checkpoint in undivided or []:
            found = undivided_rows(checkpoint, sides[0], plan or [], tell)
            rows, launches = rows + found[0], launches + found[1]
        tell("measuring the host's share of a step")
        host = host_share()
    made = Paper(steps, prior_steps, GPUS, rows, pictures(opened, rows, steps, prior_steps), launches, host)
    print_json(made) if json else show(made)


def rows_of(
    bundle: Bundle, sides: Sequence[int], capabilities: Sequence[str], tell: Callable[[str], None]
) -> tuple[list[Row], list[Launches]]:
    """Steps and MoVQ's decoder at every size, once where sizes do not matter to a graph."""
    prior, record = records(bundle)
    rows, launches = list[Row](), list[Launches]()
    for name in (prior.step, record.step, record.movq_decoder):
        component = bundle.manifest.components[name]
        axes_of = {axis for spec in component.inputs for axis in spec.shape if isinstance(axis, str)}
        for side in sides if "height" in axes_of else sides[:1]:
            if side % record.size_multiple:
                raise InputError(f"--size {side}: expected a multiple of {record.size_multiple}")
            tell(f"counting {name} at {side} pixels")
            cells = side // record.scale
            axes = {"batch": 1 if name == record.movq_decoder else ROWS, "height": cells, "width": cells}
            axes = {axis: axes[axis] for axis in axes_of}
            graph = bundle.path(component.graph)
            rows.append(row(name, side, graph_work(graph, axes)))
            for capability in capabilities:
                tell(f"planning {name} at {side} pixels for {capability}")
                launches.append(planned(name, graph, component.inputs, axes, side, capability))
    return rows, launches


def records(bundle: Bundle) -> tuple[PriorRecord, DecoderRecord]:
    """Prior and decoder; InputError where there is none of both, or text is read besides."""
    prior, record = bundle.manifest.prior, bundle.manifest.decoders.get("decoder")
    if prior is None or record is None or record.prompt is not None:
        raise InputError(
            f"{bundle.folder}: expected Kandinsky 2.2 with prior and decoder, found {bundle.manifest.family}"
        )
    return prior, record


def row(graph: str, side: int, work: Work) -> Row:
    """A row with its floors."""
    floors = {gpu.name: floor(work, gpu) for gpu in GPUS}
    return Row(graph, side, work.flops, work.weights, work.activations, work.nodes, floors)


def planned(
    name: str, graph: Path, inputs: Sequence[TensorSpec], axes: dict[str, int], side: int, capability: str
) -> Launches:
    """The kernels of an engine of fixed shapes."""
    from ..engines.plan_worker import PlanJob
    from ..engines.plans import PlanSettings
    from ..engines.profiles import Profile
    from ..engines.trt import resolve_gpu
    from .planned_kernels import plan_kernels

    profiles = (Profile({axis: (length, length, length) for axis, length in axes.items()}),) if axes else ()
    job = PlanJob(
        name, "tensorrt-rtx", str(graph), tuple(inputs), profiles, (resolve_gpu("tensorrt-rtx", capability),),
        PlanSettings(), None, output="",
    )  # fmt: skip
    found = plan_kernels(job)
    return Launches(name, side, capability, found.launches, found)


def undivided_rows(
    checkpoint: Path, side: int, capabilities: Sequence[str], tell: Callable[[str], None]
) -> tuple[list[Row], list[Launches]]:
    """diffusers' network of a checkpoint: its work, and what PyTorch and TensorRT-RTX launch for it."""
    from .bench.undivided import eager_launches, find_part, write_undivided

    part = find_part(checkpoint)
    name = f"diffusers' {part}"
    with tempfile.TemporaryDirectory() as folder:
        tell(f"tracing {name} at {side} pixels")
        launches = [Launches(name, side, None, eager_launches(checkpoint, side))]
        path, graph = write_undivided(checkpoint, side, Path(folder))
        rows = [row(name, side, graph_work(path, {}))]
        for capability in capabilities:
            tell(f"planning {name} at {side} pixels for {capability}")
            launches.append(planned(name, path, graph.inputs, {}, side, capability))
    return rows, launches


def pictures(bundle: Bundle, rows: Sequence[Row], steps: int, prior_steps: int) -> dict[int, dict[str, Floor]]:
    """Floors of all steps and MoVQ's decoder by size and GPU; what runs once a request is not in it."""
    prior, record = records(bundle)
    runs = {prior.step: prior_steps, record.step: steps, record.movq_decoder: 1}
    (first,) = (each for each in rows if each.graph == prior.step)
    found: dict[int, dict[str, Floor]] = {}
    for side in sorted({each.size for each in rows}):
        parts = [first, *(each for each in rows if each.size == side and each.graph in runs and each is not first)]
        found[side] = {
            gpu.name: sum((each.floors[gpu.name] * runs[each.graph] for each in parts), Floor(0, 0)) for gpu in GPUS
        }
    return found


# The host's share


class Counted(np.ndarray[Any, np.dtype[Any]]):
    """An array that counts what is computed with it, views and the check for NaN apart, which GPUs are spared."""

    counted: ClassVar[Counter[str]] = Counter()
    FREE: ClassVar = frozenset(
        {"isfinite", "all", "logical_and", "broadcast_to", "shape", "ndim", "size", "may_share_memory"}
    )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        self._count(ufunc.__name__)
        plain = [each.view(np.ndarray) if isinstance(each, Counted) else each for each in inputs]
        found = getattr(ufunc, method)(*plain, **options)
        return found.view(Counted) if isinstance(found, np.ndarray) else found

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        self._count(func.__name__)
        found = super().__array_function__(func, types, args, kwargs)
        return found.view(Counted) if isinstance(found, np.ndarray) else found

    def _count(self, name: str) -> None:
        if name not in self.FREE:
            Counted.counted[name] += 1


def counted_operations(of: Case, steps: int) -> int:
    """Array operations of a step of the loop around a network, the median step's."""
    from ..runtime.noise import make_noise
    from ..runtime.sampling import denoise

    draw = make_noise(seed=1)
    prediction = of.prediction.view(Counted)
    cast("Any", of.session)._outputs = {"prediction": prediction}
    loop = denoise(
        cast("Session", of.session), of.scheduler, of.x.view(Counted), of.scheduler.timesteps(steps),
        of.embedding.view(Counted), of.context, scale=SCALE, noise=lambda shape: draw(shape).view(Counted),
    )  # fmt: skip
    counts = []
    for _ in range(steps):
        Counted.counted.clear()
        next(loop)
        counts.append(Counted.counted.total())
    return sorted(counts)[len(counts) // 2]


def host_share(steps: int = HOST_STEPS) -> list[Host]:
    """What the host does in a step besides starting the network."""
    from ..runtime.miniature import MINIATURE

    opened, found = open_bundle(MINIATURE), []
    for stage, small in HOST_STAGES.items():
        times = measured(case(opened, small, steps), steps)
        operations = counted_operations(case(opened, small, steps), steps)
        found.append(Host(stage, times.total - times.noise, operations))
    return found


# Shown


def show(paper: Paper) -> None:
    """Print tables."""
    out = stdout()
    names = [f">{gpu.name}" for gpu in paper.gpus]
    work = table("a run, 16 bits", ">side", ">GFLOP", ">weights", ">other", ">operators")
    least = table("ms at least", ">side", *names)
    for each in paper.rows:
        work.add_row(
            each.graph, str(each.size), f"{each.flops / 1e9:,.0f}", size_text(each.weights),
            size_text(each.activations), str(each.nodes),
        )  # fmt: skip
        spans = [span(each.floors[gpu.name], MILLI) for gpu in paper.gpus]
        least.add_row(each.graph, str(each.size), *spans)
    whole = table("s a picture at least", ">side", *names)
    for side, floors in paper.pictures.items():
        spans = [span(floors[gpu.name], 1) for gpu in paper.gpus]
        whole.add_row(f"{paper.prior_steps} + {paper.steps} steps", str(side), *spans)
    kernels = [launch_table(paper)] if paper.launches else []
    for made in (work, least, whole, *kernels, host_table(paper.host)):
        out.print(made)
        out.print()
    for gpu in paper.gpus:
        flops, speed = f"{gpu.flops / 1e12:g} TFLOP/s", f"{gpu.bandwidth / 1e12:g} TB/s"
        out.print(f"{gpu.name}: {flops}, {speed} ({gpu.source})", style="dim", markup=False, soft_wrap=True)


def span(found: Floor, unit: float) -> str:
    """Both floors."""
    return f"{found.limit * unit:.2f} - {found.operators * unit:.2f}"


def launch_table(paper: Paper) -> Table:
    """Kernels, and how long the device works on one at most if the floor is met: launching must not take longer."""
    floors = {(each.graph, each.size): each.floors for each in paper.rows}
    made = table("kernels a run", ">side", "for", ">kernels", *(f">{gpu.name}, µs each" for gpu in paper.gpus), "kinds")
    for each in paper.launches:
        kinds = each.planned.kernels if each.planned else {}
        of = floors[each.graph, each.size]
        each_takes = [f"{of[gpu.name].operators * MICRO / each.kernels:.1f}" for gpu in paper.gpus]
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        made.add_row(each.graph, str(each.size), each.capability or "PyTorch", str(each.kernels), *each_takes, told)
    return made


def host_table(host: Sequence[Host]) -> Table:
    """The host's share."""
    made = table("host, a step", ">µs measured here", ">array operations")
    for each in host:
        made.add_row(each.stage, f"{each.microseconds:.0f}", str(each.operations))
    return made


app = typer.Typer(add_completion=False)
app.command()(guarded(command))

if __name__ == "__main__":
    app()
