"""The backends by name: what each needs, where it runs, and how it opens a component of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import get_args

from .bundle import Bundle
from .errors import BackendError, BundleError, InputError, KandrtError, MissingExtraError
from .manifest import Manifest, Precision
from .session import Session


@dataclass(frozen=True)
class Backend:
    """An engine library.

    module is what it imports as, packages what may have installed it, devices maps a device to the extra that serves
    it, computes maps a precision that a bundle was exported in to those that the library can compute it in. `kernels`
    gives the precisions that the installed library has for a device of this machine, `probe` raises BackendError where
    it cannot use the device.
    """

    module: str
    packages: tuple[str, ...]
    devices: Mapping[str, str]
    computes: Mapping[Precision, tuple[Precision, ...]]
    kernels: Callable[[str], frozenset[Precision]]
    open: Callable[[Bundle, str, str, Precision, int | None], Session]
    probe: Callable[[str], None]

    def installed(self) -> str | None:
        """Name and version of the package that is installed, or None."""
        if find_spec(self.module) is None:
            return None
        for package in self.packages:
            with suppress(PackageNotFoundError):
                return f"{package} {version(package)}"
        return self.module


def open_ort(bundle: Bundle, component: str, device: str, _: Precision, threads: int | None) -> Session:
    """Open a component under ONNX Runtime, which computes what the graph says."""
    from .ort import OrtSession

    record = bundle.manifest.components[component]
    return OrtSession(component, bundle.path(record.graph), record, device, threads)


def ort_kernels(device: str) -> frozenset[Precision]:
    """What ONNX Runtime computes in; fp16 is in fp32 on the CPU."""
    return frozenset({"fp32", "fp16"} if device == "cpu" else {"fp32", "fp16", "bf16"})


def probe_ort(device: str) -> None:
    """Raise BackendError where ONNX Runtime cannot use a device."""
    from .ort import probe

    probe(device)


def open_openvino(bundle: Bundle, component: str, _: str, precision: Precision, threads: int | None) -> Session:
    """Open a component under OpenVINO."""
    from .openvino import OpenVinoSession

    record = bundle.manifest.components[component]
    precision = "fp32" if component in contexts(bundle.manifest) else precision
    return OpenVinoSession(component, bundle.path(record.graph), record, precision, threads)


def openvino_kernels(device: str) -> frozenset[Precision]:
    """What OpenVINO computes in on this machine; BackendError where it cannot use the device."""
    from .openvino import kernels

    return kernels(device)


def probe_openvino(device: str) -> None:
    """Raise BackendError where OpenVINO cannot use a device."""
    from .openvino import probe

    probe(device)


def contexts(manifest: Manifest) -> frozenset[str]:
    """The components that run once a request and embed timesteps, which takes fp32: see docs/bundle.md.

    Whatever precision is asked for, their fp32 layers stay in fp32.
    """
    names = {record.context for record in manifest.decoders.values()}
    return frozenset(names if manifest.prior is None else names | {manifest.prior.context})


BACKENDS: Mapping[str, Backend] = {
    "onnxruntime": Backend(
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
        {"cpu": "cpu", "cuda": "cuda"},
        {"fp32": ("fp32",), "fp16": ("fp16",), "bf16": ("bf16",)},
        ort_kernels,
        open_ort,
        probe_ort,
    ),
    # It keeps layers that a graph has in 16 bits in those 16 bits, or may.
    "openvino": Backend(
        "openvino",
        ("openvino",),
        {"cpu": "openvino"},
        {"fp32": ("fp32", "bf16"), "fp16": ("fp16",), "bf16": ("bf16",)},
        openvino_kernels,
        open_openvino,
        probe_openvino,
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
        raise MissingExtraError("device 'cuda'", "cupy", "cuda")
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
    advice += [
        f"use backend {name!r}"
        for name, other in BACKENDS.items()
        if device in other.devices and precision in other.computes[exported]
    ]
    raise BackendError(
        f"backend {backend!r} computes bundles exported in {exported} only in {' or '.join(possible)}, "
        f"found precision {precision!r}; {', or '.join(advice) or 'no backend can on this device'}"
    )


def precisions(backend: str, device: str) -> list[Precision]:
    """What an installed backend has kernels for on a device, in the order of `Precision`."""
    kernels = BACKENDS[backend].kernels(device)
    return [precision for precision in get_args(Precision) if precision in kernels]


def unusable(backend: str, device: str) -> str | None:
    """Why a device cannot be used by a backend on this machine, or None."""
    try:
        check_backend(backend, device, "fp32")
        BACKENDS[backend].probe(device)
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
) -> Session:
    """Open one component of a bundle, its graph's hash checked first, to compute in `precision` (None: as exported).

    Raises BundleError for a damaged graph or a component the bundle does not have, and what `check_backend` raises.
    """
    exported = bundle.manifest.precision
    check_backend(backend, device, exported, precision)
    if component not in bundle.manifest.components:
        there = ", ".join(bundle.manifest.components)
        raise BundleError(f"{bundle.folder} has no component {component!r}; it has {there}")
    bundle.check_hashes([bundle.manifest.components[component].graph])
    return BACKENDS[backend].open(bundle, component, device, precision or exported, threads)
