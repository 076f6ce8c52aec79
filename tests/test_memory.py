"""How much memory there is, and what is refused because it needs more."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from kandrt.engines import memory
from kandrt.engines.bundle import open_bundle
from kandrt.engines.errors import BackendError
from kandrt.engines.manifest import Manifest
from kandrt.runtime import load

from .toy_bundle import make_toy_bundle


@pytest.mark.parametrize(("limit", "expected"), [("1000", 1000), ("max", None), (None, None)])
def test_memory_is_that_of_the_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str | None, expected: int | None
) -> None:
    file = tmp_path / "memory.max"
    if limit is not None:
        file.write_text(limit + "\n")
    monkeypatch.setattr(memory, "CGROUP_LIMIT", file)
    if not hasattr(os, "sysconf"):
        assert memory.machine_memory() is None
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert memory.machine_memory() == (expected or total)


GB = 10**9


def bundle_of(tmp_path: Path, **parameters: int) -> Manifest:
    """A toy bundle's manifest whose components claim numbers of parameters."""
    manifest = make_toy_bundle(tmp_path, "fp32").manifest
    sizes = dict.fromkeys(manifest.components, 0) | parameters
    return replace(manifest, components={n: replace(c, parameters=sizes[n]) for n, c in manifest.components.items()})


def test_weights_by_precision(tmp_path: Path) -> None:
    manifest = bundle_of(tmp_path, decoder_step=GB, decoder_context=GB)
    assert memory.weights_memory(manifest, ["decoder_step", "decoder_context"]) == 8 * GB
    assert memory.weights_memory(manifest, ["decoder_step"], "bf16") == 2 * GB


def test_what_fits_only_with_stages_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = bundle_of(tmp_path, decoder_step=4 * GB, decoder_context=2 * GB, movq_decoder=GB)
    monkeypatch.setattr(memory, "machine_memory", lambda: 20 * GB)
    memory.check_fits(manifest, ["decoder_step", "movq_decoder"], stages=False)
    memory.check_fits(manifest, ["decoder_step", "decoder_context", "movq_decoder"], stages=True)
    with pytest.raises(BackendError, match=r"decoder_step, decoder_context: .*24 GB together.*20 GB.*stage.*16 GB"):
        memory.check_fits(manifest, ["decoder_step", "decoder_context"], stages=False)


@pytest.mark.parametrize("stages", [True, False])
def test_what_fits_nowhere_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: bool) -> None:
    manifest = bundle_of(tmp_path, decoder_step=9 * GB)
    monkeypatch.setattr(memory, "machine_memory", lambda: 20 * GB)
    with pytest.raises(BackendError, match=r"decoder_step: .*36 GB.*20 GB.*any memory mode.*GPU.*fp16 or bf16.*18 GB"):
        memory.check_fits(manifest, ["movq_decoder", "decoder_step"], stages=stages)


@pytest.mark.parametrize("memory_mode", ["keep", "stage"])
def test_a_request_is_refused_before_any_network_runs(
    bundle_3: Path, monkeypatch: pytest.MonkeyPatch, memory_mode: Literal["keep", "stage"]
) -> None:
    """The encoder of prompts fits, what comes after it does not."""
    manifest = open_bundle(bundle_3).manifest
    largest = max(memory.weights_memory(manifest, [name]) for name in manifest.components)
    with load(bundle_3, memory=memory_mode) as k:
        monkeypatch.setattr(memory, "machine_memory", lambda: largest - 1)
        with pytest.raises(BackendError, match=r"decoder_step: its weights take .*any memory mode"):
            k("a fox", steps=1, height=64, width=64)
        assert k.opened == ()
        monkeypatch.setattr(memory, "machine_memory", lambda: largest)
        if memory_mode == "keep":
            with pytest.raises(BackendError, match=r"prompt_encoder, decoder_context, .*together.*--memory stage"):
                k("a fox", steps=1, height=64, width=64)
            assert k.opened == ()
        else:
            k("a fox", steps=1, height=64, width=64)


def test_states_made_elsewhere_are_advised_for_an_encoder_that_does_not_fit(
    bundle_3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = open_bundle(bundle_3).manifest
    components = {
        name: replace(each, parameters=9 * GB if name == "prompt_encoder" else each.parameters)
        for name, each in manifest.components.items()
    }
    monkeypatch.setattr(memory, "machine_memory", lambda: 20 * GB)
    with pytest.raises(BackendError, match=r"prompt_encoder: .*36 GB.*or give what it would say \(prompt_embeds\)"):
        memory.check_fits(replace(manifest, components=components), list(components), stages=True)


def test_where_nothing_tells_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: None)
    memory.check_fits(bundle_of(tmp_path, decoder_step=900 * GB), ["decoder_step"], stages=False)
