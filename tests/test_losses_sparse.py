import math

import pytest
import torch

from attar.losses import CrossEntropyTerm, Divergence, DivergenceTerm, Head, divergence, projected_loss
from attar.losses.sparse import SampledTerm, TopKTerm, sparse_divergence
from divergences import (
    SHAPES,
    VOCABULARY,
    assert_all_close,
    at,
    by_torch,
    dense_logits,
    every,
    gradients,
    logits,
    make_head,
    normal,
)

INF = math.inf


def listed(teacher_logits, k, temperature=1.0):
    """The k best entries of each row, in an order of their own."""
    best = (teacher_logits / temperature).log_softmax(-1).topk(k)
    order = torch.argsort(normal(*best.indices.shape, seed=99), dim=-1)
    return best.indices.gather(1, order), best.values.gather(1, order)


def coarse(logits, ids):
    """Logits of the k entries and of one bucket of all the rest, row by row and with autograd."""
    rows = []
    for row, entries in zip(logits, ids, strict=True):
        entries = entries[entries >= 0]
        rest = torch.ones(len(row), dtype=torch.bool).index_fill_(0, entries, False)
        rows.append(torch.cat([row[entries], row[rest].logsumexp(0)[None]]))
    return torch.stack(rows)


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_with_all_the_vocabulary_it_is_the_dense_divergence(which, shape):
    which = at(which, 1.5)
    hidden, head = normal(7, 4).requires_grad_(), make_head(4, seed=1, **SHAPES[shape])
    teacher_hidden, teacher_head = normal(7, 6, seed=4), make_head(6, seed=5)
    weights = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    dense = projected_loss(hidden, head, [DivergenceTerm(which, teacher_hidden, teacher_head, weights)])
    ids, log_probs = listed(dense_logits(teacher_hidden, teacher_head).detach(), VOCABULARY, 1.5)
    term = TopKTerm(which, ids, log_probs, temperature=1.5, weights=weights)
    sparse = projected_loss(hidden, head, [term], chunk_tokens=3)
    torch.testing.assert_close(sparse.total, dense.total, rtol=1e-9, atol=1e-12)
    assert_all_close(gradients(sparse.total, hidden, head), gradients(dense.total, hidden, head))


@every
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_the_divergence_of_the_coarsened_distributions(which, temperature):
    which = at(which, temperature)
    student, teacher = logits(6, 20).requires_grad_(), logits(6, 20, seed=1)
    ids, log_probs = listed(teacher, 4, temperature)
    values = sparse_divergence(student, TopKTerm(which, ids, log_probs, temperature=temperature))
    # At the coarse level logits are divided by T already.
    plain = at(which, 1.0)
    expected = by_torch(coarse(student / temperature, ids), coarse(teacher / temperature, ids), plain) * temperature**2
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    assert_all_close(torch.autograd.grad(values.sum(), student), torch.autograd.grad(expected.sum(), student))
    if which.kind in ("forward_kl", "reverse_kl"):
        assert (values <= divergence(student, teacher, which)).all()


@every
def test_gradcheck_in_hidden_space(which):
    ids = torch.tensor([[1, 10, 4], [0, -1, -1], [2, 5, 7]])
    log_probs = torch.tensor([[0.5, 0.2, 0.1], [0.9, 0.0, 0.0], [0.3, 0.3, 0.2]], dtype=torch.float64).log()

    def loss(hidden, weight):
        head = Head(weight, scale=0.7, softcap=3.0, vocabulary=VOCABULARY)
        return projected_loss(hidden, head, [TopKTerm(which, ids, log_probs)], chunk_tokens=2).total

    assert torch.autograd.gradcheck(loss, (normal(3, 2).requires_grad_(), normal(13, 2, seed=1).requires_grad_()))


def test_by_hand():
    # student 1/2 1/4 1/4; the teacher lists entry 1 with 3/4, so that the bucket has 1/4 and the student's 3/4
    student = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64).log().requires_grad_()
    term = TopKTerm(Divergence(), torch.tensor([[1]]), torch.tensor([[0.75]], dtype=torch.float64).log())
    value = sparse_divergence(student, term)
    assert value.item() == pytest.approx(0.75 * math.log(3) - 0.25 * math.log(3))
    value.backward()
    # the bucket's excess of 1/2 is spread 2 : 1
    torch.testing.assert_close(student.grad, torch.tensor([[1 / 3, -0.5, 1 / 6]], dtype=torch.float64))


