"""The exported tokenizer.json against transformers' tokenizers, and against the sentencepiece library."""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from kandrt import scripts
from kandrt.engines.errors import CheckpointError, MissingExtraError, OutputError
from kandrt.export.tokenizer import KINDS, export_tokenizer
from kandrt.runtime import tokenizer as runtime
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
    "broken tokenizer.json": (lambda at: (at / "tokenizer.json").write_text("{}"), "expected an object with a model"),
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


# Sentencepiece models

CONFIGS = Path(scripts.__file__).parent / "checkpoint-configs"
# Class -> checkpoint whose settings it has, file, tokens of a prompt, and the ids of special pieces in the file
UNIGRAMS: dict[str, tuple[str, str, int, dict[str, int]]] = {
    "XLMRobertaTokenizerFast": (
        "kandinsky-2-1", "sentencepiece.bpe.model", 77, {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    ),
    "T5Tokenizer": ("kandinsky-3", "spiece.model", 128, {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
}  # fmt: skip
CORPUS = [
    "a red cat, 4k photo of the robot",
    "рыжий кот на крыше, фото 4k",
    "東京タワーの写真 赤い猫",
    "قطة حمراء على السطح",
    "the quick brown fox jumps over the lazy dog",
]
PLAIN_TEXTS = [
    "",
    " ",
    "\t\n",
    *CORPUS,
    "  leading, and   trailing  ",
    "🙂 👩\u200d👩\u200d👧 no such pieces",
    "\x00\x01 a\x7f\u200b\u200e b\ufeff",
    "ﬁne ½ ① ﷺ Å cafe\u0301 a\u00a0b\u3000c",
    "▁ a▁b",
    "word " * 300,
    "x" * 1000,
]
SPECIAL_TEXTS = [
    "<s> a </s> <pad><mask> <unk> x <mask>",
    "a <extra_id_0> b<extra_id_99></s>x <pad>",
]


def train(corpus: list[str] = CORPUS, **options: Any) -> bytes:
    """A tiny sentencepiece model, unigram where `options` do not say otherwise."""
    written = io.BytesIO()
    settings = {"vocab_size": 150, "model_type": "unigram", "hard_vocab_limit": False, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 20), model_writer=written, minloglevel=2, **(settings | options)
    )
    return written.getvalue()


@pytest.fixture(scope="module")
def unigrams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each class, as checkpoints have it."""
    folders = {}
    for name, (checkpoint, file, _, ids) in UNIGRAMS.items():
        folders[name] = tmp_path_factory.mktemp("unigram") / "tokenizer"
        shutil.copytree(CONFIGS / checkpoint / "tokenizer", folders[name])
        (folders[name] / file).write_bytes(train(**ids))
        assert {each.name for each in folders[name].iterdir()} == {
            file, "tokenizer_config.json", "special_tokens_map.json"
        }  # fmt: skip
    return folders


@pytest.fixture
def unigram(unigrams: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(unigrams[name], tmp_path / "tokenizer"))


def saved(name: str, folder: Path, target: Path) -> Path:
    """The same tokenizer as transformers saves it, in a tokenizer.json."""
    getattr(transformers, name).from_pretrained(folder).save_pretrained(target)
    assert not list(target.glob("*.model"))
    return target


@pytest.mark.parametrize("form", ["sentencepiece", "tokenizer.json"])
@pytest.mark.parametrize("name", UNIGRAMS)
def test_ids_of_sentencepiece_models_are_those_of_transformers(
    name: str, form: str, unigram: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, length = unigram(name), UNIGRAMS[name][2]
    if form == "tokenizer.json":
        folder = saved(name, folder, tmp_path / "saved")
    oracle = getattr(transformers, name).from_pretrained(folder)
    texts = PLAIN_TEXTS + SPECIAL_TEXTS + some_texts()
    expected = oracle(texts, padding="max_length", truncation=True, max_length=length)
    info = export_tokenizer(folder, tmp_path / "out.json", name, vocab_size=oracle.vocab_size, length=length)
    assert (info.max_length, info.pad_token_id) == (length, oracle.pad_token_id)
    assert (info.bos_token_id, info.eos_token_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert info.vocab_size == len(oracle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", runtime.PromptTruncatedWarning)
        tokens = runtime.Tokenizer(tmp_path / "out.json", length)(texts)
    saved_as = Tokenizer.from_file(str(tmp_path / "out.json"))  # without being told the length
    for i, text in enumerate(texts):
        assert tokens.input_ids[i].tolist() == expected.input_ids[i] == saved_as.encode(text).ids, text
        assert tokens.attention_mask[i].tolist() == expected.attention_mask[i], text


@pytest.mark.parametrize("name", UNIGRAMS)
def test_ids_of_sentencepiece_models_are_those_of_its_library(
    name: str, unigram: Callable[[str], Path], tmp_path: Path
) -> None:
    """Those the encoders were trained on. Special tokens in a text are text for it, and not for transformers."""
    folder, (_, file, length, _) = unigram(name), UNIGRAMS[name]
    export_tokenizer(folder, tmp_path / "out.json", name, length=length)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out.json"))
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / file))
    for text in PLAIN_TEXTS:
        pieces = library.encode(text)
        if name == "T5Tokenizer":
            wanted = [*pieces[: length - 1], 1]
        else:  # fairseq's ids: one higher, and 3 for what is unknown
            wanted = [0, *(piece + 1 if piece else 3 for piece in pieces[: length - 2]), 2]
        encoding = tokenizer.encode(text)
        assert encoding.ids[: sum(encoding.attention_mask)] == wanted, text


@pytest.mark.parametrize("name", UNIGRAMS)
def test_what_is_cut_off_is_shown(name: str, unigram: Callable[[str], Path], tmp_path: Path) -> None:
    export_tokenizer(unigram(name), tmp_path / "out.json", name, length=8)
    with pytest.warns(runtime.PromptTruncatedWarning, match="longer than 8 tokens.*lazy dog'$"):
        runtime.Tokenizer(tmp_path / "out.json", 8)("the quick brown fox jumps over the lazy dog")


def test_every_class_is_read_like_its_twin(unigrams: dict[str, Path], small: Path, tmp_path: Path) -> None:
    folders = {KINDS[name]: folder for name, folder in unigrams.items()} | {KINDS["CLIPTokenizer"]: small}
    written: dict[Any, set[bytes]] = {kind: set() for kind in folders}
    for name, kind in KINDS.items():
        export_tokenizer(folders[kind], tmp_path / "out.json", name, length=77)
        written[kind].add((tmp_path / "out.json").read_bytes())
    assert [len(texts) for texts in written.values()] == [1, 1, 1]


def test_padding_on_the_left_is_kept_and_cutting_there_refused(unigram: Callable[[str], Path], tmp_path: Path) -> None:
    folder = unigram("T5Tokenizer")
    edit(folder / "tokenizer_config.json", padding_side="left")
    export_tokenizer(folder, tmp_path / "out.json", "T5Tokenizer", length=128)
    expected = transformers.T5Tokenizer.from_pretrained(folder)("a cat", padding="max_length", max_length=128)
    tokens = runtime.Tokenizer(tmp_path / "out.json", 128)("a cat")
    assert tokens.input_ids[0].tolist() == expected.input_ids
    assert tokens.attention_mask[0].tolist() == expected.attention_mask
    edit(folder / "tokenizer_config.json", truncation_side="left")
    with pytest.raises(CheckpointError, match="truncation_side: expected 'right', where prompts are cut, found 'left'"):
        export_tokenizer(folder, tmp_path / "out.json", "T5Tokenizer", length=128)


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """Change the sentencepiece file of a folder."""

    def apply(folder: Path) -> None:
        (file,) = folder.glob("*.model")
        file.write_bytes(change(file.read_bytes()))

    return apply


def without_rules(data: bytes) -> bytes:
    """Cut after the pieces, where a message of protobuf is whole."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    model.ClearField("normalizer_spec")
    return bytes(model.SerializeToString())


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
UNREADABLE = r"cannot read .*\.model as a sentencepiece model"
UNIGRAM_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (
        lambda at: [file.unlink() for file in at.glob("*.model")], r"lacks \S+\.model, and has no tokenizer\.json"
    ),
    "cut": (damaged(lambda data: data[: len(data) // 2]), f"{UNREADABLE}|cut short"),
    "cut between pieces": (damaged(without_rules), "is cut short: .* without rules of normalisation"),
    "pointer": (damaged(lambda _: POINTER), f"{UNREADABLE}.*Git LFS pointer"),
    "empty": (damaged(lambda _: b""), "is cut short: 0 bytes"),
    "other pieces": (damaged(lambda _: train(unk_id=1, bos_id=0)), "found a UNIGRAM model .* <s> <unk> </s>$"),
    "another model": (damaged(lambda _: train(model_type="bpe")), "expected a UNIGRAM model .* found a BPE model"),
    "no pad_token": (
        lambda at: [edit(at / f"{name}.json", pad_token=None) for name in ("tokenizer_config", "special_tokens_map")],
        "no pad_token in",
    ),
    "broken tokenizer.json": (lambda at: (at / "tokenizer.json").write_text("{"), "cannot read the tokenizer files"),
    "tokenizer.json that says nothing": (
        lambda at: (at / "tokenizer.json").write_text("{}"), "expected an object with a model"
    ),
    "tokenizer.json that is a list": (
        lambda at: (at / "tokenizer.json").write_text("[]"), "expected an object with a model"
    ),
    "tokenizer.json of CLIP": (
        lambda at: (at / "tokenizer.json").write_text('{"model": {"type": "BPE"}}'), "expected a Unigram model, .*BPE$"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", UNIGRAM_DAMAGE)
@pytest.mark.parametrize("name", UNIGRAMS)
def test_damaged_sentencepiece_files_are_refused(
    name: str, damage: str, unigram: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = unigram(name)
    apply, reason = UNIGRAM_DAMAGE[damage]
    apply(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        export_tokenizer(folder, tmp_path / "out.json", name, length=64)
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("name", UNIGRAMS)
def test_limits_of_the_text_encoder_are_checked(name: str, unigram: Callable[[str], Path], tmp_path: Path) -> None:
    folder = unigram(name)
    ids = len(getattr(transformers, name).from_pretrained(folder))
    with pytest.raises(CheckpointError, match=f"go up to {ids - 1}, and the text encoder's vocab_size is {ids - 1}"):
        export_tokenizer(folder, tmp_path / "out.json", name, vocab_size=ids - 1, length=64)
    with pytest.raises(CheckpointError, match="length is 65, the text encoder has 64 positions"):
        export_tokenizer(folder, tmp_path / "out.json", name, length=65, max_length=64)
    with pytest.raises(CheckpointError, match="model_max_length is 512, the text encoder has 64 positions"):
        export_tokenizer(folder, tmp_path / "out.json", name, max_length=64)
    with pytest.raises(CheckpointError, match=r"expected a tokenizer of class .* or T5TokenizerFast, found 'LlamaTok"):
        export_tokenizer(folder, tmp_path / "out.json", "LlamaTokenizer", length=64)


@pytest.mark.parametrize(
    ("package", "module"), [("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf.message")]
)
@pytest.mark.parametrize("name", UNIGRAMS)
def test_a_missing_package_is_named_where_it_is_needed(
    name: str, package: str, module: str, unigram: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    folder = unigram(name)
    with_json = saved(name, folder, tmp_path / "saved")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"reading .*\.model needs the package '{package}'.*kandrt\[export\]"):
        export_tokenizer(folder, tmp_path / "out.json", name, length=64)
    export_tokenizer(with_json, tmp_path / "out.json", name, length=64)
