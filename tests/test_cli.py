"""The command line's manners: help, exit codes, errors in one line, clean interruption; and inspect, doctor, export."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kandrt.engines.backends import BACKENDS
from kandrt.engines.bundle import open_bundle
from kandrt.engines.manifest import decode_manifest
from kandrt.runtime.families import FAMILIES
from kandrt.runtime.miniature import MINIATURE
from kandrt.scripts import console, doctor
from kandrt.scripts.cli import app

COMMANDS = ("export", "quantize", "build", "generate", "inspect", "verify", "doctor")
HEAVY = (
    "torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "openvino", "numpy", "PIL", "tokenizers", "safetensors",
)  # fmt: skip


def run(*args: str | Path) -> Result:
    """Run `kandrt` in this process."""
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "100"}, prog_name="kandrt")


def start(code: str, *args: str | Path) -> subprocess.Popen[str]:
    """Start `kandrt` in a process of its own, after some code."""
    program = f"{code}\nfrom kandrt.scripts.cli import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def assert_error(result: Result, *parts: str) -> None:
    """One line `error: ...` on stderr that holds every part, nothing on stdout, exit code 1."""
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert all(part in result.stderr for part in parts), result.stderr


@pytest.fixture
def copy(spare_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of its own to damage; files are hard links, so replace them and never write into them."""
    return Path(shutil.copytree(spare_bundle, tmp_path / "copy", copy_function=os.link))


def replace_bytes(path: Path, content: bytes) -> None:
    """Put another file in place of a hard link."""
    path.unlink()
    path.write_bytes(content)


# Help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Example:\s+kandrt {command}", result.stdout)
    assert "--json" in result.stdout
    assert "--verbose" in result.stdout
    assert "no-json" not in result.stdout


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    code = f"""
import atexit, sys
sys.argv[1:] = ["--help"]
atexit.register(lambda: print("imported:", *[name for name in {HEAVY} if name in sys.modules]))
"""
    stdout, stderr = start(code).communicate(timeout=60)
    assert stderr == ""
    assert re.findall(r"^│ (\w+) ", stdout, re.MULTILINE) == [*COMMANDS, "bench", "engines"]
    assert stdout.endswith("imported:\n")


def test_usage_names_the_optional_bundle_first() -> None:
    assert "Usage: kandrt generate [BUNDLE] PROMPT -o PICTURE [OPTIONS]" in run("generate", "--help").stdout


def test_version() -> None:
    from importlib.metadata import version

    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"kandrt {version('kandrt')}\n")


