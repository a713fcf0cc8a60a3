"""How text is cut before byte-level BPE merges it, under llama.cpp's names.

GGUF names the rule (`tokenizer.ggml.pre`) where tokenizer.json spells it out. Rules are
regular expressions applied one after the other, each cutting the pieces of the one
before. They are facts of llama.cpp's `llama-vocab.cpp`; where a tokenizer.json has the
form that llama.cpp's engine approximates, its form is the one here.

Known limits, all of llama.cpp's engine: `tekken` and `gpt-4o` treat combining marks, and
capitals outside ASCII, unlike the tokenizer's own rule; `deepseek-llm` and
`deepseek-coder` the ideographic space; `afmoe` and `tiny_aya` what stands next to digits.
`kimi-k2`, `superbpe` and the names that are not byte-level (`gemma4`,
`granite-embed-multi-311m`, `sarvam-moe`, `whitespace`) are not here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_EITHER_CASE = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_NUMBERS = r"| ?\p{N}+"
_LLAMA3 = rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_QWEN35 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_GPT4O = rf"{_EITHER_CASE}{_ENDINGS}?|{_CAPITALS}{_ENDINGS}?|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}"
_TEKKEN = rf"{_EITHER_CASE}|{_CAPITALS}|\p{{N}}|{_PATHS}|{_SPACES}"
_YOUTU = rf"{_EITHER_CASE}{_ENDINGS}?|{_CAPITALS}{_ENDINGS}?|\p{{N}}|{_PATHS}|{_SPACES}"
_DEEPSEEK3 = (
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_SPARK = (
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
)
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"

# Letters with case, of the scripts that have it.
_CASED = (
    r"A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text.

    Attributes:
        rules: regular expressions, in order; what one does not match stays a piece.
        ignore_merges: a piece that is a token is taken whole, whatever the merges say.
        adds_bos: what llama.cpp does where the GGUF does not say.
        alone: one regular expression that comes to the same, for readers of tokenizer.json that
            apply no more than one; None where there is no other than `rules[0]`.
    """

    rules: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    alone: str | None = None


# Of the names with the same rule, the first is the one written.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {}


def _enter(
    names: str,
    *rules: str,
    ignore_merges: bool = False,
    adds_bos: bool = False,
    alone: str | None = None,
) -> None:
    entry = PreTokenizer(rules, ignore_merges, adds_bos, alone)
    PRE_TOKENIZERS.update(dict.fromkeys(names.split(), entry))


