"""Graphs run by OpenVINO: the same numbers as under ONNX Runtime, in the precision that was asked for and no other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from kandrt.engines import openvino
from kandrt.engines.backends import BACKENDS, check_backend, open_component, precisions, unusable
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import BackendError, BundleError, InputError
from kandrt.engines.manifest import Component, FileRecord, Precision
from kandrt.engines.openvino import OpenVinoSession, core
from kandrt.engines.request import contexts
from kandrt.engines.session import Session
from kandrt.engines.spec import DType, TensorSpec
from kandrt.runtime import load
from kandrt.scripts.cli import app

from .oracle import PICTURE_TOLERANCE, SeededNoise

if find_spec("openvino") is None:  # not importorskip: a plain import reports to OpenVINO's makers
    pytest.skip("openvino is not installed (pip install 'kandrt[openvino]')", allow_module_level=True)

# Relative L2 against ONNX Runtime, fp32 on both sides and sums in another order: at most 2e-6 was seen.
SAME = 1e-5
# bfloat16 keeps 8 bits, 4e-3 a rounding; through a network at most 2e-2 was seen, and 3e-3 at least.
BF16 = (1e-3, 5e-2)

needs_bf16 = pytest.mark.skipif("bf16" not in openvino.kernels("openvino", "cpu"), reason="this CPU has no bfloat16")

SIZES = (
    {"batch": 1, "height": 8, "width": 8, "image_height": 64, "image_width": 64, "timesteps": 1},
    {"batch": 3, "height": 16, "width": 8, "image_height": 128, "image_width": 64, "timesteps": 4},
)
COMPONENTS = (
    "text_encoder", "image_encoder", "prior_context", "prior_step", "decoder_context", "decoder_step",
    "inpaint_context", "inpaint_step", "controlnet_context", "controlnet_step", "movq_encoder", "movq_decoder",
)  # fmt: skip
IN_BF16 = ("text_encoder", "image_encoder", "prior_step", "decoder_step", "movq_encoder", "movq_decoder")

# Types of the layers that take the time, as OpenVINO names the layers.
HEAVY = ("Convolution", "FullyConnected", "MatMul", "ScaledDotProductAttention")


@pytest.fixture
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


@pytest.fixture
def session(opened: Bundle) -> Iterator[Session]:
    session = open_component(opened, "prior_step", backend="openvino", device="cpu", threads=1)
    yield session
    session.close()


def arrays(specs: tuple[TensorSpec, ...], size: dict[str, int]) -> dict[str, NDArray[Any]]:
    """Inputs that a component may get: tokens, timesteps from the whole range, a mask of words, normal numbers."""
    rng = np.random.default_rng(0)

    def array(spec: TensorSpec) -> NDArray[Any]:
        shape = [axis if isinstance(axis, int) else size[axis] for axis in spec.shape]
        if spec.name == "timesteps":
            return np.linspace(999, 0, shape[0], dtype=np.float32)
        if spec.name == "text_mask":
            return np.repeat(np.arange(shape[1])[None] < 9, shape[0], axis=0).astype(np.float32)
        if spec.dtype == "int64":
            return rng.integers(1, 90, shape)
        return rng.standard_normal(shape, np.float32)

    return {spec.name: array(spec) for spec in specs}


def relative(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """L2 norm of the difference over that of the expected array, by output."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
    return {name: float(np.linalg.norm(found[name] - a) / np.linalg.norm(a)) for name, a in expected.items()}


def computed_in(session: Session) -> set[str]:
    """The types that the layers that take the time really run in, as the compiled graph tells."""
    parts = session._compiled  # type: ignore[attr-defined]
    nodes = [node.get_rt_info() for part in parts for node in part.get_runtime_model().get_ops()]
    found = {str(n["runtimePrecision"].value) for n in nodes if "layerType" in n and n["layerType"].value in HEAVY}
    assert found, "no layer has a type: OpenVINO tells it in another way"
    return found


# The same numbers


