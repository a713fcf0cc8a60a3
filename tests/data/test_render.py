"""Conversations to tokens and weights: exactly the answers are trained, with their end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtune.data.masking import Masking
from mlxtune.data.records import Conversation, Turn
from mlxtune.data.render import Renderer
from mlxtune.data.sources import read_conversations
from mlxtune.errors import DataError, ModelError
from support.files import SHELL_TRAIN
from support.properties import examples
from support.rendering import END, PAIR, TWO_ROUNDS, conversation, only_sample, trained_texts


def answers(conversation: Conversation) -> list[str]:
    return [turn.content + END for turn in conversation.turns if turn.role == "assistant"]


def by_transformers(tokenizer, turns: tuple[Turn, ...], **options) -> list[int]:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    hf = tokenizer._tokenizer if isinstance(tokenizer, TokenizerWrapper) else tokenizer
    return hf.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


# SmolLM2's vocabulary has no token for six control characters, nor for two bytes that only
# unassigned characters have.
characters = st.characters(exclude_categories=["Cs", "Cn", "Cc"], include_characters="\t\n\r")
text = st.text(characters, max_size=24)
# An answer that begins with white space may share a token with the template's line break.
answer = text.map(str.lstrip).filter(bool)
rounds = st.lists(st.tuples(text, answer), min_size=1, max_size=4)


@st.composite
def conversations(draw) -> Conversation:
    turns = [("system", draw(text))] if draw(st.booleans()) else []
    for asked, said in draw(rounds):
        turns += [("user", asked), ("assistant", said)]
    return conversation(*turns)


@pytest.mark.parametrize("asked", [PAIR, TWO_ROUNDS], ids=["one round", "two rounds"])
def test_the_trained_text_is_each_answer_and_its_end(renderer, tokenizer, asked):
    assert trained_texts(tokenizer, only_sample(renderer, asked)) == answers(asked)


@examples(60)
@given(conversations())
def test_the_trained_text_is_each_answer_and_its_end_whatever_is_said(renderer, tokenizer, asked):
    sample = only_sample(renderer, asked, record=3)
    assert trained_texts(tokenizer, sample) == answers(asked)
    assert set(sample.weights.tolist()) == {0.0, 1.0}
    assert sample.supervised == np.count_nonzero(sample.weights)
    assert (sample.tokens.dtype, sample.weights.dtype) == (np.int32, np.float32)
    assert (sample.record, sample.where) == (3, asked.where)


@examples(60)
@given(conversations())
def test_tokens_are_those_of_transformers_and_begin_with_the_prompt(renderer, tokenizer, asked):
    tokens = only_sample(renderer, asked).tokens.tolist()
    prompt = renderer.prompt(asked)
    assert tokens == by_transformers(tokenizer, asked.turns)
    assert prompt == by_transformers(tokenizer, asked.prompt_turns(), add_generation_prompt=True)
    assert tokens[: len(prompt)] == prompt
    said = tokenizer.decode(tokens[len(prompt) :])
    assert said == f"{asked.answer()}{END}\n"


@examples(60)
@given(st.text(alphabet=" \t\n\r\u00a0", min_size=1, max_size=3), answer)
def test_white_space_before_an_answer_is_trained_exactly_or_refused(
    renderer, tokenizer, space, said
):
    asked = conversation(("user", "x"), ("assistant", space + said))
    try:
        sample = only_sample(renderer, asked)
    except DataError as error:
        assert error.where == "data.jsonl:7"
        assert "white space" in error.remedy
    else:
        assert trained_texts(tokenizer, sample) == answers(asked)


def test_turns_that_are_not_trained_carry_no_weight(renderer, tokenizer):
    first, *rest = TWO_ROUNDS.turns
    untrained = tuple(Turn(t.role, t.content, train=t.content == "ls") for t in rest)
    sample = only_sample(renderer, Conversation((first, *untrained)))
    assert trained_texts(tokenizer, sample) == [f"ls{END}"]


def test_assistant_turns_in_a_row_are_trained_each(renderer, tokenizer):
    asked = conversation(("user", "x"), ("assistant", "one"), ("assistant", "two"))
    assert trained_texts(tokenizer, only_sample(renderer, asked)) == answers(asked)


def test_what_follows_the_last_answer_carries_no_weight(renderer, tokenizer):
    asked = conversation(("user", "x"), ("assistant", "one"), ("user", "and then?"))
    assert trained_texts(tokenizer, only_sample(renderer, asked)) == answers(asked)


def test_real_records_are_numbered_from_one_and_trained_on_their_commands(renderer, tokenizer):
    records = read_conversations(SHELL_TRAIN)[:40]
    samples = [only_sample(renderer, c, n) for n, c in enumerate(records, start=1)]
    assert [sample.record for sample in samples] == list(range(1, 41))
    assert [sample.where for sample in samples] == [f"{SHELL_TRAIN}:{n}" for n in range(1, 41)]
    assert [trained_texts(tokenizer, s) for s in samples] == [answers(c) for c in records]


@pytest.mark.parametrize(
    "setting",
    [
        lambda core: core.enable_truncation(10),
        lambda core: core.enable_padding(length=64, pad_id=2, pad_token=END),
    ],
    ids=["truncation", "padding"],
)
def test_truncation_and_padding_saved_with_a_tokenizer_change_nothing(variant, setting):
    asked = variant(change=setting)
    sample = only_sample(Renderer(asked), PAIR)
    assert sample.tokens.tolist() == by_transformers(asked, PAIR.turns)
    assert trained_texts(asked, sample) == answers(PAIR)


REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% else %}(earlier){% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_gives_a_sample_for_each_answer(variant):
    tokenizer = variant(REWRITES)
    first, second = Renderer(tokenizer).samples(TWO_ROUNDS)
    assert trained_texts(tokenizer, first) == [f"ls{END}"]
    assert trained_texts(tokenizer, second) == [f"ls -a{END}"]
    assert first.tokens.tolist() == by_transformers(tokenizer, TWO_ROUNDS.turns[:3])
    assert second.tokens.tolist() == by_transformers(tokenizer, TWO_ROUNDS.turns)


@pytest.mark.parametrize("masking", [Masking(("user", "assistant")), Masking(train_on_inputs=True)])
def test_a_template_that_rewrites_earlier_turns_trains_answers_alone(variant, masking):
    # To say which tokens of an earlier answer carry weight, or don't, its place is needed.
    said = Turn("assistant", "ls", train=False if masking.train_on_inputs else None)
    turns = (*TWO_ROUNDS.turns[:2], said, *TWO_ROUNDS.turns[3:])
    with pytest.raises(DataError, match="rewrites earlier turns") as raised:
        Renderer(variant(REWRITES)).samples(Conversation(turns, "data.jsonl:7"), masking=masking)
    assert raised.value.where == "data.jsonl:7"
    assert "chat_template" in raised.value.remedy


def test_a_template_that_rewrites_earlier_turns_will_do_for_one_round(variant):
    tokenizer = variant(REWRITES)
    assert trained_texts(tokenizer, only_sample(Renderer(tokenizer), PAIR)) == answers(PAIR)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{% if", "{{ messages[9].content.x }}"],
    ids=["raises", "no template", "undefined"],
)
def test_a_template_that_fails_is_told_with_the_row(variant, template):
    with pytest.raises(DataError, match="template refuses this conversation") as raised:
        only_sample(Renderer(variant(template)), PAIR)
    assert raised.value.where == "data.jsonl:7"


@pytest.mark.parametrize(
    "template",
    ["the same for all", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"],
    ids=["constant", "no answers"],
)
def test_a_template_that_leaves_out_the_answer_is_refused_with_the_row(variant, template):
    with pytest.raises(DataError) as raised:
        only_sample(Renderer(variant(template)), PAIR)
    assert raised.value.where == "data.jsonl:7"


def test_a_conversation_that_begins_with_the_assistant_is_told_with_the_row(renderer):
    with pytest.raises(DataError) as raised:
        only_sample(renderer, conversation(("assistant", "Hello!"), ("user", "x")))
    assert raised.value.where == "data.jsonl:7"


@pytest.mark.parametrize("template", [None, ""])
def test_a_model_without_a_chat_template_is_told(variant, template):
    with pytest.raises(ModelError, match="no chat template") as raised:
        Renderer(variant(template)).samples(PAIR)
    assert raised.value.where == "model.chat_template"


def test_a_tokenizer_without_offsets_is_told():
    class Slow:
        chat_template = "{{ messages }}"

    with pytest.raises(ModelError, match="not a fast one"):
        Renderer(Slow())
