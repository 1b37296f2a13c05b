"""What counts as a secret, and what only looks like one."""

import re

import pytest

from attar.data.secrets import KINDS, Rule, find, matches, redact

ALL = [Rule(kind, finder) for kind, finder in KINDS.items()]
KEYS = ALL[:1]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("sk-ant-" + "aB3-" * 8, ["key"]),
        ("AKIAIOSFODNN7EXAMPLE", ["key"]),
        ("token ghp_" + "a1B2" * 9, ["key"]),
        ("xoxb-1234567890-abcdef", ["key"]),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN", ["key"]),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", ["key"]),
        ("postgres://admin:hunter22@db.example.com/x", ["key"]),
        ("4111 1111 1111 1111", ["card"]),
        ("5500-0000-0000-0004", ["card"]),
        ("378282246310005", ["card"]),
        ("mail a.b+c@mail.example.co.uk now", ["email"]),
        ("call +44 20 7946 0958", ["phone"]),
        ("call (555) 123-4567 or 555-123-4567", ["phone", "phone"]),
        # what only looks like one
        ("sk-learn is a library, task-force", []),
        ("AKIA is a prefix", []),
        ("http://example.com:8080/a@b", []),
        ("4111 1111 1111 1112", []),
        ("the year 2024, 3.14159265358979, id 20231107123456789012345", []),
        ("order 1234567890123452", []),
        ("twitter @bob, a@b", []),
        ("1-2-3, 10.0.0.1, 2024-01-02", []),
    ],
)
def test_found(text, kinds):
    assert [hit.kind for hit in find(text, ALL)] == kinds


def test_the_whole_of_it_and_nothing_else_is_replaced():
    text = "mail bob@example.org, card 4111111111111111, then bye"
    assert redact(text, find(text, ALL)) == "mail [EMAIL], card [CARD], then bye"
    url = "postgres://admin:hunter22@db.example.com/x"
    assert redact(url, find(url, KEYS)) == "postgres://[KEY]@db.example.com/x"


def test_of_two_that_overlap_the_first_kind_counts():
    text = "https://bob:pass@example.org"
    assert [hit.kind for hit in find(text, [Rule(kind, KINDS[kind]) for kind in ("key", "email")])] == ["key"]
    own = {"ticket": re.compile(r"T-\d+"), "digits": re.compile(r"\d+")}
    assert [(hit.kind, text_of) for hit, text_of in named("T-12 and 34", own)] == [("ticket", "T-12"), ("digits", "34")]


def named(text, own):
    return [
        (hit, text[hit.start : hit.end])
        for hit in find(text, [Rule(kind, matches(pattern)) for kind, pattern in own.items()])
    ]
