"""The recipe: one frozen model per stage, and the only place where defaults stand."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from attar.errors import RecipeError

__all__ = ["Recipe", "load_recipe", "parse_recipe"]

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _unique(values: tuple[str, ...]) -> tuple[str, ...]:
    repeated = sorted({v for v in values if values.count(v) > 1})
    if repeated:
        raise ValueError(f"repeated: {', '.join(repeated)}")
    if any(not v.strip() for v in values):
        raise ValueError("one is empty")
    return values


# YAML gives lists; a frozen recipe keeps tuples.
_Labels = Annotated[tuple[str, ...], Field(min_length=2, strict=False), AfterValidator(_unique)]


class Data(_Part):
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
    tuple[str, ...], Field(min_length=1, strict=False), AfterValidator(_unique), BeforeValidator(_several)
]


class Shot(_Part):
    """A worked example in the teacher's prompt."""

    text: str
    label: str


class TeacherPrompt(_Part):
    """One prompt of the teacher: a Jinja template over ``text``, ``examples``, ``labels`` and ``words``."""

    template: str
    examples: tuple[Shot, ...] = Field(default=(), strict=False)


class Teacher(_Part):
    """The expensive model, and how it is asked for a label."""

    model: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    licence: str | None = None
    prompts: tuple[TeacherPrompt, ...] = Field(min_length=1, strict=False)
    label_words: dict[str, _Words] = Field(default_factory=dict)
    """the words that are scored for a label; the first stands for it in the prompt. The label itself where nothing is
    said. Several words that people use for one thing (a verbalizer) see more than one, at no cost where each is one
    token"""
    length: Literal["sum", "mean"] = "sum"
    """log-probability of a label of several tokens: of the whole sequence, or its mean per token"""
    calibration: Literal["none", "contextual", "batch", "prototypical"] = "batch"
    content_free: tuple[str, ...] = Field(default=("N/A", "", "[MASK]"), strict=False)
    """inputs without content, for contextual calibration"""
    prior: Literal["estimated", "uniform"] | dict[str, float] = "estimated"
    """share of each label in the pool, for batch and prototypical calibration; `estimated` counts the dev cases,
    add-one smoothed"""
    tokens_per_batch: Positive = 512


class Student(_Part):
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


class Curate(_Part):
    """From the user's files to splits."""

    val_size: Positive = 300


class Objective(_Part):
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


class Distill(_Part):
    """What the student learns from the teacher."""

    objectives: tuple[Objective, ...] = Field(default=(Objective(kind="logit"),), min_length=1, strict=False)


class Train(_Part):
    """How it learns; passed to `transformers.TrainingArguments`."""

    epochs: float = Field(default=20, gt=0, strict=False)
    learning_rate: float = Field(default=5e-3, gt=0, strict=False)
    batch_size: Positive = 32
    gradient_accumulation_steps: Positive = 1
    weight_decay: float = Field(default=0.01, ge=0, strict=False)
    warmup_ratio: Share = 0.1
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, strict=False)
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    evaluations: Positive = 10
    """how often the validation loss is taken and a checkpoint is kept; the best one counts"""
    report_to: tuple[str, ...] = Field(default=(), strict=False)


class ShipIf(_Part):
    """What a student must reach, on the lower end of each interval."""

    retention: float = Field(default=0.90, gt=0, strict=False)
    speedup: float = Field(default=5.0, gt=0, strict=False)
    cost_ratio: float = Field(default=10.0, gt=0, strict=False)


class MachinePrice(_Part):
    """What an hour of the machine costs that answers."""

    usd_per_hour: float = Field(default=0.085, gt=0, strict=False)
    source: str = "AWS on-demand list price of a c7i.large (2 vCPU, 4 GiB), us-east-1, rounded"
    date: str = "2026-11"


class ApiPrice(_Part):
    """What a teacher behind an API would bill."""

    input_usd_per_million_tokens: float = Field(ge=0, strict=False)
    output_usd_per_million_tokens: float = Field(ge=0, strict=False)


class Evaluate(_Part):
    """How the arms are compared."""

    ship_if: ShipIf = ShipIf()
    confidence: float = Field(default=0.95, gt=0.5, lt=1, strict=False)
    resamples: Positive = 10_000
    baseline: bool = True
    latency_requests: Positive = 100
    throughput_requests: Positive = 96
    throughput_rounds: Positive = 5
    machine: MachinePrice = MachinePrice()
    teacher_api: ApiPrice | None = None
    """bill the teacher by these prices instead of by the machine's hour"""


class Export(_Part):
    """How the student is stored to be served."""

    dtype: Literal["float32", "float16"] = "float16"


class RunPart(_Part):
    """Where and how the run works."""

    folder: Path | None = Field(default=None, strict=False)
    """`runs/NAME` beside the recipe where nothing is said"""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Positive | None = None
    """CPU threads of torch; None: as many as the machine has cores"""


