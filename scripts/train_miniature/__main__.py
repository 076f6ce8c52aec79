"""`python -m kandrt.scripts.train_miniature`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from ...engines.errors import InputError, OutputError
from ..console import guarded
from ..doctor import need

FACTS = "training.json"
PATIENCE = timedelta(hours=6)  # of a process that waits while the first one works out a training set


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for states, logs and checkpoints.")],
    stage: Annotated[
        list[str] | None, typer.Option("--stage", help="Train this alone; may be repeated. [default: all]")
    ] = None,
    effort: Annotated[
        float, typer.Option(min=0, max=10, help="Share of the steps and scenes: 0.001 tries everything out.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, help="Of pictures, captions, noise; the decoders' scenes and first weights are fixed.")
    ] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch in this process.")] = None,
    bfloat16: Annotated[bool, typer.Option("--bfloat16/--float32", help="Which precision to compute in.")] = True,
) -> None:
    """Train the miniature from nothing, on pictures drawn as it goes: a few hours on two cores.

    What OUTPUT holds already is taken up where it stopped, after an interruption too. The networks end up as
    checkpoints in diffusers' layout in OUTPUT/checkpoints, the losses in OUTPUT/losses.png. Under torchrun several
    processes share each step.

    Example: torchrun --nproc-per-node 2 -m kandrt.scripts.train_miniature -o training --threads 1
    """
    need("train", "training the miniature")
    import torch

    from .stages import STAGES, Work

    unknown = [name for name in stage or () if name not in STAGES]
    if unknown:
        raise InputError(f"stage: expected {', '.join(STAGES)}, found {', '.join(unknown)}")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error
    with processes() as report:
        check_facts(output, {"effort": effort, "seed": seed, "bfloat16": bfloat16})
        try:
            train_stages(stage or list(STAGES), Work(output, effort, bfloat16), seed, report)
        except KeyboardInterrupt:
            report("stopped; the same command goes on from here")
            raise


@contextmanager
def processes() -> Iterator[Callable[[str], None]]:
    """Meet the other processes of torchrun, if there are any; gives what prints, in the first process alone."""
    import torch.distributed as dist

    if "WORLD_SIZE" not in os.environ:
        yield typer.echo
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield typer.echo if dist.get_rank() == 0 else lambda _: None
    finally:
        dist.destroy_process_group()


def check_facts(output: Path, facts: Mapping[str, Any]) -> None:
    """Write down how a training was begun; InputError where the folder's was begun in another way."""
    from ...engines.files import atomic_write

    path = output / FACTS
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        with atomic_write(path) as file:
            file.write(json.dumps(facts).encode())
        return
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); choose another folder") from error
    if found != facts:
        raise InputError(f"{output} was begun with {found}, and this is {facts}; give the same, or another folder")


def train_stages(chosen: list[str], work: Any, seed: int, report: Callable[[str], None]) -> None:
    """Train every chosen stage that is not finished, then write checkpoints and plots of what there is."""
    import torch.distributed as dist

    from .checkpoints import write_checkpoints
    from .loop import WEIGHTS, rank, train
    from .plots import plot_losses
    from .stages import STAGES

    def meet() -> None:
        if dist.is_initialized():
            dist.barrier()

    for name in chosen:
        stage, folder = STAGES[name], work.folder / name
        if (folder / WEIGHTS).exists():
            report(f"{name}: trained already")
            continue
        missing = stage.missing(work)
        if missing:
            raise InputError(f"stage {name} needs {', '.join(missing)}, to be trained first")
        if rank() > 0:  # what several processes would write at once, the first one makes beforehand
            meet()
        task = stage.begin(work, report)
        if rank() == 0:
            meet()
        settings = stage.scaled(work.effort)
        train(name, task, settings, folder, seed=seed, bfloat16=work.bfloat16, report=report)
        meet()
    if rank() == 0:
        for checkpoint in write_checkpoints(work.folder, work.folder / "checkpoints"):
            report(f"wrote {checkpoint}")
        plot_losses(work.folder, tuple(STAGES), work.folder / "losses.png")


app = typer.Typer(add_completion=False)
app.command()(guarded(command))

if __name__ == "__main__":
    app()
