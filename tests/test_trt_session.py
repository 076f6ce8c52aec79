"""Sessions of TensorRT and TensorRT-RTX on a simulated GPU: ONNX Runtime's numbers, and how they come about.

The simulator computes with ONNX Runtime, so numbers are equal to the last bit unless something read or wrote the wrong
memory, shape or moment; those it checks as well: see gpu_simulator.py and trt_simulator.py.
"""

from __future__ import annotations

import gc
import inspect
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kandrt.engines import backends, trt_session
from kandrt.engines.backends import BACKENDS, open_component
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import BackendError, BundleError, InputError, NumericalError
from kandrt.engines.plans import Builder, PlanRecord
from kandrt.engines.profiles import Coverage, Profile, component_profiles
from kandrt.engines.session import Session
from kandrt.engines.store import EngineStore
from kandrt.engines.trt_engine import DTYPES, JitCache, Plans, Settings
from kandrt.engines.trt_session import MAX_GRAPHS, SESSIONS, TrtSession, loaded, settings_of, wider
from kandrt.runtime import load
from kandrt.runtime.miniature import MINIATURE
from kandrt.runtime.sampling import check_finite

from . import trt_simulator
from .gpu_simulator import CAPTURING, DEFAULT, Gpu, GpuError
from .oracle import box, picture
from .session_inputs import LENGTHS, arrays, fits, reference
from .trt_simulator import activations, make_plan, simulated

BUILDERS: tuple[Builder, ...] = ("tensorrt", "tensorrt-rtx")
WIDE = Coverage((64, 128, 192), (1, 1, 2))
STATIC = Coverage((64, 64, 64), (1, 1, 1), static=True)

Plan = tuple[PlanRecord, bytes]


@pytest.fixture
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


def plan(bundle: Bundle, name: str, *coverages: Coverage, builder: Builder = "tensorrt", **facts: Any) -> Plan:
    return make_plan(bundle, name, component_profiles(bundle.manifest, name, coverages), builder=builder, **facts)


def session(
    bundle: Bundle, name: str, gpu: Gpu, *plans: Plan, builder: Builder = "tensorrt", settings: Settings | None = None
) -> TrtSession:
    contents = {record.plan.file: data for record, data in plans}
    return SESSIONS[builder](
        name,
        bundle.manifest.components[name],
        Plans(
            [record for record, _ in plans],
            lambda record: contents[record.plan.file],
            lambda: bundle.path(bundle.manifest.components[name].graph),
            lambda axes: f"build {axes}",
        ),
        simulated(gpu, builder),
        gpu,
        settings or Settings(),
    )


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array.get(), expected[name], err_msg=name)


# Numbers


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("static", [False, True])
def test_every_component_gives_what_onnxruntime_gives(builder: Builder, static: bool, opened: Bundle) -> None:
    coverage = replace(STATIC, static=static) if static else WIDE
    for name in opened.manifest.components:
        gpu, ort = Gpu(), reference(opened, name)
        with_plan = session(opened, name, gpu, plan(opened, name, coverage, builder=builder), builder=builder)
        for seed in range(4):  # eager, captured, replayed twice
            inputs = arrays(ort.inputs, seed, **fits(name))
            assert_same(with_plan(**inputs), ort(**inputs))
        with_plan.close()


def test_shapes_may_change_from_call_to_call(opened: Bundle, gpu: Gpu) -> None:
    ort, trt = (
        reference(opened, "decoder_step"),
        session(opened, "decoder_step", gpu, plan(opened, "decoder_step", WIDE)),
    )
    for height, width, batch in ((8, 8, 1), (24, 16, 2), (8, 8, 1), (16, 24, 4), (24, 16, 2)):
        inputs = arrays(ort.inputs, height=height, width=width, batch=batch)
        assert_same(trt(**inputs), ort(**inputs))
    assert gpu.counts["contexts"] == 1


