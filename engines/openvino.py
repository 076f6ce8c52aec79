"""Graphs run by OpenVINO."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from .caches import cache_folder
from .errors import BackendError, InputError
from .manifest import Component, Precision
from .mapped import drop_mapped
from .request import Request, autoencoders
from .session import Array, ComponentSession
from .spec import DType, TensorSpec, disagreement

# OpenVINO's names of the types of tensors
DTYPES: Mapping[str, DType] = {
    "boolean": "bool",
    "i32": "int32",
    "i64": "int64",
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
}
# What a bundle's fp32 layers compute in. Those of an fp16 bundle are in fp16 already, which OpenVINO computes in fp32
# under this hint; its own hint of f16 silently becomes bf16 on a CPU without fp16.
HINTS: Mapping[Precision, str] = {"fp32": "f32", "fp16": "f32", "bf16": "bf16"}
FP32 = HINTS["fp32"]
OWN = {"INFERENCE_PRECISION_HINT": "precision", "INFERENCE_NUM_THREADS": "threads"}  # what arguments set
TELEMETRY = "openvino_telemetry"
TIMESTEPS = "timesteps"  # the input of contexts that takes fp32


@functools.cache
def core() -> Any:
    """OpenVINO's entry point, one a process; BackendError where the installed library cannot be used."""
    try:
        return import_quietly().Core()
    except Exception as error:  # a library that is installed and broken may raise anything
        raise BackendError(f"openvino cannot be used: {error}; run: pip install 'kandrt[openvino]'") from error


def import_quietly() -> Any:
    """Import openvino without its telemetry.

    Importing it reports to its makers over the network and leaves an identifier in the user's home folder, unless the
    package for that is missing, which it is prepared for.
    """
    blocked = "openvino" not in sys.modules and TELEMETRY not in sys.modules
    if blocked:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # Python's own way to say that there is none
    try:
        import openvino  # type: ignore[import-untyped, unused-ignore]
    finally:
        if blocked:
            del sys.modules[TELEMETRY]
    return openvino


def open_session(request: Request) -> OpenVinoSession:
    """Open a component; `request.options` are OpenVINO's properties, and "cache" = "on".

    With a cache, what is compiled is kept in the bundle (`engines/caches`), and is read from there the next time: a
    few seconds less to open a large network, for twice its weights on disk.

    Raises InputError for a property that another argument sets, or another value of "cache".
    """
    options = dict(request.options)
    for name, argument in OWN.items():
        if name in options:
            raise InputError(f"{request.name}: option {name}: give {argument} instead")
    cache = options.pop("cache", "off")
    if cache not in ("on", "off"):
        raise InputError(f"{request.name}: option cache: expected 'on' or 'off', found {cache!r}")
    if cache == "on":
        options["CACHE_DIR"] = str(cache_folder(request, core_version()))
    return OpenVinoSession(
        request.name,
        request.graph,
        request.component,
        request.computes,
        request.threads,
        options,
        exact=TIMESTEPS if request.divided else None,
        per_size=request.name in autoencoders(request.bundle.manifest),
        weights=request.weights,
    )


def core_version() -> str:
    """The version of the installed openvino, without its build."""
    return str(import_quietly().__version__).partition("-")[0]


def kernels(backend: str, device: str) -> frozenset[Precision]:
    """What a device computes in without emulating it; BackendError where it cannot be used."""
    probe(backend, device)
    capabilities = core().get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")
    return frozenset({"fp32", "fp16", *(("bf16",) if "BF16" in capabilities else ())})


def probe(backend: str, device: str) -> None:  # noqa: ARG001  # as every implementation has it
    """Raise BackendError where the installed openvino cannot run on `device`."""
    available = core().available_devices
    if device.upper() not in available:
        raise BackendError(
            f"device {device!r}: this build of openvino has {', '.join(available) or 'no devices'}; "
            f"run: pip install 'kandrt[openvino]'"
        )


