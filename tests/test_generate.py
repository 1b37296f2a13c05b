"""`attar generate`: what is asked, kept, rejected and never asked again. All teachers here are scripted."""

import json
from collections import Counter
from itertools import islice

import pytest

from attar.collect.generate import generate, plan
from attar.data.conversations import parse_conversation
from attar.data.journal import Journal
from attar.data.types import Message, ToolCall
from attar.engines.base import Answer, Failure
from attar.engines.scripted import ScriptedChat
from attar.errors import DataError, RecipeError, RunError, Stopped, WorkspaceError
from attar.recipe import parse_recipe
from teachers import Sums, asked


def recipe_of(folder, teacher="teachers:Sums", **part):
    part = {"source": {"kind": "prompts", "file": "prompts.jsonl"}} | part
    content = {
        "name": "made",
        "task": "chat",
        "teacher": {"model": teacher, "max_tokens": 16},
        "data": {"train": "runs/made/raw/generated.jsonl"},
        "collect": {"generate": part},
    }
    return parse_recipe(content, "recipe", folder)


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    """Batches end by their size alone, however slow the machine."""
    monkeypatch.setattr("attar.collect.generate.run._WAIT_S", 1e9)


@pytest.fixture
def folder(tmp_path):
    rows = [{"prompt": f"{n}+{n}", "answer": 2 * n} for n in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def rows_of(folder, name):
    path = folder / "runs" / "made" / "raw" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keys_of(rows):
    return [(row["meta"]["prompt_id"], row["meta"]["sample"]) for row in rows]


class Counting(ScriptedChat):
    """Keeps what it was asked; engines of tests answer in order."""

    def __init__(self, answer):
        self.asked = []
        super().__init__(lambda request: self.asked.append(request) or answer(request))


EXACT = [{"kind": "exact", "pattern": r"is (\d+)"}]


def test_answers_are_kept_or_rejected_with_a_reason_and_rows_are_conversations(folder):
    result = generate(recipe_of(folder, samples=2, verify=EXACT, system="Add."), teacher=Counting(Sums().reply))
    kept, rejected = rows_of(folder, "generated"), rows_of(folder, "rejected")
    assert (
        (result.kept, result.rejected)
        == (20, {"verifier exact": 20})
        == (len(kept), Counter(row["meta"]["reason"] for row in rejected))
    )
    for row in kept:
        conversation = parse_conversation(row)
        assert conversation.id == row["id"]
        assert [m.role for m in conversation.messages] == ["system", "user", "assistant"]
        assert row["group"] == row["meta"]["prompt_id"]
        assert row["meta"]["sample"] == 0
        assert row["meta"]["source"] == "prompts"
        assert row["meta"]["model"] == "scripted"
        assert row["meta"]["usage"]["completion_tokens"] == 4
        assert row["meta"]["verdicts"] == [{"verifier": "exact", "ok": True, "reason": ""}]
    assert {row["meta"]["detail"] for row in rejected} == {"another answer"}
    assert result.teacher.calls == 40
    assert result.teacher.usd == 0.0


def test_what_is_stored_is_not_asked_again_and_more_samples_and_prompts_go_on(folder):
    first = Counting(Sums().reply)
    generate(recipe_of(folder), teacher=first)
    before = rows_of(folder, "generated")
    with (folder / "prompts.jsonl").open("a") as handle:
        handle.write('{"prompt": "70+2"}\n')
    second = Counting(Sums().reply)
    result = generate(recipe_of(folder, samples=2), teacher=second)
    assert len(second.asked) == 20 + 2
    assert {r.sample for r in second.asked if asked(r) != "70+2"} == {1}
    after = rows_of(folder, "generated")
    assert after[:20] == before
    assert result.kept == 42 == len({*keys_of(after)})


def test_stops_at_the_target_without_asking_for_much_more(folder):
    teacher = Counting(Sums().reply)
    result = generate(recipe_of(folder, target=7, samples=2, verify=EXACT), teacher=teacher)
    assert result.kept == 7 == len(rows_of(folder, "generated"))
    assert len(teacher.asked) <= 16


class Eager(Counting):
    """Draws five requests before it answers the first, as servers' engines do."""

    def chat(self, requests):
        requests = iter(requests)
        number = 0
        while drawn := list(islice(requests, 5)):
            for request in drawn:
                [(_, outcome)] = super().chat([request])
                yield number, outcome
                number += 1


def test_what_passes_beyond_the_target_is_set_aside_and_taken_in_by_a_higher_one(folder, monkeypatch):
    # A wave that is expected to fail half of the time and does not gives more than is wanted.
    monkeypatch.setattr("attar.collect.generate.run._Generation._wanted", lambda self, outstanding: True)
    first = generate(recipe_of(folder, target=7), teacher=Eager(Sums().reply))
    assert (first.kept, first.rejected) == (7, {"beyond target": 13})
    second = Eager(Sums().reply)
    result = generate(recipe_of(folder, target=12), teacher=second)
    assert second.asked == []
    assert (result.kept, result.rejected) == (12, {"beyond target": 8})
    kept = rows_of(folder, "generated")
    assert len(set(keys_of(kept))) == 12
    assert "reason" not in kept[-1]["meta"]
    third = generate(recipe_of(folder, target=30), teacher=second)
    assert (third.kept, third.rejected) == (20, {})
    assert len(set(keys_of(rows_of(folder, "generated")))) == 20


def test_an_engine_that_forgets_requests_is_found_out(folder):
    class Forgetful(Counting):
        def chat(self, requests):
            return (pair for pair in super().chat(requests) if pair[0] != 3)

    with pytest.raises(RunError, match=r"Forgetful.chat drew 1 requests that it neither answered nor failed"):
        generate(recipe_of(folder), teacher=Forgetful(Sums().reply))
    assert len(rows_of(folder, "generated")) == 19


def test_a_prompt_that_stands_twice_is_asked_once_and_an_answer_that_comes_twice_is_kept_once(tmp_path):
    rows = [{"prompt": "1+1"}, {"prompt": "1+1", "answer": 2}, {"messages": [{"role": "user", "content": "1+1"}]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = generate(recipe_of(tmp_path, samples=4), teacher=Counting(Sums().reply))
    assert result.skipped == {"duplicate": 2}
    assert (result.kept, result.rejected) == (2, {"duplicate": 2})
    judge = Counting(lambda request: "Score: 5")
    recipe = recipe_of(tmp_path, samples=4, judge=JUDGE)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"folder": tmp_path / "judged"})})
    assert generate(recipe, teacher=Counting(Sums().reply), judge=judge).kept == 2
    assert len(judge.asked) == 2


