import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from attar.losses import cka, contrastive, minilm_relations, rkd, similarity_preserving
from featurecases import features, mean, rotation

INF = math.inf
minilm = partial(minilm_relations, relation_heads=2)

# what all feature losses have in common is tested in test_losses_features.py


def test_minilm_by_its_formula():
    student, teacher = features(2, 5, 4), features(2, 5, 12, seed=1)
    lengths = [5, 3]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    values = minilm_relations(student, teacher, mask, relation_heads=2)
    for row, length in enumerate(lengths):
        total = 0.0
        for head in range(2):
            s, t = student[row, :length, 2 * head : 2 * head + 2], teacher[row, :length, 6 * head : 6 * head + 6]
            log_s = F.log_softmax(s @ s.T / math.sqrt(2), dim=-1)
            log_t = F.log_softmax(t @ t.T / math.sqrt(6), dim=-1)
            total = total + F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(values[row, :length], total / 2)
        assert (values[row, length:] == 0).all()


def test_minilm_works_across_widths():
    # a rotation of each relation head leaves its products alone, a wider copy scaled by the root of its width too
    student = features(2, 5, 4)
    turned = torch.cat([student[..., :2] @ rotation(2), student[..., 2:] @ rotation(2)], dim=-1)
    torch.testing.assert_close(minilm(turned, student), torch.zeros(2, 5).double(), rtol=0, atol=1e-12)
    wide = torch.cat([student[..., :2]] * 2 + [student[..., 2:]] * 2, dim=-1) / math.sqrt(2)
    assert minilm(wide * 2**0.25, student).max() < 1e-12
    assert minilm_relations(student, turned, relation_heads=4).min() > 0
    for heads in (0, 3, 8):
        with pytest.raises(
            ValueError, match=rf"relation_heads is {heads}; wanted a divisor of both widths, 4 and 8: of 4"
        ):
            minilm_relations(student, wide, relation_heads=heads)


def test_cka_by_its_formula():
    for n, widths in (6, (3, 4)), (6, (20, 30)), (6, (3, 30)):
        student, teacher = (features(n, width, seed=width) for width in widths)
        centring = torch.eye(n).double() - 1 / n
        k, other = (centring @ x @ x.T @ centring for x in (student, teacher))
        expected = 1 - (k * other).sum() / (k.norm() * other.norm())
        torch.testing.assert_close(cka(student, teacher), expected.expand(n))


def test_cka_invariances():
    for n in (4, 30):  # both ways to compute it
        student, teacher = features(n, 5), features(n, 7, seed=1)
        values = cka(student, teacher)
        torch.testing.assert_close(cka(student @ rotation(5), teacher @ rotation(7)), values)
        torch.testing.assert_close(cka(1e3 * student + 5, 1e-3 * teacher - 2), values)
        torch.testing.assert_close(cka(2 * student @ rotation(5) + 1, student), torch.zeros(n).double())
        assert not torch.allclose(cka(student * torch.arange(1.0, 6), teacher), values)


def test_cka_does_not_overflow():
    student, teacher = features(300, 5, dtype=torch.float32), features(300, 7, seed=1, dtype=torch.float32)
    torch.testing.assert_close(cka(1e12 * student, 1e12 * teacher), cka(student, teacher))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cka_of_rows_that_are_all_the_same(dtype):
    student = torch.full((7, 3), 0.1, dtype=dtype) * torch.tensor([1, 3, 7], dtype=dtype)  # whose mean rounds
    student.requires_grad_()
    assert (student != student.mean(dim=0)).any()
    values = cka(student, features(7, 3, dtype=dtype))
    assert (values == 1).all()
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cka_is_never_negative(dtype):
    # where rounding would otherwise show, in about a third of these
    for seed in range(20):
        student = features(7, 5, seed=seed, dtype=dtype)
        assert cka(student, student @ rotation(5).to(dtype)).min() >= 0


