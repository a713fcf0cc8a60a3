"""DoRA (Liu et al. 2024, arXiv:2402.09353) over a plain or a quantized projection.

    V = W + scale * (A B)^T
    y_j = m_j / ||V_j|| * V_j x

where V_j is the row of output j. The magnitude m starts as ||W_j||, so a new layer
computes exactly what its base computes. As in section 4.3 of the paper the norm is a
constant to the gradient.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxtune.layers.lora import LoRALinear
from mlxtune.layers.quantized import QuantizedLinear

# Under this a squared norm is taken for zero: a row of zeros (padding of a vocabulary)
# is divided by its root, which leaves zero and no NaN.
_ZERO = 1e-30


class DoRALinear(LoRALinear):
    """A frozen projection whose low-rank update has a magnitude of its own per output.

    Beside `lora_a` (in, rank) and `lora_b` (rank, out) it trains `m` (out,), named as
    mlx-lm names it, in float32. With dropout, what is scaled is the product with the
    dropped input and what is left is the product with the whole one, as in the authors'
    code and in PEFT; that costs a second product with the base while training.

    Args:
        base: the projection to adapt; it is frozen.
        rank: width of the update.
        scale: factor on the update.
        dropout: probability of dropping an input feature of the update, in training.
        evaluate: compute the base's norms at once, so that no more than one base weight is
            ever expanded.
    """

    kind = "dora"

    def __init__(
        self,
        base: nn.Linear | QuantizedLinear,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        evaluate: bool = True,
    ) -> None:
        super().__init__(base, rank=rank, scale=scale, dropout=dropout)
        # With an underscore it is no parameter: it is neither trained nor saved.
        self._squares = self._base_weight().astype(mx.float32).square().sum(axis=-1)
        self.m = self._norms()
        if evaluate:
            mx.eval(self._squares, self.m)
        else:
            self._squares = mx.zeros(self._squares.shape)

    def trained(self) -> tuple[str, ...]:
        """`lora_a`, `lora_b` and the magnitude `m`."""
        return (*super().trained(), "m")

    def __call__(self, x: mx.array) -> mx.array:
        if self.off:
            plain: mx.array = self.linear(x)
            return plain
        x, a, b, m = self.in_turn(x)
        y: mx.array = self.linear(x)
        dropped = self.dropout(x)
        directed = self.linear(dropped) if self.dropout.active else y
        if "bias" in self.linear:
            directed = directed - self.linear.bias
        ratio = m / self._norms()
        # The difference from one is small, and 16 bits hold it better than the ratio.
        y = y + (ratio - 1).astype(y.dtype) * directed
        narrow = dropped @ a.astype(x.dtype)
        wide = (self.scale * ratio * b).astype(y.dtype)
        return mx.addmm(y, narrow.astype(y.dtype), wide)

    def fused_weight(self) -> mx.array:
        """m / ||V|| * V, (out, in) in float32."""
        weight = super().fused_weight()
        squares = weight.square().sum(axis=-1)
        return (self.m / mx.sqrt(mx.maximum(squares, _ZERO)))[:, None] * weight

    def _norms(self) -> mx.array:
        """||V_j|| for each output, float32 (out,), without making V.

        ||V_j||^2 = ||W_j||^2 + 2 scale <W_j, (A B)_j> + scale^2 ||(A B)_j||^2, whose first
        term never changes; the others take products of `rank` rows.
        """
        a = mx.stop_gradient(self.lora_a).astype(mx.float32)
        b = mx.stop_gradient(self.lora_b).astype(mx.float32)
        mixed = (self._times_weight(a.T) * b).sum(axis=0)
        update = ((a.T @ a) @ b * b).sum(axis=0)
        squares = self._squares + 2 * self.scale * mixed + self.scale**2 * update
        return mx.sqrt(mx.maximum(squares, _ZERO))

    def _times_weight(self, rows: mx.array) -> mx.array:
        """`rows @ W.T` without the bias, in float32."""
        base = self.linear
        if isinstance(base, QuantizedLinear):
            product: mx.array = base(rows)
            return product - base.bias if "bias" in base else product
        # In the base's own type: a 16-bit weight would have to be copied to multiply it
        # in another, and rounding counts for little in a term that is small beside ||W||^2.
        weight: mx.array = base.weight
        return (rows.astype(weight.dtype) @ weight.T).astype(mx.float32)
