"""The end-to-end check: a few small requests with fixed inputs, and how close two ways to run them have to be.

PyTorch's answers are kept in a bundle when it is exported; whatever runs the bundle later is held to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..engines.errors import BundleError, KandrtError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..engines.manifest import DecoderRecord, Manifest, Precision, Role
    from ..engines.session import Session
    from ..runtime import Embeds, Kandinsky

    Float32 = NDArray[np.float32]

# Raise it with every change to the requests: stored answers to others are then told apart from wrong answers.
RECIPE = 1

PROMPT, NEGATIVE_PROMPT = "a red fox in the snow, soft morning light", "blurry, text"
SEED = 43
PRIOR_STEPS, STEPS = 4, 4
PRIOR_STRENGTH, STRENGTH = 0.5, 0.5
REUSE_INTERVAL = 2  # every other step is a whole one

# Decoders' modes by role, with the inputs that each takes.
MODES: Mapping[Role, Mapping[str, tuple[str, ...]]] = {
    "decoder": {"text-to-image": (), "image-to-image": ("image", "strength")},
    "inpaint": {"inpainting": ("image", "mask")},
    "controlnet": {"controlnet": ("hint",)},
}

# fp32: largest difference of a picture's values in [0, 1]. Two libraries that sum in another order differ by 1e-6 a
# network, which a few steps with guidance raise to some 1e-5; 1e-3 leaves room for larger networks, and is a quarter of
# one of 256 levels: hardly a rounding can tell the pictures apart, while a wrong weight shows far above it.
MAX_ABS = 1e-3
# fp16 and bf16 change the picture in detail. 35 dB is what Apple's Core ML conversion of Stable Diffusion holds its
# half-precision models to, about where eyes stop seeing a difference; fp16 passes it by far. bf16 rounds 8 times as
# coarsely, which is 18 dB, and guidance multiplies it: 28 to 40 dB on random weights. Unrelated pictures have 9 dB.
MIN_PSNR: Mapping[Precision, float] = {"fp16": 35.0, "bf16": 25.0}
# Embeddings have no fixed range, so theirs is a relative L2 error: what the graphs themselves are held to.
EMBEDS_RELATIVE: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 8e-2}


@dataclass(frozen=True)
class Row:
    """A thing that was checked: errors where there are any, the bound, and what went wrong where no number says it."""

    kind: Literal["files", "graph", "request"]
    what: str
    passed: bool
    tolerance: str = ""
    max_abs: float | None = None
    relative: float | None = None
    psnr: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Skipped:
    """What was not verified, and why."""

    what: str
    why: str


def make_reference(folder: Path, sessions: Mapping[str, Session]) -> dict[str, Float32]:
    """Answers of `sessions`, which are by component and stand for all components of the bundle in `folder`.

    Pictures are float32 [1, H, W, 3] in [0, 1], embeddings float32 [2, D]; names hold the version of the recipe.
    """
    from ..runtime import load

    with load(folder, sessions=sessions) as k:
        return {stored_name(name): run() for name, run in requests(k).items()}


def check_reference(
    bundle: Path,
    expected: Mapping[str, Float32],
    *,
    backend: str,
    device: str,
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """Run the requests that `expected` has answers to and compare; `report` is told each request as it starts.

    Raises what `load` raises; a request that fails is a row that says why.
    """
    from ..runtime import load

    with load(bundle, backend=backend, device=device, memory="stage") as k:
        for name, run in requests(k).items():
            if stored_name(name) not in expected:
                continue
            report(f"checking {name}")
            try:
                yield compared(name, expected[stored_name(name)], run(), held_to(k.manifest, name))
            except KandrtError as error:
                yield Row("request", name, passed=False, detail=str(error))


def load_reference(path: Path) -> dict[str, Float32]:
    """Stored answers by name; raises BundleError for a damaged file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays: dict[str, Float32] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is damaged: {error}; export the bundle again") from error
    return arrays


def stored_name(name: str) -> str:
    """A request's name in reference.safetensors."""
    return f"{name}.{RECIPE}"


def request_names(manifest: Manifest) -> list[str]:
    """What a bundle can be asked."""
    return [*(["prior", "prior from picture"] if manifest.prior else []), *picture_requests(manifest)]


def picture_requests(manifest: Manifest) -> dict[str, tuple[Role, tuple[str, ...]]]:
    """What a bundle's decoders can be asked: by name the role, and what of `inputs` it is given.

    One that can reuse features is asked for that in its first mode.
    """
    found: dict[str, tuple[Role, tuple[str, ...]]] = {}
    for role, record in manifest.decoders.items():
        found |= {mode: (role, names) for mode, names in MODES[role].items()}
        if record.reuse is not None:
            mode, names = next(iter(MODES[role].items()))
            found[f"{mode} with reuse"] = role, (*names, "reuse_interval")
    return found


def held_to(manifest: Manifest, name: str) -> Precision:
    """The precision whose bounds a request is held to: the bundle's, or where it runs 8 bits those of bf16.

    Both round to eight bits; that 8 bits are spaced evenly and bf16 is not makes no difference of an order.
    """
    used = [] if manifest.prior is None else [asdict(manifest.prior)]
    if name in (asked := picture_requests(manifest)):
        record = manifest.decoders[asked[name][0]]
        used += [asdict(record), {} if record.reuse is None else asdict(record.reuse)]
    names = {value for fields in used for value in fields.values() if isinstance(value, str)}
    quantized = {name for name, component in manifest.components.items() if component.quantization is not None}
    return "bf16" if names & quantized else manifest.precision


