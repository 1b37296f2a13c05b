"""OpenAI's batch mode: files of requests, answered within a day at a lower price.

The ledger knows which request waits in which batch, so a run that was cut off collects what it had submitted and
submits the rest. A batch is claimed under a name of ours before it exists, and that name travels with it: whatever
moment the run was cut off at, the batch is found again, or nothing was submitted.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from time import monotonic, sleep
from typing import Any

from attar.data.wire import Reply, Usage
from attar.engines.base import Answer, ChatRequest, Failure
from attar.engines.flow import Job
from attar.engines.ledger import Claim, Ending, Ledger, Over, Stored, Taken
from attar.engines.outcomes import from_json, to_json
from attar.engines.servers import Server, Trouble, read_reply, status_trouble
from attar.errors import AttarError, BudgetExceeded, ModelError, RunError, Stopped, require

__all__ = ["Batches"]

_ENDPOINT = "/v1/chat/completions"
_OURS = "attar-"
# OpenAI takes 50,000 requests and 200 MB a batch; a file of this size is held in memory while it is sent.
_MOST_REQUESTS, _MOST_BYTES = 50_000, 64_000_000
_OVER = ("completed", "expired", "cancelled", "failed")
_WAIT_S = 2.0
_COMMITTED_AT_ONCE = 1000


class Batches:
    """Submits, polls and collects.

    Args:
        server: whom to ask.
        ledger: where answers are kept, and which request waits in which batch.
        read: see :class:`attar.engines.flow.Flow`.
        cost: the same.
        timeout_s: of one call to the server.
        total_timeout_s: of one call with all its attempts.
        poll_s: how often a batch is looked at.
    """

    def __init__(
        self,
        server: Server,
        ledger: Ledger,
        read: Callable[[Job, Reply], Answer | Failure],
        cost: Callable[[Usage], float | None],
        *,
        timeout_s: float,
        total_timeout_s: float,
        poll_s: float = 30.0,
    ) -> None:
        self._server, self._ledger, self._read, self._cost = server, ledger, read, cost
        self._timeout_s, self._total_timeout_s, self._poll_s = timeout_s, total_timeout_s, poll_s

    def chat(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Answer | Failure]]:
        """Answer jobs; see :class:`attar.engines.base.ChatEngine`."""
        self._client = self._server.client(sync=True, timeout=self._timeout_s)
        try:
            self._recover()
            # What is waited for: key -> jobs without their texts.
            waiting: dict[str, list[Job]] = {}
            over: str | None = None
            for chunk in _chunks(jobs):
                done, refused = self._submit(chunk, waiting)
                yield from done
                if refused is not None:
                    over = refused
                    break
            yield from self._collect(waiting)
            if over is not None:
                raise BudgetExceeded(over)
        finally:
            self._client.close()

    def _submit(
        self, chunk: list[Job], waiting: dict[str, list[Job]]
    ) -> tuple[list[tuple[int, Answer | Failure]], str | None]:
        """Send what nobody has sent yet; returns what is known already, and why the budget refuses the rest."""
        name = f"{_OURS}{uuid.uuid4().hex}"
        fresh: dict[str, Job] = {}
        for job in chunk:
            if job.key in fresh or job.key in waiting:
                waiting.setdefault(job.key, []).append(_light(job))
            else:
                fresh[job.key] = job
        outcomes = self._ledger.commit([], [(job.key, job.most_usd) for job in fresh.values()], batch=name)
        known: list[tuple[int, Answer | Failure]] = []
        lines: list[bytes] = []
        refused: str | None = None
        for job, outcome in zip(list(fresh.values()), outcomes, strict=True):
            if isinstance(outcome, Stored):
                answer = from_json(outcome.outcome)
                known += [(other.index, answer) for other in [job, *waiting.pop(job.key, [])]]
            elif isinstance(outcome, Over):
                refused = outcome.message
                waiting.pop(job.key, None)
            elif isinstance(outcome, Taken) and outcome.batch is None:
                raise RunError("another process has some of these requests in flight; run again when it has ended")
            else:
                waiting.setdefault(job.key, []).append(_light(job))
                if isinstance(outcome, Claim):
                    row = {"custom_id": job.key, "method": "POST", "url": _ENDPOINT, "body": job.body}
                    lines.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        if lines:
            content = b"".join(lines)
            file = self._call(lambda: self._client.files.create(file=("batch.jsonl", content), purpose="batch"))
            batch = self._call(
                lambda: self._client.batches.create(
                    input_file_id=file.id,
                    endpoint=_ENDPOINT,
                    completion_window="24h",
                    metadata={"attar": name},
                )
            )
            self._ledger.rename_batch(name, batch.id)
        return known, refused

    def _recover(self) -> None:
        """Find the batches that a run was cut off from while it submitted them."""
        lost = [name for name in self._ledger.batches() if name.startswith(_OURS)]
        if not lost:
            return
        theirs = {(b.metadata or {}).get("attar"): b.id for b in self._call(lambda: list(self._client.batches.list()))}
        for name in lost:
            if name in theirs:
                self._ledger.rename_batch(name, theirs[name])
            else:
                self._ledger.commit([Ending(claim) for claim in self._ledger.in_batch(name).values()], [])

    def _collect(self, waiting: dict[str, list[Job]]) -> Iterator[tuple[int, Answer | Failure]]:
        while waiting:
            looked = False
            for name in self._ledger.batches():
                claims = {key: claim for key, claim in self._ledger.in_batch(name).items() if key in waiting}
                if not claims:
                    continue
                looked = True
                batch = self._call(lambda name=name: self._client.batches.retrieve(name))  # type: ignore[misc]
                if batch.status in _OVER:
                    yield from self._collected(batch, claims, waiting)
            for key in [key for key in waiting if not looked]:
                # Another process has collected it, or has given it back.
                stored = self._ledger.get(key)
                outcome = from_json(stored.outcome) if stored else Failure("batch", "given back", False, 0.0)
                yield from ((job.index, outcome) for job in waiting.pop(key))
            if waiting:
                sleep(self._poll_s)

    def _collected(
        self, batch: Any, claims: dict[str, Claim], waiting: dict[str, list[Job]]
    ) -> Iterator[tuple[int, Answer | Failure]]:
        if batch.status == "failed":
            said = "; ".join(str(error.message) for error in (batch.errors.data or [])) if batch.errors else "no reason"
            self._ledger.commit([Ending(claim) for claim in claims.values()], [])
            raise ModelError(f"{self._server.identity} refuses batch {batch.id}: {said}; nothing of it was billed")
        done: list[tuple[Ending, str, Answer | Failure]] = []
        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            content = self._call(lambda file=file: self._client.files.content(file).content)  # type: ignore[misc]
            for line in content.splitlines():
                row = json.loads(line)
                claim = claims.pop(row["custom_id"], None)
                if claim is not None:
                    done.append(self._outcome(row, waiting[claim.key][0], claim))
                if len(done) >= _COMMITTED_AT_ONCE:
                    yield from self._hand_on(done, waiting)
        for claim in claims.values():
            failure = Failure("batch", f"batch {batch.id} is {batch.status} without an answer", False, 0.0)
            done.append((Ending(claim), claim.key, failure))
        yield from self._hand_on(done, waiting)

    def _hand_on(
        self, done: list[tuple[Ending, str, Answer | Failure]], waiting: dict[str, list[Job]]
    ) -> Iterator[tuple[int, Answer | Failure]]:
        self._ledger.commit([ending for ending, _, _ in done], [])
        for _, key, outcome in done:
            yield from ((job.index, outcome) for job in waiting.pop(key))
        done.clear()

    def _outcome(self, row: dict[str, Any], job: Job, claim: Claim) -> tuple[Ending, str, Answer | Failure]:
        """What a line of a batch's results says."""
        response = row.get("response") or {}
        status, usage = int(response.get("status_code") or 0), None
        outcome: Answer | Failure
        try:
            if status != 200:
                raise status_trouble(self._server, status or 500, response.get("body") or row.get("error"), {})
            reply = read_reply(self._server, json.dumps(response["body"]).encode())
            outcome, usage = self._read(job, reply), reply.usage
        except Trouble as trouble:
            final = trouble.next == "final"
            usage = None if isinstance(trouble.billed, str) else trouble.billed
            usd = job.most_usd if trouble.billed == "unknown" else 0.0 if usage is None else self._cost(usage)
            outcome = Failure(trouble.reason, trouble.detail, final, usd)
            if not final:
                return Ending(claim, lost=trouble.billed == "unknown"), claim.key, outcome
        tokens = (0, 0) if usage is None else (usage.prompt_tokens, usage.completion_tokens)
        return Ending(claim, to_json(outcome), outcome.usd, *tokens), claim.key, outcome

    def _call(self, call: Callable[[], Any]) -> Any:
        """Call the server, again and again where that can help.

        Raises:
            AttarError: it cannot.
        """
        module = require(self._server.protocol, "api")
        started, wait = monotonic(), _WAIT_S
        while True:
            try:
                return call()
            except module.APIStatusError as error:
                trouble = status_trouble(self._server, error.status_code, error.body, error.response.headers)
                if trouble.next != "retry":
                    refusal: AttarError = trouble.error or ModelError(f"{self._server.identity} refuses: {trouble}")
                    raise refusal from error
            except module.APIConnectionError as error:
                trouble = Trouble("connection", str(error.__cause__), "retry")
            if monotonic() - started + wait > self._total_timeout_s:
                raise Stopped(
                    f"{self._server.identity} could not be reached for {monotonic() - started:.0f} s ({trouble}); "
                    "batches that were submitted go on: the same command collects them"
                )
            sleep(max(wait, trouble.retry_after_s or 0.0))
            wait = min(2 * wait, 60.0)


def _light(job: Job) -> Job:
    """A job without its texts, which are on their way."""
    asked = job.request
    bare = ChatRequest((), asked.max_tokens, schema=asked.schema, top_logprobs=asked.top_logprobs)
    return replace(job, body={}, request=bare)


def _chunks(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    chunk: list[Job] = []
    size = 0
    for job in jobs:
        if chunk and (len(chunk) >= _MOST_REQUESTS or size + job.prompt_tokens > _MOST_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(job)
        size += job.prompt_tokens
    if chunk:
        yield chunk
