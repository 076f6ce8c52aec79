"""Prompts to token ids, from a Hugging Face `tokenizer.json` and without transformers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ..engines.errors import BundleError, InputError

_SHOWN = 300
"""How many characters of cut-off text a warning shows."""


class PromptTruncatedWarning(UserWarning):
    """A prompt has more tokens than the text encoder takes; its end has no effect on the picture."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Both int64 [B, max_length]; `attention_mask` is 1 for the prompt with its start and end tokens, 0 for padding."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]


class Tokenizer:
    """Gives each prompt as exactly `max_length` tokens, padded or cut.

    The ids are those of the transformers tokenizer that the file was saved from, called with
    `padding="max_length", truncation=True`. The file says which token pads, and on which side: Kandinsky 2.2 pads with
    `<|endoftext|>`, Kandinsky 2.1's prior with `!`.

    Raises BundleError for a file that is missing or damaged, that has no padding token, or whose start and end tokens
    alone fill `max_length`.
    """

    def __init__(self, file: Path, max_length: int) -> None:
        try:
            # Not Tokenizer.from_file, which does not say whether the file is missing or malformed.
            backend = tokenizers.Tokenizer.from_str(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise BundleError(f"tokenizer {file}: cannot be read: {error.strerror or error}") from error
        except Exception as error:  # the Rust library raises bare Exception
            raise BundleError(f"tokenizer {file}: not a valid tokenizer.json: {error}") from error
        padding = backend.padding
        if padding is None:
            raise BundleError(f"tokenizer {file}: its 'padding' section must name the padding token, found none")
        if backend.id_to_token(padding["pad_id"]) != padding["pad_token"]:
            raise BundleError(
                f"tokenizer {file}: its padding token {padding['pad_token']!r} must have the id {padding['pad_id']}, "
                f"found {backend.token_to_id(padding['pad_token'])} in the vocabulary"
            )
        if max_length <= backend.num_special_tokens_to_add(is_pair=False):
            raise BundleError(f"tokenizer {file}: a length of {max_length} tokens leaves no room for a prompt")
        backend.enable_padding(**{**padding, "length": max_length, "pad_to_multiple_of": None})
        backend.enable_truncation(max_length)
        self.max_length = max_length
        self._backend = backend

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Encode B prompts; warns with PromptTruncatedWarning, which shows the text, where one is cut.

        Raises InputError as `check_prompts`.
        """
        prompts = check_prompts(prompts)
        encodings = self._backend.encode_batch(prompts)
        for prompt, encoding in zip(prompts, encodings, strict=True):
            if encoding.overflowing:
                cut = prompt[_start(encoding.overflowing[0]) :]
                shown = repr(cut) if len(cut) <= _SHOWN else f"{cut[:_SHOWN]!r} and {len(cut) - _SHOWN} more characters"
                warnings.warn(
                    PromptTruncatedWarning(
                        f"the prompt is longer than {self.max_length} tokens; this end of it was cut off: {shown}"
                    ),
                    stacklevel=2,
                )
        return Tokens(
            np.array([encoding.ids for encoding in encodings], np.int64),
            np.array([encoding.attention_mask for encoding in encodings], np.int64),
        )


def check_prompts(prompts: object, name: str = "prompt") -> list[str]:
    """A str as a list of one; a list or tuple of str, not empty, as a list.

    Raises InputError, which begins with `name`, for anything else and for text that UTF-8 cannot hold.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise InputError(f"{name}: expected text or a list of texts, found {type(prompts).__name__}")
    if not prompts:
        raise InputError(f"{name}: expected at least one text, found an empty {type(prompts).__name__}")
    problems = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            problems.append(f"item {index} is {type(prompt).__name__}")
        elif any("\ud800" <= character <= "\udfff" for character in prompt):
            problems.append(f"item {index} holds a lone surrogate, which is not a character: {prompt[:_SHOWN]!r}")
    if problems:
        raise InputError(f"{name}: expected text or a list of texts, but {'; '.join(problems)}")
    return list(prompts)


def _start(overflow: tokenizers.Encoding) -> int:
    """Where in the prompt the cut-off part begins, in characters."""
    added = zip(overflow.sequence_ids, overflow.offsets, strict=True)
    return min(start for sequence, (start, _) in added if sequence is not None)
