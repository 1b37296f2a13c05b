"""What became of a request, as JSON and back; and its key."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

from attar.data.conversations import parse_conversation
from attar.engines.base import Answer, Failure, TokenLogprobs

__all__ = ["from_json", "request_key", "to_json"]


def request_key(server: str, body: dict[str, Any], sample: int) -> tuple[str, int]:
    """SHA-256 of all that changes an answer, in hexadecimal, and the number of bytes that it was taken of.

    Args:
        server: protocol and address.
        body: of the request, the model in it; the order of its keys counts, since it shows in the tokens.
        sample: number of the answer, of several.
    """
    content = json.dumps([server, body, sample], ensure_ascii=False).encode()
    return hashlib.sha256(content).hexdigest(), len(content)


def to_json(outcome: Answer | Failure) -> str:
    """A JSON text that :func:`from_json` reads."""
    if isinstance(outcome, Failure):
        return json.dumps({"failure": asdict(outcome)}, ensure_ascii=False)
    fields = vars(outcome) | {"message": outcome.message.wire, "top_logprobs": None}
    if outcome.top_logprobs is not None:
        fields["top_logprobs"] = [[t.token, t.log_prob, t.top] for t in outcome.top_logprobs]
    return json.dumps({"answer": fields}, ensure_ascii=False)


def from_json(text: str) -> Answer | Failure:
    """What was stored."""
    row = json.loads(text)
    if "failure" in row:
        return Failure(**row["failure"])
    fields = row["answer"]
    [message] = parse_conversation({"messages": [fields.pop("message")]}).messages
    records = fields.pop("top_logprobs")
    answer = Answer(message=message, **fields)
    if records is None:
        return answer
    tokens = (
        TokenLogprobs(token, log_prob, tuple((other, value) for other, value in top))
        for token, log_prob, top in records
    )
    return replace(answer, top_logprobs=tuple(tokens))
