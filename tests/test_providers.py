"""ONNX Runtime's providers: opened by name, in the precision asked for, with the options and threads asked for."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from kandrt.engines import backends, ort, providers
from kandrt.engines.backends import BACKENDS, check_backend, open_component, unusable
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import BackendError, InputError, MissingExtraError
from kandrt.engines.manifest import Precision
from kandrt.engines.ort import OrtSession, open_session
from kandrt.engines.providers import PROVIDERS, cache_settings, provider_settings
from kandrt.engines.request import Request
from kandrt.runtime import load

from .openvino_plugin import BACKEND, require_plugin
from .oracle import SeededNoise

TENSORRT, RTX, WEBGPU = "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx", "onnxruntime-webgpu"
# Relative L2 of two fp32 libraries that sum in another order (at most 2e-6 seen), and of bf16, which keeps 8 bits: 4e-3
# a rounding (through a network at most 2e-2 seen).
SAME, BF16 = 1e-5, (1e-3, 5e-2)
# Pictures are in [0, 1]: 65 dB is an rms error of 6e-4, a seventh of an 8-bit step. Three steps of a sampler turn the
# 1e-6 of a call into 1e-4 (77 and 79 dB seen); the same requests with layers in bf16 give other pictures (6 dB).
PSNR = 65.0
LEFT: Mapping[str, str] = {"placement": "warn"}  # OpenVINO's provider leaves Attention to ONNX Runtime's own


@pytest.fixture
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


def request_of(bundle: Bundle, backend: str, device: str, **changes: Any) -> Request:
    return replace(Request(bundle, "prior_step", backend, device, "fp32"), **changes)


def arrays(session: Any) -> dict[str, NDArray[Any]]:
    """Inputs with 2 samples, 8 or 64 cells a side, and timesteps from the whole range."""
    rng = np.random.default_rng(0)
    lengths = {"batch": 2, "timesteps": 5, "height": 8, "width": 8, "image_height": 64, "image_width": 64}

    def array(spec: Any) -> NDArray[Any]:
        shape = [axis if isinstance(axis, int) else lengths[axis] for axis in spec.shape]
        if spec.name == "timesteps":
            return np.linspace(999, 0, shape[0], dtype=np.float32)
        if spec.name == "text_mask":
            return np.ones(shape, np.float32)
        return rng.integers(1, 90, shape) if spec.dtype == "int64" else rng.standard_normal(shape, np.float32)

    return {spec.name: array(spec) for spec in session.inputs}


def error_of(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """The largest relative L2 error of any output."""
    return max(float(np.linalg.norm(found[name] - a) / np.linalg.norm(a)) for name, a in expected.items())


def compared(bundle: Bundle, component: str, **changes: Any) -> float:
    """How far OpenVINO's provider is from ONNX Runtime's own on a component."""
    options: dict[str, Any] = {"device": "cpu", "threads": 1}
    with (
        closing(open_component(bundle, component, backend="onnxruntime", **options)) as reference,
        closing(open_component(bundle, component, backend=BACKEND, options=LEFT, **options, **changes)) as session,
    ):
        inputs = arrays(session)
        return error_of(session(**inputs), reference(**inputs))


# The table


def test_every_backend_of_onnxruntime_has_its_providers() -> None:
    served = {(name, device) for name, each in BACKENDS.items() if each.sessions == "ort" for device in each.devices}
    assert served == PROVIDERS.keys()


@pytest.mark.parametrize(
    ("backend", "device", "package", "extra"),
    [
        (BACKEND, "cpu", "onnxruntime-ep-openvino", "onnxruntime-openvino"),
        (TENSORRT, "cuda", "tensorrt", "cuda,tensorrt"),
        (RTX, "cuda", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-tensorrt-rtx"),
        (WEBGPU, "gpu", "onnxruntime-ep-webgpu", "onnxruntime-webgpu"),
    ],
)
def test_a_missing_package_names_the_line_that_installs_it(
    backend: str, device: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        check_backend(backend, device, "fp32")
    assert f"needs the package {package!r}, which is not installed; run: pip install 'kandrt[{extra}]'" in str(
        caught.value
    )


def test_a_missing_onnxruntime_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kandrt\[cpu\]'"):
        providers.import_quietly()
    monkeypatch.setattr(providers, "find_spec", lambda name: object())  # installed, and broken
    with pytest.raises(BackendError, match=r"onnxruntime cannot be used: .*; install it again"):
        providers.import_quietly()


class Missing:
    """ONNX Runtime without devices for plugins."""

    __version__ = "1.31.1"
    InferenceSession = SessionOptions = None

    def __init__(self, reason: str | None = None) -> None:
        self._reason = reason

    def get_available_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]

    def get_ep_devices(self) -> list[Any]:
        return []

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if self._reason is not None:
            raise RuntimeError(self._reason)


@pytest.mark.parametrize(
    ("backend", "device", "advice"),
    [
        (BACKEND, "cpu", "OpenVINOExecutionProvider finds no device: it takes Intel's CPUs alone; backend 'openvino'"),
        (RTX, "cuda", "NvTensorRTRTXExecutionProvider finds no device: it needs an NVIDIA GPU of compute capability"),
        (WEBGPU, "gpu", "WebGpuExecutionProvider finds no device: it needs a GPU and, on Linux, the Vulkan loader"),
    ],
)
def test_a_machine_without_the_device_is_told_why(
    backend: str, device: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = PROVIDERS[backend, device].plugin
    monkeypatch.setitem(sys.modules, str(plugin), type("Plugin", (), {"get_library_path": lambda: "nowhere"}))
    monkeypatch.setattr(providers, "register", providers.register.__wrapped__)
    for reason in (None, "libcuda.so.1: cannot open\nshared object file"):
        monkeypatch.setattr(providers, "import_quietly", lambda reason=reason: Missing(reason))
        with pytest.raises(BackendError) as caught:
            providers.probe(backend, device)
        message = str(caught.value)
        if reason is None:
            assert f"backend {backend!r}: {advice}" in message
        else:
            assert message.endswith("cannot be used: libcuda.so.1: cannot open shared object file")


def test_a_build_without_tensorrt_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "import_quietly", Missing)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"backend 'onnxruntime-tensorrt': tensorrt cannot be used: .*install it"):
        providers.probe(TENSORRT, "cuda")
    monkeypatch.setitem(sys.modules, "tensorrt", type("TensorRT", (), {}))
    with pytest.raises(BackendError, match="this build of onnxruntime has no TensorrtExecutionProvider"):
        providers.probe(TENSORRT, "cuda")


def test_tensorrt_that_chooses_types_itself_has_fp32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 11 it may compute in 16 bits what an fp16 graph has in 32: the statistics of norms."""
    for version, kernels in (("10.16.1", {"fp32"}), ("11.0.0.114", {"fp32", "fp16", "bf16"}), ("", {"fp32"})):
        monkeypatch.setattr(providers, "installed", lambda package, version=version: version)
        assert ort.kernels(TENSORRT, "cuda") == kernels


