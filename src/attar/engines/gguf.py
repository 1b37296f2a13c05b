"""llama.cpp in this process, through ``xllamacpp``: what a GGUF file answers where it will be served.

It is fed with token ids from our tokenizer. Its server, which the binding cannot do without, listens on this machine
only, at a port of its own.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader

from attar.data.types import Prompt
from attar.engines.base import Capability, Completion, Scores, Written
from attar.engines.continuations import encode_continuations
from attar.engines.gguf_tokenizer import read_tokenizer
from attar.errors import ModelError, RunError, require
from attar.tokens import encode_plain, encode_prompt

__all__ = ["GgufEngine", "Written", "load_gguf"]

# Added to a logit, so that greedy choice takes this token; the log-probabilities reported are of the logits without it.
_FORCE = 1e4
# llama.cpp's logarithm of a probability that has no float32.
_NO_LOGARITHM = -1e30
# Cut differently by every known pre-tokenizer.
_PROBE = "It's 2024:  5 cats\n\n\tand 12345.67 more, WE'LL see\u00e9 \U0001f600  \n end"


def load_gguf(
    model: str, *, tokenizer: Any = None, context_tokens: int | None = None, threads: int | None = None
) -> GgufEngine:
    """Load ``gguf:FILE``.

    Args:
        model: the file, with or without ``gguf:``.
        tokenizer: the one that the model was trained with; None for the one in the file.
        context_tokens: length of prompt and answer together; None for what the model was made for.
        threads: on the CPU; None for llama.cpp's own choice.

    Raises:
        MissingExtra: ``xllamacpp`` is not installed.
        ModelError: there is no such model, or its tokens are not the tokenizer's.
        CapabilityError: the file's tokenizer is of a kind that is not known here, and none is given.
    """
    llama = require("xllamacpp", "gguf")
    path = Path(model.removeprefix("gguf:")).expanduser()
    if not path.is_file():
        raise ModelError(f"{model}: {path} is no file")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ModelError(f"{model} is no GGUF file ({error})") from error
    fields = reader.fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    own = read_tokenizer(fields) if tokenizer is None else tokenizer
    if different := [(i, token) for token, i in own.get_vocab().items() if i >= len(tokens) or tokens[i] != token]:
        number, token = min(different)
        there = repr(tokens[number]) if number < len(tokens) else f"none (it has {len(tokens)})"
        raise ModelError(
            f"{model}: token {number} of the tokenizer is {token!r} and the file's is {there}; "
            "name the tokenizer that the model was trained with"
        )
    if context_tokens is None:
        architecture = fields["general.architecture"].contents()
        context_tokens = int(fields[f"{architecture}.context_length"].contents())
    parameters = llama.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = context_tokens
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = -1
    # It would shrink the context without a word.
    parameters.fit_params = False
    if threads is not None:
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    try:
        server = llama.Server(parameters)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"llama.cpp cannot load {model} ({error}); it needs a newer xllamacpp, or another file"
        ) from error
    size = sum(int(tensor.n_elements) for tensor in reader.tensors)
    engine = GgufEngine(server, own, context_tokens=context_tokens, parameters=size)
    # A server that is dropped before its thread serves waits for that thread for ever; after one answer it serves.
    engine.write([0], 1)
    if tokenizer is None and (theirs := engine.tokenize(_PROBE)) != (ours := encode_plain(own, _PROBE)):
        raise ModelError(
            f"{model}: {_PROBE!r} is {theirs} in llama.cpp and {ours} here; name the folder of its tokenizer"
        )
    return engine


class GgufEngine:
    """A GGUF model and its tokenizer.

    Args:
        server: of ``xllamacpp``, with one slot.
        tokenizer: of the same tokens.
        context_tokens: the server's.
        parameters: of the model.
    """

    def __init__(self, server: Any, tokenizer: Any, *, context_tokens: int, parameters: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = context_tokens
        """length of the longest prompt with its answer, in tokens"""
        self.parameters = parameters
        self._server = server
        vocabulary = tokenizer.get_vocab()
        self._rows = max(vocabulary.values()) + 1
        self._whole = next(i for token, i in vocabulary.items() if token.isascii() and token.isalpha())

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Text and log-probabilities of given continuations."""
        return frozenset({"text", "scores"})

    @property
    def address(self) -> str:
        """Where its server listens, on this machine only."""
        return str(self._server.listening_address)

    def complete(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """Continue each prompt greedily."""
        completions = []
        for prompt in prompts:
            ids = encode_prompt(self.tokenizer, prompt)
            written = self.write(ids, max_tokens)
            text = self.tokenizer.decode(written.ids, skip_special_tokens=True)
            completions.append(Completion(text, "stop" if written.stopped else "length", len(ids), len(written.ids)))
        return completions

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> Scores:
        """Score every continuation after every prompt; see ``encode_continuations``."""
        branches = encode_continuations(self.tokenizer, prompts, continuations)
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        log_probs = np.empty((len(prompts), len(continuations)), dtype=np.float32)
        for row, ids in enumerate(encoded):
            known: dict[tuple[int, ...], float] = {}
            for column, branch in enumerate(branches):
                log_probs[row, column] = sum(self._score(ids, branch, known))
        return Scores(
            log_probs, np.array([len(branch) for branch in branches]), np.array([len(ids) for ids in encoded])
        )

    def write(self, ids: Sequence[int], max_tokens: int, *, measured: bool = False) -> Written:
        """Continue token ids greedily.

        Args:
            ids: the prompt.
            max_tokens: how many to write at most.
            measured: for timings: write exactly so many, none of them an end, and compute the whole prompt, whatever
                of it was computed for the one before.

        Raises:
            RunError: the context is full before ``max_tokens`` are written, or llama.cpp refuses.
        """
        options = {"ignore_eos": True, "cache_prompt": False} if measured else {}
        answer = self._ask(ids, n_predict=max_tokens, return_tokens=True, verbose=True, **options)
        written = Written(
            [int(i) for i in answer["__verbose"]["tokens"]],
            self._reason(answer) == "stop",
            float(answer["__verbose"]["timings"]["prompt_ms"]),
        )
        if not written.stopped and len(written.ids) < max_tokens:
            raise RunError(
                f"{len(ids)} tokens of prompt leave room for {len(written.ids)}, and {max_tokens} are to be written; "
                f"the context has {self.max_tokens} tokens, load the model with more context_tokens"
            )
        return written

    def score_ids(self, ids: Sequence[int], continuation: Sequence[int]) -> list[float]:
        """Log-probability of each token of a continuation of token ids."""
        return self._score(ids, continuation, {})

    def distribution(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Log-probabilities [vocabulary] of what follows token ids; slow, for checks."""
        answer = self._ask(ids, n_predict=1, n_probs=self._rows, logit_bias=[[self._whole, _FORCE]])
        table = np.full(self._rows, np.nan)
        for entry in self._first(answer)["top_logprobs"]:
            table[entry["id"]] = entry["logprob"]
        if np.isnan(table).any():
            raise RunError(f"llama.cpp gave no log-probability for {int(np.isnan(table).sum())} of {self._rows} tokens")
        return table

    def tokenize(self, text: str) -> list[int]:
        """What llama.cpp's own tokenizer makes of a text in which nothing is a control token."""
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(f"{self.address}/tokenize", body, {"Content-Type": "application/json"})
        # This machine, whatever proxy the environment names.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
            return [int(i) for i in json.load(response)["tokens"]]

    def _score(self, ids: Sequence[int], branch: Sequence[int], known: dict[tuple[int, ...], float]) -> list[float]:
        values = []
        for end, token in enumerate(branch):
            key = tuple(branch[: end + 1])
            if key not in known:
                known[key] = self._score_token([*ids, *branch[:end]], token)
            values.append(known[key])
        return values

    def _score_token(self, ids: list[int], token: int) -> float:
        answer = self._ask(ids, n_predict=1, n_probs=1, logit_bias=[[token, _FORCE]])
        if answer["choices"][0]["logprobs"] is None:
            # llama.cpp reports nothing for a token that ends inside a character.
            value = float(self.distribution(ids)[token])
        else:
            first = self._first(answer)
            if first["id"] != token:
                raise RunError(f"llama.cpp was to take token {token} and took {first['id']}; its scores cannot be read")
            value = float(first["logprob"])
        if value < _NO_LOGARITHM:
            raise RunError(f"token {token} has a probability below what llama.cpp can report; leave it out")
        return value

    def _ask(self, ids: Sequence[int], **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._server.handle_completions(
            {"prompt": list(ids), "temperature": 0, "cache_prompt": True, **options}
        )
        if "error" in answer:
            raise RunError(f"llama.cpp refuses a prompt of {len(ids)} tokens: {answer['error']['message']}")
        return answer

    @staticmethod
    def _reason(answer: dict[str, Any]) -> str:
        return str(answer["choices"][0]["finish_reason"])

    @staticmethod
    def _first(answer: dict[str, Any]) -> dict[str, Any]:
        first: dict[str, Any] = answer["choices"][0]["logprobs"]["content"][0]
        return first
