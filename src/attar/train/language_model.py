"""A causal language model under distillation: at supervised tokens only, and never a [tokens, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attar.engines.heads import decoder_path, head_of, hidden_states, plain_model
from attar.errors import CapabilityError, DataError
from attar.losses import (
    IGNORED,
    CrossEntropyTerm,
    Divergence,
    DivergenceTerm,
    Head,
    SampledTerm,
    Term,
    TopKTerm,
    projected_loss,
)
from attar.taps import Taps
from attar.train.batches import SIGNAL, WEIGHTS, WRITTEN
from attar.train.distilled import Batch, Distilled, at
from attar.train.objectives import AnyObjective, Logit, Response
from attar.train.sharding import whole, whole_in_forward

__all__ = ["SUPERVISED", "LanguageModel", "is_language_model"]

SUPERVISED = "supervised"
"""batch key: which tokens are targets, bool [batch, length]"""


def is_language_model(module: nn.Module) -> bool:
    """Whether a module is a causal language model whose head can be told from its decoder.

    A masked one shows a head as well, but cannot generate; an encoder-decoder reads two inputs.
    """
    plain = plain_model(module)
    if not (hasattr(plain, "get_decoder") and hasattr(plain, "can_generate") and plain.can_generate()):
        return False
    return plain.get_output_embeddings() is not None and not plain.config.is_encoder_decoder


class _States(nn.Module):
    """A teacher whose forward gives the states at its head's input, so that FSDP2 gathers its weights for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = getattr(plain_model(model), "_no_split_modules", None)

    def tie_weights(self) -> None:
        plain_model(self.model).tie_weights()

    def forward(self, input_ids: Tensor) -> Tensor:
        return hidden_states(self.model, input_ids=input_ids)


class _Outputs(NamedTuple):
    states: Tensor
    """[supervised tokens, width]: the student's, each the one that predicts the token"""
    teacher: Tensor | None
    """[supervised tokens, teacher's width]"""


