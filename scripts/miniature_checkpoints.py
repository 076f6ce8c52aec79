"""`python -m kandrt.scripts.miniature_checkpoints`: the miniature that is built in, as checkpoints for diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from ..engines.backends import open_component
from ..engines.bundle import Bundle, open_bundle
from ..engines.errors import BundleError, OutputError
from ..runtime.miniature import MINIATURE
from .console import guarded, size_text, stdout
from .miniature.drawing import draw_array
from .miniature.trials import SIDE
from .miniature.world import random_scene
from .train_miniature.configs import CHECKPOINTS, MINI_PRIOR, config, write_config_files

CODEBOOK, PICTURES = "quantize.embedding.weight", 16
# What stands around a tensor's name in a bundle: the exporter's module, and the mark of a linear weight stored
# [in, out], as bundles once had them and the miniature has
PREFIX, TRANSPOSED = "network.", ".transposed"

Arrays = dict[str, NDArray[Any]]


def write_checkpoints(output: Path, bundle: Path = MINIATURE) -> list[Path]:
    """Write every checkpoint of the miniature to a folder of its own below `output`, weights in fp32.

    Their values are those that the bundle computes with, so that diffusers paints the same pictures. Raises OutputError
    where one of the folders exists or cannot be written, BundleError for a damaged bundle.
    """
    opened = open_bundle(bundle)
    opened.check_hashes(opened.manifest.weights.values())
    taken = [name for name in CHECKPOINTS if (output / name).exists()]
    if taken:
        raise OutputError(f"{output / taken[0]} exists already: remove it or choose another folder")
    temporary = output / ".checkpoints.partial"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tokenizer = write_tokenizer(opened, temporary / "tokenizer")
        for name in CHECKPOINTS:
            write_checkpoint(opened, name, temporary / name, tokenizer)
        for name in CHECKPOINTS:
            (temporary / name).rename(output / name)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [output / name for name in CHECKPOINTS]


def write_tokenizer(bundle: Bundle, folder: Path) -> Path:
    """Take tokenizer.json apart into the vocab.json and merges.txt of a CLIP tokenizer."""
    record = bundle.manifest.tokenizer
    if record is None:
        raise BundleError(f"{bundle.folder} has no tokenizer: it is not the miniature")
    model = json.loads(bundle.path(record.file).read_bytes())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    folder.mkdir()
    (folder / "merges.txt").write_bytes("\n".join(["#version: 0.2", *merges, ""]).encode())
    (folder / "vocab.json").write_bytes(json.dumps(model["vocab"], ensure_ascii=False).encode())
    return folder


def write_checkpoint(bundle: Bundle, name: str, folder: Path, tokenizer: Path) -> None:
    """Write one checkpoint."""
    from safetensors.numpy import save_file

    for submodel, network in write_config_files(name, folder, tokenizer).items():
        arrays = {key: np.ascontiguousarray(array) for key, array in tensors(bundle, network)}
        if network == "movq":
            arrays[CODEBOOK] = codebook(bundle)
        stem = "model" if name == MINI_PRIOR and submodel != "prior" else "diffusion_pytorch_model"
        save_file(arrays, folder / submodel / f"{stem}.safetensors", metadata={"format": "pt"})


def tensors(bundle: Bundle, network: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """A network's tensors under their names in a checkpoint."""
    from safetensors.numpy import load_file

    for name, array in load_file(bundle.path(bundle.manifest.weights[network])).items():
        values = array.astype(np.float32)
        yield name.removesuffix(TRANSPOSED).removeprefix(PREFIX), values.T if name.endswith(TRANSPOSED) else values


def codebook(bundle: Bundle) -> NDArray[np.float32]:
    """Latents of some pictures, [codes, 4]: nothing reads them, and the layout asks for them."""
    rng = np.random.default_rng(0)
    drawn = np.stack([draw_array(random_scene(rng), SIDE) for _ in range(PICTURES)])
    pixels = np.ascontiguousarray(drawn.transpose(0, 3, 1, 2), np.float32) / np.float32(127.5) - 1
    with closing(open_component(bundle, "movq_encoder", backend="onnxruntime", device="cpu")) as encoder:
        cells = np.asarray(encoder(pixels=pixels)["latents"]).transpose(0, 2, 3, 1).reshape(-1, 4)
    return np.ascontiguousarray(cells[rng.permutation(len(cells))[: config("movq")["num_vq_embeddings"]]])


def command(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the folders go.")],
) -> None:
    """Write the miniature as checkpoints in diffusers' layout: prior, decoder, inpaint decoder and ControlNet.

    Example: python -m kandrt.scripts.miniature_checkpoints -o checkpoints
    """
    for folder in write_checkpoints(output):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        stdout().print(f"{folder}: {size_text(size)}", soft_wrap=True)


app = typer.Typer(add_completion=False)
app.command()(guarded(command))

if __name__ == "__main__":
    app()
