"""The miniature's judge: it finds what was drawn, however the picture has suffered, and notices what was not drawn.

Scenes are random, so accuracies carry a sampling error: bounds are those that the evaluation of a model relies on.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageFilter

from kandrt.engines.errors import InputError
from kandrt.scripts.miniature.captions import Asked, Request, caption, everything, parse
from kandrt.scripts.miniature.drawing import depth, draw
from kandrt.scripts.miniature.judge import (
    ATTRIBUTES,
    Score,
    Verdict,
    attribute,
    interpolation_path,
    is_monotone,
    judge,
    judge_hint,
    judge_inpainting,
    tally,
)
from kandrt.scripts.miniature.masks import object_mask
from kandrt.scripts.miniature.regions import regions, widen
from kandrt.scripts.miniature.seeing import look, oklab
from kandrt.scripts.miniature.world import (
    COLOURS,
    PLACES,
    SHAPES,
    TEXTURES,
    Figure,
    Scene,
    far_apart,
    random_scene,
    relation,
)


def scenes(count: int, seed: int, objects: int | None = None) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, count=objects) for _ in range(count)]


def related(scene: Scene) -> Request | None:
    """All of a scene of two objects, with their relation instead of their places."""
    name = relation(*scene.objects) if len(scene.objects) == 2 else None
    request = everything(scene)
    return name and replace(
        request, relation=name, objects=tuple(replace(asked, place=None) for asked in request.objects)
    )


def accuracies(verdicts: list[Verdict]) -> dict[str, float]:
    return {name: score.accuracy for name, score in tally(verdicts).items()}


def judged(drawn: list[Scene], suffer: Callable[[Image.Image], Image.Image]) -> dict[str, float]:
    return accuracies([judge(suffer(draw(scene)), related(scene) or everything(scene)) for scene in drawn])


# What is there


def test_clean_pictures_show_what_was_drawn() -> None:
    found = judged(scenes(250, seed=0), lambda picture: picture)
    assert tuple(found) == ATTRIBUTES
    assert min(found.values()) >= 0.99, found


def jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=50)
    return Image.open(file).convert("RGB")


def levels(change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Callable[[Image.Image], Image.Image]:
    rng = np.random.default_rng(0)

    def apply(picture: Image.Image) -> Image.Image:
        changed = change(np.asarray(picture, np.float32), rng)
        return Image.fromarray(changed.round().clip(0, 255).astype(np.uint8))

    return apply


def coarse(side: int) -> Callable[[Image.Image], Image.Image]:
    def apply(picture: Image.Image) -> Image.Image:
        small = picture.resize((side, side), Image.Resampling.BOX)
        return small.resize(picture.size, Image.Resampling.BICUBIC)

    return apply


def warp(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves every pixel by about one, and its neighbours almost as far."""
    size = pixels.shape[1::-1]
    fields = rng.normal(0, 1.3, (2, 7, 7)).astype(np.float32)
    shifts = [np.asarray(Image.fromarray(field).resize(size, Image.Resampling.BICUBIC)) for field in fields]
    rows, columns = np.indices(pixels.shape[:2]) + np.round(shifts).astype(int)
    return pixels[rows.clip(0, pixels.shape[0] - 1), columns.clip(0, pixels.shape[1] - 1)]


SUFFERINGS: dict[str, tuple[Callable[[Image.Image], Image.Image], float]] = {
    "jpeg of quality 50": (jpeg, 0.95),
    "blur of 1.5 pixels": (lambda picture: picture.filter(ImageFilter.GaussianBlur(1.5)), 0.95),
    "noise of 8 levels": (levels(lambda pixels, rng: pixels + rng.normal(0, 8, pixels.shape)), 0.95),
    "another white point": (
        levels(lambda pixels, rng: pixels * rng.uniform(0.93, 1.07, 3) + rng.uniform(-8, 8, 3)),
        0.95,
    ),
    "32 pixels a side": (coarse(32), 0.95),
    "24 pixels a side": (coarse(24), 0.9),  # a small star is 6 pixels wide
    "warped outlines": (levels(warp), 0.9),
}


@pytest.mark.parametrize("name", SUFFERINGS)
def test_pictures_that_suffered_still_show_it(name: str) -> None:
    suffer, bound = SUFFERINGS[name]
    found = judged(scenes(80, seed=1), suffer)
    assert min(found.values()) >= bound, found


