"""The one seam between the runtime and what runs a graph."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

from .spec import TensorSpec

# An array of any library that follows the Python array API: NumPy on a CPU, CuPy on a GPU.
Array: TypeAlias = Any


@runtime_checkable
class Session(Protocol):
    """A graph ready to run: called with its inputs by name, gives its outputs by name."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a call takes."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What a call gives."""
        ...

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run the graph once; arrays stay on the device they are on."""
        ...

    def close(self) -> None:
        """Free the graph's memory; calling it again does nothing."""
        ...
