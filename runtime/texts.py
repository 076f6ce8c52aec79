"""Texts encoded: each different one runs once, and the empty one, which every request has, once for all requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from array_api_compat import array_namespace, device

from ..engines.session import Array


class TextCache:
    """Gives what texts are encoded to, and keeps it of the empty text."""

    def __init__(self) -> None:
        self._empty: dict[str, Array] | None = None

    def __call__(self, texts: Sequence[str], encode: Callable[[list[str]], dict[str, Array]]) -> dict[str, Array]:
        """Arrays [len(texts), ...] by name, on whatever device `encode` gives them.

        `encode` is called once, with at least one text and each once, and gives arrays with a row for each.
        """
        unique = list(dict.fromkeys(texts))
        cached = self._empty if len(unique) > 1 and "" in unique else None
        run = [text for text in unique if text != "" or cached is None]
        outputs = encode(list(run))
        xp = array_namespace(*outputs.values())
        if "" in run:
            row = run.index("")
            # copies: a view would keep the other rows in memory too
            self._empty = {name: xp.asarray(array[row : row + 1, ...], copy=True) for name, array in outputs.items()}
        elif cached is not None:
            run.append("")
            outputs = {name: xp.concat([array, cached[name]], axis=0) for name, array in outputs.items()}
        place = device(next(iter(outputs.values())))
        rows = xp.asarray([run.index(text) for text in texts], device=place)
        return {name: xp.take(array, rows, axis=0) for name, array in outputs.items()}
