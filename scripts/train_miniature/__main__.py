"""`python -m kandrt.scripts.train_miniature`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ...engines.errors import InputError, KandrtError

app = typer.Typer(add_completion=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for states, logs and checkpoints.")],
    stage: Annotated[
        list[str] | None, typer.Option("--stage", help="Train this alone; may be repeated. [default: all]")
    ] = None,
    effort: Annotated[
        float, typer.Option(min=0, max=10, help="Share of the steps and scenes: 0.001 tries everything out.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn and in which order.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch in this process.")] = None,
    bfloat16: Annotated[bool, typer.Option("--bfloat16/--float32", help="Which precision to compute in.")] = True,
) -> None:
    """Train the miniature from nothing, on pictures drawn as it goes: a few hours on two cores.

    What OUTPUT holds already is taken up where it stopped, after an interruption too. The networks end up as
    checkpoints in diffusers' layout in OUTPUT/checkpoints, the losses in OUTPUT/losses.png. Under torchrun several
    processes share each step.

    Example: torchrun --nproc-per-node 2 -m kandrt.scripts.train_miniature -o training --threads 1
    """
    try:
        train_stages(output, stage or [], effort, seed, threads, bfloat16)
    except KandrtError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        raise typer.Exit(130) from None


def train_stages(
    output: Path, chosen: list[str], effort: float, seed: int, threads: int | None, bfloat16: bool
) -> None:
    """Train every chosen stage that is not finished, then write checkpoints and plots of what there is."""
    import torch
    import torch.distributed as dist

    from .checkpoints import write_checkpoints
    from .loop import WEIGHTS, rank, train
    from .plots import plot_losses
    from .stages import STAGES, Work

    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        raise InputError(f"stage: expected {', '.join(STAGES)}, found {', '.join(unknown)}")
    if threads is not None:
        torch.set_num_threads(threads)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    work = Work(output, effort)

    def report(message: str) -> None:
        if rank() == 0:
            typer.echo(message)

    for name in chosen or STAGES:
        stage = STAGES[name]
        if (output / name / WEIGHTS).exists():
            report(f"{name}: trained already")
            continue
        missing = stage.ready(work)
        if missing:
            raise InputError(f"stage {name} needs {', '.join(missing)}, to be trained first")
        # what several processes would write at once, one makes beforehand
        if rank() == 0:
            task = stage.begin(work, report)
        if dist.is_initialized():
            dist.barrier()
        if rank() != 0:
            task = stage.begin(work, report)
        train(name, task, stage.scaled(effort), output / name, seed=seed, bfloat16=bfloat16, report=report)
        if dist.is_initialized():
            dist.barrier()
    if rank() == 0:
        for folder in write_checkpoints(output, output / "checkpoints"):
            report(f"wrote {folder}")
        plot_losses(output, tuple(STAGES), output / "losses.png")


if __name__ == "__main__":
    app()
