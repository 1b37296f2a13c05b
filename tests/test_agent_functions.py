import asyncio
import datetime
import functools
import threading
from typing import Annotated, Literal

import pydantic
import pytest

from attar.agents.environments import Environment, Task, ToolError
from attar.agents.functions import Call, FunctionEnvironment, Functions
from attar.data.episodes import Outcome
from attar.data.types import Message
from attar.errors import BadTools, UsageError


class Room(pydantic.BaseModel):
    floor: int
    beamer: bool = False


def book(
    day: datetime.date,
    room: Room,
    kind: Literal["meeting", "lesson"] = "meeting",
    *,
    people: Annotated[list[str], pydantic.Field(max_length=3, description="first names")] = [],  # noqa: B006
) -> str:
    """Book a room.

    It is yours for the whole day.

    Args:
        day: when, as YYYY-MM-DD
        room: what it must have,
            at least
        people: never shown, as the hint has words of its own

    Returns:
        a confirmation
    """
    return f"{kind} on {day:%d.%m.%Y}, floor {room.floor}, {len(people)} people"


def add(a: int, b: float) -> float:
    """Add two numbers.

    Parameters
    ----------
    a : int
        the first
    b : float
        the second
    """
    return a + b


async def later(text: str) -> str:
    """Say it later.

    :param text: what to say
    """
    await asyncio.sleep(0)
    return f"{text} in {threading.current_thread().name}"


def test_the_schema_of_a_function():
    (schema,) = Functions([book]).schemas
    assert schema == {
        "type": "function",
        "function": {
            "name": "book",
            "description": "Book a room.\n\nIt is yours for the whole day.",
            "parameters": {
                "type": "object",
                "properties": {
                    "day": {"type": "string", "format": "date", "description": "when, as YYYY-MM-DD"},
                    "room": {"$ref": "#/$defs/Room", "description": "what it must have,\nat least"},
                    "kind": {"type": "string", "enum": ["meeting", "lesson"], "default": "meeting"},
                    "people": {
                        "type": "array",
                        "items": {"type": "string"},
                        "maxItems": 3,
                        "description": "first names",
                        "default": [],
                    },
                },
                "required": ["day", "room"],
                "additionalProperties": False,
                "$defs": {
                    "Room": {
                        "type": "object",
                        "properties": {"floor": {"type": "integer"}, "beamer": {"type": "boolean", "default": False}},
                        "required": ["floor"],
                        "title": "Room",
                    }
                },
            },
        },
    }


@pytest.mark.parametrize(("function", "words"), [(add, ["the first", "the second"]), (later, ["what to say"])])
def test_docstrings_of_numpy_and_rest_are_read(function, words):
    (schema,) = Functions([function]).schemas
    properties = schema["function"]["parameters"]["properties"]
    assert [part["description"] for part in properties.values()] == words
    assert "\n" not in schema["function"]["description"]


def test_a_function_gets_the_types_of_its_hints():
    functions = Functions([book])
    arguments = {"day": "2026-03-04", "room": {"floor": 2}, "people": ["Ada"]}
    assert functions.call("book", arguments) == "meeting on 04.03.2026, floor 2, 1 people"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"a": "1", "b": 2}, "add: a: Input should be a valid integer"),
        ({"a": True, "b": 2}, "add: a: Input should be a valid integer"),
        ({"a": 1}, "add: b: Missing required argument"),
        ({"a": 1, "b": 2, "c": 3}, "add: c: Unexpected keyword argument"),
        ({"a": None, "b": "x"}, "add: a: .*; b: "),
    ],
)
def test_arguments_that_do_not_fit_are_told_to_the_agent(arguments, why):
    with pytest.raises(ToolError, match=why):
        Functions([add]).call("add", arguments)


def test_an_unknown_tool_is_told_to_the_agent():
    with pytest.raises(ToolError, match="there is no tool 'sub'; there are: add, book"):
        Functions([add, book]).call("sub", {})


def test_an_error_of_the_function_is_not_taken_for_one_of_its_arguments():
    def fail(text: str) -> str:
        """Fail."""
        Room.model_validate({"floor": text})
        return ""

    with pytest.raises(pydantic.ValidationError):
        Functions([fail]).call("fail", {"text": "x"})


def test_async_functions_share_a_loop_that_outlives_a_call():
    locks = []

    async def hold() -> int:
        """Hold a lock that is bound to the loop."""
        locks.append(asyncio.get_running_loop())
        return len({id(loop) for loop in locks})

    functions = Functions([later, hold])
    assert functions.call("later", {"text": "soon"}) == "soon in attar functions"
    assert [functions.call("hold", {}), functions.call("hold", {})] == [1, 1]
    assert not locks[0].is_closed()


def test_a_method_is_a_tool_without_its_self():
    class Counter:
        def __init__(self):
            self.value = 0

        def up(self, by: int = 1) -> int:
            """Count up."""
            self.value += by
            return self.value

    functions = Functions([Counter().up])
    assert list(functions.schemas[0]["function"]["parameters"]["properties"]) == ["by"]
    assert [functions.call("up", {}), functions.call("up", {"by": 5})] == [1, 6]


def test_a_wrapped_function_is_the_one_inside():
    @functools.wraps(add)
    def wrapper(*args, **kwargs):
        return -add(*args, **kwargs)

    assert Functions([wrapper]).schemas == Functions([add]).schemas
    assert Functions([wrapper]).call("add", {"a": 1, "b": 2}) == -3


def test_a_default_that_is_no_json_leaves_the_parameter_optional():
    missing = object()

    def find(name: str, key: str = missing) -> str:
        """Find it."""
        return "all" if key is missing else key

    functions = Functions([find])
    assert functions.schemas[0]["function"]["parameters"]["required"] == ["name"]
    assert functions.call("find", {"name": "x"}) == "all"


