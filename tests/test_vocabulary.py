import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from attar.errors import CapabilityError, RunError
from attar.students.vocabulary import encode_texts, trim_vocabulary
from lm import LINES, logits, make_model, make_tokenizer, storages

# Uses few of the tokens that the tokenizer was trained to have.
TEXTS = ["turn off the lamp", "<|im_start|>don't wake me<|im_end|>", "caf\u00e9 \U0001f600 at 7", ""]


def trim(tokenizer=None, texts=TEXTS, **changes):
    tokenizer = tokenizer or make_tokenizer()
    teacher = make_model(num_hidden_layers=2, **changes)
    return teacher, tokenizer, *trim_vocabulary(teacher, tokenizer, encode_texts(texts))


def test_every_text_keeps_its_tokens_and_logits():
    teacher, tokenizer, student, trimmed, old = trim()
    assert len(trimmed) == len(old) == student.config.vocab_size < len(tokenizer) - 20
    assert old.tolist() == sorted(old.tolist())
    for text in TEXTS[:3]:
        ids, new = tokenizer(text).input_ids, trimmed(text).input_ids
        assert old[torch.tensor(new)].tolist() == ids
        assert trimmed.decode(new) == tokenizer.decode(ids) == text
        torch.testing.assert_close(logits(student, new), logits(teacher, ids)[:, old], rtol=0, atol=1e-5)
    assert not storages(student) & storages(teacher)
    assert teacher.config.vocab_size == 400


def test_any_other_text_can_still_be_written():
    _, tokenizer, _, trimmed, _ = trim()
    for text in [*LINES, "\u00dcbergr\u00f6\u00dfe \u6771\u4eac \t\x00 unseen", "<|im_end|>"]:
        assert trimmed.decode(trimmed(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    assert any(len(trimmed(line).input_ids) > len(tokenizer(line).input_ids) for line in LINES)


def test_what_tokens_are_merged_from_is_kept():
    _, tokenizer, _, trimmed, _ = trim(texts=["lamp"])
    used = {t for t in trimmed.get_vocab() if len(t) > 1 and not t.startswith("<|")}
    assert "lamp" in tokenizer.tokenize("lamp") or len(tokenizer.tokenize("lamp")) < 4
    assert used
    assert set(trimmed.tokenize("lamp")) <= set(trimmed.get_vocab())
    # Nothing that no text of the data goes through.
    assert all(token in "lamp" for token in used)


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_token_that_several_merges_make(ignore_merges):
    """As in tokenizers made from tiktoken's: every split of a token into two others is a merge."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["ab", "bc", "abc", "cd", "bcd", "abcd", "da", "dab", "xab"]
    vocabulary = {token: i for i, token in enumerate(["<e>", *letters, *words])}
    merges = [(w[:i], w[i:]) for w in words for i in range(1, len(w)) if w[:i] in vocabulary and w[i:] in vocabulary]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    texts = ["abcd", "xabcd", "bcdab"]
    _, _, _, trimmed, _ = trim(tokenizer, texts, bos_token_id=None, eos_token_id=0, pad_token_id=None)
    assert [trimmed.tokenize(text) for text in texts] == [tokenizer.tokenize(text) for text in texts]
    assert len(trimmed) < len(tokenizer)


def test_special_ids_follow_into_configs_and_post_processor():
    tokenizer = make_tokenizer()
    # An added token at the end of the vocabulary, whose id changes.
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    old_end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|end|>", special_tokens=[("<|im_start|>", 0), ("<|end|>", old_end)]
    )
    teacher = make_model(num_hidden_layers=2, eos_token_id=[1, old_end])
    teacher.generation_config.eos_token_id = [1, old_end]
    student, trimmed, old = trim_vocabulary(teacher, tokenizer, encode_texts(["the lamp"]))
    end = trimmed.eos_token_id
    assert end < old_end == int(old[end])
    assert student.config.eos_token_id == student.generation_config.eos_token_id == [1, end]
    assert trimmed("the lamp").input_ids[:: len(trimmed("the lamp").input_ids) - 1] == [0, end]
    assert trimmed.chat_template == tokenizer.chat_template


def test_rows_beyond_the_tokenizer_are_dropped(tmp_path):
    _, _, student, trimmed, _ = trim(vocab_size=416, tie_word_embeddings=True)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert len(student.get_input_embeddings().weight) == len(trimmed)
    student.save_pretrained(tmp_path)
    trimmed.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again(LINES).input_ids == trimmed(LINES).input_ids
    ids = trimmed("the lamp").input_ids
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(student, ids))


def test_an_encoding_that_changes_is_refused():
    calls = []

    def encode(tokenizer):
        calls.append(tokenizer)
        # Not the same text the second time: what the data holds is not what was checked.
        return [tokenizer("the lamp" if len(calls) == 1 else "the milk").input_ids]

    with pytest.raises(RunError, match=r"encodes example 0 as .*keep the whole vocabulary"):
        trim_vocabulary(make_model(), make_tokenizer(), encode)


def test_tokenizers_that_cannot_be_trimmed_are_refused():
    word = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    word.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(CapabilityError, match="a WordLevel model, and only a byte-level BPE"):
        trim(transformers.PreTrainedTokenizerFast(tokenizer_object=word))
    plain = Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(CapabilityError, match="no byte-level one"):
        trim(transformers.PreTrainedTokenizerFast(tokenizer_object=plain))
    with pytest.raises(CapabilityError, match="dropout"):
        trim(make_tokenizer(dropout=0.1))
    with pytest.raises(CapabilityError, match="object is no fast tokenizer"):
        trim_vocabulary(make_model(), object(), encode_texts(TEXTS))


def test_ids_that_the_tokenizer_does_not_call_special_are_refused():
    with pytest.raises(CapabilityError, match="pad_token_id is 399, which is no special token"):
        trim(pad_token_id=399)
    teacher, tokenizer = make_model(), make_tokenizer()
    teacher.generation_config.suppress_tokens = [3]
    with pytest.raises(CapabilityError, match="sets suppress_tokens, whose ids would change"):
        trim_vocabulary(teacher, tokenizer, encode_texts(TEXTS))
