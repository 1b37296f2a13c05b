"""What cached signals cost on disk and what they cost a student, on real weights.

    python benchmarks/signal_size.py [CONVERSATIONS] [--kinds KIND ...] [--train KIND ...] [--steps N]

The student has 10 of the teacher's layers, evenly spaced, and no other difference. For each kind of signal: bytes a
supervised token, everything in the store's shards included; the cosine, over all of the student's parameters, between
the gradient of the forward KL from stored signals and the exact one, on held-out conversations of 4,096 supervised
tokens, before training and after it; the same after training for the signals as they were before they were packed; and,
for the kinds of --train, the student's held-out KL to the teacher after as many steps on the same batches from the same
start, over the exact one's. Exact is the dense KL from the teacher's float32 states. A KIND is `hidden` (bfloat16
states), `top_k:ENTRIES`, `top_k:ENTRIES:AT_LEAST`, `sampled:THRESHOLD` or `fixed:ENTRIES` (as many drawn for every
token). A table goes to
stderr; the last line is JSON, of the default sparse kind.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.utils import logging

from attar.data.conversations import read_conversations
from attar.demo import teacher_folder
from attar.engines.heads import head_of
from attar.progress import Silent
from attar.recipe.chat import Signals
from attar.signals.hidden import from_array, to_array
from attar.signals.language import SignalKind, SignalReader, ask, keep_head
from attar.signals.packing import pack_sampled, pack_top_k
from attar.signals.sparse import example_random, logit_chunks, sampled, sampled_fixed, top_k
from attar.signals.store import SignalStore
from attar.students.shrink import choose_layers, copy_model, keep_layers
from attar.tokens import encode_conversations
from attar.train.batches import Collator, TokenizedRows
from attar.train.language_model import LanguageModel
from attar.train.objectives import Logit
from attar.train.trainer import DistillationTrainer

DATA = Path(__file__).parents[1] / "examples" / "language-model" / "conversations.jsonl"
LAYERS = 10
HELD_OUT = 4096
TOKENS_PER_BATCH = 1024
LEARNING_RATE = 3e-4
# Examples a shard, and a forward pass of the teacher.
SHARD, PASS = 64, 16
EXACT = "exact"
PADDING = {"ids": -1, "log_probs": float("-inf")}
_SIGNALS = Signals()
DEFAULT = {
    "sampled": f"sampled:{_SIGNALS.threshold}",
    "top_k": f"top_k:{_SIGNALS.entries}:{_SIGNALS.at_least}",
    "hidden": "hidden",
}[_SIGNALS.kind]
KINDS = (
    "hidden",
    *("top_k:16", "top_k:64", "top_k:256"),
    *(f"top_k:2048:{p}" for p in (0.004, 0.002, 0.001, 0.0004, 0.0002)),
    *(f"sampled:{p}" for p in (0.05, 0.02, 0.01, 0.005, 0.002)),
    "fixed:32",
)


def say(text):
    print(text, file=sys.stderr, flush=True)


def signal_kind(name):
    """How a store of that kind is read."""
    if name == EXACT:
        return SignalKind("hidden", dtype=torch.float32)
    kind = name.partition(":")[0]
    return SignalKind("sampled" if kind == "fixed" else kind)


def distribution(name, states, head, example):
    """A signal of an example from the teacher's float32 states: as tensors of a batch, and packed."""
    kind, _, number = name.partition(":")
    if kind in (EXACT, "hidden"):
        packed = {"states": to_array(states, signal_kind(name).dtype)}
        return {"states": from_array(packed["states"])}, packed
    chunks = logit_chunks(states, head)
    if kind == "top_k":
        entries, _, least = number.partition(":")
        signal = top_k(chunks, int(entries), at_least=float(least or 0))
        return signal._asdict(), pack_top_k(signal, head.size)
    random = example_random(0, example)
    fixed = kind == "fixed"
    signal = sampled_fixed(chunks, int(number), random) if fixed else sampled(chunks, float(number), random)
    tensors = {"ids": signal.ids, "entry_weights": signal.entry_weights.float(), "entropy": signal.entropy.float()}
    return tensors, pack_sampled(signal, head.size, random)


