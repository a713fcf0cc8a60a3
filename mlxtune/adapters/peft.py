"""Adapters as PEFT keeps them: `adapter_model.safetensors` and `adapter_config.json`.

PEFT's `lora_A` (rank, in) and `lora_B` (out, rank) are ours transposed, its
`lora_magnitude_vector` is DoRA's m, and its scale is alpha / r, or alpha / sqrt(r) with
`use_rslora`.
"""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtune.adapters.saved import (
    CONFIG,
    SavedAdapter,
    check_complete,
    load_arrays,
    save_arrays,
    within_block,
)
from mlxtune.errors import ExportError, RunError
from mlxtune.files import write_json

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}

# Options that change what an adapter computes in a way that is not done here.
_UNSUPPORTED = {
    "modules_to_save": "whole layers trained beside the adapter",
    "fan_in_fan_out": "layers with transposed weights",
    "rank_pattern": "ranks that differ by layer",
    "alpha_pattern": "scales that differ by layer",
    "lora_bias": "biases inside the adapter",
    "layer_replication": "repeated layers",
    "target_parameters": "adapters of parameters rather than layers",
    "trainable_token_indices": "trained embeddings",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Starts that take the adapter out of the base's weights, so that it fits no other base.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_MERGE = "merge it with PEFT (merge_and_unload), save that model and name it as model.path"


def read_peft(folder: Path, config: dict[str, Any]) -> SavedAdapter:
    """A LoRA, rsLoRA or DoRA adapter that PEFT saved.

    Args:
        folder: its folder.
        config: what its config says.

    Raises:
        RunError: it is damaged, or of a kind or with an option that cannot be used here,
            which is named.
    """
    where = str(folder)
    _check_options(config, where)
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise RunError(f"this folder holds no readable adapter: {error!r}", where=where) from None
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise RunError(
            "its weights are pickled, which is never read here",
            where=str(folder / "adapter_model.bin"),
            remedy="save it again with safe_serialization=True",
        )
    kind = "dora" if config.get("use_dora") else "lora"
    arrays = dict(_ours(n, a, where) for n, a in load_arrays(folder / WEIGHTS).items())
    check_complete(arrays, kind, where=where)
    base = str(config.get("base_model_name_or_path") or "another model")
    return SavedAdapter(kind, rank, scale, arrays, base, blocks=None, where=where)


def write_peft(folder: Path, adapter: SavedAdapter, *, rslora: bool = False) -> None:
    """Write an adapter as PEFT does, into an existing folder.

    Args:
        folder: where to.
        adapter: what to write.
        rslora: say the scale as alpha / sqrt(r); it is the same scale.

    Raises:
        ExportError: it goes on layers of experts, which PEFT lays out otherwise.
        StorageError: the disk refuses the write.
    """
    if experts := sorted(name for name, array in adapter.arrays.items() if array.ndim > 2):
        raise ExportError(
            f"{experts[0]} is of many experts at once, which PEFT has no layout for",
            where=adapter.where,
            remedy="fuse the run and use the model instead: mlxtune fuse",
        )
    alpha = adapter.scale * (sqrt(adapter.rank) if rslora else adapter.rank)
    # Undo the root's rounding, so that an alpha of 16 reads 16.
    alpha = round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "use_dora": adapter.kind == "dora",
        "target_modules": _target_modules(adapter),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
    arrays = {}
    for name, array in adapter.arrays.items():
        path, _, part = name.rpartition(".")
        arrays[f"{PREFIX}{path}.{NAMES[part]}"] = array if part == "m" else mx.contiguous(array.T)
    save_arrays(folder / WEIGHTS, arrays, format="pt")
    write_json(folder / CONFIG, config)


def _check_options(config: dict[str, Any], where: str) -> None:
    kind = str(config["peft_type"])
    if kind != "LORA":
        raise RunError(
            f"PEFT adapters of type {kind} cannot be used here, only LORA",
            where=where,
            remedy=_MERGE,
        )
    if (bias := config.get("bias", "none")) != "none":
        raise RunError(f"it has trained biases (bias = {bias})", where=where, remedy=_MERGE)
    for option, meaning in _UNSUPPORTED.items():
        if config.get(option):
            raise RunError(
                f"its PEFT option {option} ({meaning}) is not known here",
                where=where,
                remedy=_MERGE,
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise RunError(
            f"it began with init_lora_weights = {start}, which changes the base model's weights",
            where=where,
            remedy="save it with path_initial_model_for_weight_conversion, which makes it a "
            f"plain LoRA; or {_MERGE}",
        )


def _ours(name: str, array: mx.array, where: str) -> tuple[str, mx.array]:
    """An array under our name and in our layout."""
    plain = name.removeprefix(PREFIX)
    for part, theirs in NAMES.items():
        if plain.endswith(f".{theirs}"):
            array = array.astype(mx.float32)
            path = plain.removesuffix(f".{theirs}")
            return f"{path}.{part}", array if part == "m" else mx.contiguous(array.T)
    if plain.endswith((".base_layer.weight", "embed_tokens.weight", "lm_head.weight")):
        # PEFT adds them when the head is adapted, and when the vocabulary was resized.
        raise RunError(
            f"it holds a whole layer of the base model, {name}",
            where=where,
            remedy="if the vocabulary was not resized, save it again with "
            "save_embedding_layers=False; otherwise " + _MERGE,
        )
    raise RunError(
        f"its array {name} is of no projection's adapter",
        where=where,
        remedy="adapters of embeddings and of other layers cannot be used here; " + _MERGE,
    )


def _target_modules(adapter: SavedAdapter) -> list[str]:
    """Names under which PEFT finds exactly these layers.

    Ends of paths where every block has them, as people write them; whole paths otherwise.
    """
    ends = {within_block(path) for path in adapter.targets}
    everywhere = [f"model.layers.{n}.{end}" for n in range(adapter.blocks or 0) for end in ends]
    return sorted(ends) if sorted(everywhere) == adapter.targets else adapter.targets
