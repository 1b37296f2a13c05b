"""MCP servers as sources of tools, through the official client.

The client is asynchronous; each server has an event loop in a thread of its own.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self, TextIO, TypeVar, cast
from urllib.parse import urlsplit

from attar.agents.background import Background, Held
from attar.agents.environments import ToolError
from attar.agents.functions import unknown_tool
from attar.data.schemas import check_tools
from attar.errors import BadTools, EnvironmentLost, UsageError, require

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult

__all__ = ["McpServer"]

_T = TypeVar("_T")

# Pages of tools, before a server is held to list them without end.
_MOST_PAGES = 100
# What a server wrote to its standard error, of which the end stands in a message.
_SHOWN_CHARS = 600


class McpServer:
    """The tools of one MCP server.

    A server that is started by a command gets a new process for every episode in which the one before was used, so
    that episodes do not see what others left behind. One at a URL only gets a new session: what it keeps beyond that
    is its own.

    Args:
        server: a command with its arguments, spoken to over its standard input and output, or a URL (streamable HTTP).
        env: environment variables of the process, beside those that MCP's client hands on (``PATH``, ``HOME``, ...).
        folder: in which the process runs.
        headers: of every HTTP request.
        prefix: put before the name of each tool, for servers whose tools share names.
        keep: one process or session for all episodes, for a server that keeps nothing between calls.
        timeout_s: the longest that a call, or the start of the server, may take, in seconds.

    Raises:
        MissingExtra: MCP's client is not installed.
        UsageError: options that do not go together.
    """

    def __init__(
        self,
        server: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
        headers: Mapping[str, str] | None = None,
        prefix: str = "",
        keep: bool = False,
        timeout_s: float = 60.0,
    ) -> None:
        require("mcp", "mcp")
        self._at_url = at_url = isinstance(server, str)
        if isinstance(server, str) and urlsplit(server).scheme not in ("http", "https"):
            raise UsageError(f"MCP server {server!r} is no http(s) URL; give a command as a list, {server.split()!r}")
        if not server:
            raise UsageError("MCP server [] is an empty command; wanted the program and its arguments")
        if at_url and (env is not None or folder is not None):
            raise UsageError(f"MCP server {_shown(server)}: env and folder are for a command, not for a URL")
        if not at_url and headers is not None:
            raise UsageError(f"MCP server {_shown(server)}: headers are for a URL, not for a command")
        if not timeout_s > 0:
            raise UsageError(f"MCP server {_shown(server)}: timeout_s is {timeout_s}; wanted a positive number")
        self.name = _shown(server)
        self._server = server
        self._env, self._folder, self._headers = env, folder, headers
        self._prefix, self._keep, self._timeout_s = prefix, keep, timeout_s
        self._background = Background(f"mcp {self.name}")
        self._held: Held[Client] | None = None
        self._used = self._gone = False
        self._schemas: tuple[dict[str, Any], ...] | None = None

    @property
    def schemas(self) -> tuple[dict[str, Any], ...]:
        """The tools on offer, as OpenAI schemas; starts the server.

        Raises:
            EnvironmentLost: the server does not start, is gone, or is too slow.
            BadTools: a tool that cannot be offered.
        """
        if self._schemas is None:
            listed = self._ask(self._list, "tools/list")
            schemas = tuple(_schema(tool, self._prefix) for tool in listed)
            check_tools(schemas, f"MCP server {self.name}")
            self._schemas = schemas
        return self._schemas

    def begin(self) -> None:
        """An episode begins: a server that was used, or is gone, is let go; the next need starts another."""
        if self._gone or (self._used and not self._keep):
            self._let_go()

    def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """The text that a tool answers with; its structured result, where it has no text.

        Parts that are no text (images, sounds) are named in its place, not shown.

        Raises:
            ToolError: there is no such tool, or the server says that the call failed.
            EnvironmentLost: the server is gone, or too slow; the next ``begin`` starts another.
        """
        names = [schema["function"]["name"] for schema in self.schemas]
        if tool not in names:
            raise unknown_tool(tool, names)
        self._used = True
        name = tool.removeprefix(self._prefix)
        result = self._ask(lambda client: client.call_tool(name, arguments), f"call of {tool!r}", of_agent=True)
        text = "\n".join(_texts(result))
        if result.is_error:
            raise ToolError(text or f"{tool} failed, and its server does not say why")
        return text if result.content else result.structured_content

    def close(self) -> None:
        """Let the server go, and end the thread."""
        self._let_go()
        self._background.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, question: Callable[[Client], Coroutine[Any, Any, _T]], step: str, of_agent: bool = False) -> _T:
        """What the server answers; ``of_agent``: what it refuses is the agent's error, not the server's."""
        from mcp import MCPError

        if self._held is None:
            self._start()
        if self._gone or self._held is None:
            raise EnvironmentLost(f"MCP server {self.name} is gone; a new episode starts another")
        try:
            return self._background.run(question(self._held.value), self._timeout_s)
        except Exception as error:
            if of_agent and isinstance(error, MCPError) and not self._broken(error.code):
                raise ToolError(error.message) from error
            self._gone = True
            raise self._lost(step, error) from error

    def _start(self) -> None:
        self._used = self._gone = False
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self._held = self._background.enter(self._connected(self._errors), self._timeout_s)
        except BaseException as error:
            lost = self._lost("start", error) if isinstance(error, Exception) else error
            self._errors.close()
            raise lost from error

    def _broken(self, code: int) -> bool:
        """Whether an error is the connection's: the client gives such the codes that a server's own may have."""
        from mcp import types

        broken = {types.CONNECTION_CLOSED, types.REQUEST_TIMEOUT, types.PARSE_ERROR, types.INVALID_REQUEST}
        # A status of 5xx, or of 404; from a process these are the server's own words.
        return code in (broken | {types.INTERNAL_ERROR, types.METHOD_NOT_FOUND} if self._at_url else broken)

    def _lost(self, step: str, error: Exception) -> EnvironmentLost:
        inner = _innermost(error)
        if isinstance(inner, TimeoutError):
            why = f"took more than {self._timeout_s:g} s; raise timeout_s, or mend what hangs"
        else:
            why = f"failed: {type(inner).__name__}: {str(inner) or 'no reason given'}"
        self._errors.seek(0)
        said = self._errors.read().strip()[-_SHOWN_CHARS:]
        return EnvironmentLost(f"MCP server {self.name}: {step} {why}{f'; it wrote: {said}' if said else ''}")

    def _let_go(self) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            held.leave()
            self._errors.close()

    async def _list(self, client: Client) -> list[Any]:
        tools: list[Any] = []
        cursor = None
        for _ in range(_MOST_PAGES):
            page = await client.list_tools(cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if cursor is None:
                return tools
        raise BadTools(f"MCP server {self.name} lists its tools in more than {_MOST_PAGES} pages, so without end")

    @contextlib.asynccontextmanager
    async def _connected(self, errors: IO[str]) -> AsyncIterator[Client]:
        import mcp
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamable_http_client

        async with contextlib.AsyncExitStack() as stack:
            if isinstance(self._server, str):
                http = None
                if self._headers is not None:
                    import httpx2

                    # The read has no limit of its own: each call has the server's.
                    limits = httpx2.Timeout(self._timeout_s, read=None)
                    http = httpx2.AsyncClient(headers=dict(self._headers), timeout=limits)
                    await stack.enter_async_context(http)
                transport: Any = streamable_http_client(self._server, http_client=http)
            else:
                command, *rest = self._server
                env = None if self._env is None else dict(self._env)
                process = mcp.StdioServerParameters(command=command, args=rest, env=env, cwd=self._folder)
                transport = stdio_client(process, errlog=cast(TextIO, errors))
            yield await stack.enter_async_context(mcp.Client(transport))


def _schema(tool: Any, prefix: str) -> dict[str, Any]:
    about = {"name": prefix + tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": about}


def _texts(result: CallToolResult) -> Iterator[str]:
    for part in result.content:
        if part.type == "text":
            yield part.text
        elif part.type == "resource_link":
            yield f"[link to {part.uri}]"
        elif part.type == "resource" and hasattr(part.resource, "text"):
            yield part.resource.text
        else:
            kind = getattr(part, "mime_type", None) or getattr(getattr(part, "resource", None), "mime_type", None)
            yield f"[{part.type}{f', {kind}' if kind else ''}, not shown]"


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _shown(server: str | Sequence[str]) -> str:
    """The server in messages: a URL without what may be secret, or the command."""
    if not isinstance(server, str):
        return " ".join(server)
    parts = urlsplit(server)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"
