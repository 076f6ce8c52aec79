"""Profiles: what is asked for in pictures, as the axes of every graph; and that they hold all that the runtime asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import InputError
from kandrt.engines.profiles import (
    MAX_BATCH,
    MAX_SIDE,
    USUAL_BATCH,
    USUAL_SIZE,
    Coverage,
    Extent,
    Profile,
    axis_lengths,
    check_coverage,
    component_profiles,
    default_size,
    extent_text,
    parse_extent,
    repeated_components,
)
from kandrt.engines.spec import TensorSpec, check_arrays
from kandrt.runtime import Embeds, load

from .toy_bundle import change_component, make_toy_bundle


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


# Extents


@pytest.mark.parametrize(
    ("text", "extent"), [("512:768:1024", (512, 768, 1024)), ("1", (1, 1, 1)), ("1:1:4", (1, 1, 4))]
)
def test_extents_are_read_as_they_are_written(text: str, extent: Extent) -> None:
    assert parse_extent(text, "--size") == extent
    assert extent_text(extent) == text
    assert parse_extent(extent_text(extent), "") == extent


@pytest.mark.parametrize(
    "text", ["", "1:2", "1:2:3:4", "a", "-1", "1:2:b", " 1", "1.5", "²", "٣", "1:2:", "9999999999", "0x10", "1_0"]
)
def test_what_is_no_extent(text: str) -> None:
    with pytest.raises(InputError, match=r"^--batch: expected MIN:OPT:MAX or one whole number, found"):
        parse_extent(text, "--batch")


@pytest.mark.parametrize("text", ["0", "0:1:1", "2:1:3", "1:3:2", "3:2:1"])
def test_extents_out_of_order(text: str) -> None:
    with pytest.raises(InputError, match=f"^--size: expected 1 <= MIN <= OPT <= MAX, found {text}$"):
        parse_extent(text, "--size")


# What a bundle can take


@pytest.mark.parametrize(
    ("trained", "multiple", "expected"),
    [
        (512, 64, USUAL_SIZE),
        (768, 64, USUAL_SIZE),
        (1024, 64, USUAL_SIZE),
        (128, 64, (64, 128, 256)),
        (64, 64, (64, 64, 128)),
        (192, 64, (64, 192, 384)),
    ],
)
def test_the_usual_size_fits_the_model(trained: int, multiple: int, expected: Extent, tmp_path: Path) -> None:
    manifest = make_toy_bundle(tmp_path / "bundle", default_size=trained, size_multiple=multiple).manifest
    assert default_size(manifest) == expected
    check_coverage(manifest, [Coverage(expected)])
    assert expected[0] <= trained <= expected[2]


@pytest.mark.parametrize("size", [(512, 768, 1000), (500, 768, 1024), (512, 700, 1024), (64, 64, MAX_SIDE + 64)])
def test_sizes_that_no_decoder_takes(toy: Bundle, size: Extent) -> None:
    found = extent_text(size)
    with pytest.raises(InputError, match=f"^--size {found}: expected multiples of 64 up to {MAX_SIDE} pixels"):
        check_coverage(toy.manifest, [Coverage(USUAL_SIZE), Coverage(size)])
    check_coverage(toy.manifest, [Coverage((64, 64, MAX_SIDE))])


def test_batches_that_are_too_large(toy: Bundle) -> None:
    with pytest.raises(InputError, match=f"^--batch 1:2:{MAX_BATCH + 1}: expected at most {MAX_BATCH} pictures"):
        check_coverage(toy.manifest, [Coverage(USUAL_SIZE, (1, 2, MAX_BATCH + 1))])


def test_an_axis_that_nobody_knows(tmp_path: Path) -> None:
    odd = TensorSpec("x", "float32", ("batch", "depth"))
    manifest = change_component(make_toy_bundle(tmp_path / "bundle"), "decoder_step", inputs=(odd,)).manifest
    with pytest.raises(InputError, match=r"^decoder_step: no profile can be made for its axes depth; export it again"):
        component_profiles(manifest, "decoder_step", [Coverage(USUAL_SIZE)])


def test_a_graph_without_dynamic_axes_needs_no_profile(tmp_path: Path) -> None:
    fixed = TensorSpec("x", "float32", (1, 8))
    manifest = change_component(make_toy_bundle(tmp_path / "bundle"), "decoder_context", inputs=(fixed,)).manifest
    assert component_profiles(manifest, "decoder_context", [Coverage(USUAL_SIZE)]) == ()


# Profiles


def test_shapes_of_a_profile() -> None:
    profile = Profile({"batch": (1, 2, 8), "height": (64, 96, 128), "width": (64, 96, 128)})
    spec = TensorSpec("sample", "float32", ("batch", 4, "height", "width"))
    assert profile.shapes(spec) == ((1, 4, 64, 64), (2, 4, 96, 96), (8, 4, 128, 128))
    assert str(profile) == "batch 1:2:8, height 64:96:128, width 64:96:128"
    assert profile.holds({"batch": 8, "height": 64, "width": 128, "another": 10**6})
    assert not profile.holds({"batch": 9, "height": 64, "width": 128})
    assert not profile.holds({"batch": 1, "height": 63, "width": 128})
    assert not profile.static
    assert Profile({"batch": (2, 2, 2)}).static


def test_pixels_become_cells_where_a_graph_has_cells(toy: Bundle) -> None:
    (step,) = component_profiles(toy.manifest, "decoder_step", [Coverage(USUAL_SIZE)])
    assert step.axes == {"batch": (1, 2, 8), "height": (64, 96, 128), "width": (64, 96, 128)}
    (encoder,) = component_profiles(toy.manifest, "movq_encoder", [Coverage(USUAL_SIZE)])
    assert encoder.axes == {"batch": (1, 1, 1), "image_height": USUAL_SIZE, "image_width": USUAL_SIZE}


def test_each_profile_is_there_once(toy: Bundle) -> None:
    wanted = [Coverage((512, 512, 512)), Coverage((1024, 1024, 1024)), Coverage((512, 512, 512))]
    assert len(component_profiles(toy.manifest, "decoder_step", wanted)) == 2
    assert len(component_profiles(toy.manifest, "decoder_context", wanted)) == 1, "it sees no size"
    wanted = [replace(coverage, batch=(1, 1, i + 1)) for i, coverage in enumerate(wanted)]
    assert len(component_profiles(toy.manifest, "decoder_context", wanted)) == 3
    assert len(component_profiles(toy.manifest, "movq_decoder", wanted)) == 2, "it sees no batch"


def test_static_profiles_fix_what_runs_often(fp16_bundle: Path) -> None:
    manifest = open_bundle(fp16_bundle).manifest
    wanted = [Coverage((512, 768, 1024), (1, 2, 4), static=True)]
    often = repeated_components(manifest)
    assert often == {"prior_step", "decoder_step", "movq_decoder"}
    for name in manifest.components:
        profiles = component_profiles(manifest, name, wanted)
        assert all(profile.static for profile in profiles) == (name in often or name == "image_encoder"), name
    batches = [profile.axes["batch"][0] for profile in component_profiles(manifest, "prior_step", wanted)]
    assert batches == [4, 8], "guidance, and guidance with a negative prompt"
    (step,) = component_profiles(manifest, "decoder_step", wanted)
    assert step.axes == {"batch": (4, 4, 4), "height": (96, 96, 96), "width": (96, 96, 96)}


# What the runtime asks for


class Recorder:
    """A component that gives zeros and remembers the lengths of its axes."""

    def __init__(self, name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.calls: list[dict[str, int]] = []

    def __call__(self, **arrays: Any) -> dict[str, Any]:
        axes = check_arrays(self.name, self.inputs, arrays)
        self.calls.append(dict(axes))
        for cells, pixels in (("height", "image_height"), ("width", "image_width")):
            if cells in axes:
                axes[pixels] = 8 * axes[cells]
            elif pixels in axes:
                axes[cells] = axes[pixels] // 8
        shapes = {
            spec.name: [axes[axis] if isinstance(axis, str) else axis for axis in spec.shape] for spec in self.outputs
        }
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}

    def close(self) -> None:
        pass


def requests(k: Any, count: int) -> Iterator[Any]:
    """Requests for up to `count` pictures, in every mode: at the least and the greatest size and number of steps."""
    common: dict[str, Any] = {"steps": 2, "seed": 0}
    picture = Image.new("RGB", (600, 520))
    for scale in (1.0, 4.0):
        for negative in (None, "blurry"):
            yield k.prior("a robot", negative_prompt=negative, guidance_scale=scale, count=count, **common)
            yield k.prior(["a robot"] * count, negative_prompt=negative, guidance_scale=scale, **common)
        yield k.prior("a robot", image=picture, strength=0.5, guidance_scale=scale, count=count, **common)
    yield k.prior.interpolate(["a robot", picture, "a cat"], [0.3, 0.3, 0.4], count=count, **common)
    embeds = Embeds(np.zeros((count, 32), np.float32), np.zeros((count, 32), np.float32))
    for scale in (1.0, 4.0):
        for height, width in ((512, 512), (1024, 512), (1024, 1024)):
            yield k.decoder(embeds, height=height, width=width, guidance_scale=scale, **common)
        yield k.decoder(embeds, image=picture, strength=0.5, height=512, width=640, guidance_scale=scale, **common)
    yield k.prior("a robot", steps=1000, seed=0)
    yield k.decoder(embeds, height=512, width=512, steps=999, seed=0)


def test_engines_for_several_pictures_take_one_text(fp16_bundle: Path) -> None:
    manifest = open_bundle(fp16_bundle).manifest
    parts: Mapping[str, Recorder] = {
        name: Recorder(name, each.inputs, each.outputs) for name, each in manifest.components.items()
    }
    with load(fp16_bundle, sessions=dict(parts)) as k:
        for _ in range(2):  # the second request has the empty text's context already
            k("a robot", count=4, height=512, width=512, steps=1, prior_steps=1, seed=1)
    for name, part in parts.items():
        (profile,) = component_profiles(manifest, name, [Coverage(USUAL_SIZE, (4, 4, 4))]) or (Profile({}),)
        assert all(profile.holds(call) for call in part.calls), f"{name}: {part.calls} are outside of {profile}"
    assert len(parts["text_encoder"].calls) == 2


@pytest.mark.parametrize("count", [1, 4])
def test_the_usual_profiles_hold_all_that_the_runtime_asks_for(fp16_bundle: Path, count: int) -> None:
    manifest = open_bundle(fp16_bundle).manifest
    parts: Mapping[str, Recorder] = {
        name: Recorder(name, each.inputs, each.outputs) for name, each in manifest.components.items()
    }
    with load(fp16_bundle, sessions=dict(parts)) as k:
        for _ in requests(k, count):
            pass
    for name, part in parts.items():
        (axes,) = axis_lengths(manifest, name, Coverage(USUAL_SIZE, USUAL_BATCH))
        profile = Profile(axes)
        assert part.calls, f"{name} never ran"
        outside = [call for call in part.calls if not profile.holds(call)]
        assert not outside, f"{name}: {outside[0]} is outside of {profile}"
        assert component_profiles(manifest, name, [Coverage(USUAL_SIZE)])[0].axes.items() <= axes.items()
