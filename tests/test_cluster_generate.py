"""`attar generate` by two workers of a Ray cluster, one killed in mid-run: the rows of one process, each once."""

import json
import os
import signal
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from attar.collect.generate import generate
from attar.engines import spread
from attar.engines.leases import lease_ledger
from attar.engines.ledger import Ledger
from attar.errors import ModelError
from attar.recipe import parse_recipe
from clusters import WARNINGS
from servers import ScriptedServer, chat, error

pytestmark = [*WARNINGS, pytest.mark.usefixtures("cluster")]
RAY = {"on": "ray", "workers": 2, "threads": 1, "shard_rows": 4}


def recipe_of(folder, name, *, teacher, run=None, budget=None, **part):
    part = {"source": {"kind": "prompts", "file": "prompts.jsonl"}} | part
    content = {
        "name": "made",
        "task": "chat",
        "teacher": {"model": "teachers:MortalSums", "max_tokens": 16} | teacher,
        "data": {"train": "train.jsonl"},
        "collect": {"generate": part},
        "run": {"folder": name} | (run or {}),
        "budget": {"usd": budget},
    }
    return parse_recipe(content, "recipe", folder)


@pytest.fixture
def folder(tmp_path):
    rows = [{"prompt": f"{n}+{n}", "answer": 2 * n} for n in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def rows_of(folder, name):
    """What a run wrote, but for the time."""
    path = folder / "raw" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for row in rows:
        row.get("meta", {}).pop("created", None)
    return rows


def notes_of(folder):
    return Counter(path.name.rsplit(" ", 1)[0] for path in folder.glob("*.asked"))


@pytest.mark.parametrize("target", [None, 11])
def test_the_rows_are_those_of_one_process_though_a_worker_is_killed(folder, target):
    notes = folder / "notes"
    notes.mkdir()
    (notes / "died").touch()
    part = {
        "teacher": {},
        "samples": 2,
        "system": str(notes),
        "verify": [{"kind": "exact", "pattern": r"is (\d+)"}],
        "target": target,
    }
    one = generate(recipe_of(folder, "one", **part))
    for path in notes.iterdir():
        path.unlink()
    many = generate(recipe_of(folder, "many", run=RAY, **part))
    assert (notes / "died").exists()
    assert rows_of(folder / "many", "generated") == rows_of(folder / "one", "generated")
    assert many.kept == one.kept == (target or 20)
    if target is None:
        assert rows_of(folder / "many", "rejected") == rows_of(folder / "one", "rejected")
        assert (many.rejected, many.teacher) == (one.rejected, one.teacher)
        # Asked twice is at most what the killed worker had been sent.
        assert len(notes_of(notes)) == 40
        assert sum(notes_of(notes).values()) - 40 <= 2 * RAY["shard_rows"]
    before = notes_of(notes)
    again = generate(recipe_of(folder, "many", run=RAY, **part))
    assert (again.kept, notes_of(notes)) == (many.kept, before)


def test_prompts_that_workers_write_are_those_of_one_process(folder):
    grown = {"kind": "seeds", "prompts": ["one two three", "four five six"], "grow": 9, "per_round": 5}
    part = {"teacher": {"model": "teachers:Steady"}, "source": grown, "samples": 2}
    generate(recipe_of(folder, "one", **part))
    generate(recipe_of(folder, "many", run=RAY, **part))
    for name in ("generated", "rejected", "prompts"):
        assert rows_of(folder / "many", name) == rows_of(folder / "one", name), name
    assert len(rows_of(folder / "many", "generated")) == 2 * (2 + 9)


@dataclass(frozen=True)
class MortalWork(spread.ChatWork):
    """The same work, but a worker dies once while it sends requests."""

    def __call__(self, threads):
        answer = super().__call__(threads)
        died = Path(self.recipe.run.folder).parent / "died"

        def drawn(block):
            for request in tuple.__iter__(block):
                if request.messages[-1].content == "7+7" and not died.exists():
                    died.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield request

        class Block(tuple):
            __iter__ = drawn

        return lambda block: answer(block if block is None else Block(block))


def test_a_server_is_paid_once_but_for_what_a_killed_worker_had_in_flight(folder, monkeypatch):
    monkeypatch.setattr(spread, "ChatWork", MortalWork)
    monkeypatch.setattr(spread, "lease_ledger", partial(lease_ledger, lease_s=1.0))

    def script(number, body, path):
        return chat(f"an answer to {body['messages'][-1]['content']}")

    price = {"input_usd_per_million_tokens": 1.0, "output_usd_per_million_tokens": 2.0}
    with ScriptedServer(script) as server:
        teacher = {"model": "openai:m", "base_url": server.url, "price": price}
        recipe = recipe_of(folder, "paid", teacher=teacher, run=RAY, budget=1.0)
        result = generate(recipe)
        assert (folder / "died").exists()
        asked_for = Counter(body["messages"][-1]["content"] for body in server.requests)
        assert set(asked_for) == {f"{n}+{n}" for n in range(20)}
        # A block is of four, and the one that killed had at most three in flight.
        assert {text for text, n in asked_for.items() if n > 1} <= {"4+4", "5+5", "6+6"}
        kept = rows_of(recipe.folder, "generated")
        assert [row["messages"][0]["content"] for row in kept] == [f"{n}+{n}" for n in range(20)]
        assert result.kept == 20
        sent = len(server.requests)
        (recipe.folder / "raw/generated.jsonl").unlink()
        assert generate(recipe).kept == 20
        assert len(server.requests) == sent
    spend = Ledger(recipe.folder / "ledger.sqlite").spend()
    assert spend.usd == pytest.approx(20 * 14e-6)
    assert spend.reserved_usd == 0


def test_what_is_wrong_with_a_teacher_is_told_as_it_is(folder):
    with ScriptedServer(lambda number, body, path: error(401, "no such key")) as server:
        teacher = {"model": "openai:m", "base_url": server.url}
        with pytest.raises(ModelError, match="no such key"):
            generate(recipe_of(folder, "refused", teacher=teacher, run=RAY))
