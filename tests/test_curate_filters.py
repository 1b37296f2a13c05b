"""What rows are dropped for: by themselves, and because of others."""

import json
import random
import re

import numpy as np
import pytest

from attar.collect.filters.contamination import TestRuns, telling
from attar.collect.filters.duplicates import HASHES, candidates, decide, signatures
from attar.collect.shingles import Vocabulary, runs, shingles
from attar.errors import DataError, PreflightRefused, RecipeError
from attar.recipe.curate import REFUSALS
from curating import WORDS, chat, classify, curated, reasons, rows_of, sentence, talk, talks, write


def tool(name, **schema):
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def calling(name, arguments, tools=None):
    call = {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    return {"messages": messages} | ({} if tools is None else {"tools": tools})


WEATHER = tool(
    "weather", type="object", properties={"city": {"type": "string"}, "days": {"type": "integer"}}, required=["city"]
)


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (calling("weather", '{"city": "Oslo", "days": 2}', [WEATHER]), None, None),
        (calling("weather", '{"days": 2}', [WEATHER]), "tool call", r"\(weather\): \$ breaks required: \[\"city\"\]"),
        (calling("weather", '{"city": 5}', [WEATHER]), "tool call", r'\$\.city breaks type: "string"'),
        (calling("climate", "{}", [WEATHER]), "unknown tool", "calls 'climate', on offer: weather"),
        (calling("weather", '{"city": "Oslo"}'), "unknown tool", "on offer: none"),
        (calling("weather", '{"city": ', [WEATHER]), "bad tool call", "which is no JSON"),
        (calling("weather", "[1]", [WEATHER]), "bad tool call", "an object or its JSON is wanted"),
        (calling("w", "{}", [tool("w", type="objekt")]), "bad tools", "schema of 'w' cannot be used"),
        (calling("w", "{}", [tool("w", **{"$ref": "http://127.0.0.1:9/x"})]), "bad tools", "cannot be used"),
        (calling("w", '{"a": 1}', [{"type": "function", "function": {"name": "w"}}]), None, None),
    ],
)
def test_tool_calls(tmp_path, row, reason, detail):
    _, folder = curated(chat(tmp_path, [*talks(10), row]))
    assert reasons(folder) == ({} if reason is None else {reason: [11]})
    if detail:
        assert re.search(detail, rows_of(folder / "dropped.jsonl")[0]["detail"])
    if reason != "bad tool call":
        _, folder = curated(chat(tmp_path, [*talks(10), row], tool_calls="keep"))
        assert reasons(folder) == {}


def test_a_schema_elsewhere_is_not_fetched(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: asked.append(a))
    row = calling("w", "{}", [tool("w", **{"$ref": "http://127.0.0.1:9/x"})])
    _, folder = curated(chat(tmp_path, [*talks(10), row]))
    assert reasons(folder) == {"bad tools": [11]}
    assert asked == []


def test_a_file_with_arguments_in_the_wrong_form_is_not_the_models_fault(tmp_path):
    with pytest.raises(Exception, match=r"line 11: .*arguments is 5"):
        curated(chat(tmp_path, [*talks(10), calling("weather", 5, [WEATHER])]))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (talk("a", "b", finish_reason="length"), "truncated"),
        (talk("a", "b", stop_reason="max_tokens"), "truncated"),
        (talk("a", "b", finish_reason="stop"), None),
        (talk("a", "```python\nx = 1\n"), "unfinished"),
        (talk("a", "```python\nx = 1\n```"), None),
        (talk("a", '{"x": [1, 2'), "unfinished"),
        (talk("a", '{"x": [1, 2]}'), None),
        (talk("a", "I'm sorry, but I can't help with that."), "refusal"),
        (talk("a", "I’m sorry, I cannot do that."), "refusal"),
        (talk("a", "As an AI language model, I don't have feelings."), "refusal"),
        (talk("a", "I'm unable to help with it."), "refusal"),
        (talk("a", "I can't wait to help! Here it is."), None),
        (talk("a", "I am sorry to hear that; here is what to do."), None),
        (talk("a", "He said: I cannot help with that."), None),
    ],
)
def test_answers(tmp_path, row, reason):
    _, folder = curated(chat(tmp_path, [*talks(10), row], unfinished="drop", refusals="drop"))
    assert reasons(folder) == ({} if reason is None else {reason: [11]})
    _, folder = curated(chat(tmp_path, [*talks(10), row], truncated="keep"))
    assert reasons(folder) == {}


