"""llama.cpp in this process as a chat engine: a tiny model of random weights."""

import pytest

from attar.data.types import Message
from attar.engines.base import Answer, ChatEngine, ChatRequest
from attar.engines.load import load_chat_teacher
from attar.recipe import parse_recipe
from attar.students import gguf_file
from lm import make_model, make_tokenizer


def test_it_continues_conversations_and_its_ledger_knows_the_file_not_the_port(tmp_path):
    pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")
    gguf_file.write_gguf(make_model(), make_tokenizer(), tmp_path / "tiny.gguf")
    (tmp_path / "rows.jsonl").write_text("{}")
    recipe = parse_recipe(
        {
            "name": "tiny",
            "task": "classify",
            "data": {"labels": ["a", "b"], "pool": "rows.jsonl", "dev": "rows.jsonl", "test": "rows.jsonl"},
            "teacher": {"model": f"gguf:{tmp_path / 'tiny.gguf'}", "prompts": [{"template": "{{ text }}"}]},
            "run": {"folder": "run", "threads": 1},
        },
        "test",
        tmp_path,
    )
    requests = [
        ChatRequest((Message("user", "turn off the lamp"),), 4, temperature=0.0, top_logprobs=3),
        ChatRequest((Message("user", "play it at seven"),), 4, temperature=0.0),
    ]
    made = load_chat_teacher(recipe)
    assert isinstance(made, ChatEngine)
    first = dict(made.chat(requests))
    assert all(isinstance(answer, Answer) and answer.usd == 0.0 for answer in first.values())
    assert [len(token.top) for token in first[0].top_logprobs] == [3] * first[0].completion_tokens
    again = load_chat_teacher(recipe)
    assert again.model.address != made.model.address
    assert dict(again.chat(requests)) == first
    assert again._engine.ledger.spend().calls == 2
