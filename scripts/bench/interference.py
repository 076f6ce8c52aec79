"""Whether the cores were this program's own while a sample was taken: a small product beside it tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np

from .peaks import matrix_product, open_model

SIDE, SECONDS = 640, 0.04  # 5 MB in all: what runs next finds most of its cache as it left it
USUAL = 95  # percentile of what was found that counts as the machine's own, since the best may be luck
CLEAN_SHARE = 0.85  # of it; two virtual cores that share one are at half, and noise is a few percent

Probe = Callable[[], float]


def make_probe(threads: int) -> Probe | None:
    """A function that gives the FLOP/s of a matrix product now, in some 40 ms; None without ONNX Runtime."""
    if find_spec("onnxruntime") is None:
        return None
    square = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    session = open_model(matrix_product(square), threads, spinning=False)
    session.run(None, {"x": square})

    def probe() -> float:
        start, runs = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            session.run(None, {"x": square})
            runs += 1
        return 2 * SIDE**3 * runs / (time.perf_counter() - start)

    return probe


def usual(rates: Sequence[float]) -> float | None:
    """What the machine reaches while nothing else takes its cores; None where nobody looked."""
    return float(np.percentile(rates, USUAL)) if rates else None


def clean(rates: Sequence[float], own: float | None) -> list[bool]:
    """Of each sample, the lower rate of before and after it given, whether the machine was this program's own."""
    return [] if own is None else [rate >= CLEAN_SHARE * own for rate in rates]
