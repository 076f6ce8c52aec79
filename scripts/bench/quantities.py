"""Numbers as people read them, and what they say of who is faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .results import BASELINE, OWN, CaseRecord, Equivalence, Measurement, Report, Residence, Spread

# The case that speaks for all, of those that were measured, by the name of its kind.
HEADLINES = (
    "text-to-image",
    "embedding-to-image",
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


def verdict(report: Report, measurement: Measurement) -> Verdict | None:
    """Whether the baseline is faster; None of the baseline itself.

    Within noise where the ratio's quartiles hold 1; not comparable where the results differ by more than they may: the
    contender's or the baseline's own from the one that both are compared with.
    """
    times = measurement.ratio
    if times is None:
        return None
    both = measurement, report.find(measurement.case, report.baseline)
    if any(m is not None and m.equivalence is not None and not m.equivalence.passed for m in both):
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


def is_own(contender: str) -> bool:
    """Whether a contender is this runtime, in one form or another."""
    return contender.startswith(OWN)


def rivals(report: Report, case: str) -> list[Measurement]:
    """Contenders in a case that the baseline competes with and whose results are near enough, fastest first.

    Those are not kandrt, or where the baseline is not, all forms of it.
    """
    own = is_own(report.baseline)
    found = [m for m in report.measurements if m.case == case and is_own(m.contender) != own]
    fair = [(v.times.median, m) for m in found if (v := verdict(report, m)) is not None and v.kind != "not comparable"]
    return [m for _, m in sorted(fair, key=lambda pair: pair[0])]


def dirty(report: Report) -> tuple[int, int]:
    """How many runs were made while something else took cores, and of how many that is known."""
    flags = [each for m in report.measurements for each in m.clean]
    return flags.count(False), len(flags)


@dataclass(frozen=True)
class Outcome:
    """What a report comes to: a sentence, and what it is about."""

    claim: str
    detail: str


def title_of(report: Report, contender: str) -> str:
    """A contender as a sentence names it."""
    if contender == BASELINE:
        return f"kandrt in {report.precision}"
    return {each.name: each.title for each in report.contenders}.get(contender, contender)


def outcome(report: Report) -> Outcome:
    """Of the case that speaks for all: the baseline and the fastest of those it competes with, of the same result."""
    case = headline_case(report)
    if case is None:
        return Outcome("Nothing was measured.", "")
    name, where = title_of(report, report.baseline), f"{case.name}, {sizes_text(case)}"
    fair = rivals(report, case.name)
    if fair and (found := verdict(report, fair[0])) is not None:
        best, times = fair[0], found.times.median
        first, second = name, title_of(report, best.contender)
        if not is_own(report.baseline):  # the sentence is about kandrt all the same
            first, second, times = second, first, 1 / times
        words = f"takes {digits(1 / times)} times as long as" if times < 1 else f"is {digits(times)} times as fast as"
        words = "is as fast, within noise, as" if found.kind == "within noise" else words
        among = f"; the fastest of {len(fair)}{' others' * is_own(report.baseline)}" if len(fair) > 1 else ""
        same = "" if best.equivalence is None else f"; results {equal_text(best.equivalence)}"
        return Outcome(f"{first} {words} {second}.", f"{where}{among}{same}")
    base = report.find(case.name, report.baseline)
    if base is None:
        return Outcome(f"{name} itself was not measured.", where)
    own = is_own(report.baseline)
    others = any(m.case == case.name and is_own(m.contender) != own for m in report.measurements)
    also = "; the results of the others differ by more than they may" if others else ""
    return Outcome(f"{name} takes {seconds_text(base.seconds.median)}.", where + also)


def fraction_of_peak(report: Report, measurement: Measurement) -> float | None:
    """FLOP/s of kandrt's runs, as a share of the best that was measured here in the same arithmetic.

    None where that was not measured, and of others, which do other work for the same result, how much is not known; of
    a start, which is not arithmetic; and of a GPU, whose peak is not measured.
    """
    case = next((each for each in report.cases if each.name == measurement.case), None)
    contender = next((each for each in report.contenders if each.name == measurement.contender), None)
    if case is None or contender is None or not case.flops or not is_own(contender.name) or measurement.device:
        return None
    if kind_of(case.name) == "cold-start":
        return None
    peaks = [rate for name, rate in report.machine.peaks.items() if name.endswith(f" {contender.arithmetic}")]
    return case.flops / measurement.seconds.median / max(peaks) if peaks else None


def host_per_step(report: Report, measurement: Measurement) -> float | None:
    """Seconds a step of the loop around the decoder's network, between one call of it and the next."""
    case = next((each for each in report.cases if each.name == measurement.case), None)
    if case is None or "host" not in measurement.stages or kind_of(case.name) == "image-to-image":
        return None  # of an image-to-image, steps are those asked for, not those made
    return measurement.stages["host"] / (case.steps - 1) if case.steps is not None and case.steps > 1 else None


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


def memory_kinds(residence: Residence) -> dict[str, int]:
    """What a process has in memory by kind, as it is named to people."""
    return {"its own": residence.anonymous, "mapped files": residence.file}
