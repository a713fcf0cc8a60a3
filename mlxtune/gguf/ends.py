"""At which tokens an answer ends: found in one place for training, chats, files and folders.

A config, a generation_config.json and a tokenizer each name some. None of them may know the
token with which the chat template ends an answer, which is the one that is trained: the base
models of Qwen have `<|endoftext|>` in all three, and their template writes `<|im_end|>`. So the
template is asked, by rendering an answer with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Stands for an answer where a chat template is asked what it writes after one.
_ANSWER = "an answer"


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an answer in the chat template: the first special one after it.

    A token that was added without being called special counts too, where it directly follows
    the answer and is no white space.

    Args:
        tokenizer: a fast Hugging Face tokenizer, or mlx-lm's wrapper around one.

    Returns:
        Its id; None if there is no template, it refuses the question, or it writes none.
    """
    tail = _after_answer(tokenizer)
    if not tail:
        return None
    core = tokenizer.backend_tokenizer
    ids = core.encode(tail, add_special_tokens=False).ids
    added = core.get_added_tokens_decoder()
    special = {*tokenizer.all_special_ids, *(n for n, token in added.items() if token.special)}
    plain = ids[0] in added and added[ids[0]].content.strip()
    return ids[0] if plain else next((n for n in ids if n in special), None)


def ends_of_answers(tokenizer: Any, said: int | Iterable[int] | None = None) -> list[int]:
    """All tokens at which generation is to stop, the chat template's own first.

    Args:
        tokenizer: mlx-lm's wrapper, which knows those of the config and of its tokenizer.
        said: `eos_token_id` of a config, whose order is kept.
    """
    known = set(tokenizer.eos_token_ids)
    end = end_of_turn(tokenizer)
    first = [] if end is None else [end]
    ordered = [said] if isinstance(said, int) else list(said or ())
    kept = [number for number in ordered if number in known]
    return list(dict.fromkeys([*first, *kept, *sorted(known)]))


def unstopped_end(tokenizer: Any) -> str | None:
    """The text that the chat template writes after an answer, where nothing stops at it.

    None where a token ends the answer, and where there is no template that can be asked.
    """
    tail = _after_answer(tokenizer)
    return tail if tail is not None and end_of_turn(tokenizer) is None else None


def _after_answer(tokenizer: Any) -> str | None:
    """What the chat template writes after an answer; None without one that can be asked."""
    if not tokenizer.chat_template and not getattr(tokenizer, "has_chat_template", False):
        return None
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template may refuse any conversation, in any way
        return None
    _, found, after = text.rpartition(_ANSWER)
    return after if found else None
