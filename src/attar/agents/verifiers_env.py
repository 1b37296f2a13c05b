"""Environments of the ``verifiers`` library, from its version 0.4 on: a taskset's tasks, tools and rewards.

A task is played by ``verifiers``' own ``Rollout``: it prepares the task, starts its tool servers, keeps its state,
and scores it. Only the agent in the middle is another: instead of a program that verifiers runs, the episode runner
calls the tools, and what was said is entered into the trace before it is scored.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from attar.agents.background import Background, Held
from attar.agents.environments import Beginning, Task
from attar.agents.functions import unknown_tool
from attar.agents.mcp import McpServer
from attar.data.episodes import Outcome
from attar.data.schemas import check_tools
from attar.data.types import Message
from attar.errors import EnvironmentLost, RunError, UsageError, require

__all__ = ["VerifiersEnvironment"]

# Before it, environments were classes of another kind.
_OLDEST = (0, 4)


class VerifiersEnvironment:
    """One taskset.

    What it offers the agent are the tools of the taskset and of its tasks, under the names that verifiers gives them;
    code runs on this machine (its ``subprocess`` runtime). Refused by name is what would need another agent than
    attar's: an ``Env`` of the taskset's own (users that are simulated, several agents), ``@intercept`` hooks, tasks
    that need a container; and ``@stop`` hooks, unless they are given up: an episode ends by attar's own limits.

    Args:
        taskset: its id, an installed package that exports a ``Taskset``.
        splits: of which tasks each split consists, ``{"train": (0, 200), "test": (200, 300)}``: the first, and the
            one after the last, in the taskset's order. verifiers itself knows no splits.
        options: of the taskset's config.
        ignore_stops: play tasks with ``@stop`` hooks, without asking these.
        success: the least reward, all of its rewards weighted and added, that counts as success.
        timeout_s: the longest that a start, a call or a judgement may take, in seconds.

    Raises:
        MissingExtra: verifiers is not installed.
        UsageError: an older version of it, no such taskset, wrong options, splits that overlap, or what is refused.
    """

    def __init__(
        self,
        taskset: str,
        *,
        splits: Mapping[str, tuple[int, int]],
        options: Mapping[str, Any] | None = None,
        ignore_stops: bool = False,
        success: float = 1.0,
        timeout_s: float = 120.0,
    ) -> None:
        version = require("verifiers", "verifiers").__version__
        if tuple(map(int, version.split(".")[:2])) < _OLDEST:
            raise UsageError(f"verifiers {version} is installed, wanted 0.4 or later: pip install 'verifiers>=0.4'")
        self._vf = vf = require("verifiers.v1", "verifiers")
        self.name = f"verifiers:{taskset} with verifiers {version}"
        _check_splits(splits)
        try:
            config = vf.taskset_config_type(taskset).model_validate({"id": taskset, **(options or {})})
            self._taskset = vf.load_taskset(config)
            environment = vf.environment_class(taskset)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise UsageError(
                f"verifiers taskset {taskset!r} cannot be loaded: {' '.join(str(error).split())}"
            ) from error
        if environment is not vf.SingleAgentEnv:
            raise UsageError(
                f"verifiers taskset {taskset!r} is played by its own {environment.__name__}; not supported"
            )
        self._id, self._splits, self._success, self._timeout_s = taskset, dict(splits), success, timeout_s
        self._ignore_stops = ignore_stops
        self._loaded: dict[str, tuple[Task, ...]] = {}
        self._background = Background(f"verifiers {taskset}")
        self._shared: Held[dict[str, Any]] | None = None
        self._rollout: Held[_Rollout] | None = None
        self._servers: list[McpServer] = []

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of a split.

        Raises:
            UsageError: the taskset has fewer, or a task is refused.
        """
        if split not in self._splits:
            return ()
        if split not in self._loaded:
            first, end = self._splits[split]
            found = list(self._taskset.include(idx=[f"{first}:{end}"]))
            if len(found) < end - first:
                raise UsageError(
                    f"{self.name}: split {split!r} is tasks {first} to {end}, but the taskset ends after "
                    f"{first + len(found)}"
                )
            for task in found:
                self._check(task)
            self._loaded[split] = tuple(Task(task.key, self._id, task.data.idx) for task in found)
        return self._loaded[split]

    def start(self, task: Task) -> Beginning:
        """Prepare a task, and start its tool servers.

        Raises:
            UsageError: it is no task of this taskset.
            EnvironmentLost: the task's own preparation failed, or a server did not start.
        """
        self._end()
        if self._shared is None:
            shared = self._vf.mcp.serve_shared(type(self._taskset).toolsets(self._taskset.config))
            self._shared = self._enter(shared, "start of the shared tool servers")
        self._rollout = self._enter(self._play(self._found(task)), f"start of task {task.id}")
        self._servers = [
            McpServer(url, prefix=f"{name}_" if name else "", keep=True, timeout_s=self._timeout_s)
            for name, url in self._rollout.value.urls.items()
        ]
        tools = tuple(schema for server in self._servers for schema in server.schemas)
        check_tools(tools, self.name)
        self._rollout.value.tools = tools
        return Beginning(self._rollout.value.messages, tools)

    def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """What one of the tool servers answers."""
        offered: list[str] = []
        for server in self._servers:
            names = [schema["function"]["name"] for schema in server.schemas]
            if tool in names:
                return server.call(tool, arguments)
            offered += names
        raise unknown_tool(tool, offered)

    def finish(self, messages: Sequence[Message]) -> Outcome:
        """Enter the messages into the trace, and let the task's rewards judge it.

        Raises:
            UsageError: no task was started.
            EnvironmentLost: the judgement failed.
        """
        if self._rollout is None:
            raise UsageError(f"{self.name}: finish without start; start a task first")
        rollout = self._rollout.value
        try:
            self._background.run(rollout.judge(messages), self._timeout_s)
        except TimeoutError as error:
            raise EnvironmentLost(f"{self.name}: judging took more than {self._timeout_s:g} s") from error
        finally:
            self._end()
        trace = rollout.trace
        if trace.errors or trace.is_timeout:
            why = trace.errors[-1].message if trace.errors else trace.stop_condition
            raise EnvironmentLost(f"{self.name}: the task could not be judged: {why}")
        return Outcome(
            trace.reward >= self._success,
            score=min(1.0, max(0.0, trace.reward)),
            reason="" if trace.reward >= self._success else _lowest(trace.rewards),
        )

    def close(self) -> None:
        """Let all servers go."""
        self._end()
        if self._shared is not None:
            self._shared.leave()
            self._shared = None
        self._background.close()

    def _end(self) -> None:
        """Let go of a task, judged or not."""
        for server in self._servers:
            server.close()
        self._servers = []
        if self._rollout is not None:
            rollout, self._rollout = self._rollout, None
            rollout.leave()

    def _found(self, task: Task) -> Any:
        # The tasks may have been listed by another instance.
        found = next(iter(self._taskset.include(idx=[f"{task.data}:{task.data + 1}"])), None)
        if found is None or found.key != task.id:
            raise UsageError(f"{self.name}: task {task.data} is not {task.id}; the taskset or its options have changed")
        self._check(found)
        return found

    def _enter(self, context: contextlib.AbstractAsyncContextManager[Any], step: str) -> Held[Any]:
        try:
            return self._background.enter(context, self._timeout_s)
        except TimeoutError as error:
            raise EnvironmentLost(
                f"{self.name}: {step} took more than {self._timeout_s:g} s; raise timeout_s"
            ) from error
        except Exception as error:
            raise EnvironmentLost(f"{self.name}: {step} failed: {error}") from error

    def _check(self, task: Any) -> None:
        where = f"{self.name}: task {task.data.idx}"
        if type(task).NEEDS_CONTAINER or task.data.image:
            raise UsageError(f"{where} needs a container; only tasks that run in a subprocess are supported")
        hooks = require("verifiers.v1.utils.decorators", "verifiers").discover_decorated(task, "intercept")
        if hooks:
            raise UsageError(f"{where} has the hook @intercept {hooks[0].__name__!r}, which would not be asked")
        if (stops := task.hooks("stop")) and not self._ignore_stops:
            raise UsageError(
                f"{where} has the hook @stop {stops[0].__name__!r}, which would not be asked; if an episode may go on "
                "all the same, set ignore_stops"
            )
        if task.data.prompt is None:
            raise UsageError(f"{where} has no prompt: a user opens it, which is not supported")
        _prompt(task.data, where)

    @contextlib.asynccontextmanager
    async def _play(self, task: Any) -> AsyncIterator[_Rollout]:
        rollout = _Rollout(self._vf, task, self._shared.value if self._shared else {}, self.name)
        try:
            await rollout.open()
            yield rollout
        finally:
            await rollout.close()


