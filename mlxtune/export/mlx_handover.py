"""Hand a folder to Ollama's MLX engine: run `ollama create`, ask for prompts, try answers.

The program writes the model into its store on this machine. Which prompts it then sends is asked
of its server, on a wide set of conversations, and compared with what was trained; so are a few
answers.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxtune.data.records import Conversation, ToolCall, Turn
from mlxtune.data.render import Renderer
from mlxtune.errors import ExportError
from mlxtune.export.engine_tokens import EngineTokenizer
from mlxtune.export.gotemplate import CONVERSATIONS
from mlxtune.export.handover import MODELFILE, HandOver
from mlxtune.export.mlx_engine import (
    OLDEST,
    NotForEngine,
    installed_version,
    renderers_for,
)
from mlxtune.export.modelfile import Modelfile
from mlxtune.export.ollama import Ollama, Refused, base_url, is_local, require_name
from mlxtune.files import write_text
from mlxtune.models.ollama_store import has_model

_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[⠀-⣿]")
# Tokens of an answer that are compared: of greedy answers in sixteen bits later ones may differ
# where two tokens are as likely.
TOKENS = 24


def create_command(folder: Path, name: str) -> tuple[str, ...]:
    """The command that makes a model of a folder for the MLX engine."""
    return ("ollama", "create", name, "--experimental", "-f", str(folder / MODELFILE))


def require_program(name: str, *, overwrite: bool) -> None:
    """See that a model can be handed over, before any work is done.

    Raises:
        ExportError: there is no `ollama` here that can, its server is another machine's or does
            not answer, or the name is taken.
    """
    require_name(name)
    version = installed_version()
    if version is None:
        raise ExportError(
            "Ollama's MLX engine is given models by the program ollama, which is not on the PATH",
            remedy="install Ollama 0.19 or newer: https://ollama.com/download",
        )
    if (0,) < version < OLDEST:
        raise ExportError(
            f"Ollama {'.'.join(map(str, version))} has no MLX engine",
            remedy="update it to 0.19 or newer, or hand the GGUF over: --engine gguf",
        )
    if not is_local(base_url()):
        raise ExportError(
            "models for Ollama's MLX engine are written to disk, and the server is on another "
            "machine",
            where=f"OLLAMA_HOST={os.environ.get('OLLAMA_HOST', '')}",
            remedy="run this on that machine, or hand the GGUF over: --engine gguf",
        )
    if not overwrite and has_model(name):
        raise ExportError(
            f"Ollama has a model called {name} already",
            where="--name",
            remedy="choose another name with --name, or replace it with --overwrite",
        )
    with Ollama() as server:
        server.version()


@dataclass(frozen=True)
class _Way:
    """A way to have prompts written, and how they are.

    Attributes:
        modelfile: that has them written so.
        think: what a client has to say of thinking; None for nothing.
        other: how a prompt that matters differs; None if none does.
        rare: how many of those differ that hardly anybody sends.
    """

    modelfile: Modelfile
    think: bool | None
    other: str | None
    rare: int


def hand_to_engine(
    folder: Path,
    name: str,
    modelfile: Modelfile,
    config: dict[str, Any],
    renderer: Renderer,
    *,
    records: Sequence[Conversation] = (),
    answers: Sequence[str] = (),
    dry_run: bool = False,
    by_default: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> HandOver:
    """Make a model of a folder, and see that it is asked and answers as it was trained.

    Args:
        folder: of safetensors, with its Modelfile, which is written anew if Ollama's code for
            prompts has to be named in it.
        name: what Ollama is to call it.
        modelfile: the one in the folder.
        config: of the model.
        renderer: of its chat template.
        records: some of the run's own, tools and thoughts included.
        answers: how MLX answers them greedily, the first `TOKENS` tokens of each; may be empty.
        dry_run: only say what to do.
        by_default: whether a client that says nothing of thinking has to ask as was trained.
        progress: called with what is being done.

    Raises:
        NotForEngine: nothing that Ollama has writes the prompts that were trained; the model is
            taken away again.
        ExportError: `ollama` fails, or its server does not answer.
    """
    create = shlex.join(create_command(folder, name))
    if dry_run:
        commands = (create, f"ollama run {shlex.quote(name)}")
        return HandOver("ollama", name, False, "a dry run: nobody was asked", commands)
    asked = [*map(Conversation, CONVERSATIONS)]
    asked += [Conversation(each.prompt_turns(), tools=each.tools) for each in records]
    wanted = [(each, text) for each in asked if (text := _trained(renderer, each, modelfile))]
    begin = EngineTokenizer(folder).begin
    mark = "" if begin is None else renderer.decode([begin])
    tried: list[_Way] = []
    with Ollama() as server:
        version = server.version()
        for each in _modelfiles(modelfile, config):
            progress(f"ollama create {name}")
            _create(folder, name, each)
            progress("asking for its prompts")
            ways = (None,) if by_default or each.renderer is None else (None, False)
            tried += [_looked_at(server, name, each, think, wanted, mark) for think in ways]
            if any(way.think is None and way.other is None for way in tried):
                break
        right = sorted((w for w in tried if w.other is None), key=lambda w: w.think is not None)
        way = next(iter(right), None)
        if way is None:
            if tried:
                server.delete(name)
            raise _prompts_differ(name, tried)
        if way.modelfile != tried[-1].modelfile:
            _create(folder, name, way.modelfile)
        progress("asking for answers")
        same = _same_answers(server, name, records, answers, way.think)
    note = f"Ollama {version} has {name}, for its MLX engine; the prompts of "
    note += f"{len(wanted) - way.rare} of {len(wanted)} conversations are the trained ones"
    run = f"ollama run {shlex.quote(name)}"
    if way.think is not None:
        note += ' where clients send "think": false'
        run += " --think=false"
    if answers:
        note += f"; {same} of {len(answers)} answers begin as MLX's own"
    return HandOver("ollama", name, True, note, (run,))


def _prompts_differ(name: str, tried: Sequence[_Way]) -> NotForEngine:
    said = [f"{each.modelfile.renderer or 'TEMPLATE'}: {each.other}" for each in tried]
    said = said or ["no TEMPLATE in its language is known for this chat template"]
    return NotForEngine(
        "\n  ".join(["Ollama's MLX engine would not ask this model as it was trained", *said]),
        where=name,
    )


def _trained(renderer: Renderer, asked: Conversation, modelfile: Modelfile) -> str | None:
    """The prompt that was trained, with the mark that is put before every text.

    The system prompt of the Modelfile is put before conversations that have none.
    """
    turns = asked.turns
    if modelfile.system is not None and (not turns or turns[0].role != "system"):
        turns = (Turn("system", modelfile.system), *turns)
    try:
        text = renderer.text(turns, tools=asked.tools, ask=True)
    except Exception:  # Jinja templates raise whatever they like
        return None
    mark = renderer.decode(renderer.encode("")[:1])
    return mark + text.removeprefix(mark)


def _modelfiles(modelfile: Modelfile, config: dict[str, Any]) -> Iterator[Modelfile]:
    """The Modelfiles to try: with Ollama's own code where it goes before any TEMPLATE."""
    pairs = renderers_for(config)
    for renderer, parser in pairs:
        yield replace(modelfile, template=None, renderer=renderer, parser=parser)
    if not pairs and modelfile.template is not None:
        yield modelfile


