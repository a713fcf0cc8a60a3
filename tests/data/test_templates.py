"""Real chat templates with their real tokenizers: which tokens, and which of them are trained.

Token ids are held against transformers; texts and trained stretches are written by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mlxtune.data.masking import Masking
from mlxtune.data.records import Conversation, Turn
from mlxtune.errors import DataError
from support.chats import (
    CALL,
    FRANCE,
    ITALY,
    PARIS,
    ROME,
    SYSTEM,
    TEMPLATES,
    THOUGHT,
    THOUGHT_TOOLS,
    TOOLS,
    TWO_ROUNDS,
    WARM,
    WEATHER,
    WHERE,
    Chat,
    chat,
)

NO_THOUGHT = TEMPLATES["qwen3"].opens


@pytest.fixture(scope="module", params=TEMPLATES)
def any_chat(request) -> Chat:
    return chat(request.param, request)


HELLO = (Turn("user", "Hello world"), Turn("assistant", "Hi!"))
# Numbers as the vocabularies have them: the tokens in the same order are
#   smollm2   <|im_start|> system ⏎ Be ␣brief . <|im_end|> ⏎ <|im_start|> user ⏎ Hello
#             ␣world <|im_end|> ⏎ <|im_start|> ass istant ⏎ Hi ! <|im_end|> ⏎
#   qwen3     <|im_start|> user ⏎ Hello ␣world <|im_end|> ⏎ <|im_start|> assistant ⏎ <think>
#             ⏎⏎ </think> ⏎⏎ Hi ! <|im_end|> ⏎
#   llama3    <|begin_of_text|> <|start_header_id|> user <|end_header_id|> ⏎⏎ Hello ␣world
#             <|eot_id|> <|start_header_id|> assistant <|end_header_id|> ⏎⏎ Hi ! <|eot_id|>
#   gemma3    <bos> <start_of_turn> user ⏎ Hello ␣world <end_of_turn> ⏎ <start_of_turn>
#             model ⏎ Hi ! <end_of_turn> ⏎
#   nemo      <s> [INST] Hello ␣world [/INST] Hi ! </s>
#   phi3.5    <|user|> ␣Hello ␣world <|end|> <|assistant|> ␣Hi ! <|end|> <|endoftext|>,
#             each mark with the line break after it
# fmt: off
IDS: dict[str, tuple[list[int], slice]] = {
    "smollm2": (
        [1, 9690, 198, 6077, 5453, 30, 2, 198, 1, 4093, 198, 19556, 905, 2, 198,
         1, 520, 9531, 198, 26843, 17, 2, 198], slice(-4, -1)),
    "qwen3": (
        [151644, 872, 198, 9707, 1879, 151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271,
         13048, 0, 151645, 198], slice(-8, -1)),
    "llama3": (
        [128000, 128006, 882, 128007, 271, 9906, 1917, 128009,
         128006, 78191, 128007, 271, 13347, 0, 128009], slice(-3, None)),
    "gemma3": (
        [2, 105, 2364, 107, 9259, 1902, 106, 107, 105, 4368, 107, 10979, 236888, 106, 107],
        slice(-4, -1)),
    "nemo": ([1, 3, 22177, 4304, 4, 37133, 1033, 2], slice(-3, None)),
    "phi3.5": ([32010, 15043, 3186, 32007, 32001, 6324, 29991, 32007, 32000], slice(-4, -1)),
}
# fmt: on


@pytest.mark.parametrize("name", IDS)
def test_token_ids_and_weights_by_hand(name, request):
    made = chat(name, request)
    # Without one, SmolLM2's template would write a system prompt of its own.
    turns = (SYSTEM, *HELLO) if name == "smollm2" else HELLO
    [sample] = made.renderer.samples(Conversation(turns))
    ids, trained = IDS[name]
    assert sample.tokens.tolist() == ids
    weights = np.zeros(len(ids))
    weights[trained] = 1
    assert sample.weights.tolist() == weights.tolist()


DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
QWEN_RESULT = '<|im_start|>user\n<tool_response>\n{"celsius": 31}\n</tool_response><|im_end|>\n'


@dataclass(frozen=True)
class Golden:
    """A conversation, its whole text (or the end of it, after …) and what is trained."""

    template: str
    turns: tuple[Turn, ...]
    text: str
    trained: list[list[str]]
    tools: tuple = ()


GOLDEN = {
    "smollm2, two rounds": Golden(
        "smollm2",
        TWO_ROUNDS,
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"
        "<|im_start|>user\nAnd Italy?<|im_end|>\n<|im_start|>assistant\nRome.<|im_end|>\n",
        [["Paris.<|im_end|>", "Rome.<|im_end|>"]],
    ),
    "qwen3, two rounds": Golden(
        "qwen3",
        TWO_ROUNDS,
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"
        "<|im_start|>user\nAnd Italy?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nRome.<|im_end|>\n",
        [[f"{NO_THOUGHT}Paris.<|im_end|>"], [f"{NO_THOUGHT}Rome.<|im_end|>"]],
    ),
    "qwen3, reasoning in both answers": Golden(
        "qwen3",
        THOUGHT,
        "<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"
        "<|im_start|>user\nAnd Italy?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nEasy too.\n</think>\n\nRome.<|im_end|>\n",
        [
            ["<think>\nEasy.\n</think>\n\nParis.<|im_end|>"],
            ["<think>\nEasy too.\n</think>\n\nRome.<|im_end|>"],
        ],
    ),
    "qwen3, tools": Golden(
        "qwen3",
        TOOLS,
        f"…<|im_start|>assistant\n{QWEN_CALL}<|im_end|>\n{QWEN_RESULT}"
        f"<|im_start|>assistant\n{NO_THOUGHT}Yes, 31 degrees.<|im_end|>\n",
        [[f"{NO_THOUGHT}{QWEN_CALL}<|im_end|>"], [f"{NO_THOUGHT}Yes, 31 degrees.<|im_end|>"]],
        (WEATHER,),
    ),
    # Between a call and its result nothing is dropped: one sample.
    "qwen3, reasoning and tools": Golden(
        "qwen3",
        THOUGHT_TOOLS,
        f"…<|im_start|>assistant\n<think>\nLook it up.\n</think>\n\n{QWEN_CALL}<|im_end|>\n"
        f"{QWEN_RESULT}"
        "<|im_start|>assistant\n<think>\n31 is warm.\n</think>\n\nYes, 31 degrees.<|im_end|>\n",
        [
            [
                f"<think>\nLook it up.\n</think>\n\n{QWEN_CALL}<|im_end|>",
                "<think>\n31 is warm.\n</think>\n\nYes, 31 degrees.<|im_end|>",
            ]
        ],
        (WEATHER,),
    ),
    "llama3, two rounds": Golden(
        "llama3",
        TWO_ROUNDS,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nCapital of France?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nParis.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd Italy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nRome.<|eot_id|>",
        [["Paris.<|eot_id|>", "Rome.<|eot_id|>"]],
    ),
    "llama3.1, one round": Golden(
        "llama3.1",
        (FRANCE, PARIS),
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{DATES}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nCapital of France?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nParis.<|eot_id|>",
        [["Paris.<|eot_id|>"]],
    ),
    "llama3.1, two rounds": Golden(
        "llama3.1",
        TWO_ROUNDS,
        f"…{DATES}Be brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nCapital of France?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nParis.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd Italy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nRome.<|eot_id|>",
        [["Paris.<|eot_id|>", "Rome.<|eot_id|>"]],
    ),
    # A result that is text is written as a JSON string, even where it holds JSON.
    "llama3.1, tools": Golden(
        "llama3.1",
        TOOLS,
        "…Is it warm in Rome?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"celsius\\": 31}"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes, 31 degrees.<|eot_id|>",
        [
            [
                '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>',
                "Yes, 31 degrees.<|eot_id|>",
            ]
        ],
        (WEATHER,),
    ),
    # Its marks take the line break after the end in; the model stops before that.
    "lfm2.5, tools": Golden(
        "lfm2.5",
        TOOLS,
        "…<|im_start|>user\nIs it warm in Rome?<|im_end|>\n<|im_start|>assistant\n"
        "<|tool_call_start|>[weather(city='Rome')]<|tool_call_end|><|im_end|>\n"
        '<|im_start|>tool\n{"celsius": 31}<|im_end|>\n'
        "<|im_start|>assistant\nYes, 31 degrees.<|im_end|>\n",
        [
            [
                "<|tool_call_start|>[weather(city='Rome')]<|tool_call_end|><|im_end|>",
                "Yes, 31 degrees.<|im_end|>",
            ]
        ],
        (WEATHER,),
    ),
    "gemma3, two rounds": Golden(
        "gemma3",
        TWO_ROUNDS,
        "<bos><start_of_turn>user\nBe brief.\n\nCapital of France?<end_of_turn>\n"
        "<start_of_turn>model\nParis.<end_of_turn>\n<start_of_turn>user\nAnd Italy?<end_of_turn>\n"
        "<start_of_turn>model\nRome.<end_of_turn>\n",
        [["Paris.<end_of_turn>", "Rome.<end_of_turn>"]],
    ),
    "nemo, two rounds": Golden(
        "nemo",
        TWO_ROUNDS[1:],
        "<s>[INST]Capital of France?[/INST]Paris.</s>[INST]And Italy?[/INST]Rome.</s>",
        [["Paris.</s>", "Rome.</s>"]],
    ),
    "nemo, tools": Golden(
        "nemo",
        TOOLS,
        '…[/AVAILABLE_TOOLS][INST]Is it warm in Rome?[/INST][TOOL_CALLS][{"name": "weather", '
        '"arguments": {"city": "Rome"}, "id": "callRome1"}]</s>[TOOL_RESULTS]{"content": '
        '{"celsius": 31}, "call_id": "callRome1"}[/TOOL_RESULTS]Yes, 31 degrees.</s>',
        [
            [
                '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}, '
                '"id": "callRome1"}]</s>',
                "Yes, 31 degrees.</s>",
            ]
        ],
        (WEATHER,),
    ),
    # The tools move to the last question: what was trained after the first is another text.
    "nemo, tools and two rounds": Golden(
        "nemo",
        (FRANCE, PARIS, *TOOLS[:2]),
        '…[/AVAILABLE_TOOLS][INST]Is it warm in Rome?[/INST][TOOL_CALLS][{"name": "weather", '
        '"arguments": {"city": "Rome"}, "id": "callRome1"}]</s>',
        [
            ["Paris.</s>"],
            [
                '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}, '
                '"id": "callRome1"}]</s>'
            ],
        ],
        (WEATHER,),
    ),
    "phi3.5, two rounds": Golden(
        "phi3.5",
        TWO_ROUNDS,
        "<|system|>\nBe brief.<|end|>\n<|user|>\nCapital of France?<|end|>\n"
        "<|assistant|>\nParis.<|end|>\n<|user|>\nAnd Italy?<|end|>\n"
        "<|assistant|>\nRome.<|end|>\n<|endoftext|>",
        [["Paris.<|end|>", "Rome.<|end|>"]],
    ),
}


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_golden_conversations(golden, request):
    made = chat(golden.template, request)
    tools = golden.tools
    text = made.renderer.text(golden.turns, tools=tools)
    whole = not golden.text.startswith("…")
    assert text == golden.text if whole else text.endswith(golden.text[1:])
    assert made.trained(*golden.turns, tools=tools) == golden.trained
    # Several samples are one for each answer, with the turns up to it.
    ends = [i + 1 for i, turn in enumerate(golden.turns) if turn.role == "assistant"]
    ends = ends if len(golden.trained) > 1 else [len(golden.turns)]
    expected = [made.by_transformers(*golden.turns[:end], tools=tools) for end in ends]
    assert made.ids(*golden.turns, tools=tools) == expected


def test_a_turn_that_says_so_is_not_trained(any_chat):
    opens, end = any_chat.known.opens, any_chat.known.end
    paris, rome = (Turn("assistant", t.content, train=False) for t in (PARIS, ROME))
    assert any_chat.trained(FRANCE, paris, ITALY, ROME) == [[f"{opens}Rome.{end}"]]
    assert any_chat.trained(FRANCE, PARIS, ITALY, rome) == [[f"{opens}Paris.{end}"]]
    with pytest.raises(DataError, match="nothing in this record is trained") as raised:
        any_chat.trained(FRANCE, paris, ITALY, rome)
    assert raised.value.where == WHERE


def test_what_is_asked_last_is_not_trained(any_chat):
    opens, end = any_chat.known.opens, any_chat.known.end
    assert any_chat.trained(FRANCE, PARIS, ITALY) == [[f"{opens}Paris.{end}"]]
    with pytest.raises(DataError, match="nothing in this record is trained"):
        any_chat.trained(FRANCE)


@pytest.mark.parametrize("said", ["user", "Capital of France?"])
def test_a_user_can_be_trained_too(any_chat, said):
    """Whatever is said: `user` is what most templates write before it."""
    if any_chat.known.rewrites:
        pytest.skip("where a user's turn lies cannot be told, and the row is refused")
    name = any_chat.known.folder
    end = "[/INST]" if name == "nemo" else any_chat.known.end
    masking = Masking(roles=("user",))
    assert any_chat.trained(Turn("user", said), PARIS, masking=masking) == [[said + end]]


def test_every_text_begins_with_one_bos_or_none(any_chat):
    """Templates that write it are encoded without the tokenizer's own."""
    tokens = any_chat.ids(FRANCE, PARIS)[0]
    bos = any_chat.tokenizer.convert_tokens_to_ids(any_chat.known.bos or "<s>")
    assert tokens.count(bos) == bool(any_chat.known.bos)
    assert (tokens[0] == bos) == bool(any_chat.known.bos)


