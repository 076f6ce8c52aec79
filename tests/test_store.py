"""The engine store: what lies in it is found, checked and removed; what is broken or stale is named, never opened."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kandrt.engines import builder as builder_module
from kandrt.engines import store as store_module
from kandrt.engines.bundle import Bundle
from kandrt.engines.errors import BackendError, BundleError, OutputError
from kandrt.engines.plans import (
    RECORD_VERSION,
    PlanFigures,
    PlanKey,
    PlanRecord,
    PlanSettings,
    encode_record,
    plan_key,
)
from kandrt.engines.profiles import USUAL_SIZE, Coverage, component_profiles
from kandrt.engines.store import (
    Damaged,
    EngineStore,
    build_command,
    command_options,
    plan_record_file,
    stem_of,
)
from kandrt.scripts.cli import app

from .toy_bundle import change_component, export_again, make_toy_bundle, rewrite, train_again

VERSION = "1.7.1"  # of the builder, in this file
CONTENT = b"what a builder made\n" * 50


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_toy_bundle(tmp_path / "a [b] c's bundle")


@pytest.fixture
def store(bundle: Bundle) -> EngineStore:
    return EngineStore(bundle)


def key_of(bundle: Bundle, name: str = "decoder_step", **changes: Any) -> PlanKey:
    """A key of the bundle as it is, with changes."""
    key = plan_key(
        bundle,
        name,
        builder="tensorrt-rtx",
        library=VERSION,
        compute_capabilities=["sm89"],
        profiles=component_profiles(bundle.manifest, name, [Coverage(USUAL_SIZE)]),
        settings=PlanSettings(),
    )
    return replace(key, **changes)


def put(store: EngineStore, key: PlanKey, content: bytes = CONTENT) -> PlanRecord:
    """Take a plan into the store as a build does."""
    with store.building(key) as temporary:
        temporary.write_bytes(content)
        record = PlanRecord(
            RECORD_VERSION, key, plan_record_file(key, temporary), PlanFigures(5, 0.1, 1.0, None), ("log",)
        )
        store.add(record, temporary)
    return record


def plan_of(store: EngineStore, record: PlanRecord) -> Path:
    return store.folder / record.plan.file


def record_of(store: EngineStore, record: PlanRecord) -> Path:
    return plan_of(store, record).with_suffix(".json")


def usable(store: EngineStore, name: str = "decoder_step", capability: str | None = "sm89") -> list[PlanRecord]:
    return store.usable(name, "tensorrt-rtx", version=VERSION, capability=capability)


# In and out


def test_what_was_added_is_found(bundle: Bundle, store: EngineStore) -> None:
    key = key_of(bundle)
    assert store.find(key) is None
    assert store.records() == ([], [])
    record = put(store, key)
    assert store.find(key) == record
    assert store.records() == ([record], [])
    assert store.read(record) == CONTENT
    assert usable(store) == [record]
    assert store.path(record).parent == bundle.folder / "engines"
    assert sorted(path.suffix for path in store.folder.iterdir()) == [".json", ".lock", ".plan"]


def test_a_key_finds_its_own_plan_only(bundle: Bundle, store: EngineStore) -> None:
    first = put(store, key_of(bundle))
    second = put(store, key_of(bundle, settings=PlanSettings(("WEIGHT_STREAMING",))), b"another")
    assert store.find(first.key) == first
    assert store.find(second.key) == second
    assert store.find(key_of(bundle, compute_capabilities=("sm86", "sm89"))) is None
    assert usable(store) == store.records()[0]
    assert {each.plan.file for each in usable(store)} == {first.plan.file, second.plan.file}


def test_a_second_build_takes_the_place_of_the_first(bundle: Bundle, store: EngineStore) -> None:
    put(store, key_of(bundle))
    record = put(store, key_of(bundle), b"new")
    assert store.records() == ([record], [])
    assert store.read(record) == b"new"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing(bundle: Bundle, store: EngineStore, error: BaseException) -> None:
    def fail() -> None:
        with store.building(key_of(bundle)) as temporary:
            temporary.write_bytes(b"half of a pl")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert store.records() == ([], [])
    assert store.find(key_of(bundle)) is None
    assert [path.suffix for path in store.folder.iterdir()] == [".lock"]


# What is broken


def test_a_plan_without_a_record(bundle: Bundle, store: EngineStore) -> None:
    record = put(store, key_of(bundle))
    record_of(store, record).unlink()
    assert store.records() == (
        [],
        [Damaged(record.plan.file, f"{plan_of(store, record)} has no record, so it is not opened")],
    )
    assert store.find(record.key) is None
    with pytest.raises(BackendError, match="has no record, so it is not opened"):
        usable(store)


def test_a_record_without_a_plan(bundle: Bundle, store: EngineStore) -> None:
    record = put(store, key_of(bundle))
    plan_of(store, record).unlink()
    ((), (damaged,)) = map(tuple, store.records())
    assert damaged.problem == f"{record_of(store, record)}: its plan {record.plan.file} is missing"
    assert store.find(record.key) is None
    with pytest.raises(BackendError, match="is missing"):
        usable(store)
    with pytest.raises(BundleError, match="cannot read"):
        store.read(record)


@pytest.mark.parametrize("size", [0, len(CONTENT) - 1, len(CONTENT) + 1])
def test_a_plan_of_another_size(bundle: Bundle, store: EngineStore, size: int) -> None:
    record = put(store, key_of(bundle))
    plan_of(store, record).write_bytes((CONTENT + b"x")[:size])
    (damaged,) = store.records()[1]
    assert damaged.problem == f"{plan_of(store, record)}: expected {len(CONTENT)} bytes, found {size}"
    assert store.find(record.key) is None
    again = put(store, record.key)
    assert store.records() == ([again], [])


@pytest.mark.parametrize("position", [0, len(CONTENT) // 2, len(CONTENT) - 1])
def test_a_plan_of_which_a_byte_changed_is_not_read(bundle: Bundle, store: EngineStore, position: int) -> None:
    record = put(store, key_of(bundle))
    content = bytearray(CONTENT)
    content[position] ^= 1
    plan_of(store, record).write_bytes(content)
    with pytest.raises(BundleError) as error:
        store.read(record)
    assert f"{plan_of(store, record)} is damaged: expected SHA-256 {record.plan.sha256[:16]}…, found" in str(
        error.value
    )
    # Its size is right, so a build takes it for up to date: it has to go first
    assert "; remove it, then run: kandrt build " in str(error.value)
    plan_of(store, record).unlink()
    assert store.find(record.key) is None


def test_a_record_of_something_else(bundle: Bundle, store: EngineStore) -> None:
    record = put(store, key_of(bundle))
    other = key_of(bundle, "movq_decoder")
    record_of(store, record).replace(store.folder / f"{other.stem}.json")
    plan_of(store, record).replace(store.folder / f"{other.stem}.plan")
    (damaged,) = store.records()[1]
    assert damaged.problem.endswith(f"{other.stem}.json is damaged: it is the record of {record.key.stem}")
    assert store.find(other) is None


@pytest.mark.parametrize("name", ["../manifest.json", "/etc/passwd", "..\\x", "x/../../x.plan", "movq.plan", ""])
def test_a_record_leads_to_no_other_file(bundle: Bundle, store: EngineStore, name: str) -> None:
    record = put(store, key_of(bundle))
    wrong = replace(record, plan=replace(record.plan, file=name))
    record_of(store, record).write_bytes(encode_record(wrong))
    assert store.find(record.key) is None
    assert "is damaged" in store.records()[1][0].problem


@pytest.mark.parametrize("component", ["../evil", "a/b", "/x"])
def test_a_components_name_leads_nowhere(bundle: Bundle, store: EngineStore, component: str) -> None:
    record = put(store, key_of(bundle))
    wrong = replace(record, key=replace(record.key, component=component))
    record_of(store, record).write_bytes(encode_record(wrong))
    assert store.records()[0] == []
    assert "is damaged" in store.records()[1][0].problem


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"{}", b"[" * 1_000, b" " * (store_module.MAX_RECORD_BYTES + 9)]
)
def test_a_record_that_is_none(bundle: Bundle, store: EngineStore, content: bytes) -> None:
    record = put(store, key_of(bundle))
    sound = put(store, key_of(bundle, "movq_encoder"))
    record_of(store, record).write_bytes(content)
    records, (damaged,) = store.records()
    assert records == [sound], "one that is broken does not hide the others"
    assert damaged.file == f"{record.key.stem}.json"
    assert store.find(record.key) is None


def test_what_a_killed_build_left(bundle: Bundle, store: EngineStore) -> None:
    key = key_of(bundle)
    put(store, key_of(bundle, "movq_encoder"))
    left = [store.folder / f"{key.stem}.tmp", store.folder / f".{key.stem}.json.123.tmp"]
    for path in left:
        path.write_bytes(b"half")
    assert [each.file for each in store.records()[1]] == sorted(path.name for path in left)
    assert "was left by a build that did not finish" in store.records()[1][0].problem
    put(store, key)
    assert store.records()[1] == [], "the next build of the key clears it away"
    assert not any(path.exists() for path in left)


def test_files_of_the_store_by_key() -> None:
    names = [f"a-1{suffix}" for suffix in (".plan", ".json", ".tmp", ".lock")]
    assert {stem_of(name) for name in [*names, ".a-1.json.77.tmp"]} == {"a-1"}
    assert stem_of(".a-1.json.x.tmp") != "a-1"


# What is stale


def new_precision(bundle: Bundle) -> Bundle:
    return change_component(bundle, "decoder_step", precision="fp32")


def without_component(bundle: Bundle) -> Bundle:
    manifest = bundle.manifest
    rest = {name: each for name, each in manifest.components.items() if name != "decoder_step"}
    decoders = {role: replace(each, step="decoder_context") for role, each in manifest.decoders.items()}
    return rewrite(bundle.folder, replace(manifest, components=rest, decoders=decoders))


CHANGES: dict[str, tuple[Callable[[Bundle], Bundle], str]] = {
    "graph": (lambda bundle: export_again(bundle, "decoder_step", note="new"), "the graph is another"),
    "weights": (lambda bundle: train_again(bundle, "decoder"), "the weights are others"),
    "precision": (new_precision, "it computes in fp16, the bundle in fp32"),
    "component": (without_component, "the bundle has no component decoder_step"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_bundle_that_changed_makes_plans_stale(bundle: Bundle, change: str) -> None:
    record = put(EngineStore(bundle), key_of(bundle))
    edit, problem = CHANGES[change]
    store = EngineStore(edit(bundle))
    assert store.stale(record) == [problem]
    assert problem in store.problems(record, version=VERSION, capability="sm89")
    with pytest.raises(BackendError) as error:
        usable(store)
    assert str(error.value).startswith("decoder_step: no tensorrt-rtx engine can be used here (")
    assert f"{record.plan.file}: {problem}" in str(error.value)


def test_only_the_component_that_changed_is_stale(bundle: Bundle) -> None:
    names = bundle.manifest.components
    records = {name: put(EngineStore(bundle), key_of(bundle, name)) for name in names}
    bundle = export_again(bundle, "decoder_step", note="new")
    assert [name for name in names if EngineStore(bundle).stale(records[name])] == ["decoder_step"]
    bundle = train_again(bundle, "movq")
    stale = [name for name in names if EngineStore(bundle).stale(records[name])]
    assert stale == ["movq_encoder", "movq_decoder", "decoder_step"]


def test_a_plan_of_another_revision_version_or_gpu(
    bundle: Bundle, store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = put(store, key_of(bundle, compute_capabilities=("sm86", "sm89")))
    assert store.problems(record, version="1.8", capability="sm120") == [
        "it was built by tensorrt-rtx 1.7.1, 1.8 is installed",
        "it is for sm86, sm89, this GPU is sm120",
    ]
    assert store.problems(record, version=VERSION, capability="sm86") == []
    assert store.problems(record, version=VERSION, capability=None) == [], "no GPU was asked about"
    assert store.stale(record) == [], "another machine may have what it needs"
    monkeypatch.setattr(store_module, "BUILDER_REVISION", 10**6)
    assert store.stale(record) == ["it was built by another version of kandrt"]


def test_all_that_differs_is_named(bundle: Bundle) -> None:
    first = put(EngineStore(bundle), key_of(bundle, compute_capabilities=("sm86",)))
    second = put(EngineStore(bundle), key_of(bundle, library="1.6"))
    (EngineStore(bundle).folder / "decoder_step-1234.plan").write_bytes(b"")
    (EngineStore(bundle).folder / "movq_decoder-1234.plan").write_bytes(b"")
    put(EngineStore(bundle), key_of(bundle, "movq_encoder"))
    store = EngineStore(train_again(bundle, "decoder"))
    with pytest.raises(BackendError) as error:
        usable(store)
    message = str(error.value)
    assert f"{first.plan.file}: the weights are others; it is for sm86, this GPU is sm89" in message
    assert (
        f"{second.plan.file}: the weights are others; it was built by tensorrt-rtx 1.6, {VERSION} is installed"
        in message
    )
    assert "decoder_step-1234.plan has no record" in message
    assert "movq" not in message.partition("; run: ")[0], "other components' plans are of no interest"


def test_plans_of_another_builder_do_not_count(bundle: Bundle, store: EngineStore) -> None:
    put(store, key_of(bundle, builder="tensorrt"))
    with pytest.raises(BackendError, match="no tensorrt-rtx engine can be used here; run: "):
        usable(store)


def accepted(command: str) -> list[str]:
    """The words of a command that the command line takes; what it would build is planned, not built."""
    words = shlex.split(command)
    assert words[:2] == ["kandrt", "build"]
    return words


@pytest.mark.parametrize("capability", ["sm89", "sm120", None])
def test_the_command_that_builds_anew_is_one(
    bundle: Bundle, store: EngineStore, capability: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError) as error:
        usable(store, capability=capability)
    words = accepted(str(error.value).rpartition("; run: ")[2])
    assert words[2:5] == [str(bundle.folder), "--backend", "tensorrt-rtx"]
    assert words[5:] == (["--gpu", capability] if capability else [])
    monkeypatch.setattr(builder_module, "library_version", lambda _builder: VERSION)
    monkeypatch.setattr(builder_module, "capability", lambda *_: "sm86")
    result = CliRunner().invoke(app, [*words[1:], "--dry-run"], env={"COLUMNS": "100"})
    assert (result.exit_code, result.stderr) == (0, "")
    assert "would build 4 of 4 engines" in result.stdout


def test_commands_name_all_that_was_asked_for(bundle: Bundle, store: EngineStore) -> None:
    record = put(store, key_of(bundle, compute_capabilities=("sm86", "sm120")))
    component = ["--component", record.key.component]
    assert accepted(store.command(record))[5:] == ["--gpu", "sm86,sm120", *component]
    proper = replace(record, key=replace(record.key, builder="tensorrt"))
    assert accepted(store.command(proper))[3:] == ["--backend", "tensorrt", *component]
    options = command_options([Coverage((512, 512, 1024), (1, 2, 4), static=True)], PlanSettings(optimization_level=2))
    words = accepted(build_command(bundle, "tensorrt-rtx", ("sm120", "sm86"), options))
    sizes = ["--size", "512:512:1024", "--batch", "1:2:4", "--static", "--optimization-level", "2"]
    assert words[5:] == ["--gpu", "sm86,sm120", *sizes]
    asked = accepted(store.command(replace(record, options=options)))
    assert asked[5:] == ["--gpu", "sm86,sm120", *sizes, *component]


def test_a_gpu_that_the_builder_does_not_know_is_named(store: EngineStore) -> None:
    with pytest.raises(BackendError, match="tensorrt-rtx has no engines for sm90; use backend 'tensorrt'"):
        usable(store, capability="sm90")


# Removing


def test_a_plan_that_was_finished_meanwhile_is_not_damaged(bundle: Bundle, store: EngineStore) -> None:
    record = put(store, key_of(bundle))
    (store.folder / f"{record.key.stem}.tmp").write_bytes(b"12345")
    assert store.remove(record.key.stem, sound=False) == 5
    assert store.find(record.key) == record
    store.remove(record.key.stem)
    assert store.find(record.key) is None


def test_remove_takes_all_of_a_key(bundle: Bundle, store: EngineStore) -> None:
    record, other = put(store, key_of(bundle)), put(store, key_of(bundle, "movq_encoder"))
    (store.folder / f"{record.key.stem}.tmp").write_bytes(b"12345")
    (store.folder / f".{record.key.stem}.json.9.tmp").write_bytes(b"123")
    size = sum(path.stat().st_size for path in store.folder.glob(f"*{record.key.stem}*"))
    assert store.size(record.key.stem) == size
    assert store.size(record.key.stem, finished=False) == 8
    assert store.remove(record.key.stem, finished=False) == 8
    assert store.records()[0] == sorted([record, other], key=lambda each: each.plan.file)
    assert store.remove(record.key.stem) == size - 8
    assert store.records() == ([other], [])
    assert [path for path in store.folder.iterdir() if record.key.stem in path.name] == []
    assert store.remove(record.key.stem) == 0


def test_a_running_build_is_left_alone(bundle: Bundle, store: EngineStore) -> None:
    """Neither taken for one that was left, nor removed."""
    key = key_of(bundle)
    seen: list[Any] = []

    def look() -> None:
        seen.append(EngineStore(bundle).records())
        try:
            EngineStore(bundle).remove(key.stem)
        except OutputError as error:
            seen.append(str(error))

    with store.building(key) as temporary:
        temporary.write_bytes(b"half")
        (store.folder / f"{key.stem}.plan").write_bytes(b"about to get its record")
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(timeout=30)
        assert temporary.exists()
    assert seen == [([], []), f"cannot remove {store.folder / key.stem}: it is being built; try again later"]
    assert [each.file for each in store.records()[1]] == [f"{key.stem}.plan"], "now it is over"


def test_builds_of_one_key_wait_for_each_other(bundle: Bundle) -> None:
    key, inside, most = key_of(bundle), [], []
    start = threading.Barrier(4)

    def build() -> None:
        store = EngineStore(bundle)
        start.wait()
        with store.building(key) as temporary:
            inside.append(temporary)
            most.append(len(inside))
            temporary.write_bytes(b"half")
            inside.pop()

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert most == [1] * 4


def test_builds_of_two_keys_do_not_wait(bundle: Bundle, store: EngineStore) -> None:
    with store.building(key_of(bundle)), store.building(key_of(bundle, "movq_encoder")) as temporary:
        assert not temporary.exists()


# Where nothing can be written


def test_a_store_that_cannot_be_made(bundle: Bundle, store: EngineStore) -> None:
    store.folder.write_bytes(b"a file in the way")
    assert store.records() == ([], [])
    assert store.find(key_of(bundle)) is None
    with pytest.raises(OutputError) as error, store.building(key_of(bundle)):
        pass
    assert str(error.value).startswith(f"cannot write to {store.folder}: ")
    assert str(error.value).endswith("engines are kept in the bundle, so build in a copy of it that can be written to")


def test_a_read_only_store_can_be_read(bundle: Bundle, store: EngineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record = put(store, key_of(bundle))
    (store.folder / f"{key_of(bundle, 'movq_encoder').stem}.tmp").write_bytes(b"")
    store.folder.chmod(0o555)
    try:
        try:
            (store.folder / "probe").write_bytes(b"")
            pytest.skip("this user may write to folders that are read-only")
        except OSError:
            pass
        assert store.records()[0] == [record]
        assert store.read(record) == CONTENT
        with pytest.raises(OutputError, match="Permission denied; engines are kept in the bundle"):
            put(store, key_of(bundle, "decoder_context"))
        with pytest.raises(OutputError, match="cannot remove"):
            store.remove(record.key.stem)
    finally:
        store.folder.chmod(0o755)


def test_a_record_that_cannot_be_written_leaves_no_plan_that_opens(
    bundle: Bundle, store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_record: PlanRecord) -> bytes:
        raise OSError(28, "No space left on device")

    key = key_of(bundle)
    monkeypatch.setattr(store_module, "encode_record", full)
    with pytest.raises(OutputError, match=r"cannot write .*\.json: No space left on device"):
        put(store, key)
    assert store.records() == ([], []), "a plan that nobody opens would only fill the disk"
    monkeypatch.undo()
    record = put(store, key)
    assert store.records() == ([record], [])


def test_free_bytes_of_a_store_that_is_not_there_yet(store: EngineStore) -> None:
    assert not store.folder.exists()
    assert store.free_bytes() > 0
