"""How well pictures do what was asked: prompts, ControlNet's hints, inpainting, interpolation.

A verdict has one entry an attribute of the request: True or False, None where the request leaves it open. The keys
are `ATTRIBUTES`; those of the second object end in ` 2`, so that `attribute(key)` is what to tally by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...engines.errors import InputError
from .captions import Asked, Request
from .drawing import FLOOR, TABLE
from .regions import regions, widen
from .seeing import GRID, SMALLEST, Bool, Sight, Spotted, look, oklab
from .shapes import Float32
from .world import RELATIONS

Verdict: TypeAlias = "dict[str, bool | None]"

OF_PICTURE, OF_OBJECT = ("background", "texture", "count"), ("colour", "shape", "size", "place")
ATTRIBUTES = (*OF_PICTURE, *OF_OBJECT, "relation")
APART = 0.15  # of the side, for one object to be left of another
MOST_OBJECTS = 4  # that are tried for those asked, the largest first

SAME_SPOT = 0.5  # overlap with the hint's object from which on a picture's object is at the same spot
COARSE = 12  # pixels a side of what interpolation is measured on: colours and not edges


# Prompts


def judge(picture: Image.Image, request: Request) -> Verdict:
    """Which attributes of the request a picture of any size shows."""
    return compare(look(picture), request)


def compare(sight: Sight, request: Request) -> Verdict:
    """Which attributes of the request were seen, with the objects matched so that most are.

    An object that is asked and was not seen has none of its attributes; one more than asked is a wrong count only.
    """
    verdict: Verdict = {
        "background": holds(request.background, sight.background),
        "texture": holds(request.texture, sight.texture),
        "count": len(sight.objects) == len(request.objects),
    }
    candidates = [*sight.objects[:MOST_OBJECTS], *[None] * (len(request.objects) - len(sight.objects))]
    matches = (match(chosen, request) for chosen in permutations(candidates, len(request.objects)))
    return verdict | max(matches, key=lambda found: sum(value is True for value in found.values()))


def match(chosen: Sequence[Spotted | None], request: Request) -> Verdict:
    """The objects' part of a verdict, taking what was seen for what was asked in this order."""
    verdict: Verdict = {}
    for i, (asked, spotted) in enumerate(zip(request.objects, chosen, strict=True)):
        verdict |= {f"{name} {i + 1}" if i else name: value for name, value in match_object(asked, spotted).items()}
    if len(chosen) == 2:
        verdict["relation"] = None if request.relation is None else related(request.relation, *chosen)
    return verdict


def match_object(asked: Asked, spotted: Spotted | None) -> Verdict:
    """One object's part of a verdict."""
    return {name: holds(getattr(asked, name), getattr(spotted, name, None)) for name in OF_OBJECT}


def holds(asked: str | None, seen: str | None) -> bool | None:
    """Whether what was seen is what was asked, if anything was."""
    return None if asked is None else asked == seen


def related(relation: str, first: Spotted | None, second: Spotted | None) -> bool:
    """Whether the first lies where it should, seen from the second."""
    if first is None or second is None:
        return False
    axis, sign = RELATIONS[relation]
    return ((first.x, first.y)[axis] - (second.x, second.y)[axis]) * sign > APART


# Many verdicts


@dataclass(frozen=True)
class Score:
    """How often an attribute was right, of how often it was asked."""

    right: int = 0
    asked: int = 0

    @property
    def accuracy(self) -> float:
        """Right of asked, NaN where it was never asked."""
        return self.right / self.asked if self.asked else float("nan")


def attribute(key: str) -> str:
    """What a verdict's key is about, whichever object it is about."""
    return key.removesuffix(" 2")


def tally(verdicts: Iterable[Mapping[str, bool | None]]) -> dict[str, Score]:
    """The score of every attribute, in the order of `ATTRIBUTES`; two objects count twice."""
    counts = {name: [0, 0] for name in ATTRIBUTES}
    for verdict in verdicts:
        for key, value in verdict.items():
            if value is not None:
                counts[attribute(key)][0] += value
                counts[attribute(key)][1] += 1
    return {name: Score(right, asked) for name, (right, asked) in counts.items()}


# ControlNet


@dataclass(frozen=True)
class HintMatch:
    """How a picture's objects lie to those of its hint."""

    overlap: float
    """Intersection over union of all objects of the picture and of the hint."""
    least: float
    """Of the hint's objects the least share that objects of the picture cover."""
    distance: float
    """From each of the hint's objects to the picture's nearest, between centres of area; the largest, of the side."""

    @property
    def same_spot(self) -> bool:
        """Whether the picture's objects are where the hint's are."""
        return min(self.overlap, self.least) >= SAME_SPOT


