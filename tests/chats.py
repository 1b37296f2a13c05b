"""Chat templates of the kinds in use, small tokenizers to go with them, and conversations to render."""

import copy
import random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from attar.data.conversations import parse_conversation
from attar.tokens import encode_conversation, highlight

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin|>", "<|header|>", "<|/header|>", "<|eot|>", "<|eom|>",
    "<|python|>", "<bos>", "<eos>", "<turn>", "</turn>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]",
    "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>",
]  # fmt: skip
NOT_SPECIAL = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<table>"]

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Trims content, writes the BOS itself, calls one tool at a time behind <|python|> and ends such a turn with <|eom|>.
LLAMA = (
    "{{ bos_token }}"
    "{% if tools %}<|header|>system<|/header|>\n\n{{ tools | tojson(indent=1) }}<|eot|>{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|header|>ipython<|/header|>\n\n{{ m.content | tojson }}<|eot|>"
    "{% elif m.tool_calls %}<|header|>assistant<|/header|>\n\n<|python|>"
    "{{ {'name': m.tool_calls[0].function.name, 'parameters': m.tool_calls[0].function.arguments} | tojson }}<|eom|>"
    "{% else %}{{ '<|header|>' + m.role + '<|/header|>\n\n' + m.content | trim + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)

# Keeps the reasoning of answers since the last question only, takes it out of content if it stands there, and opens an
# empty one in the last answer.
QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\nCall one within <tool_call></tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, open=true) %}
{%- for m in messages[::-1] %}
    {%- set i = messages | length - 1 - loop.index0 %}
    {%- if ns.open and m.role == 'user' and not (m.content.startswith('<tool_response>') and
        m.content.endswith('</tool_response>')) %}{%- set ns.open = false %}{%- set ns.last = i %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role in ['user', 'system'] %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set content = m.content %}{%- set reasoning = '' %}
        {%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {%- if call.function.arguments is string %}{{- call.function.arguments }}
            {%- else %}{{- call.function.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '</turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)

# No generation prompt; the system's text and the tools stand before the last question, so they move.
MISTRAL = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}[TOOLS] {{ tools | tojson }}[/TOOLS]{% endif %}"
    "[INST] {{ system + '\n\n' if system and loop.index0 == ns.last else '' }}{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ {'content': m.content} | tojson }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)

# Ends the text when no answer is wanted.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)

# The last answer ends otherwise than earlier ones.
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant"
    "{% if m.reasoning_content and loop.last %}<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>"
    "<|start|>assistant{% endif %}<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

# Asks with an opened reasoning, and never writes one.
R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}<eos>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)

# Writes the arguments as they come, which must be a string.
JSON_ARGUMENTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + ' ' + c.function.arguments }}</tool_call>"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_WORDS = "hi hello there you what is the weather in Oslo it is cold 3 degrees ok fine user assistant system".split()


def byte_level(template, in_vocabulary=(), **options):
    """A byte-level BPE whose own BOS must not come before what a template writes.

    Special tokens stand behind the vocabulary (Qwen, Llama), except those that are to be in it (SmolLM2, Gemma).
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(in_vocabulary),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _finish(backend, trainer, template, **options)


def metaspace(template, **options):
    """A BPE with a space before every word, as SentencePiece makes them."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=list("▁abcdefghijklmnopqrstuvwxyzO<|>_[]/{}\":,.?!'0123456789"),
        show_progress=False,
    )
    return _finish(backend, trainer, template, **options)


def _finish(backend, trainer, template, bos="<bos>", eos="<eos>", rstrip=()):
    rng = random.Random(0)
    backend.train_from_iterator([" ".join(rng.choices(_WORDS, k=8)) for _ in range(100)], trainer)
    backend.add_special_tokens([AddedToken(token, special=True, rstrip=token in rstrip) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


TEMPLATES = {
    "chatml": CHATML,
    "marked": CHATML_MARKED,
    "llama": LLAMA,
    "qwen": QWEN,
    "gemma": GEMMA,
    "mistral": MISTRAL,
}
TOKENIZERS = {name: byte_level(template) for name, template in TEMPLATES.items()}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "is it cold in Oslo?"},
    {"role": "assistant", "content": "it is 3 degrees"},
]
CALL = {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": {"place": "Oslo", "n": 3}}}
TOOL_TALK = [
    {"role": "user", "content": "is it cold in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a1", "content": "3 degrees"},
    {"role": "assistant", "content": "it is cold"},
]


def encode(tokenizer, messages, tools=(), max_tokens=10_000, **options):
    row = {"messages": messages, "tools": list(tools)}
    return encode_conversation(tokenizer, parse_conversation(row), max_tokens=max_tokens, **options)


def learned(tokenizer, example):
    """The stretches of text that are learned."""
    return [text for text, supervised in highlight(tokenizer, example) if supervised]


def theirs(tokenizer, messages, tools=()):
    """Token ids as transformers makes them."""
    return tokenizer.apply_chat_template(messages, tools=list(tools) or None, return_dict=False)


# what ends an answer in each of TOKENIZERS
ENDS = {
    "chatml": "<|im_end|>",
    "marked": "<|im_end|>",
    "llama": "<|eot|>",
    "qwen": "<|im_end|>",
    "gemma": "</turn>",
    "mistral": "<eos>",
}
