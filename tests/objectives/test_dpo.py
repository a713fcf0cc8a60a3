"""DPO: its losses are TRL's, on any layout, and a run of it goes on as it would have."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch

from mlxtune.data.pack import filled_up, pack, pad
from mlxtune.data.passes import Layout, passes
from mlxtune.losses.preference import Pairs
from mlxtune.models.enable import enable_packs
from mlxtune.objectives import DPO, base
from mlxtune.recipe.objectives import DpoSection
from mlxtune.train.heldout import held_out_figures
from mlxtune.train.step import LossFunction, TrainStep
from support.compare import distance, random_groups, trainable, value_and_gradients
from support.models import tiny_llama, with_adapters

TYPES = ("sigmoid", "sigmoid_norm", "ipo", "hinge", "apo_zero")
GROUPS = random_groups((40, 33, 52, 28), prefix=18)

# ------------------------------------------------------------------------ the functions


def trl_loss(kind: str, logps: torch.Tensor, mask: torch.Tensor, reference: torch.Tensor):
    """TRL's own, of log-probabilities (2 * pairs, tokens): chosen answers first."""
    from trl.trainer.dpo_trainer import DPOTrainer  # which takes seconds

    masked, pairs = logps * mask, len(logps) // 2
    none = torch.zeros_like(masked)
    outputs = SimpleNamespace(
        log_probs=masked,
        entropy=none.detach(),
        mean_logits=none.detach(),
        is_top1=none.detach().bool(),
        log_sum_sq_probs=none.detach(),
        loss=None,
        label_mask=mask.bool(),
        aux_loss=None,
    )
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, num_processes=1
    )
    this = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        beta=0.3,
        loss_types=[kind],
        loss_weights=[1.0],
        label_smoothing=0.0,
        args=SimpleNamespace(discopop_tau=0.05),
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    ones = torch.ones(len(logps), logps.shape[1] + 1, dtype=torch.long)
    inputs = {
        "input_ids": ones,
        "attention_mask": ones,
        "completion_mask": torch.cat([torch.zeros_like(ones[:, :1]), mask.long()], dim=1),
        "ref_chosen_logps": reference[:pairs],
        "ref_rejected_logps": reference[pairs:],
    }
    # As the trainer's forward pass would have them.
    loss = DPOTrainer._compute_loss(this, lambda **_: outputs, inputs, False)
    return loss, {name: values[-1] for name, values in this._metrics["train"].items()}


def tokens_and_mask(pairs: int = 5, width: int = 9):
    generator = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(2 * pairs, width, generator=generator)
    lengths = torch.randint(1, width, (2 * pairs,), generator=generator)
    mask = (torch.arange(width)[None] < lengths[:, None]).float()
    reference = (logps * mask).sum(1) + torch.randn(2 * pairs, generator=generator)
    return logps.requires_grad_(), mask, reference


def loss_of(settings: DpoSection, logps: mx.array, mask: mx.array, reference: mx.array):
    ratios, tokens = (logps * mask).sum(axis=1) - reference, mask.sum(axis=1)
    half = len(tokens) // 2
    pairs = Pairs(ratios[:half], ratios[half:], tokens[:half], tokens[half:])
    return DPO(settings)._function()(pairs, settings.beta).mean()


@pytest.mark.parametrize("kind", TYPES)
def test_each_loss_and_its_gradient_are_trls(kind):
    logps, mask, reference = tokens_and_mask()
    want, _ = trl_loss(kind, logps, mask, reference)
    want.backward()
    settings = DpoSection(beta=0.3, loss_type=kind)
    given = [mx.array(tensor.detach().numpy()) for tensor in (logps, mask, reference)]
    got, gradient = mx.value_and_grad(lambda x: loss_of(settings, x, *given[1:]))(given[0])
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert distance(gradient, mx.array(logps.grad.numpy())) < 1e-5


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm"])
def test_smoothing_takes_a_share_of_labels_for_wrong(kind):
    """TRL no longer smooths these: by torch's own functions."""
    logps, mask, reference = tokens_and_mask()
    tokens = mask.sum(1) if kind == "sigmoid_norm" else torch.ones(len(mask))
    ratios = ((logps * mask).sum(1) - reference) / tokens
    margins = 0.3 * (ratios[:5] - ratios[5:])
    right, wrong = (torch.nn.functional.logsigmoid(m) for m in (margins, -margins))
    want = (-0.8 * right - 0.2 * wrong).mean()
    want.backward()
    settings = DpoSection(beta=0.3, loss_type=kind, label_smoothing=0.2)
    given = [mx.array(tensor.detach().numpy()) for tensor in (logps, mask, reference)]
    got, gradient = mx.value_and_grad(lambda x: loss_of(settings, x, *given[1:]))(given[0])
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert distance(gradient, mx.array(logps.grad.numpy())) < 1e-5


