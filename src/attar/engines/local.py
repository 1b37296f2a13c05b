"""A Hugging Face causal language model in this process.

Scoring is made for many short requests under one long prompt: the keys and values of the shared prefix are computed
once, and the requests' own tokens are packed into one row under a mask that keeps them apart. Neither the prefix nor
padding is computed again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from attar.data.types import Part, Prompt
from attar.engines.base import Capability, Completion, Scores, Written
from attar.engines.heads import head_of, plain_model
from attar.errors import ModelError, RunError
from attar.losses import Head
from attar.tokens import encode_plain, encode_prompt, prompt_text

__all__ = ["LocalEngine", "load_local", "resolve_device"]

# Two requests that share no first token with each other: what their prompts have in common is the template's.
_PROBES = ("0", "Zz", "?")
# Largest difference in log-probability between packed and plain scoring before the engine refuses to go on.
_PARITY_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


def resolve_device(device: Literal["auto", "cpu", "cuda", "mps"]) -> torch.device:
    """The device to work on; ``auto`` takes CUDA, then MPS, then the CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@dataclass(frozen=True)
class _Prefix:
    ids: list[int]
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _Row:
    """One request in a pack: its own tokens after the prefix, and where its continuations' tokens are predicted."""

    index: int
    suffix: list[int]


def load_local(model: str, *, dtype: str = "auto", device: torch.device, tokens_per_batch: int = 512) -> LocalEngine:
    """Load ``hf:FOLDER-or-NAME`` or ``hf:FILE.gguf``; the weights of ``vllm:FOLDER`` are those of ``hf:FOLDER``.

    Raises:
        ModelError: there is no causal language model at that place.
    """
    name = model.removeprefix("vllm:").removeprefix("hf:")
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"teacher.model: {name} is no file")
        source, options = str(path.parent), {"gguf_file": path.name}
    else:
        source, options = str(path) if path.exists() else name, {}
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        loaded = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype) if dtype != "auto" else "auto", attn_implementation="sdpa", **options
        )
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{model} is no causal language model that transformers can load ({first_line}); "
            "name a folder with config.json, weights and tokenizer, as hf:FOLDER"
        ) from error
    return LocalEngine(loaded.to(device), tokenizer, tokens_per_batch=tokens_per_batch)


