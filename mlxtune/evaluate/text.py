"""How far an answer is from the expected text: pure functions of strings and numbers."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping

from rapidfuzz.distance import Levenshtein

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise_code(text: str) -> str:
    """For code: each run of white space is one space, none at the ends.

    Case and punctuation mean something in code, so they stay.
    """
    return " ".join(text.split())


def normalise_squad(text: str) -> str:
    """For answers in English prose, as SQuAD compares them (Rajpurkar et al., 2016).

    Lower case; ASCII punctuation and the words a, an and the removed; white space as in
    `normalise_code`.
    """
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


NORMALISATIONS: Mapping[str, Callable[[str], str]] = {
    "code": normalise_code,
    "squad": normalise_squad,
}


def exact_match(answer: str, expected: str) -> float:
    """1 if both are the same, white space around them removed, else 0."""
    return float(answer.strip() == expected.strip())


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words, counted with repetition.

        f1 = 2 |A ∩ B| / (|A| + |B|)

    Words are what white space separates: normalise both texts first. Two texts without a
    word are equal.
    """
    ours, theirs = Counter(answer.split()), Counter(expected.split())
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 1.0


def edit_similarity(answer: str, expected: str) -> float:
    """1 - d / max(|A|, |B|), where d is the Levenshtein distance in characters.

    White space around both is removed first. Two empty texts are equal.
    """
    return float(Levenshtein.normalized_similarity(answer.strip(), expected.strip()))


def perplexity(loss: float) -> float:
    """exp of a loss in nats a token; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float, tokens: int, size: int) -> float | None:
    """The loss spread over the bytes of the text, which all tokenizers agree on.

        bits per byte = loss · tokens / (ln 2 · bytes)

    Args:
        loss: nats a supervised token.
        tokens: how many supervised tokens there are.
        size: UTF-8 bytes of the text that these tokens spell.

    Returns:
        None where there are no bytes.
    """
    return loss * tokens / (math.log(2) * size) if size else None
