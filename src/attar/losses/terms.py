"""What projected losses are made of: the output head, and terms that know their value on a chunk of logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses.divergences import IGNORED, divergence_and_gradient, soften
from attar.losses.kinds import Distribution, Divergence

__all__ = ["ChunkLoss", "CrossEntropyTerm", "DivergenceTerm", "Head", "Softened", "Term", "at_least_float32"]


@dataclass(frozen=True, eq=False)
class Head:
    """What turns hidden states into logits: softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    Args:
        weight: [rows, width].
        bias: [rows], or None.
        scale: what logits are multiplied by (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: Gemma 2's final_logit_softcapping, above 0, or None for none.
        vocabulary: the true size of the vocabulary; None for ``rows``. Rows beyond it are padding: they never carry
            probability, whatever they hold, and their gradient is 0.

    Raises:
        ValueError: the shapes do not fit, or a number is out of its range.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or (self.bias is not None and self.bias.shape != self.weight.shape[:1]):
            bias = None if self.bias is None else tuple(self.bias.shape)
            raise ValueError(
                f"weight has shape {tuple(self.weight.shape)} and bias {bias}; wanted [rows, width] and [rows]"
            )
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale is {self.scale}; wanted a finite number other than 0")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap is {self.softcap}; wanted a finite number above 0, or None for none")
        if self.vocabulary is not None and not 0 < self.vocabulary <= len(self.weight):
            raise ValueError(
                f"vocabulary is {self.vocabulary} and the head has {len(self.weight)} rows; wanted 1 to that many"
            )

    @property
    def size(self) -> int:
        """How many rows are not padding."""
        return len(self.weight) if self.vocabulary is None else self.vocabulary

    def cast(self, dtype: torch.dtype) -> Head:
        """The same head with weight and bias of that dtype, outside autograd."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return replace(self, weight=self.weight.detach().to(dtype), bias=bias)

    def product_dtype(self, hidden: Tensor) -> torch.dtype:
        """The dtype of hidden @ weight.T: the wider of the two, or autocast's where it is on."""
        kind = hidden.device.type
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        if dtype != torch.float64 and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return dtype

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [n, vocabulary] of hidden states [n, width], a new tensor without padding, at least float32."""
        bias = None if self.bias is None else self.bias[: self.size]
        logits = F.linear(hidden, self.weight[: self.size], bias)
        logits = logits.to(at_least_float32(logits.dtype))
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def check(self, name: str, hidden: Tensor) -> None:
        """Raise ValueError unless the hidden states are as wide as the head."""
        if hidden.dim() != 2 or hidden.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"{name} has shape {tuple(hidden.shape)} and its head's weight {tuple(self.weight.shape)}; "
                "wanted [n, width] and [rows, width]"
            )


class Softened:
    """The student's logits of one chunk, softened once for each temperature that terms ask for."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        """[chunk, vocabulary], at least float32"""
        self._at: dict[float, Distribution] = {}

    def at(self, temperature: float) -> Distribution:
        """The distributions at a temperature; do not write to them."""
        if temperature not in self._at:
            self._at[temperature] = soften(self.logits, temperature)
        return self._at[temperature]


ChunkLoss = Callable[[Softened, slice], tuple[Tensor, Tensor]]
"""From the student's logits of the tokens in the slice: their values [chunk], and the gradients [chunk, vocabulary]
with respect to the logits, a new tensor. Rows whose weight is 0 may hold anything. It runs outside autograd."""


class Term(Protocol):
    """One term of the loss: coefficient times the weighted sum of its values over tokens, over its denominator."""

    @property
    def coefficient(self) -> float:
        """Its factor in the total."""

    @property
    def denominator(self) -> Tensor | float | None:
        """What its sum is divided by; None for the sum of its token weights in this call."""

    def prepare(self, tokens: int, vocabulary: int) -> tuple[Tensor | None, ChunkLoss]:
        """Token weights [n] (None for all 1) and what computes a chunk; ValueError where n or vocabulary do not fit."""


