"""Random inputs for any component, and ONNX Runtime on the CPU to compare with: what tests of sessions share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kandrt.engines.backends import open_component
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.session import Session
from kandrt.engines.spec import TensorSpec

LENGTHS = {"batch": 2, "height": 8, "width": 8, "image_height": 64, "image_width": 64, "timesteps": 3}


def reference(bundle: Bundle, name: str) -> Session:
    return opened_reference(bundle.folder, name)


@functools.cache
def opened_reference(folder: Path, name: str) -> Session:
    return open_component(open_bundle(folder), name, backend="onnxruntime", device="cpu", threads=1)


def arrays(specs: tuple[TensorSpec, ...], seed: int = 0, **lengths: int) -> dict[str, NDArray[Any]]:
    rng, lengths = np.random.default_rng(seed), {**LENGTHS, **lengths}
    shapes = {spec.name: [lengths[axis] if isinstance(axis, str) else axis for axis in spec.shape] for spec in specs}
    return {
        spec.name: rng.integers(0, 30, shapes[spec.name])
        if spec.dtype == "int64"
        else rng.standard_normal(shapes[spec.name], np.float32)
        for spec in specs
    }


def fits(name: str) -> dict[str, int]:
    """MoVQ and the image encoder take one picture at a time."""
    return {"batch": 1} if name.startswith(("movq", "image")) else {}
