"""Where engine libraries keep what they compile of a component when they run it: in the bundle's `engines/caches`."""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from .bundle import Bundle
from .errors import OutputError
from .request import Request

CACHES = "engines/caches"
UNFINISHED_SECONDS = 3600.0  # what is being written is finished, or will never be, after so long


@dataclass(frozen=True)
class Cache:
    """What a backend keeps of a component: a folder, its bytes, and why it is of no use, "" where it may be of some."""

    folder: Path
    component: str
    backend: str
    size: int
    problem: str


def cache_folder(request: Request, version: str) -> Path:
    """A folder for a component under a backend: another one for another graph, other weights or another library.

    It need not exist, nor be one that can be written to.
    """
    folder = request.bundle.folder / CACHES / f"{request.backend}-{version}"
    return folder / request.name / cache_key(request.bundle, request.name)


def cache_key(bundle: Bundle, name: str) -> str:
    """Digits for a component's graph and weights."""
    hashes = [record.sha256 for record in bundle.manifest.component_files(name)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def caches(bundle: Bundle) -> list[Cache]:
    """All that is kept in a bundle; of another version of a library, or for another CPU, it may be of use elsewhere."""
    keys = {name: cache_key(bundle, name) for name in bundle.manifest.components}
    found = []
    for folder in sorted((bundle.folder / CACHES).glob("*/*/*")):
        if folder.is_symlink() or not folder.is_dir():
            continue
        name, backend = folder.parent.name, folder.parent.parent.name
        problem = "" if folder.name == keys.get(name) else "it is of another graph or other weights"
        if folder.name.startswith("."):
            young = time.time() - folder.stat().st_mtime < UNFINISHED_SECONDS
            problem = "" if young else "it was not finished"
        size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
        found.append(Cache(folder, name, backend, size, problem))
    return found


def remove(cache: Cache) -> None:
    """Remove one with the folders that it leaves empty; OutputError where that fails."""
    try:
        shutil.rmtree(cache.folder)
        for folder in cache.folder.parents[:3]:
            if any(folder.iterdir()):
                break
            folder.rmdir()
    except OSError as error:
        raise OutputError(f"cannot remove {cache.folder}: {error.strerror or error}") from error
