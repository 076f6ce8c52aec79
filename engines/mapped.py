"""Files that an engine library maps into memory: taken out of it again once the library has copies of its own."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

MAPS = Path("/proc/self/maps")
MADV_DONTNEED = 4  # of <sys/mman.h> on Linux, the same on every architecture that Python runs on


def drop_mapped(files: Iterable[Path]) -> None:
    """Let the pages of `files` that are mapped into this process, read alone, leave its resident memory.

    Whoever reads such a page again finds it as before, out of the system's cache or the file. OpenVINO 2026.4 keeps a
    graph's weights mapped beside the copies that its kernels use: without this, both count as resident. Does nothing
    where the system is not Linux, or does not say what is mapped.
    """
    wanted = {os.path.realpath(file) for file in files}
    if not wanted or not sys.platform.startswith("linux"):
        return
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in lines:
        # address range, rights, offset, device, inode, path
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5] in wanted and "w" not in parts[1]:
            start, end = (int(address, 16) for address in parts[0].split("-"))
            madvise(start, end - start, MADV_DONTNEED)
