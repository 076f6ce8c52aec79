"""The folder that an export writes to: it appears when it is complete, or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..engines.errors import OutputError
from ..engines.manifest import MANIFEST

UNFINISHED, REPLACED = ".partial", ".replaced"


def check_output(output: Path, overwrite: bool) -> None:
    """Raise OutputError where `output` cannot become a bundle, before any work is done.

    What killed exports to `output` left beside it is removed, or put back if it is a bundle that was to be replaced.
    """
    try:
        remove_abandoned(output.resolve())
        exists = output.exists()
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error
    if exists and not overwrite:
        raise OutputError(f"{output} exists already; give another folder, or --overwrite to replace a bundle")
    if exists and not is_bundle(output):
        raise OutputError(
            f"{output} is not a bundle, so it is not overwritten; remove it by hand or give another folder"
        )


def is_bundle(folder: Path) -> bool:
    """Does a folder hold a bundle's manifest, of any schema version; others have files of that name too."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= {"schema_version", "family", "components"}


@contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `output` that takes its place at the end, or goes away if the body raises.

    A link is followed: the folder it points at is replaced. Raises OutputError for every OSError, the body's included.
    """
    target = output.resolve()
    absent = [folder for folder in target.parents if not folder.exists()]
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        temporary.mkdir(parents=True)
        with locked(temporary):
            yield temporary
            put_in_place(temporary, target, overwrite)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in absent:
            with suppress(OSError):  # it holds the bundle, or something of others
                folder.rmdir()


def put_in_place(temporary: Path, target: Path, overwrite: bool) -> None:
    """Give the finished folder its name; one that it replaces is removed last, and comes back if anything fails."""
    if not overwrite or not target.exists():
        temporary.rename(target)
        return
    aside = temporary.with_suffix(REPLACED)
    with locked(target):
        try:
            target.rename(aside)
            temporary.rename(target)
        except BaseException:
            if not target.exists():
                aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def remove_abandoned(target: Path) -> None:
    """Remove unfinished folders that nothing holds, and put back a bundle that was set aside and not replaced."""
    left = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}({UNFINISHED}|{REPLACED})")
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        if not left.fullmatch(path.name):
            continue
        with locked(path) as abandoned:
            if abandoned and path.suffix == REPLACED and not target.exists():
                path.rename(target)
            elif abandoned:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Lock a folder while the body runs or until the process ends; gives False where that cannot be done.

    The system drops the lock of a killed process. Process numbers would not do: in containers they repeat.
    """
    descriptor = lock(folder)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def lock(folder: Path) -> int | None:
    """A descriptor that holds a folder's lock until it is closed; None where that is taken, or cannot be had."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # on Windows, where nothing is taken for abandoned
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
