"""OpenAI's batch mode against a scripted server; what it says is made up."""

import json

import pytest

from attar.data.types import Message
from attar.engines import batches
from attar.engines.api import ApiEngine
from attar.engines.base import Answer, ChatRequest, Failure
from attar.engines.flow import Limits
from attar.engines.ledger import Ledger, Spend, Taken
from attar.engines.prices import Price
from attar.engines.servers import Server
from attar.errors import BudgetExceeded, ModelError, RunError
from servers import Reply, ScriptedServer, chat

PRICE = Price(input=1.0, output=2.0, cached_input=1.0, cache_write=1.0, batch=0.5, source="test")


class Batched:
    """Files and batches of a scripted provider. A batch is over at its ``looks``-th retrieval."""

    def __init__(self, *, looks=2, status="completed", answer=None):
        self.files, self.made = {}, {}
        self.looks, self.status = looks, status
        self.answer = answer or (lambda body: (200, json.loads(chat(body["messages"][0]["content"]).body)))

    def __call__(self, number, body, path):
        if path == "/v1/files":
            name = f"file-{len(self.files)}"
            self.files[name] = body.split(b"\r\n\r\n")[-1].rsplit(b"\r\n--", 1)[0]
            return Reply(
                {"id": name, "object": "file", "bytes": 1, "created_at": 0, "filename": "b", "purpose": "batch"}
            )
        if path == "/v1/batches" and body is not None:
            name = f"batch_{len(self.made)}"
            self.made[name] = {**body, "seen": 0}
            return Reply(self._shown(name))
        if path.startswith("/v1/batches?") or path == "/v1/batches":
            return Reply({"object": "list", "data": [self._shown(name) for name in self.made], "has_more": False})
        if path.startswith("/v1/batches/"):
            name = path.split("/")[3]
            self.made[name]["seen"] += 1
            return Reply(self._shown(name))
        return Reply(self._results(path.split("/")[3]))

    def _shown(self, name):
        made = self.made[name]
        over = made["seen"] >= self.looks
        return {
            "id": name,
            "object": "batch",
            "endpoint": made["endpoint"],
            "completion_window": "24h",
            "created_at": 0,
            "input_file_id": made["input_file_id"],
            "metadata": made.get("metadata"),
            "status": self.status if over else "in_progress",
            "output_file_id": f"out-{name}" if over and self.status != "failed" else None,
            "errors": {"object": "list", "data": [{"code": "x", "message": "line 1 is bad"}]}
            if self.status == "failed"
            else None,
        }

    def _results(self, output):
        rows = [json.loads(line) for line in self.files[self.made[output[4:]]["input_file_id"]].splitlines()]
        lines = []
        for row in reversed(rows):
            answered = self.answer(row["body"])
            if answered is not None:
                status, body = answered
                response = {"status_code": status, "request_id": "r", "body": body}
                lines.append(
                    json.dumps({"id": "l", "custom_id": row["custom_id"], "response": response, "error": None})
                )
        return "\n".join(lines).encode()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(batches, "_WAIT_S", 0.01)
    monkeypatch.setattr(batches, "sleep", lambda seconds: None)


def engine(server, path, *, budget=None):
    return ApiEngine(
        Server("openai", "m", server.url, "key", "K"),
        Limits(8, 20.0, 60.0),
        price=PRICE,
        ledger=Ledger(path, budget_usd=budget),
        batch=True,
    )


def asked(*texts):
    return [ChatRequest((Message("user", text),), 8) for text in texts]


def test_a_batch_is_submitted_polled_collected_and_paid_once(tmp_path):
    provider = Batched()
    with ScriptedServer(provider) as server:
        made = engine(server, tmp_path / "l")
        outcomes = dict(made.chat(asked("a", "b", "a", "c")))
        assert [outcomes[i].message.content for i in range(4)] == ["a", "b", "a", "c"]
        assert len(provider.files) == len(provider.made) == 1
        assert len(provider.files["file-0"].splitlines()) == 3
        assert outcomes[0].usd == pytest.approx((10 + 2 * 2) / 1e6 / 2)
        assert made.ledger.spend() == Spend(pytest.approx(3 * 7e-6), 0.0, 0.0, 3, 30, 6)
        again = dict(engine(server, tmp_path / "l").chat(asked("c", "d", "a")))
        assert [again[i].message.content for i in range(3)] == ["c", "d", "a"]
        assert len(provider.files["file-1"].splitlines()) == 1


