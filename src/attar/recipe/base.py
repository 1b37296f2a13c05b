"""What every recipe has: the parts that do not depend on the task."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from attar.recipe.part import Part, Positive, Share, absolute, unique

__all__ = [
    "Evaluate",
    "MachinePrice",
    "Part",
    "Positive",
    "Recipe",
    "RunPart",
    "Share",
    "ShipIf",
    "TeacherModel",
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
    """CPU threads of torch; None: as many as the machine has cores"""


class TeacherModel(Part):
    """The expensive model."""

    model: str
    """`hf:FOLDER`, `hf:FILE.gguf`, or a class of the user's, `package.module:Class`"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    licence: str | None = None
    tokens_per_batch: Positive = 512
    """of one forward pass of a model in this process"""


class Recipe(Part):
    """One job, whole. Unknown keys are errors."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    task: str
    data: Part
    teacher: TeacherModel
    train: Train
    evaluate: Evaluate
    run: RunPart = RunPart()

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
        run = self.run.model_copy(update={"folder": absolute(base, self.folder)})
        return self.model_copy(update={"data": data, "run": run})


def nearest(name: str, known: Sequence[str]) -> str:
    """`` (nearest: X)`` for an error message, or nothing if no known name is near."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (nearest: {found[0]})" if found else ""
