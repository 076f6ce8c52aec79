"""`kandrt build` and `kandrt engines`: what they say, what they leave, and how they are interrupted."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kandrt.engines import builder, trt
from kandrt.engines.builder import Task, plan_work
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import BackendError
from kandrt.engines.plan_worker import Event, PlanJob
from kandrt.engines.plans import PlanFigures, PlanRecord
from kandrt.engines.store import EngineStore
from kandrt.scripts import build as build_command
from kandrt.scripts import console
from kandrt.scripts.build import read_size
from kandrt.scripts.cli import app

from .toy_bundle import COMPONENTS, export_again, make_toy_bundle, train_again

builds = pytest.mark.skipif(
    trt.library_version("tensorrt-rtx") == "none", reason="needs tensorrt-rtx-cu13, which builds without a GPU"
)
RTX = ("--backend", "tensorrt-rtx", "--gpu", "sm89")
VERSION = "1.7.1"  # of the library that `fake` stands for


def run(*args: str | Path, columns: int = 100) -> Result:
    """Run `kandrt` in this process, on a terminal of a width of its own: consoles remember theirs."""
    for each in (console.stdout, console.stderr):
        each.cache_clear()
    try:
        words = [str(arg) for arg in args]
        return CliRunner().invoke(app, words, env={"COLUMNS": str(columns)}, prog_name="kandrt")
    finally:
        for each in (console.stdout, console.stderr):
            each.cache_clear()


def ok(*args: str | Path, **options: Any) -> Result:
    result = run(*args, **options)
    assert result.exit_code == 0, result.output
    return result


def assert_error(result: Result, *parts: str) -> None:
    """One line `error: ...` on stderr that holds every part, nothing on stdout, exit code 1."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert all(part in result.stderr for part in parts), result.stderr


@pytest.fixture
def toy(tmp_path: Path) -> Bundle:
    return make_toy_bundle(tmp_path / "a [bold]b[-] bundle")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A builder that writes plans of a few bytes, for what is said of them; gives the components that it built."""
    made: list[str] = []

    def run_worker(work: PlanJob, _task: Task, progress: Callable[[float, str], None]) -> Event:
        progress(0.5, "Pretending")
        Path(work.output).write_bytes(b"plan of " + work.component.encode())
        made.append(work.component)
        return Event(1.0, figures=PlanFigures(1234, 5.6, 1.0, 789_000_000, 10_000, 2_000_000, 3_000), log=("done",))

    def no_gpu(*_: Any) -> str:
        raise BackendError("no usable GPU: [none]")

    for module in (builder, trt):
        monkeypatch.setattr(module, "library_version", lambda _builder: VERSION)
        monkeypatch.setattr(module, "capability", no_gpu)
    monkeypatch.setattr(builder, "library", lambda _builder: None)
    monkeypatch.setattr(builder, "run_worker", run_worker)
    return made


def stored(bundle: Bundle) -> list[str]:
    """Components of the plans in the store."""
    return [record.key.component for record in EngineStore(bundle).records()[0]]


# Help and usage


@pytest.mark.parametrize("words", [("build",), ("engines", "list"), ("engines", "prune")])
def test_help_shows_an_example(words: Sequence[str]) -> None:
    result = ok(*words, "--help", columns=80)
    assert re.search(rf"Example:\s+kandrt {' '.join(words)} my-bundle", result.stdout)
    assert f"Usage: kandrt {' '.join(words)} BUNDLE" in result.stdout
    assert "--json" in result.stdout
    assert "no-json" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_help_of_engines_lists_its_commands() -> None:
    result = run("engines", "--help")
    assert result.exit_code == 0
    assert re.findall(r"^│ (\w+) ", result.stdout, re.MULTILINE) == ["list", "prune"]
    assert "Usage: kandrt engines" in run("engines").output
    assert re.search(r"^│ build ", run("--help").stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "args",
    [
        ("build",),
        ("build", "bundle"),
        ("build", "bundle", "--backend", "onnxruntime"),
        ("build", "bundle", *RTX, "--optimization-level", "6"),
        ("build", "bundle", *RTX, "--precision", "int8"),
        ("engines", "prune"),
        ("engines", "clean", "bundle"),
    ],
)
def test_wrong_usage_exits_with_2(args: Sequence[str]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert "Usage: kandrt" in result.stderr
    assert result.stdout == ""


# Building


@builds
def test_build_and_build_again(tmp_path: Path) -> None:
    """With the real library; all else here is said of a builder that pretends."""
    toy = make_toy_bundle(tmp_path / "bundle")
    first = ok("build", toy.folder, *RTX)
    assert [line.split()[0] for line in first.stdout.splitlines()[2:6]] == list(COMPONENTS)
    assert re.search(r"^built 4 of 4 engines in \d+ s, [\d.]+ [kM]B$", first.stdout, re.MULTILINE)
    assert re.findall(r"building (\w+)$", first.stderr, re.MULTILINE) == list(COMPONENTS)
    second = ok("build", toy.folder, *RTX)
    assert second.stdout == f"all 4 engines are up to date in {toy.folder}\n"
    assert second.stderr == ""
    export_again(toy, "decoder_step", note="another")
    third = ok("build", toy.folder, *RTX)
    assert re.search(r"built 1 of 4 engines in \d+ s, [\d.]+ [kM]B, 3 were up to date", third.stdout)
    listed = json.loads(ok("engines", "list", toy.folder, "--json").stdout)
    assert len(listed["found"]) == 5
    assert [each["record"]["key"]["component"] for each in listed["found"] if each["stale"]] == ["decoder_step"]


@builds
@pytest.mark.parametrize("family", ["bundle_2_1", "bundle_3"])
def test_what_a_prompt_adds_to_a_decoder_is_built(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Text encoder and context: the graphs that no decoder of 2.2 has. Steps take a minute, MoVQ is the same."""
    bundle = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / "bundle"))
    wanted = ("--size", "64:64:128", "--precision", "fp32")
    planned = json.loads(ok("build", bundle, *RTX, *wanted, "--dry-run", "--json").stdout)
    assert planned["built"] == list(open_bundle(bundle).manifest.components)
    profiles = {task["key"]["component"]: task["key"]["profiles"][0]["axes"] for task in planned["tasks"]}
    assert profiles["prompt_encoder"] == {"batch": [1, 2, 16]}
    tokens = {"tokens": [1, 128, 128]} if family == "bundle_3" else {}
    assert profiles["decoder_context"] == {"batch": [1, 2, 8], "timesteps": [1, 50, 1000], **tokens}
    padded = {name: [128, 128, 128] for name in tokens}
    assert profiles["decoder_step"] == {"batch": [1, 2, 8], "height": [8, 8, 16], "width": [8, 8, 16], **padded}
    result = ok("build", bundle, *RTX, *wanted, "--component", "prompt_encoder,decoder_context")
    assert "built 2 of 2 engines" in result.stdout


