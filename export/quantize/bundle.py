"""A bundle with some of its networks in 8 bits, made of one without."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...engines.bundle import Bundle
from ...engines.errors import BundleError, InputError, NumericalError
from ...engines.files import atomic_write
from ...engines.hashing import sha256_file
from ...engines.manifest import MANIFEST, Component, FileRecord, Manifest, Quantization, encode_manifest
from ..output import new_folder
from .grids import round_weight, weight_scales
from .layers import Layer, find_layers
from .measure import Arrays, Measured, Report, find_grids, noise_of_layers
from .rewrite import INT8, SCALE, Rewriter, Weights
from .storage import Part, Place, copy_of, part_of, read_array, read_places, write_parts

# Relative error of a layer's result, on exact inputs, from which on the layer is not computed in 8 bits. Rounding both
# factors and the result makes 1 to 3 % of what is spread like a bell; a layer far above that has outliers, or results
# that nearly cancel.
KEEP_ABOVE = 0.1
# Relative error of a graph's outputs above which no bundle is made.
REFUSE_ABOVE = 0.15
SOME_CALLS = 6  # of those that set the ranges, on how many the errors of layers are measured


@dataclass(frozen=True)
class Call:
    """Inputs of a component as a request gave them, and what it answered, by name."""

    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True)
class Calls:
    """Of a component: calls that set the scales, and others that the error is measured on."""

    calibration: Sequence[Call]
    held_out: Sequence[Call]


@dataclass(frozen=True)
class Settings:
    """What a user may choose.

    keep: layers to leave as they are, by name or pattern such as "up_blocks.3.*". keep_above and refuse_above are the
    bounds of those names above. threads: of the CPU, by default all.
    """

    keep: tuple[str, ...] = ()
    keep_above: float = KEEP_ABOVE
    refuse_above: float = REFUSE_ABOVE
    threads: int | None = None


@dataclass(frozen=True)
class Finding:
    """What became of a component: noise has the relative error of each layer by its weight, measured alone."""

    quantization: Quantization
    noise: Mapping[str, float]


def check_quantizable(bundle: Bundle, components: Sequence[str] = ()) -> list[str]:
    """The components to quantize: those named, else the step graphs of every decoder.

    Raises InputError for a name that the bundle does not have or two that are the same, BundleError for a bundle that
    is quantized already or not in fp32.
    """
    manifest = bundle.manifest
    done = [name for name, component in manifest.components.items() if component.quantization is not None]
    if done:
        raise BundleError(
            f"{bundle.folder} is quantized already ({', '.join(done)}); quantize the bundle it was made of"
        )
    if manifest.precision != "fp32":
        raise BundleError(
            f"{bundle.folder} is in {manifest.precision}, expected fp32, whose values set the scales; make a bundle "
            "with: kandrt export ... --precision fp32 (add --storage fp16 for half the size)"
        )
    chosen = list(components) or step_graphs(manifest)
    unknown = sorted(set(chosen) - manifest.components.keys())
    if unknown:
        known = ", ".join(manifest.components)
        raise InputError(f"component: the bundle has no {', '.join(unknown)}; it has {known}")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"component: expected each once, found {', '.join(chosen)}")
    if not chosen:
        raise InputError(f"{bundle.folder} has no decoder; name what to quantize with --component")
    return chosen


def step_graphs(manifest: Manifest) -> list[str]:
    """What decoders run at every step, with that of feature reuse."""
    names = []
    for record in manifest.decoders.values():
        names += [record.step] if record.reuse is None else [record.step, record.reuse.refresh, record.reuse.shallow]
    return names


def quantize_bundle(
    bundle: Bundle, output: Path, recorded: Mapping[str, Calls], settings: Settings, *, overwrite: bool, report: Report
) -> dict[str, Finding]:
    """Make `output`, the bundle with the components of `recorded` in 8 bits; gives what became of each.

    `bundle` stays as it is; files that do not change are linked where the file system can, else copied. Peak memory is
    about that of one component in fp32 under ONNX Runtime, its weights in 8 bits beside.

    Raises what `check_quantizable` does, InputError for a layer to keep that no component has, NumericalError where a
    component's error is over the bound, OutputError where the bundle cannot be written.
    """
    names = check_quantizable(bundle, list(recorded))
    check_keep(bundle, names, settings.keep)
    components, weights = dict(bundle.manifest.components), dict(bundle.manifest.weights)
    findings: dict[str, Finding] = {}
    with new_folder(output.expanduser(), overwrite) as folder:
        networks = dict.fromkeys(network_of(components[name]) for name in names)
        link_files(bundle, folder, networks)
        for network in networks:
            mine = [name for name in names if network_of(components[name]) == network]
            work = Network(bundle, folder, network, settings, report)
            done = work.quantize({name: recorded[name] for name in mine})
            weights[network] = work.written
            components |= work.components
            findings |= done
        manifest = replace(bundle.manifest, components=components, weights=weights)
        with atomic_write(folder / MANIFEST) as file:
            file.write(encode_manifest(manifest))
    return findings


def check_keep(bundle: Bundle, names: Sequence[str], keep: Sequence[str]) -> None:
    """Raise InputError for a pattern that fits no layer of the components."""
    layers = [layer for name in names for layer in find_layers(load_graph(bundle, bundle.manifest.components[name]))]
    for pattern in keep:
        if not any(fits(layer, (pattern,)) for layer in layers):
            some = ", ".join(layer.name for layer in layers[:3])
            raise InputError(f"keep: {pattern!r} is no layer of {', '.join(names)}, whose layers are {some} and so on")


def fits(layer: Layer, patterns: Sequence[str]) -> bool:
    """Whether a layer is named by one of some patterns."""
    return any(fnmatchcase(layer.name, pattern) or layer.name.startswith(f"{pattern}.") for pattern in patterns)


def network_of(component: Component) -> str:
    """The weights file that a component reads; BundleError where there are more."""
    if len(component.weights) != 1:
        raise BundleError(f"{component.graph.file} reads {len(component.weights)} weights files, expected one")
    return component.weights[0]


def load_graph(bundle: Bundle, component: Component) -> ir.Model:
    """A component's graph, weights unread."""
    return ir.load(bundle.path(component.graph))


