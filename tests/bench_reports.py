"""Made-up reports of `kandrt bench`, whose numbers are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kandrt.scripts.bench.results import (
    SCHEMA,
    CaseRecord,
    Contestant,
    Equivalence,
    Machine,
    Measurement,
    Report,
    Residence,
    Skipped,
    Tradeoff,
)

# Times as long as kandrt, by contender.
FACTORS = {
    "kandrt-openvino": 0.8, "kandrt-int8": 0.4, "diffusers": 2.3, "diffusers-bf16-channels-last": 1.45,
    "diffusers-compile": 1.9, "onnx-plain": 1.2,
}  # fmt: skip
TITLES = {
    "kandrt": "kandrt, ONNX Runtime",
    "kandrt-openvino": "kandrt, OpenVINO",
    "kandrt-openvino-bf16": "kandrt, OpenVINO, bf16",
    "kandrt-int8": "kandrt, ONNX Runtime, int8 and fp32",
    "diffusers": "diffusers, fp32",
    "diffusers-bf16-channels-last": "diffusers, bf16, channels last",
    "diffusers-compile": "diffusers, fp32, torch.compile",
    "onnx-plain": "torch.onnx.export of diffusers' networks, ONNX Runtime",
}
CASES = {
    "prior": 0.35, "step": 0.9, "step@768": 2.3, "step@1024": 4.6, "step*2": 1.7, "step*4": 3.4, "movq": 0.8,
    "text-to-image": 46.0, "cold-start": 4.2,
}  # fmt: skip
STAGES = {"prior": 0.02, "decoder context": 0.01, "steps": 0.92, "movq": 0.05}
OPERATORS = {"Conv": 0.62, "MatMul": 0.25, "Attention": 0.1, "Gemm": 0.03}


def samples(median: float, rounds: int, generator: np.random.Generator, noise: float) -> list[float]:
    return [float(each) for each in median * np.exp(noise * generator.standard_normal(rounds))]


def case_record(name: str) -> CaseRecord:
    kind = name.partition("@")[0].partition("*")[0]
    side, batch = int(name.partition("@")[2] or 512), int(name.partition("*")[2] or 1)
    flops = 1.2e11 * batch * (side / 512) ** 2 * (50 if kind == "text-to-image" else 1)
    whole = kind == "text-to-image"
    return CaseRecord(
        name,
        f"What is timed of {kind}, told in a sentence that takes more room than a line of a terminal of eighty columns "
        "has, as those do.",
        side,
        side,
        batch,
        steps=50 if whole else None,
        prior_steps=25 if whole or kind == "prior" else None,
        flops=flops,
        bytes=5e9,
        by_operator={operator: share * flops for operator, share in OPERATORS.items()},
        warm_up="2 steps of the prior and 1 step of the decoder" if whole else "",
    )


def equivalence(contender: str, kind: str) -> Equivalence | None:
    if kind in ("cold-start", "load"):
        return None
    if "int8" in contender:
        return Equivalence("PSNR", 33.0, 30.0, passed=True)
    if "bf16" in contender:
        return Equivalence("PSNR", 31.0, 25.0, passed=True)
    return Equivalence("PSNR", 88.0, 60.0, passed=True)


def measurements(
    factors: Mapping[str, float], cases: Mapping[str, float], rounds: int, noise: float
) -> list[Measurement]:
    generator, found = np.random.default_rng(7), []
    for case, base in cases.items():
        kind = case.partition("@")[0].partition("*")[0]
        for contender, factor in {"kandrt": 1.0, **factors}.items():
            if contender == "onnx-plain" and kind not in ("step", "movq"):
                continue
            stages = {name: share * base * factor for name, share in STAGES.items()} if kind == "text-to-image" else {}
            found.append(
                Measurement(
                    case,
                    contender,
                    samples(base * factor, rounds, generator, noise),
                    [] if contender == "kandrt" else samples(base, rounds, generator, noise),
                    [1.5 * base * factor],
                    open_seconds=3 * factor,
                    first_seconds=1.4 * base * factor,
                    peak_memory=int(6.2e9 * (1 + 0.2 * factor)),
                    stages=stages,
                    equivalence=None if contender == "kandrt" else equivalence(contender, kind),
                    memory=Residence(int(4e9 * (1 + 0.2 * factor)), int(1.1e9), int(4.6e9)),
                )
            )
    return found


def made_report(
    factors: Mapping[str, float] = FACTORS,
    cases: Mapping[str, float] = CASES,
    rounds: int = 7,
    noise: float = 0.03,
    **changed: Any,
) -> Report:
    """A report in which a run of a contender takes `factors` times as long as kandrt's seconds in `cases`."""
    fields: dict[str, Any] = {
        "schema": SCHEMA,
        "kandrt": "0.1.0",
        "started": "2026-01-02T03:04:05Z",
        "seconds": 1234.5,
        "command": "kandrt bench my-bundle --against diffusers,diffusers-compile -o bench.html",
        "bundle": "my-bundle",
        "family": "kandinsky-2-2",
        "precision": "fp32",
        "machine": Machine(
            "AMD EPYC 9R14 96-Core Processor", 2, 16_000_000_000, "Linux-6.1-x86_64", "3.11.4",
            {"onnxruntime": "1.31.0", "torch": "2.13.0", "diffusers": "0.42.1", "numpy": "2.3.1"},
            {"gemm fp32": 2.21e11, "conv3x3 fp32": 1.83e11, "conv3x3 int8": 8.2e11},
        ),
        "contenders": [
            Contestant(name, TITLES[name], size, "int8" if "int8" in name else "bf16" if "bf16" in name else "fp32")
            for name, size in zip(("kandrt", *factors), (277_000_000, 391_000_000, *[1_203_000_000] * 9), strict=False)
        ],
        "cases": [case_record(name) for name in cases],
        "measurements": measurements(factors, cases, rounds, noise),
        "skipped": [
            Skipped("diffusers-bf16", "this CPU has no instructions for bf16"),
            Skipped("onnx-plain", "has only movq and step", "text-to-image"),
        ],
    }  # fmt: skip
    return Report(**fields | changed)


def made_tradeoffs() -> list[Tradeoff]:
    """Curves of several techniques whose points lie as real ones do: less time, somewhat less right."""
    found = [Tradeoff("default", "50 steps", 2.4, 0.9, 0.86, 0.93, 60, None)]
    for technique, settings in {
        "dpmpp-2m": {"25 steps": (1.2, 0.9, 38.0), "15 steps": (0.75, 0.89, 33.0), "5 steps": (0.3, 0.71, 24.0)},
        "guidance interval": {"0 to 0.7": (2.0, 0.9, 41.0), "0 to 0.5": (1.8, 0.88, 34.0)},
        "feature reuse": {
            "every 2nd": (1.7, 0.9, 40.0),
            "every 3rd": (1.4, 0.88, 36.0),
            "every 5th": (1.2, 0.85, 31.0),
        },
        "int8": {"int8": (1.3, 0.89, 33.0)},
    }.items():
        for setting, (seconds, accuracy, psnr) in settings.items():
            low, high = accuracy - 0.045, min(accuracy + 0.035, 1.0)
            found.append(Tradeoff(technique, setting, seconds, accuracy, low, high, 60, psnr))
    return found