def test_a_message_may_say_that_it_was_cut_and_one_that_is_not_learned_may_refuse(tmp_path):
    cut, refusing = talk("a", "b"), talk("c", "I cannot help you.")
    cut["messages"][1]["finish_reason"] = "length"
    refusing["messages"][1]["train"] = False
    refusing["messages"].append({"role": "assistant", "content": "well, here"})
    _, folder = curated(chat(tmp_path, [*talks(10), cut, refusing], refusals="drop"))
    assert reasons(folder) == {"truncated": [11]}


def test_own_patterns_of_refusals_replace_the_declared_ones(tmp_path):
    rows = [*talks(10), talk("a", "Nope. Not me."), talk("b", "I cannot help you.")]
    _, folder = curated(chat(tmp_path, rows, refusals="drop", refusal_patterns=["nope"]))
    assert reasons(folder) == {"refusal": [11]}
    assert all(re.compile(pattern) for pattern in REFUSALS)


def test_length_counts_what_is_said(tmp_path):
    system = {"role": "system", "content": "x" * 5000}
    short, long = talk("ab", "cd"), talk("ab", "c" * 998)
    short["messages"].insert(0, system)
    _, folder = curated(chat(tmp_path, [*talks(10), short, long], length={"min_characters": 5, "max_characters": 999}))
    assert reasons(folder) == {"too short": [11], "too long": [12]}


def test_language(tmp_path):
    pytest.importorskip("py3langid")
    rows = [
        talk("what is the weather like in the mountains today", "it is cold and windy with a little snow"),
        talk("wie ist heute das Wetter in den Bergen", "es ist kalt und windig und es liegt etwas Schnee"),
        talk("ok", "42"),
    ]
    rows += [
        talk(f"tell me the number {n} thing about the old city", f"that is the answer number {n}") for n in range(9)
    ]
    _, folder = curated(chat(tmp_path, rows, languages=["en"]))
    assert reasons(folder) == {"language": [2]}
    with pytest.raises(RecipeError, match=r"curate.languages: xx: not told apart"):
        curated(chat(tmp_path, rows, languages=["xx"]))


KEY = "sk-proj-" + "Ab1" * 12


def test_secrets_are_redacted_dropped_or_kept(tmp_path):
    rows = [
        *talks(10),
        talk(f"use {KEY} now", "done"),
        talk("card 4111 1111 1111 1111", "mail bob@example.org"),
        calling("weather", json.dumps({"city": f"Oslo {KEY}"}), [WEATHER]),
    ]
    counts, folder = curated(chat(tmp_path, rows))
    text = (
        (folder / "train.jsonl").read_text() + (folder / "val.jsonl").read_text() + (folder / "test.jsonl").read_text()
    )
    assert counts["redacted"] == {"key": 2, "card": 1}
    assert KEY not in text
    assert text.count("[KEY]") == 2
    assert "card [CARD]" in text
    assert "bob@example.org" in text
    counts, folder = curated(chat(tmp_path, rows, private={"keys": "drop", "emails": "redact", "cards": "keep"}))
    assert reasons(folder) == {"private": [11, 13]}
    assert counts["redacted"] == {"email": 1}
    everything = "".join(p.read_text() for p in folder.iterdir())
    assert KEY not in everything
    assert "4111 1111" in everything
    counts, folder = curated(chat(tmp_path, rows, private={"patterns": {"TOWN": "^Osl?o"}, "keys": "keep"}))
    assert counts["redacted"] == {"card": 1, "TOWN": 1}


def test_a_bad_row_is_shown_without_its_secrets(tmp_path):
    rows = [*talks(10), {"messages": KEY}, talk(f"a {KEY}", f"I cannot help with {KEY}")]
    _, folder = curated(
        chat(tmp_path, rows, data={"on_bad_line": "skip"}, refusals="drop", refusal_patterns=["I cannot .*"])
    )
    assert "[KEY]" in rows_of(folder / "dropped.jsonl")[-1]["detail"]
    assert KEY not in (folder / "dropped.jsonl").read_text()


def test_a_redacted_request_is_told_by_what_it_says_now(tmp_path):
    pool = [{"text": f"number {n}"} for n in range(9)] + [
        {"text": f"log in with {KEY}"},
        {"text": f"log in with {KEY}x"},
    ]
    counts, _ = curated(classify(tmp_path, pool))
    assert counts["dropped"] == {"duplicate (pool)": 1}
    assert counts["redacted"] == {"key": 2}


