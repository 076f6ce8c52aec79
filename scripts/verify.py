"""`kandrt verify`: whether a bundle still is what was exported, and computes what its checkpoints compute."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..engines.errors import BackendError, BundleError, InputError, KandrtError
from .checkpoint_networks import Reference, find_references
from .console import FAILED, Json, pieces, print_json, size_text, stdout, table
from .doctor import need
from .engine_reference import OnHost
from .inspect import check_files, total_size
from .reference import Row, Skipped, check_reference, load_reference, make_reference, request_names, stored_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..engines.bundle import Bundle
    from ..engines.manifest import Component, Manifest
    from ..engines.session import Session
    from .verify_engines import EngineFindings

USAGE = "BUNDLE"
EXAMPLE = "kandrt verify my-bundle --checkpoint kandinsky-2-2-prior --checkpoint kandinsky-2-2-decoder"


@dataclass
class Findings:
    """Everything that `kandrt verify` found."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Did nothing fail."""
        return all(row.passed for row in self.rows)


@dataclass(frozen=True)
class Target:
    """A bundle, and what is to run it."""

    bundle: Bundle
    backend: str
    device: str

    @property
    def problem(self) -> str | None:
        """Why this backend cannot run this bundle; None where it can."""
        from ..engines.backends import check_backend

        try:
            check_backend(self.backend, self.device, self.bundle.manifest.precision)
        except BackendError as error:
            return str(error)
        return None


def command(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="Folder that `kandrt export` made.", show_default=False)
    ],
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or hub id to compare with; by default those the bundle was made from.", show_default=False
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the hub ids.", show_default=False)
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Weight files of --checkpoint to prefer.", show_default=False)
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="What runs the graphs.", show_default="onnxruntime; all with --engines")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where, such as cpu or cuda.", show_default="cpu")] = None,
    engines: Annotated[
        bool, typer.Option("--engines", help="Compare engines and providers with the graphs in fp32 instead.")
    ] = False,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option(help="With --engines: what to compute in, by default the bundle's.", show_default=False),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="With --engines: side of the pictures, by default the least.", show_default=False),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="With --engines: for the engine library.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Check a bundle: its files, its graphs, its pictures. Exit code 1 if anything fails.

    Files are compared with their hashes; each graph with its checkpoint's network under PyTorch, where that is
    installed; whole requests with the answers that PyTorch gave. What cannot be checked is named.

    With --engines, no checkpoint is needed: each component and whole requests under --backend, or under everything that
    can run here, are compared with the bundle's own graphs in fp32. Where one is too far off, the worst layer is named.
    """
    from ..engines.backends import check_backend
    from ..engines.bundle import open_bundle
    from . import verify_engines

    if engines:
        check_unused({"--checkpoint": checkpoint, "--revision": revision, "--variant": variant}, "with")
    else:
        check_unused({"--precision": precision, "--size": size, "--option": option}, "without")
    opened = open_bundle(bundle)
    found: Findings | EngineFindings
    if engines:
        wanted = verify_engines.Wanted(backend, device, precision, size, verify_engines.options_of(option, backend))
        found = verify_engines.verify_engines(opened, wanted)
    else:
        target = Target(opened, backend or "onnxruntime", device or "cpu")
        check_backend(target.backend, target.device, "fp32")
        if checkpoint:
            need("export", "--checkpoint")
        found = verify(target, checkpoint or [], revision, variant)
    if json:
        print_json({"bundle": str(bundle), "passed": found.passed, "rows": found.rows, "not_verified": found.skipped})
    elif isinstance(found, Findings):
        show(opened, found)
    else:
        verify_engines.show(opened, found)
    if not found.passed:
        raise typer.Exit(FAILED)


def check_unused(options: Mapping[str, object], how: str) -> None:
    """Raise InputError for options that were given and have no meaning with, or without, --engines."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InputError(f"{', '.join(given)}: of no use {how} --engines; leave it out")


def verify(target: Target, checkpoints: Sequence[str], revision: str | None, variant: str | None) -> Findings:
    """Check files, then graphs, then requests; damaged files end it, because all else would only repeat that."""
    found = Findings([check_hashes(target.bundle)])
    if not found.passed:
        found.skipped.append(Skipped("graphs and requests", "files are damaged"))
        return found
    with pieces() as report:
        references = find_references(target.bundle, checkpoints, (revision, variant), found.skipped)
        check_graphs(target, references, found, report)
        check_requests(target, references, found, report)
    return found


# Files


def check_hashes(bundle: Bundle) -> Row:
    """Every file against its hash."""
    what = f"{len(bundle.manifest.files())} files, {size_text(total_size(bundle.manifest))}"
    try:
        check_files(bundle)
    except BundleError as error:
        return Row("files", what, passed=False, tolerance="SHA-256", detail=str(error))
    return Row("files", what, passed=True, tolerance="SHA-256")


# Graphs


def check_graphs(
    target: Target, references: Mapping[str, Reference], found: Findings, report: Callable[[str], None]
) -> None:
    """Every graph against its network on random inputs."""
    names = list(target.bundle.manifest.components)
    without = [name for name in names if name not in references]
    if without and references:
        found.skipped.append(Skipped(", ".join(without), "no checkpoint of theirs was found"))
    for name in names:
        if name in references:
            report(f"checking {name}")
            found.rows.append(check_graph(target, name, references[name]))


