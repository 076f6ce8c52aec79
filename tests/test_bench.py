"""What `kandrt bench` measures: cases, their inputs, contenders, comparison, the machine, what a case costs."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from kandrt.engines import manifest as manifests
from kandrt.engines.bundle import open_bundle
from kandrt.engines.errors import InputError
from kandrt.engines.manifest import Manifest
from kandrt.runtime.miniature import MINIATURE
from kandrt.scripts.bench import contenders as known
from kandrt.scripts.bench.case_costs import case_costs, graph_runs
from kandrt.scripts.bench.cases import (
    CASES,
    SeededNoise,
    components_of,
    default_cases,
    make_case,
    make_inputs,
    possible_cases,
)
from kandrt.scripts.bench.contenders import CONTENDERS, chosen, most_exact, unable, unable_in
from kandrt.scripts.bench.equivalence import BOUNDS, compare, exactness
from kandrt.scripts.bench.machine import cpu_name, inspect_machine
from kandrt.scripts.bench.peaks import convolution, matrix_product, measured_peaks, open_model, whole_convolution
from kandrt.scripts.bench.sources import Source, find_sources

PARTS = {"prior": "prior", "decoder": "decoder", "controlnet": "controlnet"}


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return open_bundle(MINIATURE).manifest


# Cases


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("step", (1, 128, 128)),
        ("step@64", (1, 64, 64)),
        ("step@64x192", (1, 64, 192)),
        ("step*4", (4, 128, 128)),
        ("text-to-image@64*2", (2, 64, 64)),
    ],
)
def test_a_case_is_named_with_its_sizes(manifest: Manifest, name: str, sizes: tuple[int, int, int]) -> None:
    case = make_case(name, manifest)
    assert (case.batch, case.height, case.width) == sizes
    assert case.name == name
    assert len(case.prompts) == len(set(case.prompts)) == case.batch


def test_sizes_in_the_name_go_before_others(manifest: Manifest) -> None:
    case = make_case("step@64*2", manifest, size=(192, 128), batch=3)
    assert (case.batch, case.height, case.width) == (2, 64, 64)
    case = make_case("step", manifest, size=(192, 128), batch=3)
    assert (case.batch, case.height, case.width) == (3, 192, 128)


@pytest.mark.parametrize("name", ["steps", "step@", "step@100", "step*0", "step@0", "", "step*2@64"])
def test_a_case_that_cannot_be_is_refused(manifest: Manifest, name: str) -> None:
    with pytest.raises(InputError, match="case"):
        make_case(name, manifest)


def test_a_bundle_is_asked_only_what_it_can(manifest: Manifest) -> None:
    assert possible_cases(manifest) == list(CASES)
    decoder = replace(manifest, prior=None, decoders={"decoder": manifest.decoders["decoder"]})
    assert possible_cases(decoder) == ["step", "movq", "embedding-to-image", "image-to-image", "cold-start"]
    with pytest.raises(InputError, match="no prior"):
        make_case("text-to-image", decoder)
    reads_text = replace(manifest.decoders["decoder"], embedding_dim=None)
    with pytest.raises(InputError, match="its decoder takes no image embedding"):
        make_case("embedding-to-image", replace(decoder, decoders={"decoder": reads_text}))


def test_by_default_the_longest_case_is_last_and_movq_has_two_sizes(manifest: Manifest) -> None:
    names = default_cases(manifest)
    assert names[-1] == "text-to-image"
    assert names[names.index("movq") + 1] == "movq@192"  # 1.5 times 128
    assert "movq@192x384" in default_cases(manifest, (128, 256))
    for name in names:
        make_case(name, manifest)
    assert default_cases(replace(manifest, prior=None)) == ["step", "movq", "movq@192", "cold-start"]


@pytest.mark.parametrize("bundle_name", ["miniature", "bundle_2_1", "bundle_3"])
def test_inputs_are_the_same_every_time_and_fit_the_graphs(bundle_name: str, request: pytest.FixtureRequest) -> None:
    found = open_bundle(MINIATURE if bundle_name == "miniature" else request.getfixturevalue(bundle_name)).manifest
    for name in possible_cases(found):
        case = make_case(f"{name}*2", found, size=(64, 128))
        first, second = make_inputs(case, found), make_inputs(case, found)
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[key], second[key]) for key in first)
        assert set(components_of(case, found)) <= found.components.keys()
        if case.stage == "step":
            wanted = {spec.name: spec.shape for spec in found.components[found.decoders["decoder"].context].inputs}
            given = {key.removeprefix("context."): array.shape for key, array in first.items() if key != "sample"}
            assert given.keys() == wanted.keys()
            assert all(len(given[key]) == len(wanted[key]) for key in wanted)
            assert first["sample"].shape == (2, 4, 8, 16)


def test_noise_starts_anew_with_each_run() -> None:
    shapes = [(2, 3), (1, 4, 8, 8), (5,)]
    one, other = SeededNoise(7), SeededNoise(7)
    assert all(np.array_equal(one(shape), other(shape)) for shape in shapes)
    assert not np.array_equal(SeededNoise(8)((9,)), SeededNoise(7)((9,)))


# Contenders


def test_checkpoints_are_found_by_what_they_hold(checkpoints: dict[str, Path], manifest: Manifest) -> None:
    found = find_sources(manifest, [str(checkpoints[role]) for role in PARTS])
    assert found == {part: Source(str(checkpoints[role])) for role, part in PARTS.items()}


def test_the_unet_tells_what_a_decoder_is_for(checkpoints: dict[str, Path], manifest: Manifest) -> None:
    """2.1's inpainting checkpoint has the class of its other decoder; in a bundle the order of checkpoints tells."""
    folders = {"prior": "prior-2-1", "decoder": "decoder-2-1", "inpaint": "inpaint-2-1"}
    expected = {part: Source(str(checkpoints[role])) for part, role in folders.items()}
    assert find_sources(manifest, [source.folder for source in expected.values()]) == expected
    kinds = ("KandinskyPriorPipeline", "KandinskyPipeline", "KandinskyPipeline")
    sources = (manifests.Source(each.folder, kind) for each, kind in zip(expected.values(), kinds, strict=True))
    decoders = dict.fromkeys(("decoder", "inpaint"), manifest.decoders["decoder"])
    made = replace(manifest, family="kandinsky-2-1", sources=tuple(sources), decoders=decoders)
    assert find_sources(made, []) == expected