# Rows compared with each other.


def edited(text, rng, times):
    """So many words of a text replaced."""
    words = text.split()
    for place in rng.sample(range(len(words)), times):
        words[place] = "otherwise"
    return " ".join(words)


def test_near_duplicates_are_found_and_the_first_stays(tmp_path):
    rng = random.Random(5)
    rows = talks(60, seed=5, words=60)
    near = [
        talk(edited(r["messages"][0]["content"], rng, 1), edited(r["messages"][1]["content"], rng, 1))
        for r in rows[:30]
    ]
    far = [
        talk(edited(r["messages"][0]["content"], rng, 9), edited(r["messages"][1]["content"], rng, 15))
        for r in rows[30:]
    ]
    apart = {"decontaminate": {"ngram": None}}
    counts, folder = curated(chat(tmp_path, rows + near + far, **apart))
    assert counts["dropped"] == {"near duplicate (train)": 30}
    assert reasons(folder)["near duplicate"] == list(range(61, 91))
    assert re.fullmatch(r"0\.\d\d like train.jsonl line 1", rows_of(folder / "dropped.jsonl")[0]["detail"])
    counts, _ = curated(chat(tmp_path, rows + near + far, near_duplicates=None, **apart))
    assert counts["dropped"] == {}


def test_other_questions_on_one_document_and_one_system_prompt_are_no_duplicates(tmp_path):
    rng = random.Random(6)
    document, system = sentence(rng, 400), sentence(rng, 400)
    rows = [talk(f"{document} {sentence(rng, 8)}", sentence(rng, 9)) for _ in range(20)]
    rows += talks(20, seed=8, words=4)
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": system})
    counts, _ = curated(chat(tmp_path, rows, decontaminate={"ngram": None}))
    assert counts["dropped"] == {}


def test_a_row_near_to_a_dropped_one_only_stays():
    pairs = np.array([[0, 1], [1, 2]])
    assert decide(pairs, np.array([0.9, 0.9]), 0.85, 0) == {1: (0, 0.9)}
    assert decide(pairs, np.array([0.9, 0.9]), 0.85, 2) == {2: (1, 0.9)}
    assert decide(pairs, np.array([0.9, 0.8]), 0.85, 0) == {1: (0, 0.9)}


def test_candidates_hold_nearly_all_pairs_at_the_threshold():
    """Of 400 pairs at similarity 0.85, 0.995 should share a band: fewer than 390 has a probability below 1e-4."""
    rng = np.random.default_rng(0)
    sets = []
    for _ in range(400):
        shared = rng.integers(1, 2**63, 85, dtype=np.uint64)
        sets += [np.concatenate([shared, rng.integers(1, 2**63, n, dtype=np.uint64)]) for n in (7, 8)]
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sets])]).astype(np.uint64)
    pairs = candidates(signatures(np.concatenate(sets), offsets), 0.85)
    found = {tuple(pair) for pair in pairs.tolist()}
    assert sum((2 * n, 2 * n + 1) in found for n in range(400)) >= 390
    assert len(found) < 450
    assert candidates(np.zeros((0, HASHES), np.uint16), 0.85).shape == (0, 2)


def flat(texts):
    vocabulary = Vocabulary()
    words = [[vocabulary[word] for word in text.split()] for text in texts]
    counts = np.array([len(part) for part in words])
    return np.array([word for part in words for word in part], np.uint32), np.cumsum(counts) - counts, counts


def test_shingles_and_runs_are_those_of_each_row():
    rng = random.Random(0)
    texts = [sentence(rng, n) for n in (7, 0, 2, 5, 12, 1)]
    words, starts, counts = flat(texts)
    hashes, offsets = shingles(words, starts, counts, 5)
    assert np.diff(offsets.astype(int)).tolist() == [3, 1, 1, 1, 8, 1]
    for n, text in enumerate(texts):
        alone, _ = shingles(*flat([text]), 5)
        assert hashes[int(offsets[n]) : int(offsets[n + 1])].tolist() == alone.tolist()
    values, rows = runs(words, starts, counts, 5)
    assert rows.tolist() == [0] * 3 + [3] + [4] * 8
    assert values.tolist() == [h for n in (0, 3, 4) for h in runs(*flat([texts[n]]), 5)[0].tolist()]
    # Order counts, and so does every word.
    one, other = (shingles(*flat([text]), 3)[0].tolist() for text in ("a b c", "b a c"))
    assert one != other


