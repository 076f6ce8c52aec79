"""Opening a checkpoint: a folder in diffusers' layout, or a repository of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..engines.errors import CheckpointError, InputError, MissingExtraError
from ..engines.manifest import FamilyName, Role
from .families import FAMILIES, Family, Part, family_of
from .weights import weight_files

INDEX = "model_index.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")

# What to do about errors of huggingface_hub, by class name
UNREACHABLE = (
    "it is not in the local cache, and the hub cannot be reached or HF_HUB_OFFLINE is set; check the network, "
    "or download the repository elsewhere and give its folder"
)
HUB_ADVICE: Mapping[str, str] = {
    "GatedRepoError": "access is restricted; accept its terms on the hub's page and log in with: hf auth login",
    "RepositoryNotFoundError": "there is no such repository, or it is private; check the name, log in with: "
    "hf auth login, or give the path of a folder that exists",
    "RevisionNotFoundError": "there is no such revision; give a branch, tag or commit that exists",
    "LocalEntryNotFoundError": UNREACHABLE,
    "IncompleteSnapshotError": UNREACHABLE,
    "OfflineModeIsEnabled": UNREACHABLE,
    "ConnectError": UNREACHABLE,
    "ConnectionError": UNREACHABLE,
    "TimeoutException": UNREACHABLE,
    "HFValidationError": "this is not a hub id of the form owner/name",
}


@dataclass(frozen=True)
class SubModel:
    """One submodel: `name` of its folder as model_index.json has it, its class there, and its JSON configuration."""

    name: str
    folder: Path
    library: str
    class_name: str
    config: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are on this machine.

    `name` is what the user gave; `revision` the hub's commit, None for a folder; `variant` the weight files asked for
    (pass it to `Weights.open`); `family` a name of FAMILIES; `submodels` are keyed by `Part.name`, the same whether
    the folder holds one stage or both.
    """

    name: str
    folder: Path
    revision: str | None
    variant: str | None
    family: FamilyName
    class_name: str
    submodels: Mapping[str, SubModel]


def open_checkpoint(source: str | Path, revision: str | None = None, variant: str | None = None) -> Checkpoint:
    """Open a local folder, or fetch `owner/name` from the hub into the hub's cache, and read its configurations.

    `variant` ("fp16") asks for weight files of that name where there are any; otherwise full precision comes first.
    A string that looks like a path, or starts with a folder that exists, is never looked up on the hub.

    Raises CheckpointError where there is no checkpoint, it is incomplete or damaged, or its kind is not supported;
    InputError for a revision of a local folder.
    """
    folder = Path(source).expanduser()
    if isinstance(source, Path) or _is_local(source):
        if revision is not None:
            raise InputError(f"revision {revision!r} needs a hub id, and {source} is a path")
    else:
        folder, revision = fetch(source, revision, variant)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise CheckpointError(
            f"{source}: expected a checkpoint folder in diffusers' layout, found {found}; give a folder or a hub id"
        )
    class_name, family, entries = _read_index(folder, str(source))
    there = [entry for entry in entries if not entry.part.optional or (folder / entry.folder).is_dir()]
    submodels = {entry.part.name: _read_submodel(folder, entry, variant) for entry in there}
    return Checkpoint(str(source), folder, revision, variant, family.name, class_name, submodels)


def roles(checkpoint: Checkpoint) -> tuple[Literal["prior"] | Role, ...]:
    """Give what a checkpoint can do: "prior", and "decoder", "inpaint" or "controlnet" by its UNet's configuration.

    Raises CheckpointError for a UNet of another kind.
    """
    family = family_of(checkpoint.family)
    found: list[Literal["prior"] | Role] = ["prior"] if "prior" in checkpoint.submodels else []
    if unet := checkpoint.submodels.get("unet"):
        kind = (unet.config.get("in_channels", 4), unet.config.get("addition_embed_type"))
        role: Role | None = next((role for known, role in family.unets.items() if known == kind), None)
        if role is None:
            expected = ", ".join(f"{known[0]} and {known[1]!r} ({role})" for known, role in family.unets.items())
            raise CheckpointError(
                f"{unet.folder / 'config.json'}: in_channels and addition_embed_type are {kind[0]!r} and {kind[1]!r}, "
                f"expected for {family.title}: {expected}"
            )
        found.append(role)
    return tuple(found)


@dataclass(frozen=True)
class _Entry:
    part: Part
    folder: str
    library: str
    class_name: str


def _is_local(source: str) -> bool:
    owner, slash, _ = source.partition("/")
    return not HUB_ID.fullmatch(source) or Path(source).exists() or (bool(slash) and Path(owner).is_dir())


