"""The recipe of a classifier."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from attar.recipe.base import Evaluate, Part, Positive, Recipe, Share, TeacherModel, Train, nearest, unique
from attar.recipe.curate import Balance, NearDuplicates, Shared, Split

__all__ = ["ClassifyRecipe"]

# YAML gives lists; a frozen recipe keeps tuples.
_Labels = Annotated[tuple[str, ...], Field(min_length=2, strict=False), AfterValidator(unique)]


class Data(Part):
    """The user's files. A relative path counts from the folder of the recipe."""

    labels: _Labels
    pool: Path = Field(strict=False)
    """requests to learn from; labels in it, if any, are gold labels"""
    dev: Path | None = Field(default=None, strict=False)
    """labelled cases for choosing prompts and estimating the prior"""
    calibration: Path | None = Field(default=None, strict=False)
    """labelled cases for the student's confidence; never used for training"""
    test: Path = Field(strict=False)
    """labelled cases that only the evaluation sees"""
    text_key: str = "text"
    label_key: str = "label"
    on_bad_line: Literal["stop", "skip"] = "stop"
    licence: str | None = None


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


_Words = Annotated[
    tuple[str, ...], Field(min_length=1, strict=False), AfterValidator(unique), BeforeValidator(_several)
]


class Shot(Part):
    """A worked example in the teacher's prompt."""

    text: str
    label: str


class TeacherPrompt(Part):
    """One prompt of the teacher: a Jinja template over ``text``, ``examples``, ``labels`` and ``words``."""

    template: str
    examples: tuple[Shot, ...] = Field(default=(), strict=False)


class Teacher(TeacherModel):
    """The expensive model, and how it is asked for a label."""

    prompts: tuple[TeacherPrompt, ...] = Field(min_length=1, strict=False)
    label_words: dict[str, _Words] = Field(default_factory=dict)
    """the words that are scored for a label; the first stands for it in the prompt. The label itself where nothing is
    said. Several words that people use for one thing (a verbalizer) see more than one, at no cost where each is one
    token"""
    length: Literal["sum", "mean"] = "sum"
    """log-probability of a label of several tokens: of the whole sequence, or its mean per token"""
    calibration: Literal["none", "contextual", "batch", "prototypical"] = "batch"
    samples: Positive | None = None
    """of a teacher behind an API: answers to each prompt, counted as votes; None: log-probabilities of a first token"""
    constrained: bool = True
    """hold the votes to the labels' words by a JSON schema; false for a server that has none: the answer is the word"""
    content_free: tuple[str, ...] = Field(default=("N/A", "", "[MASK]"), strict=False)
    """inputs without content, for contextual calibration"""
    prior: Literal["estimated", "uniform"] | dict[str, float] = "estimated"
    """share of each label in the pool, for batch and prototypical calibration; `estimated` counts the dev cases,
    add-one smoothed"""


class Student(Part):
    """The small model."""

    model: str = "tiny"
    """`tiny`, or `hf:FOLDER-or-NAME` of a sequence classifier"""
    form: Literal["convolutions", "ngrams"] = "convolutions"
    """of a tiny student: convolutions over tokens, which start from the teacher's token embeddings, or a bag of hashed
    n-grams (any teacher)"""
    width: Positive = 48
    """of a token's or n-gram's row"""
    units: Positive = 96
    """filters of each window of tokens, or units of the hidden layer over n-grams"""
    dropout: Share = 0.3
    token_dropout: Share | None = None
    """share of a text's tokens or n-grams that a training step does not see; None: 0 of tokens, 0.3 of n-grams"""
    buckets: Positive = 16384
    """rows that n-grams are hashed into"""
    max_tokens: Positive = 64


class ClassBalance(Balance):
    """Caps; the rows that stay are a random sample."""

    per_class: Positive | None = None
    """of rows of the pool with that gold label"""


class ClassSplit(Split):
    """What is held out of the pool for validation."""

    group_key: str | None = None
    """key of a row that names what stays on one side; dots go deeper. None: every request stands alone"""


class Curate(Shared):
    """From the user's files to splits."""

    val_size: Positive = 300
    near_duplicates: NearDuplicates | None = None
    """a near duplicate of a short request is a paraphrase, and those are what a pool is for"""
    balance: ClassBalance = ClassBalance()
    split: ClassSplit = ClassSplit()


