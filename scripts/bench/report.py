"""A report on the terminal: the outcome, a table a case, what was not measured."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..console import size_text, table
from .quantities import (
    FEW_ROUNDS,
    digits,
    flops_text,
    fraction_of_peak,
    outcome,
    seconds_text,
    sizes_text,
    verdict,
)
from .results import CaseRecord, Equivalence, Measurement, Report

STYLES = {"faster": "green", "slower": "red", "within noise": "", "not comparable": "dim"}


def show(report: Report, out: Console) -> None:
    """Print it for people, in 80 columns and more."""
    found = outcome(report)
    out.print(Text(found.claim, style="bold"))
    out.print(Text(found.detail))
    out.print(Text(f"{report.family} {report.precision}, {report.bundle}", style="dim"), soft_wrap=True)
    out.print(Text(machine_text(report), style="dim"), soft_wrap=True)
    for case in report.cases:
        measured = [m for m in report.measurements if m.case == case.name]
        if measured:
            show_case(report, case, measured, out)
    if report.measurements:
        out.print(Text(explanation(report), style="dim"))
    for skipped in report.skipped:
        where = "" if skipped.case is None else f" in {skipped.case}"
        told = Text.assemble(
            ("not measured: ", "yellow"), f"{skipped.contender}{where}: {' '.join(skipped.why.split())}"
        )
        out.print(told, soft_wrap=True)


def show_case(report: Report, case: CaseRecord, measured: list[Measurement], out: Console) -> None:
    """A case: what is timed, and a row a contender."""
    work = "" if case.flops is None else f", {flops_text(case.flops)}"
    shares = [share for m in measured if (share := fraction_of_peak(report, m)) is not None]
    work += "".join(f" at {100 * share:.0f} % of the peak measured here" for share in shares)
    out.print()
    out.print(Text.assemble((case.name, "bold"), f"  {sizes_text(case)}{work}"))
    out.print(Text(case.boundary, style="dim"))
    out.print(case_table(measured))
    out.print()


def case_table(measured: list[Measurement]) -> Table:
    """Times with their spread, ratios, equivalence and memory of the contenders in a case."""
    made = table("contender", ">time", ">±", ">× kandrt", ">quartiles", ">equal", ">memory")
    for m in measured:
        found, seconds = verdict(m), m.seconds
        half = 50 * (seconds.high - seconds.low) / seconds.median
        made.add_row(
            Text(m.contender),
            seconds_text(seconds.median),
            f"{half:.0f} %" if len(m.samples) > 1 else "",
            "" if found is None else Text(digits(found.times.median), style=STYLES[found.kind]),
            "" if found is None else f"{digits(found.times.low)}–{digits(found.times.high)}",
            equal_cell(m.equivalence),
            "" if m.peak_memory is None else size_text(m.peak_memory),
        )
    return made


def equal_cell(equivalence: Equivalence | None) -> Text:
    """How near a result is to the baseline's."""
    if equivalence is None:
        return Text("")
    if equivalence.found is None:
        return Text("exact")
    text = f"{equivalence.found:.0f} dB" if equivalence.what == "PSNR" else f"{equivalence.found:.0e}"
    return Text(text, style="" if equivalence.passed else "red")


def explanation(report: Report) -> str:
    """What the columns mean."""
    text = (
        "time: median of the runs, ± half the distance of its quartiles; × kandrt: how many times as long as kandrt a "
        "run takes, median and quartiles of pairs of runs that are neighbours in time; equal: to kandrt's result."
    )
    if min(len(m.samples) for m in report.measurements) < FEW_ROUNDS:
        text += f" With fewer than {FEW_ROUNDS} rounds, quartiles say little."
    return text


def machine_text(report: Report) -> str:
    """Where it was measured."""
    machine = report.machine
    memory = "" if machine.memory is None else f", {size_text(machine.memory)}"
    cores = f"{machine.cores} core{'s' * (machine.cores != 1)}"
    return f"{machine.cpu}, {cores}{memory}, {machine.platform}, Python {machine.python}"
