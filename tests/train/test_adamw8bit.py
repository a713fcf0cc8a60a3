"""8-bit AdamW: the paper's levels, bitsandbytes' codes and steps, AdamW's result."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxtune.data.pack import pack
from mlxtune.layers.inject import add_lora, projections
from mlxtune.models.enable import enable_packs
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.adamw8bit import DynamicMap, dynamic_levels
from mlxtune.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from mlxtune.train.metrics import Silent
from mlxtune.train.optim import make_optimizer, update
from mlxtune.train.session import fine_tune
from mlxtune.train.step import TrainStep
from support.compare import random_samples, trainable
from support.files import write_jsonl
from support.models import SMOLLM2, tiny_llama
from support.optim import DECAY, RATE, One, adamw

SIGNED = pytest.mark.parametrize("signed", [True, False])


def level_of(byte: int, *, signed: bool) -> float:
    """The value of a byte, read bit by bit as the paper describes the type.

    A sign; zeros that count decades; a one; and the rest a fraction that divides [0.1, 1)
    evenly. Without a sign its bit is one more of the fraction. The two bytes whose
    other seven bits are zero are 0 and 1.
    """
    extra, tree = divmod(byte, 128)
    if tree == 0:
        return float(extra)
    zeros = 7 - tree.bit_length()
    bits = 6 - zeros
    fraction = tree - (1 << bits)
    if not signed:
        bits, fraction = bits + 1, 2 * fraction + extra
    size = (0.1 + 0.9 * (fraction + 0.5) / 2**bits) / 10**zeros
    return -size if signed and extra else size


@SIGNED
def test_the_levels_are_the_bytes_of_the_paper(signed):
    want = sorted(level_of(byte, signed=signed) for byte in range(256))
    assert dynamic_levels(signed=signed) == pytest.approx(want, rel=1e-6)


@SIGNED
def test_the_levels_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    want = functional.create_dynamic_map(signed=signed).numpy()
    np.testing.assert_allclose(dynamic_levels(signed=signed), want, rtol=1e-6)


def values(*, signed: bool, size: int = 256 * 40) -> np.ndarray:
    """Values over eighteen decades, with a block of zeros and a few at a level."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=size) * np.exp(4 * generator.normal(size=size))
    x[:256] = 0
    x[256:512] = dynamic_levels(signed=signed)
    return (x if signed else np.abs(x)).astype(np.float32)


@SIGNED
@pytest.mark.parametrize("size", [256 * 40, 256 * 39 + 1, 700])
def test_every_value_goes_to_the_nearest_level(signed, size):
    x = values(signed=signed)[:size]
    kind, levels = DynamicMap(signed=signed), dynamic_levels(signed=signed).astype(np.float64)
    codes, absmax = kind.quantize(mx.array(x))
    blocks = np.pad(x, (0, -size % 256)).reshape(-1, 256)
    largest = np.abs(blocks).max(axis=1)
    assert np.array_equal(np.array(absmax)[:, 0], largest)
    share = blocks / np.where(largest == 0, 1, largest)[:, None]
    off = np.abs(levels[np.array(codes)] - share)
    best = np.abs(share.astype(np.float64)[..., None] - levels).min(axis=-1)
    assert (off - best).max() < 1e-7
    back = kind.dequantize(codes, absmax, (size,))
    want = (levels[np.array(codes)] * largest[:, None]).reshape(-1)[:size]
    np.testing.assert_allclose(np.array(back), want, rtol=1e-6)


@SIGNED
def test_codes_and_what_comes_back_are_those_of_bitsandbytes(signed):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    x = values(signed=signed)
    table = functional.create_dynamic_map(signed=signed)
    # Its kernel for float32 on a CPU finds levels in a coarser table; with float64 it
    # searches for the nearest, as its GPU kernels do.
    theirs = torch.ops.bitsandbytes.quantize_blockwise(torch.tensor(x[256:]).double(), table, 256)
    kind = DynamicMap(signed=signed)
    codes, absmax = kind.quantize(mx.array(x[256:]))
    assert np.array_equal(np.array(absmax)[:, 0], theirs[1].numpy())
    assert np.array_equal(np.array(codes).reshape(-1), theirs[0].numpy())
    back = torch.ops.bitsandbytes.dequantize_blockwise(*theirs, table, 256, torch.float32)
    np.testing.assert_allclose(
        np.array(kind.dequantize(codes, absmax, (x.size - 256,))), back.numpy(), rtol=1e-6
    )


