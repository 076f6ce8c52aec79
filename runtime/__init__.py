"""From a bundle to pictures, without PyTorch.

>>> from kandrt.runtime import load
>>> with load("bundle") as k:
...     k("a robot, 4k photo", steps=50, seed=43).images[0].save("robot.png")
"""

from __future__ import annotations

from .batching import Batch, Ticket
from .decoder import Decoder, Result
from .embeds import Embeds
from .pipeline import Kandinsky, load
from .prior import Prior
from .prompts import PromptEmbeds

__all__ = ["Batch", "Decoder", "Embeds", "Kandinsky", "Prior", "PromptEmbeds", "Result", "Ticket", "load"]
