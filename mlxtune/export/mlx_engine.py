"""What Ollama's MLX engine takes: which models, in which types, with which prompts.

The engine (Ollama 0.19 and later, on Apple silicon) runs safetensors. It reads less of a
config.json than transformers does and says nothing of what it leaves out, so what it would compute
wrongly is refused here. Facts of https://github.com/ollama/ollama (x/models, x/create), 0.33.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxtune.errors import ExportError
from mlxtune.layers.packing import Packing

Config = dict[str, Any]

OLDEST = (0, 19)
KEEP = "keep"
# What a model's matrices can be quantized to, by Ollama's names.
TYPES = {
    "int4": Packing("affine", 4, 64),
    "int8": Packing("affine", 8, 64),
    "nvfp4": Packing("nvfp4", 4, 16),
    "mxfp4": Packing("mxfp4", 4, 32),
    "mxfp8": Packing("mxfp8", 8, 32),
}
# What they can be in floats, by the names that GGUF has for it.
FLOATS = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
ENGINES = ("auto", "gguf", "mlx")


class NotForEngine(ExportError):
    """Ollama's MLX engine would not compute, tokenize or ask as a model was trained."""

    def __init__(self, what: str, *, where: str) -> None:
        super().__init__(what, where=where, remedy="hand it over as GGUF: --engine gguf")


def takes(packing: Packing) -> bool:
    """Whether the engine multiplies by weights that are quantized in this way."""
    return type(packing) is Packing and any(
        (packing.mode, packing.bits) == (other.mode, other.bits) for other in TYPES.values()
    )


def type_for(asked: str | None, said: str) -> str:
    """What a model's matrices become.

    Args:
        asked: on the command line.
        said: by the recipe, which may speak of a GGUF.

    Raises:
        ExportError: what was asked for is a type of GGUF.
    """
    known = {KEEP, *TYPES, *FLOATS}
    if asked is not None and asked not in known:
        raise ExportError(
            f"{asked} is a type of GGUF, not of Ollama's MLX engine",
            where="--quantize",
            remedy=f"choose one of {', '.join([KEEP, *TYPES, *FLOATS])}, or --engine gguf",
        )
    return asked or (said if said in known else KEEP)


def refusal(config: Config) -> str | None:
    """Why the engine would not compute what a model computes; None if it would.

    Args:
        config: config.json of a model, as it is written for the engine.
    """
    name = str(next(iter(config.get("architectures") or ()), config.get("model_type")))
    check = _MODELS.get(name)
    if check is None:
        return f"it has no {name}; it has {', '.join(_MODELS)}"
    text = config.get("text_config")
    return check(config | text if isinstance(text, dict) else config)


def begins_itself(config: Config) -> bool:
    """Whether Ollama's own code for a model's prompts writes the mark that begins every text."""
    names = (*(config.get("architectures") or ()), config.get("model_type") or "")
    return any(stem in str(name).lower() for name in names for stem in ("gemma4", "cohere2"))


def renderers_for(config: Config) -> tuple[tuple[str, str], ...]:
    """Ollama's renderers that may write a model's prompts, each with the parser of its answers."""
    names = (*(config.get("architectures") or ()), config.get("model_type") or "")
    return next(
        (pairs for stem, pairs in _RENDERERS if any(stem in str(n).lower() for n in names)), ()
    )


def _scaled(config: Config) -> str | None:
    """How a model stretches its rotation, which the engine does not read."""
    said = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kinds = said.values() if all(isinstance(v, dict) for v in said.values()) else [said]
    for kind in kinds:
        found = str(kind.get("rope_type") or kind.get("type") or "default")
        if found != "default":
            return found
    return None


def _unscaled(name: str, config: Config) -> str | None:
    if scaling := _scaled(config):
        return f"it does not read rope_scaling ({scaling}) of {name}"
    return None


def _llama(config: Config) -> str | None:
    width = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim", width) not in (None, width):
        return f"it takes Llama's heads for {width} wide, and they are {config['head_dim']}"
    return _unscaled("Llama", config)


def _qwen3(config: Config) -> str | None:
    if abs(config.get("rms_norm_eps", 1e-6) - 1e-6) > 1e-9:
        return "it normalizes Qwen3's queries and keys with an epsilon of 1e-06 alone"
    return _unscaled("Qwen3", config)


