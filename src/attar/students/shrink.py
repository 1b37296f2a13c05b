"""From a teacher to a smaller student: a model of the same class with other sizes, and fewer layers.

A student shares no memory with its teacher, which is never changed; only what the student keeps is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from attar.engines.heads import eval_mode, hidden_states
from attar.errors import CapabilityError, RecipeError

__all__ = [
    "Batch",
    "LayerChoice",
    "block_influence",
    "changed_config",
    "choose_layers",
    "copy_model",
    "decoder_layers",
    "derive",
    "keep_layers",
    "real_tokens",
    "weights",
]

Batch = Mapping[str, Tensor]
"""input_ids [sequences, length] and, where sequences are padded, attention_mask, on the model's device."""

LayerChoice = Literal["even", "first", "alternate", "block_influence"]

# What a layer may hold that differs by its place alone.
_PLACE = {"layer_idx", "layer_id", "layer_number", "block_idx"}


def weights(model: Any) -> dict[str, Tensor]:
    """The parameters and saved buffers of a model by name, tied ones once."""
    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in saved}


def changed_config(model: Any, changes: Mapping[str, Any]) -> Any:
    """A model's config with other values; the model's stays as it is.

    Raises:
        RecipeError: the config's class refuses them.
    """
    settings = model.config.to_dict()
    # Weights in memory are plain, whatever file they were read from.
    settings.pop("quantization_config", None)
    aliases = model.config.attribute_map
    try:
        config = type(model.config).from_dict({**settings, **{aliases.get(k, k): v for k, v in changes.items()}})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise RecipeError(f"{type(model.config).__name__} refuses {dict(changes)}: {error}") from error
    config._attn_implementation = model.config._attn_implementation
    return config