def judge_hint(picture: Image.Image, hint: Float32) -> HintMatch:
    """Compare where a picture's objects lie with a depth hint [H, W] as `drawing.depth` makes them.

    Raises InputError where the hint has no object. Without an object in the picture, `distance` is infinite.
    """
    resized = Image.fromarray(np.asarray(hint, np.float32)).resize((GRID, GRID), Image.Resampling.BOX)
    near: Bool = np.asarray(resized) > (FLOOR + TABLE) / 2
    wanted = regions(near, SMALLEST)
    if not wanted:
        raise InputError(f"hint: expected an object nearer than {(FLOOR + TABLE) / 2:.2f}, found none")
    found = [spotted.mask for spotted in look(picture).objects]
    drawn = np.logical_or.reduce([np.zeros_like(near), *found])
    distances = [min((gap(mask, other) for other in found), default=float("inf")) for mask in wanted]
    least = min(float(drawn[mask].mean()) for mask in wanted)
    return HintMatch(float((near & drawn).sum() / (near | drawn).sum()), least, max(distances))


def gap(first: Bool, second: Bool) -> float:
    """Distance between two masks' centres of area, as a fraction of the side."""
    centres = [np.argwhere(mask).mean(axis=0) for mask in (first, second)]
    return float(np.linalg.norm(centres[0] - centres[1])) / GRID


# Inpainting


@dataclass(frozen=True)
class Repainted:
    """What inpainting did."""

    kept_difference: float
    """Mean absolute difference to the original where it was to be kept, in levels of 0 to 255."""
    verdict: Verdict
    """What was asked of the object in the hole, `colour`, `shape`, `size` and `place`."""

    @property
    def drawn(self) -> bool:
        """Whether the object that was asked is in the hole."""
        return False not in self.verdict.values()


def judge_inpainting(
    picture: Image.Image, original: Image.Image, mask: Float32, asked: Asked, *, margin: int = 8
) -> Repainted:
    """Judge a picture whose hole, `mask` [H, W] of 1 = repaint and 0 = keep, was to be filled with an object.

    An object is in the hole where more than half of it is. Pixels up to `margin` from the hole do not count as kept:
    a pipeline that keeps latents of 8 x 8 pixels repaints them in part. The original may have been through the image
    autoencoder, to leave out what that changes. Raises InputError where the sizes differ or nothing is kept.
    """
    if not picture.size == original.size == mask.shape[::-1]:
        raise InputError(
            f"inpainting: expected one size, found picture {picture.size}, original {original.size}, "
            f"mask {mask.shape[::-1]} (width, height)"
        )
    hole = mask >= 0.5
    kept = ~widen(hole, margin)
    if not kept.any():
        raise InputError(f"inpainting: the mask keeps no pixel further than {margin} from the hole")
    after, before = (np.asarray(image.convert("RGB"), np.float32)[kept] for image in (picture, original))
    resized = Image.fromarray(hole.astype(np.float32)).resize((GRID, GRID), Image.Resampling.BOX)
    inside: Bool = np.asarray(resized) >= 0.5
    candidates: list[Spotted | None] = [
        spotted for spotted in look(picture).objects if inside[spotted.mask].mean() > 0.5
    ]
    verdicts = [match_object(asked, spotted) for spotted in candidates or [None]]
    best = max(verdicts, key=lambda verdict: sum(value is True for value in verdict.values()))
    return Repainted(float(np.abs(after - before).mean()), best)


# Interpolation


def interpolation_path(pictures: Sequence[Image.Image]) -> NDArray[np.float64]:
    """How far each picture's colours are on the way from the first picture's (0) to the last's (1): float64 [N].

    Colours are OKLab means over the cells of a 12 x 12 grid, projected on the straight line between the two ends.
    Raises InputError for fewer than three pictures, or for ends that do not differ.
    """
    if len(pictures) < 3:
        raise InputError(f"interpolation: expected three pictures or more, found {len(pictures)}")
    small = [picture.convert("RGB").resize((COARSE, COARSE), Image.Resampling.BOX) for picture in pictures]
    colours = np.stack([oklab(np.asarray(image, np.float32)).ravel() for image in small]).astype(np.float64)
    way = colours[-1] - colours[0]
    if np.abs(way).mean() < 1e-3:
        raise InputError("interpolation: the first and the last picture show the same colours")
    path: NDArray[np.float64] = (colours - colours[0]) @ way / (way @ way)
    return path


def is_monotone(path: NDArray[np.float64], tolerance: float = 0.05) -> bool:
    """Whether a path never goes back by more than `tolerance` of its length, from the furthest it has come."""
    return bool((np.maximum.accumulate(path) - path).max() <= tolerance)
