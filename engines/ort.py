"""Graphs run by ONNX Runtime, by any of the providers in providers.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import BackendError, InputError
from .manifest import Component
from .placement import OPTION, RECORD, Placement, check_placement, placement
from .providers import (
    CACHE_OPTION,
    PROVIDERS,
    Settings,
    devices,
    import_quietly,
    kernels,
    probe,
    provider_settings,
)
from .request import Request, autoencoders
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
CPU = "CPUExecutionProvider"
# A setting of ONNX Runtime's: leave nodes that depend on constants alone in the graph
UNFOLDED = ("optimization.disable_specified_optimizers", "ConstantFolding")
OWN_OPTIONS = (CACHE_OPTION, OPTION)  # of a request, not passed on

__all__ = ["OrtSession", "kernels", "open_session", "probe"]


def device_index(name: str, text: str) -> int:
    """Read the provider option device_id: which of several GPUs; InputError for what is no number."""
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"{name}: option device_id: expected the number of a GPU, 0 for the first, found {text!r}")
    return int(text)


def open_session(request: Request) -> OrtSession:
    """Open a component by the provider that serves the request's backend on its device.

    `request.options` go to the provider by its own names, two apart. "placement": "fail" raises BackendError where the
    provider has no kernel for a node that computes, "warn" logs it (see placement.py). "cache": "on" or "off" says
    whether what the provider compiles is kept in the bundle (see `cache_settings`).

    Raises InputError or BackendError for options that are refused.
    """
    own = {name: text for name, text in request.options.items() if name in OWN_OPTIONS}
    passed = replace(request, options={name: text for name, text in request.options.items() if name not in own})
    mode = placement(request.name, own.get(OPTION, "fail"))
    return OrtSession(
        request.name,
        request.graph,
        request.component,
        request.device,
        request.threads,
        backend=request.backend,
        settings=provider_settings(passed, own.get(CACHE_OPTION)),
        mode=mode,
        patterns=request.name not in autoencoders(request.bundle.manifest),
        fold=not stored_as_computed(request),
    )


def stored_as_computed(request: Request) -> bool:
    """Whether weights are in fp32 in the bundle, so that nothing but their order of axes is left to change."""
    manifest = request.bundle.manifest
    return (manifest.precision, manifest.storage, request.component.quantization) == ("fp32", None, None)


class OrtSession(ComponentSession):
    """A component of a bundle under one of ONNX Runtime's providers.

    Arrays are NumPy arrays, and outputs of the CPU are memory that ONNX Runtime allocated for them; on CUDA devices
    inputs may be anything that speaks DLPack, and outputs are CuPy arrays. Nothing is copied but what lies elsewhere.
    """

    library = "onnxruntime"

    def __init__(
        self,
        name: str,
        graph: Path,
        component: Component,
        device: str,
        threads: int | None = None,
        *,
        backend: str = "onnxruntime",
        settings: Settings | None = None,
        mode: Placement = "fail",
        patterns: bool = True,
        fold: bool = True,
    ) -> None:
        """Open `graph`, with `threads` of the CPU or as many as it has cores, `settings` being the provider's options.

        patterns: let ONNX Runtime lay out one block of memory for all intermediate results from the second run of a
        size on. It is a little faster, and keeps what the first run took beside the block: for large results that is
        twice the memory.
        fold: compute what depends on weights alone when the graph is opened, not at every call. Weights of other types
        than fp32 need it; where there is nothing but transposes it is better left out on the CPU (1.31): its matrix
        products read such weights as they lie, to the same bits, and the full-size prior takes 0.4 GB less.

        Raises BackendError where ONNX Runtime cannot run it on `device`, or its provider has no kernel for some of it
        and `mode` is "fail"; BundleError where it is not what `component` describes.
        """
        super().__init__(name, component)
        probe(backend, device)
        provider = PROVIDERS[backend, device]
        self._memory, self._index = provider.memory, device_index(name, (settings or {}).get("device_id", "0"))
        self._patterns = patterns
        self._fold = fold
        self._session = self._open(graph, backend, device, threads, settings or {})
        if self._session.get_providers()[0] != provider.name:
            found = self._session.get_providers()[0]
            raise BackendError(f"{name}: asked onnxruntime for {provider.name}, it runs {found}")
        self.check_specs(specs(self._session.get_inputs()), specs(self._session.get_outputs()))
        if provider.name != CPU:
            check_placement(name, self._session, graph, provider.name, mode)

    def _open(self, graph: Path, backend: str, device: str, threads: int | None, settings: Settings) -> Any:
        ort, provider = import_quietly(), PROVIDERS[backend, device]
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors: its warnings are about its own optimizer
        options.enable_mem_pattern = self._patterns
        if threads is not None:
            options.intra_op_num_threads = threads
        if provider.name != CPU:
            options.add_session_config_entry(RECORD, "1")
        elif not self._fold:
            options.add_session_config_entry(*UNFOLDED)
        chosen: list[Any] | None = None if provider.plugin else [(provider.name, dict(settings))]
        try:
            if provider.plugin:
                options.add_provider_for_devices(devices(backend, device)[:1], dict(settings))
            # Unasked, it would go on with other providers where one fails, now or in a later call.
            return ort.InferenceSession(str(graph), options, providers=chosen, enable_fallback=0)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            asked = f" by {provider.name} with {shown(settings)}" if settings else ""
            raise BackendError(f"{self.name}: onnxruntime cannot open {graph}{asked}: {error}") from error

    def _run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return self._run_host(arrays) if self._memory == "host" else self._run_cuda(arrays)

    def _run_host(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
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
            binding.bind_output(spec.name, "cuda", self._index)
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


def shown(settings: Settings) -> str:
    """Options for a message."""
    return ", ".join(f"{name}={text}" for name, text in settings.items())
