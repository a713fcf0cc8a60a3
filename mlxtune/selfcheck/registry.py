"""The checks, in the order in which they are run: what says most in little time comes first."""

from __future__ import annotations

from mlxtune.selfcheck import generation, kernels, machine, speed, training
from mlxtune.selfcheck.check import Check

CHECKS: tuple[Check, ...] = (
    Check("this machine", machine.this_machine),
    Check("doctor", machine.findings),
    Check("attention", kernels.own_attention),
    Check("quantized products", kernels.quantized_products),
    Check("loss without logits", kernels.chunked_loss),
    *(Check(name, function) for name, function in training.checks()),
    Check("a batch of answers", generation.batch_of_answers),
    Check("K-quants", kernels.k_quants),
    Check("rates", speed.rates),
    Check("a step of SmolLM2-135M", speed.real_step),
    Check("the same with 4-bit weights", speed.real_quantized_step),
)


def check_named(name: str) -> Check:
    """One of them.

    Raises:
        KeyError: there is none of that name.
    """
    return {check.name: check for check in CHECKS}[name]
