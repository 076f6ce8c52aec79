"""What of a Kandinsky 2.x UNet's config.json decides the network, and what of it is refused.

Source: diffusers 0.42.1 `UNet2DConditionModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...engines.errors import CheckpointError
from .conditioning import IMAGE_TOKENS, IMAGE_TOKENS_BESIDE_TEXT, LATENT_CHANNELS, TEXT_TOKENS
from .config import check_config, check_divisible, check_lengths, check_sizes

# Block type -> does the level have attention.
DOWN_BLOCKS = {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True}
UP_BLOCKS = {"ResnetUpsampleBlock2D": False, "SimpleCrossAttnUpBlock2D": True}

# addition_embed_type -> the encoder_hid_dim_type that goes with it
CONDITIONING = {"image": "image_proj", "image_hint": "image_proj", "text_image": "text_image_proj"}

FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "addition_embed_type_num_heads": (64,),  # of another conditioning by text, which these checkpoints do not have
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),  # of strided convolutions, which these block types do not have
    "encoder_hid_dim_type": tuple(dict.fromkeys(CONDITIONING.values())),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("scale_shift",),
    "time_embedding_type": ("positional",),
    "transformer_layers_per_block": (1,),  # of block types with transformers, which these are not
}


@dataclass(frozen=True)
class UNetConfig:
    """What of a `UNet2DConditionModel` config decides this network; lists have one entry a level.

    text_dim is the width of the text's states, None where the image alone conditions the network; the text's pooled
    embedding is as wide as the image's.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    head_dims: tuple[int, ...]
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    cross_attention_dim: int
    image_embed_dim: int
    text_dim: int | None
    hint: bool
    norm_groups: int
    norm_eps: float

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read config.json; raises CheckpointError that names each field that cannot be honoured."""
        what = "UNet2DConditionModel"
        read = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "attention_head_dim",
                "norm_eps", "down_block_types", "up_block_types", "cross_attention_dim", "encoder_hid_dim",
                "addition_embed_type", "norm_num_groups")  # fmt: skip
        required = ("in_channels", "block_out_channels", "cross_attention_dim", "encoder_hid_dim",
                    "addition_embed_type", "encoder_hid_dim_type", "resnet_time_scale_shift", "mid_block_type",
                    "down_block_types", "up_block_types")  # fmt: skip
        check_config(what, config, read, FIXED, required)
        sizes = ("in_channels", "out_channels", "cross_attention_dim", "encoder_hid_dim", "norm_num_groups",
                 "layers_per_block", "attention_head_dim")  # fmt: skip
        check_sizes(what, config, sizes, lists=("block_out_channels", "layers_per_block", "attention_head_dim"))
        channels = tuple(config["block_out_channels"])
        conditioning = config["addition_embed_type"]
        # a list: an entry that cannot be hashed is wrong, too
        if (conditioning, config["encoder_hid_dim_type"]) not in list(CONDITIONING.items()):
            raise CheckpointError(
                f"{what}: addition_embed_type: expected {' or '.join(map(repr, CONDITIONING))} with the "
                f"encoder_hid_dim_type that goes with it, found {conditioning!r} with "
                f"{config['encoder_hid_dim_type']!r}"
            )
        text = conditioning == "text_image"

        def levels(value: Any) -> tuple[int, ...]:
            return tuple(value) if isinstance(value, list | tuple) else (value,) * len(channels)

        self = cls(
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels", 4),
            channels=channels,
            layers=levels(config.get("layers_per_block", 2)),
            head_dims=levels(config.get("attention_head_dim", 8)),
            down_attention=block_types(what, "down_block_types", config["down_block_types"], DOWN_BLOCKS),
            up_attention=block_types(what, "up_block_types", config["up_block_types"], UP_BLOCKS),
            cross_attention_dim=config["cross_attention_dim"],
            # With text, encoder_hid_dim is the width of its states.
            image_embed_dim=config["cross_attention_dim"] if text else config["encoder_hid_dim"],
            text_dim=config["encoder_hid_dim"] if text else None,
            hint=conditioning == "image_hint",
            norm_groups=config.get("norm_num_groups", 32),
            norm_eps=config.get("norm_eps", 1e-5),
        )
        self.check(what)
        return self

    def check(self, what: str) -> None:
        """Raise CheckpointError where sizes contradict each other."""
        check_lengths(what, block_out_channels=self.channels, layers_per_block=self.layers,
                      attention_head_dim=self.head_dims, down_block_types=self.down_attention,
                      up_block_types=self.up_attention)  # fmt: skip
        for level, (channels, head_dim) in enumerate(zip(self.channels, self.head_dims, strict=True)):
            name = f"block_out_channels[{level}]"
            check_divisible(what, "norm_num_groups", self.norm_groups, **{name: channels})
            if self.down_attention[level] or level == len(self.channels) - 1:
                check_divisible(what, "attention_head_dim", head_dim, **{name: channels})
            if self.up_attention[-1 - level]:
                check_divisible(what, "attention_head_dim", self.head_dims[-1 - level], **{name: channels})
        if not isinstance(self.norm_eps, float | int) or self.norm_eps <= 0:
            raise CheckpointError(f"{what}: norm_eps: expected a number above 0, found {self.norm_eps!r}")
        if self.hint and self.in_channels != 2 * LATENT_CHANNELS:
            raise CheckpointError(
                f"{what}: in_channels: expected 8 with addition_embed_type 'image_hint', found {self.in_channels}"
            )
        if self.in_channels < LATENT_CHANNELS or self.out_channels not in (LATENT_CHANNELS, 2 * LATENT_CHANNELS):
            raise CheckpointError(
                f"{what}: expected at least 4 in_channels and 4 or 8 out_channels, "
                f"found {self.in_channels} and {self.out_channels}"
            )

    @property
    def embedding_dim(self) -> int:
        """Width of the timestep embedding."""
        return 4 * self.channels[0]

    @property
    def tokens(self) -> int:
        """Tokens that condition every attention layer."""
        return IMAGE_TOKENS if self.text_dim is None else IMAGE_TOKENS_BESIDE_TEXT + TEXT_TOKENS

    @property
    def concat_channels(self) -> int:
        """Input channels beside the latents: 4 of a ControlNet hint, 5 of inpainting, or none."""
        return self.in_channels - LATENT_CHANNELS

    @property
    def size_multiple(self) -> int:
        """Latent height and width must be divisible by this."""
        return int(2 ** (len(self.channels) - 1))

    @property
    def feature_channels(self) -> int:
        """Channels that the last level gets from the one below, at the size of the latents."""
        return self.channels[:2][-1]

    @property
    def outer_attention(self) -> bool:
        """Whether the outermost level has attention, on the way down or up."""
        return self.down_attention[0] or self.up_attention[-1]


def block_types(what: str, field: str, names: Any, known: Mapping[str, bool]) -> tuple[bool, ...]:
    """Which levels have attention; CheckpointError for a block type that is not in `known`."""
    unknown = [name for name in names if name not in list(known)] if isinstance(names, list | tuple) else [names]
    if unknown:
        raise CheckpointError(f"{what}: {field}: expected {' or '.join(known)}, found {', '.join(map(repr, unknown))}")
    return tuple(known[name] for name in names)
