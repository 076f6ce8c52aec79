"""Random weights in the layout of the published checkpoints: for tests, for trying things out, for measuring speed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engines.errors import KandrtError, OutputError
from .random_tokenizers import VOCABULARIES

if TYPE_CHECKING:
    from ..export.weight_files import TensorToWrite

CONFIGS = Path(__file__).with_name("checkpoint-configs")  # as published
PRIOR, PRIOR_2_1 = "kandinsky-2-2-prior", "kandinsky-2-1-prior"
# Checkpoints that hold a decoder and the prior: class, and the checkpoints of both
COMBINED = {
    "kandinsky-2-2-combined": ("KandinskyV22CombinedPipeline", "kandinsky-2-2-decoder", PRIOR),
    "kandinsky-2-2-combined-inpaint": ("KandinskyV22InpaintCombinedPipeline", "kandinsky-2-2-decoder-inpaint", PRIOR),
    "kandinsky-2-1-combined": ("KandinskyCombinedPipeline", "kandinsky-2-1", PRIOR_2_1),
    "kandinsky-2-1-combined-inpaint": ("KandinskyInpaintCombinedPipeline", "kandinsky-2-1-inpaint", PRIOR_2_1),
}
SHARD_BYTES = 10_000_000_000  # of tensors in one file of a text encoder, as transformers saved them

# The published structure with few and narrow layers, by the start of a checkpoint's name and the class; every row that
# fits counts, later ones over earlier ones. A width that families or inputs do not share shows when they are mixed up.
# Sizes of 2.x UNets and of MoVQ are bound by groups of 32 in every norm.
SMALL: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("kandinsky", "VQModel"): {
        "block_out_channels": [32, 32, 64, 64],
        "layers_per_block": 1,
        "num_vq_embeddings": 64,
    },
    ("kandinsky-2", "UNet2DConditionModel"): {
        "attention_head_dim": 16,
        "block_out_channels": [32, 64, 96, 128],
        "cross_attention_dim": 32,
        "encoder_hid_dim": 32,
        "layers_per_block": 1,
    },
    ("kandinsky-2", "PriorTransformer"): {
        "attention_head_dim": 16,
        "embedding_dim": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
    },
    ("kandinsky-2", "CLIPTextModelWithProjection"): {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 32,
        "vocab_size": 994,
    },
    ("kandinsky-2", "CLIPVisionModelWithProjection"): {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 32,
        "projection_dim": 32,
    },
    # 2.1: cross_attention_dim is the width of image embeddings and pooled texts, encoder_hid_dim that of text states
    ("kandinsky-2-1", "UNet2DConditionModel"): {"cross_attention_dim": 48, "encoder_hid_dim": 80},
    ("kandinsky-2-1", "PriorTransformer"): {"embedding_dim": 48},
    ("kandinsky-2-1", "CLIPTextModelWithProjection"): {"hidden_size": 48, "projection_dim": 48},
    ("kandinsky-2-1", "CLIPVisionModelWithProjection"): {"projection_dim": 48},
    ("kandinsky-2-1", "MultilingualCLIP"): {
        "hidden_size": 80,
        "intermediate_size": 112,
        "num_attention_heads": 5,
        "num_hidden_layers": 2,
        "numDims": 48,
        "transformerDimensions": 80,
        "vocab_size": 700,
    },
    ("kandinsky-3", "VQModel"): {"block_out_channels": [32, 32, 32, 64]},
    ("kandinsky-3", "Kandinsky3UNet"): {
        "attention_head_dim": 16,
        "block_out_channels": [32, 48, 64, 96],
        "cross_attention_dim": 40,
        "encoder_hid_dim": 72,
        "groups": 8,
        "layers_per_block": 2,
        "time_embedding_dim": 80,
    },
    ("kandinsky-3", "T5EncoderModel"): {
        "d_ff": 112,
        "d_kv": 16,
        "d_model": 72,
        "num_decoder_layers": 2,
        "num_heads": 3,
        "num_layers": 2,
        "vocab_size": 640,
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
    PRIOR_2_1 = PRIOR_2_1
    DECODER_2_1 = "kandinsky-2-1"
    INPAINT_2_1 = "kandinsky-2-1-inpaint"
    COMBINED_2_1 = "kandinsky-2-1-combined"
    COMBINED_INPAINT_2_1 = "kandinsky-2-1-combined-inpaint"
    KANDINSKY_3 = "kandinsky-3"


class Precision(str, Enum):
    """Types of the stored weights."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


