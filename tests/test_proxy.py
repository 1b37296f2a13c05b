import gzip
import json
import socket
import threading
import urllib.parse

import httpx2
import pytest

from attar.errors import UsageError
from attar.proxy import Limits, Proxy, guarded, is_loopback, listen
from recording import END, STREAM, Scripted, answer, event, part, serving

# Patient, as the machine may be shared; IMPATIENT where an upstream stays silent on purpose.
LIMITS = Limits(body_bytes=1 << 20, connect_s=60.0, idle_s=60.0)
IMPATIENT = Limits(body_bytes=1 << 20, connect_s=60.0, idle_s=0.4)
CHAT = "/v1/chat/completions"


def echo(method, target, headers, body):
    yield answer({"method": method, "target": target, "headers": headers, "body": body.decode("latin-1")})


class Watching:
    """An observer that keeps what it is told."""

    def __init__(self):
        self.calls, self.seen, self.failures = [], [], []
        self.over = threading.Event()

    def request(self, call):
        self.calls.append(call)
        return self

    def response(self, status, headers):
        self.seen.append(status)

    def chunk(self, data, at):
        self.seen.append(data)

    def end(self, problem):
        self.seen.append(("end", problem))
        self.over.set()

    @property
    def told(self):
        """What was seen of one call; its end may come after the client has its answer."""
        assert self.over.wait(100)
        return self.seen

    def failed(self, error):
        self.failures.append(error)
        self.over.set()