def _read_index(folder: Path, name: str) -> tuple[str, Family, list[_Entry]]:
    """Read model_index.json: the pipeline's class, its family, and an entry for every part that its stages need."""
    if not (folder / INDEX).is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
        raise CheckpointError(f"{name} is not a checkpoint in diffusers' layout: no {INDEX}, found {there}")
    index = _read_json(folder / INDEX)
    class_name = str(index.get("_class_name"))
    family = next((family for family in FAMILIES if class_name in family.pipelines), None)
    if family is None:
        supported = ", ".join(known for family in FAMILIES for known in family.pipelines)
        raise CheckpointError(f"{name}: {class_name} is not a Kandinsky pipeline that is known; supported: {supported}")
    stages = family.pipelines[class_name]
    entries, problems = [], []
    for part in (part for stage in stages for part in family.stages[stage]):
        key = part.combined if len(stages) > 1 else part.alone
        if part.optional:  # which no index lists
            entries.append(_Entry(part, key, "diffusers", part.classes[0]))
            continue
        match index.get(key):
            case [str(library), str(submodel)] if not part.classes or submodel in part.classes:
                entries.append(_Entry(part, key, library, submodel))
            case [str(), str(submodel)]:
                problems.append(f"{key}: expected {' or '.join(part.classes)}, found {submodel}")
            case found:
                problems.append(f"{key}: expected [library, class], found {found!r}")
    if problems:
        raise CheckpointError(f"{name}: {INDEX} of a {class_name}: {'; '.join(problems)}")
    return class_name, family, entries


def _read_submodel(folder: Path, entry: _Entry, variant: str | None) -> SubModel:
    place = folder / entry.folder
    if not place.is_dir():
        raise CheckpointError(f"{folder} lacks the folder {entry.folder!r} ({entry.class_name}) that {INDEX} lists")
    if not (place / entry.part.config).is_file():
        there = ", ".join(sorted(path.name for path in place.iterdir())) or "nothing"
        raise CheckpointError(f"{place} lacks {entry.part.config}; found {there}")
    if entry.part.config == "config.json" and not weight_files((path.name for path in place.iterdir()), variant):
        raise CheckpointError(f"{place} holds no weights: expected .safetensors or .bin files beside config.json")
    return SubModel(entry.folder, place, entry.library, entry.class_name, _read_json(place / entry.part.config))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file} as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def fetch(repository: str, revision: str | None, variant: str | None) -> tuple[Path, str | None]:
    """Bring the needed files of a hub repository into the hub's cache; give their folder and the commit.

    The index comes first, so that a kind that is not supported costs no download. Where the hub cannot be asked, what
    the cache holds has to do. Raises CheckpointError.
    """
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise MissingExtraError("fetching a checkpoint from the hub", "huggingface_hub", "export") from error

    def download(*patterns: str) -> Path:
        try:
            return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
        except Exception as error:  # its HTTP library's errors come through, and that library differs by version
            raise _hub_error(repository, revision, error) from error

    folder = download(INDEX)
    if COMMIT.fullmatch(folder.name):
        revision = folder.name
    _, _, entries = _read_index(folder, repository)
    try:
        present = hub.list_repo_files(repository, revision=revision)
    except Exception as error:
        try:
            for entry in entries:
                if not entry.part.optional:
                    _read_submodel(folder, entry, variant)
        except CheckpointError as incomplete:
            raise CheckpointError(f"{_hub_error(repository, revision, error)}; in the cache: {incomplete}") from error
        return folder, revision
    return download(*needed_files(present, [entry.folder for entry in entries], variant)), revision


def cached(repository: str, revision: str) -> Path:
    """Where the hub's cache on this machine holds a repository; CheckpointError where it does not."""
    import huggingface_hub as hub

    try:
        return Path(hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except Exception as error:  # what it raises differs by version
        raise CheckpointError(
            f"{repository} at {revision[:12]} is not in the hub's cache on this machine: {type(error).__name__}"
        ) from error


def needed_files(present: Iterable[str], folders: Iterable[str], variant: str | None) -> list[str]:
    """Choose from a repository's file paths: configurations, tokenizer files, and one form of each folder's weights."""
    by_folder: dict[str, list[str]] = {folder: [] for folder in folders}
    for path in present:
        folder, _, name = path.rpartition("/")
        if folder in by_folder:
            by_folder[folder].append(name)
    chosen = [INDEX]
    for folder, names in by_folder.items():
        kept = {name for name in names if name.endswith((".json", ".txt", ".model")) and ".index." not in name}
        chosen += [f"{folder}/{name}" for name in sorted(kept | set(weight_files(names, variant)))]
    return chosen


def _hub_error(repository: str, revision: str | None, error: Exception) -> CheckpointError:
    names = [kind.__name__ for kind in type(error).__mro__]
    advice = next((HUB_ADVICE[name] for name in names if name in HUB_ADVICE), str(error).strip().splitlines()[:1])
    at = f" at revision {revision}" if revision else ""
    reason = advice if isinstance(advice, str) else "".join(advice) or type(error).__name__
    return CheckpointError(f"cannot fetch {repository}{at} from the hub: {reason}")
