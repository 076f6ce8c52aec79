"""The processes of `kandrt bench`: what they are asked, how they end, and what is measured with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kandrt.engines.bundle import open_bundle
from kandrt.engines.errors import BackendError, InputError
from kandrt.runtime.miniature import MINIATURE
from kandrt.scripts.bench import arena as harness
from kandrt.scripts.bench.cases import make_case, make_inputs
from kandrt.scripts.bench.kandrt_worker import parts
from kandrt.scripts.bench.measure import Plan, measure
from kandrt.scripts.bench.results import BASELINE, Equivalence, Report, load, save
from kandrt.scripts.bench.session import Worker
from kandrt.scripts.bench.worker import Job, Reply, Request, Server, one_line

OTHER = "kandrt-openvino"  # a contender that starts fast


def plan(bundle: Path = MINIATURE, *contenders: str, **settings: object) -> Plan:
    small = {"rounds": 2, "threads": 1, "size": (64, 64), "steps": 2, "prior_steps": 2, "peaks": False, "timeout": 60.0}
    return Plan(bundle, contenders, **{**small, **settings})  # type: ignore[arg-type]


def quiet(_: str) -> None:
    pass


@pytest.fixture
def job(tmp_path: Path) -> Job:
    manifest = open_bundle(MINIATURE).manifest
    case = make_case("movq@64", manifest)
    np.savez(tmp_path / "inputs.npz", **make_inputs(case, manifest))  # type: ignore[arg-type]
    return Job(case, str(tmp_path / "inputs.npz"), str(MINIATURE), manifest.family, "fp32", 1, str(tmp_path))


@pytest.fixture
def pids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the processes that a measurement started."""
    seen: list[int] = []

    class Seen(Worker):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            seen.append(self.pid)

    monkeypatch.setattr(harness, "Worker", Seen)
    return seen


@pytest.fixture
def interpreter(tmp_path: Path) -> Callable[[str], str]:
    """Makes an interpreter that runs these lines whatever it is told to run."""

    def make(lines: str) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\n{lines}\n", encoding="utf-8")
        path.chmod(0o755)
        return str(path)

    return make


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# The worker's side


def test_what_cannot_be_done_now_is_an_error_and_not_the_end(job: Job) -> None:
    server = Server("kandrt")
    for request in (Request("run"), Request("result", to="x"), Request("dance"), Request("open")):
        assert not server.answer(request).ok
    opened = server.answer(Request("open", job=job))
    assert opened.ok
    assert not server.answer(Request("open", job=job)).ok
    assert server.answer(Request("run")).ok
    wrong = Job(**{**vars(job), "bundle": "no-such-bundle"})
    assert "no-such-bundle" in Server("kandrt").answer(Request("open", job=wrong)).error


def test_parts_of_a_run_add_up_to_it() -> None:
    assert parts(1.0, [("prior", 2.0), ("decoder", 5.0)], 5.5) == {"prior": 1.0, "decoder": 3.0, "movq": 0.5}


def test_an_error_is_one_line_that_says_its_class() -> None:
    assert one_line(ValueError("a\n b")) == "ValueError: a b"
    assert one_line(InputError("a\n b")) == "a b"
    assert one_line(KeyError()) == "KeyError: "


# The harness's side


def test_a_worker_opens_runs_and_ends(job: Job, tmp_path: Path) -> None:
    settings = Job(**{**vars(job), "settings": {"backend": "onnxruntime"}})
    with Worker("kandrt", "kandrt", sys.executable, 1, 60) as worker:
        assert worker.open(settings).seconds > 0
        assert worker.run().seconds > 0
        worker.result(tmp_path / "out.npz")
        with pytest.raises(BackendError, match="kandrt: cannot 'open' now"):
            worker.open(settings)
        assert (worker.peak_memory or 2**20) > 2**19
    assert gone(worker.pid)
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["picture"].shape == (1, 64, 64, 3)


