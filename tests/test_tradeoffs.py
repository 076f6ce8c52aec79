"""Trade-offs between quality and time: what is made of pictures, with painters whose pictures are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from kandrt.engines.errors import InputError
from kandrt.runtime import load
from kandrt.scripts.bench import tradeoffs
from kandrt.scripts.bench.tradeoffs import (
    SETTINGS,
    TIMED,
    Setting,
    Z,
    batches,
    batching,
    interval,
    judged,
    measure_tradeoffs,
    rotated,
)
from kandrt.scripts.miniature.captions import caption
from kandrt.scripts.miniature.drawing import draw
from kandrt.scripts.miniature.trials import SIDE, TextTrial, text_trials, unseen_scene


def drawn_trials(number: int) -> tuple[list[TextTrial], np.ndarray]:
    """Prompts with the very pictures that they ask for, [N, SIDE, SIDE, 3]."""
    rng = np.random.default_rng(5)
    scenes = [unseen_scene(rng)[0] for _ in range(number)]
    told = [caption(scene, rng) for scene in scenes]
    pictures = np.stack([np.asarray(draw(scene, SIDE), np.float32) / 255 for scene in scenes])
    return [TextTrial(each.text, each.request) for each in told], pictures


class Known:
    """A painter that gives pictures by seed, and says that it took so many seconds for each call."""

    def __init__(self, pictures: np.ndarray, seconds: float) -> None:
        self.pictures, self.seconds, self.calls = pictures, seconds, list[list[int]]()

    def __call__(self, _prompts: Sequence[str], seeds: Sequence[int]) -> tuple[np.ndarray, float]:
        self.calls.append(list(seeds))
        return self.pictures[list(seeds)], self.seconds


# What is made of pictures


def test_points_of_known_pictures() -> None:
    number = TIMED + 3
    trials, right = drawn_trials(number)
    off = (right * 0.5 + 0.25).astype(np.float32)  # every picture nearer to grey
    painters = {
        Setting("default", "a"): Known(right, 2.0),
        Setting("same", "b"): Known(right.copy(), 1.0),
        Setting("grey", "c"): Known(np.full_like(right, 0.5), 0.5),
        Setting("faded", "d"): Known(off, 0.25),
    }
    found = {each.technique: each for each in judged(painters, trials, lambda _text: None)}
    assert [each.seconds for each in found.values()] == [2.0, 1.0, 0.5, 0.25]
    assert all(each.pictures == number for each in found.values())
    assert found["default"].psnr is None
    assert found["same"].psnr is None
    assert found["same"].accuracy == found["default"].accuracy > 0.9  # the judge sees drawn scenes right
    assert found["grey"].accuracy < 0.5
    error = np.mean((off - right) ** 2, dtype=np.float64)
    assert found["faded"].psnr == pytest.approx(-10 * np.log10(error), abs=1e-6)
    for each in found.values():
        assert 0 <= each.low <= each.accuracy <= each.high <= 1
        assert each.high - each.low > 0


def test_every_setting_paints_the_same_seeds_and_is_timed_on_single_pictures() -> None:
    trials, right = drawn_trials(1)
    number = TIMED + 8 + 6
    trials, right = trials * number, np.repeat(right, number, axis=0)
    painters = {Setting("default", "a"): Known(right, 1.0), Setting("other", "b"): Known(right, 1.0)}
    judged(painters, trials, lambda _text: None)
    for painter in painters.values():
        warm_up, *calls = painter.calls
        assert warm_up == [0]
        assert [len(call) for call in calls] == [1] * TIMED + [8, 6]
        assert [seed for call in calls for seed in call] == list(range(number))


def test_single_pictures_then_batches() -> None:
    trials = text_trials(TIMED + 11)
    found = list(batches(trials))
    assert [len(batch) for batch, _ in found] == [1] * TIMED + [8, 3]
    assert [trial for batch, _ in found for trial in batch] == trials
    assert list(batches(trials[:2])) == [([trials[0]], range(1)), ([trials[1]], range(1, 2))]


def test_the_default_comes_first_and_no_setting_always_follows_the_same() -> None:
    settings = [Setting("t", str(i)) for i in range(5)]
    orders = [rotated(settings, turn) for turn in range(8)]
    assert all(order[0] is settings[0] for order in orders)
    assert all(sorted(each.label for each in order) == list("01234") for order in orders)
    assert {order[1].label for order in orders} == set("1234")
    assert rotated(settings[:1], 3) == settings[:1]


# Intervals


@pytest.mark.parametrize(("right", "number"), [(0, 7), (3, 20), (45, 60), (20, 20)])
def test_of_one_question_a_picture_it_is_wilsons(right: int, number: int) -> None:
    """Whose ends are where a share would be just as far from what was found as its own deviation allows."""
    low, high = interval([1] * right + [0] * (number - right), [1] * number)
    share = right / number
    for end in (low, high):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(Z * sqrt(end * (1 - end) / number), rel=1e-9)
    assert low <= share <= high


def test_answers_of_one_picture_that_agree_count_as_one() -> None:
    pictures = [4, 4, 0, 4, 0, 4, 4, 4]
    assert interval(pictures, [4] * 8) == pytest.approx(interval([p // 4 for p in pictures], [1] * 8), abs=0.02)
    spread = interval([3, 3, 2, 3, 2, 3, 4, 4], [4] * 8)  # as many right, of pictures that are alike
    assert spread[1] - spread[0] < 0.8 * (interval(pictures, [4] * 8)[1] - interval(pictures, [4] * 8)[0])


def test_intervals_hold_their_share() -> None:
    """Of many draws with a known share, about 95 % of intervals hold it; 3 deviations of 400 such trials are 3.3 %."""
    rng = np.random.default_rng(0)
    share, held = 0.8, 0
    for _ in range(400):
        each = np.clip(share + rng.normal(0, 0.1, 60), 0, 1)  # pictures differ in how hard they are
        low, high = interval(rng.binomial(6, each).tolist(), [6] * 60)
        held += low <= 0.8 <= high
    assert held / 400 > 0.95 - 0.033


# With the miniature


def short(monkeypatch: pytest.MonkeyPatch, steps: int = 2) -> None:
    """Every setting with so few steps that it only shows that it runs."""
    made = [
        Setting(each.technique, each.label, {**each.arguments, "steps": steps}, each.bundle)
        for each in SETTINGS
        if each.bundle == "miniature"
    ]
    monkeypatch.setattr(tradeoffs, "SETTINGS", (*made, *(each for each in SETTINGS if each.bundle != "miniature")))
    monkeypatch.setattr(tradeoffs, "batching", lambda *_args: [])


def test_every_setting_of_the_miniature_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    short(monkeypatch)
    told: list[str] = []
    found = measure_tradeoffs(1, 1, told.append, None, None)
    assert [(each.technique, each.setting) for each in found] == [
        (each.technique, each.label) for each in SETTINGS if each.bundle == "miniature"
    ]
    assert found[0].technique == "default"
    assert found[0].psnr is None
    assert all(each.pictures == 1 and each.seconds > 0 for each in found)
    left_out = " ".join(told)
    assert "--feature-reuse" in left_out
    assert "kandrt quantize" in left_out


def test_settings_are_told_apart() -> None:
    assert len({(each.technique, each.label) for each in SETTINGS}) == len(SETTINGS)


def test_another_bundle_is_no_miniature(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    short(monkeypatch)
    with pytest.raises(InputError, match="none of the miniature"):
        measure_tradeoffs(1, 1, lambda _text: None, bundle, None)


def test_no_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="found 0"):
        measure_tradeoffs(0, 1, lambda _text: None, None, None)


def test_batched_requests_give_the_pictures_they_give_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """At different steps, in shared evaluations; 60 dB allows for sums in another order, no more."""
    monkeypatch.setattr(tradeoffs, "JOINS", 2)
    evaluations = count()

    class Watched(tradeoffs.Batch):
        def advance(self) -> bool:
            next(evaluations)
            return super().advance()

    monkeypatch.setattr(tradeoffs, "Batch", Watched)
    monkeypatch.setattr(tradeoffs, "BASE", {"steps": 5})
    with load(threads=1) as k:
        found = batching(k, text_trials(4), lambda _text: None)
    assert [each.setting for each in found] == ["one at a time", "2 at once", "4 at once"]
    assert all(each.psnr is None or each.psnr > 60 for each in found)
    assert all(each.pictures == 4 and each.seconds > 0 for each in found)
    assert next(evaluations) < 3 * 4 * 5  # some were shared
