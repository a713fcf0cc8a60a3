"""Published chat templates, each with a small tokenizer that has its marks.

The tokenizer splits text into bytes and runs of line breaks, as real ones merge those: text on
both sides of a border may share a token.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxtune.arrays import flat
from support import downloads
from support.models import tiny_llama
from support.skips import lacking

# Marks of models, by how they are written. What is not among them is plain text.
_MARKS = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|<｜[^<>｜\s]{1,40}｜>|<\|[a-z_]+>|<[a-z_]+\|>|</?s>|<bos>|<eos>|<sep>"
    r"|<(?:start|end)_of_turn>|<(?:beginning|end)_of_sentence>|\]~!b\[|\]~b\]|\[e~\["
    r"|<seed:(?:bos|eos)>|<SPECIAL_\d+>|</?think>|</?mm:think>|</?(?:seed|think):\w+>"
    r"|\[/?(?:INST|THINK|SYSTEM_PROMPT|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|ARGS)\]"
    r"|\[gMASK\]|<sop>|〈\|EOS\|〉|</?assistant>|</?user>"
)
# What generation stops at, where it is not the tokenizer's end of text or the first mark after
# an answer: of the publishers' generation_config.json.
STOPS = {
    "unsloth-Apriel-1.5": ["<|end|>"],
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ["<|END_OF_TURN_TOKEN|>"],
    "Cohere2MoE": ["<|END_OF_TURN_TOKEN|>"],
    "GLM-4.6": ["<|user|>", "<|observation|>"],
    "GLM-4.7-Flash": ["<|user|>", "<|observation|>"],
    "Kimi-K3": ["<|end_of_msg|>"],
    "openai-gpt-oss-120b": ["<|return|>", "<|call|>"],
    "google-gemma-4-31B-it": ["<turn|>", "<|tool_response>"],
    "google-gemma-4-31B-it-interleaved": ["<turn|>", "<|tool_response>"],
}
BOS, EOS = "<s>", "</s>"


def names() -> list[str]:
    """All of them."""
    return list(downloads.TEMPLATES)


def source(name: str) -> str:
    """A template as it was published; the test is skipped where it has not been fetched."""
    path = downloads.CACHE / "templates" / f"{name}.jinja"
    if not path.is_file():
        lacking(f"no {path.name} in {path.parent}; get it with: {downloads.FETCH}")
    return path.read_text(encoding="utf-8")


def tokenizer(name: str, template: str | None = None) -> TokenizerWrapper:
    """A tokenizer with a template and its marks.

    Args:
        name: of the published template.
        template: instead of it: the same with values at its top.
    """
    own = source(name)
    made = PreTrainedTokenizerFast(tokenizer_object=_core(own), bos_token=BOS, eos_token=EOS)
    made.chat_template = own if template is None else template
    stops = made.convert_tokens_to_ids([EOS, *STOPS.get(name, ())])
    return TokenizerWrapper(made, eos_token_ids=stops)


def save_model(folder: Path, name: str) -> None:
    """A random two-block llama with a template and its marks, as a Hugging Face folder.

    Args:
        folder: is there.
        name: of the published template.
    """
    wrapper = tokenizer(name)
    # A rule of cutting text that GGUF has a name for.
    core = Tokenizer.from_str(wrapper.backend_tokenizer.to_str())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    saved = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS)
    saved.chat_template = wrapper.chat_template
    saved.save_pretrained(folder)
    model = tiny_llama(vocabulary=len(saved))
    config = {k: v for k, v in asdict(model.args).items() if v is not None}
    config |= {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512}
    config |= {"eos_token_id": sorted(wrapper.eos_token_ids)}
    (folder / "config.json").write_text(json.dumps(config))
    weights = flat(model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


@cache
def _core(template: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ")]
    vocab = {piece: n for n, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+| +|[^\n ]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    marks = sorted({BOS, EOS, *_MARKS.findall(template), *_spelled(template)})
    core.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    return core


def _spelled(template: str) -> set[str]:
    """Marks that a template puts together, as Hy3's does."""
    parts = dict(re.findall(r"set (\w+) = '([^']+)'", template))
    put_together = re.findall(r"'([^']*<[^']*\{\}[^']*)'\.format\((\w+)\)", template)
    return {mark.format(parts[part]) for mark, part in put_together if part in parts}
