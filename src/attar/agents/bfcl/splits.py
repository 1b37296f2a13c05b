"""Which cases stand on one side of a split: those that share a request or a function, whatever their ids say.

BFCL builds categories from one another: ``multiple`` asks the requests of ``simple_python`` again, with more functions
on offer, and the scenarios of ``multi_turn_base`` come back in three variants. A split by id trains on what it tests.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence

from attar.agents.bfcl.cases import UNANSWERABLE, Case, cases
from attar.agents.environments import Task

__all__ = ["SHARES", "Drawn", "by_function_and_request", "by_scenario", "groups", "splits"]

Keys = Callable[[Case], Iterable[str]]
"""what a case may not share with one of another split"""

SHARES = {"train": 0.60, "val": 0.07, "test": 0.33}
"""of the cases; what comes out differs by the size of a group"""
_LARGE = 0.05
"""share of the cases above which a group is no draw: it would decide the mix of its split by itself"""


def by_function_and_request(case: Case) -> frozenset[str]:
    """What a single-turn case may not share with one of another split.

    Its request with numbers masked, so that one template filled twice is one; each function on offer, called or not:
    its name without case and punctuation, its description, and its parameters with their descriptions.
    """
    keys = {f"request {_words(' '.join(case.requests))}"}
    for function in case.functions:
        keys.add(f"name {re.sub('[^a-z0-9]', '', function['name'].lower())}")
        keys.add(f"description {_words(function['description'])}")
        if parameters := function["parameters"]["properties"]:
            described = {name: inner.get("description", "") for name, inner in sorted(parameters.items())}
            keys.add(f"parameters {_words(json.dumps(described))}")
    return frozenset(keys)


def by_scenario(case: Case) -> frozenset[str]:
    """What a multi-turn case may not share: its scenario's number, and any request.

    Functions are no key: all cases draw on the same eight classes.
    """
    return frozenset({f"scenario {case.id.rsplit('_', 1)[1]}", *(f"request {_words(text)}" for text in case.requests)})


def groups(cases: Sequence[Case], keys: Keys) -> list[list[Case]]:
    """Connected components of the cases under shared keys, each in the cases' order; the order of groups follows it."""
    parents = list(range(len(cases)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    owners: dict[str, int] = {}
    for i, case in enumerate(cases):
        for key in keys(case):
            # The lower number stays the root, so that the result does not depend on the order of keys.
            low, high = sorted((root(i), root(owners.setdefault(key, i))))
            parents[high] = low
    found: dict[int, list[Case]] = {}
    for i, case in enumerate(cases):
        found.setdefault(root(i), []).append(case)
    return list(found.values())


def splits(cases: Sequence[Case], keys: Keys, seed: int) -> dict[str, list[tuple[Case, str]]]:
    """Put whole groups into train, val and test.

    A group of more than a twentieth of the cases goes to train. The rest is drawn: in an order that the seed decides,
    each group goes where the largest part of the split's share is missing. A group's place depends on the other cases
    too, so two splits of different categories do not keep each other's sides.

    Args:
        cases: all of them.
        keys: what two cases of different splits may not share.
        seed: decides the draw.

    Returns:
        Under each split, in the order of ``cases``, each case and its group's name (its first case's id).
    """
    sides: dict[str, tuple[str, str]] = {}
    sizes = dict.fromkeys(SHARES, 0)
    drawn = []
    for group in groups(cases, keys):
        if len(group) > _LARGE * len(cases):
            sizes["train"] += len(group)
            sides.update((case.id, ("train", group[0].id)) for case in group)
        else:
            drawn.append(group)
    for group in sorted(drawn, key=lambda group: hashlib.sha256(f"{seed} {group[0].id}".encode()).digest()):
        side = max(SHARES, key=lambda name: 1 - sizes[name] / (SHARES[name] * len(cases)))
        sizes[side] += len(group)
        sides.update((case.id, (side, group[0].id)) for case in group)
    return {name: [(case, sides[case.id][1]) for case in cases if sides[case.id][0] == name] for name in SHARES}


class Drawn:
    """The cases of some categories, split; those of ``UNANSWERABLE`` are left out.

    Args:
        categories: some of ``known``.
        known: all that an environment has.
        keys: what two cases of different splits may not share.
        seed: of the draw.

    Raises:
        ValueError: a category is not known, or there is none.
        MissingExtra: the wheel is not installed.
    """

    def __init__(self, categories: Iterable[str], known: Sequence[str], keys: Keys, seed: int) -> None:
        wanted = set(categories)
        unknown = sorted(wanted - set(known))
        if unknown or not wanted:
            raise ValueError(f"categories: {', '.join(unknown) or 'none'}, wanted some of {', '.join(known)}")
        self.categories = tuple(category for category in known if category in wanted)
        self._splits = _drawn(self.categories, keys, seed)
        self._cases = {case.id: case for side in self._splits.values() for case, _ in side}

    def grouped(self, split: str) -> Sequence[tuple[Case, str]]:
        """The cases of a split with the names of their groups; none where there is no such split."""
        return self._splits.get(split, ())

    def tasks(self, split: str) -> tuple[Task, ...]:
        """The cases of a split as tasks, a category a family."""
        return tuple(Task(case.id, case.category) for case, _ in self.grouped(split))

    def find(self, task: Task) -> Case:
        """The case of a task.

        Raises:
            ValueError: there is none.
        """
        if task.id not in self._cases:
            raise ValueError(f"task {task.id!r} is none of {', '.join(self.categories)}")
        return self._cases[task.id]


@functools.cache
def _drawn(categories: tuple[str, ...], keys: Keys, seed: int) -> dict[str, list[tuple[Case, str]]]:
    every = [case for category in categories for case in cases(category) if case.id not in UNANSWERABLE]
    return splits(every, keys, seed)


def _words(text: str) -> str:
    return re.sub(r"\d+", "#", " ".join(re.findall(r"\w+", text.lower())))
