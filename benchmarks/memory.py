"""How far the estimate of a training step's memory is from what real steps take.

    python benchmarks/memory.py [--only NAME ...]

Each setting trains in a process of its own: random weights of the sizes given, float32, AdamW, batches of random
tokens, the last quarter of each row supervised. The process first trains a model of next to nothing, so that libraries
and their buffers are there, and notes its memory: the baseline. Then it trains the real one for three steps. Measured
is the peak of the resident set above the baseline; the estimate is `attar.train.memory.estimate`.

The C library keeps freed blocks of less than 32 MB for itself and cuts new ones from them, so that a process is larger
than its tensors. Each setting is measured twice: with blocks of 256 KiB and more given back at once, by
MALLOC_MMAP_THRESHOLD_, which is what the estimate is compared with; and as the C library does by itself, under `kept`.
A table goes to stderr; last comes one JSON line with the worst relative error.
"""

import argparse
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from attar.train.memory import Decoder, estimate

SIZES = {
    "20M": {"layers": 8, "width": 256, "inner_width": 768, "heads": 4, "key_heads": 2, "head_width": 64},
    "70M": {"layers": 10, "width": 576, "inner_width": 1536, "heads": 9, "key_heads": 3, "head_width": 64},
    "135M": {"layers": 30, "width": 576, "inner_width": 1536, "heads": 9, "key_heads": 3, "head_width": 64},
}
VOCABULARY = {"20M": 49152, "70M": 49152, "135M": 49152, "nothing": 64}
LENGTH, STEPS = 256, 3


@dataclasses.dataclass(frozen=True)
class Setting:
    student: str
    rows: int
    teacher: str | None = None
    checkpointing: bool = False
    accumulation: int = 1
    tied: bool = True

    @property
    def name(self):
        parts = [self.student, f"{self.rows}x{LENGTH}", f"teacher-{self.teacher}" if self.teacher else "cached"]
        parts += ["checkpoints"] * self.checkpointing + [f"by-{self.accumulation}"] * (self.accumulation > 1)
        return " ".join(parts + ["untied"] * (not self.tied))


SETTINGS = [
    Setting("20M", 4),
    Setting("20M", 16),
    Setting("20M", 16, checkpointing=True),
    Setting("20M", 16, teacher="70M"),
    Setting("20M", 16, tied=False),
    Setting("70M", 8),
    Setting("70M", 8, teacher="135M"),
    Setting("70M", 8, teacher="135M", checkpointing=True),
    Setting("135M", 1),
    Setting("135M", 4),
    Setting("135M", 4, accumulation=2),
    Setting("135M", 8, checkpointing=True),
]


def decoder(size, tied=True):
    if size == "nothing":
        sizes = {"layers": 1, "width": 16, "inner_width": 16, "heads": 1, "key_heads": 1, "head_width": 16}
    else:
        sizes = SIZES[size]
    return Decoder(**sizes, vocabulary=VOCABULARY[size], tied=tied)


def build(sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        head_dim=sizes.head_width,
        tie_word_embeddings=sizes.tied,
    )
    assert Decoder.from_config(config) == sizes
    model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == sizes.parameters
    return model


def train(setting, student, teacher, folder):
    """A few steps; where there is no teacher, on the 64 likeliest entries of each token, as a store would give them."""
    import numpy as np
    import torch
    from transformers import TrainingArguments

    from attar import DistillationTrainer, Logit, Response
    from attar.tokens import TokenizedExample
    from attar.train.batches import Collator, TokenizedRows
    from attar.train.language_model import LanguageModel

    rng = np.random.default_rng(0)
    supervised = np.arange(LENGTH) >= LENGTH - LENGTH // 4
    rows = [
        TokenizedExample(str(i), rng.integers(0, student.vocabulary, LENGTH).astype(np.int32), supervised)
        for i in range(setting.rows * STEPS * setting.accumulation)
    ]
    entries = min(64, student.vocabulary - 1)

    def collate(batch_rows):
        batch = Collator(0)(batch_rows)
        if teacher is None:
            count = int(batch["supervised"].sum())
            logs = torch.randn(count, entries + 1).log_softmax(-1)
            starts = torch.randint(0, student.vocabulary - entries, (count, 1))
            batch |= {"signal_ids": starts + torch.arange(entries), "signal_log_probs": logs[:, 1:].contiguous()}
            batch["signal_log_tail"] = logs[:, 0].contiguous()
        return batch

    objectives = [Response(weight=0.5), Logit()]
    torch.manual_seed(0)
    DistillationTrainer(
        model=LanguageModel(build(student), objectives, None if teacher is None else build(teacher)),
        train_dataset=TokenizedRows(rows, setting.rows * LENGTH),
        data_collator=collate,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            gradient_accumulation_steps=setting.accumulation,
            activation_checkpointing=setting.checkpointing,
            use_cpu=True,
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
    ).train()


def measure(setting):
    """In this process: the peak above the baseline, in bytes."""
    import psutil
    import torch

    torch.set_num_threads(2)
    student = decoder(setting.student, setting.tied)
    teacher = decoder(setting.teacher) if setting.teacher else None
    with tempfile.TemporaryDirectory() as work:
        train(setting, decoder("nothing"), decoder("nothing") if teacher else None, Path(work))
        gc.collect()
        baseline = psutil.Process().memory_info().rss
        train(setting, student, teacher, Path(work))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"baseline": baseline, "peak": peak}))


def peak(setting, **variables):
    """In a process of its own: baseline and peak, in bytes."""
    command = [sys.executable, __file__, "--measure", json.dumps(dataclasses.asdict(setting))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode:
        sys.exit(f"{setting.name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def estimated(setting):
    tokens = setting.rows * LENGTH
    return estimate(
        decoder(setting.student, setting.tied),
        tokens=tokens,
        supervised=tokens // 4,
        teacher=decoder(setting.teacher) if setting.teacher else None,
        gradient_checkpointing=setting.checkpointing,
        accumulation=setting.accumulation,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--measure")
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(Setting(**json.loads(arguments.measure)))
    rows = []
    print(f"{'setting':42}{'measured':>9}{'estimate':>9}{'error':>8}{'kept':>9}  MB", file=sys.stderr)
    for setting in SETTINGS:
        if arguments.only and not any(word in setting.name for word in arguments.only):
            continue
        found, usual = peak(setting, MALLOC_MMAP_THRESHOLD_=str(256 * 1024)), peak(setting)
        memory = estimated(setting)
        measured, kept = (run["peak"] - run["baseline"] for run in (found, usual))
        error = memory.total / measured - 1
        print(
            f"{setting.name:42}{measured / 1e6:9.0f}{memory.total / 1e6:9.0f}{error:8.1%}{kept / 1e6:9.0f}  "
            f"{memory.moment}",
            file=sys.stderr,
            flush=True,
        )
        row = {"setting": setting.name, "measured_mb": round(measured / 1e6), "kept_mb": round(kept / 1e6)}
        rows.append({**row, "error": round(error, 4)})
    worst = max(rows, key=lambda row: abs(row["error"]))
    print(json.dumps({"worst_relative_error": abs(worst["error"]), "worst": worst["setting"], "settings": rows}))


if __name__ == "__main__":
    main()
