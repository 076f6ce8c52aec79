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
from .manifest import Precision
from .session import Session


@dataclass(frozen=True)
class Backend:
    """An engine library.

    module is what it imports as, packages what may have installed it, devices maps a device to the extra that serves
    it, lacks are pairs of device and precision that it has no kernels for. `probe` raises BackendError where the
    installed library cannot use a device of this machine.
    """

    module: str
    packages: tuple[str, ...]
    devices: Mapping[str, str]
    lacks: frozenset[tuple[str, str]]
    open: Callable[[Bundle, str, str, int | None], Session]
    probe: Callable[[str], None]

    def installed(self) -> str | None:
        """Name and version of the package that is installed, or None."""
        if find_spec(self.module) is None:
            return None
        for package in self.packages:
            with suppress(PackageNotFoundError):
                return f"{package} {version(package)}"
        return self.module


def open_ort(bundle: Bundle, component: str, device: str, threads: int | None) -> Session:
    """Open a component under ONNX Runtime."""
    from .ort import OrtSession

    record = bundle.manifest.components[component]
    return OrtSession(component, bundle.path(record.graph), record, device, threads)


def probe_ort(device: str) -> None:
    """Raise BackendError where ONNX Runtime cannot use a device."""
    from .ort import probe

    probe(device)


BACKENDS: Mapping[str, Backend] = {
    "onnxruntime": Backend(
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
        {"cpu": "cpu", "cuda": "cuda"},
        frozenset({("cpu", "bf16")}),
        open_ort,
        probe_ort,
    ),
}


def check_backend(backend: str, device: str, precision: Precision) -> None:
    """Raise where a backend cannot run graphs of `precision` on `device`.

    InputError for an unknown backend or device, MissingExtraError where the library is not installed, BackendError for
    a precision that it has no kernels for.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend: expected {' or '.join(map(repr, BACKENDS))}, found {backend!r}")
    chosen = BACKENDS[backend]
    if device not in chosen.devices:
        devices = " or ".join(map(repr, chosen.devices))
        raise InputError(f"device of backend {backend!r}: expected {devices}, found {device!r}")
    if chosen.installed() is None:
        raise MissingExtraError(f"backend {backend!r}", chosen.packages[0], chosen.devices[device])
    if device == "cuda" and find_spec("cupy") is None:
        raise MissingExtraError("device 'cuda'", "cupy", "cuda")
    if (device, precision) in chosen.lacks:
        possible = [other for other in get_args(Precision) if (device, other) not in chosen.lacks]
        raise BackendError(
            f"backend {backend!r} has no {precision} kernels on device {device!r}; "
            f"export the bundle with --precision {' or '.join(possible)}"
        )


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


def open_component(bundle: Bundle, component: str, *, backend: str, device: str, threads: int | None = None) -> Session:
    """Open one component of a bundle, its graph's hash checked first.

    Raises BundleError for a damaged graph or a component the bundle does not have, and what `check_backend` raises.
    """
    check_backend(backend, device, bundle.manifest.precision)
    if component not in bundle.manifest.components:
        there = ", ".join(bundle.manifest.components)
        raise BundleError(f"{bundle.folder} has no component {component!r}; it has {there}")
    bundle.check_hashes([bundle.manifest.components[component].graph])
    return BACKENDS[backend].open(bundle, component, device, threads)