def test_what_is_built_is_what_is_missing(toy: Bundle, fake: list[str]) -> None:
    ok("build", toy.folder, *RTX, "--component", "decoder_step,movq_decoder", "--component", "decoder_step")
    assert fake == ["decoder_step", "movq_decoder"]
    result = ok("build", toy.folder, *RTX)
    assert fake == ["decoder_step", "movq_decoder", "movq_encoder", "decoder_context"]
    assert "built 2 of 4 engines in 0 s, 43 B, 2 were up to date" in result.stdout
    ok("build", toy.folder, *RTX, "--gpu", "ada")
    assert len(fake) == 4
    ok("build", toy.folder, *RTX, "--gpu", "sm120")
    assert len(fake) == 8


def test_one_engine_is_no_plural(toy: Bundle, fake: list[str]) -> None:
    args = ("build", toy.folder, *RTX, "--component", "decoder_step")
    assert "would build 1 of 1 engine: about" in ok(*args, "--dry-run").stdout
    assert "built 1 of 1 engine in" in ok(*args).stdout
    assert "the engine is up to date in" in ok(*args).stdout


def test_options_reach_the_key(toy: Bundle, fake: list[str]) -> None:
    ok(
        "build", toy.folder, "--backend", "tensorrt-rtx", "--gpu", "sm120,sm86", "--size", "512:512:1024", "--size",
        "1024", "--batch", "1", "--batch", "1:2:2", "--workspace", "1.5 GiB", "--optimization-level", "4",
        "--weight-streaming", "--component", "decoder_step", "--precision", "fp16",
    )  # fmt: skip
    (record,) = EngineStore(toy).records()[0]
    key = record.key
    assert key.compute_capabilities == ("sm86", "sm120")
    assert key.settings.flags == ("WEIGHT_STREAMING",)
    assert (key.settings.workspace_bytes, key.settings.optimization_level) == (3 * 2**29, 4)
    assert [str(profile) for profile in key.profiles] == [
        "batch 1:2:2, height 64:64:128, width 64:64:128",
        "batch 1:4:4, height 128, width 128",
    ]


