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
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from attar.signals.language import SignalKind, SignalReader, ask, keep_head
from attar.signals.store import SignalStore
from attar.tokens import TokenizedExample
from attar.train.batches import Collator, TokenizedRows
from attar.train.language_model import LanguageModel
from attar.train.objectives import Feature, Logit, Response
from attar.train.trainer import DistillationTrainer

VOCABULARY, STEPS, ACCUMULATION = 48, 20, 2
LAYERS = {"model.layers.0": "model.layers.1"}
KIND = SignalKind("hidden", layers=tuple(LAYERS.values()), dtype=torch.float64)
MEMBERS = {"one": 1, "ddp": 2, "fsdp": 2, "fsdp-one": 1}


@dataclass(frozen=True)
class Case:
    """One run of the trainer."""

    name: str
    launch: str = "one"
    source: str = "live"
    tied: bool = True
    steps: int = STEPS
    resume: str | None = None
    """name of the run whose checkpoint this one goes on from"""
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
        attn_implementation="eager",
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
    """Loss by loss what was logged."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({"step": state.global_step, **logs})


def open_fsdp(settings, half):
    """accelerate opens FSDP for accelerators alone; of a CPU it makes DDP. Nothing else of it differs."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = Accelerator(cpu=True).state
    settings = {"auto_wrap_policy": "transformer_based_wrap", "state_dict_type": "FULL_STATE_DICT", **(settings or {})}
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **settings)
    if half:
        state.fsdp_plugin.set_mixed_precision("bf16")
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def run(folder: Path, case: Case) -> None:
    """Train, and keep what came of it in ``folder / name``."""
    out = folder / case.name
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=case.steps,
        num_train_epochs=1,
        gradient_accumulation_steps=ACCUMULATION * 2 // MEMBERS[case.launch],
        learning_rate=5e-3,
        optim="adamw_torch",
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
        open_fsdp(case.plugin, case.half)
    examples = rows(5, 176)
    reader = None
    if case.source == "hidden":
        reader = SignalReader(SignalStore(folder / "signals", {"kind": "hidden"}), KIND, VOCABULARY)
    live = reader is None
    objectives = [Response(weight=0.5), Logit(temperature=2.0), Feature(LAYERS, loss="mse", weight=0.3)]
    kept = Kept()
    trainer = DistillationTrainer(
        model=LanguageModel(
            model(16, 2, 0, case.tied),
            objectives,
            teacher(case.tied) if live else None,
            teacher_head=None if live else reader.head(),
        ),
        args=arguments,
        train_dataset=TokenizedRows(examples, 36),
        eval_dataset=TokenizedRows(rows(6, 7) if live else examples[:7], 36),
        data_collator=Collator(0, reader),
        callbacks=[kept],
    )
    resume = None if case.resume is None else str(folder / case.resume / "checkpoint-10")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(out / "last"))
    state = trainer.student_state_dict()
    if trainer.args.process_index == 0:
        save_file({name: tensor.clone() for name, tensor in state.items()}, out / "student.safetensors")
        (out / "logs.json").write_text(json.dumps(kept.logs))


def read(folder, name):
    """Final weights, the student's alone, and what was logged."""
    out = folder / name
    logs = json.loads((out / "logs.json").read_text())
    return load_file(out / "last" / "model.safetensors"), load_file(out / "student.safetensors"), logs


def member(folder, case, rank, port):
    """One process of a run, with what torchrun tells it; no launcher's where there is one alone."""
    if case.launch != "one":
        several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": MEMBERS[case.launch]}
        several |= {"LOCAL_WORLD_SIZE": MEMBERS[case.launch], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in several.items()})
    run(folder, case)


def main() -> None:
    """Each case in processes of its own, forked, so that what takes seconds to import is imported once."""
    folder, plan = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for case in (Case(**case) for case in plan):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start = time.time()
        context = multiprocessing.get_context("fork")
        members = [
            context.Process(target=member, args=(folder, case, rank, port)) for rank in range(MEMBERS[case.launch])
        ]
        for process in members:
            process.start()
        # One that failed leaves the others waiting for it.
        while any(process.is_alive() for process in members) and not any(process.exitcode for process in members):
            time.sleep(0.05)
        for process in members:
            if process.exitcode != 0:
                process.kill()
        if any(process.exitcode for process in members):
            sys.exit(f"{case.name} failed")
        sys.stderr.write(f"{case.name}: {time.time() - start:.1f} s\n")


if __name__ == "__main__":
    main()
