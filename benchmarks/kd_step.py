"""The cost of one distillation step, beside the least that any step can cost and beside the peers.

    python benchmarks/kd_step.py DIR {live,cached,hidden} [--steps 5]
    python benchmarks/kd_step.py DIR compare [--rounds 5] [--peers SCRIPT]

DIR holds `teacher` and `student` (causal language models with one tokenizer) and, for `compare`, `venv` with the peers.
The load is fixed: batches of 4 conversations of 512 tokens, a fifth of them the assistant's, forward KL, AdamW,
float32, two threads. The first form prints one JSON line: the median step, the peak memory of the process, the
supervised tokens of a step, what of a step is neither forward, backward nor update, and what passes between two steps
(reading signals, collating, and here an epoch's turn), which the peers' clocks leave out too. `compare` runs both sides
in turn, each in a process of its own, takes the best of the rounds, and prints one JSON line of ratios. SCRIPT measures
a peer (`SCRIPT DIR PEER --steps N` prints JSON with `step_s` and `peak_mb`).
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH, LENGTH = 4, 512
WORDS = "the cat sat on a mat and looked at blue sky while rain fell over quiet town near river"


def conversations(n):
    """An agent's shape: a long prompt and a short act. The same as the peers are measured on."""
    import random

    rng = random.Random(0)
    rows = []
    for _ in range(n):
        prompt, act = " ".join(rng.choices(WORDS.split(), k=370)), " ".join(rng.choices(WORDS.split(), k=95))
        rows.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": act}]})
    return rows


def examples(tokenizer, n):
    """The peers' tokens, and as their scripts supervise them: all after the prompt, the template's last newline too."""
    import numpy as np

    from attar.tokens import TokenizedExample

    found = []
    for number, row in enumerate(conversations(n)):
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        before = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        ids = np.array(tokenizer(whole, add_special_tokens=False).input_ids[:LENGTH], dtype=np.int32)
        found.append(TokenizedExample(str(number), ids, np.arange(len(ids)) >= before))
    return found


def measure(folder: Path, source: str, steps: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

    from attar import DistillationTrainer, Logit
    from attar.signals.language import SignalKind, SignalReader, ask, keep_head
    from attar.signals.store import SignalStore
    from attar.train.batches import Collator, TokenizedRows
    from attar.train.language_model import LanguageModel

    torch.set_num_threads(2)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    rows = examples(tokenizer, BATCH)  # one batch an epoch: every step is on the same tokens, as the peers' steps are

    def load(name):
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)

    reader = None
    with tempfile.TemporaryDirectory() as work:
        if source != "live":
            # Asked in a process of its own: what a run with cached signals never loads is not in its memory.
            kind = SignalKind("hidden" if source == "hidden" else "sampled")
            if os.fork() == 0:
                teacher = load("teacher").eval()
                store = SignalStore(Path(work), {"kind": source})
                for start in range(0, len(rows), BATCH):
                    part = rows[start : start + BATCH]
                    store.append([e.id for e in part], ask(teacher, tokenizer, part, kind), 0)
                if source == "hidden":
                    keep_head(store, teacher, tokenizer)
                os._exit(0)
            assert os.wait()[1] == 0
            kind = SignalKind("hidden" if source == "hidden" else "sampled")
            reader = SignalReader(
                SignalStore(Path(work), {"kind": source}), kind, max(tokenizer.get_vocab().values()) + 1
            )
        times, between, inside, supervised = [], [], [], []

        class Clock(TrainerCallback):
            end = None

            def on_step_begin(self, *args, **kwargs):
                self.start = time.perf_counter()
                if self.end is not None:
                    between.append(self.start - self.end)
                inside.append(0.0)

            def on_step_end(self, *args, **kwargs):
                self.end = time.perf_counter()
                times.append(self.end - self.start)

        model = LanguageModel(
            load("student"),
            [Logit()],
            load("teacher") if source == "live" else None,
            tokenizer=tokenizer,
            teacher_head=reader.head() if reader else None,
        )
        trainer = DistillationTrainer(
            model=model,
            train_dataset=TokenizedRows(rows, BATCH * LENGTH),
            data_collator=Collator(tokenizer.pad_token_id, reader),
            callbacks=[Clock()],
            args=TrainingArguments(
                output_dir=work,
                max_steps=steps,
                learning_rate=1e-5,
                use_cpu=True,
                optim="adamw_torch_fused",
                save_strategy="no",
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
            ),
        )

        def timed(owner, name):
            function = getattr(owner, name)

            def wrapper(*args, **kwargs):
                start = time.perf_counter()
                try:
                    return function(*args, **kwargs)
                finally:
                    if inside:
                        inside[-1] += time.perf_counter() - start

            setattr(owner, name, wrapper)

        timed(model, "forward")
        timed(trainer.accelerator, "backward")
        count = trainer._get_num_items_in_batch
        trainer._get_num_items_in_batch = lambda *a: (c := count(*a), supervised.append(int(c[0])))[0]
        trainer.create_optimizer()
        timed(trainer.optimizer, "step")
        trainer.train()
    print(
        json.dumps(
            {
                "peer": f"attar-{source}",
                "step_s": round(statistics.median(times[1:] or times), 3),
                "steps_s": [round(t, 2) for t in times],
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "supervised_tokens": supervised[0],
                "between_s": round(statistics.median(between), 3),
                "overhead": round(statistics.median(1 - i / t for i, t in zip(inside, times, strict=True)), 4),
            }
        )
    )


