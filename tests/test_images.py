"""Pictures in and out against PIL and diffusers, and every damaged or unsuitable one refused by name."""

from __future__ import annotations

import errno
import io
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kandrt.engines.errors import InputError, NumericalError, OutputError
from kandrt.runtime import images
from kandrt.runtime.images import (
    MAX_PIXELS,
    MAX_SIDE,
    image_pixels,
    open_image,
    picture_size,
    save_image,
    to_array,
    to_pil,
)

# float32 in another order of operations, on values of about 1 to 2
ROUNDING = 1e-6


def noise(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours with noise on them, so that filters and rounding both show."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7 + y / 5 + c) for c in range(4)], axis=-1) * 90 + 127
    rgba = np.clip(waves + noise(height, width, 4, seed=seed) / 4 - 32, 0, 255).astype(np.uint8)
    return Image.fromarray(rgba).convert(mode) if mode == "RGBA" else Image.fromarray(rgba[..., :3]).convert(mode)


# open_image


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif", ".tiff"])
def test_files_open_as_rgb(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    picture(40, 30).save(file)
    for source in (file, str(file)):
        opened = open_image(source)
        with Image.open(file) as reference:
            np.testing.assert_array_equal(np.asarray(opened), np.asarray(reference.convert("RGB")))
        assert opened.mode == "RGB"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV"])
def test_modes_convert_as_in_pil(mode: str) -> None:
    source = picture(20, 10, "RGBA").convert("L").convert("LA") if mode == "LA" else picture(20, 10, mode)
    opened = open_image(source)
    assert opened.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(source.convert("RGB")))
    assert open_image(opened) is not opened


def test_palette_with_transparency_keeps_its_colours(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    source = picture(20, 10, "P")
    file = tmp_path / "p.png"
    source.save(file, transparency=bytes(range(256)))
    np.testing.assert_array_equal(np.asarray(open_image(file)), np.asarray(source.convert("RGB")))
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha(mode: str) -> None:
    straight = picture(20, 10, "RGBA").convert(mode.upper())
    straight.putalpha(255)
    opened = open_image(straight.convert(mode))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(straight.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_in_pil(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "turned.png"
    picture(24, 16).save(file, exif=exif)
    with Image.open(file) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(open_image(image)), wanted)
    np.testing.assert_array_equal(np.asarray(open_image(file)), wanted)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_hide_a_good_picture(tmp_path: Path) -> None:
    file = tmp_path / "exif.jpg"
    picture(24, 16).save(file, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03")
    assert open_image(file).size == (24, 16)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 200).astype(np.uint16).reshape(10, 20)
    wanted = np.rint(levels / 257).astype(np.uint8)
    for suffix in (".png", ".tiff"):
        file = tmp_path / f"deep{suffix}"
        Image.fromarray(levels).save(file)
        np.testing.assert_array_equal(np.asarray(open_image(file))[..., 1], wanted)
    wide = Image.fromarray(levels.astype(np.int32))
    assert wide.mode == "I"
    np.testing.assert_array_equal(np.asarray(open_image(wide))[..., 0], wanted)


def test_wide_modes_with_a_narrow_range() -> None:
    levels = noise(10, 20)
    for values in (levels.astype(np.int32), levels.astype(np.float32), levels.astype(np.float32) / 255):
        np.testing.assert_array_equal(np.asarray(open_image(Image.fromarray(values)))[..., 2], levels)


@pytest.mark.parametrize("value", [-1, 70000, np.nan, np.inf])
def test_wide_modes_out_of_range(value: float) -> None:
    levels = np.full((4, 4), value, np.float32)
    sources = [levels, levels.astype(np.int32)] if np.isfinite(value) else [levels]
    for source in sources:
        with pytest.raises(InputError, match=r"image: values of a picture in mode [FI] must lie within"):
            open_image(Image.fromarray(source))


def test_arrays() -> None:
    levels = noise(6, 8, 3)
    for array in (levels, levels.astype(np.float64) / 255, levels.astype(np.float32) / 255):
        np.testing.assert_array_equal(np.asarray(open_image(array)), levels)
    np.testing.assert_array_equal(np.asarray(open_image(levels[..., 0]))[..., 2], levels[..., 0])
    np.testing.assert_array_equal(np.asarray(open_image(levels[..., :1]))[..., 2], levels[..., 0])
    np.testing.assert_array_equal(np.asarray(open_image(levels[..., 0] > 99))[..., 1] > 0, levels[..., 0] > 99)
    np.testing.assert_array_equal(np.asarray(open_image(noise(6, 8, 4))), noise(6, 8, 4)[..., :3])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"expected an array .* found \[4, 4, 2\]"),
        (np.zeros((1, 3, 4, 4), np.uint8), r"found \[1, 3, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((4, 4, 3), np.int64), "uint8, bool or floating numbers, found int64"),
        (np.full((4, 4, 3), 255.0), "must be uint8"),
        (np.full((4, 4, 3), np.nan), "must lie within 0 to 1"),
        (np.zeros((4, 4, 3), object), "found object"),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000, 3)), "more than"),
    ],
)
def test_unsuitable_arrays(array: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^photo: .*{message}"):
        open_image(array, "photo")


@pytest.mark.parametrize("source", [None, 3, b"bytes", io.BytesIO(), [picture(2, 2)]])
def test_unsuitable_types(source: Any) -> None:
    with pytest.raises(InputError, match=f"^image: expected a path, .* found {type(source).__name__}"):
        open_image(source)


def damaged_files() -> dict[str, tuple[bytes, str]]:
    whole = {kind: io.BytesIO() for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF")}
    for kind, buffer in whole.items():
        picture(64, 64).save(buffer, kind)
    files = {
        f"cut.{kind}": (b.getvalue()[: len(b.getvalue()) // 2], "damaged|known format") for kind, b in whole.items()
    }
    return files | {
        "empty.png": (b"", "not a picture in a known format"),
        "text.png": (b"this is no picture", "not a picture in a known format"),
        "flipped.png": (whole["PNG"].getvalue()[:60] + bytes(40) + whole["PNG"].getvalue()[100:], "damaged"),
        "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in a known format"),
    }


@pytest.mark.parametrize("file_name", damaged_files())
def test_damaged_files_are_named(tmp_path: Path, file_name: str) -> None:
    content, message = damaged_files()[file_name]
    file = tmp_path / file_name
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"^mask .*{file_name}.*({message})"):
        open_image(file, "mask")


def test_a_lazily_opened_damaged_picture_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    file.write_bytes(damaged_files()["cut.PNG"][0])
    with Image.open(file) as image, pytest.raises(InputError, match=r"image .*cut\.png.*damaged"):
        open_image(image)


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.png.*no such file"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match="not a file but a folder"):
        open_image(str(tmp_path))
    with pytest.raises(InputError, match=r"^image 'a"):
        open_image("a\0b.png")
    with pytest.raises(InputError, match=r"^image 'xxx"):
        open_image("x" * 5000)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in the file system")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a file"):
        open_image(tmp_path / "pipe")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (12_000, 12_000), (60_000, 60_000)])
