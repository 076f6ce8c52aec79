"""Graphs of networks that have no weights: with invented ones, of the right types and sizes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import nn

from ..engines.files import atomic_write
from .graphs import Graph
from .trace import clean, link_weights, trace
from .weight_files import ALIGNMENT, TensorLocation

BLOCK = 2**20  # bytes of noise that a weights file repeats


def write_invented(network: nn.Module, graph: Graph, path: Path) -> Path:
    """Write a method of a network on the meta device as a graph, with a file of invented weights beside it.

    For those who plan or count, and run nothing: shapes and types are right, and no numbers are.
    """
    model = trace(network, graph)
    weights, tensors = path.with_suffix(".weights"), places(model)
    write_noise(weights, max((place.offset + place.length for place in tensors.values()), default=0))
    link_weights(model, weights.name, path.parent, tensors, {})
    clean(model)
    ir.save(model, path)
    return path


def places(model: ir.Model) -> dict[str, TensorLocation]:
    """Where in a weights file each initializer of a graph is to be."""
    found, offset = {}, 0
    for name, value in model.graph.initializers.items():
        if value.dtype is None or value.shape is None:
            raise RuntimeError(f"{name}: its type or shape is not known")
        shape = tuple(axis for axis in value.shape if isinstance(axis, int))
        length = math.prod(shape) * value.dtype.numpy().itemsize
        found[name] = TensorLocation(value.dtype.numpy().name, shape, offset, length)
        offset += -(-length // ALIGNMENT) * ALIGNMENT
    return found


def write_noise(path: Path, size: int) -> None:
    """A file of small fp16 numbers that are all different for a while: of zeros, a builder would make constants."""
    block = np.random.default_rng(0).normal(0, 0.02, BLOCK // 2).astype(np.float16).tobytes()
    with atomic_write(path) as file:
        for start in range(0, size, BLOCK):
            file.write(block[: min(BLOCK, size - start)])
