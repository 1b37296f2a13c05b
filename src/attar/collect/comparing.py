"""The second pass: rows compared with each other, by the numbers that the first pass kept of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attar.collect.filters import contamination, duplicates
from attar.collect.reading import TRAINED, Context, words_at
from attar.collect.splitting import sampled
from attar.collect.tables import Indices, Table
from attar.collect.workers import Map
from attar.errors import PreflightRefused
from attar.recipe import ChatRecipe, ClassifyRecipe

__all__ = ["Comparison"]

_PAIRS = 512
_SHOWN = 5


def verify(context: Context, left: NDArray[Any], right: NDArray[Any], length: int) -> list[float]:
    """A worker's task: similarities of pairs of rows."""

    def place(row: Any) -> duplicates.Place:
        return duplicates.Place(int(row["worker"]), int(row["words"]), int(row["count"]), int(row["prompt"]))

    pairs = ((place(a), place(b)) for a, b in zip(left, right, strict=True))
    return duplicates.similarities(lambda at: words_at(context, at.file, at.start, at.length), pairs, length)


def scan(context: Context, rows: NDArray[Any], length: int) -> NDArray[np.int64]:
    """A worker's task: which rows of a unit have which of the test cases' runs."""
    if "tests" not in context.memory:
        stored = np.load(context.folder / "tests.npz")
        context.memory["tests"] = contamination.TestRuns(stored["words"], stored["starts"], stored["counts"], length)
    begin = int(rows["words"].min())
    end = int((rows["words"] + rows["count"]).max())
    words = words_at(context, int(rows["worker"][0]), begin, end - begin)
    tests: contamination.TestRuns = context.memory["tests"]
    return tests.shared(words, rows["words"].astype(np.int64) - begin, rows["count"])