def test_orders_of_roles_that_a_template_refuses_name_the_row(any_chat):
    orders = [(FRANCE, ITALY, PARIS), (FRANCE, PARIS, ROME)]
    for turns in orders if any_chat.known.alternates else []:
        with pytest.raises(DataError, match="must alternate") as raised:
            any_chat.trained(*turns)
        assert raised.value.where == WHERE
    with pytest.raises(DataError):
        any_chat.trained(PARIS, ITALY, ROME)


def test_a_system_prompt_is_trained_where_it_stands_when_the_model_is_asked(request):
    """Nemo's stands before the last question, and nowhere once that is answered."""
    nemo = chat("nemo", request)
    assert SYSTEM.content not in nemo.renderer.text(TWO_ROUNDS)
    samples = nemo.renderer.samples(Conversation(TWO_ROUNDS))
    assert [nemo.tokenizer.decode(sample.tokens) for sample in samples] == [
        "<s>[INST]Be brief.\n\nCapital of France?[/INST]Paris.</s>",
        "<s>[INST]Capital of France?[/INST]Paris.</s>[INST]Be brief.\n\nAnd Italy?[/INST]Rome.</s>",
    ]
    assert nemo.trained(*TWO_ROUNDS) == [["Paris.</s>"], ["Rome.</s>"]]


def test_a_call_that_the_template_does_not_write_is_refused(any_chat):
    """Trained without it, the model would learn to say nothing."""
    if any_chat.known.tools:
        said = any_chat.trained(WARM, CALL, tools=(WEATHER,))[0][0]
        assert "weather" in said
        assert "Rome" in said
        return
    with pytest.raises(DataError) as raised:
        any_chat.trained(WARM, CALL, tools=(WEATHER,))
    assert raised.value.where == WHERE


def test_the_end_of_a_turn_need_not_be_the_end_of_text(request):
    """Google's own tokenizer_config.json says `<eos>`; turns end with `<end_of_turn>`."""
    gemma = chat("gemma3", request)
    other = type(gemma.tokenizer)(
        tokenizer_object=gemma.tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>"
    )
    other.chat_template = gemma.tokenizer.chat_template
    made = Chat(gemma.known, other)
    assert made.trained(*TWO_ROUNDS) == [["Paris.<end_of_turn>", "Rome.<end_of_turn>"]]
