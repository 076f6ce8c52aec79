"""Random weights for the networks, scaled so that signals keep their size and every branch matters."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .graphs import NETWORKS
from .modules.movq import MoVQConfig
from .weight_files import TensorToWrite

# Mean and standard deviation of a tensor by name; the first that fits. Where none does: 0 and 1/sqrt(inputs of an
# output), which keeps the variance of a signal, in every branch: nothing is zero as at the start of a training.
DISTRIBUTIONS: tuple[tuple[re.Pattern[str], float, float], ...] = (
    (re.compile(r"clip_mean"), 0.0, 0.3),
    (re.compile(r"clip_std"), 1.0, 0.1),
    (re.compile(r"quantize\.embedding\.weight"), 0.0, 0.6),
    (re.compile(r".*(token_embedding\.weight|class_embedding|prd_embedding)"), 0.0, 0.5),
    (re.compile(r".*position(al)?_embedding(\.weight)?"), 0.0, 0.2),
    # spatial norms scale by about 1, as trained ones do: by about 0, they would blow up what is left
    (re.compile(r".*\.conv_y\.bias"), 1.0, 0.1),
    (re.compile(r".*\.conv_[yb]\.weight"), 0.0, 0.1),
    (re.compile(r".*\.bias"), 0.0, 0.03),
    (re.compile(r".*norm\w*(\.\d+)?(\.norm_layer)?\.weight"), 1.0, 0.06),
)


def random_tensors(class_name: str, config: Mapping[str, Any], key: str, dtype: str) -> list[TensorToWrite]:
    """List the tensors of a network with this config.json, floating ones of `dtype`; each is drawn when it is read.

    `key` is the seed: a tensor depends on it, its name and its shape alone.
    """
    shapes, positions = _shapes(class_name, config)
    changes = noise_path(config, shapes) if class_name == "UNet2DConditionModel" else {}

    def read(name: str) -> torch.Tensor:
        values = _random(f"{key}/{name}", name, shapes[name])
        if name in changes:
            changes[name](values)
        return values

    tensors = [TensorToWrite(name, dtype, shape, partial(read, name)) for name, shape in shapes.items()]
    return tensors + [
        TensorToWrite(name, "int64", (1, length), partial(_positions, length)) for name, length in positions.items()
    ]


def _shapes(class_name: str, config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Give the shapes of a submodel's tensors by name, and the lengths of the position ids that old releases stored."""
    kind = NETWORKS[class_name]
    settings = kind.config(config)
    with torch.device("meta"):
        network = kind.build(settings)
    shapes = {name.removeprefix(kind.prefix): tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if isinstance(settings, MoVQConfig):
        shapes["quantize.embedding.weight"] = settings.codebook
    positions = {name.removeprefix(kind.prefix): ids.shape[-1] for name, ids in network.constants().items()}
    return shapes, positions


def noise_path(config: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Callable[[torch.Tensor], object]]:
    """Changes to tensors of a UNet, in place, that make it predict its own input, normalised, and a fifth of the rest.

    Latents at the first timestep are noise, so that a UNet has to predict about what it sees. One that does not lets
    them grow by the inverse root of the first alphas_cumprod, 14 times, where small differences become large ones.
    Latents and their negatives go through the first channels of conv_in, the last skip connection and its shortcut to
    conv_out, which subtracts them: silu(x) - silu(-x) = x.
    """
    width, latents = config["block_out_channels"][0], 4
    group = width // config["norm_num_groups"]
    reserved = -(-2 * latents // group) * group
    last = f"up_blocks.{len(config['block_out_channels']) - 1}.resnets."
    last += max((name.removeprefix(last).split(".")[0] for name in shapes if name.startswith(last)), key=int)
    rows = [(i + sign * latents, i, 1 - 2 * sign) for sign in (0, 1) for i in range(latents)]

    def conv_in(weight: torch.Tensor) -> None:
        weight[:reserved] = 0
        for row, latent, sign in rows:
            weight[row, latent, 1, 1] = sign

    def shortcut(weight: torch.Tensor) -> None:
        weight[:reserved] = 0
        for row, _, _ in rows:
            weight[row, weight.shape[1] - width + row] = 1

    def norm(weight: torch.Tensor) -> None:
        used = (np.arange(reserved) < len(rows)).reshape(-1, group).mean(axis=1)
        weight[:reserved] = weight.new_tensor(np.sqrt(used).repeat(group))

    def conv_out(weight: torch.Tensor) -> None:
        weight *= 0.2
        weight[:, :reserved] = 0
        for row, latent, sign in rows:
            weight[latent, row, 1, 1] = sign

    return {
        "conv_in.weight": conv_in,
        f"{last}.conv_shortcut.weight": shortcut,
        f"{last}.conv2.weight": lambda weight: weight[:reserved].zero_(),
        "conv_norm_out.weight": norm,
        "conv_out.weight": conv_out,
    }


def _random(key: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw a float32 tensor, uniform around its mean, from a generator of its own."""
    mean, std = _distribution(name, shape)
    digest = hashlib.sha256(key.encode()).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    values: npt.NDArray[np.float32] = generator.random(shape, dtype=np.float32)
    half_width = math.sqrt(3) * std
    values *= np.float32(2 * half_width)
    values += np.float32(mean - half_width)
    return torch.from_numpy(values)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    for pattern, mean, std in DISTRIBUTIONS:
        if pattern.fullmatch(name):
            return mean, std
    if len(shape) < 2:
        raise ValueError(f"no distribution for {name}{list(shape)}")
    return 0.0, 1 / math.sqrt(math.prod(shape[1:]))


def _positions(length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.int64).unsqueeze(0)
