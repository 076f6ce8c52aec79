"""diffusers' own networks as one graph a step: what kandrt's are before they are divided into context and step.

Shapes alone: the networks lie on the meta device, and the weights of their graphs are invented.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...engines.errors import CheckpointError, InputError
from ...engines.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...export.graphs import Graph

Part = Literal["prior_step", "decoder_step"]
# diffusers' class, and the folder of its configuration in a checkpoint.
NETWORKS: Mapping[Part, tuple[str, str]] = {
    "prior_step": ("PriorTransformer", "prior"),
    "decoder_step": ("UNet2DConditionModel", "unet"),
}
ROWS = 2  # one picture with guidance
SCALE = 8  # pixels a latent cell
TEXT_TOKENS = 77
NOTHING = ("aten.empty.", "aten.detach.")  # operators of PyTorch that take memory and launch nothing


def find_part(checkpoint: Path) -> Part:
    """Which step a checkpoint of Kandinsky 2.2 holds; CheckpointError where it is none."""
    for part, (_, folder) in NETWORKS.items():
        if (checkpoint / folder / "config.json").is_file():
            return part
    folders = " or ".join(folder for _, folder in NETWORKS.values())
    raise CheckpointError(f"{checkpoint}: expected a checkpoint of Kandinsky 2.2 with a folder {folders}")


def undivided(checkpoint: Path, size: int, *, exact_norms: bool = True) -> tuple[nn.Module, Graph]:
    """diffusers' network on the meta device in fp16, and its step as a graph of fixed shapes, `size` in pixels.

    exact_norms: with the statistics of norms in fp32, as kandrt's graphs have them, so that the division is all that
    differs; diffusers has them in fp16.
    """
    import diffusers
    import torch
    from torch import nn

    from ...export.graphs import Graph
    from ...export.modules import layers

    part = find_part(checkpoint)
    name, folder = NETWORKS[part]
    kind = getattr(diffusers, name)
    config = kind.load_config(checkpoint / folder)
    with torch.device("meta"):
        network = kind.from_config(config).half().eval()
    for module in network.modules() if exact_norms else ():
        for plain, exact in ((nn.GroupNorm, layers.GroupNorm), (nn.LayerNorm, layers.LayerNorm)):
            if type(module) is plain:
                module.float().__class__ = exact  # pyright: ignore[reportAttributeAccessIssue]
    if part == "prior_step":
        dim = config["embedding_dim"]
        shapes: dict[str, tuple[int, ...]] = {
            "hidden_states": (ROWS, dim), "proj_embedding": (ROWS, dim),
            "encoder_hidden_states": (ROWS, TEXT_TOKENS, dim), "attention_mask": (ROWS, TEXT_TOKENS),
        }  # fmt: skip
        result: tuple[int, ...] = (ROWS, dim)
    else:
        if config.get("encoder_hid_dim_type") != "image_proj":
            raise InputError(
                f"{checkpoint}: its UNet reads more than image embeddings; expected Kandinsky 2.2's decoder"
            )
        cells = size // SCALE
        shapes = {
            "sample": (ROWS, config["in_channels"], cells, cells),
            "image_embeds": (ROWS, config["encoder_hid_dim"]),
        }
        result = (ROWS, config["out_channels"], cells, cells)
    inputs = [TensorSpec(tensor, "float16", shape) for tensor, shape in shapes.items()]
    inputs.append(TensorSpec("timestep", "float32", (ROWS,)))
    return wrapped(network, part), Graph("run", tuple(inputs), (TensorSpec("prediction", "float16", result),))


def wrapped(network: nn.Module, part: Part) -> nn.Module:
    """The network with tensors as its only inputs."""
    from torch import nn

    class Undivided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def run(self, *, timestep: Tensor, **given: Tensor) -> Any:
            if part == "prior_step":
                mask = given.pop("attention_mask") > 0.5
                return self.inner(**given, timestep=timestep, attention_mask=mask, return_dict=False)[0]
            told = {"image_embeds": given["image_embeds"]}
            return self.inner(given["sample"], timestep, None, added_cond_kwargs=told, return_dict=False)[0]

    return Undivided()


def write_undivided(checkpoint: Path, size: int, folder: Path) -> tuple[Path, Graph]:
    """Write the graph of a checkpoint's step with invented weights into a folder: fp16, for one picture with guidance.

    Takes as much disk as the network's weights in 16 bits.
    """
    from ...export.invented import write_invented

    network, graph = undivided(checkpoint, size)
    return write_invented(network, graph, folder / "undivided.onnx"), graph


def eager_launches(checkpoint: Path, size: int) -> int:
    """Kernels that PyTorch launches, at least, for a step of diffusers' network without compilation.

    Every operator that is no view counts as one, attention too; some, such as group norms, are several on a GPU.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from ...export.trace import example_inputs

    network, graph = undivided(checkpoint, size, exact_norms=False)
    counted: Counter[str] = Counter()

    class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            aliases = [returned.alias_info for returned in function._schema.returns]
            if not any(alias is not None and not alias.is_write for alias in aliases):
                counted[str(function)] += 1
            return function(*args, **(kwargs or {}))

    class FusedAttention(TorchFunctionMode):
        """Attention as one operator: the meta device would take it apart."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.nn.functional.scaled_dot_product_attention:
                return torch.zeros_like(args[0])  # the one operator that is counted for it
            return function(*args, **(kwargs or {}))

    given, _ = example_inputs(graph)
    with torch.no_grad(), FusedAttention(), Operators():  # type: ignore[no-untyped-call]
        graph.call(network, given)
    return sum(times for name, times in counted.items() if not name.startswith(NOTHING))
