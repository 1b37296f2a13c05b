"""A scripted upstream, and a recorder in front of it, each in a thread of this process."""

import asyncio
import contextlib
import json
import socket
import struct
import threading

import httpx2

from attar.collect.record import make_app
from attar.collect.redact import Redactor
from attar.collect.store import read_exchanges
from attar.collect.writer import Writer
from attar.proxy import listen, make_server
from attar.recipe import Record


class Scripted:
    """An HTTP server that says what a test tells it to, byte by byte.

    ``script`` is called with (method, target, headers, body) and yields bytes to send, numbers of seconds to wait,
    None to cut the connection (a reset), or False to close it in good order.
    """

    def __init__(self, script, tls=None):
        self.script, self.tls = script, tls
        self.connections = 0
        self.requests = []
        self.gone = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()

    def _run(self):
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls))
        self.port = self._server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            self.gone.set()
        finally:
            writer.close()

    async def _one(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = [tuple(line.split(": ", 1)) for line in head[1:] if line]
        length = int(dict(headers).get("content-length", 0))
        body = await reader.readexactly(length)
        self.requests.append((method, target, dict(headers), body))
        for step in self.script(method, target, dict(headers), body):
            if step is None:
                # With no time to linger, closing is a reset: the other side can tell it from an end.
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
                return False
            if step is False:
                return False
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
                continue
            waiting = asyncio.ensure_future(reader.read(1))
            done, _ = await asyncio.wait({waiting}, timeout=step)
            if done:
                raise ConnectionError("the client went away")
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        return True

    def __enter__(self):
        self._thread.start()
        self._ready.wait(100)
        return self

    def __exit__(self, *_):
        async def stop():
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(100)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(100)
        self._loop.close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"


def answer(body, status="200 OK", kind="application/json", extra=""):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n".encode("latin-1")
        + body
    )


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def part(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(data, name=None):
    text = data if isinstance(data, str) else json.dumps(data)
    return part(((f"event: {name}\n" if name else "") + f"data: {text}\n\n").encode())


END = b"0\r\n\r\n"


@contextlib.contextmanager
def serving(app):
    """Serve an ASGI application; yields its address."""
    with listen("127.0.0.1", 0) as listening:
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(100)
            assert not thread.is_alive()


class Recording:
    def __init__(self, url, writer, folder, http):
        self.url, self.writer, self.folder, self.http = url, writer, folder, http

    def rows(self):
        """Everything that was recorded; the recorder has to be stopped."""
        return list(read_exchanges(self.folder))


@contextlib.contextmanager
def recording(upstream, folder, *, token=None, **settings):
    """A recorder in front of an upstream; its rows are on disk when the block is left."""
    settings = Record(upstream=upstream, **settings)
    writer = Writer(
        folder,
        Redactor(settings.redact, settings.patterns),
        segment_bytes=settings.segment_mb << 20,
        queue_bytes=settings.queue_mb << 20,
        keep_days=settings.keep_days,
    )
    with serving(make_app(settings, writer, token)) as url, client(url) as http:
        yield Recording(url, writer, folder, http)


def client(url):
    """A plain HTTP client, patient as the machine may be shared."""
    return httpx2.Client(base_url=url, trust_env=False, timeout=100)
