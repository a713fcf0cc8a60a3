"""NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv:2310.05914).

    x + alpha / sqrt(L d) * u,    u uniform in [-1, 1) for every element

with L the tokens of a sample and d the width of its embeddings. In a packed batch L is
each sample's own length, not the pack's. What several samples share is computed once
for all of them, so they share its noise too: one draw, of the mean of their sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxtune.data.pack import PADDING, PREFIX, Batch


class EmbeddingNoise:
    """The noise of one model; without sizes for the batch at hand there is none."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._sizes: mx.array | None = None

    @contextmanager
    def sized(self, sizes: mx.array) -> Iterator[None]:
        """Draw noise of these `noise_sizes` for a while."""
        self._sizes = sizes
        try:
            yield
        finally:
            self._sizes = None

    def on(self, x: mx.array) -> mx.array:
        """Embeddings (rows, tokens, width) with their noise, drawn from MLX's random state."""
        if self._sizes is None:
            return x
        size = (self._alpha * x.shape[-1] ** -0.5) * self._sizes
        noise = mx.random.uniform(-1, 1, x.shape) * size.reshape(*x.shape[:-1], 1)
        noisy: mx.array = x + noise.astype(x.dtype)
        return noisy


def add_embedding_noise(model: nn.Module, alpha: float) -> None:
    """Make this model train on noisy embeddings.

    The noise goes onto the input of the first block. That is what the embedding gave,
    scaled if the architecture scales it, where Hugging Face adds it to Gemma's as well;
    and a head that is tied to the embedding never sees it. The block's instance gets a
    class of its own; mlx-lm's classes stay as they are.

    Args:
        model: an mlx-lm model. If its blocks are to be checkpointed, they are already:
            noise inside of what is recomputed would be drawn anew.
        alpha: 5 to 15 in the paper.
    """
    block = model.layers[0]
    original = type(block)
    block.embedding_noise = EmbeddingNoise(alpha)
    block.__class__ = type(
        f"Noisy{original.__name__}", (original,), {"__call__": _noisy(original.__call__)}
    )


def _noisy(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return call(self, self.embedding_noise.on(x) if self.training else x, *args, **kwargs)

    return run


@contextmanager
def embedding_noise(model: nn.Module, sizes: mx.array) -> Iterator[None]:
    """Noise of these sizes, if the model has any and is in training."""
    noise: EmbeddingNoise | None = getattr(model.layers[0], "embedding_noise", None)
    if noise is None:
        yield
    else:
        with noise.sized(sizes):
            yield


def noise_sizes(batch: Batch) -> npt.NDArray[np.float32]:
    """1 / sqrt(L) for each token of a batch, float32 (rows, width); 0 at padding."""
    segments, count = batch.segments, int(batch.segments.max()) + 1
    # A sample ends at its last position, whatever of it stands elsewhere.
    lengths = np.zeros(count, np.int64)
    used = segments > PREFIX
    np.maximum.at(lengths, segments[used], batch.positions[used] + 1)
    of_segment = np.zeros(count, np.float32)
    of_segment[1:] = 1 / np.sqrt(lengths[1:])
    samples = np.ones(count, bool)
    samples[PREFIX] = False
    if batch.parents is not None:
        for shared in np.unique(batch.parents[batch.parents > PREFIX]):
            of_segment[shared] = of_segment[np.unique(segments[batch.parents == shared])].mean()
            samples[shared] = False
    of_segment[PREFIX] = of_segment[samples].mean()
    return np.where(segments == PADDING, np.float32(0), of_segment[segments])
