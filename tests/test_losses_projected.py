import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attar.losses import (
    IGNORED,
    CrossEntropyTerm,
    Divergence,
    DivergenceTerm,
    Head,
    divergence,
    projected_cross_entropy,
    projected_divergence,
    projected_loss,
)
from attar.losses.terms import Softened
from divergences import (
    SHAPES,
    VOCABULARY,
    assert_all_close,
    at,
    by_torch,
    dense_logits,
    every,
    gradients,
    leaves,
    make_head,
    normal,
)


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_the_dense_ones(which, shape):
    which = at(which, 1.5)
    hidden, head = normal(7, 4).requires_grad_(), make_head(4, seed=1, **SHAPES[shape])
    # another width, and other padding
    teacher_hidden, teacher_head = normal(7, 6, seed=4), make_head(6, seed=5, padding=1, softcap=4.0)
    weights = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    loss = projected_divergence(hidden, head, teacher_hidden, teacher_head, which, weights, chunk_tokens=3)
    student = dense_logits(hidden, head)[:, :VOCABULARY]
    teacher = dense_logits(teacher_hidden, teacher_head).detach()[:, :VOCABULARY]
    expected = (divergence(student, teacher, which) * weights).sum() / weights.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    assert_all_close(gradients(3.0 * loss, hidden, head), gradients(3.0 * expected, hidden, head))
    # and those of the papers' formulas, without anything of ours
    formula = (by_torch(student, teacher, which) * weights).sum() / weights.sum()
    assert_all_close(gradients(loss, hidden, head), gradients(formula, hidden, head))


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_is_torchs(shape):
    hidden, head = normal(7, 4).requires_grad_(), make_head(4, seed=1, **SHAPES[shape])
    labels = torch.tensor([0, 10, IGNORED, 3, 3, IGNORED, 7])
    loss = projected_cross_entropy(hidden, head, labels, chunk_tokens=2)
    expected = F.cross_entropy(dense_logits(hidden, head), labels, ignore_index=IGNORED)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    assert_all_close(gradients(loss, hidden, head), gradients(expected, hidden, head))


@pytest.mark.parametrize("which", [Divergence("forward_kl"), Divergence("skewed_reverse_kl", 2.0)], ids=str)
def test_gradcheck(which):
    teacher_hidden, teacher_head = normal(3, 3, seed=4), make_head(3, seed=5)
    labels = torch.tensor([1, IGNORED, 0])

    def loss(hidden, weight, bias):
        head = Head(weight, bias, scale=0.7, softcap=3.0, vocabulary=VOCABULARY)
        terms = [DivergenceTerm(which, teacher_hidden, teacher_head), CrossEntropyTerm(labels)]
        return projected_loss(hidden, head, terms, chunk_tokens=2).total

    inputs = normal(3, 2).requires_grad_(), normal(13, 2, seed=1).requires_grad_(), normal(13, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)


def test_by_hand():
    # one state, two words: logits (0, log 3) * 1, so the student is 1/4 3/4 and the teacher 3/4 1/4
    head = Head(torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64))
    teacher = Head(torch.tensor([[math.log(3), 9.0], [0.0, 9.0]], dtype=torch.float64))
    one = torch.ones(1, 1, dtype=torch.float64)
    loss = projected_divergence(one, head, torch.tensor([[1.0, 2.0]], dtype=torch.float64), teacher, Divergence())
    assert loss.item() == pytest.approx(0.5 * math.log(3))
    assert projected_cross_entropy(one, head, torch.tensor([0])).item() == pytest.approx(math.log(4))
    # twice the weight over a denominator of 8
    weighted = projected_cross_entropy(one, head, torch.tensor([0]), torch.tensor([2.0]), 8)
    assert weighted.item() == pytest.approx(math.log(4) / 4)


