"""`kandrt generate`: a prompt to pictures."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..engines.errors import InputError, OutputError
from .clock import STAGES, Clock, clock
from .console import Json, log, print_json, stderr, stdout, warn, warnings_in_line
from .inspect import schedulers

if TYPE_CHECKING:
    from ..engines.auto import Choice
    from ..engines.manifest import Manifest, Role
    from ..runtime import Result

USAGE = "[BUNDLE] PROMPT -o PICTURE"
EXAMPLE = 'kandrt generate my-bundle "a robot, 4k photo" -o robot.png --steps 50 --seed 43'

# Those that runtime.images.save_image writes.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

# Stands for the components that an option does not name; as in engines.auto.
OTHERS = "*"


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
    steps: Annotated[
        int | None,
        typer.Option(help="Steps of the decoder; by default 100, or 25 with Kandinsky 3.", show_default=False),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="How closely to follow the prompt; 1 is no guidance; by default 4, or 3 with Kandinsky 3.",
            show_default=False,
        ),
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="START END",
            help="Guide only from START to END, shares of the steps from 0 to 1; the other steps cost half.",
            show_default=False,
        ),
    ] = None,
    reuse_interval: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Run the whole decoder at every Nth step alone, its outermost level between; by default at each. The "
            "bundle must be of `kandrt export --feature-reuse`.",
            show_default=False,
        ),
    ] = 1,
    prior_steps: Annotated[
        int | None,
        typer.Option(help="Steps of the prior, which Kandinsky 3 does not have; by default 25.", show_default=False),
    ] = None,
    prior_guidance_scale: Annotated[
        float | None, typer.Option(help="As --guidance-scale, for the prior; by default 4.", show_default=False)
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddpm, ddim or dpmpp-2m; by default the checkpoint's own.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Repeats a picture; by default a random one.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What runs the networks: onnxruntime (the default), another that kandrt doctor lists, or auto for the "
            "best here. COMPONENT=NAME is for one component; may be repeated.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Where: cpu or cuda, say; by default the backend's own. COMPONENT=NAME is for one component.",
            show_default=False,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For the engine library, by its own name; BACKEND.KEY=VALUE for one of several; may be repeated.",
            show_default=False,
        ),
    ] = None,
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

    The mode follows from what is given: a prompt alone, --image (image-to-image), --image and --mask (inpainting;
    Kandinsky 2.1 and 2.2), or --hint (ControlNet; 2.2). A picture keeps its prompt, seed and settings as metadata.
    """
    bundle, prompt = split_words(words)
    check_output(output)
    if bundle is None:
        check_prompt(prompt)
    settings: dict[str, Any] = {
        "negative_prompt": negative_prompt, "image": image, "mask": mask, "hint": hint, "strength": strength,
        "height": height, "width": width, "steps": steps, "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval, "reuse_interval": reuse_interval, "prior_steps": prior_steps,
        "prior_guidance_scale": prior_guidance_scale, "count": count, "scheduler": scheduler, "seed": seed,
    }  # fmt: skip
    engines: dict[str, Any] = {
        "backend": by_component("--backend", backend, "onnxruntime"), "device": by_component("--device", device, None),
        "options": engine_options(option),
    }  # fmt: skip
    log.debug("%s: %r with %s, %s", bundle, prompt, settings, engines)
    from ..runtime import load
    from ..runtime.families import family_of

    with warnings_in_line(), clock() as measured:
        with load(bundle, **engines, precision=precision, memory=memory, threads=threads) as k:
            tell(k.choices)
            settings |= defaults(k.manifest, settings)
            measured.begin("prior" if "prior" in family_of(k.manifest).checkpoints else "decoder")
            result = k(prompt, **settings, callback=measured.step)
            manifest, engine = k.manifest, {"backend": backends(k.choices), "precision": k.precision}
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


