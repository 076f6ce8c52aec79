"""What the loop around the decoder's network costs a step."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from kandrt.engines.spec import TensorSpec
from kandrt.scripts.bench import kandrt_worker
from kandrt.scripts.bench.kandrt_worker import TimedSession, between
from kandrt.scripts.bench.quantities import host_per_step
from kandrt.scripts.bench.report import show
from kandrt.scripts.bench.report_html import page
from kandrt.scripts.bench.results import BASELINE, Report

from .bench_reports import made_report


class Network:
    """A session that takes a second a call."""

    inputs = outputs = (TensorSpec("sample", "float32", (1,)),)

    def __init__(self, times: Iterator[float]) -> None:
        self.times = times

    def __call__(self, **arrays: Any) -> dict[str, Any]:
        return {"prediction": arrays["sample"]}

    def close(self) -> None: ...


def test_only_what_lies_between_calls_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0, 11.5, 12.5, 12.75, 13.75])
    monkeypatch.setattr(kandrt_worker.time, "perf_counter", lambda: next(clock))
    session = TimedSession(Network(clock))
    assert [session(sample=i)["prediction"] for i in range(3)] == [0, 1, 2]
    assert between(session.calls) == pytest.approx(0.5 + 0.25)
    assert between(session.calls[:1]) == between([]) == 0
    assert session.inputs == Network.inputs


@pytest.fixture
def report() -> Report:
    """Of which the baseline's end-to-end run has 490 ms beside the network."""
    made = made_report()
    return replace(
        made,
        cases=[replace(case, steps=50) if case.name == "text-to-image" else case for case in made.cases],
        measurements=[
            replace(m, stages={**m.stages, "host": 0.49}) if (m.contender, m.case) == (BASELINE, "text-to-image") else m
            for m in made.measurements
        ],
    )


def test_a_report_tells_it_a_step(report: Report) -> None:
    """Of 50 steps there are 49 between."""
    measured = report.find("text-to-image", BASELINE)
    assert measured is not None
    assert host_per_step(report, measured) == pytest.approx(0.01)
    out = io.StringIO()
    show(report, Console(file=out, width=100))
    assert "Beside the network a step costs 10.0 ms." in out.getvalue()
    assert f"beside the network a step of {BASELINE} costs 10.0 ms" in page(report)
    assert all(host_per_step(report, m) is None for m in report.measurements if m is not measured)
