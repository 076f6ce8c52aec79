"""diffusers as a contender: its own pipelines and networks on the checkpoints that the bundle was made from."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...engines.errors import InputError
from ...engines.manifest import FamilyName
from .cases import Inputs, SeededNoise
from .device_clock import DeviceClock, TorchEvents
from .sources import Part, Source
from .worker import Job, Subject

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Classes:
    """diffusers' classes of a family, by stage; `prompts` says whether its decoders read them.

    What paints from an embedding is what does in text-to-image.
    """

    unet: str
    pipelines: Mapping[str, str]
    prompts: bool = False


FAMILIES: Mapping[FamilyName, Classes] = {
    "kandinsky-2-1": Classes(
        "UNet2DConditionModel",
        {
            "prior": "KandinskyPriorPipeline",
            "text-to-image": "KandinskyPipeline",
            "image-to-image": "KandinskyImg2ImgPipeline",
        },
        prompts=True,
    ),
    "kandinsky-2-2": Classes(
        "UNet2DConditionModel",
        {
            "prior": "KandinskyV22PriorPipeline",
            "text-to-image": "KandinskyV22Pipeline",
            "image-to-image": "KandinskyV22Img2ImgPipeline",
            "controlnet": "KandinskyV22ControlnetPipeline",
        },
    ),
    "kandinsky-3": Classes(
        "Kandinsky3UNet",
        {"text-to-image": "Kandinsky3Pipeline", "image-to-image": "Kandinsky3Img2ImgPipeline"},
        prompts=True,
    ),
}


def subject(job: Job) -> Subject:
    """diffusers in a case."""
    return DiffusersSubject(job)


class DiffusersSubject:
    """A case under diffusers; settings "channels_last", "compile" and "freeze" are "yes" or absent, "device" a name.

    freeze: compiled networks hold their weights as constants, in the layouts that their kernels like best.
    """

    def __init__(self, job: Job) -> None:
        import diffusers
        import torch

        self._job, self.case, self._classes = job, job.case, FAMILIES[job.family]
        self.stages: dict[str, float] = {}
        self._diffusers: Any = diffusers
        self._torch: Any = torch
        self._dtype = getattr(torch, PRECISIONS[job.precision])
        self._result: dict[str, Any] = {}
        self._inputs: Inputs = {}
        self._pipes: dict[str, Any] = {}
        self._combined: dict[str, Any] = {}
        self._device = job.settings.get("device", "cpu")
        self._network: Callable[[], Any] = lambda: None
        self._decode_seconds = 0.0
        torch.set_num_threads(job.threads)
        self.clock = DeviceClock(TorchEvents(torch)) if self._device == "cuda" else None
        self.times_device = job.case.stage in ("step", "movq")
        if self._setting("freeze"):
            import torch._inductor.config as inductor

            inductor.freezing = True
        diffusers.utils.logging.disable_progress_bar()

    def open(self, inputs: Inputs) -> None:
        """Load the pipelines of the case, or the one network."""
        self._inputs, stage = inputs, self.case.stage
        if stage in ("step", "movq"):
            self._network = self._open_step() if stage == "step" else self._open_movq()
            return
        if self.case.runs_prior and "prior" in self._classes.pipelines:
            self._pipes["prior"] = self._pipeline("prior", "prior")
        if stage != "prior":
            self._pipes["decoder"] = self._pipeline(stage, self.case.role)

    def prepare(self) -> None:
        """Nothing."""

    def run(self) -> None:
        """What is timed."""
        if self.case.opens:
            return
        with self._torch.no_grad(), Injected(self._torch, SeededNoise(self.case.seed), self._device):
            if not self._pipes:
                self._result = self._network()
                return
            self._run_pipelines()

    def result(self) -> Mapping[str, NDArray[Any]]:
        """What the last run gave, in float32."""
        arrays = {
            name: value if isinstance(value, np.ndarray) else value.float().cpu().numpy()
            for name, value in self._result.items()
        }
        if "pixels" in arrays:
            picture = arrays.pop("pixels").transpose(0, 2, 3, 1) * np.float32(0.5) + np.float32(0.5)
            arrays["picture"] = picture.clip(0, 1)
        return arrays

    def _source(self, part: Part) -> tuple[str, dict[str, Any]]:
        """What `from_pretrained` takes of a checkpoint."""
        source = self._job.sources.get(part)
        if source is None:
            raise InputError(f"no checkpoint of the {part}; give --checkpoint FOLDER")
        return source.folder, load_options(source)

    def _pipeline(self, stage: str, part: Part) -> Any:
        """A pipeline, its networks tuned."""
        name = self._classes.pipelines.get("text-to-image" if stage == "embedding-to-image" else stage)
        if name is None:
            raise InputError(f"diffusers has no pipeline of this family for {stage}")
        pipe = self._load(getattr(self._diffusers, name), part).to(self._device)
        pipe.set_progress_bar_config(disable=True)
        for each in ("prior", "unet"):
            if hasattr(pipe, each):
                setattr(pipe, each, self._tuned(getattr(pipe, each)))
        if hasattr(pipe, "movq"):
            pipe.movq.decode = self._timed(self._tuned_decode(pipe.movq))
        return pipe

    def _load(self, pipeline: Any, part: Part) -> Any:
        """A pipeline of a checkpoint, or of its part of one that holds prior and decoder."""
        folder, options = self._source(part)
        combined = self._job.sources[part].combined
        if not combined:
            return pipeline.from_pretrained(folder, torch_dtype=self._dtype, **options)
        if folder not in self._combined:
            whole = getattr(self._diffusers, combined)
            self._combined[folder] = whole.from_pretrained(folder, torch_dtype=self._dtype, **options)
        prefix, components = "prior_" if part == "prior" else "", self._combined[folder].components
        names = signature(pipeline.__init__).parameters
        return pipeline(**{name: components[prefix + name] for name in names if prefix + name in components})

    def _tuned(self, module: Any) -> Any:
        if self._setting("channels_last"):
            module.to(memory_format=self._torch.channels_last)
        return self._torch.compile(module) if self._setting("compile") else module

    def _tuned_decode(self, movq: Any) -> Callable[..., Any]:
        if self._setting("channels_last"):
            movq.to(memory_format=self._torch.channels_last)
        decode: Callable[..., Any] = self._torch.compile(movq.decode) if self._setting("compile") else movq.decode
        return decode

    def _setting(self, name: str) -> bool:
        return self._job.settings.get(name) == "yes"

    def _timed(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return decode(*args, **kwargs)
            finally:
                self._decode_seconds += time.perf_counter() - start

        return run

    def _tensor(self, name: str) -> Any:
        return self._torch.from_numpy(self._inputs[name]).to(self._device, self._dtype)

    def _module(self, class_name: str, part: Part, subfolder: str) -> Any:
        folder, options = self._source(part)
        network = getattr(self._diffusers, class_name).from_pretrained(
            folder, subfolder=subfolder, torch_dtype=self._dtype, **options
        )
        return network.to(self._device)

    def _open_step(self) -> Callable[[], Any]:
        unet = self._tuned(self._module(self._classes.unet, self.case.role, "unet").eval())
        sample = self._torch.cat([self._tensor("sample")] * 2)
        told = step_arguments(self._job.family, {
            name.removeprefix("context."): self._tensor(name) for name in self._inputs if name.startswith("context.")
        })  # fmt: skip
        timestep = self._torch.tensor(int(self._inputs["context.timesteps"][0]), device=self._device)
        return lambda: {"prediction": unet(sample, timestep, **told, return_dict=False)[0]}

    def _open_movq(self) -> Callable[[], Any]:
        movq = self._module("VQModel", self.case.role, "movq").eval()
        decode, latents = self._tuned_decode(movq), self._tensor("latents")
        return lambda: {"pixels": decode(latents, force_not_quantize=True).sample}

    def _run_pipelines(self) -> None:
        case, start = self.case, time.perf_counter()
        self._decode_seconds, stages = 0.0, {}
        embeds = {
            name: self._tensor(name) for name in ("image_embeds", "negative_image_embeds") if name in self._inputs
        }
        if "prior" in self._pipes:
            found = self._pipes["prior"](
                list(case.prompts), num_inference_steps=case.prior_steps, guidance_scale=case.prior_guidance_scale
            )
            embeds = {name: getattr(found, name) for name in ("image_embeds", "negative_image_embeds")}
            stages["prior"] = time.perf_counter() - start
        if "decoder" not in self._pipes:
            self._result = {"image_embeds": embeds["image_embeds"]}
            return
        told: dict[str, Any] = dict(embeds)
        if self._classes.prompts:
            told["prompt"] = list(case.prompts)
        if "image" in self._inputs:
            told |= {"image": [Image.fromarray(self._inputs["image"])] * case.batch, "strength": case.strength}
        if "hint" in self._inputs:
            told["hint"] = self._tensor("hint")
        if not ("image" in self._inputs and self._job.family == "kandinsky-3"):  # which takes the picture's own
            told |= {"height": case.height, "width": case.width}
        found = self._pipes["decoder"](
            **told, num_inference_steps=case.steps, guidance_scale=case.guidance_scale, output_type="np"
        )
        self._result = {"picture": np.asarray(found.images, np.float32)}
        rest = time.perf_counter() - start - stages.get("prior", 0.0) - self._decode_seconds
        self.stages = {**stages, "decoder": rest, "movq": self._decode_seconds}


def load_options(source: Source) -> dict[str, Any]:
    """Options of `from_pretrained` beside the folder."""
    told = {"revision": source.revision, "variant": source.variant}
    return {"local_files_only": True, **{name: value for name, value in told.items() if value is not None}}


def step_arguments(family: FamilyName, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a UNet takes beside sample and timestep, of the context graph's inputs: negative rows before positive."""
    if family == "kandinsky-3":
        return {"encoder_hidden_states": given["text_states"], "encoder_attention_mask": given["text_mask"]}
    added = {name: given[name] for name in ("image_embeds", "text_embeds", "hint") if name in given}
    return {"encoder_hidden_states": given.get("text_states"), "added_cond_kwargs": added}


class Injected:
    """Lets diffusers draw from `noise` wherever it would draw from torch, so that all contenders see the same noise."""

    def __init__(self, torch: Any, noise: SeededNoise, device: str) -> None:
        self._torch, self._noise, self._device = torch, noise, device
        self._own: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        def randn_tensor(shape: Any, *_: Any, dtype: Any = None, **__: Any) -> Any:
            return self._torch.from_numpy(self._noise(tuple(shape))).to(self._device, dtype)

        for name, module in list(sys.modules.items()):
            if name.startswith(("diffusers.pipelines.", "diffusers.schedulers.")) and "randn_tensor" in vars(module):
                self._own.append((module, vars(module)["randn_tensor"]))
                module.randn_tensor = randn_tensor  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        for module, own in self._own:
            module.randn_tensor = own
