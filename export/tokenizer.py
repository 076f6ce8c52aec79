"""From a checkpoint's tokenizer folder to one `tokenizer.json` that the `tokenizers` library reads alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..engines.errors import CheckpointError, MissingExtraError
from ..engines.files import atomic_write

MAX_LENGTH = 1_000_000  # transformers says 1e30 where tokenizer_config.json has no model_max_length


@dataclass(frozen=True)
class Kind:
    """How a tokenizer is read.

    `model` is what a tokenizer.json names it, `files` hold the vocabulary where there is no tokenizer.json, and `check`
    raises CheckpointError unless those in a folder are whole.
    """

    transformers_class: str
    model: str
    files: tuple[str, ...]
    check: Callable[[Path], None]


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
    folder: Path,
    path: Path,
    class_name: str = "CLIPTokenizer",
    *,
    vocab_size: int | None = None,
    max_length: int | None = None,
    length: int | None = None,
) -> TokenizerInfo:
    """Write `path`, whose encodings are the ids of transformers' tokenizer, cut and padded to `length` tokens.

    `folder` holds tokenizer_config.json and either tokenizer.json or the vocabulary files of `class_name`, which is
    that of model_index.json. `length` None is the model_max_length of tokenizer_config.json. `vocab_size` and
    `max_length` are the text encoder's number of ids and of positions, to be checked against.

    Raises CheckpointError for files that are missing, damaged, or do not fit the text encoder or each other;
    MissingExtraError where a sentencepiece file cannot be read for want of a package; OutputError where `path` cannot
    be written.
    """
    if class_name not in KINDS:
        raise CheckpointError(f"{folder}: expected a tokenizer of class {' or '.join(KINDS)}, found {class_name!r}")
    check_files(folder, class_name)
    tokenizer = read_tokenizer(folder, KINDS[class_name])
    name, length = ("model_max_length", tokenizer.model_max_length) if length is None else ("length", length)
    pad, size = tokenizer.pad_token_id, tokenizer.backend_tokenizer.get_vocab_size()
    if not isinstance(length, int) or not 2 < length < MAX_LENGTH:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: expected a {name}, found {length!r}")
    if max_length is not None and length > max_length:
        raise CheckpointError(f"{folder}: {name} is {length}, the text encoder has {max_length} positions")
    if pad is None:
        raise CheckpointError(f"{folder}: no pad_token in tokenizer_config.json or special_tokens_map.json")
    if tokenizer.truncation_side != "right":
        raise CheckpointError(
            f"{folder}: truncation_side: expected 'right', where prompts are cut, found {tokenizer.truncation_side!r}"
        )
    highest = max(tokenizer.get_vocab().values())
    if vocab_size is not None and highest >= vocab_size:
        raise CheckpointError(
            f"{folder}: token ids go up to {highest}, and the text encoder's vocab_size is {vocab_size}: the tokenizer "
            "and the text encoder are not from one checkpoint"
        )
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=pad, pad_token=tokenizer.pad_token, direction=tokenizer.padding_side)
    with atomic_write(path) as file:
        file.write(backend.to_str().encode())
    return TokenizerInfo(path, length, pad, tokenizer.bos_token_id, tokenizer.eos_token_id, size)


def check_files(folder: Path, class_name: str) -> None:
    """Raise CheckpointError unless the vocabulary is there and whole; transformers would go on with an empty one."""
    kind, file = KINDS[class_name], folder / "tokenizer.json"
    if not file.is_file():
        if missing := [name for name in kind.files if not (folder / name).is_file()]:
            raise CheckpointError(f"{folder} lacks {' and '.join(missing)}, and has no tokenizer.json instead")
        kind.check(folder)
        return
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the tokenizer files of {folder}: {error}") from error
    match content:
        case {"model": {"type": str(found)}} if found == kind.model:
            return
        case {"model": {"type": str(found)}}:
            raise CheckpointError(f"{file}: expected a {kind.model} model, as a {class_name} has, found {found}")
        case {"model": dict()}:  # that of old files has no type
            return
    raise CheckpointError(f"{file}: expected an object with a model, as the tokenizers library writes it")


def check_merges(folder: Path) -> None:
    """Raise CheckpointError unless vocab.json and merges.txt are whole and belong together."""
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


def check_sentencepiece(folder: Path, name: str, first: tuple[str, ...]) -> None:
    """Raise CheckpointError unless file `name` is a whole unigram model whose pieces begin with `first`.

    transformers takes the ids of special tokens for granted, and a file that it cannot read for one of another format.
    """
    file = folder / name
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        package = "protobuf" if (error.name or "").startswith("google") else "sentencepiece"
        raise MissingExtraError(f"reading {file}", package, "export") from error
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    try:
        data = file.read_bytes()
        model.ParseFromString(data)
    except (OSError, DecodeError) as error:
        raise CheckpointError(
            f"cannot read {file} as a sentencepiece model ({error}); it may be damaged, or a Git LFS pointer: fetch it "
            "again"
        ) from error
    if not model.HasField("normalizer_spec"):  # it stands after the pieces
        raise CheckpointError(f"{file} is cut short: {len(data)} bytes, without rules of normalisation; fetch it again")
    found = tuple(piece.piece for piece in model.pieces[: len(first)])
    if found != first or model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        kind = model.trainer_spec.ModelType.Name(model.trainer_spec.model_type)
        raise CheckpointError(
            f"{file}: expected a UNIGRAM model whose pieces begin with {' '.join(first)}, found a {kind} model whose "
            f"pieces begin with {' '.join(found)}"
        )


def read_tokenizer(folder: Path, kind: Kind) -> Any:
    """The tokenizer as transformers has it."""
    import transformers

    try:
        return getattr(transformers, kind.transformers_class).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"cannot read the tokenizer files of {folder}: {error}") from error


def unigram(transformers_class: str, file: str, *first: str) -> Kind:
    """A tokenizer whose vocabulary is a sentencepiece model that begins with the pieces `first`."""
    return Kind(transformers_class, "Unigram", (file,), partial(check_sentencepiece, name=file, first=first))


CLIP = Kind("CLIPTokenizerFast", "BPE", ("vocab.json", "merges.txt"), check_merges)
XLM_ROBERTA = unigram("XLMRobertaTokenizerFast", "sentencepiece.bpe.model", "<unk>", "<s>", "</s>")
T5 = unigram("T5TokenizerFast", "spiece.model", "<pad>", "</s>", "<unk>")
# Class in model_index.json -> how it is read
KINDS: Mapping[str, Kind] = {
    "CLIPTokenizer": CLIP,
    "CLIPTokenizerFast": CLIP,
    "XLMRobertaTokenizer": XLM_ROBERTA,
    "XLMRobertaTokenizerFast": XLM_ROBERTA,
    "T5Tokenizer": T5,
    "T5TokenizerFast": T5,
}