@pytest.mark.parametrize("name", COMPONENTS)
def test_components_equal_those_of_onnxruntime(name: str, opened: Bundle) -> None:
    """At any batch and size, from arrays that it leaves as they are into arrays of their own."""
    assert set(COMPONENTS) == opened.manifest.components.keys()
    options: dict[str, Any] = {"device": "cpu", "threads": 1}
    with (
        closing(open_component(opened, name, backend="onnxruntime", **options)) as reference,
        closing(open_component(opened, name, backend="openvino", **options)) as session,
    ):
        assert isinstance(session, Session)
        assert (session.inputs, session.outputs) == (reference.inputs, reference.outputs)
        results = []
        for size in SIZES:
            inputs = arrays(session.inputs, size)
            given = {name: array.copy() for name, array in inputs.items()}
            results.append(session(**inputs))
            errors = relative(results[-1], reference(**given))
            assert max(errors.values()) <= SAME, errors
            for key, array in given.items():
                np.testing.assert_array_equal(inputs[key], array)
        assert computed_in(session) == {"f32"}
    kept = [{name: array.copy() for name, array in result.items()} for result in results]
    for result, copies in zip(results, kept, strict=True):
        for key, array in result.items():
            assert type(array) is np.ndarray
            assert array.flags.owndata
            np.testing.assert_array_equal(array, copies[key])


def test_outputs_outlive_the_next_call_and_the_session(session: Session) -> None:
    first, second = (arrays(session.inputs, {"batch": 2}) for _ in range(2))
    second["sample"] = second["sample"] + 1
    found = session(**first)["prediction"]
    kept = found.copy()
    assert not np.array_equal(session(**second)["prediction"], kept)
    session.close()
    np.testing.assert_array_equal(found, kept)


def test_arrays_in_any_memory_order_give_the_same(session: Session) -> None:
    contiguous = arrays(session.inputs, {"batch": 2})
    reordered = {name: np.asfortranarray(array) for name, array in contiguous.items()}
    strided = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in contiguous.items()}
    constant = {name: array.copy() for name, array in contiguous.items()}
    for array in constant.values():
        array.flags.writeable = False
    expected = session(**contiguous)["prediction"]
    for other in (reordered, strided, constant):
        np.testing.assert_array_equal(session(**other)["prediction"], expected)


def test_threads_may_share_a_session(session: Session) -> None:
    inputs = arrays(session.inputs, {"batch": 2})
    expected = session(**inputs)["prediction"]
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: session(**inputs)["prediction"], range(40)):
            np.testing.assert_array_equal(result, expected)


# Precision


@needs_bf16
@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_is_what_was_asked_for(name: str, opened: Bundle) -> None:
    options: dict[str, Any] = {"backend": "openvino", "device": "cpu", "threads": 1}
    with (
        closing(open_component(opened, name, **options)) as reference,
        closing(open_component(opened, name, precision="bf16", **options)) as session,
    ):
        inputs = arrays(session.inputs, SIZES[1])
        errors = relative(session(**inputs), reference(**inputs))
        assert "bf16" in computed_in(session)
    assert all(BF16[0] <= error <= BF16[1] for error in errors.values()), errors


@needs_bf16
@pytest.mark.parametrize(
    ("name", "computed", "rounded"),
    [("prior_context", {"f32", "bf16"}, {"prefix_kv"}), ("decoder_context", {"f32"}, set())],
)
def test_contexts_embed_timesteps_in_fp32(name: str, computed: set[str], rounded: set[str], opened: Bundle) -> None:
    """In bf16 their embeddings would be 10 to 30 % off; the prior's transformer is not what embeds them."""
    assert name in contexts(opened.manifest)
    options: dict[str, Any] = {"backend": "openvino", "device": "cpu", "threads": 1}
    with (
        closing(open_component(opened, name, **options)) as reference,
        closing(open_component(opened, name, precision="bf16", **options)) as session,
    ):
        inputs = arrays(session.inputs, SIZES[1])
        for _ in range(2):
            errors = relative(session(**inputs), reference(**inputs))
            assert {each for each, error in errors.items() if error > 0} == rounded, errors
            assert all(BF16[0] <= errors[each] <= BF16[1] for each in rounded), errors
        assert computed_in(session) >= computed


def test_contexts_are_all_that_take_timesteps(opened: Bundle) -> None:
    components = opened.manifest.components
    assert contexts(opened.manifest) == {
        name for name, component in components.items() if "timesteps" in {spec.name for spec in component.inputs}
    }


