"""How a byte-level BPE cuts text before it merges: the names that llama.cpp has for it, and what they mean.

A GGUF file says how text is cut by a name alone. A wrong one changes the tokens of some texts and gives no error.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from attar.errors import CapabilityError

__all__ = ["pre_name", "set_pre"]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _bytes(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# llama.cpp's name -> the steps, and whether a piece that is a token as a whole skips the merges (ignore_merges).
_KNOWN: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_bytes(use_regex=True)], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)], False),
    "llama-bpe": ([_split(_LLAMA3), _bytes(use_regex=False)], True),
    "qwen2": ([_split(_QWEN2), _bytes(use_regex=False)], False),
}


def pre_name(tokenizer: Any) -> str:
    """llama.cpp's name for how a tokenizer cuts text.

    Raises:
        CapabilityError: the tokenizer is no byte-level BPE, or llama.cpp has no name here for how it cuts.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = json.loads(backend.to_str()) if backend is not None else {}
    kind, pre = definition.get("model", {}), definition.get("pre_tokenizer") or {}
    if kind.get("type") != "BPE" or kind.get("byte_fallback") or '"ByteLevel"' not in json.dumps(pre):
        raise CapabilityError(f"{type(tokenizer).__name__} is no byte-level BPE, and only one can be written to GGUF")
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    for name, (known, ignore_merges) in _KNOWN.items():
        if _cuts(steps) == _cuts(known) and bool(kind.get("ignore_merges")) == ignore_merges:
            return name
    raise CapabilityError(
        f"the tokenizer cuts text by {json.dumps(steps)}, ignore_merges: {bool(kind.get('ignore_merges'))}; known here "
        f"are {', '.join(_KNOWN)}; export safetensors instead"
    )


def set_pre(tokenizer: Any, name: str) -> Any:
    """The tokenizer, cutting text as llama.cpp's name says; only for one that was read from a GGUF file.

    Raises:
        CapabilityError: the name is not known here.
    """
    if name not in _KNOWN:
        raise CapabilityError(
            f"the GGUF file cuts text as {name!r}; known here are {', '.join(_KNOWN)}; name the folder of its tokenizer"
        )
    steps, ignore_merges = _KNOWN[name]
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    definition["model"]["ignore_merges"] = ignore_merges
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(definition))
    return tokenizer


def _cuts(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps without what changes offsets alone."""
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
