"""The only place that renders and tokenises: prompts, conversations, and which of their tokens are learned."""

from attar.tokens.conversations import (
    encode_conversation,
    encode_conversations,
    encode_request,
    template_fingerprint,
)
from attar.tokens.examples import KINDS, Kind, LossWeights, TokenizedExample, highlight, spans
from attar.tokens.policies import Reasoning, with_reasoning, without_failures
from attar.tokens.prompts import encode_plain, encode_prompt, prompt_text, render_prompt
from attar.tokens.pruning import PrunedPrompt, PrunedRequest, find_static
from attar.tokens.tooling import ToolReady, knows_tools, with_tools

__all__ = [
    "KINDS",
    "Kind",
    "LossWeights",
    "PrunedPrompt",
    "PrunedRequest",
    "Reasoning",
    "TokenizedExample",
    "ToolReady",
    "encode_conversation",
    "encode_conversations",
    "encode_plain",
    "encode_prompt",
    "encode_request",
    "find_static",
    "highlight",
    "knows_tools",
    "prompt_text",
    "render_prompt",
    "spans",
    "template_fingerprint",
    "with_reasoning",
    "with_tools",
    "without_failures",
]
