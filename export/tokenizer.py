"""From a checkpoint's tokenizer folder to one `tokenizer.json` that the `tokenizers` library reads alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.errors import CheckpointError
from ..engines.files import atomic_write

MAX_LENGTH = 1_000_000  # transformers says 1e30 where tokenizer_config.json has no model_max_length


@dataclass(frozen=True)
class TokenizerInfo:
    """What was written: the length of every encoding, special ids (None: no such token), and the number of ids."""

    path: Path
    max_length: int
    pad_token_id: int
    bos_token_id: int | None
    eos_token_id: int | None
    vocab_size: int


def export_tokenizer(
    folder: Path, path: Path, *, vocab_size: int | None = None, max_length: int | None = None
) -> TokenizerInfo:
    """Write `path`, whose encodings are the ids of transformers' CLIP tokenizer, cut and padded to model_max_length.

    `folder` holds tokenizer_config.json and either vocab.json and merges.txt or tokenizer.json. `vocab_size` and
    `max_length` are the text encoder's `vocab_size` and `max_position_embeddings`, to be checked against.

    Raises CheckpointError for files that are missing, damaged, or do not fit the text encoder or each other;
    OutputError where `path` cannot be written.
    """
    _check_files(folder)
    tokenizer = _load(folder)
    length, pad, size = tokenizer.model_max_length, tokenizer.pad_token_id, tokenizer.backend_tokenizer.get_vocab_size()
    if not isinstance(length, int) or not 2 < length < MAX_LENGTH:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: expected a model_max_length, found {length!r}")
    if max_length is not None and length > max_length:
        raise CheckpointError(f"{folder}: model_max_length is {length}, the text encoder has {max_length} positions")
    if pad is None:
        raise CheckpointError(f"{folder}: no pad_token in tokenizer_config.json or special_tokens_map.json")
    highest = max(tokenizer.get_vocab().values())
    if vocab_size is not None and highest >= vocab_size:
        raise CheckpointError(
            f"{folder}: token ids go up to {highest}, and the text encoder's vocab_size is {vocab_size}: the tokenizer "
            "and the text encoder are not from one checkpoint"
        )
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=pad, pad_token=tokenizer.pad_token)
    with atomic_write(path) as file:
        file.write(backend.to_str().encode())
    return TokenizerInfo(path, length, pad, tokenizer.bos_token_id, tokenizer.eos_token_id, size)


def _check_files(folder: Path) -> None:
    """Raise CheckpointError unless the vocabulary is there and whole; transformers would go on with an empty one."""
    if (folder / "tokenizer.json").is_file():
        return
    if missing := [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {' and '.join(missing)}, and has no tokenizer.json instead")
    try:
        vocab = json.loads((folder / "vocab.json").read_bytes())
        merges = (folder / "merges.txt").read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the tokenizer files of {folder}: {error}") from error
    if not isinstance(vocab, dict) or not all(isinstance(index, int) for index in vocab.values()):
        raise CheckpointError(f"{folder / 'vocab.json'}: expected an object from tokens to ids")
    for line in merges:
        pair = line.split(" ")
        if line and not line.startswith("#version") and (len(pair) != 2 or "".join(pair) not in vocab):
            raise CheckpointError(f"{folder}: the merge {line!r} of merges.txt does not give a token of vocab.json")


def _load(folder: Path) -> Any:
    from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]  # release 5 exports it dynamically

    try:
        return CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"cannot read the tokenizer files of {folder}: {error}") from error
