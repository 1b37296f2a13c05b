"""Tokenizers of the families of chat templates, and an episode that calls tools."""

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from attar.data.conversations import parse_conversation

FOLDER = Path(__file__).parent / "fixtures" / "templates"
# Of each: its end of turn, its BOS, and the other control tokens; those in the second list are not special.
TOKENS = {
    "chatml": ("<|im_end|>", "<|im_start|>", ["<|endoftext|>"], []),
    "llama3": (
        "<|eot_id|>",
        "<|begin_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"],
        [],
    ),
    "qwen3": (
        "<|im_end|>",
        "<|endoftext|>",
        ["<|im_start|>"],
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"],
    ),
    "gemma": ("<end_of_turn>", "<bos>", ["<start_of_turn>", "<eos>"], []),
    "mistral": (
        "</s>",
        "<s>",
        ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
         "[/TOOL_RESULTS]"],
        [],
    ),
    "hermes": ("<|im_end|>", "<|begin_of_text|>", ["<|im_start|>"], ["<tool_call>", "</tool_call>"]),
}  # fmt: skip
FAMILIES = tuple(TOKENS)


@cache
def tokenizer(family):
    """A byte-level tokenizer with the family's tokens and its template."""
    end, bos, special, plain = TOKENS[family]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(
        ['it is cold in Oslo "name": weather', "the weather in Bergen, assistant user"] * 9, trainer
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in [end, bos, *special]])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=end, pad_token=end)
    made.chat_template = (FOLDER / f"{family}.jinja").read_text("utf-8")
    return made


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}


def call(number, town):
    function = {"name": "weather", "arguments": {"town": town}}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def result(number, text):
    return {"role": "tool", "tool_call_id": f"call0000{number}", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Where is it colder, Oslo or Bergen?"}


def talk(*, system=True, parallel=True, after=True):
    """Reasoning, calls beside text, results, reasoning and an answer; and then another question."""
    calls = [call(1, "Oslo"), call(2, "Bergen")] if parallel else [call(1, "Oslo")]
    rows = [
        QUESTION,
        {"role": "assistant", "content": "I look.", "reasoning_content": "Ask the tool.", "tool_calls": calls},
        *[result(1 + n, text) for n, text in enumerate(["-3 SECRET", "4 SECRET"][: len(calls)])],
        {"role": "assistant", "content": "Oslo.", "reasoning_content": "-3 is less."},
    ]
    if after:
        rows += [{"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "Bye."}]
    return parse_conversation({"messages": [SYSTEM] * system + rows, "tools": [WEATHER]})