class LanguageModel(Distilled):
    """See ``Distilled``; batches hold ``input_ids`` [batch, length], padded on the right, and ``supervised``.

    Where they hold ``weights`` as well, each mean over supervised tokens is a weighted one: sum(w l) / sum(w).

    Args:
        student: a ``transformers`` causal language model, or a PEFT model around one.
        objectives: at least one.
        teacher: another; None where batches hold signals, or no objective needs one.
        tokenizer: gives the true size of the vocabulary where heads are padded; None where they are not.
        teacher_head: of cached hidden states.
        kept: [student's vocabulary], the teacher's id of each of the student's tokens, where the student's vocabulary
            is a part of the teacher's; None where they are the same.
        temperature: at which cached distributions were stored.
    """

    def __init__(
        self,
        student: nn.Module,
        objectives: Sequence[AnyObjective],
        teacher: nn.Module | None = None,
        *,
        tokenizer: Any = None,
        teacher_head: Head | None = None,
        kept: Tensor | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student, objectives, None if teacher is None else _States(teacher))
        self._head = _without_weights(head_of(student, tokenizer))
        self._kept = kept
        self._temperature = temperature
        self._teacher_model = (teacher,)
        # Once: the size of a tokenizer's vocabulary takes longer to count than a chunk of tokens takes.
        if teacher is not None:
            teacher_head = _without_weights(head_of(teacher, tokenizer if kept is None else None))
        self._teacher_head = teacher_head
        # What accelerate reads to find the layers that FSDP wraps.
        self._no_split_modules = getattr(plain_model(student), "_no_split_modules", None)
        self.config = getattr(student, "config", None)

    def tie_weights(self) -> None:
        """Make tied weights one tensor again, which FSDP2 calls after it has loaded them from one process."""
        plain_model(self.student).tie_weights()

    def supervised(self, batch: Batch) -> list[Tensor]:
        """The supervised tokens or their weights; of hard targets only those that the student did not write itself."""
        if SUPERVISED not in batch:
            raise DataError(
                f"the batch of a causal language model has no {SUPERVISED!r}, it holds {', '.join(batch)}; give rows "
                "of attar.tokens.encode_conversations, or a collator that marks the targets"
            )
        every = batch.get(WEIGHTS, batch[SUPERVISED])[:, 1:]
        recorded = every * ~batch[WRITTEN][:, None] if WRITTEN in batch else every
        return [recorded if isinstance(objective, Response) else every for objective in self.objectives]

    def _weights(self, batch: Batch) -> Tensor | None:
        return batch[WEIGHTS][:, 1:][batch[SUPERVISED][:, 1:]] if WEIGHTS in batch else None

    def _inner(self, module: nn.Module) -> nn.Module:
        inner: nn.Module = plain_model(module.model if isinstance(module, _States) else module)
        return inner

    def _taps(self, module: nn.Module, paths: Sequence[str]) -> Taps:
        model = module.model if isinstance(module, _States) else module
        return Taps(self._inner(module), paths, called=decoder_path(model))

    def _run(self, batch: Batch) -> _Outputs:
        mask = batch[SUPERVISED][:, 1:]
        ids = batch["input_ids"]
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                theirs = ids if self._kept is None else self._kept.to(ids.device)[ids]
                teacher = self.teacher(theirs)[:, :-1][mask]
        # Rows are padded on the right and a causal model never looks ahead: without an attention mask the real tokens
        # are the same, and attention is cheaper.
        return _Outputs(hidden_states(self.student, input_ids=ids)[:, :-1][mask], teacher)

    def _on_outputs(
        self, batch: Batch, outputs: _Outputs, chosen: Mapping[int, float], denominators: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if not chosen:
            return outputs.states.new_zeros(()), {}
        targets = batch["input_ids"][:, 1:][batch[SUPERVISED][:, 1:]]
        terms, weights = [], self._weights(batch)
        for number, weight in chosen.items():
            common = {"weights": weights, "denominator": at(denominators, number), "coefficient": weight}
            terms.append(self._term(self.objectives[number], batch, outputs, targets, common))
        loss = projected_loss(outputs.states, self.whole_head(), terms)
        return loss.total, dict(zip(chosen, loss.terms, strict=True))

    def whole_head(self) -> Head:
        """The student's head with the weights of this forward: FSDP2 puts whole ones in the sharded ones' place."""
        layer = plain_model(self.student).get_output_embeddings()
        bias = None if layer.bias is None else whole_in_forward(layer.bias)
        return replace(self._head, weight=whole_in_forward(layer.weight), bias=bias)

    def _term(
        self, objective: AnyObjective, batch: Batch, outputs: _Outputs, targets: Tensor, common: Mapping[str, Any]
    ) -> Term:
        if isinstance(objective, Response):
            if WRITTEN in batch:
                own = batch[WRITTEN][:, None].expand_as(batch[SUPERVISED])[:, 1:][batch[SUPERVISED][:, 1:]]
                targets = targets.masked_fill(own, IGNORED)
            return CrossEntropyTerm(targets, **common)
        if not isinstance(objective, Logit):
            raise CapabilityError(
                f"{type(objective).__name__} is an objective on logits, which a causal language model never builds; "
                "use attar.Response, attar.Logit or attar.Feature"
            )
        if outputs.teacher is not None:
            return DivergenceTerm(objective.measure, outputs.teacher, self._teachers_head(), **common)
        return self._cached(objective.measure, batch, common)

    def _cached(self, divergence: Divergence, batch: Batch, common: Mapping[str, Any]) -> Term:
        signal = {key.removeprefix(SIGNAL): value for key, value in batch.items() if key.startswith(SIGNAL)}
        stored = {"temperature": self._temperature, **common}
        if self._kept is not None and "ids" in signal:
            raise CapabilityError(
                "the cached signal names tokens of the teacher's whole vocabulary, of which the student has a part; "
                "use signals of kind hidden, or a live teacher"
            )
        if "states" in signal:
            return DivergenceTerm(divergence, signal["states"], self._teachers_head(), **common)
        if "entropy" in signal:
            return SampledTerm(divergence, signal["ids"], signal["entry_weights"], signal["entropy"], **stored)
        if "log_probs" in signal:
            return TopKTerm(divergence, signal["ids"], signal["log_probs"], signal["log_tail"], **stored)
        raise CapabilityError(
            "a logit objective needs the teacher's distribution, and there is neither a teacher nor a signal in the "
            f"batch; it holds {', '.join(batch)}"
        )

    def _teachers_head(self) -> Head:
        if self._teacher_head is None:
            raise CapabilityError("signals of kind hidden need the teacher's head; give teacher_head")
        head = self._teacher_head
        model = self._teacher_model[0]
        if model is not None:
            layer = plain_model(model).get_output_embeddings()
            head = replace(head, weight=whole(layer.weight), bias=None if layer.bias is None else whole(layer.bias))
        if self._kept is None:
            return head
        kept = self._kept.to(head.weight.device)
        return replace(
            head, weight=head.weight[kept], bias=None if head.bias is None else head.bias[kept], vocabulary=len(kept)
        )

    def _rows(self, batch: Batch, values: Tensor) -> Tensor:
        return values if values.dim() == 1 else values[:, :-1][batch[SUPERVISED][:, 1:]]

    def _layer(self, batch: Batch, layers: Taps | None, path: str, ranks: tuple[int, ...]) -> Tensor:
        if layers is None:
            key = f"{SIGNAL}layer:{path}"
            if key not in batch or 2 not in ranks:
                raise CapabilityError(
                    f"a feature objective reads {path!r} of the teacher, which is neither live nor a signal in the "
                    "batch; set distill.signals.source: live"
                )
            return batch[key]
        layer = layers[path]
        # Where the loss stands: at the states that predict supervised tokens. Relations need whole sequences.
        return layer[:, :-1][batch[SUPERVISED][:, 1:]] if layer.dim() == 3 and 2 in ranks else layer


def _without_weights(head: Head) -> Head:
    """The shape of a head alone: its weights are read anew in each forward, and would not be freed once sharded."""
    bias = None if head.bias is None else head.bias.detach().to("meta")
    return replace(head, weight=head.weight.detach().to("meta"), bias=bias)
