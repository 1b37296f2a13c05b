"""A teacher behind vLLM's server, which is scripted here: what it says of given ids, what is refused, parity."""

import math

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attar.engines.local import load_local
from attar.engines.served import PromptTop, load_served
from attar.errors import CapabilityError, ModelError, RunError, Stopped
from attar.recipe.chat import ChatRecipe, ChatTeacher
from attar.signals.language import SignalKind, ask
from attar.signals.packing import pack_top_k, unpack_top_k
from attar.signals.parity import check_parity, parity_weights
from attar.signals.served import ask_served, check_lengths, top_k_of, vocabulary_size
from attar.signals.sparse import top_k
from attar.tokens import TokenizedExample
from servers import Reply, error
from vllmserver import Vllm

IDS = [0, 300, 301, 302, 303, 20, 21, 1]
PLACES = [3, 4, 7]


def recipe_for(server, folder, **teacher):
    return ChatRecipe.model_validate(
        {
            "name": "served",
            "task": "chat",
            "data": {"train": "train.jsonl"},
            "teacher": {"model": "openai:teacher", "base_url": server.url, "tokenizer": f"hf:{folder}", **teacher},
            "student": {"model": f"hf:{folder}"},
            "run": {"device": "cpu"},
        }
    )


_opened = []


@pytest.fixture(autouse=True)
def _engines_are_closed():
    yield
    while _opened:
        _opened.pop().close()


def engine_for(server, vocabulary=400, **teacher):
    settings = {"concurrency": 4, **teacher}
    engine = load_served(ChatTeacher(model="openai:teacher", base_url=server.url, **settings), vocabulary)
    _opened.append(engine)
    return engine


@pytest.fixture(scope="module")
def vocabulary(tiny_teacher):
    return vocabulary_size(AutoTokenizer.from_pretrained(tiny_teacher))


@pytest.fixture(scope="module")
def logs(tiny_teacher):
    """Log-probabilities [position, vocabulary] of what comes at each position of IDS, from the second on."""
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    with torch.no_grad():
        return torch.cat(
            [torch.zeros(1, model.config.vocab_size), model(torch.tensor([IDS])).logits[0].log_softmax(-1)]
        )[: len(IDS)]


def example(ids=IDS, places=PLACES, name="e"):
    supervised = np.zeros(len(ids), dtype=bool)
    supervised[places] = True
    return TokenizedExample(name, np.array(ids, dtype=np.int32), supervised)


def examples(n, seed=0):
    rng = np.random.default_rng(seed)
    return [example(rng.integers(2, 256, 12).tolist(), [4, 5, 9, 11], f"e{i}") for i in range(n)]


def test_what_is_said_of_given_ids_is_what_the_model_says(tiny_teacher, logs, vocabulary):
    with Vllm(tiny_teacher) as server:
        found = engine_for(server, vocabulary).prompt_top(IDS, PLACES, 5)
        assert server.prompts == [IDS]
    best = logs[PLACES].topk(5)
    assert found.ids.tolist() == best.indices.tolist()
    np.testing.assert_allclose(found.log_probs, best.values, atol=1e-5)
    np.testing.assert_allclose(found.own, [logs[place, IDS[place]] for place in PLACES], atol=1e-5)


