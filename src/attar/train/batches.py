"""Batches of about equally many tokens, and the tensors of a batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attar.signals.language import SignalReader
from attar.tokens import TokenizedExample

__all__ = [
    "SIGNAL",
    "WEIGHTS",
    "WRITTEN",
    "Collator",
    "Epochs",
    "SharedBatches",
    "TokenBudgetBatches",
    "TokenizedRows",
    "WrittenExample",
    "collate",
]

WRITTEN = "written"
"""batch key: which rows the student wrote itself, bool [batch]; absent where it wrote none"""
SIGNAL = "signal_"
"""batch keys that begin so hold the teacher's cached signals, one row a supervised token of the batch, in order"""

WEIGHTS = "weights"
"""batch key: how much each token counts, [batch, length]: above 0 where it is supervised, 0 elsewhere; absent where all
that are supervised count 1"""

# Lengths that differ by less than this share of themselves come in random order, so that an epoch's batches are not
# those of the epoch before; it costs about a hundredth in padding.
_JITTER = 0.02


class WrittenExample(TokenizedExample):
    """An example whose supervised tokens the student wrote: no reference, so that hard targets leave it out."""


class TokenizedRows(Dataset[tuple[int, TokenizedExample]]):
    """Examples with their row numbers, as :func:`collate` wants them.

    Args:
        examples: at least one.
        tokens_per_batch: the trainer's budget for them.
    """

    def __init__(self, examples: Sequence[TokenizedExample], tokens_per_batch: int) -> None:
        self.examples = examples
        self.lengths = [len(example) for example in examples]
        self.tokens_per_batch = tokens_per_batch

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> tuple[int, TokenizedExample]:
        return row, self.examples[row]


