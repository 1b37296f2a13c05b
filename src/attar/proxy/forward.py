"""Forward a call to its upstream and the answer to its client."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attar.errors import UsageError
from attar.proxy.calls import (
    Call,
    Headers,
    Listener,
    Observer,
    Receive,
    Refused,
    Scope,
    Send,
    error_of,
    provider_of,
    refuse,
)
from attar.proxy.upstream import Upstream

__all__ = ["Limits", "Proxy"]

_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
# Said anew for the connection to upstream.
_REPLACED = frozenset({b"host", b"content-length", b"expect", b"accept-encoding"})
# What Python reads without further parts. An answer that cannot be read cannot be redacted, nor routed on.
_READABLE = (b"gzip", b"deflate", b"identity")
_LABELS = {b"x-attar-workload": "workload", b"x-attar-episode": "episode", b"x-attar-user": "user"}
_PREFIX = re.compile(rb"(?:/w/(?P<workload>[^/]+))?(?:/e/(?P<episode>[^/]+))?(?=/)")


@dataclass(frozen=True)
class Limits:
    """What a call may take."""

    body_bytes: int
    """of a request"""
    connect_s: float
    idle_s: float
    """between two bytes from upstream, and before the first"""


class _Told:
    """A listener whose faults do not reach the call."""

    def __init__(self, observer: Observer | None, call: Call) -> None:
        self._observer = observer
        self._listener: Listener | None = None
        if observer is not None:
            self._try(lambda: setattr(self, "_listener", observer.request(call)))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._listener = None
            assert self._observer is not None
            self._observer.failed(error)

    def response(self, status: int, headers: Headers) -> None:
        if (listener := self._listener) is not None:
            self._try(lambda: listener.response(status, headers))

    def chunk(self, data: bytes, at: float) -> None:
        if (listener := self._listener) is not None:
            self._try(lambda: listener.chunk(data, at))

    def end(self, problem: str | None) -> None:
        if (listener := self._listener) is not None:
            self._try(lambda: listener.end(problem))


class _Gone(Exception):
    """The client went away before its request was whole."""


def _end_to_end(headers: Headers, dropped: frozenset[bytes] = frozenset()) -> Headers:
    """Headers in lower case without those that belong to one connection, and without ``dropped``."""
    named = frozenset(
        token.strip().lower() for name, value in headers if name.lower() == b"connection" for token in value.split(b",")
    )
    gone = _HOP_BY_HOP | named | dropped
    return [(lower, value) for name, value in headers if (lower := name.lower()) not in gone]


class Proxy:
    """An ASGI application that forwards every call to one upstream.

    Args:
        upstream: ``http(s)://HOST[:PORT][/PATH]``. Where its path and a call's path meet in the same segment
            (``.../v1`` and ``/v1/chat/completions``) it stands once.
        limits: on sizes and times.
        observer: told of every call.
    """

    def __init__(self, upstream: str, limits: Limits, observer: Observer | None = None) -> None:
        self._upstream = Upstream(upstream, connect_s=limits.connect_s, idle_s=limits.idle_s)
        self._limits, self._observer = limits, observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise UsageError(f"the proxy forwards http, this is {scope['type']}")
        try:
            call = await self.read(scope, receive)
        except _Gone:
            return
        except Refused as refused:
            await refuse(send, provider_of(scope["raw_path"], scope["headers"]), refused, [])
            return
        await self.forward(call, receive, send)

    async def read(self, scope: Scope, receive: Receive) -> Call:
        """Read a request whole: its labels from headers (first) and path, its body within the limit."""
        path: bytes = scope["raw_path"]
        prefix = _PREFIX.match(path)
        labels: dict[str, str] = {}
        if prefix is not None:
            labels = {
                label: urllib.parse.unquote_to_bytes(value).decode("utf-8", "replace")
                for label, value in prefix.groupdict().items()
                if value
            }
            path = path[prefix.end() :]
        headers: Headers = []
        for name, value in scope["headers"]:
            if (label := _LABELS.get(name)) is not None:
                labels[label] = value.decode("utf-8", "replace")
            elif not name.startswith(b"x-attar-"):
                headers.append((name, value))
        body = await self._body(receive)
        return Call(scope["method"], path, scope["query_string"], headers, body, labels)

    async def _body(self, receive: Receive) -> bytes:
        parts, size, limit = [], 0, self._limits.body_bytes
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            part: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > 8 * limit or not more:
                # What is too large is read to its end if that is near: a client that is still sending hears nothing.
                raise Refused(
                    413,
                    "request_too_large",
                    f"the request has over {limit} bytes, the limit of this proxy (max_body_mb)",
                )
        return b"".join(parts)

    async def forward(self, call: Call, receive: Receive, send: Send) -> None:
        """Send a call upstream and its answer to the client; the client's leaving cancels it."""
        told = _Told(self._observer, call)
        task = asyncio.current_task()
        assert task is not None
        watcher = asyncio.create_task(_watch(receive, task))
        try:
            problem = await self._exchange(call, send, told, watcher)
        except asyncio.CancelledError:
            if watcher.done() and not watcher.cancelled():
                task.uncancel()
                told.end("the client went away")
                return
            told.end("the proxy was stopped")
            raise
        except BaseException as error:
            told.end(f"the proxy failed: {error!r}")
            raise
        finally:
            watcher.cancel()
        told.end(problem)

    async def _exchange(self, call: Call, send: Send, told: _Told, watcher: asyncio.Task[None]) -> str | None:
        """Returns what cut the call short."""
        answer, reply = _Answer(call, send), None
        try:
            reply = await self._upstream.ask(call.method, self._target(call), self._headers(call), call.body)
            told.response(reply.status, reply.headers)
            await answer.start(reply.status, reply.headers)
            while data := await reply.read():
                at = time.perf_counter()
                await answer.part(data)
                told.chunk(data, at)
        except Refused as error:
            problem = error
        else:
            watcher.cancel()
            await answer.finish()
            return None
        finally:
            if reply is not None:
                reply.close()
        watcher.cancel()
        if reply is not None:
            await answer.cut(problem)
        else:
            await refuse(send, call.provider, problem, answer.extra)
        return str(problem)

    def _headers(self, call: Call) -> Headers:
        headers = [(b"host", self._upstream.authority), *_end_to_end(call.headers, _REPLACED)]
        accepted = b", ".join(value for name, value in call.headers if name == b"accept-encoding")
        kept = [item for item in accepted.split(b",") if item.split(b";")[0].strip().lower() in _READABLE]
        headers.append((b"accept-encoding", b",".join(kept).strip() or b"identity"))
        if call.body or any(name in (b"content-length", b"transfer-encoding") for name, _ in call.headers):
            headers.append((b"content-length", str(len(call.body)).encode()))
        return headers

    def _target(self, call: Call) -> bytes:
        base = self._upstream.path
        segment = base[base.rfind(b"/") :] if base else b""
        twice = segment and (call.path + b"/").startswith(segment + b"/")
        target = base + (call.path[len(segment) :] if twice else call.path) or b"/"
        return target + b"?" + call.query if call.query else target

    async def aclose(self) -> None:
        """Close the connections to upstream."""
        self._upstream.close()


class _Answer:
    """What goes back to the client."""

    def __init__(self, call: Call, send: Send) -> None:
        self._call, self._send = call, send
        self.extra: Headers = [(b"x-attar-id", call.id.encode())]
        self._events = False
        self._tail = b""

    async def start(self, status: int, headers: Headers) -> None:
        self._events = any(
            name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
        ) and not any(name.lower() == b"content-encoding" for name, _ in headers)
        start = {"type": "http.response.start", "status": status, "headers": _end_to_end(headers) + self.extra}
        await self._send(start)

    async def part(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._tail = (self._tail + data[-4:])[-4:]

    async def finish(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def cut(self, problem: Refused) -> None:
        """Say what happened, where it can be understood, and leave the body unfinished: the server then cuts."""
        if self._events and (not self._tail or self._tail.endswith((b"\n\n", b"\r\n\r\n"))):
            error = json.dumps(error_of(self._call.provider, problem.status, problem.code, str(problem)))
            name = "event: error\n" if self._call.provider == "anthropic" else ""
            await self._send(
                {"type": "http.response.body", "body": f"{name}data: {error}\n\n".encode(), "more_body": True}
            )


async def _watch(receive: Receive, task: asyncio.Task[Any]) -> None:
    """Cancel a call when its client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()
