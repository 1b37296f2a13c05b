"""What it costs that the student writes: steps on recorded batches beside steps on its own.

    python benchmarks/on_policy.py DIR [--steps 8] [--tokens 1024] [--new-tokens 64] [--threads 2]

DIR holds `teacher` and `student` (causal language models with one tokenizer). The prompts are short questions of
`examples/language-model`; reverse KL from a live teacher, AdamW, float32, batches of `--tokens` tokens. Three runs of
as many steps, one after the other in this process: recorded batches alone, half of them the student's, all of them. The
last line of stdout is one JSON object: seconds a step of each, of the on-policy runs the tokens written, tokens a
second of writing, their mean length, the share that ended and the share of the time that writing took, and the loss
of the student's own tokens step by step. Progress goes to stderr.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "examples/language-model/conversations.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    figures = {}
    for name, share in (("recorded", 0.0), ("half", 0.5), ("all", 1.0)):
        print(f"{name}: {options.steps} steps", file=sys.stderr)
        figures[name] = measure(options, share)
    recorded = figures["recorded"]["step_s"]
    report = {
        "benchmark": "on_policy",
        "threads": options.threads,
        "max_new_tokens": options.new_tokens,
        "tokens_per_batch": options.tokens,
        "steps": options.steps,
        **figures,
        "step_ratio_half": round(figures["half"]["step_s"] / recorded, 2),
        "step_ratio_all": round(figures["all"]["step_s"] / recorded, 2),
    }
    print(json.dumps(report))


def measure(options: argparse.Namespace, share: float) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from attar.data.conversations import read_conversations
    from attar.tokens import encode_conversations
    from attar.train.batches import Collator
    from attar.train.language_model import LanguageModel
    from attar.train.objectives import Logit
    from attar.train.onpolicy import OnPolicyRows
    from attar.train.trainer import DistillationTrainer
    from attar.train.writing import Sampling, ends_of

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(options.folder / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(options.folder / "student")
    conversations, _ = read_conversations(DATA, key="data", on_bad_line="stop")
    examples, _ = encode_conversations(tokenizer, conversations[:600], max_tokens=512, max_truncated=0.5)
    how = Sampling(ends=ends_of(tokenizer, student, examples), max_new_tokens=options.new_tokens)
    rows = OnPolicyRows(examples, options.tokens, sampling=how, share=share)

    class Kept(TrainerCallback):
        def __init__(self) -> None:
            self.logs, self.times = [], []

        def on_train_begin(self, args, state, control, **kwargs):
            self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.times.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.logs.append(logs)
                print(f"  step {state.global_step}: {logs['loss']:.3f}", file=sys.stderr)

    kept = Kept()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = DistillationTrainer(
            model=LanguageModel(student, [Logit(divergence="reverse_kl")], teacher, tokenizer=tokenizer),
            args=arguments,
            train_dataset=rows,
            data_collator=Collator(tokenizer.pad_token_id or 0),
            callbacks=[kept],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    # The first step is a warm-up.
    found = {"step_s": round((kept.times[-1] - kept.times[0]) / (len(kept.times) - 1), 3)}
    own = [log for log in kept.logs if "on_policy_tokens" in log]
    if own:
        tokens = sum(log["on_policy_tokens"] for log in own)
        answers = sum(log["on_policy_tokens"] / log["on_policy_length"] for log in own)
        ended = sum(log["on_policy_ended"] * log["on_policy_tokens"] / log["on_policy_length"] for log in own)
        seconds = sum(log["on_policy_tokens"] / log["on_policy_tokens_per_s"] for log in own)
        found |= {
            "tokens_written": int(tokens),
            "tokens_per_s": round(tokens / seconds, 1),
            "mean_length": round(tokens / answers, 1),
            "ended": round(ended / answers, 3),
            "time_share": round(seconds / (kept.times[-1] - kept.begun), 3),
            "own_loss": [round(log["on_policy_logit_reverse_kl"], 3) for log in own],
        }
    return found


if __name__ == "__main__":
    main()
