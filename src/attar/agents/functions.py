"""Python functions as tools, and an environment made of them.

Schema and check of a call come from one place, pydantic's reading of the signature, so that what a schema promises is
what a call is held to, for every type that pydantic knows (literals, dates, models, unions with limits). What the
parameters mean is read from the docstring by ``docstring_parser``, in the style of Google, numpy or reST.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol, get_args, get_origin, get_type_hints

import docstring_parser
import pydantic
import pydantic.fields
import pydantic.json_schema

from attar.agents.background import Background
from attar.agents.environments import Beginning, Task, ToolError
from attar.data.episodes import Outcome
from attar.data.schemas import check_tools
from attar.data.types import Message
from attar.errors import BadTools, UsageError

__all__ = ["Call", "FunctionEnvironment", "Functions", "Tools", "unknown_tool"]


class Tools(Protocol):
    """A source of tools: ``Functions``, an MCP server, or one's own; with ``close``, if it holds something."""

    @property
    def schemas(self) -> tuple[dict[str, Any], ...]:
        """The tools on offer, as OpenAI schemas."""

    def begin(self) -> None:
        """An episode begins; it must not see what others left behind."""

    def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """What a tool of this source returns, as ``Environment.call``."""


class Functions:
    """Functions that an agent can call by name.

    A function needs a docstring and a type hint for every parameter. Its name is the tool's; the docstring's text, up
    to the sections, is the description, and what it says of parameters is theirs. A call's arguments are checked
    strictly: ``"3"`` is no integer. Sync or async; async ones run in one
    event loop, in a thread of its own.

    Args:
        functions: functions or bound methods.

    Raises:
        BadTools: names the function, and what it lacks.
    """

    def __init__(self, functions: Iterable[Callable[..., Any]]) -> None:
        tools = [_Tool(function) for function in functions]
        self.schemas: tuple[dict[str, Any], ...] = tuple(tool.schema for tool in tools)
        """the tools on offer, as OpenAI schemas"""
        check_tools(self.schemas, "functions")
        self._named = {tool.name: tool for tool in tools}

    def begin(self) -> None:
        """Nothing to do: functions keep nothing, or it is their owner's to begin anew."""

    def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """What the function returns.

        Args:
            tool: its name.
            arguments: JSON; the function gets them as the types of its hints.

        Raises:
            ToolError: there is no such tool, or the arguments do not fit.
            Exception: whatever the function raised.
        """
        if tool not in self._named:
            raise unknown_tool(tool, self._named)
        result = self._named[tool].run(arguments)
        return _loop().run(_awaited(result)) if inspect.isawaitable(result) else result


@functools.cache
def _loop() -> Background:
    """One for all functions of the process, so that they may share what is bound to a loop."""
    return Background("functions")


def unknown_tool(tool: str, offered: Iterable[str]) -> ToolError:
    """What an agent is told that calls a tool which is not on offer."""
    return ToolError(f"there is no tool {tool!r}; there are: {', '.join(offered) or 'none'}")


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


class Call(NamedTuple):
    """A call that an agent made in an episode."""

    tool: str
    arguments: dict[str, Any]
    result: Any = None
    error: str | None = None
    """what went wrong, where the call failed"""


