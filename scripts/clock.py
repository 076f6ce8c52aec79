"""How long each stage of a request takes, measured from its callbacks and shown as bars on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .console import stderr

if TYPE_CHECKING:
    from rich.progress import Progress

# Stages in order, as the progress bars name them; the last has no steps.
STAGES = {"prior": "prior", "decoder": "decoder", "movq": "picture"}


@dataclass
class Stage:
    """When a stage began and ended, in seconds of `time.monotonic`, and how its steps went."""

    began: float
    first_step: float = 0.0
    last: float = 0.0
    steps: int = 0

    @property
    def rate(self) -> float | None:
        """Steps a second, the first apart: it is the one that opens the networks."""
        if self.steps < 2 or self.last <= self.first_step:
            return None
        return (self.steps - 1) / (self.last - self.first_step)

    @property
    def rate_text(self) -> str:
        """The rate for people, "" where there is none."""
        return "" if self.rate is None else f"{self.rate:.{0 if self.rate >= 100 else 2}f} steps/s"


@dataclass
class Clock:
    """Measures the stages of one request from its callbacks, and shows them where a display is given.

    The first stage counts from `started`, so that opening the bundle is in it.
    """

    progress: Progress | None = None
    started: float = field(default_factory=time.monotonic)
    stages: dict[str, Stage] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)

    def begin(self, name: str) -> None:
        """A stage begins, and with it the one before is over."""
        self.stages[name] = Stage(time.monotonic() if self.stages else self.started)
        if self.progress is not None:
            self.tasks[name] = self.progress.add_task(STAGES[name], total=None, steps="", rate="")

    def step(self, name: str, done: int, total: int, _: Any) -> None:
        """A step is done; `runtime.sampling.Callback`."""
        stage, now = self.stages[name], time.monotonic()
        stage.first_step, stage.last, stage.steps = stage.first_step or now, now, done
        if self.progress is not None:
            self.progress.update(
                self.tasks[name], completed=done, total=total, steps=f"{done}/{total}", rate=stage.rate_text
            )
        if done == total:
            names = list(STAGES)
            self.begin(names[names.index(name) + 1])

    def end(self) -> None:
        """The last stage is over."""
        name, stage = list(self.stages.items())[-1]
        stage.last = time.monotonic()
        if self.progress is not None:
            self.progress.update(self.tasks[name], completed=1, total=1)

    def timings(self) -> dict[str, float | None]:
        """Seconds a stage and in all, opening the networks included, and steps a second."""
        stages = self.stages.items()
        seconds = {f"{name}_seconds": round(stage.last - stage.began, 3) for name, stage in stages}
        rates = {f"{name}_steps_per_second": stage.rate for name, stage in stages if stage.steps}
        began = min(stage.began for _, stage in stages)
        return {**seconds, **rates, "seconds": round(max(stage.last for _, stage in stages) - began, 3)}


@contextmanager
def clock() -> Iterator[Clock]:
    """A clock with a bar for each stage on a terminal, without elsewhere."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if not stderr().is_terminal:
        yield Clock()
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"), TextColumn("{task.description:8}"), BarColumn(),
        TextColumn("{task.fields[steps]:>7} {task.fields[rate]:>14}"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr(), transient=True) as progress:
        yield Clock(progress)
