"""Runs of the trainer that must agree on any number of processes; as a script, a plan of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from attar.errors import AttarError
from attar.signals.language import SignalKind, SignalReader, ask, keep_head
from attar.signals.store import SignalStore
from attar.tokens import TokenizedExample
from attar.train.batches import Collator, TokenizedRows
from attar.train.language_model import LanguageModel
from attar.train.objectives import Feature, Logit, Response
from attar.train.onpolicy import OnPolicyRows
from attar.train.trainer import DistillationTrainer
from attar.train.writing import Sampling

VOCABULARY = 48
LAYERS = {"model.layers.0": "model.layers.1"}
KIND = SignalKind("hidden", layers=tuple(LAYERS.values()), dtype=torch.float64)
MEMBERS = {"one": 1, "ddp": 2, "fsdp": 2, "fsdp-one": 1}
BATCHES_PER_STEP = 4


@dataclass(frozen=True)
class Case:
    """One run of the trainer."""

    name: str
    launch: str = "one"
    source: str = "live"
    """live teacher, hidden states from a store, module: a linear one in place of language models, or written: a live
    teacher, and every other batch is the student's own"""
    tied: bool = True
    steps: int = 20
    resume: str | None = None
    """name of the run from whose tenth step this one goes on"""
    batches_per_step: int = BATCHES_PER_STEP
    plugin: dict | None = None
    """more settings of FSDP"""
    half: bool = False
    """mixed precision, as accelerate sets it for FSDP"""


class Tokenizer:
    """As much of one as signals need."""

    def get_vocab(self):
        return {str(i): i for i in range(VOCABULARY)}


def model(width, layers, seed, tied):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).double()


def teacher(tied):
    return model(24, 3, 1, tied)


def rows(seed, n):
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(n):
        ids = rng.integers(0, VOCABULARY, rng.integers(4, 20)).astype(np.int32)
        # Some rows supervise one token, some all, and some none: no two processes see as many.
        supervised = np.arange(len(ids)) >= rng.integers(1, len(ids) + 1)
        examples.append(TokenizedExample(f"{seed}-{number}", ids, supervised))
    return examples


def write_signals(folder, examples):
    store = SignalStore(folder, {"kind": "hidden"})
    for start in range(0, len(examples), 32):
        part = examples[start : start + 32]
        store.append([e.id for e in part], ask(teacher(True).eval(), Tokenizer(), part, KIND), 0)
    keep_head(store, teacher(True), Tokenizer())


class Kept(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({"step": state.global_step, **logs})


def open_fsdp(case):
    """accelerate opens FSDP for accelerators alone; of a CPU it makes DDP. Nothing else of it differs."""
    state = Accelerator(cpu=True).state
    wrapping = {"auto_wrap_policy": "transformer_based_wrap", "state_dict_type": "FULL_STATE_DICT"}
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **{**wrapping, **(case.plugin or {})})
    if case.half:
        state.fsdp_plugin.set_mixed_precision("bf16")
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def parts(folder, case):
    """What is trained, on what, and how it is put into batches."""
    if case.source == "module":
        torch.manual_seed(0)
        data = [{"input": torch.randn(4).double(), "labels": torch.tensor(i % 3)} for i in range(85)]
        student, tutor = (torch.nn.Linear(4, 3, dtype=torch.float64) for _ in range(2))
        objectives = [Logit(), Response(labels="gold", weight=0.5)]
        return {
            "model": student,
            "teacher": tutor,
            "objectives": objectives,
            "train_dataset": data[:80],
            "eval_dataset": data[80:],
        }
    reader = None
    if case.source == "hidden":
        reader = SignalReader(SignalStore(folder / "signals", {"kind": "hidden"}), KIND, VOCABULARY)
    objectives = [Response(weight=0.5), Logit(temperature=2.0), Feature(LAYERS, loss="mse", weight=0.3)]
    student = LanguageModel(
        model(16, 2, 0, case.tied),
        objectives,
        teacher(case.tied) if reader is None else None,
        teacher_head=None if reader is None else reader.head(),
    )
    data = TokenizedRows(rows(5, 176), 36)
    if case.source == "written":
        how = Sampling(ends=frozenset({1}), max_new_tokens=6)
        answered = [example for example in rows(5, 176) if example.supervised.any()]
        data = OnPolicyRows(answered, 36, sampling=how, share=0.5, refresh=3)
    return {
        "model": student,
        "train_dataset": data,
        "eval_dataset": TokenizedRows(rows(5, 9), 36),
        "data_collator": Collator(0, reader),
    }


