"""Small checkpoints and a bundle of each family made from them, shared by all tests and by all workers of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

KINDS = {
    "prior": "kandinsky-2-2-prior",
    "decoder": "kandinsky-2-2-decoder",
    "inpaint": "kandinsky-2-2-decoder-inpaint",
    "controlnet": "kandinsky-2-2-controlnet-depth",
    "combined": "kandinsky-2-2-combined",
    "prior-2-1": "kandinsky-2-1-prior",
    "decoder-2-1": "kandinsky-2-1",
    "inpaint-2-1": "kandinsky-2-1-inpaint",
    "combined-2-1": "kandinsky-2-1-combined",
    "decoder-3": "kandinsky-3",
}

# Nothing here may reach the network: a hub id in a test is a mistake.
os.environ["HF_HUB_OFFLINE"] = "1"


def once(folder: Path, make: Callable[[Path], Any]) -> Path:
    """Make `folder` in the first worker that asks for it."""
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            make(folder)
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def checkpoints(shared: Path) -> dict[str, Path]:
    """Small random checkpoints by role, and a combined one."""
    from kandrt.scripts.random_checkpoint import make_checkpoint

    return {
        role: once(
            shared / f"checkpoint-{role}", lambda path, kind=kind: make_checkpoint(kind, path, small=True, seed=1)
        )  # type: ignore[misc]
        for role, kind in KINDS.items()
    }


@pytest.fixture(scope="session")
def bundle(shared: Path, checkpoints: dict[str, Path]) -> Path:
    """One fp32 bundle of the prior and the three decoders, exported with checks."""
    from kandrt.export.exporter import export_bundle

    sources = [checkpoints[role] for role in ("prior", "decoder", "inpaint", "controlnet")]
    return once(shared / "bundle", lambda path: export_bundle(sources, path))


@pytest.fixture(scope="session")
def bundle_2_1(shared: Path, checkpoints: dict[str, Path]) -> Path:
    """One fp32 bundle of Kandinsky 2.1's prior and both decoders, exported with checks."""
    from kandrt.export.exporter import export_bundle

    sources = [checkpoints[role] for role in ("prior-2-1", "decoder-2-1", "inpaint-2-1")]
    return once(shared / "bundle-2-1", lambda path: export_bundle(sources, path))


@pytest.fixture(scope="session")
def bundle_3(shared: Path, checkpoints: dict[str, Path]) -> Path:
    """One fp32 bundle of Kandinsky 3, exported with checks."""
    from kandrt.export.exporter import export_bundle

    return once(shared / "bundle-3", lambda path: export_bundle([checkpoints["decoder-3"]], path))


@pytest.fixture(scope="session")
def fp16_bundle(shared: Path, checkpoints: dict[str, Path]) -> Path:
    """A bundle of the prior and the decoder in fp16, exported without checks; not to be changed."""
    from kandrt.export.exporter import export_bundle

    sources = [checkpoints[role] for role in ("prior", "decoder")]
    folder = shared / "fp16-bundle"
    return once(folder, lambda path: export_bundle(sources, path, precision="fp16", check=False))


@pytest.fixture(scope="session")
def spare_bundle(shared: Path, bundle: Path) -> Path:
    """A copy of the bundle to hard-link from: onnx refuses weights with several links, so the bundle's own have one."""
    return once(shared / "spare-bundle", lambda path: shutil.copytree(bundle, path))


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> Iterator[None]:
    """One PyTorch thread a worker: small networks are slower with more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
