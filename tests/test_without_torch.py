"""The runtime makes pictures where none of the export's libraries can be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from kandrt.runtime import load

SCRIPT = """
import sys

for name in ("torch", "transformers", "diffusers", "onnx", "onnx_ir", "onnxscript", "safetensors.torch"):
    sys.modules[name] = None  # importing it fails

import numpy as np
from PIL import Image

from kandrt.runtime import load

image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
with load(sys.argv[1], threads=1) as k:
    text = k("a red cat", height=64, width=128, prior_steps=2, steps=2, seed=43)
    image = k("a red cat", image=image, strength=1.0, prior_steps=2, steps=2, seed=43)
np.savez(sys.argv[2], text=text.array, image=image.array)
"""


def test_pictures_without_torch(bundle: Path, tmp_path: Path) -> None:
    found = tmp_path / "found.npz"
    command = [sys.executable, "-c", SCRIPT, str(bundle), str(found)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    with load(bundle, threads=1) as k:
        expected = k("a red cat", height=64, width=128, prior_steps=2, steps=2, seed=43).array
    with np.load(found) as arrays:
        # the same code on the same machine; another number of threads must not matter more than this
        np.testing.assert_allclose(arrays["text"], expected, rtol=0, atol=1e-6)
        assert arrays["image"].shape == (1, 64, 64, 3)
        assert arrays["image"].std() > 0.1
