"""Pictures with their captions on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .captions import caption
from .drawing import depth, draw
from .masks import object_mask
from .shapes import Float32
from .world import random_scene

PAPER, INK = (255, 255, 255), (64, 66, 72)
GAP, TEXT_SIZE, LINE_HEIGHT = 16, 13, 17  # pixels


@dataclass(frozen=True)
class Cell:
    """Pictures of one size side by side, and the text under them."""

    pictures: tuple[Image.Image, ...]
    text: str


def contact_sheet(cells: Sequence[Cell], columns: int) -> Image.Image:
    """Lay cells of one size out in rows."""
    font = ImageFont.load_default(TEXT_SIZE)
    side = cells[0].pictures[0].width
    width = (side + 2) * len(cells[0].pictures) - 2
    texts = [wrapped(cell.text, width, font) for cell in cells]
    pitch_x, pitch_y = width + GAP, side + 6 + max(map(len, texts)) * LINE_HEIGHT + GAP
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * pitch_x + GAP, rows * pitch_y + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (cell, lines) in enumerate(zip(cells, texts, strict=True)):
        x, y = GAP + i % columns * pitch_x, GAP + i // columns * pitch_y
        for j, picture in enumerate(cell.pictures):
            sheet.paste(picture.convert("RGB"), (x + j * (side + 2), y))
        for j, line in enumerate(lines):
            pen.text((x + width / 2, y + side + 6 + j * LINE_HEIGHT), line, fill=INK, font=font, anchor="ma")
    return sheet


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines of whole words no longer than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def random_cells(count: int, side: int, seed: int, hints: bool) -> list[Cell]:
    """Random scenes with a caption each, and with the depth hint and an inpainting mask where `hints` is set."""
    rng = np.random.default_rng(seed)
    cells = []
    for _ in range(count):
        scene = random_scene(rng)
        text = caption(scene, rng).text
        more = (grey(depth(scene, side)), grey(object_mask(scene, 0, side, rng))) if hints else ()
        cells.append(Cell((draw(scene, side), *more), text))
    return cells


def grey(levels: Float32) -> Image.Image:
    """An array in [0, 1] as a greyscale picture."""
    return Image.fromarray((levels * 255).round().astype(np.uint8))