_enter(
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    _LLAMA3,
    ignore_merges=True,
    adds_bos=True,
)
_enter("glm4", _LLAMA3, ignore_merges=True)
_enter("smaug-bpe dbrx chatglm-bpe", _LLAMA3)
_enter("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _QWEN2)
_enter("qwen35", _QWEN35)
_enter("bailingmoe bailingmoe2 llada-moe", _QWEN2)
_enter(
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt "
    "olmo jais trillion granite-docling exaone4 jina-v1-en jina-v2-code roberta-bpe",
    _GPT2,
)
_enter(
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    r"\p{N}",
    _GPT2,
    alone=rf"\p{{N}}|{_GPT2.replace(_NUMBERS, '')}",
)
_enter("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O)
_enter("granite-embed-multi-97m", _GPT4O, ignore_merges=True)
_enter("tekken", _TEKKEN, ignore_merges=True, adds_bos=True)
_enter("falcon", _PUNCTUATION, _GPT2, "[0-9][0-9][0-9]")
_enter("deepseek-v3 hunyuan-dense joyai-llm hy_v4", r"\p{N}{1,3}", _KANA, _DEEPSEEK3)
_enter(
    "deepseek-llm",
    r"[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
    r"\p{N}+",
)
_enter("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
_enter("spark2_5", r"\p{N}{1,3}", _KANA, _SPARK, r"\p{N}")
_enter(
    "youtu",
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    f"|[\u3105-\u312f]+|{_KANA}",
    _YOUTU,
    ignore_merges=True,
)
_enter(
    "jais-2",
    rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+|"
    + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s{1}",
)
_enter("poro-chat bloom gpt3-finnish", _BLOOM)
_enter("viking", _BLOOM, r"\p{N}")
_enter(
    "chameleon",
    "<sentinel:[0-9]+>",
    "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
    adds_bos=True,
)
_enter("tiny_aya cohere2moe", r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)
_enter(
    "seed-coder",
    rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
)
_enter("ufakzeka", rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}")
_enter(
    "afmoe",
    _FROM_THE_RIGHT,
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af"
    "\u1100-\u11ff]+",
    _DEEPSEEK3,
)
_enter("laguna", r"[^\n]+|[\n]+", _QWEN2)
_enter(
    "exaone-moe",
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
)
_enter(
    "minicpm5",
    r"\p{N}{1,3}",
    rf"{_ENDINGS}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACES}",
    ignore_merges=True,
    alone=_LLAMA3,
)
# What llama.cpp takes where the GGUF does not name a rule.
_enter("default", r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

# Before a rule for digits it changes nothing.
_AHEAD = r"(?=\p{N})"
# Other spellings that cut the same way: possessive quantifiers change nothing where the
# next part of the rule cannot match what they hold, and `\s*` takes new lines, too.
_SPELLINGS = (
    (_AHEAD, ""),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _ENDINGS),
    (r"'(?i:[sdmt]|ll|ve|re)", _ENDINGS),
    (r"[^\r\n\p{L}\p{N}]?+", r"[^\r\n\p{L}\p{N}]?"),
    (r"[^\s\p{L}\p{N}]++", r"[^\s\p{L}\p{N}]+"),
    (r"|\s*[\r\n]|\s+(?!\S)|\s+", rf"|{_SPACES}"),
    ("\r", r"\r"),
    ("\n", r"\n"),
)


def build(name: str) -> Any:
    """The pre-tokenizer of a name in `PRE_TOKENIZERS`, bytes spelled as characters."""
    splits = [pre_tokenizers.Split(Regex(rule), behavior="isolated") for rule in _spelled(name)]
    return pre_tokenizers.Sequence([*splits, _bytes_only()])


def as_json(name: str) -> Any:
    """The same as tokenizer.json has it."""
    return json.loads(_holder(build(name)).to_str())["pre_tokenizer"]


def _spelled(name: str) -> tuple[str, ...]:
    """A name's rules, the only ones that a reader without look-ahead takes last where it can.

    Ollama's MLX engine takes the first rule of several that Go's regular expressions know,
    which have no look-ahead, and drops what that one does not match: all but digits, if it is
    the one that cuts digits apart.
    """
    entry = PRE_TOKENIZERS[name]
    if entry.alone is None:
        return entry.rules
    [digits, _] = entry.rules
    return _AHEAD + digits, entry.alone


def recognise(core: Tokenizer) -> str | None:
    """llama.cpp's name for the way a byte-level BPE tokenizer cuts text, if it has one."""
    rules = _rules(json.loads(_holder(core.pre_tokenizer).to_str())["pre_tokenizer"])
    if rules is None:
        return None
    backwards = list(reversed(PRE_TOKENIZERS.items()))
    named = {
        (_spelled_alike(_spelled(name)), entry.ignore_merges): name for name, entry in backwards
    } | {_flag(entry): name for name, entry in backwards}
    wanted = (_spelled_alike(rules), bool(core.model.ignore_merges))
    if wanted in named:
        return named[wanted]
    other = named.get((wanted[0], not wanted[1]))
    # Taking a piece whole is no different where merging it gives the same token.
    return other if other and _merges_reach_every_token(core) else None


def _flag(entry: PreTokenizer) -> tuple[tuple[str, ...], bool]:
    return _spelled_alike(entry.rules), entry.ignore_merges


def _spelled_alike(rules: Iterable[str]) -> tuple[str, ...]:
    alike = []
    for rule in rules:
        for spelling, ours in _SPELLINGS:
            rule = rule.replace(spelling, ours)
        alike.append(rule)
    return tuple(alike)


def _rules(part: Any) -> list[str] | None:
    """Regular expressions that cut as a pre-tokenizer of tokenizer.json does.

    `None`: there are none, or it does not spell bytes as characters, or puts a space
    before the text, which llama.cpp does not.
    """
    parts = part["pretokenizers"] if part and part["type"] == "Sequence" else [part]
    found: list[str] = []
    for one in parts:
        rules = _rule(one)
        if rules is None:
            return None
        found += rules
    return found if any(one and one["type"] == "ByteLevel" for one in parts) else None


def _rule(part: Any) -> list[str] | None:
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": own_rule}:
            return [_GPT2] if own_rule else []
        case {"type": "Digits", "individual_digits": True}:
            return [r"\p{N}"]
        case {"type": "Digits"}:
            return [r"\p{N}+"]
        case {"type": "Punctuation", "behavior": "Contiguous"}:
            return [_PUNCTUATION]
        case {"type": "Split", "pattern": {"Regex": rule}, "behavior": behavior, "invert": invert}:
            # Keeping the matches and dropping what is between them is the same for a rule
            # that matches everything.
            isolated = behavior == "Isolated" and not invert
            complete = behavior == "Removed" and invert and rule.endswith(r"|\s+")
            return [rule] if isolated or complete else None
    return None


def _merges_reach_every_token(core: Tokenizer) -> bool:
    added = core.get_added_tokens_decoder()
    plain = (t for t, i in core.get_vocab(with_added_tokens=False).items() if i not in added)
    saved, core.model.ignore_merges = core.model.ignore_merges, False
    try:
        return all(len(core.model.tokenize(token)) == 1 for token in plain)
    finally:
        core.model.ignore_merges = saved


def _bytes_only() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _holder(pre: Any) -> Tokenizer:
    """The wrapper has no public way to its JSON but through a tokenizer that holds it."""
    holder = Tokenizer(models.BPE())
    holder.pre_tokenizer = pre
    return holder
