"""Which layer of a component is to blame: every layer's result in fp32 and under an engine, on the same inputs."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine_reference import Call, Report, need_onnx, open_reference, stand_in, widened

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..engines.bundle import Bundle
    from ..engines.session import Session
    from ..export.probes import Layer

    Float32 = NDArray[np.float32]

# Opens a component of a bundle that stands in for the one under test, for the inputs of a call.
Opener = Callable[["Bundle", str, Call], "Session"]

CHUNK = 128_000_000  # bytes of results that are looked at together
NEGLIGIBLE = 1e-6  # root mean square below which a tensor's error counts as if it were that large


@dataclass(frozen=True)
class WorstLayer:
    """The layer at which the relative L2 error grows most: the largest of what it reads, and of what it gives.

    after is None for NaN or infinity. note says what else is to be known.
    """

    component: str
    layer: str
    operator: str
    before: float
    after: float | None
    note: str = ""

    def __str__(self) -> str:
        after = "NaN or infinity" if self.after is None else f"{self.after:.1e}"
        text = (
            f"{self.component}: worst layer {self.layer} ({self.operator}): "
            f"relative error {self.before:.1e} before it, {after} after it"
        )
        return f"{text}; {self.note}" if self.note else text


def find_worst_layer(
    bundle: Bundle, name: str, call: Call, opener: Opener, *, floor: float, bound: float, report: Report
) -> WorstLayer:
    """The layer of a component at which the error of an engine grows most, on the inputs of `call`.

    floor is the relative error that a single rounding makes, below which no growth counts; bound is what the component
    was held to. Raises MissingExtraError where graphs cannot be edited, and what `opener` raises.
    """
    need_onnx("naming the worst layer")
    from ..export.probes import layers

    with tempfile.TemporaryDirectory() as folder:
        own = copied(bundle, name, Path(folder, "own"))
        plain = own if bundle.manifest.precision == "fp32" else widened(bundle, name, made(Path(folder, "plain")))
        known = layers(own.path(own.manifest.components[name].graph))
        tensors = list(dict.fromkeys(tensor for layer in known for tensor in layer.outputs))
        errors: dict[str, float] = {}
        for chunk in chunks(tensors, lengths(plain, name, call, tensors)):
            report(f"{name}: looking at layers, {len(errors)} of {len(tensors)} results compared")
            expected = results(plain, name, call, chunk, lambda bundle, name, _: open_reference(bundle, name))
            found = results(own, name, call, chunk, opener)
            errors |= {tensor: tensor_error(expected[part], found[part]) for tensor, part in parts(chunk)}
    return largest_growth(name, known, errors, floor, bound)


def made(folder: Path) -> Path:
    """The folder, which is new."""
    folder.mkdir()
    return folder


def copied(bundle: Bundle, name: str, folder: Path) -> Bundle:
    """A bundle in `folder` with the files of one component: engine libraries read weights only beside the graph."""
    for record in bundle.manifest.component_files(name):
        target = folder / record.file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path(record), target)
    return stand_in(bundle, name, folder / bundle.manifest.components[name].graph.file)


def lengths(plain: Bundle, name: str, call: Call, tensors: Sequence[str]) -> dict[str, int]:
    """How many elements each tensor has for the inputs of a call."""
    from ..export.probes import add_sizes

    graph = plain.folder / "sizes.onnx"
    spec = add_sizes(plain.path(plain.manifest.components[name].graph), graph, tensors)
    session = open_reference(stand_in(plain, name, graph, outputs=[spec]), name)
    try:
        found = session(**call.inputs)[spec.name]
    finally:
        session.close()
    return dict(zip(tensors, map(int, found), strict=True))


def chunks(tensors: Sequence[str], sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The tensors with their sizes, in order, as many at a time as CHUNK has room for."""
    chunk: dict[str, int] = {}
    for tensor in tensors:
        if chunk and 4 * (sum(chunk.values()) + sizes[tensor]) > CHUNK:
            yield chunk
            chunk = {}
        chunk[tensor] = sizes[tensor]
    if chunk:
        yield chunk


def parts(chunk: Mapping[str, int]) -> Iterator[tuple[str, slice]]:
    """Where each tensor of a chunk lies in the vector of all."""
    start = 0
    for tensor, size in chunk.items():
        yield tensor, slice(start, start + size)
        start += size


def results(bundle: Bundle, name: str, call: Call, chunk: Mapping[str, int], opener: Opener) -> Float32:
    """The tensors of a chunk for the inputs of a call, as one vector on the host."""
    from ..export.probes import add_results
    from ..runtime.transfer import to_host

    graph = bundle.folder / "results.onnx"
    spec = add_results(bundle.path(bundle.manifest.components[name].graph), graph, list(chunk))
    session = opener(stand_in(bundle, name, graph, outputs=[spec]), name, call)
    try:
        return to_host(session(**call.inputs)[spec.name])
    finally:
        session.close()


def tensor_error(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Relative L2 error; infinite where one has NaN or infinity and the other does not."""
    import numpy as np

    wide, other = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(wide)
    if not np.array_equal(wide[~finite], other[~finite], equal_nan=True) or not np.isfinite(other[finite]).all():
        return math.inf
    scale = max(float(np.linalg.norm(wide[finite])), NEGLIGIBLE * math.sqrt(max(int(finite.sum()), 1)))
    return float(np.linalg.norm(other[finite] - wide[finite])) / scale


def largest_growth(
    name: str, known: Sequence[Layer], errors: Mapping[str, float], floor: float, bound: float
) -> WorstLayer:
    """The layer whose results are wrong most times more than what it reads; the first of several."""

    def change(layer: Layer) -> tuple[float, float]:
        return max((errors.get(each, 0.0) for each in layer.inputs), default=0.0), max(
            map(errors.__getitem__, layer.outputs)
        )

    def growth(layer: Layer) -> float:
        before, after = change(layer)
        return 0.0 if before == math.inf else after / max(before, floor)

    worst = max(known, key=growth)
    before, after = change(worst)
    note = ""
    if max(errors.values()) <= bound:
        note = "with all results kept, each is within the bound: a kernel that fuses several layers may be at fault"
    return WorstLayer(name, worst.name, worst.operator, before, after if math.isfinite(after) else None, note)
