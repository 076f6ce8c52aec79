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
from .modules.multilingual_clip import MultilingualCLIPConfig
from .weight_files import TensorToWrite

# Mean and standard deviation of a tensor by name; the first that fits. Where none does: 0 and 1/sqrt(inputs of an
# output), which keeps the variance of a signal, in every branch: nothing is zero as at the start of a training.
DISTRIBUTIONS: tuple[tuple[re.Pattern[str], float, float], ...] = (
    (re.compile(r"clip_mean"), 0.0, 0.3),
    (re.compile(r"clip_std"), 1.0, 0.1),
    (re.compile(r"quantize\.embedding\.weight"), 0.0, 0.6),
    (re.compile(r".*(token_embedding\.weight|class_embedding|prd_embedding)"), 0.0, 0.5),
    (re.compile(r".*position(al)?_embeddings?(\.weight)?"), 0.0, 0.2),
    (re.compile(r".*\.(word|token_type)_embeddings\.weight"), 0.0, 0.5),
    (re.compile(r"shared\.weight|.*\.relative_attention_bias\.weight"), 0.0, 1.0),
    # spatial norms scale by about 1, as trained ones do: by about 0, they would blow up what is left
    (re.compile(r".*\.conv_y\.bias"), 1.0, 0.1),
    (re.compile(r".*\.conv_[yb]\.weight"), 0.0, 0.1),
    (re.compile(r".*\.bias"), 0.0, 0.03),
    (re.compile(r".*(norm|LayerNorm)\w*(\.\d+)?(\.norm_layer)?\.weight"), 1.0, 0.06),
)

Change = Callable[[torch.Tensor], object]
LATENTS = 4
# Channels of a UNet that carry latents and their negatives: channel, latent, sign
SIGNED = tuple((latent + (sign < 0) * LATENTS, latent, sign) for sign in (1, -1) for latent in range(LATENTS))


def random_tensors(class_name: str, config: Mapping[str, Any], key: str, dtype: str) -> list[TensorToWrite]:
    """List the tensors of a network with this config.json, floating ones of `dtype`; each is drawn when it is read.

    `key` is the seed: a tensor depends on it, its name and its shape alone.
    """
    shapes, positions = _shapes(class_name, config)
    changes = CHANGES[class_name](config, shapes) if class_name in CHANGES else {}

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
    if isinstance(settings, MultilingualCLIPConfig):
        width = settings.hidden_size
        shapes |= {"transformer.pooler.dense.weight": (width, width), "transformer.pooler.dense.bias": (width,)}
    positions = {
        name.removeprefix(kind.prefix): ids.shape[-1]
        for name, ids in network.constants().items()
        if name.endswith("position_ids")
    }
    return shapes, positions


def noise_path(config: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Change]:
    """Changes to tensors of a UNet, in place, that make it predict its own input, normalised, and a fifth of the rest.

    Latents at the first timestep are noise, so that a UNet has to predict about what it sees. One that does not lets
    them grow by the inverse root of the first alphas_cumprod, 14 times, where small differences become large ones.
    Latents and their negatives go through the first channels of conv_in, the last skip connection and its shortcut to
    conv_out, which subtracts them: silu(x) - silu(-x) = x.
    """
    width = config["block_out_channels"][0]
    output, reserved = _noise_output(width, config["norm_num_groups"])
    last = f"up_blocks.{len(config['block_out_channels']) - 1}.resnets."
    last += max((name.removeprefix(last).split(".")[0] for name in shapes if name.startswith(last)), key=int)
    shortcut = f"{last}.conv_shortcut.weight"
    skip = shapes[shortcut][1] - width
    return output | {
        "conv_in.weight": _wire(slice(reserved), {(row, latent, 1, 1): sign for row, latent, sign in SIGNED}),
        shortcut: _wire(slice(reserved), {(row, skip + row): 1 for row, _, _ in SIGNED}),
        f"{last}.conv2.weight": _wire(slice(reserved)),
    }


