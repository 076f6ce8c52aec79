"""A bundle on disk, opened: its manifest checked, its files found, its components ready to be run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import BundleError
from .hashing import sha256_file
from .manifest import MANIFEST, MAX_MANIFEST_BYTES, FileRecord, Manifest, decode_manifest, missing_files


@dataclass(frozen=True)
class Bundle:
    """A folder that `open_bundle` has checked."""

    folder: Path
    manifest: Manifest

    def path(self, record: FileRecord) -> Path:
        """Where a file of the bundle lies."""
        return self.folder / record.file

    def check_hashes(
        self, records: Iterable[FileRecord] | None = None, progress: Callable[[int], None] | None = None
    ) -> None:
        """Read files in full and compare SHA-256; all files where `records` is None.

        `progress` is called with the number of bytes read since its last call. Raises BundleError that lists every file
        whose content is not what the manifest says, or cannot be read.
        """
        chosen = self.manifest.files().values() if records is None else records
        problems = [problem for record in chosen if (problem := self._damage(record, progress)) is not None]
        if problems:
            raise BundleError(f"{self.folder}: {'; '.join(problems)}; export the bundle again")

    def _damage(self, record: FileRecord, progress: Callable[[int], None] | None) -> str | None:
        try:
            found = sha256_file(self.path(record), progress)
        except OSError as error:
            return f"{record.file} cannot be read: {error.strerror or error}"
        if found == record.sha256:
            return None
        return f"{record.file}: expected SHA-256 {record.sha256[:16]}…, found {found[:16]}…"


def open_bundle(folder: str | Path) -> Bundle:
    """Read and check a bundle's manifest, and that every file is there with the size recorded.

    Raises BundleError that says what is wrong; contents are compared by `Bundle.check_hashes`.
    """
    folder = Path(folder).expanduser()
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"is not a bundle: it has no {MANIFEST}" if folder.exists() else "does not exist"
        raise BundleError(f"{folder} {what}; make a bundle with: kandrt export CHECKPOINT -o FOLDER") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BundleError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is damaged: expected at most {MAX_MANIFEST_BYTES} bytes; export the bundle again")
    manifest = decode_manifest(data, str(path))
    problems = missing_files(folder, manifest.files())
    if problems:
        raise BundleError(f"{folder}: {'; '.join(problems)}; export the bundle again")
    return Bundle(folder, manifest)
