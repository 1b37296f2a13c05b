"""BFCL's multi-turn categories: a user who speaks several times, and tools that change a world.

The official runner evaluates the text of calls that a model wrote, and keeps the worlds of all episodes in the globals
of one module, by the names of model and entry, so that an entry played twice goes on where it stopped. Here calls are
method calls, and each instance has tool classes of its own; the official checker judges.
"""

from __future__ import annotations

import contextlib
import copy
import decimal
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from attar.agents.bfcl.cases import MULTI_TURN, Case, tools
from attar.agents.bfcl.references import executed_call
from attar.agents.bfcl.single import failure_of_checker, outcome
from attar.agents.bfcl.splits import Drawn, by_scenario
from attar.agents.bfcl.wheel import classes, official, version
from attar.agents.environments import Beginning, Task, ToolError
from attar.data.episodes import Outcome
from attar.data.tools import CallChecker
from attar.data.types import Conversation, Message, ToolCall

__all__ = ["CANNOT", "DONE", "MultiTurn"]

DONE = "Done."
"""what a reference answer says at the end of a turn; BFCL has no text of its own"""
CANNOT = "I cannot do this with what I have."
"""what it says in a turn in which a function or an argument is missing"""

# Arguments of the calculator with which one call would keep the machine busy for hours.
_COSTLY = {"decimal_places", "exponent", "precision"}
_LARGEST = 1000

World = dict[str, Any]
"""instances of tool classes, by the name of their class"""


