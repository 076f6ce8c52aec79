"""Random weights in the layout of the published checkpoints: for tests, for trying things out, for measuring speed."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..engines.errors import KandrtError, OutputError

CONFIGS = Path(__file__).with_name("checkpoint-configs")  # as published
PRIOR = "kandinsky-2-2-prior"
# Checkpoints that hold a decoder and the prior: class, and the decoder's checkpoint
COMBINED = {
    "kandinsky-2-2-combined": ("KandinskyV22CombinedPipeline", "kandinsky-2-2-decoder"),
    "kandinsky-2-2-combined-inpaint": ("KandinskyV22InpaintCombinedPipeline", "kandinsky-2-2-decoder-inpaint"),
}
MERGES, SMALL_MERGES = "clip_merges.txt.gz", 480
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")

# The published structure with few and narrow layers; sizes are bound by groups of 32 in every norm.
SMALL: Mapping[str, Mapping[str, Any]] = {
    "UNet2DConditionModel": {
        "attention_head_dim": 16,
        "block_out_channels": [32, 64, 96, 128],
        "cross_attention_dim": 32,
        "encoder_hid_dim": 32,
        "layers_per_block": 1,
    },
    "VQModel": {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "num_vq_embeddings": 64},
    "PriorTransformer": {"attention_head_dim": 16, "embedding_dim": 32, "num_attention_heads": 2, "num_layers": 2},
    "CLIPTextModelWithProjection": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 32,
        "vocab_size": 512 + SMALL_MERGES + len(SPECIAL_TOKENS),
    },
    "CLIPVisionModelWithProjection": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 32,
        "projection_dim": 32,
    },
}


class Kind(str, Enum):
    """Checkpoints that can be made."""

    PRIOR = PRIOR
    DECODER = "kandinsky-2-2-decoder"
    INPAINT = "kandinsky-2-2-decoder-inpaint"
    CONTROLNET = "kandinsky-2-2-controlnet-depth"
    COMBINED = "kandinsky-2-2-combined"
    COMBINED_INPAINT = "kandinsky-2-2-combined-inpaint"


class Precision(str, Enum):
    """Types of the stored weights."""

    FP32 = "fp32"
    FP16 = "fp16"


DTYPES = {Precision.FP32: "float32", Precision.FP16: "float16"}


@dataclass(frozen=True)
class Source:
    """A submodel to make: where its published configuration is, and its entry of model_index.json."""

    checkpoint: str
    name: str
    library: str
    class_name: str


def make_checkpoint(kind: str, folder: Path, *, small: bool = False, seed: int = 0, precision: str = "fp32") -> Path:
    """Write a checkpoint with random weights to `folder`, which must not exist; gives `folder`.

    `kind` is a value of Kind, `precision` "fp32" or "fp16". Equal arguments give equal bytes, and a submodel's weights
    depend on its name and configuration alone, so that checkpoints that share one (MoVQ, the prior) have it in common.
    Needs memory for about one tensor, at most 0.4 GB in full size.

    Raises OutputError where `folder` exists or cannot be written, ValueError for an unknown `kind` or `precision`.
    """
    kind, dtype = Kind(kind).value, DTYPES[Precision(precision)]
    if folder.exists():
        raise OutputError(f"{folder} exists already: remove it or choose another folder")
    index, sources = plan(kind)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        (temporary / "model_index.json").write_bytes(index)
        for name, source in sources.items():
            _write_submodel(source, temporary / name, small=small, seed=seed, dtype=dtype)
        temporary.rename(folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def plan(kind: str) -> tuple[bytes, dict[str, Source]]:
    """Give model_index.json and what makes each folder that it lists."""
    if kind not in COMBINED:
        text = (CONFIGS / kind / "model_index.json").read_bytes()
        return text, dict(_sources(kind, json.loads(text)))
    class_name, decoder = COMBINED[kind]
    sources = plan(decoder)[1] | {f"prior_{name}": source for name, source in plan(PRIOR)[1].items()}
    index = {"_class_name": class_name, "_diffusers_version": "0.19.0"}
    entries = {name: [source.library, source.class_name] for name, source in sources.items()}
    return json.dumps(index | entries, indent=2).encode(), sources


def _sources(checkpoint: str, index: Mapping[str, Any]) -> Iterator[tuple[str, Source]]:
    for name, entry in index.items():
        if isinstance(entry, list):
            yield name, Source(checkpoint, name, *entry)


def read_config(source: Source) -> dict[str, Any]:
    """Read the published config.json of a network."""
    config: dict[str, Any] = json.loads((CONFIGS / source.checkpoint / source.name / "config.json").read_bytes())
    return config


def _write_submodel(source: Source, folder: Path, *, small: bool, seed: int, dtype: str) -> None:
    shutil.copytree(CONFIGS / source.checkpoint / source.name, folder, copy_function=shutil.copyfile)
    if source.class_name == "CLIPTokenizer":
        write_vocabulary(folder, SMALL_MERGES if small else None)
    if source.class_name not in SMALL:
        return
    config = read_config(source)
    if small:
        config |= SMALL[source.class_name]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    from ..export.random_weights import random_tensors
    from ..export.weight_files import write_safetensors

    stem = "diffusion_pytorch_model" if source.library == "diffusers" else "model"
    write_safetensors(
        folder / f"{stem}.safetensors", random_tensors(source.class_name, config, f"{seed}/{source.name}", dtype)
    )


def write_vocabulary(folder: Path, merges: int | None) -> None:
    """Write CLIP's merges.txt, its first `merges` or all, and the vocab.json that follows from them."""
    lines = gzip.decompress((CONFIGS / MERGES).read_bytes()).decode().splitlines()
    version, pairs = lines[0], lines[1:] if merges is None else lines[1 : 1 + merges]
    symbols = byte_symbols()
    joined = (pair.replace(" ", "") for pair in pairs)
    tokens = (*symbols, *(f"{symbol}</w>" for symbol in symbols), *joined, *SPECIAL_TOKENS)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    text = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_bytes(text.encode())
    (folder / "merges.txt").write_bytes("\n".join([version, *pairs, ""]).encode())


def byte_symbols() -> list[str]:
    """Give the characters that stand for bytes in byte-level BPE: `bytes_to_unicode` of openai/CLIP, in its order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in (*printable, *range(256, 256 + others))]


app = typer.Typer(add_completion=False)


@app.command()
def main(
    kind: Annotated[Kind, typer.Argument(help="Which published checkpoint to follow.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make; must not exist.")],
    small: Annotated[bool, typer.Option("--small", help="Few and narrow layers: a few megabytes.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Other seeds give other weights.")] = 0,
    precision: Annotated[Precision, typer.Option("--precision", help="Type of the weights.")] = Precision.FP32,
) -> None:
    """Make a checkpoint with random weights in diffusers' layout.

    Example: python -m kandrt.scripts.random_checkpoint kandinsky-2-2-decoder -o decoder --small
    """
    try:
        folder = make_checkpoint(kind.value, output, small=small, seed=seed, precision=precision.value)
    except KandrtError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    typer.echo(f"{folder}: {kind.value}, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    app()
