"""How much memory this machine has, and how much the weights of components take."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .errors import BackendError
from .manifest import Component, Manifest, Precision

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
WEIGHT_BYTES: Mapping[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


def machine_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or less in a container; None where nothing tells."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    try:
        return min(total, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        return total


def weights_memory(manifest: Manifest, names: Iterable[str], precision: Precision = "fp32") -> int:
    """Bytes that the weights of components take once they are open, held in `precision`.

    On a CPU that is fp32, whatever a bundle computes in: ONNX Runtime 1.31 widens weights of 16 bits as it opens a
    graph, and OpenVINO 2026.4 takes as much for them, or more. Weights of 8 bits stay so. What an engine needs besides
    (activations, copies while it loads) is not in it: a least, not an estimate.
    """
    return sum(component_memory(manifest, manifest.components[name], precision) for name in names)


def component_memory(manifest: Manifest, component: Component, precision: Precision) -> int:
    """Bytes that the weights of one component take, once it is open."""
    whole = component.parameters * WEIGHT_BYTES[precision]
    if component.quantization is None:
        return whole
    # The files hold the layers in 8 bits as they are kept in memory, the others as wide as that or narrower.
    return min(whole, sum(manifest.weights[name].size for name in component.weights))


def check_fits(manifest: Manifest, names: Sequence[str], *, stages: bool) -> None:
    """Raise BackendError where the weights of components that a CPU is to hold exceed this machine.

    stages: those of one stage at a time, as they are closed when it is over; else all together. The message says what
    is needed, and what fits.
    """
    limit, each = machine_memory(), {group: weights_memory(manifest, group) for group in stage_groups(manifest, names)}
    if limit is None or not each:
        return
    largest = max(each, key=each.__getitem__)
    most, limit_text = gigabytes(each[largest]), gigabytes(limit)
    if each[largest] > limit:
        half = gigabytes(weights_memory(manifest, largest, "fp16"))
        states = ", or give what it would say (prompt_embeds), made elsewhere"
        raise BackendError(
            f"{' and '.join(largest)}: its weights take {most} on a CPU, which holds them in fp32, and this machine "
            f"has {limit_text}, too little for any memory mode; run it on a machine with more, or on a GPU, where a "
            f"bundle in fp16 or bf16 takes {half}{states if reads_prompts_alone(manifest, largest[0]) else ''}"
        )
    if not stages and sum(each.values()) > limit:
        raise BackendError(
            f"{', '.join(names)}: their weights take {gigabytes(sum(each.values()))} together, and this machine has "
            f"{limit_text}; memory='stage' (--memory stage) closes each network when its stage is over, and takes "
            f"{most} of weights at most"
        )


def stage_groups(manifest: Manifest, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Components by what is open at once in a stage: one, or the two that stand in for a decoder's step."""
    pairs = [(record.reuse.refresh, record.reuse.shallow) for record in manifest.decoders.values() if record.reuse]
    group_of = {name: pair for pair in pairs if set(pair) <= set(names) for name in pair}
    return list(dict.fromkeys(group_of.get(name, (name,)) for name in names))


def reads_prompts_alone(manifest: Manifest, name: str) -> bool:
    """Whether a component reads the prompts of a decoder that takes nothing else."""
    records = (record for record in manifest.decoders.values() if record.embedding_dim is None)
    return any(record.prompt is not None and record.prompt.encoder == name for record in records)


def gigabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.3g} GB"
