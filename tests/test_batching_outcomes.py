"""How requests of a batch end: with networks that are real, with errors of their own, cancelled, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kandrt.engines.errors import BackendError, InputError, NumericalError
from kandrt.runtime import Batch, Embeds, Kandinsky, Result, load

from .oracle import Broken, box, picture, without_networks
from .test_batching import BROKEN, SIZE, Arguments, Picture, Step, compare, embeds, faked, run

# An engine may sum in another order for another number of rows, which float32 rounds otherwise; none was seen to here.
TOLERANCE = 1e-5
PROMPT = "a large red circle on a blue background"
OTHER = "two small yellow stars on a white background"


@pytest.fixture(scope="module")
def miniature() -> Iterator[Kandinsky]:
    with load(threads=1) as k:
        yield k


# Real networks

REQUESTS: dict[str, list[tuple[str, Arguments]]] = {
    "prompts": [
        (PROMPT, {"steps": 5, "seed": 3}),
        (OTHER, {"steps": 3, "seed": 4, "scheduler": "ddim", "guidance_interval": (0.3, 0.7)}),
        (PROMPT, {"steps": 4, "seed": [5, 6], "count": 2, "scheduler": "dpmpp-2m", "guidance_scale": 2.0}),
        (OTHER, {"steps": 2, "seed": 7, "guidance_scale": 1.0, "negative_prompt": "a circle"}),
    ],
    "pictures": [
        (PROMPT, {"steps": 5, "seed": 3}),
        (OTHER, {"steps": 6, "seed": 4, "image": picture(128, 128), "strength": 0.7}),
        (PROMPT, {"steps": 4, "seed": 5, "image": picture(128, 128, 1), "mask": box(128, 128, 0.2, 0.3, 0.8, 0.9)}),
        (OTHER, {"steps": 3, "seed": 6, "image": picture(128, 128, 2), "mask": box(128, 128, 0, 0, 0.5, 1)}),
        (PROMPT, {"steps": 3, "seed": 7, "hint": np.asarray(picture(128, 128, 4), np.float32) / 255}),
    ],
    "sizes": [
        (PROMPT, {"steps": 3, "seed": 3}),
        (OTHER, {"steps": 2, "seed": 4, "height": 64, "width": 192}),
        (PROMPT, {"steps": 2, "seed": 5, "height": 128, "width": 128}),
    ],
}


@pytest.mark.parametrize("case", REQUESTS)
def test_pictures_are_those_of_each_request_alone(miniature: Kandinsky, case: str) -> None:
    """Each joins when those before it are under way."""
    alone = [miniature(prompt, prior_steps=2, **settings) for prompt, settings in REQUESTS[case]]
    batch, tickets = Batch(miniature, most_rows=7), []
    for prompt, settings in REQUESTS[case]:
        tickets.append(batch.submit(prompt, prior_steps=2, **settings))
        batch.advance()
    for ticket, expected in zip(tickets, alone, strict=True):
        compare(ticket.result(), expected, TOLERANCE)
    assert not batch.advance()


def test_kandinsky_2_1(bundle_2_1: Path) -> None:
    """Its decoder reads the prompt too."""
    own = Embeds(*np.random.default_rng(1).standard_normal((2, 1, 48), np.float32))
    with load(bundle_2_1, threads=1) as k:
        batch = Batch(k)
        tickets = [
            batch.submit("a cat", prior_steps=2, steps=3, seed=1, **SIZE),
            batch.submit(own, prompt="a dog", steps=2, seed=2, **SIZE),
            batch.submit(embeds=own, prompt="a dog", steps=4, seed=3, **SIZE),
        ]
        alone = [
            k("a cat", prior_steps=2, steps=3, seed=1, **SIZE),
            k.decoder(own, prompt="a dog", steps=2, seed=2, **SIZE),
            k.decoder(own, prompt="a dog", steps=4, seed=3, **SIZE),
        ]
        for ticket, expected in zip(tickets, alone, strict=True):
            compare(ticket.result(), expected, TOLERANCE)


def test_kandinsky_3(bundle_3: Path) -> None:
    """Prompts of several lengths, one given as states, share evaluations."""
    with load(bundle_3, threads=1) as k:
        requests: list[Arguments] = [
            {"prompt": "a red cat", "steps": 4, "seed": 1},
            {"prompt": "a dog on a mat, photographed from above", "steps": 2, "seed": 2, "guidance_interval": (0, 0.5)},
            {**vars(k.encode_prompt("a house", "a tree")), "steps": 3, "seed": 3},
        ]
        alone = [k(**request, **SIZE) for request in requests]
        batch, advances = Batch(k), 1
        tickets = [batch.submit(**request, **SIZE) for request in requests]
        while batch.advance():
            advances += 1
        assert advances == 4
        for ticket, expected in zip(tickets, alone, strict=True):
            compare(ticket.result(), expected, TOLERANCE)


# Errors of one request


def test_nan_ends_one_request_alone() -> None:
    """It comes after a step; others of the evaluation, before and after it, know nothing of it."""
    batch, alone = Batch(faked()), faked()
    whole = [batch.submit(embeds(i), steps=4, seed=i, **SIZE) for i in range(2)]
    broken = batch.submit(embeds(8, first=BROKEN), steps=3, seed=8, **SIZE)
    whole.append(batch.submit(embeds(2), steps=4, seed=2, guidance_scale=1.0, **SIZE))
    run(batch, broken, *whole)
    message = r"^decoder: step 2 of 3 \(timestep 334\): the network's output holds NaN"
    for _ in range(2):
        with pytest.raises(NumericalError, match=message):
            broken.result()
    with pytest.raises(NumericalError, match=message):
        alone.decoder(embeds(8, first=BROKEN), steps=3, seed=8, **SIZE)
    for i, ticket in enumerate(whole):
        scale = 1.0 if i == 2 else 4.0
        compare(ticket.result(), alone.decoder(embeds(i), steps=4, seed=i, guidance_scale=scale, **SIZE))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("movq_decoder", "^movq decoder: decoded picture: .* are NaN"),
        ("movq_encoder", "^movq encoder: the network's output holds NaN"),
        ("decoder_context", r"^decoder: step 1 of 2 \(timestep"),
    ],
)
def test_nan_before_and_after_the_steps(name: str, message: str) -> None:
    """Of the first request; the network then works."""

    class Once(Broken):
        def __call__(self, **arrays: Any) -> dict[str, Any]:
            found = super().__call__(**arrays)
            self.call = len(self.calls) + 1
            return found

    fake = faked()._components[name]
    batch = Batch(faked(**{name: Once(fake)}))
    requests: list[Arguments] = [{"image": picture(64, 64), "strength": 1.0, "steps": 2, "seed": i} for i in range(2)]
    first, second = (batch.submit(embeds(i), **request) for i, request in enumerate(requests))
    run(batch, first, second)
    with pytest.raises(NumericalError, match=message):
        first.result()
    compare(second.result(), faked().decoder(embeds(1), **requests[1]))


def test_what_a_callback_raises_ends_its_request() -> None:
    class EnoughError(Exception):
        pass

    def stop(_: str, done: int, *__: Any) -> None:
        if done == 2:
            raise EnoughError

    step = Step()
    batch = Batch(faked(decoder_step=step))
    stopped = batch.submit(embeds(1), steps=5, seed=1, callback=stop, **SIZE)
    other = batch.submit(embeds(2), steps=4, seed=2, **SIZE)
    compare(other.result(), faked().decoder(embeds(2), steps=4, seed=2, **SIZE))
    with pytest.raises(EnoughError):
        stopped.result()
    assert [shape[0] for shape in step.shapes] == [4, 4, 2, 2]


def test_an_interrupt_is_the_callers_too() -> None:
    """It ends the request whose callback it came in; the batch goes on where it is advanced again."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    batch = Batch(faked())
    stopped = batch.submit(embeds(1), steps=3, seed=1, callback=stop, **SIZE)
    other = batch.submit(embeds(2), steps=3, seed=2, **SIZE)
    with pytest.raises(KeyboardInterrupt):
        batch.advance()
    assert (stopped.done, other.done) == (True, False)
    compare(other.result(), faked().decoder(embeds(2), steps=3, seed=2, **SIZE))


