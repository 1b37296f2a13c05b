"""signals -> models/<arm>/seed-<k>: base, control and student of a language model."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from attar.engines.heads import check_head, head_of
from attar.engines.load import served, teacher_tokenizer
from attar.engines.local import resolve_device
from attar.engines.served import load_served
from attar.errors import MissingExtra, RecipeError, RunError
from attar.progress import Silent, Step, track
from attar.recipe import ChatRecipe
from attar.signals.chat import open_reader, signal_kind
from attar.signals.packing import Packed
from attar.signals.served import ask_served, refuse_unfit, vocabulary_size
from attar.students.adapt import add_lora
from attar.students.export_lm import merge
from attar.students.language import (
    build_student,
    load_teacher_model,
    require_one_vocabulary,
    teacher_and_tokenizer,
)
from attar.tokens import TokenizedExample
from attar.tokens.pruning import FILE as PRUNED
from attar.tokens.training import encode, pruned_prompt, run_conversations
from attar.train.batches import Collator, TokenizedRows
from attar.train.course import Course
from attar.train.language_model import LanguageModel
from attar.train.objectives import AnyObjective, Feature, Logit, Response
from attar.train.onpolicy import OnPolicyRows
from attar.train.trainer import DistillationTrainer, last_checkpoint
from attar.train.writing import Sampling, ends_of
from attar.workspace import Run, replace_folder, write_json

__all__ = ["counts_of", "fit", "make_base", "objectives_of", "train", "train_all"]

KEPT = "kept.json"
"""in a student's folder: the teacher's id of each of its tokens, where its vocabulary was trimmed"""


def objectives_of(recipe: ChatRecipe, arm: str) -> list[AnyObjective]:
    """What an arm learns: the control has the reference's tokens alone, with all the weight."""
    specs = recipe.distill.objectives
    if arm == "control":
        return [Response(weight=sum(spec.weight for spec in specs))]
    made: list[AnyObjective] = []
    for spec in specs:
        if spec.kind == "response":
            made.append(Response(weight=spec.weight))
        elif spec.kind == "logit":
            made.append(Logit(spec.temperature, spec.weight, spec.divergence, spec.alpha, spec.beta))
        else:
            made.append(Feature(spec.match, spec.loss, spec.weight, spec.options))
    return made


def train(recipe: ChatRecipe, run: Run) -> dict[str, Any]:
    """Make the untrained student, and train every arm and seed that is not there yet."""
    make_base(recipe, run)
    courses = [
        Course(arm, seed, ("models", arm, f"seed-{seed}"))
        for arm in ("student", "control")
        for seed in recipe.train.seeds
    ]
    train_all(recipe, run, courses)
    student, control = objectives_of(recipe, "student"), objectives_of(recipe, "control")
    return counts_of(recipe, run) | {"control_equals_student": student == control}


def train_all(recipe: ChatRecipe, run: Run, courses: Sequence[Course]) -> None:
    """Train what is not there yet, one course after another."""
    for course in courses:
        if not run.path(*course.folder).exists():
            if recipe.train.accelerate is None:
                fit(recipe, run, course)
            else:
                _launch(recipe, run, course)
        shutil.rmtree(run.path(*course.work), ignore_errors=True)
    shutil.rmtree(run.path("work"), ignore_errors=True)


def counts_of(recipe: ChatRecipe, run: Run) -> dict[str, Any]:
    """What a stage of training tells of itself."""
    about = json.loads(run.path("models", "base", "about.json").read_text("utf-8"))
    return {"seeds": list(recipe.train.seeds), "parameters": about["parameters"]}


def make_base(recipe: ChatRecipe, run: Run) -> None:
    """Make the untrained student, unless it is there."""
    folder = run.path("models", "base", "seed-0")
    if folder.exists():
        return
    teacher, tokenizer = teacher_and_tokenizer(recipe)
    if teacher is not None:
        check_head(teacher, tokenizer)
    student = build_student(recipe, teacher, tokenizer, run_conversations(recipe, run, "train"), recipe.run.seed)
    check_head(student.model, student.tokenizer)
    require_one_vocabulary(recipe, student, tokenizer)
    parameters = {
        name: None if model is None else sum(p.numel() for p in model.parameters())
        for name, model in (("teacher", teacher), ("student", student.model))
    }
    with replace_folder(folder) as temporary:
        student.model.save_pretrained(temporary)
        student.tokenizer.save_pretrained(temporary)
        if student.kept is not None:
            write_json(temporary / KEPT, student.kept.tolist())
        cut = pruned_prompt(recipe, run)
        if cut is not None:
            cut.save(temporary)
    write_json(run.path("models", "base", "about.json"), {"parameters": parameters})


