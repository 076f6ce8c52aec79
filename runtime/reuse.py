"""Feature reuse: what a UNet finds at its lower resolutions serves several steps.

Source: Ma, Fang, Wang 2023, "DeepCache: Accelerating Diffusion Models for Free" (arXiv:2312.00858), with its uniform
intervals.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..engines.manifest import FeatureReuse
from ..engines.session import Array
from .components import Components
from .sampling import StepInputs, positives
from .transfer import to_device


class ReusedFeatures:
    """Answers the steps of one loop: the whole network at every `interval`-th, its outermost level alone between.

    Where guidance ends, the positive rows' features go on being used; where it begins, the negative rows have none yet,
    so the whole network is run and the interval starts anew.
    """

    def __init__(self, components: Components, pair: FeatureReuse, interval: int) -> None:
        """`pair` names the two components; with `interval` 1 every step is a whole one."""
        self._components, self._pair, self._interval = components, pair, interval
        self._outer = [spec.name for spec in components.bundle.manifest.components[pair.shallow].inputs]
        self._features: Array | None = None
        self._since = 0

    def predict(self, inputs: StepInputs) -> Array:
        """The prediction for a step, [N, ...], where the sample is."""
        given = {"sample": inputs.sample, "embedding": inputs.embedding, **inputs.context}
        features = self._kept(inputs)
        if features is None:
            outputs = self._components.run(self._pair.refresh, **given)
            self._features, self._since = outputs["features"], inputs.index
            return outputs["prediction"]
        return self._shallow({**given, "features": features}, inputs.x)

    def _shallow(self, given: Mapping[str, Array], like: Array) -> Array:
        outputs = self._components.run(self._pair.shallow, **{name: given[name] for name in self._outer})
        return to_device(outputs["prediction"], like)  # each of the two may run somewhere else

    def _kept(self, inputs: StepInputs) -> Array | None:
        """Features for the rows of a step, [N, C, H, W]; None where they are too old or not of all rows."""
        features = self._features
        if features is None or inputs.index - self._since >= self._interval or features.shape[0] < inputs.rows:
            return None
        if features.shape[0] > inputs.rows:
            self._features = positives({"features": features}, inputs.rows)["features"]
        return self._features
