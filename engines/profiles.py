"""Which shapes an engine takes: ranges of picture sizes and batches, turned into the axes of each graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .errors import InputError
from .manifest import DecoderRecord, Manifest
from .spec import TensorSpec

# The least, the most frequent and the greatest length: TensorRT's min, opt and max.
Extent: TypeAlias = tuple[int, int, int]

MAX_SIDE = 4096  # pixels; `kandrt.runtime` makes no larger picture
MAX_BATCH = 256  # pictures
MAX_TIMESTEPS: Extent = (1, 50, 1000)  # all that a context embeds at once; published models know 1,000

# What published models paint best; those trained for smaller pictures get half to double their own size.
USUAL_SIZE: Extent = (512, 768, 1024)
USUAL_BATCH: Extent = (1, 1, 4)


@dataclass(frozen=True)
class Profile:
    """The least, the best and the greatest length of each named axis of a graph."""

    axes: dict[str, Extent]

    def __str__(self) -> str:
        return ", ".join(f"{axis} {extent_text(extent)}" for axis, extent in self.axes.items())

    def shapes(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The least, the best and the greatest shape of a tensor."""

        def shape(i: int) -> tuple[int, ...]:
            return tuple(self.axes[axis][i] if isinstance(axis, str) else axis for axis in spec.shape)

        return shape(0), shape(1), shape(2)

    def holds(self, axes: Mapping[str, int]) -> bool:
        """Whether these lengths are within the bounds; axes that the profile does not name have none."""
        return all(
            self.axes[axis][0] <= length <= self.axes[axis][2] for axis, length in axes.items() if axis in self.axes
        )

    @property
    def static(self) -> bool:
        """Whether it holds one shape only."""
        return all(least == greatest for least, _, greatest in self.axes.values())


@dataclass(frozen=True)
class Coverage:
    """What engines are asked to take: sides of pictures in pixels, and pictures a request.

    static fixes size and batch of the graphs that run once a step or a picture, at their best value, so that they can
    be captured as CUDA graphs; those that run once a request keep their range.
    """

    size: Extent
    batch: Extent = USUAL_BATCH
    static: bool = False


