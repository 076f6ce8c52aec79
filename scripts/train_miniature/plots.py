"""Loss curves of every stage as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...engines.files import atomic_write
from .loop import LOG, read_log

COLUMNS, PANEL = 2, (6.0, 3.2)  # panels side by side; inches


def plot_losses(work: Path, stages: Sequence[str], output: Path) -> None:
    """Draw the logs of `stages` that there are."""
    from matplotlib.figure import Figure

    logs = [(stage, work / stage / LOG) for stage in stages if (work / stage / LOG).exists()]
    rows = -(-len(logs) // COLUMNS)
    figure = Figure((PANEL[0] * COLUMNS, PANEL[1] * rows), layout="constrained")
    for panel, (stage, path) in enumerate(logs, 1):
        header, *lines = read_log(path)
        axes = figure.add_subplot(rows, COLUMNS, panel)
        steps = [int(line[0]) for line in lines]
        for column, name in enumerate(header[2:], 2):
            axes.plot(steps, [float(line[column]) for line in lines], label=name, linewidth=1)
        axes.set(title=stage, xlabel="step", yscale="log")
        axes.legend()
        axes.grid(alpha=0.3)
    with atomic_write(output) as file:
        figure.savefig(file, dpi=110, format="png")
