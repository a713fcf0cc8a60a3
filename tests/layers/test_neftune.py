"""NEFTune: noise of the paper's size on each sample, in training and nowhere else."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlxtune.data.pack import Batch, pack, pad
from mlxtune.data.passes import Layout
from mlxtune.data.render import Sample
from mlxtune.models.enable import enable_packs
from mlxtune.models.heads import split_head
from mlxtune.models.packed import PackedRope
from mlxtune.train.blocks import checkpoint_blocks
from mlxtune.train.heldout import held_out_loss
from mlxtune.train.neftune import add_embedding_noise, noise_sizes
from mlxtune.train.step import LossFunction, TrainStep
from support.compare import distance, loss_of_batch, random_samples, trainable, value_and_gradients
from support.models import tiny, tiny_llama, with_adapters

LAYOUTS = pytest.mark.parametrize("lay_out", [pack, pad])
ALPHA = 5.0
RAGGED = random_samples((40, 12, 31, 19, 50, 22, 14, 61), prefix=9, untrained=10)


def noisy(model: nn.Module, *, recompute: bool = False, dropout: float = 0.0) -> nn.Module:
    enable_packs(model)
    with_adapters(model, dropout=dropout)
    if recompute:
        checkpoint_blocks(model, range(len(model.layers)))
    add_embedding_noise(model, ALPHA)
    return model.train()


def in_order(batch: Batch) -> list[Sample]:
    """The samples as their segments are numbered."""
    return [RAGGED[record - 1] for record in batch.records]


# ------------------------------------------------------------------------ sizes


@LAYOUTS
def test_sizes_go_by_each_samples_own_length(lay_out):
    batch = lay_out(RAGGED)
    got, lengths = noise_sizes(batch), [len(s.tokens) for s in in_order(batch)]
    for number, length in enumerate(lengths, start=1):
        here = batch.segments == number
        assert here.sum() == length - batch.prefix
        assert got[here] == pytest.approx(length**-0.5)
    assert (got[batch.segments < 0] == 0).all()
    shared = got[batch.segments == 0]
    assert len(shared) == batch.prefix == (9 if lay_out is pack else 0)
    if lay_out is pack:
        assert shared == pytest.approx(np.mean([n**-0.5 for n in lengths]))


# ------------------------------------------------------------------------ the noise


class Seen(nn.Module):
    """Stands in for the first block's norm and keeps what it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array) -> mx.array:
        self.__dict__["x"] = x
        return self.inner(x)


ARCHITECTURES = {
    "tied": lambda: tiny_llama(tied=True),
    "untied": lambda: tiny_llama(tied=False),
    "scaled embeddings": lambda: tiny("gemma"),
}


def drawn(model: nn.Module, batch: Batch) -> np.ndarray:
    """The noise of a pass, (rows, width, dims): the first block's input less the clean one."""
    seen = model.layers[0].input_layernorm = Seen(model.layers[0].input_layernorm)
    inputs = []
    for mode in (model.eval, model.train):
        mode()
        mx.eval(loss_of_batch(model, batch))
        inputs.append(np.array(seen.__dict__["x"]))
    return (inputs[1] - inputs[0]).reshape(*batch.tokens.shape, -1)


@LAYOUTS
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_noise_fills_the_bounds_of_the_formula_evenly(kind, lay_out):
    batch = lay_out(RAGGED)
    noise = drawn(noisy(ARCHITECTURES[kind]()), batch)
    assert (np.abs(noise[batch.segments < 0]) < 1e-6).all()
    for number, sample in enumerate(in_order(batch), start=1):
        bound = ALPHA / np.sqrt(len(sample.tokens) * 64)
        own = noise[batch.segments == number]
        assert np.abs(own).max() <= bound * (1 + 1e-4)
        assert np.abs(own).max() > 0.97 * bound
        assert abs(own.mean()) < 5 * bound / np.sqrt(3 * own.size)
        assert own.std() == pytest.approx(bound / np.sqrt(3), rel=0.15)


