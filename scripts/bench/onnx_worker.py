"""Plain ONNX as a contender: diffusers' own UNet and MoVQ through torch.onnx.export, undivided, under ONNX Runtime."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import InputError
from ...engines.files import atomic_write
from ...engines.providers import import_quietly
from .cases import Inputs
from .device_clock import DeviceClock
from .diffusers_worker import FAMILIES, load_options, step_arguments
from .sources import Part
from .worker import Job, Subject

DONE = "done"


def subject(job: Job) -> Subject:
    """Plain ONNX in a case."""
    return OnnxSubject(job)


class OnnxSubject:
    """A step or MoVQ's decoder, exported for the case's sizes the first time, which opening includes."""

    def __init__(self, job: Job) -> None:
        self._job, self.case = job, job.case
        self.stages: dict[str, float] = {}
        self.clock: DeviceClock | None = None
        self.times_device = False
        self._outputs: list[Any] = []
        self._session: Any = None
        self._arrays: dict[str, NDArray[Any]] = {}

    def open(self, inputs: Inputs) -> None:
        """Export the network, if that was not done before, and open it."""
        step = self.case.stage == "step"
        self._arrays = step_arrays(inputs) if step else {"latents": inputs["latents"]}
        path = self._exported()
        ort = import_quietly()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._job.threads
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [each.name for each in self._session.get_inputs()]
        self._arrays = {name: self._arrays[name] for name in names}  # what the export found unused is not an input

    def prepare(self) -> None:
        """Nothing."""

    def run(self) -> None:
        """What is timed."""
        self._outputs = self._session.run(None, self._arrays)

    def result(self) -> Mapping[str, NDArray[Any]]:
        """What the last run gave."""
        (output,) = self._outputs
        if self.case.stage == "step":
            return {"prediction": output}
        return {"picture": (output.transpose(0, 2, 3, 1) * np.float32(0.5) + np.float32(0.5)).clip(0, 1)}

    def _exported(self) -> Path:
        """The graph, in a folder of its own below the scratch folder: of one network and one size."""
        part: Part = self.case.role
        source = self._job.sources.get(part)
        if source is None:
            raise InputError(f"no checkpoint of the {part}; give --checkpoint FOLDER")
        shapes = sorted((name, array.shape) for name, array in self._arrays.items())
        told = repr((source, self._job.family, self.case.stage, shapes))
        folder = Path(self._job.scratch) / f"onnx-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        graph = folder / "graph.onnx"
        if not (folder / DONE).exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._export(source.folder, load_options(source), graph)
            with atomic_write(folder / DONE):
                pass
        return graph

    def _export(self, folder: str, options: dict[str, Any], graph: Path) -> None:
        import diffusers
        import torch

        torch.set_num_threads(self._job.threads)
        step, family = self.case.stage == "step", self._job.family
        name, subfolder = (FAMILIES[family].unet, "unet") if step else ("VQModel", "movq")
        network: Any = getattr(diffusers, name).from_pretrained(
            folder, subfolder=subfolder, torch_dtype=torch.float32, **options
        )
        names = list(self._arrays)

        class Plain(torch.nn.Module):  # type: ignore[misc, unused-ignore]
            """The network with tensors as its only inputs."""

            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, *tensors: Any) -> Any:
                given = dict(zip(names, tensors, strict=True))
                if not step:
                    return self.network.decode(given["latents"], force_not_quantize=True, return_dict=False)[0]
                sample, timestep = given.pop("sample"), given.pop("timestep")
                told = step_arguments(family, given)
                return self.network(sample, timestep, **told, return_dict=False)[0]

        tensors = tuple(torch.from_numpy(array) for array in self._arrays.values())
        torch.onnx.export(
            Plain().eval(), tensors, graph, input_names=names, dynamo=True, external_data=True, verbose=False
        )


def step_arrays(inputs: Inputs) -> dict[str, NDArray[Any]]:
    """What a UNet takes for a step: the sample twice, the timestep, and the conditions of both halves."""
    given = {name.removeprefix("context."): array for name, array in inputs.items() if name.startswith("context.")}
    timestep = given.pop("timesteps").astype(np.int64)
    return {"sample": np.concatenate([inputs["sample"]] * 2), "timestep": timestep, **given}
