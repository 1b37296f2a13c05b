"""Tiny language models from configs, and a byte-level BPE, for tests of students and exports."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LINES = [
    "turn off the lamp please",
    "play it   at seven",
    "don't wake me, it's cold",
    "the lamp, the milk and bread",
]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def make_tokenizer(pre=None, **options):
    backend = Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES * 3, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    return tokenizer


def make_model(name="Llama", seed=0, **changes):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{"vocab_size": 400, **SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        # Norms and biases start at 1 and 0, where some faults do not show.
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(torch.as_tensor(ids).view(1, -1)).logits[0]


def storages(model):
    return {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
