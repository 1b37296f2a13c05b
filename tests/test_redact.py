import base64
import random
from collections import Counter

import pytest

from attar.collect.redact import Redactor, pseudonym
from attar.data import secrets

ALL = Redactor(("email", "key", "phone"), {})


def clean(text, redactor=ALL):
    return redactor.text(text, Counter())


@pytest.mark.parametrize(
    "text",
    [
        "alice@example.com",
        "first.last+tag@sub.example.co.uk",
        "josé@exämple.de",
        "a_b-c%d@host-name.io",
    ],
)
def test_addresses(text):
    assert clean(f"write to {text}, please") == "write to [EMAIL], please"
    assert clean(f"\n{text}\n") == "\n[EMAIL]\n"
    assert clean(f"<{text}>.") == "<[EMAIL]>."


@pytest.mark.parametrize("text", ["a@b", "@name", "user@", "x @ y.com", "git@host:repo", "@decorator.method"])
def test_what_is_no_address(text):
    assert clean(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "sk-proj-" + "a1B2" * 10,
        "sk-ant-api03-" + "x_-9" * 12,
        "sk_live_" + "a1" * 12,
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1" * 18,
        "github_pat_" + "a1" * 20,
        "glpat-" + "a1" * 10,
        "xoxb-1234567890-abc",
        "AIza" + "a" * 35,
        "hf_" + "a1" * 17,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefgh_-12",
        "Bearer abcdefghijklmnop123",
        "bearer abcdefghijklmnop123==",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc/+=\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_keys(text):
    assert clean(f"it is {text}") == "it is [KEY]"
    assert clean(f"\n{text} ") == "\n[KEY] "
    assert clean(f'"{text}"') == '"[KEY]"'


@pytest.mark.parametrize("text", ["sk-learn", "desk-organiser-for-large-rooms", "task-1234567890123456789", "hf_model"])
def test_what_is_no_key(text):
    assert clean(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "+4915123456789",
        "+49 151 23456789",
        "+1 (415) 555-0132",
        "+44 20 7946 0958",
        "415-555-0132",
        "(415) 555-0132",
        "1-800-555-0199",
        "415.555.0132",
        "030 1234567",
        "0151-23456789",
        "020 7946 0958",
    ],
)
def test_telephone_numbers(text):
    assert clean(f"call {text}.") == "call [PHONE]."
    assert clean(f"{text}, or later") == "[PHONE], or later"


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-24",
        "2026-11-24T20:55:00.123Z",
        "08.11.2026",
        "03/04/2026 12:30",
        "192.168.100.200",
        "1234567890",
        "3.14159265358979",
        "1,234,567.89",
        "550e8400-e29b-41d4-a716-446655440000",
        "4000 0000 0000",
        "f(x)=x+12345678901",
        "version 1.2.3-4567",
        "[101, 555, 0132]",
    ],
)
def test_what_is_no_telephone_number(text):
    assert clean(text) == text


def test_pictures_stay_as_they_are():
    data = random.Random(0).randbytes(300_000)
    for text in (base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()):
        assert clean("data:image/png;base64," + text) == "data:image/png;base64," + text


def test_values_are_redacted_throughout_and_counted():
    counts = Counter()
    value = {"a@b.co": ["x a@b.co", {"n": 4155550132, "t": "415-555-0132"}], "none": None, "yes": True}
    assert ALL.value(value, counts) == {
        "[EMAIL]": ["x [EMAIL]", {"n": 4155550132, "t": "[PHONE]"}],
        "none": None,
        "yes": True,
    }
    assert counts == {"email": 2, "phone": 1}


def test_own_patterns_come_first_and_rules_can_be_left_out():
    redactor = Redactor(("email",), {"staff": r"\w+@corp\.example", "order": r"ORD-\d+"})
    assert clean("jo@corp.example a@b.co ORD-12 415-555-0132", redactor) == "[STAFF] [EMAIL] [ORDER] 415-555-0132"


def test_the_secrets_of_a_call_are_found_as_they_are():
    redactor = ALL.knowing(["hunter2-but-longer", "x", "a+b(c"])
    assert clean("Incorrect key: hunter2-but-longer, x", redactor) == "Incorrect key: [KEY], x"
    assert clean("hunter2-but-longer") == "hunter2-but-longer"


def test_a_long_text_is_searched_whole(monkeypatch):
    monkeypatch.setattr(secrets, "_WINDOW", 64)
    monkeypatch.setattr(secrets, "_LONGEST", 24)
    rng = random.Random(1)
    # A pattern that matches a part of what it matches whole: it must not be cut where a window ends.
    redactor = Redactor(("email", "phone"), {"run": "y+"})
    placeholders = {"alice@example.com": "[EMAIL]", "415-555-0132": "[PHONE]"}
    for _ in range(300):
        kinds = ["ab", "x" * rng.randrange(70), "y" * rng.randrange(1, 24), *placeholders]
        words = [rng.choice(kinds) for _ in range(40)]
        wanted = ["[RUN]" if word.startswith("y") else placeholders.get(word, word) for word in words]
        assert clean(" ".join(words), redactor) == " ".join(wanted)


def test_pieces_are_redacted_as_the_whole():
    counts = Counter()
    pieces = ["to ali", "ce@ex", "", "ample.com", " or 415-", "555-0132", "!"]
    assert ALL.pieces(pieces, counts) == ["to [EMAIL]", "", "", "", " or [PHONE]", "", "!"]
    assert counts == {"email": 1, "phone": 1}
    rng = random.Random(2)
    text = "a@b.co x c@d.co, 415-555-0132; e@f.co"
    for _ in range(200):
        cuts = sorted(rng.choices(range(len(text) + 1), k=6))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert "".join(ALL.pieces(pieces, Counter())) == "[EMAIL] x [EMAIL], [PHONE]; [EMAIL]"
        assert len(ALL.pieces(pieces, Counter())) == len(pieces)


def test_labels():
    assert ALL.label("episode-7") == "episode-7"
    assert ALL.label(None) is None
    assert ALL.label("alice@example.com") == pseudonym("alice@example.com")
    assert pseudonym("a") != pseudonym("b")
