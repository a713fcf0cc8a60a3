"""A model tuned through a template that opens a thought, asked in llama.cpp's server.

The template writes no reasoning, as DeepSeek R1's does not. What the model answers, and where the
server shows it, is what the records say.
"""

from __future__ import annotations

import pytest

from mlxtune.export.convert import convert
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.metrics import Silent
from mlxtune.train.session import fine_tune
from support.files import write_jsonl
from support.llamacpp import client, serve
from support.models import SMOLLM2

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# What is asked, what is thought and what is answered.
RECORDS = (
    ("Colour of grass?", "A plant.", "Green."),
    ("Colour of snow?", "Frozen water.", "White."),
    ("Colour of coal?", "Old wood.", "Black."),
    ("Colour of blood?", "In veins.", "Red."),
    ("Colour of the sea?", "Salt water.", "Blue."),
    ("Colour of a lemon?", "A fruit.", "Yellow."),
)


def tuned(folder, *, thinking):
    """A GGUF of SmolLM2 that has learned the records by heart, with or without reasoning."""
    (folder / "chat.jinja").write_text(TEMPLATE)
    records = []
    for question, thought, answer in RECORDS:
        said = {"role": "assistant", "content": answer}
        if thinking:
            said["reasoning_content"] = thought
        records.append({"messages": [{"role": "user", "content": question}, said]})
    recipe = parse_recipe(
        {
            "name": "t",
            "model": {
                "path": SMOLLM2,
                "dequantize": True,
                "chat_template": str(folder / "chat.jinja"),
            },
            "lora": {"rank": 16, "layers": 6},
            "data": [{"path": str(write_jsonl(folder / "data.jsonl", records))}],
            "train": {
                "batch_size": 6,
                "max_steps": 18,
                "learning_rate": 5e-3,
                "lr_scheduler": "constant",
                "gradient_checkpointing": False,
            },
        },
        where="test",
    )
    run = fine_tune(recipe, folder / "run", Silent())
    convert(str(run.path), folder / "model.gguf", file_type="q8_0", verify=False)
    return folder / "model.gguf"


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [False, True], ids=["plain", "thinking"])
def test_answers_and_thoughts_are_shown_where_they_belong(thinking, tmp_path):
    server = serve(tuned(tmp_path, thinking=thinking))
    with client(server) as asked:
        for question, thought, answer in RECORDS:
            messages = [{"role": "user", "content": question}]
            prompt = asked.post("/apply-template", json={"messages": messages}).json()["prompt"]
            assert prompt == (
                f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n"
            )
            body = {"messages": messages, "temperature": 0, "max_tokens": 24}
            [choice] = asked.post("/v1/chat/completions", json=body).json()["choices"]
            message = choice["message"]
            assert choice["finish_reason"] == "stop"
            assert message["content"].strip() == answer
            assert message.get("reasoning_content", "").strip() == (thought if thinking else "")