def check_graph(target: Target, name: str, reference: Reference) -> Row:
    """One graph against its network."""
    from ..export.check import compare, random_inputs

    component = target.bundle.manifest.components[name]
    tolerance = graph_tolerance(component)
    if (component.inputs, component.outputs) != (reference.session.inputs, reference.session.outputs):
        specs = [", ".join(map(str, (*each.inputs, *each.outputs))) for each in (reference.session, component)]
        return Row("graph", name, passed=False, detail=f"the checkpoint's network has {specs[0]}, the graph {specs[1]}")
    try:
        inputs = random_inputs(component.inputs, reference.multiples)
        with graph_session(target, name) as session:
            error = compare(reference.session, session, inputs, tolerance)
    except KandrtError as problem:
        return Row("graph", name, passed=False, detail=str(problem))
    if not math.isfinite(error.relative):
        return Row("graph", name, passed=False, detail="its output holds NaN or infinity, or has another shape")
    return Row("graph", name, error.relative <= tolerance, f"relative {tolerance:.0e}", error.max_abs, error.relative)


def graph_tolerance(component: Component) -> float:
    """The relative error that a graph may have on random inputs.

    In 8 bits that depends on the network: three times what it had on requests, because random inputs leave the ranges
    that requests set; a weight that is wrong shows far above.
    """
    from ..export.check import TOLERANCES

    if component.quantization is None:
        return TOLERANCES[component.precision]
    return max(3 * component.quantization.error, TOLERANCES["bf16"])


@contextmanager
def graph_session(target: Target, name: str) -> Iterator[Session]:
    """A component opened; one whose precision the device has no kernels for computes in fp32 with its own weights."""
    from ..engines.backends import open_component
    from ..engines.ort import OrtSession
    from ..export.probes import widen

    bundle, component = target.bundle, target.bundle.manifest.components[name]
    with tempfile.TemporaryDirectory() as folder:
        if target.problem is None:
            session = open_component(bundle, name, backend=target.backend, device=target.device)
        else:
            widened = Path(folder, "graph.onnx")
            try:
                widen(bundle.path(component.graph), widened)
            except Exception as error:  # those of a damaged graph have no base class in common
                raise BackendError(f"{name}: the graph cannot be converted to fp32: {error}") from error
            session = OrtSession(name, widened, replace(component, precision="fp32"), "cpu")
        try:
            yield OnHost(session)
        finally:
            session.close()


# Requests


def check_requests(
    target: Target, references: Mapping[str, Reference], found: Findings, report: Callable[[str], None]
) -> None:
    """Whole requests against stored answers, or against PyTorch's where there are none and it can give them."""
    names = request_names(target.bundle.manifest)
    if target.problem is not None:
        found.skipped.append(Skipped(", ".join(names), target.problem))
        return
    expected, why = answers(target.bundle, references, report)
    without = [name for name in names if stored_name(name) not in expected]
    if without:
        found.skipped.append(Skipped(", ".join(without), why))
    if expected:
        found.rows += check_reference(
            target.bundle.folder, expected, backend=target.backend, device=target.device, report=report
        )


def answers(
    bundle: Bundle, references: Mapping[str, Reference], report: Callable[[str], None]
) -> tuple[Mapping[str, NDArray[np.float32]], str]:
    """What requests should give, by stored name, and why one may be absent."""
    record = bundle.manifest.reference
    if record is not None:
        stored = load_reference(bundle.path(record))
        return stored, f"the stored answers are to other requests, of kandrt {bundle.manifest.tools.get('kandrt')}"
    if not references.keys() >= bundle.manifest.components.keys():
        return {}, "the bundle holds no reference pictures, and not all of its checkpoints were found to make them"
    report("making reference pictures")
    return make_reference(bundle.folder, {name: reference.session for name, reference in references.items()}), ""


# Output


def show(bundle: Bundle, found: Findings) -> None:
    """Print the findings for people."""
    out = stdout()
    made = table("", "what", ">max error", ">relative", ">PSNR", ">bound", "result")
    kind = ""
    for row in found.rows:
        if kind and row.kind != kind:
            made.add_section()
        made.add_row(
            row.kind if row.kind != kind else "", row.what, number(row.max_abs), number(row.relative),
            "" if row.psnr is None else f"{row.psnr:.0f} dB", row.tolerance,
            "[green]pass[/]" if row.passed else "[bold red]FAIL[/]",
        )  # fmt: skip
        kind = row.kind
    out.print(made)
    out.print()
    for row in found.rows:
        if row.detail:
            out.print(f"{row.what}: {row.detail}", style="red", markup=False, soft_wrap=True)
    for skipped in found.skipped:
        out.print(f"not verified: {skipped.what}: {skipped.why}", style="yellow", markup=False, soft_wrap=True)
    out.print(summary(bundle.manifest, found), style="bold green" if found.passed else "bold red", markup=False)


def number(value: float | None) -> str:
    """An error as the table shows it."""
    return "" if value is None else f"{value:.1e}"


def summary(manifest: Manifest, found: Findings) -> str:
    """The last line."""
    failed = sum(not row.passed for row in found.rows)
    if failed:
        return f"{failed} of {len(found.rows)} checks failed"
    graphs = sum(row.kind == "graph" for row in found.rows)
    requests = sum(row.kind == "request" for row in found.rows)
    total = len(manifest.components), len(request_names(manifest))
    return f"passed: files, {graphs} of {total[0]} graphs, {requests} of {total[1]} requests"
