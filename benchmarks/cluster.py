"""A Ray cluster of two workers, one killed in mid-run, against one process: are the files the same, and written once?

    python benchmarks/cluster.py [--teacher FOLDER] [--conversations N] [--kind KIND] [--examples N]

- score: a teacher scores conversations of examples/language-model in this process; by two workers whose shards go by a
  folder; by two whose shards go by an S3 server on this machine (moto's). Without --teacher a small model with random
  weights is made.
- curate: conversations of made-up words (--examples) by the processes of this machine, and by two workers over S3.
- generate: a teacher that takes 20 ms for an answer, in this process, and in two workers.

Wherever there are workers, the first one that begins with its second shard or block is sent SIGKILL.

The last line is JSON: `order_equal` (ids of the signals in the same order), `bytes_equal` (all files of the signals),
`most_steps` (the largest difference of a stored code, in quantisation steps), `curate_equal` (all files of data/),
`generate_equal` (all rows but for their time), `shards`, `written_twice` (shards with several results that count),
`killed` (workers), `seconds` of each run, the start of the cluster included.
"""

import argparse
import hashlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from curate_rate import write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attar import pipeline
from attar.cluster.shards import Shards
from attar.collect import generate as collect
from attar.collect import spread
from attar.engines.scripted import ScriptedChat
from attar.recipe import parse_recipe
from attar.signals import workers
from attar.signals.store import SignalStore

DATA = Path(__file__).parents[1] / "examples" / "language-model" / "conversations.jsonl"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def make_teacher(folder, lines):
    """A small Llama with random weights that are far from uniform, and a byte-level tokenizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def die_once():
    """Kill this process, unless one was killed already."""
    died = Path(os.environ["ATTAR_BENCHMARK_DIED"])
    if not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Mortal:
    """The same work, but one worker dies when it begins with its second shard."""

    def open(self, threads):
        work, begun = super().open(threads), []

        def mortal(table):
            begun.append(table.num_rows)
            if len(begun) == 2:
                die_once()
            return work(table)

        return mortal


class MortalScoring(Mortal, workers.TokenWork):
    pass


class MortalReading(Mortal, spread.ReadWork):
    pass


class Patient(ScriptedChat):
    """A teacher of a user's own, which workers import from here: 20 ms an answer, by the request alone."""

    def __init__(self):
        self.blocks = 0
        super().__init__(self.answer)

    def answer(self, request):
        time.sleep(0.02)
        return hashlib.sha256(request.messages[-1].content.encode()).hexdigest()

    def chat(self, requests):
        self.blocks += 1
        if self.blocks == 2 and "ATTAR_BENCHMARK_DIED" in os.environ:
            die_once()
        return super().chat(requests)


@contextmanager
def s3_server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
    }
    import s3fs

    s3fs.S3FileSystem().mkdir("shards")
    try:
        yield "s3://shards"
    finally:
        server.stop()


def compare(one, many):
    """Order, bytes, and the largest difference of a code."""
    files = sorted(path.name for path in one.iterdir())
    same = files == sorted(path.name for path in many.iterdir())
    same = same and all((one / name).read_bytes() == (many / name).read_bytes() for name in files)
    stores = [SignalStore(folder, json.loads((folder / "meta.json").read_text())) for folder in (one, many)]
    ordered = stores[0].ids == stores[1].ids
    most = 0
    for example in stores[0].ids if ordered else ():
        records = [store.read([example])[0] for store in stores]
        codes = [record.get("codes", record.get("kept")) for record in records]
        if codes[0] is not None and codes[0].size:
            most = max(most, int(np.abs(codes[0].astype(int) - codes[1].astype(int)).max()))
    return ordered, same, most


