"""Distil a network on scikit-learn's digits, and repeat two experiments of Hinton, Vinyals and Dean (2015).

    python examples/digits/distil.py [--seeds 10]

Prints a Markdown table to stderr and, last on stdout, one line of JSON. README.md tells what is compared.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

import attar
from attar.evaluate.stats import Estimate, mean_estimate, paired_difference

OMITTED = 3
TEMPERATURE = 4.0


class Network(nn.Module):
    """Two hidden layers. A batch's keys are the arguments of ``forward``; ``hidden`` is what the feature loss reads."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout))
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, 10))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [examples, 10] of pixels [examples, 64]."""
        return self.head(self.hidden(self.first(pixels)))


HARD = [attar.Response(labels="gold")]
SOFT = [attar.Logit(temperature=TEMPERATURE)]
FEATURE = [*SOFT, attar.Feature({"hidden": "hidden"}, loss="cosine")]


def distil(
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    objectives: list[Any],
    teacher: nn.Module | None,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> nn.Module:
    """The one call that the example is about."""
    rows = [{"pixels": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
    with tempfile.TemporaryDirectory() as work:
        trainer = attar.DistillationTrainer(
            model=student,
            teacher=teacher,
            objectives=objectives,
            train_dataset=rows,
            args=TrainingArguments(
                output_dir=work,
                max_steps=steps,
                per_device_train_batch_size=64,
                learning_rate=learning_rate,
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
    return trainer.student.eval()


@torch.no_grad()
def bias_to_match(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """What is added to the omitted class's logit, so that its mean probability is the teacher's; no label is used."""
    wanted = float(teacher(images).softmax(-1)[:, OMITTED].mean())
    logits = student(images).double()
    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        moved = logits.clone()
        moved[:, OMITTED] += middle
        low, high = (middle, high) if float(moved.softmax(-1)[:, OMITTED].mean()) < wanted else (low, middle)
    return low


def one_seed(data: list[tuple[Tensor, Tensor]], seed: int, steps: int) -> tuple[dict[str, np.ndarray], float]:
    """Of every arm, which test images it gets right [images], and the bias that was added."""
    torch.set_num_threads(1)
    (train_x, train_y), (spare_x, _), (test_x, test_y) = data
    torch.manual_seed(seed)
    large = {"steps": 2 * steps, "learning_rate": 3e-3, "seed": seed}
    small = {"steps": steps, "learning_rate": 1e-2, "seed": seed}
    teacher = distil(Network(256, 0.3), train_x, train_y, HARD, None, **large)

    def student(images: Tensor, labels: Tensor, objectives: list[Any], width: int = 16) -> nn.Module:
        torch.manual_seed(seed)
        return distil(Network(width), images, labels, objectives, None if objectives is HARD else teacher, **small)

    def right(network: nn.Module, bias: float = 0.0) -> np.ndarray:
        with torch.no_grad():
            logits = network(test_x)
        logits[:, OMITTED] += bias
        return (logits.argmax(-1) == test_y).numpy()

    answers = {"teacher": right(teacher)}
    for name, objectives in (("hard", HARD), ("soft", SOFT), ("soft + feature", FEATURE)):
        answers[name] = right(student(train_x, train_y, objectives))
    seen = train_y != OMITTED
    answers["omitted, hard"] = right(student(train_x[seen], train_y[seen], HARD, 64))
    omitted = student(train_x[seen], train_y[seen], SOFT, 64)
    bias = bias_to_match(omitted, teacher, spare_x)
    answers["omitted, soft"] = right(omitted)
    answers["omitted, soft + bias"] = right(omitted, bias)
    few = np.random.default_rng(seed).permutation(len(train_y))[: round(0.03 * len(train_y))]
    for name, objectives in (("3 %, hard", HARD), ("3 %, soft", SOFT)):
        answers[name] = right(student(train_x[few], train_y[few], objectives, 64))
    return answers, bias


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    start = time.perf_counter()
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    # 600 are held out; on 197 others, whose labels are not used, the bias is found; 1,000 are left to train on.
    rest_x, test_x, rest_y, test_y = train_test_split(images, labels, test_size=600, random_state=0, stratify=labels)
    train_x, spare_x, train_y, spare_y = train_test_split(
        rest_x, rest_y, test_size=197, random_state=0, stratify=rest_y
    )
    parts = ((train_x, train_y), (spare_x, spare_y), (test_x, test_y))
    data = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in parts]
    arms: dict[str, list[np.ndarray]] = {}
    biases = []
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        done = pool.map(one_seed, [data] * args.seeds, range(args.seeds), [args.steps] * args.seeds)
        for seed, (answers, bias) in enumerate(done):
            biases.append(bias)
            for name, right in answers.items():
                arms.setdefault(name, []).append(right)
            errors = {name: int((~right).sum()) for name, right in answers.items()}
            print(f"seed {seed}, errors: {errors}", file=sys.stderr, flush=True)

    threes = test_y == OMITTED
    scores = {name: np.array(rows, dtype=float) for name, rows in arms.items()}

    def shown(estimate: Estimate) -> str:
        return f"{estimate.value:.3f} ({estimate.lo:.3f} to {estimate.hi:.3f})"

    print(f"\n| arm | accuracy on {len(test_y)} (95 %) | on the {int(threes.sum())} threes |", file=sys.stderr)
    print("|---|---|---|", file=sys.stderr)
    result = {"seeds": args.seeds, "test": len(test_y), "arms": {}, "differences": {}}
    for name, table in scores.items():
        every, only = mean_estimate(table), mean_estimate(table[:, threes])
        result["arms"][name] = {"accuracy": every.to_json(), "threes": only.to_json()}
        print(f"| {name} | {shown(every)} | {shown(only)} |", file=sys.stderr)
    pairs = [
        ("soft", "hard"),
        ("soft + feature", "soft"),
        ("omitted, soft", "omitted, hard"),
        ("omitted, soft + bias", "omitted, soft"),
        ("3 %, soft", "3 %, hard"),
    ]
    print("\n| difference | accuracy (95 %) |\n|---|---|", file=sys.stderr)
    for better, worse in pairs:
        difference = paired_difference(scores[better], scores[worse])
        result["differences"][f"{better} - {worse}"] = difference.to_json()
        print(f"| {better} - {worse} | {shown(difference)} |", file=sys.stderr)
    result["bias"] = {"mean": float(np.mean(biases)), "least": min(biases), "most": max(biases)}
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    result["seconds"] = {"wall": round(time.perf_counter() - start), "cpu": round(usage.ru_utime + usage.ru_stime)}
    print(f"\nbias {result['bias']}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
