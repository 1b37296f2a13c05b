"""What passes through the proxy, and who is told of it."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

__all__ = [
    "App",
    "Call",
    "Headers",
    "Listener",
    "Observer",
    "Provider",
    "Receive",
    "Refused",
    "Scope",
    "Send",
    "error_of",
    "provider_of",
    "refuse",
]

Headers = list[tuple[bytes, bytes]]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Provider = Literal["openai", "anthropic"]

_ANTHROPIC = re.compile(rb"/(?:messages|complete)(?:/|$)")


def provider_of(path: bytes, headers: Headers) -> Provider:
    """Whose shape a request has."""
    named = any(name == b"anthropic-version" for name, _ in headers)
    return "anthropic" if named or _ANTHROPIC.search(path) else "openai"


@dataclass(frozen=True)
class Call:
    """One request, as it goes upstream."""

    method: str
    path: bytes
    """as it was sent, percent-encoded, without the proxy's own prefix"""
    query: bytes
    headers: Headers
    """all of the client's, credentials included, but for the proxy's own"""
    body: bytes
    labels: dict[str, str]
    """``workload``, ``episode``, ``user``: those that headers or path name"""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.time)
    """seconds since 1970"""

    @property
    def provider(self) -> Provider:
        """Whose shape the call has."""
        return provider_of(self.path, self.headers)


class Listener(Protocol):
    """Is told of one call."""

    def response(self, status: int, headers: Headers) -> None:
        """Upstream has begun to answer."""

    def chunk(self, data: bytes, at: float) -> None:
        """A part of the body, as it was read, and when (``time.perf_counter``)."""

    def end(self, problem: str | None) -> None:
        """The call is over; ``problem`` says what cut it short. Always called, and last."""


class Observer(Protocol):
    """Is told of every call."""

    def request(self, call: Call) -> Listener:
        """A request has arrived whole."""

    def failed(self, error: Exception) -> None:
        """The observer or one of its listeners raised; the call went on without it."""


class Refused(Exception):
    """The proxy itself answers."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


# Anthropic's names of our errors; OpenAI has one type for the caller's faults and one for the server's.
_ANTHROPIC_TYPES = {401: "authentication_error", 413: "request_too_large", 504: "timeout_error"}


def error_of(provider: Provider, status: int, code: str, message: str) -> dict[str, Any]:
    """An API error as the provider words it."""
    if provider == "anthropic":
        return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(status, "api_error"), "message": message}}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def refuse(send: Send, provider: Provider, refused: Refused, extra: Headers) -> None:
    """Answer in the proxy's own name."""
    body = json.dumps(error_of(provider, refused.status, refused.code, str(refused))).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-attar-error", refused.code.encode()),
    ]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers + extra})
    await send({"type": "http.response.body", "body": body})
