"""signals -> models/<arm>/seed-<k>: student, control and baseline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainingArguments

from attar.data.files import read_jsonl
from attar.engines.linear import LinearClassifier
from attar.engines.local import resolve_device
from attar.engines.textclassifier import TextClassifier
from attar.errors import MissingExtra, RecipeError
from attar.losses import IGNORED
from attar.progress import Step, track
from attar.recipe import ClassifyRecipe
from attar.recipe.classify import Objective as ObjectiveSpec
from attar.signals.score import teacher_log_probs
from attar.students.build import build_classifier
from attar.train.objectives import LABELS, TEACHER, AnyObjective, Logit, Response
from attar.train.trainer import DistillationTrainer, last_checkpoint
from attar.workspace import Run, replace_folder

__all__ = ["control_objectives", "fit", "train"]

Rows = list[dict[str, Any]]


def control_objectives(objectives: Sequence[AnyObjective]) -> list[AnyObjective]:
    """What the control learns: the teacher's hard labels in place of its distribution, gold labels as they are."""
    gold = [o for o in objectives if isinstance(o, Response) and o.labels == "gold"]
    weight = sum(o.weight for o in objectives if o not in gold)
    return [*gold, Response(weight=weight)] if weight else list(gold)


def from_recipe(spec: ObjectiveSpec) -> AnyObjective:
    """The objective that a recipe describes."""
    if spec.kind == "logit":
        return Logit(temperature=spec.temperature, weight=spec.weight)
    return Response(weight=spec.weight, labels=spec.labels)


def _rows(run: Run, split: str, classifier: TextClassifier) -> Rows:
    examples = read_jsonl(run.path("data", f"{split}.jsonl"))
    signals = np.array(teacher_log_probs(run, split))
    labels = {label: number for number, label in enumerate(classifier.labels)}
    return [
        {
            "ids": classifier.encode(example["text"]),
            TEACHER: torch.from_numpy(signal),
            LABELS: labels[example["label"]] if "label" in example else IGNORED,
        }
        for example, signal in zip(examples, signals, strict=True)
    ]


def _collate(classifier: TextClassifier) -> Any:
    def collate(rows: Rows) -> dict[str, Tensor]:
        return {
            **classifier.collate([row["ids"] for row in rows]),
            TEACHER: torch.stack([row[TEACHER] for row in rows]),
            LABELS: torch.tensor([row[LABELS] for row in rows]),
        }

    return collate


def _arguments(recipe: ClassifyRecipe, folder: Path, seed: int, examples: int) -> TrainingArguments:
    train = recipe.train
    steps_an_epoch = -(-examples // (train.batch_size * train.gradient_accumulation_steps))
    steps = max(1, round(train.epochs * steps_an_epoch))
    every = max(1, steps // train.evaluations)
    try:
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            learning_rate=train.learning_rate,
            per_device_train_batch_size=train.batch_size,
            per_device_eval_batch_size=256,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            weight_decay=train.weight_decay,
            warmup_steps=round(train.warmup_ratio * steps),
            lr_scheduler_type="cosine",
            seed=seed,
            bf16=train.precision == "bf16",
            fp16=train.precision == "fp16",
            use_cpu=resolve_device(recipe.run.device).type == "cpu",
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            logging_steps=every,
            report_to=list(train.report_to),
            remove_unused_columns=False,
            label_names=[TEACHER],
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
    except ValueError as error:
        raise RecipeError(f"train: {' '.join(str(error).split())}") from error


def fit(
    recipe: ClassifyRecipe,
    run: Run,
    classifier: TextClassifier,
    objectives: Sequence[AnyObjective],
    work: Path,
    seed: int,
) -> list[dict[str, float]]:
    """Train in place, going on from the last whole checkpoint; returns the curves."""
    from transformers import TrainerCallback

    rows = _rows(run, "train", classifier)
    arguments = _arguments(recipe, work, seed, len(rows))

    class Report(TrainerCallback):  # type: ignore[misc]
        def __init__(self, step: Step) -> None:
            self.step, self.seen = step, 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step.advance(state.global_step - self.seen)
            self.seen = state.global_step

    try:
        trainer = DistillationTrainer(
            model=classifier.module,
            objectives=objectives,
            args=arguments,
            train_dataset=rows,
            eval_dataset=_rows(run, "val", classifier),
            data_collator=_collate(classifier),
        )
    except (ImportError, RuntimeError) as error:
        if not recipe.train.report_to:
            raise
        named = ", ".join(recipe.train.report_to)
        raise MissingExtra(f"train.report_to: {named}: {' '.join(str(error).split())}") from error
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    start = last_checkpoint(work)
    for folder in work.glob("checkpoint-*"):
        if start is None or int(folder.name.rpartition("-")[2]) > int(start.name.rpartition("-")[2]):
            shutil.rmtree(folder)
    with track(run.progress, f"training {work.parent.name} seed {seed}", arguments.max_steps) as step:
        trainer.add_callback(Report(step))
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    kept = ("loss", "eval_loss")
    points: dict[int, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        values = {k: v for k, v in entry.items() if k in kept or k.startswith("loss_")}
        if values:
            points.setdefault(entry["step"], {"step": entry["step"]}).update(values)
    return [points[step] for step in sorted(points)]


def train(recipe: ClassifyRecipe, run: Run) -> dict[str, Any]:
    """Train every arm and seed that is not there yet."""
    objectives = [from_recipe(spec) for spec in recipe.distill.objectives]
    control = control_objectives(objectives)
    build = build_classifier(recipe)
    for arm, terms in (("student", objectives), ("control", control)):
        for seed in recipe.train.seeds:
            folder = run.path("models", arm, f"seed-{seed}")
            work = run.path("work", arm, f"seed-{seed}")
            if not folder.exists():
                classifier = build(seed)
                curves = fit(recipe, run, classifier, terms, work, seed)
                classifier.module.eval()
                with replace_folder(folder) as temporary:
                    classifier.save(temporary, torch.float32)
                    (temporary / "curves.json").write_text(json.dumps(curves, indent=1), "utf-8")
            shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(run.path("work"), ignore_errors=True)
    baseline = run.path("models", "baseline", "seed-0")
    if recipe.evaluate.baseline and not baseline.exists():
        texts = [row["text"] for row in read_jsonl(run.path("data", "train.jsonl"))]
        targets = teacher_log_probs(run, "train").argmax(-1).tolist()
        with replace_folder(baseline) as temporary:
            LinearClassifier.fit(texts, targets, recipe.data.labels).save(temporary)
    same = sorted(map(repr, objectives)) == sorted(map(repr, control))
    return {"seeds": list(recipe.train.seeds), "control_equals_student": same}
