"""What a case costs: the operations and bytes of the graphs that the bundle runs for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...engines.bundle import Bundle
from .cases import Case

if TYPE_CHECKING:
    from ...export.costs import Costs


@dataclass(frozen=True)
class GraphRuns:
    """A component, how often a case runs it, and the lengths of its axes."""

    component: str
    axes: Mapping[str, int]
    runs: int = 1


def case_costs(bundle: Bundle, case: Case) -> Costs | None:
    """Of one run of the case; None where nothing runs, or where the package onnx is not installed.

    Raises what `graph_costs` does.
    """
    try:
        from ...export.costs import Costs, graph_costs
    except ImportError:
        return None
    runs, components = graph_runs(bundle, case), bundle.manifest.components
    counted = [graph_costs(bundle.path(components[r.component].graph), r.axes) * r.runs for r in runs]
    return sum(counted, Costs()) if counted else None


def graph_runs(bundle: Bundle, case: Case) -> list[GraphRuns]:
    """The graphs that one run of a case runs; of the empty prompt what was kept from earlier runs does not count."""
    if case.opens:
        return []
    manifest, runs = bundle.manifest, list[GraphRuns]()
    if case.runs_prior and manifest.prior is not None:
        texts = {"batch": case.batch if case.keeps else case.batch + 1, "timesteps": case.prior_steps}
        runs += [GraphRuns(manifest.prior.text_encoder, texts), GraphRuns(manifest.prior.context, texts)]
        runs.append(GraphRuns(manifest.prior.step, {"batch": 2 * case.batch}, case.prior_steps))
    return runs if case.stage == "prior" else runs + decoder_runs(bundle, case)


def decoder_runs(bundle: Bundle, case: Case) -> list[GraphRuns]:
    """Those of the decoder; all with guidance."""
    from ...runtime.plan import record_scheduler

    record = bundle.manifest.decoders[case.role]
    axes = {
        "height": case.height // record.scale, "width": case.width // record.scale,
        "image_height": case.height, "image_width": case.width,
        "tokens": 0 if record.prompt is None else record.prompt.tokenizer.max_length,
    }  # fmt: skip
    if not axes["tokens"]:
        del axes["tokens"]
    one, twice = {**axes, "batch": 1}, {**axes, "batch": 2 * case.batch}
    movq = GraphRuns(record.movq_decoder, one, case.batch)
    if case.stage == "movq":
        return [movq]
    if case.stage == "step":
        context = [GraphRuns(record.context, {**twice, "timesteps": 1})] if case.fresh else []
        return [*context, GraphRuns(record.step, twice)]
    from_image = case.stage == "image-to-image"
    steps = len(record_scheduler(bundle, record, None).timesteps(case.steps, case.strength if from_image else 1.0))
    runs = [] if record.prompt is None else [GraphRuns(record.prompt.encoder, {"batch": case.batch})]
    runs += [GraphRuns(record.movq_encoder, one, case.batch)] if from_image else []
    runs += [GraphRuns(record.context, {**twice, "timesteps": steps}), GraphRuns(record.step, twice, steps)]
    return [*runs, movq]