def share(module):
    """How much of its weights a process holds."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in module.parameters()]
    return sum(p.numel() for p in local) / sum(p.numel() for p in module.parameters())


def run(folder: Path, case: Case) -> None:
    """Train, and keep what came of it in ``folder / name``."""
    out = folder / case.name
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=case.steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=case.batches_per_step // MEMBERS[case.launch],
        learning_rate=5e-3,
        # A rate that changes, and does not depend on how many steps there are.
        lr_scheduler_type="inverse_sqrt",
        warmup_steps=2,
        weight_decay=0.1,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="steps",
        save_steps=10,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=3,
    )
    if case.launch.startswith("fsdp"):
        open_fsdp(case)
    kept = Kept()
    resume = None if case.resume is None else str(folder / case.resume / "checkpoint-10")
    out.mkdir(exist_ok=True)
    try:
        trainer = DistillationTrainer(args=arguments, callbacks=[kept], **parts(folder, case))
        trainer.train(resume_from_checkpoint=resume)
    except AttarError as error:
        (out / "error.txt").write_text(f"{type(error).__name__}: {error}")
        return
    trainer.save_model(str(out / "last"))
    if case.source == "written":
        own = trainer.train_dataset.examples[len(trainer.train_dataset) :]
        rank = trainer.args.process_index
        (out / f"written-{rank}.json").write_text(json.dumps([example.ids.tolist() for example in own]))
    student = trainer.student_state_dict()
    if trainer.args.process_index == 0:
        save_file({name: tensor.clone() for name, tensor in student.items()}, out / "student.safetensors")
        shares = [share(trainer.student), *([share(trainer.distilled.teacher)] if trainer.distilled.teacher else [])]
        (out / "logs.json").write_text(json.dumps({"logs": kept.logs, "shares": shares}))


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    folder: Path

    @property
    def saved(self):
        """Weights by name: all that is trained."""
        return load_file(self.folder / "last" / "model.safetensors")

    @property
    def student(self):
        """The student's weights, as it is given to whoever exports it."""
        return load_file(self.folder / "student.safetensors")

    @property
    def logs(self):
        return json.loads((self.folder / "logs.json").read_text())["logs"]

    @property
    def shares(self):
        """Of student and teacher, what the first process holds."""
        return json.loads((self.folder / "logs.json").read_text())["shares"]

    def written(self, rank):
        """Ids of what a process's student wrote last."""
        return json.loads((self.folder / f"written-{rank}.json").read_text())

    @property
    def error(self):
        return (self.folder / "error.txt").read_text()

    def values(self, steps):
        """Everything logged of these steps that does not depend on the clock or on float32 sums of the Trainer."""
        exact = ("loss_", "eval_", "gradient_", "grad_norm", "learning_rate", "on_policy_logit")
        return {
            (log["step"], name): value
            for log in self.logs
            for name, value in log.items()
            if log["step"] in steps and name.startswith(exact)
        }


def member(folder, case, rank, port):
    """One process of a run, told what torchrun tells it; nothing where a run has no launcher."""
    if case.launch != "one":
        members = MEMBERS[case.launch]
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": members, "LOCAL_WORLD_SIZE": members}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()})
    run(folder, case)


def main() -> None:
    """Each case in processes of its own, forked, so that what takes seconds to import is imported once."""
    folder, plan = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    write_signals(folder / "signals", rows(5, 176))
    context = multiprocessing.get_context("fork")
    for case in (Case(**case) for case in plan):
        start = time.time()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        members = [
            context.Process(target=member, args=(folder, case, rank, port)) for rank in range(MEMBERS[case.launch])
        ]
        for process in members:
            process.start()
        # One that failed leaves the others waiting for it.
        while any(process.is_alive() for process in members) and not any(process.exitcode for process in members):
            time.sleep(0.02)
        for process in members:
            process.kill()
            process.join()
        if any(process.exitcode for process in members):
            sys.exit(f"{case.name} failed")
        sys.stderr.write(f"{case.name}: {time.time() - start:.1f} s\n")


if __name__ == "__main__":
    main()
