"""`kandrt generate`: it makes what the Python surface makes, and keeps how."""

from __future__ import annotations

import errno
import inspect
import io
import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from kandrt.runtime import Decoder, Kandinsky, Prior, load
from kandrt.runtime.images import _WRITABLE
from kandrt.runtime.plan import Plan
from kandrt.scripts import clock, generate
from kandrt.scripts.cli import app

SMALL = ("--height", "64", "--width", "128", "--steps", "2", "--prior-steps", "2")
PROMPT = "a robot, 4k photo"


def run(*args: str | Path) -> Result:
    """Run `kandrt generate` in this process."""
    return CliRunner().invoke(app, ["generate", *map(str, args)], env={"COLUMNS": "100"}, prog_name="kandrt")


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    """A picture, a mask and a hint of 128 x 64 pixels."""
    rng = np.random.default_rng(0)
    mask = np.zeros((64, 128), np.uint8)
    mask[16:48, 32:96] = 255
    arrays = {
        "image": rng.integers(0, 256, (64, 128, 3), np.uint8),
        "mask": mask,
        "hint": rng.integers(0, 256, (64, 128), np.uint8),
    }
    for name, array in arrays.items():
        Image.fromarray(array).save(tmp_path / f"{name}-in.png")
    return {name: tmp_path / f"{name}-in.png" for name in arrays}


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ((), {"negative_prompt": "blurry", "scheduler": "ddim", "guidance_scale": 2.0}),
        ((), {"prior_guidance_scale": 1.0, "count": 2, "memory": "stage", "threads": 1}),
        (("image",), {"strength": 0.6}),
        (("image", "mask"), {}),
        (("hint",), {}),
    ],
    ids=["text", "several", "image", "inpaint", "hint"],
)
def test_picture_is_that_of_the_python_surface(
    bundle: Path, tmp_path: Path, pictures: dict[str, Path], inputs: tuple[str, ...], options: dict[str, Any]
) -> None:
    flags = [text for name in inputs for text in (f"--{name}", str(pictures[name]))]
    flags += [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    output = tmp_path / "out.png"
    result = run(bundle, PROMPT, "-o", output, *SMALL, "--seed", "43", *flags)
    assert result.exit_code == 0, result.stderr
    opened = {name: options.pop(name) for name in ("memory", "threads") if name in options}
    with load(bundle, **opened) as k:
        given = {name: Image.open(pictures[name]) for name in inputs}
        expected = k(PROMPT, height=64, width=128, steps=2, prior_steps=2, seed=43, **given, **options)
    files = [output] if len(expected.images) == 1 else [tmp_path / "out-0.png", tmp_path / "out-1.png"]
    assert sorted(tmp_path.glob("out*")) == files
    for image, file in zip(expected.images, files, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(image))
        assert str(file) in result.stdout.replace("\n", "")
    assert "seed 43" in result.stdout


def test_picture_says_how_it_was_made(bundle: Path, tmp_path: Path) -> None:
    result = run(bundle, PROMPT, "-o", tmp_path / "a.png", *SMALL, "--seed", "7", "--negative-prompt", "ünscharf")
    assert result.exit_code == 0, result.stderr
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        facts = dict(image.text)  # type: ignore[attr-defined]
    assert facts == {
        "prompt": PROMPT, "negative_prompt": "ünscharf", "seed": "7", "steps": "2", "guidance_scale": "4.0",
        "prior_steps": "2", "prior_guidance_scale": "4.0", "scheduler": "ddpm", "size": "128x64", "bundle": "bundle",
        "backend": "onnxruntime", "precision": "fp32", "kandrt": version("kandrt"),
    }  # fmt: skip


# The settings that a picture's metadata names, by family and inputs, where none was given.
DEFAULTS: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {
    ("bundle", ()): {"steps": 100, "guidance_scale": 4.0, "prior_steps": 25, "prior_guidance_scale": 4.0},
    ("bundle_2_1", ("image",)): {
        "steps": 100, "guidance_scale": 4.0, "prior_steps": 25, "prior_guidance_scale": 4.0, "strength": 0.3,
    },
    ("bundle_2_1", ("image", "mask")): {
        "steps": 100, "guidance_scale": 4.0, "prior_steps": 25, "prior_guidance_scale": 4.0,
    },
    ("bundle_3", ()): {"steps": 25, "guidance_scale": 3.0},
    ("bundle_3", ("image",)): {"steps": 25, "guidance_scale": 3.0, "strength": 0.3},
}  # fmt: skip


@pytest.mark.parametrize(("family", "inputs"), DEFAULTS, ids=str)
def test_metadata_names_the_defaults_and_they_are_those_of_the_python_surface(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    pictures: dict[str, Path],
    family: str,
    inputs: tuple[str, ...],
) -> None:
    folder, expected = request.getfixturevalue(family), DEFAULTS[family, inputs]
    plans, priors, signature = list[Plan](), list[dict[str, Any]](), inspect.signature(Prior.__call__)

    # What is to be done is all that is looked at: networks need not run for it.
    class DoneError(Exception):
        pass

    def denoise(_: Decoder, plan: Plan, *__: Any) -> None:
        plans.append(plan)
        raise DoneError

    def embed(self: Prior, prompt: str, **settings: Any) -> Any:
        bound = signature.bind(self, prompt, **settings)
        bound.apply_defaults()
        priors.append({name: bound.arguments[name] for name in ("steps", "guidance_scale")})
        return self.placeholder(prompt, 1)

    monkeypatch.setattr(Decoder, "_denoise", denoise)
    monkeypatch.setattr(Prior, "__call__", embed)
    flags = [text for name in inputs for text in (f"--{name}", str(pictures[name]))]
    result = run(folder, PROMPT, "-o", tmp_path / "a.png", "--seed", "1", *flags)
    assert "DoneError" in result.stderr
    with load(folder) as k:
        options = inspect.signature(generate.command).parameters
        settings = dict.fromkeys(options) | {name: str(pictures[name]) for name in inputs}
        assert generate.defaults(k.manifest, settings) == expected
        given: dict[str, Any] = {name: Image.open(pictures[name]) for name in inputs}
        with pytest.raises(DoneError):
            k(PROMPT, seed=1, **given)
    ours, theirs = plans
    assert np.array_equal(ours.timesteps, theirs.timesteps)
    assert (ours.scale, ours.strength) == (theirs.scale, theirs.strength)
    assert priors[:1] == priors[1:]


@pytest.mark.parametrize("family", ["bundle_2_1", "bundle_3"])
def test_picture_of_another_family_says_how_it_was_made(
    request: pytest.FixtureRequest, tmp_path: Path, pictures: dict[str, Path], family: str
) -> None:
    folder, steps = request.getfixturevalue(family), ("--steps", "4")
    size = ("--height", "64", "--width", "64", "--seed", "7")
    result = run(folder, PROMPT, "-o", tmp_path / "a.png", *size, *steps, "--image", pictures["image"], "--json")
    assert result.exit_code == 0, result.stderr
    timings = json.loads(result.stdout)["timings"]
    stages = [name.removesuffix("_seconds") for name in timings if name.endswith("_seconds")]
    of_prior = {"prior_steps": "25", "prior_guidance_scale": "4.0"} if family == "bundle_2_1" else {}
    assert stages == ([] if family == "bundle_3" else ["prior"]) + ["decoder", "movq"]
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        facts = dict(image.text)  # type: ignore[attr-defined]
    assert facts == of_prior | {
        "prompt": PROMPT, "seed": "7", "steps": "4", "guidance_scale": "4.0" if of_prior else "3.0", "strength": "0.3",
        "scheduler": "ddim" if of_prior else "ddpm", "size": "64x64", "bundle": folder.name, "backend": "onnxruntime",
        "precision": "fp32", "kandrt": version("kandrt"),
    }  # fmt: skip
    # and what it says repeats it
    names = ("guidance_scale", "strength", "scheduler", *of_prior)
    flags = [text for name in names for text in (f"--{name.replace('_', '-')}", facts[name])]
    again = run(folder, PROMPT, "-o", tmp_path / "b.png", *size, *steps, "--image", pictures["image"], *flags)
    assert again.exit_code == 0, again.stderr
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "b.png")))


