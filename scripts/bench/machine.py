"""The machine that a benchmark ran on, and what it can do at most: matrix products and convolutions, measured."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engines.memory import machine_memory
from ...engines.providers import import_quietly
from ..doctor import installed
from .results import Machine

LIBRARIES = (
    "kandrt", "numpy", "onnxruntime", "onnxruntime-openvino", "openvino", "torch", "diffusers", "transformers",
)  # fmt: skip
CPU_INFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

GEMM_SIDE, SMALL_GEMM_SIDE = 4096, 1024
GEMM_MEMORY = 4 * 2**30  # with less than that the small product is taken
# Channels and side of the UNet's 3x3 convolutions at 512 pixels, two rows: Kandinsky 2.x
CONVOLUTIONS = ((384, 64), (768, 32), (1152, 16), (1536, 8))
REPEATS = 3

FLOAT = 1
IR_VERSION, OPSET = 10, 21


def inspect_machine(threads: int, peaks: bool = True) -> Machine:
    """This machine; with `peaks` what ONNX Runtime reaches on it in fp32 with `threads` threads, in some seconds."""
    memory = machine_memory()
    side = GEMM_SIDE if memory is None or memory >= GEMM_MEMORY else SMALL_GEMM_SIDE
    return Machine(
        cpu=cpu_name(),
        cores=usable_cores(),
        memory=memory,
        platform=platform.platform(),
        python=platform.python_version(),
        libraries={name: version for name in LIBRARIES if (version := installed(name)) is not None},
        peaks=measured_peaks(threads, side, CONVOLUTIONS) if peaks else {},
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


def measured_peaks(threads: int, side: int, convolutions: Sequence[tuple[int, int]]) -> dict[str, float]:
    """FLOP/s of a product of square matrices, and of 3x3 convolutions of (channels, side), the best of some runs."""
    draw = np.random.default_rng(0).standard_normal
    square = draw((side, side), np.float32)
    peaks = {f"gemm {side} fp32": 2 * side**3 / best_seconds(matrix_product(square), square, threads)}
    for channels, length in convolutions:
        kernel = draw((channels, channels, 3, 3), np.float32)
        sample = draw((2, channels, length, length), np.float32)
        flops = 2 * channels * channels * 9 * sample.shape[0] * length**2
        seconds = best_seconds(convolution(kernel), sample, threads)
        peaks[f"conv3x3 {channels}@{length} fp32"] = flops / seconds
    return peaks


def best_seconds(model: bytes, sample: NDArray[np.float32], threads: int) -> float:
    """The least of some runs' seconds, of a model with one input "x"."""
    session, seconds = open_model(model, threads), []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        session.run(None, {"x": sample})
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def open_model(model: bytes, threads: int) -> Any:
    """A model under ONNX Runtime."""
    ort = import_quietly()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# Models of one node, written by hand: the package onnx is there only where checkpoints are exported


def matrix_product(weight: NDArray[np.float32]) -> bytes:
    """x [N, K] times `weight` [K, M]."""
    return one_node("MatMul", weight, 2, b"")


def convolution(weight: NDArray[np.float32]) -> bytes:
    """x [N, C, H, W] convolved with `weight` [C, C, 3, 3], padded by one."""
    pads = text(1, "pads") + b"".join(number(8, 1) for _ in range(4)) + number(20, 7)  # 7: INTS
    return one_node("Conv", weight, 4, message(5, pads))


def one_node(operator: str, weight: NDArray[np.float32], rank: int, attributes: bytes) -> bytes:
    """A ModelProto: y = operator(x, w), w a constant, x of `rank` axes of any length."""
    node = text(1, "x") + text(1, "w") + text(2, "y") + text(4, operator) + attributes
    constant = b"".join(number(1, length) for length in weight.shape) + number(2, FLOAT) + text(8, "w")
    constant += message(9, weight.astype("<f4").tobytes())
    graph = message(1, node) + text(2, operator) + message(5, constant)
    graph += message(11, value("x", rank)) + message(12, value("y", rank))
    return number(1, IR_VERSION) + message(7, graph) + message(8, text(1, "") + number(2, OPSET))


def value(name: str, rank: int) -> bytes:
    """A ValueInfoProto of float32 with axes of any length."""
    shape = b"".join(message(1, b"") for _ in range(rank))
    return text(1, name) + message(2, message(1, number(1, FLOAT) + message(2, shape)))


def number(field: int, value: int) -> bytes:
    """A protobuf field with a varint."""
    return varint(field << 3) + varint(value)


def message(field: int, data: bytes) -> bytes:
    """A protobuf field with bytes: a message, or a string."""
    return varint(field << 3 | 2) + varint(len(data)) + data


def text(field: int, value: str) -> bytes:
    """A protobuf field with a string."""
    return message(field, value.encode())


def varint(value: int) -> bytes:
    """A number of 0 or more, 7 bits a byte, low ones first."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])
