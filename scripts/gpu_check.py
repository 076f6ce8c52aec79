"""`python -m kandrt.scripts.gpu_check`: everything that only a GPU can show, in one report. See scripts/gpu-check."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from ..engines.bundle import open_bundle
from ..engines.cuda import cupy_device
from ..engines.errors import BackendError, InputError
from ..engines.files import atomic_write
from ..runtime import load
from ..runtime.miniature import MINIATURE
from .console import FAILED, guarded, print_json, stderr, stdout
from .reference import paints_prompts

BUILDERS = ("tensorrt", "tensorrt-rtx")
BACKENDS = (*BUILDERS, "onnxruntime")
PROMPT = "a large red circle on a blue background"
TAIL = 40  # lines of a program's output that the report keeps
KANDRT = (sys.executable, "-m", "kandrt.scripts.cli")
REPOSITORY = Path(__file__).parents[1]
WORK = REPOSITORY / "gpu-check"  # bundles of the miniature with their engines


@dataclass(frozen=True)
class Part:
    """A thing that was done: its command line, what came of it, and the end of what it said.

    found is what the program printed as JSON, where it does. skipped says why it does not count.
    """

    name: str
    command: str
    passed: bool
    seconds: float
    tail: str
    found: Any = None
    skipped: str | None = None


@dataclass
class Report:
    """The whole check; gpu is what nvidia-smi says of it."""

    gpu: str
    date: str
    parts: list[Part] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Did nothing fail."""
        return all(part.passed or part.skipped for part in self.parts)


@dataclass(frozen=True)
class Measured:
    """What painting took: seconds to load and paint the first picture, then seconds a picture, and bytes of the GPU."""

    bundle: str
    backend: str
    side: int
    steps: int
    cuda_graph: str
    first: float
    picture: float
    step: float
    memory: int


def command(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[BUNDLE ...]", help="Checked beside the miniature; engines are built into them."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.md")] = Path("gpu-report.md"),
    steps: Annotated[int, typer.Option(min=2, help="Of the pictures that are timed.")] = 25,
    measure: Annotated[str | None, typer.Option(hidden=True, help="Time one backend on one bundle.")] = None,
    side: Annotated[int, typer.Option(hidden=True)] = 0,
    cuda_graph: Annotated[str, typer.Option(hidden=True)] = "auto",
) -> None:
    """Build engines, run the GPU's tests, measure accuracy, memory and speed; write FILE.md and FILE.json.

    Example: ./scripts/gpu-check my-bundle
    """
    if measure is not None:
        print_json(asdict(painted((bundles or [MINIATURE])[0], measure, side, steps, cuda_graph)))
        return
    gpu = name_of_gpu()
    if output.suffix != ".md":
        raise InputError(f"--output: expected a name that ends in .md, found {output}")
    report = Report(gpu, time.strftime("%Y-%m-%d %H:%M:%S"))
    for step in [
        *checks_once(),
        *(each for bundle in wanted(bundles or [], report) for each in checks_of(bundle, steps)),
    ]:
        stderr().print(step.name, soft_wrap=True)
        report.parts.append(step.run())
        write(report, output)  # after each part: a machine that is lost on the way leaves what it found
    stdout().print(f"{output}: {'passed' if report.passed else 'FAILED'}", soft_wrap=True)
    if not report.passed:
        raise typer.Exit(FAILED)


def name_of_gpu() -> str:
    """What nvidia-smi says; BackendError where there is no GPU."""
    asked = "--query-gpu=name,driver_version,memory.total,compute_cap"
    try:
        done = subprocess.run(  # noqa: S603
            ["nvidia-smi", asked, "--format=csv,noheader"],  # noqa: S607  # wherever the driver put it
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        raise BackendError(f"no GPU: nvidia-smi cannot be run: {error}") from error
    if not done.stdout.strip():
        raise BackendError("no GPU: nvidia-smi lists none; check the driver")
    return done.stdout.strip()


@dataclass(frozen=True)
class Check:
    """A program to run. only: without this device of a backend it is skipped, its reason named."""

    name: str
    command: Sequence[str]
    as_json: bool = False
    only: str | None = None

    def run(self) -> Part:
        """Run it to its end."""
        shown = " ".join(self.command).replace(sys.executable, "python")
        why = None if self.only is None else unusable_here(self.only)
        if why is not None:
            return Part(self.name, shown, False, 0.0, "", skipped=why)
        started = time.monotonic()
        done = subprocess.run(self.command, capture_output=True, text=True, cwd=REPOSITORY, check=False)  # noqa: S603
        said = done.stderr if self.as_json else done.stdout + done.stderr
        found = None
        if self.as_json:
            try:
                found = json.loads(done.stdout)
            except ValueError:
                said = done.stdout + said
        passed = done.returncode == 0 and (found is not None or not self.as_json)
        tail = "\n".join(said.splitlines()[-TAIL:])
        return Part(self.name, shown, passed, time.monotonic() - started, tail, found)


def unusable_here(backend: str) -> str | None:
    """Why a backend cannot use this GPU, or None."""
    from ..engines.backends import unusable

    return unusable(backend, "cuda")


def checks_once() -> list[Check]:
    """What does not depend on a bundle."""
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "tests/test_gpu.py"]
    return [Check("doctor", [*KANDRT, "doctor", "--json"], as_json=True), Check("tests", pytest)]


