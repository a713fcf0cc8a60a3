"""Personal data and secrets in texts, replaced by placeholders such as `<EMAIL_1>`.

A value has the same placeholder wherever it stands in a record, so that an answer still
refers to what was asked. Numbers start again with each record, so that nobody can be
followed from one to another.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mlxtune.data.records import Conversation
from mlxtune.errors import DataError
from mlxtune.prep.extras import load
from mlxtune.prep.texts import all_texts, map_texts


class Span(NamedTuple):
    """Characters from `start` up to `end` of a text that are to go, and what they are."""

    start: int
    end: int
    kind: str


Detector = Callable[[str], Iterator[Span]]

# Earlier kinds win where two overlap: the password of an URL before the e-mail address
# that it looks like together with the host, all the exact ones before Presidio's guesses.
KINDS = ("secret", "email", "ip", "card", "phone", "presidio")


class Scrubber:
    """Replaces what its detectors find in a conversation.

    Args:
        kinds: names from `KINDS`.
        phone_region: country (ISO 3166-1) of phone numbers without a country code.

    Raises:
        DataError: a package that a kind needs isn't installed.
    """

    def __init__(self, kinds: Iterable[str], phone_region: str = "US") -> None:
        made: dict[str, Callable[[], Detector]] = {
            "secret": secrets,
            "email": lambda: emails,
            "ip": lambda: ip_addresses,
            "card": lambda: cards,
            "phone": lambda: phone_numbers(phone_region),
            "presidio": presidio,
        }
        self._detectors = [made[kind]() for kind in sorted(set(kinds), key=KINDS.index)]

    def __call__(self, conversation: Conversation) -> tuple[Conversation, Counter[str]]:
        """The conversation with placeholders, and how many it got of each kind."""
        texts = all_texts(conversation)
        spans = {text: find_spans(text, self._detectors) for text in texts}
        if not any(spans.values()):
            return conversation, Counter()
        names = _placeholders(texts, spans)
        counts: Counter[str] = Counter()

        def change(text: str) -> str:
            parts, position = [], 0
            for start, end, kind in spans[text]:
                parts += [text[position:start], names[kind, text[start:end]]]
                counts[kind] += 1
                position = end
            return "".join([*parts, text[position:]])

        return map_texts(conversation, change), counts


def find_spans(text: str, detectors: Sequence[Detector]) -> list[Span]:
    """What the detectors find, in order and without overlaps; earlier detectors win."""
    chosen: list[Span] = []
    for detect in detectors:
        for span in detect(text):
            if all(span.end <= other.start or span.start >= other.end for other in chosen):
                chosen.append(span)
    return sorted(chosen)


def _placeholders(texts: Sequence[str], spans: dict[str, list[Span]]) -> dict[tuple[str, str], str]:
    """A name for each value, numbered by first appearance; none that a text holds already."""
    names: dict[tuple[str, str], str] = {}
    numbers: Counter[str] = Counter()
    for text in texts:
        for start, end, kind in spans[text]:
            value = text[start:end]
            while (kind, value) not in names:
                numbers[kind] += 1
                name = f"<{kind}_{numbers[kind]}>"
                if not any(name in other for other in texts):
                    names[kind, value] = name
    return names


_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.)+[^\W\d_]{2,24}(?![\w-])")
# What stands after the last dot of a systemd unit: `getty@tty1.service` is no address.
_UNITS = ("service", "socket", "timer", "target", "mount", "path", "slice", "scope", "device")


def emails(text: str) -> Iterator[Span]:
    """E-mail addresses, as they are written in practice (a part of RFC 5322).

    `git@host` of a repository is left alone: it is the same for everyone.
    """
    if "@" not in text:
        return
    for match in _EMAIL.finditer(text):
        user, _, host = match[0].partition("@")
        if user != "git" and not host.endswith(tuple(f".{unit}" for unit in _UNITS)):
            yield Span(*match.span(), "EMAIL")


_IPV4 = re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\w)")
_IPV6 = re.compile(
    r"(?<![\w:.])[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}(?:\.\d{1,3}){0,3}(?![\w:])", re.IGNORECASE
)


def ip_addresses(text: str) -> Iterator[Span]:
    """Addresses of IP versions 4 and 6 that name a machine.

    Loopback, unspecified and multicast addresses and netmasks name none and stay.
    """
    for pattern in (_IPV6, _IPV4):  # the former may end in the latter
        for match in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(match[0])
            except ValueError:
                continue
            # A::B is also how Ruby and C++ name things; an address has digits.
            if not any(c.isdigit() for c in match[0]) or _names_no_machine(address):
                continue
            yield Span(*match.span(), "IP")


def _names_no_machine(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if address.is_loopback or address.is_unspecified or address.is_multicast:
        return True
    # 240.0.0.0/4 is given to nobody: what is written from it are masks.
    return address.version == 4 and address.is_reserved


# Issuers' ranges (ISO/IEC 7812-1): Visa, Mastercard, American Express, Diners, Discover,
# JCB, UnionPay. Without them one long number in ten passes for a card.
_CARD = re.compile(
    r"(?<![\w.])(?:4|5[1-5]|2[2-7]|3[0-9]|6[0-9])(?:[ -]?\d){11,17}(?![\w]|\.\d)", re.ASCII
)


def cards(text: str) -> Iterator[Span]:
    """Payment cards: 13 to 19 digits of an issuer whose check digit is right."""
    for match in _CARD.finditer(text):
        if luhn(match[0]):
            yield Span(*match.span(), "CARD")


def luhn(number: str) -> bool:
    """Whether the last digit checks the others (ISO/IEC 7812-1, annex B)."""
    digits = [int(c) for c in number if c.isdigit()]
    doubled = [d * 2 - 9 if d > 4 else d * 2 for d in digits[-2::-2]]
    return (sum(digits[::-2]) + sum(doubled)) % 10 == 0


_PHONE_DIGITS = re.compile(r"\d(?:[^\w\n]{0,3}\d){6}")


def phone_numbers(region: str) -> Detector:
    """Finds phone numbers, by the numbering plans that libphonenumber knows.

    Raises:
        DataError: phonenumbers isn't installed, or knows no such region.
    """
    library = load("phonenumbers", "scrub = phone")
    if region not in library.SUPPORTED_REGIONS:
        raise DataError(
            f"{region!r} is no region with phone numbers",
            where="phone_region",
            remedy="regions are the two-letter codes of ISO 3166-1, such as US, GB or DE",
        )

    def detect(text: str) -> Iterator[Span]:
        if not _PHONE_DIGITS.search(text):
            return
        for match in library.PhoneNumberMatcher(text, region):
            # Ten digits in a row are as often a time or an id; a number that is meant to
            # be dialled is grouped, or begins with +. So is an IP address.
            if not (match.raw_string.isdigit() or _IPV4.fullmatch(match.raw_string)):
                yield Span(match.start, match.end, "PHONE")

    return detect


# Plugins of detect-secrets whose patterns are the format of one maker's keys. Left out
# are its entropy plugins (on 42,463 shell commands without a secret, tldr-pages and NL2Bash,
# they report 7,741 strings) and those of services whose keys have no format of their own.
_KEY_PLUGINS = (
    "aws.AWSKeyDetector",
    "azure_storage_key.AzureStorageKeyDetector",
    "discord.DiscordBotTokenDetector",
    "github_token.GitHubTokenDetector",
    "gitlab_token.GitLabTokenDetector",
    "mailchimp.MailchimpDetector",
    "npm.NpmDetector",
    "openai.OpenAIDetector",
    "pypi_token.PypiTokenDetector",
    "sendgrid.SendGridDetector",
    "slack.SlackDetector",
    "square_oauth.SquareOAuthDetector",
    "stripe.StripeDetector",
    "telegram_token.TelegramBotTokenDetector",
    "twilio.TwilioKeyDetector",
)
# In these the first group, not the whole match, is the secret.
_GROUPED = ("aws", "npm")
# Makers that it doesn't know; PEM whole (RFC 7468), where it marks the first line only;
# JSON Web Tokens (RFC 7519) with their signature.
_MORE_KEYS = (
    re.compile(r"\bhf_[A-Za-z0-9]{30,}"),  # Hugging Face
    re.compile(r"\bsk-(?:ant|proj|svcacct|or)-[\w-]{24,}", re.ASCII),  # Anthropic, OpenAI
    re.compile(r"\bgithub_pat_\w{50,}", re.ASCII),
    re.compile(r"\bAIza[\w-]{35}", re.ASCII),  # Google
    re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+", re.ASCII),
    re.compile(
        r"-----BEGIN (?P<label>[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----"
        r".*?(?:-----END (?P=label)-----|\Z)",
        re.DOTALL,
    ),
)
_KEY_CHARACTERS = re.compile(r"[\w-]*", re.ASCII)
# A value that a program fills in, or one that stands for any.
_STANDS_FOR = re.compile(r"[$`{}<>()*%|\s]|^(?:pass|passwd|password|pwd|secret)$", re.IGNORECASE)


def secrets() -> Detector:
    """Finds API keys, tokens, private keys, and passwords in URLs and assignments.

    Raises:
        DataError: detect-secrets isn't installed.
    """

    def plugin(name: str) -> Any:
        module, _, cls = name.partition(".")
        return getattr(load(f"detect_secrets.plugins.{module}", "scrub = secret"), cls)()

    # Its patterns are used and not its `analyze_string`, which says what was found but
    # not where, and of some keys only the first letters.
    patterns = [
        (pattern, name.startswith(_GROUPED))
        for name in _KEY_PLUGINS
        for pattern in plugin(name).denylist
    ]
    patterns += [(pattern, False) for pattern in _MORE_KEYS]
    (url_password,) = plugin("basic_auth.BasicAuthDetector").denylist
    assigned = plugin("keyword.KeywordDetector")

    def detect(text: str) -> Iterator[Span]:
        for pattern, grouped in patterns:
            for match in pattern.finditer(text):
                start, end = match.span(1 if grouped and match.lastindex else 0)
                # Not the middle of something longer; and whole, where keys have grown.
                if start and text[start - 1].isalnum() and text[start].isalnum():
                    continue
                rest = _KEY_CHARACTERS.match(text, end)
                yield Span(start, rest.end() if rest else end, "SECRET")
        for match in url_password.finditer(text):
            if not _STANDS_FOR.search(match[1]):
                yield Span(match.start(1), match.end(1), "SECRET")
        for line in _lines(text):
            yield from _assigned_secrets(line, assigned)

    return detect


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with a word that announces a secret, and where they begin."""
    position = 0
    for line in text.splitlines(keepends=True):
        if _ANNOUNCED.search(line):
            yield position, line
        position += len(line)


