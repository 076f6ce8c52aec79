"""Tensors by name, type and shape: one description for export, engines, manifest and run-time checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import InputError

DType = Literal["bool", "int32", "int64", "float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output; a str in `shape` names a dynamic axis, equal names are equal lengths."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"


def check_arrays(component: str, specs: Sequence[TensorSpec], arrays: Mapping[str, Any]) -> dict[str, int]:
    """Check names, dtypes and shapes of `arrays` against `specs`; give the length of each dynamic axis.

    Raises InputError that lists every disagreement at once.
    """
    wanted = {spec.name: spec for spec in specs}
    problems = [f"missing input {name!r}" for name in wanted.keys() - arrays.keys()]
    problems += [f"unexpected input {name!r}" for name in arrays.keys() - wanted.keys()]
    axes: dict[str, int] = {}
    for name in sorted(wanted.keys() & arrays.keys()):
        problems += disagreement(wanted[name], arrays[name], axes)
    if problems:
        raise InputError(f"{component}: " + "; ".join(sorted(problems)))
    return axes


def disagreement(spec: TensorSpec, array: Any, axes: dict[str, int]) -> list[str]:
    """What of an array is not as specified, if anything; new dynamic axes are added to `axes` with their lengths."""
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        return [f"expected {spec}, found {type(array).__name__}"]
    dtype = str(array.dtype)
    if dtype.rpartition(".")[2] != spec.dtype or len(array.shape) != len(spec.shape):
        return [f"expected {spec}, found {dtype}{list(array.shape)}"]
    wrong: dict[int | str, int] = {}
    for axis, length in zip(spec.shape, array.shape, strict=True):
        expected = axes.setdefault(axis, length) if isinstance(axis, str) else axis
        if length != expected:
            wrong[axis] = expected
    if not wrong:
        return []
    others = ", ".join(f"{axis} = {expected}" for axis, expected in wrong.items() if isinstance(axis, str))
    return [f"expected {spec}{' with ' + others if others else ''}, found {dtype}{list(array.shape)}"]
