"""manifest.json: what is read is what was written, and whatever else is read is refused as a BundleError."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kandrt.engines.errors import BundleError
from kandrt.engines.manifest import (
    SCHEMA_VERSION,
    Component,
    DecoderRecord,
    FileRecord,
    GraphError,
    Manifest,
    PriorRecord,
    Source,
    TokenizerRecord,
    decode_manifest,
    encode_manifest,
    missing_files,
)
from kandrt.engines.spec import TensorSpec

HASH = "0123456789abcdef" * 4


def component(name: str, weights: str) -> Component:
    return Component(
        graph=FileRecord(f"{name}.onnx", 3, HASH),
        weights=(weights,),
        inputs=(TensorSpec("input_ids", "int64", ("batch", 77)), TensorSpec("mask", "bool", ())),
        outputs=(TensorSpec("out", "float32", ("batch", 4, "height", "width")),),
        precision="fp16",
        parameters=1_250_000_000,
        error=GraphError(1.25e-07, 3e-06, 1e-4),
    )


def some_manifest() -> Manifest:
    """Every field set to something that is not its default."""
    networks = {
        "text_encoder": "text_encoder",
        "image_encoder": "image_encoder",
        "prior_context": "prior",
        "prior_step": "prior",
        "decoder_context": "decoder",
        "decoder_step": "decoder",
        "movq_encoder": "movq",
        "movq_decoder": "movq",
    }
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family="kandinsky-2-2",
        precision="fp16",
        components={name: component(name, weights) for name, weights in networks.items()},
        weights={name: FileRecord(f"weights/{name}.safetensors", 2**40, HASH) for name in set(networks.values())},
        schedulers={"prior": {"beta": 0.1, "names": ["a", None]}, "decoder": {"_class_name": "DDPMScheduler"}},
        sources=(Source("owner/имя", "KandinskyV22PriorPipeline", "9ae1"), Source("/a b/c", "KandinskyV22Pipeline")),
        tools={"torch": "2.9.0+cpu"},
        prior=PriorRecord(
            text_encoder="text_encoder",
            image_encoder="image_encoder",
            context="prior_context",
            step="prior_step",
            scheduler="prior",
            statistics=FileRecord("weights/statistics.safetensors", 400, HASH),
            embedding_dim=1280,
        ),
        decoders={
            "decoder": DecoderRecord(
                context="decoder_context",
                step="decoder_step",
                movq_encoder="movq_encoder",
                movq_decoder="movq_decoder",
                scheduler="decoder",
                embedding_dim=1280,
                scale=8,
                size_multiple=64,
                default_size=512,
            )
        },
        tokenizer=TokenizerRecord(FileRecord("tokenizer.json", 5, HASH), 77, 0),
        image_processor={"size": {"shortest_edge": 224}},
        reference=FileRecord("reference.safetensors", 6, HASH),
    )


def decode(content: object) -> Manifest:
    return decode_manifest(json.dumps(content).encode(), "here/manifest.json")


@pytest.fixture
def content() -> dict[str, Any]:
    """A valid manifest as JSON to be damaged."""
    decoded: dict[str, Any] = json.loads(encode_manifest(some_manifest()))
    return decoded


def test_what_is_written_is_read_back() -> None:
    manifest = some_manifest()
    data = encode_manifest(manifest)
    assert decode_manifest(data, "x") == manifest
    assert encode_manifest(decode_manifest(data, "x")) == data
    assert data.endswith(b"}\n")
    assert len(data.splitlines()) > 100  # for people to read and compare


def test_what_a_bundle_does_not_have_may_be_left_out(content: dict[str, Any]) -> None:
    for field in ("tokenizer", "image_processor", "prior", "reference"):
        del content[field]
    manifest = decode(content)
    assert manifest == replace(some_manifest(), prior=None, tokenizer=None, image_processor=None, reference=None)
    assert "tokenizer.json" not in manifest.files()


def test_fields_of_later_versions_are_passed_over(content: dict[str, Any]) -> None:
    content["later"] = {"a": [1]}
    content["prior"]["later"] = None
    assert decode(content) == some_manifest()


def test_every_file_is_listed_once() -> None:
    manifest = some_manifest()
    files = manifest.files()
    assert len(files) == 8 + 6 - 1 + 3  # graphs, weights, and statistics, tokenizer and reference
    assert all(record.file == name for name, record in files.items())
    assert [record.file for record in manifest.component_files("prior_step")] == [
        "prior_step.onnx",
        "weights/prior.safetensors",
    ]


def put(content: Any, path: str, value: Any) -> None:
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    for key in parents:
        content = content[key]
    content[last] = value


# Path of a field, what to put there, and what the message must say
WRONG: list[tuple[str, Any, str]] = [
    ("family", "kandinsky-9", "family"),
    ("precision", "int4", "precision"),
    ("components", [], "components"),
    ("components/prior_step/graph", None, "graph"),
    ("components/prior_step/graph/size", -1, r"\.graph\.size"),
    ("components/prior_step/graph/size", "3", r"\.graph\.size"),
    ("components/prior_step/graph/size", 2.5, r"\.graph\.size"),
    ("components/prior_step/graph/size", True, r"\.graph\.size"),
    ("components/prior_step/graph/sha256", HASH.upper(), "sha256"),
    ("components/prior_step/graph/sha256", HASH[1:], "sha256"),
    ("components/prior_step/inputs/0/dtype", "float64", r"inputs\[0\]\.dtype"),
    ("components/prior_step/inputs/0/shape/0", 1.5, r"inputs\[0\]\.shape"),
    ("components/prior_step/inputs/0/shape/0", 0, r"prior_step: input_ids int64\[0, 77\] has an axis without a length"),
    ("components/prior_step/inputs/0/shape/0", -1, "axis without a length"),
    ("components/prior_step/inputs/0/shape/0", "", "axis without a length"),
    ("components/prior_step/inputs/1/name", "input_ids", "prior_step names a tensor twice"),
    ("components/prior_step/error/relative", None, r"error\.relative"),
    ("schema_version", True, "schema_version"),
    ("decoders/painter", {}, "decoders"),
    ("decoders/decoder/scale", 0, r"\.scale"),
    ("tokenizer/pad_token_id", -1, "pad_token_id"),
    ("sources", {}, "sources"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_a_value_of_the_wrong_kind_is_refused_by_field(
    path: str, value: Any, message: str, content: dict[str, Any]
) -> None:
    put(content, path, value)
    with pytest.raises(BundleError, match=message) as caught:
        decode(content)
    assert str(caught.value).startswith("here/manifest.json")
    assert "export the bundle again" in str(caught.value)


@pytest.mark.parametrize("field", ["components", "weights", "schedulers", "sources", "tools", "family", "precision"])
def test_a_missing_field_is_named(field: str, content: dict[str, Any]) -> None:
    del content[field]
    with pytest.raises(BundleError, match=f"missing required field `{field}`"):
        decode(content)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", None, [1]])
def test_another_schema_version_is_refused_before_its_fields_are_looked_at(version: object) -> None:
    with pytest.raises(BundleError) as caught:
        decode({"schema_version": version, "components": "of another form"})
    assert f"expected schema_version {SCHEMA_VERSION}, found {version!r}" in str(caught.value)
    assert "use the version of kandrt that made the bundle" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"here/manifest\.json"):
        decode_manifest(data, "here/manifest.json")
    with pytest.raises(BundleError, match=r"here/manifest\.json"):
        decode_manifest(b'{"schema_version": 1, "x": ' + data + b"}", "here/manifest.json")


DANGLING: list[tuple[str, Any, str]] = [
    ("components/prior_step/weights", ["prior", "nowhere"], r"components\.prior_step\.weights names 'nowhere'"),
    ("decoders/decoder/scheduler", "nowhere", r"decoders\.decoder\.scheduler names 'nowhere'"),
    ("decoders/decoder/movq_encoder", "nowhere", r"decoders\.decoder\.movq_encoder names 'nowhere'"),
    ("prior/image_encoder", "nowhere", r"prior\.image_encoder names 'nowhere'"),
    ("prior/scheduler", "nowhere", r"prior\.scheduler names 'nowhere'"),
    ("tokenizer", None, "a prior needs tokenizer and image_processor"),
    ("image_processor", None, "a prior needs tokenizer and image_processor"),
]


@pytest.mark.parametrize(("path", "value", "message"), DANGLING)
def test_a_name_that_nothing_defines_is_refused(path: str, value: Any, message: str, content: dict[str, Any]) -> None:
    put(content, path, value)
    with pytest.raises(BundleError, match=message):
        decode(content)


def test_a_bundle_that_can_do_nothing_is_refused(content: dict[str, Any]) -> None:
    content["prior"], content["decoders"] = None, {}
    with pytest.raises(BundleError, match="neither a prior nor a decoder"):
        decode(content)


def test_all_problems_are_listed_at_once(content: dict[str, Any]) -> None:
    for path, value in (
        ("prior/step", "nowhere"),
        ("decoders/decoder/context", "gone"),
        ("tokenizer/file/file", "../x"),
    ):
        put(content, path, value)
    with pytest.raises(BundleError, match=r"nowhere.*gone|gone.*nowhere") as caught:
        decode(content)
    assert "'../x'" in str(caught.value)


UNSAFE = [
    "..",
    "../secret",
    "weights/../../secret",
    "weights/..",
    "/etc/passwd",
    "//server/share",
    "..\\secret",
    "weights\\a",
    "C:/secret",
    "C:secret",
    "a:stream",
    "a\0b",
    "a\nb",
    "",
    ".",
    "./a",
    "weights/./a",
    "weights/",
    "weights//a",
]
PLACES = [
    "components/prior_step/graph/file",
    "weights/prior/file",
    "prior/statistics/file",
    "tokenizer/file/file",
    "reference/file",
]


@pytest.mark.parametrize("file", UNSAFE)
def test_a_path_that_is_not_plainly_inside_the_bundle_is_refused(file: str, content: dict[str, Any]) -> None:
    for place in PLACES:
        damaged = json.loads(json.dumps(content))
        put(damaged, place, file)
        with pytest.raises(BundleError) as caught:
            decode(damaged)
        assert f"path {file!r} is not one inside the bundle" in str(caught.value)


@pytest.mark.parametrize("file", ["a..b/c", "..a", ".hidden", "weights/имя 1.safetensors", "a/b/c/d"])
def test_other_paths_are_taken(file: str, content: dict[str, Any]) -> None:
    put(content, "reference/file", file)
    assert file in decode(content).files()


def test_files_are_compared_with_what_the_manifest_says(tmp_path: Path) -> None:
    inside, outside = tmp_path / "bundle", tmp_path / "outside"
    inside.mkdir()
    outside.write_bytes(b"1234")
    (inside / "good").write_bytes(b"1234")
    (inside / "short").write_bytes(b"1")
    (inside / "folder").mkdir()
    (inside / "linked inside").symlink_to("good")
    (inside / "linked outside").symlink_to(outside)
    (inside / "loop").symlink_to("loop")
    (inside / "linked folder").symlink_to(tmp_path)
    names = ["good", "short", "folder", "absent", "linked inside", "linked outside", "loop", "linked folder/outside"]
    names += ["good/below a file", "x" * 300]
    problems = missing_files(inside, {name: FileRecord(name, 4, HASH) for name in names})
    assert sorted(problems) == sorted(
        [
            "short: expected 4 bytes, found 1",
            "folder is missing",
            "absent is missing",
            "linked outside is a link out of the bundle",
            "linked folder/outside is a link out of the bundle",
            "loop is missing",
            "good/below a file is missing",
            f"{'x' * 300} is missing",
        ]
    )


def test_a_bundle_may_itself_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"1234")
    (tmp_path / "link").symlink_to("real")
    assert missing_files(tmp_path / "link", {"a": FileRecord("a", 4, HASH)}) == []


def nodes(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with every key or index in it."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key
        yield from nodes(content[key])


SCALARS = [None, True, -1, 0, 1, 2**63, 10**40, 1e400, 1.5, float("nan"), "", "x", "../x", "\0", "\ud800", "é" * 300]
VALUES: list[Any] = [*SCALARS, [], {}, [[]], [1, "a"], {"a": {"b": []}}]


def delete(container: Any, key: Any, rng: random.Random) -> None:
    del container[key]


def rename(container: Any, key: Any, rng: random.Random) -> None:
    if isinstance(container, dict):
        container[rng.choice(["", "x", "../x", "prior", "\0", "\ud800"])] = container.pop(key)


def swap(container: Any, key: Any, rng: random.Random) -> None:
    container[key] = rng.choice(VALUES)


def repeat(container: Any, key: Any, rng: random.Random) -> None:
    if isinstance(container, list):
        container.insert(key, container[key])


MUTATIONS: list[Callable[[Any, Any, random.Random], None]] = [delete, rename, swap, swap, repeat]


def read_or_refuse(data: bytes, folder: Path) -> bool:
    """Decode; what is taken must survive being written, and its files be looked for, without any other exception."""
    try:
        manifest = decode_manifest(data, "x")
    except BundleError:
        return False
    assert decode_manifest(encode_manifest(manifest), "x") == manifest
    assert len(missing_files(folder, manifest.files())) == len(manifest.files())
    return True


def test_one_changed_field_is_read_or_refused_and_nothing_else(content: dict[str, Any], tmp_path: Path) -> None:
    rng = random.Random(0)  # noqa: S311 (a seed, no secret)
    text = json.dumps(content)
    taken = 0
    for _ in range(3000):
        damaged = json.loads(text)
        container, key = rng.choice(list(nodes(damaged)))
        rng.choice(MUTATIONS)(container, key, rng)
        taken += read_or_refuse(json.dumps(damaged).encode(), tmp_path)
    assert 100 < taken < 2500  # the loop met both


def test_changed_bytes_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(1)  # noqa: S311 (a seed, no secret)
    data = encode_manifest(some_manifest())
    for _ in range(3000):
        at, length = rng.randrange(len(data)), rng.choice([0, 1, 1, 30])
        read_or_refuse(data[:at] + rng.randbytes(rng.choice([0, 1, 1, 3])) + data[at + length :], tmp_path)
