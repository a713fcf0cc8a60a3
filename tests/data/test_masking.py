"""What carries weight: roles, turns that speak for themselves, plain text, marked answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.data.formats import parse_record
from mlxtune.data.masking import Masking, NothingTrained
from mlxtune.data.records import Conversation, Segment, Turn
from mlxtune.data.render import Renderer
from mlxtune.errors import DataError
from support.properties import examples
from support.rendering import END, TWO_ROUNDS, only_sample, trained_texts


def trained(renderer, tokenizer, conversation, **masking) -> list[str]:
    [sample] = renderer.samples(conversation, masking=Masking(**masking))
    return trained_texts(tokenizer, sample)


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        (("assistant",), ["ls", "ls -a"]),
        (("user",), ["list files", "hidden ones too"]),
        (("system",), ["Be brief."]),
        (("user", "assistant"), ["list files", "ls", "hidden ones too", "ls -a"]),
    ],
)
def test_the_turns_of_these_roles_are_trained_with_their_ends(renderer, tokenizer, roles, words):
    assert trained(renderer, tokenizer, TWO_ROUNDS, roles=roles) == [w + END for w in words]


def test_a_turn_may_say_of_itself_whether_it_is_trained(renderer, tokenizer):
    turns = [
        Turn("user", "one", train=True),
        Turn("assistant", "two", train=False),
        Turn("user", "three"),
        Turn("assistant", "four"),
    ]
    assert trained(renderer, tokenizer, Conversation(tuple(turns))) == [f"one{END}", f"four{END}"]


def test_train_on_inputs_trains_all_but_turns_that_say_otherwise(renderer, tokenizer):
    [sample] = renderer.samples(TWO_ROUNDS, masking=Masking(train_on_inputs=True))
    assert sample.weights.all()
    first, asked, said, *rest = TWO_ROUNDS.turns
    quiet = Conversation((first, asked, Turn(said.role, said.content, train=False), *rest))
    before, after = trained(renderer, tokenizer, quiet, train_on_inputs=True)
    assert before.endswith("<|im_start|>assistant\n")
    # The line break after the end of a turn is the template's, and trained like all of it.
    assert after.lstrip().startswith("<|im_start|>user\nhidden ones too")


def test_a_record_that_trains_nothing_is_told(renderer):
    turns = (Turn("user", "a"), Turn("assistant", "b", train=False))
    with pytest.raises(NothingTrained) as raised:
        renderer.samples(Conversation(turns, "data.jsonl:7"))
    assert raised.value.where == "data.jsonl:7"


def test_a_document_is_trained_whole_and_ends(renderer, tokenizer):
    sample = only_sample(renderer, parse_record({"text": "one two three"}))
    assert sample.weights.all()
    assert sample.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(sample.tokens[:-1].tolist()) == "one two three"


def test_documents_need_no_chat_template(variant):
    tokenizer = variant(None)
    assert only_sample(Renderer(tokenizer), parse_record({"text": "one"})).supervised == 2


def test_a_document_with_its_beginning_written_in_it_has_no_two(variant):
    from tokenizers.processors import TemplateProcessing

    def begins(core):
        core.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )

    tokenizer = variant(change=begins)
    tokenizer.bos_token = "<|im_start|>"
    once = only_sample(Renderer(tokenizer), parse_record({"text": "one"}))
    assert once.tokens.tolist()[:2] != [1, 1] and once.tokens[0] == 1
    record = parse_record({"text": "<|im_start|>one"}, where="data.jsonl:7")
    with pytest.raises(DataError, match="two tokens that mean the beginning") as raised:
        Renderer(tokenizer).samples(record)
    assert raised.value.where == "data.jsonl:7"


segments = st.lists(
    st.tuples(st.text("abc \nö", min_size=1, max_size=12), st.booleans()), min_size=1, max_size=6
)


@examples(60)
@given(segments)
def test_segments_are_trained_exactly_where_they_say(renderer, tokenizer, made):
    conversation = Conversation(segments=tuple(Segment(text, label) for text, label in made))
    if not any(label for _, label in made):
        with pytest.raises(NothingTrained):
            renderer.samples(conversation)
        return
    if len(made) == 1 and len(renderer.encode(made[0][0])) == 1:
        return  # a single token has nothing that predicts it
    try:
        sample = only_sample(renderer, conversation)
    except NothingTrained:
        assert [label for _, label in made].index(True) == 0  # trained is the first token alone
        return
    expected = [id for text, label in made for id in renderer.encode(text) if label]
    assert sample.tokens[sample.weights > 0].tolist() == expected
    assert sample.tokens.tolist() == [id for text, _ in made for id in renderer.encode(text)]


def test_tools_and_calls_reach_the_template(variant):
    template = (
        "{{ tools | tojson }}\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.reasoning_content or '' }}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
        "{{ m.tool_call_id or '' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = variant(template)
    record = {
        "tools": [{"type": "function", "function": {"name": "df"}}],
        "messages": [
            {"role": "user", "content": "how full?"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "Look.",
                "tool_calls": [{"id": "c1", "function": {"name": "df", "arguments": '{"h": 1}'}}],
            },
            {"role": "tool", "content": "91 %", "tool_call_id": "c1"},
            {"role": "assistant", "content": "91 %."},
        ],
    }
    sample = only_sample(Renderer(tokenizer), parse_record(record))
    called = 'Look.{"name": "df", "arguments": {"h": 1}}'
    assert trained_texts(tokenizer, sample) == [called + END, f"91 %.{END}"]
    text = tokenizer.decode(sample.tokens.tolist())
    assert text.startswith('[{"type": "function", "function": {"name": "df"}}]')
    assert "tool\n91 %c1" in text
    assert np.count_nonzero(sample.weights) == sample.supervised
