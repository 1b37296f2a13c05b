"""A source of batches: the student writes, the teacher scores its very tokens.

Agarwal et al. 2024, arXiv:2306.13649 (GKD): a share of the batches (their lambda) holds what the student writes after
the prompts of the recorded batch in whose place it stands, so that it learns in the states that it gets itself into.
Loss, trainer and collator are those of recorded batches. Ids are trained as they were drawn: nothing is decoded and
tokenised again, and what was cut has no end to learn.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from attar.errors import CapabilityError, TrainingError
from attar.signals.packing import Packed
from attar.tokens import TokenizedExample
from attar.train.batches import WRITTEN, TokenBudgetBatches, TokenizedRows, WrittenExample
from attar.train.language_model import SUPERVISED, LanguageModel
from attar.train.sharding import is_sharded
from attar.train.writing import Continuation, Sampling, as_examples, context_of, learned_starts, write

__all__ = ["OnPolicyRows", "Play", "Prompt", "Write"]

# A token in a cache of keys and values takes less than a quarter of what its activations take in a training step.
_CACHED = 4


class Prompt(NamedTuple):
    """What the student is to go on after."""

    example: str
    """id of the recorded example that it comes from"""
    ids: tuple[int, ...]


Write = Callable[[Sequence[Sequence[int]]], list[Continuation]]
"""The student as it is now: token ids of prompts -> what it writes after them."""


class Play(Protocol):
    """Episodes of several turns, such as an agent's."""

    def __call__(self, prompts: Sequence[Prompt], write: Write) -> Iterable[Sequence[Continuation]]:
        """What the student wrote in each prompt's episode, turn by turn.

        A turn's prompt is all that was given before it, as it was given: what tools and users said in between stands
        there, so that no loss falls on it.
        """


def answers(prompts: Sequence[Prompt], write: Write) -> list[list[Continuation]]:
    """Episodes of one turn: an answer to each prompt."""
    return [[answer] for answer in write([prompt.ids for prompt in prompts])]


@dataclass
class _Process:
    """Where a process stands in a run."""

    model: LanguageModel
    batches: list[list[int]]
    """recorded ones, of all its micro-batches"""
    sampling: Sampling
    window: int
    """micro-batches between two refreshes"""
    seed: str
    names: list[str]
    """of the objectives, as they are logged"""
    precision: Callable[[], AbstractContextManager[Any]]


