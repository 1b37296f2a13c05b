"""models/ -> export/: language models as they are served, checked against what was trained."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attar.engines.load import served
from attar.errors import CapabilityError
from attar.recipe import ChatRecipe
from attar.students.export_lm import export_gguf, export_safetensors
from attar.students.language import load_teacher_model
from attar.tokens.pruning import FILE as PRUNED
from attar.tokens.training import encode, run_conversations
from attar.workspace import Run

__all__ = ["export"]

_PROBES = 3
_PROBE_TOKENS = 64


def export(recipe: ChatRecipe, run: Run) -> dict[str, Any]:
    """Write every arm as safetensors and, where the recipe wants it, as GGUF; the teacher as GGUF, for its speed.

    Raises:
        RunError: an export answers differently from the trained model, beyond the tolerance of its number format.
    """
    arms = [("base", 0), *((arm, seed) for arm in ("control", "student") for seed in recipe.train.seeds)]
    checks: dict[str, Any] = {}
    for arm, seed in arms:
        source, target = (run.path(top, arm, f"seed-{seed}") for top in ("models", "export"))
        gguf = target / "model.gguf"
        if target.exists() and (gguf.exists() or not recipe.export.gguf):
            continue
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, recipe.student.dtype)).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
        probes = _probes(recipe, run, tokenizer)
        checked = f"{arm}/seed-{seed}"
        checks[checked] = [
            export_safetensors(model, tokenizer, target, dtype=recipe.export.dtype, probes=probes).as_dict()
        ]
        for name in ("kept.json", PRUNED):
            if (source / name).is_file():
                shutil.copy(source / name, target)
        if recipe.export.gguf:
            checks[checked].append(export_gguf(model, tokenizer, gguf, probes=probes).as_dict())
    # An agent's arms are measured as they act, not in llama.cpp alone.
    if recipe.export.gguf and recipe.task == "chat" and not served(recipe):
        checks |= _teacher(recipe, run)
    return {"checks": checks}


def _teacher(recipe: ChatRecipe, run: Run) -> dict[str, Any]:
    path = run.path("export", "teacher", "seed-0", "model.gguf")
    if path.exists():
        return {}
    model, tokenizer = load_teacher_model(recipe)
    try:
        return {"teacher": [export_gguf(model, tokenizer, path, probes=_probes(recipe, run, tokenizer)).as_dict()]}
    except CapabilityError as error:
        run.progress.note(f"  the teacher is not measured in llama.cpp: {error}")
        return {}


def _probes(recipe: ChatRecipe, run: Run, tokenizer: Any) -> list[list[int]]:
    examples = encode(recipe, tokenizer, run_conversations(recipe, run, "val")[:_PROBES])[0]
    return [example.ids[:_PROBE_TOKENS].tolist() for example in examples]
