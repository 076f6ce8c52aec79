"""The checkpoints of a bundle's parts: where they lie, and how contenders find them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from ...engines.errors import InputError
from ...engines.manifest import Manifest, Role

Part: TypeAlias = Literal["prior"] | Role


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is: a folder, or a hub id with its revision; variant names its weight files.

    combined: the pipeline class of a checkpoint that holds prior and decoder; "" of one that holds one of them.
    """

    folder: str
    revision: str | None = None
    variant: str | None = None
    combined: str = ""


def find_sources(manifest: Manifest, folders: Iterable[str]) -> dict[Part, Source]:
    """The checkpoints of a bundle's parts: those in `folders`, else those that it was made from, where they are there.

    Raises InputError for a folder that neither is a checkpoint nor holds any.
    """
    given: dict[Part, Source] = {}
    for folder in folders:
        inside = [Path(folder), *sorted(each for each in Path(folder).glob("*") if each.is_dir())]
        found: dict[Part, Source] = {part: source for each in inside for part, source in sources_in(each).items()}
        if not found:
            raise InputError(
                f"checkpoint {folder}: expected a folder in diffusers' layout with one of "
                f"{', '.join(pipelines())} in its model_index.json, or a folder of such"
            )
        given.update(found)
    return given or made_from(manifest)


def made_from(manifest: Manifest) -> dict[Part, Source]:
    """The checkpoints that a bundle was made from, where they are there.

    The class does not tell what a decoder was trained for: 2.1's for inpainting is named as the other. An export adds
    decoders in the order of their checkpoints.
    """
    from ...export.families import family_of

    made: dict[Part, Source] = {}
    decoders, known = iter(manifest.decoders), family_of(manifest.family).pipelines
    for source in manifest.sources:
        stages = known.get(source.kind, ())
        combined = source.kind if len(stages) > 1 else ""
        parts: list[Part] = ["prior"] if "prior" in stages else []
        role = next(decoders, None) if "decoder" in stages else None
        if role is not None:
            parts.append(role)
        if Path(source.checkpoint).is_dir() or source.revision is not None:
            made |= dict.fromkeys(parts, Source(source.checkpoint, source.revision, source.variant, combined))
    return made


def pipelines() -> list[str]:
    """Pipeline classes of checkpoints that are known."""
    from ...export.families import FAMILIES

    return [name for family in FAMILIES for name in family.pipelines]


def sources_in(folder: Path) -> dict[Part, Source]:
    """What a checkpoint's folder holds; nothing where it is none."""
    from ...export.families import FAMILIES

    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        name = index["_class_name"]
        family = next(family for family in FAMILIES if name in family.pipelines)
        stages, parts = family.pipelines[name], list[Part]()
        if "prior" in stages:
            parts.append("prior")
        if "decoder" in stages:
            unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
            parts.append(family.unets[unet.get("in_channels", 4), unet.get("addition_embed_type")])
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return {}
    return dict.fromkeys(parts, Source(str(folder), combined=name if len(stages) > 1 else ""))
