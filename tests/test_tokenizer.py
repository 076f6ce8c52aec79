"""Token ids against transformers, warnings against the text that is lost, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from kandrt.engines.errors import BundleError, InputError
from kandrt.runtime.tokenizer import PromptTruncatedWarning, Tokenizer, check_prompts

LENGTH = 24
MERGES = [
    *("t h", "th e</w>", "a t</w>", "c at</w>", "r o", "b o", "ro bo", "robo t</w>", "i n", "in g</w>", "p h", "ph o"),
    *("t o</w>", "pho to</w>", "a n", "an d</w>", "' s</w>", "Ã ©", "Ã ©</w>", "f Ã©</w>", "c a", "ca fÃ©</w>"),
    *("ð Ł", "ðŁ ĺ", "ðŁĺ Ģ</w>"),
]

ODD_TEXTS = [
    "",
    " ",
    "a robot and the cat, 4k photo",
    "A ROBOT AND THE CAT'S PHOTO",
    "wow! !! !",
    "café cafe\u0301 naïve ÅÄÖ",  # composed and decomposed
    "😀 👩\u200d👩\u200d👧 🇩🇪",
    "  double  spaces\tand\n\nlines\r\n",
    "\x00\x01\x7f \u200b\ufeff\u00a0\u3000",
    "<|endoftext|>",
    "the<|startoftext|>cat <|ENDOFTEXT|> !",
    "İ ß ﬁ ǅ ΑΣ 日本 हिन्दी",
    "it's we'll they're 12345 6.7e8 &amp;",
    "the cat " * 40,
    "!" * 60,
    "😀" * 60,
    "robot" * 500,
]


@pytest.fixture(params=["<|endoftext|>", "!"], ids=["2.2", "2.1"])
def clip(request: pytest.FixtureRequest) -> Any:
    """transformers' CLIPTokenizer over a small vocabulary, padding as the family does."""
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # "!" is the first, id 0, as in CLIP's vocabulary
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=request.param)


def saved(tokenizer: Any, folder: Path) -> Path:
    """tokenizer.json with its padding section."""
    tokenizer.backend_tokenizer.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    file = folder / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(file))
    return file


@pytest.mark.filterwarnings("ignore::kandrt.runtime.tokenizer.PromptTruncatedWarning")
def test_clip_ids_are_those_of_transformers(clip: Any, tmp_path: Path) -> None:
    found = Tokenizer(saved(clip, tmp_path), LENGTH)(ODD_TEXTS)
    wanted = clip(ODD_TEXTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np")
    assert found.input_ids.dtype == found.attention_mask.dtype == np.int64
    assert found.input_ids.shape == (len(ODD_TEXTS), LENGTH)
    np.testing.assert_array_equal(found.input_ids, wanted["input_ids"])
    np.testing.assert_array_equal(found.attention_mask, wanted["attention_mask"])


def test_padding_token_differs_by_family_and_the_end_token_is_the_first_maximum(clip: Any, tmp_path: Path) -> None:
    tokens = Tokenizer(saved(clip, tmp_path), LENGTH)(["a robot", "the cat and a photo"])
    last = tokens.attention_mask.sum(1) - 1
    assert (tokens.input_ids[tokens.attention_mask == 0] == clip.pad_token_id).all()
    np.testing.assert_array_equal(tokens.input_ids.argmax(1), last)  # where CLIP takes its pooled output
    assert (tokens.input_ids[[0, 1], last] == clip.eos_token_id).all()


@pytest.mark.filterwarnings("ignore::kandrt.runtime.tokenizer.PromptTruncatedWarning")
def test_another_kind_of_tokenizer(tmp_path: Path) -> None:
    """A Unigram model with XLM-R's start and end tokens."""
    from transformers import PreTrainedTokenizerFast

    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁", -2.0), ("▁the", -3.0), ("cat", -3.5), ("▁cat", -3.0)] + [(letter, -9.0) for letter in "abcdehot"]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>"}
    reference = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    texts = ["", "the cat", "the hat?", "the cat " * 20]
    wanted = reference(texts, padding="max_length", max_length=8, truncation=True, return_tensors="np")
    found = Tokenizer(saved(reference, tmp_path), 8)(texts)
    np.testing.assert_array_equal(found.input_ids, wanted["input_ids"])
    np.testing.assert_array_equal(found.attention_mask, wanted["attention_mask"])