def parse_extent(text: str, what: str) -> Extent:
    """Read MIN:OPT:MAX, or one number for all three; InputError that begins with `what` for anything else."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise InputError(f"{what}: expected MIN:OPT:MAX or one whole number, found {text!r}")
    least, best, greatest = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    if not 1 <= least <= best <= greatest:
        raise InputError(f"{what}: expected 1 <= MIN <= OPT <= MAX, found {text}")
    return least, best, greatest


def extent_text(extent: Extent) -> str:
    """As `parse_extent` reads it."""
    return str(extent[0]) if extent[0] == extent[2] else ":".join(map(str, extent))


def default_size(manifest: Manifest) -> Extent:
    """The sides that engines take unless others are asked for, in pixels."""
    sides = [record.default_size for record in manifest.decoders.values()]
    side, multiple = max(sides, default=USUAL_SIZE[1]), size_multiple(manifest)
    if side >= USUAL_SIZE[0]:
        return USUAL_SIZE
    return max(side // 2 // multiple * multiple, multiple), side, 2 * side


def size_multiple(manifest: Manifest) -> int:
    """What sides must be divisible by."""
    return max((record.size_multiple for record in manifest.decoders.values()), default=1)


def latent_scale(manifest: Manifest) -> int:
    """Pixels a latent cell, in height and in width."""
    return max((record.scale for record in manifest.decoders.values()), default=1)


def check_coverage(manifest: Manifest, wanted: Sequence[Coverage]) -> None:
    """Raise InputError for sizes and batches that the graphs cannot take."""
    multiple = size_multiple(manifest)
    for coverage in wanted:
        if any(side % multiple or side > MAX_SIDE for side in coverage.size):
            raise InputError(
                f"--size {extent_text(coverage.size)}: expected multiples of {multiple} up to {MAX_SIDE} pixels, "
                f"which is what this bundle's decoders take"
            )
        if coverage.batch[2] > MAX_BATCH:
            raise InputError(f"--batch {extent_text(coverage.batch)}: expected at most {MAX_BATCH} pictures")


def component_profiles(manifest: Manifest, name: str, wanted: Sequence[Coverage]) -> tuple[Profile, ...]:
    """The profiles of one component, each once, for pictures of the sizes and batches wanted.

    A graph without dynamic axes has none. Raises InputError where the graph has an axis that is none of ours.
    """
    found: list[Profile] = []
    for coverage in wanted:
        for axes in axis_lengths(manifest, name, coverage):
            dynamic = {axis: None for spec in manifest.components[name].inputs for axis in spec.shape}
            unknown = [axis for axis in dynamic if isinstance(axis, str) and axis not in axes]
            if unknown:
                raise InputError(f"{name}: no profile can be made for its axes {', '.join(unknown)}; export it again")
            used = {axis: axes[axis] for axis in dynamic if isinstance(axis, str)}
            if used and Profile(used) not in found:
                found.append(Profile(used))
    return tuple(found)


def axis_lengths(manifest: Manifest, name: str, coverage: Coverage) -> list[dict[str, Extent]]:
    """The lengths of every axis that kandrt's graphs have, as the runtime asks `name` for them; one or several sets."""
    scale = latent_scale(manifest)
    size, repeated = coverage.size, name in repeated_components(manifest)
    if coverage.static and repeated:
        size = (size[1], size[1], size[1])
    cells: Extent = (size[0] // scale, size[1] // scale, size[2] // scale)
    tokens = max((prompt.tokenizer.max_length for prompt in manifest.prompts().values()), default=1)
    steps = {name for record in manifest.decoders.values() for name in step_components(record)}
    sides: dict[str, Extent] = {
        "height": cells, "width": cells, "image_height": size, "image_width": size, "timesteps": MAX_TIMESTEPS,
        "tokens": (tokens if name in steps else 1, tokens, tokens),  # the runtime pads those of a step
    }  # fmt: skip
    rows = batch_rows(manifest, name, coverage.batch)
    if coverage.static and repeated:
        # Where guidance doubles the rows it is what most requests ask for; the prior's double again with a negative
        # prompt.
        prior = manifest.prior is not None and name == manifest.prior.step
        fixed = {rows[1], 2 * rows[1]} if prior else {rows[1]}
        return [{**sides, "batch": (length, length, length)} for length in sorted(fixed)]
    return [{**sides, "batch": rows}]


def step_components(record: DecoderRecord) -> tuple[str, ...]:
    """Those of a decoder that run once a step: its step, and what stands in for it where features are reused."""
    return (record.step,) if record.reuse is None else (record.step, record.reuse.refresh, record.reuse.shallow)


def repeated_components(manifest: Manifest) -> frozenset[str]:
    """Those that run once a step or once a picture."""
    decoders = manifest.decoders.values()
    names = {name for record in decoders for name in (*step_components(record), record.movq_decoder)}
    return frozenset(names | ({manifest.prior.step} if manifest.prior else set()))


def batch_rows(manifest: Manifest, name: str, batch: Extent) -> Extent:
    """Rows that `kandrt.runtime` gives a component for a batch of pictures.

    Guidance doubles the rows of a decoder; those of the prior's step double once more with a negative prompt. Text
    encoders and the prior's context take each different text once, whatever the number of pictures; MoVQ and the image
    encoder run one picture at a time.
    """
    least, best, greatest = batch
    records = manifest.decoders.values()
    decoders = {name for record in records for name in (record.context, *step_components(record))}
    if name in decoders:
        return least, 2 * best, 2 * greatest
    prior = manifest.prior
    encoders = {prompt.encoder for prompt in manifest.prompts().values()}
    if name in encoders or (prior is not None and name in (prior.text_encoder, prior.context)):
        return 1, 2, 4 * greatest
    if prior is not None and name == prior.step:
        return least, 2 * best, 4 * greatest
    return 1, 1, 1
