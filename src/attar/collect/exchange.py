"""One call and its answer -> one row of a recorded folder, redacted.

A row is ``{schema, id, timestamp, workload, episode, user, provider, method, path, query, status, complete, problems,
request_headers, request, response_headers, response, stream, events_common, events, usage, timing, redacted}``:

- ``timestamp``: when the request had arrived, UTC. ``path`` as it went upstream, ``query`` with the values that are no
  secret for certain.
- ``request``, ``response``: the JSON that was sent; for a stream the answer put together (``streams.assemble``), its
  events beside it (``streams.unpack``). Text that is no JSON is a string. Anything else (pictures, sound, forms) cannot
  be redacted, so only ``{"omitted": type, "bytes": n}`` is kept.
- ``status``: upstream's, null if it gave none. ``complete``: the answer came whole; ``problems`` says what did not.
- ``timing``: ms since the request: ``headers``, ``first_byte``, ``first_token`` (of a stream: the first event with
  text), ``total``.
- ``redacted``: how often each rule found something.

Headers are kept by a list of names that carry no secret, so that one that nobody thought of is left out.
"""

from __future__ import annotations

import time
import urllib.parse
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from attar.collect.redact import Redactor
from attar.collect.streams import Fragment, assemble, fragments, pack, parse_events, parse_json
from attar.data.conversations import BadRow, parse_conversation
from attar.data.types import Conversation
from attar.proxy import Call, Headers

__all__ = ["SCHEMA", "Capture", "build_row", "conversation_of", "timestamp_of"]

SCHEMA = 1

_KEPT_HEADERS = frozenset(
    [
        "accept",
        "anthropic-beta",
        "anthropic-version",
        "content-type",
        "openai-beta",
        "openai-model",
        "openai-processing-ms",
        "openai-version",
        "request-id",
        "retry-after",
        "user-agent",
        "x-request-id",
        "x-should-retry",
        "x-stainless-retry-count",
    ]
)
_KEPT_PREFIXES = ("anthropic-ratelimit-", "x-ratelimit-")
_KEPT_QUERY = frozenset({"api-version", "beta", "limit", "order", "stream"})
_CREDENTIALS = frozenset({"authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie", "proxy-authorization"})
# No honest body is larger, and an unpacked one stands in memory.
_UNPACKED = 1 << 28
# Where an answer spells its text a second time, token by token.
_SPELT = frozenset({"logprobs", "top_logprobs", "completion_probabilities", "token_ids", "tokens"})
_SPELT_PROMPT = frozenset({"prompt_logprobs", "prompt_token_ids"})


