"""The API engine against a bare client loop and a peer, on a loopback server with a fixed delay.

    python benchmarks/engine_throughput.py [--requests 3000] [--rounds 2] [--memory 50000] [--peer-python PYTHON]

The server, in a process of its own, answers every chat completion after 100 ms; 256 requests are in flight. The bare
loop is 256 coroutines that await the same provider's client (`openai`, asynchronous, its retries off) and read the text
of each answer. The engine does the same work and writes every answer to its ledger. Sides take turns; the best round of
each counts. The peer is distilabel's `OpenAILLM` in a Python of its own (`--peer-python`, null where none is named),
given the same requests in batches of 256, as its steps are. Memory: the resident size of this process over so many
further requests, after the first tenth. The last line is JSON.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

DELAY_S = 0.1
IN_FLIGHT = 256
TEXT = "How many are two and two? Request {}."

SERVER = """
import asyncio, json
BODY = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "loopback", "choices": [
    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "They are four, always."}}],
    "usage": {"prompt_tokens": 20, "completion_tokens": 6, "total_tokens": 26}}).encode()
HEAD = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(BODY)

class Http(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.buffer = transport, b""
    def data_received(self, data):
        self.buffer += data
        while (end := self.buffer.find(b"\\r\\n\\r\\n")) >= 0:
            size = 0
            for line in self.buffer[:end].split(b"\\r\\n"):
                if line.lower().startswith(b"content-length:"):
                    size = int(line.split(b":")[1])
            if len(self.buffer) < end + 4 + size:
                return
            self.buffer = self.buffer[end + 4 + size:]
            asyncio.get_running_loop().call_later(DELAY, self.answer)
    def answer(self):
        if not self.transport.is_closing():
            self.transport.write(HEAD + BODY)

async def main():
    server = await asyncio.get_running_loop().create_server(Http, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""

PEER = """
import sys, time
from distilabel.models import OpenAILLM
url, requests, in_flight, text = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
llm = OpenAILLM(model="loopback", base_url=url, api_key="none", timeout=600, max_retries=0)
llm.load()
def ask(first, last):
    chats = [[{"role": "user", "content": text.format(i)}] for i in range(first, last)]
    return llm.generate_outputs(inputs=chats, max_new_tokens=16)
ask(0, in_flight)
started = time.perf_counter()
for first in range(0, requests, in_flight):
    ask(first, min(first + in_flight, requests))
print(requests / (time.perf_counter() - started))
"""


def say(text):
    print(text, file=sys.stderr, flush=True)


def bare(url, requests):
    """Requests a second of 256 coroutines around the client, and nothing else."""
    import httpx2
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    async def run():
        pool = httpx2.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
        client = AsyncOpenAI(
            base_url=url, api_key="none", max_retries=0, timeout=60, http_client=DefaultAsyncHttpxClient(limits=pool)
        )
        numbers = iter(range(requests))

        async def worker():
            for number in numbers:
                answer = await client.chat.completions.create(
                    model="loopback", messages=[{"role": "user", "content": TEXT.format(number)}], max_tokens=16
                )
                assert answer.choices[0].message.content

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
        rate = requests / (time.perf_counter() - started)
        await client.close()
        return rate

    return asyncio.run(run())


def engine(url, requests, folder, watch=None):
    """Requests a second through the engine, each answer in its ledger."""
    from attar.data.types import Message
    from attar.engines.api import ApiEngine
    from attar.engines.base import Answer, ChatRequest
    from attar.engines.flow import Limits
    from attar.engines.ledger import Ledger
    from attar.engines.prices import Price
    from attar.engines.servers import Server

    ledger = Ledger(Path(tempfile.mkdtemp(dir=folder)) / "ledger.sqlite", budget_usd=1e6)
    price = Price(1.0, 2.0, 1.0, 1.0, 1.0, "benchmark")
    made = ApiEngine(
        Server("openai", "loopback", url, "none", "-"), Limits(IN_FLIGHT, 60, 600), price=price, ledger=ledger
    )
    asked = (ChatRequest((Message("user", TEXT.format(i)),), 16) for i in range(requests))
    started = time.perf_counter()
    for done, (_, answer) in enumerate(made.chat(asked)):
        assert isinstance(answer, Answer)
        if watch is not None and done % 500 == 0:
            watch(done)
    rate = requests / (time.perf_counter() - started)
    assert ledger.spend().calls == requests
    ledger.close()
    return rate


def peer(python, url, requests):
    command = [python, "-c", PEER, url, str(requests), str(IN_FLIGHT), TEXT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    except subprocess.TimeoutExpired:
        say("the peer did not end within 100 s")
        return None
    if done.returncode:
        say(f"the peer failed: {done.stderr.strip().splitlines()[-1:]}")
        return None
    return float(done.stdout.split()[-1])


def memory_growth(url, requests, folder):
    """Megabytes of resident memory that came after the first tenth of the requests."""
    process = psutil.Process()
    sizes = []

    def watch(done):
        if done >= requests // 10:
            sizes.append(process.memory_info().rss)

    engine(url, requests, folder, watch)
    return (max(sizes) - sizes[0]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", type=int, default=50_000)
    parser.add_argument("--peer-python", default=os.environ.get("ATTAR_PEER_PYTHON"))
    args = parser.parse_args()
    server = subprocess.Popen([sys.executable, "-c", f"DELAY = {DELAY_S}\n{SERVER}"], stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
        best = {"bare": 0.0, "engine": 0.0, "peer": 0.0}
        with tempfile.TemporaryDirectory() as folder:
            bare(url, IN_FLIGHT)
            for number in range(args.rounds):
                best["bare"] = max(best["bare"], bare(url, args.requests))
                best["engine"] = max(best["engine"], engine(url, args.requests, folder))
                if args.peer_python:
                    best["peer"] = max(best["peer"], peer(args.peer_python, url, args.requests // 2) or 0.0)
                say(f"round {number}: " + ", ".join(f"{side} {rate:.0f}/s" for side, rate in best.items()))
            growth = memory_growth(url, args.memory, folder) if args.memory else None
    finally:
        server.terminate()
        server.wait()
    result = {
        "of_bare_client": round(best["engine"] / best["bare"], 3),
        "of_peer": round(best["engine"] / best["peer"], 2) if best["peer"] else None,
        "peer": "distilabel OpenAILLM" if best["peer"] else None,
        "rss_growth_mb": None if growth is None else round(growth, 1),
        "requests_per_s": {side: round(rate, 1) for side, rate in best.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
