"""`python -m kandrt.scripts.gallery`: what the miniature paints in every mode, on one sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from ..runtime import Kandinsky, load
from ..runtime.images import save_image
from .console import guarded, stdout
from .evaluate_miniature import between
from .generate import check_output
from .miniature.captions import parse
from .miniature.drawing import depth, draw
from .miniature.judge import judge
from .miniature.masks import object_mask
from .miniature.sheet import GAP, INK, PAPER, Cell, contact_sheet
from .miniature.trials import SIDE
from .miniature.world import Figure, Scene

TITLE_SIZE, TITLE_HEIGHT = 16, 32  # pixels
SEED = 11

TEXTS = (
    "a large red circle on a blue background",
    "a small yellow star in the top left on a black background",
    "a white heart on a striped red background",
    "a purple ring at the top and a green square at the bottom on a white background",
    "a large orange triangle on a dotted purple background",
    "a red heart on the left and a blue square on the right on a checked yellow background",
)
IMAGE_TO_IMAGE = (
    ("a large red circle on a blue background", "a large green circle on a blue background"),
    ("a large yellow star on a purple background", "a large yellow star on a striped orange background"),
    ("a large white square on a green background", "a large white heart on a green background"),
)
INPAINTING = (
    (Scene("blue", "plain", (Figure("red", "circle", "large", "centre"),)), "a large yellow star on a blue background"),
    (
        Scene("white", "dotted", (Figure("green", "square", "large", "left"),)),
        "a large purple heart on the left on a dotted white background",
    ),
    (
        Scene("orange", "striped", (Figure("black", "ring", "large", "bottom right"),)),
        "a large blue diamond in the bottom right on a striped orange background",
    ),
)
CONTROLNET = (
    (Figure("red", "heart", "large", "centre", (-0.04, 0.03)), "a large red heart on a white background"),
    (Figure("red", "star", "large", "top right"), "a large yellow star in the top right on a blue background"),
    (Figure("red", "cross", "large", "left"), "a large purple cross on the left on a green background"),
)
INTERPOLATION = (
    "a large red circle in the centre on a white background",
    "a large blue circle in the centre on a black background",
)
COMBINED = (
    "a small green triangle in the bottom left on a pink background",
    "a large black ring on a gradient orange background",
)


@dataclass(frozen=True)
class Painted:
    """A picture beside what it was made from, the caption under them, and the prompt that it is judged by."""

    pictures: tuple[Image.Image, ...]
    text: str
    prompt: str | None = None

    def wrong(self) -> list[str]:
        """What the picture does not show of its prompt."""
        request = None if self.prompt is None else parse(self.prompt)
        verdict = {} if request is None else judge(self.pictures[-1], request)
        return [name for name, value in verdict.items() if value is False]


def text_to_image(k: Kandinsky) -> list[Painted]:
    embeds = k.prior(list(TEXTS), seed=[SEED] * len(TEXTS))
    pictures = k.decoder(embeds, seed=[SEED] * len(TEXTS)).images
    return [Painted((picture,), prompt, prompt) for picture, prompt in zip(pictures, TEXTS, strict=True)]


def image_to_image(k: Kandinsky) -> list[Painted]:
    painted = []
    for source, prompt in IMAGE_TO_IMAGE:
        before = k(source, seed=SEED).images[0]
        painted.append(Painted((before, k(prompt, image=before, strength=0.8, seed=SEED).images[0]), prompt, prompt))
    return painted


def inpainting(k: Kandinsky) -> list[Painted]:
    painted = []
    for scene, prompt in INPAINTING:
        before, mask = draw(scene, SIDE), object_mask(scene, 0, SIDE)
        after = k(prompt, image=before, mask=mask, seed=SEED).images[0]
        hole = np.where(mask[..., None] > 0.5, np.uint8(160), np.asarray(before))
        painted.append(Painted((Image.fromarray(hole.astype(np.uint8)), after), prompt, prompt))
    return painted


def controlnet(k: Kandinsky) -> list[Painted]:
    painted = []
    for figure, prompt in CONTROLNET:
        hint = depth(Scene("white", "plain", (figure,)), SIDE)
        shown = Image.fromarray((hint * 255).astype(np.uint8)).convert("RGB")
        painted.append(Painted((shown, k(prompt, hint=hint, seed=SEED).images[0]), prompt, prompt))
    return painted


def interpolation(k: Kandinsky) -> list[Painted]:
    shares = np.linspace(0, 1, 6).tolist()
    pictures = between(k, *INTERPOLATION, shares, SEED)
    return [
        Painted((picture,), f"{1 - share:.0%} white, {share:.0%} black", None)
        if 0 < share < 1
        else Painted((picture,), INTERPOLATION[round(share)], INTERPOLATION[round(share)])
        for picture, share in zip(pictures, shares, strict=True)
    ]


def combined(k: Kandinsky) -> list[Painted]:
    return [
        Painted((picture,), f"{prompt}, seed {seed}", prompt)
        for prompt in COMBINED
        for seed in (SEED, SEED + 1, SEED + 2)
        for picture in k(prompt, seed=seed).images
    ]


SECTIONS: dict[str, Callable[[Kandinsky], list[Painted]]] = {
    "text-to-image: prior, then decoder": text_to_image,
    "image-to-image: a picture and another prompt": image_to_image,
    "inpainting: grey is painted anew": inpainting,
    "ControlNet: a depth map decides where": controlnet,
    "interpolation between two prompts": interpolation,
    "combined: prompt to picture in one call": combined,
}


def sheet(sections: Sequence[tuple[str, list[Painted]]]) -> Image.Image:
    """All sections below each other, each under its title."""
    parts = []
    for title, painted in sections:
        cells = [Cell(one.pictures, one.text) for one in painted]
        parts.append((title, contact_sheet(cells, columns=6 // len(cells[0].pictures))))
    width, height = max(part.width for _, part in parts), sum(part.height + TITLE_HEIGHT for _, part in parts)
    whole = Image.new("RGB", (width, height), PAPER)
    pen, y = ImageDraw.Draw(whole), 0
    for title, part in parts:
        pen.text((GAP, y + 8), title, fill=INK, font=ImageFont.load_default(TITLE_SIZE))
        whole.paste(part, (0, y + TITLE_HEIGHT))
        y += part.height + TITLE_HEIGHT
    return whole


def command(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PICTURE", help="Picture to write.")],
    bundle: Annotated[
        Path | None,
        typer.Argument(help="A bundle of the miniature; by default the one built in.", show_default=False),
    ] = None,
) -> None:
    """Paint a sheet that shows every mode of the miniature, and judge its cells by their captions.

    Exits with 1 where a cell is not what its caption says.
    """
    check_output(output)
    sections, wrong = [], []
    with load(bundle) as k:
        for title, section in SECTIONS.items():
            sections.append((title, section(k)))
            wrong += [f"{one.prompt}: {', '.join(one.wrong())}" for one in sections[-1][1] if one.wrong()]
    save_image(sheet(sections), output, {})
    judged = sum(one.prompt is not None for _, painted in sections for one in painted)
    stdout().print(f"{output}: {judged - len(wrong)} of {judged} pictures show what their captions say", soft_wrap=True)
    for line in wrong:
        stdout().print(f"not so: {line}", soft_wrap=True, markup=False)
    if wrong:
        raise typer.Exit(1)


app = typer.Typer(add_completion=False)
app.command()(guarded(command))

if __name__ == "__main__":
    app()
