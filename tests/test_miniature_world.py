"""The miniature's world: what is drawn is what the scene says, and what is said is what can be read back."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kandrt.engines.errors import InputError
from kandrt.scripts.miniature.captions import (
    PREFIXES,
    Asked,
    Request,
    caption,
    choose,
    everything,
    parse,
    phrase,
)
from kandrt.scripts.miniature.drawing import FLOOR, TABLE, coverage, depth, draw, draw_array, texture_field
from kandrt.scripts.miniature.masks import object_mask, random_mask
from kandrt.scripts.miniature.shapes import DISTANCES, ROUND, signed_distance
from kandrt.scripts.miniature.world import (
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Figure,
    Scene,
    held_out,
    random_scene,
    relation,
)


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


def one(colour: str = "red", shape: str = "circle", size: str = "large", place: str = "centre") -> Scene:
    return Scene("blue", "plain", (Figure(colour, shape, size, place),))


# Weights are trained on one side of the split: these must never change sides.
HELD_OUT = {
    "blue": [
        "orange square",
        "orange star",
        "yellow square",
        "yellow diamond",
        "green star",
        "purple circle",
        "purple ring",
        "white cross",
        "white ring",
    ],
    "white": [
        "orange diamond",
        "yellow star",
        "yellow cross",
        "blue triangle",
        "blue star",
        "purple circle",
        "purple star",
        "purple heart",
        "pink cross",
    ],
}


# Scenes


def test_scenes_follow_from_the_seed_and_use_every_word() -> None:
    drawn = scenes(600)
    assert drawn == scenes(600) != scenes(600, seed=1)
    figures = [figure for scene in drawn for figure in scene.objects]
    assert {scene.background for scene in drawn} == set(COLOURS) == {figure.colour for figure in figures}
    assert {scene.texture for scene in drawn} == set(TEXTURES)
    for name, table in (("shape", SHAPES), ("size", tuple(SIZES)), ("place", tuple(PLACES))):
        counts = Counter(getattr(figure, name) for figure in figures)
        # Of about 800 draws: each word between half and twice its equal share, over 5 standard deviations
        assert all(0.5 < counts[word] * len(table) / len(figures) < 2 for word in table), counts
    assert 0.25 < sum(len(scene.objects) == 2 for scene in drawn) / 600 < 0.45


def test_objects_lie_within_the_picture_and_apart() -> None:
    for scene in scenes(150, seed=2):
        covers = [coverage(figure) for figure in scene.objects]
        for cover in covers:
            assert not cover[[0, -1]].any()
            assert not cover[:, [0, -1]].any()
        if len(covers) == 2:
            first, second = (np.argwhere(cover > 0) for cover in covers)
            distances = np.abs(first[:, None] - second[None]).max(axis=2)
            assert distances.min() >= 3  # two free pixels between them


def test_a_scene_that_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(InputError, match=r"colour is 'teal', expected one of red, .*; object: shape is 'blob'"):
        Figure("teal", "blob", "large", "left")
    with pytest.raises(InputError, match="found 1 with red on red"):
        Scene("red", "plain", (Figure("red", "circle", "large", "left"),))
    with pytest.raises(InputError, match="found 0 with no colours on red"):
        Scene("red", "plain", ())


def test_one_combination_in_ten_is_held_out_and_training_still_has_every_pair_of_words() -> None:
    held = {
        (colour, shape, background): held_out(Scene(background, "plain", (Figure(colour, shape, "small", "top"),)))
        for colour in COLOURS
        for shape in SHAPES
        for background in COLOURS
        if colour != background
    }
    assert 0.05 < sum(held.values()) / len(held) < 0.15
    trained = [words for words, out in held.items() if not out]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(words[i], words[j]) for words in trained} == {(words[i], words[j]) for words in held}


def test_the_split_is_fixed() -> None:
    figures = {
        background: [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if colour != background and held_out(
            Scene(background, "striped", (Figure(colour, shape, "large", "left"),)))]
        for background in ("blue", "white")
    }  # fmt: skip
    assert figures == HELD_OUT


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_random_scenes_keep_to_their_side_of_the_split(split: str) -> None:
    rng = np.random.default_rng(3)
    assert {held_out(random_scene(rng, split)) for _ in range(50)} == {split == "held-out"}  # type: ignore[arg-type]


# Drawing


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_distances(shape: str) -> None:
    """The gradient of a distance has length 1 (the eikonal equation), but on the few lines where it has a kink."""
    axis = np.linspace(-0.7, 0.7, 281, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    distance = signed_distance(shape, x, y)
    assert distance.dtype == np.float32
    slope = np.hypot(*np.gradient(distance, axis[1] - axis[0]))
    assert np.mean(np.abs(slope - 1) < 0.02) > 0.95
    assert (distance < 0)[np.abs(x) + np.abs(y) > 1.1].sum() == 0
    np.testing.assert_array_equal(distance, distance[:, ::-1])
    # The distance that it claims is the one to the nearest pixel of the other side, to a pixel. Corners are rounded by
    # growing, r: of the distance inside to a corner that points inwards, up to (sqrt 2 - 1) r is lost.
    step = float(axis[1] - axis[0])
    inside, outside = np.argwhere(distance < 0), np.argwhere(distance >= 0)
    for own, others, tolerance in ((inside, outside, 1.5 * step + 0.42 * ROUND), (outside, inside, 1.5 * step)):
        for i, j in own[:: len(own) // 40]:
            to_others = np.sqrt(((others - (i, j)) ** 2).sum(axis=1)).min() * step
            assert abs(abs(float(distance[i, j])) - to_others) < tolerance


def test_areas_are_those_of_the_formulas() -> None:
    side = 256
    for shape, area in (
        ("circle", math.pi * 0.46**2),
        ("ring", math.pi * (0.46**2 - 0.23**2)),
        ("square", 0.81**2 - (4 - math.pi) * 0.025**2),
    ):
        covered = float(coverage(Figure("red", shape, "large", "centre"), side).sum()) / side**2
        assert covered / SIZES["large"] ** 2 == pytest.approx(area, rel=0.005)


def test_edges_are_smoothed_as_by_supersampling() -> None:
    for scene in scenes(30, seed=4):
        fine = Image.fromarray(draw_array(scene, 96 * 6)).resize((96, 96), Image.Resampling.BOX)
        difference = np.abs(draw_array(scene).astype(int) - np.asarray(fine).astype(int))
        # On average a level; at single corners, where a distance is no area, a quarter of full contrast
        assert difference.mean() < 1
        assert difference.max() < 64


@pytest.mark.parametrize("side", [32, 96, 128, 200])
def test_any_side_can_be_drawn(side: int) -> None:
    scene = scenes(1, seed=5)[0]
    assert draw(scene, side).size == (side, side)
    assert draw(scene, side).mode == "RGB"
    for array in (depth(scene, side), coverage(scene.objects[0], side), object_mask(scene, 0, side)):
        assert array.shape == (side, side)
        assert array.dtype == np.float32


def test_drawing_twice_gives_the_same_picture() -> None:
    scene = scenes(1, seed=6)[0]
    first = draw_array(scene)
    np.testing.assert_array_equal(first, draw_array(scene))


def test_colours_are_those_of_the_table() -> None:
    for colour, (base, _) in COLOURS.items():
        other = "white" if colour == "black" else "black"
        picture = draw_array(Scene(colour, "plain", (Figure(other, "square", "small", "top left"),)))
        assert tuple(picture[-1, -1]) == base
        picture = draw_array(Scene(other, "plain", (Figure(colour, "square", "large", "centre"),)))
        assert np.abs(picture[44:52, 44:52].mean(axis=(0, 1)) - base).max() < 12  # shading, 3 % of lightness there


def test_textures_cover_a_good_part_and_differ() -> None:
    fields = {name: texture_field(name, 96) for name in TEXTURES[1:]}
    for field in fields.values():
        assert 0.2 < field.mean() < 0.6
        assert field.min() < 0.02
        assert field.max() > 0.98
    correlations = np.corrcoef([field.ravel() for field in fields.values()])
    assert np.abs(correlations - np.eye(len(fields))).max() < 0.6
    assert not texture_field("plain", 96).any()


# Hints and masks


def test_hints_show_the_objects_nearer_than_the_floor() -> None:
    for scene in scenes(60, seed=7):
        relief = depth(scene)
        cover = np.max([coverage(figure) for figure in scene.objects], axis=0)
        assert relief.min() == pytest.approx(FLOOR)
        assert relief.max() <= 1
        near, covered = relief > (FLOOR + TABLE) / 2, cover > 0.5
        assert (near & covered).sum() / (near | covered).sum() > 0.95
        assert relief[cover >= 1].min() > (FLOOR + TABLE) / 2


def test_object_masks_hold_their_object_and_spare_the_other() -> None:
    rng = np.random.default_rng(8)
    for scene in scenes(60, seed=8):
        for i, figure in enumerate(scene.objects):
            plain, random = object_mask(scene, i), object_mask(scene, i, rng=rng)
            for mask in (plain, random):
                assert set(np.unique(mask)) == {0.0, 1.0}
                assert (mask >= coverage(figure)).all()
            for other in scene.objects[:i] + scene.objects[i + 1 :]:
                assert (plain * coverage(other)).sum() < 0.1 * coverage(other).sum()


def test_random_masks_are_regions_of_all_extents() -> None:
    rng = np.random.default_rng(9)
    shares = [float(random_mask(rng).mean()) for _ in range(200)]
    assert {float(value) for value in np.unique(random_mask(rng))} <= {0.0, 1.0}
    assert np.percentile(shares, 10) < 0.15 < 0.5 < np.percentile(shares, 90)
    assert max(shares) == 1


# Captions


def test_what_is_said_can_be_read_back() -> None:
    rng = np.random.default_rng(10)
    said = [caption(scene, rng) for scene in scenes(1500, seed=10)]
    for one_caption in said:
        assert parse(one_caption.text) == one_caption.request, one_caption
        assert phrase(one_caption.request).count(" background") <= 1
        assert parse(phrase(one_caption.request)) == one_caption.request
    assert len({one_caption.text for one_caption in said}) > 1200
    assert max(len(one_caption.text.split()) for one_caption in said) < 30  # a text encoder takes 77 tokens


def test_what_is_said_is_true() -> None:
    rng = np.random.default_rng(11)
    for scene in scenes(500, seed=11):
        request = choose(scene, rng)
        assert request.background in (scene.background, None)
        assert request.texture in (scene.texture, None)
        orders = [scene.objects, scene.objects[::-1]]
        true = [
            all(
                getattr(asked, name) in (getattr(figure, name), None)
                for asked, figure in zip(request.objects, figures, strict=True)
                for name in ("colour", "shape", "size", "place")
            )
            and (request.relation is None or request.relation == relation(*figures))
            for figures in orders
        ]
        assert any(true)


def test_everything_is_left_out_at_times() -> None:
    rng = np.random.default_rng(12)
    requests = [choose(scene, rng) for scene in scenes(500, seed=12)]
    for name in ("background", "texture"):
        assert 0.05 < np.mean([getattr(request, name) is None for request in requests]) < 0.5
    objects = [asked for request in requests for asked in request.objects]
    for name in ("colour", "shape", "size", "place"):
        assert 0.03 < np.mean([getattr(asked, name) is None for asked in objects]) < 0.7
    assert {request.relation for request in requests} == {None, *RELATIONS}


RED_CIRCLE, BLUE_SQUARE = Asked("red", "circle"), Asked("blue", "square")


@pytest.mark.parametrize(
    ("prompt", "request_"),
    [
        ("a large red circle on a blue background", Request((Asked("red", "circle", "large"),), "blue", "plain")),
        (
            "a small green star in the top left on a striped yellow background",
            Request((Asked("green", "star", "small", "top left"),), "yellow", "striped"),
        ),
        (
            "a red circle left of a blue square on white",
            Request((RED_CIRCLE, BLUE_SQUARE), "white", "plain", "left of"),
        ),
        ("A Red circle, above a blue square.", Request((RED_CIRCLE, BLUE_SQUARE), relation="above")),
        ("the red circle and one blue square", Request((RED_CIRCLE, BLUE_SQUARE))),
        (
            "a huge star against a yellow checkered background",
            Request((Asked(None, "star", "large"),), "yellow", "checked"),
        ),
        ("an image of a shape on a dotted background", Request((Asked(),), None, "dotted")),
        ("a red circle on the left on blue", Request((Asked("red", "circle", None, "left"),), "blue", "plain")),
        ("a gradient pink background with a red circle", Request((RED_CIRCLE,), "pink", "gradient")),
    ],
)  # fmt: skip
def test_prompts_are_read(prompt: str, request_: Request) -> None:
    assert parse(prompt) == request_


@pytest.mark.parametrize(
    "prompt",
    ["", "a cat", "a red circle on", "a red circle on a background", "a red circle on a teal background", "red",
     "a red circle left of a blue square at the top", "three red circles", "a red circle on blue on green"],
)  # fmt: skip
def test_other_prompts_are_not_read(prompt: str) -> None:
    assert parse(prompt) is None


def test_the_usual_words() -> None:
    scene = Scene("yellow", "striped", (Figure("orange", "star", "small", "top left"),))
    assert phrase(everything(scene)) == "a small orange star in the top left on a striped yellow background"
    request = Request((Asked("orange", "ring"), Asked("red", None, "large")), "blue", "plain", "right of")
    assert phrase(request) == "an orange ring right of a large red shape on a blue background"
    assert phrase(Request((Asked(),))) == "a shape"


def test_captions_vary() -> None:
    rng = np.random.default_rng(13)
    request = everything(one())
    texts = {phrase(request, rng) for _ in range(300)}
    assert len(texts) > 20
    assert any(text.startswith(PREFIXES) for text in texts)


def test_a_request_that_no_prompt_can_make_is_refused() -> None:
    for objects, words, message in (
        ((), {}, "expected one or two objects, found 0"),
        ((Asked(),), {"background": "blue"}, "needs a texture"),
        ((Asked(),), {"relation": "above"}, "takes two objects without places"),
        ((Asked(), Asked(place="top")), {"relation": "above"}, "takes two objects without places"),
        ((Asked(),), {"texture": "furry"}, "texture is 'furry', expected one of plain"),
    ):
        with pytest.raises(InputError, match=message):
            Request(objects, **words)
    with pytest.raises(InputError, match="size is 'vast'"):
        Asked(size="vast")


# The sheet


@pytest.mark.parametrize("options", [[], ["--hints"]])
def test_the_sheet_is_written(tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "kandrt.scripts.miniature", "--rows", "2", "--columns", "2", "--side", "64"]
    done = subprocess.run([*command, "-o", str(tmp_path / "sheet.png"), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 64 * (3 if options else 1)
        assert len(sheet.convert("RGB").getcolors(100_000) or []) > 50
    wrong = subprocess.run([*command, "-o", str(tmp_path / "sheet.txt")], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "suffix must be one of" in wrong.stderr


def test_every_shape_has_an_outline() -> None:
    assert tuple(DISTANCES) == SHAPES
