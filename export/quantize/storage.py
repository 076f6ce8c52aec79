"""Weights files, without PyTorch: where tensors lie in one, and writing one tensor by tensor.

Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...engines.errors import BundleError
from ...engines.files import atomic_write

# Names in a safetensors header
KINDS: Mapping[str, ir.DataType] = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I8": ir.DataType.INT8,
    "BOOL": ir.DataType.BOOL,
}
METADATA = "__metadata__"
ALIGNMENT = 64  # bytes: one cache line, and the widest vector register
CHUNK = 4 * 1024 * 1024  # bytes


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are: little endian, row-major, `offset` counted from the start of the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    length: int

    @property
    def dtype(self) -> ir.DataType:
        """Its type in a graph."""
        return KINDS[self.kind]


@dataclass(frozen=True)
class Part:
    """A tensor to write: `read` gives its bytes in pieces."""

    name: str
    kind: str
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Any]]

    @property
    def length(self) -> int:
        """In bytes."""
        return math.ceil(math.prod(self.shape) * KINDS[self.kind].itemsize)


@dataclass(frozen=True)
class Written:
    """A file that was written: its size in bytes, its SHA-256 in hexadecimal, and its tensors."""

    size: int
    sha256: str
    places: Mapping[str, Place]


def read_places(path: Path) -> dict[str, Place]:
    """The tensors of a weights file by name; BundleError where it is damaged."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(min(length, path.stat().st_size)))
        header.pop(METADATA, None)
        return {
            name: Place(
                each["dtype"],
                tuple(each["shape"]),
                8 + length + each["data_offsets"][0],
                each["data_offsets"][1] - each["data_offsets"][0],
            )
            for name, each in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise BundleError(f"{path} is damaged: {error}; export the bundle again") from error


def read_array(path: Path, place: Place) -> NDArray[Any]:
    """A tensor in its own type."""
    with path.open("rb") as file:
        file.seek(place.offset)
        return np.frombuffer(file.read(place.length), place.dtype.numpy()).reshape(place.shape)


def copy_of(path: Path, name: str, place: Place) -> Part:
    """A tensor of another file, to be written as it is."""

    def pieces() -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(place.offset)
            for start in range(0, place.length, CHUNK):
                yield file.read(min(CHUNK, place.length - start))

    return Part(name, place.kind, place.shape, pieces)


def part_of(name: str, kind: str, shape: tuple[int, ...], make: Callable[[], NDArray[Any]]) -> Part:
    """An array that is made when it is written."""
    return Part(name, kind, shape, lambda: [np.ascontiguousarray(make()).reshape(-1).view(np.uint8).data])


def write_parts(path: Path, parts: Iterable[Part]) -> Written:
    """Write tensors, one at a time; `path` appears only when it is complete. Equal input, equal bytes.

    Tensors that are whole multiples of ALIGNMENT come first, then by the size of their elements: the format has no
    gaps, and so each is aligned to its elements.
    """
    ordered = sorted(parts, key=lambda part: (part.length % ALIGNMENT != 0, -KINDS[part.kind].itemsize, part.name))
    header, places = layout(ordered)
    digest, size = hashlib.sha256(header), len(header) + sum(part.length for part in ordered)
    with atomic_write(path, size) as file:
        file.write(header)
        for part in ordered:
            for piece in part.read():
                file.write(piece)
                digest.update(piece)
    return Written(size, digest.hexdigest(), places)


def layout(ordered: Iterable[Part]) -> tuple[bytes, dict[str, Place]]:
    """The bytes before the data, padded with spaces to ALIGNMENT, and each tensor's place."""
    entries: dict[str, Any] = {METADATA: {"format": "pt"}}
    end = 0
    for part in ordered:
        begin, end = end, end + part.length
        entries[part.name] = {"dtype": part.kind, "shape": list(part.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    places = {
        part.name: Place(part.kind, part.shape, len(header) + entries[part.name]["data_offsets"][0], part.length)
        for part in ordered
    }
    return header, places
