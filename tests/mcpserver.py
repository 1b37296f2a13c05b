"""An MCP server for tests: over standard input and output, or, with a port, HTTP on the loopback."""

import os
import sys
import time
from typing import Any

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("notes")
notes: list[str] = []


@server.tool()
def write(text: str, urgent: bool = False) -> str:
    """Write a note.

    Args:
        text: what to write
    """
    notes.append(text.upper() if urgent else text)
    return f"{len(notes)} notes in process {os.getpid()}"


@server.tool()
def read() -> dict[str, Any]:
    """Read all notes."""
    return {"notes": notes, "seen": os.environ.get("NOTES", ""), "folder": os.getcwd()}


@server.tool()
def fail(kind: str) -> str:
    """Fail in some way."""
    match kind:
        case "error":
            raise ToolError("there is no paper")
        case "hang":
            time.sleep(60)
        case "die":
            sys.stderr.write("out of ink")
            sys.stderr.flush()
            os._exit(3)
    return ""


@server.tool(structured_output=False)
def draw() -> list[Any]:
    """Draw a note."""
    return ["a dot:", Image(data=b"\x89PNG", format="png")]


@server.tool()
def key(context: Context) -> str:
    """The key that came with the request."""
    request = context.request_context.request
    return "none" if request is None else request.headers.get("x-key", "none")


@server.tool(structured_output=True)
def nothing() -> list[str]:
    """No text at all."""
    return []


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