# A line without one of these has nothing for the keyword plugin, which is slow.
_ANNOUNCED = re.compile(r"key|pass|pwd|secret|contrase", re.IGNORECASE)


def _assigned_secrets(line: tuple[int, str], plugin: Any) -> Iterator[Span]:
    """Quoted values given to a name such as `password` or `api_key`.

    Only those with letters and digits and nothing that a program fills in: of commands
    without a secret, those are the ones that the plugin reports (`alias pwd='…'`).
    """
    offset, text = line
    for value in set(plugin.analyze_string(text)):
        mixed = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
        if len(value) < 6 or not mixed or _STANDS_FOR.search(value):
            continue
        for match in re.finditer(re.escape(value), text):
            yield Span(offset + match.start(), offset + match.end(), "SECRET")


_SPACY_MODELS = ("en_core_web_lg", "en_core_web_md", "en_core_web_sm")
_PRESIDIO_SCORE = 0.5
# Its recognizers of these fetch a list of domains from the network, or take away dates and
# links, which name nobody. The kind `email` finds addresses.
_NOT_PRESIDIO = {"EMAIL_ADDRESS", "URL", "DATE_TIME"}


def presidio() -> Detector:
    """Finds what Presidio's recognizers do: names, places, numbers of documents; in English.

    Raises:
        DataError: presidio-analyzer isn't installed, or no spaCy model for it.
    """
    analyzer = load("presidio_analyzer", "scrub = presidio", extra="presidio")
    provider = load("presidio_analyzer.nlp_engine", "scrub = presidio", extra="presidio")
    installed = load("spacy.util", "scrub = presidio", extra="presidio").is_package
    model = next((name for name in _SPACY_MODELS if installed(name)), None)
    if model is None:  # Presidio would fetch one without asking
        raise DataError(
            "scrub = presidio needs a spaCy model for English",
            remedy="python -m spacy download en_core_web_lg",
        )
    engine = provider.NlpEngineProvider(
        nlp_configuration={
            "nlp_engine_name": "spacy",
            "models": [{"lang_code": "en", "model_name": model}],
        }
    ).create_engine()
    finder = analyzer.AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
    kinds = sorted({*finder.get_supported_entities(language="en")} - _NOT_PRESIDIO)

    def detect(text: str) -> Iterator[Span]:
        found = finder.analyze(
            text=text, language="en", entities=kinds, score_threshold=_PRESIDIO_SCORE
        )
        for result in sorted(found, key=lambda r: (-r.score, r.start)):
            yield Span(result.start, result.end, result.entity_type)

    return detect
