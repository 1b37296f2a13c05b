import math

import numpy as np
import pytest
import torch
from scipy import stats

from attar.losses import Divergence, Head, divergence
from attar.losses.sparse import SampledTerm, TopKTerm, sparse_divergence
from attar.signals.sparse import example_random, logit_chunks, sampled, sampled_fixed, top_k
from divergences import logits, normal

VOCABULARY = 40


def probabilities(seed=3, spread=2.0):
    """One heavy-tailed distribution."""
    return (spread * normal(VOCABULARY, seed=seed)).softmax(0)


def dense(signal, vocabulary=VOCABULARY):
    table = torch.zeros(len(signal.ids), vocabulary, dtype=torch.float64)
    return table.scatter_add_(1, signal.ids.clamp(min=0), signal.entry_weights)


def draws(draw, setting, p, number, seed=0):
    """Weights [number, vocabulary] of as many draws from one distribution."""
    return dense(draw([p.log().expand(number, -1)], setting, example_random(seed, "x")))


both = pytest.mark.parametrize(("draw", "setting"), [(sampled, 0.04), (sampled_fixed, 12)])


def test_top_k_is_the_best_and_the_mass_of_the_rest():
    teacher = logits(5, VOCABULARY)
    signal = top_k([teacher[:2], teacher[2:]], 3, 2.0)
    logs = (teacher / 2).log_softmax(-1)
    torch.testing.assert_close(signal.ids, logs.argsort(-1, descending=True)[:, :3])
    torch.testing.assert_close(signal.log_probs, logs.gather(1, signal.ids).float())
    rest = logs.exp().scatter(1, signal.ids, 0.0).sum(-1).log()
    torch.testing.assert_close(signal.log_tail, rest.float())
    student = logits(5, VOCABULARY, seed=1)
    which = Divergence("jsd", 2.0)
    whole = top_k([teacher], VOCABULARY, 2.0)
    values = sparse_divergence(student, TopKTerm(which, *whole, 2.0))
    torch.testing.assert_close(values, divergence(student, teacher, which), rtol=1e-5, atol=1e-6)


def test_a_faint_tail_does_not_cancel():
    teacher = torch.zeros(1, 5)
    teacher[0, 2] = 60.0
    assert top_k([teacher], 1).log_tail.item() == pytest.approx(math.log(4) - 60)


def test_top_k_leaves_small_entries_to_the_tail():
    teacher = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64).log()
    signal = top_k([teacher[:1], teacher[1:]], 3, at_least=0.2)
    assert signal.ids.tolist() == [[0, 1], [0, -1]]
    torch.testing.assert_close(signal.log_tail.exp(), torch.tensor([0.2, 0.03]))
    assert signal.log_probs[1].tolist() == [pytest.approx(math.log(0.97)), -math.inf]


