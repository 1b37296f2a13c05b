"""Narrow a teacher: keep the channels, neurons and attention heads that its activations say matter.

After Minitron (Muralidharan et al. 2024, arXiv:2407.14679): importance is read from the activations on a few
calibration batches, without gradients. Aggregation over tokens is the mean of absolute values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attar.engines.heads import eval_mode, hidden_states
from attar.errors import CapabilityError, RecipeError
from attar.students.shrink import Batch, derive, real_tokens, weights

__all__ = ["Importance", "Widths", "measure_importance", "narrow"]

# RMSNorm, a gated MLP, and grouped attention with separate projections.
_ARCHITECTURES = {"llama", "mistral", "qwen2", "qwen3"}


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How much of what passes through a model goes through each part of it, on calibration tokens."""

    channels: Tensor
    """[hidden size]: of the residual stream, mean absolute output of the norms, summed over all norms"""
    neurons: Tensor
    """[layers, intermediate size]: mean absolute input of down_proj"""
    heads: Tensor
    """[layers, heads]: mean length of a head's output, the input of o_proj"""


@dataclass(frozen=True, kw_only=True)
class Widths:
    """A student's sizes; None keeps the teacher's."""

    hidden: int | None = None
    intermediate: int | None = None
    heads: int | None = None
    """query heads, a multiple of ``kv_heads`` and at most as many for each as in the teacher"""
    kv_heads: int | None = None


def measure_importance(model: Any, batches: Iterable[Batch]) -> Importance:
    """Read the importance of a teacher's parts from its activations.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 causal language model.
        batches: tokens to measure on; padding does not count.

    Raises:
        CapabilityError: the architecture is another one.
        RecipeError: there is no token.
    """
    _check_architecture(model)
    config, decoder = model.config, model.get_decoder()
    channels = torch.zeros(config.hidden_size, dtype=torch.float64)
    neurons = torch.zeros(config.num_hidden_layers, config.intermediate_size, dtype=torch.float64)
    heads = torch.zeros(config.num_hidden_layers, config.num_attention_heads, dtype=torch.float64)
    tokens = 0
    real: Tensor

    def add(into: Tensor, measure: Callable[[Tensor], Tensor], output: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
            del module
            into.add_(measure((result if output else args[0])[real].double()).sum(0).cpu())

        return hook

    hooks = [decoder.norm.register_forward_hook(add(channels, Tensor.abs, output=True))]
    for i, layer in enumerate(decoder.layers):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            hooks.append(norm.register_forward_hook(add(channels, Tensor.abs, output=True)))
        hooks.append(layer.mlp.down_proj.register_forward_hook(add(neurons[i], Tensor.abs, output=False)))
        hooks.append(
            layer.self_attn.o_proj.register_forward_hook(
                add(heads[i], lambda x: x.view(len(x), heads.shape[1], -1).norm(dim=-1), output=False)
            )
        )
    try:
        with eval_mode(model):
            for batch in batches:
                real = real_tokens(batch)
                tokens += int(real.sum())
                hidden_states(model, **batch)
    finally:
        for handle in hooks:
            handle.remove()
    if not tokens:
        raise RecipeError("importance is measured on tokens, and the batches hold none; give some text")
    return Importance(channels=channels / tokens, neurons=neurons / tokens, heads=heads / tokens)


def narrow(model: Any, importance: Importance, widths: Widths) -> Any:
    """A student that keeps the most important parts of a teacher, in the teacher's order.

    Channels are the same in embeddings, norms, projections and head; neurons and heads are chosen in each layer. Key
    and value heads go with the query heads that share them: the groups of largest summed importance stay, and in each
    its most important query heads.

    Args:
        model: the teacher.
        importance: of its parts.
        widths: the student's sizes. A head's size stays the teacher's.

    Raises:
        CapabilityError: the architecture is none of those that can be narrowed.
        RecipeError: a size is above the teacher's, or heads do not divide.
    """
    _check_architecture(model)
    config = model.config
    size = config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    hidden = _at_most("hidden", widths.hidden, config.hidden_size)
    intermediate = _at_most("intermediate", widths.intermediate, config.intermediate_size)
    heads = _at_most("heads", widths.heads, config.num_attention_heads)
    kv_heads = _at_most("kv_heads", widths.kv_heads, config.num_key_value_heads)
    if heads % kv_heads or heads // kv_heads > group:
        raise RecipeError(
            f"{heads} heads for {kv_heads} key-value heads: wanted a multiple of these, at most {group} for each as in "
            "the teacher; set both heads and kv_heads"
        )
    channels = _top(importance.channels, hidden)
    # Rows and columns that a module keeps; None for all.
    cuts: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "embed_tokens": (None, channels),
        "norm": (channels, None),
        "lm_head": (None, channels),
    }
    for i in range(config.num_hidden_layers):
        grouped = importance.heads[i].view(config.num_key_value_heads, group)
        groups = _top(grouped.sum(1), kv_heads)
        queries = _spread(torch.cat([group * g + _top(grouped[g], heads // kv_heads) for g in groups]), size)
        keys = _spread(groups, size)
        neurons = _top(importance.neurons[i], intermediate)
        layer = f"layers.{i}"
        cuts |= {f"{layer}.{name}_layernorm": (channels, None) for name in ("input", "post_attention")}
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            cuts[f"{layer}.self_attn.{name}_proj"] = (rows, channels)
        cuts[f"{layer}.self_attn.o_proj"] = (channels, queries)
        cuts |= {f"{layer}.self_attn.{name}_norm": (None, None) for name in ("q", "k")}
        cuts |= {f"{layer}.mlp.{name}_proj": (neurons, channels) for name in ("gate", "up")}
        cuts[f"{layer}.mlp.down_proj"] = (channels, neurons)

    def kept() -> Iterable[tuple[str, Tensor]]:
        for name, tensor in weights(model).items():
            rows, columns = cuts[name.removeprefix("model.").rpartition(".")[0]]
            part = tensor if rows is None else tensor.index_select(0, rows.to(tensor.device))
            if columns is not None and part.dim() == 2:
                part = part.index_select(1, columns.to(tensor.device))
            yield name, part

    changes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
    }
    return derive(model, changes, kept())


def _check_architecture(model: Any) -> None:
    kind = model.config.model_type
    if kind not in _ARCHITECTURES:
        raise CapabilityError(
            f"{type(model).__name__} ({kind}) cannot be narrowed; use a teacher of "
            f"{', '.join(sorted(_ARCHITECTURES))}, or keep fewer layers"
        )


def _at_most(name: str, value: int | None, most: int) -> int:
    if value is None:
        return most
    if not 1 <= value <= most:
        raise RecipeError(f"{name} is {value}; wanted 1 to the teacher's {most}")
    return value


def _top(importance: Tensor, keep: int) -> Tensor:
    """The indices of the largest, ascending; of equals the first."""
    return importance.argsort(descending=True, stable=True)[:keep].sort().values


def _spread(heads: Tensor, size: int) -> Tensor:
    """The rows of these heads in a projection."""
    return (size * heads[:, None] + torch.arange(size)).flatten()
