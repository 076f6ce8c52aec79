"""The engine store: the plans of a bundle, in its folder `engines`, each beside a record of all that it depends on.

    engines/<component>-<first 16 digits of the key's hash>.plan    what TensorRT opens
    engines/<component>-<first 16 digits of the key's hash>.json    the record
    engines/caches/                                                 what engine libraries compile when they run

A plan is written under another name and renamed before its record is, so that whatever has a record is whole. Opening
a plan runs what it holds: none is opened whose hash its record does not name.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from filelock import FileLock, Timeout

from .bundle import Bundle
from .errors import BackendError, BundleError, OutputError
from .files import atomic_write
from .hashing import sha256_file
from .manifest import FileRecord
from .plans import (
    BUILDER_REVISION,
    Builder,
    PlanKey,
    PlanRecord,
    PlanSettings,
    capability_order,
    decode_record,
    encode_record,
)
from .profiles import Coverage, extent_text
from .trt import PACKAGES

ENGINES, CACHES = "engines", "caches"
PLAN, RECORD, LOCK, UNFINISHED = ".plan", ".json", ".lock", ".tmp"
MAX_RECORD_BYTES = 2**20


@dataclass(frozen=True)
class Damaged:
    """A file of the store that is of no use, and why."""

    file: str
    problem: str


class EngineStore:
    """The plans of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.folder = bundle.folder / ENGINES

    def records(self) -> tuple[list[PlanRecord], list[Damaged]]:
        """Every plan that has a sound record, and the files that are of no use: records, plans, unfinished builds.

        Files of a build that is running are neither.
        """
        records: list[PlanRecord] = []
        damaged: list[Damaged] = []
        files = sorted(path for path in self.folder.iterdir() if path.is_file()) if self.folder.is_dir() else []
        names = {path.name for path in files}
        for path in files:
            if path.suffix == RECORD:
                try:
                    records.append(self._record(path))
                except BundleError as error:
                    damaged.append(Damaged(path.name, str(error)))
            elif path.suffix == PLAN and path.with_suffix(RECORD).name not in names:
                damaged.append(Damaged(path.name, f"{path} has no record, so it is not opened"))
            elif path.suffix == UNFINISHED:
                damaged.append(Damaged(path.name, f"{path} was left by a build that did not finish"))
        return records, [each for each in damaged if not self._being_built(stem_of(each.file))]

    def _being_built(self, stem: str) -> bool:
        """Whether a build holds the lock of a key; without a lock file there is none, and none is made."""
        path = self.folder / (stem + LOCK)
        if not path.is_file():
            return False
        try:
            with FileLock(path, timeout=0):
                return False
        except Timeout:
            return True
        except (OSError, NotImplementedError):  # nobody builds where nothing can be written
            return False

    def _record(self, path: Path) -> PlanRecord:
        """Read a record; BundleError where it is damaged, or its plan missing or of another size."""
        try:
            with path.open("rb") as file:
                data = file.read(MAX_RECORD_BYTES)
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror or error}") from error
        record = decode_record(data, str(path))
        # Names are made from the key: another one is a record of something else, or leads out of the store.
        if path.name != record.key.stem + RECORD or record.plan.file != record.key.stem + PLAN:
            raise BundleError(f"{path} is damaged: it is the record of {record.key.stem}")
        plan = self.path(record)
        size = plan.stat().st_size if plan.is_file() else None
        if size is None:
            raise BundleError(f"{path}: its plan {plan.name} is missing")
        if size != record.plan.size:
            raise BundleError(f"{plan}: expected {record.plan.size} bytes, found {size}")
        return record

    def path(self, record: PlanRecord) -> Path:
        """Where a plan lies."""
        return self.folder / record.plan.file

    def find(self, key: PlanKey) -> PlanRecord | None:
        """The plan of a key, None where there is none that can be used; contents are compared when it is opened."""
        path = self.folder / (key.stem + RECORD)
        with suppress(BundleError):
            record = self._record(path)
            return record if record.key == key else None
        return None

    def read(self, record: PlanRecord) -> bytes:
        """The bytes of a plan; BundleError unless they are those that its record names."""
        path = self.path(record)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror or error}") from error
        found = sha256(data).hexdigest()
        if found != record.plan.sha256:
            raise BundleError(
                f"{path} is damaged: expected SHA-256 {record.plan.sha256[:16]}…, found {found[:16]}…; "
                f"remove it, then run: {self.command(record)}"
            )
        return data

    def stale(self, record: PlanRecord) -> list[str]:
        """What of the bundle is not as it was when a plan was built."""
        key, manifest, problems = record.key, self._bundle.manifest, []
        component = manifest.components.get(key.component)
        if component is None:
            return [f"the bundle has no component {key.component}"]
        if key.graph != component.graph.sha256:
            problems.append("the graph is another")
        if key.weights != {name: manifest.weights[name].sha256 for name in component.weights}:
            problems.append("the weights are others")
        if key.precision != component.precision:
            problems.append(f"it computes in {key.precision}, the bundle in {component.precision}")
        if key.revision != BUILDER_REVISION:
            problems.append("it was built by another version of kandrt")
        return problems

    def problems(self, record: PlanRecord, *, version: str, capability: str | None) -> list[str]:
        """Why a plan cannot be used with a version of its builder on a GPU ("sm89"; None: none, or not asked)."""
        key, problems = record.key, self.stale(record)
        if key.library != version:
            problems.append(f"it was built by {key.builder} {key.library}, {version} is installed")
        if capability is not None and capability not in key.compute_capabilities:
            problems.append(f"it is for {', '.join(key.compute_capabilities)}, this GPU is {capability}")
        return problems

    def usable(self, component: str, builder: Builder, *, version: str, capability: str | None) -> list[PlanRecord]:
        """The plans of a component that can be used here.

        Raises BackendError where there is none: why each one that exists cannot be, and the command that builds one.
        """
        records, damaged = self.records()
        reasons = [each.problem for each in damaged if each.file.startswith(f"{component}-")]
        found = []
        for record in records:
            if (record.key.component, record.key.builder) == (component, builder):
                problems = self.problems(record, version=version, capability=capability)
                reasons += [f"{record.plan.file}: {'; '.join(problems)}"] if problems else []
                found += [] if problems else [record]
        if found:
            return found
        architectures = PACKAGES[builder].architectures
        if capability is not None and architectures and capability not in architectures:
            raise BackendError(f"{component}: {builder} has no engines for {capability}; use backend 'tensorrt'")
        options = next((each.options for each in records if each.key.component == component), ())
        command = build_command(self._bundle, builder, (capability,) if capability and architectures else (), options)
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise BackendError(f"{component}: no {builder} engine can be used here{why}; run: {command}")

    def command(self, record: PlanRecord) -> str:
        """The command that builds a plan like one of the store, for the bundle as it is now."""
        key = record.key
        gpus = key.compute_capabilities if PACKAGES[key.builder].architectures else ()
        return build_command(self._bundle, key.builder, gpus, (*record.options, "--component", key.component))

    @contextmanager
    def building(self, key: PlanKey) -> Iterator[Path]:
        """Wait for other builds of the same key, and give the path to write the plan to; it is removed afterwards.

        Raises OutputError where the store cannot be written to.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            lock = FileLock(self.folder / (key.stem + LOCK))
            lock.acquire()
        except (OSError, NotImplementedError) as error:  # the latter from file systems that have no locks
            raise OutputError(
                f"cannot write to {self.folder}: {getattr(error, 'strerror', None) or error}; engines are kept in the "
                f"bundle, so build in a copy of it that can be written to"
            ) from error
        temporary = self.folder / (key.stem + UNFINISHED)
        try:
            # Of a build that was killed: we hold the lock, so nobody writes them
            self._unlink(self.files(key.stem, finished=False))
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            lock.release()

    def add(self, record: PlanRecord, temporary: Path) -> None:
        """Take a finished plan into the store: the file first, then its record. OutputError where that fails."""
        path = self.path(record)
        try:
            path.with_suffix(RECORD).unlink(missing_ok=True)
            temporary.replace(path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            with atomic_write(path.with_suffix(RECORD)) as file:
                file.write(encode_record(record))
        except OutputError:  # without a record the plan would only fill the disk
            with suppress(OSError):
                path.unlink()
            raise

    def files(self, stem: str, *, finished: bool = True) -> list[Path]:
        """What the store has under the name of a key; the record first, because a plan without one is not opened.

        finished: with the plan and its record, not only what builds left that did not finish.
        """
        paths = [self.folder / (stem + suffix) for suffix in ((RECORD, PLAN) if finished else ())]
        left = f".{glob.escape(stem)}{RECORD}.*{UNFINISHED}"  # as `atomic_write` names a record that it writes
        paths += [self.folder / (stem + UNFINISHED), *sorted(self.folder.glob(left))]
        return [path for path in paths if path.is_file()]

    def size(self, stem: str, *, finished: bool = True) -> int:
        """Bytes of `files`."""
        return sum(path.stat().st_size for path in self.files(stem, finished=finished))

    def remove(self, stem: str, *, finished: bool = True, sound: bool = True) -> int:
        """Remove `files`; gives the bytes freed. Raises OutputError where it fails, or the key is being built.

        sound: even a plan that turns out to be sound, because its build has ended since it was looked at.
        """
        lock = self.folder / (stem + LOCK)
        try:
            with FileLock(lock, timeout=0):
                finished = finished and (sound or not self._sound(stem))
                freed = self.size(stem, finished=finished)
                self._unlink(self.files(stem, finished=finished))
                with suppress(OSError):  # Windows keeps files that are open
                    lock.unlink()
        except Timeout as error:
            raise OutputError(f"cannot remove {self.folder / stem}: it is being built; try again later") from error
        except (OSError, NotImplementedError) as error:
            why = getattr(error, "strerror", None) or error
            raise OutputError(f"cannot remove {self.folder / stem}: {why}") from error
        return freed

    def _sound(self, stem: str) -> bool:
        """Whether a key has a plan with a sound record."""
        with suppress(BundleError):
            self._record(self.folder / (stem + RECORD))
            return True
        return False

    def _unlink(self, paths: Sequence[Path]) -> None:
        """Remove files; OutputError where that fails."""
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # noqa: PERF203
                raise OutputError(f"cannot remove {path}: {error.strerror or error}") from error

    def free_bytes(self) -> int:
        """What the store's disk has left."""
        folder = self.folder if self.folder.exists() else self.folder.parent
        return shutil.disk_usage(folder).free


