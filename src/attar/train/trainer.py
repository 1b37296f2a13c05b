"""DistillationTrainer: transformers' Trainer with a weighted sum of objectives as its loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator

from attar.errors import TrainingError
from attar.train.batches import Epochs, TokenBudgetBatches
from attar.train.distilled import AnyModule, Distilled
from attar.train.language_model import LanguageModel, is_language_model
from attar.train.objectives import AnyObjective

__all__ = ["DistillationTrainer", "last_checkpoint"]

# Written last into a checkpoint: one without it was cut off and is not resumed from.
COMPLETE = "complete"


class DistillationTrainer(Trainer):
    """Trains a model on objectives; everything else (precision, accumulation, trackers, resume) is the Trainer's.

    The loss is the sum over objectives of weight times the mean over the examples, or tokens, that the objective
    supervises in the whole optimiser step, so neither accumulation nor the number of processes changes the gradient.
    Each objective's value is logged as ``loss_<name>``, and at each evaluation the norm of its gradient on one
    micro-batch, without its weight, as ``gradient_<name>``: weights can be chosen by them.

    Args:
        model: the student: any module, or what ``LanguageModel`` made of one.
        objectives: at least one; None for a ``model`` that has them.
        teacher: a module that takes the student's inputs. It is put in eval mode, frozen, and kept out of optimiser and
            checkpoints; under FSDP or DeepSpeed it is sharded too.
        kwargs: as for ``transformers.Trainer``. A batch of any module holds its arguments by name, ``labels`` where
            gold labels are learned, and ``teacher_logprobs`` where there is no live teacher.

    Raises:
        TrainingError: from ``train()``, if the loss is not a number.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        objectives: Sequence[AnyObjective] | None = None,
        teacher: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        distilled: Distilled
        if isinstance(model, Distilled):
            if objectives is not None or teacher is not None:
                raise ValueError(f"{type(model).__name__} has its objectives and teacher already; wanted None for both")
            distilled = model
        else:
            kind: type[Distilled] = LanguageModel if is_language_model(model) else AnyModule
            distilled = kind(model, objectives or (), teacher)
        args = args or TrainingArguments()
        # Which columns are used is for the objectives to say.
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False
        if args.gradient_checkpointing:
            # The wrapper has no such method; and the teacher keeps nothing for a backward pass anyway.
            student: Any = distilled.student
            student.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
            args.gradient_checkpointing = False
        super().__init__(model=distilled, args=args, data_collator=data_collator or default_data_collator, **kwargs)
        self.objectives = distilled.objectives
        self.loss_is_scaled_for_ga = True
        self.distilled = distilled
        self._logged: dict[str, list[float]] = {}
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths is not None and args.max_steps <= 0:
            # The loader gives the batches of all epochs in a row, as their number differs.
            args.max_steps = math.ceil(len(self.get_train_dataloader()) / args.gradient_accumulation_steps)
        self._names = _unique([objective.name for objective in self.objectives])
        if self.train_dataset is not None:
            distilled.probe(self._prepare_inputs(self.data_collator([self.train_dataset[0]])), args.seed)
        if distilled.teacher is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                distilled.teacher = self.accelerator.prepare_model(distilled.teacher, evaluation_mode=True)
            else:
                distilled.teacher = distilled.teacher.to(args.device)

    @property
    def real_share(self) -> float:
        """Tokens that are no padding, as a share of those of all batches; 1 where batches are not by tokens."""
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths is None:
            return 1.0
        batches = list(self.get_train_dataloader().batch_sampler or ())
        padded: int = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
        real: int = sum(lengths[row] for batch in batches for row in batch)
        return real / padded

    @property
    def student(self) -> nn.Module:
        """What is trained, without what is only trained along."""
        return self.distilled.student

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Items that each objective supervises in this optimiser step on all processes, [objectives]."""
        counts = torch.zeros(len(self.objectives), dtype=torch.long, device=device)
        for batch in batch_samples:
            counts += torch.stack([mask.sum().to(device) for mask in self.distilled.supervised(batch)])
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The weighted sum for one micro-batch."""
        values = model(inputs, num_items_in_batch)
        total = values.total
        if not bool(torch.isfinite(total.detach())):
            raise TrainingError(
                f"the loss is {float(total.detach())} at step {self.state.global_step}{self._named(inputs)}; the last "
                f"checkpoint in {self.args.output_dir} is kept. Lower train.learning_rate or train in float32"
            )
        if model.training:
            for name, value in zip(self._names, values.each.tolist(), strict=True):
                self._logged.setdefault(name, []).append(value)
        # DDP and FSDP average the gradients of the processes, and the denominators already count all of them.
        processes = self.args.world_size if num_items_in_batch is not None else 1
        loss = total * processes if processes > 1 else total
        return (loss, values) if return_outputs else loss

    def _named(self, inputs: dict[str, Tensor]) -> str:
        """Which rows a batch has, where it knows."""
        rows = inputs.get("index")
        examples = getattr(self.train_dataset, "examples", None)
        if rows is None:
            return ""
        return " in the batch of " + ", ".join(examples[i].id if examples else f"row {i}" for i in rows.tolist())

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss on held-out data: true means over all its items, however it is cut into batches."""
        del ignore_keys
        model = self.accelerator.unwrap_model(self.model) if self.args.world_size == 1 else self.model_wrapped
        training = model.training
        model.eval()
        sums = torch.zeros(len(self.objectives), dtype=torch.float64)
        counts = torch.zeros_like(sums)
        with torch.no_grad():
            for raw in self.get_eval_dataloader(eval_dataset):
                batch = self._prepare_inputs(raw)
                # A denominator of 1 gives sums.
                ones = torch.ones(len(self.objectives), device=self.args.device)
                sums += model(batch, ones).each.double().cpu()
                counts += torch.tensor([float(mask.sum()) for mask in self.distilled.supervised(batch)])
        if self.args.world_size > 1:
            both = torch.stack([sums, counts])[None].to(self.args.device)
            sums, counts = self.accelerator.gather(both).sum(0).cpu()
        model.train(training)
        means = sums / counts.clamp(min=1)
        weights = torch.tensor([objective.weight for objective in self.objectives], dtype=torch.float64)
        metrics = {f"{metric_key_prefix}_loss": float((weights * means).sum())}
        metrics |= {f"{metric_key_prefix}_{n}": float(v) for n, v in zip(self._names, means, strict=True)}
        if len(self.objectives) > 1 and self.is_in_train:
            metrics |= self._gradient_norms()
        self.log(metrics)
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        self.control = control
        return metrics

    def gradient_norms(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """The norm of each objective's gradient on one batch, over all trained parameters, without its weight."""
        parameters = [p for p in self.distilled.parameters() if p.requires_grad]
        norms = {}
        for number, (name, objective) in enumerate(zip(self._names, self.objectives, strict=True)):
            total = self.distilled(self._prepare_inputs(batch), None, number).total / objective.weight
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            norms[name] = float(torch.stack([g.double().norm() for g in gradients if g is not None]).norm())
        return norms

    def _gradient_norms(self) -> dict[str, float]:
        """The same for the first batch of the data; sharded weights show no gradients on the side."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return {}
        norms = self.gradient_norms(next(iter(self.get_train_dataloader())))
        return {f"gradient_{name}": value for name, value in norms.items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log each objective on its own, as the mean over the steps since the last log."""
        if "loss" in logs:
            steps = self.args.gradient_accumulation_steps
            logs |= {f"loss_{name}": steps * sum(v) / len(v) for name, v in self._logged.items() if v}
            self._logged = {}
        super().log(logs, *args, **kwargs)

    # Batches by a budget of tokens

    def get_train_dataloader(self) -> DataLoader[Any]:
        """By a budget of tokens where the dataset knows its lengths, else the Trainer's."""
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths is None:
            return super().get_train_dataloader()  # type: ignore[no-any-return]
        return self._token_loader(self.train_dataset, lengths, shuffled=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """By a budget of tokens where the dataset knows its lengths, else the Trainer's."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        lengths = getattr(dataset, "lengths", None)
        if lengths is None:
            return super().get_eval_dataloader(eval_dataset)  # type: ignore[no-any-return]
        return self._token_loader(dataset, lengths, shuffled=False)

    def _token_loader(self, dataset: Any, lengths: Sequence[int], *, shuffled: bool) -> DataLoader[Any]:
        batches = TokenBudgetBatches(
            lengths,
            dataset.tokens_per_batch,
            seed=self.args.seed,
            num_processes=self.args.world_size,
            rank=self.args.process_index,
        )
        return DataLoader(
            dataset,
            batch_sampler=Epochs(batches, self.args.num_train_epochs if shuffled else 1),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    # Checkpoints hold the weights under training, tied ones once

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        from safetensors.torch import save_file

        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        seen: set[tuple[int, torch.Size]] = set()
        state = {}
        for name, tensor in (state_dict or self.distilled.state_dict()).items():
            place = (tensor.data_ptr(), tensor.shape)
            if place not in seen or tensor.numel() == 0:
                seen.add(place)
                state[name] = tensor.contiguous()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Tied weights are stored once, so the others are missing by design; anything unexpected is an error."""
        if load_result.unexpected_keys:
            raise TrainingError(
                f"the checkpoint holds weights that this model does not have ({load_result.unexpected_keys[0]}, ...): "
                "it is of another recipe; delete it or train in another folder"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / COMPLETE).touch()


def _unique(names: Sequence[str]) -> list[str]:
    """Names for the log: a second one of the same name gets a number."""
    return [
        name if names[:i].count(name) == 0 else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)
    ]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