def linear(folder: Path, dtype: int, precision: Precision) -> tuple[Path, Component, NDArray[np.float32]]:
    """A graph as exported in 16 bits, [batch, 64] by [64, 64], with its component and its weight as it is stored."""
    rng = np.random.default_rng(1)
    helper = onnx.helper
    stored = rng.standard_normal((64, 64), np.float32).astype(helper.tensor_dtype_to_np_dtype(dtype))
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=dtype),
        helper.make_node("MatMul", ["low", "w"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 64]) for name in "xy")
    graph = helper.make_graph(nodes, "linear", [x], [y], [onnx.numpy_helper.from_array(stored, "w")])
    path = folder / "linear.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    tensors = [(TensorSpec(name, "float32", ("batch", 64)),) for name in "xy"]
    component = Component(FileRecord(path.name, 0, "0" * 64), (), tensors[0], tensors[1], precision, 64 * 64)
    return path, component, stored.astype(np.float32)


def test_fp16_graphs_run_with_at_least_fp16(tmp_path: Path) -> None:
    graph, component, weight = linear(tmp_path, onnx.TensorProto.FLOAT16, "fp16")
    with closing(OpenVinoSession("linear", graph, component, "fp16", 1)) as session:
        assert computed_in(session) <= {"f32", "f16"}
        x = np.random.default_rng(2).standard_normal((3, 64), np.float32)
        # x and the product are rounded to 11 bits each at the most: 2.5e-4 on average; in bf16 it would be 3e-3
        assert relative(session(x=x), {"y": x @ weight})["y"] <= 6e-4


@needs_bf16
def test_bf16_graphs_run_in_bf16(tmp_path: Path) -> None:
    graph, component, weight = linear(tmp_path, onnx.TensorProto.BFLOAT16, "bf16")
    with closing(OpenVinoSession("linear", graph, component, "bf16", 1)) as session:
        assert computed_in(session) == {"bf16"}
        x = np.random.default_rng(2).standard_normal((3, 64), np.float32)
        assert 5e-4 <= relative(session(x=x), {"y": x @ weight})["y"] <= 1e-2  # 8 bits: 2e-3 a rounding on average


@pytest.mark.parametrize(
    ("backend", "exported", "asked", "message"),
    [
        ("onnxruntime", "fp32", "bf16", "only in fp32, found precision 'bf16'; use backend 'openvino'"),
        ("onnxruntime", "fp32", "fp16", "only in fp32, found precision 'fp16'; export it with --precision fp16"),
        ("onnxruntime", "fp16", "fp32", "only in fp16, found precision 'fp32'; export it with --precision fp32"),
        ("openvino", "fp32", "fp16", "only in fp32 or bf16, found precision 'fp16'; export it with --precision fp16"),
        ("openvino", "fp16", "fp32", "only in fp16, found precision 'fp32'; export it with --precision fp32"),
        ("openvino", "bf16", "fp32", "only in bf16, found precision 'fp32'; export it with --precision fp32"),
    ],
)  # fmt: skip
def test_another_precision_is_refused_with_what_gives_it(
    backend: str, exported: Precision, asked: Precision, message: str
) -> None:
    check_backend(backend, "cpu", "fp32", "fp32")
    with pytest.raises(BackendError, match=f"{re.escape(message)}$"):
        check_backend(backend, "cpu", exported, asked)


def test_unknown_precisions_and_devices_are_refused(bundle: Path) -> None:
    for name in ("int8", "FP32", ""):
        with pytest.raises(InputError, match=f"precision: expected 'fp32' or 'fp16' or 'bf16', found '{name}'"):
            load(bundle, backend="openvino", precision=name)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="device of backend 'openvino': expected 'cpu', found 'cuda'"):
        load(bundle, backend="openvino", device="cuda")
    with pytest.raises(BackendError, match="found precision 'bf16'; use backend 'openvino'"):
        load(bundle, precision="bf16")


class Altered:
    """OpenVINO with other answers."""

    def __init__(self, **answers: Any) -> None:
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        return self._answers.get(name) or getattr(core.__wrapped__(), name)


