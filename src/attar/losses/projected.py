"""Losses of causal language models from hidden states and an output head: no [tokens, vocabulary] tensor is built.

The tokens are taken in chunks. The gradient with respect to a chunk's logits is computed along with the values and
goes straight through the head into the gradients of hidden states, weight and bias, so that nothing of a chunk is kept
for the backward pass. The idea is that of Wijmans et al. 2025, arXiv:2411.09009 (cut cross-entropy) and of Hsu et al.
2024, arXiv:2410.10989 (Liger's fused linear losses).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attar.losses.divergences import total_weight
from attar.losses.kinds import Divergence
from attar.losses.terms import ChunkLoss, CrossEntropyTerm, DivergenceTerm, Head, Softened, Term, at_least_float32

__all__ = ["ProjectedLoss", "projected_cross_entropy", "projected_divergence", "projected_loss"]

CHUNK_TOKENS = 256
"""Of 64, 128 and 256 the fastest on two CPU cores: the head's weight is read, and its gradient written, once a chunk.
An accelerator wants more."""

SLICES = 4
"""What is not a product with the head takes a chunk in so many parts: about seven [chunk / SLICES, vocabulary] tensors
are alive at a time beside the chunk's logits."""


class ProjectedLoss(NamedTuple):
    """The loss, and what it is made of."""

    total: Tensor
    """scalar: the sum of coefficient times term; the only one with a gradient"""
    terms: Tensor
    """[terms]: each without its coefficient, for the log"""


def projected_loss(
    hidden: Tensor, head: Head, terms: Sequence[Term], *, chunk_tokens: int = CHUNK_TOKENS
) -> ProjectedLoss:
    """Weighted means of several terms over tokens, in one pass over the student's logits.

    A term's denominator is the whole batch's where micro-batches' losses and gradients shall sum to the whole
    batch's, however it is cut (see ``masked_mean``).

    Matrix products are in the dtype of the inputs (the wider one; autocast's, where it is on), float16 in float32, as
    its gradients would underflow before a loss scale is known. Everything else is in float32, or in float64 where the
    products are.

    Args:
        hidden: [n, width], the student's hidden states of the supervised positions only.
        head: the student's. Its weight and bias get a gradient if they require one.
        terms: at least one.
        chunk_tokens: how many tokens' logits are alive at a time: memory against speed on an accelerator.

    Returns:
        Float64 where the products are, else float32. With n = 0 and denominators, 0.

    Raises:
        ValueError: shapes do not fit, a label or a number is out of its range, or a term without a denominator
            supervises nothing.
    """
    head.check("hidden", hidden)
    if not terms:
        raise ValueError("terms is empty; wanted at least one")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; wanted at least 1")
    product = head.product_dtype(hidden)
    product = torch.float32 if product == torch.float16 else product
    accumulator = at_least_float32(product)
    losses, weights, factors = [], [], []
    for term in terms:
        if not 0 <= term.coefficient < math.inf:
            raise ValueError(f"coefficient is {term.coefficient}; wanted a finite number of at least 0")
        given, loss = term.prepare(len(hidden), head.size)
        if given is None:
            given = torch.ones(len(hidden), device=hidden.device)
        if given.shape != hidden.shape[:1]:
            raise ValueError(f"weights has shape {tuple(given.shape)}; wanted one a token, ({len(hidden)},)")
        losses.append(loss)
        weights.append(given.detach().to(accumulator))
        denominator = term.denominator
        if denominator is not None and not isinstance(denominator, Tensor):
            denominator = torch.tensor(denominator, dtype=accumulator)
        factors.append(1 / total_weight(weights[-1], denominator))
    coefficients = [term.coefficient for term in terms]
    plan = _Plan(
        losses=losses,
        weights=torch.stack(weights),
        factors=torch.stack(factors),
        coefficients=torch.tensor(coefficients, dtype=accumulator, device=hidden.device),
        product=product,
        chunk_tokens=chunk_tokens,
        # Autograd's mode is off inside a Function, so what it wants has to be asked here.
        with_gradient=torch.is_grad_enabled(),
    )
    total, values = _Projected.apply(hidden, head.weight, head.bias, head, plan)  # type: ignore[no-untyped-call]
    return ProjectedLoss(total, values)


