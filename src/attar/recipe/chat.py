"""The recipe of a small causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from attar.recipe.base import Evaluate, Part, Positive, Recipe, Share, TeacherModel, Train, absolute, unique
from attar.recipe.curate import REFUSALS, Outcome, Pattern, Shared

__all__ = ["ChatRecipe"]


class Data(Part):
    """The user's conversations: messages and tools, in OpenAI's shape. A relative path counts from the recipe."""

    train: Path | None = Field(default=None, strict=False)
    """required but for an agent that acts in an environment"""
    val: Path | None = Field(default=None, strict=False)
    """held out for choosing the checkpoint; taken from `train` where nothing is said"""
    test: Path | None = Field(default=None, strict=False)
    """held out for the evaluation; taken from `train` where nothing is said"""
    on_bad_line: Literal["stop", "skip"] = "stop"
    licence: str | None = None


class Curate(Shared):
    """From the user's files to splits; a group of conversations stays on one side."""

    val_size: Positive = 50
    test_size: Positive = 50
    calibration_size: Annotated[int, Field(ge=0)] = 0
    """held out for confidences; 0: there is no such split"""
    max_tokens: Positive = 2048
    """a longer conversation is cut on the right, and counted"""
    max_truncated: Share = 0.1
    """share of conversations that may be cut before the run refuses"""
    tool_calls: Literal["drop", "keep"] = "drop"
    """calls that do not parse, that name no tool on offer, or whose arguments do not fit its schema"""
    truncated: Literal["drop", "keep"] = "drop"
    """answers that were cut off at a token limit, as `finish_reason` of the row, its `meta` or a message says"""
    filtered: Literal["drop", "keep"] = "drop"
    """answers that a provider's content filter took, or that its API marks as refused, as `finish_reason` says"""
    outcome: Outcome = Outcome()
    unfinished: Literal["drop", "keep"] = "keep"
    """answers with an open code fence, or that begin as JSON and are none"""
    refusals: Literal["drop", "keep"] = "keep"
    """answers that refuse; a student should learn those too, unless its teacher refused too much"""
    refusal_patterns: Annotated[tuple[Pattern, ...], Field(strict=False), AfterValidator(unique)] = REFUSALS
    """regular expressions of how a refusal begins, case apart"""


class Shrink(Part):
    """How the student is cut from the model that it starts from."""

    layers: Positive | None = None
    """how many are kept"""
    choose: Literal["even", "first", "alternate", "block_influence"] = "even"
    """which: evenly spaced with both ends, the first ones, every other one (DistilBERT), or those that change their
    input most on the training conversations (ShortGPT)"""
    hidden: Positive | None = None
    """width of the residual stream, by activation importance (Minitron)"""
    intermediate: Positive | None = None
    """width of the feed-forward layers, by activation importance"""
    heads: Positive | None = None
    """query heads a layer, by activation importance"""
    kv_heads: Positive | None = None
    """key-value heads a layer, by activation importance"""
    vocabulary: Literal["keep", "trim"] = "keep"
    """trim: keep the tokens that the conversations use"""
    fresh: bool = False
    """start from random weights, of the sizes that the keys above ask for"""

    @model_validator(mode="after")
    def _possible(self) -> Shrink:
        if self.layers is None and self.choose != "even":
            raise ValueError("student.shrink.choose: it chooses layers, and student.shrink.layers is not set")
        return self


class Lora(Part):
    """Train low-rank adapters by `peft`, merged at export."""

    rank: Positive = 16
    alpha: Positive = 32
    dropout: Share = 0.0
    targets: tuple[str, ...] = Field(default=("all-linear",), min_length=1, strict=False)
    """names of linear layers, or `all-linear` for all but the head"""


class ChatTeacher(TeacherModel):
    """The expensive model: in this process, or behind vLLM's server (`openai:NAME` and `base_url`)."""

    tokenizer: str | None = None
    """`hf:FOLDER` with the tokenizer and chat template of a served teacher, which is asked with token ids"""
    parity: str | None = None
    """`hf:FOLDER` with the weights of a served teacher, which a few of its answers are compared with; `internal` to
    compare them with each other alone; None takes the weights in the folder of `tokenizer`, if there are any"""

    @model_validator(mode="after")
    def _of_a_served_one(self) -> ChatTeacher:
        behind = self.model.partition(":")[0] in ("openai", "anthropic")
        for key, wanted in (("tokenizer", "`hf:FOLDER`"), ("parity", "`hf:FOLDER` or `internal`")):
            value = getattr(self, key)
            if value is None:
                continue
            if not behind:
                raise ValueError(f"teacher.{key} belongs to a served teacher, openai:NAME, not to {self.model}")
            if not value.startswith("hf:") and (key, value) != ("parity", "internal"):
                raise ValueError(f"teacher.{key}: {value!r} is not {wanted}")
        return self


