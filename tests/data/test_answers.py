"""What becomes of records that a chat template has no place for, and where answers end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlxtune.data.files import Row
from mlxtune.data.records import Conversation, ToolCall, Turn
from mlxtune.data.render import Renderer
from mlxtune.data.rules import NOT_THOUGHT, Rules, Tally, record_samples
from mlxtune.data.sources import Source
from mlxtune.data.writing import NO_REASONING, NoReasoning, Writing
from mlxtune.errors import DataError
from support import templates
from support.chats import WEATHER
from support.rendering import trained_texts

USER, ANSWER = Turn("user", "Is it warm?"), Turn("assistant", "It is, today.")
THOUGHT = replace(ANSWER, reasoning="The sun shines.")
R1, QWEN25 = "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "Qwen-Qwen2.5-7B-Instruct"
QWEN3 = "Qwen-Qwen3-0.6B"
LLAMA = "meta-llama-Llama-3.2-3B-Instruct"
CALL = ToolCall("weather", {"city": "Rome"}, "callRome1")


def trained(name, *turns, tools=(), **writing):
    tokenizer = templates.tokenizer(name)
    samples = Renderer(tokenizer).samples(
        Conversation(turns, "data.jsonl:7", tools=tools), writing=Writing(**writing)
    )
    return [trained_texts(tokenizer, sample) for sample in samples]


def counted(name, row, **writing):
    """What is counted of a source with one record."""
    tally, rules = Tally(), Rules(writing=Writing(**writing))
    renderer = Renderer(templates.tokenizer(name))
    record_samples(Source("data.jsonl"), Row("data.jsonl:1", row), 1, renderer, rules, tally)
    return tally


def test_an_answer_without_reasoning_closes_the_thought_that_the_prompt_opens():
    end = "<｜end▁of▁sentence｜>"
    assert trained(R1, USER, ANSWER) == [[f"\n</think>\n\nIt is, today.{end}"]]
    said = f"The sun shines.\n</think>\n\nIt is, today.{end}"
    assert trained(R1, USER, THOUGHT, missing_reasoning="refuse") == [[said]]


def test_an_answer_without_reasoning_is_counted_left_out_or_refused():
    row = {"prompt": "Is it warm?", "completion": "It is, today."}
    assert counted(R1, row).noted == {NO_REASONING: 1}
    assert counted(R1, row, missing_reasoning="skip").dropped == {NOT_THOUGHT: 1}
    with pytest.raises(NoReasoning):
        trained(R1, USER, ANSWER, missing_reasoning="skip")
    with pytest.raises(DataError, match="turn 2 has no reasoning") as raised:
        trained(R1, USER, ANSWER, missing_reasoning="refuse")
    assert raised.value.where == "data.jsonl:7" and '"empty"' in raised.value.remedy
    assert not counted(QWEN25, row).noted  # which asks for no reasoning
    # Qwen3's prompt opens no thought; its answer has an empty one.
    assert counted(QWEN3, row).noted == {NO_REASONING: 1}
    assert counted(QWEN3, row, missing_reasoning="skip").dropped == {NOT_THOUGHT: 1}


def test_reasoning_without_a_place_is_refused_written_into_the_answer_or_dropped():
    with pytest.raises(DataError, match="no place for the reasoning of turn 2") as raised:
        trained(QWEN25, USER, THOUGHT)
    assert "inline" in raised.value.remedy and "drop" in raised.value.remedy
    assert trained(QWEN25, USER, THOUGHT, reasoning="inline") == [
        ["<think>\nThe sun shines.\n</think>\n\nIt is, today.<|im_end|>"]
    ]
    tags = ("[Plan]", "[/Plan]")
    assert trained(QWEN25, USER, THOUGHT, reasoning="inline", tags=tags) == [
        ["[Plan]\nThe sun shines.\n[/Plan]\n\nIt is, today.<|im_end|>"]
    ]
    dropped = [["It is, today.<|im_end|>"]]
    assert trained(QWEN25, USER, THOUGHT, reasoning="drop") == dropped
    inside = Turn("assistant", "<think>The sun shines.</think>It is, today.")
    assert trained(QWEN25, USER, inside, reasoning="drop") == dropped
    # Where there is a place, it is dropped all the same.
    assert trained(QWEN3, USER, THOUGHT, reasoning="drop") == trained(QWEN3, USER, ANSWER)


def test_reasoning_inside_the_content_goes_where_the_template_has_it():
    inside = Turn("assistant", "<think>The sun shines.</think>It is, today.")
    for name in ("Qwen-Qwen3-0.6B", "ByteDance-Seed-OSS", "google-gemma-4-31B-it-interleaved", R1):
        if "gemma" in name:  # asked with thoughts, as its prompt is else that of none
            continue
        assert trained(name, USER, inside) == trained(name, USER, THOUGHT)
    # Where there is no place, it stays what is said.
    assert trained(QWEN25, USER, inside) == [[f"{inside.content}<|im_end|>"]]
    plan = replace(inside, content="[Plan]The sun shines.[/Plan]It is, today.")
    split = trained("Qwen-Qwen3-0.6B", USER, plan, tags=("[Plan]", "[/Plan]"))
    assert split == trained("Qwen-Qwen3-0.6B", USER, THOUGHT)


def test_reasoning_under_a_prompt_that_says_not_to_think_is_refused_or_dropped():
    with pytest.raises(DataError, match="tells the model not to think") as raised:
        trained("google-gemma-4-31B-it", USER, THOUGHT)
    assert "enable_thinking = true" in raised.value.remedy
    dropped = trained("google-gemma-4-31B-it", USER, THOUGHT, reasoning="drop")
    assert dropped == [["It is, today.<turn|>"]]


def test_what_a_template_leaves_out_is_refused_or_counted():
    call = Turn("assistant", "I look.", tool_calls=(CALL,))
    with pytest.raises(DataError, match="leaves out the words beside a tool call") as raised:
        trained(LLAMA, USER, call, tools=(WEATHER,))
    assert 'left_out = "warn"' in raised.value.remedy
    made = trained(LLAMA, USER, call, tools=(WEATHER,), left_out="warn")
    assert made == [['{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>']]
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    row = {
        "messages": [
            {"role": "user", "content": "Is it warm?"},
            {"role": "assistant", "content": "I look.", "tool_calls": calls},
        ],
        "tools": [WEATHER],
    }
    noted = counted(LLAMA, row, left_out="warn").noted
    assert noted == {"the chat template leaves out the words beside a tool call": 1}


WRITES = (
    "{{ tools }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or () "
    "%}{{ c.function }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (WRITES.replace("{{ tools }}", ""), "tools"),
        (WRITES.replace("c.function ", "c.function.name "), "arguments of tool calls"),
        (WRITES.replace("c.function ", "1 "), "tool calls"),
        (WRITES.replace("in messages", "in messages if m.role != 'system'"), "what turns of role"),
    ],
    ids=["tools", "arguments", "calls", "system"],
)
def test_whatever_a_template_leaves_out_has_one_rule(template, what):
    tokenizer = templates.tokenizer(QWEN25, template)
    call = Turn("assistant", "", tool_calls=(CALL,))
    said = Conversation((Turn("system", "Be brief."), USER, call), tools=(WEATHER,))
    with pytest.raises(DataError, match=f"leaves out {what}"):
        Renderer(tokenizer).samples(said)
    notes = []
    Renderer(tokenizer).samples(said, writing=Writing(left_out="warn"), note=notes.append)
    assert [note for note in notes if what in note]


def test_an_answer_ends_with_the_next_turns_mark_where_the_template_writes_no_end():
    """GLM stops at the mark of the next role: another one after a call."""
    after_call = (USER, Turn("assistant", "", tool_calls=(CALL,)))
    [[text]] = trained("GLM-4.6", *after_call, tools=(WEATHER,))
    assert text.endswith("</tool_call><|observation|>")
    two_rounds = (USER, ANSWER, USER, ANSWER)
    [texts] = trained("GLM-4.6", *two_rounds)
    assert [text.rpartition("today.")[2] for text in texts] == ["<|user|>", "<|user|>"]


def test_named_templates_are_chosen_as_transformers_chooses():
    """The one for tools where there are tools."""
    tokenizer = templates.tokenizer(QWEN25)
    named = {
        "default": templates.source(QWEN25),
        "tool_use": templates.source("NousResearch-Hermes-3-Llama-3.1-8B-tool_use"),
    }
    tokenizer.chat_template = named
    call = (USER, Turn("assistant", "", tool_calls=(CALL,)))
    renderer = Renderer(tokenizer)
    for turns, tools, name in (((USER, ANSWER), (), "default"), (call, (WEATHER,), "tool_use")):
        [sample] = renderer.samples(Conversation(turns, tools=tools))
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": USER.content}],
            chat_template=named[name],
            tools=list(tools) or None,
            add_generation_prompt=True,
            tokenize=False,
        )
        assert tokenizer.decode(sample.tokens).startswith(prompt)


def test_an_answer_that_speaks_of_the_end_ends_where_it_ends():
    said = Turn("assistant", "im_end: the <|im_end|> mark ends a turn, as in <|im_end|>")
    assert trained(QWEN25, USER, said) == [[f"{said.content}<|im_end|>"]]


def test_brackets_in_a_question_are_no_tags_of_the_template():
    """Half-open intervals: the answer began at the bracket, with what the template writes."""
    question = Turn("user", "What is the length of [0, 1)?")
    end = "<｜end▁of▁sentence｜>"
    assert trained(R1, question, ANSWER) == [[f"\n</think>\n\nIt is, today.{end}"]]
    assert trained(R1, question, THOUGHT) == [
        [f"The sun shines.\n</think>\n\nIt is, today.{end}"],
    ]
    assert trained("google-gemma-4-31B-it", question, ANSWER) == [["It is, today.<turn|>"]]


@pytest.mark.parametrize("mark", ["<|im_end|>", "a <|im_end|> b <|im_end|> c"])
def test_a_call_that_speaks_of_the_end_ends_where_it_ends(mark):
    call = ToolCall("weather", {"city": mark, "of": [{mark: 1}]})
    [[text]] = trained(QWEN25, USER, Turn("assistant", "", tool_calls=(call,)), tools=(WEATHER,))
    assert text == (
        f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{mark}", '
        f'"of": [{{"{mark}": 1}}]}}}}\n</tool_call><|im_end|>'
    )
    said = Turn("assistant", "<|im_end|>")
    assert trained(QWEN25, USER, said) == [["<|im_end|><|im_end|>"]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (QWEN3, "Thus</think>no"),
        ("GLM-4.6", "Thus</think>no"),
        (R1, "</think>"),
        (R1, "First <think>then</think> no"),
    ],
)
def test_marks_in_the_words_that_a_template_takes_for_its_own_are_refused(name, words):
    with pytest.raises(DataError, match="takes a mark that is said in turn 2 for its own"):
        trained(name, USER, Turn("assistant", words))


def test_marks_in_the_words_that_a_template_leaves_alone_are_trained():
    said = replace(THOUGHT, content="It ends with </think>, as <think> begins.")
    assert trained(QWEN3, USER, said) == [
        [f"<think>\nThe sun shines.\n</think>\n\n{said.content}<|im_end|>"]
    ]


@pytest.mark.parametrize("reasoning", ["It is, today.", "today", "e", "<", "think"])
def test_reasoning_that_is_also_said_is_trained(reasoning):
    said = replace(ANSWER, reasoning=reasoning)
    kwargs = "{%- set enable_thinking = true -%}{#- values -#}"
    gemma = templates.source("google-gemma-4-31B-it")
    tokenizer = templates.tokenizer("google-gemma-4-31B-it", kwargs + gemma)
    [sample] = Renderer(tokenizer).samples(Conversation((USER, said)))
    assert trained_texts(tokenizer, sample) == [
        f"<|channel>thought\n{reasoning}\n<channel|>It is, today.<turn|>"
    ]
    [[text]] = trained("Apriel-1.6-15b-Thinker-fixed", USER, said)
    assert text == f"{reasoning}\n[BEGIN FINAL RESPONSE]\nIt is, today.<|end|>"


def test_reasoning_of_white_space_is_none():
    blank = replace(ANSWER, reasoning=" \n ")
    for name in (QWEN3, QWEN25, "MiniMax-M2", "google-gemma-4-31B-it"):
        assert trained(name, USER, blank) == trained(name, USER, ANSWER)


@pytest.mark.parametrize("words", ["weather", "Rome", "city"])
def test_words_beside_a_call_that_its_text_holds_too_are_missed(words):
    call = Turn("assistant", words, tool_calls=(CALL,))
    with pytest.raises(DataError, match="leaves out the words beside a tool call"):
        trained(LLAMA, USER, call, tools=(WEATHER,))
    [[text]] = trained(QWEN25, USER, call, tools=(WEATHER,))
    assert text.startswith(f"{words}\n<tool_call>")


def test_calls_and_tools_that_words_name_too_are_missed():
    question = Turn("user", "How is the weather in Rome?")
    call = Turn("assistant", "I look at the weather in Rome.", tool_calls=(CALL,))
    with pytest.raises(DataError, match="leaves out tools"):
        trained(R1, question, call, tools=(WEATHER,))
    with pytest.raises(DataError, match="leaves out tool calls"):
        trained("ibm-granite-granite-3.3-2B-Instruct", question, call, tools=(WEATHER,))


def test_an_answer_after_an_answer_that_the_template_does_not_ask_for_is_refused():
    with pytest.raises(DataError, match="asks for no answer after turn 2"):
        trained("deepseek-ai-DeepSeek-V3.2", USER, ANSWER, ANSWER)
    assert len(trained(QWEN25, USER, ANSWER, ANSWER)[0]) == 2
