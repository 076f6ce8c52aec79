"""A report as one HTML page that needs nothing else: no script, no network, no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ...engines.errors import MissingExtraError
from ...engines.files import atomic_write
from ..console import size_text
from .page_style import STYLE
from .plots import Plot, plots
from .quantities import (
    FEW_ROUNDS,
    digits,
    dirty,
    equal_text,
    flops_text,
    fraction_of_peak,
    host_per_step,
    is_own,
    outcome,
    seconds_text,
    sizes_text,
    spread_text,
    verdict,
)
from .report import MEMORY_KINDS, machine_text
from .results import CaseRecord, Measurement, Report

STRIP_WIDTH, STRIP_HEIGHT = 150, 18
CLASSES = {"faster": "faster", "slower": "slower", "within noise": "", "not comparable": "apart"}


def save_html(report: Report, path: Path) -> None:
    """Write the page; OutputError where that fails. Without matplotlib it says where plots would be had."""
    data = page(report).encode("utf-8", "replace")
    with atomic_write(path, len(data)) as file:
        file.write(data)


def page(report: Report) -> str:
    """The page: the outcome first, then what it rests on."""
    title = escape(f"kandrt bench: {report.family} {report.precision}")
    parts = [header(report), overview(report), figures(report), *cases(report), tradeoffs(report), memory(report)]
    parts += [sizes(report), machine(report), not_measured(report), repeat(report), raw(report)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def tabled(head: Sequence[str], rows: Iterable[str]) -> str:
    """A table that scrolls sideways where it is too wide; a column's name that starts with ">" is of numbers."""
    classes = [' class="n"' if name.startswith(">") else "" for name in head]
    names = "".join(
        f'<th scope="col"{kind}>{escape(name.removeprefix(">"))}</th>' for kind, name in zip(classes, head, strict=True)
    )
    body = "\n".join(rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{names}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def number(text: str, detail: str = "") -> str:
    """A table's cell of a number."""
    return f'<td class="n">{text}{f"<br><small>{detail}</small>" if detail else ""}</td>'


def row_head(report: Report, contender: str) -> str:
    """The start of a contender's row, with its title."""
    title = next((each.title for each in report.contenders if each.name == contender), "")
    own = ' class="own"' if contender == report.baseline else ""
    return f'<tr{own}><th scope="row">{escape(contender)}<small>{escape(title)}</small></th>'


# The outcome


def header(report: Report) -> str:
    """The outcome in a sentence, and of what."""
    found = outcome(report)
    detail = paragraph(found.detail, "lead") if found.detail else ""
    told = [
        f"{report.family}, {report.precision}: {report.bundle}",
        machine_text(report),
        f"kandrt {report.kandrt}, {report.started[:19].replace('T', ' ')} UTC, in {report.seconds:.0f} s",
    ]
    rounds = {len(m.samples) for m in report.measurements}
    if rounds and min(rounds) < FEW_ROUNDS:
        told.append(f"Some figures are of fewer than {FEW_ROUNDS} rounds: their quartiles say little.")
    taken, known = dirty(report)
    if taken:
        told.append(
            f"In {taken} of {known} runs a small product beside them found that not all cores were this program's; "
            "medians are of the others, where these are at least half."
        )
    lines = "".join(paragraph(line, "muted") for line in told)
    return f'<header><p class="kicker">kandrt bench</p><h1>{escape(found.claim)}</h1>{detail}{lines}</header>'


def overview(report: Report) -> str:
    """How many times as long as the baseline each contender takes in each case."""
    base = report.baseline
    names = [c.name for c in report.contenders if any(m.contender == c.name and m.beside for m in report.measurements)]
    if not names:
        return ""
    rows = []
    for case in report.cases:
        cells = "".join(ratio_cell(report, report.find(case.name, name)) for name in names)
        rows.append(f'<tr><th scope="row">{escape(case.name)}</th>{cells}</tr>')
    return (
        f"<section><h2>Against {escape(base)}</h2>"
        + paragraph(
            f"How many times as long as {base} a run takes: the median of pairs of runs that are neighbours in time, "
            f"with its quartiles. Above 1, {base} is faster; where the quartiles hold 1, neither is said to be. "
            "Figures stand only where the results agree; how well, and what is timed, is told with each case."
        )
        + tabled(["case", *(f">{name}" for name in names)], rows)
        + "</section>"
    )


def ratio_cell(report: Report, measurement: Measurement | None) -> str:
    """A ratio with its quartiles, coloured by what it means."""
    found = None if measurement is None else verdict(report, measurement)
    if found is None or measurement is None:
        return '<td class="n muted">–</td>'
    if found.kind == "not comparable":
        return '<td class="n apart">not comparable</td>'
    times = found.times
    rival = is_own(measurement.contender) != is_own(report.baseline)
    spread = f"{digits(times.low)} to {digits(times.high)}" if len(measurement.ratios) > 1 else "one pair"
    return (
        f'<td class="n"><span class="{CLASSES[found.kind] if rival else ""}"><b>{digits(times.median)}</b></span><br>'
        f"<small>{spread}</small></td>"
    )


def figures(report: Report) -> str:
    """The plots, or how to get them."""
    try:
        drawn = plots(report)
    except MissingExtraError as error:
        return f"<section><h2>Plots</h2>{paragraph(f'Not drawn: {error}')}</section>"
    if not drawn:
        return ""
    return f'<section><h2>Plots</h2><div class="figures">{"".join(map(figure, drawn))}</div></section>'


def figure(plot: Plot) -> str:
    """A plot with what it shows."""
    caption = f"<figcaption>{escape(plot.caption)}</figcaption>"
    return f"<figure><h3>{escape(plot.title)}</h3>{plot.svg}{caption}</figure>"


# Cases


def cases(report: Report) -> Iterable[str]:
    """Every case: what is timed, and a row a contender."""
    yield "<section><h2>Cases</h2>"
    for case in report.cases:
        measured = [m for m in report.measurements if m.case == case.name]
        if measured:
            yield case_section(report, case, measured)
    yield "</section>"


def case_section(report: Report, case: CaseRecord, measured: Sequence[Measurement]) -> str:
    """A case's sizes, boundary, work and table."""
    work = []
    if case.flops is not None:
        work.append(f"{flops_text(case.flops)} a run")
    if case.bytes is not None:
        work.append(f"{size_text(round(case.bytes))} read and written at least")
    for m in measured:
        share = fraction_of_peak(report, m)
        if share is not None and case.flops is not None:
            rate = flops_text(case.flops / m.seconds.median, "FLOP/s")
            work.append(f"{m.contender} reaches {rate}, {100 * share:.0f} % of the best measured here in its precision")
        host = host_per_step(report, m)
        if host is not None:
            work.append(f"beside the network a step of {m.contender} costs {seconds_text(host)}")
    most = max(max(m.samples) for m in measured)
    head = [
        "contender",
        ">time of a run",
        f"runs, 0 to {seconds_text(most)}",
        f">times as long as {report.baseline}",
        "result",
    ]
    head += [">peak memory", ">to open", ">first run"]
    return (
        f"<h3>{escape(case.name)}</h3>{paragraph(sizes_text(case), 'muted')}{paragraph(case.boundary)}"
        + (paragraph("; ".join(work) + ".", "muted") if work else "")
        + tabled(head, (case_row(report, m, most) for m in measured))
    )


def case_row(report: Report, m: Measurement, most: float) -> str:
    """A contender in a case."""
    seconds = m.seconds
    times = '<td class="n muted">1</td>' if not m.beside else ratio_cell(report, m)
    equal = "" if not m.beside and m.equivalence is None else equal_text(m.equivalence)
    if m.equivalence is not None and m.equivalence.to != report.baseline:
        equal += f", with {m.equivalence.to}"
    if m.equivalence is not None and not m.equivalence.passed:
        bound = f"{m.equivalence.bound:.0f} dB" if m.equivalence.what == "PSNR" else f"{m.equivalence.bound:.0e}"
        equal += f" (bound {bound})"
    cells = [
        number(seconds_text(seconds.median), spread_of(m)),
        f"<td>{strip(m, most)}</td>",
        times,
        f'<td class="w">{escape(equal)}</td>',
        number("" if m.peak_memory is None else size_text(m.peak_memory)),
        number(optional_seconds(m.open_seconds)),
        number(optional_seconds(m.first_seconds)),
    ]
    return f"{row_head(report, m.contender)}{''.join(cells)}</tr>"


def spread_of(m: Measurement) -> str:
    """The quartiles of the runs, of one that there are none; of a GPU, the share in which it waited for the host."""
    seconds = m.seconds
    text = f"{seconds_text(seconds.low)} to {seconds_text(seconds.high)}" if len(m.counted) > 1 else "one run"
    return text if m.host_bound is None else f"{text}, {100 * m.host_bound:.0f} % of it host-bound"


def optional_seconds(seconds: float | None) -> str:
    """A time, where there is one."""
    return "" if seconds is None else seconds_text(seconds)


def strip(m: Measurement, most: float) -> str:
    """The runs as dots from zero to the slowest of the case, their quartiles as a bar, the median as a tick."""
    seconds, middle = m.seconds, STRIP_HEIGHT / 2
    scale = (STRIP_WIDTH - 6) / most if most > 0 else 0.0
    colour = "var(--own)" if is_own(m.contender) else "var(--other)"
    low, median, high = (3 + scale * each for each in (seconds.low, seconds.median, seconds.high))
    dots = "".join(
        f'<circle cx="{3 + scale * each:.1f}" cy="{middle}" r="2" fill="var(--ink)" fill-opacity=".35"/>'
        for each in m.counted
    )
    label = escape(f"{m.contender}: {spread_text(seconds, 'seconds')}", quote=True)
    return (
        f'<svg class="strip" role="img" aria-label="{label}" width="{STRIP_WIDTH}" height="{STRIP_HEIGHT}" '
        f'viewBox="0 0 {STRIP_WIDTH} {STRIP_HEIGHT}">'
        f'<line x1="3" x2="{STRIP_WIDTH - 3}" y1="{middle}" y2="{middle}" stroke="var(--line)"/>'
        f'<rect x="{low:.1f}" y="{middle - 3}" width="{max(high - low, 1):.1f}" height="6" fill="{colour}" '
        f'fill-opacity=".45"/>{dots}'
        f'<line x1="{median:.1f}" x2="{median:.1f}" y1="2" y2="{STRIP_HEIGHT - 2}" stroke="{colour}" '
        'stroke-width="2"/></svg>'
    )


# What it rests on


def memory(report: Report) -> str:
    """Memory by kind, of the processes after their last run."""
    known = [m for m in report.measurements if m.memory is not None or m.device is not None]
    rows = []
    for m in known:
        kept = m.memory
        found = [m.peak_memory, *((kept.anonymous, kept.file, kept.proportional) if kept else (None,) * 3)]
        found.append(None if m.device is None else m.device.memory)
        cells = "".join(number("" if each is None else size_text(each)) for each in found)
        rows.append(f'<tr><th scope="row">{escape(m.case)}</th><td>{escape(m.contender)}</td>{cells}</tr>')
    if not rows:
        return ""
    head = ["case", "contender", ">at most", ">its own", ">mapped files", ">shared out", ">on the GPU"]
    table = tabled(head, rows)
    told = f"<details><summary>All {len(rows)} processes</summary>{table}</details>"
    return f"<section><h2>Memory</h2>{paragraph(MEMORY_KINDS)}{told}</section>"


def tradeoffs(report: Report) -> str:
    """Ways to do less work for a picture, and what they cost."""
    if not report.tradeoffs:
        return ""
    rows = [
        f'<tr><th scope="row">{escape(each.technique)}</th><td>{escape(each.setting)}</td>'
        + number(seconds_text(each.seconds))
        + number(f"{100 * each.accuracy:.0f} %", f"{100 * each.low:.0f} to {100 * each.high:.0f}")
        + number("equal" if each.psnr is None else f"{each.psnr:.0f} dB")
        + number(str(each.pictures))
        + "</tr>"
        for each in report.tradeoffs
    ]
    note = (
        "None of these is on by default. Right: the share of what the prompts ask for that a judge finds in the "
        "pictures, with its 95 % interval; last, how near pictures are to those of the default with the same seeds."
    )
    head = ["technique", "setting", ">a picture", ">right", ">against default", ">pictures"]
    return f"<section><h2>Quality against time</h2>{paragraph(note)}{tabled(head, rows)}</section>"


def sizes(report: Report) -> str:
    """What each contender takes on disk."""
    known = [each for each in report.contenders if each.installed_size is not None]
    if not known:
        return ""
    rows = [f"{row_head(report, each.name)}{number(size_text(each.installed_size or 0))}</tr>" for each in known]
    note = "Bytes of the packages that it needs, with all that these need, as installed here; without weights."
    return f"<section><h2>Installed size</h2>{paragraph(note)}{tabled(['contender', '>packages'], rows)}</section>"


def machine(report: Report) -> str:
    """The machine, its limits as measured, and the versions."""
    found = report.machine
    facts = {
        "CPU": found.cpu,
        "cores": str(found.cores),
        "memory": "unknown" if found.memory is None else size_text(found.memory),
        "system": found.platform,
        "Python": found.python,
        "kandrt": report.kandrt,
        **found.libraries,
        **{f"peak, {name}": flops_text(peak, "FLOP/s") for name, peak in found.peaks.items()},
        **({} if found.probe is None else {"beside samples": f"{flops_text(found.probe, 'FLOP/s')}, a small product"}),
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<section><h2>Machine and versions</h2><dl>{listed}</dl></section>"


def not_measured(report: Report) -> str:
    """What was left out, and why."""
    if not report.skipped:
        return ""
    rows = [
        f'<tr><th scope="row">{escape(each.contender)}</th><td>{escape(each.case or "all cases")}</td>'
        f"<td>{escape(each.why)}</td></tr>"
        for each in report.skipped
    ]
    return f"<section><h2>Not measured</h2>{tabled(['contender', 'in', 'why'], rows)}</section>"


def repeat(report: Report) -> str:
    """The command that makes such a report."""
    note = "Runs of a contender and of the baseline take turns, each in a process of its own; warm-up does not count."
    return f"<section><h2>To repeat it</h2><pre>{escape(report.command)}</pre>{paragraph(note, 'muted')}</section>"


def raw(report: Report) -> str:
    """Every sample."""
    rows = []
    for m in report.measurements:
        for name, values in (("runs", m.samples), (f"{report.baseline} beside", m.beside), ("warm-up", m.warm_up)):
            if values:
                flags = {"runs": m.clean, "warm-up": []}.get(name, m.beside_clean) or [True] * len(values)
                numbers = ", ".join(
                    f"{value:.6g}{'' if kept else '*'}" for value, kept in zip(values, flags, strict=True)
                )
                rows.append(
                    f'<tr><th scope="row">{escape(m.case)}</th><td>{escape(m.contender)}</td><td>{escape(name)}</td>'
                    f"<td>{numbers}</td></tr>"
                )
    table = tabled(["case", "contender", "of", "seconds"], rows)
    told = f"All {len(rows)} series, in seconds; *: not all cores were this program's"
    return f"<section><h2>Samples</h2><details><summary>{told}</summary>{table}</details></section>"
