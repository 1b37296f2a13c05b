"""What never changes in prompts is found, cut, recorded, and cut again when the student is served."""

import json
from collections import Counter
from dataclasses import replace

import pytest

import families
from attar.data.conversations import parse_conversation
from attar.data.episodes import Episode, Outcome
from attar.errors import DataError, ModelError
from attar.tokens import PrunedPrompt, encode_conversation, encode_request, find_static, with_tools

OTHER = {"type": "function", "function": {"name": "other"}}


def talk(system="Be brief.", tools=(families.WEATHER,), question="Hm?"):
    rows = [{"role": "system", "content": system}] * (system is not None)
    rows += [{"role": "user", "content": question}, {"role": "assistant", "content": "So."}]
    return parse_conversation({"messages": rows, "tools": list(tools)})


def test_what_is_the_same_everywhere_is_cut():
    one, two = talk(question="1"), talk(question="2")
    static = find_static([one, two])
    assert static.tools == (families.WEATHER,)
    counts = Counter()
    cut = static.apply(one, counts)
    assert [(m.role, m.content) for m in cut.messages] == [("system", ""), ("user", "1"), ("assistant", "So.")]
    assert cut.tools == ()
    assert counts == {"pruned": 1}
    assert find_static([one, two], marker="-").apply(one).messages[0].content == "-"
    assert one == talk(question="1")
    ready = with_tools(families.tokenizer("chatml")).tokenizer
    whole, short = (encode_conversation(ready, c, max_tokens=9999)[0] for c in (one, cut))
    assert len(short) < len(whole) / 4
    assert whole.ids[whole.supervised].tolist() == short.ids[short.supervised].tolist()


def test_what_differs_stays():
    only_system = find_static([talk(), talk(tools=[OTHER])])
    assert (only_system.tools_sha256, only_system.tools) == (None, ())
    assert only_system.apply(talk(tools=[OTHER])).tools == (OTHER,)
    for other in ("Be long.", None):
        only_tools = find_static([talk(), talk(system=other)])
        assert only_tools.system_sha256 is None
        assert only_tools.apply(talk()).messages == talk().messages
        assert only_tools.apply(talk()).tools == ()
    for rest in ([talk("Be long.", [OTHER])], [talk(None, [])]):
        with pytest.raises(DataError, match="nothing is the same in all 2 conversations: 2 system texts"):
            find_static([talk(), *rest])
    with pytest.raises(DataError, match=r"with none: 1 conversations\), 1 lists of tools \(with none: 1\)"):
        find_static([talk(None, [])])


@pytest.mark.parametrize(
    "request_",
    [
        talk("Be brief. "),
        talk(None),
        talk(tools=[]),
        talk(tools=[families.WEATHER, OTHER]),
        replace(talk(), messages=(replace(talk().messages[0], role="developer"), *talk().messages[1:])),
        replace(talk(), messages=(talk().messages[1], talk().messages[0], talk().messages[2])),
    ],
)
def test_a_request_that_carries_something_else_is_left_whole_and_counted(request_):
    counts = Counter()
    messages, tools, pruned = find_static([talk()]).request(request_.messages, request_.tools, counts)
    assert (messages, tools, pruned) == (request_.messages, request_.tools, False)
    assert counts == {"left whole": 1}


def test_keys_of_schemas_may_come_in_another_order():
    function = dict(reversed(families.WEATHER["function"].items()))
    tools = [{"function": function, "type": "function"}]
    assert find_static([talk()]).request(talk().messages, tools).pruned


def test_a_served_request_has_the_ids_of_training(tmp_path):
    ready = with_tools(families.tokenizer("chatml")).tokenizer
    whole = families.talk()
    find_static([whole]).save(tmp_path)
    record = PrunedPrompt.load(tmp_path)
    assert record == find_static([whole])
    assert json.loads((tmp_path / "pruned_prompt.json").read_text())["tools"] == [families.WEATHER]
    (example,) = encode_conversation(ready, record.apply(whole), max_tokens=9999)
    asked = record.request(whole.messages[:2], whole.tools)
    ids = encode_request(ready, asked.messages, asked.tools)
    assert ids == example.ids[: example.supervised.argmax()].tolist()
    assert len(ids) < len(encode_request(ready, whole.messages[:2], whole.tools)) / 5


def test_episodes_are_cut_too():
    one = talk()
    episode = Episode("w", "t", "f", "p", 0, 0, one.messages, one.tools, Outcome(True), "finished")
    cut = find_static([episode]).apply(episode)
    assert cut.outcome.success
    assert cut.conversation.messages == find_static([one]).apply(one).messages


def test_the_record_is_checked(tmp_path):
    assert PrunedPrompt.load(tmp_path) is None
    find_static([talk()]).save(tmp_path)
    path = tmp_path / "pruned_prompt.json"
    path.write_text(path.read_text().replace("a town", "the town"))
    with pytest.raises(ModelError, match=r"does not say what was cut .*not that of the 1 tools"):
        PrunedPrompt.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ModelError, match="export it again"):
        PrunedPrompt.load(tmp_path)
    with pytest.raises(ValueError, match="neither the system's text nor the tools are cut"):
        PrunedPrompt(None, None)