def derive(model: Any, changes: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> Any:
    """A model of the same class with other sizes and the given weights, in eval mode, all parameters trainable.

    Args:
        model: a ``transformers`` causal language model.
        changes: keys of its config and their new values.
        tensors: every parameter and saved buffer of the new model, tied ones once; what shares memory with ``model``
            is copied.

    Raises:
        CapabilityError: the model is no plain one, or its class needs other weights than these at these sizes.
        RecipeError: the class refuses the sizes.
    """
    name = type(model).__name__
    if hasattr(model, "peft_config") or not hasattr(model, "config"):
        raise CapabilityError(f"{name} is no plain transformers model; merge its adapters first")
    if model.config.get_text_config() is not model.config:
        raise CapabilityError(f"{name} holds more than a language model; use its text model")
    odd = next((key for key, parameter in model.named_parameters() if not parameter.is_floating_point()), None)
    if odd is not None:
        raise CapabilityError(f"{odd} of {name} is quantised; load the model with plain weights")
    config = changed_config(model, changes)
    with no_init_weights():
        student = type(model)._from_config(config, dtype=model.dtype).to(model.device)
    student.tie_weights()
    storages = {tensor.untyped_storage().data_ptr() for tensor in weights(model).values()}
    expected = weights(student)
    given: dict[str, Tensor] = {}
    for key, tensor in tensors:
        if key not in expected or expected[key].shape != tensor.shape:
            wanted = tuple(expected[key].shape) if key in expected else "no such weight"
            raise CapabilityError(f"{name} with {dict(changes)}: {key} is {tuple(tensor.shape)}, wanted: {wanted}")
        own = tensor.detach()
        given[key] = own.clone() if own.untyped_storage().data_ptr() in storages else own.contiguous()
    if missing := expected.keys() - given.keys():
        raise CapabilityError(f"{name} with {dict(changes)} has a weight {min(missing)}, which the teacher has not")
    del expected
    student.load_state_dict(given, strict=False, assign=True)
    student.tie_weights()
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()


def copy_model(model: Any) -> Any:
    """A model that is equal and shares no memory."""
    return derive(model, {}, weights(model).items())


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of a decoder's layers, and its name in the model.

    Raises:
        CapabilityError: there is no such list, or more than one.
    """
    total = model.config.get_text_config().num_hidden_layers
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [(name, module) for name, module in found if len(module) == total]
    # A layer may itself hold a list as long as this one (experts).
    outer = [(name, m) for name, m in found if not any(name.startswith(f"{other}.") for other, _ in found)]
    if len(outer) != 1:
        raise CapabilityError(
            f"{type(model).__name__} has {len(outer)} lists of {total} layers ({', '.join(n for n, _ in outer)}), and "
            "one is wanted; its layers cannot be chosen"
        )
    return outer[0]


def choose_layers(model: Any, keep: int, how: LayerChoice, batches: Iterable[Batch] = ()) -> list[int]:
    """Which layers of a teacher a student keeps.

    ``even`` spreads them from the first to the last. ``alternate`` takes one of every n, the first of each n in the
    lower half and the last in the upper half: for every second of 12 layers 0, 2, 4, 7, 9, 11, as DistilBERT's
    training code does (Sanh et al. 2019, arXiv:1910.01108). ``block_influence`` takes those of the largest influence.

    Args:
        model: the teacher.
        keep: how many, 1 to as many as there are.
        how: the way to choose.
        batches: what ``block_influence`` is measured on; unused, and wanted empty, otherwise.

    Returns:
        Indices, ascending.

    Raises:
        RecipeError: that many cannot be kept in this way.
    """
    total = len(decoder_layers(model)[1])
    if not 1 <= keep <= total:
        raise RecipeError(f"{keep} layers are to be kept, and the teacher has {total}; keep 1 to {total}")
    if how == "block_influence":
        influence = block_influence(model, batches)
        return sorted(influence.argsort(descending=True, stable=True)[:keep].tolist())
    if list(batches):
        raise RecipeError(f"choosing layers by {how} uses no batches; give none, or choose by block_influence")
    if how == "first":
        return list(range(keep))
    if how == "even":
        return [round(i * (total - 1) / max(keep - 1, 1)) for i in range(keep)]
    if total % keep:
        raise RecipeError(f"alternate takes one of every n layers, and {keep} is no divisor of {total}; use even")
    stride = total // keep
    return [stride * i + (0 if 2 * i < keep else stride - 1) for i in range(keep)]


def block_influence(model: Any, batches: Iterable[Batch]) -> Tensor:
    """How much each layer changes the direction of a token's state: 1 - cos(input, output), its mean over tokens.

    ShortGPT (Men et al. 2024, arXiv:2403.03853) calls it Block Influence and drops the layers that have the least.

    Args:
        model: the teacher.
        batches: tokens to measure on; padding does not count.

    Returns:
        [layers], float64, 0 to 2.

    Raises:
        RecipeError: there is no token.
    """
    layers = decoder_layers(model)[1]
    sums = torch.zeros(len(layers), dtype=torch.float64)
    tokens = 0
    real: Tensor

    def watch(index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            del layer
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines = nn.functional.cosine_similarity(before[real].double(), after[real].double(), dim=-1)
            sums[index] += float((1 - cosines).sum())

        return hook

    hooks = [layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
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
        raise RecipeError("the influence of layers is measured on tokens, and the batches hold none; give some text")
    return sums / tokens


def real_tokens(batch: Batch) -> Tensor:
    """Which tokens are no padding: [sequences, length], bool."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def keep_layers(model: Any, layers: Sequence[int]) -> Any:
    """A student that has these layers of a teacher, and everything else.

    Args:
        model: the teacher.
        layers: indices, ascending.

    Raises:
        RecipeError: the indices are not ascending, or not those of layers.
        CapabilityError: the class builds a layer by its place so that it would not be the teacher's any more.
    """
    prefix, teacher_layers = decoder_layers(model)
    total = len(teacher_layers)
    if not layers or sorted(set(layers)) != list(layers) or not 0 <= layers[0] <= layers[-1] < total:
        raise RecipeError(f"layers {list(layers)} are to be kept; wanted ascending indices from 0 to {total - 1}")
    place = {f"{prefix}.{old}": f"{prefix}.{new}" for new, old in enumerate(layers)}
    parts = prefix.count(".") + 2

    def kept() -> Iterable[tuple[str, Tensor]]:
        for name, tensor in weights(model).items():
            words = name.split(".")
            layer = ".".join(words[:parts])
            if not name.startswith(f"{prefix}."):
                yield name, tensor
            elif layer in place:
                yield ".".join([place[layer], *words[parts:]]), tensor

    changes: dict[str, Any] = {
        key: [value[i] for i in layers]
        for key, value in model.config.to_dict().items()
        if isinstance(value, list) and len(value) == total
    }
    changes["num_hidden_layers"] = len(layers)
    student = derive(model, changes, kept())
    for new, old in enumerate(layers):
        _check_same(type(model).__name__, teacher_layers[old], decoder_layers(student)[1][new])
    return student


def _check_same(name: str, teacher: nn.Module, student: nn.Module) -> None:
    """Two layers must not differ in a setting (a window, a scale, a missing rotation) that their class derives."""
    for (path, a), (_, b) in zip(teacher.named_modules(), student.named_modules(), strict=True):
        for key, value in vars(a).items():
            if key in _PLACE or key.startswith("_") or key == "training":
                continue
            if isinstance(value, (int, float, str, bool, type(None))) and vars(b).get(key) != value:
                raise CapabilityError(
                    f"a layer of {name} is built by its place: {path}.{key} is {value!r} in the teacher and "
                    f"{vars(b).get(key)!r} in the student; keep all layers"
                )
