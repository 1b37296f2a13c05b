"""The owner of a ledger and those who lease of it: what two workers may spend, what is left of one that fell silent."""

import pickle
import queue
import sys
from types import SimpleNamespace

import pytest

from attar.engines import leases
from attar.engines.leases import LeasedLedger, Owner, own_share
from attar.engines.ledger import Claim, Ending, Ledger, Over, Stored, Taken
from attar.errors import RecipeError
from attar.recipe.base import TeacherModel


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(leases.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def owner(tmp_path, clock):
    return Owner(tmp_path / "ledger.sqlite", 0.10, lease_s=30.0)


def ask(owner, holder, key, usd=0.02):
    [outcome] = owner.commit(holder, [], [(key, usd)])
    return outcome


def answer(claim, usd=0.01):
    return Ending(claim, f"answer {claim.key}", usd, prompt_tokens=3, completion_tokens=2)


def test_what_one_asks_the_other_waits_for_and_then_has(owner):
    claim = ask(owner, "a", "k")
    assert isinstance(claim, Claim)
    assert isinstance(ask(owner, "b", "k"), Taken)
    owner.commit("a", [answer(claim)], [])
    assert ask(owner, "b", "k") == owner.get("k") == Stored("answer k")
    assert (owner.spend().usd, owner.spend().reserved_usd) == (pytest.approx(0.01), 0)


def test_all_together_stay_within_the_budget(owner):
    claims = [ask(owner, holder, f"{holder}{n}") for n in range(3) for holder in "ab"]
    assert [type(claim) for claim in claims] == [Claim] * 5 + [Over]
    assert owner.spend().reserved_usd == pytest.approx(0.10)
    # What is released is there for the other one.
    owner.commit("a", [Ending(claims[0])], [])
    assert isinstance(ask(owner, "b", "b9"), Claim)


def test_a_silent_worker_loses_its_lease_and_what_it_had_in_flight_stays_charged(owner, clock):
    first = ask(owner, "a", "k")
    kept = ask(owner, "c", "other")
    clock.seconds += 20
    owner.renew("c")
    clock.seconds += 20
    assert isinstance(ask(owner, "b", "k"), Claim)
    assert isinstance(ask(owner, "b", "other"), Taken)
    assert (owner.spend().lost_usd, owner.spend().reserved_usd) == (pytest.approx(0.02), pytest.approx(0.04))
    # It was not dead: what it says now is not taken, as another one is asking.
    owner.commit("a", [answer(first)], [])
    assert owner.get("k") is None
    owner.commit("c", [answer(kept)], [])
    assert owner.get("other") is not None


def test_a_late_answer_is_kept_where_nobody_asks_anew(owner, clock):
    claim = ask(owner, "a", "k")
    clock.seconds += 40
    ask(owner, "b", "other")
    owner.commit("a", [answer(claim), Ending(claim)], [])
    assert owner.get("k") == Stored("answer k")
    assert isinstance(ask(owner, "b", "k"), Stored)
    spend = owner.spend()
    # Rather too much than too little: the claim and the answer are both charged.
    assert (spend.usd, spend.lost_usd, spend.calls) == (pytest.approx(0.01), pytest.approx(0.02), 1)


def test_the_file_is_the_runs_ledger(owner, tmp_path):
    owner.commit("a", [answer(ask(owner, "a", "k"))], [])
    assert Ledger(tmp_path / "ledger.sqlite").get("k") == Stored("answer k")


def test_workers_share_the_requests_in_flight_and_no_batch():
    teacher = TeacherModel(model="openai:m", concurrency=10, max_tokens=4)
    assert [own_share(teacher, n).concurrency for n in (1, 3, 20)] == [10, 3, 1]
    with pytest.raises(RecipeError, match=r"run\.on: here"):
        own_share(TeacherModel(model="openai:m", batch=True, max_tokens=4), 2)


def test_a_worker_says_that_it_lives_from_its_first_request_until_it_is_closed(monkeypatch, tmp_path):
    said = queue.Queue()

    class Handle:
        def __init__(self, function):
            self.remote = function

    remote = SimpleNamespace(
        renew=Handle(said.put), commit=Handle(lambda holder, endings, wanted, batch: [holder] * len(wanted))
    )
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda reference: reference))
    ledger = LeasedLedger(remote, tmp_path / "ledger.sqlite", None, lease_s=0.04)
    other = pickle.loads(pickle.dumps(LeasedLedger(None, ledger.path, 1.0)))
    assert (other.path, other.budget_usd) == (ledger.path, 1.0)
    [holder] = ledger.commit([], [("k", 0.1)])
    assert said.get(timeout=60) == said.get(timeout=60) == holder
    ledger.close()