def paints_prompts(manifest: Manifest) -> bool:
    """Whether a bundle has all of the way from a prompt to a picture."""
    decoder = manifest.decoders.get("decoder")
    return decoder is not None and (decoder.embedding_dim is None or manifest.prior is not None)


def requests(k: Kandinsky) -> dict[str, Callable[[], Float32]]:
    """The requests that a bundle can be asked, by name, in the order of `request_names`.

    Decoders that take embeddings are given what the prior makes of the prompt where there is a prior, else embeddings
    from a fixed seed.
    """
    manifest = k.manifest
    known: list[Embeds] = []

    def embeds(dim: int) -> Embeds:
        if not known:
            known.append(text_embeds(k) if manifest.prior else drawn_embeds(dim))
        return known[0]

    def picture(role: Role, names: tuple[str, ...]) -> Float32:
        record = manifest.decoders[role]
        height, width = record.size_multiple, 2 * record.size_multiple
        given = {name: value for name, value in inputs(height, width).items() if name in names}
        given |= conditions(record, embeds)
        return k.decoder(**given, height=height, width=width, steps=STEPS, seed=SEED).array

    made: dict[str, Callable[[], Float32]] = {}
    if manifest.prior:
        dim = manifest.prior.embedding_dim
        made["prior"] = lambda: rows(embeds(dim))
        made["prior from picture"] = lambda: rows(picture_embeds(k))
    for name, (role, names) in picture_requests(manifest).items():
        made[name] = lambda role=role, names=names: picture(role, names)  # type: ignore[misc]
    return made


def conditions(record: DecoderRecord, embeds: Callable[[int], Embeds]) -> dict[str, Any]:
    """What a decoder is told to paint: `embeds` of the width that it takes, prompts, or both."""
    told: dict[str, Any] = {} if record.embedding_dim is None else {"embeds": embeds(record.embedding_dim)}
    return told if record.prompt is None else told | {"prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT}


def text_embeds(k: Kandinsky) -> Embeds:
    """The prior's embeddings of the prompt."""
    return k.prior(PROMPT, negative_prompt=NEGATIVE_PROMPT, steps=PRIOR_STEPS, seed=SEED)


def picture_embeds(k: Kandinsky) -> Embeds:
    """The prior's embeddings of the prompt that start from a picture: the one request that opens the image encoder."""
    image = inputs(96, 128)["image"]
    return k.prior(PROMPT, image=image, strength=PRIOR_STRENGTH, steps=PRIOR_STEPS, seed=SEED)


def drawn_embeds(dim: int) -> Embeds:
    """Embeddings for a bundle without a prior: standard normal, as large as a prior's."""
    import numpy as np

    from ..runtime import Embeds

    positive, negative = np.random.default_rng(SEED).standard_normal((2, 1, dim), np.float32)
    return Embeds(positive, negative)


def rows(embeds: Embeds) -> Float32:
    """Positive and negative embeddings as one array [2, D]."""
    import numpy as np

    negative = embeds.negative_image_embeds
    return embeds.image_embeds if negative is None else np.concatenate([embeds.image_embeds, negative])


def inputs(height: int, width: int) -> dict[str, Any]:
    """A picture of waves with grain, a mask that paints its middle right, a hint like a dome, and two settings."""
    import numpy as np

    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    waves = np.stack([np.sin(7 * x + 3 * y), np.cos(5 * x * y + 1), np.sin(11 * y - 4 * x)], axis=-1)
    grain = np.random.default_rng(SEED).uniform(-0.1, 0.1, waves.shape)
    return {
        "image": np.clip(0.5 + 0.4 * waves + grain, 0, 1).astype(np.float32),
        "mask": (np.abs(x - 0.7) < 0.2) & (np.abs(y - 0.5) < 0.3),
        "hint": np.clip(1 - 2 * np.hypot(x - 0.4, y - 0.5), 0, 1).astype(np.float32),
        "strength": STRENGTH,
        "reuse_interval": REUSE_INTERVAL,
    }


def compared(name: str, expected: Float32, found: Float32, precision: Precision) -> Row:
    """A row for an answer: pictures [1, H, W, 3] by largest difference or PSNR, embeddings by relative error."""
    import numpy as np

    if expected.shape != found.shape or not np.isfinite(expected).all() or not np.isfinite(found).all():
        shapes = f"expected finite values {list(expected.shape)}, found {list(found.shape)}"
        return Row("request", name, passed=False, detail=shapes)
    delta = found.astype(np.float64) - expected
    max_abs = float(np.abs(delta).max())
    if expected.ndim == 2:
        relative = float(np.linalg.norm(delta)) / max(float(np.linalg.norm(expected)), 1e-30)
        bound = EMBEDS_RELATIVE[precision]
        return Row("request", name, relative <= bound, f"relative {bound:.0e}", max_abs, relative)
    psnr = peak_signal_to_noise(float(np.mean(delta**2)))
    if precision == "fp32":
        return Row("request", name, max_abs <= MAX_ABS, f"max {MAX_ABS:.0e}", max_abs, None, psnr)
    least = MIN_PSNR[precision]
    return Row("request", name, psnr is None or psnr >= least, f"PSNR {least:.0f} dB", max_abs, None, psnr)


def peak_signal_to_noise(mean_square: float) -> float | None:
    """PSNR in dB of pictures in [0, 1], None where they are equal."""
    return None if mean_square == 0 else -10 * math.log10(mean_square)
