"""Which GPUs TensorRT and TensorRT-RTX are for."""

from __future__ import annotations

import pytest

from kandrt.engines import trt
from kandrt.engines.errors import BackendError
from kandrt.engines.plans import Builder


@pytest.mark.parametrize(
    ("builder", "gpu"), [("tensorrt-rtx", "sm89"), ("tensorrt-rtx", "sm130"), ("tensorrt", "sm90")]
)
def test_gpus_with_kernels_are_taken(builder: Builder, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX 1.7 says that it runs on 8.0, 8.6, 8.9, 12.0, 12.1 and later."""
    monkeypatch.setattr(trt, "capability", lambda: gpu)
    trt.check_gpu(builder)


@pytest.mark.parametrize("gpu", ["sm90", "sm100"])
def test_gpus_that_tensorrt_rtx_has_no_kernels_for_are_refused(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100, which is 9.0, it builds an engine and then refuses to open it."""
    monkeypatch.setattr(trt, "capability", lambda: gpu)
    with pytest.raises(BackendError, match=f"'tensorrt-rtx' does not run on this GPU, which is {gpu}; it runs on sm75"):
        trt.check_gpu("tensorrt-rtx")
