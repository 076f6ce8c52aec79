"""What is measured: cases by name, their sizes, and inputs that are the same for every contender."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import InputError
from ...engines.manifest import DecoderRecord, Manifest, Role

Stage = Literal["prior", "step", "movq", "text-to-image", "embedding-to-image", "image-to-image", "controlnet"]
Inputs: TypeAlias = Mapping[str, NDArray[Any]]

SEED = 43
PROMPT = "a red fox in the snow, soft morning light"
PRIOR_STEPS, MOST_STEPS = 25, 50
PRIOR_GUIDANCE_SCALE = 4.0
STRENGTH = 0.3
TIMESTEP = 500
LATENT_CHANNELS = 4
PADDING_SHARE = 4  # one token in so many of a random text is padding

DEFAULT_CASES = ("prior", "prior-first", "step", "movq", "cold-start", "load", "text-to-image")
NAME = re.compile(r"(?P<kind>[a-z-]+)(@(?P<height>\d+)(x(?P<width>\d+))?)?(\*(?P<batch>\d+))?")


@dataclass(frozen=True)
class Kind:
    """A case before its sizes are known.

    boundary says what is timed. fresh: each sample is a new process, timed from its start; opens: it ends when all is
    open, and nothing runs. keeps: whether a prior keeps what it made of the empty prompt from one run to the next.
    weight: its share of a budget of time, beside others'.
    """

    stage: Stage
    boundary: str
    fresh: bool = False
    opens: bool = False
    keeps: bool = True
    weight: float = 1.0


CASES: Mapping[str, Kind] = {
    "prior": Kind(
        "prior",
        "Prompt to image embedding: tokenizer, text encoder and all steps of the prior; kandrt keeps the empty "
        "prompt's part from the run before, as it does from request to request.",
    ),
    "prior-first": Kind(
        "prior",
        "Prompt to image embedding, as `prior`, but with nothing kept from an earlier request.",
        keeps=False,
    ),
    "step": Kind(
        "step",
        "One evaluation of the decoder's UNet with guidance, so two rows a picture; what does not change from step to "
        "step is worked out before where a contender can.",
    ),
    "movq": Kind("movq", "Latents to pixels: MoVQ's decoder alone."),
    "text-to-image": Kind(
        "text-to-image", "Prompt to finished pixel values in memory: prior, all steps, MoVQ.", weight=6.0
    ),
    "embedding-to-image": Kind(
        "embedding-to-image", "Image embedding to finished pixel values in memory: all steps, MoVQ.", weight=6.0
    ),
    "image-to-image": Kind(
        "image-to-image",
        f"Picture and embedding to finished pixel values, strength {STRENGTH}: MoVQ's encoder, steps, MoVQ's decoder.",
        weight=3.0,
    ),
    "controlnet": Kind("controlnet", "Depth hint and embedding to finished pixel values: all steps, MoVQ.", weight=6.0),
    "cold-start": Kind(
        "step",
        "A new process, from its start to the first finished evaluation of the decoder's UNet: importing, opening, "
        "running; files are in the system's cache.",
        fresh=True,
    ),
    "load": Kind(
        "text-to-image",
        "A new process, from its start until all of text-to-image is open; what a library only maps into memory it "
        "reads later, in its first run.",
        fresh=True,
        opens=True,
    ),
}


@dataclass(frozen=True)
class Case:
    """One case with its sizes, in pixels; steps of the decoder as asked for, of which image-to-image does a share.

    prompts: one a picture. guidance_scale: of the decoder.
    """

    name: str
    stage: Stage
    boundary: str
    batch: int
    height: int
    width: int
    steps: int
    prior_steps: int
    guidance_scale: float
    prompts: tuple[str, ...]
    fresh: bool = False
    opens: bool = False
    keeps: bool = True
    weight: float = 1.0
    strength: float = STRENGTH
    prior_guidance_scale: float = PRIOR_GUIDANCE_SCALE
    seed: int = SEED

    @property
    def role(self) -> Role:
        """The decoder that it runs."""
        return "controlnet" if self.stage == "controlnet" else "decoder"

    @property
    def runs_prior(self) -> bool:
        """Whether it starts from a prompt, where the family has a prior."""
        return self.stage in ("prior", "text-to-image")

    @property
    def runs_decoder(self) -> bool:
        """Whether its steps are those of a decoder."""
        return self.stage not in ("prior", "step", "movq")


class SeededNoise:
    """Standard-normal float32 arrays of the shapes asked for, the same ones after every `SeededNoise(seed)`."""

    def __init__(self, seed: int = SEED) -> None:
        self._generator = np.random.default_rng(seed)

    def __call__(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Draw."""
        return self._generator.standard_normal(shape, np.float32)


