import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.losses import IGNORED, cross_entropy, forward_kl, masked_mean

# The machine may be shared, and how long an example takes is not what is tested.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

INF = math.inf


def logits(n, classes, seed=0, dtype=torch.float64, scale=2.0):
    return scale * torch.randn(n, classes, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def logprobs(n, classes, seed=1, dtype=torch.float64):
    return F.log_softmax(logits(n, classes, seed, dtype), dim=-1)


rows = st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3)
temperatures = st.floats(0.25, 20)


# forward_kl


def test_kl_by_hand():
    # teacher 3/4 1/4, student 1/2 1/2: 3/4 log 3/2 + 1/4 log 1/2
    teacher = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert forward_kl(torch.zeros(1, 2, dtype=torch.float64), teacher).item() == pytest.approx(expected, rel=1e-12)


def test_kl_softened_by_hand():
    # teacher 9 : 1, softened by 2 it is 3 : 1, so the case above times T^2 = 4
    teacher = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert forward_kl(torch.zeros(1, 2, dtype=torch.float64), teacher, 2.0).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_kl_is_torchs(temperature):
    student, teacher = logits(7, 5), logprobs(7, 5)
    expected = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        log_target=True,
        reduction="none",
    ).sum(dim=-1)
    torch.testing.assert_close(forward_kl(student, teacher, temperature), expected * temperature**2)


@settings(max_examples=100)
@given(rows, temperatures, st.floats(-10, 10, width=32))
def test_kl_is_zero_where_the_two_agree(row, temperature, shift):
    teacher = F.log_softmax(torch.tensor([row]), dim=-1)
    assert forward_kl(teacher, teacher, temperature).item() == 0.0
    shifted = forward_kl(torch.tensor([row]) + shift, teacher, temperature)
    # float32 carries a logit of 40 to 4e-6, and one of 40 / T to 4e-6 / T
    assert 0 <= shifted.item() <= 1e-4 * max(temperature, temperature**2)


