import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attar.agents.environments import Task, ToolError
from attar.agents.functions import FunctionEnvironment
from attar.agents.mcp import McpServer
from attar.data.episodes import Outcome
from attar.errors import EnvironmentLost, MissingExtra, UsageError

SERVER = [sys.executable, str(Path(__file__).with_name("mcpserver.py"))]


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*SERVER, str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()


def both(server):
    names = [schema["function"]["name"] for schema in server.schemas]
    assert names == ["write", "read", "fail", "draw", "key", "nothing"]
    assert server.schemas[0]["function"]["description"].startswith("Write a note.")
    assert server.schemas[0]["function"]["parameters"]["required"] == ["text"]
    before = len(json.loads(server.call("read", {}))["notes"])
    assert server.call("write", {"text": "milk", "urgent": True}).startswith(f"{before + 1} notes")
    assert json.loads(server.call("read", {}))["notes"][before:] == ["MILK"]
    assert server.call("draw", {}) == "a dot:\n[image, image/png, not shown]"
    assert server.call("nothing", {}) == {"result": []}
    with pytest.raises(ToolError, match="there is no paper"):
        server.call("fail", {"kind": "error"})
    with pytest.raises(ToolError, match="text"):
        server.call("write", {"words": 3})
    with pytest.raises(ToolError, match="there is no tool 'erase'; there are: write, read"):
        server.call("erase", {})


def process(server):
    return int(re.search(r"process (\d+)", server.call("my_write", {"text": "x"}))[1])


def test_a_server_over_http(address):
    with McpServer(address, headers={"X-Key": "secret"}) as server:
        both(server)
        assert server.call("key", {}) == "secret"


def test_one_session_for_all_episodes_and_one_that_hangs_is_lost(address):
    with McpServer(address, keep=True, timeout_s=20) as server:
        server.call("read", {})
        session = server._held
        server.begin()
        server.call("read", {})
        assert server._held is session
        server._timeout_s = 0.3
        with pytest.raises(EnvironmentLost, match=r"call of 'fail' took more than 0\.3 s; raise timeout_s"):
            server.call("fail", {"kind": "hang"})
        with pytest.raises(EnvironmentLost, match="is gone; a new episode starts another"):
            server.call("read", {})
        server._timeout_s = 20
        server.begin()
        assert server.call("read", {})


def test_a_server_over_its_standard_input_and_output(tmp_path):
    with McpServer(SERVER, env={"NOTES": "seen"}, folder=tmp_path, prefix="my_") as server:
        assert [schema["function"]["name"] for schema in server.schemas][:2] == ["my_write", "my_read"]
        # Only asked for its tools, it is still as good as new.
        server.begin()
        assert json.loads(server.call("my_read", {})) == {"notes": [], "seen": "seen", "folder": str(tmp_path)}
        with pytest.raises(ToolError, match="there is no tool 'read'"):
            server.call("read", {})
        first = process(server)
        # Every episode gets a new process.
        server.begin()
        second = process(server)
        assert second != first
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
        # One that dies is an error, until the next episode.
        with pytest.raises(EnvironmentLost, match=r"call of 'my_fail' failed: .*; it wrote: (?s:.*)out of ink"):
            server.call("my_fail", {"kind": "die"})
        with pytest.raises(EnvironmentLost, match="is gone; a new episode starts another"):
            server.call("my_read", {})
        server.begin()
        assert json.loads(server.call("my_read", {}))["notes"] == []


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ([sys.executable, "-c", "raise SystemExit('no such module')"], "start failed: .*; it wrote: no such module"),
        (["/nowhere/server"], "start failed: FileNotFoundError"),
        ("http://127.0.0.1:9/mcp", "MCP server http://127.0.0.1:9/mcp: start failed"),
    ],
)
def test_a_server_that_does_not_start(server, why):
    with McpServer(server, timeout_s=30) as lost, pytest.raises(EnvironmentLost, match=why):
        _ = lost.schemas


@pytest.mark.parametrize(
    ("server", "options", "why"),
    [
        ("python server.py", {}, r"is no http\(s\) URL; give a command as a list, \['python', 'server.py'\]"),
        ([], {}, "an empty command"),
        ("http://x/mcp", {"env": {}}, "env and folder are for a command"),
        (["x"], {"headers": {}}, "headers are for a URL"),
        (["x"], {"timeout_s": 0}, "timeout_s is 0"),
    ],
)
def test_options_that_do_not_go_together(server, options, why):
    with pytest.raises(UsageError, match=why):
        McpServer(server, **options)


def test_an_environment_starts_a_server_when_an_episode_begins():
    task = Task("1", "notes", {"user": "Write milk."})
    environment = FunctionEnvironment([McpServer(["/nowhere/server"])], {"test": [task]}, lambda *all: Outcome(True))
    with pytest.raises(EnvironmentLost, match="/nowhere/server: start failed: FileNotFoundError"):
        environment.start(task)


def test_secrets_in_a_url_are_not_shown():
    with McpServer("https://me:secret@example.org:8080/mcp?key=secret") as server:
        assert server.name == "https://example.org:8080/mcp"


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(MissingExtra, match=r'pip install "attar\[mcp\]"'):
        McpServer(SERVER)
