"""vLLM in this process, ``vllm:FOLDER``: the weights of ``hf:FOLDER``, by an engine made for many requests on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from attar.data.types import Message
from attar.engines.base import Answer, Capability, ChatRequest, Failure, blocks
from attar.engines.served import PromptLimits, PromptTop, read_prompt_top
from attar.errors import CapabilityError, ModelError, require

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
        self.vocabulary = int(max(engine.get_tokenizer().get_vocab().values())) + 1
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

        Raises:
            CapabilityError: a request asks for tools, a schema or log-probabilities.
        """
        for block in blocks(requests, _TOGETHER):
            parameters = [self._parameters(request) for _, request in block]
            conversations = [[message.wire for message in request.messages] for _, request in block]
            for (index, _), output in zip(
                block, self._engine.chat(conversations, parameters, use_tqdm=False), strict=True
            ):
                made = output.outputs[0]
                yield (
                    index,
                    Answer(
                        message=Message("assistant", made.text),
                        finish_reason="length" if made.finish_reason == "length" else "stop",
                        prompt_tokens=len(output.prompt_token_ids),
                        completion_tokens=len(made.token_ids),
                        cached_tokens=0,
                        model=self.name,
                        usd=0.0,
                    ),
                )

    def _parameters(self, request: ChatRequest) -> Any:
        if request.tools or request.schema is not None or request.top_logprobs is not None:
            raise CapabilityError(
                f"{self.name} in this process gives text alone, and a request asks for tools, a schema or "
                "top_logprobs; serve it (vllm serve) and name it openai:NAME with teacher.base_url"
            )
        settings = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
        return self._vllm.SamplingParams(
            max_tokens=request.max_tokens,
            stop=list(request.stop),
            **{name: value for name, value in settings.items() if value is not None},
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
