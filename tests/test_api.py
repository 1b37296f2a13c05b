"""API engines against scripted servers; what those say is made up."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from attar.data.types import Message, ToolCall
from attar.engines import flow
from attar.engines.api import ApiEngine
from attar.engines.base import Answer, ChatEngine, ChatRequest, Failure
from attar.engines.flow import Limits
from attar.engines.ledger import Ledger
from attar.engines.prices import Price
from attar.engines.servers import Server, status_trouble
from attar.errors import BudgetExceeded, CapabilityError, ModelError, RecipeError, Stopped
from servers import Reply, ScriptedServer, chat, error

PRICE = Price(input=1.0, output=2.0, cached_input=0.5, cache_write=1.0, batch=0.5, source="test")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(flow, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(flow, "_LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(flow, "_TAKEN_WAIT_S", 0.02)


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """The client imports much at its first call, which would count into short timeouts."""
    with ScriptedServer(lambda *_: chat()) as server:
        list(engine(server).chat([ask()]))


def ask(text="2 and 2?", **fields):
    return ChatRequest((Message("user", text),), **{"max_tokens": 8, **fields})


def engine(server, *, protocol="openai", ledger=None, price=PRICE, concurrency=8, timeout_s=20.0, total_timeout_s=60.0):
    return ApiEngine(
        Server(
            protocol, "m", server.url if protocol == "openai" else server.url.removesuffix("/v1"), "key", "TEST_KEY"
        ),
        Limits(concurrency, timeout_s, total_timeout_s),
        price=price,
        ledger=ledger,
    )


def one(made, request=None):
    [(index, outcome)] = made.chat([request or ask()])
    assert index == 0
    return outcome


def test_every_request_is_answered_once_under_its_number(tmp_path):
    def script(number, body, path):
        return Reply(chat(body["messages"][0]["content"]).body, wait_s=0.02 if number % 3 else 0.0)

    with ScriptedServer(script) as server:
        made = engine(server, ledger=Ledger(tmp_path / "l"))
        assert isinstance(made, ChatEngine)
        outcomes = list(made.chat(ask(str(i)) for i in range(60)))
    assert sorted(index for index, _ in outcomes) == list(range(60))
    assert all(outcome.message.content == str(index) for index, outcome in outcomes)
    assert (
        server.requests[0]
        == {
            "model": "m",
            "messages": [{"role": "user", "content": "0"}],
            "max_tokens": 8,
        }
        or len(server.requests) == 60
    )


def test_requests_are_drawn_as_there_is_room():
    drawn = itertools.count()

    def endless():
        while True:
            yield ask(str(next(drawn)))

    with ScriptedServer(lambda *_: chat()) as server:
        answers = engine(server, concurrency=2).chat(endless())
        for _ in range(50):
            next(answers)
        answers.close()
    assert next(drawn) <= 50 + 2 * 2 + 16


def test_an_answer_holds_what_the_server_said_each_thing_apart(tmp_path):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}

    def script(number, body, path):
        return chat("so", prompt=100, completion=10, cached=40, reasoning_content="hm", tool_calls=[call])

    with ScriptedServer(script) as server:
        ledger = Ledger(tmp_path / "l")
        answer = one(engine(server, ledger=ledger))
    assert answer == Answer(
        Message("assistant", "so", (ToolCall("a", "f", {"x": 1}),), reasoning="hm"),
        "tool_calls",
        100,
        10,
        40,
        "scripted-1",
        pytest.approx((60 + 20 + 20) / 1e6),
    )
    assert ledger.spend().usd == pytest.approx(100 / 1e6)


def test_an_answer_cut_by_max_tokens_says_so():
    with ScriptedServer(lambda *_: chat("4 is the", finish="length")) as server:
        assert one(engine(server)).finish_reason == "length"


def test_a_second_run_pays_nothing_and_a_sample_is_an_answer_of_its_own(tmp_path):
    with ScriptedServer(lambda number, *_: chat(str(number))) as server:
        made = engine(server, ledger=Ledger(tmp_path / "l"), concurrency=1)
        first = dict(made.chat([ask(), ask(), ask(sample=1), ask(temperature=0.5)]))
        assert len(server.requests) == 3
        assert first[0] == first[1]
        assert len({first[i].message.content for i in (0, 2, 3)}) == 3
        again = dict(engine(server, ledger=Ledger(tmp_path / "l")).chat([ask(), ask(sample=1)]))
        assert (again[0], again[1]) == (first[0], first[2])
        assert len(server.requests) == 3
        one(engine(server))
        assert len(server.requests) == 4


def test_a_wrong_key_ends_the_run_and_names_the_variable():
    with ScriptedServer(lambda *_: error(401, "Incorrect API key", "invalid_api_key")) as server:
        with pytest.raises(ModelError, match=r"refuses the key from TEST_KEY \(401: Incorrect API key"):
            list(engine(server).chat(ask(str(i)) for i in range(100)))
        assert len(server.requests) <= 8


def test_an_unknown_model_ends_the_run():
    with ScriptedServer(lambda *_: error(404, "The model `m` does not exist", "model_not_found")) as server:
        with pytest.raises(ModelError, match=r"teacher\.model"):
            one(engine(server))
        assert len(server.requests) == 1


def test_a_used_up_quota_stops_the_run_what_was_answered_is_kept(tmp_path):
    def script(number, body, path):
        return chat() if number < 5 else error(429, "You exceeded your current quota", "insufficient_quota")

    with ScriptedServer(script) as server:
        made = engine(server, ledger=Ledger(tmp_path / "l"), concurrency=2)
        outcomes = []
        with pytest.raises(Stopped, match="quota is used up") as caught:
            outcomes.extend(made.chat(ask(str(i)) for i in range(50)))
        assert caught.value.exit_code == 5
        assert len(outcomes) == 5
        assert len(server.requests) <= 7
        spend = Ledger(tmp_path / "l").spend()
    assert (spend.calls, spend.reserved_usd, spend.lost_usd) == (5, 0.0, 0.0)


def test_a_server_that_complains_is_asked_less_at_once_and_later_more():
    def script(number, body, path):
        if 30 <= number < 34:
            return error(429, "slow down")
        return Reply(chat().body, wait_s=0.01)

    with ScriptedServer(script) as server:
        made = engine(server, concurrency=16)
        allowed = []
        original = flow.Flow._fail

        def watched(self, job, trouble, sent):
            before = self._allowed
            original(self, job, trouble, sent)
            allowed.append((before, self._allowed))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flow.Flow, "_fail", watched)
            outcomes = dict(made.chat(ask(str(i)) for i in range(120)))
    assert all(isinstance(outcome, Answer) for outcome in outcomes.values())
    assert len(outcomes) == 120
    assert allowed[0][1] == allowed[0][0] / 2
    # Complaints about requests that were in flight already count once.
    assert min(after for _, after in allowed) >= 2
    assert server.most_at_once <= 16


def test_a_server_that_wants_to_be_left_alone_is_left_alone():
    times = []

    def script(number, body, path):
        times.append(time.monotonic())
        return error(429, "slow down", retry_after_ms="300") if number == 0 else chat()

    with ScriptedServer(script) as server:
        list(engine(server, concurrency=1).chat(ask(str(i)) for i in range(3)))
    assert times[1] - times[0] >= 0.3


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry-after": "2"}, 2.0), ({"retry-after-ms": "250", "retry-after": "9"}, 0.25), ({}, None)],
)
def test_how_long_a_server_wants_to_be_left_alone(headers, seconds):
    trouble = status_trouble(Server("openai", "m", None, "k", "K"), 503, {"error": {"message": "x"}}, headers)
    assert (trouble.next, trouble.slow_down, trouble.retry_after_s) == ("retry", True, seconds)
    date = {"retry-after": "Wed, 01 Jan 2020 00:00:00 GMT"}
    assert status_trouble(Server("openai", "m", None, "k", "K"), 429, {}, date).retry_after_s == 0.0


@pytest.fixture
def _no_patience(monkeypatch):
    """The wait before a second attempt is longer than the time that any request has."""
    monkeypatch.setattr(flow.random, "uniform", lambda low, high: 1e6)


@pytest.mark.usefixtures("_no_patience")
def test_a_server_that_dies_in_mid_run_stops_it_and_the_next_run_goes_on(tmp_path):
    def dying(number, body, path):
        return chat() if number < 6 else Reply({}, cut=True)

    asked = [ask(str(i)) for i in range(12)]
    with ScriptedServer(dying) as server:
        url = server.url
        made = engine(server, ledger=Ledger(tmp_path / "l", budget_usd=1.0), concurrency=1)
        outcomes = []
        with pytest.raises(Stopped, match="no request was answered for"):
            outcomes.extend(made.chat(asked))
        assert len(outcomes) == 6
        # The server had the request whole when it died.
        assert Ledger(tmp_path / "l").spend().lost_usd == pytest.approx(made.job(0, asked[6]).most_usd, abs=1e-9)
    with ScriptedServer(lambda *_: chat()) as server:
        made = engine(server, ledger=Ledger(tmp_path / "l"))
        # The same model at the same address, as far as the ledger knows.
        made.server = Server("openai", "m", url, "key", "TEST_KEY")
        connect = type(made.server).client
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Server, "client", lambda self, **options: _moved(connect, self, server.url, options))
            outcomes = dict(made.chat(asked))
        assert len(outcomes) == 12
        assert len(server.requests) == 6


def _moved(connect, server, url, options):
    client = connect(server, **options)
    client.base_url = url
    return client


@pytest.mark.usefixtures("_no_patience")
def test_a_connection_that_is_refused_costs_nothing(tmp_path):
    with ScriptedServer(lambda *_: chat()) as server:
        pass
    ledger = Ledger(tmp_path / "l", budget_usd=1.0)
    with pytest.raises(Stopped, match="ClientConnectorError"):
        one(engine(server, ledger=ledger))
    assert ledger.spend() == Ledger(tmp_path / "other").spend()


def test_a_timeout_is_tried_again_and_stays_charged(tmp_path):
    over = threading.Event()

    def script(number, body, path):
        if number == 0:
            over.wait(60)
        return chat()

    with ScriptedServer(script) as server:
        ledger = Ledger(tmp_path / "l", budget_usd=1.0)
        made = engine(server, ledger=ledger, timeout_s=1.0)
        most = made.job(0, ask()).most_usd
        answer = one(made)
        over.set()
    assert isinstance(answer, Answer)
    spend = ledger.spend()
    timeouts = len(server.requests) - 1
    assert timeouts >= 1
    assert spend.lost_usd == pytest.approx(timeouts * most, abs=1e-8)
    assert spend.usd == pytest.approx(answer.usd)


@pytest.mark.usefixtures("_no_patience")
def test_one_request_that_never_gets_through_fails_alone(tmp_path):
    others = threading.Event()

    def script(number, body, path):
        if body["messages"][0]["content"] == "bad":
            others.wait(60)
            return error(500, "crash")
        if number >= 3:
            others.set()
        return chat()

    with ScriptedServer(script) as server:
        made = engine(server, ledger=Ledger(tmp_path / "l"), concurrency=2)
        outcomes = dict(made.chat([ask("bad"), *(ask(str(i)) for i in range(10))]))
    failed = outcomes.pop(0)
    assert (failed.reason, failed.final, failed.usd) == ("server error", False, 0.0)
    assert "crash" in failed.detail
    assert len(outcomes) == 10
    assert all(isinstance(outcome, Answer) for outcome in outcomes.values())


def test_an_answer_that_is_no_json_is_tried_again_then_given_up(tmp_path):
    page = Reply(b"<html>Bad gateway</html>")
    with ScriptedServer(lambda number, *_: chat() if number == 2 else page) as server:
        ledger = Ledger(tmp_path / "l", budget_usd=1.0)
        assert isinstance(one(engine(server, ledger=ledger)), Answer)
        assert ledger.spend().lost_usd > 0
    with ScriptedServer(lambda *_: page) as server:
        ledger = Ledger(tmp_path / "m", budget_usd=1.0)
        made = engine(server, ledger=ledger)
        failure = one(made)
        assert (failure.reason, failure.final) == ("not json", False)
        assert "Bad gateway" in failure.detail
        assert len(server.requests) == 3
        assert failure.usd == pytest.approx(3 * made.job(0, ask()).most_usd)
        assert ledger.spend().lost_usd == pytest.approx(failure.usd, abs=1e-8)


@pytest.mark.parametrize(
    "reply",
    [
        error(400, "The response was filtered", "content_filter"),
        Reply({"error": {"message": "Your input was flagged", "code": 403}}, 403),
    ],
)
def test_a_refusal_by_a_content_filter_is_kept_as_an_answer(tmp_path, reply):
    with ScriptedServer(lambda *_: reply) as server:
        made = engine(server, ledger=Ledger(tmp_path / "l"))
        refused = one(made)
        assert (refused.reason, refused.final, refused.usd) == ("content_filter", True, 0.0)
        assert one(made) == refused
        assert len(server.requests) == 1


def test_an_answer_that_was_filtered_is_an_answer():
    with ScriptedServer(lambda *_: chat(None, finish="stop", refusal="I cannot help")) as server:
        answer = one(engine(server))
    assert (answer.finish_reason, answer.message.content) == ("content_filter", "I cannot help")


def test_a_tool_call_that_cannot_be_read_is_paid_and_kept(tmp_path):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{x"}}
    with ScriptedServer(lambda *_: chat(None, prompt=5, completion=5, tool_calls=[call])) as server:
        made = engine(server, ledger=Ledger(tmp_path / "l"))
        failure = one(made)
        assert (failure.reason, failure.final, failure.usd) == ("bad tool call", True, pytest.approx(15e-6))
        assert one(made) == failure
        assert len(server.requests) == 1


def test_a_bad_request_fails_alone_but_not_all_of_them():
    with ScriptedServer(lambda number, *_: error(400, "too long") if number == 0 else chat()) as server:
        outcomes = dict(engine(server, concurrency=1).chat(ask(str(i)) for i in range(40)))
    assert outcomes[0] == Failure("bad request", "400: too long", False, 0.0)
    assert isinstance(outcomes[39], Answer)
    with ScriptedServer(lambda *_: error(400, "temperature is not supported")) as server:
        with pytest.raises(ModelError, match=r"first 16 requests were all refused, .*temperature is not supported"):
            list(engine(server).chat(ask(str(i)) for i in range(200)))
        assert len(server.requests) < 40


# aiohttp suggests a file for it, which would be read in pieces; the body is in memory already.
@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
def test_a_message_of_ten_megabytes(tmp_path):
    long = "ø" * 5_000_000
    with ScriptedServer(lambda n, body, p: chat(str(len(body["messages"][0]["content"])))) as server:
        ledger = Ledger(tmp_path / "l", budget_usd=30.0)
        assert one(engine(server, ledger=ledger), ask(long)).message.content == "5000000"
        assert (tmp_path / "l").stat().st_size < 1e6
        with pytest.raises(BudgetExceeded, match="could cost 10"):
            one(engine(server, ledger=Ledger(tmp_path / "m", budget_usd=1.0)), ask(long))


def test_an_answer_without_usage_is_charged_at_the_most(tmp_path):
    reply = json.loads(chat().body)
    del reply["usage"]
    with ScriptedServer(lambda *_: Reply(reply)) as server:
        ledger = Ledger(tmp_path / "l", budget_usd=1.0)
        made = engine(server, ledger=ledger)
        answer = one(made)
    assert answer.usd == made.job(0, ask()).most_usd
    assert ledger.spend().usd == pytest.approx(answer.usd, abs=1e-9)


def test_the_budget_is_never_exceeded_and_what_is_reserved_is_used_once_it_is_free(tmp_path):
    with ScriptedServer(lambda *_: chat(prompt=100, completion=8)) as server:
        ledger = Ledger(tmp_path / "l", budget_usd=0.005)
        made = engine(server, ledger=ledger)
        most = made.job(0, ask("10")).most_usd
        outcomes = []
        with pytest.raises(BudgetExceeded, match=r"raise budget\.usd"):
            outcomes.extend(made.chat(ask(str(i)) for i in range(10, 99)))
    spend = ledger.spend()
    assert 0.005 - most < spend.usd <= 0.005
    assert spend.reserved_usd == spend.lost_usd == 0
    assert len(outcomes) == spend.calls == len(server.requests) == 38


def test_a_budget_without_a_price_is_an_error_that_names_the_cure(tmp_path):
    with ScriptedServer(lambda *_: chat()) as server:
        with pytest.raises(RecipeError, match=r"state teacher\.price"):
            engine(server, price=None, ledger=Ledger(tmp_path / "l", budget_usd=1.0))
        assert one(engine(server, price=None, ledger=Ledger(tmp_path / "l"))).usd is None


def test_the_estimate_spans_what_is_billed_and_knows_what_is_stored(tmp_path):
    with ScriptedServer(lambda *_: chat(prompt=20, completion=8)) as server:
        made = engine(server, ledger=Ledger(tmp_path / "l"))
        requests = [ask("How many are two and two, please? " + str(i)) for i in range(5)]
        before = made.estimate(requests)
        assert (before.calls, before.stored, before.completion_tokens) == (5, 0, (5, 40))
        assert not server.requests
        list(made.chat(requests[:3]))
        after = made.estimate(requests)
        assert (after.calls, after.stored) == (2, 3)
        assert before.usd[0] < 5 * (20 + 16) / 1e6 < before.usd[1]
        assert before.prompt_tokens[0] < 100 < before.prompt_tokens[1]


def test_a_text_that_was_to_be_json_and_is_none(tmp_path):
    with ScriptedServer(lambda number, *_: chat("Sure! {}") if number == 0 else chat("{}")) as server:
        made = engine(server, ledger=Ledger(tmp_path / "l"))
        failure = one(made, ask(schema={"type": "object"}))
        assert (failure.reason, failure.final, failure.usd) == ("not json", True, pytest.approx(14e-6))
        assert one(made, ask(schema={"type": "object"}, sample=1)).message.content == "{}"


def test_a_tool_call_that_was_asked_for_and_did_not_come():
    tool = {"type": "function", "function": {"name": "f"}}
    with ScriptedServer(lambda *_: chat("I would call f")) as server:
        made = engine(server)
        assert one(made, ask(tools=(tool,), tool_choice="f")).reason == "no tool call"
        assert isinstance(one(made, ask(tools=(tool,), tool_choice="auto")), Answer)


def test_top_logprobs():
    def script(number, body, path):
        assert (body["logprobs"], body["top_logprobs"]) == (True, 2)
        reply = json.loads(chat("4").body)
        tops = [{"token": "4", "logprob": -0.1}, {"token": "5", "logprob": -3.0}]
        reply["choices"][0]["logprobs"] = {"content": [{"token": "4", "logprob": -0.1, "top_logprobs": tops}]}
        return Reply(reply)

    with ScriptedServer(script) as server:
        [record] = one(engine(server), ask(top_logprobs=2)).top_logprobs
    assert (record.token, record.log_prob, record.top) == ("4", -0.1, (("4", -0.1), ("5", -3.0)))


def test_what_a_server_cannot_give_is_an_error():
    none = pytest.raises(CapabilityError, match="was asked for top_logprobs and gives none")
    with ScriptedServer(lambda *_: chat()) as server, none:
        one(engine(server), ask(top_logprobs=2))
    with pytest.raises(CapabilityError, match="at most 20"):
        Server("openai", "m", None, "k", "K").body(ask(top_logprobs=21))
    with pytest.raises(CapabilityError, match="at most 0"):
        Server("anthropic", "m", None, "k", "K").body(ask(top_logprobs=1))
    with pytest.raises(CapabilityError, match="no seed"):
        Server("anthropic", "m", None, "k", "K").body(ask(seed=1))


def test_openai_itself_and_others_name_the_limit_differently():
    own = Server("openai", "m", None, "k", "K").body(ask())
    other = Server("openai", "m", "http://x/v1", "k", "K").body(ask())
    assert own["max_completion_tokens"] == other["max_tokens"] == 8


def test_anthropic(tmp_path):
    def script(number, body, path):
        assert path == "/v1/messages"
        if number == 0:
            return Reply({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, 529)
        return Reply(
            {
                "id": "x",
                "type": "message",
                "role": "assistant",
                "model": "c-1",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "4"},
                ],
                "stop_reason": "end_turn",
                "usage": {"input_tokens": 60, "cache_read_input_tokens": 40, "output_tokens": 10},
            }
        )

    with ScriptedServer(script) as server:
        ledger = Ledger(tmp_path / "l")
        made = engine(server, protocol="anthropic", ledger=ledger)
        request = ChatRequest((Message("system", "Add."), Message("user", "2 and 2?")), 8)
        answer = one(made, request)
        assert answer == Answer(
            Message("assistant", "4", reasoning="hm"), "stop", 100, 10, 40, "c-1", pytest.approx(100e-6)
        )
        assert one(made, request) == answer
    assert server.requests[1] == {
        "model": "m",
        "max_tokens": 8,
        "system": "Add.",
        "messages": [{"role": "user", "content": "2 and 2?"}],
    }
    assert server.headers[1]["authorization"] == "Bearer key"


@pytest.mark.parametrize(
    ("status", "kind", "message", "raised"),
    [
        (401, "authentication_error", "invalid x-api-key", ModelError),
        (404, "not_found_error", "model: m", ModelError),
        (400, "invalid_request_error", "Your credit balance is too low", Stopped),
    ],
)
def test_errors_of_anthropic(status, kind, message, raised):
    with (
        ScriptedServer(
            lambda *_: Reply({"type": "error", "error": {"type": kind, "message": message}}, status)
        ) as server,
        pytest.raises(raised, match=message),
    ):
        one(engine(server, protocol="anthropic"))


def test_leaving_early_cancels_what_is_in_flight_and_loses_nothing_answered(tmp_path):
    left = threading.Event()

    def script(number, body, path):
        if number >= 3:
            left.wait(60)
        return chat()

    with ScriptedServer(script) as server:
        ledger = Ledger(tmp_path / "l", budget_usd=1.0)
        answers = engine(server, ledger=ledger, concurrency=3).chat(ask(str(i)) for i in range(9))
        for _ in range(3):
            next(answers)
        while len(server.requests) < 4:
            time.sleep(0.01)
        answers.close()
        assert not left.is_set()
        left.set()
    spend = ledger.spend()
    assert (spend.calls, spend.reserved_usd) == (3, 0.0)
    assert spend.lost_usd > 0


def test_an_error_in_the_callers_requests_reaches_the_caller():
    def requests():
        yield ask()
        raise KeyError("mine")

    with ScriptedServer(lambda *_: chat()) as server, pytest.raises(KeyError, match="mine"):
        list(engine(server).chat(requests()))


RUN = textwrap.dedent("""
    import sys
    from pathlib import Path
    from attar.data.types import Message
    from attar.engines.api import ApiEngine
    from attar.engines.base import ChatRequest
    from attar.engines.flow import Limits
    from attar.engines.ledger import Ledger
    from attar.engines.prices import Price
    from attar.engines.servers import Server
    url, path, first, last, budget = sys.argv[1:]
    price = Price(1.0, 2.0, 1.0, 1.0, 1.0, "test")
    ledger = Ledger(Path(path), budget_usd=float(budget))
    engine = ApiEngine(Server("openai", "m", url, "k", "K"), Limits(4, 20, 60), price=price, ledger=ledger)
    for index, answer in engine.chat(ChatRequest((Message("user", str(i)),), 8) for i in range(int(first), int(last))):
        print(index, answer.message.content, flush=True)
