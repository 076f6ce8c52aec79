"""Opening checkpoints: folders made by the script and by diffusers, damaged ones, and a hub that is not there."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kandrt.engines.errors import CheckpointError, InputError
from kandrt.export.checkpoint import open_checkpoint, roles
from kandrt.export.weights import Weights
from kandrt.scripts.random_checkpoint import make_checkpoint

PRIOR = {"prior", "text_encoder", "image_encoder", "tokenizer", "prior_scheduler", "image_processor"}
DECODER = {"unet", "movq", "scheduler"}
PROMPT = {"prompt_encoder", "prompt_tokenizer"}
DECODER_2_1 = DECODER | PROMPT
COMMIT = "9ae140d3" * 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small checkpoints, each made once; not to be changed."""
    root = tmp_path_factory.mktemp("made")

    def make(kind: str) -> Path:
        folder = root / kind
        return folder if folder.exists() else make_checkpoint(kind, folder, small=True)

    return make


@pytest.fixture
def decoder(made: Callable[[str], Path], tmp_path: Path) -> Path:
    """A decoder of one's own to damage."""
    return Path(shutil.copytree(made("kandinsky-2-2-decoder"), tmp_path / "decoder"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "names", "does"),
    [
        ("kandinsky-2-2-prior", PRIOR, ("prior",)),
        ("kandinsky-2-2-decoder", DECODER, ("decoder",)),
        ("kandinsky-2-2-decoder-inpaint", DECODER, ("inpaint",)),
        ("kandinsky-2-2-controlnet-depth", DECODER, ("controlnet",)),
        ("kandinsky-2-2-combined", PRIOR | DECODER, ("prior", "decoder")),
        ("kandinsky-2-2-combined-inpaint", PRIOR | DECODER, ("prior", "inpaint")),
        ("kandinsky-2-1-prior", PRIOR, ("prior",)),
        ("kandinsky-2-1", DECODER_2_1 | {"ddpm_scheduler"}, ("decoder",)),
        ("kandinsky-2-1-inpaint", DECODER_2_1, ("inpaint",)),
        ("kandinsky-2-1-combined", PRIOR | DECODER_2_1 | {"ddpm_scheduler"}, ("prior", "decoder")),
        ("kandinsky-3", DECODER | PROMPT, ("decoder",)),
    ],
)
def test_submodels_have_one_name_whichever_folder_holds_them(
    kind: str, names: set[str], does: tuple[str, ...], made: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(made(kind))
    assert kind.startswith(checkpoint.family)
    assert checkpoint.revision is None
    assert checkpoint.submodels.keys() == names
    assert roles(checkpoint) == does
    if "prior" in names:
        assert checkpoint.submodels["prior"].class_name == "PriorTransformer"
        assert checkpoint.submodels["prior_scheduler"].config["_class_name"] == "UnCLIPScheduler"
        assert checkpoint.submodels["prior"].folder.name == ("prior_prior" if "unet" in names else "prior")
    if "unet" in names:
        own = "DDIMScheduler" if checkpoint.family == "kandinsky-2-1" else "DDPMScheduler"
        assert checkpoint.submodels["scheduler"].config["_class_name"] == own
    if "ddpm_scheduler" in names:
        assert checkpoint.submodels["ddpm_scheduler"].config["variance_type"] == "learned_range"
    if "prompt_encoder" in names:
        assert checkpoint.submodels["prompt_encoder"].folder.name == "text_encoder"


@pytest.mark.parametrize("kind", ["kandinsky-2-2-combined", "kandinsky-2-1-combined", "kandinsky-3"])
def test_what_diffusers_saves_is_read_back(kind: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(made(kind))
    pipeline.save_pretrained(tmp_path / "saved")
    saved, original = open_checkpoint(tmp_path / "saved"), open_checkpoint(made(kind))
    assert roles(saved) == roles(original)
    networks = {"prior", "text_encoder", "image_encoder", "unet", "movq"} & original.submodels.keys()
    for name in networks:
        shapes = Weights.open(saved.submodels[name].folder).shapes
        assert shapes == Weights.open(original.submodels[name].folder).shapes


@pytest.mark.parametrize(
    "class_name",
    ["KandinskyV22Img2ImgPipeline", "KandinskyV22ControlnetImg2ImgPipeline", "KandinskyV22InpaintPipeline"],
)
def test_what_a_decoder_can_do_follows_from_its_unet(class_name: str, decoder: Path) -> None:
    edit(decoder / "model_index.json", _class_name=class_name)
    assert roles(open_checkpoint(decoder)) == ("decoder",)


@pytest.mark.parametrize(
    ("class_name", "reason"),
    [
        ("StableDiffusionPipeline", "not a Kandinsky pipeline"),
        ("Kandinsky5T2VPipeline", "not a Kandinsky pipeline"),
        (["KandinskyV22Pipeline"], "not a Kandinsky pipeline"),
    ],
)
def test_other_pipelines_are_refused_by_name(class_name: object, reason: str, decoder: Path) -> None:
    edit(decoder / "model_index.json", _class_name=class_name)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(str(decoder))
    assert str(class_name) in str(caught.value)
    assert "KandinskyV22CombinedPipeline" in str(caught.value)


@pytest.mark.parametrize(
    ("class_name", "expected"),
    [("KandinskyPipeline", "text_encoder: expected"), ("Kandinsky3Pipeline", "unet: expected Kandinsky3UNet, found")],
)
def test_the_index_of_another_family_says_what_is_missing(class_name: str, expected: str, decoder: Path) -> None:
    edit(decoder / "model_index.json", _class_name=class_name)
    with pytest.raises(CheckpointError, match=f"of a {class_name}: .*{expected}"):
        open_checkpoint(decoder)


def test_a_scheduler_that_the_index_does_not_list_may_be_absent(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made("kandinsky-2-1"), tmp_path / "decoder")
    shutil.rmtree(folder / "ddpm_scheduler")
    assert open_checkpoint(folder).submodels.keys() == DECODER_2_1


def break_index(folder: Path, **changes: Any) -> None:
    edit(folder / "model_index.json", **changes)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda at: (at / "model_index.json").unlink(), r"no model_index\.json, found movq, scheduler, unet"),
    "broken index": (lambda at: (at / "model_index.json").write_text("{"), r"cannot read .*model_index\.json"),
    "index is a list": (lambda at: (at / "model_index.json").write_text("[]"), "expected a JSON object, found list"),
    "other classes": (
        lambda at: break_index(at, unet=["diffusers", "UNet3D"], movq=[None, None]),
        "unet: expected UNet2DConditionModel, found UNet3D; movq: ",
    ),
    "part not listed": (lambda at: break_index(at, movq="yes"), r"movq: expected \[library, class\], found 'yes'"),
    "no folder": (lambda at: shutil.rmtree(at / "movq"), r"lacks the folder 'movq' \(VQModel\)"),
    "no config": (lambda at: (at / "unet/config.json").unlink(), r"lacks config\.json; found diffusion_pytorch_model"),
    "broken config": (lambda at: (at / "movq/config.json").write_bytes(b"\xff"), r"cannot read .*config\.json as JSON"),
    "no weights": (lambda at: (at / "unet/diffusion_pytorch_model.safetensors").unlink(), "unet holds no weights"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_says_what_is_wrong(damage: str, decoder: Path) -> None:
    apply, reason = DAMAGE[damage]
    apply(decoder)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(decoder)


@pytest.mark.parametrize("changes", [{"in_channels": 5}, {"addition_embed_type": "text_image"}, {"in_channels": [4]}])
def test_a_unet_of_another_kind_is_refused(changes: dict[str, Any], decoder: Path) -> None:
    edit(decoder / "unet" / "config.json", **changes)
    with pytest.raises(CheckpointError, match=r"in_channels and addition_embed_type are .*expected for Kandinsky"):
        roles(open_checkpoint(decoder))


class Hub:
    """A repository on disk behind the two calls of huggingface_hub that are used; downloads go into a cache."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.snapshot = repository, cache / "snapshots" / COMMIT
        self.offline: Exception | None = None
        self.revisions: list[str | None] = []

    def list_repo_files(self, repo_id: str, *, revision: str | None = None) -> list[str]:
        self.revisions.append(revision)
        if self.offline:
            raise self.offline
        return [str(path.relative_to(self.repository)) for path in self.repository.rglob("*") if path.is_file()]

    def snapshot_download(self, repo_id: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        if self.offline is None:
            for name in self.list_repo_files(repo_id, revision=revision):
                if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                    (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self.repository / name, self.snapshot / name)
        elif not self.snapshot.exists():
            raise self.offline
        return str(self.snapshot)

    def fetched(self, folder: str = "") -> set[str]:
        return {path.name for path in (self.snapshot / folder).iterdir()}


@pytest.fixture
def hub(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    library = pytest.importorskip("huggingface_hub")
    hub = Hub(decoder, tmp_path / "cache")
    monkeypatch.setattr(library, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(library, "list_repo_files", hub.list_repo_files)
    monkeypatch.chdir(tmp_path)
    return hub


def test_only_what_is_needed_is_fetched_from_the_hub(hub: Hub) -> None:
    unet = hub.repository / "unet"
    for name in (
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.fp16.safetensors",
        "model.onnx",
        "picture.png",
    ):
        (unet / name).touch()
    (hub.repository / "movq/diffusion_pytorch_model.safetensors").rename(hub.repository / "movq/pytorch_model.bin")
    for name in ("README.md", "original.ckpt", "safety/model.safetensors"):
        (hub.repository / name).parent.mkdir(exist_ok=True)
        (hub.repository / name).touch()
    checkpoint = open_checkpoint("owner/name", revision="main")
    assert checkpoint.name == "owner/name"
    assert checkpoint.revision == COMMIT
    assert checkpoint.folder == hub.snapshot
    assert roles(checkpoint) == ("decoder",)
    assert hub.fetched() == {"model_index.json", "unet", "movq", "scheduler"}
    assert hub.fetched("unet") == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert hub.fetched("movq") == {"config.json", "pytorch_model.bin"}
    assert hub.revisions[0] == "main"
    assert set(hub.revisions[1:]) == {COMMIT}  # a push in between cannot mix two revisions


def test_tokenizer_files_shards_and_the_unlisted_scheduler_are_fetched(
    hub: Hub, made: Callable[[str], Path], tmp_path: Path
) -> None:
    hub.repository = Path(shutil.copytree(made("kandinsky-2-1"), tmp_path / "hub"))
    tokenizer, encoder = hub.repository / "tokenizer", hub.repository / "text_encoder"
    (tokenizer / "sentencepiece.bpe.model").touch()
    (encoder / "model.safetensors").rename(encoder / "model-00001-of-00001.safetensors")
    names = Weights.open(made("kandinsky-2-1") / "text_encoder").shapes
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (encoder / "model.safetensors.index.json").write_text(json.dumps(index))
    open_checkpoint("owner/name")
    assert {"sentencepiece.bpe.model", "tokenizer.json"} < hub.fetched("tokenizer")
    assert hub.fetched("ddpm_scheduler") == {"scheduler_config.json"}
    shards = {"model.safetensors.index.json", "model-00001-of-00001.safetensors"}
    assert hub.fetched("text_encoder") == {"config.json", *shards}


def test_the_variant_asked_for_is_fetched_where_there_is_one(hub: Hub) -> None:
    (hub.repository / "unet/diffusion_pytorch_model.fp16.safetensors").touch()
    checkpoint = open_checkpoint("owner/name", variant="fp16")
    assert checkpoint.variant == "fp16"
    assert hub.fetched("unet") == {"config.json", "diffusion_pytorch_model.fp16.safetensors"}
    assert hub.fetched("movq") == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_kind_that_is_not_supported_costs_no_download(hub: Hub) -> None:
    edit(hub.repository / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(CheckpointError, match="owner/name: StableDiffusionPipeline is not a Kandinsky pipeline"):
        open_checkpoint("owner/name")
    assert hub.fetched() == {"model_index.json"}


def test_without_network_the_cache_is_used_if_it_is_complete(hub: Hub) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    open_checkpoint("owner/name")
    hub.offline = OfflineModeIsEnabled("offline")
    assert roles(open_checkpoint("owner/name")) == ("decoder",)
    shutil.rmtree(hub.snapshot / "movq")
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE.*lacks the folder 'movq'"):
        open_checkpoint("owner/name")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("RepositoryNotFoundError", "no such repository, or it is private"),
        ("GatedRepoError", "accept its terms"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "give its folder"),
        ("HFValidationError", "owner/name"),
        ("HfHubHTTPError", "boom"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(error: str, advice: str, hub: Hub) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, error)
    hub.offline = kind.__new__(kind, "boom")  # some need an HTTP response to be constructed
    hub.offline.args = ("boom",)
    with pytest.raises(CheckpointError, match=f"owner/name at revision v9 from the hub: .*{advice}"):
        open_checkpoint("owner/name", revision="v9")


@pytest.mark.parametrize(
    "source",
    ["./owner/name", "../name", "/owner/name", "~/owner-name", "a/b/c", "name", "owner\\name", "folder/name", ""],
)
def test_a_path_is_never_looked_up_on_the_hub(source: str, hub: Hub) -> None:
    hub.offline = AssertionError("a request was made")
    Path("folder").mkdir()
    with pytest.raises(CheckpointError, match=r"expected a checkpoint folder|not a checkpoint in diffusers' layout"):
        open_checkpoint(source)


def test_a_path_object_and_a_file_are_not_hub_ids(hub: Hub) -> None:
    hub.offline = AssertionError("a request was made")
    with pytest.raises(CheckpointError, match="found nothing"):
        open_checkpoint(Path("owner/name"))
    Path("model.safetensors").touch()
    with pytest.raises(CheckpointError, match="found a file"):
        open_checkpoint("model.safetensors")
    with pytest.raises(InputError, match="revision 'v1' needs a hub id"):
        open_checkpoint(hub.repository, revision="v1")
