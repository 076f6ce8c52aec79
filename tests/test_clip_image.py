"""The CLIP image encoder's input against transformers, and the settings of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kandrt.engines.errors import BundleError, InputError
from kandrt.runtime.clip_image import ImagePreprocess, clip_pixels

# float32 in another order of operations, on values of about 1 to 2
ROUNDING = 1e-6

LEGACY = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
SMALL: dict[str, Any] = {
    **LEGACY,
    "size": {"shortest_edge": 30},
    "crop_size": {"height": 29, "width": 41},
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "resample": 2,
}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise: neighbouring pixels differ in every channel, so that filters and rounding both show."""
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(levels).convert("RGB" if mode != "RGBA" else mode).convert(mode)


def clip_reference(config: dict[str, Any], source: Image.Image) -> Any:
    try:
        from transformers import CLIPImageProcessorPil as Processor
    except ImportError:  # transformers 4, whose plain processor is the PIL one
        from transformers import CLIPImageProcessor as Processor
    return np.asarray(Processor(**config)(source, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("config", [LEGACY, SMALL], ids=["legacy", "new"])
@pytest.mark.parametrize(
    "size",
    [(224, 224), (225, 224), (300, 451), (640, 333), (17, 9), (1, 1), (5, 60), (1001, 224), (223, 225), (31, 30)],
)
def test_clip_pixels_are_those_of_transformers(config: dict[str, Any], size: tuple[int, int]) -> None:
    source = picture(*size)
    found = clip_pixels(source, ImagePreprocess.from_config(config))
    wanted = clip_reference(config, source)
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_clip_pixels_of_other_modes(mode: str) -> None:
    source = picture(60, 50, mode)
    found = clip_pixels(source, ImagePreprocess.from_config(SMALL))
    np.testing.assert_allclose(found, clip_reference(SMALL, source), rtol=0, atol=ROUNDING)


def test_clip_pixels_lay_transparency_on_white(tmp_path: Path) -> None:
    source = picture(60, 50, "RGBA")
    flat = Image.new("RGBA", source.size, "white")
    flat.alpha_composite(source)
    wanted = clip_reference(SMALL, flat.convert("RGB"))
    source.save(tmp_path / "a.png")
    for given in (source, tmp_path / "a.png"):
        np.testing.assert_allclose(
            clip_pixels(given, ImagePreprocess.from_config(SMALL)), wanted, rtol=0, atol=ROUNDING
        )
    assert not np.allclose(clip_reference(SMALL, source.convert("RGB")), wanted)


def test_clip_pixels_refuse_a_strip_that_would_grow_without_bound() -> None:
    with pytest.raises(InputError, match="resized for the image encoder"):
        clip_pixels(Image.new("RGB", (100_000, 1)), ImagePreprocess())


def test_preprocess_defaults_and_round_trip() -> None:
    assert ImagePreprocess.from_config(LEGACY) == ImagePreprocess.from_config({}) == ImagePreprocess()
    small = ImagePreprocess.from_config(SMALL)
    assert small == ImagePreprocess(30, (29, 41), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 2)
    assert ImagePreprocess.from_json(json.loads(json.dumps(small.to_json()))) == small


def test_preprocess_as_transformers_saves_it() -> None:
    from transformers import CLIPImageProcessor

    assert ImagePreprocess.from_config(CLIPImageProcessor(**SMALL).to_dict()) == ImagePreprocess.from_config(SMALL)


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"height": 224, "width": 224}},
        {"size": 0},
        {"size": True},
        {"size": "224"},
        {"size": [224, 224]},
        {"crop_size": {"height": 224}},
        {"crop_size": {"height": 224, "width": -1}},
        {"crop_size": 2.5},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": 0.5},
        {"image_mean": [0.5, 0.5, float("nan")]},
        {"image_std": [0.5, 0.5, 0]},
        {"image_std": ["a", 1, 1]},
        {"resample": 9},
        {"resample": "bicubic"},
        {"resample": [3]},
        {"do_resize": False},
        {"do_normalize": False},
        {"do_center_crop": False},
        {"do_rescale": False},
        {"rescale_factor": 1.0},
        {"do_pad": True},
    ],
)
def test_unsupported_preprocessing_is_named(config: dict[str, Any]) -> None:
    (key,) = config
    with pytest.raises(BundleError, match=f"^image preprocessing: {key} = [^;]*, (expected|only)[^;]*$"):
        ImagePreprocess.from_config({**LEGACY, **config})


def test_all_preprocessing_problems_are_listed() -> None:
    with pytest.raises(BundleError, match=r"do_resize = False, .*; size = 'x', .*; resample = -1, "):
        ImagePreprocess.from_config({"do_resize": False, "size": "x", "resample": -1})
    with pytest.raises(BundleError, match="expected an object"):
        ImagePreprocess.from_json([1])
