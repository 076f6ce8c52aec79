"""Graphs run by ONNX Runtime, by any of the providers in providers.py."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from .cuda import cupy_device
from .errors import BackendError, InputError
from .manifest import Component
from .ort_cuda import CudaRuns
from .placement import OPTION, RECORD, Placement, check_placement, placement
from .prepacked import SAVING, keep, kept
from .providers import (
    CACHE_OPTION,
    PROVIDERS,
    Provider,
    Settings,
    devices,
    graph_cache,
    import_quietly,
    kernels,
    probe,
    provider_settings,
)
from .request import Request, autoencoders, text_encoders
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
GRAPH_OPTION = "cuda_graph"
GRAPHS: Mapping[str, bool | None] = {"true": True, "false": False, "auto": None}
Opener: TypeAlias = Callable[..., Any]  # a graph and settings -> session
OWN_OPTIONS = (CACHE_OPTION, OPTION, GRAPH_OPTION)  # of a request, not passed on

__all__ = ["OrtSession", "kernels", "open_session", "probe"]


def device_index(name: str, text: str) -> int:
    """Read the provider option device_id: which of several GPUs; InputError for what is no number."""
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"{name}: option device_id: expected the number of a GPU, 0 for the first, found {text!r}")
    return int(text)


def graphs_asked(request: Request, text: str | None) -> bool | None:
    """Read the option cuda_graph: whether to capture CUDA graphs, None for where the session takes them.

    Text encoders have none whatever is asked for: ONNX Runtime leaves the position of a prompt's last token to the CPU,
    and refuses graphs of them.

    InputError for another text, for a provider without them, and for the provider's own name of the option.
    """
    name, provider = request.name, PROVIDERS[request.backend, request.device]
    if provider.graphs is None:
        if text is not None:
            raise InputError(f"{name}: option {GRAPH_OPTION}: {provider.name} has none; leave it out")
        return False
    if provider.graphs in request.options:
        raise InputError(f"{name}: option {provider.graphs}: give {GRAPH_OPTION} instead")
    if text is not None and text not in GRAPHS:
        raise InputError(f"{name}: option {GRAPH_OPTION}: expected 'true', 'false' or 'auto', found {text!r}")
    return False if name in text_encoders(request.bundle.manifest) else GRAPHS[text or "auto"]


def open_session(request: Request) -> OrtSession:
    """Open a component by the provider that serves the request's backend on its device.

    `request.options` go to the provider by its own names, three apart. "placement": "fail" raises BackendError where
    the provider has no kernel for a node that computes, "warn" logs it (see placement.py). "cache": "on" or "off" says
    whether what the provider compiles is kept in the bundle (see `cache_settings`), or the graph as the CPU runs it
    (see prepacked.py). "cuda_graph": "true", "false" or "auto" says whether CUDA graphs are captured (see ort_cuda.py).

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
        graphs=graphs_asked(request, own.get(GRAPH_OPTION)),
        cache=graph_cache(passed, own.get(CACHE_OPTION)),
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
        graphs: bool | None = False,
        cache: Path | None = None,
        patterns: bool = True,
        fold: bool = True,
    ) -> None:
        """Open `graph`, with `threads` of the CPU or as many as it has cores, `settings` being the provider's options.

        graphs: capture CUDA graphs; None: where ONNX Runtime can, and with a warning where it cannot.
        cache: on the CPU, a folder to keep the graph in as it is run, and to open it from: see prepacked.py.
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
        self._patterns = patterns
        self._fold = fold
        self._runs: CudaRuns | None = None
        open_it = functools.partial(self._open, backend, device, threads)
        if provider.memory == "cuda":
            self._session, self._runs = self._open_cuda(open_it, graph, provider, settings or {}, graphs)
        else:
            self._session = self._open_cached(open_it, graph, settings or {}, cache)
        if self._session.get_providers()[0] != provider.name:
            found = self._session.get_providers()[0]
            raise BackendError(f"{name}: asked onnxruntime for {provider.name}, it runs {found}")
        self.check_specs(specs(self._session.get_inputs()), specs(self._session.get_outputs()))
        if provider.name != CPU:
            check_placement(name, self._session, graph, provider.name, mode)

    def _open_cached(self, open_it: Opener, graph: Path, settings: Settings, cache: Path | None) -> Any:
        """The session, of the graph that is kept in `cache` where there is a cache and it can be used."""
        if cache is not None:
            path = kept(cache) or keep(self.name, cache, lambda path: open_it(graph, settings, save=path))
            if path is not None:
                try:
                    return open_it(path, settings, optimized=True)
                except BackendError as error:
                    warnings.warn(f"{self.name}: opened without the cache in {cache}: {error}", stacklevel=2)
        return open_it(graph, settings)

    def _open_cuda(
        self, open_it: Opener, graph: Path, provider: Provider, settings: Settings, graphs: bool | None
    ) -> tuple[Any, CudaRuns]:
        """The session, with graphs where they are wanted and can be had, and what runs it."""
        gpu, index = cupy_device(), device_index(self.name, settings.get("device_id", "0"))
        if index != gpu.index:  # a graph's arrays would have to lie on that GPU
            graphs = self._without_graphs(graphs, f"option device_id is {index}, CuPy's current GPU is {gpu.index}")
        session: Any = None
        if graphs is not False and provider.graphs is not None:
            try:
                session = open_it(graph, {**settings, provider.graphs: "1"})
            except BackendError as error:
                graphs = self._without_graphs(graphs, str(error))
        if session is None:
            graphs, session = False, open_it(graph, settings)
        return session, CudaRuns(
            self.name,
            session,
            (self.inputs, self.outputs),
            gpu,
            index,
            graphs=graphs is not False,
            asked=graphs is True,
        )

    def _without_graphs(self, graphs: bool | None, why: str) -> bool:
        """Go on without CUDA graphs; BackendError where the user asked for them."""
        if graphs:
            raise BackendError(f"{self.name}: no CUDA graph: {why}; leave {GRAPH_OPTION} out")
        if graphs is None:
            warnings.warn(f"{self.name}: runs without a CUDA graph: {why}", stacklevel=2)
        return False

    def _open(
        self,
        backend: str,
        device: str,
        threads: int | None,
        graph: Path,
        settings: Settings,
        *,
        save: Path | None = None,
        optimized: bool = False,
    ) -> Any:
        """The session of a graph; save: where to write what was made of it, optimized: whether it is such a one."""
        ort, provider = import_quietly(), PROVIDERS[backend, device]
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors: its warnings are about its own optimizer
        # A CUDA graph has its memory once and for all, and would have a block laid out for later runs beside it
        options.enable_mem_pattern = self._patterns and provider.graphs not in settings
        if threads is not None:
            options.intra_op_num_threads = threads
        if provider.name != CPU:
            options.add_session_config_entry(RECORD, "1")
        elif not self._fold:
            options.add_session_config_entry(*UNFOLDED)
        if optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if save is not None:
            options.optimized_model_filepath = str(save)
            for setting, text in SAVING.items():
                options.add_session_config_entry(setting, text)
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
        if self._runs is not None:
            return self._runs(arrays)
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._session.run(names, dict(arrays)), strict=True))

    def close(self) -> None:
        """Free the graph's memory; calling it again does nothing."""
        if self._runs is not None:
            self._runs.close()
        self._runs = None
        super().close()


def specs(values: Sequence[Any]) -> list[TensorSpec]:
    """Inputs or outputs as ONNX Runtime describes them."""
    return [TensorSpec(v.name, DTYPES.get(v.type, v.type), tuple(v.shape)) for v in values]


def shown(settings: Settings) -> str:
    """Options for a message."""
    return ", ".join(f"{name}={text}" for name, text in settings.items())