class _Rollout:
    """verifiers' rollout, of an agent that is outside."""

    def __init__(self, vf: Any, task: Any, shared: dict[str, Any], owner: str) -> None:
        from verifiers.v1.rollout import Rollout, RolloutTimeouts
        from verifiers.v1.session import RolloutLimits

        class Outside(vf.Harness):  # type: ignore[misc]
            """An agent that verifiers does not run."""

            APPENDS_SYSTEM_PROMPT = SUPPORTS_MCP = True
            EXECUTES_CODE = NEEDS_CONTAINER = False

            async def launch(self, *args: Any, **kwargs: Any) -> Any:
                """Never: no turn is taken through verifiers."""
                raise NotImplementedError

        self._vf, self._task = vf, task
        self.messages = _prompt(task.data, owner)
        self.tools: tuple[dict[str, Any], ...] = ()
        runtime = vf.SubprocessConfig()
        self._rollout = Rollout(
            task=task,
            agent_config=vf.AgentConfig(runtime=runtime, model="attar"),
            harness=Outside(vf.HarnessConfig(id="attar")),
            ctx=vf.ModelContext(model="attar", client=vf.EvalClientConfig()),
            runtime_config=runtime,
            timeouts=RolloutTimeouts(),
            limits=RolloutLimits(),
            shared_tools=shared,
        )
        self.trace = self._rollout.trace

    @property
    def urls(self) -> dict[str, str]:
        """Tool servers by name."""
        urls: dict[str, str] = self._rollout._urls
        return urls

    async def open(self) -> None:
        if not await self._rollout.open():
            error = self.trace.last_error
            raise RunError(error.message if error else f"stopped: {self.trace.stop_condition}")

    async def judge(self, messages: Sequence[Message]) -> None:
        """Enter what was said, turn by turn, as if verifiers had asked a model; then end and score."""
        from verifiers.v1 import graph

        vf = self._vf
        tools = [vf.Tool(**schema["function"]) for schema in self.tools]
        said = [_message(vf, message) for message in messages]
        given = len(self.messages)
        for number, message in enumerate(messages):
            if message.role == "assistant" and number >= given:
                answer = vf.Response(
                    id=f"attar-{number}",
                    created=0,
                    model="attar",
                    message=said[number],
                    finish_reason="tool_calls" if message.tool_calls else "stop",
                )
                node = graph.prepare_turn(self.trace, said[:number], tools).commit(answer)
                self.trace.calls.append(vf.ModelCall(node=node, model="attar", finish_reason=answer.finish_reason))
        await self._rollout.close()

    async def close(self) -> None:
        if not self._rollout.closed:
            await self._rollout.abort()


