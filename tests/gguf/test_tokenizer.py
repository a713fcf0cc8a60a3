"""Tokenizers in GGUF, both ways, judged by llama.cpp, by its golden cases and by Hugging Face."""

from __future__ import annotations

import copy
import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxtune.errors import ExportError, ModelError
from mlxtune.gguf import fingerprints, pretokenizers
from mlxtune.gguf.pretokenizers import PRE_TOKENIZERS
from mlxtune.gguf.sentencepiece import sentencepiece_metadata
from mlxtune.gguf.tokenizer import read_tokenizer, tokenizer_metadata
from support import downloads
from support.downloads import CACHE, GOLDEN, REFUSED, UNTOLD
from support.llama_vocab import LlamaVocab
from support.properties import examples
from support.vocabularies import HARD, metadata, pages, pre_tokenizers_with_own_rule

GGML = "tokenizer.ggml."
SLOW = pytest.mark.slow
# Rows of the embedding, where they are not the tokens counted.
ROWS = {"gemma3": 262144, "gemma4": 262144, "phi3": 32064, "qwen3": 151936}
# "gemma4" is Gemma 3's written as files of Gemma 4 have theirs: by merges.
HUB = ("qwen3", "llama3_1", "gemma3", "gemma4", "nemo", "phi3")
FILES = (*GOLDEN, *UNTOLD, "gemma-3")
# Without those of the same tokens as another, which take seconds each.
DISTINCT = tuple(name for name in FILES if name not in ("qwen35", "mpt"))


# One of each kind: by merges, by scores, with a rule of its own, with bytes to fall back to.
FEW = ("llama-bpe", "llama-spm", "qwen2", "phi-3", "qwen3", "phi3")


def each(names):
    """All names; those of `FEW` are fast tests, the others take seconds each."""
    return [name if name in FEW else pytest.param(name, marks=SLOW) for name in names]


# ------------------------------------------------------------------------ what is judged


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return read_tokenizer(metadata(name), where=name)


def from_hub(name: str) -> PreTrainedTokenizerFast:
    return downloads.load("gemma3" if name == "gemma4" else name)


@cache
def written(name: str) -> dict[str, Any]:
    """Metadata made of one of the hub's tokenizers. Do not change it."""
    hub = from_hub(name)
    values = tokenizer_metadata(hub, ROWS.get(name, len(hub)), merged=name == "gemma4")
    assert (values[f"{GGML}model"] == "gemma4") == (name == "gemma4")
    # llama.cpp needs the name to know that Phi-3's marks swallow white space.
    return values | {"general.name": "phi-3" if name == "phi3" else name}


@cache
def rewritten(name: str) -> dict[str, Any]:
    """Metadata of a GGUF, read and written. Do not change it."""
    merged = metadata(name)[f"{GGML}model"] == "gemma4"
    return tokenizer_metadata(tokenizer(name), len(metadata(name)[f"{GGML}tokens"]), merged=merged)


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory) -> Iterator[Callable[[dict[str, Any]], LlamaVocab]]:
    folder = tmp_path_factory.mktemp("vocabularies")
    made: dict[int, tuple[dict[str, Any], LlamaVocab]] = {}

    def judge(values: dict[str, Any]) -> LlamaVocab:
        if id(values) not in made:
            made[id(values)] = values, LlamaVocab(values, folder)
        return made[id(values)][1]

    yield judge
    for _, vocab in made.values():
        vocab.close()


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def differing(tokenizer: PreTrainedTokenizerFast, vocab: LlamaVocab, texts: list[str]) -> list[str]:
    return [text for text in texts if ids(tokenizer, text) != vocab(text)]


# ------------------------------------------------------------------------ from GGUF


@pytest.mark.parametrize("name", each(GOLDEN))
def test_golden_texts_have_llama_cpps_ids(name):
    ours = tokenizer(name) if metadata(name) else None
    texts, expected = downloads.golden(name)
    assert len(texts) > 40
    assert [ids(ours, text) for text in texts] == expected


@pytest.mark.parametrize("name", each(FILES))
def test_a_vocabulary_read_tokenizes_as_llama_cpp_does(name, llama_cpp):
    vocab = llama_cpp(metadata(name))
    assert differing(tokenizer(name), vocab, pages() + HARD) == []


