"""DistillationTrainer: transformers' Trainer with a weighted sum of objectives as its loss."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.utils import strtobool

from attar.errors import DataError, TrainingError
from attar.train.batches import Epochs, SharedBatches, TokenBudgetBatches
from attar.train.checkpoints import COMPLETE, another_model, last_checkpoint, untied
from attar.train.distilled import AnyModule, Distilled
from attar.train.language_model import LanguageModel, is_language_model
from attar.train.objectives import AnyObjective, Feature
from attar.train.onpolicy import OnPolicyRows
from attar.train.sharding import check_launch, is_sharded, keep_precision, spread_teacher

__all__ = ["DistillationTrainer", "last_checkpoint"]


class DistillationTrainer(Trainer):
    """Trains a model on objectives; everything else (precision, accumulation, trackers, resume) is the Trainer's.

    The loss is the sum over objectives of weight times the mean over the examples, or tokens, that the objective
    supervises in the whole optimiser step, so neither accumulation nor the number of processes changes the gradient.
    Where tokens have weights the mean is a weighted one, over the sum of the step's weights.
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
        for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} is given, and evaluate() gives the objectives' values alone; call trainer.student for "
                    "anything else, in a callback perhaps"
                )
        args = args or TrainingArguments()
        # Which columns are used is for the objectives to say.
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False
        super().__init__(model=distilled, args=args, data_collator=data_collator or default_data_collator, **kwargs)
        self.objectives = distilled.objectives
        self.loss_is_scaled_for_ga = True
        self.distilled = distilled
        # Since the last log: each objective's share of this process, summed over steps, and how many of these had
        # something for it to learn.
        self._sums = torch.zeros(len(self.objectives), dtype=torch.float64)
        self._steps = torch.zeros(len(self.objectives), dtype=torch.float64)
        rows = self.train_dataset
        self._on_policy = rows if isinstance(rows, OnPolicyRows) and rows.share else None
        self._all_batches: Epochs | None = None
        self._names = _unique([objective.name for objective in self.objectives])
        check_launch(self.accelerator, asked_fsdp=strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")))
        keep_precision(self.accelerator, ids_alone=isinstance(distilled, LanguageModel))
        # Shapes are asked of whole models: before the teacher is sharded, after both are on one device.
        sharded = is_sharded(self.accelerator)
        if distilled.teacher is not None and not sharded:
            distilled.place_teacher(spread_teacher(self.accelerator, distilled.teacher))
        if self.train_dataset is not None and any(isinstance(objective, Feature) for objective in self.objectives):
            distilled.probe(self.data_collator([next(iter(self.train_dataset))]), args.seed)
        if distilled.teacher is not None and sharded:
            distilled.place_teacher(spread_teacher(self.accelerator, distilled.teacher))

    @property
    def total_steps(self) -> int:
        """Optimiser steps that ``train()`` will take, of batches by tokens; ``args.max_steps`` else."""
        if getattr(self.train_dataset, "lengths", None) is None:
            return int(self.args.max_steps)
        return -(-len(self.get_train_dataloader()) // int(self.args.gradient_accumulation_steps))

    @property
    def real_share(self) -> float:
        """Tokens that are no padding, as a share of those of all batches; 1 where batches are not by tokens."""
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths is None:
            return 1.0
        self.get_train_dataloader()
        batches = list(self._all_batches or ())
        padded: int = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
        real: int = sum(lengths[row] for batch in batches for row in batch)
        return real / padded

    @property
    def student(self) -> nn.Module:
        """What is trained, without what is only trained along."""
        return self.distilled.student

    def student_state_dict(self) -> dict[str, Tensor]:
        """The student's weights, whole, tied ones under each name: on the main process; on others it may be empty.

        Every process has to call it, as sharded weights are gathered.
        """
        state = self.accelerator.get_state_dict(self.model_wrapped)
        prefix = "student."
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """What each objective supervises in this optimiser step on all processes: items, or weights, [objectives]."""
        # In float64, which counts exactly; and one process may have weights where another has none.
        counts = torch.zeros(len(self.objectives), dtype=torch.float64, device=device)
        for batch in batch_samples:
            sums = [mask.sum(dtype=torch.float64) for mask in self.distilled.supervised(batch)]
            counts += torch.stack(sums).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        self._steps += (counts > 0).cpu()
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
            self._sums += values.each.double().cpu()
            if self._on_policy is not None and num_items_in_batch is not None:
                self._on_policy.learned(inputs, values.each, num_items_in_batch)
        # DDP and FSDP average the gradients of the processes, and the denominators already count all of them.
        processes = self.args.world_size if num_items_in_batch is not None else 1
        loss = total * processes if processes > 1 else total
        return (loss, values) if return_outputs else loss

    def _named(self, inputs: dict[str, Tensor]) -> str:
        """Which rows a batch has; where it does not know, its shapes and which of them are not numbers."""
        rows = inputs.get("index")
        examples = getattr(self.train_dataset, "examples", None)
        if rows is None:
            said = [
                f"{key} {list(value.shape)}" + ("" if bool(torch.isfinite(value).all()) else ", which holds NaN or inf")
                for key, value in inputs.items()
                if isinstance(value, Tensor)
            ]
            return f" in a batch of {'; '.join(said)}"
        return " in the batch of " + ", ".join(examples[i].id if examples else f"row {i}" for i in rows.tolist())

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss on held-out data: true means over all its items, however it is cut into batches.

        Random numbers are left as they were, so that training goes on as it would have without.
        """
        del ignore_keys
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            each = [self.evaluate(d, metric_key_prefix=f"{metric_key_prefix}_{name}") for name, d in dataset.items()]
            return {name: value for metrics in each for name, value in metrics.items()}
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            metrics = self._losses(dataset, metric_key_prefix)
            if len(self.objectives) > 1 and self.is_in_train:
                metrics |= self._gradient_norms()
        self.log(metrics)
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        self.control = control
        return metrics

    def _losses(self, dataset: Any, prefix: str) -> dict[str, float]:
        """The weighted sum and each objective's mean."""
        model = self.model_wrapped
        if is_sharded(self.accelerator) and model is self.distilled and not isinstance(model, FSDPModule):
            raise TrainingError("evaluate() is called before train(), which shards the student; call it after")
        training = model.training
        model.eval()
        sums = torch.zeros(len(self.objectives), dtype=torch.float64)
        counts = torch.zeros_like(sums)
        loader = self.get_eval_dataloader(dataset)
        shared: Any = loader.batch_sampler
        with torch.no_grad():
            for number, raw in enumerate(loader):
                batch = self._prepare_inputs(raw)
                # A denominator of 1 gives sums.
                ones = torch.ones(len(self.objectives), device=self.args.device)
                values = model(batch, ones).each
                if number < shared.own:
                    sums += values.double().cpu()
                    masks = self.distilled.supervised(batch)
                    counts += torch.stack([mask.sum(dtype=torch.float64).cpu() for mask in masks])
        if self.args.world_size > 1:
            both = torch.stack([sums, counts])[None].to(self.args.device)
            sums, counts = self.accelerator.gather(both).sum(0).cpu()
        model.train(training)
        means = sums / counts.masked_fill(counts == 0, 1.0)
        weights = torch.tensor([objective.weight for objective in self.objectives], dtype=torch.float64)
        metrics = {f"{prefix}_loss": float((weights * means).sum())}
        return metrics | {f"{prefix}_{n}": float(v) for n, v in zip(self._names, means, strict=True)}

    def gradient_norms(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """The norm of each objective's gradient on one batch, over all trained parameters, without its weight.

        In eval mode, so that dropout does not differ among objectives and no running mean is moved.
        """
        parameters = [p for p in self.distilled.parameters() if p.requires_grad]
        inputs = self._prepare_inputs(batch)
        norms = {}
        training = self.distilled.training
        self.distilled.eval()
        for number, name in enumerate(self._names):
            total = self.distilled(inputs, None, number).total
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            norms[name] = float(torch.stack([g.double().norm() for g in gradients if g is not None]).norm())
        self.distilled.train(training)
        return norms

    def _gradient_norms(self) -> dict[str, float]:
        """The same for the first batch of the data; sharded weights show no gradients on the side."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return {}
        # By hand: a loader of the Trainer's would count as one of training's.
        if self._all_batches is not None:
            rows = [self.train_dataset[row] for row in next(iter(self._all_batches))]
        else:
            rows = list(itertools.islice(iter(self.train_dataset), self.args.per_device_train_batch_size))
        norms = self.gradient_norms(self.data_collator(rows))
        return {f"gradient_{name}": value for name, value in norms.items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log each objective on its own, as the mean over the steps since the last log."""
        if "loss" in logs:
            means = self._over_processes(self._sums) / self._steps
            logs |= {f"loss_{n}": v for n, v in zip(self._names, means.tolist(), strict=True) if v == v}
            self._sums, self._steps = torch.zeros_like(self._sums), torch.zeros_like(self._steps)
            if self._on_policy is not None:
                logs |= self._on_policy.figures(self._over_processes(self._on_policy.counted()))
        if self._all_batches is not None and self.state.max_steps > 0:
            self.state.epoch = self._all_batches.epochs * self.state.global_step / self.state.max_steps
        super().log(logs, *args, **kwargs)

    def _over_processes(self, sums: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return sums
        return self.accelerator.gather(sums[None].to(self.args.device)).sum(0).cpu()  # type: ignore[no-any-return]

    # Batches by a budget of tokens

    def get_train_dataloader(self) -> DataLoader[Any]:
        """By a budget of tokens where the dataset knows its lengths, else the Trainer's."""
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths is None:
            return super().get_train_dataloader()  # type: ignore[no-any-return]
        args = self.args
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(args, name) == "epoch":
                raise ValueError(
                    f"{name} is epoch, and batches of equally many tokens run through epochs without a stop, as they "
                    "are not as many in each; set it to steps"
                )
        batches = self._token_batches(self.train_dataset, lengths)
        micro_batches = args.max_steps * args.gradient_accumulation_steps if args.max_steps > 0 else None
        self._all_batches = Epochs(batches, args.num_train_epochs, micro_batches)
        if self._on_policy is None:
            return self._loader(self.train_dataset, self._all_batches)
        mixed = self._on_policy.begin(self._all_batches, self.distilled, self.args, self.accelerator, self._names)
        return self._loader(self.train_dataset, mixed)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """As the Trainer's; batches by tokens are all epochs' in a row."""
        if self._all_batches is not None:
            args = copy.copy(args)
            args.num_train_epochs = 1
        return super().set_initial_training_values(args, dataloader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches that are the same on any number of processes: by a budget of tokens, or of so many rows, in order.

        Raises:
            DataError: the data is empty or does not say how long it is.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if not hasattr(dataset, "__len__") or len(dataset) == 0:
            raise DataError("the evaluation data is empty or has no length; give a dataset of one row or more")
        lengths = getattr(dataset, "lengths", None)
        if lengths is not None:
            batches = list(TokenBudgetBatches(lengths, dataset.tokens_per_batch, seed=self.args.seed))
        else:
            size = self.args.eval_batch_size
            batches = [list(range(len(dataset)))[start : start + size] for start in range(0, len(dataset), size)]
        return self._loader(dataset, SharedBatches(batches, self.args.world_size, self.args.process_index))

    def _token_batches(self, dataset: Any, lengths: Sequence[int]) -> TokenBudgetBatches:
        return TokenBudgetBatches(
            lengths,
            dataset.tokens_per_batch,
            seed=self.args.seed,
            num_processes=self.args.world_size,
            rank=self.args.process_index,
        )

    def _loader(self, dataset: Any, batches: Epochs | SharedBatches | list[list[int]]) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_sampler=batches,
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
        state = untied(self.distilled, self.distilled.state_dict() if state_dict is None else state_dict)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise another_model(resume_from_checkpoint, str(error).splitlines()[-1].strip()) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Tied weights are stored once, so the others are missing by design; all else is an error."""
        folder = self.args.output_dir
        missing = [
            key for key in untied(self.distilled, self.distilled.state_dict()) if key in load_result.missing_keys
        ]
        if load_result.unexpected_keys:
            raise another_model(folder, f"it holds {load_result.unexpected_keys[0]}, which this model does not have")
        if missing:
            raise another_model(folder, f"it does not hold {missing[0]}, which this model has")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._on_policy is not None:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            self._on_policy.save(folder, self.args.process_index, self.args.world_size)
        # Every process writes a part.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / COMPLETE).write_text(str(self._batches_per_step), "utf-8")

    @property
    def _batches_per_step(self) -> int:
        """Batches of one optimiser step on all processes."""
        return int(self.args.world_size * self.args.gradient_accumulation_steps)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """On another number of processes a step goes on to be the same batches, or the data would be miscounted."""
        marker = None if checkpoint is None else Path(checkpoint) / COMPLETE
        then = marker.read_text("utf-8") if marker is not None and marker.exists() else ""
        now = self._batches_per_step
        if then and int(then) != now:
            raise TrainingError(
                f"a step of {checkpoint} took {then} batches (processes times gradient_accumulation_steps), and one of "
                f"this run takes {now}; set gradient_accumulation_steps to {int(then) / self.args.world_size:g}, or "
                f"start so many processes that they divide {then}"
            )
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._on_policy is not None and checkpoint is not None:
            self._on_policy.load(Path(checkpoint), self.args.process_index, self.args.world_size)


def _unique(names: Sequence[str]) -> list[str]:
    """Names for the log: a second one of the same name gets a number."""
    return [
        name if names[:i].count(name) == 0 else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)
    ]
