"""Distil a sentence encoder of 135 million parameters into one of two layers, and measure what is kept.

    python examples/embedding/distil.py [--model FOLDER]

FOLDER is a causal language model's; without it, the demo's teacher, which is fetched and converted once. Prints a
Markdown table to stderr and, last on stdout, one line of JSON. README.md tells what is compared.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import attar
from attar.demo import teacher_folder
from attar.evaluate.stats import Estimate, mean_estimate, paired_difference
from attar.progress import Silent
from attar.students.build import reduce_rows

POOL = Path(__file__).parents[1] / "router" / "pool.jsonl"
HELD_OUT = 400
WIDTH = 64
NEIGHBOURS = 10


class Pool(nn.Module):
    """The mean over tokens: [batch, length, width] and a mask -> [batch, width]."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Padding counts for nothing."""
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Encoder(nn.Module):
    """Token embeddings, two layers of attention, the mean. ``pool`` is what the feature losses read."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(table.clone(), freeze=False)
        width = table.shape[1]
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.pool = Pool()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, text: Tensor) -> Tensor:
        """[batch, width]; which text it is, the student does not look at."""
        states = self.layers(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.pool(states, attention_mask)


class Remembered(nn.Module):
    """A teacher that was asked once: it looks up what it said about text number ``text``."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.pool = nn.Embedding.from_pretrained(embeddings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, text: Tensor) -> Tensor:
        """[batch, teacher's width]; the tokens, the teacher does not look at."""
        return self.pool(text)


def rows_of(tokenizer: Any, texts: list[str]) -> list[dict[str, Any]]:
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    return [{"input_ids": ids[:48], "text": number} for number, ids in enumerate(encoded)]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[number, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "text": torch.tensor([row["text"] for row in rows])}


@torch.no_grad()
def encode(forward: Callable[..., Tensor], rows: list[dict[str, Any]], size: int = 64) -> Tensor:
    """Embeddings [texts, width], the longest texts together so that little is padded."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
    parts = [forward(**collate([rows[n] for n in order[start : start + size]])) for start in range(0, len(rows), size)]
    return torch.cat(parts)[torch.argsort(torch.tensor(order))]


def ask(folder: Path, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """The teacher's sentence embeddings, the mean of its last states, and its token table."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pool = Pool()

    def forward(input_ids: Tensor, attention_mask: Tensor, text: Tensor) -> Tensor:
        return pool(model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, attention_mask)

    return encode(forward, rows), model.get_input_embeddings().weight.detach()


def train(
    student: nn.Module, objectives: list[Any], teacher: nn.Module, rows: list[Any], *, epochs: int, seed: int
) -> tuple[nn.Module, nn.Module]:
    with tempfile.TemporaryDirectory() as work:
        trainer = attar.DistillationTrainer(
            model=student,
            teacher=teacher,
            objectives=objectives,
            train_dataset=rows,
            data_collator=collate,
            args=TrainingArguments(
                output_dir=work,
                num_train_epochs=epochs,
                per_device_train_batch_size=64,
                learning_rate=2e-3,
                lr_scheduler_type="cosine",
                seed=seed,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    [*projectors] = trainer.distilled.projectors.values()
    return trainer.student.eval(), projectors[0].eval()


def neighbours(embeddings: Tensor) -> Tensor:
    """Of each text [texts, 10], the nearest others by cosine."""
    similar = F.normalize(embeddings, dim=1) @ F.normalize(embeddings, dim=1).T
    return similar.fill_diagonal_(-2).topk(NEIGHBOURS).indices


def overlap(embeddings: Tensor, teacher: Tensor) -> np.ndarray:
    """Of each text, which share of the teacher's 10 nearest are among its own."""
    ours, theirs = neighbours(embeddings), neighbours(teacher)
    return (ours[:, :, None] == theirs[:, None, :]).any(2).double().mean(1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    start = time.perf_counter()
    folder = args.model or teacher_folder(Silent())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in POOL.read_text("utf-8").splitlines()]
    texts = [texts[number] for number in np.random.default_rng(0).permutation(len(texts))]
    rows = rows_of(tokenizer, texts)
    said, table = ask(folder, rows)
    asked = time.perf_counter() - start
    # A language model's states share one large direction, before which all texts look alike: it is taken out.
    train_rows, test_rows = rows[HELD_OUT:], rows[:HELD_OUT]
    said = said - said[HELD_OUT:].mean(0)
    test = said[:HELD_OUT]
    components = torch.linalg.svd(said[HELD_OUT:], full_matrices=False).Vh[:WIDTH]
    objectives = [
        attar.Feature({"pool": "pool"}, loss="cosine"),
        attar.Feature({"pool": "pool"}, loss="rkd", weight=0.02),
    ]
    small = reduce_rows(table, WIDTH)
    scores: dict[str, dict[str, list[np.ndarray]]] = {}

    def measure(name: str, embeddings: Tensor, mapped: Tensor | None = None) -> None:
        found = scores.setdefault(name, {"overlap": [], "cosine": []})
        found["overlap"].append(overlap(embeddings, test))
        if mapped is not None:
            found["cosine"].append(F.cosine_similarity(mapped, test).double().numpy())

    measure("teacher's embeddings, PCA", test @ components.T, test @ components.T @ components)
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        student = Encoder(small).eval()
        measure("student before", encode(student, test_rows))
        student, projector = train(student, objectives, Remembered(said), train_rows, epochs=args.epochs, seed=seed)
        with torch.no_grad():
            embeddings = encode(student, test_rows)
            measure("student after", embeddings, projector(embeddings))
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    with torch.no_grad():
        static = encode(lambda input_ids, attention_mask, text: Pool()(small[input_ids], attention_mask), test_rows)
    measure("token embeddings, PCA, mean", static)

    def shown(rows: list[np.ndarray]) -> str:
        if not rows:
            return ""
        estimate = mean_estimate(np.array(rows))
        return f"{estimate.value:.3f} ({estimate.lo:.3f} to {estimate.hi:.3f})"

    result: dict[str, object] = {"held_out": HELD_OUT, "trained_on": len(train_rows), "width": WIDTH, "arms": {}}
    print(f"\n| {WIDTH} numbers | cosine to the teacher | overlap@{NEIGHBOURS} |\n|---|---|---|", file=sys.stderr)
    for name in ("student before", "token embeddings, PCA, mean", "student after", "teacher's embeddings, PCA"):
        found = scores[name]
        print(f"| {name} | {shown(found['cosine'])} | {shown(found['overlap'])} |", file=sys.stderr)
        result["arms"][name] = {
            key: mean_estimate(np.array(values)).to_json() for key, values in found.items() if values
        }
    for other in ("student before", "token embeddings, PCA, mean", "teacher's embeddings, PCA"):
        gain: Estimate = paired_difference(scores["student after"]["overlap"], scores[other]["overlap"])
        result[f"after - {other}"] = gain.to_json()
        print(f"overlap, after - {other}: {gain.value:+.3f} ({gain.lo:+.3f} to {gain.hi:+.3f})", file=sys.stderr)
    result["parameters"] = {"student": sum(p.numel() for p in student.parameters())}
    wall = round(time.perf_counter() - start)
    result["seconds"] = {"teacher": round(asked), "wall": wall, "cpu": round(time.process_time())}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
