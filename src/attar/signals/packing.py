"""Sparse signals as bytes: the arrays that a store keeps of an example, some two bytes an entry, and back.

Ids. An entry's key is token * vocabulary + id. The ascending keys of an example are kept in the code of Elias 1974 and
Fano 1971: the low bits of each as they are, the high ones as the bit set at high + position. With 60 entries a token
of 49,152 that takes 11.6 bits an entry, where 16 would do for the id alone; any vocabulary and rows of any length will
do. What comes back is exactly the ids, in ascending order in each row.

Probabilities. Those of top-k are logarithms, rounded to the nearest of 254 levels, finer towards 0; what that adds to
a row's sum is taken back. Those of a sample are rounded at random, up or down with the probabilities that leave their
mean as it is, so that the sample stays unbiased.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attar.losses.sparse import ABSENT
from attar.signals.sparse import Sampled, TopK

__all__ = ["Packed", "pack_sampled", "pack_top_k", "unpack_sampled", "unpack_top_k"]

Packed = dict[str, npt.NDArray[Any]]
"""Arrays by name. Each has rows of its own."""

LEVELS = 253
"""The largest code of a top-k log-probability; the next one stands for -inf."""
STEPS = 254
"""The largest code, less 1, of a probability that a sample keeps; code 0 stands for what is left of 1."""


def pack_top_k(signal: TopK, vocabulary: int) -> Packed:
    """Arrays ``ids`` [bytes], ``codes`` [entries], ``range`` [n] and ``log_tail`` [n].

    With R nats from a row's smallest log-probability to 0, one of -x comes back within sqrt(x R) / 250 + R / 250,000
    nats, and ``log_tail`` within 1 / 2000 of itself; then the row is divided by its sum, which moves all of it by no
    more than the largest of these.

    Args:
        signal: its ids below ``vocabulary`` and without repetition in a row, or -1 for no entry.
        vocabulary: how many entries there are.
    """
    listed = _listed(signal.ids, signal.log_probs, vocabulary)
    depth = -listed.values.astype(np.float64)
    finite = np.isfinite(depth)
    largest = np.zeros(len(signal.ids))
    np.maximum.at(largest, listed.tokens[finite], depth[finite])
    reach = largest.astype(np.float16)
    fraction = np.divide(
        depth, reach[listed.tokens], out=np.zeros_like(depth), where=finite & (reach[listed.tokens] > 0)
    )
    codes = np.where(finite, np.rint(LEVELS * np.sqrt(np.clip(fraction, 0.0, 1.0))), LEVELS + 1)
    return {
        "ids": listed.packed,
        "codes": codes.astype(np.uint8),
        "range": reach,
        "log_tail": _numpy(signal.log_tail).astype(np.float16),
    }


def unpack_top_k(packed: Mapping[str, npt.NDArray[Any]], vocabulary: int) -> TopK:
    """What ``pack_top_k`` packed; each row's probabilities and its tail sum to 1.

    Args:
        packed: its arrays.
        vocabulary: as it was packed.
    """
    reach, codes = packed["range"].astype(np.float64), packed["codes"].astype(np.float64)
    keys, _ = _unpacked(packed["ids"], len(reach), vocabulary)
    tokens, ids = np.divmod(keys, vocabulary)
    logs = np.where(codes > LEVELS, -np.inf, -reach[tokens] * (codes / LEVELS) ** 2)
    table = _Table(tokens, len(reach))
    buckets = [torch.from_numpy(table.fill(logs, -np.inf)), torch.from_numpy(packed["log_tail"].astype(np.float64))]
    normalised = torch.cat([buckets[0], buckets[1][:, None]], dim=-1).log_softmax(dim=-1).float()
    return TopK(torch.from_numpy(table.fill(ids, ABSENT)), normalised[:, :-1], normalised[:, -1])


def pack_sampled(signal: Sampled, vocabulary: int, random: np.random.Generator) -> Packed:
    """Arrays ``ids`` [bytes], ``kept`` [kept entries], ``drawn`` [n], or [1] if all rows share it, and ``entropy`` [n].

    ``ids`` has one more bit an entry for whether it is kept. Of those kept, all but a row's largest are a byte each:
    the square root of the probability in steps of 1 / 254, so that the error of a row has a norm of about 0.003,
    however many there are. The largest is what is left of 1, so that a row with a kept entry sums to 1, and that of a
    teacher that is sure is nearly exact. ``drawn`` is the weight of drawn entries, in float32. The mean of every
    weight over draws and roundings is the probability.

    Args:
        signal: its ids below ``vocabulary`` and without repetition in a row, or -1 for no entry.
        vocabulary: how many entries there are.
        random: of the example.
    """
    listed = _listed(signal.ids, signal.entry_weights, vocabulary, signal.kept)
    kept, weights = listed.kept, listed.values[listed.kept]
    tokens = listed.tokens[kept]
    below = np.floor(STEPS * np.sqrt(weights)).clip(0, STEPS - 1)
    low, high = (below / STEPS) ** 2, ((below + 1) / STEPS) ** 2
    codes = below + 1 + (random.random(len(weights)) < (weights - low) / (high - low))
    # The last of each token, by weight.
    order = np.lexsort((weights, tokens))
    codes[order[np.flatnonzero(np.diff(tokens[order], append=-1))]] = 0
    drawn = np.zeros(len(signal.ids), dtype=np.float32)
    drawn[listed.tokens[~kept]] = listed.values[~kept]
    shares = np.unique(drawn[drawn > 0])
    return {
        "ids": listed.packed,
        "kept": codes.astype(np.uint8),
        "drawn": shares if len(shares) == 1 else drawn,
        "entropy": _numpy(signal.entropy).astype(np.float16),
    }


def unpack_sampled(packed: Mapping[str, npt.NDArray[Any]], vocabulary: int) -> Sampled:
    """What ``pack_sampled`` packed.

    Args:
        packed: its arrays.
        vocabulary: as it was packed.
    """
    entropy = packed["entropy"].astype(np.float64)
    keys, kept = _unpacked(packed["ids"], len(entropy), vocabulary)
    tokens, ids = np.divmod(keys, vocabulary)
    codes = packed["kept"].astype(np.float64)
    weights = np.broadcast_to(packed["drawn"].astype(np.float64), len(entropy))[tokens]
    weights[kept] = ((codes - 1) / STEPS).clip(0.0) ** 2
    rest = np.flatnonzero(kept)[codes == 0]
    weights[rest] = 1.0 - np.bincount(tokens, weights, len(entropy))[tokens[rest]]
    table = _Table(tokens, len(entropy))
    filled = table.fill(ids, ABSENT), table.fill(weights, 0.0), table.fill(kept, False), entropy
    return Sampled(*(torch.from_numpy(part) for part in filled))


class _Listed(NamedTuple):
    """The entries of an example in ascending order of token and id."""

    tokens: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    kept: npt.NDArray[np.bool_]
    packed: npt.NDArray[np.uint8]


def _listed(ids: Tensor, values: Tensor, vocabulary: int, kept: Tensor | None = None) -> _Listed:
    numbers = _numpy(ids)
    if numbers.size and not (numbers.min() >= ABSENT and numbers.max() < vocabulary):
        raise ValueError(
            f"ids run from {numbers.min()} to {numbers.max()} and the vocabulary has {vocabulary} entries; wanted ids "
            f"from 0 to {vocabulary - 1}, or {ABSENT} for no entry"
        )
    tokens, places = np.nonzero(numbers != ABSENT)
    keys = tokens * vocabulary + numbers[tokens, places]
    order = np.argsort(keys)
    tokens, places = tokens[order], places[order]
    flags = None if kept is None else _numpy(kept)[tokens, places]
    packed = _packed(keys[order], flags, len(numbers) * vocabulary)
    if flags is None:
        flags = np.ones(len(tokens), dtype=bool)
    return _Listed(tokens, _numpy(values)[tokens, places].astype(np.float64), flags, packed)


class _Table:
    """A rectangle [n, longest row] for entries in ascending order of token."""

    def __init__(self, tokens: npt.NDArray[np.int64], n: int) -> None:
        counts = np.bincount(tokens, minlength=n)
        self._shape = n, int(counts.max(initial=0))
        self._places = tokens, np.arange(len(tokens)) - (counts.cumsum() - counts)[tokens]

    def fill(self, values: npt.NDArray[Any], padding: float) -> npt.NDArray[Any]:
        table = np.full(self._shape, padding, dtype=values.dtype)
        table[self._places] = values
        return table


def _low_bits(count: int, universe: int) -> int:
    return max(0, (universe // max(count, 1)).bit_length() - 1)


def _packed(keys: npt.NDArray[np.int64], flags: npt.NDArray[np.bool_] | None, universe: int) -> npt.NDArray[np.uint8]:
    """The number of keys in four bytes; their low bits, the bits of the high ones, and the flags, if there are any."""
    count = len(keys)
    low = _low_bits(count, universe)
    high = np.zeros(count + (max(universe - 1, 0) >> low), dtype=np.uint8)
    high[(keys >> low) + np.arange(count)] = 1
    bits = [((keys[:, None] >> np.arange(low)) & 1).astype(np.uint8).ravel(), high]
    if flags is not None:
        bits.append(flags.astype(np.uint8))
    return np.concatenate([np.array([count], dtype="<u4").view(np.uint8), np.packbits(np.concatenate(bits))])


def _unpacked(packed: npt.NDArray[Any], n: int, vocabulary: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Ascending keys, and what flags there are."""
    octets = packed.astype(np.uint8)
    count = int(octets[:4].view("<u4")[0])
    universe = n * vocabulary
    low = _low_bits(count, universe)
    split = count * low
    end = split + count + (max(universe - 1, 0) >> low)
    bits = np.unpackbits(octets[4:])
    lows = bits[:split].reshape(count, low).astype(np.int64) @ (1 << np.arange(low, dtype=np.int64))
    highs = np.flatnonzero(bits[split:end]) - np.arange(count)
    return (highs << low) | lows, bits[end : end + count].astype(bool)


def _numpy(values: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = values.cpu().numpy()
    return array