class Stores:
    """The teacher's states of all examples, and stores of every kind made from them."""

    def __init__(self, teacher, tokenizer, parts, folder):
        self.head = head_of(teacher, tokenizer)
        self.parts, self.folder = parts, folder
        self.states, self._known = {}, {}
        kind = signal_kind(EXACT)
        for rows in parts.values():
            for start in range(0, len(rows), PASS):
                some = rows[start : start + PASS]
                for example, record in zip(some, ask(teacher, tokenizer, some, kind), strict=True):
                    self.states[example.id] = from_array(record["states"])
        self._keep_head = lambda store: keep_head(store, teacher, tokenizer)

    def reader(self, name, part):
        """A reader of a store, which is written if it is not there, and the bytes of its shards without the head."""
        kind, folder = signal_kind(name), self.folder / f"{name.replace(':', '-')}-{part}"
        store = SignalStore(folder, {"kind": name})
        rows = [] if store.ids else self.parts[part]
        for start in range(0, len(rows), SHARD):
            some = rows[start : start + SHARD]
            store.append([e.id for e in some], [self.signal(name, e)[1] for e in some], 0)
        shards = sum(path.stat().st_size for path in folder.glob("shard-*") if ".tmp" not in path.name)
        if kind.kind == "hidden":
            self._keep_head(store)
        return SignalReader(store, kind, self.head.size), shards

    def signal(self, name, example):
        if (name, example.id) not in self._known:
            self._known[name, example.id] = distribution(name, self.states[example.id], self.head, example.id)
        return self._known[name, example.id]


class Unpacked:
    """In place of a reader: signals as they are before they are packed."""

    def __init__(self, signals, name):
        self.signals, self.name = signals, name

    def head(self):
        return self.signals.head

    def read(self, examples):
        parts = [self.signals.signal(self.name, example)[0] for example in examples]
        return {key: stacked([part[key] for part in parts], PADDING.get(key, 0)) for key in parts[0]}


def stacked(tables, padding):
    """Tables one below the other, padded on the right to the widest."""
    if tables[0].dim() == 1:
        return torch.cat(tables)
    width = max(table.shape[1] for table in tables)
    return torch.cat([F.pad(table, (0, width - table.shape[1]), value=padding) for table in tables])


def batches(rows, tokenizer, reader, size=8):
    """Batches of about one length, and the number of supervised tokens in all of them."""
    collator = Collator(tokenizer.pad_token_id, reader)
    numbered = sorted(enumerate(rows), key=lambda row: len(row[1]))
    total = torch.tensor([float(sum(example.supervised.sum() for example in rows))])
    for start in range(0, len(numbered), size):
        yield collator(numbered[start : start + size]), total


def loss(student, tokenizer, reader):
    return LanguageModel(student, [Logit()], tokenizer=tokenizer, teacher_head=reader.head())


def gradient(student, tokenizer, rows, reader):
    """The gradient of the mean over the rows' supervised tokens, one vector over all parameters."""
    model = loss(student, tokenizer, reader)
    for batch, total in batches(rows, tokenizer, reader):
        model(batch, total).total.backward()
    vector = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return vector


@torch.no_grad()
def divergence(student, tokenizer, rows, reader):
    """The exact KL, a mean over the rows' supervised tokens."""
    model = loss(student, tokenizer, reader).eval()
    return sum(float(model(batch, total).total) for batch, total in batches(rows, tokenizer, reader))


