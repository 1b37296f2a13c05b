"""Training that feeds on its own student: it acts, the teacher says what it would have done, the student learns that.

A round reads what rounds before it left, and nothing else: ``rounds/<n>/`` holds the student's episodes, what the
teacher said of them, what is learned of that, and, but for the last round, the student that came of it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from attar.agents.environments import Task
from attar.agents.episodes import Asking
from attar.agents.load import load_environment, stage_of, tasks_of
from attar.agents.playing import play_all, tries_of
from attar.agents.relabel import Label, ask_labels, new_states, relabelled, states_of
from attar.data.conversations import parse_conversation, read_conversations, write_conversations
from attar.data.episodes import Episode
from attar.data.journal import Journal
from attar.engines.load import load_chat_teacher
from attar.engines.local_chat import LocalChat, load_local_chat
from attar.errors import RunError
from attar.progress import track
from attar.recipe import AgentRecipe
from attar.recipe.agent import Relabel
from attar.train.chat import counts_of, make_base, train_all
from attar.train.chat import train as train_once
from attar.train.course import Course
from attar.workspace import Run, write_json

__all__ = ["train"]


def train(recipe: AgentRecipe, run: Run) -> dict[str, Any]:
    """Train the arms; the student in rounds where the recipe has it relabelled.

    The control then learns for as many tokens as the student in all its rounds, from the teacher's episodes alone.

    Raises:
        Stopped: as the teacher's engine does; the same call goes on from there.
    """
    relabel = recipe.distill.relabel
    if relabel is None:
        return train_once(recipe, run)
    make_base(recipe, run)
    seeds = recipe.train.seeds
    courses = [Course("student", seed, ("rounds", "0", "models", f"seed-{seed}")) for seed in seeds]
    train_all(recipe, run, courses)
    tokens = courses[0].tokens(recipe, run)
    told = []
    for number in range(1, relabel.rounds + 1):
        told.append(_round(recipe, run, relabel, number))
        top = ("models", "student") if number == relabel.rounds else ("rounds", str(number), "models")
        courses = [
            Course(
                "student",
                seed,
                (*top, f"seed-{seed}"),
                start=("rounds", str(number - 1), "models", f"seed-{seed}"),
                more=tuple(("rounds", str(past), "relabelled.jsonl") for past in range(1, number + 1)),
                epochs=relabel.epochs,
            )
            for seed in seeds
        ]
        train_all(recipe, run, courses)
        tokens += courses[0].tokens(recipe, run)
    once = Course("control", seeds[0], (), epochs=1.0).tokens(recipe, run)
    train_all(
        recipe,
        run,
        [Course("control", seed, ("models", "control", f"seed-{seed}"), epochs=tokens / once) for seed in seeds],
    )
    return counts_of(recipe, run) | {"control_equals_student": False, "rounds": told, "tokens": round(tokens)}


def _round(recipe: AgentRecipe, run: Run, relabel: Relabel, number: int) -> dict[str, Any]:
    """Have the first seed's student act and the teacher relabel it; what is learned goes to ``relabelled.jsonl``."""
    folder = run.path("rounds", str(number))
    make = load_environment(recipe)
    tasks = _tasks(tasks_of(make(), "train"), recipe.collect.rollout.tasks, relabel.tasks, number)
    student = run.path("rounds", str(number - 1), "models", f"seed-{recipe.train.seeds[0]}")

    def engine() -> LocalChat:
        return load_local_chat(
            f"hf:{student}",
            device=recipe.run.device,
            name="student",
            tokens_per_batch=recipe.teacher.tokens_per_batch,
            constrained=recipe.evaluate.constrained,
        )

    episodes = play_all(
        engine,
        stage_of(recipe, make),
        tries_of(tasks, 1),
        folder / "episodes.jsonl",
        policy="student",
        asking=Asking(temperature=relabel.temperature),
        progress=run.progress,
        name=f"round {number}: the student plays",
    )
    labels = _labels(recipe, run, episodes, folder / "labels.jsonl", number)
    found = [relabelled(e, labels[n], relabel.corrections) for n, e in enumerate(episodes)]
    write_conversations(folder / "relabelled.jsonl", [c for result in found for c in result.conversations])
    new, states = new_states(episodes, _known(run, number))
    told = {
        "episodes": len(episodes),
        "successes": sum(episode.outcome.success for episode in episodes),
        "states": states,
        "new_states": new,
        "agreed": sum(result.agreed for result in found),
        "corrected": sum(result.corrected for result in found),
        "beyond": sum(result.beyond for result in found),
        "unusable": sum(result.unusable for result in found),
    }
    run.progress.note(f"  round {number}: " + ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in told.items()))
    write_json(folder / "about.json", told)
    return told


def _tasks(tasks: Any, played: int | None, wanted: int, number: int) -> list[Task]:
    """Tasks for a round: first those that the teacher did not play, then from the beginning again."""
    start = (played or 0) + (number - 1) * wanted
    return [tasks[(start + k) % len(tasks)] for k in range(min(wanted, len(tasks)))]


def _labels(recipe: AgentRecipe, run: Run, episodes: list[Episode], path: Path, number: int) -> list[list[Label]]:
    """The teacher's word on every step; those that are in the file are not asked again.

    Raises:
        RunError: some requests failed that may do better.
    """
    journal = Journal(path)
    labels: dict[tuple[int, int], Label] = {}
    for row in journal.rows():
        message = row["message"] and parse_conversation({"messages": [row["message"]]}).messages[0]
        labels[row["episode"], row["step"]] = Label(row["step"], message, row["reason"])
    missing = [n for n, e in enumerate(episodes) if any((n, step) not in labels for step in range(len(e.steps)))]
    steps = sum(len(episode.steps) for episode in episodes)
    settings = recipe.environment
    assert settings is not None
    with track(run.progress, f"round {number}: the teacher relabels", steps) as step:
        step.advance(len(labels))
        asked = ask_labels(
            load_chat_teacher(recipe),
            [episodes[n] for n in missing],
            max_tokens=settings.answer_tokens,
            temperature=recipe.collect.rollout.temperature,
        )
        for place, label in asked if missing else ():
            key = (missing[place], label.step)
            if key in labels:
                continue
            labels[key] = label
            message = None if label.message is None else label.message.wire
            journal.append([{"episode": key[0], "step": label.step, "message": message, "reason": label.reason}])
            step.advance()
    if len(labels) < steps:
        raise RunError(
            f"round {number}: the teacher failed at {steps - len(labels)} of {steps} steps; what it said is kept, and "
            "the same command asks for the others again"
        )
    return [[labels[n, step] for step in range(len(episode.steps))] for n, episode in enumerate(episodes)]


def _known(run: Run, number: int) -> set[str]:
    """States that were trained on before the round."""
    files = [run.path("data", "train.jsonl")]
    files += [run.path("rounds", str(past), "relabelled.jsonl") for past in range(1, number)]
    known: Counter[str] = Counter()
    for file in files:
        for conversation in read_conversations(file, key=file.stem, on_bad_line="stop")[0]:
            known.update(states_of(conversation))
    return set(known)
