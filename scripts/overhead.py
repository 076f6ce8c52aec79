"""`python -m kandrt.scripts.overhead`: what the host does in a step besides running the network, on this CPU.

The loop runs with networks that take no time, so that what it takes itself is all that is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import typer
from numpy.typing import NDArray

from ..engines.bundle import Bundle, open_bundle
from ..engines.manifest import Component
from ..engines.session import Array, ComponentSession, Session
from ..engines.spec import TensorSpec
from ..runtime.miniature import MINIATURE
from ..runtime.noise import make_noise
from ..runtime.sampling import Inpaint, check_finite, denoise, guided
from ..runtime.schedulers import Scheduler, scheduler_from_config
from .console import Json, guarded, print_json, stdout, table

SCALE = 4.0
WARM_UP = 5  # steps that are not counted: caches fill, memory is taken for the first time

Float32 = NDArray[np.float32]

# For one picture, of 768 x 768 pixels where it is not the miniature's, with guidance: role, shape of the latents, width
# of the embedding, and what else the step takes.
SIZES: Mapping[str, tuple[str, tuple[int, ...], int, Mapping[str, tuple[int, ...]]]] = {
    "prior": (
        "prior", (1, 1280), 2048, {"prefix_kv": (2, 40, 78, 2048), "attention_bias": (2, 1, 3, 81)}
    ),
    "prior, small": ("prior", (1, 160), 192, {"prefix_kv": (2, 8, 33, 192), "attention_bias": (2, 1, 3, 36)}),
    "decoder": ("decoder", (1, 4, 96, 96), 1536, {"added_kv": (2, 32, 51456)}),
    "decoder, small": ("decoder", (1, 4, 16, 16), 256, {"added_kv": (2, 32, 1344)}),
    "inpainting": ("inpaint", (1, 4, 96, 96), 1536, {"added_kv": (2, 32, 51456)}),
}  # fmt: skip


class Idle(ComponentSession):
    """A component that checks its inputs as all do, and then gives an array that was there before."""

    library: ClassVar[str] = "nothing"

    def __init__(self, name: str, component: Component, prediction: Float32) -> None:
        super().__init__(name, component)
        self._session, self._outputs = True, {"prediction": prediction}

    def _run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:  # noqa: ARG002
        return self._outputs


class Timed:
    """A function or method, and how long its calls took, in nanoseconds."""

    def __init__(self, action: Callable[..., Any]) -> None:
        self.action, self.times = action, list[int]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        start = time.perf_counter_ns()
        try:
            return self.action(*args, **kwargs)
        finally:
            self.times.append(time.perf_counter_ns() - start)

    @property
    def microseconds(self) -> float:
        """The median of the calls, the first ones apart; 0 where there was none."""
        return median(self.times[WARM_UP:]) / 1000 if self.times else 0.0


@dataclass(frozen=True)
class Row:
    """Medians of one stage, in microseconds a step.

    total is a whole step without its network. noise and sampler are drawing, and the sampler's arithmetic; overhead is
    the rest of a step. Of it: inputs compares types and shapes with what the component takes, check looks for NaN in
    what the network gave, double and guide are the arithmetic of guidance, blend that of inpainting.
    """

    stage: str
    total: float
    noise: float
    sampler: float
    overhead: float
    inputs: float
    check: float
    double: float
    guide: float
    blend: float


TEXTS = {
    "total": "step",
    "noise": "  drawing noise",
    "sampler": "  sampler",
    "overhead": "  the rest",
    "inputs": "    inputs checked",
    "check": "    NaN looked for",
    "double": "    sample doubled",
    "guide": "    guidance",
    "blend": "    inpainting",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """One stage, its arrays made."""

    stage: str
    scheduler: Scheduler
    session: Idle
    x: Float32
    embedding: Float32
    context: Mapping[str, Float32]
    prediction: Float32
    inpaint: Inpaint | None


def command(
    steps: Annotated[int, typer.Option(min=10, max=1000, help="Steps that the medians are over.")] = 500,
    json: Json = False,
) -> None:
    """Measure the host's share of a step: the loop with networks that do nothing."""
    bundle = open_bundle(MINIATURE)
    rows = [measured(case(bundle, stage, steps), steps) for stage in SIZES]
    print_json(rows) if json else show(rows)


