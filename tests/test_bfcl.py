"""BFCL's single-turn categories: official answers pass, wrong ones fail, no split shares a request or a function."""

import importlib
import itertools
import re
import sys

import jsonschema
import pytest

from attar.agents.bfcl import SingleTurn, grade, wheel
from attar.agents.bfcl.cases import CALLS, LIVE, MULTI_TURN, PYTHON, UNANSWERABLE, cases, tools
from attar.agents.bfcl.references import reference_calls
from attar.agents.bfcl.single import NO_CALL
from attar.agents.bfcl.splits import SHARES, by_function_and_request, groups, splits
from attar.agents.environments import Bounded, Environment, Task
from attar.data.schemas import check_tools
from attar.data.types import Message, ToolCall
from attar.errors import MissingExtra

pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval")

SIDES = ("train", "val", "test")
ALL = (*PYTHON, *LIVE)
# Official answers that break the official schema of their function, so that a grammar made of it cannot write them: a
# value that is no member of the enumeration, another type than the stated one, null.
MISFITS = {
    "parallel_multiple_21", "parallel_multiple_94", "live_multiple_87-38-4", "live_multiple_552-153-1",
    "live_multiple_595-158-1", "live_multiple_596-158-2", "live_multiple_731-167-2", "live_multiple_733-167-4",
    "live_multiple_735-167-6", "live_multiple_750-169-5", "live_multiple_756-169-11", "live_multiple_835-178-10",
    "live_multiple_871-182-8", "live_multiple_947-197-0", "live_multiple_1038-265-0", "live_multiple_1041-268-0",
    "live_parallel_multiple_2-2-0",
}  # fmt: skip


def answered(calls=(), text=""):
    return Message("assistant", text, tuple(calls))


def case_of(id):
    return next(case for case in cases(id[: re.search(r"_\d", id).start()]) if case.id == id)


@pytest.mark.parametrize("category", ALL)
def test_official_answers_pass(category):
    environment = SingleTurn([category])
    tasks = [task for side in SIDES for task in environment.tasks(side)]
    assert len(tasks) == len(cases(category)) - sum(id.startswith(f"{category}_") for id in UNANSWERABLE)
    for task in tasks:
        messages, on_offer = environment.start(task)
        references = environment.reference(task)
        assert len(references) == (category != "live_relevance")
        for reference in references:
            assert reference.messages[:-1] == messages
            assert reference.tools == on_offer
            assert environment.finish(reference.messages).success, task.id


def test_entries_that_no_answer_passes_are_no_tasks():
    environment = SingleTurn(LIVE)
    offered = {task.id for side in SIDES for task in environment.tasks(side)}
    assert not offered & UNANSWERABLE.keys()
    for id in [id for id in UNANSWERABLE if id.startswith("live")]:
        case = case_of(id)
        with pytest.raises(ValueError, match=f"{id}: nobody can give its official answer"):
            reference_calls(case)
        # All combinations of allowed values, [] where none is.
        [(name, allowed)] = case.truth[0].items()
        for values in itertools.product(*(values or [[]] for values in allowed.values())):
            assert not grade(case, [ToolCall(None, name, dict(zip(allowed, values, strict=True)))]).success