class Capture:
    """What passed of one call, as bytes; nothing is looked at while the call lasts."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.begun = time.perf_counter()
        self.status: int | None = None
        self.headers: Headers = []
        self.headers_at = self.ended_at = 0.0
        self.chunks: list[tuple[float, bytes]] = []
        self.size = len(call.body)
        self.problem: str | None = None


def timestamp_of(seconds: float) -> str:
    """A moment (seconds since 1970) as a row states it; rows compare as their moments do."""
    whole, part = divmod(int(seconds * 1000), 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{part:03d}Z"


def build_row(capture: Capture, redactor: Redactor) -> dict[str, Any]:
    """The row of a call."""
    call, counts = capture.call, Counter[str]()
    redactor = redactor.knowing(_secrets(call))
    problems = [] if capture.problem is None else [capture.problem]
    request, request_problem = _content(call.body, call.headers, redactor, counts)
    asked = counts.copy()
    events: list[dict[str, Any]] = []
    first_token = None
    streamed = _header(capture.headers, "content-type").startswith("text/event-stream")
    response: Any = None
    pieces = [(_ms(capture, at), data) for at, data in capture.chunks]
    response_problem = None
    if streamed:
        try:
            events = parse_events(list(_decoded(pieces, _header(capture.headers, "content-encoding"))))
        except ValueError as error:
            response_problem = str(error)
        first_token = _redact_events(events, redactor, counts)
        try:
            response = assemble(events)
        except Exception as error:
            response_problem = f"the stream's events do not fit together ({error!r})"
        malformed = sum("raw" in e and not e["raw"].startswith(":") and "[DONE]" not in e["raw"] for e in events)
        if malformed:
            problems.append(f"{malformed} event(s) of the stream are no JSON")
    elif capture.status is not None:
        body = b"".join(data for _, data in pieces)
        response, response_problem = _content(body, capture.headers, redactor, counts)
    problems += [f"request: {request_problem}"] if request_problem else []
    problems += [f"response: {response_problem}"] if response_problem else []
    # The text that was taken out must not stand in its tokens.
    spelt = (_SPELT if counts != asked else frozenset()) | (_SPELT_PROMPT if counts else frozenset())
    if spelt:
        response, events = _without(spelt, response), _without(spelt, events)
    if streamed and isinstance(response, dict) and response.get("error") is not None:
        problems.append("an error came within the stream")
    common, packed = pack(events)
    return {
        "schema": SCHEMA,
        "id": call.id,
        "timestamp": timestamp_of(call.started),
        **{name: redactor.label(call.labels.get(name)) for name in ("workload", "episode", "user")},
        "provider": call.provider,
        "method": call.method,
        "path": redactor.text(call.path.decode("ascii", "backslashreplace"), counts),
        "query": _query(call.query),
        "status": capture.status,
        "complete": capture.status is not None and capture.problem is None,
        "problems": [redactor.text(problem, counts) for problem in problems],
        "request_headers": _kept(call.headers, redactor, counts),
        "request": request,
        "response_headers": _kept(capture.headers, redactor, counts),
        "response": response,
        "stream": streamed,
        "events_common": common,
        "events": packed,
        "usage": response.get("usage") if isinstance(response, dict) else None,
        "timing": {
            "headers": _ms(capture, capture.headers_at) if capture.status is not None else None,
            "first_byte": pieces[0][0] if pieces else None,
            "first_token": first_token,
            "total": _ms(capture, capture.ended_at),
        },
        "redacted": dict(sorted(counts.items())),
    }


def conversation_of(row: dict[str, Any]) -> Conversation:
    """The conversation of a call of OpenAI's chat, its answer last; an episode's calls are one group.

    Raises:
        BadRow: the row is no such call, failed, broke off, or says what no conversation holds.
    """
    request, response = row["request"], row["response"]
    if row["provider"] != "openai" or not row["path"].endswith("/chat/completions"):
        raise BadRow("no chat", f"{row['provider']} {row['path']} is no call of OpenAI's chat")
    if row["status"] != 200 or not row["complete"] or not isinstance(response, dict) or not isinstance(request, dict):
        raise BadRow("no answer", f"the call has status {row['status']} and problems {row['problems']}")
    choices = response.get("choices")
    message = choices[0].get("message") if isinstance(choices, list) and choices else None
    if message is None or response.get("error") is not None:
        raise BadRow("no answer", f"the response has no choice with a message; its keys: {', '.join(response)}")
    asked = request.get("messages")
    messages = [*asked, message] if isinstance(asked, list) else asked
    group = row["episode"] or row["id"]
    return parse_conversation({"messages": messages, "tools": request.get("tools"), "group": group})


def _ms(capture: Capture, at: float) -> float:
    return round((at - capture.begun) * 1000, 3)


def _header(headers: Headers, name: str) -> str:
    return next((v.decode("latin-1").strip().lower() for k, v in headers if k.decode().lower() == name), "")


def _decoded(pieces: list[tuple[float, bytes]], encoding: str) -> Iterator[tuple[float, bytes]]:
    if encoding in ("", "identity"):
        yield from pieces
    elif encoding in ("gzip", "x-gzip", "deflate"):
        # 32: told from the first bytes whether it is gzip or zlib.
        reader = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)
        room = _UNPACKED
        try:
            for ms, piece in pieces:
                unpacked = reader.decompress(piece, room)
                room -= len(unpacked)
                if room <= 0:
                    raise ValueError(f"over {_UNPACKED} bytes when unpacked")
                yield ms, unpacked
        except zlib.error as error:
            raise ValueError(f"content-encoding {encoding}, but the body is none ({error})") from error
    else:
        raise ValueError(f"content-encoding {encoding} is not read")


def _content(body: bytes, headers: Headers, redactor: Redactor, counts: Counter[str]) -> tuple[Any, str | None]:
    """A body that is no stream, redacted, and what was wrong with it."""
    if not body:
        return None, None
    kind = _header(headers, "content-type")
    omitted = {"omitted": kind or "unknown", "bytes": len(body)}
    try:
        body = b"".join(piece for _, piece in _decoded([(0.0, body)], _header(headers, "content-encoding")))
    except ValueError as error:
        return omitted, str(error)
    try:
        return redactor.value(parse_json(body), counts), None
    except ValueError:
        pass
    if kind and not kind.startswith("text/") and "json" not in kind:
        return omitted, None
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return omitted, "it is no JSON and no text"
    return redactor.text(text, counts), "it is no JSON" if "json" in kind else None


def _redact_events(events: list[dict[str, Any]], redactor: Redactor, counts: Counter[str]) -> float | None:
    """Redact events in place, a text that is spread over many as one; returns when the first text came."""
    texts: dict[tuple[Any, ...], list[Fragment]] = defaultdict(list)
    first: float | None = None
    for event in events:
        if "data" not in event:
            event |= {"raw": redactor.text(event["raw"], counts)} if "raw" in event else {}
            continue
        parts = list(fragments(event["data"]))
        if first is None and any(part.holder[part.name] and part.name not in ("role", "type", "id") for part in parts):
            first = event["ms"]
        held = [(part, part.holder[part.name]) for part in parts]
        for part in parts:
            part.holder[part.name] = ""
            texts[part.key].append(part)
        event["data"] = _in_place(event["data"], redactor, counts)
        for part, text in held:
            part.holder[part.name] = text
    for parts in texts.values():
        for part, text in zip(parts, redactor.pieces([p.holder[p.name] for p in parts], counts), strict=True):
            part.holder[part.name] = text
    return first


def _in_place(value: Any, redactor: Redactor, counts: Counter[str]) -> Any:
    """As ``Redactor.value``, in the very objects: fragments point into them."""
    if isinstance(value, dict):
        for key, item in list(value.items()):
            value[key] = _in_place(item, redactor, counts)
        return value
    if isinstance(value, list):
        value[:] = [_in_place(item, redactor, counts) for item in value]
        return value
    return redactor.text(value, counts) if isinstance(value, str) else value


def _without(keys: frozenset[str], value: Any) -> Any:
    if isinstance(value, dict):
        return {k: None if k in keys and isinstance(v, dict | list) else _without(keys, v) for k, v in value.items()}
    return [_without(keys, item) for item in value] if isinstance(value, list) else value


def _secrets(call: Call) -> Iterator[str]:
    for header, value in call.headers:
        if header.decode("latin-1") in _CREDENTIALS:
            text = value.decode("latin-1")
            yield text
            yield text.split(" ", 1)[-1]
    for key, text in urllib.parse.parse_qsl(call.query.decode("latin-1")):
        if key not in _KEPT_QUERY:
            yield text


def _query(query: bytes) -> dict[str, str]:
    pairs = urllib.parse.parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    return {name: value if name in _KEPT_QUERY else "[REDACTED]" for name, value in pairs}


def _kept(headers: Headers, redactor: Redactor, counts: Counter[str]) -> dict[str, str]:
    names = ((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers)
    return {k: redactor.text(v, counts) for k, v in names if k in _KEPT_HEADERS or k.startswith(_KEPT_PREFIXES)}
