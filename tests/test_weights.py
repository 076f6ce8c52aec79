"""Weight files, read and written, against the safetensors library, torch and diffusers."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from kandrt.engines.errors import CheckpointError, OutputError
from kandrt.engines.hashing import sha256_file
from kandrt.export import weight_files as writing
from kandrt.export.weight_files import TensorToWrite, write_safetensors
from kandrt.export.weights import Weights, check_names, weight_files

SAFETENSORS = "diffusion_pytorch_model.safetensors"


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(5, 3, 2, generator=generator),
        "a.bias": torch.randn(5, generator=generator).half(),
        "b": torch.randn(64, 16, generator=generator).bfloat16(),
        "c": torch.randint(-9, 9, (1, 7), generator=generator),
        "d": torch.tensor(1.5),
        "e": torch.zeros(0, 4),
        "f": torch.tensor([True, False, True]),
    }


def assert_same(weights: Weights, expected: dict[str, torch.Tensor]) -> None:
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert weights.dtypes == {name: tensor.dtype for name, tensor in expected.items()}
    for name, tensor in expected.items():
        read = weights.read(name)
        assert read.is_contiguous()
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name


def shards(tensors: dict[str, torch.Tensor], folder: Path, pattern: str, save: Callable[..., None]) -> None:
    """Two files and an index, as diffusers and transformers write them; `pattern` takes a number and its total."""
    parts = {"00001": list(tensors)[:3], "00002": list(tensors)[3:]}
    weight_map = {}
    for number, names in parts.items():
        file = pattern.format(f"{number}-of-00002")
        save({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    stem, extension = pattern.partition("-{}")[::2]
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}{extension}.index.json").write_text(json.dumps(index))


FORMS: dict[str, Callable[[dict[str, torch.Tensor], Path], None]] = {
    "safetensors": lambda tensors, folder: safetensors.torch.save_file(tensors, folder / SAFETENSORS),
    "transformers": lambda tensors, folder: safetensors.torch.save_file(tensors, folder / "model.safetensors"),
    "fp16": lambda tensors, folder: safetensors.torch.save_file(tensors, folder / "model.fp16.safetensors"),
    "bin": lambda tensors, folder: torch.save(tensors, folder / "diffusion_pytorch_model.bin"),
    "transformers bin": lambda tensors, folder: torch.save(tensors, folder / "pytorch_model.bin"),
    "shards": lambda tensors, folder: shards(tensors, folder, "model-{}.safetensors", safetensors.torch.save_file),
    "bin shards": lambda tensors, folder: shards(tensors, folder, "pytorch_model-{}.bin", torch.save),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file_gives_the_tensors_that_were_saved(form: str, tmp_path: Path) -> None:
    expected = some_tensors()
    FORMS[form](expected, tmp_path)
    assert_same(Weights.open(tmp_path), expected)


def test_shards_that_the_hub_library_writes(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    expected = {f"layer.{i}": torch.full((32, 32), float(i)) for i in range(9)}
    hub.save_torch_state_dict(
        expected, tmp_path, filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size="10KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(Weights.open(tmp_path), expected)


def test_a_transposed_tensor_in_a_pickle_is_read_contiguous(tmp_path: Path) -> None:
    expected = torch.arange(6.0).reshape(2, 3).T
    torch.save({"a": expected}, tmp_path / "pytorch_model.bin")
    assert_same(Weights.open(tmp_path), {"a": expected})


SHARDED = ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PLAIN, HALF, BIN, HALF_BIN = SAFETENSORS, "model.fp16.safetensors", "pytorch_model.bin", "pytorch_model.fp16.bin"


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        ([BIN, HALF, PLAIN], None, [PLAIN]),
        ([BIN, HALF, PLAIN], "fp16", [HALF]),
        ([BIN, HALF], None, [HALF]),
        ([BIN, PLAIN], "fp16", [PLAIN]),
        ([BIN, HALF_BIN], None, [BIN]),
        ([BIN, HALF_BIN], "fp16", [HALF_BIN]),
        (["config.json", "flax_model.msgpack", "model.onnx"], None, []),
        (
            [
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                BIN,
            ],
            None,
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (
            ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors", "model.safetensors"],
            "fp16",
            ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"],
        ),
        (
            ["model.safetensors.index.fp16.json", "model-00001-of-00001.fp16.safetensors", BIN],
            None,
            ["model.safetensors.index.fp16.json", "model-00001-of-00001.fp16.safetensors"],
        ),
    ],
)
def test_safetensors_come_before_pickles_and_full_precision_before_half(
    names: list[str], variant: str | None, expected: list[str]
) -> None:
    assert weight_files(names, variant) == expected


def test_old_attention_names_are_renamed_as_diffusers_does(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from kandrt.scripts.random_checkpoint import make_checkpoint

    source = make_checkpoint("kandinsky-2-2-decoder", tmp_path / "decoder", small=True) / "movq"
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in safetensors.torch.load_file(source / SAFETENSORS).items():
        for new, old in old_names.items():
            name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = tensor
    assert sum("proj_attn" in name for name in tensors) > 2
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((source / "config.json").read_bytes())
    safetensors.torch.save_file(tensors, old / SAFETENSORS, {"format": "pt"})
    assert_same(Weights.open(old), dict(diffusers.VQModel.from_pretrained(old).state_dict()))


def test_names_that_look_like_old_attention_elsewhere_stay(tmp_path: Path) -> None:
    expected = {"encoder.layer.0.attention.self.query.weight": torch.ones(2), "key.bias": torch.ones(1)}
    safetensors.torch.save_file(expected, tmp_path / SAFETENSORS)
    assert_same(Weights.open(tmp_path), expected)


def test_position_ids_that_old_releases_stored_are_left_out(tmp_path: Path) -> None:
    stored = {"text_model.embeddings.position_ids": torch.arange(77)[None], "text_projection.weight": torch.ones(2)}
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    assert_same(Weights.open(tmp_path), {"text_projection.weight": torch.ones(2)})


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cut short"),
        (b"\x10\0\0", "cut short"),
        (header({}, length=2**40), "cut short"),
        (struct.pack("<Q", 9) + b"not json!", "not JSON"),
        (struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe", "not JSON"),
        (header([1]), "not a JSON object"),
        (header({"a": entry([4], 0, 16)}, bytes(15)), "announces"),
        (header({"a": entry([4], 0, 16)}, bytes(17)), "announces"),
        (header({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, bytes(24)), "overlap"),
        (header({"a": entry([4], 0, 16), "b": entry([4], 20, 36)}, bytes(36)), "gaps"),
        (header({"a": entry([5], 0, 16)}, bytes(16)), "damaged entry"),
        (header({"a": entry([-4], 0, -16)}, bytes(16)), "damaged entry"),
        (header({"a": entry([4], 0, 16, "X9")}, bytes(16)), "unknown type"),
        (header({"a": 3}), "damaged entry"),
    ],
)
def test_damaged_safetensors_are_refused_by_name_and_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / SAFETENSORS
    file.write_bytes(content)
    with pytest.raises(safetensors.SafetensorError):  # the library agrees
        safetensors.torch.load_file(file)
    with pytest.raises(CheckpointError, match=reason) as caught:
        Weights.open(tmp_path)
    assert str(file) in str(caught.value)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    (tmp_path / SAFETENSORS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5012309584\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Weights.open(tmp_path)


def test_a_file_that_shrinks_after_opening_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    FORMS["safetensors"]({"a": torch.ones(100)}, tmp_path)
    weights = Weights.open(tmp_path)
    with (tmp_path / SAFETENSORS).open("r+b") as file:
        file.truncate(200)
    with pytest.raises(CheckpointError, match="ends within 'a'"):
        weights.read("a")
    (tmp_path / SAFETENSORS).unlink()
    with pytest.raises(CheckpointError, match=SAFETENSORS):
        weights.read("a")
    with pytest.raises(CheckpointError, match="no tensor 'z'"):
        weights.read("z")


@pytest.mark.parametrize("length", [0, 10, 700])
def test_a_damaged_pickle_is_refused_by_name(length: int, tmp_path: Path) -> None:
    FORMS["bin"](some_tensors(), tmp_path)
    file = tmp_path / "diffusion_pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bin"):
        Weights.open(tmp_path)


class Exploit:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path, ("executed",)


@pytest.mark.parametrize("content", [{"a": Exploit()}, [torch.ones(1)], {"a": 3}])
def test_a_pickle_of_anything_but_tensors_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        Weights.open(tmp_path)


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Exploit()}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        Weights.open(tmp_path)


def test_damaged_indexes_are_refused(tmp_path: Path) -> None:
    FORMS["shards"](some_tensors(), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"lacks files .*model-00002-of-00002\.safetensors"):
        Weights.open(tmp_path)
    content["weight_map"] = {"zz": "model-00001-of-00002.safetensors"}
    for damaged, reason in [
        (json.dumps(content), "zz"),
        ("{", "cannot read the index"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "weight_map"),
        ('{"weight_map": [1]}', "weight_map"),
    ]:
        index.write_text(damaged)
        with pytest.raises(CheckpointError, match=reason):
            Weights.open(tmp_path)


def test_a_folder_without_weights_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "flax_model.msgpack").touch()
    with pytest.raises(CheckpointError, match=r"found flax_model\.msgpack"):
        Weights.open(tmp_path)
    with pytest.raises(CheckpointError, match="cannot read the folder"):
        Weights.open(tmp_path / "absent")


def test_names_and_shapes_that_differ_are_listed_together(tmp_path: Path) -> None:
    stored = {"a": torch.ones(2), "b": torch.ones(3, 1), "extra": torch.ones(1), "codebook": torch.ones(1)}
    FORMS["safetensors"](stored, tmp_path)
    weights = Weights.open(tmp_path)
    check_names("a test", {"a": (2,), "b": [3, 1], "extra": (1,)}, weights, unused=["codebook"])
    expected = {"a": (2,), "b": (3,), **{f"more.{i:02}": (1,) for i in range(12)}}
    with pytest.raises(CheckpointError) as caught:
        check_names("a test", expected, weights)
    message = str(caught.value)
    for part in (
        str(tmp_path),
        "a test",
        "12 missing: more.00, ",
        "more.09 and 2 more",
        "2 unexpected: codebook, extra",
        "b (expected [3], found [3, 1])",
    ):
        assert part in message
    assert "more.10" not in message


PEAK = """
import resource, sys
from pathlib import Path
from kandrt.export.weight_files import TensorToWrite, write_safetensors
from kandrt.export.weights import Weights
weights = Weights.open(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shapes = weights.shapes.items()
tensors = [TensorToWrite(name, "float16", shape, lambda name=name: weights.read(name)) for name, shape in shapes]
write_safetensors(Path(sys.argv[2]), tensors)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_copying_a_file_needs_memory_for_its_largest_tensor(form: str, tmp_path: Path) -> None:
    size = 16 * 2**20
    FORMS[form]({f"t{i}": torch.ones(size // 4) for i in range(12)}, tmp_path)
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(tmp_path / "copy.safetensors")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    # of 12 tensors: one read, one being replaced, and slack for chunks and for torch's own first allocations
    assert peak < 4 * size


def writable(tensors: dict[str, torch.Tensor], dtype: str | None = None) -> list[TensorToWrite]:
    return [
        TensorToWrite(
            name,
            dtype if dtype and tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            lambda tensor=tensor: tensor,  # type: ignore[misc]
        )
        for name, tensor in tensors.items()
    ]


@pytest.mark.parametrize("chunk", [64, writing.CHUNK])
@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_written_files_hold_the_converted_tensors(
    dtype: str | None, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "CHUNK", chunk)
    tensors = some_tensors()
    written = write_safetensors(tmp_path / "model.safetensors", writable(tensors, dtype))
    with safetensors.safe_open(written.path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            expected = tensor.to(getattr(torch, dtype)) if dtype and tensor.is_floating_point() else tensor
            read = file.get_tensor(name)
            assert read.dtype == expected.dtype
            assert torch.equal(read, expected)
    assert_same(Weights.open(tmp_path), safetensors.torch.load_file(written.path))
    assert written.size == written.path.stat().st_size


def test_locations_point_at_aligned_bytes(tmp_path: Path) -> None:
    tensors = some_tensors()
    written = write_safetensors(tmp_path / "w.safetensors", writable(tensors))
    content = written.path.read_bytes()
    for name, place in written.tensors.items():
        expected = tensors[name]
        assert content[place.offset : place.offset + place.length] == (
            expected.reshape(-1).view(torch.uint8).numpy().tobytes()
        )
        assert (f"torch.{place.dtype}", place.shape) == (str(expected.dtype), tuple(expected.shape))
        assert place.offset % expected.itemsize == 0
        assert place.offset % 64 == 0 or place.length % 64 != 0
    big = written.tensors["b"]
    mapped = np.memmap(written.path, np.uint16, "r", big.offset, big.shape)
    assert np.array_equal(mapped, tensors["b"].view(torch.uint16).numpy())


def test_the_hash_is_of_the_file_and_the_order_given_does_not_matter(tmp_path: Path) -> None:
    tensors = writable(some_tensors())
    first = write_safetensors(tmp_path / "1.safetensors", tensors)
    second = write_safetensors(tmp_path / "2.safetensors", reversed(tensors))
    assert first.sha256 == hashlib.sha256(first.path.read_bytes()).hexdigest() == sha256_file(first.path)
    assert first.sha256 == second.sha256
    assert first.tensors == second.tensors


@pytest.mark.parametrize(("value", "fits"), [(65519.0, True), (-65519.0, True), (65520.0, False), (-1e9, False)])
def test_a_value_beyond_half_precision_is_an_error_that_names_the_tensor(
    value: float, fits: bool, tmp_path: Path
) -> None:
    tensors = {"fine": torch.ones(3), "net.weight": torch.tensor([0.0, value, 1.0])}
    path = tmp_path / "w.safetensors"
    if fits:  # rounds to the largest half, 65504
        write_safetensors(path, writable(tensors, "float16"))
        assert safetensors.torch.load_file(path)["net.weight"].abs().max() == 65504
        return
    path.write_bytes(b"older")
    with pytest.raises(CheckpointError, match=r"'net\.weight'.*float16"):
        write_safetensors(path, writable(tensors, "float16"))
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_tensor_that_is_not_as_announced_is_an_error(tmp_path: Path) -> None:
    for tensor in (
        TensorToWrite("a", "float32", (2,), lambda: torch.ones(3)),
        TensorToWrite("a", "int64", (2,), lambda: torch.ones(2)),
    ):
        with pytest.raises(CheckpointError, match="tensor 'a': expected"):
            write_safetensors(tmp_path / "w.safetensors", [tensor])
    for tensors in (writable({"a": torch.ones(1)}) * 2, writable({"__metadata__": torch.ones(1)})):
        with pytest.raises(ValueError, match="is taken"):
            write_safetensors(tmp_path / "w.safetensors", tensors)
    with pytest.raises(ValueError, match="float8"):
        write_safetensors(tmp_path / "w.safetensors", [TensorToWrite("a", "float8", (1,), lambda: torch.ones(1))])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits on file size are of POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores the signal: writes fail with an OSError
    try:
        with pytest.raises(OutputError, match=r"w\.safetensors \([\d,]+ bytes\)"):
            write_safetensors(tmp_path / "w.safetensors", writable({"a": torch.ones(100_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="No such file or directory"):
        write_safetensors(tmp_path / "absent" / "w.safetensors", [])
