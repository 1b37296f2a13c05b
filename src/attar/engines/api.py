"""Teachers behind an API: ``openai:NAME``, ``anthropic:NAME``, any server that speaks one of the two protocols."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attar.data.wire import Reply, Usage
from attar.engines.base import Answer, Capability, ChatRequest, Failure, TokenLogprobs, all_known
from attar.engines.batches import Batches
from attar.engines.flow import Flow, Job, Limits
from attar.engines.ledger import Accounts, Ledger
from attar.engines.outcomes import request_key
from attar.engines.prices import Price, list_price, stated_price
from attar.engines.servers import Connection, Server
from attar.errors import CapabilityError, ModelError, RecipeError
from attar.recipe.base import Recipe, TeacherModel

__all__ = ["ApiEngine", "Estimate", "ledger_path", "load_api", "price_of", "server_of"]

# What a template, or the provider, may add to a prompt beyond the words in the request, in tokens.
_ADDED_TOKENS = 512
_ADDED_WITH_TOOLS = 2048
# Bytes of English text in a token, at most, of common tokenizers: for the low end of an estimate.
_MOST_BYTES_A_TOKEN = 6
_KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}


@dataclass(frozen=True)
class Estimate:
    """What requests would take, before anything is sent: (least, most)."""

    calls: int
    """to be sent; requests that the ledger holds are free"""
    stored: int
    """that the ledger holds"""
    prompt_tokens: tuple[int, int]
    completion_tokens: tuple[int, int]
    usd: tuple[float, float] | None
    """None where no price is known"""


class ApiEngine:
    """A model behind an API.

    Args:
        server: whom to ask.
        limits: how.
        price: of its tokens; None where it is not known.
        ledger: where answers and spend are kept; None to keep none, as for a measurement of speed.
        batch: use the provider's batch mode; it needs a ledger.
        fresh: ask everything anew, and count it: for measurements of speed, which a stored answer would falsify.
    """

    def __init__(
        self,
        server: Server,
        limits: Limits,
        *,
        price: Price | None = None,
        ledger: Accounts | None = None,
        batch: bool = False,
        fresh: bool = False,
    ) -> None:
        if price is None and ledger is not None and ledger.budget_usd is not None:
            raise RecipeError(
                f"budget.usd is {ledger.budget_usd}, and no price of {server.protocol}:{server.model} at "
                f"{server.address} is known; state teacher.price (input_usd_per_million_tokens, "
                "output_usd_per_million_tokens; both 0 for a server of your own), or leave the budget out"
            )
        if batch and not isinstance(ledger, Ledger):
            raise ValueError("batch mode keeps its batches in a ledger of this process's own, and there is none")
        self.server, self.limits, self.price, self.ledger, self.batch = server, limits, price, ledger, batch
        self._fresh = fresh

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the protocol has; whether a server of another make has it too shows at its first answer."""
        return self.server.capabilities

    @property
    def parameters(self) -> None:
        """Providers do not say."""
        return None

    def chat(self, requests: Iterable[ChatRequest | None]) -> Iterator[tuple[int, Answer | Failure]]:
        """Answer requests, many at a time; see :class:`attar.engines.base.ChatEngine`."""
        if self.batch and isinstance(self.ledger, Ledger):
            batches = Batches(
                self.server,
                self.ledger,
                self._read,
                self.cost_usd,
                timeout_s=self.limits.timeout_s,
                total_timeout_s=self.limits.total_timeout_s,
            )
            known = all_known(requests, "a provider's batch (teacher.batch)")
            yield from batches.chat(self.job(index, request) for index, request in enumerate(known))
            return
        flow = Flow(
            lambda: Connection(self.server, connections=self.limits.concurrency, timeout_s=self.limits.timeout_s),
            self._read,
            self.cost_usd,
            self.limits,
            self.ledger,
        )
        window = 2 * self.limits.concurrency + 16
        source = iter(requests)
        inside = drawn = 0
        more = True
        try:
            while True:
                while more and inside < window:
                    try:
                        request = next(source)
                    except StopIteration:
                        more = False
                        break
                    if request is None:
                        break
                    flow.submit(self.job(drawn, request))
                    inside, drawn = inside + 1, drawn + 1
                if not inside:
                    if more:
                        continue
                    return
                result = flow.results.get()
                if isinstance(result, BaseException):
                    raise result
                inside -= len(result)
                yield from result
        finally:
            flow.stop()

    def estimate(self, requests: Iterable[ChatRequest]) -> Estimate:
        """What requests would take; sends nothing.

        The most is what the budget reserves: a token for every byte of the request, and answers of ``max_tokens``. The
        least is a token for six bytes, and answers of one token.
        """
        calls = stored = prompt_least = prompt_most = written = 0
        for index, request in enumerate(requests):
            job = self.job(index, request)
            if self.ledger is not None and self.ledger.get(job.key) is not None:
                stored += 1
                continue
            calls += 1
            prompt_most += job.prompt_tokens
            prompt_least += sum(len(m.content.encode()) for m in request.messages) // _MOST_BYTES_A_TOKEN
            written += request.max_tokens
        usd = None
        if self.price is not None:
            least = self.price.cost_usd(Usage(prompt_least, calls), batch=self.batch)
            usd = (least, self.price.most_usd(prompt_most, written, batch=self.batch))
        return Estimate(calls, stored, (prompt_least, prompt_most), (calls, written), usd)

    def job(self, index: int, request: ChatRequest) -> Job:
        """A request with its key and the most that it can cost.

        Raises:
            CapabilityError: the server cannot give what it asks for.
        """
        body = self.server.body(request)
        key, size = request_key(self.server.identity, body, request.sample)
        if self._fresh:
            key = f"fresh {uuid.uuid4().hex}"
        # No tokenizer of bytes makes more tokens than there are bytes.
        prompt_tokens = size + (_ADDED_WITH_TOOLS if request.tools else _ADDED_TOKENS)
        most = 0.0 if self.price is None else self.price.most_usd(prompt_tokens, request.max_tokens, batch=self.batch)
        return Job(index, request, body, key, prompt_tokens, most)

    def cost_usd(self, usage: Usage) -> float | None:
        """What a call cost by what the server billed; None where no price is known."""
        return None if self.price is None else self.price.cost_usd(usage, batch=self.batch)

    def _read(self, job: Job, reply: Reply) -> Answer | Failure:
        # A server that does not say what it billed is charged at the most.
        known = None if self.price is None else job.most_usd
        usd = known if reply.usage is None else self.cost_usd(reply.usage)
        text = reply.message.content
        if job.request.schema is not None and reply.finish_reason == "stop" and not _is_json(text):
            return Failure("not json", f"a JSON text was asked for, the answer is {text[:500]!r}", True, usd)
        demanded = job.request.tool_choice not in (None, "auto", "none")
        if demanded and reply.finish_reason == "stop":
            # Some servers drop tools that their model's template does not show.
            return Failure("no tool call", f"a call was asked for, the answer is {text[:500]!r}", True, usd)
        if job.request.top_logprobs is not None and reply.logprobs is None and text:
            raise CapabilityError(
                f"{self.server.protocol}:{self.server.model} at {self.server.address} was asked for top_logprobs and "
                "gives none; use a server that has them, or ask without"
            )
        usage = reply.usage or Usage(0, 0)
        return Answer(
            message=reply.message,
            finish_reason=reply.finish_reason,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            model=reply.model,
            usd=usd,
            top_logprobs=_records(reply) if job.request.top_logprobs is not None else None,
        )