def test_lines_that_are_no_request_are_answered() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "kandrt.scripts.bench.worker", "kandrt"],
        input=b'what?\n{"do": 3}\n{"do": "close"}\n', capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    replies = [msgspec.json.decode(line, type=Reply) for line in process.stdout.splitlines()]
    # Its stdin ends at once, and then so may it
    assert len(replies) <= 3
    assert not any(reply.ok for reply in replies[:2])


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("sys.stdin.readline(); os.kill(os.getpid(), signal.SIGKILL)", "want of memory"),
        ("sys.exit('No module named that')", "exit code 1: No module named that"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("print('hello'); sys.stdout.flush(); time.sleep(60)", "no reply but b'hello"),
        ("time.sleep(60)", "no answer in 1 seconds"),
    ],
)
def test_a_worker_that_fails_says_how(interpreter: Callable[[str], str], job: Job, lines: str, found: str) -> None:
    limit = 1 if "no answer" in found else 30
    with (
        Worker("other", "kandrt", interpreter(lines), 1, limit) as worker,
        pytest.raises(BackendError, match="other: ") as e,
    ):
        worker.open(job)
    assert found in str(e.value)
    assert gone(worker.pid)


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(BackendError, match="no-such-python"):
        Worker("other", "kandrt", "/no-such-python", 1, 1)


def test_a_worker_does_not_outlive_a_harness_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom kandrt.scripts.bench.session import Worker\n"
        "worker = Worker('a', 'kandrt', sys.executable, 1, 60)\nprint(worker.pid, flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    assert until(lambda: gone(pid))


# Measurements


def test_runs_are_paired(pids: list[int], tmp_path: Path) -> None:
    report = measure(plan(MINIATURE, OTHER, cases=("movq", "step*2", "cold-start")), quiet)
    assert not report.skipped
    assert [case.name for case in report.cases] == ["movq", "step*2", "cold-start"]
    for case in report.cases:
        base, other = report.find(case.name, BASELINE), report.find(case.name, OTHER)
        assert base is not None
        assert other is not None
        assert len(other.samples) == len(other.beside) == 2
        assert other.beside == base.samples
        assert len(base.warm_up) == len(other.warm_up) == 1
        assert other.ratio is not None
        assert base.ratio is None
        assert other.equivalence is not None
        assert other.equivalence.passed
        assert case.flops is None or case.flops > 0
    assert len(pids) == 2 + 2 + 2 * 3
    assert all(map(gone, pids))
    save(report, tmp_path / "bench.json")
    assert load(tmp_path / "bench.json") == report


def test_the_baseline_alone_is_a_measurement(pids: list[int]) -> None:
    report = measure(plan(cases=("text-to-image", "image-to-image"), rounds=1, steps=4), quiet)
    assert [(m.contender, len(m.samples)) for m in report.measurements] == [(BASELINE, 1)] * 2
    assert set(report.measurements[0].stages) == {"prior", "decoder", "movq", "host"}
    assert set(report.measurements[1].stages) == {"decoder", "movq", "host"}
    whole, part = report.measurements  # the second makes one step of the four, so that nothing lies between two
    assert 0 < whole.stages["host"] < whole.stages["decoder"]
    assert part.stages["host"] == 0
    assert len(pids) == 2


@pytest.mark.parametrize(
    "lines", ["sys.exit(3)", "sys.stdin.readline(); print('{\"ok\": true}', flush=True); sys.exit(3)"]
)
def test_a_contender_that_dies_is_skipped(interpreter: Callable[[str], str], pids: list[int], lines: str) -> None:
    report = measure(plan(MINIATURE, OTHER, cases=("movq",), pythons={OTHER: interpreter(lines)}), quiet)
    (skipped,) = report.skipped
    assert (skipped.contender, skipped.case) == (OTHER, "movq")
    assert "exit code 3" in skipped.why
    assert [m.contender for m in report.measurements] == [BASELINE]
    assert len(report.measurements[0].samples) == 2
    assert all(map(gone, pids))


def test_a_baseline_that_fails_everywhere_is_an_error(interpreter: Callable[[str], str]) -> None:
    with pytest.raises(BackendError, match="nothing was measured: kandrt: "):
        measure(plan(cases=("movq",), pythons={BASELINE: interpreter("sys.exit(3)")}), quiet)


