"""Ask the teacher, check what it answers, keep what passes: a stream that can be cut off and goes on."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from attar.collect.generate.checks import problem
from attar.collect.generate.judge import grades
from attar.collect.generate.results import Result, judged, row_meta, usage
from attar.collect.generate.settings import answering, fingerprint, same_model, seeded, settings
from attar.collect.generate.sources import SOURCES, Question
from attar.collect.generate.store import Spend, Store
from attar.collect.generate.tasks import Task
from attar.collect.verify import load_verifiers
from attar.data.types import Conversation
from attar.engines.base import Answer, ChatEngine, ChatRequest, Failure
from attar.engines.load import load_chat_teacher
from attar.engines.spread import spread_chat
from attar.errors import RunError, Stopped
from attar.progress import Progress, Silent
from attar.recipe import Recipe
from attar.workspace import open_run

__all__ = ["Generated", "generate"]

# Answers that are checked and written together, and the longest that one waits for the others.
_BATCH, _WAIT_S = 32, 2.0
_NOTE_S = 10.0
# Requests that fail one after another before the teacher is held to be gone.
_HOPELESS = 32
# Below this share of kept answers, so many more are asked for at once.
_LOWEST_RATE = 0.05


@dataclass(frozen=True)
class Generated:
    """What a run folder holds, over all starts."""

    folder: str
    kept: int
    target: int | None
    rejected: dict[str, int]
    prompts_written: int
    """by the teacher"""
    prompts_dropped: dict[str, int]
    skipped: dict[str, int]
    """rows of the file of prompts, and seeds, by reason; of this start, as far as it read"""
    unanswered: dict[str, int]
    """requests of this start that failed and are asked again by the next one, by reason"""
    teacher: Spend
    judge: Spend | None
    judge_is_teacher: bool

    @property
    def complete(self) -> bool:
        """Whether another start would find nothing to ask."""
        return not self.unanswered or (self.target is not None and self.kept >= self.target)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"complete": self.complete}


def generate(
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    teacher: ChatEngine | None = None,
    judge: ChatEngine | None = None,
) -> Generated:
    """Fill ``raw/generated.jsonl`` and ``raw/rejected.jsonl`` in the recipe's run folder.

    Args:
        recipe: with ``collect.generate``.
        progress: where to report; None is silent.
        teacher: in the place of the recipe's own, for tests.
        judge: likewise.

    Returns:
        What the folder holds; not ``complete`` where requests failed that may do better next time.

    Raises:
        RecipeError: the recipe has no ``collect.generate``.
        DataError: the source cannot be read.
        WorkspaceError: the folder holds answers that another recipe asked for.
        Stopped: budget or quota is used up, or an engine is gone; the same call goes on from there.
    """
    part = settings(recipe)
    with open_run(recipe.folder, recipe.name, progress or Silent()) as run:
        store = Store(run.path("raw"), fingerprint(recipe))
        store.take_in(part.target)
        with ExitStack() as stack:
            return _Generation(recipe, store, run.progress, stack, teacher, judge).run()


class _Generation:
    """One start."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        progress: Progress,
        stack: ExitStack,
        teacher: ChatEngine | None,
        judge: ChatEngine | None,
    ) -> None:
        self.part = settings(recipe)
        self.recipe, self.store, self.progress = recipe, store, progress
        self.kind = self.part.source.kind
        self.verifiers = load_verifiers(self.part.verify)
        self._stack, self._teacher, self._judge = stack, teacher, judge
        self.skipped: Counter[str] = Counter()
        self.unanswered: Counter[str] = Counter()
        self._failed_in_a_row = 0
        self._exhausted = False
        self._pending: list[Result] = []
        self._flushed = self._noted = time.monotonic()
        self._before = self._finished = 0

    def run(self) -> Generated:
        """Ask until enough is kept or nothing is left to ask."""
        if same_model(self.recipe):
            self.progress.note("generate: the judge is the teacher itself, and models favour what they wrote")
        self._before = self.store.accepted
        source = SOURCES[self.kind](self.part.source, self.part.system, self, self.skipped, self.recipe.run.seed)
        pairs = ((task, sample) for task in source for sample in range(self.part.samples))
        try:
            while not self._reached and not self._exhausted:
                self._ask(pairs)
        finally:
            self._note(final=True)
        return self._result()

    def write(self, questions: Sequence[Question]) -> list[str | None]:
        """Have the teacher write prompts; see :class:`attar.collect.generate.sources.Writer`."""
        open_ = [question for question in questions if not self.store.prompt(question.key)[0]]
        requests = (self._with_seed(q.request, f"{self.kind}/{q.key}") for q in open_)
        with _closing(self._engine.chat(requests)) as outcomes:
            for number, outcome in outcomes:
                self._note_prompt(open_[number], outcome)
        return [self.store.prompt(question.key)[1] for question in questions]

    def drop(self, question: Question, reason: str) -> None:
        """Count a text that is no new prompt."""
        self.store.drop_prompt(question.key, reason)

    def _note_prompt(self, question: Question, outcome: Answer | Failure) -> None:
        row: dict[str, Any] = {"key": question.key}
        if isinstance(outcome, Failure):
            if not outcome.final:
                self._failed(outcome, f"prompt: {outcome.reason}")
                return
            row |= {"reason": outcome.reason, "detail": outcome.detail, "usage": usage(outcome)}
        else:
            text = outcome.message.content.strip()
            reason = {"length": "truncated", "content_filter": "content filter"}.get(outcome.finish_reason)
            reason = reason or ("empty" if not text else None)
            row |= {"text": text} if reason is None else {"reason": reason, "detail": text}
            row |= {"model": outcome.model, "usage": usage(outcome)}
        self._failed_in_a_row = 0
        self.store.note_prompt(row)

    def _ask(self, pairs: Iterator[tuple[Task, int]]) -> None:
        """Ask for as many answers as are likely to be enough."""
        asked: dict[int, tuple[Task, int]] = {}

        def requests() -> Iterator[ChatRequest]:
            for number in range(1 << 62):
                if not self._wanted(len(asked)):
                    return
                pair = next((p for p in pairs if not self.store.asked(p[0].id, p[1])), None)
                if pair is None:
                    self._exhausted = True
                    return
                asked[number] = pair
                yield self._with_seed(answering(self.recipe, *pair), f"{pair[0].id}/{pair[1]}")

        try:
            with _closing(self._engine.chat(requests())) as outcomes:
                for number, outcome in outcomes:
                    self._receive(*asked.pop(number), outcome)
                    if self._reached:
                        break
                else:
                    if asked:
                        raise RunError(
                            f"{type(self._engine).__name__}.chat drew {len(asked)} requests that it neither answered "
                            "nor failed; it must give each its outcome, once"
                        )
        except BaseException:
            # What can be decided without the judge is; the others are asked again.
            self._write([result for result in self._pending if result.problem or self.part.judge is None])
            self._pending = []
            raise
        self._flush()

    def _wanted(self, outstanding: int) -> bool:
        """Whether what is on its way is not likely to be enough."""
        if self.part.target is None:
            return True
        rate = (self.store.accepted - self._before + 1) / (self._finished + 1)
        waiting = outstanding + sum(result.problem is None for result in self._pending)
        return self.store.accepted + waiting * max(rate, _LOWEST_RATE) < self.part.target

    @property
    def _reached(self) -> bool:
        return self.part.target is not None and self.store.accepted >= self.part.target

    @property
    def _engine(self) -> ChatEngine:
        if self._teacher is None:
            spread = self.recipe.run.on == "ray"
            self._teacher = (
                self._stack.enter_context(spread_chat(self.recipe)) if spread else load_chat_teacher(self.recipe)
            )
        return self._teacher

    @property
    def _judging(self) -> ChatEngine:
        if self._judge is None:
            assert self.part.judge is not None
            other = self.recipe.model_copy(update={"teacher": self.part.judge.engine})
            # One model in this process is enough; a server is asked as each of the two parts says.
            shared = same_model(self.recipe) and seeded(other.teacher.model)
            self._judge = self._engine if shared else load_chat_teacher(other)
        return self._judge

    def _with_seed(self, request: ChatRequest, name: str) -> ChatRequest:
        if not seeded(self.recipe.teacher.model):
            return request
        hashed = hashlib.sha256(f"{self.recipe.run.seed}/{name}".encode()).digest()
        return replace(request, seed=int.from_bytes(hashed[:4], "big") >> 1)

    def _receive(self, task: Task, sample: int, outcome: Answer | Failure) -> None:
        if isinstance(outcome, Failure):
            if not outcome.final:
                self._failed(outcome, outcome.reason)
                return
            self._failed_in_a_row = 0
            self._finished += 1
            meta = row_meta(task, sample, self.kind, None, usage(outcome))
            meta |= {"reason": outcome.reason, "detail": outcome.detail}
            asked = Conversation(task.messages, task.tools, task.group or task.id)
            self.store.reject([{"id": asked.id} | asked.wire | {"meta": meta}])
            return
        self._failed_in_a_row = 0
        result = Result(task, sample, outcome, task.example(outcome.message))
        result.problem = problem(outcome, task, refusals=self.part.refusals == "reject") or self._verify(result)
        # Before the judge, who is not asked twice about the same.
        if result.problem is None and self._came_before(result):
            result.problem = ("duplicate", "the same answer to the same prompt came before")
        self._pending.append(result)
        if len(self._pending) >= _BATCH or time.monotonic() - self._flushed > _WAIT_S:
            self._flush()

    def _came_before(self, result: Result) -> bool:
        waiting = any(other.problem is None and other.id == result.id for other in self._pending)
        return waiting or self.store.known(result.id)

    def _verify(self, result: Result) -> tuple[str, str] | None:
        for name, verifier in self.verifiers:
            verdict = verifier(result.example, result.task.row)
            result.verdicts.append({"verifier": name, "ok": verdict.ok, "reason": verdict.reason})
            if not verdict.ok:
                return f"verifier {name}", verdict.reason
        return None

    def _failed(self, failure: Failure, reason: str) -> None:
        self.unanswered[reason] += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _HOPELESS:
            raise Stopped(
                f"{_HOPELESS} requests failed one after another, the last with: {failure.reason}: {failure.detail}; "
                "what was answered is kept, and the same command goes on"
            )

    def _flush(self) -> None:
        """Judge what is to be judged, and write all that is decided."""
        pending, self._pending = self._pending, []
        open_ = [result for result in pending if result.problem is None]
        waiting = {id(result) for result in open_} if self.part.judge is not None else set()
        try:
            if self.part.judge is not None and open_:
                seed = self.recipe.run.seed if seeded(self.part.judge.engine.model) else None
                examples = [result.example for result in open_]
                with _closing(grades(self._judging, self.part.judge, examples, seed)) as graded:
                    for number, grade in graded:
                        result = open_[number]
                        if isinstance(grade.outcome, Failure) and not grade.outcome.final:
                            self._failed(grade.outcome, f"judge: {grade.outcome.reason}")
                            continue
                        self._failed_in_a_row = 0
                        waiting.discard(id(result))
                        judged(result, grade.outcome, grade.score, self.part.judge.keep_from)
        finally:
            self._write([result for result in pending if id(result) not in waiting])
        self._note()

    def _write(self, results: Sequence[Result]) -> None:
        self.store.reject(result.row(self.kind) for result in results if result.problem is not None)
        self.store.keep((result.row(self.kind) for result in results if result.problem is None), self.part.target)
        self._finished += len(results)
        self._flushed = time.monotonic()

    def _note(self, *, final: bool = False) -> None:
        now = time.monotonic()
        if final or now - self._noted >= _NOTE_S:
            self._noted = now
            of = "" if self.part.target is None else f" of {self.part.target}"
            rejected = sum(self.store.rejected.values())
            failed = sum(self.unanswered.values())
            more = f", {failed} without an answer" if failed else ""
            self.progress.note(f"generate: {self.store.accepted}{of} kept, {rejected} rejected{more}")

    def _result(self) -> Generated:
        return Generated(
            folder=str(self.store.folder),
            kept=self.store.accepted,
            target=self.part.target,
            rejected=dict(self.store.rejected.most_common()),
            prompts_written=self.store.prompts_written,
            prompts_dropped=dict(self.store.dropped.most_common()),
            skipped=dict(self.skipped),
            unanswered=dict(self.unanswered),
            teacher=self.store.teacher,
            judge=None if self.part.judge is None else self.store.judge,
            judge_is_teacher=same_model(self.recipe),
        )


@contextmanager
def _closing(iterator: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Close what can be closed: a generator cancels what is in flight, a user's own iterator may be none."""
    try:
        yield iterator
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
