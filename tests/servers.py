"""Scripted servers on the loopback interface, for tests of API engines. What they say is made up."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Reply:
    """What a scripted server sends: a body (JSON, or bytes as they are), after a wait; ``cut`` closes without it."""

    def __init__(self, body, status=200, *, headers=None, wait_s=0.0, cut=False):
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status, self.headers, self.wait_s, self.cut = status, headers or {}, wait_s, cut


class ScriptedServer:
    """Answers every POST by ``script(number, body, path)``, numbered from 0 in order of arrival."""

    def __init__(self, script):
        self.requests = []
        self.headers = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # One segment an answer: else the kernel holds the second back for 40 ms.
            wbufsize = -1
            disable_nagle_algorithm = True

            def do_POST(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                json_type = self.headers.get("Content-Type", "").startswith("application/json")
                body = json.loads(content) if json_type else content
                with outer._lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                try:
                    self._answer(script(number, body, self.path))
                finally:
                    with outer._lock:
                        outer._now -= 1

            def do_GET(self):
                self._answer(script(None, None, self.path))

            def _answer(self, reply):
                time.sleep(reply.wait_s)
                if reply.cut:
                    self.close_connection = True
                    return
                try:
                    self.send_response(reply.status)
                    for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(reply.body)))
                    self.end_headers()
                    self.wfile.write(reply.body)
                    self.wfile.flush()
                except OSError:
                    self.close_connection = True

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, client_address):
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def chat(text="4", *, finish="stop", prompt=10, completion=2, cached=0, **message):
    """A response of ``/v1/chat/completions``."""
    return Reply(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "scripted-1",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
            ],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": cached},
            },
        }
    )


def error(status, message="no", code=None, **headers):
    """An error in OpenAI's shape."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply({"error": {"message": message, "type": code, "code": code}}, status, headers=names)
