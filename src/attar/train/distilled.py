"""Student, teacher and objectives as one module: a batch goes in, the loss comes out.

One forward is all that DDP, FSDP2 and DeepSpeed see, so the weights that the loss reads, the head's included, are whole
while it reads them. The teacher stands outside the module tree: not trained, not saved, always in eval mode.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attar.errors import CapabilityError
from attar.losses import masked_mean
from attar.losses.projectors import build_projectors, projector_key
from attar.taps import Taps, resolve
from attar.train.objectives import LABELS, TEACHER, AnyObjective, Feature, Logit, Objective, Response

__all__ = ["AnyModule", "Distilled", "Values", "at"]

Batch = Mapping[str, Tensor]


class Values(NamedTuple):
    """What a forward gives."""

    total: Tensor
    """scalar, the only one with a gradient: the sum of weight times value"""
    each: Tensor
    """[objectives], detached: each value without its weight"""


class Distilled(nn.Module):
    """What any module and a causal language model have in common.

    Args:
        student: what is trained.
        objectives: at least one.
        teacher: takes the student's inputs; None where batches hold the teacher's signals.
    """

    def __init__(self, student: nn.Module, objectives: Sequence[AnyObjective], teacher: nn.Module | None) -> None:
        super().__init__()
        if not objectives:
            raise ValueError("objectives is empty; give at least one, such as attar.Logit()")
        if teacher is student:
            raise ValueError("teacher and student are one module, which is to be frozen and trained; give a copy")
        self.student = student
        self.projectors = nn.ModuleDict()
        self.objectives = tuple(objectives)
        # In a tuple, so that torch does not register it as a part of this module.
        self._outside = (None if teacher is None else teacher.eval().requires_grad_(False),)
        self._pairs = {
            number: self._matched(objective)
            for number, objective in enumerate(self.objectives)
            if isinstance(objective, Feature)
        }

    @property
    def teacher(self) -> nn.Module | None:
        """The live teacher."""
        return self._outside[0]

    def place_teacher(self, module: nn.Module) -> None:
        """Put the same teacher, moved or wrapped, in its place. An assignment would make it a part of this module."""
        self._outside = (module,)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """As of the student, for the Trainer; the teacher keeps nothing for a backward pass anyway."""
        student: Any = self.student
        student.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The same under its name before transformers 5.23."""
        student: Any = self.student
        student.gradient_checkpointing_enable(**options)

    def probe(self, batch: Batch, seed: int) -> None:
        """Build the projectors that objectives need, from the shapes that one batch gives."""
        if not self._pairs:
            return
        device = next(self.student.parameters()).device
        batch = {key: value.to(device) for key, value in batch.items()}
        pairs = [pair for matched in self._pairs.values() for pair in matched]
        losses = [self.objectives[n].function for n, matched in self._pairs.items() for _ in matched]  # type: ignore[union-attr]
        training = self.student.training
        self.student.eval()
        with torch.no_grad(), self._tapped(self.student, 0) as ours, self._tapped(self.teacher, 1) as theirs:
            self._run(batch)
            shapes = [
                {
                    pair[side]: tuple(self._layer(batch, layers, pair[side], loss.ranks).shape)
                    for pair, loss in zip(pairs, losses, strict=True)
                }
                for side, layers in enumerate((ours, theirs))
            ]
        self.student.train(training)
        self.projectors = build_projectors(pairs, shapes[0], shapes[1], losses, seed)
        first = next(self.student.parameters())
        self.projectors.to(first.device, torch.promote_types(first.dtype, torch.float32))

    def forward(self, batch: Batch, denominators: Tensor | None = None, only: int | None = None) -> Values:
        """The loss of one micro-batch.

        Args:
            batch: the student's inputs, and the targets.
            denominators: [objectives], what each sum is divided by: the supervised items of the whole optimiser step,
                or the sum of their weights, so that neither accumulation nor the number of processes changes the
                gradient; None for this batch's.
            only: the number of the one objective to compute, without its weight; None for all.

        Raises:
            CapabilityError: an objective needs the teacher, and there is neither a teacher nor its signal.
        """
        chosen = {n: o.weight for n, o in enumerate(self.objectives)} if only is None else {only: 1.0}
        features = [number for number in chosen if number in self._pairs]
        with self._tapped(self.student, 0, features) as ours, self._tapped(self.teacher, 1, features) as theirs:
            outputs = self._run(batch)
            on_outputs = {n: weight for n, weight in chosen.items() if n not in self._pairs}
            total, values = self._on_outputs(batch, outputs, on_outputs, denominators)
            for number in features:
                value = self._feature(number, batch, ours, theirs, at(denominators, number))
                total, values[number] = total + chosen[number] * value, value.detach()
        zero = total.new_zeros(())
        return Values(total, torch.stack([values.get(n, zero).to(total.dtype) for n in range(len(self.objectives))]))

    @abstractmethod
    def supervised(self, batch: Batch) -> list[Tensor]:
        """What each objective's mean is over, a tensor an objective: a bool mask, or weights of at least 0."""

    @abstractmethod
    def _run(self, batch: Batch) -> Any:
        """Both sides' outputs."""

    @abstractmethod
    def _on_outputs(
        self, batch: Batch, outputs: Any, chosen: Mapping[int, float], denominators: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The weighted sum of the chosen objectives (number -> weight), and each one's value, detached."""

    @abstractmethod
    def _rows(self, batch: Batch, values: Tensor) -> Tensor:
        """A feature loss's values, one an item of ``supervised``."""

    def _weights(self, batch: Batch) -> Tensor | None:
        """How much each item of ``supervised`` counts, [items]; None for 1."""
        return None

    @abstractmethod
    def _layer(self, batch: Batch, layers: Taps | None, path: str, ranks: tuple[int, ...]) -> Tensor:
        """What was tapped at a path, as a loss of these ranks takes it; ``layers`` is None for cached signals."""

    def _mask(self, batch: Batch, layer: Tensor) -> Tensor | None:
        """The rows of a layer that are no padding; None for all."""
        padding = batch.get("attention_mask")
        return padding != 0 if padding is not None and layer.dim() == 3 and padding.shape == layer.shape[:2] else None

    def _inner(self, module: nn.Module) -> nn.Module:
        """The module that paths count from."""
        return module

    def _matched(self, feature: Feature) -> list[tuple[str, str]]:
        """A feature's pairs, with globs resolved: as many matches on both sides, in order."""
        pairs = []
        for mine, theirs in feature.match.items():
            ours = [tap.name for tap in resolve(self._inner(self.student), [mine])]
            others = [tap.name for tap in resolve(self._inner(self.teacher), [theirs])] if self.teacher else [theirs]
            if len(ours) != len(others):
                raise ValueError(
                    f"{mine!r} matches {len(ours)} layers of the student and {theirs!r} {len(others)} of the teacher; "
                    "wanted as many on both sides"
                )
            pairs += list(zip(ours, others, strict=True))
        return pairs

    def _tapped(self, module: nn.Module | None, side: int, numbers: Sequence[int] | None = None) -> Any:
        """Taps on the layers that these objectives (None: all) read of a side; nothing where there are none."""
        wanted = self._pairs if numbers is None else {number: self._pairs[number] for number in numbers}
        paths = list(dict.fromkeys(pair[side] for matched in wanted.values() for pair in matched))
        return self._taps(module, paths) if module is not None and paths else _Nothing()

    def _taps(self, module: nn.Module, paths: Sequence[str]) -> Taps:
        """Taps on a side as it is called."""
        return Taps(self._inner(module), paths)

    def _feature(
        self, number: int, batch: Batch, ours: Taps, theirs: Taps | None, denominator: Tensor | None
    ) -> Tensor:
        objective = self.objectives[number]
        assert isinstance(objective, Feature)
        loss, matched = objective.function, self._pairs[number]
        total: Any = 0.0
        for mine, other in matched:
            student = self._layer(batch, ours, mine, loss.ranks)
            teacher = self._layer(batch, theirs, other, loss.ranks)
            key = projector_key(mine, other)
            if key in self.projectors:
                student = self.projectors[key](student.to(_dtype(self.projectors[key], student)))
            values = self._rows(batch, loss(student, teacher.to(student.device), self._mask(batch, student)))
            weights = self._weights(batch)
            weights = torch.ones_like(values, dtype=torch.bool) if weights is None else weights
            total = total + masked_mean(values, weights, denominator)
        return total / len(matched)  # type: ignore[no-any-return]


class AnyModule(Distilled):
    """Any module: it is called with the batch, and its logits are compared.

    A batch holds the module's arguments by name, and targets: ``labels``, and ``teacher_logprobs`` where there is no
    live teacher. The module returns logits [examples, classes], or an object or mapping with ``logits``.
    """

    def supervised(self, batch: Batch) -> list[Tensor]:
        """Examples: those that the objective says; all for features."""
        everything = torch.ones(len(next(iter(batch.values()))), dtype=torch.bool)
        for objective in self.objectives:
            _check_targets(objective, batch, live=self.teacher is not None)
        return [everything if isinstance(o, Feature) else o.supervised(batch) for o in self.objectives]

    def _run(self, batch: Batch) -> tuple[Any, Any]:
        inputs = {key: value for key, value in batch.items() if key not in (TEACHER, LABELS)}
        answers = None
        if self.teacher is not None:
            with torch.no_grad():
                answers = self.teacher(**inputs)
        return self.student(**inputs), answers

    def _on_outputs(
        self, batch: Batch, outputs: Any, chosen: Mapping[int, float], denominators: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        values: dict[int, Tensor] = {}
        total = torch.zeros((), device=next(self.student.parameters()).device)
        if not chosen:
            return total, values
        logits = _logits(outputs[0], "student")
        if outputs[1] is not None:
            batch = {**batch, TEACHER: _logits(outputs[1], "teacher")}
        for number, weight in chosen.items():
            objective = self.objectives[number]
            assert isinstance(objective, Objective)
            _check_targets(objective, batch, live=False)
            mask, denominator = objective.supervised(batch), at(denominators, number)
            if denominator is None and not bool(mask.any()):
                continue
            value = masked_mean(objective.values(logits, batch), mask, denominator)
            total, values[number] = total + weight * value, value.detach()
        return total, values

    def _rows(self, batch: Batch, values: Tensor) -> Tensor:
        if values.dim() == 1:
            return values
        mask = self._mask(batch, values[..., None])
        counts = values.shape[1] if mask is None else mask.sum(1).clamp(min=1)
        return values.flatten(1).sum(1) / counts

    def _layer(self, batch: Batch, layers: Taps | None, path: str, ranks: tuple[int, ...]) -> Tensor:
        if layers is None:
            raise CapabilityError(f"a feature objective reads {path!r} of the teacher, and no teacher is given")
        return layers[path]


class _Nothing:
    """In place of taps where nothing is tapped."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        return None


def at(denominators: Tensor | None, number: int) -> Tensor | None:
    """An objective's denominator; one that supervises nothing in the whole step divides 0 by 1."""
    if denominators is None:
        return None
    denominator = denominators[number]
    return torch.where(denominator == 0, torch.ones_like(denominator), denominator)


def _dtype(module: nn.Module, tensor: Tensor) -> torch.dtype:
    first = next(module.parameters(), None)
    return tensor.dtype if first is None else first.dtype


def _logits(outputs: Any, side: str) -> Tensor:
    """Logits [rows, classes] of what a module returned."""
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif not isinstance(outputs, Tensor):
        found = getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise CapabilityError(
            f"the {side} returned {type(outputs).__name__} without logits; return a tensor, or an object or mapping "
            "with logits, or use feature objectives only"
        )
    if found.dim() != 2:
        raise CapabilityError(
            f"the {side} returned logits of shape {tuple(found.shape)}; wanted [examples, classes]: pool or flatten "
            "them in the module, and its targets alike"
        )
    return found


def _check_targets(objective: AnyObjective, batch: Batch, *, live: bool) -> None:
    """Raise unless a batch holds what an objective compares with, or a live teacher will say it."""
    gold = isinstance(objective, Response) and objective.labels == "gold"
    if not isinstance(objective, Response | Logit) or (live and not gold):
        return
    if (LABELS if gold else TEACHER) not in batch:
        raise CapabilityError(
            f"the objective {objective.name!r} needs {LABELS if gold else TEACHER!r} in its batches"
            + ("" if gold else ", or a teacher")
            + f"; they hold {', '.join(batch)}"
        )
