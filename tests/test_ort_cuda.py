"""ONNX Runtime on CUDA devices, on a simulated GPU: the CPU's numbers to the last bit, and CUDA graphs.

The simulator computes with ONNX Runtime on the CPU: see gpu_simulator.py and ort_simulator.py for what it checks.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from kandrt.engines import ort
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import BackendError, InputError
from kandrt.engines.ort import OrtSession, open_session
from kandrt.engines.ort_cuda import MAX_GRAPHS
from kandrt.engines.request import Request

from .gpu_simulator import Gpu
from .ort_simulator import CudaSession
from .session_inputs import arrays, fits, reference

Open = Callable[..., OrtSession]


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def opened(bundle: Any) -> Bundle:
    return open_bundle(bundle)


@pytest.fixture
def made() -> list[CudaSession]:
    """The sessions of ONNX Runtime that were opened, in that order."""
    return []


@pytest.fixture
def open_one(gpu: Gpu, opened: Bundle, made: list[CudaSession], monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens a component as on a GPU; refused: ONNX Runtime says at once that it takes no graphs of it."""

    def opening(name: str, *, refused: bool = False, capturable: bool = True, **options: str) -> OrtSession:
        patterns = not name.startswith("movq")

        def session(graph: str, session_options: Any, providers: Any, enable_fallback: int) -> CudaSession:
            ((_, settings),) = providers
            if refused and settings.get("enable_cuda_graph") == "1":
                raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
            # graphs have their memory; blocks laid out for runs without them would be beside it
            assert session_options.enable_mem_pattern == ("enable_cuda_graph" not in settings and patterns)
            made.append(CudaSession(gpu, onnxruntime.InferenceSession(graph), settings, capturable))
            return made[-1]

        library = SimpleNamespace(SessionOptions=onnxruntime.SessionOptions, InferenceSession=session)
        with monkeypatch.context() as patch:
            patch.setattr(ort, "import_quietly", lambda: library)
            patch.setattr(ort, "probe", lambda backend, device: None)
            patch.setattr(ort, "check_placement", lambda *args: None)
            patch.setattr(ort, "cupy_device", lambda: gpu)
            return open_session(Request(opened, name, "onnxruntime", "cuda", "fp32", options=options))

    return opening


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array.get(), expected[name], err_msg=name)


@pytest.mark.parametrize("graphs", ["true", "false", "auto"])
def test_every_component_gives_what_the_cpu_gives(
    graphs: str, open_one: Open, opened: Bundle, made: list[CudaSession]
) -> None:
    for name in opened.manifest.components:
        session, cpu = open_one(name, cuda_graph=graphs), reference(opened, name)
        for seed in range(4):
            inputs = arrays(cpu.inputs, seed, **fits(name))
            assert_same(session(**inputs), cpu(**inputs))
        session.close()
        eager = graphs == "false" or name == "text_encoder"  # of which ONNX Runtime captures none
        runs = ["eager"] * 4 if eager else ["captured", "replayed", "replayed", "replayed"]
        known, wanted = ({axis for spec in specs for axis in spec.shape} for specs in (cpu.inputs, cpu.outputs))
        if not eager and not {axis for axis in wanted if isinstance(axis, str)} <= known:
            runs = ["eager", *runs]  # inputs do not tell how large outputs are: of MoVQ, and of a hint's encoder
        assert made[-1].runs == runs, name


@pytest.mark.parametrize("graphs", ["false", "auto"])
def test_what_a_call_gave_is_still_there_after_others(graphs: str, open_one: Open, opened: Bundle) -> None:
    """Of shapes that are captured, replayed, and run for the first time between the two."""
    session, cpu = open_one("decoder_step", cuda_graph=graphs), reference(opened, "decoder_step")
    sizes = [(8, 8, 2), (16, 8, 4), (8, 8, 2), (8, 8, 2), (8, 16, 1), (16, 8, 4), (8, 8, 2), (16, 8, 4)]
    kept = []
    for seed, (height, width, batch) in enumerate(sizes):
        inputs = arrays(cpu.inputs, seed, height=height, width=width, batch=batch)
        kept.append((session(**inputs), cpu(**inputs)))
    for found, expected in kept:
        assert_same(found, expected)


