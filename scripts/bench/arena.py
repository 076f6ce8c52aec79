"""Where contenders meet: each in a process of its own, beside the baseline's, in turn."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...engines.bundle import Bundle
from ...engines.errors import BackendError, KandrtError
from .cases import Case, Inputs, make_inputs
from .contenders import CONTENDERS, Contender, most_exact, unable_in
from .equivalence import BOUNDS, compare, exactness
from .interference import Probe
from .pace import UNKNOWN, Deadline, affordable_steps, warm_up_steps
from .results import DeviceUse, Measurement, Residence, Skipped
from .session import Worker
from .sources import Part, Source
from .worker import Job, Reply

if TYPE_CHECKING:
    from .measure import Plan

Tell = Callable[[str], None]

# Threads of libraries look for work a little longer after a run; the other contender's run is not to feel it.
SETTLE_SECONDS = 0.05


@dataclass
class Runs:
    """What was seen of a contender in a case, of one process or, in a fresh case, of all of its processes.

    rates: beside each sample, what the machine was found to reach. result: of the first run that counts.
    """

    opened: float | None = None
    first: float | None = None
    warm_up: list[float] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    stages: list[Mapping[str, float]] = field(default_factory=list)
    warm_stages: Mapping[str, float] = field(default_factory=dict)
    peak: int | None = None
    memory: Residence | None = None
    device_seconds: list[float] = field(default_factory=list)
    device_memory: int | None = None
    result: Inputs | None = None

    def note(self, reply: Reply, *, warm: bool) -> None:
        """A run."""
        self.first = reply.seconds if self.first is None else self.first
        (self.warm_up if warm else self.samples).append(reply.seconds)
        if warm:
            self.warm_stages = reply.stages
        elif reply.stages:
            self.stages.append(reply.stages)
        if reply.device_memory is not None:
            self.device_memory = max(reply.device_memory, self.device_memory or 0)

    def note_memory(self, worker: Worker) -> None:
        """What a process has in memory after its last run, and had at most."""
        self.peak = max((each for each in (self.peak, worker.peak_memory) if each is not None), default=None)
        self.memory = worker.residence or self.memory

    def measurement(self, case: str, contender: str) -> Measurement:
        """What is reported of it, comparisons apart."""
        names = self.stages[0] if self.stages else {}
        stages = {name: float(np.median([each[name] for each in self.stages])) for name in names}
        seconds = float(np.median(self.device_seconds)) if self.device_seconds else None
        device = DeviceUse(seconds, self.device_memory) if self.device_memory is not None else None
        return Measurement(
            case, contender, self.samples, [], self.warm_up, self.opened, self.first, self.peak, stages,
            memory=self.memory, device=device,
        )  # fmt: skip


@dataclass
class Entry:
    """A contender beside the baseline: what was seen of it, and which of the baseline's samples lie beside its own."""

    contender: Contender
    runs: Runs
    beside: slice


@dataclass
class Outcome:
    """What came of a case: measurements, the rates beside samples, who was left out, the steps that were made.

    rates and beside_rates are by contender, a number a sample.
    """

    measurements: list[Measurement]
    skipped: list[Skipped]
    steps: int
    rates: Mapping[str, list[float]] = field(default_factory=dict)
    beside_rates: Mapping[str, list[float]] = field(default_factory=dict)


class ContenderError(Exception):
    """A contender that cannot be measured; the message is its own, without its name."""

    def __init__(self, contender: str, error: Exception) -> None:
        super().__init__(str(error).removeprefix(f"{contender}: "))
        self.contender = contender


