"""Text-to-image and image-to-image against diffusers, and what all decoders share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kandrt.engines.backends import open_component
from kandrt.engines.bundle import Bundle
from kandrt.engines.errors import BackendError, InputError, NumericalError
from kandrt.runtime import Embeds, Kandinsky, components, load

from .oracle import Broken, Oracle, SeededNoise, Spy, compare_pictures, component, picture, without_networks

TEXT, IMAGE = "KandinskyV22Pipeline", "KandinskyV22Img2ImgPipeline"
Arguments = dict[str, Any]


@pytest.fixture(scope="module")
def k(bundle: Path) -> Iterator[Kandinsky]:
    with load(bundle, threads=1) as k:
        yield k


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle(checkpoints)


def swapped(arguments: Arguments) -> Arguments:
    """diffusers' image-to-image takes the height for the width and the width for the height."""
    return {**arguments, "height": arguments["width"], "width": arguments["height"]}


SIZE: Arguments = {"height": 64, "width": 128}
LATENTS = np.random.default_rng(3).standard_normal((2, 4, 8, 16), np.float32)

FROM_TEXT: dict[str, tuple[int, Arguments]] = {
    "one": (1, {}),
    "batch": (3, {}),
    "count": (2, {"count": 2}),
    "no guidance": (2, {"guidance_scale": 1.0}),
    "weak guidance": (1, {"guidance_scale": 1.5}),
    "high": (1, {"height": 128, "width": 64}),
    "rounded up": (1, {"height": 65, "width": 100}),
    "one step": (1, {"steps": 1}),
    "many steps": (1, {"steps": 6}),
    "latents": (2, {"latents": LATENTS}),
}


@pytest.mark.parametrize("case", FROM_TEXT)
def test_text_to_image_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    batch, given = FROM_TEXT[case]
    embeds, arguments = oracle.embeds(*"abc"[:batch]), {"steps": 3, **SIZE, **given}
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(TEXT, theirs, embeds=embeds, **arguments)
    compare_pictures(k.decoder(embeds, **arguments, noise=ours).array, expected)
    assert ours.shapes == theirs.shapes


FROM_IMAGE: dict[str, tuple[int, Arguments]] = {
    "default strength": (1, {"image": picture(64, 128), "steps": 7}),
    "resized": (1, {"image": picture(150, 131)}),
    "strong": (1, {"image": picture(64, 128), "strength": 0.8}),
    "all steps": (1, {"image": picture(64, 128), "strength": 1.0}),
    "truncated": (1, {"image": picture(64, 128), "strength": 0.29, "steps": 100}),  # 28 steps, not 29
    "count": (1, {"image": picture(64, 128), "count": 2}),
    "batch": (2, {"image": [picture(64, 128), picture(100, 90, 1)], "count": 2}),
    "no guidance": (2, {"image": [picture(64, 128), picture(100, 90, 1)], "guidance_scale": 1.0}),
}


@pytest.mark.parametrize("case", FROM_IMAGE)
def test_image_to_image_as_diffusers(k: Kandinsky, oracle: Oracle, case: str) -> None:
    batch, given = FROM_IMAGE[case]
    embeds, arguments = oracle.embeds(*"abc"[:batch]), {"steps": 4, "strength": 0.5, **SIZE, **given}
    if case == "default strength":
        del arguments["strength"]
    theirs, ours = SeededNoise(), SeededNoise()
    expected = oracle(IMAGE, theirs, embeds=embeds, **swapped(arguments))
    compare_pictures(k.decoder(embeds, **arguments, noise=ours).array, expected)
    assert ours.shapes == theirs.shapes


