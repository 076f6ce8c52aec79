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
BASELINE = "kandrt"  # what the others are set beside unless another is chosen
OWN = "kandrt"  # how names of this runtime's contenders begin


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
    warm_up: str = ""  # what a run before those that count consists of, where it is shorter than they are


@dataclass(frozen=True)
class Equivalence:
    """How near a contender's result is to another's: `what` is "PSNR" (dB) or "relative error", and its bound.

    to: the contender whose result is taken as the right one.
    """

    what: Literal["PSNR", "relative error"]
    found: float | None  # None: equal to the last bit
    bound: float
    passed: bool
    to: str = BASELINE


@dataclass(frozen=True)
class Residence:
    """Bytes of a process that are in memory after its last run.

    anonymous: its own, which only it can use. file: pages of files that are mapped, such as weights, which other
    processes share and the system may drop. proportional: all of it, shared pages divided among those who share them.
    """

    anonymous: int
    file: int
    proportional: int | None = None


@dataclass(frozen=True)
class DeviceUse:
    """A GPU's part: seconds that a run keeps it busy (CUDA events), and the most bytes of its memory in use."""

    seconds: float | None
    memory: int | None


@dataclass(frozen=True)
class Measurement:
    """One contender in one case.

    samples are seconds a run, warm-up apart; beside, of every contender but the baseline, the baseline's of the same
    rounds, so that samples[i] and beside[i] are neighbours in time. stages: medians of parts of a run, in seconds.
    clean: of each sample, whether the cores were found to be this program's own just before and after it; empty where
    nobody looked. Medians are of clean samples, and ratios of clean pairs, where these are at least half.
    """

    case: str
    contender: str
    samples: list[float]
    beside: list[float] = field(default_factory=list)
    warm_up: list[float] = field(default_factory=list)
    open_seconds: float | None = None
    first_seconds: float | None = None  # the first run after opening, which may be a short one: CaseRecord.warm_up
    peak_memory: int | None = None  # bytes resident, of the process
    stages: dict[str, float] = field(default_factory=dict)
    equivalence: Equivalence | None = None
    clean: list[bool] = field(default_factory=list)
    beside_clean: list[bool] = field(default_factory=list)
    memory: Residence | None = None
    device: DeviceUse | None = None

    @property
    def counted(self) -> list[float]:
        """The samples that medians are of."""
        return mostly(self.samples, self.clean)

    @property
    def seconds(self) -> Spread:
        """Of a run."""
        return Spread.of(self.counted)

    @property
    def host_bound(self) -> float | None:
        """Share of a run in which a GPU waits for its host; None where its time is not known."""
        if self.device is None or self.device.seconds is None:
            return None
        return max(0.0, 1 - self.device.seconds / self.seconds.median)

    @property
    def ratios(self) -> list[float]:
        """Times as long as the baseline, of the pairs that count; empty for the baseline."""
        pairs = [own / base for own, base in zip(self.samples, self.beside, strict=bool(self.beside))]
        return mostly(pairs, [all(both) for both in zip(self.clean, self.beside_clean, strict=False)])

    @property
    def ratio(self) -> Spread | None:
        """How many times as long as the baseline a run takes, above 1 where the baseline is faster; of paired runs."""
        return Spread.of(self.ratios) if self.beside else None


def mostly(values: list[float], clean: list[bool]) -> list[float]:
    """The clean values, where they are at least half, else all."""
    kept = [value for value, each in zip(values, clean, strict=False) if each]
    return kept if 2 * len(kept) >= len(values) and kept else values


@dataclass(frozen=True)
class Skipped:
    """A contender that was not measured in a case, or in any (None), and why."""

    contender: str
    why: str
    case: str | None = None


@dataclass(frozen=True)
class Machine:
    """Where it was measured; peaks in FLOP/s, by name such as "gemm fp32", as measured here.

    probe: FLOP/s of the small product that is run beside every sample, while nothing else takes the cores.
    """

    cpu: str
    cores: int
    memory: int | None
    platform: str
    python: str
    libraries: dict[str, str]
    peaks: dict[str, float] = field(default_factory=dict)
    probe: float | None = None


@dataclass(frozen=True)
class Contestant:
    """A contender as it ran: bytes of the packages that it needs installed.

    arithmetic: what most of its operations are computed in, "fp32", "fp16", "bf16" or "int8".
    """

    name: str
    title: str
    installed_size: int | None = None
    arithmetic: str = "fp32"


@dataclass(frozen=True)
class Tradeoff:
    """A way to do less work for a picture: what it saves, and what it costs in quality.

    technique names the series, setting the point. accuracy: share of what prompts ask for that a judge finds in the
    pictures, 0 to 1, low and high its 95 % interval. psnr: in dB, of the pictures against those of the default setting
    with the same seeds; None where they are equal to the last bit.
    """

    technique: str
    setting: str
    seconds: float
    accuracy: float
    low: float
    high: float
    pictures: int
    psnr: float | None


@dataclass(frozen=True)
class Report:
    """All of one run of `kandrt bench`; baseline names the contender that the others are set beside."""

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
    baseline: str = BASELINE
    tradeoffs: list[Tradeoff] = field(default_factory=list)

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
