import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from attar.tokens import TokenizedExample
from attar.train.batches import TokenBudgetBatches, TokenizedRows, collate


def lengths(n, low=50, high=500, seed=0):
    return np.random.default_rng(seed).integers(low, high + 1, n).tolist()


def example(ids, supervised, name="x"):
    return TokenizedExample(name, np.array(ids, dtype=np.int32), np.array(supervised, dtype=np.bool_))


def padded(batch, sizes):
    return len(batch) * max(sizes[row] for row in batch)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=4, max_size=120),
    st.integers(1, 800),
    st.integers(1, 4),
    st.integers(1, 50),
    st.integers(0, 3),
)
def test_every_row_once_within_the_budget_and_evenly(sizes, budget, processes, window, epoch):
    ranks = [
        TokenBudgetBatches(sizes, budget, seed=7, num_processes=processes, rank=rank, window=window)
        for rank in range(processes)
    ]
    for sampler in ranks:
        sampler.set_epoch(epoch)
    drawn = [list(sampler) for sampler in ranks]
    assert len({len(batches) for batches in drawn}) == 1
    assert [len(sampler) for sampler in ranks] == [len(batches) for batches in drawn]
    batches = [batch for batches in drawn for batch in batches]
    rows = sorted(row for batch in batches for row in batch)
    assert set(rows) == set(range(len(sizes)))
    assert len(rows) - len(sizes) == ranks[0].repeated < processes
    assert not ranks[0].repeated or max(map(len, batches)) == 1
    for batch in batches:
        assert padded(batch, sizes) <= budget or len(batch) == 1
    share = sum(sizes[row] for row in rows) / sum(padded(batch, sizes) for batch in batches)
    assert ranks[0].real_share == pytest.approx(share)
    assert ranks[0].over_budget == sum(size > budget for size in sizes)


@pytest.mark.parametrize("n", [5000, 20_000])
@pytest.mark.parametrize("skewed", [False, True])
def test_little_is_padding_where_lengths_vary_tenfold(n, skewed):
    sizes = lengths(n)
    if skewed:
        sizes = np.clip(np.random.default_rng(1).lognormal(4.7, 0.6, n), 50, 500).astype(int).tolist()
    sampler = TokenBudgetBatches(sizes, 8192, seed=0)
    assert sampler.real_share >= 0.95
    # without sorting it would be far less
    assert sum(sizes) / (len(sizes) * max(sizes)) < 0.6


def test_rows_of_nearly_one_length_in_any_order_stay_within_the_budget():
    sizes = lengths(300, 100, 102)
    assert max(padded(batch, sizes) for batch in TokenBudgetBatches(sizes, 1000, seed=0)) <= 1000


def test_an_order_belongs_to_seed_and_epoch():
    sizes = lengths(300)

    def order(seed, epoch):
        sampler = TokenBudgetBatches(sizes, 2000, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    different = [order(1, 2), order(1, 3), order(2, 2), order(2, 1)]
    assert len({str(batches) for batches in different}) == 4
    # not only the order of the batches: what stands in them, although all rows fit one window
    assert {frozenset(batch) for batch in different[0]} != {frozenset(batch) for batch in different[1]}


def test_drawing_an_epoch_again_after_another():
    sampler = TokenBudgetBatches(lengths(100), 2000, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first == list(sampler)


def test_batches_are_not_in_the_order_of_length():
    sizes = lengths(1000)
    means = [np.mean([sizes[row] for row in batch]) for batch in TokenBudgetBatches(sizes, 4000, seed=0)]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_goes_on_in_the_middle(rank):
    sampler = TokenBudgetBatches(lengths(200), 2000, seed=0, num_processes=2, rank=rank)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3, skip=5)
    assert list(sampler) == whole[5:]
    assert len(sampler) == len(whole) - 5
    sampler.set_epoch(4)
    assert len(list(sampler)) == len(sampler) > 5
    with pytest.raises(ValueError, match="skip is 999"):
        sampler.set_epoch(3, skip=999)


def test_a_row_beyond_the_budget_is_a_batch_of_its_own():
    sampler = TokenBudgetBatches([10, 10, 500, 10], 100, seed=0)
    assert [2] in list(sampler)
    assert sampler.over_budget == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lengths": []}, "0 rows"),
        ({"lengths": [3, 0]}, "shortest 0"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"window": 0}, "window 0"),
        ({"num_processes": 4}, "4 processes cannot be given a share of 3 rows"),
        ({"num_processes": 2, "rank": 2}, "rank 2 of 2"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        TokenBudgetBatches(**{"lengths": [1, 2, 3], "tokens_per_batch": 10, "seed": 0} | arguments)


def test_rows_that_cannot_be_shared_out_evenly_come_twice():
    sampler = TokenBudgetBatches([10] * 5, 10, seed=0, num_processes=2)
    assert len(sampler) == 3
    assert sampler.repeated == 1
    assert TokenBudgetBatches([10] * 5, 20, seed=0, num_processes=2).repeated == 0


# collate


def test_collate_by_hand():
    rows = [(7, example([5, 6, 2], [False, True, True])), (3, example([8, 2], [False, True]))]
    batch = collate(rows, pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    # the end of turn is the padding's token too: it is learned, the padding is not
    assert batch["supervised"].tolist() == [[False, True, True], [False, True, False]]
    assert batch["index"].tolist() == [7, 3]
    kinds = {name: tensor.dtype for name, tensor in batch.items()}
    assert kinds.pop("supervised") == torch.bool
    assert set(kinds.values()) == {torch.long}
    with pytest.raises(ValueError, match="no rows"):
        collate([], pad_token_id=2)


def test_a_loader_gives_every_row_under_its_number():
    examples = [example(range(n), [i > 0 for i in range(n)]) for n in lengths(40, 2, 20)]
    sampler = TokenBudgetBatches([len(e) for e in examples], 64, seed=0)
    seen = []
    for batch in DataLoader(
        TokenizedRows(examples, 64), batch_sampler=sampler, collate_fn=lambda rows: collate(rows, 0)
    ):
        for row, mask in zip(batch["index"].tolist(), batch["attention_mask"], strict=True):
            assert mask.sum() == len(examples[row])
            seen.append(row)
    assert sorted(seen) == list(range(40))
