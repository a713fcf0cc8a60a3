"""Filters: what they drop, and real rows that they leave alone."""

from __future__ import annotations

import sys

import pytest

from mlxtune.data.records import Conversation, Segment, ToolCall, Turn
from mlxtune.data.sources import read_conversations
from mlxtune.errors import DataError
from mlxtune.install import install_extra
from mlxtune.prep import extras
from mlxtune.prep.filters import (
    broken_text,
    echo,
    filters,
    language_in,
    length_between,
    mend_encoding,
    no_answer,
    refusal,
)
from mlxtune.recipe.schema import PrepSection


def pair(prompt: str, answer: str, **more) -> Conversation:
    return Conversation((Turn("user", prompt), Turn("assistant", answer)), **more)


def reasons(settings: PrepSection, conversation: Conversation) -> list[str]:
    return [r for check in filters(settings) if (r := check(conversation)) is not None]


OFF = {"fix_encoding": False, "drop_refusals": False, "drop_empty": False, "drop_echo": False}


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but as an AI language model I don't have access to your files.",
        "I’m sorry, but I can’t assist with that request.",
        "I am really sorry, but I cannot help you with this.",
        "Sorry, I can't do that.",
        "As an AI, I do not have personal opinions.",
        "As a large language model, I have no body.",
        "As an artificial intelligence assistant, I cannot feel.",
        "I cannot provide medical advice.",
        "I can't help with that.",
        "I'm unable to assist with hacking.",
        "I am not able to generate that image.",
        "I must respectfully decline.",
        "I'm just an AI, so I can't browse the web.",
        "Unfortunately, I cannot create that for you.",
        "I apologize, but I am unable to find it.",
        "My apologies, but I won't write this.",
        "> *I'm sorry, but I can't continue.*",
    ],
)
def test_refusals_are_known_by_their_beginning(answer):
    assert refusal(pair("Do it", answer)) == "refusal"
    assert reasons(PrepSection(**OFF | {"drop_refusals": True}), pair("Do it", answer))
    assert not reasons(PrepSection(**OFF), pair("Do it", answer))


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry for your loss.",
        "I'm sorry to hear that. Try restarting the router.",
        "Sorry means regretting something.",
        "As an AI engineer, you build models.",
        "I can't wait to see it!",
        "I cannot stress enough how important backups are.",
        "I'm an AI assistant made to help you with shells.",
        "An apology may begin like this: I'm sorry, but I cannot come.",
        "Apologies are accepted with grace.",
        'echo "I can\'t help with that"',
        "",
    ],
)
def test_honest_answers_are_no_refusals(answer):
    assert refusal(pair("Say it", answer)) is None


def test_only_the_last_answer_is_asked_for_a_refusal():
    refused, answered = "I can't help with that.", "ls"
    turns = (Turn("user", "a"), Turn("assistant", refused), Turn("user", "b"))
    assert refusal(Conversation((*turns, Turn("assistant", answered)))) is None
    assert refusal(Conversation((*turns, Turn("assistant", refused)))) == "refusal"


@pytest.mark.parametrize("text", ["schön", "“quoted” — naïve", "Überprüfe die Größe", "日本語"])
@pytest.mark.parametrize("table", ["latin-1", "windows-1252"])
def test_mojibake_is_undone(text, table):
    try:
        garbled = text.encode().decode(table)
    except UnicodeDecodeError:
        pytest.skip("the table has no such byte")
    mended = mend_encoding()(pair(garbled, garbled, tags={"note": garbled}))
    assert [t.content for t in mended.turns] == [text, text]
    assert mended.tags["note"] == text


@pytest.mark.parametrize(
    "text",
    [
        "it’s “fine”",
        "a &lt; b &amp;&amp; c",
        "ﬁne",
        "ｆｕｌｌ",
        "line\r\nline",
        "e\u0301",
        "naïve café",
    ],
)
def test_only_the_encoding_is_changed(text):
    assert mend_encoding()(pair(text, text)) == pair(text, text)


