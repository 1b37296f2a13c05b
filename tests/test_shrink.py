import itertools

import pytest
import torch
import transformers

from attar.engines.heads import hidden_states
from attar.errors import CapabilityError, ModelError, RecipeError
from attar.students.adapt import add_lora, existing_model, fresh_model
from attar.students.shrink import (
    block_influence,
    choose_layers,
    copy_model,
    decoder_layers,
    derive,
    keep_layers,
    weights,
)
from attar.students.width import Importance, Widths, measure_importance, narrow
from lm import logits, make_model, make_tokenizer, storages

IDS = list(range(5, 19))
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
ANY = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Gemma2": GEMMA,
    "Cohere": {},
    "GPT2": {},
    "GPTNeoX": {},
    "Phi": {},
    "Qwen3Moe": MOE,
}


def batch(*rows):
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }


def check_is_a_student(student, teacher, before, tmp_path):
    """Nothing is shared or changed, generation with a cache is generation without, and a saved folder is the same."""
    assert not storages(student) & storages(teacher)
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad for p in student.parameters())
    ids = torch.tensor([IDS[:5]])
    mask = torch.ones_like(ids)
    cached, plain = (
        student.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)
    student.save_pretrained(tmp_path / "student")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits(again, IDS), logits(student, IDS))


def void(value):
    """A hook that returns something would replace the output."""


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ANY)
def test_a_student_of_fewer_layers_is_the_teacher_without_the_others(name, tmp_path):
    teacher = make_model(name, **ANY[name]).requires_grad_(False)
    before = snapshot(teacher)
    keep = [1, 3]
    student = keep_layers(teacher, keep)
    check_is_a_student(student, teacher, before, tmp_path)
    assert len(decoder_layers(student)[1]) == 2
    # The teacher itself, with the other layers taken out of its forward pass.
    for i in {0, 2}:
        layer = decoder_layers(teacher)[1][i]
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    if name == "Gemma2":
        assert student.config.layer_types == ["full_attention", "full_attention"]
    with torch.no_grad():
        expected = teacher(torch.tensor([IDS]), use_cache=False).logits[0]
    assert torch.equal(logits(student, IDS), expected)


def test_keeping_all_layers_gives_the_same_model():
    teacher = make_model()
    assert torch.equal(logits(keep_layers(teacher, [0, 1, 2, 3]), IDS), logits(teacher, IDS))


def test_half_precision_stays():
    assert keep_layers(make_model().bfloat16(), [0]).dtype == torch.bfloat16


def test_a_layer_that_depends_on_its_place_is_refused():
    teacher = make_model("GPT2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(CapabilityError, match=r"GPT2LMHeadModel is built by its place: attn\.scaling"):
        keep_layers(teacher, [0, 2])


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [0, 4], [-1, 0]])
def test_layers_that_are_no_ascending_indices_are_refused(layers):
    with pytest.raises(RecipeError, match="wanted ascending indices from 0 to 3"):
        keep_layers(make_model(), layers)


@pytest.mark.parametrize(
    ("total", "keep", "how", "expected"),
    [
        (12, 6, "alternate", [0, 2, 4, 7, 9, 11]),
        (6, 2, "alternate", [0, 5]),
        (12, 3, "first", [0, 1, 2]),
        (12, 4, "even", [0, 4, 7, 11]),
        (12, 12, "even", list(range(12))),
        (12, 1, "even", [0]),
    ],
)
def test_layers_are_chosen(total, keep, how, expected):
    model = make_model(num_hidden_layers=total, hidden_size=16, intermediate_size=8)
    assert choose_layers(model, keep, how) == expected


def test_impossible_choices_are_refused():
    model = make_model()
    with pytest.raises(RecipeError, match="5 layers are to be kept, and the teacher has 4"):
        choose_layers(model, 5, "even")
    with pytest.raises(RecipeError, match="3 is no divisor of 4; use even"):
        choose_layers(model, 3, "alternate")
    with pytest.raises(RecipeError, match="first uses no batches"):
        choose_layers(model, 2, "first", [batch(IDS)])
    with pytest.raises(RecipeError, match="the batches hold none"):
        choose_layers(model, 2, "block_influence")


