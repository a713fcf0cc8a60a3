"""One answer of models that think, written by hand: the prompt, and what is trained after it.

Texts are what each publisher's template writes. Token ids are llama.cpp's, with the vocabularies
that it comes with; the prompt's and the answer's are apart, as a server has them.
"""

from __future__ import annotations

import copy
import json
from datetime import date

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mlxtune.data.records import Conversation, Turn
from mlxtune.data.render import Renderer
from mlxtune.data.template_values import TemplateValues
from mlxtune.gguf.reader import GGUFFile
from mlxtune.gguf.tokenizer import read_tokenizer
from mlxtune.train.asking import values_for
from support import downloads, templates

HELLO, HI = Turn("user", "Hello world"), Turn("assistant", "Hi!")
EASY = Turn("assistant", "Hi!", reasoning="Easy.")
# Whether the model is asked to think, and the answer that it is to learn.
KINDS = {"plain": (False, HI), "thinking": (True, EASY), "thinks nothing": (True, HI)}

CHATML = "<|im_start|>user\nHello world<|im_end|>\n<|im_start|>assistant\n"
R1 = "<s><｜User｜>Hello world<｜Assistant｜><think>\n"
GEMMA = "<|turn>user\nHello world<turn|>\n<|turn>model\n"
GLM = "[gMASK]<sop><|user|>Hello world<|assistant|>"
GPT_OSS = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2026-01-02\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    "<|end|><|start|>user<|message|>Hello world<|end|><|start|>assistant"
)
# Of each kind the prompt, what is trained, and what the template writes after that.
GOLDEN: dict[str, dict[str, tuple[str, str, str]]] = {
    "Qwen-Qwen3-0.6B": {
        "plain": (f"{CHATML}<think>\n\n</think>\n\n", "Hi!<|im_end|>", "\n"),
        "thinking": (CHATML, "<think>\nEasy.\n</think>\n\nHi!<|im_end|>", "\n"),
        "thinks nothing": (CHATML, "<think>\n\n</think>\n\nHi!<|im_end|>", "\n"),
    },
    "Qwen3.5-4B": {
        "plain": (f"{CHATML}<think>\n\n</think>\n\n", "Hi!<|im_end|>", "\n"),
        "thinking": (f"{CHATML}<think>\n", "Easy.\n</think>\n\nHi!<|im_end|>", "\n"),
        # The line breaks on both sides would be one token in a text: it ends with the answer.
        "thinks nothing": (f"{CHATML}<think>\n", "\n</think>\n\nHi!<|im_end|>", ""),
    },
    # It writes no reasoning: what stands around it is as R1 writes it.
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": {
        "plain": (f"{R1}</think>", "Hi!<｜end▁of▁sentence｜>", ""),
        "thinking": (R1, "Easy.\n</think>\n\nHi!<｜end▁of▁sentence｜>", ""),
        "thinks nothing": (R1, "\n</think>\n\nHi!<｜end▁of▁sentence｜>", ""),
    },
    "google-gemma-4-31B-it": {
        "plain": (f"<s>{GEMMA}<|channel>thought\n<channel|>", "Hi!<turn|>", "\n"),
        "thinking": (
            f"<s><|turn>system\n<|think|>\n<turn|>\n{GEMMA}",
            "<|channel>thought\nEasy.\n<channel|>Hi!<turn|>",
            "\n",
        ),
    },
    # It ends an answer with the mark of the next turn.
    "GLM-4.7-Flash": {
        "plain": (f"{GLM}</think>", "Hi!<|user|>", ""),
        "thinking": (f"{GLM}<think>", "Easy.</think>Hi!<|user|>", ""),
        "thinks nothing": (f"{GLM}<think>", "</think>Hi!<|user|>", ""),
    },
    "openai-gpt-oss-120b": {
        "plain": (GPT_OSS, "<|channel|>final<|message|>Hi!<|return|>", ""),
        "thinking": (
            GPT_OSS,
            "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant"
            "<|channel|>final<|message|>Hi!<|return|>",
            "",
        ),
        "thinks nothing": (GPT_OSS, "<|channel|>final<|message|>Hi!<|return|>", ""),
    },
}


