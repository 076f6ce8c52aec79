"""The plots of a report, as SVG that stands in an HTML page and takes its colours from the page.

Figures are as wide as a phone's screen, so that their text is as large there as the page's.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from ...engines.errors import MissingExtraError
from ..console import size_text
from .quantities import digits, flops_text, headline_case, is_own, kind_of, memory_kinds, seconds_text, verdict
from .results import Measurement, Report, Tradeoff

WIDTH, ROW, HEAD = 4.0, 0.4, 0.6  # inches: of a figure, of a row, of what stands above and below
TEXT_SIZE = 9
# Stand-ins for the page's colours: matplotlib wants numbers, and the page changes its own with the reader's preference.
COLOURS = {name: f"#0a0b{i:02x}" for i, name in enumerate((
    "ink", "muted", "line", "card", "own", "other", "bad", "c1", "c2", "c3", "c4", "c5", "c6"
))}  # fmt: skip
BACKGROUND = {"facecolor": COLOURS["card"], "edgecolor": "none", "pad": 0.8}  # so that no line crosses a name
SERIES = ("c1", "c2", "c3", "c4", "c5", "c6")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Plot:
    """A figure: what it shows, in a sentence, and the SVG."""

    title: str
    caption: str
    svg: str


def plots(report: Report) -> list[Plot]:
    """All plots that the report has numbers for; MissingExtraError without matplotlib."""
    with style():
        figures = (ratios, stages, tradeoffs, scaling, memory, residence, loading, operators)
        return [plot for draw in figures for plot in draw(report)]


@contextmanager
def style() -> Iterator[None]:
    """What all figures have in common."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtraError("plots in a report", "matplotlib", "bench") from error
    muted, line = COLOURS["muted"], COLOURS["line"]
    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "kandrt", "font.size": TEXT_SIZE, "text.color": COLOURS["ink"],
        "axes.edgecolor": line, "axes.labelcolor": muted, "xtick.color": line, "ytick.color": line,
        "xtick.labelcolor": muted, "ytick.labelcolor": muted, "axes.grid": False, "grid.color": line,
        "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True,
        "axes.linewidth": 0.8, "grid.linewidth": 0.6, "axes.axisbelow": True, "text.parse_math": False,
    }  # fmt: skip
    with mpl.rc_context(settings):
        yield


def figure(height: float) -> tuple[Any, Any]:
    """A figure of one pair of axes."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH, height))
    return made, made.add_subplot()


def finished(made: Any, name: str, title: str, caption: str) -> Plot:
    """A figure as SVG that may stand beside others in a page: its ids begin with `name`."""
    file = io.StringIO()
    made.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for pattern, by in (
        (r"<metadata>.*?</metadata>", ""),
        (r"<style.*?</style>", ""),
        (r'\s+xmlns(:\w+)?="[^"]*"', ""),
        (r"xlink:href=", "href="),
        (r'id="([^"]+)"', rf'id="{name}-\1"'),
        (r'href="#([^"]+)"', rf'href="#{name}-\1"'),
        (r"url\(#([^)]+)\)", rf"url(#{name}-\1)"),
        (r"font: ([\d.]+px) [^;\"]+", r"font-size: \1"),
        (r"\s+(version|width|height)=\"[^\"]*\"", ""),
    ):
        # sizes go from the outermost element alone: those of shapes are theirs
        svg = re.sub(pattern, by, svg, count=3 if "version" in pattern else 0, flags=re.DOTALL)
    for colour, number in COLOURS.items():
        svg = svg.replace(number, f"var(--{colour})")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)
    return Plot(title, caption, svg)


def row_axes(rows: int, groups: int = 0) -> tuple[Any, Any]:
    """Axes of named rows from the top down: row i is at y = i."""
    made, axes = figure(HEAD + ROW * (rows + 0.8 * groups))
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    axes.xaxis.grid(visible=True)
    return made, axes


def name_row(axes: Any, y: float, name: str, value: str = "", strong: bool = False) -> None:
    """Write a row's name above its place, and its value at the right edge."""
    place = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": TEXT_SIZE - 0.5, "bbox": BACKGROUND}
    axes.text(0, y - 0.34, name, ha="left", color=COLOURS["ink" if strong else "muted"], **place)
    axes.text(1, y - 0.34, value, ha="right", color=COLOURS["ink"], **place)