DTYPES = {Precision.FP32: "float32", Precision.FP16: "float16", Precision.BF16: "bfloat16"}


@dataclass(frozen=True)
class Source:
    """A submodel to make: where its published configuration is, and its entry of model_index.json."""

    checkpoint: str
    name: str
    library: str
    class_name: str

    @property
    def folder(self) -> Path:
        """The published files."""
        return CONFIGS / self.checkpoint / self.name


def make_checkpoint(kind: str, folder: Path, *, small: bool = False, seed: int = 0, precision: str = "fp32") -> Path:
    """Write a checkpoint with random weights to `folder`, which must not exist; gives `folder`.

    `kind` and `precision` are values of Kind and Precision. Equal arguments give equal bytes, and a submodel's weights
    depend on its name and configuration alone, so that checkpoints that share one (MoVQ, the prior) have it in common.
    Needs memory for about one tensor, at most 1.1 GB in full size.

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
        for extra in _unlisted(kind):
            shutil.copytree(extra, temporary / extra.name, copy_function=shutil.copyfile)
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
    class_name, decoder, prior = COMBINED[kind]
    sources = plan(decoder)[1] | {f"prior_{name}": source for name, source in plan(prior)[1].items()}
    index = {"_class_name": class_name, "_diffusers_version": "0.19.0"}
    entries = {name: [source.library, source.class_name] for name, source in sources.items()}
    return json.dumps(index | entries, indent=2).encode(), sources


def _sources(checkpoint: str, index: Mapping[str, Any]) -> Iterator[tuple[str, Source]]:
    for name, entry in index.items():
        if isinstance(entry, list):
            yield name, Source(checkpoint, name, *entry)


def _unlisted(kind: str) -> list[Path]:
    """Folders that are published beside those of model_index.json: another scheduler's."""
    decoder = COMBINED[kind][1] if kind in COMBINED else kind
    return [
        path for path in sorted((CONFIGS / decoder).iterdir()) if path.is_dir() and path.name not in plan(decoder)[1]
    ]


def read_config(source: Source, *, small: bool = False) -> dict[str, Any]:
    """Read the published config.json of a network, or its `small` form."""
    config: dict[str, Any] = json.loads((source.folder / "config.json").read_bytes())
    for (checkpoint, class_name), sizes in SMALL.items() if small else ():
        if source.checkpoint.startswith(checkpoint) and source.class_name == class_name:
            config |= sizes
    return config


def _write_submodel(source: Source, folder: Path, *, small: bool, seed: int, dtype: str) -> None:
    shutil.copytree(source.folder, folder, copy_function=shutil.copyfile)
    if source.class_name in VOCABULARIES:
        encoder = plan(source.checkpoint)[1]["text_encoder"]
        VOCABULARIES[source.class_name](folder, read_config(encoder, small=small)["vocab_size"])
    if not (folder / "config.json").exists():
        return
    config = read_config(source, small=small)
    if small:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    from ..export.random_weights import random_tensors

    tensors = random_tensors(source.class_name, config, f"{seed}/{source.name}", dtype)
    write_weights(folder, tensors, "diffusion_pytorch_model" if source.library == "diffusers" else "model")


def write_weights(folder: Path, tensors: Iterable[TensorToWrite], stem: str) -> None:
    """Write `stem`.safetensors; or, of transformers' models above SHARD_BYTES, shards and their index."""
    from ..export.weight_files import write_safetensors

    # published diffusers networks are one file of any size
    shards = [list(tensors)] if stem != "model" else _split(tensors, SHARD_BYTES)
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", shards[0])
        return
    names = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard)},
        "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _split(tensors: Iterable[TensorToWrite], limit: int) -> list[list[TensorToWrite]]:
    """Cut a list into parts of at most `limit` bytes, or of one tensor that is larger."""
    shards: list[list[TensorToWrite]] = [[]]
    size = 0
    for tensor in tensors:
        size += tensor.nbytes
        if shards[-1] and size > limit:
            shards.append([])
            size = tensor.nbytes
        shards[-1].append(tensor)
    return shards


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
