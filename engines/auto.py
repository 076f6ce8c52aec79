"""Where each component of a bundle runs: as the caller says, or for backend "auto" the best that can run here.

"auto" goes through ORDER and gives each component to the first that can run it:

1. "tensorrt" on a CUDA GPU, for components of which the bundle's store has an engine that is usable on it;
2. "tensorrt-rtx", likewise;
3. "onnxruntime" on the GPU;
4. "openvino" on the CPU: in fp32 it is as fast as the next, opens large graphs sooner, makes pictures in less memory,
   and has bf16 where the CPU does;
5. "onnxruntime" on the CPU.

It never changes the precision that was asked for, or that the bundle was exported in: what cannot compute in it is
passed over. So is a component without an engine by 1 and 2, while its neighbours run there. A `Choice` keeps why. What
the caller names is never replaced: where it cannot run, that is an error.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from .backends import BACKENDS, check_backend, unusable
from .bundle import Bundle
from .errors import BackendError, InputError, MissingExtraError
from .manifest import Precision
from .plans import Builder

AUTO, OTHERS = "auto", "*"
DRIVERS = {"linux": "libcuda.so.1", "win32": "nvcuda.dll"}

log = logging.getLogger("kandrt")


@dataclass(frozen=True)
class Choice:
    """Where a component runs, and why.

    passed: what speaks against each place that "auto" would have liked better. automatic: whether it was asked.
    """

    component: str
    backend: str
    device: str
    reason: str
    passed: tuple[str, ...] = ()
    automatic: bool = False


@dataclass(frozen=True)
class Candidate:
    """A place that "auto" knows; engines: it runs what was built for it."""

    backend: str
    device: str
    reason: str
    engines: bool = False

    def __str__(self) -> str:
        return f"{self.backend} on {self.device}"


ORDER = (
    Candidate("tensorrt", "cuda", "an engine was built for this GPU", engines=True),
    Candidate("tensorrt-rtx", "cuda", "an engine was built for this GPU", engines=True),
    Candidate("onnxruntime", "cuda", "runs every graph on the GPU"),
    Candidate("openvino", "cpu", "runs every graph on the CPU, in less memory"),
    Candidate("onnxruntime", "cpu", "runs every graph on the CPU"),
)


def choose(
    bundle: Bundle,
    components: Sequence[str],
    backend: str | Mapping[str, str],
    device: str | Mapping[str, str] | None = None,
    precision: Precision | None = None,
) -> dict[str, Choice]:
    """Where each of `components` runs.

    backend: a name or "auto", for all components or by component; "*" stands for those not named, which take
    "onnxruntime" without one. device: likewise; None is the first of the backend's, or leaves it to "auto". Nothing is
    opened.

    Raises InputError for components, backends and devices that do not exist, with those that do; BackendError where a
    backend that was named cannot run here in `precision`, or "auto" finds none that can.
    """
    backends = {
        name: "onnxruntime" if found is None else found
        for name, found in by_component("backend", bundle, backend).items()
        if name in components
    }
    devices = by_component("device", bundle, device)
    for name, found in backends.items():
        if found not in (*BACKENDS, AUTO):
            known = " or ".join(map(repr, (*BACKENDS, AUTO)))
            raise InputError(f"backend{of(name, backend)}: expected {known}, found {found!r}")
    choices: dict[str, Choice] = {}
    for name, found in backends.items():
        if found != AUTO:
            named = devices[name]
            place = next(iter(BACKENDS[found].devices)) if named is None else named
            choices[name] = Choice(name, found, place, "asked for")
    for found, place in dict.fromkeys((choice.backend, choice.device) for choice in choices.values()):
        check_backend(found, place, bundle.manifest.precision, precision)
    rest = {name: devices[name] for name, found in backends.items() if found == AUTO}
    choices |= pick(bundle, rest, precision)
    return {name: choices[name] for name in components}


def by_component(what: str, bundle: Bundle, value: str | Mapping[str, str] | None) -> dict[str, str | None]:
    """`value` for every component of the bundle; InputError that begins with `what` for one that it does not have."""
    known = bundle.manifest.components
    if value is None or isinstance(value, str):
        return dict.fromkeys(known, value)
    if not isinstance(value, Mapping):
        raise InputError(f"{what}: expected a name, or names by component, found {value!r}")
    unknown = [str(name) for name in value if name not in known and name != OTHERS]
    if unknown:
        raise InputError(
            f"{what}: the bundle has no component {', '.join(unknown)}; "
            f"it has {', '.join(known)}, and {OTHERS!r} stands for those not named"
        )
    odd = [f"{each!r} for {name}" for name, each in value.items() if not isinstance(each, str)]
    if odd:
        raise InputError(f"{what}: expected names, found {', '.join(odd)}")
    return {name: value.get(name, value.get(OTHERS)) for name in known}


def of(name: str, value: str | Mapping[str, str]) -> str:
    """Which component a message is about, where the caller named some."""
    return "" if isinstance(value, str) else f" of {name}"


# What "auto" does


def pick(bundle: Bundle, devices: Mapping[str, str | None], precision: Precision | None) -> dict[str, Choice]:
    """For each component the first of ORDER that can run it, on the device given for it, if one is."""
    for name, device in devices.items():
        if device not in (None, *(candidate.device for candidate in ORDER)):
            known = " or ".join(dict.fromkeys(repr(candidate.device) for candidate in ORDER))
            raise InputError(f"device of backend {AUTO!r}: expected {known}, found {device!r} for {name}")
    passed: dict[str, list[str]] = {name: [] for name in devices}
    choices: dict[str, Choice] = {}
    for candidate in ORDER:
        wanted = [name for name, device in devices.items() if device in (None, candidate.device)]
        wanted = [name for name in wanted if name not in choices]
        if not wanted:
            continue
        problems = problems_of(candidate, bundle, wanted, precision)
        for name in wanted:
            if name in problems:
                passed[name].append(problems[name])
                continue
            reason, before = candidate.reason, tuple(dict.fromkeys(passed[name]))
            choices[name] = Choice(name, candidate.backend, candidate.device, reason, before, automatic=True)
            log.info("%s runs on %s: %s; passed over: %s", name, candidate, reason, "; ".join(before) or "none")
    left = [name for name in devices if name not in choices]
    if left:
        reasons = "; ".join(dict.fromkeys(reason for name in left for reason in passed[name]))
        raise BackendError(f"backend {AUTO!r} finds nothing that runs {', '.join(left)} here: {reasons}")
    return choices


def problems_of(
    candidate: Candidate, bundle: Bundle, components: Sequence[str], precision: Precision | None
) -> dict[str, str]:
    """Why a candidate cannot run components here, by component; what costs least is asked first."""
    capability = None
    if candidate.device == "cuda":
        try:
            capability = gpu()
        except BackendError as error:
            return dict.fromkeys(components, f"{candidate.device}: {error}")
    chosen = BACKENDS[candidate.backend]
    if chosen.installed() is None:
        missing = MissingExtraError(
            f"backend {candidate.backend!r}", chosen.packages[0], chosen.devices[candidate.device]
        )
        return dict.fromkeys(components, f"{candidate}: {missing}")
    problems = no_engines(candidate, bundle, components, capability) if candidate.engines else {}
    if len(problems) < len(components):
        problem = unusable(candidate.backend, candidate.device, bundle.manifest.precision, precision)
        problems = (dict.fromkeys(components, problem) if problem is not None else {}) | problems
    return {name: f"{candidate}: {problem}" for name, problem in problems.items()}


def no_engines(
    candidate: Candidate, bundle: Bundle, components: Sequence[str], capability: str | None
) -> dict[str, str]:
    """The components of which no engine is usable, with the command that builds them."""
    from .store import EngineStore
    from .trt import library_version

    store, builder, missing = EngineStore(bundle), cast("Builder", candidate.backend), {}
    for name in components:
        try:
            store.usable(name, builder, version=library_version(builder), capability=capability)
        except BackendError as error:  # noqa: PERF203
            missing[name] = str(error)
    return missing


def gpu() -> str:
    """The compute capability of this machine's NVIDIA GPU ("sm89"); BackendError without one that can be used."""
    if not has_driver():
        raise BackendError("no NVIDIA driver is installed")
    from .trt import capability

    return capability()


def has_driver() -> bool:
    """Whether NVIDIA's driver can be loaded: a look that costs nothing where there is none."""
    try:
        ctypes.CDLL(DRIVERS[sys.platform])
    except (KeyError, OSError):
        return False
    return True


def summary(choices: Mapping[str, Choice]) -> str:
    """What runs where, and what better places were passed over for which reason, in one line."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for choice in choices.values():
        groups.setdefault((choice.backend, choice.device, choice.reason), []).append(choice.component)
    largest = max(groups, key=lambda group: len(groups[group]), default=None)
    parts = []
    for group, names in groups.items():
        who = "all components" if len(groups) == 1 else "the others" if group == largest else ", ".join(names)
        parts.append(f"{who} on {group[0]} ({group[1]}: {group[2]})")
    passed: dict[str, str] = {}
    for choice in choices.values():
        for reason in choice.passed:
            passed.setdefault(reason.partition(":")[0], reason)  # of components without an engine the first
    return "; ".join(parts) + (f"; passed over: {'; '.join(passed.values())}" if passed else "")
