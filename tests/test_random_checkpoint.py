"""Random checkpoints: published structure, readable by diffusers and transformers, and weights that carry signal."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from kandrt.engines.errors import OutputError
from kandrt.engines.hashing import sha256_file
from kandrt.export.random_weights import random_tensors
from kandrt.export.weights import Weights
from kandrt.scripts import random_checkpoint as script
from kandrt.scripts.random_checkpoint import Kind, make_checkpoint

diffusers = pytest.importorskip("diffusers")

PIPELINES = {
    Kind.PRIOR: "KandinskyV22PriorPipeline",
    Kind.DECODER: "KandinskyV22Pipeline",
    Kind.INPAINT: "KandinskyV22InpaintPipeline",
    Kind.CONTROLNET: "KandinskyV22ControlnetPipeline",
    Kind.COMBINED: "KandinskyV22CombinedPipeline",
    Kind.COMBINED_INPAINT: "KandinskyV22InpaintCombinedPipeline",
}
UNUSED = ("embeddings.position_ids",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """Small checkpoints, each made once; not to be changed."""
    root = tmp_path_factory.mktemp("made")

    def make(kind: Kind) -> Path:
        folder = root / kind.value
        return folder if folder.exists() else make_checkpoint(kind.value, folder, small=True)

    return make


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


@pytest.mark.parametrize("kind", Kind)
def test_diffusers_loads_every_tensor(kind: Kind, made: Callable[[Kind], Path]) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(made(kind))
    assert type(pipeline).__name__ == PIPELINES[kind]
    files = weight_files(made(kind))
    assert len(files) == {Kind.PRIOR: 3, Kind.COMBINED: 5, Kind.COMBINED_INPAINT: 5}.get(kind, 2)
    for file in files:
        stored = safetensors.torch.load_file(file)
        loaded = getattr(pipeline, file.parent.name).state_dict()
        assert {name for name in stored if not name.endswith(UNUSED)} == loaded.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.items())


# Counts of the published checkpoints: tensors and parameters
PUBLISHED = {
    (Kind.PRIOR, "prior"): (338, 1_026_225_920),
    (Kind.PRIOR, "text_encoder"): (517, 694_659_840),
    (Kind.PRIOR, "image_encoder"): (776, 1_844_907_264),
    (Kind.DECODER, "unet"): (724, 1_253_057_288),
    (Kind.DECODER, "movq"): (431, 67_832_495),
    (Kind.INPAINT, "unet"): (724, 1_253_074_568),
    (Kind.INPAINT, "movq"): (431, 67_832_495),
    (Kind.CONTROLNET, "unet"): (740, 1_253_429_212),
    (Kind.CONTROLNET, "movq"): (431, 67_832_495),
}


@pytest.mark.parametrize(("kind", "name"), PUBLISHED)
def test_full_size_has_the_published_number_of_parameters(kind: Kind, name: str) -> None:
    source = script.plan(kind.value)[1][name]
    config = script.read_config(source)
    listed = random_tensors(source.class_name, config, "", "float32")
    tensors = [tensor for tensor in listed if tensor.dtype == "float32"]
    assert (len(tensors), sum(math.prod(tensor.shape) for tensor in tensors)) == PUBLISHED[kind, name]


def test_full_size_vocabulary_is_that_of_clip(tmp_path: Path) -> None:
    script.write_vocabulary(tmp_path, None)
    # of vocab.json and merges.txt as published with openai's CLIP models
    assert sha256_file(tmp_path / "vocab.json") == "5047b556ce86ccaf6aa22b3ffccfc52d391ea4accdab9c2f2407da5b742d4363"
    assert sha256_file(tmp_path / "merges.txt") == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_seed_gives_the_same_bytes_and_another_seed_other_weights(
    made: Callable[[Kind], Path], tmp_path: Path
) -> None:
    first = hashes(made(Kind.PRIOR))
    assert hashes(make_checkpoint(Kind.PRIOR.value, tmp_path / "same", small=True)) == first
    other = hashes(make_checkpoint(Kind.PRIOR.value, tmp_path / "other", small=True, seed=1))
    assert {name for name in first if first[name] != other[name]} == {
        name for name in first if name.endswith(".safetensors")
    }


def test_submodels_that_checkpoints_share_are_equal(made: Callable[[Kind], Path]) -> None:
    movq = "movq/diffusion_pytorch_model.safetensors"
    assert len({hashes(made(kind))[movq] for kind in Kind if kind != Kind.PRIOR}) == 1
    combined, prior = hashes(made(Kind.COMBINED)), hashes(made(Kind.PRIOR))
    assert all(combined[f"prior_{name}"] == prior[name] for name in prior if name != "model_index.json")


@pytest.mark.parametrize("kind", [Kind.PRIOR, Kind.CONTROLNET])
def test_no_tensor_is_constant(kind: Kind, made: Callable[[Kind], Path]) -> None:
    for file in weight_files(made(kind)):
        weights = Weights.open(file.parent)
        for name in weights.shapes:
            tensor = weights.read(name)
            assert tensor.isfinite().all()
            assert tensor.std() > 0.01, name
            assert 0 < tensor.abs().max() < 4


def test_half_precision_is_full_precision_rounded(made: Callable[[Kind], Path], tmp_path: Path) -> None:
    half = make_checkpoint(Kind.PRIOR.value, tmp_path / "half", small=True, precision="fp16")
    for file in weight_files(half):
        full = safetensors.torch.load_file(made(Kind.PRIOR) / file.parent.name / file.name)
        for name, tensor in safetensors.torch.load_file(file).items():
            assert tensor.dtype == (torch.float16 if full[name].is_floating_point() else torch.int64)
            assert torch.equal(tensor, full[name].to(tensor.dtype))


def test_pictures_have_colours_and_depend_on_the_prompt(made: Callable[[Kind], Path]) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(made(Kind.COMBINED))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.prior_pipe.set_progress_bar_config(disable=True)
    pipeline.decoder_pipe.set_progress_bar_config(disable=True)

    def picture(prompt: str) -> Any:
        return pipeline(
            prompt,
            height=64,
            width=64,
            num_inference_steps=3,
            prior_num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images[0]

    first, second = picture("a red cat"), picture("the blue dog")
    # of a range of 1; measured 0.2 and more. A flat picture, or one that ignores its prompt, would have about 0.
    assert first.std(axis=(0, 1)).min() > 0.05
    assert abs(first - second).mean() > 0.02


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        make_checkpoint(Kind.PRIOR.value, tmp_path / "old", small=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        make_checkpoint(Kind.PRIOR.value, tmp_path / "file" / "new", small=True)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "file"}


def test_command_line(tmp_path: Path) -> None:
    runner = CliRunner()
    output = tmp_path / "made"
    arguments = ["kandinsky-2-2-prior", "-o", str(output), "--small", "--precision", "fp16", "--seed", "3"]
    result = runner.invoke(script.app, arguments)
    assert result.exit_code == 0, result.output
    assert output.is_dir()
    assert "kandinsky-2-2-prior" in result.output
    again = runner.invoke(script.app, arguments)
    assert again.exit_code == 1
    assert "exists already" in again.output
    assert "Example:" in runner.invoke(script.app, ["--help"]).output
