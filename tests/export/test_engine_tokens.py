"""Tokens as Ollama's MLX engine makes them, beside those that transformers makes.

The reader under test was compared with the real engine by hand: it counted the tokens of 78 texts
alike, those among them that it tokenizes otherwise than transformers does.
"""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Regex, pre_tokenizers

from mlxtune.errors import ExportError
from mlxtune.export.engine_tokens import EngineTokenizer, in_go, misread
from mlxtune.export.mlx_folder import write_tokenizer
from mlxtune.gguf import pretokenizers
from mlxtune.gguf.pretokenizers import PRE_TOKENIZERS
from mlxtune.gguf.tokenizer import read_tokenizer
from support.properties import examples
from support.vocabularies import HARD, metadata, pages, pre_tokenizers_with_own_rule

# Read as transformers reads them, if written as GGUFs name them.
READ = (
    *("llama-bpe", "glm4", "smaug-bpe", "qwen2", "gpt-4o", "granite-embed-multi-97m"),
    *("tekken", "tiny_aya", "ufakzeka", "exaone-moe", "minicpm5"),
)
INDENTED = "def f(x):\n    return x\n\n  # so"
# But for the last of several spaces, which belongs to what comes after it: where a line break
# is among them, or before punctuation, the engine leaves it with the others.
NEARLY_READ = {
    "gpt-2": r"[\r\n]\s*[ \t][^\s\d]",
    "smollm": r"[\r\n]\s*[ \t][^\s\d]",
    "qwen35": r"\s [^\s\w]",
    "seed-coder": r"\s [^\s\w]",
}


def saved(folder, pre):
    """A tokenizer of any vocabulary that cuts text so, and its folder."""
    tokenizer = read_tokenizer(
        metadata("deepseek-coder") | {"tokenizer.ggml.pre": pre}, where="x.gguf"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("pre", pre_tokenizers_with_own_rule())
def test_every_rule_is_read_as_transformers_reads_it_or_found_to_differ(pre, tmp_path):
    tokenizer = saved(tmp_path, pre)
    engine = EngineTokenizer(tmp_path)
    texts = [*pages()[:100], *HARD]
    if pre in READ:
        assert misread(engine, tokenizer, [*texts, INDENTED]) is None
    elif pre in NEARLY_READ:
        usual = [text for text in texts if not re.search(NEARLY_READ[pre], text)]
        assert len(usual) > 90 and misread(engine, tokenizer, usual) is None
        assert misread(engine, tokenizer, [INDENTED]) == INDENTED
    else:
        assert misread(engine, tokenizer, texts) is not None


@pytest.mark.parametrize("name", [pytest.param("gemma-3", marks=pytest.mark.slow), "llama-spm"])
def test_pieces_with_spaces_of_their_own_are_read_or_found_to_differ(name, tmp_path):
    tokenizer = read_tokenizer(metadata(name), where=name)
    tokenizer.save_pretrained(tmp_path)
    found = misread(EngineTokenizer(tmp_path), tokenizer, [*pages()[:50], *HARD])
    # Llama 2's puts a space before the text, of which the engine knows nothing.
    assert (found is None) == (name == "gemma-3")


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
DIGITS = "find . -mtime -14 -size +250M"


@pytest.fixture
def apart() -> TokenizerWrapper:
    """A tokenizer that keeps digits apart, as publishers write it, though its vocabulary has
    numbers of several digits."""
    values = metadata("gpt-2") | {"tokenizer.ggml.pre": "smollm"}
    fast = read_tokenizer(values, where="x.gguf")
    fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    return TokenizerWrapper(fast)


def test_digits_as_publishers_keep_them_apart_are_misread(apart, tmp_path):
    apart.save_pretrained(tmp_path)
    assert misread(EngineTokenizer(tmp_path), apart._tokenizer, [DIGITS]) == DIGITS


def test_what_is_misread_is_written_otherwise(apart, tmp_path):
    other = write_tokenizer(tmp_path, apart, CONFIG, tmp_path, [DIGITS])
    # What it still reads otherwise is told: text with spaces behind line breaks.
    assert other is not None and "\n" in other
    engine = EngineTokenizer(tmp_path)
    assert misread(engine, apart._tokenizer, [DIGITS, *pages()[:50]]) is None


def test_what_cannot_be_read_as_it_was_trained_is_refused(apart, tmp_path):
    with pytest.raises(ExportError, match="other tokens than were trained") as raised:
        write_tokenizer(tmp_path, apart, CONFIG, tmp_path, [INDENTED])
    assert "--engine gguf" in raised.value.remedy


@pytest.mark.parametrize(
    ("rule", "known"),
    [
        (r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+", True),
        (r"(?i:'s|'t)|\s+(?!\S)|\s+", True),
        (r"[?!=]+\?+", True),
        (r"\p{L}+(?=\p{N})", False),
        (r"\p{L}+(?!\p{N})", False),
        (r"(?<=\p{L})\p{N}", False),
        (r"(?<!\p{L})\p{N}", False),
        (r"\p{L}++", False),
        (r"(?>\p{L}+)", False),
    ],
)
def test_what_go_can_express(rule, known):
    assert in_go(rule) is known


def test_other_kinds_of_tokenizers_are_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}')
    with pytest.raises(ExportError, match="Unigram"):
        EngineTokenizer(tmp_path)


def test_where_texts_begin_and_answers_end_is_read_in_the_engines_order(tmp_path):
    saved(tmp_path, "llama-bpe")

    def read(**files):
        for name in ("generation_config", "config", "tokenizer_config"):
            (tmp_path / f"{name}.json").write_text(json.dumps(files.get(name, {})))
        engine = EngineTokenizer(tmp_path)
        return engine.begin, engine.ends

    assert read(generation_config={"eos_token_id": [5, 6]}, config={"eos_token_id": 7}) == (
        None,
        (5, 6),
    )
    adds = {"add_bos_token": True}
    assert read(config={"eos_token_id": 7, "bos_token_id": 3}, tokenizer_config=adds) == (3, (7,))
    marks = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    said = adds | {"bos_token": {"content": marks[0]["content"]}}
    said |= {"eos_token": marks[1]["content"]}
    assert read(tokenizer_config=said) == (marks[0]["id"], (marks[1]["id"],))


def by_one_after_the_other(rules):
    splits = [pre_tokenizers.Split(Regex(rule), behavior="isolated") for rule in rules]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, letters])


@pytest.mark.parametrize("pre", [n for n, e in PRE_TOKENIZERS.items() if e.alone is not None])
def test_a_rule_that_stands_alone_cuts_as_those_it_is_for(pre):
    """In Hugging Face's reader, which applies both that are written."""
    plain, ours = by_one_after_the_other(PRE_TOKENIZERS[pre].rules), pretokenizers.build(pre)

    @examples(200)
    @given(st.text(alphabet="ab 1٣9\n\t.'sé日\u00a0", max_size=30))
    def check(text):
        assert ours.pre_tokenize_str(text) == plain.pre_tokenize_str(text)

    check()
    for text in HARD:
        assert ours.pre_tokenize_str(text) == plain.pre_tokenize_str(text)