def made(text="fine", reason="stop", **message):
    return Answer(Message("assistant", text, **message), reason, 1, 1, 0, "scripted", 0.0)


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (made("The sum", "length"), "truncated"),
        (made("", "content_filter"), "content filter"),
        (made(" "), "empty"),
        (made("", "tool_calls", tool_calls=(ToolCall(None, "shout", {}),)), "unknown tool"),
        (made('<tool_call>{"name": "look"'), "bad tool call"),
        (made("I'm sorry, but I can't help with that."), "refusal"),
        (Failure("bad tool call", "no JSON", final=True, usd=0.0), "bad tool call"),
        (Failure("content_filter", "blocked", final=True, usd=0.0), "content_filter"),
    ],
)
def test_answers_that_are_none_are_rejected_with_a_reason_and_not_asked_again(tmp_path, answer, reason):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "hello", "tools": [TOOL]}) + "\n")
    teacher = Counting(lambda request: answer)
    assert generate(recipe_of(tmp_path), teacher=teacher).rejected == {reason: 1}
    result = generate(recipe_of(tmp_path), teacher=teacher)
    assert (result.kept, result.rejected, len(teacher.asked)) == (0, {reason: 1}, 1)
    assert teacher.asked[0].tools == (TOOL,)
    [row] = rows_of(tmp_path, "rejected")
    assert row["meta"]["reason"] == reason
    assert row["meta"]["detail"]


def test_refusals_are_kept_where_the_recipe_says_so_and_calls_of_tools_on_offer_are_kept(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "hello", "tools": [TOOL]}) + "\n")
    called = made("", "tool_calls", tool_calls=(ToolCall("a", "look", {"at": 1}),))
    said = [made("I cannot help with that."), called]
    result = generate(
        recipe_of(tmp_path, samples=2, refusals="keep"), teacher=Counting(lambda request: said[request.sample])
    )
    assert result.kept == 2
    assert parse_conversation(rows_of(tmp_path, "generated")[1]).messages[-1].tool_calls[0].arguments == {"at": 1}


