"""The check for GPU machines, as far as it goes without one: it refuses at once, and reports what came of its parts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kandrt.engines.bundle import open_bundle
from kandrt.engines.errors import BackendError
from kandrt.runtime.miniature import MINIATURE
from kandrt.scripts import gpu_check
from kandrt.scripts.gpu_check import Check, Measured, Part, Report, checks_of, write
from kandrt.scripts.reference import paints_prompts

ROOT = Path(__file__).parents[1]
SMI = {
    "none": "",
    "one that lists no GPU": "#!/bin/sh\nexit 0\n",
    "one that fails": "#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n",
}


@pytest.mark.skipif(sys.platform == "win32", reason="a script for bash")
@pytest.mark.parametrize("smi", SMI)
def test_a_machine_without_a_gpu_is_refused_before_anything_is_installed(smi: str, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "gpu-check", tmp_path / "scripts")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "env"):
        (programs / name).symlink_to(shutil.which(name) or "")
    if SMI[smi]:
        (programs / "nvidia-smi").write_text(SMI[smi])
        (programs / "nvidia-smi").chmod(0o755)
    command = [str(programs / "bash"), str(tmp_path / "scripts" / "gpu-check")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(programs)}, check=False)
    assert done.returncode == 1, done.stderr
    assert "gpu-check: no GPU: " in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "scripts"]


def test_the_program_itself_refuses_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match=r"no GPU: nvidia-smi cannot be run: .*nvidia-smi"):
        gpu_check.name_of_gpu()
    result = CliRunner().invoke(gpu_check.app, ["-o", str(tmp_path / "report.md")])
    assert result.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_parts_say_what_came_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    python = [sys.executable, "-c"]
    good = Check("good", [*python, "print('{\"a\": 1}')"], as_json=True).run()
    assert (good.passed, good.found) == (True, {"a": 1})
    bad = Check("bad", [*python, "import sys; print('half a'); sys.exit('broken')"], as_json=True).run()
    assert (bad.passed, bad.found) == (False, None)
    assert "half a" in bad.tail
    assert "broken" in bad.tail
    assert not Check("no JSON", [*python, "pass"], as_json=True).run().passed
    monkeypatch.setattr(gpu_check, "unusable_here", lambda backend: f"no {backend}")
    skipped = Check("skipped", [*python, "raise SystemExit(1)"], only="tensorrt").run()
    assert (skipped.passed, skipped.skipped) == (False, "no tensorrt")


def test_the_report_is_for_people_and_programs(tmp_path: Path) -> None:
    measured = Measured("mini", "tensorrt", 128, 25, "true", 1.5, 0.25, 0.004, 2 * 10**9)
    parts = [
        Part("mini: build tensorrt", "kandrt build", True, 3.0, "fine"),
        Part("mini: speed of tensorrt", "python", True, 4.0, "", asdict(measured)),
        Part("mini: verify tensorrt-rtx", "kandrt verify", False, 0.0, "", skipped="no kernels for\n sm90"),
    ]
    report = Report("NVIDIA L4, 580.1, 23034 MiB, 8.9", "2026-01-01 00:00:00", parts)
    write(report, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# GPU check: passed\n\nNVIDIA L4")
    assert "| mini: verify tensorrt-rtx | skipped: no kernels for sm90 | 0.0 |" in text
    assert "| mini | tensorrt | 128 | true | 1.5 s | 0.250 s | 4.00 ms | 2.00 GB |" in text
    report.parts.append(Part("tests", "pytest -m gpu", False, 9.0, "1 failed"))
    write(report, tmp_path / "report.md")
    assert "# GPU check: FAILED" in (tmp_path / "report.md").read_text()
    assert "1 failed" in (tmp_path / "report.md").read_text()
    facts = json.loads((tmp_path / "report.json").read_text())
    assert (facts["passed"], len(facts["parts"]), facts["parts"][1]["found"]["step"]) == (False, 4, 0.004)


@pytest.mark.parametrize("family", ["bundle", "bundle_2_1", "bundle_3"])
def test_speed_is_of_bundles_that_go_from_a_prompt_to_a_picture(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(family)
    assert [check.name for check in checks_of(folder, 4) if "speed of onnxruntime" in check.name]
    manifest = open_bundle(folder).manifest
    assert paints_prompts(manifest)
    without = replace(manifest, prior=None, tokenizer=None)
    assert paints_prompts(without) == (family == "bundle_3")
    others = dict(manifest.decoders)
    del others["decoder"]
    assert not paints_prompts(replace(manifest, decoders=others))


def test_every_program_that_it_runs_exists() -> None:
    """Their options are those of this version."""
    environment = {**os.environ, "COLUMNS": "200"}
    helps: dict[tuple[str, ...], str] = {}
    for check in [*gpu_check.checks_once(), *checks_of(MINIATURE, 4)]:
        program = tuple(check.command[1:4]) if "cli" in check.command[2] else tuple(check.command[1:3])
        if program[1] == "pytest":
            continue
        if program not in helps:
            command = [sys.executable, *program, "--help"]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
            helps[program] = done.stdout
        hidden = {"--measure", "--side", "--cuda-graph"} if program[1].endswith("gpu_check") else set()
        for option in {word for word in check.command if word.startswith("--")} - hidden:
            assert option in helps[program], (check.name, option)