def colour_of(contender: str) -> str:
    """kandrt in its own colour, all others in one: their names tell them apart."""
    return COLOURS["own" if is_own(contender) else "other"]


# Figures


def ratios(report: Report) -> Iterator[Plot]:
    """How many times as long as kandrt each contender takes, in every case."""
    cases = {case.name: [m for m in report.measurements if m.case == case.name and m.beside] for case in report.cases}
    cases = {name: rows for name, rows in cases.items() if rows}
    cases = {name: rows for name, rows in cases.items() if kind_of(name) == name} or cases  # sizes have their own
    if not cases:
        return
    rows = sum(map(len, cases.values()))
    made, axes = row_axes(rows, len(cases))
    y = 0.0
    for name, measured in cases.items():
        axes.text(0, y, name, transform=axes.get_yaxis_transform(), weight="bold", va="center", bbox=BACKGROUND)
        y += 0.8
        for m in measured:
            draw_ratio(axes, y, report, m)
            y += 1
    axes.set_ylim(y - 0.5, -0.5)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 1.15))
    number_log_axis(axes.xaxis, *axes.get_xlim())
    axes.axvline(1, color=COLOURS["own"], linewidth=1.2)
    axes.set_xlabel(f"times as long as {report.baseline} (right of 1: {report.baseline} is faster)")
    caption = "Dots are pairs of neighbouring runs, bars their quartiles, ticks their medians; logarithmic."
    yield finished(made, "ratios", f"Time against {report.baseline}", caption)


def draw_ratio(axes: Any, y: float, report: Report, m: Measurement) -> None:
    """A row: dots, quartiles, median."""
    found = verdict(report, m)
    if found is None:
        return
    fair = found.kind != "not comparable"
    colour, times = colour_of(m.contender) if fair else COLOURS["bad"], found.times
    pairs = m.ratios
    axes.plot(pairs, [y + 0.1] * len(pairs), "o", color=COLOURS["ink"], markersize=3, alpha=0.35, markeredgewidth=0)
    axes.plot([times.low, times.high], [y + 0.1] * 2, color=colour, linewidth=5, solid_capstyle="butt", alpha=0.55)
    axes.plot(times.median, y + 0.1, "|", color=colour, markersize=11, markeredgewidth=2.2)
    name_row(axes, y, m.contender, digits(times.median) if fair else "not comparable")


def stages(report: Report) -> Iterator[Plot]:
    """Where the time of a run goes, for the case that speaks for all of those with stages."""
    with_stages = [m for m in report.measurements if m.stages]
    best = headline_case(report)
    names = dict.fromkeys(m.case for m in with_stages)
    for case in [best.name] if best is not None and best.name in names else list(names)[:1]:
        rows = [(m.contender, m.stages) for m in with_stages if m.case == case]
        svg = stacked(rows, seconds_text, "seconds")
        caption = "Medians of the parts of a run, in seconds; host is the decoder's loop beside its network."
        yield finished(svg, "stages", f"Where the time goes: {case}", caption)


def memory(report: Report) -> Iterator[Plot]:
    """Peak memory, in the case that speaks for all."""
    case = headline_case(report)
    rows = [(m.contender, {"": m.peak_memory / 1e9}) for m in measured_in(report, case) if m.peak_memory is not None]
    if case is None or not rows:
        return
    made = stacked(rows, lambda value: size_text(round(1e9 * value)), "GB", colours=[None])
    caption = "The most memory that each process held at a time, its weights and libraries included."
    yield finished(made, "memory", f"Peak memory: {case.name}", caption)


def residence(report: Report) -> Iterator[Plot]:
    """What is in memory after the last run, by kind, in the case that speaks for all."""
    case = headline_case(report)
    rows = [
        (m.contender, {kind: size / 1e9 for kind, size in memory_kinds(m.memory).items()})
        for m in measured_in(report, case)
        if m.memory is not None
    ]
    if case is None or not rows:
        return
    made = stacked(rows, lambda value: size_text(round(1e9 * value)), "GB")
    caption = (
        "After the last run. Mapped files, such as weights, are shared by processes, and the system may drop them."
    )
    yield finished(made, "residence", f"In memory: {case.name}", caption)


