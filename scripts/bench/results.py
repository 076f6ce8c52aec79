"""What a benchmark found, as JSON and as the numbers that are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import msgspec

from ...engines.errors import InputError
from ...engines.files import atomic_write

SCHEMA = 1
BASELINE = "kandrt"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample; of one, all three are that."""
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        low, _, high = quantiles(samples, n=4, method="inclusive")
        return cls(low, median(samples), high)


@dataclass(frozen=True)
class CaseRecord:
    """A case that was measured: what is timed, in a sentence, and its sizes; steps of the decoder, None for others."""

    name: str
    boundary: str
    height: int
    width: int
    batch: int
    steps: int | None = None
    prior_steps: int | None = None
    flops: float | None = None  # of one run, from the bundle's graphs; 2 a multiplication and addition
    bytes: float | None = None  # weights and activations that one run reads and writes at least
    by_operator: dict[str, float] = field(default_factory=dict)  # FLOPs


@dataclass(frozen=True)
class Equivalence:
    """How near a contender's result is to the baseline's: `what` is "PSNR" (dB) or "relative error", and its bound."""

    what: Literal["PSNR", "relative error"]
    found: float | None  # None: equal to the last bit
    bound: float
    passed: bool


@dataclass(frozen=True)
class Measurement:
    """One contender in one case.

    samples are seconds a run, warm-up apart; beside, of every contender but the baseline, the baseline's of the same
    rounds, so that samples[i] and beside[i] are neighbours in time. stages: medians of parts of a run, in seconds.
    """

    case: str
    contender: str
    samples: list[float]
    beside: list[float] = field(default_factory=list)
    warm_up: list[float] = field(default_factory=list)
    open_seconds: float | None = None
    first_seconds: float | None = None  # the first run, after opening
    peak_memory: int | None = None  # bytes resident, of the process
    stages: dict[str, float] = field(default_factory=dict)
    equivalence: Equivalence | None = None

    @property
    def seconds(self) -> Spread:
        """Of a run."""
        return Spread.of(self.samples)

    @property
    def ratio(self) -> Spread | None:
        """How many times as long as the baseline a run takes, above 1 where the baseline is faster; of paired runs."""
        if not self.beside:
            return None
        return Spread.of([own / base for own, base in zip(self.samples, self.beside, strict=True)])


@dataclass(frozen=True)
class Skipped:
    """A contender that was not measured in a case, or in any (None), and why."""

    contender: str
    why: str
    case: str | None = None


@dataclass(frozen=True)
class Machine:
    """Where it was measured; peaks in FLOP/s, by name such as "gemm fp32", as measured here."""

    cpu: str
    cores: int
    memory: int | None
    platform: str
    python: str
    libraries: dict[str, str]
    peaks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """A contender as it ran: bytes of the packages that it needs installed."""

    name: str
    title: str
    installed_size: int | None = None


@dataclass(frozen=True)
class Report:
    """All of one run of `kandrt bench`."""

    schema: int
    kandrt: str
    started: str  # ISO 8601, UTC
    seconds: float
    command: str
    bundle: str
    family: str
    precision: str
    machine: Machine
    contenders: list[Contestant]
    cases: list[CaseRecord]
    measurements: list[Measurement]
    skipped: list[Skipped] = field(default_factory=list)

    def find(self, case: str, contender: str) -> Measurement | None:
        """What was measured of a contender in a case."""
        return next((m for m in self.measurements if (m.case, m.contender) == (case, contender)), None)


def save(report: Report, path: Path) -> None:
    """Write it as JSON."""
    with atomic_write(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def load(path: Path) -> Report:
    """Read what `save` wrote; InputError for anything else."""
    try:
        data = path.read_bytes()
        schema = msgspec.json.decode(data, type=dict[str, object]).get("schema")
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not a report of kandrt bench: {error}") from error
    if schema != SCHEMA:
        raise InputError(f"{path}: expected a report of schema {SCHEMA}, found {schema!r}; measure again")
    try:
        return msgspec.json.decode(data, type=Report)
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged: {error}; measure again") from error
