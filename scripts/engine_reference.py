"""What `kandrt verify --engines` compares with: a bundle's graphs in fp32 under ONNX Runtime, on real requests."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..engines.errors import BackendError, KandrtError, MissingExtraError
from ..engines.memory import gigabytes, machine_memory, weights_memory
from .reference import (
    NEGATIVE_PROMPT,
    PRIOR_STEPS,
    PROMPT,
    SEED,
    STEPS,
    conditions,
    drawn_embeds,
    inputs,
    paints_prompts,
    picture_embeds,
    picture_requests,
    request_names,
    rows,
    text_embeds,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from ..engines.bundle import Bundle
    from ..engines.manifest import Manifest, Precision, Role
    from ..engines.session import Array, Session
    from ..engines.spec import TensorSpec
    from ..runtime import Embeds, Kandinsky

    Arrays = Mapping[str, NDArray[Any]]
    Float32 = NDArray[np.float32]

Size: TypeAlias = tuple[int, int]  # height and width in pixels
Report: TypeAlias = Callable[[str], None]

RESIDENT = 2_000_000_000  # bytes of weights that may be open at once
RANDOM, WHOLE = "random inputs", "prompt to picture"  # what calls are of, beside the requests of reference.py


@dataclass(frozen=True, eq=False)
class Call:
    """What a component was given in a request, and what it gave."""

    request: str
    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True, eq=False)
class Answers:
    """What the reference gave: answers and calls; `problems` says why a request has none, or a component no calls.

    Answers are pictures float32 [1, H, W, 3] in [0, 1], or embeddings float32 [2, D]; calls are by component, of each
    request the first, the middle and the last one.
    """

    answers: Mapping[str, Float32]
    calls: Mapping[str, Sequence[Call]]
    problems: Mapping[str, str]


@dataclass
class Recorder:
    """A component as a session of a pipeline: runs the reference, and keeps what it was given and gave."""

    name: str
    references: References

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a call takes."""
        return self.references.bundle.manifest.components[self.name].inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What a call gives."""
        return self.references.bundle.manifest.components[self.name].outputs

    def __call__(self, **arrays: Any) -> dict[str, Any]:
        """Run the graph once."""
        return self.references.run(self.name, arrays)

    def close(self) -> None:
        """Nothing: `References` closes what is open."""


@dataclass
class References:
    """The components of a bundle in fp32, each opened when it is first used; large ones make room for each other."""

    bundle: Bundle
    calls: dict[str, list[Call]] = field(default_factory=dict)
    _open: dict[str, tuple[Session, ExitStack]] = field(default_factory=dict)
    _request: dict[str, list[Call]] = field(default_factory=dict)

    def sessions(self) -> dict[str, Recorder]:
        """Every component, for `load`."""
        return {name: Recorder(name, self) for name in self.bundle.manifest.components}

    def run(self, name: str, arrays: Arrays) -> dict[str, Any]:
        """Call a component, and note it."""
        outputs = self._session(name)(**arrays)
        kept = [{key: array.copy() for key, array in each.items()} for each in (arrays, outputs)]
        self._request.setdefault(name, []).append(Call("", kept[0], kept[1]))
        return outputs

    def finish(self, request: str) -> None:
        """Keep of each component's calls the first, the middle and the last."""
        for name, calls in self._request.items():
            chosen = sorted({0, len(calls) // 2, len(calls) - 1})
            self.calls.setdefault(name, []).extend(replace(calls[i], request=request) for i in chosen)
        self._request.clear()

    def _session(self, name: str) -> Session:
        if name not in self._open:
            components = self.bundle.manifest.components
            while self._open and 4 * sum(components[each].parameters for each in (name, *self._open)) > RESIDENT:
                self._open.pop(next(iter(self._open)))[1].close()
            stack = ExitStack()
            self._open[name] = stack.enter_context(reference_session(self.bundle, name)), stack
        return self._open[name][0]

    def __enter__(self) -> References:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            self._open.popitem()[1][1].close()


@dataclass(frozen=True)
class OnHost:
    """A session whose outputs are NumPy arrays wherever they were computed."""

    session: Session

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a call takes."""
        return self.session.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What a call gives."""
        return self.session.outputs

    def __call__(self, **arrays: Array) -> dict[str, NDArray[np.float32]]:
        """Run the graph once."""
        from ..runtime.transfer import to_host

        return {name: to_host(array) for name, array in self.session(**arrays).items()}

    def close(self) -> None:
        """Close the session."""
        self.session.close()


@contextmanager
def reference_session(bundle: Bundle, name: str) -> Iterator[Session]:
    """A component in fp32 under ONNX Runtime on the CPU, with its weights as they are stored.

    Raises BackendError where its weights in fp32 exceed this machine, and where it cannot be converted to fp32.
    """
    needed, limit = weights_memory(bundle.manifest, [name], "fp32"), machine_memory()
    if limit is not None and needed > limit:
        raise BackendError(
            f"{name}: its weights in fp32 take {gigabytes(needed)}, and this machine has {gigabytes(limit)}; "
            "verify it on a machine with more"
        )
    with tempfile.TemporaryDirectory() as folder:
        if bundle.manifest.precision != "fp32":
            bundle = widened(bundle, name, Path(folder))
        session = open_reference(bundle, name)
        try:
            yield session
        finally:
            session.close()


def open_reference(bundle: Bundle, name: str) -> Session:
    """A component of an fp32 bundle under ONNX Runtime on the CPU."""
    from ..engines.backends import open_component

    return open_component(bundle, name, backend="onnxruntime", device="cpu")


def widened(bundle: Bundle, name: str, folder: Path) -> Bundle:
    """A bundle in `folder` of which one component is there, its graph and weights in fp32."""
    need_onnx(f"the reference in fp32 of a bundle exported in {bundle.manifest.precision}")
    from ..export.probes import widen

    target = folder / "widened.onnx"
    try:
        widen(bundle.path(bundle.manifest.components[name].graph), target)
    except Exception as error:  # those of a damaged graph, or a full disk, have no base class in common
        raise BackendError(f"{name}: the graph cannot be converted to fp32: {error}") from error
    return stand_in(bundle, name, target, precision="fp32")


def stand_in(
    bundle: Bundle, name: str, graph: Path, *, outputs: Sequence[TensorSpec] = (), precision: Precision | None = None
) -> Bundle:
    """A bundle in the folder of `graph`, which is a component's with `outputs` more; in `precision` if that is given.

    Of the bundle's files, none but those that lie there can be used.
    """
    from ..engines.bundle import Bundle
    from ..engines.hashing import sha256_file
    from ..engines.manifest import FileRecord

    manifest, component = bundle.manifest, bundle.manifest.components[name]
    record = FileRecord(graph.name, graph.stat().st_size, sha256_file(graph))
    changed = replace(component, graph=record, outputs=(*component.outputs, *outputs))
    if precision is not None:
        manifest, changed = replace(manifest, precision=precision), replace(changed, precision=precision)
    return Bundle(graph.parent, replace(manifest, components={**manifest.components, name: changed}))


def need_onnx(feature: str) -> None:
    """Raise MissingExtraError where graphs cannot be edited."""
    if find_spec("onnx_ir") is None:
        raise MissingExtraError(feature, "onnx-ir", "export")


# The requests


def reference_answers(bundle: Bundle, size: Size, report: Report) -> Answers:
    """Run every request that the bundle can be asked, at `size`, on the reference; `report` is told each.

    Components that no request reaches are given random inputs. Raises MissingExtraError where graphs have to be
    converted to fp32 and cannot be.
    """
    from ..runtime import load

    answers: dict[str, Float32] = {}
    problems: dict[str, str] = {}
    with References(bundle) as references, load(bundle.folder, sessions=references.sessions()) as k:
        for name, run in engine_requests(k, size, answers).items():
            report(f"reference: {name}")
            try:
                answers[name] = run()
            except MissingExtraError:
                raise
            except KandrtError as error:
                problems[name] = f"the reference in fp32: {error}"
            references.finish(name)
        for name in bundle.manifest.components.keys() - references.calls.keys():
            report(f"reference: {name}")
            try:
                references.run(name, drawn_inputs(bundle, name, size))
            except KandrtError as error:
                problems[name] = f"no request reaches it, and with {RANDOM}: {error}"
            references.finish(RANDOM)
        return Answers(answers, references.calls, problems)


def engine_request_names(manifest: Manifest) -> list[str]:
    """What `engine_requests` asks of a bundle."""
    whole = [WHOLE] if manifest.prior is not None and paints_prompts(manifest) else []
    return [*request_names(manifest), *whole]


def engine_requests(k: Kandinsky, size: Size, answers: Mapping[str, Float32]) -> dict[str, Callable[[], Float32]]:
    """The requests by name, for pictures of a size.

    Decoders are given the embeddings that the prior made in `answers`, by when they run: under an engine too those of
    the reference, so that their pictures tell of them alone. WHOLE goes all the way from the prompt; where there is no
    prior on that way, text-to-image does.
    """

    def embeds(dim: int) -> Embeds:
        from ..runtime import Embeds

        return Embeds(answers["prior"][:1], answers["prior"][1:]) if "prior" in answers else drawn_embeds(dim)

    def picture(role: Role, names: tuple[str, ...]) -> Float32:
        given = {name: value for name, value in inputs(*size).items() if name in names}
        given |= conditions(k.manifest.decoders[role], embeds)
        return k.decoder(**given, height=size[0], width=size[1], steps=STEPS, seed=SEED).array

    def whole() -> Float32:
        return k(
            PROMPT, negative_prompt=NEGATIVE_PROMPT, height=size[0], width=size[1], steps=STEPS,
            prior_steps=PRIOR_STEPS, seed=SEED,
        ).array  # fmt: skip

    made: dict[str, Callable[[], Float32]] = {
        "prior": lambda: rows(text_embeds(k)), "prior from picture": lambda: rows(picture_embeds(k)), WHOLE: whole,
    }  # fmt: skip
    for name, (role, names) in picture_requests(k.manifest).items():
        made[name] = lambda role=role, names=names: picture(role, names)  # type: ignore[misc]
    return {name: made[name] for name in engine_request_names(k.manifest)}


def drawn_inputs(bundle: Bundle, name: str, size: Size) -> Arrays:
    """Random inputs of a component, for pictures of a size."""
    need_onnx(f"{name}: drawing its inputs")
    from ..engines.profiles import latent_scale
    from ..export.check import random_inputs

    scale = latent_scale(bundle.manifest)
    lengths = {
        "height": size[0] // scale, "width": size[1] // scale, "image_height": size[0], "image_width": size[1],
    }  # fmt: skip
    return random_inputs(bundle.manifest.components[name].inputs, lengths)