def wrong(value):
    """Another value of the same type, that no answer allows."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1234567
    if isinstance(value, list):
        return [*value, wrong(value[0]) if value else "quux"]
    if isinstance(value, dict):
        return value | {"quux": 1}
    return f"quux {value}"


@pytest.mark.parametrize("category", [*CALLS, "live_parallel", "live_parallel_multiple"])
def test_perturbed_answers_fail(category):
    for case in cases(category)[::4]:
        calls = reference_calls(case)
        first = calls[0]
        faults = {
            "nothing": (),
            "one more": (*calls, first),
            "one less": calls[1:],
            "other name": (ToolCall(None, f"{first.name}_", first.arguments), *calls[1:]),
            "other argument": (ToolCall(None, first.name, first.arguments | {"quux": 1}), *calls[1:]),
        }
        for name, value in first.arguments.items():
            if isinstance(value, bool) and len(case.truth[0][next(iter(case.truth[0]))][name]) > 1:
                continue  # both are allowed
            arguments = first.arguments | {name: wrong(value)}
            faults[f"wrong {name}"] = (ToolCall(None, first.name, arguments), *calls[1:])
        for fault, answer in faults.items():
            outcome = grade(case, answer)
            assert (outcome.success, outcome.score) == (False, 0.0), (case.id, fault)
            assert outcome.reason, (case.id, fault)


def test_reasons_are_the_official_ones():
    case = case_of("simple_python_0")
    good = {"base": 10, "height": 5}

    def reason(arguments, name="calculate_triangle_area"):
        return grade(case, [ToolCall(None, name, arguments)]).reason

    assert reason(good) == ""
    assert reason(good | {"unit": "units"}) == ""
    assert reason(good, "area") == "simple_function_checker:wrong_func_name"
    assert reason({"base": 10}) == "simple_function_checker:missing_required"
    assert reason(good | {"colour": "red"}) == "simple_function_checker:unexpected_param"
    assert reason({"base": 10, "height": "5"}) == "type_error:simple"
    assert reason({"base": 10, "height": 6}) == "value_error:others"
    assert grade(case, []).reason == "ast_decoder:decoder_failed"


def test_an_answer_on_which_the_checker_fails_is_wrong_and_counted(monkeypatch):
    def failing(*_):
        raise KeyError("items")

    monkeypatch.setattr(wheel.official(), "ast_checker", failing)
    assert grade(case_of("simple_python_0"), [ToolCall(None, "f", {})]).reason == "checker:KeyError"


@pytest.mark.parametrize("category", ["irrelevance", "live_irrelevance"])
def test_where_nothing_fits_any_call_is_wrong(category):
    case = cases(category)[0]
    assert grade(case, []).success
    assert grade(case, [ToolCall(None, "f", {})]).reason == "irrelevance_error:decoder_success"
    [reference] = SingleTurn([category]).reference(Task(case.id, category))
    assert reference.messages[-1] == answered(text=NO_CALL)


def test_where_something_fits_any_call_is_right():
    case = cases("live_relevance")[0]
    assert grade(case, [ToolCall(None, "f", {})]).success
    assert grade(case, []).reason == "relevance_error:decoder_failed"


def test_dots_in_names_are_underscores_and_checked_as_such():
    case = case_of("simple_python_1")
    assert case.functions[0]["name"] == "math.factorial"
    assert tools(case.functions)[0]["function"]["name"] == "math_factorial"
    assert grade(case, [ToolCall(None, "math_factorial", {"number": 5})]).success
    assert not grade(case, [ToolCall(None, "math.factorial", {"number": 5})]).success


def test_schemas_are_json_schemas_of_json_types():
    def types(schema):
        inner = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
        return {schema.get("type")}.union(*map(types, inner))

    for category in (*ALL, *MULTI_TURN):
        for case in cases(category)[::20]:
            on_offer = tools(case.functions)
            assert [tool["function"]["name"].replace(".", "_") for tool in on_offer] == [
                function["name"].replace(".", "_") for function in case.functions
            ]
            for tool in on_offer:
                assert tool.keys() == {"type", "function"}
                assert tool["function"].keys() == {"name", "description", "parameters"}
                assert types(tool["function"]["parameters"]) <= {
                    "string", "integer", "number", "boolean", "array", "object",
                }  # fmt: skip
    jsonschema.Draft202012Validator.check_schema(tool["function"]["parameters"])


def test_schemas_say_what_the_official_descriptions_say():
    function = {
        "name": "a.b",
        "description": "Does.",
        "parameters": {
            "type": "dict",
            "optional": ["n"],
            "required": ["rows"],
            "properties": {
                "n": {"type": "float", "description": "A number.", "default": 1.5},
                "what": {"type": "any", "description": "Anything."},
                "rows": {
                    "type": "array",
                    "description": "Rows.",
                    "items": {"type": "array", "items": {"type": "dict", "properties": {"p": {"type": "tuple"}}}},
                },
            },
        },
        "response": {"type": "dict", "properties": {}},
    }
    [tool] = tools([function])
    assert tool["function"]["description"].startswith("Does. The response field has the following schema: {")
    assert tool["function"]["parameters"] == {
        "type": "object",
        "required": ["rows"],
        "properties": {
            "n": {"type": "number", "description": "A number. This is a float type value.", "default": 1.5}
            | {"format": "float"},
            "what": {"type": "string", "description": "Anything."},
            "rows": {
                "type": "array",
                "description": "Rows.",
                "items": {"type": "array", "items": {"type": "object", "properties": {"p": {"type": "array"}}}},
            },
        },
    }
    assert function["name"] == "a.b"


def test_members_that_nothing_can_be_are_read_as_what_is_wanted():
    properties = {
        "n": {"type": "integer", "description": "", "enum": ["1", "2", "dontcare"]},
        "x": {"type": "float", "description": "", "enum": ["0.5", 2]},
        "b": {"type": "boolean", "description": "", "enum": ["True", "false", "dontcare"]},
        "many": {"type": "array", "description": "", "items": {"type": "string"}, "enum": ["a", "b"]},
        "none": {"type": "integer", "description": "", "enum": ["Group A"]},
        "text": {"type": "string", "description": "", "enum": ["1", "dontcare"]},
    }
    function = {
        "name": "f",
        "description": "",
        "parameters": {"type": "dict", "properties": properties, "required": []},
    }
    [tool] = tools([function])
    check_tools([tool], "here")
    found = tool["function"]["parameters"]["properties"]
    assert {name: found[name].get("enum") for name in found} == {
        "n": [1, 2], "x": [0.5, 2], "b": [True, False], "many": None, "none": None, "text": ["1", "dontcare"],
    }  # fmt: skip
    assert found["many"]["items"] == {"type": "string", "enum": ["a", "b"]}


def test_official_answers_fit_the_schemas_but_for_those_that_are_known():
    misfits = set()
    environment = SingleTurn(ALL)
    for side in SIDES:
        for task, reference in ((t, r) for t in environment.tasks(side) for r in environment.reference(t)):
            schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in reference.tools}
            for call in reference.messages[-1].tool_calls:
                if not jsonschema.Draft202012Validator(schemas[call.name]).is_valid(call.arguments):
                    misfits.add(task.id)
    assert misfits == MISFITS


@pytest.mark.parametrize(("categories", "seed"), [(CALLS, 0), (PYTHON, 0), (PYTHON, 1), (LIVE, 0)])
def test_no_split_shares_a_function_or_a_request(categories, seed):
    environment = SingleTurn(categories, seed)
    seen = {}
    for side in SIDES:
        names, requests, found = set(), set(), set()
        for reference in environment.references(side):
            names |= {tool["function"]["name"] for tool in reference.tools}
            requests |= {" ".join(m.content.lower().split()) for m in reference.messages if m.role == "user"}
            found.add(reference.group)
        seen[side] = (names, requests, found)
    for one, other in itertools.combinations(SIDES, 2):
        assert [a & b for a, b in zip(seen[one], seen[other], strict=True)] == [set()] * 3
    every = [case for category in categories for case in cases(category) if case.id not in UNANSWERABLE]
    found = splits(every, by_function_and_request, seed)
    keys = {side: set().union(*(by_function_and_request(case) for case, _ in found[side])) for side in SIDES}
    assert not any(keys[one] & keys[other] for one, other in itertools.combinations(SIDES, 2))


def test_a_split_by_id_would_share_requests():
    requests = [{case.requests for case in cases(category)} for category in ("simple_python", "multiple")]
    assert len(requests[0] & requests[1]) > 50


@pytest.mark.parametrize(
    ("categories", "sizes"), [(CALLS, (599, 70, 331)), (PYTHON, (744, 87, 409)), (ALL, (2257, 215, 1015))]
)
def test_sizes_are_those_of_the_page(categories, sizes):
    environment = SingleTurn(categories)
    assert tuple(len(environment.tasks(side)) for side in SIDES) == sizes


def test_splits_are_drawn_by_the_seed():
    every = [case for category in CALLS for case in cases(category)]

    def test_side(cases, seed):
        return {case.id for case, _ in splits(cases, by_function_and_request, seed)["test"]}

    assert test_side(every, 0) == test_side(every, 0)
    assert len(test_side(every, 0) & test_side(every, 1)) < 250
    largest = max(groups(every, by_function_and_request), key=len)
    train = {case.id for case, _ in splits(every, by_function_and_request, 0)["train"]}
    assert len(largest) > 400
    assert {case.id for case in largest} <= train
    assert sum(SHARES.values()) == pytest.approx(1)


def test_groups_are_the_connected_components():
    letters = ["ab", "cd", "e", "bc", "ef"]
    case = cases("simple_python")[0]
    made = [type(case)(word, "x", (), {}, None) for word in letters]
    found = groups(made, lambda case: list(case.id))
    assert [[case.id for case in group] for group in found] == [["ab", "cd", "bc"], ["e", "ef"]]


def test_one_template_filled_twice_is_one_request():
    one, other = cases("simple_python")[:2]
    ask = "What is {} squared?"
    made = [
        type(one)(id, "x", ((Message("user", ask.format(n)),),), {"function": case.functions}, None)
        for id, n, case in [("a", 3, one), ("b", 41, other)]
    ]
    assert len(groups(made, by_function_and_request)) == 1
    assert len(groups([one, other], by_function_and_request)) == 2


def test_the_first_answer_is_judged_and_nothing_executed():
    environment = SingleTurn(["simple_python"])
    assert isinstance(environment, Environment)
    assert isinstance(environment, Bounded)
    assert environment.steps == 1
    assert environment.name == f"bfcl-single-turn {wheel.version()}"
    with pytest.raises(RuntimeError, match="no episode was started"):
        environment.finish(())
    task = Task("simple_python_0", "simple_python")
    messages, _ = environment.start(task)
    good = ToolCall("1", "calculate_triangle_area", {"base": 10, "height": 5})
    bad = ToolCall("2", "calculate_triangle_area", {"base": 10, "height": 6})
    assert environment.call(good.name, good.arguments) == ""
    result = Message("tool", "", tool_call_id="1")
    assert environment.finish((*messages, answered([good]), result, answered([bad]))).success
    assert not environment.finish((*messages, answered([bad]), result, answered([good]))).success
    assert environment.finish(messages).reason == "ast_decoder:decoder_failed"
    # The answer of a conversation in the prompt is not the agent's.
    prompted = (Message("user", "Hello"), answered([good]), *messages)
    assert not environment.finish((*prompted, answered(text="Sorry."))).success
    assert environment.tasks("calibration") == ()


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="categories: simple_java, wanted some of simple_python, multiple"):
        SingleTurn(["simple_java", "multiple"])
    with pytest.raises(ValueError, match="categories: none, wanted"):
        SingleTurn([])
    with pytest.raises(ValueError, match="task 'multiple_0' is none of simple_python"):
        SingleTurn(["simple_python"]).start(Task("multiple_0", "multiple"))


def test_the_wheel_is_left_as_it_is():
    official = wheel.Official()
    assert official.ast_checker is not wheel.official().ast_checker
    assert not [name for name in sys.modules if name.startswith("bfcl_eval.")]
    folder = wheel._folder()
    assert not any((folder.parent / name).exists() for name in ("result", "score", ".file_locks"))
    ours = importlib.import_module("bfcl_eval.constants.enums")
    try:
        wheel.classes()
        assert sys.modules["bfcl_eval.constants.enums"] is ours
    finally:
        for name in [name for name in sys.modules if name.startswith("bfcl_eval.")]:
            del sys.modules[name]


def test_without_the_wheel_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bfcl_eval", None)
    with pytest.raises(MissingExtra, match=r'pip install "attar\[bfcl\]", then pip install --no-deps bfcl-eval'):
        SingleTurn()