@dataclass(frozen=True, eq=False)
class DivergenceTerm:
    """The divergence from a teacher. The teacher gets no gradient, and its width may differ from the student's.

    Args:
        divergence: which, and at what temperature.
        teacher_hidden: [n, teacher's width].
        teacher_head: of the same vocabulary as the student's; its padding may differ.
        weights: [n], at least 0 or bool; a token of weight 0 is ignored. None for 1 everywhere.
        denominator: above 0; None for the sum of the weights in this call.
        coefficient: finite and at least 0.
    """

    divergence: Divergence
    teacher_hidden: Tensor
    teacher_head: Head
    weights: Tensor | None = None
    denominator: Tensor | float | None = None
    coefficient: float = 1.0

    def prepare(self, tokens: int, vocabulary: int) -> tuple[Tensor | None, ChunkLoss]:
        """The teacher's logits are built for one chunk at a time, and dropped."""
        self.teacher_head.check("teacher_hidden", self.teacher_hidden)
        if len(self.teacher_hidden) != tokens:
            raise ValueError(f"teacher_hidden has {len(self.teacher_hidden)} tokens and the student's {tokens}")
        if self.teacher_head.size != vocabulary:
            raise ValueError(
                f"the teacher's vocabulary has {self.teacher_head.size} entries and the student's {vocabulary}; wanted "
                "the same tokenizer for both, and its true size in Head(vocabulary=...) where rows are padded"
            )
        # Cast once, not once a chunk.
        dtype = self.teacher_head.product_dtype(self.teacher_hidden)
        head, hidden = self.teacher_head.cast(dtype), self.teacher_hidden.detach()
        temperature = self.divergence.temperature

        def chunk(student: Softened, rows: slice) -> tuple[Tensor, Tensor]:
            logits = head.logits(hidden[rows].to(dtype))
            teacher = soften(logits.to(student.logits.dtype), temperature)
            return divergence_and_gradient(student.at(temperature), teacher, self.divergence)

        return self.weights, chunk


@dataclass(frozen=True, eq=False)
class CrossEntropyTerm:
    """The cross-entropy with labels.

    Args:
        labels: [n], long, in [0, vocabulary) or -100 for none.
        weights: [n], at least 0 or bool; a token of weight 0 or without a label is ignored. None for 1 everywhere.
        denominator: above 0; None for the sum of the weights of labelled tokens in this call.
        coefficient: finite and at least 0.
    """

    labels: Tensor
    weights: Tensor | None = None
    denominator: Tensor | float | None = None
    coefficient: float = 1.0

    def prepare(self, tokens: int, vocabulary: int) -> tuple[Tensor, ChunkLoss]:
        """The weights are 0 where there is no label; the gradient is softmax minus one-hot."""
        if self.labels.shape != (tokens,) or (self.weights is not None and self.weights.shape != (tokens,)):
            weights = None if self.weights is None else tuple(self.weights.shape)
            raise ValueError(
                f"labels has shape {tuple(self.labels.shape)} and weights {weights}; wanted one a token, ({tokens},)"
            )
        labelled = self.labels != IGNORED
        wrong = labelled & ((self.labels < 0) | (self.labels >= vocabulary))
        if bool(wrong.any()):
            raise ValueError(
                f"labels holds {int(self.labels[wrong][0])} and the vocabulary has {vocabulary} entries; wanted labels "
                f"from 0 to {vocabulary - 1}, or {IGNORED} for none"
            )

        def chunk(student: Softened, rows: slice) -> tuple[Tensor, Tensor]:
            logs, probabilities = student.at(1.0)
            labels = self.labels[rows].clamp(min=0)[:, None]
            gradient = probabilities.clone()
            gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, -1.0))
            return -logs.gather(1, labels)[:, 0], gradient

        return labelled if self.weights is None else self.weights * labelled, chunk


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype, or float32 where that is wider."""
    return torch.promote_types(dtype, torch.float32)
