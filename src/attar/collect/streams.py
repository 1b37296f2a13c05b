"""Streams of server-sent events: taken apart without loss, and put together into the answer that they spell."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["Fragment", "assemble", "fragments", "pack", "parse_events", "parse_json", "unpack"]

# Fields of a delta that are said once, though some servers repeat them in every part.
_ONCE = frozenset({"role", "id", "type", "format"})


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def parse_json(text: str | bytes) -> Any:
    """A JSON value; ValueError for what is none, NaN and Infinity included."""
    return json.loads(text, parse_constant=_no_constant)


def parse_events(pieces: list[tuple[float, bytes]]) -> list[dict[str, Any]]:
    """Take a stream apart.

    Args:
        pieces: when each part of the body came (ms since the request), and the part.

    Returns:
        An event is ``{"ms", "data"}``, with ``event`` where it has a name. One that is no JSON under ``data`` (a
        comment, ``[DONE]``, something malformed) is ``{"ms", "raw"}``, its text whole; of a last one that was cut off
        the length is kept, ``{"ms", "cut_bytes"}``, since half of what was spread over events cannot be redacted.
        ``ms`` is when its end came.
    """
    events: list[dict[str, Any]] = []
    lines: list[str] = []
    rest = b""
    for ms, piece in pieces:
        complete = (rest + piece).split(b"\n")
        rest = complete.pop()
        for line in complete:
            text = line.decode("utf-8", "backslashreplace").removesuffix("\r")
            if text:
                lines.append(text)
            elif lines:
                events.append({"ms": ms} | _event(lines))
                lines = []
    if rest or lines:
        cut = len(rest) + sum(len(line.encode()) + 1 for line in lines)
        events.append({"ms": pieces[-1][0], "cut_bytes": cut})
    return events


def _event(lines: list[str]) -> dict[str, Any]:
    name: str | None = None
    data: list[str] = []
    for line in lines:
        field, colon, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data" and colon:
            data.append(value)
        elif field == "event" and colon and name is None:
            name = value
        else:
            return {"raw": "\n".join(lines)}
    try:
        content = parse_json("\n".join(data))
    except ValueError:
        return {"raw": "\n".join(lines)}
    return ({} if name is None else {"event": name}) | {"data": content}


def pack(events: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Take out what stands alike in the data of every event (an id, a model's name); ``unpack`` puts it back."""
    datas = [event["data"] for event in events if isinstance(event.get("data"), dict)]
    if len(datas) < 2:
        return {}, events
    common = {k: v for k, v in datas[0].items() if all(k in d and d[k] == v and type(d[k]) is type(v) for d in datas)}
    packed = [
        event | {"data": {k: v for k, v in event["data"].items() if k not in common}}
        if isinstance(event.get("data"), dict)
        else event
        for event in events
    ]
    return common, packed


