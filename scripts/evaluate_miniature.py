"""`python -m kandrt.scripts.evaluate_miniature`: how well pictures of the miniature do what is asked of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from PIL import Image

from ..engines.backends import open_component
from ..engines.bundle import open_bundle
from ..engines.errors import InputError
from ..engines.session import Session
from ..runtime import Kandinsky, load
from ..runtime.images import image_pixels, save_image, to_array, to_pil
from ..runtime.miniature import MINIATURE
from .console import Json, guarded, print_json, stderr, stdout, table
from .generate import check_output
from .miniature.evaluation import GOALS, KEPT_LEVELS, MODES, Evaluation, evaluate
from .miniature.shapes import Float32
from .miniature.sheet import contact_sheet
from .miniature.trials import PATH, SIDE, Painter
from .train_miniature.configs import MINI_PRIOR

SHEET_COLUMNS, SHEET_CELLS = 6, 48


@dataclass(frozen=True)
class KandrtPainter:
    """A bundle under kandrt; `settings` of the decoder (steps, scheduler, guidance_scale), `open` opens a component."""

    model: Kandinsky
    settings: dict[str, Any]
    open: Callable[[str], Session]

    def paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """A picture for each prompt."""
        return self.model(list(prompts), seed=list(seeds), **self.settings).images

    def follow(self, prompts: Sequence[str], hints: Sequence[Float32], seeds: Sequence[int]) -> list[Image.Image]:
        """A picture for each prompt along its hint."""
        return self.model(list(prompts), hint=list(hints), seed=list(seeds), **self.settings).images

    def repaint(self, prompt: str, image: Image.Image, mask: Float32, seed: int) -> tuple[Image.Image, Image.Image]:
        """The image repainted, and as the autoencoder gives it back."""
        painted = self.model(prompt, image=image, mask=mask, seed=seed, **self.settings).images[0]
        return painted, self.restored(image)

    def restored(self, image: Image.Image) -> Image.Image:
        """The image encoded and decoded."""
        encoder, decoder = self._autoencoder
        latents = encoder(pixels=image_pixels(image, SIDE, SIDE))["latents"]
        return to_pil(to_array(np.asarray(decoder(latents=latents)["pixels"])))[0]

    @cached_property
    def _autoencoder(self) -> tuple[Session, Session]:
        record = self.model.manifest.decoders["inpaint"]
        return self.open(record.movq_encoder), self.open(record.movq_decoder)

    def between(self, first: str, second: str, shares: Sequence[float], seed: int) -> list[Image.Image]:
        """Pictures on the way from one prompt to another."""
        return between(self.model, first, second, shares, seed, **self.settings)


def between(
    k: Kandinsky, first: str, second: str, shares: Sequence[float], seed: int, **settings: Any
) -> list[Image.Image]:
    """Pictures on the way from one prompt to another, all of one seed; a share of 1 is the second."""
    pictures = []
    for share in shares:
        embeds = k.prior.interpolate([first, second], [1 - share, share], seed=seed)
        pictures += k.decoder(embeds, seed=seed, **settings).images
    return pictures


@contextmanager
def counting(total: int) -> Iterator[Callable[[str, int], None]]:
    """A function that is told how many pictures of a mode were judged; a bar on a terminal, else nothing."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description:13}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=stderr(), transient=True, disable=not stderr().is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda mode, count: progress.update(task, description=mode, advance=count)


