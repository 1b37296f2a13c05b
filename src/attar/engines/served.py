"""A model behind vLLM's server as a white box: what it makes of token ids that it is given.

Ids go out and ids come back; no text crosses the wire that either side would tokenise. ``prompt_logprobs`` of
``/v1/completions`` are the log-probabilities of the k likeliest tokens at every position of a prompt, at temperature 1,
and of the token that stands there.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from attar.engines.api import server_of
from attar.engines.base import Capability, Written
from attar.engines.servers import Server, Trouble, status_trouble
from attar.errors import AttarError, CapabilityError, ModelError, RunError, Stopped, require
from attar.recipe.base import TeacherModel

__all__ = ["DEFAULT_ENTRIES", "VLLM", "PromptLimits", "PromptTop", "ServedTeacher", "load_served", "read_prompt_top"]

Item = TypeVar("Item")
Made = TypeVar("Made")

DEFAULT_ENTRIES = 20
"""what vLLM gives at a position unless it was started with another ``--max-logprobs``; -1 there is no limit"""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
# What a row of probabilities may exceed 1 by: float32 logarithms of the server's.
_EXCESS = 1e-3
# What a row may give to ids that the tokenizer does not have: a head's padding rows, which nothing was trained on.
_FOREIGN = 1e-3
# vLLM writes -inf as this.
_IMPOSSIBLE = -9999.0


@dataclass(frozen=True)
class PromptLimits:
    """What the capability ``prompt_top_logprobs`` of a server does not extend to."""

    kinds: tuple[str, ...]
    """of signals that can be made of it"""
    temperature: float
    """the only one at which probabilities are given"""
    layers: bool
    """whether inner states are shown"""
    entries: int
    """at a position, unless the server was started with another limit, which it tells when it is asked for more"""


VLLM = PromptLimits(kinds=("top_k",), temperature=1.0, layers=False, entries=DEFAULT_ENTRIES)


class PromptTop(NamedTuple):
    """What a server says of some positions of a prompt; natural logarithms."""

    ids: npt.NDArray[np.int64]
    """[positions, k], the likeliest first; -1 where one was an id that the tokenizer does not have"""
    log_probs: npt.NDArray[np.float64]
    """[positions, k]; -inf for no entry"""
    own: npt.NDArray[np.float64]
    """[positions], of the token that stands there"""
    words: dict[int, str]
    """id -> its text, as the server writes it"""


def load_served(teacher: TeacherModel, vocabulary: int) -> ServedTeacher:
    """A recipe's teacher behind its server, which must be there and serve it.

    Args:
        teacher: names the model and the address.
        vocabulary: size of the tokenizer's, padding rows not counted.

    Raises:
        CapabilityError: the provider has no log-probabilities of tokens that it is given.
        ModelError: no such model is served there, or the key is refused.
        MissingExtra: ``openai`` is not installed.
        Stopped: the server does not answer.
    """
    if not teacher.model.startswith("openai:") or teacher.base_url is None:
        where = teacher.base_url or "its provider"
        raise CapabilityError(
            f"teacher.model: {teacher.model} at {where} gives no log-probabilities of tokens that it is given "
            "('prompt_top_logprobs'); name a model that vLLM serves, openai:NAME, and its address, teacher.base_url"
        )
    engine = ServedTeacher(
        server_of(teacher),
        vocabulary=vocabulary,
        timeout_s=teacher.timeout_s,
        total_timeout_s=teacher.total_timeout_s,
        concurrency=teacher.concurrency,
    )
    engine.look_up()
    return engine


class ServedTeacher:
    """A model behind vLLM's server. It may be used by several threads.

    Args:
        server: whom to ask.
        vocabulary: size of the tokenizer's, padding rows not counted.
        timeout_s: of an attempt.
        total_timeout_s: of a request with all attempts and the waits between them.
        concurrency: requests in flight at most.
    """

    limits = VLLM

    def __init__(
        self, server: Server, *, vocabulary: int, timeout_s: float, total_timeout_s: float, concurrency: int
    ) -> None:
        self.server, self.vocabulary = server, vocabulary
        self.max_tokens: int | None = None
        """length of the longest prompt with its answer, in tokens, once it was looked up, where the server says it"""
        self._total_timeout_s, self._concurrency = total_timeout_s, concurrency
        self._module = require("openai", "api")
        self._client = server.client(sync=True, timeout=timeout_s)
        self._gone = threading.Event()

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Text, log-probabilities of given tokens, and the likeliest tokens at given positions."""
        return frozenset({"text", "scores", "prompt_top_logprobs"})

    @property
    def parameters(self) -> None:
        """Servers do not say."""
        return None

    @property
    def name(self) -> str:
        """Model and address, for people and fingerprints."""
        return f"{self.server.protocol}:{self.server.model} at {self.server.address}"

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def look_up(self) -> None:
        """Ask whether the model is served, and how long its prompts may be.

        Raises:
            ModelError: it is not.
            Stopped: the server does not answer.
        """
        body = self._try(lambda: self._client.models.with_raw_response.list())
        listed = {str(row.get("id")): row for row in body.get("data") or () if isinstance(row, dict)}
        if self.server.model not in listed:
            raise ModelError(
                f"{self.name} is not there; the server has {', '.join(listed) or 'nothing'}: name one of these in "
                "teacher.model, as openai:NAME"
            )
        length = listed[self.server.model].get("max_model_len")
        self.max_tokens = int(length) if isinstance(length, int) else None

    def prompt_top(self, ids: Sequence[int], places: Sequence[int], entries: int) -> PromptTop:
        """The likeliest tokens at some positions of a prompt, each after all that stands before it.

        Args:
            ids: the prompt.
            places: positions, from 1: nothing comes before the first token.
            entries: how many.

        Raises:
            CapabilityError: the server does not give them.
            ModelError: it read other tokens than these.
            RunError: what it gives are no log-probabilities, or not as many.
            Stopped: it does not answer.
        """
        try:
            body = self._complete(ids, max_tokens=1, prompt_logprobs=entries, return_token_ids=True)
        except _BadRequest as error:
            cure = (
                f"; set distill.signals.entries to {self.limits.entries}, vLLM's limit unless told otherwise, or start "
                f"it with --max-logprobs {entries}"
            )
            raise CapabilityError(
                f"{self.name} refuses a prompt of {len(ids)} tokens with {entries} entries at a position ({error})"
                + (cure if "logprobs" in str(error) else "")
            ) from error
        return read_prompt_top(self.name, self.vocabulary, list(ids), places, min(entries, self.vocabulary), body)

    def write(self, ids: Sequence[int], max_tokens: int, *, measured: bool = False) -> Written:
        """Continue token ids greedily.

        Args:
            ids: the prompt.
            max_tokens: how many to write at most.
            measured: for timings: write exactly so many, past any end, and use nothing of an earlier prompt; one
                attempt.

        Returns:
            The time to the first token is that of the whole answer where it was not measured.

        Raises:
            CapabilityError: the server does not say the ids of what it wrote, or has no room for so many.
            RunError: it wrote fewer, measured.
            Stopped: it does not answer.
        """
        try:
            return self._measured(ids, max_tokens) if measured else self._written(ids, max_tokens)
        except _BadRequest as error:
            raise CapabilityError(
                f"{self.name} refuses to write {max_tokens} tokens after a prompt of {len(ids)} ({error})"
            ) from error

    def _written(self, ids: Sequence[int], max_tokens: int) -> Written:
        started = time.perf_counter()
        choice = self._complete(ids, max_tokens=max_tokens, return_token_ids=True)["choices"][0]
        elapsed_ms = 1000 * (time.perf_counter() - started)
        return Written(self._token_ids(choice), choice.get("finish_reason") == "stop", elapsed_ms)

    def _measured(self, ids: Sequence[int], max_tokens: int) -> Written:
        started = time.perf_counter()
        first_token_ms = 0.0
        written: list[int] = []
        try:
            # A salt of its own: no other prompt's keys and values fit.
            options = {"ignore_eos": True, "cache_salt": uuid.uuid4().hex, "return_token_ids": True}
            for choice in self._stream(ids, max_tokens=max_tokens, **options):
                more = self._token_ids(choice)
                if more and not written:
                    first_token_ms = 1000 * (time.perf_counter() - started)
                written += more
        except Trouble as trouble:
            raise Stopped(f"{self.name} did not answer while it was measured ({trouble}); run again") from trouble
        if len(written) != max_tokens:
            raise RunError(f"{self.name} was to write {max_tokens} tokens, past any end, and wrote {len(written)}")
        return Written(written, False, first_token_ms)

    def each(self, function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """Call a function of this engine for all items, as many at a time as may be in flight.

        The first that fails ends them all, also those that wait for the server to come back.

        Yields:
            What it returns, in the order of the items.
        """
        source = iter(items)
        with ThreadPoolExecutor(self._concurrency, "attar served teacher") as pool:
            waiting = deque(pool.submit(function, item) for item in islice(source, self._concurrency))
            try:
                while waiting:
                    yield waiting.popleft().result()
                    waiting.extend(pool.submit(function, item) for item in islice(source, 1))
            finally:
                self._gone.set()
                pool.shutdown()
                self._gone.clear()

    def _complete(self, ids: Sequence[int], *, max_tokens: int, **options: Any) -> dict[str, Any]:
        create = self._client.completions.with_raw_response.create
        return self._try(lambda: create(**self._body(ids, max_tokens), extra_body=options))

    def _stream(self, ids: Sequence[int], *, max_tokens: int, **options: Any) -> Iterator[dict[str, Any]]:
        create = self._client.completions.with_streaming_response.create
        with self._troubles(), create(**self._body(ids, max_tokens), stream=True, extra_body=options) as response:
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data and data != "[DONE]":
                    yield from _json(data, self.name).get("choices") or ()

    def _token_ids(self, choice: Mapping[str, Any]) -> list[int]:
        ids = choice.get("token_ids")
        if ids is None:
            raise CapabilityError(
                f"{self.name} does not say the ids of what it wrote (return_token_ids); serve the teacher with vLLM"
            )
        return [int(token) for token in ids]

    def _body(self, ids: Sequence[int], max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.server.model,
            "prompt": [int(i) for i in ids],
            "max_tokens": max_tokens,
            "temperature": 0,
        }

    def _try(self, send: Callable[[], Any]) -> dict[str, Any]:
        """Send until there is an answer; the body of it."""
        started, wait = time.monotonic(), _FIRST_WAIT_S
        while True:
            try:
                with self._troubles():
                    return _json(send().http_response.content, self.name)
            except Trouble as trouble:
                seconds = max(wait, trouble.retry_after_s or 0.0)
                spent = time.monotonic() - started
                # Others that fail end this one's wait too.
                if spent + seconds > self._total_timeout_s or self._gone.wait(seconds):
                    raise Stopped(
                        f"{self.name} has not answered for {spent:.0f} s ({trouble}); what it said before is kept: "
                        "once it is back, the same command goes on from here"
                    ) from trouble
                wait = min(2 * wait, _LONGEST_WAIT_S)

    @contextmanager
    def _troubles(self) -> Iterator[None]:
        """What went wrong as an error, or, where it may go right the next time, as a ``Trouble``."""
        try:
            yield
        except self._module.APIStatusError as error:
            trouble = status_trouble(self.server, error.status_code, error.body, error.response.headers)
            if trouble.next == "retry":
                raise trouble from error
            raise trouble.error or _BadRequest(trouble.detail) from error
        except self._module.APIConnectionError as error:
            cause = error.__cause__ or error
            raise Trouble("connection", f"{type(cause).__name__}: {cause}", "retry") from error


def read_prompt_top(
    name: str, vocabulary: int, ids: list[int], places: Sequence[int], entries: int, body: Mapping[str, Any]
) -> PromptTop:
    """What vLLM's answer says of some positions of a prompt, checked.

    Args:
        name: of the model, for errors.
        vocabulary: size of the tokenizer's, padding rows not counted.
        ids: the prompt.
        places: positions.
        entries: wanted at each.
        body: what the server sent.

    Raises:
        CapabilityError: it holds no log-probabilities.
        ModelError: they are of other tokens.
        RunError: they are none, or not as many as wanted.
    """
    choice = (body.get("choices") or [{}])[0]
    rows = choice.get("prompt_logprobs")
    if rows is None:
        raise CapabilityError(
            f"{name} answers without prompt_logprobs: it gives no log-probabilities of tokens that it is "
            "given ('prompt_top_logprobs'); serve the teacher with vLLM"
        )
    read = (body.get("usage") or {}).get("prompt_tokens", len(ids))
    if len(rows) != len(ids) or read != len(ids):
        raise ModelError(
            f"{name} was given {len(ids)} token ids and read {read}, with log-probabilities of {len(rows)}: "
            "something on the way changes the prompt; ask vLLM itself"
        )
    theirs = choice.get("prompt_token_ids")
    for place in range(1, len(ids)):
        if str(ids[place]) not in rows[place] or (theirs is not None and theirs[place] != ids[place]):
            seen = theirs[place] if theirs is not None else next(iter(rows[place]), None)
            raise ModelError(
                f"{name} was given token {ids[place]} at position {place} and read {seen}: it does not read "
                "the ids that it is given; ask vLLM itself"
            )
    found_ids = np.full((len(places), entries), -1, dtype=np.int64)
    found = np.full((len(places), entries), -np.inf)
    own = np.empty(len(places))
    words: dict[int, str] = {}
    for number, place in enumerate(places):
        row = {int(token): entry for token, entry in rows[place].items()}
        words |= {token: str(entry.get("decoded_token") or "") for token, entry in row.items()}
        own[number] = _log(row[ids[place]]["logprob"])
        best = sorted(row.items(), key=lambda item: item[1]["rank"])[:entries]
        values = np.array([_log(entry["logprob"]) for _, entry in best])
        _check_row(name, place, values, entries)
        foreign = np.array([token >= vocabulary for token, _ in best])
        lost = float(np.exp(values[foreign]).sum())
        if lost > _FOREIGN:
            raise ModelError(
                f"{name} gives {lost:.2%} to ids that the tokenizer does not have ({vocabulary} and "
                f"more) at position {place}; name the tokenizer of this model in teacher.tokenizer"
            )
        found_ids[number] = np.where(foreign, -1, [token for token, _ in best])
        found[number] = np.where(foreign, -np.inf, values - np.log1p(-lost))
    return PromptTop(found_ids, found, own, words)


def _check_row(name: str, place: int, values: npt.NDArray[np.float64], entries: int) -> None:
    if len(values) < entries:
        raise RunError(f"{name} gives {len(values)} entries at position {place}, {entries} were asked for")
    mass = float(np.exp(values).sum())
    ordered = bool((np.diff(values[np.isfinite(values)]) <= 0).all())
    if not ordered or not mass <= 1 + _EXCESS:
        raise RunError(
            f"{name} gives no log-probabilities at position {place}: in order of rank they "
            + ("rise" if not ordered else f"sum to {mass:.4g}, at most 1 wanted")
            + "; start vLLM with --logprobs-mode raw_logprobs"
        )


class _BadRequest(AttarError):
    """What the server says about a request that it does not take."""


def _log(value: float) -> float:
    return -np.inf if value <= _IMPOSSIBLE else float(value)


def _json(content: bytes | str, name: str) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Trouble("not json", f"{name} answered {content[:200]!r}", "retry")
    return body
