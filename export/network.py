"""One submodel of a checkpoint to graphs and a weights file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event

import onnx_ir as ir
import torch
from torch import Tensor

from ..engines.errors import CheckpointError
from ..engines.hashing import sha256_file
from ..engines.manifest import Component, FileRecord, Precision
from .check import check_graph
from .checkpoint import SubModel
from .graphs import NETWORKS, Graph
from .torch_session import TorchSession
from .trace import cast_weights, clean, link_weights, trace
from .weight_files import TensorToWrite, WeightsFile, write_safetensors
from .weights import Weights, check_names

TORCH_DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What weights may be stored in, by what the graphs compute in
STORAGES: Mapping[Precision, tuple[Precision, ...]] = {
    "fp32": ("fp32", "fp16", "bf16"),
    "fp16": ("fp16",),
    "bf16": ("bf16",),
}
# Networks with fewer parameters are checked without being asked to: it takes seconds.
CHECKED_BELOW = 200_000_000

# Called with what is being done; the caller counts.
Report = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A submodel to export: the name of its weights file, and of the component for each of its graphs."""

    name: str
    submodel: SubModel
    variant: str | None
    components: Mapping[str, str]


@dataclass(frozen=True)
class Exported:
    """What became of a Job."""

    weights: FileRecord
    components: Mapping[str, Component]


class SourceNetwork:
    """A submodel's network on the meta device beside its weights on disk, names and shapes checked."""

    def __init__(self, job: Job, storage: Precision | None = None) -> None:
        """`storage` is what weights are stored in where that is not what graphs compute in: 16 bits under fp32.

        Raises CheckpointError for a config or weights that do not fit.
        """
        kind = NETWORKS.get(job.submodel.class_name)
        if kind is None:
            known = " or ".join(NETWORKS)
            raise CheckpointError(f"{job.submodel.folder}: expected a {known}, found {job.submodel.class_name}")
        self.job, self.kind = job, kind
        try:
            self.config = kind.config(job.submodel.config)
            with torch.device("meta"):
                self.network = kind.build(self.config).eval()
            self.graphs: Mapping[str, Graph] = kind.graphs(self.config)
        except CheckpointError as error:
            raise CheckpointError(f"{job.submodel.folder / 'config.json'}: {error}") from error
        except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
            config = job.submodel.folder / "config.json"
            raise CheckpointError(f"{config}: cannot build the network: {error!r}") from error
        self.network.requires_grad_(False)
        self.weights = Weights.open(job.submodel.folder, job.variant)
        expected = {self.stored_name(name): tensor.shape for name, tensor in self.network.state_dict().items()}
        check_names(job.submodel.class_name, expected, self.weights, (*kind.unused, *kind.tied.values()))
        self.rounded: Mapping[str, torch.dtype] = {} if storage is None else self.types(storage)

    def types(self, precision: Precision) -> dict[str, torch.dtype]:
        """The types that the network's tensors have at a precision; the network itself is in fp32 afterwards."""
        self.network.set_precision(TORCH_DTYPES[precision])
        types = {name: tensor.dtype for name, tensor in self.network.state_dict().items()}
        self.network.set_precision(torch.float32)
        return types

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a tensor of the network; of two tied ones the second where the first is missing."""
        first = name.removeprefix(self.kind.prefix)
        second = self.kind.tied.get(first, first)
        return second if first not in self.weights.stored and second in self.weights.stored else first

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the network, in its stored type."""
        return self.weights.read(self.stored_name(name))

    def read_rounded(self, name: str) -> Tensor:
        """A tensor by its name in the network, in the type that fp32 graphs find in the bundle."""
        tensor = self.read(name)
        return tensor.to(self.rounded.get(name, tensor.dtype))

    def sessions(self) -> dict[str, TorchSession]:
        """Its graphs under PyTorch, by component; they compute with what fp32 graphs read."""
        return {
            component: TorchSession(component, self.network, self.graphs[key], self.read_rounded)
            for key, component in self.job.components.items()
        }


def weights_path(name: str) -> str:
    """Where a network's weights lie in the bundle."""
    return f"weights/{name}.safetensors"


class Writer:
    """Writes weights files beside the tracing: one waits for the disk, the other for the interpreter."""

    def __init__(self, precision: Precision) -> None:
        self._precision: Precision = precision
        self._pool = ThreadPoolExecutor(1, "weights")
        self._stopped = Event()

    def start(self, source: SourceNetwork, path: Path) -> Future[WeightsFile]:
        """Begin to write the network's tensors under its own names, one at a time."""
        source.network.set_precision(TORCH_DTYPES[self._precision])

        def read(name: str) -> Tensor:
            if self._stopped.is_set():
                raise CancelledError
            return source.read(name)

        def entry(name: str, tensor: Tensor) -> TensorToWrite:
            dtype = str(source.rounded.get(name, tensor.dtype)).removeprefix("torch.")
            return TensorToWrite(name, dtype, tuple(tensor.shape), partial(read, name))

        # Listed here and now: while it is traced, the network's own tensors belong to the tracing thread.
        entries = [entry(name, tensor) for name, tensor in source.network.state_dict().items()]
        return self._pool.submit(write_safetensors, path, entries)

    def close(self) -> None:
        """Stop after the tensor at hand; what is not complete is not left behind."""
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


def export_network(
    source: SourceNetwork,
    folder: Path,
    precision: Precision,
    check: bool | None,
    report: Report,
    writing: Future[WeightsFile],
) -> Exported:
    """Trace every graph of a network and write the graphs to `folder`, where `writing` puts the weights.

    `check` compares each graph with its module (None: where the network has fewer than CHECKED_BELOW parameters). Peak
    memory is about that of the largest tensor twice, and what tracing needs: no weights are held.
    """
    job, models = source.job, {}
    for key, component in job.components.items():
        report(f"tracing {component}")
        models[key] = trace(source.network, source.graphs[key])
    report(f"writing weights of {job.name}")
    written = writing.result()
    components = {}
    for key, component in job.components.items():
        record = save_graph(source, models.pop(key), key, written, folder, precision)
        if check or (check is None and source.parameters < CHECKED_BELOW):
            report(f"checking {component}")
            record = checked(source, key, record, folder)
        components[component] = record
    return Exported(FileRecord(weights_path(job.name), written.size, written.sha256), components)


def save_graph(
    source: SourceNetwork, model: ir.Model, key: str, written: WeightsFile, folder: Path, precision: Precision
) -> Component:
    """Point a traced graph at its weights, clean it, cast what is stored in fewer bits, and write it.

    Graphs lie at the top of the bundle: external data must be below the folder of the graph that names it.
    """
    graph, name = source.graphs[key], source.job.components[key]
    path = folder / f"{name}.onnx"
    link_weights(model, weights_path(source.job.name), folder, written.tensors, source.network.constants())
    clean(model)
    cast_weights(model)
    ir.save(model, path)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return Component(
        graph=FileRecord(path.name, path.stat().st_size, sha256_file(path)),
        weights=(source.job.name,),
        inputs=graph.inputs,
        outputs=graph.outputs,
        precision=precision,
        parameters=sum(tensor.size for tensor in tensors if isinstance(tensor, ir.ExternalTensor)),
    )


def checked(source: SourceNetwork, key: str, component: Component, folder: Path) -> Component:
    """The component with its measured error; raises NumericalError over the tolerance."""
    name = source.job.components[key]
    # The reference computes in fp32 whatever the precision of the graph.
    reference = source.sessions()[name]
    error = check_graph(name, folder / component.graph.file, component, reference, source.graphs[key].multiples)
    return replace(component, error=error)
