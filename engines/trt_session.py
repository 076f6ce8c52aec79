"""Components run by TensorRT and TensorRT-RTX: the plans of the engine store behind the one seam."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

from .bundle import Bundle
from .caches import cache_folder
from .cuda import Device, cupy_device
from .errors import BackendError, InputError
from .manifest import Component, Precision
from .plans import Builder, PlanRecord, PlanSettings
from .profiles import USUAL_BATCH, Coverage, Profile, batch_rows, default_size, size_multiple
from .request import Request
from .session import Array, ComponentSession
from .store import EngineStore, build_command, command_options
from .trt import capability, check_gpu, library, library_version, logger
from .trt_context import Execution, Shape
from .trt_engine import Engine, Library, Plans, Settings, out_of_memory

MAX_GRAPHS = 4  # shapes of one component that keep a CUDA graph with its buffers; the one unused longest goes first


@dataclass(frozen=True)
class SessionMemory:
    """Bytes on the device, of the engines that are open.

    weights are all of them, resident those that are not streamed from the host. activations is the block that all
    sessions of the process share, buffers what graphs read from and write to.
    """

    weights: int
    resident: int
    activations: int
    buffers: int


class TrtSession(ComponentSession):
    """A component under TensorRT.

    Inputs may be arrays of the host or of the device, of any library that speaks DLPack; outputs are new arrays of the
    device (CuPy's), the caller's own. A call queues its work and returns: nothing waits for the device, except where
    activation memory has to grow, for shapes larger than all before. Outputs are ready for work on the caller's
    current stream, and `array.get()` waits for them: see cuda.py.

    Calls from several threads take turns, and their work runs in that order.
    """

    library: ClassVar[str] = "tensorrt"

    def __init__(
        self, name: str, component: Component, plans: Plans, library: Library, device: Device, settings: Settings
    ) -> None:
        """Open the plan, where there is one; of several each when it is first needed.

        Raises BackendError where the library refuses the plan, BundleError where it is not one of this component.
        """
        super().__init__(name, component)
        self._plans, self._library, self._device, self._settings = plans, library, device, settings
        self._executions: OrderedDict[tuple[Any, ...], Execution] = OrderedDict()
        self._by_shapes: dict[tuple[Shape, ...], tuple[Any, ...]] = {}  # keys of _executions
        # The base class tells by it whether the session is open
        self._session = cast("dict[str, Engine]", {})
        device.activations.join(self)
        if len(plans.records) == 1:
            try:
                with device.lock:
                    self._engine(plans.records[0])
            except BaseException:
                self.close()
                raise

    def to_device(self, array: Array) -> Array:
        """An array on the device of the session, itself if it is there; the host does not wait for the copy.

        Raises BackendError where there is no room.
        """
        try:
            return self._device.to_device(array)
        except MemoryError as error:
            raise out_of_memory(self.name, "inputs", int(array.nbytes), self._device) from error

    @property
    def memory(self) -> SessionMemory:
        """What is on the device now."""
        engines: dict[str, Engine] = self._session or {}
        weights = [engine.weights_bytes() for engine in engines.values()]
        return SessionMemory(
            sum(total for total, _ in weights),
            sum(resident for _, resident in weights),
            self._device.activations.size,
            sum(execution.buffer_bytes for execution in self._executions.values()),
        )

    def _run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        with self._device.lock:
            if self._session is None:  # another thread was faster
                raise BackendError(f"{self.name}: the session is closed; load the bundle again")
            try:
                execution = self._execution(arrays)
                return execution({name: self._device.to_device(array) for name, array in arrays.items()})
            except MemoryError as error:
                needed = sum(int(array.nbytes) for array in arrays.values() if hasattr(array, "nbytes"))
                raise out_of_memory(self.name, "inputs and outputs", 2 * needed, self._device) from error

    def _execution(self, arrays: Mapping[str, Array]) -> Execution:
        """What runs arrays of these shapes."""
        shapes = tuple(tuple(arrays[spec.name].shape) for spec in self.inputs)
        key = self._by_shapes.get(shapes)
        if key is None:
            key = self._by_shapes[shapes] = self._prepare(shapes)
        self._executions.move_to_end(key)
        return self._executions[key]

    def _prepare(self, shapes: tuple[Shape, ...]) -> tuple[Any, ...]:
        """See that there is a context for these shapes; gives its key."""
        record, index, profile = self._choose(self._axes(shapes))
        engine = self._engine(record)
        graphs = engine.graphs(static=profile is None or profile.static)
        key = (record.plan.file, index) if graphs == "none" else (record.plan.file, index, shapes)
        if key not in self._executions:
            if graphs != "none":
                self._drop_graphs(MAX_GRAPHS - 1)
            self._executions[key] = Execution(engine, index, self.outputs, self._device, graphs)
        return key

    def _drop_graphs(self, keep: int) -> None:
        """Close the executions with graphs that were unused longest, until `keep` are left."""
        keys = [key for key, execution in self._executions.items() if execution.graphs != "none"]
        for key in keys[: max(len(keys) - keep, 0)]:
            self._device.synchronize()
            self._by_shapes = {shapes: each for shapes, each in self._by_shapes.items() if each != key}
            self._executions.pop(key).close()

    def _axes(self, shapes: tuple[Shape, ...]) -> dict[str, int]:
        """The length of each dynamic axis."""
        return {
            axis: length
            for spec, shape in zip(self.inputs, shapes, strict=True)
            for axis, length in zip(spec.shape, shape, strict=True)
            if isinstance(axis, str)
        }

    def _choose(self, axes: Mapping[str, int]) -> tuple[PlanRecord, int, Profile | None]:
        """The plan and the profile for axes of these lengths: one of fixed shapes, else the one that fits best.

        Raises InputError where none has room for them.
        """
        offered = [
            (record, index, profile)
            for record in self._plans.records
            for index, profile in enumerate(record.key.profiles or (None,))
        ]
        fitting = [each for each in offered if each[2] is None or each[2].holds(axes)]
        if fitting:
            return min(fitting, key=lambda each: misfit(each[2], axes))
        asked = ", ".join(f"{axis} {length}" for axis, length in axes.items())
        bounds = "; ".join(dict.fromkeys(str(profile) for _, _, profile in offered))
        raise InputError(
            f"{self.name}: no engine was built for {asked}; those there are take {bounds}; "
            f"run: {self._plans.build(axes)}"
        )

    def _engine(self, record: PlanRecord) -> Engine:
        """The engine of a plan, opened if it is not."""
        engines: dict[str, Engine] = self._session
        if record.plan.file not in engines:
            engines[record.plan.file] = Engine(
                self.name,
                record,
                self._plans,
                (self.inputs, self.outputs),
                self._library,
                self._device,
                self._settings,
            )
        return engines[record.plan.file]

    def close(self) -> None:
        """Wait for what is queued, then free graphs and contexts, engines, and memory; again does nothing."""
        with self._device.lock:
            engines: dict[str, Engine] | None = self._session
            if engines is None:
                return
            super().close()
            self._device.synchronize()
            self._by_shapes.clear()
            while self._executions:
                self._executions.popitem()[1].close()
            while engines:
                engines.popitem()[1].close()
            self._device.activations.leave(self)
            self._device.trim()


class RtxSession(TrtSession):
    """A component under TensorRT-RTX."""

    library: ClassVar[str] = "tensorrt-rtx"


SESSIONS: Mapping[str, type[TrtSession]] = {each.library: each for each in (TrtSession, RtxSession)}


def misfit(profile: Profile | None, axes: Mapping[str, int]) -> tuple[bool, int, int]:
    """How badly a profile that holds `axes` suits them: dynamic ones last, then by distance from the best, then size.

    Engines are tuned for a profile's best lengths, and bounds that are close to them leave the builder more choice.
    """
    if profile is None:
        return False, 0, 0
    extents = [(extent, axes[axis]) for axis, extent in profile.axes.items() if axis in axes]
    distance = sum(abs(best - length) * 1000 // best for (_, best, _), length in extents)
    return not profile.static, distance, sum(greatest - least for (least, _, greatest), _ in extents)


def wider(bundle: Bundle, name: str, axes: Mapping[str, int]) -> Coverage:
    """The sizes and batches to build for, so that a component takes axes of these lengths beside the usual ones."""
    manifest = bundle.manifest
    scale = max((record.scale for record in manifest.decoders.values()), default=1)
    cells = [axes[axis] * scale for axis in ("height", "width") if axis in axes]
    sides = cells + [axes[axis] for axis in ("image_height", "image_width") if axis in axes]
    multiple = size_multiple(manifest)
    rounded = [-(-side // multiple) * multiple for side in sides] + [
        max(side // multiple, 1) * multiple for side in sides
    ]
    least, best, greatest = default_size(manifest)
    pictures = USUAL_BATCH[2]
    while batch_rows(manifest, name, (1, 1, pictures))[2] < axes.get("batch", 1) and pictures < axes["batch"]:
        pictures += 1
    return Coverage((min([least, *rounded]), best, max([greatest, *rounded])), (1, 1, pictures))


def settings_of(options: Mapping[str, str], cache: Path | None) -> Settings:
    """The backend's options; InputError for others, and for values they do not take."""
    known = {"cuda_graph": "'true', 'false' or 'auto'", "weight_streaming_budget": "a number of bytes or 'auto'"}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise InputError(f"options: tensorrt has no {', '.join(unknown)}; it has {', '.join(known)}")
    graph, budget = options.get("cuda_graph", "auto"), options.get("weight_streaming_budget", "auto")
    graphs = {"true": True, "false": False, "auto": None}
    if graph not in graphs:
        raise InputError(f"options: cuda_graph: expected {known['cuda_graph']}, found {graph!r}")
    if budget != "auto" and not (budget.isascii() and budget.isdecimal()):
        raise InputError(
            f"options: weight_streaming_budget: expected {known['weight_streaming_budget']}, found {budget!r}"
        )
    return Settings(graphs[graph], None if budget == "auto" else int(budget), cache)


@functools.cache
def loaded(builder: Builder) -> Library:
    """The library with its one runtime; raises what `trt.library` does."""
    return Library(builder, library(builder), *logger(builder))


def kernels(backend: str, device: str) -> frozenset[Precision]:  # noqa: ARG001  # as every implementation has it
    """What plans may compute in; whether this GPU can is known when they are built."""
    library(cast("Builder", backend))
    return frozenset({"fp32", "fp16", "bf16"})


def probe(backend: str, device: str) -> None:  # noqa: ARG001
    """Raise BackendError where the library, a GPU or a driver is missing, or the GPU is one that it does not run on."""
    library(cast("Builder", backend))
    check_gpu(cast("Builder", backend))


def open_session(request: Request) -> TrtSession:
    """Open a component by the plans that the bundle's store has for this library and GPU.

    Raises BackendError where there is none that can be used, with the reason for each and the command that builds one.
    """
    builder, bundle, name = cast("Builder", request.backend), request.bundle, request.name
    library(builder)
    gpu, version = capability(), library_version(builder)
    store = EngineStore(bundle)
    settings = settings_of(request.options, None)

    def build(axes: Mapping[str, int]) -> str:
        gpus = (gpu,) if builder == "tensorrt-rtx" else ()
        return build_command(bundle, builder, gpus, command_options([wider(bundle, name, axes)], PlanSettings()))

    def graph() -> Path:
        bundle.check_hashes(bundle.manifest.component_files(name))
        return request.graph

    plans = Plans(store.usable(name, builder, version=version, capability=gpu), store.read, graph, build)
    cache = cache_folder(request, version) / f"{gpu}.bin"
    return SESSIONS[builder](
        name, request.component, plans, loaded(builder), cupy_device(), replace(settings, cache=cache)
    )