# Options


def test_what_changes_the_precision_unasked_is_turned_off(opened: Bundle) -> None:
    assert provider_settings(request_of(opened, "onnxruntime", "cuda"))["use_tf32"] == "0"
    asked = request_of(opened, "onnxruntime", "cuda", options={"use_tf32": "1", "device_id": "1"})
    assert provider_settings(asked).items() >= {"use_tf32": "1", "device_id": "1"}.items()


@pytest.mark.parametrize(("component", "tf32"), [("decoder_step", "1"), ("decoder_context", "0")])
def test_convolutions_in_16_bits_may_use_tensor_cores(component: str, tf32: str, opened: Bundle) -> None:
    """Without TF32 ONNX Runtime denies them to convolutions of any type; contexts embed timesteps in fp32."""
    asked = request_of(opened, "onnxruntime", "cuda", name=component, precision="fp16")
    assert provider_settings(asked)["use_tf32"] == tf32


@pytest.mark.parametrize(
    ("component", "precision", "hint"),
    [("prior_step", "fp32", "f32"), ("prior_step", "bf16", "bf16"), ("prior_context", "bf16", "f32")],
)
def test_openvinos_properties_are_those_of_the_request(
    component: str, precision: Precision, hint: str, opened: Bundle
) -> None:
    options = {"EXECUTION_MODE_HINT": "ACCURACY"}
    request = request_of(opened, BACKEND, "cpu", name=component, precision=precision, threads=3, options=options)
    assert json.loads(provider_settings(request)["load_config"])["CPU"] == {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_NUM_THREADS": 3,
        "EXECUTION_MODE_HINT": "ACCURACY",
    }
    for name, argument in (("INFERENCE_PRECISION_HINT", "precision"), ("INFERENCE_NUM_THREADS", "threads")):
        with pytest.raises(InputError, match=f"prior_step: option {name}: give {argument} instead"):
            provider_settings(request_of(opened, BACKEND, "cpu", options={name: "1"}))


