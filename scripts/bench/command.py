"""`kandrt bench`: how fast this runtime is, and what one would use instead, on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...engines.errors import InputError, MissingExtraError, OutputError
from ..console import Json, pieces, print_json, stdout, warn

if TYPE_CHECKING:
    from ...engines.manifest import Manifest
    from .measure import Plan
    from .results import Report

USAGE = "[BUNDLE] | compare A.json B.json"
EXAMPLE = (
    "kandrt bench my-bundle --against diffusers,diffusers-bf16 --output bench\n\nkandrt bench compare old.json new.json"
)
COMPARE = "compare"
OWN_NAME = "kandrt"
SUFFIXES = (".json", ".html")
DEFAULT_RIVAL, IN_INT8 = "diffusers", ("kandrt-int8", "kandrt-openvino-int8")
ROUNDS, BUDGET, SMALL_BUDGET = 5, 45.0, 2.0  # minutes
SMALL = 10**8  # parameters of a bundle's largest network
PICTURES = 60  # a setting, of trade-offs
OWN_EXTRAS = ("openvino",)  # packages that an extra of the same name installs


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BUNDLE]",
            help="Folder that `kandrt export` made; the embedded miniature if left out. Or: compare A.json B.json.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,NAME", help="Contenders, all or none.", show_default="diffusers, if installed"),
    ] = None,
    baseline: Annotated[
        str, typer.Option(metavar="NAME", help="The contender that the others are set beside.")
    ] = "kandrt",
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[@SIZE][*BATCH]",
            help="What to measure, such as step@768; may be repeated.",
            show_default="prior, step, MoVQ, picture, start",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of each contender that count.", show_default="5, or what the budget allows"),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            help="For all; each case gets a round even so.",
            show_default="45, of small networks 2; none with --rounds",
        ),
    ] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="Runs before them.")] = 1,
    size: Annotated[
        str | None, typer.Option(metavar="SIDE|HEIGHTxWIDTH", help="Pixels.", show_default="the checkpoint's own")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures at once.", show_default="1")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the decoder.", show_default="the family's")] = None,
    prior_steps: Annotated[int | None, typer.Option(min=1, help="Of the prior.", show_default="25")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every contender.", show_default="all cores")] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER",
            help="Of diffusers' layout, or a folder of such; may be repeated.",
            show_default="those that the bundle was made from",
        ),
    ] = None,
    quantized: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The bundle in int8, by `kandrt quantize`.", show_default=False),
    ] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="The interpreter that runs a contender.", show_default="this one"),
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keeps onnx-plain's graphs for later runs.", show_default=False),
    ] = None,
    memory: Annotated[bool, typer.Option("--memory", help="A table of memory by kind.")] = False,
    tradeoffs: Annotated[
        bool, typer.Option("--tradeoffs", help="Of the miniature, quality against time of ways to do less; minutes.")
    ] = False,
    reuse: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The miniature with feature reuse, for --tradeoffs.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Report: .json, .html, or a name for both.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Measure how fast pictures are made here, beside what one would use instead.

    Every contender runs in a process of its own, in turn with kandrt, and their results are compared before their
    times are. What cannot run here is named with the reason.

    Of two reports, `compare` shows what changed, and whether that is more than noise.
    """
    found = list(words or [])
    if found[:1] == [COMPARE]:
        given = [
            against, case, size, batch, steps, prior_steps, threads, checkpoint, python, output, rounds, budget,
            quantized, scratch, reuse,
        ]  # fmt: skip
        show_comparison(found[1:], json, unused=any(each is not None for each in given))
        return
    if len(found) > 1:
        raise InputError(f"expected one BUNDLE, or: compare A.json B.json; found {' '.join(found)!r}")
    targets = output_files(output)
    plan = make_plan(
        found, against, {"cases": tuple(case or ()), "size": size_of(size), "checkpoints": tuple(checkpoint or ())},
        rounds=rounds, budget=budget, warm_up=warm_up, batch=batch, steps=steps, prior_steps=prior_steps,
        threads=threads, pythons=pythons_of(python or []), baseline=baseline, quantized=quantized,
        scratch=folder_of(scratch), tradeoffs=PICTURES if tradeoffs else 0, reuse_bundle=reuse,
    )  # fmt: skip
    from .measure import interrupted

    report = run(plan)
    finish(report, targets, json=json, memory=memory)
    if interrupted(report.skipped):
        raise KeyboardInterrupt


# Measuring


def make_plan(words: Sequence[str], against: list[str] | None, chosen: dict[str, Any], **settings: Any) -> Plan:
    """What the options ask for; InputError for what is not known, before anything is measured."""
    from ...engines.bundle import open_bundle
    from ...runtime.miniature import MINIATURE
    from .contenders import CONTENDERS
    from .contenders import chosen as contenders_of
    from .measure import Plan, prepare

    bundle = Path(words[0]) if words else MINIATURE
    names, pythons, baseline = split(against), settings["pythons"], settings["baseline"]
    contenders_of(names or (), baseline)
    unknown = sorted(pythons.keys() - CONTENDERS.keys())
    if unknown:
        raise InputError(f"--python: expected a contender of {', '.join(CONTENDERS)}, found {', '.join(unknown)}")
    if settings["tradeoffs"] and words:
        raise InputError("--tradeoffs: pictures are judged of the miniature alone; leave BUNDLE out")
    asked = [*(names or ()), *([baseline] if baseline != OWN_NAME else [])]
    check_installed([name for name in asked if name not in pythons and name != "all"])
    if names is None:
        names = default_contenders(baseline, pythons, in_int8=settings["quantized"] is not None)
    manifest = open_bundle(bundle).manifest
    settings |= pace(settings["rounds"], settings["budget"], manifest)
    command = shlex.join(["kandrt", *sys.argv[1:]])
    plan = Plan(bundle=bundle, contenders=tuple(names), command=command, **chosen, **settings)
    for each in prepare(plan).skipped:
        warn(f"not measured: {each.contender}: {each.why}")
    return plan


