"""What an ONNX file says of its nodes, read without the onnx package, which the runtime does not need.

Source: onnx.proto of ONNX 1.19 (the numbers of its fields and types never change), in Protocol Buffers' wire format.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .errors import BundleError

# Fields by number
MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_VALUE = 1, 11, 12, 13
NODE_OUTPUT, NODE_NAME = 2, 3
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TENSOR_ELEMENT = 1, 2, 1, 1
# TensorProto.DataType: uint8, int8, uint16, int16, int32, int64, bool, uint32, uint64
WHOLE_NUMBERS = frozenset({2, 3, 4, 5, 6, 7, 9, 12, 13})
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # kinds of fields on the wire


def whole_number_nodes(path: Path) -> frozenset[str]:
    """Names of the nodes that give nothing but integers and booleans: arithmetic of shapes, positions and masks.

    Raises BundleError for a file that is not an ONNX graph.
    """
    try:
        graph = next(part(value) for number, value in fields(memoryview(path.read_bytes())) if number == MODEL_GRAPH)
        types: dict[str, int] = {}
        outputs: dict[str, list[str]] = {}
        for number, value in fields(graph):
            if number in (GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_VALUE):
                types.update([value_type(part(value))])
            elif number == GRAPH_NODE:
                outputs.update([node_outputs(part(value))])
    except (ValueError, IndexError, StopIteration) as error:
        raise BundleError(f"{path} is damaged: not an ONNX graph; export the bundle again") from error
    return frozenset(
        node for node, names in outputs.items() if names and all(types.get(name) in WHOLE_NUMBERS for name in names)
    )


def value_type(value: memoryview) -> tuple[str, int]:
    """Name and element type of a ValueInfoProto; 0 where it is not a tensor."""
    name, element = "", 0
    for number, content in fields(value):
        if number == VALUE_NAME:
            name = text(content)
        elif number == VALUE_TYPE:
            tensors = [part(tensor) for kind, tensor in fields(part(content)) if kind == TYPE_TENSOR]
            elements = [which for tensor in tensors for kind, which in fields(tensor) if kind == TENSOR_ELEMENT]
            element = next((which for which in elements if isinstance(which, int)), 0)
    return name, element


def node_outputs(node: memoryview) -> tuple[str, list[str]]:
    """Name and outputs of a NodeProto."""
    found = list(fields(node))
    name = next((text(content) for number, content in found if number == NODE_NAME), "")
    return name, [text(content) for number, content in found if number == NODE_OUTPUT]


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message in their order: number, and value or bytes. ValueError or IndexError where damaged."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = varint(message, at)
            yield number, value
            continue
        if kind == BYTES:
            size, at = varint(message, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"kind {kind}")
        if at + size > len(message):
            raise ValueError("cut short")
        yield number, message[at : at + size]
        at += size


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at a place, in groups of seven bits, and the place after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def part(value: int | memoryview) -> memoryview:
    """A field that has to be bytes."""
    if isinstance(value, int):
        raise ValueError("a number where a message was expected")
    return value


def text(value: int | memoryview) -> str:
    """A field that has to be text."""
    return bytes(part(value)).decode()