def three_parts(tokenizer, thinking, answer):
    """Tokens before the answer, those that are trained, and those after them."""
    own = tokenizer.chat_template
    values = TemplateValues(values_for(tokenizer, thinking=thinking), date(2026, 1, 2))
    tokenizer.chat_template = values.written_into(own)
    try:
        [sample] = Renderer(tokenizer).samples(Conversation((HELLO, answer)))
    finally:
        tokenizer.chat_template = own
    trained = np.flatnonzero(sample.weights)
    assert (np.diff(trained) == 1).all()
    start, end = trained[0], trained[-1] + 1
    return tuple(part.tolist() for part in np.split(sample.tokens, [start, end]))


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kinds in GOLDEN.items() for kind in kinds]
)
def test_prompts_and_answers(name, kind):
    tokenizer = templates.tokenizer(name)
    parts = three_parts(tokenizer, *KINDS[kind])
    assert tuple(map(tokenizer.decode, parts)) == GOLDEN[name][kind]


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kinds in GOLDEN.items() for kind in kinds]
)
def test_answers_are_read_back(name, kind):
    said = GOLDEN[name][kind][1]
    said = said[: said.rindex("<")]  # generation ends before the mark
    read = Renderer(templates.tokenizer(name)).answers.read(said)
    assert read == KINDS[kind][1]