class Recipe(_Part):
    """One job, whole. Unknown keys are errors."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    task: Literal["classify"]
    data: Data
    teacher: Teacher
    student: Student = Student()
    curate: Curate = Curate()
    distill: Distill = Distill()
    train: Train = Train()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()
    run: RunPart = RunPart()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
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
        if isinstance(self.teacher.prior, dict):
            if set(self.teacher.prior) != labels:
                missing = ", ".join(sorted(labels - set(self.teacher.prior)))
                raise ValueError(f"teacher.prior: no share for {missing}")
            total = sum(self.teacher.prior.values())
            if abs(total - 1) > 1e-6 or min(self.teacher.prior.values()) <= 0:
                raise ValueError(f"teacher.prior: shares must be above 0 and add up to 1, they add up to {total:g}")
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
        if len({seed for seed in self.train.seeds}) != len(self.train.seeds):
            raise ValueError(f"train.seeds: {list(self.train.seeds)} names a seed twice")
        if self.student.model != "tiny" and not self.student.model.startswith("hf:"):
            raise ValueError(f"student.model: {self.student.model!r} is neither `tiny` nor `hf:FOLDER-or-NAME`")
        return self

    def dump(self) -> dict[str, Any]:
        """The recipe with every default spelled out, as plain data."""
        return self.model_dump(mode="json")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.folder or Path("runs") / self.name


def nearest(name: str, known: Sequence[str]) -> str:
    """`` (nearest: X)`` for an error message, or nothing if no known name is near."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (nearest: {found[0]})" if found else ""


def _model_at(location: Sequence[Any]) -> type[BaseModel] | None:
    """The recipe's model that holds the key at a pydantic error location, to find the names that it allows."""
    current: type[BaseModel] | None = Recipe
    for part in location:
        if isinstance(part, int) or current is None:
            continue
        field = current.model_fields.get(part)
        if field is None:
            return None
        candidates = [field.annotation]
        current = None
        while candidates:
            candidate = candidates.pop()
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                current = candidate
                break
            candidates.extend(get_args(candidate))
    return current


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        # A union adds the name of the branch that failed to the location; those are no keys of the user's.
        location = [p for p in item["loc"] if isinstance(p, int) or "[" not in str(p)]
        key = ".".join(str(p) for p in location)
        if item["type"] == "extra_forbidden":
            owner = _model_at(location[:-1])
            allowed = list(owner.model_fields) if owner else []
            lines.append(f"{key}: unknown key{nearest(str(location[-1]), allowed)}; allowed here: {', '.join(allowed)}")
        elif item["type"] == "missing":
            lines.append(f"{key}: required, but not set")
        elif item["type"] == "value_error":
            message = str(item["ctx"]["error"])
            lines.append(message if not key or message.startswith(key.split(".")[0] + ".") else f"{key}: {message}")
        elif item["type"] == "literal_error":
            expected = item["ctx"]["expected"]
            options = [option.strip(" '") for option in expected.replace(" or ", ",").split(",")]
            hint = nearest(str(item["input"]), options)
            lines.append(f"{key}: {item['input']!r} is not allowed{hint}; allowed: {expected}")
        elif item["type"] == "string_type" and isinstance(item["input"], bool | int | float):
            lines.append(f"{key}: YAML reads this as {item['input']!r}; a text is wanted, so put it in quotes")
        else:
            lines.append(f"{key}: {item['input']!r}: {item['msg'][0].lower() + item['msg'][1:]}")
    return "; ".join(dict.fromkeys(lines))


def parse_recipe(content: Any, origin: str, base: Path | None = None) -> Recipe:
    """Make a recipe from plain data; relative paths count from ``base``.

    Raises:
        RecipeError: one line that names the key, the value, what is allowed and the nearest right name.
    """
    if not isinstance(content, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping of keys, this is {type(content).__name__}")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {_explain(error)}") from error
    if base is None:
        return recipe

    def absolute(path: Path | None) -> Path | None:
        return path if path is None else (base / path.expanduser()).resolve()

    data = recipe.data.model_copy(
        update={key: absolute(getattr(recipe.data, key)) for key in ("pool", "dev", "calibration", "test")}
    )
    run = recipe.run.model_copy(update={"folder": absolute(recipe.folder)})
    return recipe.model_copy(update={"data": data, "run": run})


def _override(content: dict[str, Any], assignment: str) -> None:
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {assignment}: write it as dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {assignment}: the value is no YAML ({error})") from error
    *parents, last = key.split(".")
    current: Any = content
    for parent in parents:
        current = current.setdefault(parent, {})
        if not isinstance(current, dict):
            raise RecipeError(f"--set {assignment}: {parent} holds a value, not keys")
    current[last] = value


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file.
        overrides: ``dotted.key=value`` strings, applied in order; values are YAML.

    Raises:
        RecipeError: the file is missing, is no YAML, or holds something that a recipe does not allow.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe; `attar init DIR` writes one") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{path} is a folder; name the recipe file in it, {path / 'attar.yaml'}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: no YAML: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    if isinstance(content, dict):
        for assignment in overrides:
            _override(content, assignment)
    return parse_recipe(content, str(path), path.parent.resolve())
