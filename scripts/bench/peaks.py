"""What a machine can do at most: matrix products and convolutions in fp32, bf16 and int8, as ONNX models of one node.

The models are written by hand: the package onnx is there only where checkpoints are exported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engines.providers import import_quietly

GEMM_SIDE, SMALL_GEMM_SIDE = 4096, 1024
GEMM_MEMORY = 4 * 2**30  # with less than that the small product is taken
# Channels and side of the UNet's 3x3 convolutions at 512 pixels, two rows: Kandinsky 2.x
CONVOLUTIONS = ((384, 64), (768, 32), (1152, 16), (1536, 8))
REPEATS = 3

IR_VERSION, OPSET = 10, 21
TYPES = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.int8): 3, np.dtype(np.int32): 6}
ZERO_POINT = np.array(128, np.uint8)

Run = Callable[[NDArray[Any]], object]


def measured_peaks(
    threads: int, side: int, convolutions: Sequence[tuple[int, int]], bf16: bool = False
) -> dict[str, float]:
    """FLOP/s of a product of square matrices, and of 3x3 convolutions of (channels, side), the best of some runs.

    fp32 and int8 by ONNX Runtime; with `bf16` also that, by OpenVINO where it is installed. A multiplication and
    addition are 2 in int8 too.
    """
    draw = np.random.default_rng(0).standard_normal
    square = draw((side, side), np.float32)
    shape = f"gemm {side}", 2 * side**3
    found = rates(*shape, {"fp32": onnxruntime(matrix_product(square), threads)}, square)
    for channels, length in convolutions:
        kernel = draw((channels, channels, 3, 3), np.float32)
        sample = draw((2, channels, length, length), np.float32)
        name, flops = f"conv3x3 {channels}@{length}", 2 * channels * channels * 9 * sample.shape[0] * length**2
        plain = convolution(kernel)
        found |= rates(name, flops, {"fp32": onnxruntime(plain, threads)}, sample)
        if bf16 and find_spec("openvino") is not None:
            found |= rates(name, flops, {"bf16": openvino(plain, threads, "bf16")}, sample)
        whole = np.rint(127 + 40 * sample).clip(0, 255).astype(np.uint8)
        found |= rates(name, flops, {"int8": onnxruntime(whole_convolution(kernel), threads)}, whole)
    return found


def rates(name: str, flops: int, runs: Mapping[str, Run], sample: NDArray[Any]) -> dict[str, float]:
    """FLOP/s by name and precision."""
    return {f"{name} {precision}": flops / best_seconds(run, sample) for precision, run in runs.items()}


def best_seconds(run: Run, sample: NDArray[Any]) -> float:
    """The least of some runs' seconds."""
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        run(sample)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def onnxruntime(model: bytes, threads: int) -> Run:
    """A model with one input "x" under ONNX Runtime."""
    session = open_model(model, threads)
    return lambda sample: session.run(None, {"x": sample})


def openvino(model: bytes, threads: int, precision: str) -> Run:
    """A model with one input under OpenVINO."""
    from ...engines.openvino import core

    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    compiled: Any = core().compile_model(core().read_model(model=model, weights=b""), "CPU", hints)
    return lambda sample: compiled([sample])


def open_model(model: bytes, threads: int, *, spinning: bool = True) -> Any:
    """A model under ONNX Runtime; spinning: whether its threads look for work a while after a run."""
    ort = import_quietly()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# Models of one node


def matrix_product(weight: NDArray[np.float32]) -> bytes:
    """x [N, K] times `weight` [K, M]."""
    return one_node("MatMul", {"w": weight}, np.float32, 2)


def convolution(weight: NDArray[np.float32]) -> bytes:
    """x [N, C, H, W] convolved with `weight` [C, C, 3, 3], padded by one."""
    return one_node("Conv", {"w": weight}, np.float32, 4, padding())


def whole_convolution(weight: NDArray[np.float32]) -> bytes:
    """The same of uint8 x by int8 weights with a scale a channel, zero points as static quantization sets them."""
    scales = np.abs(weight).max(axis=(1, 2, 3)) / np.float32(127)
    constants = {
        "x_scale": np.array(1 / 40, np.float32), "x_zero": ZERO_POINT,
        "w": np.rint(weight / scales[:, None, None, None]).astype(np.int8), "w_scale": scales,
        "w_zero": np.zeros(len(scales), np.int8), "y_scale": np.array(1.0, np.float32), "y_zero": ZERO_POINT,
    }  # fmt: skip
    return one_node("QLinearConv", constants, np.uint8, 4, padding())


def padding() -> bytes:
    """The attribute pads = [1, 1, 1, 1] of a node."""
    return message(5, text(1, "pads") + b"".join(number(8, 1) for _ in range(4)) + number(20, 7))  # 7: INTS


def one_node(
    operator: str, constants: Mapping[str, NDArray[Any]], dtype: type[np.generic], rank: int, attributes: bytes = b""
) -> bytes:
    """A ModelProto: y = operator(x, constants...), x and y of `dtype` with `rank` axes of any length."""
    names = b"".join(text(1, name) for name in ("x", *constants))
    graph = message(1, names + text(2, "y") + text(4, operator) + attributes) + text(2, operator)
    graph += b"".join(message(5, tensor(name, array)) for name, array in constants.items())
    graph += message(11, value("x", dtype, rank)) + message(12, value("y", dtype, rank))
    return number(1, IR_VERSION) + message(7, graph) + message(8, text(1, "") + number(2, OPSET))


def tensor(name: str, array: NDArray[Any]) -> bytes:
    """A TensorProto."""
    lengths = b"".join(number(1, length) for length in array.shape)
    little = array.astype(array.dtype.newbyteorder("<"))
    return lengths + number(2, TYPES[array.dtype]) + text(8, name) + message(9, little.tobytes())


def value(name: str, dtype: type[np.generic], rank: int) -> bytes:
    """A ValueInfoProto with axes of any length."""
    shape = b"".join(message(1, b"") for _ in range(rank))
    return text(1, name) + message(2, message(1, number(1, TYPES[np.dtype(dtype)]) + message(2, shape)))


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
