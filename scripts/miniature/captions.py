"""Scenes in English, and English back into what it asks for.

A `Request` is what a prompt states: every attribute is a word of the world's tables, or None where the prompt leaves
it open and anything goes. `choose` decides what to tell of a scene, `phrase` says it, and `parse` reads it back:
`parse(phrase(request, rng)) == request` for whatever the grammar can say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ...engines.errors import InputError
from .world import COLOURS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES, Figure, Scene, check, relation

# Words for each value; the first is the usual one, and None is what a caption says for an attribute left open.
SIZE_WORDS: Mapping[str, Sequence[str]] = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SHAPE_WORDS: Mapping[str | None, Sequence[str]] = {shape: (shape,) for shape in SHAPES} | {None: ("shape",)}
TEXTURE_WORDS: Mapping[str, Sequence[str]] = {
    "plain": ("plain",),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "checked": ("checked", "checkered"),
    "gradient": ("gradient",),
}
MIDDLE_WORDS = ("in the centre", "in the middle", "in the center")
EDGE_WORDS: Mapping[str, str] = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
PLACE_WORDS: Mapping[str, Sequence[str]] = {
    place: MIDDLE_WORDS
    if place == "centre"
    else (EDGE_WORDS[place],)
    if place in EDGE_WORDS
    else (f"in the {place}", f"in the {place} corner")
    for place in PLACES
}
RELATION_WORDS: Mapping[str, Sequence[str]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
PREFIXES = ("a picture of", "a drawing of", "an image of")
USUAL_WORD_SHARE = 0.7

# How often a caption tells an attribute that it may leave out
TELLS: Mapping[str, float] = {"colour": 0.93, "shape": 0.95, "size": 0.6, "place": 0.6, "background": 0.88}
TELLS_RELATION, TELLS_TEXTURE_ONLY, TELLS_PREFIX, TELLS_PLAIN = 0.5, 0.3, 0.15, 0.2


@dataclass(frozen=True)
class Asked:
    """What is asked of one object; None: anything."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    place: str | None = None

    def __post_init__(self) -> None:
        tables = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "place": PLACES}
        check("object", ((name, table) for name, table in tables.items() if getattr(self, name) is not None), self)


@dataclass(frozen=True)
class Request:
    """What is asked of a picture; None: anything.

    `relation` is where the first of two objects lies seen from the second, asked instead of their places. A background
    colour named without a texture asks for a plain background. Raises InputError for values that no prompt can ask.
    """

    objects: tuple[Asked, ...]
    background: str | None = None
    texture: str | None = None
    relation: str | None = None

    def __post_init__(self) -> None:
        tables = {"background": COLOURS, "texture": TEXTURES, "relation": RELATIONS}
        check("request", ((name, table) for name, table in tables.items() if getattr(self, name) is not None), self)
        if len(self.objects) not in (1, 2):
            raise InputError(f"request: expected one or two objects, found {len(self.objects)}")
        if self.background is not None and self.texture is None:
            raise InputError(f"request: background {self.background} needs a texture, 'plain' if it is to have none")
        if self.relation is not None and (len(self.objects) == 1 or any(asked.place for asked in self.objects)):
            raise InputError(f"request: the relation {self.relation!r} takes two objects without places")


@dataclass(frozen=True)
class Caption:
    """A sentence with what it states."""

    text: str
    request: Request


def caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """Put a scene into words, leaving out what people leave out."""
    request = choose(scene, rng)
    return Caption(phrase(request, rng), request)


# What to tell


def everything(scene: Scene) -> Request:
    """All that can be asked of a scene; of two objects it gives the places, not the relation."""
    objects = tuple(Asked(figure.colour, figure.shape, figure.size, figure.place) for figure in scene.objects)
    return Request(objects, scene.background, scene.texture)


def choose(scene: Scene, rng: np.random.Generator) -> Request:
    """Decide what to tell of a scene, and which of two objects to name first."""

    def told(name: str) -> bool:
        return rng.random() < TELLS[name]

    figures = scene.objects if len(scene.objects) == 1 or rng.random() < 0.5 else scene.objects[::-1]
    related = relation(*figures) if len(figures) == 2 and rng.random() < TELLS_RELATION else None
    places = related is None and told("place")  # of both or of none: half a layout reads oddly
    objects = tuple(partly(figure, rng, places) for figure in figures)
    if told("background"):
        return Request(objects, scene.background, scene.texture, related)
    return Request(objects, None, scene.texture if rng.random() < TELLS_TEXTURE_ONLY else None, related)


def partly(figure: Figure, rng: np.random.Generator, place: bool) -> Asked:
    """Some of what can be asked of an object."""
    colour, shape, size = (
        getattr(figure, name) if rng.random() < TELLS[name] else None for name in ("colour", "shape", "size")
    )
    return Asked(colour, shape, size, figure.place if place else None)


# To words


def phrase(request: Request, rng: np.random.Generator | None = None) -> str:
    """Say it in one of several ways, in the usual way without `rng`."""
    names = [object_phrase(asked, rng) for asked in request.objects]
    if request.relation is not None:
        objects = f"{names[0]} {word(RELATION_WORDS[request.relation], rng)} {names[1]}"
    else:
        objects = " and ".join(names)
    if request.texture is None:
        text = objects
    elif request.background is not None and happens(rng, 0.15):
        text = f"{objects} on {background_words(request, rng)}"
    else:
        ground = with_article(f"{background_words(request, rng)} background")
        text = f"{ground} with {objects}" if happens(rng, 0.2) else f"{objects} on {ground}"
    return f"{word(PREFIXES, rng)} {text}" if happens(rng, TELLS_PREFIX) else text


