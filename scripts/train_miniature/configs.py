"""How small the miniature is: the published configurations with other numbers, and a tokenizer of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..miniature.captions import caption
from ..miniature.trials import SIDE
from ..miniature.world import random_scene
from ..random_checkpoint import CONFIGS, PRIOR
from ..random_tokenizers import SPECIAL_TOKENS, byte_symbols

EMBEDDING = 160
TOKENS = 32  # the longest caption has 29
GRAMMAR_SAMPLES = 4000

# Checkpoint -> the published one whose structure it has
MINI_PRIOR = "kandinsky-2-2-mini-prior"
CHECKPOINTS: Mapping[str, str] = {
    MINI_PRIOR: PRIOR,
    "kandinsky-2-2-mini-decoder": "kandinsky-2-2-decoder",
    "kandinsky-2-2-mini-decoder-inpaint": "kandinsky-2-2-decoder-inpaint",
    "kandinsky-2-2-mini-controlnet-depth": "kandinsky-2-2-controlnet-depth",
}
# Published checkpoint with a submodel of each class
PUBLISHED: Mapping[str, tuple[str, str]] = {
    "text_encoder": (PRIOR, "text_encoder"),
    "image_encoder": (PRIOR, "image_encoder"),
    "prior": (PRIOR, "prior"),
    "movq": ("kandinsky-2-2-decoder", "movq"),
    "decoder": ("kandinsky-2-2-decoder", "unet"),
    "inpaint": ("kandinsky-2-2-decoder-inpaint", "unet"),
    "controlnet": ("kandinsky-2-2-controlnet-depth", "unet"),
}
UNET: Mapping[str, Any] = {
    "attention_head_dim": 32,
    "block_out_channels": [64, 96, 96],
    "cross_attention_dim": 48,
    "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 2],
    "encoder_hid_dim": EMBEDDING,
    "layers_per_block": 1,
    "sample_size": SIDE // 8,
    "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 2, "ResnetUpsampleBlock2D"],
}
NARROWER: Mapping[str, Mapping[str, Any]] = {
    "text_encoder": {
        "hidden_size": EMBEDDING,
        "intermediate_size": 4 * EMBEDDING,
        "max_position_embeddings": TOKENS,
        "num_attention_heads": 5,
        "num_hidden_layers": 4,
        "projection_dim": EMBEDDING,
    },
    "image_encoder": {
        "hidden_size": 128,
        "image_size": SIDE,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "patch_size": 16,
        "projection_dim": EMBEDDING,
    },
    "prior": {
        "attention_head_dim": 32,
        "embedding_dim": EMBEDDING,
        "num_attention_heads": 6,
        "num_embeddings": TOKENS,
        "num_layers": 4,
    },
    "movq": {
        "block_out_channels": [32, 32, 64, 64],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "num_vq_embeddings": 256,
        "sample_size": SIDE // 8,
    },
    "decoder": UNET,
    "inpaint": UNET,
    "controlnet": UNET,
}
PREPROCESSOR = {"crop_size": SIDE, "size": SIDE}


def config(network: str, tokenizer: Path | None = None) -> dict[str, Any]:
    """The config.json of a network of `PUBLISHED`; a text encoder has the vocabulary of the tokenizer's folder."""
    checkpoint, submodel = PUBLISHED[network]
    values: dict[str, Any] = json.loads((CONFIGS / checkpoint / submodel / "config.json").read_bytes())
    values |= NARROWER[network]
    if network == "text_encoder" and tokenizer is not None:
        values["vocab_size"] = len(json.loads((tokenizer / "vocab.json").read_bytes()))
    return values


def write_config_files(checkpoint: str, folder: Path, tokenizer: Path) -> dict[str, str]:
    """Write everything of a checkpoint but its weights; gives the network of each folder that lacks them."""
    published = CHECKPOINTS[checkpoint]
    shutil.copytree(CONFIGS / published, folder, copy_function=shutil.copyfile)
    networks = {name: name for name in ("text_encoder", "image_encoder", "prior") if (folder / name).is_dir()}
    if (folder / "unet").is_dir():
        networks = {
            "unet": next(n for n, (c, _) in PUBLISHED.items() if c == published and n != "movq"),
            "movq": "movq",
        }
    for name, network in networks.items():
        write_json(folder / name / "config.json", config(network, tokenizer))
    if (folder / "tokenizer").is_dir():
        shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True, copy_function=shutil.copyfile)
        shorten_prompts(folder / "tokenizer")
        path = folder / "image_processor" / "preprocessor_config.json"
        write_json(path, json.loads(path.read_bytes()) | PREPROCESSOR)
    return networks


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def write_tokenizer(folder: Path) -> None:
    """Make a CLIP tokenizer in which every word of the captions is one token; other words are spelled."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    rng = np.random.default_rng(0)
    corpus = [caption(random_scene(rng), rng).text for _ in range(GRAMMAR_SAMPLES)]
    symbols = byte_symbols()
    alphabet = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # The trainer stops by itself when every word is one token
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, end_of_word_suffix="</w>", min_frequency=1, initial_alphabet=symbols, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *("".join(pair) for pair in merges), *SPECIAL_TOKENS]
    shutil.copytree(CONFIGS / PRIOR / "tokenizer", folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    (folder / "merges.txt").write_bytes("\n".join(["#version: 0.2", *map(" ".join, merges), ""]).encode())
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_bytes(json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")).encode())
    shorten_prompts(folder)


def shorten_prompts(tokenizer: Path) -> None:
    """Set the number of tokens in a tokenizer's configuration."""
    path = tokenizer / "tokenizer_config.json"
    write_json(path, json.loads(path.read_bytes()) | {"model_max_length": TOKENS, "name_or_path": ""})
