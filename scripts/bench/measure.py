"""The measurement: what is asked, checked, measured case by case, and put together."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from ...engines.bundle import Bundle, open_bundle
from ...engines.errors import BackendError, InputError
from ...engines.manifest import Manifest
from .arena import Arena, Outcome, Tell
from .case_costs import case_costs
from .cases import PROMPT, Case, default_cases, make_case
from .contenders import CONTENDERS, Contender, chosen, unable
from .installed import contender_size
from .interference import clean, make_probe, usual
from .machine import inspect_machine, usable_cores
from .pace import Deadline, warm_up_text
from .results import BASELINE, SCHEMA, CaseRecord, Contestant, Measurement, Report, Skipped, Tradeoff
from .sources import Part, Source, find_sources

INTERRUPT = "interrupted"  # why a case was not measured


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    contenders: names of CONTENDERS, or "all"; baseline: the one that the others are set beside, which always runs.
    cases: names of CASES with their sizes, by default those of `default_cases`. rounds: samples of each, at most where
    there is a budget; warm_up: runs before them. budget: minutes that all is to take; each case gets a round even so,
    and cases of many steps get fewer where the default ones would take too long. size (height, width), batch, steps
    and prior_steps are of cases whose names do not say. checkpoints: folders in diffusers' layout, or folders of such,
    by default those that the bundle was made from. quantized: the bundle in int8. pythons: by a contender's name, the
    interpreter that runs it. threads: by default all that this process may use. timeout: seconds that opening or one
    run may take. memory: of kandrt, as `load` has it. scratch: a folder for graphs that onnx-plain exports, to be used
    again; by default one that goes away. peaks: whether to measure what the machine can do, and beside every sample
    whether it can do it then. tradeoffs: pictures a setting of the trade-offs between quality and time, 0 for none;
    reuse_bundle: one with the graphs of feature reuse, for them. command: as the user typed it.
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
    baseline: str = BASELINE
    budget: float | None = None
    quantized: Path | None = None
    tradeoffs: int = 0
    reuse_bundle: Path | None = None


@dataclass(frozen=True)
class Setup:
    """What a plan comes to on this machine."""

    bundle: Bundle
    cases: Sequence[Case]
    threads: int
    sources: Mapping[Part, Source]
    contenders: Sequence[Contender]
    skipped: Sequence[Skipped]


def measure(plan: Plan, report: Tell) -> Report:
    """Measure; `report` is told each piece of work as it starts. However it ends, all of its processes have ended.

    A contender that cannot run is listed as skipped. Raises InputError for what a plan asks that is not there,
    BundleError for a damaged bundle, BackendError where the baseline ran in no case.
    """
    started, start = datetime.now(timezone.utc), time.perf_counter()
    until = Deadline.after(None if plan.budget is None else 60 * plan.budget)
    setup = prepare(plan)
    for each in setup.skipped:
        report(f"without {each.contender}: {each.why}")
    report("the machine: matrix products and convolutions" if plan.peaks else "the machine")
    machine = inspect_machine(setup.threads, plan.peaks)
    outcomes = measure_cases(plan, setup, until, report)
    skipped = [*setup.skipped, *(each for outcome in outcomes.values() for each in outcome.skipped)]
    measurements, probe = told_clean(outcomes.values())
    if not measurements:
        raise BackendError("nothing was measured: " + "; ".join(f"{each.contender}: {each.why}" for each in skipped))
    order = [CONTENDERS[plan.baseline], *setup.contenders]
    measured = [each for each in order if any(m.contender == each.name for m in measurements)]
    manifest = setup.bundle.manifest
    return Report(
        schema=SCHEMA,
        kandrt=version("kandrt"),
        started=started.isoformat(timespec="seconds"),
        command=plan.command,
        bundle=str(plan.bundle),
        family=manifest.family,
        precision=manifest.precision,
        machine=replace(machine, probe=probe),
        contenders=[contestant(each, manifest, each.name in plan.pythons) for each in measured],
        cases=[record(setup.bundle, case, o.steps) for case, o in outcomes.items() if o.measurements],
        measurements=measurements,
        skipped=skipped,
        baseline=plan.baseline,
        tradeoffs=[] if interrupted(skipped) else measured_tradeoffs(plan, report),
        seconds=time.perf_counter() - start,
    )


def prepare(plan: Plan) -> Setup:
    """All that can be known before anything runs; raises what `measure` does."""
    check_plan(plan)
    bundle = open_bundle(plan.bundle)
    manifest = bundle.manifest
    check_quantized(plan, manifest)
    sizes = {"size": plan.size, "batch": plan.batch, "steps": plan.steps, "prior_steps": plan.prior_steps}
    names = dict.fromkeys(plan.cases or default_cases(manifest, plan.size))
    cases = [make_case(name, manifest, **sizes, prompt=plan.prompt) for name in names]  # type: ignore[arg-type]
    sources = find_sources(manifest, plan.checkpoints)
    contenders, skipped = able(plan, manifest, sources)
    threads = usable_cores() if plan.threads is None else plan.threads
    return Setup(bundle, cases, threads, sources, contenders, skipped)


def check_plan(plan: Plan) -> None:
    """Raise InputError for numbers that cannot be."""
    for name, least in (("rounds", 1), ("warm_up", 0), ("threads", 1), ("tradeoffs", 0)):
        value = getattr(plan, name)
        if value is not None and value < least:
            raise InputError(f"{name}: expected {least} or more, found {value}")
    if plan.budget is not None and not plan.budget > 0:
        raise InputError(f"budget: expected minutes, more than 0, found {plan.budget}")
    chosen(plan.contenders, plan.baseline)
    unknown = sorted(plan.pythons.keys() - CONTENDERS.keys())
    if unknown:
        raise InputError(f"python: expected a contender of {', '.join(CONTENDERS)}, found {', '.join(unknown)}")


def check_quantized(plan: Plan, manifest: Manifest) -> None:
    """Raise InputError for a bundle in int8 that is none, or is of other networks."""
    if plan.quantized is None:
        return
    found = open_bundle(plan.quantized).manifest
    if not any(component.quantization for component in found.components.values()):
        raise InputError(f"quantized: no component of {plan.quantized} is in int8; make one with `kandrt quantize`")
    if (found.family, found.components.keys()) != (manifest.family, manifest.components.keys()):
        raise InputError(f"quantized: {plan.quantized} was not made from {plan.bundle}: it has other networks")


def able(plan: Plan, manifest: Manifest, sources: Mapping[Part, Source]) -> tuple[list[Contender], list[Skipped]]:
    """The contenders that may run here, and why the others may not; InputError where the baseline may not."""
    contenders, quantized = chosen(plan.contenders, plan.baseline), plan.quantized is not None
    why = {
        each.name: unable(each, manifest, sources, each.name in plan.pythons, quantized=quantized)
        for each in (CONTENDERS[plan.baseline], *contenders)
    }
    reason = why.pop(plan.baseline)
    if reason is not None and plan.baseline != BASELINE:
        raise InputError(f"baseline {plan.baseline}: {reason}")
    kept = [each for each in contenders if why[each.name] is None]
    return kept, [Skipped(name, reason) for name, reason in why.items() if reason is not None]


def measure_cases(plan: Plan, setup: Setup, until: Deadline, report: Tell) -> dict[Case, Outcome]:
    """What came of each case; an interrupt ends them, and what was measured until then stays."""
    outcomes: dict[Case, Outcome] = {}

    def known(contender: str, like: Case) -> float | None:
        """Seconds of a step at the sizes of a case, of a case that was measured before."""
        sizes = like.role, like.height, like.width, like.batch
        for case, outcome in outcomes.items():
            if case.stage == "step" and not case.fresh and (case.role, case.height, case.width, case.batch) == sizes:
                return next((m.seconds.median for m in outcome.measurements if m.contender == contender), None)
        return None

    probe = make_probe(setup.threads) if plan.peaks else None
    with tempfile.TemporaryDirectory(prefix="kandrt-bench-") as scratch:
        arena = Arena(plan, setup.bundle, setup.sources, setup.threads, Path(scratch), report, probe)
        for i, case in enumerate(setup.cases):
            share = until.share(case.weight, sum(each.weight for each in setup.cases[i + 1 :]))
            try:
                outcomes[case] = arena.measure_case(case, setup.contenders, share, known)
            except KeyboardInterrupt:
                if not any(each.measurements for each in outcomes.values()):
                    raise
                left = setup.cases[i:]
                outcomes |= {each: Outcome([], [Skipped(plan.baseline, INTERRUPT, each.name)], 0) for each in left}
                break
    return outcomes


def interrupted(skipped: Iterable[Skipped]) -> bool:
    """Whether not all was measured because of an interrupt."""
    return any(each.why == INTERRUPT for each in skipped)


def told_clean(outcomes: Iterable[Outcome]) -> tuple[list[Measurement], float | None]:
    """All measurements with their clean samples marked, and what the machine reaches while nothing else runs."""
    found = list(outcomes)
    own = usual([rate for each in found for rates in each.rates.values() for rate in rates])
    return [
        replace(
            m,
            clean=clean(each.rates.get(m.contender, []), own),
            beside_clean=clean(each.beside_rates.get(m.contender, []), own),
        )
        for each in found
        for m in each.measurements
    ], own


def contestant(contender: Contender, manifest: Manifest, other_python: bool) -> Contestant:
    """A contender as it is reported; what another interpreter has installed is not known here."""
    size = None if other_python else contender_size(contender.worker, contender.settings)
    return Contestant(contender.name, contender.title, size, contender.arithmetic(manifest))


def record(bundle: Bundle, case: Case, steps: int) -> CaseRecord:
    """A case as it is reported, with the steps that were made."""
    fewer = f" {steps} steps instead of {case.steps}, so as to stay within the budget." if steps < case.steps else ""
    case = replace(case, steps=steps)
    counted = case.runs_decoder and not case.opens
    prior_steps = case.prior_steps if case.runs_prior and not case.opens else None
    made = CaseRecord(
        case.name, case.boundary + fewer, case.height, case.width, case.batch, steps if counted else None, prior_steps,
        warm_up="" if case.fresh else warm_up_text(case),
    )  # fmt: skip
    costs = case_costs(bundle, case)
    if costs is None:
        return made
    flops = {name: float(each) for name, each in costs.by_operator.items()}
    moved = float(costs.weight_bytes + costs.activation_bytes)
    return replace(made, flops=float(costs.flops), bytes=moved, by_operator=flops)


def measured_tradeoffs(plan: Plan, report: Tell) -> list[Tradeoff]:
    """The trade-offs between quality and time, where they were asked for."""
    if not plan.tradeoffs:
        return []
    from .tradeoffs import measure_tradeoffs

    report("trade-offs")
    return list(measure_tradeoffs(plan.tradeoffs, plan.threads, report, plan.reuse_bundle, plan.quantized))
