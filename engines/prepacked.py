"""Graphs as ONNX Runtime's CPU provider runs them, kept on disk: optimized, weights in the order that its kernels read.

Opening a graph, ONNX Runtime reorders its weights, which is most of the time until a first result, and holds the copies
as memory of its own. A graph that was kept is mapped instead: it opens in seconds, and processes share its weights.
Outputs are the same to the last bit, because the same kernels run. It depends on the version of ONNX Runtime and on the
CPU's instructions, so both are in the name of its folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .files import atomic_write
from .hashing import sha256_file

GRAPH, WEIGHTS, RECORD = "graph.onnx", "graph.weights", "record.json"
# Settings of ONNX Runtime's, of a session that writes what it made of a graph
SAVING = {
    "session.optimized_model_external_initializers_file_name": WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}
CPU_INFO = Path("/proc/cpuinfo")

# Opens a graph; given a path, writes there what it made of the graph
Save = Callable[[Path], Any]


@functools.cache
def cpu() -> str:
    """The instructions that the CPU has, as 8 hexadecimal digits."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(" ".join([platform.machine(), *sorted(flags.split())]).encode()).hexdigest()[:8]


def kept(folder: Path) -> Path | None:
    """The graph that is kept in `folder`, if it is there and what was written: None otherwise.

    As with a bundle, the graph's SHA-256 is compared, and of the weights their size.
    """
    try:
        record = json.loads((folder / RECORD).read_bytes())
        sizes = {name: (folder / name).stat().st_size for name in record["sizes"]}
        own = {GRAPH} <= sizes.keys() <= {GRAPH, WEIGHTS}  # small weights are in the graph
        whole = own and sizes == record["sizes"] and sha256_file(folder / GRAPH) == record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder / GRAPH if whole else None


def keep(name: str, folder: Path, save: Save) -> Path | None:
    """Have the graph of the component `name` written into `folder`, whole or not at all.

    None, with a warning, where it cannot be: a full disk or a folder that cannot be written to is no reason not to run.
    """
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        save(temporary / GRAPH)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        with atomic_write(temporary / RECORD) as file:
            file.write(json.dumps({"sizes": sizes, "sha256": sha256_file(temporary / GRAPH)}).encode())
        shutil.rmtree(folder, ignore_errors=True)  # what is there was found damaged
        temporary.replace(folder)
    except Exception as error:  # onnxruntime's exceptions share no base class
        if (found := kept(folder)) is not None:  # another process was faster
            return found
        warnings.warn(f"{name}: opened without the cache in {folder}: {error}", stacklevel=2)
        return None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder / GRAPH
