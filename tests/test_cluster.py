"""A Ray cluster of two workers, one killed in mid-run: results are those of one process, in order, each once."""

import json
import os
import signal
import uuid
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from attar import pipeline
from attar.cluster import machines
from attar.cluster.shards import Shards
from attar.data.types import Message
from attar.engines.base import ChatRequest
from attar.engines.leases import lease_ledger
from attar.engines.ledger import Claim, Ending, Ledger, Over, Stored, Taken
from attar.engines.spread import spread_chat
from attar.errors import BudgetExceeded
from attar.recipe import load_recipe
from attar.signals import workers
from clusters import WARNINGS
from servers import ScriptedServer, chat

pytestmark = WARNINGS


@pytest.fixture
def place(request, bucket, tmp_path):
    return str(tmp_path / "shards") if request.param == "disk" else f"{bucket}/{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Squares:
    """Squares numbers; dies at one of them once, or always."""

    notes: str
    """a folder for what the workers have to tell"""
    dies_at: int | None = None
    when: str = "before"
    """or ``after`` its result was written, or ``always``"""
    refuses: int | None = None

    def open(self, threads):
        if self.when == "after":
            write = Shards.attempt

            def attempt(shards, source, table):
                mark = write(shards, source, table)
                self.die(table["id"].to_pylist())
                return mark

            Shards.attempt = attempt

        def work(table):
            numbers = table["value"].to_pylist()
            (Path(self.notes) / f"did-{numbers[0]}-{uuid.uuid4().hex}").write_text(str(os.getpid()))
            if self.refuses in numbers:
                raise BudgetExceeded("no money left")
            if self.when != "after":
                self.die(table["id"].to_pylist())
            return pa.table({"id": table["id"], "square": [n * n for n in numbers]})

        return work

    def die(self, ids):
        died = Path(self.notes) / "died"
        if str(self.dies_at) in ids and (self.when == "always" or not died.exists()):
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def tables(count=12, rows=2):
    return [
        pa.table({"id": [str(n) for n in part], "value": list(part)})
        for part in (range(start, start + rows) for start in range(0, count * rows, rows))
    ]


def did(notes):
    return Counter(int(path.name.split("-")[1]) for path in Path(notes).glob("did-*"))


@pytest.fixture
def commits(monkeypatch):
    seen = []
    commit = Shards.commit

    def counted(self, mark):
        seen.append(mark.source)
        commit(self, mark)

    monkeypatch.setattr(Shards, "commit", counted)
    return seen


@pytest.mark.parametrize(("place", "when"), [("disk", "after"), ("s3", "before")], indirect=["place"])
def test_a_killed_workers_shards_are_done_again_and_written_once(cluster, place, tmp_path, commits, when):
    shards = Shards(place)
    work = Squares(str(tmp_path), dies_at=6, when=when)
    results = list(cluster.map(work, tables(), shards))
    assert (tmp_path / "died").exists()
    assert [n for table in results for n in table["id"].to_pylist()] == [str(n) for n in range(24)]
    assert [n for table in results for n in table["square"].to_pylist()] == [n * n for n in range(24)]
    assert sorted(commits) == sorted(set(commits))
    assert len(commits) == 12
    assert did(tmp_path)[6] >= 2
    assert len({path.read_text() for path in tmp_path.glob("did-*")}) >= 2
    # Again: nothing is done, nothing is written, no matter how the marks were made.
    before = did(tmp_path)
    again = list(cluster.map(work, tables(), Shards(place)))
    assert [t.to_pylist() for t in again] == [t.to_pylist() for t in results]
    assert (did(tmp_path), len(commits)) == (before, 12)
    # What the killed attempt had written is gone, and one file is left for each shard.
    assert sum(name.count(".") == 2 for name in shards._sizes()) == 12


def test_what_a_worker_raises_comes_here_and_the_rest_is_kept(cluster, tmp_path):
    shards = Shards(str(tmp_path / "shards"))
    with pytest.raises(BudgetExceeded, match="no money left"):
        list(cluster.map(Squares(str(tmp_path), refuses=4), tables(), shards))
    kept = shards.marks()
    assert len(kept) < 12
    first = did(tmp_path)
    results = list(cluster.map(Squares(str(tmp_path)), tables(), shards))
    assert [n for table in results for n in table["square"].to_pylist()] == [n * n for n in range(24)]
    assert sum((did(tmp_path) - first).values()) == 12 - len(kept)


def test_a_shard_that_killed_worker_after_worker_is_not_begun_again(tmp_path):
    shards = Shards(str(tmp_path / "shards"))
    source = shards.put(tables(1)[0])
    member = machines._Worker(Squares(str(tmp_path)), shards.url, 1, deaths=2)
    assert member({"source": source})["error"] == ""
    for _ in range(2):
        shards.begin(source, 2)
    told = member({"source": source})
    assert told["error"] == "RunError"
    assert "2 workers died at shard" in told["message"]
    assert did(tmp_path)[0] == 1
    shards.stop()
    assert member({"source": source}) == {**told, "error": "", "message": ""}


def test_what_goes_wrong_in_a_worker_is_told(tmp_path):
    shards = Shards(str(tmp_path / "shards"))
    member = machines._Worker(Squares(str(tmp_path / "nowhere")), shards.url, 1, deaths=2)
    told = member({"source": shards.put(tables(1)[0])})
    assert told["error"] == "RunError"
    assert told["message"].startswith("a worker failed: FileNotFoundError: ")
    assert isinstance(machines.told("BudgetExceeded", "x"), BudgetExceeded)


