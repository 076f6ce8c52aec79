"""Requests that share evaluations: each one's pictures against those that it gets alone.

Most run fake networks that treat every row by itself and add nothing up over several, so that pictures are the same to
the last bit whatever shares their evaluations; the miniature is run where it matters that networks do so too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kandrt.engines.bundle import open_bundle
from kandrt.engines.errors import BackendError, InputError
from kandrt.engines.manifest import FeatureReuse
from kandrt.engines.spec import TensorSpec
from kandrt.runtime import Batch, Embeds, Kandinsky, Result, Ticket, load
from kandrt.runtime.components import Components
from kandrt.runtime.miniature import MINIATURE

from .oracle import Spy, picture
from .test_array_api import Strict

Arguments = dict[str, Any]
F32 = NDArray[np.float32]
SIZE: Arguments = {"height": 64, "width": 64}
BROKEN = 1000.0  # an embedding's first value, at which the fake step gives NaN


class Context:
    """A row of context for each embedding, and embeddings of all timesteps."""

    inputs = outputs = ()

    def __call__(self, *, image_embeds: F32, timesteps: F32) -> dict[str, F32]:
        rows = image_embeds[:, :8]
        return {"embedding": rows[None] * 0.1 + timesteps[:, None, None] / 1000, "added_kv": rows}

    def close(self) -> None: ...


@dataclass
class Step:
    """A network that sees every input and no other row, and notes the shapes of what it is given."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    fails_at: tuple[int, ...] = ()

    inputs = outputs = ()

    def __call__(self, *, sample: F32, embedding: F32, added_kv: F32) -> dict[str, F32]:
        self.shapes.append(sample.shape)
        assert {len(sample), len(embedding), len(added_kv)} == {len(sample)}
        if len(self.shapes) in self.fails_at:
            raise BackendError("no memory for so many rows")
        row = 0.3 * embedding[:, 1] + 0.2 * added_kv[:, 2] * embedding[:, 3]
        row = np.where((added_kv[:, 0] == BROKEN) & (embedding[:, 0] < 0.1 * BROKEN + 0.5), np.float32("nan"), row)
        half = 0.4 * sample + row[:, None, None, None].astype(np.float32)
        return {"prediction": np.concatenate([half, half], axis=1)}

    def close(self) -> None: ...


class Encoder:
    """Pictures to latents."""

    inputs = outputs = ()

    def __call__(self, *, pixels: F32) -> dict[str, F32]:
        small = pixels[:, :, ::8, ::8]
        return {"latents": np.concatenate([small, small[:, :1]], axis=1)}

    def close(self) -> None: ...


class Picture:
    """Latents to pictures."""

    inputs = outputs = ()

    def __call__(self, *, latents: F32) -> dict[str, F32]:
        return {"pixels": np.tanh(latents[:, :3]).repeat(8, axis=2).repeat(8, axis=3)}

    def close(self) -> None: ...


def fakes(**given: Any) -> dict[str, Any]:
    found = {
        "decoder_context": Context(), "decoder_step": Step(), "movq_encoder": Encoder(), "movq_decoder": Picture(),
    }  # fmt: skip
    return found | given


def faked(**given: Any) -> Kandinsky:
    """The miniature with fake networks in its decoder."""
    return load(sessions=fakes(**given), threads=1)


def embeds(seed: int, rows: int = 1, first: float = 0.0) -> Embeds:
    both = np.random.default_rng([9, seed]).standard_normal((2, rows, 160), np.float32)
    both[:, :, 0] = first
    return Embeds(*both)


@pytest.fixture(scope="module")
def miniature() -> Iterator[Kandinsky]:
    with load(threads=1) as k:
        yield k


def compare(found: Result, alone: Result, tolerance: float = 0.0) -> None:
    assert found.seed == alone.seed
    np.testing.assert_allclose(found.latents, alone.latents, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.array, alone.array, rtol=0, atol=tolerance)


