"""Ollama's Modelfile.

Ollama 0.33 runs the Jinja template inside the GGUF where it can do more (tools, thinking) than
the Modelfile's, which is in Go's language, and otherwise the Modelfile's. Before 0.30 it knows
Go's only. So one in Go is written for models of a family that we know.

Grammar, as Ollama's `parser/parser.go` reads it: a command, white space, a value. A value
is bare, "…" or three quotes on either side; nothing escapes anything. It ends at the first
line break where it is whole, white space aside. Characters that Go takes for unprintable are
dropped on reading.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune.data.render import Renderer
from mlxtune.errors import ExportError
from mlxtune.export.gotemplate import go_template
from mlxtune.gguf.ends import ends_of_answers, unstopped_end
from mlxtune.recipe.schema import ExportSection

Value = str | int | float | bool

_ROLES = ("system", "user", "assistant")
_PARAMETER = re.compile(r"[A-Za-z0-9_]+")
# A parameter of such a name would be read as the command.
_COMMANDS = {"adapter", "draft", "license", "message", "model", "parser", "renderer", "requires"}
_COMMANDS |= {"system", "template"}
_KEPT = "\t\n\r "
_LINE = re.compile(r"[\r\n]")


@dataclass(frozen=True)
class Modelfile:
    """What Ollama makes a model of.

    Attributes:
        from_: path of a GGUF, relative to the Modelfile, or a model that Ollama has.
        adapter: path of an adapter in GGUF.
        template: chat template in Go's language.
        system: prompt of conversations that bring none.
        parameters: names and values; `stop` may come several times.
        license: its whole text.
        messages: (role, words) of a conversation that every other begins with.
        renderer: Ollama's own code that writes prompts, by its name there.
        parser: Ollama's own code that reads answers, by its name there.
    """

    from_: str
    adapter: str | None = None
    template: str | None = None
    system: str | None = None
    parameters: tuple[tuple[str, Value], ...] = ()
    license: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    renderer: str | None = None
    parser: str | None = None

    def text(self) -> str:
        """In Ollama's grammar.

        Raises:
            ExportError: the grammar has no way to say a value.
        """
        if not self.from_:
            raise ExportError("a Modelfile is made from a model, and none is named", where="FROM")
        lines = [f"FROM {_bare(self.from_, 'FROM')}"]
        if self.adapter is not None:
            lines.append(f"ADAPTER {_bare(self.adapter, 'ADAPTER')}")
        for command, value in (
            ("TEMPLATE", self.template),
            ("SYSTEM", self.system),
            ("RENDERER", self.renderer),
            ("PARSER", self.parser),
        ):
            if value is not None:
                lines.append(f"{command} {quoted(value, command)}")
        lines += [_parameter(name, value) for name, value in self.parameters]
        if self.license is not None:
            lines.append(f"LICENSE {quoted(self.license, 'LICENSE')}")
        for role, words in self.messages:
            if role not in _ROLES:
                raise ExportError(
                    f"a message in a Modelfile has no role {role!r}",
                    where="MESSAGE",
                    remedy=f"it has one of {', '.join(_ROLES)}",
                )
            lines.append(f"MESSAGE {role} {quoted(words, 'MESSAGE')}")
        return "\n".join(lines) + "\n"


def modelfile(
    renderer: Renderer,
    tokenizer: Any,
    settings: ExportSection | None = None,
    *,
    gguf: str = "./model.gguf",
) -> Modelfile:
    """The Modelfile that makes Ollama speak as the model was trained.

    Args:
        renderer: of the model's chat template.
        tokenizer: mlx-lm's wrapper, which knows the ends of a turn.
        settings: the recipe's `[export]`.
        gguf: path of the model, relative to the Modelfile.

    Raises:
        ExportError: the licence cannot be read, or a text cannot be written.
    """
    settings = settings or ExportSection()
    go = go_template(renderer, tokenizer)
    if go is not None and not (writable(go.text) and writable(go.system)):
        go = None
    own = go.system if go is not None and go.system else None
    made = Modelfile(
        gguf,
        template=go.text if go is not None else None,
        system=settings.system if settings.system is not None else own,
        parameters=_parameters(tokenizer, settings),
        license=_licence(settings.license),
    )
    made.text()  # what cannot be written is told before the model is
    return made


def quoted(text: str, command: str = "value") -> str:
    """A value between quotes: one each on a line without any, three each otherwise.

    Raises:
        ExportError: the grammar cannot express it.
    """
    if (character := _dropped(text)) is not None:
        name = unicodedata.name(character, "unnamed")
        raise ExportError(
            f"Ollama drops the character U+{ord(character):04X} ({name}) from a Modelfile",
            where=command,
            remedy=f"take it out of {_near(text, text.index(character))!r}",
        )
    if (place := _cut(text)) is not None:
        raise ExportError(
            'a Modelfile cannot hold a line that ends with """: the value would end there',
            where=command,
            remedy=f"change {_near(text, place)!r}",
        )
    return f'"""{text}"""' if '"' in text or _LINE.search(text) else f'"{text}"'


def writable(text: str) -> bool:
    """Whether a Modelfile can hold a text."""
    return _dropped(text) is None and _cut(text) is None


def _bare(text: str, command: str) -> str:
    """A value without quotes, as paths are usually written, if it stays what it is."""
    between = quoted(text, command)
    plain = text and text == text.strip() and not text.startswith('"') and not _LINE.search(text)
    return text if plain else between


def _dropped(text: str) -> str | None:
    """The first character that Ollama's parser leaves out (`strconv.IsPrint` says no)."""
    for character in text:
        if unicodedata.category(character)[0] in "CZ" and character not in _KEPT:
            return character
    return None


def _cut(text: str) -> int | None:
    """Where a value in triple quotes would end too early: a line break after three quotes."""
    for found in _LINE.finditer(text):
        read = f'"""{text[: found.start()]}'.rstrip()
        if len(read) >= 6 and read.endswith('"""'):
            return found.start()
    return None


def _near(text: str, place: int) -> str:
    return text[max(0, place - 20) : place + 20]


def _parameter(name: str, value: Value) -> str:
    if not _PARAMETER.fullmatch(name) or name in _COMMANDS:
        raise ExportError(f"Ollama knows no parameter {name!r}", where="PARAMETER")
    if isinstance(value, str):
        return f"PARAMETER {name} {quoted(value, f'PARAMETER {name}')}"
    return f"PARAMETER {name} {str(value).lower()}"


def _parameters(tokenizer: Any, settings: ExportSection) -> tuple[tuple[str, Value], ...]:
    # A template that ends answers in plain text has not taught the model any end.
    ends = ends_of_answers(tokenizer) if unstopped_end(tokenizer) is None else []
    stops = [("stop", str(end)) for end in tokenizer.convert_ids_to_tokens(ends)]
    chosen = [("num_ctx", settings.num_ctx), ("temperature", settings.temperature)]
    return (*stops, *((name, value) for name, value in chosen if value is not None))


def _licence(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        # Licences of the GNU project have page breaks, which a Modelfile cannot hold.
        return Path(path).expanduser().read_text(encoding="utf-8-sig").replace("\f", "")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ExportError(
            f"the licence cannot be read: {reason}", where=path, remedy="see export.license"
        ) from None
