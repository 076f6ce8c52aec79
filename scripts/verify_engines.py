"""`kandrt verify --engines`: every engine against the graphs in fp32, a component at a time and in whole requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..engines.errors import BackendError, InputError
from .console import pieces, stdout, table
from .engine_checks import LEVELS, Check, EngineRow, Kind, Runner, builder_of
from .engine_reference import Size, engine_request_names, reference_answers
from .reference import Row, Skipped
from .verify import check_hashes, number

if TYPE_CHECKING:
    from rich.table import Table

    from ..engines.bundle import Bundle
    from ..engines.manifest import Manifest, Precision
    from ..engines.plans import Builder, PlanRecord
    from ..engines.profiles import Profile


@dataclass
class EngineFindings:
    """Everything that `kandrt verify --engines` found."""

    rows: list[Row | EngineRow] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Did nothing fail."""
        return all(row.passed for row in self.rows)


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; None stands for everything that can run here, or the usual."""

    backend: str | None
    device: str | None
    precision: Precision | None
    size: int | None
    options: Mapping[str, str] = field(default_factory=dict)


def verify_engines(bundle: Bundle, wanted: Wanted) -> EngineFindings:
    """Check files, then every engine; damaged files end it, because all else would only repeat that.

    Raises InputError for a size that the bundle cannot paint, BackendError where what was asked for by name cannot run
    here, or nothing can.
    """
    found = EngineFindings()
    runners = find_runners(bundle, wanted, found.skipped)
    sizes = [picture_size(bundle, runner, wanted.size) for runner in runners]
    found.rows.append(check_hashes(bundle))
    if not found.passed:
        found.skipped.append(Skipped("engines", "files are damaged"))
        return found
    with pieces() as report:
        for size in dict.fromkeys(sizes):
            answers = reference_answers(bundle, size, report)
            for name, problem in answers.problems.items():
                kind: Kind = "request" if name in engine_request_names(bundle.manifest) else "component"
                found.rows.append(EngineRow(kind, "reference", name, passed=False, detail=problem))
            for runner, own in zip(runners, sizes, strict=True):
                if own == size:
                    check = Check(bundle, runner, answers, report, named=wanted.backend is not None)
                    found.rows += check.run(size, found.skipped)
    return found


# What is verified


def options_of(given: list[str] | None, backend: str | None) -> dict[str, str]:
    """Options for one backend's library; InputError where no backend was named, or another."""
    from .generate import engine_options

    found = engine_options(given)
    own = found.pop(backend, {}) if backend else {}
    others = [name for name, value in found.items() if not isinstance(value, str)]
    if (given and backend is None) or others:
        raise InputError(f"--option: name the backend that it is for with --backend, found {', '.join(given or [])}")
    return {**found, **own}


def find_runners(bundle: Bundle, wanted: Wanted, skipped: list[Skipped]) -> list[Runner]:
    """What was asked for by name, or else all that can run here; what cannot is added to `skipped`."""
    from ..engines.backends import BACKENDS, check_backend, unusable

    exported = bundle.manifest.precision
    precision = wanted.precision or exported
    if wanted.backend is not None:
        known = BACKENDS.get(wanted.backend)
        device = wanted.device or (next(iter(known.devices)) if known else "cpu")
        check_backend(wanted.backend, device, exported, wanted.precision)
        BACKENDS[wanted.backend].implementation.probe(wanted.backend, device)
        return [Runner(wanted.backend, device, precision, wanted.options)]
    places = [(name, device) for name, each in BACKENDS.items() for device in each.devices]
    runners = []
    for name, device in places:
        if device == (wanted.device or device):
            why = unusable(name, device, exported, wanted.precision) or no_engines(bundle, name)
            if why is None:
                runners.append(Runner(name, device, precision, wanted.options))
            else:
                skipped.append(Skipped(f"{name} on {device}", why))
    if not runners:
        reasons = "; ".join(f"{each.what}: {each.why}" for each in skipped)
        raise BackendError(
            f"nothing can run this bundle here in {precision}: {reasons or f'no device {wanted.device!r}'}"
        )
    return runners


def no_engines(bundle: Bundle, backend: str) -> str | None:
    """What to do for a backend that runs plans and has none in this bundle."""
    from ..engines.store import build_command

    builder = builder_of(backend)
    if builder is None or usable_records(bundle, builder):
        return None
    return f"{bundle.folder} has no {builder} engines; run: {build_command(bundle, builder)}"


def usable_records(bundle: Bundle, builder: Builder) -> list[PlanRecord]:
    """The plans of a builder that can be used with this bundle, library and GPU; of any, as far as there are none."""
    from ..engines.store import EngineStore
    from ..engines.trt import capability, library_version

    store, version, gpu = EngineStore(bundle), library_version(builder), None
    with suppress(BackendError):
        gpu = capability()
    return [
        record
        for record in store.records()[0]
        if record.key.builder == builder
        and not store.problems(record, version=record.key.library if version == "none" else version, capability=gpu)
    ]


