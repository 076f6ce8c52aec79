"""`kandrt verify --engines`: engines that are right pass, and one that is wrong in a layer is told which.

Engines that are wrong are ONNX Runtime with another graph than the bundle's: a backend of its own, for the tests.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from typer.testing import CliRunner

from kandrt.engines import backends, builder, store
from kandrt.engines.backends import BACKENDS, Backend, open_component, unusable
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import BackendError, PlacementError
from kandrt.engines.manifest import FileRecord
from kandrt.engines.plans import PlanFigures, PlanRecord, PlanSettings, plan_key
from kandrt.engines.profiles import Coverage, component_profiles
from kandrt.engines.request import Request
from kandrt.engines.session import Session
from kandrt.export import probes
from kandrt.export.check import random_inputs
from kandrt.scripts import engine_checks, engine_reference, verify_engines, worst_layer
from kandrt.scripts.cli import app
from kandrt.scripts.engine_checks import Check, Runner, compared, errors_of
from kandrt.scripts.engine_reference import Answers, Call, reference_session
from kandrt.scripts.reference import peak_signal_to_noise
from kandrt.scripts.verify_engines import Wanted, built_size, find_runners, picture_size

from .test_verify import edit, only_text_to_image

SIZE = (64, 128)


def run(*args: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code and findings of `kandrt verify --engines --json`."""
    result = CliRunner().invoke(app, ["verify", *map(str, args), "--engines", "--json"], prog_name="kandrt")
    assert result.stdout, result.stderr
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["passed"] == (result.exit_code == 0)
    return result.exit_code, found


def fails(*args: str | Path) -> str:
    """The message of a command that cannot start."""
    result = CliRunner().invoke(app, ["verify", *map(str, args)], prog_name="kandrt", env={"COLUMNS": "300"})
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr


def rows(found: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Rows of a kind by what they are of."""
    return {row["what"]: row for row in found["rows"] if row["kind"] == kind}


@pytest.fixture(scope="module")
def small(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle less inpainting and ControlNet: half the work. Not to be changed."""
    folder = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("engines") / "bundle"))
    edit(folder, only_text_to_image)
    return folder


@pytest.fixture(scope="module")
def answers(small: Path) -> Answers:
    """What the reference gives for it."""
    return engine_reference.reference_answers(open_bundle(small), SIZE, lambda _: None)


@pytest.fixture
def known_answers(monkeypatch: pytest.MonkeyPatch, answers: Answers) -> None:
    """The command takes these answers instead of working them out anew."""
    monkeypatch.setattr(verify_engines, "reference_answers", lambda *_: answers)


@dataclass
class Doctored:
    """An engine library that computes another graph than it is given, for one component."""

    component: str
    change: Callable[[ir.Model], None]
    folder: Path

    def kernels(self, backend: str, device: str) -> frozenset[str]:
        return frozenset({"fp32", "fp16"})

    def probe(self, backend: str, device: str) -> None:
        """It can always be used."""

    def open_session(self, request: Request) -> Session:
        if request.name == self.component:
            model = onnx.load(request.graph)  # weights as well: the other graph has them in itself
            changed = ir.from_proto(model)
            self.change(changed)
            target = self.folder / "doctored.onnx"
            ir.save(changed, target)
            record = FileRecord(target.name, target.stat().st_size, "0" * 64)
            component = replace(request.component, graph=record)
            manifest = replace(request.bundle.manifest, components={request.name: component}, decoders={}, prior=None)
            request = replace(request, bundle=Bundle(self.folder, manifest))
        return BACKENDS["onnxruntime"].implementation.open_session(replace(request, backend="onnxruntime"))


@pytest.fixture
def doctored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, Callable[[ir.Model], None]], Runner]:
    """Makes a backend "doctored" that changes the graph of a component."""

    def make(component: str, change: Callable[[ir.Model], None]) -> Runner:
        monkeypatch.setitem(sys.modules, "kandrt.engines.doctored", Doctored(component, change, tmp_path))
        computes = {"fp32": ("fp32",), "fp16": ("fp16",), "bf16": ()}
        entry = Backend("onnxruntime", ("onnxruntime",), {"cpu": "cpu"}, computes, "doctored")  # type: ignore[arg-type]
        monkeypatch.setitem(BACKENDS, "doctored", entry)
        return Runner("doctored", "cpu", "fp32")

    return make