@dataclass(frozen=True)
class Payer:
    """Pays a cent for each number, in a file that shows who paid for what; dies once with a request in flight."""

    notes: str
    ledger: object

    def open(self, threads):
        bill = Path(self.notes) / "bill"

        def ask(key):
            while True:
                [outcome] = self.ledger.commit([], [(key, 0.02)])
                if isinstance(outcome, Stored):
                    return outcome.outcome
                if isinstance(outcome, Over):
                    raise BudgetExceeded(outcome.message)
                if isinstance(outcome, Claim):
                    break
                assert isinstance(outcome, Taken)
            with bill.open("a") as handle:
                handle.write(f"{key}\n")
            died = Path(self.notes) / "died"
            if key == "key-3" and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            self.ledger.commit([Ending(outcome, f"answer {key}", 0.01)], [])
            return f"answer {key}"

        # Numbers meet in more than one shard: what one worker asks, another one may have in flight.
        return lambda table: pa.table({"answer": [ask(f"key-{n // 2}") for n in table["value"].to_pylist()]})


def test_nothing_is_paid_twice_but_what_a_killed_worker_had_in_flight(cluster, tmp_path):
    path = tmp_path / "ledger.sqlite"
    with lease_ledger(path, 1.0, lease_s=1.0) as ledger:
        results = list(cluster.map(Payer(str(tmp_path), ledger), tables(12, 3), Shards(str(tmp_path / "s"))))
    assert [a for table in results for a in table["answer"].to_pylist()] == [f"answer key-{n // 2}" for n in range(36)]
    bill = Counter((tmp_path / "bill").read_text().split())
    assert bill.pop("key-3") == 2
    assert set(bill.values()) == {1}
    assert len(bill) == 17
    spend = Ledger(path).spend()
    assert (spend.calls, spend.usd, spend.reserved_usd, spend.lost_usd) == (18, pytest.approx(0.18), 0, 0.02)


CHAT = """
name: asked
task: chat
teacher: {model: "openai:m", base_url: "URL", max_tokens: 8, price: PRICE, tokenizer: "hf:t"}
student: {model: "hf:s"}
data: {train: conversations.jsonl}
run: {on: ray, workers: 2, threads: 1, shard_rows: 3}
"""
PRICE = "{input_usd_per_million_tokens: 1.0, output_usd_per_million_tokens: 2.0}"


def test_a_teacher_behind_an_api_is_asked_by_all_workers_and_paid_once(cluster, tmp_path):
    def script(number, body, path):
        asked = body["messages"][-1]["content"]
        return chat(f"answer to {asked}")

    requests = [ChatRequest((Message("user", f"question {n % 15}"),), 8) for n in range(20)]
    with ScriptedServer(script) as server:
        (tmp_path / "attar.yaml").write_text(CHAT.replace("URL", server.url).replace("PRICE", PRICE))
        recipe = load_recipe(tmp_path / "attar.yaml")
        for _ in range(2):
            drawn = []
            with spread_chat(recipe) as engine:
                assert "text" in engine.capabilities
                outcomes = dict(engine.chat(drawn.append(r) or r for r in requests))
            assert len(drawn) == 20
            assert [outcomes[n].message.content for n in range(20)] == [
                f"answer to question {n % 15}" for n in range(20)
            ]
        assert len(server.requests) == 15
    assert Ledger(recipe.folder / "ledger.sqlite").spend().calls == 15


RECIPE = """
name: tiny-chat
task: chat
teacher: {model: "hf:TEACHER"}
data: {train: conversations.jsonl}
curate: {val_size: 6, test_size: 4, max_tokens: 64}
distill:
  objectives: [{kind: logit}]
  signals: SIGNALS
run: {device: cpu, threads: 1, shard_rows: 5}
"""


class Here:
    """A cluster of one worker, which is this process."""

    workers = 1

    def map(self, work, tables, shards):
        function = work.open(1)
        for table in tables:
            mark = shards.attempt(shards.put(table), function(table))
            shards.commit(mark)
            yield shards.read(mark)


@pytest.mark.parametrize("signals", ["{kind: sampled}", "{kind: top_k, entries: 8}", "{kind: hidden}"])
def test_signals_by_way_of_shards_are_those_of_one_process(tmp_path, tiny_teacher, monkeypatch, signals):
    words = "turn off the lamp please play wake me at seven".split()
    rows = [
        {
            "messages": [
                {"role": "user", "content": " ".join(words[: 2 + n % 7])},
                {"role": "assistant", "content": f"{words[n % 9]} {n}"},
            ]
        }
        for n in range(30)
    ]
    (tmp_path / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "attar.yaml").write_text(RECIPE.replace("TEACHER", str(tiny_teacher)).replace("SIGNALS", signals))
    one = pipeline.run(load_recipe(tmp_path / "attar.yaml", ["run.folder=one"]), until="score")
    places = []

    @contextmanager
    def start_here(where):
        places.append((where.workers, where.shards))
        yield Here()

    monkeypatch.setattr(workers, "start_cluster", start_here)
    shared = str(tmp_path / "shared")
    changes = ["run.folder=many", "run.on=ray", "run.workers=2", f"run.shards={shared}"]
    many = pipeline.run(load_recipe(tmp_path / "attar.yaml", changes), until="score")
    assert places == [(2, shared)]
    files = sorted(path.name for path in (one / "signals/tokens").iterdir())
    assert sum(name.endswith(".json") for name in files) >= 6
    assert files == sorted(path.name for path in (many / "signals/tokens").iterdir())
    for name in files:
        assert (one / "signals/tokens" / name).read_bytes() == (many / "signals/tokens" / name).read_bytes(), name
    # What was on its way is gone.
    assert [path for path in Path(shared).rglob("*") if path.is_file()] == []
