"""The two protocols that API teachers speak, through their providers' own clients.

A client's own retries are off, since every attempt is counted and paid here. What a server answers instead of a reply
becomes a :class:`Trouble`, which says what is to be done about it.
"""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attar.data.conversations import BadRow
from attar.data.wire import (
    Reply,
    Usage,
    anthropic_body,
    anthropic_usage,
    openai_body,
    openai_usage,
    parse_anthropic_reply,
    parse_openai_reply,
)
from attar.engines.base import Capability, ChatRequest
from attar.errors import AttarError, CapabilityError, ModelError, Stopped, require

__all__ = ["OPENAI_URL", "Connection", "Server", "Trouble", "read_reply"]

OPENAI_URL = "https://api.openai.com/v1"
ANTHROPIC_URL = "https://api.anthropic.com"
# What OpenAI allows at each position.
_OPENAI_TOP_LOGPROBS = 20
_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "billing_error", "quota_exceeded")
_FILTERED = ("content_filter", "content_policy_violation", "invalid_prompt", "moderation", "flagged")
_SHOWN = 500


class Trouble(Exception):
    """An attempt that ended without a reply.

    Args:
        reason: see :class:`attar.engines.base.Failure`.
        detail: what the server said.
        next: ``retry``; ``give up`` on this request, which may be asked again by a later run; ``final``: this is the
            answer to this request; ``stop``: ``error`` is raised, since no request can be answered.
        billed: whether it cost something: ``no``, ``unknown``, or what the server says.
        slow_down: whether the server bears less than it is asked.
        retry_after_s: how long it wants to be left alone.
        error: of ``stop``.
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        next: Literal["retry", "give up", "final", "stop"],
        *,
        billed: Literal["no", "unknown"] | Usage = "no",
        slow_down: bool = False,
        retry_after_s: float | None = None,
        error: AttarError | None = None,
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.next, self.billed = reason, detail, next, billed
        self.slow_down, self.retry_after_s, self.error = slow_down, retry_after_s, error


@dataclass(frozen=True)
class Server:
    """One model behind one address."""

    protocol: Literal["openai", "anthropic"]
    model: str
    base_url: str | None
    """None: the provider's own"""
    api_key: str
    key_source: str
    """where the key came from, for messages"""
    place: str | None = None
    """stands for the address in a request's key, where the address changes and the model behind it does not"""

    @property
    def address(self) -> str:
        """Where requests go."""
        own = OPENAI_URL if self.protocol == "openai" else ANTHROPIC_URL
        return (self.base_url or own).rstrip("/")

    @property
    def identity(self) -> str:
        """Protocol and address, as they stand in a request's key."""
        return f"{self.protocol} {self.place or self.address}"

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Text; the likeliest tokens by OpenAI's protocol, at a server that has them."""
        return frozenset({"text", "top_logprobs"} if self.protocol == "openai" else {"text"})

    @property
    def most_top_logprobs(self) -> int | None:
        """How many tokens ``top_logprobs`` can ask for; None where the server says it."""
        if self.protocol == "anthropic":
            return 0
        return _OPENAI_TOP_LOGPROBS if self.base_url is None else None

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """The request in the server's words.

        Raises:
            CapabilityError: the server has no such thing.
        """
        most = self.most_top_logprobs
        if request.top_logprobs is not None and most is not None and request.top_logprobs > most:
            raise CapabilityError(
                f"{self.protocol}:{self.model} gives at most {most} top_logprobs, {request.top_logprobs} are asked for"
            )
        shared: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "tools": request.tools,
            "tool_choice": request.tool_choice,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "stop": request.stop,
            "schema": request.schema,
        }
        if self.protocol == "anthropic":
            if request.seed is not None:
                raise CapabilityError(f"anthropic:{self.model} takes no seed; leave it out")
            return anthropic_body(self.model, request.messages, **shared)
        limit: Literal["max_completion_tokens", "max_tokens"] = (
            "max_completion_tokens" if self.base_url is None else "max_tokens"
        )
        return openai_body(
            self.model, request.messages, limit=limit, seed=request.seed, top_logprobs=request.top_logprobs, **shared
        )

    def usage(self, body: Any) -> Usage | None:
        """What a response says that it billed."""
        return openai_usage(body) if self.protocol == "openai" else anthropic_usage(body)

    def client(self, *, sync: bool = False, **options: Any) -> Any:
        """The provider's client, its own retries off.

        Raises:
            MissingExtra: it is not installed.
        """
        module = require(self.protocol, "api")
        name = "OpenAI" if self.protocol == "openai" else "Anthropic"
        kind = getattr(module, name if sync else f"Async{name}")
        return kind(api_key=self.api_key, base_url=self.address, max_retries=0, **options)


