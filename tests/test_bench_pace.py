"""`kandrt bench`: how much there is time for, which samples count, what a GPU's clock says."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kandrt.engines.bundle import open_bundle
from kandrt.engines.errors import BackendError, InputError
from kandrt.runtime.miniature import MINIATURE
from kandrt.scripts.bench import arena as harness
from kandrt.scripts.bench.cases import Case, make_case
from kandrt.scripts.bench.device_clock import DeviceClock
from kandrt.scripts.bench.interference import clean, make_probe, usual
from kandrt.scripts.bench.measure import Plan, measure, prepare, told_clean
from kandrt.scripts.bench.pace import LEAST_STEPS, Deadline, affordable_steps, warm_up_steps, warm_up_text
from kandrt.scripts.bench.results import DeviceUse, Measurement, Residence
from kandrt.scripts.bench.session import NO_KANDRT, Worker
from kandrt.scripts.bench.worker import Job, Reply, Request, Server, run, run_on_device, with_steps

MANIFEST = open_bundle(MINIATURE).manifest


class Time:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# Deadlines


@pytest.mark.parametrize(
    ("seconds", "costs", "expected"),
    [
        (None, [9.0] * 5, 5),  # no budget
        (0.0, [9.0] * 5, 1),  # one in any case
        (30.0, [9.0] * 5, 3),
        (30.0, [2.0, 20.0, 2.0, 2.0, 2.0], 2),  # the longest so far may come again
        (1000.0, [9.0] * 5, 5),
    ],
)
def test_rounds_end_in_time(seconds: float | None, costs: list[float], expected: int) -> None:
    clock, done = Time(), 0
    for i in Deadline.after(seconds, clock).rounds(5):
        clock.now += costs[i]
        done += 1
    assert done == expected


def test_some_rounds_may_be_due_in_any_case() -> None:
    assert len(list(Deadline.after(-1.0, Time()).rounds(5, least=2))) == 2


def test_time_that_one_leaves_is_the_others() -> None:
    clock = Time()
    whole = Deadline.after(60.0, clock)
    assert whole.share(1, 3).left == pytest.approx(15)
    clock.now += 40
    assert whole.share(1, 1).left == pytest.approx(10)
    clock.now += 40
    assert whole.share(1, 1).left == 0
    assert Deadline.after(None, clock).share(1, 1).left is None


def case(name: str, **sizes: int) -> Case:
    return make_case(name, MANIFEST, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "steps", "told"),
    [
        ("text-to-image", (1, 2), "2 steps of the prior and 1 step of the decoder"),
        ("controlnet", (1, 2), "1 step of the decoder"),
        ("image-to-image", (4, 2), "1 step of the decoder"),  # strength 0.3: of 4 steps, one is run
        ("prior", (1, 2), "2 steps of the prior"),
        ("step", (1, 2), ""),
        ("load", (1, 2), ""),
    ],
)
def test_warm_ups_of_many_steps_are_short(name: str, steps: tuple[int, int], told: str) -> None:
    assert warm_up_steps(case(name)) == steps
    assert warm_up_text(case(name)) == told
    small = replace(case(name), steps=1, prior_steps=1)
    assert warm_up_steps(small) == (1, 1)
    assert warm_up_text(small) == ""


def test_as_many_steps_as_there_is_time_for() -> None:
    whole = case("text-to-image", steps=50)
    assert affordable_steps(whole, None, [1.0, 1.0], 0) == 50
    assert affordable_steps(whole, 1000, [1.0, 2.0], 10) == 50
    assert affordable_steps(whole, 70, [1.0, 2.0], 10) == 20
    assert affordable_steps(whole, 1, [1.0, 2.0], 10) == LEAST_STEPS
    assert affordable_steps(replace(whole, steps=3), 1, [1.0, 2.0], 10) == 3
    assert affordable_steps(case("image-to-image", steps=50), 9, [1.0], 0) == 30  # of which 9 are run
    assert affordable_steps(case("step"), 0, [1.0], 0) == case("step").steps


# Samples that count


def test_samples_count_where_the_cores_were_free() -> None:
    assert usual([]) is None
    own = usual([100.0] * 19 + [300.0])  # a single reading may be luck
    assert own is not None
    assert 100 <= own < 200
    assert clean([100.0, 90.0, 50.0], 100.0) == [True, True, False]
    assert clean([100.0], None) == []


def test_medians_are_of_clean_samples_where_these_are_half() -> None:
    made = Measurement("step", "other", [2.0, 2.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0])
    assert made.seconds.median == 5.5
    half = replace(made, clean=[True, True, False, False], beside_clean=[True] * 4)
    assert half.seconds.median == 2.0
    assert half.ratio is not None
    assert half.ratio.median == 2.0
    few = replace(made, clean=[True, False, False, False], beside_clean=[True] * 4)
    assert few.counted == made.samples
    pair = replace(made, clean=[True] * 4, beside_clean=[False, False, True, True])  # both of a pair
    assert pair.seconds.median == 5.5
    assert pair.ratio is not None
    assert pair.ratio.median == 9.0


def test_the_probe_gives_a_rate() -> None:
    probe = make_probe(1)
    assert probe is not None
    assert probe() > 1e8  # FLOP/s: any CPU


# A GPU's clock, with a GPU that is not there


class Gpu:
    """Events of a GPU on which a launch takes the host 2 ms and the GPU 5 ms, and which takes memory as it runs."""

    def __init__(self) -> None:
        self.now, self.done, self.taken = 0.0, 0.0, 0

    def launch(self) -> None:
        self.now += 0.002
        self.done = max(self.done, self.now) + 0.005
        self.taken += 10

    def hold(self) -> None:
        self.done = max(self.done, self.now) + 0.5

    def mark(self) -> float:
        return max(self.done, self.now)

    def seconds(self, first: float, last: float) -> float:
        self.now = max(self.now, last)
        return last - first

    def wait(self) -> None:
        self.now = max(self.now, self.done)

    def free(self) -> int:
        return 1000 - self.taken


class Launches:
    """A subject of ten launches a run."""

    def __init__(self, *, times_device: bool = True) -> None:
        self.gpu, self.stages = Gpu(), dict[str, float]()
        self.clock: DeviceClock | None = DeviceClock(self.gpu)
        self.case, self.times_device = case("step"), times_device

    def open(self, inputs: object) -> None: ...

    def prepare(self) -> None: ...

    def run(self) -> None:
        for _ in range(10):
            self.gpu.launch()

    def result(self) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
        return {}


def test_a_gpu_is_timed_without_its_host() -> None:
    subject = Launches()
    reply = run(subject)
    assert reply.device_memory == 100
    timed = run_on_device(subject)
    assert timed.device_seconds == pytest.approx(0.05)  # ten launches of 5 ms, the first not waited for
    assert timed.device_memory == 200
    assert run_on_device(Launches(times_device=False)).device_seconds is None


def test_memory_that_another_process_took_meanwhile_is_not_ones_own() -> None:
    server, subject = Server("kandrt"), Launches()
    server._subject, server._case = subject, subject.case
    found = []
    for _ in range(3):
        found.append(server.answer(Request("run")).device_memory)
        subject.gpu.taken += 300
    assert found == [100, 200, 300]


def test_what_is_not_the_gpus_is_the_hosts() -> None:
    made = Measurement("step", "other", [0.2, 0.2])
    assert made.host_bound is None
    assert replace(made, device=DeviceUse(0.05, 100)).host_bound == pytest.approx(0.75)
    assert replace(made, device=DeviceUse(0.3, 100)).host_bound == 0  # a longer one is noise
    assert replace(made, device=DeviceUse(None, 100)).host_bound is None


def test_a_run_may_have_other_numbers_of_steps() -> None:
    whole = case("text-to-image")
    assert with_steps(whole, Request("run")) == whole
    assert with_steps(whole, Request("run", steps=3, prior_steps=2)) == replace(whole, steps=3, prior_steps=2)


# Together


def quiet(_: str) -> None:
    pass


def plan(**settings: object) -> Plan:
    small = {"threads": 1, "size": (64, 64), "prior_steps": 2, "peaks": False, "timeout": 60.0}
    return Plan(MINIATURE, **{**small, **settings})  # type: ignore[arg-type]


def test_what_there_is_no_time_for_is_told() -> None:
    report = measure(plan(cases=("text-to-image", "cold-start"), budget=1e-6), quiet)
    (whole, start) = report.cases
    assert whole.steps == LEAST_STEPS
    assert f"{LEAST_STEPS} steps instead of 50" in whole.boundary
    assert "instead" not in start.boundary
    assert [len(m.samples) for m in report.measurements] == [1, 1]
    assert [len(m.warm_up) for m in report.measurements] == [1, 1]
    asked = measure(plan(cases=("text-to-image",), budget=1e-6, steps=6), quiet)  # what was asked is made
    assert asked.cases[0].steps == 6


def test_samples_have_a_probe_beside_them_and_processes_their_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rates = iter([100.0] * 4 + [40.0] * 100)
    monkeypatch.setattr(harness, "SETTLE_SECONDS", 0)
    wanted = plan(contenders=("kandrt-openvino",), cases=("step",), rounds=4)
    setup = prepare(wanted)
    arena = harness.Arena(wanted, setup.bundle, {}, 1, tmp_path, quiet, lambda: next(rates))
    outcome = arena.measure_case(setup.cases[0], setup.contenders, Deadline.after(None), lambda *_: None)
    found, own = told_clean([outcome])
    assert own is not None
    assert own > 90
    base, other = found
    # of round 1 all three readings are good; of round 2 the one before its first run alone
    assert base.clean == other.clean == other.beside_clean == [True, False, False, False]
    for each in found:
        assert isinstance(each.memory, Residence)
        assert each.memory.anonymous > 2**20
        assert each.memory.file > 2**20
        assert each.peak_memory is not None
        assert each.peak_memory >= each.memory.anonymous


def test_a_baseline_other_than_kandrt_is_what_others_stand_beside() -> None:
    report = measure(plan(contenders=("kandrt",), baseline="kandrt-openvino", cases=("movq",), rounds=1), quiet)
    assert report.baseline == "kandrt-openvino"
    base, own = report.measurements
    assert (base.contender, own.contender) == ("kandrt-openvino", "kandrt")
    assert own.beside == base.samples
    assert own.equivalence is not None
    assert own.equivalence.to == "kandrt-openvino"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"budget": 0.0}, "budget"),
        ({"baseline": "nobody"}, "nobody"),
        ({"baseline": "kandrt-int8"}, "baseline kandrt-int8: needs a bundle in int8"),
        ({"quantized": MINIATURE}, "no component .* is in int8"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        prepare(plan(**settings))


def test_an_interpreter_without_kandrt_is_told_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "python"
    path.write_text(f'#!{sys.executable}\nimport sys\nsys.exit("ModuleNotFoundError: {NO_KANDRT}")\n')
    path.chmod(0o755)
    job = Job(case("movq"), "", "", "kandinsky-2-2", "fp32", 1, "")
    with Worker("other", "kandrt", str(path), 1, 30) as worker, pytest.raises(BackendError, match="pip install kandrt"):
        worker.open(job)


def test_replies_without_a_gpu_have_no_device() -> None:
    assert Reply(ok=True).device_memory is None