def test_failures_that_may_do_better_are_counted_and_asked_again(folder):
    def flaky(request):
        return Failure("timeout", "late", final=False) if asked(request) == "3+3" else Sums().reply(request)

    first = generate(recipe_of(folder), teacher=Counting(flaky))
    assert (first.kept, first.unanswered, first.complete) == (19, {"timeout": 1}, False)
    second = Counting(Sums().reply)
    result = generate(recipe_of(folder), teacher=second)
    assert [asked(r) for r in second.asked] == ["3+3"]
    assert (result.kept, result.complete) == (20, True)


def test_a_teacher_that_is_gone_stops_the_run_which_goes_on(folder):
    def dies(request):
        return Sums().reply(request) if int(asked(request).split("+")[0]) < 5 else Failure("connection", "gone", False)

    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+1"}) + "\n" for n in range(100)))
    teacher = Counting(dies)
    with pytest.raises(Stopped, match=r"32 requests failed one after another.*connection: gone"):
        generate(recipe_of(folder), teacher=teacher)
    assert len(teacher.asked) == 5 + 32
    assert len(rows_of(folder, "generated")) == 5
    assert generate(recipe_of(folder), teacher=Counting(Sums().reply)).kept == 100


def test_what_was_answered_before_the_budget_ended_is_kept(folder):
    def spent(request):
        if asked(request) == "6+6":
            raise Stopped("budget.usd is used up")
        return Sums().reply(request)

    with pytest.raises(Stopped, match="used up"):
        generate(recipe_of(folder), teacher=Counting(spent))
    assert len(rows_of(folder, "generated")) == 6
    second = Counting(Sums().reply)
    assert generate(recipe_of(folder), teacher=second).kept == 20
    assert len(second.asked) == 14


def test_answers_of_another_recipe_are_not_mixed_in(folder):
    generate(recipe_of(folder), teacher=Sums())
    with pytest.raises(WorkspaceError, match=r"collect.generate.temperature.*None, now 0.5"):
        generate(recipe_of(folder, temperature=0.5), teacher=Sums())
    assert generate(recipe_of(folder, target=30), teacher=Counting(Sums().reply)).kept == 20


def test_a_line_that_a_kill_cut_short_is_asked_again(folder):
    generate(recipe_of(folder), teacher=Sums())
    path = folder / "runs" / "made" / "raw" / "generated.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: -len(whole.splitlines()[-1]) // 2])
    teacher = Counting(Sums().reply)
    assert generate(recipe_of(folder), teacher=teacher).kept == 20
    assert len(teacher.asked) == 1
    assert path.read_bytes().count(b"\n") == 20
    path.write_bytes(b'{"half\n' + whole)
    with pytest.raises(WorkspaceError, match=r"generated.jsonl line 1 is damaged"):
        generate(recipe_of(folder), teacher=teacher)


def test_a_journal_finds_its_last_whole_line_however_long_the_torn_one_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    Journal(path).append([{"n": 1}])
    with path.open("ab") as handle:
        handle.write(b"x" * 200_000)
    assert list(Journal(path, mend=False).rows()) == [{"n": 1}]
    journal = Journal(path)
    journal.append([{"n": 2}])
    assert [row["n"] for row in journal.rows()] == [1, 2]
    path.write_bytes(b"x" * 10)
    assert list(Journal(path).rows()) == []
    assert path.read_bytes() == b""


