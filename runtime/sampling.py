"""The one denoising loop: prior and decoders of every mode differ only in what they pass to it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

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

# Shares of the steps [start, end) in which guidance is applied.
Interval: TypeAlias = tuple[float, float]


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


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What a loop asks its network at a step: the prediction for x.

    index: of the step, from 0. x: the sample before it [B, ...]. embedding [N, C] and context have N rows, 2·B where
    the step is `guided`, negative before positive, else B, the positive ones.
    """

    index: int
    x: Array
    guided: bool
    embedding: Array
    context: Mapping[str, Array]

    @property
    def rows(self) -> int:
        """N."""
        return int(self.embedding.shape[0])

    @property
    def sample(self) -> Array:
        """x for each row, [N, ...]."""
        return array_namespace(self.x).concat([self.x, self.x], axis=0) if self.guided else self.x

    def predicted(self, step: Session) -> Array:
        """What the step graph answers, [N, ...]."""
        return step(sample=self.sample, embedding=self.embedding, **self.context)["prediction"]


Denoising: TypeAlias = Generator[StepInputs, Array, Array]
"""A loop without its network: asks for a prediction at every step, is sent it, and returns the last sample."""


def denoising(
    scheduler: Scheduler,
    x: Array,
    timesteps: np.ndarray[Any, np.dtype[np.int64]],
    embedding: Array,
    context: Mapping[str, Array],
    *,
    scale: float | None,
    noise: Noise,
    interval: Interval | None = None,
    inpaint: Inpaint | None = None,
) -> Denoising:
    """The loop of `denoise`, whose arguments these are, as a generator that another driver may answer.

    Whoever drives it may put the inputs of several loops into one call of the step graph, or choose among graphs.
    Raises NumericalError where it is sent NaN or infinity, as `check_finite` does.
    """
    x, history = to_device(x, embedding), None
    batch, levels = x.shape[0], timesteps.tolist()
    scales = [scale if applies else None for applies in guided_steps(len(levels), interval)]
    if inpaint is not None:
        context = {**context, "concat_latents": inpaint.concat(batch if scale is None else 2 * batch)}
    positive = context if scale is None or None not in scales else positives(context, batch)
    xp = array_namespace(embedding)
    with ahead(noise, tuple(x.shape), sum(map(scheduler.draws, levels)), x) as draw:
        for i, (t, t_prev, w) in enumerate(zip(levels, [*levels[1:], -1], scales, strict=True)):
            rows, row = batch if w is None else 2 * batch, embedding[i, ...]
            row = xp.broadcast_to(row, (rows, row.shape[0])) if row.ndim == 1 else row[row.shape[0] - rows :, :]
            out = yield StepInputs(i, x, w is not None, row, positive if w is None else context)
            check_finite(out, f"step {i + 1} of {len(levels)} (timestep {t}): ")
            x, history = scheduler.step(guided(out, x, w, scheduler.learned_variance), x, t, t_prev, draw, history)
            if inpaint is not None and inpaint.pastes:
                x = inpaint.blend(x, scheduler, t_prev)
    return x


def driven(loop: Denoising, predict: Callable[[StepInputs], Array]) -> Iterator[Array]:
    """Yield the sample after every step of a loop that `predict` answers; the last one is the result."""
    with closing(loop):  # its thread for noise, too, where a prediction fails or nobody asks for more
        inputs = next(loop)
        while True:
            try:
                inputs = loop.send(predict(inputs))
            except StopIteration as done:
                yield done.value
                return
            yield inputs.x


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
    interval: Interval | None = None,
    inpaint: Inpaint | None = None,
) -> Iterator[Array]:
    """Yield the sample after every step; the last one is the result.

    x: noisy sample [B, ...], float32, on any device. embedding: a row for each timestep, [T, N, C], or [T, C] where all
    samples share it. context: what else `step` takes, of N rows; N is B without guidance, and 2·B, negative before
    positive, with the guidance scale `scale`. interval: where guidance is applied, by default at all steps; at others
    only the positive rows are run. Arithmetic stays in the array library and on the device of `embedding`, where
    context and inpaint are already; x and the draws of `noise` are brought there.
    Source: the loops of diffusers 0.42.1's Kandinsky pipelines; with guidance the variance is the positive half's. The
    interval is Kynkäänniemi et al. 2024's (arXiv:2404.07724), who give it in noise levels; here it is shares of steps.

    Raises NumericalError where the network gives NaN or infinity, checked at each step where that needs no waiting for
    a device.
    """
    loop = denoising(
        scheduler, x, timesteps, embedding, context, scale=scale, noise=noise, interval=interval, inpaint=inpaint
    )
    return driven(loop, lambda inputs: inputs.predicted(step))


def guided_steps(steps: int, interval: Interval | None) -> list[bool]:
    """Of each of `steps` steps whether start <= i / steps < end, and so whether guidance is applied."""
    start, end = (0.0, 1.0) if interval is None else interval
    return [start <= i / steps < end for i in range(steps)]


def positives(context: Mapping[str, Array], batch: int) -> dict[str, Array]:
    """The last `batch` rows of each array: copies, because engines want the start of an array aligned."""
    tails = {name: array[array.shape[0] - batch :, ...] for name, array in context.items()}
    return {name: array_namespace(tail).asarray(tail, copy=True) for name, tail in tails.items()}


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
