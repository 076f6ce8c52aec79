"""Backends by name, and graphs run by ONNX Runtime: what is refused, when, and with which advice."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from kandrt.engines import backends
from kandrt.engines.backends import BACKENDS, check_backend, open_component
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import BackendError, BundleError, InputError, KandrtError, MissingExtraError
from kandrt.engines.manifest import Component
from kandrt.engines.ort import OrtSession
from kandrt.engines.session import Session
from kandrt.engines.spec import TensorSpec


@pytest.fixture
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


@pytest.fixture
def session(opened: Bundle) -> Iterator[Session]:
    """The prior's step: sample [B, 32], embedding [B, 32], prefix_kv [B, 4, 78, 32], attention_bias [B, 1, 3, 81]."""
    session = open_component(opened, "prior_step", backend="onnxruntime", device="cpu", threads=1)
    yield session
    session.close()


def arrays(session: Session, batch: int = 2) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    shapes = {spec.name: [batch if isinstance(axis, str) else axis for axis in spec.shape] for spec in session.inputs}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def test_unknown_backends_and_devices_are_refused_with_those_that_exist(opened: Bundle) -> None:
    for name in ("tensorflow", "", "ONNXRUNTIME"):
        with pytest.raises(InputError, match=f"backend: expected 'onnxruntime'.*, found {name!r}"):
            check_backend(name, "cpu", "fp32")
    with pytest.raises(InputError, match="device of backend 'onnxruntime': expected 'cpu' or 'cuda', found 'npu'"):
        check_backend("onnxruntime", "npu", "fp32")
    with pytest.raises(InputError, match="found 'tensorflow'"):
        open_component(opened, "prior_step", backend="tensorflow", device="cpu")


@pytest.mark.parametrize(
    ("absent", "device", "message"),
    [
        ("onnxruntime", "cpu", "backend 'onnxruntime' needs the package 'onnxruntime'.*pip install 'kandrt[cpu]'"),
        ("onnxruntime", "cuda", "backend 'onnxruntime' needs the package 'onnxruntime'.*pip install 'kandrt[cuda]'"),
        ("cupy", "cuda", "device 'cuda' needs the package 'cupy'.*pip install 'kandrt[cuda]'"),
    ],
)
def test_a_missing_library_names_the_line_that_installs_it(
    absent: str, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == absent else object())
    with pytest.raises(MissingExtraError, match=message.replace("[", r"\[").replace("]", r"\]")) as caught:
        check_backend("onnxruntime", device, "fp32")
    assert caught.value.package == absent
    assert isinstance(caught.value, BackendError)
    assert (BACKENDS["onnxruntime"].installed() is None) == (absent == "onnxruntime")


def test_the_installed_package_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = BACKENDS["onnxruntime"].installed()
    assert installed is not None
    assert installed.endswith(f" {onnxruntime.__version__}")

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(backends, "version", absent)  # importable, and from no package that is known
    assert BACKENDS["onnxruntime"].installed() == "onnxruntime"


def test_a_precision_without_kernels_is_refused_before_anything_is_opened(opened: Bundle) -> None:
    check_backend("onnxruntime", "cpu", "fp32")
    check_backend("onnxruntime", "cpu", "fp16")
    advice = "no bf16 kernels on device 'cpu'; export the bundle with --precision fp32 or fp16"
    with pytest.raises(BackendError, match=advice):
        check_backend("onnxruntime", "cpu", "bf16")
    low = replace(opened, manifest=replace(opened.manifest, precision="bf16"), folder=Path("nowhere"))
    with pytest.raises(BackendError, match=advice):
        open_component(low, "prior_step", backend="onnxruntime", device="cpu")


def test_a_component_that_the_bundle_lacks_is_refused_with_those_it_has(opened: Bundle) -> None:
    with pytest.raises(
        BundleError, match=r"has no component 'painter'; it has text_encoder, prior_context, prior_step"
    ):
        open_component(opened, "painter", backend="onnxruntime", device="cpu")