def test_inputs_may_be_of_the_device(open_one: Open, opened: Bundle, gpu: Gpu) -> None:
    """Computed there on any stream, strided as well; what the loop does with a prediction is in order too."""
    session, cpu = open_one("decoder_step"), reference(opened, "decoder_step")
    inputs = arrays(cpu.inputs)
    expected = cpu(**{name: array * 2 for name, array in inputs.items()})["prediction"] + 1
    for stream in (0, 3, 4):
        with gpu.on(stream):
            for _ in range(3):
                here = {name: gpu.upload(np.repeat(array, 2, 0))[::2] * 2 for name, array in inputs.items()}
                np.testing.assert_array_equal((session(**here)["prediction"] + 1).get(), expected)


def test_graphs_are_kept_for_a_few_shapes(open_one: Open, opened: Bundle, made: list[CudaSession]) -> None:
    session, cpu = open_one("prior_step"), reference(opened, "prior_step")
    for _ in range(3):
        for batch in range(1, MAX_GRAPHS + 3):
            inputs = arrays(cpu.inputs, batch=batch)
            assert_same(session(**inputs), cpu(**inputs))
    assert len(made[0].graphs) == MAX_GRAPHS
    assert made[0].runs[-MAX_GRAPHS - 2 :] == ["replayed"] * MAX_GRAPHS + ["eager"] * 2


def test_any_thread_may_call(open_one: Open, opened: Bundle, made: list[CudaSession]) -> None:
    session, cpu = open_one("prior_step"), reference(opened, "prior_step")
    problems: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for seed in range(10):
                inputs = arrays(cpu.inputs, 10 * index + seed, batch=1 + seed % 2)
                assert_same(session(**inputs), cpu(**inputs))
        except BaseException as failed:
            problems.append(failed)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    assert made[0].threads.isdisjoint({threading.get_ident()})
    assert made[0].runs.count("captured") == 2


def test_where_graphs_cannot_be_had_it_goes_on_without(open_one: Open, opened: Bundle, made: list[CudaSession]) -> None:
    cpu = reference(opened, "prior_step")
    for failing in ({"refused": True}, {"capturable": False}):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            session = open_one("prior_step", **failing)
            for seed in range(4):
                inputs = arrays(cpu.inputs, seed)
                assert_same(session(**inputs), cpu(**inputs))
        assert ["prior_step: runs without a CUDA graph" in str(each.message) for each in seen] == [True]
        assert made[-1].runs[-3:] == ["eager"] * 3
        assert not made[-1].graphs


def test_graphs_that_were_asked_for_are_had_or_an_error(open_one: Open, opened: Bundle) -> None:
    with pytest.raises(
        BackendError, match=r"prior_step: no CUDA graph: .*graph capture feature.*; leave cuda_graph out"
    ):
        open_one("prior_step", refused=True, cuda_graph="true")
    session = open_one("prior_step", capturable=False, cuda_graph="true")
    inputs = arrays(session.inputs)
    with pytest.raises(
        BackendError, match=r"prior_step: no CUDA graph: operation not permitted .*leave cuda_graph out"
    ):
        session(**inputs)


def test_on_a_gpu_that_is_not_cupys_current_one_there_are_none(open_one: Open, made: list[CudaSession]) -> None:
    with pytest.warns(UserWarning, match="option device_id is 1, CuPy's current GPU is 0"):
        open_one("prior_step", device_id="1")
    assert "enable_cuda_graph" not in made[0].settings
    with pytest.raises(BackendError, match="no CUDA graph: option device_id is 1"):
        open_one("prior_step", device_id="1", cuda_graph="true")


def test_closed_it_holds_no_memory(open_one: Open, opened: Bundle, gpu: Gpu, made: list[CudaSession]) -> None:
    session = open_one("decoder_step")
    for seed in range(3):
        session(**arrays(session.inputs, seed))
    session.close()
    session.close()
    gc.collect()
    assert not [block for block in gpu.blocks.values() if block.live and block not in made[0].arena]
    with pytest.raises(BackendError, match="the session is closed"):
        session(**arrays(session.inputs))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("kandrt-decoder_step")]


def test_options_are_refused_by_name(opened: Bundle) -> None:
    for backend, device, options, expected in (
        ("onnxruntime", "cuda", {"cuda_graph": "yes"}, "cuda_graph: expected 'true', 'false' or 'auto', found 'yes'"),
        ("onnxruntime", "cuda", {"enable_cuda_graph": "1"}, "enable_cuda_graph: give cuda_graph instead"),
        ("onnxruntime", "cpu", {"cuda_graph": "true"}, "CPUExecutionProvider has none; leave it out"),
    ):
        with pytest.raises(InputError, match=expected):
            open_session(Request(opened, "prior_step", backend, device, "fp32", options=options))
