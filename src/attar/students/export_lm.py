"""A trained language model as it is served, checked against what was trained: safetensors, GGUF."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from attar.engines.gguf import GgufEngine, load_gguf
from attar.engines.heads import eval_mode, head_of
from attar.errors import CapabilityError, RunError
from attar.students.gguf_file import write_gguf
from attar.students.shrink import derive, weights
from attar.tokens import encode_plain
from attar.workspace import replace_folder

__all__ = ["Checked", "export_gguf", "export_safetensors", "merge"]

# Largest difference of a log-probability, in nats, that storing and running a model may cause. Measured on
# SmolLM2-135M: 0.03 in float16, 0.16 in bfloat16, 0.03 in llama.cpp with F16 weights.
_TOLERANCE = {"float32": 1e-4, "float16": 0.1, "bfloat16": 0.5, "gguf": 0.2}
# Below this, a log-probability is of a token that nobody will see, and its error is of no interest.
_FLOOR = -20.0
_GREEDY_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was compared with the trained model, and how far it was off."""

    format: str
    prompts: int
    log_probs: int
    """how many log-probabilities were compared"""
    largest_difference: float
    """of these, in nats"""
    tolerance: float
    greedy_tokens: int
    """how many greedy tokens were equal"""
    near_ties: int
    """prompts where a token differed that the trained model was undecided about, within twice the tolerance"""
    stripped: list[str]
    """weights of the trained model that do not belong to its class: training aids"""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def merge(model: Any) -> tuple[Any, list[str]]:
    """A plain model that answers as a trained one: adapters merged, training aids left out. The trained one stays.

    Args:
        model: a ``transformers`` causal language model, or a PEFT model around one.

    Returns:
        The plain model, and the names of weights that were left out since they do not belong to its class.

    Raises:
        CapabilityError: the adapter cannot be merged.
    """
    if hasattr(model, "peft_config"):
        if model.active_peft_config.is_prompt_learning:
            raise CapabilityError(f"{type(model.active_peft_config).__name__} cannot be merged; use LoRA")
        # At least in float32: an adapter's part is smaller than what rounding to 16 bits would take from the sum.
        dtype = torch.promote_types(model.dtype, torch.float32)
        model = copy.deepcopy(model).to(dtype).merge_and_unload(safe_merge=True)
    with torch.device("meta"):
        own = weights(type(model)(copy.deepcopy(model.config))).keys()
    given = weights(model)
    plain = derive(model, {}, ((name, tensor) for name, tensor in given.items() if name in own))
    return plain, sorted(given.keys() - own)


def export_safetensors(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: Literal["float32", "float16", "bfloat16"],
    probes: Sequence[Sequence[int]],
) -> Checked:
    """Write a folder that ``transformers`` loads, and check it.

    Args:
        model: the trained model, with its adapters.
        tokenizer: of the model.
        folder: where; it is whole or not there.
        dtype: of the weights.
        probes: token ids of prompts.

    Raises:
        RunError: what was written answers differently, beyond the tolerance of its number format.
    """
    plain, stripped = merge(model)
    kind = plain.dtype
    logging.disable_progress_bar()
    with replace_folder(folder) as temporary:
        plain.to(getattr(torch, dtype)).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        del plain
        # Computed as the trained model is: what is compared is the weights.
        loaded = AutoModelForCausalLM.from_pretrained(temporary, dtype=kind).to(model.device).eval()
        rows = head_of(model, tokenizer).size
        return _compare(model, _InProcess(loaded, rows), rows, probes, dtype, stripped)


def export_gguf(
    model: Any, tokenizer: Any, path: Path, *, probes: Sequence[Sequence[int]], texts: Sequence[str] = ()
) -> Checked:
    """Write a GGUF file in F16, and check it in llama.cpp.

    Args:
        model: the trained model, with its adapters; Llama, Mistral, Qwen2 or Qwen3.
        tokenizer: of the model, a byte-level BPE.
        path: the file; it is whole or not there.
        probes: token ids of prompts.
        texts: what llama.cpp must encode into the same ids as the tokenizer.

    Raises:
        MissingExtra: ``xllamacpp`` is not installed.
        CapabilityError: architecture or tokenizer cannot be written.
        RunError: llama.cpp answers or encodes differently.
    """
    plain, stripped = merge(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, suffix=".partial") as name:
        temporary = Path(name) / path.name
        write_gguf(plain, tokenizer, temporary)
        del plain
        engine = load_gguf(
            str(temporary), tokenizer=tokenizer, context_tokens=_context(probes), threads=torch.get_num_threads()
        )
        for text in texts:
            ours, theirs = encode_plain(tokenizer, text), engine.tokenize(text)
            if ours != theirs:
                raise RunError(
                    f"llama.cpp encodes {text!r} as {theirs} and the tokenizer as {ours}; export safetensors instead"
                )
        checked = _compare(model, _LlamaCpp(engine), head_of(model, tokenizer).size, probes, "gguf", stripped)
        del engine
        temporary.replace(path)
    return checked