def test_verifiers_of_the_user_see_the_row_and_must_say_yes_or_no(tmp_path):
    rows = [{"prompt": "say no", "words": 5}, {"prompt": "say yes", "words": 1}, {"prompt": "say yes yes", "words": 1}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verify = [{"kind": "function", "name": "teachers:short"}, {"kind": "function", "name": "teachers:truth"}]
    teacher = ScriptedChat(lambda request: asked(request).removeprefix("say "))
    result = generate(recipe_of(tmp_path, verify=verify), teacher=teacher)
    assert (result.kept, result.rejected) == (1, {"verifier teachers:truth": 1, "verifier teachers:short": 1})
    assert rows_of(tmp_path, "rejected")[1]["meta"]["detail"] == "2 words"
    other = recipe_of(tmp_path, verify=[{"kind": "function", "name": "teachers:broken"}]).model_copy(
        update={"name": "other"}
    )
    other = other.model_copy(update={"run": other.run.model_copy(update={"folder": tmp_path / "other"})})
    with pytest.raises(RunError, match="teachers:broken returned 'fine'"):
        generate(other, teacher=teacher)
    with pytest.raises(RecipeError, match="teachers:none is no function"):
        generate(recipe_of(tmp_path / "x", verify=[{"kind": "function", "name": "teachers:none"}]), teacher=teacher)


JUDGE = {"engine": {"model": "teachers:Crowd", "max_tokens": 50}, "rubric": "5: right. 1: wrong."}


def judge_of(scores):
    """Judges by the sum that is shown; writes down what it saw."""

    def reply(request):
        shown = asked(request)
        return next((said for text, said in scores.items() if f"is {text}" in shown), "Good.\nScore: 5")

    return Counting(reply)


def test_a_judge_scores_blindly_and_what_it_cannot_say_is_counted(folder):
    scores = {
        "0": "Bad.\nScore: 2",
        "2": "I give it a 5.",
        "4": "Score: 5\nOn second thoughts:\nScore: 5",
        "6": "Score: 9",
        "8": made("thinking\nScore: 5", "length"),
        "10": Failure("content_filter", "no", final=True, usd=0.0),
        "12": Failure("timeout", "late", final=False),
        "14": "Fine.\nScore: 4",
    }
    judge = judge_of({f'{text}"': said for text, said in scores.items()})
    recipe = recipe_of(folder, judge=JUDGE)
    result = generate(recipe, teacher=Sums(), judge=judge)
    assert result.rejected == {"judge": 1, "judge unreadable": 4, "judge failed": 1}
    assert (result.kept, result.unanswered) == (13, {"judge: timeout": 1})
    assert result.judge.calls == 19
    assert result.teacher.calls == 19
    assert not result.judge_is_teacher
    for request in judge.asked:
        assert "scripted" not in asked(request)
        assert "teachers" not in asked(request)
        assert "5: right. 1: wrong." in asked(request)
        assert (request.max_tokens, request.temperature) == (50, 0.0)
    [row] = [r for r in rows_of(folder, "generated") if r["messages"][-1]["content"].endswith(" 14")]
    assert row["meta"]["judge"]["score"] == 4
    assert row["meta"]["judge"]["said"].startswith("Fine.")
    again = judge_of({})
    assert generate(recipe, teacher=Sums(), judge=again).kept == 14
    assert len(again.asked) == 1


def test_a_judge_that_runs_out_keeps_what_it_judged(folder):
    def reply(request):
        if len(judge.asked) == 5:
            raise Stopped("budget.usd is used up")
        return "Score: 5"

    judge = Counting(reply)
    with pytest.raises(Stopped, match="used up"):
        generate(recipe_of(folder, judge=JUDGE), teacher=Sums(), judge=judge)
    assert len(rows_of(folder, "generated")) == 4
    judge = Counting(lambda request: "Score: 5")
    assert generate(recipe_of(folder, judge=JUDGE), teacher=Sums(), judge=judge).kept == 20
    assert len(judge.asked) == 16


def test_a_judge_that_is_the_teacher_is_said_to_be(folder):
    class Notes:
        said = ()

        def note(self, message):
            self.said = (*self.said, message)

    notes = Notes()
    judge = JUDGE | {"engine": {"model": "teachers:Sums", "max_tokens": 9}}
    result = generate(recipe_of(folder, judge=judge), teacher=Sums(), judge=judge_of({}), progress=notes)
    assert result.judge_is_teacher
    assert any("the judge is the teacher itself" in said for said in notes.said)
    assert plan(recipe_of(folder, judge=judge)).judge_is_teacher


def test_requests_carry_what_the_recipe_says_and_a_seed_of_their_own(folder):
    teacher = Counting(Sums().reply)
    generate(recipe_of(folder, samples=2, temperature=0.7, top_p=0.9), teacher=teacher)
    assert {(r.max_tokens, r.temperature, r.top_p) for r in teacher.asked} == {(16, 0.7, 0.9)}
    assert len({r.seed for r in teacher.asked}) == 40
    again = Counting(Sums().reply)
    generate(
        recipe_of(folder, samples=2, temperature=0.7, top_p=0.9, target=1).model_copy(
            update={"name": "again", "run": recipe_of(folder).run.model_copy(update={"folder": folder / "again"})}
        ),
        teacher=again,
    )
    assert again.asked == teacher.asked[:1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "hi"}', "either 'prompt' or 'messages' is wanted, the row has neither"),
        ('{"prompt": "a", "messages": []}', "the row has both"),
        ('{"prompt": " "}', "a text is wanted"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the last message is an answer"),
        ('{"system": "x", "messages": [{"role": "system", "content": "a"}]}', "keep one"),
        ("nonsense", "no JSON"),
    ],
)
def test_bad_prompts_stop_the_run_or_are_counted(tmp_path, line, said):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1"}\n' + line + "\n")
    with pytest.raises(DataError, match=f"prompts.jsonl line 2: .*{said}"):
        generate(recipe_of(tmp_path), teacher=Sums())
    source = {"kind": "prompts", "file": "prompts.jsonl", "on_bad_line": "skip"}
    result = generate(recipe_of(tmp_path, source=source), teacher=Sums())
    assert result.kept == 1
    assert sum(result.skipped.values()) == 1