class OnPolicyRows(TokenizedRows):
    """Recorded examples, and what the student writes after their prompts; see ``TokenizedRows``.

    A share of a process's micro-batches, evenly spread, is written by the student. The prompts of those of ``refresh``
    steps are answered together, with the weights at the first of them, so what is learned is at most ``refresh - 1``
    steps old. Of an example with several answers one is drawn, each time anew. The answers are cut into as many
    batches as they stand for, within the same budget of tokens: where they are longer than the recorded ones, prompts
    are left out by chance; where they are shorter, batches are smaller.

    On the CPU all of it follows from the trainer's seed.

    Args:
        examples: at least one, each with an answer.
        tokens_per_batch: the trainer's budget.
        sampling: how the student writes.
        share: of micro-batches, 0 to 1; 0 is a run on recorded examples alone.
        refresh: steps, at least 1.
        play: gives episodes; None for single answers.
        ask: the teacher's signals of examples, where it is not live; they stand in ``records``.
    """

    def __init__(
        self,
        examples: Sequence[TokenizedExample],
        tokens_per_batch: int,
        *,
        sampling: Sampling,
        share: float,
        refresh: int = 1,
        play: Play | None = None,
        ask: Callable[[Sequence[TokenizedExample]], Iterable[Packed]] | None = None,
    ) -> None:
        if not 0 <= share <= 1 or refresh < 1:
            raise ValueError(f"share is {share} and refresh {refresh}; wanted 0 to 1, and at least 1")
        super().__init__(list(examples), tokens_per_batch)
        self._starts = [learned_starts(example) for example in examples]
        for example, starts in zip(examples, self._starts, strict=True):
            if not starts:
                raise ValueError(f"example {example.id} supervises no token, so it has no prompt to go on after")
        self.share, self._refresh = Fraction(share).limit_denominator(10**6), refresh
        self._sampling, self._play, self._ask = sampling, play or answers, ask
        self.records: dict[str, Packed] = {}
        """signals of what was written, by example; for ``SignalReader(beside=...)``"""
        self._process: _Process | None = None
        self._filled: int | None = None
        self._places: dict[int, list[int]] = {}
        self._since = time.perf_counter()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[int, TokenizedExample]]:
        """A batch at once: recorded rows, or one number that stands for a batch that the student writes."""
        if rows[0] < 0:
            micro_batch = -1 - rows[0]
            window = micro_batch // self._running.window
            if window != self._filled:
                self._fill(window)
            rows = self._places[micro_batch]
        return [self[row] for row in rows]

    def begin(
        self, batches: Iterable[list[int]], model: nn.Module, args: Any, accelerator: Any, names: Sequence[str]
    ) -> list[list[int]]:
        """A process's micro-batches, those that the student writes as one negative number each.

        Args:
            batches: recorded ones, of the whole run.
            model: what is trained.
            args: ``transformers.TrainingArguments``.
            accelerator: accelerate's.
            names: of the model's objectives, as they are logged.

        Raises:
            CapabilityError: the student cannot write in this process.
        """
        sharded = is_sharded(accelerator)
        if not isinstance(model, LanguageModel) or sharded or args.dataloader_num_workers:
            raise CapabilityError(
                "on-policy batches are written in each training process by a causal language model with whole weights; "
                f"this is {type(model).__name__}, sharded: {sharded}, with {args.dataloader_num_workers} dataloader "
                "workers; use one process or DDP, and no workers"
            )
        recorded = [list(batch) for batch in batches]
        limits = [self._sampling.longest, context_of(model.student)]
        known = [limit for limit in limits if limit is not None]
        self._process = _Process(
            model,
            recorded,
            replace(self._sampling, longest=min(known, default=None)),
            self._refresh * int(args.gradient_accumulation_steps),
            f"{args.seed}/{args.process_index}",
            list(names),
            accelerator.autocast,
        )
        self._filled, self._places = None, {}
        self._counts = torch.zeros(6 + len(names), dtype=torch.float64)
        self._since = time.perf_counter()
        return [[-1 - n] if self._is_written(n) else batch for n, batch in enumerate(recorded)]

    def _is_written(self, micro_batch: int) -> bool:
        return int((micro_batch + 1) * self.share) > int(micro_batch * self.share)

    @property
    def _running(self) -> _Process:
        if self._process is None:
            raise TrainingError("the student writes while it is trained; a DistillationTrainer has to take the batches")
        return self._process

    # Writing

    def _fill(self, window: int) -> None:
        """Answer the prompts of a window's micro-batches."""
        started = time.perf_counter()
        running = self._running
        last = min((window + 1) * running.window, len(running.batches))
        written = [n for n in range(window * running.window, last) if self._is_written(n)]
        rng = random.Random(f"{running.seed}/{window}")
        prompts = [self._prompt(row, rng) for n in written for row in running.batches[n]]
        examples: list[WrittenExample] = []
        for part in self._parts(prompts, rng):
            examples += self._episodes(part, window, len(examples), rng)
            if examples and len(self._cut(examples, 1, window)) > len(written):
                break
        rng.shuffle(examples)
        kept, batches = self._fitted(examples, len(written), window)
        self._keep(window, kept, dict(zip(written, batches, strict=True)))
        self.records.clear()
        if self._ask is not None:
            self.records.update(zip((example.id for example in kept), self._ask(kept), strict=True))
        self._counts[3] += len(examples) - len(kept)
        self._counts[4] += time.perf_counter() - started

    def _prompt(self, row: int, rng: random.Random) -> Prompt:
        example = self.examples[row]
        return Prompt(example.id, tuple(example.ids[: rng.choice(self._starts[row])].tolist()))

    def _parts(self, prompts: list[Prompt], rng: random.Random) -> list[list[Prompt]]:
        """Prompts that are answered together, of about one length; in a random order, as the last may be left out."""
        parts: list[list[Prompt]] = []
        for prompt in sorted(prompts, key=lambda prompt: len(prompt.ids)):
            each = len(prompt.ids) + self._running.sampling.room(prompt.ids)
            if not parts or (len(parts[-1]) + 1) * each > _CACHED * self.tokens_per_batch:
                parts.append([])
            parts[-1].append(prompt)
        rng.shuffle(parts)
        return parts

    def _episodes(self, part: list[Prompt], window: int, count: int, rng: random.Random) -> list[WrittenExample]:
        running = self._running
        head = running.model.whole_head()
        generator = torch.Generator(head.weight.device).manual_seed(rng.getrandbits(63))
        told: list[Continuation] = []

        def write_now(prompts: Sequence[Sequence[int]]) -> list[Continuation]:
            with running.precision():
                told.extend(done := write(running.model.student, head, prompts, running.sampling, generator))
            return done

        played = list(self._play(part, write_now))
        if len(played) != len(part):
            raise TrainingError(f"{len(played)} episodes came back for {len(part)} prompts; wanted one each")
        found: list[WrittenExample] = []
        for prompt, turns in zip(part, played, strict=True):
            found += as_examples(f"{prompt.example}~{window}.{count + len(found)}", turns)
        tokens, ended = sum(len(one.written) for one in told), sum(one.ended for one in told)
        self._counts[:3] += torch.tensor([tokens, len(told), ended])
        return found

    def _cut(self, examples: Sequence[WrittenExample], parts: int, seed: int) -> list[list[int]]:
        """Batches of examples within the budget, as many as ``parts`` divides."""
        lengths = [len(example) for example in examples]
        dealt = [
            TokenBudgetBatches(lengths, self.tokens_per_batch, seed=seed, num_processes=parts, rank=part)
            for part in range(parts)
        ]
        return [batch for batches in dealt for batch in batches]

    def _fitted(
        self, examples: list[WrittenExample], wanted: int, seed: int
    ) -> tuple[list[WrittenExample], list[list[int]]]:
        """As many of the examples as make so many batches, and these."""
        if len(examples) < wanted:
            raise TrainingError(
                f"in the episodes that came back {len(examples)} examples were written, and {wanted} batches are to be "
                "made of them; wanted a turn or more in each episode"
            )
        count = len(examples)
        while (needed := len(self._cut(examples[:count], 1, seed))) > wanted:
            count = count * wanted // needed
        return examples[:count], self._cut(examples[:count], wanted, seed)

    def _keep(self, window: int, examples: Sequence[WrittenExample], batches: dict[int, list[int]]) -> None:
        first = len(self)
        self.examples[first:] = examples  # type: ignore[index]
        self._filled = window
        self._places = {n: [first + place for place in batch] for n, batch in batches.items()}

    # What is logged

    def learned(self, batch: dict[str, Tensor], values: Tensor, denominators: Tensor) -> None:
        """Take note of a micro-batch's values [objectives], each a sum over its denominator."""
        if WRITTEN in batch:
            self._counts[5] += float(batch[SUPERVISED][:, 1:].sum())
            self._counts[6:] += (values.double() * denominators).cpu()

    def counted(self) -> Tensor:
        """All counts of this process since the last call, and the seconds; to be summed over processes."""
        now = time.perf_counter()
        counts = torch.cat([torch.tensor([now - self._since], dtype=torch.float64), self._counts])
        self._counts, self._since = torch.zeros_like(self._counts), now
        return counts

    def figures(self, counts: Tensor) -> dict[str, float]:
        """What is logged of such a sum.

        Returns:
            ``on_policy_tokens``, that were written; ``on_policy_length``, of an answer, the mean; ``on_policy_ended``,
            the share that has an end; ``on_policy_unused``, answers that found no room in a batch;
            ``on_policy_time``, the share of the time that writing took, and asking the teacher where it is not live;
            ``on_policy_tokens_per_s``, while it did;
            ``on_policy_<objective>``, the mean over written tokens. Empty where nothing was written or learned.
        """
        passed, tokens, answered, ended, unused, took, learned, *sums = counts.tolist()
        found: dict[str, float] = {}
        if answered:
            found |= {"tokens": tokens, "length": tokens / answered, "ended": ended / answered, "unused": unused}
            found |= {"time": took / passed, "tokens_per_s": tokens / took}
        if learned:
            measured = zip(self._running.names, sums, strict=True)
            found |= {name: total / learned for name, total in measured if not name.startswith("response")}
        return {f"on_policy_{name}": value for name, value in found.items()}

    # Checkpoints

    def save(self, folder: Path, rank: int, processes: int) -> None:
        """What was written and is not learned yet belongs to a checkpoint: nobody has the weights that wrote it."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        written = self.examples[len(self) :]
        arrays = {
            "lengths": np.array([len(example) for example in written], dtype=np.int64),
            "ids": np.concatenate([np.zeros(0, np.int32), *(example.ids for example in written)]),
            "supervised": np.concatenate([np.zeros(0, np.bool_), *(example.supervised for example in written)]),
        }
        for number, example in enumerate(written):
            for name, array in self.records.get(example.id, {}).items():
                arrays[f"{number}/{name}"] = np.ascontiguousarray(array)
        first = len(self)
        about = {
            "window": self._filled,
            "names": [example.id for example in written],
            "places": {str(n): [row - first for row in rows] for n, rows in self._places.items()},
        }
        save_file(arrays, folder / _file(rank, processes), metadata={"about": json.dumps(about)})

    def load(self, folder: Path, rank: int, processes: int) -> None:
        """Go on with what ``save`` kept.

        Raises:
            TrainingError: there is none for so many processes.
        """
        from safetensors import safe_open

        path = folder / _file(rank, processes)
        if not path.is_file():
            found = sorted(other.name for other in folder.glob("on_policy-*")) or "no on_policy-*"
            raise TrainingError(
                f"{folder} holds {found} and {path.name} is wanted, what the student had written; go on with as many "
                "processes as before, or delete the folder to begin anew"
            )
        with safe_open(path, framework="numpy") as stored:
            about = json.loads(stored.metadata()["about"])
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        edges = np.cumsum(arrays.pop("lengths"))[:-1]
        ids, learned = (np.split(arrays.pop(name), edges) for name in ("ids", "supervised"))
        examples = [WrittenExample(*parts) for parts in zip(about["names"], ids, learned, strict=False)]
        if about["window"] is not None:
            self._keep(about["window"], examples, {int(n): places for n, places in about["places"].items()})
        self.records.clear()
        for name, array in arrays.items():
            number, _, key = name.partition("/")
            self.records.setdefault(about["names"][int(number)], {})[key] = array


def _file(rank: int, processes: int) -> str:
    return f"on_policy-{rank}-of-{processes}.safetensors"
