"""Trim a vocabulary to the tokens that the data uses; every text can still be written, in more tokens if need be.

For byte-level BPE. Such a tokenizer applies, again and again, the first merge in its list that fits. Encoding a text
applies the merges that derive its tokens, and no others; if all tokens of these derivations are kept, so are the
merges, and among fewer merges each of them is still the first that fits: the text's tokens stay the same.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer

from attar.errors import CapabilityError, RunError
from attar.students.shrink import derive, weights

__all__ = ["Encode", "Trimmed", "encode_texts", "trim_vocabulary"]

Encode = Callable[[Any], Iterable[Sequence[int]]]
"""From a tokenizer to the token ids of the data, example by example, as training will have them."""

Trimmed = tuple[Any, Any, Tensor]


def encode_texts(texts: Sequence[str]) -> Encode:
    """The ids of plain texts: with control tokens read where a text spells them, and the same text without."""

    def encode(tokenizer: Any) -> Iterable[list[int]]:
        for text in texts:
            for plain in (False, True):
                yield tokenizer(text, add_special_tokens=not plain, split_special_tokens=plain).input_ids

    return encode


def trim_vocabulary(model: Any, tokenizer: Any, encode: Encode) -> Trimmed:
    """A student and its tokenizer, without the tokens that the data never uses.

    Kept are the tokens of the data, those they are merged from, single bytes, and all added and special tokens, in the
    old order.

    Args:
        model: the teacher; ids in its config and generation config are changed in the student to the new ones.
        tokenizer: the teacher's, a fast byte-level BPE.
        encode: gives the data's ids for a tokenizer; it is called with the old one and with the new one.

    Returns:
        The student, its tokenizer, and the old id of each new one [new vocabulary].

    Raises:
        CapabilityError: the tokenizer is of another kind, or the model ties more to its ids than embeddings and head.
        RunError: the new tokenizer encodes or decodes an example differently.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CapabilityError(f"{type(tokenizer).__name__} is no fast tokenizer; its vocabulary cannot be trimmed")
    definition = json.loads(backend.to_str())
    _check_kind(definition)
    examples = [list(ids) for ids in encode(tokenizer)]
    old = _kept(definition, tokenizer, examples)
    new_id = {int(identifier): place for place, identifier in enumerate(old)}
    trimmed = _reload(tokenizer, _rewrite(definition, new_id))
    _check_examples(tokenizer, trimmed, examples, [list(ids) for ids in encode(trimmed)], new_id)
    return _trim_model(model, old, new_id), trimmed, old


def _check_kind(definition: dict[str, Any]) -> None:
    kind = definition["model"]
    steps = json.dumps([definition["pre_tokenizer"], definition["decoder"]])
    problem = None
    if kind["type"] != "BPE":
        problem = f"a {kind['type']} model"
    elif steps.count('"ByteLevel"') != 2:
        problem = "no byte-level one"
    elif kind.get("continuing_subword_prefix") or kind.get("end_of_word_suffix") or kind.get("dropout"):
        problem = "one with a prefix, a suffix or dropout"
    if problem:
        raise CapabilityError(
            f"the tokenizer is {problem}, and only a byte-level BPE can be trimmed; keep the whole vocabulary"
        )


