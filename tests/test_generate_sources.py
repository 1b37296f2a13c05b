"""Where generated prompts come from: documents, seeds, and what keeps them apart. All teachers here are scripted."""

import random
from collections import Counter

import pytest

from attar.collect.generate import generate, plan
from attar.collect.generate.passages import passages
from attar.collect.generate.similar import Unlike, rouge_l
from attar.engines.base import Failure
from attar.errors import DataError, Stopped
from teachers import Crowd, asked
from test_generate import Counting, keys_of, recipe_of, rows_of


def longest_common(one, other):
    """The textbook's dynamic program."""
    rows = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            rows[i + 1][j + 1] = rows[i][j] + 1 if a == b else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


def test_rouge_l_is_the_textbooks():
    assert rouge_l("police killed the gunman".split(), "police kill the gunman".split()) == 0.75  # Lin, section 3.1
    rng = random.Random(0)
    for _ in range(80):
        one, other = (rng.choices("abcde", k=rng.randint(0, 70)) for _ in range(2))
        if one or other:
            assert rouge_l(one, other) == pytest.approx(2 * longest_common(one, other) / (len(one) + len(other)))
    assert rouge_l([], []) == 1.0


def test_near_duplicates_are_found_as_by_comparing_all_pairs():
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(200)]
    unlike, kept = Unlike(0.7), []
    for text in texts:
        near = [other for other in kept if rouge_l(other.split(), text.split()) >= 0.7]
        said = unlike.add(text)
        assert (said is None) == (not near)
        if near:
            assert said in near
        else:
            kept.append(text)
    assert Unlike(0.7).add("?!") is None
    marks = Unlike(0.7)
    assert [marks.add(text) for text in ("?!", "word", "...")] == [None, None, "?!"]
    cased = Unlike(0.9)
    assert [cased.add(text) for text in ("Wake me at SEVEN!", "wake me, at seven")] == [None, "Wake me at SEVEN!"]


def test_passages_are_whole_paragraphs_where_they_fit_and_lose_no_word():
    text = "One two.\n\nThree four five.\n \n" + "A sentence of some words. " * 12 + "\n\n" + "x" * 250 + "\n\nend"
    pieces = list(passages(text, 100))
    assert pieces[0] == "One two.\n\nThree four five."
    assert all(0 < len(piece) <= 100 for piece in pieces)
    assert pieces[1].endswith(".")
    assert "".join("".join(pieces).split()) == "".join(text.split())
    words = list(passages("word " * 50, 101))
    assert {word for piece in words for word in piece.split()} == {"word"}
    assert list(passages(" \n\n ", 100)) == []


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "library"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.md").write_text("Oslo is the capital of Norway.\n\n" + "It rains there. " * 5)
    (folder / "deep" / "a.txt").write_text("Bergen has seven mountains around it.")
    (folder / "skipped.pdf").write_bytes(b"%PDF")
    return tmp_path


def about(request):
    """Asks about a passage, and answers from it."""
    text = asked(request)
    passage = text.split("Passage:\n")[1].split("\n\n")[0]
    if "Write one question" in text:
        return f"What is said of {passage.split()[0]}, {'at length' if request.sample else 'briefly'}?"
    return "NOT IN THE PASSAGE." if "Bergen" in text else f"From it: {passage}"


def documents_of(**part):
    return {"kind": "documents", "path": "library", "passage_characters": 100} | part


@pytest.mark.parametrize("grounded", [True, False])
def test_documents_give_questions_that_are_answered_from_their_passage(library, grounded):
    recipe = recipe_of(library, source=documents_of(passage_in_example=grounded), system="Be brief.")
    teacher = Counting(about)
    result = generate(recipe, teacher=teacher)
    assert result.rejected == {"not in the passage": 1}
    assert (result.kept, result.prompts_written) == (2, 3)
    for row in rows_of(library, "generated"):
        system, user, _ = row["messages"]
        assert system["content"] == "Be brief."
        assert ("Passage:" in user["content"]) is grounded
        assert "What is said of" in user["content"]
        assert row["group"] == "b.md" == row["meta"]["document"]
    answering = [asked(r) for r in teacher.asked if "Question:" in asked(r)]
    assert len(answering) == 3
    assert all("Answer the question from this passage alone" in text for text in answering)
    assert {r.max_tokens for r in teacher.asked} == {16, 200}
    again = Counting(about)
    generate(recipe, teacher=again)
    assert again.asked == []


def test_questions_that_say_the_same_are_dropped_and_more_are_asked_where_more_are_wanted(library):
    recipe = recipe_of(library, source=documents_of(questions=2, similarity=0.5))
    teacher = Counting(about)
    result = generate(recipe, teacher=teacher)
    assert result.prompts_dropped == {"near duplicate": 3}
    assert len({r.seed for r in teacher.asked}) == len(teacher.asked)
    more = Counting(about)
    assert generate(recipe_of(library, source=documents_of(questions=3, similarity=0.5)), teacher=more).kept == 2
    assert len(more.asked) == 3
    drops = [row for row in rows_of(library, "prompts") if "dropped" in row]
    assert len(drops) == len({row["key"] for row in drops}) == 6


def test_a_document_that_changed_is_asked_about_anew(library):
    generate(recipe_of(library, source=documents_of()), teacher=Counting(about))
    (library / "library" / "deep" / "a.txt").write_text("Tromso has an arctic cathedral.")
    teacher = Counting(about)
    assert generate(recipe_of(library, source=documents_of()), teacher=teacher).kept == 3
    assert len(teacher.asked) == 2


