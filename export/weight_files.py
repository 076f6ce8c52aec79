"""Writing `.safetensors` files tensor by tensor, with the place of every tensor's bytes.

Format: https://github.com/huggingface/safetensors#format. An ONNX initializer can point at a tensor's bytes through
`location`, `offset` and `length` of its external data.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engines.errors import CheckpointError
from ..engines.files import atomic_write

# Names as in engines.spec.DTYPES -> (name in a safetensors header, torch's type)
DTYPES: Mapping[str, tuple[str, torch.dtype]] = {
    "float32": ("F32", torch.float32),
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "int64": ("I64", torch.int64),
    "int32": ("I32", torch.int32),
    "bool": ("BOOL", torch.bool),
}
ALIGNMENT = 64  # bytes: one cache line, and the widest vector register
METADATA = "__metadata__"
CHUNK = 4 * 1024 * 1024  # bytes converted, written and hashed at a time: larger ones leave the processor's cache


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to come: `read` gives it, of `shape` and any floating type where `dtype` is one, else of `dtype`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """The length in the file, in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype][1].itemsize


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor's bytes are: little endian, row-major, `offset` counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class WeightsFile:
    """A file that was written: its size in bytes, its SHA-256 in hexadecimal, and its tensors."""

    path: Path
    size: int
    sha256: str
    tensors: Mapping[str, TensorLocation]


def write_safetensors(path: Path, tensors: Iterable[TensorToWrite]) -> WeightsFile:
    """Write `tensors` to `path`, one at a time, each converted to its `dtype` in chunks; equal input, equal bytes.

    Memory: the tensor that its `read` gives and one or two chunks of it. `path` appears only when it is complete.

    Raises CheckpointError for a value too large for a tensor's `dtype`, or a tensor that is not as announced;
    OutputError where the file cannot be written; ValueError for a name twice or an unknown dtype.
    """
    ordered = _in_file_order(tensors)
    header, locations = _layout(ordered)
    size = len(header) + sum(tensor.nbytes for tensor in ordered)
    digest = hashlib.sha256()
    with atomic_write(path, size) as file, ThreadPoolExecutor(1, "sha256") as pool:
        file.write(header)
        hashed: Future[None] = pool.submit(digest.update, header)
        for tensor in ordered:
            for chunk in _chunks(tensor):
                file.write(chunk)
                hashed.result()  # hashing stays at most one chunk behind
                hashed = pool.submit(digest.update, chunk)
        hashed.result()
    return WeightsFile(path, size, digest.hexdigest(), locations)


def _in_file_order(tensors: Iterable[TensorToWrite]) -> list[TensorToWrite]:
    """Sort so that each tensor is aligned to its element, and to ALIGNMENT where those before it allow that.

    The format has no gaps, so tensors that are whole multiples of ALIGNMENT come first, then by element size.
    """
    by_name: dict[str, TensorToWrite] = {}
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{tensor.name}: dtype is {tensor.dtype!r}, expected one of {', '.join(DTYPES)}")
        if tensor.name in by_name or tensor.name == METADATA:
            raise ValueError(f"tensor name {tensor.name!r} is taken")
        by_name[tensor.name] = tensor
    return sorted(
        by_name.values(),
        key=lambda tensor: (tensor.nbytes % ALIGNMENT != 0, -DTYPES[tensor.dtype][1].itemsize, tensor.name),
    )


def _layout(ordered: Iterable[TensorToWrite]) -> tuple[bytes, dict[str, TensorLocation]]:
    """Give the bytes before the data (length and JSON, padded with spaces to ALIGNMENT) and each tensor's place."""
    # diffusers and transformers refuse a file that does not say which framework's conventions it follows
    entries: dict[str, object] = {METADATA: {"format": "pt"}}
    ends: dict[str, int] = {}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.nbytes
        ends[tensor.name] = end
        entries[tensor.name] = {
            "dtype": DTYPES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    locations = {
        tensor.name: TensorLocation(
            tensor.dtype, tensor.shape, len(header) + ends[tensor.name] - tensor.nbytes, tensor.nbytes
        )
        for tensor in ordered
    }
    return header, locations


def _chunks(tensor: TensorToWrite) -> Iterator[memoryview]:
    """Give the bytes of a tensor in its target type, CHUNK at a time."""
    source = tensor.read()
    target = DTYPES[tensor.dtype][1]
    if tuple(source.shape) != tensor.shape or (source.dtype != target and not _both_floating(source.dtype, target)):
        raise CheckpointError(
            f"tensor {tensor.name!r}: expected {tensor.dtype}{list(tensor.shape)}, "
            f"found {source.dtype}{list(source.shape)}"
        )
    flat = source.detach().contiguous().reshape(-1)
    for part in torch.split(flat, CHUNK // target.itemsize) if flat.numel() else ():
        if part.dtype != target:
            _check_range(tensor, part, target)
        # NumPy has no bfloat16: hand over bytes
        yield part.to(target).view(torch.uint8).numpy().data


def _both_floating(a: torch.dtype, b: torch.dtype) -> bool:
    return a.is_floating_point and b.is_floating_point


def _check_range(tensor: TensorToWrite, part: torch.Tensor, target: torch.dtype) -> None:
    """Raise CheckpointError where a finite or infinite value of `part` becomes infinite in `target`."""
    extremes = torch.stack(part.aminmax())
    if extremes.to(target).isinf().any():
        raise CheckpointError(
            f"tensor {tensor.name!r} holds {extremes[extremes.abs().argmax()].item():g}, and the largest number in "
            f"{tensor.dtype} is {torch.finfo(target).max:g}: choose another precision, such as fp32 or bf16"
        )
