"""Scrubbing: what is found, what isn't, and that placeholders keep their meaning."""

from __future__ import annotations

import base64
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.data.records import Conversation, Segment, ToolCall, Turn
from mlxtune.data.sources import read_conversations
from mlxtune.errors import DataError
from mlxtune.install import install_extra
from mlxtune.prep import extras
from mlxtune.prep.scrub import Scrubber, luhn
from support.properties import examples

ALL = ("email", "ip", "phone", "card", "secret")


def scrub(text: str, *kinds: str, region: str = "US") -> str:
    changed, _ = Scrubber(kinds or ALL, region)(Conversation((Turn("user", text),)))
    return changed.turns[0].content


@pytest.mark.parametrize(
    "address", ["jane.doe+x@mail.example.co.uk", "a@b.de", "jörg@bücher.example"]
)
def test_emails(address):
    assert scrub(f"Write to {address}.", "email") == "Write to <EMAIL_1>."
    assert address in scrub(f"Write to {address}.", "phone", "ip")


@pytest.mark.parametrize(
    "text",
    [
        "git clone git@github.com:o/r.git",
        "systemctl start getty@tty1.service",
        "ssh root@host",
        "npm i left-pad@1.3.0",
    ],
)
def test_what_only_looks_like_an_email(text):
    assert scrub(text) == text


@pytest.mark.parametrize(
    "address",
    ["192.168.1.17", "8.8.8.8", "2001:db8::8a2e:370:7334", "fe80::1", "::ffff:93.184.216.34"],
)
def test_ip_addresses(address):
    assert scrub(f"ping {address}", "ip") == "ping <IP_1>"
    assert scrub(f"({address})", "ip") == "(<IP_1>)"
    assert scrub(f"ping {address}", "email") == f"ping {address}"


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1:80 0.0.0.0 ::1",  # name no machine
        "mask 255.255.255.0",
        "version 1.2.3",
        "1.2.3.4.5",
        "999.1.1.1",
        "12:30:45",
        "de:ad:be:ef:00:01",
        "std::vector<A::B>",
    ],
)
def test_what_only_looks_like_an_address(text):
    assert scrub(text, "ip") == text


@pytest.mark.parametrize(
    ("number", "region"),
    [
        ("+1 650-253-0000", "US"),
        ("(650) 253-0000", "US"),
        ("+44 20 8765 4321", "US"),
        ("020 8765 4321", "GB"),
        ("+4930123456", "US"),
    ],
)
def test_phone_numbers(number, region):
    assert scrub(f"Call {number} now", "phone", region=region) == "Call <PHONE_1> now"
    assert number in scrub(f"Call {number} now", "email")


def test_a_number_without_country_code_depends_on_the_region():
    text = "Ring 020 8765 4321."
    assert scrub(text, "phone", region="US") == text
    with pytest.raises(DataError, match="no region"):
        Scrubber(["phone"], "QQ")


@pytest.mark.parametrize(
    "number",  # from the networks' and processors' public lists of test cards
    [
        "4111 1111 1111 1111",
        "4012888888881881",
        "5555-5555-5555-4444",
        "2223003122003222",
        "378282246310005",
        "6011111111111117",
        "30569309025904",
        "3530111333300000",
    ],
)
def test_cards(number):
    assert luhn(number)
    assert scrub(f"paid with {number}.", "card") == "paid with <CARD_1>."
    digits = [i for i, c in enumerate(number) if c.isdigit()]
    wrong = number[: digits[-1]] + str((int(number[-1]) + 1) % 10)
    assert not luhn(wrong)
    assert scrub(wrong, "card") == wrong
    assert number in scrub(number, "email")


def test_the_check_digit_of_the_standard():
    assert luhn("79927398713")
    assert not any(luhn(f"7992739871{d}") for d in "012456789")


# Made here by joining, so that scanners of this file find nothing.
KEYS = {
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "github": "ghp" + "_" + "a1B2" * 9,
    "github, fine-grained": "github" + "_pat_" + "a1B2c3" * 14,
    "gitlab": "glpat" + "-" + "a1B2c3D4e5F6g7H8i9J0",
    "slack": "xoxb" + "-123456789012-123456789012-" + "a1B2" * 6,
    "stripe": "sk" + "_live_" + "a1B2" * 6,
    "openai": "sk-" + "a1B2c" * 4 + "T3Blbk" + "FJ" + "a1B2c" * 4,
    "openai, project": "sk-" + "proj-" + "a1B2c_3D" * 10,
    "anthropic": "sk-" + "ant-api03-" + "a1B2-_" * 14,
    "hugging face": "hf" + "_" + "aBcDeFgHiJ" * 3 + "kLmN",
    "google": "AI" + "za" + "a1B2c" * 7,
    "sendgrid": "SG" + "." + "a1" * 11 + "." + "b2" * 21 + "c",
    "pypi": "pypi-" + "AgEIcHlwaS5vcmc" + "a1" * 40,
    "twilio": "AC" + "a1" * 16,
}


@pytest.mark.parametrize("maker", KEYS)
def test_keys_go_whole(maker):
    key = KEYS[maker]
    assert scrub(f"export TOKEN={key}\nrun", "secret") == "export TOKEN=<SECRET_1>\nrun"
    assert scrub(f'"{key}"', "secret") == '"<SECRET_1>"'
    assert key in scrub(key, "email")
    assert scrub(f"x{key}", "secret") == f"x{key}"  # a part of something longer


