"""Building engines, for real: TensorRT-RTX builds on a machine without a GPU."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kandrt.engines import builder, trt
from kandrt.engines.builder import Task, build_plan, kind_of, plan_work
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import BackendError, BundleError, InputError, MissingExtraError, OutputError
from kandrt.engines.manifest import Quantization
from kandrt.engines.plan_worker import memory_figures
from kandrt.engines.plans import PlanRecord, PlanSettings
from kandrt.engines.profiles import Coverage
from kandrt.engines.spec import TensorSpec
from kandrt.engines.store import EngineStore

from .toy_bundle import COMPONENTS, change_component, export_again, make_toy_bundle, train_again

RTX = "tensorrt-rtx"
builds = pytest.mark.skipif(
    trt.library_version("tensorrt-rtx") == "none", reason="needs tensorrt-rtx-cu13, which builds without a GPU"
)
# What it takes to be still at it when a test looks: minutes
LONG = 1000


@pytest.fixture
def toy(tmp_path: Path) -> Bundle:
    """A bundle of one's own, of graphs that take a third of a second each."""
    return make_toy_bundle(tmp_path / "bundle")


def silent(_share: float, _phase: str) -> None:
    """Progress that nobody looks at."""


def tasks_of(bundle: Bundle, **options: Any) -> list[Task]:
    return plan_work(bundle, RTX, **{"gpus": ["sm89"], **options})  # type: ignore[arg-type]


def build(bundle: Bundle, **options: Any) -> dict[str, PlanRecord]:
    """Build what is not there; gives what was built."""
    waiting = [task for task in tasks_of(bundle, **options) if task.existing is None]
    return {task.key.component: build_plan(bundle, task, silent) for task in waiting}