@both
def test_what_is_kept_and_what_is_drawn(draw, setting):
    teacher = logits(50, VOCABULARY)
    p = teacher.softmax(-1)
    signal = draw([teacher], setting, example_random(0, "x"))
    present = signal.ids >= 0
    for row in range(50):
        ids, weights, kept = (part[row, present[row]] for part in signal[:3])
        assert len(set(ids.tolist())) == len(ids)
        torch.testing.assert_close(weights[kept], p[row, ids[kept]])
        share = weights[~kept]
        assert (share == share[:1]).all()
        assert (p[row, ids[~kept]] < share).all()
        if draw is sampled:
            assert set(share.tolist()) <= {0.04}
            assert set(ids[kept].tolist()) == set(torch.nonzero(p[row] >= 0.04)[:, 0].tolist())
        else:
            assert len(ids) == 12
            # c p >= 1 exactly for those kept, and sum min(1, c p) = m
            assert (weights[kept] >= share[:1]).all()
            assert (p[row] / share[0]).clamp(max=1).sum().item() == pytest.approx(12)
    if draw is sampled_fixed:
        torch.testing.assert_close(signal.entry_weights.sum(-1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(signal.entropy, torch.distributions.Categorical(p).entropy())


@both
def test_it_is_unbiased(draw, setting):
    # The number of times that an entry is drawn is binomial. All entries together give a false alarm for one seed in
    # 10,000; this one is fixed.
    number, p = 20_000, probabilities()
    weights = draws(draw, setting, p, number)
    for entry in range(VOCABULARY):
        share = weights[:, entry].max().item()
        if share == pytest.approx(p[entry].item()):
            assert (weights[:, entry] == share).all()
            continue
        times = int((weights[:, entry] > 0).sum())
        assert stats.binomtest(times, number, p[entry].item() / share).pvalue > 1e-4 / VOCABULARY


@both
def test_its_variance_is_below_that_of_multinomial_sampling(draw, setting):
    p = probabilities()
    weights = draws(draw, setting, p, 4000)
    entries = (weights > 0).sum(-1).double().mean().item()
    error = (weights - p).square().sum(-1).mean().item()
    multinomial = (1 - p.square().sum().item()) / entries
    assert error < 0.35 * multinomial
    # and it is what the inclusion probabilities say
    share = weights[weights > 0].min().item()
    expected = (p * (share - p)).clamp(min=0).sum().item()
    assert error == pytest.approx(expected, rel=0.05)


def test_the_loss_and_gradient_are_unbiased():
    p, number = probabilities(), 20_000
    student = normal(1, VOCABULARY, seed=8)
    signal = sampled([p.log().expand(number, -1)], 0.04, example_random(1, "x"))
    repeated = student.expand(number, -1).clone().requires_grad_()
    values = sparse_divergence(repeated, SampledTerm(Divergence(), signal.ids, signal.entry_weights, signal.entropy))
    (gradient,) = torch.autograd.grad(values.sum(), repeated)
    exact = student.clone().requires_grad_()
    expected = divergence(exact, p.log()[None], Divergence())
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    # 41 means, each within 5 standard errors: a false alarm in 40,000 seeds
    error = values.std().item() / math.sqrt(number)
    assert values.mean().item() == pytest.approx(expected.item(), abs=5 * error)
    errors = gradient.std(dim=0) / math.sqrt(number)
    assert ((gradient.mean(dim=0) - expected_gradient[0]).abs() <= 5 * errors + 1e-12).all()


@both
@pytest.mark.parametrize("cuts", [[6], [1] * 6, [2, 4]])
def test_an_example_draws_the_same_whatever_the_batch(draw, setting, cuts):
    teacher = logits(6, VOCABULARY)
    whole = draw([teacher], setting, example_random(7, "an example"))
    again = draw(teacher.split(cuts), setting, example_random(7, "an example"))
    for one, other in zip(whole, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    for seed, name in ((8, "an example"), (7, "another")):
        assert not torch.equal(draw([teacher], setting, example_random(seed, name)).ids, whole.ids)


def test_few_possible_entries():
    teacher = torch.full((1, 9), -math.inf)
    teacher[0, [2, 5]] = torch.tensor([0.25, 0.75]).log()
    fixed = sampled_fixed([teacher], 4, example_random(0, "x"))
    assert fixed.kept.all()
    assert dense(fixed, 9)[0].tolist() == pytest.approx([0, 0, 0.25, 0, 0, 0.75, 0, 0, 0])
    assert fixed.entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    for seed in range(20):
        few = sampled([teacher], 0.5, example_random(seed, "x"))
        assert set(few.ids[0].tolist()) <= {2, 5, -1}


@pytest.mark.parametrize("offset", [0.0, 1 - 2**-53])
def test_the_ends_of_the_offset_draw_no_impossible_entry(offset):
    class Fixed:
        def random(self, shape):
            return np.full(shape, offset)

    teacher = torch.full((1, 9), -math.inf)
    teacher[0, 3:6] = 0.0
    for signal in (sampled([teacher], 0.5, Fixed()), sampled_fixed([teacher], 2, Fixed())):
        assert set(signal.ids[0].tolist()) <= {3, 4, 5}


def test_a_flat_distribution():
    signal = sampled_fixed([torch.zeros(200, 8)], 8, example_random(0, "x"))
    torch.testing.assert_close(dense(signal, 8), torch.full((200, 8), 0.125, dtype=torch.float64))
    one = sampled([torch.zeros(200, 8)], 1.0, example_random(0, "x"))
    assert one.ids.shape == (200, 1)
    assert not one.kept.any()


def test_no_token_is_no_entry():
    for signal in (sampled([torch.zeros(0, 8)], 0.1, example_random(0, "x")), top_k([torch.zeros(0, 8)], 2)):
        assert len(signal.ids) == 0


def test_chunks_from_hidden_states():
    hidden, head = normal(7, 4), Head(normal(12, 4, seed=1), scale=0.5, softcap=3.0, vocabulary=10)
    parts = list(logit_chunks(hidden, head, 3))
    assert [len(part) for part in parts] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(parts), head.logits(hidden))
    with pytest.raises(ValueError, match="hidden has shape"):
        next(logit_chunks(hidden[:, :2], head))


def test_random_numbers_of_an_example_are_fixed():
    # A store that is half written goes on only if these stay as they are.
    assert example_random(0, "a").random(2).tolist() == pytest.approx([0.681470775858739, 0.423780964516981])


def test_what_is_refused():
    random, teacher = np.random.default_rng(0), torch.zeros(1, 4)
    with pytest.raises(ValueError, match="k is 5 and the vocabulary has 4 entries"):
        top_k([teacher], 5)
    with pytest.raises(ValueError, match="m is 0 and"):
        sampled_fixed([teacher], 0, random)
    with pytest.raises(ValueError, match=r"threshold is 0\.0; wanted"):
        sampled([teacher], 0.0, random)
    with pytest.raises(ValueError, match=r"at_least is 1\.0; wanted"):
        top_k([teacher], 2, at_least=1.0)
    with pytest.raises(ValueError, match="temperature is -1"):
        top_k([teacher], 2, -1)
    with pytest.raises(ValueError, match="chunks is empty"):
        top_k([], 2)
    with pytest.raises(ValueError, match="hold a NaN"):
        top_k([torch.tensor([[0.0, math.nan]])], 1)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        top_k([teacher[0]], 1)
