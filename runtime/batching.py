"""Requests that are at different steps of their loops, in shared evaluations of the step graph.

It takes an embedding of the timestep for each row, so rows need not be at the same step, nor have as many to go, the
same sampler or the same guidance. A server need not wait for one request to end before the next one joins:

>>> batch = Batch(k)
>>> first = batch.submit("a red cube", steps=50)
>>> batch.advance()  # a step of the first
>>> second = batch.submit("a dog", steps=25, guidance_interval=(0, 0.5))
>>> while batch.advance():  # a step of both, and the pictures of whichever is done
...     pass
>>> first.result().images, second.result().images

One thread owns a batch and the networks that it runs. In a server that is a thread which takes requests from a queue,
submits them, advances, and hands on the results of the tickets that are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from threading import Lock
from typing import Any

from array_api_compat import array_namespace

from ..engines.errors import BackendError, InputError, NumericalError
from ..engines.session import Array
from .decoder import Decoder, Result, Work
from .embeds import Embeds
from .pipeline import Kandinsky
from .sampling import Denoising, StepInputs, guided_steps

MOST_ROWS = 8


class Batch:
    """Runs several requests to one loaded bundle at once: `submit` them, `advance` until their tickets are done.

    A request takes a row of an evaluation for each picture, two where guidance is applied. The oldest request is in
    every evaluation; with it are those after it of the same decoder and picture size, as many as fit. Others wait: a
    request is begun (its prior run, its picture encoded) when there is room for it, and holds little memory before.
    """

    def __init__(self, k: Kandinsky, most_rows: int = MOST_ROWS) -> None:
        """most_rows: of an evaluation; memory and time grow with them, and a built engine has a greatest batch.

        `k` stays the caller's to close. Raises InputError where it was loaded with memory="stage", which is for one
        request at a time, and BundleError where it has no decoder.
        """
        if isinstance(most_rows, bool) or not isinstance(most_rows, int) or most_rows < 1:
            raise InputError(f"most_rows: expected a whole number of 1 or more, found {most_rows!r}")
        if k.memory != "keep":
            raise InputError(f"Batch: expected a bundle loaded with memory='keep', found {k.memory!r}; load it so")
        self._k, self._decoder, self._most_rows = k, k.decoder, most_rows
        self._members: list[Member] = []
        self._shared = SharedContext()
        self._advancing = Lock()

    def submit(self, request: str | Sequence[str] | Embeds | None = None, /, **settings: Any) -> Ticket:
        """Add a request, by the arguments of `k(...)`; with Embeds first, or as `embeds`, of `k.decoder(...)`.

        Its noise comes from its own seed, so that its pictures are those that it gets alone, up to rounding: engines
        sum in another order for another number of rows. Its callback is called as ever; what that raises ends the
        request. With a `reuse_interval` above 1 it takes turns with others, and shares no evaluation.

        Raises InputError for arguments that cannot be used, and for more rows than an evaluation has; no network runs.
        """
        of_decoder = isinstance(request, Embeds) or "embeds" in settings
        prepare: Callable[..., Work] = self._decoder.prepare if of_decoder else self._k.prepare
        work = prepare(*(() if request is None else (request,)), **settings)
        rows = len(work.plan.conditions) * (1 if work.plan.scale is None else 2)
        if rows > self._most_rows:
            raise InputError(
                f"count: a request of {rows} rows (two a picture with guidance) is more than the {self._most_rows} of "
                f"an evaluation; ask for fewer pictures at once, or make the Batch with most_rows={rows}"
            )
        self._members.append(Member(work, self._decoder))
        return Ticket(self._members[-1], self.advance)

    def advance(self) -> bool:
        """Run one evaluation, and what its requests need before and after it; False where none is left.

        What ends a request is raised by the `result` of its ticket, not here; what ends an evaluation (a
        BackendError: memory, say) ends all requests in it. Raises BackendError where it is called while it runs.
        """
        if not self._advancing.acquire(blocking=False):
            raise BackendError(
                "a Batch was advanced while it advances: only the thread that owns it may, outside of it"
            )
        try:
            self._evaluate(self._chosen())
            self._members = [member for member in self._members if member.outcome is None]
        finally:
            self._advancing.release()
        return bool(self._members)

    def _chosen(self) -> list[tuple[Member, StepInputs]]:
        """Those of the next evaluation, the oldest first, and what they ask."""
        chosen: list[tuple[Member, StepInputs]] = []
        rows = 0
        for member in list(self._members):
            if rows + member.rows > self._most_rows or (chosen and chosen[0][0].kind != member.kind):
                continue
            inputs = member.asks()
            # their contexts' shapes are known only now
            if inputs is not None and (not chosen or shapes(chosen[0][1]) == shapes(inputs)):
                chosen.append((member, inputs))
                rows += inputs.rows
        return chosen

    def _evaluate(self, chosen: Sequence[tuple[Member, StepInputs]]) -> None:
        """One call of the step graph, and what follows from it."""
        if not chosen:
            return
        try:
            prediction = chosen[0][0].answer(self._shared.joined([inputs for _, inputs in chosen]))
        except Exception as error:  # whatever it is, the requests' owners are to know
            for member, _ in chosen:
                member.end(error)
            return
        first = 0
        for member, inputs in chosen:
            member.take(prediction[first : first + inputs.rows, ...])
            first += inputs.rows


class Ticket:
    """What `Batch.submit` gives for a request."""

    def __init__(self, member: Member, advance: Callable[[], bool]) -> None:
        self._member, self._advance = member, advance

    @property
    def done(self) -> bool:
        """Whether `result` has an answer at once: pictures, or what ended the request."""
        return self._member.outcome is not None

    def result(self) -> Result:
        """The pictures; advances the batch until they are there. Raises what ended the request in place of them."""
        while self._member.outcome is None:
            self._advance()
        if isinstance(self._member.outcome, Result):
            return self._member.outcome
        raise self._member.outcome

    def cancel(self) -> None:
        """End the request where it is not done: `result` then raises concurrent.futures.CancelledError."""
        self._member.end(CancelledError())


class Member:
    """A request in a batch, from its plan to its outcome, which an error may be."""

    def __init__(self, work: Work, decoder: Decoder) -> None:
        self.outcome: Result | BaseException | None = None
        self.answer = decoder.answers(work.plan)
        self._work, self._decoder = work, decoder
        self._loop: Denoising | None = None
        self._inputs: StepInputs | None = None
        plan = work.plan
        # requests of one kind may share evaluations; reused features are those of one loop
        self.kind = plan.role, plan.height, plan.width, None if plan.reuse is None else id(self)

    @property
    def rows(self) -> int:
        """What it takes of the next evaluation."""
        if self._inputs is not None:
            return self._inputs.rows
        plan = self._work.plan
        guided = plan.scale is not None and guided_steps(len(plan.timesteps), plan.interval)[0]
        return len(plan.conditions) * (2 if guided else 1)

    def asks(self) -> StepInputs | None:
        """What it needs a prediction for, begun where it was not; None where it has ended."""
        if self.outcome is None and self._inputs is None:
            with self._ended_by_errors():
                self._work = self._work.embedded()
                self._loop = self._decoder.begin(self._work.plan, self._work.draw)
                self._inputs = next(self._loop)
        return self._inputs if self.outcome is None else None

    def take(self, prediction: Array) -> None:
        """Go on to the next step, or after the last to the pictures."""
        plan, callback, loop, inputs = self._work.plan, self._work.callback, self._loop, self._inputs
        if self.outcome is not None or loop is None or inputs is None:  # cancelled in a callback of another one
            return
        with self._ended_by_errors():
            x, done, steps = self._after(loop, prediction), inputs.index + 1, len(plan.timesteps)
            if callback is not None:
                callback("decoder", done, steps, x)
            if done == steps and self.outcome is None:
                self.end(self._decoder.finish(self._work, x))

    def _after(self, loop: Denoising, prediction: Array) -> Array:
        """The sample after a step."""
        try:
            self._inputs = loop.send(prediction)
        except StopIteration as last:
            return last.value
        except NumericalError as error:
            raise NumericalError(f"{self._work.plan.role}: {error}") from error
        return self._inputs.x

    def end(self, outcome: Result | BaseException) -> None:
        """Keep the outcome, the first one, and let go of the loop."""
        if self.outcome is None:
            self.outcome = outcome
            if self._loop is not None:
                self._loop.close()
            self._loop = self._inputs = None

    @contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.end(error)
            if not isinstance(error, Exception):  # an interrupt is the caller's too
                raise


class SharedContext:
    """Puts what several loops ask for into one question, and keeps their contexts put together while they stay."""

    def __init__(self) -> None:
        self._of: list[Mapping[str, Array]] = []
        self._context: Mapping[str, Array] = {}

    def joined(self, asked: Sequence[StepInputs]) -> StepInputs:
        """One for all, whose rows are theirs in order."""
        if len(asked) == 1:
            self._of, self._context = [], {}
            return asked[0]
        contexts = [inputs.context for inputs in asked]
        if len(contexts) != len(self._of) or any(a is not b for a, b in zip(contexts, self._of, strict=True)):
            self._of = contexts
            self._context = {name: concat([context[name] for context in contexts]) for name in contexts[0]}
        samples, embeddings = (concat(arrays) for arrays in zip(*((i.sample, i.embedding) for i in asked), strict=True))
        return StepInputs(asked[0].index, samples, False, embeddings, self._context)


def concat(arrays: Sequence[Array]) -> Array:
    """Rows of all arrays, in their library and on their device."""
    return array_namespace(*arrays).concat(list(arrays), axis=0)


def shapes(inputs: StepInputs) -> dict[str, tuple[int, ...]]:
    """Of a row of each array."""
    arrays = {**inputs.context, "sample": inputs.x, "embedding": inputs.embedding}
    return {name: tuple(array.shape[1:]) for name, array in arrays.items()}
