"""What it costs in quality to do less for a picture: the miniature's pictures, judged, against the time they take.

All settings paint the same prompts with the same seeds, text-to-image at the miniature's own size with ONNX Runtime.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import log10, sqrt
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import InputError
from ...runtime import Kandinsky, load
from ...runtime.batching import Batch
from ...runtime.images import to_pil
from ..miniature.judge import judge
from ..miniature.trials import BATCH, TextTrial, text_trials
from .results import Tradeoff

Pictures: TypeAlias = NDArray[np.float32]  # [B, H, W, 3] in [0, 1]
Source = Literal["miniature", "reuse", "quantized"]
Tell: TypeAlias = Callable[[str], None]
# Gives pictures for prompts and seeds, and the seconds that they took.
Paint: TypeAlias = Callable[[Sequence[str], Sequence[int]], tuple[Pictures, float]]

DEFAULT = "default"
TIMED = 5  # pictures of a setting that are made one at a time, in turn with the other settings, for their time
BATCHED = 16  # requests that each setting of batching makes
AT_ONCE = (1, 2, 4, 8)  # requests that share an evaluation at most
JOINS = 3  # evaluations after which the next request joins, so that no two are at one step
Z = 1.959964  # of the normal distribution, for 95 %


# What does less within a step is measured upon a quarter of the steps, whose pictures are all but the same: upon all of
# them neighbouring steps are so alike that nothing is ever lost.
BASE: Mapping[str, Any] = {"steps": 25}
FAST: Mapping[str, Any] = {"scheduler": "dpmpp-2m", "steps": 15}


@dataclass(frozen=True, eq=False)
class Setting:
    """A point: arguments of a request, and the bundle that it is put to."""

    technique: str
    label: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    bundle: Source = "miniature"


def few_steps(scheduler: str, *numbers: int) -> list[Setting]:
    """A scheduler with fewer and fewer steps."""
    return [
        Setting(f"few steps, {scheduler}", f"{steps} steps", {"scheduler": scheduler, "steps": steps})
        for steps in numbers
    ]


def guided_in(start: float, end: float) -> Setting:
    """Guidance in an interval."""
    return Setting("guidance interval", f"in [{start:g}, {end:g})", {**BASE, "guidance_interval": (start, end)})


def reusing(interval: int) -> Setting:
    """Deep features of every so many steps."""
    return Setting("feature reuse", f"every {interval} steps", {**BASE, "reuse_interval": interval}, "reuse")


SETTINGS = (
    Setting(DEFAULT, "100 steps of ddpm"),
    *few_steps("ddpm", 25, 15, 10),
    *few_steps("ddim", 25),  # clips as the checkpoint's configuration says, in diffusers too: pictures are lost
    *few_steps("dpmpp-2m", 25, 15, 10, 5),
    *(guided_in(start, end) for start, end in ((0, 0.7), (0, 0.5), (0.2, 0.8))),
    *(reusing(interval) for interval in (2, 3, 5)),
    Setting("int8", "int8", BASE, "quantized"),
    Setting("together", "15 steps, interval", {**FAST, "guidance_interval": (0, 0.7)}),
    Setting("together", "15 steps, reuse", {**FAST, "reuse_interval": 2}, "reuse"),
    Setting("together", "15 steps, int8", FAST, "quantized"),
    Setting(
        "together", "15 steps, interval, reuse", {**FAST, "guidance_interval": (0, 0.7), "reuse_interval": 2}, "reuse"
    ),
)
LACKING: Mapping[Source, str] = {
    "miniature": "",
    "reuse": "needs a bundle with the graphs of feature reuse: kandrt export CHECKPOINTS --feature-reuse",
    "quantized": "needs a quantized bundle: kandrt quantize BUNDLE",
}


@dataclass
class Tally:
    """What became of a setting's pictures: a count of right and asked for each, squared errors, and times."""

    right: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, pictures: Pictures, expected: Pictures, trials: Sequence[TextTrial]) -> None:
        """Judge pictures; `expected` are those of the default setting."""
        self.errors += [float(np.mean((a - b) ** 2, dtype=np.float64)) for a, b in zip(pictures, expected, strict=True)]
        for picture, trial in zip(to_pil(pictures), trials, strict=True):
            verdict = [value for value in judge(picture, trial.request).values() if value is not None]
            self.right.append(sum(verdict))
            self.asked.append(len(verdict))

    def result(self, technique: str, label: str) -> Tradeoff:
        """All of it as a point."""
        low, high = interval(self.right, self.asked)
        error = sum(self.errors) / len(self.errors)
        return Tradeoff(
            technique=technique,
            setting=label,
            seconds=median(self.seconds),
            accuracy=sum(self.right) / sum(self.asked),
            low=low,
            high=high,
            pictures=len(self.asked),
            psnr=-10 * log10(error) if error else None,
        )


def measure_tradeoffs(
    pictures: int, threads: int | None, tell: Tell, reuse_bundle: Path | None, quantized: Path | None
) -> list[Tradeoff]:
    """Every setting's time and quality over `pictures` pictures; the default setting comes first.

    reuse_bundle and quantized are exports of the miniature's own checkpoints, with the graphs of feature reuse and in
    8 bits; settings that need one that is None are left out, which `tell` is told. seconds are medians of single
    pictures; of batching, of requests at different steps, seconds a picture, and its psnr is against the same requests
    alone.

    Raises InputError for no pictures, and what `load` raises.
    """
    if pictures < 1:
        raise InputError(f"trade-offs: expected pictures a setting, found {pictures}")
    folders: Mapping[Source, Path | None] = {"miniature": None, "reuse": reuse_bundle, "quantized": quantized}
    chosen = [each for each in SETTINGS if each.bundle == "miniature" or folders[each.bundle] is not None]
    for source, why in LACKING.items():
        names = ", ".join(each.label for each in SETTINGS if each.bundle == source and each not in chosen)
        if names:
            tell(f"trade-offs: {names} left out: {why}")
    with ExitStack() as stack:
        used = {each.bundle for each in chosen}
        models: dict[Source, Kandinsky] = {
            source: stack.enter_context(load(folder, threads=threads))
            for source, folder in folders.items()
            if source in used
        }
        for source, model in models.items():
            check_same(model, source, models["miniature"])
        trials = text_trials(pictures)
        found = judged({each: painter(models[each.bundle], each) for each in chosen}, trials, tell)
        return found + batching(models["miniature"], trials[:BATCHED], tell)


