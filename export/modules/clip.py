"""CLIP's text and image encoders, from transformers, under the calling convention of the graphs.

Source: transformers 5.23 `CLIPTextModelWithProjection` and `CLIPVisionModelWithProjection`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ...engines.errors import CheckpointError
from .config import check_divisible, check_sizes
from .layers import Network

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "projection_dim")
REQUIRED = {
    "clip_text_model": (*SIZES, "max_position_embeddings", "vocab_size"),
    "clip_vision_model": (*SIZES, "image_size", "patch_size"),
}
ACTIVATIONS = ("quick_gelu", "gelu")  # the first where the config names none


@dataclass(frozen=True)
class CLIPConfig:
    """A transformers CLIP configuration; `values` as config.json has them."""

    values: Mapping[str, Any] = field(hash=False)
    model_type: str

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CLIPConfig:
        """Read config.json; raises CheckpointError where it is not that of a CLIP encoder, or incomplete."""
        model_type = config.get("model_type")
        if model_type not in ("clip_text_model", "clip_vision_model"):
            raise CheckpointError(
                f"CLIP encoder: model_type: expected 'clip_text_model' or 'clip_vision_model', found {model_type!r}"
            )
        what, required = f"CLIP encoder ({model_type})", REQUIRED[model_type]
        missing = [field for field in required if field not in config]
        if missing:
            raise CheckpointError(f"{what}: config fields are missing: {', '.join(missing)}")
        check_sizes(what, config, required)
        check_divisible(what, "num_attention_heads", config["num_attention_heads"], hidden_size=config["hidden_size"])
        if config.get("hidden_act", ACTIVATIONS[0]) not in ACTIVATIONS:
            raise CheckpointError(
                f"{what}: hidden_act: expected {' or '.join(ACTIVATIONS)}, found {config['hidden_act']!r}"
            )
        kept = {name: value for name, value in config.items() if name not in ("torch_dtype", "dtype")}
        return cls({**kept, "attn_implementation": "sdpa"}, model_type)


class Encoder(Network):
    """What both encoders have beside their network."""

    def constants(self) -> dict[str, Tensor]:
        """The numbers of the positions."""
        ids = {name: buffer for name, buffer in self.named_buffers() if name.endswith("position_ids")}
        return {name: torch.arange(buffer.shape[-1]).expand(buffer.shape).clone() for name, buffer in ids.items()}


class TextEncoder(Encoder):
    """Tokens to the projected text embedding and the states of all positions."""

    def __init__(self, config: CLIPConfig) -> None:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        super().__init__()
        self.config = CLIPTextConfig(**config.values)
        self.network = CLIPTextModelWithProjection(self.config)

    def encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids [B, N] int64 -> text_embeds [B, D], text_states [B, N, D]; fp32.

        The embedding is that of the end token, which is the first highest id.
        """
        out = self.network(input_ids=input_ids)
        return out.text_embeds.float(), out.last_hidden_state.float()


class ImageEncoder(Encoder):
    """Pixels to the projected image embedding."""

    def __init__(self, config: CLIPConfig) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        self.config = CLIPVisionConfig(**config.values)
        self.network = CLIPVisionModelWithProjection(self.config)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S], normalised -> image_embeds [B, D], fp32."""
        pixel_values = pixel_values.to(self.network.visual_projection.weight.dtype)
        return cast("Tensor", self.network(pixel_values=pixel_values).image_embeds.float())