def test_inputs_may_lie_anywhere_and_in_any_order(opened: Bundle, gpu: Gpu) -> None:
    """On the host or the device, strided, or of another library."""
    ort, trt = reference(opened, "prior_step"), session(opened, "prior_step", gpu, plan(opened, "prior_step", WIDE))
    inputs = arrays(ort.inputs)
    expected = ort(**inputs)
    assert_same(trt(**{name: trt.to_device(array) for name, array in inputs.items()}), expected)
    assert_same(trt(**{name: np.asfortranarray(array) for name, array in inputs.items()}), expected)
    strided = {name: trt.to_device(np.repeat(array, 2, axis=0))[::2, ...] for name, array in inputs.items()}
    assert_same(trt(**strided), expected)


def test_outputs_are_the_caller_s_own(opened: Bundle, gpu: Gpu) -> None:
    """With a graph too, whose buffers the next run overwrites."""
    ort, trt = reference(opened, "prior_step"), session(opened, "prior_step", gpu, plan(opened, "prior_step", STATIC))
    inputs = [arrays(ort.inputs, seed) for seed in range(6)]
    found = [trt(**each) for each in inputs]
    assert gpu.counts["replays"] >= 4
    for each, result in zip(inputs, found, strict=True):
        assert_same(result, ort(**each))


# Pictures


def runs(bundle: Path, gpu: Gpu, coverage: Coverage, builder: Builder = "tensorrt") -> dict[str, Session]:
    opened = open_bundle(bundle)
    return {
        name: session(opened, name, gpu, plan(opened, name, coverage, builder=builder), builder=builder)
        for name in opened.manifest.components
    }


@pytest.mark.parametrize(
    ("builder", "coverage"),
    [("tensorrt", Coverage((64, 64, 128))), ("tensorrt", Coverage((64, 128, 128), static=True)),
     ("tensorrt-rtx", Coverage((64, 128, 128), static=True))],
)  # fmt: skip
def test_a_picture_of_the_miniature_without_waiting(builder: Builder, coverage: Coverage, gpu: Gpu) -> None:
    """The same picture, and the host waits neither in a loop's steps nor between them."""
    moments: dict[tuple[str, int], Any] = {}
    request = {"height": 128, "width": 128, "steps": 4, "prior_steps": 4, "seed": 1}

    def note(stage: str, done: int, _: int, __: Any) -> None:
        moments[stage, done] = gpu.counts.copy()

    with load(sessions=runs(MINIATURE, gpu, coverage, builder)) as k, load(threads=1) as cpu:
        found = k("a large red circle on a blue background", callback=note, **request)  # type: ignore[arg-type]
        expected = cpu("a large red circle on a blue background", **request)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.array, expected.array, atol=1e-4)  # the schedulers' sums in NumPy on both sides
    for stage in ("prior", "decoder"):
        first, last = moments[stage, 1], moments[stage, 4]
        assert last["waits"] == first["waits"], stage
        assert last["allocations"] == first["allocations"], stage
        assert last["shape changes"] == first["shape changes"], stage
        assert last["memory changes"] == first["memory changes"], stage
        if coverage.static:  # buffers of its own: addresses stay, and after the second run a graph is all that runs
            assert last["address changes"] == first["address changes"], stage
            ran = {"tensorrt": ("captures", "replays"), "tensorrt-rtx": ("library captures", "library replays")}[
                builder
            ]
            assert (last - first)[ran[1]] == 3, stage
            assert (last - first)[ran[0]] == (1 if builder == "tensorrt" else 0), stage


@pytest.mark.parametrize("mode", ["image", "inpaint", "controlnet"])
def test_every_mode_on_the_device(mode: str, bundle: Path, gpu: Gpu) -> None:
    sources: dict[str, Callable[[], dict[str, Any]]] = {
        "image": lambda: {"image": picture(64, 64, 1), "strength": 0.6},
        "inpaint": lambda: {"image": picture(64, 64, 1), "mask": box(64, 64, 0.25, 0.25, 0.75, 0.75)},
        "controlnet": lambda: {"hint": picture(64, 64, 2)},
    }
    request = {"height": 64, "width": 64, "steps": 3, "prior_steps": 2, "seed": 1, **sources[mode]()}
    with load(bundle, sessions=runs(bundle, gpu, WIDE)) as k, load(bundle, threads=1) as cpu:
        np.testing.assert_allclose(k("a cat", **request).array, cpu("a cat", **request).array, atol=1e-4)


