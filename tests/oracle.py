"""What the pipeline tests share: diffusers' pipelines with the noise that kandrt gets, pictures, and fake sessions."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from kandrt.engines.backends import open_component
from kandrt.engines.bundle import open_bundle
from kandrt.engines.session import Session
from kandrt.engines.spec import TensorSpec
from kandrt.runtime import Embeds, Kandinsky, load

F32 = NDArray[np.float32]

# float32 on both sides, and sums in another order: at most 5e-5 was seen after some 200 layers and 6 steps.
PICTURE_TOLERANCE = 1e-4
# Relative L2; the prior's network is far shallower.
EMBEDS_TOLERANCE = 1e-5

# Pipeline -> the checkpoint (by role) that holds its parts.
PIPELINES: Mapping[str, str] = {
    "KandinskyV22PriorPipeline": "prior",
    "KandinskyV22PriorEmb2EmbPipeline": "prior",
    "KandinskyV22Pipeline": "decoder",
    "KandinskyV22Img2ImgPipeline": "decoder",
    "KandinskyV22InpaintPipeline": "inpaint",
    "KandinskyV22ControlnetPipeline": "controlnet",
    "KandinskyV22ControlnetImg2ImgPipeline": "controlnet",
    "KandinskyV22CombinedPipeline": "combined",
    "KandinskyV22Img2ImgCombinedPipeline": "combined",
    "KandinskyPriorPipeline": "prior-2-1",
    "KandinskyPipeline": "decoder-2-1",
    "KandinskyImg2ImgPipeline": "decoder-2-1",
    "KandinskyInpaintPipeline": "inpaint-2-1",
    "KandinskyCombinedPipeline": "combined-2-1",
    "KandinskyImg2ImgCombinedPipeline": "combined-2-1",
    "Kandinsky3Pipeline": "decoder-3",
    "Kandinsky3Img2ImgPipeline": "decoder-3",
}

# Pipelines that no folder holds -> those that their parts come from: the prior's and the decoder's.
ASSEMBLED: Mapping[str, tuple[str, str]] = {
    "KandinskyV22InpaintCombinedPipeline": ("KandinskyV22PriorPipeline", "KandinskyV22InpaintPipeline"),
    "KandinskyInpaintCombinedPipeline": ("KandinskyPriorPipeline", "KandinskyInpaintPipeline"),
}

# kandrt's arguments that have another name in diffusers.
NAMES = {
    "count": "num_images_per_prompt",
    "steps": "num_inference_steps",
    "prior_steps": "prior_num_inference_steps",
    "prior_latents": "latents",
    "mask": "mask_image",
}

# kandrt's arguments that are arrays, and tensors in diffusers.
STATES = ("prompt_embeds", "attention_mask", "negative_prompt_embeds", "negative_attention_mask")
TENSORS = ("latents", "prior_latents", "hint", *STATES)


class SeededNoise:
    """Standard-normal draws from a NumPy generator, with the shapes that were asked for."""

    def __init__(self, seed: int = 7) -> None:
        self._generator = np.random.default_rng(seed)
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, shape: tuple[int, ...]) -> F32:
        self.shapes.append(tuple(shape))
        return self._generator.standard_normal(shape, np.float32)


def row_of(noise: Callable[[tuple[int, ...]], F32], row: int, rows: int) -> Callable[[tuple[int, ...]], F32]:
    """What `row` gets of a batch's noise, for a run of that row alone."""
    return lambda shape: noise((rows, *shape[1:]))[row : row + 1]


@contextmanager
def injected(noise: Callable[[tuple[int, ...]], F32]) -> Iterator[None]:
    """Let diffusers draw from `noise` wherever it would draw from torch."""

    def randn_tensor(shape: Any, **_: Any) -> torch.Tensor:
        return torch.from_numpy(noise(tuple(shape)))

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith(("diffusers.pipelines.", "diffusers.schedulers.")) and "randn_tensor" in vars(module):
                patch.setattr(module, "randn_tensor", randn_tensor)
        yield


