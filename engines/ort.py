"""Graphs run by ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import BackendError
from .manifest import Component
from .session import Array, ComponentSession
from .spec import DType, TensorSpec

# ONNX Runtime's names of the types of tensors
DTYPES: Mapping[str, DType] = {
    "tensor(bool)": "bool",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(float)": "float32",
}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def probe(device: str) -> None:
    """Raise BackendError where the installed onnxruntime, or this machine, cannot run on `device`."""
    import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]

    available = ort.get_available_providers()
    if PROVIDERS[device] not in available:
        raise BackendError(
            f"device {device!r}: this build of onnxruntime has no {PROVIDERS[device]} "
            f"(it has {', '.join(available)}); run: pip install 'kandrt[{device}]'"
        )
    if device == "cuda":
        import cupy  # type: ignore[import-not-found, import-untyped, unused-ignore]

        if cupy.cuda.runtime.getDeviceCount() < 1:
            raise BackendError("device 'cuda': no GPU found")


class OrtSession(ComponentSession):
    """A component of a bundle under ONNX Runtime, on the CPU or a CUDA device.

    Arrays are NumPy arrays on the CPU; on CUDA they may be anything that speaks DLPack, and outputs are CuPy arrays.
    """

    library = "onnxruntime"

    def __init__(self, name: str, graph: Path, component: Component, device: str, threads: int | None = None) -> None:
        """Open `graph`, with `threads` of the CPU or as many as it has cores.

        Raises BackendError where ONNX Runtime cannot run it on `device`, BundleError where it is not what `component`
        describes.
        """
        import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]

        super().__init__(name, component)
        provider = PROVIDERS[device]
        probe(device)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors: its warnings are about its own optimizer
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(str(graph), options, providers=[provider])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise BackendError(f"{name}: onnxruntime cannot open {graph}: {error}") from error
        if self._session.get_providers()[0] != provider:
            raise BackendError(f"{name}: asked onnxruntime for {provider}, it runs {self._session.get_providers()[0]}")
        self._device = device
        self.check_specs(specs(self._session.get_inputs()), specs(self._session.get_outputs()))

    def _run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return self._run_cpu(arrays) if self._device == "cpu" else self._run_cuda(arrays)

    def _run_cpu(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._session.run(names, dict(arrays)), strict=True))

    def _run_cuda(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Bind device memory, so that nothing passes through the host."""
        import cupy  # type: ignore[import-not-found, import-untyped, unused-ignore]

        binding = self._session.io_binding()
        held = {name: cupy.ascontiguousarray(cupy.asarray(array)) for name, array in arrays.items()}
        for name, array in held.items():
            binding.bind_input(name, "cuda", array.device.id, array.dtype.type, array.shape, array.data.ptr)
        for spec in self.outputs:
            binding.bind_output(spec.name, "cuda")
        cupy.cuda.get_current_stream().synchronize()  # ONNX Runtime reads on a stream of its own
        self._session.run_with_iobinding(binding)

        def array_of(spec: TensorSpec, value: Any) -> Array:
            # by address, which every version has; the binding keeps the session, and so its memory, for as long
            shape, itemsize = tuple(value.shape()), cupy.dtype(spec.dtype).itemsize
            memory = cupy.cuda.UnownedMemory(value.data_ptr(), math.prod(shape) * itemsize, (value, binding))
            return cupy.ndarray(shape, spec.dtype, cupy.cuda.MemoryPointer(memory, 0))

        return {
            spec.name: array_of(spec, value) for spec, value in zip(self.outputs, binding.get_outputs(), strict=True)
        }


def specs(values: Sequence[Any]) -> list[TensorSpec]:
    """Inputs or outputs as ONNX Runtime describes them."""
    return [TensorSpec(v.name, DTYPES.get(v.type, v.type), tuple(v.shape)) for v in values]
