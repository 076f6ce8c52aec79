"""Trained weights as checkpoints in diffusers' layout: values of half precision, stored in fp32.

So a bundle that stores them in 16 bits computes with the very same values, and diffusers needs not be told a type.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ...export.modules.movq import MoVQ, MoVQConfig
from .autoencoder import codebook
from .configs import CHECKPOINTS, config, write_config_files
from .loop import WEIGHTS, load_weights, write_weights

# Network -> folder of its training, and what stands before its tensors' names there
TRAINED: Mapping[str, tuple[str, str]] = {
    "text_encoder": ("clip", "text.network."),
    "image_encoder": ("clip", "image.network."),
    "prior": ("prior", ""),
    "movq": ("movq", ""),
    "decoder": ("decoder", ""),
    "inpaint": ("inpaint", ""),
    "controlnet": ("controlnet", ""),
}
TRANSFORMERS = ("text_encoder", "image_encoder")


def write_checkpoints(work: Path, output: Path) -> list[Path]:
    """Write every checkpoint whose networks are all trained; gives their folders. Existing ones are replaced."""
    return [folder for name in CHECKPOINTS for folder in write_checkpoint(name, work, output / name)]


def write_checkpoint(name: str, work: Path, folder: Path) -> Iterator[Path]:
    """Write one checkpoint, complete or not at all; gives nothing where a network is not trained yet."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    networks = write_config_files(name, temporary, work / "tokenizer")
    if all((work / TRAINED[network][0] / WEIGHTS).exists() for network in networks.values()):
        for submodel, network in networks.items():
            stem = "model" if network in TRANSFORMERS else "diffusion_pytorch_model"
            rounded = {name: tensor.half().float() for name, tensor in tensors(network, work).items()}
            write_weights(temporary / submodel / f"{stem}.safetensors", rounded)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        yield folder
    shutil.rmtree(temporary, ignore_errors=True)


def tensors(network: str, work: Path) -> dict[str, Tensor]:
    """A network's tensors under their names in a checkpoint."""
    folder, prefix = TRAINED[network]
    found = load_file(work / folder / WEIGHTS)
    kept = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    if network == "movq":
        movq = MoVQ(MoVQConfig.from_dict(config("movq")))
        load_weights(movq, work / folder)
        kept["quantize.embedding.weight"] = codebook(movq)
    return kept