def test_json_is_all_of_stdout_and_repeats_the_picture(bundle: Path, tmp_path: Path) -> None:
    first = run(bundle, PROMPT, "-o", tmp_path / "a.webp", *SMALL, "--json")
    found = json.loads(first.stdout)
    assert found["files"] == [str(tmp_path / "a.webp")]
    assert (found["width"], found["height"]) == (128, 64)
    timings = found["timings"]
    assert timings["seconds"] == pytest.approx(
        timings["prior_seconds"] + timings["decoder_seconds"] + timings["movq_seconds"], abs=0.01
    )  # the stages follow one another; each is rounded to a millisecond
    second = run(bundle, PROMPT, "-o", tmp_path / "b.webp", *SMALL, "--json", "--seed", found["seed"])
    assert json.loads(second.stdout)["seed"] == found["seed"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.webp")), np.asarray(Image.open(tmp_path / "b.webp")))


def test_cut_prompt_is_one_line_on_stderr(bundle: Path, tmp_path: Path) -> None:
    result = run(bundle, "many words " * 60, "-o", tmp_path / "a.png", *SMALL, "--json")
    assert result.exit_code == 0
    json.loads(result.stdout)
    assert re.fullmatch(r"warning: the prompt is longer than 77 tokens[^\n]*\n", result.stderr)


def test_defaults_are_those_of_the_python_surface() -> None:
    surface, opening = (inspect.signature(function).parameters for function in (Kandinsky.__call__, load))
    options = inspect.signature(generate.command).parameters
    shared = [name for name in options if name in surface or name in opening]
    assert len(shared) == 21
    several = {"backend", "device"}  # options that may be repeated: without one they are None
    assert [generate.by_component(name, None, opening[name].default) for name in sorted(several)] == [
        "onnxruntime",
        None,
    ]
    for name in set(shared) - several:
        assert options[name].default == (surface.get(name) or opening[name]).default, name


def test_suffixes_are_those_that_can_be_written() -> None:
    assert tuple(_WRITABLE) == generate.SUFFIXES


def test_prompt_left_out_is_wrong_usage(bundle: Path, tmp_path: Path) -> None:
    result = run(bundle, "-o", tmp_path / "a.png")
    assert result.exit_code == 2
    assert "a prompt is needed too" in " ".join(result.stderr.replace("│", "").split())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("a.gif", "the suffix must be one of .png"),
        ("a", "the suffix must be one of .png"),
        ("none/a.png", "does not exist"),
        ("file/a.png", "is not a folder"),
        ("folder.png", "is a folder"),
    ],
)
def test_output_is_checked_before_anything_is_opened(tmp_path: Path, output: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    result = run(tmp_path / "no-such-bundle", PROMPT, "-o", tmp_path / output)
    assert result.exit_code == 1
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
    assert message in result.stderr


def test_folder_that_refuses_files_is_found_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Not by permissions, which do not bind the superuser that tests may run as.
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "touch", refuse)
    result = run(tmp_path / "no-such-bundle", PROMPT, "-o", tmp_path / "a.png")
    assert result.exit_code == 1
    assert "cannot be written to: Permission denied" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scheduler", "euler"), "scheduler: expected one of ddpm, ddim, dpmpp-2m"),
        (("--steps", "0"), "steps"),
        (("--strength", "0.5"), "strength: only with image"),
        (("--image", "missing.png"), "no such file"),
        (("--mask", "missing.png"), "mask: inpainting needs image"),
        (("--backend", "abacus"), "backend: expected 'onnxruntime'"),
        (("--device", "tpu"), "expected 'cpu' or 'cuda'"),
        (("--backend", "unet=openvino"), "backend: the bundle has no component unet; it has text_encoder"),
        (("--option", "openvino.NUM_STREAMS=1"), "no component runs on backend 'openvino'"),
        (("--precision", "fp16"), "only in fp32, found precision 'fp16'; export it with --precision fp16"),
        (("--threads", "0"), "threads: expected a whole number of 1 or more"),
        (("--seed", "-1"), "seed: expected an int"),
        (("--count", "0"), "count: expected a whole number"),
    ],
)
def test_what_cannot_be_used_is_one_line(bundle: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run(bundle, PROMPT, "-o", tmp_path / "a.png", *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bundle_2_1", ("--hint", "hint"), "Kandinsky 2.1 has no ControlNet; Kandinsky 2.2"),
        ("bundle_3", ("--hint", "hint"), "Kandinsky 3 has no ControlNet; Kandinsky 2.2"),
        ("bundle_3", ("--image", "image", "--mask", "mask"), "Kandinsky 3 has no inpainting; Kandinsky 2.1"),
        ("bundle_3", ("--prior-steps", "5"), "--prior-steps: Kandinsky 3 has no prior; leave it out"),
        (
            "bundle_3",
            ("--prior-steps", "5", "--prior-guidance-scale", "1"),
            "--prior-steps and --prior-guidance-scale:",
        ),
        ("bundle_3", ("--scheduler", "unclip"), "scheduler: expected one of ddpm, ddim, dpmpp-2m"),
    ],
)
def test_what_a_family_does_not_do_is_one_line(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    pictures: dict[str, Path],
    family: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    flags = [str(pictures.get(word, word)) for word in options]
    result = run(request.getfixturevalue(family), PROMPT, "-o", tmp_path / "a.png", *flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
    assert message in result.stderr
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("family", ["bundle_2_1", "bundle_3"])
def test_prompt_left_out_is_wrong_usage_with_every_family(
    request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    result = run(request.getfixturevalue(family), "-o", tmp_path / "a.png")
    assert result.exit_code == 2
    assert "a prompt is needed too" in " ".join(result.stderr.replace("│", "").split())


def test_full_disk_leaves_no_picture(monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path: Path) -> None:
    def full(_: Image.Image, file: io.BufferedWriter, *__: Any, **___: Any) -> None:
        file.write(b"half a picture")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    result = run(bundle, PROMPT, "-o", tmp_path / "a.png", *SMALL)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_bars_name_the_stages_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    from rich.console import Console

    monkeypatch.setattr(clock, "stderr", lambda: Console(stderr=True, force_terminal=True, width=100))
    generate.command([str(bundle), PROMPT], tmp_path / "a.png", height=64, width=64, steps=3, prior_steps=2)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert re.search(r"prior .* 2/2", shown)
    assert re.search(r"decoder .* 3/3 .* steps/s", shown)
    assert "picture" in shown


# What runs where


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, "default"),
        (["openvino"], "openvino"),
        (["movq_decoder=openvino"], {"movq_decoder": "openvino"}),
        (["openvino", "movq_decoder=auto"], {"*": "openvino", "movq_decoder": "auto"}),
    ],
)
def test_names_by_component(values: list[str] | None, expected: Any) -> None:
    assert generate.by_component("--backend", values, "default") == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, {}),
        (["NUM_STREAMS=1", "A=b=c"], {"NUM_STREAMS": "1", "A": "b=c"}),
        (
            ["openvino.NUM_STREAMS=1", "onnxruntime.a.b="],
            {"openvino": {"NUM_STREAMS": "1"}, "onnxruntime": {"a.b": ""}},
        ),
        (["session.intra_op.allow_spinning=0"], {"session.intra_op.allow_spinning": "0"}),
    ],
)
def test_options_by_backend(values: list[str] | None, expected: Any) -> None:
    assert generate.engine_options(values) == expected


