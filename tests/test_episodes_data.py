"""An episode is written and read back whole."""

import json

import pytest

from attar.data.conversations import BadRow
from attar.data.episodes import Episode, Outcome, Step
from attar.data.types import Message, ToolCall

EPISODE = Episode(
    environment="office-1",
    task="t1",
    family="mail",
    policy="scripted",
    trial=1,
    seed=7,
    messages=(
        Message("user", "Write to Ann."),
        Message("assistant", "", (ToolCall("c1", "send", {"to": "ann"}),), reasoning="Ann is known."),
        Message("tool", "sent", tool_call_id="c1"),
        Message("assistant", "Done."),
    ),
    tools=({"type": "function", "function": {"name": "send", "parameters": {"type": "object"}}},),
    outcome=Outcome(True, 1.0, "done"),
    stopped="finished",
    steps=(Step(1, 10, 5, 12.5, "tool_calls", None, 0), Step(3, 20, 2, 9.0, "stop", 0.5, 1)),
    meta={"depth": 2},
)


def test_an_episode_reads_back_as_it_was():
    assert Episode.read(json.loads(json.dumps(EPISODE.wire))) == EPISODE


def test_an_episode_is_a_conversation_grouped_by_its_task():
    assert EPISODE.conversation.group == "t1"
    assert EPISODE.conversation.messages == EPISODE.messages


@pytest.mark.parametrize("spoil", [lambda row: row.pop("meta"), lambda row: row["meta"]["episode"].pop("steps")])
def test_a_row_that_is_no_episode_is_refused(spoil):
    row = json.loads(json.dumps(EPISODE.wire))
    spoil(row)
    with pytest.raises(BadRow, match="episode"):
        Episode.read(row)