@every
@pytest.mark.parametrize("k", [1, 5, 40])
def test_zero_where_the_two_agree_and_never_negative(which, k):
    student = logits(30, 40, dtype=torch.float32).requires_grad_()
    ids, log_probs = listed(student.detach(), k)
    values = sparse_divergence(student, TopKTerm(which, ids, log_probs))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert (values >= 0).all()
    assert values.max() <= 2e-6
    # The slope of total variation is a sign, which rounding may set.
    assert which.kind == "total_variation" or gradient.abs().max() <= 2e-6
    for seed in range(5):
        near = student + 1e-3 * normal(30, 40, seed=seed, dtype=torch.float32)
        assert (sparse_divergence(near, TopKTerm(which, ids, log_probs)) >= 0).all()


@every
def test_ragged_rows_are_rows_of_their_own(which):
    student, teacher = logits(3, 12).requires_grad_(), logits(3, 12, seed=1)
    ids, log_probs = listed(teacher, 5)
    # entry 0 is what an absent id must not touch
    ids[1, 2:], ids[2, 0], log_probs[1, 2:], log_probs[2, 0] = -1, -1, math.nan, 7.0
    together = sparse_divergence(student, TopKTerm(which, ids, log_probs))
    (gradient,) = torch.autograd.grad(together.sum(), student)
    for row in range(3):
        keep = ids[row] >= 0
        alone = student[row : row + 1].detach().requires_grad_()
        value = sparse_divergence(alone, TopKTerm(which, ids[row : row + 1, keep], log_probs[row : row + 1, keep]))
        torch.testing.assert_close(value[0], together[row])
        assert_all_close(torch.autograd.grad(value.sum(), alone), [gradient[row : row + 1]])


def test_a_row_of_absent_entries_is_one_bucket():
    student = logits(2, 6).requires_grad_()
    term = TopKTerm(Divergence("jsd"), torch.full((2, 3), -1), torch.zeros(2, 3, dtype=torch.float64))
    value = sparse_divergence(student, term)
    assert value.abs().max() <= 1e-12
    assert torch.autograd.grad(value.sum(), student)[0].abs().max() <= 1e-12


def test_a_stored_tail_is_used():
    student = logits(4, 12, dtype=torch.float32)
    ids, log_probs = listed(logits(4, 12, seed=1), 3)
    tail = torch.log1p(-log_probs.exp().sum(-1))
    derived = sparse_divergence(student, TopKTerm(Divergence(), ids, log_probs))
    torch.testing.assert_close(sparse_divergence(student, TopKTerm(Divergence(), ids, log_probs, tail)), derived)
    # what rounding added to all of a row is taken away
    shifted = TopKTerm(Divergence(), ids, log_probs + 0.005, tail + 0.005)
    torch.testing.assert_close(sparse_divergence(student, shifted), derived)


@every
def test_a_tail_of_nothing(which):
    log_probs = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    student = torch.tensor([[0.0, 0.0, 0.0, 0.0]], dtype=torch.float64).requires_grad_()
    value = sparse_divergence(student, TopKTerm(which, torch.tensor([[2, 0]]), log_probs))
    teacher = torch.tensor([[0.25, 0.0, 0.75, 0.0]], dtype=torch.float64).log()
    torch.testing.assert_close(value, divergence(coarse(student, torch.tensor([[2, 0]])), teacher[:, [2, 0, 1]], which))
    # the reverse KL is infinite, as the dense one
    assert value.isinf() or torch.autograd.grad(value.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("gap", [20.0, 90.0, 300.0])
def test_the_students_tail_does_not_cancel_or_underflow(gap):
    # float32: 1 - sum is 0 from a gap of 17 on, and the sum of the rest from 104 on
    student = torch.zeros(1, 50)
    student[0, 3] = gap
    term = TopKTerm(Divergence(), torch.tensor([[3]]), torch.tensor([[0.5]]).log())
    student.requires_grad_()
    value = sparse_divergence(student, term)
    tail = math.log(49) - gap
    assert value.item() == pytest.approx(math.log(0.5) - 0.5 * tail, rel=1e-5)
    value.backward()
    torch.testing.assert_close(student.grad[0, :3], torch.full((3,), -0.5 / 49))
    assert student.grad[0, 3].item() == pytest.approx(0.5)


def test_the_teachers_tail_does_not_cancel():
    # 1 - sum in float32 is 0
    faint = torch.tensor([[-1e-9]], dtype=torch.float32)
    term = TopKTerm(Divergence("reverse_kl"), torch.tensor([[0]]), faint)
    value = sparse_divergence(torch.zeros(1, 2), term)
    assert value.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-9), rel=1e-5)