def test_pictures_of_other_sizes_and_modes_show_it() -> None:
    for side in (64, 128, 300):
        found = judged(scenes(20, seed=2), lambda picture, side=side: picture.resize((side, side)).convert("RGBA"))
        assert min(found.values()) >= 0.95, (side, found)
    drawn_larger = accuracies([judge(draw(scene, 256), everything(scene)) for scene in scenes(20, seed=3)])
    assert min(value for name, value in drawn_larger.items() if name != "relation") >= 0.95


def test_captions_are_judged_as_true() -> None:
    rng = np.random.default_rng(4)
    verdicts = []
    for scene in scenes(60, seed=4):
        said = caption(scene, rng)
        verdicts.append(judge(draw(scene), said.request))
        assert parse(said.text) == said.request
    assert min(accuracies(verdicts).values()) >= 0.95


# What is not there


def other(value: str, table: tuple[str, ...], rng: np.random.Generator, taken: tuple[str, ...] = ()) -> str:
    return str(rng.choice([word for word in table if word != value and word not in taken]))


def changed(scene: Scene, what: str, rng: np.random.Generator) -> Scene:
    """The scene with one attribute, of the scene or of its last object, made another."""
    colours = (scene.background, *(figure.colour for figure in scene.objects))
    last, before = scene.objects[-1], scene.objects[:-1]
    if what == "background":
        return replace(scene, background=other(scene.background, tuple(COLOURS), rng, colours))
    if what == "texture":
        return replace(scene, texture=other(scene.texture, TEXTURES, rng))
    if what == "colour":
        return replace(scene, objects=(*before, replace(last, colour=other(last.colour, tuple(COLOURS), rng, colours))))
    if what == "shape":
        return replace(scene, objects=(*before, replace(last, shape=other(last.shape, SHAPES, rng))))
    if what == "size":
        return replace(scene, objects=(*before, replace(last, size="small" if last.size == "large" else "large")))
    free = tuple(place for place in PLACES if all(far_apart(place, figure.place) for figure in before))
    return replace(scene, objects=(*before, replace(last, place=other(last.place, free, rng))))


@pytest.mark.parametrize("what", ["background", "texture", "colour", "shape", "size", "place"])
def test_what_is_not_as_asked_is_noticed_and_nothing_else(what: str) -> None:
    rng = np.random.default_rng(5)
    exact = []
    for scene in scenes(60, seed=6):
        verdict = judge(draw(changed(scene, what, rng)), everything(scene))
        wrong = [key for key, value in verdict.items() if value is False]
        where = " 2" if len(scene.objects) == 2 and what in ("colour", "shape", "size", "place") else ""
        exact.append(wrong == [what + where])
    assert np.mean(exact) >= 0.97


def test_another_scene_is_wrong_where_it_differs_and_right_where_not() -> None:
    drawn = scenes(150, seed=7, objects=1)
    agree: dict[str, list[bool]] = {}
    for asked, shown in pairwise(drawn):
        verdict = judge(draw(shown), everything(asked))
        truth = {
            "background": asked.background == shown.background,
            "texture": asked.texture == shown.texture,
            "count": True,
        }
        truth |= {
            name: getattr(asked.objects[0], name) == getattr(shown.objects[0], name)
            for name in ("colour", "shape", "size", "place")
        }
        for name, value in truth.items():
            agree.setdefault(f"{name} {value}", []).append(verdict[name] is value)
    assert min(np.mean(values) for values in agree.values()) >= 0.97, agree


def test_an_object_too_many_or_too_few_is_counted() -> None:
    for scene in scenes(30, seed=8, objects=2):
        fewer = replace(scene, objects=scene.objects[:1])
        assert judge(draw(fewer), everything(scene)) == {
            "background": True, "texture": True, "count": False,
            "colour": True, "shape": True, "size": True, "place": True,
            "colour 2": False, "shape 2": False, "size 2": False, "place 2": False, "relation": None,
        }  # fmt: skip
        verdict = judge(draw(scene), everything(fewer))
        assert [key for key, value in verdict.items() if value is not True] == ["count"]


