"""How much memory there is, and what is refused because it needs more."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from kandrt.engines import memory
from kandrt.engines.errors import BackendError
from kandrt.engines.manifest import Manifest
from kandrt.runtime.components import Components

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
    memory.check_fits(manifest, "decoder_step", [], stages=False)
    memory.check_fits(manifest, "movq_decoder", ["decoder_step"], stages=False)
    with pytest.raises(BackendError, match=r"decoder_context: .*8 GB.*\(decoder_step\) 24 GB.*20 GB.*stage.*16 GB"):
        memory.check_fits(manifest, "decoder_context", ["decoder_step"], stages=False)


@pytest.mark.parametrize("stages", [True, False])
def test_what_fits_nowhere_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: bool) -> None:
    manifest = bundle_of(tmp_path, decoder_step=9 * GB)
    monkeypatch.setattr(memory, "machine_memory", lambda: 20 * GB)
    with pytest.raises(BackendError, match=r"36 GB.*20 GB.*any memory mode.*GPU.*fp16 or bf16 takes 18 GB"):
        memory.check_fits(manifest, "decoder_step", [], stages=stages)


def test_a_component_is_refused_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_toy_bundle(tmp_path, "fp32")
    monkeypatch.setattr(memory, "machine_memory", lambda: 3000)
    with pytest.raises(BackendError, match="decoder_step: its weights take"):
        Components(bundle)["decoder_step"]


def test_where_nothing_tells_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: None)
    memory.check_fits(bundle_of(tmp_path, decoder_step=900 * GB), "decoder_step", [], stages=False)