def defaults(manifest: Manifest, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of the settings was not given and has a default with this bundle: a picture's metadata names it too.

    InputError for settings of a prior with a family that has none.
    """
    from ..runtime.families import family_of
    from ..runtime.plan import DEFAULT_STRENGTH
    from ..runtime.prior import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS

    family = family_of(manifest)
    found: dict[str, Any] = {"steps": family.steps, "guidance_scale": family.guidance_scale}
    if settings["image"] is not None and settings["mask"] is None:
        found["strength"] = DEFAULT_STRENGTH
    if "prior" in family.checkpoints:
        found |= {"prior_steps": DEFAULT_STEPS, "prior_guidance_scale": DEFAULT_GUIDANCE_SCALE}
    else:
        given = [name for name in ("prior_steps", "prior_guidance_scale") if settings[name] is not None]
        if given:
            options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(f"{options}: {family.title} has no prior; leave it out")
    return {name: value for name, value in found.items() if settings[name] is None}


def by_component(option: str, values: list[str] | None, default: str | None) -> str | dict[str, str] | None:
    """What `load` takes: a name, or names by component where any value is COMPONENT=NAME.

    A usage error for two names for the same.
    """
    found: dict[str, str] = {}
    for value in values or ():
        component, equals, name = value.rpartition("=")
        component = component if equals else OTHERS
        if component in found or not component or not name:
            expected = f"expected a name once, and others as COMPONENT=NAME, found {value!r}"
            raise typer.BadParameter(f"{expected} after {found}" if found else expected, param_hint=option)
        found[component] = name
    if not found:
        return default
    return found[OTHERS] if list(found) == [OTHERS] else found


def engine_options(values: list[str] | None) -> dict[str, Any]:
    """Options as `load` takes them: by name, or by backend and name; a usage error for what is not KEY=VALUE."""
    from ..engines.backends import BACKENDS

    found: dict[str, Any] = {}
    for value in values or ():
        key, equals, text = value.partition("=")
        backend, dot, name = key.partition(".")
        if not equals or not key or (dot and not name):
            raise typer.BadParameter(f"expected KEY=VALUE, found {value!r}", param_hint="--option")
        if key in BACKENDS:
            raise typer.BadParameter(f"expected {key}.KEY=VALUE, found {value!r}", param_hint="--option")
        if dot and backend in BACKENDS:  # other keys have dots too
            found.setdefault(backend, {})[name] = text
        else:
            found[key] = text
    return found


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


def tell(choices: Mapping[str, Choice]) -> None:
    """Say on one line what backend "auto" chose and why, where it was asked."""
    from ..engines.auto import summary

    chosen = {name: choice for name, choice in choices.items() if choice.automatic}
    if chosen:
        stderr().print(f"auto: {summary(chosen)}", markup=False, soft_wrap=True)


def backends(choices: Mapping[str, Choice]) -> str:
    """The backend that runs all components, or most and after it the others with theirs."""
    found: dict[str, list[str]] = {}
    for choice in choices.values():
        found.setdefault(choice.backend, []).append(choice.component)
    first, *rest = sorted(found, key=lambda name: -len(found[name]))
    return "; ".join([first, *(f"{name}: {', '.join(found[name])}" for name in rest)])


def metadata(
    bundle: Path | None, manifest: Manifest, prompt: str, settings: Mapping[str, Any], result: Result
) -> dict[str, str]:
    """What repeats a picture, as text; of files only the bundle's own name, because a path tells of its owner."""
    from importlib.metadata import version

    role: Role = "inpaint" if settings["mask"] else "controlnet" if settings["hint"] else "decoder"
    height, width = result.array.shape[1:3]
    names = (
        "negative_prompt", "steps", "guidance_scale", "guidance_interval", "prior_steps", "prior_guidance_scale",
        "strength",
    )  # fmt: skip
    facts = {"prompt": prompt} | {name: str(settings[name]) for name in names if settings[name] is not None}
    facts |= {"reuse_interval": str(settings["reuse_interval"])} if settings["reuse_interval"] > 1 else {}
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