# Of templates that write other marks around the words.
WRITTEN = {
    "Cohere2MoE": {
        "<|START_TEXT|>Hi!<|END_TEXT|>": HI,
        "Easy.<|END_THINKING|><|START_TEXT|>Hi!<|END_TEXT|>": EASY,
    },
    "Kimi-K3": {
        "Hi!<|close|>response<|sep|><|close|>message<|sep|>": HI,
        "Easy.<|close|>think<|sep|><|open|>response<|sep|>Hi!<|close|>response<|sep|>"
        "<|close|>message<|sep|>": EASY,
    },
    "mistralai-Ministral-3-14B-Reasoning-2512": {"Hi!": HI, "[THINK]Easy.[/THINK]Hi!": EASY},
    # Without a place for reasoning in the template: as records are written with `inline`.
    "Qwen-Qwen2.5-7B-Instruct": {
        "Hi!": HI,
        "<think>\nEasy.\n</think>\n\nHi!": EASY,
        "Hi, <think> and </think>!": Turn("assistant", "Hi, <think> and </think>!"),
    },
    # A thought that is cut off.
    "Qwen3.5-4B": {"Easy": Turn("assistant", "Easy")},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_other_marks_are_read(name):
    answers = Renderer(templates.tokenizer(name)).answers
    assert {said: answers.read(said) for said in WRITTEN[name]} == WRITTEN[name]


# fmt: off
USER = [151644, 872, 198, 9707, 1879, 151645, 198]  # <|im_start|> user ⏎ Hello ␣world <|im_end|> ⏎
ASKED = [*USER, 151644, 77091, 198]                 # <|im_start|> assistant ⏎
QWEN_HI = [13048, 0, 151645]                        # Hi ! <|im_end|>
GEMMA_USER = [
    105, 2364, 107, 9259, 1902, 106, 107,           # <|turn> user ⏎ Hello ␣world <turn|> ⏎
    105, 4368, 107,                                 # <|turn> model ⏎
]
GEMMA_HI = [10979, 236888, 106]                     # Hi ! <turn|>
# Of each kind the tokens of the prompt and those of the answer. A ⏎ follows every answer.
IDS: dict[str, dict[str, tuple[list[int], list[int]]]] = {
    "Qwen-Qwen3-0.6B": {
        "plain": ([
            *ASKED,
            151667, 271, 151668, 271,               # <think> ⏎⏎ </think> ⏎⏎
        ], QWEN_HI),
        "thinking": (ASKED, [
            151667, 198, 36730, 624,                # <think> ⏎ Easy .⏎
            151668, 271, *QWEN_HI,                  # </think> ⏎⏎
        ]),
        "thinks nothing": (ASKED, [
            151667, 271, 151668, 271, *QWEN_HI,     # <think> ⏎⏎ </think> ⏎⏎
        ]),
    },
    # In this vocabulary, which is smaller than the published one, the tags are plain text: their
    # last character shares a token with the line breaks after it.
    "Qwen3.5-4B": {
        "plain": ([
            *ASKED,
            13708, 766, 1339,                       # <th ink >⏎⏎
            522, 26865, 1339,                       # </ think >⏎⏎
        ], QWEN_HI),
        "thinking": ([
            *ASKED,
            13708, 766, 397,                        # <th ink >⏎
        ], [
            36730, 624,                             # Easy .⏎
            522, 26865, 1339, *QWEN_HI,             # </ think >⏎⏎
        ]),
        # In the text of both, >⏎⏎ would be one token, which the model never writes.
        "thinks nothing": ([
            *ASKED,
            13708, 766, 397,                        # <th ink >⏎
        ], [
            198, 522, 26865, 1339, *QWEN_HI,        # ⏎ </ think >⏎⏎
        ]),
    },
    "google-gemma-4-31B-it": {
        "plain": ([
            2, *GEMMA_USER,                         # <bos>
            100, 45518, 107, 101,                   # <|channel> thought ⏎ <channel|>
        ], GEMMA_HI),
        "thinking": ([
            2, 105, 9731, 107,                      # <bos> <|turn> system ⏎
            98, 107, 106, 107, *GEMMA_USER,         # <|think|> ⏎ <turn|> ⏎
        ], [
            100, 45518, 107,                        # <|channel> thought ⏎
            42960, 236761, 107, 101, *GEMMA_HI,     # Easy . ⏎ <channel|>
        ]),
    },
}
# fmt: on
AFTER = {"google-gemma-4-31B-it": [107]}
VOCABULARIES = {"Qwen3.5-4B": "qwen35", "google-gemma-4-31B-it": "gemma-4"}


@pytest.fixture(scope="module", params=IDS)
def real(request):
    """A published template with the real vocabulary, and its name."""
    name = request.param
    template = templates.source(name)
    if name not in VOCABULARIES:
        tokenizer = downloads.load("qwen3")
        assert tokenizer.chat_template == template
        return name, tokenizer
    file = GGUFFile(downloads.CACHE / "vocab" / f"{VOCABULARIES[name]}.gguf")
    tokenizer = read_tokenizer(dict(file.metadata), where=name)
    tokenizer.chat_template = template
    return name, tokenizer


def test_token_ids(real):
    name, tokenizer = real
    for kind, (prompt, answer) in IDS[name].items():
        before, trained, after = three_parts(tokenizer, *KINDS[kind])
        assert (before, trained) == (prompt, answer), kind
        assert after in ([], AFTER.get(name, [198])), kind


# fmt: off
HARMONY_END = [
    200007, 200006, 1428, 200008,                   # <|end|> <|start|> user <|message|>
    13225, 2375, 200007, 200006, 173781,            # Hello ␣world <|end|> <|start|> assistant
]
FINAL = [200005, 17196, 200008, 12194, 0, 200002]   # <|channel|> final <|message|> Hi ! <|return|>
HARMONY = {
    "plain": FINAL,
    "thinking": [
        200005, 35644, 200008, 41154, 13,           # <|channel|> analysis <|message|> Easy .
        200007, 200006, 173781, *FINAL,             # <|end|> <|start|> assistant
    ],
}
# fmt: on


@pytest.fixture(scope="module")
def gpt_oss():
    """Its vocabulary is OpenAI's; the prompt begins with a page of instructions."""
    tokenizer = copy.deepcopy(downloads.load("gptoss"))
    tokenizer.chat_template = templates.source("openai-gpt-oss-120b")
    return tokenizer


@pytest.mark.parametrize("kind", HARMONY)
def test_token_ids_of_gpt_oss(gpt_oss, kind):
    prompt, answer, after = three_parts(gpt_oss, *KINDS[kind])
    assert prompt[-len(HARMONY_END) :] == HARMONY_END
    assert (answer, after) == (HARMONY[kind], [])


# fmt: off
# DeepSeek's marks, which stand in the place of Qwen's in the vocabulary of its R1 distill.
R1_MARKS = {
    "<｜end▁of▁sentence｜>": 151643, "<｜User｜>": 151644, "<｜Assistant｜>": 151645,
    "<｜begin▁of▁sentence｜>": 151646, "<|EOT|>": 151647, "<think>": 151648, "</think>": 151649,
}
R1_ASKED = [
    151646, 151644, 9707, 1879,                     # begin▁of▁sentence User Hello ␣world
    151645, 151648, 198,                            # Assistant <think> ⏎
]
R1_HI = [151649, 271, 13048, 0, 151643]             # </think> ⏎⏎ Hi ! end▁of▁sentence
R1_IDS = {
    "plain": ([*R1_ASKED, 151649], R1_HI[2:]),
    "thinking": (R1_ASKED, [36730, 624, *R1_HI]),             # Easy .⏎
    "thinks nothing": (R1_ASKED, [198, *R1_HI]),              # ⏎
}
# fmt: on


@pytest.fixture(scope="module")
def r1_distill():
    """Its vocabulary is Qwen's, with other marks in the place of Qwen's."""
    rules = json.loads(downloads.load("qwen3").backend_tokenizer.to_str())
    like = rules["added_tokens"][0]
    rules["added_tokens"] = [
        like | {"id": number, "content": mark} for mark, number in R1_MARKS.items()
    ]
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    core = Tokenizer.from_str(json.dumps(rules))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = templates.source("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B")
    return tokenizer


@pytest.mark.parametrize("kind", R1_IDS)
def test_token_ids_of_the_r1_distill(r1_distill, kind):
    prompt, answer, after = three_parts(r1_distill, *KINDS[kind])
    assert (prompt, answer, after) == (*R1_IDS[kind], [])
