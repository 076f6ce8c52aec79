"""Keys and records of plans: what makes two keys differ, and what is not taken for a record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from kandrt.engines.bundle import Bundle
from kandrt.engines.errors import BundleError
from kandrt.engines.manifest import FileRecord
from kandrt.engines.plans import (
    RECORD_VERSION,
    Flag,
    PlanFigures,
    PlanKey,
    PlanRecord,
    PlanSettings,
    decode_record,
    differences,
    encode_record,
    plan_key,
    shown,
)
from kandrt.engines.profiles import USUAL_SIZE, Coverage, Profile, component_profiles

from .toy_bundle import change_component, export_again, make_toy_bundle, train_again

HASH = "0123456789abcdef" * 4
KEY = PlanKey(
    component="decoder_step",
    builder="tensorrt-rtx",
    library="1.7.1.116",
    revision=1,
    graph=HASH,
    weights={"decoder": HASH, "movq": HASH},
    precision="fp16",
    compute_capabilities=("sm86", "sm89"),
    profiles=(
        Profile({"batch": (1, 2, 8), "height": (64, 96, 128)}),
        Profile({"batch": (1, 1, 1), "height": (8, 8, 8)}),
    ),
    settings=PlanSettings(("WEIGHT_STREAMING",), 2**30, 3),
)
# Part -> another value of it
OTHERS: dict[str, Any] = {
    "component": "prior_step",
    "builder": "tensorrt",
    "library": "1.7.1.117",
    "revision": 2,
    "graph": HASH[::-1],
    "weights": {"decoder": HASH, "movq": HASH[::-1]},
    "precision": "bf16",
    "compute_capabilities": ("sm89",),
    "profiles": KEY.profiles[:1],
    "settings": PlanSettings(),
}
RECORD = PlanRecord(
    RECORD_VERSION,
    KEY,
    FileRecord(KEY.stem + ".plan", 123, HASH),
    PlanFigures(2560, 4.5, 1.0, 572_000_000, 9_033_088, 165_712_896, None),
    ("a line", "another, with “quotes” and\ttabs"),
)


def made(key: PlanKey, **changes: Any) -> PlanKey:
    return replace(key, **changes)


# Keys


def test_every_part_of_a_key_counts() -> None:
    assert set(OTHERS) == {part.name for part in fields(PlanKey)}
    keys = [KEY, *(made(KEY, **{part: other}) for part, other in OTHERS.items())]
    assert len({key.digest for key in keys}) == len(keys)
    assert len({key.stem for key in keys}) == len(keys)


@pytest.mark.parametrize(
    "settings",
    [
        PlanSettings(),
        PlanSettings(("WEIGHT_STREAMING",), 2**30),
        PlanSettings(("WEIGHT_STREAMING",), 2**30, 4),
        PlanSettings(("WEIGHT_STREAMING",), 2**31, 3),
        PlanSettings((), 2**30, 3),
        PlanSettings(("REFIT_IDENTICAL", "STRIP_PLAN"), 2**30, 3),
    ],
)
def test_every_setting_counts(settings: PlanSettings) -> None:
    assert made(KEY, settings=settings).digest != KEY.digest


@pytest.mark.parametrize("i", [0, 1, 2])
@pytest.mark.parametrize("axis", ["batch", "height"])
def test_every_length_of_every_axis_counts(axis: str, i: int) -> None:
    lengths = list(KEY.profiles[0].axes[axis])
    lengths[i] += 1
    changed = Profile({**KEY.profiles[0].axes, axis: tuple(lengths)})  # type: ignore[dict-item]
    assert made(KEY, profiles=(changed, KEY.profiles[1])).digest != KEY.digest


def test_a_key_is_the_same_whatever_the_order_of_its_mappings() -> None:
    other = made(
        KEY,
        weights=dict(reversed(KEY.weights.items())),
        profiles=tuple(Profile(dict(reversed(each.axes.items()))) for each in KEY.profiles),
    )
    assert list(other.weights) != list(KEY.weights)
    assert other == KEY
    assert other.digest == KEY.digest


def test_a_digest_lasts() -> None:
    """A plan is found again by another process, and by a later version of kandrt unless its revision changed."""
    # by hand: fields and mappings by name, no spaces
    text = json.dumps(msgspec.to_builtins(KEY), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == KEY.digest
    assert KEY.stem == f"decoder_step-{KEY.digest[:16]}"


def test_gpus_are_a_set(toy: Bundle) -> None:
    names = ("sm120", "sm86", "sm89", "sm86")
    assert key_of(toy, "decoder_step", names).compute_capabilities == ("sm86", "sm89", "sm120")
    assert key_of(toy, "decoder_step", names) == key_of(toy, "decoder_step", names[:3])


def test_a_key_is_that_of_the_bundle_as_it_is(tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle")
    names = list(bundle.manifest.components)

    def keys() -> dict[str, PlanKey]:
        return {name: key_of(bundle, name) for name in names}

    def changed() -> dict[str, list[str]]:
        now, then = keys(), before
        return {name: differences(then[name], now[name]) for name in names if now[name] != then[name]}

    before = keys()
    bundle = export_again(bundle, "decoder_step", note="another")
    assert list(changed()) == ["decoder_step"]
    assert changed()["decoder_step"][0].startswith(f"graph hash: {before['decoder_step'].graph[:12]}…, now ")
    before = keys()
    bundle = train_again(bundle, "movq")
    assert list(changed()) == ["movq_encoder", "movq_decoder"]
    assert [len(parts) for parts in changed().values()] == [1, 1]
    assert changed()["movq_decoder"][0].startswith("weights hash: movq ")
    before = keys()
    bundle = change_component(bundle, "decoder_context", precision="fp32")
    assert changed() == {"decoder_context": ["precision: fp16, now fp32"]}


def test_differences_name_every_part() -> None:
    assert differences(KEY, KEY) == []
    found = differences(KEY, made(KEY, **OTHERS))
    assert [text.partition(":")[0] for text in found] == [
        "component", "builder", "builder version", "builder revision of kandrt", "graph hash", "weights hash",
        "precision", "GPUs", "profiles", "settings",
    ]  # fmt: skip
    assert found[-3:] == [
        "GPUs: sm86; sm89, now sm89",
        "profiles: batch 1:2:8, height 64:96:128; batch 1, height 8, now batch 1:2:8, height 64:96:128",
        f"settings: WEIGHT_STREAMING, workspace {2**30} bytes, optimization level 3, now defaults",
    ]
    assert all("…" in text for text in found if "hash" in text), "no one reads 64 digits"


def test_nothing_is_shown_as_nothing() -> None:
    assert shown(()) == "none"
    assert shown(PlanSettings()) == "defaults"


# Records


def test_a_record_is_read_as_it_was_written() -> None:
    data = encode_record(RECORD)
    assert data.endswith(b"}\n")
    assert decode_record(data, "r.json") == RECORD
    assert decode_record(data, "r.json").key.digest == KEY.digest
    bare = replace(RECORD, figures=PlanFigures(1, 0.1, 0.0, None), log=(), key=made(KEY, profiles=(), weights={}))
    assert decode_record(encode_record(bare), "") == bare
    for flags in [(), get_args(Flag)]:
        each = replace(RECORD, key=made(KEY, settings=PlanSettings(flags)))
        assert decode_record(encode_record(each), "") == each


def change(*path: str | int, to: Any) -> Callable[[Any], None]:
    """Set what lies at a path of a record."""

    def edit(record: Any) -> None:
        for part in path[:-1]:
            record = record[part]
        record[path[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (change("record_version", to=2), "expected record_version 1, found 2"),
        (change("record_version", to="1"), "expected record_version 1, found '1'"),
        (lambda record: record.pop("record_version"), "expected record_version 1, found None"),
        (lambda record: record.pop("key"), "missing required field `key`"),
        (change("key", "graph", to="12"), "key.graph"),
        (change("key", "weights", "decoder", to=HASH.upper()), "key.weights"),
        (change("key", "precision", to="int8"), "key.precision"),
        (change("key", "builder", to="tvm"), "key.builder"),
        (change("key", "settings", "flags", 0, to="FP16"), "key.settings.flags[0]"),
        (change("key", "settings", "optimization_level", to=6), "key.settings.optimization_level"),
        (change("key", "settings", "workspace_bytes", to=0), "key.settings.workspace_bytes"),
        (change("key", "profiles", 0, "axes", "batch", to=[1, 2]), "key.profiles[0]"),
        (change("key", "compute_capabilities", 0, to="ada"), "key.compute_capabilities[0]"),
        (change("key", "compute_capabilities", 0, to="sm\n89"), "key.compute_capabilities[0]"),
        (change("plan", "size", to=-1), "plan.size"),
        (change("plan", "sha256", to=None), "plan.sha256"),
        (change("figures", "layers", to="many"), "figures.layers"),
        (change("log", to="text"), "log"),
    ],
)
def test_what_is_no_record(edit: Callable[[Any], None], problem: str) -> None:
    content = json.loads(encode_record(RECORD))
    edit(content)
    with pytest.raises(BundleError) as error:
        decode_record(json.dumps(content).encode(), "store/r.json")
    assert str(error.value).startswith("store/r.json")
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"1", b"\xff", encode_record(RECORD)[:-20], b"[" * 100_000, b'{"record_version": 1}'],
    ids=["empty", "open", "list", "null", "number", "no text", "cut", "deep", "bare"],
)
def test_what_is_no_json_of_a_record(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"^r\.json is damaged: "):
        decode_record(data, "r.json")


# What the tests above share


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


def key_of(bundle: Bundle, name: str, gpus: tuple[str, ...] = ("sm89",)) -> PlanKey:
    return plan_key(
        bundle,
        name,
        builder="tensorrt-rtx",
        library="1.7.1",
        compute_capabilities=gpus,
        profiles=component_profiles(bundle.manifest, name, [Coverage(USUAL_SIZE)]),
        settings=PlanSettings(),
    )