def picture_size(bundle: Bundle, runner: Runner, side: int | None) -> Size:
    """The size of the pictures to ask for: twice as wide as high, or whatever engines were built for, or `side`.

    Raises InputError for a side that the decoders cannot paint, BackendError for plans without a size in common.
    """
    from ..engines.profiles import MAX_SIDE, size_multiple

    multiple = size_multiple(bundle.manifest)
    why = no_engines(bundle, runner.backend)
    if why is not None:
        raise BackendError(why)
    if side is not None:
        if side < 1 or side % multiple or side > MAX_SIDE:
            raise InputError(f"--size: expected a multiple of {multiple} up to {MAX_SIDE}, found {side}")
        return side, side
    builder = builder_of(runner.backend)
    if builder is not None:
        return built_size(bundle, builder)
    return (multiple, 2 * multiple) if bundle.manifest.decoders else (1, 1)


def built_size(bundle: Bundle, builder: Builder) -> Size:
    """The smallest size that the engines of every component take, wider than high where they take that too."""
    from ..engines.profiles import MAX_SIDE, latent_scale, size_multiple
    from ..engines.store import build_command

    scale, multiple = latent_scale(bundle.manifest), size_multiple(bundle.manifest)
    profiles: dict[str, list[Profile]] = {}
    for record in usable_records(bundle, builder):
        profiles.setdefault(record.key.component, []).extend(record.key.profiles)

    def fits(height: int, width: int) -> bool:
        axes = {
            "height": height // scale, "width": width // scale, "image_height": height, "image_width": width,
        }  # fmt: skip
        return all(any(each.holds(axes) for each in offered) for offered in profiles.values() if offered)

    for side in range(multiple, MAX_SIDE + 1, multiple):
        for width in (side + multiple, side):
            if fits(side, width):
                return side, width
    raise BackendError(
        f"{bundle.folder}: its {builder} engines take no size in common; run: {build_command(bundle, builder)}"
    )


# Output


def show(bundle: Bundle, found: EngineFindings) -> None:
    """Print the findings for people: a table for each engine."""
    out = stdout()
    for row in found.rows:
        if isinstance(row, Row):
            out.print(f"{row.kind}: {row.what}: {result(row)}")
    rows = [row for row in found.rows if isinstance(row, EngineRow)]
    for engine in dict.fromkeys(row.engine for row in rows):
        out.print()
        out.print(engine, style="bold", markup=False)
        out.print(engine_table([row for row in rows if row.engine == engine]))
    out.print()
    for line in dict.fromkeys(str(row.worst) for row in rows if row.worst is not None):
        out.print(line, style="red", markup=False, soft_wrap=True)
    for row in found.rows:
        if row.detail:
            out.print(f"{row.what}: {row.detail}", style="red", markup=False, soft_wrap=True)
    for skipped in found.skipped:
        out.print(f"not verified: {skipped.what}: {skipped.why}", style="yellow", markup=False, soft_wrap=True)
    out.print(summary(bundle.manifest, found), style="bold green" if found.passed else "bold red", markup=False)


def engine_table(rows: Sequence[EngineRow]) -> Table:
    """The rows of one engine; the largest errors of pictures are in 255ths."""
    made = table("", ">max error", ">relative", ">cosine", ">PSNR", ">bound", "result")
    for i, row in enumerate(rows):
        if i and row.kind != rows[i - 1].kind:
            made.add_section()
        picture = row.levels is not None
        made.add_row(
            row.what, number(row.max_abs) if row.levels is None else f"{row.levels:.2f}/{LEVELS}",
            number(row.relative), "" if row.cosine is None else f"{row.cosine:.6f}",
            "" if not picture else "equal" if row.psnr is None else f"{row.psnr:.1f} dB",
            row.bound.removeprefix("relative ").removeprefix("PSNR "), result(row),
        )  # fmt: skip
    return made


def result(row: Row | EngineRow) -> str:
    """Its result with markup."""
    return "[green]pass[/]" if row.passed else "[bold red]FAIL[/]"


def summary(manifest: Manifest, found: EngineFindings) -> str:
    """The last line."""
    failed = sum(not row.passed for row in found.rows)
    if failed:
        return f"{failed} of {len(found.rows)} checks failed"
    rows = [row for row in found.rows if isinstance(row, EngineRow)]
    engines = {row.engine: [each.kind for each in rows if each.engine == row.engine] for row in rows}
    total = len(manifest.components), len(engine_request_names(manifest))
    return "passed: files; " + "; ".join(
        f"{engine}: {kinds.count('component')} of {total[0]} components, "
        f"{kinds.count('request')} of {total[1]} requests"
        for engine, kinds in engines.items()
    )
