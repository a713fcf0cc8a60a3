"""Checkpoints as their makers publish them, where mlx-lm keeps other parameters.

What mlx-lm's `sanitize` does of a whole model when it loads one, for one tensor at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxtune.gguf.tensors import SourceTensor
from mlxtune.models.safetensors import StoredTensor

Values = npt.NDArray[np.float32]


def as_in_mlx_lm(tensors: Iterable[SourceTensor], config: dict[str, Any]) -> Iterator[SourceTensor]:
    """Tensors of a checkpoint under mlx-lm's names, with mlx-lm's values.

    Args:
        tensors: as published, or as mlx-lm keeps them already.
        config: its config.json.
    """
    family = _FAMILIES.get(str(config.get("model_type")))
    yield from family(tensors, config) if family else tensors


def mxfp4_experts(blocks: StoredTensor, scales: StoredTensor) -> SourceTensor:
    """Experts that are packed in microscaling's four-bit floats.

    Args:
        blocks: uint8 (experts, out, in / 32, 16), two numbers a byte.
        scales: uint8 (experts, out, in / 32), exponents of two.
    """
    *rows, groups, _ = blocks.shape

    def load() -> Values:
        codes = mx.array(blocks.read()).view(mx.uint32).reshape(*rows, groups * 4)
        exponents = mx.array(scales.read())
        full = mx.dequantize(codes, exponents, group_size=32, bits=4, mode="mxfp4")
        values = np.array(full.astype(mx.float32))
        del full
        mx.clear_cache()
        return values

    name = f"{blocks.name.removesuffix('_blocks')}.weight"
    return SourceTensor(name, (*rows, groups * 32), load)


_GATE_AND_UP = re.compile(r"^(.*\.experts)\.gate_up_proj(?:\.(weight)|_(bias))$")
_DOWN_BIAS = re.compile(r"^(.*\.experts\.down_proj)_bias$")


def _gpt_oss(tensors: Iterable[SourceTensor], _config: dict[str, Any]) -> Iterator[SourceTensor]:
    """Rows of experts' gate and up alternate."""
    for tensor in tensors:
        if both := _GATE_AND_UP.match(tensor.name):
            experts, kind = both[1], both[2] or both[3]
            shape = (tensor.shape[0], tensor.shape[1] // 2, *tensor.shape[2:])
            for first, name in enumerate(("gate_proj", "up_proj")):
                load = _every_second(tensor, first)
                yield SourceTensor(f"{experts}.{name}.{kind}", shape, load)
        elif bias := _DOWN_BIAS.match(tensor.name):
            yield SourceTensor(f"{bias[1]}.bias", tensor.shape, tensor.load)
        else:
            yield tensor


def _every_second(tensor: SourceTensor, first: int) -> Callable[[], Values]:
    return lambda: np.ascontiguousarray(tensor.load()[:, first::2])


_LANGUAGE = "language_model."
_LEFT_OUT = re.compile(r"^vision_tower|^model\.visual|(^|\.)mtp\.")
_LESS_ONE = re.compile(
    r"\.(input_layernorm|post_attention_layernorm|[qk]_norm|model\.norm)\.weight$"
)


def _qwen3_5(tensors: Iterable[SourceTensor], _config: dict[str, Any]) -> Iterator[SourceTensor]:
    """Without what looks at images and what predicts further tokens.

    Norms are published less one, and convolutions with their axes in another order: mlx-lm
    takes the one for a sign of the other.
    """
    tensors = [tensor for tensor in tensors if not _LEFT_OUT.search(tensor.name)]
    published = any(t.name.endswith("conv1d.weight") and t.shape[-1] != 1 for t in tensors)
    for tensor in tensors:
        name = tensor.name.replace("model.language_model.", f"{_LANGUAGE}model.")
        name = name if name.startswith(_LANGUAGE) else _LANGUAGE + name
        if published and name.endswith("conv1d.weight"):
            channels, _, width = tensor.shape
            yield SourceTensor(name, (channels, width, 1), _moved(tensor))
        elif published and _LESS_ONE.search(name):
            yield SourceTensor(name, tensor.shape, _one_more(tensor))
        else:
            yield SourceTensor(name, tensor.shape, tensor.load)


def _moved(tensor: SourceTensor) -> Callable[[], Values]:
    return lambda: np.ascontiguousarray(np.moveaxis(tensor.load(), 2, 1))


def _one_more(tensor: SourceTensor) -> Callable[[], Values]:
    return lambda: tensor.load() + np.float32(1)


_NOT_TEXT = re.compile(
    r"^(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector)\."
)
_KEYS_AND_VALUES = re.compile(r"\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.")


def _gemma4(tensors: Iterable[SourceTensor], config: dict[str, Any]) -> Iterator[SourceTensor]:
    """Without images and sound, and without keys and values that blocks take from others."""
    first = config["num_hidden_layers"] - (config.get("num_kv_shared_layers") or 0)
    for tensor in tensors:
        own = _KEYS_AND_VALUES.search(tensor.name)
        if not _NOT_TEXT.match(tensor.name) and not (own and int(own[1]) >= first):
            name = tensor.name.replace(f"model.{_LANGUAGE}", f"{_LANGUAGE}model.")
            yield SourceTensor(name, tensor.shape, tensor.load)


Family = Callable[[Iterable[SourceTensor], dict[str, Any]], Iterator[SourceTensor]]
_FAMILIES: dict[str, Family] = {
    "gemma4": _gemma4,
    "gemma4_text": _gemma4,
    "gpt_oss": _gpt_oss,
    "qwen3_5": _qwen3_5,
}