def test_a_folder_of_checkpoints_will_do(checkpoints: dict[str, Path], manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(checkpoints["decoder"])
    (tmp_path / "other").mkdir()
    assert find_sources(manifest, [str(tmp_path)]) == {"decoder": Source(str(tmp_path / "a"))}
    with pytest.raises(InputError, match="model_index"):
        find_sources(manifest, [str(tmp_path / "other")])


def test_a_checkpoint_of_two_stages_holds_both(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyV22CombinedPipeline"}')
    (tmp_path / "unet" / "config.json").write_text('{"in_channels": 4, "addition_embed_type": "image"}')
    source = Source(str(tmp_path), combined="KandinskyV22CombinedPipeline")
    assert find_sources(manifest, [str(tmp_path)]) == {"prior": source, "decoder": source}
    made = replace(
        manifest,
        sources=(manifests.Source(str(tmp_path), "KandinskyV22CombinedPipeline"),),
        decoders={"decoder": manifest.decoders["decoder"]},
    )
    assert find_sources(made, []) == {"prior": source, "decoder": source}


def test_all_are_all_but_the_baseline() -> None:
    assert [each.name for each in chosen(["all"])] == [name for name in CONTENDERS if name != "kandrt"]
    assert [each.name for each in chosen(["kandrt", "diffusers"], "diffusers")] == ["kandrt"]
    with pytest.raises(InputError, match="nobody"):
        chosen([], "nobody")


def test_who_cannot_run_says_why(manifest: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = {"decoder": Source("x")}
    eager, bf16 = CONTENDERS["diffusers"], CONTENDERS["diffusers-bf16"]
    assert "--checkpoint" in (unable(eager, manifest, {}) or "")
    assert unable(eager, manifest, sources) is None
    assert "no-such-module" in (unable(replace(eager, needs=("no-such-module",)), manifest, sources) or "")
    assert unable(replace(eager, needs=("no-such-module",)), manifest, sources, other_python=True) is None
    (tmp_path / "cpuinfo").write_text("flags : fpu avx2\n")
    monkeypatch.setattr(known, "CPU_INFO", tmp_path / "cpuinfo")
    assert "bf16" in (unable(bf16, manifest, sources) or "")
    (tmp_path / "cpuinfo").write_text("flags : fpu avx512_bf16\n")
    assert unable(bf16, manifest, sources) is None
    assert "prior" in (unable_in(eager, make_case("text-to-image", manifest), manifest, sources) or "")
    assert unable_in(eager, make_case("step", manifest), manifest, sources) is None
    cuda, int8 = CONTENDERS["diffusers-cuda-fp16"], CONTENDERS["kandrt-int8"]
    monkeypatch.setattr(known, "has_driver", lambda: False)
    assert "GPU" in (unable(cuda, manifest, sources) or "")
    monkeypatch.setattr(known, "has_driver", lambda: True)
    assert unable(cuda, manifest, sources) is None
    assert "--quantized" in (unable(int8, manifest, sources) or "")
    assert unable(int8, manifest, sources, quantized=True) is None
    assert "movq and step" in (unable_in(CONTENDERS["onnx-plain"], make_case("prior", manifest), manifest, {}) or "")


# Comparison


def test_equal_results_pass_and_different_ones_do_not() -> None:
    picture = np.random.default_rng(0).random((1, 8, 8, 3), np.float32)
    assert compare({"picture": picture}, {"picture": picture}, BOUNDS["fp32"], "a").found is None
    near = compare({"picture": picture}, {"picture": picture + np.float32(1e-2)}, BOUNDS["fp32"], "a")
    assert near.found == pytest.approx(40, abs=1e-3)  # -20 log10(0.01), in float32
    assert (near.passed, near.to) == (False, "a")
    for bounds in BOUNDS["16 bits"], BOUNDS["int8"]:
        assert compare({"picture": picture}, {"picture": picture + np.float32(1e-2)}, bounds, "a").passed


def test_the_worst_array_counts() -> None:
    one = {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}
    found = compare(one, {**one, "b": 1.5 * one["b"]}, BOUNDS["16 bits"], "a")
    assert (found.what, found.found, found.passed) == ("relative error", pytest.approx(0.5), False)
    assert not compare(one, {"a": one["a"]}, BOUNDS["fp32"], "a").passed
    assert not compare(one, {**one, "b": np.ones((4, 1), np.float32)}, BOUNDS["fp32"], "a").passed


def test_bounds_are_those_of_the_less_exact(manifest: Manifest) -> None:
    assert exactness("fp32", "fp32") == "fp32"
    assert exactness("fp32", "bf16") == exactness("fp16", "fp16") == "16 bits"
    assert exactness("int8", "bf16") == "int8"
    half = replace(manifest, precision="fp16")
    assert CONTENDERS["kandrt"].arithmetic(half) == "fp16"
    assert CONTENDERS["kandrt-openvino-int8"].arithmetic(manifest) == "int8"
    assert CONTENDERS["kandrt-openvino-int8"].computes_in(manifest) == "bf16"


@pytest.mark.parametrize(
    ("names", "baseline", "precision", "exact"),
    [
        (["kandrt", "diffusers", "kandrt-int8"], "kandrt", "fp32", "kandrt"),
        (["diffusers-bf16", "diffusers", "kandrt"], "diffusers", "fp32", "diffusers"),
        (["diffusers-bf16", "diffusers", "kandrt"], "diffusers-bf16", "fp32", "kandrt"),
        (["kandrt", "diffusers"], "kandrt", "fp16", "diffusers"),
        (["kandrt", "diffusers-bf16"], "diffusers-bf16", "fp16", "diffusers-bf16"),
    ],
)
def test_results_are_compared_with_the_most_exact(
    manifest: Manifest, names: list[str], baseline: str, precision: manifests.Precision, exact: str
) -> None:
    assert most_exact(names, replace(manifest, precision=precision), baseline) == exact


# The machine


def test_models_written_by_hand_compute_what_they_say() -> None:
    draw = np.random.default_rng(0).standard_normal
    weight, x = draw((8, 8), np.float32), draw((8, 8), np.float32)
    (y,) = open_model(matrix_product(weight), 1).run(None, {"x": x})
    np.testing.assert_allclose(y, x @ weight, rtol=1e-5, atol=1e-5)  # sums of 8 products in another order
    kernel, x = draw((16, 16, 3, 3), np.float32), draw((2, 16, 5, 6), np.float32)
    (y,) = open_model(convolution(kernel), 1).run(None, {"x": x})
    expected = torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(kernel), padding=1).numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)  # of 144 products
    whole = np.rint(127 + 40 * x).clip(0, 255).astype(np.uint8)
    (y,) = open_model(whole_convolution(kernel), 1).run(None, {"x": whole})
    x = (whole.astype(np.float32) - 128) / 40
    expected = torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(kernel), padding=1).numpy()
    assert np.abs(y.astype(np.float32) - 128 - expected).max() <= 1.5  # results are rounded to whole numbers


