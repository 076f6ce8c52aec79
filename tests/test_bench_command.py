"""`kandrt bench`: its options, its bad inputs, and where its results go."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kandrt.runtime.miniature import MINIATURE
from kandrt.scripts.bench.contenders import CONTENDERS
from kandrt.scripts.bench.measure import INTERRUPT, Plan
from kandrt.scripts.bench.results import Report, Skipped, load, save
from kandrt.scripts.cli import app

from .bench_reports import made_report


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", *words])


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Plans that would have been measured; a made-up report comes back at once."""
    seen: list[Plan] = []

    def measure(plan: Plan, report: Callable[[str], None]) -> Report:
        seen.append(plan)
        report("measuring")
        return made_report()

    monkeypatch.setattr("kandrt.scripts.bench.measure.measure", measure)
    return seen


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a package be as if not installed."""
    real: Any = importlib.util.find_spec

    def hide(name: str) -> None:
        monkeypatch.setattr(
            "kandrt.scripts.bench.command.find_spec", lambda each, *more: None if each == name else real(each, *more)
        )

    return hide


# What is measured


def test_everything_reaches_the_plan(plans: list[Plan], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyV22PriorPipeline"}')
    found = run(
        str(MINIATURE), "--against", "diffusers,onnx-plain", "--against", "kandrt-openvino", "--case", "step@64",
        "--case", "movq*2", "--rounds", "3", "--warm-up", "2", "--size", "64x128", "--batch", "2", "--steps", "4",
        "--prior-steps", "5", "--threads", "1", "--checkpoint", str(tmp_path),
        "--python", f"diffusers={sys.executable}", "--budget", "2.5", "--scratch", str(tmp_path / "graphs"),
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert (tmp_path / "graphs").is_dir()
    plan = plans[0]
    assert plan.command.startswith("kandrt")
    given = Plan(
        bundle=MINIATURE, contenders=("diffusers", "onnx-plain", "kandrt-openvino"), cases=("step@64", "movq*2"),
        rounds=3, warm_up=2, threads=1, size=(64, 128), batch=2, steps=4, prior_steps=5, checkpoints=(str(tmp_path),),
        pythons={"diffusers": sys.executable}, command=plan.command, budget=2.5, scratch=tmp_path / "graphs",
    )  # fmt: skip
    assert plan == given


def test_a_budget_is_for_the_default_rounds(plans: list[Plan]) -> None:
    for words in ([], ["--rounds", "3"], ["--budget", "1"]):
        assert run(*words).exit_code == 0
    assert [(plan.rounds, plan.budget) for plan in plans] == [(5, 2.0), (3, None), (5, 1.0)]


def test_beside_another_baseline_kandrt_is_measured(plans: list[Plan]) -> None:
    assert run("--baseline", "kandrt-openvino").exit_code == 0
    assert (plans[0].baseline, plans[0].contenders) == ("kandrt-openvino", ("kandrt", "diffusers"))


def test_all_that_can_run_here_are_measured_and_the_others_named(plans: list[Plan]) -> None:
    found = run("--against", "all")
    assert found.exit_code == 0
    assert plans[0].contenders == ("all",)
    assert "kandrt-int8: needs a bundle in int8: make one with `kandrt quantize" in " ".join(found.stderr.split())


def test_tradeoffs_are_of_the_miniature(plans: list[Plan]) -> None:
    assert run("--tradeoffs").exit_code == 0
    assert plans[0].tradeoffs > 0
    found = run(str(MINIATURE), "--tradeoffs")
    assert found.exit_code == 1
    assert "--tradeoffs" in found.stderr


def test_memory_is_told_where_it_is_asked_for(plans: list[Plan]) -> None:
    assert "mapped" not in run().stdout
    assert "mapped" in run("--memory").stdout


def test_the_miniature_and_diffusers_are_the_default(plans: list[Plan]) -> None:
    assert run().exit_code == 0
    assert (plans[0].bundle, plans[0].contenders, plans[0].size) == (MINIATURE, ("diffusers",), None)


def test_without_diffusers_kandrt_is_measured_alone(plans: list[Plan], without: Callable[[str], None]) -> None:
    without("diffusers")
    assert run().exit_code == 0
    assert plans[0].contenders == ()


def test_none_is_no_contender(plans: list[Plan]) -> None:
    assert run("--against", "none").exit_code == 0
    assert plans[0].contenders == ()


# Where results go


@pytest.mark.parametrize(
    ("name", "files"),
    [("a.json", {"a.json"}), ("a.html", {"a.html"}), ("a", {"a.json", "a.html"}), ("v1.2", {"v1.2.json", "v1.2.html"})],
)
def test_the_suffix_says_what_is_written(plans: list[Plan], tmp_path: Path, name: str, files: set[str]) -> None:
    found = run("-o", str(tmp_path / name))
    assert found.exit_code == 0, found.output
    assert {path.name for path in tmp_path.iterdir()} == files
    assert all(str(tmp_path / each) in found.stdout for each in files)
    for each in files:
        if each.endswith(".json"):
            assert load(tmp_path / each) == made_report()
        else:
            assert (tmp_path / each).read_text(encoding="utf-8").startswith("<!doctype html>")


def test_json_is_alone_on_stdout(plans: list[Plan], tmp_path: Path) -> None:
    found = run("--json", "-o", str(tmp_path / "a.json"))
    assert found.exit_code == 0
    assert json.loads(found.stdout) == json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))


def test_without_matplotlib_a_warning_says_so_and_all_is_written(
    plans: list[Plan], tmp_path: Path, without: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    without("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = run("-o", str(tmp_path / "a"))
    assert found.exit_code == 0
    assert "pip install 'kandrt[bench]'" in found.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.html"}


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr("kandrt.scripts.bench.measure.measure", measure)
    found = run("-o", str(tmp_path / "a"))
    assert found.exit_code == 130
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_writes_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = replace(made_report(), skipped=[Skipped("kandrt", INTERRUPT, "movq")])
    monkeypatch.setattr("kandrt.scripts.bench.measure.measure", lambda *_: found)
    result = run("-o", str(tmp_path / "a.json"))
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted\n")
    assert load(tmp_path / "a.json") == found


# Bad inputs: one line, before anything is measured


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--against", "difusers"], ["difusers", *CONTENDERS]),
        (["--case", "steps"], ["'steps'", "prior", "step", "movq", "text-to-image", "cold-start"]),
        (["--case", "step@63"], ["step@63", "multiples"]),
        (["--size", "big"], ["--size", "'big'", "768"]),
        (["--size", "0"], ["--size", "'0'"]),
        (["--size", "1x2x3"], ["--size", "1x2x3"]),
        (["--python", "diffusers"], ["--python", "NAME=PATH"]),
        (["--python", "nothing=/bin/sh"], ["--python", "nothing", "diffusers"]),
        (["--python", "diffusers=/no/such/python"], ["/no/such/python"]),
        (["--baseline", "nothing"], ["nothing", "diffusers"]),
        (["--baseline", "kandrt-int8"], ["baseline kandrt-int8", "--quantized"]),
        (["--quantized", str(MINIATURE)], ["is in int8", "kandrt quantize"]),
        (["--budget", "0"], ["budget", "more than 0"]),
        (["compare", "a.json", "b.json", "--budget", "1"], ["no option but --json"]),
        (["no-such-bundle"], ["no-such-bundle", "does not exist"]),
        (["one", "two"], ["one BUNDLE", "one two"]),
        (["-o", "no-such-folder/a"], ["no-such-folder", "does not exist"]),
        (["compare"], ["expected two reports", "found 0"]),
        (["compare", "a.json"], ["expected two reports", "found 1"]),
        (["compare", "a.json", "b.json", "c.json"], ["expected two reports", "found 3"]),
        (["compare", "a.json", "b.json", "--size", "64"], ["no option but --json"]),
        (["compare", "no-a.json", "no-b.json"], ["no-a.json"]),
    ],
)
def test_bad_input_is_refused_in_a_line(plans: list[Plan], words: list[str], told: list[str]) -> None:
    found = run(*words)
    assert found.exit_code == 1
    assert all(each in found.stderr for each in told), found.stderr
    assert found.stderr.startswith("error: ")
    assert len(found.stderr.splitlines()) == 1
    assert not plans


@pytest.mark.parametrize("option", ["--rounds", "--batch", "--steps", "--prior-steps", "--threads"])
def test_counts_are_one_or_more(plans: list[Plan], option: str) -> None:
    assert run(option, "0").exit_code == 2
    assert not plans


@pytest.mark.parametrize(("name", "package", "extra"), [
    ("diffusers", "diffusers", "bench"), ("onnx-plain", "torch", "bench"), ("kandrt-openvino", "openvino", "openvino"),
])  # fmt: skip
def test_a_contender_that_is_not_installed_is_refused(
    plans: list[Plan], without: Callable[[str], None], name: str, package: str, extra: str
) -> None:
    without(package)
    found = run("--against", name)
    assert found.exit_code == 1
    assert f"--against {name} needs the package {package!r}" in found.stderr
    assert f"pip install 'kandrt[{extra}]'" in found.stderr
    assert not plans


def test_another_interpreter_need_not_have_it_here(plans: list[Plan], without: Callable[[str], None]) -> None:
    without("diffusers")
    assert run("--against", "diffusers", "--python", f"diffusers={sys.executable}").exit_code == 0
    assert plans[0].contenders == ("diffusers",)


def test_an_output_that_is_a_folder_is_refused(plans: list[Plan], tmp_path: Path) -> None:
    found = run("-o", str(tmp_path))
    assert found.exit_code == 1
    assert "is a folder" in found.stderr
    assert not plans


# Comparing


def reports(folder: Path, *made: Report) -> list[str]:
    paths = [folder / f"{i}.json" for i in range(len(made))]
    for report, path in zip(made, paths, strict=True):
        save(report, path)
    return [str(path) for path in paths]


def test_compare_informs_and_does_not_judge(tmp_path: Path) -> None:
    files = reports(tmp_path, made_report(), made_report({"diffusers": 9.0}, precision="bf16"))
    found = run("compare", *files)
    assert found.exit_code == 0
    assert "slower" in found.stdout
    assert "not the same: precision: fp32 before, bf16 after" in found.stderr


def test_compare_gives_json(tmp_path: Path) -> None:
    found = run("compare", *reports(tmp_path, made_report(), made_report(cases={"step": 1.8})), "--json")
    assert found.exit_code == 0
    step = next(each for each in json.loads(found.stdout)["changes"] if each["contender"] == "kandrt")
    assert step["case"] == "step"
    assert step["low"] < step["ratio"] < step["high"]


def test_compare_refuses_another_schema(tmp_path: Path) -> None:
    files = reports(tmp_path, made_report(), made_report(schema=2))
    found = run("compare", *files)
    assert found.exit_code == 1
    assert "expected a report of schema 1, found 2" in found.stderr
