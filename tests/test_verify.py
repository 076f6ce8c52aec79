"""`kandrt verify`: a sound bundle passes, and each kind of damage is found by the check that is there for it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from kandrt.engines.bundle import open_bundle
from kandrt.engines.hashing import sha256_file
from kandrt.engines.manifest import Manifest, encode_manifest
from kandrt.engines.session import Session
from kandrt.runtime import load
from kandrt.scripts import reference
from kandrt.scripts.checkpoint_networks import find_references
from kandrt.scripts.cli import app
from kandrt.scripts.random_checkpoint import make_checkpoint


def run(*args: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code and findings of `kandrt verify --json`; the checks by what they are of."""
    result = CliRunner().invoke(app, ["verify", *map(str, args), "--json"], prog_name="kandrt")
    assert result.stdout, result.stderr
    found = json.loads(result.stdout)
    assert found["passed"] == (result.exit_code == 0)
    return result.exit_code, found


def failed(found: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Kind and name of what failed."""
    return {(row["kind"], row["what"]) for row in found["rows"] if not row["passed"]}


def kinds(found: Mapping[str, Any]) -> Counter[str]:
    """How many checks of each kind there were."""
    return Counter(row["kind"] for row in found["rows"])


def torch_sessions(bundle: Path) -> dict[str, Session]:
    """Every component under PyTorch, from the checkpoints that the manifest names."""
    skipped: list[reference.Skipped] = []
    found = find_references(open_bundle(bundle), [], (None, None), skipped)
    assert not skipped
    return {name: each.session for name, each in found.items()}


@pytest.fixture(scope="session")
def answers(bundle: Path) -> dict[str, NDArray[np.float32]]:
    """What PyTorch gives for the requests."""
    return reference.make_reference(bundle, torch_sessions(bundle))


@pytest.fixture
def whole(spare_bundle: Path, tmp_path: Path, answers: dict[str, NDArray[np.float32]]) -> Path:
    """A bundle of its own with stored answers; files are hard links, so replace them and never write into them."""
    folder = Path(shutil.copytree(spare_bundle, tmp_path / "copy", copy_function=os.link))
    save_file(answers, folder / "reference.safetensors")
    edit(folder, lambda manifest: dataclasses.replace(manifest, reference=record(folder / "reference.safetensors")))
    return folder


@pytest.fixture
def copy(whole: Path) -> Path:
    """The same less inpainting and ControlNet: half the work."""
    edit(whole, only_text_to_image)
    return whole


def only_text_to_image(manifest: Manifest) -> Manifest:
    """The manifest of a bundle of prior and decoder."""
    others = ("inpaint", "controlnet")
    components = {name: each for name, each in manifest.components.items() if not name.startswith(others)}
    weights = {name: each for name, each in manifest.weights.items() if name not in others}
    return dataclasses.replace(
        manifest,
        components=components,
        weights=weights,
        decoders={"decoder": manifest.decoders["decoder"]},
        sources=manifest.sources[:2],
    )


def edit(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Put another manifest in place."""
    content = encode_manifest(change(open_bundle(folder).manifest))
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_bytes(content)


def record(path: Path) -> Any:
    """A file of a bundle's top folder as the manifest has it."""
    from kandrt.engines.manifest import FileRecord

    return FileRecord(path.name, path.stat().st_size, sha256_file(path))


def replace_graph(folder: Path, component: str, content: bytes) -> None:
    """Another graph for a component, its size and hash put right in the manifest."""
    path = folder / f"{component}.onnx"
    manifest = open_bundle(folder).manifest
    path.unlink()
    path.write_bytes(content)
    components = manifest.components | {
        component: dataclasses.replace(manifest.components[component], graph=record(path))
    }
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_bytes(encode_manifest(dataclasses.replace(manifest, components=components)))


# What passes


def test_sound_bundle_passes_every_check(whole: Path) -> None:
    code, found = run(whole)
    assert (code, found["not_verified"]) == (0, [])
    manifest = open_bundle(whole).manifest
    assert kinds(found) == {"files": 1, "graph": len(manifest.components), "request": 6}
    assert {row["what"] for row in found["rows"] if row["kind"] == "graph"} == set(manifest.components)
    for row in found["rows"]:
        if row["kind"] == "graph":
            assert row["relative"] <= 1e-4  # the tolerance of fp32 graphs in export/check.py


@pytest.mark.parametrize("family", ["bundle_2_1", "bundle_3"])
def test_other_families_pass_every_check(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    code, found = run(folder)
    assert (code, found["not_verified"]) == (0, [])
    manifest = open_bundle(folder).manifest
    names = {"bundle_2_1": ["prior", "prior from picture"], "bundle_3": []}[family]
    names += ["text-to-image", "image-to-image", *(["inpainting"] if family == "bundle_2_1" else [])]
    assert reference.request_names(manifest) == names
    graphs, requests = ([row["what"] for row in found["rows"] if row["kind"] == kind] for kind in ("graph", "request"))
    assert (graphs, requests) == (list(manifest.components), names)


def test_table_for_people(copy: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(copy)], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert "passed: files, 8 of 8 graphs, 4 of 4 requests" in result.stdout
    assert result.stdout.count(" pass ") == 13
    assert "checking decoder_step" in result.stderr


def test_without_pytorch_the_stored_answers_are_checked(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, found = run(copy)
    assert code == 0
    assert kinds(found) == {"files": 1, "request": 4}
    assert [skipped["what"] for skipped in found["not_verified"]] == ["graphs against PyTorch"]
    assert "pip install 'kandrt[export]'" in found["not_verified"][0]["why"]


def test_without_stored_answers_they_are_computed(bundle: Path) -> None:
    assert open_bundle(bundle).manifest.reference is None
    code, found = run(bundle)
    assert (code, found["not_verified"]) == (0, [])
    assert kinds(found)["request"] == 6


def test_without_anything_to_compare_with_it_says_so(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, found = run(bundle)
    assert code == 0
    assert kinds(found) == {"files": 1}
    assert len(found["not_verified"]) == 2
    assert "no reference pictures" in found["not_verified"][1]["why"]


def test_answers_to_other_requests_are_not_taken_for_wrong(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    monkeypatch.setattr(reference, "RECIPE", reference.RECIPE + 1)
    code, found = run(copy)
    assert code == 0
    assert kinds(found)["request"] == 0
    assert "other requests" in found["not_verified"][0]["why"]


def test_bf16_on_a_cpu_checks_graphs_in_fp32_and_names_what_is_left(copy: Path, tmp_path: Path) -> None:
    # Stands for a bf16 bundle: what matters here is that this device has no kernels for it. No hard links this time:
    # onnx-ir, which converts the graphs, refuses them.
    folder = Path(shutil.copytree(copy, tmp_path / "bf16"))
    edit(folder, lambda manifest: dataclasses.replace(manifest, precision="bf16"))
    code, found = run(folder)
    assert code == 0
    assert kinds(found) == {"files": 1, "graph": 8}
    assert "no bf16 kernels" in found["not_verified"][0]["why"]
    assert "text-to-image" in found["not_verified"][0]["what"]


# Checkpoints


def test_checkpoint_that_has_moved_is_named_and_can_be_given(copy: Path, checkpoints: dict[str, Path]) -> None:
    def moved(manifest: Manifest) -> Manifest:
        sources = [dataclasses.replace(source, checkpoint=f"{source.checkpoint}-moved") for source in manifest.sources]
        return dataclasses.replace(manifest, sources=tuple(sources))

    edit(copy, moved)
    code, found = run(copy)
    assert code == 0
    assert kinds(found) == {"files": 1, "request": 4}
    assert len(found["not_verified"]) == 2
    assert all("--checkpoint" in skipped["why"] for skipped in found["not_verified"])
    code, found = run(copy, "--checkpoint", checkpoints["prior"])
    assert kinds(found)["graph"] == 4
    assert "decoder_step" in found["not_verified"][0]["what"]


def test_combined_checkpoint_is_prior_and_decoder(copy: Path, checkpoints: dict[str, Path]) -> None:
    # Its submodels have the weights of the separate checkpoints: random ones depend on a submodel's own name alone.
    code, found = run(copy, "--checkpoint", checkpoints["combined"])
    assert code == 0
    assert kinds(found)["graph"] == 8


def test_checkpoint_of_the_hub_is_not_downloaded(copy: Path) -> None:
    def from_hub(manifest: Manifest) -> Manifest:
        sources = [dataclasses.replace(s, checkpoint=f"nobody/{s.kind}", revision="0" * 40) for s in manifest.sources]
        return dataclasses.replace(manifest, sources=tuple(sources))

    edit(copy, from_hub)
    code, found = run(copy)
    assert code == 0
    assert "not in the hub's cache" in found["not_verified"][0]["why"]


def test_other_weights_are_another_checkpoint(copy: Path, tmp_path: Path) -> None:
    other = make_checkpoint("kandinsky-2-2-prior", tmp_path / "other", small=True, seed=2)
    code, found = run(copy, "--checkpoint", other)
    assert code == 1
    assert failed(found) == {
        ("graph", name) for name in ("text_encoder", "image_encoder", "prior_context", "prior_step")
    }


def test_checkpoint_for_which_the_bundle_has_no_use_is_an_error(copy: Path, checkpoints: dict[str, Path]) -> None:
    result = CliRunner().invoke(app, ["verify", str(copy), "--checkpoint", str(checkpoints["inpaint"])])
    assert result.exit_code == 1
    assert f"error: {checkpoints['inpaint']} is a checkpoint for inpaint" in result.stderr


def test_checkpoint_of_another_family_is_an_error(copy: Path, checkpoints: dict[str, Path]) -> None:
    for role in ("decoder-2-1", "decoder-3", "prior-2-1"):
        result = CliRunner().invoke(app, ["verify", str(copy), "--checkpoint", str(checkpoints[role])])
        assert result.exit_code == 1
        family = "kandinsky-3" if role == "decoder-3" else "kandinsky-2-1"
        assert f"error: {checkpoints[role]} is a checkpoint of {family}; {copy} is of kandinsky-2-2" in result.stderr


def test_checkpoint_given_needs_pytorch(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = CliRunner().invoke(app, ["verify", str(copy), "--checkpoint", "prior"])
    assert result.exit_code == 1
    assert "pip install 'kandrt[export]'" in result.stderr


# What fails


@pytest.mark.parametrize("file", ["weights/movq.safetensors", "weights/statistics.safetensors", "prior_step.onnx"])
def test_flipped_byte_is_found_by_its_hash(copy: Path, file: str) -> None:
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / file).unlink()
    (copy / file).write_bytes(content)
    code, found = run(copy)
    assert code == 1
    assert [row["kind"] for row in found["rows"]] == ["files"]
    assert file in found["rows"][0]["detail"]
    assert found["not_verified"] == [{"what": "graphs and requests", "why": "files are damaged"}]


def test_wrong_weights_with_the_right_hash_are_found(copy: Path) -> None:
    weights = load_file(copy / "weights/movq.safetensors")
    name = next(name for name in weights if name.startswith("decoder") and name.endswith("conv_in.weight"))
    raw = bytearray((copy / "weights/movq.safetensors").read_bytes())
    place = raw.find(weights[name].tobytes())
    raw[place : place + weights[name].nbytes] = (-weights[name]).tobytes()
    path = copy / "weights/movq.safetensors"
    path.unlink()
    path.write_bytes(raw)
    fixed = dataclasses.replace(open_bundle(copy).manifest.weights["movq"], sha256=sha256_file(path))
    edit(copy, lambda manifest: dataclasses.replace(manifest, weights=manifest.weights | {"movq": fixed}))
    code, found = run(copy)
    assert code == 1
    assert failed(found) == {("graph", "movq_decoder"), ("request", "text-to-image"), ("request", "image-to-image")}


def test_graph_of_another_component_is_found(copy: Path) -> None:
    replace_graph(copy, "decoder_step", (copy / "inpaint_step.onnx").read_bytes())
    code, found = run(copy)
    assert code == 1
    assert failed(found) == {("graph", "decoder_step"), ("request", "text-to-image"), ("request", "image-to-image")}
    row = next(row for row in found["rows"] if row["what"] == "decoder_step")
    assert "concat_latents" in row["detail"]


def test_graph_with_the_same_inputs_that_computes_something_else_is_found(
    monkeypatch: pytest.MonkeyPatch, copy: Path
) -> None:
    model = onnx.load(copy / "movq_decoder.onnx", load_external_data=False)
    first, second = [
        tensor for tensor in model.graph.initializer if tensor.name.endswith("conv1.weight") and "mid" in tensor.name
    ][:2]
    assert list(first.dims) == list(second.dims)
    first.external_data[1].value, second.external_data[1].value = (
        second.external_data[1].value, first.external_data[1].value,
    )  # fmt: skip
    assert first.external_data[1].key == "offset"
    replace_graph(copy, "movq_decoder", model.SerializeToString())
    code, found = run(copy)
    assert code == 1
    assert ("graph", "movq_decoder") in failed(found)
    monkeypatch.setitem(sys.modules, "torch", None)  # and without PyTorch, by the stored pictures
    code, found = run(copy)
    assert code == 1
    assert ("request", "text-to-image") in failed(found)


@pytest.mark.parametrize("name", ["text-to-image", "prior"])
def test_altered_answer_is_found(copy: Path, answers: dict[str, NDArray[np.float32]], name: str) -> None:
    stored = reference.stored_name(name)
    altered = answers[stored].copy()
    altered.flat[7] += 0.01 * np.abs(altered).max()
    path = copy / "reference.safetensors"
    path.unlink()
    save_file(answers | {stored: altered}, path)
    edit(copy, lambda manifest: dataclasses.replace(manifest, reference=record(path)))
    code, found = run(copy)
    assert code == 1
    assert failed(found) == {("request", name)}


def test_damaged_answers_are_an_error(copy: Path) -> None:
    path = copy / "reference.safetensors"
    path.unlink()
    path.write_bytes(b"no tensors")
    edit_reference(copy, path)
    result = CliRunner().invoke(app, ["verify", str(copy)])
    assert result.exit_code == 1
    assert "reference.safetensors is damaged" in result.stderr


def edit_reference(folder: Path, path: Path) -> None:
    """Size and hash of other stored answers, by hand: the manifest cannot be opened beside a file of another size."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["reference"] |= {"size": path.stat().st_size, "sha256": sha256_file(path)}
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_backend_that_does_not_exist_is_an_error(copy: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(copy), "--backend", "abacus"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: backend: expected 'onnxruntime'")


# The requests


@pytest.mark.parametrize("family", ["bundle", "bundle_2_1", "bundle_3"])
def test_requests_run_every_component(family: str, request: pytest.FixtureRequest) -> None:
    bundle: Path = request.getfixturevalue(family)
    ran: set[str] = set()

    class Noted:
        def __init__(self, name: str, session: Session) -> None:
            self.name, self.session = name, session
            self.inputs, self.outputs = session.inputs, session.outputs

        def __call__(self, **arrays: Any) -> dict[str, Any]:
            ran.add(self.name)
            return self.session(**arrays)

        def close(self) -> None:
            self.session.close()

    sessions = {name: Noted(name, session) for name, session in torch_sessions(bundle).items()}
    made = reference.make_reference(bundle, sessions)
    manifest = open_bundle(bundle).manifest
    assert ran == set(manifest.components)
    assert list(made) == [reference.stored_name(name) for name in reference.request_names(manifest)]


def test_requests_repeat(bundle: Path, answers: dict[str, NDArray[np.float32]]) -> None:
    again = reference.make_reference(bundle, torch_sessions(bundle))
    assert all(np.array_equal(again[name], answers[name]) for name in answers)


def test_answers_are_pictures_that_are_not_square_and_pairs_of_embeddings(
    bundle: Path, answers: dict[str, NDArray[np.float32]]
) -> None:
    dim = open_bundle(bundle).manifest.decoders["decoder"].embedding_dim
    for name, array in answers.items():
        assert array.shape == ((2, dim) if name.startswith("prior") else (1, 64, 128, 3))
        assert array.std() > 0.01  # something is in it
    pictures = [array for name, array in answers.items() if not name.startswith("prior")]
    assert len({array.tobytes() for array in pictures}) == len(pictures)


def test_bundle_without_a_prior_is_asked_with_drawn_embeddings(copy: Path) -> None:
    edit(copy, lambda manifest: dataclasses.replace(manifest, prior=None, tokenizer=None, reference=None))
    names = ["text-to-image", "image-to-image"]
    assert reference.request_names(open_bundle(copy).manifest) == names
    with load(copy) as k:
        assert list(reference.requests(k)) == names
        assert reference.requests(k)["text-to-image"]().shape == (1, 64, 128, 3)


# The comparison


def test_pictures_are_held_to_the_largest_difference_in_fp32_and_to_psnr_below() -> None:
    picture = np.full((1, 8, 8, 3), 0.5, np.float32)
    for error, precision, passes in [
        (0.0009, "fp32", True), (0.0011, "fp32", False), (0.0177, "fp16", True), (0.0179, "fp16", False),
        (0.0561, "bf16", True), (0.0563, "bf16", False),
    ]:  # fmt: skip  # a constant error e has a PSNR of -20 log10(e): 35 dB at 0.01778, 25 dB at 0.05623
        row = reference.compared("x", picture, picture + np.float32(error), precision)  # type: ignore[arg-type]
        assert row.passed is passes
        assert row.psnr == pytest.approx(-20 * np.log10(error), abs=0.01)  # float32 rounds 0.5 + e
    row = reference.compared("x", picture, picture, "fp16")
    assert (row.passed, row.psnr, row.max_abs) == (True, None, 0.0)


def test_embeddings_are_held_to_their_relative_error() -> None:
    embeds = np.ones((2, 50), np.float32)
    for scale, passes in [(1 + 9e-5, True), (1 + 1.1e-4, False)]:
        row = reference.compared("x", embeds, embeds * np.float32(scale), "fp32")
        assert row.passed is passes
        assert row.relative == pytest.approx(scale - 1, rel=0.01)  # float32 keeps 7 digits of 1 + e


@pytest.mark.parametrize(
    "wrong", [np.full((1, 8, 8, 3), np.nan), np.zeros((1, 8, 9, 3)), np.full((1, 8, 8, 3), np.inf)]
)
def test_what_is_not_finite_or_of_another_shape_fails(wrong: NDArray[Any]) -> None:
    picture = np.full((1, 8, 8, 3), 0.5, np.float32)
    assert not reference.compared("x", picture, wrong.astype(np.float32), "fp16").passed
    assert not reference.compared("x", wrong.astype(np.float32), picture, "fp16").passed


def test_network_that_gives_nan_fails(bundle: Path, answers: dict[str, NDArray[np.float32]]) -> None:
    rows = [reference.compared(name, array, array * np.float32(np.nan), "fp32") for name, array in answers.items()]
    assert not any(row.passed for row in rows)
    assert all(row.detail for row in rows)
