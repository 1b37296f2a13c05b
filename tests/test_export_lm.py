import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Regex, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from attar.data.types import Part
from attar.engines.gguf import load_gguf
from attar.engines.gguf_tokenizer import pre_name
from attar.errors import CapabilityError, MissingExtra, ModelError, RunError
from attar.students import export_lm, gguf_file
from attar.students.adapt import add_lora
from attar.students.export_lm import export_gguf, export_safetensors, merge
from attar.students.vocabulary import encode_texts, trim_vocabulary
from attar.tokens import encode_plain
from lm import LINES, logits, make_model, make_tokenizer

llama_cpp = pytest.mark.usefixtures("xllamacpp")
# Letters, digits, runs of spaces, a character of several tokens: what pre-tokenizers cut differently.
TEXTS = [*LINES, "in 2024,  12345 cats\n\n\tand WE'LL see\u00e9 \U0001f600 ", " 7", "a_b(c) != d;"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture
def xllamacpp():
    pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def probes(tokenizer):
    return [tokenizer(text).input_ids for text in ("turn off", "<|im_start|>don't wake me", "the lamp at seven, the")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory, tokenizer):
    pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_file.write_gguf(make_model(), tokenizer, path)
    return load_gguf(f"gguf:{path}", threads=1)


# --- safetensors ---


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.0), ("float16", 1e-7), ("bfloat16", 1e-4)])
def test_the_folder_answers_as_the_trained_model(dtype, least, tokenizer, probes, tmp_path):
    model = make_model(tie_word_embeddings=True)
    before = logits(model, probes[0])
    checked = export_safetensors(model, tokenizer, tmp_path / "student", dtype=dtype, probes=probes)
    assert checked.prompts == 3
    assert 0 < checked.greedy_tokens <= 48
    assert least <= checked.largest_difference <= (checked.tolerance if least else 0.0)
    assert checked.as_dict()["format"] == dtype
    with safe_open(tmp_path / "student" / "model.safetensors", "pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {getattr(torch, dtype)}  # noqa: SIM118
    assert torch.equal(logits(model, probes[0]), before)
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "student")(LINES).input_ids == tokenizer(LINES).input_ids
    )


