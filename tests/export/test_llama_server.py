"""The helper that asks llama.cpp's server about templates."""

from __future__ import annotations

from datetime import datetime

import pytest

from support.chats import (
    CALL,
    FRANCE,
    IT_IS,
    ITALY,
    PARIS,
    RESULT,
    TEMPLATES,
    WARM,
    WEATHER,
    chat,
    messages,
)
from support.llama_server import LlamaServer, ReadBack, RefusedError

ROUNDS, CALLED = messages((FRANCE, PARIS, ITALY)), messages((WARM, CALL, RESULT, IT_IS, FRANCE))
SAYS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
# llama.cpp tells templates today's date, and transformers tells them none.
DAY = {"date_string": "26 Jul 2024"}


@pytest.fixture
def serve(request, tmp_path):
    """A server with the template of this name, and the tokenizer that it belongs to."""
    pytest.importorskip("xllamacpp")

    def start(name: str):
        tokenizer = chat(name, request).tokenizer
        bos, eos = tokenizer.bos_token or "<s>", tokenizer.eos_token
        return LlamaServer(tmp_path, tokenizer.chat_template, bos=bos, eos=eos), tokenizer

    return start


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_transformers_writes(serve, name):
    server, tokenizer = serve(name)
    # llama.cpp always has a text for bos_token.
    bos = tokenizer.bos_token or "<s>"
    how = {"tokenize": False, "add_generation_prompt": True, "bos_token": bos}
    with server:
        assert server.prompt(ROUNDS, kwargs=DAY) == tokenizer.apply_chat_template(ROUNDS, **how)
        if TEMPLATES[name].tools:
            expected = tokenizer.apply_chat_template(CALLED, tools=[WEATHER], **how)
            assert server.prompt(CALLED, tools=[WEATHER], kwargs=DAY) == expected
        assert server.read(ROUNDS, "Rome, 漢字 🎉.") == ReadBack("Rome, 漢字 🎉.")


def test_thoughts_and_calls_are_read(serve):
    thought, shown = "<think>\nHm.\n</think>\n\n", {"enable_thinking": False}
    server, _ = serve("qwen3")
    with server:
        assert server.prompt(ROUNDS, kwargs=shown).endswith("<think>\n\n</think>\n\n")
        assert server.read(ROUNDS, thought + "Rome.") == ReadBack("Rome.", "Hm.\n")
        unread = server.read(ROUNDS, thought + "Rome.", kwargs=shown)
        assert unread == ReadBack(thought + "Rome.")
        made = (("weather", {"city": "Rome"}),)
        assert server.read(ROUNDS, thought + SAYS, tools=[WEATHER]) == ReadBack("", "Hm.\n", made)
        assert server.read(ROUNDS, SAYS) == ReadBack(SAYS)
        for text in ("", "x", "\n"):
            assert server.read(ROUNDS, text) == ReadBack(text)
        with pytest.raises(RefusedError, match="after accepting piece: <tool_call>"):
            server.read(ROUNDS, SAYS.replace("weather", "wether"), tools=[WEATHER])


def test_what_a_template_is_told(tmp_path):
    pytest.importorskip("xllamacpp")
    names = "bos_token eos_token enable_thinking datetime date_string preserve_reasoning"
    names += " preserve_thinking clear_thinking drop_thinking truncate_history_thinking thinking"
    asks = "|".join(f"{{{{ {name} }}}}" for name in names.split())
    with LlamaServer(tmp_path, asks, bos="<b>") as server:
        before = datetime.now()
        told = server.prompt(messages((FRANCE,))).split("|")
        after = datetime.now()
    assert told.pop(3) in {f"{day:%b %d %Y}" for day in (before, after)}
    assert told.pop(3) in {f"{day:%d %b %Y}" for day in (before, after)}
    assert told == ["<b>", "</s>", "False", "True", "True", "False", "False", "False", ""]


def test_refusals(serve, tmp_path):
    server, _ = serve("gemma3")
    with server, pytest.raises(RefusedError, match="roles must alternate"):
        server.prompt(messages((FRANCE, ITALY)))
    with pytest.raises(RefusedError, match=r"llama\.cpp does not start"):
        LlamaServer(tmp_path, "{% for m in messages %}")
    assert not list(tmp_path.iterdir())


def test_servers_stop_that_were_asked_nothing(tmp_path):
    pytest.importorskip("xllamacpp")
    for _ in range(20):
        with LlamaServer(tmp_path, "{{ messages }}"):
            pass