def waiting(bundle: Bundle, **options: Any) -> list[str]:
    """Names of the components that would be built."""
    return [task.key.component for task in tasks_of(bundle, **options) if task.existing is None]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes that building starts; none of them may be left."""
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(builder.subprocess, "Popen", Recorded)
    yield started
    assert all(process.poll() is not None for process in started), "a worker outlived the build"


def assert_nothing_opens(bundle: Bundle) -> None:
    """No plan in the store, none half done, nothing left but locks."""
    store = EngineStore(bundle)
    assert store.records() == ([], [])
    left = [path.name for path in store.folder.iterdir()] if store.folder.exists() else []
    assert [name for name in left if not name.endswith(".lock")] == []


# Real networks


@builds
def test_every_component_builds(fp16_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(shutil.copytree(fp16_bundle, tmp_path / "bundle"))
    engines = build(bundle)
    assert list(engines) == list(bundle.manifest.components)
    store = EngineStore(bundle)
    assert store.records() == (sorted(engines.values(), key=lambda each: each.plan.file), [])
    for name, record in engines.items():
        figures, component = record.figures, bundle.manifest.components[name]
        context = name.endswith("_context")
        # Contexts keep what embeds timesteps in fp32: of the decoder's all layers, of the prior's some
        assert figures.half_share == 1.0 or context, name
        assert figures.half_share < 1.0 or not context, name
        assert figures.layers > 100
        assert figures.seconds > 0
        assert figures.peak_bytes is None or figures.peak_bytes > 100_000_000, "the library alone is larger"
        # Two bytes a parameter, four for norms and contexts; the builder adds constants and alignment
        assert figures.weights_bytes is not None
        assert 1.9 * component.parameters < figures.weights_bytes < 4.4 * component.parameters, name
        assert figures.activation_bytes is not None
        assert figures.activation_bytes > 100_000
        assert record.plan.size == store.path(record).stat().st_size > component.parameters
        assert len(store.read(record)) == record.plan.size
        assert record.key.compute_capabilities == ("sm89",)
        assert 0 < len(record.log) <= 60
    assert waiting(bundle) == []
    assert all(sound(store.read(record)) for record in engines.values())
    assert not sound(b"no plan" * 1000)


def sound(plan: bytes) -> bool:
    """Whether TensorRT-RTX takes bytes for a plan: without a GPU it does not open one, but looks at its head."""
    library = trt.library("tensorrt-rtx")
    _, problems = library.Runtime(trt.logger("tensorrt-rtx")[0]).get_engine_validity(plan)
    return not int(problems) & int(library.EngineInvalidityDiagnostics.MALFORMED_ENGINE)


# What is asked for


@builds
def test_one_plan_for_several_gpus(toy: Bundle) -> None:
    (record,) = build(toy, gpus=["sm120", "ampere", "8.9", "sm89"], components=["decoder_step"]).values()
    assert record.key.compute_capabilities == ("sm86", "sm89", "sm120")
    assert waiting(toy, gpus=["sm86", "sm89", "sm120"], components=["decoder_step"]) == []
    assert waiting(toy, gpus=["sm86"], components=["decoder_step"]) == ["decoder_step"]


@builds
def test_an_fp32_bundle_gives_fp32_engines(tmp_path: Path) -> None:
    records = build(make_toy_bundle(tmp_path / "bundle", "fp32"))
    assert list(records) == list(COMPONENTS)
    assert {record.figures.half_share for record in records.values()} == {0.0}


@builds
@pytest.mark.parametrize(
    "coverage",
    [
        [Coverage((512, 512, 512)), Coverage((768, 1024, 1536), (1, 1, 2))],
        [Coverage((512, 768, 1024), (1, 2, 4), static=True)],
        [Coverage((512, 512, 512), (1, 1, 1), static=True), Coverage((1024, 1024, 1024), (2, 2, 2), static=True)],
    ],
    ids=["several", "static", "several static"],
)
def test_other_profiles(toy: Bundle, coverage: list[Coverage]) -> None:
    names = ["decoder_context", "decoder_step"]
    records = build(toy, coverage=coverage, components=names)
    assert list(records) == names
    profiles = records["decoder_step"].key.profiles
    assert len(profiles) == len(coverage)
    assert all(profile.static for profile in profiles) == coverage[0].static
    assert waiting(toy, coverage=coverage, components=names) == []


@builds
def test_options_of_the_builder(toy: Bundle, tmp_path: Path) -> None:
    def scratch(**settings: Any) -> PlanRecord:
        (record,) = build(toy, components=["movq_decoder"], settings=PlanSettings(**settings)).values()
        return record

    records = [
        scratch(),
        scratch(flags=("WEIGHT_STREAMING",)),
        scratch(optimization_level=0),
        scratch(workspace_bytes=2**26),
    ]
    assert len({record.plan.file for record in records}) == 4, "they lie side by side"
    assert EngineStore(toy).records()[1] == []
    # The workspace the library has found too small is in its log, and nothing else is there to show for it
    with pytest.raises(BackendError, match=r"movq_decoder: tensorrt-rtx could not build it: .*workspace"):
        scratch(workspace_bytes=1)


@builds
def test_a_timing_cache_is_written_and_read(toy: Bundle, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    for name in ("decoder_step", "decoder_context"):
        (task,) = tasks_of(toy, components=[name])
        build_plan(toy, task, silent, timing_cache=cache)
        assert cache.stat().st_size > 0
    cache.write_bytes(b"of another kind")
    (task,) = tasks_of(toy, components=["movq_encoder"])
    assert build_plan(toy, task, silent, timing_cache=cache).figures.layers == 6
    assert cache.read_bytes() != b"of another kind"


@builds
def test_a_timing_cache_that_cannot_be(toy: Bundle, tmp_path: Path, workers: list[Any]) -> None:
    (task,) = tasks_of(toy, components=["decoder_step"])
    for wrong in (tmp_path, tmp_path / "nowhere" / "timing.cache"):
        with pytest.raises(
            InputError, match=r"^--timing-cache .*: expected a file, new or old, in a folder that exists"
        ):
            build_plan(toy, task, silent, timing_cache=wrong)
    assert workers == [], "said before the time is spent"


@builds
def test_progress_says_what_is_done(toy: Bundle) -> None:
    seen: list[tuple[float, str]] = []
    (task,) = tasks_of(export_again(toy, "decoder_step", repeat=60), components=["decoder_step"])
    build_plan(open_bundle(toy.folder), task, lambda share, phase: seen.append((share, phase)))
    shares, phases = [share for share, _ in seen], [phase for _, phase in seen]
    assert phases[:3] == ["waiting for another build", "checking files", "reading the graph"]
    assert len(phases) > 3
    assert all(0 <= share <= 1 for share in shares)


# Up to date or not


@builds
def test_exactly_what_changed_is_built_again(toy: Bundle) -> None:
    assert waiting(toy) == list(COMPONENTS)
    assert list(build(toy)) == list(COMPONENTS)
    assert waiting(toy) == []
    toy = export_again(toy, "decoder_step", note="a comment")
    assert waiting(toy) == ["decoder_step"]
    assert list(build(toy)) == ["decoder_step"]
    toy = train_again(toy, "movq")
    assert waiting(toy) == ["movq_encoder", "movq_decoder"]
    assert list(build(toy)) == ["movq_encoder", "movq_decoder"]
    assert waiting(toy) == []
    # The first four, and three of the bundle as it is now
    assert len(EngineStore(toy).records()[0]) == 7


def have_all(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store have a plan of every key that is asked for with the usual options."""
    keys = [task.key for task in tasks_of(bundle)]
    monkeypatch.setattr(EngineStore, "find", lambda _self, key: "there" if key in keys else None)


