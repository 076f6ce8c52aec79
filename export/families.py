"""The families of checkpoints: which pipeline class holds which submodels, and what a UNet was trained for.

What each family computes stands in `export/modules/` and `runtime/families.py`; docs/families.md has both on one page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..engines.manifest import FamilyName, Role

PRIOR, DECODER = ("prior",), ("decoder",)

CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
XLM_R_TOKENIZERS = ("XLMRobertaTokenizer", "XLMRobertaTokenizerFast")
T5_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")
IMAGE_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")


@dataclass(frozen=True)
class Part:
    """A submodel that a family knows.

    `name` is its key in `Checkpoint.submodels`; `alone` and `combined` are its folder's name in a checkpoint of one
    stage and in one that holds prior and decoder; `classes` are those supported (none: any), `config` its JSON file.
    An optional one is a folder that the index does not list and that may be absent.
    """

    name: str
    alone: str
    combined: str
    classes: tuple[str, ...]
    config: str = "config.json"
    optional: bool = False


@dataclass(frozen=True)
class Family:
    """Checkpoints of one generation: the parts of its stages, and pipeline classes by the stages they hold.

    `unets` maps `in_channels` and `addition_embed_type` of the UNet's config to the decoder's role. `prompt_tokens` are
    those that a decoder's prompt is padded and cut to, `sample_size` the side of latents where the UNet names none.
    """

    name: FamilyName
    title: str
    pipelines: Mapping[str, tuple[str, ...]]
    stages: Mapping[str, tuple[Part, ...]]
    unets: Mapping[tuple[int, str | None], Role]
    prompt_tokens: int = 0
    sample_size: int = 64


# 2.1 and 2.2 have the same prior, in other sizes.
PRIOR_PARTS = (
    Part("prior", "prior", "prior_prior", ("PriorTransformer",)),
    Part("text_encoder", "text_encoder", "prior_text_encoder", ("CLIPTextModelWithProjection",)),
    Part("image_encoder", "image_encoder", "prior_image_encoder", ("CLIPVisionModelWithProjection",)),
    Part("tokenizer", "tokenizer", "prior_tokenizer", CLIP_TOKENIZERS, "tokenizer_config.json"),
    Part("prior_scheduler", "scheduler", "prior_scheduler", ("UnCLIPScheduler",), "scheduler_config.json"),
    Part("image_processor", "image_processor", "prior_image_processor", IMAGE_PROCESSORS, "preprocessor_config.json"),
)


def decoder_parts(unet: str, encoder: str = "", tokenizers: tuple[str, ...] = ()) -> tuple[Part, ...]:
    """The parts of a decoder: its UNet's class, and encoder and tokenizers of prompts where it reads them."""
    prompt = (
        Part("prompt_encoder", "text_encoder", "text_encoder", (encoder,)),
        Part("prompt_tokenizer", "tokenizer", "tokenizer", tokenizers, "tokenizer_config.json"),
    )
    return (
        *(prompt if encoder else ()),
        Part("unet", "unet", "unet", (unet,)),
        Part("movq", "movq", "movq", ("VQModel",)),
        Part("scheduler", "scheduler", "scheduler", (), "scheduler_config.json"),
    )


FAMILIES = (
    Family(
        "kandinsky-2-1",
        "Kandinsky 2.1",
        pipelines={
            "KandinskyPriorPipeline": PRIOR,
            "KandinskyPipeline": DECODER,
            "KandinskyImg2ImgPipeline": DECODER,
            "KandinskyInpaintPipeline": DECODER,
            "KandinskyCombinedPipeline": PRIOR + DECODER,
            "KandinskyImg2ImgCombinedPipeline": PRIOR + DECODER,
            "KandinskyInpaintCombinedPipeline": PRIOR + DECODER,
        },
        stages={
            "prior": PRIOR_PARTS,
            "decoder": (
                *decoder_parts("UNet2DConditionModel", "MultilingualCLIP", XLM_R_TOKENIZERS),
                Part("ddpm_scheduler", "ddpm_scheduler", "ddpm_scheduler", ("DDPMScheduler",),
                     "scheduler_config.json", optional=True),
            ),
        },
        unets={(4, "text_image"): "decoder", (9, "text_image"): "inpaint"},
        prompt_tokens=77,
    ),
    Family(
        "kandinsky-2-2",
        "Kandinsky 2.2",
        pipelines={
            "KandinskyV22PriorPipeline": PRIOR,
            "KandinskyV22PriorEmb2EmbPipeline": PRIOR,
            "KandinskyV22Pipeline": DECODER,
            "KandinskyV22Img2ImgPipeline": DECODER,
            "KandinskyV22InpaintPipeline": DECODER,
            "KandinskyV22ControlnetPipeline": DECODER,
            "KandinskyV22ControlnetImg2ImgPipeline": DECODER,
            "KandinskyV22CombinedPipeline": PRIOR + DECODER,
            "KandinskyV22Img2ImgCombinedPipeline": PRIOR + DECODER,
            "KandinskyV22InpaintCombinedPipeline": PRIOR + DECODER,
        },
        stages={"prior": PRIOR_PARTS, "decoder": decoder_parts("UNet2DConditionModel")},
        unets={(4, "image"): "decoder", (9, "image"): "inpaint", (8, "image_hint"): "controlnet"},
    ),
    Family(
        "kandinsky-3",
        "Kandinsky 3",
        pipelines={"Kandinsky3Pipeline": DECODER, "Kandinsky3Img2ImgPipeline": DECODER},
        stages={"decoder": decoder_parts("Kandinsky3UNet", "T5EncoderModel", T5_TOKENIZERS)},
        unets={(4, None): "decoder"},
        prompt_tokens=128,
        sample_size=128,
    ),
)  # fmt: skip


def family_of(name: str) -> Family:
    """The family of this name."""
    return next(family for family in FAMILIES if family.name == name)
