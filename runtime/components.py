"""The components of a bundle as sessions, opened when first used, each where it was chosen to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from ..engines.auto import Choice, choose
from ..engines.backends import open_component
from ..engines.bundle import Bundle
from ..engines.errors import BackendError, InputError, NumericalError
from ..engines.manifest import Precision
from ..engines.memory import check_fits
from ..engines.session import Array, Session
from .transfer import mover

Memory = Literal["keep", "stage"]


class Components:
    """Opens each component once; with memory "stage", closes those of a stage when the stage is over."""

    def __init__(
        self,
        bundle: Bundle,
        backend: str | Mapping[str, str] = "onnxruntime",
        device: str | Mapping[str, str] | None = None,
        *,
        precision: Precision | None = None,
        memory: Memory = "keep",
        threads: int | None = None,
        options: Mapping[str, str] | Mapping[str, Mapping[str, str]] | None = None,
        sessions: Mapping[str, Session] | None = None,
    ) -> None:
        """Arguments are those of `load`; `sessions` replace components, for which no backend need be there.

        Raises InputError or BackendError where a backend cannot be used.
        """
        if memory not in ("keep", "stage"):
            raise InputError(f"memory: expected 'keep' or 'stage', found {memory!r}")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads: expected a whole number of 1 or more, found {threads!r}")
        self.bundle = bundle
        self.precision: Precision = bundle.manifest.precision if precision is None else precision
        self._memory: Memory = memory
        self._threads = threads
        self._given = dict(sessions or {})
        unknown = sorted(self._given.keys() - bundle.manifest.components.keys())
        if unknown:
            known = ", ".join(bundle.manifest.components)
            raise InputError(f"sessions: the bundle has no component {', '.join(unknown)}; it has {known}")
        rest = [name for name in bundle.manifest.components if name not in self._given]
        self.choices: Mapping[str, Choice] = choose(bundle, rest, backend, device, precision)
        self._options = options_by_backend(options, self.choices)
        self._open: dict[str, Session] = {}
        self._closed = False

    @property
    def memory(self) -> Memory:
        """Whether components are kept open, or closed after their stage."""
        return self._memory

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

    def run(self, name: str, **arrays: Array) -> dict[str, Array]:
        """Call a component once, its inputs brought to where it computes; its outputs are left there."""
        session, placed = self.placed(name, arrays)
        return dict(session(**placed))

    def placed(self, name: str, arrays: Mapping[str, Array]) -> tuple[Session, dict[str, Array]]:
        """A component, and arrays brought to where it computes: those that are elsewhere are copied, once."""
        session = self[name]
        move = mover(session, self.choices[name].device if name in self.choices else None)
        return session, {key: move(array) for key, array in arrays.items()}

    def check_memory(self, *names: str) -> None:
        """Raise BackendError where those of components `names` that a CPU runs do not fit into its memory.

        With memory "keep" they have to fit together, and with what is open already.
        """
        stages = self._memory == "stage"
        held = dict.fromkeys([*(() if stages else self._open), *names])
        on_cpu = [name for name in held if name in self.choices and self.choices[name].device == "cpu"]
        check_fits(self.bundle.manifest, on_cpu, stages=stages)

    def _open_component(self, name: str) -> Session:
        choice = self.choices[name]
        return open_component(
            self.bundle,
            name,
            backend=choice.backend,
            device=choice.device,
            precision=self.precision,
            threads=self._threads,
            options=self._options.get(choice.backend, {}),
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


def options_by_backend(
    options: Mapping[str, str] | Mapping[str, Mapping[str, str]] | None, choices: Mapping[str, Choice]
) -> dict[str, dict[str, str]]:
    """Options by backend, which those of no backend in particular must be clear about.

    Raises InputError for options that are no strings, of a backend that runs nothing, or of several at once.
    """
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"options: expected a mapping, found {options!r}")
    odd = [repr(name) for name in options or () if not isinstance(name, str)]
    if odd:
        raise InputError(f"options: expected texts by name, found {', '.join(odd)}")
    used = list(dict.fromkeys(choice.backend for choice in choices.values()))
    given: dict[str, Any] = dict(options or {})
    nested: dict[str, dict[str, str]] = {
        name: dict(value) for name, value in given.items() if isinstance(value, Mapping)
    }
    flat: dict[str, str] = {name: value for name, value in given.items() if name not in nested}
    wrong = [f"{key}={value!r}" for each in (flat, *nested.values()) for key, value in each.items()
             if not isinstance(key, str) or not isinstance(value, str)]  # fmt: skip
    if wrong:
        raise InputError(f"options: expected texts by name, found {', '.join(wrong)}")
    unused = sorted(nested.keys() - set(used))
    if unused:
        raise InputError(
            f"options: no component runs on backend {', '.join(map(repr, unused))}; "
            f"those that run: {', '.join(map(repr, used)) or 'none'}"
        )
    if flat and len(used) != 1:
        raise InputError(
            f"options: {', '.join(flat)}: say for which backend, since components run on "
            f"{' and '.join(map(repr, used)) or 'none'}: {{{used[0] if used else 'onnxruntime'!r}: {{...}}}}"
        )
    return {name: {**flat, **nested.get(name, {})} for name in used}
