"""The one seam between the runtime and what runs a graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from .errors import BackendError, BundleError, KandrtError
from .manifest import Component
from .spec import TensorSpec, check_arrays

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


class ComponentSession(ABC):
    """A component of a bundle under an engine library: what is the same for every library.

    `library` names it in errors. A subclass puts the library's own object into `_session`.
    """

    library: ClassVar[str]

    def __init__(self, name: str, component: Component) -> None:
        self.name = name
        self._component = component
        self._session: Any = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a call takes."""
        return self._component.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What a call gives."""
        return self._component.outputs

    def check_specs(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """Raise BundleError unless the manifest says of its tensors what the graph does, names of axes apart."""
        for graph, specs in ((inputs, self.inputs), (outputs, self.outputs)):
            if set(map(fixed, graph)) != set(map(fixed, specs)):
                raise BundleError(
                    f"{self.name}: the manifest says {', '.join(map(str, specs))}, "
                    f"the graph has {', '.join(map(str, graph))}; export the bundle again"
                )

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run the graph once.

        Raises InputError for arrays that do not fit the inputs, BackendError where the library fails, out of memory
        included.
        """
        if self._session is None:
            raise BackendError(f"{self.name}: the session is closed; load the bundle again")
        axes = check_arrays(self.name, self.inputs, arrays)
        try:
            return self._run(arrays)
        except KandrtError:
            raise
        except Exception as error:  # engine libraries' exceptions share no base class
            sizes = ", ".join(f"{axis} {length}" for axis, length in axes.items())
            raise BackendError(f"{self.name}: {self.library} failed at {sizes}: {error}") from error

    @abstractmethod
    def _run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph on arrays that fit its inputs."""

    def close(self) -> None:
        """Free the graph's memory; calling it again does nothing."""
        self._session = None


def fixed(spec: TensorSpec) -> tuple[str, str, tuple[int | None, ...]]:
    """Name, type and shape of a tensor, its dynamic axes without their names: those are the library's to change."""
    return spec.name, spec.dtype, tuple(axis if isinstance(axis, int) else None for axis in spec.shape)
