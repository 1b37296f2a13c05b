"""Know a causal language model's head: what turns the state of its last layer into logits.

Losses need the two apart, so that [tokens, vocabulary] is never built. What lies between them differs by architecture;
``check_head`` proves on the model itself that nothing was missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import CapabilityError
from attar.losses.terms import Head

__all__ = ["check_head", "decoder_path", "eval_mode", "head_of", "hidden_states", "plain_model"]

# Largest difference of logits, as a share of the largest logit, between the model and its head on the same states.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# The size to which the probe's logits are scaled: a cap or a bend shows at large logits only.
_LARGE = 100.0
_PROBE = "The 3 quick foxes, jumping over it: 1 + 2 = 3!"


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def plain_model(model: Any) -> Any:
    """The Hugging Face model inside a PEFT model, with its adapters in place; any other model as it is.

    Raises:
        CapabilityError: the adapter is a prompt that is put before the input, which has no place in the model itself.
    """
    if not hasattr(model, "peft_config"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise CapabilityError(
            f"the adapter is {type(model.active_peft_config).__name__}, which learns a prompt; use LoRA"
        )
    return model.get_base_model()


def head_of(model: Any, tokenizer: Any = None) -> Head:
    """The output head of a causal language model. It shares the model's weights, and their gradients.

    Args:
        model: a ``transformers`` causal language model, or a PEFT model around one.
        tokenizer: gives the true size of the vocabulary where the head has padding rows; None where it has none.

    Raises:
        CapabilityError: the model shows no head, or one that is adapted, quantised, or smaller than the vocabulary.
    """
    plain = plain_model(model)
    name = type(plain).__name__
    layer = plain.get_output_embeddings()
    if layer is None:
        raise CapabilityError(
            f"{name} shows no output embeddings; use a causal language model, such as LlamaForCausalLM"
        )
    if not isinstance(layer, nn.Linear) or hasattr(layer, "base_layer") or not layer.weight.is_floating_point():
        raise CapabilityError(
            f"the head of {name} is {type(layer).__name__} with {getattr(layer, 'weight', None).__class__.__name__} "
            "weights, and a plain linear layer is wanted; leave it out of the adapter's target_modules and "
            "modules_to_save, and out of quantisation"
        )
    rows = len(layer.weight)
    vocabulary = rows if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
    if vocabulary > rows:
        raise CapabilityError(
            f"the tokenizer has ids up to {vocabulary - 1} and the head of {name} {rows} rows; use the model's own "
            "tokenizer, or resize_token_embeddings"
        )
    config = plain.config.get_text_config()
    scale = 1.0
    for key, power in (("logit_scale", 1), ("logits_scaling", -1), ("lm_head_multiplier", 1)):
        value = getattr(config, key, None)
        if value is not None:
            scale *= float(value) ** power
    return Head(
        layer.weight,
        layer.bias,
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
        vocabulary=vocabulary,
    )


def hidden_states(model: Any, **inputs: Any) -> Tensor:
    """The states at the head's input.

    Args:
        model: as for ``head_of``.
        inputs: what the model's forward takes: input_ids [batch, length], attention_mask, ...

    Returns:
        [batch, length, width]
    """
    decoder = plain_model(model).get_decoder()
    states: Tensor = decoder(**{"use_cache": False, **inputs}).last_hidden_state
    return states


def decoder_path(model: Any) -> str:
    """The dotted path of the part of ``plain_model(model)`` that ``hidden_states`` calls: "model" of most."""
    plain = plain_model(model)
    decoder = plain.get_decoder()
    path: str = next(name for name, module in plain.named_modules() if module is decoder)
    return path


def check_head(model: Any, tokenizer: Any) -> float:
    """Prove on a short input that the head of ``hidden_states`` gives the model's own logits.

    It compares twice: the states with what the model gives to its head, and, with these states scaled until logits
    reach 100, the model's logits with the head's. So a scale, a cap or a bend that the head does not know shows.

    Args:
        model: as for ``head_of``.
        tokenizer: the model's; padding rows are not compared.

    Returns:
        The largest difference of logits, as a share of the largest logit.

    Raises:
        CapabilityError: they differ by more than the rounding of the model's number format.
    """
    head = head_of(model, tokenizer)
    plain = plain_model(model)
    name = type(plain).__name__
    ids = tokenizer(_PROBE, add_special_tokens=False).input_ids
    inputs = {"input_ids": torch.tensor([ids], device=head.weight.device)}
    seen: list[Tensor] = []
    with eval_mode(model):
        states = hidden_states(model, **inputs)
        scale = _LARGE / float(_unscaled(head, states).abs().max())

        def enlarge(layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            del layer
            seen.append(args[0])
            return (args[0] * scale,)

        hook = plain.get_output_embeddings().register_forward_pre_hook(enlarge)
        try:
            logits = model(**inputs, use_cache=False).logits[0]
        finally:
            hook.remove()
        if len(seen) != 1 or seen[0].shape != states.shape:
            raise CapabilityError(
                f"{name} calls its head {len(seen)} times, with states {[tuple(s.shape) for s in seen]}; wanted once "
                f"with {tuple(states.shape)}: its logits cannot be taken apart"
            )
        expected = head.logits(seen[0][0] * scale)
    tolerance = _TOLERANCE[states.dtype]
    state_difference = _relative(states, seen[0])
    logit_difference = _relative(expected, logits[:, : head.size])
    if not max(state_difference, logit_difference) <= tolerance:
        raise CapabilityError(
            f"the head found in {name} does not give its logits: states differ by {state_difference:.3g} and logits by "
            f"{logit_difference:.3g} of the largest, at most {tolerance} wanted in {states.dtype}; this architecture "
            "has a transformation that attar does not know, use another model"
        )
    return logit_difference


def _unscaled(head: Head, states: Tensor) -> Tensor:
    """Logits before the cap, whose largest says how far states may be scaled."""
    return head.scale * nn.functional.linear(states.float(), head.weight[: head.size].float())


def _relative(value: Tensor, wanted: Tensor) -> float:
    return float((value.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30))
