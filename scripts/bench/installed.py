"""How much a contender takes on disk: the packages it needs, as they are installed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

# What has to be installed to make pictures, by what runs them.
NEEDS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("kandrt[cpu]",),
    "onnxruntime on cuda": ("kandrt[cuda]",),
    "openvino": ("kandrt[openvino]",),
    "tensorrt": ("kandrt[tensorrt]",),
    "tensorrt-rtx": ("kandrt[tensorrt-rtx]",),
    "diffusers": ("diffusers", "torch", "transformers"),
    "onnx": ("onnxruntime",),
}
REQUIREMENT = re.compile(
    r"\s*(?P<name>[A-Za-z0-9][\w.-]*)\s*(\[(?P<extras>[^\]]*)\])?[^;]*(;(?P<marker>.*))?", re.DOTALL
)
EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")
PYTHON = re.compile(r"""python_version\s*<\s*['"]3\.(\d+)['"]""")
ROOT = Path(__file__).parents[2]
LAYERS = ("engines", "export", "runtime", "scripts")


def installed_size(requirements: Iterable[str]) -> int | None:
    """Bytes of the packages that are required, with all that these require, in this interpreter.

    requirements are such as "kandrt[cpu]"; None where one of them is not installed. What they require in turn counts
    where it is installed: a requirement for other systems is not. Each file counts once.
    """
    wanted = [parts for each in requirements if (parts := split(each)) is not None]
    if any(found(name) is None for name, _, _ in wanted):
        return None
    paths = {path for package in closure({name: extras for name, extras, _ in wanted}) for path in files(package)}
    return sum(path.stat().st_size for path in paths if path.is_file())


def contender_size(worker: str, settings: Mapping[str, str]) -> int | None:
    """What a contender of a kind of worker needs installed, in bytes in this interpreter; None where it is not here."""
    name = settings.get("backend", worker)
    on_device = f"{name} on {settings.get('device')}"
    return installed_size(NEEDS[on_device if on_device in NEEDS else name])


def closure(wanted: Mapping[str, frozenset[str]]) -> Iterator[Distribution]:
    """The packages named with their extras, and all that they require, each once, where installed."""
    waiting, seen, given = list(wanted.items()), set[tuple[str, str]](), set[str]()
    while waiting:
        name, extras = waiting.pop()
        package = found(name)
        new = {"", *extras} - {extra for known, extra in seen if known == name}
        if package is None or not new:
            continue
        seen |= {(name, extra) for extra in new}
        for requirement in package.requires or []:
            parts = split(requirement)
            if parts is not None and applies(parts[2], new):
                waiting.append(parts[:2])
        if name not in given:
            given.add(name)
            yield package


def split(requirement: str) -> tuple[str, frozenset[str], str] | None:
    """Normal name, extras and marker of a requirement; None for what is none."""
    parts = REQUIREMENT.fullmatch(requirement)
    if parts is None:
        return None
    extras = frozenset(normal(extra) for extra in (parts["extras"] or "").split(",") if extra.strip())
    return normal(parts["name"]), extras, parts["marker"] or ""


def normal(name: str) -> str:
    """A name as all its spellings are written alike."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def applies(marker: str, extras: Iterable[str]) -> bool:
    """Whether a requirement is one of any of these extras, "" for those without; systems are not looked at."""
    older = PYTHON.search(marker)
    if older is not None and sys.version_info >= (3, int(older[1])):
        return False
    named = {normal(extra) for extra in EXTRA.findall(marker)}
    return bool(named & set(extras)) if named else "" in extras


def found(name: str) -> Distribution | None:
    """A package, where it is installed."""
    try:
        return distribution(name)
    except (PackageNotFoundError, ValueError):
        return None


def files(package: Distribution) -> Iterator[Path]:
    """A package's files; of kandrt installed as editable, those that stand where they are edited."""
    for file in package.files or []:
        yield Path(str(package.locate_file(file))).resolve()
    told = package.read_text("direct_url.json")
    if normal(package.metadata["Name"]) == "kandrt" and told and json.loads(told).get("dir_info", {}).get("editable"):
        for layer in LAYERS:
            yield from (path for path in (ROOT / layer).rglob("*") if "__pycache__" not in path.parts)