def score(place, options, bucket):
    """Three times; returns what the last line says of it, and the seconds."""
    lines = DATA.read_text("utf-8").splitlines()[: options.conversations]
    (place / "conversations.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    teacher = options.teacher or str(place / "teacher")
    if options.teacher is None:
        texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
        make_teacher(place / "teacher", texts)

    def run(folder, **settings):
        content = {
            "name": "cluster",
            "task": "chat",
            "teacher": {"model": f"hf:{teacher}", "dtype": "float32"},
            "data": {"train": "conversations.jsonl"},
            "curate": {"val_size": 10, "test_size": 10, "max_tokens": 512, "max_truncated": 1.0},
            "distill": {"objectives": [{"kind": "logit"}], "signals": {"kind": options.kind}},
            "run": {"folder": folder, "device": "cpu", "threads": 1, "shard_rows": 16, **settings},
        }
        return pipeline.run(parse_recipe(content, "benchmark", place), until="score") / "signals/tokens"

    one, seconds = timed(run, "one")
    found, taken = {"order_equal": True, "bytes_equal": True, "most_steps": 0}, {"one": seconds}
    for where, shards in (("disk", str(place / "shards")), ("s3", bucket)):
        with mortals(place / f"died-{where}"):
            many, taken[where] = timed(run, where, on="ray", workers=2, shards=shards)
        ordered, same, most = compare(one, many)
        found = {
            "order_equal": found["order_equal"] and ordered,
            "bytes_equal": found["bytes_equal"] and same,
            "most_steps": max(found["most_steps"], most),
        }
    say(f"score: {found}, {taken}")
    return found, taken


def curate(place, options, bucket):
    """By the processes of this machine, and by workers over S3."""
    write(place / "words.jsonl", options.examples)

    def run(folder, **settings):
        content = {
            "name": "cluster",
            "task": "chat",
            "teacher": {"model": "hf:none"},
            "data": {"train": "words.jsonl"},
            "curate": {"val_size": 100, "test_size": 100},
            "run": {"folder": folder, **settings},
        }
        return pipeline.run(parse_recipe(content, "benchmark", place), until="curate") / "data"

    one, here = timed(run, "one-curated")
    with mortals(place / "died-curating"):
        many, there = timed(run, "many-curated", on="ray", workers=2, threads=1, shards=bucket)
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, many)]
    found = {"curate_equal": files[0] == files[1]}
    say(f"curate: {found}, one {here} s, s3 {there} s")
    return found, {"curate_one": here, "curate_s3": there}


def generate(place):
    """By this process, and by workers."""
    rows = [{"prompt": f"Prompt {n}."} for n in range(800)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(folder, **settings):
        content = {
            "name": "cluster",
            "task": "chat",
            "teacher": {"model": "cluster:Patient", "max_tokens": 64},
            "data": {"train": "conversations.jsonl"},
            "collect": {"generate": {"source": {"kind": "prompts", "file": "prompts.jsonl"}}},
            "run": {"folder": folder, **settings},
        }
        made = collect.generate(parse_recipe(content, "benchmark", place))
        rows = [json.loads(line) for line in (Path(made.folder) / "generated.jsonl").open(encoding="utf-8")]
        for row in rows:
            del row["meta"]["created"]
        return rows

    one, here = timed(run, "one-generated")
    with mortals(place / "died-generating"):
        many, there = timed(run, "many-generated", on="ray", workers=2, threads=1)
    found = {"generate_equal": one == many}
    say(f"generate: {found}, one {here} s, ray {there} s")
    return found, {"generate_one": here, "generate_ray": there}


def timed(function, *arguments, **named):
    started = time.perf_counter()
    made = function(*arguments, **named)
    return made, round(time.perf_counter() - started, 1)


@contextmanager
def mortals(died):
    """Workers that start meanwhile die, one of them once."""
    os.environ["ATTAR_BENCHMARK_DIED"] = str(died)
    yield
    del os.environ["ATTAR_BENCHMARK_DIED"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher")
    parser.add_argument("--conversations", type=int, default=150)
    parser.add_argument("--kind", default="top_k")
    parser.add_argument("--examples", type=int, default=40_000)
    options = parser.parse_args()
    committed = Counter()
    commit = Shards.commit

    def counted(self, mark):
        committed[self.url, mark.source] += 1
        commit(self, mark)

    Shards.commit = counted
    # Ray's workers are as nice as this process, and not more.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    workers.TokenWork, spread.ReadWork = MortalScoring, MortalReading
    with tempfile.TemporaryDirectory() as name, s3_server() as bucket:
        place = Path(name)
        parts = [score(place, options, bucket), curate(place, options, bucket), generate(place)]
        result = {key: value for found, _ in parts for key, value in found.items()}
        result["killed"] = len(list(place.glob("died-*")))
    result["shards"] = len(committed)
    result["written_twice"] = sum(count > 1 for count in committed.values())
    result["seconds"] = {key: value for _, taken in parts for key, value in taken.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
