import math

import pytest
import torch
import torch.nn.functional as F

from attar.losses import FEATURE_LOSSES, attention_transfer, cosine, masked_mean, mse, normalised_mse, rkd
from featurecases import SHAPES, features, mask_of, mean, pair

INF = math.inf

LOSSES = {**FEATURE_LOSSES, "minilm_relations": FEATURE_LOSSES["minilm_relations"].with_options(relation_heads=2)}
CASES = [pytest.param(loss, rank, id=f"{name}-{rank}") for name, loss in LOSSES.items() for rank in loss.ranks]
every = pytest.mark.parametrize(("loss", "rank"), CASES)
RELATIONAL = [LOSSES[name] for name in ("cka", "similarity_preserving", "rkd", "contrastive")]


# what all have in common


@every
def test_one_value_a_row(loss, rank):
    student, teacher = pair(rank)
    values = loss(student, teacher)
    assert values.shape == (SHAPES[3][:2] if rank == 3 else SHAPES[rank][:1])
    assert (values >= 0).all()
    assert (values > 0).any()


# of ``contrastive`` other rows stay possible, so it is above 0 by definition
@pytest.mark.parametrize(("loss", "rank"), [case for case in CASES if not case.id.startswith("contrastive")])
def test_zero_at_equality(loss, rank):
    for dtype in (torch.float64, torch.float32):
        student = pair(rank, dtype)[0].requires_grad_()
        values = loss(student, student.detach().clone())
        torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=4 * torch.finfo(dtype).eps)
        (gradient,) = torch.autograd.grad(values.sum(), student)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=100 * torch.finfo(dtype).eps)


@every
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(loss, rank, masked):
    student, teacher = pair(rank)
    mask = mask_of(rank) if masked else None
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, mask), (student.requires_grad_(),))


@every
def test_the_teacher_gets_no_gradient(loss, rank):
    student, teacher = (side.requires_grad_() for side in pair(rank))
    loss(student, teacher, mask_of(rank)).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@every
@pytest.mark.parametrize("garbage", [math.nan, INF, -INF, 1e30])
def test_masked_rows_are_inert(loss, rank, garbage):
    student, teacher = pair(rank)
    mask = mask_of(rank)
    clean = student.clone().requires_grad_()
    expected = loss(clean, teacher, mask)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), clean)
    student[~mask], teacher[~mask] = garbage, garbage
    student.requires_grad_()
    values = loss(student, teacher, mask)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert (values[~mask] == 0).all()
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any(dim=-1).any()
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)


@every
def test_masked_rows_are_as_good_as_absent(loss, rank):
    student, teacher = pair(rank)
    mask = mask_of(rank)
    if rank == 3 and loss not in RELATIONAL:
        # per sequence, cut to its length
        for row, kept in enumerate(mask):
            alone = loss(student[row : row + 1, kept], teacher[row : row + 1, kept])[0]
            torch.testing.assert_close(loss(student, teacher, mask)[row, kept], alone)
        return
    torch.testing.assert_close(loss(student, teacher, mask)[mask], loss(student[mask], teacher[mask]))


@every
def test_nothing_masked_is_no_mask(loss, rank):
    student, teacher = pair(rank)
    values = loss(student, teacher)
    torch.testing.assert_close(loss(student, teacher, torch.ones_like(values, dtype=torch.bool)), values)


@every
def test_everything_masked(loss, rank):
    student, teacher = (side.requires_grad_() for side in pair(rank))
    values = loss(student, teacher, torch.zeros_like(mask_of(rank)))
    assert (values == 0).all()
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert (gradient == 0).all()


@every
@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows(loss, rank, rows):
    student, teacher = pair(rank)
    mask = torch.zeros_like(mask_of(rank))
    mask.flatten()[:rows] = True
    student.requires_grad_()
    values = loss(student, teacher, mask)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    if rows == 1 and loss in RELATIONAL:  # a row alone has no relations
        assert (values == 0).all()
        assert (gradient.abs() < 1e-12).all()


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("zeros", ["one", "all", "same"])
def test_zero_vectors(loss, rank, dtype, zeros):
    for sides in (0,), (1,), (0, 1):
        both = list(pair(rank, dtype))
        for side in sides:
            if zeros == "one":
                both[side][0] = 0
            else:
                both[side][:] = 0 if zeros == "all" else 0.1
        student = both[0].requires_grad_()
        values = loss(student, both[1])
        (gradient,) = torch.autograd.grad(values.sum(), student)
        assert values.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e4


@every
def test_nan_in_a_row_that_counts_is_passed_on(loss, rank):
    student, teacher = pair(rank)
    student[0] = math.nan
    assert mean(loss(student, teacher, mask_of(rank)), mask_of(rank)).isnan()