def trained_lora(model):
    pytest.importorskip("peft", reason="peft is not installed")
    adapted = add_lora(model, r=2, alpha=4, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return adapted


def test_adapters_are_merged_and_the_trained_model_keeps_its_own(tokenizer, probes, tmp_path):
    model = make_model()
    adapted = trained_lora(model)
    expected = logits(adapted, probes[0])
    assert (expected - logits(model, probes[0])).abs().max() > 0.1
    export_safetensors(adapted, tokenizer, tmp_path / "student", dtype="float32", probes=probes)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(logits(again, probes[0]), expected, rtol=1e-4, atol=1e-4)
    assert any("lora_A" in name for name in adapted.state_dict())
    assert torch.equal(logits(adapted, probes[0]), expected)


def test_adapters_of_a_half_precision_model_are_merged_in_float32():
    plain, _ = merge(trained_lora(make_model().bfloat16()))
    assert plain.dtype == torch.float32


def test_training_aids_are_left_out_and_named(tokenizer, probes, tmp_path):
    model = make_model()
    model.projector = torch.nn.Linear(64, 8)
    checked = export_safetensors(model, tokenizer, tmp_path / "student", dtype="float32", probes=probes)
    assert checked.stripped == ["projector.bias", "projector.weight"]
    assert hasattr(model, "projector")
    with safe_open(tmp_path / "student" / "model.safetensors", "pt") as stored:
        assert not [name for name in stored.keys() if "projector" in name]  # noqa: SIM118


def test_a_folder_that_answers_differently_is_refused_and_not_left(tokenizer, probes, tmp_path, monkeypatch):
    model, write = make_model(), transformers.PreTrainedModel.save_pretrained

    def spoilt(self, *args, **kwargs):
        self.lm_head.weight.data[7] += 1e-3
        write(self, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", spoilt)
    with pytest.raises(
        RunError, match=r"float32 export differs from what was trained: .* by up to .* \(at most 0.0001\)"
    ):
        export_safetensors(model, tokenizer, tmp_path / "student", dtype="float32", probes=probes)
    assert not (tmp_path / "student").exists()


def test_an_export_is_never_checked_on_nothing(tokenizer, tmp_path):
    for none in ([], [[]]):
        with pytest.raises(RunError, match="there is none, or an empty one"):
            export_safetensors(make_model(), tokenizer, tmp_path / "s", dtype="float32", probes=none)


class Fake:
    """An export that answers with other tokens, and the same log-probabilities."""

    def __init__(self, answer):
        self.answer = answer

    def greedy(self, ids):
        return self.answer

    def differences(self, ids, path, expected):
        return [0.0]


def test_another_greedy_token_is_refused_unless_the_trained_model_was_undecided():
    model = make_model()
    path, expected = export_lm._greedy(model, [5, 6, 7], 400)
    best = expected.topk(2, dim=1)
    margins = (best.values[:, 0] - best.values[:, 1]).tolist()
    sure = next(i for i, margin in enumerate(margins) if margin > 2 * export_lm._TOLERANCE["gguf"])
    unsure = next(i for i, margin in enumerate(margins) if margin < 2 * export_lm._TOLERANCE["gguf"])
    for place in (sure, unsure):
        assert int(best.indices[place, 0]) == path[place]
        other = [*path[:place], int(best.indices[place, 1]), 9, 9]
        if place == sure:
            with pytest.raises(
                RunError, match=rf"gguf export answers .* 3 tokens with .* by {margins[place]:.3g} nats"
            ):
                export_lm._compare(model, Fake(other), 400, [[5, 6, 7]], "gguf", [])
        else:
            checked = export_lm._compare(model, Fake(other), 400, [[5, 6, 7]], "gguf", [])
            assert (checked.greedy_tokens, checked.near_ties) == (place, 1)


def test_an_export_that_goes_on_where_the_trained_model_stops_is_refused():
    model = make_model()
    path, _ = export_lm._greedy(model, [5, 6, 7], 400)
    model.generation_config.eos_token_id = [path[3], 1]
    stop = path.index(path[3])
    assert export_lm._greedy(model, [5, 6, 7], 400)[0] == path[: stop + 1]
    with pytest.raises(RunError, match=f"goes on after token {path[3]}"):
        export_lm._compare(model, Fake(path), 400, [[5, 6, 7]], "gguf", [])


# --- GGUF ---


@llama_cpp
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "vocab_size": 416}),
        ("Llama", {"attention_bias": True, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("Llama", {"rope_parameters": LLAMA3_ROPE}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {}),
    ],
    ids=["llama", "tied and padded", "bias and head size", "llama3 rope", "mistral", "qwen2", "qwen3"],
)
def test_llama_cpp_answers_as_the_trained_model(name, changes, tokenizer, probes, tmp_path):
    model = make_model(name, **changes)
    long = [5 + i % 200 for i in range(70)]
    checked = export_gguf(model, tokenizer, tmp_path / "out" / "s.gguf", probes=[*probes, long], texts=TEXTS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["s.gguf"]
    assert checked.prompts == 4
    assert checked.log_probs > 4 * len(tokenizer)
    assert 0 < checked.largest_difference < checked.tolerance
    assert checked.greedy_tokens + checked.near_ties > 4


@llama_cpp
def test_a_trimmed_and_adapted_student_is_exported(tokenizer, tmp_path):
    student, trimmed, _ = trim_vocabulary(make_model(), tokenizer, encode_texts(LINES[:1]))
    adapted = trained_lora(student)
    checked = export_gguf(adapted, trimmed, tmp_path / "s.gguf", probes=[trimmed(LINES[1]).input_ids], texts=TEXTS)
    assert checked.log_probs < 400


@llama_cpp
@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        (("_interleave", lambda rows, heads: rows), {}),
        (
            ("_llama3_factors", lambda rope, size: np.ones(size // 2, dtype=np.float32)),
            {"rope_parameters": LLAMA3_ROPE},
        ),
    ],
    ids=["rows not interleaved", "frequencies not divided"],
)
def test_a_file_that_answers_differently_is_refused_and_not_left(
    fault, changes, tokenizer, probes, tmp_path, monkeypatch
):
    monkeypatch.setattr(gguf_file, *fault)
    with pytest.raises(RunError, match=r"the gguf export (differs|answers)"):
        export_gguf(make_model(**changes), tokenizer, tmp_path / "s.gguf", probes=[*probes, [9] * 60])
    assert not list(tmp_path.iterdir())


def split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        False,
    ),
    "llama-bpe": (split(_WORDS + r"\p{N}{1,3}" + _REST), True),
    "qwen2": (split(_WORDS + r"\p{N}" + _REST), False),
}


