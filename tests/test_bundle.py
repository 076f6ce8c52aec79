"""Opening a bundle: what is not there, what is damaged, and what the errors say to do."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kandrt.engines import bundle as bundles
from kandrt.engines.bundle import open_bundle
from kandrt.engines.errors import BundleError
from kandrt.engines.hashing import CHUNK, sha256_file
from kandrt.engines.manifest import FileRecord

EXPORT = "export the bundle again"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own to damage."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_a_whole_bundle_opens_and_its_hashes_are_right(bundle: Path) -> None:
    opened = open_bundle(str(bundle))
    read: list[int] = []
    opened.check_hashes(progress=read.append)
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files == {"manifest.json", *opened.manifest.files()}
    assert sum(read) == sum(record.size for record in opened.manifest.files().values())
    assert opened.path(opened.manifest.weights["prior"]) == bundle / "weights" / "prior.safetensors"


NOT_A_BUNDLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda at: None, "does not exist; make a bundle with: kandrt export"),
    "empty folder": (lambda at: at.mkdir(), r"is not a bundle: it has no manifest\.json; make a bundle with"),
    "file": (lambda at: at.write_text("x"), r"is not a bundle: it has no manifest\.json"),
    "manifest is a folder": (lambda at: (at / "manifest.json").mkdir(parents=True), "cannot read .*directory"),
}


@pytest.mark.parametrize("kind", NOT_A_BUNDLE)
def test_what_is_not_a_bundle_says_how_to_make_one(kind: str, tmp_path: Path) -> None:
    make, message = NOT_A_BUNDLE[kind]
    make(tmp_path / "here")
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(tmp_path / "here")
    assert str(tmp_path / "here") in str(caught.value)


def test_names_that_no_file_can_have_are_an_error_of_the_bundle() -> None:
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(BundleError):
            open_bundle(name)


def test_a_manifest_that_is_far_too_large_is_not_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(BundleError, match="expected at most 100 bytes"):
        open_bundle(copy)


def test_missing_and_misshapen_files_are_listed_together(copy: Path) -> None:
    (copy / "prior_step.onnx").unlink()
    (copy / "tokenizer.json").write_text("{}")
    shutil.rmtree(copy / "weights")
    with pytest.raises(BundleError) as caught:
        open_bundle(copy)
    message = str(caught.value)
    assert message.startswith(f"{copy}: ")
    for part in ("prior_step.onnx is missing", "bytes, found 2", "weights/movq.safetensors is missing", EXPORT):
        assert part in message


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_changed_byte_is_found_by_its_hash(copy: Path) -> None:
    damaged = ["movq_decoder.onnx", "weights/decoder.safetensors"]
    for name in damaged:
        flip_last_byte(copy / name)
    opened = open_bundle(copy)  # sizes are as before
    with pytest.raises(BundleError) as caught:
        opened.check_hashes()
    message = str(caught.value)
    for name in damaged:
        assert f"{name}: expected SHA-256 {opened.manifest.files()[name].sha256[:16]}…, found " in message
    assert message.count("expected SHA-256") == 2
    assert EXPORT in message
    opened.check_hashes(opened.manifest.component_files("prior_step"))  # those asked for, and no others


def test_a_file_that_vanishes_after_opening_is_an_error_of_the_bundle(copy: Path) -> None:
    opened = open_bundle(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read: No such file or directory; export"):
        opened.check_hashes()


def test_a_weights_file_may_not_be_a_link_out_of_the_bundle(copy: Path, tmp_path: Path) -> None:
    weights = copy / "weights" / "movq.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"weights/movq\.safetensors is a link out of the bundle"):
        open_bundle(copy)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 1])
def test_hashes_of_files_of_any_size(size: int, tmp_path: Path) -> None:
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    (tmp_path / "a").write_bytes(content)
    read: list[int] = []
    assert sha256_file(tmp_path / "a", read.append) == hashlib.sha256(content).hexdigest()
    assert sum(read) == size
    record = FileRecord("a", size, hashlib.sha256(content).hexdigest())
    assert record.sha256 == sha256_file(tmp_path / "a")
