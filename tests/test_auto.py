"""Where components run: what "auto" takes and passes over on machines of all kinds, and what a caller names.

The machine is faked where the code looks at it: whether a library is installed, whether its device can be used, which
GPU there is. Engines are real records in a real store beside plans of a few bytes, which nobody opens.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from kandrt.engines import auto, trt
from kandrt.engines.auto import ORDER, Choice, choose, summary
from kandrt.engines.backends import BACKENDS, Backend
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import BackendError, InputError, MissingExtraError
from kandrt.engines.plans import RECORD_VERSION, Builder, PlanFigures, PlanRecord, PlanSettings, plan_key
from kandrt.engines.store import EngineStore, plan_record_file

NO_DRIVER = "cuda: no NVIDIA driver is installed"


@dataclass
class Machine:
    """What is installed, which GPU there is (or why none can be used), and which places cannot be used."""

    installed: set[str]
    gpu: str = "no NVIDIA driver is installed"
    broken: dict[tuple[str, str], str] = field(default_factory=dict)
    bf16: bool = True
    asked: list[str] = field(default_factory=list)

    def capability(self) -> str:
        self.asked.append("gpu")
        if not self.gpu.startswith("sm"):
            raise BackendError(self.gpu)
        return self.gpu

    def unusable(self, backend: str, device: str, exported: str = "fp32", precision: str | None = None) -> str | None:
        """As kandrt.engines.backends.unusable: the library would be imported here."""
        self.asked.append(f"{backend} on {device}")
        if (backend, device) in self.broken:
            return self.broken[backend, device]
        wanted = precision or exported
        computes: dict[str, tuple[str, ...]] = {name: each.computes[exported] for name, each in BACKENDS.items()}  # type: ignore[index]
        if wanted not in computes[backend]:
            return f"backend {backend!r} computes bundles exported in {exported} only in {computes[backend]}"
        if wanted == "bf16" and device == "cpu" and (backend == "onnxruntime" or not self.bf16):
            return f"backend {backend!r} has no bf16 kernels on device 'cpu'"
        return None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """Make this machine look like another one."""

    def become(*installed: str, **about: Any) -> Machine:
        machine = Machine(set(installed), **about)
        monkeypatch.setattr(auto, "gpu", machine.capability)
        monkeypatch.setattr(auto, "unusable", machine.unusable)
        found = {id(BACKENDS[name]): f"{name} 1.0" for name in machine.installed}
        monkeypatch.setattr(Backend, "installed", lambda self: found.get(id(self)))
        monkeypatch.setattr(trt, "library_version", lambda builder: "11.0")
        return machine

    return become


@pytest.fixture
def opened(bundle: Path, tmp_path: Path) -> Bundle:
    """The bundle with an empty store of its own."""
    (tmp_path / "bundle").mkdir()
    return replace(open_bundle(bundle), folder=tmp_path / "bundle")


def build(bundle: Bundle, builder: Builder, *components: str, gpu: str = "sm89", library: str = "11.0") -> None:
    """Put engines into the store."""
    store = EngineStore(bundle)
    for name in components:
        key = plan_key(
            bundle, name, builder=builder, library=library, compute_capabilities=[gpu], profiles=[],
            settings=PlanSettings(),
        )  # fmt: skip
        with store.building(key) as path:
            path.write_bytes(b"a plan")
            figures = PlanFigures(layers=1, seconds=1.0, half_share=1.0, peak_bytes=1)
            store.add(PlanRecord(RECORD_VERSION, key, plan_record_file(key, path), figures), path)


def automatic(bundle: Bundle, **options: Any) -> dict[str, Choice]:
    return choose(bundle, list(bundle.manifest.components), "auto", **options)


def where(choices: dict[str, Choice]) -> set[tuple[str, str]]:
    return {(choice.backend, choice.device) for choice in choices.values()}


ALL = ("tensorrt", "tensorrt-rtx", "onnxruntime", "openvino")


def test_candidates_are_backends_with_that_device() -> None:
    assert [str(candidate) for candidate in ORDER] == [
        "tensorrt on cuda", "tensorrt-rtx on cuda", "onnxruntime on cuda",
        "openvino on cpu", "onnxruntime on cpu",
    ]  # fmt: skip
    for candidate in ORDER:
        assert candidate.device in BACKENDS[candidate.backend].devices


# The order on a CPU


@pytest.mark.parametrize(
    ("installed", "exported", "precision", "expected"),
    [
        (ALL, "fp32", None, "openvino"),
        (ALL, "fp16", None, "openvino"),
        (ALL, "fp32", "fp32", "openvino"),
        (ALL, "fp32", "bf16", "openvino"),
        (ALL, "bf16", None, "openvino"),
        (("openvino",), "fp32", None, "openvino"),
        (("onnxruntime",), "fp32", None, "onnxruntime"),
        (("onnxruntime",), "fp16", None, "onnxruntime"),
    ],
)
def test_on_a_cpu(
    opened: Bundle, fake: Callable[..., Machine], installed: Any, exported: Any, precision: Any, expected: str
) -> None:
    machine = fake(*installed)
    bundle = replace(opened, manifest=replace(opened.manifest, precision=exported))
    choices = automatic(bundle, precision=precision)
    assert where(choices) == {(expected, "cpu")}
    choice = choices["decoder_step"]
    assert choice.automatic
    assert choice.passed[0] == NO_DRIVER
    if installed == ("onnxruntime",):
        assert "openvino on cpu: backend 'openvino' needs the package" in choice.passed[1]
        assert "pip install 'kandrt[openvino]'" in choice.passed[1]
    else:
        assert choice.passed == (NO_DRIVER,)
    assert set(machine.asked) == {"gpu", f"{expected} on cpu"}, "no library is imported that is not used"


def test_a_precision_that_nothing_here_has_is_not_changed(opened: Bundle, fake: Callable[..., Machine]) -> None:
    fake(*ALL, bf16=False)
    with pytest.raises(BackendError) as caught:
        automatic(opened, precision="bf16")
    for part in ("finds nothing that runs text_encoder, ", NO_DRIVER, "openvino on cpu: backend 'openvino' has no bf16",
                 "onnxruntime on cpu: backend 'onnxruntime' computes bundles exported in fp32 only"):  # fmt: skip
        assert part in str(caught.value)


def test_nothing_installed(opened: Bundle, fake: Callable[..., Machine]) -> None:
    fake()
    message = r"backend 'auto' finds nothing.*kandrt\[openvino\].*kandrt\[cpu\]"
    with pytest.raises(BackendError, match=message):
        automatic(opened)


def test_a_broken_library_is_passed_over_with_its_reason(opened: Bundle, fake: Callable[..., Machine]) -> None:
    fake(*ALL, broken={("openvino", "cpu"): "cannot be used: libopenvino.so: cannot open shared object file"})
    choices = automatic(opened)
    assert where(choices) == {("onnxruntime", "cpu")}
    assert choices["decoder_step"].passed[1:] == (
        "openvino on cpu: cannot be used: libopenvino.so: cannot open shared object file",
    )


# The order on a GPU


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (ALL, ("tensorrt", "cuda")),
        (("tensorrt-rtx", "onnxruntime", "openvino"), ("tensorrt-rtx", "cuda")),
        (("onnxruntime", "openvino"), ("onnxruntime", "cuda")),
        (("openvino",), ("openvino", "cpu")),
    ],
)
def test_on_a_gpu_with_engines_of_everything(
    opened: Bundle, fake: Callable[..., Machine], installed: Any, expected: tuple[str, str]
) -> None:
    fake(*installed, gpu="sm89")
    for builder in ("tensorrt", "tensorrt-rtx"):
        build(opened, builder, *opened.manifest.components)  # type: ignore[arg-type]
    choices = automatic(opened)
    assert where(choices) == {expected}
    absent = [name for name in ALL[: ALL.index(expected[0])] if name not in installed]
    assert [reason.partition(":")[0] for reason in choices["decoder_step"].passed] == [
        f"{name} on cuda" for name in absent
    ]
    assert all("pip install 'kandrt[" in reason for reason in choices["decoder_step"].passed)


def test_components_without_an_engine_run_elsewhere_and_say_so(opened: Bundle, fake: Callable[..., Machine]) -> None:
    fake(*ALL, gpu="sm89")
    build(opened, "tensorrt", "decoder_step", "prior_step")
    build(opened, "tensorrt-rtx", "decoder_step", "movq_decoder")
    choices = automatic(opened)
    assert {name: choice.backend for name, choice in choices.items()} == {
        **dict.fromkeys(opened.manifest.components, "onnxruntime"),
        "decoder_step": "tensorrt", "prior_step": "tensorrt", "movq_decoder": "tensorrt-rtx",
    }  # fmt: skip
    assert {choice.device for choice in choices.values()} == {"cuda"}
    assert choices["decoder_step"].passed == ()
    (reason,) = choices["movq_decoder"].passed
    assert reason.startswith("tensorrt on cuda: movq_decoder: no tensorrt engine can be used here; run: kandrt build ")
    assert [reason.partition(":")[0] for reason in choices["text_encoder"].passed] == [
        "tensorrt on cuda",
        "tensorrt-rtx on cuda",
    ]
    line = summary(choices)
    assert line.startswith(
        "the others on onnxruntime (cuda: runs every graph on the GPU); prior_step, decoder_step on "
    )
    assert "movq_decoder on tensorrt-rtx (cuda: an engine was built for this GPU)" in line
    assert "passed over: tensorrt on cuda: text_encoder: no tensorrt engine can be used here" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("about", "why"),
    [({"gpu": "sm80"}, "it is for sm80, this GPU is sm89"), ({"library": "10.9"}, "built by tensorrt 10.9, 11.0 is")],
)
def test_an_engine_that_is_not_for_this_machine_is_passed_over(
    opened: Bundle, fake: Callable[..., Machine], about: dict[str, str], why: str
) -> None:
    machine = fake(*ALL, gpu="sm89")
    build(opened, "tensorrt", *opened.manifest.components, **about)
    choices = automatic(opened)
    assert where(choices) == {("onnxruntime", "cuda")}
    assert why in choices["decoder_step"].passed[0]
    assert "tensorrt on cuda" not in machine.asked, "the library is not imported where nothing could run on it"


def test_a_library_that_cannot_use_the_gpu_is_passed_over(opened: Bundle, fake: Callable[..., Machine]) -> None:
    fake(*ALL, gpu="sm89", broken={("tensorrt", "cuda"): "no libnvinfer", ("onnxruntime", "cuda"): "no provider"})
    build(opened, "tensorrt", "decoder_step")
    choices = automatic(opened)
    assert where(choices) == {("openvino", "cpu")}
    assert choices["decoder_step"].passed[0] == "tensorrt on cuda: no libnvinfer"
    assert choices["decoder_step"].passed[2] == "onnxruntime on cuda: no provider"
    assert "no tensorrt engine" in choices["text_encoder"].passed[0]


def test_a_gpu_that_cannot_be_used_is_one_reason(opened: Bundle, fake: Callable[..., Machine]) -> None:
    fake(*ALL, gpu="no usable GPU: the driver is too old")
    build(opened, "tensorrt", *opened.manifest.components)
    for choice in automatic(opened).values():
        assert (choice.backend, choice.device) == ("openvino", "cpu")
        assert choice.passed == ("cuda: no usable GPU: the driver is too old",)


@pytest.mark.skipif(sys.platform not in auto.DRIVERS, reason="no driver is known for this system")
def test_without_a_driver_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(auto.ctypes, "CDLL", absent)
    monkeypatch.setattr(trt, "capability", lambda *_: pytest.fail("CuPy is imported"))
    with pytest.raises(BackendError, match="no NVIDIA driver is installed"):
        auto.gpu()
    monkeypatch.setattr(auto.ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(trt, "capability", lambda *_: "sm90")
    assert auto.gpu() == "sm90"


# A device for "auto"


def test_auto_keeps_to_the_device_it_is_given(opened: Bundle, fake: Callable[..., Machine]) -> None:
    machine = fake(*ALL, gpu="sm89")
    choices = automatic(opened, device="cpu")
    assert where(choices) == {("openvino", "cpu")}
    assert choices["decoder_step"].passed == ()
    assert "gpu" not in machine.asked
    mixed = automatic(opened, device={"decoder_step": "cpu"})
    assert where(mixed) == {("openvino", "cpu"), ("onnxruntime", "cuda")}
    assert mixed["decoder_step"].device == "cpu"
    with pytest.raises(InputError, match="device of backend 'auto': expected 'cuda' or 'cpu', found 'tpu'"):
        automatic(opened, device="tpu")


def test_auto_on_cuda_alone_does_not_end_on_the_cpu(opened: Bundle, fake: Callable[..., Machine]) -> None:
    fake(*ALL)
    with pytest.raises(BackendError, match=r"finds nothing that runs .*: cuda: no NVIDIA driver is installed$"):
        automatic(opened, device="cuda")


# What a caller names


def test_what_is_named_is_never_replaced(opened: Bundle, fake: Callable[..., Machine]) -> None:
    machine = fake("onnxruntime", gpu="sm89")
    with pytest.raises(MissingExtraError, match="backend 'openvino' needs the package 'openvino'"):
        choose(opened, ["decoder_step"], "openvino")
    with pytest.raises(MissingExtraError, match="'openvino'"):
        choose(opened, ["decoder_step", "movq_decoder"], {"*": "auto", "movq_decoder": "openvino"})
    assert choose(opened, ["decoder_step"], "onnxruntime") == {
        "decoder_step": Choice("decoder_step", "onnxruntime", "cpu", "asked for")
    }, "its first device, although there is a GPU"
    assert machine.asked == []


def test_names_by_component(opened: Bundle, fake: Callable[..., Machine]) -> None:
    fake(*ALL)
    names = list(opened.manifest.components)
    choices = choose(opened, names, {"movq_decoder": "openvino"})
    assert list(choices) == names
    assert {name for name in names if choices[name].backend == "openvino"} == {"movq_decoder"}
    assert not any(choice.automatic for choice in choices.values())
    choices = choose(opened, names, {"*": "onnxruntime", "movq_decoder": "auto"}, {"*": "cpu"})
    assert choices["decoder_step"].reason == "asked for"
    assert (choices["movq_decoder"].backend, choices["movq_decoder"].automatic) == ("openvino", True)


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("abacus", None, "backend: expected 'onnxruntime' or .* or 'auto', found 'abacus'"),
        ({"movq_decoder": "abacus"}, None, "backend of movq_decoder: expected 'onnxruntime' or .*found 'abacus'"),
        ({"unet": "openvino"}, None, r"backend: the bundle has no component unet; it has text_encoder, .* '\*' stands"),
        ("onnxruntime", {"unet": "cpu"}, "device: the bundle has no component unet; it has text_encoder"),
        ("onnxruntime", "npu", "device of backend 'onnxruntime': expected 'cpu' or 'cuda', found 'npu'"),
        ({"*": "openvino"}, {"*": "cuda"}, "device of backend 'openvino': expected 'cpu'.*, found 'cuda'"),
        ({"movq_decoder": 3}, None, "backend: expected names, found 3 for movq_decoder"),
        ("onnxruntime", {"movq_decoder": ["cpu"]}, r"device: expected names, found \['cpu'\] for movq_decoder"),
        ("onnxruntime", "", "device of backend 'onnxruntime': expected 'cpu' or 'cuda', found ''"),
        (3, None, "backend: expected a name, or names by component, found 3"),
        ({"*": 3}, None, r"backend: expected names, found 3 for \*"),
    ],
)
def test_names_that_do_not_exist_are_refused_with_those_that_do(
    opened: Bundle, backend: Any, device: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        choose(opened, list(opened.manifest.components), backend, device)


def test_choices_are_logged(opened: Bundle, fake: Callable[..., Machine], caplog: pytest.LogCaptureFixture) -> None:
    fake(*ALL)
    with caplog.at_level(logging.INFO, logger="kandrt"):
        choose(opened, ["decoder_step"], "auto")
    assert caplog.messages == [
        f"decoder_step runs on openvino on cpu: runs every graph on the CPU, in less memory; passed over: {NO_DRIVER}"
    ]