@every
def test_zero_where_the_two_agree_and_never_negative(which):
    hidden, head = normal(20, 4, dtype=torch.float32), make_head(4, seed=1, dtype=torch.float32)
    hidden.requires_grad_()
    same = projected_divergence(hidden, head, hidden, head, which, chunk_tokens=8)
    assert 0 <= same.item() <= 1e-6
    assert all(gradient.abs().max() <= 1e-6 for gradient in gradients(same, hidden, head))
    for seed in range(5):
        near = hidden.detach() + 1e-4 * normal(20, 4, seed=seed, dtype=torch.float32)
        assert projected_divergence(hidden, head, near, head, which, chunk_tokens=8).item() >= 0


@every
def test_t_squared(which):
    hidden, teacher_hidden = normal(5, 4), normal(5, 3, seed=3)
    head, teacher_head = make_head(4, seed=1), make_head(3, seed=4)
    softened = projected_divergence(
        hidden,
        Head(head.weight, scale=0.25),
        teacher_hidden,
        Head(teacher_head.weight, scale=0.25),
        which,
    )
    loss = projected_divergence(hidden, head, teacher_hidden, teacher_head, at(which, 4.0))
    torch.testing.assert_close(loss, 16 * softened)


def two_terms(n, weights=None, denominators=(None, None)):
    labels = torch.arange(n) % VOCABULARY
    labels[1::3] = IGNORED
    teacher_head = make_head(5, seed=9, padding=2)
    return [
        DivergenceTerm(Divergence("jsd", 2.0), normal(n, 5, seed=8), teacher_head, weights, denominators[0], 0.3),
        CrossEntropyTerm(labels, weights, denominators[1], 0.7),
    ]


def test_terms_add_up():
    hidden, head = normal(10, 4).requires_grad_(), make_head(4, seed=1, bias=True, softcap=4.0)
    terms = two_terms(10)
    both = projected_loss(hidden, head, terms, chunk_tokens=4)
    apart = [
        projected_divergence(
            hidden, head, terms[0].teacher_hidden, terms[0].teacher_head, terms[0].divergence, chunk_tokens=4
        ),
        projected_cross_entropy(hidden, head, terms[1].labels, chunk_tokens=4),
    ]
    torch.testing.assert_close(both.terms, torch.stack(apart).detach())
    assert not both.terms.requires_grad
    expected = 0.3 * apart[0] + 0.7 * apart[1]
    torch.testing.assert_close(both.total, expected)
    assert_all_close(gradients(both.total, hidden, head), gradients(expected, hidden, head))


def test_a_second_backward_adds_the_same_gradients_again():
    hidden, head = normal(10, 4).requires_grad_(), make_head(4, seed=1)
    total = projected_loss(hidden, head, two_terms(10)).total
    total.backward(retain_graph=True)
    once = [tensor.grad.clone() for tensor in (hidden, head.weight)]
    total.backward()
    for first, tensor in zip(once, (hidden, head.weight), strict=True):
        torch.testing.assert_close(tensor.grad, 2 * first)


def test_the_students_logits_are_shared():
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Products.count += "mm" in str(function)
            return function(*args, **(kwargs or {}))

    hidden, head = normal(10, 4).requires_grad_(), make_head(4, seed=1)
    with Products():
        projected_loss(hidden, head, two_terms(10), chunk_tokens=40)
    # logits of student and teacher, gradients of hidden states and weight
    assert Products.count == 4


def test_the_students_distributions_are_shared():
    student = Softened(normal(2, 3))
    assert student.at(2.0) is student.at(2.0)
    assert student.at(2.0) is not student.at(1.0)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 9, 10, 100])
def test_chunk_size_does_not_matter(chunk_tokens):
    hidden, head = normal(10, 4).requires_grad_(), make_head(4, seed=1, bias=True, padding=2)
    weights = torch.linspace(0.0, 2.0, 10)
    whole = projected_loss(hidden, head, two_terms(10, weights), chunk_tokens=10)
    cut = projected_loss(hidden, head, two_terms(10, weights), chunk_tokens=chunk_tokens)
    torch.testing.assert_close(cut.terms, whole.terms)
    assert_all_close(gradients(cut.total, hidden, head), gradients(whole.total, hidden, head))