def unpack(common: dict[str, Any], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events as they came (the order of keys apart)."""
    return [e | {"data": common | e["data"]} if isinstance(e.get("data"), dict) else e for e in events]


class Fragment(NamedTuple):
    """A string in an event that is a part of a longer one: ``holder[name]``; parts of one text share a key."""

    key: tuple[Any, ...]
    holder: dict[str, Any]
    name: str


def fragments(data: Any) -> Iterator[Fragment]:
    """The fragments in an event: every string under ``delta``, in any provider's shape, and a completion's ``text``."""
    if not isinstance(data, dict):
        return
    names = ("type", "item_id", "output_index", "content_index", "index")
    yield from _walk(data, tuple(str(data.get(name)) for name in names), False)


def _walk(value: Any, path: tuple[Any, ...], inside: bool) -> Iterator[Fragment]:
    if isinstance(value, list):
        for i, item in enumerate(value):
            index = item.get("index", i) if isinstance(item, dict) else i
            yield from _walk(item, (*path, str(index)), inside)
    elif isinstance(value, dict):
        for name, item in value.items():
            within = inside or name == "delta" or (name == "text" and "choices" in path)
            if isinstance(item, str):
                if within:
                    yield Fragment((*path, name), value, name)
            else:
                yield from _walk(item, (*path, name), within)


def assemble(events: list[dict[str, Any]]) -> Any:
    """The answer that a stream spells, as the same call without streaming returns it; None where it spells none.

    OpenAI's chat, completions and responses, and Anthropic's messages. A stream that broke off gives what had come; an
    error that came as an event stands under ``error``.
    """
    datas = [event["data"] for event in events if isinstance(event.get("data"), dict)]
    answer: dict[str, Any] | None = None
    if any(data.get("type") == "message_start" for data in datas):
        answer = _anthropic(datas)
    elif any(str(data.get("type", "")).startswith("response.") for data in datas):
        # The last event that carries the whole object carries the most.
        whole = [data["response"] for data in datas if isinstance(data.get("response"), dict)]
        answer = copy.deepcopy(whole[-1]) if whole else None
    elif any(isinstance(data.get("choices"), list) for data in datas):
        answer = _openai(datas)
    errors = [data["error"] for data in datas if data.get("error") is not None]
    return (answer or {}) | {"error": errors[-1]} if errors else answer


def _openai(datas: list[dict[str, Any]]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    choices: dict[Any, dict[str, Any]] = {}
    for data in datas:
        answer |= {
            k: v for k, v in data.items() if k not in ("choices", "error") and (v is not None or k not in answer)
        }
        for part in data.get("choices") or ():
            if not isinstance(part, dict):
                continue
            index = part.get("index", 0)
            choice = choices.setdefault(index, {"index": index})
            for key, value in part.items():
                if key == "delta":
                    _merge(choice.setdefault("message", {}), value or {})
                elif key in ("logprobs", "text"):
                    _merge(choice, {key: value})
                elif value is not None or key not in choice:
                    choice[key] = value
    answer["choices"] = [choices[index] for index in sorted(choices, key=lambda i: (isinstance(i, str), i))]
    for choice in answer["choices"]:
        if "message" in choice:
            choice["message"] = {"role": "assistant", "content": None} | choice["message"]
            for call in choice["message"].get("tool_calls") or ():
                call.pop("index", None)
    if answer.get("object") == "chat.completion.chunk":
        answer["object"] = "chat.completion"
    return answer


def _merge(into: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add a delta: texts and lists grow, elements of a list that have an index are merged with that one."""
    for key, value in delta.items():
        known = into.get(key)
        if isinstance(value, list) and (known is None or isinstance(known, list)):
            into[key] = known = known or []
            _merge_list(known, value)
        elif known is None:
            into[key] = copy.deepcopy(value)
        elif isinstance(known, dict) and isinstance(value, dict):
            _merge(known, value)
        elif isinstance(known, str) and isinstance(value, str):
            repeated = key in _ONCE or (key == "name" and known == value)
            into[key] = (known or value) if repeated else known + value
        elif value is not None:
            into[key] = value


def _merge_list(into: list[Any], parts: list[Any]) -> None:
    for part in parts:
        index = part.get("index") if isinstance(part, dict) else None
        same = next((e for e in into if index is not None and isinstance(e, dict) and e.get("index") == index), None)
        if same is None:
            into.append(copy.deepcopy(part))
        else:
            _merge(same, part)


def _anthropic(datas: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {}
    blocks: dict[int, dict[str, Any]] = {}
    partial: dict[int, str] = {}
    for data in datas:
        kind, given = data.get("type"), data.get("delta")
        # A block without a number is the first.
        index = int(data.get("index") or 0)
        delta: dict[str, Any] = given if isinstance(given, dict) else {}
        if kind == "message_start" and isinstance(data.get("message"), dict):
            message = copy.deepcopy(data["message"])
        elif kind == "content_block_start":
            blocks[index] = copy.deepcopy(data.get("content_block") or {})
        elif kind == "content_block_delta":
            block = blocks.setdefault(index, {})
            for name, value in delta.items():
                if name == "partial_json":
                    partial[index] = partial.get(index, "") + value
                elif name == "citation":
                    block["citations"] = [*(block.get("citations") or ()), value]
                elif name != "type":
                    known = block.get(name)
                    block[name] = known + value if isinstance(known, str) and isinstance(value, str) else value
        elif kind == "message_delta":
            message |= delta
            message["usage"] = (message.get("usage") or {}) | (data.get("usage") or {})
            message |= {k: v for k, v in data.items() if k not in ("type", "delta", "usage")}
    for index, text in partial.items():
        # A call that was cut off keeps its arguments as the text that they are.
        try:
            blocks[index]["input"] = parse_json(text) if text else {}
        except ValueError:
            blocks[index]["input"] = text
    message["content"] = [blocks[index] for index in sorted(blocks)]
    return message