def object_phrase(asked: Asked, rng: np.random.Generator | None) -> str:
    """`a small red star in the top left`, as much of it as is asked."""
    words = [word(SIZE_WORDS[asked.size], rng)] if asked.size is not None else []
    words += [asked.colour] if asked.colour is not None else []
    name = with_article(" ".join([*words, word(SHAPE_WORDS[asked.shape], rng)]))
    return name if asked.place is None else f"{name} {word(PLACE_WORDS[asked.place], rng)}"


def background_words(request: Request, rng: np.random.Generator | None) -> str:
    """`striped yellow`; a plain colour goes mostly without saying that it is plain."""
    texture, colour = request.texture, request.background
    if texture is None or (texture == "plain" and colour is not None and not happens(rng, TELLS_PLAIN)):
        return colour or ""
    return " ".join([word(TEXTURE_WORDS[texture], rng), *([colour] if colour is not None else [])])


def with_article(noun: str) -> str:
    """`a` or `an` before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def word(choices: Sequence[str], rng: np.random.Generator | None) -> str:
    """The usual word or, less often, one of the others."""
    if rng is None or len(choices) == 1 or rng.random() < USUAL_WORD_SHARE:
        return choices[0]
    return choices[1 + int(rng.integers(len(choices) - 1))]


def happens(rng: np.random.Generator | None, share: float) -> bool:
    """Whether to take the less usual way."""
    return rng is not None and bool(rng.random() < share)


# From words


def meanings(words: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Word -> value."""
    return {choice: value for value, choices in words.items() for choice in choices}


SIZE_OF, TEXTURE_OF, RELATION_OF = meanings(SIZE_WORDS), meanings(TEXTURE_WORDS), meanings(RELATION_WORDS)
PLACE_OF = meanings(PLACE_WORDS)


def one_of(words: Sequence[str]) -> str:
    """A pattern for any of the words, longer ones first."""
    return "|".join(sorted(words, key=len, reverse=True))


ARTICLE, COLOUR, TEXTURE = "(?:an?|the|one)", one_of(tuple(COLOURS)), one_of(tuple(TEXTURE_OF))
OBJECT = (
    rf"{ARTICLE} (?:(?P<size>{one_of(tuple(SIZE_OF))}) )?(?:(?P<colour>{COLOUR}) )?"
    rf"(?P<shape>{one_of(tuple(chain.from_iterable(SHAPE_WORDS.values())))})(?: (?P<place>{one_of(tuple(PLACE_OF))}))?"
)
FIRST, SECOND = (re.sub(r"\?P<(\w+)>", rf"?P<\g<1>{i}>", OBJECT) for i in (1, 2))
OBJECTS = rf"{FIRST}(?: (?:and|(?P<relation>{one_of(tuple(RELATION_OF))})) {SECOND})?"
GROUND = (
    rf"{ARTICLE} (?:(?P<texture>{TEXTURE})(?: (?P<background>{COLOUR}))?|"
    rf"(?P<colour>{COLOUR})(?: (?P<after>{TEXTURE}))?) background|"
    rf"(?:(?P<short>{TEXTURE}) )?(?P<bare>{COLOUR})"
)
PREFIX = rf"(?:(?:{one_of(PREFIXES)}) )?"
OBJECTS_FIRST = re.compile(rf"{PREFIX}{OBJECTS}(?: (?:on|against) (?P<ground>.+))?")
GROUND_FIRST = re.compile(rf"{PREFIX}(?P<ground>.+? background) with {OBJECTS}")
GROUND_ALONE = re.compile(GROUND)


def parse(prompt: str) -> Request | None:
    """Read a prompt of the kind that `phrase` writes, None where it is another kind; case and punctuation are free."""
    text = " ".join(re.sub(r"[^a-z]+", " ", prompt.lower()).split())
    found = OBJECTS_FIRST.fullmatch(text) or GROUND_FIRST.fullmatch(text)
    if found is None:
        return None
    parts = found.groupdict()
    ground = GROUND_ALONE.fullmatch(parts["ground"]) if parts["ground"] else None
    if parts["ground"] and ground is None:
        return None
    colour, texture = ground_of(ground.groupdict()) if ground else (None, None)
    objects = tuple(object_of(parts, i) for i in (1, 2) if parts[f"shape{i}"])
    related = RELATION_OF[parts["relation"]] if parts["relation"] else None
    if related is not None and any(asked.place for asked in objects):
        return None
    return Request(objects, colour, texture, related)


def object_of(parts: Mapping[str, str | None], i: int) -> Asked:
    """The i-th object of a prompt taken apart."""
    size, colour, shape, place = (parts[f"{name}{i}"] for name in ("size", "colour", "shape", "place"))
    return Asked(
        colour, shape if shape in SHAPES else None, SIZE_OF[size] if size else None, PLACE_OF[place] if place else None
    )


def ground_of(parts: Mapping[str, str | None]) -> tuple[str | None, str]:
    """Background colour and texture of a prompt taken apart."""
    texture = parts["texture"] or parts["after"] or parts["short"]
    colour = parts["background"] or parts["colour"] or parts["bare"]
    return colour, TEXTURE_OF[texture] if texture else "plain"
