import asyncio
import contextlib
import os
import ssl
import time
from pathlib import Path

import pytest

from attar.errors import UsageError
from attar.proxy import upstream as module
from attar.proxy.calls import Refused
from attar.proxy.upstream import Upstream
from recording import END, STREAM, Scripted, answer, part

TLS = Path(__file__).parent / "fixtures" / "tls"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextlib.contextmanager
def opened(url, **limits):
    there = Upstream(url, **{"connect_s": 60.0, "idle_s": 60.0} | limits)
    try:
        yield there
    finally:
        there.close()


async def call(there, method="GET", target=b"/x", headers=(), body=b""):
    """Status, headers and body of one call."""
    reply = await there.ask(method, target, [(b"host", there.authority), *headers], body)
    try:
        parts = []
        while data := await reply.read():
            parts.append(data)
        return reply.status, dict(reply.headers), b"".join(parts)
    finally:
        reply.close()


def calls(script, *methods, **limits):
    """What the calls give, one after the other, and how many connections they took."""

    async def run(url):
        with opened(url, **limits) as there:
            return [await call(there, method) for method in methods]

    with Scripted(script) as server:
        return asyncio.run(run(server.url)), server.connections


def says(*steps):
    return lambda *_: iter(steps)


def test_a_connection_is_kept_and_used_again():
    found, connections = calls(says(answer({"a": 1})), "GET", "GET", "GET")
    assert [(status, body) for status, _, body in found] == [(200, b'{"a": 1}')] * 3
    assert connections == 1


@pytest.mark.parametrize(
    "steps",
    [
        [answer(b"x", extra="connection: close\r\n")],
        # Two answers to one request: the second belongs to no call. Nor does what is no answer at all.
        [answer(b"x") + answer(b"y")],
        [answer(b"x") + b"garbage"],
        [answer(b"x", extra="connection: close\r\n") + b"garbage"],
        [answer(b"x", extra="keep-alive: timeout=1\r\n")],
        [b"HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\nx"],
        [b"HTTP/1.1 200 OK\r\n\r\nx", False],
    ],
)
def test_a_connection_that_is_not_as_good_as_new_is_not_used_again(steps):
    found, connections = calls(says(*steps), "GET", "GET")
    assert [body for _, _, body in found] == [b"x", b"x"]
    assert connections == 2


def test_heads_without_bodies():
    def script(method, *_):
        yield answer(b"body")[: None if method == "GET" else -4]

    found, _ = calls(script, "HEAD", "GET", "HEAD")
    assert [(headers[b"content-length"], body) for _, headers, body in found] == [
        (b"4", b""),
        (b"4", b"body"),
        (b"4", b""),
    ]
    found, connections = calls(says(b"HTTP/1.1 204 No Content\r\n\r\n"), "GET", "GET")
    assert [(status, body) for status, _, body in found] == [(204, b"")] * 2
    assert connections == 1


def test_what_is_said_on_the_way_is_passed_over():
    hints = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    found, connections = calls(says(hints, 0.01, answer(b"x")), "GET", "GET")
    assert [(status, b"link" in headers, body) for status, headers, body in found] == [(200, False, b"x")] * 2
    assert connections == 1


def test_chunks_trailers_and_bytes_one_by_one():
    body = STREAM.replace(b"\r\n\r\n", b"\r\ntrailer: x-sum\r\n\r\n") + part(b"ab") + part(b"c")
    body += b"0\r\nx-sum: 7\r\n\r\n"
    found, connections = calls(says(*(body[i : i + 1] for i in range(len(body)))), "GET", "GET")
    assert [(b"x-sum" in headers, text) for _, headers, text in found] == [(False, b"abc")] * 2
    assert connections == 1


