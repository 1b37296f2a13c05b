"""Connections to upstream: HTTP/1.1, kept and used again, no more than a proxy needs.

Each call of a general client (httpcore2) took the recorder about as long as everything else together; here the parser
is C, and what one read brought is handed on as one piece. Redirects, cookies and encodings are the caller's own affair.
A call is never sent twice, not even where upstream closed a kept connection as we used it: whoever asked may try again,
and knows whether that is safe (RFC 9110, section 9.2.2).
"""

from __future__ import annotations

import asyncio
import base64
import re
import ssl
import time
import urllib.parse
import urllib.request
from typing import Any

from attar.errors import UsageError, require
from attar.proxy.calls import Headers, Refused

__all__ = ["Reply", "Upstream"]

# Shorter than the patience of common servers (5 s and more), so that a kept connection is not closed as we use it.
_KEPT_S = 4.0
_KEPT = 256
# Bytes that may wait for a client that reads slowly, and that an answer's head may have.
_HIGH = 1 << 18
_HEAD = 1 << 18
_PATIENCE = re.compile(rb"timeout\s*=\s*(\d+)", re.IGNORECASE)


class _Connection(asyncio.Protocol):
    """One connection, one call at a time. The callbacks named ``on_`` are the parser's."""

    transport: Any

    def __init__(self, parser: Any) -> None:
        self._new_parser = parser
        self._parser: Any = None
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self.lost = False

    def begin(self, *, bodiless: bool) -> None:
        """Expect an answer; one without a body whatever its head says, as to HEAD."""
        self._parser = self._new_parser(self)
        self._bodiless = bodiless
        self.status, self.headers = 0, Headers()
        self.began = self.complete = False
        self._keep, self._passing, self._sized = False, False, False
        self._pending: list[bytes] = []
        self._waiting = self._seen = 0
        self._error: str | None = None

    # asyncio's side

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self.complete:
            # Nobody asked: what comes now belongs to no call, and neither would the rest.
            self._keep, self.lost = False, True
            self.transport.abort()
            return
        self._seen += len(data)
        try:
            self._parser.feed_data(data)
        except Exception as error:
            self._fail(f"its answer is no HTTP ({' '.join(str(error).split()) or type(error).__name__})")
        if not self.began and self._seen > _HEAD:
            self._fail(f"the head of its answer has over {_HEAD} bytes")
        if self._waiting > _HIGH and not self.complete:
            self.transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self._parser is not None:
            # An answer that has no length ends with its connection.
            if self.began and not self._sized and error is None and self._error is None:
                self.complete = True
            self._fail(f"it closed the connection{f' ({error})' if error else ''}")
        self._wake()

    # The parser's side

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.began and not self.complete:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self.began:
            return
        if 100 <= status < 200:
            self._passing, self.headers = True, []
            if status == 101:
                self._fail("it switched protocols, unasked")
            return
        self.status, self.began = status, True
        stated = {name.lower(): value for name, value in self.headers}
        chunked = stated.get(b"transfer-encoding", b"").lower().endswith(b"chunked")
        self._sized = chunked or b"content-length" in stated
        patience = _PATIENCE.search(stated.get(b"keep-alive", b""))
        self.kept_s = _KEPT_S if patience is None else min(_KEPT_S, int(patience[1]) - 1)
        self._keep = self._parser.should_keep_alive() and not self._bodiless and self.kept_s > 0
        self.complete = self._bodiless

    def on_body(self, body: bytes) -> None:
        if not self.complete:
            self._pending.append(body)
            self._waiting += len(body)

    def on_message_complete(self) -> None:
        self.complete = self.complete or not self._passing
        self._passing = False

    def on_message_begin(self) -> None:
        # A second answer to one request.
        self._keep = self._keep and not self.complete

    # The caller's side

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, why: str) -> None:
        # What comes after a whole answer does not unmake it.
        if not self.complete:
            self._error = self._error or why

    def _silent(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(TimeoutError())

    async def wait(self, seconds: float) -> None:
        """Wait for the next bytes, or the end; TimeoutError after that time."""
        self._waiter = self._loop.create_future()
        timer = self._loop.call_later(seconds, self._silent)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    async def head(self, seconds: float) -> None:
        """Wait for the head of the answer; ConnectionError if there will be none."""
        while not self.began:
            if self._error is not None:
                raise ConnectionError(self._error)
            await self.wait(seconds)

    async def read(self, seconds: float) -> bytes:
        """What has come of the body, empty at its end; ConnectionError where it breaks off."""
        while not self._pending and not self.complete and self._error is None:
            await self.wait(seconds)
        if self._pending:
            data = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
            self._pending.clear()
            if self._waiting > _HIGH and not self.lost:
                self.transport.resume_reading()
            self._waiting = 0
            return data
        if self._error is not None:
            raise ConnectionError(self._error)
        return b""

    @property
    def reusable(self) -> bool:
        """Whether the call is over, its request gone out whole, and the connection as good as new."""
        over = self.complete and self._keep and self._error is None and not self._pending
        return over and self.open and self.transport.get_write_buffer_size() == 0

    @property
    def open(self) -> bool:
        """Whether it can still be used; it may be closing before ``connection_lost`` is called."""
        return not self.lost and not self.transport.is_closing()

    def rest(self) -> None:
        """Expect nothing until the next call."""
        self._parser = None


class Reply:
    """An answer that has begun. ``close`` it once, whatever happens."""

    def __init__(self, upstream: Upstream, connection: _Connection) -> None:
        self._upstream, self._connection = upstream, connection
        self.status, self.headers = connection.status, connection.headers

    async def read(self) -> bytes:
        """The next part of the body, as it came; empty at the end.

        Raises:
            Refused: upstream was silent too long (504), or broke off (502).
        """
        try:
            return await self._connection.read(self._upstream.idle_s)
        except TimeoutError:
            raise self._upstream.silent() from None
        except ConnectionError as error:
            raise self._upstream.failed(f"broke off its answer: {error}") from error

    def close(self) -> None:
        """Let go of the connection; where the answer has not ended, upstream is cut off."""
        self._upstream.release(self._connection)


class Upstream:
    """One server, and the connections to it.

    The environment's proxies (``HTTPS_PROXY``, ``NO_PROXY``...) are used, as clients do.

    Args:
        url: ``http(s)://HOST[:PORT][/PATH]``.
        connect_s: for a new connection, encryption included.
        idle_s: between two bytes of an answer, and before the first.

    Raises:
        UsageError: it is no such address, or the environment names a proxy of another kind.
        MissingExtra: the parser is not installed.
    """

    def __init__(self, url: str, *, connect_s: float, idle_s: float) -> None:
        self._parser = require("httptools", "record").HttpResponseParser
        try:
            parts = urllib.parse.urlsplit(url)
            self._host, port = parts.hostname or "", parts.port
            self.authority = parts.netloc.encode("idna")
        except ValueError:
            parts = urllib.parse.SplitResult("", "", "", "", "")
        extra = parts.query or parts.fragment or "@" in parts.netloc
        if parts.scheme not in ("http", "https") or not parts.hostname or extra:
            raise UsageError(f"upstream: {url!r} is no address; wanted http(s)://HOST[:PORT][/PATH]")
        self.url, self.connect_s, self.idle_s = url, connect_s, idle_s
        self.path = urllib.parse.quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=").encode()
        encrypted = parts.scheme == "https"
        self._port = port or (443 if encrypted else 80)
        self._tls = ssl.create_default_context() if encrypted else None
        stated = urllib.request.getproxies()
        bypassed = urllib.request.proxy_bypass(f"{self._host}:{self._port}")
        self._via = None if bypassed else _via(stated.get(parts.scheme) or stated.get("all"))
        self._idle: list[tuple[float, _Connection]] = []

    def silent(self) -> Refused:
        """The error of an upstream that says nothing."""
        return Refused(504, "upstream_timeout", f"{self.url} did not answer within {self.idle_s:g} s")

    def failed(self, how: str) -> Refused:
        """The error of an upstream that cannot be reached, or broke off."""
        return Refused(502, "upstream_error", f"{self.url} {how}")

    async def ask(self, method: str, target: bytes, headers: Headers, body: bytes) -> Reply:
        """Send a request; returns once the answer has begun.

        Raises:
            Refused: no connection (502, 504), or no answer on it.
        """
        connection = self._take() or await self._connect()
        connection.begin(bodiless=method == "HEAD")
        try:
            if self._via is not None and self._tls is None:
                target = b"http://" + self.authority + target
                headers = [*headers, *self._via[2]]
            lines = [b"%s %s HTTP/1.1" % (method.encode(), target), *(b"%s: %s" % pair for pair in headers), b"", b""]
            head = b"\r\n".join(lines)
            if len(body) < _HIGH:
                connection.transport.write(head + body)
            else:
                connection.transport.write(head)
                connection.transport.write(body)
            await connection.head(self.idle_s)
        except TimeoutError:
            connection.transport.abort()
            raise self.silent() from None
        except ConnectionError as error:
            connection.transport.abort()
            raise self.failed(f"gave no answer: {error}") from error
        except BaseException:
            connection.transport.abort()
            raise
        return Reply(self, connection)

    def _take(self) -> _Connection | None:
        now = time.monotonic()
        while self._idle:
            until, connection = self._idle.pop()
            if until > now and connection.open:
                return connection
            connection.transport.abort()
        return None

    def release(self, connection: _Connection) -> None:
        """Keep a connection for the next call, or end it."""
        if not connection.reusable:
            connection.transport.abort()
            return
        connection.rest()
        now = time.monotonic()
        self._idle.append((now + connection.kept_s, connection))
        while len(self._idle) > _KEPT or self._idle[0][0] <= now:
            self._idle.pop(0)[1].transport.abort()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        host, port = (self._host, self._port) if self._via is None else self._via[:2]
        connection = _Connection(self._parser)
        try:
            async with asyncio.timeout(self.connect_s):
                direct = self._tls if self._via is None else None
                await loop.create_connection(lambda: connection, host, port, ssl=direct)
                if self._via is not None and self._tls is not None:
                    await self._tunnel(connection)
        except TimeoutError:
            raise Refused(504, "upstream_timeout", f"{self.url} did not connect within {self.connect_s:g} s") from None
        except OSError as error:
            through = "" if self._via is None else f" through the proxy {host}:{port}"
            raise self.failed(f"cannot be reached{through}: {' '.join(str(error).split())}") from error
        return connection

    async def _tunnel(self, connection: _Connection) -> None:
        """Have a proxy connect to upstream, and speak TLS through it."""
        assert self._via is not None
        assert self._tls is not None
        host = f"[{self._host}]" if ":" in self._host else self._host
        place = b"%s:%d" % (host.encode("idna"), self._port)
        credentials = [b"%s: %s" % pair for pair in self._via[2]]
        lines = [b"CONNECT %s HTTP/1.1" % place, b"host: " + place, *credentials, b"", b""]
        connection.begin(bodiless=True)
        try:
            connection.transport.write(b"\r\n".join(lines))
            await connection.head(self.connect_s)
            if not 200 <= connection.status < 300:
                raise ConnectionError(f"the proxy says {connection.status}")
            connection.rest()
            loop = asyncio.get_running_loop()
            encrypted = await loop.start_tls(connection.transport, connection, self._tls, server_hostname=self._host)
            connection.transport = encrypted
        except BaseException:
            connection.transport.abort()
            raise

    def close(self) -> None:
        """End the connections that are kept."""
        while self._idle:
            self._idle.pop()[1].transport.abort()


def _via(proxy: str | None) -> tuple[str, int, Headers] | None:
    """Host, port and credentials of a proxy of the environment's."""
    if not proxy:
        return None
    parts = urllib.parse.urlsplit(proxy if "://" in proxy else "http://" + proxy)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port:
        raise UsageError(f"the environment names the proxy {shown}; an http:// one is wanted, or NO_PROXY for upstream")
    headers: Headers = []
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers.append((b"proxy-authorization", b"Basic " + base64.b64encode(pair.encode())))
    return parts.hostname, port, headers
