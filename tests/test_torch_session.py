"""Networks run from the disk, module by module, against the same networks with their weights in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kandrt.engines.errors import BackendError, CheckpointError, InputError
from kandrt.engines.session import Session
from kandrt.export.check import random_inputs
from kandrt.export.checkpoint import open_checkpoint
from kandrt.export.network import Job, SourceNetwork
from kandrt.export.torch_session import TorchSession, streamed

# Role of the checkpoint, submodel, graphs
NETWORKS = [
    ("prior", "prior", ("context", "step")),
    ("prior", "text_encoder", ("",)),
    ("prior", "image_encoder", ("",)),
    ("controlnet", "unet", ("context", "step")),
    ("decoder", "movq", ("encoder", "decoder")),
]
Open = Callable[..., SourceNetwork]


@pytest.fixture
def network(checkpoints: dict[str, Path]) -> Open:
    def make(role: str, submodel: str, *graphs: str) -> SourceNetwork:
        checkpoint = open_checkpoint(checkpoints[role])
        return SourceNetwork(Job(submodel, checkpoint.submodels[submodel], None, {graph: graph for graph in graphs}))

    return make


def in_memory(source: SourceNetwork) -> nn.Module:
    """The network with all its weights, read by the safetensors library."""
    (file,) = source.weights.folder.glob("*.safetensors")
    stored = safetensors.torch.load_file(file)
    network = source.kind.build(source.config).eval()
    names = {name: source.stored_name(name) for name in network.state_dict()}
    network.load_state_dict({name: stored[stored_name] for name, stored_name in names.items()})
    return network


def state(network: nn.Module) -> dict[str, tuple[int, torch.dtype, str]]:
    """Identity, type and place of every parameter and buffer."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return {name: (id(tensor), tensor.dtype, tensor.device.type) for name, tensor in tensors}


def same(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    """The same operations on the same numbers: only PyTorch's choice of kernels by the alignment of memory differs."""
    return bool(np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected))


@pytest.mark.parametrize(("role", "submodel", "graphs"), NETWORKS)
def test_a_streamed_network_computes_what_it_computes_in_memory(
    role: str, submodel: str, graphs: tuple[str, ...], network: Open
) -> None:
    source = network(role, submodel, *graphs)
    reference, before = in_memory(source), state(source.network)
    for key, session in source.sessions().items():
        graph = source.graphs[key]
        assert isinstance(session, Session)
        assert (session.inputs, session.outputs) == (graph.inputs, graph.outputs)
        inputs = random_inputs(graph.inputs, graph.multiples)
        with torch.no_grad():
            expected = getattr(reference, graph.method)(*(torch.from_numpy(inputs[spec.name]) for spec in graph.inputs))
        expected = expected if isinstance(expected, tuple) else (expected,)
        found = session(**inputs)
        assert list(found) == [spec.name for spec in graph.outputs]
        for name, tensor in zip(found, expected, strict=True):
            assert found[name].dtype == np.float32
            assert same(found[name], tensor.numpy())
        assert state(source.network) == before
        assert {device for _, _, device in before.values()} == {"meta"}
        session.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_precision_of_the_graphs_does_not_reach_the_reference(dtype: torch.dtype, network: Open) -> None:
    source = network("controlnet", "unet", "context", "step")
    graph = source.graphs["step"]
    inputs = random_inputs(graph.inputs, graph.multiples)
    expected = source.sessions()["step"](**inputs)["prediction"]
    source.network.set_precision(dtype)
    before = state(source.network)
    assert dtype in {kind for _, kind, _ in before.values()}
    assert same(source.sessions()["step"](**inputs)["prediction"], expected)
    assert state(source.network) == before  # what is traced next is traced at `dtype`


def test_weights_stored_in_half_precision_are_widened(network: Open) -> None:
    source = network("prior", "prior", "step")
    inputs = random_inputs(source.graphs["step"].inputs, {})
    halves = TorchSession("step", source.network, source.graphs["step"], lambda name: source.read(name).half())
    rounded = TorchSession("step", source.network, source.graphs["step"], lambda name: source.read(name).half().float())
    assert same(halves(**inputs)["prediction"], rounded(**inputs)["prediction"])


def layers(count: int) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.device("meta"):
        network = nn.Sequential(*(nn.Linear(8, 8) for _ in range(count)))
    return network, {name: torch.randn(tensor.shape) for name, tensor in network.state_dict().items()}


def test_one_module_is_in_memory_at_a_time() -> None:
    network, stored = layers(6)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        tensor = stored[name].clone()
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    with torch.no_grad(), streamed(network, read):
        network(torch.randn(1, 8))
    assert len(alive) == 12
    assert most == 2  # a weight and its bias
    gc.collect()
    assert not any(reference() is not None for reference in alive)


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CheckpointError])
@pytest.mark.parametrize("name", ["0.weight", "1.bias", "2.weight"])
def test_whatever_fails_the_network_is_as_before(error: type[BaseException], name: str) -> None:
    network, stored = layers(3)
    before, hooks = state(network), [len(module._forward_pre_hooks) for module in network.modules()]

    def read(wanted: str) -> Tensor:
        if wanted == name:
            raise error("stop")
        return stored[wanted]

    with pytest.raises(error, match="stop"), streamed(network, read):
        network(torch.randn(1, 8))
    with pytest.raises(ValueError, match="in the body"), streamed(network, stored.__getitem__):
        raise ValueError("in the body")
    assert state(network) == before
    assert [len(module._forward_pre_hooks) for module in network.modules()] == hooks
    assert not any(module._forward_hooks for module in network.modules())


def test_errors_name_the_component(network: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    source = network("prior", "prior", "step")
    session = source.sessions()["step"]
    inputs = random_inputs(session.inputs, {})
    with pytest.raises(InputError, match="step: missing input 'sample'"):
        session(**{name: array for name, array in inputs.items() if name != "sample"})
    before = state(source.network)
    monkeypatch.setattr(source.network.norm_out, "forward", Failing().forward)
    with pytest.raises(BackendError, match="step: PyTorch failed: out of memory"):
        session(**inputs)
    monkeypatch.undo()
    assert state(source.network) == before
    session(**inputs)


def test_inputs_are_not_changed_and_may_be_read_only(network: Open) -> None:
    source = network("prior", "prior", "step")
    inputs = random_inputs(source.graphs["step"].inputs, {})
    copies = {name: array.copy() for name, array in inputs.items()}
    for array in inputs.values():
        array.flags.writeable = False
    source.sessions()["step"](**inputs)
    for name, array in inputs.items():
        np.testing.assert_array_equal(array, copies[name])
