"""``hf:FOLDER`` that continues conversations: a Hugging Face model in this process, in batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from attar.data.conversations import BadRow
from attar.data.schemas import check_tools
from attar.data.types import Message
from attar.engines.base import Answer, Capability, ChatRequest, Failure
from attar.engines.calls import THINK, THOUGHT, Form, form_of, read_message
from attar.engines.calls.constrain import Constraints, Matcher
from attar.engines.calls.grammar import grammar_of
from attar.engines.heads import head_of, plain_model
from attar.engines.local import LocalEngine, load_local, resolve_device
from attar.errors import CapabilityError, DataError, RunError
from attar.tokens import PrunedPrompt, encode_request, with_tools

__all__ = ["LocalChat", "load_local_chat"]


# Grammars that are kept: requests of one job have the same tools, most of them.
_REMEMBERED = 256


@dataclass
class _Row:
    """One request in a batch."""

    index: int
    request: ChatRequest
    tools: tuple[dict[str, Any], ...]
    """on offer"""
    prompt: list[int]
    room: int
    """tokens that may be written"""
    generator: torch.Generator
    thinking: bool
    """whether the prompt has opened a reasoning"""
    matcher: Matcher | None
    """what the answer is held to"""
    written: list[int] = field(default_factory=list)
    text: str | None = None
    """up to the text that ended it, if one did"""
    problem: str | None = None
    """why it could not be held to its grammar any further"""


class LocalChat:
    """A Hugging Face causal language model that continues conversations.

    What a request leaves open is as the model's ``generation_config`` has it. With a seed, an answer depends on the
    request alone, except that a batch rounds otherwise than a single row does, which can turn a close choice.

    An answer that must fit a schema, a call that must be made, and a call once it is begun are held to a grammar: the
    model chooses among the tokens that may come next. Calls stand in the form in which the model's own template writes
    them; a template that knows no tools is given one that does (:func:`attar.tokens.with_tools`).

    Args:
        engine: the model and its tokenizer.
        name: of the model, in answers.
        tokens_per_batch: of the prompts that are answered together, padding included.
        constrained: hold calls to a grammar; else what the model writes is only read, and what cannot be read fails.
        pruned: what was cut from the model's prompts in training is cut from those of requests that carry it.
    """

    def __init__(
        self,
        engine: LocalEngine,
        *,
        name: str,
        tokens_per_batch: int = 512,
        constrained: bool = True,
        pruned: PrunedPrompt | None = None,
    ) -> None:
        self._constrained, self._pruned = constrained, pruned
        self._grammars: dict[str, str] = {}
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

        A request whose tools or schema cannot be held to fails (``bad request``) before anything is written.

        Raises:
            CapabilityError: a request asks for log-probabilities; for tools where the template writes calls in a form
                that is not known here; for a schema or a call that must be made of an engine that is not constrained.
            MissingExtra: an answer is to be held to a grammar, and llguidance is not installed.
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
        demanded = request.tool_choice not in (None, "auto", "none")
        if request.top_logprobs is not None:
            raise CapabilityError(
                f"{self._name} in this process cannot give top_logprobs; serve it (vLLM, llama.cpp) and name it as "
                "openai:NAME with its base_url"
            )
        if not self._constrained and (request.schema is not None or demanded):
            wanted = "an answer that fits a schema" if request.schema is not None else "a call that must be made"
            raise CapabilityError(f"{wanted} needs an engine that is constrained; leave constrained=False out")
        tools = () if request.tool_choice == "none" else request.tools
        tooled = bool(tools) or any(message.tool_calls or message.role == "tool" for message in request.messages)
        tokenizer = self._tooled if tooled else self._engine.tokenizer
        try:
            if not self._constrained:
                check_tools(tools, "the request")
            if demanded and not tools:
                raise DataError(f"tool_choice is {request.tool_choice!r}, and no tools are on offer; offer some")
            prompt = encode_request(tokenizer, *self._shown(request.messages, tools))
            thinking = str(tokenizer.decode(prompt[-8:])).rstrip().endswith(THINK)
            matcher = self._matcher(request, tools, thinking)
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
        return _Row(index, request, tools, prompt, room, generator, thinking, matcher)

    def _shown(
        self, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...]
    ) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
        """What the model reads of a request; calls are held to its tools whether they are read or not."""
        if self._pruned is None:
            return messages, tools
        cut = self._pruned.request(messages, tools)
        return cut.messages, cut.tools

    def _matcher(self, request: ChatRequest, tools: tuple[dict[str, Any], ...], thinking: bool) -> Matcher | None:
        """What the answer to a request is held to; None where any text will do."""
        if not self._constrained or (request.schema is None and not tools):
            return None
        reasons = THOUGHT in self._engine.tokenizer.get_chat_template(None, list(tools) or None)
        constraints = self._constraints
        key = json.dumps([tools, request.tool_choice, request.schema, thinking])
        if key not in self._grammars:
            if len(self._grammars) >= _REMEMBERED:
                self._grammars.clear()
            self._grammars[key] = grammar_of(
                form=self._form if tools else None,
                tools=tools,
                choice=request.tool_choice,
                schema=request.schema,
                thinking="opened" if thinking else "allowed" if reasons else "never",
                apart=constraints.apart,
                words=constraints.words,
            )
        return constraints.matcher(self._grammars[key])

    @cached_property
    def _tooled(self) -> Any:
        """The tokenizer with a template that knows tools."""
        return with_tools(self._engine.tokenizer).tokenizer

    @cached_property
    def _form(self) -> Form:
        """How the model writes calls."""
        return form_of(self._tooled)

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self._engine.tokenizer, self._ends, self._head.vocabulary)

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
                self._write(row, values)
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

    def _write(self, row: _Row, logits: Tensor) -> None:
        """Add the next token to a row, of logits [vocabulary]."""
        try:
            token = self._pick(logits if row.matcher is None else row.matcher.mask(logits), row)
            if row.matcher is not None and token not in self._ends:
                row.matcher.take(token)
        except RunError as error:
            row.problem = str(error)
            return
        row.written.append(token)

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
        if row.problem is not None:
            return "stop"
        if row.written[-1] in self._ends:
            row.written.pop()
            return "stop"
        if row.matcher is not None and row.matcher.over:
            return "stop"
        if row.request.stop:
            text = self._decode(row)
            found = [text.index(stop) for stop in row.request.stop if stop in text]
            if found:
                row.text = text[: min(found)]
                return "stop"
        return "length" if len(row.written) >= row.room else None

    def _decode(self, row: _Row) -> str:
        marks = {THINK, THOUGHT, *(self._form.marks if row.tools else ())}
        spoken = [i for i in row.written if (special := self._special.get(i)) is None or special in marks]
        return str(self._engine.tokenizer.decode(spoken, skip_special_tokens=False))

    @cached_property
    def _special(self) -> dict[int, str]:
        """The special tokens, which are no part of a text unless they mark something in it."""
        added = self._engine.tokenizer.added_tokens_decoder.items()
        return {number: token.content for number, token in added if token.special}

    def _read(self, row: _Row, reason: Literal["stop", "length"]) -> Answer | Failure:
        request = row.request
        if row.problem is not None:
            return Failure("bad request", row.problem, final=True, usd=0.0)
        text = self._decode(row) if row.text is None else row.text
        form = self._form if row.tools else None
        try:
            message = read_message(text, form, tools=row.tools, thinking=row.thinking, cut=reason == "length")
        except BadRow as bad:
            return Failure(bad.reason, str(bad), final=True, usd=0.0)
        if reason == "stop" and not message.tool_calls:
            # Only a text that ends the answer can have cut it short.
            if request.tool_choice not in (None, "auto", "none"):
                return Failure("no tool call", f"{text[:200]!r} was written", final=True, usd=0.0)
            if request.schema is not None and not _is_json(message.content):
                return Failure("not json", f"{text[:200]!r} was written", final=True, usd=0.0)
        return Answer(
            message=message,
            finish_reason="tool_calls" if message.tool_calls and reason == "stop" else reason,
            prompt_tokens=len(row.prompt),
            completion_tokens=len(row.written),
            cached_tokens=0,
            model=self._name,
            usd=0.0,
        )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def load_local_chat(
    model: str,
    *,
    dtype: str = "auto",
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    name: str | None = None,
    tokens_per_batch: int = 512,
    constrained: bool = True,
) -> LocalChat:
    """Load a model to continue conversations, asked as it was trained: what was cut from its prompts is cut.

    Args:
        model: as :func:`attar.engines.local.load_local` takes it.
        dtype: likewise.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        name: in answers; None: the folder's.
        tokens_per_batch: see :class:`LocalChat`.
        constrained: likewise.

    Raises:
        ModelError: there is no such model, or its record of what was cut is damaged.
    """
    place = Path(model.partition(":")[2]).expanduser()
    return LocalChat(
        load_local(model, dtype=dtype, device=resolve_device(device)),
        name=name or place.name,
        tokens_per_batch=tokens_per_batch,
        constrained=constrained,
        pruned=PrunedPrompt.load(place),
    )
