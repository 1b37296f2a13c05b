"""The recorder in front of a real llama.cpp server, called by the providers' own clients.

    python benchmarks/record_clients.py GGUF [FOLDER]

Starts llama.cpp's server (through xllamacpp) with the model and `attar record` in front of it, and asks both the same
with `openai` and `anthropic`: synchronous and asynchronous, streaming and not, with and without a tool. Greedy answers
through the recorder must be those of the server itself, and the folder must hold every call: what the client saw, put
together, usage and times. The last line is JSON.
"""

import asyncio
import json
import multiprocessing
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anthropic
import openai

from attar.collect.exchange import conversation_of
from attar.collect.store import Reading, read_exchanges

KEY = "sk-local-0123456789abcdef0123456789abcdef"
QUESTION = [{"role": "user", "content": "Name three primary colours. My address is alice@example.com."}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CITY = [{"role": "user", "content": "What is the weather in Paris? Use the tool."}]
LENGTH = 24


def run_server(path, pipe):
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = 4096
    parameters.n_parallel = 1
    parameters.use_jinja = True
    parameters.verbosity = -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    pipe.send(server.listening_address)
    pipe.recv()


def openai_calls():
    """Name -> arguments of a chat call."""
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
    common = {"model": "smollm2", "temperature": 0, "seed": 0, "max_tokens": LENGTH}
    return {
        "text": common | {"messages": QUESTION},
        "tool": common | {"messages": CITY, "tools": [tool], "tool_choice": "required"},
    }


def anthropic_calls():
    tool = {"name": "get_weather", "description": "The weather in a city", "input_schema": PARAMETERS}
    common = {"model": "smollm2", "max_tokens": LENGTH, "extra_body": {"temperature": 0}}
    return {
        "text": common | {"messages": QUESTION},
        "tool": common | {"messages": CITY, "tools": [tool], "tool_choice": {"type": "any"}},
    }


def chat_of(message):
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
    return message.content or "", calls


def joined(parts):
    """The message that a stream spelt, as the client itself reads it."""
    text, calls = "", {}
    for part in parts:
        for choice in part.choices:
            text += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                name, arguments = calls.get(call.index, ("", ""))
                calls[call.index] = (name or call.function.name, arguments + (call.function.arguments or ""))
    return text, [(name, json.loads(arguments)) for name, arguments in calls.values()]


def blocks_of(message):
    text = "".join(block.text for block in message.content if block.type == "text")
    return text, [(block.name, block.input) for block in message.content if block.type == "tool_use"]


def ask_openai(url):
    found = {}
    with openai.OpenAI(base_url=url + "/v1", api_key=KEY) as api:
        for name, call in openai_calls().items():
            found[f"openai, {name}"] = chat_of(api.chat.completions.create(**call).choices[0].message)
            options = {"stream_options": {"include_usage": True}}
            parts = list(api.chat.completions.create(**call, stream=True, **options))
            found[f"openai, {name}, stream"] = joined(parts)
    return found


async def ask_openai_async(url):
    found = {}
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key=KEY) as api:
        for name, call in openai_calls().items():
            found[f"openai async, {name}"] = chat_of((await api.chat.completions.create(**call)).choices[0].message)
            parts = [part async for part in await api.chat.completions.create(**call, stream=True)]
            found[f"openai async, {name}, stream"] = joined(parts)
    return found


def ask_anthropic(url):
    found = {}
    with anthropic.Anthropic(base_url=url, api_key=KEY) as api:
        for name, call in anthropic_calls().items():
            found[f"anthropic, {name}"] = blocks_of(api.messages.create(**call))
            with api.messages.stream(**call) as stream:
                found[f"anthropic, {name}, stream"] = blocks_of(stream.get_final_message())
    return found


async def ask_anthropic_async(url):
    found = {}
    async with anthropic.AsyncAnthropic(base_url=url, api_key=KEY) as api:
        for name, call in anthropic_calls().items():
            found[f"anthropic async, {name}"] = blocks_of(await api.messages.create(**call))
            async with api.messages.stream(**call) as stream:
                found[f"anthropic async, {name}, stream"] = blocks_of(await stream.get_final_message())
    return found


def ask_all(url):
    found = ask_openai(url) | asyncio.run(ask_openai_async(url))
    return found | ask_anthropic(url) | asyncio.run(ask_anthropic_async(url))


def answer_of(row):
    """Text and calls of a recorded answer."""
    if row["provider"] == "anthropic":
        blocks = row["response"]["content"]
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        return text, [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
    message = conversation_of(row).messages[-1]
    return message.content, [(call.name, call.arguments) for call in message.tool_calls]


def main():
    model = str(Path(sys.argv[1]).resolve())
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    server = context.Process(target=run_server, args=(model, other), daemon=True)
    server.start()
    upstream = pipe.recv()
    print(f"llama.cpp at {upstream}", file=sys.stderr, flush=True)
    direct = ask_all(upstream)

    command = [sys.executable, "-c", "from attar.cli import main; main()", "record", "--port", "0", "--json"]
    command += ["--upstream", upstream, "--folder", str(folder)]
    recorder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = recorder.stderr.readline().split("base_url to ")[1].split("/v1")[0]
    print(f"recorder at {url}", file=sys.stderr, flush=True)
    begun = time.monotonic()
    through = ask_all(url + "/w/demo/e/1")
    print(f"{len(through)} calls in {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
    recorder.send_signal(signal.SIGINT)
    result = json.loads(recorder.communicate(timeout=60)[0])
    pipe.send(None)
    server.kill()

    reading = Reading()
    every = list(read_exchanges(folder, reading))
    # The clients try again where llama.cpp closes a kept connection just as it is used; that is a row of its own.
    rows = [row for row in every if row["status"] == 200]
    for (name, wanted), row in zip(through.items(), rows, strict=True):
        text, calls = answer_of(row)
        first = row["timing"]["first_token"]
        shown = f"first token {first:.0f} ms, " if first is not None else ""
        print(f"  {name}: {shown}{row['timing']['total']:.0f} ms, usage {row['usage']}", file=sys.stderr)
        same = (text.replace("[EMAIL]", "alice@example.com"), calls) == wanted
        if not same or row["stream"] != name.endswith("stream") or not row["complete"] or row["problems"]:
            sys.exit(f"{name}: the client saw {wanted}, the row has {(text, calls)} and problems {row['problems']}")
        if row["request"]["messages"][0]["content"].count("alice"):
            sys.exit(f"{name}: an address was written")
    stored = b"".join(path.read_bytes() for path in folder.glob("*.jsonl")).decode()
    if KEY in stored:
        sys.exit("the key was written")
    same = sum(direct[name] == found for name, found in through.items())
    called = sum(bool(calls) for _, calls in through.values())
    summary = {
        "calls": len(rows),
        "retries": len(every) - len(rows),
        "recorded": result["recorded"],
        "lost": result["lost"],
        "damaged": reading.damaged,
    }
    print(json.dumps(summary | {"same_as_direct": same, "with_tool_calls": called}))


if __name__ == "__main__":
    main()