@settings(max_examples=200)
@given(rows, rows, temperatures, st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
def test_kl_is_never_negative(student, teacher, temperature, dtype):
    teacher_logprobs = F.log_softmax(torch.tensor([teacher]), dim=-1)
    assert forward_kl(torch.tensor([student], dtype=dtype), teacher_logprobs, temperature).item() >= 0


def test_kl_is_never_negative_near_agreement():
    # where rounding would otherwise show: about half of these come out near -1e-8 unlifted
    teacher = logprobs(2000, 50, dtype=torch.float32)
    near = (teacher + 1e-5 * torch.randn(2000, 50, generator=torch.Generator().manual_seed(2))).requires_grad_()
    loss = forward_kl(near, teacher)
    assert loss.min().item() >= 0
    (gradient,) = torch.autograd.grad(loss.sum(), near)
    torch.testing.assert_close(gradient, near.softmax(-1) - teacher.exp())
    assert (gradient != 0).any(dim=-1).all()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_kl_gradient_is_analytic(temperature):
    # d/dz of T^2 KL = T (q - p), both softened
    student, teacher = logits(4, 6).requires_grad_(), logprobs(4, 6)
    (gradient,) = torch.autograd.grad(forward_kl(student, teacher, temperature).sum(), student)
    expected = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    torch.testing.assert_close(gradient, expected)


def test_kl_gradcheck():
    weights = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    teacher = logprobs(3, 4)
    teacher[0, 1] = -INF
    assert torch.autograd.gradcheck(lambda z: forward_kl(z, teacher, 2.0, weights), (logits(3, 4).requires_grad_(),))


def test_kl_gradient_at_high_temperature_is_hintons():
    # Hinton et al. 2015, equation 4, times T^2: (z - v) / N for logits of mean zero
    classes, temperature = 5, 1e4
    z, v = logits(3, classes), logits(3, classes, seed=3)
    z, v = z - z.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
    z.requires_grad_()
    loss = forward_kl(z, F.log_softmax(v, dim=-1), temperature)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(gradient, (z.detach() - v) / classes, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(loss.detach(), ((z.detach() - v) ** 2).sum(-1) / (2 * classes), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_with_impossible_classes_equals_kl_without_them(temperature):
    student = logits(3, 4).requires_grad_()
    kept = logprobs(3, 3)
    teacher = torch.cat([kept, torch.full((3, 1), -INF, dtype=torch.float64)], dim=-1)
    loss = forward_kl(student, teacher, temperature)
    log_q = F.log_softmax(student / temperature, dim=-1)[:, :3]
    log_p = F.log_softmax(kept / temperature, dim=-1)
    torch.testing.assert_close(loss, (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    p = (teacher / temperature).softmax(-1)
    torch.testing.assert_close(gradient, temperature * ((student / temperature).softmax(-1) - p))


def test_kl_with_a_certain_teacher_is_cross_entropy():
    student = logits(2, 3)
    teacher = torch.tensor([[0.0, -INF, -INF], [-INF, -INF, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(
        forward_kl(student, teacher), F.cross_entropy(student, torch.tensor([0, 2]), reduction="none")
    )


def test_kl_where_the_student_rules_out_classes():
    student = torch.tensor([[0.0, 1.0, -INF], [0.0, -INF, 1.0]], requires_grad=True)
    teacher = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]]).log()
    loss = forward_kl(student, teacher)
    assert loss[0].item() == pytest.approx(math.log(0.5) - 0.5 * (2 * -math.log1p(math.e) + 1), rel=1e-5)
    assert loss[1].item() == INF
    (gradient,) = torch.autograd.grad(loss[0], student)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("garbage", [math.nan, INF, -INF, 1e4])
def test_kl_ignores_rows_of_weight_zero(garbage):
    student, teacher = logits(3, 4), logprobs(3, 4)
    expected = forward_kl(student, teacher, 2.0)
    student[1], teacher[1] = garbage, garbage
    student.requires_grad_()
    loss = forward_kl(student, teacher, 2.0, torch.tensor([1.0, 0.0, 2.0]))
    torch.testing.assert_close(loss, expected * torch.tensor([1.0, 0.0, 2.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()
    assert (gradient[2] != 0).all()


def test_kl_ignores_rows_without_a_distribution():
    student, teacher = logits(2, 3).requires_grad_(), logprobs(2, 3)
    teacher[0] = -INF
    loss = forward_kl(student, teacher)
    assert loss[0].item() == 0
    assert loss[1].item() > 0
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert (gradient[0] == 0).all()


def test_kl_passes_on_nan():
    student, teacher = logits(3, 3), logprobs(3, 3)
    student[0, 1], teacher[1, 1] = math.nan, math.nan
    assert forward_kl(student, teacher).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kl_is_computed_in_float32(dtype):
    student, teacher = logits(8, 100).to(dtype), logprobs(8, 100).to(dtype)
    loss = forward_kl(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, forward_kl(student.double(), teacher.double(), 2.0).float())


def test_kl_keeps_float64():
    assert forward_kl(logits(2, 3), logprobs(2, 3)).dtype == torch.float64
    assert forward_kl(logits(2, 3, dtype=torch.float32), logprobs(2, 3, dtype=torch.float32)).dtype == torch.float32
    assert forward_kl(logits(2, 3, dtype=torch.bfloat16), logprobs(2, 3)).dtype == torch.float64


def test_kl_refuses():
    with pytest.raises(ValueError, match=r"student_logits has shape \(2, 3\) and teacher_logprobs \(2, 4\)"):
        forward_kl(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"student_logits has shape \(3,\)"):
        forward_kl(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"weights has shape \(2, 1\) and student_logits \(2, 3\)"):
        forward_kl(torch.zeros(2, 3), torch.zeros(2, 3), 1.0, torch.ones(2, 1))
    for temperature in (0.0, -1.0, INF, math.nan):
        with pytest.raises(ValueError, match="temperature is"):
            forward_kl(torch.zeros(2, 3), torch.zeros(2, 3), temperature)


# cross_entropy


def test_cross_entropy_by_hand():
    z = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]], dtype=torch.float64)
    loss = cross_entropy(z, torch.tensor([0, 1]))
    assert loss.tolist() == pytest.approx([math.log(4), math.log(2)])


def test_cross_entropy_is_torchs():
    z, labels = logits(6, 5), torch.tensor([0, 4, 2, IGNORED, 1, 3])
    torch.testing.assert_close(
        cross_entropy(z, labels), F.cross_entropy(z, labels, ignore_index=-100, reduction="none")
    )


def test_cross_entropy_is_zero_where_certain_and_right():
    z = torch.tensor([[0.0, -INF, -INF]])
    assert cross_entropy(z, torch.tensor([0])).item() == 0.0


@settings(max_examples=100)
@given(rows, st.integers(0, 2))
def test_cross_entropy_is_never_negative(row, label):
    assert cross_entropy(torch.tensor([row]), torch.tensor([label])).item() >= 0


def test_cross_entropy_gradcheck():
    labels = torch.tensor([1, IGNORED, 0])
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, labels), (logits(3, 4).requires_grad_(),))


@pytest.mark.parametrize("garbage", [math.nan, INF, -INF, 1e4])
def test_cross_entropy_ignores_rows_without_a_label(garbage):
    z = logits(3, 4)
    z[1] = garbage
    z.requires_grad_()
    loss = cross_entropy(z, torch.tensor([2, -100, 0]))
    assert loss[1].item() == 0
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()
    assert (gradient[0] != 0).all()


def test_cross_entropy_precision():
    z, labels = logits(8, 100), torch.arange(8)
    assert cross_entropy(z, labels).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        loss = cross_entropy(z.to(dtype), labels)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, cross_entropy(z.to(dtype).double(), labels).float())


def test_cross_entropy_refuses():
    with pytest.raises(ValueError, match=r"student_logits has shape \(2, 3\) and labels \(3,\)"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"student_logits has shape \(3,\)"):
        cross_entropy(torch.zeros(3), torch.zeros(3, dtype=torch.long))


# masked_mean


def test_mean_by_hand():
    values = torch.tensor([1.0, 2.0, 6.0, 100.0])
    assert masked_mean(values, torch.tensor([True, True, True, False])).item() == 3.0
    assert masked_mean(values, torch.tensor([1.0, 0.5, 0.5, 0.0])).item() == pytest.approx(2.5)
    assert masked_mean(values, torch.tensor([True, True, True, False]), torch.tensor(10)).item() == pytest.approx(0.9)


@given(
    st.lists(st.tuples(st.floats(-100, 100), st.booleans()), min_size=1, max_size=30).filter(
        lambda c: any(m for _, m in c)
    )
)
def test_mean_is_the_mean_of_the_supervised(cases):
    values, mask = zip(*cases, strict=True)
    kept = [value for value, m in cases if m]
    result = masked_mean(torch.tensor(values, dtype=torch.float64), torch.tensor(mask))
    assert result.item() == pytest.approx(sum(kept) / len(kept), abs=1e-9)


@pytest.mark.parametrize("garbage", [math.nan, INF, -INF])
def test_masked_values_are_inert(garbage):
    values = torch.tensor([1.0, garbage, 3.0], requires_grad=True)
    result = masked_mean(values, torch.tensor([True, False, True]))
    assert result.item() == 2.0
    (gradient,) = torch.autograd.grad(result, values)
    assert gradient.tolist() == [0.5, 0.0, 0.5]


def test_mean_gradcheck():
    weights = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: masked_mean(v, weights), (values,))
    assert torch.autograd.gradcheck(lambda v: masked_mean(v, weights, torch.tensor(7.0)), (values,))


@pytest.mark.parametrize("cuts", [[12], [6, 6], [1] * 12, [5, 1, 6], [2, 3, 7]])
def test_gradients_do_not_depend_on_the_cut(cuts):
    features, weight = logits(12, 3), logits(3, 4, seed=5)
    teacher = logprobs(12, 4)
    # unevenly spread, so that means of micro-batch means would differ; rows 0 and 1 leave a micro-batch empty
    labels = torch.tensor([-100, -100, 1, -100, 0, 2, 3, 1, 2, 0, -100, 1])
    mask = labels != IGNORED

    def gradient(cut):
        parameter = weight.clone().requires_grad_()
        total = 0.0
        for rows_ in torch.arange(12).split(cut):
            z = features[rows_] @ parameter
            per_example = cross_entropy(z, labels[rows_]) + forward_kl(z, teacher[rows_], 2.0, mask[rows_])
            part = masked_mean(per_example, mask[rows_], mask.sum())
            part.backward()
            total += part.item()
        return total, parameter.grad

    parameter = weight.clone().requires_grad_()
    z = features @ parameter
    whole = masked_mean(cross_entropy(z, labels) + forward_kl(z, teacher, 2.0), mask)
    whole.backward()
    value, grad = gradient(cuts)
    assert value == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-12)


