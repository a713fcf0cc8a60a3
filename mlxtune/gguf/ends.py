"""At which tokens an answer ends: found in one place for training, chats, files and folders.

A config, a generation_config.json and a tokenizer each name some. None of them may know the
token with which the chat template ends an answer, which is the one that is trained: the base
models of Qwen have `<|endoftext|>` in all three, and their template writes `<|im_end|>`. So the
template is asked, by rendering an answer with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlxtune.gguf.templates import applied

# Stands for an answer where a chat template is asked what it writes after one.
_ANSWER = "an answer"
_QUESTION = {"role": "user", "content": "a question"}
_NEXT = "another one"


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an answer in the chat template.

    The first special token after the answer, or a later one where only that is known to end a
    text and the template writes it after earlier answers too: Cohere's `<|END_TEXT|>` is no end,
    and the `<|END_OF_TURN_TOKEN|>` after it is. Phi's `<|end|>` is one, and the `<|endoftext|>`
    after it only ends the whole conversation. A token that was added without being called special
    counts too, where it directly follows the answer and is no white space. Where a template writes
    nothing after the last answer, it is the mark that it writes between an answer and the next turn
    (GLM), or else the tokenizer's end of text.

    Args:
        tokenizer: a fast Hugging Face tokenizer, or mlx-lm's wrapper around one.

    Returns:
        Its id; None if there is no template, it refuses the question, or it writes none.
    """
    tail = _after_answer(tokenizer)
    if tail is None:
        return None
    later = _after_answer(tokenizer, followed=True) or ""
    if not tail.strip():
        between = _mark_between(tokenizer, later)
        unwritten: int | None = None if tail else tokenizer.eos_token_id
        return unwritten if between is None else between
    marks, known = _marks(tokenizer, tail), stop_tokens(tokenizer)
    earlier = set(_ids(tokenizer, later))
    sure = [number for number in marks if number in known and number in earlier]
    return next(iter([*marks[:1], *sure] if set(marks[:1]) & known else [*sure, *marks]), None)


def end_of_call(tokenizer: Any) -> int | None:
    """The token that ends a tool call where the template writes it before the result only.

    Returns:
        Its id; None if there is no such token that is known to end a text.
    """
    later = _after_answer(tokenizer, followed=True, call=True) or ""
    known = stop_tokens(tokenizer)
    return next((number for number in _ids(tokenizer, later) if number in known), None)


def _mark_between(tokenizer: Any, later: str) -> int | None:
    """The token between an answer and the next turn, where the template begins that with one."""
    ids = _ids(tokenizer, later.lstrip())
    mark = next(iter(_marks(tokenizer, later.lstrip())), None)
    return mark if mark is not None and mark == ids[0] != tokenizer.bos_token_id else None


def _marks(tokenizer: Any, tail: str) -> list[int]:
    """The special tokens in what a template writes after an answer, in order."""
    ids = _ids(tokenizer, tail)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    special = {*tokenizer.all_special_ids, *(n for n, token in added.items() if token.special)}
    special.update(n for n in ids[:1] if n in added and added[n].content.strip())
    return [number for number in ids if number in special]


def stop_tokens(tokenizer: Any) -> set[int]:
    """The tokens that a tokenizer, or mlx-lm's wrapper with its config, says end a text."""
    known = getattr(tokenizer, "eos_token_ids", tokenizer.eos_token_id)
    if known is None or isinstance(known, int):
        return set() if known is None else {known}
    return set(known)


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


def _ids(tokenizer: Any, text: str) -> Sequence[int]:
    ids: Sequence[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _after_answer(tokenizer: Any, *, followed: bool = False, call: bool = False) -> str | None:
    """What the chat template writes after an answer; None without one that can be asked.

    Args:
        tokenizer: with the template.
        followed: by another turn, whose words end it.
        call: the answer calls a tool, and the tool's result follows.
    """
    if not tokenizer.chat_template and not getattr(tokenizer, "has_chat_template", False):
        return None
    answer: dict[str, Any] = {"role": "assistant", "content": "" if call else _ANSWER}
    then = {"role": "user", "content": _NEXT}
    if call:
        function = {"name": "look", "arguments": {"at": _ANSWER}}
        answer["tool_calls"] = [{"id": "calllook1", "type": "function", "function": function}]
        then = {"role": "tool", "tool_call_id": "calllook1", "name": "look", "content": _NEXT}
    turns = [_QUESTION, answer, *([then] if followed else [])]
    try:
        text = applied(tokenizer, turns)
    except Exception:  # a template may refuse any conversation, in any way
        return None
    _, found, after = text.rpartition(_ANSWER)
    if not found:
        return None
    return after.partition(_NEXT)[0] if followed else after
