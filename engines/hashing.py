"""SHA-256 of files too large to hold in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

CHUNK = 4 * 1024 * 1024  # bytes


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Give the SHA-256 of a file as 64 lower-case hexadecimal digits; raises OSError where it cannot be read.

    `progress` is called with the number of bytes read since its last call.
    """
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(chunk):
            digest.update(chunk[:length])
            if progress is not None:
                progress(length)
    return digest.hexdigest()
