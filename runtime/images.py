"""Pictures in and out: files, PIL images and arrays to what the networks take, and back.

Every input is checked by its header before it is decoded and turned upright by its EXIF orientation; PIL's own
settings are left alone. An alpha channel is dropped, as `diffusers.utils.load_image` does, except for the CLIP image
encoder, whose processor lays the picture on white.

Arrays are [H, W] or [H, W, C]; 8-bit ones are 0 to 255, floating ones 0 to 1.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ..engines.errors import InputError, NumericalError, OutputError

ImageLike: TypeAlias = "Image.Image | NDArray[Any] | str | os.PathLike[str]"
Float32: TypeAlias = "NDArray[np.float32]"

MAX_PIXELS = 64_000_000
"""The largest input picture, in pixels (192 MB once it is decoded to RGB)."""

MAX_SIDE = 4096
"""The longest side of a generated picture, in pixels."""

# Not PIL's whole list: its EPS reader, for one, runs Ghostscript on the file.
READABLE = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "JPEG2000", "PPM", "QOI", "TGA", "ICO")

_WRITABLE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}

_EXIF_ORIENTATION = 0x0112
_EXIF_DESCRIPTION = 0x010E
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Reading


def open_image(source: ImageLike, name: str = "image") -> Image.Image:
    """An upright RGB copy of `source`.

    `source`: a path; a PIL image of any mode; or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], uint8, bool or
    floating in [0, 1] (rounded to 8 bits). Of animations, the frame the file opens at. Alpha is dropped; 16-bit
    greyscale is scaled to 8 bits where PIL would clip or truncate it; a 32-bit integer picture is read as 8 bits when
    nothing in it exceeds 255 and as 16 bits otherwise, a floating one likewise as 0 to 1 or 0 to 255.

    Raises InputError, which begins with `name` and the file, for what is missing, not a picture, damaged, cut short,
    empty or over MAX_PIXELS.
    """
    image = decode(source, name)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB gives the same colours and a warning
    elif image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    return image.convert("RGB")


def image_pixels(image: ImageLike, height: int, width: int) -> Float32:
    """`image` for the MoVQ encoder, resized: float32 [1, 3, height, width] in [-1, 1].

    Bicubic with reducing_gap=1, as diffusers' KandinskyV22Img2ImgPipeline and KandinskyV22InpaintPipeline (0.42.1),
    but height is height: there, the image-to-image pipelines swap the two. A floating [H, W, 3] array that has the
    size already is not rounded to 8 bits on the way. Raises InputError as `open_image`.
    """
    if isinstance(image, np.ndarray) and image.shape == (height, width, 3) and image.dtype.kind == "f":
        return channels_first(unit_range(image, "image") * np.float32(2) - np.float32(1))
    resized = open_image(image).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=1)
    return channels_first(np.asarray(resized, np.float32) / np.float32(127.5) - np.float32(1))


# Writing


def to_array(pixels: NDArray[Any]) -> Float32:
    """A decoder's output [B, 3, H, W], about [-1, 1], to pictures: float32 [B, H, W, 3] clamped to [0, 1].

    Raises NumericalError where a value is NaN or infinite: as a colour it would pass unnoticed.
    """
    values = np.asarray(pixels, np.float32)
    wrong = int(np.count_nonzero(~np.isfinite(values)))
    if wrong:
        raise NumericalError(f"decoded picture: {wrong} of {values.size} values are NaN or infinite")
    unit = np.clip(values * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray(unit.transpose(0, 2, 3, 1))


def to_pil(array: Float32) -> list[Image.Image]:
    """Float32 [B, H, W, 3] in [0, 1] to B RGB images, rounded half to even as diffusers' VaeImageProcessor."""
    return [Image.fromarray(picture) for picture in np.round(array * 255).astype(np.uint8)]


