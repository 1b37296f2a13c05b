"""What every recipe has: the parts that do not depend on the task."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from attar.recipe.collect import Collect
from attar.recipe.part import Part, Positive, Share, absolute, unique

__all__ = [
    "Budget",
    "Evaluate",
    "MachinePrice",
    "Part",
    "Positive",
    "Recipe",
    "RunPart",
    "Share",
    "ShipIf",
    "TeacherModel",
    "TokenPrice",
    "Train",
    "absolute",
    "nearest",
    "unique",
]


class Train(Part):
    """How a student learns; passed to `transformers.TrainingArguments`."""

    gradient_accumulation_steps: Positive = 1
    weight_decay: float = Field(default=0.01, ge=0, strict=False)
    warmup_ratio: Share = 0.1
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, strict=False)
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    evaluations: Positive = 10
    """how often the validation loss is taken and a checkpoint is kept; the best one counts"""
    report_to: tuple[str, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _different_seeds(self) -> Train:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"train.seeds: {list(self.seeds)} names a seed twice")
        return self


class ShipIf(Part):
    """What a student must reach, on the lower end of each interval."""

    retention: float = Field(default=0.90, gt=0, strict=False)
    speedup: float = Field(default=5.0, gt=0, strict=False)
    cost_ratio: float = Field(default=10.0, gt=0, strict=False)


class MachinePrice(Part):
    """What an hour of the machine costs that answers."""

    usd_per_hour: float = Field(default=0.085, gt=0, strict=False)
    source: str = "AWS on-demand list price of a c7i.large (2 vCPU, 4 GiB), us-east-1, rounded"
    date: str = "2026-11"


class Evaluate(Part):
    """How the arms are compared."""

    ship_if: ShipIf = ShipIf()
    confidence: float = Field(default=0.95, gt=0.5, lt=1, strict=False)
    resamples: Positive = 10_000
    latency_requests: Positive = 100
    throughput_requests: Positive = 96
    throughput_rounds: Positive = 5
    machine: MachinePrice = MachinePrice()


class RunPart(Part):
    """Where and how the run works."""

    folder: Path | None = Field(default=None, strict=False)
    """`runs/NAME` beside the recipe where nothing is said"""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Positive | None = None
    """CPU threads of torch; None: as many as the machine has cores; of a worker, None: its share of them"""
    on: Literal["here", "ray"] = "here"
    """what asks the teacher: this process, or workers of a Ray cluster"""
    address: str = Field(default="local", pattern=r"^(local|auto|[^\s:/]+:[0-9]+)$")
    """of the Ray cluster: `local` starts one on this machine, `auto` takes the one that this machine belongs to"""
    workers: Positive | None = None
    """of the Ray cluster, an engine each; None: one for each GPU, or for each machine where there are none"""
    shards: str | None = None
    """folder or fsspec URL (`s3://bucket/folder`) that all workers see, for what is on its way; None: the run folder"""
    shard_rows: Positive | None = None
    """examples that are kept, or sent to a worker, together: what a killed one has to do again at most; None: the
    stage's own number"""

    @model_validator(mode="after")
    def _of_a_cluster(self) -> RunPart:
        for key in ("address", "workers", "shards"):
            if self.on == "here" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"run.{key} belongs to `run.on: ray`, and run.on is here")
        return self


class TokenPrice(Part):
    """What a server bills."""

    input_usd_per_million_tokens: float = Field(ge=0, strict=False)
    output_usd_per_million_tokens: float = Field(ge=0, strict=False)
    cached_input_usd_per_million_tokens: float | None = Field(default=None, ge=0, strict=False)
    """as any other input where nothing is said"""
    batch_share: float = Field(default=1.0, gt=0, le=1, strict=False)
    """what batch mode bills of these"""


class Budget(Part):
    """What a run may spend on its teacher, over all its starts."""

    usd: float | None = Field(default=None, gt=0, strict=False)
    """None: no limit"""


class TeacherModel(Part):
    """The expensive model."""

    model: str
    """`hf:FOLDER`, `hf:FILE.gguf`, `gguf:FILE`, `vllm:FOLDER`, `openai:NAME`, `anthropic:NAME`, or a class of the
    user's, `package.module:Class`"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    licence: str | None = None
    terms: Literal["acknowledged"] | None = None
    """that you may train on this teacher's answers although its terms restrict it; `attar check` asks where it must"""
    tokens_per_batch: Positive = 512
    """of one forward pass of a model in this process"""
    base_url: str | None = None
    """of the server that speaks the provider's protocol; None: the provider's own"""
    api_key_env: str | None = None
    """environment variable that holds the key; None: the provider's usual one at the provider, no key elsewhere"""
    max_tokens: Positive | None = None
    """of one answer, reasoning included; what a call can cost at most follows from it"""
    timeout_s: float = Field(default=120.0, gt=0, strict=False)
    """of one attempt"""
    total_timeout_s: float = Field(default=1800.0, gt=0, strict=False)
    """of one request, all attempts and waits between them included"""
    concurrency: Positive = 64
    """requests in flight, at most; how many there are follows from what the server bears"""
    batch: bool = False
    """send requests in the provider's batch mode: cheaper, answered within a day"""
    price: TokenPrice | None = None
    """None: the list price at the provider"""

    @model_validator(mode="after")
    def _of_a_server(self) -> Self:
        scheme = self.model.partition(":")[0]
        if scheme not in ("openai", "anthropic"):
            defaults = TeacherModel.model_construct(model="")
            for key in (
                "base_url",
                "api_key_env",
                "timeout_s",
                "total_timeout_s",
                "concurrency",
                "batch",
                "price",
            ):
                if getattr(self, key) != getattr(defaults, key):
                    raise ValueError(f"teacher.{key} belongs to openai:NAME and anthropic:NAME, not to {self.model}")
        if self.batch and scheme != "openai":
            raise ValueError(f"teacher.batch: true needs openai:NAME, teacher.model is {self.model}")
        if self.total_timeout_s < self.timeout_s:
            raise ValueError(f"teacher.total_timeout_s is {self.total_timeout_s}, less than timeout_s {self.timeout_s}")
        return self


class Recipe(Part):
    """One job, whole. Unknown keys are errors."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    task: str
    data: Part
    teacher: TeacherModel
    train: Train
    evaluate: Evaluate
    budget: Budget = Budget()
    run: RunPart = RunPart()
    collect: Collect = Collect()

    def dump(self) -> dict[str, Any]:
        """The recipe with every default spelled out, as plain data."""
        return self.model_dump(mode="json")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.folder or Path("runs") / self.name

    @property
    def files(self) -> dict[str, Path]:
        """The user's files, by their dotted key."""
        values = {f"data.{key}": getattr(self.data, key) for key in type(self.data).model_fields}
        return {key: value for key, value in values.items() if isinstance(value, Path)}

    def located(self, base: Path) -> Self:
        """The recipe with every relative path made absolute, counted from ``base``."""
        moved = {key.removeprefix("data."): absolute(base, path) for key, path in self.files.items()}
        data = self.data.model_copy(update=moved)
        places: dict[str, Any] = {"folder": absolute(base, self.folder)}
        if self.run.shards is not None and "://" not in self.run.shards:
            places["shards"] = str(absolute(base, Path(self.run.shards)))
        run = self.run.model_copy(update=places)
        return self.model_copy(update={"data": data, "run": run, "collect": self.collect.located(base)})


def nearest(name: str, known: Sequence[str]) -> str:
    """`` (nearest: X)`` for an error message, or nothing if no known name is near."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (nearest: {found[0]})" if found else ""