def _prompt(data: Any, where: str) -> tuple[Message, ...]:
    system = () if data.system_prompt is None else (Message("system", data.system_prompt),)
    if isinstance(data.prompt, str):
        return (*system, Message("user", data.prompt))
    messages = []
    for message in data.prompt:
        if getattr(message, "tool_calls", None) or message.role == "tool":
            raise UsageError(f"{where}: its prompt holds tool calls, which is not supported")
        content = message.content or ""
        if not isinstance(content, str):
            if any(part.type != "text" for part in content):
                raise UsageError(f"{where}: its prompt holds what is no text, which is not supported")
            content = "".join(part.text for part in content)
        messages.append(Message(message.role, content))
    return (*system, *messages)


def _message(vf: Any, message: Message) -> Any:
    match message.role:
        case "assistant":
            calls = [
                vf.ToolCall(id=call.id or f"call-{number}", name=call.name, arguments=json.dumps(call.arguments))
                for number, call in enumerate(message.tool_calls)
            ]
            return vf.AssistantMessage(
                content=message.content, reasoning_content=message.reasoning, tool_calls=calls or None
            )
        case "tool":
            return vf.ToolMessage(
                tool_call_id=message.tool_call_id or "call-0", content=message.content, name=message.name
            )
        case "user":
            return vf.UserMessage(content=message.content)
        case _:
            return vf.SystemMessage(content=message.content)


def _lowest(rewards: Mapping[str, Any]) -> str:
    """The reward that is farthest from its best."""
    missing = {name: (1 - reward.score) * reward.weight for name, reward in rewards.items() if reward is not None}
    return max(missing, key=lambda name: missing[name]) if missing else "no reward"


def _check_splits(splits: Mapping[str, tuple[int, int]]) -> None:
    taken: list[tuple[int, int, str]] = []
    for split, (first, end) in splits.items():
        if not 0 <= first < end:
            raise UsageError(f"splits: {split!r} is tasks {first} to {end}; wanted a first one and one after the last")
        for start, stop, other in taken:
            if first < stop and start < end:
                raise UsageError(f"splits: {split!r} and {other!r} share tasks; move one of them")
        taken.append((first, end, split))