def test_the_cpus_own_provider_takes_no_options(opened: Bundle) -> None:
    with pytest.raises(InputError, match="prior_step: CPUExecutionProvider takes no options, found use_arena"):
        open_component(opened, "prior_step", backend="onnxruntime", device="cpu", options={"use_arena": "1"})
    open_component(opened, "prior_step", backend="onnxruntime", device="cpu", options=LEFT).close()


@pytest.mark.parametrize("options", [{"NO_SUCH_PROPERTY": "1"}, {"PERFORMANCE_HINT": "nonsense"}])
def test_an_option_that_the_provider_refuses_is_one_error(options: dict[str, str], opened: Bundle) -> None:
    require_plugin()
    with pytest.raises(BackendError) as caught:
        open_component(opened, "prior_step", backend=BACKEND, device="cpu", options={**LEFT, **options})
    message = str(caught.value)
    assert "prior_step: onnxruntime cannot open " in message
    for name in options:
        assert message.count(name) >= 2  # as it was given, and as OpenVINO says it


# Caches


@pytest.mark.parametrize(
    ("backend", "device", "usual", "names"),
    [
        ("onnxruntime", "cpu", False, ()),
        ("onnxruntime", "cuda", False, ()),
        (BACKEND, "cpu", False, ("CACHE_DIR",)),
        (TENSORRT, "cuda", True, ("trt_engine_cache_path", "trt_timing_cache_path")),
        (RTX, "cuda", True, ("nv_runtime_cache_path",)),
        (WEBGPU, "gpu", False, ()),
    ],
)
def test_caches_are_kept_in_the_bundle(
    backend: str, device: str, usual: bool, names: tuple[str, ...], spare_bundle: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(spare_bundle, tmp_path / "bundle", copy_function=os.link))
    request = request_of(open_bundle(folder), backend, device)
    assert cache_settings(request, "off") == {}
    if not names:
        assert cache_settings(request, None) == {}
        if PROVIDERS[backend, device].prepacks:  # kept by kandrt: see test_prepacked.py
            assert cache_settings(request, "on") == {}
            return
        with pytest.raises(InputError, match=f"prior_step: {PROVIDERS[backend, device].name} has no cache"):
            cache_settings(request, "on")
        return
    assert bool(cache_settings(request, None)) == usual
    found = cache_settings(request, "on")
    places = {found[name] for name in names}
    assert len(places) == 1
    place = Path(places.pop())
    assert place.is_dir()
    assert place.relative_to(folder).parts[:2] == ("engines", "caches")
    assert place.relative_to(folder).parts[2].startswith(f"{backend}-")
    assert place.relative_to(folder).parts[3] == "prior_step"
    changed = replace(request.component, graph=replace(request.component.graph, sha256="0" * 64))
    components = {**request.bundle.manifest.components, "prior_step": changed}
    manifest = replace(request.bundle.manifest, components=components)
    other = cache_settings(replace(request, bundle=replace(request.bundle, manifest=manifest)), "on")
    assert place not in map(Path, (other[name] for name in names))


def test_a_bundle_that_cannot_be_written_to_has_no_cache(opened: Bundle, tmp_path: Path) -> None:
    (tmp_path / "engines").write_bytes(b"in the way")
    bundle = replace(opened, folder=tmp_path)
    assert cache_settings(request_of(bundle, RTX, "cuda"), None) == {}


def test_a_cache_is_filled_and_used(spare_bundle: Path, tmp_path: Path) -> None:
    require_plugin()
    bundle = open_bundle(Path(shutil.copytree(spare_bundle, tmp_path / "bundle", copy_function=os.link)))
    results = []
    for _ in range(2):
        options = {**LEFT, "cache": "on"}
        with closing(open_component(bundle, "prior_step", backend=BACKEND, device="cpu", options=options)) as session:
            results.append(session(**arrays(session))["prediction"])
        files = sorted((bundle.folder / "engines" / "caches").rglob("*.blob"))
        assert files
    np.testing.assert_array_equal(*results)
    assert sorted((bundle.folder / "engines" / "caches").rglob("*.blob")) == files
    for wrong in ("", "yes"):
        with pytest.raises(InputError, match=f"option 'cache': expected 'on' or 'off', found {wrong!r}"):
            open_session(request_of(bundle, BACKEND, "cpu", options={"cache": wrong}))


# Sessions


