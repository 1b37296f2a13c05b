import math

import pytest
import torch

from attar.losses import (
    CrossEntropyTerm,
    Divergence,
    Head,
    projected_cross_entropy,
    projected_divergence,
    projected_loss,
)
from divergences import (
    gradients,
    make_head,
    normal,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_precision(dtype):
    hidden = normal(6, 8, dtype=torch.float32).to(dtype).requires_grad_()
    weight = normal(40, 8, seed=1, dtype=torch.float32).to(dtype).requires_grad_()
    teacher = normal(6, 8, seed=2, dtype=torch.float32).to(dtype), Head(weight.detach().flip(0))
    loss = projected_divergence(hidden, Head(weight), *teacher, Divergence("reverse_kl"), chunk_tokens=4)
    assert loss.dtype == torch.float32
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wide_teacher = teacher[0].double(), Head(teacher[1].weight.double())
    expected = projected_divergence(exact[0], Head(exact[1]), *wide_teacher, Divergence("reverse_kl"))
    assert expected.dtype == torch.float64
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for one, other in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, exact), strict=True
    ):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def test_float16_gradients_wait_for_the_loss_scale():
    # over a million tokens each entry is below what float16 can hold, until GradScaler's factor is there
    hidden = normal(6, 8, dtype=torch.float32).half().requires_grad_()
    weight = normal(40, 8, seed=1, dtype=torch.float32).half().requires_grad_()
    loss = projected_cross_entropy(hidden, Head(weight), torch.arange(6), denominator=2.0**28)
    (gradient,) = torch.autograd.grad(loss * 2.0**28, weight)
    whole = projected_cross_entropy(hidden, Head(weight), torch.arange(6), denominator=1)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole, weight)[0])


def test_autocast():
    hidden = normal(6, 8, dtype=torch.float32).requires_grad_()
    head = make_head(8, seed=1, dtype=torch.float32)
    teacher = normal(6, 8, seed=2, dtype=torch.float32), make_head(8, seed=3, dtype=torch.float32)
    low = teacher[0].bfloat16(), teacher[1].cast(torch.bfloat16)
    expected = projected_divergence(hidden.bfloat16(), head.cast(torch.bfloat16), *low, Divergence())
    with torch.autocast("cpu", torch.bfloat16):
        loss = projected_divergence(hidden, head, *teacher, Divergence())
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(loss, hidden, head))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(3)}, r"weight has shape \(3,\) and bias None"),
        ({"bias": torch.zeros(3)}, r"weight has shape \(4, 2\) and bias \(3,\)"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": math.nan}, "scale is nan"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"vocabulary": 5}, "vocabulary is 5 and the head has 4 rows"),
        ({"vocabulary": 0}, "vocabulary is 0"),
    ],
)
def test_head_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Head(**{"weight": torch.zeros(4, 2), **arguments})


def test_projected_refuses():
    hidden, head = normal(2, 3), make_head(3)
    teacher_head = make_head(4)
    labels = torch.tensor([0, 1])
    for call, message in (
        (lambda: projected_loss(hidden, teacher_head, [CrossEntropyTerm(labels)]), r"hidden has shape \(2, 3\)"),
        (lambda: projected_loss(hidden, head, []), "terms is empty"),
        (lambda: projected_cross_entropy(hidden, head, labels, chunk_tokens=0), "chunk_tokens is 0"),
        (lambda: projected_cross_entropy(hidden, head, labels[:1]), r"labels has shape \(1,\)"),
        (lambda: projected_cross_entropy(hidden, head, labels, torch.ones(3)), r"weights \(3,\)"),
        (lambda: projected_cross_entropy(hidden, head, labels + 10), "labels holds 11 and the vocabulary has 11"),
        (lambda: projected_cross_entropy(hidden, head, labels - 1), "labels holds -1"),
        (lambda: projected_loss(hidden, head, [CrossEntropyTerm(labels, coefficient=-1.0)]), "coefficient is -1.0"),
        (
            lambda: projected_divergence(hidden, head, normal(2, 3), teacher_head, Divergence()),
            r"teacher_hidden has shape \(2, 3\)",
        ),
        (
            lambda: projected_divergence(hidden, head, normal(3, 4), teacher_head, Divergence()),
            "teacher_hidden has 3 tokens and the student's 2",
        ),
        (
            lambda: projected_divergence(hidden, head, normal(2, 4), make_head(4, vocabulary=12), Divergence()),
            "the teacher's vocabulary has 12 entries and the student's 11",
        ),
        (
            lambda: projected_divergence(hidden, head, normal(2, 4), teacher_head, Divergence(), torch.ones(2, 1)),
            r"weights has shape \(2, 1\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
