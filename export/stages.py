"""The two stages of a bundle, prior and decoder: which networks they have, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.errors import CheckpointError
from ..engines.manifest import (
    DecoderRecord,
    FeatureReuse,
    Precision,
    PriorRecord,
    PromptRecord,
    Role,
    TokenizerRecord,
)
from .checkpoint import Checkpoint, SubModel, roles
from .draft import Draft, file_record, save_arrays
from .families import family_of
from .network import Job, SourceNetwork
from .tokenizer import export_tokenizer

REUSE = ("refresh", "shallow")  # a UNet's graphs that stand in for its step, by the fields of FeatureReuse
TOKENIZER, PROMPT_TOKENIZER = "tokenizer.json", "prompt_tokenizer.json"


def network_sources(
    checkpoint: Checkpoint, storage: Precision | None = None, feature_reuse: bool = False
) -> dict[str, SourceNetwork]:
    """Every network of a checkpoint by submodel, configs and tensor names checked before any work begins.

    `storage` is what weights are stored in where that is not what graphs compute in. With `feature_reuse` a UNet has
    the graphs of REUSE beside.
    """
    components: dict[str, tuple[str, dict[str, str]]] = {}
    for role in roles(checkpoint):
        if role == "prior":
            components["prior"] = "prior", {"context": "prior_context", "step": "prior_step"}
            components["text_encoder"] = "text_encoder", {"": "text_encoder"}
            components["image_encoder"] = "image_encoder", {"": "image_encoder"}
        else:
            if "prompt_encoder" in checkpoint.submodels:
                components["prompt_encoder"] = "prompt_encoder", {"": "prompt_encoder"}
            components["movq"] = "movq", {"encoder": "movq_encoder", "decoder": "movq_decoder"}
            graphs = ("context", "step", *(REUSE if feature_reuse else ()))
            components["unet"] = role, {graph: f"{role}_{graph}" for graph in graphs}
    return {
        key: SourceNetwork(Job(name, checkpoint.submodels[key], checkpoint.variant, graphs), storage)
        for key, (name, graphs) in components.items()
    }


def add_tokenizers(draft: Draft, checkpoint: Checkpoint, networks: Mapping[str, SourceNetwork]) -> None:
    """Write the tokenizers of a checkpoint, before any network: it takes a moment, and much can be wrong with them."""
    for role in roles(checkpoint):
        if role == "prior":
            draft.tokenizer = add_tokenizer(draft.folder, checkpoint.submodels["tokenizer"], networks)
        elif "prompt_encoder" in networks:
            draft.prompt_tokenizers[role] = add_prompt_tokenizer(draft, checkpoint, role)


def add_prior(draft: Draft, checkpoint: Checkpoint, networks: Mapping[str, SourceNetwork]) -> None:
    """Add prior, text and image encoder, scheduler, image preprocessing and statistics."""
    submodels = checkpoint.submodels
    for key in ("text_encoder", "prior", "image_encoder"):
        draft.add(networks[key])
    draft.report("embedding the zero image")
    draft.schedulers["prior"] = dict(submodels["prior_scheduler"].config)
    draft.image_processor = dict(submodels["image_processor"].config)
    draft.prior = PriorRecord(
        text_encoder="text_encoder",
        image_encoder="image_encoder",
        context="prior_context",
        step="prior_step",
        scheduler="prior",
        statistics=save_arrays(draft.folder, "weights/statistics.safetensors", statistics(networks)),
        embedding_dim=networks["prior"].config.embedding_dim,
    )


def add_tokenizer(folder: Path, tokenizer: SubModel, networks: Mapping[str, SourceNetwork]) -> TokenizerRecord:
    """Write tokenizer.json; CheckpointError where it, the text encoder and the prior differ in the number of tokens."""
    text = networks["text_encoder"].config.values
    positions, expected = text["max_position_embeddings"], networks["prior"].config.text_tokens
    info = export_tokenizer(
        tokenizer.folder, folder / TOKENIZER, tokenizer.class_name, vocab_size=text["vocab_size"], max_length=positions
    )
    if {info.max_length, positions} != {expected}:
        raise CheckpointError(
            f"{tokenizer.folder}: model_max_length is {info.max_length}, the text encoder has {positions} positions, "
            f"and the prior takes {expected} tokens; these must be equal"
        )
    return TokenizerRecord(file_record(folder, TOKENIZER), info.max_length, info.pad_token_id)


def statistics(networks: Mapping[str, SourceNetwork]) -> dict[str, NDArray[Any]]:
    """Mean and deviation of image embeddings, and the embedding of a zero pixel tensor.

    diffusers 0.42.1, `KandinskyV22PriorPipeline.get_zero_embed`: zeros stand for the normalised pixels, so this is not
    the embedding of a black picture.
    """
    encoder = networks["image_encoder"]
    (session,) = encoder.sessions().values()
    (spec,) = session.inputs
    zeros = np.zeros([1, *(axis for axis in spec.shape if isinstance(axis, int))], np.float32)
    prior = networks["prior"]
    return {
        "clip_mean": prior.read("clip_mean").float().numpy(),
        "clip_std": prior.read("clip_std").float().numpy(),
        "zero_image_embeds": session(**{spec.name: zeros})["image_embeds"],
    }


def add_decoder(draft: Draft, checkpoint: Checkpoint, networks: Mapping[str, SourceNetwork], role: Role) -> None:
    """Add what reads prompts, MoVQ, UNet and schedulers; what the bundle has already is not stored again."""
    family, unet = family_of(checkpoint.family), networks["unet"]
    prompt = add_prompt(draft, networks, role)
    movq = draft.add_common("movq", networks["movq"], role)
    draft.add(unet)
    draft.schedulers[role] = dict(checkpoint.submodels["scheduler"].config)
    others = {f"{role}_ddpm": key for key in ("ddpm_scheduler",) if key in checkpoint.submodels}
    draft.schedulers.update({name: dict(checkpoint.submodels[key].config) for name, key in others.items()})
    pair = {graph: name for graph, name in unet.job.components.items() if graph in REUSE}
    scale, size = networks["movq"].config.scale, checkpoint.submodels["unet"].config.get("sample_size")
    draft.decoders[role] = DecoderRecord(
        context=unet.job.components["context"],
        step=unet.job.components["step"],
        movq_encoder=movq["encoder"],
        movq_decoder=movq["decoder"],
        scheduler=role,
        embedding_dim=width(unet, "image_embeds"),
        scale=scale,
        # diffusers rounds sizes to scale² (64 pixels); a UNet with more levels than that allows needs its own multiple
        size_multiple=scale * max(unet.config.size_multiple, scale),
        # diffusers allows a pair as well, which no checkpoint has: it is only a default
        default_size=scale * (size if type(size) is int and size > 0 else family.sample_size),
        prompt=prompt,
        schedulers=tuple(others),
        reuse=FeatureReuse(**pair) if pair else None,
    )


def add_prompt_tokenizer(draft: Draft, checkpoint: Checkpoint, role: Role) -> TokenizerRecord:
    """Write the tokenizer of a decoder's prompts; one that another decoder has too is there once.

    Raises CheckpointError where it and the text encoder disagree.
    """
    tokenizer, config = (checkpoint.submodels[key] for key in ("prompt_tokenizer", "prompt_encoder"))
    file = f"{role}_{PROMPT_TOKENIZER}"
    info = export_tokenizer(
        tokenizer.folder,
        draft.folder / file,
        tokenizer.class_name,
        vocab_size=config.config["vocab_size"],
        length=family_of(checkpoint.family).prompt_tokens,
    )
    pad = config.config.get("pad_token_id")
    if pad not in (None, info.pad_token_id):
        raise CheckpointError(
            f"{tokenizer.folder}: the padding token has the id {info.pad_token_id}, and the text encoder's "
            f"pad_token_id is {pad}: they are not from one checkpoint"
        )
    written = file_record(draft.folder, file)
    for other in draft.prompt_tokenizers.values():
        if other.file.sha256 == written.sha256:
            info.path.unlink()
            return other
    if not draft.prompt_tokenizers:
        info.path.rename(draft.folder / PROMPT_TOKENIZER)
        written = replace(written, file=PROMPT_TOKENIZER)
    return TokenizerRecord(written, info.max_length, info.pad_token_id)


def add_prompt(draft: Draft, networks: Mapping[str, SourceNetwork], role: Role) -> PromptRecord | None:
    """Add the text encoder of a decoder; None where the decoder reads no prompt."""
    source = networks.get("prompt_encoder")
    if source is None:
        return None
    encoder = draft.add_common("prompt_encoder", source, role)[""]
    return PromptRecord(encoder, draft.prompt_tokenizers[role], states_dim=width(source, "text_states") or 0)


def width(source: SourceNetwork, name: str) -> int | None:
    """The last axis of a tensor that goes in or out of any of a network's graphs; None where there is none so named."""
    specs = (spec for graph in source.graphs.values() for spec in (*graph.inputs, *graph.outputs))
    return next((spec.shape[-1] for spec in specs if spec.name == name and isinstance(spec.shape[-1], int)), None)
