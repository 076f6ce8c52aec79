"""Reading config.json strictly: a field that would change the result is read or refused, never ignored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...engines.errors import CheckpointError

# Bookkeeping of diffusers and transformers, and sizes that only choose a pipeline's defaults.
BOOKKEEPING = {
    "sample_size",
    "dropout",
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
}
# Fields of a transformers encoder's config that leave what it computes as it is: what a file was made by and for,
# training, and generating text.
TRANSFORMERS_BOOKKEEPING = (
    "architectures", "attention_probs_dropout_prob", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout",
    "diversity_penalty", "dropout_rate", "dtype", "eos_token_id", "hidden_dropout_prob", "id2label",
    "initializer_factor", "initializer_range", "label2id", "length_penalty", "max_length", "min_length", "modelBase",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_past", "pad_token_id", "problem_type", "repetition_penalty", "return_dict",
    "task_specific_params", "temperature", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k",
    "top_p", "torch_dtype", "transformers_version", "typical_p", "use_cache", "use_return_dict",
)  # fmt: skip


def check_config(
    network: str,
    config: Mapping[str, Any],
    read: Collection[str],
    fixed: Mapping[str, Collection[Any]],
    required: Collection[str] = (),
) -> None:
    """Raise CheckpointError that names every field of `config` that this network cannot honour.

    `read` are the fields that the caller uses, `fixed` those that may only have the values given (absent means the
    first of them), `required` those that must be present. A field that is in none of them is accepted only where it
    says nothing (null, false, empty, or bookkeeping).
    """
    problems = [f"{field}: missing" for field in required if field not in config]
    for field, value in config.items():
        if field in read or field in BOOKKEEPING or field.startswith("_"):
            continue
        if field in fixed:
            if value not in fixed[field]:
                problems.append(f"{field}: expected {' or '.join(map(repr, fixed[field]))}, found {value!r}")
        elif value is not None and value is not False and value not in ([], {}):
            problems.append(f"{field}: unknown field, found {value!r}")
    if problems:
        raise CheckpointError(f"{network}: unsupported config: {'; '.join(problems)}")


def check_sizes(network: str, config: Mapping[str, Any], numbers: Collection[str], lists: Collection[str] = ()) -> None:
    """Raise CheckpointError that names every field of the wrong type; absent ones pass.

    A field of `numbers` is a whole number above 0, one of `lists` a list of them, and one in both may be either.
    """
    problems = []
    for field in sorted({*numbers, *lists} & config.keys()):
        value, kinds = config[field], []
        if field in numbers:
            kinds.append(("a whole number above 0", [value]))
        if field in lists:
            kinds.append(("a list of whole numbers above 0", list(value) if isinstance(value, list | tuple) else []))
        if not any(sizes and all(type(size) is int and size > 0 for size in sizes) for _, sizes in kinds):
            problems.append(f"{field}: expected {' or '.join(kind for kind, _ in kinds)}, found {value!r}")
    if problems:
        raise CheckpointError(f"{network}: {'; '.join(problems)}")


def check_lengths(network: str, **lists: Collection[Any]) -> None:
    """Raise CheckpointError unless all `lists` have one length."""
    if len({len(values) for values in lists.values()}) > 1:
        found = ", ".join(f"{field} has {len(values)}" for field, values in lists.items())
        raise CheckpointError(f"{network}: config fields must have one entry a level: {found}")


def check_divisible(network: str, divisor_field: str, divisor: int, **channels: int) -> None:
    """Raise CheckpointError unless `divisor` divides each of `channels`."""
    bad = [f"{field} = {value}" for field, value in channels.items() if divisor < 1 or value % divisor]
    if bad:
        raise CheckpointError(f"{network}: {divisor_field} = {divisor} does not divide {', '.join(bad)}")