def test_what_ends_an_evaluation_ends_those_in_it() -> None:
    """No other one does: of another size, or submitted later."""
    batch = Batch(faked(decoder_step=Step(fails_at=(2,))))
    both = [batch.submit(embeds(i), steps=3, seed=i, **SIZE) for i in range(2)]
    wide = batch.submit(embeds(2), steps=2, seed=2, height=64, width=128)
    run(batch, *both, wide)
    for ticket in both:
        with pytest.raises(BackendError, match="no memory for so many rows"):
            ticket.result()
    later = batch.submit(embeds(0), steps=3, seed=0, **SIZE)
    compare(later.result(), faked().decoder(embeds(0), steps=3, seed=0, **SIZE))
    compare(wide.result(), faked().decoder(embeds(2), steps=2, seed=2, height=64, width=128))


# Cancelling, callbacks


def test_cancelling() -> None:
    """What waits is never begun, what runs takes no more steps, and what is done stays so."""
    step = Step()
    batch = Batch(faked(decoder_step=step), most_rows=2)
    running, waiting, last = (batch.submit(embeds(i), steps=3, seed=i, **SIZE) for i in range(3))
    batch.advance()
    running.cancel()
    waiting.cancel()
    result = last.result()
    last.cancel()
    assert isinstance(last.result(), Result)
    assert last.result() is result
    for ticket in (running, waiting):
        assert ticket.done
        with pytest.raises(CancelledError):
            ticket.result()
    assert len(step.shapes) == 1 + 3


