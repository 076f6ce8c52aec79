"""What a model of the miniature is asked to paint when its pictures are judged.

Every object that a prompt names is one of a colour and shape that training never showed on the background's colour.
Trials are the same for every model: a seed decides all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from PIL import Image

from .captions import Asked, Caption, Request, caption, everything, phrase
from .drawing import depth, draw
from .masks import object_mask
from .shapes import Float32
from .world import COLOURS, SHAPES, TWO_OBJECTS_SHARE, Scene, combination_held_out, held_out, pick, random_scene

SIDE = 128  # pixels
STRAYED = 0.04  # how far a hint's objects lie from their places
BATCH = 8
PATH = 7  # pictures of an interpolation, both ends included


class Painter(Protocol):
    """A model that is judged. Pictures are RGB of SIDE x SIDE pixels; `seeds` has one for each picture."""

    def paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """A picture for each prompt."""
        ...

    def follow(self, prompts: Sequence[str], hints: Sequence[Float32], seeds: Sequence[int]) -> list[Image.Image]:
        """A picture for each prompt along its depth hint [SIDE, SIDE] in [0, 1]."""
        ...

    def repaint(self, prompt: str, image: Image.Image, mask: Float32, seed: int) -> tuple[Image.Image, Image.Image]:
        """The image repainted where the mask is 1, and the image as the autoencoder gives it back."""
        ...

    def between(self, first: str, second: str, shares: Sequence[float], seed: int) -> list[Image.Image]:
        """Pictures on the way from one prompt to another, all of one seed; a share of 1 is the second."""
        ...


@dataclass(frozen=True)
class TextTrial:
    """A prompt, and what it asks for."""

    prompt: str
    request: Request


@dataclass(frozen=True)
class HintTrial:
    """A prompt with a depth hint [SIDE, SIDE]."""

    prompt: str
    hint: Float32


@dataclass(frozen=True)
class InpaintTrial:
    """A picture with a hole [SIDE, SIDE], and the object that is asked into it."""

    prompt: str
    image: Image.Image
    mask: Float32
    asked: Asked


@dataclass(frozen=True)
class PathTrial:
    """Two prompts that differ in the background's colour."""

    first: str
    second: str


def text_trials(count: int, seed: int = 0) -> list[TextTrial]:
    """Prompts as people write them, of one object or two."""
    rng = np.random.default_rng([seed, 1])
    return [TextTrial(told.text, told.request) for _, told in (unseen_scene(rng) for _ in range(count))]


def unseen_scene(rng: np.random.Generator, jitter: float | None = None) -> tuple[Scene, Caption]:
    """A scene with a caption that asks for combinations alone that training never showed."""
    count = 2 if rng.random() < TWO_OBJECTS_SHARE else 1
    settings = {} if jitter is None else {"jitter": jitter}
    while True:
        scene = random_scene(rng, "held-out", count=count, **settings)
        if unseen(everything(scene)) and unseen((told := caption(scene, rng)).request):
            return scene, told


def unseen(request: Request) -> bool:
    """Whether every object that is asked is of a combination that training never showed."""
    return all(
        asked.colour is not None
        and asked.shape is not None
        and request.background is not None
        and combination_held_out(asked.colour, asked.shape, request.background)
        for asked in request.objects
    )


def hint_trials(count: int, seed: int = 0) -> list[HintTrial]:
    """Prompts with the depth of a scene whose objects stray from their places."""
    rng = np.random.default_rng([seed, 2])
    drawn = [unseen_scene(rng, STRAYED) for _ in range(count)]
    return [HintTrial(told.text, depth(scene, SIDE)) for scene, told in drawn]


def inpaint_trials(count: int, seed: int = 0) -> list[InpaintTrial]:
    """Pictures of one object, a box around it as the hole, and another object asked for in its place."""
    rng = np.random.default_rng([seed, 3])
    return [inpaint_trial(rng) for _ in range(count)]


def inpaint_trial(rng: np.random.Generator) -> InpaintTrial:
    """One of them."""
    before = random_scene(rng, count=1)
    while not held_out(after := with_other_object(before, rng)):
        before = random_scene(rng, count=1)
    asked = everything(after).objects[0]
    prompt = phrase(everything(after), rng)
    return InpaintTrial(prompt, draw(before, SIDE), object_mask(before, 0, SIDE), Asked(asked.colour, asked.shape))


def with_other_object(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with another colour and shape in the same place and size."""
    (figure,) = scene.objects
    colours = tuple(name for name in COLOURS if name not in (scene.background, figure.colour))
    shapes = tuple(name for name in SHAPES if name != figure.shape)
    return replace(scene, objects=(replace(figure, colour=pick(rng, colours), shape=pick(rng, shapes)),))


def with_other_background(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene on a background of another colour."""
    taken = (scene.background, scene.objects[0].colour)
    return replace(scene, background=pick(rng, tuple(name for name in COLOURS if name not in taken)))


def path_trials(count: int, seed: int = 0) -> list[PathTrial]:
    """Pairs of prompts; everything but the background is the same."""
    rng = np.random.default_rng([seed, 4])
    trials = []
    for _ in range(count):
        scene = replace(random_scene(rng, count=1), texture="plain")
        while not held_out(other := with_other_background(scene, rng)):
            scene = replace(random_scene(rng, count=1), texture="plain")
        trials.append(PathTrial(phrase(everything(scene)), phrase(everything(other))))
    return trials