def node_of(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def attribute(name: str, key: str, value: float) -> Callable[[ir.Model], None]:
    """Gives a node another attribute."""

    def change(model: ir.Model) -> None:
        node_of(model, name).attributes[key] = ir.AttrFloat32(key, value)

    return change


def scaled_weight(name: str, factor: float) -> Callable[[ir.Model], None]:
    """Scales the second input of a node, its weight, which may be transposed before."""

    def change(model: ir.Model) -> None:
        value = node_of(model, name).inputs[1]
        assert value is not None
        transpose = value.producer()
        value = value if transpose is None else transpose.inputs[0]
        assert value is not None
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=value.name)

    return change


# Engines that are right


def test_reference_against_itself_has_no_error(small: Path) -> None:
    code, found = run(small, "--backend", "onnxruntime")
    assert (code, found["not_verified"]) == (0, [])
    components, requests = rows(found, "component"), rows(found, "request")
    assert components.keys() == open_bundle(small).manifest.components.keys()
    names = {"prior", "prior from picture", "text-to-image", "image-to-image", "prompt to picture"}
    assert requests.keys() == names
    for row in [*components.values(), *requests.values()]:
        # fp32 bundles: the same library on the same graph, so the same numbers to the last bit
        assert (row["max_abs"], row["relative"], row["psnr"]) == (0.0, 0.0, None)
        assert row["cosine"] == pytest.approx(1, abs=1e-12)
        assert row["engine"] == "onnxruntime on cpu in fp32"
    assert requests["text-to-image"]["levels"] == 0.0
    # text-to-image takes 4 steps and image-to-image 2, the whole request 4: first, middle and last of each
    assert components["decoder_step"]["calls"] == 3 + 2 + 3
    assert next(iter(rows(found, "files").values()))["passed"]


