"""One engine against a bundle's graphs in fp32: each component on what requests give it, and whole requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from ..engines.errors import KandrtError, PlacementError
from .engine_reference import RESIDENT, WHOLE, Answers, Call, Report, Size, engine_requests
from .reference import EMBEDS_RELATIVE, Skipped, peak_signal_to_noise
from .worst_layer import WorstLayer, find_worst_layer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..engines.bundle import Bundle
    from ..engines.manifest import Precision
    from ..engines.plans import Builder
    from ..engines.session import Session

    Float32 = NDArray[np.float32]

# Relative L2 error of a component: what export holds graphs to, and of embeddings.
RELATIVE = EMBEDS_RELATIVE
# PSNR in dB of pictures against the reference's, for the requests of a few steps that are made here. Measured with
# OpenVINO and ONNX Runtime on the miniature and on small random networks: fp32 102 to 126 dB, fp16 55 to 63 dB, bf16 39
# to 56 dB (miniature) and 27 to 34 dB (random). 60 dB is an error of 1e-3, a quarter of one of 256 levels, which room
# for larger networks leaves far below what a wrong weight does. 35 dB is what Apple's Core ML conversion of Stable
# Diffusion holds its half-precision models to. bf16 rounds 8 times as coarsely, which is 18 dB.
MIN_PSNR: Mapping[Precision, float] = {"fp32": 60.0, "fp16": 35.0, "bf16": 25.0}
# From the prompt on, what the prior's rounding does to the embeddings moves whole shapes: bf16 23 to 58 dB on the
# miniature, least for prompts that it does not know. Unrelated pictures have 9 dB.
MIN_PSNR_WHOLE: Mapping[Precision, float] = {**MIN_PSNR, "bf16": 20.0}
# What one rounding costs, about: fp32 sums differ in their last bits, fp16 keeps 11 bits, bf16 8.
ROUNDING: Mapping[Precision, float] = {"fp32": 1e-6, "fp16": 5e-4, "bf16": 4e-3}
Kind = Literal["component", "request"]
LEVELS = 255  # steps between black and white


@dataclass(frozen=True)
class Runner:
    """What is verified: a backend on a device, the precision that it computes in, and options for its library."""

    backend: str
    device: str
    precision: Precision
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.backend} on {self.device} in {self.precision}"

    def open(self, bundle: Bundle, name: str) -> Session:
        """Open a component; raises what `open_component` does."""
        from ..engines.backends import open_component

        return open_component(
            bundle, name, backend=self.backend, device=self.device, precision=self.precision, options=self.options
        )

    def open_instrumented(self, bundle: Bundle, name: str, call: Call) -> Session:
        """Open a component whose graph was changed; a backend that runs plans builds one first."""
        builder = builder_of(self.backend)
        if builder is not None:
            from ..engines.builder import build_plan, plan_work
            from ..engines.trt_session import wider

            specs = bundle.manifest.components[name].inputs
            axes = {
                axis: length
                for spec in specs
                for axis, length in zip(spec.shape, call.inputs[spec.name].shape, strict=True)
                if isinstance(axis, str)
            }
            for task in plan_work(bundle, builder, coverage=[wider(bundle, name, axes)], components=[name]):
                build_plan(bundle, task, lambda *_: None)
        return self.open(bundle, name)

    def computes(self, bundle: Bundle, name: str) -> Precision:
        """What most of a component computes in."""
        from ..engines.request import Request

        if self.precision == bundle.manifest.precision:
            return bundle.manifest.components[name].precision
        return Request(bundle, name, self.backend, self.device, self.precision).computes


@dataclass(frozen=True)
class EngineRow:
    """A component or a request under an engine, against the reference in fp32.

    Errors are the worst of all calls and outputs: cosine the cosine of the angle between outputs, levels the largest
    error of a picture in 255ths. psnr is None for pictures that are equal; what would not be finite is None as well.
    worst names the layer at fault.
    """

    kind: Kind
    engine: str
    what: str
    passed: bool
    bound: str = ""
    calls: int = 0
    max_abs: float | None = None
    relative: float | None = None
    cosine: float | None = None
    psnr: float | None = None
    levels: float | None = None
    detail: str = ""
    worst: WorstLayer | None = None


def builder_of(backend: str) -> Builder | None:
    """The builder of the plans that a backend runs; None for one that opens graphs."""
    from ..engines.plans import Builder

    return cast("Builder", backend) if backend in get_args(Builder) else None


@dataclass
class Check:
    """One runner against the reference."""

    bundle: Bundle
    runner: Runner
    answers: Answers
    report: Report
    named: bool = True
    worst: dict[str, tuple[float, Call]] = field(default_factory=dict)
    blamed: dict[str, WorstLayer | str] = field(default_factory=dict)

    def run(self, size: Size, skipped: list[Skipped]) -> list[EngineRow]:
        """Every component, then every request; what fails by its numbers is told the layer at fault.

        A provider that nobody named and that does not take whole graphs is not verified, because it would not be used.
        """
        names = [name for name in self.bundle.manifest.components if name in self.answers.calls]
        try:
            components = [self.component(name) for name in names]
        except PlacementError as error:
            skipped.append(Skipped(f"{self.runner.backend} on {self.runner.device}", str(error)))
            return []
        requests = self.requests(size, skipped)
        return [self.explained(row, row.what) for row in components] + [
            self.explained(row, max(sorted(self.used(row.what)), key=self.excess, default="")) for row in requests
        ]

    def computed(self, name: str) -> Precision:
        """What a component computes in; of one in 8 bits bf16, which rounds as coarsely."""
        if self.bundle.manifest.components[name].quantization is not None:
            return "bf16"
        return self.runner.computes(self.bundle, name)

    def used(self, request: str) -> set[str]:
        """The components that a request ran."""
        return {name for name, calls in self.answers.calls.items() if any(call.request == request for call in calls)}

    def component(self, name: str) -> EngineRow:
        """A component on everything that the reference was given."""
        self.report(f"{self.runner}: {name}")
        calls, bound = self.answers.calls[name], RELATIVE[self.computed(name)]
        empty = EngineRow("component", str(self.runner), name, passed=False, bound=f"relative {bound:.0e}")
        try:
            errors = list(self.errors(name, calls))
        except KandrtError as error:
            if isinstance(error, PlacementError) and not self.named:
                raise
            return replace(empty, detail=str(error))
        all_errors = worst_of(errors)
        self.worst[name] = max(zip((error.relative for error in errors), calls, strict=True), key=lambda each: each[0])
        if all_errors.relative == math.inf:
            return replace(empty, calls=len(calls), detail="its output holds NaN or infinity, or has another shape")
        return replace(empty, passed=all_errors.relative <= bound, calls=len(calls), **asdict(all_errors))

    def errors(self, name: str, calls: Sequence[Call]) -> Iterator[Errors]:
        """The errors of every call."""
        from ..runtime.transfer import to_host

        session = self.runner.open(self.bundle, name)
        try:
            for call in calls:
                found = {key: to_host(array) for key, array in session(**call.inputs).items()}
                yield worst_of(errors_of(expected, found[key]) for key, expected in call.outputs.items())
        finally:
            session.close()

    def excess(self, name: str) -> float:
        """How many times its bound a component's error is."""
        return self.worst[name][0] / RELATIVE[self.computed(name)] if name in self.worst else 0.0

    def requests(self, size: Size, skipped: list[Skipped]) -> list[EngineRow]:
        """Every request, from prompt to picture."""
        from ..runtime import load

        chosen: Mapping[str, Any] = {
            "backend": self.runner.backend, "device": self.runner.device, "precision": self.runner.precision,
            "options": dict(self.runner.options),
        }  # fmt: skip
        small = 4 * sum(each.parameters for each in self.bundle.manifest.components.values()) <= RESIDENT
        found = []
        with load(self.bundle.folder, **chosen, memory="keep" if small else "stage") as k:
            for name, run in engine_requests(k, size, self.answers.answers).items():
                without = sorted(self.used(name) - self.worst.keys())
                if without:
                    skipped.append(Skipped(f"{name} by {self.runner}", f"{', '.join(without)} failed"))
                elif name in self.answers.answers:
                    self.report(f"{self.runner}: {name}")
                    found.append(self.request(name, run))
        return found

    def request(self, name: str, run: Callable[[], Float32]) -> EngineRow:
        """One request."""
        try:
            answer = run()
        except KandrtError as error:
            return EngineRow("request", str(self.runner), name, passed=False, calls=1, detail=str(error))
        coarse = any(self.bundle.manifest.components[each].quantization is not None for each in self.used(name))
        precision = "bf16" if coarse else self.runner.precision
        return compared(str(self.runner), name, self.answers.answers[name], answer, precision)

    def explained(self, row: EngineRow, name: str) -> EngineRow:
        """A row, with the layer of component `name` that is at fault where it failed by its numbers."""
        if row.passed or name not in self.worst or (row.relative is None and self.excess(name) <= 1):
            return row
        blamed = self.blame(name)
        if isinstance(blamed, WorstLayer):
            return replace(row, worst=blamed)
        return replace(row, detail="; ".join(filter(None, (row.detail, blamed))))

    def blame(self, name: str) -> WorstLayer | str:
        """The layer of a component at fault, or why none can be named."""
        if name not in self.blamed:
            precision = self.computed(name)
            try:
                self.blamed[name] = find_worst_layer(
                    self.bundle, name, self.worst[name][1], self.runner.open_instrumented,
                    floor=ROUNDING[precision], bound=RELATIVE[precision], report=self.report,
                )  # fmt: skip
            except (KandrtError, OSError) as error:
                self.blamed[name] = f"{name}: its worst layer could not be found: {error}"
        return self.blamed[name]