def _looked_at(
    server: Ollama,
    name: str,
    modelfile: Modelfile,
    think: bool | None,
    wanted: Sequence[tuple[Conversation, str]],
    mark: str,
) -> _Way:
    """How a model is asked; `mark` is what the engine puts before every prompt."""
    rare = 0
    for asked, prompt in wanted:
        messages = [_message(turn) for turn in asked.turns]
        try:
            got = mark + server.prompt(name, messages, list(asked.tools), think=think)
        except Refused as error:  # such as that a TEMPLATE has no tools
            return _Way(modelfile, think, error.what, rare)
        if got == prompt:
            continue
        if not _is_rare(asked):
            other = f"it sends {_shown(got)}, and trained was {_shown(prompt)}"
            return _Way(modelfile, think, other, rare)
        rare += 1
    return _Way(modelfile, think, None, rare)


def _is_rare(asked: Conversation) -> bool:
    """Whether hardly anybody sends such a conversation, for which Ollama's code may differ.

    One with system messages later on, with empty messages, or with white space around them.
    """
    late = any(turn.role == "system" for turn in asked.turns[1:])
    blank = any(turn.content != turn.content.strip() for turn in asked.turns)
    return late or blank or any(turn.empty for turn in asked.turns)


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as Ollama's API has it."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.reasoning:
        message["thinking"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = [_call(call) for call in turn.tool_calls]
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    if turn.name:
        message["tool_name"] = turn.name
    return message


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"function": function} | ({"id": call.id} if call.id else {})


def _shown(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:60]}…{text[-39:]}")


def _same_answers(
    server: Ollama,
    name: str,
    records: Sequence[Conversation],
    answers: Sequence[str],
    think: bool | None,
) -> int:
    """How many answers are as expected."""
    same = 0
    for record, expected in zip(records, answers, strict=False):
        messages = [_message(turn) for turn in record.prompt_turns()]
        got = server.answer(name, messages, TOKENS, think=think)
        same += got.strip() == expected.strip()
    return same


def _create(folder: Path, name: str, modelfile: Modelfile) -> None:
    write_text(folder / MODELFILE, modelfile.text())
    program = shutil.which("ollama")
    assert program is not None
    command = [program, *create_command(folder, name)[1:]]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise ExportError(f"ollama cannot be started: {error.strerror or error}") from None
    if done.returncode != 0:
        said = _TERMINAL.sub("", done.stderr).strip() or done.stdout.strip() or "nothing"
        raise ExportError(
            f"ollama made no model (exit code {done.returncode}); it says last: "
            + said.splitlines()[-1].strip(),
            where=shlex.join(create_command(folder, name)),
            remedy="the folder is ready; that command goes on with it",
        )
