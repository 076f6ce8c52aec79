"""Building the engines of a bundle: what is to be done, and doing it, a process for each plan."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from . import errors
from .bundle import Bundle
from .errors import BackendError, InputError, KandrtError, MissingExtraError, OutputError
from .manifest import Manifest
from .memory import WEIGHT_BYTES
from .plan_worker import Event, PlanJob
from .plans import RECORD_VERSION, Builder, PlanKey, PlanRecord, PlanSettings, differences, plan_key
from .profiles import Coverage, check_coverage, component_profiles, default_size
from .request import contexts
from .store import CACHES, EngineStore, command_line, command_options, plan_record_file
from .trt import PACKAGES, capability, library, library_version, resolve_gpu

# Resident memory of a build over the size of its weights: measured with TensorRT-RTX 1.7 on full-size networks.
PEAK_OF_WEIGHTS, PEAK_BASE = 3.2, 400_000_000  # bytes
KILLED = -9
STDERR_TAIL = 2000  # characters

# Told the share that is done, 0 to 1, and what the library is doing.
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Task:
    """A plan that is wanted: its key, and the record of the plan that is there already, if it is.

    estimated_bytes is about the plan's size, estimated_peak about the memory that building it takes. changed says in
    which parts of the key the most similar plan of the component is another; empty where there is none at all. options
    are those of `kandrt build` that ask for it, GPUs and component apart.
    """

    key: PlanKey
    existing: PlanRecord | None
    estimated_bytes: int
    estimated_peak: int
    changed: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def plan_work(
    bundle: Bundle,
    builder: Builder,
    *,
    gpus: Sequence[str] = (),
    coverage: Sequence[Coverage] = (),
    settings: PlanSettings | None = None,
    components: Sequence[str] = (),
) -> list[Task]:
    """The plans that make up engines of a bundle, with those that are there already; builds nothing.

    gpus: names as `resolve_gpu` takes them, empty for the GPU present. coverage: a profile for each, empty for the
    usual one. components: all where empty.

    Raises InputError for an unknown GPU, component, one in 8 bits, or a size that the graphs cannot take; BackendError
    where the builder cannot be used.
    """
    if builder not in PACKAGES:
        raise InputError(f"--backend: expected {' or '.join(PACKAGES)}, found {builder}")
    manifest, settings = bundle.manifest, settings or PlanSettings()
    components = list(dict.fromkeys(components))
    unknown = [name for name in components if name not in manifest.components]
    if unknown:
        raise InputError(
            f"{bundle.folder} has no component {', '.join(unknown)}; it has {', '.join(manifest.components)}"
        )
    chosen = components or list(manifest.components)
    check_not_quantized(bundle, chosen)
    wanted = list(coverage) or [Coverage(default_size(manifest))]
    check_coverage(manifest, wanted)
    if library_version(builder) == "none":
        raise MissingExtraError(f"backend {builder!r}", PACKAGES[builder].packages[0], builder)
    capabilities = target_gpus(builder, gpus, settings)
    bundle.check_hashes(manifest.components[name].graph for name in chosen)
    store, tasks = EngineStore(bundle), []
    records, _ = store.records()
    for name in chosen:
        key = plan_key(
            bundle,
            name,
            builder=builder,
            library=library_version(builder),
            compute_capabilities=capabilities,
            profiles=component_profiles(manifest, name, wanted),
            settings=settings,
        )
        size = manifest.components[name].parameters * weight_bytes(manifest, name)
        others = (each.key for each in records if (each.key.component, each.key.builder) == (name, builder))
        changed = min((differences(other, key) for other in others), key=len, default=[])
        peak = int(size * PEAK_OF_WEIGHTS) + PEAK_BASE
        tasks.append(Task(key, store.find(key), size, peak, tuple(changed), command_options(coverage, settings)))
    return tasks


def check_not_quantized(bundle: Bundle, components: Sequence[str]) -> None:
    """Raise InputError where one of `components` computes in 8 bits.

    Their activations have zero points, as CPUs take them; TensorRT 11 takes none.
    """
    quantized = [name for name in components if bundle.manifest.components[name].quantization is not None]
    if quantized:
        raise InputError(
            f"{bundle.folder}: {' and '.join(quantized)} compute in 8 bits as CPUs do, which TensorRT does not; build "
            "engines of the bundle that this one was made from, or of other components with --component"
        )


def weight_bytes(manifest: Manifest, component: str) -> int:
    """Bytes of most of a component's weights, each: decoders' contexts are in fp32 in any bundle."""
    if component in {record.context for record in manifest.decoders.values()}:
        return WEIGHT_BYTES["fp32"]
    return WEIGHT_BYTES[manifest.components[component].precision]


def target_gpus(builder: Builder, gpus: Sequence[str], settings: PlanSettings) -> tuple[str, ...]:
    """The compute capabilities to build for."""
    named = tuple(resolve_gpu(builder, name) for name in gpus)
    if "STRIP_PLAN" in settings.flags or not named:
        try:
            present = capability(builder)
        except BackendError as error:
            advice = "--strip needs a GPU" if named else "name the GPUs to build for with --gpu"
            raise BackendError(f"{advice if PACKAGES[builder].architectures else builder}: {error}") from error
        named = named or (resolve_gpu(builder, present) if PACKAGES[builder].architectures else present,)
    return named


def build_plan(bundle: Bundle, task: Task, progress: Progress, timing_cache: Path | None = None) -> PlanRecord:
    """Build one plan into the bundle's store; where another process has just built it, give that one.

    Raises BackendError where the builder fails, BundleError for damaged files, OutputError where the store cannot be
    written to or the disk has too little room. Whatever ends it, nothing half-built is left that could be opened.
    """
    key, store = task.key, EngineStore(bundle)
    library(key.builder)  # what keeps it from being loaded is better said here than by another process
    progress(0.0, "waiting for another build")
    with store.building(key) as temporary:
        existing = store.find(key)
        if existing is not None:
            return existing
        if store.free_bytes() < task.estimated_bytes:
            raise OutputError(
                f"{key.component}: its plan takes about {task.estimated_bytes / 1e9:.1f} GB, {store.folder} has "
                f"{store.free_bytes() / 1e9:.1f} GB left; free some, or remove old engines with: "
                f"{command_line('kandrt', 'engines', 'prune', str(bundle.folder))}"
            )
        progress(0.0, "checking files")
        bundle.check_hashes(bundle.manifest.component_files(key.component))
        event = run_worker(job(bundle, key, temporary, cache_file(store, key, timing_cache)), task, progress)
        if event.figures is None:
            raise BackendError(f"{key.component}: the build ended without a result")
        record = PlanRecord(
            RECORD_VERSION, key, plan_record_file(key, temporary), event.figures, event.log, task.options
        )
        store.add(record, temporary)
    return record


def cache_file(store: EngineStore, key: PlanKey, chosen: Path | None) -> Path | None:
    """Where tactics' timings are kept; those of an RTX plan are found on the GPU that runs it, so it has none.

    Raises InputError for a place that no file can be at: better now than when the plan is built.
    """
    if chosen is not None and (chosen.is_dir() or not chosen.absolute().parent.is_dir()):
        raise InputError(f"--timing-cache {chosen}: expected a file, new or old, in a folder that exists")
    if chosen is not None or PACKAGES[key.builder].architectures:
        return chosen
    folder = store.folder / CACHES
    folder.mkdir(exist_ok=True)
    return folder / f"timing-{key.builder}-{key.library}-{'-'.join(key.compute_capabilities)}.cache"


def job(bundle: Bundle, key: PlanKey, output: Path, timing_cache: Path | None) -> PlanJob:
    """What a worker is told."""
    component = bundle.manifest.components[key.component]
    ahead = bool(PACKAGES[key.builder].architectures)
    return PlanJob(
        component=key.component,
        builder=key.builder,
        graph=str(bundle.path(component.graph)),
        inputs=component.inputs,
        profiles=key.profiles,
        compute_capabilities=key.compute_capabilities if ahead else (),
        settings=key.settings,
        precision=None if key.component in contexts(bundle.manifest) else component.precision,
        output=str(output),
        timing_cache=None if timing_cache is None else str(timing_cache),
    )


def run_worker(work: PlanJob, task: Task, progress: Progress) -> Event:
    """Run a job in a process of its own; gives its last event. However this ends, so has the process.

    Its stdin stays open as long as this process lives: a worker that reads its end is alone, and ends too.
    """
    try:
        told = msgspec.json.encode(work) + b"\n"
    except UnicodeEncodeError as error:
        raise InputError(
            f"{work.component}: {work.builder} opens no path that is not UTF-8, found {work.graph!r}; rename the folder"
        ) from error
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(  # noqa: S603  # this interpreter, with a module of this package
            [sys.executable, "-m", f"{__package__}.plan_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # modules are not looked for in the current folder
            start_new_session=True,  # Ctrl-C is for this process, which then ends the other
        )
        try:
            last = follow(process, told, progress)
            code = process.wait()
        finally:
            end(process)
        if last.figures is not None and code == 0:
            return last
        if last.error is not None:
            raise kind_of(last.error_type)(last.error)
        raise BackendError(died(work, task, code, complaints))


def follow(process: subprocess.Popen[bytes], work: bytes, progress: Progress) -> Event:
    """Give a worker its job and pass its progress on until it ends; gives its last event that is whole."""
    last = Event()
    if process.stdin is None or process.stdout is None:
        raise BackendError("the process that builds has no pipes")
    try:
        process.stdin.write(work)
        process.stdin.flush()
    except OSError:
        return last  # it died at once; its exit code says more
    for line in process.stdout:
        try:
            last = msgspec.json.decode(line, type=Event)
        except msgspec.DecodeError:  # it was killed in the middle of a line
            continue
        if last.figures is None and last.error is None:
            progress(last.progress, last.phase)
    return last


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that has not ended yet, and let go of its pipes."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what it was to be told, and nobody reads any more
                pipe.close()


def kind_of(name: str) -> type[KandrtError]:
    """The class of an error that a worker reported, if it can be made of a message alone."""
    kind = getattr(errors, name, None)
    if not isinstance(kind, type) or not issubclass(kind, KandrtError) or kind is MissingExtraError:
        return BackendError
    return kind


def died(work: PlanJob, task: Task, code: int, complaints: IO[bytes]) -> str:
    """Why a worker ended without a word."""
    if code == KILLED:
        return (
            f"{work.component}: the system killed the build, most likely for want of memory: it takes about "
            f"{task.estimated_peak / 1e9:.1f} GB, this machine has {available_memory()}; close other programs, "
            f"or build on a machine with more"
        )
    complaints.seek(0)
    text = " ".join(complaints.read().decode(errors="replace").split())[-STDERR_TAIL:]
    return f"{work.component}: the build ended with exit code {code}: {text or 'no message'}"


def available_memory() -> str:
    """What the machine has free, for people."""
    try:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return "an unknown amount"
    return f"{free / 1e9:.1f} GB free"