def test_signals_are_those_of_the_same_model_in_this_process(tiny_teacher, vocabulary):
    kind = SignalKind("top_k", entries=7, at_least=0.01)
    few = examples(9)
    local = load_local(f"hf:{tiny_teacher}", device=torch.device("cpu"))
    with Vllm(tiny_teacher) as server:
        records = list(ask_served(engine_for(server, vocabulary), few, kind))
    for one, record in zip(few, records, strict=True):
        mine = unpack_top_k(record, vocabulary)
        theirs = unpack_top_k(ask(local.model, local.tokenizer, [one], kind)[0], vocabulary)
        assert mine.ids.tolist() == theirs.ids.tolist()
        torch.testing.assert_close(mine.log_probs, theirs.log_probs, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(mine.log_tail, theirs.log_tail, atol=2e-3, rtol=2e-3)


def test_what_it_writes_are_ids_and_as_the_model_writes(tiny_teacher):
    local = load_local(f"hf:{tiny_teacher}", device=torch.device("cpu"))
    with Vllm(tiny_teacher) as server:
        engine = engine_for(server)
        plain, measured, again = (
            engine.write(IDS, 6),
            engine.write(IDS, 9, measured=True),
            engine.write(IDS, 9, measured=True),
        )
        salts = [body.get("cache_salt") for body in server.requests]
    assert plain.ids == local.write(IDS, 6).ids
    assert measured.ids == local.write(IDS, 9, measured=True).ids == again.ids
    assert not measured.stopped
    assert measured.first_token_ms > 0
    # nothing of an earlier prompt may shorten what is measured
    assert salts[0] is None
    assert None not in salts[1:]
    assert len(set(salts[1:])) == 2


def test_an_answer_that_ends_before_its_limit_says_so(tiny_teacher):
    def stop(number, choice):
        return {**choice, "token_ids": [5, 1], "finish_reason": "stop"}

    with Vllm(tiny_teacher, says=stop) as server:
        engine = engine_for(server)
        written = engine.write(IDS, 6)
        assert (written.ids, written.stopped) == ([5, 1], True)
        with pytest.raises(RunError, match="was to write 6 tokens, past any end, and wrote 2"):
            engine.write(IDS, 6, measured=True)


def without(key):
    return lambda number, choice: {k: v for k, v in choice.items() if k != key}


def changed(row):
    """A choice whose last row is another."""

    def says(number, choice):
        rows = list(choice["prompt_logprobs"])
        rows[-1] = row(rows[-1])
        return {**choice, "prompt_logprobs": rows}

    return says


def test_a_server_without_log_probabilities_of_prompts_is_refused(tiny_teacher):
    with (
        Vllm(tiny_teacher, says=without("prompt_logprobs")) as server,
        pytest.raises(
            CapabilityError,
            match=r"answers without prompt_logprobs.*'prompt_top_logprobs'.*serve the teacher with vLLM",
        ),
    ):
        engine_for(server).prompt_top(IDS, PLACES, 3)
    with (
        Vllm(tiny_teacher, says=without("token_ids")) as server,
        pytest.raises(CapabilityError, match="does not say the ids of what it wrote"),
    ):
        engine_for(server).write(IDS, 3)


def test_a_server_that_reads_other_ids_is_refused(tiny_teacher):
    def others(number, choice):
        moved = [None, *({str(int(k) + 1): v for k, v in row.items()} for row in choice["prompt_logprobs"][1:])]
        return {**choice, "prompt_logprobs": moved, "prompt_token_ids": None}

    with (
        Vllm(tiny_teacher, says=others) as server,
        pytest.raises(ModelError, match="was given token 300 at position 1 and read 301"),
    ):
        engine_for(server).prompt_top(IDS, PLACES, 3)

    def echoed(number, choice):
        return {**choice, "prompt_token_ids": [*IDS[:5], 77, *IDS[6:]]}

    with (
        Vllm(tiny_teacher, says=echoed) as server,
        pytest.raises(ModelError, match="was given token 20 at position 5 and read 77"),
    ):
        engine_for(server).prompt_top(IDS, PLACES, 3)
    with (
        Vllm(tiny_teacher, reads=lambda ids: [0, *ids]) as server,
        pytest.raises(ModelError, match="was given 8 token ids and read 9"),
    ):
        engine_for(server).prompt_top(IDS, PLACES, 3)


def test_more_entries_than_the_server_gives_are_refused_with_its_words(tiny_teacher):
    with Vllm(tiny_teacher, cap=20) as server, pytest.raises(CapabilityError) as refused:
        engine_for(server).prompt_top(IDS, PLACES, 64)
    assert "greater than max allowed: 20" in str(refused.value)
    assert "set distill.signals.entries to 20" in str(refused.value)
    assert "--max-logprobs 64" in str(refused.value)
    with Vllm(tiny_teacher, cap=64) as server:
        assert engine_for(server).prompt_top(IDS, PLACES, 64).ids.shape == (3, 64)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (lambda row: {k: {**v, "logprob": 3.0 - v["rank"]} for k, v in row.items()}, r"sum to .*, at most 1 wanted"),
        (lambda row: {k: {**v, "logprob": v["rank"] - 30.0} for k, v in row.items()}, "in order of rank they rise"),
        (lambda row: dict(list(row.items())[:2]), "gives 2 entries at position 7, 3 were asked for"),
    ],
)
def test_what_is_no_list_of_log_probabilities_is_refused(tiny_teacher, row, message):
    with Vllm(tiny_teacher, says=changed(row)) as server, pytest.raises(RunError, match=message):
        engine_for(server).prompt_top(IDS, PLACES, 3)