def tradeoffs(report: Report) -> Iterator[Plot]:
    """Quality against the time of a picture, an axis a technique."""
    if not report.tradeoffs:
        return
    series: dict[str, list[Tradeoff]] = {}
    for each in report.tradeoffs:
        series.setdefault(each.technique, []).append(each)
    made, panels = panels_of(len(series))
    for axes, (name, points) in zip(panels, series.items(), strict=True):
        draw_tradeoff(axes, name, points, report.tradeoffs)
    panels[0].set_xscale("log")
    number_log_axis(panels[0].xaxis, *panels[0].get_xlim())
    panels[-1].set_xlabel("seconds a picture")
    caption = (
        "Percent of what the prompts ask for that the judge finds in the pictures, with its 95 % interval; the same "
        "prompts and seeds for all. The line is the default's, grey points are the other techniques'; time is "
        "logarithmic, and up and left is better."
    )
    yield finished(made, "tradeoffs", "Quality against time", caption)


def panels_of(count: int) -> tuple[Any, list[Any]]:
    """Axes one below the other, of the same scales."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH, HEAD + 1.45 * count))
    return made, [axes for (axes,) in made.subplots(count, 1, sharex=True, sharey=True, squeeze=False)]


def draw_tradeoff(axes: Any, name: str, points: Sequence[Tradeoff], all_points: Sequence[Tradeoff]) -> None:
    """A technique's settings, fastest first, among those of the others."""
    muted, own = COLOURS["line"], COLOURS["own"]
    axes.axhline(100 * all_points[0].accuracy, color=muted, linewidth=1, linestyle="--")
    axes.plot(
        [each.seconds for each in all_points], [100 * each.accuracy for each in all_points], "o", color=muted,
        markersize=3,
    )  # fmt: skip
    points = sorted(points, key=lambda each: each.seconds)
    axes.plot([each.seconds for each in points], [100 * each.accuracy for each in points], color=own, linewidth=1)
    for i, each in enumerate(points):
        below, above = each.accuracy - each.low, each.high - each.accuracy
        axes.errorbar(
            each.seconds, 100 * each.accuracy, [[100 * below], [100 * above]], label=each.setting, markersize=4.5,
            color=COLOURS[SERIES[i % len(SERIES)]], marker=MARKERS[i % len(MARKERS)], linestyle="", elinewidth=0.6,
        )  # fmt: skip
    axes.legend(
        loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, handlelength=0.8, borderpad=0, borderaxespad=0.4,
        labelcolor=COLOURS["ink"], fontsize=TEXT_SIZE - 2,
    )  # fmt: skip
    axes.set_title(name, loc="left", fontsize=TEXT_SIZE, color=COLOURS["ink"])
    axes.yaxis.grid(visible=True)


def loading(report: Report) -> Iterator[Plot]:
    """Time to the first result, in the case that speaks for all."""
    case = headline_case(report)
    rows = [
        (m.contender, {"open": m.open_seconds, "first run": m.first_seconds})
        for m in measured_in(report, case)
        if m.open_seconds is not None and m.first_seconds is not None
    ]
    if case is None or not rows:
        return
    made = stacked(rows, seconds_text, "seconds")
    caption = "Opening, and the first run after it" + (f": a short one, {case.warm_up}." if case.warm_up else ".")
    yield finished(made, "loading", f"To the first result: {case.name}", caption)


def operators(report: Report) -> Iterator[Plot]:
    """Which operators a run's arithmetic is in."""
    first = {kind_of(case.name): case for case in reversed(report.cases) if case.by_operator}
    rows = [(case.name, case.by_operator) for case in reversed(first.values())]  # shares hardly change with the sizes
    totals = {each: sum(by.get(each, 0.0) for _, by in rows) for _, by in rows for each in by}
    order = sorted(totals, key=lambda each: -totals[each])
    rows = [(name, {each: by.get(each, 0.0) for each in order}) for name, by in rows]
    if rows:
        caption = "Floating-point operations of kandrt's graphs by type of operator, as shares of each case's total."
        made = stacked(rows, flops_text, "percent", shares=True)
        yield finished(made, "operators", "Operators", caption)