# ------------------------------------------------------------------------ the objective


def model_of(**changes) -> nn.Module:
    model = tiny_llama()
    enable_packs(model)
    return with_adapters(model, **changes).train()


def of_full_logits(model: nn.Module, settings: DpoSection) -> mx.array:
    """The loss of `GROUPS`, each sample through the model by itself."""
    sums, references, tokens = [], [], []
    for sample in GROUPS:
        logits = model(mx.array(sample.tokens[None]))[0, :-1]
        losses = nn.losses.cross_entropy(logits, mx.array(sample.tokens[1:]))
        sums.append(-(losses * mx.array(sample.weights[1:])).sum())
        references.append(float(sample.references.sum()))
        tokens.append(float(sample.weights.sum()))
    policy, reference = mx.stack(sums), mx.array(references)
    ratios, tokens = policy - reference, mx.array(tokens)
    pairs = Pairs(ratios[::2], ratios[1::2], tokens[::2], tokens[1::2])
    loss = DPO(settings)._function()(pairs, settings.beta).mean()
    if settings.sft_weight:
        loss = loss - settings.sft_weight * policy[::2].sum() / tokens[::2].sum()
    return loss


@pytest.mark.parametrize("lay_out", [pack, pad])
@pytest.mark.parametrize(
    "settings",
    [*({"loss_type": kind} for kind in TYPES), {"sft_weight": 0.7}, {"label_smoothing": 0.1}],
    ids=str,
)
def test_the_loss_of_a_batch_is_that_of_full_logits(settings, lay_out):
    section, model, batch = DpoSection(beta=0.2, **settings), model_of(), lay_out(GROUPS)
    loss_of_batch = LossFunction(model, DPO(section))
    arrays = loss_of_batch.arrays(batch)

    def loss() -> mx.array:
        value, _ = loss_of_batch(arrays, batch.prefix, batch.packed)
        return value / loss_of_batch.total(arrays)

    got, gradients = value_and_gradients(model, loss)
    want, wanted = value_and_gradients(model, lambda: of_full_logits(model, section))
    assert got == pytest.approx(want, rel=1e-4)
    largest = max(mx.abs(gradient).max().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert mx.abs(gradients[name] - gradient).max().item() < 1e-4 * max(largest, 1e-3), name


def test_figures_are_trls_and_means_over_pairs():
    model = model_of()
    settings = DpoSection(beta=0.3)
    figures = held_out_figures(model, GROUPS, DPO(settings), batch_size=2, layout=Layout())
    width = max(len(sample.tokens) for sample in GROUPS)
    rows, masks = [], []
    for sample in [*GROUPS[::2], *GROUPS[1::2]]:
        logits = model(mx.array(sample.tokens[None]))[0, :-1]
        losses = nn.losses.cross_entropy(logits, mx.array(sample.tokens[1:]))
        more = width - len(sample.tokens)
        rows.append(np.pad(-np.array(losses), (0, more)))
        masks.append(np.pad(sample.weights[1:], (0, more)))
    reference = [float(s.references.sum()) for s in [*GROUPS[::2], *GROUPS[1::2]]]
    loss, want = trl_loss(
        "sigmoid", *(torch.tensor(np.array(a), dtype=torch.float32) for a in (rows, masks)),
        torch.tensor(reference),
    )  # fmt: skip
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        key = f"rewards/{name}"
        assert figures[key] == pytest.approx(want[key], rel=1e-3, abs=1e-4), key
    for name in ("chosen", "rejected"):
        assert figures[f"logps/{name}"] == pytest.approx(want[f"logps/{name}"], rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"sft_weight": 0.5}, {"loss_type": "ipo"}], ids=str)
