"""Training losses as pure functions on logits: one value per example, and the mean over the supervised ones.

A row that a loss ignores is inert in both directions: whatever it holds, NaN included, reaches neither the value nor
the gradient. A NaN in a row that does count is passed on, so that the trainer sees it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from attar.losses.kinds import Distribution, Divergence

__all__ = [
    "IGNORED",
    "cross_entropy",
    "divergence",
    "divergence_and_gradient",
    "forward_kl",
    "masked_mean",
    "soften",
    "total_weight",
]

IGNORED = -100
"""The label of an example that has none."""


def soften(logits: Tensor, temperature: float = 1.0) -> Distribution:
    """softmax(logits / temperature) and its logarithm.

    Args:
        logits: [n, vocabulary], floating point; -inf for what is impossible.
        temperature: above 0.
    """
    logs = F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    return Distribution(logs, logs.exp())


def divergence_and_gradient(
    student: Distribution, teacher: Distribution, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """The divergence of each row, and its gradient with respect to the student's logits.

    With u = logits / T and q = softmax(u), dD/du = s - q sum(s), where s are the kind's slopes q dD/dq; T^2 from the
    factor and 1 / T from u leave T.

    Args:
        student: softened by the divergence's temperature, [n, vocabulary].
        teacher: the same.
        divergence: which.

    Returns:
        [n], nats times T^2, and the gradient [n, vocabulary], a new tensor. Nothing is recorded for autograd.
    """
    with torch.no_grad():
        terms, slopes = divergence.function.parts(teacher, student)
        # Rounding can leave about -1e-7 where the two agree.
        values = terms.sum(dim=-1).clamp_(min=0.0).mul_(divergence.temperature**2)
        gradient = slopes.addcmul_(student.probabilities, slopes.sum(dim=-1, keepdim=True), value=-1.0)
        return values, gradient if divergence.temperature == 1 else gradient.mul_(divergence.temperature)


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    weights: Tensor | None = None,
) -> Tensor:
    """The divergence of each token's distributions, softened by the temperature, times temperature squared.

    An entry that both rule out (-inf: a padded vocabulary) is inert in value and gradient. The gradient is computed
    along with the value and goes to the student alone; it has no second derivative.

    Args:
        student_logits: [n, vocabulary], floating point.
        teacher_logits: [n, vocabulary], floating point; log-probabilities at temperature 1 are logits too.
        divergence: which, and at what temperature; its docstring has the formulas.
        weights: [n], at least 0, or None for 1 everywhere; a token of weight 0 is ignored, whatever its rows hold.

    Returns:
        [n], nats times T^2 (total variation has no unit); float64 where an input is float64, else float32. Never
        negative. The forward KL is infinite where the student rules out what the teacher does not, the reverse KL
        the other way round; the others are finite.

    Raises:
        ValueError: the shapes do not fit.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)} and teacher_logits "
            f"{tuple(teacher_logits.shape)}; wanted [n, vocabulary] for both"
        )
    if weights is not None and weights.shape != student_logits.shape[:1]:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)} and student_logits {tuple(student_logits.shape)}; "
            f"wanted one weight per example, ({student_logits.shape[0]},)"
        )
    ignored = None if weights is None else weights == 0
    values: Tensor = _Dense.apply(student_logits, teacher_logits, divergence, ignored)  # type: ignore[no-untyped-call]
    return values if weights is None else values * weights.to(values.dtype)


def forward_kl(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of each example, both softened by the temperature, times temperature squared.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.1: the gradient of the softened loss
    shrinks with 1 / T^2, so the factor keeps its size comparable with a hard-label loss when T changes. This is the
    true divergence, the teacher's entropy included: 0 where the two agree, never negative.

    Args:
        student_logits: [n, classes], floating point.
        teacher_logprobs: [n, classes], log-probabilities at temperature 1 in nats. They determine the teacher's
            logits up to a constant, so log_softmax(logprobs / T) is the teacher softened by T. A class of
            probability 0 (-inf) contributes nothing; a row of nothing but -inf has no distribution and is ignored.
        temperature: T, above 0.
        weights: [n], at least 0, or None for 1 everywhere; an example of weight 0 is ignored.

    Returns:
        [n], nats times T^2; float64 where an input is float64, else float32. Infinite where the student rules out
        (-inf) a class that the teacher does not.

    Raises:
        ValueError: the shapes do not fit, or the temperature is not above 0.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logprobs.shape:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)} and teacher_logprobs "
            f"{tuple(teacher_logprobs.shape)}; wanted [n, classes] for both"
        )
    known = (teacher_logprobs != float("-inf")).any(dim=-1)
    if weights is None:
        weights = known
    elif weights.shape == known.shape:  # else refused by ``divergence``
        weights = weights * known
    return divergence(student_logits, teacher_logprobs, Divergence("forward_kl", temperature), weights)


def cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example with its label; 0 where there is no label.

    Args:
        student_logits: [n, classes], floating point.
        labels: [n], long, in [0, classes) or -100 for none.

    Returns:
        [n], nats; float64 where the logits are float64, else float32.

    Raises:
        ValueError: the shapes do not fit.
    """
    if student_logits.dim() != 2 or labels.shape != student_logits.shape[:1]:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)} and labels {tuple(labels.shape)}; "
            "wanted [n, classes] and [n]"
        )
    ignored = labels == IGNORED
    logits = student_logits.to(_at_least_float32(student_logits)).masked_fill(ignored[:, None], 0.0)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


def masked_mean(values: Tensor, mask: Tensor, denominator: Tensor | None = None) -> Tensor:
    """Mean of the supervised values.

    A micro-batch's own mean weighs an example by how few supervised neighbours it happens to have. With the whole
    batch's denominator the micro-batches' results, and so their gradients, sum to the whole batch's, however it is
    cut.

    Args:
        values: [n], floating point.
        mask: [n], bool (True = supervised), or weights of at least 0. A value that is masked out may be anything, but
            its own backward sees a gradient of 0, not none: mask in the loss too where it may not be finite.
        denominator: scalar, above 0: what to divide the sum by, in place of the number supervised (or the sum of the
            weights) in this call.

    Returns:
        Scalar; float64 where the values are float64, else float32. With a denominator, 0 where nothing is supervised.

    Raises:
        ValueError: the shapes do not fit, nothing is supervised and no denominator is given, or the denominator is
            not above 0.
    """
    if values.dim() != 1 or mask.shape != values.shape:
        raise ValueError(
            f"values has shape {tuple(values.shape)} and mask {tuple(mask.shape)}; wanted one dimension, as long"
        )
    dtype = _at_least_float32(values)
    weights = mask.to(dtype)
    total = (values.to(dtype).masked_fill(weights == 0, 0.0) * weights).sum()
    return total / total_weight(weights, denominator)


def total_weight(weights: Tensor, denominator: Tensor | None = None) -> Tensor:
    """What a sum over supervised values is divided by: the denominator if there is one, else the sum of the weights.

    Args:
        weights: [n], floating point, at least 0.
        denominator: scalar, above 0.

    Returns:
        Scalar, of the weights' dtype and on their device.

    Raises:
        ValueError: nothing is supervised and no denominator is given, or the denominator is not above 0.
    """
    if denominator is None:
        denominator = weights.sum()
        if not bool(denominator > 0):
            raise ValueError(
                f"none of the {weights.shape[0]} examples is supervised, so they have no mean; give the whole batch's "
                "denominator, or leave the micro-batch out"
            )
    elif denominator.numel() != 1 or not bool(denominator > 0):
        raise ValueError(f"denominator is {denominator.tolist()}; wanted one number above 0")
    return denominator.to(device=weights.device, dtype=weights.dtype).reshape(())


def _at_least_float32(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


class _Dense(torch.autograd.Function):
    """Keeps the gradient, one [n, vocabulary] tensor, where autograd would keep every step of the formula."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence, ignored: Tensor | None
    ) -> Tensor:
        dtype = torch.promote_types(_at_least_float32(student_logits), teacher_logits.dtype)
        student = soften(student_logits.to(dtype), divergence.temperature)
        teacher = soften(teacher_logits.to(dtype), divergence.temperature)
        values, gradient = divergence_and_gradient(student, teacher, divergence)
        if ignored is not None:
            values.masked_fill_(ignored, 0.0)
            gradient.masked_fill_(ignored[:, None], 0.0)
        ctx.save_for_backward(gradient)
        ctx.dtype = student_logits.dtype
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * output[:, None]).to(ctx.dtype), None, None, None