def test_a_message_of_10_mb_is_asked_and_stored_whole(tmp_path):
    text = "x" * 10_000_000
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    assert generate(recipe_of(tmp_path), teacher=ScriptedChat(lambda request: "long")).kept == 1
    assert rows_of(tmp_path, "generated")[0]["messages"][0]["content"] == text


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"samples": 2, "temperature": 0}, "2 answers at temperature 0 are the same"),
        ({"verify": [{"kind": "exact", "pattern": "is .*"}]}, "has no group"),
        ({"verify": [{"kind": "regex", "pattern": "("}]}, "no regular expression"),
        ({"judge": {"engine": {"model": "a:B"}, "rubric": "r"}}, "engine.max_tokens: required"),
        ({"judge": JUDGE | {"keep_from": 6}}, "above the highest score"),
        (
            {"judge": {"engine": {"model": "openai:x", "batch": True, "max_tokens": 9}, "rubric": "r"}},
            "a few at a time",
        ),
        ({"tempersture": 1}, "unknown key .nearest: temperature"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path, part, said):
    with pytest.raises(RecipeError, match=said):
        recipe_of(tmp_path, **part)


def test_the_limit_of_answers_and_the_part_itself_are_required(tmp_path):
    content = {"name": "a", "task": "chat", "teacher": {"model": "a:B"}, "data": {"train": "x"}}
    with pytest.raises(RecipeError, match=r"collect.generate: required"):
        generate(parse_recipe(content, "recipe", tmp_path))
    content["collect"] = {"generate": {"source": {"kind": "prompts", "file": "x"}}}
    with pytest.raises(RecipeError, match=r"teacher.max_tokens: collect.generate needs it"):
        parse_recipe(content, "recipe", tmp_path)
    with pytest.raises(DataError, match="is no file"):
        generate(recipe_of(tmp_path), teacher=Sums())


def test_a_row_without_the_reference_answer_is_rejected(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1"}\n')
    assert generate(recipe_of(tmp_path, verify=EXACT), teacher=Sums()).rejected == {"verifier exact": 1}
    assert rows_of(tmp_path, "rejected")[0]["meta"]["detail"] == "no answer in the row"


def test_a_plan_says_what_would_be_asked_and_writes_nothing(folder):
    planned = plan(recipe_of(folder, samples=2, target=10))
    assert not (folder / "runs").exists()
    assert planned.answers.calls == (10, 40)
    assert planned.answers.completion_tokens == (10, 40 * 16)
    assert planned.prompts.calls == (0, 0)
    assert planned.judge is None
    assert planned.usd == (0.0, 0.0)
    assert plan(recipe_of(folder, samples=2)).answers.calls == (40, 40)
    assert plan(recipe_of(folder, judge=JUDGE)).judge.calls == (0, 20)
    assert plan(recipe_of(folder, judge=JUDGE, target=3)).judge.calls == (3, 20)
    generate(recipe_of(folder, target=4), teacher=Sums())
    after = plan(recipe_of(folder, target=10))
    assert (after.kept, after.answers.calls) == (4, (6, 16))
    assert plan(recipe_of(folder, target=4)).answers.calls == (0, 0)
