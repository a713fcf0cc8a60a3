"""Evaluating models that think: their words are compared, whatever is thought before them."""

from __future__ import annotations

import pytest

from mlxtune.evaluate.compare import compare_run
from mlxtune.train.metrics import Silent
from mlxtune.train.session import fine_tune
from support.files import write_jsonl

# As DeepSeek R1's: it opens a thought, and writes none.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Longer than the answer by more than what an answer may be too long.
THOUGHT = "a long thought"


@pytest.mark.parametrize("thought", [pytest.param("", marks=pytest.mark.slow), THOUGHT])
def test_words_are_compared(recipe, tmp_path, thought):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    said = {"role": "assistant", "content": "ok"} | (
        {"reasoning_content": thought} if thought else {}
    )
    record = {"messages": [{"role": "user", "content": "say it"}, said]}
    data = write_jsonl(tmp_path / "data.jsonl", [record] * 4)
    settings = recipe(
        data,
        model={"chat_template": str(tmp_path / "chat.jinja")},
        eval={"path": str(data), "max_overlap": 1.0},
        train={"max_steps": 45, "learning_rate": 2e-2},
    )
    run = fine_tune(settings, tmp_path / "run", Silent())
    comparison = compare_run(run.path)
    assert [answer.tuned for answer in comparison.answers] == ["ok"] * 4
    assert comparison.tuned.exact_match == 1
    assert comparison.base.exact_match == 0
