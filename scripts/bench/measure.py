"""The measurement: each contender beside the baseline, in turn, and what both give compared."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...engines.bundle import Bundle, open_bundle
from ...engines.errors import BackendError, InputError, KandrtError
from ...engines.manifest import Manifest, Precision
from ..reference import peak_signal_to_noise
from .case_costs import case_costs
from .cases import PROMPT, Case, Inputs, make_case, make_inputs, possible_cases
from .contenders import CONTENDERS, Contender, Part, Source, chosen, find_sources, unable, unable_in
from .installed import contender_size
from .machine import inspect_machine, usable_cores
from .results import BASELINE, SCHEMA, CaseRecord, Contestant, Equivalence, Measurement, Report, Skipped
from .session import Worker
from .worker import Job, Reply

Tell = Callable[[str], None]

# As scripts/reference.py: PSNR in dB of pictures in [0, 1], relative L2 error of other results; by whether one of the
# two computes in 16 bits.
LEAST_PSNR: Mapping[bool, float] = {False: 60.0, True: 25.0}
MOST_RELATIVE: Mapping[bool, float] = {False: 1e-3, True: 8e-2}
# Threads of libraries look for work a little longer after a run; the other contender's run is not to feel it.
SETTLE_SECONDS = 0.05


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    contenders: names of CONTENDERS, the baseline apart, which always runs. cases: names of CASES with their sizes, by
    default all that the bundle can. rounds: samples of each; warm_up: runs before them. size (height, width), batch,
    steps and prior_steps are of cases whose names do not say. checkpoints: folders in diffusers' layout, or folders of
    such, by default those that the bundle was made from. pythons: by a contender's name, the interpreter that runs it.
    threads: by default all that this process may use. timeout: seconds that opening or one run may take. memory: of
    kandrt, as `load` has it. scratch: a folder for graphs that onnx-plain exports, to be used again; by default one
    that goes away. peaks: whether to measure what the machine can do. command: as the user typed it.
    """

    bundle: Path
    contenders: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    rounds: int = 5
    warm_up: int = 1
    threads: int | None = None
    size: tuple[int, int] | None = None
    batch: int | None = None
    steps: int | None = None
    prior_steps: int | None = None
    checkpoints: tuple[str, ...] = ()
    pythons: Mapping[str, str] = field(default_factory=dict)
    prompt: str = PROMPT
    memory: str = "keep"
    scratch: Path | None = None
    peaks: bool = True
    timeout: float = 3600.0
    command: str = ""


@dataclass
class Runs:
    """What was seen of one process, or in a fresh case of all of one contender's."""

    opened: float | None = None
    first: float | None = None
    warm_up: list[float] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    stages: list[Mapping[str, float]] = field(default_factory=list)
    peak: int | None = None

    def note(self, reply: Reply, *, warm: bool) -> None:
        """A run."""
        self.first = reply.seconds if self.first is None else self.first
        (self.warm_up if warm else self.samples).append(reply.seconds)
        if not warm and reply.stages:
            self.stages.append(reply.stages)

    def note_peak(self, peak: int | None) -> None:
        """The most memory of a process."""
        self.peak = max((each for each in (self.peak, peak) if each is not None), default=None)

    def measurement(self, case: str, contender: str, **more: object) -> Measurement:
        """What is reported of it."""
        names = self.stages[0] if self.stages else {}
        stages = {name: float(np.median([each[name] for each in self.stages])) for name in names}
        made = Measurement(
            case, contender, self.samples, [], self.warm_up, self.opened, self.first, self.peak, stages
        )  # fmt: skip
        return replace(made, **more)  # type: ignore[arg-type]


class ContenderError(Exception):
    """A contender that cannot be measured; the message is its own, without its name."""

    def __init__(self, contender: str, error: Exception) -> None:
        super().__init__(str(error).removeprefix(f"{contender}: "))
        self.contender = contender


