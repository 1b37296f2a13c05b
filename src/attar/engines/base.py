"""What answers: one protocol for an HTTP API, a model in this process, a trained classifier, a scripted fake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from attar.data.types import Prompt
from attar.errors import CapabilityError

__all__ = ["Capability", "Completion", "Engine", "Scores", "Written", "need"]

Capability = Literal["text", "top_logprobs", "scores", "prompt_top_logprobs", "logits", "hidden", "embed"]


@dataclass(frozen=True)
class Completion:
    """What an engine wrote after a prompt."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of continuations after prompts."""

    log_probs: npt.NDArray[np.float32]
    """[prompts, continuations], natural logarithm, summed over the tokens of each continuation"""
    tokens: npt.NDArray[np.int64]
    """[continuations], number of tokens of each"""
    prompt_tokens: npt.NDArray[np.int64]
    """[prompts], number of tokens of each, shared prefix included"""


@dataclass(frozen=True)
class Written:
    """What an engine wrote after token ids."""

    ids: list[int]
    """the token that ended it included"""
    stopped: bool
    """whether such a token ended it, and not the limit"""
    first_token_ms: float
    """from the request to the first of them"""


@runtime_checkable
class Engine(Protocol):
    """Anything that answers. A user's own class, named ``package.module:Class`` in the recipe, does the same."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this engine can give."""

    @property
    def parameters(self) -> int | None:
        """Number of parameters of the model behind it, where it is known."""

    def complete(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """Write the most likely continuation of each prompt, at most ``max_tokens`` tokens."""

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> Scores:
        """Log-probabilities of the same continuations after each prompt."""


def need(engine: Engine, capability: Capability, purpose: str) -> None:
    """Refuse an engine that cannot do what is asked of it.

    Raises:
        CapabilityError: names the capability, the purpose and what the engine has.
    """
    if capability not in engine.capabilities:
        have = ", ".join(sorted(engine.capabilities)) or "nothing"
        raise CapabilityError(
            f"{purpose} needs {capability!r}, which {type(engine).__name__} cannot give (it gives: {have}); "
            "use another teacher, such as hf:FOLDER"
        )