def stem_of(file: str) -> str:
    """What the names of all files of a key begin with, by the name of one of them."""
    record = re.fullmatch(rf"\.(.+){re.escape(RECORD)}\.\d+{re.escape(UNFINISHED)}", file)  # one that is being written
    return Path(file).stem if record is None else record[1]


def plan_record_file(key: PlanKey, path: Path) -> FileRecord:
    """What a record says of a plan that lies at `path` for now."""
    return FileRecord(key.stem + PLAN, path.stat().st_size, sha256_file(path))


def build_command(bundle: Bundle, builder: Builder, gpus: Sequence[str] = (), options: Sequence[str] = ()) -> str:
    """The command line that builds engines; for the GPU present where none is named."""
    words = ["kandrt", "build", str(bundle.folder), "--backend", builder]
    if gpus:
        words += ["--gpu", ",".join(sorted(gpus, key=capability_order))]
    return command_line(*words, *options)


def command_options(coverage: Sequence[Coverage], settings: PlanSettings) -> tuple[str, ...]:
    """The options of `kandrt build` that ask for these profiles and settings."""
    words: list[str] = []
    for each in coverage:
        words += ["--size", extent_text(each.size), "--batch", extent_text(each.batch)]
    words += ["--static"] if any(each.static for each in coverage) else []
    words += ["--weight-streaming"] if "WEIGHT_STREAMING" in settings.flags else []
    words += ["--strip"] if "STRIP_PLAN" in settings.flags else []
    words += [] if settings.workspace_bytes is None else ["--workspace", str(settings.workspace_bytes)]
    if settings.optimization_level is not None:
        words += ["--optimization-level", str(settings.optimization_level)]
    return tuple(words)


def command_line(*words: str) -> str:
    """Words as they can be pasted into a shell of this system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
