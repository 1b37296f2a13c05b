"""The arms of an agent's task: each plays the same tasks and is asked for the same steps, once, and read from then on.

Every arm acts as it is served: through its own engine, with its own prompt.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from attar.agents.demonstrations import Demonstrated, choose_demonstrations
from attar.agents.environments import Task
from attar.agents.episodes import Asking
from attar.agents.load import load_environment, stage_of, tasks_of
from attar.agents.playing import play_all, read_episodes, tries_of
from attar.data.conversations import parse_conversation
from attar.data.episodes import Episode
from attar.data.types import Message
from attar.engines.base import Answer, ChatEngine, ChatRequest
from attar.engines.load import load_chat_teacher, scripted
from attar.errors import DataError, RunError
from attar.evaluate import evidence
from attar.evaluate.speed import Subject, measure
from attar.progress import track
from attar.recipe import AgentRecipe, parse_recipe
from attar.workspace import Run

__all__ = ["ARMS", "Acting", "Moment", "open_subject"]

ARMS = ("teacher", "base", "prompted", "control", "student")
_WARM_UP = 2


@dataclass(frozen=True)
class Moment:
    """A state that the teacher was in, and what it did there."""

    episode: int
    """number of its episode"""
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    reference: Message


def open_actor(recipe: AgentRecipe, folder: Path, arm: str, number: int, *, fresh: bool = False) -> ChatEngine:
    """An arm's engine.

    Args:
        recipe: the job.
        folder: of the run.
        arm: one of :data:`ARMS`.
        number: of the seed.
        fresh: pass a ledger by, for measurements of speed.
    """
    if arm == "teacher":
        return load_chat_teacher(recipe, fresh=fresh)
    from attar.engines.local_chat import load_local_chat

    stored = "base" if arm == "prompted" else arm
    seed = 0 if stored == "base" else recipe.train.seeds[number]
    engine: ChatEngine = load_local_chat(
        f"hf:{folder / 'export' / stored / f'seed-{seed}'}",
        device=recipe.run.device,
        name=arm,
        tokens_per_batch=recipe.teacher.tokens_per_batch,
        constrained=recipe.evaluate.constrained,
    )
    if arm == "prompted":
        shown = choose_demonstrations(_taught(recipe, folder), recipe.evaluate.demonstrations)
        engine = Demonstrated(engine, shown)
    return engine


def _taught(recipe: AgentRecipe, folder: Path) -> list[Episode]:
    """The teacher's episodes that were trained on."""
    return read_episodes(recipe.data.train or folder / "raw" / "episodes" / "train.jsonl")