def link_files(bundle: Bundle, folder: Path, networks: Mapping[str, Any]) -> None:
    """Bring everything to `folder` but graphs of the networks that change: hard links, or copies where there are none.

    Linked files are never written to: what takes their place is another file.
    """
    components = bundle.manifest.components.values()
    changing = {each.graph.file for each in components if networks.keys() & set(each.weights)}
    for record in bundle.manifest.files().values():
        source, target = bundle.path(record).resolve(), folder / record.file
        if record.file in changing:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)


class Network:
    """The components that share a weights file, on the way to 8 bits in the folder of the new bundle."""

    def __init__(self, bundle: Bundle, folder: Path, network: str, settings: Settings, report: Report) -> None:
        self._bundle, self._folder, self._settings, self._report = bundle, folder, settings, report
        self._name, self._record = network, bundle.manifest.weights[network]
        self._source = folder / self._record.file
        self._places = read_places(self._source)
        # Beside the weights: ONNX Runtime reads only what lies below the graph.
        self._scratch = self._source.with_name(f"{self._source.name}{INT8}")
        self._rounded: Mapping[str, Place] = {}
        self.written = self._record
        self.components: dict[str, Component] = {}

    def quantize(self, recorded: Mapping[str, Calls]) -> dict[str, Finding]:
        """Quantize the components of `recorded`, and let the network's other graphs read the new weights file."""
        self._rounded = self._round_weights(list(recorded))
        chosen, noise, models = {}, {}, {}
        for name, calls in recorded.items():
            models[name], chosen[name], noise[name] = self._rewrite(name, calls)
        for name, component in self._bundle.manifest.components.items():
            if self._name in component.weights and name not in recorded:
                models[name] = load_graph(self._bundle, component)
        self._write_weights(models)
        findings = {}
        for name, model in models.items():
            self.components[name] = self._save(name, model)
            if name in recorded:
                error = self._check(name, recorded[name])
                kept = [weight for weight in noise[name] if weight not in chosen[name]]
                found = Quantization(tuple(chosen[name]), tuple(kept), len(recorded[name].calibration), error)
                findings[name] = Finding(found, noise[name])
                self.components[name] = replace(self.components[name], error=None, quantization=found)
        return findings

    def _round_weights(self, names: Sequence[str]) -> Mapping[str, Place]:
        """Write the weights of all layers that may be in 8 bits, and their scales, to the scratch file."""
        components = self._bundle.manifest.components
        found = [layer for name in names for layer in find_layers(load_graph(self._bundle, components[name]))]
        layers = {layer.weight: layer for layer in found}
        self._report(f"{self._name}: rounding the weights of {len(layers)} layers")
        parts: list[Part] = []
        for layer in layers.values():
            scales = weight_scales(self._read(layer), layer.axis)
            parts.append(part_of(layer.weight + SCALE, "F32", scales.shape, partial(np.copy, scales)))
            shape = self._places[layer.weight].shape
            shape = shape[::-1] if layer.flipped else shape
            parts.append(part_of(layer.weight + INT8, "I8", shape, partial(self._round, layer, scales)))
        return write_parts(self._scratch, parts).places

    def _round(self, layer: Layer, scales: NDArray[np.float32]) -> NDArray[np.int8]:
        return round_weight(self._read(layer), scales, layer.axis)

    def _read(self, layer: Layer) -> NDArray[np.float32]:
        """The weight as the layer's operator takes it, which is how it lies in 8 bits too.

        With a Transpose between, ONNX Runtime has no kernel for the product in 8 bits.
        """
        weight = read_array(self._source, self._places[layer.weight]).astype(np.float32, copy=False)
        return weight.T if layer.flipped else weight

    def _rewrite(self, name: str, calls: Calls) -> tuple[ir.Model, list[str], dict[str, float]]:
        """A component's graph in 8 bits, the weights of its layers that are, and each layer's error."""
        component, keep = self._bundle.manifest.components[name], self._settings.keep
        graph, weights = (
            self._bundle.path(component.graph),
            Weights(self._folder, self._scratch_location, self._rounded),
        )
        measured = Measured(name, component, graph, self._folder, self._settings.threads, self._report)
        layers = find_layers(ir.load(graph))
        tensors = list(dict.fromkeys(t for each in layers for t in touched(each)))
        inputs = [call.inputs for call in calls.calibration]
        grids = find_grids(measured, tensors, inputs)
        noise = noise_of_layers(measured, layers, grids, spread(inputs, SOME_CALLS), weights)
        chosen = [
            layer for layer in layers if noise[layer.weight] <= self._settings.keep_above and not fits(layer, keep)
        ]
        model = load_graph(self._bundle, component)
        Rewriter(model, grids, weights).replace(chosen)
        return model, [layer.weight for layer in chosen], noise

    @property
    def _scratch_location(self) -> str:
        return f"{self._record.file}{INT8}"

    def _write_weights(self, models: Mapping[str, ir.Model]) -> None:
        """Write the weights that the graphs read now in place of those they read before, and point them there."""
        self._report(f"{self._name}: writing weights")
        used = {name for model in models.values() for name, _ in external(model)}
        parts = [copy_of(self._scratch, name, place) for name, place in self._rounded.items() if name in used]
        parts += [copy_of(self._source, name, place) for name, place in self._places.items() if name in used]
        written = write_parts(self._source, parts)
        self._scratch.unlink()
        self.written = FileRecord(self._record.file, written.size, written.sha256)
        weights = Weights(self._folder, self._record.file, written.places)
        for model in models.values():
            for name, value in external(model):
                value.const_value = weights.tensor(name)

    def _save(self, name: str, model: ir.Model) -> Component:
        component = self._bundle.manifest.components[name]
        path = self._folder / component.graph.file
        ir.save(model, path)
        return replace(component, graph=FileRecord(component.graph.file, path.stat().st_size, sha256_file(path)))

    def _check(self, name: str, calls: Calls) -> float:
        """The error of a component in 8 bits on calls that set no scale; NumericalError above the bound."""
        component, bound = self.components[name], self._settings.refuse_above
        graph = self._folder / component.graph.file
        measured = Measured(name, component, graph, self._folder, self._settings.threads, self._report)
        found = measured.run(graph, component, [call.inputs for call in calls.held_out], "error in 8 bits")
        error = relative_error([call.outputs for call in calls.held_out], found)
        if not error <= bound:
            raise NumericalError(
                f"{name}: expected a relative error of {bound:g} at most in 8 bits, found {error:.2g}; keep more "
                "layers as they are (a lower --keep-above, or --keep), leave the component out, or raise --refuse-above"
            )
        return error


def touched(layer: Layer) -> tuple[str, ...]:
    """The tensors that are rounded for a layer."""
    return (layer.data, layer.result) if layer.rounds_result else (layer.data,)


def spread(items: Sequence[Arrays], count: int) -> list[Arrays]:
    """At most `count` of some items, evenly from the first to the last."""
    chosen = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))
    return [items[i] for i in chosen]


def external(model: ir.Model) -> list[tuple[str, ir.Value]]:
    """The initializers of a graph that lie in a weights file; a bundle's have the names of the file's tensors."""
    return [(n, v) for n, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)]


def relative_error(expected: Sequence[Arrays], found: Sequence[Arrays]) -> float:
    """L2 norm of the difference over that of what was expected, over all calls; the worst output's."""

    def total(name: str, difference: bool) -> float:
        arrays = zip((e[name].astype(np.float64) for e in expected), (f[name] for f in found), strict=True)
        return sum(float(np.square(f - e if difference else e).sum()) for e, f in arrays)

    names = expected[0]
    return max(float(np.sqrt(total(name, True) / max(total(name, False), 1e-30))) for name in names)
