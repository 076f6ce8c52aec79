"""One execution context of an engine: shapes, addresses and memory set when they change, CUDA graphs replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .cuda import Device
from .errors import BackendError
from .session import Array
from .spec import TensorSpec
from .trt_engine import Engine, Graphs, out_of_memory

Shape = tuple[int, ...]


class Execution:
    """A context on one profile.

    Without graphs it reads and writes the arrays of each call. With graphs it has one shape and buffers of its own, at
    addresses that stay: inputs are copied into them and outputs out of them, on the device. Outputs are copied because
    a caller may hold them for longer than until the next call (a sampler its history, the prior its context), which
    two buffers in turn would not outlive; a copy of a prediction takes microseconds of the device's time.
    """

    def __init__(
        self, engine: Engine, profile: int, outputs: Sequence[TensorSpec], device: Device, graphs: Graphs
    ) -> None:
        self._engine, self._profile, self._outputs, self._device = engine, profile, outputs, device
        self.graphs: Graphs = graphs
        self._buffers: dict[str, Array] = {}
        self._any_needed = engine.activation_bytes() > 0
        self._open()

    def _open(self) -> None:
        """Make the context, of which nothing is set yet."""
        self._replay: Callable[[], None] | None = None
        self._context: Any = self._engine.create_context(self.graphs)
        # always: only the first context of an engine has profile 0 without it
        if not self._context.set_optimization_profile_async(self._profile, self._device.stream):
            raise self._failure(f"cannot take profile {self._profile}")
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._output_shapes: dict[str, Shape] = {}
        self._needed = self._runs = 0
        self._generation: int | None = None

    @property
    def buffer_bytes(self) -> int:
        """What its own inputs and outputs take on the device."""
        return sum(int(array.nbytes) for array in self._buffers.values())

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Queue one run on arrays of the device; nothing waits for it.

        Raises BackendError where the library refuses, MemoryError where there is no room.
        """
        self._set_shapes(inputs)
        self._set_memory(inputs)
        # before `ordered`: see cuda.py
        results = {spec.name: self._device.empty(self._output_shapes[spec.name], spec.dtype) for spec in self._outputs}
        if self.graphs == "none":
            with self._device.ordered():
                self._bind(inputs)
                self._bind(results)
                self._execute(self._device.stream)
            return results
        self._make_buffers(inputs)
        with self._device.ordered():
            for name, array in inputs.items():
                self._device.copy(array, self._buffers[name])
            self._run_fixed()
            for name, array in results.items():
                self._device.copy(self._buffers[name], array)
        return results

    def close(self) -> None:
        """Give up graph, context and buffers, in that order; nothing queued may still use them."""
        self._replay = None
        self._context = None
        self._buffers.clear()

    def _set_shapes(self, inputs: Mapping[str, Array]) -> None:
        shapes = {name: tuple(array.shape) for name, array in inputs.items()}
        if shapes == self._shapes:
            return
        context, before, self._shapes = self._context, self._shapes, {}
        self._engine.clear_messages()
        for name, shape in shapes.items():
            if before.get(name) != shape and not context.set_input_shape(name, shape):
                raise self._failure(f"refuses the shape {list(shape)} of {name}")
        missing = context.infer_shapes()
        if missing:
            raise self._failure(f"cannot infer shapes without {', '.join(missing)}")
        self._output_shapes = {spec.name: tuple(context.get_tensor_shape(spec.name)) for spec in self._outputs}
        # Memory for these shapes, not for the greatest; 0 means that the library cannot tell
        self._needed = int(context.update_device_memory_size_for_shapes()) or self._engine.activation_bytes(
            self._profile
        )
        self._shapes, self._generation = shapes, None
        if self.graphs == "library" and not self._capturable():
            self._eager_from_now_on("TensorRT-RTX says that it cannot be captured")
            self._open()
            self._set_shapes(inputs)

    def _set_memory(self, inputs: Mapping[str, Array]) -> None:
        if not self._any_needed:
            return
        shared = self._device.activations
        try:
            shared.reserve(max(self._needed, 1))  # an engine that needs some for any shape wants an address for all
        except MemoryError as error:
            raise out_of_memory(self._engine.name, "activations", self._needed, self._device) from error
        if self._generation == shared.generation:
            return
        if self.graphs != "none" and self._generation is not None:
            # The graph holds the address that was: a new context is the one sure way to be rid of it
            self.close_context()
            self._open()
            self._set_shapes(inputs)
        self._context.set_device_memory(shared.address, shared.size)
        self._generation = shared.generation

    def close_context(self) -> None:
        """Give up graph and context, and keep the buffers."""
        self._replay = None
        self._context = None

    def _make_buffers(self, inputs: Mapping[str, Array]) -> None:
        """Arrays whose addresses stay; of outputs and inputs, since all of them are in the graph."""
        if not self._buffers:
            dtypes = {name: str(array.dtype) for name, array in inputs.items()}
            dtypes |= {spec.name: spec.dtype for spec in self._outputs}
            shapes = self._shapes | self._output_shapes
            made = {name: self._device.empty(shape, dtypes[name]) for name, shape in shapes.items()}  # type: ignore[arg-type]
            self._buffers = made
        self._bind(self._buffers)

    def _bind(self, arrays: Mapping[str, Array]) -> None:
        """Set the addresses that changed."""
        for name, array in arrays.items():
            address = self._device.address(array)
            if self._addresses.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise self._failure(f"refuses an address for {name}")
                self._addresses[name] = address

    def _run_fixed(self) -> None:
        """Run on the buffers: the first time as ever, then by a graph, which is captured at the second time."""
        if self.graphs == "ours" and self._replay is None and self._runs == 1:
            self._capture()
        if self._replay is not None:
            self._replay()
        else:
            self._execute(self._device.stream)
        self._runs += 1

    def _capture(self) -> None:
        if not self._capturable():
            self._eager_from_now_on("TensorRT says that it cannot be captured")
            return
        try:
            self._replay = self._device.capture(self._execute)
        except Exception as error:  # CUDA's and TensorRT's errors share no base class
            self._eager_from_now_on(f"capturing failed: {error}", error)

    def _capturable(self) -> bool:
        ask = getattr(self._context, "is_stream_capturable", None)  # TensorRT before 11 cannot tell
        return ask is None or bool(ask(self._device.stream))

    def _eager_from_now_on(self, why: str, cause: Exception | None = None) -> None:
        """Run without a graph; an error where the user asked for one."""
        if self._engine.graphs_asked_for:
            raise BackendError(f"{self._engine.name}: no CUDA graph: {why}; leave cuda_graph out") from cause
        warnings.warn(f"{self._engine.name}: runs without a CUDA graph: {why}", stacklevel=2)
        self.graphs = "none"

    def _execute(self, stream: int) -> None:
        self._engine.clear_messages()
        if not self._context.execute_async_v3(stream):
            raise self._failure("failed")

    def _failure(self, what: str) -> BackendError:
        return self._engine.failure(what, self._needed)
