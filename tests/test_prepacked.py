"""Graphs kept as ONNX Runtime's CPU provider runs them: the same numbers, found again, and never half of one."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kandrt.engines import ort, prepacked
from kandrt.engines.backends import open_component
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.prepacked import GRAPH, WEIGHTS, keep, kept
from kandrt.runtime import load
from kandrt.runtime.miniature import MINIATURE
from kandrt.scripts.cli import app

from .session_inputs import arrays, fits

NAME = "prior_step"


@pytest.fixture
def own(spare_bundle: Path, tmp_path: Path) -> Bundle:
    """A bundle that may be written to."""
    return open_bundle(shutil.copytree(spare_bundle, tmp_path / "bundle"))


def outputs(bundle: Bundle, name: str = NAME, **options: str) -> dict[str, Any]:
    with closing(open_component(bundle, name, backend="onnxruntime", device="cpu", options=options)) as session:
        return session(**arrays(session.inputs, **fits(name)))


def folders(bundle: Bundle) -> list[Path]:
    return sorted(path.parent for path in (bundle.folder / "engines" / "caches").rglob(GRAPH))


def test_every_component_gives_the_same_to_the_last_bit(own: Bundle) -> None:
    for name in own.manifest.components:
        expected = outputs(own, name)
        for _ in range(2):  # kept, and found again
            found = outputs(own, name, cache="on")
            for output, array in expected.items():
                np.testing.assert_array_equal(found[output], array, err_msg=name)
    assert len(folders(own)) == len(own.manifest.components)
    open_bundle(own.folder).check_hashes()  # the bundle is what it was


def test_unasked_nothing_is_written(own: Bundle) -> None:
    outputs(own)
    outputs(own, cache="off")
    assert not (own.folder / "engines").exists()


def test_it_is_written_once(own: Bundle) -> None:
    outputs(own, cache="on")
    (folder,) = folders(own)
    before = (folder / WEIGHTS).stat().st_mtime_ns
    outputs(own, cache="on")
    assert (folder / WEIGHTS).stat().st_mtime_ns == before
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]  # no temporary folder is left


def test_weights_are_mapped(own: Bundle) -> None:
    """So that processes share them, and the system can drop them."""
    outputs(own, cache="on")
    (folder,) = folders(own)
    with closing(open_component(own, NAME, backend="onnxruntime", device="cpu", options={"cache": "on"})) as session:
        session(**arrays(session.inputs))
        assert str(folder / WEIGHTS) in Path("/proc/self/maps").read_text()


def test_another_cpu_or_version_has_another_folder(own: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs(own, cache="on")
    for text in ("flags\t\t: fpu sse2\n", "flags\t\t: fpu sse2 avx2\n", "flags\t\t: sse2 avx2 fpu\n"):
        info = own.folder.parent / "cpuinfo"
        info.write_text(f"processor\t: 0\n{text}")
        monkeypatch.setattr(prepacked, "CPU_INFO", info)
        prepacked.cpu.cache_clear()
        outputs(own, cache="on")
    prepacked.cpu.cache_clear()
    assert len(folders(own)) == 3  # the order of flags says nothing


@pytest.mark.parametrize("damage", ["graph", "weights", "record", "no weights"])
def test_what_is_damaged_is_made_again(damage: str, own: Bundle) -> None:
    expected = outputs(own, cache="on")["prediction"]
    (folder,) = folders(own)
    harm: dict[str, Callable[[], object]] = {
        "graph": lambda: (folder / GRAPH).write_bytes((folder / GRAPH).read_bytes()[:-1] + b"\0"),
        "weights": lambda: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1]),
        "record": lambda: (folder / prepacked.RECORD).write_text("[]"),
        "no weights": (folder / WEIGHTS).unlink,
    }
    harm[damage]()
    assert kept(folder) is None
    np.testing.assert_array_equal(outputs(own, cache="on")["prediction"], expected)
    assert kept(folder) == folder / GRAPH


def test_a_record_names_nothing_outside_of_its_folder(own: Bundle) -> None:
    outputs(own, cache="on")
    (folder,) = folders(own)
    record = json.loads((folder / prepacked.RECORD).read_text())
    (folder.parent / "x").write_bytes(b"1")
    for sizes in ({**record["sizes"], "../x": 1}, {}, {WEIGHTS: record["sizes"][WEIGHTS]}):
        (folder / prepacked.RECORD).write_text(json.dumps({**record, "sizes": sizes}))
        assert kept(folder) is None
    (folder / prepacked.RECORD).write_text(json.dumps(record))
    assert kept(folder) is not None


def test_where_it_cannot_be_written_it_runs_without(own: Bundle) -> None:
    expected = outputs(own)["prediction"]
    (own.folder / "engines").write_bytes(b"in the way")
    with pytest.warns(UserWarning, match="prior_step: opened without the cache in .*engines"):
        found = outputs(own, cache="on")["prediction"]
    np.testing.assert_array_equal(found, expected)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="No space left on device"):
        assert keep(NAME, tmp_path / "caches" / "key", full) is None
    assert list((tmp_path / "caches").iterdir()) == []


def test_of_two_that_write_at_once_one_is_kept(tmp_path: Path) -> None:
    def slow(path: Path) -> None:
        if not (tmp_path / "key").exists():
            keep(NAME, tmp_path / "key", slow_other)
        path.write_bytes(b"mine")

    def slow_other(path: Path) -> None:
        path.write_bytes(b"other")
        (tmp_path / "key").mkdir(exist_ok=True)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keep(NAME, tmp_path / "key", slow) == tmp_path / "key" / GRAPH
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert kept(tmp_path / "key") is not None


def test_a_graph_that_does_not_open_is_left_aside(own: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outputs(own)["prediction"]
    wrong = own.folder.parent / "wrong.onnx"
    wrong.write_bytes(b"no graph")
    monkeypatch.setattr(ort, "kept", lambda folder: wrong)
    with pytest.warns(UserWarning, match=r"prior_step: opened without the cache .*onnxruntime cannot open"):
        found = outputs(own, cache="on")["prediction"]
    np.testing.assert_array_equal(found, expected)


def test_weights_that_are_stored_in_fp16_and_whole_requests(tmp_path: Path) -> None:
    """The embedded miniature, which is stored so: the same picture."""
    folder = shutil.copytree(MINIATURE, tmp_path / "miniature")
    request: dict[str, Any] = {"height": 64, "width": 64, "steps": 3, "prior_steps": 2, "seed": 3}
    pictures = []
    for options in ({}, {"cache": "on"}, {"cache": "on"}):
        with load(folder, backend="onnxruntime", device="cpu", options=options) as k:
            pictures.append(k("a red circle", **request).array)
    for picture in pictures[1:]:
        np.testing.assert_array_equal(picture, pictures[0])


def test_what_is_kept_is_listed_and_removed(own: Bundle) -> None:
    outputs(own, cache="on")
    (folder,) = folders(own)
    runner = CliRunner(env={"COLUMNS": "200"})
    stale, half, young = (folder.parent / name for name in ("0" * 16, f".{folder.name}.a", f".{folder.name}.b"))
    for path in (stale, half, young):
        path.mkdir()
        (path / WEIGHTS).write_bytes(b"1234")
    os.utime(half, (0, 0))  # begun long ago; the other may be another process's, which still writes

    shown = runner.invoke(app, ["engines", "list", str(own.folder)])
    assert shown.exit_code == 0, shown.output
    assert "it is of another graph or other weights" in " ".join(shown.output.split()), shown.output
    listed = json.loads(runner.invoke(app, ["engines", "list", str(own.folder), "--json"]).stdout)["caches"]
    assert [each["component"] for each in listed] == [NAME] * 4
    assert sum(each["size"] for each in listed) > (folder / WEIGHTS).stat().st_size

    assert "would remove 2, 8 B" in runner.invoke(app, ["engines", "prune", str(own.folder), "--dry-run"]).output
    assert "removed 2, 8 B" in runner.invoke(app, ["engines", "prune", str(own.folder)]).output
    assert sorted(folder.parent.iterdir()) == sorted([folder, young])
    assert kept(folder) is not None

    assert "removed 2" in runner.invoke(app, ["engines", "prune", str(own.folder), "--all"]).output
    assert not (own.folder / "engines" / "caches").exists()
    assert "removed 0, 0 B" in runner.invoke(app, ["engines", "prune", str(own.folder), "--all"]).output