def test_what_cannot_be_mended_is_dropped():
    lost = "schön".encode("latin-1").decode("utf-8", "replace")
    assert broken_text(mend_encoding()(pair("a", lost))) == "broken characters (U+FFFD)"
    assert broken_text(pair("a", "bell \x07")) == "control characters"
    assert broken_text(pair("a\tb\r\n", "for f in *; do\n\techo\ndone")) is None
    call = ToolCall("f", {"path": ["a\x00b"]})
    assert broken_text(Conversation((Turn("assistant", "", tool_calls=(call,)),)))
    assert reasons(PrepSection(**OFF | {"fix_encoding": True}), pair("a", lost))
    assert not reasons(PrepSection(**OFF), pair("a", lost))


def test_empty_answers():
    asked = Turn("user", "hi")
    on = PrepSection(**OFF | {"drop_empty": True})
    assert reasons(on, pair("hi", " \n")) == ["empty answer"]
    assert not reasons(PrepSection(**OFF), pair("hi", " \n"))
    assert (
        no_answer(Conversation((asked, Turn("assistant", "", tool_calls=(ToolCall("f", {}),)))))
        is None
    )
    assert no_answer(Conversation(segments=(Segment(" ", True),))) == "empty text"
    assert no_answer(Conversation(segments=(Segment("x", True),))) is None
    pair_of = pair("hi", "good", rejected=(Turn("assistant", ""),))
    assert no_answer(pair_of) == "empty rejected answer"


def test_rows_that_training_would_refuse_as_empty():
    assert no_answer(pair(" ", "ls")) == "empty request"
    silent = (Turn("user", "a"), Turn("assistant", ""), Turn("user", "b"), Turn("assistant", "c"))
    assert no_answer(Conversation(silent)) == "empty answer"


def test_echoes():
    on = PrepSection(**OFF | {"drop_echo": True})
    assert reasons(on, pair("List all files.", "  list ALL files")) == [
        "the answer repeats the request"
    ]
    assert not reasons(PrepSection(**OFF), pair("List all files.", "list all files"))
    assert echo(pair("ls", "ls -l")) is None
    assert echo(pair("!!", "??")) is None
    assert echo(pair("!!", "!!")) is not None
    assert echo(Conversation(segments=(Segment("x", True),))) is None


def test_length_counts_characters_of_everything():
    row = pair("1234", "é" * 6)  # and the two line breaks between them
    assert length_between(12, 12)(row) is None
    assert length_between(13, None)(row) == "shorter than 13 characters"
    assert length_between(0, 11)(row) == "longer than 11 characters"
    assert reasons(PrepSection(**OFF, min_chars=13), row)
    assert reasons(PrepSection(**OFF, max_chars=11), row)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("de", "Lösche alle leeren Ordner im aktuellen Verzeichnis"),
        ("fr", "Supprime tous les fichiers temporaires du dossier"),
        ("es", "Cuenta las líneas de cada archivo en esta carpeta"),
        ("ru", "Покажи все файлы в каталоге"),
        ("zh", "列出当前目录中的所有文件"),
    ],
)
def test_other_languages_are_dropped(language, text):
    row = pair(text, "ls")
    assert language_in(["en"])(row) == f"language {language}"
    assert language_in(["en", language])(row) is None
    assert reasons(PrepSection(**OFF, languages=("en",)), row) == [f"language {language}"]
    assert not reasons(PrepSection(**OFF), row)


def test_code_and_short_requests_are_kept_in_doubt():
    check = language_in(["en"])
    assert check(pair("`sudo systemctl restart`", "x")) is None
    assert check(pair("42 + 1", "43")) is None
    assert check(pair("ok", "x")) is None


def test_real_english_rows_are_kept(nl2bash):
    rows = read_conversations(nl2bash)[:3000]
    checks = filters(PrepSection(languages=("en",)))
    dropped = [(row.where, r) for row in rows for check in checks if (r := check(row))]
    assert len(dropped) <= 0.005 * len(rows), dropped


def test_a_wrong_language_and_a_missing_package_are_told(monkeypatch):
    with pytest.raises(DataError, match="no code of a language"):
        language_in(["English"])

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(extras, "import_module", missing)
    for need in (mend_encoding, lambda: language_in(["en"])):
        with pytest.raises(DataError) as error:
            need()
        assert error.value.remedy == install_extra("prep")
    # There pip would bring no such package.
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    with pytest.raises(DataError, match=r"no wheel for Python 3\.14 on macOS") as error:
        language_in(["en"])
    assert "3.13" in error.value.remedy
