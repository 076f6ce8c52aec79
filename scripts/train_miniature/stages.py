"""The trainings in their order: what each needs, how long it takes, and how it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from safetensors.torch import load_file

from ...export.modules.movq import MoVQ, MoVQConfig
from .autoencoder import AutoencoderTask
from .batches import LOOSE, NEAT
from .clip import ContrastiveTask, Encoders
from .configs import config, write_tokenizer
from .decoder import DecoderTask, Role
from .encoded import Encoded, encode, load, zero_embed
from .loop import WEIGHTS, Settings, Task, load_weights
from .prior import PriorTask

Report = Callable[[str], None]

# Name -> scenes, how far objects stray, seed
DATASETS: Mapping[str, tuple[int, float, int]] = {"neat": (36_000, NEAT, 1), "loose": (12_000, LOOSE, 2)}
LEAST_SCENES = 64


@dataclass(frozen=True)
class Work:
    """The folder of a training, and the share of the full effort that goes into it."""

    folder: Path
    effort: float = 1.0
    bfloat16: bool = True

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder; it is made when it is first asked for."""
        folder = self.folder / "tokenizer"
        if not folder.exists():
            unfinished = self.folder / ".tokenizer.partial"
            write_tokenizer(unfinished)
            unfinished.rename(folder)
        return folder

    def encoders(self) -> Encoders:
        """CLIP, trained."""
        encoders = Encoders(self.tokenizer)
        load_weights(encoders, self.folder / "clip")
        return encoders.requires_grad_(False).eval()

    def movq(self) -> MoVQ:
        """The autoencoder, trained."""
        movq = MoVQ(MoVQConfig.from_dict(config("movq")))
        load_weights(movq, self.folder / "movq")
        return movq.requires_grad_(False).eval()

    def encoded(self, name: str, report: Report) -> Encoded:
        """A training set; it is worked out when it is first asked for."""
        count, jitter, seed = DATASETS[name]
        path = self.folder / "encoded" / f"{name}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            count = max(int(count * self.effort), LEAST_SCENES)
            encode(
                self.movq(),
                self.encoders().image,
                path,
                count=count,
                jitter=jitter,
                seed=seed,
                bfloat16=self.bfloat16,
                report=report,
            )
        return load(path, jitter=jitter, seed=seed)


@dataclass(frozen=True)
class Stage:
    """One training: what must be trained before it, its settings at full effort, and its beginning."""

    needs: tuple[str, ...]
    settings: Settings
    begin: Callable[[Work, Report], Task]

    def scaled(self, effort: float) -> Settings:
        """Settings for a share of the effort."""
        return replace(self.settings, steps=max(int(self.settings.steps * effort), 2))

    def missing(self, work: Work) -> list[str]:
        """Which of `needs` are still to be trained."""
        return [name for name in self.needs if not (work.folder / name / WEIGHTS).exists()]


def begin_prior(work: Work, report: Report) -> Task:
    return PriorTask(work.encoded("neat", report), work.encoders().text, work.tokenizer)


def begin_decoder(work: Work, report: Report, role: Role) -> Task:
    encoded = work.encoded("loose" if role == "controlnet" else "neat", report)
    start = None if role == "decoder" else load_file(work.folder / "decoder" / WEIGHTS)
    return DecoderTask(role, encoded, zero_embed(work.encoders().image), start)


STAGES: Mapping[str, Stage] = {
    "movq": Stage((), Settings(5000, 16, 1.5e-3), lambda *_: AutoencoderTask()),
    "clip": Stage((), Settings(4200, 64, 7e-4), lambda work, _: ContrastiveTask(work.tokenizer)),
    "prior": Stage(("movq", "clip"), Settings(4000, 64, 1e-3), begin_prior),
    "decoder": Stage(("movq", "clip"), Settings(4500, 64, 1e-3), partial(begin_decoder, role="decoder")),
    "inpaint": Stage(("movq", "clip", "decoder"), Settings(600, 64, 5e-4), partial(begin_decoder, role="inpaint")),
    "controlnet": Stage(
        ("movq", "clip", "decoder"), Settings(600, 64, 5e-4), partial(begin_decoder, role="controlnet")
    ),
}
