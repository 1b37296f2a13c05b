"""The list of terms, and the gate that reads it."""

import re
from datetime import date

import pytest
import yaml

from attar.preflight import terms_gate
from attar.terms import known_terms, terms_of
from curating import chat, talks


def test_every_entry_is_dated_sourced_and_can_be_found():
    listed, entries = known_terms()
    assert date.fromisoformat(listed)
    assert len({entry.name for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.use in ("free", "conditional", "restricted")
        assert entry.source.startswith("https://")
        assert date.fromisoformat(entry.read) <= date.fromisoformat(listed)
        assert entry.says
        assert entry.about
        assert entry.engines or entry.models or entry.licences
        assert all(re.compile(pattern) for pattern in entry.models)
        assert all(licence == licence.casefold() for licence in entry.licences)


@pytest.mark.parametrize(
    ("model", "licence", "use"),
    [
        ("openai:gpt-4o", None, "restricted"),
        ("openai:whatever-comes-next", None, "restricted"),
        ("anthropic:claude-sonnet-4", None, "restricted"),
        ("openai:gemini-2.0-flash", None, "restricted"),
        ("hf:models/gpt-oss-20b", None, "free"),
        ("hf:/data/Llama-2-7b-chat-hf", None, "restricted"),
        ("hf:meta-llama/Meta-Llama-3-8B", None, "restricted"),
        ("hf:meta-llama/Llama-3.1-8B-Instruct", None, "conditional"),
        ("hf:Llama-3.3-70B", "Apache-2.0", "conditional"),
        ("gguf:/x/llama-3-2-1b-q4.gguf", None, "conditional"),
        ("hf:google/gemma-2-9b", None, "conditional"),
        ("hf:google/gemma-7b-it", None, "conditional"),
        ("hf:google/gemma-4-12b", None, "free"),
        ("hf:Qwen/Qwen2.5-72B-Instruct", None, "conditional"),
        ("hf:Qwen/Qwen3-8B", "apache-2.0", "free"),
        ("hf:Qwen/Qwen3-8B", None, "unknown"),
        ("hf:deepseek-ai/DeepSeek-R1", "MIT", "free"),
        ("hf:deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "MIT", "conditional"),
        ("hf:mine", "CC-BY-NC-4.0", "conditional"),
        ("hf:/home/claude/models/mine", None, "unknown"),
        ("hf:SmolLM2-135M-Instruct", "Apache-2.0", "free"),
        ("fakes:Keyword", None, "unknown"),
    ],
)
def test_a_teacher_is_told_by_engine_name_and_licence(model, licence, use):
    assert terms_of(model, licence).use == use


def test_an_openai_client_elsewhere_is_told_by_the_model_alone():
    assert terms_of("openai:mine", elsewhere=True).use == "unknown"
    assert terms_of("openai:gpt-4o", elsewhere=True).use == "restricted"


def recipe_of(folder, **teacher):
    recipe = chat(folder, talks(3))
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"licence": None} | teacher)})


@pytest.mark.parametrize(
    ("teacher", "level", "words"),
    [
        ({"model": "openai:gpt-4o"}, "refuse", "set teacher.terms: acknowledged"),
        ({"model": "openai:gpt-4o", "terms": "acknowledged"}, "warn", r"\(acknowledged\)"),
        ({"model": "hf:Llama-3.1-8B"}, "warn", "must have a name that begins with Llama"),
        ({"model": "hf:x", "licence": "Apache-2.0"}, "ok", "no condition"),
        ({"model": "hf:x"}, "warn", "unknown terms: .*state teacher.licence"),
        ({"model": "hf:x", "licence": "Homegrown"}, "warn", "unknown terms: .*Read them. A reminder, no legal advice"),
    ],
)
def test_the_gate(tmp_path, teacher, level, words):
    finding = terms_gate(recipe_of(tmp_path, **teacher))
    assert finding.level == level
    assert re.search(words, finding.message)


def test_acknowledging_is_the_one_thing_that_can_be_said(tmp_path):
    content = recipe_of(tmp_path).dump()
    content["teacher"]["terms"] = "yes"
    from attar.errors import RecipeError
    from attar.recipe import parse_recipe

    with pytest.raises(RecipeError, match=r"teacher.terms: 'yes' is not allowed"):
        parse_recipe(yaml.safe_load(yaml.safe_dump(content)), "recipe")
