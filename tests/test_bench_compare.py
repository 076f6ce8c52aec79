"""What `kandrt bench compare` finds between two reports, and what contenders take on disk."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from kandrt.scripts.bench.compare import compare, interval
from kandrt.scripts.bench.compare import show as show_comparison
from kandrt.scripts.bench.installed import closure, contender_size, installed_size, split

from .bench_reports import made_report

# Comparing


def test_a_known_change_is_found_and_noise_is_not() -> None:
    before = made_report({"diffusers": 2.0}, cases={"step": 1.0, "movq": 1.0}, rounds=15, noise=0.02)
    measurements = [
        replace(m, samples=[1.3 * s for s in m.samples]) if m.case == "step" else m for m in before.measurements
    ]
    found = compare(before, replace(before, measurements=measurements))
    by_case = {(each.case, each.contender): each for each in found.changes}
    assert len(by_case) == 4
    for (case, _), each in by_case.items():
        assert each.noise == (case == "movq")
        assert each.ratio == pytest.approx(1.3 if case == "step" else 1.0)
        assert each.low <= each.ratio <= each.high
        assert each.overlap == (case == "movq")
    assert not found.warnings


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 200 pairs of samples of one distribution, some 95 % of intervals hold 1; binomial, so 90 % at the least."""
    draw = np.random.default_rng(0).lognormal
    holds = 0
    for _ in range(200):
        low, high = interval(list(draw(0, 0.1, 15)), list(draw(0, 0.1, 15)))
        holds += low <= 1 <= high
    assert holds >= 180


def test_the_interval_is_the_same_each_time() -> None:
    assert interval([1.0, 1.1, 1.2], [2.0, 2.2, 2.1]) == interval([1.0, 1.1, 1.2], [2.0, 2.2, 2.1])


def test_what_differs_around_the_measurements_is_told() -> None:
    before = made_report()
    machine = replace(before.machine, cpu="another", libraries={**before.machine.libraries, "torch": "3.0"})
    cases = [replace(case, height=640) if case.name == "movq" else case for case in before.cases]
    found = compare(before, replace(before, machine=machine, cases=cases, precision="bf16", kandrt="9"))
    told = "\n".join(found.warnings)
    for text in ("cpu: ", "torch: 2.13.0 before, 3.0 after", "precision: fp32 before, bf16 after", "kandrt: ",
                 "case movq: 512x512, batch 1 before, 640x512"):  # fmt: skip
        assert text in told
    assert len(found.warnings) == 5


def test_what_only_one_report_has_is_listed() -> None:
    before = made_report({"diffusers": 2.0}, cases={"step": 1.0})
    after = made_report({"onnx-plain": 2.0}, cases={"step": 1.0, "movq": 1.0})
    found = compare(before, after)
    assert [each.contender for each in found.changes] == ["kandrt"]
    assert found.only_before == ["step diffusers"]
    assert set(found.only_after) == {"step onnx-plain", "movq kandrt", "movq onnx-plain"}


def test_a_comparison_fits_into_80_columns() -> None:
    out = Console(file=io.StringIO(), width=80, highlight=False)
    show_comparison(compare(made_report(rounds=2), made_report(rounds=2)), out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert "within noise*" in text
    assert "fewer than 5 samples" in " ".join(text.split())


# Installed size


def test_the_size_of_a_package_is_that_of_its_files() -> None:
    from importlib.metadata import distribution

    files = {Path(str(file.locate())).resolve() for file in distribution("msgspec").files or []}
    assert installed_size(["msgspec"]) == sum(file.stat().st_size for file in files)


def test_what_is_required_counts_once_and_extras_count() -> None:
    names = [each.metadata["Name"].lower() for each in closure({"kandrt": frozenset({"cpu"})})]
    assert len(names) == len(set(names))
    assert {"kandrt", "numpy", "onnxruntime", "rich", "markdown-it-py"} <= set(names)
    assert not {"torch", "openvino", "pytest"} & set(names)
    plain, cpu = installed_size(["kandrt"]), installed_size(["kandrt[cpu]"])
    assert plain is not None
    assert cpu is not None
    assert cpu > plain
    assert installed_size(["kandrt", "numpy"]) == plain


def test_a_package_that_is_not_installed_has_no_size() -> None:
    assert installed_size(["kandrt-nothing-of-that-name"]) is None


@pytest.mark.parametrize(
    ("requirement", "parts"),
    [
        ("numpy", ("numpy", frozenset(), "")),
        ("Typing_Extensions >=4,<5", ("typing-extensions", frozenset(), "")),
        ('httpx[http2, socks]>=0.2; extra == "net"', ("httpx", frozenset({"http2", "socks"}), ' extra == "net"')),
        ("a @ file:///x", ("a", frozenset(), "")),
        ("!", None),
    ],
)
def test_requirements_are_read(requirement: str, parts: object) -> None:
    assert split(requirement) == parts


def test_every_worker_has_a_size_or_is_not_installed() -> None:
    from kandrt.scripts.bench.contenders import CONTENDERS

    kinds = {(each.worker, each.settings.get("backend"), each.device): each for each in CONTENDERS.values()}
    for contender in kinds.values():  # the size is of packages: settings make no difference
        size = contender_size(contender.worker, contender.settings)
        assert size is None or size > 10**6


def test_json_of_a_comparison_is_plain() -> None:
    import msgspec

    found = msgspec.to_builtins(compare(made_report(), made_report()))
    assert json.loads(json.dumps(found))["warnings"] == []