class LocalEngine:
    """A causal language model and its tokenizer, in eval mode and without gradients."""

    def __init__(self, model: Any, tokenizer: Any, *, tokens_per_batch: int = 512) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._tokens_per_batch = tokens_per_batch
        self._prefixes: dict[Prompt, _Prefix] = {}

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Text and log-probabilities of given continuations."""
        return frozenset({"text", "scores"})

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def max_tokens(self) -> int | None:
        """Length of the longest prompt that the model was made for, in tokens."""
        value: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return value

    @torch.inference_mode()
    def complete(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """Continue each prompt greedily."""
        completions = []
        for prompt in prompts:
            ids = torch.tensor([encode_prompt(self.tokenizer, prompt)], device=self.model.device)
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
            )[0, ids.shape[1] :]
            ended = bool(output.numel()) and int(output[-1]) == self.tokenizer.eos_token_id
            text = self.tokenizer.decode(output, skip_special_tokens=True)
            completions.append(Completion(text, "stop" if ended else "length", ids.shape[1], int(output.numel())))
        return completions

    @torch.inference_mode()
    def write(self, ids: Sequence[int], max_tokens: int, *, measured: bool = False) -> Written:
        """Continue token ids greedily, with tokens of the tokenizer only.

        Args:
            ids: the prompt.
            max_tokens: how many to write at most.
            measured: for timings: write exactly so many, past any end.
        """
        started = time.perf_counter()
        decoder = plain_model(self.model).get_decoder()
        chunk, cache = torch.tensor([list(ids)], device=self.model.device), None
        written: list[int] = []
        first_token_ms = 0.0
        while len(written) < max_tokens and (measured or not self._ends.intersection(written[-1:])):
            output = decoder(input_ids=chunk, past_key_values=cache, use_cache=True)
            written.append(int(self._head.logits(output.last_hidden_state[0, -1:])[0].argmax()))
            if len(written) == 1:
                first_token_ms = 1000 * (time.perf_counter() - started)
            chunk, cache = chunk.new_tensor([written[-1:]]), output.past_key_values
        return Written(written, not measured and bool(self._ends.intersection(written[-1:])), first_token_ms)

    @cached_property
    def _head(self) -> Head:
        return head_of(self.model, self.tokenizer)

    @cached_property
    def _ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return frozenset({self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> Scores:
        """Score every continuation after every prompt.

        A continuation is encoded on its own, after one space unless the prompt ends in white space, and appended to
        the prompt's ids.
        """
        branches = self._branches(prompts, continuations)
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        log_probs = np.empty((len(prompts), len(continuations)), dtype=np.float32)
        groups: dict[Prompt, list[_Row]] = {}
        for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
            head = _head(prompt)
            prefix = self._prefix(head, prompt, branches)
            size = len(prefix.ids)
            # A request may merge with the template's last characters into one token; it then goes without the cache.
            fits = len(ids) > size and ids[:size] == prefix.ids
            groups.setdefault(head if fits else (), []).append(_Row(index, ids[size:] if fits else ids))
        for head, rows in groups.items():
            prefix = self._prefixes[head] if head else _Prefix([], [])
            for pack in _packs(rows, self._tokens_per_batch):
                log_probs[[row.index for row in pack]] = self._forward(prefix, pack, branches).cpu().numpy()
        return Scores(
            log_probs,
            np.array([len(branch) for branch in branches]),
            np.array([len(ids) for ids in encoded]),
        )

    def _branches(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[list[int]]:
        spaced = {not prompt_text(prompt)[-1:].isspace() for prompt in prompts}
        if len(spaced) > 1:
            raise RunError("prompts of one call must all end in white space or all not; score them in two calls")
        lead = " " if spaced == {True} else ""
        branches = [encode_plain(self.tokenizer, lead + continuation) for continuation in continuations]
        for continuation, branch in zip(continuations, branches, strict=True):
            if not branch:
                raise RunError(f"the continuation {continuation!r} has no tokens")
        return branches

    def _prefix(self, head: Prompt, prompt: Prompt, branches: list[list[int]]) -> _Prefix:
        """Keys and values of what all requests under this template begin with, computed at its first use."""
        if head not in self._prefixes:
            tail = prompt[len(head) + 1 :]
            probes = [encode_prompt(self.tokenizer, (*head, Part(probe, trusted=False), *tail)) for probe in _PROBES]
            ids = _common_prefix(probes)
            keys_values = []
            if ids:
                cache = DynamicCache()
                self.model.base_model(
                    input_ids=torch.tensor([ids], device=self.model.device), past_key_values=cache, use_cache=True
                )
                keys_values = [(layer.keys, layer.values) for layer in cache.layers]
            prefix = _Prefix(ids, keys_values)
            self._check_parity(prefix, probes, branches)
            self._prefixes[head] = prefix
        return self._prefixes[head]

    def _check_parity(self, prefix: _Prefix, probes: list[list[int]], branches: list[list[int]]) -> None:
        """Packed scoring must equal plain scoring: it would not for a model that ignores positions or masks."""
        rows = [_Row(i, ids[len(prefix.ids) :]) for i, ids in enumerate(probes)]
        # The last row: only it has other requests before it that a broken mask would show it.
        packed = self._forward(prefix, rows, branches)[-1]
        branch = branches[0]
        ids = torch.tensor([probes[-1] + branch[:-1]], device=self.model.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, -len(branch) :].float().log_softmax(-1)
        plain = logits.gather(1, torch.tensor(branch, device=logits.device)[:, None]).sum()
        difference = float((packed[0] - plain).abs())
        tolerance = _PARITY_TOLERANCE[self.model.dtype]
        if not difference <= tolerance:
            raise RunError(
                f"{type(self.model).__name__} scores a packed prompt {float(packed[0]):.4f} and the same prompt alone "
                f"{float(plain):.4f} (tolerance {tolerance}): it cannot be scored this way"
            )

    def _forward(self, prefix: _Prefix, pack: list[_Row], branches: list[list[int]]) -> torch.Tensor:
        """Summed log-probabilities [rows, continuations] of one pack, from one forward pass over one row of tokens.

        Each request's tokens are followed by all but the last token of every continuation of several tokens. A token
        sees the prefix, its own request, and the earlier tokens of its own continuation.
        """
        device = self.model.device
        size = len(prefix.ids)
        ids: list[int] = []
        positions: list[int] = []
        owner: list[int] = []
        branch_of: list[int] = []
        keep: list[int] = []
        # For each row and continuation: which kept positions predict its tokens.
        slots: list[list[list[int]]] = []
        for number, row in enumerate(pack):
            length = len(row.suffix)
            ids += row.suffix
            positions += range(size, size + length)
            owner += [number] * length
            branch_of += [0] * length
            last = len(keep)
            keep.append(len(ids) - 1)
            row_slots = []
            for branch_number, branch in enumerate(branches, start=1):
                inner = branch[:-1]
                start = len(ids)
                ids += inner
                positions += range(size + length, size + length + len(inner))
                owner += [number] * len(inner)
                branch_of += [branch_number] * len(inner)
                row_slots.append([last, *range(len(keep), len(keep) + len(inner))])
                keep += range(start, start + len(inner))
            slots.append(row_slots)
        owners = torch.tensor(owner, device=device)
        kinds = torch.tensor(branch_of, device=device)
        total = len(ids)
        own = (owners[:, None] == owners) & ((kinds == 0) | (kinds[:, None] == kinds))
        own &= torch.ones(total, total, dtype=torch.bool, device=device).tril()
        visible = torch.cat([torch.ones(total, size, dtype=torch.bool, device=device), own], 1)
        dtype = self.model.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, torch.finfo(dtype).min)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(prefix.keys_values):
            cache.update(keys, values, layer)
        logits = self.model(
            input_ids=torch.tensor([ids], device=device),
            attention_mask=mask[None, None],
            position_ids=torch.tensor([positions], device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(keep, device=device),
        ).logits[0]
        table = logits.float().log_softmax(-1)
        rows = torch.tensor([slot for row in slots for places in row for slot in places], device=device)
        tokens = torch.tensor([token for _ in slots for branch in branches for token in branch], device=device)
        picked = table[rows, tokens]
        lengths = [len(branch) for branch in branches]
        return torch.stack([part.sum() for part in picked.split(lengths * len(pack))]).view(len(pack), len(branches))


def _head(prompt: Prompt) -> Prompt:
    """The parts before the request: before the last part that is not trusted."""
    return prompt[: max(i for i, part in enumerate(prompt) if not part.trusted)]


def _common_prefix(sequences: list[list[int]]) -> list[int]:
    shortest = min(len(s) for s in sequences) - 1
    size = next((i for i in range(shortest) if len({s[i] for s in sequences}) > 1), shortest)
    return sequences[0][:size]


def _packs(rows: list[_Row], tokens_per_batch: int) -> Iterator[list[_Row]]:
    pack: list[_Row] = []
    size = 0
    for row in rows:
        if pack and size + len(row.suffix) > tokens_per_batch:
            yield pack
            pack, size = [], 0
        pack.append(row)
        size += len(row.suffix)
    if pack:
        yield pack
