"""Losses of pairs: a chosen and a rejected answer, under the policy and a reference.

Notation: `chosen` and `rejected` are r = log pi(y|x) - log pi_ref(y|x), the sums over an answer's
tokens of the log-ratios of policy and reference, float32 (n,); D = r_chosen - r_rejected;
`chosen_tokens` and `rejected_tokens` are the answers' lengths; b is `beta`. Each function gives
the loss of each pair, (n,).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Pairs:
    """Log-ratios of both sides, each summed over an answer, and how many tokens they are of."""

    chosen: mx.array
    rejected: mx.array
    chosen_tokens: mx.array
    rejected_tokens: mx.array

    @property
    def apart(self) -> mx.array:
        """D."""
        return self.chosen - self.rejected

    @property
    def apart_by_token(self) -> mx.array:
        """D of the means over each answer's tokens."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


def sigmoid(pairs: Pairs, beta: float, smoothing: float) -> mx.array:
    """-(1 - e) log s(b D) - e log s(-b D): DPO (Rafailov et al. 2023, arXiv:2305.18290).

    With `smoothing` e > 0 it is conservative DPO: labels are wrong that often (Mitchell 2023).
    """
    return _smoothed(beta * pairs.apart, smoothing)


def sigmoid_norm(pairs: Pairs, beta: float, smoothing: float) -> mx.array:
    """`sigmoid` of means over each answer's tokens: long answers weigh no more than short ones."""
    return _smoothed(beta * pairs.apart_by_token, smoothing)


def hinge(pairs: Pairs, beta: float) -> mx.array:
    """max(0, 1 - b D): SLiC-HF (Zhao et al. 2023, arXiv:2305.10425)."""
    return mx.maximum(1 - beta * pairs.apart, 0)


def ipo(pairs: Pairs, beta: float) -> mx.array:
    """(D - 1 / (2 b))^2 of means over tokens: IPO (Azar et al. 2023, arXiv:2310.12036)."""
    return (pairs.apart_by_token - 1 / (2 * beta)).square()


def apo_zero(pairs: Pairs, beta: float) -> mx.array:
    """1 - s(b r_chosen) + s(b r_rejected): APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266).

    It raises the chosen answer and lowers the rejected one, each by itself.
    """
    return 1 - mx.sigmoid(beta * pairs.chosen) + mx.sigmoid(beta * pairs.rejected)


def _smoothed(margin: mx.array, smoothing: float) -> mx.array:
    losses: mx.array = -(1 - smoothing) * nn.log_sigmoid(margin)
    if smoothing:
        losses = losses - smoothing * nn.log_sigmoid(-margin)
    return losses
