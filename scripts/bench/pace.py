"""How much of what is asked there is time for: rounds, and of long cases steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from .cases import Case

Clock = Callable[[], float]

# A run before those that count makes kernels for the shapes and reads weights: of many steps, these will do. Two of the
# prior, since UnCLIP's scheduler in diffusers divides by their number less one.
WARM_STEPS, WARM_PRIOR_STEPS = 1, 2
LEAST_STEPS = 5  # that a budget leaves of a case
UNKNOWN = 1.5  # times the baseline's, where nothing is known of a contender's speed


@dataclass(frozen=True)
class Deadline:
    """A time by `clock` at which work should be done; at None there is all the time in the world."""

    at: float | None
    clock: Clock = time.perf_counter

    @classmethod
    def after(cls, seconds: float | None, clock: Clock = time.perf_counter) -> Deadline:
        """So many seconds from now."""
        return cls(None if seconds is None else clock() + seconds, clock)

    @property
    def left(self) -> float | None:
        """Seconds from now, 0 where it has passed."""
        return None if self.at is None else max(0.0, self.at - self.clock())

    def share(self, own: float, others: float = 0.0) -> Deadline:
        """The deadline of a piece of work that has `own` of the time left, of which others still get `others`."""
        left = self.left
        return self if left is None else Deadline(self.clock() + left * own / (own + others), self.clock)

    def rounds(self, most: int, least: int = 1) -> Iterator[int]:
        """Numbers of the rounds that there is time for: `least` in any case, others if they would end in time."""
        longest = 0.0
        for i in range(most):
            start = self.clock()
            if i >= least and self.at is not None and start + longest > self.at:
                return
            yield i
            longest = max(longest, self.clock() - start)


def warm_up_steps(case: Case) -> tuple[int, int]:
    """Steps of the decoder and of the prior of a run before those that count; one of image-to-image's is run."""
    share = case.strength if case.stage == "image-to-image" else 1.0
    return min(case.steps, ceil(WARM_STEPS / share)), min(case.prior_steps, WARM_PRIOR_STEPS)


def warm_up_text(case: Case) -> str:
    """What such a run consists of, "" where it is a whole one."""
    steps, prior_steps = warm_up_steps(case)
    told = [f"{prior_steps} steps of the prior"] if case.runs_prior and prior_steps < case.prior_steps else []
    if case.runs_decoder and steps < case.steps:
        share = case.strength if case.stage == "image-to-image" else 1.0
        run = int(steps * share)
        told.append(f"{run} step{'s' * (run != 1)} of the decoder")
    return "" if case.opens else " and ".join(told)


def affordable_steps(case: Case, left: float | None, step: Sequence[float], rest: float) -> int:
    """As many of the case's steps as one round of all contenders has time for, LEAST_STEPS at the least.

    step: seconds of a step, of every run of a round; rest: seconds of all else in a round.
    """
    if left is None or not case.runs_decoder:
        return case.steps
    share = case.strength if case.stage == "image-to-image" else 1.0
    most = int((left - rest) / max(sum(step) * share, 1e-9))
    return min(case.steps, max(most, LEAST_STEPS))
