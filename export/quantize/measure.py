"""What a component's layers see and how much 8 bits change it, measured inside of the component's own graph.

The graph is given further outputs, a few numbers a layer, and run on the inputs that requests gave: no activation is
kept, so memory does not grow with the number of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...engines.errors import NumericalError
from ...engines.manifest import Component
from ...engines.ort import OrtSession
from ...engines.spec import TensorSpec
from ..probes import append, constant
from .grids import Grid, grid
from .layers import Layer
from .rewrite import Rewriter, Weights

OUTPUT = "statistics"
Arrays = Mapping[str, NDArray[Any]]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """A component's graph, to be run under ONNX Runtime with further outputs, in `folder` beside its weights."""

    name: str
    component: Component
    graph: Path
    folder: Path
    threads: int | None
    report: Report

    def statistics(
        self, model: ir.Model, numbers: Sequence[ir.Value], calls: Sequence[Arrays], doing: str
    ) -> NDArray[np.float64]:
        """Those scalars of a graph for every call: [calls, numbers]."""
        path, whole = self.folder / f"{self.name}.measure.onnx", constant(model, -1)
        flat = [append(model, "Reshape", [number, whole]) for number in numbers]
        made = append(model, "Concat", flat)
        made.name, made.shape = OUTPUT, ir.Shape([len(numbers)])
        model.graph.outputs.append(made)
        ir.save(model, path)
        spec = TensorSpec(OUTPUT, "float32", (len(numbers),))
        rows = self.run(path, replace(self.component, outputs=(*self.component.outputs, spec)), calls, doing)
        path.unlink()
        found = np.array([row[OUTPUT] for row in rows], np.float64)
        if not np.isfinite(found).all():
            raise NumericalError(f"{self.name}: NaN or infinity in its layers, {doing}; the weights may be damaged")
        return found

    def run(
        self, path: Path, component: Component, calls: Sequence[Arrays], doing: str
    ) -> list[dict[str, NDArray[Any]]]:
        """What a graph gives for every call."""
        self.report(f"{self.name}: {doing}, loading the graph")
        session, found = OrtSession(self.name, path, component, "cpu", self.threads), []
        try:
            for i, call in enumerate(calls):
                self.report(f"{self.name}: {doing}, call {i + 1} of {len(calls)}")
                found.append(session(**call))
        finally:
            session.close()
        return found


def find_grids(measured: Measured, tensors: Sequence[str], calls: Sequence[Arrays]) -> dict[str, Grid]:
    """A grid for each tensor, over all that it holds in any call.

    Not a smaller one that cuts off what is rare and rounds the rest finer: by squared error that is better, by up to a
    third a layer, and pictures of the embedded miniature came out 4 dB further from those in fp32.
    """
    model = ir.load(measured.graph)
    values = {value.name: value for node in model.graph for value in node.outputs}
    values |= {value.name: value for value in model.graph.inputs}
    numbers = [append(model, operator, [values[name]]) for name in tensors for operator in ("ReduceMin", "ReduceMax")]
    found = measured.statistics(model, numbers, calls, "ranges of activations")
    lows, highs = found[:, 0::2].min(axis=0), found[:, 1::2].max(axis=0)
    return {name: grid(float(low), float(high)) for name, low, high in zip(tensors, lows, highs, strict=True)}


def noise_of_layers(
    measured: Measured, layers: Sequence[Layer], grids: Mapping[str, Grid], calls: Sequence[Arrays], weights: Weights
) -> dict[str, float]:
    """By weight, the relative L2 error of each layer in 8 bits on exact inputs: root mean square over calls."""
    model = ir.load(measured.graph)
    rewriter, numbers = Rewriter(model, grids, weights), []
    for layer in layers:
        exact, result = rewriter.value(layer.result), rewriter.add(layer)
        numbers.append(append(model, "ReduceSumSquare", [exact]))
        numbers.append(append(model, "ReduceSumSquare", [append(model, "Sub", [exact, result])]))
    found = measured.statistics(model, numbers, calls, "error of each layer in 8 bits")
    shares = (found[:, 1::2] / np.maximum(found[:, 0::2], 1e-30)).mean(axis=0)
    return {layer.weight: float(np.sqrt(share)) for layer, share in zip(layers, shares, strict=True)}
