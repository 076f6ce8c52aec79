"""Training of the miniature: it starts, logs, resumes as if nothing had happened, and ends in checkpoints that work."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kandrt.export.modules.unet import UNet
from kandrt.export.modules.unet_config import UNetConfig
from kandrt.scripts.miniature.captions import caption
from kandrt.scripts.miniature.trials import SIDE
from kandrt.scripts.miniature.world import random_scene
from kandrt.scripts.train_miniature import loop
from kandrt.scripts.train_miniature.batches import Words, hints, pictures, scenes
from kandrt.scripts.train_miniature.clip import labels, patch_labels
from kandrt.scripts.train_miniature.configs import TOKENS, config, write_tokenizer
from kandrt.scripts.train_miniature.decoder import SCHEDULE, Process, widened
from kandrt.scripts.train_miniature.stages import STAGES

EFFORT = 0.0003  # two steps a stage, 64 scenes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves after a short run of every stage."""
    folder = tmp_path_factory.mktemp("training")
    done = run("-o", folder, "--effort", EFFORT, "--threads", 1)
    assert done.returncode == 0, done.stderr
    return folder


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kandrt.scripts.train_miniature", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def log_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / loop.LOG).open(newline="") as file:
        return list(csv.DictReader(file))


# The loop


class Line:
    """Learns to multiply by three."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Linear(1, 1)
        self.seen: list[float] = []
        self.stop_at: int | None = None

    def losses(self, rng: np.random.Generator, batch: int, progress: float) -> dict[str, Tensor]:
        if self.stop_at == len(self.seen):
            signal.raise_signal(signal.SIGTERM)  # SIGINT may be ignored, in the background of a shell
        x = torch.from_numpy(rng.normal(size=(batch, 1)).astype(np.float32)) + torch.randn(batch, 1)
        self.seen.append(float(x.sum()))
        loss = (self.network(x) - 3 * x).square().mean()
        return {"loss": loss, "progress": torch.tensor(progress)}


SETTINGS = loop.Settings(steps=90, batch=16, rate=0.1)


def test_a_training_learns_and_logs(tmp_path: Path) -> None:
    task, told = Line(), []
    loop.train("line", task, SETTINGS, tmp_path, bfloat16=False, report=told.append)
    rows = log_rows(tmp_path)
    assert [int(row["step"]) for row in rows] == [20, 40, 60, 80, 90]
    assert float(rows[-1]["loss"]) < 0.01 * float(rows[0]["loss"])
    assert len(told) == 5
    assert told[-1].startswith("line 90/90")
    other = nn.Linear(1, 1)
    loop.load_weights(other, tmp_path)
    assert abs(float(other.weight.detach()) - 3) < 0.3


@pytest.mark.parametrize("stop_at", [0, 33, 88])
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(tmp_path: Path, stop_at: int) -> None:
    whole, first, second = Line(), Line(), Line()
    loop.train("line", whole, SETTINGS, tmp_path / "whole", bfloat16=False)
    first.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        loop.train("line", first, SETTINGS, tmp_path / "parts", bfloat16=False)
    loop.train("line", second, SETTINGS, tmp_path / "parts", bfloat16=False)
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.network.weight, whole.network.weight)
    weights = [(tmp_path / name / loop.WEIGHTS).read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    assert [row["step"] for row in log_rows(tmp_path / "parts")] == [
        row["step"] for row in log_rows(tmp_path / "whole")
    ]


def test_what_the_log_says_of_lost_steps_is_dropped(tmp_path: Path) -> None:
    (tmp_path / loop.LOG).write_text("step,seconds,loss\n20,0.1,1\n40,0.1,0.5\n")
    loop.keep_log(tmp_path / loop.LOG, 30)
    assert [row["step"] for row in log_rows(tmp_path)] == ["20"]


def test_another_seed_is_another_training(tmp_path: Path) -> None:
    tasks = Line(), Line()
    for seed, task in enumerate(tasks):
        loop.train("line", task, loop.Settings(3, 4, 0.1), tmp_path / str(seed), seed=seed, bfloat16=False)
    assert tasks[0].seen != tasks[1].seen


def test_the_learning_rate_rises_and_falls() -> None:
    shares = [loop.rate_share(step, 1000) for step in range(1000)]
    assert int(np.argmax(shares)) == pytest.approx(loop.WARMUP, abs=1)
    assert max(shares) == pytest.approx(1, abs=1e-3)
    assert shares[-1] == pytest.approx(loop.FLOOR, abs=1e-3)


# What is trained on


def test_every_word_of_captions_is_one_token(tokenizer: Path) -> None:
    rng = np.random.default_rng(3)
    texts = [caption(random_scene(rng), rng).text for _ in range(500)]
    words = Words(tokenizer)
    lengths = words(texts)[1].sum(1).tolist()
    assert lengths == [len(text.split()) + 2 for text in texts]
    assert max(lengths) <= TOKENS


def test_captions_are_tokenised_as_by_transformers(tokenizer: Path) -> None:
    from transformers import CLIPTokenizer

    texts = ["a large red circle on a blue background", "An odd wörd, spelled!", ""]
    expected = CLIPTokenizer.from_pretrained(str(tokenizer))(texts, padding="max_length", return_tensors="pt")
    ids, mask = Words(tokenizer)(texts)
    assert torch.equal(ids, expected.input_ids)
    assert torch.equal(mask, expected.attention_mask)


def test_pictures_and_hints_are_in_range() -> None:
    drawn = scenes(np.random.default_rng(0), 4)
    assert pictures(drawn).shape == hints(drawn).shape == (4, 3, SIDE, SIDE)
    assert -1 <= float(pictures(drawn).min()) < float(pictures(drawn).max()) <= 1
    assert 0 <= float(hints(drawn).min()) < float(hints(drawn).max()) <= 1


def test_labels_say_what_stands_where() -> None:
    drawn = scenes(np.random.default_rng(1), 50)
    for name in ("colour", "shape", "size"):
        assert ((labels(drawn, name) > 0).sum(1) == torch.tensor([len(scene.objects) for scene in drawn])).all()
    cells = patch_labels(drawn)
    wanted = [{int(value) for value in row if value > 0} for row in labels(drawn, "shape")]
    assert [{int(value) for value in row if value > 0} for row in cells] == wanted


# Diffusion


def test_the_bound_takes_variances_as_diffusers_reads_them() -> None:
    """`variance` -1 and 1 are the two ends that DDPMScheduler interpolates between, as "learned_range" has it."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        beta_start=SCHEDULE.beta_start, beta_end=SCHEDULE.beta_end, variance_type="learned_range", clip_sample=False
    )
    process, shape = Process(SCHEDULE), (1, 4, 2, 2)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)
    for t in (1, 2, 3, 5, 10):  # later the two ends are so near that there is no divergence to compare
        at = torch.tensor([t])
        noisy = process.noisy(clean, noise, at)
        assert torch.allclose(noisy, scheduler.add_noise(clean, noise, at), atol=1e-6)
        for variance in (-1.0, 0.3, 1.0):
            predicted = torch.full(shape, variance)
            log_variance = scheduler._get_variance(t, predicted_variance=predicted, variance_type="learned_range")
            found = process.bound(clean, noisy, noise, predicted, at)
            # with the true noise the means agree: what is left is the divergence of two variances
            gap = scheduler._get_variance(t, predicted_variance=-torch.ones(shape), variance_type="learned_range")
            gap = gap - log_variance
            # both tables are float32 sums of logarithms; a divergence of 1e-5 is what rounding makes of none
            assert float(found) == pytest.approx(float((0.5 * (-1 - gap + gap.exp())).mean()), rel=1e-2, abs=1e-5)