class Connection:
    """An open client; belongs to the event loop that it was made in.

    Args:
        server: whom to ask.
        connections: requests in flight at most.
        timeout_s: of an attempt.
    """

    def __init__(self, server: Server, *, connections: int, timeout_s: float) -> None:
        self._server = server
        self._module = require(server.protocol, "api")
        pool = require("httpx2", "api").Limits(max_connections=connections, max_keepalive_connections=connections)
        require("aiohttp", "api")
        # The clients' other transport looks at every connection for every request: with 256 in flight that is most of
        # a call's time.
        transport = self._module.DefaultAioHttpClient(limits=pool, timeout=timeout_s)
        self._client = server.client(timeout=timeout_s, http_client=transport)
        self._path = "/chat/completions" if server.protocol == "openai" else "/v1/messages"
        self._response = require("httpx2", "api").Response

    async def send(self, body: dict[str, Any]) -> Reply:
        """Ask once.

        Raises:
            Trouble: there is no reply.
        """
        try:
            # The client's typed methods walk through body and answer once more each, a fifth of the time of a call.
            response = await self._client.post(self._path, cast_to=self._response, body=body)
        except self._module.APIStatusError as error:
            raise status_trouble(self._server, error.status_code, error.body, error.response.headers) from error
        except self._module.APIConnectionError as error:
            raise _cut(error) from error
        return read_reply(self._server, response.content)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()


def read_reply(server: Server, content: bytes) -> Reply:
    """The reply in a response's body.

    Raises:
        Trouble: there is none.
    """
    try:
        body = json.loads(content)
    except ValueError as error:
        shown = content[:_SHOWN].decode(errors="replace")
        raise Trouble("not json", f"{server.address} answered {shown!r}", "retry", billed="unknown") from error
    if isinstance(body, dict) and body.get("error"):
        # Some gateways send an error with status 200.
        code = body["error"].get("code") if isinstance(body["error"], dict) else None
        raise status_trouble(server, code if isinstance(code, int) else 500, body["error"], {})
    try:
        return parse_openai_reply(body) if server.protocol == "openai" else parse_anthropic_reply(body)
    except BadRow as bad:
        try:
            billed = server.usage(body)
        except BadRow:
            billed = None
        if billed is None and bad.reason == "malformed":
            raise Trouble("not json", f"{bad} (from {server.address})", "retry", billed="unknown") from bad
        raise Trouble(
            bad.reason, f"{bad}: {content[:_SHOWN].decode(errors='replace')}", "final", billed=billed or "unknown"
        ) from bad


def status_trouble(server: Server, status: int, body: Any, headers: Mapping[str, str]) -> Trouble:
    """What an answer with an error status means."""
    said, message = _said(body)
    where = f"{server.protocol}:{server.model} at {server.address}"
    if any(word in said for word in _QUOTA) or "credit balance" in said or status == 402:
        return Trouble(
            "quota",
            message,
            "stop",
            error=Stopped(
                f"{where}: the quota is used up ({message}); what was answered is kept: add credit, and the same "
                "command goes on from here"
            ),
        )
    if status in (400, 403, 422) and any(word in said for word in _FILTERED):
        return Trouble("content_filter", message, "final")
    if status in (401, 403):
        return Trouble(
            "key",
            message,
            "stop",
            error=ModelError(
                f"{where} refuses the key from {server.key_source} ({status}: {message}); set a valid one"
            ),
        )
    if status == 404:
        cure = "name one that it serves in teacher.model, and its address, with /v1 if it has one, in teacher.base_url"
        return Trouble("unknown model", message, "stop", error=ModelError(f"{where} is not there ({message}); {cure}"))
    if status in (408, 409, 425, 429) or status >= 500:
        reason = "rate limit" if status == 429 else "server error"
        return Trouble(
            reason, f"{status}: {message}", "retry", slow_down=status != 409, retry_after_s=_retry_after(headers)
        )
    return Trouble("bad request", f"{status}: {message}", "give up")


def _said(body: Any) -> tuple[str, str]:
    """All that a body says, in lower case to look for words in; and its message for people."""
    inner = body.get("error", body) if isinstance(body, dict) else body
    message = str(inner.get("message", inner)) if isinstance(inner, dict) else str(inner)
    words = [str(inner.get(key)) for key in ("code", "type", "message")] if isinstance(inner, dict) else [message]
    return " ".join(words).lower(), " ".join(message.split())[:_SHOWN]


def _cut(error: BaseException) -> Trouble:
    """A connection that failed: whether the request had been sent decides whether it may have been billed.

    What the transport met says that; the names that the layers above give it mix the two (aiohttp's
    ``ServerDisconnectedError`` becomes httpx's ``ConnectTimeout``).
    """
    while error.__cause__ is not None and type(error).__module__.partition(".")[0] != "aiohttp":
        error = error.__cause__
    names = {kind.__name__ for kind in type(error).__mro__}
    sent = not names & {"ClientConnectorError", "ClientConnectorCertificateError", "ConnectionTimeoutError"}
    sent = sent and "UnsupportedProtocol" not in names and "ClientHttpProxyError" not in names
    reason = "timeout" if "TimeoutError" in names or "TimeoutException" in names else "connection"
    detail = f"{type(error).__name__}: {error}"
    return Trouble(reason, detail, "retry", billed="unknown" if sent else "no", slow_down=True)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server wants to be left alone, from ``retry-after-ms`` or ``retry-after`` (seconds or a date)."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(float(value) / unit, 0.0)
        except ValueError:
            date = email.utils.parsedate_tz(value)
            if date is not None:
                return max(email.utils.mktime_tz(date) - time.time(), 0.0)
    return None