def test_a_graph_that_was_replaced_is_refused_by_its_hash(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    graph = copy / "prior_step.onnx"
    other = (copy / "decoder_step.onnx").read_bytes()[: graph.stat().st_size]
    graph.write_bytes(other)
    opened = open_bundle(copy)
    with pytest.raises(BundleError, match=r"prior_step\.onnx: expected SHA-256 .*; export the bundle again"):
        open_component(opened, "prior_step", backend="onnxruntime", device="cpu")


def spec(component: Component, name: str) -> TensorSpec:
    return next(spec for spec in (*component.inputs, *component.outputs) if spec.name == name)


@pytest.mark.parametrize(
    "changes", [{"name": "other"}, {"dtype": "float16"}, {"shape": ("batch", 64)}, {"shape": ("batch",)}]
)
@pytest.mark.parametrize("tensor", ["sample", "prediction"])
def test_a_manifest_that_describes_other_tensors_is_refused(
    tensor: str, changes: dict[str, Any], opened: Bundle
) -> None:
    component = opened.manifest.components["prior_step"]
    old = spec(component, tensor)
    new = replace(old, **changes)
    inputs = tuple(new if each == old else each for each in component.inputs)
    outputs = tuple(new if each == old else each for each in component.outputs)
    damaged = replace(component, inputs=inputs, outputs=outputs)
    with pytest.raises(BundleError, match=r"prior_step: the manifest says .*, the graph has .*; export the") as caught:
        OrtSession("prior_step", opened.path(component.graph), damaged, "cpu")
    assert str(old) in str(caught.value)
    assert str(new) in str(caught.value)


def test_a_graph_that_cannot_be_read_is_an_error_of_the_backend(opened: Bundle, tmp_path: Path) -> None:
    component = opened.manifest.components["prior_step"]
    graph = tmp_path / "graph.onnx"
    for content in (b"", b"not a graph", opened.path(component.graph).read_bytes()):  # the last lacks its weights
        graph.write_bytes(content)
        with pytest.raises(BackendError, match=f"prior_step: onnxruntime cannot open {re.escape(str(graph))}"):
            OrtSession("prior_step", graph, component, "cpu")


FOLDING = "optimization.disable_specified_optimizers"


def test_weights_that_are_stored_as_computed_are_not_folded(
    session: Session, opened: Bundle, fp16_bundle: Path
) -> None:
    """ONNX Runtime then takes a linear weight as it lies, and computes the same."""
    component = opened.manifest.components["prior_step"]
    settings = session._session.get_session_options()  # type: ignore[attr-defined]
    assert settings.get_session_config_entry(FOLDING) == "ConstantFolding"
    with closing(OrtSession("prior_step", opened.path(component.graph), component, "cpu", 1)) as folded:
        inputs = arrays(session)
        np.testing.assert_array_equal(session(**inputs)["prediction"], folded(**inputs)["prediction"])
    half = open_bundle(fp16_bundle)  # on a CPU every weight of it is widened: once, not at every call
    with closing(open_component(half, "prior_step", backend="onnxruntime", device="cpu", threads=1)) as narrow:
        settings = narrow._session.get_session_options()  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match=FOLDING):
            settings.get_session_config_entry(FOLDING)


def test_a_build_without_the_device_is_an_error_of_the_backend(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    component = opened.manifest.components["prior_step"]
    with pytest.raises(
        BackendError, match=r"no CUDAExecutionProvider \(it has CPUExecutionProvider\).*'kandrt\[cuda\]"
    ):
        OrtSession("prior_step", opened.path(component.graph), component, "cuda")


def test_a_device_that_onnxruntime_quietly_replaces_is_an_error(
    opened: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: ["OtherExecutionProvider"])
    component = opened.manifest.components["prior_step"]
    with pytest.raises(BackendError, match="asked onnxruntime for CPUExecutionProvider, it runs Other"):
        OrtSession("prior_step", opened.path(component.graph), component, "cpu")


def test_a_session_says_what_it_takes_and_gives(session: Session, opened: Bundle) -> None:
    assert isinstance(session, Session)
    component = opened.manifest.components["prior_step"]
    assert (session.inputs, session.outputs) == (component.inputs, component.outputs)
    for batch in (1, 3):
        result = session(**arrays(session, batch))
        assert {name: (array.shape, array.dtype) for name, array in result.items()} == {
            "prediction": ((batch, 32), np.dtype(np.float32))
        }


def test_arrays_in_any_memory_order_give_the_same(session: Session) -> None:
    contiguous = arrays(session)
    reordered = {name: np.asfortranarray(array) for name, array in contiguous.items()}
    strided = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in contiguous.items()}
    expected = session(**contiguous)["prediction"]
    for other in (reordered, strided):
        assert not other["prefix_kv"].flags.c_contiguous
        np.testing.assert_array_equal(session(**other)["prediction"], expected)


def test_wrong_inputs_are_refused_all_at_once(session: Session) -> None:
    wrong = arrays(session)
    wrong["sample"] = wrong["sample"].astype(np.float64)
    wrong["prefix_kv"] = wrong["prefix_kv"][:1]
    wrong["extra"] = wrong.pop("attention_bias")
    with pytest.raises(InputError) as caught:
        session(**wrong)
    message = str(caught.value)
    assert message.startswith("prior_step: ")
    for part in (
        "missing input 'attention_bias'",
        "unexpected input 'extra'",
        "expected sample float32[batch, 32], found float64[2, 32]",
        "expected prefix_kv float32[batch, 4, 78, 32] with batch = 2, found float32[1, 4, 78, 32]",
    ):
        assert part in message


def test_a_closed_session_says_so(session: Session) -> None:
    inputs = arrays(session)
    session.close()
    session.close()
    with pytest.raises(BackendError, match="prior_step: the session is closed; load the bundle again"):
        session(**inputs)


def test_a_failure_of_onnxruntime_names_component_and_sizes(opened: Bundle) -> None:
    session = open_component(opened, "decoder_step", backend="onnxruntime", device="cpu", threads=1)
    lengths = {"batch": 1, "height": 12, "width": 8}
    inputs = {
        spec.name: np.zeros([lengths[axis] if isinstance(axis, str) else axis for axis in spec.shape], np.float32)
        for spec in session.inputs
    }
    # three halvings of 12 are 6, 3, 1: the way up does not meet the way down
    with pytest.raises(
        BackendError, match="decoder_step: onnxruntime failed at batch 1, height 12, width 8: "
    ) as caught:
        session(**inputs)
    assert isinstance(caught.value, KandrtError)
    assert caught.value.__cause__ is not None
    session.close()


def test_an_interruption_passes_through(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session._session, "run", interrupt)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        session(**arrays(session))