class Student(Part):
    """The small model."""

    model: str | None = None
    """`hf:FOLDER`; None starts from the teacher, which must be `hf:...` then"""
    shrink: Shrink = Shrink()
    lora: Lora | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the weights while they are trained"""


class Response(Part):
    """The reference's tokens, as hard targets."""

    kind: Literal["response"]
    weight: float = Field(default=1.0, gt=0, strict=False)


class Logit(Part):
    """The teacher's probabilities."""

    kind: Literal["logit"]
    weight: float = Field(default=1.0, gt=0, strict=False)
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "total_variation"] = (
        "forward_kl"
    )
    alpha: float | None = Field(default=None, strict=False)
    """of the skewed kinds; 0.1 where nothing is said"""
    beta: float | None = Field(default=None, strict=False)
    """of `jsd`; 0.5 where nothing is said"""
    temperature: float = Field(default=1.0, gt=0, strict=False)


class Feature(Part):
    """The teacher's inner states."""

    kind: Literal["feature"]
    weight: float = Field(default=1.0, gt=0, strict=False)
    match: dict[str, str] = Field(min_length=1)
    """path of the student's layer -> path of the teacher's"""
    loss: str = "cosine"
    """a name of `attar.losses.FEATURE_LOSSES`"""
    options: dict[str, Any] = Field(default_factory=dict)
    """of that loss"""


Objective = Annotated[Response | Logit | Feature, Field(discriminator="kind")]


class Signals(Part):
    """Where the teacher's probabilities come from."""

    source: Literal["live", "cached"] = "cached"
    """ask the teacher in every step, or once before training"""
    kind: Literal["sampled", "top_k", "hidden"] = "sampled"
    """of cached signals: what is kept of a distribution"""
    entries: Positive = 64
    """of `top_k`: tokens kept of a distribution, at most"""
    at_least: float = Field(default=0.0, ge=0, lt=1, strict=False)
    """of `top_k`: entries of a smaller probability are not kept, so that few are where the teacher is sure"""
    threshold: float = Field(default=0.02, gt=0, le=1, strict=False)
    """of `sampled`: a token of at least this probability is kept, others by chance"""

    @model_validator(mode="after")
    def _of_the_kind(self) -> Signals:
        for key, kind in (("entries", "top_k"), ("at_least", "top_k"), ("threshold", "sampled")):
            value = getattr(self, key)
            # Compared, as a resolved recipe spells every default out.
            if value != type(self).model_fields[key].default and (self.source, self.kind) != ("cached", kind):
                signals = self.kind if self.source == "cached" else "live"
                raise ValueError(
                    f"distill.signals.{key}: it is {value}, and {signals} signals have none; leave it out, or set "
                    f"source: cached and kind: {kind}"
                )
        return self


class OnPolicy(Part):
    """Batches that the student writes itself after recorded prompts; the teacher scores its tokens (GKD)."""

    share: float = Field(default=0.0, ge=0, le=1, strict=False)
    """of the batches, GKD's lambda; 0: recorded conversations alone"""
    refresh: Positive = 1
    """steps whose prompts are answered together, so that what is learned is at most so many less 1 old"""
    temperature: float = Field(default=1.0, gt=0, strict=False)
    """at which the student writes"""
    max_new_tokens: Positive = 128
    """an answer is cut there, and has no end to learn"""

    @model_validator(mode="after")
    def _used(self) -> OnPolicy:
        if self.share == 0:
            for key, field in type(self).model_fields.items():
                # Compared, as a resolved recipe spells every default out.
                if getattr(self, key) != field.default:
                    raise ValueError(
                        f"distill.on_policy.{key}: it is {getattr(self, key)}, and nothing is written at share 0; set "
                        "share, or leave it out"
                    )
        return self