def possible_cases(manifest: Manifest) -> list[str]:
    """Names of the cases that a bundle can be measured in."""
    return [name for name in CASES if impossible(name, manifest) is None]


def default_cases(manifest: Manifest, size: tuple[int, int] | None = None) -> list[str]:
    """Those that are measured unless others are named: MoVQ at a larger size too, and the longest case last.

    What the cases before it leave of a budget is its own. size is (height, width).
    """
    there = possible_cases(manifest)
    names = [name for name in DEFAULT_CASES if name in there]
    record = manifest.decoders.get("decoder")
    if record is not None and "movq" in names:
        sides = size or (record.default_size, record.default_size)
        height, width = (larger(side, record.size_multiple) for side in sides)
        names.insert(names.index("movq") + 1, f"movq@{height}" + (f"x{width}" if width != height else ""))
    return names or there


def larger(side: int, multiple: int) -> int:
    """1.5 times a side, in multiples."""
    return round(1.5 * side / multiple) * multiple


def impossible(name: str, manifest: Manifest) -> str | None:
    """What a bundle lacks for a case, by the name of its kind; None where it can be measured."""
    stage, has = CASES[name].stage, manifest.decoders
    if stage == "prior":
        return None if manifest.prior else "the bundle has no prior"
    role: Role = "controlnet" if stage == "controlnet" else "decoder"
    if role not in has:
        return f"the bundle has no {role}; it has {', '.join(has) or 'a prior alone'}"
    if stage == "text-to-image" and has[role].embedding_dim is not None and manifest.prior is None:
        return "the bundle has no prior"
    if stage == "embedding-to-image" and has[role].embedding_dim is None:
        return "its decoder takes no image embedding"
    return None


def make_case(
    name: str,
    manifest: Manifest,
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    steps: int | None = None,
    prior_steps: int | None = None,
    prompt: str = PROMPT,
) -> Case:
    """The case of a name such as "step", "step@768", "step@512x768" (height, width) and "step*4" (pictures).

    What the name says goes before `size` (height, width) and `batch`; by default one picture of the size that the
    checkpoint was trained for. steps: of the decoder, by default 50 or the family's default where that is less.

    Raises InputError for a name that is not known, sizes that do not fit, and what the bundle cannot do.
    """
    from ...runtime.families import family_of

    found = NAME.fullmatch(name)
    if found is None or found["kind"] not in CASES:
        known = ", ".join(CASES)
        raise InputError(f"case: expected {known}, with @SIZE, @HEIGHTxWIDTH or *BATCH behind it, found {name!r}")
    kind, family = CASES[found["kind"]], family_of(manifest)
    lacking = impossible(found["kind"], manifest)
    if lacking is not None:
        raise InputError(f"case {name!r}: {lacking}")
    record = manifest.decoders.get("controlnet" if kind.stage == "controlnet" else "decoder")
    if found["height"]:
        size = int(found["height"]), int(found["width"] or found["height"])
    side = 0 if record is None else record.default_size
    height, width = (side, side) if size is None else size
    rows = int(found["batch"]) if found["batch"] else 1 if batch is None else batch
    steps = min(MOST_STEPS, family.steps) if steps is None else steps
    prior_steps = PRIOR_STEPS if prior_steps is None else prior_steps
    check_sizes(name, record, height, width, {"batch": rows, "steps": steps, "prior_steps": prior_steps})
    from_image = kind.stage == "image-to-image"
    return Case(
        name=name,
        stage=kind.stage,
        boundary=kind.boundary,
        batch=rows,
        height=height,
        width=width,
        steps=steps,
        prior_steps=prior_steps,
        guidance_scale=family.image_guidance_scale if from_image else family.guidance_scale,
        prompts=tuple(prompt if i == 0 else f"{prompt}, version {i + 1}" for i in range(rows)),
        fresh=kind.fresh,
        opens=kind.opens,
        keeps=kind.keeps,
        weight=kind.weight,
    )