def test_mean_of_nothing():
    values = torch.tensor([1.0, math.nan], requires_grad=True)
    none = torch.tensor([False, False])
    with pytest.raises(ValueError, match="none of the 2 examples is supervised"):
        masked_mean(values, none)
    with pytest.raises(ValueError, match="none of the 0 examples"):
        masked_mean(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    result = masked_mean(values, none, torch.tensor(3))
    assert result.item() == 0
    (gradient,) = torch.autograd.grad(result, values)
    assert gradient.tolist() == [0.0, 0.0]


def test_mean_precision():
    mask = torch.tensor([True] * 4096)
    # bfloat16 cannot count to 4096 in ones, nor float16 sum beyond 65504
    for dtype in (torch.bfloat16, torch.float16):
        result = masked_mean(torch.full((4096,), 31.0, dtype=dtype), mask)
        assert result.dtype == torch.float32
        assert result.item() == 31.0
    assert masked_mean(torch.ones(4096, dtype=torch.float64), mask).dtype == torch.float64
    assert masked_mean(torch.ones(4096), mask, torch.tensor([4096])).shape == ()


def test_mean_refuses():
    with pytest.raises(ValueError, match=r"values has shape \(2,\) and mask \(3,\)"):
        masked_mean(torch.zeros(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"values has shape \(2, 2\)"):
        masked_mean(torch.zeros(2, 2), torch.ones(2, 2))
    for denominator in (torch.tensor(0.0), torch.tensor(math.nan), torch.ones(2)):
        with pytest.raises(ValueError, match="denominator is"):
            masked_mean(torch.zeros(2), torch.ones(2), denominator)