def test_noise_is_distributed_as_that_of_transformers():
    torch = pytest.importorskip("torch")
    hook = pytest.importorskip("transformers.integrations.neftune").neftune_post_forward_hook
    (sample,) = random_samples((250,))
    got = np.sort(drawn(noisy(tiny_llama()), pad([sample]))[0, :250].reshape(-1))
    module = torch.nn.Embedding(1, 64)
    module.neftune_noise_alpha = ALPHA
    torch.manual_seed(0)
    want = np.sort(hook(module, None, torch.zeros(1, 250, 64)).numpy().reshape(-1))
    # Two draws of 16,000: their quantiles differ by less than 2 % of the bound.
    assert np.abs(got - want).max() < 0.02 * want[-1]


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_that_of_the_noisy_embeddings_through_mlx_lm(tied):
    """The head, tied or not, is the clean one."""
    (sample,) = random_samples((40,))
    model = noisy(tiny_llama(tied=tied))
    batch = pad([sample])
    mx.random.seed(11)
    got = loss_of_batch(model, batch).item()
    mx.random.seed(11)
    tokens = mx.array(sample.tokens[None])
    noise = mx.random.uniform(-1, 1, (1, 40, 64)) * (ALPHA / (40 * 64) ** 0.5)
    model.eval()
    logits = model(tokens, input_embeddings=model.model.embed_tokens(tokens) + noise)[0, :-1]
    want = nn.losses.cross_entropy(
        logits, mx.array(sample.tokens[1:]), mx.array(sample.weights[1:]), reduction="sum"
    ).item()
    assert got == pytest.approx(want, rel=1e-5)
    assert abs(loss_of_batch(model, batch).item() - want) > 1e-3  # there was noise


# ------------------------------------------------------------------------ where there is none


@LAYOUTS
def test_held_out_loss_and_probes_see_no_noise(lay_out):
    model = noisy(tiny_llama())
    packing = lay_out is pack
    clean = tiny_llama()
    enable_packs(clean)
    want = held_out_loss(with_adapters(clean), RAGGED, batch_size=4, layout=Layout(packing))
    before = np.array(mx.random.state[0])
    assert held_out_loss(model, RAGGED, batch_size=4, layout=Layout(packing)) == want
    assert split_head(model) is not None
    for owner in (block.self_attn for block in model.layers):
        assert isinstance(owner.rope, PackedRope)
        owner.rope = owner.rope.inner
    enable_packs(model)
    assert np.array_equal(np.array(mx.random.state[0]), before)
    assert model.training


def test_other_models_and_mlx_lm_are_left_alone():
    other, model = tiny_llama(), tiny_llama()
    add_embedding_noise(model, ALPHA)
    assert type(model.layers[1]) is type(other.layers[0])
    assert isinstance(model.layers[0], type(other.layers[0]))
    assert trainable(model).keys() == trainable(other).keys()
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(tokens), other(tokens)).item()


# ------------------------------------------------------------------------ steps


@LAYOUTS
def test_recomputed_blocks_see_the_same_noise(lay_out):
    batch, results = lay_out(RAGGED), []
    for recompute in (False, True):
        model = noisy(tiny_llama(), recompute=recompute)
        mx.random.seed(7)
        results.append(value_and_gradients(model, lambda m=model: loss_of_batch(m, batch)))
    (want, want_gradients), (got, gradients) = results
    assert got == pytest.approx(want, rel=1e-6)
    for name in want_gradients:
        assert distance(gradients[name], want_gradients[name]) < 1e-5


@LAYOUTS
@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_is_that_of_the_noise_that_was_drawn(lay_out, recompute):
    """With the seed fixed, the loss is a function whose slope can be measured."""
    batch = lay_out(RAGGED)
    model = noisy(tiny_llama(), recompute=recompute, dropout=0.5)
    loss_of = LossFunction(model)
    arrays = loss_of.arrays(batch)

    def loss() -> mx.array:
        mx.random.seed(13)
        return loss_of(arrays, batch.prefix, batch.packed)[0] / loss_of.total(arrays)

    start = trainable(model)
    _, gradients = value_and_gradients(model, loss)
    norm = sum(g.square().sum() for g in gradients.values()).item() ** 0.5

    def at(distance: float) -> float:
        moved = [(n, start[n] + distance / norm * g) for n, g in gradients.items()]
        model.load_weights(moved, strict=False)
        return loss().item()

    assert (at(1e-2) - at(-1e-2)) / 2e-2 == pytest.approx(norm, rel=1e-2)


def losses(seed: int, *, compiled: bool = False, batches: int = 1) -> list[float]:
    """Four steps of rate 0: nothing changes but the noise."""
    model = noisy(tiny_llama())
    step = TrainStep(model, optim.SGD(0.0), max_grad_norm=0, compiled=compiled)
    mx.random.seed(seed)
    return [step([pack(RAGGED)] * batches, 0.0).loss.item() for _ in range(4)]


@pytest.mark.parametrize("batches", [1, 2])
def test_every_step_draws_other_noise_and_the_seed_decides_which(batches):
    first = losses(1, batches=batches)
    assert len(set(first)) == 4
    assert losses(1, batches=batches) == first
    assert not set(losses(2, batches=batches)) & set(first)


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 2])
def test_a_compiled_step_draws_the_same_noise(batches):
    plain = losses(1, batches=batches)
    assert losses(1, compiled=True, batches=batches) == pytest.approx(plain, rel=1e-5)
