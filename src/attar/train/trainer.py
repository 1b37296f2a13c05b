"""DistillationTrainer: transformers' Trainer with a weighted sum of objectives as its loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from attar.errors import TrainingError
from attar.losses import masked_mean
from attar.train.objectives import GOLD, TEACHER, Objective

__all__ = ["DistillationTrainer", "last_checkpoint"]

# Written last into a checkpoint: one without it was cut off and is not resumed from.
COMPLETE = "complete"
_TARGETS = (TEACHER, GOLD)


class DistillationTrainer(Trainer):
    """Trains a model on objectives; everything else (precision, accumulation, trackers, resume) is the Trainer's.

    The loss is the sum over objectives of weight times the mean over the examples that the objective supervises in
    the whole optimiser step, so neither accumulation nor the number of processes changes the gradient.

    Args:
        objectives: at least one.
        kwargs: as for ``transformers.Trainer``; batches hold the model's inputs and the targets that the objectives
            read (``teacher_logprobs``, ``gold_labels``). ``args.remove_unused_columns`` must be False.

    Raises:
        TrainingError: from ``train()``, if the loss is not a number.
    """

    def __init__(self, *, objectives: Sequence[Objective], **kwargs: Any) -> None:
        if not objectives:
            raise ValueError("objectives is empty; give at least one, such as attar.Logit()")
        super().__init__(**kwargs)
        self.objectives = tuple(objectives)
        self.loss_is_scaled_for_ga = True
        self._logged: dict[str, list[float]] = {}

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Examples that each objective supervises in this optimiser step on all processes, [objectives]."""
        counts = torch.stack(
            [
                torch.stack([o.supervised(batch).sum().to(device) for batch in batch_samples]).sum()
                for o in self.objectives
            ]
        )
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
        outputs = model(**{key: value for key, value in inputs.items() if key not in _TARGETS})
        logits = outputs.logits
        total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        for number, objective in enumerate(self.objectives):
            mask = objective.supervised(inputs)
            denominator = None if num_items_in_batch is None else num_items_in_batch[number]
            if (denominator is None and not bool(mask.any())) or (denominator is not None and denominator == 0):
                continue
            # DDP averages the gradients of the processes, and the denominator already counts all of them.
            processes = self.args.world_size if denominator is not None else 1
            value = processes * masked_mean(objective.values(logits, inputs), mask, denominator)
            total = total + objective.weight * value
            if model.training:
                self._logged.setdefault(objective.name, []).append(float(value.detach()))
        if not bool(torch.isfinite(total.detach())):
            raise TrainingError(
                f"the loss is {float(total.detach())} at step {self.state.global_step}; the last checkpoint in "
                f"{self.args.output_dir} is kept. Lower train.learning_rate or train in float32"
            )
        return (total, outputs) if return_outputs else total

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Only the loss: what a student answers is measured through its engine."""
        del prediction_loss_only, ignore_keys
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log each objective on its own, as the mean over the micro-batches since the last log."""
        if "loss" in logs:
            steps = self.args.gradient_accumulation_steps
            logs |= {f"loss_{name}": steps * sum(v) / len(v) for name, v in self._logged.items() if v}
            self._logged = {}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / COMPLETE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