@pytest.mark.parametrize(
    ("steps", "status", "said"),
    [
        ([b"HELLO\r\n\r\n"], 502, "gave no answer: its answer is no HTTP"),
        ([b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 50_000], 502, "the head of its answer has over"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab", False], 502, "broke off its answer: it closed"),
        ([STREAM + part(b"ab") + b"zz\r\n"], 502, "broke off its answer: its answer is no HTTP"),
        ([b"HTTP/1.1 200 OK\r\n\r\nab", None], 502, "broke off"),
        ([False], 502, "gave no answer: it closed the connection"),
        ([None], 502, "gave no answer: it closed the connection"),
        (
            [b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n", 0.2],
            502,
            "gave no answer: it switched protocols",
        ),
        ([100], 504, "did not answer within 0.2 s"),
        ([STREAM + part(b"ab"), 100], 504, "did not answer within 0.2 s"),
    ],
)
def test_what_goes_wrong(steps, status, said):
    impatient = {"idle_s": 0.2} if status == 504 else {}
    with pytest.raises(Refused, match=said) as error:
        calls(says(*steps), "GET", **impatient)
    assert error.value.status == status


def test_a_connection_that_upstream_closed_is_not_used_again():
    async def run(url):
        with opened(url) as there:
            await call(there)
            ((_, connection),) = there._idle
            deadline = time.monotonic() + 60
            # Closing, and lost in the loop's next turn: a call that comes between takes another.
            while not connection.transport.is_closing() and time.monotonic() < deadline:
                await asyncio.sleep(0)
            return await call(there)

    with Scripted(says(answer(b"x"), False)) as server:
        assert asyncio.run(run(server.url))[2] == b"x"
        assert server.connections == 2


def test_connections_are_kept_for_a_time_and_not_too_many(monkeypatch):
    async def run(url):
        with opened(url) as there:
            monkeypatch.setattr(module, "_KEPT_S", 60.0)
            await asyncio.gather(*(call(there) for _ in range(5)))
            kept = len(there._idle)
            there.close()
            monkeypatch.setattr(module, "_KEPT_S", 0.2)
            await asyncio.gather(*(call(there) for _ in range(2)))
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline:
                await call(there)
            # One was in use all the time, the other too long in none.
            over = len(there._idle)
            before = server.connections
            await asyncio.sleep(0.25)
            await call(there)
            return kept, over, server.connections - before

    monkeypatch.setattr(module, "_KEPT", 3)
    with Scripted(says(0.02, answer(b"x"))) as server:
        assert asyncio.run(run(server.url)) == (3, 1, 1)


def test_a_connection_on_which_the_request_still_waits_is_not_used_again():
    async def run():
        async def hasty(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer(b"no", status="413 Content Too Large"))
            try:
                await asyncio.sleep(100)
            finally:
                writer.transport.abort()

        async with await asyncio.start_server(hasty, "127.0.0.1", 0, limit=1 << 10) as server:
            with opened(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as there:
                size = 64 << 20
                found = await call(there, "POST", headers=[(b"content-length", b"%d" % size)], body=bytes(size))
                return found[::2], len(there._idle)

    assert asyncio.run(run()) == ((413, b"no"), 0)


def test_a_call_that_is_cancelled_ends_its_connection():
    async def run(url):
        with opened(url) as there:
            for steps in (1, 2):
                asking = asyncio.create_task(call(there))
                while len(server.requests) < steps:
                    await asyncio.sleep(0.01)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
                assert await asyncio.to_thread(server.gone.wait, 60)
                server.gone.clear()
            return len(there._idle)

    def script(*_):
        if len(server.requests) == 2:
            yield STREAM + part(b"ab")
        yield 100

    with Scripted(script) as server:
        assert asyncio.run(run(server.url)) == 0


def test_a_slow_reader_holds_upstream_back():
    size, sent = 1 << 25, 0

    async def run():
        async def serve(reader, writer):
            nonlocal sent
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            with contextlib.suppress(ConnectionError):
                for _ in range(size >> 16):
                    writer.write(bytes(1 << 16))
                    await writer.drain()
                    sent += 1 << 16
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            with opened(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as there:
                reply = await there.ask("GET", b"/", [(b"host", there.authority)], b"")
                await asyncio.sleep(0.3)
                waiting = reply._connection._waiting
                read = 0
                while data := await reply.read():
                    read += len(data)
                reply.close()
                return waiting, read

    waiting, read = asyncio.run(run())
    assert waiting <= module._HIGH + (1 << 18)
    assert read == size == sent


def test_large_bodies_go_whole():
    body = os.urandom(3 << 20)

    async def run(url):
        with opened(url) as there:
            return await call(there, "POST", headers=[(b"content-length", b"%d" % len(body))], body=body)

    with Scripted(lambda m, t, h, got: [answer({"same": got == body})]) as server:
        assert asyncio.run(run(server.url))[2] == b'{"same": true}'


def test_the_environments_proxy_is_used(monkeypatch):
    async def run(url, target):
        with opened(url) as there:
            return await call(there, target=target)

    with Scripted(lambda method, target, headers, body: [answer({"target": target, "headers": headers})]) as server:
        monkeypatch.setenv("http_proxy", server.url.replace("http://", "http://user:p%40ss@"))
        _, _, body = asyncio.run(run("http://api.invalid:81/v1", b"/v1/x?a=1"))
        assert b'"target": "http://api.invalid:81/v1/x?a=1"' in body
        assert b'"proxy-authorization": "Basic dXNlcjpwQHNz"' in body
        assert b'"host": "api.invalid:81"' in body
        for none in ("127.0.0.1", f"127.0.0.1:{server.port}"):
            monkeypatch.setenv("no_proxy", none)
            assert b'"target": "/x"' in asyncio.run(run(server.url, b"/x"))[2]
    for wrong in ("socks5://u:p@127.0.0.1:1", "http://127.0.0.1:no"):
        monkeypatch.setenv("http_proxy", wrong)
        with pytest.raises(UsageError, match=rf"the proxy {wrong.replace('u:p@', '')}; an http:// one is wanted"):
            Upstream("http://api.invalid", connect_s=1, idle_s=1)


@pytest.mark.parametrize(
    "url", ["http://a..b", "http://x:99999", "http://x:y", "http://x/#a", "http://:p@x", "http://["]
)
def test_an_address_that_is_none(url):
    with pytest.raises(UsageError, match="is no address"):
        Upstream(url, connect_s=1, idle_s=1)


def test_a_path_is_written_as_http_wants_it():
    assert Upstream("http://x/a b/ü%20/", connect_s=1, idle_s=1).path == b"/a%20b/%C3%BC%20"


def certificate():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "localhost.pem", TLS / "localhost-key.pem")
    return context


async def tunnel(reader, writer):
    """A proxy that knows CONNECT, for one call."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    host, port = head.split()[1].rsplit(":", 1)
    if host != "localhost":
        writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno")
        writer.close()
        return
    there = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

    async def copy(source, sink):
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        sink.close()

    await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))


def test_encryption_is_checked_directly_and_through_a_proxy(monkeypatch):
    async def run(url):
        with opened(url) as there:
            return [(await call(there))[2] for _ in range(2)]

    async def through(port):
        async with await asyncio.start_server(tunnel, "127.0.0.1", 0) as proxy:
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
            found = await run(f"https://localhost:{port}")
            refused = pytest.raises(Refused, match=r"cannot be reached through the proxy.*the proxy says 403")
            with opened(f"https://other.invalid:{port}") as other, refused:
                await call(other)
            return found

    with Scripted(says(STREAM + part(b"x") + END), certificate()) as server:
        url = f"https://localhost:{server.port}"
        with pytest.raises(Refused, match=r"cannot be reached.*certificate verify failed"):
            asyncio.run(run(url))
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "localhost.pem"))
        before = server.connections
        assert asyncio.run(run(url)) == [b"x", b"x"]
        assert asyncio.run(through(server.port)) == [b"x", b"x"]
        assert server.connections == before + 2


def test_an_address_where_nobody_answers():
    with opened("http://127.0.0.1:1") as there, pytest.raises(Refused, match="cannot be reached") as error:
        asyncio.run(call(there))
    assert error.value.status == 502
