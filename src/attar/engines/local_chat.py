"""``hf:FOLDER`` that continues conversations: a Hugging Face model in this process, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from attar.data.conversations import BadRow
from attar.engines.base import Answer, Capability, ChatRequest, Failure
from attar.engines.calls import CALL, read_message
from attar.engines.heads import head_of, plain_model
from attar.engines.local import LocalEngine
from attar.errors import CapabilityError, DataError
from attar.tokens import encode_request

__all__ = ["LocalChat"]


@dataclass
class _Row:
    """One request in a batch."""

    index: int
    request: ChatRequest
    prompt: list[int]
    room: int
    """tokens that may be written"""
    generator: torch.Generator
    written: list[int] = field(default_factory=list)
    text: str | None = None
    """up to the text that ended it, if one did"""


class LocalChat:
    """A Hugging Face causal language model that continues conversations.

    What a request leaves open is as the model's ``generation_config`` has it. With a seed, an answer depends on the
    request alone, except that a batch rounds otherwise than a single row does, which can turn a close choice.

    Args:
        engine: the model and its tokenizer.
        name: of the model, in answers.
        tokens_per_batch: of the prompts that are answered together, padding included.
    """

    def __init__(self, engine: LocalEngine, *, name: str, tokens_per_batch: int = 512) -> None:
        self._engine, self._name, self._tokens_per_batch = engine, name, tokens_per_batch
        self._decoder = plain_model(engine.model).get_decoder()
        self._head = head_of(engine.model, engine.tokenizer)
        config = engine.model.generation_config
        ends = config.eos_token_id
        self._ends = {engine.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        sampled = bool(config.do_sample)
        self._temperature: float = (config.temperature or 1.0) if sampled else 0.0
        self._top_p: float = (config.top_p or 1.0) if sampled else 1.0
        self._top_k: int | None = config.top_k or None if sampled else None

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Text."""
        return frozenset({"text"})

    def chat(self, requests: Iterable[ChatRequest | None]) -> Iterator[tuple[int, Answer | Failure]]:
        """Answer requests in batches; see :class:`attar.engines.base.ChatEngine`.

        Raises:
            CapabilityError: a request asks for a schema, log-probabilities, a call that must be made, or tools where
                the template writes calls in a form that is not known here.
        """
        batch: list[_Row] = []
        index = -1
        for request in requests:
            if request is None:
                yield from self._answer(batch)
                batch = []
                continue
            index += 1
            row = self._row(index, request)
            if isinstance(row, Failure):
                yield index, row
                continue
            longest = max(len(r.prompt) for r in [*batch, row])
            if batch and longest * (len(batch) + 1) > self._tokens_per_batch:
                yield from self._answer(batch)
                batch = []
            batch.append(row)
        yield from self._answer(batch)

    def _row(self, index: int, request: ChatRequest) -> _Row | Failure:
        for wanted, cure in (
            (request.schema is not None, "an answer that fits a schema"),
            (request.top_logprobs is not None, "top_logprobs"),
            (request.tool_choice not in (None, "auto", "none"), f"tool_choice {request.tool_choice!r}"),
            (
                bool(request.tools) and CALL not in self._engine.tokenizer.get_chat_template(None, list(request.tools)),
                f"calls of tools (its template does not write {CALL})",
            ),
        ):
            if wanted:
                raise CapabilityError(
                    f"{self._name} in this process cannot give {cure}; serve it (vLLM, llama.cpp) and name it as "
                    "openai:NAME with its base_url"
                )
        tools = () if request.tool_choice == "none" else request.tools
        try:
            prompt = encode_request(self._engine.tokenizer, request.messages, tools)
        except DataError as error:
            return Failure("bad request", str(error), final=True, usd=0.0)
        room = request.max_tokens
        if self._engine.max_tokens is not None:
            room = min(room, self._engine.max_tokens - len(prompt))
        if room < 1:
            detail = f"a prompt of {len(prompt)} tokens, and the model reads {self._engine.max_tokens}"
            return Failure("bad request", detail, final=True, usd=0.0)
        generator = torch.Generator()
        generator.seed() if request.seed is None else generator.manual_seed(request.seed)
        return _Row(index, request, prompt, room, generator)

    @torch.inference_mode()
    def _answer(self, batch: list[_Row]) -> Iterator[tuple[int, Answer | Failure]]:
        """Write until every row has ended; a row that ends leaves the batch."""
        if not batch:
            return
        device = self._engine.model.device
        longest = max(len(row.prompt) for row in batch)
        padding = [longest - len(row.prompt) for row in batch]
        filler = next(iter(self._ends), 0)
        ids = torch.tensor([[filler] * n + row.prompt for n, row in zip(padding, batch, strict=True)], device=device)
        mask = torch.tensor([[0] * n + [1] * len(r.prompt) for n, r in zip(padding, batch, strict=True)], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache: Any = None
        rows = list(batch)
        while rows:
            output = self._decoder(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            logits = self._head.logits(output.last_hidden_state[:, -1]).float().cpu()
            for row, values in zip(rows, logits, strict=True):
                row.written.append(self._pick(values, row))
            ended = [self._ended(row) for row in rows]
            for row, reason in zip(rows, ended, strict=True):
                if reason is not None:
                    yield row.index, self._read(row, reason)
            left = [number for number, reason in enumerate(ended) if reason is None]
            if len(left) < len(rows):
                rows = [rows[number] for number in left]
                chosen = torch.tensor(left, dtype=torch.long, device=device)
                mask, positions = mask[chosen], positions[chosen]
                if rows:
                    cache.batch_select_indices(chosen)
            ids = torch.tensor([row.written[-1:] for row in rows], device=device)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def _pick(self, logits: Tensor, row: _Row) -> int:
        """The next token, of logits [vocabulary]."""
        request = row.request
        temperature = self._temperature if request.temperature is None else request.temperature
        if temperature == 0:
            return int(logits.argmax())
        top_p = self._top_p if request.top_p is None else request.top_p
        values, order = (logits / temperature).sort(descending=True)
        if self._top_k is not None:
            values, order = values[: self._top_k], order[: self._top_k]
        shares = values.softmax(0)
        # The smallest set of the likeliest tokens that holds top_p of the probability.
        shares[shares.cumsum(0) - shares >= top_p] = 0
        return int(order[torch.multinomial(shares, 1, generator=row.generator)])

    def _ended(self, row: _Row) -> Literal["stop", "length"] | None:
        if row.written[-1] in self._ends:
            row.written.pop()
            return "stop"
        if row.request.stop:
            text = self._decode(row.written)
            found = [text.index(stop) for stop in row.request.stop if stop in text]
            if found:
                row.text = text[: min(found)]
                return "stop"
        return "length" if len(row.written) >= row.room else None

    def _decode(self, ids: list[int]) -> str:
        return str(self._engine.tokenizer.decode(ids, skip_special_tokens=True))

    def _read(self, row: _Row, reason: Literal["stop", "length"]) -> Answer | Failure:
        text = self._decode(row.written) if row.text is None else row.text
        opened = str(self._engine.tokenizer.decode(row.prompt[-8:])).rstrip().endswith("<think>")
        try:
            message = read_message(text, tools=bool(row.request.tools) and reason == "stop", thinking=opened)
        except BadRow as bad:
            return Failure(bad.reason, str(bad), final=True, usd=0.0)
        return Answer(
            message=message,
            finish_reason="tool_calls" if message.tool_calls else reason,
            prompt_tokens=len(row.prompt),
            completion_tokens=len(row.written),
            cached_tokens=0,
            model=self._name,
            usd=0.0,
        )