@builds
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, []),
        ({"gpus": ["ada"]}, []),
        ({"coverage": [Coverage((512, 768, 1024), (1, 1, 4))]}, []),
        ({"gpus": ["sm89", "sm120"]}, COMPONENTS),
        ({"settings": PlanSettings(("WEIGHT_STREAMING",))}, COMPONENTS),
        ({"settings": PlanSettings(optimization_level=2)}, COMPONENTS),
        ({"settings": PlanSettings(workspace_bytes=2**30)}, COMPONENTS),
        ({"coverage": [Coverage((512, 512, 1024))]}, ["movq_encoder", "movq_decoder", "decoder_step"]),
        ({"coverage": [Coverage((512, 768, 1024), (1, 1, 2))]}, ["decoder_context", "decoder_step"]),
        ({"coverage": [Coverage((512, 768, 1024), static=True)]}, ["movq_decoder", "decoder_step"]),
    ],
)
def test_options_rebuild_what_depends_on_them(
    toy: Bundle, options: dict[str, Any], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    have_all(toy, monkeypatch)
    assert waiting(toy, **options) == list(names)


@builds
def test_what_changed_is_named(toy: Bundle) -> None:
    (task,) = tasks_of(toy, components=["decoder_context"])
    assert task.changed == ()
    build_plan(toy, task, silent)
    assert tasks_of(toy, components=["decoder_context"])[0].changed == ()
    (task,) = tasks_of(toy, components=["decoder_context"], gpus=["sm86"])
    assert task.changed == ("GPUs: sm89, now sm86",)
    (task,) = tasks_of(toy, components=["decoder_context"], settings=PlanSettings(optimization_level=2))
    assert task.changed == ("settings: defaults, now optimization level 2",)


@builds
def test_another_version_of_the_library_rebuilds_all(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    have_all(toy, monkeypatch)
    monkeypatch.setattr(builder, "library_version", lambda _builder: "99.0")
    assert waiting(toy) == list(COMPONENTS)


@builds
def test_a_plan_that_was_cut_is_built_again(toy: Bundle) -> None:
    store = EngineStore(toy)
    for damage in (lambda path: os.truncate(path, 100), Path.unlink, lambda path: path.with_suffix(".json").unlink()):
        (record,) = build(toy, components=["decoder_step"]).values()
        damage(store.path(record))
        assert store.find(record.key) is None
    (record,) = build(toy, components=["decoder_step"]).values()
    assert store.records() == ([record], [])
    store.read(record)


@builds
def test_planning_loads_no_library(toy: Bundle) -> None:
    """A second run is quick: it reads records and hashes of graphs, and loads neither TensorRT nor an array library."""
    build(toy, components=["decoder_step"])
    code = """
    import sys
    from kandrt.engines.builder import plan_work
    from kandrt.engines.bundle import open_bundle
    tasks = plan_work(open_bundle(sys.argv[1]), "tensorrt-rtx", gpus=["sm89"], components=["decoder_step"])
    assert [task.existing is not None for task in tasks] == [True]
    print([name for name in ("tensorrt_rtx", "numpy", "cupy", "torch", "onnx") if name in sys.modules])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(toy.folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("[]\n", "")


# What cannot be built


@builds
def test_a_graph_in_another_precision_is_no_engine(toy: Bundle, workers: list[Any]) -> None:
    toy = export_again(toy, "decoder_step", computes="fp32")
    with pytest.raises(BackendError) as error:
        build(toy, components=["decoder_step"])
    assert str(error.value) == (
        "decoder_step: expected every convolution, matrix product and attention in HALF, found 1 in FLOAT; "
        "export the bundle again with --precision fp16"
    )
    assert_nothing_opens(toy)
    # A context may, because it embeds timesteps
    toy = export_again(toy, "decoder_context", computes="fp32")
    (record,) = build(toy, components=["decoder_context"]).values()
    assert record.figures.half_share == 0.0


@builds
@pytest.mark.parametrize("operator", ["Bernoulli", "NonMaxSuppression", "NoSuchOperator"])
def test_a_graph_that_the_parser_refuses(toy: Bundle, operator: str) -> None:
    toy = export_again(toy, "decoder_context", op_type=operator)
    with pytest.raises(BackendError, match=f"^decoder_context: tensorrt-rtx cannot read the graph: {operator}: .*node"):
        build(toy, components=["decoder_context"])
    assert_nothing_opens(toy)


@builds
def test_a_profile_that_the_graph_cannot_take(toy: Bundle) -> None:
    toy = change_component(toy, "decoder_context", inputs=(TensorSpec("image_embeds", "float32", ("batch", 9)),))
    with pytest.raises(BackendError) as error:
        build(toy, components=["decoder_context"])
    assert str(error.value).startswith("decoder_context: tensorrt-rtx could not build it: ")
    assert "image_embeds" in str(error.value)
    assert "driver" not in str(error.value), "that there is no GPU is not why"
    assert_nothing_opens(toy)


@builds
def test_damaged_files_are_not_built(toy: Bundle) -> None:
    tasks = {task.key.component: task for task in tasks_of(toy)}
    weights = toy.folder / "weights" / "decoder.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights/decoder\.safetensors: expected SHA-256"):
        build_plan(toy, tasks["decoder_step"], silent)
    graph = toy.folder / "movq_decoder.onnx"
    graph.write_bytes(bytes(len(graph.read_bytes())))
    with pytest.raises(BundleError, match=r"movq_decoder\.onnx: expected SHA-256"):
        waiting(toy)
    assert waiting(toy, components=["movq_encoder"]) == ["movq_encoder"], "others are not looked at"
    assert_nothing_opens(toy)


@builds
def test_a_folder_that_is_no_text(toy: Bundle, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xff")
    try:
        toy.folder.rename(odd)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    with pytest.raises(InputError, match=r"^decoder_step: tensorrt-rtx opens no path that is not UTF-8, found .*; re"):
        build(open_bundle(odd), components=["decoder_step"])
    assert_nothing_opens(open_bundle(odd))


@builds
def test_folders_that_are_odd_text(toy: Bundle, tmp_path: Path) -> None:
    odd = tmp_path / "a [bold]b[-] c's \u2603"
    toy.folder.rename(odd)
    assert list(build(open_bundle(odd), components=["decoder_step"])) == ["decoder_step"]


def test_unknown_gpus(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "library_version", lambda _builder: "1.7")
    for name in ("sm90", "h100", "sm8", "", "sm89 sm86", "sm-1"):
        with pytest.raises(InputError) as error:
            waiting(toy, gpus=["sm89", name])
        assert str(error.value).startswith(
            f"--gpu {name}: tensorrt-rtx builds for sm75, sm80, sm86, sm89, sm120, sm121"
        )
        assert str(error.value).endswith("such as H100, are built on them with --backend tensorrt")
    for name in ("sm89", "SM_89", "8.9", " 89", "ada", "RTX-40"):
        (task,) = tasks_of(toy, gpus=[name], components=["decoder_step"])
        assert task.key.compute_capabilities == ("sm89",)


def test_the_gpu_present_is_the_usual_one(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "library_version", lambda _builder: "1.7")
    monkeypatch.setattr(builder, "capability", lambda *_: "sm120")
    assert {task.key.compute_capabilities for task in tasks_of(toy, gpus=[])} == {("sm120",)}
    monkeypatch.setattr(builder, "capability", lambda *_: "sm90")
    with pytest.raises(InputError, match="sm90: tensorrt-rtx builds for"):
        tasks_of(toy, gpus=[])
    tasks = plan_work(toy, "tensorrt")
    assert {task.key.compute_capabilities for task in tasks} == {("sm90",)}
    with pytest.raises(BackendError, match=r"--gpu sm89: tensorrt builds for the GPU of the machine it runs on; leave"):
        plan_work(toy, "tensorrt", gpus=["sm89"])


def test_without_a_gpu(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu(*_: Any) -> str:
        raise BackendError("no usable GPU: cudaErrorNoDevice")

    monkeypatch.setattr(builder, "library_version", lambda _builder: "1.7")
    monkeypatch.setattr(builder, "capability", no_gpu)
    with pytest.raises(BackendError, match=r"^name the GPUs to build for with --gpu: no usable GPU: cudaErrorNoDevice"):
        tasks_of(toy, gpus=[])
    with pytest.raises(BackendError, match=r"^--strip needs a GPU: no usable GPU"):
        tasks_of(toy, settings=PlanSettings(("REFIT_IDENTICAL", "STRIP_PLAN")))
    with pytest.raises(BackendError, match=r"^tensorrt: no usable GPU"):
        plan_work(toy, "tensorrt")


def test_unknown_components_builders_and_sizes(toy: Bundle) -> None:
    with pytest.raises(InputError, match=r"has no component unet, vae; it has movq_encoder, movq_decoder, decoder_con"):
        tasks_of(toy, components=["unet", "decoder_step", "vae"])
    with pytest.raises(InputError, match="--backend: expected tensorrt or tensorrt-rtx, found onnxruntime"):
        plan_work(toy, "onnxruntime")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--size 1:2:3: expected multiples of 64"):
        tasks_of(toy, coverage=[Coverage((1, 2, 3))])


def test_no_engine_is_built_of_8_bits(toy: Bundle) -> None:
    record = Quantization(("weight",), (), 1, 0.02)
    bundle = change_component(toy, "decoder_step", quantization=record)
    with pytest.raises(InputError, match="decoder_step compute in 8 bits as CPUs do, which TensorRT does not; build"):
        plan_work(bundle, RTX, gpus=["sm89"])


# The library


def test_a_library_that_is_not_installed(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "library_version", lambda _builder: "none")
    for name in ("tensorrt", RTX):
        with pytest.raises(MissingExtraError) as error:
            plan_work(toy, name, gpus=["sm89"])  # type: ignore[arg-type]
        assert str(error.value).endswith(f"which is not installed; run: pip install 'kandrt[{name}]'")
    monkeypatch.setattr(trt, "find_spec", lambda _name: None)
    trt.library.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'kandrt\[tensorrt\]'"):
        trt.library("tensorrt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "raise ImportError('libnvinfer.so.11: not\\nthere')",
            "and cannot be loaded: libnvinfer.so.11: not there; its",
        ),
        ("raise FileNotFoundError('nvinfer.dll')", "is installed and cannot be loaded: nvinfer.dll"),
        ("", "tensorrt is installed without its library; run: pip install --force-reinstall tensorrt"),
        (
            "__version__ = '10.3.0'\nclass Builder: pass",
            "expected 10.12 or later, found 10.3.0; run: pip install --upg",
        ),
    ],
)
def test_a_library_that_is_broken_or_old(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt"]:
        monkeypatch.delitem(sys.modules, name)
    trt.library.cache_clear()
    try:
        with pytest.raises(BackendError) as error:
            trt.library("tensorrt")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    finally:
        trt.library.cache_clear()
        sys.modules.pop("tensorrt", None)


@pytest.mark.parametrize("version", ["10.12.0.36", "10.16.1", "11.2.0"])
def test_a_library_that_is_new_enough(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text(f"__version__ = '{version}'\nclass Builder: pass", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    trt.library.cache_clear()
    try:
        assert trt.library("tensorrt").__version__ == version
    finally:
        trt.library.cache_clear()
        sys.modules.pop("tensorrt", None)


def test_a_broken_cupy_is_no_usable_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libcudart.so.13: cannot open')", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(trt, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match=r"no usable GPU: libcudart\.so\.13: cannot open; check the driver"):
        trt.capability()


def test_figures_of_memory_are_read_from_the_log() -> None:
    log = [
        "[MemUsageStats] Peak memory usage",
        "Total Weights Memory: 5 bytes",
        "Max Scratch Memory: 12 bytes",
        "Total Activation Memory: 100 bytes",
        "Total Activation Memory: 200 bytes",
    ]
    assert memory_figures(log) == {"weights_bytes": 5, "activation_bytes": 200, "scratch_bytes": 12}
    assert memory_figures([]) == {"weights_bytes": None, "activation_bytes": None, "scratch_bytes": None}


def test_errors_of_a_worker_are_those_of_kandrt() -> None:
    assert kind_of("OutputError") is OutputError
    for name in ("KandrtErrors", "annotations", "MissingExtraError", "", "SystemExit"):
        assert kind_of(name) is BackendError
    assert str(kind_of("MissingExtraError")("a message")) == "a message"


# Room


@builds
def test_a_disk_with_too_little_room(toy: Bundle, workers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineStore, "free_bytes", lambda _self: 1)
    with pytest.raises(OutputError) as error:
        build(toy, components=["decoder_step"])
    assert str(error.value).startswith("decoder_step: its plan takes about 0.0 GB, ")
    assert str(error.value).endswith(
        f"has 0.0 GB left; free some, or remove old engines with: kandrt engines prune {toy.folder}"
    )
    assert workers == []
    assert_nothing_opens(toy)


LIMITED = """
import resource, signal, sys
from kandrt.engines.plan_worker import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
main()
"""


@builds
@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit to the size of files")
def test_a_disk_that_fills_up(toy: Bundle, workers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit to the size of files stands for the disk: writing beyond it fails with an OSError just the same."""
    replace_worker(monkeypatch, LIMITED)
    with pytest.raises(OutputError, match=r"^cannot write .*: File too large"):
        build(toy, components=["decoder_step"])
    assert len(workers) == 1
    assert_nothing_opens(toy)


# Processes that end


def replace_worker(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Run other code in place of the worker."""
    recorded = builder.subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        assert command[1:] == ["-m", "kandrt.engines.plan_worker"]
        return recorded([command[0], "-c", code], **options)

    monkeypatch.setattr(builder.subprocess, "Popen", popen)


def long_task(bundle: Bundle) -> Task:
    """A build that takes minutes."""
    (task,) = tasks_of(export_again(bundle, "decoder_step", repeat=LONG), components=["decoder_step"])
    return task


def at(phase: str, act: Callable[[], None]) -> Callable[[float, str], None]:
    """Progress that acts once in a phase."""
    done: list[str] = []

    def progress(_share: float, now: str) -> None:
        if now == phase and not done:
            done.append(now)
            act()

    return progress


@builds
@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
@pytest.mark.parametrize("phase", ["reading the graph", "Cloning network graph"])
def test_a_worker_that_the_system_kills(toy: Bundle, workers: list[Any], phase: str) -> None:
    task = long_task(toy)
    bundle = open_bundle(toy.folder)
    with pytest.raises(BackendError) as error:
        build_plan(bundle, task, at(phase, lambda: workers[0].kill()))
    message = str(error.value)
    assert message.startswith("decoder_step: the system killed the build, most likely for want of memory: it takes ")
    assert "0.4 GB, this machine has " in message
    assert " GB free; close other programs" in message
    assert_nothing_opens(bundle)
    toy = export_again(bundle, "decoder_step")
    assert list(build(toy, components=["decoder_step"])) == ["decoder_step"]


@builds
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_an_interruption_ends_the_worker(toy: Bundle, workers: list[Any], error: BaseException) -> None:
    def stop() -> None:
        raise error

    task = long_task(toy)
    bundle = open_bundle(toy.folder)
    with pytest.raises(type(error)):
        build_plan(bundle, task, at("Cloning network graph", stop))
    assert [process.returncode for process in workers] == [-signal.SIGTERM if os.name != "nt" else 1]
    assert_nothing_opens(bundle)


@builds
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no such thing')", "decoder_step: the build ended with exit code 1: no such thing"),
        ("import os; os._exit(3)", "decoder_step: the build ended with exit code 3: no message"),
        ("", "decoder_step: the build ended with exit code 0: no message"),
        ("import sys; sys.stdout.write('{\"progress\": 0.')", "decoder_step: the build ended with exit code 0: no mes"),
        ("import sys; sys.stderr.write('x' * 9999); sys.exit(1)", f"exit code 1: {'x' * builder.STDERR_TAIL}"),
    ],
    ids=["says why", "says nothing", "does nothing", "half a line", "says much"],
)
def test_a_worker_that_ends_without_a_result(
    toy: Bundle, workers: list[Any], code: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_worker(monkeypatch, code)
    with pytest.raises(BackendError) as error:
        build(toy, components=["decoder_step"])
    assert message in str(error.value)
    assert_nothing_opens(toy)


@builds
def test_modules_of_the_current_folder_are_not_run(
    toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 cannot be told to leave the current folder out")
    for name in ("msgspec", "tensorrt_rtx", "resource"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger ran')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert list(build(toy, components=["decoder_step"])) == ["decoder_step"]


PARENT = """
import subprocess, sys
from kandrt.engines.builder import build_plan, plan_work
from kandrt.engines.bundle import open_bundle

class Loud(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print("worker", self.pid, flush=True)

subprocess.Popen = Loud
bundle = open_bundle(sys.argv[1])
task, = plan_work(bundle, "tensorrt-rtx", gpus=["sm89"], components=["decoder_step"])
build_plan(bundle, task, lambda share, phase: print(phase, flush=True))
"""


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2]
    except FileNotFoundError:
        return True
    return state.startswith(("Z", "X"))


@builds
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
@pytest.mark.parametrize(("phase", "later"), [("worker", 0), ("reading the graph", 0), ("Cloning network graph", 3)])
def test_a_worker_ends_when_its_parent_is_killed(toy: Bundle, phase: str, later: float) -> None:
    """Even while it loads the library, or some seconds later, in a phase of minutes that has nothing to report.

    What it left cannot be opened, and is cleared away.
    """
    bundle = export_again(toy, "decoder_step", repeat=LONG)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(bundle.folder)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = 0
    for line in parent.stdout:
        pid = int(line.split()[1]) if line.startswith("worker") else pid
        if line.startswith(phase):
            break
    time.sleep(later)
    parent.kill()
    parent.wait(timeout=30)
    parent.stdout.close()
    assert pid
    for _ in range(600):
        if gone(pid):
            break
        time.sleep(0.05)
    assert gone(pid), "the worker still runs 30 s after its parent was killed"
    store = EngineStore(bundle)
    assert store.records()[0] == []
    assert {Path(each.file).suffix for each in store.records()[1]} <= {".tmp"}
    bundle = export_again(bundle, "decoder_step")
    assert list(build(bundle, components=["decoder_step"])) == ["decoder_step"]


# Two at once


@builds
def test_two_threads_that_build_one_plan_build_it_once(toy: Bundle, workers: list[Any]) -> None:
    (task,) = tasks_of(toy, components=["movq_decoder"])
    records: list[PlanRecord] = []
    start = threading.Barrier(3)

    def one() -> None:
        start.wait()
        records.append(build_plan(open_bundle(toy.folder), task, silent))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(records) == 3
    assert records[0] == records[1] == records[2]
    assert len(workers) == 1
    assert EngineStore(toy).records() == ([records[0]], [])


BOTH = """
import json, sys
import msgspec
from kandrt.engines import builder
from kandrt.engines.bundle import open_bundle

started = []
run = builder.run_worker
builder.run_worker = lambda *args: (started.append(1), run(*args))[1]
bundle = open_bundle(sys.argv[1])
task, = builder.plan_work(bundle, "tensorrt-rtx", gpus=["sm89"], components=["movq_decoder"])
print("ready", flush=True)
sys.stdin.readline()
record = builder.build_plan(bundle, task, lambda share, phase: None)
print(json.dumps([task.existing is None, len(started), record.plan.sha256]))
"""


@builds
def test_two_processes_that_build_one_plan_build_it_once(toy: Bundle) -> None:
    command = [sys.executable, "-c", BOTH, str(toy.folder)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"  # type: ignore[union-attr]
    for process in both:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    found = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    assert [wanted for wanted, _, _ in found] == [True, True]
    assert sorted(count for _, count, _ in found) == [0, 1]
    assert found[0][2] == found[1][2]
    assert EngineStore(toy).records()[1] == []