def sample(n=6, m=5, vocabulary=VOCABULARY, seed=0):
    """Ids with a repetition and an absent one, and weights that sum to no round number."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (n, m), generator=generator)
    ids[0, 1], ids[1, 0] = ids[0, 0], -1
    return (
        ids,
        torch.rand(n, m, generator=generator, dtype=torch.float64),
        torch.rand(n, generator=generator, dtype=torch.float64),
    )


def scattered(ids, weights, vocabulary=VOCABULARY):
    return torch.zeros(len(ids), vocabulary, dtype=torch.float64).scatter_add_(
        1, ids.clamp(min=0), weights * (ids >= 0)
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_sample_gives_cross_entropy_with_its_weights(temperature):
    hidden, head = normal(6, 4).requires_grad_(), make_head(4, seed=1, bias=True, padding=2, softcap=3.0)
    ids, weights, entropy = sample()
    term = SampledTerm(Divergence("forward_kl", temperature), ids, weights, entropy, temperature)
    loss = projected_loss(hidden, head, [term], chunk_tokens=4).total
    logs = (dense_logits(hidden, head)[:, :VOCABULARY] / temperature).log_softmax(-1)
    expected = ((-scattered(ids, weights) * logs).sum(-1) - entropy).mean() * temperature**2
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    assert_all_close(gradients(loss, hidden, head), gradients(expected, hidden, head))


def test_a_sample_of_everything_is_the_dense_forward_kl():
    which = Divergence("forward_kl", 1.5)
    student, teacher = logits(6, 9).requires_grad_(), logits(6, 9, seed=1)
    probabilities = (teacher / 1.5).softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1)
    term = SampledTerm(which, torch.arange(9).expand(6, 9), probabilities, entropy, 1.5)
    values, expected = sparse_divergence(student, term), divergence(student, teacher, which)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    assert_all_close(torch.autograd.grad(values.sum(), student), torch.autograd.grad(expected.sum(), student))


def test_an_entry_without_weight_may_be_ruled_out():
    student = torch.tensor([[0.0, -INF, 0.0]]).requires_grad_()
    term = SampledTerm(Divergence(), torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]), torch.zeros(1))
    value = sparse_divergence(student, term)
    assert value.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(value.sum(), student)[0].tolist() == [[-0.5, 0.0, 0.5]]


def make_terms(n, weights=None, denominator=None, rows=slice(None)):
    ids, log_probs = listed(logits(n, VOCABULARY, seed=5), 4)
    drawn, entries, entropy = sample(n)
    weights = None if weights is None else weights[rows]
    return [
        TopKTerm(Divergence("jsd", 1.0), ids[rows], log_probs[rows], weights=weights, denominator=denominator),
        SampledTerm(Divergence(), drawn[rows], entries[rows], entropy[rows], 1.0, weights, denominator, 0.7),
        CrossEntropyTerm(torch.arange(n)[rows] % VOCABULARY, weights, denominator, 0.3),
    ]


@pytest.mark.parametrize("garbage", [math.nan, INF, -INF, 1e300])
def test_ignored_tokens_are_inert(garbage):
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    hidden, head = normal(5, 4), make_head(4, seed=1, bias=True, padding=2)
    terms, clean = make_terms(5, weights), make_terms(5, weights, rows=weights != 0)
    for term in terms[:2]:
        # what is in an ignored row is no id either
        term.ids[1], term.ids[4] = 1 << 40, 3
        values = term.log_probs if isinstance(term, TopKTerm) else term.entry_weights
        values[weights == 0] = garbage
    terms[1].entropy[weights == 0] = garbage
    kept = hidden[weights != 0].requires_grad_()
    expected = projected_loss(kept, head, clean)
    expected_gradients = gradients(expected.total, kept, head)
    hidden[weights == 0] = garbage
    hidden.requires_grad_()
    loss = projected_loss(hidden, head, terms, chunk_tokens=2)
    torch.testing.assert_close(loss.terms, expected.terms)
    of_hidden, *of_head = gradients(loss.total, hidden, head)
    assert_all_close([of_hidden[weights != 0], *of_head], expected_gradients)
    assert (of_hidden[weights == 0] == 0).all()


def test_ignored_rows_are_inert_on_dense_logits():
    student = torch.full((2, 5), math.nan, dtype=torch.float64)
    student[0] = 0.0
    student.requires_grad_()
    ids, log_probs = torch.tensor([[1], [77]]), torch.tensor([[-1.0], [math.nan]])
    values = sparse_divergence(student, TopKTerm(Divergence(), ids, log_probs, weights=torch.tensor([2.0, 0.0])))
    one = sparse_divergence(student[:1], TopKTerm(Divergence(), ids[:1], log_probs[:1]))
    assert values.tolist() == [2 * one.item(), 0.0]
    assert (torch.autograd.grad(values.sum(), student)[0][1] == 0).all()


@pytest.mark.parametrize("kind", ["top-k", "sampled"])
def test_nan_in_a_row_that_counts_is_passed_on(kind):
    for term in make_terms(3)[:2]:
        (term.log_probs if isinstance(term, TopKTerm) else term.entry_weights)[0, 2] = math.nan
        values = sparse_divergence(logits(3, VOCABULARY), term)
        assert values.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("cuts", [[9], [3, 6], [1] * 9, [4, 0, 5]])
def test_micro_batches_sum_to_the_whole(cuts):
    weights = torch.tensor([0.0, 2.0, 1.0, 0.5, 0.0, 1.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    hidden, head = normal(9, 4).requires_grad_(), make_head(4, seed=1, bias=True)
    whole = projected_loss(hidden, head, make_terms(9, weights))
    expected = gradients(whole.total, hidden, head)
    parts = [
        projected_loss(hidden[rows], head, make_terms(9, weights, weights.sum(), rows), chunk_tokens=2).total
        for rows in torch.arange(9).split(cuts)
    ]
    torch.testing.assert_close(sum(parts), whole.total)
    assert_all_close(gradients(sum(parts), hidden, head), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_at_least_float32_inside(dtype):
    student = logits(4, 30).to(dtype).requires_grad_()
    ids, log_probs = listed(logits(4, 30, seed=1, dtype=torch.float32), 5)
    terms = [
        TopKTerm(Divergence(), ids, log_probs.to(torch.float16)),
        SampledTerm(Divergence(), ids, log_probs.exp(), torch.zeros(4)),
    ]
    for term in terms:
        values = sparse_divergence(student, term)
        assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.autograd.grad(values.sum(), student)[0].dtype == dtype


def test_what_is_refused():
    ids, log_probs = torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.25]]).log()
    student = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"temperature is 2\.0, and the top-k signal was stored at 1\.0"):
        TopKTerm(Divergence(temperature=2.0), ids, log_probs)
    with pytest.raises(ValueError, match=r"temperature is 1\.0, and the sampled signal was stored at 3\.0"):
        SampledTerm(Divergence(), ids, log_probs, torch.zeros(1), 3.0)
    with pytest.raises(ValueError, match="divergence is jsd, and a sampled signal"):
        SampledTerm(Divergence("jsd"), ids, log_probs, torch.zeros(1))
    with pytest.raises(ValueError, match=r"wanted \[n, k\]"):
        TopKTerm(Divergence(), ids, log_probs[:, :1])
    with pytest.raises(ValueError, match=r"log_tail \(2,\)"):
        TopKTerm(Divergence(), ids, log_probs, torch.zeros(2))
    with pytest.raises(ValueError, match=r"entropy \(2,\)"):
        SampledTerm(Divergence(), ids, log_probs, torch.zeros(2))
    with pytest.raises(ValueError, match="ids holds 2 and the vocabulary has 2 entries"):
        sparse_divergence(student[:, :2], TopKTerm(Divergence(), ids, log_probs))
    with pytest.raises(ValueError, match="ids holds -100 and"):
        sparse_divergence(student, SampledTerm(Divergence(), ids - 101, log_probs, torch.zeros(1)))
    with pytest.raises(ValueError, match="ids holds 2 twice"):
        sparse_divergence(student, TopKTerm(Divergence(), torch.tensor([[2, 2]]), log_probs))
    with pytest.raises(ValueError, match=r"sum to 54\.6; wanted 1"):
        sparse_divergence(student, TopKTerm(Divergence(), ids[:, :1], torch.tensor([[4.0]])))
    with pytest.raises(ValueError, match=r"sum to 1\.75; wanted 1"):
        sparse_divergence(student, TopKTerm(Divergence(), ids, log_probs, torch.zeros(1)))
    with pytest.raises(ValueError, match="the student 2 tokens"):
        sparse_divergence(torch.zeros(2, 4), TopKTerm(Divergence(), ids, log_probs))
    with pytest.raises(ValueError, match=r"weights \(3,\)"):
        sparse_divergence(student, TopKTerm(Divergence(), ids, log_probs, weights=torch.ones(3)))
    with pytest.raises(ValueError, match=r"wanted \[n, vocabulary\]"):
        sparse_divergence(student[0], TopKTerm(Divergence(), ids, log_probs))
