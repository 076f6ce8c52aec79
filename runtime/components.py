"""The components of a bundle as sessions, opened when first used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from ..engines.backends import check_backend, open_component
from ..engines.bundle import Bundle
from ..engines.errors import BackendError, InputError, NumericalError
from ..engines.manifest import Precision
from ..engines.session import Session

Memory = Literal["keep", "stage"]


class Components:
    """Opens each component once; with memory "stage", closes those of a stage when the stage is over."""

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        device: str,
        *,
        precision: Precision | None = None,
        memory: Memory = "keep",
        threads: int | None = None,
        sessions: Mapping[str, Session] | None = None,
    ) -> None:
        """`precision` None is that of the bundle; `sessions` replace components, and then `backend` may be absent.

        Raises InputError or BackendError where the backend cannot be used.
        """
        if memory not in ("keep", "stage"):
            raise InputError(f"memory: expected 'keep' or 'stage', found {memory!r}")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads: expected a whole number of 1 or more, found {threads!r}")
        self.bundle, self.backend, self.device = bundle, backend, device
        self.precision: Precision = bundle.manifest.precision if precision is None else precision
        self._memory, self._threads = memory, threads
        self._given = dict(sessions or {})
        unknown = sorted(self._given.keys() - bundle.manifest.components.keys())
        if unknown:
            known = ", ".join(bundle.manifest.components)
            raise InputError(f"sessions: the bundle has no component {', '.join(unknown)}; it has {known}")
        self._open: dict[str, Session] = {}
        self._closed = False
        if not self._given.keys() >= bundle.manifest.components.keys():
            check_backend(backend, device, bundle.manifest.precision, precision)

    @property
    def opened(self) -> tuple[str, ...]:
        """Names of the components that are open."""
        return tuple(self._open)

    def __getitem__(self, name: str) -> Session:
        """The session of a component, opened if it is not."""
        if self._closed:
            raise BackendError(f"{self.bundle.folder} was closed; load it again")
        if name not in self._open:
            given = self._given.get(name)
            self._open[name] = given if given is not None else self._open_component(name)
        return self._open[name]

    def _open_component(self, name: str) -> Session:
        return open_component(
            self.bundle,
            name,
            backend=self.backend,
            device=self.device,
            precision=self.precision,
            threads=self._threads,
        )

    @contextmanager
    def stage(self, name: str, *components: str) -> Iterator[None]:
        """Name the network in errors, and with memory "stage" close `components` at the end."""
        try:
            yield
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from error
        finally:
            if self._memory == "stage":
                for component in components:
                    self._release(component)

    def _release(self, name: str) -> None:
        session = self._open.pop(name, None)
        if session is not None and name not in self._given:
            session.close()

    def close(self) -> None:
        """Close everything."""
        self._closed = True
        for name in list(self._open):
            self._release(name)
