"""`attar record`: real traffic -> raw/.

The recorder is an observer of the proxy: it collects the bytes of a call and hands them to a writer when the call is
over. Calls pass whether or not they can be recorded.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attar.collect.exchange import Capture, timestamp_of
from attar.collect.redact import Redactor
from attar.collect.writer import Writer
from attar.errors import UsageError, require
from attar.proxy import App, Call, Headers, Limits, Proxy, guarded, is_loopback, listen, serve
from attar.recipe.record import Record

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["Recorder", "make_app", "record"]

_MB = 1 << 20
# The interpreter's turns are short while traffic passes: the writing thread may hold it that long.
_TURN_S = 0.0001


class Recorder:
    """Observes calls for a writer.

    Args:
        writer: takes what was captured.
        workload: of calls that name none.
    """

    def __init__(self, writer: Writer, workload: str) -> None:
        self.writer = writer
        self._workload = workload

    def request(self, call: Call) -> _Listener:
        """Begin to capture a call."""
        call.labels.setdefault("workload", self._workload)
        return _Listener(Capture(call), self.writer)

    def failed(self, error: Exception) -> None:
        """Count a call that could not be captured."""
        self.writer.lose("recorder failed", repr(error))


class _Listener:
    def __init__(self, capture: Capture, writer: Writer) -> None:
        self._capture, self._writer = capture, writer

    def response(self, status: int, headers: Headers) -> None:
        capture = self._capture
        capture.status, capture.headers, capture.headers_at = status, headers, time.perf_counter()

    def chunk(self, data: bytes, at: float) -> None:
        capture = self._capture
        capture.size += len(data)
        if capture.size <= self._writer.queue_bytes:
            capture.chunks.append((at, data))
        else:
            # The writer counts it as lost; until then it takes no room.
            capture.chunks.clear()

    def end(self, problem: str | None) -> None:
        capture = self._capture
        capture.ended_at, capture.problem = time.perf_counter(), problem
        self._writer.submit(capture)


def make_app(settings: Record, writer: Writer, token: str | None = None) -> App:
    """The recorder as an ASGI application: the proxy, ``GET /attar/health`` and ``POST /attar/outcome``.

    Args:
        settings: of the recipe.
        writer: closed when the application shuts down.
        token: that every caller must know; None for a recorder that only this machine reaches.
    """
    require("starlette", "record")
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    limits = Limits(settings.max_body_mb * _MB, settings.connect_timeout_s, settings.timeout_s)
    proxy = Proxy(settings.upstream, limits, Recorder(writer, settings.workload))
    begun = time.monotonic()

    async def health(request: Request) -> Response:
        del request
        return JSONResponse(summary(writer) | {"upstream": settings.upstream, "uptime_s": time.monotonic() - begun})

    async def outcome(request: Request) -> Response:
        import asyncio

        try:
            accepted = _outcome(await request.json())
        except ValueError as error:
            return JSONResponse({"error": {"message": str(error)}}, 400)
        try:
            await asyncio.wrap_future(writer.outcome(accepted))
        except Exception as error:
            return JSONResponse({"error": {"message": f"not written: {error}"}}, 503)
        return JSONResponse({"stored": True})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        del app
        yield
        await proxy.aclose()
        writer.close()

    routes = [Route("/attar/health", health), Route("/attar/outcome", outcome, methods=["POST"])]
    own = Starlette(routes=routes, lifespan=lifespan)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ours = scope["type"] != "http" or scope["path"].startswith("/attar/")
        await (own(scope, receive, send) if ours else proxy(scope, receive, send))

    return app if token is None else guarded(app, token)


def _outcome(body: Any) -> dict[str, Any]:
    keys = ("episode", "exchange", "workload", "outcome")
    if not isinstance(body, dict) or body.get("outcome") is None:
        raise ValueError('wanted {"episode": "..." or "exchange": "...", "outcome": ...}; outcome is missing')
    if unknown := sorted(set(body) - set(keys)):
        raise ValueError(f"{', '.join(unknown)}: unknown; allowed are {', '.join(keys)}")
    if wrong := [name for name in keys[:3] if not isinstance(body.get(name), str | None)]:
        raise ValueError(f"{wrong[0]} is {body[wrong[0]]!r}; a text is wanted")
    if (body.get("episode") is None) == (body.get("exchange") is None):
        raise ValueError("name either the episode or the exchange (the answer's header x-attar-id)")
    return {"timestamp": timestamp_of(time.time())} | {name: body.get(name) for name in keys}


def summary(writer: Writer) -> dict[str, Any]:
    """What was recorded and what was lost, so far."""
    return {
        "status": "losing" if writer.lost.total() else "ok",
        "recorded": writer.recorded,
        "outcomes": writer.outcomes,
        "erased": writer.erased,
        "lost": dict(writer.lost),
        "last_error": writer.last_error,
        "waiting_bytes": writer.waiting_bytes,
        "folder": str(writer.folder),
    }


def record(settings: Record, folder: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Stand in front of the upstream and record, until SIGINT or SIGTERM.

    Args:
        settings: of the recipe.
        folder: where the rows go.
        note: told where the recorder listens.

    Returns:
        What was recorded and what was lost.

    Raises:
        UsageError: the port is taken; the address is reached from outside and no token is set.
        WorkspaceError: another recorder has the folder.
        MissingExtra: a part is not installed.
    """
    for module in ("httptools", "starlette", "uvicorn"):
        require(module, "record")
    token = _token(settings)
    listening = listen(settings.host, settings.port)
    with listening:
        writer = Writer(
            folder,
            Redactor(settings.redact, settings.patterns),
            segment_bytes=settings.segment_mb * _MB,
            queue_bytes=settings.queue_mb * _MB,
            keep_days=settings.keep_days,
        )
        app = make_app(settings, writer, token)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        note(f"recording {settings.upstream} into {folder}: set base_url to http://{shown}:{port}/v1 (or without /v1)")
        turn = sys.getswitchinterval()
        sys.setswitchinterval(_TURN_S)
        try:
            serve(app, listening)
        finally:
            sys.setswitchinterval(turn)
            writer.close()
    return summary(writer)


def _token(settings: Record) -> str | None:
    if settings.token_env is None:
        if not is_loopback(settings.host):
            raise UsageError(
                f"host {settings.host} is reached from other machines, and no token is set: name the environment "
                "variable that holds one with --token-env (record.token_env), or listen on 127.0.0.1"
            )
        return None
    token = os.environ.get(settings.token_env, "")
    if len(token) < 16:
        seen = "not set" if not token else f"{len(token)} characters long"
        raise UsageError(
            f"token_env: {settings.token_env} is {seen}; a token of 16 characters or more is wanted, "
            "e.g. from: openssl rand -hex 16"
        )
    return token