def measure(plan: Plan, report: Tell) -> Report:
    """Measure; `report` is told each piece of work as it starts. However it ends, all of its processes have ended.

    A contender that cannot run is listed as skipped. Raises InputError for what a plan asks that is not there,
    BundleError for a damaged bundle, BackendError where the baseline ran in no case.
    """
    check_plan(plan)
    started, start = datetime.now(timezone.utc), time.perf_counter()
    bundle = open_bundle(plan.bundle)
    manifest = bundle.manifest
    sizes = {"size": plan.size, "batch": plan.batch, "steps": plan.steps, "prior_steps": plan.prior_steps}
    names = dict.fromkeys(plan.cases or possible_cases(manifest))
    cases = [make_case(name, manifest, **sizes, prompt=plan.prompt) for name in names]  # type: ignore[arg-type]
    threads = usable_cores() if plan.threads is None else plan.threads
    sources = find_sources(manifest, plan.checkpoints)
    contenders, skipped = able(plan, manifest, sources)
    report("the machine: matrix products and convolutions" if plan.peaks else "the machine")
    machine = inspect_machine(threads, plan.peaks)
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="kandrt-bench-") as scratch:
        arena = Arena(plan, bundle, sources, threads, Path(scratch), report)
        for case in cases:
            found, lost = arena.measure_case(case, contenders)
            measurements += found
            skipped += lost
    if not measurements:
        raise BackendError("nothing was measured: " + "; ".join(f"{each.contender}: {each.why}" for each in skipped))
    measured = [
        each for each in (CONTENDERS[BASELINE], *contenders) if any(m.contender == each.name for m in measurements)
    ]
    return Report(
        schema=SCHEMA,
        kandrt=version("kandrt"),
        started=started.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - start,
        command=plan.command,
        bundle=str(plan.bundle),
        family=manifest.family,
        precision=manifest.precision,
        machine=machine,
        contenders=[contestant(each, each.name in plan.pythons) for each in measured],
        cases=[record(bundle, case) for case in cases if any(m.case == case.name for m in measurements)],
        measurements=measurements,
        skipped=skipped,
    )


def check_plan(plan: Plan) -> None:
    """Raise InputError for numbers that cannot be."""
    for name, least in (("rounds", 1), ("warm_up", 0), ("threads", 1)):
        value = getattr(plan, name)
        if value is not None and value < least:
            raise InputError(f"{name}: expected {least} or more, found {value}")
    chosen(plan.contenders)
    unknown = sorted(plan.pythons.keys() - CONTENDERS.keys())
    if unknown:
        raise InputError(f"python: expected a contender of {', '.join(CONTENDERS)}, found {', '.join(unknown)}")


def able(plan: Plan, manifest: Manifest, sources: Mapping[Part, Source]) -> tuple[list[Contender], list[Skipped]]:
    """The contenders that may run here, and why the others may not."""
    contenders = chosen(plan.contenders)
    why = {each.name: unable(each, manifest, sources, each.name in plan.pythons) for each in contenders}
    kept = [each for each in contenders if why[each.name] is None]
    return kept, [Skipped(name, reason) for name, reason in why.items() if reason is not None]


def contestant(contender: Contender, other_python: bool) -> Contestant:
    """A contender as it is reported; what another interpreter has installed is not known here."""
    size = None if other_python else contender_size(contender.worker, contender.settings)
    return Contestant(contender.name, contender.title, size)


def record(bundle: Bundle, case: Case) -> CaseRecord:
    """A case as it is reported."""
    steps = case.steps if case.runs_decoder and not case.opens else None
    prior_steps = case.prior_steps if case.runs_prior and not case.opens else None
    made = CaseRecord(case.name, case.boundary, case.height, case.width, case.batch, steps, prior_steps)
    costs = case_costs(bundle, case)
    if costs is None:
        return made
    flops = {name: float(each) for name, each in costs.by_operator.items()}
    moved = float(costs.weight_bytes + costs.activation_bytes)
    return replace(made, flops=float(costs.flops), bytes=moved, by_operator=flops)


