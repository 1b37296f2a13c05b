"""What the recorder adds to a call's latency, at 200 requests a second on two cores.

    python benchmarks/record_latency.py [--rate 200] [--pairs 8] [--block-s 5]

Four processes on the loopback: a scripted upstream (each answer after 20 ms; a quarter of them streams of 16 events,
2 ms apart), the recorder as `attar record` runs it, and an open-loop client (requests start on schedule, whether or
not earlier ones are back; latency counts from the schedule to the last byte). Blocks go to the upstream directly and
through the recorder in turn (direct, through, through, direct, ...). The figures are the difference of the quantiles of
the two sides over all blocks, each block's first half second left out. Every call must have been recorded. The last
line is JSON.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

DELAY_S, EVENTS, GAP_S = 0.02, 16, 0.002
LIMITS = {"added_p50_ms": 3.0, "added_p99_ms": 10.0}
SETTLING_S = 0.5
TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 24


def request_bytes(host, number):
    streamed = number % 4 == 0
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": f"Question {number}: {TEXT[:200]}"}]
    body = json.dumps({"model": "m", "messages": messages, "stream": streamed}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer sk-{'x' * 40}\r\n"
        f"content-type: application/json\r\nx-attar-episode: {number // 8}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


# The upstream: a bare protocol, so that its own work does not hide what is measured.


class Upstream(asyncio.Protocol):
    whole = None

    def connection_made(self, transport):
        self.transport, self.buffer = transport, b""

    def data_received(self, data):
        self.buffer += data
        head, separator, body = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(body) >= length:
            self.buffer = body[length:]
            loop = asyncio.get_running_loop()
            loop.call_later(DELAY_S, self.stream if b'"stream": true' in body[:length] else self.answer)

    def answer(self):
        self.transport.write(self.whole)

    def stream(self, number=0):
        if number == 0:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
        if number == EVENTS:
            self.transport.write(b"0\r\n\r\n")
            return
        choice = {"index": 0, "delta": {"content": f"word {number} "}, "finish_reason": None}
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        data = f"data: {json.dumps(chunk)}\n\n".encode()
        self.transport.write(b"%x\r\n%s\r\n" % (len(data), data))
        asyncio.get_running_loop().call_later(GAP_S, self.stream, number + 1)


def run_upstream(pipe):
    message = {"role": "assistant", "content": TEXT[:800]}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = json.dumps(
        {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    ).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    Upstream.whole = head + body

    async def serve():
        server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=2048)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(serve())


# The client


class Connection(asyncio.Protocol):
    """One request at a time; done when the body's end is seen."""

    def connection_made(self, transport):
        self.transport, self.done = transport, None

    def ask(self, request):
        self.buffer, self.length = bytearray(), None
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.done

    def data_received(self, data):
        self.buffer += data
        if self.length is None and (at := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:at]).lower()
            if not head.startswith(b"http/1.1 200"):
                self.done.set_exception(RuntimeError(head[:200].decode()))
                return
            chunked = b"transfer-encoding: chunked" in head
            sized = None if chunked else int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            self.length = 0 if chunked else at + 4 + sized
        over = self.buffer.endswith(b"0\r\n\r\n") if self.length == 0 else len(self.buffer) >= (self.length or 1 << 60)
        if over and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error):
        if self.done is not None and not self.done.done():
            self.done.set_exception(error or ConnectionError("closed"))


async def block(port, rate, seconds, first):
    """Latencies in seconds of one block of requests."""
    loop = asyncio.get_running_loop()
    idle, latencies = [], []

    async def one(due, number):
        connection = idle.pop() if idle else (await loop.create_connection(Connection, "127.0.0.1", port))[1]
        await connection.ask(request_bytes(f"127.0.0.1:{port}", number))
        latencies.append((due, loop.time() - due))
        idle.append(connection)

    begin = loop.time() + 0.05
    tasks = []
    for i in range(int(rate * seconds)):
        due = begin + i / rate
        if (wait := due - loop.time()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(due, first + i)))
    await asyncio.gather(*tasks)
    for connection in idle:
        connection.transport.close()
    return [latency for due, latency in latencies if due - begin >= SETTLING_S]


def run_client(pipe):
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        run = asyncio.run

    async def work():
        while (task := await asyncio.to_thread(pipe.recv)) is not None:
            pipe.send(await block(*task))

    run(work())


def quantile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--block-s", type=float, default=5.0)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    upstream = context.Process(target=run_upstream, args=(theirs,), daemon=True)
    upstream.start()
    upstream_port = ours.recv()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from attar.cli import main; main()", "record", "--port", "0", "--json"]
        command += ["--upstream", f"http://127.0.0.1:{upstream_port}", "--folder", folder]
        recorder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        port = int(recorder.stderr.readline().split("http://127.0.0.1:")[2].split("/")[0])
        started = psutil.Process(recorder.pid).cpu_times()
        pipe, other = context.Pipe()
        client = context.Process(target=run_client, args=(other,), daemon=True)
        client.start()
        taken = {"direct": [], "through": []}
        asked = 0
        ports = {"direct": upstream_port, "through": port}
        for pair in range(-1, args.pairs):
            sides = ["direct", "through"] if pair % 2 else ["through", "direct"]
            for side in sides:
                pipe.send((ports[side], args.rate, args.block_s if pair >= 0 else 2.0, asked))
                found = pipe.recv()
                asked += int(args.rate * (args.block_s if pair >= 0 else 2.0)) if side == "through" else 0
                if pair >= 0:
                    taken[side] += found
                shown = ", ".join(f"p{share * 100:g} {quantile(found, share) * 1000:.2f} ms" for share in (0.5, 0.99))
                print(f"pair {pair}, {side}: {len(found)} calls, {shown}", file=sys.stderr, flush=True)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/attar/health") as response:
            health = json.load(response)
        times = psutil.Process(recorder.pid).cpu_times()
        recorder.send_signal(signal.SIGINT)
        result = json.loads(recorder.communicate(timeout=90)[0])
        size = sum(path.stat().st_size for path in Path(folder).glob("*.jsonl"))
    pipe.send(None)
    client.join(10)
    upstream.kill()
    if result["recorded"] != asked or result["lost"]:
        sys.exit(f"asked {asked} calls, recorded {result['recorded']}, lost {result['lost']}")
    added = {
        f"added_p{share * 100:g}_ms": round(
            (quantile(taken["through"], share) - quantile(taken["direct"], share)) * 1000, 3
        )
        for share in (0.5, 0.99)
    }
    spent = (times.user + times.system - started.user - started.system) / asked * 1000
    print(f"the recorder's own CPU time: {spent:.2f} ms a call, writing included", file=sys.stderr)
    print(f"waiting at the end: {health['waiting_bytes']} bytes; {size / asked:.0f} bytes a row", file=sys.stderr)
    for key, limit in LIMITS.items():
        print(f"{key}: {added[key]} ({'within' if added[key] <= limit else 'OVER'} {limit})", file=sys.stderr)
    print(json.dumps(added))


if __name__ == "__main__":
    random.seed(0)
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
