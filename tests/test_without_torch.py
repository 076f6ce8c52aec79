"""The runtime makes pictures where none of the export's libraries can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kandrt.runtime import load

SCRIPT = """
import json
import sys

of_the_export = "torch", "transformers", "diffusers", "sentencepiece", "onnx", "onnx_ir", "onnxscript"
for name in (*of_the_export, "safetensors.torch"):
    sys.modules[name] = None  # importing it fails

import numpy as np
from PIL import Image

from kandrt.runtime import load

folder, settings, found = sys.argv[1:]
image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
with load(folder, threads=1) as k:
    settings = json.loads(settings)
    text = k("a red cat", height=64, width=128, **settings)
    image = k("a red cat", image=image, strength=1.0, **settings)
np.savez(found, text=text.array, image=image.array)
"""
FEW: dict[str, Any] = {"steps": 2, "seed": 43}
BUNDLES: dict[str, dict[str, Any]] = {
    "bundle": {**FEW, "prior_steps": 2},
    "bundle_2_1": {**FEW, "prior_steps": 2, "negative_prompt": "ugly"},
    "bundle_3": {**FEW, "negative_prompt": "ugly"},
}


@pytest.mark.parametrize("name", BUNDLES)
def test_pictures_without_torch(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    bundle, found = request.getfixturevalue(name), tmp_path / "found.npz"
    command = [sys.executable, "-c", SCRIPT, str(bundle), json.dumps(BUNDLES[name]), str(found)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    with load(bundle, threads=1) as k:
        expected = k("a red cat", height=64, width=128, **BUNDLES[name]).array
    with np.load(found) as arrays:
        # the same code on the same machine; another number of threads must not matter more than this
        np.testing.assert_allclose(arrays["text"], expected, rtol=0, atol=1e-6)
        assert arrays["image"].shape == (1, 64, 64, 3)
        assert arrays["image"].std() > 0.1
