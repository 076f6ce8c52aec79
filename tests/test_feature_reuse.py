"""Feature reuse: the two graphs, the loop that runs them, and diffusers with its UNet cut at the same place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kandrt.engines import memory
from kandrt.engines.bundle import Bundle, open_bundle
from kandrt.engines.errors import BackendError, InputError
from kandrt.engines.manifest import FeatureReuse
from kandrt.engines.profiles import Coverage, component_profiles
from kandrt.export.costs import graph_costs
from kandrt.export.exporter import export_bundle
from kandrt.export.modules.unet import UNet
from kandrt.runtime import Batch, Kandinsky, load
from kandrt.runtime.components import Components
from kandrt.runtime.decoder import Decoder
from kandrt.runtime.plan import checked_reuse
from kandrt.runtime.reuse import ReusedFeatures
from kandrt.runtime.sampling import StepInputs

from .conftest import once
from .oracle import Oracle, SeededNoise, box, compare_pictures, picture, spied
from .test_networks import NEAR, SAME, UNETS, conditions, distance, unet_inputs, unet_pair, unet_reference

UNETS["1 level"] = (
    "decoder",
    {
        "block_out_channels": [48],
        "layers_per_block": 2,
        "down_block_types": ["SimpleCrossAttnDownBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D"],
    },
)
SIZE: dict[str, Any] = {"height": 64, "width": 128}
PAIR = FeatureReuse("decoder_refresh", "decoder_shallow")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def reuse_bundle(shared: Path, checkpoints: dict[str, Path]) -> Path:
    """One fp32 bundle of the prior and two decoders with the graphs for reuse, exported with checks."""
    sources = [checkpoints[role] for role in ("prior", "decoder", "inpaint")]
    return once(shared / "reuse-bundle", lambda path: export_bundle(sources, path, feature_reuse=True))


@pytest.fixture(scope="module")
def k(reuse_bundle: Path) -> Iterator[Kandinsky]:
    with load(reuse_bundle, threads=1) as k:
        yield k


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle(checkpoints)


@contextmanager
def reusing(unet: nn.Module, refreshes: Callable[[int], bool]) -> Iterator[None]:
    """Give diffusers' last up block what it got at the last call that `refreshes`, by the number of the call."""
    kept: dict[str, Tensor] = {}
    calls = iter(range(1000))

    def swap(_: nn.Module, __: Any, named: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        if refreshes(next(calls)):
            kept["features"] = named["hidden_states"]
        return (), {**named, "hidden_states": kept["features"]}

    last: Any = unet.up_blocks[-1]  # type: ignore[index]
    handle = last.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# The network


def split(network: UNet, timesteps: list[int], inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The embeddings of the timesteps, the features of the first one, and what else the step takes."""
    context = network.context(timesteps=torch.tensor(timesteps, dtype=torch.float32), **conditions(inputs))
    concat = context[2] if "hint" in inputs else inputs.get("concat_latents")
    rest = {"sample": inputs["sample"], "added_kv": context[1], "concat_latents": concat}
    prediction, features = network.refresh(embedding=context[0][0], **rest)
    assert torch.equal(prediction, network.step(embedding=context[0][0], **rest))
    return context[0], features, rest


@pytest.mark.parametrize("name", UNETS)
def test_shallow_is_diffusers_cut_before_its_last_up_block(name: str) -> None:
    network, other = unet_pair(name)
    inputs, timesteps = unet_inputs(network, 2, 8, 24), [800, 437]
    embedding, features, rest = split(network, timesteps, inputs)
    assert features.shape == (2, network.config.feature_channels, 8, 24)
    assert features.dtype == torch.float32
    outer = rest if network.config.outer_attention else {**rest, "added_kv": None}
    found = network.shallow(embedding=embedding[1], features=features, **outer)
    with reusing(other, lambda call: call == 0):
        wanted = [unet_reference(other, timestep, inputs) for timestep in timesteps][1]
    assert distance(found, wanted) < SAME
    # Features of another step do change the prediction, so what is compared is not the whole network.
    assert distance(found, unet_reference(other, timesteps[1], inputs)) > 1e-2


@pytest.mark.parametrize("dtype", NEAR)
def test_features_are_in_fp32_at_any_precision(dtype: torch.dtype) -> None:
    network, _ = unet_pair("text-to-image")
    inputs = unet_inputs(network, 2, 8, 8)
    embedding, features, rest = split(network, [800, 437], inputs)
    wanted = network.shallow(embedding=embedding[1], features=features, **rest)
    network.set_precision(dtype)
    reduced, found = split(network, [800, 437], inputs)[:2]
    assert found.dtype == torch.float32
    assert distance(found, features) < NEAR[dtype]
    assert distance(network.shallow(embedding=reduced[1], features=found, **rest), wanted) < NEAR[dtype]


# The export


def test_bundle_has_the_pair_beside_what_it_has_without(reuse_bundle: Path, bundle: Path) -> None:
    ours, plain = open_bundle(reuse_bundle).manifest, open_bundle(bundle).manifest
    names = {f"{role}_{graph}" for role in ("decoder", "inpaint") for graph in ("refresh", "shallow")}
    assert ours.components.keys() - plain.components.keys() == names
    assert {role: record.reuse for role, record in ours.decoders.items()} == {
        role: FeatureReuse(f"{role}_refresh", f"{role}_shallow") for role in ("decoder", "inpaint")
    }
    assert all(record.reuse is None for record in plain.decoders.values())
    same = [name for name in plain.components if not name.startswith("controlnet")]
    assert all(ours.components[name] == plain.components[name] for name in same)  # their hashes too
    assert ours.weights.items() <= plain.weights.items()  # no weight is stored a second time


@pytest.mark.parametrize("role", ["decoder", "inpaint"])
def test_graphs_take_and_give_what_the_step_does(reuse_bundle: Path, role: str) -> None:
    opened = open_bundle(reuse_bundle)
    step, refresh, shallow = (opened.manifest.components[f"{role}_{name}"] for name in ("step", "refresh", "shallow"))
    features = refresh.outputs[1]
    assert (refresh.inputs, refresh.outputs[0]) == (step.inputs, step.outputs[0])
    assert shallow.outputs == step.outputs
    assert set(shallow.inputs) == {spec for spec in step.inputs if spec.name != "added_kv"} | {features}
    assert refresh.parameters == step.parameters
    assert shallow.parameters < step.parameters / 2
    for component in (refresh, shallow):
        assert component.error is not None
        assert component.error.relative < 1e-5  # two libraries that sum in another order, as SAME
    axes = {"batch": 2, "height": 8, "width": 16}
    flops = [graph_costs(opened.path(each.graph), axes).flops for each in (step, refresh, shallow)]
    assert flops[0] == flops[1] > 2 * flops[2] > 0


@pytest.mark.parametrize(
    ("role", "message"),
    [("prior", "it is for decoders, and there is none in"), ("decoder-3", "Kandinsky 2.1 and 2.2.*Kandinsky3UNet")],
)
def test_export_says_where_it_is_not_there(
    checkpoints: dict[str, Path], tmp_path: Path, role: str, message: str
) -> None:
    with pytest.raises(InputError, match=f"feature_reuse: .*{message}.*leave it out"):
        export_bundle([checkpoints[role]], tmp_path / "bundle", feature_reuse=True)
    assert not list(tmp_path.iterdir())


def test_engines_take_the_shapes_of_the_step(reuse_bundle: Path) -> None:
    manifest = open_bundle(reuse_bundle).manifest
    for coverage in (Coverage((64, 64, 128)), Coverage((64, 128, 256), (1, 2, 4), static=True)):
        step, refresh, shallow = (
            component_profiles(manifest, f"decoder_{name}", [coverage]) for name in ("step", "refresh", "shallow")
        )
        assert step == refresh == shallow


# Requests


TEXT, IMAGE, INPAINT = "KandinskyV22Pipeline", "KandinskyV22Img2ImgPipeline", "KandinskyV22InpaintPipeline"
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "every second": (TEXT, 2, 1, {"steps": 5}),
    "every third, a batch": (TEXT, 3, 2, {"steps": 7}),
    "no guidance": (TEXT, 2, 2, {"steps": 4, "guidance_scale": 1.0}),
    "the first alone": (TEXT, 9, 1, {"steps": 3}),
    "from a picture": (IMAGE, 2, 1, {"steps": 6, "strength": 0.7, "image": picture(64, 64)}),
    "inpainting": (INPAINT, 2, 1, {"steps": 5, "image": picture(64, 128), "mask": box(64, 128, 0.2, 0.3, 0.8, 0.9)}),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_diffusers_cut_by_hooks(k: Kandinsky, oracle: Oracle, case: str) -> None:
    name, interval, batch, given = CASES[case]
    embeds, arguments = oracle.embeds(*"ab"[:batch]), {**SIZE, **given}
    arguments |= {"width": 64} if name == IMAGE else {}
    theirs, ours = SeededNoise(), SeededNoise()
    with reusing(oracle.pipeline(name).unet, lambda call: call % interval == 0):
        expected = oracle(name, theirs, embeds=embeds, **arguments)
    found = k.decoder(embeds, **arguments, reuse_interval=interval, noise=ours).array
    compare_pictures(found, expected)
    assert ours.shapes == theirs.shapes
    whole = k.decoder(embeds, **arguments, noise=SeededNoise()).array
    assert np.abs(found - whole).max() > 1e-2


def test_whole_steps_alone_are_those_of_the_step_graph(reuse_bundle: Path, oracle: Oracle) -> None:
    parts = Components(open_bundle(reuse_bundle), threads=1)
    decoder = Decoder(parts)
    work = decoder.prepare(oracle.embeds("a"), **SIZE, steps=4, seed=3)
    through = decoder.run(replace(work, plan=replace(work.plan, reuse=PAIR, reuse_interval=1)))
    step = decoder.run(decoder.prepare(oracle.embeds("a"), **SIZE, steps=4, seed=3))
    # The same sums in the same order, but for what an engine fuses around one output more.
    assert np.abs(through.array - step.array).max() <= 1e-6
    assert "decoder_shallow" not in parts.opened
    parts.close()


def test_an_interval_of_one_is_the_step_graph_itself(k: Kandinsky, oracle: Oracle, reuse_bundle: Path) -> None:
    expected = k.decoder(oracle.embeds("a"), **SIZE, steps=2, seed=3)
    with load(reuse_bundle, threads=1) as fresh:
        found = fresh.decoder(oracle.embeds("a"), **SIZE, steps=2, seed=3, reuse_interval=1)
        assert np.array_equal(found.array, expected.array)
        assert set(fresh.opened) == {"decoder_context", "decoder_step", "movq_decoder"}


def test_components_that_a_request_does_not_need_stay_closed(reuse_bundle: Path) -> None:
    with load(reuse_bundle, threads=1) as k:
        k("a robot", **SIZE, steps=2, prior_steps=1, reuse_interval=2, seed=1)
        assert [name for name in k.opened if name.startswith(("decoder_", "inpaint_"))] == [
            "decoder_context", "decoder_refresh", "decoder_shallow",
        ]  # fmt: skip
    with load(reuse_bundle, threads=1, memory="stage") as k:
        k("a robot", **SIZE, steps=2, prior_steps=1, reuse_interval=2, seed=1)
        assert k.opened == ()


REFRESH, SHALLOW = "decoder_refresh", "decoder_shallow"
ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, int]]]] = {
    "guidance": ({}, [(REFRESH, 4), (SHALLOW, 4), (SHALLOW, 4)] * 2),
    "guidance ends": (
        {"guidance_interval": (0, 0.3)},
        [(REFRESH, 4), (SHALLOW, 4), (SHALLOW, 2), (REFRESH, 2), (SHALLOW, 2), (SHALLOW, 2)],
    ),
    "guidance begins": (
        {"guidance_interval": (0.3, 1)},
        [(REFRESH, 2), (SHALLOW, 2), (REFRESH, 4), (SHALLOW, 4), (SHALLOW, 4), (REFRESH, 4)],
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_features_of_rows_that_stay_are_kept(reuse_bundle: Path, oracle: Oracle, case: str) -> None:
    given, expected = ROWS[case]
    order: list[tuple[str, int]] = []
    k, spies = spied(reuse_bundle, REFRESH, SHALLOW)
    outputs: list[NDArray[np.float32]] = []

    def watched(name: str) -> Callable[..., dict[str, Any]]:
        inner = spies[name].session
        assert inner is not None

        def call(**arrays: Any) -> dict[str, Any]:
            order.append((name, len(arrays["sample"])))
            out = inner(**arrays)
            if name == REFRESH:
                outputs.append(out["features"])
            else:
                assert np.array_equal(arrays["features"], outputs[-1][-len(arrays["sample"]) :])
            return out

        return call

    for name, spy in spies.items():
        spy.session = watched(name)  # type: ignore[assignment]
    with k:
        k.decoder(oracle.embeds("a", "b"), **SIZE, steps=6, reuse_interval=3, seed=0, **given)
    assert order == expected


@pytest.mark.parametrize("seed", range(20))
def test_features_are_never_older_than_the_interval(seed: int) -> None:
    """Any sequence of rows: the features that `shallow` gets are of these rows, and of a step of the interval."""
    rng = np.random.default_rng(seed)
    interval, made = int(rng.integers(1, 5)), list[int]()

    def run(name: str, **arrays: Any) -> dict[str, Any]:
        step, rows = int(arrays["embedding"][0, 0]), len(arrays["sample"])
        if name == "refresh":
            made.append(step)
            numbers = 100 * step + np.arange(2 - rows, 2, dtype=np.float32)  # the positive row is the last one
            return {"prediction": arrays["sample"], "features": numbers[:, None]}
        assert list(arrays["features"][:, 0]) == [100 * made[-1] + row for row in range(2 - rows, 2)]
        assert 0 < step - made[-1] < interval
        return {"prediction": arrays["sample"]}

    specs = [SimpleNamespace(name=name) for name in ("sample", "embedding", "features")]
    manifest = SimpleNamespace(components={"shallow": SimpleNamespace(inputs=specs)})
    parts: Any = SimpleNamespace(run=run, bundle=SimpleNamespace(manifest=manifest))
    reused = ReusedFeatures(parts, FeatureReuse("refresh", "shallow"), interval)
    for i, guided in enumerate(rng.integers(0, 2, 12).astype(bool).tolist()):
        rows = 2 if guided else 1
        embedding = np.full((rows, 1), i, np.float32)
        assert reused.predict(StepInputs(i, np.zeros((1, 4)), guided, embedding, {"other": embedding})).shape == (
            rows,
            4,
        )
    assert made[0] == 0


def test_a_request_in_a_batch_keeps_its_own_features(k: Kandinsky, oracle: Oracle) -> None:
    given: list[dict[str, Any]] = [
        {"steps": 5, "reuse_interval": 2},
        {"steps": 4},
        {"steps": 6, "reuse_interval": 3},
    ]
    alone = [k.decoder(oracle.embeds("a"), **SIZE, seed=5, **each).array for each in given]
    batch = Batch(k)
    tickets = [batch.submit(oracle.embeds("a"), **SIZE, seed=5, **each) for each in given]
    for ticket, expected in zip(tickets, alone, strict=True):
        assert np.abs(ticket.result().array - expected).max() <= 1e-5  # engines sum in another order for more rows


# What is refused


@pytest.mark.parametrize("interval", [0, -1, 1.5, True, "2", None])
def test_an_interval_is_a_whole_number(k: Kandinsky, oracle: Oracle, interval: Any) -> None:
    with pytest.raises(InputError, match="reuse_interval: expected a whole number of 1 or more, found"):
        k.decoder(oracle.embeds("a"), reuse_interval=interval)


def test_a_bundle_without_the_pair_says_how_to_export_it(reuse_bundle: Path) -> None:
    opened = open_bundle(reuse_bundle)
    record = replace(opened.manifest.decoders["decoder"], reuse=None)
    with pytest.raises(InputError, match=r"decoder.*kandrt export \S*checkpoint-prior .* --feature-reuse -o BUNDLE"):
        checked_reuse(2, opened, "decoder", record)
    assert checked_reuse(1, opened, "decoder", record) is None
    other = Bundle(opened.folder, replace(opened.manifest, family="kandinsky-3"))
    with pytest.raises(InputError, match="Kandinsky 3 has no graphs for it; leave it out"):
        checked_reuse(2, other, "decoder", record)


def test_memory_counts_the_pair_and_not_the_step(
    reuse_bundle: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = open_bundle(reuse_bundle).manifest
    pair = memory.weights_memory(manifest, [REFRESH, SHALLOW])
    rest = memory.weights_memory(manifest, ["decoder_context", "movq_decoder"])
    arguments: dict[str, Any] = {"embeds": oracle.embeds("a"), **SIZE, "steps": 1, "reuse_interval": 2, "seed": 0}
    # closed after its stage, the pair is still open at once
    for mode, enough, message in (("keep", pair + rest, "together"), ("stage", pair, f"{REFRESH} and {SHALLOW}: ")):
        with load(reuse_bundle, memory=mode, threads=1) as k:  # type: ignore[arg-type]
            with monkeypatch.context() as patch:
                patch.setattr(memory, "machine_memory", lambda enough=enough: enough - 1)
                with pytest.raises(BackendError, match=message):
                    k.decoder(**arguments)
            monkeypatch.setattr(memory, "machine_memory", lambda enough=enough: enough)
            k.decoder(**arguments)
