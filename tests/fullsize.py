"""What only the full-size networks can show, on random weights; slow, so a script and not a test.

    python tests/fullsize.py decoder [--folder DIR]        # 12 GB of disk, about 4 minutes on two cores
    python tests/fullsize.py decoder-2-1 [--folder DIR]    # 15 GB of disk
    python tests/fullsize.py decoder-3 [--folder DIR]      # 48 GB of disk, 20 GB of memory
    python tests/fullsize.py prior [--folder DIR]          # 20 GB of disk, about 10 minutes

decoder...: time and peak memory of `kandrt export`, and one exported UNet step against diffusers, of Kandinsky 2.2, 2.1
and 3, the last two with their text encoders; 3 with weights stored in fp16 and graphs in fp32.
prior: the same export figures, and 25 steps with their context against diffusers in fp32, in alternation.
Exits with 1 where a bound does not hold. Folders that exist are used as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS = 25
TOKENS = 12  # of a prompt, one of padding among them
ROUNDS = 3

# Checkpoint, diffusers' class of its UNet, what its weights are stored in
CHECKPOINTS = {
    "decoder": ("kandinsky-2-2-decoder", "UNet2DConditionModel", "fp32"),
    "decoder-2-1": ("kandinsky-2-1", "UNet2DConditionModel", "fp32"),
    "decoder-3": ("kandinsky-3", "Kandinsky3UNet", "fp16"),
    "prior": ("kandinsky-2-2-prior", "PriorTransformer", "fp32"),
}

# Bounds, and what they are bounds of
MAX_EXPORT_SECONDS, MAX_EXPORT_GB = 90, 2.0  # seconds: of 2.2's decoder; GB: beside the largest single tensor
MAX_STEP_ERROR = 1e-4  # relative L2
MIN_PRIOR_RATIO = 8.0


def run(*command: str) -> tuple[float, float]:
    """Run a command; its seconds, and its peak resident memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6  # kB on Linux


def row(what: str, found: float, *, at_most: float = float("inf"), at_least: float = 0.0) -> dict[str, Any]:
    """A figure and its bound."""
    return {"what": what, "found": found, "bound": at_least or at_most, "holds": at_least <= found <= at_most}


def exported(kind: str, folder: Path) -> tuple[Path, Path, list[dict[str, Any]]]:
    """A full-size random checkpoint and its bundle, made if need be, with the export's figures."""
    checkpoint, bundle = folder / kind, folder / f"{kind}-bundle"
    name, _, precision = CHECKPOINTS[kind]
    if not checkpoint.exists():
        made = ("-o", str(checkpoint), "--precision", precision)
        run("-m", "kandrt.scripts.random_checkpoint", name, *made)
    if bundle.exists():
        return checkpoint, bundle, []
    options = ("-o", str(bundle), "--no-check", "--storage", precision)
    seconds, memory = run("-m", "kandrt.scripts.cli", "export", str(checkpoint), *options)
    largest = largest_tensor(checkpoint)
    rows = [row("export, peak GB", memory, at_most=MAX_EXPORT_GB + largest / 1e9)]
    if kind == "decoder":
        rows.append(row("export, seconds", seconds, at_most=MAX_EXPORT_SECONDS))
    print(f"export: {seconds:.0f} s, largest tensor {largest / 1e9:.2f} GB in fp32")
    return checkpoint, bundle, rows


def largest_tensor(checkpoint: Path) -> int:
    """Bytes in fp32 of the largest tensor of any network."""
    from safetensors import safe_open

    largest = 0
    for file in checkpoint.rglob("*.safetensors"):
        with safe_open(file, "np") as opened:
            largest = max(largest, *(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys()))  # noqa: SIM118
    return 4 * largest


def sessions(bundle: Path, *names: str) -> list[Any]:
    """Components of a bundle under ONNX Runtime."""
    from kandrt.engines.backends import open_component
    from kandrt.engines.bundle import open_bundle

    opened = open_bundle(bundle)
    return [open_component(opened, name, backend="onnxruntime", device="cpu") for name in names]


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def decoder(kind: str, folder: Path) -> list[dict[str, Any]]:
    """Export figures, and one step of 512 x 512 pixels, batch 2, against diffusers."""
    checkpoint, bundle, rows = exported(kind, folder)
    rng = np.random.default_rng(0)
    sample, timestep = rng.standard_normal((2, 4, 64, 64), np.float32), 500
    context_session, step = sessions(bundle, "decoder_context", "decoder_step")
    shapes = {spec.name: [2, *(TOKENS if isinstance(axis, str) else axis for axis in spec.shape[1:])]
              for spec in context_session.inputs if spec.name != "timesteps"}  # fmt: skip
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    if "text_mask" in inputs:  # the first row as that of no negative prompt
        inputs["text_mask"] = (np.arange(TOKENS) < np.array([[0], [TOKENS - 1]])).astype(np.float32)
        inputs["text_states"] *= inputs["text_mask"][..., None]
    context = context_session(**inputs, timesteps=np.array([timestep], np.float32))
    context_session.close()
    embedding = context.pop("embedding")[0]
    found = step(sample=sample, embedding=embedding, **context)["prediction"]
    step.close()
    expected = oracle_step(checkpoint / "unet", CHECKPOINTS[kind][1], sample, timestep, inputs)
    return [*rows, row("UNet step, relative error", relative(found, expected), at_most=MAX_STEP_ERROR)]


