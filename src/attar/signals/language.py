"""What a causal language model says about tokenised examples: asked once, kept packed, read by example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from attar.engines.heads import decoder_path, head_of, hidden_states, plain_model
from attar.errors import WorkspaceError
from attar.losses import Head
from attar.signals.hidden import HEAD, from_array, pack_head, to_array, unpack_head
from attar.signals.packing import Packed, pack_sampled, pack_top_k, unpack_sampled, unpack_top_k
from attar.signals.sparse import example_random, logit_chunks, sampled, top_k
from attar.signals.store import SignalStore
from attar.taps import Taps
from attar.tokens import TokenizedExample

__all__ = ["SignalKind", "SignalReader", "ask", "ask_in_batches", "keep_head"]


@dataclass(frozen=True)
class SignalKind:
    """What is kept of a supervised token."""

    kind: Literal["hidden", "top_k", "sampled"]
    entries: int = 64
    """of ``top_k``: how many at most"""
    at_least: float = 0.0
    """of ``top_k``: an entry of a smaller probability goes to the tail"""
    threshold: float = 0.02
    """of ``sampled``: an entry of at least this probability is kept, a smaller one by chance"""
    temperature: float = 1.0
    """of ``top_k`` and ``sampled``"""
    layers: tuple[str, ...] = ()
    """inner layers that feature objectives read, beside the distribution"""
    seed: int = 0
    """of the draws"""
    dtype: torch.dtype = torch.bfloat16
    """of states"""


@torch.no_grad()
def ask(model: nn.Module, tokenizer: Any, examples: Sequence[TokenizedExample], kind: SignalKind) -> list[Packed]:
    """The signals of some examples, one record each, from one padded forward pass.

    Args:
        model: the teacher, in eval mode.
        tokenizer: its.
        examples: what it reads; a row of a signal for each supervised token, in order.
        kind: what to keep.
    """
    device = next(model.parameters()).device
    longest = max(map(len, examples))
    # Padded on the right with anything: a causal model's real tokens never see it.
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.from_numpy(example.ids)
    head = head_of(model, tokenizer)
    with _tapped(model, kind.layers) as taps:
        states = hidden_states(model, input_ids=ids.to(device))
        layers = [taps[path] for path in kind.layers]
    records = []
    for row, example in enumerate(examples):
        # The state at i - 1 predicts token i.
        before = torch.from_numpy(np.flatnonzero(example.supervised) - 1).to(device)
        own = states[row, before]
        record = _distribution(own, head, kind, example.id)
        for number, layer in enumerate(layers):
            record[f"layer-{number}"] = to_array(layer[row, before], kind.dtype)
        records.append(record)
    return records


def ask_in_batches(
    model: nn.Module, tokenizer: Any, examples: Sequence[TokenizedExample], kind: SignalKind, tokens: int
) -> list[Packed]:
    """The signals of some examples, in their order, asked in batches of at most ``tokens`` tokens, padding included.

    How examples meet in batches follows from the examples alone; the other arguments are as for :func:`ask`.
    """
    records: dict[str, Packed] = {}
    for batch in _batches(examples, tokens):
        records |= zip((example.id for example in batch), ask(model, tokenizer, batch, kind), strict=True)
    return [records[example.id] for example in examples]


def _batches(examples: Sequence[TokenizedExample], tokens: int) -> Iterator[list[TokenizedExample]]:
    """Examples of about one length together, within a budget of padded tokens."""
    batch: list[TokenizedExample] = []
    for example in sorted(examples, key=len):
        if batch and (len(batch) + 1) * len(example) > tokens:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def _distribution(states: Tensor, head: Head, kind: SignalKind, example: str) -> Packed:
    if kind.kind == "hidden":
        return {"states": to_array(states, kind.dtype)}
    chunks = logit_chunks(states, head)
    if kind.kind == "top_k":
        return pack_top_k(top_k(chunks, kind.entries, kind.temperature, kind.at_least), head.size)
    random = example_random(kind.seed, example)
    return pack_sampled(sampled(chunks, kind.threshold, random, kind.temperature), head.size, random)


def keep_head(store: SignalStore, model: nn.Module, tokenizer: Any) -> None:
    """Put the teacher's head beside hidden states, once."""
    if HEAD not in store:
        head = head_of(model, tokenizer)
        store.append([HEAD], [pack_head(head, head.weight.dtype)], 0)


