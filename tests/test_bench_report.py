"""What `kandrt bench` shows: the terminal's table, the page, and two reports compared."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from kandrt.engines.errors import InputError
from kandrt.scripts.bench import report as terminal
from kandrt.scripts.bench.compare import compare, interval
from kandrt.scripts.bench.compare import show as show_comparison
from kandrt.scripts.bench.installed import closure, contender_size, installed_size, split
from kandrt.scripts.bench.quantities import digits, flops_text, outcome, seconds_text, verdict
from kandrt.scripts.bench.report_html import page, save_html
from kandrt.scripts.bench.results import Equivalence, Measurement, Report, Skipped, load, save

from .bench_reports import CASES, FACTORS, made_report

VOID = {"meta", "br", "circle", "rect", "line", "path", "use"}
HOSTILE = '<script>alert("1")</script>&"\''


# Files


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    report = made_report()
    save(report, tmp_path / "a.json")
    assert load(tmp_path / "a.json") == report


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is not a report"),
        ("[1]", "is not a report"),
        ("{", "is not a report"),
        ("[" * 5000, "is not a report"),
        ("{}", "expected a report of schema 1, found None"),
        ('{"schema": 0}', "expected a report of schema 1, found 0"),
        ('{"schema": 1}', "damaged"),
        ('{"schema": 1, "kandrt": 3}', "damaged"),
    ],
)
def test_a_file_that_is_no_report(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(InputError, match=told):
        load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json"):
        load(tmp_path / "absent.json")


# Verdicts


def measured(ratios: list[float], equivalence: Equivalence | None = None) -> Measurement:
    return Measurement("step", "other", ratios, [1.0] * len(ratios), equivalence=equivalence)


@pytest.mark.parametrize(
    ("ratios", "passed", "kind"),
    [
        ([1.9, 2.0, 2.1], True, "faster"),
        ([0.4, 0.5, 0.6], True, "slower"),
        ([0.9, 1.1, 1.2], True, "within noise"),
        ([1.9, 2.0, 2.1], False, "not comparable"),
        ([0.4, 0.5, 0.6], False, "not comparable"),
    ],
)
def test_a_verdict_follows_from_pairs_and_equivalence(ratios: list[float], passed: bool, kind: str) -> None:
    found = verdict(measured(ratios, Equivalence("PSNR", 60.0, 60.0, passed)))
    assert found is not None
    assert found.kind == kind


def test_the_baseline_has_no_verdict() -> None:
    assert verdict(Measurement("step", "kandrt", [1.0])) is None


def test_the_outcome_is_against_the_fastest_of_the_others() -> None:
    found = outcome(made_report({"kandrt-openvino": 0.5, "diffusers": 3.0, "diffusers-compile": 2.0}, noise=0))
    assert found.claim == "kandrt in fp32 is 2.00 times as fast as diffusers, fp32, torch.compile."
    assert "text-to-image, 512 × 512 px" in found.detail
    assert "the fastest of 2 others" in found.detail
    assert "88 dB" in found.detail


def test_the_outcome_says_where_kandrt_is_slower() -> None:
    assert "takes 2.00 times as long as" in outcome(made_report({"diffusers": 0.5}, noise=0)).claim


def test_the_outcome_leaves_out_what_gives_another_result() -> None:
    report = made_report({"diffusers": 2.0}, noise=0)
    wrong = [
        replace(m, equivalence=Equivalence("PSNR", 12.0, 60.0, passed=False)) if m.beside else m
        for m in report.measurements
    ]
    found = outcome(replace(report, measurements=wrong))
    assert found.claim == "kandrt in fp32 takes 46.0 s."
    assert "differ" in found.detail
    assert "not comparable" in page(replace(report, measurements=wrong))


def test_the_outcome_of_nothing() -> None:
    assert outcome(made_report(cases={})).claim == "Nothing was measured."


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(123.4, "123 s"), (9.996, "10.0 s"), (1.0, "1.00 s"), (0.9996, "1.00 s"), (0.0123, "12.3 ms"), (4.2e-5, "42.0 µs"),
     (0, "0.00 µs")],
)  # fmt: skip
def test_seconds_have_three_digits(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_numbers_have_three_digits() -> None:
    assert [digits(value) for value in (1234.5, 99.96, 12.34, 1.234)] == ["1,234", "100", "12.3", "1.23"]
    assert flops_text(1.234e12) == "1.23 TFLOP"
    assert flops_text(12.0) == "12 FLOP"


# The terminal


def printed(report: Report, width: int = 80) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False)
    terminal.show(report, out)
    return out.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_tables_fit_into_80_columns() -> None:
    text = printed(made_report())
    tables = [line for line in text.splitlines() if re.match(r"contender |─|kandrt |diffusers|onnx-plain", line)]
    assert len(tables) > 40
    assert max(map(len, tables)) <= 80
    # every name and number on its line
    assert re.search(r"diffusers-bf16-channels-last +\S+ m?s +\d+ % +1\.\d\d +1\.\d\d–1\.\d\d +31 dB +\d", text)


def test_the_terminal_names_what_was_not_measured_and_the_boundary() -> None:
    report = made_report(skipped=[Skipped("diffusers", "no [bold]checkpoint[/]\nfound", "step")])
    text = printed(report, 200)
    assert "not measured: diffusers in step: no [bold]checkpoint[/] found" in text
    assert all(case.boundary in text for case in report.cases)


def test_few_rounds_are_said_to_be_few() -> None:
    assert "fewer than 3 rounds" in " ".join(printed(made_report(rounds=1)).split())
    assert "fewer than 3 rounds" in page(made_report(rounds=2))
    assert "fewer than" not in printed(made_report(rounds=3)) + page(made_report(rounds=3))


# The page


class Checker(HTMLParser):
    """Elements that are not closed in order, ids, and what elements refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"{tag} at {self.getpos()}")

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "data", "action", "srcset", "xlink:href") or name.startswith("on"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    return checker


@pytest.mark.parametrize(
    "report",
    [made_report(), made_report(factors={}), made_report(rounds=1, cases={"step": 0.1}), made_report(cases={})],
    ids=["all", "alone", "one sample", "nothing"],
)
def test_the_page_is_well_formed_and_needs_nothing_else(report: Report) -> None:
    html = page(report)
    found = checked(html)
    assert not found.problems
    assert not found.open
    assert len(found.ids) == len(set(found.ids))
    assert all(each.startswith("#") and each[1:] in found.ids for each in found.references)
    assert not found.tags & {"script", "link", "iframe", "img", "object", "embed", "base"}
    assert not re.search(r"https?:|@import", html)
    assert "prefers-color-scheme: dark" in html


def test_the_page_escapes_what_users_and_files_say() -> None:
    report = made_report()
    hostile = replace(
        report,
        bundle=HOSTILE,
        command=HOSTILE,
        family=HOSTILE,
        precision=HOSTILE,
        started=HOSTILE,
        kandrt=HOSTILE,
        machine=replace(report.machine, cpu=HOSTILE, libraries={HOSTILE: HOSTILE}, peaks={HOSTILE: 1e9}),
        contenders=[replace(each, name=HOSTILE, title=HOSTILE) for each in report.contenders],
        cases=[replace(each, name=HOSTILE, boundary=HOSTILE, by_operator={HOSTILE: 1.0}) for each in report.cases],
        measurements=[replace(m, case=HOSTILE, contender=HOSTILE, stages={HOSTILE: 1.0}) for m in report.measurements],
        skipped=[Skipped(HOSTILE, HOSTILE, HOSTILE)],
    )
    html = page(hostile)
    assert "<script" not in html
    found = checked(html)
    assert "script" not in found.tags
    assert not found.problems
    assert html.count("&lt;script&gt;") > 20


def test_the_page_holds_every_number_of_the_outcome() -> None:
    report = made_report()
    html = page(report)
    for case in CASES:
        for contender in FACTORS:
            m = report.find(case, contender)
            if m is not None and (found := verdict(m)) is not None:
                assert f"<b>{digits(found.times.median)}</b>" in html
    for text in ("0.1.0", "AMD EPYC", "1.31.0", report.command, "no instructions for bf16", "88 dB", "GFLOP/s"):
        assert text in html
    titles = ("Time against kandrt", "Where the time goes", "against size", "against batch", "Peak memory", "Operators")
    assert all(f"{title}" in html for title in titles)


def test_plots_take_the_colours_of_the_page() -> None:
    html = page(made_report())
    body = html[html.index("<body>") :]
    assert "#0a0b" not in html  # the stand-ins of scripts/bench/plots.py
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", body)) <= {"#000000", "#ffffff", "none"}
    assert body.count("var(--own)") > 10


def test_the_page_is_the_same_each_time() -> None:
    assert page(made_report()) == page(made_report())


def test_without_matplotlib_the_page_says_how_to_get_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    save_html(made_report(), tmp_path / "a.html")
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "pip install &#x27;kandrt[bench]&#x27;" in html
    assert "<b>" in html
    assert "diffusers" in printed(made_report())


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

    for contender in CONTENDERS.values():
        size = contender_size(contender.worker, contender.settings)
        assert size is None or size > 10**6


def test_json_of_a_comparison_is_plain() -> None:
    import msgspec

    found = msgspec.to_builtins(compare(made_report(), made_report()))
    assert json.loads(json.dumps(found))["warnings"] == []