def run(batch: Batch, *tickets: Ticket) -> None:
    while batch.advance():
        pass
    assert all(ticket.done for ticket in tickets)


# Any requests, in any order


def random_request(generator: np.random.Generator) -> Arguments:
    """Arguments of a decoder, of 4 rows at the most."""
    count = int(generator.integers(1, 3))
    found: Arguments = {
        "embeds": embeds(int(generator.integers(100))), "count": count, "steps": int(generator.integers(3, 8)),
        "height": 64, "width": int(generator.choice([64, 64, 128])),
        "scheduler": generator.choice(["ddpm", "ddim", "dpmpp-2m"]),
        "guidance_scale": float(generator.choice([1, 2, 4])),
        "seed": int(generator.integers(99)) if generator.integers(2) else list(range(count)),
    }  # fmt: skip
    if generator.integers(2):
        found |= {"image": picture(64, 64, int(generator.integers(9))), "strength": 0.9}
    if found["guidance_scale"] > 1 and generator.integers(2):
        start = float(generator.choice([0, 0.25]))
        found["guidance_interval"] = (start, start + 0.6)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_any_requests_in_any_order(seed: int) -> None:
    generator, step = np.random.default_rng(seed), Step()
    k, alone = faked(decoder_step=step), faked()
    most_rows = int(generator.integers(4, 10))
    batch, tickets, requests = Batch(k, most_rows), list[Ticket](), list[Arguments]()
    stepped: list[int] = []
    while len(tickets) < 8 or not all(ticket.done for ticket in tickets):
        if len(tickets) < 8 and generator.random() < 0.4:
            number = len(tickets)
            requests.append(random_request(generator))
            tickets.append(batch.submit(**requests[-1], callback=lambda *_, number=number: stepped.append(number)))
            continue
        waiting = [number for number, ticket in enumerate(tickets) if not ticket.done]
        stepped.clear()
        left = batch.advance()
        assert left == any(not ticket.done for ticket in tickets)
        assert len(step.shapes) == 0 or step.shapes[-1][0] <= most_rows
        assert stepped == sorted(set(stepped))
        assert stepped[:1] == waiting[:1], "the oldest one was left out"
    for ticket, arguments in zip(tickets, requests, strict=True):
        compare(ticket.result(), alone.decoder(**arguments))
    steps = sum(int(arguments["steps"] * arguments.get("strength", 1)) for arguments in requests)
    assert len(step.shapes) <= steps


def test_evaluations_are_shared() -> None:
    """Three requests of 2 + 2 + 1 rows, the second two steps later: as many calls as the longest needs, no more."""
    step = Step()
    batch = Batch(faked(decoder_step=step))
    batch.submit(embeds(1), steps=5, seed=1, **SIZE)
    batch.advance()
    batch.advance()
    batch.submit(embeds(2), steps=3, seed=2, scheduler="ddim", **SIZE)
    batch.submit(embeds(3), steps=2, seed=3, guidance_scale=1.0, **SIZE)
    run(batch)
    assert [shape[0] for shape in step.shapes] == [2, 2, 5, 5, 4]


def test_rows_are_limited() -> None:
    """What does not fit waits, and is not begun before; what comes after it and fits goes first."""
    context, step = Spy(Context()), Step()
    batch = Batch(faked(decoder_context=context, decoder_step=step), most_rows=5)
    for number, count in enumerate((2, 1, 1)):  # 4, 2 and, without guidance, 1 row
        scale = 1.0 if number == 2 else 4.0
        batch.submit(embeds(number), steps=2, count=count, guidance_scale=scale, seed=1, **SIZE)
    batch.advance()
    assert [len(call["image_embeds"]) for call in context.calls] == [4, 1]
    run(batch)
    assert [shape[0] for shape in step.shapes] == [5, 5, 2, 2]
    with pytest.raises(InputError, match=r"count: a request of 6 rows .* more than the 5 .* most_rows=6"):
        batch.submit(embeds(0), count=3, **SIZE)