class OpenVinoSession(ComponentSession):
    """A component of a bundle under OpenVINO, on the CPU: NumPy arrays in, new NumPy arrays out.

    Calls from several threads wait for each other.
    """

    library = "openvino"

    def __init__(
        self,
        name: str,
        graph: Path,
        component: Component,
        precision: Precision,
        threads: int | None = None,
        options: Mapping[str, str] | None = None,
        *,
        exact: str | None = None,
        per_size: bool = False,
        weights: Sequence[Path] = (),
    ) -> None:
        """Open `graph`, with `threads` of the CPU or as many as it has cores, and further properties of OpenVINO's.

        `precision` is what the layers compute in that the graph has in fp32; where there are none it changes nothing.
        exact: an input for which that is too coarse; what depends on it is computed in fp32, as a graph of its own.
        per_size: compile the graph anew for each size of input, when it is called, rather than once for all: then
        OpenVINO lays out one plan of memory for all intermediate results, and takes a third less. `weights` are the
        files that the graph reads: once a size has run and OpenVINO has its own copies, they leave memory again.

        Raises BackendError where OpenVINO cannot run it at `precision`, BundleError where it is not what `component`
        describes.
        """
        super().__init__(name, component)
        probe("openvino", "cpu")
        self._graph, self._hint, self._lock = graph, HINTS[precision], Lock()
        self._exact = exact if self._hint != FP32 else None
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            # Pinned, two processes of few threads would share the first cores and leave the others idle.
            "ENABLE_CPU_PINNING": False,
            **(options or {}),
        }
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        model = self._read()
        self.check_specs(specs(model.inputs), specs(model.outputs))
        self._per_size, self._weights = per_size, tuple(weights)
        self._compiled = None if per_size else self._compile(model)
        self._session, self._shapes = model, dict[str, list[int]]()

    def _read(self) -> Any:
        return self._or_fail(lambda: core().read_model(str(self._graph)))

    def _compile(self, model: Any) -> list[Any]:
        """The compiled graph, or what it is divided into."""
        if self._exact is None:
            return [self._compile_in(self._hint, model)]
        dependent, others = divided(model, self._exact)
        return [self._compile_in(FP32, dependent), self._compile_in(self._hint, others)]

    def _compile_in(self, hint: str, model: Any) -> Any:
        settings = {"INFERENCE_PRECISION_HINT": hint, **self._settings}  # left out, it is bf16 on every CPU that has it
        compiled = self._or_fail(lambda: core().compile_model(model, "CPU", settings))
        found = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if found != hint:
            raise BackendError(f"{self.name}: asked openvino for {hint}, it computes in {found}")
        return compiled

    def _or_fail(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # RuntimeError and openvino's own
            raise BackendError(f"{self.name}: openvino cannot open {self._graph}: {error}") from error

    def _run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph on arrays that fit its inputs.

        A compiled graph that fails may say nothing, give results of another call now or later, or end the process
        (2026.4): so sizes are tried on the model first, a request serves one call, and after a failure the graph is
        compiled anew.
        """
        with self._lock:
            new = self._reshape({name: list(array.shape) for name, array in arrays.items()})
            compiled = self._ready(new)
            self._compiled = None
            outputs: dict[str, Array] = {}
            for part in compiled:
                results = part.create_infer_request().infer(dict(arrays), share_inputs=True, share_outputs=False)
                names = {name for port in part.outputs for name in port.names}
                outputs |= {spec.name: results[spec.name] for spec in self.outputs if spec.name in names}
            problems = [p for spec in specs(self._session.outputs) for p in disagreement(spec, outputs[spec.name], {})]
            if problems:
                raise RuntimeError("; ".join(problems))
            self._compiled = compiled
            if new:
                drop_mapped(self._weights)
        return outputs

    def _reshape(self, shapes: dict[str, list[int]]) -> bool:
        """Let the model tell whether it can run arrays of these shapes, and what comes out; whether they are new."""
        if shapes == self._shapes:
            return False
        self._shapes = {}  # after an error the model has neither the old ones nor these
        self._session.reshape(shapes)
        self._shapes = shapes
        return True

    def _ready(self, new: bool) -> Any:
        """The compiled graph for the shapes that the model has."""
        if self._per_size and (new or self._compiled is None):
            self._compiled = None  # frees its memory before there is another
            compiled = self._compile(self._session)
            drop_mapped(self._weights)  # with sizes known, compiling has made all copies
            return compiled
        return self._compile(self._read()) if self._compiled is None else self._compiled

    def close(self) -> None:
        """Free the graph's memory; calling it again does nothing."""
        super().close()
        self._compiled = None


def divided(model: Any, name: str) -> tuple[Any, Any]:
    """What gives the outputs that depend on an input, and what gives the others; both take all inputs."""
    reached: set[str] = set()
    (start,) = (port for port in model.inputs if name in port.names)
    waiting = [start.get_node()]
    while waiting:
        node = waiting.pop()
        if node.get_name() not in reached:
            reached.add(node.get_name())
            waiting += [target.get_node() for port in node.outputs() for target in port.get_target_inputs()]
    results = model.get_results()
    dependent = [result for result in results if result.get_name() in reached]
    others = [result for result in results if result.get_name() not in reached]
    make = import_quietly().Model
    return make(dependent, model.get_parameters()), make(others, model.get_parameters())


def specs(ports: Sequence[Any]) -> list[TensorSpec]:
    """Inputs or outputs as OpenVINO describes them: it has no names for axes, so they are numbered."""
    return [
        TensorSpec(
            port.any_name,
            DTYPES.get(port.element_type.get_type_name(), port.element_type.get_type_name()),
            tuple(axis.get_length() if axis.is_static else f"?{i}" for i, axis in enumerate(port.partial_shape)),
        )
        for port in ports
    ]