def checks_of(bundle: Path, steps: int) -> list[Check]:
    """Engines of any and of fixed sizes, their accuracy, and what painting with them takes."""
    manifest = open_bundle(bundle).manifest
    side = max((record.default_size for record in manifest.decoders.values()), default=0)
    path, checks = str(bundle.resolve()), []
    for builder in BUILDERS:
        build = [*KANDRT, "build", path, "--backend", builder, "--json"]
        fixed = [*build, "--size", str(side), "--batch", "1", "--static"]
        checks += [
            Check(f"{bundle.name}: build {builder}", build, as_json=True, only=builder),
            Check(f"{bundle.name}: build {builder} --static", fixed, as_json=True, only=builder),
        ]
    for backend in BACKENDS:
        verify = [*KANDRT, "verify", path, "--engines", "--backend", backend, "--device", "cuda", "--json"]
        checks.append(Check(f"{bundle.name}: verify {backend}", verify, as_json=True, only=backend))
        if not paints_prompts(manifest):
            continue
        for graph in ("true", "false"):
            measure = [sys.executable, "-m", "kandrt.scripts.gpu_check", path, "--measure", backend,
                       "--side", str(side), "--steps", str(steps), "--cuda-graph", graph]  # fmt: skip
            name = f"{bundle.name}: speed of {backend}, cuda_graph={graph}"
            checks.append(Check(name, measure, as_json=True, only=backend))
    return checks


def wanted(bundles: Sequence[Path], report: Report) -> list[Path]:
    """The miniature in fp32 and in fp16, in folders that engines may be built into, and the bundles given."""
    for bundle in bundles:
        open_bundle(bundle)  # an error in the first second rather than after an hour
    mini, half, checkpoints = WORK / "miniature", WORK / "miniature-fp16", WORK / "checkpoints"
    WORK.mkdir(exist_ok=True)
    if not mini.exists():
        shutil.copytree(MINIATURE, mini)
    if not half.exists():
        if checkpoints.exists():
            shutil.rmtree(checkpoints)
        writing = [sys.executable, "-m", "kandrt.scripts.miniature_checkpoints", "-o", str(checkpoints.resolve())]
        report.parts.append(Check("checkpoints of the miniature", writing).run())
        folders = sorted(str(path.resolve()) for path in checkpoints.glob("*"))
        export = [*KANDRT, "export", *folders, "-o", str(half.resolve()), "--precision", "fp16"]
        report.parts.append(Check("export of the miniature in fp16", export).run())
    return [mini, *([half] if half.exists() else []), *bundles]


def painted(bundle: Path, backend: str, side: int, steps: int, cuda_graph: str) -> Measured:
    """Paint three times with one bundle, and time it; raises what `load` and painting do."""
    device = cupy_device()
    free = device.memory()[0]
    options = {} if cuda_graph == "auto" else {"cuda_graph": cuda_graph}
    moments: list[float] = []
    request: dict[str, Any] = {"height": side, "width": side, "seed": 1, "steps": steps}
    started = time.monotonic()
    with load(bundle, backend=backend, device="cuda", options=options) as k:
        k(PROMPT, **request)
        first = time.monotonic() - started
        for _ in range(3):
            started = time.monotonic()
            k(PROMPT, **request)
            moments.append(time.monotonic() - started)
        # the difference of two numbers of steps: prior, decoding and waiting for the last step cancel out
        started = time.monotonic()
        k(PROMPT, **{**request, "steps": 2 * steps})
        longer = time.monotonic() - started
        memory = free - device.memory()[0]
    picture = sorted(moments)[1]
    return Measured(
        bundle.name, backend, side, steps, cuda_graph, first, picture, (longer - picture) / steps, memory
    )  # fmt: skip


# The report


def write(report: Report, output: Path) -> None:
    """Both files; OutputError where they cannot be written."""
    facts = {
        "gpu": report.gpu,
        "date": report.date,
        "passed": report.passed,
        "parts": [asdict(p) for p in report.parts],
    }
    for path, text in ((output.with_suffix(".json"), json.dumps(facts, indent=1)), (output, as_markdown(report))):
        with atomic_write(path) as file:
            file.write(text.encode() + b"\n")


def as_markdown(report: Report) -> str:
    """The report for people: a line a part, then speed and memory, then what failed says."""
    lines = [f"# GPU check: {'passed' if report.passed else 'FAILED'}", "", f"{report.gpu} · {report.date}", ""]
    lines += ["| part | result | seconds |", "|---|---|---|"]
    for part in report.parts:
        result = f"skipped: {' '.join(part.skipped.split())}" if part.skipped else "passed" if part.passed else "FAILED"
        lines.append(f"| {part.name} | {result} | {part.seconds:.1f} |")
    times = [Measured(**part.found) for part in report.parts if part.passed and " speed of " in part.name]
    if times:
        lines += ["", "| bundle | backend | side | CUDA graphs | first picture | picture | decoder step | GPU memory |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {each.bundle} | {each.backend} | {each.side} | {each.cuda_graph} | {each.first:.1f} s "
        f"| {each.picture:.3f} s | {each.step * 1e3:.2f} ms | {each.memory / 1e9:.2f} GB |"
        for each in times
    ]
    for part in report.parts:
        if part.name == "tests" or not (part.passed or part.skipped):
            lines += ["", f"## {part.name}", "", f"`{part.command}`", "", "```", part.tail, "```"]
    return "\n".join(lines)


app = typer.Typer(add_completion=False)
app.command()(guarded(command))

if __name__ == "__main__":
    app()
