"""What is known of a plan: everything it depends on, and what building it showed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

import msgspec

from .bundle import Bundle
from .errors import BundleError
from .manifest import FileRecord, Precision, Sha256, Size
from .profiles import Profile

RECORD_VERSION = 1
# Raised when the same library and graph come to give another plan, because kandrt asks for it differently.
BUILDER_REVISION = 1

Builder = Literal["tensorrt", "tensorrt-rtx"]
Capability = Annotated[str, msgspec.Meta(pattern="^sm[0-9]{1,4}$")]
Flag = Literal["REFIT_IDENTICAL", "STRIP_PLAN", "WEIGHT_STREAMING"]  # names of TensorRT's BuilderFlag


@dataclass(frozen=True)
class PlanSettings:
    """How a plan is built, sizes and GPUs apart: flags by name, never by number, which versions change.

    workspace_bytes bounds the scratch memory of single operators, None leaves it to the library; optimization_level is
    TensorRT's builder optimization level, 0 to 5, None its default.
    """

    flags: tuple[Flag, ...] = ()
    workspace_bytes: Annotated[int, msgspec.Meta(ge=1)] | None = None
    optimization_level: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None


@dataclass(frozen=True)
class PlanKey:
    """Everything that a plan depends on: plans of equal keys are interchangeable.

    graph is the SHA-256 of the ONNX file and weights those of the files it reads, library the version of the builder's
    package, compute_capabilities the GPUs it is for ("sm89"), precision what its networks compute in.
    """

    component: str
    builder: Builder
    library: str
    revision: int
    graph: Sha256
    weights: dict[str, Sha256]
    precision: Precision
    compute_capabilities: tuple[Capability, ...]
    profiles: tuple[Profile, ...]
    settings: PlanSettings = field(default_factory=PlanSettings)

    @property
    def digest(self) -> str:
        """SHA-256 of all parts, 64 hexadecimal digits."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    @property
    def stem(self) -> str:
        """Name of the plan's files, without what follows the dot."""
        return f"{self.component}-{self.digest[:16]}"


@dataclass(frozen=True)
class PlanFigures:
    """What building showed: seconds, bytes, and the share of floating-point tensors that are in 16 bits.

    layers are those of the parsed network. weights, activations (of one context, scratch included) and scratch are of
    the device; None where the library's log does not say. peak is the resident memory of the process that built it.
    """

    layers: Size
    seconds: float
    half_share: float
    peak_bytes: Size | None
    weights_bytes: Size | None = None
    activation_bytes: Size | None = None
    scratch_bytes: Size | None = None


@dataclass(frozen=True)
class PlanRecord:
    """A plan in the store: its key, its file (by its name in the store), figures, and the end of the build log.

    options are those of `kandrt build` that gave it, GPUs and component apart.
    """

    record_version: int
    key: PlanKey
    plan: FileRecord
    figures: PlanFigures
    log: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def encode_record(record: PlanRecord) -> bytes:
    """A record as indented UTF-8 with a final newline."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def decode_record(data: bytes, where: str) -> PlanRecord:
    """Read a record; BundleError, which begins with `where`, for another version or a field of a wrong type."""
    try:
        version = msgspec.json.decode(data, type=dict[str, Any]).get("record_version")
        if version != RECORD_VERSION:
            raise BundleError(f"{where}: expected record_version {RECORD_VERSION}, found {version!r}")
        return msgspec.json.decode(data, type=PlanRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where} is damaged: {error}") from error


def plan_key(
    bundle: Bundle,
    component: str,
    *,
    builder: Builder,
    library: str,
    compute_capabilities: Sequence[str],
    profiles: Sequence[Profile],
    settings: PlanSettings,
) -> PlanKey:
    """The key of a plan of a component as the bundle is now."""
    manifest = bundle.manifest
    record = manifest.components[component]
    return PlanKey(
        component=component,
        builder=builder,
        library=library,
        revision=BUILDER_REVISION,
        graph=record.graph.sha256,
        weights={name: manifest.weights[name].sha256 for name in record.weights},
        precision=record.precision,
        compute_capabilities=tuple(sorted(set(compute_capabilities), key=capability_order)),
        profiles=tuple(profiles),
        settings=settings,
    )


def capability_order(capability: str) -> int:
    """Older GPUs first: the number in "sm89"."""
    return int(capability.removeprefix("sm"))


def differences(found: PlanKey, wanted: PlanKey) -> list[str]:
    """The parts in which two keys differ, for people."""
    parts = []
    for part in fields(PlanKey):
        old, new = getattr(found, part.name), getattr(wanted, part.name)
        if old != new:
            parts.append(f"{LABELS.get(part.name, part.name)}: {shown(old)}, now {shown(new)}")
    return parts


LABELS = {
    "library": "builder version",
    "revision": "builder revision of kandrt",
    "compute_capabilities": "GPUs",
    "graph": "graph hash",
    "weights": "weights hash",
}


def shown(value: Any) -> str:
    """A part of a key, short."""
    if isinstance(value, str):
        return value[:12] + "…" if len(value) == 64 else value
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(each)}" for name, each in value.items())
    if isinstance(value, tuple):
        return "; ".join(shown(each) for each in value) or "none"
    if isinstance(value, PlanSettings):
        settings: list[str] = [*value.flags]
        settings += [] if value.workspace_bytes is None else [f"workspace {value.workspace_bytes} bytes"]
        settings += [] if value.optimization_level is None else [f"optimization level {value.optimization_level}"]
        return ", ".join(settings) or "defaults"
    return str(value)
