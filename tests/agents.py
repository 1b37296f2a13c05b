"""A small environment for tests: a counter that has to reach a number."""

import sys
import threading

from attar.agents.environments import Beginning, Task, ToolError
from attar.data.episodes import Outcome
from attar.data.types import Message, ToolCall

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add to the counter.",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer"}},
            "required": ["n"],
            "additionalProperties": False,
        },
    },
}
TOOLS = tuple(
    {**ADD, "function": {**ADD["function"], "name": name}}
    for name in ("add", "fail", "crash", "hang", "huge", "loop", "exit")
)
HANGING = threading.Event()
"""set to let hanging environments go, at the end of a test"""


class Counter:
    """Reach the number that the task names."""

    name = "counter-1"

    def __init__(self, count=5):
        self._count = count

    def tasks(self, split):
        number = {"train": self._count, "val": 2, "test": 3}.get(split, 0)
        return [Task(f"{split}-{n}", "even" if n % 2 == 0 else "odd", {"goal": n + 2}) for n in range(number)]

    def start(self, task):
        if task.data == "broken":
            raise RuntimeError("no such world")
        self._goal, self._value = task.data["goal"], 0
        return Beginning((Message("system", "Count."), Message("user", f"Reach {self._goal}.")), TOOLS)

    def call(self, tool, arguments):
        if tool == "fail":
            raise ToolError("not today")
        if tool == "crash":
            raise ZeroDivisionError("by zero")
        if tool == "hang":
            HANGING.wait(60)
        if tool == "exit":
            sys.exit(3)
        if tool == "huge":
            return "x" * 5000
        if tool == "loop":
            circle = []
            circle.append(circle)
            return circle
        self._value += arguments["n"]
        return {"value": self._value}

    def finish(self, messages):
        good = self._value == self._goal
        return Outcome(good, float(good), "done" if good else "wrong value")


def call(name, **arguments):
    """An assistant's message that makes one call."""
    return Message("assistant", "", (ToolCall(None, name, arguments),))


def counting(request):
    """An expert of the counter: adds one until the goal is reached."""
    goal = int(request.messages[1].content.split()[1].rstrip("."))
    made = sum(message.role == "tool" for message in request.messages)
    return call("add", n=1) if made < goal else Message("assistant", "Done.")
