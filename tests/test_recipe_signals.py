"""The chat recipe's signals: an option is of one kind, and refused beside another."""

from __future__ import annotations

import pytest

from attar.recipe import ChatRecipe


def recipe(**signals):
    return ChatRecipe.model_validate(
        {
            "name": "tiny",
            "task": "chat",
            "data": {"train": "train.jsonl"},
            "teacher": {"model": "hf:teacher"},
            "distill": {"signals": signals},
        }
    )


@pytest.mark.parametrize(
    "signals",
    [
        {},
        {"threshold": 0.1},
        {"threshold": 1},
        {"kind": "top_k", "entries": 16},
        {"kind": "top_k", "entries": 1024, "at_least": 0.001},
        {"kind": "hidden"},
        {"source": "live"},
    ],
)
def test_options_of_the_kind_are_taken_and_a_resolved_recipe_reads_as_it_was(signals):
    found = recipe(**signals)
    assert {key: getattr(found.distill.signals, key) for key in signals} == signals
    assert ChatRecipe.model_validate(found.dump()) == found


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ({"entries": 16}, r"distill\.signals\.entries: it is 16, and sampled signals have none.*kind: top_k"),
        ({"kind": "top_k", "threshold": 0.1}, r"threshold: it is 0.1, and top_k signals have none.*kind: sampled"),
        ({"at_least": 0.001}, r"at_least: it is 0.001, and sampled signals have none"),
        ({"kind": "hidden", "entries": 16}, r"entries: it is 16, and hidden signals have none"),
        ({"source": "live", "threshold": 0.1}, r"threshold: it is 0.1, and live signals have none.*source: cached"),
        ({"source": "live", "kind": "top_k", "entries": 16}, r"entries: it is 16, and live signals have none"),
    ],
)
def test_an_option_of_another_kind_is_refused(signals, message):
    with pytest.raises(ValueError, match=message):
        recipe(**signals)


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1, float("nan")])
def test_a_threshold_is_a_probability_above_0(threshold):
    with pytest.raises(ValueError, match="threshold"):
        recipe(threshold=threshold)