def bare(a: int) -> int:
    return a


def unhinted(a, b: int) -> int:
    """Add."""
    return a + b


def many(*numbers: int) -> int:
    """Add."""
    return sum(numbers)


def positional(a: int, /) -> int:
    """Take it."""
    return a


def stale(new: int) -> int:
    """Take it.

    Args:
        old: no longer there
    """
    return new


def opaque(lock: threading.Event) -> None:
    """Wait for it."""


def lost(a: "Nowhere") -> None:  # noqa: F821
    """Go there."""


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (bare, "function 'bare' has no docstring"),
        (unhinted, "function 'unhinted': parameter 'a' has no type hint"),
        (many, r"function 'many': parameter '\*numbers: int' is variadic positional"),
        (positional, "function 'positional': parameter 'a: int' is positional-only"),
        (stale, "function 'stale': its docstring tells of 'old'; parameters are: new"),
        (opaque, "function 'opaque': a hint of it has no JSON schema"),
        (lost, "function 'lost': its hints cannot be read: name 'Nowhere'"),
        (functools.partial(add, 1), "is partial; wanted a function or a bound method"),
        (print, "wanted a function or a bound method"),
    ],
)
def test_what_is_no_tool_is_refused_by_name(function, why):
    with pytest.raises(BadTools, match=why):
        Functions([add, function])


def test_two_functions_of_one_name_are_refused():
    with pytest.raises(BadTools, match="two tools are named 'add'"):
        Functions([add, add])


# an environment


def check(task, messages, calls):
    good = [call for call in calls if call.error is None]
    return Outcome(bool(good) and messages[-1].content == str(good[-1].result), reason=str(len(calls)))


TASKS = {"train": [Task("1", "sums", {"user": "What is 1 + 2?"})], "test": [Task("2", "sums", {"user": "And 2 + 2?"})]}


def test_an_environment_of_functions():
    environment = FunctionEnvironment([add], TASKS, check, system="Be brief.", name="sums")
    assert isinstance(environment, Environment)
    assert [len(environment.tasks(split)) for split in ("train", "val", "test")] == [1, 0, 1]
    beginning = environment.start(environment.tasks("train")[0])
    assert beginning.messages == (Message("system", "Be brief."), Message("user", "What is 1 + 2?"))
    assert beginning.tools == Functions([add]).schemas
    with pytest.raises(ToolError):
        environment.call("add", {"a": 1})
    assert environment.call("add", {"a": 1, "b": 2}) == 3
    assert environment.finish([Message("assistant", "3.0")]) == Outcome(True, reason="2")
    assert environment.finish([Message("assistant", "4")]) == Outcome(False, reason="2")
    # A new episode knows nothing of the one before.
    assert environment.start(environment.tasks("test")[0]).messages[1].content == "And 2 + 2?"
    assert environment.finish([Message("assistant", "3")]) == Outcome(False, reason="0")


def test_the_check_sees_every_call():
    seen = []

    def fail() -> None:
        """Fail."""
        raise OSError("disk")

    environment = FunctionEnvironment([add, fail], TASKS, lambda *all: seen.append(all) or Outcome(False))
    task = TASKS["train"][0]
    environment.start(task)
    environment.call("add", {"a": 1, "b": 2})
    with pytest.raises(OSError, match="disk"):
        environment.call("fail", {})
    environment.finish(())
    assert seen == [(task, (), (Call("add", {"a": 1, "b": 2}, 3), Call("fail", {}, None, "disk")))]
    assert environment.start(task).messages[0].role == "user"


class Clock:
    """A source of tools that is no function."""

    def __init__(self):
        self.begun = 0
        self.schemas = Functions([later]).schemas

    def begin(self):
        self.begun += 1

    def call(self, tool, arguments):
        return f"{tool} {self.begun}"

    def close(self):
        self.begun = None


def test_an_environment_of_functions_and_other_sources():
    clock = Clock()
    environment = FunctionEnvironment([add, clock], TASKS, check)
    for episode in (1, 2):
        tools = environment.start(TASKS["train"][0]).tools
        assert [tool["function"]["name"] for tool in tools] == ["add", "later"]
        assert environment.call("later", {"text": "x"}) == f"later {episode}"
    assert environment.call("add", {"a": 1, "b": 1}) == 2
    with pytest.raises(ToolError, match="there is no tool 'sub'; there are: add, later"):
        environment.call("sub", {})
    environment.close()
    assert clock.begun is None
    clock.begun = 0
    with pytest.raises(BadTools, match="functions: two tools are named 'later'"):
        FunctionEnvironment([add, clock, later], TASKS, check).start(TASKS["train"][0])


@pytest.mark.parametrize(
    ("tasks", "why"),
    [
        ({"train": TASKS["train"], "test": TASKS["train"]}, "two tasks have the id '1'"),
        ({"train": [Task("3", "sums", "What is 1 + 2?")]}, "task '3': data is 'What is 1 . 2.'; wanted"),
    ],
)
def test_tasks_that_cannot_be_used_are_refused(tasks, why):
    with pytest.raises(UsageError, match=why):
        FunctionEnvironment([add], tasks, check)


def test_a_check_that_says_yes_or_no_is_refused():
    environment = FunctionEnvironment([add], TASKS, lambda *all: True)
    with pytest.raises(UsageError, match="finish without start"):
        environment.finish(())
    environment.start(TASKS["train"][0])
    with pytest.raises(UsageError, match="the check returned True; wanted"):
        environment.finish(())