def test_a_wrong_mean_costs() -> None:
    process, at = Process(SCHEDULE), torch.tensor([300])
    clean, noise = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    noisy, variance = process.noisy(clean, noise, at), -torch.ones(1, 4, 2, 2)
    assert process.bound(clean, noisy, noise * 0.5, variance, at) > process.bound(clean, noisy, noise, variance, at)


@pytest.mark.parametrize("role", ["inpaint", "controlnet"])
def test_a_widened_decoder_paints_as_before(role: str) -> None:
    torch.manual_seed(0)
    base, wide = (UNet(UNetConfig.from_dict(config(name))).eval() for name in ("decoder", role))
    wide.load_state_dict(widened(base.state_dict(), wide))
    sample, embeds, at = torch.randn(1, 4, 16, 16), torch.randn(1, 160), torch.tensor([7.0])
    with torch.no_grad():
        embedding, added_kv = base.context(embeds, at)
        expected = base.step(sample, embedding[0], added_kv)
        channels = wide.config.concat_channels
        found = wide.step(sample, embedding[0], added_kv, torch.randn(1, channels, 16, 16))
    assert torch.equal(found, expected)


# The command


def test_a_short_training_of_everything(trained: Path) -> None:
    for stage in STAGES:
        assert (trained / stage / loop.WEIGHTS).is_file()
        assert log_rows(trained / stage)
    assert (trained / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_diffusers_runs_the_checkpoints(trained: Path) -> None:
    from diffusers import (
        KandinskyV22ControlnetPipeline,
        KandinskyV22InpaintPipeline,
        KandinskyV22Pipeline,
        KandinskyV22PriorPipeline,
    )

    folder = trained / "checkpoints"
    prior = KandinskyV22PriorPipeline.from_pretrained(folder / "kandinsky-2-2-mini-prior")
    prior.set_progress_bar_config(disable=True)
    embeds = prior("a red circle", num_inference_steps=2).to_tuple()
    named = {"image_embeds": embeds[0], "negative_image_embeds": embeds[1]}
    settings = {**named, "num_inference_steps": 2, "height": SIDE, "width": SIDE, "output_type": "np"}
    picture, mask = Image.new("RGB", (SIDE, SIDE)), np.ones((SIDE, SIDE), np.float32)
    cases = (
        (KandinskyV22Pipeline, "decoder", {}),
        (KandinskyV22ControlnetPipeline, "controlnet-depth", {"hint": torch.zeros(1, 3, SIDE, SIDE)}),
        (KandinskyV22InpaintPipeline, "decoder-inpaint", {"image": picture, "mask_image": mask}),
    )
    for kind, name, extra in cases:
        pipeline = kind.from_pretrained(folder / f"kandinsky-2-2-mini-{name}")
        pipeline.set_progress_bar_config(disable=True)
        array = pipeline(**settings, **extra).images
        assert array.shape == (1, SIDE, SIDE, 3)
        assert np.isfinite(array).all()


def test_weights_are_few_enough(trained: Path) -> None:
    """36 MB in 16 bits, the autoencoder counted once: its copies in three checkpoints are equal."""
    files = {path.read_bytes() for path in (trained / "checkpoints").rglob("*.safetensors")}
    parameters = 0
    for content in files:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        parameters += sum(int(np.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__")
    assert parameters * 2 <= 36e6


def test_what_is_trained_is_not_trained_again(trained: Path) -> None:
    done = run("-o", trained, "--effort", EFFORT, "--stage", "movq")
    assert done.returncode == 0
    assert "movq: trained already" in done.stdout


def test_a_folder_begun_in_another_way_is_refused(trained: Path) -> None:
    done = run("-o", trained, "--stage", "movq")
    assert done.returncode == 1
    assert "was begun with" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_processes_learn_together_what_one_does(tmp_path: Path) -> None:
    """Gradients are averaged, so both end with equal weights; a network of three batches is as wrong as before."""
    program = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from test_train_miniature import Line
from kandrt.scripts.train_miniature import loop
dist.init_process_group("gloo")
line = Line()
loop.train("line", line, loop.Settings(60, 16, 0.1), Path(sys.argv[1]), bfloat16=False)
weights = [torch.zeros_like(line.network.weight) for _ in range(2)]
dist.all_gather(weights, line.network.weight.detach())
assert torch.equal(*weights)
assert abs(float(weights[0]) - 3) < 0.3, weights
seen = [None, None]
dist.all_gather_object(seen, line.seen)
assert seen[0] != seen[1]
dist.barrier()
# All that is tested has been. gloo now and then aborts a process that ends while a thread of its own still runs.
sys.stdout.flush()
os._exit(0)
"""
    file = tmp_path / "program.py"
    file.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    arguments = [str(file), str(tmp_path / "out"), str(Path(__file__).parent)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--stage", "unet"], "expected movq, clip, prior, decoder, inpaint, controlnet, found unet"),
        (["--stage", "prior"], "stage prior needs movq, clip"),
    ],
)
def test_a_wrong_stage_is_refused(tmp_path: Path, args: list[str], message: str) -> None:
    done = run("-o", tmp_path / "work", *args)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import runpy; runpy.run_module('kandrt.scripts.train_miniature', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, "-o", str(tmp_path / "work"), "--stage", "movq", "--threads", "1"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield started
    started.kill()
    started.communicate()


def test_ctrl_c_saves(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    log, deadline = tmp_path / "work" / "movq" / loop.LOG, time.monotonic() + 120
    while not log.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "the same command goes on from here" in stdout
    assert "Traceback" not in stderr
    state = torch.load(tmp_path / "work" / "movq" / loop.STATE, weights_only=True)
    assert state["step"] >= loop.LOG_EVERY