class Acting:
    """What the arms did.

    Args:
        recipe: the job.
        run: its folder, with the stages before done.

    Raises:
        DataError: there is no task, and no episode, to compare the arms on.
    """

    def __init__(self, recipe: AgentRecipe, run: Run) -> None:
        self.recipe, self._run = recipe, run
        self._make = None if recipe.environment is None else load_environment(recipe)
        self.tasks: dict[str, Sequence[Task]] = {}
        """by split; none without an environment"""
        if self._make is not None:
            environment = self._make()
            self.tasks = {s: tasks_of(environment, s, recipe.evaluate.tasks) for s in recipe.evaluate.splits}
            for split, tasks in self.tasks.items():
                if not tasks:
                    raise DataError(
                        f"evaluate.splits: environment {environment.name} has no tasks of the split {split!r}"
                    )
        alike = run.stages["train"]["counts"]["control_equals_student"]
        absent = {"control"} if alike else set()
        absent |= {"prompted"} if not recipe.evaluate.demonstrations else set()
        self.arms = [arm for arm in ARMS if arm not in absent]

    def seeds(self, arm: str) -> list[int]:
        """Of an arm; those that are not trained have one."""
        return list(self.recipe.train.seeds) if arm in ("control", "student") else [0]

    def episodes(self, arm: str, split: str) -> list[list[Episode]]:
        """The episodes of each seed, in the order of tasks and trials."""
        return [self._played(arm, number, split) for number in range(len(self.seeds(arm)))]

    def _played(self, arm: str, number: int, split: str) -> list[Episode]:
        assert self._make is not None
        recipe = self.recipe
        temperature = recipe.collect.rollout.temperature if arm == "teacher" else recipe.evaluate.temperature
        policy = arm
        if arm == "teacher":
            policy = "scripted" if scripted(recipe) else recipe.teacher.model
        episodes = play_all(
            lambda: open_actor(recipe, self._run.folder, arm, number),
            stage_of(recipe, self._make),
            tries_of(self.tasks[split], recipe.evaluate.trials),
            self._run.path("evaluate", "episodes", f"{arm}-{split}-{number}.jsonl"),
            policy=policy,
            asking=Asking(temperature=temperature),
            progress=self._run.progress,
            name=f"{arm} plays {split}",
        )
        gc.collect()
        return episodes

    @cached_property
    def moments(self) -> list[Moment]:
        """Steps of the teacher's successful episodes: one of each, then a second, ...; by the seed."""
        if self._make is not None:
            episodes = self.episodes("teacher", self.recipe.evaluate.splits[0])[0]
        else:
            place = self._run.path("data", "test.jsonl")
            episodes = read_episodes(self.recipe.data.test) if self.recipe.data.test else []
            if not episodes:
                raise DataError(f"{place} holds no episodes to replay, and there is no environment")
        good = [episode for episode in episodes if episode.outcome.success and episode.steps]
        if not good:
            raise DataError(
                f"the teacher succeeded in none of {len(episodes)} test episodes, so there is no step to compare with; "
                "do not distil this teacher on this task"
            )
        rng = random.Random(self.recipe.run.seed)
        orders = [rng.sample(episode.steps, len(episode.steps)) for episode in good]
        rounds = range(max(map(len, orders)))
        drawn = [(n, order[k].message) for k in rounds for n, order in enumerate(orders) if k < len(order)]
        return [
            Moment(n, good[n].messages[:message], good[n].tools, good[n].messages[message])
            for n, message in sorted(drawn[: self.recipe.evaluate.replay])
        ]

    def _requests(self, temperature: float | None) -> list[ChatRequest]:
        assert self.recipe.environment is not None or not self._make
        limit = self.recipe.environment.answer_tokens if self.recipe.environment else 256
        return [ChatRequest(m.messages, limit, tools=m.tools, temperature=temperature, seed=0) for m in self.moments]

    def replayed(self, arm: str) -> list[list[Message | None]]:
        """What each seed of an arm does in each moment; None where it cannot be read."""
        return [self._replay(arm, number) for number in range(len(self.seeds(arm)))]

    def _replay(self, arm: str, number: int) -> list[Message | None]:
        def make() -> list[dict[str, Any] | None]:
            requests = self._requests(self.recipe.evaluate.temperature)
            said: list[dict[str, Any] | None] = [None] * len(requests)
            engine = open_actor(self.recipe, self._run.folder, arm, number)
            with track(self._run.progress, f"{arm} is asked for steps", len(requests)) as step:
                for place, outcome in engine.chat(requests):
                    if isinstance(outcome, Answer):
                        said[place] = outcome.message.wire
                    elif not outcome.final:
                        raise RunError(f"{arm} failed at a step: {outcome.reason}: {outcome.detail}; run again")
                    step.advance()
            return said

        stored = evidence.stored(self._run.path("evaluate", "replay", f"{arm}-{number}.json"), make)
        return [None if row is None else parse_conversation({"messages": [row]}).messages[0] for row in stored]

    def speed(self, arm: str) -> dict[str, Any]:
        """Of the first seed: one step at a time, each as the arm would be asked in its place."""

        def make() -> dict[str, Any]:
            self._run.progress.note(f"  measuring the speed of {arm}")
            arguments = {"recipe": self.recipe.dump(), "folder": str(self._run.folder), "arm": arm}
            requests = [
                {
                    "messages": [message.wire for message in request.messages],
                    "tools": list(request.tools),
                    "max_tokens": request.max_tokens,
                }
                for request in self._requests(None)
            ]
            opener = "attar.evaluate.acting:open_subject"
            return measure(self.recipe.evaluate, f"the {arm}", opener, arguments, requests, warm_up=_WARM_UP)

        result: dict[str, Any] = evidence.stored(self._run.path("evaluate", "speed", f"{arm}.json"), make)
        return result

    def size_mb(self, arm: str) -> float | None:
        """What serving needs on disk, in 10^6 bytes; None of a teacher that is no model here."""
        if arm == "teacher":
            return None
        stored = "base" if arm == "prompted" else arm
        folder = self._run.path("export", stored, f"seed-{self.seeds(arm)[0]}")
        return evidence.size_mb(folder) - sum(evidence.size_mb(path) for path in folder.glob("*.gguf"))


class _Subject:
    """An arm that is asked for steps."""

    def __init__(self, engine: ChatEngine, temperature: float) -> None:
        self._engine, self._temperature = engine, temperature
        self.parameters: int | None = getattr(engine, "parameters", None)

    def answer(self, requests: Sequence[dict[str, Any]]) -> list[float]:
        """Answer requests; times to the first token are not known."""
        asked = []
        for row in requests:
            conversation = parse_conversation(row, answered=False)
            asked.append(
                ChatRequest(
                    conversation.messages,
                    row["max_tokens"],
                    tools=conversation.tools,
                    temperature=self._temperature,
                    seed=0,
                )
            )
        for _ in self._engine.chat(asked):
            pass
        return []


def open_subject(arguments: dict[str, Any]) -> Subject:
    """What ``attar.evaluate.speed`` measures: ``recipe``, ``folder`` of the run, and ``arm``."""
    import torch

    recipe = parse_recipe(arguments["recipe"], "recipe")
    assert isinstance(recipe, AgentRecipe)
    torch.set_num_threads(recipe.run.threads or os.cpu_count() or 1)
    return _Subject(
        open_actor(recipe, Path(arguments["folder"]), arguments["arm"], 0, fresh=True), recipe.evaluate.temperature
    )