def _tapped(model: nn.Module, layers: Sequence[str]) -> Any:
    return Taps(plain_model(model), layers, called=decoder_path(model)) if layers else nullcontext({})


class SignalReader:
    """Signals of examples as the tensors of a batch. It may be handed to worker processes.

    Args:
        store: of one kind.
        kind: which.
        vocabulary: of the teacher.
        beside: signals that are in no store, by example; looked into first. It may change between two reads.
    """

    def __init__(
        self, store: SignalStore, kind: SignalKind, vocabulary: int, beside: Mapping[str, Packed] | None = None
    ) -> None:
        self._store, self._kind, self._vocabulary = store, kind, vocabulary
        self._beside: Mapping[str, Packed] = {} if beside is None else beside

    def head(self) -> Head | None:
        """The teacher's head, of hidden states."""
        return unpack_head(self._heads_record()) if self._kind.kind == "hidden" else None

    def _heads_record(self) -> Mapping[str, Any]:
        return self._store.read([HEAD])[0]

    def missing(self, examples: Iterable[TokenizedExample]) -> list[str]:
        """Examples that have no signal."""
        return [example.id for example in examples if example.id not in self._store]

    def read(self, examples: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        """Tensors by name, one row for each supervised token of the examples, in order.

        Returns:
            ``states`` [n, width]; or ``ids``, ``log_probs`` [n, k] and ``log_tail`` [n]; or ``ids``, ``entry_weights``
            [n, m] and ``entropy`` [n]; and ``layer:<path>`` [n, width] for each inner layer.

        Raises:
            WorkspaceError: an example has no signal, its bytes are damaged, or they are of other tokens.
        """
        stored = self._store.read([example.id for example in examples if example.id not in self._beside])
        rest = iter(stored)
        records = [self._beside[e.id] if e.id in self._beside else next(rest) for e in examples]
        tables: dict[str, list[Tensor]] = {}
        for example, record in zip(examples, records, strict=True):
            table = self._unpacked(record)
            wanted = int(example.supervised.sum())
            for name, rows in table.items():
                if len(rows) != wanted:
                    raise WorkspaceError(
                        f"the signal of example {example.id} has {len(rows)} rows and the example {wanted} supervised "
                        f"tokens: it was made for other tokens; delete {self._store.folder} and run `attar score`"
                    )
                tables.setdefault(name, []).append(rows)
        return {name: _stacked(rows, -1 if name == "ids" else _EMPTY.get(name, 0.0)) for name, rows in tables.items()}

    def _unpacked(self, record: Mapping[str, Any]) -> dict[str, Tensor]:
        table: dict[str, Tensor] = {}
        if self._kind.kind == "hidden":
            table["states"] = from_array(record["states"])
        elif self._kind.kind == "top_k":
            table |= unpack_top_k(record, self._vocabulary)._asdict()
        else:
            sample = unpack_sampled(record, self._vocabulary)
            table |= {
                "ids": sample.ids,
                "entry_weights": sample.entry_weights.float(),
                "entropy": sample.entropy.float(),
            }
        for number, path in enumerate(self._kind.layers):
            table[f"layer:{path}"] = from_array(record[f"layer-{number}"])
        return table


_EMPTY = {"log_probs": float("-inf")}


def _stacked(parts: Sequence[Tensor], padding: float) -> Tensor:
    """Parts one below the other; ragged ones padded on the right."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1]), value=padding) for part in parts])
