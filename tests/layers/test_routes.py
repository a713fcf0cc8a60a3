"""Packed or expanded: chosen by measurement, remembered, and kept when a run is resumed."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxtune.errors import RecipeError
from mlxtune.layers import routes
from mlxtune.layers.inject import quantize_projections
from mlxtune.layers.quantized import PackedLayer, QuantizedLinear, Route, packing_named
from mlxtune.layers.routes import CACHE, choose_routes, device_key, fix_routes, measure
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.loop import Interrupted
from mlxtune.train.metrics import Silent
from mlxtune.train.session import fine_tune
from support.compare import distance
from support.files import SHELL_TRAIN, write_jsonl
from support.models import QWEN3_MOE, tiny, tiny_llama
from support.runs import StopAt, adapter, losses, same_arrays


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(routes, "busy", lambda: False)
    return tmp_path / "cache" / CACHE


@pytest.fixture
def never_measure(monkeypatch):
    def refuse(*_):
        raise AssertionError("it was measured")

    monkeypatch.setattr(routes, "measure", refuse)


def packed_llama(name: int | str = 4) -> nn.Module:
    model = tiny_llama()
    quantize_projections(model, packing_named(name))
    return model


def packed_layers(model: nn.Module) -> list[PackedLayer]:
    return [m for m in model.modules() if isinstance(m, PackedLayer)]


class FakeDevice:
    """Time that passes as products are computed: results are the seconds that they take.

    Args:
        launch: seconds that each evaluation takes beside them, at most; drawn for each.
        waking: until so many seconds have been worked, all takes three times as long.
    """

    def __init__(self, monkeypatch, *, gpu=False, launch=0.0, waking=0.0, seed=0):
        self.now, self.launch, self.waking = 0.0, launch, waking
        self.random = random.Random(seed)
        self.evaluations = 0
        monkeypatch.setattr(routes, "on_cpu", lambda: not gpu)
        monkeypatch.setattr(routes.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(routes.mx, "eval", self.evaluate)

    def evaluate(self, *trees):
        for results in trees:
            if any(isinstance(result, Result) for result in results):
                self.evaluations += 1
                slow = 3 if self.waking > 0 else 1
                spent = slow * sum(result.seconds for result in results)
                self.waking -= spent
                self.now += spent + self.launch * self.random.random()


@dataclass
class Result:
    seconds: float
    nbytes: int = 1 << 15


def measured(monkeypatch, packed, expanded):
    """Rows from which it expands, forward and backward, with these seconds for so many rows."""

    def product(_sample, rows, _width, _dtype, *, forward, expand):
        if not forward:
            return lambda: Result(1e-5 if expand else 2e-5)
        return lambda: Result((expanded if expand else packed)(rows))

    monkeypatch.setattr(routes, "_product", product)
    return measure(PACKED, mx.float32)


PACKED = QuantizedLinear.from_weight(nn.Linear(64, 32), packing_named(4))


@pytest.mark.parametrize(
    ("packed", "expanded", "want"),
    [
        (lambda n: n, lambda n: 10 + n / 2, 64),  # from 20 rows on, and 16 are tried before
        (lambda n: n, lambda n: 0.5 + n / 2, 4),
        (lambda n: n, lambda n: n / 2, 1),
        (lambda n: n, lambda n: 10 + n, None),
    ],
)
def test_expanding_begins_where_it_is_measured_to_be_faster(monkeypatch, packed, expanded, want):
    FakeDevice(monkeypatch)
    assert measured(monkeypatch, packed, expanded) == (want, 1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("packed", "expanded", "want"),
    [
        (lambda n: 4e-6 + 2e-8 * n, lambda n: 2e-5 + 1e-8 * n, 4096),  # from 2,300 rows on
        (lambda n: 4e-6 + 2e-8 * n, lambda n: 5e-6 + 1e-8 * n, 256),
        (lambda n: 2e-8 * n, lambda n: 1e-8 * n, 16),
        (lambda n: 2e-8 * n, lambda n: 2e-5 + 2e-8 * n, None),
        # No clear win: what nobody has measured stays.
        (lambda n: 2e-8 * n, lambda n: 1.9e-8 * n, None),
    ],
)
def test_a_gpu_is_warm_and_busy_while_it_is_measured(monkeypatch, packed, expanded, want, seed):
    """Launches that take more than a product, and a clock that is slow at first."""
    FakeDevice(monkeypatch, gpu=True, launch=3e-4, waking=0.02, seed=seed)
    assert measured(monkeypatch, packed, expanded) == (want, 16)


def test_a_gpu_on_which_expanding_does_not_pay_is_measured_for_most_rows_alone(monkeypatch):
    device = FakeDevice(monkeypatch, gpu=True)
    monkeypatch.setattr(routes, "_product", lambda *_a, expand, **_k: lambda: Result(1 + expand))
    assert measure(PACKED, mx.float32) == (None, None)
    assert device.evaluations < 20


def test_results_that_are_timed_together_stay_within_bounds(monkeypatch):
    counts = []

    def product(*_arguments, **_options):
        return lambda: Result(1e-7, nbytes=1 << 26)

    def evaluate(results):
        counts.append(len(results))
        device.evaluate(results)

    device = FakeDevice(monkeypatch, gpu=True)
    monkeypatch.setattr(routes, "_product", product)
    monkeypatch.setattr(routes.mx, "eval", lambda tree: evaluate(tree) if tree else None)
    monkeypatch.setattr(routes, "_sample", lambda layer: layer)
    assert measure(PACKED, mx.float32) == (None, None)
    assert max(counts) * (1 << 26) <= 256 << 20


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("name", [4, "mxfp8"])
def test_every_class_of_shapes_is_measured_once_for_a_device(cache, monkeypatch, kind, name):
    model = tiny(kind, **QWEN3_MOE)
    want = model(mx.array([[1, 2, 3]]))
    quantize_projections(model, packing_named(name))
    chosen = choose_routes(model, mx.float32)
    shapes = {layer.shape for layer in packed_layers(model)}
    assert len(chosen) == len(shapes)
    assert json.loads(cache.read_text()) == {device_key(): {k: list(v) for k, v in chosen.items()}}
    assert mx.__version__ in device_key()
    for layer in packed_layers(model):
        assert layer.route is not None
    assert distance(model(mx.array([[1, 2, 3]])), want) < 0.5

    monkeypatch.setattr(routes, "measure", lambda *_: pytest.fail("it was measured"))
    again = tiny(kind, **QWEN3_MOE)
    quantize_projections(again, packing_named(name))
    assert choose_routes(again, mx.float32) == chosen
    for one, other in zip(packed_layers(model), packed_layers(again), strict=True):
        assert one.route == other.route


def test_what_a_run_has_recorded_comes_before_the_cache(never_measure, cache):
    model = packed_llama()
    classes = [f"affine 4/64 {shape} float32" for shape in ("64x64", "32x64", "128x64", "64x128")]
    cache.parent.mkdir()
    cache.write_text(json.dumps({device_key(): {name: [1, 1] for name in classes}}))
    assert set(choose_routes(model, mx.float32).values()) == {(1, 1)}
    recorded = json.loads(json.dumps({name: [None, 7] for name in classes}))
    assert choose_routes(model, mx.float32, recorded) == dict.fromkeys(sorted(classes), (None, 7))
    assert {layer.route for layer in packed_layers(model)} == {Route(None, 7)}


def test_nf4_has_no_choice_and_is_not_measured(never_measure, cache):
    assert choose_routes(packed_llama("nf4"), mx.float32) == {}
    assert not cache.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        '{"DEVICE": 3}',
        '{"DEVICE": {"affine 4/64 64x64 float32": [0, "x"], "y": null}}',
        '{"DEVICE": {"affine 4/64 64x64 float32": [1]}}',
        '{"DEVICE": {"affine 4/64 64x64 float32": [true, 4]}}',
    ],
)
def test_a_damaged_cache_is_measured_anew_and_mended(cache, text, monkeypatch):
    cache.parent.mkdir()
    cache.write_text(text.replace("DEVICE", device_key()))
    monkeypatch.setattr(routes, "measure", lambda *_: (3, None))
    chosen = choose_routes(packed_llama(), mx.float32)
    assert set(chosen.values()) == {(3, None)}
    assert json.loads(cache.read_text())[device_key()].keys() >= chosen.keys()


def test_figures_of_another_device_are_kept_and_not_used(cache, monkeypatch):
    cache.parent.mkdir()
    other = {"some GPU, mlx 0.1": {"affine 4/64 64x64 float32": [9, 9]}}
    cache.write_text(json.dumps(other))
    monkeypatch.setattr(routes, "measure", lambda *_: (3, None))
    choose_routes(packed_llama(), mx.float32)
    written = json.loads(cache.read_text())
    assert written.items() > other.items()
    assert written[device_key()]["affine 4/64 64x64 float32"] == [3, None]


def test_a_cache_folder_that_takes_no_files_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(routes, "measure", lambda *_: (3, None))
    assert set(choose_routes(packed_llama(), mx.float32).values()) == {(3, None)}


def test_measuring_ends_after_a_while_and_the_rest_is_not_remembered(cache, monkeypatch):
    monkeypatch.setattr(routes, "measure", lambda *_: (3, None))
    clock = iter(range(100))
    monkeypatch.setattr(routes.time, "perf_counter", lambda: next(clock))
    chosen = choose_routes(packed_llama(), mx.float32)
    prior = Route.prior()
    assert list(chosen.values()) == [(3, None)] + [(prior.forward, prior.backward)] * 3
    assert list(json.loads(cache.read_text())[device_key()]) == list(chosen)[:1]


@pytest.mark.parametrize("load", [0.5, 100.0])
def test_figures_of_a_busy_machine_are_not_remembered(cache, monkeypatch, load):
    monkeypatch.undo()
    monkeypatch.setenv("MLXTUNE_CACHE", str(cache.parent))
    monkeypatch.setattr(routes, "measure", lambda *_: (3, None))
    monkeypatch.setattr(routes.os, "getloadavg", lambda: (load * (os.cpu_count() or 1), 0, 0))
    assert set(choose_routes(packed_llama(), mx.float32).values()) == {(3, None)}
    assert cache.exists() is (load < 1)


def test_fixed_routes_go_one_way_whatever_the_rows():
    model = packed_llama()
    for expand in (True, False):
        fix_routes(model, expand)
        for layer in packed_layers(model):
            assert layer.expands(0, forward=True) is expand
            assert layer.expands(10**6, forward=False) is expand


# ------------------------------------------------------------------------ in a run


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    lines = SHELL_TRAIN.read_text().splitlines()[::40]
    data = write_jsonl(tmp_path / "few.jsonl", map(json.loads, lines))

    def make(**model):
        values = {
            "name": "t",
            "model": {"path": str(tiny_folder), "quantize": 4} | model,
            "lora": {"rank": 4},
            "data": [{"path": str(data)}],
            "train": {"batch_size": 4, "max_steps": 4, "learning_rate": 1e-2},
            "checkpoint": {"steps": 1},
            "log": {"steps": 1},
        }
        return parse_recipe(values, where="test")

    return make


def test_the_recipe_fixes_the_route_and_the_run_records_what_was_chosen(
    recipe, tmp_path, monkeypatch, cache
):
    runs = {}
    for way in ("packed", "expand"):
        runs[way] = fine_tune(recipe(quantized_matmul=way), tmp_path / way, Silent())
        assert runs[way].status()["quantized_matmul"] == {}
        assert not cache.exists()
    # The two round differently, or choosing would not matter for resuming.
    assert losses(runs["packed"]) == pytest.approx(losses(runs["expand"]), rel=1e-4)
    assert not same_arrays(adapter(runs["packed"]), adapter(runs["expand"]))
    for route, way in [((None, None), "packed"), ((1, 1), "expand")]:
        cache.unlink(missing_ok=True)
        monkeypatch.setattr(routes, "measure", lambda *_, route=route: route)
        auto = fine_tune(recipe(), tmp_path / f"auto-{way}", Silent())
        assert {tuple(r) for r in auto.status()["quantized_matmul"].values()} == {route}
        assert same_arrays(adapter(auto), adapter(runs[way]))


def test_a_resumed_run_goes_the_way_it_went_whatever_is_measured_now(
    recipe, tmp_path, monkeypatch, cache
):
    monkeypatch.setattr(routes, "measure", lambda *_: (None, 1))
    straight = fine_tune(recipe(), tmp_path / "straight", Silent())
    with pytest.raises(Interrupted):
        fine_tune(recipe(), tmp_path / "stopped", StopAt(2))
    cache.unlink()
    monkeypatch.setattr(routes, "measure", lambda *_: (1, None))
    other = fine_tune(recipe(), tmp_path / "other", Silent())
    resumed = fine_tune(recipe(), tmp_path / "stopped", Silent(), resume=True)
    assert losses(resumed) == losses(straight)
    assert same_arrays(adapter(resumed), adapter(straight))
    assert not same_arrays(adapter(other), adapter(straight))
    assert resumed.status()["quantized_matmul"] == straight.status()["quantized_matmul"]


@pytest.mark.parametrize("name", ["nf4", "mxfp4", "mxfp8", "nvfp4"])
def test_each_packing_trains(recipe, tmp_path, name):
    run = fine_tune(recipe(quantize=name), tmp_path / name, Silent())
    assert losses(run)[-1] < losses(run)[0]


def test_double_quantization_has_an_effect(recipe, tmp_path):
    runs = [
        fine_tune(recipe(quantize="nf4", double_quantization=d), tmp_path / str(d), Silent())
        for d in (True, False)
    ]
    assert not same_arrays(*map(adapter, runs))
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": 4, "double_quantization": False}, "goes with quantize"),
        ({"quantize": "nf4", "quantized_matmul": "packed"}, "no packed nf4"),
        ({"quantize": "fp4"}, "quantize"),
        ({"quantized_matmul": "never"}, "quantized_matmul"),
    ],
)
def test_settings_that_cannot_be_are_refused(recipe, settings, message):
    with pytest.raises(RecipeError) as caught:
        recipe(**settings)
    (problem,) = caught.value.problems
    assert message in str(problem)
