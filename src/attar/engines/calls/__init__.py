"""Calls of tools in what local models write: read, and held to a form and a schema."""

from attar.engines.calls.forms import Form, form_of
from attar.engines.calls.reader import THINK, THOUGHT, Delta, Reader, read_message

__all__ = ["CALL", "THINK", "THOUGHT", "Delta", "Form", "Reader", "form_of", "read_message"]

CALL = "<tool_call>"
"""what opens a call in the form of Hermes and Qwen"""
