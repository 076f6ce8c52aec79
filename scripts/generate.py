"""`kandrt generate`: a prompt to pictures."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..engines.errors import OutputError
from .console import Json, log, print_json, stderr, stdout, warn, warnings_in_line
from .inspect import schedulers

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..engines.manifest import Manifest, Role
    from ..runtime import Result

USAGE = "[BUNDLE] PROMPT -o PICTURE"
EXAMPLE = 'kandrt generate my-bundle "a robot, 4k photo" -o robot.png --steps 50 --seed 43'

# Those that runtime.images.save_image writes.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

# Stages in order, as the progress bars name them; the last has no steps.
STAGES = {"prior": "prior", "decoder": "decoder", "movq": "picture"}


@dataclass
class Stage:
    """When a stage began and ended, in seconds of `time.monotonic`, and how its steps went."""

    began: float
    first_step: float = 0.0
    last: float = 0.0
    steps: int = 0

    @property
    def rate(self) -> float | None:
        """Steps a second, the first apart: it is the one that opens the networks."""
        if self.steps < 2 or self.last <= self.first_step:
            return None
        return (self.steps - 1) / (self.last - self.first_step)

    @property
    def rate_text(self) -> str:
        """The rate for people, "" where there is none."""
        return "" if self.rate is None else f"{self.rate:.{0 if self.rate >= 100 else 2}f} steps/s"


@dataclass
class Clock:
    """Measures the stages of one request from its callbacks, and shows them where a display is given."""

    progress: Progress | None = None
    stages: dict[str, Stage] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)

    def begin(self, name: str) -> None:
        """A stage begins, and with it the one before is over."""
        self.stages[name] = Stage(time.monotonic())
        if self.progress is not None:
            self.tasks[name] = self.progress.add_task(STAGES[name], total=None, steps="", rate="")

    def step(self, name: str, done: int, total: int, _: Any) -> None:
        """A step is done; `runtime.sampling.Callback`."""
        stage, now = self.stages[name], time.monotonic()
        stage.first_step, stage.last, stage.steps = stage.first_step or now, now, done
        if self.progress is not None:
            self.progress.update(
                self.tasks[name], completed=done, total=total, steps=f"{done}/{total}", rate=stage.rate_text
            )
        if done == total:
            names = list(STAGES)
            self.begin(names[names.index(name) + 1])

    def end(self) -> None:
        """The last stage is over."""
        name, stage = list(self.stages.items())[-1]
        stage.last = time.monotonic()
        if self.progress is not None:
            self.progress.update(self.tasks[name], completed=1, total=1)

    def timings(self) -> dict[str, float | None]:
        """Seconds a stage and in all, opening the networks included, and steps a second."""
        stages = self.stages.items()
        seconds = {f"{name}_seconds": round(stage.last - stage.began, 3) for name, stage in stages}
        rates = {f"{name}_steps_per_second": stage.rate for name, stage in stages if stage.steps}
        began = min(stage.began for _, stage in stages)
        return {**seconds, **rates, "seconds": round(max(stage.last for _, stage in stages) - began, 3)}


def command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[BUNDLE] PROMPT",
            help="A folder that `kandrt export` made, or none for the miniature built in; and what to paint.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PICTURE",
            help="Picture to write: .png, .jpg or .webp; of several, the stem is numbered.",
            show_default=False,
        ),
    ],
    negative_prompt: Annotated[str | None, typer.Option(help="What not to paint.", show_default=False)] = None,
    image: Annotated[
        Path | None, typer.Option(help="Picture to start from, or to repaint with --mask.", show_default=False)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How far to go from --image, above 0 up to 1; by default 0.3.", show_default=False),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="White is repainted, black is kept; needs --image.", show_default=False)
    ] = None,
    hint: Annotated[Path | None, typer.Option(help="ControlNet's hint, a depth map.", show_default=False)] = None,
    height: Annotated[
        int | None,
        typer.Option(
            help="In pixels; by default that of --hint or --image, else the checkpoint's.", show_default=False
        ),
    ] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, as --height.", show_default=False)] = None,
    steps: Annotated[int, typer.Option(help="Steps of the decoder.")] = 100,
    guidance_scale: Annotated[float, typer.Option(help="How closely to follow the prompt; 1 is no guidance.")] = 4.0,
    prior_steps: Annotated[int, typer.Option(help="Steps of the prior.")] = 25,
    prior_guidance_scale: Annotated[float, typer.Option(help="As --guidance-scale, for the prior.")] = 4.0,
    scheduler: Annotated[
        str | None, typer.Option(help="ddpm, ddim or dpmpp-2m; by default the checkpoint's own.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Repeats a picture; by default a random one.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    backend: Annotated[str, typer.Option(help="What runs the graphs: onnxruntime or openvino.")] = "onnxruntime",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option(
            help="What to compute in; by default what the bundle was exported in. openvino has bf16 for fp32 bundles.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        Literal["keep", "stage"], typer.Option(help="stage closes each network when its stage is over.")
    ] = "keep",
    threads: Annotated[int | None, typer.Option(help="Of the CPU; by default all.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Make pictures of a prompt.

    The mode follows from what is given: a prompt alone, --image (image-to-image), --image and --mask (inpainting), or
    --hint (ControlNet). A picture keeps its prompt, seed and settings as metadata.
    """
    bundle, prompt = split_words(words)
    check_output(output)
    if bundle is None:
        check_prompt(prompt)
    settings: dict[str, Any] = {
        "negative_prompt": negative_prompt, "image": image, "mask": mask, "hint": hint, "strength": strength,
        "height": height, "width": width, "steps": steps, "guidance_scale": guidance_scale, "prior_steps": prior_steps,
        "prior_guidance_scale": prior_guidance_scale, "count": count, "scheduler": scheduler, "seed": seed,
    }  # fmt: skip
    log.debug("%s: %r with %s", bundle, prompt, settings)
    from ..runtime import load

    with warnings_in_line(), clock() as measured:
        measured.begin("prior")
        with load(bundle, backend=backend, device=device, precision=precision, memory=memory, threads=threads) as k:
            result = k(prompt, **settings, callback=measured.step)
            manifest, engine = k.manifest, {"backend": backend, "precision": k.precision}
            log.debug("opened %s", ", ".join(k.opened))
        measured.end()
    facts = metadata(bundle, manifest, prompt, settings, result) | engine
    files = save(result, output, facts)
    if json:
        height, width = result.array.shape[1:3]
        print_json(
            {"files": files, "seed": result.seed, "width": width, "height": height, "timings": measured.timings()}
        )
    else:
        show(files, result, measured)


