"""What decoders see of prompts: spreading, caching, states in place of texts, and what each family refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kandrt.engines.errors import BundleError, InputError
from kandrt.runtime import Embeds, Kandinsky, PromptEmbeds
from kandrt.runtime.prompts import Texts, request_texts

from .oracle import spied, without_networks

Arguments = dict[str, Any]
BUNDLES = {"2.1": "bundle_2_1", "2.2": "bundle", "3": "bundle_3"}
SIZE: Arguments = {"height": 64, "width": 64}


# Texts of a request

SPREAD: dict[str, tuple[tuple[Any, Any, int | None, str | None], Texts]] = {
    "one": (("a", None, None, None), Texts(["a"], None)),
    "several": ((["a", "b"], ("x", "y"), None, None), Texts(["a", "b"], ["x", "y"])),
    "one negative": ((["a", "b"], "x", None, None), Texts(["a", "b"], ["x", "x"])),
    "no negative": ((["a", "b"], None, None, ""), Texts(["a", "b"], ["", ""])),
    "shared": ((["a", "b"], ["x", "y"], 4, ""), Texts(["a", "a", "b", "b"], ["x", "x", "y", "y"])),
    "one in a list": ((["a", "b"], ["x"], None, None), Texts(["a", "b"], ["x", "x"])),
    "a negative for each embedding": (("a", ["x", "y"], 2, ""), Texts(["a", "a"], ["x", "y"])),
    "one for all": (("a", "x", 3, ""), Texts(["a"] * 3, ["x"] * 3)),
}


@pytest.mark.parametrize("case", SPREAD)
def test_texts_of_a_request(case: str) -> None:
    arguments, expected = SPREAD[case]
    assert request_texts(*arguments) == expected


def test_texts_repeat_in_succession() -> None:
    assert Texts(["a", "b"], ["x", "y"]).repeated(2) == Texts(["a", "a", "b", "b"], ["x", "x", "y", "y"])
    assert Texts(["a"], None).repeated(2) == Texts(["a", "a"], None)
    assert len(Texts(["a", "b"], None)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], None, None, None), "prompt: expected at least one text"),
        ((["a", 3], None, None, None), "prompt: .* item 1 is int"),
        ((["a", "b"], None, 3, ""), "prompt: expected one, or as many as share 3 embeddings equally, found 2"),
        ((["a"] * 4, None, 2, ""), "prompt: expected one, or as many as share 2 embeddings equally, found 4"),
        (("a", 3, None, None), "negative_prompt: expected text or a list of texts, found int"),
        (("a", [], None, None), "negative_prompt: expected at least one text"),
        ((["a", "b"], ["x"] * 3, 4, ""), "negative_prompt: expected one, or one for each of 4 embeddings, found 3"),
        ((["a", "b"], ["x"] * 3, None, ""), "negative_prompt: expected one, or one for each of 2 prompts, found 3"),
    ],
)
def test_bad_texts(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        request_texts(*arguments)


# How often the text encoder runs


def encoded_rows(calls: list[Mapping[str, Any]]) -> list[int]:
    return [len(call["input_ids"]) for call in calls]


def test_each_text_is_encoded_once(bundle_3: Path) -> None:
    k, spies = spied(bundle_3, "prompt_encoder")
    calls = spies["prompt_encoder"].calls
    with k:
        k(["a", "b", "a"], negative_prompt="b", count=2, steps=1, **SIZE)
        assert encoded_rows(calls) == [2]
        k("a", steps=1, **SIZE)  # no negative prompt: zeros, and no empty text
        assert encoded_rows(calls) == [2, 1]
        k(["a", ""], steps=1, **SIZE)
        k("b", negative_prompt="", steps=1, **SIZE)  # the empty text is known by now
        assert encoded_rows(calls) == [2, 1, 2, 1]


def test_the_empty_text_is_encoded_once(bundle_2_1: Path) -> None:
    k, spies = spied(bundle_2_1, "prompt_encoder")
    embeds, calls = Embeds(np.ones((2, 48)), np.zeros((2, 48))), spies["prompt_encoder"].calls
    with k:
        for _ in range(2):
            k.decoder(embeds, prompt="a", steps=1, **SIZE)
        k.decoder(embeds, prompt=["a", "b"], negative_prompt="x", guidance_scale=1.0, steps=1, **SIZE)
    assert encoded_rows(calls) == [2, 1, 2]  # without guidance no negative prompt either


# States in place of prompts

STATES, MASK = np.ones((2, 3, 4), np.float32), np.array([[1, 1, 0], [1, 0, 0]])


def test_states_are_float32() -> None:
    states = PromptEmbeds(STATES.astype(np.float64), MASK.astype(bool), STATES.astype(np.float16), MASK)
    assert {array.dtype for array in vars(states).values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(states.attention_mask, MASK)
    assert len(states) == 2


def test_states_repeat_in_succession() -> None:
    states = PromptEmbeds(np.arange(24, dtype=np.float32).reshape(2, 3, 4), MASK).repeated(2)
    np.testing.assert_array_equal(states.prompt_embeds[:, 0, 0], [0, 0, 12, 12])
    np.testing.assert_array_equal(states.attention_mask, MASK[[0, 0, 1, 1]])
    assert states.negative_prompt_embeds is None
    negative, mask = states.negatives()
    assert (negative.shape, mask.shape) == ((4, 3, 4), (4, 3))
    assert not negative.any()
    assert not mask.any()


BAD_STATES: dict[str, tuple[tuple[Any, ...], str]] = {
    "no mask": ((STATES, None), "attention_mask: expected prompt_embeds and attention_mask together"),
    "no states": ((None, MASK), "prompt_embeds: expected prompt_embeds and attention_mask together"),
    "no negative mask": ((STATES, MASK, STATES), "negative_attention_mask: expected negative_prompt_embeds and"),
    "no negative states": ((STATES, MASK, None, MASK), "negative_prompt_embeds: expected negative_prompt_embeds and"),
    "axes": ((STATES[0], MASK), r"prompt_embeds: expected floats \[batch, tokens, width\], found float32\[3, 4\]"),
    "type": ((STATES.astype(int), MASK), r"prompt_embeds: expected floats .* found int64\[2, 3, 4\]"),
    "text": (("a", MASK), "prompt_embeds: expected floats"),
    "no rows": ((STATES[:0], MASK[:0]), "prompt_embeds: expected floats"),
    "nan": ((STATES * np.nan, MASK), "prompt_embeds: expected finite values, found NaN or infinity"),
    "shape of the mask": ((STATES, MASK[:1]), r"attention_mask: expected ones and zeros \[2, 3\], found int64\[1, 3\]"),
    "values of the mask": ((STATES, 2 * MASK), "attention_mask: expected ones and zeros"),
    "negative shape": (
        (STATES, MASK, STATES[:, :2], MASK[:, :2]),
        r"negative_prompt_embeds: expected the shape of prompt_embeds, \[2, 3, 4\], found \[2, 2, 4\]",
    ),
    "negative nan": ((STATES, MASK, STATES * np.inf, MASK), "negative_prompt_embeds: expected finite values"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states(case: str) -> None:
    arguments, message = BAD_STATES[case]
    with pytest.raises(InputError, match=message):
        PromptEmbeds(*arguments)


# What each family takes


def made(request: pytest.FixtureRequest, family: str) -> Kandinsky:
    """A bundle of that family, whose networks must not run."""
    return without_networks(request.getfixturevalue(BUNDLES[family]))


WIDE, WIDE_MASK = np.zeros((1, 5, 72), np.float32), np.ones((1, 5))
EMBEDS = {
    "2.1": Embeds(np.zeros((1, 48)), np.zeros((1, 48)), "kandinsky-2-1"),
    "2.2": Embeds(np.zeros((1, 32)), np.zeros((1, 32)), "kandinsky-2-2"),
}
REFUSED: list[tuple[str, Arguments, str]] = [
    ("2.2", {"prompt": "a"}, r"prompt: Kandinsky 2\.2's decoder reads no text, only image embeddings; call k\("),
    ("2.2", {"embeds": EMBEDS["2.2"], "prompt": "a"}, r"prompt: Kandinsky 2\.2's decoder reads no text"),
    ("2.2", {"embeds": EMBEDS["2.2"], "negative_prompt": "a"}, "negative_prompt: .* reads no text"),
    ("2.2", {"prompt": "a", "negative_prompt": "b"}, "prompt and negative_prompt: .* reads no text"),
    ("2.2", {}, r"embeds: .* found none; call k\(prompt\), or k\.decoder\(k\.prior\(prompt\)\)"),
    ("2.2", {"embeds": "a"}, "embeds: .* found a prompt; call"),
    ("2.2", {"embeds": ["a", "b"]}, "embeds: .* found list; call"),
    ("2.2", {"prompt_embeds": WIDE}, r"prompt_embeds: Kandinsky 2\.2's decoder does not take them; Kandinsky 3 does"),
    ("2.2", {"embeds": EMBEDS["2.1"]}, r"are from a prior of Kandinsky 2\.1, and this is a decoder of Kandinsky 2\.2"),
    ("2.1", {"embeds": EMBEDS["2.2"], "prompt": "a"}, r"of Kandinsky 2\.2, and this is a decoder of Kandinsky 2\.1"),
    ("2.1", {"embeds": EMBEDS["2.1"]}, r"prompt: Kandinsky 2\.1's decoder needs one beside the embeddings"),
    ("2.1", {"prompt": "a"}, r"embeds: Kandinsky 2\.1's decoder takes what k\.prior gives, .* found none"),
    ("3", {"embeds": EMBEDS["2.2"]}, r"embeds: Kandinsky 3's decoder takes a prompt and no image embeddings; call k\("),
    ("3", {"embeds": "a"}, "embeds: Kandinsky 3's decoder takes a prompt and no image embeddings"),
    ("3", {"prompt_embeds": WIDE}, "attention_mask: expected prompt_embeds and attention_mask together"),
    ("3", {"attention_mask": WIDE_MASK}, "prompt: Kandinsky 3's decoder needs one, or prompt_embeds"),
    (
        "3", {"prompt_embeds": WIDE[..., :40], "attention_mask": WIDE_MASK},
        "prompt_embeds: this decoder takes up to 128 tokens of 72 values, found . of 40",
    ),
    (
        "3", {"prompt_embeds": WIDE, "attention_mask": WIDE_MASK, "negative_prompt": "x"},
        "negative_prompt: with prompt_embeds, give negative_prompt_embeds and their mask",
    ),
    (
        "3", {"prompt_embeds": np.full_like(WIDE, np.nan), "attention_mask": WIDE_MASK},
        "prompt_embeds: expected finite values",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "arguments", "message"), REFUSED)
def test_what_a_decoder_refuses(
    request: pytest.FixtureRequest, family: str, arguments: Arguments, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        made(request, family).decoder(**arguments)


@pytest.mark.parametrize("family", ["2.1", "2.2"])
def test_states_in_place_of_a_prompt(request: pytest.FixtureRequest, family: str) -> None:
    k = made(request, family)
    message = rf"prompt_embeds and attention_mask: Kandinsky {family} does not take them; Kandinsky 3 does"
    for prompt in (None, "a"):
        with pytest.raises(InputError, match=message):
            k(prompt, prompt_embeds=WIDE, attention_mask=WIDE_MASK)
    with pytest.raises(InputError, match=rf"encode_prompt: Kandinsky {family}'s decoder does not take prompt_embeds"):
        k.encode_prompt("a")
    with pytest.raises(InputError, match="prompt: expected text or a list of texts, found NoneType"):
        k()


MASKED: Arguments = {"image": np.zeros((64, 64, 3), np.uint8), "mask": np.zeros((64, 64), np.uint8)}


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        (
            "2.1",
            {"hint": MASKED["image"]},
            r"2\.1 has no ControlNet; Kandinsky 2\.2 does \(kandinsky-2-2-controlnet-de",
        ),
        (
            "3",
            {"hint": MASKED["image"]},
            r"3 has no ControlNet; Kandinsky 2\.2 does \(kandinsky-2-2-controlnet-depth\)",
        ),
        ("3", MASKED, r"3 has no inpainting; Kandinsky 2\.1 does \(kandinsky-2-1-inpaint\) and Kandinsky 2\.2 does"),
    ],
)
def test_what_a_family_does_not_have(
    request: pytest.FixtureRequest, family: str, arguments: Arguments, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        made(request, family)("a", **arguments)


def test_rows_of_different_lengths_are_no_array() -> None:
    with pytest.raises(InputError, match=r"prompt_embeds: expected floats \[batch, tokens, width\], found object"):
        PromptEmbeds([[1.0], [1.0, 2.0]], [[1]])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"attention_mask: expected ones and zeros \[1, 2\], found object"):
        PromptEmbeds(np.zeros((1, 2, 3), np.float32), [[1], [1, 0]])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"image_embeds: expected floats \[batch, dim\], found object"):
        Embeds([[1.0], [1.0, 2.0]])  # type: ignore[arg-type]


def test_a_family_that_is_none() -> None:
    with pytest.raises(InputError, match=r"family: expected one of 'kandinsky-2-1', .* or None, found 'foo'"):
        Embeds(np.zeros((1, 4), np.float32), None, "foo")  # type: ignore[arg-type]


def test_more_tokens_than_an_engine_takes(bundle_3: Path) -> None:
    with (
        without_networks(bundle_3) as k,
        pytest.raises(InputError, match=r"takes up to 128 tokens of 72 values, found 200 of 72"),
    ):
        k(prompt_embeds=np.zeros((1, 200, 72), np.float32), attention_mask=np.ones((1, 200)))
