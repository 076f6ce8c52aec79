"""A graph against the module it was traced from, on random inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.errors import NumericalError
from ..engines.manifest import Component, GraphError, Precision
from ..engines.session import Session
from ..engines.spec import TensorSpec
from .probes import widen

# Relative L2 error that a graph may have. fp32: two libraries that sum in another order differ by about 1e-6 after
# some hundred layers. fp16 and bf16 keep 11 and 8 bits: 5e-4 and 4e-3 a rounding, of which errors of 1e-3 and 1e-2
# after some hundred layers are usual.
TOLERANCES: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 8e-2}

# Lengths of dynamic axes: none is that of another or that with which the graph was traced.
AXIS_LENGTHS = {
    "batch": 3, "timesteps": 4, "tokens": 6, "height": 8, "width": 16, "image_height": 64, "image_width": 128,
}  # fmt: skip
MAX_TIMESTEP = 1000

ADVICE: Mapping[Precision, str] = {
    "fp32": "the weights may be damaged; if they are not, please report this with the checkpoint's config.json",
    "fp16": "its numbers may be too large for fp16: try --precision bf16 or fp32",
    "bf16": "its numbers may need more digits: try --precision fp32",
}


def random_inputs(
    specs: tuple[TensorSpec, ...], multiples: Mapping[str, int], seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Standard-normal arrays for `specs`; timesteps in [0, 1000), masks of ones and zeros, token ids below 100.

    Dynamic axes have the lengths of AXIS_LENGTHS, rounded up to their `multiples`.
    """
    rng = np.random.default_rng(seed)

    def length(axis: int | str) -> int:
        if isinstance(axis, int):
            return axis
        multiple = multiples.get(axis, 1)
        return -(-AXIS_LENGTHS[axis] // multiple) * multiple

    def draw(spec: TensorSpec) -> NDArray[Any]:
        shape = tuple(length(axis) for axis in spec.shape)
        if spec.dtype == "int64":
            return rng.integers(0, 100, shape)
        if spec.name == "timesteps":
            return rng.integers(0, MAX_TIMESTEP, shape).astype(np.float32)
        if spec.name == "text_mask":
            return (np.arange(shape[1]) < rng.integers(2, shape[1], (shape[0], 1))).astype(np.float32)
        return rng.standard_normal(shape, np.float32)

    return {spec.name: draw(spec) for spec in specs}


def compare(reference: Session, candidate: Session, inputs: Mapping[str, NDArray[Any]], tolerance: float) -> GraphError:
    """Run both on the same inputs and give the largest errors of any output.

    Raises NumericalError that says in which of the two an output is NaN or infinite.
    """
    expected, found = reference(**inputs), candidate(**inputs)
    for what, outputs in (("module", expected), ("graph", found)):
        if bad := [name for name, array in outputs.items() if not np.isfinite(array).all()]:
            raise NumericalError(f"the {what} gives NaN or infinity in {', '.join(bad)}")
    errors = [difference(expected[spec.name], found[spec.name]) for spec in reference.outputs]
    return GraphError(max(error[0] for error in errors), max(error[1] for error in errors), tolerance)


def difference(expected: NDArray[Any], found: NDArray[Any]) -> tuple[float, float]:
    """Relative L2 error and largest absolute error; infinite where shapes differ or a value is NaN or infinite."""
    if expected.shape != found.shape or not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return float("inf"), float("inf")
    delta = found.astype(np.float64) - expected
    scale = np.linalg.norm(expected.astype(np.float64))  # in fp32, squares of large values overflow
    return float(np.linalg.norm(delta) / max(float(scale), 1e-30)), float(np.abs(delta).max(initial=0.0))


def check_graph(
    name: str, graph: Path, component: Component, reference: Session, multiples: Mapping[str, int]
) -> GraphError:
    """Compare a graph under ONNX Runtime with its module in fp32.

    ONNX Runtime's CPU provider has no bfloat16, so a bf16 graph runs in fp32 arithmetic on its rounded weights.

    Raises NumericalError where the error is over the tolerance of the component's precision, or not a number.
    """
    from ..engines.ort import OrtSession

    precision, tolerance = component.precision, TOLERANCES[component.precision]
    inputs = random_inputs(component.inputs, multiples)
    with tempfile.TemporaryDirectory() as folder:
        if precision == "bf16":
            widened = Path(folder, "graph.onnx")
            widen(graph, widened)
            graph, component = widened, replace(component, precision="fp32")
        session = OrtSession(name, graph, component, "cpu")
        try:
            error = compare(reference, session, inputs, tolerance)
        except NumericalError as problem:
            raise NumericalError(f"{name}: {problem}; {ADVICE[precision]}") from problem
        finally:
            session.close()
    if not error.relative <= tolerance:
        raise NumericalError(
            f"{name}: expected a graph within {tolerance:.0e} of its module at {precision}, found {error.relative:.2e} "
            f"(largest absolute difference {error.max_abs:.2e}); {ADVICE[precision]}"
        )
    return error
