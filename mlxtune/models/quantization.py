"""How a checkpoint's weights are quantized: read once from its config, said as MLX says it.

MLX's own forms, MXFP4, MXFP8, AWQ and GPTQ are read. AWQ's and GPTQ's weights become MLX's affine
ones: a value is scale · (code - zero) in all three, and MLX keeps -scale · zero as its bias.
Layouts: https://github.com/casper-hansen/AutoAWQ (awq/utils/packing_utils.py, `gemm`) and
https://github.com/ModelCloud/GPTQModel (`gptq`, `gptq_v2`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxtune.errors import ModelError

Config = dict[str, Any]

# NVIDIA's ModelOpt says it in a file of its own.
_MODELOPT = "hf_quant_config.json"
_REMEDY = (
    "take the original model that was quantized, which its card names; model.quantize = 4 "
    "quantizes that one for training"
)
_GROUPS = (32, 64, 128)
# MLX packs codes into 32 bits as GPTQ does only where these hold a whole number of them.
_GPTQ_BITS = (2, 4, 8)
# Where the codes of eight neighbouring columns lie in AWQ's 32 bits, four bits each.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# Arrays of a layer that AWQ or GPTQ packed; `g_idx` is GPTQ's group of each input.
KINDS = ("qweight", "qzeros", "scales", "g_idx")
_EXPERT = re.compile(r"^(.*\.mlp)\.experts\.(\d+)\.(\w+_proj)$")
_PARTS = ("weight", "scales", "biases")  # MLX's


def readable(config: Config, path: Path) -> Config:
    """A config whose `quantization` says in MLX's words how its weights are packed.

    Args:
        config: as in config.json.
        path: the folder it is from.

    Returns:
        The config itself where nothing is quantized or MLX says how, a copy otherwise.

    Raises:
        ModelError: the weights are quantized in a way that is not read here; it is named.
    """
    if isinstance(config.get("quantization"), dict):
        return config
    try:
        return _readable(config, path)
    except ModelError as error:
        error.where = str(path / "config.json")
        raise


def _readable(config: Config, path: Path) -> Config:
    said = _said(config, path)
    if said is None:
        return config
    method = str(said.get("quant_method") or _unnamed(said)).lower()
    config = config | {"quantization_config": said}
    if method == "mlx":
        return config | {"quantization": said}
    if method == "mxfp4":
        return config  # mlx-lm and `published` know which layers that is of
    if method == "mxfp8":
        return config | {"quantization": {"group_size": 32, "bits": 8, "mode": "mxfp8"}}
    if method == "awq":
        _require(said, "AWQ", bits=(4,), layouts=("gemm",), layout=said.get("version", "gemm"))
    elif method == "gptq":
        _require(said, "GPTQ", bits=_GPTQ_BITS, layouts=("gptq", "gptq_v2"), layout=_layout(said))
    else:
        raise _refused(f"the model's weights are quantized with {method}, which is not read here")
    packing: Config = {"group_size": said["group_size"], "bits": said.get("bits", 4)}
    apart = () if said.get("lm_head") else ("model.embed_tokens", "lm_head")
    return config | {"quantization": packing | dict.fromkeys(apart, False)}


def _said(config: Config, path: Path) -> Config | None:
    text = config.get("text_config")
    places = (config, text if isinstance(text, dict) else {})
    found = next((p["quantization_config"] for p in places if p.get("quantization_config")), None)
    if found is None and (path / _MODELOPT).is_file():
        try:
            found = json.loads((path / _MODELOPT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        return {"quant_method": "modelopt"} | (found if isinstance(found, dict) else {})
    if found is not None and not isinstance(found, dict):
        raise _refused("its quantization_config is no table of settings")
    return found


def _layout(said: Config) -> str:
    """GPTQ's: `gptq` keeps its zeros less one, `gptq_v2` as they are."""
    return str(said.get("checkpoint_format") or said.get("format") or "gptq").lower()


def _unnamed(said: Config) -> str:
    """The method of settings that do not name it."""
    if "bits" in said and "group_size" in said:
        return "mlx"
    if any(key.startswith(("load_in_", "bnb_")) for key in said):
        return "bitsandbytes"
    return "a method that it does not name"


def _require(
    said: Config, name: str, *, bits: tuple[int, ...], layouts: tuple[str, ...], layout: Any
) -> None:
    """See that a variant of AWQ or GPTQ is one that MLX can hold."""
    what = f"the model's weights are quantized with {name}"
    if str(layout).lower() not in layouts:
        raise _refused(f"{what} in the layout {layout!r}; {' and '.join(layouts)} can be read here")
    if said.get("bits", 4) not in bits:
        among = " or ".join(map(str, bits))
        raise _refused(f"{what} to {said.get('bits')} bits; {among} can be read here")
    if said.get("group_size") not in _GROUPS:
        among = ", ".join(map(str, _GROUPS))
        raise _refused(
            f"{what} in groups of {said.get('group_size')} weights; groups of {among} can be read "
            "here"
        )
    if said.get("desc_act") and not said.get("static_groups"):
        raise _refused(
            f"{what} and desc_act: weights of a group are no neighbours, as MLX needs them"
        )


def _refused(what: str) -> ModelError:
    return ModelError(what, remedy=_REMEDY)


@dataclass(frozen=True)
class Packing:
    """How one layer of AWQ's or GPTQ's is packed.

    Attributes:
        awq: whether it is AWQ's.
        bits: of a code.
        group_size: weights that share a scale and a zero.
        shape: of the weight, (out, in).
    """

    awq: bool
    bits: int
    group_size: int
    shape: tuple[int, int]