# What each row of the comparison divides by what, and how much it may be at most.
ROWS = {
    "cached_step_over_floor": (("attar-cached", "step_s"), ("sft-floor", "step_s"), 1.08),
    "hidden_step_over_floor": (("attar-hidden", "step_s"), ("sft-floor", "step_s"), 1.35),
    "cached_step_over_trl": (("attar-cached", "step_s"), ("trl-gkd", "step_s"), 0.42),
    "live_step_over_trl": (("attar-live", "step_s"), ("trl-gkd", "step_s"), 0.75),
    "live_step_over_floor_and_teacher": (("attar-live", "step_s"), ("floor-and-teacher", "step_s"), 1.08),
    "live_memory_over_trl": (("attar-live", "peak_mb"), ("trl-gkd", "peak_mb"), 0.55),
    "cached_memory_over_trl": (("attar-cached", "peak_mb"), ("trl-gkd", "peak_mb"), 0.45),
    "overhead": (("attar-cached", "overhead"), None, 0.03),
}


def teacher_forward(folder: Path, steps: int) -> None:
    """The teacher's own forward on the load, the decoder alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32).eval()
    ids = torch.full((BATCH, LENGTH), tokenizer.eos_token_id)
    for row, example in enumerate(examples(tokenizer, BATCH)):
        ids[row, : len(example)] = torch.from_numpy(example.ids)
    times = []
    with torch.no_grad():
        for _ in range(steps):
            start = time.perf_counter()
            teacher.model(input_ids=ids)
            times.append(time.perf_counter() - start)
    print(json.dumps({"peer": "teacher", "step_s": round(statistics.median(times[1:] or times), 3)}))


def compare(folder: Path, rounds: int, steps: int, peers: Path) -> None:
    own = [sys.executable, __file__, str(folder)]
    theirs = [str(folder / "venv" / "bin" / "python"), str(peers), str(folder)]
    sides = {
        "sft-floor": [*theirs, "sft-floor"],
        "trl-gkd": [*theirs, "trl-gkd"],
        "attar-live": [*own, "live"],
        "attar-cached": [*own, "cached"],
        "attar-hidden": [*own, "hidden"],
        "teacher": [*own, "teacher"],
    }
    found: dict[str, list[dict]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, command in sides.items():
            done = subprocess.run([*command, "--steps", str(steps)], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed: {done.stderr[-2000:]}")
            result = json.loads(done.stdout.splitlines()[-1])
            counted = re.search(r"supervised tokens a step: (\d+)", done.stderr)
            if counted:
                result["supervised_tokens"] = int(counted.group(1))
            found[name].append(result)
            print(f"round {number + 1} {name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    counts = {r["supervised_tokens"] for results in found.values() for r in results if "supervised_tokens" in r}
    if len(counts) != 1:
        sys.exit(f"the sides supervise {sorted(counts)} tokens a step; they are not comparable")
    best = {
        name: {key: min(r[key] for r in results) for key in ("step_s", "peak_mb", "overhead") if key in results[0]}
        for name, results in found.items()
    }
    best["floor-and-teacher"] = {"step_s": best["sft-floor"]["step_s"] + best["teacher"]["step_s"]}
    ratios = {}
    for row, (one, other, most) in ROWS.items():
        value = best[one[0]][one[1]] / (1 if other is None else best[other[0]][other[1]])
        ratios[row] = round(value, 3)
        print(f"{row}: {value:.3f} (at most {most})", file=sys.stderr)
    print(json.dumps({**ratios, "supervised_tokens": counts.pop(), "best": best}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", type=Path)
    parser.add_argument("what", choices=["live", "cached", "hidden", "teacher", "compare"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=Path(os.environ.get("ATTAR_PEERS", "peer_step.py")))
    args = parser.parse_args()
    if args.what == "compare":
        compare(args.dir, args.rounds, args.steps, args.peers)
    elif args.what == "teacher":
        teacher_forward(args.dir, args.steps)
    else:
        measure(args.dir, args.what, args.steps)


if __name__ == "__main__":
    main()
