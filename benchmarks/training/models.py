"""Model folders that both trainers load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
from training.workloads import SMOLLM2

from mlxtune.arrays import flat
from mlxtune.layers.inject import dequantize_layers, own_quantized_layers
from mlxtune.models.load import DTYPES, load_model
from mlxtune.models.resolve import resolve_model

# Config of google/gemma-3-270m. Its weights do not matter here, so they are random.
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 640,
    "num_hidden_layers": 18,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "vocab_size": 262144,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


def make_models(folder: Path, dtype: str = "float32") -> None:
    """Make the folders `smollm2`, `smollm2-4bit` and `gemma3`, in a float type."""
    packed, gemma = (folder / n for n in ("smollm2-4bit", "gemma3"))
    plain = make_smollm2(folder, dtype)
    if not packed.exists():
        mlx_lm.convert(str(plain), str(packed), quantize=True, q_bits=4, q_group_size=64)
    if not gemma.exists():
        model_class, args_class = mlx_lm.utils._get_classes(GEMMA3)
        mx.random.seed(0)
        model = model_class(args_class.from_dict(GEMMA3))
        model.set_dtype(DTYPES[dtype])
        # mlx-lm makes a head for it, and takes the embedding where the folder has none.
        arrays = flat(model.parameters())
        del arrays["lm_head.weight"]
        _save(gemma, arrays, GEMMA3)
        for file in plain.glob("*token*"):
            shutil.copy(file, gemma)


def make_smollm2(folder: Path, dtype: str = "float32") -> Path:
    """Make the folder `smollm2`, its weights expanded to a float type; its path."""
    path = folder / "smollm2"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        base = load_model(resolve_model(SMOLLM2), dtype=dtype)
        own_quantized_layers(base.model)
        dequantize_layers(base.model, DTYPES[dtype])
        _save(path, flat(base.model.parameters()), base.config)
        base.tokenizer.save_pretrained(path)
    return path


def _save(folder: Path, arrays: dict[str, mx.array], config: dict[str, object]) -> None:
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