class TokenBudgetBatches:
    """A batch sampler: lists of row numbers whose padded tokens stay within a budget.

    Rows are shuffled, cut into windows, sorted by length within each window, cut into batches, and the batches are
    shuffled. Every row comes once in an epoch, on one of the processes, and all processes get equally many batches:
    the ones with most rows are halved until the number divides. Only where no batch has two rows, so that none can be
    halved, some come twice (fewer than there are processes); ``repeated`` says how many. An epoch is the same wherever
    and however often it is drawn, so that a run can go on in the middle of one.

    Args:
        lengths: tokens of each row, at least 1.
        tokens_per_batch: the most tokens of a batch on one process, padding included. A row longer than that is a
            batch of its own.
        seed: of the order; the epoch's number is added to it.
        num_processes: how many processes share an epoch.
        rank: which of them this is.
        window: rows that are sorted together. More pad less, fewer mix more.

    Raises:
        ValueError: an argument is out of its range, or there are fewer rows than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens_per_batch: int,
        *,
        seed: int,
        num_processes: int = 1,
        rank: int = 0,
        window: int = 4096,
    ) -> None:
        if len(lengths) == 0 or min(lengths) < 1:
            raise ValueError(f"lengths holds {len(lengths)} rows, the shortest {min(lengths, default=0)}; wanted >= 1")
        if tokens_per_batch < 1 or window < 1:
            raise ValueError(f"tokens_per_batch is {tokens_per_batch} and window {window}; wanted at least 1")
        if not 0 <= rank < num_processes <= len(lengths):
            raise ValueError(
                f"rank {rank} of {num_processes} processes cannot be given a share of {len(lengths)} rows; wanted 0 <= "
                "rank < num_processes <= rows"
            )
        self.lengths = [int(length) for length in lengths]
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.num_processes = num_processes
        self.rank = rank
        self.window = window
        self.set_epoch(0)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Draw an epoch.

        Args:
            epoch: its number, at least 0.
            skip: how many of this process's batches are done already, when a run goes on.

        Raises:
            ValueError: more batches are skipped than the epoch has.
        """
        self._batches, self.repeated = self._draw(epoch)
        per_process = len(self._batches) // self.num_processes
        if not 0 <= skip <= per_process:
            raise ValueError(f"skip is {skip}, but epoch {epoch} has {per_process} batches on each process")
        self._skip = skip

    def __len__(self) -> int:
        """Batches of this epoch that are left for this process."""
        return len(self._batches) // self.num_processes - self._skip

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches[self.rank :: self.num_processes][self._skip :]:
            yield list(batch)

    @property
    def real_share(self) -> float:
        """Tokens that are not padding, as a share of all tokens of this epoch on all processes."""
        real = sum(self.lengths[row] for batch in self._batches for row in batch)
        return real / sum(len(batch) * self._longest(batch) for batch in self._batches)

    @property
    def over_budget(self) -> int:
        """Rows that are longer than the budget."""
        return sum(length > self.tokens_per_batch for length in self.lengths)

    def _longest(self, batch: list[int]) -> int:
        return max(self.lengths[row] for row in batch)

    def _draw(self, epoch: int) -> tuple[list[list[int]], int]:
        rng = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), self.window):
            jittered = [(self.lengths[row] * rng.uniform(1, 1 + _JITTER), row) for row in order[start:][: self.window]]
            batches += self._cut([row for _, row in sorted(jittered)])
        while len(batches) % self.num_processes:
            largest = max(range(len(batches)), key=lambda number: len(batches[number]))
            rows = batches[largest]
            if len(rows) == 1:
                break
            batches[largest] = rows[: len(rows) // 2]
            batches.append(rows[len(rows) // 2 :])
        repeated = -len(batches) % self.num_processes
        batches += rng.sample(batches, repeated)
        rng.shuffle(batches)
        return batches, repeated

    def _cut(self, rows: list[int]) -> list[list[int]]:
        """Rows in order, as many to a batch as the budget allows."""
        batches: list[list[int]] = []
        longest = 0
        for row in rows:
            longest = max(longest, self.lengths[row])
            if not batches or (len(batches[-1]) + 1) * longest > self.tokens_per_batch:
                batches.append([])
                longest = self.lengths[row]
            batches[-1].append(row)
        return batches


class Epochs:
    """The batches of several epochs in a row, so that the number of an epoch's batches may differ.

    Args:
        batches: of one epoch.
        epochs: how many; a fraction of an epoch is that share of its batches.
        total: in place of ``epochs``, how many batches in all.
    """

    def __init__(self, batches: TokenBudgetBatches, epochs: float, total: int | None = None) -> None:
        self._all: list[list[int]] = []
        self.epochs = 0.0
        """as many as there are batches for"""
        while self.epochs < epochs if total is None else len(self._all) < total:
            batches.set_epoch(int(self.epochs))
            drawn = list(batches)
            used = round(min(1.0, epochs - self.epochs) * len(drawn)) if total is None else total - len(self._all)
            used = min(max(1, used), len(drawn))
            self._all += drawn[:used]
            self.epochs += 1.0 if used == len(drawn) else used / len(drawn)
            if used < len(drawn):
                break

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._all)


class SharedBatches:
    """Batches of held-out data, dealt out to processes: the same batches on any number of them.

    All processes get equally many, as sharded weights are gathered in each forward. Who has one fewer takes the first
    over again, after its own.

    Args:
        batches: row numbers; at least one.
        num_processes: how many share them.
        rank: which of them this is.
    """

    def __init__(self, batches: Sequence[list[int]], num_processes: int = 1, rank: int = 0) -> None:
        mine = list(batches[rank::num_processes])
        self.own = len(mine)
        """how many count"""
        self._all = mine + [batches[0]] * (-(-len(batches) // num_processes) - len(mine))

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._all)


def collate(rows: Sequence[tuple[int, TokenizedExample]], pad_token_id: int) -> dict[str, Tensor]:
    """The tensors of a batch, padded on the right.

    Args:
        rows: row numbers and examples, as :class:`TokenizedRows` gives them; [batch].
        pad_token_id: what stands in ``input_ids`` where nothing is. It may be the EOS token: masks come from
            positions.

    Returns:
        ``input_ids`` [batch, tokens], long; ``attention_mask`` [batch, tokens], long, 1 where a token is;
        ``supervised`` [batch, tokens], bool, True where a token is a target of the state before it; ``index``
        [batch], long, the row numbers; ``weights`` [batch, tokens], float32, where an example has some; and ``written``
        [batch], bool, where a row is a :class:`WrittenExample`.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows to make a batch of")
    shape = (len(rows), max(len(example) for _, example in rows))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    supervised = torch.zeros(shape, dtype=torch.bool)
    for number, (_, example) in enumerate(rows):
        input_ids[number, : len(example)] = torch.from_numpy(example.ids)
        attention_mask[number, : len(example)] = 1
        supervised[number, : len(example)] = torch.from_numpy(example.supervised)
    index = torch.tensor([row for row, _ in rows], dtype=torch.long)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "supervised": supervised, "index": index}
    if any(example.weights is not None for _, example in rows):
        batch[WEIGHTS] = supervised.float()
        for number, (_, example) in enumerate(rows):
            if example.weights is not None:
                batch[WEIGHTS][number, : len(example)] = torch.from_numpy(example.weights)
    written = torch.tensor([isinstance(example, WrittenExample) for _, example in rows])
    return batch | {WRITTEN: written} if bool(written.any()) else batch


class Collator:
    """What a ``DataLoader`` calls: the tensors of a batch, and the teacher's signals where there are some.

    Args:
        pad_token_id: see ``collate``.
        signals: reads them; None for a live teacher or none.
    """

    def __init__(self, pad_token_id: int, signals: SignalReader | None = None) -> None:
        self._pad_token_id, self._signals = pad_token_id, signals

    def __call__(self, rows: Sequence[tuple[int, TokenizedExample]]) -> dict[str, Tensor]:
        """Keys of ``collate``, and ``signal_<name>`` with a row for each supervised token of the batch."""
        batch = collate(rows, self._pad_token_id)
        if self._signals is not None:
            signal = self._signals.read([example for _, example in rows])
            batch |= {f"{SIGNAL}{name}": tensor for name, tensor in signal.items()}
        return batch