@pytest.fixture
def through():
    """Scripted upstream, proxy and client: (client, upstream, observer)."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def make(script, *, path="", limits=LIMITS, observer=None, wrap=lambda app: app):
            upstream = stack.enter_context(Scripted(script))
            observer = observer or Watching()
            proxy = Proxy(upstream.url + path, limits, observer)
            url = stack.enter_context(serving(wrap(with_lifespan(proxy))))
            client = stack.enter_context(httpx2.Client(base_url=url, trust_env=False, timeout=100))
            return client, upstream, observer

        yield make


def with_lifespan(proxy):
    async def app(scope, receive, send):
        if scope["type"] != "lifespan":
            return await proxy(scope, receive, send)
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await proxy.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    return app


def test_a_request_goes_upstream_as_it_is_but_for_its_connection(through):
    client, upstream, observer = through(echo)
    body = b'{"model": "m",\n "x": 1e2}'
    headers = {
        "Authorization": "Bearer k",
        "X-Custom": "1",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "mine",
        "TE": "trailers",
        "x-attar-episode": "e",
        "accept-encoding": "br, gzip;q=0.5, zstd",
    }
    got = client.post(CHAT + "?api-version=1&k=a%2Fb", content=body, headers=headers).json()
    assert got["method"] == "POST"
    assert got["target"] == CHAT + "?api-version=1&k=a%2Fb"
    assert got["body"].encode("latin-1") == body
    sent = got["headers"]
    assert sent["authorization"] == "Bearer k"
    assert sent["x-custom"] == "1"
    assert sent["host"] == urllib.parse.urlsplit(upstream.url).netloc
    assert sent["accept-encoding"] == "gzip;q=0.5"
    assert sent["content-length"] == str(len(body))
    assert not {"x-hop", "te", "connection", "x-attar-episode", "transfer-encoding"} & set(sent)
    assert observer.calls[0].labels == {"episode": "e"}


def test_a_chunked_request_arrives_whole(through):
    client, _, _ = through(echo)
    got = client.post(CHAT, content=iter([b"ab", b"", b"cd"])).json()
    assert got["body"] == "abcd"
    assert got["headers"]["content-length"] == "4"


@pytest.mark.parametrize(
    ("base", "path", "target"),
    [
        ("", "/v1/models", "/v1/models"),
        ("/v1", "/v1/models", "/v1/models"),
        ("/api/v1/", "/v1/models", "/api/v1/models"),
        ("/api/v1", "/models", "/api/v1/models"),
        ("/api/v1", "/v1beta/models", "/api/v1/v1beta/models"),
        ("", "/a%2Fb/%7Ec", "/a%2Fb/%7Ec"),
        ("", "/w/mail%20bot/e/7/v1/models", "/v1/models"),
        ("", "/w/mail/v1/models", "/v1/models"),
        ("", "/e/7/v1/models", "/v1/models"),
    ],
)
def test_paths(through, base, path, target):
    client, upstream, _ = through(echo, path=base)
    client.get(path)
    assert upstream.requests[0][1] == target


def test_labels_from_the_path_and_from_headers_which_come_first(through):
    client, _, observer = through(echo)
    client.get("/w/mail%20bot/e/7/v1/models")
    client.get("/w/mail/e/7/v1/models", headers={"x-attar-episode": "8", "x-attar-user": "u"})
    assert observer.calls[0].labels == {"workload": "mail bot", "episode": "7"}
    assert observer.calls[1].labels == {"workload": "mail", "episode": "8", "user": "u"}


def test_an_answer_comes_back_byte_for_byte(through):
    packed = gzip.compress(b'{"a":   1}')
    head = (
        "content-encoding: gzip\r\nX-Request-Id: r1\r\nConnection: close, X-Secret\r\nX-Secret: s\r\nserver: theirs\r\n"
    )

    def script(*_):
        yield answer(packed, status="201 Created", extra=head)

    client, _, observer = through(script)
    with client.stream("POST", CHAT, content=b"{}") as response:
        raw = b"".join(response.iter_raw())
    assert (response.status_code, raw) == (201, packed)
    assert response.headers["x-request-id"] == "r1"
    assert response.headers["server"] == "theirs"
    assert "x-secret" not in response.headers
    assert "date" not in response.headers
    assert response.headers["x-attar-id"] == observer.calls[0].id
    assert observer.told == [201, packed, ("end", None)]


@pytest.mark.parametrize("method", ["GET", "DELETE", "HEAD"])
def test_other_methods(through, method):
    def script(*_):
        yield b"HTTP/1.1 204 No Content\r\n\r\n"

    client, upstream, _ = through(script)
    assert client.request(method, "/v1/files/1").status_code == 204
    assert upstream.requests[0][0] == method


def test_no_byte_of_a_stream_waits_for_the_next(through):
    # The upstream sends the next part only after the client has read the one before.
    read = threading.Semaphore(0)

    def script(*_):
        yield STREAM
        for i in range(5):
            yield part(b"%d" % i)
            assert read.acquire(timeout=100)
        yield END

    client, _, observer = through(script)
    got = []
    with client.stream("POST", CHAT, content=b"{}") as response:
        for data in response.iter_raw():
            got.append(data)
            read.release()
    assert b"".join(got) == b"01234"
    assert len(got) == 5
    assert observer.told[-1] == ("end", None)


def test_a_client_that_leaves_cancels_the_call_upstream(through):
    def script(*_):
        yield STREAM
        yield event({"n": 1})
        yield 100

    client, upstream, observer = through(script, limits=LIMITS)
    with client.stream("POST", CHAT, content=b"{}") as response:
        next(response.iter_raw())
    assert upstream.gone.wait(100)
    assert observer.told[-1] == ("end", "the client went away")


@pytest.mark.parametrize("headers", [{}, {"anthropic-version": "2023-06-01"}])
def test_a_silent_upstream_is_a_timeout_in_the_providers_words(through, headers):
    def script(*_):
        yield 100

    client, upstream, observer = through(script, limits=IMPATIENT)
    response = client.post(CHAT, content=b"{}", headers=headers)
    assert response.status_code == 504
    error = response.json()
    assert response.headers["x-attar-error"] == "upstream_timeout"
    message = f"{upstream.url} did not answer within 0.4 s"
    if headers:
        assert error == {"type": "error", "error": {"type": "timeout_error", "message": message}}
    else:
        wanted = {"message": message, "type": "server_error", "param": None, "code": "upstream_timeout"}
        assert error == {"error": wanted}
    assert observer.told == [("end", message)]


def test_no_upstream_and_one_that_cuts_are_gateway_errors(through):
    def script(*_):
        yield None

    client, upstream, observer = through(script)
    response = client.post("/v1/messages", content=b"{}")
    assert (response.status_code, response.json()["error"]["type"]) == (502, "api_error")
    assert "gave no answer" in response.json()["error"]["message"]
    assert observer.told[0][1].startswith(upstream.url)

    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    with serving(with_lifespan(Proxy(f"http://127.0.0.1:{port}", LIMITS))) as url:
        response = httpx2.post(url + CHAT, content=b"{}", trust_env=False, timeout=100)
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_error")


def cut_body(client, path=CHAT):
    got = []
    with client.stream("POST", path, content=b"{}") as response, pytest.raises(httpx2.RemoteProtocolError):
        got.extend(response.iter_raw())
    return response, b"".join(got)


def test_a_stream_that_breaks_after_a_whole_event_ends_in_an_error_event_and_a_cut(through):
    def script(*_):
        yield STREAM
        yield event({"n": 1})
        yield 0.05
        yield None

    client, _, observer = through(script)
    response, got = cut_body(client)
    first, last = got.split(b"\n\n")[:2]
    assert (response.status_code, first) == (200, b'data: {"n": 1}')
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_error"
    assert "broke off its answer" in observer.told[-1][1]
    _, got = cut_body(client, "/v1/messages")
    assert got.split(b"\n\n")[1].startswith(b"event: error\ndata: ")


def test_a_stream_that_breaks_within_an_event_is_cut_and_nothing_is_added(through):
    def script(*_):
        yield STREAM
        yield part(b'data: {"n": ')
        yield 100

    client, _, observer = through(script, limits=IMPATIENT)
    _, got = cut_body(client)
    assert got == b'data: {"n": '
    assert "did not answer within" in observer.told[-1][1]


def test_an_answer_shorter_than_it_said_is_cut(through):
    def script(*_):
        yield b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{}"
        yield None

    client, _, observer = through(script)
    _, got = cut_body(client)
    assert got == b"{}"
    assert "broke off" in observer.told[-1][1]


def test_bodies_over_the_limit_are_refused_and_never_go_upstream(through):
    client, upstream, _ = through(echo, limits=Limits(1000, 60.0, 60.0))
    assert client.post(CHAT, content=b"x" * 1000).status_code == 200
    for content in (b"x" * 1001, iter([b"x" * 600] * 2), b"x" * 100_000):
        response = client.post(CHAT, content=content)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert "over 1000 bytes" in response.json()["error"]["message"]
    response = client.post("/v1/messages", content=b"x" * 1001)
    assert response.json()["error"]["type"] == "request_too_large"
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("fault", ["request", "response", "chunk", "end"])
def test_an_observer_that_fails_does_not_touch_the_call(through, fault):
    def fail(*_):
        raise RuntimeError(fault)

    observer = Watching()
    setattr(observer, fault, fail)
    client, _, _ = through(echo, observer=observer)
    assert client.post(CHAT, content=b"{}").json()["target"] == CHAT
    assert observer.over.wait(100)
    assert [str(error) for error in observer.failures] == [fault]


def test_a_token_is_asked_for(through):
    client, upstream, observer = through(echo, wrap=lambda app: guarded(app, "a-long-secret-token"))
    assert client.post(CHAT).status_code == 401
    wrong = client.post("/v1/messages", headers={"x-attar-token": "a-long-secret-tokem"})
    assert wrong.json()["error"]["type"] == "authentication_error"
    assert "is wrong" in wrong.json()["error"]["message"]
    assert upstream.requests == []
    assert client.post(CHAT, headers={"x-attar-token": "a-long-secret-token"}).json()["target"] == CHAT
    assert client.post("/t/a-long-secret-token/w/mail" + CHAT).json()["target"] == CHAT
    assert observer.calls[-1].labels == {"workload": "mail"}
    assert "x-attar-token" not in upstream.requests[0][2]


def test_listening():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 is taken.*choose --port"):
            listen("127.0.0.1", port)
    with pytest.raises(UsageError, match=r"cannot listen on 203\.0\.113\.1"):
        listen("203.0.113.1", 0)
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.1", "example.org")] == [
        *[True] * 3,
        *[False] * 3,
    ]


@pytest.mark.parametrize("upstream", ["api.openai.com", "ftp://x", "http://", "http://u:p@x", "http://x/?a=1"])
def test_an_upstream_that_is_no_address(upstream):
    with pytest.raises(UsageError, match="is no address"):
        Proxy(upstream, LIMITS)
