"""How much memory this machine has, and how much the weights of components take."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .errors import BackendError
from .manifest import Manifest, Precision

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
    graph, and OpenVINO 2026.4 takes as much for them, or more. What an engine needs besides (activations, copies while
    it loads) is not in it: a least, not an estimate.
    """
    return sum(manifest.components[name].parameters for name in names) * WEIGHT_BYTES[precision]


def check_fits(manifest: Manifest, name: str, opened: Sequence[str], *, stages: bool) -> None:
    """Raise BackendError where the weights of `name`, with those of what is open on the CPU, exceed this machine.

    stages: whether components are closed when their stage is over. The message says what is needed, and what fits.
    """
    limit, needed = machine_memory(), weights_memory(manifest, [name, *opened])
    if limit is None or needed <= limit:
        return
    alone = weights_memory(manifest, [name])
    if alone <= limit and not stages:
        most = max(weights_memory(manifest, [each]) for each in manifest.components)
        raise BackendError(
            f"{name}: its weights take {gigabytes(alone)}, with those of what is open ({', '.join(opened)}) "
            f"{gigabytes(needed)}, and this machine has {gigabytes(limit)}; memory='stage' (--memory stage) closes "
            f"each network when its stage is over, and takes {gigabytes(most)} of weights at most"
        )
    half = weights_memory(manifest, [name], "fp16")
    raise BackendError(
        f"{name}: its weights take {gigabytes(needed)} on a CPU, which holds them in fp32, and this machine has "
        f"{gigabytes(limit)}, too little for any memory mode; run it on a machine with more, or on a GPU, where a "
        f"bundle in fp16 or bf16 takes {gigabytes(half)}"
    )


def gigabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.3g} GB"
