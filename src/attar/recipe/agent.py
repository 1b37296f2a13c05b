"""The recipe of a small agent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from attar.recipe.base import Part, Positive, unique
from attar.recipe.chat import ChatEvaluate, ChatRecipe, Curate, Distill
from attar.recipe.collect import Collect
from attar.recipe.curate import Decontaminate, NearDuplicates, Outcome, Pattern

__all__ = ["AgentRecipe", "Environment", "Relabel"]

_Names = Annotated[tuple[str, ...], Field(strict=False), AfterValidator(unique)]


class Environment(Part):
    """What the agent acts in, and what an episode may take."""

    use: str = Field(min_length=1)
    """the short name of a built-in environment, or the user's own, `package.module:Class`"""
    options: dict[str, Any] = Field(default_factory=dict)
    """keyword arguments of the class"""
    steps: Positive = 12
    """answers of the agent, of an episode at most"""
    answer_tokens: Positive = 256
    """of one answer, its reasoning included"""
    tokens: Positive | None = None
    """of all answers of an episode"""
    seconds: float | None = Field(default=None, gt=0, strict=False)
    """of an episode"""
    usd: float | None = Field(default=None, gt=0, strict=False)
    """of an episode"""
    call_s: float = Field(default=60.0, gt=0, strict=False)
    """of one call of a tool; an environment that takes longer hangs"""
    result_characters: Positive = 20_000
    """of a tool's result; a longer one is cut in its middle"""
    at_once: Positive = 16
    """episodes that are played at the same time"""


class Rollout(Part):
    """The teacher's own episodes, in the environment."""

    tasks: Positive | None = None
    """of the split `train`; None: all"""
    val_tasks: Positive | None = None
    """of the split `val`; None: all"""
    trials: Positive = 1
    """episodes of each task of `train`"""
    temperature: float | None = Field(default=None, ge=0, strict=False)
    """None: what the teacher's engine does by itself"""


class AgentCollect(Collect):
    """Where training data comes from."""

    rollout: Rollout = Rollout()
    """`attar rollout`, where there is an environment"""


class Reasoning(Part):
    """How much of the teacher's reasoning the student learns; small ones learn worse from long chains."""

    policy: Literal["keep", "strip", "shorten"] = "keep"
    tokens: Positive | None = None
    """of `shorten`, counted by the student's tokenizer: the most that stay; None for the first sentence"""

    @model_validator(mode="after")
    def _of_shorten(self) -> Reasoning:
        if self.tokens is not None and self.policy != "shorten":
            raise ValueError(f"curate.reasoning.tokens: it belongs to policy: shorten, and the policy is {self.policy}")
        return self


class Weights(Part):
    """What a token counts in the loss, by what it is part of."""

    reason: float = Field(default=1.0, ge=0, strict=False)
    call: float = Field(default=1.0, ge=0, strict=False)
    text: float = Field(default=1.0, ge=0, strict=False)
    end: float = Field(default=1.0, ge=0, strict=False)
    """of the token that ends a turn"""
    steps: tuple[Annotated[float, Field(ge=0, strict=False)], ...] = Field(default=(), strict=False)
    """of the agent's first answer, second and so on, beside that; the last holds for all that follow"""

    @model_validator(mode="after")
    def _something(self) -> Weights:
        if not (self.reason or self.call or self.text or self.end):
            raise ValueError("distill.weights: all are 0, so nothing would be learned")
        return self


class Relabel(Part):
    """The student acts, the teacher says what it would have done (DAgger, Ross et al. 2011)."""

    rounds: Positive = 1
    tasks: Positive
    """of the split `train`, that the student plays in each round"""
    temperature: float = Field(default=0.0, ge=0, strict=False)
    """of the student, as it acts"""
    corrections: Positive = 3
    """of an episode, at most: the first steps at which the teacher would have done something else"""
    epochs: float = Field(default=1.0, gt=0, strict=False)
    """over all data so far, in each round"""


class AgentDistill(Distill):
    """What the student learns from the teacher."""

    weights: Weights = Weights()
    prune: bool = False
    """train what never changes, system prompt and tools, into the student, and cut it from its prompt"""
    relabel: Relabel | None = None


class AgentCurate(Curate):
    """From episodes to splits. Tasks of one kind are alike, so near duplicates stay where nothing is said."""

    near_duplicates: NearDuplicates | None = None
    decontaminate: Decontaminate = Decontaminate(ngram=None)
    outcomes: Literal["success", "any"] = "success"
    """episodes that the environment calls a success, or all"""
    outcome: Outcome = Outcome(failed="keep")
    """what else may be asked of an outcome: a score from which an episode is good"""
    ungrounded: Literal["drop", "keep"] = "keep"
    """episodes whose last answer names a number or a quoted name that neither the user nor a tool gave"""
    max_steps: Positive | None = None
    """answers of the agent in an episode"""
    reasoning: Reasoning = Reasoning()
    failed_calls: Literal["keep", "unlearn", "drop"] = "unlearn"
    """calls that failed and were then mended: learned as they are; read and not learned; or taken out, with their
    results"""
    failed_result: Pattern = r"error\b"
    """regular expression of how a tool's result begins that says that the call failed, case apart"""
    test_size: Annotated[int, Field(ge=0)] = 0
    """held out for replaying its steps; with an environment the evaluation plays its tasks instead"""


class AgentEvaluate(ChatEvaluate):
    """How the arms are compared: single steps of the teacher's episodes, then whole episodes."""

    splits: _Names = Field(default=("test",), min_length=1)
    """of the environment's tasks; the first one is what the verdict is about"""
    tasks: Positive | None = None
    """of each split; None: all"""
    trials: Positive = 1
    """episodes of each task and arm, for pass^k"""
    demonstrations: Annotated[int, Field(ge=0)] = 2
    """of the teacher's episodes, shown to the untrained student in its prompt as the arm `prompted`; 0: no such arm"""
    replay: Positive = 100
    """steps of the teacher's episodes that every arm is asked for"""
    temperature: float = Field(default=0.0, ge=0, strict=False)
    """of every arm but the teacher"""
    constrained: bool = True
    """whether students can write only calls that fit the tools' schemas, as when they are served"""


class AgentRecipe(ChatRecipe):
    """A job that ends in a small agent. Its conversations are episodes."""

    task: Literal["agent"]
    environment: Environment | None = None
    collect: AgentCollect = AgentCollect()
    curate: AgentCurate = AgentCurate()
    distill: AgentDistill = AgentDistill()
    evaluate: AgentEvaluate = AgentEvaluate()

    @model_validator(mode="after")
    def _acts_somewhere(self) -> AgentRecipe:
        if self.environment is None and self.data.train is None:
            raise ValueError(
                "environment: required where data.train is not set: episodes are played in one, or read from a file"
            )
        if self.distill.prune and any(o.kind != "response" for o in self.distill.objectives):
            raise ValueError(
                "distill.prune: the student would read less than the teacher whose probabilities it learns; use "
                "objectives of kind response, or a teacher that was pruned itself, and leave prune out"
            )
        if self.environment is None and self.distill.relabel is not None:
            raise ValueError("distill.relabel: the student acts in an environment, and none is set")
        return self

    @property
    def only_words(self) -> bool:
        """Whether all that counts of the teacher is what it did, so that it may be anything that acts."""
        taught = all(objective.kind == "response" for objective in self.distill.objectives)
        return taught and self.student.model is not None