class Arena:
    """Where a bundle's contenders meet: starts their processes, and lets them run in turn."""

    def __init__(
        self, plan: Plan, bundle: Bundle, sources: Mapping[Part, Source], threads: int, scratch: Path, report: Tell
    ) -> None:
        self._plan, self._bundle, self._sources, self._threads = plan, bundle, sources, threads
        self._scratch, self._report = scratch, report
        self._inputs = scratch / "inputs.npz"

    def measure_case(self, case: Case, contenders: list[Contender]) -> tuple[list[Measurement], list[Skipped]]:
        """The baseline's measurement and those of all contenders that could run, and those that could not."""
        manifest = self._bundle.manifest
        np.savez(self._inputs, allow_pickle=False, **make_inputs(case, manifest))
        skipped, able_ones = [], []
        for contender in contenders:
            why = unable_in(contender, case, manifest, self._sources)
            if why is None:
                able_ones.append(contender)
            else:
                skipped.append(Skipped(contender.name, why, case.name))
        try:
            found, lost = self._fresh(case, able_ones) if case.fresh else self._lasting(case, able_ones)
        except ContenderError as failed:  # the baseline: nothing to set the others beside
            return [], [*skipped, Skipped(BASELINE, str(failed), case.name)]
        return found, skipped + lost

    def _lasting(self, case: Case, contenders: list[Contender]) -> tuple[list[Measurement], list[Skipped]]:
        """A process for the baseline, and beside it one for each contender in turn."""
        base, found, lost = Runs(), list[Measurement](), list[Skipped]()
        with self._open(CONTENDERS[BASELINE], case, base) as baseline:
            self._warm_up(baseline, case, base)
            expected = self._result(baseline)
            for contender in contenders:
                own = Runs()
                try:
                    with self._open(contender, case, own) as worker:
                        self._warm_up(worker, case, own)
                        near = compare(expected, self._result(worker), self._precision(contender))
                        before = len(base.samples)
                        self._rounds(case, (baseline, base), (worker, own))
                        own.note_peak(worker.peak_memory)
                    beside = base.samples[before:]
                    found.append(own.measurement(case.name, contender.name, beside=beside, equivalence=near))
                except ContenderError as failed:
                    if failed.contender == BASELINE:
                        raise
                    lost.append(Skipped(contender.name, str(failed), case.name))
            if not base.samples:
                self._rounds(case, (baseline, base))
            base.note_peak(baseline.peak_memory)
        return [base.measurement(case.name, BASELINE), *found], lost

    def _fresh(self, case: Case, contenders: list[Contender]) -> tuple[list[Measurement], list[Skipped]]:
        """A process for each sample, of the baseline and of a contender in turn."""
        base, found, lost = Runs(), list[Measurement](), list[Skipped]()
        for contender in contenders:
            own, before, near = Runs(), len(base.samples), None
            try:
                for i in range(self._plan.warm_up + self._plan.rounds):
                    warm = i < self._plan.warm_up
                    expected = self._from_start(CONTENDERS[BASELINE], case, base, warm=warm, paired=len(base.samples))
                    result = self._from_start(contender, case, own, warm=warm, paired=len(base.samples))
                    if expected and near is None:
                        near = compare(expected, result, self._precision(contender))
                beside = base.samples[before:]
                found.append(own.measurement(case.name, contender.name, beside=beside, equivalence=near))
            except ContenderError as failed:
                if failed.contender == BASELINE:
                    raise
                lost.append(Skipped(contender.name, str(failed), case.name))
        if not base.samples:
            for i in range(self._plan.warm_up + self._plan.rounds):
                self._from_start(CONTENDERS[BASELINE], case, base, warm=i < self._plan.warm_up, paired=i)
        return [base.measurement(case.name, BASELINE), *found], lost

    def _from_start(self, contender: Contender, case: Case, runs: Runs, *, warm: bool, paired: int) -> Inputs:
        """One sample of a fresh case, and what it gave (nothing where it only opens)."""
        self._report(f"{case.name}: {contender.name}, {'warm-up' if warm else f'sample {paired + 1}'}")
        with self._start(contender) as worker, whose(contender.name):
            opened = worker.open(self._job(contender, case))
            reply = None if case.opens else worker.run()
            seconds = time.perf_counter() - worker.started
            (runs.warm_up if warm else runs.samples).append(seconds)
            runs.opened = opened.seconds if runs.opened is None else runs.opened
            if reply is not None and runs.first is None:
                runs.first = reply.seconds
            runs.note_peak(worker.peak_memory)
            return {} if case.opens else self._result(worker)

    def _rounds(self, case: Case, *sides: tuple[Worker, Runs]) -> None:
        """Runs in turn; a round in which one side fails counts for neither."""
        for i in range(self._plan.rounds):
            self._report(f"{case.name}: {' and '.join(worker.name for worker, _ in sides)}, round {i + 1}")
            replies = [self._run(worker) for worker, _ in sides]
            for (_, runs), reply in zip(sides, replies, strict=True):
                runs.note(reply, warm=False)

    def _run(self, worker: Worker) -> Reply:
        time.sleep(SETTLE_SECONDS)
        with whose(worker.name):
            return worker.run()

    def _warm_up(self, worker: Worker, case: Case, runs: Runs) -> None:
        """Runs that do not count: one at least, since results are compared before anything counts."""
        for _ in range(max(self._plan.warm_up, 1)):
            self._report(f"{case.name}: {worker.name}, warm-up")
            runs.note(self._run(worker), warm=True)

    def _result(self, worker: Worker) -> Inputs:
        """What the last run gave; ContenderError where it is not finite."""
        path = self._scratch / "result.npz"
        with whose(worker.name):
            worker.result(path)
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
            odd = [name for name, array in found.items() if not np.isfinite(array).all()]
            if odd:
                raise BackendError(f"{' and '.join(odd)}: its result holds NaN or infinity")
        return found

    @contextmanager
    def _open(self, contender: Contender, case: Case, runs: Runs) -> Iterator[Worker]:
        """A process in which a case is open."""
        self._report(f"{case.name}: {contender.name}, opening")
        with self._start(contender) as worker:
            with whose(contender.name):
                runs.opened = worker.open(self._job(contender, case)).seconds
            yield worker

    def _start(self, contender: Contender) -> Worker:
        python = self._plan.pythons.get(contender.name, sys.executable)
        with whose(contender.name):
            return Worker(contender.name, contender.worker, python, self._threads, self._plan.timeout)

    def _job(self, contender: Contender, case: Case) -> Job:
        settings = dict(contender.settings)
        if contender.worker == "kandrt":
            settings["memory"] = self._plan.memory
        scratch = self._scratch if self._plan.scratch is None else self._plan.scratch
        return Job(
            case=case,
            inputs=str(self._inputs),
            bundle=str(self._bundle.folder),
            family=self._bundle.manifest.family,
            precision=self._precision(contender)[1],
            threads=self._threads,
            scratch=str(scratch),
            settings=settings,
            sources={part: Source(**asdict(source)) for part, source in self._sources.items()},
        )

    def _precision(self, contender: Contender) -> tuple[Precision, Precision]:
        """What the baseline and a contender compute in."""
        own = self._bundle.manifest.precision
        return own, contender.precision or own


