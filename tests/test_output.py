"""The folder of an export: it appears whole, replaces only a bundle, and nothing is left of one that failed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kandrt.engines.errors import OutputError
from kandrt.export.output import REPLACED, UNFINISHED, check_output, new_folder

MANIFEST = '{"schema_version": 0, "family": "any", "components": {}}'  # of whichever version


def bundle_at(folder: Path, content: str = "old") -> Path:
    (folder / "weights").mkdir(parents=True)
    (folder / "manifest.json").write_text(MANIFEST)
    (folder / "weights" / "a").write_text(content)
    return folder


def write(output: Path, *, overwrite: bool = False, error: BaseException | None = None) -> None:
    """An export in small."""
    check_output(output, overwrite)
    with new_folder(output, overwrite) as folder:
        (folder / "weights").mkdir()
        (folder / "weights" / "a").write_text("new")
        if error is not None:
            raise error
        (folder / "manifest.json").write_text(MANIFEST)


def content(folder: Path) -> dict[str, str]:
    """Every file, folder and link below `folder`, to compare with later."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else "" for path in paths}


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "er" / "bundle"
    with new_folder(output, False) as folder:
        assert folder.parent == output.parent  # so that a rename suffices
        assert not output.exists()
        (folder / "manifest.json").write_text(MANIFEST)
    assert content(output.parent) == {"bundle": "", "bundle/manifest.json": MANIFEST}
    assert output.stat().st_mode == output.parent.stat().st_mode  # readable to whom other folders are


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), LookupError()]
)
def test_nothing_is_left_of_a_failure(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write(tmp_path / "there" / "new" / "er" / "bundle", error=error)
    assert expected is not OutputError or str(caught.value) == (
        f"cannot write {tmp_path / 'there' / 'new' / 'er' / 'bundle'}: No space left on device"
    )
    assert content(tmp_path) == {"there": ""}


OTHERS = {
    "a file": None,
    "an empty folder": {},
    "a folder": {"notes.txt": "mine"},
    "a browser extension": {"manifest.json": '{"manifest_version": 3, "name": "mine"}'},
    "a list": {"manifest.json": "[]"},
    "no JSON": {"manifest.json": "{"},
    "no end": {"manifest.json": "[" * 100_000},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_a_bundle_is_never_overwritten(kind: str, tmp_path: Path) -> None:
    output, files = tmp_path / "bundle", OTHERS[kind]
    if files is None:
        output.write_text("mine")
    else:
        output.mkdir()
        for name, text in files.items():
            (output / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(
        OutputError, match=f"{re.escape(str(output))} exists already; give another folder, or --overwrite"
    ):
        write(output)
    with pytest.raises(OutputError, match="is not a bundle, so it is not overwritten; remove it by hand"):
        write(output, overwrite=True)
    assert content(tmp_path) == before


def test_a_bundle_is_overwritten_only_when_asked_for(tmp_path: Path) -> None:
    output = bundle_at(tmp_path / "bundle")
    (output / "older.onnx").write_text("of another version")
    with pytest.raises(OutputError, match="exists already"):
        write(output)
    write(output, overwrite=True)
    assert content(tmp_path) == {
        "bundle": "", "bundle/manifest.json": MANIFEST, "bundle/weights": "", "bundle/weights/a": "new"
    }  # fmt: skip
    write(tmp_path / "other", overwrite=True)  # nothing there to replace
    assert content(tmp_path / "other") == content(output)


@pytest.mark.parametrize("name", ["x" * 300, "file/bundle", "file/new/bundle"])
def test_a_name_that_cannot_be_written_is_an_output_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write"):
        write(tmp_path / name)
    assert content(tmp_path) == {"file": "mine"}


def test_a_link_is_followed(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    link.symlink_to(real)  # to nothing as yet
    write(link)
    (real / "weights" / "a").write_text("old")
    write(link, overwrite=True)
    assert link.readlink() == real
    assert (real / "weights" / "a").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert [path.name for path in real.parent.iterdir()] == ["real"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_the_old_bundle_stays_if_the_new_fails(error: BaseException, tmp_path: Path) -> None:
    output = bundle_at(tmp_path / "bundle")
    before = content(tmp_path)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write(output, overwrite=True, error=error)
    assert content(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("which", ["bundle", UNFINISHED])
def test_the_old_bundle_comes_back_if_the_new_cannot_take_its_place(
    which: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = bundle_at(tmp_path / "bundle")
    before, rename = content(tmp_path), Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(which):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write(output, overwrite=True)
    assert content(tmp_path) == before


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    folder = new_folder(output, False)
    (folder.__enter__() / "a").write_text("new")
    bundle_at(output, "of another program")
    with pytest.raises(OutputError, match=r"cannot write .*bundle: Directory not empty"):
        folder.__exit__(None, None, None)
    assert content(output)["weights/a"] == "of another program"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


HOLD = """
import sys, time
from pathlib import Path
from kandrt.export.output import new_folder
with new_folder(Path(sys.argv[1]), False) as folder:
    (folder / "weights").mkdir()
    print(folder, flush=True)
    time.sleep(600)
"""
locks = pytest.mark.skipif(
    sys.platform == "win32", reason="folders cannot be locked there, so that nothing is taken for abandoned"
)


@pytest.fixture
def hold() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to be ended."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


@locks
def test_what_killed_exports_leave_is_removed_and_what_others_use_is_not(
    hold: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    output, other = tmp_path / "bundle [1]*", tmp_path / "bundle"
    command = [sys.executable, "-c", HOLD]
    for path in map(str, (output, output, other)):
        hold += [subprocess.Popen([*command, path], stdout=subprocess.PIPE, text=True)]
    living, killed, elsewhere = (Path(process.stdout.readline().strip()) for process in hold)  # type: ignore[union-attr]
    assert all((folder / "weights").is_dir() for folder in (living, killed, elsewhere))
    for process in hold[1:]:
        process.kill()
        process.wait()
    strange = tmp_path / f".{output.name}.notes{UNFINISHED}"  # not a name of ours
    strange.mkdir()
    write(output)
    assert set(tmp_path.iterdir()) == {output, living, elsewhere, strange}
    assert (living / "weights").is_dir()


@locks
def test_two_exports_in_one_process_do_not_remove_each_others_folders(tmp_path: Path) -> None:
    output, failed = tmp_path / "bundle", []

    def second() -> None:
        try:
            write(output, error=LookupError())
        except LookupError:
            failed.append("second")

    with new_folder(output, False) as folder:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert failed == ["second"]
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@locks
def test_a_bundle_set_aside_by_a_killed_export_is_put_back(tmp_path: Path) -> None:
    output = bundle_at(tmp_path / "bundle")
    before = content(output)
    aside = output.with_name(f".{output.name}.0123abcd{REPLACED}")
    output.rename(aside)  # killed between the two renames
    with pytest.raises(OutputError, match="exists already"):
        write(output)
    assert content(output) == before
    shutil.copytree(output, aside)  # killed after them
    write(output, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_where_folders_cannot_be_locked_nothing_is_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f".bundle.0123abcd{UNFINISHED}"
    left.mkdir()

    def refuse(*args: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")  # what Windows says of any folder

    monkeypatch.setattr(os, "open", refuse)
    check_output(tmp_path / "bundle", overwrite=False)
    monkeypatch.undo()
    assert left.is_dir()
    write(tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["bundle"] if sys.platform != "win32" else [left.name, "bundle"]
    )
