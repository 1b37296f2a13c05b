"""Workers that tasks go to one by one: what is begun, in which order it comes back. Ray's part is played here."""

from types import SimpleNamespace

import pytest

from attar.cluster import crew
from attar.cluster.crew import Crew
from attar.errors import BudgetExceeded, RunError


class RayError(Exception):
    pass


@pytest.fixture
def ray(monkeypatch):
    """What is begun last ends first; `dead` is what kills its worker."""

    def get(reference):
        if reference == "dead":
            raise RayError("the worker died")
        return crew._Problem("BudgetExceeded", "no money left") if reference == "poor" else reference

    played = SimpleNamespace(
        wait=lambda flying, num_returns: (flying[-num_returns:], flying[:-num_returns]),
        get=get,
        exceptions=SimpleNamespace(RayError=RayError),
    )
    monkeypatch.setattr(crew, "require", lambda name, extra: played)
    return played


def crew_of(members):
    return Crew([SimpleNamespace(do=SimpleNamespace(remote=lambda task: task)) for _ in range(members)])


def test_results_come_in_the_order_of_the_tasks_and_little_is_begun_while_one_is_late(ray):
    drawn, ahead = [], []

    def tasks():
        for n in range(100):
            drawn.append(n)
            yield n

    for number, result in crew_of(2).ordered(tasks()):
        assert number == result == len(ahead)
        ahead.append(len(drawn) - number)
    assert len(ahead) == 100
    assert max(ahead) == 16


def test_without_an_order_they_come_as_they_are_done(ray):
    found = [number for number, _ in crew_of(2).run(range(10))]
    assert sorted(found) == list(range(10))
    assert found[0] == 3


@pytest.mark.parametrize(
    ("bad", "error", "words"), [("poor", BudgetExceeded, "no money"), ("dead", RunError, "4 times")]
)
def test_what_is_done_is_handed_on_though_an_earlier_task_failed(ray, bad, error, words):
    found = []
    with pytest.raises(error, match=words):
        found += (number for number, _ in crew_of(2).ordered([0, bad, 2, 3, 4, 5]))
    assert found == [0, 2, 3, 4, 5]


def test_an_iterator_that_is_closed_begins_no_more_and_waits(ray):
    waited = []
    ray.wait, once = lambda flying, num_returns: waited.append(num_returns) or once(flying, num_returns), ray.wait
    drawn = []
    results = crew_of(2).run(drawn.append(n) or n for n in range(50))
    next(results)
    results.close()
    assert (len(drawn), waited) == (4, [1, 3])
