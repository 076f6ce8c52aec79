"""The backends by name: what each needs, where it runs, and how it opens a component of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Protocol, cast, get_args

from .bundle import Bundle
from .errors import BackendError, BundleError, InputError, KandrtError, MissingExtraError
from .manifest import Precision
from .request import Request
from .session import Session


class Implementation(Protocol):
    """What a file offers that opens components with an engine library; one may serve several backends."""

    def kernels(self, backend: str, device: str) -> frozenset[Precision]:
        """The precisions that the installed library has for a device of this machine."""
        ...

    def probe(self, backend: str, device: str) -> None:
        """Raise BackendError where the installed library, or this machine, cannot use the device."""
        ...

    def open_session(self, request: Request) -> Session:
        """Open a component; raises BackendError where the library cannot run it."""
        ...


@dataclass(frozen=True)
class Backend:
    """An engine library.

    module is what it imports as, packages what may have installed it, devices maps a device to the extra that serves
    it, computes maps a precision that a bundle was exported in to those that the library can compute it in. `sessions`
    names the file of this folder that uses the library: an `Implementation`.
    """

    module: str
    packages: tuple[str, ...]
    devices: Mapping[str, str]
    computes: Mapping[Precision, tuple[Precision, ...]]
    sessions: str

    @property
    def implementation(self) -> Implementation:
        """The file that uses the library, imported."""
        return cast("Implementation", import_module(f".{self.sessions}", __package__))

    def installed(self) -> str | None:
        """Name and version of the package that is installed, or None."""
        if find_spec(self.module) is None:
            return None
        for package in self.packages:
            with suppress(PackageNotFoundError):
                return f"{package} {version(package)}"
        return self.module


BACKENDS: Mapping[str, Backend] = {
    "onnxruntime": Backend(
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
        {"cpu": "cpu", "cuda": "cuda"},
        {"fp32": ("fp32",), "fp16": ("fp16",), "bf16": ("bf16",)},
        "ort",
    ),
    # It keeps layers that a graph has in 16 bits in those 16 bits, or may.
    "openvino": Backend(
        "openvino",
        ("openvino",),
        {"cpu": "openvino"},
        {"fp32": ("fp32", "bf16"), "fp16": ("fp16",), "bf16": ("bf16",)},
        "openvino",
    ),
    # Providers of ONNX Runtime
    "onnxruntime-openvino": Backend(
        "onnxruntime_ep_openvino",
        ("onnxruntime-ep-openvino",),
        {"cpu": "onnxruntime-openvino"},
        {"fp32": ("fp32", "bf16"), "fp16": ("fp16",), "bf16": ("bf16",)},
        "ort",
    ),
    "onnxruntime-tensorrt": Backend(
        "tensorrt",
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        {"cuda": "cuda,tensorrt"},
        {"fp32": ("fp32",), "fp16": ("fp16",), "bf16": ("bf16",)},
        "ort",
    ),
    "onnxruntime-tensorrt-rtx": Backend(
        "onnxruntime_ep_nv_tensorrt_rtx",
        ("onnxruntime-ep-nv-tensorrt-rtx-cu13",),
        {"cuda": "onnxruntime-tensorrt-rtx"},
        {"fp32": ("fp32",), "fp16": ("fp16",), "bf16": ("bf16",)},
        "ort",
    ),
    "onnxruntime-webgpu": Backend(
        "onnxruntime_ep_webgpu",
        ("onnxruntime-ep-webgpu",),
        {"gpu": "onnxruntime-webgpu"},
        {"fp32": ("fp32",), "fp16": ("fp16",), "bf16": ("bf16",)},
        "ort",
    ),
    # Both compute what a graph says: its plans are built of the graph.
    "tensorrt": Backend(
        "tensorrt",
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        {"cuda": "tensorrt"},
        {"fp32": ("fp32",), "fp16": ("fp16",), "bf16": ("bf16",)},
        "trt_session",
    ),
    "tensorrt-rtx": Backend(
        "tensorrt_rtx",
        ("tensorrt-rtx-cu13", "tensorrt-rtx", "tensorrt-rtx-cu12"),
        {"cuda": "tensorrt-rtx"},
        {"fp32": ("fp32",), "fp16": ("fp16",), "bf16": ("bf16",)},
        "trt_session",
    ),
}


def check_backend(backend: str, device: str, exported: Precision, precision: Precision | None = None) -> None:
    """Raise where a backend cannot compute a bundle exported in `exported` in `precision` (None: as exported).

    InputError for an unknown backend, device or precision, MissingExtraError where the library is not installed,
    BackendError for a precision that it has no kernels for, or cannot compute this bundle in.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend: expected {' or '.join(map(repr, BACKENDS))}, found {backend!r}")
    chosen = BACKENDS[backend]
    if device not in chosen.devices:
        devices = " or ".join(map(repr, chosen.devices))
        raise InputError(f"device of backend {backend!r}: expected {devices}, found {device!r}")
    if precision not in (None, *get_args(Precision)):
        raise InputError(f"precision: expected {' or '.join(map(repr, get_args(Precision)))}, found {precision!r}")
    if chosen.installed() is None:
        raise MissingExtraError(f"backend {backend!r}", chosen.packages[0], chosen.devices[device])
    if device == "cuda" and find_spec("cupy") is None:
        raise MissingExtraError("device 'cuda'", "cupy", chosen.devices[device])
    check_precision(backend, device, exported, precision or exported)


