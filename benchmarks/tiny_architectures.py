"""Which network a tiny student should be: each form's divergence from the teacher on the pool's held-out requests.

    python benchmarks/tiny_architectures.py [FOLDER] [--seeds 3]

FOLDER is a run of the demo (made up to its signals where they are missing). Every form is trained on the same signals
by the same trainer with the recipe's settings, and is read at its best checkpoint by the held-out divergence, so the
figures compare forms and are no estimate for fresh requests. Labelled cases are not looked at. A Markdown table goes
to stderr; the last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from attar import pipeline
from attar.data.files import read_jsonl
from attar.demo import demo_recipe
from attar.engines.textclassifier import ConvolutionNet, TinyConfig, ngram_ids
from attar.progress import Silent
from attar.signals.score import teacher_log_probs
from attar.students.build import reduce_rows, teacher_table
from attar.train.objectives import Logit
from attar.train.stage import fit
from attar.workspace import open_run


class Bag(nn.Module):
    """A mean of table rows, weighted by a learned importance of each row."""

    def __init__(self, rows, width):
        super().__init__()
        self.table = nn.Embedding(rows, width)
        nn.init.normal_(self.table.weight, std=0.3)
        self.importance = nn.Embedding(rows, 1)
        nn.init.zeros_(self.importance.weight)

    def forward(self, ids, mask):
        visible = mask != 0
        if self.training:
            kept = visible & (torch.rand(ids.shape) >= HIDDEN_SHARE)
            visible = torch.where(kept.any(1, keepdim=True), kept, visible)
        importance = self.importance(ids).squeeze(-1).masked_fill(~visible, float("-inf"))
        return (importance.softmax(-1)[:, :, None] * self.table(ids)).sum(1)


class Bags(nn.Module):
    """Pooled token embeddings, pooled n-grams, or both, and one hidden layer."""

    def __init__(self, inputs, tables, student, labels):
        super().__init__()
        self.inputs = inputs
        self.bags = nn.ModuleDict({name: Bag(tables[name][0], student.width) for name in inputs})
        if "tokens" in inputs:
            self.bags["tokens"].table.weight.data.copy_(tables["tokens"][1])
        width = student.width * len(inputs)
        self.head = nn.Sequential(
            nn.LayerNorm(width),
            nn.Dropout(student.dropout),
            nn.Linear(width, 256),
            nn.GELU(),
            nn.Dropout(student.dropout),
            nn.Linear(256, labels),
        )

    def forward(self, **batch):
        pooled = [bag(batch[f"{name}_ids"], batch[f"{name}_mask"]) for name, bag in self.bags.items()]
        return SequenceClassifierOutput(logits=self.head(torch.cat(pooled, -1)))


def token_table(tables):
    """The teacher's reduced token embeddings, to be trained on."""
    return nn.Embedding.from_pretrained(tables["tokens"][1].clone(), freeze=False)


class Convolutions(nn.Module):
    """attar's tiny student, and beside it, where asked for, a bag of n-grams."""

    def __init__(self, inputs, tables, student, labels):
        super().__init__()
        self.inputs = inputs
        config = TinyConfig(
            "convolutions",
            ("",) * labels,
            tables["tokens"][0],
            student.width,
            student.units,
            student.dropout,
            student.token_dropout or 0.0,
            student.max_tokens,
        )
        self.convolutions = ConvolutionNet(config)
        self.convolutions.table.weight.data.copy_(tables["tokens"][1])
        self.grams = None
        if "ngrams" in inputs:
            self.grams = Bag(tables["ngrams"][0], student.width)
            self.gram_head = nn.Sequential(nn.Dropout(student.dropout), nn.Linear(student.width, labels))

    def forward(self, **batch):
        logits = self.convolutions(batch["tokens_ids"], batch["tokens_mask"]).logits
        if self.grams is not None:
            logits = logits + self.gram_head(self.grams(batch["ngrams_ids"], batch["ngrams_mask"]))
        return SequenceClassifierOutput(logits=logits)