class Objective(Part):
    """One term of the loss."""

    kind: Literal["response", "logit"]
    weight: float = Field(default=1.0, gt=0, strict=False)
    labels: Literal["teacher", "gold"] = "teacher"
    """of `response`: the teacher's hard label, or the gold label where an example has one"""
    temperature: float = Field(default=1.0, gt=0, strict=False)
    """of `logit`"""

    @model_validator(mode="after")
    def _fitting(self) -> Objective:
        if self.kind == "logit" and self.labels != "teacher":
            raise ValueError("labels belongs to kind: response; a logit objective takes the teacher's distribution")
        if self.kind == "response" and self.temperature != 1.0:
            raise ValueError("temperature belongs to kind: logit; hard labels have none")
        return self


class Distill(Part):
    """What the student learns from the teacher."""

    objectives: tuple[Objective, ...] = Field(default=(Objective(kind="logit"),), min_length=1, strict=False)


class ApiPrice(Part):
    """What a teacher behind an API would bill."""

    input_usd_per_million_tokens: float = Field(ge=0, strict=False)
    output_usd_per_million_tokens: float = Field(ge=0, strict=False)


class ClassifyTrain(Train):
    """How a classifier learns."""

    epochs: float = Field(default=20, gt=0, strict=False)
    learning_rate: float = Field(default=5e-3, gt=0, strict=False)
    batch_size: Positive = 32


class ClassifyEvaluate(Evaluate):
    """How the arms are compared."""

    baseline: bool = True
    teacher_api: ApiPrice | None = None
    """bill the teacher by these prices instead of by the machine's hour"""


class Export(Part):
    """How the student is stored to be served."""

    dtype: Literal["float32", "float16"] = "float16"


class ClassifyRecipe(Recipe):
    """A job that ends in a small classifier."""

    task: Literal["classify"]
    data: Data
    teacher: Teacher
    student: Student = Student()
    curate: Curate = Curate()
    distill: Distill = Distill()
    train: ClassifyTrain = ClassifyTrain()
    export: Export = Export()
    evaluate: ClassifyEvaluate = ClassifyEvaluate()

    @model_validator(mode="after")
    def _consistent(self) -> ClassifyRecipe:
        labels = set(self.data.labels)
        named: dict[str, Iterable[str]] = {
            "teacher.label_words": self.teacher.label_words,
            "teacher.prior": self.teacher.prior if isinstance(self.teacher.prior, dict) else {},
            "teacher.prompts.examples": [shot.label for prompt in self.teacher.prompts for shot in prompt.examples],
        }
        for key, mentioned in named.items():
            for label in mentioned:
                if label not in labels:
                    raise ValueError(f"{key}: {label!r} is not in data.labels{nearest(label, self.data.labels)}")
        # Only what is stated: a resolved recipe spells the default out.
        stated = "prior" in self.teacher.model_fields_set and self.teacher.prior != "estimated"
        if stated and self.teacher.calibration in ("none", "contextual"):
            raise ValueError(
                f"teacher.prior: calibration {self.teacher.calibration} uses no prior; leave it out, or set "
                "teacher.calibration: batch or prototypical"
            )
        if isinstance(self.teacher.prior, dict):
            if set(self.teacher.prior) != labels:
                missing = ", ".join(sorted(labels - set(self.teacher.prior)))
                raise ValueError(f"teacher.prior: no share for {missing}")
            total = sum(self.teacher.prior.values())
            if abs(total - 1) > 1e-6 or min(self.teacher.prior.values()) <= 0:
                raise ValueError(f"teacher.prior: shares must be above 0 and add up to 1, they add up to {total:g}")
        if self.teacher.model.partition(":")[0] not in ("openai", "anthropic"):
            if self.teacher.samples is not None:
                raise ValueError(f"teacher.samples belongs to openai:NAME and anthropic:NAME, not {self.teacher.model}")
        elif self.teacher.samples is not None and any(len(words) > 1 for words in self.teacher.label_words.values()):
            raise ValueError("teacher.label_words: a label has one word where teacher.samples counts answers")
        if not self.teacher.constrained and self.teacher.samples is None:
            raise ValueError("teacher.constrained: false belongs to teacher.samples, which is not set")
        scored = [word for label in self.data.labels for word in self.teacher.label_words.get(label, (label,))]
        shared = sorted({word for word in scored if scored.count(word) > 1})
        if shared:
            raise ValueError(f"teacher.label_words: {', '.join(shared)} stands for more than one label")
        if (
            self.teacher.calibration in ("batch", "prototypical")
            and self.teacher.prior == "estimated"
            and self.data.dev is None
        ):
            raise ValueError(
                "teacher.prior: `estimated` counts the labels of data.dev, which is not set; "
                "set data.dev, or state `uniform` or the shares"
            )
        if self.student.model != "tiny" and not self.student.model.startswith("hf:"):
            raise ValueError(f"student.model: {self.student.model!r} is neither `tiny` nor `hf:FOLDER-or-NAME`")
        return self
