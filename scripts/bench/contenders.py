"""The contenders: ways to run the same checkpoints, what each needs, and which of them can run here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ...engines.auto import has_driver
from ...engines.backends import unusable
from ...engines.errors import InputError
from ...engines.manifest import Manifest, Precision
from .cases import Case
from .results import BASELINE
from .sources import Part, Source

WorkerKind = Literal["kandrt", "diffusers", "onnx"]
ALL = "all"

# Flags of /proc/cpuinfo of CPUs with instructions for bf16: those of x86, and of Arm.
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "svebf16"}
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Contender:
    """A way to run the checkpoints.

    settings are its worker's. precision is what it computes in, None for the bundle's own; int8: most of it in 8 bits,
    and in `precision` the rest. needs: modules that must be there. stages: of cases that it can be measured in, None
    for all.
    """

    name: str
    title: str
    worker: WorkerKind
    settings: Mapping[str, str] = field(default_factory=dict)
    precision: Precision | None = None
    needs: tuple[str, ...] = ()
    stages: frozenset[str] | None = None
    int8: bool = False

    @property
    def reads_checkpoints(self) -> bool:
        """Whether it runs checkpoints in diffusers' layout rather than the bundle."""
        return self.worker != "kandrt"

    @property
    def device(self) -> str:
        """Where it computes: "cpu" or "cuda"."""
        return self.settings.get("device", "cpu")

    def computes_in(self, manifest: Manifest) -> Precision:
        """What it computes in, int8 apart."""
        return self.precision or manifest.precision

    def arithmetic(self, manifest: Manifest) -> str:
        """What most of its operations are computed in."""
        return "int8" if self.int8 else self.computes_in(manifest)


OPTION = "option."  # what names of a backend's options begin with among a worker's settings
TORCH = ("torch", "diffusers", "transformers")


def kandrt(
    name: str,
    title: str,
    backend: str,
    precision: Precision | None = None,
    device: str = "cpu",
    needs: tuple[str, ...] = (),
    int8: bool = False,
    **options: str,
) -> Contender:
    """kandrt with one of its backends; options are the backend's."""
    settings = {"backend": backend, "device": device} | ({} if precision is None else {"precision": precision})
    settings |= {f"{OPTION}{name}": text for name, text in options.items()}
    return Contender(name, title, "kandrt", settings, precision, needs or (backend,), int8=int8)


def diffusers(name: str, title: str, precision: Precision = "fp32", **settings: str) -> Contender:
    """diffusers in eager mode or compiled."""
    return Contender(name, title, "diffusers", settings, precision, TORCH)


CONTENDERS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        kandrt(BASELINE, "kandrt, ONNX Runtime", "onnxruntime"),
        kandrt("kandrt-cached", "kandrt, ONNX Runtime, graphs kept", "onnxruntime", cache="on"),
        kandrt("kandrt-openvino", "kandrt, OpenVINO", "openvino"),
        kandrt("kandrt-openvino-bf16", "kandrt, OpenVINO, bf16", "openvino", "bf16"),
        kandrt("kandrt-int8", "kandrt, ONNX Runtime, int8 and fp32", "onnxruntime", int8=True),
        kandrt("kandrt-openvino-int8", "kandrt, OpenVINO, int8 and bf16", "openvino", "bf16", int8=True),
        diffusers("diffusers", "diffusers, fp32"),
        diffusers("diffusers-channels-last", "diffusers, fp32, channels last", channels_last="yes"),
        diffusers("diffusers-bf16", "diffusers, bf16", "bf16"),
        diffusers("diffusers-bf16-channels-last", "diffusers, bf16, channels last", "bf16", channels_last="yes"),
        diffusers("diffusers-compile", "diffusers, fp32, torch.compile, frozen weights", compile="yes", freeze="yes"),
        diffusers(
            "diffusers-compile-bf16", "diffusers, bf16, torch.compile, frozen weights", "bf16", compile="yes",
            freeze="yes",
        ),
        Contender(
            "onnx-plain",
            "torch.onnx.export of diffusers' networks, ONNX Runtime",
            "onnx",
            {},
            "fp32",
            (*TORCH, "onnxscript", "onnxruntime"),
            frozenset({"step", "movq"}),
        ),
        kandrt("kandrt-cuda", "kandrt, ONNX Runtime on the GPU", "onnxruntime", None, "cuda", ("onnxruntime", "cupy")),
        kandrt("kandrt-tensorrt", "kandrt, TensorRT", "tensorrt", None, "cuda", ("tensorrt", "cupy")),
        kandrt("kandrt-tensorrt-rtx", "kandrt, TensorRT-RTX", "tensorrt-rtx", None, "cuda", ("tensorrt_rtx", "cupy")),
        diffusers("diffusers-cuda-fp16", "diffusers on the GPU, fp16", "fp16", device="cuda"),
        diffusers(
            "diffusers-cuda-fp16-compile", "diffusers on the GPU, fp16, torch.compile", "fp16", device="cuda",
            compile="yes",
        ),
    )
}  # fmt: skip


def chosen(names: Iterable[str], baseline: str = BASELINE) -> list[Contender]:
    """Contenders by name, the baseline apart, each once, "all" for all; InputError for one that is not known."""
    spelled = [each for name in names for each in (CONTENDERS if name == ALL else [name])]
    unique = [name for name in dict.fromkeys(spelled) if name != baseline]
    unknown = [name for name in (*unique, baseline) if name not in CONTENDERS]
    if unknown:
        raise InputError(f"contender: expected {', '.join((*CONTENDERS, ALL))}, found {', '.join(unknown)}")
    return [CONTENDERS[name] for name in unique]


def unable(
    contender: Contender,
    manifest: Manifest,
    sources: Mapping[Part, Source],
    other_python: bool = False,
    *,
    quantized: bool = False,
) -> str | None:
    """Why a contender cannot run here at all, or None; what an interpreter of its own has shows when it starts.

    quantized: whether there is a bundle in int8.
    """
    if contender.reads_checkpoints and not sources:
        named = ", ".join(source.checkpoint for source in manifest.sources) or "none"
        return f"no checkpoint found; the bundle was made from {named}: say where they are with --checkpoint FOLDER"
    if contender.int8 and not quantized:
        return "needs a bundle in int8: make one with `kandrt quantize BUNDLE -o FOLDER`, and give --quantized FOLDER"
    if contender.precision == "bf16" and contender.device == "cpu" and has_bf16() is False:
        return "this CPU has no instructions for bf16"
    if contender.device == "cuda" and not has_driver():
        return "no NVIDIA GPU here, or no driver"
    if other_python:
        return None
    lacking = [name for name in contender.needs if find_spec(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)}, which is not installed"
    if contender.worker == "kandrt" and contender.device != "cpu":
        return unusable(contender.settings["backend"], contender.device, manifest.precision, contender.precision)
    return None


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


def most_exact(names: Sequence[str], manifest: Manifest, baseline: str) -> str:
    """Of contenders that gave a result, the one that the others' are compared with: see `docs/bench.md`.

    The baseline if it computes in fp32, else the first that does, in the order of CONTENDERS; where none does, the
    baseline.
    """
    exact = [name for name in CONTENDERS if name in names and CONTENDERS[name].arithmetic(manifest) == "fp32"]
    return baseline if baseline in exact or not exact else exact[0]