def test_nothing_but_zero_is_rounded_to_zero_when_that_is_asked():
    kind = DynamicMap(signed=False)
    x = mx.array([0.0, 1e-30, 1e-9, 1.0])
    plain, kept = kind.quantize(x)[0], kind.quantize(x, never_to_zero=True)[0]
    assert plain[0, :4].tolist() == [0, 0, 0, 255]
    assert kept[0, :4].tolist() == [0, 1, 1, 255]


def test_what_is_no_number_stays_within_the_table():
    codes, absmax = DynamicMap(signed=True).quantize(mx.array([1.0, float("nan"), float("inf")]))
    assert codes.shape == (1, 256)
    assert not np.isfinite(np.array(absmax)).all()


# ------------------------------------------------------------------------ steps


def noisy_gradients(steps: int, shape: tuple[int, int] = (64, 128)) -> np.ndarray:
    generator = np.random.default_rng(1)
    mean = 0.5 * generator.normal(size=shape)
    return 1e-3 * (mean + generator.normal(size=(steps, *shape)))


def stepped(name: str, weight: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    model = One(weight.astype(np.float32))
    optimizer = make_optimizer(name, model, weight_decay=DECAY)
    for gradient in gradients:
        optimizer.learning_rate = mx.array(RATE)
        update(optimizer, model, {"weight": mx.array(gradient.astype(np.float32))})
    return np.array(model.weight)


def apart(got: np.ndarray, want: np.ndarray, start: np.ndarray) -> float:
    """How far two ends are from each other, relative to the way from the start."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want - start))


@pytest.mark.parametrize(("steps", "bound"), [(1, 1e-4), (2, 0.01), (30, 0.03)])
def test_steps_are_adamw_but_for_the_rounding(steps, bound):
    weight = np.random.default_rng(0).normal(size=(64, 128))
    gradients = noisy_gradients(steps)
    got, want = stepped("adamw_8bit", weight, gradients), adamw(weight, gradients)
    assert apart(got, want, weight) < bound
    if steps > 1:  # it was rounded
        assert apart(got, want, weight) > 1e-3


def test_steps_are_those_of_bitsandbytes():
    """Nearer to them than either is to AdamW: the rounding is the same, too."""
    torch = pytest.importorskip("torch")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    gradients = noisy_gradients(30).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(weight))
    theirs = bitsandbytes.optim.AdamW8bit([parameter], lr=RATE, weight_decay=DECAY)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        theirs.step()
    want = parameter.detach().numpy()
    got = stepped("adamw_8bit", weight, gradients)
    assert apart(got, want, weight) < 0.2 * apart(want, adamw(weight, gradients), weight)


def test_a_weight_whose_gradient_vanishes_makes_no_leap():
    """Its second moment is 1e-8 of the block's largest, below the first level."""
    weight = np.zeros((64, 128))
    gradients = np.full((6, 64, 128), 1e-2)
    gradients[:, 0, 1] = 1e-6
    gradients[3:, 0, 1] = 0
    got = stepped("adamw_8bit", weight, gradients)
    assert abs(got[0, 1]) < 6 * RATE
    exact = adamw(weight, gradients)
    assert abs(got[0, 1]) <= abs(exact[0, 1])


def adapted(rank: int = 64):
    """A tiny model with adapters of 4,096 weights and more."""
    model = tiny_llama()
    enable_packs(model)
    mx.random.seed(3)
    add_lora(model, projections(model), rank=rank, scale=2.0, dropout=0.1)
    mx.eval(model.parameters())
    return model.train()


def states(optimizer) -> dict[str, mx.array]:
    return dict(tree_flatten(optimizer.state))


BATCH = pack(random_samples((30, 20, 25, 18), prefix=9, untrained=10))


def test_the_state_takes_two_bytes_a_weight():
    model = adapted(rank=128)
    sizes = {}
    for name in ("adamw", "adamw_8bit"):
        optimizer = make_optimizer(name, model, weight_decay=0.0)
        sizes[name] = sum(a.nbytes for a in states(optimizer).values())
    weights = sum(a.size for a in trainable(model).values())
    assert sizes["adamw"] / weights == pytest.approx(8, rel=1e-3)
    assert sizes["adamw_8bit"] / weights == pytest.approx(2 + 2 * 4 / 256, rel=1e-2)


def test_small_parameters_keep_their_moments_in_full():
    arrays = states(make_optimizer("adamw_8bit", adapted(rank=63), weight_decay=0.0))
    small = {n: a for n, a in arrays.items() if "q_proj.lora_a" in n}  # 64 x 63
    assert {a.dtype for a in small.values()} == {mx.float32}
    assert {n.rpartition(".")[2] for n in small} == {"m", "v"}
    large = {n: a for n, a in arrays.items() if "down_proj.lora_a" in n}  # 128 x 63
    assert {n.rpartition(".")[2]: a.dtype for n, a in large.items()} == {
        "m": mx.uint8, "v": mx.uint8, "m_absmax": mx.float32, "v_absmax": mx.float32,
    }  # fmt: skip


def run_steps(model, optimizer, count: int, *, compiled: bool = False) -> list[float]:
    step = TrainStep(model, optimizer, max_grad_norm=1.0, compiled=compiled)
    losses = [step([BATCH], 1e-3).loss.item() for _ in range(count)]
    mx.eval(model.state, optimizer.state)
    return losses


def test_a_checkpoint_goes_on_to_the_last_bit(tmp_path):
    model = adapted()
    optimizer = make_optimizer("adamw_8bit", model, weight_decay=0.01)
    run_steps(model, optimizer, 2)
    path = save_checkpoint(tmp_path, model, optimizer, Progress(step=2), keep=1)
    straight = run_steps(model, optimizer, 3)

    again = adapted()
    other = make_optimizer("adamw_8bit", again, weight_decay=0.01)
    load_checkpoint(path, again, other)
    assert any(a.dtype == mx.uint8 for a in states(other).values())
    assert run_steps(again, other, 3) == straight
    for got, want in ((trainable(again), trainable(model)), (states(other), states(optimizer))):
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].dtype == want[name].dtype, name
            assert mx.array_equal(got[name], want[name]).item(), name


