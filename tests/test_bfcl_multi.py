"""BFCL's multi-turn categories: official calls, played, pass; wrong ones fail; episodes do not touch one another."""

import copy
import decimal
import json
import sys
from dataclasses import replace

import pytest

from attar.agents.bfcl import MultiTurn, wheel
from attar.agents.bfcl.cases import MULTI_TURN, UNANSWERABLE, cases, tools
from attar.agents.bfcl.multi import CANNOT, DONE
from attar.agents.bfcl.references import executed_call
from attar.agents.environments import Changing, Conversing, Environment, Task, ToolError
from attar.data.conversations import parse_conversation
from attar.data.tools import CallChecker
from attar.data.types import Message, ToolCall

pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval")

SIDES = ("train", "val", "test")
FAILED = "failed: "


@pytest.fixture(scope="module")
def environment():
    return MultiTurn()


@pytest.fixture
def official_runner():
    """The official execution of calls written as text; it imports the wheel's modules under their own names."""
    _, _, checker = wheel.classes()
    yield checker.execute_multi_turn_func_call
    for name in [name for name in sys.modules if name.startswith("bfcl_eval.")]:
        del sys.modules[name]


def task(id):
    return Task(id, id.rsplit("_", 1)[0])


def play(environment, id, turns):
    """Play an episode: of each turn the calls, an answer each, and a word; the messages, and the calls' results."""
    messages = list(environment.start(task(id)).messages)
    results = []
    for turn in turns:
        for call in turn:
            messages.append(Message("assistant", "", (call,)))
            try:
                results.append(environment.call(call.name, call.arguments))
            except ToolError as error:
                results.append(FAILED + str(error))
            messages.append(Message("tool", results[-1].removeprefix(FAILED), tool_call_id=call.id))
        messages.append(Message("assistant", "Done."))
        messages += environment.answer(messages)
    return messages, results


def official_calls(environment, id):
    """The official calls by turn, as the reference conversation has them."""
    turns = []
    for message in environment.reference(task(id))[-1].messages:
        if message.role == "user":
            turns.append([])
        turns[-1].extend(message.tool_calls)
    return turns


@pytest.mark.parametrize("category", MULTI_TURN)
def test_official_calls_pass(environment, category):
    tasks = [one for side in SIDES for one in MultiTurn([category]).tasks(side)]
    assert {one.id for one in tasks} == {case.id for case in cases(category)} - UNANSWERABLE.keys()
    for one in tasks:
        messages, on_offer = environment.start(one)
        references = environment.reference(one)
        assert environment.finish(references[-1].messages).success, one.id
        assert references[0].messages[: len(messages)] == messages
        assert references[0].tools == on_offer


@pytest.mark.parametrize("category", MULTI_TURN)
def test_results_are_those_of_the_official_runner(environment, official_runner, category):
    for case in cases(category)[3::25]:
        official = []
        for text in (text for turn in case.truth for text in turn):
            official += official_runner(
                [text],
                case.entry["initial_config"],
                case.entry["involved_classes"],
                "model",
                case.id,
                long_context="long_context" in category,
            )[0]
        messages, results = play(environment, case.id, official_calls(environment, case.id))
        assert [result.removeprefix(FAILED) for result in results] == official
        assert environment.finish(messages).success


def test_errors_are_worded_as_by_the_official_runner(environment, official_runner):
    case = cases("multi_turn_base")[0]
    for call in [
        ToolCall("1", "cd", {"folder": "nowhere"}),
        ToolCall("2", "mkdir", {"dir_name": "a", "mode": 7}),
        ToolCall("3", "tail", {"file_name": "log.txt", "lines": 10**30}),
    ]:
        text = f"{call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})"
        [official] = official_runner(
            [text], case.entry["initial_config"], case.entry["involved_classes"], "m", call.id
        )[0]
        environment.start(task(case.id))
        with pytest.raises(ToolError) as raised:
            environment.call(call.name, call.arguments)
        assert str(raised.value) == official


def test_a_call_that_the_tools_on_offer_do_not_take_is_not_made(environment):
    # The function is held back until turn 3, so neither the world of the episode nor that of the check may see it.
    id = "multi_turn_miss_func_0"
    right = official_calls(environment, id)
    early = [*right[0], ToolCall("x", "sort", {"file_name": "final_report.pdf"})]
    misfit = ToolCall("y", "mkdir", {"dir_name": 7})
    messages, results = play(environment, id, [[*early, misfit], *right[1:]])
    assert results[len(right[0])].startswith(f"{FAILED}calls 'sort', on offer:")
    assert results[len(early)] == f'{FAILED}(mkdir): $.dir_name breaks type: "string"'
    assert environment.finish(messages).success
    only_misfits, _ = play(environment, id, [[misfit], *right[1:]])
    assert environment.finish(only_misfits).reason == "multi_turn:empty_turn_model_response"


