import types

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from attar.engines.heads import check_head, eval_mode, head_of, hidden_states
from attar.errors import CapabilityError

# PEFT asks transformers for a name that it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

VOCABULARY = 300
SIZES = {
    "vocab_size": 304,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
EXTRA = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "Cohere": {"logit_scale": 0.0625},
    "Granite": {"logits_scaling": 8.0},
    "GPT2": {"tie_word_embeddings": True},
    "GPTNeoX": {},
    "Phi": {},
    "Qwen3Moe": MOE,
}


@pytest.fixture(scope="module")
def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, *(f"<{i}>" for i in range(VOCABULARY - len(letters)))])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def make(name, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **EXTRA[name], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        # Norms and biases start at 1 and 0, where some faults do not show.
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", EXTRA)
def test_head_and_states_give_the_models_logits(name, tokenizer):
    model = make(name)
    ids = torch.randint(0, VOCABULARY, (2, 9))
    states, head = hidden_states(model, input_ids=ids), head_of(model, tokenizer)
    expected = model(ids).logits.detach()
    assert expected.shape[-1] > VOCABULARY == head.size
    torch.testing.assert_close(
        head.logits(states.flatten(0, 1)).detach(), expected[..., :VOCABULARY].flatten(0, 1), rtol=1e-5, atol=1e-5
    )
    assert check_head(model, tokenizer) < 1e-5


def test_what_each_architecture_does_to_logits_is_read_from_its_config(tokenizer):
    found = {name: head_of(make(name), tokenizer) for name in ("Llama", "Gemma2", "Cohere", "Granite", "Phi")}
    assert [(h.scale, h.softcap, h.bias is not None) for h in found.values()] == [
        (1.0, None, False),
        (1.0, 5.0, False),
        (0.0625, None, False),
        (0.125, None, False),
        (1.0, None, True),
    ]


def test_without_a_tokenizer_every_row_counts():
    assert head_of(make("Llama")).size == 304


def test_gradients_reach_the_model_through_its_head():
    model = make("Llama", tie_word_embeddings=True)
    head_of(model).logits(hidden_states(model, input_ids=torch.tensor([[5, 6]]))[0]).sum().backward()
    assert model.get_input_embeddings().weight.grad is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.01,
        lambda logits: 30 * torch.tanh(logits / 30),
        lambda logits: logits + logits**2 / 1e4,
    ],
    ids=["scale", "cap", "bend"],
)
def test_an_unknown_transformation_of_logits_never_passes(change, tokenizer):
    # Weights near 0: logits are so small that a cap changes none of them by more than rounding.
    model = make("Llama")
    model.lm_head.weight.data *= 1e-3
    forward = model.forward

    def changed(self, *args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = types.MethodType(changed, model)
    with pytest.raises(CapabilityError, match=r"head found in LlamaForCausalLM .* logits by [0-9.e-]+ of the largest"):
        check_head(model, tokenizer)


def test_an_unknown_transformation_of_states_never_passes(tokenizer):
    model = make("Llama")
    decoder = model.model
    forward = decoder.forward
    calls = []

    def second_call_differs(*args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append(1)
        output.last_hidden_state = output.last_hidden_state * (1 if len(calls) == 1 else 1.01)
        return output

    decoder.forward = second_call_differs
    with pytest.raises(CapabilityError, match=r"states differ by 0\.0099"):
        check_head(model, tokenizer)


def test_half_precision_has_its_own_tolerance(tokenizer):
    assert 0 < check_head(make("Cohere", logit_scale=0.07).bfloat16(), tokenizer) < 3e-2


def test_the_probe_leaves_the_model_as_it_was(tokenizer):
    model = make("Llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    check_head(model, tokenizer)
    assert model.training
    assert not model.model.layers[0].training
    assert not model.lm_head._forward_pre_hooks
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        1 / int(torch.is_grad_enabled())
    assert model.training


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tokenizer):
    with pytest.raises(CapabilityError, match="ids up to 299 and the head of LlamaForCausalLM 256 rows"):
        head_of(make("Llama", vocab_size=256), tokenizer)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(CapabilityError, match="LlamaModel shows no output embeddings"):
        head_of(make("Llama").model)


peft = pytest.importorskip("peft", reason="peft is not installed")


def lora(model, **options):
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    )
    return adapted.eval()


def test_lora_elsewhere_is_part_of_the_states(tokenizer):
    plain = make("Llama")
    ids = torch.randint(0, VOCABULARY, (1, 7))
    before = plain(ids).logits.detach()
    model = lora(plain, target_modules="all-linear")
    head, states = head_of(model, tokenizer), hidden_states(model, input_ids=ids)
    logits = head.logits(states[0]).detach()
    torch.testing.assert_close(logits, model(ids).logits[0, :, :VOCABULARY].detach(), rtol=1e-5, atol=1e-5)
    assert (logits - before[0, :, :VOCABULARY]).abs().max() > 0.1
    assert check_head(model, tokenizer) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
)
def test_an_adapter_on_the_head_is_refused_by_name(options, tokenizer):
    with pytest.raises(CapabilityError, match="leave it out of the adapter's target_modules and modules_to_save"):
        head_of(lora(make("Llama"), **options), tokenizer)


def test_prompt_learning_is_refused(tokenizer):
    model = peft.get_peft_model(
        make("Llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32)
    )
    with pytest.raises(CapabilityError, match="PromptTuningConfig, which learns a prompt; use LoRA"):
        hidden_states(model, input_ids=torch.tensor([[5]]))