def test_block_influence_is_one_minus_the_mean_cosine_of_real_tokens():
    model = make_model()
    rows = [IDS, IDS[:3]]
    expected = torch.zeros(4, dtype=torch.float64)
    for row in rows:
        with torch.no_grad():
            states = list(model(torch.tensor([row]), output_hidden_states=True).hidden_states)
            # The last one that transformers gives has gone through the norm.
            states[-1] = model.model.layers[3](
                states[3], position_embeddings=model.model.rotary_emb(states[3], torch.arange(len(row))[None])
            )
        for i, (a, b) in enumerate(itertools.pairwise(states)):
            expected[i] += (1 - torch.cosine_similarity(a[0].double(), b[0].double(), dim=-1)).sum()
    found = block_influence(model, [batch(*rows)])
    torch.testing.assert_close(found, expected / 17, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(block_influence(model, [batch(row) for row in rows]), found, rtol=1e-5, atol=1e-6)
    model = make_model()
    block_influence(model, [batch(IDS)])
    assert all(not layer._forward_hooks for layer in model.model.layers)


def test_the_most_influential_layers_are_kept_in_order():
    model = make_model()
    for i, size in enumerate([1.0, 1e-3, 3.0, 1e-2]):
        # What a layer adds to the stream, small or large.
        for projection in (model.model.layers[i].self_attn.o_proj, model.model.layers[i].mlp.down_proj):
            projection.weight.data *= size
    assert choose_layers(model, 2, "block_influence", [batch(IDS)]) == [0, 2]
    assert choose_layers(model, 3, "block_influence", [batch(IDS)]) == [0, 2, 3]


def random_importance(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Importance(
        channels=torch.rand(64, generator=generator),
        neurons=torch.rand(4, 96, generator=generator),
        heads=torch.rand(4, 4, generator=generator),
    )


def least(values, count):
    return sorted(range(len(values)), key=lambda i: float(values[i]))[:count]


def silence(model, importance, widths):
    """Zero what is to be dropped where it enters the residual stream, or leaves it."""
    channels = least(importance.channels, 64 - widths.hidden)
    model.model.embed_tokens.weight.data[:, channels] = 0
    for i, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight.data[:, least(importance.neurons[i], 96 - widths.intermediate)] = 0
        values = importance.heads[i].tolist()
        groups = sorted([[0, 1], [2, 3]], key=lambda group: -sum(values[h] for h in group))[: widths.kv_heads]
        kept = [h for g in groups for h in sorted(g, key=lambda h: -values[h])[: widths.heads // widths.kv_heads]]
        for head in set(range(4)) - set(kept):
            layer.self_attn.o_proj.weight.data[:, 16 * head : 16 * head + 16] = 0
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data[channels] = 0
            if projection.bias is not None:
                projection.bias.data[channels] = 0


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads"),
    [("Llama", 2, 2), ("Llama", 2, 1), ("Mistral", 1, 1), ("Qwen2", 2, 2), ("Qwen3", 2, 1), ("Llama", 4, 2)],
)
def test_a_narrow_student_is_the_teacher_with_the_other_parts_silent(name, heads, kv_heads, tmp_path):
    tied = name == "Qwen2"
    teacher = make_model(name, tie_word_embeddings=tied, attention_bias=name != "Mistral", mlp_bias=True)
    before = snapshot(teacher)
    importance, widths = random_importance(), Widths(hidden=48, intermediate=60, heads=heads, kv_heads=kv_heads)
    student = narrow(teacher, importance, widths)
    check_is_a_student(student, teacher, before, tmp_path)
    assert student.get_input_embeddings().weight.shape == (400, 48)
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
    silence(teacher, importance, widths)
    for module in student.modules():
        # The teacher's norms average over its silent channels too.
        if type(module).__name__.endswith("RMSNorm") and len(module.weight) == 48:
            module.weight.data *= (64 / 48) ** 0.5
    torch.testing.assert_close(logits(student, IDS), logits(teacher, IDS), rtol=1e-3, atol=1e-3)


def test_the_teachers_own_widths_give_the_teacher():
    teacher = make_model("Qwen2")
    assert torch.equal(logits(narrow(teacher, random_importance(), Widths()), IDS), logits(teacher, IDS))


def test_widths_that_do_not_fit_are_refused():
    teacher, importance = make_model(), random_importance()
    with pytest.raises(RecipeError, match="hidden is 65; wanted 1 to the teacher's 64"):
        narrow(teacher, importance, Widths(hidden=65))
    with pytest.raises(RecipeError, match="3 heads for 2 key-value heads"):
        narrow(teacher, importance, Widths(heads=3))
    with pytest.raises(RecipeError, match="4 heads for 1 key-value heads: wanted a multiple of these, at most 2"):
        narrow(teacher, importance, Widths(kv_heads=1))
    with pytest.raises(RecipeError, match="LlamaConfig refuses"):
        narrow(teacher, importance, Widths(hidden=47))


def test_an_architecture_that_cannot_be_narrowed_is_refused():
    for act in (lambda m: measure_importance(m, [batch(IDS)]), lambda m: narrow(m, random_importance(), Widths())):
        with pytest.raises(CapabilityError, match=r"GPT2LMHeadModel \(gpt2\) cannot be narrowed"):
            act(make_model("GPT2"))
    with pytest.raises(RecipeError, match="the batches hold none"):
        measure_importance(make_model(), [])


def test_importance_is_the_mean_activation_of_real_tokens():
    model = make_model()
    rows = [IDS, IDS[:3]]
    found = measure_importance(model, [batch(*rows)])
    alone = [measure_importance(model, [batch(row)]) for row in rows]
    for key in ("channels", "neurons", "heads"):
        parts = [len(row) * getattr(one, key) for row, one in zip(rows, alone, strict=True)]
        torch.testing.assert_close(getattr(found, key), sum(parts) / 17, rtol=1e-5, atol=1e-6)
    seen = {}
    layer = model.model.layers[2]
    layer.mlp.down_proj.register_forward_hook(lambda m, args, out: seen.update(neurons=args[0][0]))
    layer.self_attn.o_proj.register_forward_hook(lambda m, args, out: seen.update(heads=args[0][0]))
    norms = [
        model.model.norm,
        *(n for la in model.model.layers for n in (la.input_layernorm, la.post_attention_layernorm)),
    ]
    sums = torch.zeros(64)
    for norm in norms:
        norm.register_forward_hook(lambda m, args, out: void(sums.add_(out[0].abs().mean(0))))
    with torch.no_grad():
        hidden_states(model, input_ids=torch.tensor([IDS]))
    torch.testing.assert_close(alone[0].neurons[2].float(), seen["neurons"].abs().mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        alone[0].heads[2].float(), seen["heads"].view(-1, 4, 16).norm(dim=-1).mean(0), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(alone[0].channels.float(), sums, rtol=1e-4, atol=1e-5)


# --- random students, small models, adapters ---


def test_a_fresh_student_has_the_teachers_kind_and_its_own_sizes():
    teacher = make_model("Gemma2", **GEMMA)
    before, state = snapshot(teacher), torch.get_rng_state()
    one, same, other = (fresh_model(teacher, seed=s, hidden_size=32, num_hidden_layers=2) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert (type(one), one.config.hidden_size, one.config.num_hidden_layers) == (type(teacher), 32, 2)
    assert one.config.layer_types == GEMMA["layer_types"][:2]
    assert one.config.intermediate_size == teacher.config.intermediate_size
    assert torch.equal(logits(one, IDS), logits(same, IDS))
    assert not torch.equal(logits(one, IDS), logits(other, IDS))
    assert not storages(one) & storages(teacher)
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_fresh_student_of_more_layers():
    assert fresh_model(make_model("Qwen2"), seed=0, num_hidden_layers=6).config.layer_types == ["full_attention"] * 6
    with pytest.raises(RecipeError, match="layer_types differs among the teacher's 4 layers, and 6 are wanted"):
        fresh_model(make_model("Gemma2", **GEMMA), seed=0, num_hidden_layers=6)


def test_sizes_of_a_fresh_student_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError, match=r"LlamaConfig has no hiden_size; its sizes: .*hidden_size"):
        fresh_model(make_model(), seed=0, hiden_size=32)
    with pytest.raises(RecipeError, match=r"LlamaConfig refuses {'hidden_size': 30}"):
        fresh_model(make_model(), seed=0, hidden_size=30)


def test_a_small_model_that_exists(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = existing_model(f"hf:{tmp_path}", device=torch.device("cpu"))
    assert all(p.requires_grad for p in model.parameters())
    assert len(tokenizer) <= model.config.vocab_size
    with pytest.raises(ModelError, match="is no causal language model"):
        existing_model(f"hf:{tmp_path / 'nothing'}", device=torch.device("cpu"))


def test_a_copy_is_equal_and_its_own(tmp_path):
    teacher = make_model(tie_word_embeddings=True)
    copied = copy_model(teacher)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert torch.equal(logits(copied, IDS), logits(teacher, IDS))
    check_is_a_student(copied, teacher, snapshot(teacher), tmp_path)


def test_weights_that_are_not_the_class_own_are_refused():
    teacher = make_model()
    with pytest.raises(CapabilityError, match=r"model\.extra is \(1,\), wanted: no such weight"):
        derive(teacher, {}, [*weights(teacher).items(), ("model.extra", torch.zeros(1))])
    with pytest.raises(CapabilityError, match=r"lm_head\.weight is \(400, 64\), wanted: \(399, 64\)|embed_tokens"):
        derive(teacher, {"vocab_size": 399}, weights(teacher).items())
    with pytest.raises(CapabilityError, match=r"has a weight lm_head\.weight, which the teacher has not"):
        derive(teacher, {}, [(n, t) for n, t in weights(teacher).items() if n != "lm_head.weight"])


def test_lora_changes_nothing_before_training_and_leaves_the_teacher_alone():
    pytest.importorskip("peft", reason="peft is not installed")
    teacher = make_model().requires_grad_(False)
    before, names, state = snapshot(teacher), set(teacher.state_dict()), torch.get_rng_state()
    one, same, other = (add_lora(teacher, r=2, alpha=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(teacher.state_dict()) == names
    assert not storages(one) & storages(teacher)
    assert torch.equal(logits(one, IDS), logits(teacher, IDS))
    trainable = {name: p for name, p in one.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * 4
    assert all("lora_" in name and "lm_head" not in name for name in trainable)
    a = {n: p for n, p in one.state_dict().items() if "lora_A" in n}
    assert all(torch.equal(p, same.state_dict()[n]) for n, p in a.items())
    assert not any(torch.equal(p, other.state_dict()[n]) for n, p in a.items())
    for p in trainable.values():
        p.data += 1
    assert not torch.equal(logits(one, IDS), logits(teacher, IDS))
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"]])
def test_lora_on_head_or_embeddings_is_refused(targets):
    pytest.importorskip("peft", reason="peft is not installed")
    with pytest.raises(CapabilityError, match="adapts the embeddings or the head of LlamaForCausalLM"):
        add_lora(make_model(), r=2, alpha=4, seed=0, targets=targets)


def test_lora_on_nothing_is_refused():
    pytest.importorskip("peft", reason="peft is not installed")
    with pytest.raises(CapabilityError, match=r"cannot be adapted at \['q'\]"):
        add_lora(make_model(), r=2, alpha=4, seed=0, targets=["q"])