SCHEDULERS = {"ddpm": None, "ddim": "DDIMScheduler", "dpmpp-2m": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_as_diffusers(k: Kandinsky, oracle: Oracle, name: str) -> None:
    embeds, image = oracle.embeds("a", "b"), [picture(64, 128), picture(64, 128, 1)]
    for pipeline, given in ((TEXT, {}), (IMAGE, {"image": image, "strength": 0.7})):
        arguments: Arguments = {"steps": 6, **SIZE, **given}
        theirs, ours = SeededNoise(), SeededNoise()
        told = swapped(arguments) if given else arguments
        expected = oracle(pipeline, theirs, embeds=embeds, scheduler=SCHEDULERS[name], **told)
        found = k.decoder(embeds, scheduler=name, noise=ours, **arguments)
        compare_pictures(found.array, expected)
        assert ours.shapes == theirs.shapes


def test_pictures_as_diffusers(k: Kandinsky, oracle: Oracle) -> None:
    """`images` are diffusers' "pil" and `latents` its "latent" output."""
    embeds, arguments = oracle.embeds("a", "b"), {"steps": 2, **SIZE}
    result = k.decoder(embeds, noise=SeededNoise(), **arguments)
    pil = oracle(TEXT, SeededNoise(), embeds=embeds, output_type="pil", **arguments)
    for found, expected in zip(result.images, pil, strict=True):
        assert (found.mode, found.size) == ("RGB", (128, 64))
        # a difference of 1e-4 may move a value over a half
        assert np.abs(np.asarray(found, np.int16) - np.asarray(expected, np.int16)).max() <= 1
    latents = oracle(TEXT, SeededNoise(), embeds=embeds, output_type="latent", **arguments).numpy()
    np.testing.assert_allclose(result.latents, latents, rtol=0, atol=1e-4)
    assert result.seed is None


# Seeds


def test_seed_as_diffusers(k: Kandinsky, oracle: Oracle) -> None:
    embeds, arguments = oracle.embeds("a", "b"), {"steps": 3, **SIZE}
    generator = torch.Generator("cpu").manual_seed(43)
    result = k.decoder(embeds, seed=43, **arguments)
    compare_pictures(result.array, oracle(TEXT, embeds=embeds, generator=generator, **arguments))
    assert result.seed == 43


@pytest.mark.parametrize("image", [None, picture(64, 128)], ids=["text", "image"])
def test_a_seed_a_picture(k: Kandinsky, oracle: Oracle, image: Image.Image | None) -> None:
    embeds, seeds = oracle.embeds("a", "b"), [5, 6, 7, 8]
    arguments: Arguments = {"steps": 3, **SIZE, **({} if image is None else {"image": image, "strength": 0.7})}
    result = k.decoder(embeds, seed=seeds, count=2, **arguments)
    if image is None:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        compare_pictures(result.array, oracle(TEXT, embeds=embeds, generator=generators, count=2, **arguments))
    assert result.seed == (5, 6, 7, 8)
    compare_pictures(result.array[2:3], k.decoder(oracle.embeds("b"), seed=7, **arguments).array)


def test_the_seed_repeats_the_picture(k: Kandinsky, oracle: Oracle) -> None:
    embeds = oracle.embeds("a")
    first = k.decoder(embeds, steps=2, **SIZE)
    assert isinstance(first.seed, int)
    again = k.decoder(embeds, steps=2, seed=first.seed, **SIZE)
    np.testing.assert_array_equal(first.array, again.array)
    other = k.decoder(embeds, steps=2, **SIZE)
    assert other.seed != first.seed
    assert np.abs(other.array - first.array).max() > 0.1


# Where diffusers fails or does not do what it promises


def test_height_is_height_from_an_image(k: Kandinsky, oracle: Oracle) -> None:
    embeds, arguments = oracle.embeds("a"), {"image": picture(64, 128), "strength": 0.5, "steps": 2, **SIZE}
    assert oracle(IMAGE, SeededNoise(), embeds=embeds, **arguments).shape == (1, 128, 64, 3)
    assert k.decoder(embeds, noise=SeededNoise(), **arguments).array.shape == (1, 64, 128, 3)


@pytest.mark.parametrize("image", [None, picture(64, 128)], ids=["text", "image"])
def test_count_without_guidance(k: Kandinsky, oracle: Oracle, image: Image.Image | None) -> None:
    """diffusers repeats the embeddings only with guidance. Negative embeddings are not needed."""
    name, given = (TEXT, {}) if image is None else (IMAGE, {"image": image, "strength": 0.5})
    arguments: Arguments = {"steps": 2, "guidance_scale": 1.0, **SIZE, **given}
    told = arguments if image is None else swapped(arguments)
    with pytest.raises(RuntimeError):
        oracle(name, SeededNoise(), embeds=oracle.embeds("a"), count=2, **told)
    if image is not None:
        told["image"] = [image] * 2
    expected = oracle(name, SeededNoise(), embeds=oracle.embeds("a", "a"), **told)
    found = k.decoder(oracle.embeds("a", negative=False), count=2, noise=SeededNoise(), **arguments)
    compare_pictures(found.array, expected)


def test_one_image_for_several_embeddings(k: Kandinsky, oracle: Oracle) -> None:
    """diffusers then starts all pictures from the same noise; here each has its own, as from a list of one image."""
    embeds, image = oracle.embeds("a", "b"), picture(64, 128)
    arguments: Arguments = {"strength": 0.5, "steps": 4, **SIZE}
    theirs, ours = SeededNoise(), SeededNoise()
    oracle(IMAGE, theirs, embeds=embeds, image=image, **swapped(arguments))
    found = k.decoder(embeds, image=image, noise=ours, **arguments)
    assert (theirs.shapes[0][0], ours.shapes[0][0]) == (1, 2)
    compare_pictures(found.array, oracle(IMAGE, SeededNoise(), embeds=embeds, image=[image] * 2, **swapped(arguments)))


def test_images_share_the_batch(k: Kandinsky, oracle: Oracle) -> None:
    embeds, images = oracle.embeds("a", "b", "c", "d"), [picture(64, 128), picture(64, 128, 1)]
    arguments: Arguments = {"strength": 0.5, "steps": 2, **SIZE}
    found = k.decoder(embeds, image=images, noise=SeededNoise(), **arguments)
    each = [images[0], images[0], images[1], images[1]]
    compare_pictures(found.array, oracle(IMAGE, SeededNoise(), embeds=embeds, image=each, **swapped(arguments)))


def test_strength_that_leaves_no_step(bundle: Path, oracle: Oracle) -> None:
    embeds, image = oracle.embeds("a"), picture(64, 64)
    with pytest.raises(RuntimeError):
        oracle(IMAGE, SeededNoise(), embeds=embeds, image=image, strength=0.3, steps=2, height=64, width=64)
    with pytest.raises(InputError, match=r"strength 0\.3 of 2 steps leaves no step to take; raise strength to 0\.5"):
        without_networks(bundle).decoder(embeds, image=image, strength=0.3, steps=2)


def test_any_size_from_an_image(k: Kandinsky, oracle: Oracle) -> None:
    """diffusers rounds down to a multiple of 8, which the network cannot take; here up to one of 64."""
    embeds, image = oracle.embeds("a"), picture(50, 100)
    arguments: Arguments = {"image": image, "strength": 0.5, "steps": 2}
    with pytest.raises(RuntimeError):
        oracle(IMAGE, SeededNoise(), embeds=embeds, **swapped({**arguments, "height": 50, "width": 100}))
    expected = oracle(IMAGE, SeededNoise(), embeds=embeds, **swapped({**arguments, **SIZE}))
    sizes: list[Arguments] = [{}, {"height": 50, "width": 100}, {"height": 64}]
    for size in sizes:
        compare_pictures(k.decoder(embeds, **arguments, **size, noise=SeededNoise()).array, expected)


def test_images_of_all_kinds(k: Kandinsky, oracle: Oracle, tmp_path: Path) -> None:
    """A file and an array are the picture that they hold; diffusers takes neither."""
    embeds, image = oracle.embeds("a"), picture(64, 128)
    image.save(tmp_path / "image.png")
    array = np.asarray(image)
    arguments: Arguments = {"strength": 0.5, "steps": 2, "seed": 1}
    with pytest.raises(ValueError, match="incorrect format"):
        oracle(IMAGE, SeededNoise(), embeds=embeds, image=array, strength=0.5, steps=2)
    expected = k.decoder(embeds, image=image, **arguments).array
    for same in (tmp_path / "image.png", str(tmp_path / "image.png"), array, array.astype(np.float32) / 255):
        compare_pictures(k.decoder(embeds, image=same, **arguments).array, expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_all_modes(k: Kandinsky, oracle: Oracle, mode: str) -> None:
    """diffusers hands the channels of the picture to the network as they are."""
    embeds, image = oracle.embeds("a"), picture(64, 128).convert(mode)
    arguments: Arguments = {"strength": 0.5, "steps": 2, **SIZE}
    with pytest.raises((RuntimeError, ValueError)):
        oracle(IMAGE, SeededNoise(), embeds=embeds, image=image, **swapped(arguments))
    expected = oracle(IMAGE, SeededNoise(), embeds=embeds, image=image.convert("RGB"), **swapped(arguments))
    compare_pictures(k.decoder(embeds, image=image, noise=SeededNoise(), **arguments).array, expected)


def test_more_than_all_of_the_way(bundle: Path, oracle: Oracle) -> None:
    """A strength over 1 is 1 in diffusers, and a mistake here."""
    embeds, image = oracle.embeds("a"), picture(64, 64)
    arguments: Arguments = {"embeds": embeds, "image": image, "steps": 2, "height": 64, "width": 64}
    expected = oracle(IMAGE, SeededNoise(), strength=1.0, **arguments)
    np.testing.assert_array_equal(oracle(IMAGE, SeededNoise(), strength=30, **arguments), expected)
    with pytest.raises(InputError, match="strength: expected a number above 0 and up to 1, found 30"):
        without_networks(bundle).decoder(strength=30, **arguments)


def test_arguments_without_effect(bundle: Path, oracle: Oracle) -> None:
    embeds, image = oracle.embeds("a"), picture(64, 64)
    arguments: Arguments = {"embeds": embeds, "steps": 2, "height": 64, "width": 64}
    ignored: list[tuple[str, Arguments, Arguments]] = [
        (TEXT, {}, {"strength": 0.5}),
        (IMAGE, {"image": image, "strength": 1.0}, {"latents": np.zeros((1, 4, 8, 8), np.float32)}),
    ]
    for name, needed, given in ignored:
        expected = oracle(name, SeededNoise(), **arguments, **needed)
        np.testing.assert_array_equal(oracle(name, SeededNoise(), **arguments, **needed, **given), expected)
        with pytest.raises(InputError):
            without_networks(bundle).decoder(**arguments, **needed, **given)


# What stays open, callbacks, errors


def test_only_what_is_needed_is_opened(bundle: Path, oracle: Oracle) -> None:
    with load(bundle, threads=1) as k:
        assert k.opened == ()
        k.decoder(oracle.embeds("a"), steps=1, **SIZE)
        assert set(k.opened) == {"decoder_context", "decoder_step", "movq_decoder"}
        k.decoder(oracle.embeds("a"), image=picture(64, 64), strength=1, steps=1)
        assert set(k.opened) == {"decoder_context", "decoder_step", "movq_decoder", "movq_encoder"}
    assert k.opened == ()


def test_closed(bundle: Path, oracle: Oracle) -> None:
    k = load(bundle, threads=1)
    k.close()
    k.close()
    with pytest.raises(BackendError, match="was closed; load it again"):
        k.decoder(oracle.embeds("a"), steps=1, **SIZE)


def test_memory_stage(bundle: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same picture, and no more open at a time than one stage needs."""
    events: list[str] = []

    class Noted(Spy):
        def __init__(self, opened: Bundle, name: str, **options: Any) -> None:
            super().__init__(open_component(opened, name, **options))
            self.name = name
            events.append(f"+{name}")

        def close(self) -> None:
            events.append(f"-{self.name}")

    embeds = oracle.embeds("a")
    arguments: Arguments = {"image": picture(64, 128), "strength": 1.0, "steps": 2, "seed": 3}
    with load(bundle, threads=1) as k:
        expected = k.decoder(embeds, **arguments).array
    monkeypatch.setattr(components, "open_component", Noted)
    with load(bundle, threads=1, memory="stage") as k:
        found = k.decoder(embeds, **arguments).array
        assert k.opened == ()
        k.prior(["a", "b"], image=[picture(64, 64), picture(64, 64, 1)], strength=1.0, steps=2)
        assert k.opened == ()
    np.testing.assert_array_equal(found, expected)
    stages = ["movq_encoder", "decoder_context", "decoder_step", "movq_decoder"]
    stages += ["image_encoder", "text_encoder", "prior_context", "prior_step"]
    assert events == [f"{sign}{name}" for name in stages for sign in "+-"]


def test_a_stage_is_closed_after_an_error(bundle: Path, oracle: Oracle) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with load(bundle, threads=1, memory="stage") as k:
        with pytest.raises(KeyboardInterrupt):
            k.decoder(oracle.embeds("a"), steps=3, callback=stop, **SIZE)
        assert k.opened == ()


def test_callback(k: Kandinsky, oracle: Oracle) -> None:
    seen: list[tuple[Any, ...]] = []
    result = k.decoder(oracle.embeds("a"), count=2, steps=3, callback=lambda *args: seen.append(args), **SIZE)
    assert [args[:3] for args in seen] == [("decoder", done, 3) for done in (1, 2, 3)]
    np.testing.assert_array_equal(seen[-1][3], result.latents)
    seen.clear()
    k.decoder(
        oracle.embeds("a"), image=picture(64, 64), strength=0.5, steps=5, callback=lambda *args: seen.append(args)
    )
    assert [args[:3] for args in seen] == [("decoder", 1, 2), ("decoder", 2, 2)]


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("decoder_step", 1, r"decoder: step 2 of 3 \(timestep 334\): the network's output holds NaN"),
        ("decoder_context", 0, r"decoder: step 1 of 3 \(timestep 667\)"),
        ("movq_encoder", 0, "movq encoder: the network's output holds NaN"),
        ("movq_decoder", 0, "movq decoder: decoded picture: 24576 of 24576 values are NaN"),
    ],
)
def test_nan_names_the_network(bundle: Path, oracle: Oracle, name: str, call: int, message: str) -> None:
    broken = Broken(component(bundle, name), call)
    with load(bundle, sessions={name: broken}) as k, pytest.raises(NumericalError, match=message):
        k.decoder(oracle.embeds("a"), image=picture(64, 128), strength=1.0, steps=3)


def test_arguments_are_left_alone(k: Kandinsky, oracle: Oracle) -> None:
    latents, image, embeds = LATENTS.copy(), np.asarray(picture(64, 128)).copy(), oracle.embeds("a", "b")
    k.decoder(embeds, latents=latents, steps=2, **SIZE)
    k.decoder(embeds, image=image, strength=1.0, steps=2)
    np.testing.assert_array_equal(latents, LATENTS)
    np.testing.assert_array_equal(image, np.asarray(picture(64, 128)))
    np.testing.assert_array_equal(embeds.image_embeds, oracle.embeds("a", "b").image_embeds)


ONE = picture(64, 64)
BAD: dict[str, tuple[Arguments, str]] = {
    "embeds": ({"embeds": np.zeros((1, 32), np.float32)}, "embeds: .*takes what k.prior gives, .* found ndarray"),
    "width of embeds": (
        {"embeds": Embeds(np.zeros((1, 16), np.float32))}, "image_embeds: this decoder takes 32 values .* found 16",
    ),
    "no negative": ({"embeds": Embeds(np.zeros((1, 32), np.float32))}, "negative_image_embeds: needed with"),
    "height 0": ({"height": 0}, "height: expected a whole number of pixels from 1 to 4096, found 0"),
    "height": ({"height": 64.0}, r"height: .* found 64\.0"),
    "both sides": ({"height": -1, "width": 5000}, "height: .* found -1; width: .* found 5000"),
    "steps": ({"steps": 0}, "steps: expected an int of 1 to 1000"),
    "steps, ddim": ({"steps": 0, "scheduler": "ddim"}, "steps: expected an int of 1 to 1000"),
    "scale": ({"guidance_scale": "4"}, "guidance_scale: expected a number of 0 or more"),
    "count": ({"count": -1}, "count: expected a whole number"),
    "scheduler": ({"scheduler": "euler"}, "scheduler: expected one of ddpm, ddim, dpmpp-2m .* found 'euler'"),
    "prior's scheduler": ({"scheduler": "unclip"}, "scheduler: expected one of ddpm"),
    "strength alone": ({"strength": 0.5}, "strength: only with image="),
    "strength 0": ({"image": ONE, "strength": 0}, "strength: expected a number above 0"),
    "strength 2": ({"image": ONE, "strength": 1.1}, "strength: expected a number above 0 and up to 1"),
    "latents": ({"latents": LATENTS}, r"latents: expected finite floats \[1, 4, 8, 8\], found float32\[2, 4, 8, 16\]"),
    "latents nan": ({"latents": np.full((1, 4, 8, 8), np.nan)}, "latents: expected finite floats"),
    "latents, image": ({"latents": LATENTS, "image": ONE}, "latents and image were both given"),
    "image": ({"image": 3}, "image: expected a path, a PIL image or an array, found int"),
    "no images": ({"image": []}, "image: expected one picture"),
    "images": ({"image": [ONE, ONE]}, "image: expected one picture, or as many as share 1 embeddings .* found 2"),
    "missing file": ({"image": "no.png"}, "image 'no.png': no such file"),
    "scalar image": ({"image": np.float32(3)}, "image"),
    "empty array": ({"image": np.array(3.0)}, r"expected an array \[H, W\]"),
    "array": ({"image": np.zeros((2, 64, 64, 3), np.uint8)}, "image: expected an array"),
    "huge image": ({"image": Image.new("RGB", (5000, 10))}, "width: .* found 5000"),
    "hint": ({"hint": 3}, "hint: expected a path, a PIL image or an array, found int"),
    "seed": ({"seed": 1.5}, "seed: expected an int"),
    "seeds": ({"seed": [1, 2], "count": 3}, "seed: expected one, or one for each of 3 pictures, found 2"),
    "seeds, image": ({"seed": [1, 2], "image": ONE}, "seed: expected one, or one for each of 1 pictures, found 2"),
    "seed and noise": ({"seed": 1, "noise": SeededNoise()}, "seed and noise were both given"),
    "noise": ({"noise": "3"}, "noise: expected a callable"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_run_no_network(bundle: Path, oracle: Oracle, case: str) -> None:
    arguments, message = BAD[case]
    given = {"embeds": oracle.embeds("a"), **({"height": 64, "width": 64} if "latents" in arguments else {})}
    with pytest.raises(InputError, match=message):
        without_networks(bundle).decoder(**{**given, **arguments})


@pytest.mark.parametrize(
    ("image", "negative", "message"),
    [
        (np.zeros(32, np.float32), None, r"image_embeds: expected floats \[batch, dim\], found float32\[32\]"),
        (np.zeros((1, 32), np.int64), None, "image_embeds: expected floats"),
        (np.zeros((0, 32), np.float32), None, "image_embeds: expected floats"),
        (np.full((1, 32), np.inf), None, "image_embeds: expected finite values"),
        (
            np.zeros((2, 32)),
            np.zeros((1, 32)),
            r"negative_image_embeds: expected the shape .*\[2, 32\], found \[1, 32\]",
        ),
        (np.zeros((2, 32)), "text", "negative_image_embeds: expected floats"),
    ],
)
def test_bad_embeds(image: Any, negative: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Embeds(image, negative)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "torch"}, InputError, "backend: expected 'onnxruntime'.*, found 'torch'"),
        ({"device": "tpu"}, InputError, "device of backend 'onnxruntime': .*found 'tpu'"),
        ({"memory": "none"}, InputError, "memory: expected 'keep' or 'stage', found 'none'"),
        ({"threads": 0}, InputError, "threads: expected a whole number of 1 or more, found 0"),
        ({"threads": "2"}, InputError, "threads: expected a whole number of 1 or more, found '2'"),
        ({"sessions": {"unet": Spy()}}, InputError, "sessions: the bundle has no component unet; it has text_encoder"),
    ],
)
def test_bad_options(bundle: Path, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(bundle, **options)
