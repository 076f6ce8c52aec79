"""What GPUs need at least, on paper: by hand, against PyTorch's counter, and kernels that TensorRT-RTX really plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from typer.testing import CliRunner

from kandrt.engines import trt
from kandrt.engines.bundle import open_bundle
from kandrt.engines.errors import BackendError, CheckpointError, InputError
from kandrt.export.costs import graph_costs
from kandrt.runtime.miniature import MINIATURE
from kandrt.scripts import gpu_floor, overhead, roofline
from kandrt.scripts.bench.undivided import eager_launches, find_part, undivided, write_undivided
from kandrt.scripts.gpu_floor import Counted, counted_operations, rows_of
from kandrt.scripts.planned_kernels import kernels_of
from kandrt.scripts.roofline import Floor, Gpu, Operation, Work, floor, graph_work

builds = pytest.mark.skipif(
    trt.library_version("tensorrt-rtx") == "none", reason="needs tensorrt-rtx-cu13, which builds without a GPU"
)
SLOW = Gpu("slow", flops=100.0, bandwidth=10.0, capability="sm00", source="a test")
AXES = {"batch": 2, "height": 16, "width": 16}
HALF = 2  # bytes


# Rooflines


def test_a_floor_by_hand() -> None:
    arithmetic, memory = Operation(1000, 20, 30), Operation(100, 40, 60)
    # the whole: 1100 FLOPs take 11 s, 60 bytes of weights 6; one by one: 10 s of arithmetic, then 10 s of memory
    assert floor(Work((arithmetic, memory), nodes=5), SLOW) == Floor(limit=11.0, operators=20.0)


def test_weights_bound_a_floor_too() -> None:
    assert floor(Work((Operation(100, 400, 0),), nodes=1), SLOW) == Floor(limit=40.0, operators=40.0)


def test_floors_add_up() -> None:
    assert Floor(1, 2) * 3 + Floor(10, 20) == Floor(13, 26)


@pytest.mark.parametrize("name", ["prior_step", "decoder_step", "movq_decoder"])
def test_work_is_what_a_graph_costs(name: str) -> None:
    """FLOPs as `graph_costs` counts, which is held to PyTorch, and half of its bytes, which are of fp32."""
    path = Path(MINIATURE, f"{name}.onnx")
    work, costs = graph_work(path, AXES), graph_costs(path, AXES)
    assert work.flops == costs.flops
    assert work.activations == costs.activation_bytes // 2  # the miniature computes in fp32
    parameters = open_bundle(MINIATURE).manifest.components[name].parameters
    assert 0.9 * HALF * parameters < work.weights <= HALF * parameters  # norms' are read by no counted operator
    assert len(work.operations) < work.nodes


def test_the_precision_of_a_bundle_does_not_matter(bundle: Path, fp16_bundle: Path) -> None:
    """What is counted is 16 bits in any case; nodes may differ, by casts around norms alone, which do not count."""
    one, other = (graph_work(folder / "decoder_step.onnx", AXES) for folder in (bundle, fp16_bundle))
    assert (one.flops, one.weights, one.nodes) == (other.flops, other.weights, other.nodes)
    assert one.activations == other.activations


def test_types_of_16_bits_and_more_are_those_of_onnx() -> None:
    assert set(roofline.FLOATS) == {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}


def test_data_sheets() -> None:
    """The relations that the architectures have: a GPU with a faster tensor core has it by what its sheet says."""
    gpus = {gpu.name: gpu for gpu in roofline.GPUS}
    assert gpus["RTX 4090, fp16 sums"].flops / gpus["RTX 4090"].flops == pytest.approx(2, rel=1e-3)
    # tensor cores x FLOPs a clock each x boost clock: A100 432 x 512 x 1.41 GHz, H100 528 x 1024 x 1.83, Ada 512 x 128
    for name, expected in (
        ("A100", 432 * 512 * 1.41e9),
        ("H100", 528 * 1024 * 1.83e9),
        ("RTX 4090", 512 * 128 * 2.52e9),
    ):
        assert gpus[name].flops == pytest.approx(expected, rel=2e-3)


# The host's share


def test_operations_are_counted() -> None:
    x = np.ones((2, 3)).view(Counted)
    Counted.counted.clear()
    y = x * 2 + 1  # two
    assert np.isfinite(np.concatenate([y, x])).all()  # one: GPUs are spared the check
    y[:1], np.broadcast_to(x[0], (4, 3)), y.shape  # views
    assert Counted.counted.total() == 3
    assert isinstance(y, Counted)


def test_a_step_computes_something_with_and_without_a_network() -> None:
    opened = open_bundle(MINIATURE)
    for stage in gpu_floor.HOST_STAGES.values():
        made = overhead.case(opened, stage, 10)
        # doubled for guidance, guided in three operations, and a sampler that is more than one
        assert 5 <= counted_operations(made, 10) <= 40


# diffusers' network


@pytest.mark.parametrize("role", ["prior", "decoder"])
def test_the_undivided_graph_costs_what_pytorch_counts(role: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from kandrt.export.trace import example_inputs

    network, graph = undivided(checkpoints[role], 64)
    # as matrix products, the counter counts attention like any other
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        graph.call(network, example_inputs(graph)[0])
    path, _ = write_undivided(checkpoints[role], 64, tmp_path)
    work = graph_work(path, {})
    assert work.flops == counter.get_total_flops()
    parameters = sum(each.numel() for each in network.parameters())
    assert 0.8 * HALF * parameters < work.weights <= HALF * parameters


@pytest.mark.parametrize("role", ["prior", "decoder"])
def test_the_undivided_step_does_more(role: str, checkpoints: dict[str, Path], bundle: Path, tmp_path: Path) -> None:
    before = graph_work(write_undivided(checkpoints[role], 64, tmp_path)[0], {})
    after = graph_work(bundle / f"{role}_step.onnx", {"batch": 2, "height": 8, "width": 8})
    assert before.flops > after.flops
    assert before.nodes > after.nodes


def test_eager_launches_are_at_least_its_operations(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path, _ = write_undivided(checkpoints["decoder"], 64, tmp_path)
    operations = len(graph_work(path, {}).operations)
    assert operations < eager_launches(checkpoints["decoder"], 64) < 20 * operations


def test_what_is_no_checkpoint_of_a_step(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="prior or unet"):
        find_part(tmp_path)


# Kernels


LOG = """Engine Layer Information:
Name: node_conv2d_myl0_7, LayerType: correlation, Inputs: [ { Name: a, Dimensions: [2,96] }], TacticName: x
Name: __mye1_myl0_8, LayerType: signal, Inputs: [], Outputs: [], TacticName: , StreamId: 0
Name: __myl_Add_myl0_9, LayerType: kgen, Inputs: [ { Name: b } ]
Name: a+b+c_myl0_10, LayerType: kgen, Inputs: [ { Name: b } ]
"""


def test_kernels_are_read_from_the_builders_list() -> None:
    assert kernels_of(["something else", LOG]) == {"kgen": 2, "correlation": 1}


def test_a_builder_that_lists_nothing_is_an_error() -> None:
    with pytest.raises(BackendError, match="no layers"):
        kernels_of(["Engine generation completed"])


@builds
def test_planned_kernels_are_fewer_than_operators(fp16_bundle: Path) -> None:
    """A builder fuses: there are fewer kernels than operators, and at least one for each convolution."""
    rows, launches = rows_of(open_bundle(fp16_bundle), [64], ["sm89"], lambda _text: None)
    for row, found in zip(rows, launches, strict=True):
        assert found.graph == row.graph
        assert 0 < found.kernels < row.nodes, row.graph
        assert found.planned is not None
        assert found.planned.layers > found.kernels
    convolutions = sum(launches[1].planned.kernels.get(kind, 0) for kind in ("correlation", "runtime_fusion", "kgen"))  # type: ignore[union-attr]
    assert convolutions > 0


@builds
def test_a_graph_that_cannot_be_planned_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"broken: .* cannot read the graph"):
        gpu_floor.planned("broken", tmp_path / "broken.onnx", (), {}, 64, "sm89")


# The command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(gpu_floor.app, list(arguments))


def test_the_command_gives_json() -> None:
    done = run(str(MINIATURE), "--size", "128", "--size", "64", "--steps", "10", "--prior-steps", "5", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {(row["graph"], row["size"]) for row in found["rows"]} == {
        ("prior_step", 64), ("decoder_step", 64), ("decoder_step", 128), ("movq_decoder", 64), ("movq_decoder", 128)
    }  # fmt: skip
    floors = {(row["graph"], row["size"]): row["floors"]["H100"]["limit"] for row in found["rows"]}
    expected = 5 * floors["prior_step", 64] + 10 * floors["decoder_step", 128] + floors["movq_decoder", 128]
    assert found["pictures"]["128"]["H100"]["limit"] == pytest.approx(expected)
    assert all(row["microseconds"] > 0 for row in found["host"])


def test_the_command_prints_tables() -> None:
    done = run(str(MINIATURE), "--size", "128")
    assert done.exit_code == 0, done.output
    for text in ("decoder_step", "A100", "RTX 4090", "datasheet", "host, a step"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--size", "100"], "multiple of"), (["--plan", "sm89"], "fp32")],
)
def test_what_cannot_be_worked_out(arguments: list[str], told: str) -> None:
    done = run(str(MINIATURE), *arguments)
    assert done.exit_code == 1
    assert told in done.stderr


def test_another_family_is_refused(bundle_3: Path) -> None:
    with pytest.raises(InputError, match="kandinsky-3"):
        gpu_floor.records(open_bundle(bundle_3))
