"""Where the proxy listens, and to whom it answers."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import logging
import re
import signal
import socket
import threading
import urllib.parse
from typing import Any

from attar.errors import UsageError, require
from attar.proxy.calls import App, Receive, Refused, Scope, Send, provider_of, refuse

__all__ = ["guarded", "is_loopback", "listen", "make_server", "serve"]

# Longer than clients keep theirs, so that it is never we who close a connection that a client is about to use.
_KEEP_ALIVE_S = 75
# For calls that are under way when the server is told to stop.
_GRACE_S = 30


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Take an address to listen on; port 0 takes one that is free.

    Raises:
        UsageError: the port is taken, or the address is none of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} of {host} is taken, perhaps by another recorder; stop that one, or choose --port"
            ) from error
        raise UsageError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose --host, --port"
        ) from error


def _meant(line: logging.LogRecord) -> bool:
    # A body that is left unfinished is how the proxy passes on a broken answer.
    return "without completing response" not in line.getMessage()


def make_server(app: App) -> Any:
    """A server that adds nothing of its own to what the application answers."""
    uvicorn = require("uvicorn", "record")
    logging.getLogger("uvicorn.error").addFilter(_meant)
    config = uvicorn.Config(
        app,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S,
    )
    return uvicorn.Server(config)


def serve(app: App, listening: socket.socket) -> None:
    """Answer until SIGINT or SIGTERM; calls under way are let end."""
    # uvicorn raises the signals that it caught once more when it is done: what is to be said at the end would be lost.
    main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = [(number, signal.signal(number, lambda *_: None)) for number in signals]
    try:
        make_server(app).run(sockets=[listening])
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def guarded(app: App, token: str) -> App:
    """An application that answers only to those who know the token.

    It is said in the header ``x-attar-token``, or in the path before everything else, ``/t/TOKEN/...``, for clients
    that can be given no header.
    """
    prefix = re.compile(rb"/t/([^/]+)(?=/)")

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = next((value for name, value in scope["headers"] if name == b"x-attar-token"), None)
            found = prefix.match(scope["raw_path"])
            if found is not None:
                given = urllib.parse.unquote_to_bytes(found[1]) if given is None else given
                raw = scope["raw_path"][found.end() :]
                scope = {
                    **scope,
                    "raw_path": raw,
                    "path": urllib.parse.unquote_to_bytes(raw).decode("utf-8", "replace"),
                }
            if given is None or not hmac.compare_digest(given, token.encode()):
                said = "is wrong" if given else "is missing"
                refused = Refused(
                    401, "attar_token", f"the recorder's token {said}: send it as x-attar-token, or as /t/TOKEN/..."
                )
                await refuse(send, provider_of(scope["raw_path"], scope["headers"]), refused, [])
                return
        await app(scope, receive, send)

    return checked
