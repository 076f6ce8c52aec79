"""Two reports side by side: what changed, and whether more than runs of the same program differ from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.text import Text

from ..console import table
from .quantities import digits, seconds_text
from .results import CaseRecord, Measurement, Report, Spread

RESAMPLES, CONFIDENCE, SEED = 4000, 0.95, 20
FEW_SAMPLES = 5  # of fewer, a bootstrap knows little of the spread


@dataclass(frozen=True)
class Change:
    """A contender in a case, before and after, in seconds a run.

    ratio is after over before, of medians; low and high hold 95 % of its bootstrap distribution. overlap: whether the
    quartiles of both have a time in common.
    """

    case: str
    contender: str
    before: Spread
    after: Spread
    ratio: float
    low: float
    high: float
    overlap: bool
    few: bool

    @property
    def noise(self) -> bool:
        """Whether the interval holds 1: no change is shown."""
        return self.low <= 1 <= self.high


@dataclass(frozen=True)
class Comparison:
    """Two reports: what both measured, what differs around it, and what only one has, "CASE CONTENDER" each."""

    changes: list[Change]
    warnings: list[str]
    only_before: list[str]
    only_after: list[str]


def compare(before: Report, after: Report) -> Comparison:
    """Compare every case and contender that both reports have."""
    pairs = {(m.case, m.contender): m for m in before.measurements}
    others = {(m.case, m.contender): m for m in after.measurements}
    return Comparison(
        [change(m, others[key]) for key, m in pairs.items() if key in others],
        differences(before, after),
        [" ".join(key) for key in pairs if key not in others],
        [" ".join(key) for key in others if key not in pairs],
    )


def change(before: Measurement, after: Measurement) -> Change:
    """What became of a contender in a case."""
    first, second = before.seconds, after.seconds
    low, high = interval(before.counted, after.counted)
    return Change(
        before.case, before.contender, first, second, second.median / first.median, low, high,
        overlap=first.low <= second.high and second.low <= first.high,
        few=min(len(before.counted), len(after.counted)) < FEW_SAMPLES,
    )  # fmt: skip


def interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the ratio of medians, after over before, by the percentile bootstrap with a fixed seed.

    Both are resampled with replacement, independently. Source: Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, chapter 13.
    """
    draw = np.random.default_rng(SEED).choice
    medians = [np.median(draw(each, (RESAMPLES, len(each))), axis=1) for each in (before, after)]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(medians[1] / medians[0], [tail, 100 - tail])
    return float(low), float(high)


def differences(before: Report, after: Report) -> list[str]:
    """What is not the same around the measurements, so that a change may be of it."""
    one, two = before.machine, after.machine
    facts = {name: (getattr(before, name), getattr(after, name)) for name in ("kandrt", "family", "precision")}
    facts |= {name: (getattr(one, name), getattr(two, name)) for name in ("cpu", "cores", "platform", "python")}
    for name in sorted(one.libraries.keys() | two.libraries.keys()):
        facts[name] = one.libraries.get(name, "none"), two.libraries.get(name, "none")
    told = [f"{name}: {first} before, {second} after" for name, (first, second) in facts.items() if first != second]
    known = {case.name: case for case in after.cases}
    return told + [
        f"case {case.name}: {sizes} before, {sizes_of(known[case.name])} after"
        for case in before.cases
        if case.name in known and (sizes := sizes_of(case)) != sizes_of(known[case.name])
    ]


def sizes_of(case: CaseRecord) -> str:
    """All sizes of a case."""
    named = {"prior steps": case.prior_steps, "steps": case.steps}
    steps = "".join(f", {count} {name}" for name, count in named.items() if count is not None)
    return f"{case.height}x{case.width}, batch {case.batch}{steps}"


def show(found: Comparison, out: Console) -> None:
    """Print it for people, in 80 columns and more."""
    for case in dict.fromkeys(each.case for each in found.changes):
        made = table("contender", ">before", ">after", ">change", ">95 %", "")
        for each in (each for each in found.changes if each.case == case):
            made.add_row(
                Text(each.contender), seconds_text(each.before.median), seconds_text(each.after.median),
                f"{100 * (each.ratio - 1):+.1f} %", f"{digits(each.low)}–{digits(each.high)}", words(each),
            )  # fmt: skip
        out.print(Text(case, style="bold"))
        out.print(made)
        out.print()
    if found.changes:
        told = "95 %: of after over before, medians, by a bootstrap of the samples; within noise where that holds 1."
        if any(each.few for each in found.changes):
            told += f" *: fewer than {FEW_SAMPLES} samples on a side, so that the noise is hardly known."
        out.print(Text(told, style="dim"))
    else:
        out.print("The reports have no case and contender in common.")
    for name, only in (("before", found.only_before), ("after", found.only_after)):
        if only:
            out.print(Text(f"only {name}: {', '.join(only)}", style="dim"), soft_wrap=True)


def words(change: Change) -> Text:
    """What a change comes to."""
    few = "*" if change.few else ""
    if change.noise:
        return Text(f"within noise{few}", style="dim")
    quartiles = ", quartiles overlap" if change.overlap else ""
    slower = change.ratio > 1
    return Text(f"{'slower' if slower else 'faster'}{few}{quartiles}", style="red" if slower else "green")