def projected_divergence(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    divergence: Divergence,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Weighted mean of ``divergence`` over tokens: ``projected_loss`` with a ``DivergenceTerm`` alone.

    Args:
        student_hidden: [n, student's width].
        student_head: what turns them into logits.
        teacher_hidden: [n, teacher's width].
        teacher_head: of the same vocabulary.
        divergence: which, and at what temperature.
        weights: [n], at least 0; None for 1 everywhere.
        denominator: above 0; None for the sum of the weights.
        chunk_tokens: see ``projected_loss``.

    Returns:
        Scalar, nats times T^2.

    Raises:
        ValueError: see ``projected_loss``.
    """
    term = DivergenceTerm(divergence, teacher_hidden, teacher_head, weights, denominator)
    return projected_loss(student_hidden, student_head, [term], chunk_tokens=chunk_tokens).total


def projected_cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Weighted mean of the cross-entropy over tokens: ``projected_loss`` with a ``CrossEntropyTerm`` alone.

    Args:
        hidden: [n, width].
        head: what turns them into logits.
        labels: [n], long, in [0, vocabulary) or -100 for none.
        weights: [n], at least 0; None for 1 everywhere.
        denominator: above 0; None for the sum of the weights of labelled tokens.
        chunk_tokens: see ``projected_loss``.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: see ``projected_loss``.
    """
    return projected_loss(
        hidden, head, [CrossEntropyTerm(labels, weights, denominator)], chunk_tokens=chunk_tokens
    ).total


class _Plan(NamedTuple):
    losses: list[ChunkLoss]
    weights: Tensor  # [terms, n]
    factors: Tensor  # [terms], 1 / denominator
    coefficients: Tensor  # [terms]
    product: torch.dtype
    chunk_tokens: int
    with_gradient: bool


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        inputs = (hidden, weight, bias)
        weights, accumulator = plan.weights, plan.weights.dtype
        gradients = [
            torch.zeros_like(tensor, dtype=accumulator)
            if needed and plan.with_gradient and tensor is not None
            else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        ]
        backward = any(gradient is not None for gradient in gradients)
        head = head.cast(plan.product)
        ignored = (weights == 0).all(dim=0)
        sums = torch.zeros_like(plan.factors)
        per_token = weights * (plan.factors * plan.coefficients)[:, None]
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _chunks(0, len(hidden), plan.chunk_tokens):
                # Cleared here, as an ignored row meets a gradient of 0 in the weight's product, and 0 * NaN is NaN.
                states = hidden[chunk].to(plan.product).masked_fill(ignored[chunk, None], 0.0)
                logits = head.logits(states)
                for rows in _chunks(chunk.start, chunk.stop, max(1, plan.chunk_tokens // SLICES)):
                    student = Softened(logits[rows.start - chunk.start : rows.stop - chunk.start])
                    upstream = None
                    for number, loss in enumerate(plan.losses):
                        values, gradient = loss(student, rows)
                        unused = weights[number, rows] == 0
                        values = values.to(accumulator).masked_fill(unused, 0.0)
                        sums[number] += (values * weights[number, rows]).sum()
                        if backward:
                            gradient.mul_(per_token[number, rows, None])
                            if bool(unused.any()):
                                gradient.masked_fill_(unused[:, None], 0.0)
                            upstream = gradient if upstream is None else upstream.add_(gradient)
                    if upstream is not None:
                        _to_products(upstream, student.logits, head)
                if backward:
                    _through_head(logits, states, head, chunk, gradients)
        means = sums * plan.factors
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        ctx.mark_non_differentiable(means)
        return (means * plan.coefficients).sum(), means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # The weight's gradient is as large as the weight: no copy where it is right as it is.
        as_it_is = bool(output == 1)
        scaled = [
            None if gradient is None else (gradient if as_it_is else gradient * output).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def _to_products(upstream: Tensor, logits: Tensor, head: Head) -> None:
    """Write the gradient of hidden @ weight.T + bias over the logits, from theirs, which is overwritten."""
    if head.softcap is not None:
        # d softcap tanh(x / softcap) = 1 - tanh^2
        upstream.mul_(logits.div_(head.softcap).square_().neg_().add_(1.0))
    if head.scale != 1:
        upstream.mul_(head.scale)
    logits.copy_(upstream)


def _through_head(upstream: Tensor, states: Tensor, head: Head, rows: slice, gradients: list[Tensor | None]) -> None:
    """Add a chunk's gradients of hidden states, weight and bias, from that of its products with the head."""
    hidden, weight, bias = gradients
    if bias is not None:
        bias[: head.size] += upstream.sum(dim=0)
    upstream = upstream.to(states.dtype)
    if hidden is not None:
        hidden[rows] = upstream @ head.weight[: head.size]
    if weight is not None:
        if weight.dtype == states.dtype:
            weight[: head.size].addmm_(upstream.T, states)
        else:
            weight[: head.size] += upstream.T @ states


def _chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
