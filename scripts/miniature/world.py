"""What there is to draw: colours, shapes, sizes, places, backgrounds, and random scenes made of them.

Lengths and positions are fractions of the picture's side, x to the right and y down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any, Literal, TypeVar

import numpy as np

from ...engines.errors import InputError

Level3 = tuple[int, int, int]
T = TypeVar("T")

# Name -> base and accent, sRGB. A texture is drawn in the accent on the base; objects are shaded around the base.
# Accents lie away from every other colour's base.
COLOURS: Mapping[str, tuple[Level3, Level3]] = {
    "red": ((222, 42, 46), (176, 24, 40)),
    "orange": ((248, 138, 30), (253, 170, 88)),
    "yellow": ((252, 216, 58), (255, 236, 140)),
    "green": ((40, 160, 80), (92, 194, 116)),
    "blue": ((32, 100, 222), (84, 148, 244)),
    "purple": ((140, 52, 172), (174, 100, 206)),
    "pink": ((250, 158, 196), (240, 126, 174)),
    "white": ((248, 248, 246), (214, 217, 222)),
    "black": ((30, 30, 36), (72, 72, 82)),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
TEXTURES = ("plain", "striped", "dotted", "checked", "gradient")
SIZES: Mapping[str, float] = {"small": 0.27, "large": 0.44}
NEAR, MIDDLE, FAR = 0.25, 0.5, 0.75
PLACES: Mapping[str, tuple[float, float]] = {
    "top left": (NEAR, NEAR),
    "top": (MIDDLE, NEAR),
    "top right": (FAR, NEAR),
    "left": (NEAR, MIDDLE),
    "centre": (MIDDLE, MIDDLE),
    "right": (FAR, MIDDLE),
    "bottom left": (NEAR, FAR),
    "bottom": (MIDDLE, FAR),
    "bottom right": (FAR, FAR),
}
# Relation of the first object to the second -> the axis and the sign of (first - second) along it
RELATIONS: Mapping[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}

Split = Literal["train", "held-out"]
HELD_OUT_ONE_IN = 10
MAX_STRETCH = 0.04
PLAIN_SHARE, TWO_OBJECTS_SHARE, CENTRE_SHARE = 0.4, 0.35, 0.25


@dataclass(frozen=True)
class Figure:
    """One object: what a caption can say of it, and how far it lies from the middle of what the words mean."""

    colour: str
    shape: str
    size: str
    place: str
    offset: tuple[float, float] = (0.0, 0.0)
    stretch: float = 1.0

    def __post_init__(self) -> None:
        check("object", (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES), ("place", PLACES)), self)

    @property
    def centre(self) -> tuple[float, float]:
        """Where it is drawn, x and y."""
        x, y = PLACES[self.place]
        return x + self.offset[0], y + self.offset[1]

    @property
    def extent(self) -> float:
        """How large it is drawn: the side of the square it roughly fills."""
        return SIZES[self.size] * self.stretch


@dataclass(frozen=True)
class Scene:
    """A picture to draw: one or two objects on a background. Raises InputError where it cannot be told apart."""

    background: str
    texture: str
    objects: tuple[Figure, ...]

    def __post_init__(self) -> None:
        check("scene", (("background", COLOURS), ("texture", TEXTURES)), self)
        colours = [self.background, *(figure.colour for figure in self.objects)]
        if len(self.objects) not in (1, 2) or len(set(colours)) < len(colours):
            raise InputError(
                f"scene: expected one or two objects whose colours differ from each other's and from the background's, "
                f"found {len(self.objects)} with {', '.join(colours[1:]) or 'no colours'} on {self.background}"
            )


def check(owner: str, fields: Iterable[tuple[str, Iterable[str]]], found: Any) -> None:
    """Raise InputError that lists every attribute of `found` that is not in its table."""
    wrong = [
        f"{owner}: {name} is {getattr(found, name)!r}, expected one of {', '.join(table)}"
        for name, table in fields
        if getattr(found, name) not in table
    ]
    if wrong:
        raise InputError("; ".join(wrong))


def far_apart(first: str, second: str) -> bool:
    """Whether two large objects at these places leave a gap."""
    return max(abs(a - b) for a, b in zip(PLACES[first], PLACES[second], strict=True)) > MIDDLE - NEAR


PLACE_PAIRS = tuple(pair for pair in permutations(PLACES, 2) if far_apart(*pair))


def relation(first: Figure, second: Figure) -> str | None:
    """Where the first lies seen from the second, None where that takes two words."""
    steps = [a - b for a, b in zip(PLACES[first.place], PLACES[second.place], strict=True)]
    return next(
        (name for name, (axis, sign) in RELATIONS.items() if steps[axis] * sign > 0 and not steps[1 - axis]), None
    )


def held_out(scene: Scene) -> bool:
    """Whether the scene shows a combination of object colour, shape and background colour that training never shows.

    One in ten combinations, the same in every version of everything: a hash of its words decides.
    """
    return any(combination_held_out(figure.colour, figure.shape, scene.background) for figure in scene.objects)


@cache
def combination_held_out(colour: str, shape: str, background: str) -> bool:
    """Whether an object of this colour and shape on this background is never shown in training."""
    digest = hashlib.sha256(f"{colour} {shape} on {background}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def random_scene(
    rng: np.random.Generator,
    split: Split | None = None,
    *,
    count: int | None = None,
    jitter: float = 0.012,
) -> Scene:
    """Invent a scene, of one side of the split or of both; `count` objects, or one or two.

    Words are drawn uniformly, but 40 % of the backgrounds are plain, 35 % of the scenes hold two objects, and single
    ones stand in the centre more often, where no object of two can.
    `jitter` bounds the distance of each object from the middle of its place, along each axis.
    """
    accepted: Callable[[Scene], bool] = (
        (lambda _: True) if split is None else (lambda s: held_out(s) == (split != "train"))
    )
    while not accepted(scene := any_scene(rng, count, jitter)):
        pass
    return scene


def any_scene(rng: np.random.Generator, count: int | None, jitter: float) -> Scene:
    """A scene of either side of the split."""
    if count is None:
        count = 2 if rng.random() < TWO_OBJECTS_SHARE else 1
    background, *colours = (tuple(COLOURS)[i] for i in rng.permutation(len(COLOURS))[: count + 1])
    if count == 2:
        places: tuple[str, ...] = pick(rng, PLACE_PAIRS)
    else:
        places = ("centre" if rng.random() < CENTRE_SHARE else pick(rng, tuple(PLACES)),)
    texture = "plain" if rng.random() < PLAIN_SHARE else pick(rng, TEXTURES[1:])
    return Scene(background, texture, tuple(figure(rng, *words, jitter) for words in zip(colours, places, strict=True)))


def figure(rng: np.random.Generator, colour: str, place: str, jitter: float) -> Figure:
    """A figure of random shape and size."""
    x, y, stretch = rng.uniform(-1, 1, 3).tolist()
    return Figure(
        colour, pick(rng, SHAPES), pick(rng, tuple(SIZES)), place, (x * jitter, y * jitter), 1 + stretch * MAX_STRETCH
    )


def pick(rng: np.random.Generator, table: tuple[T, ...]) -> T:
    """One of a table."""
    return table[int(rng.integers(len(table)))]