def test_dry_run_builds_nothing(toy: Bundle, fake: list[str]) -> None:
    result = ok("build", toy.folder, *RTX, "--dry-run")
    assert result.stdout.count("to build") == 4
    assert re.search(
        r"^would build 4 of 4 engines: about \S+ \w+ of disk, \S+ MB of memory at a time$", result.stdout, re.M
    )
    assert "512:768:1024" in result.stdout
    assert fake == []
    assert not EngineStore(toy).folder.exists()
    found = json.loads(ok("build", toy.folder, *RTX, "--dry-run", "--json").stdout)
    assert (found["dry_run"], found["built"], found["records"]) == (True, list(COMPONENTS), [])
    assert fake == []
    ok("build", toy.folder, *RTX, "--component", "decoder_step")
    result = ok("build", toy.folder, *RTX, "--dry-run")
    assert (result.stdout.count("to build"), result.stdout.count("up to date")) == (3, 1)


def test_json_is_one_object(toy: Bundle, fake: list[str]) -> None:
    found = json.loads(ok("build", toy.folder, *RTX, "--json").stdout)
    assert list(found) == ["bundle", "dry_run", "built", "tasks", "records"]
    assert found["bundle"] == str(toy.folder)
    assert found["built"] == fake == list(COMPONENTS)
    assert found["records"][0]["figures"]["layers"] == 1234
    assert [task["key"]["component"] for task in found["tasks"]] == list(COMPONENTS)
    again = json.loads(ok("build", toy.folder, *RTX, "--json").stdout)
    assert again["built"] == []
    assert again["records"] == found["records"]


@pytest.mark.parametrize("columns", [80, 60])
def test_tables_lose_nothing_on_a_narrow_terminal(toy: Bundle, fake: list[str], columns: int) -> None:
    outputs = [
        ok("build", toy.folder, *RTX, "--dry-run", columns=columns).stdout,
        ok("build", toy.folder, *RTX, "--weight-streaming", columns=columns).stdout,
        ok("engines", "list", toy.folder, columns=columns).stdout,
        ok("inspect", toy.folder, columns=columns).stdout,
    ]
    for output in outputs:
        table = [line for line in output.splitlines() if "bundle" not in line and "engines" not in line]
        table = [line for line in table if not line.startswith("none can run")]
        assert max(map(len, table)) <= columns
        assert "…" not in output
        for name in COMPONENTS:
            assert re.search(rf"^{name} ", output, re.MULTILINE), f"{name} is cut"
    assert "789" in outputs[1]


def test_folders_are_printed_as_they_are(toy: Bundle, fake: list[str]) -> None:
    outputs = [
        ok("engines", "list", toy.folder).stdout,
        ok("build", toy.folder, *RTX).stdout + ok("build", toy.folder, *RTX).stdout,
    ]
    (EngineStore(toy).folder / "x[red].plan").write_bytes(b"")
    outputs += [ok("engines", "list", toy.folder).stdout, ok("inspect", toy.folder).stdout]
    assert all(str(toy.folder) in output for output in outputs)
    assert all("x[red].plan has no record" in output and "[none]" in output for output in outputs[2:])
    assert "x[red]: " in ok("engines", "prune", toy.folder).stdout


def test_fp32_engines_come_with_a_warning(tmp_path: Path, fake: list[str]) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle", "fp32")
    result = ok("build", bundle.folder, *RTX, "--component", "decoder_step", "--json")
    assert json.loads(result.stdout)["built"] == ["decoder_step"]
    assert "warning: the bundle was exported in fp32, so its engines compute in fp32; --precision fp16" in result.stderr
    assert "warning" not in ok("build", bundle.folder, *RTX, "--precision", "fp32").stderr
    assert_error(
        run("build", bundle.folder, *RTX, "--precision", "fp16"),
        "--precision fp16: the bundle was exported in fp32", "kandrt export ... --precision fp16",
    )  # fmt: skip