@pytest.mark.parametrize(
    "flags",
    [
        ("--backend", "openvino", "--backend", "auto"),
        ("--backend", "movq_decoder=openvino", "--backend", "movq_decoder=auto"),
        ("--device", "movq_decoder="),
        ("--device", "=cpu"),
        ("--option", "NUM_STREAMS"),
        ("--option", "=1"),
        ("--option", "openvino=1"),
        ("--option", "openvino.=1"),
    ],
)
def test_what_is_no_assignment_is_wrong_usage(bundle: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    result = run(bundle, PROMPT, "-o", tmp_path / "a.png", *flags)
    assert result.exit_code == 2
    assert f"Invalid value for {flags[-2]}" in " ".join(result.stderr.replace("│", "").split())


def test_auto_says_on_one_line_what_it_chose(bundle: Path, tmp_path: Path) -> None:
    plain, auto = (
        run(bundle, PROMPT, "-o", tmp_path / f"{name}.png", *SMALL, "--seed", "1", "--backend", name)
        for name in ("onnxruntime", "auto")
    )
    assert (plain.exit_code, plain.stderr) == (0, "")
    assert re.fullmatch(r"auto: all components on \w+[^\n]*\n", auto.stderr)
    with Image.open(tmp_path / "auto.png") as image:
        image.load()
        assert image.text["backend"] in auto.stderr  # type: ignore[attr-defined]


def test_a_component_on_another_backend_is_in_the_metadata(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    flags = ("--backend", "movq_decoder=openvino", "--option", "openvino.NUM_STREAMS=1", "--device", "cpu")
    result = run(bundle, PROMPT, "-o", tmp_path / "a.png", *SMALL, *flags)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert image.text["backend"] == "onnxruntime; openvino: movq_decoder"  # type: ignore[attr-defined]