def test_shared_runs_are_found_where_they_are():
    rng = random.Random(1)
    cases = [" ".join(rng.choices([f"w{n}" for n in range(500)], k=30)) for _ in range(5)]
    middle = " ".join(cases[3].split()[8:21])
    texts = [sentence(rng, 40), f"so it is {middle} indeed", " ".join(middle.split()[1:]), ""]
    tests = TestRuns(*flat(cases), 13)
    matches = tests.shared(*flat(texts))
    assert matches[:, 0].tolist() == [1]
    assert tests.owners[matches[0, 1]] == 3
    counts = np.bincount(matches[:, 1], minlength=len(tests.hashes))
    assert list(telling(matches, counts, 1)) == [1]
    assert telling(matches, 2 * counts, 1) == {}


def long_case(seed=3):
    return talk(sentence(random.Random(seed), 30), sentence(random.Random(seed + 1), 30))


def test_rows_that_tell_a_case_of_the_test_file_are_dropped(tmp_path):
    case = long_case()
    asked, answered = (message["content"] for message in case["messages"])
    rows = talks(40, seed=11)
    rows[4] = talk(asked.upper() + "?", "something else")
    rows[5] = talk(asked + " harbour", answered)
    rows[6] = talk("what is " + " ".join(asked.split()[3:16]), "yes")
    rows[7] = talk("what is " + " ".join(asked.split()[3:15]), "no")
    counts, folder = curated(chat(tmp_path, rows, test=[case, *talks(3, seed=77)]))
    assert counts["dropped"] == {"leak (train)": 3}
    assert [d["detail"] for d in rows_of(folder / "dropped.jsonl")] == [
        "the same prompt as test.jsonl line 1",
        # 4 of 56 runs cross from the prompt to the answer, and a word between makes 5 others.
        f"{52 / (56 + 57 - 52):.2f} like test.jsonl line 1",
        "shares 13 words in a row with test.jsonl line 1",
    ]
    counts, _ = curated(chat(tmp_path, rows, test=[case], decontaminate={"ngram": None}))
    assert counts["dropped"] == {"leak (train)": 2}
    with pytest.raises(PreflightRefused, match=r"line 7 .*shares 13 words"):
        curated(
            chat(
                tmp_path,
                [*rows[:4], rows[8], rows[8], rows[6], *rows[9:]],
                test=[case],
                decontaminate={"action": "refuse"},
            )
        )


def test_a_turn_of_phrase_tells_nothing(tmp_path):
    phrase = sentence(random.Random(2), 14)
    rows = talks(60)
    for row in rows[:30]:
        row["messages"][1]["content"] += f" {phrase}"
    write(tmp_path / "val.jsonl", talks(2, seed=70))
    for common, told in ((29, {}), (30, {"leak (train)": 30})):
        recipe = chat(
            tmp_path,
            rows,
            test=[talk("a question of its own", phrase)],
            data={"val": "val.jsonl"},
            decontaminate={"common": common},
        )
        assert curated(recipe)[0]["dropped"] == told


def test_what_is_held_out_of_train_is_told_by_nothing_in_it(tmp_path):
    rng = random.Random(3)
    passage = [sentence(rng, 13) for _ in range(30)]
    rows = [talk(f"{sentence(rng, 20)} {passage[n // 2]}", sentence(rng, 20)) for n in range(60)]
    rows += [talk(rows[n]["messages"][0]["content"], sentence(rng, 30), group=f"other {n}") for n in range(60)]
    for n in range(60):
        rows[n]["group"] = f"one {n}"
    counts, folder = curated(chat(tmp_path, rows, test_size=10, val_size=2))
    held = [row["messages"][0]["content"] for row in rows_of(folder / "test.jsonl")]
    left = [row["messages"][0]["content"] for row in rows_of(folder / "train.jsonl")]
    tails = {" ".join(text.split()[-13:]) for text in held}
    assert not [text for text in left if " ".join(text.split()[-13:]) in tails]
    assert counts["dropped"]["leak (train)"] >= 10
    details = {drop["detail"].split(" train.jsonl")[0] for drop in rows_of(folder / "dropped.jsonl")}
    assert details == {"the same prompt as", "shares 13 words in a row with"}
    counts, folder = curated(chat(tmp_path, rows, test_size=10, val_size=2, decontaminate={"ngram": None}))
    held = {row["messages"][0]["content"] for row in rows_of(folder / "test.jsonl")}
    assert held.isdisjoint(row["messages"][0]["content"] for row in rows_of(folder / "train.jsonl"))
    assert counts["train"] + counts["val"] + counts["test"] + counts["dropped"]["leak (train)"] == len(rows)