def server_of(teacher: TeacherModel) -> Server:
    """The server that a recipe's teacher stands behind.

    Raises:
        ModelError: its key is not in the environment.
    """
    scheme, _, model = teacher.model.partition(":")
    if scheme not in ("openai", "anthropic") or not model:
        raise ModelError(f"teacher.model: {teacher.model} is neither openai:NAME nor anthropic:NAME")
    protocol: Literal["openai", "anthropic"] = "openai" if scheme == "openai" else "anthropic"
    variable = teacher.api_key_env or (_KEYS[scheme] if teacher.base_url is None else None)
    if variable is None:
        # The key of one provider is nothing to show to another's server.
        return Server(protocol, model, teacher.base_url, "none", "nowhere (teacher.api_key_env is not set)")
    key = os.environ.get(variable, "")
    if not key:
        raise ModelError(f"{teacher.model} needs a key in the environment variable {variable}, which is not set")
    return Server(protocol, model, teacher.base_url, key, variable)


def price_of(teacher: TeacherModel) -> Price | None:
    """What the teacher's tokens cost: by the recipe, else the list price at the provider itself."""
    if teacher.price is not None:
        return stated_price(teacher.price)
    scheme, _, model = teacher.model.partition(":")
    return list_price(scheme, model) if teacher.base_url is None else None


def ledger_path(recipe: Recipe) -> Path:
    """Where a run keeps answers and spend."""
    return recipe.folder / "ledger.sqlite"


def load_api(recipe: Recipe, *, fresh: bool = False, dry: bool = False, ledger: Accounts | None = None) -> ApiEngine:
    """The engine of a recipe whose teacher is behind an API; its ledger stands in the run folder.

    Args:
        recipe: names the teacher, its limits and the budget.
        fresh: see :class:`ApiEngine`; batch mode is off then, since it has no speed.
        dry: for an estimate: nothing is written.
        ledger: the run's, where another process owns it; None to open the file.

    Raises:
        MissingExtra: the provider's client is not installed.
        ModelError: the key is not in the environment.
        RecipeError: a budget is set, and no price is known.
    """
    teacher = recipe.teacher
    server = server_of(teacher)
    server.client(sync=True).close()
    limits = Limits(teacher.concurrency, teacher.timeout_s, teacher.total_timeout_s)
    path = ledger_path(recipe)
    if ledger is None and (path.exists() or not dry):
        ledger = Ledger(path, budget_usd=recipe.budget.usd)
    batch = teacher.batch and not fresh and ledger is not None
    return ApiEngine(server, limits, price=price_of(teacher), ledger=ledger, batch=batch, fresh=fresh)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _records(reply: Reply) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            record["token"],
            float(record["logprob"]),
            tuple((other["token"], float(other["logprob"])) for other in record.get("top_logprobs") or ()),
        )
        for record in reply.logprobs or ()
    )
