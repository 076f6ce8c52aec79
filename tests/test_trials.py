"""The evaluation of the miniature: a painter that does what it is told scores everything, one that does not fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from kandrt.scripts.miniature.captions import Request, parse
from kandrt.scripts.miniature.drawing import FLOOR, draw
from kandrt.scripts.miniature.evaluation import GOALS, MODES, evaluate
from kandrt.scripts.miniature.trials import (
    SIDE,
    hint_trials,
    inpaint_trials,
    path_trials,
    text_trials,
)
from kandrt.scripts.miniature.world import Figure, Scene, combination_held_out, held_out, random_scene, relation


def scene_for(request: Request, rng: np.random.Generator) -> Scene:
    """A scene that shows what is asked."""
    while True:
        scene = random_scene(rng, count=len(request.objects))
        objects = [
            replace(figure, **{k: v for k, v in vars(asked).items() if v is not None})
            for figure, asked in zip(scene.objects, request.objects, strict=True)
        ]
        colours = [request.background or scene.background, *(figure.colour for figure in objects)]
        if len(set(colours)) < len(colours):
            continue
        if request.relation is not None and relation(objects[0], objects[1]) != request.relation:
            continue
        if len(objects) == 2 and objects[0].place == objects[1].place:
            continue
        return Scene(colours[0], request.texture or scene.texture, tuple(objects))


class Faithful:
    """Paints what is asked; where a hint has its object it paints one of any kind."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def scene(self, prompt: str) -> Scene:
        request = parse(prompt)
        assert request is not None, prompt
        return scene_for(request, self.rng)

    def paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        assert len(prompts) == len(seeds)
        return [draw(self.scene(prompt), SIDE) for prompt in prompts]

    def follow(self, prompts: Sequence[str], hints: Sequence[np.ndarray], seeds: Sequence[int]) -> list[Image.Image]:
        return [
            Image.fromarray(np.where(hint[..., None] > FLOOR + 0.2, (222, 42, 46), (248, 248, 246)).astype(np.uint8))
            for hint in hints
        ]

    def repaint(self, prompt: str, image: Image.Image, mask: np.ndarray, seed: int) -> tuple[Image.Image, Image.Image]:
        inside = np.asarray(draw(self.scene(prompt), SIDE))
        painted = np.where(mask[..., None] > 0.5, inside, np.asarray(image))
        return Image.fromarray(painted), image

    def between(self, first: str, second: str, shares: Sequence[float], seed: int) -> list[Image.Image]:
        ends = [np.asarray(draw(self.scene(prompt), SIDE), np.float32) for prompt in (first, second)]
        return [Image.fromarray(((1 - s) * ends[0] + s * ends[1]).astype(np.uint8)) for s in shares]


class Careless(Faithful):
    """Paints one and the same picture, whatever is asked."""

    def scene(self, prompt: str) -> Scene:
        return Scene("red", "checked", (Figure("white", "ring", "small", "top left"),))

    def follow(self, prompts: Sequence[str], hints: Sequence[np.ndarray], seeds: Sequence[int]) -> list[Image.Image]:
        return self.paint(prompts, seeds)


class Jumping(Faithful):
    """Goes to and fro between the two prompts."""

    def between(self, first: str, second: str, shares: Sequence[float], seed: int) -> list[Image.Image]:
        return super().between(first, second, [s if i % 2 else 1 - s for i, s in enumerate(shares)], seed)


def test_a_faithful_painter_meets_every_goal() -> None:
    result = evaluate(Faithful(), 40)
    # the judge itself is right in 99 % of clean pictures
    assert all(score.accuracy >= 0.95 for score in result.scores.values()), result.scores
    assert set(GOALS) <= set(result.scores)
    assert result.met()
    assert result.kept_difference == 0


def test_a_careless_painter_meets_none() -> None:
    result = evaluate(Careless(), 40)
    assert not result.met()
    missed = [name for name, goal in GOALS.items() if name in result.scores and result.scores[name].accuracy < goal]
    assert missed == [name for name in GOALS if name in result.scores]


def test_going_back_is_not_monotone() -> None:
    assert evaluate(Jumping(), 8, modes=("interpolation",)).scores["interpolation: monotone"].accuracy == 0


@pytest.mark.parametrize("mode", MODES)
def test_pictures_are_counted(mode: str) -> None:
    seen: list[tuple[str, int]] = []
    evaluate(Faithful(), 9, modes=(mode,), advance=lambda name, count: seen.append((name, count)))
    assert {name for name, _ in seen} == {mode}
    assert sum(count for _, count in seen) == (9 if mode != "interpolation" else 2 * 7)


def test_trials_ask_for_what_training_never_showed() -> None:
    for text in text_trials(20):
        assert parse(text.prompt) == text.request
        for asked in text.request.objects:
            assert combination_held_out(str(asked.colour), str(asked.shape), str(text.request.background))
    assert {len(text.request.objects) for text in text_trials(20)} == {1, 2}
    for trial in inpaint_trials(20):
        request = parse(trial.prompt)
        assert request is not None
        (asked,) = request.objects
        assert asked.colour == trial.asked.colour
        whole = Scene(str(request.background), "plain", (Figure(str(asked.colour), str(asked.shape), "large", "top"),))
        assert held_out(whole)


def test_trials_depend_on_their_seed_alone() -> None:
    assert text_trials(5) == text_trials(9)[:5]
    assert text_trials(5, seed=1) != text_trials(5)
    assert path_trials(3) == path_trials(3)
    for one, other in zip(hint_trials(2), hint_trials(2), strict=True):
        assert one.prompt == other.prompt
        assert np.array_equal(one.hint, other.hint)