@pytest.mark.parametrize(
    "args",
    [
        ("paint",),
        ("inspect",),
        ("inspect", "bundle", "--unknown"),
        ("export", "checkpoint"),
        ("export", "checkpoint", "-o", "bundle", "--precision", "int8"),
        ("generate", "bundle", "two", "words", "-o", "x.png"),
        ("generate", "bundle", "prompt", "-o", "x.png", "--steps", "many"),
        ("generate", "bundle", "prompt", "-o", "x.png", "--memory", "none"),
    ],
)
def test_wrong_usage_exits_with_2(args: Sequence[str]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert "Usage: kandrt" in result.stderr
    assert result.stdout == ""


# Failures


def raises(error: BaseException) -> Callable[..., Any]:
    """A function that raises."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_unexpected_error_is_one_line_and_a_traceback_with_verbose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "diagnose", raises(RuntimeError("two\nlines")))
    result = run("doctor")
    expected = "unexpected error: RuntimeError: two lines, run with --verbose for the traceback\n"
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", expected)
    result = run("doctor", "--verbose")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("unexpected error: RuntimeError: two lines\n")


def test_interruption_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "diagnose", raises(KeyboardInterrupt()))
    result = run("doctor")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_output_that_nobody_reads_is_no_noise(bundle: Path) -> None:
    # The reader is gone before anything is written: a sleep stands for a slow start.
    process = start("import time; time.sleep(1)", "inspect", bundle)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    stderr = process.stderr.read()
    assert (process.wait(timeout=60), stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full to write to")
@pytest.mark.parametrize("args", [("--help",), ("doctor",), ("doctor", "--json")])
def test_stdout_on_a_full_disk_is_one_line(args: Sequence[str]) -> None:
    program = [sys.executable, "-m", "kandrt.scripts.cli", *args]
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert re.fullmatch(r"unexpected error: [^\n]*No space left on device[^\n]*\n", result.stderr)


def schema_99(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    replace_bytes(folder / "manifest.json", json.dumps(manifest | {"schema_version": 99}).encode())


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "is not a bundle"),
    "manifest cut": (lambda folder: replace_bytes(folder / "manifest.json", b'{"schema_version": 1,'), "manifest"),
    "other schema": (schema_99, "found 99"),
    "file missing": (lambda folder: (folder / "prior_step.onnx").unlink(), "prior_step.onnx is missing"),
    "file cut": (lambda folder: replace_bytes(folder / "prior_step.onnx", b"short"), "prior_step.onnx: expected"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["inspect", "verify", "generate"])
def test_damaged_bundle_is_one_line(copy: Path, tmp_path: Path, command: str, damage: str) -> None:
    harm, message = DAMAGES[damage]
    harm(copy)
    extra = ("a robot", "-o", tmp_path / "x.png") if command == "generate" else ()
    assert_error(run(command, copy, *extra), str(copy), message)
    assert not (tmp_path / "x.png").exists()


# Inspect


def test_inspect_shows_parts_and_abilities(bundle: Path) -> None:
    result = run("inspect", bundle)
    assert result.exit_code == 0
    manifest = open_bundle(bundle).manifest
    words = [*manifest.components, "fp32", "inpainting", "ControlNet", "ddpm", "KandinskyV22PriorPipeline", "torch"]
    assert all(word in result.stdout for word in words)


def test_inspect_tells_families_apart(bundle_2_1: Path, bundle_3: Path) -> None:
    shown = run("inspect", bundle_2_1).stdout
    assert "conditioned by" not in run("inspect", MINIATURE).stdout
    assert re.search(r"^decoder +text-to-image and image-to-image +ddim +ddpm \(own\), dpmpp-2m$", shown, re.MULTILINE)
    assert "decoder, inpaint: conditioned by embeddings and prompt\n" in shown
    assert "ControlNet" not in shown
    shown = run("inspect", bundle_3).stdout
    assert "decoder: conditioned by prompt\n" in shown
    assert re.findall(r"^(prior|decoder|inpaint|controlnet) ", shown, re.MULTILINE) == ["decoder"]


@pytest.mark.parametrize("family", ["bundle", "bundle_2_1", "bundle_3"])
def test_inspect_json_says_what_stages_take_and_what_memory_they_need(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    found, manifest = json.loads(run("inspect", folder, "--json").stdout), open_bundle(folder).manifest
    parameters = [component.parameters for component in manifest.components.values()]
    assert found["memory"] == {"keep": 4 * sum(parameters), "stage": 4 * max(parameters)}  # fp32: 4 bytes each
    takes = {
        "bundle": {
            "prior": ["prompt", "picture"], "decoder": ["embeddings"], "inpaint": ["embeddings"],
            "controlnet": ["embeddings"],
        },
        "bundle_2_1": {
            "prior": ["prompt", "picture"], "decoder": ["embeddings", "prompt"], "inpaint": ["embeddings", "prompt"],
        },
        "bundle_3": {"decoder": ["prompt"]},
    }  # fmt: skip
    assert {stage: facts["takes"] for stage, facts in found["stages"].items()} == takes[family]
    own = {"bundle": ["ddpm"], "bundle_2_1": ["ddim", "ddpm"], "bundle_3": ["ddpm"]}
    assert found["stages"]["decoder"]["own_schedulers"] == own[family]
    assert sorted(found["stages"]["decoder"]["schedulers"]) == ["ddim", "ddpm", "dpmpp-2m"]


def test_inspect_json_is_the_manifest(bundle: Path) -> None:
    result = run("inspect", bundle, "--json", "--check")
    found = json.loads(result.stdout)
    opened = open_bundle(bundle)
    assert decode_manifest(json.dumps(found["manifest"]).encode(), "") == opened.manifest
    files = [path for path in bundle.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert found["size"] == sum(path.stat().st_size for path in files)
    assert found["checked"] is True
    assert "inpainting" in found["modes"]


def test_inspect_check_names_the_file_whose_hash_is_wrong(copy: Path) -> None:
    content = bytearray((copy / "weights/prior.safetensors").read_bytes())
    content[-1] ^= 1
    replace_bytes(copy / "weights/prior.safetensors", content)
    assert run("inspect", copy).exit_code == 0
    assert_error(run("inspect", copy, "--check"), "weights/prior.safetensors: expected SHA-256")


def test_inspect_says_what_a_bundle_lacks(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    replace_bytes(copy / "manifest.json", json.dumps(manifest | {"prior": None, "decoders": {}}).encode())
    assert_error(run("inspect", copy), "neither a prior nor a decoder")
    decoders = {"decoder": manifest["decoders"]["decoder"]}
    replace_bytes(copy / "manifest.json", json.dumps(manifest | {"prior": None, "decoders": decoders}).encode())
    shown = run("inspect", copy).stdout
    for checkpoint in ("kandinsky-2-2-prior", "kandinsky-2-2-decoder-inpaint", "kandinsky-2-2-controlnet-depth"):
        assert f"no; needs {checkpoint}" in shown


SIZES = {
    0: "0 B", 999: "999 B", 1000: "1.00 kB", 214_336: "214 kB", 999_600: "1.00 MB", 18_560_000_000: "18.6 GB",
    2 * 10**12: "2,000 GB",
}  # fmt: skip


@pytest.mark.parametrize(("size", "text"), SIZES.items())
def test_sizes_have_three_digits(size: int, text: str) -> None:
    assert console.size_text(size) == text


# Doctor


def test_doctor_reports_this_machine() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    packages = {(package["name"], package["extra"]): package for package in found["packages"]}
    assert packages["torch", "export"]["fits"] is True
    assert ("pytest", "test") not in packages
    precisions = {(device["backend"], device["device"]): device["precisions"] for device in found["devices"]}
    assert precisions["onnxruntime", "cpu"] == ["fp32", "fp16"]
    assert precisions.keys() == {(name, device) for name, backend in BACKENDS.items() for device in backend.devices}
    assert found["can_export"] is True
    assert found["can_build"] == ["tensorrt-rtx"]
    assert found["cpus"] >= 1
    text = run("doctor").stdout
    assert "can make pictures" in text
    assert "can export checkpoints" in text


def test_doctor_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run("doctor")
    assert result.exit_code == 0
    assert "cannot make pictures" in result.stdout
    assert "cannot export checkpoints" in result.stdout
    assert "pip install 'kandrt[export]'" in result.stdout
    assert "pip install 'kandrt[cpu]'" in result.stdout


def test_doctor_names_a_package_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: "0.0.1+local" if name == "torch" else "99.0")
    advice = doctor.diagnose().advice
    assert [line for line in advice if line.startswith("torch 0.0.1+local is older than")]


def test_packages_are_found_by_what_they_are_imported_as(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.MODULES, "absent", "no_such_package.module")
    assert [doctor.importable(name) for name in ("pillow", "absent", "no-such-package")] == [True, False, False]


def test_doctor_survives_a_broken_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", raises(ImportError("libfoo.so is missing")))
    cpu = next(device for device in doctor.known_devices() if device.device == "cpu")
    assert cpu.problem == "cannot be used: libfoo.so is missing"


# Export


def test_export_refuses_what_exists(tmp_path: Path, bundle: Path) -> None:
    assert_error(run("export", "checkpoint", "-o", bundle), "exists already", "--overwrite")
    (tmp_path / "notes.txt").touch()
    assert_error(run("export", "checkpoint", "-o", tmp_path, "--overwrite"), "is not a bundle")


def test_export_refuses_a_folder_that_cannot_be_written(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    (tmp_path / "file").touch()
    result = run("export", checkpoints["prior"], "-o", tmp_path / "file" / "bundle")
    assert_error(without_progress(result), "Not a directory")


def test_export_names_a_checkpoint_that_is_missing(tmp_path: Path) -> None:
    assert_error(without_progress(run("export", tmp_path / "none", "-o", tmp_path / "bundle")), str(tmp_path / "none"))


def test_export_refuses_two_families_in_a_bundle(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    for others in (("prior", "decoder-2-1"), ("prior-2-1", "decoder"), ("prior", "decoder-3")):
        names = [checkpoints[role] for role in others]
        result = without_progress(run("export", *names, "-o", tmp_path / "bundle"))
        assert_error(result, "one bundle holds one family", *map(str, names))
        families = {
            name for name in ("kandinsky-2-1", "kandinsky-2-2", "kandinsky-3") if f" is {name}" in result.stderr
        }
        assert len(families) == 2
        assert list(tmp_path.iterdir()) == []


def test_help_of_export_names_the_published_checkpoints() -> None:
    shown = run("export", "--help").stdout
    for family in FAMILIES.values():
        (line,) = re.findall(rf"^ {family.title}: (.*?)^ *$", shown, re.MULTILINE | re.DOTALL)
        assert line.replace(",", " ").split() == list(family.checkpoints.values())
    main = run("--help").stdout
    assert all(family.checkpoints["decoder"] in main for family in FAMILIES.values())


def test_export_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("torch", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run("export", "checkpoint", "-o", tmp_path / "bundle")
    assert_error(result, "onnx, torch", "pip install 'kandrt[export]'")


def test_full_disk_leaves_nothing_of_an_export(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    from kandrt.export import stages

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(stages, "export_tokenizer", raises(full))
    result = run("export", checkpoints["prior"], "-o", tmp_path / "bundle")
    assert_error(without_progress(result), "No space left on device")
    assert list(tmp_path.iterdir()) == []


def without_progress(result: Result) -> Result:
    """The result less the lines of progress on stderr, which begin with seconds."""
    kept = [line for line in result.stderr_bytes.splitlines(keepends=True) if not re.match(rb" *[\d.]+ s  ", line)]
    result.stderr_bytes = b"".join(kept)
    return result


def test_export_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path) -> None:
    from kandrt.export import exporter
    from kandrt.scripts.reference import make_reference

    given: dict[str, Any] = {}

    def fake(checkpoints: Sequence[str], output: Path, **options: Any) -> Path:
        print("noise of a library")
        options.pop("report")("tracing something")
        given.update(options, checkpoints=checkpoints, output=output)
        return bundle

    monkeypatch.setattr(exporter, "export_bundle", fake)
    options = ("--precision", "fp32", "--storage", "fp16", "--no-check", "--revision", "main", "--variant", "fp16")
    flags = ("--feature-reuse", "--overwrite")
    result = run("export", "a/prior", "a/decoder", "-o", tmp_path / "bundle", *options, *flags)
    assert result.exit_code == 0
    assert given == {
        "checkpoints": ["a/prior", "a/decoder"], "output": tmp_path / "bundle", "precision": "fp32",
        "storage": "fp16", "feature_reuse": True, "check": False, "revision": "main", "variant": "fp16",
        "overwrite": True, "make_reference": make_reference,
    }  # fmt: skip
    assert "tracing something" in result.stderr
    assert "noise of a library" in result.stderr
    assert "noise" not in result.stdout
    manifest = open_bundle(bundle).manifest
    for name, component in manifest.components.items():
        assert component.error is not None
        assert re.search(rf"^{name} .* {component.error.relative:.1e}$", result.stdout, re.MULTILINE)


def test_export_as_a_program(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    folder = tmp_path / "bundle"
    stdout, stderr = start("", "export", checkpoints["prior"], "-o", folder, "--json").communicate(timeout=400)
    found = json.loads(stdout)
    opened = open_bundle(folder)
    assert found["bundle"] == str(folder)
    assert decode_manifest(json.dumps(found["manifest"]).encode(), "") == opened.manifest
    assert opened.manifest.reference is not None
    opened.check_hashes()
    assert "tracing prior_step" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


# A test run in the background of a shell ignores SIGINT and hands that down: undo it. A signal that comes between
# Python's last look at it and the system call does not end a sleep: sleep in short pieces.
SLOW_EXPORT = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from kandrt.export import draft
draft.export_network = lambda *_, **__: [time.sleep(0.1) for _ in range(600)]
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_export_leaves_nothing(
    tmp_path: Path, checkpoints: dict[str, Path], number: signal.Signals
) -> None:
    process = start(SLOW_EXPORT, "export", checkpoints["prior"], "-o", tmp_path / "bundle")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".bundle.*/tokenizer.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


# Display


def test_progress_is_one_live_line_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    monkeypatch.setattr(console, "stderr", lambda: Console(stderr=True, force_terminal=True, width=100))
    with console.pieces() as report:
        report("tracing [a] graph")
    with console.byte_progress("checking files", 10) as progress:
        progress(10)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "tracing [a] graph" in shown.err
    assert "checking files" in shown.err


def test_json_takes_dataclasses_and_paths_that_are_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass
    class Found:
        name: str
        sizes: tuple[int, ...]

    console.print_json(Found("odd \udcff", (1, 2)))
    assert json.loads(capsys.readouterr().out) == {"name": "odd \udcff", "sizes": [1, 2]}