def trained(start, tokenizer, rows, reader, steps, work):
    """A copy of the student after some steps."""
    student = copy_model(start)
    trainer = DistillationTrainer(
        model=loss(student, tokenizer, reader),
        train_dataset=TokenizedRows(rows, TOKENS_PER_BATCH),
        data_collator=Collator(tokenizer.pad_token_id, reader),
        args=TrainingArguments(
            output_dir=str(work),
            max_steps=steps,
            num_train_epochs=max(1, -(-steps * TOKENS_PER_BATCH // sum(map(len, rows)))),
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            seed=0,
            use_cpu=True,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    trainer.train()
    return student.eval()


def inner(a, b):
    """In float64: in float32 the sum of 64 million products is off by a hundredth."""
    return sum(float(x.double() @ y.double()) for x, y in zip(a.split(2**20), b.split(2**20), strict=True))


def cosine(a, b):
    return inner(a, b) / (inner(a, a) * inner(b, b)) ** 0.5


def split(rows, held_out):
    """The first examples until they hold that many supervised tokens, and the rest."""
    count = 0
    for number, example in enumerate(rows):
        if count >= held_out:
            return rows[:number], rows[number:]
        count += int(example.supervised.sum())
    sys.exit(f"the conversations hold {count} supervised tokens; wanted more than {held_out}, to train on the rest")


def reached(rows, steps):
    """What training sees: nothing else is asked about."""
    count = 0
    for number, example in enumerate(rows):
        if count >= steps * TOKENS_PER_BATCH:
            return rows[:number]
        count += len(example)
    return rows


def markdown(table):
    lines = [
        "| kind | bytes a token | cosine, start | cosine, end | end, not packed | KL over exact |",
        "|---" * 6 + "|",
    ]
    for name, row in table.items():
        kl = f"{row['kl']:.4f}" if "kl" in row else ""
        cosines = " | ".join(f"{row[key]:.4f}" for key in ("start", "end", "unpacked"))
        lines.append(f"| {name}{' (default)' * (name == DEFAULT)} | {row['bytes']:.1f} | {cosines} | {kl} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path, nargs="?", default=DATA)
    parser.add_argument("--teacher", type=Path, help="a folder of transformers; the demo's teacher if there is none")
    parser.add_argument("--kinds", nargs="*", default=KINDS, metavar="KIND")
    parser.add_argument(
        "--train", nargs="*", default=[DEFAULT], metavar="KIND", help="kinds that a student is trained on"
    )
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="supervised tokens")
    args = parser.parse_args()
    logging.disable_progress_bar()
    began = time.perf_counter()

    def clock():
        return f"{time.perf_counter() - began:.0f} s"

    folder = args.teacher or teacher_folder(Silent())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found, _ = read_conversations(args.conversations, key="data", on_bad_line="stop")
    rows, _ = encode_conversations(tokenizer, found, max_tokens=512, max_truncated=0.1)
    held, rest = split(rows, args.held_out)
    rest = reached(rest, args.steps)
    to_train = {DEFAULT, *args.train}
    kinds = list(dict.fromkeys([*args.kinds, *args.train, DEFAULT]))
    with tempfile.TemporaryDirectory() as work:
        start = keep_layers(teacher, choose_layers(teacher, LAYERS, "even"))
        signals = Stores(teacher, tokenizer, {"held": held, "rest": rest}, Path(work))
        tokens = sum(int(example.supervised.sum()) for example in held)
        say(f"{tokens} held-out tokens; {len(rest)} conversations of {sum(map(len, rest))} tokens to learn from")
        exact, _ = signals.reader(EXACT, "held")
        say(f"{clock()}: asked; KL before training {divergence(start, tokenizer, held, exact):.3f}")
        end = trained(start, tokenizer, rest, signals.reader(EXACT, "rest")[0], args.steps, work)
        least = divergence(end, tokenizer, held, exact)
        say(f"{clock()}: KL {least:.4f} after {args.steps} steps of the exact loss")
        wanted = {side: gradient(student, tokenizer, held, exact) for side, student in (("start", start), ("end", end))}
        table = {}
        for name in kinds:
            reader, stored = signals.reader(name, "held")
            row = {"bytes": stored / tokens}
            row["start"] = cosine(gradient(start, tokenizer, held, reader), wanted["start"])
            row["end"] = cosine(gradient(end, tokenizer, held, reader), wanted["end"])
            row["unpacked"] = cosine(gradient(end, tokenizer, held, Unpacked(signals, name)), wanted["end"])
            if name in to_train:
                student = trained(start, tokenizer, rest, signals.reader(name, "rest")[0], args.steps, work)
                row["kl"] = divergence(student, tokenizer, held, exact) / least
            table[name] = row
            say(f"{clock()}: {name} {row}")
    say(markdown(table))
    found = table[DEFAULT]
    print(
        json.dumps(
            {
                "bytes_per_token": round(found["bytes"], 1),
                "grad_cosine": round(found["end"], 4),
                "kl_over_exact": round(found["kl"], 4),
            }
        )
    )


if __name__ == "__main__":
    main()