def test_callbacks() -> None:
    """They are called as without a batch; they may submit, and cancel any request, but not advance."""
    batch, seen = Batch(faked()), list[tuple[Any, ...]]()
    later = batch.submit(embeds(2), steps=3, seed=2, **SIZE)

    def callback(stage: str, done: int, steps: int, x: Any) -> None:
        seen.append((stage, done, steps, x))
        if done == 1:
            seen.append(batch.submit(embeds(3), steps=1, seed=3, **SIZE))  # type: ignore[arg-type]
            later.cancel()
        with pytest.raises(BackendError, match="a Batch was advanced while it advances"):
            batch.advance()

    first = batch.submit(embeds(1), steps=2, seed=1, callback=callback, **SIZE)
    run(batch, first, later)
    submitted: Any = seen.pop(1)
    assert [args[:3] for args in seen] == [("decoder", 1, 2), ("decoder", 2, 2)]
    np.testing.assert_array_equal(seen[-1][3], first.result().latents)
    compare(submitted.result(), faked().decoder(embeds(3), steps=1, seed=3, **SIZE))
    with pytest.raises(CancelledError):
        later.result()


def test_a_request_may_be_cancelled_by_its_own_callback() -> None:
    tickets: list[Any] = []
    decoder = Picture()
    batch = Batch(faked(movq_decoder=decoder))
    for steps in (1, 3):
        tickets.append(batch.submit(embeds(1), steps=steps, callback=lambda *_: tickets[-1].cancel(), **SIZE))
        run(batch, tickets[-1])
        with pytest.raises(CancelledError):
            tickets[-1].result()


# What is refused

BAD: dict[str, tuple[Arguments, str]] = {
    "scheduler": ({"scheduler": "euler"}, "scheduler: expected one of"),
    "steps": ({"steps": 0}, "steps: expected an int of 1 to 1000"),
    "seeds": ({"seed": [1, 2], "count": 3}, "seed: expected one, or one for each of 3 pictures, found 2"),
    "interval": ({"guidance_interval": (1, 0)}, "guidance_interval: expected two numbers"),
    "rows": ({"count": 5}, r"count: a request of 10 rows \(two a picture with guidance\) is more than the 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_at_once(bundle: Path, case: str) -> None:
    arguments, message = BAD[case]
    batch = Batch(without_networks(bundle))
    own = Embeds(np.zeros((1, 32), np.float32), np.zeros((1, 32), np.float32))
    for first in ("a cat", own):
        with pytest.raises(InputError, match=message):
            batch.submit(first, **arguments)
    with pytest.raises(InputError, match="prompt: expected text"):
        batch.submit()
    with pytest.raises(TypeError, match="stepz"):
        batch.submit("a cat", stepz=3)
    assert not batch.advance()


@pytest.mark.parametrize("most_rows", [0, -1, 2.0, True, "8"])
def test_bad_numbers_of_rows(most_rows: Any) -> None:
    with pytest.raises(InputError, match="most_rows: expected a whole number of 1 or more"):
        Batch(faked(), most_rows)


def test_a_bundle_whose_stages_are_closed(bundle: Path) -> None:
    with load(bundle, memory="stage") as k, pytest.raises(InputError, match="loaded with memory='keep', found 'stage'"):
        Batch(k)


def test_a_bundle_that_was_closed() -> None:
    k = faked()
    batch = Batch(k)
    ticket = batch.submit(embeds(1), steps=2, **SIZE)
    k.close()
    with pytest.raises(BackendError, match="was closed; load it again"):
        ticket.result()