def test_no_other_provider_takes_over(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's Python layer would, printing so, when one fails while it opens a graph or runs it."""
    given: list[dict[str, Any]] = []

    class Recorded(onnxruntime.InferenceSession):  # type: ignore[misc, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given.append(kwargs)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Recorded)
    with closing(open_component(opened, "prior_step", backend="onnxruntime", device="cpu")) as session:
        assert session._session._enable_fallback is False  # type: ignore[attr-defined]
    assert given[0]["providers"] == [("CPUExecutionProvider", {})]


def test_outputs_on_the_cpu_are_not_copied(opened: Bundle) -> None:
    with closing(open_component(opened, "prior_step", backend="onnxruntime", device="cpu")) as session:
        result = session(**arrays(session))["prediction"]
        kept = result.copy()
        assert type(result) is np.ndarray
        assert not result.flags.owndata  # it is ONNX Runtime's memory, made for this call
        session(**{name: array + 1 for name, array in arrays(session).items()})
    np.testing.assert_array_equal(result, kept)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_those_asked_for(threads: int, opened: Bundle) -> None:
    for backend, options in (("onnxruntime", {}), (BACKEND, LEFT)):
        if backend == BACKEND:
            require_plugin()
        given: dict[str, Any] = {"backend": backend, "device": "cpu", "options": options}
        with closing(open_component(opened, "prior_step", threads=threads, **given)) as session:
            assert session._session.get_session_options().intra_op_num_threads == threads  # type: ignore[attr-defined]


def test_nothing_is_reported_to_anyone(opened: Bundle, tmp_path: Path) -> None:
    """ONNX Runtime from 1.31 on keeps an identifier and a queue of reports in the home folder, unless told not to."""
    code = (
        "import sys; from kandrt.engines import backends, bundle; opened = bundle.open_bundle(sys.argv[1]); "
        "backends.open_component(opened, 'prior_step', backend='onnxruntime', device='cpu').close()"
    )
    home = {name: str(tmp_path) for name in ("HOME", "USERPROFILE", "LOCALAPPDATA", "XDG_CACHE_HOME")}
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", code, str(opened.folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | home, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# OpenVINO's provider


@pytest.mark.parametrize("component", ["prior_context", "prior_step", "decoder_step", "movq_decoder"])
def test_fp32_is_fp32(component: str, opened: Bundle) -> None:
    require_plugin()
    assert compared(opened, component) <= SAME


def test_left_to_itself_it_would_not_be(opened: Bundle) -> None:
    """The test above means something on a CPU with bf16: that is what this provider takes unasked."""
    require_plugin()
    if "bf16" not in ort.kernels(BACKEND, "cpu"):
        pytest.skip("this CPU has no bfloat16")
    component = opened.manifest.components["prior_step"]
    path = opened.path(component.graph)
    with (
        closing(OrtSession("prior_step", path, component, "cpu", 1)) as reference,
        closing(OrtSession("prior_step", path, component, "cpu", 1, backend=BACKEND, mode="warn")) as session,
    ):
        inputs = arrays(session)
        assert error_of(session(**inputs), reference(**inputs)) > 100 * SAME


def test_bf16_is_what_was_asked_for_and_contexts_stay_in_fp32(opened: Bundle) -> None:
    require_plugin()
    if "bf16" not in ort.kernels(BACKEND, "cpu"):
        pytest.skip("this CPU has no bfloat16")
    assert BF16[0] <= compared(opened, "prior_step", precision="bf16") <= BF16[1]
    assert compared(opened, "prior_context", precision="bf16") <= SAME


def test_the_same_pictures() -> None:
    """Of the trained miniature, through ONNX Runtime, OpenVINO and OpenVINO's provider."""
    require_plugin()
    if unusable("openvino", "cpu") is not None:
        pytest.skip("openvino is not installed (pip install 'kandrt[openvino]')")
    size: dict[str, Any] = {"height": 64, "width": 64, "steps": 3, "prior_steps": 3}
    pictures = {}
    for backend in ("onnxruntime", "openvino", BACKEND):
        options = {BACKEND: LEFT} if backend == BACKEND else None
        with load(backend=backend, threads=1, options=options) as k:
            pictures[backend] = k("a red circle", noise=SeededNoise(), **size).array
    expected = pictures.pop("onnxruntime")
    assert expected.std() > 0.1
    found = {name: psnr(picture, expected) for name, picture in pictures.items()}
    assert min(found.values()) >= PSNR, found


def psnr(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    error = float(np.square(found.astype(np.float64) - expected).mean())
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def test_a_warning_says_what_is_left_out(opened: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    require_plugin()
    with caplog.at_level(logging.WARNING, "kandrt"):
        open_component(opened, "prior_step", backend=BACKEND, device="cpu", options=LEFT).close()
    assert ["Attention" in message for message in caplog.messages] == [True]
