"""The only place that renders and tokenises: prompts, conversations, and which of their tokens are learned."""

from attar.tokens.conversations import (
    TokenizedExample,
    encode_conversation,
    encode_conversations,
    encode_request,
    highlight,
    template_fingerprint,
)
from attar.tokens.prompts import encode_plain, encode_prompt, prompt_text, render_prompt

__all__ = [
    "TokenizedExample",
    "encode_conversation",
    "encode_conversations",
    "encode_plain",
    "encode_prompt",
    "encode_request",
    "highlight",
    "prompt_text",
    "render_prompt",
    "template_fingerprint",
]
