"""`python -m kandrt.scripts.miniature`: a sheet of random scenes with their captions, to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...engines.errors import KandrtError
from ...runtime.images import save_image
from .sheet import contact_sheet, random_cells

app = typer.Typer(add_completion=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write.")],
    columns: Annotated[int, typer.Option("--columns", min=1, help="Scenes in a row.")] = 6,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows.")] = 5,
    side: Annotated[int, typer.Option("--side", min=32, max=1024, help="Pixels of a picture's side.")] = 144,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Other seeds give other scenes.")] = 0,
    hints: Annotated[bool, typer.Option("--hints", help="Show depth hints and inpainting masks too.")] = False,
) -> None:
    """Draw random scenes of the miniature's world with their captions.

    Example: python -m kandrt.scripts.miniature -o sheet.png
    """
    try:
        save_image(contact_sheet(random_cells(columns * rows, side, seed, hints), columns), output, {})
    except KandrtError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{output}: {columns * rows} scenes")


if __name__ == "__main__":
    app(prog_name="python -m kandrt.scripts.miniature")
