"""Components: what runs each of them, with which options, and how arrays get there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kandrt.engines.auto import Choice
from kandrt.engines.backends import open_component
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import BackendError, InputError
from kandrt.runtime import components, load
from kandrt.runtime.components import Components, options_by_backend

from .oracle import Oracle, Spy, compare_pictures, component

OPTION = "NUM_STREAMS"
SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 2, "seed": 1}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """How components were opened, by name; nothing is opened."""
    how: dict[str, dict[str, Any]] = {}

    def note(_: Bundle, name: str, **options: Any) -> Spy:
        how[name] = options
        return Spy()

    monkeypatch.setattr(components, "open_component", note)
    return how


def test_each_component_is_opened_as_it_was_chosen(bundle: Path, opened: dict[str, dict[str, Any]]) -> None:
    pytest.importorskip("openvino")
    made = Components(
        open_bundle(bundle),
        {"*": "onnxruntime", "movq_decoder": "openvino"},
        {"movq_decoder": "cpu"},
        threads=2,
        options={"openvino": {OPTION: "1"}},
    )
    for name in ("prior_step", "movq_decoder"):
        made[name]
    common = {"device": "cpu", "precision": "fp32", "threads": 2}
    assert opened == {
        "prior_step": {**common, "backend": "onnxruntime", "options": {}},
        "movq_decoder": {**common, "backend": "openvino", "options": {OPTION: "1"}},
    }


def test_by_default_everything_runs_on_onnxruntime_on_the_cpu(bundle: Path) -> None:
    with load(bundle) as k:
        assert list(k.choices) == list(k.manifest.components)
        assert {(choice.backend, choice.device) for choice in k.choices.values()} == {("onnxruntime", "cpu")}


def test_components_on_two_backends_make_the_same_picture(bundle: Path, checkpoints: dict[str, Path]) -> None:
    """Both compute in fp32; PICTURE_TOLERANCE is that of ONNX Runtime against PyTorch, sums in another order."""
    pytest.importorskip("openvino")
    embeds = Oracle(checkpoints).embeds("a")
    with load(bundle, threads=1) as k:
        expected = k.decoder(embeds, **SMALL)
    mixed = {"movq_decoder": "openvino", "decoder_context": "openvino"}
    with load(bundle, backend=mixed, options={"openvino": {OPTION: "1"}}, threads=1) as k:
        assert {name for name, choice in k.choices.items() if choice.backend == "openvino"} == set(mixed)
        compare_pictures(k.decoder(embeds, **SMALL).array, expected.array)


def test_auto_makes_pictures(bundle: Path, checkpoints: dict[str, Path]) -> None:
    """Whatever it chooses on the machine of this test."""
    embeds = Oracle(checkpoints).embeds("a")
    with load(bundle, backend="auto", threads=1) as k:
        found = k.decoder(embeds, **SMALL)
        assert all(choice.automatic and choice.reason for choice in k.choices.values())
        backend, device = k.choices["movq_decoder"].backend, k.choices["movq_decoder"].device
    with load(bundle, backend=backend, device=device, threads=1) as k:
        compare_pictures(found.array, k.decoder(embeds, **SMALL).array)


def test_sessions_that_are_given_need_no_backend(bundle: Path) -> None:
    names = open_bundle(bundle).manifest.components
    k = load(bundle, backend="abacus", sessions={name: Spy() for name in names})
    assert k.choices == {}
    with pytest.raises(InputError, match="found 'abacus'"):
        load(bundle, backend="abacus", sessions={name: Spy() for name in names if name != "movq_decoder"})


def test_a_given_session_gets_arrays_as_they_are_and_others_on_the_host(bundle: Path) -> None:
    class Far:
        """An array that is elsewhere."""

        def get(self) -> Any:
            return np.ones(3, np.float32)

    spy = Spy()
    made = Components(open_bundle(bundle), sessions={"prior_step": spy})
    far = Far()
    assert made.placed("prior_step", {"sample": far}) == (spy, {"sample": far})
    session, placed = made.placed("movq_decoder", {"latents": far})
    assert session is made["movq_decoder"]
    np.testing.assert_array_equal(placed["latents"], np.ones(3, np.float32))
    made.close()


def test_run_gives_what_the_session_gives(bundle: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    made = Components(open_bundle(bundle), threads=1)
    found = made.run("movq_decoder", latents=latents)
    np.testing.assert_array_equal(found["pixels"], component(bundle, "movq_decoder")(latents=latents)["pixels"])
    made.close()
    with pytest.raises(BackendError, match="was closed; load it again"):
        made.run("movq_decoder", latents=latents)


CHOICES = {
    name: Choice(name, backend, "cpu", "asked for")
    for name, backend in {"prior_step": "onnxruntime", "movq_decoder": "openvino"}.items()
}
ONE = {"prior_step": CHOICES["prior_step"]}


@pytest.mark.parametrize(
    ("choices", "options", "expected"),
    [
        (CHOICES, None, {"onnxruntime": {}, "openvino": {}}),
        (CHOICES, {}, {"onnxruntime": {}, "openvino": {}}),
        (CHOICES, {"openvino": {"A": "1"}}, {"onnxruntime": {}, "openvino": {"A": "1"}}),
        (ONE, {"A": "1"}, {"onnxruntime": {"A": "1"}}),
        (ONE, {"A": "1", "onnxruntime": {"B": "2"}}, {"onnxruntime": {"A": "1", "B": "2"}}),
        ({}, None, {}),
    ],
)
def test_options(choices: Any, options: Any, expected: Any) -> None:
    assert options_by_backend(options, choices) == expected


@pytest.mark.parametrize(
    ("choices", "options", "message"),
    [
        (
            CHOICES,
            {"A": "1"},
            r"options: A: say for which .* 'onnxruntime' and 'openvino': \{'onnxruntime': \{\.\.\.\}\}",
        ),
        (ONE, {"openvino": {"A": "1"}}, "no component runs on backend 'openvino'; those that run: 'onnxruntime'"),
        (ONE, {"A": 1, "B": "2"}, "options: expected texts by name, found A=1$"),
        (ONE, {"onnxruntime": {1: "2"}}, "options: expected texts by name, found 1='2'"),
        (ONE, "A=1", "options: expected a mapping, found 'A=1'"),
        ({}, {"A": "1"}, "options: A: say for which backend"),
    ],
)
def test_options_that_mean_nothing_are_refused(choices: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        options_by_backend(options, choices)


def test_an_option_that_the_library_does_not_know_is_not_ignored(bundle: Path) -> None:
    with load(bundle, options={"no_such_option": "1"}, threads=1) as k, pytest.raises((BackendError, InputError)):
        k.prior("a cat", steps=1)


def test_options_reach_the_library(bundle: Path) -> None:
    """As open_component passes them on."""
    pytest.importorskip("openvino")
    session = open_component(
        open_bundle(bundle), "prior_step", backend="openvino", device="cpu", threads=1, options={OPTION: "1"}
    )
    session.close()