class Arena:
    """Where a bundle's contenders meet: starts their processes, and lets them run in turn."""

    def __init__(
        self,
        plan: Plan,
        bundle: Bundle,
        sources: Mapping[Part, Source],
        threads: int,
        scratch: Path,
        report: Tell,
        probe: Probe | None = None,
    ) -> None:
        self._plan, self._bundle, self._sources, self._threads = plan, bundle, sources, threads
        self._scratch, self._report, self._probe = scratch, report, probe
        self._baseline = CONTENDERS[plan.baseline]
        self._inputs = scratch / "inputs.npz"

    def measure_case(self, case: Case, contenders: Sequence[Contender], until: Deadline, known: Known) -> Outcome:
        """The baseline's measurement and those of all contenders that could run, and those that could not."""
        manifest, skipped, able_ones = self._bundle.manifest, list[Skipped](), list[Contender]()
        np.savez(self._inputs, allow_pickle=False, **make_inputs(case, manifest))
        for contender in (self._baseline, *contenders):
            why = unable_in(contender, case, manifest, self._sources)
            if why is None:
                able_ones.append(contender)
            else:
                skipped.append(Skipped(contender.name, why, case.name))
        if self._baseline not in able_ones:
            return Outcome([], skipped, case.steps)
        base, match = Runs(), Match(self, case, able_ones[1:], until, known)
        try:
            (match.fresh if case.fresh else match.lasting)(base)
        except ContenderError as failed:  # the baseline: nothing to set the others beside, from here on
            if not match.entries:
                return Outcome([], [*skipped, Skipped(self._baseline.name, str(failed), case.name)], case.steps)
            done = {each.contender.name for each in match.entries} | {each.contender for each in match.lost}
            why = f"{self._baseline.name} failed beside it: {failed}"
            skipped += [Skipped(each.name, why, case.name) for each in able_ones[1:] if each.name not in done]
        return self._outcome(match, base, skipped)

    def _outcome(self, match: Match, base: Runs, skipped: list[Skipped]) -> Outcome:
        name, case, manifest = self._baseline.name, match.case, self._bundle.manifest
        runs = {name: base} | {entry.contender.name: entry.runs for entry in match.entries}
        results = {each: own.result for each, own in runs.items() if own.result}
        exact = most_exact(list(results), manifest, name)
        found = {each: own.measurement(case.name, each) for each, own in runs.items()}
        for each, result in results.items():
            if each != exact:
                computed = (CONTENDERS[key].arithmetic(manifest) for key in (each, exact))
                near = compare(results[exact], result, BOUNDS[exactness(*computed)], exact)
                found[each] = replace(found[each], equivalence=near)
        for entry in match.entries:
            own = entry.contender.name
            found[own] = replace(found[own], beside=base.samples[entry.beside])
        beside = {entry.contender.name: base.rates[entry.beside] for entry in match.entries}
        rates = {each: own.rates for each, own in runs.items()}
        return Outcome(list(found.values()), skipped + match.lost, match.steps, rates, beside)

    # Processes

    @contextmanager
    def open(self, contender: Contender, case: Case, runs: Runs) -> Iterator[Worker]:
        """A process in which a case is open."""
        self.tell(f"{case.name}: {contender.name}, opening")
        with self.start(contender) as worker:
            with whose(contender.name):
                runs.opened = worker.open(self.job(contender, case)).seconds
            yield worker

    def start(self, contender: Contender) -> Worker:
        """A process."""
        python = self._plan.pythons.get(contender.name, sys.executable)
        with whose(contender.name):
            return Worker(contender.name, contender.worker, python, self._threads, self._plan.timeout)

    def job(self, contender: Contender, case: Case) -> Job:
        """What it is to open."""
        settings = dict(contender.settings)
        if contender.worker == "kandrt":
            settings["memory"] = self._plan.memory
        manifest = self._bundle.manifest
        folder = self._plan.quantized if contender.int8 and self._plan.quantized is not None else self._bundle.folder
        return Job(
            case=case,
            inputs=str(self._inputs),
            bundle=str(folder),
            family=manifest.family,
            precision=contender.computes_in(manifest),
            threads=self._threads,
            scratch=str(self._scratch if self._plan.scratch is None else self._plan.scratch),
            settings=settings,
            sources={str(part): source for part, source in self._sources.items()},
        )

    def result(self, worker: Worker) -> Inputs:
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

    def rate(self) -> float | None:
        """What the machine reaches now."""
        if self._probe is None:
            return None
        time.sleep(SETTLE_SECONDS)
        return self._probe()

    def tell(self, text: str) -> None:
        """What is going on."""
        self._report(text)

    @property
    def baseline(self) -> Contender:
        """The contender that the others are set beside."""
        return self._baseline

    @property
    def plan(self) -> Plan:
        """What was asked."""
        return self._plan


Known = Callable[[str, Case], float | None]
"""Seconds of a step of a contender at a case's sizes, where they were measured."""