def check_precision(backend: str, device: str, exported: Precision, precision: Precision) -> None:
    """Raise BackendError where a backend cannot compute a bundle exported in `exported` in `precision`."""
    chosen = BACKENDS[backend]
    kernels, possible = precisions(backend, device), chosen.computes[exported]
    if precision in possible and precision in kernels:
        return
    if precision in possible:
        problem = f"backend {backend!r} has no {precision} kernels on device {device!r}"
        rest = [other for other in possible if other in kernels]
        raise BackendError(
            f"{problem}; this bundle can be computed in {' or '.join(rest)}"
            if rest
            else f"{problem}; export the bundle with --precision {' or '.join(kernels)}"
        )
    advice = [f"export it with --precision {precision}"] if precision in kernels else []
    others = (name for name, other in BACKENDS.items() if device in other.devices)
    advice += [f"use backend {name!r}" for name in others if precision in BACKENDS[name].computes[exported]][:1]
    raise BackendError(
        f"backend {backend!r} computes bundles exported in {exported} only in {' or '.join(possible)}, "
        f"found precision {precision!r}; {', or '.join(advice) or 'no backend can on this device'}"
    )


def precisions(backend: str, device: str) -> list[Precision]:
    """What an installed backend has kernels for on a device, in the order of `Precision`."""
    kernels = BACKENDS[backend].implementation.kernels(backend, device)
    return [precision for precision in get_args(Precision) if precision in kernels]


def unusable(backend: str, device: str, exported: Precision = "fp32", precision: Precision | None = None) -> str | None:
    """Why a device cannot be used by a backend on this machine, for a bundle of that precision, or None."""
    try:
        check_backend(backend, device, exported, precision)
        BACKENDS[backend].implementation.probe(backend, device)
    except KandrtError as error:
        return str(error)
    except Exception as error:  # a library that is installed and broken may raise anything
        return f"cannot be used: {' '.join(str(error).split())}"
    return None


def open_component(
    bundle: Bundle,
    component: str,
    *,
    backend: str,
    device: str,
    precision: Precision | None = None,
    threads: int | None = None,
    options: Mapping[str, str] | None = None,
) -> Session:
    """Open one component of a bundle, its graph's hash checked first, to compute in `precision` (None: as exported).

    `options` are passed on to the engine library by its own names. Raises BundleError for a damaged graph or a
    component the bundle does not have, and what `check_backend` raises.
    """
    exported = bundle.manifest.precision
    check_backend(backend, device, exported, precision)
    if component not in bundle.manifest.components:
        there = ", ".join(bundle.manifest.components)
        raise BundleError(f"{bundle.folder} has no component {component!r}; it has {there}")
    bundle.check_hashes([bundle.manifest.components[component].graph])
    request = Request(bundle, component, backend, device, precision or exported, threads, options or {})
    return BACKENDS[backend].implementation.open_session(request)
