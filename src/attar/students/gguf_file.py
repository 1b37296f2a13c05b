"""Write a student as a GGUF file that llama.cpp runs: matrices in F16, vectors in F32."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attar.engines.gguf_tokenizer import pre_name
from attar.errors import CapabilityError
from attar.students.shrink import weights

__all__ = ["write_gguf"]

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_LARGEST = float(np.finfo(np.float16).max)


def write_gguf(model: Any, tokenizer: Any, path: Path) -> None:
    """Write a model and its tokenizer; rows of the head beyond the tokenizer's ids are left out.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 causal language model, without adapters.
        tokenizer: a byte-level BPE.
        path: the file.

    Raises:
        CapabilityError: llama.cpp, as far as is known here, cannot run this architecture, setting or tokenizer.
    """
    config = model.config
    _check(model)
    architecture = _ARCHITECTURES[config.model_type]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pre = pre_name(tokenizer)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(size)
        writer.add_value_length(size)
        writer.add_rope_dimension_count(size)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        rows = _add_tokenizer(writer, tokenizer, pre)
        writer.add_vocab_size(rows)
        _add_tensors(writer, model, architecture, size, rows)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _check(model: Any) -> None:
    config = model.config
    name = f"{type(model).__name__} ({config.model_type})"
    if config.model_type not in _ARCHITECTURES:
        raise CapabilityError(
            f"{name} cannot be written to GGUF; known here are {', '.join(_ARCHITECTURES)}; export safetensors instead"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    rope = config.rope_parameters["rope_type"]
    settings = {
        "hidden_act": (config.hidden_act, config.hidden_act == "silu"),
        "rope_type": (rope, rope in ("default", "llama3")),
        "layer_types": (sorted(kinds), not kinds),
        # Qwen2 and Qwen3 say by layer_types which layers have a window.
        "sliding_window": (
            getattr(config, "sliding_window", None),
            config.model_type != "mistral" or config.sliding_window is None,
        ),
    }
    for key, (value, fits) in settings.items():
        if not fits:
            raise CapabilityError(
                f"{name} with {key}: {value} cannot be written to GGUF here; export safetensors instead"
            )


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, pre: str) -> int:
    """Write the tokenizer and give its number of rows."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    rows = max(vocabulary.values()) + 1
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [gguf.TokenType.UNUSED] * rows
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for i, added in tokenizer.added_tokens_decoder.items():
        types[i] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_add_space_prefix(False)
    around = tokenizer("a", add_special_tokens=True).input_ids, tokenizer("a", add_special_tokens=False).input_ids
    before, after = [[tokenizer.bos_token_id], []], [[tokenizer.eos_token_id], []]
    frames = [(b, a) for b in before for a in after if [*b, *around[1], *a] == around[0]]
    if not frames:
        raise CapabilityError(
            f"the tokenizer puts {tokenizer.convert_ids_to_tokens(around[0])} for 'a'; GGUF knows a BOS token before "
            "and an EOS token after a text alone; export safetensors instead"
        )
    writer.add_add_bos_token(bool(frames[-1][0]))
    writer.add_add_eos_token(bool(frames[-1][1]))
    for identifier, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if identifier is not None:
            add(identifier)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    return rows


def _add_tensors(writer: gguf.GGUFWriter, model: Any, architecture: Any, size: int, rows: int) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tables = {model.get_input_embeddings().weight.data_ptr(), model.get_output_embeddings().weight.data_ptr()}
    for name, tensor in weights(model).items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise CapabilityError(f"{name} of {type(model).__name__} has no name in GGUF; export safetensors instead")
        part = name.split(".")[-2]
        values = tensor[:rows] if tensor.data_ptr() in tables else tensor
        if architecture is gguf.MODEL_ARCH.LLAMA and part in heads:
            values = _interleave(values, heads[part])
        writer.add_tensor(target, _stored(name, values))
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config.rope_parameters, size))


def _interleave(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's llama rotates neighbouring rows of a head, transformers' the two halves: rows are put in that order.

    Args:
        rows: [heads * size, ...].
        heads: how many.
    """
    return rows.view(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _stored(name: str, tensor: Tensor) -> npt.NDArray[Any]:
    values = tensor.detach().to("cpu", torch.float32)
    if values.dim() == 1:
        return values.numpy()
    largest = float(values.abs().max())
    if not largest <= _LARGEST:
        raise CapabilityError(f"{name} holds {largest:.3g}, above F16's {_LARGEST:.0f}; export safetensors instead")
    return values.to(torch.float16).numpy()


def _llama3_factors(rope: dict[str, Any], size: int) -> npt.NDArray[np.float32]:
    """By how much each frequency is divided: as transformers computes rope_type llama3."""
    factors = []
    for i in range(0, size, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / size)
        turns = rope["original_max_position_embeddings"] / length
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)
