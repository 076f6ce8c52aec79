"""The one denoising loop: prior and decoders of every mode differ only in what they pass to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from ..engines.cuda import HOST_MEMORY
from ..engines.errors import NumericalError
from ..engines.session import Array, Session
from .noise import Noise
from .schedulers import Scheduler
from .transfer import ahead, to_device

# Called after every step with the stage ("prior" or "decoder"), steps done, steps in all, and the latents.
Callback = Callable[[str, int, int, Array], None]


@dataclass(frozen=True, eq=False)
class Inpaint:
    """What inpainting keeps: clean latents and the starting noise [B, 4, H, W], mask [B, 1, H, W], 1 = keep, else 0.

    With `pastes` the kept region is pasted back after every step. Source: diffusers 0.42.1
    `KandinskyV22InpaintPipeline`, where the first picture and mask serve the whole batch, and without `pastes`
    `KandinskyInpaintPipeline`.
    """

    latents: Array
    mask: Array
    noise: Array
    pastes: bool = True

    def concat(self, rows: int) -> Array:
        """The UNet's additional channels for `rows`, a multiple of B: [rows, 5, H, W]."""
        xp = array_namespace(self.latents)
        channels = xp.concat([self._kept, self.mask], axis=1)
        return xp.concat([channels] * (rows // channels.shape[0]), axis=0)

    def blend(self, x: Array, scheduler: Scheduler, t: int) -> Array:
        """`x` with the kept region as it looks at timestep `t`; clean where t is -1, after the last step."""
        # masked beforehand: a product less at each step, and by 0 and 1 the same to the last bit
        known = self._kept if t < 0 else scheduler.add_noise(self._kept, self._kept_noise, t)
        return known + self._repainted * x

    @cached_property
    def _kept(self) -> Array:
        return self.latents * self.mask

    @cached_property
    def _kept_noise(self) -> Array:
        return self.noise * self.mask

    @cached_property
    def _repainted(self) -> Array:
        return 1 - self.mask


def denoise(
    step: Session,
    scheduler: Scheduler,
    x: Array,
    timesteps: np.ndarray[Any, np.dtype[np.int64]],
    embedding: Array,
    context: Mapping[str, Array],
    *,
    scale: float | None,
    noise: Noise,
    inpaint: Inpaint | None = None,
) -> Iterator[Array]:
    """Yield the sample after every step; the last one is the result.

    x: noisy sample [B, ...], float32, on any device. embedding: a row for each timestep, [T, N, C], or [T, C] where all
    samples share it. context: what else `step` takes, of N rows; N is B without guidance, and 2·B, negative before
    positive, with the guidance scale `scale`. Arithmetic stays in the array library and on the device of `embedding`,
    where context and inpaint are already; x and the draws of `noise` are brought there.
    Source: the loops of diffusers 0.42.1's Kandinsky pipelines; with guidance the variance is the positive half's.

    Raises NumericalError where the network gives NaN or infinity, checked at each step where that needs no waiting for
    a device.
    """
    xp = array_namespace(embedding)
    x, history = to_device(x, embedding), None
    rows = x.shape[0] if scale is None else 2 * x.shape[0]
    if inpaint is not None:
        context = {**context, "concat_latents": inpaint.concat(rows)}
    levels: list[int] = timesteps.tolist()
    with ahead(noise, tuple(x.shape), sum(map(scheduler.draws, levels)), x) as draw:
        for i, (t, t_prev) in enumerate(zip(levels, [*levels[1:], -1], strict=True)):
            sample = x if scale is None else xp.concat([x, x], axis=0)
            row = embedding[i, ...]
            row = row if row.ndim == 2 else xp.broadcast_to(row, (rows, row.shape[0]))
            out = step(sample=sample, embedding=row, **context)["prediction"]
            check_finite(out, f"step {i + 1} of {len(levels)} (timestep {t}): ")
            x, history = scheduler.step(guided(out, x, scale, scheduler.learned_variance), x, t, t_prev, draw, history)
            if inpaint is not None and inpaint.pastes:
                x = inpaint.blend(x, scheduler, t_prev)
            yield x


def guided(out: Array, x: Array, scale: float | None, learned_variance: bool) -> Array:
    """The prediction for `x` out of the network's output, classifier-free guidance applied.

    Channels beyond those of x are a variance: kept for samplers that learned it, dropped for others.
    """
    xp, channels = array_namespace(out), x.shape[1]
    prediction, variance = out[:, :channels, ...], out[:, channels:, ...]
    if scale is not None:
        half = x.shape[0]
        negative, positive = prediction[:half, ...], prediction[half:, ...]
        prediction, variance = negative + scale * (positive - negative), variance[half:, ...]
    return xp.concat([prediction, variance], axis=1) if learned_variance else prediction


def check_finite(out: Array, where: str = "") -> None:
    """Raise NumericalError, which begins with `where`, for NaN or infinity.

    Not for arrays of a GPU, where asking would wait for it: the end result is checked on the host.
    """
    if out.__dlpack_device__()[0] not in HOST_MEMORY:
        return
    xp = array_namespace(out)
    if not bool(xp.all(xp.isfinite(out))):
        raise NumericalError(
            f"{where}the network's output holds NaN or infinity; "
            "the weights are damaged, or their precision is too low: export with --precision fp32 or bf16"
        )