def picture_size(height: int, width: int, multiple: int = 64) -> tuple[int, int]:
    """(height, width) in pixels, each rounded up to a multiple of `multiple`, as diffusers' text-to-image does.

    Raises InputError for what is not a whole number of 1 to MAX_SIDE; lists both sides.
    """
    problems, sides = [], []
    for name, value in (("height", height), ("width", width)):
        try:
            side = 0 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            side = 0
        if not 1 <= side <= MAX_SIDE:
            problems.append(f"{name}: expected a whole number of pixels from 1 to {MAX_SIDE}, found {value!r}")
        sides.append(-(-side // multiple) * multiple)
    if problems:
        raise InputError("; ".join(problems))
    return sides[0], sides[1]


def save_image(image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write `image` to `path`, all of it or nothing; an existing file is replaced.

    The suffix picks the format: .png, .jpg, .jpeg or .webp. `metadata` becomes text chunks of a PNG (keys: 1 to 79
    Latin-1 characters) and a JSON object in the EXIF image description of the others.

    Raises OutputError for another suffix, a folder that is missing or not writable, a full disk or metadata that the
    format cannot hold.
    """
    target = Path(path)
    if target.suffix.lower() not in _WRITABLE:
        raise OutputError(f"{target}: the suffix must be one of {', '.join(_WRITABLE)}, found {target.suffix!r}")
    kind, options = _WRITABLE[target.suffix.lower()]
    # Opened with the usual permissions, which tempfile's files have not; a short name fits wherever the target does.
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            image.save(file, kind, **options, **_metadata(kind, metadata))
        temporary.replace(target)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{target}: the picture cannot be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


# Shared with clip_image.py and masks.py


def decode(source: ImageLike, name: str) -> Image.Image:
    """`source` decoded, upright and in an 8-bit mode; a PIL image that is all that already comes back itself.

    Raises InputError as `open_image`, which this is the first half of.
    """
    if isinstance(source, np.ndarray):
        return _array_image(source, name)
    opened: contextlib.AbstractContextManager[Image.Image]
    try:
        if isinstance(source, Image.Image):
            opened = contextlib.nullcontext(source)
            filename = getattr(source, "filename", "")
            name += f" {filename!r}" if filename else ""
        elif isinstance(source, (str, os.PathLike)):
            name = f"{name} {os.fspath(source)!r}"
            opened = _open_file(Path(source), name)
        else:
            raise InputError(f"{name}: expected a path, a PIL image or an array, found {type(source).__name__}")
        with opened as image:
            check_size(name, *image.size)
            image.load()
            # Some formats learn their true size only here.
            check_size(name, *image.size)
            return _eight_bits(_upright(image), name)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not a picture in a known format ({', '.join(READABLE)})") from error
    except Exception as error:  # what decoders raise for damaged files is not limited to OSError
        raise InputError(f"{name}: damaged, cut short or unreadable: {error or type(error).__name__}") from error


def unit_range(array: NDArray[Any], name: str) -> Float32:
    """`array` as float32 in [0, 1]: uint8 divided by 255, bool as 0 and 1, floating checked.

    Raises InputError that begins with `name` for another dtype, and for floating values outside 0 to 1 or NaN.
    """
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(255)
    if array.dtype.kind not in "bf":
        raise InputError(f"{name}: expected an array of uint8, bool or floating numbers, found {array.dtype}")
    if array.dtype.kind == "f" and array.size and not (array.min() >= 0 and array.max() <= 1):  # false for NaN too
        raise InputError(
            f"{name}: floating values must lie within 0 to 1, found {array.min():g} to {array.max():g}; "
            "an array of 0 to 255 must be uint8"
        )
    return array.astype(np.float32)


def check_size(what: str, width: int, height: int) -> None:
    """Raise InputError that begins with `what` for a picture without pixels or with more than MAX_PIXELS."""
    if width < 1 or height < 1:
        raise InputError(f"{what}: empty, its size is {size_text(width, height)}")
    if width * height > MAX_PIXELS:
        found = f"{size_text(width, height)} pixels"
        raise InputError(f"{what}: {found} are more than the {MAX_PIXELS:,} allowed; make the picture smaller")


def size_text(width: int, height: int) -> str:
    """A size as messages say it."""
    return f"{width} x {height} (width x height)"


def channels_first(picture: Float32) -> Float32:
    """[H, W, C] to contiguous [1, C, H, W]."""
    return np.ascontiguousarray(picture.transpose(2, 0, 1)[None])


# Details


def _open_file(path: Path, name: str) -> Image.Image:
    if not path.exists():
        raise InputError(f"{name}: no such file")
    if not path.is_file():  # opening a pipe would wait for ever
        raise InputError(f"{name}: not a file" + (" but a folder" if path.is_dir() else ""))
    Image.init()  # registers the formats; which ones exist depends on how Pillow was built
    return Image.open(path, formats=[kind for kind in READABLE if kind in Image.OPEN])


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says. Not ImageOps.exif_transpose: it fails where other EXIF entries are damaged."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Modes I;16, I and F, which PIL's convert would clip, to mode L; others as they are."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    small, large = (1, 255) if image.mode == "F" else (255, 65535)
    full = small if high <= small and ";" not in image.mode else large
    if not 0 <= low <= high <= full:  # false for NaN too
        raise InputError(
            f"{name}: values of a picture in mode {image.mode} must lie within 0 to {large}, found {low:g} to {high:g}"
        )
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))


def _array_image(array: NDArray[Any], name: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(f"{name}: expected an array [H, W], [H, W, 3] or [H, W, 4], found {list(array.shape)}")
    check_size(name, array.shape[1], array.shape[0])
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    values = array if array.dtype == np.uint8 else np.rint(unit_range(array, name) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values))


def _metadata(kind: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """`metadata` as options of PIL's save."""
    if not metadata:
        return {}
    if kind == "PNG":
        info = PngInfo()
        for key, value in metadata.items():
            if not 1 <= len(key) <= 79:
                raise ValueError(f"a PNG text keyword has 1 to 79 characters: {key!r}")
            info.add_text(key, value.encode("utf-8", "backslashreplace").decode())
        return {"pnginfo": info}
    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION] = json.dumps(dict(metadata))
    return {"exif": exif}
