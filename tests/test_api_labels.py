"""Labels from API teachers, and the classify task with one, against scripted servers; what those say is made up."""

import json
import math

import numpy as np
import pytest

from attar import run
from attar.data.types import Part
from attar.engines.api import ApiEngine
from attar.engines.flow import Limits
from attar.engines.labels import LabelEngine
from attar.engines.ledger import Ledger
from attar.engines.load import load_chat_teacher, load_teacher, teacher_files
from attar.engines.prices import Price
from attar.engines.servers import Server
from attar.errors import BudgetExceeded, CapabilityError, ModelError, RecipeError, RunError
from attar.preflight import check
from attar.recipe import parse_recipe
from servers import Reply, ScriptedServer, chat, error

PRICE = Price(1.0, 2.0, 1.0, 1.0, 1.0, "test")


def logprobs(*pairs):
    """A response with one token, the pairs its likeliest."""
    body = json.loads(chat(pairs[0][0]).body)
    tops = [{"token": token, "logprob": math.log(p)} for token, p in pairs]
    body["choices"][0]["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}]}
    return Reply(body)


def labels(server, *, ledger=None, samples=None, constrained=True, protocol="openai", max_tokens=None):
    url = server.url if protocol == "openai" else server.url.removesuffix("/v1")
    made = ApiEngine(Server(protocol, "m", url, "k", "K"), Limits(8, 20, 60), price=PRICE, ledger=ledger)
    return LabelEngine(made, samples=samples, constrained=constrained, max_tokens=max_tokens)


def prompts(*texts):
    return [(Part("Sort this: ", True), Part(text, False)) for text in texts]


def test_log_probs_of_the_first_token():
    with ScriptedServer(
        lambda *_: logprobs(("Billing", 0.5), (" billing", 0.2), ("tech", 0.2), ("the", 0.06))
    ) as server:
        scores = labels(server).score(prompts("a", "b"), ["billing", "tech", "sales"])
    assert server.requests[0]["messages"][0]["content"] in ("Sort this: a", "Sort this: b")
    assert (server.requests[0]["top_logprobs"], server.requests[0]["max_tokens"]) == (20, 1)
    # sales is not listed: it has at most the 0.04 that is left, which is less than the last one listed
    assert np.allclose(np.exp(scores.log_probs), [[0.7, 0.2, 0.04]] * 2, atol=1e-6)
    assert scores.prompt_tokens.tolist() == [10, 10]


def test_words_of_several_tokens_are_refused_with_the_cure():
    refused = pytest.raises(CapabilityError, match=r"60% of .* only begin .* teacher\.samples")
    with ScriptedServer(lambda *_: logprobs(("bil", 0.6), ("tech", 0.4))) as server, refused:
        labels(server).score(prompts("a"), ["billing", "tech"])


def test_a_prompt_that_asks_for_something_else_is_refused():
    refused = pytest.raises(RunError, match=r"1\.0% of its first token .* begins with 'Sure'")
    with ScriptedServer(lambda *_: logprobs(("Sure", 0.95), ("tech", 0.01))) as server, refused:
        labels(server).score(prompts("a"), ["billing", "tech"])


def test_votes_are_counted_and_no_label_is_impossible():
    def script(number, body, path):
        text = body["messages"][0]["content"]
        return chat(json.dumps({"label": "tech" if text.endswith("a") or number % 2 else "billing"}))

    with ScriptedServer(script) as server:
        scores = labels(server, samples=4).score(prompts("a"), ["billing", "tech"])
    shape = server.requests[0]["response_format"]["json_schema"]["schema"]
    assert shape["properties"]["label"]["enum"] == ["billing", "tech"]
    assert np.allclose(np.exp(scores.log_probs), [[0.5 / 5, 4.5 / 5]])
    assert scores.prompt_tokens.tolist() == [40]
    assert len(server.requests) == 4


def test_votes_in_words_where_a_server_has_no_schemas():
    said = ["Tech.", " **billing**", "I think it is tech", "tech"]

    with ScriptedServer(lambda number, *_: chat(said[number])) as server:
        made = labels(server, samples=4, constrained=False)
        scores = made.score(prompts("a"), ["billing", "tech"])
    assert "response_format" not in server.requests[0]
    assert made.unreadable == 1
    assert np.allclose(np.exp(scores.log_probs), [[1.5 / 4, 2.5 / 4]])


def test_a_prompt_whose_answers_are_all_no_words_is_an_error():
    refused = pytest.raises(RunError, match=r"none of 3 answers .* 'Hm', ended by length")
    with ScriptedServer(lambda *_: chat("Hm", finish="length")) as server, refused:
        labels(server, samples=3, constrained=False).score(prompts("a"), ["billing", "tech"])


def test_a_refused_request_is_an_error_that_shows_it():
    refused = pytest.raises(RunError, match=r"no answer to 'Sort this: a' .content_filter")
    with ScriptedServer(lambda *_: error(400, "filtered", "content_filter")) as server, refused:
        labels(server, samples=1).score(prompts("a"), ["billing", "tech"])


def test_anthropic_has_no_log_probs():
    with ScriptedServer(lambda *_: chat()) as server, pytest.raises(CapabilityError, match=r"teacher\.samples: 8"):
        labels(server, protocol="anthropic")


def test_words_that_answers_cannot_tell_apart():
    with ScriptedServer(lambda *_: chat()) as server, pytest.raises(RunError, match="differ only in case"):
        labels(server).score(prompts("a"), ["Tech", "tech"])


def recipe(tmp_path, url, **changed):
    rows = [{"text": f"{'apple' if i % 2 else 'bear'} {i}", "label": "ab"[1 - i % 2]} for i in range(60)]
    for name, part in {"pool": rows, "dev": rows[:10]}.items():
        lines = [json.dumps({"text": f"{row['text']} {name}", "label": row["label"]}) for row in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    tests = [json.dumps({"text": f"{row['text']} test", "label": row["label"]}) for row in rows[:20]]
    (tmp_path / "test.jsonl").write_text("\n".join(tests))
    content = {
        "name": "api",
        "task": "classify",
        "data": {"labels": ["a", "b"], "pool": "pool.jsonl", "dev": "dev.jsonl", "test": "test.jsonl"},
        "curate": {"val_size": 10},
        "teacher": {
            "model": "openai:m",
            "base_url": url,
            "prompts": [{"template": "a or b? {{ text }}"}],
            "price": {"input_usd_per_million_tokens": 1, "output_usd_per_million_tokens": 2},
            "timeout_s": 20,
            "total_timeout_s": 60,
        },
        "student": {"form": "ngrams"},
        "train": {"epochs": 2},
        "evaluate": {
            "latency_requests": 5,
            "throughput_requests": 8,
            "throughput_rounds": 2,
            "resamples": 200,
            "baseline": False,
        },
        "run": {"folder": "run", "device": "cpu", "threads": 1},
    }
    for dotted, value in changed.items():
        part, _, key = dotted.partition("__")
        content[part] = {**content.get(part, {}), key: value}
    return parse_recipe(content, "test", tmp_path)


def _a_or_b(number, body, path):
    first = body["messages"][0]["content"].split("? ")[1][:1]
    return logprobs(("a", 0.8), ("b", 0.1)) if first == "a" else logprobs(("b", 0.8), ("a", 0.1))


def test_a_classify_job_with_a_teacher_behind_an_api(tmp_path):
    with ScriptedServer(_a_or_b) as server:
        job = recipe(tmp_path, server.url, budget__usd=1.0)
        findings = check(job)
        assert not server.requests
        assert not (tmp_path / "run").exists()
        assert not [finding for finding in findings if finding.level == "refuse"]
        assert any("USD in all" in finding.message for finding in findings)
        folder = run(job, until="calibrate")
        asked = len(server.requests)
        assert asked == 60 + 3
        table = np.load(folder / "signals" / "labels" / "train.npy")
        rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
        assert [int(row["text"].startswith("b")) for row in rows] == table.argmax(1).tolist()
        # The scores are gone, the ledger is not: nothing is asked twice.
        for file in (folder / "signals" / "raw").iterdir():
            file.unlink()
        run(job, until="calibrate")
        assert len(server.requests) == asked
        run(job)
        report = json.loads((folder / "report" / "report.json").read_text())
    evaluation = json.loads((folder / "evaluate" / "evaluation.json").read_text())
    teacher = evaluation["arms"]["teacher"]
    assert teacher["quality"]["value"] == 1.0
    assert teacher["size_mb"] is None
    # 10 tokens in and 2 out at 1 and 2 USD a million
    assert teacher["cost_usd_per_1k"] == pytest.approx(0.014)
    spend = Ledger(folder / "ledger.sqlite").spend()
    assert spend.calls == len(server.requests)
    # Speed is measured by asking anew.
    assert spend.calls > asked + 20 + 5
    assert report["spend"]["teacher_usd"] == pytest.approx(spend.usd)


def test_a_budget_stops_the_job_which_goes_on_when_it_is_raised(tmp_path):
    with ScriptedServer(_a_or_b) as server:
        with pytest.raises(BudgetExceeded):
            run(recipe(tmp_path, server.url, budget__usd=0.0012), until="score")
        asked = len(server.requests)
        assert 10 < asked < 63
        run(recipe(tmp_path, server.url, budget__usd=1.0), until="score")
        assert len(server.requests) == 63


def test_the_fingerprint_of_a_teacher_behind_an_api(tmp_path):
    from attar.pipeline import plan

    with ScriptedServer(_a_or_b) as server:
        run(recipe(tmp_path, server.url), until="score")
        same = {p.stage: p.reasons for p in plan(recipe(tmp_path, server.url), "score")}
        assert not any(same.values())
        for changed in (
            {"teacher__base_url": "http://other/v1"},
            {"teacher__samples": 3},
            {"teacher__model": "openai:n"},
        ):
            reasons = {p.stage: p.reasons for p in plan(recipe(tmp_path, server.url, **changed), "score")}
            assert reasons["score"], changed
    with pytest.raises(ModelError, match="no files here"):
        teacher_files(recipe(tmp_path, "http://h/v1"))


def test_what_a_recipe_cannot_ask_of_its_teacher(tmp_path):
    def refused(match, **changed):
        with pytest.raises(RecipeError, match=match):
            recipe(tmp_path, "http://h/v1", **changed)

    refused(
        r"teacher\.samples belongs to",
        teacher__model="hf:x",
        teacher__base_url=None,
        teacher__price=None,
        teacher__timeout_s=120,
        teacher__total_timeout_s=1800,
        teacher__samples=2,
    )
    refused(r"teacher\.base_url belongs to openai:NAME", teacher__model="hf:x")
    refused("a label has one word", teacher__samples=2, teacher__label_words={"a": ["a", "x"]})
    refused("constrained: false belongs to", teacher__constrained=False)
    refused(r"teacher\.batch: true needs openai", teacher__model="anthropic:x", teacher__batch=True)
    refused(r"total_timeout_s is 5\.0, less", teacher__total_timeout_s=5)
    refused(r"budget\.usd", budget__usd=0)


def test_a_price_is_needed_to_compare_costs(tmp_path):
    with pytest.raises(RecipeError, match=r"teacher\.price"):
        load_teacher(recipe(tmp_path, "http://h/v1", teacher__price=None))
    refused = [f.message for f in check(recipe(tmp_path, "http://h/v1", teacher__price=None)) if f.level == "refuse"]
    assert any("state teacher.price" in message for message in refused)


def test_which_teachers_continue_conversations(tmp_path):
    with ScriptedServer(lambda *_: chat("hello")) as server:
        made = load_chat_teacher(recipe(tmp_path, server.url))
        assert isinstance(made, ApiEngine)
        assert made.ledger.path == tmp_path / "run" / "ledger.sqlite"
        assert made.limits == Limits(64, 20.0, 60.0)
    plain = {
        "teacher__base_url": None,
        "teacher__price": None,
        "teacher__timeout_s": 120,
        "teacher__total_timeout_s": 1800,
    }
    with pytest.raises(ModelError, match="no chat engine; it needs capabilities, chat"):
        load_chat_teacher(recipe(tmp_path, "", teacher__model="fakes:Keyword", **plain))