def test_official_calls_fit_the_schemas_on_offer_but_for_those_left_out(environment):
    check = CallChecker()
    misfits = set()
    for category in MULTI_TURN:
        for case in cases(category):
            world = environment._new_world(case)
            for function in case.functions:
                assert any(callable(getattr(instance, function["name"], None)) for instance in world.values())
            on_offer = ()
            for turn, calls in enumerate(environment._truth(case)):
                on_offer += tools(case.added.get(turn, []) if turn else case.entry["function"])
                if any(check(call, on_offer) is not None for call in calls):
                    misfits.add(case.id)
    assert misfits == {id for id in UNANSWERABLE if id.startswith("multi_turn")}


def test_the_user_speaks_again_until_all_is_said(environment):
    case = cases("multi_turn_base")[0]
    assert isinstance(environment, Environment)
    assert isinstance(environment, Conversing)
    assert environment.start(task(case.id)).messages == case.turns[0]
    said = [environment.answer(()) for _ in case.turns]
    assert said == [*case.turns[1:], ()]
    assert environment.answer(()) == ()
    assert MultiTurn(["multi_turn_base"]).name == f"bfcl-multi-turn {wheel.version()}"


def test_missing_functions_arrive_with_a_turn(environment):
    case = cases("multi_turn_miss_func")[0]
    assert isinstance(environment, Changing)
    [turn] = case.added
    names = []
    on_offer = environment.start(task(case.id)).tools
    for number in range(len(case.turns)):
        assert on_offer == environment.tools if number == 0 else True
        names.append([tool["function"]["name"] for tool in environment.tools])
        said = environment.answer(())
        if number + 1 == turn:
            assert said == (Message("user", "I have updated some more functions you can choose from. What about now?"),)
    assert case.entry["missed_function"][str(turn)][0]["name"] == "sort"
    assert ["sort" in known for known in names] == [number >= turn for number in range(len(case.turns))]
    assert names[turn] == [*names[0], "sort"]


def test_a_reference_whose_tools_change_is_two_conversations(environment):
    first, whole = environment.reference(task("multi_turn_miss_func_0"))
    assert {"sort"} == {tool["function"]["name"] for tool in whole.tools} - {t["function"]["name"] for t in first.tools}
    assert [replace(message, train=None) for message in whole.messages[: len(first.messages)]] == list(first.messages)
    learnt = [message.train is not False for message in whole.messages if message.role == "assistant"]
    assert learnt == sorted(learnt)
    assert 0 < sum(learnt) == len(learnt) - sum(message.role == "assistant" for message in first.messages)
    assert first.messages[-1].content == CANNOT
    assert whole.messages[-1].content == DONE
    for conversation in (first, whole):
        assert parse_conversation(json.loads(json.dumps(conversation.wire))) == conversation


def test_calls_and_results_of_a_reference_belong_together(environment):
    for conversation in environment.references("val"):
        ids = [call.id for message in conversation.messages for call in message.tool_calls]
        assert len(set(ids)) == len(ids)
        assert ids == [message.tool_call_id for message in conversation.messages if message.role == "tool"]
        assert max(len({call.name for call in message.tool_calls}) for message in conversation.messages) <= 1
        assert conversation.messages[-1].role == "assistant"


def test_wrong_episodes_fail_with_the_official_reason(environment):
    id = "multi_turn_base_0"
    right = official_calls(environment, id)

    def reason(turns, last=None):
        messages, _ = play(environment, id, turns)
        return environment.finish(messages[:last]).reason

    assert reason(right) == ""
    assert reason([[*right[0], ToolCall("x", "mkdir", {"dir_name": "more"})], *right[1:]]) == (
        "multi_turn:instance_state_mismatch"
    )
    assert reason([*right[:1], [ToolCall("x", "ls", {})], *right[2:]]) == "multi_turn:execution_response_mismatch"
    assert reason([*right[:1], [], *right[2:]]) == "multi_turn:empty_turn_model_response"
    assert reason(right[:-1], last=-1) == "multi_turn:force_terminated"
    look = [ToolCall("x", "pwd", {})]
    assert reason([look * 17 + right[0], *right[1:]]) == ""
    assert len(right[0]) == 3
    assert reason([look * 18 + right[0], *right[1:]]) == "multi_turn:force_terminated"


def test_an_answer_on_which_the_checker_fails_is_wrong_and_counted(monkeypatch):
    environment = MultiTurn(["multi_turn_base"])
    monkeypatch.setattr(environment._checker, "state_checker", lambda *_: {}["valid"])
    messages, _ = play(environment, "multi_turn_base_0", official_calls(environment, "multi_turn_base_0"))
    assert environment.finish(messages).reason == "checker:KeyError"