def test_short_requests_leak_by_their_words_alone(tmp_path):
    pool = [{"text": f"number {n}"} for n in range(20)] + [{"text": "CASE number 1!"}, {"text": "👍"}, {"text": "👎"}]
    counts, folder = curated(classify(tmp_path, pool))
    assert counts["dropped"] == {"leak (pool)": 1}
    assert reasons(folder) == {"leak": [21]}


def test_words_of_the_vocabulary_are_forgotten_not_changed(monkeypatch):
    monkeypatch.setattr("attar.collect.shingles._REMEMBERED", 3)
    vocabulary = Vocabulary()
    first = [vocabulary[word] for word in WORDS]
    assert [vocabulary[word] for word in WORDS] == first
    assert len(vocabulary) <= 3


GENERATED = {"source": "prompts", "prompt_id": "p", "sample": 0, "model": "m", "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("meta", "reason", "detail"),
    [
        ({"finish_reason": "length"}, "truncated", "meta.finish_reason is 'length'"),
        ({"finish_reason": "content_filter"}, "content filter", "meta.finish_reason is 'content_filter'"),
        ({"stop_reason": "refusal"}, "content filter", "meta.stop_reason is 'refusal'"),
        ({"outcome": False}, "failed", "outcome is False"),
        ({"outcome": {"solved": False, "by": "user"}}, "failed", "outcome is {'solved': False, 'by': 'user'}"),
        ({"outcome": {"status": "Failed"}}, "failed", "outcome is {'status': 'Failed'}"),
        ({"outcome": "error"}, "failed", "outcome is error"),
        (GENERATED | {"reason": "judge", "detail": "score 1"}, "rejected", "meta.reason is 'judge'"),
        ({"outcome": {"escalated": False, "solved": True}}, None, None),
        ({"outcome": 0.0}, None, None),
        ({"outcome": {"reward": 0.0}}, None, None),
        ({"reason": "asked twice"}, None, None),
        (GENERATED, None, None),
        ("none", None, None),
    ],
)
def test_what_a_row_says_of_itself(tmp_path, meta, reason, detail):
    _, folder = curated(chat(tmp_path, [*talks(10), talk("a", "b", meta=meta)]))
    assert reasons(folder) == ({} if reason is None else {reason: [11]})
    assert [drop["detail"] for drop in rows_of(folder / "dropped.jsonl")] == ([] if reason is None else [detail])
    kept = {"truncated": "keep", "filtered": "keep", "outcome": {"failed": "keep"}}
    _, folder = curated(chat(tmp_path, [*talks(10), talk("a", "b", meta=meta)], **kept))
    assert reasons(folder) == ({"rejected": [11]} if reason == "rejected" else {})


def test_outcomes_that_are_numbers_are_good_from_the_one_that_the_recipe_names(tmp_path):
    rows = [talk(f"a {n}", f"b {n}", meta={"outcome": {"reward": n / 10}}) for n in range(10)]
    rows += [talk("c", "d", outcome=False), talk("e", "f", meta={"outcome": {"note": "none"}})]
    outcome = {"key": "outcome.reward", "at_least": 0.3}
    _, folder = curated(chat(tmp_path, [*talks(10), *rows], outcome=outcome))
    assert reasons(folder) == {"failed": [11, 12, 13]}
    assert rows_of(folder / "dropped.jsonl")[2]["detail"] == "outcome.reward is 0.2, curate.outcome.at_least is 0.3"
    with pytest.raises(DataError, match=r"line 11: outcome is \{'reward': 0.0\}, curate.outcome.at_least wants a num"):
        curated(chat(tmp_path, [*talks(10), *rows], outcome={"at_least": 0.3}))
    with pytest.raises(RecipeError, match=r"curate.outcome.at_least: failed is keep"):
        chat(tmp_path, rows, outcome={"failed": "keep", "at_least": 0.3})
