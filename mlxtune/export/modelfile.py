"""Ollama's Modelfile.

Ollama from 0.30 on runs the Jinja template inside the GGUF. Older ones know templates in
Go's language only, so one is written where the model speaks plain ChatML.
Grammar: https://docs.ollama.com/modelfile
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxtune.data.records import Turn
from mlxtune.data.render import Renderer
from mlxtune.errors import ExportError

_CHATML_GO = (
    "{{- if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
    '{{- range .Messages }}{{ if ne .Role "system" }}<|im_start|>{{ .Role }}\n'
    "{{ .Content }}<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n"
)


def modelfile(renderer: Renderer, tokenizer: Any, *, gguf: str = "./model.gguf") -> str:
    """The Modelfile that makes Ollama speak as the model was trained.

    Args:
        renderer: of the model's chat template.
        tokenizer: mlx-lm's wrapper, which knows all ends of a turn.
        gguf: path of the model, relative to the Modelfile.
    """
    lines = [f"FROM {gguf}"]
    if (system := chatml_system(renderer)) is not None:
        lines.append(f"TEMPLATE {quoted(_CHATML_GO)}")
        if system:
            lines.append(f"SYSTEM {quoted(system)}")
    ends = tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
    lines += [f"PARAMETER stop {quoted(end)}" for end in ends]
    return "\n".join(lines) + "\n"


def chatml_system(renderer: Renderer) -> str | None:
    """The system prompt that a plain ChatML template adds by itself; None if it is not one."""
    if not renderer.has_template:
        return None
    question = Turn("user", "a b")
    asked = renderer.text([question], ask=True)
    tail = _chatml([question]) + "<|im_start|>assistant\n"
    head = asked.removesuffix(tail)
    opening, closing = "<|im_start|>system\n", "<|im_end|>\n"
    if head == asked or (head and not (head.startswith(opening) and head.endswith(closing))):
        return None
    turns = [Turn("system", "s t"), question, Turn("assistant", "c"), Turn("user", "d")]
    if renderer.text(turns, ask=True) != _chatml(turns) + "<|im_start|>assistant\n":
        return None
    return head.removeprefix(opening).removesuffix(closing)


def quoted(text: str) -> str:
    """A Modelfile value: "…" on one line, triple-quoted otherwise.

    Raises:
        ExportError: the text holds triple quotes, which the grammar cannot express.
    """
    if '"""' in text:
        raise ExportError('a Modelfile cannot hold """', where=text[:40])
    if "\n" in text or '"' in text:
        return f'"""{text}"""'
    return f'"{text}"'


def _chatml(turns: Sequence[Turn]) -> str:
    return "".join(f"<|im_start|>{t.role}\n{t.content}<|im_end|>\n" for t in turns)