@every
def test_precision(loss, rank):
    student, teacher = pair(rank)
    assert loss(student, teacher).dtype == torch.float64
    assert loss(student.float(), teacher).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        low = student.to(dtype).requires_grad_()
        values = loss(low, teacher.to(dtype))
        assert values.dtype == torch.float32
        exact = loss(low.detach().double(), teacher.to(dtype).double())
        torch.testing.assert_close(values, exact.float(), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):  # matrix products as well
            torch.testing.assert_close(loss(low, teacher.to(dtype)), values, rtol=0, atol=0)
        values.sum().backward()
        assert low.grad.dtype == dtype


@every
def test_layout_does_not_matter(loss, rank):
    student, teacher = pair(rank)
    turned = student.transpose(0, -1).contiguous().transpose(0, -1)
    assert not turned.is_contiguous()
    torch.testing.assert_close(loss(turned, teacher), loss(student, teacher))


@every
@pytest.mark.parametrize("cut", [[4], [2, 2], [1, 3], [1, 1, 1, 1]])
def test_micro_batches_sum_to_the_batch(loss, rank, cut):
    """But for the losses that relate the rows of a call, whose micro-batches weigh as their rows do."""
    shape = {2: (4, 4), 3: (4, 3, 4), 4: (4, 3, 2, 2)}[rank]
    student, teacher = features(*shape), features(*shape, seed=1)
    mask = torch.tensor([True, True, True, False])
    if rank == 3:
        mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, True]])
    parameter = torch.ones((), dtype=torch.float64, requires_grad=True)
    whole = masked_mean(loss(student + parameter * features(*shape, seed=2), teacher, mask).flatten(), mask.flatten())
    (expected,) = torch.autograd.grad(whole, parameter)
    parts, gradient, means = [], 0.0, []
    for rows in torch.arange(4).split(cut):
        moved = student[rows] + parameter * features(*shape, seed=2)[rows]
        values = loss(moved, teacher[rows], mask[rows])
        part = masked_mean(values.flatten(), mask[rows].flatten(), mask.sum())
        gradient += torch.autograd.grad(part, parameter)[0]
        parts.append(part.item())
        means.append(values.detach().sum() / mask[rows].sum().clamp(min=1) * mask[rows].sum() / mask.sum())
    if loss in RELATIONAL:
        assert sum(parts) == pytest.approx(sum(means).item(), rel=1e-12)
        if len(cut) > 1:
            assert sum(parts) != pytest.approx(whole.item(), rel=1e-3)
        return
    assert sum(parts) == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_shapes_that_do_not_fit(loss):
    name = loss.inputs.name
    for rank in {2, 3, 4, 5} - set(loss.ranks):
        with pytest.raises(ValueError, match=rf"{name}: student has shape .* and teacher .*; wanted .* dimensions"):
            loss(torch.zeros((2,) * rank), torch.zeros((2,) * rank))
    for rank in loss.ranks:
        shape = SHAPES[rank]
        with pytest.raises(ValueError, match="dimensions for both"):
            loss(torch.zeros(shape), torch.zeros(*shape, 1))
        wrong = [(7, *shape[1:])]  # another number of rows
        if rank == 3:
            wrong.append((shape[0], 7, shape[2]))
        if rank == 4 and loss.inputs.same != "rows":
            wrong.append((*shape[:3], 7))  # another size of map
        if loss.equal_widths:
            width = 1 if rank == 4 else rank - 1
            wrong.append((*shape[:width], 7, *shape[width + 1 :]))
        for other in wrong:
            shapes = rf"student has shape {shape} and teacher {other}".replace("(", r"\(").replace(")", r"\)")
            with pytest.raises(ValueError, match=f"{name}: {shapes}"):
                loss(torch.zeros(shape), torch.zeros(other))
        values = loss(torch.zeros(shape), torch.zeros(shape))
        for mask in (torch.ones(values.shape), torch.ones(*values.shape, 1, dtype=torch.bool), torch.ones(7) > 0):
            with pytest.raises(ValueError, match=f"{name}: mask is .* wanted one bool a row"):
                loss(torch.zeros(shape), torch.zeros(shape), mask)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.equal_widths])
def test_widths_may_differ(name):
    loss = LOSSES[name]
    for rank in loss.ranks:
        student, teacher = pair(rank)
        wide = torch.cat([teacher] * 2, dim=1 if rank == 4 else -1)
        assert loss(student, wide).isfinite().all()
        assert loss(wide, student).shape == loss(student, wide).shape
    if loss.inputs.same == "rows":  # of maps only examples are compared
        assert loss(features(4, 3, 2, 2), features(4, 5, 7, 7)).shape == (4,)