def test_documents_that_cannot_be_read_are_said(library):
    for content, said in ((b"\xff\xfe", "is not UTF-8"), (b" \n", "holds no text")):
        (library / "one.txt").write_bytes(content)
        with pytest.raises(DataError, match=said):
            generate(recipe_of(library, source=documents_of(path="one.txt")), teacher=Counting(about))
    for path in ("none", "library/skipped.pdf"):
        with pytest.raises(DataError, match="is no folder and no file that ends in"):
            generate(recipe_of(library, source=documents_of(path=path)), teacher=Counting(about))


SEEDS = {
    "kind": "seeds",
    "prompts": ["Write a haiku about rain.", "Explain recursion to a child.", "Plan a week of dinners."],
    "grow": 12,
    "per_round": 5,
    "personas": ["a nurse", "a sailor"],
    "difficulties": ["easy", "hard"],
    "instructions": "In one sentence.",
}


def test_seeds_grow_in_rounds_until_enough_are_unlike_each_other(tmp_path):
    crowd = Crowd()

    def reply(request):
        # Every third new prompt is a near duplicate of a seed.
        growing = "Write one more prompt" in asked(request)
        return "Write a haiku about the rain." if growing and request.sample % 3 == 2 else crowd.reply(request)

    teacher = Counting(reply)
    result = generate(recipe_of(tmp_path, source=SEEDS), teacher=teacher)
    rows = rows_of(tmp_path, "generated")
    assert result.kept == 3 + 12 == len(rows)
    assert result.prompts_written == 12
    grown = [row for row in rows if row["meta"]["grown"]]
    assert {row["meta"]["persona"] for row in grown} == {"a nurse", "a sailor"}
    assert {row["meta"]["difficulty"] for row in grown} == {"easy", "hard"}
    requests = [asked(r) for r in teacher.asked if "Write one more prompt" in asked(r)]
    assert len(requests) == 12 + result.prompts_dropped["near duplicate"]
    assert all("In one sentence." in text and "It is written by: a" in text for text in requests)
    assert not any("alpha" in text for text in requests[:5])
    assert any("alpha" in text for text in requests[5:])
    assert all(sum(seed in text for seed in SEEDS["prompts"]) == 3 for text in requests)


def test_growth_ends_where_nothing_new_comes(tmp_path):
    teacher = Counting(lambda request: "Write a haiku about rain!")
    result = generate(recipe_of(tmp_path, source=SEEDS), teacher=teacher)
    growing = [r for r in teacher.asked if "Write one more prompt" in asked(r)]
    assert len(growing) == 4 * 12
    assert (result.kept, result.prompts_dropped) == (3, {"near duplicate": 48})


def test_growth_that_was_cut_off_ends_with_the_same_prompts(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def reply(request):
        # What it writes depends on the request alone, as a model's would with a seed.
        growing = "Write one more prompt" in asked(request)
        return " ".join(f"{w}{request.sample}" for w in "abcd") if growing else "answer"

    def dies(request):
        if len(mortal.asked) > 9:
            raise Stopped("gone")
        return reply(request)

    generate(recipe_of(whole, source=SEEDS), teacher=Counting(reply))
    mortal = Counting(dies)
    with pytest.raises(Stopped):
        generate(recipe_of(cut, source=SEEDS), teacher=mortal)
    second = Counting(reply)
    generate(recipe_of(cut, source=SEEDS), teacher=second)
    assert len(second.asked) == 15 + 12 - 9
    assert Counter(keys_of(rows_of(cut, "generated"))) == Counter(keys_of(rows_of(whole, "generated")))


def test_prompts_that_were_not_written_are_counted_and_asked_again_where_it_may_help(library):
    said = iter(["", Failure("timeout", "late", final=False), Failure("content_filter", "no", final=True, usd=0.0)])
    teacher = Counting(lambda request: next(said, "x"))
    result = generate(recipe_of(library, source=documents_of()), teacher=teacher)
    assert (result.kept, result.unanswered) == (0, {"prompt: timeout": 1})
    assert result.prompts_dropped == {"empty": 1, "content_filter": 1}
    again = Counting(about)
    generate(recipe_of(library, source=documents_of()), teacher=again)
    assert len(again.asked) == 2


def test_a_plan_of_prompts_that_are_not_written_yet(library):
    planned = plan(recipe_of(library, source=documents_of(questions=2), samples=3))
    assert planned.prompts.calls == (6, 6)
    assert planned.prompts.completion_tokens == (6, 6 * 200)
    assert planned.answers.calls == (18, 18)
    planned = plan(recipe_of(library, source=SEEDS, target=4))
    assert planned.prompts.calls == (1, 48) or planned.prompts.calls == (5, 48)
    assert planned.answers.calls == (4, 15)
    assert planned.answers.prompt_tokens[1] > 12 * 200
    generate(recipe_of(library, source=SEEDS, target=4), teacher=Crowd())
    assert plan(recipe_of(library, source=SEEDS)).answers.calls == (11, 11)


def test_a_target_in_the_middle_of_growth_asks_for_no_more_rounds(tmp_path):
    teacher = Counting(Crowd().reply)
    assert generate(recipe_of(tmp_path, source=SEEDS, target=6), teacher=teacher).kept == 6
    assert sum("Write one more prompt" in asked(r) for r in teacher.asked) == 5