def _context(probes: Sequence[Sequence[int]]) -> int:
    return max(map(len, probes), default=0) + _GREEDY_TOKENS + 1


class _Exported(Protocol):
    """What the check asks of an export."""

    def greedy(self, ids: list[int]) -> list[int]:
        """Its greedy continuation."""

    def differences(self, ids: list[int], path: list[int], expected: Tensor) -> list[float]:
        """How far its log-probabilities along a path are from the expected ones [path, vocabulary]."""


class _InProcess:
    def __init__(self, model: Any, rows: int) -> None:
        self._model, self._rows = model, rows

    def greedy(self, ids: list[int]) -> list[int]:
        return _greedy(self._model, ids, self._rows)[0]

    def differences(self, ids: list[int], path: list[int], expected: Tensor) -> list[float]:
        return _off(_along(self._model, ids, path, self._rows), expected)


class _LlamaCpp:
    def __init__(self, engine: GgufEngine) -> None:
        self._engine = engine

    def greedy(self, ids: list[int]) -> list[int]:
        return self._engine.write(ids, _GREEDY_TOKENS).ids

    def differences(self, ids: list[int], path: list[int], expected: Tensor) -> list[float]:
        """Of the whole vocabulary after the prompt, and of the path's own tokens."""
        whole = torch.from_numpy(self._engine.distribution(ids))
        scored = torch.tensor(self._engine.score_ids(ids, path), dtype=torch.float64)
        own = expected[range(len(path)), path]
        return _off(whole, expected[0]) + _off(scored, own)


def _compare(
    model: Any, exported: _Exported, rows: int, probes: Sequence[Sequence[int]], kind: str, stripped: list[str]
) -> Checked:
    if not probes or not all(probes):
        raise RunError("an export is checked on prompts, and there is none, or an empty one; give some")
    tolerance = _TOLERANCE[kind]
    differences: list[float] = []
    equal = ties = 0
    for probe in probes:
        ids = [int(i) for i in probe]
        with eval_mode(model):
            path, expected = _greedy(model, ids, rows)
        differences += exported.differences(ids, path, expected)
        answer = exported.greedy(ids)
        length = min(len(path), len(answer))
        place = next((i for i in range(length) if path[i] != answer[i]), length)
        equal += place
        if place < length:
            margin = float(expected[place, path[place]] - expected[place, answer[place]])
            if margin > 2 * tolerance:
                raise RunError(
                    f"the {kind} export answers a prompt of {len(ids)} tokens with {answer[: place + 1]}, and the "
                    f"trained model with {path[: place + 1]}, by {margin:.3g} nats (at most {2 * tolerance}); "
                    "use a wider number format"
                )
            ties += 1
        elif len(answer) > len(path):
            raise RunError(
                f"the {kind} export goes on after token {path[-1]}, where the trained model stops; make that token the "
                "tokenizer's EOS token"
            )
    largest = max(differences)
    if not largest <= tolerance:
        raise RunError(
            f"the {kind} export differs from what was trained: log-probabilities by up to {largest:.3g} nats (at most "
            f"{tolerance}); use a wider number format"
        )
    return Checked(
        format=kind,
        prompts=len(probes),
        log_probs=len(differences),
        largest_difference=largest,
        tolerance=tolerance,
        greedy_tokens=equal,
        near_ties=ties,
        stripped=stripped,
    )


def _greedy(model: Any, ids: list[int], rows: int) -> tuple[list[int], Tensor]:
    """The most likely continuation, and log-probabilities [tokens, rows] at each of its tokens, float64."""
    path: list[int] = []
    ends = model.generation_config.eos_token_id
    stops = set(ends) if isinstance(ends, list) else {ends}
    with torch.no_grad():
        output = model(torch.tensor([ids], device=model.device), use_cache=True)
        while len(path) < _GREEDY_TOKENS and not stops.intersection(path):
            path.append(int(output.logits[0, -1, :rows].argmax()))
            output = model(
                torch.tensor([path[-1:]], device=model.device), past_key_values=output.past_key_values, use_cache=True
            )
    return path, _along(model, ids, path, rows)


def _along(model: Any, ids: list[int], path: list[int], rows: int) -> Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids + path], device=model.device), use_cache=False).logits
    log_probs: Tensor = logits[0, len(ids) - 1 : -1, :rows].double().log_softmax(-1).cpu()
    return log_probs


def _off(found: Tensor, expected: Tensor) -> list[float]:
    difference = (found.clamp(min=_FLOOR) - expected.clamp(min=_FLOOR)).abs()
    values: list[float] = difference.flatten().tolist()
    return values