def test_nan_on_the_device_is_found_without_waiting_for_it_at_each_step(gpu: Gpu) -> None:
    with pytest.raises(NumericalError):
        check_finite(np.array([np.nan]))
    check_finite(gpu.upload(np.array([np.nan])))
    assert gpu.counts["waits"] == 0


# What is set when


def test_shapes_addresses_and_memory_are_set_when_they_change(opened: Bundle, gpu: Gpu) -> None:
    trt = session(opened, "prior_step", gpu, plan(opened, "prior_step", WIDE))
    inputs = {name: trt.to_device(array) for name, array in arrays(trt.inputs).items()}
    result = trt(**inputs)
    first = gpu.counts.copy()
    assert first["shape changes"] == len(trt.inputs)
    assert first["address changes"] == len(trt.inputs) + len(trt.outputs)
    assert first["memory changes"] == first["allocations"] - first["engines"] == 1
    del result  # its block is the next result's
    held = trt(**inputs)
    assert gpu.counts - first == {"runs": 1}
    assert trt(**inputs)["prediction"].address != held["prediction"].address
    assert gpu.counts - first == {"runs": 2, "address changes": 1}
    trt(**{name: trt.to_device(array) for name, array in arrays(trt.inputs, batch=1).items()})
    after = gpu.counts - first
    assert after["shape changes"] == len(trt.inputs)
    assert after["allocations"] == 0  # smaller shapes fit
    assert after["waits"] == 0


def test_activation_memory_is_shared_and_grows(opened: Bundle, gpu: Gpu) -> None:
    """Contexts that do not overlap have one block; when it moves, each hears of it at its next call."""
    small, large = (session(opened, name, gpu, plan(opened, name, WIDE)) for name in ("prior_step", "decoder_step"))
    expected = {each: reference(opened, each.name) for each in (small, large)}
    lengths: list[dict[str, int]] = [{}, {"height": 24, "width": 24}, {"height": 8, "width": 24}]
    for size in lengths:
        for each in (small, large, small):
            inputs = arrays(each.inputs, **size)
            assert_same(each(**inputs), expected[each](**inputs))
    shared = gpu.activations
    assert small.memory.activations == large.memory.activations == shared.size
    assert gpu.counts["allocations"] - gpu.counts["engines"] == 3  # small, large, larger
    small.close()
    assert shared.size > 0
    large.close()
    assert shared.size == 0
    gc.collect()
    assert gpu.used == 0


# CUDA graphs


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_graph_is_captured_once_a_shape_and_replayed(builder: Builder, opened: Bundle, gpu: Gpu) -> None:
    ort = reference(opened, "decoder_step")
    trt = session(opened, "decoder_step", gpu, plan(opened, "decoder_step", WIDE, builder=builder),
                  builder=builder, settings=Settings(cuda_graph=True))  # fmt: skip
    for size in (16, 8, 16, 8, 16, 8):
        inputs = arrays(ort.inputs, size, height=size)
        assert_same(trt(**inputs), ort(**inputs))
    if builder == "tensorrt":
        assert (gpu.counts["captures"], gpu.counts["replays"], gpu.counts["runs"]) == (2, 4, 2)
    else:
        assert (gpu.counts["library captures"], gpu.counts["library replays"]) == (2, 4)
        assert gpu.counts["captures"] == 0
    assert trt.memory.buffers > 0