@pytest.mark.parametrize("family", ["bundle_2_1", "bundle_3"])
def test_every_family_is_verified_on_its_own_requests(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    code, found = run(folder, "--backend", "onnxruntime")
    assert (code, found["not_verified"]) == (0, [])
    components, requests = rows(found, "component"), rows(found, "request")
    assert components.keys() == open_bundle(folder).manifest.components.keys()
    names = {"text-to-image", "image-to-image"}
    if family == "bundle_2_1":
        names |= {"prior", "prior from picture", "inpainting", "prompt to picture"}
    assert requests.keys() == names
    assert {row["max_abs"] for row in [*components.values(), *requests.values()]} == {0.0}


def test_wrong_layer_of_a_text_encoder_is_named(doctored: Callable[..., Runner], bundle_3: Path) -> None:
    opened, size = open_bundle(bundle_3), (64, 64)
    runner = doctored("prompt_encoder", scaled_weight("node_linear_4", 1.2))
    inputs = engine_reference.drawn_inputs(opened, "prompt_encoder", size)
    with reference_session(opened, "prompt_encoder") as session:
        answers = Answers({}, {"prompt_encoder": [Call("random inputs", inputs, session(**inputs))]}, {})
    check = Check(opened, runner, answers, lambda _: None)
    row = check.explained(check.component("prompt_encoder"), "prompt_encoder")
    assert not row.passed
    assert row.worst is not None
    assert (row.worst.component, row.worst.layer) == ("prompt_encoder", "node_linear_4")


@pytest.mark.usefixtures("known_answers")
def test_openvino_passes_in_fp32(small: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    code, found = run(small, "--backend", "openvino")
    assert code == 0
    for row in rows(found, "component").values():
        assert 0 < row["relative"] < 1e-5  # another library: about 1e-6, as two libraries' fp32 sums differ
    # 60 dB is the gate; measured 102 dB and more
    assert all(row["psnr"] > 90 for row in rows(found, "request").values() if row["levels"] is not None)


@pytest.mark.usefixtures("known_answers")
def test_openvino_in_bf16_is_held_to_its_own_bounds(small: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    why = unusable("openvino", "cpu", "fp32", "bf16")
    if why is not None:
        pytest.skip(why)
    code, found = run(small, "--backend", "openvino", "--precision", "bf16")
    assert code == 0
    components = rows(found, "component")
    assert components["decoder_context"]["bound"] == "relative 1e-04"  # contexts stay in fp32
    assert components["decoder_context"]["relative"] < 1e-5
    assert components["decoder_step"]["bound"] == "relative 8e-02"
    assert components["decoder_step"]["relative"] > 1e-3  # it is bf16, which rounds to 8 bits
    assert rows(found, "request")["text-to-image"]["bound"] == "PSNR 25 dB"
    assert rows(found, "request")["prompt to picture"]["bound"] == "PSNR 20 dB"


def test_fp16_bundle_is_compared_with_its_graphs_in_fp32(fp16_bundle: Path) -> None:
    code, found = run(fp16_bundle)
    assert code == 0
    runs = {row["engine"] for row in found["rows"] if row["kind"] == "component"}
    assert "onnxruntime on cpu in fp16" in runs  # without --backend, everything that can run here
    names = {f"{name} on {device}" for name, each in BACKENDS.items() for device in each.devices}
    skipped = {each["what"] for each in found["not_verified"]}
    assert {engine.removesuffix(" in fp16") for engine in runs} | skipped == names
    steps = [
        row for row in found["rows"] if row["what"] == "decoder_step" and row["engine"] == "onnxruntime on cpu in fp16"
    ]
    assert 1e-5 < steps[0]["relative"] < 2e-3  # fp16 rounds to 11 bits, 5e-4 each time; the reference does not


def test_widened_graph_computes_in_fp32_with_the_same_weights(bundle: Path, fp16_bundle: Path) -> None:
    # Both were exported from one checkpoint: they differ by the rounding of the weights to fp16, 11 bits, alone
    inputs = random_inputs(open_bundle(bundle).manifest.components["prior_step"].inputs, {})
    found = []
    for folder in (bundle, fp16_bundle):
        with reference_session(open_bundle(folder), "prior_step") as session:
            found.append(session(**inputs)["prediction"])
    assert errors_of(*found).relative < 2e-3
    with reference_session(open_bundle(fp16_bundle), "prior_step") as session:
        assert session(**inputs)["prediction"].tobytes() == found[1].tobytes()
    narrow = open_component(open_bundle(fp16_bundle), "prior_step", backend="onnxruntime", device="cpu")
    assert errors_of(found[1], narrow(**inputs)["prediction"]).relative > 1e-5  # so it did make a difference
    narrow.close()


# Engines that are wrong


WRONG = {
    "attention scale": ("prior_step", "node_scaled_dot_product_attention_1", "Attention",
                        attribute("node_scaled_dot_product_attention_1", "scale", 0.05)),
    "norm": ("decoder_step", "node_group_norm_20", "GroupNormalization",
             attribute("node_group_norm_20", "epsilon", 0.1)),
    "weight": ("movq_decoder", "node_conv2d_30", "Conv", scaled_weight("node_conv2d_30", 1.2)),
}  # fmt: skip


@pytest.mark.parametrize(("component", "layer", "operator", "change"), WRONG.values(), ids=WRONG)
def test_wrong_layer_is_named(
    doctored: Callable[..., Runner],
    small: Path,
    answers: Answers,
    component: str,
    layer: str,
    operator: str,
    change: Callable[[ir.Model], None],
) -> None:
    check = Check(open_bundle(small), doctored(component, change), answers, lambda _: None)
    row = check.explained(check.component(component), component)
    assert not row.passed
    assert row.relative is not None
    assert row.relative > 1e-4
    assert row.worst is not None
    assert (row.worst.component, row.worst.layer, row.worst.operator) == (component, layer, operator)
    # before it, nothing differs but the order of sums in kernels that are not fused
    assert row.worst.before < 1e-5
    assert row.worst.after is not None
    assert row.worst.after > 1e-4
    assert row.worst.note == ""


@pytest.mark.usefixtures("known_answers")
def test_pictures_that_are_wrong_name_the_component_and_its_layer(doctored: Callable[..., Runner], small: Path) -> None:
    doctored("movq_decoder", scaled_weight("node_conv2d_30", 1.5))
    code, found = run(small, "--backend", "doctored")
    assert code == 1
    failed = {row["what"] for row in found["rows"] if not row["passed"]}
    assert failed == {"movq_decoder", "text-to-image", "image-to-image", "prompt to picture"}
    for row in found["rows"]:
        if row["what"] in failed:
            assert row["worst"]["component"] == "movq_decoder"
            assert row["worst"]["layer"] == "node_conv2d_30"
    assert rows(found, "request")["text-to-image"]["psnr"] < 60
    assert rows(found, "request")["text-to-image"]["levels"] > 1


@pytest.mark.usefixtures("known_answers")
def test_picture_out_of_sound_components_names_the_worst_of_those(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    monkeypatch.setattr(engine_checks, "MIN_PSNR", {"fp32": 300.0})  # more than any error in fp32 leaves
    monkeypatch.setattr(engine_reference, "engine_request_names", lambda _: ["text-to-image"])
    pytest.importorskip("openvino", reason="openvino is not installed")
    result = CliRunner().invoke(app, ["verify", str(small), "--engines", "--backend", "openvino"])
    assert result.exit_code == 1
    assert result.stdout.count("FAIL") == 1
    assert "worst layer node_" in result.stdout
    assert "each is within the bound" in result.stdout
    assert "1 of 10 checks failed" in result.stdout


def test_infinity_is_named_and_is_no_number_in_json(
    doctored: Callable[..., Runner], small: Path, answers: Answers
) -> None:
    check = Check(
        open_bundle(small), doctored("prior_step", scaled_weight("node_linear", 1e38)), answers, lambda _: None
    )
    row = check.explained(check.component("prior_step"), "prior_step")
    assert (row.passed, row.relative, row.max_abs) == (False, None, None)
    assert "NaN or infinity" in row.detail
    assert row.worst is not None
    assert (row.worst.layer, row.worst.after) == ("node_linear", None)
    assert "NaN or infinity after it" in str(row.worst)


@pytest.mark.usefixtures("known_answers")
def test_component_that_cannot_be_opened_fails_and_takes_its_requests_with_it(
    doctored: Callable[..., Runner], small: Path
) -> None:
    def refuse(_: ir.Model) -> None:
        raise BackendError("prior_step: no engine can be used here; run: kandrt build")

    doctored("prior_step", refuse)
    code, found = run(small, "--backend", "doctored")
    assert code == 1
    failed = [row for row in found["rows"] if not row["passed"]]
    assert [(row["what"], row["worst"]) for row in failed] == [("prior_step", None)]
    assert "run: kandrt build" in failed[0]["detail"]
    skipped = {each["what"].partition(" by ")[0] for each in found["not_verified"]}
    assert skipped == {"prior", "prior from picture", "prompt to picture"}
    assert rows(found, "request").keys() == {"text-to-image", "image-to-image"}


# Layers


def test_layers_are_what_computes_from_the_inputs(bundle: Path) -> None:
    graph = bundle / "decoder_step.onnx"
    found = probes.layers(graph)
    proto = onnx.load(graph, load_external_data=False)
    weights = {each.name for each in proto.graph.initializer}
    assert not weights & {name for layer in found for name in (*layer.inputs, *layer.outputs)}
    assert {name for layer in found for name in layer.outputs} >= {each.name for each in proto.graph.output}
    known = {each.name for each in proto.graph.input}
    for layer in found:  # in an order in which they can run
        assert set(layer.inputs) <= known
        known |= set(layer.outputs)
    assert "Conv" in {layer.operator for layer in found}
    assert not {"Shape", "Constant"} & {layer.operator for layer in found}


def test_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, doctored: Callable[..., Runner], small: Path, answers: Answers
) -> None:
    runner = doctored("prior_step", attribute("node_scaled_dot_product_attention", "scale", 0.05))
    bundle, call = open_bundle(small), answers.calls["prior_step"][0]
    chunks: list[int] = []
    for size in (worst_layer.CHUNK, 20_000):
        monkeypatch.setattr(worst_layer, "CHUNK", size)
        seen: list[str] = []
        found = worst_layer.find_worst_layer(
            bundle, "prior_step", call, runner.open_instrumented, floor=1e-6, bound=1e-4, report=seen.append
        )
        assert found.layer == "node_scaled_dot_product_attention"
        chunks.append(len(seen))
    assert chunks[0] == 1 < chunks[1]


def test_results_in_half_precision_come_as_float32(fp16_bundle: Path, tmp_path: Path) -> None:
    bundle = worst_layer.copied(open_bundle(fp16_bundle), "prior_step", tmp_path / "copy")
    component = bundle.manifest.components["prior_step"]
    call = Call("", random_inputs(component.inputs, {}), {})
    known = [tensor for layer in probes.layers(bundle.path(component.graph)) for tensor in layer.outputs]
    chunk = worst_layer.lengths(bundle, "prior_step", call, known)
    found = worst_layer.results(bundle, "prior_step", call, chunk, lambda b, name, _: open_fp16(b, name))
    assert found.dtype == np.float32
    assert len(found) == sum(chunk.values())
    session = open_fp16(bundle, "prior_step")
    expected = session(**call.inputs)["prediction"]
    session.close()
    last = dict(worst_layer.parts(chunk))["prediction"]
    # results that are kept are rounded to fp16, which ONNX Runtime's fp32 arithmetic on the CPU spares others
    assert errors_of(expected.ravel(), found[last]).relative < 2e-3


def open_fp16(bundle: Bundle, name: str) -> Session:
    return open_component(bundle, name, backend="onnxruntime", device="cpu")


@pytest.mark.parametrize("grown", [1, 2])
def test_growth_counts_from_one_rounding_on(grown: int) -> None:
    layers = [
        probes.Layer("first", "Conv", (), ("a",)),
        probes.Layer("second", "Add", ("a",), ("b",)),
        probes.Layer("third", "Mul", ("b", "a"), ("c",)),
    ]
    errors = [{"a": 1e-6, "b": 5e-6, "c": 2e-2}, {"a": 1e-6, "b": 3e-2, "c": 4e-2}][grown - 1]
    found = worst_layer.largest_growth("x", layers, errors, 1e-6, 1e-4)
    assert found.layer == ["third", "second"][grown - 1]
    assert (found.before, found.after) == [(5e-6, 2e-2), (1e-6, 3e-2)][grown - 1]


def test_nothing_that_cannot_be_instrumented_is_blamed_on_a_layer(
    monkeypatch: pytest.MonkeyPatch, doctored: Callable[..., Runner], small: Path, answers: Answers
) -> None:
    monkeypatch.setattr(engine_reference, "find_spec", lambda _: None)
    check = Check(open_bundle(small), doctored(*WRONG["attention scale"][::3]), answers, lambda _: None)
    row = check.explained(check.component("prior_step"), "prior_step")
    assert not row.passed
    assert row.worst is None
    assert "worst layer could not be found" in row.detail
    assert "pip install 'kandrt[export]'" in row.detail


def test_a_plan_of_the_layers_is_built_for_backends_that_run_plans(
    monkeypatch: pytest.MonkeyPatch, fp16_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    monkeypatch.setattr(builder, "capability", lambda *_: "sm89")  # builds for a GPU that is not there
    opened: list[Bundle] = []

    class Silent:
        def __init__(self, _: Runner, bundle: Bundle, name: str) -> None:
            opened.append(bundle)

        def __call__(self, **_: Any) -> dict[str, Any]:
            return {probes.RESULTS: np.zeros(1, np.float32)}

        def close(self) -> None:
            """Nothing is open."""

    monkeypatch.setattr(Runner, "open", lambda *args: Silent(*args))
    bundle = worst_layer.copied(open_bundle(fp16_bundle), "prior_step", tmp_path / "copy")
    component = bundle.manifest.components["prior_step"]
    call = Call("", random_inputs(component.inputs, {}), {})
    known = [tensor for layer in probes.layers(bundle.path(component.graph)) for tensor in layer.outputs]
    runner = Runner("tensorrt-rtx", "cuda", "fp16")
    worst_layer.results(bundle, "prior_step", call, dict.fromkeys(known, 1), runner.open_instrumented)
    (record,) = store.EngineStore(opened[0]).records()[0]
    assert record.key.component == "prior_step"
    assert record.figures.half_share == 1.0  # what is read from the layers does not change what they compute in


# Numbers


def test_errors_are_those_of_torch() -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((2, 3, 50)).astype(np.float32)
    found = expected + 0.1 * rng.standard_normal((2, 3, 50)).astype(np.float32)
    errors = errors_of(expected, found)
    a, b = torch.from_numpy(expected).double(), torch.from_numpy(found).double()
    exact = 1e-12  # both in fp64
    assert errors.max_abs == pytest.approx(float((a - b).abs().max()), rel=exact)
    assert errors.relative == pytest.approx(float((a - b).norm() / a.norm()), rel=exact)
    assert errors.cosine == pytest.approx(
        float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)), rel=exact
    )
    assert errors_of(expected, expected) == errors_of(expected, expected.copy())
    assert errors_of(expected, expected).relative == 0
    for wrong in (found[:1], found * np.float32(np.nan), np.full_like(found, np.inf)):
        assert errors_of(expected, wrong).relative == math.inf


def test_tensor_errors_take_infinities_for_what_they_are() -> None:
    mask = np.array([0, -np.inf, 1], np.float32)
    assert worst_layer.tensor_error(mask, mask) == 0
    assert worst_layer.tensor_error(mask, np.array([0, -1e4, 1], np.float32)) == math.inf
    assert worst_layer.tensor_error(np.zeros(4, np.float32), np.full(4, 1e-9, np.float32)) == pytest.approx(1e-3)


@pytest.mark.parametrize(("precision", "gate"), [("fp32", 60.0), ("fp16", 35.0), ("bf16", 25.0)])
def test_pictures_are_held_to_their_psnr(precision: Any, gate: float) -> None:
    picture = np.full((1, 8, 8, 3), 0.5, np.float32)
    for decibels, passes in ((gate + 0.1, True), (gate - 0.1, False)):
        off = picture + np.float32(10 ** (-decibels / 20))  # the PSNR of a constant error e is -20 log10(e)
        row = compared("x", "text-to-image", picture, off, precision)
        assert row.passed is passes
        assert row.psnr == pytest.approx(decibels, abs=0.01)  # float32 rounds 0.5 + e
        assert row.levels == pytest.approx(255 * 10 ** (-decibels / 20), rel=1e-3)
    row = compared("x", "text-to-image", picture, picture * np.float32(np.nan), precision)
    assert (row.passed, row.psnr, row.relative) == (False, None, None)
    assert peak_signal_to_noise(0.0) is None


# The reference


def test_component_that_no_request_reaches_is_given_random_inputs(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    monkeypatch.setattr(engine_reference, "engine_request_names", lambda _: ["prior"])
    bundle = open_bundle(small)
    found = engine_reference.reference_answers(bundle, SIZE, lambda _: None)
    assert found.calls.keys() == bundle.manifest.components.keys()
    assert {call.request for call in found.calls["prior_step"]} == {"prior"}
    (call,) = found.calls["movq_decoder"]
    assert (call.request, call.inputs["latents"].shape[2:]) == ("random inputs", (8, 16))
    assert not found.problems


def test_reference_that_gives_nan_is_a_failing_row(
    monkeypatch: pytest.MonkeyPatch, small: Path, answers: Answers
) -> None:
    problems = {"text-to-image": "the reference in fp32: NaN", "movq_decoder": "no request reaches it"}
    monkeypatch.setattr(
        verify_engines, "reference_answers",
        lambda *_: Answers({}, {"prior_step": answers.calls["prior_step"]}, problems),
    )  # fmt: skip
    code, found = run(small, "--backend", "onnxruntime")
    assert code == 1
    failed = {(row["kind"], row["what"]) for row in found["rows"] if not row["passed"]}
    assert failed == {("request", "text-to-image"), ("component", "movq_decoder")}


def test_network_larger_than_the_machine_says_so(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    opened = open_bundle(small)
    most = 4 * opened.manifest.components["decoder_step"].parameters
    monkeypatch.setattr(engine_reference, "machine_memory", lambda: most - 1)
    found = engine_reference.reference_answers(opened, SIZE, lambda _: None)
    assert found.problems.keys() == {"text-to-image", "image-to-image", "prompt to picture", "decoder_step"}
    assert all("decoder_step: its weights in fp32 take" in problem for problem in found.problems.values())
    assert "with random inputs" in found.problems["decoder_step"]
    assert {call.request for call in found.calls["movq_decoder"]} == {"random inputs"}


def test_networks_make_room_for_each_other(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    monkeypatch.setattr(engine_reference, "RESIDENT", 1)
    bundle = open_bundle(small)
    with engine_reference.References(bundle) as references:
        for name in ("prior_step", "prior_context", "prior_step"):
            references.run(name, random_inputs(bundle.manifest.components[name].inputs, {}))
            assert list(references._open) == [name]
    assert not references._open


# Output


@pytest.mark.usefixtures("known_answers")
def test_table_for_people(small: Path) -> None:
    result = CliRunner().invoke(
        app, ["verify", str(small), "--engines", "--backend", "onnxruntime"], env={"COLUMNS": "80"}
    )
    assert result.exit_code == 0
    assert "onnxruntime on cpu in fp32" in result.stdout
    assert "passed: files; onnxruntime on cpu in fp32: 8 of 8 components, 5 of 5 requests" in result.stdout
    assert result.stdout.count("pass ") == 14 - 1  # the line of the files ends with the word
    assert result.stdout.count("equal") == 3
    assert "onnxruntime on cpu in fp32: decoder_step" in result.stderr
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if "passed:" not in line)


# What cannot be verified


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--engines", "--backend", "cuda"], "backend: expected 'onnxruntime'"),
        (["--engines", "--backend", "onnxruntime", "--device", "tpu"], "device of backend 'onnxruntime'"),
        (["--engines", "--device", "tpu"], "no device 'tpu'"),
        (["--engines", "--backend", "onnxruntime", "--precision", "bf16"], "openvino"),
        (["--engines", "--size", "100", "--backend", "onnxruntime"], "--size: expected a multiple of 64"),
        (["--engines", "--checkpoint", "x"], "--checkpoint: of no use with --engines"),
        (["--engines", "--option", "a=b"], "name the backend"),
        (["--precision", "bf16", "--size", "64"], "--precision, --size: of no use without --engines"),
    ],
)
def test_what_cannot_be_asked_says_why(small: Path, args: list[str], message: str) -> None:
    assert message in fails(small, *args)


def test_library_that_is_not_installed_and_gpu_that_is_missing(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    monkeypatch.setattr(Backend, "installed", lambda _: None)
    assert "pip install 'kandrt[tensorrt]'" in fails(small, "--engines", "--backend", "tensorrt")
    monkeypatch.setattr(Backend, "installed", lambda _: "tensorrt 11")

    def no_gpu(*_: str) -> None:
        raise BackendError("no GPU found")

    monkeypatch.setattr(backends, "find_spec", lambda _: True)
    monkeypatch.setattr(backends, "check_precision", lambda *_: None)
    monkeypatch.setattr(Backend, "implementation", type("None", (), {"probe": staticmethod(no_gpu)}))
    assert "no GPU found" in fails(small, "--engines", "--backend", "tensorrt", "--device", "cuda")


def test_engines_that_were_not_built_name_the_command(small: Path) -> None:
    runner, bundle = Runner("tensorrt-rtx", "cuda", "fp32"), open_bundle(small)
    with pytest.raises(BackendError, match=r"has no tensorrt-rtx engines; run: kandrt build .* --backend tensorrt-rtx"):
        picture_size(bundle, runner, None)


def test_without_a_backend_those_that_cannot_run_are_named(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    monkeypatch.setattr(backends, "unusable", lambda name, *_: None if name in ("openvino", "tensorrt") else "broken")
    skipped: list[Any] = []
    found = find_runners(open_bundle(small), Wanted(None, None, None, None), skipped)
    assert [str(each) for each in found] == ["openvino on cpu in fp32"]
    why = {each.what: each.why for each in skipped}
    assert why["onnxruntime on cpu"] == "broken"
    assert "run: kandrt build" in why["tensorrt on cuda"]
    monkeypatch.setattr(backends, "unusable", lambda *_: "broken")
    with pytest.raises(BackendError, match=r"nothing can run this bundle here in fp32: .*broken"):
        find_runners(open_bundle(small), Wanted(None, None, None, None), [])


@pytest.mark.parametrize("named", [True, False])
def test_a_provider_that_leaves_nodes_out_fails_where_it_was_named(
    small: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    def leaves_out(*_: object) -> Session:
        raise PlacementError("2 Attention were left to the CPU")

    monkeypatch.setattr(Runner, "open", leaves_out)
    skipped: list[Any] = []
    runner = Runner("onnxruntime-openvino", "cpu", "fp32")
    found = Check(open_bundle(small), runner, answers, lambda _: None, named=named).run(SIZE, skipped)
    if named:
        assert found
        assert not any(row.passed for row in found)
        assert "left to the CPU" in found[0].detail
    else:
        assert found == []
        assert [(each.what, each.why) for each in skipped] == [
            ("onnxruntime-openvino on cpu", "2 Attention were left to the CPU")
        ]


def test_size_is_one_that_the_engines_take(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(small)

    def records(*extents: tuple[int, int, int]) -> Iterator[PlanRecord]:
        for name, extent in zip(("decoder_step", "movq_decoder", "movq_encoder"), extents, strict=True):
            key = plan_key(
                bundle, name, builder="tensorrt", library="1", compute_capabilities=["sm90"], settings=PlanSettings(),
                profiles=component_profiles(bundle.manifest, name, [Coverage(extent)]),
            )  # fmt: skip
            yield PlanRecord(1, key, FileRecord("x", 1, "0" * 64), PlanFigures(1, 1, 0, 1))

    def built(*extents: tuple[int, int, int]) -> tuple[int, int]:
        found = list(records(*extents))
        monkeypatch.setattr(store.EngineStore, "records", lambda _: (found, []))
        return built_size(bundle, "tensorrt")

    assert built((128, 256, 512), (256, 256, 512), (64, 256, 512)) == (256, 320)
    assert built((256, 256, 256), (256, 256, 512), (64, 256, 512)) == (256, 256)
    with pytest.raises(BackendError, match="no size in common; run: kandrt build"):
        built((128, 128, 128), (256, 256, 512), (64, 256, 512))


def test_damaged_files_end_it(small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "copy"))
    with (folder / "weights" / "movq.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    code, found = run(folder, "--backend", "onnxruntime")
    assert code == 1
    assert [row["kind"] for row in found["rows"]] == ["files"]
    assert found["not_verified"] == [{"what": "engines", "why": "files are damaged"}]


def test_half_precision_without_onnx_says_what_to_install(monkeypatch: pytest.MonkeyPatch, fp16_bundle: Path) -> None:
    monkeypatch.setattr(engine_reference, "find_spec", lambda _: None)
    message = fails(fp16_bundle, "--engines", "--backend", "onnxruntime")
    assert "the reference in fp32 of a bundle exported in fp16" in message
    assert "pip install 'kandrt[export]'" in message
