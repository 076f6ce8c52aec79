"""The same numbers and pictures on a real GPU as on the CPU; without one, every test is skipped with the reason.

`./scripts/gpu-check` runs these with everything they need. Nothing of a GPU is asked before the first of them runs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from kandrt.engines.backends import open_component, unusable
from kandrt.engines.builder import build_plan, plan_work
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import BackendError, InputError
from kandrt.engines.plans import Builder
from kandrt.engines.profiles import Coverage
from kandrt.engines.session import Session
from kandrt.engines.trt import capability
from kandrt.engines.trt_session import TrtSession
from kandrt.runtime import load
from kandrt.runtime.transfer import to_host

from .conftest import once
from .session_inputs import arrays, fits, reference

pytestmark = pytest.mark.gpu

BUILDERS: tuple[Builder, ...] = ("tensorrt", "tensorrt-rtx")
BACKENDS = (*BUILDERS, "onnxruntime")
SIZE = (64, 64, 128)
COVERAGES = [Coverage(SIZE, (1, 1, 2)), Coverage((64, 64, 64), (1, 1, 1), static=True)]

# Relative L2 error against the CPU in fp32. TensorRT's TF32 is off, so its fp32 differs by the order of its sums only;
# ONNX Runtime's CUDA provider uses TF32, whose products keep 11 bits, as fp16 does.
TOLERANCE = {"tensorrt": 1e-4, "tensorrt-rtx": 1e-4, "onnxruntime": 1e-2}
FP16_TOLERANCE = 3e-2
MIN_PSNR = {"fp32": 45.0, "fp16": 35.0}  # dB: whole requests add up the errors of all their steps


@functools.cache
def why_not(backend: str) -> str | None:
    """What keeps a backend from using a GPU here."""
    return unusable(backend, "cuda")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that has a GPU here."""
    why = why_not(request.param)
    if why is not None:
        pytest.skip(f"{request.param}: {why}")
    return cast("str", request.param)


@pytest.fixture
def builder(backend: str) -> Builder:
    if backend not in BUILDERS:
        pytest.skip("builds no engines")
    return cast("Builder", backend)


def with_engines(folder: Path, backend: str) -> Bundle:
    """A bundle with engines for every component, of any shapes that the tests use and of fixed ones."""
    bundle = open_bundle(folder)
    if backend in BUILDERS:
        for coverage in COVERAGES:
            for task in plan_work(bundle, cast("Builder", backend), coverage=[coverage]):
                if task.existing is None:
                    build_plan(bundle, task, lambda share, what: None)
    return bundle


@pytest.fixture(scope="session")
def gpu() -> None:
    """Before anything is exported: is there a GPU that something can use?"""
    reasons = {name: why_not(name) for name in BACKENDS}
    if all(reasons.values()):
        pytest.skip("; ".join(f"{name}: {why}" for name, why in reasons.items()))


@pytest.fixture(scope="session")
def gpu_bundle(gpu: None, shared: Path, checkpoints: dict[str, Path]) -> Path:
    """A small bundle in fp32 of its own, into which engines are built."""
    from kandrt.export.exporter import export_bundle

    sources = [checkpoints[role] for role in ("prior", "decoder", "inpaint", "controlnet")]
    return once(shared / "gpu-bundle", lambda path: export_bundle(sources, path))


@pytest.fixture(scope="session")
def gpu_bundle_fp16(gpu: None, shared: Path, checkpoints: dict[str, Path]) -> Path:
    """The same in fp16."""
    from kandrt.export.exporter import export_bundle

    sources = [checkpoints[role] for role in ("prior", "decoder")]
    return once(shared / "gpu-bundle-fp16", lambda path: export_bundle(sources, path, precision="fp16"))


@pytest.fixture
def opened(gpu_bundle: Path, backend: str) -> Bundle:
    return with_engines(gpu_bundle, backend)


@pytest.fixture
def step(opened: Bundle, backend: str) -> Iterator[Session]:
    """The decoder's step, on the GPU."""
    session = gpu_session(opened, "decoder_step", backend)
    yield session
    session.close()


def gpu_session(bundle: Bundle, name: str, backend: str, **options: str) -> Session:
    return open_component(bundle, name, backend=backend, device="cuda", options=options)


def error(found: Any, expected: Any) -> float:
    """The worst output's relative L2 error."""
    return max(
        float(np.linalg.norm(to_host(found[name]).astype(np.float64) - expected[name]) / np.linalg.norm(expected[name]))
        for name in expected
    )


def psnr(found: Any, expected: Any) -> float:
    return -10 * float(np.log10(np.mean((found.astype(np.float64) - expected) ** 2) + 1e-12))


def test_every_component_gives_what_the_cpu_gives(opened: Bundle, backend: str) -> None:
    for name in opened.manifest.components:
        ort, gpu = reference(opened, name), gpu_session(opened, name, backend)
        for seed in range(4):  # of fixed shapes: TensorRT runs eagerly, captures, and replays twice
            inputs = arrays(ort.inputs, seed, **fits(name))
            assert error(gpu(**inputs), ort(**inputs)) < TOLERANCE[backend], (name, seed)
        gpu.close()


def test_every_component_in_fp16(gpu_bundle_fp16: Path, backend: str) -> None:
    bundle = with_engines(gpu_bundle_fp16, backend)
    for name in bundle.manifest.components:
        ort, gpu = reference(bundle, name), gpu_session(bundle, name, backend)  # the CPU computes fp16 graphs in fp32
        inputs = arrays(ort.inputs, **fits(name))
        assert error(gpu(**inputs), ort(**inputs)) < FP16_TOLERANCE, name
        gpu.close()


