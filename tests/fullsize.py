"""What only the full-size networks can show, on random weights; slow, so a script and not a test.

    python tests/fullsize.py decoder [--folder DIR]    # 12 GB of disk, about 4 minutes on two cores
    python tests/fullsize.py prior [--folder DIR]      # 20 GB of disk, about 10 minutes

decoder: time and peak memory of `kandrt export`, and one exported UNet step against diffusers.
prior: the same export figures, and 25 steps with their context against diffusers in fp32, in alternation.
Exits with 1 where a bound does not hold. Folders that exist are used as they are.
"""

from __future__ import annotations

import argparse
import json
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
ROUNDS = 3

# Bounds, and what they are bounds of
MAX_EXPORT_SECONDS, MAX_EXPORT_GB = 90, 2.0
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
    if not checkpoint.exists():
        run("-m", "kandrt.scripts.random_checkpoint", f"kandinsky-2-2-{kind}", "-o", str(checkpoint))
    if bundle.exists():
        return checkpoint, bundle, []
    seconds, memory = run("-m", "kandrt.scripts.cli", "export", str(checkpoint), "-o", str(bundle))
    return (
        checkpoint,
        bundle,
        [
            row("export, seconds", seconds, at_most=MAX_EXPORT_SECONDS),
            row("export, peak GB", memory, at_most=MAX_EXPORT_GB),
        ],
    )


def sessions(bundle: Path, *names: str) -> list[Any]:
    """Components of a bundle under ONNX Runtime."""
    from kandrt.engines.backends import open_component
    from kandrt.engines.bundle import open_bundle

    opened = open_bundle(bundle)
    return [open_component(opened, name, backend="onnxruntime", device="cpu") for name in names]


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def decoder(folder: Path) -> list[dict[str, Any]]:
    """Export figures, and one step of 512 x 512 pixels, batch 2, against diffusers."""
    import torch
    from diffusers import UNet2DConditionModel

    checkpoint, bundle, rows = exported("decoder", folder)
    rng = np.random.default_rng(0)
    sample, image_embeds = rng.standard_normal((2, 4, 64, 64), np.float32), rng.standard_normal((2, 1280), np.float32)
    timestep = 500
    context_session, step = sessions(bundle, "decoder_context", "decoder_step")
    context = context_session(image_embeds=image_embeds, timesteps=np.array([timestep], np.float32))
    embedding = context.pop("embedding")[0]
    found = step(sample=sample, embedding=embedding, **context)["prediction"]
    step.close()
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", low_cpu_mem_usage=True).eval()
    with torch.no_grad():
        added = {"image_embeds": torch.from_numpy(image_embeds)}
        expected = unet(torch.from_numpy(sample), timestep, None, added_cond_kwargs=added).sample.numpy()
    error = relative(found, expected)
    return [
        *rows,
        row("UNet step, relative error", error, at_most=MAX_STEP_ERROR),
    ]


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
    parser.add_argument("what", choices=["decoder", "prior"])
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints and bundles are kept (default: a temporary folder)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = {"decoder": decoder, "prior": prior}[arguments.what](arguments.folder or Path(temporary))
    for figure in rows:
        holds = "holds" if figure["holds"] else "FAILS"
        print(f"{figure['what']:50} {figure['found']:12.4g}   bound {figure['bound']:<8g} {holds}")
    sys.exit(not all(figure["holds"] for figure in rows))


if __name__ == "__main__":
    main()