@contextmanager
def whose(contender: str) -> Iterator[None]:
    """Let errors say whose they are."""
    try:
        yield
    except (KandrtError, OSError, ValueError) as error:
        raise ContenderError(contender, error) from error


def compare(expected: Inputs, found: Inputs, precisions: tuple[Precision, Precision]) -> Equivalence:
    """How near a contender's result is to the baseline's; the worst of the arrays."""
    half = any(precision != "fp32" for precision in precisions)
    if {name: array.shape for name, array in expected.items()} != {name: array.shape for name, array in found.items()}:
        return Equivalence("relative error", 1.0, MOST_RELATIVE[half], passed=False)
    if "picture" in expected:
        delta = found["picture"].astype(np.float64) - expected["picture"]
        psnr, least = peak_signal_to_noise(float(np.mean(delta**2))), LEAST_PSNR[half]
        return Equivalence("PSNR", psnr, least, psnr is None or psnr >= least)
    relative = max(relative_error(expected[name], found[name]) for name in expected)
    return Equivalence("relative error", relative or None, MOST_RELATIVE[half], relative <= MOST_RELATIVE[half])


def relative_error(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """L2 norm of the difference over that of `expected`."""
    delta = np.linalg.norm(found.astype(np.float64) - expected)
    return float(delta) / max(float(np.linalg.norm(expected)), 1e-30)