def noise_path_3(config: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Change]:
    """The same for Kandinsky 3, whose skip connections begin after the first halving of height and width.

    So the latents of 2 x 2 cells go through 16 channels of the first level's skip connection, by way of the shortcuts
    of its residual blocks, which are linear.
    """
    width, end = config["block_out_channels"][0], config["layers_per_block"] - 1
    output, reserved = _noise_output(width // 2, config["groups"])
    down, up = "down_blocks.0.", f"up_blocks.{len(config['block_out_channels']) - 1}."
    first, unpack = slice(LATENTS), f"{up}resnets_in.0.shortcut_up_sample.weight"
    skip = shapes[unpack][0] - width
    copied = {(i, i): 1 for i in range(LATENTS)}
    packed = [(LATENTS * (2 * y + x) + i, i, y, x) for y in (0, 1) for x in (0, 1) for i in range(LATENTS)]
    signed = {(row, latent): sign for row, latent, sign in SIGNED}
    # channels that a block's residual must leave alone, where they are not the latents as they came
    kept = {f"{down}resnets_out.{end}": slice(len(packed)), f"{up}resnets_out.{end}": slice(reserved)}
    residual = ".resnet_blocks.3.projection.weight"
    blocks = [name.removesuffix(residual) for name in shapes if name.startswith((down, up)) and name.endswith(residual)]
    return output | {
        "conv_in.weight": _wire(first, {(i, i, 1, 1): 1 for i in range(LATENTS)}),
        f"{down}resnets_in.0.shortcut_projection.weight": _wire(first, copied),
        f"{down}resnets_out.{end}.shortcut_down_sample.weight": _wire(slice(len(packed)), dict.fromkeys(packed, 1)),
        unpack: _wire((slice(None), first), {(skip + row, i, y, x): 1 for row, i, y, x in packed}),
        f"{up}resnets_out.0.shortcut_projection.weight": _wire(first, copied),
        f"{up}resnets_out.{end}.shortcut_projection.weight": _wire(slice(reserved), signed),
        **{block + residual: _wire(kept.get(block, first)) for block in blocks},
    }


def _noise_output(width: int, groups: int) -> tuple[dict[str, Change], int]:
    """Changes to a UNet's last norm and convolution that subtract SIGNED, and the number of channels set apart."""
    group = width // groups
    reserved = -(-len(SIGNED) // group) * group
    used = (np.arange(reserved) < len(SIGNED)).reshape(-1, group).mean(axis=1)

    def norm(weight: torch.Tensor) -> None:
        weight[:reserved] = weight.new_tensor(np.sqrt(used).repeat(group))

    conv_out = _wire((slice(None), slice(reserved)), {(latent, row, 1, 1): sign for row, latent, sign in SIGNED}, 0.2)
    return {"conv_norm_out.weight": norm, "conv_out.weight": conv_out}, reserved


def _wire(cleared: Any, entries: Mapping[Any, int] | None = None, scale: float = 1) -> Change:
    """A change that scales a weight, clears a part and sets single entries."""

    def change(weight: torch.Tensor) -> None:
        weight *= scale
        weight[cleared] = 0
        for index, value in (entries or {}).items():
            weight[index] = value

    return change


def unscaled_attention(config: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Change]:
    """Changes to a T5's queries, in place: its scores are not divided by the root of a head's width, so these are."""
    scale = 1 / math.sqrt(config["d_kv"])
    return {name: lambda weight: weight.mul_(scale) for name in shapes if name.endswith(".SelfAttention.q.weight")}


# Class -> changes to its random tensors, by name
CHANGES: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Change]]] = {
    "UNet2DConditionModel": noise_path,
    "Kandinsky3UNet": noise_path_3,
    "T5EncoderModel": unscaled_attention,
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
    # a transposed convolution is stored [in, out, 2, 2], and as its stride is 2 each output sees `in` numbers
    inputs = shape[0] if name.endswith("up_sample.weight") else math.prod(shape[1:])
    return 0.0, 1 / math.sqrt(inputs)


def _positions(length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.int64).unsqueeze(0)