def check_sizes(name: str, record: DecoderRecord | None, height: int, width: int, counts: Mapping[str, int]) -> None:
    """Raise InputError for counts below 1, or a size that a decoder would round up."""
    for what, count in counts.items():
        if count < 1:
            raise InputError(f"case {name!r}: {what}: expected 1 or more, found {count}")
    if record is not None and (min(height, width) < 1 or height % record.size_multiple or width % record.size_multiple):
        raise InputError(
            f"case {name!r}: expected height and width in multiples of {record.size_multiple}, found {height}x{width}"
        )


def components_of(case: Case, manifest: Manifest) -> list[str]:
    """The bundle's components that a case runs, in their order."""
    names: list[str] = []
    if case.runs_prior and manifest.prior is not None:
        names += [manifest.prior.text_encoder, manifest.prior.context, manifest.prior.step]
    if case.stage == "prior":
        return names
    record = manifest.decoders[case.role]
    if case.runs_decoder and record.prompt is not None:
        names.append(record.prompt.encoder)
    if case.stage == "image-to-image":
        names.append(record.movq_encoder)
    names += [] if case.stage == "movq" else [record.context, record.step]
    return names + ([] if case.stage == "step" else [record.movq_decoder])


def make_inputs(case: Case, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """A case's arrays, from its seed alone.

    image_embeds and negative_image_embeds [batch, D] of a decoder that takes them; image uint8 [H, W, 3]; hint [batch,
    3, H, W]; latents [batch, 4, H/8, W/8] of movq. Of a step, sample [batch, 4, H/8, W/8] and, as "context." and the
    name, what the context graph takes, of 2·batch rows.
    """
    draw = np.random.default_rng(case.seed).standard_normal
    if case.stage == "prior":
        return {}
    record = manifest.decoders[case.role]
    latents = case.batch, LATENT_CHANNELS, case.height // record.scale, case.width // record.scale
    if case.stage == "movq":
        return {"latents": draw(latents, np.float32)}
    if case.stage == "step":
        return {"sample": draw(latents, np.float32), **context_inputs(case, manifest, record, draw)}
    inputs: dict[str, NDArray[Any]] = {}
    if case.stage != "text-to-image" and record.embedding_dim is not None:
        for name in ("image_embeds", "negative_image_embeds"):
            inputs[name] = draw((case.batch, record.embedding_dim), np.float32)
    y, x = np.linspace(0, 1, case.height)[:, None], np.linspace(0, 1, case.width)[None]
    if case.stage == "image-to-image":
        waves = np.stack([np.sin(7 * x + 3 * y), np.cos(5 * x * y + 1), np.sin(11 * y - 4 * x)], axis=-1)
        inputs["image"] = np.rint(127.5 + 110 * waves).astype(np.uint8)
    if case.stage == "controlnet":
        dome = np.clip(1 - 2 * np.hypot(x - 0.4, y - 0.5), 0, 1).astype(np.float32)
        inputs["hint"] = np.tile(dome, (case.batch, 3, 1, 1))
    return inputs


def context_inputs(
    case: Case, manifest: Manifest, record: DecoderRecord, draw: Callable[..., NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """What a decoder's context graph takes, random; texts end in padding, whose states are zeros."""
    tokens = 0 if record.prompt is None else record.prompt.tokenizer.max_length
    axes = {"batch": 2 * case.batch, "tokens": tokens, "timesteps": 1}
    specs = manifest.components[record.context].inputs
    shapes = {spec.name: tuple(axes[axis] if isinstance(axis, str) else axis for axis in spec.shape) for spec in specs}
    given = {name: draw(shape, np.float32) for name, shape in shapes.items()}
    given["timesteps"] = np.full(1, TIMESTEP, np.float32)
    if "text_mask" in given:
        mask = np.ones(shapes["text_mask"], np.float32)
        mask[:, -(mask.shape[1] // PADDING_SHARE) :] = 0
        given |= {"text_mask": mask, "text_states": given["text_states"] * mask[..., None]}
    return {f"context.{name}": array for name, array in given.items()}