def _gemma3(config: Config) -> str | None:
    width = config.get("head_dim", 256)
    if config.get("query_pre_attn_scalar", width) != width:
        return "it scales Gemma 3's scores by head_dim, and this model by query_pre_attn_scalar"
    if config.get("final_logit_softcapping") or config.get("attn_logit_softcapping"):
        return "it does not cap Gemma 3's logits"
    return _unscaled("Gemma 3", config)


def _untried(_config: Config) -> str | None:
    return None


# By `architectures` of config.json.
_MODELS: dict[str, Callable[[Config], str | None]] = {
    "LlamaForCausalLM": _llama,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma3ForCausalLM": _gemma3,
    "Gemma3ForConditionalGeneration": _gemma3,
    **dict.fromkeys(
        (
            "Qwen3_5ForCausalLM",
            "Qwen3_5ForConditionalGeneration",
            "Qwen3_5MoeForCausalLM",
            "Qwen3_5MoeForConditionalGeneration",
            "Qwen3NextForCausalLM",
            "Gemma4ForCausalLM",
            "Gemma4ForConditionalGeneration",
            "Glm4MoeLiteForCausalLM",
            "Cohere2MoeForCausalLM",
            "NemotronHForCausalLM",
        ),
        _untried,
    ),
}
# By a part of the architecture's name, Ollama's own choice first.
_RENDERERS = (
    ("qwen3_5", (("qwen3.5", "qwen3.5"), ("qwen3.8", "qwen3.5"))),
    ("qwen3next", (("qwen3.5", "qwen3.5"), ("qwen3-vl-instruct", "qwen3-vl-instruct"))),
    (
        "qwen3",
        (
            ("qwen3-vl-instruct", "qwen3-vl-instruct"),
            ("qwen3-vl-thinking", "qwen3-vl-thinking"),
            ("qwen3-coder", "qwen3-coder"),
            ("qwen3.5", "qwen3.5"),
        ),
    ),
    ("gemma4", (("gemma4-small", "gemma4"), ("gemma4-large", "gemma4"))),
    ("glm4", (("glm-4.7", "glm-4.7"),)),
    ("cohere2", (("cohere", "cohere"),)),
    ("nemotron", (("nemotron-3-nano",) * 2, ("nemotron-3.5-nano",) * 2)),
)


@dataclass(frozen=True)
class Choice:
    """Which of Ollama's engines a model is handed to.

    Attributes:
        engine: `gguf` or `mlx`.
        why: in a sentence.
        chosen: whether that was left open, and is to be said.
    """

    engine: str
    why: str
    chosen: bool = True


def choose(
    asked: str,
    type_: str,
    config: Callable[[], Config],
    *,
    to: str | None,
    option: str | None = None,
) -> Choice:
    """Which engine a model is for.

    Args:
        asked: of `ENGINES`.
        type_: what its weights are to be; `auto` where nobody says.
        config: gives that of the model.
        to: the program that it is handed to.
        option: one that was given and is of GGUFs.
    """
    if asked != "auto":
        return Choice(asked, "as asked for", chosen=False)
    if type_ in TYPES or type_ == KEEP:
        return Choice("mlx", f"{type_} is a type of its MLX engine", chosen=False)
    if to != "ollama":
        return Choice("gguf", "the GGUF is for any program", chosen=False)
    if type_ != "auto":
        return Choice("gguf", f"{type_} is a type of GGUF")
    if option is not None:
        return Choice("gguf", f"{option} is of GGUFs")
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return Choice("gguf", "Ollama's MLX engine is for Apple silicon")
    version = installed_version()
    if version is None:
        return Choice("gguf", "the MLX engine needs the program ollama, which is not on the PATH")
    if version == (0,):
        return Choice("gguf", "the program ollama does not say its version")
    if version < OLDEST:
        return Choice("gguf", f"Ollama {_dotted(version)} has no MLX engine")
    if said := refusal(config()):
        return Choice("gguf", f"Ollama's MLX engine would not compute this model: {said}")
    return Choice("mlx", f"Ollama {_dotted(version)} runs it in MLX")


def installed_version() -> tuple[int, ...] | None:
    """The version of the program `ollama`; None where there is none, (0,) where it is unknown."""
    program = shutil.which("ollama")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return (0,)
    found = re.findall(r"(\d+)\.(\d+)\.(\d+)", done.stdout + done.stderr)
    # Where the server is another version, the program's own comes last.
    return tuple(map(int, found[-1])) if found else (0,)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
