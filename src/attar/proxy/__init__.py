"""One streaming proxy in front of an API of OpenAI's or Anthropic's shape; recorder and gateway stand on it.

What upstream answers reaches the client byte for byte and at once; headers that belong to one connection stay on it
(RFC 9110, section 7.6.1). An observer is told what passes, after it has passed; it can neither change nor stop it.

A failure of the proxy's own comes as an API error in the provider's shape, with the header ``x-attar-error``: 401, 413,
502 (no answer from upstream), 504 (upstream was silent too long). Once an answer has begun, a broken stream of events
gets a last event that says so, if the one before was whole; then the connection is cut, as upstream's was.
"""

from attar.proxy.calls import App, Call, Headers, Listener, Observer, Provider
from attar.proxy.forward import Limits, Proxy
from attar.proxy.server import guarded, is_loopback, listen, make_server, serve

__all__ = [
    "App",
    "Call",
    "Headers",
    "Limits",
    "Listener",
    "Observer",
    "Provider",
    "Proxy",
    "guarded",
    "is_loopback",
    "listen",
    "make_server",
    "serve",
]
