"""What the components of a bundle are given while it makes pictures: the calls of whole requests, noted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.errors import BundleError, InputError
from .reference import REUSE_INTERVAL, inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engines.bundle import Bundle
    from ..engines.manifest import Component, DecoderRecord, Role
    from ..engines.session import Session
    from ..engines.spec import TensorSpec
    from ..export.quantize.bundle import Call
    from ..runtime import Embeds, Kandinsky

Report = Callable[[str], None]

# Different in subject, light and style; the last is for measuring.
PROMPTS = (
    "a portrait of an old fisherman, dramatic light, 4k photo",
    "three red circles and a blue square on a yellow background, flat illustration",
    "a quiet city street at night in the rain, neon signs, oil painting",
)
# What decoders are given besides, by role: inputs as the stored reference requests have them.
EXTRAS: Mapping[Role, tuple[str, ...]] = {"decoder": (), "inpaint": ("image", "mask"), "controlnet": ("hint",)}


@dataclass(frozen=True)
class Requests:
    """What is asked for: a picture of each prompt, in `steps` steps; prompt i with the seed `seed` + i.

    size is the side of the pictures in pixels, by default what the checkpoint was trained for.
    """

    prompts: tuple[str, ...] = PROMPTS
    steps: int = 8
    scheduler: str | None = None
    seed: int = 0
    size: int | None = None
    threads: int | None = None


class Recorder:
    """A component that notes what it is given and gives; opened when it is first called."""

    def __init__(self, component: Component, opener: Callable[[], Session]) -> None:
        self._component, self._open = component, opener
        self._session: Session | None = None
        self.calls: list[Call] = []

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a call takes."""
        return self._component.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What a call gives."""
        return self._component.outputs

    def __call__(self, **arrays: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Run the component."""
        from ..export.quantize.bundle import Call

        if self._session is None:
            self._session = self._open()
        given = {name: array.copy() for name, array in arrays.items()}
        found = self._session(**arrays)
        self.calls.append(Call(given, {name: array.copy() for name, array in found.items()}))
        return found

    def close(self) -> None:
        """Free the component's memory; it is opened again when it is called."""
        if self._session is not None:
            self._session.close()
            self._session = None


class Blank:
    """In place of the autoencoder's decoder, whose pictures nobody looks at: black ones, for nothing."""

    def __init__(self, component: Component, scale: int) -> None:
        self.inputs, self.outputs, self._scale = component.inputs, component.outputs, scale

    def __call__(self, **arrays: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Pixels of the right size."""
        import numpy as np

        batch, _, height, width = arrays["latents"].shape
        return {"pixels": np.zeros((batch, 3, height * self._scale, width * self._scale), np.float32)}

    def close(self) -> None:
        """Nothing to free."""


def record_calls(bundle: Bundle, names: Sequence[str], asked: Requests, report: Report) -> dict[str, list[list[Call]]]:
    """The calls of each component of `names` while the bundle makes pictures of prompts, in fp32: a list a prompt.

    A component at a time is in memory. Raises BundleError where prompts cannot be read or a request does not run one of
    the components, and what `load` raises.
    """
    from ..engines.backends import open_component
    from ..runtime import load

    manifest = bundle.manifest
    opened: dict[str, Any] = {"backend": "onnxruntime", "device": "cpu", "threads": asked.threads}
    recorders = {
        name: Recorder(manifest.components[name], partial(open_component, bundle, name, **opened)) for name in names
    }
    roles: list[Role] = [role for role, record in manifest.decoders.items() if set(names) & set(components_of(record))]
    replaced: dict[str, Session] = {record.movq_decoder: Blank(manifest.components[record.movq_decoder], record.scale)
              for record in manifest.decoders.values()}  # fmt: skip
    found: dict[str, list[list[Call]]] = {name: [] for name in names}
    with load(bundle.folder, memory="stage", threads=asked.threads, sessions={**replaced, **recorders}) as k:
        embeds = prior_embeds(k, asked, report)
        take(recorders, found)  # of the prior: all prompts were one request
        for role in roles:
            for i, prompt in enumerate(asked.prompts):
                report(f"making pictures: {role}, prompt {i + 1} of {len(asked.prompts)}")
                paint(k, role, prompt, None if embeds is None else row(embeds, i), names, asked, asked.seed + i)
                take(recorders, found)
            for recorder in recorders.values():
                recorder.close()
    missing = [name for name, calls in found.items() if len(calls) < 2]
    if missing:
        raise InputError(f"{', '.join(missing)}: pictures of prompts do not run it, so that nothing sets its scales")
    return found


def components_of(record: DecoderRecord) -> list[str]:
    """Names of the components that a decoder has."""
    names = [record.context, record.step, record.movq_encoder, record.movq_decoder]
    return names if record.reuse is None else [*names, record.reuse.refresh, record.reuse.shallow]


def take(recorders: Mapping[str, Recorder], found: Mapping[str, list[list[Call]]]) -> None:
    """Move what was noted to `found`, as one request's."""
    for name, recorder in recorders.items():
        if recorder.calls:
            found[name].append(recorder.calls)
            recorder.calls = []


def prior_embeds(k: Kandinsky, asked: Requests, report: Report) -> Embeds | None:
    """Embeddings of all prompts; None where no decoder takes them."""
    manifest = k.manifest
    if all(record.embedding_dim is None for record in manifest.decoders.values()):
        return None
    if manifest.prior is None:
        raise BundleError(
            "the bundle has no prior to read prompts with, and pictures of prompts set the scales; export it again "
            "with the prior's checkpoint as well"
        )
    report("making embeddings of the prompts")
    seeds = [asked.seed + i for i in range(len(asked.prompts))]
    return k.prior(list(asked.prompts), seed=seeds)


def row(embeds: Embeds, i: int) -> Embeds:
    """Embeddings of one of several prompts."""
    from ..runtime import Embeds

    negative = embeds.negative_image_embeds
    return Embeds(embeds.image_embeds[i : i + 1], None if negative is None else negative[i : i + 1])


def paint(
    k: Kandinsky, role: Role, prompt: str, embeds: Embeds | None, names: Sequence[str], asked: Requests, seed: int
) -> None:
    """Make a picture, and again with features reused where that is what is to be noted."""
    record = k.manifest.decoders[role]
    side = asked.size or record.default_size
    given = inputs(side, side)
    told: dict[str, Any] = {name: given[name] for name in EXTRAS[role]}
    told |= {} if record.embedding_dim is None else {"embeds": embeds}
    told |= {} if record.prompt is None else {"prompt": prompt}
    settings: dict[str, Any] = {"steps": asked.steps, "scheduler": asked.scheduler, "seed": seed}
    size: dict[str, Any] = {"height": side, "width": side}
    plain = {record.context, record.step, record.movq_encoder, record.movq_decoder}
    if plain & set(names):
        k.decoder(**told, **size, **settings)
    if record.reuse is not None and {record.reuse.refresh, record.reuse.shallow} & set(names):
        k.decoder(**told, **size, **settings, reuse_interval=REUSE_INTERVAL)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read prompts of {path}: {getattr(error, 'strerror', None) or error}") from error
    return [line.strip() for line in lines if line.strip()]