@pytest.mark.parametrize("cuts", [[12], [6, 6], [1] * 12, [5, 0, 1, 6], [2, 3, 7]])
def test_micro_batches_sum_to_the_whole(cuts):
    hidden, head = normal(12, 4).requires_grad_(), make_head(4, seed=1, bias=True)
    weights = torch.tensor([0.0, 0.0, 1.0, 0.5, 2.0, 1.0, 1.0, 0.0, 3.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    whole = two_terms(12, weights)
    expected = projected_loss(hidden, head, whole)
    labelled = (weights * (whole[1].labels != IGNORED)).sum()
    total = 0.0
    for rows in torch.arange(12).split(cuts):
        terms = [
            DivergenceTerm(
                whole[0].divergence,
                whole[0].teacher_hidden[rows],
                whole[0].teacher_head,
                weights[rows],
                weights.sum(),
                0.3,
            ),
            CrossEntropyTerm(whole[1].labels[rows], weights[rows], float(labelled), 0.7),
        ]
        part = projected_loss(hidden[rows], head, terms, chunk_tokens=2).total
        part.backward()
        total += part.item()
    assert total == pytest.approx(expected.total.item(), rel=1e-12)
    assert_all_close([leaf.grad for leaf in leaves(hidden, head)], gradients(expected.total, hidden, head))


@every
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300])
def test_ignored_tokens_are_inert(which, garbage):
    hidden, head = normal(5, 4), make_head(4, seed=1, bias=True, padding=2, softcap=3.0)
    teacher_hidden, teacher_head = normal(5, 3, seed=3), make_head(3, seed=4)
    keep = torch.tensor([True, False, True, True, False])
    labels = torch.where(keep, torch.tensor([1, 2, 3, 4, 5]), IGNORED)
    clean = hidden[keep].requires_grad_()
    terms = [DivergenceTerm(which, teacher_hidden[keep], teacher_head), CrossEntropyTerm(labels[keep])]
    expected = projected_loss(clean, head, terms)
    expected_gradients = gradients(expected.total, clean, head)
    hidden[~keep], teacher_hidden[~keep] = garbage, garbage
    hidden.requires_grad_()
    terms = [DivergenceTerm(which, teacher_hidden, teacher_head, keep), CrossEntropyTerm(labels)]
    loss = projected_loss(hidden, head, terms, chunk_tokens=2)
    torch.testing.assert_close(loss.terms, expected.terms)
    of_hidden, *of_head = gradients(loss.total, hidden, head)
    assert_all_close(of_head, expected_gradients[1:])
    assert_all_close([of_hidden[keep]], expected_gradients[:1])
    assert (of_hidden[~keep] == 0).all()


def test_a_token_that_one_term_ignores():
    # the teacher has nothing to say about token 1, whose label counts
    hidden, head = normal(3, 4).requires_grad_(), make_head(4, seed=1)
    teacher_hidden, teacher_head = normal(3, 3, seed=3), make_head(3, seed=4)
    mask, labels = torch.tensor([True, False, True]), torch.tensor([1, 2, IGNORED])
    expected = 2.0 * projected_divergence(hidden, head, teacher_hidden, teacher_head, Divergence(), mask)
    expected = expected + projected_cross_entropy(hidden, head, labels)
    teacher_hidden[1] = math.nan
    terms = [
        DivergenceTerm(Divergence(), teacher_hidden, teacher_head, mask, coefficient=2.0),
        CrossEntropyTerm(labels),
    ]
    loss = projected_loss(hidden, head, terms).total
    torch.testing.assert_close(loss, expected)
    assert_all_close(gradients(loss, hidden, head), gradients(expected, hidden, head))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e300])