# Errors


@dataclass(frozen=True)
class Errors:
    """Largest absolute error, relative L2 error, and cosine of the angle between two arrays."""

    max_abs: float
    relative: float
    cosine: float


WRONG = Errors(math.inf, math.inf, -1.0)


def errors_of(expected: NDArray[Any], found: NDArray[Any]) -> Errors:
    """The errors of an array; WRONG where shapes differ or a value of either is NaN or infinite."""
    import numpy as np

    if expected.shape != found.shape or not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return WRONG
    wide, other = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    delta, norm, size = other - wide, float(np.linalg.norm(wide)), float(np.linalg.norm(other))
    cosine = min(float(wide @ other) / (norm * size), 1.0) if norm * size > 0 else float(norm == size)
    return Errors(float(np.abs(delta).max(initial=0.0)), float(np.linalg.norm(delta)) / max(norm, 1e-30), cosine)


def worst_of(errors: Iterable[Errors]) -> Errors:
    """The worst of each."""
    listed = list(errors)
    return Errors(
        max(error.max_abs for error in listed),
        max(error.relative for error in listed),
        min(error.cosine for error in listed),
    )


def compared(engine: str, name: str, expected: Float32, found: Float32, precision: Precision) -> EngineRow:
    """The row of a request: pictures [1, H, W, 3] are held to their PSNR, embeddings to their relative error."""
    errors, relative = errors_of(expected, found), RELATIVE[precision]
    if errors == WRONG:
        shapes = f"expected finite values {list(expected.shape)}, found {list(found.shape)}"
        return EngineRow("request", engine, name, passed=False, calls=1, detail=shapes)
    row = EngineRow(
        "request", engine, name, errors.relative <= relative, f"relative {relative:.0e}", 1, **asdict(errors)
    )
    if expected.ndim == 2:
        return row
    least = (MIN_PSNR_WHOLE if name == WHOLE else MIN_PSNR)[precision]
    psnr = peak_signal_to_noise(float(((found.astype("float64") - expected) ** 2).mean()))
    return replace(
        row,
        passed=psnr is None or psnr >= least,
        bound=f"PSNR {least:.0f} dB",
        psnr=psnr,
        levels=errors.max_abs * LEVELS,
    )
