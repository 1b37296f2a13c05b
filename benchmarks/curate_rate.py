"""`attar curate` on a large chat file: examples a second, and the memory of all its processes.

    python benchmarks/curate_rate.py [--examples 1000000] [--threads 2]

The file holds conversations of about 1 kB: single and several turns, system prompts that many share, tools and calls,
a few API keys. 1 in 100 is a copy of an earlier one, 3 in 100 are an earlier one with a word of its answer replaced.
The whole command is timed, with the defaults of the recipe: parsing, filters, near duplicates, leaks, split, card, and
the hashes of what went in and came out. Memory is the largest sum of the resident sets of the command and its workers,
seen every 0.1 s. The run fails where fewer than 99 % of the planted duplicates were found, or more than 0.1 % of the
rest was dropped. The last line is JSON.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

# Words of an answer in which another word leaves a near duplicate: 51 of 61 shingles.
SHORTEST = 60
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Tells the {name} of a place.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
                "required": ["place"],
            },
        },
    }
    for name in ("weather", "traffic", "population")
]
RECIPE = """
name: curate-rate
task: chat
teacher: {{model: "hf:nothing", licence: Apache-2.0}}
data: {{train: conversations.jsonl}}
curate: {{val_size: 1000, test_size: 1000}}
run: {{threads: {threads}}}
"""


class Writer:
    """Conversations of made-up words, the frequent ones more often."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        syllables = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u", "an", "er", "il", "on", "us")]
        self.words = ["".join(self.rng.choices(syllables, k=self.rng.randint(1, 4))) for _ in range(30_000)]
        self.systems = [self.text(60) for _ in range(20)]
        self.stock, self.at = [], 0

    def text(self, n):
        if not hasattr(self, "stock") or self.at + n > len(self.stock):
            picked = (self.numbers.random(1 << 20) ** 2.5 * len(self.words)).astype(int)
            self.stock, self.at = [self.words[i] for i in picked], 0
        self.at += n
        return " ".join(self.stock[self.at - n : self.at])

    def talk(self):
        kind = self.rng.random()
        messages = [{"role": "system", "content": self.rng.choice(self.systems)}] if kind < 0.3 else []
        for _ in range(3 if kind > 0.8 else 1):
            size = 0.45 if kind > 0.8 else 1
            messages.append({"role": "user", "content": self.text(int(size * self.rng.randint(10, 50)))})
            messages.append({"role": "assistant", "content": self.text(int(size * self.rng.randint(40, 110)))})
        row = {"messages": messages}
        if kind > 0.95:
            name = self.rng.choice(TOOLS)["function"]["name"]
            arguments = json.dumps({"place": self.text(2), "days": self.rng.randint(1, 9)})
            call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
            messages[1:1] = [
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": self.text(20)},
            ]
            row["tools"] = TOOLS
        if kind < 0.002:
            messages[-1]["content"] += f" sk-{self.rng.getrandbits(160):040x}"
        return row

    def near(self, row):
        """The same with another word in its last answer."""
        *before, last = row["messages"]
        words = last["content"].split(" ")
        words[self.rng.randrange(len(words))] = "otherwise"
        return row | {"messages": [*before, last | {"content": " ".join(words)}]}


def write(path, examples, seed=0):
    """Write the file; returns which lines are copies and near copies of earlier ones."""
    writer, earlier = Writer(seed), []
    planted = {"duplicate": set(), "near duplicate": set()}
    with path.open("w", encoding="utf-8") as handle:
        for line in range(1, examples + 1):
            chance = writer.rng.random()
            if earlier and chance < 0.04:
                row = writer.rng.choice(earlier)
                kind = "duplicate" if chance < 0.01 else "near duplicate"
                row = row if kind == "duplicate" else writer.near(row)
                planted[kind].add(line)
            else:
                row = writer.talk()
                if row["messages"][-1]["content"].count(" ") < SHORTEST:
                    handle.write(json.dumps(row, ensure_ascii=False) + "\n")
                    continue
                # A sample of earlier ones is enough, and fits in memory.
                if len(earlier) < 20_000:
                    earlier.append(row)
                elif chance > 0.9:
                    earlier[writer.rng.randrange(len(earlier))] = row
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    return planted


class Memory(threading.Thread):
    """The largest sum of resident memory of a process and its children, in 10^6 bytes."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.process, self.peak, self.stopped = psutil.Process(pid), 0.0, False

    def run(self):
        while not self.stopped:
            try:
                several = [self.process, *self.process.children(recursive=True)]
                self.peak = max(self.peak, sum(p.memory_info().rss for p in several) / 1e6)
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attar-bench-") as folder:
        place = Path(folder)
        start = time.perf_counter()
        planted = write(place / "conversations.jsonl", args.examples)
        size = (place / "conversations.jsonl").stat().st_size / 1e6
        print(
            f"wrote {args.examples:,} conversations, {size:,.0f} MB, {time.perf_counter() - start:.0f} s",
            file=sys.stderr,
        )
        (place / "attar.yaml").write_text(RECIPE.format(threads=args.threads))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", "from attar.cli import main; main()", "curate", "attar.yaml"]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=place, env=env, stdout=sys.stderr)
        memory = Memory(process.pid)
        memory.start()
        code = process.wait()
        seconds = time.perf_counter() - start
        memory.stopped = True
        if code:
            sys.exit(f"attar curate ended with {code}")
        found = {}
        with (place / "runs/curate-rate/data/dropped.jsonl").open() as handle:
            for line in handle:
                drop = json.loads(line)
                found.setdefault(drop["reason"], set()).add(drop["line"])
    copies = planted["duplicate"] | planted["near duplicate"]
    dropped = set().union(*found.values())
    recall = len(copies & dropped) / max(len(copies), 1)
    wrong = len(dropped - copies) / args.examples
    print(
        f"planted {len(copies):,}, found {recall:.2%} of them; dropped besides {wrong:.3%}; "
        f"{ {reason: len(lines) for reason, lines in found.items()} }; {seconds:.0f} s",
        file=sys.stderr,
    )
    if recall < 0.99 or wrong > 0.001:
        sys.exit("planted duplicates were missed, or others dropped")
    print(json.dumps({"examples_per_s": round(args.examples / seconds), "peak_mb": round(memory.peak)}))


if __name__ == "__main__":
    main()
