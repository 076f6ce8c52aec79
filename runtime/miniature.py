"""Where the miniature lies: a small Kandinsky 2.2 that comes with the package and draws coloured shapes."""

from __future__ import annotations

from pathlib import Path

MINIATURE = Path(__file__).with_name("miniature-bundle")
