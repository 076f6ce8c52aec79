"""Where engine libraries keep what they compile of a component when they run it: in the bundle's `engines/caches`."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .request import Request

CACHES = "engines/caches"


def cache_folder(request: Request, version: str) -> Path:
    """A folder for a component under a backend: another one for another graph, other weights or another library.

    It need not exist, nor be one that can be written to.
    """
    hashes = [record.sha256 for record in request.bundle.manifest.component_files(request.name)]
    key = hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
    return request.bundle.folder / CACHES / f"{request.backend}-{version}" / request.name / key
