"""A report on the terminal: the outcome, a table a case, what was not measured."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..console import size_text, table
from .quantities import (
    FEW_ROUNDS,
    digits,
    dirty,
    flops_text,
    fraction_of_peak,
    host_per_step,
    outcome,
    seconds_text,
    sizes_text,
    verdict,
)
from .results import CaseRecord, Equivalence, Measurement, Report

SHORT = 8  # letters of a contender's name that a column's head has room for
MEMORY_KINDS = (
    "at most: the most that was resident at a time. After the last run: its own, which no other process can use; files "
    "that are mapped, such as weights, which processes share and the system may drop; and all of it, with what is "
    "shared divided among those who share it."
)
STYLES = {"faster": "green", "slower": "red", "within noise": "", "not comparable": "dim"}


def show(report: Report, out: Console, *, memory: bool = False) -> None:
    """Print it for people, in 80 columns and more; with `memory` a table of that too."""
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
    if memory:
        show_memory(report, out)
    if report.tradeoffs:
        show_tradeoffs(report, out)
    for skipped in report.skipped:
        where = "" if skipped.case is None else f" in {skipped.case}"
        told = Text.assemble(
            ("not measured: ", "yellow"), f"{skipped.contender}{where}: {' '.join(skipped.why.split())}"
        )
        out.print(told, soft_wrap=True)


def show_case(report: Report, case: CaseRecord, measured: list[Measurement], out: Console) -> None:
    """A case: what is timed, and a row a contender."""
    work = "" if case.flops is None else f", {flops_text(case.flops)}"
    base = report.find(case.name, report.baseline)
    share = None if base is None else fraction_of_peak(report, base)
    work += "" if share is None else f" at {100 * share:.0f} % of the peak measured here"
    out.print()
    out.print(Text.assemble((case.name, "bold"), f"  {sizes_text(case)}{work}"))
    out.print(Text(case.boundary, style="dim"))
    host = None if base is None else host_per_step(report, base)
    if host is not None:
        out.print(Text(f"Beside the network a step costs {seconds_text(host)}.", style="dim"))
    out.print(case_table(report, measured))
    out.print()


def case_table(report: Report, measured: list[Measurement]) -> Table:
    """Times with their spread, ratios, equivalence and memory of the contenders in a case."""
    beside = report.baseline if len(report.baseline) <= SHORT else "base"
    made = table("contender", ">time", ">±", f">× {beside}", ">quartiles", ">equal", ">memory")
    for m in measured:
        found, seconds = verdict(report, m), m.seconds
        half = 50 * (seconds.high - seconds.low) / seconds.median
        made.add_row(
            Text(m.contender),
            seconds_text(seconds.median),
            f"{half:.0f} %" if len(m.counted) > 1 else "",
            "" if found is None else Text(digits(found.times.median), style=STYLES[found.kind]),
            "" if found is None or len(m.ratios) < 2 else f"{digits(found.times.low)}–{digits(found.times.high)}",
            equal_cell(m.equivalence),
            "" if m.peak_memory is None else size_text(m.peak_memory),
        )
    return made


def equal_cell(equivalence: Equivalence | None) -> Text:
    """How near a result is to the one that it is compared with."""
    if equivalence is None:
        return Text("")
    if equivalence.found is None:
        return Text("exact")
    text = f"{equivalence.found:.0f} dB" if equivalence.what == "PSNR" else f"{equivalence.found:.0e}"
    return Text(text, style="" if equivalence.passed else "red")


def explanation(report: Report) -> str:
    """What the columns mean."""
    base = report.baseline
    expected = next((m.equivalence.to for m in report.measurements if m.equivalence is not None), base)
    text = (
        f"time: median of the runs, ± half the distance of its quartiles; × {base}: how many times as long as {base} a "
        f"run takes, median and quartiles of pairs of runs that are neighbours in time; equal: to {expected}'s result."
    )
    told, told_of = dirty(report)
    if told:
        text += (
            f" In {told} of {told_of} runs not all cores were this program's; medians are of the others where these "
        )
        text += "are at least half."
    if min(len(m.samples) for m in report.measurements) < FEW_ROUNDS:
        text += f" With fewer than {FEW_ROUNDS} rounds, quartiles say little."
    return text


def show_memory(report: Report, out: Console) -> None:
    """Memory by kind, a row a contender and case, where it is known."""
    made = table("case", "contender", ">at most", ">its own", ">files", ">shared out")
    for m in report.measurements:
        if m.memory is not None:
            found = m.peak_memory, m.memory.anonymous, m.memory.file, m.memory.proportional
            made.add_row(Text(m.case), Text(m.contender), *("" if each is None else size_text(each) for each in found))
    out.print()
    out.print(Text("Memory", style="bold"))
    out.print(made)
    out.print(Text(MEMORY_KINDS, style="dim"))


def show_tradeoffs(report: Report, out: Console) -> None:
    """Ways to do less work, and what they cost."""
    made = table("technique", "setting", ">a picture", ">right", ">95 %", ">as default")
    for each in report.tradeoffs:
        made.add_row(
            Text(each.technique), Text(each.setting), seconds_text(each.seconds), f"{100 * each.accuracy:.0f} %",
            f"{100 * each.low:.0f}–{100 * each.high:.0f}", "exact" if each.psnr is None else f"{each.psnr:.0f} dB",
        )  # fmt: skip
    out.print()
    out.print(Text("Quality against time", style="bold"))
    out.print(made)


def machine_text(report: Report) -> str:
    """Where it was measured."""
    machine = report.machine
    memory = "" if machine.memory is None else f", {size_text(machine.memory)}"
    cores = f"{machine.cores} core{'s' * (machine.cores != 1)}"
    return f"{machine.cpu}, {cores}{memory}, {machine.platform}, Python {machine.python}"