""")


def _process(server, path, first, last, budget=1.0):
    command = [sys.executable, "-c", RUN, server.url, str(path), str(first), str(last), str(budget)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy())


def test_two_processes_on_one_ledger_pay_once_and_keep_one_budget(tmp_path):
    with ScriptedServer(lambda n, body, p: Reply(chat(body["messages"][0]["content"]).body, wait_s=0.02)) as server:
        both = [_process(server, tmp_path / "l", 0, 30) for _ in range(2)]
        outputs = [process.communicate(timeout=60)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0]
        assert len(server.requests) == 30
        for output in outputs:
            assert sorted(output.split()[1::2], key=int) == [str(i) for i in range(30)]
    with ScriptedServer(lambda *_: Reply(chat(prompt=100, completion=8).body, wait_s=0.02)) as server:
        both = [_process(server, tmp_path / "m", first, first + 60, 0.005) for first in (100, 200)]
        errors = [process.communicate(timeout=60)[1] for process in both]
        assert all("BudgetExceeded" in text for text in errors)
        spend = Ledger(tmp_path / "m").spend()
        assert spend.usd + spend.lost_usd <= 0.005
        assert spend.calls == len(server.requests) > 20


def test_a_killed_process_costs_at_most_what_was_in_flight(tmp_path):
    with ScriptedServer(lambda n, body, p: Reply(chat(body["messages"][0]["content"]).body, wait_s=0.05)) as server:
        process = _process(server, tmp_path / "l", 0, 40)
        for _ in range(12):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        answered = Ledger(tmp_path / "l").spend().calls
        assert answered >= 12
        sent = len(server.requests)
        assert sent - answered <= 4
        again = _process(server, tmp_path / "l", 0, 40)
        output = again.communicate(timeout=60)[0]
        assert sorted(output.split()[1::2], key=int) == [str(i) for i in range(40)]
        assert len(server.requests) - sent == 40 - answered
        spend = Ledger(tmp_path / "l").spend()
    assert (spend.calls, spend.reserved_usd) == (40, 0.0)
    assert spend.lost_usd >= 0


def test_the_keys_of_the_environment(monkeypatch):
    from attar.engines.api import server_of
    from attar.recipe.base import TeacherModel

    monkeypatch.setenv("OPENAI_API_KEY", "sk-own")
    monkeypatch.setenv("ELSEWHERE", "sk-other")
    assert server_of(TeacherModel(model="openai:gpt-x")).api_key == "sk-own"
    # Another's server is never shown OpenAI's key.
    assert server_of(TeacherModel(model="openai:x", base_url="http://h/v1")).api_key == "none"
    other = server_of(TeacherModel(model="openai:x", base_url="http://h/v1/", api_key_env="ELSEWHERE"))
    assert (other.api_key, other.address, other.model) == ("sk-other", "http://h/v1", "x")
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(ModelError, match="ANTHROPIC_API_KEY, which is not set"):
        server_of(TeacherModel(model="anthropic:c"))
