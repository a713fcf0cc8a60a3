"""A small random model with a tokenizer of bytes, and records for it: nothing is downloaded."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxtune.arrays import flat
from mlxtune.data.render import Sample
from mlxtune.device import on_cpu

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|im_start|>", "<|im_end|>")
_BYTES = 256
_VOCABULARY = _BYTES + len(_SPECIAL)
# A GPU has fast kernels for heads of 64, and packs weights in groups of 64 at most.
_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


@cache
def scratch() -> Path:
    """A folder for what checks write; it goes with the process."""
    folder = TemporaryDirectory(prefix="mlxtune-check-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[TemporaryDirectory[str]] = []


@cache
def model_folder() -> Path:
    """The model, as a Hugging Face folder."""
    folder = scratch() / "model"
    folder.mkdir()
    _save_tokenizer(folder)
    sizes = {"model_type": "llama", "num_hidden_layers": 2 if on_cpu() else 4, **_SIZES}
    config = sizes | {"architectures": ["LlamaForCausalLM"], "eos_token_id": _VOCABULARY - 1}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = flat(llama.Model(llama.ModelArgs.from_dict(sizes)).parameters())
    random = np.random.default_rng(0)
    filled = {
        name: mx.array(random.standard_normal(array.shape, np.float32) / array.shape[-1] ** 0.5)
        if array.ndim == 2
        else mx.ones(array.shape)
        for name, array in weights.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), filled, {"format": "mlx"})
    return folder


def _save_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(_SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=_SPECIAL[1])
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)


@cache
def records() -> Path:
    """Requests and answers, as a file of JSON lines."""
    file = scratch() / "records.jsonl"
    lines = [
        {"prompt": f"List folder {name}", "completion": f"ls -la {name}"}
        for name in (letter * count for letter in "abcdefgh" for count in (1, 3, 5))
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def samples() -> list[Sample]:
    """Tokens that count up, in rows of several lengths; the second half of each is trained."""
    lengths = (24, 40, 31, 18) if on_cpu() else (120, 90, 60, 200, 33, 80, 150, 40)
    made = []
    for number, length in enumerate(lengths, start=1):
        tokens = (np.arange(length) * 3 + 11 * number) % 64
        weights = (np.arange(length) >= length // 2).astype(np.float32)
        made.append(Sample(tokens.astype(np.int32), weights, number))
    return made
