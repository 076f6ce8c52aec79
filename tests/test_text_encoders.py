"""Kandinsky 2.1's and 3's text encoders against diffusers and transformers, as modules and as graphs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import safetensors.torch
import torch
from torch import Tensor

from kandrt import scripts
from kandrt.engines.errors import CheckpointError
from kandrt.engines.manifest import Component, Precision
from kandrt.engines.ort import OrtSession
from kandrt.export.check import TOLERANCES, difference
from kandrt.export.checkpoint import SubModel
from kandrt.export.graphs import NETWORKS
from kandrt.export.modules import multilingual_clip, t5
from kandrt.export.modules.layers import Network
from kandrt.export.modules.multilingual_clip import MultilingualCLIPConfig
from kandrt.export.modules.t5 import FEED_FORWARDS, T5Config, distance_buckets
from kandrt.export.network import Job, SourceNetwork, Writer, export_network
from kandrt.export.random_weights import random_tensors
from kandrt.export.weight_files import write_safetensors

from .test_networks import AUDIBLE, NEAR, SAME, distance, influences

CONFIGS = Path(scripts.__file__).parent / "checkpoint-configs"
PUBLISHED = {"MultilingualCLIP": "kandinsky-2-1", "T5EncoderModel": "kandinsky-3"}
SMALL: dict[str, dict[str, Any]] = {
    "MultilingualCLIP": {
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 79,  # the smallest for 77 tokens and padding's position 1
        "vocab_size": 200,
        "numDims": 20,
        "transformerDimensions": 48,
    },
    # the heads' common width is not that of a token
    "T5EncoderModel": {"d_model": 48, "d_kv": 10, "d_ff": 64, "num_heads": 4, "num_layers": 2, "vocab_size": 200},
}
TOKENS = {"MultilingualCLIP": 77, "T5EncoderModel": 128}
PADDING = {"MultilingualCLIP": 1, "T5EncoderModel": 0}
SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def published(name: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / PUBLISHED[name] / "text_encoder" / "config.json").read_text())
    return {**config, **changes}


def small(name: str, **changes: Any) -> dict[str, Any]:
    return published(name, **{**SMALL[name], **changes})


def make_oracle(name: str, config: Mapping[str, Any]) -> Any:
    if name == "T5EncoderModel":
        from transformers import T5Config as Config
        from transformers import T5EncoderModel

        return T5EncoderModel(Config(**config)).eval()
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    # its model_type is a constant of the class, and the published config has another one
    return MultilingualCLIP(MCLIPConfig(**{**config, "model_type": "M-CLIP"})).eval()


def write_checkpoint(name: str, config: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """A submodel's random tensors, in a file and by name."""
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", random_tensors(name, config, "test", "float32"))
    return safetensors.torch.load_file(folder / "model.safetensors")