def measured_in(report: Report, case: Any) -> list[Measurement]:
    """What was measured in a case."""
    return [] if case is None else [m for m in report.measurements if m.case == case.name]


def stacked(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    text: Callable[[float], str],
    unit: str,
    *,
    shares: bool = False,
    colours: Sequence[str | None] = SERIES,
) -> Any:
    """Bars from the left, made of parts, with their sum at the right; a part without colour takes its row's."""
    parts = list(dict.fromkeys(part for _, by in rows for part in by))
    made, axes = row_axes(len(rows))
    for y, (name, by) in enumerate(rows):
        total, left = sum(by.values()), 0.0
        for part, colour in zip(parts, repeated(colours, len(parts)), strict=True):
            width = by.get(part, 0.0) * (100 / total if shares and total else 1)
            fill = colour_of(name) if colour is None else COLOURS[colour]
            axes.barh(y + 0.12, width, 0.34, left=left, color=fill, label=part if y == 0 else None)
            left += width
        name_row(axes, y, name, text(total), strong=is_own(name))
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.set_xlim(0, None)
    axes.set_xlabel(unit)
    if len(parts) > 1:
        add_legend(made, axes, len(parts))
    return made


def repeated(colours: Sequence[str | None], count: int) -> list[str | None]:
    """As many colours as are needed."""
    return [colours[i % len(colours)] for i in range(count)]


def add_legend(made: Any, axes: Any, count: int) -> None:
    """Name the parts above the axes, two a line."""
    lines = (count + 1) // 2
    made.set_figheight(made.get_figheight() + 0.24 * lines)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, handlelength=1, handleheight=0.9,
        borderaxespad=0.2, borderpad=0, columnspacing=1.2, labelcolor=COLOURS["ink"], fontsize=TEXT_SIZE - 0.5,
    )  # fmt: skip


def scaling(report: Report) -> Iterator[Plot]:
    """Time against size and against batch, of each kind of case that has several."""
    for kind in dict.fromkeys(kind_of(case.name) for case in report.cases):
        cases = [case for case in report.cases if kind_of(case.name) == kind]
        sizes = {case.name: case.height * case.width / 1e6 for case in cases if case.batch == cases[0].batch}
        first = cases[0].height, cases[0].width
        batches = {case.name: float(case.batch) for case in cases if (case.height, case.width) == first}
        for what, places, label in (("size", sizes, "megapixels"), ("batch", batches, "pictures at once")):
            if len(set(places.values())) > 1:
                name = re.sub(r"\W", "-", f"{kind}-{what}")
                yield finished(
                    lines_over(report, places, label), name, f"Time of {kind} against {what}",
                    "Medians and quartiles of the runs, in seconds; both axes are logarithmic.",
                )  # fmt: skip


def lines_over(report: Report, places: Mapping[str, float], label: str) -> Any:
    """A line a contender through the cases at their places."""
    made, axes = figure(2.9)
    names = dict.fromkeys(m.contender for m in report.measurements)
    drawn = 0
    for i, name in enumerate(names):
        found = sorted(
            (place, m.seconds) for case, place in places.items() if (m := report.find(case, name)) is not None
        )
        base = name == report.baseline
        if not found:
            continue
        x, y = [place for place, _ in found], [seconds.median for _, seconds in found]
        whiskers = [[s.median - s.low for _, s in found], [s.high - s.median for _, s in found]]
        axes.errorbar(
            x, y, whiskers, label=name, color=COLOURS["own" if base else SERIES[i % len(SERIES)]],
            marker=MARKERS[i % len(MARKERS)], markersize=4.5, linewidth=2.2 if base else 1.3, capsize=2,
        )  # fmt: skip
        drawn += 1
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted(set(places.values())), [f"{place:.2g}" for place in sorted(set(places.values()))])
    axes.set_xticks([], minor=True)
    number_log_axis(axes.yaxis, *axes.get_ylim())
    axes.yaxis.grid(visible=True)
    axes.set_xlabel(label)
    axes.set_ylabel("seconds")
    add_legend(made, axes, drawn)
    return made


def number_log_axis(axis: Any, low: float, high: float) -> None:
    """Mark a logarithmic axis at round numbers, few enough to read."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,), (1,)):
        ticks = [step * 10.0**power for power in range(-7, 8) for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) <= 7:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
