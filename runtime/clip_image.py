"""A picture as the CLIP image encoder takes it, and the settings in a checkpoint's `preprocessor_config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..engines.errors import BundleError
from .images import Float32, ImageLike, channels_first, check_size, decode, open_image


@dataclass(frozen=True)
class ImagePreprocess:
    """How a picture becomes the CLIP image encoder's input; the defaults are every Kandinsky checkpoint's.

    The shorter side is resized to `size` pixels, the centre [crop_size] = (height, width) cut out (zeros around a
    smaller picture), values brought to [0, 1], then `mean` subtracted and the result divided by `std`, by channel.
    `resample` numbers a filter as `PIL.Image.Resampling` does.
    """

    size: int = 224
    crop_size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resample: int = int(Image.Resampling.BICUBIC)

    @classmethod
    def from_config(cls, config: Any) -> ImagePreprocess:
        """Read a `preprocessor_config.json`: sizes as numbers (old) or objects (new); a missing key is CLIP's default.

        Raises BundleError that lists every setting which is malformed or not supported.
        """
        if not isinstance(config, Mapping):
            raise BundleError(f"image preprocessing: expected an object of settings, found {config!r}")
        problems = [
            f"{key} = {config[key]!r}, only {wanted!r} is supported"
            for key, wanted in _FIXED.items()
            if key in config and config[key] is not None and config[key] != wanted
        ]
        values: dict[str, Any] = {}
        for key, (field, read) in _SETTINGS.items():
            if config.get(key) is None:
                continue
            try:
                values[field] = read(config[key])
            except ValueError as error:
                problems.append(f"{key} = {config[key]!r}, expected {error}")
        if problems:
            raise BundleError("image preprocessing: " + "; ".join(problems))
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """In the new form of `preprocessor_config.json`."""
        height, width = self.crop_size
        return {
            "size": {"shortest_edge": self.size},
            "crop_size": {"height": height, "width": width},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": self.resample,
        }

    @classmethod
    def from_json(cls, data: Any) -> ImagePreprocess:
        """What `to_json` wrote, or any `preprocessor_config.json`; raises BundleError as `from_config`."""
        return cls.from_config(data)


def clip_pixels(image: ImageLike, preprocess: ImagePreprocess) -> Float32:
    """`image` for the CLIP image encoder: float32 [1, 3, *preprocess.crop_size].

    As transformers' CLIPImageProcessorPil (5.23): a picture with transparency is laid on white first. Raises
    InputError as `open_image`.
    """
    opened = decode(image, "image")
    if "A" in opened.getbands() or "transparency" in opened.info:
        opened = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened)
    opened = open_image(opened)

    # The longer side is truncated, and an odd margin's extra pixel goes as in transformers' center_crop.
    short = min(opened.size)
    width, height = (int(preprocess.size * side / short) for side in opened.size)
    check_size("image, its shorter side resized for the image encoder", width, height)
    pixels = np.asarray(opened.resize((width, height), Image.Resampling(preprocess.resample)))
    pixels = _center_crop(pixels, *preprocess.crop_size)

    unit = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(preprocess.mean, np.float32), np.array(preprocess.std, np.float32)
    return channels_first((unit - mean) / std)


# Details


def _center_crop(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """The centre [height, width, 3] of `pixels`, in zeros where they are smaller (transformers' center_crop)."""
    cut = np.zeros((height, width, 3), pixels.dtype)
    source, target = [], []
    for found, wanted in zip(pixels.shape[:2], (height, width), strict=True):
        if found >= wanted:
            start = (found - wanted) // 2
            source.append(slice(start, start + wanted))
            target.append(slice(None))
        else:
            start = (wanted - found + 1) // 2
            source.append(slice(None))
            target.append(slice(start, start + found))
    cut[tuple(target)] = pixels[tuple(source)]
    return cut


def _side_lengths(value: Any, *keys: str) -> tuple[int, ...]:
    """Pixels, one for each key: from an object of exactly these keys, or one number for all (the old form)."""
    if isinstance(value, Mapping):
        sides = [value[key] for key in keys] if set(value) == set(keys) else []
    else:
        sides = [value] * len(keys)
    if len(sides) != len(keys) or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"a number of pixels or an object of {' and '.join(keys)}")
    return tuple(sides)


def _three_numbers(value: Any, above: float = -np.inf) -> tuple[float, ...]:
    numbers = value if isinstance(value, (list, tuple)) else []
    if len(numbers) != 3 or not all(type(item) in (int, float) and above < item < np.inf for item in numbers):
        raise ValueError("three numbers" + (" greater than 0" if above == 0 else ""))
    return tuple(float(item) for item in numbers)


def _filter(value: Any) -> int:
    if type(value) is not int or value not in [int(kind) for kind in Image.Resampling]:
        raise ValueError("the number of a PIL resampling filter, 0 to 5")
    return value


# What transformers' CLIPImageProcessor can be told and this module always does.
_FIXED = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "do_pad": False,
}

# Key in preprocessor_config.json: field of ImagePreprocess, and what reads its value or raises ValueError.
_SETTINGS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "size": ("size", lambda value: _side_lengths(value, "shortest_edge")[0]),
    "crop_size": ("crop_size", lambda value: _side_lengths(value, "height", "width")),
    "image_mean": ("mean", _three_numbers),
    "image_std": ("std", lambda value: _three_numbers(value, above=0)),
    "resample": ("resample", _filter),
}