def oracle_step(
    folder: Path, class_name: str, sample: NDArray[Any], timestep: int, inputs: dict[str, NDArray[Any]]
) -> NDArray[Any]:
    """What diffusers' UNet gives."""
    import diffusers
    import torch

    unet = getattr(diffusers, class_name).from_pretrained(folder, low_cpu_mem_usage=True, torch_dtype=torch.float32)
    told = {name: torch.from_numpy(array) for name, array in inputs.items()}
    states, mask = told.pop("text_states", None), told.pop("text_mask", None)
    arguments = {"added_cond_kwargs": told} if mask is None else {"encoder_attention_mask": mask}
    with torch.no_grad():
        out = unet.eval()(torch.from_numpy(sample), timestep, encoder_hidden_states=states, **arguments)
    return np.asarray(out.sample)


def prior(folder: Path) -> list[dict[str, Any]]:
    """Export figures, and the time of STEPS steps with their context against diffusers, [negative; positive] batch."""
    import torch
    from diffusers import PriorTransformer

    checkpoint, bundle, rows = exported("prior", folder)
    rows = [
        figure for figure in rows if "seconds" not in figure["what"]
    ]  # 3.6 B parameters: the bound is for a decoder
    rng = np.random.default_rng(0)
    text = {
        "text_embeds": rng.standard_normal((2, 1280), np.float32),
        "text_states": rng.standard_normal((2, 77, 1280), np.float32),
    }
    text["text_mask"] = (np.arange(77) < np.array([[2], [9]])).astype(np.float32)
    noise = rng.standard_normal((STEPS, 2, 1280), np.float32)
    timesteps = np.linspace(999, 0, STEPS).round().astype(np.float32)
    context_session, step = sessions(bundle, "prior_context", "prior_step")
    network = PriorTransformer.from_pretrained(checkpoint / "prior", low_cpu_mem_usage=True).eval()

    def ours() -> NDArray[Any]:
        context = context_session(**text, timesteps=timesteps)
        embedding = context.pop("embedding")
        embeddings = np.repeat(embedding[:, None], 2, axis=1)
        outputs = [step(sample=x, embedding=e, **context) for x, e in zip(noise, embeddings, strict=True)]
        return np.stack([output["prediction"] for output in outputs])

    def oracle() -> NDArray[Any]:
        tensors = {name: torch.from_numpy(array) for name, array in text.items()}
        with torch.no_grad():
            outputs = [
                network(
                    torch.from_numpy(x),
                    int(t),
                    tensors["text_embeds"],
                    tensors["text_states"],
                    tensors["text_mask"].bool(),
                )
                for x, t in zip(noise, timesteps, strict=True)
            ]
        return np.stack([output.predicted_image_embedding.numpy() for output in outputs])

    seconds: dict[str, list[float]] = {"ours": [], "oracle": []}
    results: dict[str, NDArray[Any]] = {}
    ours()  # the first run reads the weights from the disk
    for _ in range(ROUNDS):
        for name, function in (("ours", ours), ("oracle", oracle)):
            start = time.perf_counter()
            results[name] = function()
            seconds[name].append(time.perf_counter() - start)
    ratio = statistics.median(seconds["oracle"]) / statistics.median(seconds["ours"])
    error = relative(results["ours"], results["oracle"])
    print(json.dumps({"seconds": seconds}))
    return [
        *rows,
        row(f"{STEPS} prior steps, relative error", error, at_most=MAX_STEP_ERROR),
        row(f"{STEPS} prior steps, times faster than diffusers", ratio, at_least=MIN_PRIOR_RATIO),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(CHECKPOINTS))
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints and bundles are kept (default: a temporary folder)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        rows = prior(folder) if arguments.what == "prior" else decoder(arguments.what, folder)
    for figure in rows:
        holds = "holds" if figure["holds"] else "FAILS"
        print(f"{figure['what']:50} {figure['found']:12.4g}   bound {figure['bound']:<8g} {holds}")
    sys.exit(not all(figure["holds"] for figure in rows))


if __name__ == "__main__":
    main()