def split_words(words: list[str]) -> tuple[Path | None, str]:
    """Bundle, None for the miniature, and prompt; a usage error for anything but one or two words."""
    if len(words) > 2:
        raise typer.BadParameter(
            f"expected a bundle and a prompt, found {len(words)} arguments; put the prompt in quotes",
            param_hint="[BUNDLE] PROMPT",
        )
    if len(words) == 2:
        return Path(words[0]), words[1]
    if os.path.isfile(os.path.join(words[0], "manifest.json")):  # noqa: PTH113, PTH118  # a prompt may be no path
        raise typer.BadParameter(f"{words[0]} is a bundle; a prompt is needed too", param_hint="PROMPT")
    return None, words[0]


def check_prompt(prompt: str) -> None:
    """Warn where the miniature was never told of what a prompt asks."""
    from .miniature.captions import parse

    if parse(prompt) is None:
        warn(
            "no bundle was named, so the miniature paints, which knows coloured shapes alone, such as "
            '"a small red star on a striped blue background"; for another model: kandrt generate BUNDLE PROMPT'
        )


def check_output(output: Path) -> None:
    """Raise OutputError where a picture cannot be written to `output`, before it takes minutes to make one."""
    if output.suffix.lower() not in SUFFIXES:
        raise OutputError(f"{output}: the suffix must be one of {', '.join(SUFFIXES)}, found {output.suffix!r}")
    if output.is_dir():
        raise OutputError(f"{output} is a folder; expected the name of a picture")
    if not output.parent.is_dir():
        what = "is not a folder" if output.parent.exists() else "does not exist"
        raise OutputError(f"{output}: the folder {output.parent} {what}; make it, or choose another")
    probe = output.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"{output}: the folder {output.parent} cannot be written to: {error.strerror or error}"
        ) from error


@contextmanager
def clock() -> Iterator[Clock]:
    """A clock with a bar for each stage on a terminal, without elsewhere."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if not stderr().is_terminal:
        yield Clock()
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"), TextColumn("{task.description:8}"), BarColumn(),
        TextColumn("{task.fields[steps]:>7} {task.fields[rate]:>14}"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr(), transient=True) as progress:
        yield Clock(progress)


def metadata(
    bundle: Path | None, manifest: Manifest, prompt: str, settings: Mapping[str, Any], result: Result
) -> dict[str, str]:
    """What repeats a picture, as text; of files only the bundle's own name, because a path tells of its owner."""
    from importlib.metadata import version

    role: Role = "inpaint" if settings["mask"] else "controlnet" if settings["hint"] else "decoder"
    height, width = result.array.shape[1:3]
    names = ("negative_prompt", "steps", "guidance_scale", "prior_steps", "prior_guidance_scale", "strength")
    facts = {"prompt": prompt} | {name: str(settings[name]) for name in names if settings[name] is not None}
    return facts | {
        "seed": str(result.seed),
        "scheduler": settings["scheduler"] or schedulers(manifest, manifest.decoders[role].scheduler)[0],
        "size": f"{width}x{height}",
        "bundle": "miniature" if bundle is None else bundle.resolve().name,
        "kandrt": version("kandrt"),
    }


def save(result: Result, output: Path, facts: Mapping[str, str]) -> list[str]:
    """Write the pictures and give their names; of several, each says which of how many it is."""
    from ..runtime.images import save_image

    if len(result.images) == 1:
        save_image(result.images[0], output, facts)
        return [str(output)]
    files = [output.with_stem(f"{output.stem}-{i}") for i in range(len(result.images))]
    for i, (image, file) in enumerate(zip(result.images, files, strict=True)):
        save_image(image, file, {**facts, "picture": f"{i} of {len(files)}"})
    return [str(file) for file in files]


def show(files: list[str], result: Result, measured: Clock) -> None:
    """Print file names, seed and times."""
    out = stdout()
    height, width = result.array.shape[1:3]
    for file in files:
        out.print(file, style="bold", markup=False, soft_wrap=True)
    parts = []
    for name, stage in measured.stages.items():
        rate = f" ({stage.rate_text})" if stage.rate_text else ""
        parts.append(f"{STAGES[name]} {stage.last - stage.began:.1f} s{rate}")
    out.print(f"{width} x {height} pixels, seed {result.seed}, {', '.join(parts)}", soft_wrap=True)