def test_a_large_pass_and_several_small_ones_are_the_same_step(settings):
    moved = []
    for batch_size in (4, 1):
        model = model_of()
        objective = DPO(DpoSection(**settings))
        step = TrainStep(
            model, optim.SGD(1.0), max_grad_norm=0.0, loss=LossFunction(model, objective)
        )
        result = step(passes(GROUPS, batch_size, Layout()), 1.0)
        sums = {name: value.item() for name, value in result.sums.items()}
        moved.append((result.loss.item(), result.grad_norm.item(), sums, trainable(model)))
    (loss, norm, sums, after), other = moved
    assert other[0] == pytest.approx(loss, rel=1e-5)
    assert other[1] == pytest.approx(norm, rel=1e-5)
    assert other[2] == pytest.approx(sums, rel=1e-4, abs=1e-4)
    assert all(distance(other[3][name], after[name]) < 1e-5 for name in after)


@pytest.mark.slow
def test_a_step_that_is_compiled_is_the_plain_one():
    results = []
    for compiled in (False, True):
        model = model_of()
        objective = DPO(DpoSection(sft_weight=0.5))
        step = TrainStep(
            model,
            optim.SGD(1.0),
            max_grad_norm=1.0,
            compiled=compiled,
            loss=LossFunction(model, objective),
        )
        layout = Layout(few_shapes=True)
        losses = [
            step(passes(GROUPS[: 2 * pairs], 4, layout), 0.5).loss.item() for pairs in (4, 3, 4, 2)
        ]
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_pairs_that_fill_a_batch_up_count_for_nothing(kind):
    model, batch = model_of(), pack(GROUPS)
    loss_of = LossFunction(model, DPO(DpoSection(loss_type=kind)))
    rows, width = batch.tokens.shape
    full = filled_up(batch, rows + 1, width, len(batch.targets) + 32, batch.groups + 3)
    found = []
    for each in (batch, full):
        arrays = loss_of.arrays(each)
        loss, figures = loss_of(arrays, each.prefix, each.packed)
        found.append(
            [loss.item(), loss_of.total(arrays).item(), *(f.item() for f in figures.values())]
        )
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_trained_head_has_the_gradient_of_the_loss(dropout, monkeypatch):
    """Its logits are made again in the backward pass, and drop what they have dropped: with the
    seed fixed, the loss is a function whose slope can be measured."""
    monkeypatch.setattr(base, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(base, "LEAST_ROWS", 8)
    model = tiny_llama(tied=False)
    enable_packs(model)
    with_adapters(model, dropout=dropout)
    batch, loss_of = pack(GROUPS), LossFunction(model.train(), DPO(DpoSection(beta=0.5)))
    assert "lm_head.lora_a" in trainable(model) and len(batch.targets) > 3 * base.LEAST_ROWS
    arrays = loss_of.arrays(batch)

    def loss() -> mx.array:
        mx.random.seed(13)
        return loss_of(arrays, batch.prefix, batch.packed)[0]

    start = trainable(model)
    _, gradients = value_and_gradients(model, loss)
    head = {name: g for name, g in gradients.items() if name.startswith("lm_head")}
    for chosen in (head, gradients):
        norm = sum(g.square().sum() for g in chosen.values()).item() ** 0.5

        def at(distance: float, chosen=chosen, norm=norm) -> float:
            moved = [(n, start[n] + distance / norm * g) for n, g in chosen.items()]
            model.load_weights(moved, strict=False)
            return loss().item()

        assert (at(1e-2) - at(-1e-2)) / 2e-2 == pytest.approx(norm, rel=1e-2)
        model.load_weights(list(start.items()), strict=False)