def test_episodes_side_by_side_do_not_touch_one_another():
    one, other = MultiTurn(), MultiTurn()
    id = "multi_turn_long_context_1"
    turns = official_calls(one, id)
    _, alone = play(one, id, turns)
    # The same task in both, in step, the second one call behind and with other things done before.
    play(other, "multi_turn_long_context_55", official_calls(other, "multi_turn_long_context_55"))
    calls = [call for turn in turns for call in turn]
    results = {environment: [] for environment in (one, other)}
    for environment in (one, other):
        environment.start(task(id))
    for ahead, behind in zip([*calls, None], [None, *calls], strict=True):
        for environment, call in ((one, ahead), (other, behind)):
            if call is not None:
                results[environment].append(environment.call(call.name, call.arguments))
    assert results == {one: alone, other: alone}
    assert one._classes["GorillaFileSystem"] is not other._classes["GorillaFileSystem"]
    # An entry played again begins anew, and judging it changes nothing.
    messages, again = play(one, id, turns)
    assert again == alone
    assert one.finish(messages) == one.finish(messages)
    assert one.finish(messages).success


def test_the_calculator_leaves_the_precision_of_others_alone():
    mpmath = pytest.importorskip("mpmath")
    one, other = MultiTurn(), MultiTurn()
    before = (mpmath.mp.dps, decimal.getcontext().prec)
    case = next(case for case in cases("multi_turn_base") if "MathAPI" in case.entry["involved_classes"])
    for environment, precision in ((one, 30), (other, 5)):
        environment.start(task(case.id))
        environment.call("logarithm", {"value": 10, "base": 3, "precision": precision})
        environment.call("square_root", {"number": 2, "precision": precision})
    assert one._classes["MathAPI"].logarithm.__globals__["mpmath"].mp.dps == 30
    assert (mpmath.mp.dps, decimal.getcontext().prec) == before
    with pytest.raises(ToolError, match="precision is larger than 1000"):
        one.call("logarithm", {"value": 10, "base": 3, "precision": 10**9})
    with pytest.raises(ToolError, match="exponent is larger than 1000"):
        one.call("power", {"base": 10, "exponent": -(10**9)})
    with pytest.raises(ToolError, match="Error during execution: Exceeds the limit"):
        one.call("power", {"base": 10**100, "exponent": 100})


def test_the_world_does_not_change_the_messages(environment):
    # This official answer gives the world a list, which a later call extends.
    id = "multi_turn_base_90"
    turns = official_calls(environment, id)
    before = copy.deepcopy(turns)
    messages, _ = play(environment, id, turns)
    assert turns == before
    assert environment.finish(messages).success


def test_only_functions_on_offer_can_be_called(environment):
    environment.start(task("multi_turn_base_0"))
    for name in ("_load_scenario", "__class__", "__import__('os').system", "cd(folder='document') or ls", "print"):
        with pytest.raises(ToolError, match="on offer: "):
            environment.call(name, {})
    with pytest.raises(ToolError, match="unexpected keyword argument"):
        environment.call("ls", {"a=True) or print(1": 1})


def test_calls_are_read_not_run():
    class Files:
        def mv(self, source, destination):
            raise AssertionError

    call = ToolCall(None, "mv", {"source": "a", "destination": "b"})
    assert executed_call(" mv('a', destination='b')", [Files]) == call
    for text in ("mv", "rm('a')", "mv(__import__('os'))", "mv('a', print())"):
        with pytest.raises(ValueError):
            executed_call(text, [Files])


def test_all_variants_of_a_scenario_stand_on_one_side():
    environment = MultiTurn()
    numbers = [{one.id.rsplit("_", 1)[1] for one in environment.tasks(side)} for side in SIDES]
    assert [len(found) for found in numbers] == [119, 14, 66]
    assert len(set.union(*numbers)) == 199
    assert [len(environment.tasks(side)) for side in SIDES] == [475, 56, 264]
    requests = [
        {m.content for c in environment.references(side) for m in c.messages if m.role == "user"}
        - {"I have updated some more functions you can choose from. What about now?"}
        for side in SIDES
    ]
    assert not requests[0] & requests[2]
    assert not requests[1] & (requests[0] | requests[2])


def test_nothing_goes_on_without_a_start():
    environment = MultiTurn(["multi_turn_base"])
    for act in (lambda: environment.call("ls", {}), lambda: environment.answer(()), lambda: environment.finish(())):
        with pytest.raises(RuntimeError, match="no episode was started"):
            act()
    environment.start(task("multi_turn_base_0"))
    assert environment.finish(()).reason == "multi_turn:force_terminated"
    with pytest.raises(ValueError, match="'multi_turn_miss_func_0' is none of multi_turn_base"):
        environment.start(task("multi_turn_miss_func_0"))