def test_a_relation_the_other_way_round_is_wrong() -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    asked = [(scene, request) for scene in scenes(60, seed=9, objects=2) if (request := related(scene))]
    assert len(asked) > 20
    for scene, request in asked:
        assert judge(draw(scene), request)["relation"] is True
        assert request.relation is not None
        turned = judge(draw(scene), replace(request, relation=opposite[request.relation]))
        assert turned["relation"] is False
        named_last_first = replace(request, objects=request.objects[::-1], relation=opposite[request.relation])
        assert False not in judge(draw(scene), named_last_first).values()


def test_what_is_left_open_is_not_judged() -> None:
    verdict = judge(draw(scenes(1, seed=10, objects=1)[0]), Request((Asked(),)))
    assert verdict == dict.fromkeys(verdict, None) | {"count": True}


def test_colours_and_shapes_unlike_any_have_no_name() -> None:
    assert look(Image.new("RGB", (96, 96), (128, 128, 128))).background is None
    brown = draw(Scene("white", "plain", (Figure("orange", "square", "large", "centre"),)))
    brown.paste((110, 78, 50), (32, 32, 64, 64))
    assert look(brown).objects[0].colour is None
    blob = Image.new("RGB", (96, 96), COLOURS["white"][0])
    for box in ((20, 20, 28, 70), (20, 62, 76, 70), (68, 30, 76, 70)):
        blob.paste(COLOURS["red"][0], box)
    assert [(spotted.colour, spotted.shape) for spotted in look(blob).objects] == [("red", None)]


def test_an_empty_picture_holds_nothing() -> None:
    for colour, (base, _) in COLOURS.items():
        sight = look(Image.new("RGB", (96, 96), base))
        assert (sight.background, sight.texture, sight.objects) == (colour, "plain", ())


def test_noise_is_no_scene() -> None:
    pixels = np.random.default_rng(11).integers(0, 256, (96, 96, 3), np.uint8)
    verdict = judge(Image.fromarray(pixels), everything(scenes(1, seed=11)[0]))
    assert verdict["background"] is False
    assert verdict["shape"] is False


def test_objects_of_two_colours_that_touch_are_two() -> None:
    touching = (
        Figure("red", "square", "large", "left", offset=(0.07, 0)),
        Figure("blue", "square", "large", "right", offset=(-0.07, 0)),
    )
    sight = look(draw(Scene("white", "plain", touching)))
    assert sorted((spotted.colour, spotted.shape) for spotted in sight.objects) == [
        ("blue", "square"),
        ("red", "square"),
    ]


def test_oklab_is_that_of_its_author() -> None:
    # Reference values of pure sRGB colours, as published with the colour space (rounded to 3 digits)
    for level, expected in (
        ((255, 255, 255), (1, 0, 0)),
        ((255, 0, 0), (0.628, 0.225, 0.126)),
        ((0, 255, 0), (0.866, -0.234, 0.179)),
        ((0, 0, 255), (0.452, -0.032, -0.312)),
    ):
        np.testing.assert_allclose(oklab(np.array(level, np.float32)), expected, atol=1e-3)


# Tallies


def test_tallies_count_what_was_asked() -> None:
    scores = tally([{"colour": True, "colour 2": False, "count": True}, {"colour": True, "size": None}])
    assert scores["colour"] == Score(2, 3)
    assert scores["colour"].accuracy == pytest.approx(2 / 3)
    assert scores["size"] == Score(0, 0)
    assert np.isnan(scores["size"].accuracy)
    assert attribute("colour 2") == "colour"


# ControlNet


def test_a_picture_matches_its_own_hint_and_no_other() -> None:
    drawn = scenes(60, seed=12)
    own = [judge_hint(draw(scene), depth(scene)) for scene in drawn]
    assert all(match.same_spot for match in own)
    assert min(match.overlap for match in own) > 0.7
    assert max(match.distance for match in own) < 0.02
    moved = []
    for scene in scenes(40, seed=13, objects=1):
        figure = scene.objects[0]
        for place in ("left", "top right", "bottom"):
            if place != figure.place:
                elsewhere = replace(scene, objects=(replace(figure, place=place),))
                moved.append(judge_hint(draw(scene), depth(elsewhere)))
    assert not any(match.same_spot for match in moved)
    assert min(match.distance for match in moved) > 0.2