class Match:
    """All runs of a case."""

    def __init__(
        self, arena: Arena, case: Case, contenders: Sequence[Contender], until: Deadline, known: Known
    ) -> None:
        self.case, self.steps = case, case.steps
        self.entries: list[Entry] = []
        self.lost: list[Skipped] = []
        self._arena, self._plan, self._contenders = arena, arena.plan, list(contenders)
        self._until, self._known = until, known

    def lasting(self, base: Runs) -> None:
        """A process for the baseline, and beside it one for each contender in turn."""
        arena = self._arena
        with arena.open(arena.baseline, self.case, base) as baseline:
            self._warm_up(baseline, base)
            if self._plan.steps is None:
                self.steps = self._affordable(base)
            for waiting, contender in self._turns():
                own, first = Runs(), len(base.samples)
                try:
                    with arena.open(contender, self.case, own) as worker:
                        self._warm_up(worker, own)
                        self._rounds(self._until.share(1, waiting), (baseline, base), (worker, own))
                        self._time_on_device(worker, own)
                        own.note_memory(worker)
                    self._enter(contender, own, base, first)
                except ContenderError as failed:
                    self._lose(failed, base, own, first)
            if not base.samples:
                self._rounds(self._until, (baseline, base))
            self._time_on_device(baseline, base)
            base.note_memory(baseline)

    def fresh(self, base: Runs) -> None:
        """A process for each sample, of the baseline and of a contender in turn."""
        arena = self._arena
        for waiting, contender in self._turns():
            own, first = Runs(), len(base.samples)
            try:
                for i in self._samples(self._until.share(1, waiting)):
                    for each, runs in ((arena.baseline, base), (contender, own)):
                        self._from_start(each, runs, i)
                self._enter(contender, own, base, first)
            except ContenderError as failed:
                self._lose(failed, base, own, first)
        if not base.samples:
            for i in self._samples(self._until):
                self._from_start(arena.baseline, base, i)

    def _samples(self, until: Deadline) -> Iterator[int]:
        return until.rounds(self._plan.warm_up + self._plan.rounds, self._plan.warm_up + 1)

    def _turns(self) -> Iterator[tuple[int, Contender]]:
        """Contenders, each with the number of those that wait behind it."""
        for i, contender in enumerate(self._contenders, 1):
            yield len(self._contenders) - i, contender

    def _enter(self, contender: Contender, own: Runs, base: Runs, first: int) -> None:
        self.entries.append(Entry(contender, own, slice(first, len(base.samples))))

    def _lose(self, failed: ContenderError, base: Runs, own: Runs, first: int) -> None:
        """A contender fell out; it counts no round, and neither does the baseline beside it."""
        alone = failed.contender == self._arena.baseline.name
        kept = first + (0 if alone else len(own.samples))
        del base.samples[kept:], base.rates[kept:]
        if alone:
            raise failed
        self.lost.append(Skipped(failed.contender, str(failed), self.case.name))

    def _affordable(self, base: Runs) -> int:
        """As many steps as there is time for, by what is known of the contenders, or by the baseline's warm-up."""
        stages, left = base.warm_stages, self._until.left
        if not stages or left is None:
            return self.case.steps
        own = self._known(self._arena.baseline.name, self.case) or stages.get("decoder", 0.0)
        others = [self._known(each.name, self.case) or UNKNOWN * own for each in self._contenders]
        prior = stages.get("prior", 0.0) * self.case.prior_steps / warm_up_steps(self.case)[1]
        once = 2 * (prior + stages.get("movq", 0.0)) + (base.opened or 0.0) + sum(base.warm_up)
        rest = UNKNOWN * once * max(len(others), 1)
        return affordable_steps(self.case, left, [own] * max(len(others), 1) + others, rest)

    def _from_start(self, contender: Contender, runs: Runs, i: int) -> None:
        """One sample of a fresh case; the first tell whether the results agree."""
        arena, case, warm = self._arena, self.case, i < self._plan.warm_up
        arena.tell(f"{case.name}: {contender.name}, {'warm-up' if warm else f'sample {i + 1 - self._plan.warm_up}'}")
        before = None if warm else arena.rate()
        with arena.start(contender) as worker, whose(contender.name):
            opened = worker.open(arena.job(contender, case))
            reply = None if case.opens else worker.run()
            seconds = time.perf_counter() - worker.started
            runs.opened = opened.seconds if runs.opened is None else runs.opened
            if reply is not None and runs.first is None:
                runs.first = reply.seconds
            runs.note_memory(worker)
            if not case.opens and runs.result is None:
                runs.result = arena.result(worker)
        after = None if warm else arena.rate()
        (runs.warm_up if warm else runs.samples).append(seconds)
        if before is not None and after is not None:
            runs.rates.append(min(before, after))

    def _rounds(self, until: Deadline, *sides: tuple[Worker, Runs]) -> None:
        """Runs in turn; a round in which one side fails counts for neither."""
        for done in until.rounds(self._plan.rounds):
            names = " and ".join(worker.name for worker, _ in sides)
            self._arena.tell(f"{self.case.name}: {names}, round {done + 1}")
            before, replies, rates = self._arena.rate(), list[Reply](), list[float]()
            for worker, runs in sides:
                replies.append(self._run(worker, self.steps))
                after = self._arena.rate()
                rates += [] if before is None or after is None else [min(before, after)]
                before = after
                if runs.result is None:
                    runs.result = self._arena.result(worker)
            for i, ((_, runs), reply) in enumerate(zip(sides, replies, strict=True)):
                runs.note(reply, warm=False)
                runs.rates += rates[i : i + 1]

    @staticmethod
    def _run(worker: Worker, steps: int, prior_steps: int | None = None) -> Reply:
        time.sleep(SETTLE_SECONDS)
        with whose(worker.name):
            return worker.run(steps, prior_steps)

    def _warm_up(self, worker: Worker, runs: Runs) -> None:
        """Runs that do not count, short where a whole one has many steps."""
        for _ in range(self._plan.warm_up):
            self._arena.tell(f"{self.case.name}: {worker.name}, warm-up")
            runs.note(self._run(worker, *warm_up_steps(self.case)), warm=True)

    @staticmethod
    def _time_on_device(worker: Worker, runs: Runs) -> None:
        """On a GPU, let it time as many runs as counted."""
        for _ in runs.samples if runs.device_memory is not None else ():
            with whose(worker.name):
                seconds = worker.run_on_device().device_seconds
            if seconds is None:
                return
            runs.device_seconds.append(seconds)


@contextmanager
def whose(contender: str) -> Iterator[None]:
    """Let errors say whose they are."""
    try:
        yield
    except (KandrtError, OSError, ValueError) as error:
        raise ContenderError(contender, error) from error