def test_a_request_that_comes_to_need_more_rows_pauses() -> None:
    step = Step()
    batch, alone = Batch(faked(decoder_step=step), most_rows=3), faked()
    requests: list[Arguments] = [
        {"embeds": embeds(1), "steps": 4, "seed": 1, "guidance_interval": (0.5, 1), **SIZE},
        {"embeds": embeds(2), "steps": 4, "seed": 2, "guidance_interval": (0.25, 1), **SIZE},
    ]
    tickets = [batch.submit(**request) for request in requests]
    run(batch, *tickets)
    assert [shape[0] for shape in step.shapes] == [2, 3, 2, 2, 2, 2]
    for ticket, request in zip(tickets, requests, strict=True):
        compare(ticket.result(), alone.decoder(**request))


def test_sizes_are_kept_apart() -> None:
    step = Step()
    batch, alone = Batch(faked(decoder_step=step)), faked()
    sizes: list[Arguments] = [SIZE, {"height": 128, "width": 64}, {"height": 64, "width": 128}, SIZE]
    tickets = [batch.submit(embeds(i), steps=2, seed=i, **size) for i, size in enumerate(sizes)]
    run(batch, *tickets)
    assert step.shapes == [(4, 4, 8, 8)] * 2 + [(2, 4, 16, 8)] * 2 + [(2, 4, 8, 16)] * 2
    for i, (ticket, size) in enumerate(zip(tickets, sizes, strict=True)):
        compare(ticket.result(), alone.decoder(embeds(i), steps=2, seed=i, **size))


def test_on_a_device() -> None:
    """With arrays that refuse to be mixed with NumPy's: the same to the last bit, and noise from the same seeds."""
    strict = load(sessions={name: Strict(session) for name, session in fakes().items()}, threads=1)
    found, expected = Batch(strict), Batch(faked())
    for number in range(3):
        request: Arguments = {"steps": 3 + number, "seed": number, "guidance_interval": (0.2, 0.7), **SIZE}
        tickets = [batch.submit(embeds(number, 2), **request) for batch in (found, expected)]
        found.advance()
        expected.advance()
    run(found)
    run(expected)
    compare(*(ticket.result() for ticket in tickets))


def test_reused_features_stay_with_their_request() -> None:
    """Such requests take turns: the features are one loop's."""

    class Refresh(Step):
        def __call__(self, **given: F32) -> dict[str, F32]:
            return {**super().__call__(**given), "features": given["sample"] + given["added_kv"][:, :1, None, None]}

    class Shallow(Step):
        def __call__(self, *, features: F32, **given: F32) -> dict[str, F32]:
            out = super().__call__(**given)["prediction"]
            return {"prediction": out + 0.1 * np.concatenate([features, features], axis=1)}

    def reusing() -> Kandinsky:
        bundle = open_bundle(MINIATURE)
        manifest, step = bundle.manifest, bundle.manifest.components["decoder_step"]
        features = TensorSpec("features", "float32", ("batch", 4, "height", "width"))
        graphs = {"refresh": replace(step, outputs=(*step.outputs, features)),
                  "shallow": replace(step, inputs=(*step.inputs, features))}  # fmt: skip
        record = replace(manifest.decoders["decoder"], reuse=FeatureReuse("refresh", "shallow"))
        manifest = replace(
            manifest,
            components={**manifest.components, **graphs},
            decoders={**manifest.decoders, "decoder": record},
        )
        sessions = fakes(refresh=Refresh(), shallow=Shallow())
        return Kandinsky(Components(replace(bundle, manifest=manifest), sessions=sessions, threads=1))

    batch, alone = Batch(reusing()), reusing()
    requests: list[Arguments] = [
        {"embeds": embeds(i), "steps": 5, "seed": i, "reuse_interval": interval, **SIZE}
        for i, interval in enumerate((2, 3, 1, 1))
    ]
    tickets = [batch.submit(**request) for request in requests]
    run(batch, *tickets)
    for ticket, request in zip(tickets, requests, strict=True):
        compare(ticket.result(), alone.decoder(**request))