def test_ids_that_only_the_server_has_are_left_out_while_they_weigh_nothing(tiny_teacher, vocabulary):
    def lifted(weight):
        """A padding row's token, of so much probability, in place of the last of three entries."""

        def row(entries):
            own = str(IDS[-1])
            (other,) = [token for token, entry in entries.items() if entry["rank"] == 1]
            values = {own: math.log(0.01), other: math.log(0.4), "33": math.log(0.1), str(vocabulary): math.log(weight)}
            ordered = sorted(values, key=values.get, reverse=True)
            return {t: {"logprob": values[t], "rank": 1 + ordered.index(t), "decoded_token": ""} for t in ordered}

        return changed(row)

    with Vllm(tiny_teacher, says=lifted(5e-4)) as server:
        found = engine_for(server, vocabulary).prompt_top(IDS, [7], 4)
    assert found.ids[0, 3] == -1
    assert found.log_probs[0, 3] == -np.inf
    # what it had is taken from the whole, so that the others' is of the tokenizer's tokens alone
    assert np.exp(found.log_probs[0, 0]) == pytest.approx(0.4 / (1 - 5e-4))
    with (
        Vllm(tiny_teacher, says=lifted(0.05)) as server,
        pytest.raises(ModelError, match=r"gives 5.00% to ids that the tokenizer does not have .* at position 7"),
    ):
        engine_for(server, vocabulary).prompt_top(IDS, [7], 3)


def test_what_is_impossible_is_minus_infinity(tiny_teacher):
    def gives(logits):
        logits = logits.clone()
        logits[:, 3:] = -math.inf
        return logits.log_softmax(-1)

    with Vllm(tiny_teacher, gives=gives) as server:
        found = engine_for(server).prompt_top([0, 2, 1], [1, 2], 5)
    assert np.isneginf(found.log_probs[:, 3:]).all()
    assert np.isfinite(found.log_probs[:, :3]).all()


def test_a_model_that_is_not_served_is_refused_with_those_that_are(tiny_teacher):
    with Vllm(tiny_teacher, name="other") as server, pytest.raises(ModelError, match="the server has other: name one"):
        engine_for(server)


def test_a_provider_without_prompts_log_probabilities_is_refused():
    for model, url in (("openai:gpt", None), ("anthropic:claude", "http://127.0.0.1:9")):
        with pytest.raises(CapabilityError, match="gives no log-probabilities of tokens that it is given"):
            load_served(ChatTeacher(model=model, base_url=url), 400)


def test_a_busy_server_is_asked_again_and_one_that_is_gone_stops_the_run(tiny_teacher, monkeypatch):
    monkeypatch.setattr("attar.engines.served._FIRST_WAIT_S", 0.01)

    down = []

    def busy(number, body):
        if body is not None and (down or len(server.requests) <= 2):
            return error(503, "loading") if len(server.requests) == 1 else Reply(b"", cut=True)
        return None

    with Vllm(tiny_teacher, before=busy) as server:
        found = engine_for(server).prompt_top(IDS, PLACES, 3)
        assert len(server.requests) == 3
        assert found.ids.shape == (3, 3)
        engine = engine_for(server)
        down.append(True)
        # Longer than all patience: the first failure is the end.
        monkeypatch.setattr("attar.engines.served._FIRST_WAIT_S", 1e6)
        with pytest.raises(Stopped, match=r"has not answered for .*the same command goes on from here"):
            engine.prompt_top(IDS, PLACES, 3)
        with pytest.raises(Stopped, match="did not answer while it was measured"):
            engine.write(IDS, 3, measured=True)


def test_a_refused_key_and_an_answer_that_is_no_json(tiny_teacher, monkeypatch):
    monkeypatch.setattr("attar.engines.served._FIRST_WAIT_S", 1e6)
    with (
        Vllm(tiny_teacher, before=lambda n, body: error(401, "no such key")) as server,
        pytest.raises(ModelError, match="refuses the key"),
    ):
        engine_for(server).prompt_top(IDS, PLACES, 3)
    with Vllm(tiny_teacher, before=lambda n, body: Reply(b"<html>")) as server, pytest.raises(Stopped, match="<html>"):
        engine_for(server).prompt_top(IDS, PLACES, 3)


