"""kandrt as a contender: the runtime as `load` opens it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...engines.bundle import open_bundle
from ...engines.session import Array, Session
from ...runtime.components import Components
from ...runtime.embeds import Embeds
from ...runtime.images import to_array
from ...runtime.pipeline import Kandinsky
from ...runtime.transfer import to_host
from .cases import Inputs, SeededNoise, components_of
from .contenders import OPTION
from .device_clock import CupyEvents, DeviceClock
from .worker import Job, Subject


def subject(job: Job) -> Subject:
    """kandrt in a case."""
    return KandrtSubject(job)


class KandrtSubject:
    """A case under one of kandrt's backends, by the setting "backend", in the precision of the setting of that name."""

    def __init__(self, job: Job) -> None:
        self._job, self.case = job, job.case
        self.stages: dict[str, float] = {}
        self.clock = device_clock() if job.settings.get("device") == "cuda" else None
        own_stream = job.settings.get("backend", "onnxruntime") == "onnxruntime"
        self.times_device = not own_stream and job.case.stage in ("step", "movq")
        self._result: dict[str, NDArray[Any]] = {}
        self._inputs: Inputs = {}
        self._step: tuple[Session, dict[str, Array]] | None = None
        self._network: TimedSession | None = None
        self._marks: list[tuple[str, float]] = []

    def open(self, inputs: Inputs) -> None:
        """Open the components that the case runs, and work out a step's context."""
        settings: dict[str, Any] = {"threads": self._job.threads, **self._job.settings}
        settings["options"] = {
            name.removeprefix(OPTION): settings.pop(name) for name in list(settings) if name.startswith(OPTION)
        }
        self._inputs, bundle = inputs, open_bundle(Path(self._job.bundle))
        self._components = Components(bundle, **settings)
        if self.case.runs_decoder and self.clock is None and settings.get("memory") != "stage":
            name = bundle.manifest.decoders[self.case.role].step
            self._network = TimedSession(self._components[name])
            self._components = Components(bundle, sessions={name: self._network}, **settings)
        self._k = Kandinsky(self._components)
        if settings.get("memory") != "stage":
            for name in components_of(self.case, self._k.manifest):
                self._components[name]
        if self.case.stage == "step":
            self._prepare_step()

    def prepare(self) -> None:
        """Forget the empty prompt's part where the case wants each run to be a first one."""
        if not self.case.keeps:
            self._k.prior.forget()

    def run(self) -> None:
        """What is timed."""
        if self.case.opens:
            return
        self._marks, start = [], time.perf_counter()
        if self._network is not None:
            self._network.calls = []
        RUNS[self.case.stage](self)
        if self._marks:
            self.stages = parts(start, self._marks, time.perf_counter())
        if self._network is not None:
            self.stages["host"] = between(self._network.calls)
            self.stages["decoder"] -= self.stages["host"]

    def result(self) -> Mapping[str, NDArray[Any]]:
        """What the last run gave."""
        return self._result

    def _prepare_step(self) -> None:
        record = self._k.manifest.decoders[self.case.role]
        given = {name.removeprefix("context."): a for name, a in self._inputs.items() if name.startswith("context.")}
        context = self._components.run(record.context, **given)
        context["embedding"] = context["embedding"][0, ...]
        sample = np.concatenate([self._inputs["sample"]] * 2)
        if context["embedding"].ndim == 1:  # shared by all rows
            context["embedding"] = np.tile(to_host(context["embedding"]), (len(sample), 1))
        self._step = self._components.placed(record.step, {"sample": sample, **context})

    def _run_step(self) -> None:
        if self._step is not None:
            session, inputs = self._step
            self._result = {"prediction": to_host(session(**inputs)["prediction"])}

    def _run_movq(self) -> None:
        name = self._k.manifest.decoders[self.case.role].movq_decoder
        rows = [self._components.run(name, latents=row[None])["pixels"] for row in self._inputs["latents"]]
        self._result = {"picture": np.concatenate([to_array(to_host(row)) for row in rows])}

    def _run_prior(self) -> None:
        case = self.case
        embeds = self._k.prior(
            list(case.prompts), steps=case.prior_steps, guidance_scale=case.prior_guidance_scale,
            noise=SeededNoise(case.seed),
        )  # fmt: skip
        self._result = {"image_embeds": embeds.image_embeds}

    def _run_text_to_image(self) -> None:
        case = self.case
        prior: dict[str, Any] = {"prior_steps": case.prior_steps, "prior_guidance_scale": case.prior_guidance_scale}
        has_prior = (
            self._k.manifest.prior is not None and self._k.manifest.decoders["decoder"].embedding_dim is not None
        )
        self._keep(self._k(list(case.prompts), **(prior if has_prior else {}), **self._shared()).array)

    def _run_decoder(self) -> None:
        """What begins with an embedding."""
        record, case = self._k.manifest.decoders[self.case.role], self.case
        told: dict[str, Any] = {} if record.prompt is None else {"prompt": list(case.prompts)}
        if "image_embeds" in self._inputs:
            told["embeds"] = Embeds(self._inputs["image_embeds"], self._inputs["negative_image_embeds"])
        if "image" in self._inputs:
            told |= {"image": [Image.fromarray(self._inputs["image"])] * case.batch, "strength": case.strength}
        if "hint" in self._inputs:
            told["hint"] = self._inputs["hint"]
        self._keep(self._k.decoder(**told, **self._shared()).array)

    def _shared(self) -> dict[str, Any]:
        case = self.case
        return {
            "height": case.height, "width": case.width, "steps": case.steps, "guidance_scale": case.guidance_scale,
            "noise": SeededNoise(case.seed), "callback": self._mark,
        }  # fmt: skip

    def _mark(self, stage: str, done: int, steps: int, _: Array) -> None:
        if done == steps:
            self._marks.append((stage, time.perf_counter()))

    def _keep(self, picture: NDArray[np.float32]) -> None:
        self._result = {"picture": picture}


class TimedSession:
    """A session that notes from when to when each of its calls ran, in seconds of `time.perf_counter`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.inputs, self.outputs, self.close = session.inputs, session.outputs, session.close
        self.calls: list[tuple[float, float]] = []

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run it once."""
        start = time.perf_counter()
        outputs = self._session(**arrays)
        self.calls.append((start, time.perf_counter()))
        return outputs


RUNS: Mapping[str, Callable[[KandrtSubject], None]] = {
    "prior": KandrtSubject._run_prior,
    "step": KandrtSubject._run_step,
    "movq": KandrtSubject._run_movq,
    "text-to-image": KandrtSubject._run_text_to_image,
    "embedding-to-image": KandrtSubject._run_decoder,
    "image-to-image": KandrtSubject._run_decoder,
    "controlnet": KandrtSubject._run_decoder,
}


def device_clock() -> DeviceClock:
    """Of the GPU."""
    from ...engines.cuda import library

    return DeviceClock(CupyEvents(library()))


def between(calls: Sequence[tuple[float, float]]) -> float:
    """Seconds between the calls of a loop's network: what the loop costs beside it."""
    return sum(after - end for (_, end), (after, _) in pairwise(calls))


def parts(start: float, marks: list[tuple[str, float]], end: float) -> dict[str, float]:
    """Seconds of "prior", "decoder" (its steps and all before them) and "movq", from when each was over."""
    seconds = {}
    for name, mark in marks:
        seconds[name], start = mark - start, mark
    return {**seconds, "movq": end - start}