class Attention(nn.Module):
    """A transformer encoder of two layers over the tokens, mean-pooled."""

    def __init__(self, inputs, tables, student, labels):
        super().__init__()
        self.inputs = inputs
        self.table = token_table(tables)
        self.places = nn.Embedding(student.max_tokens, student.width)
        layer = nn.TransformerEncoderLayer(
            student.width, 4, 4 * student.width, student.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(student.width), nn.Linear(student.width, labels))

    def forward(self, **batch):
        ids, mask = batch["tokens_ids"], batch["tokens_mask"]
        x = self.table(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        x = self.encoder(x, src_key_padding_mask=mask == 0)
        pooled = (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return SequenceClassifierOutput(logits=self.head(pooled))


# Share of a text's features that a step of training does not show to a bag.
HIDDEN_SHARE = 0.3

FORMS = {
    "tokens + n-grams": (Bags, ("ngrams", "tokens")),
    "n-grams": (Bags, ("ngrams",)),
    "tokens": (Bags, ("tokens",)),
    "convolutions": (Convolutions, ("tokens",)),
    "convolutions + n-grams": (Convolutions, ("ngrams", "tokens")),
    "transformer": (Attention, ("tokens",)),
}


class Classifier:
    def __init__(self, labels, module, tokenizer, student):
        self.labels, self.module, self._tokenizer, self._student = labels, module, tokenizer, student

    def encode(self, text):
        lists = {
            "ngrams": lambda: ngram_ids(text, self._student.buckets),
            "tokens": lambda: self._tokenizer.encode(" " + text.lower(), add_special_tokens=False).ids,
        }
        return tuple(
            lists[name]()[: 16 * self._student.max_tokens if name == "ngrams" else self._student.max_tokens] or [0]
            for name in self.module.inputs
        )

    def collate(self, rows):
        batch = {}
        for name, lists in zip(self.module.inputs, zip(*rows, strict=True), strict=True):
            width = max(map(len, lists))
            batch[f"{name}_ids"] = torch.tensor([ids + [0] * (width - len(ids)) for ids in lists])
            batch[f"{name}_mask"] = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in lists])
        return batch


@torch.inference_mode()
def read(classifier, texts):
    """Log-probabilities, one text at a time, and the median milliseconds of one."""
    tables, times = [], []
    for text in texts:
        start = time.perf_counter()
        tables.append(classifier.module(**classifier.collate([classifier.encode(text)])).logits.log_softmax(-1)[0])
        times.append(1000 * (time.perf_counter() - start))
    return torch.stack(tables).numpy(), statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", default="runs/router")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    recipe = demo_recipe(Path(args.folder), [], Silent())
    pipeline.run(recipe, until="calibrate")
    table, tokenizer = teacher_table(recipe)
    student, labels = recipe.student, recipe.data.labels
    tables = {"tokens": (len(table), reduce_rows(table, student.width)), "ngrams": (student.buckets, None)}
    results = {}
    with open_run(recipe.folder, recipe.name) as run, tempfile.TemporaryDirectory() as work:
        texts = [row["text"] for row in read_jsonl(run.path("data", "val.jsonl"))]
        teacher = np.array(teacher_log_probs(run, "val"), dtype=np.float64)
        for name, (form, inputs) in FORMS.items():
            figures = []
            for seed in range(args.seeds):
                torch.manual_seed(seed)
                module = form(inputs, tables, student, len(labels))
                classifier = Classifier(labels, module, tokenizer, student)
                fit(recipe, run, classifier, [Logit()], Path(work) / f"{len(results)}-{seed}", seed)
                answers, milliseconds = read(Classifier(labels, module.eval(), tokenizer, student), texts)
                kl = float((np.exp(teacher) * (teacher - answers)).sum(-1).mean())
                agreement = float((answers.argmax(-1) == teacher.argmax(-1)).mean())
                figures.append((kl, agreement, milliseconds))
                print(f"{name} seed {seed}: KL {kl:.4f}, agreement {agreement:.3f}", file=sys.stderr, flush=True)
            parameters = sum(p.numel() for p in module.parameters())
            kl, agreement, milliseconds = np.mean(figures, axis=0)
            # Two bytes a weight, and the tokenizer's file where the form reads tokens.
            size = 2 * parameters + (len(tokenizer.to_str().encode()) if "tokens" in inputs else 0)
            results[name] = {
                "kl": round(float(kl), 4),
                "kl_seeds": [round(f[0], 4) for f in figures],
                "agreement": round(float(agreement), 3),
                "size_mb": round(size / 1e6, 1),
                "p50_ms": round(float(milliseconds), 2),
            }
    print("\n| form | KL to the teacher | agreement | MB served | p50 ms |\n|---|---|---|---|---|", file=sys.stderr)
    for name, row in results.items():
        print(
            f"| {name} | {row['kl']:.3f} | {row['agreement']:.3f} | {row['size_mb']} | {row['p50_ms']} |",
            file=sys.stderr,
        )
    print(json.dumps({"held_out": len(texts), "seeds": args.seeds, "forms": results}))


if __name__ == "__main__":
    main()
