"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError


@contextmanager
def atomic_write(path: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place at the end, or goes away if the body raises.

    An OSError becomes an OutputError; `size`, the bytes to come, is only for its message.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            needed = "" if size is None else f" ({size:,} bytes)"
            raise OutputError(f"cannot write {path}{needed}: {error.strerror or error}") from error
        raise