def test_graphs_do_not_outlive_the_memory_they_use(opened: Bundle, gpu: Gpu) -> None:
    """Another session makes the activation memory grow: what was captured over the old address runs no more."""
    ort, static = (
        reference(opened, "prior_step"),
        session(opened, "prior_step", gpu, plan(opened, "prior_step", STATIC)),
    )
    other = session(opened, "decoder_step", gpu, plan(opened, "decoder_step", WIDE))
    inputs = arrays(ort.inputs)
    for _ in range(3):
        static(**inputs)
    before = gpu.activations.address
    other(**arrays(other.inputs, height=24, width=24))
    assert gpu.activations.address != before
    for _ in range(3):
        assert_same(static(**inputs), ort(**inputs))
    assert gpu.counts["captures"] == 2


def test_the_number_of_graphs_is_bounded(opened: Bundle, gpu: Gpu) -> None:
    ort = reference(opened, "decoder_step")
    trt = session(opened, "decoder_step", gpu, plan(opened, "decoder_step", WIDE), settings=Settings(cuda_graph=True))
    sizes = [(8, 8), (8, 16), (16, 8), (16, 16), (24, 8), (8, 24)]
    inputs = [arrays(ort.inputs, height=height, width=width) for height, width in [*sizes, sizes[0]]]
    found = [trt(**each) for each in inputs]  # nothing waits in between, other than what has to
    for each, result in zip(inputs, found, strict=True):
        assert_same(result, ort(**each))
    gc.collect()
    assert gpu.counts["contexts"] - gpu.freed.count("context") == MAX_GRAPHS  # none was freed in use


