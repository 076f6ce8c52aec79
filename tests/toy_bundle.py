"""A bundle of toy networks, one layer each, that TensorRT builds in a moment; and ways to change it as users do."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
from onnx import TensorProto, helper

from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Component,
    DecoderRecord,
    FileRecord,
    Manifest,
    Precision,
    encode_manifest,
)
from kandrt.engines.spec import TensorSpec

TYPES: dict[Precision, tuple[int, Any]] = {
    "fp16": (TensorProto.FLOAT16, np.float16),
    "fp32": (TensorProto.FLOAT, np.float32),
}
# Weights: file -> tensors
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "decoder": {"embed": (8, 8), "mix": (4, 4, 1, 1)},
    "movq": {"shrink": (4, 3, 8, 8), "paint": (4, 3, 8, 8)},
}
# Component -> weights file, tensor, operator, attributes, input, output
BATCH, CELLS, PIXELS = "batch", ("height", "width"), ("image_height", "image_width")
Layer = tuple[str, str, str, dict[str, Any], TensorSpec, TensorSpec]
LAYERS: dict[str, Layer] = {
    "movq_encoder": (
        "movq", "shrink", "Conv", {"kernel_shape": [8, 8], "strides": [8, 8]},
        TensorSpec("pixels", "float32", (BATCH, 3, *PIXELS)), TensorSpec("latents", "float32", (BATCH, 4, *CELLS)),
    ),
    "movq_decoder": (
        "movq", "paint", "ConvTranspose", {"kernel_shape": [8, 8], "strides": [8, 8]},
        TensorSpec("latents", "float32", (BATCH, 4, *CELLS)), TensorSpec("pixels", "float32", (BATCH, 3, *PIXELS)),
    ),
    "decoder_context": (
        "decoder", "embed", "MatMul", {},
        TensorSpec("image_embeds", "float32", (BATCH, 8)), TensorSpec("added_kv", "float32", (BATCH, 8)),
    ),
    "decoder_step": (
        "decoder", "mix", "Conv", {"kernel_shape": [1, 1]},
        TensorSpec("sample", "float32", (BATCH, 4, *CELLS)), TensorSpec("prediction", "float32", (BATCH, 4, *CELLS)),
    ),
}  # fmt: skip
COMPONENTS = tuple(LAYERS)


def make_toy_bundle(folder: Path, precision: Precision = "fp16", **decoder: Any) -> Bundle:
    """A bundle of a decoder alone, 8 pixels a latent cell; `decoder` replaces fields of its record."""
    (folder / "weights").mkdir(parents=True)
    weights = {name: write_weights(folder, name, precision) for name in SHAPES}
    components = {
        name: Component(
            write_graph(folder, name, precision), (layer[0],), (layer[4],), (layer[5],), precision, parameters=1000
        )
        for name, layer in LAYERS.items()
    }
    record = DecoderRecord(
        context="decoder_context", step="decoder_step", movq_encoder="movq_encoder", movq_decoder="movq_decoder",
        scheduler="decoder", embedding_dim=8, scale=8, size_multiple=64, default_size=768,
    )  # fmt: skip
    manifest = Manifest(
        SCHEMA_VERSION, "kandinsky-2-2", precision, components, weights,
        schedulers={"decoder": {}}, sources=(), tools={}, decoders={"decoder": replace(record, **decoder)},
    )  # fmt: skip
    return rewrite(folder, manifest)


def write_weights(folder: Path, name: str, precision: Precision, seed: int = 0) -> FileRecord:
    """A file of random weights; another seed is another file."""
    generator = np.random.default_rng([seed, len(name)])
    tensors = {
        tensor: generator.standard_normal(shape).astype(TYPES[precision][1]) for tensor, shape in SHAPES[name].items()
    }
    file = f"weights/{name}.safetensors"
    return write(folder, file, safetensors.numpy.save(tensors))


def write_graph(folder: Path, name: str, computes: Precision, *, note: str = "", **changes: Any) -> FileRecord:
    """A graph of one layer; `note` makes another file of it, `changes` may be `op_type`, `attributes` or `repeat`.

    Its input and output are float32 whatever it computes in, as those of exported graphs. `repeat` runs the layer that
    many times, where its output has the shape of its input: what building takes grows with it.
    """
    file, tensor, operator, attributes, given, gives = LAYERS[name]
    content = (folder / "weights" / f"{file}.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    # In the order of safetensors: all tensors here are of one type, so by name
    lengths = {each: int(np.prod(shape)) for each, shape in sorted(SHAPES[file].items())}
    width = (len(content) - start) // sum(lengths.values())
    offset = start + width * sum(length for each, length in lengths.items() if each < tensor)
    stored = TensorProto.FLOAT16 if width == 2 else TensorProto.FLOAT
    weight = TensorProto(name="stored", data_type=stored, dims=SHAPES[file][tensor])
    weight.data_location = TensorProto.EXTERNAL
    place = {"location": f"weights/{file}.safetensors", "offset": offset, "length": width * lengths[tensor]}
    for key, where in place.items():
        weight.external_data.add(key=key, value=str(where))
    nodes = [
        helper.make_node("Cast", ["stored"], ["weight"], to=TYPES[computes][0]),
        helper.make_node("Cast", [given.name], ["y0"], to=TYPES[computes][0]),
    ]
    op_type, attributes = changes.get("op_type", operator), changes.get("attributes", attributes)
    repeat = changes.get("repeat", 1)
    for i in range(repeat):
        nodes.append(helper.make_node(op_type, [f"y{i}", "weight"], [f"x{i}"], **attributes))
        nodes.append(helper.make_node("Sigmoid", [f"x{i}"], [f"y{i + 1}"]))  # so that layers cannot be joined
    nodes.append(helper.make_node("Cast", [f"y{repeat}"], [gives.name], to=TensorProto.FLOAT))
    graph = helper.make_graph(nodes, name, [tensor_info(given)], [tensor_info(gives)], [weight], doc_string=note)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return write(folder, f"{name}.onnx", model.SerializeToString())


def tensor_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    """A graph's input or output."""
    return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape)


def write(folder: Path, file: str, content: bytes) -> FileRecord:
    """Write a file of the bundle, in place of a link where it is one; gives its record."""
    (folder / file).unlink(missing_ok=True)
    (folder / file).write_bytes(content)
    return FileRecord(file, len(content), hashlib.sha256(content).hexdigest())


def rewrite(folder: Path, manifest: Manifest) -> Bundle:
    """Give the bundle another manifest."""
    write(folder, MANIFEST, encode_manifest(manifest))
    return open_bundle(folder)


def change_component(bundle: Bundle, name: str, **changes: Any) -> Bundle:
    """The bundle with another record of a component."""
    components = {**bundle.manifest.components, name: replace(bundle.manifest.components[name], **changes)}
    return rewrite(bundle.folder, replace(bundle.manifest, components=components))


def export_again(bundle: Bundle, name: str, **graph: Any) -> Bundle:
    """The bundle as an export that gives another graph leaves it; `graph` as in `write_graph`."""
    computes = graph.pop("computes", bundle.manifest.precision)
    return change_component(bundle, name, graph=write_graph(bundle.folder, name, computes, **graph))


def train_again(bundle: Bundle, weights: str, seed: int = 1) -> Bundle:
    """The bundle with other weights."""
    records: Mapping[str, FileRecord] = {
        **bundle.manifest.weights,
        weights: write_weights(bundle.folder, weights, bundle.manifest.precision, seed),
    }
    return rewrite(bundle.folder, replace(bundle.manifest, weights=dict(records)))