@pytest.mark.parametrize("pil_checks", [True, False])
def test_decompression_bombs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int, pil_checks: bool
) -> None:
    """Refused by the header alone: the pixel data that the file promises are not even there."""
    if not pil_checks:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    file = tmp_path / "bomb.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(InputError, match=r"bomb\.png.*(pixels are more than|exceeds limit)"):
        open_image(file)
    assert width * height > MAX_PIXELS


def test_pil_settings_are_left_alone(tmp_path: Path) -> None:
    from PIL import ImageFile

    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    picture(8, 8).save(tmp_path / "a.png")
    open_image(tmp_path / "a.png")
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_readable_formats_do_not_run_programs() -> None:
    assert "EPS" not in images.READABLE


# image_pixels


@pytest.mark.parametrize("size", [(64, 64), (100, 77), (700, 300), (31, 250), (128, 64)])
@pytest.mark.parametrize(("height", "width"), [(64, 128), (128, 64), (64, 64)])
def test_image_pixels_are_those_of_diffusers(size: tuple[int, int], height: int, width: int) -> None:
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_inpainting import prepare_mask_and_masked_image

    source = picture(*size)
    found = image_pixels(source, height, width)
    assert found.shape == (1, 3, height, width)
    assert found.dtype == np.float32
    processor = VaeImageProcessor(vae_scale_factor=8, resample="bicubic", reducing_gap=1)
    wanted = processor.preprocess(source, height, width).numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING)
    _, inpaint = prepare_mask_and_masked_image(source, Image.new("L", source.size), height, width)
    np.testing.assert_array_equal(found, inpaint.numpy())


def test_floating_arrays_of_the_right_size_are_not_rounded() -> None:
    array = np.random.default_rng(0).random((64, 128, 3))
    np.testing.assert_allclose(
        image_pixels(array, 64, 128), array.transpose(2, 0, 1)[None] * 2 - 1, rtol=0, atol=ROUNDING
    )
    assert image_pixels(array, 128, 128).shape == (1, 3, 128, 128)
    with pytest.raises(InputError, match="within 0 to 1"):
        image_pixels(array * 255, 64, 128)


# Pictures out


def test_pictures_are_those_of_diffusers() -> None:
    import torch
    from diffusers.image_processor import VaeImageProcessor

    pixels = np.random.default_rng(0).normal(0, 0.7, (2, 3, 16, 24)).astype(np.float32)
    pixels[0, 0, 0] = np.arange(24) / 127.5 - 1  # some exact halves among the levels
    processor = VaeImageProcessor()
    array = to_array(pixels)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, processor.postprocess(torch.from_numpy(pixels), output_type="np"))
    for found, wanted in zip(to_pil(array), processor.postprocess(torch.from_numpy(pixels), "pil"), strict=True):
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    assert np.asarray(to_pil(np.full((1, 1, 1, 3), 0.5, np.float32))[0])[0, 0, 0] == 128  # 127.5, half to even


