"""TensorRT and TensorRT-RTX, loaded: two packages with one API."""

from __future__ import annotations

import functools
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .errors import BackendError, InputError, MissingExtraError
from .plans import Builder

LOG_LINES = 2000  # kept of what the library says
OLDEST = (10, 12)  # the first TensorRT whose strongly typed networks behave as those of 11


@dataclass(frozen=True)
class Package:
    """How one of them is installed and imported; architectures are the GPUs that it builds for without having one."""

    module: str
    packages: tuple[str, ...]
    architectures: tuple[str, ...] = ()


PACKAGES: dict[Builder, Package] = {
    "tensorrt": Package("tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")),
    "tensorrt-rtx": Package(
        "tensorrt_rtx",
        ("tensorrt-rtx-cu13", "tensorrt-rtx", "tensorrt-rtx-cu12"),
        ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
    ),
}
# What people call them -> compute capability
GPU_NAMES = {
    "turing": "sm75", "ampere": "sm86", "ada": "sm89", "blackwell": "sm120", "a100": "sm80", "rtx-20": "sm75",
    "rtx-30": "sm86", "rtx-40": "sm89", "rtx-50": "sm120",
}  # fmt: skip


@functools.cache
def library(builder: Builder) -> ModuleType:
    """The module; MissingExtraError where it is not installed, BackendError where it cannot be loaded or is too old."""
    package = PACKAGES[builder]
    if find_spec(package.module) is None:
        raise MissingExtraError(f"backend {builder!r}", package.packages[0], builder)
    try:
        module = import_module(package.module)
    except Exception as error:  # missing shared libraries are ImportError, OSError, FileNotFoundError or RuntimeError
        raise BackendError(
            f"{builder} {library_version(builder)} is installed and cannot be loaded: {' '.join(str(error).split())}; "
            f"its shared libraries may be missing; run: pip install --force-reinstall {package.packages[0]}"
        ) from error
    if not hasattr(module, "Builder"):  # an empty folder of that name, or the package without its bindings
        raise BackendError(
            f"{builder} is installed without its library; run: pip install --force-reinstall {package.packages[0]}"
        )
    if builder == "tensorrt" and release(module.__version__) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendError(
            f"tensorrt: expected {oldest} or later, found {module.__version__}; run: pip install --upgrade tensorrt"
        )
    return module


def release(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())


@functools.cache
def library_version(builder: Builder) -> str:
    """The version of the installed package: "none" where there is none. Costs no import of the library."""
    for package in PACKAGES[builder].packages:
        with suppress(PackageNotFoundError):
            return version(package)
    return "none"


class Messages:
    """What a library said, the last LOG_LINES lines: severity and text."""

    def __init__(self) -> None:
        self._lines: deque[tuple[str, str]] = deque(maxlen=LOG_LINES)

    def add(self, severity: str, text: str) -> None:
        """Called by the library's logger, from any thread."""
        self._lines.append((severity, text.strip()))

    def lines(self, *severities: str) -> list[str]:
        """The lines of these severities ("ERROR", "WARNING", "INFO"), all of them where none is named."""
        return [text for severity, text in list(self._lines) if not severities or severity in severities]

    def problem(self, beside: str | None = None) -> str:
        """The last errors in one line; those that hold `beside` only where there are no others."""
        errors = self.lines("ERROR", "INTERNAL_ERROR")
        chosen = [line for line in errors if beside is None or beside not in line] or errors
        return "; ".join(chosen[-3:]) or "the library does not say why"

    def clear(self) -> None:
        """Forget everything."""
        self._lines.clear()


@functools.cache
def logger(builder: Builder) -> tuple[Any, Messages]:
    """The library's logger and what it hears; one a process, because the library keeps the first it is given."""
    trt, messages = library(builder), Messages()

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]  # the library's own base class, known when it is loaded
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            name = str(severity).rpartition(".")[2]
            if name != "VERBOSE":
                messages.add(name, msg)

    return Logger(), messages


def gpu_names(builder: Builder) -> tuple[str, ...]:
    """What `resolve_gpu` takes for a builder that needs no GPU."""
    architectures = PACKAGES[builder].architectures
    return (*architectures, *(name for name, sm in GPU_NAMES.items() if sm in architectures))


def resolve_gpu(builder: Builder, name: str) -> str:
    """The compute capability of a GPU named by it ("sm89", "8.9") or by its kind ("ada"), as "sm89".

    Raises InputError that lists the valid names, and BackendError for a builder that builds for the GPU present only.
    """
    architectures = PACKAGES[builder].architectures
    if not architectures:
        raise BackendError(
            f"--gpu {name}: {builder} builds for the GPU of the machine it runs on; leave --gpu out there, "
            f"or use --backend tensorrt-rtx, which builds for other GPUs"
        )
    plain = name.strip().lower()
    capability = GPU_NAMES.get(plain, "sm" + plain.removeprefix("sm").replace(".", "").replace("_", ""))
    if capability not in architectures:
        raise InputError(
            f"--gpu {name}: {builder} builds for {', '.join(gpu_names(builder))}; "
            f"engines for other GPUs, such as H100, are built on them with --backend tensorrt"
        )
    return capability


def check_gpu(builder: Builder) -> None:
    """Raise BackendError where the builder's engines do not run on this machine's GPU, and what `capability` raises."""
    gpu, architectures = capability(), PACKAGES[builder].architectures
    if architectures and gpu not in architectures and number(gpu) < number(architectures[-1]):
        raise BackendError(
            f"backend {builder!r} does not run on this GPU, which is {gpu}; "
            f"it runs on {', '.join(architectures)} and later; use backend 'tensorrt' or 'onnxruntime'"
        )


def number(capability: str) -> int:
    """Of a compute capability: 89 of "sm89"."""
    return int(capability.removeprefix("sm"))


def capability(extra: str = "cuda") -> str:
    """The compute capability of the GPU of this machine, such as "sm89"; `extra` is what to install CuPy by.

    Raises MissingExtraError without CuPy, BackendError without a GPU or with a driver that is missing or too old.
    """
    if find_spec("cupy") is None:
        raise MissingExtraError("finding the GPU", "cupy-cuda13x", extra)
    try:
        import cupy  # type: ignore[import-not-found, import-untyped, unused-ignore]

        return f"sm{cupy.cuda.Device().compute_capability}"
    except Exception as error:  # CuPy's errors of the driver share no base class, and its libraries may be missing
        raise BackendError(
            f"no usable GPU: {' '.join(str(error).split())}; check the driver with nvidia-smi, "
            f"a driver older than the CUDA that CuPy was built for has to be updated"
        ) from error