def _launch(recipe: ChatRecipe, run: Run, course: Course) -> None:
    """Train under ``accelerate launch``; this process keeps the run's lock and waits."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(recipe.train.accelerate)]
    worker = ["-m", "attar.train.chat", str(run.path("recipe.resolved.yaml")), course.to_json()]
    done = subprocess.run([*command, *worker], check=False)
    if done.returncode:
        raise RunError(
            f"accelerate launch ended with {done.returncode} while it trained {course.arm} seed {course.seed}; its "
            f"messages are above. Check {recipe.train.accelerate}, or leave train.accelerate out to train in one "
            "process"
        )


def _arguments(recipe: ChatRecipe, folder: Path, course: Course) -> TrainingArguments:
    train = recipe.train
    try:
        return TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=course.epochs or train.epochs,
            learning_rate=train.learning_rate,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            optim=train.optimizer,
            lr_scheduler_type="cosine",
            seed=course.seed,
            bf16=train.precision == "bf16",
            fp16=train.precision == "fp16",
            use_cpu=resolve_device(recipe.run.device).type == "cpu",
            eval_strategy="steps",
            save_strategy="steps",
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            report_to=list(train.report_to),
            remove_unused_columns=False,
            disable_tqdm=True,
        )
    except ValueError as error:
        raise RecipeError(f"train: {' '.join(str(error).split())}") from error


def _pace(recipe: ChatRecipe, arguments: TrainingArguments, steps: int) -> None:
    """Evaluate, save and log as often as the recipe says, now that the number of steps is known."""
    every = max(1, steps // recipe.train.evaluations)
    arguments.eval_steps = arguments.save_steps = arguments.logging_steps = every
    arguments.warmup_steps = round(recipe.train.warmup_ratio * steps)


class _Report(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: Step) -> None:
        self._step, self._seen = step, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step.advance(state.global_step - self._seen)
        self._seen = state.global_step


def _load_start(recipe: ChatRecipe, run: Run, course: Course) -> tuple[Any, Any, Tensor | None]:
    """The student as it is before the course, with its adapters; its tokenizer; what of the vocabulary it kept."""
    logging.disable_progress_bar()
    folder, seed = run.path(*course.start), course.seed
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, recipe.student.dtype))
    lora = recipe.student.lora
    if lora is not None:
        targets = lora.targets[0] if lora.targets == ("all-linear",) else lora.targets
        model = add_lora(model, r=lora.rank, alpha=lora.alpha, targets=targets, dropout=lora.dropout, seed=seed)
    kept = folder / KEPT
    ids = torch.tensor(json.loads(kept.read_text("utf-8"))) if kept.is_file() else None
    return model, AutoTokenizer.from_pretrained(folder), ids


def fit(recipe: ChatRecipe, run: Run, course: Course) -> None:
    """Train one course, from the last whole checkpoint on, and keep what was best on ``val``.

    Runs in every process of a distributed run; the main one writes the course's folder.
    """
    with contextlib.ExitStack() as open_servers:
        _fit(recipe, run, course, open_servers)


def _fit(recipe: ChatRecipe, run: Run, course: Course, open_servers: contextlib.ExitStack) -> None:
    objectives = objectives_of(recipe, course.arm)
    work = run.path(*course.work)
    student, tokenizer, kept = _load_start(recipe, run, course)
    examples: dict[str, list[TokenizedExample]] = {}
    found = {"train": course.conversations(recipe, run), "val": run_conversations(recipe, run, "val")}
    for split, conversations in found.items():
        examples[split], counts = encode(recipe, tokenizer, conversations)
        run.progress.note(f"  {split}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items() if n))
    rows = {split: TokenizedRows(found, recipe.train.tokens_per_batch) for split, found in examples.items()}
    written: dict[str, Packed] | None = None
    if recipe.distill.on_policy.share > 0 and course.arm == "student":
        rows["train"] = own = _on_policy_rows(recipe, student, tokenizer, examples["train"], open_servers)
        written = own.records
    teacher, reader = None, None
    if any(not isinstance(objective, Response) for objective in objectives):
        if recipe.distill.signals.source == "live":
            teacher, _ = load_teacher_model(recipe)
        else:
            teachers = tokenizer if kept is None else teacher_tokenizer(recipe)
            reader = open_reader(recipe, run, teachers, head_of(student, tokenizer).size, written)
    temperature = next((o.temperature for o in objectives if isinstance(o, Logit)), 1.0)
    model = LanguageModel(
        student,
        objectives,
        teacher,
        tokenizer=tokenizer,
        teacher_head=reader.head() if reader else None,
        kept=kept,
        temperature=temperature,
    )
    if recipe.train.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    arguments = _arguments(recipe, work, course)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    try:
        trainer = DistillationTrainer(
            model=model,
            args=arguments,
            train_dataset=rows["train"],
            eval_dataset=rows["val"],
            data_collator=Collator(pad or 0, reader),
        )
    except (ImportError, RuntimeError) as error:
        if not recipe.train.report_to:
            raise
        named = ", ".join(recipe.train.report_to)
        raise MissingExtra(f"train.report_to: {named}: {' '.join(str(error).split())}") from error
    steps = trainer.total_steps
    _pace(recipe, arguments, steps)
    run.progress.note(f"  {trainer.real_share:.1%} of the tokens computed are no padding")
    trainer.remove_callback(PrinterCallback)
    start = _resume_from(work, arguments)
    with track(run.progress, f"training {course.arm} seed {course.seed}", steps) as step:
        trainer.add_callback(_Report(step))
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    final = work / "final"
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        curves = _curves(trainer.state.log_history)
        _assemble(recipe, run, course, final, curves)
    trainer.accelerator.wait_for_everyone()


def _on_policy_rows(
    recipe: ChatRecipe,
    student: Any,
    tokenizer: Any,
    examples: Sequence[TokenizedExample],
    open_servers: contextlib.ExitStack,
) -> OnPolicyRows:
    """What the student is trained on where it writes a share of it; a served teacher is asked about that."""
    wanted = recipe.distill.on_policy
    ask, longest = None, None
    if served(recipe):
        kind = signal_kind(recipe)
        engine = open_servers.enter_context(contextlib.closing(load_served(recipe.teacher, vocabulary_size(tokenizer))))
        refuse_unfit(recipe, engine, kind)
        ask = partial(ask_served, engine, kind=kind)
        # One token of its room is its answer.
        longest = None if engine.max_tokens is None else engine.max_tokens - 1
    return OnPolicyRows(
        examples,
        recipe.train.tokens_per_batch,
        sampling=Sampling(
            ends=ends_of(tokenizer, student, examples),
            max_new_tokens=wanted.max_new_tokens,
            temperature=wanted.temperature,
            longest=longest,
        ),
        share=wanted.share,
        refresh=wanted.refresh,
        ask=ask,
    )


def _resume_from(work: Path, arguments: TrainingArguments) -> Path | None:
    """The last whole checkpoint; what was cut off after it is removed."""
    start = last_checkpoint(work)
    if arguments.should_save:
        for folder in work.glob("checkpoint-*"):
            if start is None or int(folder.name.rpartition("-")[2]) > int(start.name.rpartition("-")[2]):
                shutil.rmtree(folder)
    return start


def _curves(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    kept, families = ("loss", "grad_norm"), ("loss_", "eval_", "gradient_", "on_policy_")
    points: dict[int, dict[str, float]] = {}
    for entry in history:
        values = {k: v for k, v in entry.items() if k in kept or k.startswith(families)}
        if values:
            points.setdefault(entry["step"], {"step": entry["step"]}).update(values)
    return [points[step] for step in sorted(points)]


def _assemble(recipe: ChatRecipe, run: Run, course: Course, final: Path, curves: Any) -> None:
    """A plain model from the trained weights: adapters merged, projectors left out."""
    from safetensors.torch import load_file

    model, tokenizer, kept = _load_start(recipe, run, course)
    state = load_file(final / "model.safetensors")
    own = {name.removeprefix("student."): tensor for name, tensor in state.items() if name.startswith("student.")}
    result = model.load_state_dict(own, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    missing = [name for name in result.missing_keys if not any(name.endswith(key) for key in tied)]
    if missing or result.unexpected_keys:
        raise RunError(
            f"{final} does not hold the student's weights: {(missing + result.unexpected_keys)[0]} and others"
        )
    plain, _ = merge(model)
    with replace_folder(run.path(*course.folder)) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if kept is not None:
            write_json(temporary / KEPT, kept.tolist())
        cut = run.path(*course.start, PRUNED)
        if cut.is_file():
            shutil.copy(cut, temporary)
        (temporary / "curves.json").write_text(json.dumps(curves, indent=1), "utf-8")


def main() -> None:
    """What ``accelerate launch`` runs in every process: RECIPE COURSE."""
    from attar.recipe import load_recipe

    recipe = load_recipe(sys.argv[1])
    assert isinstance(recipe, ChatRecipe)
    run = Run(recipe.folder, Silent(), {"stages": {}, "begun": {}, "files": {}})
    fit(recipe, run, Course.from_json(sys.argv[2]))


if __name__ == "__main__":
    main()
