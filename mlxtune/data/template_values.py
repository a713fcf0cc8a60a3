"""Values that a chat template is given, written at its top.

A template may have variables beside the messages: whether the model is to think, how much, what
day it is. transformers leaves them undefined, llama.cpp's server sets some of its own. So what a
model is trained with stands in the template itself, as `set` statements before everything else:
then each program that runs it sends the prompt that was trained, with no flag to remember.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from typing import Any

import jinja2
import jinja2.meta

# Variables with which a template is asked to let the model think. Programs that find out
# whether a template can be told try both values, so `true` is only what they begin with.
SWITCHES = ("enable_thinking", "thinking")
# Formats of `strftime`, by the variable that llama.cpp sets to today's date.
DATES = {"date_string": "%d %b %Y", "datetime": "%b %d %Y"}
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
_GIVEN |= {"unk_token", "pad_token", "raise_exception", "strftime_now", "namespace", "range"}

_SET = r"\{%- set \w+ = [^\n]*? -%\}\n?"
_DEFAULT = r"\{%- if \w+ is not defined -%\}\{%- set \w+ = true -%\}\{%- endif -%\}\n?"
_CLOCK = r"\{%- macro strftime_now\(format\) -%\}[^\n]*\{%- endmacro -%\}\n?"
_TOP = re.compile(rf"\A(?:{_DEFAULT}|{_SET}|{_CLOCK})+(?=\{{#- values -#\}})\{{#- values -#\}}")
_MARK = "{#- values -#}"
_ASKED_FORMAT = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class TemplateValues:
    """What a chat template is given.

    Attributes:
        variables: name to value: booleans, numbers, texts and lists of them.
        today: the date that templates write which write today's; None for the real one.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    today: date | None = None

    def written_into(self, template: str) -> str:
        """A template with these values at its top, instead of any that were there."""
        bare = without_values(template)
        lines = [_assignment(name, value) for name, value in self._all(bare).items()]
        formats = list(dict.fromkeys(found[1] for found in _ASKED_FORMAT.findall(bare)))
        if self.today is not None and formats:
            lines.append(_clock(formats, self.today))
        return "\n".join([*lines, ""]) + _MARK + bare if lines else bare

    def _all(self, template: str) -> dict[str, Any]:
        values = dict(self.variables)
        if self.today is not None:
            for name in sorted(set(DATES) & variables_of(template) - values.keys()):
                values[name] = self.today.strftime(DATES[name])
        return values


def without_values(template: str) -> str:
    """A template as its publisher wrote it."""
    found = _TOP.match(template)
    return template[found.end() :] if found else template


@cache
def variables_of(template: str) -> frozenset[str]:
    """The names that a template takes values of, beside messages, tools and tokens.

    Names that it sets itself count where it asks first whether they are defined.
    """
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", without_values(template))
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(plain)
    except jinja2.TemplateError:
        return frozenset()
    free = jinja2.meta.find_undeclared_variables(tree) - _GIVEN
    own = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx in ("store", "param")}
    asked = set(re.findall(r"(?<![.\w])(\w+)\s+is\s+(?:not\s+)?(?:un)?defined", plain))
    asked |= set(re.findall(r"(?<![.\w])(\w+)\s*\|\s*default\b", plain))
    return frozenset(name for name in free if name not in own or name in asked)


def writes_today(template: str) -> bool:
    """Whether a template writes today's date, and no date of its own instead."""
    bare = without_values(template)
    if "strftime_now" in bare:
        return True
    return bool((set(DATES) & variables_of(bare)) - dates_of_its_own(bare).keys())


def dates_of_its_own(template: str) -> dict[str, str]:
    """The dates that a template writes if it is given none, by variable: Llama 3.1 has one.

    llama.cpp gives it today's.
    """
    bare = without_values(template)
    if "strftime_now" in bare:
        return {}
    names = set(DATES) & variables_of(bare)
    found = {name: re.search(rf"set\s+{name}\s*=\s*([\"'])(.*?)\1", bare) for name in names}
    return {name: date[2] for name, date in found.items() if date is not None}


def _assignment(name: str, value: Any) -> str:
    if name in SWITCHES and value is True:
        return f"{{%- if {name} is not defined -%}}{{%- set {name} = true -%}}{{%- endif -%}}"
    return f"{{%- set {name} = {_literal(value)} -%}}"


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("%}", '%" ~ "}').replace("}}", '}" ~ "}')


def _clock(formats: list[str], today: date) -> str:
    """A macro in the place of the clock: the same day in each format that is asked for."""
    said = "".join(
        f"{{%- {'if' if number == 0 else 'elif'} format == {_literal(text)} -%}}"
        f"{today.strftime(text)}"
        for number, text in enumerate(formats)
    )
    return f"{{%- macro strftime_now(format) -%}}{said}{{%- endif -%}}{{%- endmacro -%}}"
