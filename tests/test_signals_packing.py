import math

import numpy as np
import pytest
import torch

from attar.signals.packing import pack_sampled, pack_top_k, unpack_sampled, unpack_top_k
from attar.signals.sparse import Sampled, TopK, example_random, sampled, sampled_fixed, top_k
from divergences import logits, normal

both = pytest.mark.parametrize(("draw", "setting"), [(sampled, 0.01), (sampled_fixed, 30)])


def table(ids, values, vocabulary, absent=0.0):
    """Values by id, [n, vocabulary]."""
    dense = torch.full((len(ids), vocabulary + 1), absent, dtype=torch.float64)
    return dense.scatter_(1, ids.masked_fill(ids < 0, vocabulary), values.double())[:, :vocabulary]


def random_top_k(n, k, vocabulary, seed=0):
    """Ragged rows of any ids whatever, in any order."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(np.stack([rng.choice(vocabulary, k, replace=False) for _ in range(n)]))
    counts = torch.from_numpy(rng.integers(0, k + 1, n))
    ids[torch.arange(k) >= counts[:, None]] = -1
    logs = torch.cat([3 * normal(n, k, seed=seed), torch.ones(n, 1)], 1)
    logs[:, :-1][ids < 0] = -math.inf
    logs = logs.log_softmax(-1).float()
    return TopK(ids, logs[:, :-1], logs[:, -1])


@pytest.mark.parametrize("vocabulary", [64, 300, 49_152, 65_537, 151_936])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 20), (3, 64)])
def test_ids_come_back_exactly(vocabulary, n, k):
    signal = random_top_k(n, k, vocabulary, seed=n)
    back = unpack_top_k(pack_top_k(signal, vocabulary), vocabulary)
    for before, after in zip(signal.ids, back.ids, strict=True):
        assert after[after >= 0].tolist() == sorted(before[before >= 0].tolist())


def test_the_ends_of_the_vocabulary():
    ids = torch.tensor([[0, 99, 98], [99, 0, 1]])
    back = unpack_top_k(pack_top_k(TopK(ids, torch.full((2, 3), -2.0), torch.full((2,), -0.5)), 100), 100)
    assert back.ids.tolist() == [[0, 98, 99], [0, 1, 99]]


@pytest.mark.parametrize("spread", [0.5, 4.0, 12.0])
def test_log_probabilities_come_back_within_the_stated_error(spread):
    vocabulary = 1000
    signal = top_k([spread * logits(200, vocabulary, scale=1.0)], 40)
    back = unpack_top_k(pack_top_k(signal, vocabulary), vocabulary)
    before = table(signal.ids, signal.log_probs, vocabulary, math.nan)
    after = table(back.ids, back.log_probs, vocabulary, math.nan)
    reach = -signal.log_probs.double().min(dim=-1, keepdim=True).values * 1.001
    error = (-before * reach).clamp(min=0.0).sqrt() / 250 + reach / 250_000
    largest = torch.maximum(error.nan_to_num(0.0).max(-1).values, signal.log_tail.double().abs() / 2000)
    assert not ((after - before).abs() > error + largest[:, None] + 1e-6).any()
    assert ((back.log_tail - signal.log_tail).abs() <= signal.log_tail.abs() / 2000 + largest + 1e-6).all()
    sums = back.log_probs.double().exp().sum(-1) + back.log_tail.double().exp()
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-6, atol=0)
    # Rounding to the nearest favours no side: 8000 errors of a deviation below 0.02.
    assert (after - before).nanmean().abs() <= 2e-3


def test_extreme_rows():
    ids = torch.tensor([[3, 1], [4, 5], [-1, -1]])
    log_probs = torch.tensor([[0.0, -math.inf], [math.log(0.5), math.log(0.5)], [-math.inf, -math.inf]])
    log_tail = torch.tensor([-math.inf, -math.inf, 0.0])
    back = unpack_top_k(pack_top_k(TopK(ids, log_probs, log_tail), 9), 9)
    assert back.ids.tolist() == [[1, 3], [4, 5], [-1, -1]]
    torch.testing.assert_close(back.log_probs, log_probs[:, [1, 0]])
    torch.testing.assert_close(back.log_tail, log_tail)
    # a shorter table, where no row is so long
    assert unpack_top_k(pack_top_k(TopK(ids[2:], log_probs[2:], log_tail[2:]), 9), 9).ids.shape == (1, 0)


@both
@pytest.mark.parametrize("vocabulary", [200, 70_000])
def test_a_sample_comes_back(draw, setting, vocabulary):
    signal = draw([2 * logits(20, vocabulary)], setting, example_random(0, "x"))
    back = unpack_sampled(pack_sampled(signal, vocabulary, example_random(0, "y")), vocabulary)
    width = vocabulary + 1
    for value in ("ids", "kept"):
        before = table(signal.ids, getattr(signal, value), vocabulary, -7)
        torch.testing.assert_close(table(back.ids, getattr(back, value), vocabulary, -7), before, rtol=0, atol=0)
    before, after = (table(s.ids, s.entry_weights, width) for s in (signal, back))
    # What a row of draws lacks of 1 goes to its largest entry.
    lacking = 1 - before.sum(-1)
    assert lacking.abs().max() <= (setting if draw is sampled else 1e-9)
    assert (after - before).square().sum(-1).mean().sqrt() <= 4e-3 + lacking.square().mean().sqrt()
    drawn = (signal.ids >= 0) & ~signal.kept
    drawn = table(signal.ids, drawn, width) > 0
    torch.testing.assert_close(after[drawn], before[drawn], rtol=1e-6, atol=0)
    some = signal.kept.any(-1)
    torch.testing.assert_close(after[some].sum(-1), torch.ones(int(some.sum()), dtype=torch.float64))
    torch.testing.assert_close(back.entropy, signal.entropy, rtol=1e-3, atol=0)


def test_a_sure_teacher_is_not_blurred():
    # 255 levels for 1 - 1e-4 and a step of 0.008 would hide what the teacher is not sure of
    p = torch.tensor([[0.9999, 0.0001, 0.0]], dtype=torch.float64)
    signal = sampled([p.log()], 1e-5, example_random(0, "x"))
    back = unpack_sampled(pack_sampled(signal, 3, example_random(0, "y")), 3)
    assert table(back.ids, back.entry_weights, 3)[0, 0].item() == pytest.approx(0.9999, abs=7e-5)


@both
def test_a_packed_sample_is_unbiased(draw, setting):
    # 60 means, each within 5 standard errors: a false alarm in 29,000 seeds; this one is fixed
    vocabulary, number = 60, 20_000
    p = (2 * normal(vocabulary, seed=3)).softmax(0)
    random = example_random(2, "x")
    signal = draw([p.log().expand(number, -1)], setting, random)
    back = unpack_sampled(pack_sampled(signal, vocabulary, random), vocabulary)
    weights = table(back.ids, back.entry_weights, vocabulary)
    errors = weights.std(dim=0) / math.sqrt(number)
    assert ((weights.mean(dim=0) - p).abs() <= 5 * errors + 1e-12).all()
    assert (errors > 0).all()


def test_bytes_a_token():
    # 400 tokens of a vocabulary of 49,152, 60 entries each
    teacher = 4 * logits(100, 49_152, scale=1.0, dtype=torch.float32)
    random = example_random(0, "x")
    packed = pack_sampled(sampled_fixed([teacher], 60, random), 49_152, random)
    assert sum(part.nbytes for part in packed.values()) / 100 < 130
    assert packed["ids"].nbytes * 8 / 6000 < 13
    assert packed["drawn"].shape == (100,)
    packed = pack_top_k(top_k([teacher], 50), 49_152)
    assert sum(part.nbytes for part in packed.values()) / 100 < 130
    random = example_random(0, "x")
    assert pack_sampled(sampled([teacher], 0.01, random), 49_152, random)["drawn"].shape == (1,)


def test_no_tokens():
    empty = TopK(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3), torch.zeros(0))
    assert unpack_top_k(pack_top_k(empty, 9), 9).ids.shape == (0, 0)
    drawn = sampled([torch.zeros(0, 9)], 0.1, example_random(0, "x"))
    assert unpack_sampled(pack_sampled(drawn, 9, example_random(0, "x")), 9).ids.shape == (0, 0)


def test_ids_out_of_the_vocabulary_are_refused():
    signal = TopK(torch.tensor([[3]]), torch.zeros(1, 1), torch.tensor([-math.inf]))
    with pytest.raises(ValueError, match="ids run from 3 to 3 and the vocabulary has 3 entries"):
        pack_top_k(signal, 3)
    drawn = Sampled(torch.tensor([[-2]]), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1))
    with pytest.raises(ValueError, match="ids run from -2"):
        pack_sampled(drawn, 3, example_random(0, "x"))