def batching(model: Kandinsky, trials: Sequence[TextTrial], tell: Tell) -> list[Tradeoff]:
    """Requests of BASE at different steps in shared evaluations, by how many share one at most.

    seconds are those of all requests over their number; at the beginning and the end fewer are under way. What pictures
    are compared with are those that the same requests give alone.
    """
    alone = [model(trial.prompt, seed=seed, **BASE).array for seed, trial in enumerate(trials)]
    found = []
    for at_once in (number for number in AT_ONCE if number <= len(trials)):
        tell(f"trade-offs: {at_once} requests at once")
        start = time.perf_counter()
        made = shared(Batch(model, most_rows=2 * at_once), [trial.prompt for trial in trials])
        tally = Tally(seconds=[(time.perf_counter() - start) / len(trials)])
        tally.add(np.concatenate(made), np.concatenate(alone), trials)
        found.append(tally.result("batching", f"{at_once} at once" if at_once > 1 else "one at a time"))
    return found


def shared(batch: Batch, prompts: Sequence[str]) -> list[Pictures]:
    """Each prompt's picture with its number as the seed; one request after another joins those under way."""
    tickets = [batch.submit(prompts[0], seed=0, **BASE)]
    evaluations = 0
    while batch.advance() or len(tickets) < len(prompts):
        evaluations += 1
        if evaluations % JOINS == 0 and len(tickets) < len(prompts):
            tickets.append(batch.submit(prompts[len(tickets)], seed=len(tickets), **BASE))
    return [ticket.result().array for ticket in tickets]


def check_same(model: Kandinsky, source: Source, miniature: Kandinsky) -> None:
    """Raise InputError for a bundle that is not the miniature: its pictures would be compared with another model's."""
    own, other = (
        {name: component.inputs for name, component in each.manifest.components.items() if name.endswith("_step")}
        for each in (miniature, model)
    )
    if any(other.get(name) != inputs for name, inputs in own.items() if name in ("prior_step", "decoder_step")):
        raise InputError(f"trade-offs: the bundle for {source} is none of the miniature; {LACKING[source]}")


def painter(model: Kandinsky, setting: Setting) -> Paint:
    """What paints as a setting says."""

    def paint(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Pictures, float]:
        start = time.perf_counter()
        result = model(list(prompts), seed=list(seeds), **setting.arguments)
        return result.array, time.perf_counter() - start

    return paint


def judged(painters: Mapping[Setting, Paint], trials: Sequence[TextTrial], tell: Tell) -> list[Tradeoff]:
    """All settings over all trials: the first ones a picture at a time, in turn, for their time, then in batches."""
    tallies = {setting: Tally() for setting in painters}
    for paint in painters.values():  # opens what is opened at first use
        paint([trials[0].prompt], [0])
    for count, (batch, seeds) in enumerate(batches(trials)):
        tell(f"trade-offs: pictures {seeds.start + 1} to {seeds.stop} of {len(trials)}")
        prompts, expected = [trial.prompt for trial in batch], None
        for setting in rotated(list(painters), count):
            made, seconds = painters[setting](prompts, seeds)
            expected = made if expected is None else expected  # the default setting is the first
            tallies[setting].add(made, expected, batch)
            if len(batch) == 1:
                tallies[setting].seconds.append(seconds)
    return [tally.result(setting.technique, setting.label) for setting, tally in tallies.items()]


def batches(trials: Sequence[TextTrial]) -> Iterator[tuple[Sequence[TextTrial], range]]:
    """Single trials as long as they are timed, then batches; with their numbers, which are the seeds."""
    start = 0
    while start < len(trials):
        batch = trials[start : start + (1 if start < TIMED else BATCH)]
        yield batch, range(start, start + len(batch))
        start += len(batch)


def rotated(settings: Sequence[Setting], turn: int) -> list[Setting]:
    """The first one first, the others each time from another one on: none always follows the same."""
    first, others = settings[0], list(settings[1:])
    cut = turn % len(others) if others else 0
    return [first, *others[cut:], *others[:cut]]


def interval(right: Sequence[int], asked: Sequence[int]) -> tuple[float, float]:
    """The 95 % interval of a share, where what is asked of one picture is not independent.

    Wilson's (1927) with the number of independent answers that the spread between pictures tells (the design effect of
    a cluster sample: Kish, Survey Sampling, 1965), at least the number of pictures and at most that of answers.
    """
    total, pictures = sum(asked), len(asked)
    share = sum(right) / total
    spread = sum((r - share * n) ** 2 for r, n in zip(right, asked, strict=True)) / total**2
    independent = share * (1 - share) / spread if spread else float(pictures)
    n = min(max(independent, pictures), total)
    middle, half = share + Z**2 / (2 * n), Z * sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max((middle - half) / (1 + Z**2 / n), 0.0), min((middle + half) / (1 + Z**2 / n), 1.0)
