"""Tensor specs, and the check of arrays against them."""

from __future__ import annotations

import re
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch

from kandrt.engines.errors import InputError
from kandrt.engines.spec import TensorSpec, check_arrays

SAMPLE = TensorSpec("sample", "float32", ("batch", 4, "height", "width"))
EMBEDDING = TensorSpec("embedding", "float32", ("batch", 128))
IDS = TensorSpec("ids", "int64", ("batch", 77))


def test_a_spec_reads_like_a_declaration() -> None:
    assert str(SAMPLE) == "sample float32[batch, 4, height, width]"
    assert str(TensorSpec("flag", "bool", ())) == "flag bool[]"


def test_arrays_that_fit_give_the_lengths_of_the_dynamic_axes() -> None:
    sample, embedding = np.zeros((2, 4, 8, 16), np.float32), np.zeros((2, 128), np.float32)
    axes = check_arrays("unet", [SAMPLE, EMBEDDING], {"embedding": embedding, "sample": sample})
    assert axes == {"batch": 2, "height": 8, "width": 16}
    assert check_arrays("nothing", [], {}) == {}


@pytest.mark.parametrize("dtype", ["bool", "int32", "int64", "float16", "bfloat16", "float32"])
def test_types_of_other_libraries_are_known_by_their_names(dtype: Any) -> None:
    arrays: list[Any] = [torch.zeros(3, dtype=getattr(torch, dtype))]
    if dtype not in ("float16", "bfloat16"):
        arrays.append(array_api_strict.zeros(3, dtype=getattr(array_api_strict, dtype)))
    if dtype != "bfloat16":
        arrays.append(np.zeros(3, dtype))
    for array in arrays:
        assert check_arrays("x", [TensorSpec("a", dtype, ("n",))], {"a": array}) == {"n": 3}
        with pytest.raises(InputError, match="expected a int8"):
            check_arrays("x", [TensorSpec("a", "int8", ("n",))], {"a": array})  # type: ignore[arg-type]


BAD: dict[str, tuple[Any, str]] = {
    "rank": (
        np.zeros((2, 4, 8), np.float32),
        "expected sample float32[batch, 4, height, width], found float32[2, 4, 8]",
    ),
    "type": (np.zeros((2, 4, 8, 8)), "expected sample float32[batch, 4, height, width], found float64[2, 4, 8, 8]"),
    "byte order": (np.zeros((2, 4, 8, 8), ">f4"), "found >f4[2, 4, 8, 8]"),
    "fixed axis": (np.zeros((2, 5, 8, 8), np.float32), "[batch, 4, height, width], found float32[2, 5, 8, 8]"),
    "list": ([[1.0]], "expected sample float32[batch, 4, height, width], found list"),
    "None": (None, "found NoneType"),
    "number": (1.0, "found float"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_array_that_does_not_fit_is_refused(kind: str) -> None:
    array, message = BAD[kind]
    with pytest.raises(InputError, match=re.escape(message)):
        check_arrays("unet", [SAMPLE], {"sample": array})


def test_one_axis_has_one_length_in_all_arrays() -> None:
    arrays = {"embedding": np.zeros((2, 128), np.float32), "sample": np.zeros((3, 4, 8, 8), np.float32)}
    with pytest.raises(InputError) as caught:
        check_arrays("unet", [SAMPLE, EMBEDDING], arrays)
    assert str(caught.value) == (
        "unet: expected sample float32[batch, 4, height, width] with batch = 2, found float32[3, 4, 8, 8]"
    )


def test_one_axis_has_one_length_within_an_array() -> None:
    square = TensorSpec("square", "float32", ("n", "n"))
    assert check_arrays("x", [square], {"square": np.zeros((3, 3), np.float32)}) == {"n": 3}
    with pytest.raises(InputError, match=r"with n = 3, found float32\[3, 4\]"):
        check_arrays("x", [square], {"square": np.zeros((3, 4), np.float32)})


def test_every_disagreement_is_listed_at_once() -> None:
    arrays = {"sample": np.zeros((3, 5, 8, 8)), "ids": np.zeros((2, 76), np.int64), "prompt": "a robot", "other": None}
    with pytest.raises(InputError) as caught:
        check_arrays("unet", [SAMPLE, EMBEDDING, IDS], arrays)
    message = str(caught.value)
    assert message.startswith("unet: ")
    for part in (
        "missing input 'embedding'",
        "unexpected input 'other'",
        "unexpected input 'prompt'",
        "expected ids int64[batch, 77], found int64[2, 76]",
        "expected sample float32[batch, 4, height, width], found float64[3, 5, 8, 8]",
    ):
        assert part in message
    assert message.count(";") == 4
