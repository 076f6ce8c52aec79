"""The training loop of every network: seeded, logged, averaged, saved every so often, and taken up where it stopped.

Under `torchrun` several processes share each batch and average their gradients.
"""

from __future__ import annotations

import csv
import io
import math
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...engines.errors import InputError
from ...engines.files import atomic_write
from ...export.weight_files import TensorToWrite, write_safetensors

WARMUP, FLOOR = 100, 0.02  # steps of rising learning rate; where it ends, as a share of the highest
AVERAGE = 0.999  # of the weights' running mean, reached gradually
CLIP_NORM = 1.0
LOG_EVERY, SAVE_EVERY = 20, 60.0  # steps; seconds
LOG, STATE, WEIGHTS = "log.csv", "state.pt", "weights.safetensors"


class Task(Protocol):
    """What is trained, and for what."""

    @property
    def network(self) -> nn.Module:
        """Everything that is trained."""
        ...

    def losses(self, rng: np.random.Generator, batch: int, progress: float, /) -> dict[str, Tensor]:
        """The loss to minimise under "loss", and others to log; `progress` goes from 0 to 1."""
        ...


@dataclass(frozen=True)
class Settings:
    """How long and how fast; `batch` is of all processes together."""

    steps: int
    batch: int
    rate: float
    decay: float = 0.01


def train(
    name: str,
    task: Task,
    settings: Settings,
    folder: Path,
    *,
    seed: int = 0,
    bfloat16: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Train `task` to the end, taking up what `folder` holds, and write its averaged weights there.

    What a step sees depends on seed, name, settings, step and process alone, so that an interrupted training goes on as
    if nothing had happened. SIGINT ends it between two steps, the state saved, with KeyboardInterrupt.

    Raises InputError where processes cannot share a batch equally.
    """
    if settings.batch % world():
        raise InputError(f"{name}: {world()} processes cannot share a batch of {settings.batch}; use a divisor of it")
    run = Run(task.network, settings, folder)
    share = settings.batch // world()
    precision: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext()
    saved = time.monotonic()
    with interrupts() as asked:
        while run.step < settings.steps:
            rng = np.random.default_rng([seed, zlib.crc32(name.encode()), run.step, rank()])
            torch.manual_seed(int(rng.integers(2**63)))
            with precision, sdpa_kernel(SDPBackend.MATH):  # at these sizes twice as fast as the fused one
                losses = task.losses(rng, share, run.step / settings.steps)
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            run.update({key: float(value.detach()) for key, value in losses.items()})
            if run.step % LOG_EVERY == 0 or run.step == settings.steps:
                report(f"{name} {run.step}/{settings.steps}  {run.log()}")
            if anyone(asked.is_set()):
                run.save()
                raise KeyboardInterrupt
            if time.monotonic() - saved > SAVE_EVERY:
                run.save()
                saved = time.monotonic()
    run.save()
    if rank() == 0:
        write_weights(folder / WEIGHTS, run.mean)


@contextmanager
def interrupts() -> Iterator[Event]:
    """An event that SIGINT and SIGTERM set instead of interrupting, so that no step is half taken."""
    asked = Event()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda *_: asked.set())
    try:
        yield asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def anyone(asked: bool) -> bool:
    """Whether any process was asked."""
    if world() == 1:
        return asked
    flag = torch.tensor(float(asked))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


class Run:
    """The state of a training: network, running mean of its weights, optimizer, step, and the log."""

    def __init__(self, network: nn.Module, settings: Settings, folder: Path) -> None:
        self.network, self.settings, self.folder = network, settings, folder
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.mean = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters, settings.rate, betas=(0.9, 0.99), weight_decay=settings.decay, fused=True
        )
        self.step = 0
        self.window: list[Mapping[str, float]] = []
        self.started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE).exists():
            state = torch.load(folder / STATE, weights_only=True)
            network.load_state_dict(state["network"])
            self.mean, self.step = state["mean"], state["step"]
            self.optimizer.load_state_dict(state["optimizer"])
        keep_log(folder / LOG, self.step)

    def update(self, losses: Mapping[str, float]) -> None:
        """Take a step along the gradients."""
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * rate_share(self.step, self.settings.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(AVERAGE, (1 + self.step) / (10 + self.step))
        now = self.network.state_dict()
        for name, tensor in self.mean.items():
            tensor.lerp_(now[name], 1 - decay)
        self.step += 1
        self.window.append(losses)

    def log(self) -> str:
        """Append the mean losses since the last call to the log, and put them into words."""
        seconds = (time.monotonic() - self.started) / len(self.window)
        means = {key: sum(row[key] for row in self.window) / len(self.window) for key in self.window[0]}
        self.window, self.started = [], time.monotonic()
        if rank() == 0:
            path = self.folder / LOG
            new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", "seconds", *means])
                writer.writerow([self.step, f"{seconds:.3f}", *(f"{value:.5g}" for value in means.values())])
        return "  ".join([*(f"{key} {value:.4f}" for key, value in means.items()), f"{seconds:.2f} s/step"])

    def save(self) -> None:
        """Write the state; it replaces the last one when it is complete."""
        if rank() != 0:
            return
        state = {
            "network": self.network.state_dict(),
            "mean": self.mean,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        with atomic_write(self.folder / STATE) as file:
            torch.save(state, file)


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name as safetensors, in fp32."""

    def entry(name: str, tensor: Tensor) -> TensorToWrite:
        return TensorToWrite(name, "float32", tuple(tensor.shape), lambda: tensor.contiguous())

    write_safetensors(path, [entry(name, tensor) for name, tensor in tensors.items()])


def load_weights(network: nn.Module, folder: Path) -> None:
    """Load what `train` wrote to `folder`."""
    network.load_state_dict(load_file(folder / WEIGHTS))


def keep_log(path: Path, step: int) -> None:
    """Drop what the log says of steps after `step`, which will be taken again."""
    if rank() != 0 or not path.exists():
        return
    header, *rows = read_log(path)
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *(row for row in rows if int(row[0]) <= step)])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def read_log(path: Path) -> list[list[str]]:
    """The header and the complete rows of a log."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    return [row for row in rows if len(row) == len(rows[0])] or [["step", "seconds"]]


def rate_share(step: int, steps: int) -> float:
    """Share of the highest learning rate: a linear rise, then half a cosine."""
    warmup = min(WARMUP, steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Give all processes the mean of their gradients."""
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
