"""Learning rates against those that transformers' schedulers give."""

from __future__ import annotations

import pytest

from mlxtune.train.schedule import learning_rate

PEAK, TOTAL, WARMUP, DECAY = 2e-4, 60, 10, 15


def of_transformers(name: str, **options: object) -> list[float]:
    """Rates of steps 0, 1, … of a run, as its Trainer would use them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = transformers.get_scheduler(
        name,
        optimizer,
        num_warmup_steps=WARMUP,
        num_training_steps=TOTAL,
        scheduler_specific_kwargs=options,
    )
    rates = []
    for _ in range(TOTAL):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("kind", "name", "options", "end"),
    [
        ("constant", "constant_with_warmup", {}, 0.0),
        ("linear", "linear", {}, 0.0),
        ("linear", "polynomial", {"power": 1, "lr_end": 0.1 * PEAK}, 0.1),
        ("cosine", "cosine", {}, 0.0),
        ("cosine", "cosine_with_min_lr", {"min_lr_rate": 0.1}, 0.1),
        (
            "warmup_stable_decay",
            "warmup_stable_decay",
            {"num_decay_steps": DECAY, "decay_type": "linear"},
            0.0,
        ),
        (
            "warmup_stable_decay",
            "warmup_stable_decay",
            {"num_decay_steps": DECAY, "decay_type": "linear", "min_lr_ratio": 0.1},
            0.1,
        ),
    ],
)
def test_rates_are_those_of_transformers(kind, name, options, end):
    want = of_transformers(name, **options)
    got = [
        learning_rate(
            step,
            peak=PEAK,
            total_steps=TOTAL,
            warmup_steps=WARMUP,
            kind=kind,
            decay_steps=DECAY,
            min_ratio=end,
        )
        for step in range(TOTAL)
    ]
    assert got[WARMUP:] == pytest.approx(want[WARMUP:], rel=1e-6)
    if not end:
        # Its first step has a rate of zero and does nothing; ours has that of its second.
        assert want[0] == 0
        assert got[:WARMUP] == pytest.approx(want[1 : WARMUP + 1], rel=1e-6)