def test_shapes_change_and_results_stay(step: Session, backend: str, opened: Bundle) -> None:
    """What a call gave is still there after many others, with CUDA graphs (8 x 8 cells) and without."""
    ort = reference(opened, "decoder_step")
    kept = []
    for seed, (height, width, batch) in enumerate([(8, 8, 2), (16, 8, 4), (8, 8, 2), (8, 16, 1), (8, 8, 2), (8, 8, 2)]):
        inputs = arrays(ort.inputs, seed, height=height, width=width, batch=batch)
        kept.append((step(**inputs), ort(**inputs)))
    for found, expected in kept:
        assert error(found, expected) < TOLERANCE[backend]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_whole_request(precision: str, backend: str, gpu_bundle: Path, gpu_bundle_fp16: Path) -> None:
    folder = {"fp32": gpu_bundle, "fp16": gpu_bundle_fp16}[precision]
    with_engines(folder, backend)
    request: dict[str, Any] = {"height": 64, "width": 128, "steps": 6, "prior_steps": 4, "seed": 3}
    with load(folder, backend=backend, device="cuda") as k, load(folder, backend="onnxruntime", device="cpu") as cpu:
        first, *pictures = [k("a red circle", **request).array for _ in range(3)]
        expected = cpu("a red circle", **request).array
    np.testing.assert_array_equal(*pictures)  # a seed repeats its picture
    # The first request encodes the empty prompt in one batch with its own, later ones keep it: sums in other orders.
    assert psnr(first, pictures[0]) >= 60
    assert psnr(first, expected) >= MIN_PSNR[precision]


def test_graphs_give_what_runs_without_them_give(backend: str, opened: Bundle) -> None:
    """To the last bit under TensorRT; ONNX Runtime's libraries may choose other kernels while they are captured."""
    with_graph, without = (
        gpu_session(opened, "decoder_step", backend, cuda_graph=value) for value in ("true", "false")
    )
    for seed in range(4):
        inputs = arrays(without.inputs, seed)
        found, expected = (to_host(session(**inputs)["prediction"]) for session in (with_graph, without))
        if backend in BUILDERS:
            np.testing.assert_array_equal(found, expected)
        assert error({"prediction": found}, {"prediction": expected.astype(np.float64)}) < 1e-5
    with_graph.close()
    without.close()


def test_another_current_stream_is_served(step: Session, backend: str, opened: Bundle) -> None:
    """Work before and after a call is in order, on whichever stream of the caller's it is."""
    import cupy  # type: ignore[import-not-found, import-untyped, unused-ignore]

    ort = reference(opened, "decoder_step")
    inputs = arrays(ort.inputs)
    expected = ort(**{name: array * 2 for name, array in inputs.items()})["prediction"] + 1
    for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)):
        with stream:
            for _ in range(20):
                here = {name: cupy.asarray(array) * 2 for name, array in inputs.items()}
                found = (step(**here)["prediction"] + 1).get()
                assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < TOLERANCE[backend]


def test_threads_take_turns(builder: Builder, opened: Bundle) -> None:
    names = ("prior_step", "decoder_step")
    sessions = {name: gpu_session(opened, name, builder) for name in names}
    problems: list[BaseException] = []

    def work(index: int) -> None:
        name = names[index % 2]
        try:
            for seed in range(20):
                inputs = arrays(sessions[name].inputs, seed, batch=1 + seed % 2)
                found = error(sessions[name](**inputs), reference(opened, name)(**inputs))
                assert found < TOLERANCE[builder]
        except BaseException as failed:
            problems.append(failed)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    for session in sessions.values():
        session.close()


def test_sizes_without_an_engine_are_refused(step: Session, builder: Builder) -> None:
    with pytest.raises(
        InputError, match=r"decoder_step: no engine was built for batch 2, height 64.*run: kandrt build"
    ):
        step(**arrays(step.inputs, height=64))


def test_memory_is_reported_and_given_back(builder: Builder, opened: Bundle) -> None:
    from kandrt.engines.cuda import cupy_device

    session = cast("TrtSession", gpu_session(opened, "decoder_step", builder))
    session(**arrays(session.inputs))
    memory = session.memory
    assert memory.weights >= memory.resident > 0
    assert memory.activations > 0
    session.close()
    assert cupy_device().activations.size == 0
    before = cupy_device().memory()[0]
    for _ in range(10):
        session = cast("TrtSession", gpu_session(opened, "decoder_step", builder))
        session(**arrays(session.inputs))
        session.close()
    # opened and closed ten times: the library may keep a few MB for itself, and no engine
    assert before - cupy_device().memory()[0] < 5 * memory.weights + 2**26
    with pytest.raises(BackendError, match="the session is closed"):
        session(**arrays(session.inputs))


def test_what_rtx_compiled_is_kept(opened: Bundle, builder: Builder) -> None:
    if builder != "tensorrt-rtx":
        pytest.skip("TensorRT compiles nothing when it runs")
    session = gpu_session(opened, "prior_step", builder)
    session(**arrays(session.inputs))
    session.close()
    assert list((opened.folder / "engines" / "caches").rglob(f"prior_step/**/{capability()}.bin"))
