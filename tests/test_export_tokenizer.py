"""The exported tokenizer.json against transformers' CLIP tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from kandrt.engines.errors import CheckpointError, OutputError
from kandrt.export.tokenizer import export_tokenizer
from kandrt.scripts.random_checkpoint import make_checkpoint

SMALL_VOCABULARY = 512 + 480 + 2  # bytes, bytes that end a word, merges, special tokens


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prior")
    return make_checkpoint("kandinsky-2-2-prior", root / "prior", small=True) / "tokenizer"


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "tokenizer"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def some_texts() -> list[str]:
    generator = np.random.default_rng(0)
    ranges = [(32, 127), (0x80, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1F700)]

    def made() -> str:
        low, high = ranges[generator.integers(len(ranges))]
        return "".join(map(chr, generator.integers(low, high, generator.integers(1, 120))))

    return [
        "",
        " ",
        "a red cat, 4k photo",
        "Don't  I'll\n'S 123,456 -- \t!?",
        "café cafe\u0301 NAÏVE ﬃ 東京 🙂",
        "<|endoftext|> x <|startoftext|>!<|ENDOFTEXT|>",
        "word " * 200,
        *(" ".join(made() for _ in range(3)) for _ in range(40)),
    ]


@pytest.mark.parametrize("form", ["vocab and merges", "tokenizer.json"])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])  # of Kandinsky 2.2 and of the prior of 2.1
def test_ids_are_those_of_transformers(form: str, pad: str, folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(folder / name, pad_token=pad)
    oracle = CLIPTokenizer.from_pretrained(folder)
    if form == "tokenizer.json":
        folder = tmp_path / "saved"
        oracle.save_pretrained(folder)
        assert not (folder / "vocab.json").exists()
    info = export_tokenizer(folder, tmp_path / "out.json", vocab_size=SMALL_VOCABULARY, max_length=77)
    assert (info.max_length, info.pad_token_id) == (77, oracle.pad_token_id)
    assert (info.bos_token_id, info.eos_token_id) == (SMALL_VOCABULARY - 2, SMALL_VOCABULARY - 1)
    assert info.vocab_size == SMALL_VOCABULARY
    tokenizer = Tokenizer.from_file(str(tmp_path / "out.json"))
    texts = some_texts()
    expected = oracle(texts, padding="max_length", truncation=True)
    for text, ids, mask in zip(texts, expected.input_ids, expected.attention_mask, strict=True):
        encoding = tokenizer.encode(text)
        assert encoding.ids == ids, text
        assert encoding.attention_mask == mask
        assert len(ids) == 77


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no vocabulary": (lambda at: (at / "vocab.json").unlink(), r"lacks vocab\.json, and has no tokenizer\.json"),
    "no merges": (lambda at: (at / "merges.txt").unlink(), r"lacks merges\.txt"),
    "broken vocabulary": (lambda at: (at / "vocab.json").write_text('{"a": '), "cannot read the tokenizer files"),
    "vocabulary is a list": (lambda at: (at / "vocab.json").write_text("[]"), "expected an object from tokens to ids"),
    "merges of another": (lambda at: (at / "merges.txt").write_text("#version\nzq qz\n"), "the merge 'zq qz'"),
    "broken tokenizer.json": (lambda at: (at / "tokenizer.json").write_text("{}"), "cannot read the tokenizer files"),
    "no length": (lambda at: edit(at / "tokenizer_config.json", model_max_length=None), "expected a model_max_length"),
    "too long": (lambda at: edit(at / "tokenizer_config.json", model_max_length=78), "is 78, the text encoder has 77"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tokenizer_files_are_refused(damage: str, folder: Path, tmp_path: Path) -> None:
    apply, reason = DAMAGE[damage]
    apply(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        export_tokenizer(folder, tmp_path / "out.json", max_length=77)
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "out.json").exists()


def test_a_tokenizer_with_more_ids_than_the_text_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="go up to 993, and the text encoder's vocab_size is 993"):
        export_tokenizer(folder, tmp_path / "out.json", vocab_size=SMALL_VOCABULARY - 1)


def test_a_place_that_cannot_be_written_is_an_output_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        export_tokenizer(folder, tmp_path / "absent" / "out.json")
