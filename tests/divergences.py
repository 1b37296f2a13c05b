"""The divergences and heads that the losses' tests share, and what they are compared with."""

import math

import pytest
import torch
import torch.nn.functional as F

from attar.losses import Divergence, Head

ALL = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd"),
    Divergence("jsd", beta=0.1),
    Divergence("jsd", beta=0.0),
    Divergence("jsd", beta=1.0),
    Divergence("skewed_kl"),
    Divergence("skewed_kl", alpha=0.6),
    Divergence("skewed_kl", alpha=0.0),
    Divergence("skewed_reverse_kl"),
    Divergence("skewed_reverse_kl", alpha=0.6),
    Divergence("skewed_reverse_kl", alpha=0.0),
    Divergence("total_variation"),
]
every = pytest.mark.parametrize("which", ALL, ids=str)


def at(which, temperature):
    return Divergence(which.kind, temperature, which.alpha, which.beta)


def logits(n, vocabulary, seed=0, dtype=torch.float64, scale=2.0):
    return scale * torch.randn(n, vocabulary, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def by_torch(student_logits, teacher_logits, which):
    """The papers' formulas, from F.kl_div and autograd."""

    def kl(a, b):
        return F.kl_div(b.log(), a.log(), log_target=True, reduction="none").sum(-1)

    q, p = (student_logits / which.temperature).softmax(-1), (teacher_logits / which.temperature).softmax(-1)
    alpha = 0.1 if which.alpha is None else which.alpha
    beta = 0.5 if which.beta is None else which.beta
    m = beta * p + (1 - beta) * q
    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m)),
        "skewed_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skewed_reverse_kl": lambda: kl(q, (1 - alpha) * p + alpha * q),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[which.kind]()
    return value * which.temperature**2


VOCABULARY = 11
SHAPES = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 3.0},
    "padding": {"padding": 5},
    "all": {"bias": True, "scale": 1.7, "softcap": 2.5, "padding": 3},
}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make_head(width, seed=0, bias=False, padding=0, dtype=torch.float64, vocabulary=VOCABULARY, **options):
    rows = vocabulary + padding
    return Head(
        normal(rows, width, seed=seed, dtype=dtype).requires_grad_(),
        normal(rows, seed=seed + 1, dtype=dtype).requires_grad_() if bias else None,
        vocabulary=vocabulary if padding else None,
        **options,
    )


def dense_logits(hidden, head):
    """All logits at once; padding as -inf."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits.clone()
    logits[:, head.size :] = -math.inf
    return logits


def leaves(hidden, head):
    return [hidden, head.weight] + ([] if head.bias is None else [head.bias])


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, leaves(hidden, head), retain_graph=True)


def assert_all_close(actual, expected, rtol=1e-9, atol=1e-12):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