def _derivation(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """The tokens that BPE goes through from single characters to a token."""
    parts = list(token)
    seen = set(parts)
    while len(parts) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            # Found whole in the vocabulary (ignore_merges), or never found: no merge makes it.
            return set()
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        seen.add(parts[place])
    return seen


def _kept(definition: dict[str, Any], tokenizer: Any, examples: list[list[int]]) -> Tensor:
    """The ids that stay, ascending."""
    vocabulary: dict[str, int] = definition["model"]["vocab"]
    strings = {identifier: token for token, identifier in vocabulary.items()}
    ranks = {tuple(merge): rank for rank, merge in enumerate(definition["model"]["merges"])}
    keep = {token["id"] for token in definition["added_tokens"]} | set(tokenizer.all_special_ids)
    keep |= {vocabulary[byte] for byte in pre_tokenizers.ByteLevel.alphabet() if byte in vocabulary}
    if definition["model"].get("unk_token") is not None:
        keep.add(vocabulary[definition["model"]["unk_token"]])
    used = {identifier for ids in examples for identifier in ids}
    for identifier in used - keep:
        keep |= {vocabulary[token] for token in _derivation(strings[identifier], ranks)} | {identifier}
    return torch.tensor(sorted(keep))


def _rewrite(definition: dict[str, Any], new_id: dict[int, int]) -> dict[str, Any]:
    """The tokenizer's definition without the tokens that have no new id, and with new ids for the others."""
    model = definition["model"]
    vocabulary = {token: new_id[i] for token, i in model["vocab"].items() if i in new_id}
    merges = [m for m in model["merges"] if m[0] in vocabulary and m[1] in vocabulary and "".join(m) in vocabulary]
    rewritten = {**definition, "model": {**model, "vocab": vocabulary, "merges": merges}}
    rewritten["added_tokens"] = [{**token, "id": new_id[token["id"]]} for token in definition["added_tokens"]]
    rewritten["padding"] = rewritten["truncation"] = None
    rewritten["post_processor"] = _renumber(definition["post_processor"], new_id)
    return rewritten


def _renumber(step: Any, new_id: dict[int, int]) -> Any:
    """A post-processor with new ids."""
    if not isinstance(step, dict):
        return step
    if step["type"] == "Sequence":
        return {**step, "processors": [_renumber(inner, new_id) for inner in step["processors"]]}
    if step["type"] == "TemplateProcessing":
        tokens = step["special_tokens"]
        return {**step, "special_tokens": {k: {**v, "ids": [new_id[i] for i in v["ids"]]} for k, v in tokens.items()}}
    if step["type"] in ("BertProcessing", "RobertaProcessing"):
        return {**step, **{key: [step[key][0], new_id[step[key][1]]] for key in ("sep", "cls")}}
    return step


def _reload(tokenizer: Any, definition: dict[str, Any]) -> Any:
    """A tokenizer of the same class, template and special tokens with another definition."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), "utf-8")
        for other in ("vocab.json", "merges.txt", "added_tokens.json"):
            (folder / other).unlink(missing_ok=True)
        return AutoTokenizer.from_pretrained(folder)


def _check_examples(
    tokenizer: Any, trimmed: Any, examples: list[list[int]], again: list[list[int]], new_id: dict[int, int]
) -> None:
    for number, (ids, new) in enumerate(zip(examples, again, strict=True)):
        same_text = tokenizer.decode(ids, clean_up_tokenization_spaces=False) == trimmed.decode(
            new, clean_up_tokenization_spaces=False
        )
        if new != [new_id[i] for i in ids] or not same_text:
            raise RunError(
                f"the trimmed tokenizer encodes example {number} as {trimmed.convert_ids_to_tokens(new)[:12]}..., and "
                f"the teacher's as {tokenizer.convert_ids_to_tokens(ids)[:12]}...; keep the whole vocabulary"
            )


def _trim_model(model: Any, old: Tensor, new_id: dict[int, int]) -> Any:
    modules = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    tables = {id(p) for module in modules.values() for p in module.parameters()}
    rows = {name for name, parameter in model.named_parameters() if id(parameter) in tables}
    index = old.to(model.device)
    tensors = ((n, t.index_select(0, index) if n in rows else t) for n, t in weights(model).items())
    ids = {key: value for key, value in model.config.to_dict().items() if key.endswith(("_token_id", "_token_ids"))}
    changes = {key: _new_ids(key, value, new_id) for key, value in ids.items()}
    student = derive(model, {"vocab_size": len(old), **changes}, tensors)
    for key, value in student.generation_config.to_dict().items():
        if key.endswith("_token_id"):
            setattr(student.generation_config, key, _new_ids(key, value, new_id))
        elif value and key in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"):
            raise CapabilityError(f"the generation config sets {key}, whose ids would change; unset it")
    return student


def _new_ids(key: str, value: Any, new_id: dict[int, int]) -> Any:
    if isinstance(value, list):
        return [_new_ids(key, one, new_id) for one in value]
    if value is None:
        return None
    if value not in new_id:
        raise CapabilityError(f"{key} is {value}, which is no special token of the tokenizer; make it one, or unset it")
    return new_id[value]