def make_pair(name: str, config: dict[str, Any], folder: Path) -> tuple[Network, Any]:
    """Network and oracle with the same random tensors, all of which the oracle knows."""
    stored = write_checkpoint(name, config, folder / "checkpoint")
    oracle, kind = make_oracle(name, config), NETWORKS[name]
    result = oracle.load_state_dict(stored, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {TIED}  # the same tensor as SHARED
    network = kind.build(kind.config(config)).eval()
    network.load_state_dict({key: tensor for key, tensor in stored.items() if key not in kind.unused})
    return network, oracle


def text_inputs(name: str, config: Mapping[str, Any], lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Token ids, padded after `lengths` tokens, and the mask that says so."""
    mask = torch.zeros(len(lengths), TOKENS[name])
    for row, length in zip(mask, lengths, strict=True):
        row[:length] = 1
    ids = torch.randint(3, config["vocab_size"], mask.shape)
    return torch.where(mask > 0, ids, PADDING[name]), mask


def reference(name: str, oracle: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """What diffusers' pipelines make of a text."""
    if name == "MultilingualCLIP":
        return list(oracle(input_ids=ids, attention_mask=mask))
    # Kandinsky3Pipeline.encode_prompt and _process_embeds
    states: Tensor = oracle(ids, attention_mask=mask).last_hidden_state
    states[mask == 0] = 0
    return [states]


def encode(network: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    found = network.encode(input_ids=ids, text_mask=mask)
    return list(found) if isinstance(found, tuple) else [found]


VARIANTS = [
    ("MultilingualCLIP", {}),
    ("MultilingualCLIP", {"type_vocab_size": 3, "pad_token_id": 1, "layer_norm_eps": 1e-2, "model_type": "M-CLIP"}),
    ("T5EncoderModel", {}),
    ("T5EncoderModel", {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "layer_norm_epsilon": 1e-2}),
    (
        "T5EncoderModel",
        {
            "feed_forward_proj": "relu",
            "dense_act_fn": "relu",
            "is_gated_act": False,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,
        },
    ),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
@pytest.mark.parametrize("fills", [(0.2,), (0.02, 1.0, 0.6)], ids=["one", "three"])
def test_states_are_those_of_the_oracle(
    name: str, changes: dict[str, Any], fills: tuple[float, ...], tmp_path: Path
) -> None:
    config = small(name, **changes)
    network, oracle = make_pair(name, config, tmp_path)
    ids, mask = text_inputs(name, config, tuple(max(1, int(fill * TOKENS[name])) for fill in fills))
    for found, wanted in zip(encode(network, ids, mask), reference(name, oracle, ids, mask), strict=True):
        assert distance(found, wanted) < SAME


def test_positions_are_counted_by_tokens_that_are_not_padding(tmp_path: Path) -> None:
    """XLM-R counts ids, whatever the mask says: also where a padding token stands between others."""
    config = small("MultilingualCLIP")
    network, oracle = make_pair("MultilingualCLIP", config, tmp_path)
    ids, mask = text_inputs("MultilingualCLIP", config, (30, 77))
    ids[:, 7:12] = PADDING["MultilingualCLIP"]
    for found, wanted in zip(encode(network, ids, mask), oracle(ids, mask), strict=True):
        assert distance(found, wanted) < SAME


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 128), (32, 20), (4, 2), (64, 256), (6, 50)])
def test_buckets_of_distances_are_those_of_transformers(buckets: int, distance: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config.from_dict(
        small("T5EncoderModel", relative_attention_num_buckets=buckets, relative_attention_max_distance=distance)
    )
    wanted = T5Attention._relative_position_bucket(torch.arange(-127, 128), True, buckets, distance)
    assert torch.equal(distance_buckets(config), wanted)


# Graphs


def source(name: str, config: Mapping[str, Any], folder: Path, storage: Precision | None = None) -> SourceNetwork:
    submodel = SubModel("text_encoder", folder, "transformers", name, config)
    return SourceNetwork(Job("text_encoder", submodel, None, {"": "text_encoder"}), storage)


def export(
    name: str, config: Mapping[str, Any], folder: Path, precision: Precision, storage: Precision | None = None
) -> Component:
    """Export folder / "checkpoint" to folder / precision, compared with its module on another batch than traced."""
    (folder / precision / "weights").mkdir(parents=True)
    network = source(name, config, folder / "checkpoint", storage)
    with closing(Writer(precision)) as writer:
        writing = writer.start(network, folder / precision / "weights/text_encoder.safetensors")
        exported = export_network(network, folder / precision, precision, True, lambda _: None, writing)
    return exported.components["text_encoder"]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_graphs_are_exported_within_their_tolerance(name: str, precision: Precision, tmp_path: Path) -> None:
    config = small(name)
    _, oracle = make_pair(name, config, tmp_path)
    component = export(name, config, tmp_path, precision)
    assert component.error is not None
    assert component.error.relative < TOLERANCES[precision]  # to the module
    graph = tmp_path / precision / component.graph.file
    model = ir.load(graph)
    kinds = {node.op_type for node in model.graph}
    assert "Attention" in kinds
    assert not kinds & {"Softmax", "Erf", "If", "Loop", "Identity", "Range", "Log"}
    inline = [value.const_value for value in model.graph.initializers.values()]
    assert max(each.nbytes for each in inline if each and not isinstance(each, ir.ExternalTensor)) <= 32 * 1024
    if precision == "bf16":
        return  # ONNX Runtime's CPU provider has none
    ids, mask = text_inputs(name, config, (3, 128, 50, 17, 77) if name == "T5EncoderModel" else (3, 77, 50, 17, 2))
    with closing(OrtSession("text_encoder", graph, component, "cpu")) as session:
        found = session(input_ids=ids.numpy(), text_mask=mask.numpy())
    for spec, wanted in zip(component.outputs, reference(name, oracle, ids, mask), strict=True):
        assert difference(wanted.numpy(), found[spec.name])[0] < (SAME if precision == "fp32" else NEAR[torch.float16])


@pytest.mark.parametrize("name", PUBLISHED)
def test_graphs_in_fp32_read_weights_in_fp16(name: str, tmp_path: Path) -> None:
    config = small(name)
    write_checkpoint(name, config, tmp_path / "checkpoint")
    component = export(name, config, tmp_path, "fp32", "fp16")
    assert component.error is not None
    assert component.error.relative < TOLERANCES["fp32"]
    stored = safetensors.torch.load_file(tmp_path / "fp32/weights/text_encoder.safetensors")
    kept = re.compile(r".*(layer_norm|LayerNorm)\.\w+")
    for key, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if kept.fullmatch(key) else torch.float16), key


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_the_position_bias_of_few_heads_is_no_constant_of_the_graph_either(heads: int, tmp_path: Path) -> None:
    config = small("T5EncoderModel", num_heads=heads, num_layers=1)
    write_checkpoint("T5EncoderModel", config, tmp_path / "checkpoint")
    component = export("T5EncoderModel", config, tmp_path, "fp32")
    assert component.graph.size < 100_000


# Reduced precision


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
@pytest.mark.parametrize("dtype", NEAR)
def test_reduced_precision_stays_near_fp32(
    name: str, changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    config = small(name, **changes)
    network, _ = make_pair(name, config, tmp_path)
    ids, mask = text_inputs(name, config, (5, TOKENS[name]))
    wanted = encode(network, ids, mask)
    network.set_precision(dtype)
    for key, parameter in network.named_parameters():
        assert parameter.dtype == (torch.float32 if re.search("layer_norm|LayerNorm", key) else dtype), key
    for found, exact in zip(encode(network, ids, mask), wanted, strict=True):
        assert 0 < distance(found, exact) < NEAR[dtype]


# feed_forward_proj -> factor of the weights before the last layer, and of those of the last layer: with either the
# numbers that go beyond 65504 are those that do so in trained encoders
LARGE = {
    "gated-silu": (200.0, 1.0),  # the product of gate and linear part, though both are below 1000
    "gated-gelu": (200.0, 1.0),
    "relu": (200.0, 1000.0),  # the sums of the last layer, whose input is below 1000
}


def test_large_numbers_are_tried_with_every_feed_forward() -> None:
    assert LARGE.keys() == FEED_FORWARDS.keys()


def enlarged(feed_forward: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint whose feed-forwards give more than fp16 can hold, from weights and inputs that it can."""
    gated, _, activation = FEED_FORWARDS[feed_forward]
    config = small("T5EncoderModel", feed_forward_proj=feed_forward, dense_act_fn=activation, is_gated_act=gated)
    tensors = write_checkpoint("T5EncoderModel", config, folder)
    before, last = LARGE[feed_forward]
    for name, tensor in tensors.items():
        tensor *= before if re.search(r"\.wi(_[01])?\.", name) else last if ".wo." in name else 1.0
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    assert max(float(tensor.abs().max()) for tensor in tensors.values()) < 1000
    return config, tensors


@pytest.mark.parametrize("feed_forward", LARGE)
def test_numbers_beyond_fp16_are_exact_in_fp16(feed_forward: str, tmp_path: Path) -> None:
    config, tensors = enlarged(feed_forward, tmp_path / "checkpoint")
    ids, mask = text_inputs("T5EncoderModel", config, (9, 128))
    oracle = make_oracle("T5EncoderModel", config)
    oracle.load_state_dict(tensors, strict=False)
    (wanted,) = reference("T5EncoderModel", oracle, ids, mask)
    (naive,) = reference("T5EncoderModel", oracle.half(), ids, mask)
    assert not naive.isfinite().all() or distance(naive.float(), wanted) > 0.1
    kind = NETWORKS["T5EncoderModel"]
    network = kind.build(kind.config(config)).eval()
    network.load_state_dict(tensors)
    network.set_precision(torch.float16)
    (found,) = encode(network, ids, mask)
    assert distance(found, wanted) < NEAR[torch.float16]
    component = export("T5EncoderModel", config, tmp_path, "fp16")
    assert component.error is not None
    assert component.error.relative < TOLERANCES["fp16"]


def test_a_feed_forward_that_gives_nothing_is_no_division_by_zero() -> None:
    kind = NETWORKS["T5EncoderModel"]
    network = kind.build(kind.config(small("T5EncoderModel"))).eval()
    layer: Any = network.get_submodule("encoder.block.0.layer.1.DenseReluDense")
    network.set_precision(torch.float16)
    x = torch.randn(2, 5, 48).half() * torch.tensor([0.0, 6e-8]).half()[:, None, None]  # and the smallest there is
    found = layer(x)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert not found[0].any()


# What checkpoints store


@pytest.mark.parametrize(("name", "parameters"), [("MultilingualCLIP", 560_677_632), ("T5EncoderModel", 8_721_797_632)])
def test_parameters_of_the_published_sizes_are_those_of_the_oracle(name: str, parameters: int) -> None:
    config, kind = published(name), NETWORKS[name]
    with torch.device("meta"):
        wanted = make_oracle(name, config).state_dict()
        found = kind.build(kind.config(config)).state_dict()
    wanted.pop(TIED, None)
    assert {key: t.shape for key, t in found.items()} == {k: t.shape for k, t in wanted.items() if k not in kind.unused}
    assert set(kind.unused) <= wanted.keys()
    assert sum(tensor.numel() for tensor in wanted.values()) == parameters


@pytest.mark.parametrize("stored", [(SHARED,), (TIED,), (SHARED, TIED)], ids=["one", "the other", "both"])
def test_tied_embeddings_are_read_by_either_name_and_written_once(stored: tuple[str, ...], tmp_path: Path) -> None:
    config = small("T5EncoderModel", num_layers=1)
    tensors = write_checkpoint("T5EncoderModel", config, tmp_path / "checkpoint")
    embedding = tensors.pop(SHARED)
    file = tmp_path / "checkpoint" / "model.safetensors"
    safetensors.torch.save_file(tensors | {name: embedding.clone() for name in stored}, file)
    assert torch.equal(source("T5EncoderModel", config, file.parent).read(SHARED), embedding)
    component = export("T5EncoderModel", config, tmp_path, "fp32")
    assert component.error is not None
    assert component.error.relative < TOLERANCES["fp32"]
    written = safetensors.torch.load_file(tmp_path / "fp32/weights/text_encoder.safetensors")
    assert torch.equal(written[SHARED], embedding)
    assert sum(tensor.numel() for tensor in written.values()) == embedding.numel() + sum(
        tensor.numel() for tensor in tensors.values()
    )


def test_an_embedding_under_neither_name_is_missing(tmp_path: Path) -> None:
    config = small("T5EncoderModel", num_layers=1)
    tensors = write_checkpoint("T5EncoderModel", config, tmp_path / "checkpoint")
    del tensors[SHARED]
    safetensors.torch.save_file(tensors, tmp_path / "checkpoint" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: shared\.weight$"):
        source("T5EncoderModel", config, tmp_path / "checkpoint")


# Random weights


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("wide", [False, True])
def test_random_signals_keep_their_size_and_no_parameter_is_silent(name: str, wide: bool, tmp_path: Path) -> None:
    more = {"MultilingualCLIP": {"num_hidden_layers": 8}, "T5EncoderModel": {"d_kv": 128, "num_layers": 8}}[name]
    config = small(name, **(more if wide else {}))
    network, _ = make_pair(name, config, tmp_path)
    ids, mask = text_inputs(name, config, (12, 50))
    with torch.enable_grad():
        outputs = encode(network, ids, mask)
        found = influences(network, outputs)
    states = outputs[-1][mask > 0]
    assert 0.5 < float(states.std()) < 2
    for key, influence in found.items():
        silent = r".*\.key\.bias"  # moves every score of a query by the same amount, which a softmax does not see
        assert (influence > AUDIBLE) != bool(re.fullmatch(silent, key)), (key, influence)


# Configs


SIZES: list[Any] = [0, -1, 2.5, "4", True, None]
BAD: dict[str, dict[str, list[Any]]] = {
    "MultilingualCLIP": {
        **dict.fromkeys(["intermediate_size", "num_hidden_layers", "vocab_size", "type_vocab_size", "numDims"], SIZES),
        "hidden_size": [*SIZES, 1023],
        "num_attention_heads": [*SIZES, 15],
        "transformerDimensions": [*SIZES, 768],
        "max_position_embeddings": [*SIZES, 78],
        "pad_token_id": [-1, 250002, 1.0, True, None],
        "layer_norm_eps": [0, -1e-5, "1e-5", None, True],
        "hidden_act": ["relu", "gelu_new", None],
        "position_embedding_type": ["relative_key", None],
        "model_type": ["roberta", "t5", None],
        "is_decoder": [True],
        "quantization_config": [{"bits": 4}],
        "imageDimSize": [512],
    },
    "T5EncoderModel": {
        **dict.fromkeys(["d_model", "d_kv", "d_ff", "num_heads", "num_layers", "vocab_size"], SIZES),
        "relative_attention_num_buckets": [*SIZES, 2, 31, 512],
        "relative_attention_max_distance": [*SIZES, 8],
        "layer_norm_epsilon": [0, -1e-6, "1e-6", None, True],
        "feed_forward_proj": ["gated-relu", "silu", "gated", None, 3, ["relu"]],
        "dense_act_fn": ["gelu", "relu", 1],
        "is_gated_act": [False, "yes"],
        "model_type": ["umt5", "mt5", None],
        "is_decoder": [True],
        "quantization_config": [{"bits": 4}],
    },
}
REQUIRED = {
    "MultilingualCLIP": ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
                         "max_position_embeddings"),
    "T5EncoderModel": ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "vocab_size"),
}  # fmt: skip
READ: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "MultilingualCLIP": MultilingualCLIPConfig.from_dict,
    "T5EncoderModel": T5Config.from_dict,
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in BAD.items() for field in fields])
def test_configs_that_cannot_be_honoured_are_refused_by_the_name_of_the_field(name: str, field: str) -> None:
    for value in BAD[name][field]:
        with pytest.raises(CheckpointError, match=field):
            READ[name](published(name, **{field: value}))


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_fields_are_named(name: str) -> None:
    for field in REQUIRED[name]:
        with pytest.raises(CheckpointError, match=f"{field}: missing"):
            READ[name]({key: value for key, value in published(name).items() if key != field})


# Field of our config -> the oracle's name for it
OPTIONAL = {
    "MultilingualCLIP": {
        "token_types": "type_vocab_size",
        "pad_token_id": "pad_token_id",
        "norm_eps": "layer_norm_eps",
        "embedding_dim": "numDims",
    },
    "T5EncoderModel": {
        "buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
        "norm_eps": "layer_norm_epsilon",
        "feed_forward": "feed_forward_proj",
    },
}


@pytest.mark.parametrize("name", READ)
def test_what_a_config_leaves_out_is_what_the_oracle_takes(name: str) -> None:
    least = {field: small(name)[field] for field in REQUIRED[name]} | {"transformerDimensions": 48}
    theirs = make_oracle(name, least).config
    if name == "T5EncoderModel":
        del least["transformerDimensions"]
    config = READ[name](least)
    for ours, field in OPTIONAL[name].items():
        assert getattr(config, ours) == getattr(theirs, field), field


def test_the_numbers_of_tokens_are_those_of_the_pipelines() -> None:
    import inspect

    from diffusers import Kandinsky3Pipeline, KandinskyPipeline

    assert "max_length = 128" in inspect.getsource(Kandinsky3Pipeline.encode_prompt)
    assert "max_length=77" in inspect.getsource(KandinskyPipeline._encode_prompt)
    assert (multilingual_clip.TEXT_TOKENS, t5.TEXT_TOKENS) == (77, 128)
