"""ONNX Runtime's runs on CUDA devices: arrays bound where they lie, and its CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeAlias

from .cuda import Device
from .errors import BackendError
from .providers import import_quietly
from .session import Array
from .spec import TensorSpec

Shape: TypeAlias = tuple[int, ...]
GRAPH_ID = "gpu_graph_id"  # ONNX Runtime's name of a run's setting: which graph to capture or replay
NO_GRAPH = "-1"
MAX_GRAPHS = 8  # sets of shapes of one component; ONNX Runtime keeps a graph until its session is closed


@dataclass(frozen=True)
class Captured:
    """What one set of shapes runs on: arrays whose addresses are in the graph, bound, and the graph's number."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    binding: Any
    options: Any


class CudaRuns:
    """Runs an `onnxruntime.InferenceSession` on arrays of a GPU, so that nothing passes through the host.

    Without graphs, outputs are memory that ONNX Runtime allocated for them, which the arrays keep.

    With graphs the session was opened with `enable_cuda_graph`, and a set of shapes has arrays of its own: inputs are
    copied into them and outputs out of them, on the device. The first call with some shapes captures, later ones
    replay: there the host launches one graph instead of a thousand kernels. The first gives what the graph gives as
    well: libraries may choose other kernels while they are captured, and a seed is to repeat its picture.
    A graph remembers addresses of ONNX Runtime's memory that was free when it was captured, so outputs that it
    allocates for other shapes are copied too.

    ONNX Runtime keeps a graph, and handles of CUDA's libraries, for every thread that ever ran such a session: so all
    of its runs are made by one thread, whichever thread calls.
    """

    def __init__(
        self,
        name: str,
        session: Any,
        specs: tuple[Sequence[TensorSpec], Sequence[TensorSpec]],
        device: Device,
        index: int,
        *,
        graphs: bool = False,
        asked: bool = False,
    ) -> None:
        """Run `session` of the component `name`, whose inputs and outputs are `specs`, on the GPU number `index`.

        asked: whether the user wants graphs, so that it is an error where one cannot be captured.
        """
        self._name = name
        self._session: Any = session
        self._inputs, self._outputs = specs
        self._device, self._index, self._asked = device, index, asked
        self._capturing = graphs
        self._thread = ThreadPoolExecutor(1, f"kandrt-{name}") if graphs else None
        self._captured: dict[tuple[Shape, ...], Captured] = {}

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Run once and wait for the device; raises what ONNX Runtime and the device do."""
        if self._thread is None:
            return self._found({name: self._device.to_device(array) for name, array in arrays.items()})
        with self._device.lock:
            inputs = {name: self._device.to_device(array) for name, array in arrays.items()}
            shapes = tuple(tuple(inputs[spec.name].shape) for spec in self._inputs)
            if (captured := self._captured.get(shapes)) is not None:
                self._run_fixed(captured, inputs)
            elif self._capturing and len(self._captured) < MAX_GRAPHS:
                captured = self._capture(shapes, inputs)
            return self._copied(self._found(inputs) if captured is None else captured.outputs)

    def close(self) -> None:
        """Wait for what runs, then let go of the session with its graphs, and of the arrays that they use."""
        if self._thread is not None:
            self._thread.shutdown()
        self._session = None
        self._captured.clear()

    def _capture(self, shapes: tuple[Shape, ...], inputs: Mapping[str, Array]) -> Captured | None:
        """A graph for arrays of these shapes, which has run; None where it cannot be had."""
        made = {name: self._device.empty(array.shape, str(array.dtype)) for name, array in inputs.items()}  # type: ignore[arg-type]
        expected = zip(self._outputs, self._output_shapes(inputs), strict=True)
        results = {spec.name: self._device.empty(shape, spec.dtype) for spec, shape in expected}
        number = str(len(self._captured) + 1)
        captured = Captured(made, results, self._bind(made, results), run_options(number))
        try:
            self._run_fixed(captured, inputs)
        except Exception as error:  # ONNX Runtime's errors share no base class
            if self._asked:
                raise BackendError(f"{self._name}: no CUDA graph: {error}; leave cuda_graph out") from error
            warnings.warn(f"{self._name}: runs without a CUDA graph: {error}", stacklevel=2)
            self._capturing = False
            return None
        self._captured[shapes] = captured
        return captured

    def _run_fixed(self, captured: Captured, inputs: Mapping[str, Array]) -> None:
        with self._device.ordered():
            for name, array in inputs.items():
                self._device.copy(array, captured.inputs[name])
        self._run(captured.binding, captured.options)

    def _output_shapes(self, inputs: Mapping[str, Array]) -> list[Shape]:
        """Shapes of the outputs: by the lengths of the inputs' axes, or where those do not tell, by a run."""
        lengths: dict[int | str, int] = {}
        for spec in self._inputs:
            lengths |= zip(spec.shape, inputs[spec.name].shape, strict=True)
        axes = [axis for spec in self._outputs for axis in spec.shape if isinstance(axis, str)]
        if all(axis in lengths for axis in axes):
            return [tuple(axis if isinstance(axis, int) else lengths[axis] for axis in s.shape) for s in self._outputs]
        return [tuple(array.shape) for array in self._found(inputs).values()]

    def _found(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run without a graph: outputs are memory that ONNX Runtime allocated, by address, which every version has.

        They keep the binding, which keeps the session, and so its memory.
        """
        binding = self._bind(inputs, {})
        with self._device.lock, self._device.ordered():
            pass  # what the caller queued for the inputs comes first
        self._run(binding, None if self._thread is None else run_options(NO_GRAPH))
        return {
            spec.name: self._device.view(value.data_ptr(), tuple(value.shape()), spec.dtype, (value, binding))
            for spec, value in zip(self._outputs, binding.get_outputs(), strict=True)
        }

    def _bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Any:
        """Addresses of inputs and of those outputs that there is memory for; ONNX Runtime allocates the others."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, *self._place(array))
        for spec in self._outputs:
            known = spec.name in outputs
            binding.bind_output(spec.name, *(self._place(outputs[spec.name]) if known else ("cuda", self._index)))
        return binding

    def _place(self, array: Array) -> tuple[Any, ...]:
        """Device, type, shape and address, as ONNX Runtime takes them."""
        return "cuda", self._device.index, array.dtype.type, array.shape, self._device.address(array)

    def _run(self, binding: Any, options: Any) -> None:
        """Wait for what was queued, because ONNX Runtime reads on a stream of its own; then run, and wait for that."""
        self._device.synchronize()
        if self._thread is None:
            self._session.run_with_iobinding(binding, options)
        else:
            future = self._thread.submit(self._session.run_with_iobinding, binding, options)
            try:
                future.result()
            finally:  # after an interrupt too: the arrays are in use until then
                wait([future])

    def _copied(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Copies, the caller's own, made before the next run: that waits for what is queued."""
        results = {name: self._device.empty(array.shape, str(array.dtype)) for name, array in arrays.items()}  # type: ignore[arg-type]
        with self._device.ordered():
            for name, array in arrays.items():
                self._device.copy(array, results[name])
        return results


def run_options(graph: str) -> Any:
    """Settings of a run that captures or replays the graph of a number."""
    options = import_quietly().RunOptions()
    options.add_run_config_entry(GRAPH_ID, graph)
    return options