def test_bars_on_a_terminal(
    toy: Bundle, fake: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    monkeypatch.setattr(build_command, "stderr", lambda: Console(stderr=True, force_terminal=True, width=100))
    with build_command.bars(2) as begin:
        for name in ("[bold]a", "b"):
            begin(name)(0.5, "Optimizing [graph]")
    shown = capsys.readouterr()
    assert shown.out == ""
    for part in ("[bold]a", "optimizing [graph]", "1 of 2"):
        assert part in shown.err


# What cannot be built


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "big"), "--size: expected MIN:OPT:MAX or one whole number, found 'big'"),
        (("--size", "512:768:1000"), "--size 512:768:1000: expected multiples of 64 up to 4096 pixels"),
        (("--size", "1024:768:512"), "--size: expected 1 <= MIN <= OPT <= MAX, found 1024:768:512"),
        (("--batch", "0"), "--batch: expected 1 <= MIN <= OPT <= MAX, found 0"),
        (("--batch", "1:1:1000"), "--batch 1:1:1000: expected at most 256 pictures"),
        (("--batch", "1", "--batch", "2"), "--batch: expected one, or one for each of 1 sizes, found 2"),
        (("--workspace", "much"), '--workspace: expected a size such as "4GiB" or "500MB", found \'much\''),
        (("--workspace", "0"), "--workspace: expected a size"),
        (
            ("--component", "unet"),
            "has no component unet; it has movq_encoder, movq_decoder, decoder_context, decoder_s",
        ),
        (("--gpu", "h100"), "--gpu h100: tensorrt-rtx builds for sm75, sm80, sm86, sm89, sm120, sm121, turing, ampere"),
        (("--component", ""), "--component: expected a name, found ''"),
        (("--strip",), "--strip needs a GPU: no usable GPU: [none]"),
    ],
)
def test_options_that_cannot_be(toy: Bundle, fake: list[str], options: Sequence[str], message: str) -> None:
    assert_error(run("build", toy.folder, *RTX, *options), message)
    assert fake == []
    assert not EngineStore(toy).folder.exists()