def test_similarity_preserving_by_hand():
    student, teacher = torch.eye(2), torch.tensor([[3.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    # rows of the student's matrix (1 0), (0 1); of the teacher's (9 12) / 15 and (12 16) / 20, both (0.6 0.8)
    values = similarity_preserving(student, teacher)
    assert values.tolist() == pytest.approx([(0.16 + 0.64) / 2, (0.36 + 0.04) / 2])
    assert mean(values).item() == pytest.approx((0.8 + 0.4) / 2**2)
    student, teacher = features(5, 3), features(5, 3, 2, 2, seed=1).flatten(1)
    matrices = [F.normalize(x @ x.T, dim=1) for x in (student, teacher)]
    expected = (matrices[0] - matrices[1]).square().sum() / 25
    torch.testing.assert_close(mean(similarity_preserving(student, teacher)), expected)
    torch.testing.assert_close(mean(similarity_preserving(5 * student @ rotation(3), 0.1 * teacher)), expected)


def test_rkd_distance_by_hand():
    # distances 3, 4, 5 over their mean 4; and 1, 1, 2 over 4/3
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.tensor([[0.0], [1.0], [-1.0]])
    near, far, across = (x**2 / 2 for x in (3 / 4 - 3 / 4, 4 / 4 - 3 / 4, 5 / 4 - 6 / 4))
    values = rkd(student, teacher, distance=1.0, angle=0.0)
    assert values.tolist() == pytest.approx([(near + far) / 2, (near + across) / 2, (far + across) / 2])
    assert rkd(student, teacher, distance=3.0, angle=0.0).tolist() == pytest.approx((3 * values).tolist())


def test_rkd_angle_by_hand():
    # the triangle's cosines at its corners are 0, 3/5, 4/5; the line's are -1, 1, 1; each corner has two orders
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.tensor([[0.0], [1.0], [-1.0]])
    values = rkd(student, teacher, distance=0.0, angle=1.0)
    assert values.tolist() == pytest.approx([0.5, 0.4**2 / 2, 0.2**2 / 2])
    both = rkd(student, teacher)
    torch.testing.assert_close(both, rkd(student, teacher, distance=1.0, angle=0.0) + 2 * values)


def test_rkd_huber_is_linear_far_away():
    student, teacher = torch.tensor([[0.0], [0.0], [0.0], [9.0]]), torch.tensor([[0.0], [9.0], [9.0], [9.0]])
    # distances are 0 or 9 over 4.5, so 0 or 2 apart: 2 - 1/2, but for the pair of the first and the last
    values = rkd(student, teacher, distance=1.0, angle=0.0)
    assert values.tolist() == pytest.approx([1.5 * 2 / 3, 1.5 * 2 / 3, 1.5 * 2 / 3, 1.5 * 2 / 3])


def test_rkd_invariances():
    student, teacher = features(6, 3), features(6, 5, seed=1)
    values = rkd(student, teacher)
    torch.testing.assert_close(rkd(1e3 * student @ rotation(3) + 4, 1e-3 * teacher - 1), values)
    torch.testing.assert_close(rkd(7 * student @ rotation(3), student), torch.zeros(6).double(), atol=1e-12, rtol=0)
    assert rkd(student[[0, 0, 1, 2]], student[[0, 0, 1, 2]]).max() == 0


def test_rkd_of_the_same_row_twice():
    # at the last corner the student's cosine is 1, at the others 0: one way has no direction
    student, teacher = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    values = rkd(student, teacher, distance=0.0, angle=1.0)
    assert values.tolist() == pytest.approx([0.0, 0.6**2 / 2, 0.2**2 / 2])


@pytest.mark.parametrize("weights", [(-1.0, 2.0), (0.0, 0.0), (math.nan, 1.0), (1.0, INF)])
def test_rkd_refuses(weights):
    with pytest.raises(ValueError, match="rkd: distance is"):
        rkd(torch.zeros(3, 2), torch.zeros(3, 2), distance=weights[0], angle=weights[1])


def test_contrastive_by_hand():
    student, teacher = torch.tensor([[2.0, 0.0], [0.0, 5.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    # cosines: (1 1) and (0 0)
    assert contrastive(student, teacher, temperature=0.5).tolist() == pytest.approx([math.log(2), math.log(2)])
    own = contrastive(teacher.new_tensor([[1.0, 0.0], [0.0, 1.0]]), student, temperature=0.5)
    assert own.tolist() == pytest.approx([math.log1p(math.exp(-2))] * 2)
    student, teacher = features(5, 4), features(5, 4, seed=1)
    logits = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T / 0.07
    torch.testing.assert_close(contrastive(student, teacher), -logits.log_softmax(dim=1).diagonal())
    for temperature in (0.0, -1.0, INF, math.nan):
        with pytest.raises(ValueError, match="temperature is"):
            contrastive(student, teacher, temperature=temperature)
