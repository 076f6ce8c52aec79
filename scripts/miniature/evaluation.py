"""Trials put to a painter, and the share of them that it gets right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from .captions import parse
from .judge import Score, Verdict, interpolation_path, is_monotone, judge, judge_hint, judge_inpainting, tally
from .seeing import look
from .sheet import Cell
from .trials import BATCH, PATH, Painter, hint_trials, inpaint_trials, path_trials, text_trials

# Shares that the shipped weights are to reach on held-out combinations
GOALS: Mapping[str, float] = {
    "background": 0.95,
    "colour": 0.90,
    "shape": 0.85,
    "place": 0.85,
    "ControlNet: object where the hint says": 0.90,
    "inpainting: object drawn": 0.80,
    "interpolation: monotone": 0.90,
}
MARGIN = 16  # pixels around a hole in which cells of the latents are repainted in part
KEPT_LEVELS = 2.0  # how far kept pixels may be off on average, of 255


@dataclass
class Evaluation:
    """Scores by name, the mean difference of kept pixels where something was inpainted, and pictures with prompts."""

    scores: dict[str, Score] = field(default_factory=dict)
    kept_difference: float | None = None
    cells: list[Cell] = field(default_factory=list)

    def met(self) -> bool:
        """Whether every goal that was measured is reached."""
        reached = all(self.scores[name].accuracy >= goal for name, goal in GOALS.items() if name in self.scores)
        return reached and (self.kept_difference is None or self.kept_difference <= KEPT_LEVELS)


Advance = Callable[[str, int], None]


def evaluate(
    painter: Painter,
    pictures: int,
    *,
    modes: tuple[str, ...] = ("text", "controlnet", "inpaint", "interpolation"),
    seed: int = 0,
    advance: Advance = lambda *_: None,
) -> Evaluation:
    """Judge `pictures` pictures a mode, of interpolation a quarter as many paths; `advance` counts them."""
    result = Evaluation()
    for mode in modes:
        MODES[mode](painter, pictures, seed, result, advance)
    return result


def text(painter: Painter, pictures: int, seed: int, result: Evaluation, advance: Advance) -> None:
    """Score every attribute, and how often all that a prompt asks is right."""
    trials = text_trials(pictures, seed)
    verdicts: list[Verdict] = []
    for start in range(0, pictures, BATCH):
        batch = trials[start : start + BATCH]
        painted = painter.paint([trial.prompt for trial in batch], range(start, start + len(batch)))
        for trial, picture in zip(batch, painted, strict=True):
            verdicts.append(judge(picture, trial.request))
            result.cells.append(Cell((picture,), told(trial.prompt, verdicts[-1])))
        advance("text", len(batch))
    result.scores |= {name: score for name, score in tally(verdicts).items() if score.asked}
    result.scores["all of a prompt"] = share([False not in verdict.values() for verdict in verdicts])


def controlnet(painter: Painter, pictures: int, seed: int, result: Evaluation, advance: Advance) -> None:
    """Score whether objects are where the hint has them."""
    trials, right = hint_trials(pictures, seed), []
    for start in range(0, pictures, BATCH):
        batch = trials[start : start + BATCH]
        prompts, hints = [trial.prompt for trial in batch], [trial.hint for trial in batch]
        painted = painter.follow(prompts, hints, range(start, start + len(batch)))
        right += [judge_hint(picture, hint).same_spot for picture, hint in zip(painted, hints, strict=True)]
        advance("controlnet", len(batch))
    result.scores["ControlNet: object where the hint says"] = share(right)


def inpaint(painter: Painter, pictures: int, seed: int, result: Evaluation, advance: Advance) -> None:
    """Score whether the object that is asked is in the hole, and measure what became of the rest."""
    right, kept = [], []
    for i, trial in zip(count(), inpaint_trials(pictures, seed)):
        painted, restored = painter.repaint(trial.prompt, trial.image, trial.mask, i)
        found = judge_inpainting(painted, restored, trial.mask, trial.asked, margin=MARGIN)
        right.append(found.drawn)
        kept.append(found.kept_difference)
        advance("inpaint", 1)
    result.scores["inpainting: object drawn"] = share(right)
    result.kept_difference = float(np.mean(kept))


def interpolation(painter: Painter, pictures: int, seed: int, result: Evaluation, advance: Advance) -> None:
    """Score whether colours go one way from the first prompt's background to the second's."""
    right, ends = [], []
    shares = np.linspace(0, 1, PATH).tolist()
    for i, trial in zip(count(), path_trials(max(pictures // 4, 1), seed)):
        painted = painter.between(trial.first, trial.second, shares, i)
        for picture, prompt in ((painted[0], trial.first), (painted[-1], trial.second)):
            request = parse(prompt)
            ends.append(request is not None and look(picture).background == request.background)
        # a path between ends that look alike goes nowhere
        differ = look(painted[0]).background != look(painted[-1]).background
        right.append(differ and is_monotone(interpolation_path(painted)))
        advance("interpolation", PATH)
    result.scores["interpolation: monotone"] = share(right)
    result.scores["interpolation: background of the ends"] = share(ends)


MODES: Mapping[str, Callable[[Painter, int, int, Evaluation, Advance], None]] = {
    "text": text,
    "controlnet": controlnet,
    "inpaint": inpaint,
    "interpolation": interpolation,
}


def share(right: list[bool]) -> Score:
    """A score of plain yes and no."""
    return Score(sum(right), len(right))


def told(prompt: str, verdict: Verdict) -> str:
    """A prompt with what is wrong in its picture."""
    wrong = [name for name, value in verdict.items() if value is False]
    return f"{prompt} [{', '.join(wrong)}]" if wrong else prompt
