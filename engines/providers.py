"""The providers of ONNX Runtime: what each backend's is called, where it comes from, and how it is set.

A provider that computes in another precision than it was asked for, unless told otherwise, is told otherwise here:
OpenVINO's takes bf16 on every CPU that has it, CUDA's takes TF32 for products of fp32.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from .caches import cache_folder
from .errors import BackendError, InputError, MissingExtraError
from .manifest import Precision
from .openvino import HINTS, OWN
from .prepacked import cpu
from .request import Request
from .trt import capability

CACHE_OPTION = "cache"
Settings = Mapping[str, str]
lock = Lock()


@dataclass(frozen=True)
class Provider:
    """A provider on one kind of device.

    name is ONNX Runtime's. memory says where arrays lie: NumPy's on the host, or CuPy's on a CUDA device. kernels are
    the precisions it computes in. plugin is the package that holds it, None where the build of onnxruntime does;
    libraries is a package that loads what the provider links to. settings gives its options for a request, and cache
    those that keep what it compiles in a folder; cached says whether it does so unasked. prepacks: kandrt keeps graphs
    as the provider runs them. graphs is the option that has ONNX Runtime capture CUDA graphs. absent says why a device
    may be missing.
    """

    name: str
    memory: Literal["host", "cuda"]
    kernels: frozenset[Precision]
    package: str = "onnxruntime"
    plugin: str | None = None
    kind: Literal["CPU", "GPU"] = "CPU"
    libraries: str | None = None
    settings: Callable[[Request, Settings], Settings] = lambda request, cache: cache  # noqa: ARG005
    cache: Callable[[Path], Settings] | None = None
    cached: bool = False
    prepacks: bool = False
    graphs: str | None = None
    absent: str = ""
    takes_options: bool = True


def cuda_settings(request: Request, cache: Settings) -> Settings:
    """Fp32 is fp32: TF32, which this provider takes unasked, keeps 10 bits of a product's factors.

    Of networks in 16 bits TF32 costs nothing that they have, and without it ONNX Runtime 1.31 keeps their convolutions
    off the tensor cores too: on an H100 a decoder step then takes 87 ms instead of 26. Memory is taken as it is needed,
    not in powers of two: 3.5 GB there instead of 10. Kernels are looked up rather than tried out at every new size,
    which takes 2.6 s of a first step and makes no later one shorter.
    """
    own = {
        "use_tf32": "0" if request.computes == "fp32" else "1",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    return {**own, **cache, **request.options}


def own_options(request: Request, cache: Settings) -> Settings:
    """What was asked for, by the provider's own names."""
    return {**cache, **request.options}


def openvino_settings(request: Request, cache: Settings) -> Settings:
    """OpenVINO's properties; the provider takes them in this form alone, and its own options without effect."""
    for name in OWN.keys() & request.options.keys():
        raise InputError(f"{request.name}: option {name}: give {OWN[name]} instead")
    properties: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": HINTS[request.computes],  # left out, it is bf16 on every CPU that has it
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    if request.threads is not None:
        properties["INFERENCE_NUM_THREADS"] = request.threads
    return {"load_config": json.dumps({"CPU": {**properties, **cache, **request.options}})}


ALL: frozenset[Precision] = frozenset({"fp32", "fp16", "bf16"})
PROVIDERS: Mapping[tuple[str, str], Provider] = {
    ("onnxruntime", "cpu"): Provider(
        "CPUExecutionProvider",
        "host",
        frozenset({"fp32", "fp16"}),
        prepacks=True,
        takes_options=False,  # fp16 is in fp32
    ),
    ("onnxruntime", "cuda"): Provider(
        "CUDAExecutionProvider", "cuda", ALL, settings=cuda_settings, graphs="enable_cuda_graph"
    ),
    ("onnxruntime-tensorrt", "cuda"): Provider(
        "TensorrtExecutionProvider",
        "cuda",
        ALL,
        package="tensorrt",
        libraries="tensorrt",
        settings=own_options,
        cache=lambda folder: {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(folder),
        },
        cached=True,
    ),
    # bf16 is left out where the CPU has none: see `kernels`.
    ("onnxruntime-openvino", "cpu"): Provider(
        "OpenVINOExecutionProvider",
        "host",
        ALL,
        package="onnxruntime-ep-openvino",
        plugin="onnxruntime_ep_openvino",
        settings=openvino_settings,
        # What it compiles on a CPU in seconds holds the weights a second time: only where asked for.
        cache=lambda folder: {"CACHE_DIR": str(folder)},
        absent="it takes Intel's CPUs alone; backend 'openvino' runs on this one too",
    ),
    ("onnxruntime-tensorrt-rtx", "cuda"): Provider(
        "NvTensorRTRTXExecutionProvider",
        "cuda",
        ALL,
        package="onnxruntime-ep-nv-tensorrt-rtx-cu13",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        kind="GPU",
        settings=own_options,
        cache=lambda folder: {"nv_runtime_cache_path": str(folder)},
        cached=True,
        absent="it needs an NVIDIA GPU of compute capability 8.6, 8.9 or 12.0 and later, and NVIDIA's driver",
    ),
    ("onnxruntime-webgpu", "gpu"): Provider(
        "WebGpuExecutionProvider",
        "host",
        frozenset({"fp32", "fp16"}),
        package="onnxruntime-ep-webgpu",
        plugin="onnxruntime_ep_webgpu",
        kind="GPU",
        settings=own_options,
        absent="it needs a GPU and, on Linux, the Vulkan loader libvulkan.so.1",
    ),
}
TYPED = 11  # the first version of TensorRT that computes layers in the types that the graph gives them, always


