"""The machine that a benchmark ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from ...engines.memory import machine_memory
from ..doctor import installed
from .contenders import has_bf16
from .peaks import CONVOLUTIONS, GEMM_MEMORY, GEMM_SIDE, SMALL_GEMM_SIDE, measured_peaks
from .results import Machine

LIBRARIES = (
    "kandrt", "numpy", "onnxruntime", "onnxruntime-openvino", "openvino", "torch", "diffusers", "transformers",
)  # fmt: skip
CPU_INFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def inspect_machine(threads: int, peaks: bool = True) -> Machine:
    """This machine; with `peaks` what it reaches with `threads` threads, in some seconds."""
    memory = machine_memory()
    side = GEMM_SIDE if memory is None or memory >= GEMM_MEMORY else SMALL_GEMM_SIDE
    return Machine(
        cpu=cpu_name(),
        cores=usable_cores(),
        memory=memory,
        platform=platform.platform(),
        python=platform.python_version(),
        libraries={name: version for name in LIBRARIES if (version := installed(name)) is not None},
        peaks=measured_peaks(threads, side, CONVOLUTIONS, has_bf16() is True) if peaks else {},
    )


def usable_cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The CPU's model, with its caches where the system tells them."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    name = next(named, "") or platform.processor() or platform.machine()
    caches = cache_sizes()
    return f"{name} ({', '.join(f'{each} {size}' for each, size in caches.items())})" if caches else name


def cache_sizes() -> dict[str, str]:
    """Sizes of the first CPU's caches by name, as the system writes them: {"L2": "1024K"}."""
    sizes = {}
    for folder in sorted(CACHES.glob("index*")):
        try:
            kind, level, size = ((folder / each).read_text().strip() for each in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            sizes[f"L{level}"] = size
    return sizes