def test_what_cannot_be_captured_is_not(opened: Bundle, gpu: Gpu) -> None:
    """Automatic graphs: a warning says so once; asked for, an error does."""
    for builder in BUILDERS:
        made = plan(opened, "prior_step", STATIC, builder=builder, capturable=False)
        ort, trt = reference(opened, "prior_step"), session(opened, "prior_step", gpu, made, builder=builder)
        inputs = arrays(ort.inputs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                assert_same(trt(**inputs), ort(**inputs))
        assert ["prior_step: runs without a CUDA graph" in str(each.message) for each in caught] == [True]
        asked = session(opened, "prior_step", gpu, made, builder=builder, settings=Settings(cuda_graph=True))
        if builder == "tensorrt":  # which is run once before it is captured
            asked(**inputs)
        with pytest.raises(BackendError, match=r"prior_step: no CUDA graph: .*; leave cuda_graph out"):
            asked(**inputs)


def test_streamed_weights_are_never_captured(opened: Bundle, gpu: Gpu) -> None:
    made = plan(opened, "prior_step", STATIC, weights=2**20, streamable=2**19)
    trt = session(opened, "prior_step", gpu, made)
    for _ in range(3):
        trt(**arrays(trt.inputs))
    assert gpu.counts["captures"] == 0
    assert (trt.memory.weights, trt.memory.resident) == (2**20, 2**20 - 2**18)  # the library's own budget: half
    chosen = session(opened, "prior_step", gpu, made, settings=Settings(budget=0))
    assert chosen.memory.resident == 2**19
    with pytest.raises(InputError, match="cuda_graph: prior_step streams its weights, which no CUDA graph can"):
        session(opened, "prior_step", gpu, made, settings=Settings(cuda_graph=True))
    with pytest.warns(UserWarning, match="prior_step: weight_streaming_budget does nothing"):
        session(opened, "prior_step", gpu, plan(opened, "prior_step", STATIC), settings=Settings(budget=5))


# Profiles


def test_the_profile_that_fits_best_is_chosen(opened: Bundle, gpu: Gpu) -> None:
    """Fixed shapes first, then the nearest best length; plans are opened when they are needed."""
    name = "decoder_step"
    static = plan(opened, name, STATIC)
    dynamic = plan(opened, name, WIDE, Coverage((64, 192, 192), (1, 1, 2)))
    trt, ort = session(opened, name, gpu, static, dynamic), reference(opened, name)
    assert gpu.counts["engines"] == 0
    for side, batch, engines, contexts in ((8, 2, 1, 1), (16, 2, 2, 2), (24, 2, 2, 3), (16, 2, 2, 3), (8, 1, 2, 3)):
        inputs = arrays(ort.inputs, height=side, width=side, batch=batch)
        assert_same(trt(**inputs), ort(**inputs))
        assert (gpu.counts["engines"], gpu.counts["contexts"]) == (engines, contexts), (side, batch)


def test_sizes_outside_of_all_profiles_are_refused_with_the_command(opened: Bundle, gpu: Gpu) -> None:
    name = "decoder_step"
    trt = session(opened, name, gpu, plan(opened, name, STATIC), plan(opened, name, WIDE))
    inputs = arrays(trt.inputs, height=32)
    with pytest.raises(InputError) as caught:
        trt(**inputs)
    message = str(caught.value)
    assert message.startswith(
        "decoder_step: no engine was built for batch 2, height 32, width 8; those there are take "
    )
    for part in ("batch 2, height 8, width 8", "batch 1:2:4, height 8:16:24, width 8:16:24", "run: build {'batch': 2"):
        assert part in message
    assert gpu.counts["runs"] == 0


@pytest.mark.parametrize("name", ["text_encoder", "prior_step", "decoder_step", "movq_decoder", "controlnet_context"])
@pytest.mark.parametrize("lengths", [{}, {"height": 40, "image_height": 320}, {"width": 400, "batch": 11}])
def test_the_command_builds_what_was_asked_for(name: str, lengths: dict[str, int], opened: Bundle) -> None:
    if name.startswith("movq"):
        lengths = {**lengths, "batch": 1}
    asked = {axis for spec in opened.manifest.components[name].inputs for axis in spec.shape if isinstance(axis, str)}
    axes = {axis: {**LENGTHS, **lengths}[axis] for axis in asked}
    profiles = component_profiles(opened.manifest, name, [wider(opened, name, axes)])
    assert any(profile.holds(axes) for profile in profiles)


# Plans that cannot be used


def test_a_plan_of_another_version_or_gpu_is_refused_with_the_library_s_words(opened: Bundle, gpu: Gpu) -> None:
    wrong = {"version 1.0": {"version": "0.9"}, "compute capability sm75": {"capability": "sm75"}}
    for words, facts in wrong.items():
        for builder in BUILDERS:
            with pytest.raises(BackendError, match=f"prior_step: {builder} cannot open prior_step-.*plan.*{words}"):
                session(opened, "prior_step", gpu, plan(opened, "prior_step", WIDE, builder=builder, **facts),
                        builder=builder)  # fmt: skip
    record, _ = plan(opened, "prior_step", WIDE)
    with pytest.raises(BackendError, match=r"cannot open .*\(malformed\): .*magicTag"):
        session(opened, "prior_step", gpu, (record, b"junk"), builder="tensorrt-rtx")
    assert gpu.used == 0
    assert gpu.activations.size == 0


def test_a_plan_of_another_graph_is_refused(opened: Bundle, gpu: Gpu) -> None:
    record, _ = plan(opened, "prior_step", WIDE)
    for name, words in (("decoder_step", "a tensor added_kv too many;.*no tensor attention_bias;"),
                        ("inpaint_step", "a tensor concat_latents too many")):  # fmt: skip
        _, other = plan(opened, name, WIDE)
        with pytest.raises(BundleError, match=f"prior_step: .* is not a plan of this graph: .*{words}.*build it again"):
            session(opened, "prior_step", gpu, (record, other))


def test_a_plan_without_weights_is_filled_from_the_graph(opened: Bundle, gpu: Gpu) -> None:
    ort = reference(opened, "prior_step")
    trt = session(opened, "prior_step", gpu, plan(opened, "prior_step", WIDE, stripped=True))
    assert_same(trt(**arrays(ort.inputs)), ort(**arrays(ort.inputs)))
    record, data = plan(opened, "prior_step", WIDE, stripped=True)
    nothing = Plans([record], lambda _: data, lambda: Path("nowhere.onnx"), str)
    with pytest.raises(
        BackendError, match=r"tensorrt cannot fill prior_step-.*\.plan with weights \(lacks all\): .*nowhere"
    ):
        TrtSession("prior_step", opened.manifest.components["prior_step"], nothing, simulated(gpu), gpu, Settings())


# Memory


def test_running_out_of_memory_says_what_would_help(opened: Bundle) -> None:
    advice = r"MiB of .* are free; what lowers it: memory='stage', .*--size or --batch, .*--weight-streaming"
    made = plan(opened, "decoder_step", WIDE, weights=2**20)
    with pytest.raises(BackendError, match=f"decoder_step: out of GPU memory: cannot open .*OutOfMemory.*{advice}"):
        session(opened, "decoder_step", Gpu(2**19), made)
    tight = Gpu(2**20 + 3000)
    trt = session(opened, "decoder_step", tight, made)
    with pytest.raises(BackendError, match=f"decoder_step: out of GPU memory: inputs and outputs; .*{advice}"):
        trt(**arrays(trt.inputs))
    with pytest.raises(BackendError, match=f"decoder_step: out of GPU memory: inputs; .*{advice}"):
        trt.to_device(np.zeros(10_000))
    trt.close()
    # so little is left that inputs and outputs have room, and activations have none
    inputs = arrays(trt.inputs, height=24, width=24, batch=1)
    shapes = {name: array.shape for name, array in inputs.items()}
    barely = Gpu()
    trt = session(opened, "decoder_step", barely, made)
    here = {name: trt.to_device(array) for name, array in inputs.items()}
    barely.total = barely.used + activations(shapes) - 1
    with pytest.raises(BackendError, match=f"decoder_step: out of GPU memory: activations; .*{advice}"):
        trt(**here)
    del here
    small = arrays(trt.inputs, batch=1)
    assert_same(trt(**small), reference(opened, "decoder_step")(**small))  # it goes on with what there is room for


def test_closing_frees_in_the_right_order_and_for_good(opened: Bundle, gpu: Gpu) -> None:
    trt = session(opened, "prior_step", gpu, plan(opened, "prior_step", STATIC))
    inputs = arrays(trt.inputs)
    held = trt(**inputs)
    trt.close()
    trt.close()
    gc.collect()
    assert gpu.freed == ["context", "engine", "memory"]
    assert held["prediction"].get().shape == (2, 32)  # outputs are the caller's
    with pytest.raises(BackendError, match="prior_step: the session is closed; load the bundle again"):
        trt(**inputs)
    del held
    gpu.trim()
    assert gpu.used == 0


def test_stages_are_closed_one_after_the_other(bundle: Path, gpu: Gpu) -> None:
    """What memory='stage' does: sessions opened and closed in turn leave nothing behind."""
    opened = open_bundle(bundle)
    for name in opened.manifest.components:
        trt = session(opened, name, gpu, plan(opened, name, WIDE))
        trt(**arrays(trt.inputs, **fits(name)))
        trt.close()
        del trt
        gc.collect()
        assert gpu.used == 0


# Order


def test_results_are_ready_for_the_caller_s_stream_whichever_it_is(opened: Bundle, gpu: Gpu) -> None:
    """The simulator refuses work on memory that no promise orders after the work before it."""
    ort, trt = reference(opened, "prior_step"), session(opened, "prior_step", gpu, plan(opened, "prior_step", STATIC))
    inputs = arrays(ort.inputs)
    for stream in (DEFAULT, 3, gpu.stream, 4):
        with gpu.on(stream):
            here = {name: trt.to_device(array) * 2 for name, array in inputs.items()}
            found = trt(**here)["prediction"] + 1
            doubled = {name: array * 2 for name, array in inputs.items()}
            np.testing.assert_array_equal(found.get(), ort(**doubled)["prediction"] + 1)


def test_the_simulator_sees_work_out_of_order(gpu: Gpu) -> None:
    array = gpu.upload(np.ones(4, np.float32))
    with gpu.on(3), pytest.raises(GpuError, match="stream 3 does not wait for the writes"):
        array + 1
    with pytest.raises(GpuError, match="waiting while a graph is captured"):
        gpu.capture(lambda stream: gpu.synchronize())
    with pytest.raises(GpuError, match="allocating while a graph is captured"):
        gpu.capture(lambda stream: gpu.upload(np.ones(4)) and None)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(array)
    assert gpu.capturing(CAPTURING) is False


def test_threads_take_turns(opened: Bundle, gpu: Gpu) -> None:
    """Two sessions in four threads, each with a current stream of its own; contexts and activations are not torn."""
    names = ("prior_step", "decoder_step")
    both = {name: session(opened, name, gpu, plan(opened, name, STATIC, WIDE)) for name in names}
    expected = {name: reference(opened, name) for name in names}
    problems: list[BaseException] = []

    def work(index: int) -> None:
        name = names[index % 2]
        try:
            with gpu.on(10 + index):
                for seed in range(6):
                    inputs = arrays(both[name].inputs, seed, batch=1 + (seed + index) % 2)
                    assert_same(both[name](**inputs), expected[name](**inputs))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems


# TensorRT-RTX's own cache


def test_compiled_kernels_are_kept_from_one_session_to_the_next(opened: Bundle, gpu: Gpu, tmp_path: Path) -> None:
    folder = tmp_path / "caches" / "a"
    made = plan(opened, "prior_step", WIDE, builder="tensorrt-rtx")
    path = folder / f"{Path(made[0].plan.file).stem}-sm89.bin"  # a file for each plan

    def compiled() -> int:
        before = gpu.counts["compiled"]
        trt = session(
            opened, "prior_step", gpu, made, builder="tensorrt-rtx", settings=Settings(cache=folder / "sm89.bin")
        )
        trt(**arrays(trt.inputs))
        trt.close()
        return gpu.counts["compiled"] - before

    assert [compiled(), compiled()] == [1, 0]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert [compiled(), compiled()] == [1, 0]
    path.unlink()
    path.parent.chmod(0o500)
    path.mkdir()  # cannot be written, by root either
    assert [compiled(), compiled()] == [1, 1]


def test_a_cache_without_a_place_is_none() -> None:
    cache = JitCache(None)
    cache.save()


# From the store


def test_a_component_is_opened_from_the_store(
    bundle: Path, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `load` does it: only what can be used here, and only bytes that a record names."""
    copy = open_bundle(shutil.copytree(bundle, tmp_path / "bundle"))
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.setattr(trt_session, "library", lambda builder: None)
    for name, value in (("capability", "sm89"), ("library_version", "1.0"), ("cupy_device", gpu),
                        ("loaded", simulated(gpu, "tensorrt-rtx"))):  # fmt: skip
        monkeypatch.setattr(trt_session, name, lambda *_, value=value: value)

    def opened() -> Session:
        return open_component(copy, "prior_step", backend="tensorrt-rtx", device="cuda")

    command = re.escape(f"run: kandrt build {copy.folder} --backend tensorrt-rtx --gpu sm89")
    with pytest.raises(BackendError, match=f"prior_step: no tensorrt-rtx engine can be used here; {command}"):
        opened()
    store = EngineStore(copy)
    made = {}
    for facts in ({"version": "0.9"}, {"capability": "sm75"}, {}):
        record, data = plan(copy, "prior_step", WIDE, builder="tensorrt-rtx", **facts)
        made[record.plan.file] = data
        with store.building(record.key) as temporary:
            temporary.write_bytes(data)
            store.add(record, temporary)
    session = opened()
    inputs = arrays(session.inputs)
    assert_same(session(**inputs), reference(copy, "prior_step")(**inputs))
    with pytest.raises(
        InputError, match=f"no engine was built for batch 9; .* take batch .*; {command} --size .* --batch"
    ):
        session(**arrays(session.inputs, batch=9))
    session.close()
    assert [path.name for path in (copy.folder / "engines" / "caches").rglob("*.bin")] == [
        f"{Path(record.plan.file).stem}-sm89.bin"
    ]
    store.path(record).write_bytes(made[record.plan.file].replace(b"sm89", b"sm90"))
    with pytest.raises(BundleError, match=r"\.plan is damaged: expected SHA-256 .* run: kandrt build"):
        opened()


# The simulator and the real library, as far as it goes without a GPU


def test_the_simulator_has_nothing_that_the_library_has_not() -> None:
    """Classes, methods with their arguments, and enums."""
    trt = pytest.importorskip("tensorrt_rtx")
    simulated_classes = {
        trt_simulator.Runtime: trt.Runtime, trt_simulator.Engine: trt.ICudaEngine,
        trt_simulator.Context: trt.IExecutionContext, trt_simulator.RuntimeConfig: trt.IRuntimeConfig,
        trt_simulator.RuntimeCache: trt.IRuntimeCache, trt_simulator.Refitter: trt.Refitter,
        trt_simulator.OnnxParserRefitter: trt.OnnxParserRefitter,
    }  # fmt: skip
    for ours, theirs in simulated_classes.items():
        for name, value in vars(ours).items():
            if name.startswith("_") or name == "output_shapes":
                continue
            assert hasattr(theirs, name), f"{theirs.__name__} has no {name}"
            if inspect.isfunction(value):  # pybind11's docstring begins with the signatures
                said = getattr(theirs, name).__doc__
                expected = len(inspect.signature(value).parameters)
                signatures = re.findall(rf"{name}\((self.*?)\) ->", said)
                assert expected in {len(re.findall(r"(?:^|, )\w+: ", each)) for each in signatures}, (name, signatures)
    assert hasattr(trt.Runtime, "get_engine_validity")
    assert hasattr(trt.IExecutionContext, "is_stream_capturable")
    for name in ("cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"):
        assert hasattr(trt.IRuntimeConfig, name)
    for enum in ("DataType", "TensorIOMode", "Strategy", "EngineStat", "CudaGraphStrategy", "Specialization"):
        ours = getattr(trt_simulator, enum)
        assert set(ours.__members__) <= set(getattr(trt, ours.__name__).__members__), ours.__name__
    assert set(DTYPES) <= set(trt.DataType.__members__)


def test_the_real_library_refuses_what_is_no_plan(opened: Bundle, gpu: Gpu) -> None:
    pytest.importorskip("tensorrt_rtx")
    record, _ = plan(opened, "prior_step", WIDE, builder="tensorrt-rtx")
    junk = Plans([record], lambda _: b"junk" * 1000, lambda: Path("nowhere.onnx"), str)
    component = opened.manifest.components["prior_step"]
    with pytest.raises(
        BackendError, match=r"prior_step: tensorrt-rtx cannot open prior_step-.* \(malformed engine\): "
    ):
        SESSIONS["tensorrt-rtx"]("prior_step", component, junk, loaded("tensorrt-rtx"), gpu, Settings())


# Options and the registry


def test_options_are_checked() -> None:
    assert settings_of({}, None) == Settings()
    assert settings_of({"cuda_graph": "true", "weight_streaming_budget": "12"}, None) == Settings(True, 12)
    for options, words in (
        ({"graph": "true"}, "has no graph; it has cuda_graph, weight_streaming_budget"),
        ({"cuda_graph": "yes"}, "cuda_graph: expected 'true', 'false' or 'auto', found 'yes'"),
        (
            {"weight_streaming_budget": "-1"},
            "weight_streaming_budget: expected a number of bytes or 'auto', found '-1'",
        ),
    ):
        with pytest.raises(InputError, match=words):
            settings_of(options, None)


def test_the_backends_are_known_by_name() -> None:
    for builder in BUILDERS:
        assert BACKENDS[builder].devices == {"cuda": builder}
        assert BACKENDS[builder].implementation.__name__ == "kandrt.engines.trt_session"
        assert SESSIONS[builder].library == builder


def test_profiles_without_axes_take_everything() -> None:
    assert Profile({}).holds({"batch": 3})


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Sessions that a test leaves open are freed in it, not in the middle of another."""
    yield
    gc.collect()