def import_quietly() -> Any:
    """Import onnxruntime without its telemetry, which reports to its makers and keeps an identifier in the user's home.

    Its official builds do from 1.31 on, unless the environment says otherwise before it is imported; an
    ORT_DISABLE_TELEMETRY that is set stays as it is.
    """
    if "onnxruntime" not in sys.modules:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        if find_spec("onnxruntime") is None:
            raise MissingExtraError("onnxruntime", "onnxruntime", "cpu") from error
        raise BackendError(f"onnxruntime cannot be used: {error}; install it again") from error
    return onnxruntime


def kernels(backend: str, device: str) -> frozenset[Precision]:
    """What a provider computes in on this machine without emulating it."""
    provider = PROVIDERS[backend, device]
    if backend == "onnxruntime-tensorrt" and int(installed(provider.package).partition(".")[0] or 0) < TYPED:
        return frozenset({"fp32"})  # before, it may compute in 16 bits what an fp16 graph has in 32
    if backend == "onnxruntime-openvino":
        capabilities = [found.ep_metadata.get("OPTIMIZATION_CAPABILITIES", "") for found in devices(backend, device)]
        return provider.kernels if any("BF16" in each for each in capabilities) else provider.kernels - {"bf16"}
    return provider.kernels


def installed(package: str) -> str:
    """The version of a package, "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def probe(backend: str, device: str) -> None:
    """Raise BackendError where the installed onnxruntime, or this machine, cannot use a provider on `device`."""
    provider, available = PROVIDERS[backend, device], import_quietly().get_available_providers()
    if provider.libraries is not None:
        load_libraries(backend, provider.libraries)
    if provider.plugin is not None:
        if not devices(backend, device):
            raise BackendError(f"backend {backend!r}: {provider.name} finds no device: {provider.absent}")
    elif provider.name not in available:
        raise BackendError(
            f"device {device!r}: this build of onnxruntime has no {provider.name} "
            f"(it has {', '.join(available)}); run: pip install 'kandrt[{device}]'"
        )
    if provider.memory == "cuda":
        capability()
    if provider.name == "CUDAExecutionProvider":
        preload()


@functools.cache
def preload() -> None:
    """Load CUDA's libraries from NVIDIA's Python packages, which ONNX Runtime does not search unasked.

    Without those packages the system's are used; what is found nowhere the provider names when it is opened.
    """
    ort = import_quietly()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()


def load_libraries(backend: str, package: str) -> None:
    """Import a package for the libraries that it loads, which a provider wants to find loaded."""
    try:
        import_module(package)
    except Exception as error:  # a package that is installed and broken may raise anything
        raise BackendError(f"backend {backend!r}: {package} cannot be used: {error}; install it again") from error


def devices(backend: str, device: str) -> list[Any]:
    """The devices that a plugin offers (`OrtEpDevice`); BackendError where it cannot be registered."""
    provider, ort = PROVIDERS[backend, device], import_quietly()

    def found() -> list[Any]:
        return [
            each for each in ort.get_ep_devices()
            if each.ep_name == provider.name and each.device.type.name == provider.kind
        ]  # fmt: skip

    with lock:
        if not hasattr(ort, "register_execution_provider_library"):
            raise BackendError(f"backend {backend!r} needs onnxruntime 1.23 or later, found {ort.__version__}")
        if (offered := found()) or provider.plugin is None:
            return offered
        try:
            register(provider.plugin)
        except Exception as error:  # a package that is installed and broken may raise anything
            reason = " ".join(str(error).split())
            raise BackendError(f"backend {backend!r}: {provider.package} cannot be used: {reason}") from error
        return found()


@functools.cache
def register(plugin: str) -> None:
    """Make a plugin's provider known to ONNX Runtime, once a process: it refuses a second time."""
    package = import_module(plugin)
    import_quietly().register_execution_provider_library(plugin, package.get_library_path())


def provider_settings(request: Request, cache: str | None = None) -> Settings:
    """The options to open a component with: what kandrt sets, the cache's as `cache_settings` says, the request's last.

    Raises InputError for options where the provider takes none, and for another `cache` than there can be.
    """
    provider = PROVIDERS[request.backend, request.device]
    if request.options and not provider.takes_options:
        raise InputError(f"{request.name}: {provider.name} takes no options, found {', '.join(request.options)}")
    return provider.settings(request, cache_settings(request, cache))


def cache_settings(request: Request, asked: str | None) -> Settings:
    """The options that keep what a provider compiles in the bundle, where it has any and the folder can be written.

    `asked` is "on", "off" or None for what is usual. Raises InputError for anything else, or "on" without a cache.
    """
    provider = PROVIDERS[request.backend, request.device]
    if asked not in (None, "on", "off"):
        raise InputError(f"{request.name}: option {CACHE_OPTION!r}: expected 'on' or 'off', found {asked!r}")
    if provider.cache is None:
        if asked == "on" and not provider.prepacks:
            raise InputError(f"{request.name}: {provider.name} has no cache")
        return {}
    if asked == "off" or (asked is None and not provider.cached):
        return {}
    folder = versioned_folder(request)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return {}
    return provider.cache(folder) if os.access(folder, os.W_OK) else {}


def graph_cache(request: Request, asked: str | None) -> Path | None:
    """Where a graph is kept as the CPU runs it, if that is asked for; `asked` as `cache_settings` takes it."""
    prepacks = PROVIDERS[request.backend, request.device].prepacks
    return versioned_folder(request, cpu()) if prepacks and asked == "on" else None


def versioned_folder(request: Request, *more: str) -> Path:
    """The folder of a component in the bundle's caches, for the versions of the provider and of ONNX Runtime."""
    packages = dict.fromkeys((PROVIDERS[request.backend, request.device].package, "onnxruntime"))
    versions = [installed(package) or import_quietly().__version__ for package in packages]
    return cache_folder(request, "-".join([*versions, *more]))
