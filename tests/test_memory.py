"""The memory formula: sizes as of a real model, activations as autograd keeps them, moments by hand."""

import dataclasses

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from attar.train.memory import Decoder, estimate

CONFIG = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def llama(layers, tied=True):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG, num_hidden_layers=layers, tie_word_embeddings=tied))


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tied):
    model = llama(3, tied)
    assert Decoder.from_config(model.config).parameters == sum(p.numel() for p in model.parameters())


def test_a_model_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"GPT2Config has no intermediate_size"):
        Decoder.from_config(GPT2Config())


def kept_by_autograd(model, rows, length):
    """Bytes of the tensors that a forward pass saves, each storage once, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.model(input_ids=torch.randint(0, 96, (rows, length)), use_cache=False).last_hidden_state
    del out
    return sum(nbytes for nbytes, _ in saved.values())


def test_activations_of_a_layer_are_what_autograd_keeps():
    rows, length = 2, 16
    measured = kept_by_autograd(llama(3), rows, length) - kept_by_autograd(llama(2), rows, length)
    sizes = [Decoder.from_config(llama(layers).config) for layers in (2, 3)]
    # Without supervised tokens, so that what the two differ by is the layer.
    estimates = [estimate(s, tokens=rows * length, supervised=0).activations for s in sizes]
    assert estimates[1] - estimates[0] == measured


SIZES = Decoder(layers=2, width=8, inner_width=16, heads=2, key_heads=2, head_width=4, vocabulary=1000, tied=True)


def test_the_moments_by_hand():
    parameters = 2 * (4 * 8 * 8 + 3 * 8 * 16 + 2 * 8) + 1000 * 8 + 8
    assert SIZES.parameters == parameters
    # Of one token in chunks of one, the update is most: all gradients, and the tied table's second one.
    update = estimate(SIZES, tokens=1, supervised=1, chunk_tokens=1)
    assert (update.moment, update.optimiser, update.weights) == ("update", 8 * parameters, 4 * parameters)
    assert (update.gradients, update.loss) == (4 * parameters + 4 * 8000, 0)
    # 11 bytes for each of a chunk's logits: 4 of its own, and seven times 4 of a quarter of it.
    loss = estimate(SIZES, tokens=64, supervised=64, chunk_tokens=64)
    assert (loss.moment, loss.gradients, loss.loss) == ("loss", 0, 4 * 64 * 8 + 4 * 8000 + 11 * 64 * 1000)


def test_what_is_trained_alone_has_gradients_and_means():
    whole, adapters = (estimate(SIZES, tokens=4, supervised=1, trained=t) for t in (None, 100))
    assert adapters.optimiser == 800
    assert whole.optimiser == 8 * SIZES.parameters
    assert adapters.weights == whole.weights


def test_shards_divide_and_copies_do_not():
    big = dataclasses.replace(SIZES, layers=64)
    one = estimate(big, tokens=4, supervised=1)
    shared = estimate(big, tokens=4, supervised=1, processes=8, sharded=True)
    copies = estimate(big, tokens=4, supervised=1, processes=8)
    assert shared.optimiser == one.optimiser // 8
    assert copies.optimiser == one.optimiser
    assert copies.total - one.total == 4 * big.parameters  # DDP's buckets


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"tokens": 0}, "tokens is 0; wanted at least 1"), ({"supervised": 9}, "supervised is 9; wanted 0 to the 4")],
)
def test_numbers_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        estimate(SIZES, **{"tokens": 4, "supervised": 1} | wrong)