@pytest.mark.slow
def test_a_compiled_step_is_the_plain_step():
    results = []
    for compiled in (False, True):
        model = adapted()
        optimizer = make_optimizer("adamw_8bit", model, weight_decay=0.01)
        mx.random.seed(5)
        results.append(run_steps(model, optimizer, 4, compiled=compiled))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


# ------------------------------------------------------------------------ a real run


@pytest.mark.slow
def test_a_real_fine_tune_tracks_adamw(nl2bash, tmp_path):
    lines = sorted(nl2bash.read_text().splitlines()[:1200], key=len)[:600]
    data = write_jsonl(tmp_path / "pairs.jsonl", map(json.loads, lines))
    ends = {}
    for name in ("adamw", "adamw_8bit"):
        recipe = parse_recipe(
            {
                "name": "t",
                "model": {"path": SMOLLM2, "dequantize": True},
                "lora": {"rank": 16, "layers": 4},
                "data": [{"path": str(data)}],
                "train": {
                    "batch_size": 4,
                    "max_steps": 24,
                    "learning_rate": 2e-3,
                    "optimizer": name,
                },
                "eval": {"val_size": 16, "steps": 24},
            },
            where="test",
        )
        run = fine_tune(recipe, tmp_path / name, Silent())
        ends[name] = [e["held_out_loss"] for e in run.metrics() if "held_out_loss" in e]
    start, end = ends["adamw"]
    assert end < 0.8 * start
    assert ends["adamw_8bit"][-1] == pytest.approx(end, rel=0.01)
    assert ends["adamw_8bit"][-1] != end