@llama_cpp
@pytest.mark.parametrize("name", PRE)
def test_llama_cpp_encodes_as_the_tokenizer(name, tmp_path):
    pre, ignore_merges = PRE[name]
    tokenizer = make_tokenizer(pre, ignore_merges=ignore_merges)
    assert pre_name(tokenizer) == name
    gguf_file.write_gguf(make_model(num_hidden_layers=1), tokenizer, tmp_path / "s.gguf")
    # The tokenizer that is in the file.
    engine = load_gguf(f"{tmp_path}/s.gguf", threads=1)
    for text in [*TEXTS, "<|im_end|> as words"]:
        expected = encode_plain(tokenizer, text)
        assert engine.tokenize(text) == expected
        assert encode_plain(engine.tokenizer, text) == expected


@llama_cpp
def test_text_that_llama_cpp_encodes_otherwise_is_refused(probes, tmp_path, monkeypatch):
    tokenizer = make_tokenizer(PRE["smollm"][0])
    monkeypatch.setattr(gguf_file, "pre_name", lambda tokenizer: "gpt-2")
    with pytest.raises(RunError, match=r"llama.cpp encodes '  5' as"):
        export_gguf(make_model(), tokenizer, tmp_path / "s.gguf", probes=probes, texts=["  5"])


def test_tokenizers_without_a_name_in_llama_cpp_are_refused():
    prefixed = make_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True))
    with pytest.raises(CapabilityError, match=r'the tokenizer cuts text by .*"add_prefix_space": true'):
        pre_name(prefixed)
    with pytest.raises(CapabilityError, match="ignore_merges: True"):
        pre_name(make_tokenizer(ignore_merges=True))
    with pytest.raises(CapabilityError, match="is no byte-level BPE"):
        pre_name(make_tokenizer(pre_tokenizers.Whitespace()))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("GPT2", {}, r"GPT2LMHeadModel \(gpt2\) cannot be written to GGUF; known here are llama"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act: gelu cannot be written"),
        ("Mistral", {"sliding_window": 32}, "sliding_window: 32 cannot be written"),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 2}, "layer_types: .*sliding_attention.* cannot be"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type: linear cannot be written",
        ),
    ],
)
def test_models_that_cannot_be_written_are_refused_by_name(name, changes, message, tokenizer, tmp_path):
    with pytest.raises(CapabilityError, match=message):
        gguf_file.write_gguf(make_model(name, **changes), tokenizer, tmp_path / "s.gguf")


def test_weights_above_f16_are_refused(tokenizer, tmp_path):
    model = make_model()
    model.lm_head.weight.data[3, 4] = 1e5
    with pytest.raises(CapabilityError, match=r"lm_head\.weight holds 1e\+05, above F16's 65504"):
        gguf_file.write_gguf(model, tokenizer, tmp_path / "s.gguf")


def test_a_post_processor_that_gguf_cannot_hold_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> <|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    with pytest.raises(CapabilityError, match="GGUF knows a BOS token before"):
        gguf_file.write_gguf(make_model(), tokenizer, tmp_path / "s.gguf")


@llama_cpp
@pytest.mark.parametrize("frame", ["$A", "<|im_start|> $A", "$A <|im_end|>", "<|im_start|> $A <|im_end|>"])
def test_the_file_says_what_stands_around_a_text(frame, tmp_path):
    from gguf import GGUFReader

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=frame, special_tokens=[("<|im_start|>", 0), ("<|im_end|>", 1)]
    )
    gguf_file.write_gguf(make_model(num_hidden_layers=1), tokenizer, tmp_path / "s.gguf")
    fields = GGUFReader(tmp_path / "s.gguf").fields
    found = [fields[f"tokenizer.ggml.add_{name}_token"].contents() for name in ("bos", "eos")]
    assert found == ["im_start" in frame, "im_end" in frame]
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template