def case(bundle: Bundle, stage: str, steps: int) -> Case:
    """Arrays of the sizes of a stage, and a session whose specs have them."""
    role, shape, width, others = SIZES[stage]
    manifest, generator = bundle.manifest, np.random.default_rng(0)

    def array(*lengths: int) -> Float32:
        return generator.standard_normal(lengths, np.float32)

    channels = 1 if role == "prior" else 2  # a UNet predicts a variance too
    prediction = array(2, shape[1] * channels, *shape[2:])
    context = {name: array(*lengths) for name, lengths in others.items()}
    inpaint = (
        Inpaint(array(*shape), np.ones((1, 1, *shape[2:]), np.float32), array(*shape)) if role == "inpaint" else None
    )
    inputs = {"sample": array(2, *shape[1:]), "embedding": array(2, width), **context}
    if inpaint is not None:
        inputs["concat_latents"] = inpaint.concat(2)
    component = manifest.components[f"{role}_step"]
    component = replace(
        component, inputs=sized(component.inputs, inputs), outputs=sized(component.outputs, {"prediction": prediction})
    )
    rows = (steps, width) if role == "prior" else (steps, 2, width)
    return Case(
        stage=stage,
        scheduler=scheduler_from_config(manifest.schedulers[role]),
        session=Idle(role, component, prediction),
        x=array(*shape),
        embedding=array(*rows),
        context=context,
        prediction=prediction,
        inpaint=inpaint,
    )


def sized(specs: Sequence[TensorSpec], arrays: Mapping[str, Float32]) -> tuple[TensorSpec, ...]:
    """The specs with the lengths of `arrays` where they are fixed."""

    def shape(spec: TensorSpec) -> tuple[int | str, ...]:
        pairs = zip(spec.shape, arrays[spec.name].shape, strict=True)
        return tuple(axis if isinstance(axis, str) else length for axis, length in pairs)

    return tuple(replace(spec, shape=shape(spec)) for spec in specs)


def measured(case: Case, steps: int) -> Row:
    """Medians over the steps of one loop, and of what is done in a step by itself on the same arrays."""
    x, scheduler, learned = case.x, case.scheduler, case.scheduler.learned_variance
    noise, step, session = Timed(make_noise(seed=1)), Timed(scheduler.step), Timed(case.session)
    loop = denoise(
        cast("Session", session), watched(scheduler, step), x, scheduler.timesteps(steps), case.embedding, case.context,
        scale=SCALE, noise=noise, inpaint=case.inpaint,
    )  # fmt: skip
    total = Timed(lambda: next(loop))
    for _ in range(steps):
        total()
    overhead = Timed(lambda: None)
    overhead.times = [all_of_it - within for all_of_it, within in zip(total.times, step.times, strict=True)]
    drawing = noise.microseconds
    parts = {
        "check": Timed(lambda: check_finite(case.prediction)),
        "double": Timed(lambda: np.concatenate([x, x], axis=0)),
        "guide": Timed(lambda: guided(case.prediction, x, SCALE, learned)),
        "blend": Timed(lambda: None if case.inpaint is None else case.inpaint.blend(x, scheduler, 500)),
    }
    for part in parts.values():
        for _ in range(steps):
            part()
    return Row(
        stage=case.stage,
        total=total.microseconds,
        noise=drawing,
        sampler=step.microseconds - drawing,
        overhead=overhead.microseconds,
        inputs=session.microseconds,
        **{name: part.microseconds for name, part in parts.items()},
    )


def watched(scheduler: Scheduler, step: Timed) -> Scheduler:
    """The scheduler, its steps timed."""

    class Watched:
        learned_variance, draws, add_noise = scheduler.learned_variance, scheduler.draws, scheduler.add_noise

    found: Any = Watched()
    found.step = step
    return cast("Scheduler", found)


def show(rows: Sequence[Row]) -> None:
    """Print a table, in microseconds: a stage a column."""
    shown = table("µs a step", *(f">{row.stage}" for row in rows))
    for name, text in TEXTS.items():
        shown.add_row(text, *(f"{getattr(row, name):.0f}" for row in rows))
    stdout().print(shown)


app = typer.Typer(add_completion=False)
app.command()(guarded(command))

if __name__ == "__main__":
    app()