def test_the_machine_is_described() -> None:
    machine = inspect_machine(1, peaks=False)
    assert machine.cores >= 1
    assert machine.cpu == cpu_name() != ""
    assert machine.libraries["torch"] == torch.__version__
    assert machine.peaks == {}
    peaks = measured_peaks(1, 16, [(16, 4)], bf16=True)
    names = ["gemm 16 fp32", "conv3x3 16@4 fp32", "conv3x3 16@4 bf16", "conv3x3 16@4 int8"]
    assert list(peaks) == [name for name in names if "bf16" not in name or find_spec("openvino")]
    assert all(value > 0 for value in peaks.values())


# What a case costs


def test_a_picture_costs_what_its_parts_do(manifest: Manifest) -> None:
    bundle = open_bundle(MINIATURE)

    def flops(name: str, **sizes: int) -> int:
        costs = case_costs(bundle, make_case(name, manifest, **sizes))  # type: ignore[arg-type]
        assert costs is not None
        return costs.flops

    whole = flops("text-to-image", steps=7, prior_steps=3)
    context = whole - flops("prior", prior_steps=3) - flops("movq") - 7 * flops("step")
    assert 0 < context < flops("step")
    assert flops("prior") < flops("prior-first")
    assert case_costs(bundle, make_case("load", manifest)) is None


def test_image_to_image_takes_a_share_of_the_steps(manifest: Manifest) -> None:
    runs = graph_runs(open_bundle(MINIATURE), make_case("image-to-image", manifest, steps=10))
    assert {each.component: each.runs for each in runs}["decoder_step"] == 3  # strength 0.3
