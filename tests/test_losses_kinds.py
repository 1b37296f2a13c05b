import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.losses import KINDS, Divergence, divergence, forward_kl
from divergences import ALL, at, by_torch, every, logits

# The machine may be shared, and how long an example takes is not what is tested.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

INF = math.inf
rows = st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3)
kinds = st.sampled_from(ALL)
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


def test_every_kind_is_tested():
    assert {which.kind for which in ALL} == set(KINDS)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        # teacher 3/4 1/4, student 1/4 3/4
        (Divergence("forward_kl"), 0.5 * math.log(3)),
        (Divergence("reverse_kl"), 0.5 * math.log(3)),
        # the mixture is 1/2 1/2, and both are as far from it
        (Divergence("jsd"), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        # beta 1/4: the mixture is 3/8 5/8
        (
            Divergence("jsd", beta=0.25),
            0.25 * (0.75 * math.log(2) + 0.25 * math.log(0.4)) + 0.75 * (0.25 * math.log(2 / 3) + 0.75 * math.log(1.2)),
        ),
        # alpha 1/4: the teacher against 3/8 5/8, the student against 5/8 3/8
        (Divergence("skewed_kl", alpha=0.25), 0.75 * math.log(2) + 0.25 * math.log(0.4)),
        (Divergence("skewed_reverse_kl", alpha=0.25), 0.25 * math.log(0.4) + 0.75 * math.log(2)),
        (Divergence("total_variation"), 0.5),
    ],
    ids=str,
)
def test_by_hand(which, expected):
    teacher = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    student = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log() + 3.0
    assert divergence(student, teacher, which).item() == pytest.approx(expected, rel=1e-12)


@every
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_value_and_gradient_are_torchs(which, temperature):
    which = at(which, temperature)
    student, teacher = logits(7, 5).requires_grad_(), logits(7, 5, seed=1)
    upstream = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    value, expected = divergence(student, teacher, which), by_torch(student, teacher, which)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(value, student, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, student, upstream)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@every
def test_gradcheck(which):
    teacher = logits(3, 4, seed=1)
    weights = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    student = logits(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: divergence(z, teacher, at(which, 2.0), weights), (student,))


@settings(max_examples=150)
@given(kinds, rows, st.floats(0.25, 20), st.floats(-10, 10, width=32))
def test_zero_where_the_two_agree(which, row, temperature, shift):
    z = torch.tensor([row], requires_grad=True)
    loss = divergence(z, z.detach() + shift, at(which, temperature))
    # float32 carries a logit of 40 / T to 4e-6 / T
    assert 0 <= loss.item() <= 1e-4 * max(temperature, temperature**2)
    exact = divergence(z.double(), z.detach().double(), at(which, temperature))
    assert exact.item() == pytest.approx(0.0, abs=1e-12)
    (gradient,) = torch.autograd.grad(exact, z)
    assert gradient.abs().max() <= 1e-12


@settings(max_examples=300)
@given(
    kinds,
    rows,
    rows,
    st.floats(0.25, 20),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_never_negative(which, student, teacher, temperature, dtype):
    z = torch.tensor([student], dtype=dtype, requires_grad=True)
    loss = divergence(z, torch.tensor([teacher]), at(which, temperature))
    assert 0 <= loss.item() < INF
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert gradient.isfinite().all()


@every
def test_bounds(which):
    # far apart: the mixtures keep what they bound finite
    loss = divergence(torch.tensor([[0.0, 300.0]]), torch.tensor([[300.0, 0.0]]), which).item()
    alpha, beta = which.alpha or 0.1, 0.5 if which.beta is None else which.beta
    bound = {
        "jsd": -beta * math.log(beta) - (1 - beta) * math.log(1 - beta) if 0 < beta < 1 else 300.0,
        "skewed_kl": 300.0 if which.alpha == 0 else -math.log(alpha),
        "skewed_reverse_kl": 300.0 if which.alpha == 0 else -math.log(alpha),
        "total_variation": 1.0,
    }.get(which.kind, 300.0)
    assert loss == pytest.approx(bound, rel=1e-5)


def test_jsd_tends_to_the_two_kls_at_its_ends():
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    near = 1e-6
    for beta, end in ((near, 0.0), (1 - near, 1.0)):
        value = divergence(student, teacher, Divergence("jsd", beta=beta)) / near
        torch.testing.assert_close(value, divergence(student, teacher, Divergence("jsd", beta=end)), rtol=1e-3, atol=0)


@every
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_t_squared(which, temperature):
    student, teacher = logits(3, 5), logits(3, 5, seed=1)
    softened = divergence(student / temperature, teacher / temperature, which)
    torch.testing.assert_close(divergence(student, teacher, at(which, temperature)), temperature**2 * softened)


@every
def test_what_both_rule_out_is_inert(which):
    which = at(which, 2.0)
    student, teacher = logits(3, 6).requires_grad_(), logits(3, 6, seed=1)
    padding = torch.full((3, 2), -INF, dtype=torch.float64)
    padded = torch.cat([student.detach()[:, :3], padding, student.detach()[:, 3:]], dim=-1).requires_grad_()
    loss = divergence(padded, torch.cat([teacher[:, :3], padding, teacher[:, 3:]], dim=-1), which)
    expected = divergence(student, teacher, which)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), padded)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    assert (gradient[:, 3:5] == 0).all()
    torch.testing.assert_close(gradient[:, [0, 1, 2, 5, 6, 7]], expected_gradient)


