"""Rotary positions in GGUF, both ways: their base, and how long contexts stretch them.

`config.json` keeps the stretching in `rope_scaling`, newer ones in `rope_parameters`.
GGUF keeps linear and YaRN scaling as metadata, and those of Llama 3 and Phi 3 (LongRoPE)
as tensors of one divisor for each frequency.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlxtune.errors import ExportError, ModelError
from mlxtune.gguf.architectures import Architecture, Config
from mlxtune.gguf.llama3 import Factors, llama3_factors, llama3_scaling
from mlxtune.gguf.metadata import head_dim
from mlxtune.gguf.reader import GGUFFile, shortest

# One divisor for each pair of rotated dimensions.
FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FREQUENCIES, LONG, SHORT)


def rope_metadata(entry: Architecture, config: Config) -> dict[str, int | float | str | list[int]]:
    """Metadata of the rotation.

    Raises:
        ExportError: the config scales it in a way that llama.cpp does not know for this
            architecture, or says no base where there is no usual one.
    """
    if entry.own:
        return {}  # among its sizes
    values: dict[str, int | float | str | list[int]] = {"rope.freq_base": theta(entry, config)}
    if entry.rope_sections:
        parameters = config.get("rope_parameters")
        if not parameters:
            raise ExportError("the model's config has no 'rope_parameters'", where="config.json")
        sections = [*(parameters.get("mrope_section") or entry.rope_sections), 0, 0]
        values["rope.dimension_sections"] = sections[:4]
    if entry.rope_dimension:
        values["rope.dimension_count"] = rotated_dimensions(entry, config)
    kind, scaling = _scaling(config)
    if kind == "linear":
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = float(scaling["factor"])
    elif kind == "yarn" and not scaling.get("mscale_all_dim"):
        for key, wanted in _YARN_TURNS.items():
            if scaling.get(key, wanted) != wanted:
                raise ExportError(
                    f"llama.cpp computes YaRN with {key} = {wanted} only; this model has "
                    f"{scaling[key]:g}",
                    where="config.json: rope_scaling",
                )
        values["rope.scaling.type"] = "yarn"
        values["rope.scaling.factor"] = float(scaling["factor"])
        values["rope.scaling.original_context_length"] = int(
            scaling.get("original_max_position_embeddings", 4096)
        )
    elif kind in _LONGROPE and entry.name == "phi3":
        values["rope.scaling.attn_factor"] = _attention_factor(config)
    elif kind not in ("default", "llama3") and not _in_full(entry, config, kind, scaling):
        raise ExportError(
            f"rope scaling of type {kind!r} cannot be written as GGUF for {entry.name} models",
            where="config.json: rope_scaling",
        )
    return {f"{entry.name}.{key}": value for key, value in values.items()}


def rope_tensors(entry: Architecture, config: Config) -> dict[str, Factors]:
    """Tensors of the rotation: GGUF name to float32 (rotated dimensions / 2,)."""
    if entry.own:
        return {FREQUENCIES: entry.own.rope_factors(config)}
    kind, scaling = _scaling(config)
    dims = rotated_dimensions(entry, config)
    if kind == "llama3":
        return {FREQUENCIES: llama3_factors(theta(entry, config), dims, scaling)}
    if _in_full(entry, config, kind, scaling):
        return {FREQUENCIES: np.array(scaling["long_factor"], np.float32)}
    if kind in _LONGROPE:
        return {
            name: np.broadcast_to(np.array(scaling[key], np.float32), (dims // 2,)).copy()
            for name, key in ((LONG, "long_factor"), (SHORT, "short_factor"))
        }
    return {}


def rope_config(entry: Architecture, file: GGUFFile, config: Config) -> Config:
    """What config.json says of a GGUF's rotation.

    Args:
        entry: of the file.
        file: its metadata and tensors.
        config: sizes, from `config_from_metadata`.

    Raises:
        ModelError: it is scaled in a way that is not known here.
    """
    if entry.own:
        return entry.own.config(file)
    meta = {k.removeprefix(f"{entry.name}."): v for k, v in file.metadata.items()}
    said: Config = {"rope_theta": shortest(meta.get("rope.freq_base", 10000.0))}
    if entry.rope_dimension:
        share = meta.get("rope.dimension_count", 0) / head_dim(entry, config)
        if 0 < share < 1:
            said["partial_rotary_factor"] = share
    kind = meta.get("rope.scaling.type", "none")
    if FREQUENCIES in file.tensors:
        said["rope_scaling"] = _scaling_of(file, said["rope_theta"], config)
    elif LONG in file.tensors and SHORT in file.tensors:
        said["rope_scaling"] = {
            "type": "longrope",
            "long_factor": [shortest(v) for v in file.data(LONG)],
            "short_factor": [shortest(v) for v in file.data(SHORT)],
        }
    elif kind in ("linear", "yarn"):
        said["rope_scaling"] = {
            "type": kind,
            "rope_type": kind,
            "factor": shortest(meta["rope.scaling.factor"]),
        }
        if original := meta.get("rope.scaling.original_context_length"):
            said["rope_scaling"]["original_max_position_embeddings"] = original
    elif kind != "none":
        raise ModelError(
            f"GGUF files with rope scaling of type {kind!r} cannot be read yet",
            where=str(file.path),
            remedy="use the model's safetensors folder or hub id",
        )
    if entry.rope_sections:
        parameters = {"rope_type": "default"} | said.pop("rope_scaling", {}) | said
        sections = meta.get("rope.dimension_sections", entry.rope_sections)
        return {"rope_parameters": parameters | {"mrope_section": list(sections[:3])}}
    return said


def theta(entry: Architecture, config: Config) -> float:
    """Base of the rotary frequencies; newer configs keep it in `rope_parameters`.

    Raises:
        ExportError: the config says none, and there is no usual one.
    """
    parameters = config.get("rope_parameters") or {}
    base = config.get("rope_theta") or parameters.get("rope_theta") or entry.theta
    if base is None:
        raise ExportError("the model's config has no 'rope_theta'", where="config.json")
    return float(base)


def rotated_dimensions(entry: Architecture, config: Config) -> int:
    """How many dimensions of a head are rotated."""
    share = config.get("partial_rotary_factor", 1.0)
    if entry.rope_sections:
        share = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 0.25)
    return int(head_dim(entry, config) * share)


_LONGROPE = ("longrope", "su")
# llama.cpp reads no others from the metadata of these architectures.
_YARN_TURNS = {"beta_fast": 32, "beta_slow": 1}


def _scaling(config: Config) -> tuple[str, dict[str, Any]]:
    for key in ("rope_scaling", "rope_parameters"):  # its older and its newer name
        scaling = config.get(key) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            return str(kind), scaling
    return "default", {}


def _in_full(entry: Architecture, config: Config, kind: str, scaling: dict[str, Any]) -> bool:
    """Whether LongRoPE's lists are one list of divisors that hold at any length.

    Of a llama these are what llama.cpp calls `rope_freqs`.
    """
    return (
        entry.name == "llama"
        and kind in _LONGROPE
        and scaling["long_factor"] == scaling["short_factor"]
        and scaling.get("original_max_position_embeddings")
        == config.get("max_position_embeddings", 0)
    )


def _attention_factor(config: Config) -> float:
    """LongRoPE's factor on queries and keys (arXiv 2402.13753, equation 6)."""
    original = int(config.get("original_max_position_embeddings", 4096))
    stretch = int(config.get("max_position_embeddings", original)) / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _scaling_of(file: GGUFFile, base: float, config: Config) -> dict[str, Any]:
    """What config.json says of a file's divisors, one for each frequency.

    Those of Llama 3's scaling have its settings, others stand in full as LongRoPE's, whose
    attention factor is 1 where the context is as long as it was.

    Raises:
        ModelError: they are no positive numbers.
    """
    factors = file.data(FREQUENCIES).reshape(-1)
    if not len(factors) or not (np.isfinite(factors) & (factors > 0)).all():
        raise ModelError(
            f"the GGUF's {FREQUENCIES} holds what is no positive number",
            where=str(file.path),
            remedy="download or export the file again",
        )
    if scaling := llama3_scaling(base, factors):
        return scaling
    if (factors == factors[0]).all():
        return {"type": "linear", "rope_type": "linear", "factor": shortest(factors[0])}
    listed = [shortest(value) for value in factors]
    return {
        "type": "longrope",
        "rope_type": "longrope",
        "long_factor": listed,
        "short_factor": listed,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }
