"""What `kandrt bench` shows: the terminal's table, the page, and two reports compared."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from kandrt.engines.errors import InputError
from kandrt.scripts.bench import report as terminal
from kandrt.scripts.bench.quantities import digits, flops_text, fraction_of_peak, outcome, seconds_text, verdict
from kandrt.scripts.bench.report_html import page, save_html
from kandrt.scripts.bench.results import Equivalence, Measurement, Report, Skipped, load, save

from .bench_reports import CASES, FACTORS, made_report, made_tradeoffs

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
    found = verdict(made_report(cases={}), measured(ratios, Equivalence("PSNR", 60.0, 60.0, passed)))
    assert found is not None
    assert found.kind == kind


def test_the_baseline_has_no_verdict() -> None:
    assert verdict(made_report(cases={}), Measurement("step", "kandrt", [1.0])) is None


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


def test_no_verdict_stands_on_a_baseline_that_is_apart() -> None:
    report = made_report({"diffusers": 2.0}, noise=0)
    wrong = Equivalence("PSNR", 12.0, 25.0, passed=False, to="diffusers")
    apart = [m if m.beside else replace(m, equivalence=wrong) for m in report.measurements]
    found = verdict(replace(report, measurements=apart), report.measurements[-1])
    assert found is not None
    assert found.kind == "not comparable"


def test_the_outcome_is_about_kandrt_whatever_the_baseline() -> None:
    report = made_report({"diffusers": 2.0}, noise=0)
    swapped = {"kandrt": "diffusers", "diffusers": "kandrt"}
    measurements = [replace(m, contender=swapped[m.contender]) for m in report.measurements]
    found = outcome(replace(report, measurements=measurements, baseline="diffusers"))
    assert found.claim == "kandrt in fp32 takes 2.00 times as long as diffusers, fp32."


def test_shares_of_the_peak_are_of_the_same_arithmetic() -> None:
    report = made_report({"kandrt-int8": 0.5, "kandrt-openvino-bf16": 0.8, "diffusers": 2.0}, noise=0)
    shares = {c.name: fraction_of_peak(report, m) for c in report.contenders if (m := report.find("step", c.name))}
    flops = next(case.flops for case in report.cases if case.name == "step")
    assert flops is not None
    assert shares["kandrt"] == pytest.approx(flops / CASES["step"] / 2.21e11)
    assert shares["kandrt-int8"] == pytest.approx(flops / (0.5 * CASES["step"]) / 8.2e11)
    assert shares["kandrt-openvino-bf16"] is None  # no peak of bf16 was measured
    assert shares["diffusers"] is None  # other work
    start = report.find("cold-start", "kandrt")
    assert start is not None
    assert fraction_of_peak(report, start) is None


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


def test_memory_and_tradeoffs_are_shown_where_they_are_asked_for() -> None:
    report = made_report(tradeoffs=made_tradeoffs())
    out = Console(file=io.StringIO(), width=80, highlight=False)
    terminal.show(report, out, memory=True)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"step +diffusers +\S+ [GM]B +\S+ [GM]B +1\.10 GB +4\.60 GB", text)
    assert re.search(r"feature reuse +every 2nd +1\.70 s +90 % +86–94 +40 dB", text)
    assert re.search(r"default +50 steps +2\.40 s +90 % +86–93 +exact", text)
    assert "4.60 GB" not in printed(report)


def test_runs_that_others_disturbed_are_told() -> None:
    report = made_report(rounds=2)
    marked = [replace(m, clean=[True, False], beside_clean=[True, True] * bool(m.beside)) for m in report.measurements]
    disturbed = replace(report, measurements=marked)
    count = len(marked)
    assert f"In {count} of {2 * count} runs" in " ".join(printed(disturbed).split())
    assert f"In {count} of {2 * count} runs" in page(disturbed)
    assert "runs not all cores" not in printed(report)


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
    [
        made_report(tradeoffs=made_tradeoffs()),
        made_report(factors={}),
        made_report(rounds=1, cases={"step": 0.1}),
        made_report(cases={}),
    ],
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
        baseline=HOSTILE,
        tradeoffs=[replace(each, technique=HOSTILE, setting=HOSTILE) for each in made_tradeoffs()],
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
            if m is not None and (found := verdict(report, m)) is not None:
                assert f"<b>{digits(found.times.median)}</b>" in html
    for text in ("0.1.0", "AMD EPYC", "1.31.0", report.command, "no instructions for bf16", "88 dB", "GFLOP/s"):
        assert text in html
    titles = (
        "Time against kandrt", "Where the time goes", "against size", "against batch", "Peak memory", "Operators",
        "In memory: text-to-image", "a short one, 2 steps of the prior and 1 step of the decoder",
    )  # fmt: skip
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