class MultiTurn:
    """BFCL's multi-turn categories as an environment whose user speaks again.

    In ``multi_turn_miss_func`` functions arrive in a later turn; ``tools`` is what is on offer now.

    Args:
        categories: some of ``MULTI_TURN``.
        seed: of the split, by scenario and request: all variants of a scenario stand on one side.

    Raises:
        ValueError: a category is not known.
        MissingExtra: the wheel, or what its tools need, is not installed.
    """

    tools: tuple[dict[str, Any], ...]
    """on offer now"""

    def __init__(self, categories: Iterable[str] = MULTI_TURN, seed: int = 0) -> None:
        self._version = version()
        self._drawn = Drawn(categories, MULTI_TURN, by_scenario, seed)
        self._classes, self._stateless, self._checker = classes()
        self._check = CallChecker()
        self._case: Case | None = None
        self._world: World = {}
        self._turn = 0
        self.tools = ()

    @property
    def name(self) -> str:
        """Name and the wheel's version."""
        return f"bfcl-multi-turn {self._version}"

    def tasks(self, split: str) -> tuple[Task, ...]:
        """The tasks of ``train``, ``val`` or ``test``, a category a family."""
        return self._drawn.tasks(split)

    def start(self, task: Task) -> Beginning:
        """The first turn, in a world of its own.

        Raises:
            ValueError: there is no such task.
        """
        self._case = case = self._drawn.find(task)
        self._world = self._new_world(case)
        self._turn = 0
        self.tools = tools(case.entry["function"])
        return Beginning(case.turns[0], self.tools)

    def call(self, tool: str, arguments: dict[str, Any]) -> str:
        """The result as the official runner writes it.

        Raises:
            ToolError: the tools on offer do not take the call, or it raised, or it returned an error; the text of the
                last two is the official one.
            RuntimeError: no episode was started.
        """
        self._started("call")
        misfit = self._check(ToolCall(None, tool, arguments), self.tools)
        if misfit is not None:
            raise ToolError(misfit.detail)
        text, failed = _executed(self._world, tool, arguments)
        if failed:
            raise ToolError(text)
        return text

    def answer(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The user's next turn; where functions arrive, the official sentence for it.

        Raises:
            RuntimeError: no episode was started.
        """
        case = self._started("answer")
        self._turn += 1
        if self._turn >= len(case.turns):
            return ()
        self.tools += tools(case.added.get(self._turn, []))
        return _said(case, self._turn)

    def finish(self, messages: Sequence[Message]) -> Outcome:
        """Judge the episode: its calls are made again, turn by turn beside the official ones, in two new worlds.

        After each turn that has official calls, the states must be equal and the official results among the results so
        far. An episode with other than all turns, or with a turn of more than 20 answers with calls, fails. A call that
        the tools on offer did not take was not made; the official runner tries it all the same.

        Raises:
            RuntimeError: no episode was started.
        """
        case = self._started("finish")
        turns = list(_turns(messages))
        truth = self._truth(case)
        if len(turns) != len(truth) or max(map(len, turns)) > official().step_limit:
            return outcome("multi_turn:force_terminated")
        on_offer: tuple[dict[str, Any], ...] = tools(case.entry["function"])
        made = []
        for number, answers in enumerate(turns):
            on_offer += tools(case.added.get(number, []))
            taken = ([call for call in calls if self._check(call, on_offer) is None] for calls in answers)
            made.append([calls for calls in taken if calls])
        worlds: dict[str, World] = {}

        def execute(func_call_list: Sequence[ToolCall], model_name: str, **_: Any) -> tuple[list[str], World]:
            if model_name not in worlds:
                worlds[model_name] = self._new_world(case)
            world = worlds[model_name]
            return [_executed(world, call.name, call.arguments)[0] for call in func_call_list], world

        # The checker's module is this instance's own copy.
        self._checker.execute_multi_turn_func_call = execute
        try:
            result = self._checker.multi_turn_checker(made, truth, case.entry, case.category, official().model_name)
        except Exception as error:  # it compares attribute by attribute what a wrong call may have bent
            return failure_of_checker(error)
        return outcome("" if result["valid"] else result["error_type"])

    def reference(self, task: Task) -> tuple[Conversation, ...]:
        """The official calls, played, to train on.

        Calls of one function in a row stand in one answer. A conversation has one list of tools, so where functions
        arrive there are two: up to there, and the whole, whose earlier answers are read and not learnt.
        """
        return self._played(self._drawn.find(task), task.id)

    def references(self, split: str) -> tuple[Conversation, ...]:
        """The reference conversations of a split; ``group`` names the scenarios that share a request."""
        return tuple(c for case, group in self._drawn.grouped(split) for c in self._played(case, group))

    def _played(self, case: Case, group: str) -> tuple[Conversation, ...]:
        world = self._new_world(case)
        on_offer = tools(case.entry["function"])
        messages: list[Message] = []
        found = []
        for number, calls in enumerate(self._truth(case)):
            if number in case.added:
                found.append(Conversation(tuple(messages), on_offer, group))
                messages = [replace(m, train=False) if m.role == "assistant" else m for m in messages]
                on_offer += tools(case.added[number])
            messages += _said(case, number)
            for _, row in itertools.groupby(calls, key=lambda call: call.name):
                made = tuple(replace(call, id=f"call_{len(messages)}_{i}") for i, call in enumerate(row))
                messages.append(Message("assistant", "", made))
                results = [_executed(world, call.name, call.arguments)[0] for call in made]
                messages += [
                    Message("tool", text, tool_call_id=call.id) for call, text in zip(made, results, strict=True)
                ]
            messages.append(Message("assistant", DONE if calls else CANNOT))
        return (*found, Conversation(tuple(messages), on_offer, group))

    def _started(self, what: str) -> Case:
        if self._case is None:
            raise RuntimeError(f"{what}: no episode was started; call start first")
        return self._case

    def _truth(self, case: Case) -> list[list[ToolCall]]:
        involved = [self._classes[name] for name in case.entry["involved_classes"]]
        return [[executed_call(text, involved) for text in turn] for turn in case.truth or ()]

    def _new_world(self, case: Case) -> World:
        world = {}
        for name in case.entry["involved_classes"]:
            world[name] = instance = self._classes[name]()
            if name not in self._stateless:
                scenario = copy.deepcopy(case.entry["initial_config"].get(name, {}))
                instance._load_scenario(scenario, long_context="long_context" in case.category)
        return world


def _said(case: Case, turn: int) -> tuple[Message, ...]:
    return (Message("user", official().more_tools),) if turn in case.added else case.turns[turn]


def _executed(world: World, tool: str, arguments: dict[str, Any]) -> tuple[str, bool]:
    """A call's result, written as the official runner writes it, and whether it is an error."""
    # Of two classes that have a function of this name the later's, as in the official runner.
    method = next(getattr(instance, tool) for instance in reversed(world.values()) if hasattr(instance, tool))
    for name in _COSTLY & arguments.keys():
        if isinstance(arguments[name], int | float) and abs(arguments[name]) > _LARGEST:
            return f"Error during execution: {name} is larger than {_LARGEST}", True
    try:
        # The calculator sets the precision of the thread's decimals; the world keeps and changes what it is given.
        with decimal.localcontext():
            result = method(**copy.deepcopy(arguments))
        return _written(result), isinstance(result, dict) and "error" in result
    except Exception as error:
        return f"Error during execution: {error}", True


def _written(result: Any) -> str:
    if isinstance(result, dict):
        # Some hold an object, such as a file.
        with contextlib.suppress(TypeError, ValueError):
            return json.dumps(result)
    return str(result)


def _turns(messages: Sequence[Message]) -> Iterator[list[list[ToolCall]]]:
    """The calls of each turn, answer by answer; answers without calls left out."""
    calls: list[list[ToolCall]] | None = None
    before = None
    for message in messages:
        if message.role == "user" and before != "user":
            if calls is not None:
                yield calls
            calls = []
        elif message.role == "assistant" and message.tool_calls and calls is not None:
            calls.append(list(message.tool_calls))
        before = message.role
    if calls is not None:
        yield calls
