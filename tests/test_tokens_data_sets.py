"""Lengths and counts over a data set, fingerprints, and what `attar check` shows."""

from collections import Counter

import numpy as np
import pytest

import chats
from attar.data.conversations import parse_conversation
from attar.errors import DataError
from attar.tokens import TokenizedExample, encode_conversations, highlight, template_fingerprint
from chats import TALK, TOKENIZERS, encode, learned, theirs

CHATML = TOKENIZERS["chatml"]
METASPACE = chats.metaspace(chats.MISTRAL, bos="<s>", eos="</s>")


def test_the_right_is_cut_off_and_counted():
    (whole,) = encode(CHATML, TALK)
    ends = np.flatnonzero(whole.ids == CHATML.convert_tokens_to_ids("<|im_end|>"))
    counts = Counter()
    (example,) = encode(CHATML, TALK, max_tokens=int(ends[-1]), counts=counts)
    assert example.ids.tolist() == whole.ids[: ends[-1]].tolist()
    assert learned(CHATML, example) == ["hello there<|im_end|>", "it is 3 degrees"]
    assert counts["truncated"] == counts["supervised lost"] == 1
    assert counts["tokens"] == len(example)
    assert counts["supervised"] == example.supervised.sum()


def test_an_example_with_nothing_left_is_dropped_and_counted():
    counts = Counter()
    assert encode(CHATML, TALK, max_tokens=5, counts=counts) == []
    assert counts["dropped"] == 1
    assert counts["examples"] == 0


def test_truncation_is_bounded():
    short = parse_conversation({"messages": TALK[:2]})
    long = parse_conversation({"messages": TALK})
    limit = len(encode(CHATML, TALK[:2])[0])
    arguments = {"max_tokens": limit + 3}
    examples, counts = encode_conversations(CHATML, [short, short, long], max_truncated=0.34, **arguments)
    assert len(examples) == 3
    assert counts["truncated"] == 1
    with pytest.raises(DataError, match=r"1 of 3 examples \(33.3%\).*at most 30.0%.*Raise max_tokens"):
        encode_conversations(CHATML, [short, short, long], max_truncated=0.3, **arguments)


def test_a_data_set_with_nothing_left_is_refused():
    long = parse_conversation({"messages": TALK})
    with pytest.raises(DataError, match="no example is left"):
        encode_conversations(CHATML, [long], max_tokens=5, max_truncated=1.0)
    with pytest.raises(DataError, match="no example is left"):
        encode_conversations(CHATML, [], max_tokens=5, max_truncated=1.0)


def test_unusable_conversations_stop_or_are_counted():
    good = parse_conversation({"messages": TALK})
    bad = parse_conversation({"messages": [{"role": "system", "content": "x"}, *TALK]})
    with pytest.raises(DataError, match=bad.id):
        encode_conversations(TOKENIZERS["gemma"], [good, bad], max_tokens=99, max_truncated=0)
    examples, counts = encode_conversations(
        TOKENIZERS["gemma"], [good, bad], max_tokens=99, max_truncated=0, on_unusable="skip"
    )
    assert [e.id for e in examples] == [good.id]
    assert counts["unusable"] == 1


# shapes, fingerprint, display


def test_the_first_token_is_never_a_target():
    with pytest.raises(ValueError, match="first token"):
        TokenizedExample("x", np.array([1, 2], dtype=np.int32), np.array([True, True]))
    with pytest.raises(ValueError, match="shape"):
        TokenizedExample("x", np.array([1, 2], dtype=np.int32), np.array([False]))


def test_the_fingerprint_follows_template_vocabulary_and_special_tokens():
    same = chats.with_template(CHATML, chats.CHATML)
    assert template_fingerprint(CHATML) == template_fingerprint(same)
    others = [chats.with_template(CHATML, chats.LLAMA), chats.with_template(CHATML, chats.CHATML)]
    others[1].add_tokens(["zebra"])
    other_bos = chats.with_template(CHATML, chats.CHATML)
    other_bos.bos_token = "<s>"
    assert len({template_fingerprint(t) for t in (CHATML, *others, other_bos)}) == 4


def test_highlight_shows_the_whole_text():
    for tokenizer in (CHATML, METASPACE):
        messages = [{"role": "user", "content": "é🎉"}, {"role": "assistant", "content": "🎉 é"}]
        (example,) = encode(tokenizer, messages)
        assert "".join(text for text, _ in highlight(tokenizer, example)) == tokenizer.decode(example.ids)


def test_a_change_of_the_tokenizer_is_seen():
    tokenizer = chats.with_template(CHATML, chats.CHATML)
    messages = [{"role": "user", "content": "zebra"}, TALK[1]]
    encode(tokenizer, messages)
    tokenizer.add_tokens(["zebra"])
    assert encode(tokenizer, messages)[0].ids.tolist() == theirs(tokenizer, messages)
