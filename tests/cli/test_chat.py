"""`mlxtune chat`: what is said, how an answer is stopped, and what stays in the conversation."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx_lm
import psutil
import pytest
from mlx_lm.sample_utils import make_sampler

from mlxtune.cli import talk
from mlxtune.cli.talk import Chat
from mlxtune.data.records import Turn
from mlxtune.errors import ModelError
from mlxtune.recipe.schema import ModelSection
from mlxtune.train.model import load_base
from support import templates
from support.process import HANGS
from support.program import environment, mlxtune, mlxtune_afresh, wait_until

QUESTION = "list all files"


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_base(ModelSection(path=str(tiny_folder)), for_inference=True)


def asked(chat, question):
    pieces = []
    chat.ask(question, pieces.append)
    return "".join(pieces)


def by_mlx_lm(loaded, messages, **how):
    prompt = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return mlx_lm.generate(loaded.model, loaded.tokenizer, prompt, max_tokens=6, **how)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_conversation_is_what_mlx_lm_says_to_all_of_it(loaded, system):
    chat = Chat(loaded, system, max_tokens=6)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question in (QUESTION, "and the hidden ones?"):
        messages.append({"role": "user", "content": question})
        answer = asked(chat, question)
        assert answer == by_mlx_lm(loaded, messages)
        messages.append({"role": "assistant", "content": answer})
    chat.restart()
    assert asked(chat, QUESTION) == messages[-3]["content"]


def test_a_thought_is_no_part_of_what_was_said(monkeypatch, tmp_path):
    """gpt-oss' template refuses channels among the words of an earlier answer."""
    templates.save_model(tmp_path, "openai-gpt-oss-120b")
    prompts = []

    def says(_model, tokenizer, prompt, **_how):
        prompts.append(tokenizer.decode(prompt))
        yield "<|channel|>analysis<|message|>Easy.<|end|>"
        yield "<|start|>assistant<|channel|>final<|message|>Hi!"

    monkeypatch.setattr(talk, "stream_answer", says)
    chat = Chat(load_base(ModelSection(path=str(tmp_path)), for_inference=True))
    assert asked(chat, "Hello").startswith("<|channel|>analysis<|message|>Easy.<|end|>")
    asked(chat, "Again")
    assert prompts[1] == (
        f"{prompts[0]}<|channel|>final<|message|>Hi!<|end|>"
        "<|start|>user<|message|>Again<|end|><|start|>assistant"
    )


@pytest.mark.slow
def test_a_temperature_draws_as_mlx_lm_does(loaded):
    messages = [{"role": "user", "content": QUESTION}]
    mx.random.seed(5)
    want = by_mlx_lm(loaded, messages, sampler=make_sampler(temp=1.5))
    assert want != by_mlx_lm(loaded, messages)
    mx.random.seed(5)
    assert asked(Chat(loaded, max_tokens=6, temperature=1.5), QUESTION) == want


def test_what_was_said_of_a_stopped_answer_stays(loaded):
    said = []

    def stop(piece):
        said.append(piece)
        if len(said) == 3:
            raise KeyboardInterrupt

    chat = Chat(loaded)
    with pytest.raises(KeyboardInterrupt):
        chat.ask(QUESTION, stop)
    assert chat.turns == [Turn("user", QUESTION), Turn("assistant", "".join(said))]

    def at_once(_piece):
        raise KeyboardInterrupt

    chat.restart()
    with pytest.raises(KeyboardInterrupt):
        chat.ask(QUESTION, at_once)
    assert len(chat.turns) in (0, 2)  # a piece may be empty: then nothing was said


@pytest.mark.parametrize(
    ("template", "system", "told"),
    [
        ("{{ raise_exception('no system here') }}", None, "no system here"),
        ("{{ messages[-1].content }}", "Be brief.", "leaves system prompts out"),
    ],
)
def test_what_a_template_refuses_is_told(tiny_folder, template, system, told):
    loaded = load_base(ModelSection(path=str(tiny_folder)))
    loaded.tokenizer.chat_template = template
    with pytest.raises(ModelError, match=told):
        asked(Chat(loaded, system), QUESTION)


def test_options_reach_the_chat(tiny_run, tmp_path):
    question = ("chat", str(tiny_run), "-p", QUESTION, "--max-tokens=6")
    plain = mlxtune(*question, cwd=tmp_path)
    drawn = (*question, "--temperature=2", "--system=Be brief.")
    first, again = (mlxtune(*drawn, "--seed=7", cwd=tmp_path) for _ in range(2))
    assert (plain.returncode, first.returncode) == (0, 0), first.stderr
    assert first.stdout == again.stdout != plain.stdout
    assert mlxtune(*question, "--seed=7", cwd=tmp_path).returncode == 2


def test_questions_come_through_a_pipe_until_the_exit(tiny_run, tmp_path):
    done = mlxtune_afresh(
        *("chat", str(tiny_run), "--max-tokens=2"),
        cwd=tmp_path,
        stdin="/help\nexit\n/exit\nnot asked\n",
    )
    assert done.returncode == 0
    assert "starts a new conversation" in done.stderr
    assert done.stdout.count("\n") >= 1  # `exit` was a question


class Terminal:
    """The program at a terminal."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self._mine, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlxtune", *arguments],
            cwd=cwd,
            env=environment() | {"TERM": "dumb"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(theirs)
        self.shown = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._mine)

    def write(self, text: str) -> None:
        os.write(self._mine, text.encode())

    def stop(self, *, at_rest: bool = False) -> None:
        """Ctrl-C; `at_rest` not before it waits for a line, as no person is quicker."""
        if at_rest:
            waiting = psutil.Process(self._process.pid)
            wait_until(lambda: waiting.status() == psutil.STATUS_SLEEPING, self._process)
        os.kill(self._process.pid, signal.SIGINT)

    def until(self, condition) -> str:
        """What it shows, once that is so."""
        end = time.monotonic() + HANGS
        while not condition(self.shown):
            assert time.monotonic() < end, self.shown
            if select.select([self._mine], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._mine, 4096).decode(errors="replace")
                except OSError:  # it has closed its side
                    break
        shown, self.shown = self.shown, ""
        return shown

    def ended(self) -> int:
        self.until(lambda _: self._process.poll() is not None)
        return self._process.wait(HANGS)


@pytest.mark.parametrize("way", [pytest.param("exit", marks=pytest.mark.slow), None])
def test_ctrl_c_stops_the_answer_and_at_the_prompt_the_chat(tiny_run, tmp_path, way):
    with Terminal("chat", str(tiny_run), "--max-tokens=1000000", cwd=tmp_path) as terminal:
        terminal.until(lambda shown: "> " in shown)
        terminal.write(f"{QUESTION}\n")
        terminal.until(lambda shown: len(shown) > len(QUESTION) + 20)
        terminal.stop()
        shown = terminal.until(lambda shown: "(stopped)" in shown and shown.endswith("> "))
        assert "Traceback" not in shown
        terminal.write("/help\n")
        terminal.until(lambda shown: "new conversation" in shown and shown.endswith("> "))
        if way is None:
            terminal.stop(at_rest=True)
        else:
            terminal.write(f"{way}\n")
        assert terminal.ended() == 0
