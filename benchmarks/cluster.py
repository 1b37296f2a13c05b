"""A Ray cluster of two workers, one killed in mid-run, against one process: are the signals the same, and written once?

    python benchmarks/cluster.py [--teacher FOLDER] [--conversations N] [--kind KIND]

A teacher scores conversations of examples/language-model three times: in this process; by two workers whose shards go
by a folder; by two workers whose shards go by an S3 server on this machine (moto's). In both of the latter the first
worker that begins with its second shard is sent SIGKILL. Without --teacher a small model with random weights is made.

The last line is JSON: `order_equal` (ids in the same order), `bytes_equal` (all files of the signals), `most_steps`
(the largest difference of a stored code, in quantisation steps), `shards`, `written_twice` (shards with more than one
result that counts), `killed` (workers), `seconds` of each run, the start of the cluster included.
"""

import argparse
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attar import pipeline
from attar.cluster.shards import Shards
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


class Mortal(workers.TokenWork):
    """The same work, but one worker dies when it begins with its second shard."""

    def open(self, threads):
        work, begun = super().open(threads), []
        died = Path(os.environ["ATTAR_BENCHMARK_DIED"])

        def mortal(table):
            begun.append(table.num_rows)
            if len(begun) == 2 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return work(table)

        return mortal


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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher")
    parser.add_argument("--conversations", type=int, default=150)
    parser.add_argument("--kind", default="top_k")
    options = parser.parse_args()
    committed = Counter()
    commit = Shards.commit

    def counted(self, mark):
        committed[self.url, mark.source] += 1
        commit(self, mark)

    Shards.commit = counted
    # Ray's workers are as nice as this process, and not more.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    with tempfile.TemporaryDirectory() as name, s3_server() as bucket:
        place = Path(name)
        lines = DATA.read_text("utf-8").splitlines()[: options.conversations]
        (place / "conversations.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        teacher = options.teacher or str(place / "teacher")
        if options.teacher is None:
            texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
            make_teacher(place / "teacher", texts)

        def score(folder, **run):
            content = {
                "name": "cluster",
                "task": "chat",
                "teacher": {"model": f"hf:{teacher}", "dtype": "float32"},
                "data": {"train": "conversations.jsonl"},
                "curate": {"val_size": 10, "test_size": 10, "max_tokens": 512, "max_truncated": 1.0},
                "distill": {"objectives": [{"kind": "logit"}], "signals": {"kind": options.kind}},
                "run": {"folder": folder, "device": "cpu", "threads": 1, "shard_rows": 16, **run},
            }
            started = time.perf_counter()
            made = pipeline.run(parse_recipe(content, "benchmark", place), until="score")
            return made / "signals/tokens", round(time.perf_counter() - started, 1)

        one, seconds = score("one")
        say(f"one process: {seconds} s")
        result = {"order_equal": True, "bytes_equal": True, "most_steps": 0, "killed": 0, "seconds": {"one": seconds}}
        workers.TokenWork = Mortal
        for where, shards in (("disk", str(place / "shards")), ("s3", bucket)):
            died = place / f"died-{where}"
            os.environ["ATTAR_BENCHMARK_DIED"] = str(died)
            many, seconds = score(where, on="ray", workers=2, shards=shards)
            ordered, same, most = compare(one, many)
            result["order_equal"] &= ordered
            result["bytes_equal"] &= same
            result["most_steps"] = max(result["most_steps"], most)
            result["killed"] += died.exists()
            result["seconds"][where] = seconds
            say(f"{where}: {seconds} s, order {ordered}, bytes {same}, steps {most}, killed {died.exists()}")
        result["shards"] = len(committed)
        result["written_twice"] = sum(count > 1 for count in committed.values())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
