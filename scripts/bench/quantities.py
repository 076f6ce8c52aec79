"""Numbers as people read them, and what they say of who is faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .results import BASELINE, CaseRecord, Equivalence, Measurement, Report, Spread

# The case that speaks for all, of those that were measured, by the name of its kind.
HEADLINES = (
    "text-to-image",
    "image-to-image",
    "controlnet",
    "step",
    "movq",
    "prior",
    "prior-first",
    "cold-start",
    "load",
)
FEW_ROUNDS = 3

Kind = Literal["faster", "slower", "within noise", "not comparable"]


@dataclass(frozen=True)
class Verdict:
    """What a pair of contender and baseline shows: `kind` is of the baseline, `times` is how many times as long."""

    kind: Kind
    times: Spread
    text: str


def verdict(measurement: Measurement) -> Verdict | None:
    """Whether the baseline is faster; None of the baseline itself.

    Within noise where the ratio's quartiles hold 1; not comparable where the results differ by more than they may.
    """
    times = measurement.ratio
    if times is None:
        return None
    if measurement.equivalence is not None and not measurement.equivalence.passed:
        return Verdict("not comparable", times, "not comparable")
    if times.low <= 1 <= times.high:
        return Verdict("within noise", times, "within noise")
    if times.median > 1:
        return Verdict("faster", times, f"{digits(times.median)} times as fast")
    return Verdict("slower", times, f"takes {digits(1 / times.median)} times as long")


def kind_of(case: str) -> str:
    """A case's kind: its name without sizes."""
    return case.partition("@")[0].partition("*")[0]


def headline_case(report: Report) -> CaseRecord | None:
    """The case that speaks for all; None where nothing was measured."""
    measured = {m.case for m in report.measurements}
    found = [case for case in report.cases if case.name in measured]
    order = {kind: i for i, kind in enumerate(HEADLINES)}
    return min(found, key=lambda case: order.get(kind_of(case.name), len(order)), default=None)


def rivals(report: Report, case: str) -> list[Measurement]:
    """Contenders in a case that are not kandrt in another form and whose results are near enough, fastest first."""
    found = [m for m in report.measurements if m.case == case and not m.contender.startswith(BASELINE)]
    fair = [(v.times.median, m) for m in found if (v := verdict(m)) is not None and v.kind != "not comparable"]
    return [m for _, m in sorted(fair, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class Outcome:
    """What a report comes to: a sentence, and what it is about."""

    claim: str
    detail: str


def outcome(report: Report) -> Outcome:
    """Of the case that speaks for all, against the fastest of the others that give the same result."""
    case = headline_case(report)
    if case is None:
        return Outcome("Nothing was measured.", "")
    name, where = f"kandrt in {report.precision}", f"{case.name}, {sizes_text(case)}"
    fair = rivals(report, case.name)
    if fair and (found := verdict(fair[0])) is not None:
        best, times = fair[0], found.times.median
        words = {
            "faster": f"{name} is {digits(times)} times as fast as",
            "slower": f"{name} takes {digits(1 / times)} times as long as",
        }.get(found.kind, f"{name} is as fast, within noise, as")
        title = {each.name: each.title for each in report.contenders}.get(best.contender, best.contender)
        among = f"; the fastest of {len(fair)} others" if len(fair) > 1 else ""
        same = "" if best.equivalence is None else f"; results {equal_text(best.equivalence)}"
        return Outcome(f"{words} {title}.", f"{where}{among}{same}")
    own = report.find(case.name, BASELINE)
    if own is None:
        return Outcome("kandrt itself was not measured.", where)
    others = any(m.case == case.name and not m.contender.startswith(BASELINE) for m in report.measurements)
    also = "; the results of the others differ from kandrt's by more than they may" if others else ""
    return Outcome(f"{name} takes {seconds_text(own.seconds.median)}.", where + also)


def fraction_of_peak(report: Report, measurement: Measurement) -> float | None:
    """FLOP/s of the baseline's runs, as a share of the best that was measured on this machine; None of others.

    Others do other work for the same result, and how much is not known.
    """
    case = next((each for each in report.cases if each.name == measurement.case), None)
    if case is None or not case.flops or not report.machine.peaks or measurement.contender != BASELINE:
        return None
    return case.flops / measurement.seconds.median / max(report.machine.peaks.values())


# Texts


def seconds_text(seconds: float) -> str:
    """Three digits and a unit: "1.23 s", "45.6 ms"."""
    for factor, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= 0.9995 * factor or unit == "µs":
            return f"{digits(seconds / factor)} {unit}"
    raise AssertionError


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def spread_text(spread: Spread, unit: Literal["times", "seconds"]) -> str:
    """Median and quartiles: "2.31 (2.20 to 2.40)"."""
    if unit == "times":
        return f"{digits(spread.median)} ({digits(spread.low)} to {digits(spread.high)})"
    return f"{seconds_text(spread.median)} ({seconds_text(spread.low)} to {seconds_text(spread.high)})"


def flops_text(flops: float, unit: str = "FLOP") -> str:
    """In powers of 1000: "1.25 TFLOP"."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if flops >= 0.9995 * factor:
            return f"{digits(flops / factor)} {prefix}{unit}"
    return f"{flops:.0f} {unit}"


def equal_text(equivalence: Equivalence | None) -> str:
    """How near two results are: "equal to 78 dB"."""
    if equivalence is None:
        return "not compared"
    if equivalence.found is None:
        return "equal to the last bit"
    if equivalence.what == "PSNR":
        return f"{'equal to' if equivalence.passed else 'apart, at'} {equivalence.found:.0f} dB"
    return f"{'equal to' if equivalence.passed else 'apart, by'} {equivalence.found:.1e}"


def sizes_text(case: CaseRecord) -> str:
    """A case's sizes: "512 x 768 px, 2 pictures, 25 + 50 steps"."""
    parts = [] if kind_of(case.name).startswith("prior") else [f"{case.height} × {case.width} px"]
    parts += [f"{case.batch} pictures"] if case.batch > 1 else []
    steps = [str(count) for count in (case.prior_steps, case.steps) if count is not None]
    if steps:
        parts.append(f"{' + '.join(steps)} {'step' if steps == ['1'] else 'steps'}")
    return ", ".join(parts)
