"""Weights that an engine mapped leave memory again, and come back when they are read."""

from __future__ import annotations

import mmap
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from kandrt.engines.backends import open_component
from kandrt.engines.bundle import open_bundle
from kandrt.engines.mapped import MAPS, drop_mapped
from kandrt.runtime.miniature import MINIATURE

SIZE = 8 * 2**20

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are dropped on Linux alone")


def resident(file: Path) -> int:
    """Bytes of a file that are mapped into this process and in its memory, as the system counts."""
    total, inside = 0, False
    for line in MAPS.with_name("smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@linux
def test_pages_leave_memory_and_come_back(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    path, other = tmp_path / "weights with a space.safetensors", tmp_path / "other.safetensors"
    for each in (path, other):
        each.write_bytes(data.tobytes())
    with (
        path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        other.open("rb") as rest, mmap.mmap(rest.fileno(), 0, access=mmap.ACCESS_READ) as untouched,
    ):  # fmt: skip
        assert bytes(mapped) == bytes(untouched) == data.tobytes()
        assert resident(path) == resident(other) == SIZE
        drop_mapped([path])
        assert resident(path) == 0
        assert resident(other) == SIZE
        assert bytes(mapped) == data.tobytes()


@linux
def test_what_can_be_written_stays(tmp_path: Path) -> None:
    """Pages of a private mapping that were written to are nowhere else."""
    path = tmp_path / "data"
    path.write_bytes(bytes(mmap.PAGESIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:4] = b"mine"
        drop_mapped([path])
        assert mapped[:4] == b"mine"


def test_without_the_system_s_word_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kandrt.engines.mapped.MAPS", tmp_path / "absent")
    drop_mapped([tmp_path / "file"])


@linux
def test_openvino_keeps_no_file_in_memory() -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    bundle = open_bundle(MINIATURE)
    name = "movq_decoder"
    weights = (bundle.folder / bundle.manifest.weights["movq"].file).resolve()
    with closing(open_component(bundle, name, backend="openvino", device="cpu", threads=1)) as session:
        latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
        first = session(latents=latents)["pixels"]
        assert resident(weights) == 0
        np.testing.assert_array_equal(session(latents=latents)["pixels"], first)