# --- the engine ---


def test_scores_equal_the_models(engine, tokenizer):
    model = make_model()
    prompts = [(Part("turn off ", trusted=True), Part("the lamp", trusted=False)), (Part("play", trusted=False),)]
    words = ["at seven", "milk", "\U0001f600"]
    scores = engine.score(prompts, words)
    branches = [encode_plain(tokenizer, f" {word}") for word in words]
    assert scores.tokens.tolist() == [len(branch) for branch in branches]
    # One character of several tokens, of which llama.cpp reports the last alone.
    assert len(branches[2]) > 3
    for i, prompt in enumerate(("turn off the lamp", "play")):
        ids = encode_plain(tokenizer, prompt)
        assert scores.prompt_tokens[i] == len(ids)
        for j, branch in enumerate(branches):
            table = logits(model, ids + branch)[len(ids) - 1 : -1, : len(tokenizer)].log_softmax(-1)
            expected = float(table[range(len(branch)), branch].sum())
            assert abs(scores.log_probs[i, j] - expected) < 0.05


def test_complete_is_greedy_and_says_why_it_ended(engine, tokenizer):
    prompt = (Part("play", trusted=False),)
    ids = encode_plain(tokenizer, "play")
    path, _ = export_lm._greedy(make_model(), ids, len(tokenizer))
    answer = engine.complete([prompt], max_tokens=4)[0]
    assert answer.text == tokenizer.decode(path[:4], skip_special_tokens=True)
    assert (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) == ("length", len(ids), 4)
    assert engine.capabilities == {"text", "scores"}
    assert engine.parameters == sum(
        p[: len(tokenizer)].numel() if p.shape == (400, 64) else p.numel() for p in make_model().parameters()
    )


@llama_cpp
def test_the_end_token_ends_an_answer(tokenizer, tmp_path):
    model = make_model()
    # All the head's weight on one token: it is the next one everywhere.
    model.model.norm.weight.data.zero_()[0] = 1
    model.model.embed_tokens.weight.data[:, 0] = 50
    model.lm_head.weight.data[:, 0] = 0
    model.lm_head.weight.data[1, 0] = 5
    gguf_file.write_gguf(model, tokenizer, tmp_path / "s.gguf")
    engine = load_gguf(f"{tmp_path}/s.gguf", threads=1)
    answer = engine.complete([(Part("play", trusted=False),)], max_tokens=5)[0]
    assert (answer.text, answer.finish_reason, answer.completion_tokens) == ("", "stop", 1)


def test_a_full_context_is_an_error(engine):
    with pytest.raises(RunError, match=r"leave room for .* load the model with more context_tokens"):
        engine.write([5] * 250, 50)
    with pytest.raises(RunError, match=r"llama.cpp refuses a prompt of 400 tokens: .*exceeds the available context"):
        engine.write([5] * 400, 1)


def test_files_that_are_no_model_are_refused(tmp_path, xllamacpp):
    with pytest.raises(ModelError, match="is no file"):
        load_gguf(f"gguf:{tmp_path}/none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(ModelError, match="is no GGUF file"):
        load_gguf(f"gguf:{tmp_path}/bad.gguf")


def test_another_models_tokenizer_is_refused(tokenizer, tmp_path, xllamacpp):
    gguf_file.write_gguf(make_model(num_hidden_layers=1), tokenizer, tmp_path / "s.gguf")
    other = make_tokenizer()
    other.add_tokens(["another"])
    with pytest.raises(ModelError, match=r"of the tokenizer is 'another' and the file's is none \(it has"):
        load_gguf(f"{tmp_path}/s.gguf", tokenizer=other)


def test_without_llama_cpp_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    with pytest.raises(MissingExtra, match=r'pip install "attar\[gguf\]"'):
        load_gguf(f"{tmp_path}/s.gguf")