class Distill(Part):
    """What the student learns from the teacher."""

    objectives: tuple[Objective, ...] = Field(default=(Logit(kind="logit"),), min_length=1, strict=False)
    signals: Signals = Signals()
    on_policy: OnPolicy = OnPolicy()

    @model_validator(mode="after")
    def _learnable(self) -> Distill:
        kinds = {objective.kind for objective in self.objectives}
        if self.on_policy.share > 0 and kinds == {"response"}:
            raise ValueError(
                "distill.on_policy.share: what the student writes is learned by the teacher's probabilities, and every "
                "objective is of kind response; add one of kind logit"
            )
        if self.on_policy.share == 1 and "response" in kinds:
            raise ValueError(
                "distill.on_policy.share: at 1 no recorded batch is left for the objective of kind response; lower it, "
                "or leave the objective out"
            )
        return self

    @model_validator(mode="after")
    def _possible(self) -> Distill:
        if self.signals.source == "live":
            return self
        for objective in self.objectives:
            if isinstance(objective, Logit) and self.signals.kind == "sampled" and objective.divergence != "forward_kl":
                raise ValueError(
                    f"distill.signals.kind: sampled signals give the forward KL only, not {objective.divergence}; "
                    "set kind: top_k or hidden, or source: live"
                )
        temperatures = {o.temperature for o in self.objectives if isinstance(o, Logit)}
        if len(temperatures) > 1 and self.signals.kind != "hidden":
            raise ValueError(
                f"distill.signals: {self.signals.kind} signals are stored at one temperature, and the objectives name "
                f"{', '.join(map(str, sorted(temperatures)))}; set kind: hidden, or source: live"
            )
        return self


class ChatTrain(Train):
    """How the student learns."""

    epochs: float = Field(default=2, gt=0, strict=False)
    learning_rate: float = Field(default=1e-4, gt=0, strict=False)
    tokens_per_batch: Positive = 4096
    """of one process, padding included"""
    max_grad_norm: float = Field(default=1.0, gt=0, strict=False)
    gradient_checkpointing: bool = False
    optimizer: str = "adamw_torch_fused"
    accelerate: Path | None = Field(default=None, strict=False)
    """a configuration file of `accelerate config`: DDP, FSDP2 or DeepSpeed; training starts under
    `accelerate launch` with it"""


class ChatEvaluate(Evaluate):
    """How the arms are compared."""

    answer_tokens: Positive = 64
    """greedy answers are cut after so many"""
    answers: Positive = 24
    """held-out turns that are answered freely"""
    latency_requests: Positive = 20
    throughput_requests: Positive = 8
    throughput_rounds: Positive = 3


class Export(Part):
    """How the student is stored to be served."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the safetensors"""
    gguf: bool = True
    """a GGUF file (F16) as well, for llama.cpp; speed is measured on it"""


class ChatRecipe(Recipe):
    """A job that ends in a small causal language model."""

    task: Literal["chat", "agent"]
    data: Data = Data()
    teacher: ChatTeacher
    student: Student = Student()
    curate: Curate = Curate()
    distill: Distill = Distill()
    train: ChatTrain = ChatTrain()
    export: Export = Export()
    evaluate: ChatEvaluate = ChatEvaluate()

    @model_validator(mode="after")
    def _consistent(self) -> ChatRecipe:
        if self.task == "chat" and self.data.train is None:
            raise ValueError("data.train: required, but not set")
        signals = self.distill.signals
        if self.student.shrink.vocabulary == "trim" and signals.source == "cached" and signals.kind != "hidden":
            raise ValueError(
                f"distill.signals.kind: {signals.kind} signals hold ids of the teacher's whole vocabulary, and "
                "student.shrink.vocabulary is trim; set kind: hidden, or source: live"
            )
        if self.distill.on_policy.share > 0 and signals.source == "cached":
            if not self.teacher.model.startswith("openai:"):
                raise ValueError(
                    f"distill.signals.source: cached signals ({signals.kind}) are of recorded tokens, and with "
                    "distill.on_policy.share the student writes others; set source: live"
                )
            if signals.kind != "top_k":
                raise ValueError(
                    f"distill.signals.kind: {signals.kind} signals cannot be asked of {self.teacher.model} for what "
                    "the student writes (distill.on_policy.share); set kind: top_k"
                )
        if self.student.model is not None and not self.student.model.startswith("hf:"):
            raise ValueError(f"student.model: {self.student.model!r} is not `hf:FOLDER`")
        return self

    @property
    def only_words(self) -> bool:
        """Whether all that counts of the teacher is what it said, so that it may be anything that speaks."""
        return False

    def located(self, base: Path) -> ChatRecipe:
        """The recipe with every relative path made absolute, counted from ``base``."""
        located = super().located(base)
        if located.train.accelerate is None:
            return located
        train = located.train.model_copy(update={"accelerate": absolute(base, located.train.accelerate)})
        return located.model_copy(update={"train": train})