def test_tokens_and_private_keys_go_whole():
    parts = [{"alg": "HS256", "typ": "JWT"}, {"sub": "1234567890"}]
    encoded = [base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts]
    token = ".".join([*encoded, "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"])
    assert scrub(f"Authorization: Bearer {token}", "secret") == "Authorization: Bearer <SECRET_1>"
    for label in ("RSA PRIVATE KEY", "OPENSSH PRIVATE KEY", "PRIVATE KEY"):
        pem = f"-----BEGIN {label}-----\nMIIB\nabc=\n-----END {label}-----"
        assert scrub(f"key:\n{pem}\nend", "secret") == "key:\n<SECRET_1>\nend"
        assert scrub(pem[:-20], "secret") == "<SECRET_1>"  # cut off
    public = "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----"
    assert scrub(public, "secret") == public


def test_passwords():
    assert (
        scrub("psql postgres://bob:hunter22@db/x", "secret")
        == "psql postgres://bob:<SECRET_1>@db/x"
    )
    assert scrub('a\npassword = "s3cr3t-w0rd"', "secret") == 'a\npassword = "<SECRET_1>"'
    for text in (
        "psql postgres://$USER:$PASS@db/x",
        "psql postgres://user:password@db/x",
        'password = "$DB_PASSWORD_1"',
        "alias pwd='echo -n $(/bin/pwd) | pbcopy'",
        'export PASSWORD="changeme"',
    ):
        assert scrub(text, "secret") == text


def test_real_commands_hold_no_secrets(nl2bash):
    scrubber = Scrubber(("secret", "card"))
    found = [row.where for row in read_conversations(nl2bash) if scrubber(row)[1]]
    assert found == []


def test_a_value_keeps_its_placeholder_through_a_record():
    call = ToolCall("mail", {"to": ["b@x.org"], "cc": {"first": "a@x.org"}})
    row = Conversation(
        (
            Turn("user", "From a@x.org to b@x.org"),
            Turn("assistant", "To b@x.org, from a@x.org", reasoning="a@x.org", tool_calls=(call,)),
        ),
        tags={"author": "a@x.org", "id": 7},
        rejected=(Turn("assistant", "c@x.org"),),
    )
    changed, counts = Scrubber(["email"])(row)
    assert [t.content for t in changed.turns] == [
        "From <EMAIL_1> to <EMAIL_2>",
        "To <EMAIL_2>, from <EMAIL_1>",
    ]
    assert changed.turns[1].reasoning == "<EMAIL_1>"
    assert changed.turns[1].tool_calls[0].arguments == {
        "to": ["<EMAIL_2>"],
        "cc": {"first": "<EMAIL_1>"},
    }
    assert changed.tags == {"author": "<EMAIL_1>", "id": 7}
    assert changed.rejected[0].content == "<EMAIL_3>"
    assert counts == {"EMAIL": 9}
    assert row.turns[0].content == "From a@x.org to b@x.org"  # the input stays


def test_plain_text_is_scrubbed_too():
    row = Conversation(segments=(Segment("from a@x.org ", False), Segment("to a@x.org", True)))
    changed, _ = Scrubber(["email"])(row)
    assert changed.text() == "from <EMAIL_1> to <EMAIL_1>"


EMAILS = st.from_regex(r"[a-z]{1,8}@[a-z]{1,8}\.(?:com|org|de)", fullmatch=True)
FILLERS = st.text(st.characters(codec="utf-8", exclude_characters="@._+-%:<>"), max_size=12)


@examples(150)
@given(st.lists(st.tuples(FILLERS, EMAILS), min_size=1, max_size=8))
def test_placeholders_name_values_one_to_one(parts):
    said = [Turn("user", f"{filler} {address} ") for filler, address in parts]
    changed, counts = Scrubber(["email"])(Conversation(tuple(said)))
    names = [re.search(r"<EMAIL_\d+>", turn.content)[0] for turn in changed.turns]
    values = [address for _, address in parts]
    assert len(set(zip(names, values, strict=True))) == len(set(names)) == len(set(values))
    assert counts.total() == len(parts)
    back = dict(zip(names, values, strict=True))
    for turn, before in zip(changed.turns, said, strict=True):
        assert re.sub(r"<EMAIL_\d+>", lambda m: back[m[0]], turn.content) == before.content
    assert Scrubber(["email"])(changed) == (changed, {})  # nothing is left to find


def test_a_placeholder_that_was_there_is_not_used_again():
    assert scrub("<EMAIL_1> and a@x.org", "email") == "<EMAIL_1> and <EMAIL_2>"


def test_missing_packages_are_told(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(extras, "import_module", missing)
    for kind, extra in (("phone", "prep"), ("secret", "prep"), ("presidio", "presidio")):
        with pytest.raises(DataError) as error:
            Scrubber([kind])
        assert error.value.remedy == install_extra(extra)


def test_presidio_finds_names():
    pytest.importorskip("presidio_analyzer")
    try:
        scrubber = Scrubber(["presidio", "email"])
    except DataError as error:
        pytest.skip(str(error))  # no spaCy model
    row = Conversation((Turn("user", "I am Grace Hopper, SSN 536-22-8726, mail g@navy.mil"),))
    changed, _ = scrubber(row)
    assert changed.turns[0].content == "I am <PERSON_1>, SSN <US_SSN_1>, mail <EMAIL_1>"