def test_backends_that_cannot_be(toy: Bundle, fake: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    message = "--gpu sm89: tensorrt builds for the GPU of the machine it runs on; leave --gpu out there"
    assert_error(run("build", toy.folder, "--backend", "tensorrt", "--gpu", "sm89"), message)
    message = "name the GPUs to build for with --gpu: no usable GPU"
    assert_error(run("build", toy.folder, "--backend", "tensorrt-rtx"), message)
    monkeypatch.setattr(builder, "library_version", lambda _builder: "none")
    for name in ("tensorrt", "tensorrt-rtx"):
        message = f"which is not installed; run: pip install 'kandrt[{name}]'"
        assert_error(run("build", toy.folder, "--backend", name, "--dry-run"), message)


def test_bundles_that_cannot_be(tmp_path: Path, toy: Bundle, fake: list[str]) -> None:
    for words in (("build", tmp_path / "[x]", *RTX), ("engines", "list", tmp_path / "[x]")):
        assert_error(run(*words), f"{tmp_path / '[x]'} does not exist; make a bundle with: kandrt export")
    EngineStore(toy).folder.write_bytes(b"in the way")
    result = run("build", toy.folder, *RTX)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.search(r"^error: cannot write to .*build in a copy of it that can be written to$", result.stderr, re.M)
    assert ok("engines", "list", toy.folder).stdout.startswith("no engines; make some, for a GPU such as sm89")


def test_a_build_that_fails_keeps_those_before_it(
    toy: Bundle, fake: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend = builder.run_worker

    def fails(work: PlanJob, *rest: Any) -> Event:
        if work.component == "decoder_context":
            raise BackendError("decoder_context: [a] reason")
        return pretend(work, *rest)

    monkeypatch.setattr(builder, "run_worker", fails)
    result = run("build", toy.folder, *RTX)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "error: decoder_context: [a] reason"
    assert stored(toy) == ["movq_decoder", "movq_encoder"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("500MB", 5 * 10**8), ("4GiB", 2**32), ("1.5 gib", 3 * 2**29), (" 64 MiB ", 2**26), ("1000000", 10**6)],
)
def test_sizes_in_bytes(text: str, size: int) -> None:
    assert read_size(text, "") == size


@pytest.mark.parametrize(
    "text", ["", "-1", "1e9", "4 gigs", "GiB", "0.1", "9" * 16, "1,5GB", "٤", "9999999999GiB", "nan"]
)
def test_what_is_no_size_in_bytes(text: str) -> None:
    with pytest.raises(build_command.InputError, match=r"^x: expected a size such as"):
        read_size(text, "x")


# Engines that are there


def change_library(bundle: Bundle, component: str, to: str) -> None:
    """Make one plan that of another version of the library."""
    store = EngineStore(bundle)
    (record,) = [each for each in store.records()[0] if each.key.component == component]
    plan = store.read(record)
    store.remove(record.key.stem)
    key = replace(record.key, library=to)
    with store.building(key) as temporary:
        temporary.write_bytes(plan)
        store.add(replace(record, key=key, plan=replace(record.plan, file=f"{key.stem}.plan")), temporary)


@pytest.fixture
def mixed(toy: Bundle, fake: list[str]) -> Bundle:
    """A store of 4 sound plans, 1 for another GPU, 2 stale ones and 3 files that are of no use."""
    ok("build", toy.folder, *RTX)
    toy = export_again(toy, "decoder_step", note="new")  # one is stale, whatever is installed
    change_library(toy, "movq_encoder", "0.9")  # another with what is installed
    ok("build", toy.folder, *RTX)
    ok("build", toy.folder, "--backend", "tensorrt-rtx", "--gpu", "sm75", "--component", "decoder_step")
    folder = EngineStore(toy).folder
    (folder / "movq_decoder-0123.plan").write_bytes(b"orphan")
    (folder / "movq_decoder-4567.json").write_bytes(b"{}")
    (folder / "movq_decoder-89ab.tmp").write_bytes(b"half")
    return toy


def test_list(mixed: Bundle) -> None:
    result = ok("engines", "list", mixed.folder, columns=250)
    rows = [line for line in result.stdout.splitlines() if " tensorrt-rtx " in line]
    assert len(rows) == 7
    assert sum("stale: the graph is another" in row for row in rows) == 1
    assert sum(f"stale: it was built by tensorrt-rtx 0.9, {VERSION} is installed" in row for row in rows) == 1
    assert sum(row.rstrip().endswith("sound") for row in rows) == 5
    assert result.stdout.count("of no use: ") == 3
    assert "none can run here: no usable GPU: [none]" in result.stdout
    command = result.stdout.rpartition("remove what is of no use with: ")[2]
    assert shlex.split(command) == ["kandrt", "engines", "prune", str(mixed.folder)]


def test_list_on_a_gpu(mixed: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "capability", lambda *_: "sm89")
    result = ok("engines", "list", mixed.folder, columns=250)
    rows = [line for line in result.stdout.splitlines() if " tensorrt-rtx " in line]
    assert sum(row.rstrip().endswith("usable") for row in rows) == 4
    assert sum(row.rstrip().endswith("it is for sm75, this GPU is sm89") for row in rows) == 1
    assert "none can run here" not in result.stdout


def test_list_as_json(mixed: Bundle) -> None:
    found = json.loads(ok("engines", "list", mixed.folder, "--json").stdout)
    assert (found["gpu"], found["no_gpu"]) == (None, "no usable GPU: [none]")
    assert [each["stale"] for each in found["found"]].count(True) == 2
    assert len(found["damaged"]) == 3
    inspected = json.loads(ok("inspect", mixed.folder, "--json").stdout)
    assert inspected["engines"]["found"] == found["found"]


def test_options_tell_engines_apart(toy: Bundle, fake: list[str]) -> None:
    args = ("build", toy.folder, *RTX, "--component", "decoder_step")
    ok(*args)
    ok(*args, "--weight-streaming", "--workspace", "1GB")
    rows = [line for line in ok("engines", "list", toy.folder, columns=200).stdout.splitlines() if "sound" in line]
    assert sorted(row.partition("sound")[2].strip() for row in rows) == [
        "",
        ", WEIGHT_STREAMING, workspace 1000000000 bytes",
    ]


def test_inspect_shows_engines_where_there_are_some(mixed: Bundle, tmp_path: Path) -> None:
    shown = ok("inspect", mixed.folder, columns=250).stdout
    assert shown.endswith(ok("engines", "list", mixed.folder, columns=250).stdout)
    bare = make_toy_bundle(tmp_path / "bare")
    assert "engine" not in ok("inspect", bare.folder).stdout.replace(str(tmp_path), "")


def names_in(bundle: Bundle) -> set[str]:
    return {path.name for path in EngineStore(bundle).folder.iterdir() if path.suffix != ".lock"}


def test_prune_removes_what_is_of_no_use_and_nothing_else(mixed: Bundle) -> None:
    records, damaged = EngineStore(mixed).records()
    stale = [each for each in records if EngineStore(mixed).stale(each) or each.key.library != VERSION]
    before, going = names_in(mixed), {each.file for each in damaged}
    going |= {f"{each.key.stem}{suffix}" for each in stale for suffix in (".plan", ".json")}
    freed = sum((EngineStore(mixed).folder / name).stat().st_size for name in going)

    result = ok("engines", "prune", mixed.folder, "--dry-run")
    assert f"would remove 5, {console.size_text(freed)}; engines left: 5\n" in result.stdout
    assert names_in(mixed) == before
    assert json.loads(ok("engines", "prune", mixed.folder, "--dry-run", "--json").stdout)["bytes"] == freed
    assert names_in(mixed) == before

    result = ok("engines", "prune", mixed.folder)
    assert f"removed 5, {console.size_text(freed)}; engines left: 5\n" in result.stdout
    assert "the graph is another" in result.stdout
    assert names_in(mixed) == before - going
    assert "removed 0, 0 B; engines left: 5\n" in ok("engines", "prune", mixed.folder).stdout
    capabilities = {record.key.compute_capabilities for record in EngineStore(mixed).records()[0]}
    assert capabilities == {("sm75",), ("sm89",)}, "another machine may have that GPU"


def test_prune_all(mixed: Bundle) -> None:
    found = json.loads(ok("engines", "prune", mixed.folder, "--all", "--json").stdout)
    assert len(found["removed"]) == 10
    assert found["dry_run"] is False
    assert list(EngineStore(mixed).folder.iterdir()) == []
    assert ok("engines", "list", mixed.folder).stdout.startswith("no engines; ")


def test_prune_keeps_a_sound_plan_beside_what_a_killed_build_left(toy: Bundle, fake: list[str]) -> None:
    ok("build", toy.folder, *RTX)
    before = names_in(toy)
    (record, *_) = EngineStore(toy).records()[0]
    for name in (f"{record.key.stem}.tmp", f".{record.key.stem}.json.7.tmp"):
        (EngineStore(toy).folder / name).write_bytes(b"half")
    assert "removed 1, 8 B; engines left: 4" in ok("engines", "prune", toy.folder).stdout
    assert names_in(toy) == before


def test_without_the_library_nothing_is_stale(toy: Bundle, fake: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle may be for other machines: a missing library says nothing of its engines."""
    ok("build", toy.folder, *RTX)
    monkeypatch.setattr(trt, "library_version", lambda _builder: "none")
    shown = ok("engines", "list", toy.folder, columns=200).stdout
    assert "stale" not in shown
    assert shown.count(f"it was built by tensorrt-rtx {VERSION}, none is installed") == 4
    assert "removed 0" in ok("engines", "prune", toy.folder).stdout


def test_other_weights_make_engines_stale(toy: Bundle, fake: list[str]) -> None:
    ok("build", toy.folder, *RTX)
    train_again(toy, "movq")
    shown = ok("engines", "list", toy.folder, columns=200).stdout
    assert shown.count("stale: the weights are others") == 2


# Interruption

# A test run in the background of a shell ignores SIGINT and hands that down: undo it. Says when the worker is at it.
INTERRUPTED = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from kandrt.engines import builder

class Loud(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print("worker", self.pid, file=sys.stderr, flush=True)

subprocess.Popen = Loud
follow = builder.follow

def loud(process, work, progress):
    def tell(share, phase):
        print("phase", phase, file=sys.stderr, flush=True)
        progress(share, phase)
    return follow(process, work, tell)

builder.follow = loud
from kandrt.scripts.cli import main
main()
"""


@builds
@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_build_leaves_nothing(toy: Bundle, number: signal.Signals) -> None:
    # A graph of which building takes minutes
    bundle = export_again(toy, "decoder_step", repeat=1000)
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, "build", str(bundle.folder), *RTX, "--component", "decoder_step"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    pid, seen = 0, []
    for line in process.stderr:
        seen.append(line)
        pid = int(line.split()[1]) if line.startswith("worker") else pid
        if line.startswith("phase Cloning"):
            break
    assert pid, seen
    started = time.monotonic()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert time.monotonic() - started < 30, "the build was waited for"
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert [path.suffix for path in EngineStore(bundle).folder.iterdir()] == [".lock"]


@builds
def test_the_small_fp16_bundle_on_the_command_line(fp16_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fp16_bundle, tmp_path / "bundle"))
    names = ("prior_step", "decoder_context")
    result = ok("build", folder, *RTX, "--component", ",".join(names), "--precision", "fp16")
    assert [line.rsplit(maxsplit=1)[1] for line in result.stdout.splitlines()[2:4]] == ["100%", "0%"]
    tasks = plan_work(open_bundle(folder), "tensorrt-rtx", gpus=["sm89"], components=names)
    assert all(isinstance(task.existing, PlanRecord) for task in tasks)