class Comparison:
    """Drops rows because of other rows, in the order: duplicates, leaks, near duplicates, caps."""

    def __init__(
        self, recipe: ChatRecipe | ClassifyRecipe, tables: dict[str, Table], pool: Table, context: Context, each: Map
    ) -> None:
        self._recipe, self._tables, self._pool = recipe, tables, pool
        self._context, self._each = context, each

    def alone(self) -> None:
        """Everything that does not ask what is held out.

        Raises:
            PreflightRefused: a row tells a test case, and the recipe or the file does not let it be dropped.
        """
        chat = isinstance(self._recipe, ChatRecipe)
        for table in self._tables.values() if chat else (self._pool,):
            self._duplicates(table, "id" if chat else "asked")
        if "test" in self._tables:
            for key in self._tables:
                if key != "test":
                    self._same_prompt(self._tables[key], self._tables["test"])
        self._near()
        self._caps()

    def _duplicates(self, table: Table, column: str) -> None:
        values = table.rows[column]
        _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
        earlier = first[inverse]
        again = np.flatnonzero(earlier != np.arange(len(values)))
        table.drop(again, "duplicate", lambda n: f"the same as {table.where(int(earlier[again[n]]))}")

    def _same_prompt(self, table: Table, test: Table) -> None:
        rows = table.indices
        cases, known = _known(table.rows["asked"][rows], test.rows["asked"])
        rows, cases = rows[known], cases[known]
        # What a student's confidence or a prompt is fitted on must be the user's own choice, row by row.
        self._leak(
            table, rows, lambda n: f"the same prompt as {test.where(int(cases[n]))}", table.key in (*TRAINED, "val")
        )

    def _leak(self, table: Table, rows: Indices, detail: Any, may_drop: bool) -> None:
        if not len(rows):
            return
        if may_drop and self._recipe.curate.decontaminate.action == "drop":
            table.drop(rows, "leak", detail)
            return
        shown = "; ".join(
            f"{table.where(int(row))} ({detail(n)}): {self._text(table, int(row))!r}"
            for n, row in enumerate(rows[:_SHOWN])
        )
        more = f"; and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        cure = ", or set curate.decontaminate.action: drop" if may_drop else ""
        raise PreflightRefused(
            f"leak: {len(rows)} row(s) of data.{table.key} stand in data.test as well: {shown}{more}; remove them from "
            f"one side{cure}"
        )

    def _text(self, table: Table, row: int) -> str:
        """What a row asks, cut."""
        place = table.rows[row]
        line = json.loads(self._context.pread(f"{place['worker']}.jsonl", int(place["start"]), int(place["size"])))
        if "text" in line:
            return str(line["text"])[:80]
        said = [message["content"] for message in line["messages"] if message["role"] == "user"]
        return str(said[0] if said else line["messages"][0]["content"])[:80]

    def _near(self) -> None:
        settings = self._recipe.curate.near_duplicates
        if settings is None:
            return
        pool, test = self._pool, self._tables.get("test")
        mine = pool.indices[pool.rows["count"][pool.indices] > 0]
        cases = np.zeros(0, np.int64) if test is None else np.flatnonzero(test.rows["count"] > 0)
        parts = [(test, cases), (pool, mine)] if test is not None else [(pool, mine)]
        signature = np.concatenate([table.signatures[chosen] for table, chosen in parts])
        rows = np.concatenate([table.rows[chosen] for table, chosen in parts])
        pairs = duplicates.candidates(signature, settings.threshold)
        del signature
        pairs = pairs[pairs[:, 1] >= len(cases)]
        tasks = (
            (verify, (rows[pairs[at : at + _PAIRS, 0]], rows[pairs[at : at + _PAIRS, 1]], settings.shingle))
            for at in range(0, len(pairs), _PAIRS)
        )
        similarity = np.array([value for values in self._each(tasks) for value in values])
        decided = duplicates.decide(pairs, similarity, settings.threshold, len(cases))
        late = np.array(sorted(decided), np.int64)
        other = np.array([decided[int(row)][0] for row in late], np.int64)
        how = np.array([decided[int(row)][1] for row in late])
        told, own = other < len(cases), other >= len(cases)
        if test is not None:
            which = test, cases[other[told]], how[told]
            self._leak(
                pool,
                mine[late[told] - len(cases)],
                lambda n: f"{which[2][n]:.2f} like {which[0].where(int(which[1][n]))}",
                True,
            )
        earlier, alike = mine[other[own] - len(cases)], how[own]
        pool.drop(
            mine[late[own] - len(cases)],
            "near duplicate",
            lambda n: f"{alike[n]:.2f} like {pool.where(int(earlier[n]))}",
        )

    def _caps(self) -> None:
        balance = self._recipe.curate.balance
        caps = {"source": balance.per_source, "label": getattr(balance, "per_class", None)}
        for column, most in caps.items():
            if most is not None:
                self._cap(column, most)

    def _cap(self, column: str, most: int) -> None:
        pool, rows = self._pool, self._pool.indices
        over = rows[sampled(pool.rows[column][rows], pool.rows["id"][rows], most, self._recipe.run.seed)]
        called = {"source": "source", "label": "class"}[column]
        pool.drop(
            over, f"{called} cap", lambda n: f"{pool.names[int(pool.rows[column][over[n]])]} has more than {most} rows"
        )

    def with_test(self, train: Indices, held: Indices | None) -> Indices:
        """Rows of train that tell no case of the test split, be it a file of its own or held out of the pool.

        Args:
            train: rows of the pool, in their order.
            held: those that are the test split; None: it is a file, or there is none.

        Raises:
            PreflightRefused: a row shares words with a case of the user's test file, and the recipe wants a refusal.
        """
        if held is None and "test" not in self._tables:
            return train
        test = self._tables["test"] if held is None else self._pool
        cases = test.indices if held is None else held
        if held is not None:
            # Groups are apart, and two groups may have one prompt.
            places, known = _known(self._pool.rows["asked"][train], test.rows["asked"][cases])
            rows, which = train[known], cases[places[known]]
            self._pool.drop(rows, "leak", lambda n: f"the same prompt as {test.where(int(which[n]))}, held out")
            train = train[~known]
        length = self._recipe.curate.decontaminate.ngram
        if length is None or not len(cases):
            return train
        told = self._telling(train, test, cases, length)
        rows = np.array(sorted(told), np.int64)
        detail = [f"shares {length} words in a row with {test.where(told[int(row)])}" for row in rows]
        if held is None:
            self._leak(self._pool, rows, lambda n: detail[n], True)
        else:
            self._pool.drop(rows, "leak", lambda n: f"{detail[n]}, held out")
        return train[self._pool.kept[train]]

    def _telling(self, train: Indices, test: Table, cases: Indices, length: int) -> dict[int, int]:
        """Rows that have a rare run of words of a test case, and which case that is."""
        words = [
            words_at(self._context, int(row["worker"]), int(row["words"]), int(row["count"]))
            for row in test.rows[cases]
        ]
        counts = np.array([len(part) for part in words], np.int64)
        flat, starts = np.concatenate(words), np.cumsum(counts) - counts
        np.savez(self._context.folder / "tests.npz", words=flat, starts=starts, counts=counts)
        tests = contamination.TestRuns(flat, starts, counts, length)
        if not len(tests.hashes):
            return {}
        mask = np.zeros(len(self._pool.rows), bool)
        mask[train] = True
        chosen = [np.flatnonzero(mask[unit]) + unit.start for unit in self._pool.units]
        chosen = [rows for rows in chosen if len(rows)]
        number = np.zeros(len(tests.hashes), np.int64)
        found = []
        tasks = ((scan, (self._pool.rows[rows], length)) for rows in chosen)
        for at, matches in enumerate(self._each(tasks)):
            number += np.bincount(matches[:, 1], minlength=len(number))
            # A phrase of every row would fill the memory.
            place = self._context.folder / f"matches-{at}.npy"
            np.save(place, matches.astype(np.uint32))
            found.append(place)
        told: dict[int, int] = {}
        for rows, place in zip(chosen, found, strict=True):
            hits = contamination.telling(
                np.load(place).astype(np.int64), number, self._recipe.curate.decontaminate.common
            )
            told |= {int(rows[row]): int(cases[tests.owners[run]]) for row, run in hits.items()}
        return told


def _known(values: NDArray[np.uint64], among: NDArray[np.uint64]) -> tuple[Indices, NDArray[np.bool_]]:
    """The first place of each value among others, and whether it has one; 0 is nowhere."""
    ordered, first = np.unique(among, return_index=True)
    place = np.searchsorted(ordered, values)
    place[place == len(ordered)] = 0
    known = (ordered[place] == values) & (values != 0) if len(ordered) else np.zeros(len(values), bool)
    return first[place] if len(ordered) else place, known
