"""Real chat templates, whatever is said: exactly the answers and their ends are trained.

The tokenizers are held against llama.cpp's, and Mistral's encoding against its own library.
"""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlxtune.data.records import Conversation, Turn
from mlxtune.errors import DataError
from support import downloads
from support.chats import FRANCE, TEMPLATES, TOOLS, WEATHER, Chat, chat, messages
from support.properties import examples


@pytest.fixture(scope="module", params=TEMPLATES)
def any_chat(request) -> Chat:
    return chat(request.param, request)


@pytest.fixture(scope="module")
def nemo(request) -> Chat:
    return chat("nemo", request)


# SmolLM2 has no token for some control characters, and SentencePiece means a space by ▁.
characters = st.characters(
    exclude_categories=["Cs", "Cn", "Cc"], include_characters="\t\n\r", exclude_characters="▁"
)
words = st.text(characters, max_size=24)
answers = words.map(str.strip).filter(bool)
rounds = st.lists(st.tuples(words, answers, st.booleans()), min_size=1, max_size=4)


def saying(any_chat: Chat, text: str) -> str:
    form = any_chat.known.form
    text = unicodedata.normalize(form, text) if form else text
    return any_chat.known.opens + text + any_chat.known.end


@examples(25)
@given(rounds, st.none() | words)
def test_exactly_the_answers_and_their_ends_are_trained(any_chat, said, system):
    given = system is not None and any_chat.known.system
    turns = [Turn("system", system)] if given else []
    for asked, answer, train in said:
        turns += [Turn("user", asked), Turn("assistant", answer, train=train)]
    expected = [saying(any_chat, answer) for _, answer, train in said if train]
    if not expected:
        with pytest.raises(DataError, match="nothing in this record is trained"):
            any_chat.trained(*turns)
        return
    made = any_chat.trained(*turns)
    assert [text for sample in made for text in sample] == expected
    ends = [len(turns)]
    if any_chat.known.rewrites:
        ends = [i + 1 for i, turn in enumerate(turns) if turn.train]
    ids = any_chat.ids(*turns)
    assert ids == [any_chat.by_transformers(*turns[:end]) for end in ends]
    # What is trained last is what follows the prompt, as the model is asked.
    if turns[-1].train:
        prompt = any_chat.renderer.prompt(Conversation(tuple(turns)))
        assert ids[-1][: len(prompt)] == prompt


@examples(25)
@given(answers, st.text(" \t\n\r\u00a0", max_size=3), st.text(" \n", max_size=2))
def test_white_space_around_an_answer_is_trained_as_the_template_writes_it(
    any_chat, answer, before, after
):
    """Some templates trim it, some keep it; Phi-3's marks swallow what follows them."""
    said = before + answer + after
    [[text]] = any_chat.trained(FRANCE, Turn("assistant", said))
    ways = (said, said.strip(), said.lstrip(), said.lstrip("\n"))
    assert text in [saying(any_chat, way) for way in ways]


# --- The tokenizers are the real ones ---


@pytest.mark.parametrize("name", ["qwen3", "llama3", "phi3.5"])
def test_the_tokenizer_is_that_of_llama_cpp(name, request):
    made = chat(name, request)
    golden = downloads.CACHE / "golden"
    with (golden / "texts.inp").open(encoding="utf-8", newline="") as file:
        separator = "\n__ggml_vocab_test__\n"
        texts = file.read().removesuffix(separator).split(separator)
    lines = (golden / f"{made.known.folder}.out").read_text(encoding="utf-8").splitlines()
    expected = [[int(number) for number in line.split()] for line in lines]
    assert [made.renderer.encode(text) for text in texts] == expected
    assert len(texts) > 40


@pytest.fixture(scope="module")
def by_mistral(request):
    """Token ids of a conversation as Mistral's own library encodes it for fine-tuning."""
    pytest.importorskip("mistral_common", reason="pip install mistral-common")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    path = downloads.CACHE / "nemo/tekken.json"
    tokenizer = MistralTokenizer.from_file(path, mode=ValidationMode.finetuning)

    def encode(*turns: Turn, tools: tuple = ()) -> list[int]:
        asked = ChatCompletionRequest.from_openai(
            messages=messages(turns), tools=list(tools) or None
        )
        return tokenizer.encode_chat_completion(asked).tokens

    return encode


@examples(40)
@given(st.lists(st.tuples(answers, answers), min_size=1, max_size=3))
def test_nemo_is_encoded_as_mistral_encodes_it(nemo, by_mistral, said):
    turns = [
        turn for asked, answer in said for turn in (Turn("user", asked), Turn("assistant", answer))
    ]
    # What a text calls a control token is text to Mistral's library, and one to a template.
    marks = nemo.tokenizer.get_added_vocab()
    assume(not any(mark in turn.content for mark in marks for turn in turns))
    assert nemo.ids(*turns) == [by_mistral(*turns)]


def test_nemos_tools_are_encoded_as_mistral_encodes_them(nemo, by_mistral):
    assert nemo.ids(*TOOLS, tools=(WEATHER,)) == [by_mistral(*TOOLS, tools=(WEATHER,))]