def test_the_first_failure_ends_all_that_is_asked_for(tiny_teacher):
    def bad(number, body):
        return error(400, "no", 400) if number == 5 else None

    with Vllm(tiny_teacher, before=bad) as server:
        engine = engine_for(server, concurrency=3)
        with pytest.raises(CapabilityError, match="refuses a prompt of 12 tokens"):
            list(ask_served(engine, examples(40), SignalKind("top_k", entries=3)))
        assert len(server.requests) < 15


def test_a_request_that_waits_for_the_server_ends_with_the_first_failure(tiny_teacher, monkeypatch):
    monkeypatch.setattr("attar.engines.served._FIRST_WAIT_S", 1.0)
    first, second = examples(2)

    def bad(number, body):
        if body is None or len(server.requests) > 2:
            return None
        if body["prompt"] == second.ids.tolist():
            return error(503, "busy")
        refused = error(400, "no", 400)
        refused.wait_s = 0.4
        return refused

    with Vllm(tiny_teacher, before=bad) as server:
        engine = engine_for(server)
        with pytest.raises(CapabilityError, match="refuses a prompt"):
            list(ask_served(engine, [first, second], SignalKind("top_k", entries=3)))
        assert len(server.requests) == 2
        # The next ones wait for it again.
        server.before = lambda number, body: error(503, "busy") if body and len(server.requests) == 3 else None
        assert engine.prompt_top(IDS, PLACES, 3).ids.shape == (3, 3)


def test_no_more_requests_are_in_flight_than_allowed_and_answers_keep_their_order(tiny_teacher):
    few = examples(24)
    with Vllm(tiny_teacher, before=lambda n, body: None) as server:
        list(ask_served(engine_for(server, concurrency=3), few, SignalKind("top_k", entries=3)))
        assert server.most_at_once <= 3
        assert sorted(map(tuple, server.prompts)) == sorted(tuple(e.ids.tolist()) for e in few)


def test_examples_without_room_for_an_answer_are_refused(tiny_teacher):
    with Vllm(tiny_teacher, length=12) as server:
        engine = engine_for(server)
    check_lengths(engine, [example(IDS)])
    with pytest.raises(CapabilityError, match=r"at most 12 tokens.*longest example has 12; lower curate.max_tokens to"):
        check_lengths(engine, [*examples(1), example(IDS)])


def found(*log_probs, ids=None):
    rows = np.array([log_probs])
    return PromptTop(np.array([ids or range(rows.shape[1])]), rows, np.zeros(1), {})


def test_the_tail_is_what_is_left_of_one():
    signal = top_k_of(found(math.log(0.5), math.log(0.3), math.log(0.1)), 10)
    assert float(signal.log_tail.exp()) == pytest.approx(0.1, rel=1e-6)
    # an entry below at_least goes to it
    signal = top_k_of(found(math.log(0.5), math.log(0.3), math.log(0.1)), 10, at_least=0.2)
    assert signal.ids.tolist() == [[0, 1, -1]]
    assert float(signal.log_tail.exp()) == pytest.approx(0.2, rel=1e-6)


def test_a_tail_of_rounding_is_kept_from_zero_within_what_it_can_be():
    # a sum above 1: the rest is not less than nothing
    signal = top_k_of(found(math.log(0.9), math.log(0.1 + 1e-7)), 1000)
    assert float(signal.log_tail.exp()) == pytest.approx(1e-6)
    # the eight others are each no likelier than the last entry
    signal = top_k_of(found(0.0, -25.0), 10)
    assert float(signal.log_tail.exp()) == pytest.approx(8 * math.exp(-25.0), rel=1e-5)
    # nothing is left of a whole vocabulary, nor where the last entry is impossible
    assert float(top_k_of(found(math.log(0.5), math.log(0.5)), 2).log_tail) == -math.inf
    assert math.isfinite(float(top_k_of(found(0.0, -math.inf), 10).log_tail))


def test_a_signal_equals_that_of_whole_logits(tiny_teacher, logs, vocabulary):
    best = logs[PLACES].topk(6)
    given = PromptTop(best.indices.numpy(), best.values.double().numpy(), np.zeros(3), {})
    mine, wanted = top_k_of(given, vocabulary), top_k([logs[PLACES]], 6)
    assert mine.ids.tolist() == wanted.ids.tolist()
    torch.testing.assert_close(mine.log_tail, wanted.log_tail, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.log_probs, wanted.log_probs)
    packed = unpack_top_k(pack_top_k(mine, vocabulary), vocabulary)
    assert packed.ids.tolist() == wanted.ids.sort().values.tolist()


