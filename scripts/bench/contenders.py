"""The contenders: ways to run the same checkpoints, what each needs, and where its checkpoints lie."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias

from ...engines.errors import InputError
from ...engines.manifest import Manifest, Precision, Role
from ...export.families import FAMILIES, PRIOR, family_of
from .cases import Case
from .results import BASELINE

WorkerKind = Literal["kandrt", "diffusers", "onnx"]
Part: TypeAlias = Literal["prior"] | Role

# Flags of /proc/cpuinfo of CPUs with instructions for bf16: those of x86, and of Arm.
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "svebf16"}
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Contender:
    """A way to run the checkpoints.

    settings are its worker's. precision is what it computes in, None for the bundle's own. needs: modules that must be
    there. stages: of cases that it can be measured in, None for all. reads_checkpoints: diffusers' layout rather than
    the bundle.
    """

    name: str
    title: str
    worker: WorkerKind
    settings: Mapping[str, str] = field(default_factory=dict)
    precision: Precision | None = None
    needs: tuple[str, ...] = ()
    stages: frozenset[str] | None = None

    @property
    def reads_checkpoints(self) -> bool:
        """Whether it runs checkpoints in diffusers' layout rather than the bundle."""
        return self.worker != "kandrt"


TORCH = ("torch", "diffusers", "transformers")


def diffusers(name: str, title: str, precision: Precision = "fp32", **settings: str) -> Contender:
    """diffusers in eager mode or compiled."""
    return Contender(name, title, "diffusers", settings, precision, TORCH)


CONTENDERS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(BASELINE, "kandrt, ONNX Runtime", "kandrt", {"backend": "onnxruntime"}, None, ("onnxruntime",)),
        Contender("kandrt-openvino", "kandrt, OpenVINO", "kandrt", {"backend": "openvino"}, None, ("openvino",)),
        Contender(
            "kandrt-openvino-bf16",
            "kandrt, OpenVINO, bf16",
            "kandrt",
            {"backend": "openvino", "precision": "bf16"},
            "bf16",
            ("openvino",),
        ),
        diffusers("diffusers", "diffusers, fp32"),
        diffusers("diffusers-channels-last", "diffusers, fp32, channels last", channels_last="yes"),
        diffusers("diffusers-bf16", "diffusers, bf16", "bf16"),
        diffusers("diffusers-bf16-channels-last", "diffusers, bf16, channels last", "bf16", channels_last="yes"),
        diffusers("diffusers-compile", "diffusers, fp32, torch.compile", compile="yes"),
        Contender(
            "onnx-plain",
            "torch.onnx.export of diffusers' networks, ONNX Runtime",
            "onnx",
            {},
            "fp32",
            (*TORCH, "onnxscript", "onnxruntime"),
            frozenset({"step", "movq"}),
        ),
    )
}


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is: a folder, or a hub id with its revision; variant names its weight files."""

    folder: str
    revision: str | None = None
    variant: str | None = None


def chosen(names: Iterable[str]) -> list[Contender]:
    """Contenders by name, the baseline apart, each once; InputError for one that is not known."""
    unique = [name for name in dict.fromkeys(names) if name != BASELINE]
    unknown = [name for name in unique if name not in CONTENDERS]
    if unknown:
        raise InputError(f"contender: expected {', '.join(CONTENDERS)}, found {', '.join(unknown)}")
    return [CONTENDERS[name] for name in unique]


def unable(
    contender: Contender,
    manifest: Manifest,
    sources: Mapping[Part, Source],
    other_python: bool = False,
    *,
    find: bool = True,
) -> str | None:
    """Why a contender cannot run here at all, or None; what an interpreter of its own has shows when it starts."""
    if contender.reads_checkpoints and not sources:
        named = ", ".join(source.checkpoint for source in manifest.sources) or "none"
        return f"no checkpoint found; the bundle was made from {named}: say where they are with --checkpoint FOLDER"
    if contender.precision == "bf16" and has_bf16() is False:
        return "this CPU has no instructions for bf16"
    if other_python or not find:
        return None
    lacking = [name for name in contender.needs if find_spec(name) is None]
    return f"needs {', '.join(lacking)}, which is not installed" if lacking else None


def unable_in(contender: Contender, case: Case, manifest: Manifest, sources: Mapping[Part, Source]) -> str | None:
    """Why a contender cannot be measured in a case, or None."""
    if contender.stages is not None and case.stage not in contender.stages:
        return f"has only {' and '.join(sorted(contender.stages))}"
    if not contender.reads_checkpoints:
        return None
    wanted: list[Part] = ["prior"] if case.runs_prior and manifest.prior is not None else []
    if case.stage != "prior":
        wanted.append(case.role)
    lacking = [part for part in wanted if part not in sources]
    return f"no checkpoint of the {' and the '.join(lacking)} found; give --checkpoint FOLDER" if lacking else None


def has_bf16() -> bool | None:
    """Whether this CPU has instructions for bf16; None where the system does not say."""
    try:
        words = set(CPU_INFO.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return None
    return bool(words & BF16_FLAGS) if words & {"flags", "Features"} else None


def find_sources(manifest: Manifest, folders: Iterable[str]) -> dict[Part, Source]:
    """The checkpoints of a bundle's parts: those in `folders`, else those that it was made from, where they are there.

    Raises InputError for a folder that neither is a checkpoint nor holds any.
    """
    given: dict[Part, Source] = {}
    for folder in folders:
        inside = [Path(folder), *sorted(each for each in Path(folder).glob("*") if each.is_dir())]
        found: list[tuple[Part, Source]] = []
        for each in inside:
            part = part_of(each)
            if part is not None:
                found.append((part, Source(str(each))))
        if not found:
            raise InputError(
                f"checkpoint {folder}: expected a folder in diffusers' layout with one of "
                f"{', '.join(alone())} in its model_index.json, or a folder of such"
            )
        given.update(found)
    if given:
        return given
    # The class does not tell what a decoder was trained for: 2.1's for inpainting is named as the other. An export adds
    # decoders in the order of their checkpoints.
    made: dict[Part, Source] = {}
    decoders, pipelines = iter(manifest.decoders), family_of(manifest.family).pipelines
    for source in manifest.sources:
        stages = pipelines.get(source.kind, ())
        name: Part | None = next(decoders, None) if "decoder" in stages else "prior"
        there = Path(source.checkpoint).is_dir() or source.revision is not None
        if name is not None and len(stages) == 1 and there:
            made[name] = Source(source.checkpoint, source.revision, source.variant)
    return made


def alone() -> list[str]:
    """Pipeline classes of checkpoints that hold one stage."""
    return [name for family in FAMILIES for name, stages in family.pipelines.items() if len(stages) == 1]


def part_of(folder: Path) -> Part | None:
    """What a checkpoint's folder holds, None where it is none, or holds two stages."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        family = next(family for family in FAMILIES if index["_class_name"] in family.pipelines)
        stages = family.pipelines[index["_class_name"]]
        if len(stages) > 1:
            return None
        if stages == PRIOR:
            return "prior"
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        return family.unets.get((unet.get("in_channels", 4), unet.get("addition_embed_type")))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