def default_contenders(baseline: str, pythons: dict[str, str], *, in_int8: bool) -> list[str]:
    """What is measured where nothing is named: diffusers where it is installed, and the bundle in int8 where given."""
    from .contenders import CONTENDERS

    wanted = [*([] if baseline == OWN_NAME else [OWN_NAME]), DEFAULT_RIVAL, *(IN_INT8 if in_int8 else ())]
    here = [name for name in wanted if name in pythons or not lacking(CONTENDERS[name].needs)]
    return [name for name in here if name != baseline]


def pace(rounds: int | None, budget: float | None, manifest: Manifest) -> dict[str, Any]:
    """Rounds and budget of a plan: the default budget is for the default rounds."""
    if budget is None and rounds is None:
        largest = max((component.parameters for component in manifest.components.values()), default=0)
        budget = SMALL_BUDGET if largest < SMALL else BUDGET
    return {"rounds": ROUNDS if rounds is None else rounds, "budget": budget}


def folder_of(path: Path | None) -> Path | None:
    """A folder to write to, made where it is not there; OutputError where it cannot be."""
    if path is not None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write to {path}: {error.strerror or error}") from error
    return path


def split(against: list[str] | None) -> list[str] | None:
    """Names of contenders, None where nothing was asked for."""
    if against is None:
        return None
    names = [name.strip() for each in against for name in each.split(",")]
    return [name for name in names if name and name != "none"]


def check_installed(names: Sequence[str]) -> None:
    """Raise MissingExtraError where a contender was asked for whose packages are not here."""
    from .contenders import CONTENDERS

    for name in names:
        for package in lacking(CONTENDERS[name].needs):
            extra = package if package in OWN_EXTRAS else "bench"
            raise MissingExtraError(f"--against {name}", package, extra)


def lacking(packages: Sequence[str]) -> list[str]:
    """Those that are not installed."""
    return [name for name in packages if find_spec(name) is None]


def size_of(text: str | None) -> tuple[int, int] | None:
    """Height and width of "768" or "512x768"; InputError for anything else."""
    if text is None:
        return None
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise InputError(f"--size: expected a side such as 768, or HEIGHTxWIDTH, found {text!r}")
    return int(parts[0]), int(parts[-1])


def pythons_of(options: Sequence[str]) -> dict[str, str]:
    """Interpreters by contender; InputError for one that is not there."""
    found = {}
    for option in options:
        name, separator, path = option.partition("=")
        if not separator or not name:
            raise InputError(f"--python: expected NAME=PATH, found {option!r}")
        if not Path(path).expanduser().is_file():
            raise InputError(f"--python {name}: {path} is not a file; give the interpreter of an environment")
        found[name] = str(Path(path).expanduser())
    return found


def run(plan: Plan) -> Report:
    """Measure, with a line that says what runs."""
    from .measure import measure

    with pieces() as report:
        return measure(plan, report)


# Output


def output_files(output: Path | None) -> list[Path]:
    """The files to write: one with a suffix that is known, else both kinds; OutputError where they cannot be."""
    if output is None:
        return []
    if not output.parent.is_dir():
        raise OutputError(f"cannot write {output}: the folder {output.parent} does not exist; make it first")
    files = [output] if output.suffix in SUFFIXES else [output.with_name(output.name + each) for each in SUFFIXES]
    folders = [file for file in files if file.is_dir()]
    if folders or output.name in ("", "..") or (output.suffix not in SUFFIXES and output.is_dir()):
        raise OutputError(f"cannot write {output}: it is a folder; give a file's name, such as {output / 'bench'}")
    if any(file.suffix == ".html" for file in files) and find_spec("matplotlib") is None:
        warn(f"{MissingExtraError('plots in the report', 'matplotlib', 'bench')}")
    return files


def finish(report: Report, targets: Sequence[Path], *, json: bool, memory: bool = False) -> None:
    """Write the files, then show what was found."""
    from .report import show
    from .report_html import save_html
    from .results import save

    if json:
        print_json(report)
    else:
        show(report, stdout(), memory=memory)
    for path in targets:  # last, so that a full disk does not take away what was measured
        (save_html if path.suffix == ".html" else save)(report, path)
        if not json:
            stdout().print(str(path), markup=False, soft_wrap=True)


def show_comparison(files: Sequence[str], json: bool, *, unused: bool) -> None:
    """`kandrt bench compare A.json B.json`."""
    from .compare import compare, show
    from .results import load

    if len(files) != 2:
        raise InputError(f"compare: expected two reports, before and after, found {len(files)}")
    if unused:
        raise InputError("compare: expected no option but --json; what was measured stands in the reports")
    found = compare(*(load(Path(file)) for file in files))
    if json:
        print_json(found)
        return
    for each in found.warnings:
        warn(f"not the same: {each}")
    show(found, stdout())