def command(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE]",
            help="A bundle, or a folder of checkpoints to run with diffusers; by default the miniature built in.",
            show_default=False,
        ),
    ] = None,
    pictures: Annotated[int, typer.Option("--pictures", "-n", min=1, help="How many to judge in each mode.")] = 100,
    mode: Annotated[
        list[str] | None,
        typer.Option("--mode", help=f"{', '.join(MODES)}; may be repeated. [default: all]", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the decoder.")] = 100,
    scheduler: Annotated[
        str | None, typer.Option(help="ddpm, ddim or dpmpp-2m; by default the checkpoint's own.", show_default=False)
    ] = None,
    guidance_scale: Annotated[float, typer.Option(help="As of `kandrt generate`.")] = 4.0,
    backend: Annotated[str, typer.Option(help="What runs the graphs.")] = "onnxruntime",
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option(help="What to compute in; by default the bundle's own.", show_default=False),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; by default all.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Other trials.")] = 0,
    sheet: Annotated[
        Path | None, typer.Option(help="Write some pictures with their prompts here.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Judge pictures of the miniature against their prompts, without a network, on combinations that it never saw.

    Exits with 1 where a goal is missed.
    """
    wrong = [name for name in mode or () if name not in MODES]
    if wrong:
        raise typer.BadParameter(f"expected {', '.join(MODES)}, found {', '.join(wrong)}", param_hint="--mode")
    modes = tuple(mode or MODES)
    if sheet is not None:
        if "text" not in modes:
            raise typer.BadParameter("needs --mode text, whose pictures it shows", param_hint="--sheet")
        check_output(sheet)
    settings = {"steps": steps, "scheduler": scheduler, "guidance_scale": guidance_scale}
    began = time.monotonic()
    with painter(model, settings, backend, precision, threads) as chosen, counting(total(modes, pictures)) as advance:
        result = evaluate(chosen, pictures, modes=modes, seed=seed, advance=advance)
    if json:
        scores = {name: {"right": score.right, "asked": score.asked} for name, score in result.scores.items()}
        kept = {} if result.kept_difference is None else {"kept_difference": result.kept_difference}
        facts = {
            "model": "miniature" if model is None else str(model), "backend": backend, "precision": precision,
            "pictures": pictures, "seed": seed, "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        print_json({"scores": scores, **kept, **settings, **facts})
    else:
        show(result)
    if sheet is not None:
        save_image(contact_sheet(result.cells[:SHEET_CELLS], SHEET_COLUMNS), sheet, {})
    if not result.met():
        raise typer.Exit(1)


def total(modes: Sequence[str], pictures: int) -> int:
    """How many pictures are to be made."""
    return sum(max(pictures // 4, 1) * PATH if mode == "interpolation" else pictures for mode in modes)


@contextmanager
def painter(
    model: Path | None, settings: dict[str, Any], backend: str, precision: Any, threads: int | None
) -> Iterator[Painter]:
    """What paints: diffusers for a folder of checkpoints, else kandrt."""
    if model is not None and (model / MINI_PRIOR).is_dir():
        from .bench_diffusers import DiffusersPainter

        if backend != "onnxruntime" or precision not in (None, "fp32"):
            raise InputError(
                f"{model} holds checkpoints, which diffusers runs in fp32; leave out backend and precision"
            )
        yield DiffusersPainter(model, settings, threads)
        return
    settings_of: dict[str, Any] = {"backend": backend, "precision": precision, "threads": threads}
    bundle = open_bundle(MINIATURE if model is None else model)
    with load(bundle.folder, **settings_of) as opened, ExitStack() as stack:

        def open_one(name: str) -> Session:
            return stack.enter_context(closing(open_component(bundle, name, device="cpu", **settings_of)))

        yield KandrtPainter(opened, settings, open_one)


def show(result: Evaluation) -> None:
    """Print the scores beside their goals."""
    rows = table("attribute", ">accuracy", ">goal", ">right", ">asked")
    for name, score in result.scores.items():
        goal = GOALS.get(name)
        style = "" if goal is None else "green" if score.accuracy >= goal else "red"
        wanted = "" if goal is None else f"{goal:.0%}"
        rows.add_row(name, f"{score.accuracy:.1%}", wanted, str(score.right), str(score.asked), style=style)
    if result.kept_difference is not None:
        style = "green" if result.kept_difference <= KEPT_LEVELS else "red"
        rows.add_row(
            "inpainting: kept pixels differ by", f"{result.kept_difference:.2f}", f"{KEPT_LEVELS:.0f}", style=style
        )
    stdout().print(rows)


app = typer.Typer(add_completion=False)
app.command()(guarded(command))

if __name__ == "__main__":
    app()
