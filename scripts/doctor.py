"""`kandrt doctor`: what is installed, and what can run here."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec

from ..engines.errors import MissingExtraError
from ..engines.memory import machine_memory
from .console import Json, print_json, size_text, stdout, table

USAGE = ""
EXAMPLE = "kandrt doctor"

# Packages that are not imported by their own name.
MODULES = {
    "pillow": "PIL",
    "protobuf": "google.protobuf",
    "onnxruntime-gpu": "onnxruntime",
    "cupy-cuda13x": "cupy",
    "tensorrt-rtx-cu13": "tensorrt_rtx",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13": "onnxruntime_ep_nv_tensorrt_rtx",
}
# Those a user installs
EXTRAS = (
    "", "cpu", "cuda", "openvino", "tensorrt", "tensorrt-rtx", "onnxruntime-openvino", "onnxruntime-tensorrt-rtx",
    "onnxruntime-webgpu", "export",
)  # fmt: skip
REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(\[[\w,-]+\])?\s*>=\s*(?P<least>[\w.]+)(\s*;\s*extra\s*==\s*['\"](?P<extra>[\w-]+)['\"])?"
)


@dataclass(frozen=True)
class Package:
    """A package that kandrt uses: the extra it belongs to ("" where it is always needed), and what is installed."""

    name: str
    extra: str
    least: str
    installed: str | None
    fits: bool


@dataclass(frozen=True)
class Device:
    """A device of a backend: `problem` says why it cannot be used here, and is None where it can.

    precisions are those that it computes in here.
    """

    backend: str
    device: str
    library: str | None
    problem: str | None
    precisions: list[str]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `kandrt doctor` says; memory in bytes, None where the system does not tell.

    can_build names the builders of engines that are installed.
    """

    kandrt: str
    python: str
    platform: str
    cpus: int
    memory: int | None
    packages: list[Package]
    devices: list[Device]
    can_generate: bool
    can_export: bool
    can_build: list[str]
    advice: list[str] = field(default_factory=list)


def command(json: Json = False) -> None:
    """Show what is installed, what can run here, and what to install for the rest."""
    found = diagnose()
    print_json(found) if json else show(found)


def diagnose() -> Diagnosis:
    """Look at this machine and this Python."""
    from importlib.metadata import version

    packages, devices = known_packages(), known_devices()
    advice = [
        f"{p.name} {p.installed} is older than {p.least}: {pip_line(p.extra)}"
        for p in packages
        if p.installed and not p.fits
    ]
    lacking = missing("export")
    if lacking:
        advice.append(f"to export checkpoints: {pip_line('export')}")
    builders = [name for name in ("tensorrt", "tensorrt-rtx") if not set(missing(name)) - {"cupy-cuda13x"}]
    if not builders:
        advice.append(f"to build engines: {pip_line('tensorrt-rtx')}, or on a data-centre GPU: {pip_line('tensorrt')}")
    usable = [device for device in devices if device.problem is None]
    if not usable:
        advice.append(f"to make pictures: {pip_line('cpu')}, or with an NVIDIA GPU: {pip_line('cuda')}")
    return Diagnosis(
        kandrt=version("kandrt"),
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=machine_memory(),
        packages=packages,
        devices=devices,
        can_generate=bool(usable),
        can_export=not lacking,
        can_build=builders,
        advice=advice,
    )


def known_packages() -> list[Package]:
    """The packages that kandrt's own metadata names, development tools apart."""
    from importlib.metadata import requires

    packages = []
    for line in requires("kandrt") or []:
        match = REQUIREMENT.fullmatch(line.strip())
        if match is not None and (match["extra"] or "") in EXTRAS:
            found = installed(match["name"])
            fits = found is not None and numbers(found) >= numbers(match["least"])
            packages.append(Package(match["name"], match["extra"] or "", match["least"], found, fits))
    return sorted(packages, key=lambda package: EXTRAS.index(package.extra))


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version, which is enough to compare releases."""
    return tuple(int(number) for number in re.match(r"[\d.]*", text)[0].split(".") if number)  # type: ignore[index]


def module(package: str) -> str:
    """What a package is imported as."""
    return MODULES.get(package, package.replace("-", "_"))


def missing(extra: str) -> list[str]:
    """Packages of an extra that cannot be imported."""
    return [package.name for package in known_packages() if package.extra == extra and not importable(package.name)]


def importable(package: str) -> bool:
    """Whether a package is there, without importing it."""
    try:
        return find_spec(module(package)) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def need(extra: str, feature: str) -> None:
    """Raise MissingExtraError where a package of an extra is not installed."""
    lacking = missing(extra)
    if lacking:
        raise MissingExtraError(feature, ", ".join(lacking), extra)


def pip_line(extra: str) -> str:
    """What installs an extra."""
    return f"pip install 'kandrt[{extra}]'" if extra else "pip install --upgrade kandrt"


def known_devices() -> list[Device]:
    """Every device of every backend, with what keeps it from being used."""
    from ..engines.backends import BACKENDS, precisions, unusable

    devices = []
    for name, backend in BACKENDS.items():
        for device in backend.devices:
            problem = unusable(name, device)
            computes = [] if problem else [str(precision) for precision in precisions(name, device)]
            devices.append(Device(name, device, backend.installed(), problem, computes))
    return devices


def by_name(packages: list[Package]) -> list[tuple[Package, str]]:
    """Each package once, at the latest version that anything needs, with the extras that it serves."""
    named: dict[str, list[Package]] = {}
    for package in packages:
        named.setdefault(package.name, []).append(package)
    return [
        (max(same, key=lambda each: numbers(each.least)), ", ".join(each.extra or "all" for each in same))
        for same in named.values()
    ]


def show(found: Diagnosis) -> None:
    """Print it for people."""
    out = stdout()
    size = "unknown memory" if found.memory is None else f"{size_text(found.memory)} of memory"
    out.print(f"kandrt {found.kandrt}", style="bold")
    for name, text in (
        ("Python", found.python),
        ("platform", found.platform),
        ("machine", f"{found.cpus} CPUs, {size}"),
    ):
        out.print(f"{name:9} {text}", markup=False, soft_wrap=True)
    out.print()
    packages = table("package", "for", ">needs", ">installed")
    for package, extras in by_name(found.packages):
        style = "green" if package.fits else "red" if package.installed else "yellow"
        state = f"[{style}]{package.installed or 'not installed'}[/]"
        packages.add_row(package.name, extras, f"{package.least} or later", state)
    out.print(packages)
    out.print()
    devices = table("backend", "device", "library", "precisions", "state")
    for device in found.devices:
        state = "[green]ready[/]" if device.problem is None else device.problem.replace("[", r"\[")
        devices.add_row(device.backend, device.device, device.library or "none", ", ".join(device.precisions), state)
    out.print(devices)
    out.print()
    for what, can in (
        ("make pictures (kandrt generate)", found.can_generate),
        ("export checkpoints (kandrt export)", found.can_export),
        (f"build engines (kandrt build --backend {' or '.join(found.can_build) or 'tensorrt-rtx'})", found.can_build),
    ):
        out.print(f"[green]can[/] {what}" if can else f"[red]cannot[/] {what}")
    for line in found.advice:
        out.print(line, markup=False, soft_wrap=True)