class FunctionEnvironment:
    """An environment of functions that keep nothing between calls, of MCP servers, or of both, and a check.

    One whose functions change a world needs a new world for every episode: write a class with the four methods of
    ``Environment``, and let its ``start`` make a world and ``Functions`` of that world's methods.

    Args:
        functions: the tools: functions, and sources such as ``McpServer``.
        tasks: by split. A task's ``data`` is an object whose ``user`` is what the user says; the rest is for the check.
        check: says what became of a task: ``check(task, messages, calls)``.
        system: the system prompt.
        name: for reports.

    Raises:
        BadTools: a function is no tool.
        UsageError: a task cannot be used; says which.
    """

    def __init__(
        self,
        functions: Iterable[Callable[..., Any] | Tools],
        tasks: Mapping[str, Sequence[Task]],
        check: Callable[[Task, Sequence[Message], Sequence[Call]], Outcome],
        *,
        system: str | None = None,
        name: str = "functions",
    ) -> None:
        self.name = name
        plain: list[Any] = []
        sources: list[Any] = []
        for tool in functions:
            (sources if hasattr(tool, "begin") else plain).append(tool)
        self._sources: list[Tools] = [Functions(plain), *sources]
        self._tasks = {split: tuple(rows) for split, rows in tasks.items()}
        self._check, self._system = check, system
        self._task: Task | None = None
        self._calls: list[Call] = []
        seen: set[str] = set()
        for rows in self._tasks.values():
            for task in rows:
                if task.id in seen:
                    raise UsageError(f"{name}: two tasks have the id {task.id!r}; an id is unique in its environment")
                seen.add(task.id)
                if not isinstance(task.data, dict) or not isinstance(task.data.get("user"), str):
                    raise UsageError(f'{name}: task {task.id!r}: data is {task.data!r}; wanted {{"user": "..."}}')

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of a split."""
        return self._tasks.get(split, ())

    def start(self, task: Task) -> Beginning:
        """The system prompt, if there is one, and what the user says.

        Raises:
            BadTools: two sources have a tool of one name.
        """
        self._task, self._calls = task, []
        for source in self._sources:
            source.begin()
        tools = tuple(schema for source in self._sources for schema in source.schemas)
        check_tools(tools, self.name)
        system = () if self._system is None else (Message("system", self._system),)
        return Beginning((*system, Message("user", task.data["user"])), tools)

    def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """What the function returns; the call is remembered for the check."""
        try:
            result = self._source(tool).call(tool, arguments)
        except Exception as error:
            self._calls.append(Call(tool, arguments, error=str(error) or type(error).__name__))
            raise
        self._calls.append(Call(tool, arguments, result))
        return result

    def finish(self, messages: Sequence[Message]) -> Outcome:
        """What the check says.

        Raises:
            UsageError: no episode was started, or the check returned something else.
        """
        if self._task is None:
            raise UsageError(f"{self.name}: finish without start; start a task first")
        outcome = self._check(self._task, messages, tuple(self._calls))
        if not isinstance(outcome, Outcome):
            raise UsageError(f"{self.name}: the check returned {outcome!r}; wanted attar.data.episodes.Outcome")
        return outcome

    def close(self) -> None:
        """Let go of what the sources hold."""
        for source in self._sources:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    def _source(self, tool: str) -> Tools:
        offered: list[str] = []
        for source in self._sources:
            names = [schema["function"]["name"] for schema in source.schemas]
            if tool in names:
                return source
            offered += names
        raise unknown_tool(tool, offered)


class _NoTitles(pydantic.json_schema.GenerateJsonSchema):
    """Schemas without the titles that pydantic makes of parameter names: they cost tokens in every prompt."""

    # A default that is no JSON is left out of the schema; the parameter is optional all the same.
    ignored_warning_kinds = pydantic.json_schema.GenerateJsonSchema.ignored_warning_kinds | {"non-serializable-default"}

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


class _Tool:
    """One function: its schema, and calls of it that were checked."""

    def __init__(self, function: Callable[..., Any]) -> None:
        if not (inspect.isfunction(function) or inspect.ismethod(function)):
            raise BadTools(f"{function!r} is {type(function).__name__}; wanted a function or a bound method")
        self.name: str = function.__name__
        self._function = function
        documented = docstring_parser.parse(inspect.getdoc(function) or "")
        words = (documented.short_description, documented.long_description)
        description = "\n\n".join(part.strip() for part in words if part)
        if not description:
            raise BadTools(f"function {self.name!r} has no docstring; say in one what the tool does")
        descriptions = {parameter.arg_name: parameter.description or "" for parameter in documented.params}
        signature = inspect.signature(function)
        if unknown := [name for name in descriptions if name not in signature.parameters]:
            known = ", ".join(signature.parameters) or "none"
            raise BadTools(f"function {self.name!r}: its docstring tells of {unknown[0]!r}; parameters are: {known}")
        try:
            hints = get_type_hints(function, include_extras=True)
        except Exception as error:
            raise BadTools(f"function {self.name!r}: its hints cannot be read: {error}") from error
        parameters = [self._parameter(parameter, hints, descriptions) for parameter in signature.parameters.values()]

        def received(**arguments: Any) -> dict[str, Any]:
            return arguments

        # Looks to pydantic like the function, but only hands back what it was given: so a call can be checked apart
        # from being made, and an error of the function's own is not taken for one of its arguments.
        received.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        received.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        try:
            self._arguments: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(received)  # type: ignore[arg-type]
            schema = self._arguments.json_schema(schema_generator=_NoTitles)
        except (pydantic.errors.PydanticUserError, TypeError) as error:
            why = str(error).splitlines()[0]
            raise BadTools(f"function {self.name!r}: a hint of it has no JSON schema: {why}") from error
        about = {"name": self.name, "description": description, "parameters": schema}
        self.schema: dict[str, Any] = {"type": "function", "function": about}

    def run(self, arguments: dict[str, Any]) -> Any:
        """Call the function with arguments that fit."""
        try:
            checked = self._arguments.validate_json(json.dumps(arguments), strict=True)
        except pydantic.ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc'])) or 'arguments'}: {fault['msg']}" for fault in error.errors()
            )
            raise ToolError(f"{self.name}: {faults}") from error
        return self._function(**checked)

    def _parameter(
        self, parameter: inspect.Parameter, hints: dict[str, Any], descriptions: dict[str, str]
    ) -> inspect.Parameter:
        if parameter.kind not in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
            raise BadTools(
                f"function {self.name!r}: parameter {str(parameter)!r} is {parameter.kind.description}; an agent names "
                "each argument, so wanted are parameters that have names of their own"
            )
        if parameter.name not in hints:
            raise BadTools(f"function {self.name!r}: parameter {parameter.name!r} has no type hint; give it one")
        return parameter.replace(annotation=_described(hints[parameter.name], descriptions.get(parameter.name)))


def _described(hint: Any, description: str | None) -> Any:
    """The hint with the docstring's words, unless it has words of its own."""
    own = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    if not description or any(isinstance(part, pydantic.fields.FieldInfo) and part.description for part in own):
        return hint
    return Annotated[hint, pydantic.Field(description=description)]
