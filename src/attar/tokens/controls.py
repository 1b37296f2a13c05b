"""Which strings a tokenizer reads as control tokens, where content spells one, and how such text is encoded."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from attar.errors import ModelError

__all__ = ["Coder", "Encoded", "Marks", "coder", "strings"]

# Private-use planes 15 and 16: the characters that stand for control tokens while a text with quoted ones is encoded.
_STAND_INS = range(0xF0000, 0x10FFFE)
# Fields of a message in which the words are the model's or its developer's, not a stranger's.
_OWN_ROLES = ("assistant", "system", "developer")
_OWN_FIELDS = ("content", "reasoning_content")


class Encoded(NamedTuple):
    """Token ids and, for each, the stretch [start, end) of the text that it covers."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Coder:
    """A tokenizer's encoder as a chat template needs it: no BOS of its own, and control tokens where they are meant.

    Control tokens are the special ones and, as in transformers' ``sanitize_control_tokens``, the other added tokens
    that the tokenizer declares (``chat_control_tokens``) or the template writes, such as ``<tool_call>``. Added tokens
    that are mere words or white space are ordinary text: a template holds such strings without meaning a token.

    Args:
        tokenizer: a fast tokenizer.
        template: the source of the chat template.

    Raises:
        ModelError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                f"{type(tokenizer).__name__} does not say which characters a token covers; load the model's fast "
                "tokenizer (tokenizer.json)"
            )
        added = tokenizer.added_tokens_decoder
        declared = getattr(tokenizer, "chat_control_tokens", None) or ()
        self.special = frozenset(token.content for token in added.values() if token.special)
        self.controls = self.special | {
            token.content
            for token in added.values()
            if token.content in declared
            or (token.content in template and not token.content.isspace() and not token.content.isalnum())
        }
        self.added = {token.content: index for index, token in added.items()}
        self._added_ids = frozenset(self.added.values())
        self.any_control = _pattern(self.controls)
        self.special_only = _pattern(self.special)
        # The post-processor would add a BOS, and cuts white space off what a token is said to cover.
        self._plain = Tokenizer.from_str(backend.to_str())
        self._plain.post_processor = None
        self._plain.no_padding()
        self._plain.no_truncation()
        self._stand_ins: dict[str, str] = {}
        self._standing: tuple[Tokenizer, dict[int, int]] | None = None

    def occurrences(self, text: str) -> list[tuple[int, int]]:
        """Where the text spells control tokens, as [start, end), left to right, the longest first."""
        return [match.span() for match in self.any_control.finditer(text)]

    def encode(self, text: str, quoted: frozenset[int] = frozenset()) -> Encoded:
        """Token ids of a rendered text, encoded as a whole.

        Args:
            text: what the template rendered.
            quoted: where control strings start that are ordinary text.

        Raises:
            ModelError: the tokenizer makes a control token of ordinary text.
        """
        if not quoted:
            encoding = self._plain.encode(text, add_special_tokens=False)
            return Encoded(encoding.ids, encoding.offsets)
        meant = [span for span in self.occurrences(text) if span[0] not in quoted]
        backend, numbers = self._with_stand_ins(text)
        pieces, starts, ends, end = [], [], [], 0
        for start, stop in meant:
            pieces += [text[end:start], self._stand_ins[text[start:stop]]]
            starts += [*range(end, start), start]
            ends += [*range(end + 1, start + 1), stop]
            end = stop
        pieces.append(text[end:])
        starts += [*range(end, len(text)), len(text)]
        ends += range(end + 1, len(text) + 1)
        encoding = backend.encode("".join(pieces), add_special_tokens=False)
        ids = [numbers.get(i, i) for i in encoding.ids]
        offsets = [(starts[s], ends[e - 1] if e > s else starts[s]) for s, e in encoding.offsets]
        control_ids = {self.added[content] for content in self.controls}
        if [i for i in ids if i in control_ids] != [self.added[text[s:e]] for s, e in meant]:
            raise ModelError(
                "the tokenizer makes control tokens of ordinary text that spells them "
                f"({', '.join(sorted({text[s:e] for s, e in self.occurrences(text) if s in quoted}))}); leave out the "
                "conversations that hold such text, or use another student"
            )
        return Encoded(ids, offsets)

    def inside(self, encoded: Encoded, text: str, spans: Iterable[tuple[int, int]]) -> list[bool]:
        """Which tokens lie wholly within one of the spans, given in ascending order.

        An added token may swallow white space beside it (``lstrip``, ``rstrip``); that does not count.
        """
        spans = list(spans)
        starts = [start for start, _ in spans]
        answer = []
        for number, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            if number in self._added_ids and (core := text[start:end].strip()):
                start = text.index(core, start, end)
                end = start + len(core)
            k = bisect_right(starts, start) - 1
            answer.append(k >= 0 and start < end <= spans[k][1])
        return answer

    def _with_stand_ins(self, text: str) -> tuple[Tokenizer, dict[int, int]]:
        """A copy of the tokenizer in which one character, absent from the text, stands for each control token.

        Everything else is as it was, so that the text around is split as ever. With it comes the token id that each
        id of the copy stands for, where they differ.
        """
        if self._standing is None or any(character in text for character in self._stand_ins.values()):
            used = set(text)
            free = (chr(i) for i in _STAND_INS if chr(i) not in used)
            self._stand_ins = dict(zip(sorted(self.controls), free, strict=False))
            state = json.loads(self._plain.to_str())
            for token in state["added_tokens"]:
                token["content"] = self._stand_ins.get(token["content"], token["content"])
            backend = Tokenizer.from_str(json.dumps(state))
            numbers = {
                number: index
                for content, index in self.added.items()
                if (number := backend.token_to_id(self._stand_ins.get(content, content))) is not None
            }
            self._standing = backend, numbers
        return self._standing


_coders: WeakKeyDictionary[Any, tuple[Any, Coder]] = WeakKeyDictionary()


def coder(tokenizer: Any, template: str) -> Coder:
    """The tokenizer's coder, kept for as long as the tokenizer's added tokens and the template stay as they are."""
    state = (template, len(tokenizer), [(t.content, t.special) for t in tokenizer.added_tokens_decoder.values()])
    known = _coders.get(tokenizer)
    if known is None or known[0] != state:
        known = _coders[tokenizer] = (state, Coder(tokenizer, template))
    return known[1]


def _pattern(contents: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)")


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)


@dataclass(frozen=True)
class Marks:
    """Two characters that are put around the control strings in content, to find them again in the rendered text.

    A template may look at how content begins or ends, trim it or split it, and would then render the marked content
    in another way than the plain one; so there are several manners of marking, and the caller checks which is inert.

    In the content and reasoning of the assistant and of the system only special tokens are marked. An added token that
    is not special is part of what a model's recorded text says (decoding with ``skip_special_tokens`` keeps it), so
    its spelling there is that token; a special one is never left in such text, so its spelling is a mention of it.
    """

    before: str
    after: str
    manner: str

    MANNERS = ("around", "inward", "after", "before")

    def messages(self, messages: Sequence[Mapping[str, Any]], coder: Coder) -> list[dict[str, Any]]:
        """The messages, marked."""
        return [
            {
                field: value
                if field == "role"
                else self.value(
                    value,
                    coder.special_only if message["role"] in _OWN_ROLES and field in _OWN_FIELDS else coder.any_control,
                )
                for field, value in message.items()
            }
            for message in messages
        ]

    def value(self, value: Any, pattern: re.Pattern[str]) -> Any:
        """A JSON value, the control strings of the pattern marked in all its strings, keys included."""
        if isinstance(value, str):
            return pattern.sub(self._mark, value)
        if isinstance(value, Mapping):
            return {self.value(key, pattern): self.value(item, pattern) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item, pattern) for item in value]
        return value

    def _mark(self, match: re.Match[str]) -> str:
        if self.manner == "instead":
            return "\ufffd" * len(match.group())
        before, after = self.manner != "after", self.manner != "before"
        if self.manner == "inward":
            before = bool(match.string[: match.start()].strip())
            after = bool(match.string[match.end() :].strip())
            if not before and not after:
                before = after = True
        return (self.before if before else "") + match.group() + (self.after if after else "")

    def find(self, marked: str, coder: Coder) -> tuple[str, frozenset[int]]:
        """The rendered text without its marks, and where in it marked control strings start."""
        begun, ended, pieces, length = set(), set(), [], 0
        for piece in re.split(f"([{self.before}{self.after}])", marked):
            if piece == self.before:
                begun.add(length)
            elif piece == self.after:
                ended.add(length)
            else:
                pieces.append(piece)
                length += len(piece)
        text = "".join(pieces)
        return text, frozenset(s for s, e in coder.occurrences(text) if s in begun or e in ended)