def test_length_of_the_file_does_not_matter(clip: Any, tmp_path: Path) -> None:
    file = saved(clip, tmp_path)
    data = json.loads(file.read_text())
    data["padding"]["strategy"] = {"Fixed": 3}
    data["truncation"] = {"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 1}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(data))
    text = ["the cat and the robot"]
    np.testing.assert_array_equal(Tokenizer(other, LENGTH)(text).input_ids, Tokenizer(file, LENGTH)(text).input_ids)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("the " * 22 + "robot And  the Café 😀", "robot And  the Café 😀"),
        ("THE\t\t" * 21 + "cat  robot", "robot"),
        ("cafe\u0301 " * 22 + "cafe\u0301 cat", "cafe\u0301 cat"),
    ],
)
def test_a_warning_shows_the_end_that_is_cut_off(clip: Any, tmp_path: Path, text: str, cut: str) -> None:
    tokenizer = Tokenizer(saved(clip, tmp_path), LENGTH)
    with pytest.warns(PromptTruncatedWarning) as caught:
        tokenizer(["the cat", text])
    (warning,) = caught
    assert str(warning.message).endswith(f": {cut!r}")
    assert Path(warning.filename) == Path(__file__)


def test_no_warning_for_a_prompt_that_just_fits(clip: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    tokens = Tokenizer(saved(clip, tmp_path), LENGTH)("the " * (LENGTH - 2))
    assert tokens.attention_mask.all()
    assert not recwarn.list


def test_a_very_long_cut_is_shown_in_part(clip: Any, tmp_path: Path) -> None:
    with pytest.warns(PromptTruncatedWarning, match="and 99622 more characters") as caught:
        Tokenizer(saved(clip, tmp_path), LENGTH)("t" * 22 + "t" * 99922)
    assert len(str(caught[0].message)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a valid tokenizer.json"),
        (b"{}", "not a valid tokenizer.json"),
        (b"\xff\xfe\x00", "not a valid tokenizer.json"),
        (b'{"version": "9", "model": {"type": "BPE", "vocab": {}, "merges": []}}', "not a valid tokenizer.json"),
        (None, "cannot be read"),
    ],
)
def test_damaged_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        Tokenizer(file, LENGTH)
    assert str(file) in str(caught.value)


def test_cut_short_file(clip: Any, tmp_path: Path) -> None:
    file = saved(clip, tmp_path)
    file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(BundleError, match=r"not a valid tokenizer\.json"):
        Tokenizer(file, LENGTH)


@pytest.mark.parametrize(
    ("padding", "message"), [(None, "must name the padding token"), ({"pad_id": 3}, "must have the id 3, found")]
)
def test_wrong_padding_section(clip: Any, tmp_path: Path, padding: Any, message: str) -> None:
    file = saved(clip, tmp_path)
    data = json.loads(file.read_text())
    data["padding"] = padding and data["padding"] | padding
    file.write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message):
        Tokenizer(file, LENGTH)


@pytest.mark.parametrize("length", [-1, 0, 2])
def test_length_without_room(clip: Any, tmp_path: Path, length: int) -> None:
    with pytest.raises(BundleError, match="leaves no room"):
        Tokenizer(saved(clip, tmp_path), length)


def test_check_prompts_accepts_text_and_lists() -> None:
    assert check_prompts("") == [""]
    assert check_prompts("a") == ["a"]
    assert check_prompts(("a", "b")) == ["a", "b"]
    prompts = ["a"]
    assert check_prompts(prompts) is not prompts


@pytest.mark.parametrize(
    ("prompts", "found"),
    [
        (None, "found NoneType"),
        (3, "found int"),
        (b"a", "found bytes"),
        ({"a"}, "found set"),
        ([], "found an empty list"),
        ((), "found an empty tuple"),
        (["a", 3, None], "item 1 is int; item 2 is NoneType"),
        (["a\ud800"], "item 0 holds a lone surrogate"),
    ],
)
def test_check_prompts_names_what_it_found(prompts: Any, found: str) -> None:
    with pytest.raises(InputError, match=f"^negative_prompt: .*{found}"):
        check_prompts(prompts, "negative_prompt")


def test_calling_checks_its_prompts(clip: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="item 0 is int"):
        Tokenizer(saved(clip, tmp_path), LENGTH)([1])  # type: ignore[list-item]