def test_half_precision_pictures_become_float32() -> None:
    array = to_array(np.full((1, 3, 2, 2), 0.1, np.float16))
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, np.float32(np.float16(0.1)) * 0.5 + 0.5, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_picture_that_is_not_a_number(value: float) -> None:
    pixels = np.zeros((1, 3, 4, 4), np.float32)
    pixels[0, 1, 2, 3] = value
    with pytest.raises(NumericalError, match="1 of 48 values are NaN or infinite"):
        to_array(pixels)


@pytest.mark.parametrize("sides", [(1, 1), (64, 65), (512, 768), (700, 513), (MAX_SIDE, MAX_SIDE - 1)])
def test_picture_size_as_in_diffusers(sides: tuple[int, int]) -> None:
    from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2 import downscale_height_and_width

    latent = downscale_height_and_width(*sides, scale_factor=8)
    assert picture_size(*sides) == tuple(8 * side for side in latent)
    assert picture_size(np.int64(sides[0]), sides[1], multiple=1) == sides  # type: ignore[arg-type]


@pytest.mark.parametrize("side", [0, -64, MAX_SIDE + 1, 10**30, True, 512.0, "512", None, float("nan")])
def test_unsuitable_sizes(side: Any) -> None:
    with pytest.raises(InputError, match=r"^height: expected a whole number .*; width: .* from 1 to 4096"):
        picture_size(side, side)
    with pytest.raises(InputError, match=r"^width: "):
        picture_size(64, side)


# save_image

METADATA = {"prompt": "café 😀\nsecond line", "seed": "43"}


def test_png_with_its_metadata(tmp_path: Path) -> None:
    image = picture(30, 20)
    save_image(image, tmp_path / "a.PNG", METADATA)
    with Image.open(tmp_path / "a.PNG") as read:
        np.testing.assert_array_equal(np.asarray(read), np.asarray(image))
        assert read.info == METADATA


@pytest.mark.parametrize(("suffix", "kind"), [(".jpg", "JPEG"), (".JPEG", "JPEG"), (".webp", "WEBP")])
def test_other_formats(tmp_path: Path, suffix: str, kind: str) -> None:
    image = picture(64, 64).resize((256, 256), Image.Resampling.BICUBIC)
    save_image(image, str(tmp_path / f"a{suffix}"), METADATA)
    with Image.open(tmp_path / f"a{suffix}") as read:
        assert read.format == kind
        # Lossy, but at quality 95 within a few of 255 levels on average.
        assert np.abs(np.asarray(read, np.int16) - np.asarray(image, np.int16)).mean() < 4
        assert json.loads(read.getexif()[0x010E]) == METADATA


def test_an_existing_file_is_replaced_with_the_usual_permissions(tmp_path: Path) -> None:
    file, plain = tmp_path / "a.png", tmp_path / "plain"
    file.write_bytes(b"old")
    plain.touch()
    save_image(picture(4, 4), file, {})
    assert open_image(file).size == (4, 4)
    assert file.stat().st_mode == plain.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [file, plain]


def test_a_lone_surrogate_in_the_metadata_is_escaped(tmp_path: Path) -> None:
    save_image(picture(4, 4), tmp_path / "a.png", {"prompt": "a\udc80"})
    with Image.open(tmp_path / "a.png") as read:
        assert read.info == {"prompt": "a\\udc80"}


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"old")

    def save(self: Image.Image, target: Any, *rest: Any, **options: Any) -> None:
        target.write(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OutputError, match=r"a\.png: the picture cannot be written: No space left on device"):
        save_image(picture(4, 4), file, {})
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == b"old"


def test_an_interruption_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Image.Image, target: Any, *rest: Any, **options: Any) -> None:
        target.write(b"some of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt):
        save_image(picture(4, 4), tmp_path / "a.png", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.exe", "a", ".png", "a.png.part", ""])
def test_unknown_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"suffix must be one of \.png, \.jpg"):
        save_image(picture(4, 4), tmp_path / name, {})


def test_unwritable_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    for name in ("missing/a.png", "folder.png", "file/a.png", "a\0.png", "x" * 300 + ".png"):
        with pytest.raises(OutputError, match="the picture cannot be written"):
            save_image(picture(4, 4), tmp_path / name, {})

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        save_image(picture(4, 4), tmp_path / "a.png", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_metadata_that_a_format_cannot_hold(tmp_path: Path) -> None:
    for key in ("", "k" * 80, "ключ"):
        with pytest.raises(OutputError, match="cannot be written"):
            save_image(picture(4, 4), tmp_path / "a.png", {key: "value"})
    with pytest.raises(OutputError, match="cannot be written"):
        save_image(picture(4, 4), tmp_path / "a.jpg", {"prompt": "x" * 70_000})
    assert not list(tmp_path.iterdir())
