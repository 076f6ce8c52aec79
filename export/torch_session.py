"""Graphs run by PyTorch, as the reference for every other way to run them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.errors import BackendError
from ..engines.session import Array
from ..engines.spec import TensorSpec, check_arrays
from .graphs import Graph
from .modules.layers import Network

Read = Callable[[str], Tensor]


@contextlib.contextmanager
def streamed(network: nn.Module, read: Read) -> Iterator[None]:
    """Let a network on the meta device be run in fp32: each module reads its tensors just before, and drops them after.

    `read` gives a tensor by its name in the network, in any floating type. The memory needed is that of the largest
    single module. At the end, errors included, the network holds its own tensors again.
    """
    prefixes = {module: f"{name}." if name else "" for name, module in network.named_modules()}
    own = {module: [dict(tensors) for tensors in tensors_of(module)] for module in network.modules()}

    def fill(module: nn.Module, _: Any = None) -> None:
        for tensors in tensors_of(module):
            tensors.update(
                {name: widened(read(prefixes[module] + name)) for name in tensors if tensors[name] is not None}
            )

    def drop(module: nn.Module, *_: Any) -> None:
        # fp32 here too: a module may ask for the type of another's weight before that is read
        for tensors, empty in zip(tensors_of(module), own[module], strict=True):
            tensors.update({name: widened(tensor) for name, tensor in empty.items() if tensor is not None})

    handles = []
    try:
        for module in network.modules():
            drop(module)
            if module is not network:
                handles += [module.register_forward_pre_hook(fill), module.register_forward_hook(drop)]
        fill(network)  # its methods are called, not itself, so its own tensors need no hook
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in network.modules():
            for tensors, empty in zip(tensors_of(module), own[module], strict=True):
                tensors.update(empty)


def tensors_of(module: nn.Module) -> list[dict[str, Any]]:
    """A module's own parameters and buffers, by name, as the tables it looks them up in."""
    return [module._parameters, module._buffers]


def widened(tensor: Tensor) -> Tensor:
    """The tensor in fp32 where it is of a floating type."""
    return tensor.float() if tensor.is_floating_point() else tensor


class TorchSession:
    """A graph of a network in fp32 under PyTorch on the CPU, its weights streamed from the checkpoint."""

    def __init__(self, name: str, network: Network, graph: Graph, read: Read) -> None:
        """`network` lies on the meta device; `read` gives a tensor by its name in the network."""
        self.name, self._network, self._graph, self._read = name, network, graph, read
        self._constants = network.constants()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a call takes."""
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What a call gives."""
        return self._graph.outputs

    def _tensor(self, name: str) -> Tensor:
        return self._constants[name] if name in self._constants else self._read(name)

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run the method once on NumPy arrays; raises InputError for arrays that do not fit."""
        check_arrays(self.name, self.inputs, arrays)
        inputs = [torch.from_numpy(arrays[spec.name].copy()) for spec in self.inputs]
        try:
            with torch.no_grad(), streamed(self._network, self._tensor):
                outputs = self._graph.call(self._network, inputs)
        except RuntimeError as error:
            raise BackendError(f"{self.name}: PyTorch failed: {error}") from error
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        return {spec.name: result.contiguous().numpy() for spec, result in zip(self.outputs, results, strict=True)}

    def close(self) -> None:
        """Nothing to free: no weight stays in memory between calls."""