def packing_of(module: str, shapes: Mapping[str, tuple[int, ...]], config: Config) -> Packing:
    """How a layer of AWQ's or GPTQ's is packed; its arrays' shapes are checked.

    Args:
        module: the layer.
        shapes: of those of `KINDS` that it has, by kind.
        config: from `readable`.

    Raises:
        ModelError: the config does not say how, or the shapes are others than it says.
    """
    said = config.get("quantization_config") or {}
    method = str(said.get("quant_method")).lower()
    scales = shapes.get("scales", ())
    if method not in ("awq", "gptq"):
        raise _misfit(module, "its config.json has no quantization_config that says how")
    if len(scales) != 2:
        raise _misfit(module, "it has no scales")
    bits, group_size = int(said.get("bits", 4)), int(said["group_size"])
    groups, rows = scales
    inputs, per = groups * group_size, 32 // bits
    columns = (groups, rows // per)
    wanted = {
        "qweight": (inputs, rows // per) if method == "awq" else (inputs // per, rows),
        "qzeros": columns,
        "g_idx": (inputs,),
    }
    for kind, shape in shapes.items():
        if shape != wanted.get(kind, shape):
            raise _misfit(module, f"its {kind} is of shape {shape}, not {wanted[kind]}")
    return Packing(method == "awq", bits, group_size, (rows, inputs))


def in_mlx_form(weights: Mapping[str, mx.array], config: Config) -> dict[str, mx.array]:
    """Weights in which AWQ's and GPTQ's layers have MLX's `weight`, `scales` and `biases`.

    Experts are put together as mlx-lm has them: some of its models do so with plain weights only.

    Args:
        weights: name to array, of a whole checkpoint; they may be lazy.
        config: from `readable`.

    Raises:
        ModelError: as `mlx_arrays`.
    """
    made: dict[str, mx.array] = {}
    experts: dict[str, dict[int, dict[str, mx.array]]] = {}
    for name, array in weights.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            names = {k: f"{module}.{k}" for k in KINDS}
            given = {k: weights[n] for k, n in names.items() if n in weights}
            layer = dict(zip(_PARTS, mlx_arrays(module, given, config), strict=True))
            if expert := _EXPERT.match(module):
                block, number, projection = expert.groups()
                stacked = experts.setdefault(f"{block}.switch_mlp.{projection}", {})
                stacked[int(number)] = layer
            else:
                made |= {f"{module}.{part}": packed for part, packed in layer.items()}
        elif not (kind in KINDS and f"{module}.qweight" in weights):
            made[name] = array
    for module, layers in experts.items():
        ordered = [layer for _, layer in sorted(layers.items())]
        made |= {f"{module}.{part}": mx.stack([e[part] for e in ordered]) for part in _PARTS}
    return made


def mlx_arrays(
    module: str, given: Mapping[str, mx.array], config: Config
) -> tuple[mx.array, mx.array, mx.array]:
    """One layer of AWQ's or GPTQ's in MLX's affine form.

    Args:
        module: the layer.
        given: those of `KINDS` that it has, by kind. Without zeros, all of them are the middle.
        config: from `readable`.

    Returns:
        Codes, uint32 (out, in · bits / 32); scales and biases, float32 (out, groups), in which
        a product of a scale and a zero is exact.

    Raises:
        ModelError: as `packing_of`, or inputs of a group are no neighbours.
    """
    how = packing_of(module, {kind: array.shape for kind, array in given.items()}, config)
    if "g_idx" in given:
        _require_in_order(module, given["g_idx"], how.group_size)
    bits, per = how.bits, 32 // how.bits
    if how.awq:
        codes = _columns(given["qweight"], bits, _AWQ_ORDER).T.reshape(how.shape[0], -1, per)
        shifts = mx.arange(per, dtype=mx.uint32) * bits
        weight = (codes << shifts).sum(axis=-1).astype(mx.uint32)
    else:
        weight = given["qweight"].view(mx.uint32).T
    scales = given["scales"].astype(mx.float32)
    zeros = mx.array(float(1 << (bits - 1)))
    if "qzeros" in given:
        words = given["qzeros"].view(mx.uint32)
        if not how.awq and _layout(config["quantization_config"]) == "gptq":
            # Stored less one each, with borrows: added to whole words, as GPTQModel does.
            words = words + mx.array(sum(1 << n for n in range(0, 32, bits)), mx.uint32)
        zeros = _columns(words, bits, _AWQ_ORDER if how.awq else range(per)).astype(mx.float32)
    return mx.contiguous(weight), mx.contiguous(scales.T), mx.contiguous((-scales * zeros).T)


def _columns(words: mx.array, bits: int, order: Iterable[int]) -> mx.array:
    """Codes that lie in the bits of (rows, n) words: uint32 (rows, n · 32 / bits)."""
    shifts = mx.array([place * bits for place in order], mx.uint32)
    codes = (words.view(mx.uint32)[..., None] >> shifts) & mx.array((1 << bits) - 1, mx.uint32)
    return codes.reshape(words.shape[0], -1)


def _require_in_order(module: str, groups: mx.array, group_size: int) -> None:
    """See that inputs of a group are neighbours."""
    found = np.array(groups)
    if not np.array_equal(found, np.arange(len(found)) // group_size):
        raise _misfit(
            module, "its g_idx is in another order, as desc_act leaves it, which MLX cannot hold"
        )


def _misfit(module: str, what: str) -> ModelError:
    return ModelError(f"the quantized layer {module} cannot be read: {what}", remedy=_REMEDY)