def test_bf16_is_refused_where_it_would_be_emulated(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "core", lambda: Altered(get_property=lambda *_: ["FP32", "INT8"]))
    assert precisions("openvino", "cpu") == ["fp32", "fp16"]
    with pytest.raises(BackendError, match="no bf16 kernels on device 'cpu'; this bundle can be computed in fp32"):
        load(bundle, backend="openvino", precision="bf16")
    with pytest.raises(BackendError, match="kernels on device 'cpu'; export the bundle with --precision fp32 or fp16"):
        check_backend("openvino", "cpu", "bf16")
    load(bundle, backend="openvino").close()


@needs_bf16
def test_a_precision_that_openvino_quietly_replaces_is_an_error(
    opened: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_model(model: Any, device: str, settings: dict[str, Any]) -> Any:
        return core.__wrapped__().compile_model(model, device, settings | {"INFERENCE_PRECISION_HINT": "bf16"})

    real = core()
    monkeypatch.setattr(core, "__wrapped__", lambda: real)
    monkeypatch.setattr(openvino, "core", lambda: Altered(compile_model=compile_model))
    with pytest.raises(BackendError, match="prior_step: asked openvino for f32, it computes in bf16"):
        open_component(opened, "prior_step", backend="openvino", device="cpu")


# Whole requests


@needs_bf16
def test_pictures(bundle: Path) -> None:
    """The pictures of ONNX Runtime, within rounding in fp32 and within what bf16 is known for."""
    size: dict[str, Any] = {"height": 64, "width": 128, "steps": 2, "prior_steps": 2}
    pictures = {}
    for backend, precision in (("onnxruntime", None), ("openvino", None), ("openvino", "bf16")):
        with load(bundle, backend=backend, precision=precision, threads=1) as k:  # type: ignore[arg-type]
            assert k.precision == (precision or "fp32")
            pictures[backend, precision] = k("a red cat", count=2, noise=SeededNoise(), **size).array
    expected = pictures["onnxruntime", None]
    assert expected.std() > 0.1
    assert np.abs(pictures["openvino", None] - expected).max() <= PICTURE_TOLERANCE
    found = pictures["openvino", "bf16"]
    rms = float(np.sqrt(np.square(found - expected).mean()))
    assert 1e-3 <= rms <= 5e-2, rms


@needs_bf16
def test_the_command_line_computes_in_what_the_picture_says(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    options = ["--height", "64", "--width", "64", "--steps", "1", "--prior-steps", "1", "--seed", "3", "--threads", "1"]
    command = ["generate", str(bundle), "a red cat", "-o", str(output), *options]
    result = CliRunner().invoke(app, [*command, "--backend", "openvino", "--precision", "bf16"])
    assert result.exit_code == 0, result.stderr
    with Image.open(output) as image:
        image.load()
        assert (image.text["backend"], image.text["precision"]) == ("openvino", "bf16")  # type: ignore[attr-defined]
    result = CliRunner().invoke(app, [*command, "--precision", "bf16"])
    assert result.exit_code == 1
    assert "use backend 'openvino'" in result.stderr


# Errors


def test_a_graph_that_cannot_be_read_is_an_error_of_the_backend(opened: Bundle, tmp_path: Path) -> None:
    component = opened.manifest.components["prior_step"]
    graph = tmp_path / "graph.onnx"
    for content in (b"", b"not a graph", opened.path(component.graph).read_bytes()):  # the last lacks its weights
        graph.write_bytes(content)
        with pytest.raises(BackendError, match=f"prior_step: openvino cannot open {re.escape(str(graph))}"):
            OpenVinoSession("prior_step", graph, component, "fp32")


@pytest.mark.parametrize(
    "changes", [{"name": "other"}, {"dtype": "float16"}, {"shape": ("batch", 64)}, {"shape": ("batch",)}]
)
@pytest.mark.parametrize("tensor", ["sample", "prediction"])
def test_a_manifest_that_describes_other_tensors_is_refused(
    tensor: str, changes: dict[str, Any], opened: Bundle
) -> None:
    component = opened.manifest.components["prior_step"]

    def changed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(spec, **changes) if spec.name == tensor else spec for spec in specs)

    damaged = replace(component, inputs=changed(component.inputs), outputs=changed(component.outputs))
    with pytest.raises(BundleError, match=r"prior_step: the manifest says .*, the graph has .*\[\?0, 32\].*; export"):
        OpenVinoSession("prior_step", opened.path(component.graph), damaged, "fp32")


@pytest.mark.parametrize("dtype", ["bool", "int32", "int64", "float16", "float32"])
def test_every_type_of_a_tensor_is_known(dtype: DType, tmp_path: Path) -> None:
    number = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    x, y = (onnx.helper.make_tensor_value_info(name, number, ["batch", 2]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Concat", ["x", "x"], ["y"], axis=0)], "twice", [x], [y])
    path = tmp_path / "twice.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10), path)
    inputs, outputs = ((TensorSpec(name, dtype, (axis, 2)),) for name, axis in (("x", "batch"), ("y", "twice")))
    component = Component(FileRecord(path.name, 0, "0" * 64), (), inputs, outputs, "fp32", 0)
    with closing(OpenVinoSession("twice", path, component, "fp32")) as session:
        array = np.array([[0, 1], [1, 1]], dtype)
        result = session(x=array)["y"]
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, np.concatenate([array, array]))


def test_a_size_that_cannot_be_is_refused_and_changes_nothing(opened: Bundle) -> None:
    with closing(open_component(opened, "decoder_step", backend="openvino", device="cpu", threads=1)) as session:
        good, bad = (arrays(session.inputs, {"batch": 1, "height": height, "width": 8}) for height in (8, 12))
        expected = session(**good)["prediction"]
        for _ in range(3):
            # three halvings of 12 are 6, 3, 1: the way up does not meet the way down
            with pytest.raises(BackendError, match="decoder_step: openvino failed at batch 1, height 12, width 8: "):
                session(**bad)
        np.testing.assert_array_equal(session(**good)["prediction"], expected)


@pytest.mark.parametrize("silent", [False, True])
def test_a_failed_graph_is_compiled_anew(silent: bool, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it says that it failed, or gives an array of another size."""
    inputs, other = (arrays(session.inputs, {"batch": batch}) for batch in (2, 3))
    expected = session(**inputs)["prediction"]
    (compiled,) = session._compiled  # type: ignore[attr-defined]

    class Request:
        def infer(self, *_: Any, **__: Any) -> dict[str, Any]:
            if silent:
                return {"prediction": np.zeros((0, 32), np.float32)}
            raise MemoryError("no memory")

    monkeypatch.setattr(compiled, "create_infer_request", Request)
    message = r"expected prediction float32\[2, 32\], found float32\[0, 32\]" if silent else "no memory"
    with pytest.raises(BackendError, match=f"prior_step: openvino failed at batch 2: {message}"):
        session(**inputs)
    np.testing.assert_array_equal(session(**inputs)["prediction"], expected)
    assert session(**other)["prediction"].shape == (3, 32)
    assert session._compiled not in (None, [compiled])  # type: ignore[attr-defined]


def test_wrong_arrays_and_closed_sessions_are_refused(session: Session) -> None:
    inputs = arrays(session.inputs, {"batch": 2})
    with pytest.raises(InputError, match=r"prior_step: expected sample float32\[batch, 32\], found float64\[2, 32\]"):
        session(**{**inputs, "sample": inputs["sample"].astype(np.float64)})
    session.close()
    session.close()
    with pytest.raises(BackendError, match="prior_step: the session is closed; load the bundle again"):
        session(**inputs)


# The library


def test_the_installed_library_is_named() -> None:
    assert BACKENDS["openvino"].installed() == f"openvino {version('openvino')}"
    assert unusable("openvino", "cpu") is None


def test_a_library_that_cannot_be_used_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "core", lambda: Altered(available_devices=["GPU"]))
    assert unusable("openvino", "cpu") == (
        "device 'cpu': this build of openvino has GPU; run: pip install 'kandrt[openvino]'"
    )
    monkeypatch.setattr(openvino, "core", core.__wrapped__)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"openvino cannot be used: .*; run: pip install 'kandrt\[openvino\]'"):
        openvino.kernels("openvino", "cpu")


def test_nothing_is_reported_to_anyone(tmp_path: Path) -> None:
    """OpenVINO's telemetry is neither imported nor does it leave its identifier in the home folder."""
    code = (
        "import sys; from kandrt.engines.openvino import core; core(); "
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')], 'openvino' in sys.modules)"
    )
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "LOCALAPPDATA": str(tmp_path)}
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment | home)
    assert (done.stdout, done.stderr) == ("[] True\n", "")
    assert list(tmp_path.iterdir()) == []
