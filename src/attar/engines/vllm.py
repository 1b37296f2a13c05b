"""vLLM in this process, ``vllm:FOLDER``: the weights of ``hf:FOLDER``, by an engine made for many requests on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from attar.engines.base import Answer, Capability, ChatRequest, Failure, blocks
from attar.engines.calls import THINK, read_message
from attar.engines.served import PromptLimits, PromptTop, read_prompt_top
from attar.errors import CapabilityError, DataError, ModelError, require
from attar.tokens import encode_request

__all__ = ["VllmTeacher", "load_vllm"]

# Requests that are handed to vLLM together; it makes batches of its own of them.
_TOGETHER = 256


def load_vllm(model: str, *, dtype: str = "auto") -> VllmTeacher:
    """Load ``vllm:FOLDER``.

    Raises:
        MissingExtra: vLLM is not installed.
        ModelError: there is no model in that folder that vLLM can load.
    """
    folder = Path(model.removeprefix("vllm:")).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"teacher.model: {folder} is no folder with a model; name one with config.json, as vllm:FOLDER"
        )
    # A process of its own for the engine would outlive a worker that is killed.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    vllm = require("vllm", "vllm")
    try:
        # What a prompt's probabilities are must not depend on what was asked before.
        engine = vllm.LLM(
            str(folder), dtype=dtype, max_logprobs=-1, logprobs_mode="raw_logprobs", enable_prefix_caching=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{model} is no model that vLLM can load here ({first_line})") from error
    return VllmTeacher(vllm, engine, name=model)


class VllmTeacher:
    """A causal language model in vLLM.

    Args:
        vllm: the module.
        engine: its ``LLM``, made with ``max_logprobs=-1``.
        name: of the model, for people.
    """

    def __init__(self, vllm: Any, engine: Any, *, name: str) -> None:
        self._vllm, self._engine, self.name = vllm, engine, name
        self._tokenizer = engine.get_tokenizer()
        self.vocabulary = int(max(self._tokenizer.get_vocab().values())) + 1
        """size of the tokenizer's, the head's padding rows not counted"""
        self.limits = PromptLimits(kinds=("top_k",), temperature=1.0, layers=False, entries=self.vocabulary)
        self.max_tokens: int | None = engine.llm_engine.model_config.max_model_len

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Text, and the likeliest tokens at given positions."""
        return frozenset({"text", "prompt_top_logprobs"})

    @property
    def parameters(self) -> None:
        """VLLM does not say."""
        return None

    def prompt_top(self, ids: Sequence[int], places: Sequence[int], entries: int) -> PromptTop:
        """The likeliest tokens at some positions of a prompt; see :meth:`prompt_tops`."""
        return self.prompt_tops([(ids, places)], entries)[0]

    def prompt_tops(self, asked: Sequence[tuple[Sequence[int], Sequence[int]]], entries: int) -> list[PromptTop]:
        """The likeliest tokens at some positions of prompts, each after all that stands before it.

        Args:
            asked: token ids, and positions from 1: nothing comes before the first token.
            entries: how many.

        Raises:
            RunError: what comes back are no log-probabilities, or not as many.
        """
        wanted = min(entries, self.vocabulary)
        parameters = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=wanted, detokenize=False)
        prompts = [{"prompt_token_ids": [int(i) for i in ids]} for ids, _ in asked]
        outputs = self._engine.generate(prompts, parameters, use_tqdm=False)
        return [
            read_prompt_top(self.name, self.vocabulary, list(ids), places, wanted, _as_served(output))
            for (ids, places), output in zip(asked, outputs, strict=True)
        ]

    def chat(self, requests: Iterable[ChatRequest | None]) -> Iterator[tuple[int, Answer | Failure]]:
        """Answer requests, in batches of vLLM's own; see :class:`attar.engines.base.ChatEngine`.

        What a request leaves open is as vLLM reads the model's ``generation_config``.

        Raises:
            CapabilityError: a request asks for tools, a schema or log-probabilities.
        """
        for block in blocks(requests, _TOGETHER):
            asked = []
            for index, request in block:
                prompt = self._prompt(request)
                if isinstance(prompt, Failure):
                    yield index, prompt
                else:
                    asked.append((index, request, prompt))
            # vLLM takes no empty list.
            if not asked:
                continue
            outputs = self._engine.generate(
                [{"prompt_token_ids": prompt} for _, _, prompt in asked],
                [self._parameters(request, prompt) for _, request, prompt in asked],
                use_tqdm=False,
            )
            for (index, _, prompt), output in zip(asked, outputs, strict=True):
                yield index, self._read(prompt, output.outputs[0])

    def _prompt(self, request: ChatRequest) -> list[int] | Failure:
        """Token ids of what is asked, made here: vLLM would take a user's words for control tokens."""
        if request.tools or request.schema is not None or request.top_logprobs is not None:
            raise CapabilityError(
                f"{self.name} in this process gives text alone, and a request asks for tools, a schema or "
                "top_logprobs; serve it (vllm serve) and name it openai:NAME with teacher.base_url"
            )
        try:
            prompt = encode_request(self._tokenizer, request.messages)
        except DataError as error:
            return Failure("bad request", str(error), final=True, usd=0.0)
        if self.max_tokens is not None and len(prompt) >= self.max_tokens:
            detail = f"a prompt of {len(prompt)} tokens, and the model reads {self.max_tokens}"
            return Failure("bad request", detail, final=True, usd=0.0)
        return prompt

    def _parameters(self, request: ChatRequest, prompt: Sequence[int]) -> Any:
        room = request.max_tokens if self.max_tokens is None else min(request.max_tokens, self.max_tokens - len(prompt))
        settings = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
        own = self._engine.llm_engine.model_config.get_diff_sampling_param()
        stated = {name: value for name, value in settings.items() if value is not None}
        return self._vllm.SamplingParams(**own | stated | {"max_tokens": room, "stop": list(request.stop)})

    def _read(self, prompt: Sequence[int], made: Any) -> Answer:
        cut = made.finish_reason == "length"
        thinking = str(self._tokenizer.decode(prompt[-8:])).rstrip().endswith(THINK)
        return Answer(
            message=read_message(made.text, None, thinking=thinking, cut=cut),
            finish_reason="length" if cut else "stop",
            prompt_tokens=len(prompt),
            completion_tokens=len(made.token_ids),
            cached_tokens=0,
            model=self.name,
            usd=0.0,
        )


def _as_served(output: Any) -> dict[str, Any]:
    """The same as vLLM's server writes it."""
    rows = [
        None
        if row is None
        else {
            str(token): {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}
            for token, entry in row.items()
        }
        for row in output.prompt_logprobs
    ]
    ids = list(output.prompt_token_ids)
    return {
        "choices": [{"prompt_logprobs": rows, "prompt_token_ids": ids}],
        "usage": {"prompt_tokens": len(ids)},
    }