@pytest.mark.parametrize("name", each(FILES))
def test_marks_around_a_text_are_llama_cpps(name, llama_cpp):
    vocab = llama_cpp(metadata(name))
    for text in ("a", " b c"):
        assert tokenizer(name)(text).input_ids == vocab(text, add_special=True)


@pytest.mark.parametrize("name", each(DISTINCT))
def test_text_is_decoded_as_it_was(name):
    for text in pages()[:100]:
        assert tokenizer(name).decode(ids(tokenizer(name), text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("pre", pre_tokenizers_with_own_rule())
def test_every_rule_cuts_as_llama_cpps_of_that_name(pre, llama_cpp):
    """Any vocabulary shows where text is cut; this one is small."""
    values = metadata("deepseek-coder") | {f"{GGML}pre": pre}
    texts = pages()[:100] + HARD
    if pre == "tiny_aya":  # the test text has digits next to letters: see the known limits
        texts.remove(fingerprints.TEXT)
    with llama_cpp(values) as vocab:
        assert differing(read_tokenizer(values, where=pre), vocab, texts) == []


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_llama_cpp_knows_every_name_by_the_same_rule(pre, llama_cpp):
    tokens = [chr(c) for c in range(256, 512)] + [chr(c) for c in range(33, 256)]
    values = {
        f"{GGML}model": "gpt2",
        f"{GGML}pre": pre,
        f"{GGML}tokens": [*tokens, "ab", "abc", "<mask>"],
        f"{GGML}token_type": [int(TokenType.NORMAL)] * (len(tokens) + 3),
        f"{GGML}merges": ["a b"],
        f"{GGML}bos_token_id": 0,
    }
    with llama_cpp(values) as vocab:
        read = read_tokenizer(values, where=pre)
        # Whether a whole piece is taken before merging, and whether a begin mark is put.
        assert ids(read, "abc") == vocab("abc")
        assert read("abc").input_ids == vocab("abc", add_special=True)


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_are_refused_by_name(name):
    with pytest.raises(ModelError, match=metadata(name)[f"{GGML}model"]) as caught:
        read_tokenizer(metadata(name), where="x.gguf")
    assert caught.value.where == "x.gguf"


def test_a_pre_tokenizer_not_known_is_refused_by_name():
    with pytest.raises(ModelError, match="superbpe") as caught:
        read_tokenizer(metadata("gpt-2") | {f"{GGML}pre": "superbpe"}, where="x.gguf")
    assert caught.value.where == "x.gguf"
    assert "llama-bpe" in caught.value.remedy


# ------------------------------------------------------------------------ to GGUF


@pytest.mark.slow
@pytest.mark.parametrize("name", each(HUB))
def test_a_hub_tokenizer_is_written_so_that_llama_cpp_tokenizes_alike(name, llama_cpp):
    hub, vocab = from_hub(name), llama_cpp(written(name))
    texts = pages() + HARD
    if name == "qwen3":
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    if name == "nemo":  # llama.cpp's rule has no combining marks: see the known limits
        texts = [t for t in texts if not any(unicodedata.category(c)[0] == "M" for c in t)]
    assert differing(hub, vocab, texts) == []


@pytest.mark.parametrize("name", each(HUB))
def test_marks_put_around_a_text_are_those_of_the_hub_tokenizer(name, llama_cpp):
    hub, vocab = from_hub(name), llama_cpp(written(name))
    for text in ("a", " b c"):
        assert list(hub(text).input_ids) == vocab(text, add_special=True)


CHAT = [
    {"role": "user", "content": "Hello  world\n"},
    {"role": "assistant", "content": "Hi!\n\n    x = 1"},
    {"role": "user", "content": "日本?"},
    {"role": "assistant", "content": "ß"},
]


@pytest.mark.parametrize("name", each(HUB))
def test_a_chat_has_the_same_ids_and_stops_where_its_answers_end(name, llama_cpp):
    hub, vocab = from_hub(name), llama_cpp(written(name))
    text = hub.apply_chat_template(CHAT, tokenize=False)
    chat = ids(hub, text)
    assert chat == vocab(text)
    assert written(name)["tokenizer.chat_template"] == hub.chat_template
    after_answer = ids(hub, text.rpartition("ß")[2])
    assert vocab.ends(after_answer[0])


@pytest.mark.parametrize("name", each(HUB))
def test_a_hub_tokenizer_written_and_read_is_the_same_tokenizer(name):
    hub, back = from_hub(name), read_tokenizer(written(name), where=name)
    for text in pages()[:300] + HARD:
        text = unicodedata.normalize("NFC", text) if name == "qwen3" else text
        assert ids(back, text) == ids(hub, text)
        assert back(text).input_ids == list(hub(text).input_ids)
        assert back.decode(ids(back, text)) == hub.decode(ids(hub, text))
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(back, f"{role}_token_id") == getattr(hub, f"{role}_token_id")
    assert back.chat_template == hub.chat_template
    if name in ("qwen3", "phi3"):  # the larger ones are written again from a GGUF, below
        again = tokenizer_metadata(back, len(written(name)[f"{GGML}tokens"]))
        assert again | {"general.name": written(name)["general.name"]} == written(name)


@pytest.mark.slow
def test_types_of_a_hub_vocabulary():
    hub = from_hub("gemma3")
    tokens, types = (written("gemma3")[f"{GGML}{key}"] for key in ("tokens", "token_type"))
    for number, token in hub.backend_tokenizer.get_added_tokens_decoder().items():
        if number < len(types):  # <image_soft_token> has no row in the text model
            kind = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
            assert types[number] == kind
    numbers = [i for i, type_ in enumerate(types) if type_ == TokenType.BYTE]
    assert [tokens[i] for i in numbers] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert len(tokens) == len(types) == len(written("gemma3")[f"{GGML}scores"]) == 262144


def test_a_token_that_the_template_writes_needs_its_row():
    small = with_parts()
    small.add_tokens(["<image>"])
    assert "<image>" not in tokenizer_metadata(small, 256)[f"{GGML}tokens"]
    assert tokenizer_metadata(small, 257)[f"{GGML}tokens"][256] == "<image>"
    small.chat_template = "<image>"
    with pytest.raises(ExportError, match="257 tokens"):
        tokenizer_metadata(small, 256)


# ------------------------------------------------------------------------ there and back

# Where GGUF -> tokenizer -> GGUF gives another value, and why that is the same.
SILENT = {  # the file leaves out what llama.cpp takes by default, and we say it
    f"{GGML}add_bos_token",
    f"{GGML}add_eos_token",
    f"{GGML}unknown_token_id",
}
SAID = {f"{GGML}add_eos_token": False, f"{GGML}add_sep_token": False}  # and the other way round
SAME_RULE = {"command-r", "refact", "starcoder"}  # names of one rule: the first is written
OLD = {  # of old converters, that did not mark padding as unused or wrote needless scores
    "phi-3": {"token_type", "scores"},
    "aquila": {"scores", "token_type"},
    "gemma-4": {"scores"},
    "qwen2": {"token_type"},
    "refact": {"token_type"},
    # SentencePiece says "unknown" of <unk>, tokenizer.json only "special".
    "llama-spm": {"scores", "token_type"},
    "baichuan": {"scores", "token_type"},
    "gemma-3": {"scores"},  # in the same order: the next test
}


@pytest.mark.slow
@pytest.mark.parametrize("name", each(DISTINCT))
def test_a_vocabulary_read_and_written_is_the_same_metadata(name):
    want = {k: v for k, v in metadata(name).items() if k.startswith("tokenizer.")}
    got = rewritten(name)
    assert got[f"{GGML}tokens"] == want[f"{GGML}tokens"]
    for key in want.keys() | got.keys():
        short = key.removeprefix(GGML)
        if got.get(key) == want.get(key) or short in OLD.get(name, ()):
            continue
        if key not in want:
            # Where a chat ends is told where the text says it, too.
            assert key in SILENT or short in ("pre", "eot_token_id"), key
        elif key not in got:
            assert want[key] is SAID[key]
        else:
            assert short == "pre" and name in SAME_RULE
            assert PRE_TOKENIZERS[got[key]].rules == PRE_TOKENIZERS[want[key]].rules


@pytest.mark.parametrize("name", each(["gemma-3", "llama-spm", "baichuan"]))
def test_scores_are_in_the_same_order(name):
    """Only the order counts, and only of tokens that two others make."""
    got, want = rewritten(name)[f"{GGML}scores"], metadata(name)[f"{GGML}scores"]
    lowest = min(got)
    made = [i for i, score in enumerate(got) if score > lowest]
    assert len(made) > 29_000
    assert sorted(made, key=lambda i: -got[i]) == sorted(made, key=lambda i: -want[i])


# ------------------------------------------------------------------------ random text

ASSIGNED = st.characters(exclude_categories=("Cs", "Cn", "Co"), max_codepoint=0x2FFFF)
COMMON = st.sampled_from("  aAbBzZeéÄß'sS012389.,!?-_/<>\n\t\r\u00a0\u3000日กखàǅʰªि\u0301\u200d🦙▁")
any_text = st.text(st.one_of(COMMON, COMMON, ASSIGNED), max_size=40)


@pytest.mark.parametrize("name", each(["llama-bpe", "qwen2", "phi-3", "gemma-3"]))
def test_any_text_read(name, llama_cpp):
    vocab = llama_cpp(metadata(name))
    ours = tokenizer(name)

    @examples(300)
    @given(any_text)
    def check(text: str) -> None:
        assert ids(ours, text) == vocab(text)

    check()


@pytest.mark.parametrize("name", each(["qwen3", "llama3_1", "gemma3"]))
def test_any_text_written(name, llama_cpp):
    vocab = llama_cpp(written(name))
    hub = from_hub(name)

    @examples(300)
    @given(any_text)
    def check(text: str) -> None:
        text = unicodedata.normalize("NFC", text) if name == "qwen3" else text
        assert ids(hub, text) == vocab(text)

    check()


# ------------------------------------------------------------------------ whose rule it is


def with_parts(pre: Any = None, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of single bytes that cuts text in the given way."""
    alphabet = {token: i for i, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer:
        core.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=core)


def split(rule: str, behavior: str = "isolated", *, invert: bool = False) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule), behavior, invert=invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (split(LLAMA3), "llama-bpe"),
        (split(LLAMA3, "removed", invert=True), "llama-bpe"),
        (split(CL100K), "llama-bpe"),
        (split(LLAMA3.replace("{1,3}", "")), "qwen2"),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
            ),
            "smollm",
        ),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Punctuation("contiguous"),
                    pre_tokenizers.ByteLevel(False),
                    pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
                ]
            ),
            "falcon",
        ),
    ],
)
def test_a_rule_is_recognised_however_it_is_spelled(pre, name):
    core = with_parts(pre).backend_tokenizer
    core.model.ignore_merges = PRE_TOKENIZERS[name].ignore_merges
    assert pretokenizers.recognise(core) == name


def test_every_rule_of_the_table_is_recognised():
    for name, entry in PRE_TOKENIZERS.items():
        core = with_parts(pretokenizers.build(name)).backend_tokenizer
        core.model.ignore_merges = entry.ignore_merges
        found = PRE_TOKENIZERS[pretokenizers.recognise(core)]
        same_key = pretokenizers._flag(found) == pretokenizers._flag(entry)
        assert same_key


def test_taking_whole_pieces_counts_only_where_merging_differs():
    vocab = {"a": 0, "b": 1, "ab": 2}
    for merges, name in (([("a", "b")], "qwen2"), ([], None)):
        core = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
        core.pre_tokenizer = split(LLAMA3.replace("{1,3}", ""))
        assert pretokenizers.recognise(core) == name
        assert core.model.ignore_merges is True


STRANGE = split(r"\p{L}+|\s+")


def test_a_strange_rule_is_named_by_the_person_or_not_written():
    with pytest.raises(ExportError, match="not known") as caught:
        tokenizer_metadata(with_parts(STRANGE), 256)
    assert "--pre" in caught.value.remedy
    assert tokenizer_metadata(with_parts(STRANGE), 256, pre="viking")[f"{GGML}pre"] == "viking"
    with pytest.raises(ExportError, match="vikingg"):
        tokenizer_metadata(with_parts(STRANGE), 256, pre="vikingg")


def test_the_person_knows_better_than_the_rule():
    values = tokenizer_metadata(with_parts(), 256, pre="phi-2")
    assert values[f"{GGML}pre"] == "phi-2"
    with pytest.raises(ExportError, match="falls back to bytes"):
        tokenizer_metadata(tokenizer("phi-3"), 32064, pre="gpt-2")


def test_a_tokenizer_of_a_strange_rule_is_known_by_llama_cpps_test_text(monkeypatch):
    strange = with_parts(STRANGE)
    digest = hashlib.sha256(str(strange(fingerprints.TEXT).input_ids).encode()).hexdigest()
    monkeypatch.setitem(fingerprints._HASHES, "viking", (digest,))
    assert tokenizer_metadata(strange, 256)[f"{GGML}pre"] == "viking"


@pytest.mark.parametrize(
    ("name", "expected"), [("llama3_1", "llama-bpe"), ("nemo", "tekken"), ("qwen3", "qwen2")]
)
def test_test_text_and_rule_agree_on_real_tokenizers(name, expected):
    hub = from_hub(name)
    if name == "nemo":  # the hub's tokenizer puts <s> in front; its file does not say so
        marked = [1, *hub(fingerprints.TEXT).input_ids]
        digest = hashlib.sha256(str(marked).encode()).hexdigest()
        assert digest in fingerprints._HASHES[expected]
    else:
        assert fingerprints.recognise(hub) == expected
    assert pretokenizers.recognise(hub.backend_tokenizer) == expected


def test_names_in_the_table_of_hashes_are_known():
    assert fingerprints._HASHES.keys() <= PRE_TOKENIZERS.keys()
    assert all(len(digest) == 64 for row in fingerprints._HASHES.values() for digest in row)


@pytest.mark.parametrize(
    "normalizer", [normalizers.Lowercase(), normalizers.Sequence([normalizers.NFKC()])]
)
def test_text_changed_before_it_is_cut_is_refused(normalizer):
    with pytest.raises(ExportError, match="changes text"):
        tokenizer_metadata(with_parts(normalizer=normalizer), 256)
    tokenizer_metadata(with_parts(normalizer=normalizers.NFC()), 256)


def test_a_space_put_before_every_text_is_not_recognised():
    with pytest.raises(ExportError, match="not known"):
        tokenizer_metadata(with_parts(pre_tokenizers.ByteLevel(add_prefix_space=True)), 256)


def test_unigram_is_refused_by_name():
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    with pytest.raises(ExportError, match="Unigram"):
        tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=core), 2)


def test_a_byte_fallback_tokenizer_that_treats_text_otherwise_is_refused():
    changed = copy.deepcopy(from_hub("phi3"))
    core = changed.backend_tokenizer
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), core.normalizer])
    with pytest.raises(ExportError, match="NFKC"):
        tokenizer_metadata(changed, 32064)


def test_padding_is_unused_and_goes_again():
    values = tokenizer_metadata(with_parts(), 260)
    assert values[f"{GGML}tokens"][256:] == [f"[PAD{i}]" for i in range(256, 260)]
    assert values[f"{GGML}token_type"][256:] == [TokenType.UNUSED] * 4
    back = read_tokenizer(values | {f"{GGML}pre": "gpt-2"}, where="x")
    assert len(back) == 256
    assert tokenizer_metadata(back, 260) == values


@pytest.mark.slow
def test_named_templates_survive():
    several = tokenizer("command-r").chat_template
    assert several.keys() == {"default", "tool_use", "rag"}
    got, want = rewritten("command-r"), metadata("command-r")
    for key in ("tokenizer.chat_template.rag", "tokenizer.chat_templates"):
        assert got[key] == want[key]


# ------------------------------------------------------------------------ tokenizer.model


@pytest.fixture
def mistral(tmp_path) -> Path:
    source = CACHE / "mistral/tokenizer.model"
    if not source.is_file():
        pytest.skip(f"no {source}; get it with: {downloads.FETCH}")
    return Path(_copied(source, tmp_path / "tokenizer.model"))


def _copied(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes())
    return target


def test_a_sentencepiece_file_tokenizes_in_llama_cpp_as_in_sentencepiece(mistral, llama_cpp):
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(mistral))
    values = sentencepiece_metadata(mistral, 32000)
    with llama_cpp(values) as vocab:
        texts = pages() + HARD
        assert [vocab(text) for text in texts] == pieces.encode(texts)
        # Nothing put around it, as no tokenizer_config.json says otherwise than <s>.
        assert vocab("a", add_special=True) == [pieces.bos_id(), *pieces.encode("a")]
    read = read_tokenizer(values, where="x")
    assert [ids(read, text) for text in texts] == pieces.encode(texts)
    for key, number in (("bos", pieces.bos_id()), ("unknown", pieces.unk_id())):
        assert values[f"{GGML}{key}_token_id"] == number
    scores = [pieces.get_score(i) for i in range(len(pieces))]
    assert values[f"{GGML}scores"] == scores
    assert values[f"{GGML}token_type"][:3] == [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2]


def test_what_stands_beside_a_sentencepiece_file_counts(mistral, llama_cpp):
    config = {
        "add_bos_token": False,
        "add_eos_token": True,
        "chat_template": "old",
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            "32000": {"content": "<|mark|>", "special": True},
            "32002": {"content": "<tool>", "special": False},
        },
    }
    mistral.with_name("tokenizer_config.json").write_text(json.dumps(config))
    assert sentencepiece_metadata(mistral, 32003)["tokenizer.chat_template"] == "old"
    mistral.with_name("chat_template.jinja").write_text("new")
    values = sentencepiece_metadata(mistral, 32004)
    assert values["tokenizer.chat_template"] == "new"
    assert values[f"{GGML}tokens"][32000:] == ["<|mark|>", "[PAD32001]", "<tool>", "[PAD32003]"]
    assert values[f"{GGML}token_type"][32000:] == [3, 5, 4, 5]
    with llama_cpp(values) as vocab:
        assert vocab("a<|mark|>b", add_special=True)[1] == 32000
        assert vocab("a", add_special=True)[-1] == values[f"{GGML}eos_token_id"]
    with pytest.raises(ExportError, match="32003 tokens"):
        sentencepiece_metadata(mistral, 32002)


def trained(folder: Path, **settings: Any) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pages()[:200]),
        model_prefix=str(folder / "small"),
        vocab_size=500,
        minloglevel=2,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        **settings,
    )
    return folder / "small.model"


def test_types_and_prefix_are_the_files_own(tmp_path, llama_cpp):
    from sentencepiece import SentencePieceProcessor

    path = trained(
        tmp_path,
        model_type="bpe",
        user_defined_symbols=["<tool>"],
        control_symbols=["<mark>"],
        add_dummy_prefix=False,
        pad_id=3,
    )
    values = sentencepiece_metadata(path, 512)
    types = dict(zip(values[f"{GGML}tokens"], values[f"{GGML}token_type"], strict=True))
    assert types["<tool>"] == TokenType.USER_DEFINED
    assert types["<mark>"] == types["<pad>"] == TokenType.CONTROL
    assert types["<0x41>"] == TokenType.BYTE
    assert values[f"{GGML}padding_token_id"] == 3
    pieces = SentencePieceProcessor(model_file=str(path))
    texts = [*pages()[200:400], "a<tool> b"]
    with llama_cpp(values) as vocab:
        assert [vocab(text) for text in texts] == pieces.encode(texts)


def test_unigram_and_other_files_are_refused(tmp_path):
    with pytest.raises(ExportError, match="Unigram"):
        sentencepiece_metadata(trained(tmp_path, model_type="unigram"), 512)
    broken = tmp_path / "tokenizer.model"
    for content in (b"", b"\xff" * 20, b"\x0a\xff\x01abc", b"not a model at all"):
        broken.write_bytes(content)
        with pytest.raises(ExportError):
            sentencepiece_metadata(broken, 512)
    with pytest.raises(ExportError):
        sentencepiece_metadata(tmp_path / "missing", 512)
