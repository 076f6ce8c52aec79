"""What a decoder that is conditioned by text sees of its prompts: Kandinsky 2.1 beside image embeddings, 3 alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.errors import InputError
from ..engines.manifest import PromptRecord
from ..engines.session import Array
from .components import Components
from .embeds import as_array
from .sampling import check_finite
from .texts import TextCache
from .tokenizer import Tokenizer, check_prompts
from .transfer import to_host

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """States of prompts, in place of the prompts themselves (diffusers 0.42.1 `Kandinsky3Pipeline.encode_prompt`).

    prompt_embeds float32 [B, N, W], attention_mask [B, N], 1 for a token and 0 for padding, whose states are zero; the
    negative ones likewise, or None for those of no negative prompt: zeros. `k(**vars(embeds))` paints them.

    Raises InputError for arrays that are not finite, or do not fit each other.
    """

    prompt_embeds: F32
    attention_mask: F32
    negative_prompt_embeds: F32 | None = None
    negative_attention_mask: F32 | None = None

    def __post_init__(self) -> None:
        pairs = [("prompt_embeds", "attention_mask"), ("negative_prompt_embeds", "negative_attention_mask")]
        if self.negative_prompt_embeds is None and self.negative_attention_mask is None:
            pairs.pop()
        for pair in pairs:
            lacking = [name for name in pair if getattr(self, name) is None]
            if lacking:
                raise InputError(f"{' and '.join(lacking)}: expected {' and '.join(pair)} together")
            states, mask = pair
            object.__setattr__(self, states, checked_states(states, getattr(self, states)))
            object.__setattr__(self, mask, checked_mask(mask, getattr(self, mask), getattr(self, states).shape[:2]))
        negative = self.negative_prompt_embeds
        if negative is not None and negative.shape != self.prompt_embeds.shape:
            raise InputError(
                f"negative_prompt_embeds: expected the shape of prompt_embeds, {list(self.prompt_embeds.shape)}, "
                f"found {list(negative.shape)}"
            )

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def repeated(self, count: int) -> PromptEmbeds:
        """Each row `count` times in succession."""
        return PromptEmbeds(
            *(None if each is None else np.repeat(each, count, axis=0) for each in vars(self).values())  # type: ignore[arg-type]
        )

    def negatives(self) -> tuple[F32, F32]:
        """Negative states and mask; zeros where there are none."""
        if self.negative_prompt_embeds is None or self.negative_attention_mask is None:
            return np.zeros_like(self.prompt_embeds), np.zeros_like(self.attention_mask)
        return self.negative_prompt_embeds, self.negative_attention_mask


@dataclass(frozen=True)
class Texts:
    """Prompts and negative prompts of a request, one a picture, checked; negative None for zeros."""

    positive: Sequence[str]
    negative: Sequence[str] | None

    def __len__(self) -> int:
        return len(self.positive)

    def repeated(self, count: int) -> Texts:
        """Each text `count` times in succession."""

        def each(texts: Sequence[str]) -> list[str]:
            return [text for text in texts for _ in range(count)]

        return Texts(each(self.positive), None if self.negative is None else each(self.negative))


class PromptReader:
    """Prompts to the text inputs of a decoder's context graph."""

    def __init__(self, components: Components, record: PromptRecord) -> None:
        self._components, self._record = components, record
        self._cache = TextCache()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = self._record.tokenizer
        return Tokenizer(self._components.bundle.path(tokenizer.file), tokenizer.max_length)

    def embeds(self, texts: Texts) -> PromptEmbeds:
        """States of prompts with their masks, cut to the longest of them and one more token.

        The negative ones have as many tokens; what of a negative prompt is longer is cut off.
        Source: diffusers 0.42.1 `Kandinsky3Pipeline.encode_prompt`.
        """
        every = [*texts.positive, *(texts.negative or ())]
        encoded, rows = self.encoded(every), len(texts)
        states, mask = encoded["text_states"], encoded["text_mask"]
        length = int(mask[:rows].sum(axis=1).max()) + 1
        states, mask = states[:, :length], mask[:, :length]
        if texts.negative is None:
            return PromptEmbeds(states, mask)
        return PromptEmbeds(states[:rows], mask[:rows], states[rows:], mask[rows:])

    def encoded(self, texts: Sequence[str]) -> dict[str, F32]:
        """What the text encoder gives of `texts`, a row each, and text_mask: 1 for a token, 0 for padding."""

        def encode(run: list[str]) -> dict[str, Array]:
            tokens = self._tokenizer(run)
            mask = tokens.attention_mask.astype(np.float32)
            with self._components.stage("prompt encoder", self._record.encoder):
                outputs = self._components.run(self._record.encoder, input_ids=tokens.input_ids, text_mask=mask)
                found = {name: to_host(array) for name, array in outputs.items()}
                for array in found.values():
                    check_finite(array)
            return {**found, "text_mask": mask}

        return self._cache(texts, encode)


def request_texts(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    rows: int | None,
    empty_text: str | None,
) -> Texts:
    """The texts of a request of `rows` rows, as many as there are prompts where that is None.

    One prompt serves all rows, of several each an equal share; likewise negative prompts. Raises InputError.
    """
    positive = check_prompts(prompt)
    rows = len(positive) if rows is None else rows
    if rows % len(positive):
        raise InputError(f"prompt: expected one, or as many as share {rows} embeddings equally, found {len(positive)}")
    if negative_prompt is None:
        negative = None if empty_text is None else [empty_text]
    else:
        negative = check_prompts(negative_prompt, "negative_prompt")
        if len(negative) not in (1, len(positive), rows):
            each = f"{len(positive)} prompts" if rows == len(positive) else f"{rows} embeddings"
            raise InputError(f"negative_prompt: expected one, or one for each of {each}, found {len(negative)}")

    def spread(texts: list[str]) -> list[str]:
        return [text for text in texts for _ in range(rows // len(texts))]

    return Texts(spread(positive), None if negative is None else spread(negative))


def checked_states(name: str, value: Any) -> F32:
    """`value` as float32 [B, N, W]; InputError where it is not that, or not finite."""
    array = as_array(value)
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind != "f":
        raise InputError(f"{name}: expected floats [batch, tokens, width], found {array.dtype}{list(array.shape)}")
    if not np.isfinite(array).all():
        raise InputError(f"{name}: expected finite values, found NaN or infinity")
    return array.astype(np.float32)


def checked_mask(name: str, value: Any, shape: tuple[int, ...]) -> F32:
    """`value` as float32 of ones and zeros in `shape`; InputError where it is not that."""
    array = as_array(value)
    if array.shape != shape or array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise InputError(f"{name}: expected ones and zeros {list(shape)}, found {array.dtype}{list(array.shape)}")
    return array.astype(np.float32)
