"""Regions of masks: what hangs together, and what lies around it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bool = NDArray[np.bool_]


def regions(mask: Bool, smallest: int) -> list[Bool]:
    """The 8-connected regions of `mask` [H, W] of at least `smallest` pixels, as masks, from the top down.

    Runs of pixels in a row are joined with those they touch in the row above (union-find).
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    above = 0
    for run, row in enumerate(rows):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] < starts[run]):
            above += 1
        other = above
        while rows[other] == row - 1 and starts[other] <= ends[run]:
            parents[root(run)] = root(other)
            other += 1

    found: dict[int, Bool] = {}
    for run in range(len(rows)):
        region = found.setdefault(root(run), np.zeros(mask.shape, np.bool_))
        region[rows[run], starts[run] : ends[run]] = True
    return [region for region in found.values() if region.sum() >= smallest]


def widen(mask: Bool, steps: int) -> Bool:
    """The mask grown by some pixels in all eight directions."""
    rows, columns = mask.shape
    padded = np.pad(mask, steps)
    tall = np.logical_or.reduce([padded[i : i + rows] for i in range(2 * steps + 1)])
    wide: Bool = np.logical_or.reduce([tall[:, i : i + columns] for i in range(2 * steps + 1)])
    return wide