@functools.cache
def pipeline(name: str, folder: Path) -> Any:
    """A diffusers pipeline, loaded once a process."""
    # the configuration of Kandinsky 3's text encoder asks for bfloat16
    return quiet(getattr(diffusers, name).from_pretrained(folder, dtype=torch.float32))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Oracle:
    """diffusers' pipelines on small checkpoints, called with kandrt's arguments; `dim` is that of image embeddings."""

    def __init__(self, checkpoints: Mapping[str, Path], dim: int = 32) -> None:
        self.checkpoints, self.dim = checkpoints, dim

    def pipeline(self, name: str) -> Any:
        """The pipeline of this class name."""
        if name not in ASSEMBLED:
            return pipeline(name, self.checkpoints[PIPELINES[name]])
        prior, parts = (self.pipeline(each).components for each in ASSEMBLED[name])
        return quiet(getattr(diffusers, name)(**parts, **{f"prior_{part}": module for part, module in prior.items()}))

    def embeds(self, *prompts: str, negative: bool = True) -> Embeds:
        """Distinct embeddings, one a prompt, of the size of real ones; not what the prior makes of them."""
        shape = 2, self.dim
        rows = [np.random.default_rng([len(p), *p.encode()]).standard_normal(shape, np.float32) for p in prompts]
        image, other = np.stack(rows, axis=1)
        return Embeds(image, other if negative else None)

    def __call__(self, name: str, noise: Callable[[tuple[int, ...]], F32] | None = None, **arguments: Any) -> Any:
        """What the pipeline gives: pictures float32 [B, H, W, 3], or Embeds of a prior.

        `arguments` are kandrt's; Embeds and arrays become tensors. A scheduler, or the name of its class, replaces the
        pipeline's.
        """
        pipe, scheduler = self.pipeline(name), arguments.pop("scheduler", None)
        method = getattr(pipe, arguments.pop("method", "__call__"))
        own = pipe.scheduler
        if scheduler is not None:
            named = isinstance(scheduler, str)
            pipe.scheduler = getattr(diffusers, scheduler).from_config(own.config) if named else scheduler
        if "Prior" not in name:
            arguments = {"output_type": "np", **arguments}
        try:
            with injected(noise) if noise is not None else no_patch():
                out = method(**as_diffusers(arguments))
        finally:
            pipe.scheduler = own
        if "Prior" in name:  # no combined one has it in its name
            return Embeds(out.image_embeds.numpy(), out.negative_image_embeds.numpy())
        return out.images


@contextmanager
def no_patch() -> Iterator[None]:
    yield


def as_diffusers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """kandrt's arguments by diffusers' names and types."""
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Embeds):
            result["image_embeds"] = torch.from_numpy(value.image_embeds)
            negative = value.negative_image_embeds
            # diffusers takes None here only without guidance
            result["negative_image_embeds"] = None if negative is None else torch.from_numpy(negative)
        elif name in TENSORS and value is not None:
            result[NAMES.get(name, name)] = torch.from_numpy(value)
        else:
            result[NAMES.get(name, name)] = value
    return result


def compare_pictures(found: F32, expected: F32, tolerance: float = PICTURE_TOLERANCE) -> None:
    """Within `tolerance` of the oracle's, which must be pictures rather than one flat or clipped colour."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert expected.std() > 0.1
    assert np.abs(found - expected).max() <= tolerance


def compare_embeds(found: Embeds, expected: Embeds, tolerance: float = EMBEDS_TOLERANCE) -> None:
    """Both arrays within `tolerance` of the oracle's, relative."""
    for name in ("image_embeds", "negative_image_embeds"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.shape == theirs.shape, name
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs), name


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A colour picture without symmetry: smooth gradients and some noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(3 * generator.uniform(1, 3) * x + 5 * generator.uniform(0, 1) * y) for _ in range(3)]
    values = 0.5 + 0.35 * np.stack(waves, axis=-1) + generator.uniform(-0.1, 0.1, (height, width, 3))
    return Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8))


def box(height: int, width: int, top: float, left: float, bottom: float, right: float) -> F32:
    """A mask [height, width] that is 1 in a rectangle, given in shares of the sides."""
    mask = np.zeros((height, width), np.float32)
    mask[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = 1
    return mask


class Spy:
    """A session that another one answers for, and that counts; without another one it must not be called."""

    def __init__(self, session: Session | None = None) -> None:
        self.session = session
        self.calls: list[dict[str, Any]] = []
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()

    def __call__(self, **arrays: Any) -> dict[str, Any]:
        self.calls.append({name: np.array(array) for name, array in arrays.items()})
        assert self.session is not None, "a network ran"
        return self.session(**arrays)

    def close(self) -> None:
        raise AssertionError("a caller's session was closed")


class Broken(Spy):
    """A component that gives NaN from its call number `call` on, the first one being 0."""

    def __init__(self, session: Session, call: int = 0) -> None:
        super().__init__(session)
        self.call = call

    def __call__(self, **arrays: Any) -> dict[str, Any]:
        out = super().__call__(**arrays)
        return {n: a * np.float32("nan") if len(self.calls) > self.call else a for n, a in out.items()}


def component(bundle: Path, name: str) -> Session:
    """A component of the bundle as a session."""
    return open_component(open_bundle(bundle), name, backend="onnxruntime", device="cpu", threads=1)


def spied(bundle: Path, *names: str, **options: Any) -> tuple[Kandinsky, dict[str, Spy]]:
    """The bundle with spies on the components `names`."""
    spies = {name: Spy(component(bundle, name)) for name in names}
    return load(bundle, sessions=spies, threads=1, **options), spies


def without_networks(bundle: Path) -> Kandinsky:
    """The bundle with sessions that must not be called."""
    return load(bundle, sessions={name: Spy() for name in open_bundle(bundle).manifest.components})