def test_padding_rows_are_inert(garbage):
    hidden, head = normal(5, 4).requires_grad_(), make_head(4, seed=1, bias=True, padding=3)
    teacher = normal(5, 3, seed=3), make_head(3, seed=4, padding=7)
    terms = [DivergenceTerm(Divergence("reverse_kl"), *teacher), CrossEntropyTerm(torch.arange(5))]
    expected = projected_loss(hidden, head, terms)
    expected_gradients = gradients(expected.total, hidden, head)
    with torch.no_grad():
        for tensor in (head.weight, head.bias, teacher[1].weight):
            tensor[VOCABULARY:] = garbage
    loss = projected_loss(hidden, head, terms)
    torch.testing.assert_close(loss.total, expected.total)
    actual = gradients(loss.total, hidden, head)
    assert_all_close(actual, expected_gradients)
    assert (actual[1][VOCABULARY:] == 0).all()
    assert (actual[2][VOCABULARY:] == 0).all()


def test_nan_in_a_token_that_counts_is_passed_on():
    hidden, head = normal(3, 4), make_head(4)
    hidden[1, 1] = math.nan
    assert projected_cross_entropy(hidden, head, torch.tensor([0, 1, 2])).isnan()
    assert not projected_cross_entropy(hidden, head, torch.tensor([0, IGNORED, 2])).isnan()


class Largest(TorchDispatchMode):
    """Records the most elements that a tensor had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(out) if torch.is_tensor(leaf)]
        self.elements = max([self.elements, *sizes])
        return out


@every
def test_no_tensor_of_all_tokens_and_the_vocabulary(which):
    n, vocabulary, chunk = 64, 50, 4
    hidden = normal(n, 2).requires_grad_()
    head = make_head(2, bias=True, softcap=3.0, scale=0.5, vocabulary=vocabulary, padding=2)
    teacher = normal(n, 3), make_head(3, vocabulary=vocabulary)
    terms = [DivergenceTerm(at(which, 2.0), *teacher), CrossEntropyTerm(torch.arange(n) % vocabulary)]
    with Largest() as largest:
        projected_loss(hidden, head, terms, chunk_tokens=chunk).total.backward()
    # a chunk of logits, or a tensor as large as an input
    assert largest.elements <= max(chunk * vocabulary, n * 3, (vocabulary + 2) * 2)
    with Largest() as dense:
        divergence(dense_logits(hidden, head)[:, :vocabulary], dense_logits(*teacher), which).sum().backward()
    assert dense.elements >= n * vocabulary


def test_nothing_of_the_vocabulary_is_kept_for_backward():
    hidden, head = normal(64, 2).requires_grad_(), make_head(2, vocabulary=50)
    loss = projected_divergence(hidden, head, normal(64, 3), make_head(3, vocabulary=50), Divergence())
    kept = [tensor.shape for tensor in loss.grad_fn.saved_tensors if tensor is not None]
    assert kept == [(64, 2), (50, 2)]


def test_only_what_needs_a_gradient_gets_one():
    hidden, head = normal(4, 3).requires_grad_(), make_head(3, seed=1, bias=True)
    teacher = normal(4, 2).requires_grad_(), make_head(2, seed=2)
    frozen = Head(head.weight.detach(), head.bias)
    loss = projected_divergence(hidden, frozen, *teacher, Divergence())
    assert loss.grad_fn.saved_tensors[1] is None
    loss.backward()
    assert hidden.grad is not None
    assert head.bias.grad is not None
    assert teacher[0].grad is None
    assert teacher[1].weight.grad is None
    with torch.no_grad():
        assert not projected_divergence(hidden, head, *teacher, Divergence()).requires_grad
    loss = projected_divergence(hidden.detach(), Head(head.weight.detach()), *teacher, Divergence())
    assert not loss.requires_grad


def test_mean_of_nothing():
    hidden, head = normal(2, 3).requires_grad_(), make_head(3)
    none = torch.tensor([IGNORED, IGNORED])
    with pytest.raises(ValueError, match="none of the 2 examples is supervised"):
        projected_cross_entropy(hidden, head, none)
    loss = projected_cross_entropy(hidden, head, none, denominator=3)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, hidden, head))
    with pytest.raises(ValueError, match="denominator is 0"):
        projected_cross_entropy(hidden, head, torch.tensor([1, 2]), denominator=0)
