"""Tasks from a seed, in fixed proportions.

Of every eighteen tasks of a split, three take one call, three two, and so on to six, and one of each three has
something the matter with it: information is missing, a tool gives a wrong result, or the wish is impossible. These
three kinds take turns within a number of calls, where a task of that many calls can have them: an impossible wish is
found out by the fourth call, and a single call cannot go wrong and be repaired.

What a request names decides by a hash on which side of the splits it stands, whatever the seed: no two splits, of one
seed or of several, share a request or the parameters of one. Families of ``unseen`` are in no other split.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from random import Random
from typing import NamedTuple

from attar.agents.environments import Task
from attar.agents.office.drafts import Draft
from attar.agents.office.families import FORMS, TROUBLES, UNSEEN
from attar.agents.office.phrases import Parameters, write_request

__all__ = ["SPLITS", "draw_tasks"]

SPLITS = ("train", "val", "calibration", "test", "unseen")
# Of ten sides that the hash chooses from, those that are not train's.
_SIDES = {0: "test", 1: "val", 2: "calibration"}
# How often a cell is drawn from before it is said to be empty.
_ATTEMPTS = 1000


class _Cell(NamedTuple):
    """A way to make a task of so many calls."""

    form: str
    named: int
    """how many things the request names"""
    trouble: str


_Cells = dict[tuple[int, str], dict[str, dict[str, list[_Cell]]]]


def _cells(unseen: bool) -> _Cells:
    """(calls, kind of trouble or nothing) -> trouble -> family -> ways to make such a task."""
    cells: _Cells = {}
    for name, form in FORMS.items():
        family = name.split("+")[0]
        if (family in UNSEEN) != unseen:
            continue
        for trouble, lengths in form.calls.items():
            for count, calls in enumerate(lengths, 1):
                kind = TROUBLES[trouble] if trouble else ""
                families = cells.setdefault((calls, kind), {}).setdefault(trouble, {})
                families.setdefault(family, []).append(_Cell(name, count, trouble))
    return cells


_CELLS = {unseen: _cells(unseen) for unseen in (False, True)}


@lru_cache(maxsize=64)
def draw_tasks(split: str, count: int, seed: int) -> tuple[Task, ...]:
    """The first ``count`` tasks of a split; more of them begin with the same ones.

    Raises:
        ValueError: there is no such split, or the pools do not hold so many different tasks.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; wanted one of {', '.join(SPLITS)}")
    used: set[str] = set()
    return tuple(_draw(split, index, seed, used) for index in range(count))


def _draw(split: str, index: int, seed: int, used: set[str]) -> Task:
    unseen = split == "unseen"
    turn, calls = divmod(index, 6)
    calls += 1
    cells = _CELLS[unseen]
    kind = ""
    if (turn + calls) % 3 == 0:
        kinds = [kind for kind in ("missing", "wrong", "impossible") if (calls, kind) in cells]
        kind = kinds[turn // 3 % len(kinds)]
    troubles = cells[calls, kind]
    for attempt in range(_ATTEMPTS):
        rng = Random(f"{split}/{seed}/{index}/{attempt}")
        families = troubles[rng.choice(list(troubles))]
        cell = rng.choice(families[rng.choice(list(families))])
        draft = Draft(rng)
        form = FORMS[cell.form]
        named = form.build(draft, cell.named, cell.trouble)
        key = _hash(cell.form, named)
        if key in used or (not unseen and _side(key) != split):
            continue
        used.add(key)
        return _task(cell, calls, draft, named)
    raise ValueError(
        f"{split}: no new task of {calls} calls after {index} tasks; the pools hold no more, so ask for fewer"
    )


def _task(cell: _Cell, calls: int, draft: Draft, named: Parameters) -> Task:
    rng = draft.rng
    request = write_request(cell.form, named, rng)
    busy = [rng.choice(FORMS[cell.form].tools)] if cell.trouble == "busy" else []
    start, goal = draft.finish()
    data = {
        "request": request,
        "start": start,
        "goal": goal,
        "answer": draft.answer,
        "says": "" if draft.answer else draft.says,
        "busy": busy,
        "dead": draft.dead,
        "calls": calls,
        "trouble": cell.trouble,
    }
    family = cell.form.split("+")[0]
    return Task(f"{family}-{_hash(data)[:12]}", family, data)


def _hash(*content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _side(key: str) -> str:
    return _SIDES.get(int(key, 16) % 10, "train")
