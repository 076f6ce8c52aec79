"""What OpenVINO compiles is kept in the bundle where that is asked for, and is found again for the same graph alone."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from kandrt.engines.backends import open_component
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.caches import cache_folder
from kandrt.engines.errors import BackendError, InputError
from kandrt.engines.openvino import OpenVinoSession, core_version
from kandrt.engines.request import Request

if find_spec("openvino") is None:  # not importorskip: a plain import reports to OpenVINO's makers
    pytest.skip("openvino is not installed", allow_module_level=True)

NAME = "prior_step"


@pytest.fixture
def own(spare_bundle: Path, tmp_path: Path) -> Bundle:
    """A bundle that may be written to."""
    return open_bundle(shutil.copytree(spare_bundle, tmp_path / "bundle"))


def opened(bundle: Bundle, **options: str) -> OpenVinoSession:
    session = open_component(bundle, NAME, backend="openvino", device="cpu", threads=1, options=options)
    assert isinstance(session, OpenVinoSession)
    return session


def from_cache(session: OpenVinoSession) -> bool:
    return all(part.get_property("LOADED_FROM_CACHE") for part in session._compiled)


def outputs(session: OpenVinoSession) -> np.ndarray:
    lengths = {"batch": 2}
    rng = np.random.default_rng(0)
    arrays = {
        spec.name: rng.standard_normal(
            [axis if isinstance(axis, int) else lengths[axis] for axis in spec.shape], np.float32
        )
        for spec in session.inputs
    }
    return session(**arrays)["prediction"]


def test_a_network_is_compiled_once(own: Bundle) -> None:
    with closing(opened(own)) as plain:
        expected = outputs(plain)
    assert not (own.folder / "engines").exists()  # unasked nothing is written into a bundle
    with closing(opened(own, cache="on")) as first:
        assert not from_cache(first)
    with closing(opened(own, cache="on")) as second:
        assert from_cache(second)
        np.testing.assert_array_equal(outputs(second), expected)
    with closing(opened(own, cache="off")) as third:
        assert not from_cache(third)
    open_bundle(own.folder).check_hashes()  # the bundle is what it was


def test_another_graph_or_library_has_another_folder(own: Bundle) -> None:
    def folder(bundle: Bundle, version: str = "1") -> Path:
        return cache_folder(Request(bundle, NAME, "openvino", "cpu", "fp32"), version)

    component = own.manifest.components[NAME]
    graph = replace(component, graph=replace(component.graph, sha256="0" * 64))
    weights = {name: replace(record, sha256="1" * 64) for name, record in own.manifest.weights.items()}
    others = [
        replace(own, manifest=replace(own.manifest, components={**own.manifest.components, NAME: graph})),
        replace(own, manifest=replace(own.manifest, weights=weights)),
    ]
    folders = {folder(own), folder(own, "2"), *(folder(other) for other in others)}
    assert len(folders) == 4
    assert all(each.is_relative_to(own.folder / "engines" / "caches") for each in folders)
    assert core_version().count(".") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "yes"}, "option cache: expected 'on' or 'off', found 'yes'"),
        ({"INFERENCE_PRECISION_HINT": "bf16"}, "INFERENCE_PRECISION_HINT: give precision instead"),
        ({"INFERENCE_NUM_THREADS": "1"}, "INFERENCE_NUM_THREADS: give threads instead"),
    ],
)
def test_options_that_other_arguments_set_are_refused(own: Bundle, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(own, **options)


def test_properties_that_openvino_does_not_have_are_refused(own: Bundle) -> None:
    with pytest.raises(BackendError, match="Unsupported property PAINT_FASTER"):
        opened(own, PAINT_FASTER="yes")


def test_properties_reach_openvino(own: Bundle) -> None:
    for mode in ("ACCURACY", "PERFORMANCE"):
        with closing(opened(own, EXECUTION_MODE_HINT=mode)) as session:
            assert all(mode in str(part.get_property("EXECUTION_MODE_HINT")) for part in session._compiled)