def test_a_run_that_was_cut_off_collects_what_it_had_submitted(tmp_path):
    provider = Batched(looks=3)
    with ScriptedServer(provider) as server:
        first = engine(server, tmp_path / "l")

        def impatient(seconds):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batches, "sleep", impatient)
            with pytest.raises(KeyboardInterrupt):
                list(first.chat(asked("a", "b")))
        assert first.ledger.spend().reserved_usd > 0
        outcomes = dict(engine(server, tmp_path / "l").chat(asked("b", "a", "c")))
        assert [outcomes[i].message.content for i in range(3)] == ["b", "a", "c"]
        assert [len(content.splitlines()) for content in provider.files.values()] == [2, 1]


@pytest.mark.parametrize("created", [True, False])
def test_a_run_that_was_cut_off_while_it_submitted_pays_once(tmp_path, created):
    provider = Batched()
    with ScriptedServer(provider) as server:
        made = engine(server, tmp_path / "l")
        cut = "rename_batch" if created else "commit"
        with pytest.MonkeyPatch.context() as patch:
            if created:
                patch.setattr(Ledger, cut, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            else:
                patch.setattr(batches.Batches, "_call", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                list(made.chat(asked("a", "b")))
        assert made.ledger.batches()[0].startswith("attar-")
        outcomes = dict(engine(server, tmp_path / "l").chat(asked("a", "b")))
        assert [outcomes[i].message.content for i in range(2)] == ["a", "b"]
        assert len(provider.made) == 1
        spend = made.ledger.spend()
    assert (spend.calls, spend.reserved_usd) == (2, 0.0)


def test_what_a_batch_did_not_answer_fails_and_may_be_asked_again(tmp_path):
    def answer(body):
        text = body["messages"][0]["content"]
        if text == "slow":
            return None
        if text == "filtered":
            return 400, {"error": {"message": "filtered", "code": "content_filter"}}
        if text == "long":
            return 400, {"error": {"message": "too long", "code": "context_length_exceeded"}}
        return 200, json.loads(chat("ok").body)

    with ScriptedServer(Batched(status="expired", answer=answer)) as server:
        made = engine(server, tmp_path / "l")
        outcomes = dict(made.chat(asked("fine", "slow", "filtered", "long")))
    assert isinstance(outcomes[0], Answer)
    assert outcomes[1] == Failure("batch", "batch batch_0 is expired without an answer", False, 0.0)
    assert (outcomes[2].reason, outcomes[2].final, outcomes[2].usd) == ("content_filter", True, 0.0)
    assert (outcomes[3].reason, outcomes[3].final) == ("bad request", False)
    spend = made.ledger.spend()
    assert (spend.usd, spend.reserved_usd, spend.lost_usd) == (pytest.approx(7e-6), 0.0, 0.0)
    assert made.ledger.get(made.job(0, asked("slow")[0]).key) is None


def test_a_batch_that_is_refused_is_an_error_and_costs_nothing(tmp_path):
    with ScriptedServer(Batched(status="failed")) as server:
        made = engine(server, tmp_path / "l")
        with pytest.raises(ModelError, match="refuses batch batch_0: line 1 is bad"):
            list(made.chat(asked("a")))
    assert made.ledger.spend() == Spend(0.0, 0.0, 0.0, 0, 0, 0)


def test_a_batch_holds_what_the_budget_allows(tmp_path):
    provider = Batched()
    with ScriptedServer(provider) as server:
        made = engine(server, tmp_path / "l", budget=1.0)
        one = made.job(0, asked("0")[0]).most_usd
        made = engine(server, tmp_path / "m", budget=3.5 * one)
        outcomes = []
        with pytest.raises(BudgetExceeded):
            outcomes.extend(made.chat(asked(*"0123456789")))
    assert sorted(index for index, _ in outcomes) == [0, 1, 2]
    assert len(provider.files["file-0"].splitlines()) == 3


def test_requests_that_wait_in_a_batch_are_not_sent_a_second_way(tmp_path):
    with ScriptedServer(Batched()) as server:
        made = engine(server, tmp_path / "l")
        job = made.job(0, asked("a")[0])
        made.ledger.commit([], [(job.key, job.most_usd)], batch="batch_9")
        assert made.ledger.claim(job.key, 0.0) == Taken("batch_9")
        direct = ApiEngine(made.server, made.limits, price=PRICE, ledger=made.ledger)
        with pytest.raises(RunError, match="wait in batch batch_9"):
            list(direct.chat(asked("a")))


def test_batch_mode_needs_a_ledger():
    with pytest.raises(ValueError, match="ledger"):
        ApiEngine(Server("openai", "m", None, "key", "K"), Limits(1, 1.0, 1.0), batch=True)
