"""Students that are not cut from the teacher: random ones, small models that exist, and adapters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from attar.engines.local import load_local
from attar.errors import CapabilityError, RecipeError, require
from attar.students.shrink import changed_config, copy_model

__all__ = ["add_lora", "existing_model", "fresh_model"]


def fresh_model(model: Any, *, seed: int, **sizes: int) -> Any:
    """A student of the teacher's architecture with random weights.

    Args:
        model: the teacher; only its config is read.
        seed: same seed, same weights. The global generator is left as it was.
        sizes: keys of the config (hidden_size, num_hidden_layers, ...) and their values; all others are the teacher's.
            A list with one entry for each layer is cut to fewer layers, or, where all are equal, goes on for more.

    Raises:
        RecipeError: the config has no such key, or refuses a size.
    """
    settings = model.config.to_dict()
    aliases = model.config.attribute_map
    if unknown := [key for key in sizes if aliases.get(key, key) not in settings]:
        known = [key for key, value in settings.items() if type(value) is int and not key.endswith("_token_id")]
        raise RecipeError(f"{type(model.config).__name__} has no {unknown[0]}; its sizes: {', '.join(known)}")
    total = model.config.num_hidden_layers
    layers = sizes.get("num_hidden_layers", total)
    lists: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, list) and len(value) == total != layers:
            if layers > total and any(entry != value[0] for entry in value):
                raise RecipeError(
                    f"{key} differs among the teacher's {total} layers, and {layers} are wanted; use fewer"
                )
            lists[key] = (value + value[-1:] * (layers - total))[:layers]
    config = changed_config(model, {**lists, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    return student.to(model.device).eval()


def existing_model(name: str, *, dtype: str = "auto", device: torch.device) -> tuple[Any, Any]:
    """A small model that exists, ``hf:FOLDER-or-NAME`` or ``hf:FILE.gguf``, trainable, and its tokenizer.

    Raises:
        ModelError: there is no causal language model at that place.
    """
    engine = load_local(name, dtype=dtype, device=device)
    return engine.model.requires_grad_(True), engine.tokenizer


def add_lora(
    model: Any, *, r: int, alpha: float, targets: str | Sequence[str] = "all-linear", dropout: float = 0.0, seed: int
) -> Any:
    """A copy of a model with low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685), of which these alone train.

    Args:
        model: a plain ``transformers`` model.
        r: rank.
        alpha: an adapter's output is multiplied by alpha / r.
        targets: names of the layers to adapt; ``all-linear`` for every linear one but the head.
        dropout: on an adapter's input.
        seed: of the adapters' first weights; they change no output before training.

    Raises:
        MissingExtra: ``peft`` is not installed.
        CapabilityError: the head or the embeddings are to be adapted, or there is no such layer.
    """
    peft = require("peft", "lora")
    plain = copy_model(model)
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
    )
    tables = [plain.get_input_embeddings(), plain.get_output_embeddings()]
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        # PEFT asks transformers for a name that it has renamed.
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        try:
            adapted = peft.get_peft_model(plain, config)
        except ValueError as error:
            raise CapabilityError(f"{type(plain).__name__} cannot be adapted at {targets}: {error}") from error
    base = adapted.get_base_model()
    if [base.get_input_embeddings(), base.get_output_embeddings()] != tables:
        raise CapabilityError(
            f"targets: {targets} adapts the embeddings or the head of {type(base).__name__}, whose logits are computed "
            "outside it in training; use all-linear"
        )
    return adapted
