"""What passes from the prior to a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ..engines.errors import InputError
from ..engines.manifest import FamilyName


@dataclass(frozen=True, eq=False)
class Embeds:
    """CLIP image embeddings, float32 [B, D] each; the negative ones are needed only with guidance.

    `family` is that of the prior which made them, whose decoders alone take them; None where it is not known. May be
    built by hand from arrays; raises InputError for arrays that are not finite floats of equal shape.
    """

    image_embeds: NDArray[np.float32]
    negative_image_embeds: NDArray[np.float32] | None = None
    family: FamilyName | None = None

    def __post_init__(self) -> None:
        if self.family not in (None, *get_args(FamilyName)):
            known = ", ".join(map(repr, get_args(FamilyName)))
            raise InputError(f"family: expected one of {known} or None, found {self.family!r}")
        for name in ("image_embeds", "negative_image_embeds"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, checked(name, value))
        negative = self.negative_image_embeds
        if negative is not None and negative.shape != self.image_embeds.shape:
            raise InputError(
                f"negative_image_embeds: expected the shape of image_embeds, {list(self.image_embeds.shape)}, "
                f"found {list(negative.shape)}"
            )

    def __len__(self) -> int:
        return len(self.image_embeds)

    def repeated(self, count: int) -> Embeds:
        """Each row `count` times in succession."""
        negative = self.negative_image_embeds
        return Embeds(
            np.repeat(self.image_embeds, count, axis=0),
            None if negative is None else np.repeat(negative, count, axis=0),
            self.family,
        )


def checked(name: str, value: Any) -> NDArray[np.float32]:
    """`value` as float32 [B, D]; InputError where it is not that."""
    array = as_array(value)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind != "f":
        raise InputError(f"{name}: expected floats [batch, dim], found {array.dtype}{list(array.shape)}")
    if not np.isfinite(array).all():
        raise InputError(f"{name}: expected finite values, found NaN or infinity")
    return array.astype(np.float32)


def as_array(value: Any) -> NDArray[Any]:
    """`value` as an array; one that is no array of numbers, such as rows of different lengths, as one of objects."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError):
        return np.array(None, dtype=object)