@every
def test_what_one_rules_out(which):
    one = torch.tensor([[0.0, 1.0, -INF]], requires_grad=True)
    both = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    bounded = which.kind == "total_variation" or (which.beta or which.alpha) not in (0.0, 1.0)
    forward = which.kind == "forward_kl" or which.beta == 0 or (which.kind == "skewed_kl" and which.alpha == 0)
    backward = which.kind == "reverse_kl" or which.beta == 1 or (which.kind == "skewed_reverse_kl" and which.alpha == 0)
    for student, teacher, infinite in ((one, both, forward), (both, one, backward)):
        loss = divergence(student, teacher.detach(), which)
        assert (loss.item() == INF) == infinite
        if not infinite:
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert gradient.isfinite().all()
    assert bounded or forward or backward


@every
@pytest.mark.parametrize("garbage", [math.nan, INF, -INF, 1e4])
def test_rows_of_weight_zero_are_inert(which, garbage):
    student, teacher = logits(3, 4), logits(3, 4, seed=1)
    expected = divergence(student, teacher, which)
    student[1], teacher[1] = garbage, garbage
    student.requires_grad_()
    weights = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    loss = divergence(student, teacher, which, weights)
    torch.testing.assert_close(loss, expected * weights)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()
    assert (gradient[2] != 0).all()


@every
def test_nan_is_passed_on(which):
    student, teacher = logits(3, 3), logits(3, 3, seed=1)
    student[0, 1], teacher[1, 1] = math.nan, math.nan
    assert divergence(student, teacher, which).isnan().tolist() == [True, True, False]


@every
def test_precision(which):
    student, teacher = logits(8, 100), logits(8, 100, seed=1)
    assert divergence(student, teacher, which).dtype == torch.float64
    assert divergence(student.bfloat16(), teacher, which).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        low = student.to(dtype).requires_grad_()
        loss = divergence(low, teacher.to(dtype), which)
        assert loss.dtype == torch.float32
        reference = divergence(low.double(), teacher.to(dtype).double(), which)
        torch.testing.assert_close(loss, reference.float(), rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(loss.sum(), low)
        assert gradient.dtype == dtype


def test_the_teacher_gets_no_gradient():
    student, teacher = logits(2, 3).requires_grad_(), logits(2, 3, seed=1).requires_grad_()
    divergence(student, teacher, Divergence("jsd")).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_forward_kl_is_the_same():
    student, teacher = logits(5, 4), logits(5, 4, seed=1)
    expected = divergence(student, teacher, Divergence("forward_kl", 3.0))
    torch.testing.assert_close(forward_kl(student, F.log_softmax(teacher, -1), 3.0), expected)


def test_a_kind_of_ones_own(monkeypatch):
    class Squared:
        def __init__(self, alpha=1.0):
            self.alpha = alpha

        def parts(self, teacher, student):
            difference = student.probabilities - teacher.probabilities
            return self.alpha * difference**2, 2 * self.alpha * difference * student.probabilities

    monkeypatch.setitem(KINDS, "squared", Squared)
    student, teacher = logits(3, 4).requires_grad_(), logits(3, 4, seed=1)
    which = Divergence("squared", alpha=2.0)
    torch.testing.assert_close(
        divergence(student, teacher, which), 2 * ((student.softmax(-1) - teacher.softmax(-1)) ** 2).sum(-1)
    )
    assert torch.autograd.gradcheck(lambda z: divergence(z, teacher, which), (student,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "kl"}, "kind is 'kl'; wanted one of forward_kl, reverse_kl, jsd"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"kind": "jsd", "beta": 1.5}, "beta is 1.5"),
        ({"kind": "jsd", "beta": math.nan}, "beta is nan"),
        ({"kind": "jsd", "alpha": 0.1}, "alpha is 0.1, and jsd has no alpha"),
        ({"kind": "forward_kl", "beta": 0.5}, "beta is 0.5, and forward_kl has no beta"),
        ({"kind": "skewed_kl", "alpha": 1.0}, "alpha is 1.0"),
        ({"kind": "skewed_reverse_kl", "alpha": -0.1}, "alpha is -0.1"),
    ],
)
def test_divergence_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Divergence(**arguments)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"student_logits has shape \(2, 3\) and teacher_logits \(2, 4\)"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 4), Divergence())
    with pytest.raises(ValueError, match=r"student_logits has shape \(3,\)"):
        divergence(torch.zeros(3), torch.zeros(3), Divergence())
    with pytest.raises(ValueError, match=r"weights has shape \(3,\)"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 3), Divergence(), torch.ones(3))