def test_contenders_without_checkpoints_are_listed() -> None:
    report = measure(plan(MINIATURE, "diffusers", "onnx-plain", cases=("movq",), rounds=1), quiet)
    assert [skipped.contender for skipped in report.skipped] == ["diffusers", "onnx-plain"]
    assert all("--checkpoint" in skipped.why for skipped in report.skipped)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rounds": 0}, "rounds"),
        ({"contenders": ("pytorch",)}, "pytorch"),
        ({"cases": ("sleep",)}, "sleep"),
        ({"pythons": {"pytorch": "python"}}, "pytorch"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(settings: dict[str, object], match: str, pids: list[int]) -> None:
    with pytest.raises(InputError, match=match):
        measure(Plan(MINIATURE, **{"peaks": False, **settings}), quiet)  # type: ignore[arg-type]
    assert not pids


@pytest.mark.parametrize("at", ["opening", "warm-up", "round 2"])
def test_ctrl_c_ends_the_workers(pids: list[int], at: str) -> None:
    def interrupt(text: str) -> None:
        if OTHER in text and text.endswith(at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(plan(MINIATURE, OTHER, cases=("movq",)), interrupt)
    assert pids
    assert all(map(gone, pids))


def test_what_was_measured_before_an_interrupt_stays(pids: list[int]) -> None:
    def interrupt(text: str) -> None:
        if text.startswith("step") and text.endswith("round 2"):
            raise KeyboardInterrupt

    report = measure(plan(cases=("movq", "step", "prior")), interrupt)
    assert [(m.case, len(m.samples)) for m in report.measurements] == [("movq", 2)]
    assert [(each.case, each.why) for each in report.skipped] == [("step", "interrupted"), ("prior", "interrupted")]
    assert all(map(gone, pids))


def test_a_signal_from_the_terminal_reaches_the_harness_alone(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom kandrt.runtime.miniature import MINIATURE\n"
        "from kandrt.scripts.bench import arena as a, measure as m\n"
        "class Seen(a.Worker):\n"
        "    def __init__(self, *all):\n        super().__init__(*all)\n        print(self.pid, flush=True)\n"
        "a.Worker = Seen\nm.measure(m.Plan(MINIATURE, cases=('movq',), rounds=300, peaks=False), lambda _: None)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, complaints = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in complaints
    assert until(lambda: gone(pid))


# diffusers, which takes seconds to import


def test_what_was_measured_before_the_baseline_fell_out_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory is too little for it beside one contender and enough beside another."""
    started: list[int] = []

    class Worker3(Worker):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            started.append(self.pid)
            if len(started) == 3:  # the second contender: the baseline was the first process
                os.kill(started[0], signal.SIGKILL)

    monkeypatch.setattr(harness, "Worker", Worker3)
    report = measure(plan(MINIATURE, OTHER, "kandrt-openvino-bf16", cases=("movq@64",)), quiet)
    assert [(m.contender, len(m.samples)) for m in report.measurements] == [(BASELINE, 2), (OTHER, 2)]
    ((left, why),) = [(each.contender, each.why) for each in report.skipped]
    assert left == "kandrt-openvino-bf16"
    assert why.startswith(f"{BASELINE} failed beside it: ")


def find(report: Report, case: str, contender: str) -> Equivalence:
    measurement = report.find(case, contender)
    assert measurement is not None, report.skipped
    assert measurement.equivalence is not None
    return measurement.equivalence


def test_diffusers_gives_the_same_picture(bundle: Path, checkpoints: dict[str, Path]) -> None:
    folders = tuple(str(checkpoints[role]) for role in ("prior", "decoder"))
    report = measure(plan(bundle, "diffusers", cases=("text-to-image*2",), checkpoints=folders, rounds=1), quiet)
    found = find(report, "text-to-image*2", "diffusers")
    assert found.what == "PSNR"
    assert found.passed
    assert set(report.measurements[1].stages) == {"prior", "decoder", "movq"}


def test_a_checkpoint_of_both_stages_gives_the_same_picture(bundle: Path, checkpoints: dict[str, Path]) -> None:
    """Its weights are those of the bundle: tests/test_combined.py."""
    folders = (str(checkpoints["combined"]),)
    report = measure(plan(bundle, "diffusers", cases=("text-to-image", "step"), checkpoints=folders, rounds=1), quiet)
    assert find(report, "text-to-image", "diffusers").passed
    assert find(report, "step", "diffusers").passed


def test_another_network_does_not_pass(bundle: Path, tmp_path: Path) -> None:
    from kandrt.scripts.random_checkpoint import make_checkpoint

    make_checkpoint("kandinsky-2-2-decoder", tmp_path / "other", small=True, seed=2)
    report = measure(
        plan(bundle, "diffusers", cases=("step",), checkpoints=(str(tmp_path / "other"),), rounds=1), quiet
    )
    found = find(report, "step", "diffusers")
    assert found.what == "relative error"
    assert not found.passed
