"""Vocabularies of random checkpoints: CLIP's own, and the layouts of XLM-R's and T5's filled with CLIP's words."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

MERGES = Path(__file__).with_name("checkpoint-configs") / "clip_merges.txt.gz"
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
END_OF_WORD, METASPACE = "</w>", "▁"
PRINTABLE = tuple(chr(code) for code in range(ord("!"), ord("~") + 1))


@dataclass(frozen=True)
class Layout:
    """A sentencepiece vocabulary: the tokens before and after the pieces, and templates of one text and of a pair.

    `spare` is how many of the text encoder's ids have no token.
    """

    first: tuple[str, ...]
    last: tuple[str, ...]
    single: str
    pair: str
    spare: int = 0


XLM_ROBERTA = Layout(
    first=("<s>", "<pad>", "</s>", "<unk>"), last=("<mask>",), single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>"
)
T5 = Layout(
    first=("<pad>", "</s>", "<unk>"),
    last=tuple(f"<extra_id_{index}>" for index in reversed(range(100))),
    single="$A </s>",
    pair="$A </s> $B </s>",
    spare=28,  # the published vocab_size is 32,100 tokens rounded up to a multiple of 128
)


def write_clip(folder: Path, vocab_size: int) -> None:
    """Write CLIP's merges.txt, its first merges that `vocab_size` has room for, and the vocab.json that follows."""
    symbols, (version, *pairs) = byte_symbols(), _merges()
    pairs = pairs[: vocab_size - 2 * len(symbols) - len(SPECIAL_TOKENS)]
    joined = (pair.replace(" ", "") for pair in pairs)
    tokens = (*symbols, *(f"{symbol}{END_OF_WORD}" for symbol in symbols), *joined, *SPECIAL_TOKENS)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    text = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_bytes(text.encode())
    (folder / "merges.txt").write_bytes("\n".join([version, *pairs, ""]).encode())


def write_unigram(layout: Layout, folder: Path, vocab_size: int) -> None:
    """Write a tokenizer.json with all pieces, or the first that `vocab_size` has room for.

    Source: transformers 5.23 `XLMRobertaTokenizer` and `T5Tokenizer`, without the table of the published
    sentencepiece models that normalises characters.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    room = vocab_size - len(layout.first) - len(layout.last) - layout.spare
    words = list(islice(pieces(), room))
    # few pieces are likelier than many, and of as many those that CLIP merged first
    scored = [(word, round(-10 - rank / len(words), 6)) for rank, word in enumerate(words)]
    vocabulary = [*((token, 0.0) for token in layout.first), *scored, *((token, 0.0) for token in layout.last)]
    tokenizer: Any = Tokenizer(models.Unigram(vocabulary, unk_id=layout.first.index("<unk>"), byte_fallback=False))
    spaces: Mapping[str, Any] = {"replacement": METASPACE, "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    )
    tokenizer.decoder = decoders.Metaspace(**spaces)
    tokenizer.add_special_tokens(
        [AddedToken(text, lstrip=text == "<mask>", normalized=False) for text in (*layout.first, *layout.last)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=layout.single,
        pair=layout.pair,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in layout.first if token in layout.pair],
    )
    (folder / "tokenizer.json").write_bytes(tokenizer.to_str().encode())


# How a tokenizer class's files are written for a text encoder's vocab_size
VOCABULARIES: Mapping[str, Callable[[Path, int], None]] = {
    "CLIPTokenizer": write_clip,
    "XLMRobertaTokenizerFast": partial(write_unigram, XLM_ROBERTA),
    "T5Tokenizer": partial(write_unigram, T5),
}


def pieces() -> Iterator[str]:
    """Give a sentencepiece vocabulary: a space, printable characters, CLIP's words after a space, their characters."""
    given: set[str] = set()
    for word in (METASPACE, *PRINTABLE, *_words()):
        # a word's characters before it: a vocabulary that is cut knows those of all its words
        for piece in (*word, word):
            if piece not in given:
                given.add(piece)
                yield piece


def _words() -> Iterator[str]:
    """Give CLIP's merged tokens as text, without those that are parts of characters."""
    byte_of = _bytes_of_symbols()
    _, *pairs = _merges()
    for token in (pair.replace(" ", "") for pair in pairs):
        try:
            word = bytes(byte_of[symbol] for symbol in token.removesuffix(END_OF_WORD)).decode()
        except UnicodeDecodeError:
            continue
        yield METASPACE + word if token.endswith(END_OF_WORD) else word


def byte_symbols() -> list[str]:
    """Give the characters that stand for bytes in byte-level BPE: `bytes_to_unicode` of openai/CLIP, in its order."""
    return list(_bytes_of_symbols())


def _bytes_of_symbols() -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [code for code in range(256) if code not in printable]
    return {chr(code): code for code in printable} | {chr(256 + index): code for index, code in enumerate(others)}


def _merges() -> list[str]:
    """Read CLIP's merges.txt: a line with its version, and the pairs."""
    return gzip.decompress(MERGES.read_bytes()).decode().splitlines()
