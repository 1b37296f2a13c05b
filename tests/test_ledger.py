import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from attar.data.types import Message, ToolCall
from attar.data.wire import Usage
from attar.engines.base import Answer, Failure, TokenLogprobs
from attar.engines.ledger import Claim, Ending, Ledger, Over, Spend, Stored, Taken
from attar.engines.outcomes import from_json, request_key, to_json
from attar.engines.prices import Price, list_price, stated_price
from attar.errors import BudgetExceeded, RunError, WorkspaceError
from attar.recipe.base import TokenPrice

ANSWER = Answer(
    Message("assistant", "Jø\n", (ToolCall("a", "f", {"b": 1, "a": [None]}),), reasoning="so"),
    "tool_calls",
    7,
    3,
    2,
    "m-1",
    1.5e-5,
    (TokenLogprobs("J", -0.25, (("J", -0.25), ("K", -2.0))),),
)
CLAIM_AND_DIE = """
import os, pathlib, signal, sys
from attar.engines.ledger import Ledger
Ledger(pathlib.Path(sys.argv[1]), budget_usd=1.0).claim("k", 0.4)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def test_what_is_answered_is_never_asked_again(path):
    ledger = Ledger(path)
    claim = ledger.claim("k", 0.0)
    assert isinstance(claim, Claim)
    ledger.commit([Ending(claim, "answer", 0.25, 7, 3)], [])
    assert ledger.claim("k", 0.0) == Stored("answer")
    ledger.close()
    again = Ledger(path)
    assert again.claim("k", 0.0) == Stored("answer") == again.get("k")
    assert again.get("other") is None
    assert again.spend() == Spend(0.25, 0.0, 0.0, 1, 7, 3)


@pytest.mark.parametrize(
    ("ending", "spend"),
    [
        ({"outcome": "a", "usd": 0.1}, Spend(0.1, 0.0, 0.0, 1, 0, 0)),
        ({"outcome": "a", "usd": None}, Spend(0.0, 0.0, 0.0, 1, 0, 0)),
        ({"lost": True}, Spend(0.0, 0.0, 0.4, 0, 0, 0)),
        ({}, Spend(0.0, 0.0, 0.0, 0, 0, 0)),
    ],
)
def test_what_was_reserved_becomes_what_was_billed_stays_or_goes(path, ending, spend):
    ledger = Ledger(path, budget_usd=1.0)
    claim = ledger.claim("k", 0.4)
    assert ledger.spend() == Spend(0.0, 0.4, 0.0, 0, 0, 0)
    ledger.commit([Ending(claim, **ending)], [])
    assert ledger.spend() == spend
    with pytest.raises(RunError, match="over already"):
        ledger.commit([Ending(claim, **ending)], [])


def test_the_budget_holds_against_what_is_spent_reserved_and_lost(path):
    ledger = Ledger(path, budget_usd=1.0)
    spent, lost, reserved = (ledger.claim(name, 0.3) for name in "abc")
    ledger.commit([Ending(spent, "a", 0.3), Ending(lost, lost=True)], [])
    assert isinstance(reserved, Claim)
    with pytest.raises(
        BudgetExceeded, match=r"0\.3000 USD are spent, 0\.3000 reserved, 0\.3000 for requests of unknown"
    ):
        ledger.claim("d", 0.100000001)
    assert ledger.spend().reserved_usd == 0.3
    assert isinstance(ledger.claim("d", 0.1), Claim)
    assert BudgetExceeded.exit_code == 5


def test_requests_of_one_transaction_share_the_budget(path):
    ledger = Ledger(path, budget_usd=1.0)
    first, second, third, again = ledger.commit([], [("a", 0.6), ("b", 0.6), ("c", 0.4), ("a", 0.0)])
    assert isinstance(first, Claim)
    assert isinstance(second, Over)
    assert isinstance(third, Claim)
    assert again == Taken(None)


def test_two_openings_of_one_file_are_one_ledger(path):
    one, other = Ledger(path, budget_usd=1.0), Ledger(path, budget_usd=1.0)
    claim = one.claim("a", 0.6)
    assert other.claim("a", 0.6) == Taken(None)
    with pytest.raises(BudgetExceeded):
        other.claim("b", 0.6)
    one.commit([Ending(claim, "answer", 0.1)], [])
    assert other.claim("a", 0.6) == Stored("answer")
    assert isinstance(other.claim("b", 0.6), Claim)


def test_what_a_killed_process_had_in_flight_stays_charged_and_may_be_asked_again(path):
    done = subprocess.run([sys.executable, "-c", CLAIM_AND_DIE, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    ledger = Ledger(path, budget_usd=1.0)
    assert ledger.spend().reserved_usd == 0.4
    assert isinstance(ledger.claim("k", 0.4), Claim)
    assert ledger.spend() == Spend(0.0, 0.4, 0.4, 0, 0, 0)


def test_requests_wait_in_a_batch_whoever_sent_them(path):
    ledger = Ledger(path)
    claims = ledger.commit([], [("a", 0.0), ("b", 0.0)], batch="new-1")
    ledger.rename_batch("new-1", "batch_7")
    assert ledger.batches() == ["batch_7"]
    assert ledger.in_batch("batch_7") == dict(zip("ab", claims, strict=True))
    assert ledger.claim("a", 0.0) == Taken("batch_7")


def test_a_folder_that_cannot_be_written_and_a_file_that_is_no_ledger(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WorkspaceError, match="cannot be opened"):
        Ledger(tmp_path / "file" / "ledger.sqlite")
    (tmp_path / "text").write_text("no database at all" * 100)
    with pytest.raises(WorkspaceError, match="cannot be opened"):
        Ledger(tmp_path / "text")
    with sqlite3.connect(tmp_path / "newer") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(WorkspaceError, match="schema 99"):
        Ledger(tmp_path / "newer")


def test_outcomes_come_back_as_they_were():
    assert from_json(to_json(ANSWER)) == ANSWER
    assert list(from_json(to_json(ANSWER)).message.tool_calls[0].arguments) == ["b", "a"]
    bare = replace(ANSWER, top_logprobs=None, usd=None, message=Message("assistant", ""))
    assert from_json(to_json(bare)) == bare
    failure = Failure("not json", "<html>", True, 0.5)
    assert from_json(to_json(failure)) == failure


def test_the_key_follows_from_all_that_changes_an_answer():
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    keys = [
        request_key(server, {**body, **other}, sample)[0]
        for server, other, sample in [
            ("a", {}, 0),
            ("b", {}, 0),
            ("a", {}, 1),
            ("a", {"temperature": 1}, 0),
            ("a", {"model": "n"}, 0),
        ]
    ]
    assert len(set(keys)) == len(keys)
    assert request_key("a", dict(body), 0)[0] == keys[0]


def test_a_price_counts_each_kind_of_token_once():
    price = Price(input=2.0, output=10.0, cached_input=0.5, cache_write=2.5, batch=0.5, source="test")
    usage = Usage(prompt_tokens=1000, completion_tokens=100, cached_tokens=600, cache_written_tokens=100)
    by_hand = (300 * 2 + 600 * 0.5 + 100 * 2.5 + 100 * 10) / 1e6
    assert price.cost_usd(usage) == pytest.approx(by_hand)
    assert price.cost_usd(usage, batch=True) == pytest.approx(by_hand / 2)
    assert price.most_usd(1000, 100) == pytest.approx((1000 * 2.5 + 100 * 10) / 1e6)


def test_the_table_of_prices():
    known = list_price("anthropic", "claude-opus-4-5")
    assert known is not None
    assert (known.input, known.output, known.cached_input, known.cache_write) == (5, 25, 0.5, 6.25)
    assert known.source.startswith("https://")
    plain = list_price("openai", "gpt-4")
    assert plain is not None
    assert plain.cached_input == plain.input == 30
    assert list_price("openai", "claude-opus-4-5") is None
    assert list_price("openai", "gpt-4-turbo-of-another-day") is None


def test_a_stated_price():
    stated = TokenPrice(input_usd_per_million_tokens=1, output_usd_per_million_tokens=2)
    assert stated_price(stated) == Price(1, 2, 1, 1, 1.0, "teacher.price")
    full = stated.model_copy(update={"cached_input_usd_per_million_tokens": 0.1, "batch_share": 0.5})
    assert (stated_price(full).cached_input, stated_price(full).batch) == (0.1, 0.5)


def test_a_ledger_belongs_to_the_process_that_opened_it(path):
    """A process number that was given again to another process is not the old one."""
    ledger = Ledger(path)
    ledger.claim("k", 0.1)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE claims SET pid = ?, started = started - 100", (os.getppid(),))
    db.close()
    assert isinstance(ledger.claim("k", 0.1), Claim)
    assert ledger.spend().lost_usd == 0.1