def test_hints_of_other_sizes_are_compared() -> None:
    scene = scenes(1, seed=14)[0]
    assert judge_hint(draw(scene, 128), depth(scene, 192)).same_spot
    assert judge_hint(Image.new("RGB", (96, 96), "white"), depth(scene)).distance == float("inf")
    with pytest.raises(InputError, match="hint: expected an object"):
        judge_hint(draw(scene), np.zeros((96, 96), np.float32))


# Inpainting


def test_inpainting_is_judged_in_the_hole_and_outside_it() -> None:
    rng = np.random.default_rng(15)
    for scene in scenes(20, seed=15):
        last = scene.objects[-1]
        asked = replace(last, shape=other(last.shape, SHAPES, rng))
        mask = object_mask(scene, len(scene.objects) - 1)
        wanted = Asked(asked.colour, asked.shape, asked.size, asked.place)

        right = judge_inpainting(draw(replace(scene, objects=(*scene.objects[:-1], asked))), draw(scene), mask, wanted)
        assert right.drawn
        assert right.kept_difference < 0.1

        untouched = judge_inpainting(draw(scene), draw(scene), mask, wanted)
        assert not untouched.drawn
        assert [key for key, value in untouched.verdict.items() if value is False] == ["shape"]

        brighter = Image.fromarray(np.asarray(draw(scene)) // 2)
        change = np.asarray(draw(scene)).astype(float) - np.asarray(brighter)
        kept = ~widen(mask >= 0.5, 8)
        assert judge_inpainting(brighter, draw(scene), mask, wanted).kept_difference == pytest.approx(
            change[kept].mean()
        )


def test_an_object_outside_the_hole_does_not_count() -> None:
    scene = Scene("white", "plain", (Figure("red", "star", "large", "top left"),))
    mask = np.zeros((96, 96), np.float32)
    mask[52:, 52:] = 1
    judged_one = judge_inpainting(draw(scene), draw(scene), mask, Asked("red", "star"))
    assert judged_one.verdict == {"colour": False, "shape": False, "size": None, "place": None}


def test_inpainting_of_unequal_sizes_is_refused() -> None:
    picture = draw(scenes(1, seed=16)[0])
    with pytest.raises(InputError, match=r"picture \(96, 96\), original \(96, 96\), mask \(64, 96\)"):
        judge_inpainting(picture, picture, np.zeros((96, 64), np.float32), Asked())
    with pytest.raises(InputError, match="keeps no pixel"):
        judge_inpainting(picture, picture, np.ones((96, 96), np.float32), Asked())


# Interpolation


def test_a_way_between_two_pictures_is_followed() -> None:
    first, last = (draw(scene) for scene in scenes(2, seed=17))
    way = [Image.blend(first, last, share) for share in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    path = interpolation_path(way)
    np.testing.assert_allclose(path[[0, -1]], (0, 1), atol=1e-6)
    assert (np.diff(path) > 0.1).all()
    assert is_monotone(path)
    assert not is_monotone(interpolation_path([way[i] for i in (0, 3, 1, 4, 5)]))
    assert is_monotone(interpolation_path([first, first, last, last]))


def test_a_way_needs_two_ends() -> None:
    first, last = (draw(scene) for scene in scenes(2, seed=18))
    with pytest.raises(InputError, match="three pictures or more, found 2"):
        interpolation_path([first, last])
    with pytest.raises(InputError, match="the same colours"):
        interpolation_path([first, last, first])


# Regions


def test_regions_are_those_of_a_flood() -> None:
    rng = np.random.default_rng(19)
    for density in (0.2, 0.4, 0.6):
        mask = rng.random((40, 50)) < density
        found = regions(mask, 1)
        np.testing.assert_array_equal(np.sum(found, axis=0), mask)
        for region in found:
            flooded = np.zeros_like(mask)
            flooded[tuple(np.argwhere(region)[0])] = True
            while (grown := widen(flooded, 1) & mask).sum() > flooded.sum():
                flooded = grown
            np.testing.assert_array_equal(region, flooded)
    assert all(region.sum() >= 20 for region in regions(mask, 20))
    assert regions(np.zeros((5, 5), np.bool_), 1) == []


def test_widening_is_a_maximum_filter() -> None:
    mask = np.random.default_rng(20).random((30, 40)) < 0.03
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    expected = np.asarray(picture.filter(ImageFilter.MaxFilter(7))) > 0
    np.testing.assert_array_equal(widen(mask, 3), expected)