def check(server, folder, tokenizer, vocabulary, **teacher):
    engine = engine_for(server, vocabulary)
    return check_parity(recipe_for(server, folder, **teacher), engine, tokenizer, examples(6), 8)


@pytest.fixture
def tokenizer(tiny_teacher):
    return AutoTokenizer.from_pretrained(tiny_teacher)


def test_parity_with_the_weights(tiny_teacher, tokenizer, vocabulary):
    with Vllm(tiny_teacher) as server:
        parity = check(server, tiny_teacher, tokenizer, vocabulary)
        assert parity["against"] == f"hf:{tiny_teacher}"
        assert parity["tokens"] == 16
        assert parity["largest_difference"] < 1e-4
        assert parity["tolerance"] == 0.01
        # a half format may be further apart, and says so
        half = check(server, tiny_teacher, tokenizer, vocabulary, dtype="bfloat16")
        assert 1e-4 < half["largest_difference"] <= half["tolerance"] == 0.25


def test_parity_refuses_other_weights_with_both_numbers(tiny_teacher, tokenizer, vocabulary, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    for parameter in model.parameters():
        parameter.data *= 1.05
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with Vllm(tmp_path) as server:
        with pytest.raises(RunError) as refused:
            check(server, tiny_teacher, tokenizer, vocabulary)
        assert check(server, tiny_teacher, tokenizer, vocabulary, parity=f"hf:{tmp_path}")["largest_difference"] < 1e-4
        with pytest.raises(RunError):
            check(server, tmp_path, tokenizer, vocabulary, parity=f"hf:{tiny_teacher}")
    message = str(refused.value)
    assert "parity: the log-probability of token" in message
    assert message.count("-") > 2
    assert "at most 0.01 apart wanted" in message
    assert "--dtype float32" in message


def test_parity_refuses_a_server_that_tokenises_anew(tiny_teacher, tokenizer, vocabulary):
    # It puts a token before the prompt and echoes the ids that it was given: nothing but the numbers shows it.
    with (
        Vllm(tiny_teacher, reads=lambda ids: [0, *ids], counts=len) as server,
        pytest.raises(RunError, match=r"parity: the log-probability of token .* at most 0.01 apart wanted"),
    ):
        check(server, tiny_teacher, tokenizer, vocabulary)


def test_a_server_is_compared_with_itself_where_there_are_no_weights(tiny_teacher, tokenizer, vocabulary, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with Vllm(tiny_teacher) as server:
        assert parity_weights(recipe_for(server, tmp_path)) is None
        assert parity_weights(recipe_for(server, tiny_teacher)) == f"hf:{tiny_teacher}"
        assert parity_weights(recipe_for(server, tiny_teacher, parity="internal")) is None
        parity = check(server, tmp_path, tokenizer, vocabulary)
        assert parity["against"] == "itself"
        assert parity["largest_difference"] == 0
        assert len(server.prompts) == 8
    noise = torch.Generator().manual_seed(0)

    def moody(logits):
        return (logits + 0.5 * torch.randn(logits.shape, generator=noise)).log_softmax(-1)

    with (
        Vllm(tiny_teacher, gives=moody) as server,
        pytest.raises(RunError, match=r"gives it -\S+ and, asked again, -\S+; at most 0.1 apart wanted"),
    ):
        check(server, tmp_path, tokenizer, vocabulary)


def test_parity_refuses_ids_that_mean_other_tokens(tiny_teacher, tokenizer, vocabulary, tmp_path):
    def renamed(row):
        return {token: {**entry, "decoded_token": "zebra"} for token, entry in row.items()}

    def says(number, choice):
        return {**choice, "prompt_logprobs": [None, *map(renamed, choice["prompt_logprobs"][1:])]}

    with (
        Vllm(tiny_teacher, says=says) as server,
        pytest.raises(ModelError, match=r"token \d+ is 'zebra' for openai:teacher at .* for teacher.tokenizer"),
    ):
        check(server, tiny_teacher, tokenizer, vocabulary)


def test_weights_that_do_not_fit_into_memory_are_not_loaded(tiny_teacher, tokenizer, vocabulary, monkeypatch):
    class Full:
        available = 10

    monkeypatch.setattr(psutil, "virtual_memory", Full)
    with Vllm(tiny_teacher) as server, pytest.raises(CapabilityError, match=r"set teacher\.parity: internal"):
        check(server, tiny_teacher, tokenizer, vocabulary)