# each by its definition


def test_mse():
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    teacher = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    assert mse(student, teacher).tolist() == [2.0, 12.5]
    for rank in (2, 3, 4):
        student, teacher = pair(rank)
        torch.testing.assert_close(mean(mse(student, teacher)), F.mse_loss(student, teacher))


def test_cosine():
    student = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    teacher = torch.tensor([[5.0, 0.0], [7.0, 0.0], [-4.0, -4.0], [1.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(cosine(student, teacher), torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0]))
    student, teacher = pair(3)
    torch.testing.assert_close(cosine(student, teacher), 1 - F.cosine_similarity(student, teacher, dim=-1))
    torch.testing.assert_close(cosine(1e3 * student, 1e-3 * teacher), cosine(student, teacher))


def test_a_zero_student_can_leave_zero():
    student, teacher = torch.zeros(1, 3, requires_grad=True), torch.tensor([[0.0, 0.0, 2.0]])
    (gradient,) = torch.autograd.grad(cosine(student, teacher).sum(), student)
    assert gradient.tolist() == [[0.0, 0.0, -1.0]]


def test_normalised_mse():
    student, teacher = features(5, 50), features(5, 50, seed=1)
    correlation = torch.stack([torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(student, teacher, strict=True)])
    values = normalised_mse(student, teacher)
    torch.testing.assert_close(values, 2 * (1 - correlation), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalised_mse(100 * student + 7, 30 * teacher - 2), values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalised_mse(student, -student), torch.full((5,), 4.0).double(), rtol=1e-4, atol=1e-4)


def test_attention_transfer_by_hand():
    # one example, two positions; sums of squares over channels: student 9 + 16, 0; teacher 4, 4
    student = torch.tensor([[[[3.0, 0.0]], [[-4.0, 0.0]]]])
    teacher = torch.tensor([[[[2.0, -2.0]]]])
    half = math.sqrt(0.5)
    assert attention_transfer(student, teacher).item() == pytest.approx(((1 - half) ** 2 + half**2) / 2)
    # with power 1 the sums are 7, 0 and 2, 2: the same directions
    assert attention_transfer(student, teacher, power=1.0).item() == pytest.approx(((1 - half) ** 2 + half**2) / 2)
    teacher = torch.tensor([[[[2.0, 1.0]]]])
    unequal = [1 - 2 / math.sqrt(5), 1 / math.sqrt(5)]
    assert attention_transfer(student, teacher, power=1.0).item() == pytest.approx(sum(x * x for x in unequal) / 2)
    with pytest.raises(ValueError, match=r"power is 0\.5"):
        attention_transfer(student, teacher, power=0.5)


def test_attention_transfer_sees_places_alone():
    student, teacher = features(2, 3, 4, 4), features(2, 5, 4, 4, seed=1)
    values = attention_transfer(student, teacher)
    torch.testing.assert_close(attention_transfer(-3 * student[:, [2, 0, 1]], 9 * teacher.flip(1)), values)
    assert not torch.allclose(attention_transfer(student.flip(-1), teacher), values)


# the registry


def test_the_registry():
    assert {name: (loss.equal_widths, loss.ranks) for name, loss in FEATURE_LOSSES.items()} == {
        "mse": (True, (2, 3, 4)),
        "cosine": (True, (2, 3)),
        "normalised_mse": (True, (2, 3)),
        "attention_transfer": (False, (4,)),
        "minilm_relations": (False, (3,)),
        "cka": (False, (2, 3, 4)),
        "similarity_preserving": (False, (2, 3, 4)),
        "rkd": (False, (2, 4)),
        "contrastive": (True, (2, 3)),
    }


def test_options():
    student, teacher = pair(2)
    loss = FEATURE_LOSSES["rkd"].with_options(angle=0.0)
    torch.testing.assert_close(loss(student, teacher), rkd(student, teacher, angle=0.0))
    torch.testing.assert_close(FEATURE_LOSSES["rkd"](student, teacher), rkd(student, teacher))
    with pytest.raises(ValueError, match=r"angel is 0\.0, and rkd has no angel; it has distance, angle"):
        FEATURE_LOSSES["rkd"].with_options(angel=0.0)
    with pytest.raises(ValueError, match="mask is 1, and mse has no mask; it has no options"):
        FEATURE_LOSSES["mse"].with_options(mask=1)
    with pytest.raises(ValueError, match="minilm_relations needs relation_heads"):
        FEATURE_LOSSES["minilm_relations"].with_options()
