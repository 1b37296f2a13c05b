"""A byte-level BPE in a GGUF file: how it cuts text before it merges, and the tokenizer as a whole.

A GGUF file says how text is cut by a name alone. A wrong one changes the tokens of some texts and gives no error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from attar.errors import CapabilityError

__all__ = ["pre_name", "read_tokenizer"]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


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


def read_tokenizer(fields: Mapping[str, Any]) -> Any:
    """The tokenizer in a GGUF file, which cuts, merges and frames text as llama.cpp does.

    Args:
        fields: those of a ``gguf.GGUFReader``.

    Raises:
        CapabilityError: it is no byte-level BPE, or cuts text in a way that is not known here.
    """

    def value(key: str, otherwise: Any = None) -> Any:
        return fields[f"tokenizer.{key}"].contents() if f"tokenizer.{key}" in fields else otherwise

    kind, pre = value("ggml.model"), value("ggml.pre")
    if kind != "gpt2" or pre not in _KNOWN:
        raise CapabilityError(
            f"the tokenizer in the GGUF file is {kind!r} and cuts text as {pre!r}; known here is 'gpt2' with "
            f"{', '.join(_KNOWN)}; name the folder of its tokenizer"
        )
    steps, ignore_merges = _KNOWN[pre]
    tokens: list[str] = value("ggml.tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in value("ggml.merges")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    definition = json.loads(backend.to_str())
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    backend = Tokenizer.from_str(json.dumps(definition))
    backend.decoder = decoders.ByteLevel()
    for token, role in zip(tokens, value("ggml.token_type"), strict=True):
        if role in (TokenType.CONTROL, TokenType.USER_DEFINED):
            special = role == TokenType.CONTROL
            backend.add_tokens([AddedToken(token, special=special, normalized=False)])
    special = {name: value(f"ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    special = {name: tokens[i] for name, i in special.items() if i is not None}
    before, after = (
        [special[f"{name}_token"]] if value(f"ggml.add_{name}_token", False) else [] for name in ("bos", "eos")
    )
    if before or after:
        backend.post_processor = TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(token, vocabulary[token]) for token in {*before, *after}]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = value("chat_template")
    return tokenizer


def _cuts(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps without what changes offsets alone."""
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
